"""The held-out records, without all of them in memory, and which of them are answered."""

from __future__ import annotations

import hashlib
import heapq
import json
from array import array
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, overload

from jobs.data.encoding import Record, question


class JsonLines(Sequence[Record]):
    """The records of a JSONL file, one a line. Each is read when it is asked for; kept are only their places."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._starts = array("q", [0])
        with file.open("rb") as lines:
            for line in lines:
                self._starts.append(self._starts[-1] + len(line))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __iter__(self) -> Iterator[Record]:
        with self._file.open("rb") as lines:
            yield from map(json.loads, lines)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        self._open.seek(self._starts[range(len(self))[index]])
        record: dict[str, Any] = json.loads(self._open.readline())
        return record

    @cached_property
    def _open(self) -> BinaryIO:
        return self._file.open("rb")


class Chosen(Sequence[Record]):
    """Some of the records, by line, in this order."""

    def __init__(self, records: Sequence[Record], lines: Sequence[int]) -> None:
        self._records, self._lines = records, lines

    def __len__(self) -> int:
        return len(self._lines)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        if isinstance(index, slice):
            return Chosen(self._records, self._lines[index])
        return self._records[self._lines[index] - 1]


def answered_lines(holdout: Sequence[Record], count: int) -> list[int]:
    """The lines of the held-out records whose questions are answered, at most so many: the first by their sha256. So
    it depends neither on their order nor on a model, and a record that is added replaces at most one."""
    asking = ((_sha256(record) if len(holdout) > count else b"", line)
              for line, record in enumerate(holdout, 1) if question(record) is not None)
    return sorted(line for _, line in heapq.nsmallest(count, asking))


def _sha256(record: Record) -> bytes:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).digest()
