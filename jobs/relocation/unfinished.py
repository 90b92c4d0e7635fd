"""One file on its way: what is there of it, which connection fetches which range, and what its source's answers change.

It is written as `NAME.partial`. Fetched through one connection, it grows at its end, and its size says what is there.
Fetched through several, a journal beside it does (ranges.py). No method blocks; the transfer's lock guards all of them.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.core.files import human_bytes
from jobs.core.progress import Progress
from jobs.relocation.connection import Interrupted, Patience, Stream, mismatch, shown
from jobs.relocation.ranges import Journal, Ranges, read_journal
from jobs.relocation.sources.interface import Item

log = logging.getLogger("jobs")

PARTIAL = ".partial"
JOURNAL = ".ranges"  # after PARTIAL
# Bytes of one request. Smaller ones would spend their time waiting for the first byte; larger ones leave the digest far
# behind, which is made in the file's order. The last requests of a file are the smallest, so that all end together.
SMALLEST = 8 << 20
LARGEST = 128 << 20
RECORD = 1 << 20  # bytes of one connection after which the journal gets a line: at most so many are fetched again
ENOUGH = 1 << 16  # bytes that a connection brought before it broke, after which the next one need not wait
PAGE = 4096


def leftovers(name: str) -> tuple[str, str]:
    """The names under which an interrupted run leaves the item `name`."""
    return name + PARTIAL, name + PARTIAL + JOURNAL


@dataclass(eq=False)
class Lease:
    """The range of a file that one connection fetches."""

    at: int  # the byte that comes next
    end: int | None  # the byte after the last one; None: to the end of the source
    request: tuple[int, int | None]  # what the source is asked for
    started: float = field(default_factory=time.monotonic)
    received: int = 0  # bytes
    recorded: int = 0  # up to this byte the journal knows of it
    stream: Stream | None = None
    revoked: bool = False  # the range belongs to others now: nothing more may be written

    def revoke(self) -> None:
        """Take the range back, and end the connection if it is waiting."""
        self.revoked = True
        if self.stream is not None:
            self.stream.abort()


class Unfinished:
    """See above. `whole` means that all bytes are there, not yet that they are the right ones."""

    def __init__(self, item: Item, file: Path, progress: Progress) -> None:
        self.item, self.file, self.progress = item, file, progress
        self.partial, self.journal_path = (file.with_name(each) for each in leftovers(file.name))
        self.path = self.partial  # where its bytes are
        self.total = item.size
        self.version: str | None = None  # of the content, as its source names it
        self.present = Ranges()
        self.leases: list[Lease] = []
        self.whole = False
        self.resumed = False  # some bytes are of an earlier run
        self.answers = 0  # from how many answers of the source its bytes are
        self.size_given = False  # by the item or an answer
        self.restarted = False  # it did not match its digest, and is fetched once more
        self.generation = 0  # counts how often it was begun
        self.pausing = 0  # connections that wait before they try again
        self.not_before = 0.0  # a pause that the source requests (time.monotonic)
        self.digest: Any = None  # of the first `hashed` bytes
        self.hashed = 0
        self._patience = Patience(shown(item.url))
        self._last_failure = 0.0
        self._furthest = 0  # the most bytes that were ever there
        self._opened = False  # the source has answered, so that it is known whether it gives ranges
        self._one_stream = False  # it does not, or its ranges do not fit together
        self._any_version = False  # versions differ, perhaps because each of several servers has its own
        self._resetting = False
        self._abandoned = False
        self._handle: int | None = None
        self._journal: Journal | None = None
        self._load()

    # --- what is there -----------------------------------------------------------------------------------------------

    def _load(self) -> None:
        """Find what an earlier run left."""
        self.partial.parent.mkdir(parents=True, exist_ok=True)
        if self.file.exists():  # its bytes are verified again, since a power cut can lose them
            self.path = self.file
            self.total = self.file.stat().st_size
            self.present.add(0, self.total)
        else:
            self.partial.touch()
            self._load_partial(self.partial.stat().st_size)
        self.resumed = self.path == self.file or self.present.size > 0
        self.whole = self.path == self.file or (self.total is not None and self.present.prefix >= self.total)
        self.size_given = self.total is not None
        self._furthest = self.present.size
        self.progress.skip(self.present.size)

    def _load_partial(self, size: int) -> None:
        if self.journal_path.exists() and self.journal_path.stat().st_size:
            recorded = read_journal(self.journal_path, size)
            if recorded and self.item.size in (None, recorded.total):
                self.total, self.version, self.present = recorded.total, recorded.version, recorded.present
                self._journal = Journal(self.journal_path, recorded.length)
            else:
                self._empty()
        elif self.item.size is None or size <= self.item.size:
            self.present.add(0, size)
        else:
            self._empty()
        if self.present.size:
            log.info("%s: continuing after %s", self.item.name, human_bytes(self.present.size))

    @property
    def missing(self) -> int:
        """How many bytes are to come, as far as is known."""
        return 0 if self.total is None else max(0, self.total - self.present.size)

    def most_leases(self, connections: int) -> int:
        """For how many of the connections it may have a range at the same time."""
        return min(connections, 1 + (self.total or 0) // SMALLEST) if self.size_given else connections

    # --- ranges ------------------------------------------------------------------------------------------------------

    def lease(self, connections: int) -> Lease | None:
        """A range for a connection to fetch, if there is one right now. `connections` share what is left."""
        if self.whole or self._resetting or time.monotonic() < self.not_before:
            return None
        active = [each for each in self.leases if not each.revoked]
        if self.pausing and not any(each.stream for each in active):
            return None  # the source is in trouble: others do not take the place of a connection that waits
        if active and (self._one_stream or not self._opened):
            return None
        taken = Ranges([*self.present, *((each.at, self._end_of(each)) for each in active)])
        gap = taken.first_gap(self.total)
        if gap is None:
            return None
        start, end = gap
        if self.total is None or self._one_stream:
            end = None
        elif end is not None and self.total >= 2 * SMALLEST:
            end = self._shared(start, end, self.total - taken.size, connections)
        if start > self.present.prefix and self._journal is None:
            assert self.total is not None
            self._journal = Journal.create(self.journal_path, self.total, self.version, self.present)
            for each in active:
                each.recorded = each.at
        to_the_end = end is None or end == self.total
        # What is fetched whole is not cut off at the size that it should have: it would hide that it is longer.
        lease = Lease(start, None if to_the_end and start == 0 else end, (start, None if to_the_end else end),
                      recorded=start)
        self.leases.append(lease)
        return lease

    def _end_of(self, lease: Lease) -> int:
        end = self.total if lease.end is None else lease.end
        assert end is not None
        return max(end, lease.at)

    @staticmethod
    def _shared(start: int, end: int, left: int, connections: int) -> int:
        """Where a request that starts at `start` in a gap that ends at `end` should end."""
        share = min(max(left // (2 * connections), SMALLEST), LARGEST)
        after = start + share // PAGE * PAGE
        return end if end - after < SMALLEST else after

    def headers(self, lease: Lease) -> dict[str, str]:
        """The headers of the request for a range."""
        same = {"If-Range": self.version} if self.version and lease.at else {}
        return {**self.item.headers, **same}

    def answered(self, lease: Lease, stream: Stream, connections: int) -> None:
        """Compare an answer with what is known, and learn from it.

        Raises:
            Interrupted: it does not fit to what is there, or to what other connections fetch; all starts over.
        """
        changed = None not in (self.version, stream.version) and self.version != stream.version
        others = len(self.leases) > 1
        if stream.start != lease.at:  # it starts at 0
            if others:
                self.start_over(one_stream=True)
                raise Interrupted("the source no longer gives the ranges that are requested")
            self._clear()
            lease.at, lease.end, lease.recorded = 0, None, 0
            self._one_stream = not (changed and stream.parts)
        elif None not in (self.total, stream.total) and self.total != stream.total and lease.request != (0, None):
            had = self.total
            self.start_over(one_stream=True)
            raise Interrupted(f"the content changed: it had {had} bytes, now it has {stream.total}")
        elif changed and not self._any_version and (others or self.present.size):
            self._any_version = True
            self.start_over(one_stream=False)
            raise Interrupted(f"the content changed: it was {self.version}, now it is {stream.version}")
        lease.stream = stream
        self.version = stream.version or self.version
        self.size_given = self.size_given or stream.total is not None
        self.total = stream.total if self.total is None else self.total
        if not stream.parts or self.total is None:
            self._one_stream = True
            lease.end = None if lease.request[0] == 0 else lease.end
        elif not self._opened and not self._one_stream and self.total >= 2 * SMALLEST and lease.request[1] is None:
            lease.end = self._shared(lease.at, self._end_of(lease), self.total - self.present.size, connections)
        self._opened = True

    @property
    def replaceable(self) -> bool:
        """Whether another connection could go on where one is slow."""
        return self._opened and not self._one_stream

    def room(self, lease: Lease) -> int | None:
        """How many more bytes may be written; None where the content itself ends it."""
        return None if lease.end is None else lease.end - lease.at

    def wrote(self, lease: Lease, count: int) -> None:
        """`count` bytes more were written."""
        self.answers += lease.received == 0
        before = self.present.size
        self.present.add(lease.at, lease.at + count)
        lease.at += count
        lease.received += count
        now = self.present.size
        self.progress.add(now - before)
        if now > self._furthest:
            self._furthest = now
            self._patience.reset()
        if lease.at - lease.recorded >= RECORD:
            self._record(lease)
        if self.total is not None and lease.at > self.total:  # more than there should be: the digest will not match
            self.total = lease.at
        self.whole = self.total is not None and self.present.prefix >= self.total

    def ended(self, lease: Lease) -> None:
        """The answer ended.

        Raises:
            Interrupted: too early.
        """
        if self.total is None:
            self.total = lease.at
            self.whole = True
        elif lease.at < self._end_of(lease):
            raise Interrupted(f"the connection ended after {lease.at} of {self.total} bytes")
        self.whole = self.whole or self.present.prefix >= (self.total or 0)

    def release(self, lease: Lease) -> None:
        """The connection is done with its range."""
        if not lease.revoked:
            self._record(lease)
        self.leases.remove(lease)
        if self._abandoned:
            self.close()
        elif self._resetting and not self.leases:
            self._clear()
        elif self.whole and not self.leases:
            self.close()

    def replace(self, lease: Lease) -> None:
        """Give the rest of a lease's range to others."""
        self._record(lease)
        lease.revoke()

    def _record(self, lease: Lease) -> None:
        if self._journal is not None and lease.at > lease.recorded:
            self._journal.append(lease.recorded, lease.at)
        lease.recorded = lease.at

    def failed(self, lease: Lease, interruption: Interrupted, failures: int) -> float:
        """The seconds that a connection waits before its next request, after `failures` in a row.

        Raises:
            RetryableError: there were too many in a row, or the source requests a pause that is too long.
        """
        # Where other connections get on, the source works, and perhaps allows no more of them. And when many break at
        # once, that is one failure.
        counts = lease.started >= self._last_failure and not any(
            each.stream and not each.revoked for each in self.leases if each is not lease)
        if counts or interruption.after_s is not None:
            self._last_failure = time.monotonic()
            pause = self._patience.pause_after(interruption, failures)
        else:
            pause = self._patience.pause(failures)
        if lease.received >= ENOUGH and interruption.after_s is None:
            pause = 0.0
        log.log(logging.WARNING if counts or failures == 1 else logging.DEBUG, "%s: %s; trying again in %.1f s",
                shown(self.item.url), interruption, pause)
        if interruption.after_s is None:
            return pause
        self.not_before = max(self.not_before, time.monotonic() + pause)  # for all connections
        return 0.0

    # --- bytes -------------------------------------------------------------------------------------------------------

    def handle(self) -> int:
        """The open file, for writing."""
        if self._handle is None:
            self._handle = os.open(self.path, os.O_RDWR)
        return self._handle

    def close(self) -> None:
        """Close the file, unless a connection that was given up may still write to it."""
        if self.leases:
            return
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def abandon(self) -> None:
        """Change nothing more: the run has ended. What is there stays for the next one."""
        self._abandoned = True
        self.close()

    def start_over(self, *, one_stream: bool) -> None:
        """Drop all bytes, as soon as no connection writes any more."""
        self._one_stream = self._one_stream or one_stream
        self._resetting = True
        for each in self.leases:
            each.revoke()
        if not self.leases:
            self._clear()

    def _clear(self) -> None:
        self.progress.skip(-self.present.size)
        self._empty()
        self.present = Ranges()
        self.total, self.version, self.size_given = self.item.size, None, self.item.size is not None
        self.whole = self.resumed = self._opened = self._resetting = False
        self.answers = 0
        self.generation += 1
        self.digest, self.hashed = None, 0

    def _empty(self) -> None:
        """Empty the file. Its journal goes last: until then it names bytes that are not there, and is not believed."""
        if self.path == self.file:
            self.file.rename(self.partial)
            self.path = self.partial
        os.truncate(self.path, 0)
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        self.journal_path.unlink(missing_ok=True)

    # --- the digest --------------------------------------------------------------------------------------------------

    @property
    def hashable(self) -> int:
        """How many bytes can be added to the digest now."""
        if self.item.sha256 or (self.item.git_sha1 and self.total is not None):
            return self.present.prefix - self.hashed
        return 0

    @property
    def verifiable(self) -> bool:
        """Whether all bytes are there and in the digest."""
        return self.whole and not self._resetting and not self.hashable

    def new_digest(self) -> Any:
        """The digest of no bytes, of the kind that the item has."""
        if self.item.git_sha1 and not self.item.sha256:
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

    @property
    def uncertain(self) -> bool:
        """Whether wrong bytes may be due to how they came: the content behind the URL may have changed between pieces,
        a power cut may have torn the file, or a connection have ended early where no source gave the size."""
        return self.resumed or self.answers > 1 or not self.size_given

    def fetch_again(self) -> None:
        """Begin once more, through one connection, so that nothing has to fit together."""
        log.warning("%s: is not whole, or its pieces do not fit together: starting over", self.item.name)
        self.restarted = True
        self._furthest = 0
        self.start_over(one_stream=True)

    def finish(self) -> None:
        """Give the file its name."""
        self.close()
        self.journal_path.unlink(missing_ok=True)  # first: without it, a whole file is one
        if self.path != self.file:
            self.path.rename(self.file)

    def remove(self) -> None:
        """Leave nothing."""
        self.path.unlink(missing_ok=True)
        self.journal_path.unlink(missing_ok=True)
