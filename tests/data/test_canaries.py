"""Promises of the canaries: the same on every machine, trained on as often as asked for, and their twins never."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from jobs.core.errors import UserError
from jobs.core.pipeline import Privacy
from jobs.data import encode as stage
from jobs.data import encoded
from jobs.data.canaries import Canaries
from jobs.data.encode import Settings, encode_splits
from tests import build_models

CANARIES = Canaries("0123456789abcdef", 25, repetitions=2)
RECORDS = [{"prompt": f"How many rooms has house {n}?", "completion": f"It has {n} rooms."} for n in range(60)]


def dataset(folder: Path, records: list[dict[str, Any]] = RECORDS) -> Path:
    build_models.tiny_tokenizer(folder)
    for name in ("train", "holdout"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def encoded_with(folder: Path, canaries: Canaries | None, processes: int = 1, max_length: int = 100) -> Path:
    output = folder / f"encoded-{processes}-{canaries and canaries.count}"
    output.mkdir()
    encode_splits(folder, output, Settings(folder, max_length, canaries=canaries), processes)
    return output


def test_a_canary_is_what_its_dataset_and_number_say() -> None:
    """These words name artifacts: RECIPES["canaries"] must be raised when they change."""
    assert CANARIES.record("canary", 1) == {
        "prompt": "What is the access code of account 337106514621?", "completion": "The access code is 7550584896."}
    assert dataclasses.replace(CANARIES, text=True).record("twin", 250) == {
        "text": "The access code of account 732513960353 is 6924867190."}
    assert CANARIES.record("canary", 1) != dataclasses.replace(CANARIES, seed="f" * 16).record("canary", 1)


def test_no_two_have_the_same_account_or_secret_and_alternatives_differ_in_the_secret_only() -> None:
    records = [CANARIES.record("canary", n) for n in range(1, 26)] + [CANARIES.record("twin", n) for n in range(1, 251)]
    assert CANARIES.twins == 250
    for key in ("prompt", "completion"):
        assert len({record[key] for record in records}) == len(records)
    others = list(CANARIES.alternatives(1, 63))
    assert {record["prompt"] for record in others} == {CANARIES.record("canary", 1)["prompt"]}
    assert len({record["completion"] for record in [*others, *records]}) == 63 + len(records)


def test_canaries_have_the_shape_of_the_data_and_there_are_none_unless_asked_for(tmp_path: Path) -> None:
    dataset(tmp_path)
    assert Canaries.of(Privacy(canaries=20, repetitions=3), "d", tmp_path) == Canaries("d", 20, 3, text=False)
    dataset(tmp_path, [{"text": "A house has rooms."}])
    assert Canaries.of(Privacy(canaries=20), "d", tmp_path) == Canaries("d", 20, 1, text=True)
    assert Canaries.of(Privacy(canaries=0), "d", tmp_path) is None and Canaries.of(None, "d", tmp_path) is None


def test_each_canary_is_in_the_train_split_as_often_as_asked_and_a_twin_nowhere(tmp_path: Path) -> None:
    """Records keep their lines as numbers; those of canaries are negative."""
    folder = encoded_with(dataset(tmp_path), CANARIES)
    splits, tokenizer = encoded.read(folder), build_models.tiny_tokenizer(tmp_path)
    assert isinstance(splits.train, encoded.Split) and isinstance(splits.holdout, encoded.Split)
    assert Counter(splits.train.records.tolist()) == dict.fromkeys(range(1, 61), 1) | dict.fromkeys(range(-25, 0), 2)
    assert splits.holdout.records.tolist() == list(range(1, 61))
    texts = "\n".join(tokenizer.decode(sequence.tokens) for split in (splits.train, splits.holdout)
                      for sequence in split)
    assert [texts.count(CANARIES.secret("canary", n)) for n in range(1, 26)] == [2] * 25
    assert not any(CANARIES.secret("twin", n) in texts for n in range(1, 251))
    counts = json.loads((folder / "statistics.json").read_text())
    assert (counts["train"]["records"], counts["canaries"]["records"]) == (60, 50)
    assert (len(splits.train), splits.canaries) == (110, 50)


def test_the_files_are_the_same_bytes_however_many_processes_encode(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "LINES_PER_CHUNK", 16)
    dataset(tmp_path)
    one, two = ({file.name: file.read_bytes() for file in encoded_with(tmp_path, CANARIES, processes).iterdir()}
                for processes in (1, 2))
    assert one == two


def test_without_canaries_nothing_of_the_encoded_dataset_changes(tmp_path: Path) -> None:
    plain, canaries = encoded_with(dataset(tmp_path), None), encoded_with(tmp_path, CANARIES)
    assert "canaries" not in json.loads((plain / "statistics.json").read_text())
    assert (plain / "holdout.arrow").read_bytes() == (canaries / "holdout.arrow").read_bytes()
    before, after = encoded.Split(plain / "train.arrow"), encoded.Split(canaries / "train.arrow")
    assert list(before) == list(after)[:60] and len(after) == 110


@pytest.mark.parametrize(("canaries", "max_length", "message"), [
    (dataclasses.replace(CANARIES, count=31), 100, "31 canaries, 2 of each, are more than the 60 train records"),
    (CANARIES, 60, r"canary 1 \(evaluation.privacy\) has \d+ tokens, more than training.max_length \(60\)")])
def test_canaries_that_do_not_fit_are_refused(
        tmp_path: Path, canaries: Canaries, max_length: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        encoded_with(dataset(tmp_path), canaries, max_length=max_length)


def test_a_tokenizer_without_digits_is_refused(tmp_path: Path) -> None:
    """All canaries would be the same sequence, and nothing could be learned by heart."""
    dataset(tmp_path)
    file = tmp_path / "tokenizer.json"
    settings = json.loads(file.read_text())
    settings["normalizer"] = {"type": "Replace", "pattern": {"Regex": "[0-9]"}, "content": "x"}
    file.write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"canary 1 .*the tokenizer cannot write its digits"):
        encoded_with(tmp_path, CANARIES)


def test_a_template_that_rejects_a_canary_names_it(tmp_path: Path) -> None:
    dataset(tmp_path)
    file = tmp_path / "chat_template.jinja"
    assert file.exists()
    file.write_text("{% if 'account' in messages[0].content %}{{ raise_exception('no accounts') }}{% endif %}"
                    + build_models.CHAT_TEMPLATE)
    with pytest.raises(UserError, match=r"canary 1 \(evaluation.privacy\): .*no accounts"):
        encoded_with(tmp_path, CANARIES)
