"""Promises of settings of one run: the digests of the file with that value, and a refusal that gives the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.core import pipeline, settings
from jobs.core.errors import UserError
from jobs.core.plan import plan
from tests import build_pipeline


def load(file: Path, *changes: str) -> pipeline.LoadedPipeline:
    return pipeline.load(file, changes=changes)


@pytest.mark.parametrize(("setting", "key", "value"), [
    ("training.epochs=7", "training__epochs", 7), ("training.lora.r=4", "training__lora__r", 4),
    ("training.learning_rate=0.001", "training__learning_rate", 1e-3),
    ("training.lora.target_modules=[\"q_proj\"]", "training__lora__target_modules", ["q_proj"]),
    ("training.max_length=256", "training__max_length", 256)])
def test_a_setting_gives_the_digests_of_the_file_with_that_value(
        tmp_path: Path, setting: str, key: str, value: object) -> None:
    edited = load(build_pipeline.write(tmp_path, **{key: value}))
    file = build_pipeline.write(tmp_path)
    changed = load(file, setting)
    assert plan(changed.pipeline).named() == plan(edited.pipeline).named() != plan(load(file).pipeline).named()
    assert changed.changed == {setting.partition("=")[0]: value}
    assert edited.changed == {}


def test_the_files_own_value_however_it_is_written_and_an_empty_one_change_nothing(tmp_path: Path) -> None:
    file = build_pipeline.write(tmp_path, training__learning_rate=2e-3, training__lora__alpha=32)
    for setting in ("training.learning_rate=0.002", "training.learning_rate=2e-3", "training.lora.alpha=32",
                    "training.epochs=1", "training.epochs=", "training.lora.target_modules=all-linear"):
        assert load(file, setting).changed == {}, setting


@pytest.mark.parametrize(("setting", "message"), [
    ("training.epochs", r"^--set training.epochs: must be KEY=VALUE, for example training.epochs=3$"),
    ("training.epoch=3", r"^--set training.epoch: unknown key; did you mean `training.epochs`\?$"),
    ("dataset.holdout=0.5", r"^--set dataset.holdout: a run can change single values of `training` only: .*Data, pins"),
    ("evaluation.gate={}", r"what git has: edit the pipeline file$"),
    ("training.search={}", r"^--set training.search: "), ("training.lora={}", r"^--set training.lora: "),
    ("training.epochs=0", r"^with --set training.epochs=0: .*pipeline.yaml:\d+: training.epochs: 0: "),
    ("training.epochs=many", r"training.epochs: 'many': "), ("training.learning_rate=NaN", r"training.learning_rate: "),
    ("training.learning_rate=3", r"training.learning_rate: 3.*less than 1"),
    ("training.0123456789=3", r"^--set training.0123456789: a run can change single values of `training` only: "),
    ("raining.epochs=3", r"^--set raining.epochs: a run can change single values of `training` only: "),
    ("training.lora.r=128", r"above serving.max_lora_rank")])
def test_what_cannot_be_changed_for_a_run_is_refused_with_the_reason(
        tmp_path: Path, setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(build_pipeline.write(tmp_path), setting)


@pytest.mark.parametrize("key", ["trials", "seed", "candidates"])
def test_a_search_is_no_single_value(tmp_path: Path, key: str) -> None:
    search = {"candidates": {"lora.r": [4, 8]}}
    with pytest.raises(UserError, match=rf"^--set training.search.{key}: "):
        load(build_pipeline.write(tmp_path, training__search=search), f"training.search.{key}=3")
    assert load(build_pipeline.write(tmp_path, training__search=search), "training.epochs=3").changed


def test_a_value_may_hold_what_separates_it_from_its_key() -> None:
    found = settings.changes(pipeline.Training(), ['training.lora.target_modules=["a=b"]'])
    assert found == {"training.lora.target_modules": ["a=b"]}


def test_the_content_of_the_file_stays_as_it_is() -> None:
    """It is what the run is compared with."""
    content = {"training": {"lora": {"r": 8}, "epochs": 1}}
    changed = settings.applied(content, {"training.lora.r": 4, "training.seed": 2})
    assert changed == {"training": {"lora": {"r": 4}, "epochs": 1, "seed": 2}}
    assert content == {"training": {"lora": {"r": 8}, "epochs": 1}}


def test_the_edit_to_commit_is_shown_as_the_file_has_it() -> None:
    """In the order of the settings, and with letters as they are written."""
    assert settings.edit({"training.lora.r": 8, "training.epochs": 3, "training.lora.target_modules": ["größe"]}) == (
        "training:\n  lora:\n    r: 8\n    target_modules:\n    - größe\n  epochs: 3")
