"""Promises of seals: what was verified and did not change is not read again, and any change is noticed."""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import shutil
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs.core import artifacts, files, retention, seals
from jobs.core.artifacts import Spec
from jobs.core.errors import UserError
from tests import build_signing

SPEC = Spec("volume", "model", {"n": 1})
FILES = {"config.json": b"{}", "weights-1": bytes(range(256)) * 40, "deep/weights-2": b"w" * 9000}


@pytest.fixture(autouse=True)
def small_and_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small artifacts are sealed, too, and times are as exact as they are here."""
    monkeypatch.setattr(seals, "LARGE", 1)
    monkeypatch.setattr(seals, "RESOLUTION_NS", 20 * 10**6)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files whose bytes are read to verify them."""
    names: list[str] = []

    def sha256_of(file: Path) -> str:
        names.append(file.name)
        return files.sha256_of(file)

    monkeypatch.setattr(artifacts, "sha256_of", sha256_of)
    return names


def write(folder: Path) -> None:
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def publish(volumes: Path, spec: Spec = SPEC, **options: Any) -> Path:
    return artifacts.publish(spec, volumes, write, keep=5, **options).path


def seal(artifact: Path) -> Path:
    return artifact.with_name(f".verified-{artifact.name}")


def test_what_is_published_is_sealed_and_not_read_again(tmp_path: Path, read: list[str],
                                                        caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "jobs")
    artifact = publish(tmp_path)
    read.clear()
    assert artifacts.find(SPEC, tmp_path) and artifacts.done(SPEC, tmp_path) and artifacts.wait([SPEC], tmp_path, 1)
    assert artifacts.done(SPEC, tmp_path), "`done` touches the manifest, and that is no change"
    assert read == []
    assert f"{SPEC}: verified by its seal (19.2 kB)" in caplog.messages
    artifacts.read(artifact)
    assert len(read) == 3, "who loads it, as serving does, reads every byte"


