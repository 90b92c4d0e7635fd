"""Promises of `check`: what would fail in the cluster is found before the push, with no network."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from jobs.core.errors import UserError
from jobs.relocation.sources.file import path_sha256
from jobs.tools import check
from jobs.tools.pods import CHECKOUT
from tests import build_pipeline

RECORDS = [{"prompt": f"question {n}", "completion": "answer"} for n in range(40)]


def overlay(folder: Path, records: list[dict[str, Any]] | None = None, **changes: Any) -> Path:
    """An overlay's folder with valid data, correctly pinned."""
    data = folder / "dataset.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records or RECORDS))
    build_pipeline.write(folder, **({"dataset__sha256": path_sha256(data)} | changes))
    return folder


@pytest.mark.parametrize("overlay", sorted(p.parent for p in (CHECKOUT / "overlays").glob("*/pipeline.yaml")),
                         ids=lambda p: p.name)
def test_every_overlay_in_the_repository_is_valid(overlay: Path) -> None:
    check.run(overlay)


@pytest.mark.parametrize("name", ["dataset.jsonl", "sentences/a.jsonl", "base/config.json"])
def test_a_fifo_is_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    folder = overlay(tmp_path, evaluation__acceptability={"source": "file:sentences", "sha256": "0" * 64},
                     base_model={"source": "file:base", "sha256": "0" * 64})
    for each in ("sentences", "base"):
        (folder / each).mkdir()
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match=rf"{name}: is a FIFO, not a plain file"):
        check.run(folder)


def test_a_valid_overlay_passes(tmp_path: Path) -> None:
    check.run(overlay(tmp_path))


@pytest.mark.parametrize(("changes", "message"), [
    ({"dataset__sha256": "0" * 64}, "but .*pins dataset at 0000.*If the change is meant, run: python -m jobs pin"),
    ({"dataset__source": "file:other.jsonl"}, "dataset: .*other.jsonl does not exist"),
    ({"base_model__architecture": "GPT2LMHeadModel"}, "vLLM cannot serve a LoRA adapter on GPT2LMHeadModel"),
    ({"base_model__architecture": "LlamaForCausalLM", "training__lora__target_modules": ["c_attn"]},
     "c_attn cannot be served on LlamaForCausalLM; allowed: down_proj"),
    ({"base_model": {"source": "builtin:tiny"}, "training__lora__target_modules": ["c_attn"]}, "c_attn cannot"),
    ({"base_model__architecture": "GPT2LMHeadModel"}, "Set `serving: {mode: merged}`"),
    ({"base_model__architecture": "GPTJForCausalLM", "serving__mode": "merged"},
     "training cannot adapt, GPTJForCausalLM. .*LlamaForCausalLM.*GPT2LMHeadModel"),
    ({"base_model__architecture": "GPT2LMHeadModel", "serving__mode": "merged",
      "training__lora__target_modules": ["c_attn", "lm_head"]},
     "lm_head cannot be served on GPT2LMHeadModel; allowed: c_attn, c_fc, c_proj"),
    ({"training__lora__r": 0}, "training.lora.r: 0"),
])
def test_what_would_fail_in_the_cluster_is_refused_here(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check.run(overlay(tmp_path, **changes))


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "LlamaForCausalLM"])
def test_in_mode_merged_a_model_without_lora_in_vllm_passes_too(tmp_path: Path, architecture: str) -> None:
    check.run(overlay(tmp_path, base_model__architecture=architecture, serving__mode="merged"))


def test_bad_records_are_listed_with_their_lines(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dataset\.jsonl:41: `completion` is empty"):
        check.run(overlay(tmp_path, [*RECORDS, {"prompt": "question", "completion": ""}]))


def test_data_too_large_for_a_config_map_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a ConfigMap holds 1048576"):
        check.run(overlay(tmp_path, [{"prompt": f"q{n}", "completion": "x" * 30_000} for n in range(40)]))


def test_sentences_in_git_are_held_to_their_pin_too(tmp_path: Path) -> None:
    (tmp_path / "cola.jsonl").write_text('{"text": "The cook reads.", "acceptable": true}\n')
    source = {"source": "file:cola.jsonl", "sha256": "0" * 64}
    with pytest.raises(UserError, match="pins evaluation.acceptability at 0000"):
        check.run(overlay(tmp_path, evaluation__acceptability=source))


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        check.run(overlay(tmp_path, dataset__sha256="0" * 64, base_model__architecture="GPT2LMHeadModel"))
    assert len(str(raised.value).splitlines()) == 2
