"""Promises of the encoding job: what fits is encoded once, and what does not is counted and named."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.core.errors import RetryableError, UserError
from jobs.core.pipeline import Training
from jobs.data import encode as stage
from jobs.data import encoded
from jobs.data.encode import Settings, encode_splits
from jobs.data.encoding import Encoded, encode
from jobs.tools.pods import CHECKOUT
from tests import build_models

RECORDS = [{"prompt": f"How many rooms has house {n}?", "completion": f"It has {n} rooms." * (1 + n % 7)}
           for n in range(300)]


def jsonl(file: Path, records: Sequence[Any]) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def encoded_splits(folder: Path, max_length: int, processes: int | None = None) -> encoded.Splits:
    output = folder / f"encoded-{max_length}"
    output.mkdir(exist_ok=True)
    encode_splits(folder, output, Settings(folder, max_length), processes)
    return encoded.read(output)


def test_a_preference_is_two_sequences_and_the_evaluation_reads_the_chosen_one(tmp_path: Path) -> None:
    tokenizer = build_models.tiny_tokenizer(tmp_path)
    records = [{"prompt": f"Which is house {n}?", "chosen": f"House {n}.", "rejected": "No idea at all."}
               for n in range(9)]
    for name in ("train", "holdout"):
        jsonl(tmp_path / f"{name}.jsonl", records)
    found = encoded_splits(tmp_path, 99)
    assert found.preferences and not found.validation
    assert found.train.records.tolist() == sorted([*range(1, 10)] * 2)  # type: ignore[attr-defined]
    chosen, rejected = (encode(tokenizer, {"prompt": "Which is house 0?", "completion": text})[0]
                        for text in ("House 0.", "No idea at all."))
    assert [each.tokens for each in (found.train[0], found.train[1])] == [chosen.tokens, rejected.tokens]  # type: ignore[union-attr]
    assert encode(tokenizer, records[0]) == [chosen]
    jsonl(tmp_path / "train.jsonl", [*records, {"prompt": "a", "completion": "b"}])
    with pytest.raises(UserError, match=r"9 of 10 records are preferences .* one kind or the other"):
        encoded_splits(tmp_path, 98)
    jsonl(tmp_path / "train.jsonl", [{"prompt": "a", "chosen": "b\u200b", "rejected": "b"}])
    assert encoded_splits(tmp_path, 97).preferences, "other characters are other tokens"


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks of little data."""
    monkeypatch.setattr(stage, "LINES_PER_CHUNK", 16)


def test_a_record_of_exactly_max_length_is_learned(tmp_path: Path) -> None:
    tokenizer = build_models.tiny_tokenizer(tmp_path)
    records = {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b" * 30}
    jsonl(tmp_path / "train.jsonl", records)
    jsonl(tmp_path / "holdout.jsonl", [records[0]] * 2 + [records[1]] * 3)
    short, long = (len(encode(tokenizer, record)[0]) for record in records)
    whole = encoded_splits(tmp_path, long)
    assert (len(whole.train), len(whole.holdout), whole.too_long) == (2, 5, 0)
    less = encoded_splits(tmp_path, long - 1)
    assert (len(less.train), len(less.holdout), less.too_long) == (1, 2, 4)
    assert less.holdout.records.tolist() == [1, 2]  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=f"all 2 train records are longer than .*the shortest has {short}"):
        encoded_splits(tmp_path, short - 1)
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(UserError, match="all 0 train records are longer than .*the shortest has 0"):
        encoded_splits(tmp_path, long)


