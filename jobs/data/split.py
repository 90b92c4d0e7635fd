"""Records: reading JSONL, CSV and Parquet, validating every record, and splitting train from holdout.

A record is {"prompt", "completion"}, {"messages": [{"role", "content"}, …]} or {"text"}, and may say its `split`. Files
are streamed, twice: once to find every problem and whether records say their split, once to divide them.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
import statistics
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.core.artifacts import canonical
from jobs.core.errors import UserError
from jobs.core.files import require_space, visible_files

FORMATS = (".jsonl", ".csv", ".parquet")
TRAIN, HOLDOUT, STATISTICS = "train.jsonl", "holdout.jsonl", "statistics.json"
ACCEPTABILITY = "acceptability.jsonl"

SHAPES = {"prompt": ("prompt", "completion"), "messages": ("messages",), "text": ("text",)}
RECORD_KEYS = ("prompt", "completion", "messages", "text", "split")
ROLES = ("system", "user", "assistant")
# Our own names, and those of GLUE CoLA, whose running number says nothing.
JUDGEMENT_SHAPES = {"text": ("text", "acceptable"), "sentence": ("sentence", "label")}
JUDGEMENT_KEYS = ("text", "acceptable", "sentence", "label", "idx")

LISTED = 10  # problems that a message lists; it says how many there are in all
Values = dict[str, Any]


@dataclass(frozen=True)
class File:
    """A file of records, and its name in messages."""

    path: Path
    name: str

    def place(self, number: int) -> str:
        """Where the record is that starts at line (Parquet: row) `number`, counted from 1."""
        return f"{self.name}: row {number}" if self.path.suffix.lower() == ".parquet" else f"{self.name}:{number}"


@dataclass
class Problems:
    """What is wrong with the data: the first few problems in words, and how many there are."""

    first: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, place: str, message: str) -> None:
        self.count += 1
        if len(self.first) < LISTED:
            self.first.append(f"{place}: {message}")

    def check(self) -> None:
        """Raise `UserError` if there are any."""
        if self.count:
            more = f"\n… and {self.count - len(self.first)} more" if self.count > len(self.first) else ""
            total = "1 problem" if self.count == 1 else f"{self.count} problems"
            raise UserError("\n".join(self.first) + f"{more}\n{total} in the data; nothing was published")


def files_in(path: Path) -> list[File]:
    """The data at `path`: the file, or all files of a known format below the folder.

    Raises:
        UserError: when there are none.
    """
    if path.is_file():
        return known([File(path, str(path))], str(path))
    return known([File(path / name, str(path / name)) for name in visible_files(path)], str(path))


def known(files: list[File], where: str) -> list[File]:
    """Those of `files` that are in a format that can be read.

    Raises:
        UserError: when none is.
    """
    chosen = [file for file in files if file.path.suffix.lower() in FORMATS]
    if not chosen:
        names = ", ".join(file.path.name for file in files[:LISTED]) or "nothing"
        raise UserError(f"{where}: holds no data: its files must end in {', '.join(FORMATS)}, and there is {names}")
    return chosen


def validate(path: Path, holdout: float) -> dict[str, Any]:
    """Check a file or folder of records as the relocation does, writing nothing. Returns the statistics.

    Raises:
        UserError: with the first ten problems and how many there are.
    """
    return split(files_in(path), holdout, None)


def split(files: list[File], holdout: float, folder: Path | None) -> dict[str, Any]:
    """Validate the records of `files` and divide them into `folder`/train.jsonl and holdout.jsonl, in their order.

    If any record says its `split`, those that do not are for training. Otherwise a share of `holdout` is held out, by
    hash of the prompt: the same prompt is always on the same side, whatever else is in the data.

    Args:
        folder: where to write; None only checks.
    Returns:
        the statistics, which also go to `folder`/statistics.json.
    Raises:
        UserError: with the first ten problems and how many there are; or when a side is empty.
    """
    problems = Problems()
    records = size = 0
    says_split = False
    for _, _, record in _rows(files, RECORD_KEYS, SHAPES, record_problems, problems):
        records += 1
        size += len(_line(normalised(record)))
        says_split = says_split or "split" in record
    problems.check()
    if not records:
        raise UserError(f"{_names(files)}: no records")
    if folder:
        require_space(folder, size)

    counts: Counter[str] = Counter()
    shapes: Counter[str] = Counter()
    lengths = {(side, part): array("L") for side in (TRAIN, HOLDOUT) for part in ("prompt", "completion")}
    sides: dict[bytes, tuple[str, int, int]] = {}  # of each prompt: the side, and where it stands first
    seen: set[bytes] = set()
    with ExitStack() as stack:
        sinks = {side: stack.enter_context((folder / side).open("wb")) for side in (TRAIN, HOLDOUT)} if folder else {}
        for number, line, record in _rows(files, RECORD_KEYS, SHAPES, record_problems, problems):
            prompt = hashlib.sha256(prompt_of(record).encode()).digest()
            if says_split:
                side = HOLDOUT if record.get("split") == "holdout" else TRAIN
                other, first_number, first_line = sides.setdefault(prompt[:16], (side, number, line))
                if other != side:
                    problems.add(files[number].place(line), f"the same prompt stands at "
                                 f"{files[first_number].place(first_line)} in the other split; the holdout would "
                                 "measure what was trained on")
            else:
                side = HOLDOUT if int.from_bytes(prompt[:8], "big") / 2**64 < holdout else TRAIN
            text = _line(normalised(record))
            counts[side] += 1
            shapes[shape_of(record)] += 1
            seen.add(hashlib.sha256(text).digest()[:16])
            for part, length in zip(("prompt", "completion"), lengths_of(record), strict=True):
                if length is not None:
                    lengths[side, part].append(length)
            if folder:
                sinks[side].write(text)
    problems.check()
    _require_both(files, counts, holdout, says_split)
    facts = {
        "records": {Path(side).stem: counts[side] for side in (TRAIN, HOLDOUT)},
        "split_by": "the records" if says_split else "hash of the prompt",
        "duplicates": records - len(seen),
        "shapes": dict(shapes),
        "characters": {Path(side).stem: {part: _spread(lengths[side, part]) for part in ("prompt", "completion")
                                         if lengths[side, part]} for side in (TRAIN, HOLDOUT)},
    }
    if folder:
        (folder / STATISTICS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return facts


def judge(files: list[File], folder: Path | None) -> dict[str, int]:
    """Validate sentences with judgements and write them to `folder`/acceptability.jsonl as {"text", "acceptable"}.

    Returns:
        how many are acceptable and unacceptable.
    Raises:
        UserError: with the first ten problems; or when one of the two judgements never occurs.
    """
    problems = Problems()
    pairs = [(_sentence(row), _judgement(row)) for _, _, row in
             _rows(files, JUDGEMENT_KEYS, JUDGEMENT_SHAPES, judgement_problems, problems)]
    problems.check()
    good = sum(acceptable for _, acceptable in pairs)
    # The threshold is chosen on one half and measured on the other, so each half needs both kinds.
    if min(good, len(pairs) - good) < 2:
        raise UserError(f"{_names(files)}: {good} acceptable and {len(pairs) - good} unacceptable sentences; at least "
                        "two of each are needed")
    if folder:
        write_pairs(pairs, folder)
    return {"acceptable": good, "unacceptable": len(pairs) - good}


def write_pairs(pairs: Iterable[tuple[str, bool]], folder: Path) -> None:
    """Write sentences with judgements to `folder`/acceptability.jsonl."""
    with (folder / ACCEPTABILITY).open("wb") as sink:
        for text, acceptable in pairs:
            sink.write(_line({"text": text, "acceptable": acceptable}))


# --- one record ------------------------------------------------------------------------------------------------------


def record_problems(record: Any) -> list[str]:
    """What is wrong with one record, each problem naming its key; [] when it is valid."""
    found = _shape_problems(record, RECORD_KEYS, SHAPES)
    if found:
        return found
    if "split" in record and record["split"] not in ("train", "holdout"):
        found.append(f"`split` must be train or holdout, not {_shown(record['split'])}")
    if "messages" in record:
        return found + _message_problems(record["messages"])
    return found + [f"`{key}` {wrong}" for key in SHAPES[shape_of(record)] if (wrong := _text_problem(record[key]))]


def judgement_problems(row: Any) -> list[str]:
    """What is wrong with one sentence and its judgement; [] when it is valid."""
    found = _shape_problems(row, JUDGEMENT_KEYS, JUDGEMENT_SHAPES)
    if found:
        return found
    sentence, label = JUDGEMENT_SHAPES["text" if "text" in row else "sentence"]
    if wrong := _text_problem(row[sentence]):
        found.append(f"`{sentence}` {wrong}")
    if _judgement(row) is None:
        found.append(f"`{label}` must be true or false (1 or 0), not {_shown(row[label])}")
    return found


def shape_of(record: Mapping[str, Any]) -> str:
    """The record's shape: prompt, messages or text."""
    return next(shape for shape in SHAPES if shape in record)


