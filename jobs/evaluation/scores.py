"""The scores artifacts: which model each is of, measuring those that are missing, and their files.

A scores artifact keeps what one model was measured as on one dataset: `scores.json`, the values of each record and
sentence (`records.jsonl`, `sentences.jsonl`), the answers (`generations.jsonl`) and, of a model that may be served, its
proof (`proof.json`). Models that share their weights
are measured with one load: the base model alone, then with each adapter.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.core import artifacts, models
from jobs.core.artifacts import Spec
from jobs.core.imports import fast_imports
from jobs.core.metrics import PRIVACY
from jobs.core.proof import FILE as PROOF
from jobs.core.signing import Signer
from jobs.data import encoded
from jobs.evaluation import proof, scoring
from jobs.evaluation.scoring import Material, Measured

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jobs.evaluation.privacy import Subjects

    ReadPrivacy = Callable[[PreTrainedTokenizerBase], Subjects]

SUMMARY = "scores.json"
GENERATIONS = "generations.jsonl"


@dataclass(frozen=True)
class ScoredModel:
    """A model that is measured, and the artifact that keeps its scores. Paths are folders, but `encoded`."""

    name: str  # as logs and reports have it
    scores: Spec
    model: Path
    tokenizer: Path
    adapter: Path | None = None  # what is added to the model; None: it is measured as it is
    encoded: Path | None = None  # the held-out records as the encoding job has them; None: measuring encodes them
    template: Mapping[str, Any] = field(default_factory=dict)  # arguments of the chat template
    inputs: Sequence[Spec] = ()  # what must be there before it can be measured
    private: bool = False  # privacy is measured of it, if of any
    base_scores: Path | None = None  # with which its privacy is compared; None for a base model itself
    prove: bool = False  # it may be served: keep the answers by which the server knows it

    def vocabulary(self, volumes: Path) -> str:
        """The digest of its tokens (`scoring.vocabulary`), from its scores if they are there."""
        if self.scores.path(volumes).exists():
            return str(read_summary(self.scores.path(volumes))["vocabulary"])
        return scoring.vocabulary(models.load_tokenizer(self.tokenizer))


def measure(scored: Iterable[ScoredModel], material: Material, volumes: Path, *, keep: int, adapter_name: str,
            privacy: ReadPrivacy | None = None, signer: Signer | None = None) -> None:
    """Measure each of these models whose scores are not there yet, and publish its scores.

    Args:
        scored: a base model before what is compared with it.
        material: what they are measured on; encoded data and template arguments are each model's own.
        keep, adapter_name, signer: as for `artifacts.publish`.
        privacy: reads what privacy is measured on, with a tokenizer; None: it is not measured.
    Raises:
        UserError: a model or an adapter cannot be loaded, or no record can be measured.
    """
    load_tokenizer = functools.cache(models.load_tokenizer)
    read_privacy = functools.cache(privacy) if privacy else None
    by_model: dict[Path, list[ScoredModel]] = defaultdict(list)
    for each in scored:
        by_model[each.model].append(each)
    for folder, group in by_model.items():
        model: Any = models.load_model(folder)
        for each in sorted(group, key=lambda each: each.adapter is not None):  # an adapter, once loaded, stays
            tokenizer = load_tokenizer(each.tokenizer)
            models.check_vocabulary(model, tokenizer, str(each.tokenizer))
            if each.adapter is not None:
                model = _with_adapter(model, each.adapter)
            own = dataclasses.replace(material, template=each.template,
                                      encoded=encoded.Split(each.encoded) if each.encoded else None)
            fill = functools.partial(_fill, each, model, tokenizer, own, read_privacy if each.private else None)
            artifacts.publish(each.scores, volumes, fill, keep=keep, adapter_name=adapter_name, signer=signer)
        del model, fill  # two models at once may not fit
        _free_memory()


def _fill(scored: ScoredModel, model: Any, tokenizer: PreTrainedTokenizerBase, material: Material,
          privacy: ReadPrivacy | None, draft: Path) -> dict[str, Any]:
    """What `artifacts.publish` calls to fill a scores artifact."""
    measured = scoring.measure(model, tokenizer, material, scored.name)
    if privacy is not None:
        before = scoring.read_jsonl(scored.base_scores / "privacy.jsonl") if scored.base_scores else None
        values = {"privacy": privacy(tokenizer).measure(model, scored.name, before)}
        measured = dataclasses.replace(measured, values={**measured.values, **values},
                                       summary={**measured.summary, **scoring.scores_of(values, [PRIVACY])})
    write(draft, measured)
    if scored.prove and (found := proof.record(model, tokenizer, material)):
        (draft / PROOF).write_text(found.to_json(), encoding="utf-8")
    return {"model": scored.name}


def _with_adapter(model: Any, adapter: Path) -> Any:
    """The model with this adapter, and no other, switched on. One that is loaded already stays, switched off."""
    with fast_imports():
        from peft import PeftModel

    name = adapter.name
    try:
        if isinstance(model, PeftModel):
            model.load_adapter(str(adapter), name)
        else:
            model = PeftModel.from_pretrained(model, str(adapter), name)
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # `models.gpu_memory` adds what to change
            raise
        raise models.loading_error(f"{adapter}: the adapter cannot be loaded", error) from error
    model.set_adapter(name)
    return model.eval()


def write(folder: Path, measured: Measured) -> None:
    """Write the files of a scores artifact."""
    text = json.dumps(measured.summary, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / SUMMARY).write_text(text + "\n", encoding="utf-8")
    write_jsonl(folder / GENERATIONS, measured.generations)
    for population, rows in measured.values.items():
        write_jsonl(folder / f"{population}.jsonl", rows)
    if measured.task_answers:
        write_jsonl(folder / "task_answers.jsonl", measured.task_answers)


def read(folder: Path, populations: Iterable[str]) -> Measured:
    """What `write` wrote, without the answers to tasks. A model may lack some populations: of the reference model,
    privacy is not measured."""
    values = {name: scoring.read_jsonl(file) for name in populations if (file := folder / f"{name}.jsonl").exists()}
    return Measured(read_summary(folder), values, scoring.read_jsonl(folder / GENERATIONS))


def read_summary(folder: Path) -> dict[str, Any]:
    """The scores and counts in the folder of a scores artifact."""
    summary: dict[str, Any] = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    return summary


def write_jsonl(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write records as JSONL, one a line."""
    with file.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
