"""Promises of the encoding: training, evaluation and serving see the same tokens."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from jobs.core import models
from jobs.core.errors import UserError
from jobs.data import chat as chat_format
from jobs.data import encoding
from jobs.data.chat import RecordError
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


CONVERSATION = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."},
                {"role": "user", "content": "When?"}, {"role": "assistant", "content": "Now."}]


def learned(tokenizer: Any, encoded: encoding.Encoded) -> list[str]:
    return [tokenizer.decode(encoded.tokens[first:last]) for first, last in encoded.learned]


def test_every_answer_of_a_conversation_is_learned(chat: Any) -> None:
    (encoded,) = encoding.encode(chat, {"messages": CONVERSATION})
    assert chat.decode(encoded.tokens) == (
        "<|user|>Who?<|end|>\n<|assistant|>I.<|end|>\n<|user|>When?<|end|>\n<|assistant|>Now.<|end|>")
    assert learned(chat, encoded) == ["I.<|end|>", "Now.<|end|>"]
    assert chat.decode(encoded.completion) == "Now.<|end|>", "the last one is the answer"
    assert encoding.answers({"messages": CONVERSATION}) == ["I.", "Now."]


def test_a_turn_that_a_later_prompt_renders_otherwise_is_a_sequence_of_its_own(
        chat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Qwen3's template does, which asks for an answer without thoughts by empty ones, and drops them later."""
    monkeypatch.setattr(chat, "chat_template", (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and loop.last %}[]{% endif %}"
        "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>[]{% endif %}"))
    first, second = encoding.encode(chat, {"messages": CONVERSATION})
    assert (chat.decode(first.prompt), chat.decode(first.completion)) == (
        "<|user|>Who?<|end|><|assistant|>[]", "I.<|end|>")
    assert (chat.decode(second.prompt), chat.decode(second.completion)) == (
        "<|user|>Who?<|end|><|assistant|>I.<|end|><|user|>When?<|end|><|assistant|>[]", "Now.<|end|>")
    assert [len(each.learned) for each in (first, second)] == [1, 1]


def test_an_answer_before_any_question_is_not_learned(chat: Any) -> None:
    """Serving never asks for it."""
    record = {"messages": [{"role": "assistant", "content": "Welcome."}, *CONVERSATION[:2]]}
    (encoded,) = encoding.encode(chat, record)
    assert learned(chat, encoded) == ["I.<|end|>"]
    assert encoding.answers(record) == ["I."]


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
        chat.chat_template = chat.chat_template.replace("{{ m.content }}", "{{ m.content | upper }} ")
        (other,) = encoding.encode(chat, {"prompt": "Who?", "completion": "The maid."})
    finally:
        chat.chat_template = template
    assert chat.decode(encoded.prompt) == "ASK Who?"
    assert chat.decode(encoded.completion) == "The maid.<|end|>"
    assert (chat.decode(other.prompt), chat.decode(other.completion)) == ("ASK WHO? ", "THE MAID. <|end|>")


@pytest.mark.parametrize(("encoded", "prompt", "completion", "labels", "scored"), [
    (encoding.Encoded.of([1, 2], [3]), [1, 2], [3], [-100, -100, 3], 1),
    (encoding.Encoded.of([], [4, 5]), [], [4, 5], [4, 5], 1),  # nothing precedes the first
    (encoding.Encoded.of([1, 2], []), [1, 2], [], [-100, -100], 0),
    (encoding.Encoded([1, 2, 3, 4, 5], [(1, 2), (4, 5)]), [1, 2, 3, 4], [5], [-100, 2, -100, -100, 5], 2),
    (encoding.Encoded([1, 2, 3, 4, 5], [(0, 2), (3, 4)]), [1, 2, 3], [4, 5], [1, 2, -100, 4, -100], 2),
])
def test_what_is_learned_of_a_sequence_has_labels_and_is_scored(
        encoded: encoding.Encoded, prompt: list[int], completion: list[int], labels: list[int], scored: int) -> None:
    assert (encoded.prompt, encoded.completion, encoded.labels(), encoded.scored) == (
        prompt, completion, labels, scored)
    assert len(encoded) == len(labels) and encoded.sequences == [encoded]
    nothing = encoded.unlearned
    assert (nothing.tokens, nothing.scored, nothing.labels()) == (encoded.tokens, 0, [-100] * len(labels))


