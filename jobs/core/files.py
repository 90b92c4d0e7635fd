"""Files: digests, sizes, listings, safe reads of files from other users, and atomic writes."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import IO, Literal

from jobs.core.errors import UserError


def sha256_of(file: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with open_plain(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


_noted: dict[tuple[int, int, int, int], str] = {}  # sha256 of files that this process has read


def note_sha256(file: Path, sha256: str) -> None:
    """Remember the digest of a file whose bytes were just read, for `noted_sha256`."""
    _noted[_identity(file)] = sha256


def noted_sha256(file: Path) -> str:
    """The sha256 of a file's bytes, in hex; from memory if this process noted it and the file was not written since.

    For a file that this process itself has made and still alone knows: a large download is not read twice.
    """
    return _noted.get(_identity(file)) or sha256_of(file)


def _identity(file: Path) -> tuple[int, int, int, int]:
    """What another name or other permissions leave as it is, and a write does not."""
    found = file.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def open_plain(file: Path) -> BufferedReader:
    """Open a plain file, or a link to one, to read its bytes. Opening a FIFO would wait for a writer for ever.

    Raises:
        UserError: when it is a FIFO, a socket or a device.
    """
    require_plain(file)
    return file.open("rb")


def require_plain(file: Path) -> None:
    """Refuse what exists and is neither a plain file nor a link to one.

    Raises:
        UserError: naming the file and what it is.
    """
    mode = file.stat().st_mode if file.exists() else stat.S_IFREG
    kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
    if not stat.S_ISREG(mode):
        raise UserError(f"{file}: is {kinds.get(stat.S_IFMT(mode), 'a device')}, not a plain file. Put a file with "
                        "the content there")


def visible_files(folder: Path) -> list[str]:
    """The paths of the files below `folder`, relative to it and sorted, without hidden files and folders."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".")]
        found += [(Path(parent) / f).relative_to(folder).as_posix() for f in files if not f.startswith(".")]
    return sorted(found)


def read_plain_file(file: Path, limit: int, *, tail: bool = False, follow_links: bool = False) -> bytes:
    """The bytes of a file that another user may have put there. Never blocks, and takes no more memory than `limit`.

    Args:
        limit: how many bytes are read at most.
        tail: of a larger file, read the last `limit` bytes instead of refusing it.
        follow_links: also read what a link points to, as a ConfigMap's files need.
    Raises:
        UserError: it is not a plain file, or is larger than `limit`.
        OSError: it is not there or cannot be read; `filename` is set.
    """
    with _plain_file(file, os.O_RDONLY, "rb", follow_links=follow_links) as stream:
        size = os.fstat(stream.fileno()).st_size
        if tail and size > limit:
            stream.seek(size - limit)
            return stream.read(limit)
        content = stream.read(limit + 1) or b""  # None: a file of the kernel that has nothing right now
    if len(content) > limit:
        raise UserError(f"{file}: has {human_bytes(max(size, len(content)))}, and at most {limit} bytes are read")
    return content


def append_line(file: Path, line: str) -> None:
    """Append a line to a text file and sync it. If an interrupted writer left half a line, that one is ended first.

    Raises:
        UserError: it is not a plain file.
        OSError: it cannot be written; `filename` is set.
    """
    with _plain_file(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, "r+b") as stream:
        end = stream.seek(0, os.SEEK_END)
        torn = end > 0 and os.pread(stream.fileno(), 1, end - 1) != b"\n"
        stream.write((b"\n" if torn else b"") + line.encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


@contextmanager
def _plain_file(file: Path, flags: int, mode: Literal["rb", "r+b"], *,
                follow_links: bool = False) -> Iterator[IO[bytes]]:
    """Open a plain file; errors name it. Without O_NONBLOCK, opening a named pipe would wait for its other end."""
    flags |= os.O_NONBLOCK | os.O_NOCTTY | (0 if follow_links else os.O_NOFOLLOW)
    handle = None
    try:
        handle = os.open(file, flags, 0o666)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise UserError(f"{file}: is not a plain file")
        with os.fdopen(handle, mode, closefd=False) as stream:
            yield stream
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):  # a link; a socket, or a pipe without a reader
            raise UserError(f"{file}: is not a plain file") from None
        error.filename = str(file)
        raise
    finally:
        if handle is not None:
            os.close(handle)


def write_atomically(file: Path, text: str) -> None:
    """Write a text file so that readers see the old content or the new, never a part."""
    # Not named by the process: its number is 1 in every container. Not by `tempfile`: others could not read it.
    draft = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    try:
        with draft.open("x", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(file)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
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
                        "Enlarge it, or lower `retention.keep` in environment.yaml. Nothing was published")


def human_bytes(count: float) -> str:
    """Bytes as people read them: 3.4 MB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"
