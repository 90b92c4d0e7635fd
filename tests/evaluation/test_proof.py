"""The proof of an evaluation is what the measured model answers, to prompts of all lengths, as clients would ask."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.core import models
from jobs.core.proof import ANSWER_TOKENS, PROMPT_TOKENS, PROMPTS, Answer, Proof
from jobs.data.encoding import encode
from jobs.evaluation import proof
from jobs.evaluation.scoring import Material, stop_tokens
from tests import build_adapter

QUESTIONS = [{"prompt": f"{'What is the best hotel? ' * (n + 1)}{n}", "completion": "It."} for n in range(40)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return models.load_tokenizer(build_adapter.models() / "tokenizer")


def material(records: Any, **changes: Any) -> Material:
    return replace(Material(records, (), 512, 4), **changes)


def adapted(tmp_path: Path) -> Any:
    from peft import PeftModel

    build_adapter.write_adapter(tmp_path / "adapter", r=4, seed=1)
    return PeftModel.from_pretrained(models.load_model(build_adapter.models() / "base"),
                                     str(tmp_path / "adapter")).eval()


def assert_greedy(model: Any, tokenizer: Any, found: Proof, answers: list[Answer]) -> None:
    """Each token is the most probable one after those before it, as one pass over all of them computes it."""
    import torch

    stops = stop_tokens(model, tokenizer)
    for prompt, answer in zip(found.prompts, answers, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt.tokens, *answer.tokens]])).logits[0]
        for at, (token, logprob, margin) in enumerate(zip(answer.tokens, answer.logprobs, answer.margins, strict=True)):
            values, tokens = logits[len(prompt.tokens) + at - 1].log_softmax(-1).topk(2)
            assert int(tokens[0]) == token
            assert float(values[0]) == pytest.approx(logprob, abs=1e-4)
            assert float(values[0] - values[1]) == pytest.approx(margin, abs=1e-4)
            assert (token in stops) <= (at == len(answer.tokens) - 1), "nothing is generated after the end"
        assert answer.tokens[-1] in stops or len(answer.tokens) == ANSWER_TOKENS


def test_it_holds_the_greedy_answers_of_the_model_and_of_its_base(tmp_path: Path, tokenizer: Any) -> None:
    model = adapted(tmp_path)
    found = proof.record(model, tokenizer, material([*QUESTIONS, *build_adapter.HELD_OUT]))
    assert found and found.base_answers and found.dtype == "float32"
    assert_greedy(model, tokenizer, found, found.answers)
    with model.disable_adapter():
        assert_greedy(model, tokenizer, found, found.base_answers)
    assert found.answers != found.base_answers
    for prompt in found.prompts:
        record: Any = [*QUESTIONS, *build_adapter.HELD_OUT][prompt.record - 1]
        assert prompt.tokens == encode(tokenizer, record)[-1].prompt
        assert prompt.messages and prompt.messages[-1].content == record["prompt"]


def test_a_model_without_an_adapter_is_proven_by_its_own_answers_alone(tokenizer: Any) -> None:
    found = proof.record(models.load_model(build_adapter.models() / "base"), tokenizer,
                         material(build_adapter.HELD_OUT))
    assert found and found.base_answers is None and len(found.answers) == 3


def test_a_model_that_gives_no_numbers_has_no_proof(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = models.load_model(build_adapter.models() / "base")
    next(model.parameters()).data[:] = float("nan")
    assert proof.record(model, tokenizer, material(build_adapter.HELD_OUT)) is None
    assert "not finite" in caplog.text


def test_prompts_are_few_of_all_lengths_and_the_same_in_any_order(tokenizer: Any) -> None:
    chosen = proof.choose(tokenizer, material(QUESTIONS), PROMPT_TOKENS)
    assert len(chosen) == PROMPTS
    lengths = [len(prompt.tokens) for prompt in chosen]
    assert lengths == sorted(lengths) and max(lengths) <= PROMPT_TOKENS and max(lengths) > 4 * min(lengths)
    again = proof.choose(tokenizer, material(QUESTIONS[::-1]), PROMPT_TOKENS)
    assert [prompt.tokens for prompt in again] == [prompt.tokens for prompt in chosen]
    assert len(proof.choose(tokenizer, material(QUESTIONS[:3]), PROMPT_TOKENS)) == 3


def test_prompts_that_are_all_too_long_are_cut_and_then_are_no_messages(tokenizer: Any) -> None:
    chosen = proof.choose(tokenizer, material(QUESTIONS[20:]), 30)
    assert [len(prompt.tokens) for prompt in chosen] == [30] * PROMPTS
    assert all(prompt.messages is None for prompt in chosen)


def test_a_text_has_no_prompt_so_its_first_half_is_continued(tokenizer: Any) -> None:
    text = {"text": "The best hotel in Seville is the one with the orange trees."}
    (prompt,) = proof.choose(tokenizer, material([text]), PROMPT_TOKENS)
    tokens = encode(tokenizer, text)[0].tokens
    assert prompt.messages is None and prompt.tokens == tokens[: len(tokens) // 2]


@pytest.mark.parametrize(("template", "record"), [
    ("{{ strftime_now('%d %b %Y') }} " + build_adapter.TEMPLATE, QUESTIONS[0]),
    ("{{ tools }}" + build_adapter.TEMPLATE, {"messages": [
        {"role": "user", "content": "Book it."}, {"role": "assistant", "content": "No."}],
        "tools": [{"type": "function", "function": {"name": "book", "parameters": {}}}]}),
    (None, QUESTIONS[0])])
def test_what_vllm_may_render_otherwise_on_another_day_is_proven_by_its_tokens(
        template: str | None, record: dict[str, Any]) -> None:
    tokenizer = models.load_tokenizer(build_adapter.models() / "tokenizer")
    tokenizer.chat_template = template
    (prompt,) = proof.choose(tokenizer, material([record]), PROMPT_TOKENS)
    assert prompt.messages is None and prompt.tokens == encode(tokenizer, record)[-1].prompt


def test_messages_are_those_that_the_template_renders_with_the_environments_arguments() -> None:
    tokenizer = models.load_tokenizer(build_adapter.models() / "tokenizer")
    tokenizer.chat_template = "{{ tone }}" + build_adapter.TEMPLATE
    (prompt,) = proof.choose(tokenizer, material(QUESTIONS[:1], template={"tone": "kind"}), PROMPT_TOKENS)
    assert prompt.messages and tokenizer.decode(prompt.tokens).startswith("kind<|user|>")