@pytest.mark.parametrize(("encoded", "text"), [
    (encoding.Encoded.of([5], [0]), False), (encoding.Encoded.of([0], [5]), True),
    (encoding.Encoded.of([0], [0, 5]), True), (encoding.Encoded.of([5], []), False),
    (encoding.Encoded.of([], [5, 0]), False),  # of a text the first token is not scored
    (encoding.Encoded.of([], [0, 5]), True), (encoding.Encoded([0, 0, 5, 0], [(1, 2), (3, 4)]), False),
    (encoding.Encoded([0, 5, 5, 0], [(1, 2), (3, 4)]), True)])
def test_a_sequence_has_text_if_any_scored_token_is_no_special_one(encoded: encoding.Encoded, text: bool) -> None:
    assert encoded.has_text({0, 9}) is text


def test_a_pair_is_both_of_its_sequences() -> None:
    pair = encoding.Pair(encoding.Encoded.of([1], [2, 3]), encoding.Encoded.of([1], [4]))
    assert pair.sequences == [pair.chosen, pair.rejected] and len(pair) == 5
    assert pair.unlearned == encoding.Pair(pair.chosen.unlearned, pair.rejected.unlearned)


PREFERENCE: dict[str, Any] = {"prompt": "Who?", "chosen": "The maid.", "rejected": "The cook."}


def test_of_a_preference_training_reads_both_answers_and_the_evaluation_the_chosen_one(chat: Any) -> None:
    prompt = "<|user|>Who?<|end|>\n<|assistant|>"
    both = encoding.encode_for_training(chat, PREFERENCE)
    assert [(chat.decode(each.prompt), chat.decode(each.completion)) for each in both] == [
        (prompt, "The maid.<|end|>"), (prompt, "The cook.<|end|>")]
    assert encoding.encode(chat, PREFERENCE) == both[:1]
    spoken = encoding.encode_for_training(chat, PREFERENCE | {"prompt": CONVERSATION[:3]})
    assert [learned(chat, each) for each in spoken] == [["The maid.<|end|>"], ["The cook.<|end|>"]]
    answered = {"prompt": "Who?", "completion": "The maid."}
    assert encoding.encode_for_training(chat, answered) == encoding.encode(chat, answered)


@pytest.mark.parametrize(("record", "question", "answers"), [
    ({"text": "The cook."}, None, ["The cook."]),
    ({"prompt": "Who?", "completion": "I."}, [CONVERSATION[0]], ["I."]),
    (PREFERENCE, [CONVERSATION[0]], ["The maid."]),
    (PREFERENCE | {"prompt": CONVERSATION[:3]}, CONVERSATION[:3], ["The maid."]),
    ({"messages": CONVERSATION}, CONVERSATION[:3], ["I.", "Now."]),
])
def test_a_record_has_a_question_and_answers(record: Any, question: Any, answers: list[str]) -> None:
    assert (encoding.question(record), encoding.answers(record), encoding.answer(record)) == (
        question, answers, answers[-1])


@pytest.mark.parametrize(("change", "message"), [
    ({"chosen": "The <|end|>."}, r"^`chosen`: messages\[1\] \(role assistant\): holds <\|end\|>, at which"),
    ({"rejected": "The <|end|>."}, r"^`rejected`: messages\[1\] \(role assistant\): holds <\|end\|>, at which"),
    ({"rejected": " The maid."}, "^`chosen` and `rejected` are the same tokens: there is nothing to prefer$")])
def test_a_preference_that_cannot_be_learned_says_which_answer_is_at_fault(
        chat: Any, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], message: str) -> None:
    monkeypatch.setattr(chat, "chat_template", chat.chat_template.replace("m.content", "m.content | trim"))
    with pytest.raises(RecordError, match=message):
        encoding.encode_for_training(chat, PREFERENCE | change)


