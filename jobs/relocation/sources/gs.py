"""gs://BUCKET/KEY: an object in Google Cloud Storage, pinned by its sha256."""

from __future__ import annotations

import os
from collections.abc import Mapping

from jobs.core.declarations import Loaded, Source
from jobs.relocation.connection import Stream
from jobs.relocation.sources.buckets import open_object
from jobs.relocation.sources.interface import content_sha256, single_file

ADVICE = ("Credentials come from the service account's workload identity, or from the file that "
          "GOOGLE_APPLICATION_CREDENTIALS names; they need storage.objects.get on it (docs/registries.md, "
          "Buckets)")

files = single_file


def find_pin(loaded: Loaded, source: Source) -> str:
    """The sha256 of the object's content."""
    return content_sha256(source.source, open_range, ADVICE)


def open_range(url: str, start: int, end: int | None, headers: Mapping[str, str]) -> Stream:
    """The object from byte `start` on."""
    # Read when gcsfs is imported: it would query another API for the kind of bucket, and warn when that is not allowed.
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
    try:
        return open_object(url, start, end, ADVICE, package="gcsfs")
    except OSError as error:
        if str(error).startswith("Forbidden"):  # of gcsfs's errors the one for 403 has no type of its own
            raise PermissionError(str(error)) from error
        raise
