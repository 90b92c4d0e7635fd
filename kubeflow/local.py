"""Run the pipeline of an overlay with kfp.local, without a cluster.

    .venv-kubeflow/bin/python kubeflow/local.py overlays/kind --adapter seville-hotels

kfp.local carries out the compiled pipeline: the order of the steps, its parameters, outputs and conditions. Of its two
runners one needs Docker (--docker), and the other takes no container components. In the place of the latter, a step's
container becomes a process of this checkout, its mounts folders below the state (jobs/tools/pods.py, as in `make
demo`). Image, user and resources have no meaning then.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":  # the checkout instead of this folder, which Python puts first
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import yaml
from kfp import components, local
from kfp.local import status, subprocess_task_handler, task_handler_interface
from kfp.local.orchestrator import enhanced_dag_orchestrator

from jobs.core.command import run_command
from jobs.core.errors import RetryableError, UserError
from jobs.tools import pods
from jobs.tools.local import own
from jobs.tools.pods import CHECKOUT, Manifest
from kubeflow import pipeline

EXECUTOR = "KUBEFLOW_EXECUTOR"  # in the environment of a step, for its handler: which of the pipeline's executors it is
COLOUR = re.compile(r"\x1b\[\d+m")
JOBS_PYTHON = CHECKOUT / ".venv" / "bin" / "python"


@dataclass(frozen=True)
class Result:
    """What the run of one adapter's pipeline showed."""

    verdict: str
    summary: str
    adapter: dict[str, str]  # the metadata of the artifact
    scores: dict[str, dict[str, float]]  # by model: base, fine_tuned, reference
    volume: Path  # on which adapter and evaluation are

    @property
    def folder(self) -> Path:
        """The adapter."""
        return self.volume / "adapter" / self.adapter["digest"]

    @property
    def report(self) -> Path:
        """The report of its evaluation."""
        return self.volume / "evaluation" / self.adapter["evaluation"] / "report.html"


def run(text: str, config_maps: list[Manifest], state: Path, parameters: dict[str, Any] | None = None, *,
        docker: bool = False) -> list[Result]:
    """Run a compiled pipeline.

    Args:
        text: the pipeline, as it is given to KubeFlow.
        config_maps: those that the environment has in the cluster.
        state: a folder with the volumes (`volumes/CLAIM`), as in `jobs local`; outputs go to `kubeflow/`.
        parameters: of the run.
        docker: run the images with Docker, instead of processes.
    Raises:
        UserError: a step cannot run without a cluster, a parameter does not fit, or a step ended with exit code 2.
        RetryableError: a step failed; its output is above.
    """
    documents = list(yaml.safe_load_all(text))
    spec, platform = documents[0], documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    arguments = typed(parameters or {}, spec["root"].get("inputDefinitions", {}).get("parameters", {}))
    manifests = [job(label, executor["container"], platform.get(label, {}))
                 for label, executor in spec["deploymentSpec"]["executors"].items()]
    for label, executor in spec["deploymentSpec"]["executors"].items():
        executor["container"].setdefault("env", []).append({"name": EXECUTOR, "value": label})
    (state / "kubeflow").mkdir(parents=True, exist_ok=True)
    before = set((state / "kubeflow").iterdir())
    with ExitStack() as stack:
        own(state, stack)
        placed = {pod.name: pod.containers[0] for pod in pods.pods([*config_maps, *manifests], state)}
        stack.enter_context(_runner({(name := manifest["metadata"]["name"]): Placed(placed[name], manifest)
                                     for manifest in manifests}, state))
        runner = docker_runner(manifests, state) if docker else local.SubprocessRunner(use_venv=False)
        local.init(runner, pipeline_root=str(state / "kubeflow"))
        try:
            components.load_component_from_text(yaml.safe_dump_all([spec, *documents[1:]]))(**arguments)
        except RuntimeError as error:
            raise RetryableError(COLOUR.sub("", str(error))) from None
        finally:
            found = [result for folder in sorted(set((state / "kubeflow").iterdir()) - before)
                     for result in results(folder)]
            print("\n".join(map(table, found)), flush=True)
    return found


def typed(parameters: dict[str, Any], known: dict[str, Any]) -> dict[str, int | float]:
    """Parameters of a run in the types that the pipeline has: kfp takes no 1 for 1.0.

    Raises:
        UserError: there is no such parameter, or it has another type.
    """
    types: dict[str, type[int] | type[float]] = {"NUMBER_INTEGER": int, "NUMBER_DOUBLE": float}
    found = {}
    for name, value in parameters.items():
        if name not in known:
            raise UserError(f"the pipeline has no parameter {name}; it has {', '.join(known) or 'none'}")
        kind = types[known[name]["parameterType"]]
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or kind(value) != value:
            expected = "a whole number" if kind is int else "a number"
            raise UserError(f"the parameter {name} is {value!r}, but must be {expected}")
        found[name] = kind(value)
    return found