def normalised(record: Mapping[str, Any]) -> Values:
    """The record as the artifact holds it: the keys of its shape, in their order."""
    if "messages" in record:
        return {"messages": [{"role": m["role"], "content": m["content"]} for m in record["messages"]]}
    return {key: record[key] for key in SHAPES[shape_of(record)]}


def prompt_of(record: Mapping[str, Any]) -> str:
    """What the record asks, as a text that is equal for equal questions: {"prompt"} or a lone user message, the
    messages before the answer, or the whole of a {"text"}, which asks nothing."""
    if "messages" not in record:
        return str(record.get("prompt", record.get("text")))
    before = normalised(record)["messages"][:-1]
    lone = len(before) == 1 and before[0]["role"] == "user"
    return str(before[0]["content"]) if lone else canonical(before).decode()


def lengths_of(record: Mapping[str, Any]) -> tuple[int | None, int]:
    """The characters of prompt (None for a {"text"}, which has none) and of completion."""
    if "messages" in record:
        *before, answer = (len(m["content"]) for m in record["messages"])
        return sum(before), answer
    return (None, len(record["text"])) if "text" in record else (len(record["prompt"]), len(record["completion"]))


def _shape_problems(record: Any, keys: tuple[str, ...], shapes: Mapping[str, tuple[str, ...]]) -> list[str]:
    if not isinstance(record, dict):
        return [f"must be a JSON object such as {{{', '.join(shapes[next(iter(shapes))])}}}, not {_shown(record)}"]
    unknown = [_unknown(key, keys) for key in record if key not in keys]
    begun = [shape for shape, needed in shapes.items() if any(key in record for key in needed)]
    if unknown:
        return unknown
    if len(begun) != 1:
        allowed = ", ".join(" and ".join(f"`{key}`" for key in needed) for needed in shapes.values())
        return [f"mixes {' and '.join(f'`{shape}`' for shape in begun)}; a record has one of: {allowed}" if begun else
                f"has none of: {allowed}"]
    return [f"`{key}` is missing" for key in shapes[begun[0]] if key not in record]


