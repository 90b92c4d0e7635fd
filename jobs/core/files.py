"""Files: digests, sizes, what a folder holds, and writing so that a reader never sees half of anything."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from jobs.core.errors import UserError


def sha256_of(file: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def visible_files(folder: Path) -> list[str]:
    """The paths of the files below `folder`, relative to it and sorted, without hidden files and folders."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".")]
        found += [(Path(parent) / f).relative_to(folder).as_posix() for f in files if not f.startswith(".")]
    return sorted(found)


def write_atomically(file: Path, text: str) -> None:
    """Write a text file so that readers see the old content or the new, never a part."""
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    with draft.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    draft.replace(file)
    sync_folder(file.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def require_space(folder: Path, needed: int) -> None:
    """Refuse to start writing `needed` bytes that the volume cannot hold.

    Raises:
        UserError: naming the folder, what is needed and what is free.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"{folder}: {human_bytes(needed)} are needed, but {human_bytes(free)} are free on this volume. "
                        "Enlarge it, or lower `retention.keep` in pipeline.yaml. Nothing was published")


def human_bytes(count: float) -> str:
    """Bytes as people read them: 3.4 MB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"
