"""A registry on 127.0.0.1 that speaks the OCI distribution specification, with tokens, ranges and faults.

    with serve() as registry:
        digest = registry.push("team/model", {"config.json": b"{}"}, tag="v1")   # oci://HOST/team/model:v1
        registry.users["ci"] = "secret"                  # from now on, credentials are needed
        registry.faults.append(Fault("blobs/", status=429, retry_after="1"))

`real()` is Debian's docker-registry with the same interface, except for faults: see `docker_registry`.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from jobs.core import retries
from jobs.relocation.sources import oci

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
ROOT = Path(__file__).resolve().parents[1]
CACHED = ROOT / ".venv" / "docker-registry"


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose path contains `path`."""

    path: str
    times: int = 1
    method: str | None = None
    status: int | None = None  # answer this
    code: str = "DENIED"
    retry_after: str | None = None
    cut_after: int | None = None  # end the connection after so many bytes of the body
    wrong_bytes: bool = False  # flip the first byte of the body
    expire: bool = False  # forget all tokens first
    drop_upload_after: int | None = None  # close the connection after so many bytes of what is uploaded


@dataclass
class Seen:
    method: str
    path: str
    headers: Mapping[str, str]
    host: str  # "registry", "tokens" or "storage"


@dataclass
class Registry:
    host: str = ""  # HOST:PORT
    storage: str = ""  # another origin, to which blobs are redirected if `redirects`
    blobs: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[tuple[str, str], bytes] = field(default_factory=dict)  # (name, tag or digest)
    types: dict[str, str] = field(default_factory=dict)
    users: dict[str, str] = field(default_factory=dict)
    readers: set[str] = field(default_factory=set)  # users that may only pull
    basic: bool = False  # instead of tokens
    redirects: bool = False
    ranges: bool = True
    tokens: dict[str, str] = field(default_factory=dict)  # token, user
    faults: list[Fault] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    uploads: dict[str, bytes] = field(default_factory=dict)  # what has arrived in each session

    def push(self, name: str, files: Mapping[str, bytes], tag: str, **changes: object) -> str:
        """Write an artifact as `oras push` makes it, with `changes` of the manifest. Returns its digest."""
        layers = []
        for path, content in files.items():
            digest = self.blob(content)
            layers.append({"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest,
                           "size": len(content), "annotations": {"org.opencontainers.image.title": path}})
        config = self.blob(b"{}")
        manifest = json.dumps({"schemaVersion": 2, "mediaType": MANIFEST, "layers": layers, "config": {
            "mediaType": "application/vnd.oci.empty.v1+json", "digest": config, "size": 2}} | changes).encode()
        return self.manifest(name, tag, manifest)

    def blob(self, content: bytes) -> str:
        digest = _digest(content)
        self.blobs[digest] = content
        return digest

    def manifest(self, name: str, tag: str, content: bytes) -> str:
        digest = _digest(content)
        self.manifests[name, tag] = self.manifests[name, digest] = content
        return digest

    def requests(self, method: str, part: str = "") -> list[Seen]:
        return [seen for seen in self.seen if seen.method == method and part in seen.path]


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


@contextmanager
def serve() -> Iterator[Registry]:
    """The server, until the block ends."""
    registry = Registry()
    with _listen(registry, "registry") as registry.host, _listen(registry, "storage") as registry.storage:
        yield registry


