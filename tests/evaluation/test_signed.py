"""Where the environment asks for signatures, an evaluation reads only what is signed, and signs what it publishes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from jobs.__main__ import main
from jobs.core import artifacts, promotion, signing
from jobs.core.pipeline import LoadedPipeline
from jobs.core.plan import FINE_TUNED_VOLUME, plan
from jobs.evaluation import evaluate, scoring
from tests import build_signing
from tests.build_models import published_pipeline
from tests.build_signing import pair

SIGNING = {"public_keys": [pair().public]}


def pipeline(folder: Path, monkeypatch: pytest.MonkeyPatch | None = None) -> tuple[LoadedPipeline, Path]:
    """A pipeline that asks for signatures, in a process that has the key; its adapter is not signed yet."""
    (folder / "key").write_text(pair().private)
    if monkeypatch:
        monkeypatch.setenv(signing.VARIABLE, str(folder / "key"))
    return published_pipeline(folder, signing=SIGNING)


def run(loaded: LoadedPipeline, volumes: Path, stage: str = "evaluate") -> int:
    return main(["--pipeline", str(loaded.path), "--volumes", str(volumes), "--wait-seconds", "0", stage])


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: Any) -> Path:
    """A signed adapter that was evaluated; tests copy it."""
    folder: Path = tmp_path_factory.mktemp("pipeline")
    with pytest.MonkeyPatch.context() as patch:
        loaded, volumes = pipeline(folder, patch)
        build_signing.sign(plan(loaded.pipeline).adapter.path(volumes), pair())
        evaluate.run(loaded, volumes, 0)
    return folder


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the models that get measured from here on."""
    names: list[str] = []
    measure = scoring.measure

    def watch(model: Any, tokenizer: Any, material: Any, name: str) -> Any:
        names.append(name)
        return measure(model, tokenizer, material, name)

    monkeypatch.setattr(scoring, "measure", watch)
    return names


@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_without_the_key_a_stage_fails_before_it_waits_or_works(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stage: str) -> None:
    monkeypatch.delenv(signing.VARIABLE, raising=False)
    loaded, volumes = published_pipeline(tmp_path, signing=SIGNING, without=["adapter"])
    assert run(loaded, volumes, stage) == 2
    assert "SIGNING_KEY is not set. Add the component base/signing" in capsys.readouterr().err
    assert not list((volumes / FINE_TUNED_VOLUME).glob("*/*"))


