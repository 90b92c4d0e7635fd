"""gs:// against a server that answers as Google Cloud Storage does: what is pinned is what arrives."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from jobs.core import retries
from jobs.core.declarations import Loaded, Source
from jobs.core.errors import RetryableError, UserError
from jobs.relocation import download, sources
from jobs.relocation.sources.file import folder_sha256
from tests.relocation.conftest import CONTENT, SHA256


@dataclass
class Storage:
    """What of the JSON API relocation uses, answered from a dict."""

    objects: dict[str, bytes] = field(default_factory=dict)
    generations: dict[str, int] = field(default_factory=dict)
    status: int = 200  # of every answer, if it is another
    ranges: list[str] = field(default_factory=list)
    pages: int = 0

    def put(self, name: str, content: bytes) -> None:
        self.objects[name] = content
        self.generations[name] = self.generations.get(name, 0) + 1

    def describe(self, name: str) -> dict[str, str]:
        return {"kind": "storage#object", "bucket": "data", "name": name, "size": str(len(self.objects[name])),
                "generation": str(self.generations[name])}


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    """A bucket `data` with the one object private/data.jsonl, and short pauses between attempts."""
    state = Storage()
    state.put("private/data.jsonl", CONTENT)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            query = {key: values[0] for key, values in parse_qs(url.query).items()}
            if state.status != 200:
                return self.fail(state.status)
            if url.path == "/storage/v1/b/data/o":
                return self.list(query)
            service, _, name = url.path.partition("/storage/v1/b/data/o/")
            name = unquote(name)
            if name not in state.objects:
                return self.fail(404)
            if service != "/download":
                return self.respond(200, json.dumps(state.describe(name)).encode())
            if query.get("ifGenerationMatch", str(state.generations[name])) != str(state.generations[name]):
                return self.fail(412)
            wanted, content = self.headers.get("Range", ""), state.objects[name]
            state.ranges.append(wanted)
            if not wanted:
                return self.respond(200, content)
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), int(last) + 1 if last else len(content)
            if start >= len(content):
                return self.fail(416)
            return self.respond(206, content[start:end], f"bytes {start}-{min(end, len(content)) - 1}/{len(content)}")

        def list(self, query: dict[str, str]) -> None:
            """Pages of two, each naming where the next one begins."""
            state.pages += 1
            found = [name for name in sorted(state.objects) if name.startswith(query["prefix"])
                     and name >= query.get("pageToken", "")]
            more = {"nextPageToken": found[2]} if found[2:] else {}
            items = {"items": [state.describe(name) for name in found[:2]]} if found else {}
            body = {"kind": "storage#objects", **more, **items}
            self.respond(200, json.dumps(body).encode())

        def fail(self, status: int) -> None:
            self.respond(status, json.dumps({"error": {"code": status, "message": "no"}}).encode())

        def respond(self, status: int, body: bytes, content_range: str = "") -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            if content_range:
                self.send_header("Content-Range", content_range)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name that http.server uses
            """Stay quiet."""

    monkeypatch.setattr(retries, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(retries, "ATTEMPTS", 3)
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


def test_a_folder_and_a_glob_are_listed_to_their_ends_and_pinned_as_the_same_files_on_a_disk(
        storage: Storage, here: Loaded, tmp_path: Path) -> None:
    for n in range(5):
        storage.put(f"set/{n}.jsonl", f"{n}".encode())
        (tmp_path / "copy").mkdir(exist_ok=True)
        (tmp_path / "copy" / f"{n}.jsonl").write_text(f"{n}")
    storage.put("set/", b"")
    storage.put("set/deep/6.csv", b"6")
    assert sources.find_pin(here, source("set/*.jsonl", None)) == folder_sha256(tmp_path / "copy")
    assert [item.name for item in sources.listing(here, source("set/"))] == [
        "0.jsonl", "1.jsonl", "2.jsonl", "3.jsonl", "4.jsonl", "deep/6.csv"]
    assert storage.pages == 4 + 4


def test_a_folder_with_a_list_of_digests_is_pinned_by_it(storage: Storage, here: Loaded) -> None:
    sums = f"{SHA256} *a b.jsonl\n{SHA256}  ./deep/c.jsonl\n{'0' * 64}  SHA256SUMS\n".encode()
    for name, content in {"SHA256SUMS": sums, "a b.jsonl": CONTENT, "deep/c.jsonl": CONTENT}.items():
        storage.put(f"set/{name}", content)
    pin = sources.find_pin(here, source("set/", None))
    assert pin == hashlib.sha256(sums).hexdigest()
    assert [(item.name, item.sha256, item.size) for item in sources.listing(here, source("set/", pin))] == [
        ("a b.jsonl", SHA256, len(CONTENT)), ("deep/c.jsonl", SHA256, len(CONTENT))]
    assert storage.pages == 0


def test_an_object_that_is_replaced_while_it_is_fetched_is_worth_another_attempt(
        storage: Storage, here: Loaded, draft: Path) -> None:
    items = sources.listing(here, source())
    storage.put("private/data.jsonl", CONTENT)  # of another generation, whatever it holds
    with pytest.raises(RetryableError, match="gs://data/private/data.jsonl: was replaced while it was fetched"):
        download.fetch(items, draft)
    download.fetch(sources.listing(here, source()), draft)


def test_a_range_of_an_object_is_one_request_for_it(storage: Storage) -> None:
    with sources.open_range("gs://data/private/data.jsonl", 1000, 5000, {}) as stream:
        assert (stream.start, stream.total, stream.version) == (1000, len(CONTENT), None)
        assert stream.read() == CONTENT[1000:5000]
        assert stream.read() == b""
    assert storage.ranges == ["bytes=1000-4999"]