def test_what_is_published_is_sealed_where_the_times_of_new_files_are_behind(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By milliseconds: since Linux 6.13, files that were looked at have finer times than new ones."""
    real = seals.now_ns
    monkeypatch.setattr(seals, "now_ns", lambda folder: (real(folder) or 0) - 15 * 10**6)
    assert seal(publish(tmp_path)).exists()


def test_a_clock_that_was_set_back_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seals, "now_ns", lambda folder: 1)
    assert not seal(publish(tmp_path)).exists()


def test_a_stage_that_finds_no_seal_verifies_and_seals(tmp_path: Path, read: list[str],
                                                       caplog: pytest.LogCaptureFixture) -> None:
    seal(publish(tmp_path)).unlink()
    time.sleep(0.03)
    read.clear()
    caplog.set_level(logging.INFO, "jobs")
    assert artifacts.find(SPEC, tmp_path) and artifacts.find(SPEC, tmp_path)
    assert len(read) == 3
    assert caplog.messages == [f"{SPEC}: verified (19.2 kB read)", f"{SPEC}: verified by its seal (19.2 kB)"]


def test_a_stage_that_may_not_write_verifies_and_says_so(
        tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    artifact = publish(tmp_path)
    seal(artifact).unlink()
    real = Path.open

    def read_only(self: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        if "x" in mode or "w" in mode:
            raise OSError(30, "Read-only file system", str(self))
        return real(self, mode, *args, **options)

    monkeypatch.setattr(Path, "open", read_only)
    read.clear()
    caplog.set_level(logging.INFO, "jobs")
    assert artifacts.find(SPEC, tmp_path)
    assert len(read) == 3
    assert caplog.messages == [f"{SPEC}: verified (19.2 kB read), not sealed: the volume cannot be written here"]
    assert not seal(artifact).exists()


def test_small_artifacts_are_read_and_not_sealed(tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
                                                 ) -> None:
    monkeypatch.setattr(seals, "LARGE", 64 * 2**20)
    artifact = publish(tmp_path)
    read.clear()
    assert artifacts.find(SPEC, tmp_path)
    assert len(read) == 3 and not seal(artifact).exists()


# --- what is noticed --------------------------------------------------------------------------------------------------


def overwrite(file: Path, at: int, times: os.stat_result) -> None:
    """Change a byte in place, and set the time of modification back."""
    with file.open("r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)
        stream.seek(at)
        stream.write(bytes([byte[0] ^ 1]))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def overwrite_in_memory(file: Path, at: int, times: os.stat_result) -> None:
    with file.open("r+b") as stream, mmap.mmap(stream.fileno(), 0) as memory:
        memory[at] ^= 1
        memory.flush()
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def replace(file: Path, at: int, times: os.stat_result) -> None:
    """Put another file of the same size and time of modification in its place."""
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    other = file.with_name("other")
    other.write_bytes(content)
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    other.replace(file)


def append(file: Path, at: int, times: os.stat_result) -> None:
    with file.open("ab") as stream:
        stream.write(b"x")


def cut(file: Path, at: int, times: os.stat_result) -> None:
    os.truncate(file, at)


def remove(file: Path, at: int, times: os.stat_result) -> None:
    file.unlink()


def rename(file: Path, at: int, times: os.stat_result) -> None:
    file.rename(file.with_name("renamed"))


def add(file: Path, at: int, times: os.stat_result) -> None:
    file.with_name("added").write_bytes(b"")


def link(file: Path, at: int, times: os.stat_result) -> None:
    shutil.copy2(file, file.parent.parent / "elsewhere")
    file.unlink()
    file.symlink_to(file.parent.parent / "elsewhere")


CHANGES = [overwrite, overwrite_in_memory, replace, append, cut, remove, rename, add, link]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(sorted(FILES)), change=st.sampled_from(CHANGES), where=st.floats(0, 0.999))
def test_any_change_of_any_file_is_noticed(tmp_path_factory: pytest.TempPathFactory, name: str, change: Any,
                                           where: float) -> None:
    volumes = tmp_path_factory.mktemp("volumes")
    artifact = publish(volumes)
    assert seal(artifact).exists()
    file = artifact / name
    change(file, int(where * len(FILES[name])), file.stat())
    for _ in range(2):
        with pytest.raises(UserError, match=str(artifact)):
            artifacts.find(SPEC, volumes)
    assert change is link or not seal(artifact).exists(), "what is damaged is not left sealed"
    shutil.rmtree(volumes)


def test_files_that_are_exchanged_are_noticed(tmp_path: Path) -> None:
    artifact = publish(tmp_path)
    for before, after in (("weights-1", "x"), ("deep/weights-2", "weights-1"), ("x", "deep/weights-2")):
        (artifact / before).rename(artifact / after)
    with pytest.raises(UserError, match="was changed"):
        artifacts.find(SPEC, tmp_path)


def test_a_changed_manifest_is_noticed(tmp_path: Path) -> None:
    """Also one that is valid by itself: the seal is for the other."""
    artifact = publish(tmp_path)
    manifest = json.loads((artifact / "artifact.json").read_text())
    manifest["files"][1]["sha256"] = "0" * 64
    (artifact / "artifact.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="weights-1|weights-2"):
        artifacts.find(SPEC, tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"format": 1, "manifest": "x", "files": {}}'])
def test_a_damaged_seal_is_none(tmp_path: Path, read: list[str], text: str) -> None:
    artifact = publish(tmp_path)
    seal(artifact).write_text(text)
    read.clear()
    assert artifacts.find(SPEC, tmp_path)
    assert len(read) == 3


def test_the_seal_of_another_artifact_is_none(tmp_path: Path, read: list[str]) -> None:
    one, other = publish(tmp_path), Spec("volume", "model", {"n": 2})
    seal(publish(tmp_path, other)).write_bytes(seal(one).read_bytes())
    read.clear()
    assert artifacts.find(other, tmp_path)
    assert len(read) == 3


def test_files_that_changed_just_before_are_not_sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                       caplog: pytest.LogCaptureFixture) -> None:
    """A change within the resolution of the volume's times would leave them as they are."""
    artifact = publish(tmp_path)
    monkeypatch.setattr(seals, "RESOLUTION_NS", 3600 * 10**9)
    (artifact / "config.json").chmod(0o644)  # changes its time of change
    caplog.set_level(logging.INFO, "jobs")
    assert artifacts.find(SPEC, tmp_path)
    assert caplog.messages == [f"{SPEC}: verified (19.2 kB read), not sealed: its files changed just now"]
    assert not seal(artifact).exists()


def test_a_change_while_the_files_are_read_is_not_sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = publish(tmp_path)
    seal(artifact).unlink()
    time.sleep(0.03)
    real = artifacts.listing

    def listing(folder: Path, *arguments: Any) -> Any:
        found = real(folder, *arguments)
        overwrite(folder / "weights-1", 7, (folder / "weights-1").stat())
        return found

    monkeypatch.setattr(artifacts, "listing", listing)
    assert artifacts.find(SPEC, tmp_path)
    assert not seal(artifact).exists()
    monkeypatch.undo()
    with pytest.raises(UserError, match="weights-1 was changed"):
        artifacts.find(SPEC, tmp_path)


def test_publication_waits_until_the_files_can_be_sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stages that read a model mount its volume read-only: nobody else could seal it."""
    monkeypatch.setattr(seals, "RESOLUTION_NS", 300 * 10**6)
    started = time.monotonic()
    assert seal(publish(tmp_path)).exists()
    assert time.monotonic() - started > 0.2


def test_a_forged_seal_does_not_stand_in_for_a_signed_artifacts_bytes(tmp_path: Path) -> None:
    """Who may write to the volume can write a seal, too, but no signature."""
    spec, signer = Spec("fine-tuned-model", "adapter", {"r": 8}), build_signing.signer(build_signing.pair())
    artifact = publish(tmp_path, spec, signer=signer)
    (artifact / "weights-1").write_bytes(b"forged")
    state = seals.state_of(artifact, artifacts.files_of(artifact))
    seal(artifact).write_text(json.dumps(seals._content((artifact / "artifact.json").read_bytes(), state)))
    assert artifacts.find(spec, tmp_path), "without keys, a seal is believed as a manifest is"
    with pytest.raises(UserError, match="weights-1 was changed"):
        artifacts.find(spec, tmp_path, signer.keys)
    with pytest.raises(UserError, match="weights-1 was changed"):
        artifacts.wait([spec], tmp_path, 1, keys=signer.keys)


# --- by the volume's clock --------------------------------------------------------------------------------------------


class Clock:
    """The volume's time, and that by which it is waited: both go on only in a pause."""

    def __init__(self, volume: int, *, stands_still: bool = False) -> None:
        self.volume, self.stands_still = volume, stands_still
        self.elapsed = 7
        self.pauses: list[float] = []

    def now_ns(self, folder: Path) -> int:
        return self.volume

    def sleep(self, seconds: float) -> None:
        assert len(self.pauses) < 10, "it waits for ever"
        self.pauses.append(seconds)
        self.elapsed += round(seconds * 1e9)
        self.volume += 0 if self.stands_still else round(seconds * 1e9)


CHANGED = 10**18
HALF = 10**9  # half the resolution of times


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seals, "RESOLUTION_NS", 2 * HALF)


