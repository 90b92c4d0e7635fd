"""s3://BUCKET/KEY: an object in Amazon S3, and what speaks its protocol, pinned by its sha256."""

from __future__ import annotations

from collections.abc import Mapping

from jobs.core.declarations import Loaded, Source
from jobs.relocation.connection import Stream
from jobs.relocation.sources.buckets import open_object
from jobs.relocation.sources.interface import content_sha256, single_file

ADVICE = ("Credentials come from the service account's workload identity, or from AWS_ACCESS_KEY_ID and "
          "AWS_SECRET_ACCESS_KEY; they need s3:GetObject on it (docs/registries.md, Buckets)")

files = single_file


def find_pin(loaded: Loaded, source: Source) -> str:
    """The sha256 of the object's content."""
    return content_sha256(source.source, open_range, ADVICE)


def open_range(url: str, start: int, end: int | None, headers: Mapping[str, str]) -> Stream:
    """The object from byte `start` on."""
    return open_object(url, start, end, ADVICE, package="s3fs")
