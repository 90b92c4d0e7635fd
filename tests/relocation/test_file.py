"""Promises of file: sources: the pin is that of the content, and only plain files are read."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.core.declarations import Loaded, Source
from jobs.core.errors import UserError
from jobs.relocation import download, sources
from jobs.relocation.sources.file import folder_sha256, path_sha256
from tests.relocation.conftest import SHA256, names


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def test_the_pin_of_a_folder_is_what_is_documented(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.txt").write_text("x")
    (tmp_path / "a.txt").write_text("a")
    listed = [["a.txt", hashlib.sha256(b"a").hexdigest()], ["b/x.txt", hashlib.sha256(b"x").hexdigest()]]
    by_hand = hashlib.sha256(json.dumps(listed, separators=(",", ":")).encode()).hexdigest()
    assert folder_sha256(tmp_path) == by_hand


def test_the_pin_of_a_folder_changes_with_content_and_names_and_not_with_hidden_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    pin = folder_sha256(tmp_path)
    (tmp_path / ".hidden").write_text("editor's")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("main")
    assert folder_sha256(tmp_path) == pin
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    renamed = folder_sha256(tmp_path)
    (tmp_path / "b.txt").write_text("b")
    assert len({pin, renamed, folder_sha256(tmp_path)}) == 3


def test_a_folder_mounted_from_a_config_map_is_read_like_the_folder_in_git(tmp_path: Path, here: Loaded,
                                                                          draft: Path) -> None:
    plain, mounted = tmp_path / "plain", tmp_path / "mounted"
    plain.mkdir()
    (plain / "a.jsonl").write_text("{}")
    (mounted / "..2026_11_22").mkdir(parents=True)
    (mounted / "..2026_11_22" / "a.jsonl").write_text("{}")
    (mounted / "..data").symlink_to("..2026_11_22")
    (mounted / "a.jsonl").symlink_to("..data/a.jsonl")
    source = Source(source="file:mounted", sha256=folder_sha256(plain))
    download.fetch(sources.listing(here, source), draft)
    assert names(draft) == ["a.jsonl"]
    assert not (draft / "a.jsonl").is_symlink()


def test_a_file_that_is_not_there_is_named(here: Loaded) -> None:
    with pytest.raises(UserError, match=r"nothing\.jsonl: no such file or folder"):
        sources.listing(here, Source(source="file:nothing.jsonl", sha256=SHA256))


@pytest.mark.parametrize("make", [os.mkfifo, make_socket])
@pytest.mark.parametrize("folder", [False, True])
def test_a_fifo_or_a_socket_is_refused_and_not_waited_for(here: Loaded, draft: Path, folder: bool,
                                                          make: Callable[[Path], None]) -> None:
    path = here.path.parent / "data.jsonl"
    path.unlink(missing_ok=True)
    if folder:
        path.mkdir()
    make(path / "a.jsonl" if folder else path)
    for read in (sources.find_pin, sources.listing):
        with pytest.raises(UserError, match=r"\.jsonl: is a (FIFO|socket), not a plain file"):
            read(here, Source(source="file:data.jsonl", sha256=SHA256))


@pytest.mark.parametrize("folder", [False, True])
def test_a_wrong_pin_of_a_file_or_folder_names_both_digests_and_leaves_nothing(
        here: Loaded, draft: Path, folder: bool) -> None:
    path = here.path.parent / "data"
    if folder:
        path.mkdir()
        (path / "a.jsonl").write_text("{}")
        found = folder_sha256(path)
    else:
        path.write_text("{}")
        found = path_sha256(path)
    with pytest.raises(UserError) as error:
        download.fetch(sources.listing(here, Source(source="file:data", sha256=SHA256)), draft)
    assert SHA256 in str(error.value)
    assert found in str(error.value)
    assert "jobs pin" in str(error.value)
    assert names(draft) == []
