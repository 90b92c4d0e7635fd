"""Downloads: bring files into a folder, verify each against its digest, and resume after interruptions.

A file is written as `NAME.partial` and gets its name only once its digest is the expected one, so a kill at any moment
leaves bytes that the next run continues from, and never a wrong file. Every URL goes through fsspec, the hub's too:
hf_hub_download (2.4) discards a partial download when its process dies, which is costly for a 16 GB model.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from jobs.core.errors import UserError
from jobs.core.files import human_bytes, require_space, sha256_of
from jobs.core.progress import Progress
from jobs.relocation import sources
from jobs.relocation.connection import Interrupted, Patience, mismatch, shown
from jobs.relocation.sources.interface import Item

log = logging.getLogger("jobs")

PARTIAL = ".partial"


def fetch(items: Iterable[Item], folder: Path) -> None:
    """Bring `items` into `folder`, continuing what an earlier run left there, and verify each.

    Raises:
        UserError: a digest is wrong (both are named), the source denies access, or the volume is too small.
        RetryableError: the source does not recover.
        OSError: the disk fails, e.g. it is full.
    """
    todo = [item for item in items if not _there(item, folder / item.name)]
    here = sum(_size(_partial(folder / item.name)) for item in todo)
    known = [item.size for item in todo if item.size is not None]
    require_space(folder, max(0, sum(known) - here))
    progress = Progress("fetched", sum(known) if len(known) == len(todo) else None, human_bytes)
    for item in todo:
        _fetch(item, folder / item.name, progress)
    progress.finish()


def remove_others(folder: Path, items: Iterable[Item]) -> None:
    """Remove what does not belong in `folder`: leftovers of an interrupted run, or of another version of this code."""
    names = {name for item in items for name in (item.name, item.name + PARTIAL)}
    for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder comes before the folder
        if path.is_dir() and not path.is_symlink():
            with suppress(OSError):  # not empty: it holds an item
                path.rmdir()
        elif path.relative_to(folder).as_posix() not in names:
            path.unlink()


def _partial(file: Path) -> Path:
    return file.with_name(file.name + PARTIAL)


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _there(item: Item, file: Path) -> bool:
    """Whether an earlier run already brought the file. Its bytes are read again, since a power cut can lose them."""
    if not file.exists():
        return False
    if _wrong(item, file) is None:
        return True
    file.unlink()
    return False


def _wrong(item: Item, file: Path) -> str | None:
    """Why the file is not the item, naming both digests; None when it is."""
    if item.sha256:
        expected, found = item.sha256, sha256_of(file)
    elif item.git_sha1:
        content = file.read_bytes()  # small: the hub keeps large files in LFS
        expected, found = item.git_sha1, hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # noqa: S324
    else:
        expected, found = f"{item.size} bytes", f"{_size(file)} bytes"
        if item.size is None:
            return None
    return None if found == expected else mismatch(shown(item.url), item.pinned_in, expected, found)


def _fetch(item: Item, file: Path, progress: Progress) -> None:
    """Download, verify and name one file. A file that may not be whole is downloaded once more on a mismatch:
    the content behind the URL may have changed between the pieces, a power cut may have torn the partial file, or a
    connection have ended early where no server gave the size."""
    partial = _partial(file)
    partial.parent.mkdir(parents=True, exist_ok=True)
    uncertain = _download(item, partial, progress)
    wrong = _wrong(item, partial)
    if wrong and uncertain:
        log.warning("%s: is not whole, or its pieces do not fit together: starting over", item.name)
        progress.skip(-_size(partial))
        partial.unlink()
        _download(item, partial, progress)
        wrong = _wrong(item, partial)
    if wrong:
        partial.unlink()
        raise UserError(wrong)
    partial.rename(file)


def _download(item: Item, partial: Path, progress: Progress) -> bool:
    """Append to `partial` until it is whole. Returns whether it came in more than one answer, or without its size."""
    patience = Patience(shown(item.url))
    partial.touch()
    have = furthest = _size(partial)
    resumed = have > 0
    if resumed:
        log.info("%s: continuing after %s", item.name, human_bytes(have))
        progress.skip(have)
    total = item.size  # bytes of the whole file, once known
    while total is None or have < total:
        try:
            with sources.open_range(item.url, have, None, item.headers) as stream, partial.open("ab") as out:
                if stream.start and total is not None and stream.total not in (None, total):
                    out.truncate(0)
                    progress.skip(-have)
                    have = 0
                    raise Interrupted(f"the content changed: it had {total} bytes, now it has {stream.total}")
                if stream.start != have:  # the server cannot resume
                    out.truncate(stream.start)
                    progress.skip(stream.start - have)
                    have = stream.start
                resumed = have > 0
                if item.size is None and stream.total is not None:
                    require_space(partial.parent, stream.total - have)
                    total = progress.total = stream.total
                while chunk := stream.read():
                    out.write(chunk)  # here an error is the disk's, not the source's: it is not caught
                    have += len(chunk)
                    progress.add(len(chunk))
                    if item.size is not None and have > item.size:
                        return resumed  # more than there should be: the digest will not match
            if total is not None and have < total:
                raise Interrupted(f"the connection ended after {have} of {total} bytes")
            return resumed or total is None
        except Interrupted as interruption:
            if have > furthest:
                furthest = have
                patience.reset()
            patience.wait(interruption)
    return resumed
