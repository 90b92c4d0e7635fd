"""Promises of the guard: only what clients need is reachable, and replies say the alias that the client sent."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
import logging
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving import bodies, events, guard, heartbeat, keys, parameters, usage, verification
from serving.aliases import Alias, Version
from serving.refusal import Refused
from serving.residency import NoSlot
from serving.served import Served
from tests import build_adapter
from tests.build_guarded import NAME, World, replace_file, start, until
from tests.build_server import BASE, COMPLETION_TOKENS, PROMPT_TOKENS, Engine, raw_request

COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "x"}]


@pytest.fixture(scope="module")
def loaded() -> None:
    """Load vLLM's classes now: that takes seconds, in which the first request would wait. A real server has them."""
    for path in (COMPLETION, CHAT):
        parameters.parse(path, {})


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    yield from start(tmp_path, monkeypatch)


@pytest.fixture
def locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    yield from start(tmp_path, monkeypatch, key="right")


@pytest.fixture(scope="module")
def shielded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A server on a CPU, with an adapter."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for world in start(tmp_path_factory.mktemp("shielded"), monkeypatch, cpu_shield=True):
            build_adapter.promote(world.volumes, world.write()[0])
            until(world.served)
            yield world


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One server for all the knocking on closed doors."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for world in start(tmp_path_factory.mktemp("door"), monkeypatch):
            until(world.looked)
            yield world


# The narrow door


def status_of(reply: bytes) -> int:
    return int(reply.split(b" ", 2)[1])


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/v1/models"])
def test_open_routes_are_reachable_with_and_without_a_query(door: World, path: str) -> None:
    assert httpx.get(door.url + path).status_code == 200
    assert httpx.get(door.url + path + "?x=1").status_code == 200


@pytest.mark.parametrize("path", [
    "/", "/docs", "/openapi.json", "/tokenize", "/invocations", "/ping", "/v1/load_lora_adapter", "/v1/responses",
    "/v1/unload_lora_adapter", "/v1/embeddings", "/scale_elastic_ep", "/pause", "/version", "/metricsx", "/metrics/"])
def test_closed_routes_are_404_in_openais_shape_for_every_method(door: World, path: str) -> None:
    for method in ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"):
        reply = httpx.request(method, door.url + path)
        assert reply.status_code == 404
        if method != "HEAD":
            assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    assert not door.vllm.reached


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "PUT", "DELETE", "TRACE"])
def test_open_routes_take_no_other_method(door: World, method: str) -> None:
    for path, allowed in guard.ALLOWED.items():
        reply = httpx.request(method, door.url + path)
        assert (reply.status_code, reply.headers["allow"]) == (405, allowed)


def test_load_is_not_reachable_by_post_to_health_either(door: World) -> None:
    assert httpx.post(door.url + "/health").status_code == 405


def odd(path: str) -> st.SearchStrategy[str]:
    """Spellings of a path that some routers take for the path itself."""
    at = st.integers(0, len(path) - 1)
    letter = at.filter(lambda i: path[i] != "/")
    return st.one_of(
        at.map(lambda i: path[:i] + "/" + path[i:]),  # a double slash, or one within a word
        letter.map(lambda i: f"{path[:i]}%{ord(path[i]):02x}{path[i + 1:]}"),  # an encoded letter
        letter.map(lambda i: path[:i] + path[i].swapcase() + path[i + 1:]),
        st.sampled_from([path + "/", path + "%2f", path + "/.", path + "/..", path + "%00", path + ";x=1",
                         path + ".json", path + "%20", path + "%3f", "/." + path, "/x/.." + path, "/%2e" + path,
                         "//x" + path, path.replace("/", "%2F"), path.replace("/", "%252f"), path.replace("/", "\\"),
                         "/v1/../" + path[1:], path + "//", path.upper(), path + "%0a"]))


ROUTES = [*guard.ALLOWED, "/v1/load_lora_adapter", "/tokenize", "/invocations"]


@settings(max_examples=300, deadline=None)
@given(path=st.sampled_from(ROUTES).flatmap(odd) | st.text(st.characters(min_codepoint=33, max_codepoint=126)),
       method=st.sampled_from(["GET", "POST"]))
def test_no_odd_spelling_gets_past_the_guard(door: World, path: str, method: str) -> None:
    target = "/" + path.lstrip("/") if not path.startswith("/") else path
    if target.partition("?")[0].partition("#")[0] in guard.ALLOWED:
        return
    reply = raw_request(door.url, f"{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                                  "Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}".encode())
    assert status_of(reply) in (404, 400)  # 400: uvicorn itself does not take it for HTTP
    assert not door.vllm.reached


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/realtime", "/health"])
def test_a_websocket_is_refused_everywhere_without_a_line_in_the_log(
        door: World, path: str, caplog: pytest.LogCaptureFixture) -> None:
    reply = raw_request(door.url, f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
                        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode())
    assert status_of(reply) == 403
    assert not door.vllm.reached
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]


def test_a_body_that_is_too_large_is_413_whether_or_not_its_length_is_declared(
        door: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "MAX_BODY_BYTES", 1000)
    seen = len(door.vllm.bodies)
    url = door.url + "/v1/completions"
    assert httpx.post(url, content=b"x" * 1001).status_code == 413
    assert httpx.post(url, content=iter([b"x" * 600] * 2)).status_code == 413
    for length in (1001, 99999999999):
        huge = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode()
        assert status_of(raw_request(door.url, huge)) == 413  # at once, without waiting for the body
    assert len(door.vllm.bodies) == seen
    assert httpx.post(url, content=b" " * 1000).status_code == 400


@pytest.mark.parametrize("length", [
    "0" * 10_000, "9" * 10_000, "0" * 5_000 + "2", "-1", "+5", "5 5", "0x10", "1e3", "٣", "5, 5",
    "5\r\nContent-Length: 6"])
def test_a_length_that_is_odd_is_never_a_traceback(
        door: World, caplog: pytest.LogCaptureFixture, length: str) -> None:
    seen = len(door.vllm.bodies)
    reply = raw_request(door.url, f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n"
                                  "Connection: close\r\n\r\n{}".encode())
    assert status_of(reply) in (400, 413)
    assert len(door.vllm.bodies) == seen
    assert not [each for each in caplog.records if each.levelno >= logging.ERROR]


@pytest.mark.parametrize("headers", [[b"-1"], [b"+5"], [b"5", b"6"], [b""], [b"x"], [b"\xb2"], [b"9" * 10_000]])
def test_a_length_that_the_http_server_lets_through_is_the_clients_error_all_the_same(headers: list[bytes]) -> None:
    assert outcome(bodies.Bodies(1, 1), [], *headers).status_code == (413 if len(headers[0]) > 5 else 400)


@pytest.mark.parametrize("lengths", [[b"5"], [b"5", b"5"], [b"0" * 5_000 + b"5"], [b"0" * 10_000], []])
def test_a_length_that_is_one_number_in_any_spelling_is_read(lengths: list[bytes]) -> None:
    assert outcome(bodies.Bodies(0.01, 1), [], *lengths).status_code == 408  # it waits for the body


@pytest.mark.parametrize("body", [b"", b"{", b'{"model": "seville-hotels"', b"\xff\xfe", b"[" * 100_000, b"[]", b"1"])
def test_malformed_json_is_400_and_not_passed_on(door: World, body: bytes) -> None:
    seen = len(door.vllm.bodies)
    reply = httpx.post(door.url + "/v1/completions", content=body)
    assert reply.status_code == 400
    assert reply.json()["error"]["type"] == "invalid_request_error"
    assert len(door.vllm.bodies) == seen


@pytest.mark.parametrize("model", [BASE, NAME])
def test_vllm_gets_what_the_guard_checked_and_not_what_came(world: World, model: str) -> None:
    build_adapter.promote(world.volumes, world.write()[0])
    until(world.served)
    body = f'{{"model": "other", "n": 99, "prompt": "x", "n": 1, "model": "{model}"}}'
    assert httpx.post(world.url + "/v1/completions", content=body).status_code == 200
    assert world.vllm.bodies[-1].count(b'"n"') == world.vllm.bodies[-1].count(b'"model"') == 1
    assert (world.vllm.asked[-1]["n"], world.vllm.asked[-1]["model"].partition("@")[0]) == (1, model)


# Bodies that do not end


def arrival(*chunks: bytes, ends: bool = False) -> Receive:
    """A client that sends these chunks, and then nothing more."""
    left = list(chunks)

    async def receive() -> Message:
        if left:
            return {"type": "http.request", "body": left.pop(0), "more_body": bool(left) or not ends}
        return await asyncio.Future()

    return receive


def messages(*these: Message) -> Receive:
    """A client or a server that sends these messages, one after the other."""
    left = iter(these)

    async def receive() -> Message:
        return next(left)

    return receive


def outcome(reader: bodies.Bodies, chunks: list[bytes], *lengths: bytes, ends: bool = False) -> Response:
    """The error reply to a client that sends these chunks; by default its body does not end."""
    scope = {"headers": [(b"content-length", length) for length in lengths]}
    reply = asyncio.run(reader.read(scope, arrival(*chunks, ends=ends)))
    assert isinstance(reply, Response)
    return reply


