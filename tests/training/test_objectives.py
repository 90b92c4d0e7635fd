"""Promises of DPO and ORPO: the losses of TRL, learned as everything else is, and data of the other kind refused."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.core.errors import UserError
from jobs.core.pipeline import Training
from jobs.data.encoded import Splits
from jobs.data.encoding import Encoded, Pair
from jobs.training import objectives
from jobs.training.objectives import Pairs, for_objective
from jobs.training.packing import flatten
from tests.training.test_batches import assert_equal, trained
from tests.training.test_train import tiny


def pairs(count: int, seed: int = 0) -> list[Pair]:
    """Preferences for answers that begin with the token 7, over answers that begin with the token 9."""
    chance = random.Random(seed)

    def some(least: int, most: int) -> list[int]:
        return [chance.randrange(10, 60) for _ in range(chance.randint(least, most))]

    made = []
    for _ in range(count):
        prompt = some(2, 6)
        made.append(Pair(Encoded.of(prompt, [7, *some(1, 6)]), Encoded.of(prompt, [9, *some(1, 6)])))
    return made


DATA = Splits(pairs(24), pairs(8, seed=1), 0, preferences=True)


def adapted(seed: int = 0) -> Any:
    """A model with an adapter that changes what it says."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    base = tiny("llama")[0]
    base.config.use_cache = False  # as Trainer has it: with a cache the records of a pack see each other
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"],
                                                       init_lora_weights=False)).eval()


def padded(some: list[Pair]) -> dict[str, Any]:
    """A batch as TRL has it: all chosen sequences, then all rejected ones, padded on the right."""
    import torch

    sequences = [pair.chosen for pair in some] + [pair.rejected for pair in some]
    width = max(map(len, sequences))
    batch = {key: torch.zeros(len(sequences), width, dtype=torch.long)
             for key in ("input_ids", "attention_mask", "completion_mask")}
    for row, sequence in enumerate(sequences):
        batch["input_ids"][row, :len(sequence)] = torch.tensor(sequence.tokens)
        batch["attention_mask"][row, :len(sequence)] = 1
        first, last = sequence.learned[0]
        batch["completion_mask"][row, first:last] = 1
    return batch


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_the_loss_of_dpo_is_that_of_trl(tmp_path: Path, beta: float) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer  # type: ignore[attr-defined]

    from tests.build_models import tiny_tokenizer

    model, some = adapted(), pairs(5)
    theirs = DPOTrainer(model, args=DPOConfig(str(tmp_path), beta=beta, report_to="none", use_cpu=True, bf16=False),
                        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
                        processing_class=tiny_tokenizer(tmp_path))
    theirs.model.delete_adapter("ref")  # a copy of the adapter; without it the base model is the reference
    theirs.model.eval()
    expected = float(theirs._compute_loss(theirs.model, padded(some), return_outputs=False).detach())
    training = Training(objective="dpo", beta=beta, max_length=64, tokens_per_batch=128)
    batch = flatten(some)
    tokens, preferred = objectives.losses(model, model, batch, training)
    assert objectives.counts(batch)[1] == 5
    assert float(tokens) == 0 and float(preferred) / 5 == pytest.approx(expected, abs=1e-4)
    assert expected != pytest.approx(0.6931, abs=1e-3), "the adapter moves the answers"


def test_the_losses_of_orpo_are_trl_s_odds_ratio_and_the_likelihood_of_the_chosen_answers() -> None:
    """TRL takes the likelihood of the prompt, too; the paper, and our SFT, that of answers only."""
    from torch.nn.functional import cross_entropy
    from trl.experimental.orpo import ORPOTrainer

    model, some = adapted(), pairs(5)
    theirs = padded(some)
    logits = model(input_ids=theirs["input_ids"], attention_mask=theirs["attention_mask"]).logits
    labels = theirs["input_ids"].masked_fill(theirs["completion_mask"] == 0, -100)
    means = ORPOTrainer.get_batch_logps(logits, labels, average_log_prob=True)
    fake: Any = SimpleNamespace(beta=0.2, accelerator=SimpleNamespace(device="cpu"))
    ratio, *_ = ORPOTrainer.odds_ratio_loss(fake, means[:5], means[5:])
    nats = cross_entropy(logits[:5, :-1].flatten(0, 1), labels[:5, 1:].flatten(), reduction="sum")

    batch = flatten(some)
    found = objectives.losses(model, model, batch, Training(objective="orpo", beta=0.2))
    assert found.tolist() == pytest.approx([float(nats), -float(ratio.sum())], abs=1e-4)
    assert objectives.counts(batch).tolist() == [sum(pair.chosen.scored for pair in some), 5]


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_what_is_preferred_becomes_likelier_however_little_is_computed_at_once(
        tmp_path: Path, objective: str) -> None:
    settings: dict[str, Any] = {"objective": objective, "max_length": 32, "tokens_per_batch": 64, "epochs": 3,
                                "learning_rate": 1e-2, "splits": DATA}
    whole, history = trained(tmp_path / "whole", tokens_per_micro_batch=64, **settings)
    divided, _ = trained(tmp_path / "divided", tokens_per_micro_batch=8, **settings)
    assert_equal(divided, whole, within=1e-5)
    held_out = [entry["holdout_loss"] for entry in history if "holdout_loss" in entry]
    assert held_out[-1] < held_out[0] - 0.01, "also for answers that it has not seen"
    if objective == "dpo":
        assert history[0]["loss"] == pytest.approx(0.6931, abs=1e-3), "it starts as the base model"


