"""Promises of retention: it makes room before it is needed, and never takes what is promoted, in use or evidence."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.core import artifacts, promotion, retention
from jobs.core.artifacts import Spec

DAY = 24 * 3600
VOLUME = "volume"


def specs(count: int, kind: str = "adapter") -> list[Spec]:
    return [Spec(VOLUME, kind, {"n": n}) for n in range(count)]


def publish(volumes: Path, spec: Spec, *, keep: int = 10, name: str = "", age: float = 0) -> None:
    def write(folder: Path) -> None:
        (folder / "weights").write_text("w")

    artifacts.publish(spec, volumes, write, keep=keep, adapter_name=name)
    if age:
        then = time.time() - age
        os.utime(spec.path(volumes) / "artifact.json", (then, then))


def there(volumes: Path, *wanted: Spec) -> list[bool]:
    return [artifacts.find(spec, volumes) is not None for spec in wanted]


def folder_of_age(folder: Path, age: float) -> Path:
    folder.mkdir(parents=True)
    (folder / "file").write_text("x")
    for path in (folder / "file", folder):
        os.utime(path, (time.time() - age, time.time() - age))
    return folder


def test_retention_keeps_the_newest_and_the_promoted(tmp_path: Path) -> None:
    five = specs(5)
    promotion.promote(tmp_path / VOLUME, "name", five[0].digest, "0" * 16)
    for age, spec in zip((50, 40, 30, 20), five, strict=False):
        publish(tmp_path, spec, age=age)
    publish(tmp_path, five[4], keep=2)
    assert there(tmp_path, *five) == [True, False, False, True, True]


def test_retention_keeps_what_was_made_from_the_promoted(tmp_path: Path) -> None:
    """Serving needs the merged model of a promoted adapter, which has a digest of its own."""
    promotion.promote(tmp_path / VOLUME, "name", "a" * 16, "e" * 16)
    three = [Spec(VOLUME, "merged-model", {}, {"adapter": letter * 16, "base_model": "0" * 16}) for letter in "abc"]
    for age, spec in zip((50, 40, 30), three, strict=True):
        publish(tmp_path, spec, age=age)
    assert retention.retain(tmp_path / VOLUME / "merged-model", keep=1, protected=set()) == [three[1].digest]
    assert there(tmp_path, *three) == [True, False, True]


def test_what_is_older_than_the_promoted_is_removed_all_the_same(tmp_path: Path) -> None:
    three = specs(3)
    for age, spec in zip((50, 40, 30), three, strict=True):
        publish(tmp_path, spec, age=age)
    promotion.promote(tmp_path / VOLUME, "name", three[1].digest, "0" * 16)
    assert retention.retain(tmp_path / VOLUME / "adapter", keep=1, protected=set()) == [three[0].digest]


@pytest.mark.parametrize("damaged", [0, 1])  # whichever is looked at first
def test_retention_does_not_remove_what_may_be_evidence(tmp_path: Path, damaged: int) -> None:
    two = specs(2)
    for spec in two:
        publish(tmp_path, spec)
    manifest = two[damaged].path(tmp_path) / "artifact.json"
    manifest.write_text("{")
    os.utime(manifest, (0, 0))
    folder = tmp_path / VOLUME / "adapter"
    assert retention.retain(folder, keep=1, protected=set()) == []
    assert retention.retain(folder, keep=0, protected=set()) == [two[1 - damaged].digest]
    assert manifest.is_file()


def test_readers_find_an_artifact_whole_or_not_at_all_while_it_is_removed(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, folder, unlink = specs(1)[0], tmp_path / VOLUME / "adapter", os.unlink
    publish(tmp_path, spec)
    folder_of_age(folder / f".draft-{spec.digest}", 0)  # an earlier attempt was killed while it removed it
    seen = []

    def read_meanwhile(*path: Any, **options: Any) -> None:
        unlink(*path, **options)
        seen.append(there(tmp_path, spec)[0])  # raises for an artifact in part

    monkeypatch.setattr(os, "unlink", read_meanwhile)
    assert retention.retain(folder, keep=0, protected=set()) == [spec.digest]
    assert seen == [True, False, False]
    assert [path.name for path in folder.iterdir() if path.is_dir()] == []


def test_an_artifact_that_was_used_again_counts_as_new(tmp_path: Path) -> None:
    """`git revert` and back: what git asked for last is not what retention removes next."""
    four = specs(4)
    for age, spec in zip((50, 40, 30), four, strict=False):
        publish(tmp_path, spec, age=age)
    artifacts.done(four[0], tmp_path)
    publish(tmp_path, four[3], keep=2)
    assert there(tmp_path, *four) == [True, False, False, True]


def test_each_adapter_has_its_own_number_of_artifacts(tmp_path: Path) -> None:
    """Two teams share a volume: a busy one does not push out what the other one trained."""
    busy, quiet = specs(5), [Spec(VOLUME, "adapter", {"other": n}) for n in range(2)]
    for age, spec in zip((90, 80), quiet, strict=True):
        publish(tmp_path, spec, name="quiet", age=age)
    for age, spec in zip((50, 40, 30, 20), busy, strict=False):
        publish(tmp_path, spec, name="busy", age=age)
    publish(tmp_path, busy[4], name="busy", keep=2)
    assert there(tmp_path, *quiet) == [True, True]
    assert there(tmp_path, *busy) == [False, False, False, True, True]


def test_the_adapters_name_is_in_the_manifest_and_not_in_the_digest(tmp_path: Path) -> None:
    spec = specs(1)[0]
    publish(tmp_path, spec, name="seville-hotels")
    manifest = json.loads((spec.path(tmp_path) / "artifact.json").read_text())
    assert manifest["about"] == {"adapter_name": "seville-hotels"}
    assert manifest["digest"] == Spec(VOLUME, "adapter", {"n": 0}).digest


def test_lowering_keep_frees_a_full_disk(tmp_path: Path) -> None:
    """As the message about a full disk advises: room is made before the writing that needs it."""
    five = specs(5)
    for age, spec in zip((50, 40, 30, 20), five, strict=False):
        publish(tmp_path, spec, age=age)

    def write(_: Path) -> None:
        if sum(there(tmp_path, *five)) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        artifacts.publish(five[4], tmp_path, write, keep=4)
    artifacts.publish(five[4], tmp_path, write, keep=2)
    assert there(tmp_path, *five) == [False, False, False, True, True]


@pytest.mark.parametrize("damage", [lambda file: file.write_text("{"), os.mkfifo])
@pytest.mark.timeout(20)
def test_a_damaged_promotion_stops_retention_and_no_publication(
        tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any) -> None:
    """What it protected is not known, so nothing is removed; what else is published on the volume is not hindered."""
    three = specs(3)
    for age, spec in zip((50, 40), three, strict=False):
        publish(tmp_path, spec, age=age)
    (tmp_path / VOLUME / "promoted").mkdir()
    damage(tmp_path / VOLUME / "promoted" / "name")
    caplog.set_level(logging.WARNING, "jobs")
    publish(tmp_path, three[2], keep=1)
    assert there(tmp_path, *three) == [True, True, True]
    assert caplog.messages[0].startswith(
        f"retention: removes no artifact from {tmp_path / VOLUME / 'adapter'}, because the promotions cannot be read: "
        f"{tmp_path / VOLUME / 'promoted' / 'name'}: ")


def test_an_artifact_whose_lock_another_process_holds_is_not_removed(tmp_path: Path) -> None:
    two = specs(2)
    for age, spec in zip((50, 40), two, strict=True):
        publish(tmp_path, spec, age=age)
    with artifacts.lock(two[0], tmp_path, 1):
        assert retention.retain(tmp_path / VOLUME / "adapter", keep=1, protected=set()) == []
    assert retention.retain(tmp_path / VOLUME / "adapter", keep=1, protected=set()) == [two[0].digest]


@pytest.mark.parametrize("happens", [artifacts.done, lambda spec, volumes: shutil.rmtree(spec.path(volumes))])
def test_an_artifact_that_is_used_or_removed_meanwhile_is_not_removed(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, happens: Callable[[Spec, Path], object]) -> None:
    two = specs(2)
    for age, spec in zip((50, 40), two, strict=True):
        publish(tmp_path, spec, age=age)
    by_adapter = retention._by_adapter
    monkeypatch.setattr(retention, "_by_adapter", lambda folder: (by_adapter(folder), happens(two[0], tmp_path))[0])
    assert retention.retain(tmp_path / VOLUME / "adapter", keep=1, protected=set()) == []


def test_what_cannot_be_removed_is_reported_and_the_publication_stands(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def forbidden(path: Path, **_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    two = specs(2)
    publish(tmp_path, two[0], age=50)
    monkeypatch.setattr(shutil, "rmtree", forbidden)
    publish(tmp_path, two[1], keep=1)
    assert there(tmp_path, two[1]) == [True]
    assert retention.retain(tmp_path / VOLUME / "adapter", keep=0, protected=set()) == []
    assert any(message.startswith("retention: ") and f"{two[0].digest} cannot be removed: " in message
               and "Permission denied" in message for message in caplog.messages)


def test_what_is_removed_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "jobs")
    two, folder = specs(2), tmp_path / VOLUME / "adapter"
    for age, spec in zip((50, 40), two, strict=True):
        publish(tmp_path, spec, age=age)
    left = folder_of_age(tmp_path / VOLUME / "checkpoints" / ("a" * 16), 90 * DAY)
    caplog.clear()
    retention.retain(folder, keep=1, protected=set())
    assert caplog.messages == [f"retention: removed {left}, which did not change for 7 days",
                               f"retention: removed adapter/{two[0].digest} (1 newer ones are kept)"]


def test_a_draft_that_is_about_to_be_published_is_no_artifact(tmp_path: Path) -> None:
    spec, kept = specs(2)
    publish(tmp_path, spec)
    spec.path(tmp_path).rename(tmp_path / VOLUME / "adapter" / f".draft-{spec.digest}")
    publish(tmp_path, kept, keep=1)
    assert (tmp_path / VOLUME / "adapter" / f".draft-{spec.digest}").is_dir()


def test_an_abandoned_draft_is_removed_and_one_that_is_fresh_or_locked_is_not(tmp_path: Path) -> None:
    folder = tmp_path / VOLUME / "adapter"
    old, fresh, running, wanted = specs(4)
    for spec, age in ((old, DAY + 60), (fresh, 0), (running, 90 * DAY), (wanted, 90 * DAY)):
        folder_of_age(folder / f".draft-{spec.digest}", age)
    with artifacts.lock(running, tmp_path, 1):
        retention.retain(folder, keep=1, protected={wanted.digest})
    assert sorted(p.name for p in folder.glob(".draft-*")) == sorted(
        f".draft-{spec.digest}" for spec in (fresh, running, wanted))


def test_a_link_or_a_file_among_the_folders_is_left_alone(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It may lead to what others own; and each publication would warn that it cannot be removed."""
    publish(tmp_path, specs(1)[0])
    checkpoints = tmp_path / VOLUME / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / ("a" * 16)).symlink_to(folder_of_age(tmp_path / "others", 90 * DAY))
    (checkpoints / ("b" * 16)).touch()
    os.utime(checkpoints / ("a" * 16), (0, 0), follow_symlinks=False)
    os.utime(checkpoints / ("b" * 16), (0, 0))
    retention.retain(tmp_path / VOLUME / "adapter", keep=1, protected=set())
    assert [path.name for path in sorted(checkpoints.iterdir())] == ["a" * 16, "b" * 16]
    assert (tmp_path / "others" / "file").exists()
    assert caplog.messages == []


