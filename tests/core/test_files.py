"""Promises of files on volumes: reading never blocks and takes little memory; a write is whole or did not happen."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from jobs.core import files
from jobs.core.errors import UserError
from jobs.tools.pods import CHECKOUT


def _socket(file: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(file))  # a socket's path has at most 108 bytes


def _link(file: Path) -> None:
    (file.parent / "target").write_text("{}")
    file.symlink_to("target")


NOT_PLAIN: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo, "folder": Path.mkdir, "socket": _socket, "link": _link,
    "link to a device": lambda file: file.symlink_to("/dev/zero")}


@pytest.fixture(params=NOT_PLAIN)
def not_plain(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    file = tmp_path / "file"
    NOT_PLAIN[request.param](file)
    return file


@pytest.mark.timeout(10)
def test_what_is_not_a_plain_file_is_neither_read_nor_waited_for(not_plain: Path) -> None:
    for attempt in (lambda: files.read_plain_file(not_plain, 100), lambda: files.append_line(not_plain, "line")):
        with pytest.raises(UserError) as raised:
            attempt()
        assert str(raised.value) == f"{not_plain}: is not a plain file"


@pytest.mark.timeout(10)
def test_a_link_is_followed_where_it_is_meant_to_be_and_only_to_a_plain_file(tmp_path: Path) -> None:
    _link(tmp_path / "link")
    assert files.read_plain_file(tmp_path / "link", 100, follow_links=True) == b"{}"
    (tmp_path / "device").symlink_to("/dev/zero")
    with pytest.raises(UserError, match="is not a plain file"):
        files.read_plain_file(tmp_path / "device", 100, follow_links=True)


@pytest.mark.timeout(10)
@pytest.mark.parametrize(("make", "kind"), [
    (os.mkfifo, "a FIFO"), (_socket, "a socket"), (Path.mkdir, "a folder"),
    (lambda file: file.symlink_to("/dev/zero"), "a device")])
def test_what_has_no_bytes_to_hash_is_refused_by_its_kind(
        tmp_path: Path, make: Callable[[Path], object], kind: str) -> None:
    make(tmp_path / "file")
    with pytest.raises(UserError, match=f"^{tmp_path}/file: is {kind}, not a plain file. Put a file "):
        files.sha256_of(tmp_path / "file")


def test_the_sha256_is_that_of_the_bytes_also_through_a_link(tmp_path: Path) -> None:
    _link(tmp_path / "link")
    assert files.sha256_of(tmp_path / "link") == hashlib.sha256(b"{}").hexdigest()
    files.require_plain(tmp_path / "missing")  # who reads it says so
    with pytest.raises(FileNotFoundError):
        files.sha256_of(tmp_path / "missing")


def test_visible_files_are_listed_in_order_without_what_is_hidden(tmp_path: Path) -> None:
    for name in ("b", "a/z", "a/b/c", ".hidden", "a/.hidden", ".git/config"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert files.visible_files(tmp_path) == ["a/b/c", "a/z", "b"]


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 100)
    assert files.read_plain_file(tmp_path / "file", 100) == b"x" * 100
    (tmp_path / "empty").touch()
    assert files.read_plain_file(tmp_path / "empty", 100) == b""
    with pytest.raises(UserError, match=f"{tmp_path}/file: has 100 bytes, and at most 99 bytes are read"):
        files.read_plain_file(tmp_path / "file", 99)


def test_of_a_larger_file_the_end_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"one\ntwo\nthree\n")
    assert files.read_plain_file(tmp_path / "file", 6, tail=True) == b"three\n"
    assert files.read_plain_file(tmp_path / "file", 100, tail=True) == b"one\ntwo\nthree\n"


def test_a_file_that_grows_while_it_is_read_takes_no_more_than_its_limit(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fstat, size = os.fstat, [30]
    (tmp_path / "file").write_bytes(b"x" * 1000)
    monkeypatch.setattr(os, "fstat", lambda handle: SimpleNamespace(st_mode=fstat(handle).st_mode, st_size=size[0]))
    assert len(files.read_plain_file(tmp_path / "file", 20, tail=True)) == 20
    size[0] = 10
    with pytest.raises(UserError, match=r"has 21 bytes, and at most 20 bytes are read"):
        files.read_plain_file(tmp_path / "file", 20)


def test_a_huge_file_takes_no_memory(tmp_path: Path) -> None:
    """Sparse: 20 GB that cost nobody a byte of disk."""
    with (tmp_path / "huge").open("wb") as stream:
        stream.truncate(20 * 10**9)
    code = ("import resource; from pathlib import Path; from jobs.core import files\n"
            f"resource.setrlimit(resource.RLIMIT_AS, ({2**30}, {2**30}))\n"
            f"file = Path({str(tmp_path / 'huge')!r})\n"
            "assert files.read_plain_file(file, 2**16, tail=True) == bytes(2**16)\n"
            "files.read_plain_file(file, 2**16)\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].endswith("huge: has 20.0 GB, and at most 65536 bytes are read")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as raised:
        files.read_plain_file(tmp_path / "file", 100)
    assert raised.value.filename == str(tmp_path / "file")


def test_an_error_while_reading_or_appending_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")

    def broken(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error") as raised:
        files.append_line(tmp_path / "file", "line")
    assert raised.value.filename == str(tmp_path / "file")
    monkeypatch.setattr(os, "fdopen", broken)
    with pytest.raises(OSError, match="Input/output error") as raised:
        files.read_plain_file(tmp_path / "file", 100)
    assert raised.value.filename == str(tmp_path / "file")


def test_a_line_is_appended_after_one_that_was_torn(tmp_path: Path) -> None:
    for line in ("one", "two"):
        files.append_line(tmp_path / "file", line)
    assert (tmp_path / "file").read_text() == "one\ntwo\n"
    for torn in ("one\ntw", "o"):
        (tmp_path / "file").write_text(torn)
        files.append_line(tmp_path / "file", "three")
        assert (tmp_path / "file").read_text() == f"{torn}\nthree\n"


def test_a_write_can_be_read_by_others_and_leaves_nothing_else(tmp_path: Path) -> None:
    files.write_atomically(tmp_path / "file", "text")
    files.append_line(tmp_path / "lines", "text")
    for name in ("file", "lines"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~_umask()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "lines"]


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_a_write_that_fails_leaves_the_file_as_it_was_and_no_draft(tmp_path: Path) -> None:
    files.write_atomically(tmp_path / "file", "before")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            files.write_atomically(tmp_path / "file", "x" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "before")]


def test_a_volume_without_room_for_a_new_file_is_named_as_the_cause(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not that the draft, which was never made, cannot be removed."""
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match="No space left on device"):
        files.write_atomically(tmp_path / "file", "text")


def test_writing_starts_only_where_all_of_it_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: {tmp_path: SimpleNamespace(free=1000)}[folder])
    files.require_space(tmp_path, 1000)
    with pytest.raises(UserError, match=f"^{tmp_path}: 2.5 MB are needed, but 1.0 kB are free on this volume. "):
        files.require_space(tmp_path, 2_500_000)
    with pytest.raises(UserError):
        files.require_space(tmp_path, 1001)


@pytest.mark.parametrize(("count", "text"), [
    (0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (3_400_000, "3.4 MB"), (5e9, "5.0 GB"), (2.5e12, "2.50 TB")])
def test_sizes_are_shown_in_decimal_units(count: float, text: str) -> None:
    assert files.human_bytes(count) == text


def test_two_containers_that_write_one_file_do_not_share_a_draft(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process number is 1 in every container, so it names nothing."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    fsync, between = os.fsync, [True]

    def write_another(handle: int) -> None:
        if between.pop() if between else False:
            files.write_atomically(tmp_path / "file", "short")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", write_another)
    files.write_atomically(tmp_path / "file", "a longer text")
    assert (tmp_path / "file").read_text() == "a longer text"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
