"""Transfers: threads that fetch ranges of files, threads that make the digests, and what happens when a source fails.

A thread that fetches writes what it reads and does nothing else. Digests follow in the file's order, read from the part
that is already written without a gap, which the operating system still has in memory: each byte is read back once, and
on a slow volume or network the digest is made when the last byte arrives.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.core.errors import RetryableError, UserError
from jobs.core.files import human_bytes, require_space
from jobs.core.progress import Progress
from jobs.relocation import sources, unfinished
from jobs.relocation.connection import CHUNK, Interrupted, Stream, log, shown
from jobs.relocation.unfinished import Lease, Unfinished

DIGESTS = 4  # files whose digests are made at the same time
DIGEST_STEP = 4 << 20  # a digest goes on when so many bytes are there
DIGEST_TURN = 64 << 20  # after so many, other files have their turn
# A connection is replaced if, for this long, it was slower than this share of what others have.
SLOW_S = 10.0
SLOW_SHARE = 0.1
SLOWEST = 1000.0  # bytes a second: likewise, if there is nothing to compare it with
TICK_S = 0.5
END_S = 5.0  # how long threads have to end after a failure


class Transfer:
    """Fetches files into a folder and verifies them.

    Args:
        folder: for messages about its volume.
        connections: how many there are at the same time, at most, for all files.
    """

    def __init__(self, files: list[Unfinished], folder: Path, progress: Progress, connections: int) -> None:
        self.files, self.folder, self.progress, self.connections = files, folder, progress, connections
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)  # there may be a range to fetch
        self._hashable = threading.Condition(self._lock)  # there are bytes for a digest
        self._end = threading.Condition(self._lock)  # all is done, or failed
        self._waiting = [file for file in files if not file.whole]
        self._left = len(files)
        self._queue: deque[Unfinished] = deque()  # whose digests can go on
        self._queued: set[Unfinished] = set()  # those, and those that a thread has
        self._error: BaseException | None = None
        self._stopped = False
        self._since = time.monotonic()  # connections are compared since then
        self._rates: list[float] = []  # of leases that ended since then, in bytes a second
        self._typical = 0.0  # what a connection had in the time before
        self._marks: dict[Lease, int] = {}  # what each had received then

    def run(self) -> None:
        """Fetch all files.

        Raises:
            UserError: a digest is wrong, a source denies access, or the volume is too small.
            RetryableError: a source does not recover.
            OSError: the disk fails.
        """
        fetching = min(self.connections, sum(file.most_leases(self.connections) for file in self.files))
        threads = [threading.Thread(target=self._guarded, args=(work,), daemon=True)
                   for work in [self._fetch] * fetching + [self._digest] * min(DIGESTS, len(self.files))]
        with self._lock:
            for file in self.files:
                self._offer(file)
        for thread in threads:
            thread.start()
        try:
            with self._lock:
                while self._left and not self._stopped:
                    self._end.wait(TICK_S)
                    self._replace_slow()
                    self._work.notify_all()  # a range may have turned out to take long
        finally:
            self._stop(threads)
        if self._error is not None:
            raise self._error

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            with self._lock:
                self._error = self._error or error
                self._stopped = True
                self._end.notify_all()

    def _stop(self, threads: list[threading.Thread]) -> None:
        """End the threads. One that sleeps, or whose source does not answer, ends later, and writes nothing."""
        with self._lock:
            self._stopped = True
            for file in self.files:
                for lease in file.leases:
                    file.replace(lease)
            for condition in (self._work, self._hashable):
                condition.notify_all()
        deadline = time.monotonic() + (END_S if self._left else 0)
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        with self._lock:
            for file in self.files:
                file.abandon()

    # --- fetching ----------------------------------------------------------------------------------------------------

    def _fetch(self) -> None:
        """What one connection does: range after range."""
        failures = 0  # in a row
        while True:
            file, lease = self._next_lease()
            if file is None or lease is None:
                return
            pause = 0.0
            try:
                self._fetch_range(file, lease)
                failures = 0
            except Interrupted as interruption:
                failures = 1 if lease.received else failures + 1
                with self._lock:
                    if not self._stopped and not (lease.revoked and lease.stream):  # then its range is with others
                        pause = file.failed(lease, interruption, failures)
                        file.pausing += pause > 0
            finally:
                self._release(file, lease)
            if pause:
                time.sleep(pause)
                with self._lock:
                    file.pausing -= 1
                    self._work.notify_all()

    def _next_lease(self) -> tuple[Unfinished, Lease] | tuple[None, None]:
        """The next range to fetch; waits while others have them all."""
        with self._lock:
            while self._left and not self._stopped:
                for file in self._waiting:
                    lease = file.lease(self.connections)
                    if lease:
                        return file, lease
                pauses = [file.not_before - time.monotonic() for file in self._waiting]
                self._work.wait(min((max(pause, 0.01) for pause in pauses if pause > 0), default=None))
        return None, None

    def _fetch_range(self, file: Unfinished, lease: Lease) -> None:
        start, end = lease.request
        with sources.open_range(file.item.url, start, end, file.headers(lease)) as stream:
            with self._lock:
                if lease.revoked:
                    return
                self._answered(file, lease, stream)
                handle = file.handle()
            while chunk := stream.read():
                with self._lock:
                    if lease.revoked:
                        return
                    room = file.room(lease)
                    lease.writing = True
                chunk = chunk if room is None else chunk[:room]
                _write(handle, chunk, lease.at, file.path)  # an error here is the disk's, not the source's
                with self._lock:
                    lease.writing = False
                    if lease.revoked:
                        return
                    file.wrote(lease, len(chunk))
                    self._offer(file)
                    if file.whole or (lease.end is not None and lease.at >= lease.end):
                        return
            with self._lock:
                if not lease.revoked:
                    file.ended(lease)
                    self._offer(file)

    def _answered(self, file: Unfinished, lease: Lease, stream: Stream) -> None:
        """Learn from an answer; where it is the first to give the file's size, look whether that has room."""
        unknown = file.total is None
        file.answered(lease, stream, self.connections)
        if unknown and file.total is not None:
            require_space(self.folder, sum(each.missing for each in self.files))
            self._count()
        self._work.notify_all()  # the file may have ranges for other connections, now that its source has answered

    def _count(self) -> None:
        """Give the progress its total, once all are known."""
        totals = [file.total for file in self.files]
        self.progress.total = None if None in totals else sum(total for total in totals if total is not None)

    def _release(self, file: Unfinished, lease: Lease) -> None:
        with self._lock:
            file.release(lease)
            self._marks.pop(lease, None)
            seconds = time.monotonic() - lease.started
            if lease.received >= unfinished.SMALLEST and seconds:
                self._rates.append(lease.received / seconds)
            self._work.notify_all()

    def _replace_slow(self) -> None:
        """End connections that are far slower than the others; new ones go on where they stopped."""
        now = time.monotonic()
        if now - self._since < SLOW_S:
            return
        leases = [(file, lease) for file in self._waiting for lease in file.leases if not lease.revoked]
        rates = {lease: (lease.received - self._marks[lease]) / (now - self._since)
                 for _, lease in leases if lease in self._marks}
        known = [*self._rates, *rates.values()]
        typical = statistics.median_high(known) if len(known) > 1 else self._typical
        for file, lease in leases:
            # One that waits for its first byte is not slow yet.
            least = max(typical * SLOW_SHARE, SLOWEST if len(known) == 1 and lease.received else 0.0)
            if lease in rates and rates[lease] < least and file.replaceable and not lease.writing:
                others = f" where others bring {human_bytes(typical)}/s" if typical else ""
                log.info("%s: a connection brings %s/s%s: replacing it", shown(file.item.url),
                         human_bytes(rates[lease]), others)
                file.replace(lease)
                self._work.notify_all()
        # A network that has become slow as a whole is not taken for slow connections for ever.
        self._typical = typical if len(known) > 1 else max([typical / 2, *known])
        self._since, self._rates = now, []
        self._marks = {lease: lease.received for _, lease in leases if not lease.revoked}

    # --- digests -----------------------------------------------------------------------------------------------------

    def _offer(self, file: Unfinished) -> None:
        """Queue a file whose digest can go on."""
        if file not in self._queued and (file.verifiable or file.hashable >= DIGEST_STEP
                                         or (file.whole and file.hashable)):
            self._queued.add(file)
            self._queue.append(file)
            self._hashable.notify()

    def _digest(self) -> None:
        """What a thread does that makes digests: a piece of a file after another."""
        buffer = memoryview(bytearray(CHUNK))
        while True:
            with self._lock:
                while not self._queue:
                    if self._stopped or not self._left:
                        return
                    self._hashable.wait()
                if self._stopped:
                    return
                file = self._queue.popleft()
                generation, start, digest = file.generation, file.hashed, file.digest or file.new_digest()
                end = start + min(file.hashable, DIGEST_TURN)
                path = file.path
            complete = _update(digest, path, start, end, buffer)
            with self._lock:
                if file.generation == generation:
                    if not complete:
                        raise RetryableError(f"{path}: another process changed it while it was fetched")
                    file.digest, file.hashed = digest, end
                self._queued.discard(file)
                if file.verifiable and not self._stopped:
                    self._verify(file)
                else:
                    self._offer(file)

    def _verify(self, file: Unfinished) -> None:
        """Give a file its name, or fetch it once more if it may have been fetched wrongly.

        Raises:
            UserError: it is another file.
        """
        wrong = file.wrong()
        if wrong is None:
            file.finish()
            self._left -= 1
            if file in self._waiting:
                self._waiting.remove(file)
            if not self._left:
                for condition in (self._work, self._hashable, self._end):
                    condition.notify_all()
        elif file.uncertain and not file.restarted:
            file.fetch_again()
            self._count()
            if file not in self._waiting:
                self._waiting.append(file)
            self._work.notify_all()
        else:
            file.remove()
            raise UserError(wrong)


def _write(handle: int, data: bytes, at: int, path: Path) -> None:
    view = memoryview(data)
    try:
        while view:
            written = os.pwrite(handle, view, at)
            view, at = view[written:], at + written
    except OSError as error:
        error.filename = str(path)  # of a handle, it is not known
        raise


def _update(digest: Any, path: Path, start: int, end: int, buffer: memoryview) -> bool:
    """Add a part of a file to a digest. Returns False if the file has become shorter: it is being fetched anew."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        while start < end:
            count = os.preadv(handle, [buffer[:end - start]], start)
            if not count:
                return False
            digest.update(buffer[:count])
            start += count
        return True
    finally:
        os.close(handle)