@contextmanager
def _listen(registry: Registry, role: str) -> Iterator[str]:
    handler = type("Handler", (_Handler,), {"registry": registry, "role": role})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    registry: Registry
    role: str
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _handle(self) -> None:
        registry, url = self.registry, urlsplit(self.path)
        self.fault = next((fault for fault in registry.faults if fault.path in self.path and fault.times
                           and fault.method in (None, self.command)), None)
        length = int(self.headers.get("Content-Length") or 0)
        registry.seen.append(Seen(self.command, self.path, dict(self.headers), self.role))
        if self.fault and self.fault.drop_upload_after is not None:
            self.fault.times -= 1
            registry.uploads[url.path] = self.rfile.read(self.fault.drop_upload_after)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return None
        self.body = self.rfile.read(length)
        if self.fault:
            self.fault.times -= 1
            if self.fault.expire:
                registry.tokens.clear()
            if self.fault.status:
                headers = {"Retry-After": self.fault.retry_after} if self.fault.retry_after else {}
                return self._error(self.fault.status, self.fault.code, headers)
        if self.role == "storage":
            if "Authorization" in self.headers:  # as S3 does with a signed URL
                return self._error(400, "INVALID")
            return self._content(registry.blobs[url.path.removeprefix("/")])
        if url.path == "/token":
            return self._token(parse_qs(url.query))
        user = self._user()
        if registry.users and user is None:
            challenge = 'Basic realm="registry"' if registry.basic else (
                f'Bearer realm="http://{registry.host}/token",service="registry"')
            return self._error(401, "UNAUTHORIZED", {"WWW-Authenticate": challenge})
        if user in registry.readers and self.command not in ("GET", "HEAD"):
            return self._error(403, "DENIED")
        name, _, rest = url.path.removeprefix("/v2/").partition("/manifests/")
        if rest:
            return self._manifest(name, rest)
        name, _, rest = url.path.removeprefix("/v2/").partition("/blobs/")
        if rest.startswith("uploads"):
            return self._upload(name, parse_qs(url.query))
        if rest not in registry.blobs:
            return self._error(404, "BLOB_UNKNOWN")
        if registry.redirects and self.command == "GET":
            return self._answer(307, b"", {"Location": f"http://{registry.storage}/{rest}?signature=a%2Fb"})
        return self._content(registry.blobs[rest])

    do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = _handle  # noqa: N815

    def _user(self) -> str | None:
        kind, _, value = self.headers.get("Authorization", "").partition(" ")
        if kind == "Bearer" and not self.registry.basic:
            return self.registry.tokens.get(value)
        return self._basic(value) if kind == "Basic" and self.registry.basic else None

    def _basic(self, value: str) -> str | None:
        name, _, password = base64.b64decode(value).decode().partition(":")
        return name if password and self.registry.users.get(name) == password else None

    def _token(self, query: Mapping[str, list[str]]) -> None:
        kind, _, value = self.headers.get("Authorization", "").partition(" ")
        form = parse_qs(self.body.decode())
        user = self._basic(value) if kind == "Basic" else form.get("refresh_token", [""])[0] or None
        if user not in self.registry.users:
            return self._error(401, "UNAUTHORIZED")
        token = uuid.uuid4().hex
        self.registry.tokens[token] = user
        return self._answer(200, json.dumps({"token": token, "scope": (query or form)["scope"]}).encode())

    def _manifest(self, name: str, reference: str) -> None:
        registry = self.registry
        if self.command == "PUT":
            document = json.loads(self.body)
            for part in (document["config"], *document["layers"]):
                if part["digest"] not in registry.blobs:
                    return self._error(400, "MANIFEST_BLOB_UNKNOWN")
            digest = registry.manifest(name, reference, self.body)
            return self._answer(201, b"", {"Docker-Content-Digest": digest})
        content = registry.manifests.get((name, reference))
        if content is None:
            return self._error(404, "MANIFEST_UNKNOWN")
        return self._answer(200, content, {"Docker-Content-Digest": _digest(content), "Content-Type": json.loads(
            content).get("mediaType", MANIFEST)})

    def _upload(self, name: str, query: Mapping[str, list[str]]) -> None:
        if self.command == "POST":
            place = f"/v2/{name}/blobs/uploads/{uuid.uuid4().hex}?state=a%2Fb"
            self.registry.uploads[urlsplit(place).path] = b""
            return self._answer(202, b"", {"Location": place})
        path = urlsplit(self.path).path
        if path not in self.registry.uploads or query.get("state") != ["a/b"]:
            return self._error(404, "BLOB_UPLOAD_UNKNOWN")
        content = self.registry.uploads.pop(path) + self.body  # as Debian's docker-registry does
        if _digest(content) != query["digest"][0]:
            return self._error(400, "DIGEST_INVALID")
        self.registry.blob(content)
        return self._answer(201, b"")

    def _content(self, content: bytes) -> None:
        wanted = self.headers.get("Range", "")
        if self.registry.ranges and wanted.startswith("bytes="):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) + 1 if last else len(content), len(content))
            if start >= len(content):
                return self._answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            return self._answer(206, content[start:end], {
                "Content-Range": f"bytes {start}-{end - 1}/{len(content)}"})
        return self._answer(200, content)

    def _error(self, status: int, code: str, headers: Mapping[str, str] | None = None) -> None:
        body = json.dumps({"errors": [{"code": code, "message": "as the registry\nputs it"}]}).encode()
        self._answer(status, body, headers, faulty=False)

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str] | None = None, faulty: bool = True) -> None:
        fault = self.fault if faulty else None
        if fault and fault.wrong_bytes:
            body = bytes([body[0] ^ 1]) + body[1:]
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault and fault.cut_after is not None:
            self.wfile.write(body[:fault.cut_after])
            self.wfile.flush()
            time.sleep(0.1)  # a client that has not yet read what came when the connection breaks loses it
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.wfile.write(body)


