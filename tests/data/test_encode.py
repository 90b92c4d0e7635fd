"""Promises of the encoding job: what fits is encoded once, and what does not is counted and named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.core.errors import UserError
from jobs.data import encoded
from jobs.data.encode import encode_splits
from jobs.data.encoding import encode
from tests import build_models


def encoded_splits(folder: Path, tokenizer: Any, max_length: int) -> encoded.Splits:
    output = folder / f"encoded-{max_length}"
    output.mkdir(exist_ok=True)
    encode_splits(folder, output, tokenizer, max_length, {})
    return encoded.read(output)


def splits_folder(folder: Path) -> Any:
    tokenizer = build_models.tiny_tokenizer(folder)
    short, long = {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b" * 30}
    (folder / "train.jsonl").write_text(f"{json.dumps(short)}\n{json.dumps(long)}\n")
    (folder / "holdout.jsonl").write_text(f"{json.dumps(short)}\n" * 2 + f"{json.dumps(long)}\n" * 3)
    return tokenizer, len(encode(tokenizer, short)[0]), len(encode(tokenizer, long)[0])


def test_a_record_of_exactly_max_length_is_learned(tmp_path: Path) -> None:
    tokenizer, short, long = splits_folder(tmp_path)
    whole = encoded_splits(tmp_path, tokenizer, long)
    assert (len(whole.train), len(whole.holdout), whole.too_long) == (2, 5, 0)
    less = encoded_splits(tmp_path, tokenizer, long - 1)
    assert (len(less.train), len(less.holdout), less.too_long) == (1, 2, 4)
    with pytest.raises(UserError, match=f"all 2 train records are longer than .*the shortest has {short}"):
        encoded_splits(tmp_path, tokenizer, short - 1)
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(UserError, match="all 0 train records are longer than .*the shortest has 0"):
        encoded_splits(tmp_path, tokenizer, long)
