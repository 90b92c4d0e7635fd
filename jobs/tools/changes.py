"""What a push changes: the artifacts of an overlay's files compared with those of an earlier revision of them.

An artifact is new because its own settings changed or because an input is new. Both follow from its `Spec`: a changed
key is a reason if changing it alone, in the files of either side, changes the artifact's settings. So a new key needs
no code here. Only the rules of serving are written down again, from serving/base.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from jobs.core import promotion
from jobs.core.artifacts import Spec
from jobs.core.environment import Environment
from jobs.core.errors import UserError
from jobs.core.imported import Adapter, ImportedAdapter
from jobs.core.layout import read_manifest
from jobs.core.plan import (
    BASE_MODEL_VOLUME,
    DATASET_VOLUME,
    FINE_TUNED_VOLUME,
    REFERENCE_VOLUME,
    TOKENIZER_VOLUME,
    EnvironmentPlan,
    plan,
    plan_adapter,
    plan_environment,
    plan_evaluation,
    plan_import,
)
from jobs.tools import workloads
from jobs.tools.local import INFERENCE
from jobs.tools.pods import Manifest
from jobs.tools.values import shown
from jobs.tools.workloads import Workload

File = Environment | Adapter
Status = Literal["added", "removed", "changed", "unchanged"]
# What clients of an adapter get after the push.
Service = Literal["unchanged",  # what they get now
                  "kept",  # the promoted adapter, until the new one passes the gate
                  "interrupted",  # the promoted adapter until serving restarts on another base model, then 503
                  "unavailable",  # 503, until it passes the gate
                  "at once",  # the desired adapter: it is there and passed
                  "rejected",  # the promoted adapter: the desired one is there and did not pass
                  "removed"]  # 404
Server = Literal["none", "starts", "runs", "stops", "unknown"]  # unknown: the manifests of before do not render
# When serving restarts.
When = Literal["rollout",  # at the sync: the pods are replaced
               "at once",  # when the file reaches the pod
               "base model there",
               "adapters passed"]

# The artifacts of each stage, in the order in which it makes them.
STAGES = {
    "relocate base-model": ("base_model",),
    "relocate tokenizer": ("tokenizer",),
    "relocate reference-model": ("reference_model",),
    "relocate adapter": ("imported_adapter",),
    "relocate dataset": ("dataset", "acceptability", "tasks"),
    "encode": ("encoded_dataset",),
    "train": ("adapter", "merged_model"),
    "evaluate": ("base_scores", "adapter_scores", "reference_scores", "evaluation"),
}
SHARED = tuple(each.name for each in dataclasses.fields(EnvironmentPlan))
COMMANDS = {command: not set(made) <= set(SHARED) for command, made in STAGES.items()}
PUBLISH = "publish"  # of an adapter; makes no artifact: what it makes is in a registry or a bucket
VOLUMES = (DATASET_VOLUME, BASE_MODEL_VOLUME, TOKENIZER_VOLUME, REFERENCE_VOLUME, FINE_TUNED_VOLUME)
Specs = dict[str, Spec]


@dataclass(frozen=True)
class Side:
    """An overlay in one revision, or in the working tree."""

    environment: Environment
    adapters: Mapping[str, Adapter]
    manifests: list[Manifest] | None  # None if they do not render
    recipes: Mapping[str, int] | None = None  # of its code, if they are not those of this code


@dataclass(frozen=True)
class Setting:
    """A key of environment.yaml or pipeline.yaml whose value changed, and the artifacts that follow from it."""

    key: str
    before: Any
    after: Any
    artifacts: tuple[str, ...]
    shared: bool = False  # in environment.yaml, seen from an adapter

    def __str__(self) -> str:
        return f"{self.key}: {shown(self.before)} -> {shown(self.after)}"


@dataclass(frozen=True)
class Change:
    """One artifact."""

    name: str  # as in `python -m jobs await NAME`
    stage: str
    spec: Spec
    before: str | None  # the digest before
    reasons: tuple[str, ...]  # why it is new
    there: bool | None = None  # whether it is on the volume; None if nobody looked, or can know
    # False: its digest follows from the imported adapter, which only its relocation finds out.
    known: bool = True

    @property
    def new(self) -> bool:
        return self.before != self.spec.digest


@dataclass(frozen=True)
class Part:
    """The environment, or one adapter."""

    status: Status
    artifacts: Sequence[Change] = ()
    settings: Sequence[Setting] = ()
    service: Service = "unchanged"
    promoted: str | None = None  # the digest of the promoted adapter, if volumes were given

    def artifact(self, name: str) -> Change | None:
        return next((each for each in self.artifacts if each.name == name), None)


@dataclass(frozen=True)
class Run:
    """A Job or JobSet after the push."""

    workload: Workload
    before: str | None  # the name of its predecessor
    new: bool  # whether it gets a new name, and runs
    makes: tuple[str, ...]  # the new artifacts, as ADAPTER/NAME; if there are none, it finds its results and ends


@dataclass(frozen=True)
class Restart:
    """A reason for which serving restarts."""

    when: When
    reason: str


@dataclass(frozen=True)
class Changes:
    """Everything that a push changes."""

    environment: Part
    adapters: Mapping[str, Part]
    runs: Sequence[Run]
    removed: Sequence[str]  # Jobs and JobSets of before that are no more, except predecessors
    restarts: Sequence[Restart]
    server: Server
    rollouts: Sequence[str]  # other Deployments whose pods are replaced
    notes: list[str] = field(default_factory=list)


def compare(before: Side | None, after: Side, volumes: Path | None = None) -> Changes:
    """What changes from `before` to `after`.

    Args:
        before: None if there was nothing.
        volumes: a folder with a folder for each volume, named X or X-pvc; also say what is there.
    Raises:
        UserError: `volumes` holds no volume.
    """
    if volumes is not None:
        check_volumes(volumes)
    old = before.adapters if before else {}
    environment = _environment(before, after, volumes)
    adapters = {name: _adapter(name, before, after.adapters[name], volumes) if name in after.adapters
                else Part("removed", service="removed", promoted=_promoted(name, volumes))
                for name in sorted({*old, *after.adapters})}
    parts: list[tuple[str | None, Part]] = [(None, environment), *adapters.items()]
    made = {(name, each.name): each for name, part in parts for each in part.artifacts}
    runs, removed = _runs(before, after, made)
    restarts, rollouts = _restarts(before, after)
    if any(each.when == "base model there" for each in restarts):
        adapters = {name: dataclasses.replace(part, service="interrupted") if part.service == "kept" else part
                    for name, part in adapters.items()}
    notes = []
    if before and _moves(before, after):
        notes.append(f"the namespace changes from {_namespace(before)} to {_namespace(after)}, which has volumes of "
                     "its own; new ones are empty")
    if before:
        notes += _imports_of_another_base(before, after)
    return Changes(environment, adapters, runs, removed, restarts, _server(before, after), rollouts, notes)


def without(found: Changes, adapters: Collection[str]) -> Changes:
    """What changes, without these adapters and their Jobs."""
    return dataclasses.replace(
        found, adapters={name: part for name, part in found.adapters.items() if name not in adapters},
        runs=[run for run in found.runs if not any(adapter in adapters for _, adapter in run.workload.stages)])


def _imports_of_another_base(before: Side, after: Side) -> Iterator[str]:
    """A note for each imported adapter that stays, in an environment with another base: what it was trained with, only
    its relocation finds out."""
    was, now = environment_specs(before.environment, before.recipes), environment_specs(after.environment)
    changed = [key for key in ("base_model", "tokenizer") if was[key].digest != now[key].digest]
    changed += ["chat_template"] if before.environment.chat_template != after.environment.chat_template else []
    for name, adapter in after.adapters.items() if changed else ():
        old = before.adapters.get(name)
        if isinstance(adapter, ImportedAdapter) and isinstance(old, ImportedAdapter) and (
                plan_import(adapter).imported_adapter == plan_import(old).imported_adapter):
            yield (f"{name} is imported and stays the same, and {' and '.join(changed)} of the environment changes: "
                   "its relocation fails if it was trained with what was there before")


# --- artifacts --------------------------------------------------------------------------------------------------------


def _environment(before: Side | None, after: Side, volumes: Path | None) -> Part:
    old = before.environment if before else None
    return _part(old, after.environment, environment_specs, before.recipes if before else None, volumes)


def _adapter(name: str, before: Side | None, after: Adapter, volumes: Path | None) -> Part:
    old = before.adapters.get(name) if before else None
    part = _part(old, after, adapter_specs, before.recipes if before else None, volumes)
    promoted = _promoted(name, volumes)
    return dataclasses.replace(part, promoted=promoted, service=_service(part, volumes, promoted))


def environment_specs(environment: Environment, recipes: Mapping[str, int] | None = None) -> Specs:
    """The artifacts of an environment, by their names in the plan."""
    return _with_recipes(vars(plan_environment(environment)), recipes)


def adapter_specs(adapter: Adapter, recipes: Mapping[str, int] | None = None) -> Specs:
    """The artifacts of an adapter, without those of its environment, by their names in the plan. What is measured of an
    imported one is named as if its digest were that of its import; compare it with the same only (`unknown`)."""
    named: dict[str, Spec] = {}
    evaluation = adapter.evaluation
    if not isinstance(adapter, ImportedAdapter):
        named = vars(plan(adapter))
    else:
        imported = plan_import(adapter)
        named = {"imported_adapter": imported.imported_adapter}
        if here := adapter.evaluated_here:
            evaluated = vars(plan_evaluation(here, imported.imported_adapter))
            named |= {name: spec for name, spec in evaluated.items() if name != "adapter"}
    specs = _with_recipes(named, recipes)
    made = {"merged_model": adapter.environment.serving.mode == "merged",
            "tasks": bool(evaluation and evaluation.tasks)}
    return {name: spec for name, spec in specs.items() if name not in SHARED and made.get(name, True)}


def unknown(adapter: File) -> tuple[str, ...]:
    """The artifacts of an imported adapter whose digests only its relocation finds out."""
    return ("adapter_scores", "evaluation") if isinstance(adapter, ImportedAdapter) else ()


def _with_recipes(specs: Mapping[str, Spec], recipes: Mapping[str, int] | None) -> Specs:
    """The artifacts as code with other recipe numbers (jobs/core/plan.py) names them. Inputs come first in `specs`."""
    if recipes is None:
        return dict(specs)
    digests: dict[str, str] = {}
    renamed: Specs = {}
    for name, spec in specs.items():
        numbers = {"recipe": recipes.get(spec.kind), "embedded": recipes.get("embedded")}
        settings = dict(spec.spec) | {key: number for key, number in numbers.items()
                                      if key in spec.spec and number is not None}
        inputs = {key: digests.get(digest, digest) for key, digest in spec.inputs.items()}
        renamed[name] = Spec(spec.volume, spec.kind, settings, inputs)
        digests[spec.digest] = renamed[name].digest
    return renamed


def _part(old: File | None, new: File, specs_of: Callable[..., Specs], recipes: Mapping[str, int] | None,
          volumes: Path | None) -> Part:
    """The artifacts of a file, compared with those that the file before desired."""
    after, before = specs_of(new), specs_of(old, recipes) if old else {}
    settings = list(_settings(old, new, specs_of)) if type(old) is type(new) else []  # else all is another thing
    everything = plan_environment(new) if isinstance(new, Environment) else plan_adapter(new)
    names = {spec.digest: _typed(name) for name, spec in vars(everything).items()}
    artifacts = []
    for stage, made in STAGES.items():
        for name in made:
            if name in after:
                reasons = tuple(_reasons(before.get(name), after[name], name, settings, names)) if old else ()
                digest = before[name].digest if name in before else None
                known = name not in unknown(new)
                there = path(after[name], volumes).is_dir() if volumes is not None and known else None
                artifacts.append(Change(_typed(name), stage, after[name], digest, reasons, there, known))
    own = [each for each in settings if each.artifacts or not each.shared]
    changed = own or any(each.new for each in artifacts)
    return Part("added" if old is None else "changed" if changed else "unchanged", artifacts, own)


def _typed(name: str) -> str:
    """The name of an artifact as people type it."""
    return name.replace("_", "-")


def _settings(old: File, new: File, specs_of: Callable[..., Specs]) -> Iterator[Setting]:
    """The keys that differ, each with the artifacts whose own settings it changes."""
    before, after = specs_of(old), specs_of(new)
    for keys, was, now in changed_keys(old, new):
        # In both directions: a pin matters only beside the source that needs it, on the old side or on the new one.
        affected = {*_affected(before, specs_of(_with(old, keys, now))),
                    *_affected(after, specs_of(_with(new, keys, was)))}
        shared = keys[0] == "environment" and not isinstance(old, Environment)
        yield Setting(".".join(keys[1:] if shared else keys), was, now,
                      tuple(_typed(name) for name in after if name in affected), shared)


def _affected(one: Specs, other: Specs) -> Iterator[str]:
    """The artifacts that differ by more than their inputs."""
    for name in {*one, *other}:
        if name not in one or name not in other or one[name].spec != other[name].spec:
            yield name


def changed_keys(before: BaseModel | dict[str, Any], after: BaseModel | dict[str, Any], at: tuple[str, ...] = ()) \
        -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """Every key whose value differs between two files, defaults included: its path, and both values."""
    values, others = dict(before), dict(after)  # a model gives its fields
    for name in {**values, **others}:
        was, now = values.get(name), others.get(name)
        if isinstance(was, BaseModel | dict) and isinstance(now, BaseModel | dict):
            yield from changed_keys(was, now, (*at, name))
        elif was != now:
            yield (*at, name), was, now


def _with(file: Any, keys: Sequence[str], value: Any) -> Any:
    """The file with another value. Not validated: one half of a change may be invalid alone."""
    key, *rest = keys
    changed = {key: _with(dict(file)[key], rest, value) if rest else value}
    if isinstance(file, dict):
        return {name: each for name, each in {**file, **changed}.items() if each is not None}
    return file.model_copy(update=changed)


def _reasons(before: Spec | None, after: Spec, name: str, settings: Sequence[Setting], names: Mapping[str, str]) \
        -> Iterator[str]:
    """Why an artifact is new, in words; nothing if it is not."""
    if before is not None and before.digest == after.digest:
        return
    own = [str(each) for each in settings if _typed(name) in each.artifacts]
    yield from own
    if before is None:
        return
    numbers = [key for key in ("recipe", "embedded") if key in before.spec and key in after.spec
               and before.spec[key] != after.spec[key]]
    for key in numbers:
        yield f"{key}: {before.spec[key]} -> {after.spec[key]} (RECIPES in jobs/core/plan.py)"
    if before.spec != after.spec and not own and not numbers:
        yield "its settings changed"
    inputs = [names.get(digest, _typed(key)) for key, digest in after.inputs.items()
              if before.inputs.get(key) != digest]
    if inputs:
        yield f"new input: {', '.join(inputs)}"


# --- volumes ----------------------------------------------------------------------------------------------------------


def check_volumes(volumes: Path) -> None:
    """The folder must hold a folder for at least one volume.

    Raises:
        UserError: it does not.
    """
    if any((volumes / folder).is_dir() for volume in VOLUMES for folder in (volume, f"{volume}-pvc")):
        return
    hint = f" Did you mean {volumes / 'volumes'}?" if (volumes / "volumes").is_dir() else ""
    raise UserError(f"--volumes {volumes}: holds no folder of a volume, such as {FINE_TUNED_VOLUME} or "
                    f"{FINE_TUNED_VOLUME}-pvc.{hint}")


def path(spec: Spec, volumes: Path) -> Path:
    """Where the artifact is, or will be."""
    return _volume(spec.volume, volumes) / spec.kind / spec.digest


def _volume(name: str, volumes: Path) -> Path:
    """The folder of a volume: X-pvc, as `jobs local` keeps it, or X, as a cluster mounts it."""
    claim = volumes / f"{name}-pvc"
    return claim if claim.is_dir() else volumes / name


def _promoted(name: str, volumes: Path | None) -> str | None:
    """The digest of the promoted adapter. A damaged promotion counts as none, as serving takes it."""
    try:
        current = promotion.current(_volume(FINE_TUNED_VOLUME, volumes), name) if volumes else None
    except (UserError, OSError):
        return None
    return current.adapter if current else None


def _service(part: Part, volumes: Path | None, promoted: str | None) -> Service:
    """What clients of an adapter get: serving/candidates.py has the order."""
    adapter, evaluation = part.artifact("adapter"), part.artifact("evaluation")
    imported = part.artifact("imported-adapter")
    if not (evaluation.new if evaluation else imported is not None and imported.new):
        return "unchanged"
    if imported and not evaluation and imported.there:
        return "at once"
    if adapter and evaluation and volumes is not None and adapter.there and evaluation.there:
        return "at once" if _passed(path(evaluation.spec, volumes)) else "rejected"
    serves = part.status != "added" if volumes is None else promoted is not None
    return "kept" if serves else "unavailable"


def _passed(evaluation: Path) -> bool:
    """Whether an evaluation's verdict is that the adapter passed, by its manifest."""
    try:
        return read_manifest(evaluation)["about"]["passed"] is True
    except (UserError, OSError, ValueError, RecursionError, LookupError, TypeError):
        return False


