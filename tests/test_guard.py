"""Promises of the guard: only what clients need is reachable, an alias is one proven version or a clear 503."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.types import Message, Scope

from jobs.pipeline import Pipeline
from jobs.plan import Plan
from serving import aliases, guard
from serving.adapters import Served
from serving.aliases import Alias, Version
from tests import build_adapter
from tests.build_server import BASE, StandIn, raw_request, running

NAME = "seville-hotels"


def until(condition: Callable[[], Any], seconds: float = 20) -> Any:
    """Wait for a condition and return its value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
    return value


class World:
    """A guarded server over one pipeline folder and its volumes."""

    def __init__(self, folder: Path, vllm: StandIn) -> None:
        self.folder, self.volumes, self.vllm = folder, folder / "volumes", vllm
        self.url = ""

    def write(self, **changes: Any) -> tuple[Pipeline, Plan]:
        return build_adapter.load(self.folder / "pipelines" / "one", **changes)

    def model(self, planned: Plan) -> str:
        return f"{NAME}@{planned.adapter.digest}"

    def ask(self, model: object = NAME, path: str = "/v1/completions", **body: Any) -> httpx.Response:
        return httpx.post(self.url + path, json={"model": model, "prompt": "Hello", **body}, timeout=20)

    def stream(self) -> contextlib.AbstractContextManager[httpx.Response]:
        body = {"model": NAME, "prompt": "Hello", "stream": True}
        return httpx.stream("POST", self.url + "/v1/completions", json=body, timeout=20)

    def served(self) -> str | None:
        """The version that answers under the alias."""
        if self.ask().status_code != 200:
            return None
        return str(self.vllm.asked[-1]["model"])


