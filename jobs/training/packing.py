"""What training reads: the dataset's records as tokens, packed into batches without padding."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.core.errors import UserError
from jobs.core.pipeline import Training
from jobs.data.encoding import Encoded, encode

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("jobs")

Pack = list[Encoded]


@dataclass(frozen=True)
class Splits:
    """The encoded records, and how many were left out because they are longer than `max_length`."""

    train: list[Encoded]
    holdout: list[Encoded]
    too_long: int


def check_length(config: dict[str, Any], training: Training) -> None:
    """Reject a `max_length` beyond the positions that the model was made for."""
    positions = config.get("max_position_embeddings", config.get("n_positions"))
    if isinstance(positions, int) and training.max_length > positions:
        raise UserError(f"training.max_length is {training.max_length}, but the base model knows only {positions} "
                        "positions; lower it")


def encode_splits(dataset: Path, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Splits:
    """Encode the dataset artifact's two splits; records of more than `max_length` tokens are left out and counted.

    Cutting them would teach the model to stop in the middle of an answer.

    Raises:
        UserError: when a split has no record that fits.
    """
    fitting: dict[str, list[Encoded]] = {}
    too_long = 0
    for name in ("train", "holdout"):
        with (dataset / f"{name}.jsonl").open(encoding="utf-8") as lines:
            encoded = [encode(tokenizer, json.loads(line)) for line in lines]
        fitting[name] = [record for record in encoded if len(record) <= max_length]
        if not fitting[name]:
            raise UserError(f"all {len(encoded)} {name} records are longer than training.max_length ({max_length} "
                            f"tokens; the shortest has {min(map(len, encoded), default=0)}). Raise it, or shorten them")
        too_long += len(encoded) - len(fitting[name])
    if too_long:
        log.warning("%d records are longer than training.max_length (%d tokens) and are left out", too_long, max_length)
    return Splits(fitting["train"], fitting["holdout"], too_long)


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

    Positions restart at each record, by which the model keeps records from attending to each other; labels are -100
    on prompts and on each record's first token, so only completions are learned.
    """
    from transformers import DataCollatorWithFlattening

    features = [{"input_ids": record.prompt + record.completion,
                 "labels": [-100] * len(record.prompt) + record.completion} for (only,) in [packs] for record in only]
    batch: dict[str, Tensor] = DataCollatorWithFlattening()(features, return_tensors="pt")
    return batch
