"""Promises of the work-around for vLLM on CPUs: what it refuses, and an adapter that adds nothing. It goes with it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from serving import cpu_shield, parameters
from serving.served import Served

SERVED = Served("", "", "base", "", "", "", 16, "")
SHIELDED = replace(SERVED, cpu_shield=True)


@pytest.mark.parametrize("is_cpu", [True, False])
def test_it_is_needed_where_vllm_computes_on_a_cpu(is_cpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    platform = SimpleNamespace(is_cpu=lambda: is_cpu)
    monkeypatch.setitem(sys.modules, "vllm.platforms", SimpleNamespace(current_platform=platform))
    assert cpu_shield.needed() is is_cpu


def test_its_adapter_takes_one_slot() -> None:
    assert (cpu_shield.slots(SHIELDED), cpu_shield.slots(SERVED)) == (1, 0)


@pytest.mark.parametrize(("request_", "param"), [
    ({"prompt_logprobs": 0, "echo": True}, "prompt_logprobs"), ({"echo": True, "logprobs": 1}, "echo"),
    ({"prompt_logprobs": None}, "echo")])
def test_what_would_crash_the_engine_is_refused_with_the_parameter_to_leave_out(
        request_: dict[str, Any], param: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def wants(path: str, request: dict[str, Any]) -> bool:
        asked.append((path, request))
        return True

    monkeypatch.setattr(parameters, "wants_prompt_logprobs", wants)
    reply = cpu_shield.refusal("/v1/completions", request_, SHIELDED)
    assert reply
    error = json.loads(bytes(reply.body))["error"]
    assert (reply.status_code, error["param"], asked) == (400, param, [("/v1/completions", request_)])
    assert "cannot compute log-probabilities of the prompt" in error["message"]
    assert cpu_shield.refusal("/v1/completions", request_, SERVED) is None
    monkeypatch.setattr(parameters, "wants_prompt_logprobs", lambda *_: False)
    assert cpu_shield.refusal("/v1/completions", request_, SHIELDED) is None


def test_its_adapter_is_a_valid_one_of_zeros_on_the_first_layer(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    modules = {"model.layers.0.self_attn.q_proj": (8, 4), "model.layers.0.mlp.up_proj": (6, 3)}
    for _ in range(2):  # also over what an earlier start left
        folder = cpu_shield.write_zero(modules, replace(SHIELDED, private_folder=str(tmp_path)))
    assert folder == tmp_path / "zero"
    weights = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    assert {key: tuple(value.shape) for key, value in weights.items()} == {
        f"{name}.lora_A.weight": (1, 4), f"{name}.lora_B.weight": (8, 1)}
    assert all(torch.count_nonzero(value) == 0 for value in weights.values())
    assert json.loads((folder / "adapter_config.json").read_text()) == {
        "peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
