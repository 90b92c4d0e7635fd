"""A hub on this machine that serves a folder as fast as the kernel can.

It speaks as much of the hub's API as huggingface_hub and relocation use, for one repository, and sends files with
sendfile. It can limit each connection, and break them at random.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

REPO, COMMIT = "acme/model", "0" * 40
DIGESTS = "digests.json"  # beside the folder: names and sha256
SLICE_S = 0.02  # a limited connection gets its bytes in slices of so long
RANGE = re.compile(r"bytes=(\d+)-(\d*)")


class Server(ThreadingHTTPServer):
    """Serves `folder`.

    Args:
        rate: bytes a second that each connection gets; 0: all that there are.
        cut: bytes after which an answer breaks off, on average; 0: never.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path, rate: float, cut: float) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.rate, self.cut = folder, rate, cut
        self.digests = json.loads(folder.with_name(DIGESTS).read_text())
        self.sent = 0  # bytes of files
        self.chance, self.lock = random.Random(0), threading.Lock()

    def handle_error(self, request: object, client_address: object) -> None:
        """Stay quiet: clients are killed."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts == ["sent"]:
            self.send_json(self.server.sent)
        elif parts[0] == "api" and "tree" in parts:
            self.send_json([{"type": "file", "path": each["rfilename"], "size": each["size"], "oid": each["blobId"],
                             "lfs": each["lfs"] | {"oid": each["lfs"]["sha256"]}}
                            for each in map(self.sibling, sorted(self.server.digests))])
        elif parts[0] == "api":
            self.send_json({"id": REPO, "sha": COMMIT, "private": False, "tags": [], "siblings": [
                self.sibling(name) for name in sorted(self.server.digests)]})
        else:
            self.send_file(parts[-1])

    def sibling(self, name: str) -> dict[str, Any]:
        size, sha256 = (self.server.folder / name).stat().st_size, self.server.digests[name]
        return {"rfilename": name, "size": size, "blobId": "0" * 40,
                "lfs": {"sha256": sha256, "size": size, "pointerSize": 134}}

    def send_json(self, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def send_file(self, name: str) -> None:
        handle = os.open(self.server.folder / name, os.O_RDONLY)
        try:
            size = os.fstat(handle).st_size
            part = RANGE.fullmatch(self.headers.get("Range", ""))
            start, end = (int(part[1]), int(part[2]) + 1 if part[2] else size) if part else (0, size)
            self.send_response(206 if part else 200)
            for key, value in {"Content-Length": str(end - start), "Accept-Ranges": "bytes", "X-Repo-Commit": COMMIT,
                               "ETag": f'"{self.server.digests[name]}"'}.items():
                self.send_header(key, value)
            if part:
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
            self.end_headers()
            if self.command == "GET":
                self.send_bytes(handle, start, end)
        except OSError:
            self.close_connection = True
        finally:
            os.close(handle)

    def send_bytes(self, handle: int, start: int, end: int) -> None:
        server, before = self.server, time.monotonic()
        with server.lock:
            until = start + int(server.chance.expovariate(1 / server.cut)) if server.cut else end
        slice_bytes = int(server.rate * SLICE_S) or 1 << 22
        at = start
        while at < min(end, until):
            count = os.sendfile(self.connection.fileno(), handle, at, min(slice_bytes, min(end, until) - at))
            at += count
            with server.lock:
                server.sent += count
            if server.rate:
                time.sleep(max(0.0, before + (at - start) / server.rate - time.monotonic()))
        self.close_connection = at < end

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name that http.server uses
        """Stay quiet."""


def main() -> None:
    arguments = argparse.ArgumentParser(prog="python -m benchmarks.relocation_server", description=__doc__)
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--rate", type=float, default=0)
    arguments.add_argument("--cut", type=float, default=0)
    args = arguments.parse_args()
    server = Server(args.folder, args.rate, args.cut)
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
