"""The steps of a pipeline: which Jobs of a rendered overlay are steps, and which of them follow which others."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from jobs.core import environment, pipeline
from jobs.core.artifacts import Spec
from jobs.core.environment import LoadedEnvironment
from jobs.core.errors import UserError
from jobs.core.imported import LoadedAdapter
from jobs.core.pipeline import Pipeline
from jobs.core.plan import plan_environment
from jobs.tools import overlay, pods
from jobs.tools.changes import COMMANDS, PUBLISH, STAGES, Specs, adapter_specs
from jobs.tools.pods import ADAPTER_LABEL, HASH_SUFFIX, Manifest
from kubeflow import translation
from kubeflow.fields import Fields
from kubeflow.translation import Executor

ORDER = "the order of the steps and their retries take its place"
SET_REASONS = dict.fromkeys(("coordinator", "failurePolicy", "network", "replicatedJobs", "successPolicy"), ORDER)


@dataclass(frozen=True)
class Step:
    """One Job as a step."""

    name: str  # the Job's name, without its hash
    job: Manifest  # as rendered
    stage: str | None  # e.g. `relocate dataset`; None: it carries out no stage
    adapter: str | None  # to which it belongs; None: to the environment
    executor: Executor
    after: tuple[str, ...] = ()  # the names of the steps that must have ended


@dataclass(frozen=True)
class Steps:
    """The steps of a pipeline, each after those that it follows."""

    namespace: str  # of the overlay
    steps: list[Step]
    of_sets: dict[str, str]  # the fields of the overlay's JobSets that KubeFlow Pipelines cannot say, and why
    pipelines: dict[str, Pipeline]  # of the adapters that are trained here


def find(manifests: list[Manifest], adapter: str | None = None) -> Steps:
    """The steps of an overlay.

    Args:
        adapter: only the steps of this adapter, and those of the environment.
    Raises:
        UserError: there is no such adapter, there are no Jobs, or a Job is no step that KubeFlow Pipelines can run.
    """
    found = list(_jobs(manifests))
    if not found:
        raise UserError("the overlay has no Jobs. Name one that has, e.g. overlays/kind")
    adapters = sorted({name for job, _ in found if (name := _adapter(job))})
    if adapter is not None and adapter not in adapters:
        raise UserError(f"--adapter {adapter}: the overlay has no such adapter; it has {', '.join(adapters) or 'none'}")
    steps = [Step(HASH_SUFFIX.sub("", job["metadata"]["name"]), job, _stage(job), _adapter(job),
                  translation.translate(job, restarts))
             for job, restarts in found if adapter is None or _adapter(job) in (None, adapter)]
    plans, pipelines = _plans(manifests, steps)
    return Steps(found[0][0]["metadata"].get("namespace") or "default", _ordered(steps, plans),
                 dict(_of_sets(manifests)), pipelines)


def _jobs(manifests: list[Manifest]) -> Iterator[tuple[Manifest, int]]:
    """The Jobs, also those of JobSets, and how often a set starts again; without those that only wait for others, whose
    place the order of the steps takes."""
    for manifest in manifests:
        if manifest["kind"] == "Job":
            yield manifest, 0
        elif manifest["kind"] == "JobSet":
            restarts = (manifest.get("spec") or {}).get("failurePolicy", {}).get("maxRestarts", 0)
            namespace = manifest["metadata"].get("namespace")
            for job in pods.jobs_of_sets([manifest]):
                if _line(job)[:1] != ["await"]:
                    yield {**job, "metadata": {**job["metadata"], "namespace": namespace}}, restarts


def _of_sets(manifests: list[Manifest]) -> Iterator[tuple[str, str]]:
    """What JobSets say beside their Jobs, and what takes its place."""
    for manifest in manifests:
        if manifest["kind"] != "JobSet":
            continue
        fields = Fields(manifest)
        for key in ("apiVersion", "kind"):
            fields.take(key)
        metadata = fields.child("metadata")
        for key in ("name", "namespace"):
            metadata.take(key)
        for job in fields.child("spec").children("replicatedJobs"):
            job.take("name")
            job.child("template").take("spec")  # the Job, which is a step
            if job.take("replicas", 1) != 1:
                raise UserError(f"{HASH_SUFFIX.sub('', manifest['metadata']['name'])}: {job.path}.replicas: must be 1, "
                                "because a step of KFP is one pod")
        for path, _ in fields.left():
            first, second, *_ = [*translation.shown(path).split("."), ""]
            yield (f"{first}.{second}" if second else first), SET_REASONS.get(second, (
                "KFP makes no JobSet that could bear it" if first == "metadata" else translation.DEFAULT_REASON))


def _line(job: Manifest) -> list[str]:
    """The arguments of a Job's container."""
    try:
        return [str(argument) for argument in job["spec"]["template"]["spec"]["containers"][0].get("args") or []]
    except (AttributeError, IndexError, KeyError, TypeError):  # `translation.translate` reports it
        return []


