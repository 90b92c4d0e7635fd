"""Locks among processes, pods and nodes: files on the volume that `flock` locks.

`flock`, because the kernel releases a lock when its holder dies. Over NFS, the server does. An NFSv3 server can keep
the lock of a failed node for ever, so waiting for a lock always has a deadline.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jobs.core.errors import RetryableError

log = logging.getLogger("jobs")

PROGRESS_SECONDS = 60.0


@contextmanager
def hold(file: Path, deadline_s: float, action: str, poll_s: float = 1.0) -> Iterator[None]:
    """Hold the lock on `file`, which is made if it is not there.

    Args:
        deadline_s: how long to wait for another holder, in seconds.
        action: what the holder does, as it follows "another process": "makes adapter/81e9dc13a516d878".
    Raises:
        RetryableError: when the deadline passed, or the volume cannot lock files. Names the file and what to do.
    """
    started = reported = time.monotonic()
    waiting = False
    while (handle := _try(file)) is None:
        now = time.monotonic()
        if now - started > deadline_s:
            raise RetryableError(
                f"waited {deadline_s:.0f} s because another process {action}: {file} is locked. If no such process "
                "runs any more (over NFSv3 the lock of a node that died stays), remove that file; the next attempt "
                "goes on")
        if not waiting or now - reported > PROGRESS_SECONDS:
            log.info("another process %s: waiting for it (%.0f of at most %.0f s)", action, now - started, deadline_s)
            waiting, reported = True, now
        time.sleep(min(poll_s, max(0.01, deadline_s)))
    try:
        yield
    finally:
        os.close(handle)


@contextmanager
def hold_if_free(file: Path) -> Iterator[bool]:
    """Hold the lock on `file` unless another process does; yields whether it is held here."""
    handle = _try(file)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            os.close(handle)


def _try(file: Path) -> int | None:
    """Lock the file and return its handle; None when another process holds it.

    The file is opened at each attempt, and must still have its name once it is locked: a lock that hangs is ended by
    removing its file.
    """
    handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), file.lstat()):
            return handle
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError as error:
        os.close(handle)
        raise RetryableError(f"{file}: cannot be locked: {error.strerror}. The volume's file system must support file "
                             "locks (NFS: its lock service must run)") from None
    os.close(handle)
    return None
