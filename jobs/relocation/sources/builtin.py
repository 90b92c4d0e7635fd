"""builtin:NAME: what this code makes on the spot. There is nothing to list, to open or to pin."""

from __future__ import annotations

from collections.abc import Mapping

from jobs.core.declarations import Loaded, Source
from jobs.core.errors import UserError
from jobs.relocation.connection import Stream
from jobs.relocation.sources.interface import Item

ADVICE = ""


def find_pin(loaded: Loaded, source: Source) -> str:
    """Never called: the scheme has no pin."""
    raise UserError(f"{source.source}: has no pin; it is made by this code")


def files(loaded: Loaded, source: Source) -> list[Item]:
    """No files: relocate.py makes them with jobs/relocation/embedded/."""
    return []


def open_range(url: str, start: int, end: int | None, headers: Mapping[str, str]) -> Stream:
    """Never called: there are no items."""
    raise UserError(f"{url}: is made by this code and cannot be opened")
