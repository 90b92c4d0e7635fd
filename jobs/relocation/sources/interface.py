"""What a module for a source scheme provides, and what several of them share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from jobs.core.declarations import Loaded, Source
from jobs.relocation.connection import Stream, classified, patiently, shown


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


def content_sha256(url: str, open_range: Callable[[str, int, int | None, Mapping[str, str]], Stream],
                   advice: str) -> str:
    """The sha256 of what a URL gives, read once and kept nowhere."""
    def read() -> str:
        digest = hashlib.sha256()
        with classified(shown(url), advice):
            stream = open_range(url, 0, None, {})
        try:
            while chunk := stream.read():
                digest.update(chunk)
        finally:
            stream.raw.close()
        return digest.hexdigest()

    return patiently(read, shown(url), advice)