@pytest.mark.parametrize(("now", "stands_still", "pauses", "then"), [
    (CHANGED, False, [2], CHANGED + 2 * HALF), (CHANGED + HALF, False, [1], CHANGED + 2 * HALF),
    (CHANGED + 2 * HALF, False, [], CHANGED + 2 * HALF), (CHANGED + 9 * HALF, False, [], CHANGED + 9 * HALF),
    (CHANGED + 2 * HALF - 1, False, [1e-9], CHANGED + 2 * HALF), (CHANGED - HALF, False, [3], CHANGED + 2 * HALF),
    (1, True, [4], 1)])
def test_large_files_are_sealed_after_the_resolution_of_times_and_a_volumes_clock_is_waited_for_twice_as_long(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact: None, now: int, stands_still: bool,
        pauses: list[float], then: int) -> None:
    clock = Clock(now, stands_still=stands_still)
    monkeypatch.setattr(seals, "now_ns", clock.now_ns)
    monkeypatch.setattr(seals, "time", SimpleNamespace(monotonic_ns=lambda: clock.elapsed, sleep=clock.sleep))
    state = {"new": [1, 1, CHANGED, 1], "old": [1, 1, 3, 2]}
    assert seals.settle(tmp_path / "draft", state) == (state, then)
    assert clock.pauses == pytest.approx(pauses)


