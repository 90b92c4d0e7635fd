"""What it costs to divide, encode and open a large dataset: `python -m benchmarks.encoding --help`."""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.serving import progress
from jobs.core.command import run_command
from jobs.core.errors import RetryableError

DESCRIPTION = """\
Measure how long it takes to divide a generated dataset into its splits, to encode it, and to open it for training; and
how much memory that takes. Each is a process of its own, whose memory and that of the processes below it is sampled.

Compared with the earlier way: dictionaries of all prompts, one process, and all tokens in lists, in every process that
trains. It is left out above --earlier records.
"""
COUNTS, QUICK = (10_000, 100_000, 1_000_000), (2_000,)
SAMPLE_SECONDS = 0.1
WORDS = ("hotel", "garden", "river", "market", "breakfast", "window", "station", "morning", "orange", "quiet",
         "terrace", "bridge", "summer", "museum", "kitchen", "where", "between", "open", "small", "old")


@dataclass(frozen=True)
class Measurement:
    """One step on one number of records."""

    records: int
    step: str
    seconds: float  # with the imports of its libraries, without Python's start
    resident: float  # MiB at most, the sum over its processes; pages that they share count for each
    proportional: float  # … but pages that they share count once
    tokens: int = 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks.encoding", description=DESCRIPTION, allow_abbrev=False,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--counts", type=int, nargs="+", default=COUNTS, metavar="N",
                     help="numbers of records (default: 10000 100000 1000000)")
    top.add_argument("--words", type=int, default=470, metavar="N", help="words of a record (default: %(default)s)")
    top.add_argument("--earlier", type=int, default=100_000, metavar="N",
                     help="most records for the earlier way (default: %(default)s)")
    top.add_argument("--folder", type=Path, metavar="DIR", help="where to put the data (default: a temporary folder)")
    top.add_argument("--quick", action="store_true", help="2000 records: shows that it works")
    top.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    return top


