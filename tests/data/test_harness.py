"""Task files of lm-evaluation-harness: taken strictly, rendered safely, and nothing in them runs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from jobs.core.errors import UserError
from jobs.data import harness

CHOICE = """\
task: quiz
dataset_path: json
dataset_kwargs: {data_files: {test: quiz.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}?"
doc_to_choice: choices
doc_to_target: answer
metric_list:
- metric: acc_norm
  aggregation: mean
  higher_is_better: true
- metric: acc
"""
GENERATE = """\
output_type: generate_until
doc_to_text: question
doc_to_target: "{{answer}}"
metric_list: [{metric: exact_match}]
"""


def read(folder: Path, text: str, metric: str | None = None) -> harness.TaskFile:
    (folder / "quiz.yaml").write_text(text)
    return harness.read(folder / "quiz.yaml", "tasks.quiz: quiz.yaml", metric)


def test_the_first_metric_is_the_score_unless_another_is_named(tmp_path: Path) -> None:
    assert read(tmp_path, CHOICE).settings(None)["metric"]["metric"] == "acc_norm"
    assert read(tmp_path, CHOICE).settings("acc")["metric"]["metric"] == "acc"
    with pytest.raises(UserError, match=r"^tasks.quiz: quiz.yaml: metric_list has no exact_match$"):
        read(tmp_path, CHOICE, "exact_match")


@pytest.mark.parametrize(("text", "message"), [
    (CHOICE + "process_docs: !function utils.process\n", "quiz.yaml:14: not valid YAML: .*!function.*run code that"),
    (CHOICE + "include: other.yaml\n", "quiz.yaml:14: include: unknown key; allowed: output_type, doc_to_text"),
    (CHOICE + "filter_list: []\n", "quiz.yaml:14: filter_list: unknown key"),
    (CHOICE + "num_fewshot: 5\n", "quiz.yaml:14: num_fewshot: 5: input should be 0"),
    (CHOICE.replace("{{question}}", "{{question"), "quiz.yaml:6: doc_to_text: .*is no template"),
    (CHOICE.replace("acc_norm", "f1"), "quiz.yaml:10: metric_list.0.metric: 'f1': input should be 'acc'"),
    (CHOICE.replace("acc_norm", "exact_match"), "exact_match is no metric of multiple_choice; allowed: acc,"),
    (CHOICE.replace("doc_to_choice: choices\n", ""), "doc_to_choice is for output_type multiple_choice, which needs"),
    (CHOICE.replace("multiple_choice", "loglikelihood"), "output_type: 'loglikelihood': input should be 'mult"),
    (GENERATE + "generation_kwargs: {do_sample: true}\n", "generation_kwargs.do_sample: True: input should be False"),
    ("- a\n", "quiz.yaml: must hold a mapping"),
])
def test_what_is_not_taken_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        read(tmp_path, text)
    assert str(raised.value).startswith("tasks.quiz: quiz.yaml")


@pytest.mark.parametrize(("changes", "row", "expected"), [
    ({}, {"question": "Q", "choices": ["a", "b"], "answer": 1},
     {"prompt": "Q?", "choices": ["a", "b"], "target": 1}),
    ({}, {"question": "Q", "choices": ["a", "b"], "answer": "b"},
     {"prompt": "Q?", "choices": ["a", "b"], "target": 1}),
    ({"doc_to_choice: choices": 'doc_to_choice: "{{[x, y]}}"', "answer": '"{{1}}"'},
     {"question": "Q", "x": "c", "y": "d"}, {"prompt": "Q?", "choices": ["c", "d"], "target": 1}),
    ({"doc_to_choice: choices": "doc_to_choice: [yes please, no thanks]", "answer": "0"}, {"question": "Q"},
     {"prompt": "Q?", "choices": ["yes please", "no thanks"], "target": 0}),
])
def test_a_row_becomes_what_the_harness_makes_of_it(tmp_path: Path, changes: dict[str, str], row: dict[str, Any],
                                                    expected: dict[str, Any]) -> None:
    text = CHOICE
    for old, new in changes.items():
        text = text.replace(old, new)
    assert harness.rendered(read(tmp_path, text), row) == expected


@pytest.mark.parametrize(("text", "row", "message"), [
    (CHOICE, {"choices": ["a", "b"], "answer": 1}, "doc_to_text: 'question' is undefined"),
    (CHOICE, {"question": "Q", "choices": ["a", "b"], "answer": 2}, "doc_to_target must be one of the 2 choices"),
    (CHOICE, {"question": "Q", "choices": ["a", "b"], "answer": "c"}, "doc_to_target must be one of the 2 choices"),
    (CHOICE, {"question": "Q", "choices": ["a", "b"], "answer": True}, "doc_to_target must be one of the 2 choices"),
    (CHOICE, {"question": "Q", "choices": "a", "answer": 1}, "doc_to_choice must be a list of at least two texts"),
    (CHOICE, {"question": "Q", "choices": ["a", 2], "answer": 1}, "doc_to_choice must be a list of at least two texts"),
    (GENERATE, {"question": " ", "answer": "x"}, "doc_to_text is empty"),
    (GENERATE, {"question": "Q", "answer": ""}, "doc_to_target is empty"),
    (GENERATE.replace("{{answer}}", "{{ ''.__class__.__mro__[1].__subclasses__() }}"), {"question": "Q"},
     "doc_to_target: access to attribute '__class__' of 'str' object is unsafe"),
])
def test_a_row_that_cannot_be_asked_says_why(tmp_path: Path, text: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        harness.rendered(read(tmp_path, text), row)


def test_where_it_is_not_installed_the_message_has_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="^tasks.quiz: lm-evaluation-harness is not installed here. Run: pip"):
        harness.require_installed("tasks.quiz")