# --- Jobs and serving -------------------------------------------------------------------------------------------------


def _runs(before: Side | None, after: Side, made: Mapping[tuple[str | None, str], Change]) \
        -> tuple[list[Run], list[str]]:
    """The Jobs and JobSets after the push, and the names of those that are no more."""
    old = workloads.find(before.manifests or [], COMMANDS | {PUBLISH: True}) if before else []
    predecessors = {(each.kind, each.title): each.name for each in old}
    names = {each.name for each in old}
    runs = []
    for each in workloads.find(after.manifests or [], COMMANDS | {PUBLISH: True}):
        makes = tuple(f"{adapter}/{change.name}" if adapter else change.name
                      for command, adapter in each.stages for (of, _), change in made.items()
                      if of == adapter and change.stage == command and is_made(change, made.get((of, "evaluation"))))
        makes += tuple(f"{adapter}/publication" for command, adapter in each.stages if command == PUBLISH
                       and (evaluation := made.get((adapter, "evaluation"))) and is_made(evaluation, evaluation))
        runs.append(Run(each, predecessors.pop((each.kind, each.title), None), each.name not in names, makes))
    return runs, sorted(predecessors.values())


def is_made(change: Change, evaluation: Change | None) -> bool:
    """Whether a run of its stage makes the artifact."""
    if change.there is None:
        return change.new
    if change.stage == "evaluate" and evaluation is not None and evaluation.there:
        return False  # without an evaluation to make, the scores are not needed
    return not change.there


