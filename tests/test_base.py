"""Promises about the base model: the first pipeline file decides on it, and only what can be served ends a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.core.errors import UserError
from jobs.core.pipeline import Pipeline
from serving import base
from serving.refusal import Refused
from serving.served import Served
from tests import build_adapter
from tests.build_guarded import World, publish_base
from tests.build_server import StandIn

OTHER_BASE: dict[str, Any] = {"base_model": {"source": "builtin:tiny-reference"}}
OTHER_TOKENIZER: dict[str, Any] = {"tokenizer": {"source": "builtin:tiny-reference"}}
MERGED: dict[str, Any] = {"serving": {"mode": "merged"}}


def load(folder: Path, **changes: Any) -> Pipeline:
    return build_adapter.load(folder, **changes)[0]


@pytest.fixture
def served(tmp_path: Path) -> Served:
    return publish_base(World(tmp_path, StandIn()))


def test_the_first_folder_by_name_decides_and_the_others_join_if_they_fit(tmp_path: Path) -> None:
    load(tmp_path / "a", adapter="one")
    load(tmp_path / "b", adapter="two", serving={"max_lora_rank": 128})
    load(tmp_path / "c", adapter="three", **OTHER_BASE)
    load(tmp_path / "d", adapter="four", **OTHER_TOKENIZER)
    load(tmp_path / "e", adapter="five", **MERGED)
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "pipeline.yaml").write_text("adapter: Not A Name")
    leader = base.leading(tmp_path)
    others = base.following(tmp_path, leader)
    assert leader.pipeline.adapter == "one"
    assert [each.adapter for each in others] == ["two"]
    assert base.max_lora_rank(leader.pipeline, others) == 128


def test_no_pipeline_file_or_an_invalid_first_one_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no pipeline files; there must be at least one .*/NAME/pipeline\.yaml"):
        base.leading(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "pipeline.yaml").write_text("adapter: Not A Name")
    load(tmp_path / "b")
    with pytest.raises(UserError, match=r"a/pipeline\.yaml:1: adapter"):
        base.leading(tmp_path)


@pytest.mark.parametrize(("changes", "reason", "says"), [
    (OTHER_BASE, "base", "its base model is "), (OTHER_TOKENIZER, "base", "its tokenizer is "),
    (MERGED, "mode", "its serving.mode is merged, this server's is lora")])
def test_an_adapter_for_another_base_tokenizer_or_mode_is_refused_by_reason(
        tmp_path: Path, served: Served, changes: dict[str, Any], reason: str, says: str) -> None:
    base.check_fits(load(tmp_path / "x"), served)
    with pytest.raises(Refused, match=says) as caught:
        base.check_fits(load(tmp_path / "x", **changes), served)
    assert caught.value.reason == reason
    assert "server of its own" in str(caught.value)


@pytest.mark.parametrize(("changes", "says"), [
    (OTHER_BASE, "base model and tokenizer changed to base-model/"), (MERGED, "changed from lora to merged"),
    ({"serving": {"max_lora_rank": 128}}, "raised from 64 to 128")])
def test_what_a_running_server_cannot_follow_is_named_and_nothing_else_restarts_it(
        tmp_path: Path, served: Served, changes: dict[str, Any], says: str) -> None:
    for harmless in ({}, {"training__seed": 5}, {"serving": {"max_lora_rank": 8}}, {"retention": {"keep": 2}}):
        assert base.changed(load(tmp_path / "x", **harmless), [], served) is None
    assert says in str(base.changed(load(tmp_path / "x", **changes), [], served))


def test_a_rank_that_only_another_pipeline_needs_counts_too(tmp_path: Path, served: Served) -> None:
    other = load(tmp_path / "y", adapter="two", serving={"max_lora_rank": 128})
    assert "raised from 64 to 128" in str(base.changed(load(tmp_path / "x"), [other], served))


def test_a_base_model_that_a_server_could_not_start_with_is_refused(tmp_path: Path, served: Served) -> None:
    wish = load(tmp_path / "x")
    volumes = Path(served.volumes)
    base.check_startable(wish, volumes)
    (base.folders(wish, volumes)[0] / "config.json").write_text("{}")
    with pytest.raises(Refused, match="config.json was changed"):
        base.check_startable(wish, volumes)