def generate(file: Path, records: int, words: int) -> None:
    """Records with prompts that differ, a tenth of them in groups, and one in a hundred twice."""
    chance = random.Random(0)
    with file.open("w", encoding="utf-8") as stream:
        for number in range(records):
            record: dict[str, Any] = {"prompt": " ".join(chance.choices(WORDS, k=words // 10)) + f" {number}?",
                                      "completion": " ".join(chance.choices(WORDS, k=words - words // 10)) + "."}
            if number % 10 == 0:
                record["group"] = f"group {number // 50}"
            line = json.dumps(record) + "\n"
            stream.write(line * (2 if number % 100 == 1 else 1))


# --- the steps, each in a process of its own ------------------------------------------------------------------------


def divide(folder: Path) -> int:
    from jobs.data import split
    from jobs.data.formats import files_in

    (folder / "dataset").mkdir(exist_ok=True)
    return int(split.split(files_in(folder / "data.jsonl"), 0.1, folder / "dataset")["duplicates"])


def encode(folder: Path) -> int:
    from jobs.data import encode as stage

    (folder / "encoded").mkdir(exist_ok=True)
    processes = stage.most_processes()  # also for little data, to compare
    counts = stage.encode_splits(folder / "dataset", folder / "encoded", stage.Settings(folder / "tokenizer", 4096),
                                 processes)
    return sum(int(each["tokens"]) for each in counts.values())


def open_encoded(folder: Path) -> int:
    """Open it, and read a thousand sequences here and there, as training's steps do."""
    from jobs.data import encoded

    train = encoded.read(folder / "encoded").train
    chance = random.Random(0)
    for _ in range(1000):
        train[chance.randrange(len(train))].sequences[0].labels()
    return int(train.lengths.sum())  # type: ignore[attr-defined]


def divide_before(folder: Path) -> int:
    """Dictionaries of all prompts and groups, and a set of all contents."""
    from jobs.data.formats import Problems, files_in, read_rows, to_jsonl
    from jobs.data.records import RECORDS, content_of, lengths_of, question_of

    (folder / "before").mkdir(exist_ok=True)
    files, problems = files_in(folder / "data.jsonl"), Problems()
    size = sum(len(to_jsonl(content_of(record))) for _, _, record in read_rows(files, RECORDS, problems))
    assert size
    first: dict[bytes, tuple[str, int, int]] = {}
    groups: dict[bytes, tuple[str, int, int]] = {}
    seen, count, lengths = set[bytes](), 0, list[Any]()
    train, held = folder / "before" / "train.jsonl", folder / "before" / "holdout.jsonl"
    with train.open("wb") as to_train, held.open("wb") as to_holdout:
        for number, line, record in read_rows(files, RECORDS, problems):
            question = hashlib.sha256(question_of(record).encode()).digest()
            group = hashlib.sha256(record["group"].encode()).digest() if "group" in record else None
            side = "holdout" if int.from_bytes((group or question)[:8], "big") / 2**64 < 0.1 else "train"
            if group:
                groups.setdefault(group[:16], (side, number, line))
            first.setdefault(question[:16], (side, number, line))
            written = to_jsonl(content_of(record))
            seen.add(hashlib.sha256(written).digest()[:16])
            lengths.append(lengths_of(record))
            count += 1
            (to_holdout if side == "holdout" else to_train).write(written)
    return count - len(seen)


def encode_before(folder: Path) -> int:
    """In one process, every time that training starts, with all tokens in lists."""
    from jobs.core import models
    from jobs.data.encoding import encode as encode_record

    tokenizer = models.load_tokenizer(folder / "tokenizer")
    kept = []
    for name in ("train", "holdout"):
        with (folder / "dataset" / f"{name}.jsonl").open(encoding="utf-8") as lines:
            for line in lines:
                kept += [each for each in encode_record(tokenizer, json.loads(line)) if len(each) <= 4096]
    return sum(map(len, kept))


STEPS: dict[str, Callable[[Path], int]] = {
    "split": divide, "split before": divide_before, "encode": encode, "open": open_encoded,
    "encode and open before": encode_before}


# --- measuring -------------------------------------------------------------------------------------------------------


def measure(folder: Path, records: int, step: str) -> Measurement:
    """Run one step in a process, and sample the memory of all of its processes."""
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.encoding", "--step", step, "--folder", str(folder)],
                               stdout=subprocess.PIPE, text=True)
    resident = proportional = 0.0
    try:
        root = psutil.Process(process.pid)
        while process.poll() is None:
            sizes = []
            with suppress(psutil.Error):
                for each in [root, *root.children(recursive=True)]:
                    with suppress(psutil.Error):
                        sizes.append(each.memory_full_info())
            resident = max(resident, sum(size.rss for size in sizes) / 2**20)
            proportional = max(proportional, sum(size.pss for size in sizes) / 2**20)
            time.sleep(SAMPLE_SECONDS)
    finally:
        process.kill()
    output = process.communicate()[0]
    if process.returncode:
        raise RetryableError(f"{step} of {records} records failed; its error is above")
    seconds, result = json.loads(output)
    return Measurement(records, step, seconds, resident, proportional, result if "split" not in step else 0)


def measure_all(folder: Path, counts: Sequence[int], words: int, earlier: int) -> list[Measurement]:
    from jobs.relocation import embedded

    (folder / "tokenizer").mkdir(exist_ok=True)
    embedded.write_tokenizer(folder / "tokenizer")
    (folder / "tokenizer" / "config.json").write_text('{"model_type": "llama"}\n')
    found = []
    for records in counts:
        progress(f"{records} records: generating them")
        generate(folder / "data.jsonl", records, words)
        for step in STEPS:
            if "before" in step and records > earlier:
                continue
            progress(f"{records} records: {step}")
            found.append(measure(folder, records, step))
    return found


def table(found: Sequence[Measurement]) -> str:
    """Every step on every number of records; and of the earlier way, its ratio to what replaced it."""
    lines = ["| records | step | s | records/s | million tokens/s | MiB, RSS | MiB, PSS |",
             "|---|---|---|---|---|---|---|"]
    by_step = {(each.records, each.step): each for each in found}
    for each in found:
        speed = f"{each.tokens / each.seconds / 1e6:.2f}" if each.tokens and each.step != "open" else ""
        rate = "" if each.step == "open" else f"{each.records / each.seconds:,.0f}"
        lines.append(f"| {each.records:,} | {each.step} | {each.seconds:.1f} | {rate} | {speed} | "
                     f"{each.resident:,.0f} | {each.proportional:,.0f} |")
    for records in dict.fromkeys(each.records for each in found):
        for before, now in (("split before", "split"), ("encode and open before", "encode"),
                            ("encode and open before", "open")):
            if (records, before) in by_step:
                old, new = by_step[records, before], by_step[records, now]
                lines.append(f"| {records:,} | {before} : {now} | {old.seconds / new.seconds:.1f} | | | "
                             f"{old.resident / new.resident:.1f} | {old.proportional / new.proportional:.1f} |")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> None:
    if args.step:
        started = time.monotonic()
        result = STEPS[args.step](args.folder)
        print(json.dumps([time.monotonic() - started, result]))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        counts, words = (QUICK, 40) if args.quick else (args.counts, args.words)
        print(table(measure_all(folder, counts, words, args.earlier)))


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: run(parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