def start(folder: Path, monkeypatch: pytest.MonkeyPatch, key: str | None = None) -> Iterator[World]:
    monkeypatch.setattr(aliases, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(aliases, "BACKOFF_SECONDS", 0.05)
    if key:
        monkeypatch.setenv("VLLM_API_KEY", key)
    else:
        monkeypatch.delenv("VLLM_API_KEY", raising=False)
    world = World(folder, StandIn(key))
    _, planned = world.write()
    build_adapter.base(world.volumes, planned)
    (folder / "private").mkdir()
    served = Served(
        pipelines=str(folder / "pipelines"), volumes=str(world.volumes), base_name=BASE,
        base_model=planned.base_model.digest, tokenizer=planned.tokenizer.digest,
        base_folder=str(planned.base_model.path(world.volumes)), max_lora_rank=16,
        private_folder=str(folder / "private"))
    for name, value in served.to_environment().items():
        monkeypatch.setenv(name, value)
    with running(world.vllm.app()) as world.url:
        yield world


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
    assert reply.status_code in (400, 500)  # 500: the stand-in has no handler for a recursion error
    assert door.vllm.bodies[-1] == body


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


# Aliases


def test_before_a_promotion_the_base_answers_and_the_alias_is_503_with_retry_after_and_the_reason(world: World) -> None:
    assert world.ask(BASE).json()["model"] == BASE
    until(lambda: "not there yet" in world.ask().text)
    reply = world.ask()
    assert (reply.status_code, reply.headers["retry-after"]) == (503, str(guard.RETRY_AFTER_SECONDS))
    assert re.search(rf"{NAME}` is not ready: evaluation [0-9a-f]{{16}} is not there yet; no adapter was promoted",
                     reply.json()["error"]["message"])
    assert [body["model"] for body in world.vllm.asked] == [BASE]  # vLLM was never asked for the alias
    assert [m["id"] for m in httpx.get(world.url + "/v1/models").json()["data"]] == [BASE]


def test_a_promotion_goes_live_without_a_restart_and_replies_name_the_alias(world: World) -> None:
    pipeline, planned = world.write()
    build_adapter.promote(world.volumes, pipeline)
    assert until(world.served) == world.model(planned)
    for path in ("/v1/completions", "/v1/chat/completions"):
        assert world.ask(path=path, temperature=0.5).json()["model"] == NAME
        assert world.vllm.asked[-1] == {"model": world.model(planned), "prompt": "Hello", "temperature": 0.5}
    assert world.ask(BASE).json()["model"] == BASE
    error = world.ask(fail=True)
    assert (error.status_code, error.json()["error"]["message"]) == (400, f"{NAME} failed")
    assert world.ask(world.model(planned)).status_code == 404  # versions are nobody's business
    base, alias = httpx.get(world.url + "/v1/models").json()["data"]
    assert base["id"] == BASE
    assert (alias["id"], alias["root"], alias["parent"]) == (NAME, world.model(planned), BASE)


def test_a_stream_begun_before_a_swap_ends_on_its_version_which_is_then_unloaded(world: World) -> None:
    first, first_plan = world.write()
    build_adapter.promote(world.volumes, first)
    assert until(world.served) == world.model(first_plan)
    world.vllm.hold = threading.Event()
    with world.stream() as stream:
        lines = stream.iter_lines()
        models = [json.loads(next(lines).removeprefix("data: "))["model"]]
        second, second_plan = world.write(training__seed=1)
        build_adapter.promote(world.volumes, second)
        until(lambda: world.served() == world.model(second_plan))
        time.sleep(0.2)  # ten polls
        assert set(world.vllm.loaded) == {world.model(first_plan), world.model(second_plan)}
        world.vllm.hold.set()
        models += [json.loads(line.removeprefix("data: "))["model"] for line in lines if line.startswith("data: {")]
    assert models == [NAME, NAME]
    assert world.vllm.asked[-1]["model"] != world.model(first_plan)
    until(lambda: set(world.vllm.loaded) == {world.model(second_plan)})
    until(lambda: not (world.folder / "private" / NAME / first_plan.adapter.digest).exists())


def test_a_reverted_pipeline_file_serves_the_old_adapter_again_at_once(world: World) -> None:
    old, old_plan = world.write()
    build_adapter.promote(world.volumes, old)
    new, new_plan = world.write(training__seed=1)
    build_adapter.promote(world.volumes, new)
    until(lambda: world.served() == world.model(new_plan))
    world.write()  # git revert: the last promotion is still the new one
    until(lambda: world.served() == world.model(old_plan))


def test_the_last_promoted_adapter_serves_while_the_asked_one_is_trained_or_after_its_gate_failed(world: World) -> None:
    old, old_plan = world.write()
    build_adapter.promote(world.volumes, old)
    assert until(world.served) == world.model(old_plan)
    new, _ = world.write(training__seed=1)
    build_adapter.adapter(world.volumes, new)
    time.sleep(0.2)
    assert world.served() == world.model(old_plan)
    build_adapter.evaluation(world.volumes, new, passed=False)
    time.sleep(0.2)
    assert world.served() == world.model(old_plan)
    assert world.vllm.ever_loaded == [world.model(old_plan)]


def test_an_unfit_adapter_is_never_given_to_vllm_and_refused_once(
        world: World, caplog: pytest.LogCaptureFixture) -> None:
    old, old_plan = world.write()
    build_adapter.promote(world.volumes, old)
    assert until(world.served) == world.model(old_plan)
    new, new_plan = world.write(training__seed=1)
    weights = build_adapter.adapter(world.volumes, new) / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    build_adapter.evaluation(world.volumes, new)
    until(lambda: "refused" in caplog.text)
    time.sleep(0.3)
    assert caplog.text.count("refused (damaged)") == 1
    assert "sha256" in caplog.text
    assert world.served() == world.model(old_plan)
    assert world.model(new_plan) not in world.vllm.ever_loaded
    weights.write_bytes(content)  # mended: it is looked at again
    until(lambda: world.served() == world.model(new_plan))


@pytest.mark.parametrize(("trait", "reason"), [
    ("ineffective", "no effect"), ("broken", "values"), ("unloadable", "load")])
def test_an_adapter_that_fails_its_proof_is_unloaded_and_the_one_before_keeps_serving(
        world: World, trait: str, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    old, old_plan = world.write()
    build_adapter.promote(world.volumes, old)
    assert until(world.served) == world.model(old_plan)
    new, new_plan = world.write(training__seed=1)
    getattr(world.vllm, trait).add(world.model(new_plan))
    build_adapter.promote(world.volumes, new)
    until(lambda: f"refused ({reason})" in caplog.text)
    time.sleep(0.2)
    assert world.vllm.ever_loaded.count(world.model(new_plan)) == 1
    assert set(world.vllm.loaded) == {world.model(old_plan)}
    assert world.served() == world.model(old_plan)


def test_a_refused_first_adapter_leaves_a_503_that_says_so_and_never_the_base(world: World) -> None:
    pipeline, planned = world.write()
    world.vllm.ineffective.add(world.model(planned))
    build_adapter.promote(world.volumes, pipeline)
    until(lambda: "refused: no effect" in world.ask().text)
    assert world.ask().status_code == 503
    assert not world.vllm.asked


def test_a_pipeline_file_that_became_invalid_changes_nothing_and_is_reported_once(
        world: World, caplog: pytest.LogCaptureFixture) -> None:
    pipeline, planned = world.write()
    build_adapter.promote(world.volumes, pipeline)
    assert until(world.served) == world.model(planned)
    (world.folder / "pipelines" / "one" / "pipeline.yaml").write_text("adapter: Not A Name\n")
    until(lambda: "stays in force" in caplog.text)
    time.sleep(0.2)
    assert caplog.text.count("stays in force") == 1
    assert world.served() == world.model(planned)


def test_a_vanished_volume_changes_nothing_and_its_return_is_noticed(world: World) -> None:
    pipeline, planned = world.write()
    build_adapter.promote(world.volumes, pipeline)
    assert until(world.served) == world.model(planned)
    world.volumes.rename(world.folder / "away")
    new, new_plan = world.write(training__seed=1)
    time.sleep(0.3)
    assert world.served() == world.model(planned)
    (world.folder / "away").rename(world.volumes)
    build_adapter.promote(world.volumes, new)
    until(lambda: world.served() == world.model(new_plan))


def test_nothing_that_goes_wrong_while_looking_stops_the_looking(
        world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pipeline, planned = world.write()
    with monkeypatch.context() as broken:
        broken.setattr("serving.adapters.take", lambda *_: (_ for _ in ()).throw(OSError("I/O error")))
        build_adapter.promote(world.volumes, pipeline)
        until(lambda: "I/O error" in caplog.text)
        assert world.ask().status_code == 503
    until(lambda: world.served() == world.model(planned))


def test_a_config_map_update_is_noticed_as_kubernetes_makes_it(world: World) -> None:
    old, old_plan = world.write()
    build_adapter.promote(world.volumes, old)
    mount = world.folder / "pipelines" / "one"
    new, new_plan = build_adapter.load(mount / "..2026_2", training__seed=1)
    build_adapter.promote(world.volumes, new)
    build_adapter.load(mount / "..2026_1")
    (mount / "..data").symlink_to("..2026_1")
    (mount / "pipeline.yaml").unlink()
    (mount / "pipeline.yaml").symlink_to("..data/pipeline.yaml")
    until(lambda: world.served() == world.model(old_plan))
    (mount / "..data_tmp").symlink_to("..2026_2")
    (mount / "..data_tmp").rename(mount / "..data")
    until(lambda: world.served() == world.model(new_plan))


def test_a_renamed_adapter_answers_under_its_new_name_only(world: World) -> None:
    pipeline, _ = world.write()
    build_adapter.promote(world.volumes, pipeline)
    until(world.served)
    renamed, _ = world.write(adapter="granada-hotels")
    build_adapter.promote(world.volumes, renamed)
    until(lambda: world.ask("granada-hotels").status_code == 200)
    assert world.ask(NAME).status_code == 404
    until(lambda: len(world.vllm.loaded) == 1)


def test_two_pipelines_serve_two_adapters_over_one_base(world: World) -> None:
    one, one_plan = world.write()
    two, two_plan = build_adapter.load(world.folder / "pipelines" / "two", adapter="granada-hotels", training__seed=1)
    for pipeline in (one, two):
        build_adapter.promote(world.volumes, pipeline)
    until(lambda: {world.ask(NAME).status_code, world.ask("granada-hotels").status_code} == {200})
    assert set(world.vllm.loaded) == {world.model(one_plan), f"granada-hotels@{two_plan.adapter.digest}"}
    assert world.ask("granada-hotels").json()["model"] == "granada-hotels"
    assert [m["id"] for m in httpx.get(world.url + "/v1/models").json()["data"]] == [BASE, "granada-hotels", NAME]


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


def test_private_copies_are_all_that_is_needed_after_loading(world: World) -> None:
    pipeline, planned = world.write()
    path = build_adapter.promote(world.volumes, pipeline)
    until(world.served)
    loaded = Path(world.vllm.loaded[world.model(planned)])
    shutil.rmtree(path)
    assert world.folder / "private" in loaded.parents
    assert (loaded / "adapter_model.safetensors").is_file()
