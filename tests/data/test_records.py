"""Promises about records: which may call tools, and the text that tells one question from another."""

from __future__ import annotations

import unicodedata
from datetime import date
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.data.formats import to_jsonl
from jobs.data.records import comparable, content_of, lengths_of, question_of, shape_of, text_of, validate_record


@given(st.text())
def test_what_is_comparable_stays_as_it_is(text: str) -> None:
    assert comparable(comparable(text)) == comparable(text)


@given(st.text(), st.sampled_from(["NFC", "NFD", "NFKC", "NFKD"]))
def test_the_form_of_a_text_makes_no_difference(text: str, form: str) -> None:
    assert comparable(unicodedata.normalize(form, text)) == comparable(text)  # type: ignore[arg-type]


@given(st.lists(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1)),
       st.sampled_from(["\u200b", "\u200d", "\u2060", "\ufeff", "\u00ad", "\ufe0f", "\u202e", "\u034f"]))
def test_what_is_invisible_makes_no_difference(words: list[str], invisible: str) -> None:
    assert comparable(f" {invisible} ".join(words)) == comparable("\n".join(words)) == " ".join(words).casefold()
    assert comparable(invisible.join(words)) == comparable("".join(words))


# --- tool calls -------------------------------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "rooms", "description": "Free rooms.", "strict": True,
                                         "parameters": {"type": "object", "properties": {}}}}
CALL: dict[str, Any] = {"id": "call-1", "type": "function", "function": {"name": "rooms", "arguments": '{"floor": 2}'}}
USER, ANSWER = {"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Forty."}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "call-1", "name": "rooms", "content": "40"}
CALLING: dict[str, Any] = {"messages": [USER, CALLS, RESULT, ANSWER], "tools": [TOOL]}


def changed(**changes: Any) -> dict[str, Any]:
    """The call with other keys of its function."""
    return {"messages": [USER, {**CALLS, "tool_calls": [{**CALL, "function": {**CALL["function"], **changes}}]}]}


@pytest.mark.parametrize("record", [
    CALLING, {"messages": CALLING["messages"]}, {"messages": [USER, CALLS]},
    {"messages": [USER, ANSWER], "tools": [TOOL]},
    {"messages": [USER, {**CALLS, "content": "Let me see."}, {**RESULT, "content": ""}, RESULT, ANSWER]},
    {"messages": [USER, CALLS, {"role": "tool", "content": "40"}, CALLS]},
    {"messages": [{**USER, "tool_calls": None, "name": None}, ANSWER]},  # as Parquet has it
    {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "rooms"}}]}]},
    changed(arguments={"floor": 2}), changed(arguments=""), changed(arguments={})])
def test_records_may_call_tools(record: dict[str, Any]) -> None:
    assert validate_record(record) == []
    assert validate_record(content_of(record)) == []
    assert content_of(content_of(record)) == content_of(record)
    to_jsonl(content_of(record))