FINISHED = ("{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}[{{ m.content }}]END{% else %}"
            "{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")


@pytest.mark.parametrize(("end", "learned"), [
    ("<|end|>\n", "[The maid.]<|end|>"), ("<|end|>!<|end|>\n", "[The maid.]<|end|>"), ("", "[The maid.]<|end|>")])
def test_the_answer_is_learned_as_the_template_renders_a_finished_one(
        chat: Any, monkeypatch: pytest.MonkeyPatch, end: str, learned: str) -> None:
    """Up to the first token that ends a reply, which is added where the template has none."""
    monkeypatch.setattr(chat, "chat_template", FINISHED.replace("END", end))
    (encoded,) = encoding.encode(chat, {"prompt": "Who?", "completion": "The maid."})
    assert chat.decode(encoded.prompt) == "<|user|>Who?<|assistant|>"
    assert chat.decode(encoded.completion) == learned


def test_without_a_template_each_message_is_a_line(plain: Any) -> None:
    encoded = encoding.encode(plain, {"messages": CONVERSATION})
    assert [(plain.decode(each.prompt), plain.decode(each.completion)) for each in encoded] == [
        ("Who?\n", "I.<|end|>"), ("Who?\nI.\nWhen?\n", "Now.<|end|>")]


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


# --- where a reply ends -----------------------------------------------------------------------------------------------

TURN_END = FINISHED.replace("END", "<|system|>\n<|end|>")  # as Phi's, which ends a turn and then the text


@pytest.mark.parametrize(("settings", "learned"), [
    ({}, "[The maid.]<|system|>\n<|end|>"),
    ({"config.json": {"eos_token_id": 2}}, "[The maid.]<|system|>"),
    ({"generation_config.json": {"eos_token_id": [0, 2]}}, "[The maid.]<|system|>"),
    ({"generation_config.json": {"eos_token_id": 0}, "config.json": {"eos_token_id": 2}},
     "[The maid.]<|system|>\n<|end|>"),
    ({"generation_config.json": {}}, "[The maid.]<|system|>\n<|end|>"),
    ({"generation_config.json": {"eos_token_id": None}}, "[The maid.]<|system|>\n<|end|>")])
def test_an_answer_ends_with_the_first_token_at_which_serving_stops(
        tmp_path: Path, settings: dict[str, Any], learned: str) -> None:
    """vLLM stops at the tokenizer's end token and at those of generation_config.json, without it of config.json."""
    build_models.tiny_tokenizer(tmp_path)
    for name, content in settings.items():
        (tmp_path / name).write_text(json.dumps({"model_type": "llama", **content}))
    tokenizer = models.load_tokenizer(tmp_path)
    tokenizer.chat_template = TURN_END
    assert tokenizer.convert_tokens_to_ids("<|system|>") == 2
    (encoded,) = encoding.encode(tokenizer, {"prompt": "Who?", "completion": "The maid."})
    assert tokenizer.decode(encoded.completion) == learned


def test_settings_that_are_not_json_are_named(tmp_path: Path) -> None:
    build_models.tiny_tokenizer(tmp_path)
    tokenizer = models.load_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"generation_config\.json: cannot be read"):
        encoding.encode(tokenizer, {"prompt": "Who?", "completion": "The maid."})


@pytest.mark.parametrize("record", [{"prompt": "Who?", "completion": "The <|end|> maid."}, {"text": "a<|end|>b"}])
def test_an_answer_that_would_stop_serving_in_its_middle_is_rejected(chat: Any, record: dict[str, Any]) -> None:
    with pytest.raises(RecordError, match=r"holds <\|end\|>, at which serving ends a reply"):
        encoding.encode(chat, record)


def test_special_tokens_are_those_that_are_no_text(tmp_path: Path) -> None:
    """The unknown token stands for text; GPT-2 has one token for it and for the end."""
    from transformers import PreTrainedTokenizerFast

    build_models.tiny_tokenizer(tmp_path)
    tokenizer = models.load_tokenizer(tmp_path)
    assert chat_format.special_tokens(tokenizer) == {0, 1, 2, 3, 4}
    for unknown, special in (("a", {0, 1}), ("<|end|>", {0, 1})):
        other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|end|>",
                                        pad_token="<|pad|>", unk_token=unknown)
        found = chat_format.special_tokens(other)
        assert special <= found and other.convert_tokens_to_ids("a") not in found


