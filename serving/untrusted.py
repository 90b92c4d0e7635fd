"""Reads artifacts that may be damaged or hostile: no link is followed, no pipe is waited for, every size is limited."""

from __future__ import annotations

import json
import stat
from itertools import islice
from pathlib import Path
from typing import Any

from jobs.core import artifacts
from jobs.core.errors import UserError
from serving.refusal import NotYet, Reason, Refused, one_line

# Bytes of a JSON file that is read, and of the weights' header: such files have a few kB, a header 130 bytes a tensor.
LARGEST_JSON = 2**20
# Bytes of an artifact beside the weights (the loss history grows with the steps), and files of an artifact.
LARGEST_REST = 64 * 2**20
MOST_FILES = 100

Signature = tuple[tuple[str, int, int, int, int], ...]


def signature(folder: Path) -> Signature:
    """Name, size, times and inode of everything in an artifact's folder: cheap, and it changes when a file does.

    Both times, because a repair may keep the time of modification; nobody can set the time of change.

    Raises:
        NotYet: when the folder is not there.
    """
    if not folder.is_dir():
        raise NotYet(f"{folder.parent.name} {folder.name} is not there yet")
    stats = [(p, p.lstat()) for p in sorted([folder, *folder.iterdir()])]  # flat, or it is refused
    return tuple((p.name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for p, s in stats)


def read_artifact(folder: Path, kind: str) -> artifacts.Artifact:
    """The artifact in `folder`, verified; refused if it is not whole or not of this kind."""
    read_json(folder / artifacts.MANIFEST, "damaged", "is missing or damaged")
    try:
        artifact = artifacts.read(folder)
        manifest = artifact.manifest
        fits = isinstance(manifest["inputs"], dict) and isinstance(manifest["spec"], dict)
    except UserError as error:
        raise Refused("damaged", one_line(str(error))) from None
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise Refused("damaged", one_line(f"{folder}: {artifacts.MANIFEST} is damaged ({error!r})")) from None
    if not fits or manifest["kind"] != kind:
        raise Refused("damaged", one_line(f"{folder} is an artifact of kind {manifest['kind']!r}, not {kind}"))
    return artifact


def plain_files(folder: Path) -> list[Path]:
    """The files in an artifact's folder; refused if anything else is there: a pipe, for one, is waited for in vain."""
    paths = sorted(islice(folder.iterdir(), MOST_FILES + 1))
    if len(paths) > MOST_FILES:
        raise Refused("files", f"{folder} holds more than {MOST_FILES} files")
    for path in paths:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise Refused("damaged", one_line(f"{path} is not a plain file"))
    return paths


def read_json(file: Path, reason: Reason, problem: str) -> dict[str, Any]:
    """The mapping in a JSON file; refused with `reason` and `problem` if it is none."""
    try:
        with file.open("rb") as stream:
            content = stream.read(LARGEST_JSON + 1)
        if len(content) > LARGEST_JSON:
            raise ValueError(f"it has more than {LARGEST_JSON} bytes")
        value = json.loads(content.decode())  # as vLLM reads it: from bytes, json would take UTF-16 too
        if not isinstance(value, dict):
            raise TypeError(f"it holds a {type(value).__name__}")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, TypeError, RecursionError) as error:
        raise Refused(reason, one_line(f"{file} {problem} ({error!r})")) from None
    return value
