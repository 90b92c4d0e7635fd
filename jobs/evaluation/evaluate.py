"""The evaluation job: measure base, fine-tuned and reference model, and promote the adapter if it passes the gate.

    python -m jobs --pipeline overlays/kind/adapters/seville-hotels/pipeline.yaml --volumes /volumes evaluate

Waits for its inputs; measures the base and the fine-tuned model with one load (the base is the fine-tuned model with
its adapter switched off), then the reference model with its own tokenizer; keeps each model's scores as an artifact of
its own, so that a new adapter never has the other two measured again; evaluates the gate; publishes verdict and
report; and promotes an adapter that passed. A rejection is a result, not a failure.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from jobs.core import artifacts, models, promotion
from jobs.core.artifacts import Artifact
from jobs.core.layout import TENSORBOARD
from jobs.core.metrics import Population
from jobs.core.pipeline import Pipeline
from jobs.core.plan import FINE_TUNED_VOLUME, Plan, plan
from jobs.core.proof import FILE as PROOF
from jobs.core.search import FILE as SEARCH
from jobs.core.termination import write_termination_message
from jobs.data import encoded
from jobs.data.split import HOLDOUT
from jobs.evaluation import content, gate, proof, report, scoring

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from jobs.core.pipeline import LoadedPipeline

log = logging.getLogger("jobs")

Scores = Mapping[str, Any]

EVIDENCE = ("The held-out records are too few to tell. Bring more (dataset.holdout), or demand less in "
            "evaluation.gate of the pipeline file.")
ADVICE = "Train otherwise, bring other data, or change evaluation.gate in the pipeline file."


def run(loaded: LoadedPipeline, volumes: Path, wait_seconds: float) -> None:
    """Evaluate the desired adapter, unless that is done, and promote it if it passed.

    Raises:
        UserError: a rule of the gate, or a model, cannot be measured on this data.
        RetryableError: an input did not appear in time.
    """
    wanted = plan(loaded.pipeline)
    evaluation = artifacts.done(wanted.evaluation, volumes)
    if evaluation is None:
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_EVALUATE_OFFLINE="1",
                          TRANSFORMERS_OFFLINE="1")
        measure(loaded.pipeline, wanted, volumes, wait_seconds)
        evaluation = conclude(loaded.pipeline, wanted, volumes)
    decide(loaded.pipeline, wanted, volumes, evaluation, wait_seconds)


def measure(pipeline: Pipeline, wanted: Plan, volumes: Path, wait_seconds: float) -> None:
    """Wait for the inputs, and publish the scores of each model that has none yet."""
    # First the inputs that can show that measuring is impossible, before hours of waiting for the adapter.
    dataset, sentences = artifacts.wait([wanted.dataset, wanted.acceptability], volumes, wait_seconds)
    material = scoring.Material.read(dataset.path, sentences.path, max_length=pipeline.training.max_length,
                                     max_new_tokens=pipeline.evaluation.max_new_tokens,
                                     template=pipeline.environment.chat_template,
                                     metrics=pipeline.evaluation.metrics())
    gate.check_measurable(pipeline.evaluation, material.holdout)

    base, adapter, reference = (artifacts.done(spec, volumes) for spec in
                                (wanted.base_scores, wanted.adapter_scores, wanted.reference_scores))
    inputs = [wanted.adapter]
    inputs += [] if base and adapter else [wanted.encoded_dataset, wanted.base_model, wanted.tokenizer]
    inputs += [] if reference else [wanted.reference_model]
    artifacts.wait(inputs, volumes, wait_seconds)
    with models.gpu_memory("Take a GPU with more, a smaller reference model, or a lower training.max_length"):
        if not (base and adapter):
            measure_base_and_adapter(pipeline, wanted, volumes, material)
            _free_memory()  # the reference model is the larger one; two models at once may not fit
        if not reference:
            measure_reference(pipeline, wanted, volumes, material)
            _free_memory()


def measure_base_and_adapter(pipeline: Pipeline, wanted: Plan, volumes: Path, material: scoring.Material) -> None:
    """Measure the base model with the adapter switched off, then on; skips what is already there. Both read the data as
    training's job did: encoded."""
    from peft import PeftModel

    holdout = encoded.Split(wanted.encoded_dataset.path(volumes) / f"{HOLDOUT}.arrow")
    material = dataclasses.replace(material, encoded=holdout)
    model, tokenizer = _load(wanted.base_model.path(volumes), wanted.tokenizer.path(volumes))
    adapted = PeftModel.from_pretrained(model, str(wanted.adapter.path(volumes))).eval()
    name = _versioned(pipeline, wanted)
    with adapted.disable_adapter():
        artifacts.publish(wanted.base_scores, volumes,
                          _scores(adapted, tokenizer, material, pipeline.environment.base_model.name),
                          keep=_keep(pipeline), adapter_name=pipeline.adapter)
    artifacts.publish(wanted.adapter_scores, volumes, _scores(adapted, tokenizer, material, name, prove=True),
                      keep=_keep(pipeline), adapter_name=pipeline.adapter)


