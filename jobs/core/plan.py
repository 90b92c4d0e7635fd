"""The plan: the artifacts that a pipeline file desires, named before anything runs.

Every digest follows from the pipeline file alone (and the recipe numbers below), so that a person, a stage, the local
runner and the serving guard all agree on names without talking to each other.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jobs.core.artifacts import Spec
from jobs.core.declarations import Source
from jobs.core.environment import Environment
from jobs.core.imported import Adapter, Imported, ImportedAdapter
from jobs.core.metrics import PRIVACY
from jobs.core.pipeline import ANSWERED_RECORDS, Pipeline, Training
from jobs.core.search import normalized
from jobs.core.sources import SCHEMES

# Bump a number when the code of that stage would give another result for the same settings: it renames the artifacts,
# so that old results are neither reused nor overwritten.
RECIPES = {"dataset": 2, "acceptability": 1, "encoded-dataset": 1, "base-model": 1, "tokenizer": 2,
           "reference-model": 1, "adapter": 2, "merged-model": 1, "scores": 3, "evaluation": 2,
           "tasks": 1, "embedded": 1,  # the embedded models' files
           "canaries": 1,  # what they read like
           "imported-adapter": 1}

DATASET_VOLUME = "dataset"
BASE_MODEL_VOLUME = "base-model"
TOKENIZER_VOLUME = "base-tokenizer"
REFERENCE_VOLUME = "reference-model"
FINE_TUNED_VOLUME = "fine-tuned-model"


@dataclass(frozen=True)
class EnvironmentPlan:
    """Every artifact of one environment."""

    base_model: Spec
    tokenizer: Spec
    reference_model: Spec

    def named(self) -> dict[str, Spec]:
        """The artifacts by the names that people type: `python -m jobs await base-model tokenizer`."""
        return {name.replace("_", "-"): spec for name, spec in vars(self).items()}


@dataclass(frozen=True)
class Plan(EnvironmentPlan):
    """Every artifact of one pipeline, with those of its environment."""

    dataset: Spec
    acceptability: Spec
    tasks: Spec  # always named; made only where there are tasks
    encoded_dataset: Spec  # of the base model's tokenizer
    adapter: Spec
    merged_model: Spec  # always named; made only in `serving: {mode: merged}`
    base_scores: Spec
    adapter_scores: Spec
    reference_scores: Spec
    evaluation: Spec


def plan_environment(environment: Environment) -> EnvironmentPlan:
    """Name every artifact that `environment` desires."""
    return EnvironmentPlan(
        Spec(BASE_MODEL_VOLUME, "base-model", _source("base-model", environment.base_model)),
        Spec(TOKENIZER_VOLUME, "tokenizer", _source("tokenizer", environment.tokenizer_source)),
        Spec(REFERENCE_VOLUME, "reference-model", _source("reference-model", environment.reference_model)))


@dataclass(frozen=True)
class ImportPlan(EnvironmentPlan):
    """The artifacts of an imported adapter that follow from its file, with those of its environment. Which adapter and
    which evaluation it is, the first of them says when it is there (jobs/core/imported.py)."""

    imported_adapter: Spec


@dataclass(frozen=True)
class EvaluatedImportPlan(ImportPlan):
    """As `ImportPlan`, for an imported adapter that is evaluated here: also what does not depend on the adapter."""

    dataset: Spec
    acceptability: Spec
    tasks: Spec
    encoded_dataset: Spec
    base_scores: Spec
    reference_scores: Spec


def plan_adapter(adapter: Adapter) -> Plan | ImportPlan:
    """Name every artifact that an adapter's file desires, as far as the file names it."""
    return plan_import(adapter) if isinstance(adapter, ImportedAdapter) else plan(adapter)


def plan_import(adapter: ImportedAdapter) -> ImportPlan:
    """Name what an imported adapter desires."""
    shared = plan_environment(adapter.environment)
    # Not the name under which it is served here: that changes nothing of what is fetched.
    imported = Spec(FINE_TUNED_VOLUME, "imported-adapter", _source("imported-adapter", adapter.published))
    here = adapter.evaluated_here
    if here is None:
        return ImportPlan(**vars(shared), imported_adapter=imported)
    known = {each.name for each in dataclasses.fields(EvaluatedImportPlan)}
    return EvaluatedImportPlan(**{name: spec for name, spec in vars(_make(here)).items() if name in known},
                               imported_adapter=imported)


def plan_evaluation(pipeline: Pipeline, adapter: Spec) -> Plan:
    """Name every artifact of the evaluation of an adapter that was trained elsewhere, on the data of `pipeline`."""
    return _make(pipeline, adapter)


