"""Promises of artifacts: whole or absent, verified on every read, made once, never lost while they are promoted."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import multiprocessing
import os
import platform
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from jobs.core import artifacts, signatures
from jobs.core.artifacts import NotSigned, Spec
from jobs.core.errors import RetryableError, UserError
from tests import build_signing
from tests.build_signing import Pair, pair

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


def test_a_manifest_can_be_read_by_people_and_says_when_and_with_what_it_was_made(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "VERSIONED", ("not-installed", "pytest"))
    artifact = artifacts.publish(SPEC, tmp_path, lambda _: {"city": "Málaga"}, keep=3, adapter_name="hotels")
    text = (artifact.path / "artifact.json").read_text()
    assert text.startswith('{\n  "kind": "thing",\n')
    assert '"city": "Málaga"' in text
    assert text.endswith("}\n")
    manifest = json.loads(text)
    assert manifest["about"] == {"adapter_name": "hotels", "city": "Málaga"}
    assert manifest["versions"] == {"python": platform.python_version(), "pytest": pytest.__version__}
    started, finished = (datetime.fromisoformat(manifest[key]) for key in ("started", "finished"))
    assert timedelta() <= finished - started < timedelta(minutes=1)
    assert (started.utcoffset(), started.microsecond, finished.utcoffset(), finished.microsecond) == (
        timedelta(), 0, timedelta(), 0)


def test_what_is_published_and_what_is_already_there_is_logged(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "jobs")
    publish(tmp_path)
    publish(tmp_path)
    assert caplog.messages == [f"published {SPEC}: 2 files, 261 bytes",
                               f"{SPEC} is already there and verified: nothing to do"]


def test_an_artifact_survives_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file and every folder is on the disk before the artifact has its name; then the name is."""
    synced, fsync = [], os.fsync

    def record(handle: int) -> None:
        fsync(handle)
        synced.append(Path(f"/proc/self/fd/{handle}").readlink())

    monkeypatch.setattr(os, "fsync", record)
    target = publish(tmp_path).path
    draft = target.with_name(f".draft-{target.name}")
    assert {draft, draft / "a.txt", draft / "sub", draft / "sub" / "b.bin"} <= set(synced)
    assert synced[-1] == target.parent


def test_whoever_mounts_the_volume_can_read_an_artifact(tmp_path: Path) -> None:
    def private(folder: Path) -> None:
        (folder / "sub").mkdir(mode=0o700)
        (folder / "sub" / "weights").write_text("w")
        (folder / "sub" / "weights").chmod(0o600)

    folder = artifacts.publish(SPEC, tmp_path, private, keep=3).path / "sub"
    assert [path.stat().st_mode & 0o777 for path in (folder, folder / "weights")] == [0o755, 0o644]


