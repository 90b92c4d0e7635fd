"""Promises about the private data: every record is checked, every problem is placed, nothing leaks into the holdout."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.core.errors import UserError
from jobs.data import split as dataset
from jobs.data.formats import File, files_in
from jobs.data.records import question_of

GOOD = [{"prompt": f"Question {n}?", "completion": f"Answer {n}."} for n in range(50)]
CHAT = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi?"},
                     {"role": "assistant", "content": "Hello."}]}


def jsonl(folder: Path, records: list[Any], name: str = "data.jsonl") -> Path:
    """A file of records; a str or bytes is written as it is."""
    lines = [r if isinstance(r, str | bytes) else json.dumps(r) for r in records]
    (folder / name).write_bytes(b"".join((r.encode() if isinstance(r, str) else r) + b"\n" for r in lines))
    return folder / name


def parquet(folder: Path, columns: dict[str, list[Any]], name: str = "data.parquet") -> Path:
    import pyarrow
    from pyarrow import parquet as writer

    writer.write_table(pyarrow.table(columns), folder / name)
    return folder / name


def split(path: Path, holdout: float = 0.2) -> tuple[list[Any], list[Any], dict[str, Any]]:
    """The train and the holdout records, and the statistics."""
    out = path.parent / "out"
    out.mkdir(exist_ok=True)
    facts = dataset.split(files_in(path), holdout, out)
    assert facts == json.loads((out / "statistics.json").read_text())
    train, held = ([json.loads(line) for line in (out / name).read_text().splitlines()]
                   for name in ("train.jsonl", "holdout.jsonl"))
    return train, held, facts


def problems(path: Path) -> str:
    """The message with which the data is refused; and that both `check` and the relocation refuse it."""
    with pytest.raises(UserError) as error:
        dataset.validate(path, 0.2)
    out = path.parent / "refused"
    out.mkdir(exist_ok=True)
    with pytest.raises(UserError) as again:
        dataset.split(files_in(path), 0.2, out)
    assert str(again.value) == str(error.value)
    assert not (out / "statistics.json").exists()
    return str(error.value)


# --- dividing --------------------------------------------------------------------------------------------------------


def test_every_record_is_on_exactly_one_side_in_its_order(tmp_path: Path) -> None:
    train, held, facts = split(jsonl(tmp_path, GOOD))
    assert sorted(map(str, train + held)) == sorted(map(str, GOOD))
    assert train == [r for r in GOOD if r in train]
    assert held == [r for r in GOOD if r in held]
    assert facts["records"] == {"train": len(train), "holdout": len(held)}
    assert 3 <= len(held) <= 18


def test_the_side_of_a_prompt_depends_on_nothing_else(tmp_path: Path) -> None:
    """Adding data never moves a record that was held out into the training set."""
    _, before, _ = split(jsonl(tmp_path, GOOD[:25]))
    _, after, _ = split(jsonl(tmp_path, [*reversed(GOOD), {"text": "More."}]))
    assert [r for r in reversed(after) if r in GOOD[:25]] == before


def test_equal_prompts_stay_together_however_they_are_written(tmp_path: Path) -> None:
    same: list[Any] = [{"prompt": p, "completion": c} for p in (f"Q{n}" for n in range(40)) for c in ("one", "two")]
    same += [{"messages": [{"role": "user", "content": f"Q{n}"}, CHAT["messages"][2]]} for n in range(40)]
    train, held, _ = split(jsonl(tmp_path, same))
    prompts = [{question_of(r) for r in side} for side in (train, held)]
    assert prompts[0] & prompts[1] == set()


def test_records_that_say_their_split_are_obeyed_and_the_rest_is_for_training(tmp_path: Path) -> None:
    records = [GOOD[0] | {"split": "holdout"}, GOOD[1] | {"split": "train"}, *GOOD[2:]]
    train, held, facts = split(jsonl(tmp_path, records))
    assert held == [GOOD[0]]
    assert train == GOOD[1:]
    assert facts["split_by"] == "the records"


def test_a_prompt_in_both_splits_is_refused_and_both_lines_are_named(tmp_path: Path) -> None:
    twin = {"messages": [{"role": "user", "content": GOOD[0]["prompt"]}, {"role": "assistant", "content": "x"}]}
    message = problems(jsonl(tmp_path, [GOOD[0] | {"split": "holdout"}, GOOD[1], twin]))
    assert f"{tmp_path}/data.jsonl:3: the same prompt is at {tmp_path}/data.jsonl:1 in the other split" in message


def test_a_prompt_in_both_splits_is_found_across_files(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    jsonl(folder, [GOOD[0] | {"split": "holdout"}], "a.jsonl")
    jsonl(folder, [GOOD[0] | {"completion": "other"}], "b.jsonl")
    message = problems(folder)
    assert "b.jsonl:1: the same prompt is at" in message
    assert "a.jsonl:1 in the other split" in message


SAME = [  # as "Where is the café?" for a reader
    "Where is the café? ", "WHERE IS THE CAFÉ?", unicodedata.normalize("NFD", "Where is the café?"),
    "Where is\u200b the café?", "Where\u00a0is\n the  café?", "\ufeffWhere is the café?", "Ｗhere is the café?",
    "Where is the ca\u00adfé?", "Where is the café?\ufe0e",
]


def asked(text: str, system: str | None = None) -> dict[str, Any]:
    before = [{"role": "system", "content": system}] if system else []
    return {"messages": [*before, {"role": "user", "content": text}, {"role": "assistant", "content": "There."}]}


@pytest.mark.parametrize("twin", [*({"prompt": text, "completion": "x"} for text in SAME), *map(asked, SAME),
                                  asked("Where is the café?", "Be brief.")])
def test_a_question_that_reads_the_same_is_the_same(tmp_path: Path, twin: dict[str, Any]) -> None:
    """In the leak check, and in the hash that chooses the split."""
    original = {"prompt": "Where is the café?", "completion": "There.", "split": "holdout"}
    assert "data.jsonl:2: the same prompt is at" in problems(jsonl(tmp_path, [original, twin]))
    records = [r | {"completion": "There."} for r in GOOD]
    for holdout in (0.2, 0.5, 0.8):
        del original["split"]
        train, held, _ = split(jsonl(tmp_path, [*records, original, twin]), holdout)
        assert (original in train) == (twin in train)
        assert (original in held) == (twin in held)
        original["split"] = "holdout"


def test_the_same_conversation_with_another_system_message_is_the_same(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"},
             {"role": "user", "content": "And now?"}, {"role": "assistant", "content": "Bye"}]
    one = {"messages": turns, "split": "holdout"}
    two = {"messages": [{"role": "system", "content": "Be brief."}, *turns[:3], {"role": "assistant", "content": "x"}]}
    assert "the same prompt" in problems(jsonl(tmp_path, [one, two]))
    other = {"messages": [turns[0], {"role": "assistant", "content": "Yes?"}, *turns[2:]]}
    assert len(split(jsonl(tmp_path, [one, other]))[0]) == 1, "another turn in between makes another question"


@pytest.mark.parametrize("other", ["Where is the cafe?", "Where is the café", "Where isthe café?", "Where is a café?"])
def test_questions_that_read_differently_are_different(tmp_path: Path, other: str) -> None:
    records = [{"prompt": "Where is the café?", "completion": "x", "split": "holdout"},
               {"prompt": other, "completion": "x"}]
    assert [len(side) for side in split(jsonl(tmp_path, records))[:2]] == [1, 1]


def test_a_larger_holdout_holds_out_the_same_records_and_more(tmp_path: Path) -> None:
    records = [{"prompt": f"p{n}", "completion": "c"} for n in range(1000)]
    held = {share: [r["prompt"] for r in split(jsonl(tmp_path, records), share)[1]] for share in (0.05, 0.3, 0.7)}
    assert set(held[0.05]) < set(held[0.3]) < set(held[0.7])
    for share, chosen in held.items():
        assert abs(len(chosen) / 1000 - share) < 0.05


# --- validation ------------------------------------------------------------------------------------------------------


def divided(path: Path, holdout: float, validation: float) -> dict[str, list[Any]]:
    """The records of each split that has a file."""
    out = path.parent / f"out-{validation}"
    out.mkdir(exist_ok=True)
    facts = dataset.split(files_in(path), holdout, out, validation)
    found = {file.stem: [json.loads(line) for line in file.read_text().splitlines()] for file in out.glob("*.jsonl")}
    assert facts["records"] == {name: len(records) for name, records in found.items()}
    return found


def test_a_share_for_validation_is_taken_from_training_alone(tmp_path: Path) -> None:
    """What is held out stays so; and what is neither held out nor for validation is what training gets."""
    path = jsonl(tmp_path, [{"prompt": f"p{n}", "completion": "c"} for n in range(1000)])
    before, after, more = (divided(path, 0.2, share) for share in (0, 0.1, 0.3))
    assert before.keys() == {"train", "holdout"}, "without a share, there is no file"
    assert before["holdout"] == after["holdout"] == more["holdout"]
    assert sorted(map(str, after["train"] + after["validation"])) == sorted(map(str, before["train"]))
    assert abs(len(after["validation"]) / 1000 - 0.1) < 0.03
    assert {r["prompt"] for r in after["validation"]} < {r["prompt"] for r in more["validation"]}


def test_groups_are_never_divided_among_three_splits(tmp_path: Path) -> None:
    found = divided(jsonl(tmp_path, grouped(60, 4)), 0.3, 0.3)
    groups = {name: {r["group"] for r in records} for name, records in found.items()}
    assert sum(map(len, groups.values())) == len(set.union(*groups.values())) == 60


def test_records_may_name_validation_as_their_split(tmp_path: Path) -> None:
    records = [GOOD[0] | {"split": "holdout"}, GOOD[1] | {"split": "validation"}, *GOOD[2:]]
    assert divided(jsonl(tmp_path, records), 0.2, 0) == {
        "holdout": [GOOD[0]], "validation": [GOOD[1]], "train": GOOD[2:]}


def test_where_records_name_train_and_holdout_a_share_for_validation_is_taken_from_training(tmp_path: Path) -> None:
    records = [{"prompt": f"p{n // 2}", "completion": f"c{n}"} for n in range(2000)]
    named = [r | {"split": "holdout"} if n < 200 else r | {"split": "train"} if n < 1000 else r
             for n, r in enumerate(records)]
    found = divided(jsonl(tmp_path, named), 0.5, 0.2)
    assert found["holdout"] == records[:200]
    assert sorted(map(str, found["train"] + found["validation"])) == sorted(map(str, records[200:]))
    assert abs(len(found["validation"]) / 1800 - 0.2) < 0.05
    assert {r["prompt"] for r in found["validation"]}.isdisjoint(r["prompt"] for r in found["train"])


def test_where_records_name_validation_no_share_is_added(tmp_path: Path) -> None:
    records = [r | {"split": "holdout" if n < 5 else "validation" if n < 10 else "train"} for n, r in enumerate(GOOD)]
    found = divided(jsonl(tmp_path, records), 0.2, 0.5)
    assert (len(found["holdout"]), len(found["validation"]), len(found["train"])) == (5, 5, len(GOOD) - 10)


@pytest.mark.parametrize("pair", [("train", "validation"), ("validation", "holdout"), ("holdout", "validation")])
def test_a_prompt_or_a_group_in_any_two_splits_is_refused(tmp_path: Path, pair: tuple[str, str]) -> None:
    rest = [GOOD[n] | {"split": split} for n, split in enumerate(("train", "validation", "holdout"))]
    twins = [{"prompt": "Same?", "completion": "c", "split": split} for split in pair]
    message = problems(jsonl(tmp_path, [*rest, *twins]))
    assert "data.jsonl:5: the same prompt is at" in message
    assert "data.jsonl:4 in the other split" in message
    groups = [GOOD[10 + n] | {"split": split, "group": "g"} for n, split in enumerate(pair)]
    assert "data.jsonl:5: its `group` is at" in problems(jsonl(tmp_path, [*rest, *groups]))


@pytest.mark.parametrize(("records", "hint"), [
    (GOOD, r"50 records, and the hash puts none into validation at validation 1e-05. Raise `dataset.validation`"),
    ([GOOD[0] | {"split": "holdout"}, GOOD[1]], "for `validation`, though `dataset.validation` is 1e-05: raise it, or"),
])
def test_an_empty_validation_that_is_desired_is_refused(tmp_path: Path, records: list[Any], hint: str) -> None:
    with pytest.raises(UserError, match=hint):
        dataset.validate(jsonl(tmp_path, records), 0.2, 1e-5)


def test_problems_of_groups_and_prompts_are_listed_in_the_order_of_the_records(tmp_path: Path) -> None:
    held = [r | {"split": "holdout", "group": f"g{n}"} for n, r in enumerate(GOOD[:4])]
    again = [GOOD[0] | {"completion": "x"}, {"prompt": "other", "completion": "x", "group": "g1"},
             GOOD[2] | {"group": "g2"}, GOOD[3]]
    lines = problems(jsonl(tmp_path, [*held, *again])).splitlines()
    assert [(line.split(":")[1], "`group`" in line) for line in lines[:-1]] == [
        ("5", False), ("6", True), ("7", True), ("7", False), ("8", False)]


# --- groups ----------------------------------------------------------------------------------------------------------


def grouped(groups: int, records: int) -> list[dict[str, Any]]:
    return [{"prompt": f"p{n} of {g}", "completion": "c", "group": f"customer {g}"}
            for n in range(records) for g in range(groups)]


def test_a_group_is_never_divided_and_stays_with_its_records(tmp_path: Path) -> None:
    train, held, facts = split(jsonl(tmp_path, grouped(40, 5)), 0.3)
    sides = [{r["group"] for r in side} for side in (train, held)]
    assert sides[0] & sides[1] == set()
    assert sides[0] | sides[1] == {f"customer {g}" for g in range(40)}
    assert facts["groups"] == {"train": len(sides[0]), "holdout": len(sides[1])}
    assert facts["split_by"].startswith("hash of the group")
    assert 5 <= len(sides[1]) <= 20


def test_the_side_of_a_group_depends_on_nothing_else(tmp_path: Path) -> None:
    _, before, _ = split(jsonl(tmp_path, grouped(40, 1)), 0.3)
    _, after, _ = split(jsonl(tmp_path, [*GOOD, *reversed(grouped(40, 3))]), 0.3)
    assert {r["group"] for r in before} == {r["group"] for r in after if "group" in r}


def test_a_group_in_both_splits_is_refused_and_both_lines_are_named(tmp_path: Path) -> None:
    records = [GOOD[0] | {"split": "holdout", "group": "a"}, GOOD[1] | {"group": "b"}, GOOD[2] | {"group": "a"}]
    message = problems(jsonl(tmp_path, records))
    assert f"{tmp_path}/data.jsonl:3: its `group` is at {tmp_path}/data.jsonl:1 in the other split" in message
    assert "1 problem in the data" in message


def test_the_same_prompt_in_groups_of_both_splits_is_refused(tmp_path: Path) -> None:
    train, held, _ = split(jsonl(tmp_path, grouped(40, 1)), 0.3)
    records = [{"prompt": "Same?", "completion": "c", "group": side[0]["group"]} for side in (train, held)]
    message = problems(jsonl(tmp_path, [*grouped(40, 1), *records]))
    assert "data.jsonl:42: the same prompt is at" in message
    assert "data.jsonl:41 in the other split" in message
    assert "Give both the same `group`" in message


def test_groups_are_read_from_csv_and_parquet(tmp_path: Path) -> None:
    records = [*grouped(20, 2), *GOOD]
    rows = "".join(f"{r['prompt']},{r['completion']},{r.get('group', '')}\n" for r in records)
    (tmp_path / "data.csv").write_text("prompt,completion,group\n" + rows)
    parquet(tmp_path, {key: [r.get(key) for r in records] for key in ("prompt", "completion", "group")})
    wanted = split(jsonl(tmp_path, records))
    assert split(tmp_path / "data.csv") == split(tmp_path / "data.parquet") == wanted
    assert sum(wanted[2]["groups"].values()) == 20


def test_the_statistics_count_and_hold_no_text(tmp_path: Path) -> None:
    records = [{"prompt": "abc", "completion": "12345", "split": "holdout"}, {"prompt": "x", "completion": "1"},
               {"prompt": "xyz", "completion": "12"}, {"prompt": "x", "completion": "1"}, {"text": "secret secret"},
               CHAT]
    _, _, facts = split(jsonl(tmp_path, records))
    assert facts == {
        "records": {"train": 5, "holdout": 1}, "groups": {"train": 0, "holdout": 0}, "split_by": "the records",
        "duplicates": 1,
        "shapes": {"prompt": 4, "text": 1, "messages": 1},
        "characters": {"train": {"prompt": {"min": 1, "median": 2.0, "max": 12},
                                 "completion": {"min": 1, "median": 2, "max": 13}},
                       "holdout": {"prompt": {"min": 3, "median": 3, "max": 3},
                                   "completion": {"min": 5, "median": 5, "max": 5}}}}


@pytest.mark.parametrize(("records", "hint"), [
    (GOOD[6:9], r"3 records, and the hash puts none into holdout at holdout 0\.2\. Raise"),
    ([GOOD[0] | {"split": "train"}], "none for `holdout`"),
    ([GOOD[0] | {"split": "holdout"}], "none for `train`"),
])
def test_an_empty_side_is_refused_and_says_what_to_do(tmp_path: Path, records: list[Any], hint: str) -> None:
    with pytest.raises(UserError, match=hint):
        dataset.validate(jsonl(tmp_path, records), 0.2)


def test_a_holdout_of_nearly_everything_leaves_nothing_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"puts none into train at holdout 0\.999\. Lower"):
        dataset.validate(jsonl(tmp_path, GOOD[:3]), 0.999)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1)).filter(lambda r: all(t.strip() for t in r)),
                min_size=1, max_size=20))
def test_any_text_survives_unchanged(tmp_path_factory: pytest.TempPathFactory, texts: list[tuple[str, str]]) -> None:
    path = tmp_path_factory.mktemp("data")
    records = [{"prompt": f"p{p}", "completion": c, "split": "train"} for p, c in texts]
    end = {"prompt": "held out", "completion": "x", "split": "holdout"}
    out = path / "out"
    out.mkdir()
    dataset.split([File(jsonl(path, [*records, end]), "data.jsonl")], 0.1, out)
    with (out / "train.jsonl").open(encoding="utf-8", newline="\n") as lines:
        assert [json.loads(line) for line in lines] == [{"prompt": f"p{p}", "completion": c} for p, c in texts]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bad", "message"), [
    ('{"prompt": "a", "completion": }', ":2: not JSON: Expecting value at column 31"),
    ('{"prompt": "a"', ":2: not JSON"),
    ('{"prompt": "a", "prompt": "b", "completion": "c"}', ":2: not JSON that can be used: duplicate key"),
    ("[" * 100_000, ":2: not JSON that can be used"),
    (["a"], ":2: must be a JSON object"),
    ({}, ":2: has none of: `prompt` and `completion`, `messages`, `text`"),
    ({"prompt": "a"}, ":2: `completion` is missing"),
    ({"completion": "a"}, ":2: `prompt` is missing"),
    ({"prompt": "a", "completoin": "b"}, ":2: unknown key 'completoin'; did you mean `completion`?"),
    ({"prompt": "a", "completion": "b", "zzz": 1}, ":2: unknown key 'zzz'; allowed: prompt, completion"),
    ({"prompt": "a", "completion": "b", "text": "c"}, ":2: mixes `prompt` and `text`"),
    ({"prompt": "a", "completion": ""}, ":2: `completion` is empty"),
    ({"prompt": " \n", "completion": "b"}, ":2: `prompt` is empty"),
    ({"text": ""}, ":2: `text` is empty"),
    ({"prompt": 7, "completion": "b"}, ":2: `prompt` must be text, not 7"),
    ({"prompt": "a", "completion": None}, ":2: `completion` must be text, not nothing"),
    ({"prompt": "a", "completion": ["b"]}, ":2: `completion` must be text, not a list"),
    ('{"text": "\\ud800"}', ":2: `text` holds half a character"),
    ({"prompt": "a", "completion": "b", "group": 7}, ":2: `group` must be text, not 7"),
    ({"prompt": "a", "completion": "b", "group": " "}, ":2: `group` is empty"),
    ({"prompt": "a", "completion": "b", "split": "test"},
     ":2: `split` must be train, validation or holdout, not 'test'"),
    ({"messages": "hello"}, ":2: `messages` must be a list"),
    ({"messages": []}, ":2: `messages` must hold at least a question and its answer"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "at least a question and its answer"),
    ({"messages": CHAT["messages"][:2]}, ":2: `messages` must end with the assistant's answer"),
    ({"messages": ["a", "b"]}, ":2: `messages[0]` must be an object with `role` and `content`"),
    ({"messages": [*CHAT["messages"][:2], {"role": "assistant", "content": ""}]}, "`messages[2].content` is empty"),
    ({"messages": [{"role": "robot", "content": "a"}, CHAT["messages"][2]]},
     "`messages[0].role` must be one of system, user, assistant, tool, not 'robot'"),
    ({"messages": [{"role": "user", "contents": "a"}, CHAT["messages"][2]]},
     "`messages[0]`: unknown key 'contents'; did you mean `content`?"),
    (b'{"prompt": "caf\xe9", "completion": "b"}', "not UTF-8 at byte"),
])
def test_a_bad_record_is_named_with_file_line_and_key(tmp_path: Path, bad: Any, message: str) -> None:
    found = problems(jsonl(tmp_path, [GOOD[0], bad, *GOOD[1:]]))
    assert message in found
    assert found.startswith(f"{tmp_path}/data.jsonl:2: ")


def test_the_byte_that_is_not_utf8_is_counted_in_the_file(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [GOOD[0], b'{"text": "caf\xe9"}'])
    assert f"not UTF-8 at byte {path.read_bytes().index(0xE9)} of the file (0xe9)" in problems(path)


def test_the_first_ten_problems_are_listed_and_all_are_counted(tmp_path: Path) -> None:
    bad = [{"prompt": f"p{n}", "completion": ""} for n in range(24)]
    lines = problems(jsonl(tmp_path, [*bad, "{"])).splitlines()
    assert [line.split(": ")[0] for line in lines[:10]] == [f"{tmp_path}/data.jsonl:{n}" for n in range(1, 11)]
    assert lines[10:] == ["… and 15 more", "25 problems in the data; nothing was published"]


@pytest.mark.parametrize("content", [b"", b"\n\n  \n"])
def test_zero_records_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "data.jsonl").write_bytes(content)
    assert "data.jsonl: no records" in problems(tmp_path / "data.jsonl")


def test_a_format_that_cannot_be_read_says_which_can(tmp_path: Path) -> None:
    (tmp_path / "data.xlsx").write_bytes(b"x")
    with pytest.raises(UserError, match=r"must end in \.jsonl, \.csv, \.parquet, and there is data\.xlsx"):
        dataset.validate(tmp_path / "data.xlsx", 0.2)


def test_a_volume_that_fails_while_parquet_is_read_is_no_problem_of_the_data(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyarrow import parquet as reader

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Error reading bytes from file")

    file = parquet(tmp_path, {"text": ["a", "b"]})
    monkeypatch.setattr(reader, "ParquetFile", fail)
    with pytest.raises(OSError, match="Error reading bytes"):
        split(file)


def test_parquet_whose_values_python_cannot_hold_is_refused_with_its_row(tmp_path: Path) -> None:
    import pyarrow

    offsets, halves = pyarrow.py_buffer(bytes(8) + b"\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe")
    for name, column in (("text", pyarrow.Array.from_buffers(pyarrow.string(), 2, [None, offsets, halves])),
                         ("prompt", pyarrow.array([10**8], pyarrow.date32()))):
        columns = {"text": column} if name == "text" else {"prompt": column, "completion": ["a"]}
        with pytest.raises(UserError, match=r"data.parquet: row 1: not Parquet that can be read: .*\n1 problem"):
            split(parquet(tmp_path, columns))


@pytest.mark.parametrize("name", ["data.jsonl", "data.csv", "data.parquet"])
@pytest.mark.parametrize("folder", [False, True])
def test_a_fifo_is_refused_and_not_waited_for(tmp_path: Path, name: str, folder: bool) -> None:
    os.mkfifo(tmp_path / name)
    if folder:
        jsonl(tmp_path, GOOD, "more.jsonl")
    with pytest.raises(UserError, match=rf"{name}: is a FIFO, not a plain file"):
        dataset.validate(tmp_path if folder else tmp_path / name, 0.2)


def test_a_message_shows_no_long_private_text(tmp_path: Path) -> None:
    secret = "the combination of the safe is 1234 and then left, left, right"
    assert "left, right" not in problems(jsonl(tmp_path, [{"prompt": "a", "completion": "b", "split": secret}]))


# --- the formats -----------------------------------------------------------------------------------------------------


def test_the_formats_hold_the_same_records(tmp_path: Path) -> None:
    tricky = [*GOOD, {"prompt": 'quoted "word",\nand a line', "completion": "ünïcode ✓"}]
    text = io.StringIO()
    writer = csv.DictWriter(text, ["completion", "prompt"])
    writer.writeheader()
    writer.writerows(tricky)
    (tmp_path / "data.csv").write_bytes(b"\xef\xbb\xbf" + text.getvalue().encode())  # as spreadsheets save it
    parquet(tmp_path, {key: [r[key] for r in tricky] for key in ("prompt", "completion")})
    results = [split(tmp_path / f"data.{kind}") for kind in ("csv", "parquet")]
    assert results[0] == results[1] == split(jsonl(tmp_path, tricky))


def test_parquet_holds_messages_and_leaves_keys_out_with_null(tmp_path: Path) -> None:
    columns: dict[str, list[Any]] = {"messages": [CHAT["messages"], None], "text": [None, "A text."],
                                     "split": [None, "holdout"]}
    train, held, _ = split(parquet(tmp_path, columns))
    assert train == [CHAT]
    assert held == [{"text": "A text."}]


def test_a_folder_holds_several_files_and_others_are_ignored(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "more").mkdir(parents=True)
    (folder / "README.md").write_text("About the data")
    jsonl(folder, GOOD[:25], "a.jsonl")
    jsonl(folder / "more", GOOD[25:], "b.jsonl")
    assert dataset.validate(folder, 0.2) == dataset.validate(jsonl(tmp_path, GOOD), 0.2)


@pytest.mark.parametrize(("text", "message"), [
    ("prompt,completoin\na,b\n", "data.csv: unknown key 'completoin'; did you mean `completion`?"),
    ("prompt,split\na,train\n", "data.csv: needs the columns prompt and completion, or messages, or text, or prompt "
     "and chosen and rejected; it has"),
    ("prompt,completion,prompt\na,b,c\n", "data.csv: duplicate column `prompt`"),
    ("prompt,completion\na,b\nc\n", "data.csv:3: has 1 cells, but the header has 2"),
    ("prompt,completion\na,b\nc,\n", "data.csv:3: `completion` is empty"),
    ('prompt,completion\n"a\nb",c\nd,\n', "data.csv:4: `completion` is empty"),
    ('prompt,completion\na,"b\n', "data.csv:2: not CSV: unexpected end of data"),
    ("prompt,completion\na,b\nc,caf\udce9\n", "data.csv:3: not UTF-8 at byte"),
    ("prompt,completion,split\na,b,never\n", "data.csv:2: `split` must be train, validation or holdout, not 'never'"),
    ("", "data.csv: no records"),
])
def test_bad_csv_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "data.csv").write_bytes(text.encode(errors="surrogateescape"))
    assert message in problems(tmp_path / "data.csv")


def test_an_empty_cell_in_the_column_split_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("prompt,completion,split\na,b,\nc,d,holdout\n")
    train, held, _ = split(tmp_path / "data.csv")
    assert [r["prompt"] for r in train + held] == ["a", "c"]


def test_bad_parquet_is_named_with_its_row(tmp_path: Path) -> None:
    found = problems(parquet(tmp_path, {"prompt": ["a", "b"], "completion": ["x", None]}))
    assert "data.parquet: row 2: `completion` is missing" in found
    found = problems(parquet(tmp_path, {"prompt": ["a"], "completion": ["x"], "id": [1]}))
    assert "data.parquet: unknown key 'id'" in found
    assert "1 problem in the data" in found
    (tmp_path / "data.parquet").write_bytes(b"PAR1 is how it begins, but")
    assert "not Parquet that can be read" in problems(tmp_path / "data.parquet")
