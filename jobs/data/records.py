"""Records: validation of a record or of a sentence with its judgement, and the question of a record.

A record is {"prompt", "completion"}, {"messages": [{"role", "content"}, …]} or {"text"}. It may name its `split`
(train, validation or holdout) and a `group`: records of one group, e.g. of one customer or document, are never divided
between the splits.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import regex

from jobs.core.artifacts import canonical

SHAPES = {"prompt": ("prompt", "completion"), "messages": ("messages",), "text": ("text",)}
OPTIONAL = ("split", "group")
RECORD_KEYS = ("prompt", "completion", "messages", "text", *OPTIONAL)
ROLES = ("system", "user", "assistant")
# Our own names, and those of GLUE CoLA, whose running number (idx) means nothing.
JUDGEMENT_SHAPES = {"text": ("text", "acceptable"), "sentence": ("sentence", "label")}
JUDGEMENT_KEYS = ("text", "acceptable", "sentence", "label", "idx")
# Format characters, and all others that are drawn as nothing, such as zero-width joiners and variation selectors.
INVISIBLE = regex.compile(r"[\p{Format}\p{Default_Ignorable_Code_Point}]+")

Values = dict[str, Any]


@dataclass(frozen=True)
class Schema:
    """What rows must be: the keys that they may have, the shapes of which each has one, and what else is checked."""

    keys: tuple[str, ...]
    shapes: Mapping[str, tuple[str, ...]]
    validate: Callable[[Any], list[str]]  # the problems of one row; [] when it is valid


def validate_record(record: Any) -> list[str]:
    """What is wrong with one record, each problem naming its key; [] when it is valid."""
    found = _shape_problems(record, RECORD_KEYS, SHAPES)
    if found:
        return found
    if "split" in record and record["split"] not in ("train", "validation", "holdout"):
        found.append(f"`split` must be train, validation or holdout, not {_abbreviated(record['split'])}")
    if "group" in record and (wrong := _text_problem(record["group"])):
        found.append(f"`group` {wrong}")
    if "messages" in record:
        return found + _message_problems(record["messages"])
    return found + [f"`{key}` {wrong}" for key in SHAPES[shape_of(record)] if (wrong := _text_problem(record[key]))]


def validate_judgement(row: Any) -> list[str]:
    """What is wrong with one sentence and its judgement; [] when it is valid."""
    found = _shape_problems(row, JUDGEMENT_KEYS, JUDGEMENT_SHAPES)
    if found:
        return found
    sentence, label = JUDGEMENT_SHAPES["text" if "text" in row else "sentence"]
    if wrong := _text_problem(row[sentence]):
        found.append(f"`{sentence}` {wrong}")
    if judgement_of(row) is None:
        found.append(f"`{label}` must be true or false (1 or 0), not {_abbreviated(row[label])}")
    return found


def shape_of(record: Mapping[str, Any]) -> str:
    """The record's shape: prompt, messages or text."""
    return next(shape for shape in SHAPES if shape in record)


def content_of(record: Mapping[str, Any]) -> Values:
    """The record without `split` and `group`: the keys of its shape, in their order."""
    if "messages" in record:
        return {"messages": [{"role": m["role"], "content": m["content"]} for m in record["messages"]]}
    return {key: record[key] for key in SHAPES[shape_of(record)]}


def question_of(record: Mapping[str, Any]) -> str:
    """The question of a record, as a text that is equal for questions that read the same.

    This is {"prompt"} or the messages before the answer, without system messages; or the whole of a {"text"}, which
    has no question. Each text as `comparable` makes it.
    """
    if "messages" not in record:
        return comparable(str(record.get("prompt", record.get("text"))))
    before = [[m["role"], comparable(m["content"])] for m in record["messages"][:-1] if m["role"] != "system"]
    lone = len(before) == 1 and before[0][0] == "user"
    return str(before[0][1]) if lone else canonical(before).decode()


def comparable(text: str) -> str:
    """A text without what a reader does not see: compatibility forms and case folded (NFKC), invisible characters
    removed, white space collapsed to one blank and stripped at the ends."""
    visible = INVISIBLE.sub("", text)
    # Folding can leave a text that is not normalised, and normalising one that is not folded.
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", visible).casefold()).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def lengths_of(record: Mapping[str, Any]) -> tuple[int | None, int]:
    """The characters of prompt (None for a {"text"}, which has none) and of completion."""
    if "messages" in record:
        *before, answer = (len(m["content"]) for m in record["messages"])
        return sum(before), answer
    return (None, len(record["text"])) if "text" in record else (len(record["prompt"]), len(record["completion"]))


def _shape_problems(record: Any, keys: tuple[str, ...], shapes: Mapping[str, tuple[str, ...]]) -> list[str]:
    if not isinstance(record, dict):
        example = ", ".join(next(iter(shapes.values())))
        return [f"must be a JSON object such as {{{example}}}, not {_abbreviated(record)}"]
    unknown = [unknown_key(key, keys) for key in record if key not in keys]
    begun = [shape for shape, needed in shapes.items() if any(key in record for key in needed)]
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
    return f"unknown key {_abbreviated(key)}; {hint}"


def _message_problems(messages: Any) -> list[str]:
    if not isinstance(messages, list):
        return [f"`messages` must be a list, not {_abbreviated(messages)}"]
    found = []
    for number, message in enumerate(messages):
        key = f"messages[{number}]"
        if not isinstance(message, dict):
            found.append(f"`{key}` must be an object with `role` and `content`, not {_abbreviated(message)}")
            continue
        found += [f"`{key}`: {unknown_key(k, ('role', 'content'))}" for k in message if k not in ("role", "content")]
        if message.get("role") not in ROLES:
            found.append(f"`{key}.role` must be one of {', '.join(ROLES)}, not {_abbreviated(message.get('role'))}")
        if wrong := _text_problem(message.get("content")):
            found.append(f"`{key}.content` {wrong}")
    if found:
        return found
    if len(messages) < 2:
        return ["`messages` must hold at least a question and its answer"]
    return [] if messages[-1]["role"] == "assistant" else ["`messages` must end with the assistant's answer"]


def _text_problem(value: Any) -> str | None:
    if not isinstance(value, str):
        return f"must be text, not {_abbreviated(value)}"
    if not value.strip():
        return "is empty"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return f"holds half a character ({value[error.start]!r}, a lone surrogate) at position {error.start}"
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


def _abbreviated(value: Any) -> str:
    """A value as a message shows it: short, since data is private and long."""
    names = {dict: "an object", list: "a list", type(None): "nothing"}
    text = names.get(type(value)) or repr(value)
    return text if len(text) <= 40 else text[:37] + "…"


RECORDS = Schema(RECORD_KEYS, SHAPES, validate_record)
JUDGEMENTS = Schema(JUDGEMENT_KEYS, JUDGEMENT_SHAPES, validate_judgement)