def test_a_link_in_a_draft_is_refused_and_what_it_points_to_is_left_alone(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("x")
    outside.chmod(0o600)
    with pytest.raises(UserError, match="link: is not a plain file"):
        artifacts.publish(SPEC, tmp_path, lambda folder: (folder / "link").symlink_to(outside), keep=3)
    assert outside.stat().st_mode & 0o777 == 0o600


def test_the_digest_is_the_sha256_of_canonical_json() -> None:
    """Anyone can compute it: this value came from `printf … | sha256sum`."""
    assert Spec("v", "k", {"b": 1, "a": 2}).digest == "8e8e6ff105c1d12b"
    utf8 = '{"inputs":{},"kind":"k","spec":{"city":"Málaga"}}'.encode()
    assert Spec("v", "k", {"city": "Málaga"}).digest == hashlib.sha256(utf8).hexdigest()[:16]
    with pytest.raises(ValueError, match="not JSON compliant"):
        artifacts.canonical(math.nan)


def test_an_artifact_is_replaced_only_when_the_new_one_is_complete(tmp_path: Path) -> None:
    """For a verdict that depends on what is promoted, which no digest knows."""
    def again(folder: Path) -> None:
        assert artifacts.find(SPEC, tmp_path), "readers still find the one before"
        (folder / "a.txt").write_text("again")

    before = publish(tmp_path).path
    with pytest.raises(ZeroDivisionError):
        artifacts.publish(SPEC, tmp_path, lambda folder: {"x": 1 / 0}, keep=3, replace=True)
    assert artifacts.read(before)
    replaced = artifacts.publish(SPEC, tmp_path, again, keep=3, replace=True)
    assert artifacts.read(before) == replaced and (replaced.path / "a.txt").read_text() == "again"
    assert [path.name for path in before.parent.iterdir() if path.is_dir()] == [before.name]


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
        assert damage is link or str(raised.value).endswith(f". Move {folder} away to have it made again")
    assert folder.is_dir()


def test_of_a_changed_file_the_message_has_both_sizes_and_digests(tmp_path: Path) -> None:
    folder = publish(tmp_path).path
    (folder / "a.txt").write_text("fir")
    was, is_ = (hashlib.sha256(content).hexdigest() for content in (b"first", b"fir"))
    with pytest.raises(UserError, match=f"a.txt was changed: artifact.json says 5 bytes, sha256 {was}; "
                                        f"the file has 3 bytes, sha256 {is_}. "):
        artifacts.find(SPEC, tmp_path)


def test_an_artifact_under_the_name_of_another_is_refused(tmp_path: Path) -> None:
    other = Spec("volume", "thing", {"size": 2}, {"input": "abc"})
    publish(tmp_path).path.rename(other.path(tmp_path))
    with pytest.raises(UserError, match=rf"describes {SPEC.digest} \(computed: {SPEC.digest}\), not {other.digest}. "):
        artifacts.find(other, tmp_path)


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


def test_a_long_wait_is_logged_each_minute_and_ends_when_all_are_there(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "jobs")
    there, late, later = (Spec("volume", "thing", {"size": size}) for size in (1, 2, 3))
    publish(tmp_path, there)
    clock = [5000.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds
        for moment, spec in ((100, late), (150, later)):
            if clock[0] == 5000 + moment:
                publish(tmp_path, spec)

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", sleep)
    caplog.clear()
    found = artifacts.wait([there, late, later], tmp_path, 1000, poll_s=1)
    assert [artifact.digest for artifact in found] == [there.digest, late.digest, later.digest]
    assert [message for message in caplog.messages if "waiting" in message] == [
        f"waiting for {late}, {later}", f"still waiting for {late}, {later} (61 s)",
        f"still waiting for {later} (122 s)"]
    with pytest.raises(RetryableError, match="waited 100 s for thing/"):
        artifacts.wait([SPEC], tmp_path, 100, poll_s=1)


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


# --- the signature ----------------------------------------------------------------------------------------------------


def test_a_signature_beside_the_manifest_is_no_file_of_the_artifact(tmp_path: Path) -> None:
    """The manifest cannot list it: it is made over the manifest."""
    artifact = publish(tmp_path)
    (artifact.path / "artifact.json.sig").write_text("{}")
    assert artifacts.read(artifact.path).manifest == artifact.manifest
    assert "artifact.json.sig" not in {file["path"] for file in artifacts.listing(artifact.path)}


@pytest.mark.parametrize("name", ["artifact.json.sig.old", "sub/artifact.json.sig", "artifact.sig"])
def test_only_the_signature_in_its_place_is_left_out(tmp_path: Path, name: str) -> None:
    artifact = publish(tmp_path)
    (artifact.path / name).write_text("{}")
    with pytest.raises(UserError, match=f"{name} is not listed in artifact.json"):
        artifacts.read(artifact.path)


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_signature_that_is_no_plain_file_damages_the_artifact(tmp_path: Path, kind: str) -> None:
    artifact = publish(tmp_path)
    signature = artifact.path / "artifact.json.sig"
    if kind == "link":
        signature.symlink_to(artifact.path / "a.txt")
    elif kind == "pipe":
        os.mkfifo(signature)
    else:
        signature.mkdir()
    with pytest.raises(UserError, match="artifact.json.sig"):
        artifacts.read(artifact.path)


ADAPTER = Spec("volume", "adapter", {"size": 2}, {"input": "abc"})
ONE, TWO = pair("one"), pair("two")


def signed(volumes: Path, keys: Pair = ONE, spec: Spec = ADAPTER) -> Path:
    return artifacts.publish(spec, volumes, write, keep=3, signer=build_signing.signer(keys)).path


def test_a_signed_artifact_is_accepted_by_its_key(tmp_path: Path) -> None:
    path = signed(tmp_path)
    assert artifacts.read(path, [TWO.public, ONE.public]).manifest == artifacts.read(path).manifest
    assert artifacts.find(ADAPTER, tmp_path, [ONE.public]) is not None
    with pytest.raises(NotSigned, match="none of signing.public_keys"):
        artifacts.read(path, [TWO.public])


def test_without_a_signer_nothing_is_signed(tmp_path: Path) -> None:
    assert not (publish(tmp_path).path / "artifact.json.sig").exists()


@pytest.mark.parametrize("name", ["a.txt", "sub/b.bin"])
def test_a_changed_file_is_found_although_the_manifest_was_changed_with_it(tmp_path: Path, name: str) -> None:
    path = signed(tmp_path)
    build_signing.tamper(path, name)
    assert artifacts.read(path), "as whole as it looks"
    with pytest.raises(NotSigned, match="the file was changed, or the signature belongs to another one"):
        artifacts.read(path, [ONE.public])


def test_the_manifest_that_was_read_is_the_one_that_is_signed(tmp_path: Path) -> None:
    """Someone who writes to the volume may put the signed one in its place between the two."""
    path = signed(tmp_path)
    with pytest.raises(NotSigned, match="was replaced while it was read"):
        signatures.check(path, {**artifacts.read(path).manifest, "about": {"forged": True}}, [ONE.public])


def with_signature(write_it: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "artifact.json.sig").unlink()
        write_it(folder / "artifact.json.sig")
    return change


OTHERS = {"missing": lambda _: None, "empty": lambda f: f.touch(), "no JSON": lambda f: f.write_text("{"),
          "huge": lambda f: os.truncate(os.open(f, os.O_CREAT | os.O_WRONLY), 2**40),
          "many brackets": lambda f: f.write_text("[" * 60_000)}


@pytest.mark.parametrize("name", list(OTHERS))
def test_an_artifact_without_a_whole_signature_is_not_accepted(tmp_path: Path, name: str) -> None:
    path = signed(tmp_path)
    with_signature(OTHERS[name])(path)
    with pytest.raises(NotSigned) as raised:
        artifacts.read(path, [ONE.public])
    assert str(raised.value).startswith(f"{path}: ")
    assert artifacts.find(ADAPTER, tmp_path, [ONE.public]) is None
    assert artifacts.find(ADAPTER, tmp_path) is not None


def test_the_signature_of_another_artifact_is_not_accepted(tmp_path: Path) -> None:
    path, other = signed(tmp_path), signed(tmp_path, spec=Spec("volume", "adapter", {"size": 3}))
    shutil.copyfile(other / "artifact.json.sig", path / "artifact.json.sig")
    with pytest.raises(NotSigned, match="belongs to another one"):
        artifacts.read(path, [ONE.public])


def test_another_signed_artifact_in_its_place_is_not_accepted(tmp_path: Path) -> None:
    path, other = signed(tmp_path), signed(tmp_path, spec=Spec("volume", "adapter", {"size": 3}))
    shutil.rmtree(path)
    shutil.copytree(other, path)
    with pytest.raises(UserError, match=f"describes {other.name}"):
        artifacts.read(path, [ONE.public])


@pytest.mark.parametrize("before", ["not signed", "by another key", "tampered with"])
def test_what_is_found_without_a_trusted_signature_is_made_again_and_never_signed(
        tmp_path: Path, before: str, caplog: pytest.LogCaptureFixture) -> None:
    """It may be a forgery: to sign it would make it a proven one."""
    path = publish(tmp_path, ADAPTER).path if before == "not signed" else signed(tmp_path, TWO)
    if before == "tampered with":
        signed(tmp_path)
        build_signing.tamper(path, "a.txt")
    (path / "a.txt").touch()
    made = []

    def again(folder: Path) -> dict[str, Any]:
        made.append(folder)
        return write(folder)

    assert artifacts.done(ADAPTER, tmp_path, build_signing.signer(ONE)) is None
    found = artifacts.publish(ADAPTER, tmp_path, again, keep=3, signer=build_signing.signer(ONE))
    assert made
    assert "It is not used" in caplog.text
    assert artifacts.read(found.path, [ONE.public]).manifest == found.manifest
    assert [p.name for p in path.parent.iterdir() if not p.name.startswith(".lock")] == [path.name]


def test_what_another_trusted_key_signed_is_signed_again_and_not_made_again(tmp_path: Path) -> None:
    """So that the other key can be taken out of the list."""
    path = signed(tmp_path, ONE)
    before = (path / "artifact.json").read_bytes()
    assert artifacts.done(ADAPTER, tmp_path, build_signing.signer(TWO, ONE.public)) is not None
    assert (path / "artifact.json").read_bytes() == before
    assert artifacts.find(ADAPTER, tmp_path, [TWO.public]) is not None
    signature = (path / "artifact.json.sig").stat().st_mtime_ns
    assert artifacts.done(ADAPTER, tmp_path, build_signing.signer(TWO, ONE.public)) is not None
    assert (path / "artifact.json.sig").stat().st_mtime_ns == signature


def test_only_what_the_stages_with_a_key_make_must_be_signed(tmp_path: Path) -> None:
    """Of what is relocated, git has the pins, and relocation has no key."""
    publish(tmp_path)
    signed(tmp_path)
    found = artifacts.wait([SPEC, ADAPTER], tmp_path, 0, keys=[ONE.public])
    assert [each.digest for each in found] == [SPEC.digest, ADAPTER.digest]


def test_a_reader_waits_until_the_stage_has_made_it_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Both Jobs start together when `signing` is added."""
    publish(tmp_path, ADAPTER)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(artifacts.wait, [ADAPTER], tmp_path, 30, 0.01, [ONE.public])
        while "Waiting until the stage that makes it" not in caplog.text:
            time.sleep(0.01)
        time.sleep(0.1)
        assert caplog.text.count("Waiting until the stage that makes it") == 1, "once, and not at every look"
        path = signed(tmp_path)
        assert waiting.result()[0].path == path


def test_a_reader_that_waits_is_not_disturbed_by_the_replacement(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a moment nothing is there, and what was read before is not what is there afterwards."""
    publish(tmp_path, ADAPTER)
    path, moments = ADAPTER.path(tmp_path), [UserError("damaged"), FileNotFoundError(2, "gone")]
    read, looks = artifacts.read, []

    def at_a_bad_moment(*arguments: Any, **options: Any) -> Any:
        looks.append(1)
        if len(looks) > 1 and moments:
            raise moments.pop()
        if not moments:
            build_signing.sign(path, ONE)
        return read(*arguments, **options)

    monkeypatch.setattr(artifacts, "read", at_a_bad_moment)
    assert artifacts.wait([ADAPTER], tmp_path, 30, 0.01, [ONE.public])[0].path == path
    assert len(looks) == 4


def test_a_reader_does_not_wait_for_ever(tmp_path: Path) -> None:
    publish(tmp_path, ADAPTER)
    with pytest.raises(NotSigned, match="is not signed"):
        artifacts.wait([ADAPTER], tmp_path, 0.05, 0.01, [ONE.public])


def test_a_signature_that_a_killed_attempt_left_is_not_published(tmp_path: Path) -> None:
    def interrupted(folder: Path) -> dict[str, Any]:
        (folder / "artifact.json.sig").write_text("left")
        (folder / ".artifact.json.sig.0123").write_text("left")
        return write(folder)

    path = artifacts.publish(ADAPTER, tmp_path, interrupted, keep=3).path
    assert sorted(p.name for p in path.iterdir()) == ["a.txt", "artifact.json", "sub"]
