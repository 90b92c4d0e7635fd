"""Seals: the proof that an artifact's files were verified once, and did not change since.

To read every byte of a 16 GB model at the start of every stage takes minutes on network storage. So after the files of
a large artifact were compared with its manifest, `.verified-<digest>` is written beside it, with the sha256 of the
manifest and, of every file, what the volume changes with it: size, times of modification and change, inode number.
Where all of it is still the same, no file was written, replaced or restored since, whoever did it with whatever time of
modification: the time of change cannot be set. Otherwise the files are read again.

What a seal does not show, and the scheduled full verification does (`python -m jobs verify`): a disk that gives other
bytes than were written. What neither shows: a seal or a manifest that somebody forged who may write to the volume. That
is what signatures are for (signing.py). So what must be signed is read in full, and serving reads what it loads in any
case.

- The times are the volume's own, never a node's clock. A change within the resolution of its times (2 s on the
  coarsest) would not show, so files that changed less than that before their verification began are not sealed.
- The number of the device is left out: it differs between nodes. Where inode numbers do, too (some FUSE drivers), no
  seal is valid elsewhere, and every stage reads everything, as it did without seals.
- Files are opened before they are looked at, because NFS asks its server then.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from jobs.core.errors import UserError
from jobs.core.files import read_plain_file, write_atomically
from jobs.core.layout import MANIFEST_BYTES, SEAL, seal_file

LARGE = 64 * 2**20  # bytes of an artifact; smaller ones are read faster than it is worth to seal them
RESOLUTION_NS = 2 * 10**9
FORMAT = 1
ABANDONED_SECONDS = 3600

State = dict[str, list[int]]  # by path below the artifact: size, mtime, ctime, inode


def state_of(folder: Path, files: Sequence[Path]) -> State:
    """What the volume has about each of an artifact's files now.

    Raises:
        UserError: one is not a plain file.
        OSError: one cannot be opened.
    """
    return {file.relative_to(folder).as_posix(): _state(file) for file in files}


def _state(file: Path) -> list[int]:
    handle = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        found = os.fstat(handle)
    finally:
        os.close(handle)
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{file}: is not a plain file; an artifact holds files and folders only")
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def size_of(state: State) -> int:
    """Bytes of all files."""
    return sum(size for size, *_ in state.values())


def is_large(state: State) -> bool:
    """Whether files are worth a seal."""
    return size_of(state) >= LARGE


def is_sealed(artifact: Path, manifest: bytes, state: State) -> bool:
    """Whether the artifact has a seal for this manifest and this state of its files."""
    try:
        seal = json.loads(read_plain_file(seal_file(artifact), MANIFEST_BYTES))
        return bool(seal == _content(manifest, state))
    except (OSError, UserError, ValueError, RecursionError):  # none, or a damaged one
        return False


@dataclass(frozen=True)
class Sealing:
    """A verification that ends with a seal, if the files allow it."""

    artifact: Path
    manifest: bytes
    before: State  # of the files when their verification began
    began_ns: int | None  # when that was, by the volume's clock; None where nothing can be written

    def end(self, after: State) -> str | None:
        """Record that the files, whose state is `after` now, were verified. Returns why not, in words."""
        if self.began_ns is None:
            return "not sealed: the volume cannot be written here"
        if self.before != after or self.began_ns - newest(after) < RESOLUTION_NS:
            return "not sealed: its files changed just now"
        try:
            write_atomically(seal_file(self.artifact), json.dumps(_content(self.manifest, after)) + "\n")
        except OSError as error:
            return f"not sealed: {error.strerror}"
        return None


def begin(artifact: Path, manifest: bytes, before: State) -> Sealing:
    """To be called before the files are read. An old seal is removed: what is damaged must not have one."""
    with suppress(OSError):
        seal_file(artifact).unlink(missing_ok=True)
    return Sealing(artifact, manifest, before, now_ns(artifact.parent))


def newest(state: State) -> int:
    """When the last one of the files changed, in nanoseconds of the volume's time."""
    return max((ctime for _, _, ctime, _ in state.values()), default=0)


def now_ns(folder: Path) -> int | None:
    """The volume's time, of which its files' times are made; None where nothing may be written."""
    probe = folder / f"{SEAL}time-{os.urandom(8).hex()}"
    try:
        with probe.open("xb") as stream:
            stream.write(b"0")
            stream.flush()
            os.fsync(stream.fileno())  # of a written file, NFS has its server's time
            found = os.fstat(stream.fileno()).st_ctime_ns
        probe.unlink()
    except OSError:
        return None
    return found


def settle(draft: Path, state: State) -> tuple[State, int] | None:
    """Wait until the files of a large draft can be sealed if they are read from now on, at most for twice the
    resolution of times. Returns what `Sealing` needs to know of them; None for a small one.

    The wait is a loop, because times of a volume come in steps: since Linux 6.13, a file that was looked at has a finer
    time than a new one, which can seem older by a step of the kernel's clock.
    """
    if not is_large(state):
        return None
    deadline = time.monotonic_ns() + 2 * RESOLUTION_NS  # a clock that was set back would be waited for too long
    while (now := now_ns(draft.parent)) and (missing := newest(state) + RESOLUTION_NS - now) > 0:
        left = deadline - time.monotonic_ns()
        if left <= 0:
            break
        time.sleep(min(missing, left) / 1e9)
    return (state, now) if now else None


def remove_orphans(folder: Path) -> None:
    """Remove the seals in the folder of a kind whose artifacts are gone, and what a kill left of them."""
    without = [file for file in folder.glob(f"{SEAL}*") if not (folder / file.name.removeprefix(SEAL)).exists()]
    for file in [*without, *folder.glob(f".{SEAL}*")]:  # the latter: `write_atomically` names drafts so
        with suppress(OSError):  # another process was first
            if time.time() - file.stat().st_mtime > ABANDONED_SECONDS:
                file.unlink()


def _content(manifest: bytes, state: Mapping[str, list[int]]) -> dict[str, object]:
    return {"format": FORMAT, "manifest": hashlib.sha256(manifest).hexdigest(),
            "files": {path: list(values) for path, values in state.items()}}
