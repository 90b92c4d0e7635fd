"""Promises of mode merged: the merged model says what base and adapter say, in the base model's own form; it is made
after the adapter, once, and needs no second training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.core import artifacts, models, pipeline
from jobs.core.errors import UserError
from jobs.core.plan import Plan, plan
from jobs.relocation import relocate
from jobs.relocation.sources.file import path_sha256
from jobs.tools.pods import CHECKOUT
from jobs.training import merge
from tests import build_models, build_pipeline, forked

MAKERS: dict[str, Callable[[Path], None]] = {"GPT2LMHeadModel": build_models.tiny_gpt2,
                                             "StableLmForCausalLM": build_models.tiny_stablelm}


def tensors(folder: Path) -> dict[str, Any]:
    """Every tensor of a model's folder, by name."""
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def rewrite(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Replace the tensors in the one safetensors file of a folder."""
    from safetensors.torch import save_file

    (file,) = folder.glob("*.safetensors")
    save_file(change(tensors(folder)), file, metadata={"format": "pt"})


def times(factor: float) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A change that multiplies every B, and with it what the adapter adds."""
    return lambda found: {name: tensor * (factor if "lora_B" in name else 1) for name, tensor in found.items()}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    build_models.tiny_gpt2(folder)
    return folder


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    """An adapter of `base` with random weights."""
    folder = tmp_path / "adapter"
    build_models.tiny_adapter(folder, base)
    return folder


def merged(base: Path, adapter: Path, folder: Path) -> Path:
    folder.mkdir()
    merge.write_merged(base, adapter, folder)
    return folder


def logits(model: Any) -> Any:
    import torch

    with torch.inference_mode():
        return model(torch.arange(3, 43).reshape(2, 20)).logits


def with_adapter(base: Path, adapter: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(models.load_model(base), str(adapter)).eval()


# --- what is written ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_merged_model_is_in_the_base_models_own_form(tmp_path: Path, dtype: str) -> None:
    build_models.tiny_gpt2(tmp_path / "base", dtype=dtype)
    build_models.tiny_adapter(tmp_path / "adapter", tmp_path / "base")
    folder = merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    before, after = tensors(tmp_path / "base"), tensors(folder)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in after.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in before.items()}
    assert str(after["transformer.wte.weight"].dtype) == f"torch.{dtype}"
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]
    for name in models.CONFIG:
        assert (folder / name).read_bytes() == (tmp_path / "base" / name).read_bytes()


def test_the_sum_is_rounded_once(tmp_path: Path) -> None:
    """Merged in bfloat16, what the adapter adds would be rounded, and its sum with the weight again."""
    build_models.tiny_gpt2(tmp_path / "base", dtype="bfloat16")
    build_models.tiny_adapter(tmp_path / "adapter", tmp_path / "base")
    after = tensors(merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"))
    lora = tensors(tmp_path / "adapter")
    name = "transformer.h.1.mlp.c_fc"
    a, b = (lora[f"base_model.model.{name}.lora_{part}.weight"].float() for part in "AB")
    exact = tensors(tmp_path / "base")[f"{name}.weight"].float() + 2 * (b @ a).T  # scale: alpha 8 / r 4
    assert (after[f"{name}.weight"] == exact.bfloat16()).all()


def test_a_base_model_as_the_hub_has_gpt2_is_merged_too(tmp_path: Path, base: Path, adapter: Path) -> None:
    """Names without a prefix, attention masks among the weights, neither dtype nor generation_config.json."""
    import torch

    rewrite(base, lambda found: {name.removeprefix("transformer."): tensor for name, tensor in found.items()} | {
        f"h.{n}.attn.bias": torch.ones(1, 1, 256, 256).tril() for n in range(2)})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "dtype"}))
    (base / "generation_config.json").unlink()
    folder = merged(base, adapter, tmp_path / "merged")
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert logits(models.load_model(folder)) == pytest.approx(logits(with_adapter(base, adapter)), abs=1e-4)