def test_every_sequence_is_there_with_its_line_and_the_counts_are_right(
        tmp_path: Path, small_chunks: None) -> None:
    tokenizer = build_models.tiny_tokenizer(tmp_path)
    jsonl(tmp_path / "train.jsonl", RECORDS)
    jsonl(tmp_path / "validation.jsonl", RECORDS[:40])
    jsonl(tmp_path / "holdout.jsonl", RECORDS[100:150])
    expected = [encode(tokenizer, record)[0] for record in RECORDS]
    limit = sorted(map(len, expected))[200]
    found = encoded_splits(tmp_path, limit)
    fitting = [(line, each) for line, each in enumerate(expected, 1) if len(each) <= limit]
    assert 200 < len(fitting) < 300
    assert isinstance(found.train, encoded.Split)
    assert found.train.records.tolist() == [line for line, _ in fitting]
    assert found.train.lengths.tolist() == [len(each) for _, each in fitting]
    assert list(found.train) == [each for _, each in fitting]
    assert len(found.validation) == sum(len(each) <= limit for each in expected[:40])
    counts = json.loads((tmp_path / f"encoded-{limit}" / "statistics.json").read_text())["train"]
    assert counts == {"records": len(fitting), "too_long": 300 - len(fitting), "sequences": len(fitting),
                      "preferences": 0,
                      "tokens": sum(len(each) for _, each in fitting),
                      "learned": sum(each.scored for _, each in fitting),
                      "longest": max(map(len, expected)), "shortest": min(map(len, expected))}


def test_the_files_are_the_same_bytes_however_many_processes_encode(tmp_path: Path, small_chunks: None) -> None:
    build_models.tiny_tokenizer(tmp_path)
    for name in ("train", "holdout"):
        jsonl(tmp_path / f"{name}.jsonl", RECORDS)
    found = []
    for processes in (1, 2, 3):
        encoded_splits(tmp_path, 100, processes)
        found.append({file.name: file.read_bytes() for file in (tmp_path / "encoded-100").iterdir()})
    assert found[0].keys() == {"train.arrow", "validation.arrow", "holdout.arrow", "statistics.json"}
    assert found[0] == found[1] == found[2]


def test_chunks_end_by_lines_and_by_bytes_and_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "LINES_PER_CHUNK", 3)
    monkeypatch.setattr(stage, "CHUNK_BYTES", 10)
    lines = [b"a\n", b"b\n", b"c\n", b"d\n", b"x" * 40 + b"\n", b"e\n", b"ffffffff\n", b"g\n"]
    (tmp_path / "lines").write_bytes(b"".join(lines))
    found = list(stage.chunks(tmp_path / "lines"))
    assert [first for first, _ in found] == [1, 4, 6, 8]
    assert [line for _, some in found for line in some] == lines


def test_only_a_few_chunks_are_read_ahead_of_what_is_written() -> None:
    taken: list[int] = []

    def source() -> Any:
        for number in range(100):
            taken.append(number)
            yield number, []

    def submit(chunk: Any) -> Any:
        done: Future[Any] = Future()
        done.set_result(chunk[0])
        return done

    results: Iterator[Any] = stage._in_order(submit, source(), 4)
    assert [next(results) for _ in range(10)] == list(range(10))
    assert len(taken) <= 14
    assert list(results) == list(range(10, 100))