def test_a_preference_training_in_pieces_gives_the_same_bytes(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"objective": "dpo", "max_length": 32, "tokens_per_batch": 64, "epochs": 2,
                                "splits": DATA}
    whole, _ = trained(tmp_path / "whole", **settings)
    trained(tmp_path / "pieces", until=3, **settings)
    pieces, _ = trained(tmp_path / "pieces", **settings)
    assert_equal(pieces, whole)


def test_an_empty_micro_batch_adds_nothing() -> None:
    """With several processes, one may have nothing to compute, and takes part nevertheless."""
    model = adapted()
    for objective in ("dpo", "orpo"):
        batch = flatten([pairs(1)[0].unlearned])
        assert objectives.counts(batch).tolist() == [0, 0]
        found = objectives.losses(model, model, batch, Training(objective=objective))
        assert found.tolist() == [0, 0]
        found.sum().backward()


def test_records_of_the_other_kind_are_refused_with_what_to_set() -> None:
    answers = Splits([Encoded.of([1], [2])], [], 0)
    with pytest.raises(UserError, match=r"objective is dpo, but the dataset's records are answers without a rejected"):
        for_objective(answers, Training(objective="dpo"))
    with pytest.raises(UserError, match=r"objective is sft, .* preferences .*: set training.objective: dpo or orpo"):
        for_objective(DATA, Training())


@pytest.mark.parametrize(("settings", "message"), [
    ({"search": {"candidates": {"lora.r": [4, 8]}}}, "training.search chooses by the loss on the validation split, "
     "which is empty. Set dataset.validation, for example to 0.1"),
    ({"keep": "best"}, "training.keep: best chooses by the loss on the validation split, and the dataset has none: set "
     "dataset.validation"),
])
def test_without_a_validation_split_nothing_is_chosen_by_it(settings: dict[str, Any], message: str) -> None:
    answers, training = [Encoded.of([1], [2])], Training.model_validate(settings)
    with pytest.raises(UserError, match=message):
        for_objective(Splits(answers, answers, 0), training)
    assert for_objective(Splits(answers, answers, 0, answers), training).validation == answers


def test_pairs_know_their_lengths_and_lines_without_reading_tokens() -> None:
    import numpy as np

    rows = [each for pair in pairs(3) for each in pair.sequences]
    split: Any = SimpleNamespace(lengths=np.array([len(row) for row in rows]), records=np.array([1, 1, 4, 4, 5, 5]))
    found = Pairs(split)
    assert found.lengths.tolist() == [len(pair) for pair in pairs(3)]
    assert found.records.tolist() == [1, 4, 5]


def test_pairs_are_read_like_a_list() -> None:
    rows = [each for pair in pairs(3) for each in pair.sequences]
    found = Pairs(rows)
    assert len(found) == 3 and list(found) == pairs(3)
    for number in (-1, 3):
        with pytest.raises(IndexError):
            found[number]


def test_every_split_of_preferences_is_read_as_pairs() -> None:
    train, held_out, validation = ([each for pair in pairs(count) for each in pair.sequences] for count in (4, 2, 3))
    splits = Splits(train, held_out, 7, validation, preferences=True)
    found = for_objective(splits, Training(objective="orpo"))
    assert [list(each) for each in (found.train, found.holdout, found.validation)] == [pairs(4), pairs(2), pairs(3)]
    assert (found.too_long, found.preferences) == (7, True)
    answers = Splits([Encoded.of([1], [2])], [], 0)
    assert for_objective(answers, Training()) is answers


def test_the_loss_of_answers_is_divided_by_their_tokens_and_there_are_no_pairs() -> None:
    batch = flatten([Encoded.of([5, 6], [7, 8]), Encoded.of([], [9, 10])])
    assert objectives.counts(batch).tolist() == [3, 0]
