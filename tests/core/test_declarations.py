"""Promises of what both files have in common: sources and pins, and messages that name file, line, key and value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import model_validator

from jobs.core import declarations, environment, pipeline
from jobs.core.declarations import PROBLEMS, ModelSource, Source, Strict
from jobs.core.errors import UserError
from tests import build_pipeline
from tests.build_pipeline import COMMIT, SHA256


def refusal(folder: Path, **changes: Any) -> list[str]:
    """The lines with which the files with these changes are refused."""
    with pytest.raises(UserError) as raised:
        pipeline.load(build_pipeline.write(folder, **changes))
    return str(raised.value).splitlines()


@pytest.mark.parametrize(("source", "location"), [
    ("hf://acme/model", "acme/model"), ("file:data/a:b.jsonl", "data/a:b.jsonl"), ("https://x:80/d", "x:80/d")])
def test_the_location_is_the_source_without_its_scheme(source: str, location: str) -> None:
    assert Source(source=source).location == location


@pytest.mark.parametrize(("pins", "shown"), [
    ({"revision": "main"}, "main"), ({"sha256": SHA256}, SHA256), ({}, "this code")])
def test_a_pin_is_shown_as_it_stands_in_the_file(pins: dict[str, str], shown: str) -> None:
    assert Source(source="x:y", **pins).pin == shown


@pytest.mark.parametrize(("source", "name"), [("hf://acme/model", "acme/model"), ("builtin:tiny", "builtin:tiny")])
def test_a_model_is_served_under_its_name_on_the_hub(source: str, name: str) -> None:
    assert ModelSource(source=source).name == name


@pytest.mark.parametrize(("key", "source", "pins"), [
    ("dataset", "file:x.jsonl", {"revision": COMMIT}), ("dataset", "hf://datasets/a/b", {"sha256": SHA256}),
    ("tokenizer", "file:tokenizer", {"revision": COMMIT}), ("tokenizer", "hf://a/b", {"sha256": SHA256}),
    ("base_model", "file:model", {"revision": COMMIT}), ("base_model", "hf://a/b", {"sha256": SHA256}),
    ("evaluation__acceptability", "file:x.csv", {"revision": COMMIT}),
    ("evaluation__acceptability", "hf://datasets/a/b", {"sha256": SHA256})])
def test_a_pin_of_the_wrong_kind_is_refused_for_every_source(tmp_path: Path, key: str, source: str,
                                                             pins: dict[str, str]) -> None:
    message = f"{source} is not pinned by `{next(iter(pins))}`; remove it"
    assert message in refusal(tmp_path, **{key: {"source": source, **pins}})[0]


@pytest.mark.parametrize("changes", [
    {"dataset": {"source": "https://me:hush@example.org/a.jsonl?signature=hush"}},
    {"dataset": {"source": "https://me:hu/hush@example.org/a.jsonl"}},
    {"dataset": {"source": "https://me:hush@example.org/a\t.jsonl"}},
    {"dataset": {"source": "htps://me:hush@example.org/a.jsonl?signature=hush"}},
    {"dataset": {"source": "https://me:hush@example.org/a.jsonl", "revision": COMMIT}},
    {"base_model__source": "https://me:hush@example.org/a.jsonl?signature=hush"},
    {"publication": {"to": "oci://me:hush@example.org/team"}}], ids=str)
def test_no_message_shows_a_password_or_a_signature(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert not [line for line in refusal(tmp_path, **changes) if "hush" in line]


@pytest.mark.parametrize("source", ["ftp://x/y", "https://x/y", "builtin:pairs", "hf://datasets/a/b"])
def test_a_tokenizer_comes_from_where_models_come_from(tmp_path: Path, source: str) -> None:
    line, = refusal(tmp_path, tokenizer={"source": source})
    assert ": tokenizer: " in line and source in line


def test_the_line_of_an_unpinned_source_is_that_of_its_key(tmp_path: Path) -> None:
    file = build_pipeline.write(tmp_path)
    file.write_text(file.read_text() + "  # the last\n  acceptability:\n    source: hf://datasets/acme/pairs\n")
    where = len(file.read_text().splitlines()) - 1
    with pytest.raises(UserError, match=rf"pipeline\.yaml:{where}: evaluation\.acceptability: hf://datasets/acme/pairs"):
        pipeline.load(file)


@pytest.mark.parametrize(("count", "lines"), [
    (PROBLEMS, PROBLEMS), (PROBLEMS + 1, PROBLEMS + 1), (PROBLEMS + 7, PROBLEMS + 1)])
def test_the_first_twenty_problems_are_listed_and_the_rest_is_counted(tmp_path: Path, count: int, lines: int) -> None:
    found = refusal(tmp_path, **{f"unknown{n:02}": 1 for n in range(count)})
    assert len(found) == lines
    if count > PROBLEMS:
        file, last = tmp_path / "pipeline.yaml", len((tmp_path / "pipeline.yaml").read_text().splitlines())
        assert found[-1] == f"{file}:{last}: and {count - PROBLEMS} more problems"


@pytest.mark.parametrize(("value", "shown"), [
    ({"a": 1}, "a mapping"), ([1], "a list"), ("x" * 78, repr("x" * 78)), ("x" * 79, f"'{'x' * 76}…"), (None, "None")])
def test_a_value_of_the_wrong_type_is_shown_and_not_in_full_if_it_is_long(
        tmp_path: Path, value: object, shown: str) -> None:
    lines = refusal(tmp_path, training={"epochs": value, "learning_rate": value})
    assert [line.partition(": training.")[2].partition(": input should")[0] for line in lines] == [
        f"epochs: {shown}", f"learning_rate: {shown}"]


@pytest.mark.parametrize(("content", "shown"), [("- a\n", "a list"), ("'text'\n", "'text'"), ("", "None")])
def test_a_file_without_a_mapping_says_what_it_holds(tmp_path: Path, content: str, shown: str) -> None:
    (tmp_path / "environment.yaml").write_text(content)
    with pytest.raises(UserError) as raised:
        environment.load(tmp_path)
    assert str(raised.value) == (f"{tmp_path}/environment.yaml: must hold a mapping with the key `base_model` and "
                                 f"others, not {shown}")


@pytest.mark.parametrize(("key", "value", "where"), [
    ("training__lora__target_modules", ["q_proj", 5], "training.lora.target_modules.1: 5: input should"),
    ("training__lora__target_modules", [], "training.lora.target_modules: a list: list should have"),
    ("training__lora", 5, "training.lora: 5: input should"),
    ("training__lora", [5], "training.lora: a list: input should"),
    ("dataset__source", {"a": 1}, "dataset.source: a mapping: input should be a valid string"),
    ("adapter", {"a": 1}, "adapter: a mapping: input should be a valid string")])
def test_a_key_is_named_as_it_stands_in_the_file(tmp_path: Path, key: str, value: object, where: str) -> None:
    """pydantic puts the alternatives of a union into the key's path; people do not know them."""
    lines = refusal(tmp_path, **{key: value})
    assert any(f": {where}" in line for line in lines), lines
    assert {line.split(": ")[1] for line in lines} == {where.split(": ")[0]} | (
        {"training.lora.target_modules"} if "target_modules" in key else set()), "and by nothing else"


