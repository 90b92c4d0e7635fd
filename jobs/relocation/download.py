"""Downloads: bring files into a folder, verify each against its digest, and resume after interruptions.

A file is written as `NAME.partial` and gets its name only once its digest is the expected one, so a kill at any moment
leaves bytes that the next run continues from, and never a wrong file. Files, and ranges of large files, come through
several connections at a time (transfer.py). Every source goes this way, the hub too: hf_hub_download (2.4) discards a
partial download when its process dies, which is costly for a 16 GB model, and does not verify digests.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from jobs.core.files import human_bytes, require_space
from jobs.core.progress import Progress
from jobs.relocation import connection
from jobs.relocation.partial import leftovers
from jobs.relocation.sources.interface import Item
from jobs.relocation.transfer import Transfer
from jobs.relocation.unfinished import Unfinished


def fetch(items: Iterable[Item], folder: Path) -> None:
    """Bring `items` into `folder`, continuing what an earlier run left there, and verify each.

    Raises:
        UserError: a digest is wrong (both are named), the source denies access, or the volume is too small.
        RetryableError: the source does not recover.
        OSError: the disk fails, e.g. it is full.
    """
    progress = Progress("fetched", None, human_bytes)
    files = [Unfinished(item, folder / item.name, progress) for item in items]
    require_space(folder, sum(file.missing for file in files))
    if all(file.size_given for file in files):
        progress.total = sum(file.total or 0 for file in files)
    Transfer(files, folder, progress, connection.CONNECTIONS).run()
    progress.finish()


def remove_others(folder: Path, items: Iterable[Item]) -> None:
    """Remove what does not belong in `folder`: leftovers of an interrupted run, or of another version of this code."""
    names = {name for item in items for name in (item.name, *leftovers(item.name))}
    for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder comes before the folder
        if path.is_dir() and not path.is_symlink():
            with suppress(OSError):  # not empty: it holds an item
                path.rmdir()
        elif path.relative_to(folder).as_posix() not in names:
            path.unlink()