def job(label: str, container: dict[str, Any], platform: dict[str, Any]) -> Manifest:
    """An executor of a compiled pipeline as a Job: what a cluster would mount into its pod."""
    volumes: list[dict[str, Any]] = []
    mounts: list[dict[str, str]] = []

    def mount(path: str, volume: dict[str, Any]) -> None:
        volumes.append({"name": f"volume-{len(volumes)}", **volume})
        mounts.append({"name": volumes[-1]["name"], "mountPath": path})

    for each in platform.get("pvcMount", []):
        mount(each["mountPath"], {"persistentVolumeClaim": {"claimName": _constant(each["pvcNameParameter"])}})
    for each in platform.get("configMapAsVolume", []):
        mount(each["mountPath"], {"configMap": {"name": _constant(each["configMapNameParameter"]),
                                                "optional": each.get("optional", False)}})
    for each in platform.get("secretAsVolume", []):
        mount(each["mountPath"], {"secret": {"secretName": _constant(each["secretNameParameter"]),
                                             "optional": each.get("optional", False)}})
    for each in platform.get("emptyDirMounts", []):
        mount(each["mountPath"], {"emptyDir": {}})
    env: list[dict[str, Any]] = list(container.get("env", []))
    for each in platform.get("secretAsEnv", []):
        env += [{"name": key["envVar"], "valueFrom": {"secretKeyRef": {
            "name": _constant(each["secretNameParameter"]), "key": key["secretKey"],
            "optional": each.get("optional", False)}}} for key in each["keyToEnv"]]
    return {"kind": "Job", "metadata": {"name": label}, "spec": {"template": {"spec": {
        "volumes": volumes, "containers": [{
            "name": "job", "image": container["image"], "command": container["command"],
            "args": container.get("args", []), "env": env, "volumeMounts": mounts}]}}}}


def _constant(parameter: dict[str, Any]) -> str:
    return str(parameter["runtimeValue"]["constant"])


