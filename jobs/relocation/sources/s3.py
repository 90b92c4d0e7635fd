"""s3://BUCKET/KEY, s3://BUCKET/FOLDER/ and s3://BUCKET/FOLDER/*.jsonl: Amazon S3, and what speaks its protocol.

How these are pinned is in buckets.py. Credentials come from wherever Amazon's own tools find them.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jobs.core.errors import RetryableError, UserError
from jobs.relocation.connection import SILENCE_S, Stream, shown
from jobs.relocation.sources.buckets import Answer, Body, Buckets, Object, range_header, split_url

EXPIRED = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken", "RequestExpired")


class S3(Buckets):
    """Amazon S3."""

    ADVICE = ("Credentials come from the service account's workload identity, or from AWS_ACCESS_KEY_ID and "
              "AWS_SECRET_ACCESS_KEY; they need s3:GetObject on it (docs/registries.md, Buckets)")
    LISTING = "s3:ListBucket"
    UPLOAD = "aws s3 cp"

    def list_objects(self, bucket: str, prefix: str) -> Iterator[Object]:
        """The objects whose keys begin with `prefix`."""
        with _answers(f"s3://{bucket}/{prefix}"):
            for page in _client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
                for each in page.get("Contents", ()):
                    yield Object(each["Key"], each["Size"], _version(each))

    def find_object(self, bucket: str, key: str) -> Object | None:
        """One object; None if it is not there."""
        try:
            with _answers(f"s3://{bucket}/{key}"):
                found = _client().head_object(Bucket=bucket, Key=key)
        except Answer as answer:
            if answer.status == 404:
                return None
            if answer.status == 400:  # an answer to HEAD has no text: to GET, it says what is wrong
                self.open_range(f"s3://{bucket}/{key}", 0, None, {}).raw.close()
            raise
        return Object(key, found["ContentLength"], _version(found))

    def open_range(self, url: str, start: int, end: int | None, headers: Mapping[str, str]) -> Stream:
        """The object from byte `start` on: one request, read as a stream."""
        bucket, key = split_url(url)
        wanted = range_header(start, end) | ({"IfMatch": headers["If-Match"]} if "If-Match" in headers else {})
        try:
            with _answers(url):
                found = _client().get_object(Bucket=bucket, Key=key, **wanted)
        except Answer as answer:
            if answer.status == 416 and "Range" in wanted:  # nothing is behind what we have; a fresh start shows why
                return self.open_range(url, 0, None, headers)
            raise
        part = found.get("ContentRange", "")
        total = int(part.rpartition("/")[2]) if part else found["ContentLength"]
        # Its own `read` waits for all the bytes that are wanted, and nothing can end it.
        body = Body(found["Body"]._raw_stream)
        return Stream(body, shown(url), self.ADVICE, start if part else 0, total, end if part else None,
                      found.get("ETag"))



def _version(found: Mapping[str, Any]) -> Mapping[str, str]:
    return {"If-Match": found["ETag"]} if found.get("ETag") else {}


def _client() -> Any:
    return _client_for(frozenset((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))


@functools.lru_cache(maxsize=1)
def _client_for(settings: frozenset[tuple[str, str]]) -> Any:
    """A client, which takes 0.1 s to make; threads may share it. It reads its settings when it is made."""
    try:
        from botocore.config import Config
        from botocore.session import Session
    except ImportError as error:
        raise UserError(f"s3:// needs the package botocore, which cannot be imported ({error}). Build the image from "
                        "jobs/requirements.txt (docs/registries.md)") from None
    return Session().create_client("s3", config=Config(
        connect_timeout=SILENCE_S, read_timeout=SILENCE_S, max_pool_connections=64,
        response_checksum_validation="when_required"))  # the pin is checked; and other stores do not know Amazon's


@contextmanager
def _answers(url: str) -> Iterator[None]:
    """Turn botocore's errors that carry an answer into `Answer`, and those with a meaning of their own into words."""
    try:
        yield
    except Exception as error:
        answer = getattr(error, "response", None)
        if not isinstance(answer, dict):
            raise
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        code = str(answer.get("Error", {}).get("Code", ""))
        if code in EXPIRED:
            raise UserError(f"{shown(url)}: the credentials have expired ({code}). {S3.ADVICE}") from error
        if status == 412:
            raise RetryableError(f"{shown(url)}: was replaced while it was fetched. Nothing was published; the next "
                                 "attempt fetches what is there now") from error
        if not status:
            raise
        raise Answer(status, code, answer["ResponseMetadata"].get("HTTPHeaders")) from error
