"""Ranges of bytes: which parts of an unfinished file are there, in memory and in a journal beside it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

LINE = re.compile(rb"(\d+) (\d+)\n")


class Ranges:
    """Disjoint ranges of bytes in their order, each from a start to before an end. Neighbours are merged."""

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._ranges: list[tuple[int, int]] = []
        for start, end in ranges:
            self.add(start, end)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._ranges)

    def add(self, start: int, end: int) -> None:
        """Add the bytes from `start` to before `end`; some may be there already."""
        if start >= end:
            return
        touching = [(a, b) for a, b in self._ranges if a <= end and b >= start]
        apart = [(a, b) for a, b in self._ranges if a > end or b < start]
        merged = (min([start, *(a for a, _ in touching)]), max([end, *(b for _, b in touching)]))
        self._ranges = sorted([*apart, merged])

    @property
    def size(self) -> int:
        """How many bytes there are."""
        return sum(end - start for start, end in self._ranges)

    @property
    def prefix(self) -> int:
        """How many bytes there are from byte 0 on without a gap."""
        return self._ranges[0][1] if self._ranges and self._ranges[0][0] == 0 else 0

    @property
    def end(self) -> int:
        """The byte after the last one."""
        return self._ranges[-1][1] if self._ranges else 0

    def first_gap(self, total: int | None) -> tuple[int, int | None] | None:
        """The first range that is not there of a file of `total` bytes (None: not known), or None."""
        start = self.prefix
        if total is not None and start >= total:
            return None
        after = [a for a, _ in self._ranges if a > start]
        return (start, after[0] if after else total)


@dataclass(frozen=True)
class Recorded:
    """What a journal says about the file beside it."""

    total: int
    version: str | None
    present: Ranges
    length: int  # bytes of the journal that can be read


class Journal:
    """A text file: a line of JSON with the file's total and version, then a line `START END` for every piece written.

    A line follows its bytes, so that after a kill the journal never names bytes that are not there. After a power cut
    it may: the file's digest shows it.
    """

    def __init__(self, path: Path, length: int) -> None:
        os.truncate(path, length)  # without a torn line
        self._handle = os.open(path, os.O_WRONLY | os.O_APPEND)

    @classmethod
    def create(cls, path: Path, total: int, version: str | None, present: Ranges) -> Journal:
        """Begin the journal of a file of which `present` is there."""
        head = json.dumps({"total": total, "version": version}).encode() + b"\n"
        content = head + b"".join(b"%d %d\n" % each for each in present)
        path.write_bytes(content)
        return cls(path, len(content))

    def append(self, start: int, end: int) -> None:
        """Record that the bytes from `start` to before `end` are written."""
        os.write(self._handle, b"%d %d\n" % (start, end))

    def close(self) -> None:
        """Write no more; the journal stays for the next run."""
        os.close(self._handle)


def read_journal(path: Path, size: int) -> Recorded | None:
    """What the journal at `path` says about a file that has `size` bytes; None if it is of no such file."""
    content = path.read_bytes()
    head, newline, lines = content.partition(b"\n")
    length = len(head + newline)
    try:
        about = json.loads(head)
        total, version = int(about["total"]), about["version"]
    except (ValueError, KeyError, TypeError):
        return None
    present = Ranges()
    for line in lines.splitlines(keepends=True):
        piece = LINE.fullmatch(line)
        if not piece:  # torn
            break
        present.add(int(piece[1]), int(piece[2]))
        length += len(line)
    return Recorded(total, version, present, length) if present.end <= min(size, total) else None
