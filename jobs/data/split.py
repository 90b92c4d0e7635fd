"""The split: validate every record and divide the data into train and holdout, so that nothing leaks.

Files are streamed, twice: once to find every problem and whether records name a split or a group, once to divide them.
Questions that read the same are always in the same split, and so are all records of a group.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from array import array
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.core.errors import UserError
from jobs.core.files import require_space
from jobs.data.formats import File, Problems, files_in, names_of, read_rows, to_jsonl
from jobs.data.records import RECORDS, Values, content_of, lengths_of, question_of, shape_of

TRAIN, HOLDOUT, STATISTICS = "train.jsonl", "holdout.jsonl", "statistics.json"
PARTS = ("prompt", "completion")


@dataclass
class _Overview:
    """What the first pass finds in the records."""

    records: int = 0
    size: int = 0  # bytes to write
    splits: bool = False  # whether any record names its split, or its group
    groups: bool = False

    @property
    def split_by(self) -> str:
        if self.splits:
            return "the records"
        return "hash of the group, without one of the prompt" if self.groups else "hash of the prompt"


@dataclass
class _Places:
    """For each question or group, by its digest: the split it is in, and where it is first (file number, line)."""

    files: list[File]
    first: dict[bytes, tuple[str, int, int]] = field(default_factory=dict)

    def in_other(self, digest: bytes, side: str, number: int, line: int) -> str | None:
        """Where the same one is in the other split; None if it is not."""
        other, first_number, first_line = self.first.setdefault(digest[:16], (side, number, line))
        return None if other == side else self.files[first_number].place(first_line)


def validate(path: Path, holdout: float) -> dict[str, Any]:
    """Check a file or folder of records as the relocation does, writing nothing. Returns the statistics.

    Raises:
        UserError: with the first ten problems and how many there are.
    """
    return split(files_in(path), holdout, None)


def split(files: list[File], holdout: float, folder: Path | None) -> dict[str, Any]:
    """Validate the records of `files` and divide them into `folder`/train.jsonl and holdout.jsonl, in their order.

    If any record names its `split`, those that do not are for training. Otherwise a share of `holdout` is held out, by
    hash of the record's `group`, or of its prompt where it has none: the same group or prompt is always in the same
    split, whatever else is in the data.

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

    counts: Counter[str] = Counter()
    shapes: Counter[str] = Counter()
    lengths = {(side, part): array("L") for side in (TRAIN, HOLDOUT) for part in PARTS}
    questions, groups = _Places(files), _Places(files)
    seen: set[bytes] = set()
    with ExitStack() as stack:
        sinks = {side: stack.enter_context((folder / side).open("wb")) for side in (TRAIN, HOLDOUT)} if folder else {}
        for number, line, record in read_rows(files, RECORDS, problems):
            question = hashlib.sha256(question_of(record).encode()).digest()
            group = hashlib.sha256(record["group"].encode()).digest() if "group" in record else None
            side = _side(record, group or question, overview, holdout)
            place = files[number].place(line)
            if group and (other := groups.in_other(group, side, number, line)):
                problems.add(place, f"its `group` is at {other} in the other split; a group must be in one split")
            # By hash of the prompt alone the same question cannot be in both splits: nothing to remember.
            if (overview.splits or overview.groups) and (other := questions.in_other(question, side, number, line)):
                remedy = "" if overview.splits else ". Give both the same `group`"
                problems.add(place, f"the same prompt is at {other} in the other split; the holdout would measure "
                             f"what was trained on{remedy}")
            content = content_of(record)
            counts[side] += 1
            shapes[shape_of(record)] += 1
            seen.add(hashlib.sha256(to_jsonl(content)).digest()[:16])
            for part, length in zip(PARTS, lengths_of(record), strict=True):
                if length is not None:
                    lengths[side, part].append(length)
            if folder:
                sinks[side].write(to_jsonl(_as_written(record)))
    problems.raise_if_any()
    _require_both(files, counts, holdout, overview)
    grouped = Counter(side for side, *_ in groups.first.values())
    facts = {
        "records": {Path(side).stem: counts[side] for side in (TRAIN, HOLDOUT)},
        "groups": {Path(side).stem: grouped[side] for side in (TRAIN, HOLDOUT)},
        "split_by": overview.split_by,
        "duplicates": overview.records - len(seen),
        "shapes": dict(shapes),
        "characters": {Path(side).stem: {part: _spread(lengths[side, part]) for part in PARTS if lengths[side, part]}
                       for side in (TRAIN, HOLDOUT)},
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
    return overview


def _side(record: Mapping[str, Any], digest: bytes, overview: _Overview, holdout: float) -> str:
    """The split of a record: the one that it names, or by `digest`, that of its group or question."""
    if overview.splits:
        return HOLDOUT if record.get("split") == "holdout" else TRAIN
    return HOLDOUT if int.from_bytes(digest[:8], "big") / 2**64 < holdout else TRAIN


def _as_written(record: Mapping[str, Any]) -> Values:
    """The record as the artifact holds it. It keeps its group; its split is the file that it is in."""
    return content_of(record) | ({"group": record["group"]} if "group" in record else {})


def _spread(lengths: array[int]) -> dict[str, float]:
    return {"min": min(lengths), "median": statistics.median(lengths), "max": max(lengths)}


def _require_both(files: list[File], counts: Mapping[str, int], holdout: float, overview: _Overview) -> None:
    for side, key in ((HOLDOUT, "holdout"), (TRAIN, "train")):
        if counts[side]:
            continue
        if overview.splits:
            raise UserError(f"{names_of(files)}: {overview.records} records, but none for `{key}`: set "
                            f'"split": "{key}" in some, or remove `split` from all')
        change = "Raise" if side == HOLDOUT else "Lower"
        raise UserError(f"{names_of(files)}: {overview.records} records, and the hash puts none into {key} at holdout "
                        f"{holdout}. {change} `dataset.holdout`, add records, or set `split` in the records")