def deciding_evaluation(adapter: ImportedAdapter, imported: Imported) -> Spec:
    """The evaluation by which an imported adapter is served: the one here, else the published one."""
    here = adapter.evaluated_here
    return plan_evaluation(here, imported.adapter).evaluation if here else imported.evaluation


def plan(pipeline: Pipeline) -> Plan:
    """Name every artifact that `pipeline` desires."""
    return _plan(_ByIdentity(pipeline))


@dataclass(frozen=True, eq=False)
class _ByIdentity:
    """A pipeline as a cache key, equal to itself only. It is immutable, and serving reads its plan often."""

    pipeline: Pipeline

    def __hash__(self) -> int:
        return id(self.pipeline)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByIdentity) and self.pipeline is other.pipeline


@functools.lru_cache(maxsize=1024)
def _plan(key: _ByIdentity) -> Plan:
    return _make(key.pipeline)


def _make(pipeline: Pipeline, adapter: Spec | None = None) -> Plan:
    """The plan of a pipeline, or, with another adapter than the one that it trains, of that one's evaluation."""
    training, privacy = pipeline.training, pipeline.evaluation.privacy
    dataset = Spec(DATASET_VOLUME, "dataset", {**_source("dataset", pipeline.dataset),
                                               "format": _suffix(pipeline.dataset),
                                               "holdout": pipeline.dataset.holdout,
                                               **({"validation": pipeline.dataset.validation}
                                                  if pipeline.dataset.validation else {})})
    acceptability = Spec(DATASET_VOLUME, "acceptability",
                         {**_source("acceptability", pipeline.evaluation.acceptability),
                          "format": _suffix(pipeline.evaluation.acceptability)})
    # One artifact for all, so that retention, which counts artifacts, never removes a part of what is desired. With the
    # dataset, because no task may ask what was trained on.
    tasks = Spec(DATASET_VOLUME, "tasks", {"recipe": RECIPES["tasks"], "tasks": [
        {**_identity(task), "format": _suffix(task), **task.identity(), **(
            {"lm_eval": {**_identity(task.lm_eval), "metric": task.lm_eval.metric}} if task.lm_eval else {})}
        for task in sorted(pipeline.evaluation.tasks, key=lambda task: task.name)]}, {"dataset": dataset.digest})
    shared = plan_environment(pipeline.environment)
    base_model, tokenizer, reference_model = shared.base_model, shared.tokenizer, shared.reference_model
    encoded_dataset = Spec(DATASET_VOLUME, "encoded-dataset",
                           {"recipe": RECIPES["encoded-dataset"], "max_length": training.max_length,
                            "chat_template": pipeline.environment.chat_template,
                            **({"canaries": {"recipe": RECIPES["canaries"], "count": privacy.canaries,
                                             "repetitions": privacy.repetitions}}
                               if privacy and privacy.canaries else {})},
                           {"dataset": dataset.digest, "tokenizer": tokenizer.digest})
    adapter = adapter or Spec(
        FINE_TUNED_VOLUME, "adapter",
        {"recipe": RECIPES["adapter"], **_settings(training),
         "tokens_per_batch": training.tokens_per_batch, "seed": training.seed,
         # Only where it is set: artifacts from before this setting existed keep their names.
         **({} if training.quantization == "none" else {"quantization": training.quantization}),
         **({} if training.objective == "sft" else {"objective": training.objective, "beta": training.strength}),
         **({} if training.keep == "last" else {"keep": training.keep, "patience": training.patience}),
         # `encoded_dataset` follows from it too; serving reads it here.
         **({"chat_template": template} if (template := pipeline.environment.chat_template) else {})},
        # `encoded_dataset` follows from data and tokenizer; retention and serving look for these.
        {"dataset": dataset.digest, "encoded_dataset": encoded_dataset.digest, "base_model": base_model.digest,
         "tokenizer": tokenizer.digest})
    base = {"encoded_dataset": encoded_dataset, "model": base_model, "tokenizer": tokenizer}
    measured_on = {"dataset": dataset, "acceptability": acceptability} | (
        {"tasks": tasks} if pipeline.evaluation.tasks else {})
    base_scores = _scores(pipeline, measured_on | base)
    merged = merged_model(adapter.digest, base_model.digest)
    # What clients get is what is measured. Retention looks for the adapter.
    tuned = base | {"adapter": adapter} | ({"model": merged} if pipeline.environment.serving.mode == "merged" else {})
    adapter_scores = _scores(pipeline, measured_on | tuned)
    # The reference model has a tokenizer of its own, so it encodes the data itself.
    reference_scores = _scores(pipeline, measured_on | {"model": reference_model})
    evaluation = Spec(
        FINE_TUNED_VOLUME, "evaluation",
        {"recipe": RECIPES["evaluation"], "adapter": pipeline.adapter,
         "gate": [{"score": key, "than": rule.than, **rule.bounds()} for key, rule in pipeline.evaluation.rules()],
         "confidence": pipeline.evaluation.confidence, "clusters": pipeline.evaluation.clusters,
         # Only where it is set: another report is another artifact.
         **({} if pipeline.evaluation.report_answers else {"report_answers": False})},
        {"adapter": adapter.digest, "base_scores": base_scores.digest, "adapter_scores": adapter_scores.digest,
         "reference_scores": reference_scores.digest})
    return Plan(base_model, tokenizer, reference_model, dataset, acceptability, tasks, encoded_dataset, adapter,
                merged, base_scores, adapter_scores, reference_scores, evaluation)


