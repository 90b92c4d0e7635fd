"""gs://BUCKET/KEY, gs://BUCKET/FOLDER/ and gs://BUCKET/FOLDER/*.jsonl: Google Cloud Storage, through its JSON API.

How these are pinned is in buckets.py. Credentials come from wherever Google's own tools find them; where there are
none, requests are anonymous, which public buckets allow.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

from jobs.core.errors import RetryableError, UserError
from jobs.relocation.connection import SILENCE_S, Stream, shown
from jobs.relocation.sources.buckets import Answer, Body, Buckets, Object, range_header, split_url

SCOPE = "https://www.googleapis.com/auth/devstorage.read_only"
SETTINGS = ("STORAGE_EMULATOR_HOST", "GOOGLE_", "CLOUDSDK_", "NO_GCE_CHECK", "GCE_METADATA_", "SSL_CERT_FILE")
GENERATION = "x-goog-if-generation-match"


class GS(Buckets):
    """Google Cloud Storage."""

    ADVICE = ("Credentials come from the service account's workload identity, or from the file that "
              "GOOGLE_APPLICATION_CREDENTIALS names; they need storage.objects.get on it (docs/registries.md, "
              "Buckets)")
    LISTING = "storage.objects.list"
    UPLOAD = "gcloud storage cp"

    def list_objects(self, bucket: str, prefix: str) -> Iterator[Object]:
        """The objects whose keys begin with `prefix`."""
        page = {"prefix": prefix, "fields": "nextPageToken,items(name,size,generation)"}
        while True:
            answer = _get(f"gs://{bucket}/{prefix}", f"/b/{quote(bucket, safe='')}/o", page).json()
            for each in answer.get("items", ()):
                yield Object(each["name"], int(each["size"]), {GENERATION: each["generation"]})
            if "nextPageToken" not in answer:
                return
            page["pageToken"] = answer["nextPageToken"]

    def find_object(self, bucket: str, key: str) -> Object | None:
        """One object; None if it is not there."""
        try:
            found = _get(f"gs://{bucket}/{key}", _path(bucket, key), {"fields": "size,generation"}).json()
        except Answer as answer:
            if answer.status == 404:
                return None
            raise
        return Object(key, int(found["size"]), {GENERATION: found["generation"]})

    def open_range(self, url: str, start: int, end: int | None, headers: Mapping[str, str]) -> Stream:
        """The object from byte `start` on: one request, read as a stream."""
        parameters = {"alt": "media"} | ({"ifGenerationMatch": headers[GENERATION]} if GENERATION in headers else {})
        # gzip: as it is stored. Otherwise objects that are stored compressed would come decompressed, without ranges.
        wanted = {"Accept-Encoding": "gzip"} | range_header(start, end)
        try:
            answer = _get(url, _path(*split_url(url)), parameters, wanted, service="/download/storage/v1", stream=True)
        except Answer as error:
            if error.status == 416 and "Range" in wanted:  # nothing is behind what we have; a fresh start shows why
                return self.open_range(url, 0, None, headers)
            raise
        part = answer.headers.get("Content-Range", "") if answer.status_code == 206 else ""
        total = part.rpartition("/")[2] if part else answer.headers.get("Content-Length", "")
        return Stream(Body(answer.raw), shown(url), self.ADVICE, start if part else 0,
                      int(total) if total.isdigit() else None, end if part else None,
                      answer.headers.get("x-goog-generation"))



def _path(bucket: str, key: str) -> str:
    return f"/b/{quote(bucket, safe='')}/o/{quote(key, safe='')}"


def _get(url: str, path: str, parameters: Mapping[str, str], headers: Mapping[str, str] | None = None, *,
         service: str = "/storage/v1", stream: bool = False) -> Any:
    """A successful answer to a GET request.

    Raises:
        Answer: another one.
        RetryableError: the object is not the one that was found.
    """
    endpoint = os.environ.get("STORAGE_EMULATOR_HOST", "https://storage.googleapis.com").rstrip("/")
    answer = _session().get(f"{endpoint}{service}{path}", params=parameters, headers=headers, stream=stream,
                            timeout=(SILENCE_S, SILENCE_S))
    if answer.status_code in (200, 206):
        return answer
    answer.close()
    if answer.status_code == 412:
        raise RetryableError(f"{shown(url)}: was replaced while it was fetched. Nothing was published; the next "
                             "attempt fetches what is there now")
    raise Answer(answer.status_code, headers=answer.headers)


def _session() -> Any:
    return _session_for(frozenset((name, value) for name, value in os.environ.items() if name.startswith(SETTINGS)))


@functools.lru_cache(maxsize=1)
def _session_for(settings: frozenset[tuple[str, str]]) -> Any:
    """A session, which threads may share, with credentials if there are any. It reads its settings when it is made."""
    try:
        import google.auth
        import requests
        from google.auth.exceptions import DefaultCredentialsError
        from google.auth.transport.requests import AuthorizedSession
    except ImportError as error:
        raise UserError(f"gs:// needs the packages google-auth and requests, which cannot be imported ({error}). Build "
                        "the image from jobs/requirements.txt (docs/registries.md)") from None
    session = requests.Session()
    if "STORAGE_EMULATOR_HOST" not in os.environ:
        try:
            session = AuthorizedSession(google.auth.default(scopes=[SCOPE])[0])
        except DefaultCredentialsError:
            if "GOOGLE_APPLICATION_CREDENTIALS" in os.environ:
                raise  # they are meant to be used
    session.mount("https://", requests.adapters.HTTPAdapter(pool_maxsize=64))
    session.verify = os.environ.get("SSL_CERT_FILE") or True
    return session
