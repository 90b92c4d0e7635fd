"""Batches: which records each step learns from, packed without padding, and how a step is divided to be computed.

Everything here works on the lengths of the records; their tokens are read when a step is computed.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jobs.core.errors import UserError
from jobs.core.pipeline import Training
from jobs.data.encoding import Example, Pair

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    Integers = np.ndarray[Any, np.dtype[np.int64]]


def check_length(config: dict[str, Any], training: Training) -> None:
    """Reject a `max_length` beyond the positions that the model was made for."""
    positions = config.get("max_position_embeddings", config.get("n_positions"))
    if isinstance(positions, int) and training.max_length > positions:
        raise UserError(f"training.max_length is {training.max_length}, but the base model knows only {positions} "
                        "positions; lower it")


def lengths_of(split: Sequence[Example]) -> Integers:
    """The tokens of each sequence; a split that is memory-mapped knows them without reading the sequences."""
    import numpy as np

    known: Integers | None = getattr(split, "lengths", None)
    return np.fromiter(map(len, split), dtype=np.int64, count=len(split)) if known is None else known


def pack(lengths: Integers, order: Integers, tokens_per_batch: int) -> list[Integers]:
    """Fill batches of at most `tokens_per_batch` tokens with whole sequences: each goes, in the given order, to the
    batch with the least room that suffices (best fit).

    Returns:
        the numbers of each batch's sequences.
    """
    import numpy as np

    with_room: dict[int, list[int]] = {}  # room -> the batches that have as much left
    rooms: list[int] = []  # its keys, sorted: at most one for each number of tokens, so this takes O(n log n)
    chosen = np.empty(len(order), dtype=np.int64)
    count = 0
    for at, length in enumerate(lengths[order].tolist()):
        found = bisect.bisect_left(rooms, length)
        if found < len(rooms):
            room = rooms[found]
            batch = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[found]
        else:
            room, batch = tokens_per_batch, count
            count += 1
        chosen[at] = batch
        if left := room - length:
            if left not in with_room:
                with_room[left] = []
                bisect.insort(rooms, left)
            with_room[left].append(batch)
    ends = np.cumsum(np.bincount(chosen, minlength=count))
    return np.split(order[np.argsort(chosen, kind="stable")], ends[:-1])


class Batches(Sequence["Integers"]):
    """The batch of each step of the whole training: the numbers of the sequences that it learns from.

    Each epoch shuffles the sequences, packs them, and shuffles the batches, seeded by `training.seed` and the epoch. So
    a sequence meets others in each epoch. The numbers of steps of two epochs hardly differ, as best fit leaves little
    room; all are counted before training, since the learning rate's schedule needs their sum. One epoch's batches are
    in memory: 8 bytes a sequence.
    """

    def __init__(self, split: Sequence[Example], training: Training) -> None:
        self.split, self.lengths = split, lengths_of(split)
        self._training = training
        self._of_epoch = lru_cache(maxsize=1)(self._pack)
        counts = [len(self._of_epoch(epoch)) for epoch in range(training.epochs)]
        self._ends = list(itertools.accumulate(counts))

    def _pack(self, epoch: int) -> list[Integers]:
        import numpy as np

        random = np.random.Generator(np.random.PCG64([self._training.seed, epoch]))
        packed = pack(self.lengths, random.permutation(len(self.lengths)), self._training.tokens_per_batch)
        return [packed[number] for number in random.permutation(len(packed))]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, step: Any) -> Any:
        if not 0 <= step < len(self):
            raise IndexError(step)
        epoch = bisect.bisect_right(self._ends, step)
        return self._of_epoch(epoch)[step - (self._ends[epoch - 1] if epoch else 0)]

    def lines(self, step: int) -> list[int]:
        """The lines in the split's file of the records of a step, which is counted from 1."""
        numbers, of_sequences = self[step - 1], getattr(self.split, "records", None)
        return sorted(set((numbers + 1 if of_sequences is None else of_sequences[numbers]).tolist()))

    @property
    def tokens(self) -> int:
        """The tokens of all steps."""
        return int(self.lengths.sum()) * self._training.epochs


def sample(lengths: Integers, tokens: float, least: int) -> Integers:
    """The numbers of sequences that are at most `tokens` tokens together, but at least `least` sequences: always the
    same ones of the same lengths, spread over all of them."""
    import numpy as np

    order = np.random.Generator(np.random.PCG64(0)).permutation(len(lengths))
    fitting = int(np.searchsorted(np.cumsum(lengths[order]), tokens, side="right"))
    return np.sort(order[: max(fitting, least)])


def divide(lengths: Sequence[int], shares: int) -> list[list[int]]:
    """Divide sequences into shares of about as many tokens each: the positions in `lengths` of each share, in order.

    The longest sequence goes first, each to the share with the fewest tokens. Where there are fewer sequences than
    shares, some shares are empty.
    """
    divided: list[list[int]] = [[] for _ in range(shares)]
    filled = [(0, number) for number in range(shares)]
    for position in sorted(range(len(lengths)), key=lambda p: (-lengths[p], p)):
        tokens, number = filled[0]
        divided[number].append(position)
        heapq.heapreplace(filled, (tokens + lengths[position], number))
    return [sorted(share) for share in divided]


@dataclass(frozen=True)
class Share:
    """What one process computes, and how much of it at once. It decides what a step needs, never what it learns."""

    rank: int
    size: int  # the processes
    tokens: int  # of a micro-batch, at most, but for a longer sequence, which is a micro-batch by itself

    def micro_batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """The positions in `lengths` of each of this process's micro-batches.

        All processes have the same number of them, as few as will do, because a model that is divided among processes
        is computed by all of them at the same time. So some may be empty.
        """
        limit = max(self.tokens, *lengths)
        for count in itertools.count(max(1, sum(lengths) // (limit * self.size))):
            shares = divide(lengths, count * self.size)
            if all(sum(lengths[position] for position in share) <= limit for share in shares):
                break
        return shares[self.rank * count : (self.rank + 1) * count]


def flatten(records: Sequence[Example]) -> dict[str, Tensor]:
    """Records as one padding-free batch of shape [1, tokens].

    Positions restart at each record, by which the model keeps records from attending to each other; `cu_seq_lens_q` has
    the records' boundaries, for attention by record. Labels are -100 on prompts and on each record's first token, so
    only completions are learned, and logits are computed at their positions only. Of pairs, `answer_of` says in which
    sequence of the batch each of these positions is.
    """
    import torch
    from transformers import DataCollatorWithFlattening

    features = [{"input_ids": list(sequence.tokens), "labels": sequence.labels()}
                for record in records for sequence in record.sequences]
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch: dict[str, Tensor] = collator(features, return_tensors="pt")
    before = (batch["labels"][0, 1:] != -100).nonzero()[:, 0]  # the positions before the learned tokens
    batch |= {"logits_to_keep": before, "shift_labels": batch["labels"][:, before + 1]}
    if isinstance(records[0], Pair):
        batch["answer_of"] = torch.searchsorted(batch["cu_seq_lens_q"][1:], before.to(torch.int32), right=True)
    return batch