def _settings(training: Training) -> dict[str, Any]:
    """The settings that can be searched; what a search chooses among stands for those that it names."""
    lora = training.lora
    settings: dict[str, Any] = {
        "lora": {"r": lora.r, "alpha": lora.alpha, "dropout": lora.dropout,
                 "target_modules": normalized(lora.target_modules)},
        "epochs": training.epochs, "learning_rate": training.learning_rate}
    if training.search is None:
        return settings
    for key in training.search.candidates.by_key():
        group, _, name = key.rpartition(".")
        del (settings[group] if group else settings)[name]
    return settings | {"search": training.search.identity()}


def merged_model(adapter: str, base_model: str) -> Spec:
    """The merged model of an adapter and its base model, both named by their digests."""
    return Spec(FINE_TUNED_VOLUME, "merged-model", {"recipe": RECIPES["merged-model"]},
                {"adapter": adapter, "base_model": base_model})


def scores_of_adapter(wanted: Plan, adapter: str, *, model: str, tokenizer: str, chat_template: Mapping[str, Any],
                      encoded: bool, private: bool) -> Spec:
    """The scores of another adapter on the data of a plan, by the digests of what it is measured with.

    An adapter that was evaluated on this data before has these scores already.

    Args:
        model: its base model, or its merged model.
        encoded: whether it reads the data as the encoding job of the plan has it.
        private: whether it was trained on that data, so that its privacy can be measured.
    """
    of = wanted.adapter_scores
    inputs = {**of.inputs, "adapter": adapter, "model": model, "tokenizer": tokenizer}
    if not encoded:
        del inputs["encoded_dataset"]
    spec = {**of.spec, "chat_template": dict(chat_template)}
    if not private:
        spec.pop("privacy", None)
        spec["metrics"] = {name: version for name, version in spec["metrics"].items() if name != PRIVACY.module}
    return Spec(of.volume, of.kind, spec, inputs)


def _source(recipe: str, source: Source) -> dict[str, Any]:
    return {"recipe": RECIPES[recipe], **_identity(source)}


def _identity(source: Source) -> dict[str, Any]:
    """What identifies a relocated source. Bytes pinned by sha256 are the same bytes wherever they come from, so the
    URL is not part of it: moving the data to another bucket renames nothing."""
    pin = SCHEMES[source.scheme].pin
    if pin == "sha256":
        return {"sha256": source.sha256}
    if pin is None:
        return {"source": source.source, "embedded": RECIPES["embedded"]}
    return {"source": source.source, pin: getattr(source, pin)}


def _suffix(source: Source) -> str:
    """The format by the name of the data: jsonl, csv, parquet, or "" for a folder or repository."""
    if source.scheme == "oci":  # several files, and the point in a tag is none before a format
        return ""
    name = source.location.partition("?")[0].rsplit("/", 1)[-1]
    return name.rpartition(".")[2].lower() if "." in name and SCHEMES[source.scheme].pin else ""


def _scores(pipeline: Pipeline, inputs: dict[str, Spec]) -> Spec:
    # The reference model has nothing to do with what was trained on: of it, privacy is not measured.
    privacy = pipeline.evaluation.privacy if "encoded_dataset" in inputs else None
    metrics = [metric for metric in pipeline.evaluation.metrics() if privacy or metric is not PRIVACY]
    return Spec(FINE_TUNED_VOLUME, "scores",
                {"recipe": RECIPES["scores"], "max_new_tokens": pipeline.evaluation.max_new_tokens,
                 "max_length": pipeline.training.max_length,
                 "chat_template": pipeline.environment.chat_template,
                 **({} if pipeline.evaluation.answered_records == ANSWERED_RECORDS else
                    {"answered_records": pipeline.evaluation.answered_records}),
                 "metrics": {metric.module: metric.version for metric in metrics},
                 **({"privacy": {"records": privacy.records, "verbatim_tokens": privacy.verbatim_tokens}}
                    if privacy else {})},
                {name: spec.digest for name, spec in inputs.items()})
