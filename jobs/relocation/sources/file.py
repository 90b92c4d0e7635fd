"""file:PATH: a file or folder beside the pipeline file, pinned by its sha256."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from jobs.core.declarations import Loaded, Source
from jobs.core.errors import UserError
from jobs.core.files import open_plain, require_plain, sha256_of, visible_files
from jobs.relocation.connection import Stream, mismatch
from jobs.relocation.sources.interface import Item, folder_pin

ADVICE = "Files must be readable for this user"


def find_pin(loaded: Loaded, source: Source) -> str:
    """The pin of what is there now."""
    path = loaded.resolve(source)
    if not path.exists():
        raise UserError(f"{path} does not exist")
    return path_sha256(path)


def path_sha256(path: Path) -> str:
    """The pin of a `file:` source: of a file the sha256 of its bytes, in hex; of a folder `folder_sha256`."""
    return folder_sha256(path) if path.is_dir() else sha256_of(path)


def folder_sha256(folder: Path) -> str:
    """The pin of a folder: the sha256 of the canonical JSON of its sorted [[path, sha256], …], in hex.

    Hidden files do not count (a mounted ConfigMap has its own bookkeeping there); links to files count as the files.
    """
    return folder_pin((path, sha256_of(folder / path)) for path in visible_files(folder))


def files(loaded: Loaded, source: Source) -> list[Item]:
    """The file, or the folder's files; of a folder the pin is checked here."""
    path = loaded.resolve(source)
    for file in (path, *(path / name for name in visible_files(path))):
        if file.exists() and not os.access(file, os.R_OK):
            raise UserError(f"{file}: this user may not read it")
        if file.exists() and (file != path or not path.is_dir()):
            require_plain(file)
    if path.is_file():
        return [Item(path.name, str(path), path.stat().st_size, source.sha256, pinned_in=loaded.path.name)]
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder ({source.source} is looked for beside {loaded.path.name})")
    items = [Item(name, str(path / name), (path / name).stat().st_size, sha256_of(path / name),
                  pinned_in=loaded.path.name) for name in visible_files(path)]
    if not items:
        raise UserError(f"{path}: the folder holds no files")
    found = folder_pin((item.name, str(item.sha256)) for item in items)
    if found != source.sha256:
        raise UserError(mismatch(str(path), loaded.path.name, str(source.sha256), found))
    return items


def open_range(url: str, start: int, end: int | None, headers: Mapping[str, str]) -> Stream:
    """A path on this machine, from byte `start` on."""
    raw = open_plain(Path(url))
    raw.seek(start)
    return Stream(raw, url, ADVICE, start, None, end)