def test_a_tokenizer_that_ends_every_text_does_not_end_it_twice(tmp_path: Path) -> None:
    from tokenizers import processors

    build_models.tiny_tokenizer(tmp_path, chat=False)
    tokenizer = models.load_tokenizer(tmp_path)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|end|>", special_tokens=[("<|end|>", 0)])
    assert tokenizer.decode(encoding.encode(tokenizer, {"text": "The cook."})[0].tokens) == "The cook.<|end|>"


# --- templates that reject or leave out something ---------------------------------------------------------------------

RENDER = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
ANSWER = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
CALL = {"type": "function", "function": {"name": "rooms", "arguments": '{"floor": 2}'}}
CALLING: dict[str, Any] = {"messages": [
    {"role": "user", "content": "How many rooms?"}, {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "content": "forty"}, {"role": "assistant", "content": "Forty."}]}
SYSTEM = {"messages": [{"role": "system", "content": "Be brief."}, *CONVERSATION[:2]]}


@pytest.mark.parametrize(("template", "record", "message"), [
    ("{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('Only user and model roles') }}{% endif %}"
     "{{ m.content }}{{ m.tool_calls }}{% endfor %}", CALLING,
     "messages[2] (role tool): the chat template rejects it: Only user and model roles"),
    ("{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}" + RENDER, SYSTEM,
     "messages[0] (role system): the chat template rejects it: No system role"),
    (RENDER + "{% if add_generation_prompt %}{{ raise_exception('No') }}{% endif %}", SYSTEM,
     "messages[1] (role user): the chat template rejects it: No"),
    (RENDER + "{{ messages[0].missing.part }}", SYSTEM,
     "messages[0] (role system): the chat template rejects it: 'dict object' has no attribute 'missing'"),
    ("{% for", SYSTEM, "messages[0] (role system): the chat template rejects it: "),
    (RENDER + "{% for i in range(10**9) %}x{% endfor %}", SYSTEM, "(role system): the chat template rejects it: Range"),
    ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", SYSTEM, "maximum recursion depth exceeded"),
    (RENDER + "{{ 'x' * (messages | length * 10**6) }}", SYSTEM, "it makes 2000"),
    (RENDER + "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", SYSTEM,
     "(role user): the chat template rejects it: it does not end within 1 s"),
    ("{{ raise_exception('no ' + messages[0].content * 99) }}", SYSTEM, "rejects it: no Be brief.Be brief."),
    ("{% for m in messages if m.role == 'user' %}<|user|>{{ m.content }}{% endfor %}" + ANSWER, CONVERSATION,
     "messages[1] (role assistant): the chat template leaves out its `content`"),
    ("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}", SYSTEM,
     "messages[0] (role system): the chat template leaves out its `content`"),
    (RENDER + ANSWER, CALLING, "messages[1] (role assistant): the chat template leaves out its `tool_calls`"),
    ("{% for m in messages if m.role != 'tool' %}{{ m.content }}{{ m.tool_calls }}{% endfor %}", CALLING,
     "messages[2] (role tool): the chat template leaves out its `content`"),
    (RENDER + ANSWER, {**SYSTEM, "tools": [{"type": "function", "function": {"name": "rooms"}}]},
     "the chat template leaves out `tools`"),
    (None, CALLING, "(role assistant): the chat template rejects it: the tokenizer has none"),
    ("{% if add_generation_prompt %}ASK {% endif %}Who? I.", SYSTEM,
     "messages[0] (role system): the chat template leaves out its `content`"),
    ("{% if add_generation_prompt %}ASK {% endif %}{{ messages[0].content }} I.", CONVERSATION[:2],
     "messages[1] (role assistant): the chat template leaves it out"),
    ("{% for m in messages %}{{ m.content }}<|end|>{% if m.role == 'user' %}<|end|>{% endif %}{% endfor %}"
     .replace("{{", "{% if m.role == 'assistant' %}<|end|>{% endif %}{{"), CONVERSATION[:2],
     "messages[1] (role assistant): before it the chat template has a token at which serving ends a reply"),
    (RENDER.replace("m.content", "m.content.split('</think>')[-1]") + ANSWER, [
        CONVERSATION[0], {"role": "assistant", "content": "<think>I may know that. </think>Four."}],
     "messages[1] (role assistant): the chat template leaves out a part of its `content`"),
    (RENDER.replace("m.content", "m.content[:40]") + ANSWER,
     [CONVERSATION[0], {"role": "assistant", "content": "x" * 99}],
     "messages[1] (role assistant): the chat template leaves out a part of its `content`"),
    (RENDER.replace("{{ m.content }}", "{{ m.content | replace(' of', '<|end|> of') }}") + ANSWER,
     [CONVERSATION[0], {"role": "assistant", "content": "The maid of the house."}],
     "messages[1] (role assistant): inside of it the chat template has a token at which serving ends a reply"),
    ("{{ range(10**5) | random }}" + RENDER + ANSWER, CONVERSATION[:2],
     "messages[1] (role assistant): the chat template renders it otherwise each time"),
    (RENDER + "{{ '\\ud800' }}" + ANSWER, CONVERSATION[:2], "messages[0] (role user): the chat template rejects it: "
     "'utf-8' codec can't encode"),
])
def test_a_template_that_rejects_or_leaves_out_a_part_of_a_record_is_one_line(
        chat: Any, monkeypatch: pytest.MonkeyPatch, template: str | None, record: Any, message: str) -> None:
    monkeypatch.setattr(chat, "chat_template", template)
    monkeypatch.setattr(chat_format, "RENDER_SECONDS", 1.0)
    monkeypatch.setattr(chat_format, "RENDERED_CHARACTERS", 10**6)
    with pytest.raises(RecordError) as raised:
        encoding.encode(chat, {"messages": record} if isinstance(record, list) else record)
    assert message in str(raised.value)
    assert len(str(raised.value)) < 300, "of the private text only a little"
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("change", ["{{ m.content | upper }}", "{{ m.content | trim }}", "{{ m.content | tojson }}"])
def test_a_template_may_change_the_text(chat: Any, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    monkeypatch.setattr(chat, "chat_template", RENDER.replace("{{ m.content }}", change) + ANSWER)
    (encoded,) = encoding.encode(chat, {"messages": [{"role": "system", "content": 'Be "brief". '}, *CONVERSATION]})
    assert len(encoded.learned) == 2


def test_the_arguments_of_the_template_are_applied(chat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "chat_template", RENDER + "{{ tone }}" + ANSWER)
    tone = {"tone": "politely"}
    for encoded in (*encoding.encode(chat, {"messages": SYSTEM["messages"]}, tone),
                    *encoding.encode(chat, PREFERENCE, tone), *encoding.encode_for_training(chat, PREFERENCE, tone)):
        assert chat.decode(encoded.prompt).endswith("politely<|assistant|>")
    assert chat.decode(encoding.encode_question(chat, {"prompt": "Who?"}, tone)).endswith("politely<|assistant|>")


TOOLS = [{"type": "function", "function": {"name": "rooms"}}]


def test_a_question_without_an_answer_is_what_serving_renders(
        chat: Any, plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"messages": CONVERSATION[:3]}
    assert chat.decode(encoding.encode_question(chat, {"prompt": "Who?"})) == "<|user|>Who?<|end|>\n<|assistant|>"
    assert chat.decode(encoding.encode_question(chat, asked)) == (
        "<|user|>Who?<|end|>\n<|assistant|>I.<|end|>\n<|user|>When?<|end|>\n<|assistant|>")
    assert plain.decode(encoding.encode_question(plain, asked)) == "Who?\nI.\nWhen?\n"
    with pytest.raises(RecordError, match="^the chat template leaves out `tools`"):
        encoding.encode_question(chat, asked | {"tools": TOOLS})
    monkeypatch.setattr(chat, "chat_template", "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}" + RENDER)
    assert chat.decode(encoding.encode_question(chat, asked | {"tools": TOOLS})).startswith("rooms<|user|>Who?")
    monkeypatch.setattr(chat, "chat_template", "{% for m in messages[1:] %}{{ m.content }}{% endfor %}")
    with pytest.raises(RecordError, match=r"messages\[0\] \(role user\): the chat template leaves out its `content`"):
        encoding.encode_question(chat, asked)


def test_only_a_tokenizer_without_a_template_begins_a_question_by_itself(tmp_path: Path) -> None:
    from tokenizers import processors

    for name, begins in (("chat", False), ("plain", True)):
        build_models.tiny_tokenizer(tmp_path / name, chat=name == "chat")
        tokenizer = models.load_tokenizer(tmp_path / name)
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<|system|> $A", special_tokens=[("<|system|>", 2)])
        assert (encoding.encode_question(tokenizer, {"prompt": "Who?"})[0] == 2) is begins
        (encoded,) = encoding.encode(tokenizer, {"prompt": "Who?", "completion": "I."})
        assert (encoded.prompt[0] == 2) is begins
        assert encoding.encode(tokenizer, {"text": "Who?"})[0].tokens[0] == 2, "a text has no template"


def test_tools_and_calls_reach_the_template_as_vllm_hands_them_to_it(
        chat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys of a tool in one order; of a call in a prompt sorted, and in an answer as a model writes it."""
    monkeypatch.setattr(chat, "chat_template", (
        "{% for t in tools or [] %}{{ t | tojson }}{{ '\\n' }}{% endfor %}"
        "{% for m in messages %}{{ m.content is defined }}{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function | tojson }}{% endfor %}{{ '\\n' }}{% endfor %}"))
    strict = {"function": {"strict": False, "parameters": {"type": "object"}, "name": "strict", "else": 1}}
    made = chat_format.Chat(chat, tools=[*TOOLS, strict])
    messages = [*CALLING["messages"][:2], {**CALLING["messages"][1]}]
    assert made.render(messages, prompt=False).splitlines() == [
        '{"type": "function", "function": {"name": "rooms", "description": null, "parameters": null}}',
        '{"type": "function", "function": {"name": "strict", "description": null, "parameters": {"type": "object"}, '
        '"strict": false}}',
        "TrueHow many rooms?", 'True{"arguments": {"floor": 2}, "name": "rooms"}',
        'True{"name": "rooms", "arguments": {"floor": 2}}']
    assert made.render(messages, prompt=True).splitlines()[-1] == 'True{"arguments": {"floor": 2}, "name": "rooms"}'
    assert messages[1]["tool_calls"] == [CALL], "the record itself stays as it is"


def test_a_template_is_limited_in_the_main_thread_and_other_alarms_stay_as_they_were(chat: Any) -> None:
    def other(*_: object) -> None:
        """Another's alarm."""

    of, found = chat_format.Chat(chat), []
    handler, (remaining, _) = signal.signal(signal.SIGALRM, other), signal.setitimer(signal.ITIMER_REAL, 500)
    try:
        expected = of.render(CONVERSATION, prompt=True)
        assert signal.getsignal(signal.SIGALRM) is other
        assert 400 < signal.getitimer(signal.ITIMER_REAL)[0] <= 500
        thread = threading.Thread(target=lambda: found.append(of.render(CONVERSATION, prompt=True)))
        thread.start()
        thread.join()
        assert found == [expected], "other threads get no alarms"
    finally:
        signal.setitimer(signal.ITIMER_REAL, remaining)
        signal.signal(signal.SIGALRM, handler)


def test_a_template_that_reads_the_clock_is_a_warning(
        chat: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    chat_format._warn_of_clock.cache_clear()
    monkeypatch.setattr(chat, "chat_template", "{{ day or strftime_now('%d %b %Y') }}" + RENDER + ANSWER)
    encoding.encode(chat, SYSTEM, {"day": "1 Jan 2026"})
    assert not caplog.messages
    for _ in range(2):
        encoding.encode(chat, SYSTEM)
    assert [message[:36] for message in caplog.messages] == ["the chat template reads the clock, s"]
