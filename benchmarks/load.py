"""A client that costs little: HTTP/1.1 over kept connections, every request a string of bytes made beforehand.

On a small machine the client runs on the cores that it measures, so it does nothing but send, note times and keep the
bytes. Replies are read and checked after the clocks have stopped.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

TIMEOUT_SECONDS = 120.0  # for one reply; the slowest here takes about a second


@dataclass(frozen=True)
class Reply:
    """One reply: how long it took to its first event (a stream's, else to its end) and to its end, and its content."""

    first: float
    seconds: float
    data: bytes  # head and body as received

    @property
    def status(self) -> int:
        return int(self.data[9:12]) if self.data else 0  # 0: no whole reply came

    @property
    def body(self) -> bytes:
        head, _, body = self.data.partition(b"\r\n\r\n")
        return _unchunked(body) if b"transfer-encoding: chunked" in head.lower() else body

    def events(self) -> list[dict[str, Any]]:
        """The content: a stream's events, or the one object of any other reply."""
        if not self.body.startswith(b"data: "):
            return [json.loads(self.body)]
        *events, done = [line.removeprefix(b"data: ") for line in self.body.split(b"\n") if line]
        if done != b"[DONE]":
            raise ValueError(f"the stream ends with {done[:200]!r}")
        return [json.loads(event) for event in events]


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


def post(path: str, body: dict[str, Any]) -> bytes:
    """The same bytes whichever server they go to: no port in `Host`."""
    data = json.dumps(body).encode()
    return (f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\n\r\n").encode() + data


class Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[bool] | None = None  # whether the reply is whole
        self._data = bytearray()
        self._end: int | None = None  # where the reply ends, once its head is there; -1: at the last chunk
        self._first = 0.0

    @classmethod
    async def to(cls, port: int) -> Connection:
        _, connection = await asyncio.get_running_loop().create_connection(cls, "127.0.0.1", port)
        return connection

    async def ask(self, request: bytes) -> Reply:
        self._data, self._end, self._first = bytearray(), None, 0.0
        self._done = asyncio.get_running_loop().create_future()
        started = time.perf_counter()
        if self._transport is None:
            return Reply(0.0, 0.0, b"")
        self._transport.write(request)
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                whole = await self._done
        except TimeoutError:
            whole = False
        seconds = time.perf_counter() - started
        return Reply(self._first - started if self._first else seconds, seconds, bytes(self._data) if whole else b"")

    def close(self) -> None:
        if self._transport:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._data += data
        if not self._first and b"data: " in data:  # the head comes before it, in a packet of its own
            self._first = time.perf_counter()
        if self._end is None:
            self._end = _end(self._data)
        if self._end is not None and self._done and not self._done.done() and (
                self._data.endswith(b"\r\n0\r\n\r\n") if self._end < 0 else len(self._data) >= self._end):
            self._done.set_result(True)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._done and not self._done.done():
            self._done.set_result(False)


async def drive(port: int, requests: Sequence[bytes], clients: int) -> tuple[float, list[Reply]]:
    """Ask all requests, `clients` at a time, each client asking the next as soon as it is answered.

    Returns the seconds from the first request to the last reply, and the replies in the order of the requests.
    """
    connections = [await Connection.to(port) for _ in range(clients)]
    replies: dict[int, Reply] = {}
    waiting = iter(enumerate(requests))

    async def client(connection: Connection) -> None:
        for i, request in waiting:
            replies[i] = await connection.ask(request)

    started = time.perf_counter()
    try:
        await asyncio.gather(*map(client, connections))
        return time.perf_counter() - started, [replies[i] for i in range(len(requests))]
    finally:
        for connection in connections:
            connection.close()


def _end(data: bytearray) -> int | None:
    """Where a reply ends that has begun with `data`: None if its head is not whole, -1 if it comes in chunks."""
    head, whole, _ = data.partition(b"\r\n\r\n")
    if not whole:
        return None
    for line in bytes(head).lower().split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name == b"content-length":
            return len(head) + 4 + int(value)
    return -1


def _unchunked(body: bytes) -> bytes:
    parts = []
    while body:
        size, _, body = body.partition(b"\r\n")
        parts.append(body[:int(size, 16)])
        body = body[int(size, 16) + 2:]
    return b"".join(parts)
