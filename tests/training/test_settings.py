"""Every setting of `training` reaches what it is for: the packs, LoRA, Trainer, the record of what was done."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.core.errors import UserError
from jobs.core.pipeline import Lora, Training
from jobs.data.encoded import Splits
from jobs.data.encoding import Encoded, Pair
from jobs.training import callbacks, card, packing, train, trainer
from jobs.training.distributed import Team
from jobs.training.dropout import Masks
from tests import build_models

TRAINING: dict[str, Any] = {"epochs": 7, "learning_rate": 3e-4, "max_length": 40, "tokens_per_batch": 50, "seed": 11,
                            "checkpoint_steps": 13, "gradient_checkpointing": True,
                            "lora": Lora(r=4, alpha=10, dropout=0.25)}


def arguments(steps: int = 350, **changes: Any) -> Any:
    return trainer.training_arguments(Training(**(TRAINING | changes)), Path("/checkpoints"), steps, Team())


def team_of(size: int) -> Team:
    team = Team()
    team.size = size
    return team


def of_lengths(lengths: Any) -> Any:
    """A split of which only the lengths are read."""
    return SimpleNamespace(lengths=np.array(lengths))


def team_trainer(team: Team) -> Any:
    """Trainer's class for processes that have nothing to train on."""
    measured = trainer.HeldOut("holdout_loss", [], np.array([]), frozenset())
    batches = packing.Batches(of_lengths([8]), Training())
    return trainer.team_trainer(team, Training(), batches, measured, Masks(0.0, 0, 1), 64)


# --- Trainer's arguments ---------------------------------------------------------------------------------------------


def test_trainer_gets_the_settings_of_the_pipeline_file() -> None:
    found = arguments()
    assert (found.output_dir, found.learning_rate, found.seed) == ("/checkpoints", 3e-4, 11)
    assert found.data_seed in (None, 11)
    assert (found.save_strategy, found.save_steps, found.gradient_checkpointing) == ("steps", 13, True)
    assert not arguments(gradient_checkpointing=False).gradient_checkpointing


def test_trainer_takes_each_batch_in_its_order() -> None:
    found = arguments()
    assert (found.per_device_train_batch_size, found.train_sampling_strategy) == (1, "sequential")
    assert (found.gradient_accumulation_steps, found.num_train_epochs) == (1, 1)


@pytest.mark.parametrize(("steps", "warmup"), [(9, 0), (10, 1), (355, 35), (5000, 100)])
def test_a_tenth_of_the_steps_warms_up_a_hundred_at_most(steps: int, warmup: int) -> None:
    assert arguments(steps).warmup_steps == warmup


def test_the_learning_rate_rises_to_its_height_and_falls_to_zero_as_a_cosine() -> None:
    from torch import nn, optim
    from transformers import get_scheduler

    found = arguments(100)
    schedule = get_scheduler(found.lr_scheduler_type, optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0),
                             num_warmup_steps=found.warmup_steps, num_training_steps=100)
    rates = []
    for _ in range(100):
        rates.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    assert rates[0] == 0.0
    assert rates[5] == pytest.approx(0.5)
    assert rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.5)
    assert rates[-1] < 0.001


def test_every_step_is_logged_and_nothing_is_sent_anywhere() -> None:
    found = arguments()
    assert (found.logging_steps, found.report_to, found.use_cache) == (1, [], False)


def test_what_the_packs_and_the_machine_ask_of_trainer() -> None:
    import torch

    found = arguments()
    assert (found.remove_unused_columns, found.label_names) == (False, ["labels"]), "or Trainer drops the positions"
    assert found.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert (found.bf16, found.use_cpu) == (torch.cuda.is_available(), not torch.cuda.is_available())
    assert (found.save_total_limit, found.disable_tqdm, found.dataloader_pin_memory) == (2, True, False)


def test_on_a_gpu_it_computes_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    import transformers.training_args

    monkeypatch.setattr(transformers, "TrainingArguments", dict)  # the real ones look for the GPU
    for gpu in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        found = arguments()
        assert (found["bf16"], found["use_cpu"]) == (gpu, not gpu)


