"""A file on its way: which connection fetches which range, and what its source's answers and failures change.

No method blocks; the transfer's lock guards all of them.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path

from jobs.core import retries
from jobs.core.progress import Progress
from jobs.relocation.connection import CHUNK, Interrupted, Patience, Stream, shown
from jobs.relocation.partial import Partial
from jobs.relocation.ranges import Ranges
from jobs.relocation.sources.interface import Item

log = logging.getLogger("jobs")

# Bytes of one request. Smaller ones would spend their time waiting for the first byte; larger ones leave the digest far
# behind, which is made in the file's order. The last requests of a file are the smallest, so that all end together.
SMALLEST = 8 << 20
LARGEST = 128 << 20
RECORD = 1 << 20  # bytes of one connection after which the journal gets a line: at most so many are fetched again
ENOUGH = 1 << 16  # bytes that a connection brought before it broke, after which the next one need not wait
PAGE = 4096
LONG_S = 1.0  # a range that takes longer is divided when a connection has nothing else to do


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
    writing: bool = False  # its slowness is the volume's
    revoked: bool = False  # the range belongs to others now: nothing more may be written

    def revoke(self) -> None:
        """Take the range back, and end the connection if it is waiting."""
        self.revoked = True
        if self.stream is not None:
            self.stream.abort()


class Unfinished(Partial):
    """A file that is fetched, or verified, or both."""

    def __init__(self, item: Item, file: Path, progress: Progress) -> None:
        super().__init__(item, file)
        self.progress = progress
        self.leases: list[Lease] = []
        self.resumed = self.path == self.file or self.present.size > 0  # some bytes are of an earlier run
        self.answers = 0  # from how many answers of the source its bytes are
        self.size_given = self.total is not None  # by the item or an answer
        self.restarted = False  # it did not match its digest, and is fetched once more
        self.generation = 0  # counts how often it was begun
        self.pausing = 0  # connections that wait before they try again
        self.not_before = 0.0  # until then (time.monotonic) the source requests a pause, and there are no more
        self._limit = 0  # connections than so many
        self._paused: list[tuple[int, int, float]] = []  # the ranges for which it does: start, end and until when
        self._patience = Patience(shown(item.url))
        self._last_failure = 0.0
        self._furthest = self.present.size  # the most bytes that were ever there
        self._opened = False  # the source has answered, so that it is known whether it gives ranges
        self._one_stream = False  # it does not, or its ranges do not fit together
        self._any_version = False  # versions differ, perhaps because each of several servers has its own
        self._resetting = False
        self._abandoned = False
        progress.skip(self.present.size)

    def most_leases(self, connections: int) -> int:
        """For how many of the connections it may have a range at the same time."""
        return min(connections, 1 + (self.total or 0) // SMALLEST) if self.size_given else connections

    # --- ranges ------------------------------------------------------------------------------------------------------

    def lease(self, connections: int) -> Lease | None:
        """A range for a connection to fetch, if there is one right now. `connections` share what is left."""
        now, active = time.monotonic(), self._active()
        if self.whole or self._resetting or (now < self.not_before and len(active) >= self._limit):
            return None
        if self.pausing and not any(each.stream for each in active):
            return None  # the source is in trouble: others do not take the place of a connection that waits
        if active and (self._one_stream or not self._opened):
            return None
        self._paused = [each for each in self._paused if each[2] > now]
        taken = Ranges([*self.present, *((each.at, self._end_of(each)) for each in active),
                        *((start, end) for start, end, _ in self._paused)])
        gap = taken.first_gap(self.total) or self._split(active)
        if gap is None:
            return None
        start, end = gap
        if self.total is None or self._one_stream:
            end = None
        elif end is not None and self.total >= 2 * SMALLEST:
            end = self._shared(start, end, self.total - taken.size, connections)
        if start > self.present.prefix and not self.has_journal:
            self.begin_journal()
            for each in active:
                each.recorded = each.at
        to_the_end = end is None or end == self.total
        # What is fetched whole is not cut off at the size that it should have: it would hide that it is longer.
        lease = Lease(start, None if to_the_end and start == 0 else end, (start, None if to_the_end else end),
                      recorded=start)
        self.leases.append(lease)
        return lease

    def _split(self, active: list[Lease]) -> tuple[int, int] | None:
        """The second half of the range that would take longest, if that is long; its connection keeps the first."""
        now, longest, found = time.monotonic(), LONG_S, None
        for lease in active if self.total is not None and self.total >= 2 * SMALLEST else []:
            left = self._end_of(lease) - lease.at
            if lease.stream and lease.received and left >= 2 * CHUNK:
                seconds = left * (now - lease.started) / lease.received
                longest, found = max((longest, found), (seconds, lease), key=lambda each: each[0])
        if found is None:
            return None
        end = self._end_of(found)
        # Not less than a chunk from where it is: so many bytes it may just now be writing.
        found.end = found.at + -(-(end - found.at) // 2 // PAGE) * PAGE
        return found.end, end

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
        self.record(lease.recorded, lease.at)
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
        if counts:
            self._last_failure = time.monotonic()
        pause = self._patience.pause_after(interruption, failures, counts=counts)
        if lease.received >= ENOUGH and interruption.after_s is None:
            pause = 0.0
        log.log(logging.WARNING if counts or failures == 1 else logging.DEBUG, "%s: %s; trying again in %.1f s",
                shown(self.item.url), interruption, pause)
        if interruption.after_s is None:
            return pause
        # The pause is for this range, and for more connections than those that get on.
        until = time.monotonic() + max(pause, retries.FIRST_PAUSE_S)
        self.not_before, self._limit = max(self.not_before, until), len(self._active()) - 1
        if self.total is not None:
            self._paused.append((lease.at, self._end_of(lease), until))
        return 0.0

    def _active(self) -> list[Lease]:
        return [each for each in self.leases if not each.revoked]

    def close(self) -> None:
        """Close the file, unless a connection that was given up may still write to it."""
        if not self.leases:
            self.close_handles()

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
        self.empty()
        self.size_given = self.item.size is not None
        self.whole = self.resumed = self._opened = self._resetting = False
        self.answers, self._paused = 0, []
        self.generation += 1

    @property
    def verifiable(self) -> bool:
        """Whether all bytes are there and in the digest."""
        return self.whole and not self._resetting and not self.hashable

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