def _server(before: Side | None, after: Side) -> Server:
    if before is not None and before.manifests is None:
        return "unknown"
    was = before is not None and INFERENCE in _templates(before) and not _moves(before, after)
    if INFERENCE in _templates(after):
        return "runs" if was else "starts"
    return "stops" if was else "none"


def _templates(side: Side) -> dict[str, Manifest]:
    return workloads.pod_templates(side.manifests or [])


def _moves(before: Side, after: Side) -> bool:
    """Whether the overlay gets another namespace."""
    return bool(before.manifests and after.manifests) and _namespace(before) != _namespace(after)


def _namespace(side: Side) -> str | None:
    return workloads.namespace(side.manifests or [])


def _restarts(before: Side | None, after: Side) -> tuple[list[Restart], list[str]]:
    """Why serving restarts, and the names of other Deployments whose pods are replaced."""
    if before is None or _moves(before, after):
        return [], []
    old, new = _templates(before), _templates(after)
    changed = [name for name in new if name in old and old[name] != new[name]]
    rollouts = [name for name in changed if name != INFERENCE]
    if INFERENCE not in new or (INFERENCE not in old and before.manifests is not None):
        return [], rollouts
    found = list(_restarts_by_file(before, after))
    if INFERENCE in changed:
        found.insert(0, Restart("rollout", _difference(old[INFERENCE], new[INFERENCE])))
    return found, rollouts


