"""Sources: one module a scheme, behind one interface (interface.py).

jobs/core/sources.py has the schemes as the pipeline file and the digests know them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from jobs.core.declarations import Loaded, Source
from jobs.relocation.connection import Stream, classified, shown
from jobs.relocation.sources import builtin, file, gs, hf, http, oci, s3
from jobs.relocation.sources.interface import Implementation, Item, check_names

IMPLEMENTATIONS: dict[str, Implementation] = {
    "hf": hf,
    "file": file,
    "https": http,
    "http": http,
    "s3": s3.S3(),
    "gs": gs.GS(),
    "oci": oci,
    "builtin": builtin,
}


def find_pin(loaded: Loaded, source: Source) -> str:
    """The pin that the source has now: the sha256 of its content, or the commit that its `revision` stands for.

    Raises:
        UserError: when there is nothing, or it may not be read.
        RetryableError: when the source does not recover.
    """
    return IMPLEMENTATIONS[source.scheme].find_pin(loaded, source)


def listing(loaded: Loaded, source: Source) -> list[Item]:
    """The files that a source holds, sorted by name; for a folder, after its pin was checked.

    Raises:
        UserError: when there is nothing, it may not be read, or it does not match the pin.
        RetryableError: when the hub does not recover.
    """
    items = IMPLEMENTATIONS[source.scheme].files(loaded, source)
    check_names(source, [item.name for item in items])
    return sorted(items, key=lambda item: item.name)


@contextmanager
def open_range(url: str, start: int, end: int | None, headers: Mapping[str, str]) -> Iterator[Stream]:
    """Open an item's URL or path at byte `start`; at 0 if the source cannot give parts. `end` (None: the end of the
    source) is the first byte that is not wanted; the stream may bring more.

    Raises:
        Interrupted: another attempt may succeed.
        UserError: it cannot, e.g. there is no such file.
    """
    implementation = IMPLEMENTATIONS[url.partition("://")[0] if "://" in url else "file"]
    with classified(shown(url), implementation.ADVICE):
        stream = implementation.open_range(url, start, end, headers)
    try:
        yield stream
    finally:
        stream.raw.close()
