"""What buckets share: an object is one file, pinned by its sha256 and read through fsspec."""

from __future__ import annotations

from jobs.core.errors import UserError
from jobs.relocation.connection import CHUNK, Stream, shown


def open_object(url: str, start: int, end: int | None, advice: str, package: str) -> Stream:
    """Open an object at byte `start`. It is read in requests of a few chunks each."""
    import fsspec

    scheme = url.partition("://")[0]
    try:
        # Nothing of an earlier attempt, not its listing nor its connections, may answer this one.
        filesystem = fsspec.filesystem(scheme, skip_instance_cache=True)
    except ImportError as error:
        raise UserError(f"{shown(url)}: {scheme}:// needs the package {package}, which cannot be imported ({error}). "
                        "Build the image from jobs/requirements.txt (docs/registries.md)") from None
    raw = filesystem.open(url, "rb", block_size=8 * CHUNK)
    raw.seek(start)
    return Stream(raw, shown(url), advice, start, getattr(raw, "size", None), end)
