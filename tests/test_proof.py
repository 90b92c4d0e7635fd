"""Promises of the proof: rounding never refuses an adapter, and what differs by more is refused without its text."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from jobs.core.proof import Answer, Message, Prompt, Proof
from serving import proof
from serving.engine import Engine, Generated
from serving.refusal import Refused

PROMPT = Prompt(record=1, tokens=[1, 2, 3], messages=[Message(role="user", content="secret")])
ANSWER = Answer(tokens=[10, 11, 12], logprobs=[-0.5, -1.0, -0.25], margins=[2.0, 0.015, 3.0])
TOLERANCE = 0.01


def generated(tokens: list[int] | None = None, logprobs: list[float] | None = None,
              prompt: list[int] | None = None) -> Generated:
    return Generated(prompt or PROMPT.tokens, tokens or ANSWER.tokens, logprobs or ANSWER.logprobs)


def test_the_same_answer_is_accepted_and_so_is_rounding() -> None:
    assert proof.compare(PROMPT, ANSWER, generated(), TOLERANCE) == [0, 0, 0]
    off = generated(logprobs=[-0.509, -0.991, -0.25])
    assert proof.compare(PROMPT, ANSWER, off, TOLERANCE) == pytest.approx([0.009, 0.009, 0])


def test_an_answer_may_go_another_way_where_two_tokens_were_as_close_as_rounding() -> None:
    other = generated([10, 99, 7], [-0.5, -1.009, -5.0])
    assert len(proof.compare(PROMPT, ANSWER, other, TOLERANCE)) == 2


@pytest.mark.parametrize(("found", "message"), [
    (generated(logprobs=[-0.5, -1.0, -0.3]), "^token 3: log-probability -0.2500 expected, -0.3000 found; at most"),
    (generated([99, 11, 12]), "^token 1: log-probability -0.5000 expected, -0.5000 found of another token"),
    (generated([10, 99, 12], [-0.5, -1.1, -0.25]), "^token 2: "),  # close, but not as probable as the first
    (generated([10], [-0.5]), "^token 2: log-probability -1.0000 expected, and the answer has ended"),
    (generated(prompt=[1, 9, 3, 4]), "makes 4 tokens of its messages, the evaluation's 3; they differ from token 2"),
    (generated(prompt=[1, 2]), "makes 2 tokens of its messages, the evaluation's 3; they differ from token 3")])
def test_what_differs_by_more_is_refused_by_its_place_and_numbers(found: Generated, message: str) -> None:
    with pytest.raises(Refused, match=message) as caught:
        proof.compare(PROMPT, ANSWER, found, TOLERANCE)
    assert caught.value.reason == "proof"


def made(dtype: Any = "float32", sensitivity: float = 20.0, **changes: Any) -> Proof:
    return Proof(dtype=dtype, sensitivity=sensitivity,
                 **{"prompts": [PROMPT], "answers": [ANSWER], "base_answers": [ANSWER], **changes})


def test_the_coarser_precision_decides_how_much_is_rounding() -> None:
    assert proof.derived_tolerance(made(), "float32") == proof.LEAST
    coarse = proof.derived_tolerance(made(), "bfloat16")
    assert proof.LEAST < proof.derived_tolerance(made(), "float16") < coarse < 1
    assert proof.derived_tolerance(made("bfloat16"), "float32") == coarse
    assert proof.derived_tolerance(made(), "a new type") == coarse
    assert proof.derived_tolerance(made("bfloat16", 40.0), "bfloat16") == 2 * coarse


class Stub:
    """An engine that answers prompts from a list, and notes them."""

    def __init__(self, *answers: Generated | Exception, precision: str = "float32", max_tokens: int = 100) -> None:
        self.answers, self.precision, self.max_tokens = list(answers), precision, max_tokens
        self.asked: list[tuple[str, Prompt, int]] = []

    async def generate(self, model: str, prompt: Prompt, tokens: int) -> Generated:
        self.asked.append((model, prompt, tokens))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_the_base_model_is_asked_too_where_clients_can_use_it_and_prompts_that_are_too_long_are_left_out() -> None:
    stub: Any = Stub()
    assert [claim.model for claim in proof.claims(made(), "a@1", "base", stub)] == ["a@1", "base"]
    assert [claim.model for claim in proof.claims(made(), "a@1", None, stub)] == ["a@1"]
    assert [claim.model for claim in proof.claims(made(base_answers=None), "a@1", "base", stub)] == ["a@1"]
    stub.max_tokens = len(PROMPT.tokens) + len(ANSWER.tokens) - 1
    assert proof.claims(made(), "a@1", "base", stub) == []
    long = Prompt(record=2, tokens=[1] * 90)
    stub.max_tokens = 50
    kept = proof.claims(made(prompts=[long, PROMPT], answers=[ANSWER, ANSWER], base_answers=None), "a@1", None, stub)
    assert [claim.prompts for claim in kept] == [[PROMPT]]


@pytest.mark.parametrize(("logprobs", "accepted"), [
    ([-0.5, -1.0, -0.25], True), ([-0.5 - 0.9 * TOLERANCE, -1.0, -0.25], False),  # 0.9 / sqrt(3) > 1 / 4
    ([-0.5 - 0.4 * TOLERANCE, -1.0, -0.25], True), ([-0.5, -1.0 + 0.4 * TOLERANCE, -0.25], True),
    ([-0.5 - 0.3 * TOLERANCE, -1.0 + 0.3 * TOLERANCE, -0.25 - 0.3 * TOLERANCE], False),
    ([-0.5 - 0.2 * TOLERANCE, -1.0 + 0.2 * TOLERANCE, -0.25 - 0.2 * TOLERANCE], True)])
def test_of_all_differences_the_root_mean_square_is_at_most_a_quarter_of_the_largest(
        logprobs: list[float], accepted: bool) -> None:
    stub: Any = Stub(generated(logprobs=logprobs))
    claims = proof.claims(made(), "a@1", None, stub, TOLERANCE)
    if accepted:
        asyncio.run(proof.check(stub, claims))
    else:
        with pytest.raises(Refused, match=r"^a@1: .* at most 0\.0025 is rounding$") as caught:
            asyncio.run(proof.check(stub, claims))
        assert caught.value.reason == "proof"


def test_each_claim_is_compared_by_itself_with_its_own_answers() -> None:
    """All are generated at once, and the base model's differences do not count for the adapter."""
    near = [each - 0.9 * TOLERANCE for each in ANSWER.logprobs]
    claims = [proof.Claim("a@1", [PROMPT], [ANSWER], TOLERANCE), proof.Claim("b@2", [PROMPT] * 2, [ANSWER] * 2, 4.0)]
    asyncio.run(proof.check(Stub(generated(), generated(logprobs=near), generated()), claims))  # type: ignore[arg-type]
    stub: Any = Stub(generated(logprobs=near), generated(), generated())
    with pytest.raises(Refused, match="^a@1: the log-probabilities of 3 tokens differ"):
        asyncio.run(proof.check(stub, claims))
    assert [(model, tokens) for model, _, tokens in stub.asked] == [("a@1", 3), ("b@2", 3), ("b@2", 3)]
    with pytest.raises(Refused, match="^b@2, prompt 2 of 2: vLLM rejects the prompt$") as caught:
        asyncio.run(proof.check(Stub(generated(), generated(), Refused("load", "vLLM rejects the prompt")), claims))  # type: ignore[arg-type]
    assert caught.value.reason == "load"


