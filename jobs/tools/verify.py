"""Verify every artifact on the volumes in full: what stages do not repeat for artifacts that have a seal.

Each byte is read from the disk and not from memory, where it may still be as it was written. What is damaged loses its
seal, so that no stage uses it; what is whole gets one.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from jobs.core import artifacts
from jobs.core.errors import UserError
from jobs.core.files import human_bytes
from jobs.core.layout import CHECKPOINTS, TENSORBOARD
from jobs.core.progress import Progress
from jobs.core.promotion import DIGEST

log = logging.getLogger("jobs")

DESCRIPTION = """\
Read every artifact on the volumes and compare it with its manifest: every file's
presence, size and sha256, and the name of the artifact with what it was made from.
Damage is reported with the path of the artifact, and ends the command with 2.
"""


def run(volumes: Path, chosen: Sequence[str]) -> None:
    """Verify the artifacts that are chosen, or all.

    Args:
        chosen: paths of artifacts, KIND/DIGEST, or KIND.
    Raises:
        UserError: with a line for each artifact that is damaged; or what was chosen is not there.
    """
    if not any(path.is_dir() for path in volumes.glob("*")):
        raise UserError(f"{volumes}: holds no volumes. Name the folder in which they are mounted: --volumes DIR")
    found = list(find(volumes))
    for name in chosen:
        if not any(_is(folder, name) for folder in found):
            raise UserError(f"{name}: no such artifact below {volumes}. Name KIND/DIGEST, KIND, or an artifact's path")
    wanted = [folder for folder in found if not chosen or any(_is(folder, name) for name in chosen)]
    damaged, verified, read = [], 0, 0
    progress = Progress("read", sum(map(_size, wanted)), human_bytes)
    for number, folder in enumerate(wanted, 1):
        inode = folder.stat().st_ino if folder.exists() else None
        try:
            size = _verify(folder, progress)
        except UserError as error:
            if not folder.exists() or folder.stat().st_ino != inode:
                continue  # retention removed it meanwhile, or a stage replaced it, which verified the new one
            damaged.append(str(error))
            log.error("%d/%d %s", number, len(wanted), error)
        else:
            verified, read = verified + 1, read + size
            log.info("%d/%d %s/%s: verified (%s)", number, len(wanted), folder.parent.name, folder.name,
                     human_bytes(size))
    progress.finish()
    log.info("%d of %d artifacts verified (%s read), %d damaged", verified, len(wanted), human_bytes(read),
             len(damaged))
    if damaged:
        raise UserError("\n".join(damaged))


def find(volumes: Path) -> Iterator[Path]:
    """The artifacts on the volumes, `<volume>/<kind>/<digest>`, sorted; also those without a manifest."""
    for folder in sorted(volumes.glob("*/*/*")):
        if DIGEST.fullmatch(folder.name) and folder.parent.name not in (CHECKPOINTS, TENSORBOARD) and folder.is_dir():
            yield folder


def _is(folder: Path, name: str) -> bool:
    kind = folder.parent.name
    return name in (kind, f"{kind}/{folder.name}") or Path(name).absolute() == folder.absolute()


def _size(folder: Path) -> int:
    """Bytes of everything in a folder, as far as it can be seen."""
    try:
        return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
    except OSError:
        return 0


def _verify(folder: Path, progress: Progress) -> int:
    """Verify one artifact; returns its bytes."""
    for file in artifacts.files_of(folder):
        forget(file)
    artifact = artifacts.read(folder, by="sealing", progress=progress.add)
    return sum(file["size"] for file in artifact.manifest["files"])


def forget(file: Path) -> None:
    """Drop what the kernel has of a file in memory, where the file system can."""
    handle = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError:
        pass
    finally:
        os.close(handle)
