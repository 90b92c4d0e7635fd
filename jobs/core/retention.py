"""Retention: removes old artifacts from a volume, so that it does not fill up.

- Of each kind of artifact, `retention.keep` for each adapter name stay: the most recently used ones.
- What is promoted stays, with all that was made from it, and so does what is damaged: it may be evidence.
- Abandoned drafts, checkpoints and TensorBoard runs are removed by age.
- Anything that another process holds a lock on is never touched.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from jobs.core import seals
from jobs.core.errors import RetryableError, UserError
from jobs.core.layout import (
    CHECKPOINTS,
    DRAFT,
    MANIFEST,
    TENSORBOARD,
    draft_folder,
    lock_file,
    read_manifest,
    seal_file,
)
from jobs.core.locks import hold_if_free
from jobs.core.promotion import DIGEST, promoted_digests

log = logging.getLogger("jobs")

# A draft that did not change for this long belongs to a job that does not come back.
ABANDONED_SECONDS = 24 * 3600
# How long a training may be interrupted, or superseded and reverted to, and still resume from its checkpoint.
LEFTOVER_SECONDS = 7 * 24 * 3600


@dataclass(frozen=True)
class _Kept:
    """An artifact as retention sees it."""

    path: Path
    used: int  # when, in nanoseconds of Unix time
    inputs: frozenset[str]

    def unused(self) -> bool:
        """Whether it was not used since."""
        return _used(self.path) == self.used


def retain(folder: Path, *, keep: int, protected: set[str]) -> list[str]:
    """Remove what is superseded from `<volume>/<kind>` and, of trainings, from `<volume>`.

    Args:
        keep: how many artifacts stay for each adapter name.
        protected: digests that stay besides the promoted ones.
    Returns:
        the digests of the artifacts that were removed. What cannot be removed is logged, and stays.
    """
    _remove_leftovers(folder, protected)
    try:
        protected = protected | promoted_digests(folder.parent)
    except (UserError, OSError) as error:
        log.warning("retention: removes no artifact from %s, because the promotions cannot be read: %s", folder,
                    error)
        return []
    removed = []
    for artifacts in _by_adapter(folder).values():
        for artifact in sorted(artifacts, key=lambda a: a.used, reverse=True)[keep:]:
            digest = artifact.path.name
            if digest in protected or not protected.isdisjoint(artifact.inputs):
                continue
            if _remove(artifact.path, lock_file(artifact.path), artifact.unused, trash=draft_folder(artifact.path)):
                removed.append(digest)
                seal_file(artifact.path).unlink(missing_ok=True)
                log.info("retention: removed %s/%s (%d newer ones are kept)", folder.name, digest, keep)
    return removed


def _by_adapter(folder: Path) -> dict[str, list[_Kept]]:
    """The artifacts of a kind by the adapter that they were made for. Damaged ones are left out."""
    found = defaultdict(list)
    for path in _folders(folder, "*"):
        if not DIGEST.fullmatch(path.name):  # a draft that is about to be published has a manifest, too
            continue
        try:
            manifest = read_manifest(path)
            name = str(manifest["about"].get("adapter_name", ""))
            found[name].append(_Kept(path, _used(path), frozenset(manifest["inputs"].values())))
        except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    return found


def _remove_leftovers(folder: Path, protected: set[str]) -> None:
    """Remove what interrupted work left: drafts of this kind; checkpoints and TensorBoard runs of trainings."""
    for draft in _folders(folder, f"{DRAFT}*"):
        artifact = draft.with_name(draft.name.removeprefix(DRAFT))
        if artifact.name not in protected:
            _remove_if_old(draft, lock_file(artifact), ABANDONED_SECONDS)
    seals.remove_orphans(folder)
    volume = folder.parent
    adapters = volume / "adapter"
    trainings = [*_folders(volume / CHECKPOINTS, "*"),
                 # The runs of adapters that are still there can be looked at.
                 *(run for run in _folders(volume / TENSORBOARD, "*/*") if not (adapters / run.name).exists())]
    for path in trainings:
        if DIGEST.fullmatch(path.name) and path.name not in protected and adapters.is_dir():
            _remove_if_old(path, lock_file(adapters / path.name), LEFTOVER_SECONDS)


def _folders(folder: Path, pattern: str) -> Iterator[Path]:
    return (path for path in folder.glob(pattern) if path.is_dir() and not path.is_symlink())


def _remove_if_old(path: Path, lock: Path, seconds: float) -> None:
    def old() -> bool:
        return time.time() - _touched(path) > seconds

    if old() and _remove(path, lock, old):
        log.info("retention: removed %s, which did not change for %.0f days", path, seconds / 86400)


def _remove(path: Path, lock: Path, unused: Callable[[], bool], trash: Path | None = None) -> bool:
    """Remove a folder unless another process holds its lock, or it is in use by now.

    Args:
        trash: its name while it is removed, so that readers never find an incomplete artifact.
    """
    try:
        with hold_if_free(lock) as mine:
            if not mine or not unused():
                return False
            if trash:
                shutil.rmtree(trash, ignore_errors=True)
                path = path.rename(trash)
            shutil.rmtree(path)
    except FileNotFoundError:  # another process removed it
        return False
    except (OSError, RetryableError) as error:
        log.warning("retention: %s cannot be removed: %s", path, error)
        return False
    return True


def _used(artifact: Path) -> int:
    return (artifact / MANIFEST).stat().st_mtime_ns


def _touched(folder: Path) -> float:
    """When something in the folder was last written, in Unix time."""
    try:
        return max(path.lstat().st_mtime for path in [folder, *folder.rglob("*")])
    except FileNotFoundError:  # something works in it
        return time.time()
