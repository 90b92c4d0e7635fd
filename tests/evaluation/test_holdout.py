"""Held-out records are read from their file one by one, and which of them are answered depends on themselves only."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from jobs.evaluation.holdout import Chosen, JsonLines, answered_lines

RECORDS = [{"prompt": f"Who is nº {number}?", "completion": "The cook."} for number in range(50)]


def test_records_are_read_by_line_as_they_are_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "holdout.jsonl"
    file.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS), encoding="utf-8")
    holdout = JsonLines(file)
    assert list(holdout) == RECORDS and len(holdout) == 50
    assert [holdout[7], holdout[-1], holdout[0]] == [RECORDS[7], RECORDS[-1], RECORDS[0]]
    assert holdout[48:60] == RECORDS[48:]
    for outside in (50, -51):
        with pytest.raises(IndexError):
            holdout[outside]
    chosen = Chosen(holdout, [8, 1])
    assert list(chosen) == [RECORDS[7], RECORDS[0]] and list(chosen[1:]) == [RECORDS[0]]
    file.write_text("")
    assert list(JsonLines(file)) == [] and len(JsonLines(file)) == 0


def test_which_questions_are_answered_depends_neither_on_order_nor_on_the_keys_order() -> None:
    chosen = [RECORDS[line - 1] for line in answered_lines(RECORDS, 10)]
    assert len(chosen) == 10
    mixed = [dict(reversed(record.items())) for record in RECORDS]
    random.Random(1).shuffle(mixed)
    lines = answered_lines(mixed, 10)
    assert lines == sorted(lines)
    assert sorted(mixed[line - 1]["prompt"] for line in lines) == sorted(record["prompt"] for record in chosen)
    assert chosen != RECORDS[:10], "not those that come first"


def test_one_more_record_replaces_at_most_one_that_is_answered() -> None:
    before = set(answered_lines(RECORDS, 10))
    assert len(before - set(answered_lines([*RECORDS, {"prompt": "New?", "completion": "Yes."}], 10))) <= 1


def test_all_questions_are_answered_where_they_are_no_more_than_allowed_and_texts_never() -> None:
    assert answered_lines([{"text": "a"}, *RECORDS], 50) == list(range(2, 52))
    assert answered_lines([{"text": "a"}] * 60, 50) == []
