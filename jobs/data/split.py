"""The split: validate every record and divide the data into train, validation and holdout, so that nothing leaks.

Files are streamed, twice: once to find every problem and whether records name a split or a group, once to divide them.
Questions that read the same are always in the same split, and so are all records of a group. Of each record, some 80
bytes stay in memory: digests of 16 bytes, by which equal ones are found, its split and its place.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.core.errors import UserError
from jobs.core.files import require_space
from jobs.data.formats import File, Problems, files_in, names_of, read_rows, to_jsonl
from jobs.data.records import RECORDS, Values, content_of, lengths_of, question_of, shape_of

if TYPE_CHECKING:
    import numpy as np

    Numbers = np.ndarray[Any, np.dtype[np.int64]]

TRAIN, VALIDATION, HOLDOUT = SPLITS = ("train", "validation", "holdout")
STATISTICS = "statistics.json"
DIGEST_BYTES = 16  # 128 bits: among a billion records, two share one with probability below 2e-21
PARTS = ("prompt", "completion")


@dataclass
class _Overview:
    """What the first pass finds in the records."""

    records: int = 0
    size: int = 0  # bytes to write
    splits: bool = False  # whether any record names its split, or its group
    groups: bool = False
    validation: bool = False  # whether any record names `validation` as its split

    @property
    def split_by(self) -> str:
        if self.splits:
            return "the records"
        return "hash of the group, without one of the prompt" if self.groups else "hash of the prompt"


class _Digests:
    """The digests of a property of the records, such as their questions, to find those that have the same."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._records = array("q")

    def add(self, digest: bytes, record: int) -> None:
        self._bytes += digest[:DIGEST_BYTES]
        self._records.append(record)

    def first(self) -> tuple[Numbers, Numbers]:
        """Each record, in order, and the first record that has the same property."""
        import numpy as np

        digests, records = np.frombuffer(self._bytes, f"S{DIGEST_BYTES}"), np.frombuffer(self._records, np.int64)
        order = np.argsort(digests, kind="stable")  # those that are equal stay in the order of the records
        ordered = digests[order]
        starts = np.flatnonzero(np.concatenate([np.ones(min(1, len(order)), dtype=bool), ordered[1:] != ordered[:-1]]))
        first = np.empty_like(order)
        first[order] = np.repeat(order[starts], np.diff(starts, append=len(order)))
        return records, records[first]


@dataclass
class _Table:
    """What is kept of each record, by its number: the split, and the place."""

    files: list[File]
    splits: bytearray = field(default_factory=bytearray)  # numbers in SPLITS
    numbers: array[int] = field(default_factory=lambda: array("i"))  # of the files
    lines: array[int] = field(default_factory=lambda: array("q"))
    questions: _Digests = field(default_factory=_Digests)
    groups: _Digests = field(default_factory=_Digests)
    contents: _Digests = field(default_factory=_Digests)

    def place(self, record: int) -> str:
        return self.files[self.numbers[record]].place(self.lines[record])

    def duplicates(self) -> int:
        """How many records have the content of one before."""
        records, first = self.contents.first()
        return int((records != first).sum())

    def group_counts(self) -> Counter[str]:
        """The groups of each split."""
        import numpy as np

        return Counter(SPLITS[self.splits[record]] for record in np.unique(self.groups.first()[1]))

    def leaks(self, digests: _Digests) -> Iterator[tuple[int, int]]:
        """The records that are in another split than the first that has the same property; and that first one."""
        import numpy as np

        splits = np.frombuffer(self.splits, np.uint8)
        records, first = digests.first()
        for n in np.flatnonzero(splits[records] != splits[first]):
            yield int(records[n]), int(first[n])


def validate(path: Path, holdout: float, validation: float = 0) -> dict[str, Any]:
    """Check a file or folder of records as the relocation does, writing nothing. Returns the statistics.

    Raises:
        UserError: with the first ten problems and how many there are.
    """
    return split(files_in(path), holdout, None, validation)


