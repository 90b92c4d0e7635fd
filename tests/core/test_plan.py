"""Promises of the plan: an edit renames exactly what it changes, and what stands in git names everything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.core import pipeline
from jobs.core.plan import Plan, merged_model, plan
from tests import build_pipeline

EVALUATIONS = {"adapter_scores", "evaluation"}
ADAPTER = {"adapter", "merged_model"} | EVALUATIONS
SCORES = {"base_scores", "adapter_scores", "reference_scores", "evaluation"}


def planned(folder: Path, **changes: Any) -> Plan:
    return plan(pipeline.load(build_pipeline.write(folder, **changes)).pipeline)


@pytest.mark.parametrize(("changes", "renamed"), [
    ({}, set()),
    ({"training__lora__r": 4}, ADAPTER),
    ({"training__checkpoint_steps": 7}, set()),
    ({"training__gradient_checkpointing": True, "training__sharding": "fsdp"}, set()),
    ({"training__quantization": "4bit"}, ADAPTER),
    ({"retention__keep": 9}, set()),
    ({"serving__max_lora_rank": 128}, set()),
    ({"serving__when_base_changes": "at-once"}, set()),
    ({"serving__mode": "merged"}, set()),
    ({"adapter": "other"}, {"evaluation"}),
    ({"evaluation__gate__perplexity__max_ratio": 0.8}, {"evaluation"}),
    ({"evaluation__max_new_tokens": 9}, SCORES),
    ({"reference_model__source": "builtin:tiny"}, {"reference_model", "reference_scores", "evaluation"}),
    ({"dataset__sha256": "00" * 32}, {"dataset"} | ADAPTER | SCORES),
    ({"dataset__source": "https://example.com/copy.jsonl"}, set()),  # the same bytes from elsewhere
    ({"base_model__revision": "0" * 40}, {"base_model", "tokenizer", "base_scores"} | ADAPTER),
    ({"tokenizer": {"source": "builtin:tiny"}}, {"tokenizer", "base_scores"} | ADAPTER),
])
def test_an_edit_renames_exactly_what_it_changes(tmp_path: Path, changes: dict[str, Any], renamed: set[str]) -> None:
    before, after = planned(tmp_path), planned(tmp_path, **changes)
    assert {name for name, spec in vars(after).items() if spec.digest != vars(before)[name].digest} == renamed


def test_writing_out_a_default_renames_nothing(tmp_path: Path) -> None:
    assert planned(tmp_path, training__seed=0, training__lora__alpha=32) == planned(tmp_path)


def test_the_order_of_target_modules_renames_nothing(tmp_path: Path) -> None:
    one = planned(tmp_path, training__lora__target_modules=["q_proj", "v_proj"])
    assert one == planned(tmp_path, training__lora__target_modules=["v_proj", "q_proj"])


def test_serving_names_the_merged_model_of_an_earlier_adapter_by_two_digests(tmp_path: Path) -> None:
    """It knows a promoted adapter by its digest only, not by the pipeline file that made it."""
    wanted = planned(tmp_path)
    assert merged_model(wanted.adapter.digest, wanted.base_model.digest) == wanted.merged_model
    assert wanted.named()["merged-model"] == wanted.merged_model
    assert wanted.merged_model.inputs == {"adapter": wanted.adapter.digest, "base_model": wanted.base_model.digest}
