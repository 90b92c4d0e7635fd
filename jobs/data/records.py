"""Records: validation of a record or of a sentence with its judgement, and the question of a record.

A record is {"prompt", "completion"}, {"messages": [{"role", "content"}, …]} or {"text"}; or, to learn a preference,
{"prompt", "chosen", "rejected"}, whose prompt is a text or a list of messages. It may name its `split`
(train, validation or holdout) and a `group`: records of one group, e.g. of one customer or document, are never divided
between the splits.
Messages may call tools, in OpenAI's shape: `tool_calls` of the assistant, their results with the role `tool`, and the
definitions in `tools` of the record.
"""

from __future__ import annotations

import difflib
import json
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import regex

from jobs.core.artifacts import canonical

SHAPES = {"prompt": ("prompt", "completion"), "messages": ("messages",), "text": ("text",),
          "preference": ("prompt", "chosen", "rejected")}
OPTIONAL = ("split", "group")
RECORD_KEYS = ("prompt", "completion", "messages", "tools", "text", "chosen", "rejected", *OPTIONAL)
MESSAGE_KEYS = {"system": ("role", "content"), "user": ("role", "content"),
                "assistant": ("role", "content", "tool_calls"), "tool": ("role", "content", "tool_call_id", "name")}
ROLES = tuple(MESSAGE_KEYS)
# Our own names, and those of GLUE CoLA, whose running number (idx) means nothing.
JUDGEMENT_SHAPES = {"text": ("text", "acceptable"), "sentence": ("sentence", "label")}
JUDGEMENT_KEYS = ("text", "acceptable", "sentence", "label", "idx")
# Format characters, and all others that are drawn as nothing, such as zero-width joiners and variation selectors.
INVISIBLE = regex.compile(r"[\p{Format}\p{Default_Ignorable_Code_Point}]+")

Values = dict[str, Any]


@dataclass(frozen=True)
class Schema:
    """What rows must be: the keys that they may have, the shapes of which each has one, and what else is checked."""

    keys: tuple[str, ...]  # none: any
    shapes: Mapping[str, tuple[str, ...]]
    validate: Callable[[Any], list[str]]  # the problems of one row; [] when it is valid


def validate_record(record: Any) -> list[str]:
    """What is wrong with one record, each problem naming its key; [] when it is valid."""
    found = _shape_problems(record, RECORD_KEYS, SHAPES)
    if found:
        return found
    if "split" in record and record["split"] not in ("train", "validation", "holdout"):
        found.append(f"`split` must be train, validation or holdout, not {abbreviated(record['split'])}")
    if "group" in record and (wrong := text_problem(record["group"])):
        found.append(f"`group` {wrong}")
    if "messages" in record:
        return found + _message_problems(record["messages"]) + _tool_problems(record.get("tools"))
    if "tools" in record:
        found.append("`tools` needs `messages`")
    if is_preference(record):
        return found + _preference_problems(record)
    return found + [f"`{key}` {wrong}" for key in SHAPES[shape_of(record)] if (wrong := text_problem(record[key]))]


def validate_question(record: Any, keys: tuple[str, ...]) -> list[str]:
    """What is wrong with a question without its answer: {"prompt"} or {"messages"}, with an optional `group`.

    Args:
        keys: that the record may have, those of the question among them.
    """
    found = _shape_problems(record, keys, {"prompt": ("prompt",), "messages": ("messages",)})
    if found:
        return found
    if "group" in record and (wrong := text_problem(record["group"])):
        found.append(f"`group` {wrong}")
    if "prompt" in record:
        if "tools" in record:
            found.append("`tools` needs `messages`")
        return found + ([f"`prompt` {wrong}"] if (wrong := text_problem(record["prompt"])) else [])
    messages = record["messages"]
    if isinstance(messages, list) and messages and isinstance(messages[-1], dict):
        if messages[-1].get("role") not in ("user", "tool"):
            return [*found, "`messages` must end with a question: a message with the role user, or tool"]
        messages = [*messages, {"role": "assistant", "content": "an answer"}]
    return found + _message_problems(messages) + _tool_problems(record.get("tools"))