def test_merging_again_gives_the_same_bytes(tmp_path: Path, base: Path, adapter: Path) -> None:
    first, second = (merged(base, adapter, tmp_path / name) for name in ("first", "second"))
    assert artifacts.listing(first) == artifacts.listing(second)


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.0, 1e-12])
def test_an_adapter_that_changes_no_weight_is_refused(
        tmp_path: Path, base: Path, adapter: Path, factor: float) -> None:
    """Zero, or lost in rounding. A weight of -0.0 becomes 0.0 all the same, and is no change."""
    rewrite(base, lambda found: {name: tensor.where(tensor > 0.01, -0.0) for name, tensor in found.items()})
    rewrite(adapter, times(factor))
    if factor:
        rewrite(base, lambda found: {name: tensor + 1 for name, tensor in found.items()})
    with pytest.raises(UserError, match="changes no weight of the base model as float32"):
        merged(base, adapter, tmp_path / "merged")


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_refused(tmp_path: Path, base: Path, adapter: Path, factor: float) -> None:
    rewrite(adapter, times(factor))
    with pytest.raises(UserError, match="cannot be merged: NaNs detected.*lower training.learning_rate"):
        merged(base, adapter, tmp_path / "merged")


def test_values_beyond_the_base_models_dtype_are_refused(tmp_path: Path) -> None:
    build_models.tiny_gpt2(tmp_path / "base", dtype="float16")
    build_models.tiny_adapter(tmp_path / "adapter", tmp_path / "base")
    rewrite(tmp_path / "adapter", times(1e6))
    with pytest.raises(UserError, match="values beyond what float16 can hold"):
        merged(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")


# --- the job -----------------------------------------------------------------------------------------------------


def command(file: Path, volumes: Path) -> list[str]:
    return ["--pipeline", str(file), "--volumes", str(volumes), "--wait-seconds", "1", "train"]


def job(file: Path, volumes: Path, before: str = "") -> subprocess.CompletedProcess[str]:
    """The training job as a process of its own, after the statements `before`."""
    return forked.run(command(file, volumes), before=before)


def started_job(file: Path, volumes: Path) -> subprocess.CompletedProcess[str]:
    """The same, started anew; it says at its end if torch was loaded."""
    code = ("import sys; from jobs import __main__ as command\n"
            "code = command.main(sys.argv[1:]); print('torch' in sys.modules); sys.exit(code)")
    return subprocess.run([sys.executable, "-c", code, *command(file, volumes)], cwd=CHECKOUT, capture_output=True,
                          text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})


NO_TRAINING = ("from jobs.training import train\n"
               "def train_again(*_): raise AssertionError('trained again')\ntrain.train = train_again")


def inputs(place: Path, architecture: str = "GPT2LMHeadModel", **settings: Any) -> tuple[Path, Path, Plan]:
    """A pipeline file in mode merged whose inputs to training are published, the volumes' root, and the plan."""
    settings = {"mode": "merged", "epochs": 20, "learning_rate": 2e-2, **settings}
    loaded, volumes = build_models.published_pipeline(place, base_model=MAKERS[architecture], chat=False, without=[
        "reference_model", "adapter", "merged_model"], **settings)
    return loaded.path, volumes, plan(loaded.pipeline)


def switch(file: Path, mode: str) -> None:
    """Change serving.mode in the environment file, and nothing else."""
    file = file.with_name("environment.yaml")
    text = file.read_text()
    other = {"lora": "merged", "merged": "lora"}[mode]
    assert f"mode: {other}" in text
    file.write_text(text.replace(f"mode: {other}", f"mode: {mode}"))


@pytest.mark.parametrize("architecture", models.MERGED_ONLY)
def test_what_training_merges_says_what_base_and_adapter_say(
        tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    file, volumes, wanted = inputs(tmp_path, architecture)
    done = job(file, volumes)
    assert done.returncode == 0, done.stderr
    assert "fan_in_fan_out" not in done.stderr, "PEFT's warning: it says nothing that a user should do"
    folder, base, adapter = (artifacts.read(spec.path(volumes)).path for spec in
                             (wanted.merged_model, wanted.base_model, wanted.adapter))
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] == (architecture == "GPT2LMHeadModel")
    assert config["target_modules"] == sorted(models.MERGED_ONLY[architecture])
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (type(model).__name__, model.dtype) == (architecture, torch.float32)
    assert logits(model.eval()) == pytest.approx(logits(with_adapter(base, adapter)), abs=1e-4)
    assert logits(model) != pytest.approx(logits(models.load_model(base)), abs=1e-1)


