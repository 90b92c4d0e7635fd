"""Promises of the guard: only what clients need is reachable, and replies say the alias that the client sent."""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.types import Message, Scope

from serving import guard
from serving.aliases import Alias, Version
from serving.served import Served
from tests import build_adapter
from tests.build_guarded import NAME, World, start, until
from tests.build_server import BASE, raw_request


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    yield from start(tmp_path, monkeypatch)


@pytest.fixture
def locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    yield from start(tmp_path, monkeypatch, key="right")


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One server for all the knocking on closed doors."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield from start(tmp_path_factory.mktemp("door"), monkeypatch)


# The narrow door


def status_of(reply: bytes) -> int:
    return int(reply.split(b" ", 2)[1])


@pytest.mark.parametrize("path", ["/health", "/metrics", "/v1/models"])
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
def test_a_websocket_is_refused_everywhere(door: World, path: str) -> None:
    reply = raw_request(door.url, f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
                        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode())
    assert status_of(reply) == 404
    assert not door.vllm.reached


def test_a_body_that_is_too_large_is_413_whether_or_not_its_length_is_declared(
        door: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MAX_BODY_BYTES", 1000)
    seen = len(door.vllm.bodies)
    url = door.url + "/v1/completions"
    assert httpx.post(url, content=b"x" * 1001).status_code == 413
    assert httpx.post(url, content=iter([b"x" * 600] * 2)).status_code == 413
    huge = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n"
    assert status_of(raw_request(door.url, huge)) == 413  # at once, without waiting for the body
    assert len(door.vllm.bodies) == seen
    assert httpx.post(url, content=b" " * 1000).status_code == 400


@pytest.mark.parametrize("body", [b"", b"{", b'{"model": "seville-hotels"', b"\xff\xfe", b"[" * 100_000])
def test_malformed_json_gets_vllms_own_answer(door: World, body: bytes) -> None:
    reply = httpx.post(door.url + "/v1/completions", content=body)
    assert reply.status_code == 400
    assert door.vllm.bodies[-1] == body


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
    assert httpx.post(locked.url + "/v1/completions", json={"model": NAME}, headers=right).status_code == 200
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/invocations", "/tokenize"):  # not with it either
        assert httpx.post(locked.url + path, headers=right).status_code == 404
    assert not locked.vllm.reached


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