def _stage(job: Manifest) -> str | None:
    line = _line(job)
    return next((stage for stage in (*COMMANDS, PUBLISH) if line[-len(stage.split()):] == stage.split()), None)


def _adapter(job: Manifest) -> str | None:
    name: str | None = (job["metadata"].get("labels") or {}).get(ADAPTER_LABEL)
    return name


def _plans(manifests: list[Manifest], steps: list[Step]) -> tuple[dict[str | None, Specs], dict[str, Pipeline]]:
    """The artifacts that each adapter desires, with those of the environment, from the files that its Jobs mount (below
    None: those of the environment alone), and the pipeline of each adapter that is trained here."""
    plans: dict[str | None, Specs] = {}
    pipelines: dict[str, Pipeline] = {}
    config_maps = {each["metadata"]["name"]: each for each in manifests if each["kind"] == "ConfigMap"}
    for step in steps:
        if step.stage is None or step.adapter in plans:
            continue
        shared, adapters = _files(step, config_maps)
        plans[step.adapter] = dict(vars(plan_environment(shared.environment)))
        for loaded in adapters:
            plans[step.adapter] |= adapter_specs(loaded.pipeline)
            if step.adapter and isinstance(loaded.pipeline, Pipeline):
                pipelines[step.adapter] = loaded.pipeline
    return plans, pipelines


def _files(step: Step, config_maps: dict[str, Manifest]) -> tuple[LoadedEnvironment, list[LoadedAdapter]]:
    """The environment file that a Job mounts, and its pipeline file if it mounts one."""
    with tempfile.TemporaryDirectory() as folder:
        files: dict[str, Path] = {}
        for volume in step.job["spec"]["template"]["spec"].get("volumes") or []:
            if (name := volume.get("configMap", {}).get("name")) in config_maps:
                place = Path(folder) / HASH_SUFFIX.sub("", name)
                pods.write_config_map(place, pods.contents(config_maps[name]))
                files |= {file.name: file for file in place.iterdir()}
        if environment.FILE not in files:
            raise UserError(f"{step.name}: mounts no ConfigMap of the overlay that has {environment.FILE}; add it to "
                            "`configMapGenerator` in the overlay's kustomization.yaml")
        own = [files[pipeline.FILE]] if pipeline.FILE in files else []
        shared, adapters, problems = overlay.read(overlay.Files(Path(folder), files[environment.FILE], own))
        if problems or shared is None:
            text = re.sub(rf"jobs pin {re.escape(folder)}/\S+", "jobs pin OVERLAY", "\n".join(problems))
            raise UserError(text.replace(f"{folder}/", "ConfigMap "))
        return shared, list(adapters.values())


def _ordered(steps: list[Step], plans: dict[str | None, Specs]) -> list[Step]:
    """The steps with what each follows, each after those that it follows.

    A step follows those that make the inputs of its artifacts, as the plan has them, and those that make what its init
    containers await. One of an adapter that makes no artifact and awaits none (publication) follows all of its
    adapter that make some.

    Raises:
        UserError: steps wait for each other.
    """
    after = {step.name: set(_makers(step, steps, plans)) for step in steps}
    ordered: list[Step] = []
    before: dict[str, set[str]] = {}  # of each step, all that must have ended
    while len(ordered) < len(steps):
        step = next((each for each in steps if each.name not in before and after[each.name] <= before.keys()), None)
        if step is None:
            raise UserError(f"{', '.join(sorted(after.keys() - before.keys()))}: wait for each other")
        direct = after[step.name]
        # Only the last ones: what these follow has ended when they start.
        last = sorted(direct - set[str]().union(*(before[name] for name in direct)))
        before[step.name] = direct.union(*(before[name] for name in direct))
        ordered.append(replace(step, after=tuple(last)))
    return ordered


def _makers(step: Step, steps: list[Step], plans: dict[str | None, Specs]) -> Iterator[str]:
    """The steps that make what a step reads."""
    artifacts = plans.get(step.adapter, {})
    awaited = {name.replace("-", "_") for name in step.executor.awaits}
    read = {digest for spec in _made(step, artifacts) for digest in spec.inputs.values()} | {
        artifacts[name].digest for name in awaited if name in artifacts}
    if step.stage in (None, PUBLISH) and step.adapter and not awaited:
        read = {spec.digest for spec in artifacts.values()}
    for other in steps:
        if other is not step and other.adapter in (None, step.adapter) and any(
                spec.digest in read for spec in _made(other, artifacts)):
            yield other.name


def _made(step: Step, artifacts: Specs) -> list[Spec]:
    """The artifacts of a plan that a step makes."""
    return [artifacts[name] for name in STAGES.get(step.stage or "", ()) if name in artifacts]
