"""Promises about base models: what the table says vLLM serves is what the installed vLLM serves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.core import models
from jobs.core.errors import UserError
from jobs.core.pipeline import SERVABLE_RANKS

ASK_VLLM = """
import json, sys, typing
from vllm.config.lora import MaxLoRARanks
from vllm.model_executor.models.interfaces import supports_lora
from vllm.model_executor.models.registry import ModelRegistry
names = json.loads(sys.argv[1])
classes = {name: ModelRegistry._try_load_model_cls(name) for name in names}
print(json.dumps({"ranks": typing.get_args(MaxLoRARanks),
                  "served": [n for n, c in classes.items() if c is not None],
                  "with_lora": [n for n, c in classes.items() if c is not None and supports_lora(c)]}))
"""


@pytest.mark.slow
def test_the_installed_vllm_serves_the_architectures_and_ranks_we_accept() -> None:
    names = [*models.SERVABLE, *models.MERGED_ONLY]
    done = subprocess.run([sys.executable, "-c", ASK_VLLM, json.dumps(names)], capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["served"] == names
    assert answer["with_lora"] == list(models.SERVABLE), "what vLLM learned to serve with LoRA belongs into SERVABLE"
    assert tuple(answer["ranks"]) == SERVABLE_RANKS


def test_an_architecture_that_cannot_be_served_is_refused_with_those_that_can() -> None:
    with pytest.raises(UserError, match="here: vLLM cannot serve a LoRA adapter on GPTJForCausalLM. Choose .*Llama"):
        models.check_servable("GPTJForCausalLM", "here")


def test_a_refusal_names_mode_merged_where_that_would_help() -> None:
    with pytest.raises(UserError, match=r"LoRA adapter on GPT2LMHeadModel. Set `serving: {mode: merged}`.*LlamaForC"):
        models.check_servable("GPT2LMHeadModel", "here")
    assert models.check_servable("GPT2LMHeadModel", "here", "merged") == {"c_attn", "c_proj", "c_fc"}
    assert models.check_servable("LlamaForCausalLM", "here", "merged") == models.SERVABLE["LlamaForCausalLM"]


def test_all_linear_means_every_layer_that_can_be_served() -> None:
    assert models.check_target_modules("Phi3ForCausalLM", "all-linear", "here") == [
        "down_proj", "gate_up_proj", "o_proj", "qkv_proj"]


@pytest.mark.parametrize(("content", "message"), [
    (None, "has no config.json"),
    ("{", "cannot be read"),
    ("[]", "must hold a JSON mapping"),
    ("{}", "`architectures` must name one class"),
    ('{"architectures": ["A", "B"]}', "`architectures` must name one class"),
])
def test_a_folder_that_is_no_model_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        models.architecture(tmp_path)


def test_where_a_gpu_is_required_nothing_is_computed_on_the_cpu(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong image or an old driver: training would take weeks, and only `top` would say why."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    models.check_gpu()
    monkeypatch.setenv("REQUIRE_GPU", "1")
    for compute in (models.check_gpu, lambda: models.load_model(tmp_path)):
        with pytest.raises(UserError, match="REQUIRE_GPU is set, but torch .* sees no GPU"):
            compute()


def test_too_little_gpu_memory_says_what_to_change() -> None:
    import torch

    with pytest.raises(UserError, match="Tried to allocate 2.00 GiB. Lower it$"), models.gpu_memory("Lower it"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of …")
    with pytest.raises(RuntimeError, match="our own"), models.gpu_memory("Lower it"):
        raise RuntimeError("our own")
