"""What a module for a source scheme provides, and what several of them share."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Protocol

from jobs.core.artifacts import canonical
from jobs.core.declarations import Loaded, Source
from jobs.core.errors import UserError
from jobs.relocation.connection import Stream, classified, patiently, shown

NAME_BYTES = 240  # a file system takes 255, and an unfinished download has a longer name
PATH_BYTES = 1024  # S3 takes as many
UNFINISHED = (".partial", ".partial.ranges")  # after the name of a file that is being fetched: its bytes, its journal
SUMS = "SHA256SUMS"  # the list of a folder's files, as sha256sum writes it


@dataclass(frozen=True)
class Item:
    """One file that a source holds: where its bytes are, and the digest they must have."""

    name: str  # its path below the folder that it is fetched into
    url: str  # an URL, or a path on this machine
    size: int | None = None  # bytes
    sha256: str | None = None
    git_sha1: str | None = None  # what git calls the file's content: the hub's digest for files outside LFS
    pinned_in: str = "pipeline.yaml"  # the file that holds the digest, for messages
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)  # may carry a token


class Implementation(Protocol):
    """A module that knows one source scheme. Its functions raise `UserError` where a person must change something, and
    `RetryableError` where the source does not recover."""

    ADVICE: str  # what to do when the source denies access

    def find_pin(self, loaded: Loaded, source: Source) -> str:
        """The pin that the source has now, regardless of the pin in the pipeline file."""

    def files(self, loaded: Loaded, source: Source) -> list[Item]:
        """The files that the pinned source holds."""

    def open_range(self, url: str, start: int, end: int | None, headers: Mapping[str, str]) -> Stream:
        """Open an item's URL at byte `start`; at 0 if the source cannot give parts. `end` (None: the end of the source)
        is the first byte that is not wanted. The stream may bring more; it is then closed early."""


def single_file(loaded: Loaded, source: Source) -> list[Item]:
    """The files of a source that is one URL."""
    return [Item(shown(source.source).rpartition("/")[2], source.source, sha256=source.sha256,
                 pinned_in=loaded.path.name)]


def folder_pin(digests: Iterable[tuple[str, str]]) -> str:
    """The pin of a folder without a SHA256SUMS: the sha256 of the canonical JSON of its sorted [[path, sha256], …]."""
    return hashlib.sha256(canonical(sorted(digests))).hexdigest()


def check_names(source: Source, names: Iterable[str]) -> None:
    """Refuse names that cannot be those of files in one folder.

    Raises:
        UserError: a name leads out of the folder, is too long, cannot be printed, is there twice, or is also the name
            of a folder, or of another file while that is fetched.
    """
    names, where = list(names), shown(source.source)
    for name in names:
        if not _is_name(name):
            raise UserError(f"{where}: {name!a} cannot be the name of a file")
    counts = Counter(names)
    folders = {parent.as_posix() for name in names for parent in PurePosixPath(name).parents}
    for name in names:
        if counts[name] > 1:
            raise UserError(f"{where}: {name!a} is the name of two files")
        if name in folders:
            raise UserError(f"{where}: {name!a} is a file and also the folder of other files")
        for unfinished in (name + suffix for suffix in UNFINISHED):
            if unfinished in counts or unfinished in folders:
                raise UserError(f"{where}: {unfinished!a} cannot be beside {name!a}, which has this name "
                                "while it is fetched. Rename one of them")


def _is_name(name: str) -> bool:
    """Whether a file can have this path below a folder."""
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):  # also what UTF-8 cannot encode
        return False
    path, size = PurePosixPath(name), len(name.encode())
    # `a//b` and `./a` would be other files' names.
    return (0 < size <= PATH_BYTES and path.as_posix() == name != "." and not path.is_absolute()
            and ".." not in path.parts and all(len(part.encode()) <= NAME_BYTES for part in path.parts))


def content_sha256(url: str, open_range: Callable[[str, int, int | None, Mapping[str, str]], Stream], advice: str,
                   headers: Mapping[str, str] | None = None) -> str:
    """The sha256 of what a URL gives, read once and kept nowhere."""
    def read() -> str:
        digest = hashlib.sha256()
        with classified(shown(url), advice):
            stream = open_range(url, 0, None, headers or {})
        try:
            while chunk := stream.read():
                digest.update(chunk)
            stream.require_end()
        finally:
            stream.raw.close()
        return digest.hexdigest()

    return patiently(read, shown(url), advice)
