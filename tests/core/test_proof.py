"""The proof's file is read strictly: the server sends what it holds to vLLM."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest

from jobs.core import proof
from jobs.core.errors import UserError

VALID: dict[str, Any] = {
    "dtype": "float32", "sensitivity": 12.5,
    "prompts": [{"record": 3, "tokens": [1, 2, 3], "messages": [{"role": "user", "content": "secret"}]},
                {"record": 1, "tokens": [4]}],
    "answers": [{"tokens": [5, 6], "logprobs": [-0.5, 0.0], "margins": [1.0, 0.0]},
                {"tokens": [7], "logprobs": [-2.0], "margins": [0.1]}]}


def test_a_proof_is_read_as_it_was_written() -> None:
    found = proof.validate(VALID)
    assert proof.validate(json.loads(found.to_json())) == found
    assert found.prompts[0].messages and found.prompts[1].messages is None


@pytest.mark.parametrize(("path", "value"), [
    (("dtype",), "int8"), (("sensitivity",), 0), (("sensitivity",), float("inf")), (("sensitivity",), 1e9),
    (("prompts",), []), (("prompts",), VALID["prompts"] * 5), (("answers",), VALID["answers"][:1]),
    (("base_answers",), VALID["answers"][:1]), (("prompts", 0, "tokens"), []), (("prompts", 0, "tokens"), [1.5]),
    (("prompts", 0, "tokens"), [-1]), (("prompts", 0, "tokens"), [2**31]), (("prompts", 0, "tokens"), [True]),
    (("prompts", 0, "tokens"), [1] * 513), (("prompts", 0, "tokens"), "secret"), (("prompts", 0, "messages"), []),
    (("prompts", 0, "messages", 0, "role"), "tool"), (("prompts", 0, "messages", 0, "content"), None),
    (("prompts", 0, "messages", 0, "name"), "x"), (("answers", 0, "tokens"), []), (("answers", 0, "tokens"), [5] * 17),
    (("answers", 0, "logprobs"), [-0.5]), (("answers", 0, "logprobs"), [-0.5, 0.5]),
    (("answers", 0, "logprobs"), [-0.5, float("nan")]), (("answers", 0, "margins"), [1.0, -1.0]),
    (("answers", 0, "margins"), None), (("another",), 1)])
def test_anything_else_is_refused_by_its_place_without_its_value(path: tuple[Any, ...], value: Any) -> None:
    content = copy.deepcopy(VALID)
    at = content
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises(UserError) as caught:
        proof.validate(content)
    assert "secret" not in str(caught.value)
    place = "the file" if path in (("answers",), ("base_answers",)) else ".".join(map(str, path[:2]))
    assert re.match(rf"{place}[.\w]*: \w", str(caught.value))


@pytest.mark.parametrize(("key", "message"), [
    ("answers", "^the file: .*there is not one answer for each prompt"),
    ("margins", r"^answers\.1: .*tokens, logprobs and margins differ in length")])
def test_what_is_missing_is_named(key: str, message: str) -> None:
    content = copy.deepcopy(VALID)
    (content if key == "answers" else content["answers"][1])[key].pop()
    with pytest.raises(UserError, match=message):
        proof.validate(content)


@pytest.mark.parametrize("base_answers", [None, VALID["answers"]])
def test_the_file_is_json_that_leaves_out_what_is_not_there(base_answers: Any) -> None:
    content = copy.deepcopy(VALID) | ({"base_answers": base_answers} if base_answers else {})
    content["prompts"][0]["messages"][0]["content"] = "¿Dónde?"
    text = proof.validate(content).to_json()
    assert json.loads(text) == content
    assert "¿Dónde?" in text and text.endswith("}\n")


def test_no_file_is_written_that_is_no_json() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        proof.validate(VALID).model_copy(update={"sensitivity": float("nan")}).to_json()


@pytest.mark.parametrize("content", [None, [], "secret", 1])
def test_what_is_no_mapping_is_refused(content: object) -> None:
    with pytest.raises(UserError, match="^the file: "):
        proof.validate(content)
