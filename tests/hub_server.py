"""A local HTTP server that speaks the hub's API well enough for the real huggingface_hub client, and plain files too.

    with serve() as hub:
        commit = hub.add("models", "acme/tiny", {"config.json": b"{}", "model.safetensors": b"..."})
        hub.files["data.jsonl"] = b"..."                  # at hub.url + "/files/data.jsonl"
        hub.faults.append(Fault("model.safetensors", drop_after=1000))
        monkeypatch.setenv("HF_ENDPOINT", hub.url)

Answers what huggingface.co answers: repository info with blobs, tree, resolve with HEAD and GET, Range, ETag,
X-Repo-Commit, and for LFS files a redirect to another host with a signed URL.
"""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

LFS = (".safetensors", ".bin", ".parquet", ".gguf")
# Characters that a client which "normalises" URLs would decode; the signature then no longer fits.
SIGNATURE = "Signature=a%2Fb%3Ac%2Bd&Expires=1"


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose path contains `path`."""

    path: str
    times: int = 1
    status: int | None = None  # answer this
    retry_after: str | None = None
    location: str | None = None  # with a status that redirects
    drop_after: int | None = None  # close the connection after this many bytes of the body
    linger_s: float = 0.1  # before it: a client that has not yet read what came when the connection breaks loses it
    cut_after: int | None = None  # end the body early, as if it were whole
    wrong_bytes: bool = False  # flip the first byte of the body
    answer_from: int | None = None  # answer a Range with the part from this byte on, as Content-Range says
    content_range: str | None = None  # say this in the Content-Range
    bytes_per_second: float | None = None  # trickle
    version: str | None = None  # say this in the ETag
    range: str = ""  # only requests whose Range contains this
    method: str = "GET"


@dataclass(frozen=True)
class Seen:
    """One request as the server saw it."""

    method: str
    path: str  # as sent, with the query
    headers: Mapping[str, str]
    at: float  # time.monotonic()

    @property
    def range(self) -> str | None:
        return self.headers.get("range")


@dataclass
class Sent:
    """A body, or the part of it that the client took."""

    path: str
    start: int  # its place in the file
    end: int  # where it should have ended
    count: int = 0  # bytes

    @property
    def range(self) -> range:
        return range(self.start, self.start + self.count)


@dataclass
class Hub:
    url: str = ""
    cdn: str = ""  # another origin: other port
    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)  # "models/OWNER/NAME", commit, path
    files: dict[str, bytes] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    gated: set[str] = field(default_factory=set)  # repositories that need the token "hf_good"
    ranges: bool = True  # whether Range is understood
    lengths: bool = True  # whether answers say how long they are, or just end
    blobs: bool = True  # whether sizes and digests are in its answers
    answers_for_commit: str | None = None  # a mirror that answers for another commit
    versions: dict[str, str] = field(default_factory=dict)  # ETags of `files`
    encodings: dict[str, str] = field(default_factory=dict)  # their Content-Encoding
    most_connections: int | None = None  # requests for `files` beyond so many at a time get a 429
    bytes_per_second: float | None = None  # of each connection
    together: threading.Barrier | None = None  # no request for bytes is answered before so many are there
    sent: list[Sent] = field(default_factory=list)
    active: int = 0  # bodies that are being sent now
    most_active: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, kind: str, repo: str, files: dict[str, bytes]) -> str:
        """Commit `files` to a repository and return the commit."""
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.repos.setdefault(f"{kind}/{repo}", {})[commit] = dict(files)
        return commit

    def gets(self, part: str) -> list[Seen]:
        """The GET requests for bytes whose path contains `part`; of an LFS file, those at the other host."""
        with self.lock:
            return [s for s in self.seen if s.method == "GET" and part in s.path and "/api/" not in s.path
                    and not ("/resolve/" in s.path and part.endswith(LFS))]

    def fault(self, method: str, path: str, wanted: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.path in path and fault.method == method and fault.range in wanted and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None


@contextmanager
def serve() -> Iterator[Hub]:
    """The server, on 127.0.0.1, until the block ends."""
    hub = Hub()
    servers = [_server(hub), _server(hub)]
    hub.url, hub.cdn = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    for server in servers:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def nowhere() -> str:
    """A URL on which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Stay quiet: clients that break off are what the tests are about."""


def _server(hub: Hub) -> _Server:
    class Handler(_Handler):
        pass

    Handler.hub = hub
    return _Server(("127.0.0.1", 0), Handler)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        with self.hub.lock:
            self.hub.seen.append(Seen(self.command, self.path, {k.lower(): v for k, v in self.headers.items()},
                                      time.monotonic()))
        fault = self.hub.fault(self.command, self.path, self.headers.get("Range", ""))
        if fault and fault.status:
            extra = {"Retry-After": fault.retry_after} if fault.retry_after else {}
            return self.respond(fault.status, b"no", extra | ({"Location": fault.location} if fault.location else {}))
        path, _, query = self.path.removeprefix("http://proxied").partition("?")
        parts = unquote(path).strip("/").split("/")
        if parts[0] == "files":
            content = self.hub.files.get("/".join(parts[1:]))
            name = "/".join(parts[1:])
            headers = {"ETag": self.hub.versions.get(name), "Content-Encoding": self.hub.encodings.get(name)}
            if self.hub.most_connections and self.hub.active >= self.hub.most_connections:
                return self.respond(429, b"no")
            return self.respond(404, b"") if content is None else self.send_file(
                content, fault, {name: value for name, value in headers.items() if value})
        if parts[0] == "cdn":
            if query != SIGNATURE:
                return self.respond(403, b"the signature does not fit")
            return self.send_file(self.content(parts[1:]), fault)
        if parts[0] == "api":
            return self.api(parts[1], "/".join(parts[2:4]), parts[4:])
        kind = "datasets" if parts[0] == "datasets" else "models"
        owner, name, resolve, commit, *rest = parts[1:] if kind == "datasets" else parts
        if resolve != "resolve" or self.refused(f"{kind}/{owner}/{name}", commit):
            return None if resolve == "resolve" else self.respond(404, b"")
        return self.resolve(kind, f"{owner}/{name}", commit, "/".join(rest), fault)

    def refused(self, repo: str, commit: str | None) -> bool:
        """Whether the request was refused: no such repository or commit, or not allowed."""
        if repo not in self.hub.repos:
            self.respond(401, b"", {"X-Error-Code": "RepoNotFound"})  # the answer of the hub without a token
        elif repo in self.hub.gated and self.headers.get("Authorization") != "Bearer hf_good":
            self.respond(401, b"", {"X-Error-Code": "GatedRepo"})
        elif commit is not None and commit not in self.hub.repos[repo]:
            self.respond(404, b"", {"X-Error-Code": "RevisionNotFound"})
        else:
            return False
        return True

    def api(self, kind: str, repo: str, rest: list[str]) -> None:
        commit = rest[1] if len(rest) > 1 else None
        if commit == "main":
            commit = None
        if self.refused(f"{kind}/{repo}", commit):
            return
        commits = self.hub.repos[f"{kind}/{repo}"]
        commit = commit or list(commits)[-1]
        files = commits[commit]
        if rest[:1] == ["tree"]:
            tree = [{"type": "file", "path": p, "size": len(c), "oid": _git_sha1(c),
                     **({"lfs": {"oid": _sha256(c), "size": len(c), "pointerSize": 134}} if p.endswith(LFS) else {})}
                    for p, c in files.items()]
            self.respond(200, json.dumps(tree).encode())
        else:
            siblings = [{"rfilename": p, **(_blob(p, c) if self.hub.blobs else {})} for p, c in files.items()]
            info = {"id": repo, "sha": self.hub.answers_for_commit or commit, "siblings": siblings, "tags": [],
                    "downloads": 0, "likes": 0, "private": False}
            self.respond(200, json.dumps(info).encode())

    def resolve(self, kind: str, repo: str, commit: str, path: str, fault: Fault | None) -> None:
        content = self.hub.repos[f"{kind}/{repo}"][commit].get(path)
        if content is None:
            return self.respond(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        headers = {"X-Repo-Commit": commit}
        if path.endswith(LFS):
            headers |= {"X-Xet-Hash": _sha256(content), "X-Xet-Refresh-Route": f"/api/{kind}/{repo}/xet-read-token",
                     "X-Linked-Etag": f'"{_sha256(content)}"', "X-Linked-Size": str(len(content)),
                     "Location": f"{self.hub.cdn}/cdn/{kind}/{repo}/{commit}/{path}?{SIGNATURE}"}
            return self.respond(302, b"", headers)
        return self.send_file(content, fault, {**headers, "ETag": f'"{_git_sha1(content)}"'})

    def content(self, parts: list[str]) -> bytes:
        kind, owner, name, commit, *path = parts
        return self.hub.repos[f"{kind}/{owner}/{name}"][commit]["/".join(path)]

    def respond(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def send_file(self, content: bytes, fault: Fault | None, headers: Mapping[str, str] | None = None) -> None:
        fault = fault or Fault("")
        start, end, status, extra = 0, len(content), 200, dict(headers or {})
        if fault.version:
            extra["ETag"] = fault.version
        if self.hub.ranges:
            extra["Accept-Ranges"] = "bytes"
        wanted = self.headers.get("Range")
        if wanted and self.hub.ranges and self.headers.get("If-Range") in (None, extra.get("ETag")):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start = int(first) if fault.answer_from is None else fault.answer_from
            end = min(int(last) + 1, len(content)) if last else len(content)
            if start >= len(content):
                return self.respond(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            status = 206
            extra["Content-Range"] = fault.content_range or f"bytes {start}-{end - 1}/{len(content)}"
        body = memoryview(content)[start:end]
        if fault.wrong_bytes:
            body = memoryview(bytes([body[0] ^ 1]) + body[1:])
        if fault.cut_after is not None:
            body = body[:fault.cut_after]
        self.send_response(status)
        if self.hub.lengths:
            extra["Content-Length"] = str(len(body))
        else:
            extra["Connection"] = "close"
        for name, value in extra.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return None
        sent = Sent(self.path, start, end)
        with self.hub.lock:
            self.hub.sent.append(sent)
            self.hub.active += 1
            self.hub.most_active = max(self.hub.most_active, self.hub.active)
        try:
            if self.hub.together:
                self.hub.together.wait(10)
            self.send_body(body if fault.drop_after is None else body[:fault.drop_after], sent, fault)
        except (OSError, threading.BrokenBarrierError):  # the client was killed, or waited for
            self.close_connection = True
        with self.hub.lock:
            self.hub.active -= 1
        if fault.drop_after is not None:
            time.sleep(fault.linger_s)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        return None

    def send_body(self, body: memoryview, sent: Sent, fault: Fault) -> None:
        rate = fault.bytes_per_second or self.hub.bytes_per_second
        step = max(1, int(rate / 20)) if rate else 1 << 20
        for at in range(0, len(body), step):
            self.wfile.write(body[at:at + step])
            sent.count += len(body[at:at + step])
            if rate:
                time.sleep(0.05)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name that http.server uses
        """Stay quiet."""


def _blob(path: str, content: bytes) -> dict[str, object]:
    lfs = {"sha256": _sha256(content), "size": len(content), "pointerSize": 134}
    return {"size": len(content), "blobId": _git_sha1(content), **({"lfs": lfs} if path.endswith(LFS) else {})}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
