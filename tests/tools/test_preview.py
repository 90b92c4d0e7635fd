"""Promises of `check --encode`: what training will learn is seen before anything runs, where the data can be read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from jobs.core import pipeline
from jobs.core.errors import UserError
from jobs.core.plan import plan
from jobs.data.encoding import Encoded, encode
from jobs.relocation.sources.file import path_sha256
from jobs.tools import preview
from tests import build_models, build_pipeline

RECORDS = [{"prompt": f"Question {n}?", "completion": f"Answer {n}.", "split": "holdout" if n == 39 else "train"}
           for n in range(40)]


def adapter(folder: Path, **changes: Any) -> Path:
    """An overlay's folder with data and a tokenizer in files."""
    build_models.tiny_tokenizer(folder / "tokenizer")
    (folder / "dataset.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    pins = {"dataset__sha256": path_sha256(folder / "dataset.jsonl"),
            "tokenizer": {"source": "file:tokenizer", "sha256": path_sha256(folder / "tokenizer")}}
    build_pipeline.write(folder, **(pins | changes))
    return folder


def test_records_are_shown_as_tokens_with_what_is_learned_marked(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preview.run(adapter(tmp_path), 2, None)
    shown = capsys.readouterr().out
    tokenizer = build_models.tiny_tokenizer(tmp_path / "again")
    (sequence,) = encode(tokenizer, RECORDS[0])
    assert f"train.jsonl:1: {len(sequence)} tokens in 1 sequence, {sequence.scored} learned\n" in shown
    assert "train.jsonl:2: " in shown
    assert "train.jsonl:3: " not in shown
    text = shown.replace("│", "").replace("⏎\n    ", "\n")
    assert text.count("⟦") == text.count("⟧") == 2
    assert "Question 0?" in text.partition("⟦")[0]
    learned = text.partition("⟦")[2].partition("⟧")[0]
    assert learned == tokenizer.decode(list(sequence.completion))
    lengths = [len(encode(tokenizer, record)[0]) for record in RECORDS[:39]]
    assert f"39 of 39 training records: {sorted(lengths)[19]} tokens at the median, {max(lengths)} at most; " in shown
    assert "0 (0.0 %) are longer than training.max_length (1024) and left out" in shown


def test_what_is_too_long_is_marked_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preview.run(adapter(tmp_path, training__max_length=8), 1, None)
    shown = capsys.readouterr().out
    assert "longer than training.max_length (8): left out" in shown
    assert "39 (100.0 %) are longer than training.max_length (8) and left out" in shown


def test_every_learned_turn_is_marked_and_in_colour_on_a_terminal(tmp_path: Path) -> None:
    tokenizer = build_models.tiny_tokenizer(tmp_path)
    ids = tokenizer("ab cd ef gh")["input_ids"]
    sequence = Encoded(ids, [(1, 3), (4, 5)])
    plain = preview.marked(tokenizer, sequence, colour=False)
    assert plain.count("⟦") == 2
    assert plain.replace("⟦", "").replace("⟧", "") == "│".join(tokenizer.decode([token]) for token in ids)
    coloured = preview.marked(tokenizer, sequence, colour=True)
    assert coloured.count(preview.GREEN) == coloured.count(preview.PLAIN) == 2
    assert coloured.replace(preview.GREEN, "").replace(preview.PLAIN, "") == plain.replace("⟦", "").replace("⟧", "")
    newline = preview.marked(tokenizer, Encoded(tokenizer("a\nb")["input_ids"], [(0, 3)]), colour=True)
    assert all(line.count(preview.GREEN) == line.count(preview.PLAIN) for line in newline.splitlines())


def test_what_is_elsewhere_is_read_from_the_volumes_and_named_where_it_is_not(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded, volumes = build_models.published_pipeline(
        tmp_path, without=("encoded_dataset", "base_model", "reference_model", "adapter"))
    preview.run(loaded.path.parent, 1, volumes)
    shown = capsys.readouterr().out
    shutil.rmtree(plan(loaded.pipeline).tokenizer.path(volumes))
    assert "train.jsonl:1: " in shown
    remote = adapter(tmp_path / "remote", tokenizer={"source": "hf://a/b", "revision": build_pipeline.COMMIT})
    with pytest.raises(UserError, match="tokenizer comes from hf://a/b, and it is not here, so nothing can be encoded"):
        preview.run(remote, 1, None)
    spec = plan(pipeline.load(remote).pipeline).tokenizer
    with pytest.raises(UserError, match=f"{volumes} does not hold {spec}, so nothing .*relocate tokenizer"):
        preview.run(remote, 1, volumes)
    data = adapter(tmp_path / "data", dataset__source="https://example.com/x.jsonl")
    with pytest.raises(UserError, match="dataset comes from https://example.com/x.jsonl, and it is not here"):
        preview.run(data, 1, None)