def validate_judgement(row: Any) -> list[str]:
    """What is wrong with one sentence and its judgement; [] when it is valid."""
    found = _shape_problems(row, JUDGEMENT_KEYS, JUDGEMENT_SHAPES)
    if found:
        return found
    sentence, label = JUDGEMENT_SHAPES["text" if "text" in row else "sentence"]
    if wrong := text_problem(row[sentence]):
        found.append(f"`{sentence}` {wrong}")
    if judgement_of(row) is None:
        found.append(f"`{label}` must be true or false (1 or 0), not {abbreviated(row[label])}")
    return found


def shape_of(record: Mapping[str, Any]) -> str:
    """The record's shape: prompt, messages, text or preference."""
    return "preference" if is_preference(record) else next(shape for shape in SHAPES if shape in record)


def is_preference(record: Mapping[str, Any]) -> bool:
    """Whether a record prefers one answer to another."""
    return "chosen" in record


def content_of(record: Mapping[str, Any]) -> Values:
    """The record without `split` and `group`: the keys of its shape, in their order, without those that are null."""
    if "messages" in record:
        messages = [{key: message[key] for key in MESSAGE_KEYS[message["role"]] if message.get(key) is not None}
                    for message in record["messages"]]
        return {"messages": messages} | ({"tools": record["tools"]} if "tools" in record else {})
    return {key: record[key] for key in SHAPES[shape_of(record)]}


def question_of(record: Mapping[str, Any]) -> str:
    """The question of a record, as a text that is equal for questions that read the same.

    This is {"prompt"} or the messages before the answer, without system messages; or the whole of a {"text"}, which
    has no question. Each text as `comparable` makes it.
    """
    messages = record["messages"][:-1] if "messages" in record else record.get("prompt", record.get("text"))
    if isinstance(messages, str):
        return comparable(messages)
    before = [[m["role"], comparable(text_of(m))] for m in messages if m["role"] != "system"]
    lone = len(before) == 1 and before[0][0] == "user"
    return str(before[0][1]) if lone else canonical(before).decode()


def comparable(text: str) -> str:
    """A text without what a reader does not see: compatibility forms and case folded (NFKC), invisible characters
    removed, white space collapsed to one blank and stripped at the ends."""
    visible = INVISIBLE.sub("", text)
    # Folding can leave a text that is not normalised, and normalising one that is not folded.
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", visible).casefold()).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def text_of(message: Mapping[str, Any]) -> str:
    """What a message says: its content, and each of its tool calls as a line of JSON."""
    calls = [json.dumps({"name": call["function"]["name"], "arguments": arguments_of(call)}, ensure_ascii=False)
             for call in message.get("tool_calls") or ()]
    return "\n".join([message["content"], *calls] if message.get("content") else calls)


def conversation_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """Messages as people read them, with roles where they are several."""
    if len(messages) == 1:
        return text_of(messages[0])
    return "\n".join(f"{message['role']}: {text_of(message)}" for message in messages)


def arguments_of(call: Mapping[str, Any]) -> Values:
    """The arguments of a tool call, which may be JSON in a text."""
    arguments = call["function"].get("arguments") or {}
    parsed: Values = json.loads(arguments) if isinstance(arguments, str) else arguments
    return parsed


def lengths_of(record: Mapping[str, Any]) -> tuple[int | None, int]:
    """The characters of prompt (None for a {"text"}, which has none) and of the completion or chosen answer."""
    if is_preference(record):
        return sum(len(text_of(message)) for message in prompt_of(record)), len(record["chosen"])
    if "messages" in record:
        *before, answer = (len(text_of(m)) for m in record["messages"])
        return sum(before), answer
    return (None, len(record["text"])) if "text" in record else (len(record["prompt"]), len(record["completion"]))


def _shape_problems(record: Any, keys: tuple[str, ...], shapes: Mapping[str, tuple[str, ...]]) -> list[str]:
    if not isinstance(record, dict):
        example = ", ".join(next(iter(shapes.values())))
        return [f"must be a JSON object such as {{{example}}}, not {abbreviated(record)}"]
    unknown = [unknown_key(key, keys) for key in record if key not in keys]
    present = {shape: {key for key in needed if key in record} for shape, needed in shapes.items()}
    # {"prompt", "chosen"} has begun two shapes, but more of one of them; a lone "prompt" is the first.
    begun = [shape for at, (shape, own) in enumerate(present.items()) if own and not any(
        own < other or (own == other and before < at) for before, other in enumerate(present.values()))]
    if unknown:
        return unknown
    if len(begun) != 1:
        allowed = ", ".join(" and ".join(f"`{key}`" for key in needed) for needed in shapes.values())
        return [f"mixes {' and '.join(f'`{shape}`' for shape in begun)}; a record has one of: {allowed}" if begun else
                f"has none of: {allowed}"]
    return [f"`{key}` is missing" for key in shapes[begun[0]] if key not in record]