def test_an_adapter_that_is_not_signed_is_not_evaluated(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    loaded, volumes = pipeline(tmp_path, monkeypatch)
    adapter = plan(loaded.pipeline).adapter.path(volumes)
    assert run(loaded, volumes) == 2
    assert f"{adapter}: is not signed" in capsys.readouterr().err
    build_signing.sign(adapter, pair("a forger's"))
    assert run(loaded, volumes) == 2
    assert "none of signing.public_keys" in capsys.readouterr().err
    assert not list((volumes / FINE_TUNED_VOLUME).glob("evaluation/*"))
    assert not (volumes / FINE_TUNED_VOLUME / promotion.FOLDER / "hotels").exists()


def test_what_an_evaluation_publishes_is_signed_and_a_second_run_repeats_nothing(
        folder: Path, monkeypatch: pytest.MonkeyPatch, measured: list[str]) -> None:
    loaded, volumes = pipeline(folder, monkeypatch)
    found = [each for kind in ("adapter", "scores", "evaluation")
             for each in (volumes / FINE_TUNED_VOLUME / kind).iterdir() if each.name[0] != "."]
    assert len(found) == 5, "the adapter, three scores and the evaluation"
    for each in found:
        assert artifacts.read(each, [pair().public])
    assert run(loaded, volumes) == 0
    assert measured == []


@pytest.mark.parametrize("name", ["evaluation.json", "proof.json", "report.md"])
def test_a_forged_evaluation_is_made_again_and_not_signed(
        folder: Path, monkeypatch: pytest.MonkeyPatch, measured: list[str], name: str) -> None:
    loaded, volumes = pipeline(folder, monkeypatch)
    evaluation = plan(loaded.pipeline).evaluation.path(volumes)
    before = (evaluation / name).read_bytes()
    build_signing.tamper(evaluation, name)
    assert run(loaded, volumes) == 0
    assert artifacts.read(evaluation, [pair().public])
    assert len((evaluation / name).read_bytes()) == len(before)
    assert measured == [], "its scores are signed"


def test_forged_scores_are_measured_again(folder: Path, monkeypatch: pytest.MonkeyPatch, measured: list[str]) -> None:
    """Scores decide the verdict."""
    loaded, volumes = pipeline(folder, monkeypatch)
    wanted = plan(loaded.pipeline)
    shutil.rmtree(wanted.evaluation.path(volumes))
    build_signing.tamper(wanted.adapter_scores.path(volumes), "records.jsonl")
    assert run(loaded, volumes) == 0
    assert measured == [f"hotels@{wanted.adapter.digest}"]
    for spec in (wanted.adapter_scores, wanted.evaluation):
        assert artifacts.read(spec.path(volumes), [pair().public])


def test_the_key_is_changed_in_two_steps_and_nothing_is_made_again(
        folder: Path, monkeypatch: pytest.MonkeyPatch, measured: list[str]) -> None:
    """Both public keys and the new private one; then the old public key goes."""
    pipeline(folder, monkeypatch)
    (folder / "key").write_text(pair("two").private)
    loaded, volumes = published_pipeline(folder, signing={"public_keys": [pair().public, pair("two").public]})
    assert (run(loaded, volumes, "train"), run(loaded, volumes)) == (0, 0)
    loaded, volumes = published_pipeline(folder, signing={"public_keys": [pair("two").public]})
    assert (run(loaded, volumes, "train"), run(loaded, volumes)) == (0, 0)
    wanted = plan(loaded.pipeline)
    for spec in (wanted.adapter, wanted.base_scores, wanted.adapter_scores, wanted.reference_scores, wanted.evaluation):
        assert artifacts.read(spec.path(volumes), [pair("two").public])
    assert measured == []


def test_training_signs_its_adapter_and_trains_again_where_it_finds_one_that_is_not_signed(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when `signing` is added: the one that is there may be anybody's."""
    loaded, volumes = pipeline(tmp_path, monkeypatch)
    adapter = plan(loaded.pipeline).adapter.path(volumes)
    found = artifacts.read(adapter)
    assert run(loaded, volumes, "train") == 0
    trained = artifacts.read(adapter, [pair().public])
    assert trained.manifest["files"] != found.manifest["files"]
    assert trained.manifest["about"][artifacts.READ] == {
        name: artifacts.content_digest(artifacts.read(getattr(plan(loaded.pipeline), name).path(volumes)).manifest)
        for name in ("base_model", "tokenizer", "encoded_dataset", "dataset")}
    assert run(loaded, volumes, "train") == 0
    assert artifacts.read(adapter, [pair().public]).manifest == trained.manifest, "not again"


@pytest.mark.parametrize(("changed", "name"), [("dataset", "holdout.jsonl"), ("base_model", "config.json")])
def test_what_was_changed_since_the_training_is_found_although_it_is_not_signed(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], changed: str,
        name: str) -> None:
    """The records by which an adapter is measured, or the base model, with a manifest that lists them as they are."""
    loaded, volumes = pipeline(tmp_path, monkeypatch)
    wanted = plan(loaded.pipeline)
    adapter = wanted.adapter.path(volumes)
    manifest = json.loads((adapter / "artifact.json").read_text())
    manifest["about"][artifacts.READ] = {
        each: artifacts.content_digest(artifacts.read(getattr(wanted, each).path(volumes)).manifest)
        for each in ("dataset", "encoded_dataset", "base_model", "tokenizer")}
    (adapter / "artifact.json").write_text(json.dumps(manifest))
    build_signing.sign(adapter, pair())
    folder = getattr(wanted, changed).path(volumes)
    build_signing.tamper(folder, name)
    assert run(loaded, volumes) == 2
    assert f"{folder}: is not what the adapter was trained on" in capsys.readouterr().err
    assert not list((volumes / FINE_TUNED_VOLUME).glob("scores/*"))