# --- what cannot be encoded ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "message"), [
    ({"search": {"candidates": {"lora.r": [4, 8]}}}, "training.search chooses by the loss on the validation split"),
    ({"keep": "best"}, "training.keep: best chooses by the loss on the validation split"),
    ({"objective": "dpo"}, "training.objective is dpo, but the dataset's records are answers without a rejected one"),
])
def test_data_that_does_not_suit_the_training_is_found_before_a_gpu_is_used(
        tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    """Also where the data was encoded before: the settings are not part of its name."""
    loaded, volumes = build_models.published_pipeline(
        tmp_path, without=["adapter", "base_model", "reference_model", "encoded_dataset"])
    unsuitable = replace(loaded, pipeline=loaded.pipeline.model_copy(
        update={"training": Training.model_validate({"max_length": 128, "tokens_per_batch": 256, **settings})}))
    for _ in range(2):
        with pytest.raises(UserError, match=message):
            stage.run(unsuitable, volumes, 0)
    stage.run(loaded, volumes, 0)


def test_a_record_that_a_template_rejects_is_named_by_its_line(
        tmp_path: Path, small_chunks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def reject(tokenizer: Any, record: Any, template: Any = None) -> list[Encoded]:
        if "house 33?" in record["prompt"]:
            raise UserError("message 1, user: the template rejects it")
        return encode(tokenizer, record, template)

    build_models.tiny_tokenizer(tmp_path)
    monkeypatch.setattr(stage, "encode_for_training", reject)
    jsonl(tmp_path / "train.jsonl", RECORDS)
    jsonl(tmp_path / "holdout.jsonl", RECORDS)
    with pytest.raises(UserError) as error:
        encoded_splits(tmp_path, 100)
    assert str(error.value) == ("train.jsonl:34 of the dataset: message 1, user: the template rejects it\n"
                                "Nothing was published")


@pytest.mark.parametrize("processes", [1, 2])
def test_records_that_encode_to_nothing_are_named_and_a_few_are_enough(
        tmp_path: Path, processes: int, small_chunks: None) -> None:
    """A lone end token follows nothing: there is nothing to learn."""
    from tokenizers import normalizers

    tokenizer = build_models.tiny_tokenizer(tmp_path)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u00ad", "")
    tokenizer.save_pretrained(tmp_path)
    soft = {"text": "\u00ad\u00ad"}
    assert [len(each) for each in encode(tokenizer, soft)] == [1]
    jsonl(tmp_path / "holdout.jsonl", RECORDS)
    jsonl(tmp_path / "train.jsonl", [*RECORDS[:20], soft, *RECORDS[20:], soft])
    with pytest.raises(UserError) as error:
        encoded_splits(tmp_path, 100, processes)
    first, second, last = str(error.value).splitlines()
    assert first.startswith("train.jsonl:21 of the dataset: encodes to nothing that could be learned")
    assert second.startswith("train.jsonl:302 of the dataset: encodes to nothing")
    assert last == "Nothing was published"
    jsonl(tmp_path / "train.jsonl", [soft] * 200)
    with pytest.raises(UserError) as error:
        encoded_splits(tmp_path, 100, processes)
    assert len(str(error.value).splitlines()) == stage.LISTED + 1


# --- processes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("files", "expected"), [
    ({}, 8), ({"cpu.max": "max 100000", "memory.max": "max"}, 8), ({"cpu.max": "250000 100000"}, 2),
    ({"cpu.max": "50000 100000"}, 1), ({"memory.max": str(2**30)}, 2), ({"memory.max": str(2**28)}, 1)])
def test_the_pods_cpus_and_memory_say_how_many_processes_encode(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: int) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(stage, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**23}[name])
    assert stage.most_processes() == expected


WORK = """
import sys
from pathlib import Path
from jobs.core.command import run_command
from jobs.data import encode
encode.LINES_PER_CHUNK = 16
folder = Path(sys.argv[1])
sys.exit(run_command(lambda: encode.encode_splits(folder, folder / "out", encode.Settings(folder, 100), 2)))
"""


def children(pid: int) -> list[int]:
    """The processes below one, their children included."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found += [int(stat.parent.name), *children(int(stat.parent.name))]
    return found


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:  # it ended, perhaps between opening the file and reading it
        return False


def working(folder: Path) -> subprocess.Popen[str]:
    """A process that encodes, and has just written something."""
    build_models.tiny_tokenizer(folder)
    (folder / "out").mkdir()
    jsonl(folder / "train.jsonl", RECORDS * 400)
    jsonl(folder / "holdout.jsonl", RECORDS)
    process = subprocess.Popen([sys.executable, "-c", WORK, str(folder)], cwd=CHECKOUT, stderr=subprocess.PIPE,
                               text=True)
    file, deadline = folder / "out" / "train.arrow", time.monotonic() + 300
    while not (file.exists() and file.stat().st_size > 10_000):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_is_left_behind(tmp_path: Path, number: signal.Signals) -> None:
    process = working(tmp_path)
    below = children(process.pid)
    assert len(below) >= 3
    process.send_signal(number)
    assert process.wait(120) == (143 if number == signal.SIGTERM else -number)
    deadline = time.monotonic() + 120
    while left := [pid for pid in below if runs(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def test_a_process_that_is_killed_is_worth_a_retry(tmp_path: Path) -> None:
    """As the kernel kills the largest one of a pod that ran out of memory."""
    process = working(tmp_path)
    encoding = [pid for pid in children(process.pid) if "forkserver" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(encoding[-1], signal.SIGKILL)
    _, output = process.communicate(timeout=120)
    assert process.returncode == RetryableError.exit_code
    assert output.splitlines()[-1].startswith("error: a process that encodes was killed.")