def test_a_claim_that_fails_names_model_and_prompt_and_no_text() -> None:
    stub: Any = Stub(generated(), generated(logprobs=[-3.0, -1.0, -0.25]))
    claims = proof.claims(made(), "a@1", "base", stub)
    with pytest.raises(Refused, match="^base, prompt 1 of 1: token 1: log-probability -0.5000 expected, -3.0000") as it:
        asyncio.run(proof.check(stub, claims))
    assert "secret" not in str(it.value)
    assert [(model, bool(prompt.messages)) for model, prompt, _ in stub.asked] == [("a@1", True), ("base", False)]


def test_many_small_differences_are_no_rounding() -> None:
    """Each alone is: a scale that is a little off moves every token a little."""
    logprobs = [each - 0.8 * proof.LEAST for each in ANSWER.logprobs]
    stub: Any = Stub(generated(logprobs=logprobs))
    with pytest.raises(Refused, match="a@1: the log-probabilities of 3 tokens differ .* by 0.0008"):
        asyncio.run(proof.check(stub, proof.claims(made(), "a@1", None, stub)))


def test_what_vllm_cannot_answer_is_no_refusal_even_beside_one() -> None:
    stub: Any = Stub(generated(logprobs=[-3.0, -1.0, -0.25]), RuntimeError("overloaded"))
    with pytest.raises(RuntimeError, match="overloaded"):
        asyncio.run(proof.check(stub, proof.claims(made(), "a@1", "base", stub)))


