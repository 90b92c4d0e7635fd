"""The guard: ASGI middleware inside vLLM's API server (`--middleware serving.guard.Guard`), outermost of all.

It allows only the routes that clients need, and translates between the alias that clients send (NAME) and the version
that vLLM knows (NAME@DIGEST): in requests, replies and every event of a stream. It limits what one request can take
from others. serving/aliases.py decides which version an alias points to.
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

from serving import cpu_shield, parameters
from serving.aliases import Aliases, Version
from serving.bodies import Bodies
from serving.drain import Drain
from serving.heartbeat import Heartbeat
from serving.merged import MergedAliases
from serving.replies import RETRY_AFTER_SECONDS, error
from serving.served import Served

# All reachable routes, compared byte for byte with the request's path. vLLM registers about sixty routes, some of which
# load adapters, pause the engine or bypass every check.
ALLOWED = {
    "/health": "GET",  # liveness
    "/ready": "GET",  # readiness; the guard's own
    "/metrics": "GET",
    "/v1/models": "GET",
    "/v1/chat/completions": "POST",
    "/v1/completions": "POST",
}
# One request may fill a quarter of the batch that the engine computes at once (--max-num-seqs), which leaves room for
# three more like it. With vLLM's defaults: 32 sequences on a CPU, 64 or 256 on GPUs.
SHARE_OF_BATCH = 4


class Guard:
    """See the module's docstring. vLLM may construct it more than once and serves through the last one."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.served = Served.from_environment()
        self._vllm_scope: dict[str, Any] = {}
        self.drain = Drain(self.served.drain_seconds)
        self.bodies = Bodies(self.served.body_seconds, self.served.body_memory)
        self.heartbeat = Heartbeat(self.served.hang_seconds)
        self.max_sequences = self.served.max_sequences
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
            await _refuse_websocket(receive, send)

    async def _call_vllm(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call vLLM for the guard itself. vLLM's handlers find their state through the application in the scope."""
        await self.app({**self._vllm_scope, **scope}, receive, send)

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Start the guard's tasks when vLLM is up, and stop them when it shuts down."""
        self._vllm_scope = {"app": scope["app"]}

        async def received() -> Message:
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                await self.aliases.stop()
                await self.heartbeat.stop()
            return message

        async def sent(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                self.drain.attach(scope["app"])
                engine = scope["app"].state.engine_client
                self.heartbeat.start(engine)
                if self.max_sequences is None:
                    self.max_sequences = max(engine.vllm_config.scheduler_config.max_num_seqs // SHARE_OF_BATCH, 1)
                self.aliases.start(scope["app"].state)
            await send(message)

        await self.app(scope, received, sent)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method = scope["path"], ALLOWED.get(scope["path"])
        if self.drain.reason is not None:
            send = _closing(send)
        if method is None or (scope.get("raw_path") or path.encode()) != path.encode():
            # The raw path too: an encoded path such as /v1%2fmodels is not an allowed one.
            await error(404, "Not found")(scope, receive, send)
        elif scope["method"] != method:
            await error(405, f"{path} takes {method} only", headers={"Allow": method})(scope, receive, send)
        elif path.startswith("/v1/") and not self._has_key(scope):
            # vLLM checks the key too, but only behind the guard, which answers some requests itself.
            await error(401, "The API key is missing or wrong", code="invalid_api_key")(scope, receive, send)
        elif path in ("/health", "/ready"):
            await self._health(scope, receive, send)
        elif path == "/v1/models":
            await self._models(scope, receive, send)
        elif method == "POST":
            await self._completion(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _health(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer /health (503: the server must be restarted) and /ready (503: clients should use another server)."""
        ready = scope["path"] == "/ready"
        if ready and self.drain.reason is not None:
            await error(503, f"Draining: {self.drain.reason}")(scope, receive, send)
        elif ready and not self.aliases.first_look_done.is_set():
            await error(503, "The server is still looking for its adapters")(scope, receive, send)
        elif self.heartbeat.hangs:
            await error(503, "vLLM's engine does not answer")(scope, receive, send)
        else:
            await self.app({**scope, "path": "/health", "raw_path": b"/health"}, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        if self._key is None:
            return True
        value = next((v for k, v in scope["headers"] if k == b"authorization"), b"")
        scheme, _, key = value.partition(b" ")
        # Hashed, so that the comparison takes the same time for keys of any length.
        return scheme.lower() == b"bearer" and hmac.compare_digest(hashlib.sha256(key).digest(), self._key)

    async def _completion(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on to the base model or, under its version's name, to an alias. Answer all others."""
        body = await self.bodies.read(scope, receive)
        if body is None:
            return  # the client disconnected
        target = self._target(scope["path"], body) if isinstance(body, bytes) else body
        if isinstance(target, Response):
            await target(scope, receive, send)
            return
        version, body = target
        scope, receive = _with_length(scope, body), _replay(body, receive)
        if version is None:
            await self.app(scope, receive, send)
        else:
            with version.request():
                await self.app(scope, receive, _Renamed(version, send))

    def _target(self, path: str, body: bytes) -> tuple[Version | None, bytes] | Response:
        """The version that a request is for (None: the base model itself) and the body for vLLM; or an error reply.

        The body is serialized again from what was checked here; vLLM never gets the client's bytes.
        """
        try:
            request = json.loads(body)
        except RecursionError:
            return error(400, "The request is nested too deeply")
        except ValueError as wrong:
            return error(400, f"The body is not valid JSON: {wrong}")
        if not isinstance(request, dict):
            return error(400, "The body must be a JSON object")
        model = request.get("model")
        if not model or not isinstance(model, str):  # vLLM would use the base model
            return error(400, "The request must name a model", param="model")
        version = self._version(model)
        if isinstance(version, Response):
            return version
        try:
            body = json.dumps({**request, "model": version.model if version else model}).encode()
            refusal = cpu_shield.refusal(path, request, self.served) or self._too_many(path, request)
        except RecursionError:
            return error(400, "The request is nested too deeply")
        return refusal or (version, body)

    def _version(self, model: str) -> Version | Response | None:
        """The version for a model name; None for the base model itself; or an error reply."""
        if model == self.served.base_name:
            return self.aliases.base
        alias = self.aliases.current.get(model)
        if alias is None:
            return error(404, f"The model `{model[:100]}` does not exist. See /v1/models", param="model",
                         code="model_not_found")
        if alias.version is None:
            return error(503, f"The model `{model}` is not ready: {alias.why}", code="model_not_ready",
                         headers={"Retry-After": str(RETRY_AFTER_SECONDS)})
        return alias.version

    def _too_many(self, path: str, request: dict[str, Any]) -> Response | None:
        """An error reply if the request has too many sequences."""
        if self.max_sequences is None or parameters.sequences(path, request) <= self.max_sequences:
            return None
        # Without the request's number: Python refuses to format an integer of thousands of digits.
        return error(400, f"This server generates at most {self.max_sequences} sequences (n for each prompt) for one "
                          "request. Send several requests", param="prompt" if request.get("n") in (None, 1) else "n")

    async def _models(self, scope: Scope, receive: Receive, send: Send) -> None:
        """vLLM's list of models, with aliases in place of versions; `root` is the version of an alias."""
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


class _Renamed:
    """Passes a reply on, with the alias in place of the version. Passes streams on line by line."""

    def __init__(self, version: Version, send: Send) -> None:
        self._send = send
        self._version, self._alias = version.model.encode(), version.name.encode()
        # Only as the value of a key: in generated text the quotes are escaped, so it cannot match.
        self._field = re.compile(rb'("model"\s*:\s*")' + re.escape(self._version) + rb'"')
        self._usual = b'"model":"' + self._version + b'"', b'"model":"' + self._alias + b'"'  # vLLM's formatting
        self._kept: _Kept | None = None  # a reply that is no stream, until it is complete
        self._line = b""  # the last line of a stream, until it is complete

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
                else:  # the usual case, without a split into lines: this runs for every token of every stream
                    data = self._renamed(data, error=False)
                await self._send({"type": "http.response.body", "body": data, "more_body": more})

    def _renamed(self, data: bytes, error: bool) -> bytes:
        if error:  # errors also name the model in their text
            return data.replace(self._version, self._alias)
        data = data.replace(*self._usual)
        return self._field.sub(rb"\g<1>" + self._alias + b'"', data) if self._version in data else data


class _Kept:
    """Collects a reply until it is complete, so that it can be changed."""

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


def _closing(send: Send) -> Send:
    """Close the connection after the reply, so that the client's next request goes to another server."""

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
    """Give vLLM the body that the guard has read, then the server's next messages (that the client disconnected)."""
    unread = True

    async def replayed() -> Message:
        nonlocal unread
        if unread:
            unread = False
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replayed


async def _refuse_websocket(receive: Receive, send: Send) -> None:
    """Close the websocket before it opens; the server answers 403.

    ASGI's extension for a 404 would work too, but then uvicorn logs an error each time.
    """
    await receive()
    await send({"type": "websocket.close", "code": 1008})