def _unknown(key: str, keys: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(str(key), keys, n=1)
    return f"unknown key {_shown(key)}; " + (f"did you mean `{close[0]}`?" if close else f"allowed: {', '.join(keys)}")


def _message_problems(messages: Any) -> list[str]:
    if not isinstance(messages, list):
        return [f"`messages` must be a list, not {_shown(messages)}"]
    found = []
    for number, message in enumerate(messages):
        key = f"messages[{number}]"
        if not isinstance(message, dict):
            found.append(f"`{key}` must be an object with `role` and `content`, not {_shown(message)}")
            continue
        found += [f"`{key}`: {_unknown(k, ('role', 'content'))}" for k in message if k not in ("role", "content")]
        if message.get("role") not in ROLES:
            found.append(f"`{key}.role` must be one of {', '.join(ROLES)}, not {_shown(message.get('role'))}")
        if wrong := _text_problem(message.get("content")):
            found.append(f"`{key}.content` {wrong}")
    if found:
        return found
    if len(messages) < 2:
        return ["`messages` must hold at least a question and its answer"]
    return [] if messages[-1]["role"] == "assistant" else ["`messages` must end with the assistant's answer"]


def _text_problem(value: Any) -> str | None:
    if not isinstance(value, str):
        return f"must be text, not {_shown(value)}"
    if not value.strip():
        return "is empty"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return f"holds half a character ({value[error.start]!r}, a lone surrogate) at position {error.start}"
    return None


def _sentence(row: Mapping[str, Any]) -> str:
    return str(row["text"] if "text" in row else row["sentence"])


def _judgement(row: Mapping[str, Any]) -> bool:
    """The judgement; None, which `judgement_problems` refuses, when it is not one (GLUE hides its test labels: -1)."""
    value = row["acceptable"] if "text" in row else row["label"]
    if isinstance(value, str):  # CSV knows only text
        value = value.strip().lower()
    known_values: dict[Any, bool] = {1: True, 0: False, "1": True, "0": False, "true": True, "false": False}
    return known_values.get(value) if isinstance(value, str | int) else None  # type: ignore[return-value]


def _shown(value: Any) -> str:
    """A value as a message shows it: short, since data is private and long."""
    names = {dict: "an object", list: "a list", type(None): "nothing"}
    text = names.get(type(value)) or repr(value)
    return text if len(text) <= 40 else text[:37] + "…"


def _line(values: Values) -> bytes:
    return json.dumps(values, ensure_ascii=False).encode() + b"\n"


def _spread(lengths: array[int]) -> dict[str, float]:
    return {"min": min(lengths), "median": statistics.median(lengths), "max": max(lengths)}


def _names(files: list[File]) -> str:
    names = [file.name for file in files]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _require_both(files: list[File], counts: Mapping[str, int], holdout: float, says_split: bool) -> None:
    records = sum(counts.values())
    for side, key in ((HOLDOUT, "holdout"), (TRAIN, "train")):
        if counts[side]:
            continue
        if says_split:
            raise UserError(f"{_names(files)}: {records} records, but none for `{key}`: let some say "
                            f'"split": "{key}", or none say `split`')
        change = "Raise" if side == HOLDOUT else "Lower"
        raise UserError(f"{_names(files)}: {records} records, and by hash none falls to {key} at holdout {holdout}. "
                        f"{change} `dataset.holdout`, add records, or let records say their `split`")


# --- the formats -----------------------------------------------------------------------------------------------------


def _rows(files: list[File], keys: tuple[str, ...], shapes: Mapping[str, tuple[str, ...]],
          check: Callable[[Any], list[str]], problems: Problems) -> Iterator[tuple[int, int, Values]]:
    """The valid rows of all files: the file's number, the line, the values. What is wrong goes to `problems`."""
    readers = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
    for number, file in enumerate(files):
        def columns(names: list[str], file: File = file) -> bool:
            """Whether a table's columns are right; said once, and not once a row."""
            wrong = [_unknown(name, keys) for name in names if name not in keys]
            wrong += [f"the column `{name}` stands twice" for name, times in Counter(names).items() if times > 1]
            if not wrong and not any(set(needed) <= set(names) for needed in shapes.values()):
                allowed = ", or ".join(" and ".join(needed) for needed in shapes.values())
                wrong = [f"needs the columns {allowed}; it has {', '.join(names) or 'none'}"]
            for message in wrong:
                problems.add(file.name, message)
            return not wrong

        for line, row in readers[file.path.suffix.lower()](file, columns, problems):
            wrong = check(row)
            for message in wrong:
                problems.add(file.place(line), message)
            if not wrong:
                yield number, line, row


def _decoded(file: File, problems: Problems) -> Iterator[tuple[int, str | None]]:
    """The lines of a file with their numbers; None for one that is not UTF-8."""
    start = 0
    with file.path.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            try:
                text = raw.decode("utf-8")
                yield number, text.removeprefix("\ufeff") if number == 1 else text
            except UnicodeDecodeError as error:
                problems.add(file.place(number), f"not UTF-8 at byte {start + error.start} of the file "
                             f"(0x{raw[error.start]:02x}); save it as UTF-8")
                yield number, None
            start += len(raw)


def _jsonl(file: File, columns: Callable[[list[str]], bool], problems: Problems) -> Iterator[tuple[int, Any]]:
    def once(pairs: list[tuple[str, Any]]) -> Values:
        """An object; JSON lets a key stand twice, and Python would silently keep the last."""
        values = dict(pairs)
        if len(values) < len(pairs):
            raise ValueError("a key stands twice")
        return values

    for number, text in _decoded(file, problems):
        if text is None or not text.strip():
            continue
        try:
            yield number, json.loads(text, object_pairs_hook=once)
        except json.JSONDecodeError as error:
            problems.add(file.place(number), f"not JSON: {error.msg} at column {error.colno}")
        except (ValueError, RecursionError) as error:
            problems.add(file.place(number), f"not JSON that can be used: {error}")


def _csv(file: File, columns: Callable[[list[str]], bool], problems: Problems) -> Iterator[tuple[int, Any]]:
    def lines() -> Iterator[str]:
        for _, text in _decoded(file, problems):
            if text is None:
                return  # quoting goes on over lines: nothing after this one can be trusted
            yield text

    csv.field_size_limit(2**31 - 1)  # the default refuses texts above 128 kB
    reader = csv.reader(lines(), strict=True)
    start = 1
    header: list[str] | None = None
    try:
        for row in reader:
            number, start = start, reader.line_num + 1
            if header is None:
                header = row
                if not columns(header):
                    return
            elif row and len(row) != len(header):
                problems.add(file.place(number), f"has {len(row)} cells, but the header has {len(header)}")
            elif row:
                # An empty cell says nothing about the split; everywhere else empty is what the record says.
                yield number, {k: v for k, v in zip(header, row, strict=True) if v or k != "split"}
    except csv.Error as error:
        problems.add(file.place(start), f"not CSV: {error}")


def _parquet(file: File, columns: Callable[[list[str]], bool], problems: Problems) -> Iterator[tuple[int, Any]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(file.path) as table:
            if not columns(list(table.schema_arrow.names)):
                return
            for batch in table.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield number, {k: v for k, v in row.items() if v is not None}  # null is how Parquet leaves out
    except (pyarrow.ArrowException, OSError) as error:
        problems.add(file.place(number + 1), f"not Parquet that can be read: {str(error).splitlines()[0]}")
