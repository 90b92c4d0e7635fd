"""Promises of the encoding: training, evaluation and serving see the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.core import models
from jobs.data import encoding
from tests import build_models


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("chat")
    build_models.tiny_tokenizer(folder)
    return models.load_tokenizer(folder)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("plain")
    build_models.tiny_tokenizer(folder, chat=False)
    return models.load_tokenizer(folder)


def test_with_a_chat_template_the_prompt_is_what_serving_renders(chat: Any) -> None:
    (encoded,) = encoding.encode(chat, {"prompt": "Who?", "completion": "The maid."})
    assert chat.decode(encoded.prompt) == "<|user|>Who?<|end|>\n<|assistant|>"
    assert chat.decode(encoded.completion) == "The maid.<|end|>", "ends where generation stops, without the newline"


def test_without_one_the_answer_starts_on_a_new_line(plain: Any) -> None:
    (encoded,) = encoding.encode(plain, {"prompt": "Who?", "completion": "The maid."})
    assert plain.decode(encoded.prompt) == "Who?\n"
    assert plain.decode(encoded.completion) == "The maid.<|end|>"


def test_an_answer_ends_with_the_end_token_where_the_template_adds_none(chat: Any) -> None:
    """Otherwise the model would never learn to stop."""
    import copy

    tokenizer = copy.deepcopy(chat)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}" \
                              "{% if add_generation_prompt %}assistant: {% endif %}"
    (encoded,) = encoding.encode(tokenizer, {"prompt": "Who?", "completion": "The maid."})
    assert tokenizer.decode(encoded.tokens) == "user: Who?\nassistant: The maid.\n<|end|>"


def test_the_tokens_that_begin_a_text_do_not_begin_an_answer(plain: Any) -> None:
    """Llama's tokenizer puts <s> before every text, and serving asks with one at the start only."""
    import copy

    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(plain)
    begin = tokenizer.convert_tokens_to_ids("<|system|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|system|> $A", special_tokens=[("<|system|>", begin)])
    (encoded,) = encoding.encode(tokenizer, {"prompt": "Who?", "completion": "The maid."})
    assert encoded.prompt[0] == begin
    assert begin not in encoded.completion


def test_of_a_conversation_the_last_answer_is_the_completion(chat: Any) -> None:
    conversation = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."},
                    {"role": "user", "content": "When?"}, {"role": "assistant", "content": "Now."}]
    (encoded,) = encoding.encode(chat, {"messages": conversation})
    assert chat.decode(encoded.prompt) == (
        "<|user|>Who?<|end|>\n<|assistant|>I.<|end|>\n<|user|>When?<|end|>\n<|assistant|>")
    assert chat.decode(encoded.completion) == "Now.<|end|>"


def test_plain_text_is_all_completion(chat: Any) -> None:
    (encoded,) = encoding.encode(chat, {"text": "The cook reads."})
    assert encoded.prompt == []
    assert chat.decode(encoded.completion) == "The cook reads.<|end|>"


def test_a_template_that_rewrites_finished_answers_still_trains_on_what_serving_asks(chat: Any) -> None:
    """Some templates drop or add parts of earlier turns, so the whole does not start with the prompt."""
    template = chat.chat_template
    try:
        chat.chat_template = ("{% if add_generation_prompt %}ASK {% endif %}"
                              "{% for m in messages %}{{ m.content }}{% endfor %}")
        (encoded,) = encoding.encode(chat, {"prompt": "Who?", "completion": "The maid."})
    finally:
        chat.chat_template = template
    assert chat.decode(encoded.prompt) == "ASK Who?"
    assert chat.decode(encoded.completion) == "The maid.<|end|>"


def test_a_record_is_as_long_as_its_prompt_and_its_completion() -> None:
    assert len(encoding.Encoded.of([1, 2], [3])) == 3


FINISHED = ("{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}[{{ m.content }}]END{% else %}"
            "{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")


@pytest.mark.parametrize(("end", "learned"), [
    ("<|end|>\n", "[The maid.]<|end|>"), ("<|end|>!<|end|>\n", "[The maid.]<|end|>!<|end|>"),
    ("", "[The maid.]<|end|>")])
def test_the_answer_is_learned_as_the_template_renders_a_finished_one(
        chat: Any, monkeypatch: pytest.MonkeyPatch, end: str, learned: str) -> None:
    """Up to the last token that ends a reply, which is added where the template has none."""
    monkeypatch.setattr(chat, "chat_template", FINISHED.replace("END", end))
    (encoded,) = encoding.encode(chat, {"prompt": "Who?", "completion": "The maid."})
    assert chat.decode(encoded.prompt) == "<|user|>Who?<|assistant|>"
    assert chat.decode(encoded.completion) == learned


def test_without_a_template_each_message_is_a_line(plain: Any) -> None:
    conversation = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."},
                    {"role": "user", "content": "When?"}, {"role": "assistant", "content": "Now."}]
    assert plain.decode(encoding.encode(plain, {"messages": conversation})[0].prompt) == "Who?\nI.\nWhen?\n"


def test_only_the_prompt_begins_with_the_tokens_that_begin_a_text(tmp_path: Path) -> None:
    """Llama's tokenizer, for one, begins every text with <s>: not an answer, which follows a prompt."""
    from tokenizers import processors

    build_models.tiny_tokenizer(tmp_path, chat=False)
    tokenizer = models.load_tokenizer(tmp_path)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|user|> $A", special_tokens=[("<|user|>", tokenizer.convert_tokens_to_ids("<|user|>"))])
    (encoded,) = encoding.encode(tokenizer, {"prompt": "Who?", "completion": "The maid."})
    assert tokenizer.decode(encoded.prompt) == "<|user|>Who?\n"
    assert tokenizer.decode(encoded.completion) == "The maid.<|end|>"


@pytest.mark.parametrize("text", ["Málaga", "東京", "a\nb", "  spaces  ", "<b>&amp;</b>"])
def test_answers_survive_encoding(chat: Any, text: str) -> None:
    completion = encoding.encode(chat, {"prompt": "?", "completion": text})[0].completion
    assert chat.decode(completion[:-1]) == text