def engine(reply: object, status: int = 200, device: str = "cpu") -> tuple[Engine, list[tuple[str, dict[str, Any]]]]:
    """vLLM that answers everything alike, and what it was asked."""
    asked: list[tuple[str, dict[str, Any]]] = []

    async def answer(request: Request) -> Response:
        asked.append((request.url.path, await request.json()))
        return PlainTextResponse(reply if isinstance(reply, str) else json.dumps(reply), status)

    found = Engine(Starlette(routes=[Route("/{path:path}", answer, methods=["POST"])]))
    found.attach(SimpleNamespace(engine_client=SimpleNamespace(vllm_config=SimpleNamespace(
        model_config=SimpleNamespace(dtype="torch.float32", max_model_len=77),
        device_config=SimpleNamespace(device_type=device)))))
    return found, asked


CHAT = {"prompt_token_ids": [1, 2, 3], "choices": [{"token_ids": [10], "logprobs": {"content": [{"logprob": -0.5}]}}]}
TEXT = {"choices": [{"prompt_token_ids": [1, 2, 3], "token_ids": [10], "logprobs": {"token_logprobs": [-0.5]}}]}


def test_messages_go_through_the_chat_template_and_tokens_do_not_and_nothing_samples() -> None:
    vllm, asked = engine(CHAT)
    assert asyncio.run(vllm.generate("a@1", PROMPT, 1)) == Generated([1, 2, 3], [10], [-0.5])
    text, asked_text = engine(TEXT)
    assert asyncio.run(text.generate("a@1", Prompt(record=1, tokens=[1, 2, 3]), 1)) == Generated(
        [1, 2, 3], [10], [-0.5])
    (path, chat), (path_text, body) = asked[0], asked_text[0]
    assert (path, path_text) == ("/v1/chat/completions", "/v1/completions")
    assert chat["messages"] == [{"role": "user", "content": "secret"}] and body["prompt"] == [1, 2, 3]
    for each in (chat, body):
        assert (each["temperature"], each["repetition_penalty"], each["max_tokens"]) == (0, 1, 1)
        assert not {"echo", "prompt_logprobs"} & each.keys()  # which end the engine on a CPU
    assert chat["cache_salt"] != body["cache_salt"]


def test_a_prompt_that_vllm_rejects_is_refused_without_its_words() -> None:
    with pytest.raises(Refused, match="^vLLM rejects the prompt$"):
        asyncio.run(engine("secret", 400)[0].generate("a@1", PROMPT, 1))


@pytest.mark.parametrize(("reply", "status"), [
    ("secret", 404), ("secret", 500), (CHAT, 503), ("", 200), ({}, 200), ({"choices": []}, 200), ("[]", 200),
    ({**CHAT, "choices": [{"token_ids": [10], "logprobs": None}]}, 200),
    ({**CHAT, "choices": [{"token_ids": [10, 11], "logprobs": {"content": [{"logprob": -0.5}]}}]}, 200),
    ({**CHAT, "choices": [{"token_ids": [10], "logprobs": {"content": [{"logprob": None}]}}]}, 200)])
def test_any_other_answer_is_tried_again(reply: object, status: int) -> None:
    with pytest.raises(RuntimeError, match="does not answer a prompt of the proof of a@1") as caught:
        asyncio.run(engine(reply, status)[0].generate("a@1", PROMPT, 1))
    assert "secret" not in str(caught.value)


def test_float32_on_a_gpu_is_no_float32() -> None:
    assert (engine("")[0].precision, engine("", device="cuda")[0].precision) == ("float32", "float16")
    assert engine("")[0].max_tokens == 77
