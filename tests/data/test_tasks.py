"""Records of tasks: what is wrong with each is named, patterns compile, and nothing asks what is trained on."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from jobs.core.errors import UserError
from jobs.core.tasks import Task
from jobs.data import tasks
from jobs.data.formats import File


def task(check: str, **options: Any) -> Task:
    return Task(name="city", source="file:city.jsonl", check=check, **options)  # type: ignore[arg-type]


def convert(folder: Path, of: Task, *records: Any, suffix: str = "jsonl") -> list[dict[str, Any]]:
    """The records as they are written."""
    file = folder / f"city.{suffix}"
    file.write_text("".join(record if isinstance(record, str) else json.dumps(record) + "\n" for record in records))
    tasks.convert(of, [File(file, file.name)], folder / "written.jsonl")
    return [json.loads(line) for line in (folder / "written.jsonl").read_text().splitlines()]


USER = {"role": "user", "content": "A?"}


@pytest.mark.parametrize(("check", "record", "message"), [
    ("exact", 3, "must be a JSON object such as {prompt}, not 3"),
    ("exact", {"prompt": "A?"}, "`expected` is missing: the check exact needs it"),
    ("exact", {"prompt": "A?", "completion": "x"}, "unknown key 'completion'; allowed: prompt, messages, tools, exp"),
    ("exact", {"prompt": "A?", "expcted": "x"}, "unknown key 'expcted'; did you mean `expected`?"),
    ("exact", {"expected": "x"}, "has none of: `prompt`, `messages`"),
    ("exact", {"prompt": " ", "expected": "x"}, "`prompt` is empty"),
    ("exact", {"prompt": "A?", "expected": []}, "`expected` is empty"),
    ("exact", {"prompt": "A?", "expected": ["x", 7]}, "`expected` must be text, not 7"),
    ("exact", {"prompt": "A?", "expected": 7}, "`expected` must be text, not 7"),
    ("exact", {"prompt": "A?", "expected": "x", "group": 1}, "`group` must be text, not 1"),
    ("exact", {"prompt": "A?", "expected": "x", "tools": []}, "`tools` needs `messages`"),
    ("exact", {"messages": [], "expected": "x"}, "`messages` must hold at least a question"),
    ("exact", {"messages": [USER, {"role": "assistant", "content": "B"}], "expected": "x"},
     "`messages` must end with a question"),
    ("exact", {"messages": [USER, {"role": "uzer", "content": "B"}], "expected": "x"}, "must end with a question"),
    ("exact", {"messages": [{"role": "user"}], "expected": "x"}, "`messages[0].content` must be text, not nothing"),
    ("regex", {"prompt": "A?", "pattern": "(?=x)"}, "`pattern` is not a regular expression of RE2: invalid perl op"),
    ("json_schema", {"prompt": "A?", "schema": "{"}, "`schema` must be an object (a JSON schema): "),
    ("json_schema", {"prompt": "A?", "schema": "[1]"}, "`schema` must be an object (a JSON schema): not a list"),
    ("json_schema", {"prompt": "A?", "schema": {"type": "objekt"}}, "`schema` is not a JSON schema: "),
    ("json_schema", {"prompt": "A?", "schema": {"$ref": "file:///etc/passwd"}}, "is not a JSON schema: "),
    ("json_schema", {"prompt": "A?", "schema": {"pattern": r"(a)\1"}}, "is not a JSON schema: "),
    ("label_f1", {"prompt": "A?", "label": "maybe"}, "`label` must be one of the task's labels, not 'maybe'"),
])
def test_what_is_wrong_is_named_with_file_line_and_key(tmp_path: Path, check: str, record: Any, message: str) -> None:
    options = {"labels": ["yes", "no"]} if check == "label_f1" else {}
    with pytest.raises(UserError) as raised:
        convert(tmp_path, task(check, **options), "\n", record)
    first = str(raised.value).splitlines()[0]
    assert first.startswith("tasks.city: city.jsonl:2: ")
    assert message in first


def test_what_an_option_has_for_all_no_record_may_have(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown key 'pattern'"):
        convert(tmp_path, task("regex", pattern="x"), {"prompt": "A?", "pattern": "y"})
    assert convert(tmp_path, task("regex", pattern="x"), {"prompt": "A?"}) == [{"prompt": "A?"}]


def test_a_table_needs_the_columns_of_the_check(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"city.csv: needs the columns prompt and label, or messages and label; it has "
                                        "prompt"):
        convert(tmp_path, task("label_f1"), "prompt\nA?\n", suffix="csv")
    assert convert(tmp_path, task("label_f1"), "prompt,label,group\nA?,yes,\nB?,no,g\n", suffix="csv") == [
        {"prompt": "A?", "label": "yes"}, {"prompt": "B?", "label": "no", "group": "g"}]


@pytest.mark.parametrize(("options", "labels", "message"), [
    ({}, ["yes"], "every record has the label 'yes', so there is nothing to tell apart"),
    ({"labels": ["yes", "no", "both"]}, ["yes", "no"], "no record has the label 'both' of the task's labels")])
def test_labels_that_cannot_be_measured_are_refused(tmp_path: Path, options: dict[str, Any], labels: list[str],
                                                    message: str) -> None:
    with pytest.raises(UserError, match=message):
        convert(tmp_path, task("label_f1", **options), *({"prompt": label, "label": label} for label in labels))


def test_records_of_a_group_or_with_the_same_question_are_one_piece_of_evidence() -> None:
    messages = {"messages": [{"role": "system", "content": "Be brief."}, USER]}
    records: list[dict[str, Any]] = [{"prompt": "A?"}, {"prompt": "B?"}, {"prompt": " a? "}, messages,
                                     {"prompt": "C?", "group": "g"}, {"prompt": "D?", "group": "g"}]
    assert tasks.clusters_of(records) == [0, 1, 0, 0, 2, 2]


def test_a_question_that_chooses_settings_is_refused_and_a_held_out_one_is_not(tmp_path: Path) -> None:
    for split in ("train", "validation", "holdout"):
        row = {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": f"{split}?"},
                            {"role": "assistant", "content": "x"}]}
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    placed = [tasks.Placed(f"tasks.city: city.jsonl:{n}", {"prompt": f"{split}?"})
              for n, split in enumerate(("holdout", "validation", "train"), 1)]
    with pytest.raises(UserError) as raised:
        tasks.require_unseen(placed, tmp_path)
    assert [line.partition(", so")[0] for line in str(raised.value).splitlines()] == [
        "tasks.city: city.jsonl:3: the same prompt is in the split train of the dataset",
        "tasks.city: city.jsonl:2: the same prompt is in the split validation of the dataset",
        "2 problems in the data; nothing was published"]
    tasks.require_unseen(placed[:1], tmp_path)


def test_no_pattern_takes_more_than_time_in_proportion_to_the_answer() -> None:
    """Python's `re` would need 2^5000 steps for each."""
    answer, started = "a" * 5000 + "b", time.monotonic()
    assert not tasks.compiled_pattern("^(a+)+$")(answer)
    assert not tasks.compiled_schema('{"pattern": "^(a+)+$"}')(answer)
    keys = tasks.compiled_schema('{"patternProperties": {"^(a+)+$": {}}, "additionalProperties": false}')
    assert not keys({answer: 1})
    assert time.monotonic() - started < 5


def test_a_schema_that_contains_itself_ends() -> None:
    assert tasks.compiled_schema('{"$ref": "#"}')({})
    tree = tasks.compiled_schema('{"type": "object", "properties": {"child": {"$ref": "#"}}}')
    assert tree({"child": {"child": {}}})
    assert not tree({"child": {"child": 1}})
