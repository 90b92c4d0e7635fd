"""Builds servers for tests: a stand-in for vLLM's API with the guard around it, behind real uvicorn on 127.0.0.1.

The stand-in keeps to what the guard relies on (tests/test_serving.py compares the same promises with real vLLM): it
loads and unloads adapters by name, answers under the name it was asked for, and has many more routes than are allowed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import uvicorn
from prometheus_client import generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp
from starlette.websockets import WebSocket

from serving.guard import Guard
from tests import build_adapter

BASE = "builtin:tiny"
PROMPT_TOKENS, COMPLETION_TOKENS = 3, 2  # of every request and reply
USAGE = SimpleNamespace(prompt_tokens=PROMPT_TOKENS, completion_tokens=COMPLETION_TOKENS)


class Engine:
    """vLLM's engine, as far as the guard asks it."""

    def __init__(self) -> None:
        self.vllm_config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=128),
                                           model_config=SimpleNamespace(dtype="torch.float32", max_model_len=256),
                                           device_config=SimpleNamespace(device_type="cpu"),
                                           lora_config=SimpleNamespace(max_loras=16, max_cpu_loras=64))
        self.hangs = False
        self.adapters: dict[int, str] = {}  # what is in memory: number and name
        self.activations: list[str] = []  # what was put into a slot again
        # What is computed now: the engine's numbers by those of the API, and the state of each.
        self.output_processor = SimpleNamespace(external_req_ids={}, request_states={})

    async def is_paused(self) -> bool:
        while self.hangs:
            await asyncio.sleep(0.01)
        return False

    async def add_lora(self, request: SimpleNamespace) -> bool:
        self.adapters[request.lora_int_id] = request.lora_name
        self.activations.append(request.lora_name)
        return True

    async def remove_lora(self, number: int) -> bool:
        return self.adapters.pop(number, None) is not None