def _difference(before: Manifest, after: Manifest) -> str:
    """What differs between two pod templates, in words."""
    found = [_in_words(*difference) for difference in workloads.differences(before, after)]
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return f"its pods change: {'; '.join(found[:3])}{more}"


def _in_words(at: str, was: Any, now: Any) -> str:
    if isinstance(was, list) and isinstance(now, list):  # such as arguments: without those that stay
        was, now = [each for each in was if each not in now] or None, [each for each in now if each not in was] or None
    return f"{at}: {shown(was)} -> {shown(now)}"


def _restarts_by_file(before: Side, after: Side) -> Iterator[Restart]:
    """Why a server that runs restarts by itself: the rules of serving/base.py."""
    old, new = before.environment, after.environment
    was, now = environment_specs(old, before.recipes), environment_specs(new)
    reasons = [f"the {_typed(name).replace('-', ' ')} changes" for name in ("base_model", "tokenizer")
               if was[name].digest != now[name].digest]
    if old.chat_template != new.chat_template:
        reasons.append(f"chat_template changes from {shown(old.chat_template)} to {shown(new.chat_template)}")
    if old.serving.mode != new.serving.mode:
        reasons.append(f"serving.mode changes from {old.serving.mode} to {new.serving.mode}")
    if reasons:
        wait = new.serving.when_base_changes == "wait-for-adapters"
        yield Restart("adapters passed" if wait else "base model there", " and ".join(reasons))
        return  # what else changed comes with that restart
    if new.serving.mode == "merged":
        if any(name not in before.adapters or adapter_specs(each)["evaluation"].digest
               != adapter_specs(before.adapters[name], before.recipes)["evaluation"].digest
               for name, each in after.adapters.items()):
            yield Restart("adapters passed", "in mode merged, a new adapter needs a restart")
    else:  # the other keys are flags of vLLM, which are fixed at its start
        for (key,), before_value, after_value in changed_keys(old.serving, new.serving):
            lowered = key == "max_lora_rank" and after_value < before_value
            if key not in ("mode", "when_base_changes") and not lowered:
                yield Restart("at once", f"serving.{key}: {shown(before_value)} -> {shown(after_value)}")
