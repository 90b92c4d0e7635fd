"""The scores artifacts: which model each is of, measuring those that are missing, and their files.

A scores artifact keeps what one model was measured as on one dataset: `scores.json`, the values of each record and
sentence (`records.jsonl`, `sentences.jsonl`) and the answers (`generations.jsonl`). Models that share their weights
are measured with one load: the base model alone, then with each adapter.
"""

from __future__ import annotations

import dataclasses
import gc
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from jobs.core import artifacts, models
from jobs.core.artifacts import Spec
from jobs.core.metrics import Population
from jobs.data import encoded
from jobs.evaluation import scoring
from jobs.evaluation.scoring import Material, Measured

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUMMARY = "scores.json"
GENERATIONS = "generations.jsonl"


@dataclass(frozen=True)
class Subject:
    """A model that is measured, and the artifact that keeps its scores. Paths are folders, but `encoded`."""

    name: str  # as logs and reports have it
    scores: Spec
    model: Path
    tokenizer: Path
    adapter: Path | None = None  # what is added to the model; None: it is measured as it is
    encoded: Path | None = None  # the held-out records as the encoding job has them; None: measuring encodes them
    template: Mapping[str, Any] = field(default_factory=dict)  # arguments of the chat template
    inputs: Sequence[Spec] = ()  # what must be there before it can be measured

    def vocabulary(self, volumes: Path) -> str:
        """The digest of its tokens (`scoring.vocabulary`), from its scores if they are there."""
        if self.scores.path(volumes).exists():
            return str(read(self.scores.path(volumes)).summary["vocabulary"])
        return scoring.vocabulary(models.load_tokenizer(self.tokenizer))


def measure(subjects: Iterable[Subject], material: Material, volumes: Path, *, keep: int, adapter_name: str) -> None:
    """Measure each of these models whose scores are not there yet, and publish its scores.

    Args:
        material: what they are measured on; encoded data and template arguments are each subject's own.
        keep, adapter_name: as for `artifacts.publish`.
    Raises:
        UserError: a model or an adapter cannot be loaded, or no record can be measured.
    """
    by_model: dict[Path, list[Subject]] = defaultdict(list)
    for subject in subjects:
        by_model[subject.model].append(subject)
    for folder, group in by_model.items():
        _measure_one_model(folder, group, material, volumes, keep, adapter_name)
        _free_memory()  # two models at once may not fit


def _measure_one_model(folder: Path, subjects: Sequence[Subject], material: Material, volumes: Path, keep: int,
                       adapter_name: str) -> None:
    """Measure the model as it is, if that is asked for, and then with one adapter at a time."""
    model: Any = models.load_model(folder)
    tokenizers: dict[Path, PreTrainedTokenizerBase] = {}
    for subject in sorted(subjects, key=lambda each: each.adapter is not None):  # an adapter, once loaded, stays
        if subject.tokenizer not in tokenizers:
            tokenizers[subject.tokenizer] = models.load_tokenizer(subject.tokenizer)
            models.check_vocabulary(model, tokenizers[subject.tokenizer], str(subject.tokenizer))
        if subject.adapter is not None:
            model = _with_adapter(model, subject.adapter)
        own = dataclasses.replace(material, template=subject.template,
                                  encoded=encoded.Split(subject.encoded) if subject.encoded else None)

        def fill(draft: Path, subject: Subject = subject, own: Material = own) -> dict[str, Any]:
            write(draft, scoring.measure(model, tokenizers[subject.tokenizer], own, subject.name))  # noqa: B023
            return {"model": subject.name}

        artifacts.publish(subject.scores, volumes, fill, keep=keep, adapter_name=adapter_name)


def _with_adapter(model: Any, adapter: Path) -> Any:
    """The model with this adapter, and no other, switched on. One that is loaded already stays, switched off."""
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


def read(folder: Path) -> Measured:
    """What `write` wrote."""
    return Measured(json.loads((folder / SUMMARY).read_text(encoding="utf-8")),
                    {name: scoring.read_jsonl(folder / f"{name}.jsonl") for name in get_args(Population)},
                    scoring.read_jsonl(folder / GENERATIONS))


def write_jsonl(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write records as JSONL, one a line."""
    with file.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