def test_a_problem_below_a_key_has_the_line_of_what_is_wrong(tmp_path: Path) -> None:
    task = {"name": "city", "source": "file:city.jsonl", "check": "exact", "sha256": SHA256}
    file = build_pipeline.write(tmp_path, evaluation__tasks=[task, dict(task)])
    (_, line) = [n for n, text in enumerate(file.read_text().splitlines(), 1) if "name: city" in text]
    with pytest.raises(UserError, match=rf"^{file}:{line}: evaluation.tasks.1.name: city is the name of another task"):
        pipeline.load(file)


@pytest.mark.parametrize(("key", "allowed"), [
    ("evaluation__gate__perplexity__most", "max_ratio, min_gain, max_drop, min, max, than"),
    ("dataset__qqq", "source, revision, sha256, holdout, validation"),
    ("training__lora__qqq", "r, alpha, dropout, target_modules")])
def test_an_unknown_key_lists_those_of_its_mapping(tmp_path: Path, key: str, allowed: str) -> None:
    assert refusal(tmp_path, **{key: 1})[0].endswith(f"unknown key; allowed: {allowed}")


def test_an_unforeseen_error_of_a_validator_is_one_line_that_names_the_file(tmp_path: Path) -> None:
    class Odd(Strict):
        key: int

        @model_validator(mode="after")
        def _fails(self) -> Odd:
            raise RuntimeError("first\nsecond")

    (tmp_path / "odd.yaml").write_text("key: 1\n")
    document = declarations.read(tmp_path / "odd.yaml", "key")
    with pytest.raises(UserError) as raised:
        declarations.validate(document, Odd, document.values)
    assert str(raised.value) == f"{tmp_path}/odd.yaml: RuntimeError: first\\nsecond"


def test_shares_of_the_data_leave_some_to_train_on(tmp_path: Path) -> None:
    (line,) = refusal(tmp_path, dataset__holdout=0.5, dataset__validation=0.5)
    assert "holdout (0.5) and validation (0.5) leave nothing to train on: their sum must be below 1" in line
    pipeline.load(build_pipeline.write(tmp_path, dataset__holdout=0.5, dataset__validation=0.4))
