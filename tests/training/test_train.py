"""Promises of training: only completions are learned, records do not see each other, a kill changes nothing, and what
vLLM could not serve is refused first."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.core import artifacts, models, pipeline
from jobs.core.errors import UserError
from jobs.core.pipeline import Lora, Training
from jobs.core.plan import plan
from jobs.data.encoded import Splits
from jobs.data.encoding import Encoded
from jobs.tools.pods import CHECKOUT
from jobs.training import callbacks, packing, train
from tests import build_models, build_signing
from tests.build_signing import pair

VOCABULARY = 97


def records(count: int, seed: int = 1) -> list[Encoded]:
    """Random token sequences: short prompts and completions."""
    pick = random.Random(seed)
    return [Encoded.of([pick.randrange(3, VOCABULARY) for _ in range(pick.randrange(3, 9))],
                    [pick.randrange(3, VOCABULARY) for _ in range(pick.randrange(2, 9))]) for _ in range(count)]


def tiny(kind: str) -> tuple[Any, list[str]]:
    """A random model of a kind, and layers of it to adapt."""
    import transformers as t

    t.set_seed(0)
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "vocab_size": VOCABULARY, "initializer_range": 0.2}
    if kind == "gpt2":
        return t.GPT2LMHeadModel(t.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **ids)), ["c_attn"]
    if kind == "stablelm":
        return t.StableLmForCausalLM(t.StableLmConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                                      num_attention_heads=4, num_key_value_heads=4, **ids)), ["q_proj"]
    return t.LlamaForCausalLM(t.LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                            intermediate_size=64, **ids)), ["q_proj", "v_proj", "down_proj"]


def settings(**changes: Any) -> Training:
    values: dict[str, Any] = {"epochs": 3, "learning_rate": 1e-2, "max_length": 32, "tokens_per_batch": 64,
                        "checkpoint_steps": 4, "lora": Lora(r=4, alpha=8, dropout=0.1)}
    return Training(**(values | changes))


def folders(place: Path) -> callbacks.Folders:
    return callbacks.Folders(place / "checkpoints", place / "tensorboard")


@given(st.lists(st.integers(2, 60), min_size=1, max_size=80), st.integers(0, 9), st.integers(1, 3))
def test_each_epoch_takes_every_record_once_and_keeps_to_the_budget(lengths: list[int], seed: int, epochs: int) -> None:
    split: Any = SimpleNamespace(lengths=np.array(lengths))
    batches = packing.Batches(split, settings(tokens_per_batch=60, seed=seed, epochs=epochs))
    assert sorted(np.concatenate(list(batches))) == sorted([*range(len(lengths))] * epochs)
    assert all(sum(lengths[number] for number in batch) <= 60 for batch in batches)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "stablelm"])
def test_a_packed_batch_has_the_loss_of_its_records_one_by_one(kind: str) -> None:
    """Neither padding nor packing changes what is learned: no record attends to another, no prompt is learned."""
    import torch

    model, _ = tiny(kind)
    model.eval().config.use_cache = False
    pack = records(6)
    total = 0.0
    for record in pack:
        labels = record.labels()
        loss = model(input_ids=torch.tensor([list(record.tokens)]), labels=torch.tensor([labels])).loss
        total += loss.item() * len(record.completion)
    expected = total / sum(len(record.completion) for record in pack)
    assert model(**packing.flatten(pack)).loss.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_training_learns_and_writes_an_adapter_in_safetensors(tmp_path: Path, kind: str) -> None:
    model, layers = tiny(kind)
    data = [Encoded.of(record.prompt, [5, 6, 7, 8]) for record in records(20)]
    history = train.train(model, Splits(data, data[:5], 0), settings(epochs=15, learning_rate=5e-2), layers,
                          folders(tmp_path), tmp_path / "out")
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert sum(losses[-3:]) / 3 < sum(losses[:3]) / 3 - 0.5
    assert any("holdout_loss" in entry for entry in history)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 4
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    """What a lost attempt logged beyond its last whole checkpoint is hidden; what came before it stays."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    data = records(20)

    def attempt() -> int:
        history = train.train(tiny("llama")[0], Splits(data, data, 0), settings(), ["q_proj"],
                              folders(tmp_path), tmp_path / "out")
        return int(history[-1]["step"])

    steps = attempt()
    shutil.rmtree(tmp_path / "checkpoints" / f"checkpoint-{steps}")
    assert callbacks.newest_checkpoint(tmp_path / "checkpoints"), "there is one to resume from"
    attempt()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss/train")] == list(range(1, steps + 1))


