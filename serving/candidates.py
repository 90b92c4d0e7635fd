"""Which adapters may answer under a name: the one that the pipeline file desires, and those that were promoted.

Finds candidates only; serving/verification.py decides whether one is fit.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from jobs.core import artifacts, promotion
from jobs.core.errors import UserError
from jobs.core.pipeline import Pipeline
from jobs.core.plan import FINE_TUNED_VOLUME, plan
from serving.refusal import NotYet, Refused, one_line

Read = TypeVar("Read")
DIGEST = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Candidate:
    """An adapter that may be served under a name, and the evaluation that has to have passed it (digests)."""

    adapter: str
    evaluation: str


def pipeline_files(folder: Path) -> list[Path]:
    """The pipeline files in a folder of pipeline folders, sorted. Hidden folders are Kubernetes' own (`..data`)."""
    return sorted(p for p in folder.glob("*/pipeline.yaml") if not p.parent.name.startswith("."))


def desired(pipeline: Pipeline) -> Candidate:
    """The adapter that the pipeline file desires, whether or not it exists."""
    named = plan(pipeline)
    return Candidate(named.adapter.digest, named.evaluation.digest)


def promoted(name: str, volumes: Path) -> Candidate:
    """The adapter that was promoted last under a name.

    Raises:
        NotYet: when none ever was.
        Refused: when the promotion is damaged or cannot be read.
    """
    current = _read_promotion(_pointer(name, volumes), lambda: promotion.current(volumes / FINE_TUNED_VOLUME, name))
    if current is None:
        raise NotYet(f"no adapter was promoted as {name} yet")
    return Candidate(current.adapter, current.evaluation)


def earlier(name: str, volumes: Path) -> list[Candidate]:
    """The adapters that were promoted under a name before the last one, newest first.

    Raises:
        Refused: when the history is damaged or cannot be read.
    """
    file = _pointer(name, volumes).with_name(f"{name}.history.jsonl")
    history = _read_promotion(file, lambda: promotion.history(volumes / FINE_TUNED_VOLUME, name)) or []
    return list(dict.fromkeys(Candidate(each.adapter, each.evaluation) for each in history))


def proved_at(name: str, candidate: Candidate, volumes: Path) -> float:
    """When (Unix time) the adapter could be served at the earliest: its evaluation was published, or it was promoted.

    Raises:
        OSError: when the volume does not say.
    """
    times = [(evaluation_folder(candidate.evaluation, volumes) / artifacts.MANIFEST).stat().st_mtime]
    with suppress(NotYet, Refused):
        if promoted(name, volumes).adapter == candidate.adapter:
            times.append(_pointer(name, volumes).stat().st_mtime)
    return max(times)


def _pointer(name: str, volumes: Path) -> Path:
    return volumes / FINE_TUNED_VOLUME / promotion.FOLDER / name


def _read_promotion(file: Path, read: Callable[[], Read]) -> Read | None:
    """What `read` reads from `file`, where promotions are recorded; None if there is no such file.

    Whatever lies there, it is a refusal at worst: the pipeline file is followed all the same.
    """
    try:
        return read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Refused("unreadable", f"{file}: {error.strerror or error}") from None
    except Exception as error:
        message = str(error) if isinstance(error, UserError) else f"{file} is damaged ({error!r})"
        raise Refused("damaged", one_line(message)) from None


def adapter_folder(digest: str, volumes: Path) -> Path:
    """Where the adapter is, or will be. Raises `Refused` for what is no digest."""
    return _artifact_folder("adapter", digest, volumes)


def evaluation_folder(digest: str, volumes: Path) -> Path:
    """Where the evaluation is, or will be. Raises `Refused` for what is no digest."""
    return _artifact_folder("evaluation", digest, volumes)


def _artifact_folder(kind: str, digest: str, volumes: Path) -> Path:
    if not DIGEST.fullmatch(digest):  # it may come from a file: never let it name a path
        raise Refused("damaged", f"{digest!r} is not a digest")
    return volumes / FINE_TUNED_VOLUME / kind / digest