def test_a_draft_in_which_something_is_still_written_is_not_abandoned(tmp_path: Path) -> None:
    """A download writes files deep inside, and the folder above keeps its age."""
    draft = folder_of_age(tmp_path / VOLUME / "base-model" / f".draft-{'a' * 16}", 90 * DAY)
    inside = folder_of_age(draft / "sub", 0)
    for path in (inside, draft):
        os.utime(path, (0, 0))
    retention.retain(draft.parent, keep=1, protected=set())
    assert (inside / "file").exists()


@pytest.mark.parametrize("kind", ["adapter", "scores"])
def test_checkpoints_and_tensorboard_runs_of_superseded_trainings_are_removed_by_age(tmp_path: Path, kind: str) -> None:
    """Whatever is published on the volume: a training may be superseded for good."""
    volume = tmp_path / VOLUME
    superseded, recent, running, kept, wanted = specs(5)
    publish(tmp_path, kept)
    (volume / kind).mkdir(exist_ok=True)
    left = {}
    for spec, age in ((superseded, 8 * DAY), (recent, 6 * DAY), (running, 90 * DAY), (kept, 90 * DAY),
                      (wanted, 90 * DAY)):
        left[spec.digest] = [folder_of_age(volume / "checkpoints" / spec.digest, age),
                             folder_of_age(volume / "tensorboard" / "name" / spec.digest, age)]
    folder_of_age(volume / "tensorboard" / "name" / "by-hand", 90 * DAY)
    with artifacts.lock(running, tmp_path, 1):
        retention.retain(volume / kind, keep=5, protected={wanted.digest})
    assert {digest: [path.exists() for path in paths] for digest, paths in left.items()} == {
        superseded.digest: [False, False], recent.digest: [True, True], running.digest: [True, True],
        kept.digest: [False, True], wanted.digest: [True, True]}
    assert (volume / "tensorboard" / "name" / "by-hand").exists()
