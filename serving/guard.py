"""The guard: ASGI middleware inside vLLM's API server (`--middleware serving.guard.Guard`), outermost of all.

It allows only the routes that clients need, and only the models that the client's key opens (serving/keys.py). It
translates between the alias that clients send (NAME) and the version that vLLM knows (NAME@DIGEST): in requests,
replies and every event of a stream. It limits what one request can take from others, and counts what each key uses.
serving/aliases.py decides which version an alias points to.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving import cpu_shield, keys, parameters
from serving.aliases import Aliases, Version
from serving.bodies import Bodies
from serving.drain import Drain
from serving.heartbeat import Heartbeat
from serving.keys import Key, Keys
from serving.merged import MergedAliases
from serving.refusal import NotYet, Refused
from serving.replies import RETRY_AFTER_SECONDS, error
from serving.served import Served
from serving.usage import Usage

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
        self._vllm_key = os.environ.get("VLLM_API_KEY") or None
        self.keys = Keys(Path(os.environ.get("KEYS_FILE") or keys.FILE), self._vllm_key)
        self._engine: Any = None  # vLLM's EngineClient

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
                await self.keys.stop()
            return message

        async def sent(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                self.drain.attach(scope["app"])
                engine = self._engine = scope["app"].state.engine_client
                self.heartbeat.start(engine)
                self.keys.start()
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
        elif path in ("/health", "/ready"):
            await self._health(scope, receive, send)
        elif path == "/metrics":
            await (self._metrics_refusal(scope) or self.app)(scope, receive, send)
        elif isinstance(key := self._key(scope), Response):
            await key(scope, receive, send)
        elif path == "/v1/models":
            await self._models(key, self._with_vllm_key(scope), receive, send)
        else:
            await self._completion(key, self._with_vllm_key(scope), receive, send)

    async def _health(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer /health (503: the server must be restarted) and /ready (503: clients should use another server)."""
        ready = scope["path"] == "/ready"
        if ready and self.drain.reason is not None:
            await error(503, f"Draining: {self.drain.reason}")(scope, receive, send)
        elif ready and self.keys.locked:
            await error(503, "The file of keys was never valid, so no client has a valid key; see the log")(
                scope, receive, send)
        elif ready and not self.aliases.first_look_done.is_set():
            await error(503, "The server is still looking for its adapters")(scope, receive, send)
        elif self.heartbeat.hangs:
            await error(503, "vLLM's engine does not answer")(scope, receive, send)
        else:
            await self.app({**scope, "path": "/health", "raw_path": b"/health"}, receive, send)

    def _key(self, scope: Scope) -> Key | Response:
        """The key that the client sent, if it is valid; else an error reply."""
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        # Of two headers, a proxy may have checked the other one.
        scheme, _, token = values[0].partition(b" ") if len(values) == 1 else (b"", b"", b"")
        key = self.keys.find(token) if scheme.lower() == b"bearer" else None
        if key or not self.keys.required:
            return key or keys.ANYBODY
        if self.keys.problem:  # 401 would tell the holder of a good key to look for another one
            return error(503, "The server cannot read its keys", code="keys_not_ready",
                         headers={"Retry-After": str(RETRY_AFTER_SECONDS)})
        return error(401, "The API key is missing or wrong", code="invalid_api_key")

    def _metrics_refusal(self, scope: Scope) -> Response | None:
        """An error reply if the client may not read the metrics, which show what all teams do."""
        if not self.keys.metrics_need_key:
            return None
        key = self._key(scope)
        if isinstance(key, Response):
            return key
        return None if key.metrics else error(403, "This key may not read the metrics", code="metrics_not_allowed")

    def _with_vllm_key(self, scope: Scope) -> Scope:
        """The request's scope with the key that vLLM itself expects, if any, in place of the client's."""
        headers = [each for each in scope["headers"] if each[0] != b"authorization"]
        if self._vllm_key:
            headers.append((b"authorization", b"Bearer " + self._vllm_key.encode()))
        return {**scope, "headers": headers}

    async def _completion(self, key: Key, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on to the base model or, under its version's name, to an alias. Answer all others."""
        body = await self.bodies.read(scope, receive)
        if body is None:
            return  # the client disconnected
        target = self._target(key, scope["path"], body) if isinstance(body, bytes) else body
        if isinstance(target, Response):
            await target(scope, receive, send)
            return
        version, body = target
        usage = self._usage(key, version)
        scope, receive = usage.scope(_with_length(scope, body)), usage.receive(_replay(body, receive))
        try:
            async with self.aliases.request(version):
                with usage:
                    await self.app(scope, receive, _Renamed(version, send) if version else send)
        except (NotYet, Refused) as reason:  # before vLLM got the request
            why = reason if isinstance(reason, NotYet) else "its adapter could not be loaded; the server tries again"
            await error(503, f"The model `{version.name if version else ''}` is not ready: {why}",
                        code="model_not_ready", headers={"Retry-After": str(RETRY_AFTER_SECONDS)})(scope, receive, send)

    def _usage(self, key: Key, version: Version | None) -> Usage:
        if version is None or version is self.aliases.base:
            return Usage((key.name, self.served.base_name, self.served.base_model), self._engine,
                         version.model if version else None)
        # Without a folder, the version is the model that vLLM runs itself.
        return Usage((key.name, version.name, version.digest), self._engine, version.model if version.folder else None)

    def _target(self, key: Key, path: str, body: bytes) -> tuple[Version | None, bytes] | Response:
        """The version that a request is for (None: the base model itself) and the body for vLLM; or an error reply.

        What is checked is what vLLM gets: the guard's own values are set first, and the body is serialized again. If
        the checks read another value, they could take a request for invalid that vLLM accepts.
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
        if not key.may_use(model):
            # The same for a model that does not exist: a key cannot find out the names of others' adapters.
            return error(403, f"This key may not use a model named `{model[:100]}`. See /v1/models", param="model",
                         code="model_not_allowed")
        version = self._version(model)
        if isinstance(version, Response):
            return version
        request["model"] = version.model if version else model
        if self.keys.separate:
            own_salt = request.get("cache_salt")
            if own_salt is not None and not (isinstance(own_salt, str) and own_salt):
                return error(400, "`cache_salt` must be a text that is not empty", param="cache_salt")
            request["cache_salt"] = self.keys.salt(key, own_salt or "")
        try:
            body = json.dumps(request).encode()
            refusal = cpu_shield.refusal(path, request, self.served) or self._too_many(path, request)
        except RecursionError:
            return error(400, "The request is nested too deeply")
        return refusal or (version, body)

    def _version(self, model: str) -> Version | Response | None:
        """The version for a model name; None for the base model itself; or an error reply."""
        if model == self.served.base_name:
            return self.aliases.base
        alias = self.aliases.current.get(model)
        if alias is None and not self.aliases.first_look_done.is_set():
            return error(503, "The server is still looking for its adapters", code="model_not_ready",
                         headers={"Retry-After": str(RETRY_AFTER_SECONDS)})
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

    async def _models(self, key: Key, scope: Scope, receive: Receive, send: Send) -> None:
        """vLLM's list of models that the key opens, with aliases in place of versions; `root` is an alias's version."""
        reply = _Kept()
        await self.app(scope, receive, reply)
        if reply.status == 200:
            reply.body = self._listed(key, reply.body)
        await reply.pass_on(send)

    def _listed(self, key: Key, body: bytes) -> bytes:
        cards = {card["id"]: card for card in json.loads(body)["data"]}
        listed = []
        if self.served.base_name in cards:  # vLLM's root is a path of this machine
            root = f"{self.served.base_name}@{self.served.base_model}"
            listed.append({**cards[self.served.base_name], "root": root})
        for name, alias in sorted(self.aliases.current.items()):
            if alias.version and alias.version.model in cards:
                listed.append({**cards[alias.version.model], "id": name, "root": alias.version.model,
                               "parent": self.served.base_name})
        return json.dumps({"object": "list", "data": [card for card in listed if key.may_use(card["id"])]}).encode()


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