@pytest.mark.parametrize("rank", [0, 1])
def test_every_process_takes_every_batch_in_the_same_order(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """Each of them computes its share of each batch: see `distributed.share`."""
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler, DataLoader
    from transformers import Trainer

    def divided(_: Any, numbers: list[int], *, batch_size: int) -> Any:
        """As accelerate does: each process gets other batches."""
        sampler = BatchSamplerShard(BatchSampler(numbers, batch_size, False), 2, rank)
        return DataLoader(numbers, batch_sampler=sampler)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "_get_dataloader", divided)
    one_of = team_trainer(team_of(2))
    loader = one_of._get_dataloader(one_of.__new__(one_of), list(range(8)), batch_size=2)
    assert list(loader.batch_sampler) == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_a_checkpoint_of_a_divided_model_holds_the_adapter_and_is_written_once(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not the base model, which Trainer would gather from all processes."""
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    def weights(folder: Path) -> list[str]:
        assert sorted(path.suffix for path in folder.iterdir() if path.suffix != ".md") == [
            ".bin", ".json", ".safetensors"]
        with safe_open(folder / "adapter_model.safetensors", "pt") as opened:
            return sorted(opened.keys())

    build_models.tiny_llama(tmp_path / "base")
    model = train.add_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), Training(**TRAINING), ["q_proj"])
    for rank in (0, 1):
        team = team_of(2)
        team.rank = rank
        settings = trainer.training_arguments(Training(**TRAINING), tmp_path / "checkpoints", 350, Team())
        one_of = team_trainer(team)(model=model, args=settings)
        one_of.save_model(str(tmp_path / f"whole-{rank}"))
        one_of.is_fsdp_enabled = True
        monkeypatch.setattr(model, "state_dict", None)  # it would gather everything
        one_of.save_model(str(tmp_path / f"divided-{rank}"))
        monkeypatch.undo()
    assert weights(tmp_path / "divided-0") == weights(tmp_path / "whole-0")
    assert len(weights(tmp_path / "divided-0")) == 4
    assert not (tmp_path / "divided-1").exists()


def test_of_a_divided_model_the_adapter_is_gathered_and_nothing_else() -> None:
    import torch

    class Divided:
        requires_grad = True

        def detach(self) -> Divided:
            return self

        def full_tensor(self) -> Any:
            return torch.ones(3)

    class Model:
        def named_parameters(self) -> list[tuple[str, Any]]:
            return [("lora_A", Divided()), ("lora_B", torch.nn.Parameter(torch.zeros(2))),
                    ("base", torch.nn.Parameter(torch.zeros(2), requires_grad=False))]

    found = trainer.whole_adapter(Model())
    assert {name: values.tolist() for name, values in found.items()} == {"lora_A": [1, 1, 1], "lora_B": [0, 0]}
    assert not any(values.requires_grad for values in found.values())


def test_several_processes_divide_the_model_only_where_that_is_asked_for() -> None:
    one = trainer._sharding(Training(**(TRAINING | {"sharding": "fsdp"})), team_of(1))
    whole = trainer._sharding(Training(**TRAINING), team_of(2))
    divided = trainer._sharding(Training(**(TRAINING | {"sharding": "fsdp"})), team_of(2))
    assert one == {}
    assert whole == {"ddp_find_unused_parameters": False}
    assert divided == {"fsdp": True, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}
    found = trainer.training_arguments(Training(**TRAINING), Path("/checkpoints"), 350, team_of(2))
    assert found.ddp_find_unused_parameters is False


# --- LoRA ------------------------------------------------------------------------------------------------------------


def test_lora_has_the_shape_of_the_pipeline_file() -> None:
    found = trainer.lora_config(Lora(r=4, alpha=10, dropout=0.25), ["q_proj", "v_proj"], transposed=False)
    assert (found.r, found.lora_alpha, found.lora_dropout) == (4, 10, 0.25)
    assert found.target_modules == {"q_proj", "v_proj"}
    assert (found.task_type, found.bias, found.use_rslora, found.use_dora) == ("CAUSAL_LM", "none", False, False)
    assert (found.modules_to_save, found.fan_in_fan_out) == (None, False)
    assert trainer.lora_config(Lora(), ["c_attn"], transposed=True).fan_in_fan_out is True


def test_the_seed_decides_the_first_values_of_the_adapter(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    build_models.tiny_llama(tmp_path)

    def values(seed: int) -> Any:
        torch.manual_seed(99)  # what was drawn before does not count
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        adapted = train.add_adapter(model, Training(**(TRAINING | {"seed": seed})), ["q_proj"])
        return torch.cat([weight.flatten() for name, weight in adapted.named_parameters() if "lora_A" in name])

    assert torch.equal(values(11), values(11))
    assert not torch.equal(values(11), values(12))


# --- packs -----------------------------------------------------------------------------------------------------------


def batches(lengths: list[int], **changes: Any) -> list[list[int]]:
    return [batch.tolist() for batch in packing.Batches(of_lengths(lengths), Training(**(TRAINING | changes)))]


def test_batches_are_filled_to_the_last_token() -> None:
    assert [len(batch) for batch in batches([25] * 6, epochs=1)] == [2, 2, 2]
    assert [len(batch) for batch in batches([25] * 6, epochs=1, tokens_per_batch=49)] == [1] * 6
    assert [len(batch) for batch in batches([1], epochs=1)] == [1]


def test_a_record_goes_where_it_leaves_the_least_room() -> None:
    lengths = np.array([30, 25, 20, 25, 10])
    assert [batch.tolist() for batch in packing.pack(lengths, np.arange(5), 50)] == [[0, 2], [1, 3], [4]]


def test_the_records_of_a_batch_stay_in_the_given_order() -> None:
    random = np.random.default_rng(0)
    order, place = random.permutation(2000), np.empty(2000, dtype=np.int64)
    place[order] = np.arange(2000)
    packed = packing.pack(random.integers(1, 40, 2000), order, 1000)
    assert all((np.diff(place[batch]) > 0).all() for batch in packed) and len(packed) > 30


def test_the_seed_decides_which_records_come_together_and_each_epoch_mixes_them_again() -> None:
    def order(**changes: Any) -> list[list[int]]:
        return batches([2] * 40, epochs=2, tokens_per_batch=40, **changes)

    assert order(seed=1) == order(seed=1)
    assert order(seed=1) != order(seed=2)
    first, second = order()[:2], order()[2:]
    assert sorted(first[0] + first[1]) == sorted(second[0] + second[1]) == list(range(40))
    assert {frozenset(batch) for batch in first} != {frozenset(batch) for batch in second}
    assert first[0] != sorted(first[0]), "shuffled"


def test_best_fit_wastes_little_and_epochs_are_of_about_as_many_steps() -> None:
    lengths = np.random.default_rng(0).lognormal(5, 1, 20_000).clip(8, 1024).astype(np.int64)
    counts = [len(packing.Batches(of_lengths(lengths), Training(epochs=1, seed=seed))) for seed in range(3)]
    assert max(counts) <= 1.01 * lengths.sum() / 4096
    assert max(counts) - min(counts) <= 2


def test_a_million_records_are_packed() -> None:
    """Work that grows with the square of their number would not end within the tests' time limit."""
    lengths = np.random.default_rng(0).lognormal(5, 1, 1_000_000).clip(8, 1024).astype(np.int64)
    batches = packing.Batches(of_lengths(lengths), Training(epochs=1))
    assert sum(map(len, batches)) == 1_000_000
    assert all(lengths[batch].sum() <= 4096 for batch in batches)


def test_a_pack_is_one_row_in_which_positions_restart_and_only_completions_are_learned() -> None:
    batch = packing.flatten([Encoded.of([5, 6], [7, 8]), Encoded.of([], [9, 10])])
    assert {name: values.tolist() for name, values in batch.items() if name in ("input_ids", "labels", "position_ids")
            } == {"input_ids": [[5, 6, 7, 8, 9, 10]], "labels": [[-100, -100, 7, 8, -100, 10]],
                  "position_ids": [[0, 1, 2, 3, 0, 1]]}


def test_a_pack_has_what_attention_and_losses_need_of_it() -> None:
    pairs = [Pair(Encoded.of([5, 6], [7, 8]), Encoded.of([5, 6], [9])),
             Pair(Encoded.of([1], [2]), Encoded.of([1], [3]))]
    batch = packing.flatten(pairs)
    expected = {"cu_seq_lens_q": [0, 4, 7, 9, 11], "logits_to_keep": [1, 2, 5, 7, 9], "shift_labels": [[7, 8, 9, 2, 3]],
                "answer_of": [0, 0, 1, 2, 3]}
    assert {name: batch[name].tolist() for name in expected} == expected
    assert "answer_of" not in packing.flatten([pairs[0].chosen])


def test_a_step_has_one_batch_of_one_epoch_and_knows_its_lines() -> None:
    split = of_lengths([25] * 6)
    three = packing.Batches(split, Training(**(TRAINING | {"epochs": 3})))
    assert (len(three), three.tokens) == (9, 450)
    assert [batch.tolist() for batch in three] == [batch.tolist() for epoch in range(3) for batch in three._pack(epoch)]
    assert [three.lines(step) for step in range(1, 10)] == [sorted((batch + 1).tolist()) for batch in three]
    assert three._of_epoch.cache_info().currsize == 1, "of a large split, only one epoch's batches fit into memory"
    for step in (-1, 9):
        with pytest.raises(IndexError, match=str(step)):
            three[step]
    split.records = np.array([9, 9, 4, 4, 4, 7])  # of conversations that became several sequences
    whole = packing.Batches(split, Training(**(TRAINING | {"epochs": 1, "tokens_per_batch": 150})))
    assert whole.lines(1) == [4, 7, 9]


def test_lengths_are_known_or_counted() -> None:
    known = of_lengths([7, 8])
    assert packing.lengths_of(known) is known.lengths
    counted = packing.lengths_of([Encoded.of([1], [2]), Encoded.of([1], [2, 3])])
    assert counted.tolist() == [2, 3] and counted.dtype == np.int64


@pytest.mark.parametrize(("tokens", "least", "count"), [(20, 1, 4), (19.9, 1, 3), (0, 3, 3), (0, 99, 10), (50, 1, 10)])
def test_a_sample_has_so_many_tokens_or_sequences_from_everywhere(tokens: float, least: int, count: int) -> None:
    found = packing.sample(np.full(10, 5), tokens, least).tolist()
    assert len(found) == count and found == sorted(set(found)) and found == packing.sample(
        np.full(10, 5), tokens, least).tolist()
    large = packing.sample(np.full(10_000, 5), 5000, 1)
    assert large.mean() == pytest.approx(5000, abs=500)


def test_max_length_may_be_all_the_positions_that_the_model_has() -> None:
    packing.check_length({"max_position_embeddings": 40}, Training(**TRAINING))
    packing.check_length({}, Training(**TRAINING))
    for key in ("max_position_embeddings", "n_positions"):
        with pytest.raises(UserError, match="max_length is 40, but the base model knows only 39"):
            packing.check_length({key: 39}, Training(**TRAINING))


# --- the shares -----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(2, 60), min_size=1, max_size=30), st.integers(1, 9), st.integers(2, 100))
def test_the_micro_batches_of_all_processes_are_the_batch(lengths: list[int], size: int, tokens: int) -> None:
    """Each record is computed once, in the batch's order, and no more at once than may be; and all processes compute
    equally often, as they must where each holds a part of the model."""
    of_each = [packing.Share(rank, size, tokens).micro_batches(lengths) for rank in range(size)]
    assert sorted(n for micro_batches in of_each for one in micro_batches for n in one) == list(range(len(lengths)))
    assert all(one == sorted(one) for micro_batches in of_each for one in micro_batches)
    assert all(sum(lengths[n] for n in one) <= max(tokens, *lengths) for each in of_each for one in each)
    assert len({len(micro_batches) for micro_batches in of_each}) == 1
    for fewer in range(1, len(of_each[0])):
        shares = packing.divide(lengths, fewer * size)
        assert any(sum(lengths[n] for n in one) > max(tokens, *lengths) for one in shares), "as few as will do"
    if size == 1:
        assert all(of_each[0]), "one process computes nothing in vain"


@given(st.lists(st.integers(2, 60), min_size=1, max_size=30), st.integers(2, 9))
def test_no_process_waits_long_for_another(lengths: list[int], size: int) -> None:
    """The fullest share has at most one record more than a fair part (Graham 1969: longest first)."""
    tokens = [sum(lengths[position] for position in share) for share in packing.divide(lengths, size)]
    assert max(tokens) <= sum(lengths) / size + max(lengths)


@pytest.mark.parametrize(("lengths", "shares", "divided"), [
    ([5, 4, 3, 2], 2, [[0, 3], [1, 2]]), ([2, 3, 4, 5], 2, [[0, 3], [1, 2]]), ([3, 3, 3], 3, [[0], [1], [2]]),
    ([1], 2, [[0], []]), ([9, 1, 1, 1], 2, [[0], [1, 2, 3]])])
def test_the_longest_record_goes_first_to_the_share_with_the_fewest_tokens(
        lengths: list[int], shares: int, divided: list[list[int]]) -> None:
    assert packing.divide(lengths, shares) == divided


# --- the whole stage -------------------------------------------------------------------------------------------------


def test_the_stage_trains_with_the_settings_of_the_pipeline_file(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From pipeline.yaml to what the training is called with and what stands in the artifact, but for the steps."""
    from jobs.core import artifacts, models
    from jobs.core.plan import plan

    loads: list[dict[str, Any]] = []
    load_model = models.load_model
    calls: list[tuple[Any, ...]] = []

    def watch(path: Path, **options: Any) -> Any:
        loads.append(options)
        return load_model(path)

    def steps(model: Any, splits: Any, training: Any, target_modules: Any, folders: Any, output: Path,
              team: Any, signer: Any) -> Any:
        calls.append((splits, training, target_modules, folders))
        train.add_adapter(model, training, target_modules).save_pretrained(str(output))
        return build_models.HISTORY

    monkeypatch.setattr(models, "load_model", watch)
    monkeypatch.setattr(train, "train", steps)
    lora = {"r": 4, "alpha": 10, "dropout": 0.25, "target_modules": ["v_proj", "q_proj"]}
    loaded, volumes = build_models.published_pipeline(
        tmp_path, without=["adapter", "reference_model"], seed=11, max_length=60, epochs=7, lora=lora,
        quantization="4bit")
    train.run(loaded, volumes, 0)
    ((splits, training, target_modules, folders),) = calls
    adapter = plan(loaded.pipeline).adapter
    assert training == loaded.pipeline.training
    assert target_modules == ["q_proj", "v_proj"]
    assert all(len(record) <= 60 for record in splits.train)
    assert splits.too_long > 0
    assert loads == [{"four_bits": True, "stay_on_cpu": False}]
    assert folders.checkpoints == volumes / "fine-tuned-model" / "checkpoints" / adapter.digest
    artifact = artifacts.find(adapter, volumes)
    assert artifact is not None
    config = json.loads((artifact.path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 10, 0.25)
    assert (config["base_model_name_or_path"], config["target_modules"]) == ("file:base", ["q_proj", "v_proj"])
    recorded = json.loads((artifact.path / "training.json").read_text())
    assert recorded["records"] == {"train": len(splits.train), "holdout": len(splits.holdout),
                                   "too_long": splits.too_long}
    assert (recorded["steps"], recorded["history"]) == (2, build_models.HISTORY)


def test_the_model_card_says_what_the_adapter_was_made_from(tmp_path: Path) -> None:
    loaded = build_models.write_pipeline(tmp_path, seed=11, epochs=7, learning_rate=3e-4,
                                         lora={"r": 4, "alpha": 10, "dropout": 0.25})
    splits = Splits([Encoded.of([1], [2])] * 5, [Encoded.of([1], [2])] * 3, 2)
    text = card.model_card(loaded.pipeline, splits, build_models.HISTORY, ["q_proj", "v_proj"], "d1d2")
    for line in ("| records | 5 train, 3 held out, 2 too long |", "| LoRA | r 4, alpha 10, dropout 0.25 |",
                 "| target modules | q_proj, v_proj |", "7 epochs, learning rate 0.0003 (cosine)", "seed 11",
                 "at most 256 tokens a batch and 128 a record", "| loss on the train split, last step | 5.0000 |",
                 "| loss on the holdout split | 5.2000 |", "| dataset | d1d2 ("):
        assert line in text


def test_the_loss_history_has_no_timings() -> None:
    """They differ from run to run, and the adapter's files must not."""
    def entry(**raw: float) -> dict[str, float] | None:
        return callbacks.history_entry({"step": 2, "epoch": 0.5} | raw, "holdout_loss", 3)

    assert entry(epoch=0.123456, loss=2.5, learning_rate=1e-3, grad_norm=0.5) == {
        "step": 2, "epoch": 0.3704, "loss": 2.5, "learning_rate": 1e-3}
    assert entry(eval_loss=3.5, eval_runtime=0.7) == {"step": 2, "epoch": 1.5, "holdout_loss": 3.5}
    assert entry(train_runtime=9.0, train_loss=2.0) is None