def unknown_key(key: str, keys: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(str(key), keys, n=1)
    hint = f"did you mean `{close[0]}`?" if close else f"allowed: {', '.join(keys)}"
    return f"unknown key {abbreviated(key)}; {hint}"


def _message_problems(messages: Any) -> list[str]:
    if not isinstance(messages, list):
        return [f"`messages` must be a list, not {abbreviated(messages)}"]
    found = []
    for number, message in enumerate(messages):
        key = f"messages[{number}]"
        if not isinstance(message, dict):
            found.append(f"`{key}` must be an object with `role` and `content`, not {abbreviated(message)}")
            continue
        role, calls = message.get("role"), message.get("tool_calls")
        keys = MESSAGE_KEYS[role] if role in ROLES else ("role", "content")
        found += [f"`{key}`: {unknown_key(k, keys)}" for k in message if k not in keys and message[k] is not None]
        if role not in ROLES:
            found.append(f"`{key}.role` must be one of {', '.join(ROLES)}, not {abbreviated(role)}")
        if role == "assistant" and calls is not None:
            found += _call_problems(f"{key}.tool_calls", calls)
        for name in ("tool_call_id", "name"):
            if role == "tool" and message.get(name) is not None and (wrong := text_problem(message[name])):
                found.append(f"`{key}.{name}` {wrong}")
        # A call needs no content, and a tool may answer nothing.
        empty = {"assistant": ("", None) if calls is not None else (), "tool": ("",)}.get(str(role), ())
        may_be_empty = message.get("content") in empty
        if not may_be_empty and (wrong := text_problem(message.get("content"))):
            found.append(f"`{key}.content` {wrong}")
    if found:
        return found
    if len(messages) < 2:
        return ["`messages` must hold at least a question and its answer"]
    if messages[-1]["role"] != "assistant":
        return ["`messages` must end with the assistant's answer"]
    return _result_problems(messages)


def prompt_of(record: Mapping[str, Any]) -> list[Values]:
    """The prompt of a {"prompt", …} record as messages."""
    prompt = record["prompt"]
    return list(prompt) if isinstance(prompt, list) else [{"role": "user", "content": prompt}]


def _preference_problems(record: Mapping[str, Any]) -> list[str]:
    found = [f"`{key}` {wrong}" for key in ("chosen", "rejected") if (wrong := text_problem(record[key]))]
    if isinstance(record["prompt"], list):
        whole = [*record["prompt"], {"role": "assistant", "content": "an answer"}]
        found += [problem.replace("`messages", "`prompt") for problem in _message_problems(whole)]
    elif wrong := text_problem(record["prompt"]):
        found.append(f"`prompt` {wrong}")
    if not found and record["chosen"].strip() == record["rejected"].strip():
        found.append("`chosen` and `rejected` are equal: there is nothing to prefer")
    return found


def _call_problems(key: str, calls: Any) -> list[str]:
    """What is wrong with the tool calls of a message."""
    if not isinstance(calls, list) or not calls:
        return [f"`{key}` is empty" if calls == [] else f"`{key}` must be a list of calls, not {abbreviated(calls)}"]
    found = []
    for number, call in enumerate(calls):
        at = f"{key}[{number}]"
        found += _function_problems(at, call, ("id", "type", "function"), ("name", "arguments"))
        if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
            continue
        if call.get("id") is not None and (wrong := text_problem(call["id"])):
            found.append(f"`{at}.id` {wrong}")
        try:
            parsed = arguments_of(call)
        except (ValueError, RecursionError):
            parsed = None
        if not isinstance(parsed, dict):
            found.append(f"`{at}.function.arguments` must be an object, or one as JSON in a text, not "
                         f"{abbreviated(call['function']['arguments'])}")
        elif wrong := _json_problem(call["function"]["arguments"] if parsed else {}):
            found.append(f"`{at}.function.arguments` {wrong}")
    return found


def _tool_problems(tools: Any) -> list[str]:
    """What is wrong with the definitions of tools; they may be missing."""
    if tools is None:
        return []
    if not isinstance(tools, list) or not tools:
        return ["`tools` is empty" if tools == [] else f"`tools` must be a list of tools, not {abbreviated(tools)}"]
    found = []
    for number, tool in enumerate(tools):
        at = f"tools[{number}]"
        found += _function_problems(at, tool, ("type", "function"), ("name", "description", "parameters", "strict"))
        function = tool.get("function") if isinstance(tool, dict) else None
        for key, kind, needed in (("description", str, "text"), ("parameters", dict, "an object (a JSON schema)"),
                                  ("strict", bool, "true or false")):
            value = function.get(key) if isinstance(function, dict) else None
            if value is not None and not isinstance(value, kind):
                found.append(f"`{at}.function.{key}` must be {needed}, not {abbreviated(value)}")
            elif wrong := _json_problem(value):
                found.append(f"`{at}.function.{key}` {wrong}")
    return found


def _function_problems(at: str, value: Any, keys: tuple[str, ...], function_keys: tuple[str, ...]) -> list[str]:
    """What is wrong with the frame of a tool or a call: {"type": "function", "function": {"name": …}}."""
    if not isinstance(value, dict):
        return [f"`{at}` must be an object with `type` and `function`, not {abbreviated(value)}"]
    found = [f"`{at}`: {unknown_key(key, keys)}" for key in value if key not in keys]
    if value.get("type", "function") != "function":
        found.append(f"`{at}.type` must be function, not {abbreviated(value['type'])}")
    function = value.get("function")
    if not isinstance(function, dict):
        return [*found, f"`{at}.function` must be an object with `name`, not {abbreviated(function)}"]
    found += [f"`{at}.function`: {unknown_key(key, function_keys)}" for key in function if key not in function_keys]
    if wrong := text_problem(function.get("name")):
        found.append(f"`{at}.function.name` {wrong}")
    return found


def _result_problems(messages: list[Values]) -> list[str]:
    """Results of tools that no call asked for."""
    found: list[str] = []
    called: set[str | None] | None = None  # the ids of the calls before; None: there are none
    for number, message in enumerate(messages):
        if message["role"] != "tool":
            calls = message.get("tool_calls")
            called = {call.get("id") for call in calls} if calls else None
            continue
        answered = message.get("tool_call_id")
        if called is None:
            found.append(f"`messages[{number}]`: a `tool` message must follow the assistant's `tool_calls`")
        elif answered is not None and answered not in called:
            found.append(f"`messages[{number}].tool_call_id` must be the `id` of a call before it, not "
                         f"{abbreviated(answered)}")
    return found


def text_problem(value: Any) -> str | None:
    if not isinstance(value, str):
        return f"must be text, not {abbreviated(value)}"
    if not value.strip():
        return "is empty"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return f"holds half a character ({value[error.start]!r}, a lone surrogate) at position {error.start}"
    return None


def _json_problem(value: Any) -> str | None:
    """Why a value cannot be written as JSON; Parquet has values that JSON does not have."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        return "holds half a character (a lone surrogate)"
    except (TypeError, ValueError, RecursionError) as error:
        return f"is not JSON: {error}"
    return None


def sentence_of(row: Mapping[str, Any]) -> str:
    return str(row["text"] if "text" in row else row["sentence"])


def judgement_of(row: Mapping[str, Any]) -> bool:
    """The judgement; None, which `validate_judgement` rejects, when it is not one (GLUE hides its test labels: -1)."""
    value = row["acceptable"] if "text" in row else row["label"]
    if isinstance(value, str):  # CSV knows only text
        value = value.strip().lower()
    known_values: dict[Any, bool] = {1: True, 0: False, "1": True, "0": False, "true": True, "false": False}
    return known_values.get(value) if isinstance(value, str | int) else None  # type: ignore[return-value]


def abbreviated(value: Any) -> str:
    """A value as a message shows it: short, since data is private and long."""
    names = {dict: "an object", list: "a list", type(None): "nothing"}
    text = names.get(type(value)) or repr(value)
    return text if len(text) <= 40 else text[:37] + "…"


RECORDS = Schema(RECORD_KEYS, SHAPES, validate_record)
JUDGEMENTS = Schema(JUDGEMENT_KEYS, JUDGEMENT_SHAPES, validate_judgement)
