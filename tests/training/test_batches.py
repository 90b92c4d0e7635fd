"""Promises of a step: the same gradient however little is computed at once, whoever looks, and never a wrong number."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jobs.core.errors import UserError
from jobs.core.pipeline import Lora, Training
from jobs.data.encoded import Splits
from jobs.data.encoding import Encoded
from jobs.training import dropout, memory, packing, train, trainer
from tests.training.test_train import folders, records, settings, tiny

DATA, HELD_OUT = records(30), records(12, seed=2)


def trained(place: Path, *, kind: str = "llama", splits: Splits | None = None, until: int | None = None,
            **changes: Any) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Train, and return the adapter's weights and the history."""
    from safetensors.numpy import load_file

    layers = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}[kind]
    history = train.train(tiny(kind)[0], splits or Splits(DATA, HELD_OUT, 0), settings(**changes), layers,
                          folders(place), place / "out", until=until)
    file = place / "out" / "adapter_model.safetensors"
    return load_file(file) if file.exists() else {}, history


def assert_equal(found: dict[str, Any], expected: dict[str, Any], within: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    for name, weights in expected.items():
        assert np.abs(found[name] - weights).max() <= within, name


# --- micro-batches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_how_much_is_computed_at_once_does_not_change_what_is_learned(tmp_path: Path, kind: str) -> None:
    """With LoRA's dropout, and with GPT-2, whose own configuration has some."""
    whole, expected = trained(tmp_path / "whole", kind=kind, tokens_per_micro_batch=64)
    divided, history = trained(tmp_path / "divided", kind=kind, tokens_per_micro_batch=8)
    assert_equal(divided, whole, within=1e-5)
    for one, other in zip(history, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_the_gradient_of_a_step_is_that_of_its_learned_tokens(tmp_path: Path) -> None:
    """Not the mean of the micro-batches' means: a short answer would count more beside few others."""
    import torch

    data = [Encoded.of([5] * 20, [6]), Encoded.of([7], [8] * 20), Encoded.of([9] * 10, [10] * 5)]
    _, history = trained(tmp_path, splits=Splits(data, data, 0), epochs=1, tokens_per_micro_batch=8)
    model = tiny("llama")[0].eval()
    nats = sum(model(input_ids=torch.tensor([record.tokens]), labels=torch.tensor([record.labels()])).loss.item()
               * record.scored for record in data)
    assert history[0]["loss"] == pytest.approx(nats / 26, abs=1e-5)


def test_a_micro_batch_that_is_too_large_for_the_gpu_is_halved_and_the_step_repeated(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    import torch

    expected, _ = trained(tmp_path / "expected", tokens_per_micro_batch=20, max_length=20)
    flatten = packing.flatten
    sizes = []

    def limited(encoded: Any) -> Any:
        """As a GPU whose memory is full in the middle of a step."""
        sizes.append(sum(map(len, encoded)))
        if len(sizes) in (2, 4):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. More words")
        return flatten(encoded)

    monkeypatch.setattr(trainer, "flatten", limited)
    with caplog.at_level(logging.INFO):
        found, _ = trained(tmp_path / "found", tokens_per_micro_batch=40, max_length=20)
    assert "from here on, micro-batches have" in caplog.text
    assert_equal(found, expected, within=1e-5)


def test_where_one_record_is_too_large_for_the_gpu_the_error_says_what_to_set(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def full(_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. More words")

    monkeypatch.setattr(trainer, "flatten", full)
    with pytest.raises(UserError, match=r"too little memory for a micro-batch of \d+ tokens \(CUDA out of memory\), "
                                        r"which is one record. Lower training.max_length, or set gradient_check"):
        trained(tmp_path)


def test_with_several_processes_the_error_names_the_micro_batch_and_what_to_set() -> None:
    from tests.training.test_settings import team_of, team_trainer

    kind = team_trainer(team_of(2))
    with pytest.raises(UserError, match=r"of 60 tokens \(CUDA\)\. Set training.tokens_per_micro_batch: 30,"):
        kind._smaller(kind.__new__(kind), [30] * 4, RuntimeError("CUDA"))


def test_how_much_is_computed_at_once_is_set_or_follows_from_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    model = tiny("llama")[0]
    assert memory.tokens_at_once(model, Training(tokens_per_micro_batch=100), 1) == 100
    assert memory.tokens_at_once(model, Training(tokens_per_micro_batch=9999), 1) == 4096
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert memory.tokens_at_once(model, Training(), 1) == 512
    assert memory.tokens_at_once(model, Training(tokens_per_batch=300, max_length=300), 1) == 300
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    size = sum(weight.nbytes for weight in model.parameters())  # which is not on the GPU yet
    for free, expected in ((0, 8), (10**7 + size, 1327), (10**12, 4096)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, 10**12))
        assert memory.tokens_at_once(model, Training(), 1) == expected
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**7 + size // 2, 10**12))
    assert memory.tokens_at_once(model, Training(), 2) == 1327
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**7, 10**12))
    assert memory.tokens_at_once(model.to("meta"), Training(), 1) == 1327, "its weights are there already"
    assert memory.tokens_at_once(model, Training(gradient_checkpointing=True), 1) > 1327
    kept, recomputed = (memory.bytes_per_token(model.config, chosen) for chosen in (False, True))
    assert kept == 12 * 97 + 2 * 2 * (26 * 32 + 6 * 64)
    assert recomputed == 12 * 97 + 2 * 2 * 32 + 2 * (26 * 32 + 6 * 64)
    for inner, features in (({"intermediate_size": 64}, 64), ({"n_inner": 48}, 48), ({"n_inner": None}, 128), ({}, 128),
                            ({"intermediate_size": None, "n_inner": 48}, 48)):
        config = SimpleNamespace(hidden_size=32, num_hidden_layers=3, vocab_size=97, **inner)
        assert memory.bytes_per_token(config, False) == 12 * 97 + 3 * 2 * (26 * 32 + 6 * features)


# --- dropout ---------------------------------------------------------------------------------------------------------


def adapted(p: float, kind: str = "llama", seed: int = 0) -> tuple[Any, dropout.Masks]:
    """A model in training mode whose adapter's every weight counts."""
    import torch

    model, layers = tiny(kind)
    model = train.add_adapter(model, settings(lora=Lora(r=4, dropout=p)), layers)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    masks = dropout.replace(model, p, seed)
    model.config.use_cache = False
    return model.train(), masks


def loss_of(model: Any, masks: dropout.Masks, numbers: list[int], step: int = 3) -> float:
    encoded = [DATA[number] for number in numbers]
    masks.choose(step, np.array(numbers), packing.lengths_of(encoded))
    batch = packing.flatten(encoded)
    return float(model(**batch).loss.detach() * (batch["labels"] != -100).sum())


def test_the_masks_of_a_record_depend_on_no_other() -> None:
    model, masks = adapted(0.3)
    together = loss_of(model, masks, [4, 9, 2])
    assert together == pytest.approx(sum(loss_of(model, masks, [number]) for number in (2, 4, 9)), abs=1e-4)


def test_the_masks_differ_between_steps_seeds_records_and_from_none() -> None:
    model, masks = adapted(0.3)
    other_seed = loss_of(*adapted(0.3, seed=1), [4])
    losses = [loss_of(model, masks, [4]), loss_of(model, masks, [4], step=4), other_seed, loss_of(*adapted(0.0), [4])]
    assert len({round(loss, 6) for loss in losses}) == 4
    assert loss_of(model.eval(), masks, [4]) == pytest.approx(losses[-1], abs=1e-5)


def test_a_mask_drops_the_share_that_is_set_and_keeps_the_mean() -> None:
    import torch

    masks = dropout.Masks(0.3, 0, 500)
    masks.choose(1, np.array([7, 8]), np.array([200, 300]))
    values = torch.ones(1, 500, 400)
    found, other = masks.of(1, values), masks.of(2, values)
    assert found.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert found.mean().item() == pytest.approx(1, abs=0.02)
    assert not torch.equal(found, other)
    agreeing = ((found > 0) == (other > 0)).float().mean().item()
    assert agreeing == pytest.approx(0.7 * 0.7 + 0.3 * 0.3, abs=0.02), "independent"
    assert len({tuple(row) for row in found.tolist()}) == 500


def splitmix64(state: int) -> int:
    """As its authors have it (Steele et al. 2014)."""
    state = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) % 2**64
    state = ((state ^ state >> 27) * 0x94D049BB133111EB) % 2**64
    return state ^ state >> 31


def test_the_mask_of_a_token_follows_from_its_numbers_on_every_machine() -> None:
    import torch

    golden, seed, step, layer = 0x9E3779B97F4A7C15, 11, 5, -77
    assert splitmix64(golden) == 0xE220A8397B1DCDAF, "the first output of the reference implementation for 0"
    masks = dropout.Masks(0.25, seed, 6)
    tape = (torch.rand(2**20 + 6, generator=torch.Generator().manual_seed(seed)) >= 0.25).float() / 0.75
    masks.choose(step, np.array([7, -1, 9]), np.array([2, 1, 3]))  # -1: a canary
    expected = []
    for record, position in ((7, 0), (7, 1), (-1, 0), (9, 0), (9, 1), (9, 2)):
        key = seed
        for part in (step, record, position):
            key = splitmix64((key + (part + 1) * golden) % 2**64)
        expected.append(((key ^ layer % 2**64) * golden % 2**64 >> 40) % 2**20)
    for features, kind in ((6, torch.float32), (4, torch.float32), (6, torch.bfloat16)):
        found = masks.of(layer, torch.ones(1, 6, features, dtype=kind))
        assert found.dtype == kind and found.shape == (6, features)
        assert all(torch.equal(row, tape[place:place + features].to(kind))
                   for row, place in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_each_layer_has_masks_of_its_own_as_wide_as_its_input(kind: str) -> None:
    """And without dropout LoRA's layers stay as they are."""
    import torch
    from torch import nn

    model, masks = adapted(0.3, kind)
    found = [layer for module in model.modules() if hasattr(module, "lora_dropout")
             for layer in module.lora_dropout.values()]
    widest = max(module.in_features for module in model.modules() if hasattr(module, "lora_dropout"))
    masks.choose(1, np.array([3]), np.array([2]))
    rows = [layer(torch.ones(1, 2, 32)) for layer in found]
    assert len({tuple(each.flatten().tolist()) for each in rows}) == len(found) > 1
    assert masks.of(1, torch.ones(1, 2, widest)).shape == (2, widest)
    plain, _ = adapted(0.0, kind)
    assert all(isinstance(layer, nn.Identity) for module in plain.modules() if hasattr(module, "lora_dropout")
               for layer in module.lora_dropout.values())
    for module in plain.modules():
        assert not isinstance(module, nn.Dropout) or module.p == 0
        assert all(value == 0 for name, value in vars(module).items()
                   if ("dropout" in name or "pdrop" in name) and isinstance(value, float))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_nothing_but_the_adapter_drops_anything(kind: str) -> None:
    """GPT-2's configuration drops a tenth of its activations, which would depend on the machine's random numbers."""
    model, masks = adapted(0.0, kind)
    assert loss_of(model, masks, [1, 2]) == loss_of(model, masks, [1, 2])


# --- evaluating ------------------------------------------------------------------------------------------------------


def test_the_adapter_does_not_depend_on_when_anybody_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {}
    for evaluations in (1, 3, 10, 100):
        monkeypatch.setattr(trainer, "EVALUATIONS", evaluations)
        weights[evaluations], history = trained(tmp_path / str(evaluations))
        steps = int(history[-1]["step"])
        assert sum("holdout_loss" in entry for entry in history) == min(evaluations, steps)
    monkeypatch.setattr(train, "held_out", lambda *_: trainer.HeldOut("holdout_loss", HELD_OUT, np.arange(3),
                                                                      frozenset()))
    never, history = trained(tmp_path / "never")
    assert sum("holdout_loss" in entry for entry in history) == 1, "at the end, where training stops"
    for found in weights.values():
        assert_equal(found, never)


def test_the_measured_loss_is_that_of_all_learned_tokens(tmp_path: Path) -> None:
    import torch

    _, history = trained(tmp_path, epochs=1, learning_rate=1e-30, tokens_per_micro_batch=16)
    model = tiny("llama")[0].eval()
    nats = sum(model(input_ids=torch.tensor([record.tokens]), labels=torch.tensor([record.labels()])).loss.item()
               * record.scored for record in HELD_OUT)
    expected = nats / sum(record.scored for record in HELD_OUT)
    assert history[-1]["holdout_loss"] == pytest.approx(expected, abs=1e-5)


def test_measuring_takes_a_tenth_of_the_time_at_most_but_reads_a_few_records() -> None:
    """A tenth of the time is a fifth of the tokens: one that is only read costs half."""
    many, few = [Encoded.of([1] * 5, [2] * 5)] * 10_000, [Encoded.of([1] * 5, [2] * 5)] * 50
    batches = packing.Batches(many, settings(epochs=1))
    large = trainer.held_out(Splits(many, many, 0), batches)
    assert len(large.steps) == 10
    assert len(large.steps) * 10 * len(large.records) == pytest.approx(0.2 * batches.tokens)
    assert len(set(large.records.tolist())) == len(large.records)
    assert 4000 < large.records.mean() < 6000, "from everywhere in the split"
    small = packing.Batches(few, settings(epochs=1))
    assert len(trainer.held_out(Splits(few, few, 0), small).records) == 16
    validation = trainer.held_out(Splits(few, few, 0, many), small)
    assert (validation.name, len(validation.records)) == ("validation_loss", 256)


# --- until, and the best weights -------------------------------------------------------------------------------------


def test_a_training_in_pieces_gives_the_same_bytes(tmp_path: Path) -> None:
    expected, whole = trained(tmp_path / "whole")
    pieces = tmp_path / "pieces"
    weights, first = trained(pieces, until=5)
    assert weights == {}, "no adapter yet"
    assert [entry["step"] for entry in first if "loss" in entry] == [1, 2, 3, 4, 5]
    assert first[-1].keys() == {"step", "epoch", "holdout_loss"}
    _, again = trained(pieces, until=5)
    assert again == first, "what is done is not done again"
    trained(pieces, until=9)
    _, again = trained(pieces, until=5)
    assert again == first, "also when it went on in the meantime"
    found, history = trained(pieces)
    assert_equal(found, expected)
    assert [entry for entry in history if "loss" in entry] == [entry for entry in whole if "loss" in entry]


# What is learned here is wrong for the validation split: its loss falls, and then rises.
OVERFITTED = Splits([Encoded.of(record.prompt, [5, 6, 7, 8]) for record in DATA[:8]], HELD_OUT, 0,
                    [Encoded.of(record.prompt, [9, 5, 6, 10]) for record in HELD_OUT])
BEST: dict[str, Any] = {"splits": OVERFITTED, "epochs": 40, "learning_rate": 1e-2, "keep": "best"}


def losses(history: list[dict[str, float]]) -> dict[int, float]:
    return {int(entry["step"]): entry["validation_loss"] for entry in history if "validation_loss" in entry}


def test_the_best_weights_are_kept_and_not_the_last(tmp_path: Path) -> None:
    weights, history = trained(tmp_path / "best", **BEST)
    measured = losses(history)
    best = min(measured, key=measured.__getitem__)
    assert best < max(measured), "it overfits, or nothing is shown here"
    pieces = tmp_path / "pieces"
    _, until_best = trained(pieces, **BEST, until=best)
    from safetensors.numpy import load_file

    assert_equal(weights, load_file(pieces / "checkpoints" / f"checkpoint-{best}" / "adapter_model.safetensors"))
    assert until_best[-1]["validation_loss"] == measured[best]
    assert len(list((tmp_path / "best" / "checkpoints").glob("best-*"))) == 1, "the others are removed"


def test_a_look_at_another_step_chooses_nothing(tmp_path: Path) -> None:
    """A search stops its trials at steps of its own."""
    expected, history = trained(tmp_path / "whole", **BEST, patience=1)
    best = min(losses(history), key=losses(history).__getitem__)
    for step in (best + 1, best + 2, best + 3):
        assert trained(tmp_path / "pieces", **BEST, patience=1, until=step)[1][-1]["step"] == step
    found, looked = trained(tmp_path / "pieces", **BEST, patience=1)
    assert_equal(found, expected)
    assert looked[-1]["step"] == history[-1]["step"]


def test_with_patience_it_ends_early_and_a_resume_ends_at_the_same_step(tmp_path: Path) -> None:
    full = losses(trained(tmp_path / "full", **BEST)[1])
    best = min(full, key=full.__getitem__)
    expected, history = trained(tmp_path / "patient", **BEST, patience=2)
    measured = list(losses(history))
    assert measured == list(full)[: list(full).index(best) + 3], "two evaluations after the best one"
    assert history[-1]["step"] == measured[-1]

    pieces = tmp_path / "pieces"
    trained(pieces, **BEST, patience=2, until=measured[-2])
    found, again = trained(pieces, **BEST, patience=2)
    assert again == history
    assert_equal(found, expected)
    after_a_kill, again = trained(pieces, **BEST, patience=2)
    assert again == history, "before the adapter was published"
    assert_equal(after_a_kill, expected)


# --- numbers that are not finite -------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_ends_the_training_and_names_its_records(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    wrong = packing.Batches(DATA, settings())[5]
    forward = torch.nn.functional.cross_entropy
    calls = 0

    def broken(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        return forward(*arguments, **named) * (float("nan") if calls == 6 else 1)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", broken)
    monkeypatch.setattr(train, "held_out", lambda *_: trainer.HeldOut("holdout_loss", [], np.array([]), frozenset()))
    with pytest.raises(UserError) as error:
        trained(tmp_path, checkpoint_steps=1)
    lines = ", ".join(str(number + 1) for number in sorted(wrong.tolist()))
    assert str(error.value) == (
        f"step 6 of {len(packing.Batches(DATA, settings()))}: the loss is not finite. Nothing was published; lower "
        f"training.learning_rate (0.01), or look at the step's records: lines {lines} of train.jsonl in the dataset's "
        "artifact")
    assert not (tmp_path / "out").exists()
    saved = sorted(folder.name for folder in (tmp_path / "checkpoints").glob("checkpoint-*"))
    assert saved == ["checkpoint-4", "checkpoint-5"], "none that a retry would go on from with wrong weights"


def test_a_gradient_that_is_not_finite_ends_the_training_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_, **__: torch.tensor(float("inf")))
    with pytest.raises(UserError, match=r"step 1 of \d+: the gradient is not finite"):
        trained(tmp_path)


def test_a_learning_rate_that_is_far_too_high_is_named_and_not_published(tmp_path: Path) -> None:
    """Trainer's own filter would log 0.0 and go on."""
    import torch

    splits = Splits(DATA, HELD_OUT, 0)
    model, layers = tiny("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(3e38)
    with pytest.raises(UserError, match=r"is not finite.*lower training.learning_rate \(0.5\)"):
        train.train(model, splits, settings(learning_rate=0.5), layers, folders(tmp_path), tmp_path / "out")


def test_an_error_names_twenty_records_and_counts_the_others(tmp_path: Path) -> None:
    from jobs.training import callbacks

    many = [Encoded.of([1], [2])] * 30
    message = callbacks._not_finite("loss", 1, packing.Batches(many, settings()), trainer.HeldOut(
        "holdout_loss", [], np.array([]), frozenset()), settings())
    assert "lines 1, 2, 3" in message and "20 and 10 more of train.jsonl" in message