def test_a_body_that_does_not_come_is_408_after_the_deadline_and_the_connection_is_closed(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for world in start(tmp_path, monkeypatch, body_seconds=0.3):
        started = time.monotonic()
        reply = raw_request(world.url, b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 20\r\n\r\n{")
        assert status_of(reply) == 408  # raw_request reads until the connection is closed
        assert 0.3 <= time.monotonic() - started < 5
        assert world.ask(BASE).status_code == 200


def test_unfinished_bodies_hold_a_bounded_memory_beyond_which_only_large_ones_are_sent_away(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = bodies.FREE_BYTES + 400_000
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {large}\r\n\r\n".encode()
    for world in start(tmp_path, monkeypatch, body_memory=1_000_000):
        guarded = world.vllm.guards[-1]
        with contextlib.ExitStack() as stack:
            for _ in range(2):
                unfinished = stack.enter_context(socket.create_connection(("127.0.0.1", int(world.url[-5:]))))
                unfinished.sendall(head + b"x" * (large - 1))
            until(lambda: guarded.bodies._held >= 799_000)  # noqa: B023 - the loop has one turn
            reply = world.ask(BASE, padding="x" * large)
            assert (reply.status_code, reply.headers["retry-after"]) == (503, "5")
            assert world.ask(BASE, padding="x" * (bodies.FREE_BYTES - 1000)).status_code == 200
        until(lambda: guarded.bodies._held == 0)  # noqa: B023
        assert world.ask(BASE, padding="x" * 900_000).status_code == 200


def test_what_every_outcome_held_is_given_back() -> None:
    reader = bodies.Bodies(0.1, 1000)
    scope: Scope = {"headers": []}
    most = b"x" * (bodies.FREE_BYTES + 1000)
    assert asyncio.run(reader.read(scope, arrival(most[:-5], most[-5:], ends=True))) == most
    assert outcome(reader, [most, b"x"]).status_code == 408
    assert outcome(reader, [most]).status_code == 408
    busy = asyncio.run(reader.read(scope, arrival(most, b"x", b"x", ends=True)))
    assert isinstance(busy, Response) and busy.status_code == 503
    assert asyncio.run(reader.read(scope, arrival(most, ends=True))) == most
    assert reader._held == 0
    small = b"x" * bodies.FREE_BYTES
    assert asyncio.run(bodies.Bodies(1, 0).read(scope, arrival(small, ends=True))) == small


def test_the_reply_to_a_refused_body_names_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "MAX_BODY_BYTES", 100_000)
    most = b"x" * bodies.FREE_BYTES
    for reply, words in ((outcome(bodies.Bodies(0.1, 1), []), "did not arrive within 0.1 s"),
                         (outcome(bodies.Bodies(1, 1), [], b"x"), "Content-Length must be one number"),
                         (outcome(bodies.Bodies(1, 1), [], b"100001"), "larger than 100000 bytes"),
                         (outcome(bodies.Bodies(1, 10**9), [most, most]), "larger than 100000 bytes"),
                         (outcome(bodies.Bodies(1, 1), [most, b"xx"], ends=True), "too many large requests")):
        assert words in json.loads(bytes(reply.body))["error"]["message"]


def test_a_body_of_the_largest_size_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "MAX_BODY_BYTES", 1000)
    scope: Scope = {"headers": [(b"content-length", b"1000")]}
    largest = b"x" * 1000
    assert asyncio.run(bodies.Bodies(1, 0).read(scope, arrival(largest[:1], largest[1:], ends=True))) == largest


def test_a_body_in_the_shortest_form_of_its_message_is_empty() -> None:
    async def receive() -> Message:
        return {"type": "http.request"}  # ASGI: no bytes, and nothing follows

    assert asyncio.run(bodies.Bodies(1, 0).read({"headers": []}, receive)) == b""


def test_a_body_for_which_there_is_no_memory_holds_none_while_its_rest_is_read() -> None:
    most = b"x" * (bodies.FREE_BYTES + 1000)

    async def read_both() -> object:
        reader = bodies.Bodies(5, 1000)
        unfinished = asyncio.create_task(reader.read({"headers": []}, arrival(most, b"x")))
        await asyncio.sleep(0.1)
        try:
            return await reader.read({"headers": []}, arrival(most, ends=True))
        finally:
            unfinished.cancel()

    assert asyncio.run(read_both()) == most


# What one request may ask for


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("asks", [
    {"n": 33}, {"n": 16384}, {"n": "33"}, {"n": 33.0}, {"n": "3_3"}, {"prompt": ["x"] * 33},
    {"n": 10**4299, "prompt": ["x"] * 1000},
    {"prompt": [[1, 2]] * 33}, {"prompt": ["x"] * 3, "n": 11}, {"prompt": None, "prompt_embeds": ["eA=="] * 33},
    {"prompt": "x", "prompt_embeds": ["eA=="] * 32}, {"n": 33, "use_beam_search": True}, {"prompt": None, "n": 33}])
def test_more_sequences_than_a_share_of_the_batch_are_the_clients_error(door: World, asks: dict[str, Any]) -> None:
    seen = len(door.vllm.bodies)
    reply = door.ask(BASE, **asks)  # the stand-in for vLLM computes 128 at once
    assert reply.status_code == 400
    assert "at most 32 sequences" in reply.json()["error"]["message"]
    assert len(door.vllm.bodies) == seen


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("asks", [
    {"n": 32}, {"n": None}, {"n": "32"}, {"n": True}, {"prompt": ["x"] * 32}, {"prompt": list(range(1000))},
    {"prompt": [[1, 2]] * 16, "n": 2}, {"n": 0}, {"n": "many"}, {"n": -1, "prompt": []}, {"prompt": [1, "x"]},
    {"prompt": None, "n": 32}])
def test_up_to_that_share_is_passed_on_as_is_what_vllm_will_refuse(door: World, asks: dict[str, Any]) -> None:
    assert door.ask(BASE, **asks).status_code == 200


@pytest.mark.parametrize(("path", "what"), [(COMPLETION, {"prompt": "x"}), (CHAT, {"messages": MESSAGES})])
def test_a_number_in_words_is_read_as_vllm_reads_requests_to_that_route(path: str, what: dict[str, Any]) -> None:
    parameters._class.cache_clear()
    assert parameters.sequences(path, {**what, "n": "3"}) == 3


@pytest.mark.usefixtures("loaded")
def test_n_is_bounded_in_chat_and_an_operator_can_set_the_bound(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for world in start(tmp_path, monkeypatch, max_sequences=2):
        for path in ("/v1/chat/completions", "/v1/completions"):
            assert world.ask(BASE, path, n=2).status_code == 200
            reply = world.ask(BASE, path, n=3)
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, "n")



@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize(("path", "asks"), [
    (COMPLETION, {"echo": True, "logprobs": 1}), (COMPLETION, {"echo": "true", "logprobs": 0}),
    (COMPLETION, {"echo": 1, "logprobs": True}), (COMPLETION, {"echo": "on", "logprobs": 2.0}),
    (COMPLETION, {"echo": True, "logprobs": 1, "max_tokens": 0}), (COMPLETION, {"prompt_logprobs": 0}),
    (COMPLETION, {"echo": True, "logprobs": 1, "stream": True}), (COMPLETION, {"prompt_logprobs": False}),
    (COMPLETION, {"prompt_logprobs": -1}), (COMPLETION, {"prompt_logprobs": 1.0, "min_tokens": 9}),
    (CHAT, {"echo": True}), (CHAT, {"echo": "yes"}), (CHAT, {"echo": True, "logprobs": True, "top_logprobs": 2}),
    (CHAT, {"prompt_logprobs": 1}), (CHAT, {"prompt_logprobs": True})])
@pytest.mark.parametrize("model", [BASE, NAME])
def test_on_a_cpu_what_would_end_the_engine_is_the_clients_error(
        shielded: World, path: str, asks: dict[str, Any], model: str) -> None:
    seen = len(shielded.vllm.bodies)
    reply = shielded.ask(model, path, messages=MESSAGES, **asks)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] in ("echo", "prompt_logprobs")
    assert len(shielded.vllm.bodies) == seen


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize(("path", "asks"), [
    (COMPLETION, {"echo": True}), (COMPLETION, {"echo": "off", "logprobs": 1}), (COMPLETION, {"logprobs": 2}),
    (COMPLETION, {"prompt_logprobs": None}), (CHAT, {"echo": False, "logprobs": True, "top_logprobs": 2}),
    (COMPLETION, {"prompt_logprobs": "1"}), (COMPLETION, {"echo": "perhaps", "logprobs": 1})])
def test_on_a_cpu_other_log_probabilities_are_passed_on_as_is_what_vllm_will_refuse(
        shielded: World, path: str, asks: dict[str, Any]) -> None:
    assert shielded.ask(BASE, path, messages=MESSAGES, **asks).status_code == 200


@pytest.mark.usefixtures("loaded")
def test_on_a_gpu_log_probabilities_of_the_prompt_are_passed_on(door: World) -> None:
    assert door.ask(BASE, echo=True, logprobs=1).status_code == 200
    assert door.ask(BASE, prompt_logprobs=1).status_code == 200


odd_number: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, False, 0, 1, 2, -1, 1.0, 0.5, "1", "0", "true", " 1 ", "1_0", [], {}, 1e300])
odd_flag: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, False, 0, 1, 2, "true", "False", "on", "off", "y", "N", "t", 1.0, "", "x", []])


