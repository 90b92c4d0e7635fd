"""Batches: encoded records packed without padding."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jobs.core.errors import UserError
from jobs.core.pipeline import Training
from jobs.data.encoding import Encoded

if TYPE_CHECKING:
    from torch import Tensor

Pack = list[Encoded]


def check_length(config: dict[str, Any], training: Training) -> None:
    """Reject a `max_length` beyond the positions that the model was made for."""
    positions = config.get("max_position_embeddings", config.get("n_positions"))
    if isinstance(positions, int) and training.max_length > positions:
        raise UserError(f"training.max_length is {training.max_length}, but the base model knows only {positions} "
                        "positions; lower it")


def pack(records: Sequence[Encoded], tokens_per_batch: int, seed: int) -> list[Pack]:
    """Shuffle the records and fill batches of at most `tokens_per_batch` tokens with whole records."""
    order = list(records)
    random.Random(seed).shuffle(order)
    packs: list[Pack] = []
    room = 0
    for record in order:
        if len(record) > room:
            packs.append([])
            room = tokens_per_batch
        packs[-1].append(record)
        room -= len(record)
    return packs


def flatten(packs: Sequence[Pack]) -> dict[str, Tensor]:
    """One pack as a padding-free batch of shape [1, tokens].

    Positions restart at each record, by which the model keeps records from attending to each other; `cu_seq_lens_q` has
    the records' boundaries, for attention by record. Labels are -100 on prompts and on each record's first token, so
    only completions are learned, and logits are computed at their positions only.
    """
    from transformers import DataCollatorWithFlattening

    features = [{"input_ids": list(record.tokens), "labels": record.labels()}
                for (only,) in [packs] for record in only]
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch: dict[str, Tensor] = collator(features, return_tensors="pt")
    before = (batch["labels"][0, 1:] != -100).nonzero()[:, 0]  # the positions before the learned tokens
    return batch | {"logits_to_keep": before, "shift_labels": batch["labels"][:, before + 1]}
