"""A file that is not whole yet, on its volume: which bytes of it are there, and their digest.

It is written as `NAME.partial`. Fetched through one connection, it grows at its end, and its size says what is there.
Fetched through several, a journal beside it does (ranges.py).
"""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from typing import Any

from jobs.core.files import human_bytes, note_sha256
from jobs.relocation.connection import mismatch, shown
from jobs.relocation.ranges import Journal, Ranges, read_journal
from jobs.relocation.sources.interface import UNFINISHED, Item

log = logging.getLogger("jobs")


def leftovers(name: str) -> tuple[str, str]:
    """The names under which an interrupted run leaves the item `name`."""
    partial, journal = UNFINISHED
    return name + partial, name + journal


class Partial:
    """Finds what an earlier run left of an item that belongs at `file`."""

    def __init__(self, item: Item, file: Path) -> None:
        self.item, self.file = item, file
        self.partial, self.journal_path = (file.with_name(each) for each in leftovers(file.name))
        self.path = self.partial  # where its bytes are
        self.total = item.size
        self.version: str | None = None  # of the content, as its source names it
        self.present = Ranges()
        self.digest: Any = None  # of the first `hashed` bytes
        self.hashed = 0
        self._handle: int | None = None
        self._journal: Journal | None = None
        self._load()
        # All bytes are there, which need not be the right ones.
        self.whole = self.path == self.file or (self.total is not None and self.present.prefix >= self.total)

    def _load(self) -> None:
        self.partial.parent.mkdir(parents=True, exist_ok=True)
        if self.file.exists():  # its bytes are verified again, since a power cut can lose them
            self.path = self.file
            self.total = self.file.stat().st_size
            self.present.add(0, self.total)
        else:
            self.partial.touch()
            self._load_partial(self.partial.stat().st_size)

    def _load_partial(self, size: int) -> None:
        if self.journal_path.exists() and self.journal_path.stat().st_size:
            recorded = read_journal(self.journal_path, size)
            if recorded and self.item.size in (None, recorded.total):
                self.total, self.version, self.present = recorded.total, recorded.version, recorded.present
                self._journal = Journal(self.journal_path, recorded.length)
            else:
                self.empty()
        elif self.item.size is None or size <= self.item.size:
            self.present.add(0, size)
        else:
            self.empty()
        if self.present.size:
            log.info("%s: continuing after %s", self.item.name, human_bytes(self.present.size))

    @property
    def missing(self) -> int:
        """How many bytes are to come, as far as is known."""
        return 0 if self.total is None else max(0, self.total - self.present.size)

    def handle(self) -> int:
        """The open file, for writing."""
        if self._handle is None:
            self._handle = os.open(self.path, os.O_RDWR)
        return self._handle

    def close_handles(self) -> None:
        """Close the file and its journal, which stays for the next run."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    @property
    def has_journal(self) -> bool:
        """Whether a journal says what is there; else the size of the file does."""
        return self._journal is not None

    def begin_journal(self) -> None:
        """From now on, bytes may be written in any order."""
        assert self.total is not None
        self._journal = Journal.create(self.journal_path, self.total, self.version, self.present)

    def record(self, start: int, end: int) -> None:
        """Tell the journal, if there is one, of bytes that were written."""
        if self._journal is not None and end > start:
            self._journal.append(start, end)

    def empty(self) -> None:
        """Empty the file. Its journal goes last: until then it names bytes that are not there, and is not believed."""
        if self.path == self.file:
            self.file.rename(self.partial)
            self.path = self.partial
        os.truncate(self.path, 0)
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        self.journal_path.unlink(missing_ok=True)
        self.present, self.total, self.version = Ranges(), self.item.size, None
        self.digest, self.hashed = None, 0

    @property
    def hashable(self) -> int:
        """How many bytes can be added to the digest now."""
        return 0 if self._by_git and self.total is None else self.present.prefix - self.hashed

    @property
    def _by_git(self) -> bool:
        return self.item.git_sha1 is not None and self.item.sha256 is None

    def new_digest(self) -> Any:
        """The digest of no bytes, of the kind that the item has; sha256 if it has none."""
        if self._by_git:
            return hashlib.sha1(b"blob %d\0" % (self.total or 0))  # noqa: S324 - git's
        return hashlib.sha256()

    def wrong(self) -> str | None:
        """Why the bytes are not the item's, naming both digests; None when they are."""
        expected = self.item.sha256 or self.item.git_sha1
        if expected:
            found = (self.digest or self.new_digest()).hexdigest()
        elif self.item.size is not None:
            expected, found = f"{self.item.size} bytes", f"{self.total} bytes"
        else:
            return None
        return None if found == expected else mismatch(shown(self.item.url), self.item.pinned_in, expected, found)

    def finish(self) -> None:
        """Give the file its name."""
        self.close_handles()
        self.journal_path.unlink(missing_ok=True)  # first: without it, a whole file is one
        if self.path != self.file:
            self.path.rename(self.file)
        if not self._by_git:
            note_sha256(self.file, (self.digest or self.new_digest()).hexdigest())

    def remove(self) -> None:
        """Leave nothing."""
        self.path.unlink(missing_ok=True)
        self.journal_path.unlink(missing_ok=True)
