"""Promotion: the pointer to the adapter that clients get. Only an evaluation that passed its gate moves it.

`<fine-tuned volume>/promoted/<adapter>` is a small JSON file, replaced atomically; every move is a line in
`promoted/<adapter>.history.jsonl`. JSON and not a link: it also carries the evaluation that proved the adapter, and
cannot point outside the volume.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from jobs.core.errors import UserError
from jobs.core.files import append_line, read_plain_file, write_atomically
from jobs.core.locks import hold

FOLDER = "promoted"
POINTER_BYTES = 64 * 2**10  # a pointer has about 130
HISTORY_BYTES = 2**20  # the last 7000 promotions
LOCK_SECONDS = 60  # it is held while an evaluation is written: a second or two
DIGEST = re.compile("[0-9a-f]{16}")


@dataclass(frozen=True)
class Promotion:
    """Which adapter artifact is promoted under a name, and the evaluation artifact whose gate it passed."""

    adapter: str
    evaluation: str
    at: str  # UTC, ISO 8601


def current(volume: Path, name: str) -> Promotion | None:
    """What is promoted under `name` in the fine-tuned model's volume; None when nothing ever was.

    Raises:
        UserError: when the pointer is damaged.
        OSError: when it cannot be read; `filename` is set.
    """
    file = volume / FOLDER / name
    hint = "Remove it and run the evaluation again"
    try:
        return _parse(read_plain_file(file, POINTER_BYTES))
    except FileNotFoundError:
        return None
    except UserError as error:
        raise UserError(f"{error}: the promotion is damaged. {hint}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{file}: the promotion is damaged ({error}). {hint}") from None


def history(volume: Path, name: str) -> list[Promotion]:
    """The last promotions under `name`, newest first.

    A line that cannot be parsed is skipped, since it proves nothing. What is not a plain file holds no promotions;
    `promote` reports it.

    Raises:
        OSError: when the file cannot be read; `filename` is set.
    """
    file = volume / FOLDER / f"{name}.history.jsonl"
    try:
        lines = read_plain_file(file, HISTORY_BYTES, tail=True).splitlines()
    except (FileNotFoundError, UserError):
        return []
    promotions = []
    for line in reversed(lines):
        try:
            promotions.append(_parse(line))
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return promotions


def _parse(text: bytes) -> Promotion:
    values = json.loads(text)
    promotion = Promotion(str(values["adapter"]), str(values["evaluation"]), str(values["at"]))
    for digest in (promotion.adapter, promotion.evaluation):
        if not DIGEST.fullmatch(digest):  # it becomes a part of a path
            raise ValueError(f"{digest!r} is not a digest")
    return promotion


def promote(volume: Path, name: str, adapter: str, evaluation: str) -> bool:
    """Point `name` at an adapter artifact. Returns False when it already points there.

    Raises:
        UserError: when the pointer is damaged, or the history is not a plain file.
        RetryableError: when another evaluation does not finish its promotion.
    """
    with lock(volume, name):
        return move(volume, name, adapter, evaluation)


@contextmanager
def lock(volume: Path, name: str) -> Iterator[None]:
    """Hold the lock of a name's promotion: meanwhile nobody else promotes an adapter under it.

    Raises:
        RetryableError: when another evaluation does not finish its promotion.
    """
    folder = volume / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with hold(folder / f".lock-{name}", LOCK_SECONDS, f"promotes {name}"):
        yield


def move(volume: Path, name: str, adapter: str, evaluation: str) -> bool:
    """As `promote`, for a caller that holds the lock."""
    before = current(volume, name)
    if before and (before.adapter, before.evaluation) == (adapter, evaluation):
        return False
    now = Promotion(adapter, evaluation, datetime.now(UTC).isoformat(timespec="seconds"))
    append_line(volume / FOLDER / f"{name}.history.jsonl",
                json.dumps(asdict(now) | {"before": before.adapter if before else None}))
    write_atomically(volume / FOLDER / name, json.dumps(asdict(now)) + "\n")
    return True


def promoted_digests(volume: Path) -> set[str]:
    """The digests of every promoted adapter and of the evaluation behind it.

    Raises:
        UserError, OSError: when a pointer is damaged or cannot be read.
    """
    folder = volume / FOLDER
    names = [p.name for p in folder.iterdir() if "." not in p.name] if folder.is_dir() else []
    promotions = [current(volume, name) for name in names]
    return {digest for p in promotions if p for digest in (p.adapter, p.evaluation)}
