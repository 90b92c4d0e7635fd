"""The promoted adapter, with which the rules `than: promoted` of the gate compare.

The evaluation's digest follows from the pipeline file alone and so cannot contain the promoted adapter: evaluation.json
names it. An evaluation that compared with an adapter that is no longer promoted is outdated and is made again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.core import artifacts, promotion
from jobs.core.errors import UserError
from jobs.core.pipeline import Pipeline
from jobs.core.plan import (
    BASE_MODEL_VOLUME,
    FINE_TUNED_VOLUME,
    TOKENIZER_VOLUME,
    Plan,
    merged_model,
    scores_of_adapter,
)
from jobs.data.split import HOLDOUT
from jobs.evaluation.scores import ScoredModel

ROLE = "promoted"


@dataclass(frozen=True)
class Comparison:
    """The adapter that rules compare with, or the reason why there is none."""

    adapter: str | None = None  # its digest
    reason: str | None = None


@dataclass(frozen=True)
class Promoted:
    """The promoted adapter as it is measured."""

    adapter: str  # its digest
    base_model: str  # the digest of what it was trained on
    scored: ScoredModel

    def to_json(self, name: str) -> dict[str, str]:
        """How evaluation.json names it."""
        return {"name": name, "digest": self.adapter, "base_model": self.base_model}


def comparison(pipeline: Pipeline, wanted: Plan, volumes: Path) -> Comparison:
    """The adapter that the gate compares this one with: the one that is promoted now. There is none for a first
    adapter, and none for one that was promoted before: a revert is an order, not a new adapter.

    Raises:
        UserError: the promotion is damaged.
        OSError: promotion or history cannot be read; `filename` is set.
    """
    if not any(rule.than == ROLE for _, rule in pipeline.evaluation.rules()):
        return Comparison(reason="no rule asks for it")
    volume, name = volumes / FINE_TUNED_VOLUME, pipeline.adapter
    current = promotion.current(volume, name)
    if current is None:
        return Comparison(reason=f"no adapter is promoted as {name} yet, so there is nothing to compare with")
    if current.adapter == wanted.adapter.digest:
        return Comparison(reason="this adapter is the promoted one, so there is nothing to compare with")
    before = next((each for each in promotion.history(volume, name) if each.adapter == wanted.adapter.digest), None)
    if before is not None:
        return Comparison(reason=f"this adapter was promoted before ({before.at}): a revert needs no comparison")
    return Comparison(current.adapter)


def outdated(evaluation: Mapping[str, Any], now: Comparison) -> bool:
    """Whether an evaluation must be made again: it compared with another adapter than it would now, or it rejected an
    adapter by a comparison that is no longer needed. The latter is no reason where the adapter passed."""
    compared = evaluation.get("promoted", {}).get("digest")
    return compared != now.adapter and not (now.adapter is None and evaluation["passed"])


def find(pipeline: Pipeline, wanted: Plan, volumes: Path, digest: str) -> Promoted:
    """The promoted adapter, verified, on the base model and tokenizer that it was trained with, and in the chat format
    in which it is served. In mode merged its merged model, if there is one.

    Raises:
        UserError: it is damaged or gone, or it must still be measured and what it was trained with is.
    """
    name, folder = f"{pipeline.adapter}@{digest}", volumes / FINE_TUNED_VOLUME / wanted.adapter.kind / digest
    pointer = volumes / FINE_TUNED_VOLUME / promotion.FOLDER / pipeline.adapter
    keys = pipeline.environment.trusted_keys
    manifest = _read(folder, name, f"Restore it, or remove {pointer} to compare with nothing", keys)
    base, tokenizer = str(manifest["inputs"]["base_model"]), str(manifest["inputs"]["tokenizer"])
    template = manifest["spec"].get("chat_template", {})
    # What it was trained on decides whether its privacy can be measured on this data; usually it is other data.
    private = all(manifest["inputs"].get(kind) == getattr(wanted, kind).digest
                  for kind in ("dataset", "encoded_dataset", "base_model"))
    encoded = (tokenizer, template) == (wanted.tokenizer.digest, pipeline.environment.chat_template)
    merged = merged_model(digest, base)
    is_merged = pipeline.environment.serving.mode == "merged" and merged.path(volumes).exists()
    scores = scores_of_adapter(wanted, digest, model=merged.digest if is_merged else base, tokenizer=tokenizer,
                               chat_template=template, encoded=encoded, private=private)
    model = merged.path(volumes) if is_merged else volumes / BASE_MODEL_VOLUME / wanted.base_model.kind / base
    tokenizer_folder = volumes / TOKENIZER_VOLUME / wanted.tokenizer.kind / tokenizer
    needed = {model, tokenizer_folder}
    # What the pipeline file desires too may still be on its way. Nothing would bring the others.
    awaited = [spec for spec in (wanted.base_model, wanted.tokenizer) if spec.path(volumes) in needed]
    if artifacts.find(scores, volumes, keys) is None:
        for path in needed.difference(spec.path(volumes) for spec in awaited):
            _read(path, name, "It was trained with that, and cannot be measured on this data without it. Relocate that "
                  "again (git revert brings it back), or take the rules `than: promoted` out for this change",
                  keys if is_merged and path == model else ())
    return Promoted(digest, base, ScoredModel(
        name, scores, model, tokenizer_folder, adapter=None if is_merged else folder, template=template,
        encoded=wanted.encoded_dataset.path(volumes) / f"{HOLDOUT}.arrow" if encoded else None,
        inputs=[*awaited, *([wanted.encoded_dataset] if encoded else [])], private=private,
        base_scores=wanted.base_scores.path(volumes), prove=True))


def _read(artifact: Path, name: str, advice: str, keys: Sequence[str]) -> Mapping[str, Any]:
    """The manifest of the promoted adapter, or of something that is needed to measure it; verified."""
    problem = f"evaluation.gate compares with {name}, which is promoted (than: promoted), but"
    if not artifact.exists():
        raise UserError(f"{problem} {artifact} is not there. {advice}. Nothing is promoted")
    try:
        return artifacts.read(artifact, keys).manifest
    except artifacts.NotSigned as error:
        raise UserError(f"{problem} {error}. {advice}. Nothing is promoted") from None
    except UserError as error:
        raise UserError(f"{problem} it is damaged: {error}. {advice}. Nothing is promoted") from None
