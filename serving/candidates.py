"""Which adapters may answer under a name: the one that the pipeline file desires, and those that were promoted.

Finds candidates only; serving/verification.py decides whether one is fit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from jobs.core import artifacts, promotion
from jobs.core.errors import UserError
from jobs.core.pipeline import Pipeline
from jobs.core.plan import FINE_TUNED_VOLUME, plan
from serving.refusal import NotYet, Refused

DIGEST = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Candidate:
    """An adapter that may be served under a name, and the evaluation that has to have passed it (digests)."""

    adapter: str
    evaluation: str


def pipeline_files(folder: Path) -> list[Path]:
    """The pipeline files in a folder of pipeline folders, sorted. Hidden folders are Kubernetes' own (`..data`)."""
    return sorted(p for p in folder.glob("*/pipeline.yaml") if not p.parent.name.startswith("."))


def desired(pipeline: Pipeline, volumes: Path) -> Candidate:
    """The adapter that the pipeline file desires, whether or not it exists."""
    named = plan(pipeline)
    return Candidate(named.adapter.digest, named.evaluation.digest)


def promoted(pipeline: Pipeline, volumes: Path) -> Candidate:
    """The adapter that was promoted last under the pipeline's name.

    Raises:
        NotYet: when none ever was.
        Refused: when the promotion is damaged.
    """
    try:
        current = promotion.current(volumes / FINE_TUNED_VOLUME, pipeline.adapter)
    except UserError as error:
        raise Refused("damaged", str(error)) from None
    if current is None:
        raise NotYet(f"no adapter was promoted as {pipeline.adapter} yet")
    return Candidate(current.adapter, current.evaluation)


def earlier(pipeline: Pipeline, volumes: Path) -> list[Candidate]:
    """The adapters that were promoted under the pipeline's name before the last one, newest first."""
    history = promotion.history(volumes / FINE_TUNED_VOLUME, pipeline.adapter)
    return list(dict.fromkeys(Candidate(each.adapter, each.evaluation) for each in history))


def proved_at(name: str, candidate: Candidate, volumes: Path) -> float:
    """When (Unix time) the adapter could be served at the earliest: its evaluation was published, or it was promoted.

    Raises:
        OSError: when the volume does not say.
    """
    times = [(evaluation_folder(candidate.evaluation, volumes) / artifacts.MANIFEST).stat().st_mtime]
    pointer = volumes / FINE_TUNED_VOLUME / promotion.FOLDER / name
    current = promotion.current(volumes / FINE_TUNED_VOLUME, name)
    if current and current.adapter == candidate.adapter:
        times.append(pointer.stat().st_mtime)
    return max(times)


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
