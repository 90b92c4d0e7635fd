"""Promises of artifacts: whole or absent, verified on every read, made once, never lost while they are promoted."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from jobs.core import artifacts
from jobs.core.artifacts import Spec
from jobs.core.errors import RetryableError, UserError

SPEC = Spec("volume", "thing", {"size": 1}, {"input": "abc"})


def write(folder: Path) -> dict[str, Any]:
    (folder / "sub").mkdir(exist_ok=True)
    (folder / "a.txt").write_text("first")
    (folder / "sub" / "b.bin").write_bytes(bytes(range(256)))
    return {"note": "made for a test"}


def publish(volumes: Path, spec: Spec = SPEC, keep: int = 3) -> artifacts.Artifact:
    return artifacts.publish(spec, volumes, write, keep=keep)


def test_a_published_artifact_says_what_it_is(tmp_path: Path) -> None:
    artifact = publish(tmp_path)
    assert artifact.path == tmp_path / "volume" / "thing" / SPEC.digest
    manifest = json.loads((artifact.path / "artifact.json").read_text())
    assert manifest["spec"] == {"size": 1}
    assert manifest["inputs"] == {"input": "abc"}
    assert [(f["path"], f["size"]) for f in manifest["files"]] == [("a.txt", 5), ("sub/b.bin", 256)]
    assert manifest["about"] == {"note": "made for a test"}
    assert artifacts.find(SPEC, tmp_path) is not None


def test_whoever_mounts_the_volume_can_read_an_artifact(tmp_path: Path) -> None:
    def private(folder: Path) -> None:
        (folder / "weights").write_text("w")
        (folder / "weights").chmod(0o600)

    assert (artifacts.publish(SPEC, tmp_path, private, keep=3).path / "weights").stat().st_mode & 0o777 == 0o644


def test_the_digest_is_the_sha256_of_canonical_json() -> None:
    """Anyone can compute it: this value came from `printf … | sha256sum`."""
    assert Spec("v", "k", {"b": 1, "a": 2}).digest == "8e8e6ff105c1d12b"


def test_it_is_made_once(tmp_path: Path) -> None:
    publish(tmp_path)

    def again(_: Path) -> None:
        raise AssertionError("made twice")

    artifacts.publish(SPEC, tmp_path, again, keep=3)


def flip(folder: Path) -> None:
    raw = bytearray((folder / "sub" / "b.bin").read_bytes())
    raw[100] ^= 1
    (folder / "sub" / "b.bin").write_bytes(raw)


def link(folder: Path) -> None:
    (folder / "a.txt").unlink()
    (folder / "a.txt").symlink_to("/etc/hostname")


def pipe(folder: Path) -> None:
    (folder / "artifact.json").unlink()
    os.mkfifo(folder / "artifact.json")


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("damage", "message"), [
    (flip, "sub/b.bin was changed"),
    (lambda folder: (folder / "a.txt").unlink(), "a.txt is missing"),
    (lambda folder: (folder / "a.txt").write_text("fir"), "a.txt was changed"),
    (lambda folder: (folder / "extra.pkl").write_text("x"), "extra.pkl is not listed"),
    (link, "is not a plain file"),
    (lambda folder: (folder / "artifact.json").unlink(), "artifact.json is missing or damaged"),
    (lambda folder: (folder / "artifact.json").write_text("{"), "artifact.json is missing or damaged"),
    (lambda folder: (folder / "artifact.json").write_text("[" * 100_000), "artifact.json is missing or damaged"),
    (pipe, "artifact.json is missing or damaged"),
    (lambda folder: (folder / "artifact.json").write_text((folder / "artifact.json").read_text().replace(
        '"size": 1', '"size": 2', 1)), "(computed: "),
])
def test_a_damaged_artifact_is_refused_and_left_in_place(tmp_path: Path, damage: Any, message: str) -> None:
    folder = publish(tmp_path).path
    damage(folder)
    for attempt in (lambda: artifacts.find(SPEC, tmp_path), lambda: publish(tmp_path),
                    lambda: artifacts.wait([SPEC], tmp_path, 1)):
        with pytest.raises(UserError) as raised:
            attempt()
        assert message in str(raised.value)
        assert str(folder) in str(raised.value)
    assert folder.is_dir()


def test_a_failed_write_publishes_nothing_and_the_next_attempt_starts_clean(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half.txt").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device", "half.txt")

    with pytest.raises(OSError, match="No space left"):
        artifacts.publish(SPEC, tmp_path, fail, keep=3)
    assert artifacts.find(SPEC, tmp_path) is None
    assert [f["path"] for f in publish(tmp_path).manifest["files"]] == ["a.txt", "sub/b.bin"]


def test_a_resuming_write_gets_what_the_interrupted_one_left(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half.txt").write_text("half")
        raise OSError("cut off")

    with pytest.raises(OSError, match="cut off"):
        artifacts.publish(SPEC, tmp_path, fail, keep=3, resume=True)
    seen = []
    artifacts.publish(SPEC, tmp_path, lambda folder: seen.append((folder / "half.txt").read_text()), keep=3,
                      resume=True)
    assert seen == ["half"]


def _slow_publish(volumes: Path, log: Path, pause: float) -> None:
    def slow(folder: Path) -> None:
        write(folder)
        with log.open("a") as stream:
            stream.write("made\n")
        time.sleep(pause)

    artifacts.publish(SPEC, volumes, slow, keep=3)


def _wait_for(file: Path) -> None:
    deadline = time.monotonic() + 30
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_of_two_processes_one_works_and_the_other_finds_it_done(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_slow_publish, args=(tmp_path, tmp_path / "log", 0.5)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert (tmp_path / "log").read_text() == "made\n"


def test_a_kill_while_writing_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_slow_publish, args=(tmp_path, tmp_path / "log", 60))
    process.start()
    _wait_for(tmp_path / "log")
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert artifacts.find(SPEC, tmp_path) is None
    publish(tmp_path)  # the kernel freed the lock
    assert artifacts.find(SPEC, tmp_path) is not None


def test_waiting_ends_with_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(RetryableError, match=f"waited 0 s for thing/{SPEC.digest}"):
        artifacts.wait([SPEC], tmp_path, 0.05, poll_s=0.01)


@pytest.mark.timeout(30)
def test_waiting_for_another_process_that_makes_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over NFSv3 the lock of a node that died can stay: a training would hold its GPU for ever."""
    with artifacts.lock(SPEC, tmp_path, 1):
        with pytest.raises(RetryableError, match=rf"{tmp_path}/volume/thing/\.lock-{SPEC.digest} is locked"):
            artifacts.publish(SPEC, tmp_path, write, keep=3, wait_seconds=0.1)
        monkeypatch.setenv("WAIT_SECONDS", "0.2")
        with pytest.raises(RetryableError, match="waited 0 s because another process makes thing/"):
            publish(tmp_path)