def test_a_change_to_mode_merged_only_merges_and_back_again_does_nothing(tmp_path: Path) -> None:
    file, volumes, wanted = inputs(tmp_path)
    assert job(file, volumes).returncode == 0
    alone = artifacts.read(wanted.merged_model.path(volumes)).manifest["files"]
    wanted.merged_model.path(volumes).rename(tmp_path / "elsewhere")

    switch(file, "lora")
    done = started_job(file, volumes)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
    assert not wanted.merged_model.path(volumes).exists()

    switch(file, "merged")
    done = job(file, volumes, NO_TRAINING)
    assert done.returncode == 0, done.stderr
    assert f"merging {wanted.adapter} into file:base" in done.stderr
    assert artifacts.read(wanted.merged_model.path(volumes)).manifest["files"] == alone

    wanted.base_model.path(volumes).rename(tmp_path / "gone")
    done = started_job(file, volumes)
    assert (done.returncode, done.stdout) == (0, "False\n"), "already done needs neither torch nor the base model"
    assert f"{wanted.merged_model} is already there and verified" in done.stderr


def test_a_kill_while_merging_costs_the_merge_and_not_the_training(tmp_path: Path) -> None:
    file, volumes, wanted = inputs(tmp_path)
    killed = job(file, volumes, "import os, shutil\nshutil.copyfile = lambda *_: os.kill(os.getpid(), 9)")
    assert killed.returncode == -9
    assert list(wanted.merged_model.path(volumes).parent.glob(".draft-*/model.safetensors")), "it was half written"
    assert artifacts.find(wanted.adapter, volumes) and not artifacts.find(wanted.merged_model, volumes)
    done = job(file, volumes, NO_TRAINING)
    assert done.returncode == 0, done.stderr
    assert artifacts.find(wanted.merged_model, volumes)


def test_in_mode_lora_gpt2_is_refused_before_training_with_the_way_out(tmp_path: Path) -> None:
    file, volumes, _ = inputs(tmp_path, mode="lora")
    done = job(file, volumes)
    assert done.returncode == 2
    assert "vLLM cannot serve a LoRA adapter on GPT2LMHeadModel. Set `serving: {mode: merged}`" in done.stderr


def test_a_base_model_into_which_nothing_can_be_merged_is_refused_before_training(tmp_path: Path) -> None:
    def quantized(folder: Path) -> None:
        import torch

        build_models.tiny_gpt2(folder)
        rewrite(folder, lambda found: {name: tensor.to(torch.float8_e4m3fn) for name, tensor in found.items()})

    loaded, volumes = build_models.published_pipeline(tmp_path, base_model=quantized, mode="merged", without=[
        "reference_model", "adapter", "merged_model"])
    done = job(loaded.path, volumes, NO_TRAINING)
    assert done.returncode == 2
    assert "is stored as F8_E4M3, into which no adapter can be merged" in done.stderr


def test_relocation_takes_gpt2_in_mode_merged_and_only_there(tmp_path: Path, base: Path) -> None:
    pin = {"source": "file:base", "sha256": path_sha256(base)}
    file = build_pipeline.write(tmp_path, base_model=pin, serving__mode="merged")
    relocate.run_model(pipeline.load(file).environment, "base-model", tmp_path / "volumes")
    assert artifacts.find(plan(pipeline.load(file).pipeline).base_model, tmp_path / "volumes")
    build_pipeline.write(tmp_path, base_model=pin)
    with pytest.raises(UserError, match=r"GPT2LMHeadModel. Set `serving: {mode: merged}`"):
        relocate.run_model(pipeline.load(file).environment, "base-model", tmp_path / "volumes")
