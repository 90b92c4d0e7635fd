"""Promises about vLLM's answers: which of them speak against an adapter, and that a removed adapter frees its slot."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from serving.engine import Engine
from serving.refusal import Refused


def event(*tops: dict[str, float | None]) -> str:
    return f"data: {json.dumps({'choices': [{'logprobs': {'top_logprobs': list(tops)}}]})}\n\n"


DONE = "data: [DONE]\n\n"


class Vllm:
    """Answers every request alike, and keeps adapters as vLLM does."""

    def __init__(self, reply: str = "", status: int = 200) -> None:
        self.requests: list[tuple[str, dict[str, Any], str | None]] = []
        self.removed: list[int] = []
        self.status = status

        async def answer(request: Request) -> Response:
            body = await request.json()
            self.requests.append((request.url.path, body, request.headers.get("authorization")))
            return PlainTextResponse(reply, self.status)

        self.engine = Engine(Starlette(routes=[Route("/{path:path}", answer, methods=["POST"])]))
        self.engine.attach(SimpleNamespace(
            engine_client=SimpleNamespace(remove_lora=self._remove),
            openai_serving_models=SimpleNamespace(lora_requests={"a@1": SimpleNamespace(lora_int_id=7)})))

    async def _remove(self, number: int) -> bool:
        self.removed.append(number)
        return True


def test_log_probabilities_come_by_position_and_token_and_are_asked_for_with_the_key(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    vllm = Vllm(event({"a": -1.0, "\u2028": -2.0}) + event({"a": -3.0}) + event() + DONE)
    assert asyncio.run(vllm.engine.logprobs("a@1")) == {(0, "a"): -1.0, (0, "\u2028"): -2.0, (1, "a"): -3.0}
    path, body, key = vllm.requests[0]
    assert (path, body["model"], body["stream"], key) == ("/v1/completions", "a@1", True, "Bearer secret")


@pytest.mark.parametrize("value", [None, -9999.0, float("inf"), float("nan")])
def test_values_that_are_not_finite_speak_against_the_adapter(value: float | None) -> None:
    vllm = Vllm(event({"a": -1.0, "b": -2.0}, {"a": -1.0, "b": value}) + DONE)
    with pytest.raises(Refused) as caught:
        asyncio.run(vllm.engine.logprobs("a@1"))
    assert caught.value.reason == "values"


@pytest.mark.parametrize(("status", "reply"), [
    (400, '{"error": {"message": "bad"}}'), (404, "no such model"), (429, ""), (500, "internal error"),
    (503, event({"a": -1.0}) + DONE), (200, ""), (200, event({"a": -1.0}) * 2), (200, DONE), (200, event() + DONE),
    (200, 'data: {"error": {"message": "the engine is overloaded"}}\n\n' + DONE), (200, "data: {\n\n" + DONE),
    (200, "data: []\n\n" + DONE), (200, event({"a": "x"}) + DONE)])  # type: ignore[dict-item]
def test_any_other_answer_says_nothing_about_the_adapter(status: int, reply: str) -> None:
    with pytest.raises(RuntimeError, match="does not answer the probe of a@1"):
        asyncio.run(Vllm(reply, status).engine.logprobs("a@1"))


def test_an_adapter_that_cannot_be_loaded_is_refused_with_vllms_words() -> None:
    with pytest.raises(Refused, match="vLLM cannot load it: no room") as caught:
        asyncio.run(Vllm("no room", 500).engine.load("a@1", Path("/x")))
    assert caught.value.reason == "load"


@pytest.mark.parametrize("status", [200, 404])
def test_a_loaded_adapter_is_removed_from_the_engine_once_even_if_its_name_is_unknown_by_then(status: int) -> None:
    async def work() -> None:
        await vllm.engine.load("a@1", Path("/x"))
        vllm.status = status
        await vllm.engine.remove("a@1")
        await vllm.engine.remove("a@1")

    vllm = Vllm()
    asyncio.run(work())
    assert vllm.removed == [7]
    assert [path for path, _, _ in vllm.requests] == ["/v1/load_lora_adapter", *["/v1/unload_lora_adapter"] * 2]


def test_an_adapter_whose_name_vllm_does_not_give_up_keeps_its_slot_and_is_tried_again() -> None:
    async def work() -> None:
        await vllm.engine.load("a@1", Path("/x"))
        vllm.status = 500
        with pytest.raises(RuntimeError, match="does not unload a@1"):
            await vllm.engine.remove("a@1")
        assert not vllm.removed
        vllm.status = 200
        await vllm.engine.remove("a@1")

    vllm = Vllm()
    asyncio.run(work())
    assert vllm.removed == [7]