def test_the_loss_that_trainer_logs_during_training_is_that_of_separate_records(tmp_path: Path) -> None:
    """At learning rate about 0 each logged loss is the untrained model's on that pack, computed record by record."""
    import torch

    data = records(9)
    history = train.train(tiny("llama")[0], Splits(data, data, 0),
                          settings(epochs=1, learning_rate=1e-30, lora=Lora(r=4, dropout=0.0)), ["q_proj"],
                          folders(tmp_path), tmp_path / "out")
    fresh = tiny("llama")[0].eval()
    expected = []
    for batch in packing.Batches(data, settings(epochs=1)):
        pack, nats = [data[number] for number in batch], 0.0
        for record in pack:
            labels = record.labels()
            ids = torch.tensor([list(record.tokens)])
            nats += fresh(input_ids=ids, labels=torch.tensor([labels])).loss.item() * len(record.completion)
        expected.append(nats / sum(len(record.completion) for record in pack))
    assert sorted(e["loss"] for e in history if "loss" in e) == pytest.approx(sorted(expected), abs=1e-4)


def test_gradient_checkpointing_saves_memory_and_changes_nothing(tmp_path: Path) -> None:
    data = records(20)
    kept, recomputed = (train.train(
        tiny("llama")[0], Splits(data, data, 0), settings(gradient_checkpointing=chosen), ["q_proj", "v_proj"],
        folders(tmp_path / str(chosen)), tmp_path / str(chosen)) for chosen in (False, True))
    assert kept == recomputed

def test_a_max_length_beyond_the_models_positions_is_refused() -> None:
    with pytest.raises(UserError, match="max_length is 1024, but the base model knows only 512"):
        packing.check_length({"max_position_embeddings": 512}, Training())


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    build_models.tiny_tokenizer(tmp_path)
    with pytest.raises(UserError, match="they do not belong together"):
        models.check_vocabulary(tiny("llama")[0], models.load_tokenizer(tmp_path), "here")


