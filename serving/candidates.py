"""The adapters that may be served under a name: the one that the pipeline file desires, and the promoted ones.

This module only finds them; serving/verification.py decides whether one may be served.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from jobs.core import artifacts, imported, promotion
from jobs.core.errors import UserError
from jobs.core.imported import Adapter, ImportedAdapter
from jobs.core.plan import FINE_TUNED_VOLUME, deciding_evaluation, plan, plan_import
from jobs.core.promotion import DIGEST
from serving.refusal import NotYet, Refused, one_line

Read = TypeVar("Read")


@dataclass(frozen=True)
class Candidate:
    """An adapter, and the evaluation whose gate it must have passed (digests)."""

    adapter: str
    evaluation: str


def desired(pipeline: Adapter, volumes: Path) -> Candidate:
    """The adapter that the pipeline file desires: a trained one whether or not it exists, an imported one when it is
    on the volume, where its relocation recorded which it is.

    Raises:
        NotYet: the imported adapter is not there yet.
        Refused: what its relocation recorded is damaged or cannot be read.
    """
    if not isinstance(pipeline, ImportedAdapter):
        named = plan(pipeline)
        return Candidate(named.adapter.digest, named.evaluation.digest)
    folder = plan_import(pipeline).imported_adapter.path(volumes)
    found = _read_from_volume(folder, lambda: imported.read(folder, FINE_TUNED_VOLUME))
    if found is None:
        raise NotYet(f"the imported adapter {folder.name} is not there yet")
    return Candidate(found.adapter.digest, deciding_evaluation(pipeline, found).digest)


def promoted(name: str, volumes: Path) -> Candidate:
    """The adapter that was promoted last under a name.

    Raises:
        NotYet: when none ever was.
        Refused: when the promotion is damaged or cannot be read.
    """
    current = _read_from_volume(_pointer(name, volumes), lambda: promotion.current(volumes / FINE_TUNED_VOLUME, name))
    if current is None:
        raise NotYet(f"no adapter was promoted as {name} yet")
    return Candidate(current.adapter, current.evaluation)


def earlier(name: str, volumes: Path) -> list[Candidate]:
    """The adapters that were promoted under a name before the last one, newest first.

    Raises:
        Refused: when the history is damaged or cannot be read.
    """
    file = _pointer(name, volumes).with_name(f"{name}.history.jsonl")
    history = _read_from_volume(file, lambda: promotion.history(volumes / FINE_TUNED_VOLUME, name)) or []
    return list(dict.fromkeys(Candidate(each.adapter, each.evaluation) for each in history))


def in_order(name: str, pipeline: Adapter | None, volumes: Path) -> dict[Candidate, str]:
    """All candidates for a name, best first, and when each was promoted (ISO 8601; empty if it never was).

    First the one that the pipeline file desires, then the last promotion, then the earlier ones, newest first.
    A damaged promotion is skipped: the history has it too.

    Raises:
        OSError: when the volume cannot be read; a later attempt may succeed.
    """
    folder = volumes / FINE_TUNED_VOLUME
    recorded = promotion.history(folder, name)
    with suppress(UserError):
        if current := promotion.current(folder, name):
            recorded.insert(0, current)
    found: dict[Candidate, str] = {}
    if pipeline:
        with suppress(NotYet, Refused):
            found[desired(pipeline, volumes)] = ""
    for each in recorded:
        candidate = Candidate(each.adapter, each.evaluation)
        found[candidate] = found.get(candidate) or each.at
    return found


def proved_at(name: str, candidate: Candidate, volumes: Path) -> float:
    """When (Unix time) the adapter could be served at the earliest: its evaluation was published, or it was promoted.

    Raises:
        OSError: when the evaluation is not on the volume or cannot be read.
    """
    times = [(evaluation_folder(candidate.evaluation, volumes) / artifacts.MANIFEST).stat().st_mtime]
    with suppress(NotYet, Refused):
        if promoted(name, volumes).adapter == candidate.adapter:
            times.append(_pointer(name, volumes).stat().st_mtime)
    return max(times)


def _pointer(name: str, volumes: Path) -> Path:
    return volumes / FINE_TUNED_VOLUME / promotion.FOLDER / name


def _read_from_volume(file: Path, read: Callable[[], Read]) -> Read | None:
    """The result of `read`, which reads from `file` on the volume; None if there is no such file.

    Any damage is a refusal and not an error, so that the server still follows the pipeline file.
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
    """Where the adapter is, or will be. Raises `Refused` if `digest` is not a digest."""
    return _artifact_folder("adapter", digest, volumes)


def evaluation_folder(digest: str, volumes: Path) -> Path:
    """Where the evaluation is, or will be. Raises `Refused` if `digest` is not a digest."""
    return _artifact_folder("evaluation", digest, volumes)


def _artifact_folder(kind: str, digest: str, volumes: Path) -> Path:
    if not DIGEST.fullmatch(digest):  # it may come from a file and becomes a part of a path
        raise Refused("damaged", f"{digest!r} is not a digest")
    return volumes / FINE_TUNED_VOLUME / kind / digest
