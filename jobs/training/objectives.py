"""Objectives that learn a preference: DPO and ORPO. (SFT's, the next token, is the model's own.)

A record is a pair of sequences in a pack: the prompt with the chosen answer, then the prompt with the rejected one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jobs.core.pipeline import Training
from jobs.data.encoded import Splits, check_suits
from jobs.data.encoding import Pair

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


class Pairs(Sequence[Pair]):
    """The preferences of a split, whose sequences alternate: chosen, rejected."""

    def __init__(self, split: Sequence[Any]) -> None:
        self._split = split

    def __len__(self) -> int:
        return len(self._split) // 2

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(number)
        return Pair(self._split[2 * number], self._split[2 * number + 1])

    @cached_property
    def lengths(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The tokens of each pair."""
        lengths: np.ndarray[Any, np.dtype[np.int64]] = self._split.lengths.reshape(-1, 2).sum(axis=1)  # type: ignore[attr-defined]
        return lengths

    @property
    def records(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The record of each pair: its line in the dataset's file of this split, from 1."""
        records: np.ndarray[Any, np.dtype[np.int64]] = self._split.records[::2]  # type: ignore[attr-defined]
        return records


def for_objective(splits: Splits, training: Training) -> Splits:
    """The splits as the objective learns from them.

    Raises:
        UserError: they do not suit the training; see `check_suits`.
    """
    check_suits(training, preferences=splits.preferences, validation=len(splits.validation) > 0)
    if not splits.preferences:
        return splits
    return Splits(Pairs(splits.train), Pairs(splits.holdout), splits.too_long, Pairs(splits.validation), True)


def counts(batch: dict[str, Tensor]) -> Tensor:
    """What the losses of a batch are divided by: its learned tokens, of pairs those of the chosen answers; and its
    pairs."""
    import torch

    if "answer_of" not in batch:
        return torch.stack([(batch["labels"] != -100).sum(), torch.tensor(0)])
    chosen = batch["answer_of"] % 2 == 0
    return torch.stack([chosen.sum(), torch.tensor(len(batch["answer_of"][chosen].unique()))])


def losses(model: Any, adapted: Any, batch: dict[str, Tensor], training: Training) -> Tensor:
    """The losses of a batch of pairs, summed: of the tokens, and of the pairs.

    DPO (Rafailov et al. 2023, equation 7): -log sigmoid(beta ((log p(chosen) - log q(chosen)) - (log p(rejected) -
    log q(rejected)))) a pair, where q is the base model, which is the same one with the adapter switched off.

    ORPO (Hong et al. 2024, equations 6 and 7): the negative log-likelihood of the chosen answers' tokens; and, a pair,
    beta times -log sigmoid of the logarithm of the odds ratio, by the answers' mean log-probability a token.

    Args:
        model: what computes, perhaps wrapped for several processes.
        adapted: the PEFT model in it.
    """
    import torch
    from torch.nn.functional import logsigmoid

    answers, tokens = _answers(model, batch)
    there = tokens[::2] > 0  # nothing is learned in an empty micro-batch
    if training.objective == "dpo":
        with torch.no_grad(), adapted.disable_adapter():
            before, _ = _answers(adapted, batch)
        gains = answers - before
        margins = gains[::2] - gains[1::2]
        return torch.stack([answers.new_zeros(()), -logsigmoid(training.strength * margins)[there].sum()])
    means = answers / tokens.clamp(min=1)
    # log(p / (1 - p)); an answer that is certain to the last digit has no finite odds.
    odds = means - torch.log(-torch.expm1(means).clamp(max=-1e-12))
    ratios = (odds[::2] - odds[1::2])[there]
    return torch.stack([-answers[::2].sum(), -training.strength * logsigmoid(ratios).sum()])


def _answers(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Of each sequence in the pack, the log-probability of its answer, in nats, and the tokens of the answer."""
    import torch

    inputs = {key: value for key, value in batch.items() if key not in ("labels", "shift_labels", "answer_of")}
    logits = model(**inputs).logits[0].float()
    nats = torch.nn.functional.cross_entropy(logits, batch["shift_labels"][0], reduction="none")
    sequences, answer_of = len(batch["cu_seq_lens_q"]) - 1, batch["answer_of"]
    return (torch.zeros(sequences, device=nats.device).index_add(0, answer_of, -nats),
            torch.bincount(answer_of, minlength=sequences))
