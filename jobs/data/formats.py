"""Formats: the rows of JSONL, CSV and Parquet files, streamed, with file and line of each.

Errors in files and rows are collected in `Problems`, so that a user sees all of them at once.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.core.errors import RetryableError, UserError, of_volume
from jobs.core.files import open_plain, require_plain, visible_files
from jobs.data.records import OPTIONAL, Schema, Values, unknown_key

FORMATS = (".jsonl", ".csv", ".parquet")
LISTED = 10  # problems that a message lists before it gives their number


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

    def raise_if_any(self) -> None:
        """Raise `UserError` that lists the first problems and counts all of them."""
        if self.count:
            more = f"\n… and {self.count - len(self.first)} more" if self.count > len(self.first) else ""
            total = "1 problem" if self.count == 1 else f"{self.count} problems"
            raise UserError("\n".join(self.first) + f"{more}\n{total} in the data; nothing was published")


def files_in(path: Path) -> list[File]:
    """The data at `path`: the file, or all files of a known format below the folder.

    Raises:
        UserError: when there are none, or one is no plain file.
    """
    names = visible_files(path) if path.is_dir() else [""]
    files = readable([File(path / name, str(path / name)) for name in names], str(path))
    for file in files:
        require_plain(file.path)
    return files


def readable(files: list[File], where: str) -> list[File]:
    """Those of `files` that are in a format that can be read.

    Raises:
        UserError: when none is.
    """
    chosen = [file for file in files if file.path.suffix.lower() in FORMATS]
    if not chosen:
        names = ", ".join(file.path.name for file in files[:LISTED]) or "nothing"
        raise UserError(f"{where}: holds no data: its files must end in {', '.join(FORMATS)}, and there is {names}")
    return chosen


def names_of(files: list[File]) -> str:
    """The names of the files, of many the first ones."""
    names = [file.name for file in files]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def read_rows(files: list[File], schema: Schema, problems: Problems) -> Iterator[tuple[int, int, Values]]:
    """The valid rows of all files: the file's number, the line, the values. What is wrong goes to `problems`."""
    readers = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
    for number, file in enumerate(files):
        def columns(names: list[str], file: File = file) -> bool:
            """Whether a table's columns are right. A wrong one is a problem of the file, not of each row."""
            wrong = [unknown_key(name, schema.keys) for name in names if schema.keys and name not in schema.keys]
            wrong += [f"duplicate column `{name}`" for name, times in Counter(names).items() if times > 1]
            if not wrong and not any(set(needed) <= set(names) for needed in schema.shapes.values()):
                allowed = ", or ".join(" and ".join(needed) for needed in schema.shapes.values())
                wrong = [f"needs the columns {allowed}; it has {', '.join(names) or 'none'}"]
            for message in wrong:
                problems.add(file.name, message)
            return not wrong

        for line, row in readers[file.path.suffix.lower()](file, columns, problems):
            wrong = schema.validate(row)
            for message in wrong:
                problems.add(file.place(line), message)
            if not wrong:
                yield number, line, row


def to_jsonl(values: Values) -> bytes:
    """One row of a JSONL file."""
    return json.dumps(values, ensure_ascii=False).encode() + b"\n"


def _decoded(file: File, problems: Problems) -> Iterator[tuple[int, str | None]]:
    """The lines of a file with their numbers; None for one that is not UTF-8."""
    start = 0
    with open_plain(file.path) as stream:
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
        """An object; JSON allows duplicate keys, and Python would silently keep the last."""
        values = dict(pairs)
        if len(values) < len(pairs):
            raise ValueError("duplicate key")
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
                # An empty cell leaves `split` or `group` out; everywhere else the text is empty.
                yield number, {k: v for k, v in zip(header, row, strict=True) if v or k not in OPTIONAL}
    except csv.Error as error:
        problems.add(file.place(start), f"not CSV: {error}")


def _parquet(file: File, columns: Callable[[list[str]], bool], problems: Problems) -> Iterator[tuple[int, Any]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        require_plain(file.path)
        with parquet.ParquetFile(file.path) as table:
            if not columns(list(table.schema_arrow.names)):
                return
            for batch in table.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield number, {k: v for k, v in row.items() if v is not None}  # null is how Parquet leaves out
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # text not UTF-8; a date out of range
        if isinstance(error, OSError) and isinstance(of_volume(error), RetryableError):
            raise
        problems.add(file.place(number + 1), f"not Parquet that can be read: {str(error).splitlines()[0]}")