@settings(max_examples=300, deadline=None)
@given(asks=st.fixed_dictionaries({}, optional={
    "echo": odd_flag, "logprobs": odd_number, "top_logprobs": odd_number, "prompt_logprobs": odd_number,
    "n": odd_number, "max_tokens": odd_number, "min_tokens": odd_number, "stream": odd_flag,
    "use_beam_search": odd_flag}))
def test_the_guard_reads_what_vllm_reads(asks: dict[str, Any]) -> None:
    """vLLM's own way from a request to what its engine gets, against the guard's answer before it."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    for path, kind, what in ((COMPLETION, CompletionRequest, {"prompt": "x"}),
                             (CHAT, ChatCompletionRequest, {"messages": MESSAGES})):
        request: Any = {**what, **asks}
        try:
            engine = kind.model_validate(json.loads(json.dumps(request))).to_sampling_params(16, {})
        except Exception:
            continue
        assert parameters.wants_prompt_logprobs(path, dict(request)) == (engine.prompt_logprobs is not None)
        assert parameters.sequences(path, dict(request)) == engine.n


# Liveness and readiness


def test_the_server_is_ready_after_the_first_look_for_its_adapters_and_alive_all_the_while(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looking, copy = threading.Event(), verification.copy_verified

    def slow(*arguments: Any) -> Path:
        assert looking.wait(20)
        return copy(*arguments)

    monkeypatch.setattr(verification, "copy_verified", slow)
    for world in start(tmp_path, monkeypatch,
                       prepare=lambda world: build_adapter.promote(world.volumes, world.write()[0])):
        time.sleep(0.3)
        assert httpx.get(world.url + "/ready").status_code == 503
        assert httpx.get(world.url + "/health").status_code == 200
        looking.set()
        until(lambda: httpx.get(world.url + "/ready").status_code == 200)  # noqa: B023 - the loop has one turn
        assert world.served()


def test_an_engine_that_hangs_fails_liveness_and_readiness_until_it_answers(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "PAUSE_SECONDS", 0.05)
    now = clock_of_heartbeats(monkeypatch)

    def dead_after(seconds: float, url: str) -> bool:
        now[0] += seconds
        return httpx.get(url + "/health").status_code == 503

    for world in start(tmp_path, monkeypatch, hang_seconds=60.0):
        until(lambda: httpx.get(world.url + "/ready").status_code == 200)  # noqa: B023 - the loop has one turn
        world.vllm.engine.hangs = True
        assert not dead_after(59, world.url)  # not at the first late answer
        until(lambda: dead_after(59, world.url))  # noqa: B023
        assert httpx.get(world.url + "/ready").status_code == 503
        world.vllm.engine.hangs = False
        until(lambda: httpx.get(world.url + "/health").status_code == 200)  # noqa: B023
        assert httpx.get(world.url + "/ready").status_code == 200


def clock_of_heartbeats(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The monotonic time that heartbeats see, for a test to set."""
    now = [1000.0]
    monkeypatch.setattr(heartbeat, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_an_engine_that_hangs_is_logged_once(
        monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(heartbeat, "PAUSE_SECONDS", 0.0)

    async def watch() -> None:
        beats, engine = heartbeat.Heartbeat(0.02), Engine()
        engine.hangs = True
        beats.start(engine)
        async with asyncio.timeout(20):
            while "has not answered for" not in caplog.text:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        await beats.stop()

    asyncio.run(watch())
    assert caplog.text.count("has not answered for") == 1


def test_an_engine_that_is_not_asked_is_not_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "PAUSE_SECONDS", 0.5)

    async def watch() -> bool:
        beats = heartbeat.Heartbeat(0.1)
        beats.start(Engine())
        await asyncio.sleep(0.3)
        hangs = beats.hangs
        await beats.stop()
        return hangs

    assert not asyncio.run(watch())


def test_an_engine_that_cannot_be_asked_is_served_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    beats = heartbeat.Heartbeat(0.0)
    beats.start(object())
    assert "will not notice an engine that hangs" in caplog.text
    assert not beats.hangs


def test_an_engine_that_answers_late_but_answers_is_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "PAUSE_SECONDS", 0.0)
    now = clock_of_heartbeats(monkeypatch)
    began = now[0]

    async def slow() -> bool:
        now[0] += 40
        await asyncio.sleep(0.01)
        return False

    for world in start(tmp_path, monkeypatch, hang_seconds=60.0,
                       prepare=lambda world: monkeypatch.setattr(world.vllm.engine, "is_paused", slow)):
        while now[0] < began + 1000:
            assert httpx.get(world.url + "/health").status_code == 200


def test_a_request_nested_to_the_limit_of_the_parser_is_the_clients_error(world: World) -> None:
    pipeline, _ = world.write()
    build_adapter.promote(world.volumes, pipeline)
    until(world.served)
    for depth in range(sys.getrecursionlimit() - 150, sys.getrecursionlimit(), 2):
        body = b'{"model":"' + NAME.encode() + b'","prompt":' + b"[" * depth + b"]" * depth + b"}"
        assert httpx.post(world.url + "/v1/completions", content=body).status_code != 500


@pytest.mark.parametrize("model", [None, "", 0, 7, [], [NAME], {}, True])
def test_a_request_that_names_no_model_is_never_answered_by_the_base(door: World, model: object) -> None:
    assert door.ask(model).status_code == 400
    assert httpx.post(door.url + "/v1/completions", json={"prompt": "x"}).status_code == 400


@pytest.mark.parametrize("model", [
    "other", NAME.upper(), NAME + " ", NAME + "@" + "0" * 16, "../x", "\ud800", BASE + "/"])
def test_a_model_that_does_not_exist_is_404_and_not_asked_of_vllm(door: World, model: str) -> None:
    seen = len(door.vllm.bodies)
    reply = httpx.post(door.url + "/v1/completions", content=json.dumps({"model": model}).encode())
    assert reply.status_code == 404
    assert reply.json()["error"]["code"] == "model_not_found"
    assert len(door.vllm.bodies) == seen


def test_with_a_key_everything_under_v1_needs_it_and_the_guards_own_calls_have_it(locked: World) -> None:
    build_adapter.promote(locked.volumes, locked.write()[0])
    right = {"Authorization": "Bearer right"}
    until(lambda: len(httpx.get(locked.url + "/v1/models", headers=right).json()["data"]) == 2)
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "right"}, {"Authorization": "Basic right"},
                    {"Authorization": "Bearer righ"}, {"Authorization": "Bearer rightright"}):
        for model in (NAME, BASE, "other"):
            reply = httpx.post(locked.url + "/v1/completions", json={"model": model}, headers=headers)
            assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
        assert httpx.get(locked.url + "/v1/models", headers=headers).status_code == 401
        assert httpx.post(locked.url + "/v1/load_lora_adapter", headers=headers).status_code == 404
    assert httpx.get(locked.url + "/health").status_code == 200
    for scheme in ("Bearer", "bearer", "BEARER"):
        reply = httpx.post(locked.url + "/v1/completions", json={"model": NAME},
                           headers={"Authorization": f"{scheme} right"})
        assert reply.status_code == 200
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/invocations", "/tokenize"):  # not with it either
        assert httpx.post(locked.url + path, headers=right).status_code == 404
    assert not locked.vllm.reached


# Keys


OTHER = "granada-hotels"


