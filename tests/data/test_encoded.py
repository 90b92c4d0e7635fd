"""Promises of the encoded files: what was written is read, in constant memory, by number and by slice."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path

import pytest

from jobs.data import encoded
from jobs.data.encoding import Encoded
from jobs.data.split import SPLITS
from tests import build_models

CHANCE = random.Random(0)


def sequence(length: int) -> Encoded:
    third = length // 3
    return Encoded([CHANCE.randrange(50_000) for _ in range(length)], [(third, 2 * third), (2 * third + 1, length)])


def test_what_was_written_is_read_over_several_batches(tmp_path: Path) -> None:
    rows = [(line // 2 + 1, sequence(CHANCE.randint(6, 40))) for line in range(50)]
    build_models.write_split(tmp_path / "train.arrow", rows, batch=7)
    split = encoded.Split(tmp_path / "train.arrow")
    assert list(split) == [each for _, each in rows]
    assert split.records.tolist() == [line for line, _ in rows]
    assert split.lengths.tolist() == [len(each) for _, each in rows]
    assert (split[-1], split[3:9]) == (rows[-1][1], [each for _, each in rows[3:9]])
    for outside in (50, -51):
        with pytest.raises(IndexError):
            split[outside]


def test_an_empty_split_is_read_too(tmp_path: Path) -> None:
    for name in SPLITS:
        build_models.write_split(tmp_path / f"{name}.arrow", [])
    (tmp_path / encoded.STATISTICS).write_text(json.dumps({"train": {"too_long": 3}, "holdout": {"too_long": 4}}))
    splits = encoded.read(tmp_path)
    assert (len(splits.train), len(splits.validation), list(splits.holdout), splits.too_long) == (0, 0, [], 7)
    assert splits.train.lengths.tolist() == splits.train.records.tolist() == []  # type: ignore[attr-defined]


def test_opening_and_reading_a_few_takes_memory_for_the_lengths_alone(tmp_path: Path) -> None:
    """Not for the tokens, and no Python object for each sequence."""
    many, one = 40_000, sequence(100)
    build_models.write_split(tmp_path / "train.arrow", ((line, one) for line in range(1, many + 1)))
    assert (tmp_path / "train.arrow").stat().st_size > many * 400
    encoded.Split(tmp_path / "train.arrow").lengths.sum()  # what is imported is not counted
    tracemalloc.start()
    try:
        split = encoded.Split(tmp_path / "train.arrow")
        assert split.lengths.sum() == 100 * many
        assert [split[number] for number in range(0, many, 400)] == [one] * 100
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < many * 8 + 2**20