# --- a real registry --------------------------------------------------------------------------------------------------


@functools.cache
def docker_registry() -> Path | None:
    """The program of Debian's package docker-registry: from DOCKER_REGISTRY or PATH, or fetched once with apt; None
    where none of that works."""
    named = os.environ.get("DOCKER_REGISTRY") or shutil.which("docker-registry")
    if named:
        return Path(named)
    if not CACHED.exists() and shutil.which("apt-get") and shutil.which("dpkg-deb"):
        with tempfile.TemporaryDirectory(dir=CACHED.parent) as folder:
            _run(folder, "apt-get", "download", "-q", "docker-registry")
            for package in Path(folder).glob("docker-registry_*.deb"):
                _run(folder, "dpkg-deb", "-x", str(package), folder)
                (Path(folder) / "usr" / "bin" / "docker-registry").rename(CACHED)
    return CACHED if CACHED.exists() else None


def _run(folder: str, *command: str) -> None:
    with suppress(subprocess.TimeoutExpired):  # no network
        subprocess.run(command, cwd=folder, capture_output=True, timeout=60, check=False)


@contextmanager
def real(folder: Path) -> Iterator[str]:
    """Debian's docker-registry with its data below `folder`, until the block ends. Yields HOST:PORT. Skips the test
    where the program is not to be had."""
    program = docker_registry()
    if program is None:
        pytest.skip("no docker-registry: install Debian's package, or set DOCKER_REGISTRY to the program")
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{chosen.getsockname()[1]}"
    config = folder / "config.yml"
    config.write_text(json.dumps({"version": "0.1", "log": {"level": "error"}, "http": {"addr": host},
                                  "storage": {"filesystem": {"rootdirectory": str(folder / "data")}}}))
    with (folder / "log").open("wb") as log, subprocess.Popen(
            [program, "serve", str(config)], stdout=log, stderr=log) as process:
        try:
            for _ in range(1200):  # a minute
                try:
                    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"http://{host}/v2/").close()
                    break
                except OSError:
                    time.sleep(0.05)
            yield host
        finally:
            process.terminate()


@contextmanager
def either(kind: str, folder: Path) -> Iterator[str]:
    """The registry of this module ("python") or `real`, until the block ends. Yields HOST:PORT."""
    if kind == "python":
        with serve() as server:
            yield server.host
    else:
        with real(folder) as host:
            yield host


def isolate(monkeypatch: pytest.MonkeyPatch, folder: Path, attempts: int = 3) -> None:
    """No credentials and no settings of this machine, and short pauses."""
    for name in ("REGISTRY_AUTH_FILE", "REGISTRY_PLAIN_HTTP", "SSL_CERT_FILE", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DOCKER_CONFIG", str(folder))
    monkeypatch.setattr(retries, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(retries, "ATTEMPTS", attempts)
    oci._repository.cache_clear()
