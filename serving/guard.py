"""The guard: ASGI middleware inside vLLM's API server (`--middleware serving.guard.Guard`), outermost of all.

It lets only the routes through that clients need, and translates between the alias that clients say (NAME) and the
version that vLLM knows (NAME@DIGEST): in requests, in replies, in every event of a stream. See serving/aliases.py for
how an alias comes to point to a version.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.aliases import Aliases, Version
from serving.drain import Drain
from serving.merged import MergedAliases
from serving.served import Served

# All that is reachable, compared byte for byte with what was sent. vLLM registers some sixty routes, among them ones
# that load adapters, pause the engine and run tokens past every check.
ALLOWED = {
    "/health": "GET",
    "/metrics": "GET",
    "/v1/models": "GET",
    "/v1/chat/completions": "POST",
    "/v1/completions": "POST",
}
MAX_BODY_BYTES = 4 * 1024 * 1024  # a context of 128k tokens is about 0.6 MB of text
RETRY_AFTER_SECONDS = 5


class Guard:
    """See the module's docstring. vLLM constructs it, perhaps more than once, and serves through the last one."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.served = Served.from_environment()
        self._vllm_scope: dict[str, Any] = {}
        self.drain = Drain(self.served.drain_seconds)
        kind = MergedAliases if self.served.mode == "merged" else Aliases
        self.aliases = kind(self.served, self._call_vllm, self.drain.begin)
        key = os.environ.get("VLLM_API_KEY")
        self._key = hashlib.sha256(key.encode()).digest() if key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await _refuse_websocket(scope, receive, send)

    async def _call_vllm(self, scope: Scope, receive: Receive, send: Send) -> None:
        """vLLM as the guard itself calls it. Its handlers find their state through the application in the scope."""
        await self.app({**self._vllm_scope, **scope}, receive, send)

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Looks for adapters from the moment when vLLM is up until it goes down."""
        self._vllm_scope = {"app": scope["app"]} if "app" in scope else {}

        async def received() -> Message:
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                await self.aliases.stop()
            return message

        async def sent(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                self.drain.attach(scope["app"])
                self.aliases.start(scope["app"].state)
            await send(message)

        await self.app(scope, received, sent)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method = scope["path"], ALLOWED.get(scope["path"])
        if self.drain.reason is not None:
            send = _closing(send)
        if method is None or (scope.get("raw_path") or path.encode()) != path.encode():
            # The raw path too: %2f and the like must not become an allowed path by being decoded.
            await _error(404, "Not found")(scope, receive, send)
        elif scope["method"] != method:
            await _error(405, f"{path} takes {method} only", headers={"Allow": method})(scope, receive, send)
        elif path.startswith("/v1/") and not self._has_key(scope):
            # vLLM checks it too, but only behind the guard, which has answers of its own to give.
            await _error(401, "The API key is missing or wrong", code="invalid_api_key")(scope, receive, send)
        elif path == "/health" and self.drain.reason is not None:
            await _error(503, f"Draining: {self.drain.reason}")(scope, receive, send)
        elif path == "/v1/models":
            await self._models(scope, receive, send)
        elif method == "POST":
            await self._completion(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        if self._key is None:
            return True
        value = next((v for k, v in scope["headers"] if k == b"authorization"), b"")
        scheme, _, key = value.partition(b" ")
        # Hashed, so that the comparison takes the same time for keys of any length.
        return scheme.lower() == b"bearer" and hmac.compare_digest(hashlib.sha256(key).digest(), self._key)

    async def _completion(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A request to a model: to the base as it is, to an alias under its version's name, to nothing else."""
        body = await _read_body(scope, receive)
        if body is None:
            return  # the client went away
        if isinstance(body, Response):
            await body(scope, receive, send)
            return
        target = self._target(body)
        if isinstance(target, Response):
            await target(scope, receive, send)
        elif target is None:
            await self.app(scope, _replay(body, receive), send)
        else:
            version, body = target
            with version.request():
                await self.app(_with_length(scope, body), _replay(body, receive), _Renamed(version, send))

    def _target(self, body: bytes) -> tuple[Version, bytes] | Response | None:
        """Where a request goes: to a version, with the body for it; to vLLM as it is (None); or back with an error."""
        try:
            request = json.loads(body)  # the parser that vLLM uses: both read the same model from the same bytes
        except (ValueError, RecursionError):
            return None  # vLLM says best what is wrong with it
        if not isinstance(request, dict):
            return None
        model = request.get("model")
        if not model or not isinstance(model, str):  # vLLM would answer from the base model
            return _error(400, "The request must name a model", param="model")
        if model == self.served.base_name:
            return _for(self.aliases.base, request) if self.aliases.base else None
        alias = self.aliases.current.get(model)
        if alias is None:
            return _error(404, f"The model `{model[:100]}` does not exist. See /v1/models", param="model",
                          code="model_not_found")
        if alias.version is None:
            return _error(503, f"The model `{model}` is not ready: {alias.why}", code="model_not_ready",
                          headers={"Retry-After": str(RETRY_AFTER_SECONDS)})
        return _for(alias.version, request)

    async def _models(self, scope: Scope, receive: Receive, send: Send) -> None:
        """vLLM's list, with the aliases in place of the versions. `root` says which version an alias points to."""
        reply = _Kept()
        await self.app(scope, receive, reply)
        if reply.status == 200:
            reply.body = self._listed(reply.body)
        await reply.pass_on(send)

    def _listed(self, body: bytes) -> bytes:
        cards = {card["id"]: card for card in json.loads(body)["data"]}
        listed = []
        if self.served.base_name in cards:  # vLLM's root is a path of this machine
            root = f"{self.served.base_name}@{self.served.base_model}"
            listed.append({**cards[self.served.base_name], "root": root})
        for name, alias in sorted(self.aliases.current.items()):
            if alias.version and alias.version.model in cards:
                listed.append({**cards[alias.version.model], "id": name, "root": alias.version.model,
                               "parent": self.served.base_name})
        return json.dumps({"object": "list", "data": listed}).encode()