@pytest.mark.parametrize(("record", "problem"), [
    ({"messages": [USER, {**CALLS, "tool_calls": []}]}, "`messages[1].tool_calls` is empty"),
    ({"messages": [USER, {**CALLS, "tool_calls": "rooms"}]}, "`messages[1].tool_calls` must be a list of calls"),
    ({"messages": [USER, {**CALLS, "tool_calls": ["rooms"]}]}, "`messages[1].tool_calls[0]` must be an object"),
    ({"messages": [USER, {**CALLS, "tool_calls": [{"name": "rooms"}]}]},
     "`messages[1].tool_calls[0]`: unknown key 'name'"),
    ({"messages": [USER, {**CALLS, "tool_calls": [{**CALL, "id": 7}]}]}, "`messages[1].tool_calls[0].id` must be text"),
    ({"messages": [USER, {**CALLS, "tool_calls": [{**CALL, "type": "code"}]}]},
     "`messages[1].tool_calls[0].type` must be"),
    ({"messages": [USER, {**CALLS, "content": 7}]}, "`messages[1].content` must be text, not 7"),
    (changed(name=""), "`messages[1].tool_calls[0].function.name` is empty"),
    (changed(parameters={}), "`messages[1].tool_calls[0].function`: unknown key 'parameters'"),
    (changed(arguments="{floor"), "`messages[1].tool_calls[0].function.arguments` must be an object"),
    (changed(arguments="[1]"), "`messages[1].tool_calls[0].function.arguments` must be an object"),
    (changed(arguments=["x" * 999]), "`messages[1].tool_calls[0].function.arguments` must be an object"),
    (changed(arguments={"a": "\ud800"}), "`messages[1].tool_calls[0].function.arguments` holds half a character"),
    (changed(arguments={"a": date(2026, 1, 1)}), "`messages[1].tool_calls[0].function.arguments` is not JSON"),
    ({"messages": [{**USER, "tool_calls": [CALL]}, ANSWER]}, "`messages[0]`: unknown key 'tool_calls'"),
    ({"messages": [USER, RESULT, ANSWER]}, "`messages[1]`: a `tool` message must follow the assistant's `tool_calls`"),
    ({"messages": [USER, CALLS, USER, RESULT, ANSWER]}, "`messages[3]`: a `tool` message must follow"),
    ({"messages": [USER, CALLS, {**RESULT, "tool_call_id": "call-2"}, ANSWER]},
     "`messages[2].tool_call_id` must be the `id` of a call before it, not 'call-2'"),
    ({"messages": [USER, CALLS, {**RESULT, "name": " "}, ANSWER]}, "`messages[2].name` is empty"),
    ({"messages": [USER, CALLS, RESULT]}, "`messages` must end with the assistant's answer"),
    ({"messages": [USER, ANSWER], "tools": TOOL}, "`tools` must be a list of tools, not an object"),
    ({"messages": [USER, ANSWER], "tools": []}, "`tools` is empty"),
    ({"messages": [USER, ANSWER], "tools": ["rooms"]}, "`tools[0]` must be an object"),
    ({"messages": [USER, ANSWER], "tools": [{"type": "function"}]}, "`tools[0].function` must be an object"),
    ({"messages": [USER, ANSWER], "tools": [{"function": {"name": "a", "parameters": "{}"}}]},
     "`tools[0].function.parameters` must be an object (a JSON schema), not '{}'"),
    ({"prompt": "a", "completion": "b", "tools": [TOOL]}, "`tools` needs `messages`"),
])
def test_tool_calls_that_are_wrong_are_named(record: dict[str, Any], problem: str) -> None:
    found, *_ = validate_record(record)
    assert found.startswith(problem)
    assert len(found) < 200, "data is private and long"


def test_calls_are_part_of_question_and_lengths() -> None:
    """The same question in other words is another one; which tools there are is not part of it."""
    other = {"messages": [*changed(name="guests")["messages"], ANSWER]}
    same = {"messages": [*changed(arguments={"floor": 2})["messages"], ANSWER]}
    record = {"messages": [USER, CALLS, ANSWER], "tools": [TOOL]}
    assert question_of(record) == question_of(same) != question_of(other)
    call = '{"name": "rooms", "arguments": {"floor": 2}}'
    assert lengths_of(record) == (len("How many?") + len(call), len("Forty."))
    assert lengths_of({"messages": [USER, CALLS]}) == (len("How many?"), len(call))
    assert text_of({**CALLS, "content": "Wait."}) == f"Wait.\n{call}"


# --- preferences ------------------------------------------------------------------------------------------------------

PREFERENCE: dict[str, Any] = {"prompt": "Any rooms?", "chosen": "Yes, forty.", "rejected": "No idea."}


def test_a_preference_has_a_prompt_and_two_answers() -> None:
    spoken = {**PREFERENCE, "prompt": [{"role": "system", "content": "Be brief."}, USER], "group": "a"}
    for record in (PREFERENCE, spoken):
        assert validate_record(record) == []
        assert validate_record(content_of(record)) == []
        assert shape_of(record) == "preference"
    assert list(content_of(spoken)) == ["prompt", "chosen", "rejected"]
    assert question_of(spoken) == question_of({"messages": [USER, ANSWER]}), "the same question as without a preference"
    assert question_of(PREFERENCE) == question_of({"prompt": "any  rooms?", "completion": "Yes."})
    assert lengths_of(PREFERENCE) == (10, 11)


@pytest.mark.parametrize(("record", "problem"), [
    ({"prompt": "a", "chosen": "b"}, "`rejected` is missing"),
    ({"prompt": "a"}, "`completion` is missing"),
    ({"chosen": "b", "rejected": "c"}, "`prompt` is missing"),
    ({**PREFERENCE, "completion": "d"}, "mixes `prompt` and `preference`"),
    ({**PREFERENCE, "text": "d"}, "mixes `text` and `preference`"),
    ({**PREFERENCE, "chosen": " "}, "`chosen` is empty"),
    ({**PREFERENCE, "rejected": "Yes, forty. "}, "`chosen` and `rejected` are equal"),
    ({**PREFERENCE, "prompt": []}, "`prompt` must hold at least a question"),
    ({**PREFERENCE, "prompt": [{"role": "usr", "content": "a"}]}, "`prompt[0].role` must be one of"),
    ({**PREFERENCE, "tools": [TOOL]}, "`tools` needs `messages`")])
def test_preferences_that_are_wrong_are_named(record: dict[str, Any], problem: str) -> None:
    assert any(problem in found for found in validate_record(record)), validate_record(record)