@pytest.mark.parametrize("folder", ["volume", "nothing"])
def test_a_draft_is_not_waited_for_where_it_cannot_be_sealed(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    """It is small, or nothing can be written beside it."""
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr(seals, "LARGE", 100 if folder == "volume" else 1)
    assert seals.settle(tmp_path / folder / "draft", {"a": [99, 1, time.time_ns(), 1]}) is None


@pytest.mark.parametrize(("began", "after", "why"), [
    (CHANGED + 2 * HALF, CHANGED, None), (CHANGED + 2 * HALF - 1, CHANGED, "not sealed: its files changed just now"),
    (CHANGED - HALF, CHANGED, "not sealed: its files changed just now"),
    (CHANGED + 9 * HALF, CHANGED + HALF, "not sealed: its files changed just now"),
    (None, CHANGED, "not sealed: the volume cannot be written here")])
def test_files_are_sealed_if_their_last_change_was_long_enough_before_their_verification(
        tmp_path: Path, exact: None, began: int | None, after: int, why: str | None) -> None:
    before, artifact = {"a": [1, 1, CHANGED, 1], "b": [1, 1, 3, 2]}, tmp_path / "artifact"
    state = {"a": [1, 1, after, 1], "b": [1, 1, 3, 2]}
    assert seals.Sealing(artifact, b"{}", before, began).end(state) == why
    assert seals.is_sealed(artifact, b"{}", state) is (why is None)
    assert not seals.is_sealed(artifact, b"{ }", state)
    assert not seals.is_sealed(artifact, b"{}", {"a": state["a"]})


def test_a_seal_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    assert seals.Sealing(tmp_path / "gone" / "artifact", b"{}", {}, CHANGED).end({}) == (
        "not sealed: No such file or directory")


def test_a_seal_that_is_there_stays_valid(tmp_path: Path) -> None:
    """In another form, every large artifact of every volume would be read again."""
    manifest = hashlib.sha256(b"{}").hexdigest()
    (tmp_path / ".verified-artifact").write_text(json.dumps(
        {"files": {"a": [5, 6, 7, 8]}, "manifest": manifest, "format": 1}))
    assert seals.is_sealed(tmp_path / "artifact", b"{}", {"a": [5, 6, 7, 8]})
    assert not seals.is_sealed(tmp_path / "artifact", b"{}", {"a": [5, 6, 7, 9]})


def test_a_seal_that_cannot_be_removed_is_no_error(tmp_path: Path) -> None:
    seal(tmp_path / "artifact").mkdir()
    assert seals.begin(tmp_path / "artifact", b"{}", {}).began_ns


def test_an_artifact_without_files_changed_long_ago() -> None:
    assert (seals.newest({}), seals.newest({"a": [1, 5, 3, 9], "b": [1, 1, 4, 1]})) == (0, 4)


def test_the_volumes_time_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    now = seals.now_ns(tmp_path)
    assert now and now >= (tmp_path / "file").stat().st_ctime_ns
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert seals.now_ns(tmp_path / "nothing") is None


@pytest.mark.parametrize(("sizes", "large"), [([], False), ([60, 39], False), ([60, 40], True), ([101], True)])
def test_an_artifact_is_large_by_all_its_files(monkeypatch: pytest.MonkeyPatch, sizes: list[int], large: bool) -> None:
    monkeypatch.setattr(seals, "LARGE", 100)
    assert seals.is_large({str(n): [size, 1, 1, 1] for n, size in enumerate(sizes)}) is large


@pytest.mark.parametrize(("kind", "error"), [("pipe", UserError), ("folder", UserError), ("link", OSError)])
def test_what_is_no_plain_file_is_refused_at_once(tmp_path: Path, kind: str, error: type[Exception]) -> None:
    """A pipe would be waited for, and a link could lead out of the volume."""
    file = tmp_path / "weights"
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        (tmp_path / "other").touch()
        file.symlink_to(tmp_path / "other")
    with pytest.raises(error, match="weights"):
        seals.state_of(tmp_path, [file])


# --- beside other things on the volume --------------------------------------------------------------------------------


def test_a_restored_backup_is_read_once_and_then_sealed(tmp_path: Path, read: list[str]) -> None:
    """tar sets the time of modification back, and brings an old seal along where it is not left out."""
    artifact = publish(tmp_path / "v")
    subprocess.run(["tar", "-cf", "backup.tar", "v"], cwd=tmp_path, check=True)
    shutil.rmtree(tmp_path / "v")
    subprocess.run(["tar", "-xf", "backup.tar"], cwd=tmp_path, check=True)
    assert seal(artifact).exists()
    time.sleep(0.03)
    read.clear()
    assert artifacts.find(SPEC, tmp_path / "v") and artifacts.find(SPEC, tmp_path / "v")
    assert len(read) == 3


def test_an_artifact_that_is_replaced_is_sealed_anew(tmp_path: Path, read: list[str]) -> None:
    publish(tmp_path)
    publish(tmp_path, replace=True)
    read.clear()
    assert artifacts.find(SPEC, tmp_path)
    assert read == []


def test_retention_removes_seals_with_their_artifacts_and_what_kills_left(tmp_path: Path) -> None:
    specs = [Spec("volume", "model", {"n": n}) for n in range(4)]
    for spec in specs:
        publish(tmp_path, spec)
        time.sleep(0.01)
    kind = tmp_path / "volume" / "model"
    for name in (".verified-0123456789abcdef", ".verified-time-00ff", f"..verified-{specs[3].digest}.00ff"):
        (kind / name).write_text("{}")
        os.utime(kind / name, (time.time() - 7200, time.time() - 7200))
    (kind / ".verified-time-fresh").write_text("0")
    retention.retain(kind, keep=2, protected=set())
    assert sorted(path.name for path in kind.glob(".*verified-*")) == sorted(
        [".verified-time-fresh", *(f".verified-{spec.digest}" for spec in specs[2:])])
    assert artifacts.find(specs[3], tmp_path)
