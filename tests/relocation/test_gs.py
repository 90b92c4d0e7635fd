"""gs:// against a server that answers as Google Cloud Storage does: what is pinned is what arrives."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from jobs.core.declarations import Loaded, Source
from jobs.core.errors import UserError
from jobs.relocation import connection, download, sources
from tests.relocation.conftest import CONTENT, SHA256


@dataclass
class Storage:
    status: int = 200  # of every answer
    ranges: list[str] = field(default_factory=list)


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    """A bucket `data` with the one object private/data.jsonl, and short pauses between attempts."""
    state = Storage()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if state.status != 200:
                return self.respond(state.status, json.dumps({"error": {"code": state.status, "message": "no"}}))
            if not path.endswith("/b/data/o/private/data.jsonl"):
                return self.respond(404, json.dumps({"error": {"code": 404, "message": "no"}}))
            if "/download/" not in path:
                return self.respond(200, json.dumps({
                    "kind": "storage#object", "name": "private/data.jsonl", "bucket": "data", "size": str(len(CONTENT)),
                    "generation": "1", "updated": "2026-11-01T00:00:00Z", "timeCreated": "2026-11-01T00:00:00Z"}))
            state.ranges.append(self.headers.get("Range", ""))
            first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            return self.respond(206, CONTENT[first:last + 1])

        def respond(self, status: int, body: str | bytes) -> None:
            body = body.encode() if isinstance(body, str) else body
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Type", "application/json" if status != 206 else "application/octet-stream")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name that http.server uses
            """Stay quiet."""

    monkeypatch.setattr(connection, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(connection, "ATTEMPTS", 3)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_address[1]}")
        monkeypatch.setenv("NO_GCE_CHECK", "true")  # google-auth: do not look for a metadata server
        monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
        yield state
        server.shutdown()


def source(key: str = "private/data.jsonl", sha256: str | None = SHA256) -> Source:
    return Source(source=f"gs://data/{key}", sha256=sha256)


def test_an_object_arrives_from_where_an_earlier_run_stopped(storage: Storage, here: Loaded, draft: Path) -> None:
    (draft / "data.jsonl.partial").write_bytes(CONTENT[:123_456])
    download.fetch(sources.listing(here, source()), draft)
    assert (draft / "data.jsonl").read_bytes() == CONTENT
    assert [each.partition("-")[0] for each in storage.ranges] == ["bytes=123456"]


def test_an_object_with_another_pin_names_both_digests(storage: Storage, here: Loaded, draft: Path) -> None:
    with pytest.raises(UserError, match=f"gs://data/private/data.jsonl: .*{'0' * 64}.*{SHA256}"):
        download.fetch(sources.listing(here, source(sha256="0" * 64)), draft)


def test_an_object_that_is_not_there_is_named(storage: Storage, here: Loaded, draft: Path) -> None:
    with pytest.raises(UserError, match=r"gs://data/private/date.jsonl: not found \(404\)"):
        download.fetch(sources.listing(here, source("private/date.jsonl")), draft)


@pytest.mark.parametrize("status", [401, 403])
def test_credentials_that_are_missing_or_not_good_enough_say_where_they_come_from(
        storage: Storage, here: Loaded, draft: Path, status: int) -> None:
    storage.status = status
    with pytest.raises(UserError, match=rf"gs://data/private/data.jsonl: not allowed \({status}\).*workload identity"):
        download.fetch(sources.listing(here, source()), draft)


def test_pin_reads_the_content(storage: Storage, here: Loaded) -> None:
    assert sources.find_pin(here, source(sha256=None)) == SHA256
