"""Promises of edits of YAML texts: one value changes, and comments and layout stay."""

from __future__ import annotations

import pytest

from jobs.tools import yaml_text


@pytest.mark.parametrize(("before", "after"), [
    ("a:\n  files: [x, y]  # c\nb: 1\n", "a:\n  files: [z]  # c\nb: 1\n"),
    ("a:\n  files:\n  - x  # c\n  - y\nb: 1\n", "a:\n  files: [z]\nb: 1\n"),
    ("a:\n  files:\n  - x\n  # d\n  - y\n\n# e\nb: 1\n", "a:\n  files: [z]\n\n# e\nb: 1\n"),
    ("a: {files: x}\n", "a: {files: [z]}\n"),
])
def test_a_value_is_replaced(before: str, after: str) -> None:
    assert yaml_text.replace(before, ["a", "files"], "[z]") == after


@pytest.mark.parametrize(("before", "after"), [
    ("a:\n- x  # c\n# d\nb: 1\n", "a:\n- x  # c\n- z\n# d\nb: 1\n"),
    ("a:\n    - x\n    - {b: 1}", "a:\n    - x\n    - {b: 1}\n    - z"),
    ("a:\n- b: |\n    x\n    y\n", "a:\n- b: |\n    x\n    y\n- z\n"),
    ("a: [\n  x,\n  y\n]\n", "a: [\n  x,\n  y, z\n]\n"),
    ("a: []  # c\n", "a: [z]  # c\n"),
])
def test_an_item_is_appended(before: str, after: str) -> None:
    assert yaml_text.append(before, ["a"], "z") == after


def test_an_item_may_follow_another_than_the_last() -> None:
    assert yaml_text.append("a:\n- x\n- y\n", ["a"], "z", after=0) == "a:\n- x\n- z\n- y\n"


@pytest.mark.parametrize("text", ["", "a: 1\n", "b: [x]\n", "- a\n", "a:\n"])
def test_what_is_no_list_is_an_error(text: str) -> None:
    with pytest.raises(LookupError):
        yaml_text.append(text, ["a"], "z")