def docker_runner(manifests: list[Manifest], state: Path) -> local.DockerRunner:
    """kfp.local's runner with Docker. It knows no mounts of a step, so all steps get those of all.

    Raises:
        UserError: two steps mount different things at the same path.
    """
    from docker.types import Mount

    folders: dict[str, Path] = {}
    scratch: dict[str, str] = {}
    variables = {"USER": "pipeline"}  # the user below has no name in the image
    for manifest in manifests:
        pod = manifest["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for path, volume in ((each["mountPath"], volumes[each["name"]]) for each in container["volumeMounts"]):
            if "emptyDir" in volume:
                scratch[path] = ""
            elif folders.setdefault(path, folder := _folder(volume, state)) != folder:
                raise UserError(f"{path}: two steps mount different volumes there, and with Docker all steps have the "
                                "same. Run one adapter: --adapter NAME")
        variables |= {each["name"]: os.environ[each["name"]] for each in container["env"]
                      if "valueFrom" in each and each["name"] in os.environ}
    return local.DockerRunner(
        mounts=[Mount(path, str(folder), type="bind") for path, folder in folders.items()], tmpfs=scratch,
        environment=variables, user=f"{os.getuid()}:{os.getgid()}",
        entrypoint=[""])  # kfp appends the command to the image's own otherwise


def _folder(volume: dict[str, Any], state: Path) -> Path:
    """Where jobs/tools/pods.py keeps a volume."""
    if claim := volume.get("persistentVolumeClaim"):
        return state / "volumes" / str(claim["claimName"])
    if config_map := volume.get("configMap"):
        return state / "configmaps" / str(config_map["name"])
    return state / "secrets" / str(volume["secret"]["secretName"])


@dataclass(frozen=True)
class Placed:
    """A step's container as a process, and as it was in the pipeline."""

    container: pods.Container
    manifest: Manifest

    def command(self, resolved: list[str]) -> list[str]:
        """The command line: what kfp put in the place of its placeholders is of this machine already."""
        (container,) = self.manifest["spec"]["template"]["spec"]["containers"]
        original = [*container["command"], *container["args"]]
        argv = [mine if "{{$" in raw else placed
                for raw, placed, mine in zip(original, self.container.argv, resolved, strict=True)]
        return [str(JOBS_PYTHON) if argv[0] == sys.executable else argv[0], *argv[1:]]


@contextmanager
def _runner(steps: dict[str, Placed], state: Path) -> Iterator[None]:
    """kfp.local with a runner for these steps, by the names of their executors."""

    class Handler(task_handler_interface.ITaskHandler):
        def __init__(self, image: str, full_command: list[str], pipeline_root: str, runner: Any,
                     env_vars: dict[str, str] | None = None) -> None:
            self.step = steps[(env_vars or {})[EXECUTOR]]
            self.command = self.step.command(full_command)

        def run(self) -> status.Status:
            with subprocess.Popen(self.command, cwd=state, env=self.step.container.env, stdin=subprocess.DEVNULL,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
                assert process.stdout
                try:
                    for line in process.stdout:
                        print(line, end="", flush=True)
                except BaseException:
                    process.terminate()
                    raise
            if process.returncode == UserError.exit_code:  # kfp would repeat it
                name = self.step.manifest["metadata"]["name"].removeprefix("exec-")
                raise UserError(f"{name} ended with exit code {process.returncode}: its last lines say why")
            return status.Status.SUCCESS if process.returncode == 0 else status.Status.FAILURE

    evaluator = enhanced_dag_orchestrator.ConditionEvaluator
    original = evaluator._resolve_pipeline_channel

    def resolve(reference: str, store: Any) -> Any:
        # kfp 2.17.3 finds the output of a step here only if it is named `Output`, and takes other conditions for false.
        task, _, output = reference.removeprefix("pipelinechannel--").rpartition("-")
        try:
            return store.get_task_output(task, output)
        except ValueError:
            return original(reference, store)

    with (warnings.catch_warnings(),
          mock.patch.object(subprocess_task_handler, "SubprocessTaskHandler", Handler),
          mock.patch.object(evaluator, "_resolve_pipeline_channel", staticmethod(resolve))):
        warnings.filterwarnings("ignore", message=".*have no effect in the current local runner")
        yield


def results(folder: Path) -> Iterator[Result]:
    """What the steps `evaluation-results` of a run wrote below its folder."""
    for step in sorted(folder.glob("evaluation-results*")):
        if not (step / "executor_output.json").exists():
            continue
        artifacts = json.loads((step / "executor_output.json").read_text())["artifacts"]
        metadata = {name: of_name["artifacts"][0]["metadata"] for name, of_name in artifacts.items()}
        claim = metadata["adapter"]["storage"].removeprefix("pvc://").partition("/")[0]
        yield Result((step / "verdict").read_text(), (step / "summary").read_text(), metadata["adapter"],
                     {role: metadata[f"{role}_scores"] for role in ("base", "fine_tuned", "reference")},
                     folder.parent.parent / "volumes" / claim)


def table(result: Result) -> str:
    """A result as a terminal shows it."""
    models = list(result.scores)
    rows = [["", *(model.replace("_", "-") for model in models)], *(
        [key, *(f"{result.scores[model][key]:.4g}" if key in result.scores[model] else "" for model in models)]
        for key in result.scores["fine_tuned"])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in
                                                   zip(row[1:], widths[1:], strict=True))]) for row in rows]
    return "\n".join(["", result.summary, "", *lines, "", f"Adapter  {result.folder}",
                      f"Report   file://{result.report}"])


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="kubeflow/local.py", description=__doc__,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("overlay", type=Path, metavar="OVERLAY", help="the overlay's folder, e.g. overlays/kind")
    top.add_argument("--adapter", metavar="NAME",
                     help="only the steps of this adapter and of its environment (default: of all adapters)")
    top.add_argument("--state", type=Path, metavar="DIR",
                     help="where volumes and outputs are kept (default: .local/NAME, as in `make demo`)")
    top.add_argument("--parameter", action="append", default=[], metavar="NAME=VALUE",
                     help="a parameter of the run, such as epochs=3; can be repeated")
    top.add_argument("--docker", action="store_true", help="run the images (make images) with Docker, not processes")
    return top


def main(args: argparse.Namespace) -> None:
    """Compile the pipeline of an overlay, and run it."""
    if not (args.docker or JOBS_PYTHON.exists()):
        raise UserError(f"{JOBS_PYTHON}: no such file. The steps run with the packages of the jobs: make setup")
    parameters = {}
    for parameter in args.parameter:
        name, _, value = parameter.partition("=")
        try:
            parameters[name] = json.loads(value)
        except ValueError:
            raise UserError(f"--parameter {parameter}: must be NAME=NUMBER, such as epochs=3") from None
    manifests = pods.render(args.overlay)
    compiled = pipeline.compile_manifests(manifests, args.adapter)
    state = (args.state or CHECKOUT / ".local" / args.overlay.resolve().name).resolve()
    run(compiled.text, [each for each in manifests if each["kind"] == "ConfigMap"], state, parameters,
        docker=args.docker)


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(parser().parse_args())))