def measure_reference(pipeline: Pipeline, wanted: Plan, volumes: Path, material: scoring.Material) -> None:
    """Measure the reference model with its own tokenizer, with which it encodes the data itself."""
    folder = wanted.reference_model.path(volumes)
    model, tokenizer = _load(folder, folder)
    artifacts.publish(wanted.reference_scores, volumes,
                      _scores(model, tokenizer, material, pipeline.environment.reference_model.name),
                      keep=_keep(pipeline), adapter_name=pipeline.adapter)


def conclude(pipeline: Pipeline, wanted: Plan, volumes: Path) -> Artifact:
    """Evaluate the gate, and publish the evaluation: verdict, report, and their provenance."""
    roles = {"base": wanted.base_scores, "fine_tuned": wanted.adapter_scores, "reference": wanted.reference_scores}
    folders = {role: spec.path(volumes) for role, spec in roles.items()}
    scores = {role: _read_json(folder / "scores.json") for role, folder in folders.items()}
    generations = {role: scoring.read_jsonl(folder / "generations.jsonl") for role, folder in folders.items()}
    values = {role: {name: scoring.read_jsonl(folder / f"{name}.jsonl") for name in get_args(Population)}
              for role, folder in folders.items()}
    holdout = scoring.read_jsonl(wanted.dataset.path(volumes) / "holdout.jsonl")
    clusters = gate.clusters_of(holdout, pipeline.evaluation.clusters)
    training = _read_json(wanted.adapter.path(volumes) / "training.json")
    search = _read_json(wanted.adapter.path(volumes) / SEARCH) if pipeline.training.search else None
    evaluation = summary(pipeline, wanted, scores, gate.evaluate_gate(pipeline.evaluation, values, clusters),
                         intervals(pipeline, values, clusters), search)

    def write(draft: Path) -> dict[str, Any]:
        text = json.dumps(evaluation, indent=2, ensure_ascii=False, allow_nan=False)
        (draft / "evaluation.json").write_text(text + "\n", encoding="utf-8")
        _write_jsonl(draft / "clusters.jsonl", [{"line": line, "cluster": [*cluster]}
                                                for line, cluster in enumerate(clusters, 1)])
        if (folders["fine_tuned"] / PROOF).exists():  # the server reads nothing but the evaluation
            shutil.copyfile(folders["fine_tuned"] / PROOF, draft / PROOF)
        report.write(draft, evaluation, training["history"], generations)
        return {"passed": evaluation["passed"]}

    write_tensorboard(volumes / FINE_TUNED_VOLUME / TENSORBOARD / pipeline.adapter / wanted.adapter.digest
                      / "evaluation", scores, step=training["steps"])
    return artifacts.publish(wanted.evaluation, volumes, write, keep=pipeline.environment.retention.keep,
                             adapter_name=pipeline.adapter)


def intervals(pipeline: Pipeline, values: Mapping[str, gate.Values], clusters: Sequence[gate.Cluster]
              ) -> dict[str, dict[str, list[float | None]]]:
    """The bounds of every score of every model, by role and key: [low, high]."""
    found: dict[str, dict[str, list[float | None]]] = {}
    for role, of_model in values.items():
        found[role] = {}
        for key in pipeline.evaluation.scores():
            interval = gate.score_interval(key, of_model, clusters, pipeline.evaluation.confidence)
            found[role][key] = [value if interval and math.isfinite(value) else None for value in
                                ((interval.low, interval.high) if interval else (math.nan, math.nan))]
    return found


