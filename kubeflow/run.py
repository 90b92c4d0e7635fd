"""What a run takes and what it shows: the parameters of its form, and the steps that follow an evaluation.

`evaluation-results` makes artifacts of KubeFlow from those on the volumes, and has the verdict as its output.
`adapter-not-promoted` runs where the verdict is not `passed`, and fails with the rules that do not hold: a run that
succeeded is one whose adapter passed.
"""

# No `from __future__ import annotations`: kfp reads the annotations of components as types.
import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kfp import dsl

from jobs.core.plan import FINE_TUNED_VOLUME
from jobs.tools.pods import Manifest
from kubeflow import translation
from kubeflow.steps import Step, Steps

# The parameters of a run, by the key of `training` for which each stands. Of a pipeline for several adapters there are
# none.
PARAMETERS = {"epochs": ("epochs", int), "learning_rate": ("learning_rate", float), "lora_r": ("lora.r", int)}
CHANGED = ("train", "evaluate", "publish")  # the stages for which these keys matter
RESULTS, REFUSAL = "evaluation-results", "adapter-not-promoted"
# What these two steps take: they compute nothing, so they leave the evaluation's GPU to others.
RESOURCES = {"requests": {"cpu": "20m", "memory": "128Mi"}, "limits": {"memory": "1Gi"}}
OUTPUTS = Path(__file__).with_name("outputs.py")


def parameters(found: Steps) -> dict[str, int | float]:
    """The parameters of a run, with the values of the pipeline file; without those that training searches."""
    trained = [found.pipelines[step.adapter] for step in found.steps if step.stage == "train" and step.adapter]
    if len(trained) != 1:
        return {}
    training = trained[0].training
    searched = training.search.candidates.by_key() if training.search else {}
    return {name: _value(training, key) for name, (key, _) in PARAMETERS.items() if key not in searched}


def _value(training: Any, key: str) -> Any:
    for name in key.split("."):
        training = getattr(training, name)
    return training


def settings(step: Step, names: Sequence[str]) -> dict[str, str]:
    """The parameters that a step takes, each with the key of the pipeline file for which it stands."""
    return {name: f"training.{PARAMETERS[name][0]}" for name in names} if step.stage in CHANGED else {}


def component(step: Step, keys: Mapping[str, str]) -> Any:
    """A Job's container as a component of kfp, with an argument more for each parameter that it takes."""
    executor = step.executor

    def container(*values: Any) -> dsl.ContainerSpec:
        return dsl.ContainerSpec(executor.image, executor.command, [*executor.args, *_arguments(keys, values)])

    return dsl.container_component(signed(container, step.name, {name: PARAMETERS[name][1] for name in keys}))


def _arguments(keys: Mapping[str, str], values: Sequence[Any]) -> list[str]:
    return [f"--set={key}={value}" for key, value in zip(keys.values(), values, strict=True)]


def results(evaluation: Step, names: Sequence[str]) -> tuple[Step, Any]:
    """The step that shows what an evaluation found, and its component."""
    keys = settings(evaluation, names)
    step = _after(evaluation, RESULTS, ["python", "-c", OUTPUTS.read_text(encoding="utf-8")], volumes=True)
    claim = _claim(evaluation.job)

    def container(verdict: Any, summary: Any, report: Any, adapter: Any, base_scores: Any, fine_tuned_scores: Any,
                  reference_scores: Any, *values: Any) -> dsl.ContainerSpec:
        return dsl.ContainerSpec(step.executor.image, step.executor.command, [
            "--executor-input", "{{$}}", "--report", report.path, "--adapter", adapter.path, "--claim", claim,
            *_arguments(keys, values)])

    outputs = {"verdict": dsl.OutputPath(str), "summary": dsl.OutputPath(str), "report": dsl.Output[dsl.HTML],
               "adapter": dsl.Output[dsl.Model], "base_scores": dsl.Output[dsl.Metrics],
               "fine_tuned_scores": dsl.Output[dsl.Metrics], "reference_scores": dsl.Output[dsl.Metrics]}
    return step, dsl.container_component(signed(container, step.name, outputs | {
        name: PARAMETERS[name][1] for name in keys}))


def refusal(evaluation: Step) -> tuple[Step, Any]:
    """The step that ends a run whose adapter did not pass, and its component."""
    step = _after(evaluation, REFUSAL, ["python", "-c", "import sys; sys.exit(sys.argv[1])"], volumes=False)

    def container(summary: str) -> dsl.ContainerSpec:
        return dsl.ContainerSpec(step.executor.image, step.executor.command, [summary])

    return step, dsl.container_component(signed(container, step.name, {"summary": str}))


def _after(evaluation: Step, title: str, command: list[str], *, volumes: bool) -> Step:
    """A step like the evaluation's that runs another command, on a CPU.

    Args:
        volumes: whether it reads what the evaluation made.
    """
    job: Manifest = copy.deepcopy(evaluation.job)
    pod = job["spec"]["template"]["spec"]
    pod.pop("initContainers", None)
    (container,) = pod["containers"]
    container |= {"command": command, "args": [], "resources": RESOURCES}
    kept = {volume["name"] for volume in pod.get("volumes", []) if "emptyDir" in volume or (volumes and (
        "persistentVolumeClaim" not in volume or volume["persistentVolumeClaim"]["claimName"] == _claim(job)))}
    pod["volumes"] = [volume for volume in pod.get("volumes", []) if volume["name"] in kept]
    container["volumeMounts"] = [mount for mount in container.get("volumeMounts", []) if mount["name"] in kept]
    if not volumes:  # it fails for a reason that stays
        job["spec"]["backoffLimit"] = 0
    name = f"{title}-{evaluation.adapter}" if evaluation.adapter else title
    return Step(name, job, None, evaluation.adapter, translation.translate(job), (evaluation.name,) if volumes else ())


def _claim(job: Manifest) -> str:
    """The claim of the volume on which adapters are."""
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    name = next(mount["name"] for mount in container["volumeMounts"]
                if mount["mountPath"].rstrip("/").endswith(f"/{FINE_TUNED_VOLUME}"))
    claims: dict[str, Any] = {volume["name"]: volume for volume in pod["volumes"]}
    return str(claims[name]["persistentVolumeClaim"]["claimName"])


def signed(function: Callable[..., Any], name: str, types: Mapping[str, Any],
           defaults: Mapping[str, Any] | None = None) -> Callable[..., Any]:
    """A function with the name and the parameters that kfp shall see."""
    function.__name__, function.__doc__ = name, None
    function.__signature__ = inspect.Signature([  # type: ignore[attr-defined]
        inspect.Parameter(parameter, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind,
                          default=(defaults or {}).get(parameter, inspect.Parameter.empty))
        for parameter, kind in types.items()])
    return function
