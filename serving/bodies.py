"""Reads the bodies of requests, within limits of size, time, and memory for all bodies that are being received."""

from __future__ import annotations

import asyncio

from starlette.responses import Response
from starlette.types import Receive, Scope

from serving.replies import RETRY_AFTER_SECONDS, error

MAX_BODY_BYTES = 4 * 1024 * 1024  # a context of 128k tokens is about 0.6 MB of text
# Bytes of each body that do not count against the memory for all: uvicorn buffers as much for each connection anyway.
# So ordinary requests are read even if unfinished large ones use all of the memory.
FREE_BYTES = 64 * 1024
# Enough for the largest body at 1.1 Mbit/s. An unfinished body is held in memory until then.
SECONDS = 30.0
# 16 of the largest bodies at once. The container has 4 GiB, of which vLLM takes half with a tiny model.
MEMORY_BYTES = 64 * 1024 * 1024


class Bodies:
    """Reads the bodies of one server's requests.

    Args:
        seconds: how long one body may take.
        memory: bytes for all bodies that are being read, beyond `FREE_BYTES` of each.
    """

    def __init__(self, seconds: float, memory: int) -> None:
        self._seconds = seconds
        self._memory = memory
        self._held = 0

    async def read(self, scope: Scope, receive: Receive) -> bytes | Response | None:
        """The request's body; an error reply if it exceeds a limit; None if the client disconnected."""
        refusal = _check_length([value for key, value in scope["headers"] if key == b"content-length"])
        if refusal:
            return refusal
        body, size, counted, room = bytearray(), 0, 0, True
        try:
            async with asyncio.timeout(self._seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    chunk = message.get("body", b"")
                    size += len(chunk)
                    if size > MAX_BODY_BYTES:
                        return _too_large()
                    more = max(size - FREE_BYTES, 0) - counted
                    if room and (not more or self._held + more <= self._memory):
                        body += chunk
                        self._held, counted = self._held + more, counted + more
                    elif room:  # read and drop the rest: a client that is still sending would not see a reply
                        self._held, counted, room = self._held - counted, 0, False
                        body.clear()
                    if not message.get("more_body", False):
                        return bytes(body) if room else _busy()
        except TimeoutError:
            return _unfinished(408, f"The body did not arrive within {self._seconds:g} s")
        finally:
            self._held -= counted


def _check_length(declared: list[bytes]) -> Response | None:
    """An error reply if Content-Length is invalid or above the limit."""
    if len(set(declared)) > 1 or not all(value.isdigit() for value in declared):
        return _unfinished(400, "Content-Length must be one number")
    for value in declared:
        digits = value.lstrip(b"0") or b"0"
        # The number of digits first: Python refuses to convert thousands of them.
        if len(digits) > len(str(MAX_BODY_BYTES)) or int(digits) > MAX_BODY_BYTES:
            return _too_large()
    return None


def _too_large() -> Response:
    return _unfinished(413, f"The body is larger than {MAX_BODY_BYTES} bytes")


def _busy() -> Response:
    return error(503, "The server is receiving too many large requests; try again",
                 headers={"Retry-After": str(RETRY_AFTER_SECONDS)})


def _unfinished(status: int, message: str) -> Response:
    """An error reply to a request whose body is not read to its end; the connection cannot be reused."""
    return error(status, message, headers={"Connection": "close"})