def summary(pipeline: Pipeline, wanted: Plan, scores: Mapping[str, Scores], checks: Sequence[gate.Check],
            intervals: Mapping[str, Any], search: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The content of `evaluation.json`: the verdict, what was measured, and every digest and pin behind it.

    Args:
        checks: the rules of the gate.
        intervals: the bounds of the scores, by role and key.
        search: the record of the search that chose settings, if there was one.
    """
    training = pipeline.training.with_settings(search["settings"]) if search else pipeline.training
    base_model, reference_model = pipeline.environment.base_model, pipeline.environment.reference_model
    sources = pipeline.environment.sources() | pipeline.sources()
    return {
        "passed": gate.outcome_of(checks) == "passed",
        "outcome": gate.outcome_of(checks),
        "confidence": pipeline.evaluation.confidence,
        "adapter": {"name": pipeline.adapter, "digest": wanted.adapter.digest},
        "base_model": {"name": base_model.name, "digest": wanted.base_model.digest},
        "reference_model": {"name": reference_model.name, "digest": wanted.reference_model.digest},
        "dataset": {"digest": wanted.dataset.digest,
                    "holdout_records": scores["base"]["records"] + scores["base"]["records_too_long"]},
        "embedded": any(model.scheme == "builtin" for model in (base_model, reference_model)),
        "scores": dict(scores),
        "intervals": intervals,
        "gate": [check.to_json() for check in checks],
        "sources": {key: {"source": source.source, "pin": source.pin} for key, source in sources.items()},
        "training": training.model_dump(exclude={"checkpoint_steps", "tokens_per_micro_batch", "search"}),
        **({"search": dict(search)} if search else {}),
    }


def decide(pipeline: Pipeline, wanted: Plan, volumes: Path, artifact: Artifact, wait_seconds: float) -> None:
    """Report the verdict, in the log and as the pod's termination message; promote an adapter that passed.

    Harmless to repeat: a reverted pipeline file comes through here again and gets its old adapter back.
    """
    evaluation = content.read_evaluation(artifact.path)
    volume, name = volumes / FINE_TUNED_VOLUME, _versioned(pipeline, wanted)
    page = artifact.path / "report.html"
    log.info("\n%s\nreport: %s", report.table(evaluation), page)
    if evaluation["passed"]:
        # Retention may have removed an old adapter while its evaluation was kept; its training job makes it again.
        # In mode merged clients get the merged model, which training makes after the adapter.
        merged = [wanted.merged_model] if pipeline.environment.serving.mode == "merged" else []
        artifacts.wait([wanted.adapter, *merged], volumes, wait_seconds)
        moved = promotion.promote(volume, pipeline.adapter, wanted.adapter.digest, wanted.evaluation.digest)
        title, lines = "PROMOTED" if moved else "ALREADY PROMOTED", [
            f"{name} passed the gate: clients of {pipeline.adapter} get it."]
    else:
        undecided = evaluation["outcome"] == "undecided"
        failed = [check.description for check in content.checks(evaluation) if not check.passed]
        title = "UNDECIDED" if undecided else "REJECTED"
        lines = [f"{name} did not pass the gate and is not promoted:", *(f"  ✗ {f}" for f in failed),
                 _served_now(pipeline, wanted, volume), EVIDENCE if undecided else ADVICE]
    log.log(logging.INFO if evaluation["passed"] else logging.WARNING, _framed(title, *lines))
    write_termination_message("\n".join([f"{title}: {lines[0]}", *lines[1:], f"report: {page}"]))


def _served_now(pipeline: Pipeline, wanted: Plan, volume: Path) -> str:
    """Which adapter clients get although this one was rejected."""
    before = promotion.current(volume, pipeline.adapter)
    if before is None:
        return f"Nothing is promoted as {pipeline.adapter} yet, so it is not served."
    if before.adapter == wanted.adapter.digest:
        return f"It stays promoted, because it passed another gate (evaluation {before.evaluation}, {before.at})."
    return f"{pipeline.adapter}@{before.adapter} stays promoted (since {before.at}) and is served."


def write_tensorboard(folder: Path, scores: Mapping[str, Scores], step: int) -> None:
    """Scalars `evaluation/<metric>`, a run each for base, fine-tuned and reference, at the last training step.

    What an earlier evaluation of the same adapter wrote is removed: two points at one step would only confuse.
    """
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)
    for role, values in scores.items():
        with SummaryWriter(str(folder / role.replace("_", "-"))) as writer:
            for key in content.scores(values):
                if values[key] is not None:
                    writer.add_scalar(f"evaluation/{key}", values[key], step)


def _load(model_folder: Path, tokenizer_folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    tokenizer = models.load_tokenizer(tokenizer_folder)
    model = models.load_model(model_folder)
    models.check_vocabulary(model, tokenizer, str(tokenizer_folder))
    return model, tokenizer


def _scores(model: Any, tokenizer: PreTrainedTokenizerBase, material: scoring.Material, name: str, *,
            prove: bool = False) -> Callable[[Path], dict[str, Any]]:
    """What `artifacts.publish` calls to fill a scores artifact; it measures only if that was not done yet.

    Args:
        prove: whether the model will be served: record the answers by which the server knows it.
    """
    def write(draft: Path) -> dict[str, Any]:
        measured = scoring.measure(model, tokenizer, material, name)
        (draft / "scores.json").write_text(
            json.dumps(measured.summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
        _write_jsonl(draft / "generations.jsonl", measured.generations)
        for population, rows in measured.values.items():
            _write_jsonl(draft / f"{population}.jsonl", rows)
        if prove and (found := proof.record(model, tokenizer, material)):
            (draft / PROOF).write_text(found.to_json(), encoding="utf-8")
        return {"model": name}

    return write


def _keep(pipeline: Pipeline) -> int:
    """Three models share the scores' folder: with `keep: 1`, the third's must not push out the first's."""
    return 3 * pipeline.environment.retention.keep


def _versioned(pipeline: Pipeline, wanted: Plan) -> str:
    """The adapter's name and digest, as vLLM knows it."""
    return f"{pipeline.adapter}@{wanted.adapter.digest}"


def _framed(title: str, *lines: str) -> str:
    """A message that cannot be overlooked in a log."""
    bar = "━" * 100
    return "\n".join(["", f"┏{bar}", f"┃ {title}", "┃", *(f"┃ {line}" for line in lines), f"┗{bar}"])


def _write_jsonl(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with file.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def _read_json(file: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return values


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
