"""Reads artifacts that may be damaged or hostile: follows no link, waits for no pipe, and limits every size."""

from __future__ import annotations

import json
import stat
from collections.abc import Collection, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from jobs.core import artifacts
from jobs.core.errors import UserError
from jobs.core.files import read_plain_file
from serving.refusal import NotYet, Reason, Refused, one_line

# Bytes of a JSON file, and of the weights' header. Such files have a few kB; a header has 130 bytes for each tensor.
LARGEST_JSON = 2**20
# Bytes of an artifact without its weights (the loss history grows with the steps), and number of its files.
LARGEST_REST = 64 * 2**20
MOST_FILES = 100

State = tuple[tuple[str, int, int, int, int], ...]


def state_of(folder: Path) -> State:
    """Name, size, times and inode of everything in an artifact's folder. Cheap to read; changes with the files.

    With the time of change, because the time of modification can be set.

    Raises:
        NotYet: when the folder is not there.
    """
    if not folder.is_dir():
        raise NotYet(f"{folder.parent.name} {folder.name} is not there yet")
    stats = [(p, p.lstat()) for p in sorted([folder, *folder.iterdir()])]  # flat, or it is refused
    return tuple((p.name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for p, s in stats)


def read_artifact(folder: Path, kind: str, keys: Sequence[str] = ()) -> artifacts.Artifact:
    """The artifact in `folder`, verified; refused if it is not whole, not of this kind or not signed.

    Args:
        keys: the trusted public keys; empty: it needs no signature.
    """
    read_json(folder / artifacts.MANIFEST, "damaged", "is missing or damaged")
    try:
        artifact = artifacts.read(folder, keys)
        manifest = artifact.manifest
        fits = isinstance(manifest["inputs"], dict) and isinstance(manifest["spec"], dict)
    except artifacts.NotSigned as error:
        raise Refused("signature", one_line(str(error))) from None
    except UserError as error:
        raise Refused("damaged", one_line(str(error))) from None
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise Refused("damaged", one_line(f"{folder}: {artifacts.MANIFEST} is damaged ({error!r})")) from None
    if not fits or manifest["kind"] != kind:
        raise Refused("damaged", one_line(f"{folder} is an artifact of kind {manifest['kind']!r}, not {kind}"))
    return artifact


def plain_files(folder: Path, folders: Collection[str] = ()) -> list[Path]:
    """The files in an artifact's folder. Refuses anything else: opening a pipe, for example, would wait for ever.

    Args:
        folders: names of folders in it whose files belong to it too.
    """
    paths = sorted(islice(folder.iterdir(), MOST_FILES + 1))
    if len(paths) > MOST_FILES:
        raise Refused("files", f"{folder} holds more than {MOST_FILES} files")
    found = []
    for path in paths:
        mode = path.lstat().st_mode
        if path.name in folders and stat.S_ISDIR(mode):
            found += plain_files(path)
        elif stat.S_ISREG(mode):
            found.append(path)
        else:
            raise Refused("damaged", one_line(f"{path} is not a plain file"))
    return found


def read_json(file: Path, reason: Reason, problem: str) -> dict[str, Any]:
    """The mapping in a JSON file. Raises `Refused` with `reason` and `problem` if there is none."""
    try:
        # Decoded first, as vLLM does: from bytes, json would take UTF-16 too.
        value = json.loads(read_plain_file(file, LARGEST_JSON).decode())
        if not isinstance(value, dict):
            raise TypeError(f"it holds a {type(value).__name__}")
    except UserError as error:
        raise Refused(reason, one_line(str(error))) from None
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, RecursionError) as error:
        raise Refused(reason, one_line(f"{file} {problem} ({error!r})")) from None
    return value
