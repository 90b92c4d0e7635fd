"""Promotion: the pointer that says which adapter clients get. Only the evaluation gate moves it.

`<fine-tuned volume>/promoted/<adapter>` is a small JSON file, replaced atomically; every move is a line in
`promoted/<adapter>.history.jsonl`. JSON and not a link: it also carries the evaluation that proved the adapter, and
cannot point outside the volume.
"""

from __future__ import annotations

import json
import stat
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from jobs.core.errors import UserError
from jobs.core.files import write_atomically

FOLDER = "promoted"


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
    """
    file = volume / FOLDER / name
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # a pipe would be waited for in vain
            raise ValueError("it is no plain file")
        values = json.loads(file.read_bytes())
        return Promotion(str(values["adapter"]), str(values["evaluation"]), str(values["at"]))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{file}: the promotion is damaged ({error}). Remove it and run the evaluation again") from None


def history(volume: Path, name: str) -> list[Promotion]:
    """Every promotion under `name`, newest first. A line that cannot be read is passed over: it proves nothing."""
    try:
        lines = (volume / FOLDER / f"{name}.history.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    promotions = []
    for line in reversed(lines):
        try:
            values = json.loads(line)
            promotions.append(Promotion(str(values["adapter"]), str(values["evaluation"]), str(values["at"])))
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return promotions


def promote(volume: Path, name: str, adapter: str, evaluation: str) -> bool:
    """Point `name` at an adapter artifact. Returns False when it already points there."""
    before = current(volume, name)
    if before and (before.adapter, before.evaluation) == (adapter, evaluation):
        return False
    folder = volume / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    now = Promotion(adapter, evaluation, datetime.now(UTC).isoformat(timespec="seconds"))
    with (folder / f"{name}.history.jsonl").open("a", encoding="utf-8") as history:
        history.write(json.dumps(asdict(now) | {"before": before.adapter if before else None}) + "\n")
    write_atomically(folder / name, json.dumps(asdict(now)) + "\n")
    return True


def promoted_digests(volume: Path) -> set[str]:
    """The digests of every promoted adapter and of the evaluation behind it."""
    folder = volume / FOLDER
    names = [p.name for p in folder.iterdir() if "." not in p.name] if folder.is_dir() else []
    promotions = [current(volume, name) for name in names]
    return {digest for p in promotions if p for digest in (p.adapter, p.evaluation)}
