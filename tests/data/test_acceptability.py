"""Promises about sentences with judgements: both spellings are read, and what cannot be measured is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.core.errors import UserError
from jobs.data import acceptability
from jobs.data.formats import files_in
from tests.data.test_split import jsonl, parquet


def converted(path: Path) -> list[Any]:
    out = path.parent / "converted"
    out.mkdir(exist_ok=True)
    acceptability.convert(files_in(path), out)
    return [json.loads(line) for line in (out / "acceptability.jsonl").read_text().splitlines()]


def test_sentences_of_glue_cola_and_our_own_read_the_same(tmp_path: Path) -> None:
    ours: list[dict[str, Any]] = [{"text": f"Sentence {n}.", "acceptable": n % 2 == 0} for n in range(6)]
    cola: dict[str, list[Any]] = {"sentence": [s["text"] for s in ours], "idx": list(range(6)),
                                  "label": [int(s["acceptable"]) for s in ours]}
    (tmp_path / "data.csv").write_text("text,acceptable\n" + "".join(f"{s['text']},{s['acceptable']}\n" for s in ours))
    for path in (jsonl(tmp_path, ours), parquet(tmp_path, cola), tmp_path / "data.csv"):
        assert converted(path) == ours


@pytest.mark.parametrize(("rows", "message"), [
    ([{"sentence": "A.", "label": -1}], "data.jsonl:1: `label` must be true or false (1 or 0), not -1"),
    ([{"text": "A.", "acceptable": "maybe"}], "`acceptable` must be true or false (1 or 0), not 'maybe'"),
    ([{"text": "", "acceptable": True}], "`text` is empty"),
    ([{"text": "A."}], "`acceptable` is missing"),
    ([{"text": f"{n}.", "acceptable": True} for n in range(9)], "9 acceptable and 0 unacceptable sentences"),
    ([], "0 acceptable and 0 unacceptable"),
])
def test_judgements_that_cannot_be_used_are_refused(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        converted(jsonl(tmp_path, rows))
    assert message in str(error.value)