@pytest.fixture(scope="module", params=["single", None])
def teams(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Two teams with an adapter each, with and without VLLM_API_KEY beside their keys; nobody changes it."""
    folder = tmp_path_factory.mktemp("teams")
    write_keys(folder)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("KEYS_FILE", str(folder / "keys.yaml"))
        for world in start(folder, monkeypatch, key=request.param):
            monkeypatch.delenv("KEYS_FILE")  # other tests start servers while this one runs
            promote_both(world)
            yield world


@pytest.fixture
def keyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """The same, for tests that change it."""
    write_keys(tmp_path)
    monkeypatch.setenv("KEYS_FILE", str(tmp_path / "keys.yaml"))
    monkeypatch.setattr(keys, "POLL_SECONDS", 0.02)
    for world in start(tmp_path, monkeypatch):
        promote_both(world)
        yield world


def write_keys(folder: Path, *without: str) -> None:
    models = {"a": f"[{NAME}]", "b": f"[{OTHER}, {BASE}, later]", "admin": '"*"'}
    entries = [{"name": f"team-{name}", "sha256": hashlib.sha256(f"key-{name}".encode()).hexdigest(),
                "models": yaml.safe_load(value)} for name, value in models.items() if name not in without]
    replace_file(folder / "keys.yaml", yaml.safe_dump({"keys": entries}))


def promote_both(world: World) -> None:
    for seed, name in enumerate((NAME, OTHER)):
        pipeline, _ = world.write(adapter=name, training__seed=seed)
        build_adapter.promote(world.volumes, pipeline)
    until(lambda: listed(world, "key-admin") == {NAME, OTHER, BASE})


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def listed(world: World, key: str) -> set[str]:
    return {card["id"] for card in httpx.get(world.url + "/v1/models", headers=bearer(key)).json()["data"]}


def ask(world: World, key: str, model: object, path: str = COMPLETION, **body: Any) -> httpx.Response:
    return httpx.post(world.url + path, json={"model": model, "prompt": "Hello", **body}, headers=bearer(key))


def test_a_key_lists_and_uses_its_own_models(teams: World) -> None:
    opened = {"key-a": {NAME}, "key-b": {OTHER, BASE}, "key-admin": {NAME, OTHER, BASE}}
    for key, models in opened.items():
        assert listed(teams, key) == models
        for model in (NAME, OTHER, BASE):
            for path in (COMPLETION, CHAT):
                for stream in (False, True):
                    assert ask(teams, key, model, path, stream=stream).status_code == (200 if model in models else 403)
    assert ask(teams, "key-b", "later").status_code == 404  # not there yet, and the key may know that


def test_a_key_does_not_learn_which_other_models_exist(teams: World) -> None:
    replies = [ask(teams, "key-a", model) for model in (OTHER, BASE, "no-such-hotels")]
    assert {reply.status_code for reply in replies} == {403}
    messages = {reply.text.replace(model, "X") for reply, model in zip(replies, (OTHER, BASE, "no-such-hotels"),
                                                                       strict=True)}
    assert len(messages) == 1
    problem = replies[0].json()["error"]
    assert set(problem) == {"message", "type", "param", "code"}
    assert (problem["param"], problem["code"]) == ("model", "model_not_allowed")
    assert problem["message"] == f"This key may not use a model named `{OTHER}`. See /v1/models"
    for reply in (ask(teams, "key-a", NAME, fail=True), ask(teams, "key-a", NAME, n=99),
                  httpx.post(teams.url + COMPLETION, content=b"{", headers=bearer("key-a"))):
        assert reply.status_code == 400
        assert OTHER not in reply.text


@pytest.mark.parametrize("model", [
    OTHER, OTHER.upper(), f" {OTHER}", f"{OTHER} ", f"{OTHER}\n", f"{OTHER}\x00", f"{OTHER}/", f"./{OTHER}",
    f"{NAME}@{OTHER}", f"{NAME},{OTHER}", "%67ranada-hotels", "granada\N{NON-BREAKING HYPHEN}hotels",
    "gr\N{CYRILLIC SMALL LETTER A}nada-hotels", "\N{FULLWIDTH LATIN SMALL LETTER G}ranada-hotels",
    "granada\N{SOFT HYPHEN}-hotels", "*", "version"])
def test_no_spelling_of_anothers_model_gets_past_the_guard(teams: World, model: str) -> None:
    if model == "version":
        model = next(name for name in teams.vllm.loaded if name.startswith(f"{OTHER}@"))
    seen = len(teams.vllm.bodies)
    assert ask(teams, "key-a", model).status_code == 403
    assert len(teams.vllm.bodies) == seen


@pytest.mark.parametrize("body", [
    f'{{"model": "{NAME}", "model": "{OTHER}"}}', f'{{"model": "{NAME}", "mod\\u0065l": "{OTHER}"}}',
    '{"model": "gr\\u0061nada-hotels"}', f'{{"model": ["{NAME}", "{OTHER}"]}}', f'[{{"model": "{OTHER}"}}]',
    f'{{"model": "{OTHER}"}}{{"model": "{NAME}"}}', f'{{"Model": "{OTHER}"}}', f'{{"model ": "{OTHER}"}}',
    f'{{"model": null, "lora_name": "{OTHER}"}}', f'{{"model": {{"id": "{OTHER}"}}}}', f'"{OTHER}"'])
def test_no_odd_json_gets_past_the_guard(teams: World, body: str) -> None:
    seen = len(teams.vllm.bodies)
    for encoding in ("utf-8", "utf-16", "utf-32", "utf-8-sig"):
        reply = httpx.post(teams.url + COMPLETION, content=body.encode(encoding), headers=bearer("key-a"))
        assert reply.status_code in (400, 403)
    assert len(teams.vllm.bodies) == seen


@pytest.mark.parametrize("framing", [
    "Content-Length: 5\r\nTransfer-Encoding: chunked", "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
    "Transfer-Encoding: xchunked", "Transfer-Encoding:\tchunked", "Content-Length: 5\r\nContent-Length: 6",
    "Content-Length : 5"])
def test_a_request_in_the_body_of_another_one_does_not_inherit_its_key(teams: World, framing: str) -> None:
    seen, body = len(teams.vllm.bodies), json.dumps({"model": OTHER, "prompt": "x"})
    hidden = f"POST {COMPLETION} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    reply = raw_request(teams.url, f"POST {COMPLETION} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer key-b\r\n{framing}"
                                   f"\r\n\r\n0\r\n\r\n{hidden}".encode())
    assert status_of(reply) == 400
    assert b" 200 OK" not in reply
    assert len(teams.vllm.bodies) == seen


def test_the_model_that_was_checked_is_the_only_one_that_vllm_gets(teams: World) -> None:
    body = f'{{"model": "{OTHER}", "model": "{NAME}", "prompt": "x"}}'
    assert httpx.post(teams.url + COMPLETION, content=body, headers=bearer("key-a")).status_code == 200
    assert teams.vllm.asked[-1]["model"].startswith(f"{NAME}@")
    assert OTHER.encode() not in teams.vllm.bodies[-1]
    extra = {"lora_request": {"lora_name": OTHER}, "lora_name": OTHER, "adapter": OTHER, "Model": OTHER}
    reply = httpx.post(teams.url + COMPLETION + f"?model={OTHER}", json={"model": NAME, "prompt": "x", **extra},
                       headers={**bearer("key-a"), "X-Model": OTHER})
    assert reply.status_code == 200
    assert teams.vllm.asked[-1]["model"].startswith(f"{NAME}@")


def test_real_vllm_reads_no_field_but_model_for_the_adapter() -> None:
    """If a version of vLLM takes an adapter from another field of a request, the guard must know it."""
    for path in (COMPLETION, CHAT):
        fields = parameters._class(path).model_fields
        assert [name for name in fields if "model" in name or "lora" in name or "adapter" in name] == ["model"]
        aliases = {field.validation_alias or field.alias for field in fields.values()}
        assert not [alias for alias in aliases if alias and "model" in str(alias)]


@pytest.mark.parametrize("headers", [
    [], ["Bearer "], ["Bearer key-c"], ["Bearer  key-a"], ["key-a"], ["Basic key-a"], ["Bearer key-a,"],
    ["Bearer\tkey-a"], ["Bearer KEY-A"], ["Bearer key-a key-admin"], ["Bearer key-admin", "Bearer key-a"],
    ["Bearer key-a", "Bearer key-a"], ["Bearer " + "x" * 50_000], ["Bearer \xff\xfe"],
    ["Bearer " + hashlib.sha256(b"key-a").hexdigest()], ["Bearer team-a"], ["Bearer key-a\x00"], ["Bearer none"]])
def test_a_header_that_is_not_exactly_a_valid_key_is_401(teams: World, headers: list[str]) -> None:
    seen = len(teams.vllm.bodies)
    for route in ("GET /v1/models", f"POST {COMPLETION}", f"POST {CHAT}"):
        request = [f"{route} HTTP/1.1", "Host: x", "Connection: close", "Content-Length: 2",
                   *(f"Authorization: {value}" for value in headers)]
        reply = raw_request(teams.url, "\r\n".join([*request, "", "{}"]).encode("latin-1"))
        assert status_of(reply) in ((401, 400) if "\x00" in "".join(headers) else (401,)), reply
        assert b"invalid_api_key" in reply or status_of(reply) == 400
    assert len(teams.vllm.bodies) == seen


def test_the_scheme_may_be_written_in_any_case(teams: World) -> None:
    for scheme in ("Bearer", "bearer", "BEARER"):
        reply = httpx.get(teams.url + "/v1/models", headers={"authorization": f"{scheme} key-a"})
        assert [card["id"] for card in reply.json()["data"]] == [NAME]


def test_the_single_key_opens_everything_beside_the_file(teams: World) -> None:
    reply = ask(teams, "single", OTHER)
    assert reply.status_code == (200 if teams.vllm.key else 401)


def test_a_removed_key_stops_working_and_a_request_in_progress_ends_well(keyed: World) -> None:
    keyed.vllm.hold = threading.Event()
    body = {"model": NAME, "prompt": "x", "stream": True}
    with httpx.stream("POST", keyed.url + COMPLETION, json=body, headers=bearer("key-a")) as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith("data: {")
        write_keys(keyed.folder, "a")
        until(lambda: ask_for_models(keyed, "key-a") == 401)
        keyed.vllm.hold.set()
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert ask(keyed, "key-b", OTHER).status_code == 200
    replace_file(keyed.folder / "keys.yaml", "keys: [")
    time.sleep(0.2)
    assert (ask_for_models(keyed, "key-a"), ask_for_models(keyed, "key-b")) == (401, 200)
    (keyed.folder / "keys.yaml").unlink()
    until(lambda: ask_for_models(keyed, "key-b") == 401)
    assert httpx.get(keyed.url + "/v1/models").status_code == 401
    write_keys(keyed.folder)
    until(lambda: ask_for_models(keyed, "key-a") == 200)


def ask_for_models(world: World, key: str) -> int:
    return httpx.get(world.url + "/v1/models", headers=bearer(key)).status_code


@pytest.mark.parametrize("single", ["single", None])
def test_with_an_invalid_file_from_the_start_only_the_holder_of_the_single_key_gets_in(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, single: str | None) -> None:
    (tmp_path / "keys.yaml").write_text("keys: [")
    monkeypatch.setenv("KEYS_FILE", str(tmp_path / "keys.yaml"))
    monkeypatch.setattr(keys, "POLL_SECONDS", 0.02)
    for world in start(tmp_path, monkeypatch, key=single):
        until(world.looked)
        for headers in (bearer("key-a"), bearer("none"), {}):
            reply = httpx.get(world.url + "/v1/models", headers=headers)
            assert (reply.status_code, reply.headers["retry-after"]) == (503, "5")
            assert reply.json()["error"]["code"] == "keys_not_ready"
            assert reply.json()["error"]["message"] == "The server cannot read its keys"
        ready = httpx.get(world.url + "/ready")
        assert httpx.get(world.url + "/health").status_code == 200
        if single:
            assert (ask_for_models(world, single), ready.status_code) == (200, 200)
        else:
            assert ready.status_code == 503 and "keys" in ready.json()["error"]["message"]
        write_keys(tmp_path)
        until(lambda: httpx.get(world.url + "/ready").status_code == 200)  # noqa: B023 - the loop has one turn
        assert (ask_for_models(world, "key-a"), ask_for_models(world, "none")) == (200, 401)


def test_the_prefix_cache_is_salted_by_key_and_a_clients_own_salt_never_passes_as_it_is(teams: World) -> None:
    salts: dict[tuple[str, object], str] = {}
    for key in ("key-a", "key-admin"):
        for own in (None, "x", "y", "a" * 1000, "/@"):
            for path in (COMPLETION, CHAT):
                assert ask(teams, key, NAME, path, cache_salt=own).status_code == 200
                salt = teams.vllm.asked[-1]["cache_salt"]
                assert salts.setdefault((key, own), salt) == salt
    assert len(set(salts.values())) == 2 * 5
    assert ask(teams, "key-a", NAME).status_code == 200
    assert teams.vllm.asked[-1]["cache_salt"] == salts["key-a", None]
    raw = salts["key-admin", None]
    assert ask(teams, "key-a", NAME, cache_salt=raw).status_code == 200
    assert teams.vllm.asked[-1]["cache_salt"] != raw
    values: list[object] = [1, [], {}, "", True]
    for value in values:
        reply = ask(teams, "key-a", NAME, cache_salt=value)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "cache_salt")


@pytest.mark.usefixtures("loaded")
def test_real_vllm_takes_the_salt(tmp_path: Path) -> None:
    write_keys(tmp_path)
    held = keys.Keys(tmp_path / "keys.yaml", None)
    salt = held.salt(keys.ANYBODY, "x" * 1000)
    for path, what in ((COMPLETION, {"prompt": "x"}), (CHAT, {"messages": MESSAGES})):
        parsed = parameters.parse(path, {"model": NAME, "cache_salt": salt, **what})
        assert parsed and parsed.cache_salt == salt


def test_without_a_file_of_keys_requests_are_not_salted(world: World, tmp_path: Path) -> None:
    assert world.ask(BASE, cache_salt="own").status_code == 200
    assert world.vllm.asked[-1]["cache_salt"] == "own"
    assert world.ask(BASE).status_code == 200
    assert "cache_salt" not in world.vllm.asked[-1]


def test_metrics_are_open_unless_a_key_has_them(keyed: World) -> None:
    def statuses() -> dict[str, int]:
        return {key: httpx.get(keyed.url + "/metrics", headers=bearer(key)).status_code
                for key in ("key-a", "key-admin", "prometheus", "none")}

    assert set(statuses().values()) == {200}
    content = yaml.safe_load((keyed.folder / "keys.yaml").read_text())
    digest = hashlib.sha256(b"prometheus").hexdigest()
    content["keys"].append({"name": "prometheus", "sha256": digest, "metrics": True})
    replace_file(keyed.folder / "keys.yaml", yaml.safe_dump(content))
    until(lambda: httpx.get(keyed.url + "/metrics").status_code == 401)
    assert statuses() == {"key-a": 403, "key-admin": 403, "prometheus": 200, "none": 401}
    refusal = httpx.get(keyed.url + "/metrics", headers=bearer("key-a")).json()["error"]
    assert (refusal["message"], refusal["code"]) == ("This key may not read the metrics", "metrics_not_allowed")
    assert ask(keyed, "prometheus", NAME).status_code == 403
    assert listed(keyed, "prometheus") == set()
    assert httpx.get(keyed.url + "/health").status_code == 200


# What each key used


def counted(world: World, **labels: str) -> tuple[float, float, float]:
    """Requests, tokens of prompts and tokens of replies."""
    return (world.metric("serving_requests_total", **labels), world.metric("serving_prompt_tokens_total", **labels),
            world.metric("serving_completion_tokens_total", **labels))


def test_requests_and_tokens_are_counted_by_key_alias_and_version(teams: World) -> None:
    model = next(name for name in teams.vllm.loaded if name.startswith(f"{OTHER}@"))
    version = {"alias": OTHER, "digest": model.partition("@")[2]}
    base = {"key": "team-b", "alias": BASE, "digest": teams.vllm.guards[-1].served.base_model}
    before = [counted(teams, key=key, **version) for key in ("team-b", "team-admin")] + [counted(teams, **base)]
    for path in (COMPLETION, CHAT):
        for stream in (False, True):
            assert ask(teams, "key-b", OTHER, path, stream=stream).status_code == 200
    assert ask(teams, "key-b", BASE).status_code == 200
    assert ask(teams, "key-admin", OTHER).status_code == 200
    assert ask(teams, "key-b", OTHER, fail=True).status_code == 400  # passed on, without tokens
    assert ask(teams, "key-b", NAME).status_code == 403
    after = [counted(teams, key=key, **version) for key in ("team-b", "team-admin")] + [counted(teams, **base)]
    grown = [tuple(b - a for a, b in zip(*each, strict=True)) for each in zip(before, after, strict=True)]
    assert grown == [(5, 4 * PROMPT_TOKENS, 4 * COMPLETION_TOKENS), (1, PROMPT_TOKENS, COMPLETION_TOKENS),
                     (1, PROMPT_TOKENS, COMPLETION_TOKENS)]
    assert counted(teams, key="team-b", alias=NAME) == (0, 0, 0)
    for secret in ("key-a", hashlib.sha256(b"key-a").hexdigest(), "single"):
        assert secret not in httpx.get(teams.url + "/metrics").text


def test_a_stream_is_passed_on_as_it_is_whether_or_not_the_client_wants_its_usage(teams: World) -> None:
    for options in (None, {"include_usage": True}, {"include_usage": False}):
        assert ask(teams, "key-a", NAME, stream=True, stream_options=options).text.count("data: ") == 3
        assert teams.vllm.asked[-1]["stream_options"] == options


@pytest.mark.parametrize("stream", [True, False])
def test_a_reply_that_the_client_cuts_off_is_counted_as_far_as_it_came(keyed: World, stream: bool) -> None:
    before = counted(keyed, key="team-a", alias=NAME)
    keyed.vllm.hold = threading.Event()  # of streams
    body = json.dumps({"model": NAME, "prompt": "x", "stream": stream, "endless": True})
    with socket.create_connection(("127.0.0.1", int(keyed.url.rpartition(":")[2]))) as client:
        client.sendall(f"POST {COMPLETION} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer key-a\r\n"
                       f"Content-Length: {len(body)}\r\n\r\n{body}".encode())
        until(lambda: keyed.vllm.engine.output_processor.request_states)
    after = tuple(count + grown for count, grown in zip(before, (1, PROMPT_TOKENS, 1), strict=True))
    until(lambda: counted(keyed, key="team-a", alias=NAME) == after)


def test_a_request_of_which_vllm_reports_nothing_counts_without_tokens() -> None:
    labels = ("some-key", "some-alias", "some-digest")
    with usage.Usage(labels, None):
        pass
    names = dict(zip(("key", "alias", "digest"), labels, strict=True))
    assert [REGISTRY.get_sample_value(f"serving_{name}_total", names)
            for name in ("requests", "prompt_tokens", "completion_tokens")] == [1, 0, 0]


def test_vllm_reports_in_a_copy_of_the_requests_own_state() -> None:
    """Other middleware keeps its own in it, and a scope may have none."""
    own = {"theirs": 1}
    one, other = usage.Usage(("a-key", "an-alias", "a-digest"), None), usage.Usage(("a-key", "an-alias", ""), None)
    state = one.scope({"type": "http", "state": own})["state"]
    assert state == own and state is not own
    assert other.scope({"type": "http"}) == {"type": "http", "state": {}}


@pytest.mark.parametrize(("message", "metadata", "counted"), [
    ("http.disconnect", None, (0, 0)),  # it never came to the engine
    ("http.disconnect", SimpleNamespace(request_id="cut"), (7, 2)),
    ("http.request", SimpleNamespace(request_id="cut"), (0, 0)),
    ("http.request", SimpleNamespace(final_usage_info=SimpleNamespace(prompt_tokens=5, completion_tokens=None)),
     (5, 0)),  # an embedding, for one, has no completion
], ids=["cut off before the engine", "cut off", "not cut off", "no completion"])
def test_a_request_counts_what_vllm_reports_or_what_was_computed_until_the_client_cut_it_off(
        message: str, metadata: Any, counted: tuple[int, int]) -> None:
    labels = ("counted-key", f"{message} {metadata}", "")
    running = SimpleNamespace(prompt_len=7, detokenizer=SimpleNamespace(num_output_tokens=lambda: 2), lora_name="a@1")
    engine = SimpleNamespace(output_processor=SimpleNamespace(
        external_req_ids={"cut": ["1"]}, request_states={"1": running}))

    async def client() -> Message:
        return {"type": message}

    with usage.Usage(labels, engine, "a@1") as counting:
        scope = counting.scope({"type": "http"})
        if metadata:
            scope["state"]["request_metadata"] = metadata
        asyncio.run(counting.receive(client)())  # type: ignore[arg-type]
    names = dict(zip(("key", "alias", "digest"), labels, strict=True))
    assert tuple(REGISTRY.get_sample_value(f"serving_{name}_total", names)
                 for name in ("prompt_tokens", "completion_tokens")) == counted


def test_of_a_request_in_progress_each_prompt_counts_once_each_sequence_and_no_other_request(
        caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "serving")

    def state(prompt: int, completion: int, lora_name: str | None = "mine@1") -> SimpleNamespace:
        return SimpleNamespace(prompt_len=prompt, detokenizer=SimpleNamespace(num_output_tokens=lambda: completion),
                               lora_name=lora_name)

    processor = SimpleNamespace(
        external_req_ids={"cmpl-1-0": ["a", "b", "ended"], "cmpl-1-1": ["c"], "cmpl-10-0": ["d"], "cmpl-1-x": ["d"],
                          "cmpl-2": ["d"], "cmpl-3": [], "cmpl-4-0": ["ended"], "cmpl-4-1": ["c"],
                          "cmpl-same": ["a", "others", "base"]},
        request_states={"a": state(10, 1), "b": state(10, 2), "c": state(20, 3), "d": state(1000, 1000),
                        "others": state(500, 600, "others@1"), "base": state(5, 6, None)})
    engine = SimpleNamespace(output_processor=processor)
    assert usage._in_progress(engine, "cmpl-1", "mine@1") == (30, 6)
    assert usage._in_progress(engine, "cmpl-2", "mine@1") == (1000, 1000)
    assert usage._in_progress(engine, "cmpl-4", "mine@1") == (20, 3)
    assert usage._in_progress(engine, "cmpl-3", "mine@1") == usage._in_progress(engine, "cmp", "mine@1") == (0, 0)
    # Clients choose the ids of their requests (X-Request-Id), and two of them may choose the same.
    assert usage._in_progress(engine, "cmpl-same", "mine@1") == (10, 1)
    assert usage._in_progress(engine, "cmpl-same", None) == (5, 6)
    for other in (None, object(), SimpleNamespace(output_processor=None)):  # of another version of vLLM
        assert usage._in_progress(other, "cmpl-1", "mine@1") == (0, 0)
    assert len(caplog.messages) == 3
    assert all(message.startswith("this vLLM's engine does not tell what it computes: AttributeError(")
               for message in caplog.messages)


def test_without_keys_requests_are_counted_too(world: World) -> None:
    before = counted(world, key="(none)", alias=BASE)
    assert world.ask(BASE).status_code == 200
    after = counted(world, key="(none)", alias=BASE)
    assert tuple(b - a for a, b in zip(before, after, strict=True)) == (1, PROMPT_TOKENS, COMPLETION_TOKENS)


def test_the_series_of_usage_are_bounded_and_those_used_last_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "USAGE_SERIES", 3)
    monkeypatch.setattr(events, "_used", {})
    for i in (0, 1, 2, 0, 3, 4):
        events.requested("bounded", NAME, str(i))
        events.used("bounded", NAME, str(i), prompt=1, completion=1)
    events.used("bounded", NAME, "1", prompt=1, completion=1)  # of a request that ends late
    for i in range(5, 9):
        events.requested("bounded", NAME, str(i))  # in progress
    for metric in (events.REQUESTS, events.PROMPT_TOKENS, events.COMPLETION_TOKENS):
        assert sorted(labels[2] for labels in metric._metrics if labels[0] == "bounded") == ["6", "7", "8"]


# Replies


MODEL = f"{NAME}@0123456789abcdef"


def through_the_guard(chunks: list[bytes], content_type: bytes, served: Served) -> tuple[bytes, dict[bytes, bytes]]:
    """The reply to a client of the alias when vLLM sends these chunks."""

    async def vllm(scope: Scope, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", content_type)]})
        for i, chunk in enumerate(chunks):
            await send({"type": "http.response.body", "body": chunk, "more_body": i < len(chunks) - 1})

    async def talk() -> list[Message]:
        guarded = guard.Guard(vllm)
        guarded.aliases.current[NAME] = Alias(Version(NAME, MODEL.partition("@")[2]))
        sent: list[Message] = []

        async def receive() -> Message:
            return {"type": "http.request", "body": json.dumps({"model": NAME}).encode()}

        async def send(message: Message) -> None:
            sent.append(message)

        path = "/v1/completions"
        await guarded({"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "headers": []},
                      receive, send)
        return sent

    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in served.to_environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("VLLM_API_KEY", raising=False)
        start, *bodies = asyncio.run(talk())
    assert bodies[-1].get("more_body", False) is False
    assert all(body["more_body"] for body in bodies[:-1])
    return b"".join(body["body"] for body in bodies), dict(start["headers"])


SERVED = Served("", "", BASE, "", "", "", 16, "")
def call(vllm: ASGIApp, monkeypatch: pytest.MonkeyPatch, method: str, path: str, body: bytes = b"",
         *headers: tuple[bytes, bytes], prepare: Callable[[Any], object] = lambda _: None,
         receive: Receive | None = None) -> list[Message]:
    """What the guard sends for one request, with an alias and with this application in place of vLLM.

    Args:
        prepare: has its way with the guard before the request.
        receive: the client, if it is not one that sends `body`.
    """
    for name, value in SERVED.to_environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def talk() -> None:
        guarded = guard.Guard(vllm)
        guarded.max_sequences = 32  # as at the start of a server
        guarded.aliases.current[NAME] = Alias(Version(NAME, MODEL.partition("@")[2]))
        guarded.aliases.current["loading"] = Alias(Version("loading", "0" * 16))
        guarded.aliases.current["waiting"] = Alias()
        guarded.aliases.first_look_done.set()
        prepare(guarded)
        scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "headers": list(headers)}
        await guarded(scope, receive or arrival(body, ends=True), send)

    asyncio.run(talk())
    return sent


@pytest.mark.parametrize(("reason", "words"), [
    (NoSlot("all 2 LoRA slots are busy"), "all 2 LoRA slots are busy"),
    (Refused("load", "out of memory in /private/folder"), "its adapter could not be loaded; the server tries again")])
def test_a_request_whose_adapter_gets_no_slot_is_503_with_the_reason_and_retry_after(
        monkeypatch: pytest.MonkeyPatch, reason: Exception, words: str) -> None:
    @contextlib.asynccontextmanager
    async def busy(_: object) -> AsyncIterator[None]:
        raise reason
        yield

    def prepare(guarded: Any) -> None:
        monkeypatch.setattr(guarded.aliases, "request", busy)

    body = json.dumps({"model": NAME}).encode()
    start, reply = call(Response(b"passed on"), monkeypatch, "POST", COMPLETION, body, prepare=prepare)
    problem = json.loads(reply["body"])["error"]
    assert (start["status"], dict(start["headers"])[b"retry-after"]) == (503, b"5")
    assert (problem["message"], problem["code"]) == (f"The model `{NAME}` is not ready: {words}", "model_not_ready")


def test_a_version_counts_its_requests_while_vllm_answers_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until there are none, it is not unloaded."""
    versions: list[Version] = []
    seen: list[int] = []

    async def vllm(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(versions[0].requests)
        await Response()(scope, receive, send)

    call(vllm, monkeypatch, "POST", COMPLETION, json.dumps({"model": NAME}).encode(),
         prepare=lambda guarded: versions.append(guarded.aliases.current[NAME].version))
    assert (seen, versions[0].requests) == ([1], 0)


def test_vllm_is_told_the_length_of_the_body_that_it_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[list[tuple[bytes, bytes]], bytes]] = []

    async def vllm(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append((sorted(scope["headers"]), (await receive())["body"]))
        await Response()(scope, receive, send)

    body = json.dumps({"model": NAME, "prompt": "é"}, ensure_ascii=False).encode()
    for header in ((b"content-length", str(len(body)).encode()), (b"transfer-encoding", b"chunked")):
        call(vllm, monkeypatch, "POST", COMPLETION, body, header, (b"content-type", b"application/json"))
        headers, got = seen.pop()
        assert len(got) != len(body)
        assert headers == [(b"content-length", str(len(got)).encode()), (b"content-type", b"application/json")]


def test_a_request_that_vllms_classes_cannot_nest_into_is_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_deep(_: object) -> None:
        raise RecursionError

    monkeypatch.setattr(parameters, "_class", lambda _: SimpleNamespace(model_validate=too_deep))
    body = json.dumps({"model": NAME, "prompt": "x", "n": "1000"}).encode()
    start, reply = call(Response(b"passed on"), monkeypatch, "POST", COMPLETION, body)
    assert (start["status"], b"nested too deeply" in reply["body"]) == (400, True)


def test_the_list_of_models_has_what_vllm_has_loaded_and_no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [{"id": BASE, "root": "/path/of/this/machine"}, {"id": MODEL, "root": "/path"}, {"id": "x@1", "root": "/"}]
    _, body = call(JSONResponse({"object": "list", "data": cards}), monkeypatch, "GET", "/v1/models")
    assert json.loads(body["body"]) == {"object": "list", "data": [
        {"id": BASE, "root": f"{BASE}@{SERVED.base_model}"}, {"id": NAME, "root": MODEL, "parent": BASE}]}


def test_a_list_that_vllm_cannot_give_is_vllms_error(monkeypatch: pytest.MonkeyPatch) -> None:
    start, body = call(Response(b"down", 500), monkeypatch, "GET", "/v1/models")
    assert (start["status"], body["body"]) == (500, b"down")


def test_an_error_within_a_stream_names_the_alias_in_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    event = f'data: {{"error": {{"message": "The engine lost `{MODEL}`", "code": 500}}}}\n\n'.encode()
    text_event = b'data: {"choices": [{"text": "' + MODEL.encode() + b'"}]}\n\n'
    reply = Response(text_event + event, media_type="text/event-stream")
    _, body = call(reply, monkeypatch, "POST", COMPLETION, json.dumps({"model": NAME}).encode())
    assert body["body"] == text_event + event.replace(MODEL.encode(), NAME.encode())


REFUSED: list[tuple[str, str, object, int, str, str | None, str | None]] = [  # request, status, words, param, code
    ("GET", "/docs", "", 404, "Not found", None, None),
    ("PUT", CHAT, "", 405, f"{CHAT} takes POST only", None, None),
    ("POST", COMPLETION, "[" * 100_000, 400, "nested too deeply", None, None),
    ("POST", COMPLETION, "{", 400, "not valid JSON: Expecting", None, None),
    ("POST", COMPLETION, "[]", 400, "must be a JSON object", None, None),
    ("POST", COMPLETION, "{}", 400, "must name a model", "model", None),
    ("POST", COMPLETION, {"model": "x" * 101}, 404, f"model `{'x' * 100}` does not exist. See /v1/models", "model",
     "model_not_found"),
    ("POST", COMPLETION, {"model": "waiting"}, 503, "`waiting` is not ready: the server has not looked", None,
     "model_not_ready"),
    ("POST", COMPLETION, {"model": NAME, "n": 33}, 400, "at most 32 sequences", "n", None),
    ("POST", COMPLETION, {"model": NAME, "prompt": ["x"] * 33}, 400, "at most 32 sequences", "prompt", None),
    ("POST", COMPLETION, {"model": NAME, "prompt": ["x"] * 33, "n": 1}, 400, "at most 32", "prompt", None)]


@pytest.mark.parametrize(("method", "path", "body", "status", "words", "param", "code"), REFUSED)
def test_a_refusal_says_what_is_wrong_with_what(
        monkeypatch: pytest.MonkeyPatch, method: str, path: str, body: object, status: int, words: str,
        param: str | None, code: str | None) -> None:
    content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    start, reply = call(Response(b"passed on"), monkeypatch, method, path, content)
    error = json.loads(reply["body"])["error"]
    assert start["status"] == status
    assert words in error["message"]
    assert (error["param"], error["code"]) == (param, code)
    if code == "model_not_ready":
        assert dict(start["headers"])[b"retry-after"] == b"5"


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize(("shield", "asks", "status"), [
    (True, {"echo": True}, 400), (False, {"echo": True}, 200), (True, {}, 200),
    (True, {"n": 32}, 200), (True, {"n": 33}, 400), (True, {"prompt": ["x"] * 33}, 200)])  # no prompts in a chat
def test_a_request_is_passed_on_if_it_can_hurt_nobody(
        monkeypatch: pytest.MonkeyPatch, shield: bool, asks: dict[str, Any], status: int) -> None:
    def prepare(guarded: Any) -> None:
        guarded.served = replace(SERVED, cpu_shield=shield)

    body = json.dumps({"model": NAME, "messages": MESSAGES, **asks}).encode()
    start, _ = call(Response(b"passed on"), monkeypatch, "POST", CHAT, body, prepare=prepare)
    assert start["status"] == status


@pytest.mark.usefixtures("loaded")
def test_a_check_changes_nothing_that_the_next_one_reads() -> None:
    """vLLM's validators change the mapping that they get."""
    request = {"model": NAME, "messages": [{"role": "assistant", "content": "x", "reasoning_content": "y"}],
               "tools": [{"type": "function", "function": {"name": "f"}}], "echo": 0, "n": "2"}
    before = json.dumps(request)
    assert not parameters.wants_prompt_logprobs(CHAT, request)
    assert parameters.sequences(CHAT, request) == 2
    assert json.dumps(request) == before


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize(("path", "asks", "param"), [
    (COMPLETION, {"prompt": "x", "n": "33"}, "n"), (CHAT, {"messages": MESSAGES, "n": "33"}, "n"),
    (COMPLETION, {"prompt": "x", "prompt_logprobs": 1}, "prompt_logprobs"),
    (COMPLETION, {"prompt": "x", "echo": True, "logprobs": 1}, "echo"),
    (CHAT, {"messages": MESSAGES, "echo": 1}, "echo")])
def test_what_is_checked_is_what_vllm_gets_and_not_what_the_client_sent(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, asks: dict[str, Any], param: str) -> None:
    """Half a character is no text to vLLM, which would refuse the client's request; with the guard's own salt in its
    place, it would compute it."""
    def prepare(guarded: Any) -> None:
        guarded.served = replace(SERVED, cpu_shield=True)
        guarded.keys = keys.Keys(tmp_path / "keys.yaml", None)

    write_keys(tmp_path)
    body = json.dumps({"model": NAME, "cache_salt": "\ud800", **asks}).encode()
    start, reply = call(Response(b"passed on"), monkeypatch, "POST", path, body, (b"authorization", b"Bearer key-a"),
                        prepare=prepare)
    assert (start["status"], json.loads(reply["body"])["error"]["param"]) == (400, param)


def test_a_missing_key_is_said_to_be_the_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    start, reply = call(Response(), monkeypatch, "GET", "/v1/models",
                        prepare=lambda g: setattr(g, "keys", keys.Keys(Path("none"), "right")))
    assert start["status"] == 401
    assert "API key is missing or wrong" in json.loads(reply["body"])["error"]["message"]


def test_health_and_ready_say_why_they_fail_and_else_ask_vllm_for_its_health(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, bytes]] = []

    async def vllm(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append((scope["path"], scope["raw_path"]))
        assert (await receive())["type"] == "http.request"
        await Response(b"vLLM is well")(scope, receive, send)

    def drains(guarded: Any) -> None:
        guarded.drain.reason = "stopped by a test"

    def hangs(guarded: Any) -> None:
        guarded.heartbeat = SimpleNamespace(hangs=True)

    def has_no_keys(guarded: Any) -> None:
        guarded.keys.problem = "keys.yaml: invalid"

    for prepare, path, status, words in (
            (has_no_keys, "/ready", 503, "The file of keys was never valid"),
            (has_no_keys, "/health", 200, "vLLM is well"),
            (drains, "/ready", 503, "Draining: stopped by a test"), (drains, "/health", 200, "vLLM is well"),
            (hangs, "/ready", 503, "engine does not answer"), (hangs, "/health", 503, "engine does not answer"),
            (still_looks, "/ready", 503, "The server is still looking for its adapters"),
            (still_looks, "/health", 200, "vLLM is well"),
            (lambda _: None, "/ready", 200, "vLLM is well"),
            (lambda _: None, "/health", 200, "vLLM is well")):
        start, reply = call(vllm, monkeypatch, "GET", path, prepare=prepare)
        assert (start["status"], words in reply["body"].decode()) == (status, True)
    assert set(seen) == {("/health", b"/health")}


def still_looks(guarded: Any) -> None:
    guarded.aliases.first_look_done.clear()


def test_before_the_first_look_no_model_is_said_not_to_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that gives up after 404 would give up on an adapter that answers a second later."""
    body = json.dumps({"model": "unknown", "prompt": "x"}).encode()
    start, reply = call(shortest, monkeypatch, "POST", "/v1/completions", body, prepare=still_looks)
    assert start["status"] == 503 and (b"retry-after", b"5") in start["headers"]
    assert json.loads(reply["body"])["error"]["message"] == "The server is still looking for its adapters"
    assert call(shortest, monkeypatch, "POST", "/v1/completions", body)[0]["status"] == 404


async def shortest(scope: Scope, receive: Receive, send: Send) -> None:
    """A reply that leaves out all that ASGI has defaults for."""
    await send({"type": "http.response.start", "status": 200})
    await send({"type": "http.response.body"})


def test_a_reply_in_its_shortest_form_is_passed_on_and_closes_the_connection_of_a_server_that_drains(
        monkeypatch: pytest.MonkeyPatch) -> None:
    def drains(guarded: Any) -> None:
        guarded.drain.reason = "stopped by a test"

    for prepare, connection in ((drains, b"close"), (lambda _: None, None)):
        start, body = call(shortest, monkeypatch, "POST", COMPLETION, json.dumps({"model": NAME}).encode(),
                           prepare=prepare)
        headers = dict(start["headers"])
        assert (headers[b"content-length"], headers.get(b"connection"), body["body"]) == (b"0", connection, b"")
    start, _ = call(shortest, monkeypatch, "GET", "/metrics", prepare=drains)
    assert start["headers"] == [(b"connection", b"close")]


def test_a_stream_may_end_in_the_shortest_form_and_what_is_no_part_of_its_body_is_passed_on(
        monkeypatch: pytest.MonkeyPatch) -> None:
    trailers = {"type": "http.response.trailers", "headers": []}

    async def vllm(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"data: half", "more_body": True})
        await send({"type": "http.response.body"})
        await send(trailers)

    _, body, passed = call(vllm, monkeypatch, "POST", COMPLETION, json.dumps({"model": NAME}).encode())
    assert (body["body"], body["more_body"], passed) == (b"data: half", False, trailers)


def test_all_events_that_are_whole_are_passed_on_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def vllm(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"data: 1\n\ndata: 2\n\nda", "more_body": True})
        await send({"type": "http.response.body", "body": b"ta: 3\n\n"})

    _, first, second = call(vllm, monkeypatch, "POST", COMPLETION, json.dumps({"model": NAME}).encode())
    assert (first["body"], second["body"]) == (b"data: 1\n\ndata: 2\n\n", b"data: 3\n\n")


@pytest.mark.parametrize(("status", "shown"), [(400, NAME), (500, NAME), (200, MODEL)])
def test_an_error_names_the_alias_in_its_text_and_another_reply_keeps_its_text(
        monkeypatch: pytest.MonkeyPatch, status: int, shown: str) -> None:
    text = f'{{"error": {{"message": "`{MODEL}` failed"}}}}'.encode()
    _, body = call(Response(text, status), monkeypatch, "POST", COMPLETION, json.dumps({"model": NAME}).encode())
    assert body["body"] == text.replace(MODEL.encode(), shown.encode())


def test_a_changed_reply_has_one_length_and_keeps_its_other_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    async def vllm(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"Content-Length", b"5"), (b"X-Request-Id", b"7")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"Hello"})

    start, _ = call(vllm, monkeypatch, "POST", COMPLETION, json.dumps({"model": NAME}).encode())
    assert start["headers"] == [(b"X-Request-Id", b"7"), (b"content-length", b"5")]


def test_vllm_learns_that_the_client_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Message] = []

    async def vllm(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend([await receive(), await receive()])
        await Response()(scope, receive, send)

    client = messages({"type": "http.request", "body": json.dumps({"model": NAME}).encode()},
                      {"type": "http.disconnect"})
    call(vllm, monkeypatch, "POST", COMPLETION, receive=client)
    assert [message["type"] for message in seen] == ["http.request", "http.disconnect"]
    assert seen[0]["more_body"] is False


def test_a_client_that_disconnects_within_its_body_is_not_asked_of_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    client = messages({"type": "http.disconnect"})
    assert call(Response(b"passed on"), monkeypatch, "POST", COMPLETION, receive=client) == []


@pytest.mark.parametrize(("setting", "batch", "bound"), [(None, 128, 32), (None, 7, 1), (None, 3, 1), (5, 128, 5)])
def test_the_guard_works_while_vllm_is_up_and_bounds_requests_by_its_batch(
        monkeypatch: pytest.MonkeyPatch, setting: int | None, batch: int, bound: int) -> None:
    seen: list[object] = []
    engine = Engine()
    engine.vllm_config.scheduler_config.max_num_seqs = batch
    state = SimpleNamespace(engine_client=engine, server=SimpleNamespace(config=SimpleNamespace()))

    async def vllm(scope: Scope, receive: Receive, send: Send) -> None:
        for request, reply in (("startup", "startup.complete"), ("shutdown", "shutdown.complete")):
            assert (await receive())["type"] == f"lifespan.{request}"
            seen.append(request)
            await send({"type": f"lifespan.{reply}"})

    class Work:
        def __init__(self, name: str) -> None:
            self.name = name

        def start(self, of: object) -> None:
            assert of is (engine if self.name == "heartbeat" else state)
            seen.append(f"{self.name} starts")

        async def stop(self) -> None:
            seen.append(f"{self.name} stops")

    async def live() -> int | None:
        for name, value in replace(SERVED, max_sequences=setting).to_environment().items():
            monkeypatch.setenv(name, value)
        guarded: Any = guard.Guard(vllm)
        guarded.aliases, guarded.heartbeat = Work("aliases"), Work("heartbeat")

        async def send(message: Message) -> None:
            seen.append(message["type"].partition(".")[2])

        await guarded({"type": "lifespan", "app": SimpleNamespace(state=state)},
                      messages({"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}), send)
        return guarded.max_sequences  # type: ignore[no-any-return]

    assert asyncio.run(live()) == bound
    assert seen == ["startup", "heartbeat starts", "aliases starts", "startup.complete",
                    "aliases stops", "heartbeat stops", "shutdown", "shutdown.complete"]


text = st.text() | st.sampled_from([
    f'{{"model":"{MODEL}"}}', f'"model":"{MODEL}"', "data: x\n\n", "\r\n", '\\"model":"'])
reply = st.builds(lambda t, spaced: json.dumps(
    {"id": "1", "model": MODEL, "choices": [{"delta": {"content": t}, "text": t}]}, ensure_ascii=False,
    separators=(", ", ": ") if spaced else (",", ":")).encode("utf-8", "replace"), text, st.booleans())


def cut(data: bytes, at: list[int]) -> list[bytes]:
    edges = [0, *sorted(i % (len(data) + 1) for i in at), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


@settings(max_examples=200, deadline=None)
@given(replies=st.lists(reply, min_size=1, max_size=4), at=st.lists(st.integers(0, 10_000), max_size=8),
       end=st.sampled_from([b"\n\n", b"\r\n\r\n"]))
def test_every_event_of_a_stream_names_the_alias_wherever_it_is_cut_and_generated_text_is_untouched(
        replies: list[bytes], at: list[int], end: bytes) -> None:
    stream = b"".join(b"data: " + r + end for r in replies) + b"data: [DONE]" + end
    passed, _ = through_the_guard(cut(stream, at), b"text/event-stream; charset=utf-8", SERVED)
    *events, done, nothing = passed.split(end)
    assert (done, nothing) == (b"data: [DONE]", b"")
    assert [json.loads(event.removeprefix(b"data: ")) for event in events] == [
        {**json.loads(reply), "model": NAME} for reply in replies]


@settings(max_examples=100, deadline=None)
@given(sent=reply, at=st.lists(st.integers(0, 10_000), max_size=5))
def test_a_whole_reply_names_the_alias_and_has_the_right_length(sent: bytes, at: list[int]) -> None:
    passed, headers = through_the_guard(cut(sent, at), b"application/json", SERVED)
    assert json.loads(passed) == {**json.loads(sent), "model": NAME}
    assert int(headers[b"content-length"]) == len(passed)


def test_an_event_is_passed_on_as_soon_as_it_is_whole(world: World) -> None:
    pipeline, _ = world.write()
    build_adapter.promote(world.volumes, pipeline)
    until(world.served)
    world.vllm.hold = threading.Event()  # the second event comes only after the first was read
    with world.stream() as stream:
        assert next(stream.iter_lines()).startswith("data: {")
        world.vllm.hold.set()
