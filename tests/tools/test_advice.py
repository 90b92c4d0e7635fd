"""Promises of the advice: it names the key, the number and the source, and says nothing about what is common."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from jobs.core.errors import UserError
from jobs.tools import advice, check
from tests import build_pipeline
from tests.tools.test_check import overlay


def given(records: int = 10_000, **changes: Any) -> list[str]:
    """The advice for a dataset of prompts of 40 tokens and answers of 60, on a base model of 135M."""
    statistics = {"records": {"train": records}, "characters": {"train": {"prompt": {"median": 160},
                                                                          "completion": {"median": 240}}}}
    return list(advice.advice(build_pipeline.build(**changes), statistics))


def test_common_settings_need_no_advice() -> None:
    assert given() == []


@pytest.mark.parametrize(("changes", "words"), [
    ({"training__learning_rate": 2e-5}, "training.learning_rate is 2e-05, as for training all weights; LoRA's best is "
     "about 10 times that, 1e-4 to 5e-4"),
    ({"training__learning_rate": 1e-2}, "training.learning_rate is 0.01; LoRA's best is mostly 1e-4 to 5e-4"),
    ({"training__tokens_per_batch": 32768}, "training.tokens_per_batch is 32768, about 328 of these records a step; "
     "LoRA learns best from about 32, 4096 tokens"),
    ({"training__lora__target_modules": ["q_proj", "v_proj"]}, "target_modules has no feed-forward layer"),
    ({"records": 1_000_000}, "training.lora.r is 8, which can hold about 5.6 Mbit, and the answers have about 60.0 "
     "Mbit: raise it"),
    ({"records": 500, "training__lora__r": 32}, "training.lora.r is 32, which can hold 744 times what the answers "
     "have; 8 would do"),
])
def test_each_advice_names_its_key_its_numbers_and_its_source(changes: dict[str, Any], words: str) -> None:
    (line,) = given(**changes)
    assert words in line
    assert line.endswith('("LoRA Without Regret", Schulman et al. 2025)')
    assert "\n" not in line


def test_of_few_records_no_batch_is_too_large() -> None:
    assert given(records=100, training__tokens_per_batch=32768) == []


def test_where_the_data_is_elsewhere_only_settings_are_judged() -> None:
    pipeline = build_pipeline.build(training__learning_rate=1e-2, training__tokens_per_batch=32768)
    assert len(list(advice.advice(pipeline, None))) == 1


def test_embedded_models_are_for_trying_out() -> None:
    assert given(base_model={"source": "builtin:tiny"}, training__learning_rate=1e-2) == []


@pytest.mark.parametrize(("name", "size"), [
    ("HuggingFaceTB/SmolLM2-135M-Instruct", 135e6), ("Qwen/Qwen3-4B", 4e9), ("Qwen/Qwen2.5-0.5B", 0.5e9),
    ("meta-llama/Llama-3.2-1B", 1e9), ("Qwen/Qwen3-30B-A3B", 30e9), ("openai-community/gpt2", None),
    ("a/7B-vs-8B", None), ("file:model", None)])
def test_the_size_of_a_model_is_read_from_its_name(name: str, size: float | None) -> None:
    assert advice.parameters(name) == size


@pytest.mark.parametrize(("size", "dimensions"), [
    # hidden, intermediate, query, key and value; layers
    (135e6, (576, 1536, 576, 192, 30)), (4e9, (2560, 9728, 4096, 1024, 36)), (8e9, (4096, 12288, 4096, 1024, 36))])
def test_the_estimate_of_an_adapters_parameters_is_right_to_a_fifth(size: float, dimensions: tuple[int, ...]) -> None:
    hidden, intermediate, query, key, layers = dimensions
    true = 16 * layers * (2 * (hidden + query) + 2 * (hidden + key) + 3 * (hidden + intermediate))
    assert advice.lora_parameters(size, 16) == pytest.approx(true, rel=0.2)


def test_check_prints_advice_and_passes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        check.run(overlay(tmp_path, training__learning_rate=1e-2))
    assert f"{tmp_path}/pipeline.yaml: advice: training.learning_rate is 0.01" in caplog.text


def test_keeping_the_best_weights_without_validation_is_found_before_the_push(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pipeline.yaml: training.keep: best chooses by the loss on the validation"):
        check.run(overlay(tmp_path, training__keep="best"))
    check.run(overlay(tmp_path, training__keep="best", dataset__validation=0.2))
