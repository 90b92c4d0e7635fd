"""Files: digests, sizes, what a folder holds, and writing so that a reader never sees half of anything."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from io import BufferedReader
from pathlib import Path

from jobs.core.errors import UserError


def sha256_of(file: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with open_regular(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def open_regular(file: Path) -> BufferedReader:
    """Open a regular file, or a link to one, to read its bytes. Opening a FIFO would wait for a writer for ever.

    Raises:
        UserError: when it is a FIFO, a socket or a device.
    """
    require_regular(file)
    return file.open("rb")


def require_regular(file: Path) -> None:
    """Refuse what exists and is neither a regular file nor a link to one.

    Raises:
        UserError: naming the file and what it is.
    """
    mode = file.stat().st_mode if file.exists() else stat.S_IFREG
    kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
    if not stat.S_ISREG(mode):
        raise UserError(f"{file}: is {kinds.get(stat.S_IFMT(mode), 'a device')}, not a regular file. Put a file with "
                        "the content there")


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