def split(files: list[File], holdout: float, folder: Path | None, validation: float = 0) -> dict[str, Any]:
    """Validate the records of `files` and divide them into `folder`/train.jsonl, holdout.jsonl and, where there is any,
    validation.jsonl, in their order.

    If any record names its `split`, those that do not are for training. Otherwise a share of `holdout` is kept from
    training. Unless a record names the validation split, so is a share of `validation`. The hash of a record's `group`
    decides, or of its prompt where it has none: the same group or prompt is always in the same split, whatever else is
    in the data.

    Args:
        folder: where to write; None only checks.
    Returns:
        the statistics, which are also written to `folder`/statistics.json.
    Raises:
        UserError: with the first ten problems and how many there are; or when a split is empty.
    """
    problems = Problems()
    overview = _survey(files, problems)
    problems.raise_if_any()
    if not overview.records:
        raise UserError(f"{names_of(files)}: no records")
    if folder:
        require_space(folder, overview.size)

    names = [name for name in SPLITS if name != VALIDATION or validation or overview.validation]
    counts: Counter[str] = Counter()
    shapes: Counter[str] = Counter()
    lengths = {(name, part): array("q") for name in names for part in PARTS}
    table = _Table(files)
    with ExitStack() as stack:
        sinks = {name: stack.enter_context((folder / f"{name}.jsonl").open("wb")) for name in names} if folder else {}
        for record, (number, line, values) in enumerate(read_rows(files, RECORDS, problems)):
            question = hashlib.sha256(question_of(values).encode()).digest()
            group = hashlib.sha256(values["group"].encode()).digest() if "group" in values else None
            name = _split_of(values, group or question, overview, holdout, validation)
            content = content_of(values)
            table.splits.append(SPLITS.index(name))
            table.numbers.append(number)
            table.lines.append(line)
            table.contents.add(hashlib.sha256(to_jsonl(content)).digest(), record)
            if group:
                table.groups.add(group, record)
            # By hash of the prompt alone the same question cannot be in two splits: nothing to remember.
            if overview.splits or overview.groups:
                table.questions.add(question, record)
            counts[name] += 1
            shapes[shape_of(values)] += 1
            for part, length in zip(PARTS, lengths_of(values), strict=True):
                if length is not None:
                    lengths[name, part].append(length)
            if folder:
                sinks[name].write(to_jsonl(_as_written(values)))
    _find_leaks(table, problems, overview)
    problems.raise_if_any()
    _require_all(names, files, counts, {HOLDOUT: holdout, VALIDATION: validation}, overview)
    grouped = table.group_counts()
    facts = {
        "records": {name: counts[name] for name in names},
        "groups": {name: grouped[name] for name in names},
        "split_by": overview.split_by,
        "duplicates": table.duplicates(),
        "shapes": dict(shapes),
        "characters": {name: {part: _spread(lengths[name, part]) for part in PARTS if lengths[name, part]}
                       for name in names},
    }
    if folder:
        (folder / STATISTICS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return facts


def _survey(files: list[File], problems: Problems) -> _Overview:
    overview = _Overview()
    for _, _, record in read_rows(files, RECORDS, problems):
        overview.records += 1
        overview.size += len(to_jsonl(_as_written(record)))
        overview.splits = overview.splits or "split" in record
        overview.groups = overview.groups or "group" in record
        overview.validation = overview.validation or record.get("split") == VALIDATION
    return overview


def _split_of(record: Mapping[str, Any], digest: bytes, overview: _Overview, holdout: float, validation: float) -> str:
    """The split of a record: the one that it names, or by `digest`, that of its group or question."""
    position = int.from_bytes(digest[:8], "big") / 2**64
    if overview.splits:
        named = str(record.get("split", TRAIN))
        return VALIDATION if named == TRAIN and not overview.validation and position < validation else named
    return HOLDOUT if position < holdout else VALIDATION if position < holdout + validation else TRAIN


def _find_leaks(table: _Table, problems: Problems, overview: _Overview) -> None:
    """Add the groups and the questions that are in two splits to `problems`, in the order of the records."""
    remedy = "" if overview.splits else ". Give both the same `group`"
    groups = ((record, f"its `group` is at {table.place(first)} in the other split; a group must be in one split")
              for record, first in table.leaks(table.groups))
    questions = ((record, f"the same prompt is at {table.place(first)} in the other split; the holdout would "
                          f"measure what was trained on{remedy}") for record, first in table.leaks(table.questions))
    for record, message in heapq.merge(groups, questions, key=lambda problem: problem[0]):
        problems.add(table.place(record), message)


def _as_written(record: Mapping[str, Any]) -> Values:
    """The record as the artifact holds it. It keeps its group; its split is the file that it is in."""
    return content_of(record) | ({"group": record["group"]} if "group" in record else {})


def _spread(lengths: array[int]) -> dict[str, float]:
    import numpy as np

    ordered = np.sort(np.frombuffer(lengths, np.int64))
    low, high = int(ordered[(len(ordered) - 1) // 2]), int(ordered[len(ordered) // 2])
    return {"min": int(ordered[0]), "median": high if len(ordered) % 2 else (low + high) / 2, "max": int(ordered[-1])}


def _require_all(names: list[str], files: list[File], counts: Mapping[str, int], shares: Mapping[str, float],
                 overview: _Overview) -> None:
    """Raise `UserError` for a split that is desired and empty."""
    for name in sorted(names, key=[HOLDOUT, VALIDATION, TRAIN].index):
        if counts[name]:
            continue
        if overview.splits:
            share = shares[VALIDATION]
            reason = f", though `dataset.validation` is {share}: raise it, or" if name == VALIDATION else ":"
            raise UserError(f"{names_of(files)}: {overview.records} records, but none for `{name}`{reason} set "
                            f'"split": "{name}" in some, or remove `split` from all')
        # Of a share that is too large, too little is left to train on.
        change, key = ("Lower", HOLDOUT) if name == TRAIN else ("Raise", name)
        raise UserError(f"{names_of(files)}: {overview.records} records, and the hash puts none into {name} at {key} "
                        f"{shares[key]}. {change} `dataset.{key}`, add records, or set `split` in the records")