def _for(version: Version, request: dict[str, Any]) -> tuple[Version, bytes] | Response:
    """The request as vLLM is to get it."""
    try:
        return version, json.dumps({**request, "model": version.model}).encode()
    except RecursionError:
        return _error(400, "The request is nested too deeply")


class _Renamed:
    """Passes a reply on, with the alias where vLLM says the version. Streams are passed on line by line."""

    def __init__(self, version: Version, send: Send) -> None:
        self._send = send
        self._version, self._alias = version.model.encode(), version.name.encode()
        # Only as the value of a key: within generated text these quotes are escaped, so text cannot match.
        self._field = re.compile(rb'("model"\s*:\s*")' + re.escape(self._version) + rb'"')
        self._usual = b'"model":"' + self._version + b'"', b'"model":"' + self._alias + b'"'  # as vLLM writes it
        self._kept: _Kept | None = None  # a reply that is no stream, until it is whole
        self._line = b""  # the last line of a stream, until it is whole

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if dict(message.get("headers", [])).get(b"content-type", b"").startswith(b"text/event-stream"):
                await self._send(message)
            else:
                self._kept = _Kept()
                await self._kept(message)
        elif message["type"] != "http.response.body":
            await self._send(message)
        elif self._kept:
            await self._kept(message)
            if not message.get("more_body", False):
                self._kept.body = self._renamed(self._kept.body, error=self._kept.status >= 400)
                await self._kept.pass_on(self._send)
        else:
            data, more = self._line + message.get("body", b""), message.get("more_body", False)
            end = data.rfind(b"\n") + 1 if more else len(data)
            data, self._line = data[:end], data[end:]
            if data or not more:
                if b'data: {"error"' in data:
                    lines = (self._renamed(line, line.startswith(b'data: {"error"')) for line in data.splitlines(True))
                    data = b"".join(lines)
                else:  # the usual event: at once, because every token of every stream comes along here
                    data = self._renamed(data, error=False)
                await self._send({"type": "http.response.body", "body": data, "more_body": more})

    def _renamed(self, data: bytes, error: bool) -> bytes:
        if error:  # errors also name the model in their text
            return data.replace(self._version, self._alias)
        data = data.replace(*self._usual)
        return self._field.sub(rb"\g<1>" + self._alias + b'"', data) if self._version in data else data


class _Kept:
    """A reply kept back until it is whole, so that it can be changed."""

    def __init__(self) -> None:
        self._start: Message = {}
        self.body = b""

    @property
    def status(self) -> int:
        return int(self._start["status"])

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
        elif message["type"] == "http.response.body":
            self.body += message.get("body", b"")

    async def pass_on(self, send: Send) -> None:
        headers = [(k, v) for k, v in self._start.get("headers", []) if k.lower() != b"content-length"]
        await send({**self._start, "headers": [*headers, (b"content-length", str(len(self.body)).encode())]})
        await send({"type": "http.response.body", "body": self.body})


async def _read_body(scope: Scope, receive: Receive) -> bytes | Response | None:
    """The request's body; an error reply if it is too large; None if the client went away meanwhile."""
    declared = next((v for k, v in scope["headers"] if k == b"content-length"), b"0")
    if int(declared) > MAX_BODY_BYTES:
        return _too_large()
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            return _too_large()
        if not message.get("more_body", False):
            return bytes(body)


def _too_large() -> Response:
    return _error(413, f"The body is larger than {MAX_BODY_BYTES} bytes", headers={"Connection": "close"})


def _closing(send: Send) -> Send:
    """Close the connection after the reply, so that the client's next request finds another server."""

    async def closing(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), (b"connection", b"close")]}
        await send(message)

    return closing


def _with_length(scope: Scope, body: bytes) -> Scope:
    """The request's scope with the length of another body."""
    headers = [(k, v) for k, v in scope["headers"] if k not in (b"content-length", b"transfer-encoding")]
    return {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}


def _replay(body: bytes, receive: Receive) -> Receive:
    """Hands vLLM the body that the guard has read, then whatever the server says next (that the client went away)."""
    unread = True

    async def replayed() -> Message:
        nonlocal unread
        if unread:
            unread = False
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replayed


async def _refuse_websocket(scope: Scope, receive: Receive, send: Send) -> None:
    """404 for a websocket, where the server can say that; else it is closed before it opens (403)."""
    await receive()
    if "websocket.http.response" in scope.get("extensions", {}):
        reply = _error(404, "Not found")
        await send({"type": "websocket.http.response.start", "status": 404, "headers": reply.raw_headers})
        await send({"type": "websocket.http.response.body", "body": bytes(reply.body)})
    else:
        await send({"type": "websocket.close", "code": 1008})


def _error(status: int, message: str, *, param: str | None = None, code: str | None = None,
           headers: dict[str, str] | None = None) -> Response:
    """An error reply in OpenAI's shape. ASCII, so that no text a client sent can fail to be encoded."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    body = json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}})
    return Response(body, status, headers, media_type="application/json")