def test_an_attempt_that_was_killed_while_it_wrote_the_manifest_leaves_nothing_in_the_artifact(tmp_path: Path) -> None:
    draft = tmp_path / "volume" / "thing" / f".draft-{SPEC.digest}"
    draft.mkdir(parents=True)
    (draft / ".artifact.json.0123456789abcdef").write_text("{")
    artifact = artifacts.publish(SPEC, tmp_path, write, keep=3, resume=True)
    assert [f["path"] for f in artifact.manifest["files"]] == ["a.txt", "sub/b.bin"]


def test_a_link_or_a_file_in_the_place_of_a_draft_is_replaced(tmp_path: Path) -> None:
    """A link may lead to a folder of others, which a resumed stage would clear and fill."""
    kind, others = tmp_path / "volume" / "thing", tmp_path / "others"
    kind.mkdir(parents=True)
    others.mkdir()
    (others / "kept").touch()
    for number, make in enumerate((lambda place: place.symlink_to(others), Path.touch)):
        spec = Spec("volume", "thing", {"size": number})
        make(kind / f".draft-{spec.digest}")
        artifact = artifacts.publish(spec, tmp_path, write, keep=3, resume=True)
        assert artifact.path.is_dir() and not artifact.path.is_symlink()
    assert [path.name for path in others.iterdir()] == ["kept"]
