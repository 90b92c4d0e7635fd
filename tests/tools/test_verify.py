"""Promises of `python -m jobs verify`: every byte of every artifact, all damage in one run, seals as they should be."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from jobs.__main__ import main
from jobs.core import artifacts, files, seals
from jobs.core.artifacts import Spec
from jobs.core.errors import UserError
from jobs.tools import verify


@pytest.fixture
def volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three artifacts on two volumes, beside what else is on volumes."""
    monkeypatch.setattr(seals, "LARGE", 1)
    monkeypatch.setattr(seals, "RESOLUTION_NS", 20 * 10**6)
    for volume, kind, number in (("dataset", "dataset", 1), ("tuned", "adapter", 1), ("tuned", "adapter", 2)):
        publish(tmp_path, volume, kind, number)
    for name in ("tuned/checkpoints/0123456789abcdef", "tuned/tensorboard/name/0123456789abcdef",
                 "tuned/adapter/.draft-0123456789abcdef", "tuned/promoted", "tuned/lost+found"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path


def publish(volumes: Path, volume: str, kind: str, number: int) -> Path:
    def write(draft: Path) -> None:
        (draft / "weights").write_text(f"weights of {number}")

    return artifacts.publish(Spec(volume, kind, {"n": number}), volumes, write, keep=5).path


def folders(volumes: Path) -> list[Path]:
    return list(verify.find(volumes))


def seal(artifact: Path) -> Path:
    return artifact.with_name(f".verified-{artifact.name}")


def test_every_artifact_is_read_and_counted(volumes: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "jobs")
    assert main(["--volumes", str(volumes), "verify"]) == 0
    assert caplog.messages[-1] == "3 of 3 artifacts verified (36 bytes read), 0 damaged"
    assert sum("verified (12 bytes read)" in message for message in caplog.messages) == 3, "whatever their seals show"


def test_all_damage_is_named_in_one_run_and_loses_its_seal(volumes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset, one, other = folders(volumes)
    (one / "weights").write_text("weights of X")
    (other / "artifact.json").unlink()
    assert main(["--volumes", str(volumes), "verify"]) == 2
    error = capsys.readouterr().err.split("error: ")[-1]
    assert f"{one}: weights was changed" in error
    assert f"{other}: artifact.json is missing" in error
    assert str(dataset) not in error
    assert not seal(one).exists() and seal(dataset).exists()


def test_bytes_that_a_disk_lost_are_found_although_the_seal_is_valid(volumes: Path, monkeypatch: pytest.MonkeyPatch
                                                                     ) -> None:
    """Nothing that a file system knows of changes."""
    dataset, *_ = folders(volumes)
    monkeypatch.setattr(artifacts, "sha256_of",
                        lambda file: "0" * 64 if file == dataset / "weights" else files.sha256_of(file))
    assert artifacts.read(dataset, by="seal")
    with pytest.raises(UserError, match=f"{dataset}: weights was changed"):
        verify.run(volumes, [])
    with pytest.raises(UserError, match=f"{dataset}: weights was changed"):
        artifacts.read(dataset, by="seal")


def test_what_was_restored_is_sealed(volumes: Path) -> None:
    dataset, *_ = folders(volumes)
    shutil.copytree(dataset, volumes / "copy")
    shutil.rmtree(dataset)
    (volumes / "copy").rename(dataset)
    time.sleep(0.03)
    before = seal(dataset).read_text()
    verify.run(volumes, [])
    assert seal(dataset).read_text() != before


@pytest.mark.parametrize(("chosen", "count"), [
    (["adapter"], 2), (["dataset", "adapter"], 3), (["{kind}/{digest}"], 1), (["{path}"], 1)])
def test_a_part_can_be_chosen(volumes: Path, caplog: pytest.LogCaptureFixture, chosen: list[str], count: int) -> None:
    one = folders(volumes)[1]
    caplog.set_level(logging.INFO, "jobs")
    verify.run(volumes, [name.format(kind=one.parent.name, digest=one.name, path=one) for name in chosen])
    assert caplog.messages[-1].startswith(f"{count} of {count} artifacts verified")


def test_a_folder_without_volumes_is_an_error(tmp_path: Path) -> None:
    """A scheduled verification of the wrong folder must not succeed for ever."""
    (tmp_path / "file").write_text("")
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="holds no volumes"):
            verify.run(folder, [])


def test_what_is_not_there_is_an_error(volumes: Path) -> None:
    with pytest.raises(UserError, match="adaptor: no such artifact below .*KIND/DIGEST"):
        verify.run(volumes, ["adapter", "adaptor"])


def test_what_retention_removes_meanwhile_is_no_damage(volumes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def listing(folder: Path, *arguments: Any) -> list[dict[str, Any]]:
        if folder.parent.name == "adapter":
            shutil.rmtree(folder)
        return real(folder, *arguments)

    real = artifacts.listing
    monkeypatch.setattr(artifacts, "listing", listing)
    verify.run(volumes, [])
