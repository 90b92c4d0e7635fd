"""The files of an encoded dataset: the sequences of each split, memory-mapped, so that a reader's memory does not grow
with the data."""

from __future__ import annotations

import bisect
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from jobs.core import search
from jobs.core.errors import UserError
from jobs.core.pipeline import NO_VALIDATION, Training
from jobs.data.encoding import Encoded, Example
from jobs.data.split import HOLDOUT, SPLITS, TRAIN, VALIDATION

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

STATISTICS = "statistics.json"


class Split(Sequence[Encoded]):
    """The sequences of one split."""

    def __init__(self, file: Path) -> None:
        import pyarrow as pa

        self._reader = pa.ipc.open_file(pa.memory_map(str(file)))
        self._batches = [self._reader.get_batch(n) for n in range(self._reader.num_record_batches)]
        self._starts: list[int] = []
        self._count = 0
        for batch in self._batches:
            self._starts.append(self._count)
            self._count += batch.num_rows

    @cached_property
    def lengths(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The tokens of each sequence."""
        return self._column("length")

    @cached_property
    def records(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The record of each sequence: its line in the dataset's file of this split, from 1; of a canary, its number,
        negated."""
        return self._column("record")

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Encoded | Sequence[Encoded]:
        if isinstance(index, slice):
            return [self[n] for n in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(index)
        index %= self._count
        number = bisect.bisect_right(self._starts, index) - 1
        batch, row = self._batches[number], index - self._starts[number]
        ends = batch.column("learned")[row].as_py()
        return Encoded(batch.column("tokens")[row].values.to_numpy().tolist(),
                       list(zip(ends[::2], ends[1::2], strict=True)))

    def _column(self, name: str) -> np.ndarray[Any, np.dtype[np.int64]]:
        import numpy as np

        columns = [batch.column(name).to_numpy() for batch in self._batches]
        return np.concatenate(columns) if columns else np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Splits:
    """The encoded splits of a dataset, and how many records were left out because they are longer than `max_length`."""

    train: Sequence[Example]
    holdout: Sequence[Example]
    too_long: int
    validation: Sequence[Example] = ()
    preferences: bool = False  # each record is two sequences: the chosen answer, and the rejected one
    canaries: int = 0  # how many of the train split are canaries


def check_suits(training: Training, *, preferences: bool, validation: bool) -> None:
    """The data must be what the settings of the training need.

    Args:
        preferences: the records are preferences.
        validation: there is a validation split.
    Raises:
        UserError: the objective learns from the other kind of records, or something is chosen by a validation split
            that there is not. With what to set.
    """
    if preferences != (training.objective != "sft"):
        found, fitting = (('preferences ({"prompt", "chosen", "rejected"})', "dpo or orpo") if preferences else
                          ("answers without a rejected one", "sft"))
        raise UserError(f"training.objective is {training.objective}, but the dataset's records are {found}: set "
                        f"training.objective: {fitting}, or bring other data")
    if training.search and not validation:
        raise UserError(search.NO_VALIDATION)
    if training.keep == "best" and not validation:
        raise UserError(NO_VALIDATION)


def schema() -> pa.Schema:
    """A row for each sequence: its record's line, how many tokens, the tokens, and both ends of each learned range."""
    import pyarrow as pa

    return pa.schema([("record", pa.int64()), ("length", pa.int64()), ("tokens", pa.large_list(pa.int32())),
                      ("learned", pa.list_(pa.int32()))])


def serialized(rows: Sequence[tuple[int, Encoded]]) -> bytes:
    """A batch of sequences, each with the line of its record, as a process sends it to the one that writes."""
    import pyarrow as pa

    columns = [[line for line, _ in rows], [len(sequence) for _, sequence in rows],
               [sequence.tokens for _, sequence in rows],
               [[end for span in sequence.learned for end in span] for _, sequence in rows]]
    batch = pa.record_batch([pa.array(column, field.type) for column, field in zip(columns, schema(), strict=True)],
                            schema=schema())
    return bytes(batch.serialize())


@contextmanager
def writer(file: Path) -> Iterator[Callable[[bytes], None]]:
    """Write the batches of a split, as `serialized` makes them."""
    import pyarrow as pa

    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, schema()) as stream:
        yield lambda batch: stream.write_batch(pa.ipc.read_record_batch(pa.py_buffer(batch), schema()))


def read_statistics(folder: Path) -> dict[str, Any]:
    """What was counted of each split of an encoded dataset."""
    found: dict[str, Any] = json.loads((folder / STATISTICS).read_text(encoding="utf-8"))
    return found


def read(folder: Path) -> Splits:
    """The splits in the folder of an encoded dataset."""
    statistics = read_statistics(folder)
    splits = {name: Split(folder / f"{name}.arrow") for name in SPLITS}
    return Splits(splits[TRAIN], splits[HOLDOUT], sum(each["too_long"] for each in statistics.values()),
                  splits[VALIDATION], bool(statistics[TRAIN].get("preferences")),
                  statistics.get("canaries", {}).get("sequences", 0))