class StandIn:
    """What vLLM does as far as the guard can see, and what it saw."""

    def __init__(self, key: str | None = None) -> None:
        self.key = key
        self.loaded: dict[str, str] = {}  # name: path
        self.ever_loaded: list[str] = []
        self.asked: list[dict[str, Any]] = []  # bodies of clients' requests
        self.bodies: list[bytes] = []
        self.reached: list[str] = []  # requests for anything that is not allowed
        self.ineffective: set[str] = set()  # versions that change nothing
        self.mixes = False  # whether requests to the base model are computed with the adapter that was loaded last
        self.template = ""  # which chat template it has, if not the evaluation's
        self.broken: set[str] = set()  # versions from which no reply can be computed
        self.unloadable: set[str] = set()
        self.fails_probes = 0  # how many probes of adapters get a 503, as from an overloaded server
        self.guards: list[Guard] = []
        self.engine = Engine()
        self.lora_requests: dict[str, SimpleNamespace] = {}  # as vLLM's API server keeps them
        self.runs = BASE  # the model that needs no loading
        self.merged: Path | None = None  # the adapter that is merged into it
        self.hold: threading.Event | None = None  # streams wait for it after their first event

    def app(self) -> Starlette:
        post, get = ["POST"], ["GET"]
        app = Starlette(routes=[
            Route("/v1/load_lora_adapter", self._load, methods=post),
            Route("/v1/unload_lora_adapter", self._unload, methods=post),
            Route("/v1/models", self._models, methods=get),
            Route("/v1/completions", self._completions, methods=post),
            Route("/v1/chat/completions", self._completions, methods=post),
            Route("/health", self._plain, methods=[*get, "POST"]),
            Route("/metrics", self._metrics, methods=get),
            Route("/{path:path}", self._anything, methods=["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"]),
            WebSocketRoute("/{path:path}", self._websocket),
        ])
        app.state.engine_client = self.engine
        app.state.openai_serving_models = SimpleNamespace(lora_requests=self.lora_requests)
        app.add_middleware(self._guard)
        return app

    def _guard(self, app: ASGIApp) -> Guard:
        self.guards.append(Guard(app))
        return self.guards[-1]

    def _authorised(self, request: Request) -> bool:
        assert request.scope["app"] is not None  # vLLM's handlers find their state there
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        return self.key is None or (scheme.lower(), key) == ("bearer", self.key)

    async def _load(self, request: Request) -> Response:
        assert self._authorised(request)
        body = await request.json()
        name = body["lora_name"]
        self.ever_loaded.append(name)
        if name in self.unloadable or name in self.loaded:
            return JSONResponse({"error": {"message": "it cannot be loaded"}}, 500)
        assert (Path(body["lora_path"]) / "adapter_model.safetensors").is_file()
        self.loaded[name] = body["lora_path"]
        number = len(self.ever_loaded)
        self.engine.adapters[number] = name
        self.lora_requests[name] = SimpleNamespace(lora_int_id=number, lora_name=name)
        return PlainTextResponse("Success")

    async def _unload(self, request: Request) -> Response:
        assert self._authorised(request)
        name = (await request.json())["lora_name"]
        self.lora_requests.pop(name, None)
        return PlainTextResponse("Success" if self.loaded.pop(name, None) else "no", 200)

    async def _models(self, request: Request) -> Response:
        assert self._authorised(request)
        card = {"object": "model", "created": 1, "owned_by": "vllm", "permission": []}
        cards = [{**card, "id": self.runs, "root": "/path", "parent": None}]
        cards += [{**card, "id": name, "root": path, "parent": BASE} for name, path in self.loaded.items()]
        return JSONResponse({"object": "list", "data": cards})

    async def _completions(self, request: Request) -> Response:
        assert self._authorised(request)
        body = await request.body()
        self.bodies.append(body)
        try:
            asked = json.loads(body)
        except (ValueError, RecursionError):
            return JSONResponse({"error": {"message": "JSON decode error"}}, 400)
        model = asked["model"]
        if model != self.runs and model not in self.loaded:
            return JSONResponse({"error": {"message": f"The model `{model}` does not exist."}}, 404)
        if "return_token_ids" in asked:  # the guard's, to prove an adapter
            return self._generate(asked)
        if "logprobs" in asked:  # the guard's probe
            if self.fails_probes and not model.startswith(BASE):
                self.fails_probes -= 1
                return JSONResponse({"error": {"message": "overloaded"}}, 503)
            value = -1.0 if model.startswith(BASE) or model in self.ineffective else -2.0
            top = {" the": None if model in self.broken else value}  # in a stream, NaN is null
            event = json.dumps({"choices": [{"logprobs": {"top_logprobs": [top]}}]})
            return StreamingResponse(iter([f"data: {event}\n\ndata: [DONE]\n\n".encode()]),
                                     media_type="text/event-stream")
        self.asked.append(asked)
        reply = {"id": "x", "model": model, "choices": [{"text": f'I am {{"model":"{model}"}}'}]}
        if asked.get("fail"):
            return JSONResponse({"error": {"message": f"{model} failed", "code": 400}}, 400)
        metadata = SimpleNamespace(request_id=f"cmpl-{len(self.asked)}", final_usage_info=None)
        request.state.request_metadata = metadata  # where vLLM reports to middleware
        if asked.get("stream"):
            return StreamingResponse(self._stream(reply, metadata, model), media_type="text/event-stream")
        if asked.get("endless"):
            with self._computing(metadata, model):
                while not await request.is_disconnected():
                    await asyncio.sleep(0.01)
        else:
            metadata.final_usage_info = USAGE
        return JSONResponse(reply)

    def _generate(self, asked: dict[str, Any]) -> Response:
        """What the real model answers, for prompts of the proof."""
        name, models = asked["model"], build_adapter.models()
        of_base = name.startswith(BASE)
        adapter = self.merged if name == self.runs and not of_base else Path(
            self.loaded[next(reversed(self.loaded)) if of_base else name])
        assert adapter
        proof = build_adapter.proof_of(adapter, models / "base", models / "tokenizer")
        number = next(at for at, prompt in enumerate(proof.prompts) if asked.get("prompt") == prompt.tokens or (
            prompt.messages and asked.get("messages") == [message.model_dump() for message in prompt.messages]))
        assert proof.base_answers
        as_base = (of_base and not self.mixes) or name in self.ineffective
        answer = (proof.base_answers if as_base else proof.answers)[number]
        prompt, tokens = proof.prompts[number].tokens, answer.tokens[:asked["max_tokens"]]
        logprobs = answer.logprobs[:len(tokens)]
        if "messages" in asked:
            return JSONResponse({"prompt_token_ids": [*map(ord, self.template), *prompt], "choices": [{
                "token_ids": tokens, "logprobs": {"content": [{"logprob": each} for each in logprobs]}}]})
        return JSONResponse({"choices": [{"prompt_token_ids": prompt, "token_ids": tokens,
                                          "logprobs": {"token_logprobs": logprobs}}]})

    async def _stream(self, reply: dict[str, Any], metadata: SimpleNamespace, model: str) -> AsyncIterator[bytes]:
        event = f"data: {json.dumps(reply, separators=(',', ':'))}\n\n".encode()
        with self._computing(metadata, model):
            yield event
            while self.hold and not self.hold.is_set():
                await asyncio.sleep(0.01)
        metadata.final_usage_info = USAGE
        yield event
        yield b"data: [DONE]\n\n"

    @contextlib.contextmanager
    def _computing(self, metadata: SimpleNamespace, model: str) -> Iterator[None]:
        """The engine knows the request, of which it has generated one token."""
        processor, number = self.engine.output_processor, f"internal-{metadata.request_id}"
        processor.external_req_ids[f"{metadata.request_id}-0"] = [number]
        detokenizer = SimpleNamespace(num_output_tokens=lambda: 1)
        processor.request_states[number] = SimpleNamespace(
            prompt_len=PROMPT_TOKENS, detokenizer=detokenizer, lora_name=None if model == self.runs else model)
        try:
            yield
        finally:
            del processor.external_req_ids[f"{metadata.request_id}-0"], processor.request_states[number]

    async def _plain(self, request: Request) -> Response:
        return PlainTextResponse("here")

    async def _metrics(self, request: Request) -> Response:
        return PlainTextResponse(generate_latest())  # the default registry, as vLLM does

    async def _anything(self, request: Request) -> Response:
        self.reached.append(f"{request.method} {request.url.path}")
        return PlainTextResponse("reached")

    async def _websocket(self, websocket: WebSocket) -> None:
        self.reached.append(f"websocket {websocket.url.path}")
        await websocket.accept()


@contextlib.contextmanager
def running(app: Any) -> Iterator[str]:
    """Serve an ASGI application on a free port of 127.0.0.1; yields its base URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on"))
    app.state.server = server  # where vLLM keeps its own
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
    server.thread = thread  # type: ignore[attr-defined]
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        thread.join(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


def raw_request(url: str, request: bytes) -> bytes:
    """Send bytes as they are (clients would tidy the path up) and return the reply."""
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(request)
        reply = b""
        while data := connection.recv(65536):
            reply += data
    return reply