def test_four_bits_without_their_package_are_refused_with_what_to_install(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_models.tiny_llama(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="quantization: 4bit needs the package bitsandbytes"):
        models.load_model(tmp_path, four_bits=True)


# --- the job as a process ----------------------------------------------------------------------------------------


def published_inputs(place: Path, **training: Any) -> tuple[Path, Path]:
    """A pipeline file whose inputs to training are published, and the volumes' root."""
    loaded, volumes = build_models.published_pipeline(place, without=["adapter", "reference_model"], **training)
    return loaded.path, volumes


def command(file: Path, volumes: Path) -> list[str]:
    return [sys.executable, "-m", "jobs", "--pipeline", str(file), "--volumes", str(volumes), "--wait-seconds", "1",
            "train"]


def start(file: Path, volumes: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(command(file, volumes), cwd=CHECKOUT, text=True, stderr=subprocess.PIPE,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def weights(file: Path, volumes: Path) -> dict[str, str]:
    """sha256 of every file of the adapter, verified."""
    artifact = artifacts.find(plan(pipeline.load(file).pipeline).adapter, volumes)
    assert artifact is not None
    return {f["path"]: f["sha256"] for f in artifact.manifest["files"]}


def wait_for_checkpoint(volumes: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not list(volumes.glob(f"fine-tuned-model/checkpoints/*/checkpoint-*/{callbacks.CHECKPOINT_MARKER}")):
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, str]]:
    """A pipeline with its inputs published, and the adapter that one quiet run gives. A step is several micro-batches,
    so that a kill may come between them."""
    place = tmp_path_factory.mktemp("uninterrupted")
    file, volumes = published_inputs(place, checkpoint_steps=3, epochs=60, learning_rate=1e-2,
                                     tokens_per_micro_batch=64)
    done = subprocess.run(command(file, volumes), cwd=CHECKOUT, capture_output=True, text=True, check=False,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return file, volumes, weights(file, volumes)


def fresh_volumes(place: Path, inputs: Path) -> Path:
    """Volumes with the same inputs and no adapter."""
    for volume in inputs.iterdir():
        if volume.name != "fine-tuned-model":
            (place / volume.name).symlink_to(volume)
    return place


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_a_stopped_run_resumes_and_ends_with_the_same_bytes(
        tmp_path: Path, uninterrupted: tuple[Path, Path, dict[str, str]], number: signal.Signals, code: int) -> None:
    file, inputs, expected = uninterrupted
    volumes = fresh_volumes(tmp_path, inputs)
    first = start(file, volumes)
    wait_for_checkpoint(volumes, first)
    first.send_signal(number)
    _, output = first.communicate(timeout=60)
    assert first.returncode == code, output
    assert artifacts.find(plan(pipeline.load(file).pipeline).adapter, volumes) is None
    if number == signal.SIGTERM:
        assert "a checkpoint is saved" in output
    second = start(file, volumes)
    _, output = second.communicate(timeout=120)
    assert second.returncode == 0, output
    assert "resuming from the checkpoint at step" in output
    assert weights(file, volumes) == expected
    assert not list(volumes.glob("fine-tuned-model/checkpoints/*")), "checkpoints are removed once the adapter is there"


def test_a_checkpoint_that_a_kill_left_half_is_not_resumed_from(tmp_path: Path) -> None:
    whole, half = tmp_path / "checkpoint-4", tmp_path / "checkpoint-8"
    for folder in (whole, half):
        folder.mkdir()
        (folder / "weights").write_text("w")
        listing = json.dumps(artifacts.listing(folder))
        (folder / callbacks.CHECKPOINT_MARKER).write_text(listing)
    (half / "weights").write_text("")
    assert callbacks.newest_checkpoint(tmp_path) == str(whole)
    (whole / callbacks.CHECKPOINT_MARKER).unlink()
    assert callbacks.newest_checkpoint(tmp_path) is None


def checkpoint(folder: Path, step: int, best: int | None = None) -> Path:
    """A checkpoint in `folder`, which is named by the adapter's digest, signed."""
    from transformers import TrainerState

    made = folder / f"checkpoint-{step}"
    made.mkdir(parents=True)
    (made / "weights").write_text(f"of step {step}")
    TrainerState(global_step=step, best_global_step=best).save_to_json(str(made / "trainer_state.json"))
    if best:
        (folder / f"best-{best}.safetensors").write_text(f"of step {best}")
    callbacks.mark_whole(made, build_signing.signer(pair()))
    return made


def forge(checkpoint: Path, name: str = "weights") -> None:
    """Change a file as one who can write to the volume would: so that the checkpoint looks whole."""
    (checkpoint / name).write_text("[]")
    signature = (checkpoint / callbacks.CHECKPOINT_SIGNATURE).read_bytes()
    callbacks.mark_whole(checkpoint)
    (checkpoint / callbacks.CHECKPOINT_SIGNATURE).write_bytes(signature)


FORGED: dict[str, Callable[[Path], object]] = {
    "changed": forge,
    "not signed": lambda made: (made / callbacks.CHECKPOINT_SIGNATURE).unlink(),
    "by another key": lambda made: callbacks.mark_whole(made, build_signing.signer(pair("two"))),
    "with other best weights": lambda made: (made.parent / "best-3.safetensors").write_text("others"),
    "without its best weights": lambda made: (made.parent / "best-3.safetensors").unlink(),
    "with no state": lambda made: forge(made, "trainer_state.json"),
}


@pytest.mark.parametrize("name", list(FORGED))
def test_where_artifacts_are_signed_no_forged_checkpoint_is_resumed_from(tmp_path: Path, name: str) -> None:
    """What a training resumes from becomes a part of what it signs."""
    folder, signer = tmp_path / "checkpoints" / "0123456789abcdef", build_signing.signer(pair())
    made = checkpoint(folder, 4, best=3)
    assert callbacks.newest_checkpoint(folder, signer) == str(made)
    FORGED[name](made)
    assert callbacks.newest_checkpoint(folder, signer) is None
    assert not made.exists()


def test_the_signed_checkpoint_of_another_adapter_or_step_is_not_resumed_from(tmp_path: Path) -> None:
    signer, checkpoints = build_signing.signer(pair()), tmp_path / "checkpoints"
    other = checkpoint(checkpoints / "0123456789abcdef", 8)
    for place in ("fedcba9876543210/checkpoint-8", "0123456789abcdef/checkpoint-9",
                  "0123456789abcdef/trial-1/checkpoint-8"):
        shutil.copytree(other, checkpoints / place)
        found = callbacks.newest_checkpoint((checkpoints / place).parent, signer)
        assert found == (str(other) if "abcdef/checkpoint" in place else None)


def test_a_training_that_signs_resumes_from_what_it_signed_and_from_nothing_else(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data, signer = records(20), build_signing.signer(pair())

    def attempt(until: int | None = None) -> None:
        train.train(tiny("llama")[0], Splits(data, data, 0), settings(), ["q_proj"], folders(tmp_path),
                    tmp_path / "out", until=until, signer=signer)

    with caplog.at_level("INFO", "jobs"):
        attempt(until=2)
        (made,) = (tmp_path / "checkpoints").glob("checkpoint-*")
        weights = made / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
        signature = (made / callbacks.CHECKPOINT_SIGNATURE).read_bytes()
        callbacks.mark_whole(made)
        (made / callbacks.CHECKPOINT_SIGNATURE).write_bytes(signature)
        attempt(until=2)
        assert "incomplete or not signed: removed" in caplog.text
        assert "resuming" not in caplog.text
        attempt()
        assert "resuming from the checkpoint at step 2" in caplog.text


def test_already_done_answers_without_loading_torch(uninterrupted: tuple[Path, Path, dict[str, str]]) -> None:
    file, volumes, _ = uninterrupted
    done = subprocess.run([sys.executable, "-X", "importtime", *command(file, volumes)[1:]], cwd=CHECKOUT,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "is already there and verified" in done.stderr
    assert not {"torch", "transformers", "peft"} & {line.rpartition("|")[2].strip()
                                                    for line in done.stderr.splitlines()}


@pytest.mark.parametrize(("changes", "message"), [
    ({"lora": {"target_modules": ["q_proj", "lm_head"]}}, "lm_head cannot be served on LlamaForCausalLM"),
    ({"max_length": 4096, "tokens_per_batch": 4096}, "max_length is 4096, but the base model knows only"),
])
def test_what_vllm_could_not_serve_is_refused_before_training(
        tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    file, volumes = published_inputs(tmp_path, **changes)
    done = subprocess.run(command(file, volumes), cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_input_is_named_and_worth_a_retry(tmp_path: Path) -> None:
    file, volumes = published_inputs(tmp_path)
    wanted = plan(pipeline.load(file).pipeline)
    wanted.encoded_dataset.path(volumes).rename(tmp_path / "elsewhere")
    done = subprocess.run(command(file, volumes), cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"error: waited 1 s for {wanted.encoded_dataset}" in done.stderr
