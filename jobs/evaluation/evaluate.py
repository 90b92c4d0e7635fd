"""The evaluation job: measure base, fine-tuned and reference model, and promote the adapter if it passes the gate.

    python -m jobs --pipeline overlays/kind/adapters/seville-hotels/pipeline.yaml --volumes /volumes evaluate

Waits for its inputs; measures the base and the fine-tuned model with one load, the promoted adapter if a rule compares
with it, and then the reference model with its own tokenizer; keeps each model's scores as an artifact of its own, so
that a new adapter never has the others measured again; evaluates the gate; publishes verdict and report; and promotes
an adapter that passed. A rejection is a result, not a failure. A run with values other than the pipeline file's
(`--set`) promotes nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from jobs.core import artifacts, imported, models, promotion, settings, signing
from jobs.core.artifacts import Artifact, Spec
from jobs.core.errors import UserError
from jobs.core.imported import EvaluatedImport, LoadedAdapter
from jobs.core.layout import TENSORBOARD
from jobs.core.metrics import score_of
from jobs.core.pipeline import LoadedPipeline, Pipeline
from jobs.core.plan import FINE_TUNED_VOLUME, Plan, plan, plan_evaluation, plan_import
from jobs.core.proof import FILE as PROOF
from jobs.core.published import WITHOUT_ANSWERS
from jobs.core.search import FILE as SEARCH
from jobs.core.signing import Signer
from jobs.core.sources import shown
from jobs.core.termination import write_termination_message
from jobs.data import tasks
from jobs.data.split import HOLDOUT
from jobs.evaluation import content, gate, privacy, promoted, report, scores, scoring
from jobs.evaluation.holdout import JsonLines
from jobs.evaluation.promoted import Comparison, Promoted
from jobs.evaluation.scores import ScoredModel

log = logging.getLogger("jobs")

Scores = Mapping[str, Any]


def run(loaded: LoadedAdapter, volumes: Path, wait_seconds: float) -> None:
    """Evaluate the desired adapter, trained here or imported, unless that is done, and promote it if it passed.

    Raises:
        UserError: a rule of the gate, or a model, cannot be measured on this data.
        RetryableError: an input did not appear in time.
    """
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_EVALUATE_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    signer = signing.signer(loaded.pipeline.environment)  # raises now, instead of after hours of measuring
    pipeline, wanted = planned(loaded, volumes, wait_seconds)
    changed = loaded.changed if isinstance(loaded, LoadedPipeline) else {}
    while (decided := decide(pipeline, wanted, volumes, wait_seconds, signer, promote=not changed)) is None:
        log.info("another adapter was promoted as %s meanwhile: comparing again", pipeline.adapter)
    announce(pipeline, wanted, volumes, *decided, changed=changed)


def planned(loaded: LoadedAdapter, volumes: Path, wait_seconds: float) -> tuple[Pipeline, Plan]:
    """The pipeline, and what it desires. Which adapter an imported one is, its relocation records."""
    if isinstance(loaded, LoadedPipeline):
        return loaded.pipeline, plan(loaded.pipeline)
    pipeline = loaded.pipeline.evaluated_here
    if pipeline is None:
        raise imported.not_evaluated(loaded)
    (record,) = artifacts.wait([plan_import(loaded.pipeline).imported_adapter], volumes, wait_seconds)
    return pipeline, plan_evaluation(pipeline, imported.read(record.path, FINE_TUNED_VOLUME).adapter)


def decide(pipeline: Pipeline, wanted: Plan, volumes: Path, wait_seconds: float,
           signer: Signer | None = None, *, promote: bool = True) -> tuple[Artifact, bool] | None:
    """Evaluate the adapter, unless that is done, and promote it if it passed (and `promote` allows it).

    Harmless to repeat: a reverted pipeline file comes through here again and gets its old adapter back.

    Returns:
        the evaluation, and whether the promotion moved; None where what the gate compares with changed meanwhile.
    """
    comparison = promoted.comparison(pipeline, wanted, volumes)
    keys = pipeline.environment.trusted_keys
    there = artifacts.find(wanted.evaluation, volumes, keys)
    if there is not None and promoted.outdated(content.read_evaluation(there.path), comparison):
        log.info("%s does not compare with the adapter that is promoted now: evaluating again", wanted.evaluation)
        there = None
    if there is None:
        try:
            other = promoted.find(pipeline, wanted, volumes, comparison.adapter) if comparison.adapter else None
            measure(pipeline, wanted, volumes, wait_seconds, other, signer)
        except UserError:
            if promoted.comparison(pipeline, wanted, volumes) != comparison:
                return None  # what is no longer promoted, retention may remove
            raise
        fill = conclude(pipeline, wanted, volumes, comparison, other)
    else:
        artifacts.done(wanted.evaluation, volumes, signer)
        if signer:  # what another trusted key signed is signed again, so that nothing needs that key any more
            for each in (wanted.base_scores, wanted.adapter_scores, wanted.reference_scores):
                with suppress(UserError):
                    artifacts.done(each, volumes, signer)
        if passed(there):
            # Retention may have removed an old adapter while its evaluation was kept; its training job makes it again.
            artifacts.wait(_served(pipeline, wanted), volumes, wait_seconds, keys=keys)

    volume = volumes / FINE_TUNED_VOLUME
    # Serving follows a published verdict: what it compared with must be what is promoted at that moment.
    with promotion.lock(volume, pipeline.adapter):
        if promoted.comparison(pipeline, wanted, volumes) != comparison:
            return None
        evaluation = there or artifacts.publish(wanted.evaluation, volumes, fill, replace=True,
                                                keep=pipeline.environment.retention.keep, adapter_name=pipeline.adapter,
                                                signer=signer)
        return evaluation, promote and passed(evaluation) and promotion.move(
            volume, pipeline.adapter, wanted.adapter.digest, wanted.evaluation.digest)


def passed(evaluation: Artifact) -> bool:
    """Whether the adapter passed the gate."""
    return bool(content.read_evaluation(evaluation.path)["passed"])


def measure(pipeline: Pipeline, wanted: Plan, volumes: Path, wait_seconds: float,
            other: Promoted | None = None, signer: Signer | None = None) -> None:
    """Wait for the inputs, and publish the scores of each model that has none yet; `other` is what the gate compares
    with."""
    # First the inputs that can show that measuring is impossible, before hours of waiting for the adapter.
    declared = pipeline.evaluation.tasks
    dataset, sentences, *of_tasks = artifacts.wait(
        [wanted.dataset, wanted.acceptability, *([wanted.tasks] if declared else [])], volumes, wait_seconds)
    material = scoring.Material.read(dataset.path, sentences.path, max_length=pipeline.training.max_length,
                                     max_new_tokens=pipeline.evaluation.max_new_tokens,
                                     template=pipeline.environment.chat_template,
                                     metrics=[metric for metric in pipeline.evaluation.metrics()
                                              if metric.population != "privacy"],
                                     answered_records=pipeline.evaluation.answered_records)
    if declared:
        material = dataclasses.replace(material, tasks=list(tasks.read(of_tasks[0].path, declared)))
        tasks.require_evidence(pipeline.evaluation, material.tasks)
    gate.check_measurable(pipeline.evaluation, material.holdout)
    privacy.check_held_out(pipeline.evaluation, len(material.holdout))
    everyone = scored_models(pipeline, wanted, volumes, other)
    check_tokenizers(pipeline, everyone, volumes, wait_seconds)

    missing = [each for each in everyone.values() if artifacts.done(each.scores, volumes, signer) is None]
    read_privacy = None
    if pipeline.evaluation.privacy and any(each.private for each in missing):
        (encoded,) = artifacts.wait([wanted.encoded_dataset], volumes, wait_seconds)
        privacy.check_encoded(pipeline.evaluation, dataset.path, dataset.digest, encoded.path)
        read_privacy = functools.partial(privacy.Subjects.read, pipeline.evaluation.privacy, dataset.path,
                                         dataset.digest, encoded.path, template=pipeline.environment.chat_template)
    inputs = {spec.digest: spec for spec in (*_served(pipeline, wanted), *(i for each in missing for i in each.inputs))}
    found = artifacts.wait(list(inputs.values()), volumes, wait_seconds, keys=pipeline.environment.trusted_keys)
    check_unchanged([*found, dataset])
    with models.gpu_memory("Take a GPU with more, a smaller reference model, or a lower training.max_length"):
        # All models share the scores' folder: with `keep: 1`, the last one's must not push out the first one's.
        scores.measure(missing, material, volumes, keep=len(everyone) * pipeline.environment.retention.keep,
                       adapter_name=pipeline.adapter, privacy=read_privacy, signer=signer)


def check_unchanged(inputs: Sequence[Artifact]) -> None:
    """The inputs are what a signed adapter among them was trained on: no signature protects them themselves.

    Raises:
        UserError: one was changed since.
    """
    # By their digests too: an imported adapter is evaluated on other data than it was trained on.
    read = {(name, each.manifest["inputs"].get(name)): content for each in inputs if each.manifest["kind"] == "adapter"
            for name, content in each.manifest["about"].get(artifacts.READ, {}).items()}
    for each in inputs:
        named = each.manifest["kind"].replace("-", "_"), each.digest
        if named in read and read[named] != artifacts.content_digest(each.manifest):
            raise UserError(f"{each.path}: is not what the adapter was trained on: its content was changed since, with "
                            f"its {artifacts.MANIFEST}. Find out who can write to this volume, and move it away to "
                            "have it made again. Nothing is promoted")


def scored_models(pipeline: Pipeline, wanted: Plan, volumes: Path, other: Promoted | None) -> dict[str, ScoredModel]:
    """The models that are measured, by role. In mode merged, clients get the merged model, so that one is measured."""
    environment = pipeline.environment
    data = [wanted.encoded_dataset, wanted.tokenizer]
    base = ScoredModel(environment.base_model.name, wanted.base_scores, wanted.base_model.path(volumes),
                       wanted.tokenizer.path(volumes), template=environment.chat_template, private=True,
                       encoded=wanted.encoded_dataset.path(volumes) / f"{HOLDOUT}.arrow",
                       inputs=[*data, wanted.base_model])
    tuned = dataclasses.replace(base, name=f"{pipeline.adapter}@{wanted.adapter.digest}", scores=wanted.adapter_scores,
                                prove=True, base_scores=wanted.base_scores.path(volumes))
    if environment.serving.mode == "merged":
        tuned = dataclasses.replace(tuned, model=wanted.merged_model.path(volumes), inputs=[*data, wanted.merged_model])
    else:
        tuned = dataclasses.replace(tuned, adapter=wanted.adapter.path(volumes), inputs=[*base.inputs, wanted.adapter])
    # The reference model has a tokenizer of its own, so it encodes the data itself.
    folder = wanted.reference_model.path(volumes)
    reference = ScoredModel(environment.reference_model.name, wanted.reference_scores, folder, folder,
                            template=environment.chat_template, inputs=[wanted.reference_model])
    return {"base": base, gate.FINE_TUNED: tuned, **({promoted.ROLE: other.scored} if other else {}),
            "reference": reference}


def check_tokenizers(pipeline: Pipeline, everyone: Mapping[str, ScoredModel], volumes: Path,
                     wait_seconds: float) -> None:
    """Refuse rules per token between models of different tokenizers: both are there long before the adapter is.

    Raises:
        UserError: naming the rule.
    """
    others = {rule.than: everyone[rule.than] for key, rule in pipeline.evaluation.rules()
              if score_of(key).per_token and rule.than in everyone
              and everyone[rule.than].tokenizer != everyone[gate.FINE_TUNED].tokenizer}
    if others:
        ours = everyone["base"]  # the tokenizer is the same, and it needs no adapter
        artifacts.wait_until_there([spec for each in (ours, *others.values()) for spec in each.inputs
                                    if not each.scores.path(volumes).exists()], volumes, wait_seconds)
        gate.check_comparable(pipeline.evaluation, {gate.FINE_TUNED: ours.vocabulary(volumes)} | {
            role: other.vocabulary(volumes) for role, other in others.items()})


def conclude(pipeline: Pipeline, wanted: Plan, volumes: Path, comparison: Comparison,
             other: Promoted | None) -> Callable[[Path], dict[str, Any]]:
    """Evaluate the gate. Returns what `artifacts.publish` calls to fill the evaluation: verdict, report, and their
    provenance."""
    from jobs.evaluation.confidence import RESAMPLES, SEED

    populations = dict.fromkeys(metric.population for metric in pipeline.evaluation.metrics())
    measured = {role: scores.read(each.scores.path(volumes), populations) for role, each in
                scored_models(pipeline, wanted, volumes, other).items()}
    values = {role: dict(each.values) for role, each in measured.items()}
    for of_model in values.values():
        if "privacy" in of_model:
            of_model["privacy"] = privacy.with_clusters([*map(dict, of_model["privacy"])], pipeline.evaluation.clusters)
    summaries = {role: dict.fromkeys(pipeline.evaluation.scores()) | dict(each.summary)
                 for role, each in measured.items()}
    generations = {role: each.generations for role, each in measured.items()}
    holdout = JsonLines(wanted.dataset.path(volumes) / f"{HOLDOUT}.jsonl")
    clusters = gate.clusters_of(holdout, pipeline.evaluation.clusters)
    training = _read_json(wanted.adapter.path(volumes) / "training.json")
    search = _read_json(wanted.adapter.path(volumes) / SEARCH) if pipeline.training.search else None
    absent = {promoted.ROLE: comparison.reason} if comparison.reason else {}
    evaluation = summary(pipeline, wanted, summaries,
                         gate.evaluate_gate(pipeline.evaluation, values, clusters, absent),
                         intervals(pipeline, values, clusters), search, other)
    evaluation["resampling"] = {"resamples": RESAMPLES, "seed": SEED, "clusters": len(set(clusters)),
                                "by": pipeline.evaluation.clusters}
    if pipeline.evaluation.privacy:
        evaluation["privacy"] = privacy.summary(pipeline, [*map(dict, values[gate.FINE_TUNED]["privacy"])])

    def fill(draft: Path) -> dict[str, Any]:
        text = json.dumps(evaluation, indent=2, ensure_ascii=False, allow_nan=False)
        (draft / "evaluation.json").write_text(text + "\n", encoding="utf-8")
        scores.write_jsonl(draft / "clusters.jsonl", [{"line": line, "cluster": [*cluster]}
                                                      for line, cluster in enumerate(clusters, 1)])
        proof = wanted.adapter_scores.path(volumes) / PROOF
        if proof.exists():  # the server reads nothing but the evaluation
            shutil.copyfile(proof, draft / PROOF)
        answers = pipeline.evaluation.report_answers
        report.write(draft, evaluation, training["history"], generations, values, answers=answers)
        if answers:  # the report that may be published (jobs/publication)
            (draft / WITHOUT_ANSWERS).mkdir()
            report.write(draft / WITHOUT_ANSWERS, evaluation, training["history"], generations, values, answers=False)
        return {"passed": evaluation["passed"]}

    write_tensorboard(volumes / FINE_TUNED_VOLUME / TENSORBOARD / pipeline.adapter / wanted.adapter.digest
                      / "evaluation", summaries, step=training["steps"])
    return fill


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
            intervals: Mapping[str, Any], search: Mapping[str, Any] | None = None,
            other: Promoted | None = None) -> dict[str, Any]:
    """The content of `evaluation.json`: the verdict, what was measured, and every digest and pin behind it.

    Args:
        checks: the rules of the gate.
        intervals: the bounds of the scores, by role and key.
        search: the record of the search that chose settings, if there was one.
        other: the promoted adapter that rules compare with, if there is one.
    """
    training = pipeline.training.with_settings(search["settings"]) if search else pipeline.training
    base_model, reference_model = pipeline.environment.base_model, pipeline.environment.reference_model
    sources = pipeline.environment.sources() | pipeline.sources()
    for number, task in enumerate(pipeline.evaluation.tasks):  # people know them by their names
        for suffix in ("", ".lm_eval"):
            if source := sources.pop(f"evaluation.tasks.{number}{suffix}", None):
                sources[f"evaluation.{task.key}{suffix}"] = source
    return {
        "passed": gate.outcome_of(checks) == "passed",
        "outcome": gate.outcome_of(checks),
        "confidence": pipeline.evaluation.confidence,
        "adapter": {"name": pipeline.adapter, "digest": wanted.adapter.digest},
        "base_model": {"name": base_model.name, "digest": wanted.base_model.digest},
        **({"promoted": other.to_json(pipeline.adapter)} if other else {}),
        "reference_model": {"name": reference_model.name, "digest": wanted.reference_model.digest},
        "dataset": {"digest": wanted.dataset.digest,
                    "holdout_records": scores["base"]["records"] + scores["base"]["records_too_long"]},
        "embedded": any(model.scheme == "builtin" for model in (base_model, reference_model)),
        "scores": dict(scores),
        "intervals": intervals,
        "gate": [check.to_json() for check in checks],
        "sources": {key: {"source": shown(source.source), "pin": source.pin} for key, source in sources.items()},
        **({"tasks": {task.name: task.identity() for task in pipeline.evaluation.tasks}}
           if pipeline.evaluation.tasks else {}),
        **({} if isinstance(pipeline, EvaluatedImport) else
           {"training": training.model_dump(exclude={"checkpoint_steps", "tokens_per_micro_batch", "search"})}),
        **({"search": dict(search)} if search else {}),
    }


def announce(pipeline: Pipeline, wanted: Plan, volumes: Path, artifact: Artifact, moved: bool, *,
             changed: Mapping[str, Any] | None = None) -> None:
    """Report the verdict, in the log and as the pod's termination message.

    Args:
        moved: whether the adapter is promoted since now.
        changed: what this run took instead of the pipeline file's values.
    """
    evaluation = content.read_evaluation(artifact.path)
    volume, name = volumes / FINE_TUNED_VOLUME, f"{pipeline.adapter}@{wanted.adapter.digest}"
    page = artifact.path / "report.html"
    log.info("\n%s\nreport: %s", report.table(evaluation), page)
    if evaluation["passed"] and changed:
        title, lines = "PASSED, NOT PROMOTED", [
            f"{name} passed the gate. This run took other values than the pipeline file, so it is not promoted.",
            "To promote it, commit these values to the pipeline file. Nothing is trained or measured again:",
            *(f"  {line}" for line in settings.edit(changed).splitlines())]
    elif evaluation["passed"]:
        title, lines = "PROMOTED" if moved else "ALREADY PROMOTED", [
            f"{name} passed the gate: clients of {pipeline.adapter} get it."]
    else:
        title = "UNDECIDED" if content.outcome(evaluation) == "undecided" else "REJECTED"
        lines = [f"{name} did not pass the gate and is not promoted:", *report.unmet_rules(evaluation),
                 *report.wrapped(_served_now(pipeline, wanted, volume)),
                 *report.wrapped(content.next_step(evaluation))]
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


def _served(pipeline: Pipeline, wanted: Plan) -> list[Spec]:
    """What clients get, and what it was made from: in mode merged the merged model, which training makes at last."""
    return [wanted.adapter, *([wanted.merged_model] if pipeline.environment.serving.mode == "merged" else [])]


def _framed(title: str, *lines: str) -> str:
    """A message that cannot be overlooked in a log."""
    bar = "━" * 100
    return "\n".join(["", f"┏{bar}", f"┃ {title}", "┃", *(f"┃ {line}" for line in lines), f"┗{bar}"])


def _read_json(file: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return values
