"""Compile the Jobs of an overlay to a KubeFlow pipeline: .venv-kubeflow/bin/python kubeflow/pipeline.py --help"""

# No `from __future__ import annotations`: kfp reads the annotations of pipelines and components as types.
import argparse
import hashlib
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the checkout instead of this folder, which Python puts first
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    if find_spec("kfp") is None:
        print("error: kfp is not installed in this Python. Run `make kubeflow`, which installs it into .venv-kubeflow, "
              "or .venv-kubeflow/bin/python kubeflow/pipeline.py", file=sys.stderr)
        sys.exit(2)

from kfp import compiler, dsl

from jobs.core.command import run_command
from jobs.core.errors import UserError
from jobs.tools import pods
from kubeflow import run as run_module
from kubeflow import steps as steps_module
from kubeflow import translation
from kubeflow.steps import Step, Steps

DESCRIPTION = """\
Compile the Jobs of an overlay to a pipeline of KubeFlow Pipelines (IR YAML), as `kubectl kustomize` renders them.

Image, command, arguments, environment, volumes, resources and retries of every step come from its Job, and the order
from the plan of the artifacts. What a Job says and KubeFlow Pipelines cannot is listed on stderr and in the pipeline's
description. docs/kubeflow.md leads from an empty KubeFlow to a served adapter.
"""
EPILOG = """\
examples
  python kubeflow/pipeline.py overlays/kind --output kind.yaml
  python kubeflow/pipeline.py overlays/kind --adapter seville-hotels --output seville-hotels.yaml

The pipeline mounts the ConfigMaps and volumes of the environment, so apply the environment first.
"""


@dataclass(frozen=True)
class Compiled:
    """A compiled pipeline."""

    name: str
    text: str  # IR YAML: the pipeline, and what is special to Kubernetes
    steps: Steps

    @property
    def version(self) -> str:
        """A name for this version of the pipeline: another pipeline has another one."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:12]


def compile_pipeline(overlay: Path, adapter: str | None = None) -> Compiled:
    """Compile the Jobs of an overlay; with `adapter`, only those of this adapter and of the environment.

    Raises:
        UserError: the overlay does not render, has no such adapter, or has a Job that cannot be a step.
    """
    return compile_manifests(pods.render(overlay), adapter)


def compile_manifests(manifests: list[pods.Manifest], adapter: str | None = None) -> Compiled:
    """Compile the Jobs among rendered manifests, as `compile_pipeline` does."""
    found = steps_module.find(manifests, adapter)
    pipeline = build(found, adapter)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pipeline.yaml"
        compiler.Compiler().compile(pipeline, str(file))
        return Compiled(pipeline.name, file.read_text(), found)


def build(found: Steps, adapter: str | None = None) -> Any:
    """The pipeline of these steps, as kfp has it: to compile it, or to run it with kfp.local."""
    parameters = run_module.parameters(found)
    names = tuple(parameters)

    def pipeline(*values: Any) -> None:
        of_run = dict(zip(names, values, strict=True))
        tasks: dict[str, dsl.PipelineTask] = {}

        def add(step: Step, component: Any, **inputs: Any) -> dsl.PipelineTask:
            added = task(step, component(**inputs, **{
                name: value for name, value in of_run.items() if name in (component.component_spec.inputs or ())}))
            return tasks.setdefault(step.name, added.after(*(tasks[name] for name in step.after)))

        def taken(step: Step) -> tuple[str, ...]:  # an imported adapter takes none
            return names if step.adapter in found.pipelines else ()

        for step in found.steps:
            add(step, run_module.component(step, run_module.settings(step, taken(step))))
        for step in found.steps:
            if step.stage == "evaluate" and step.adapter:
                results = add(*run_module.results(step, taken(step)))
                with dsl.If(results.outputs["verdict"] != "passed", name=f"did-not-pass-{step.adapter}"):
                    add(*run_module.refusal(step), summary=results.outputs["summary"])

    types = {name: run_module.PARAMETERS[name][1] for name in names}
    title = "-".join(part for part in (found.namespace, adapter) if part)
    return dsl.pipeline(run_module.signed(pipeline, title, types, parameters), name=title,
                        description=description(found))


def task(step: Step, task: dsl.PipelineTask) -> dsl.PipelineTask:
    """Give a task everything else that its Job says.

    Raises:
        UserError: kfp does not accept a value.
    """
    for setting in step.executor.settings:
        try:
            setting(task)
        except (AttributeError, TypeError, ValueError) as error:
            raise UserError(f"{step.name}: kfp does not accept a value of its Job: {error}") from None
    # KFP's cache is off: a step that finds its artifact ends within seconds by itself, and it verifies what it finds.
    # KFP would compare image, arguments and names of claims, but neither what is on the volume nor which ConfigMap is
    # mounted, and would skip a step whose artifact is gone or whose pipeline.yaml changed.
    task.set_caching_options(enable_caching=False)
    return task.set_display_name(step.name)


def description(found: Steps) -> str:
    """What people see beside the pipeline: where it comes from, and what KubeFlow Pipelines cannot say of its Jobs."""
    return "\n".join([f"The Jobs of the environment {found.namespace}, compiled by kubeflow/pipeline.py. What they say "
                      "and KubeFlow Pipelines cannot (docs/kubeflow.md):",
                      *(f"- {line}" for line in unsupported(found))])


def unsupported(found: Steps) -> list[str]:
    """A line for each field that KubeFlow Pipelines cannot say: which, of which steps, and what happens instead."""
    of: dict[str, list[str]] = {}
    for step in found.steps:
        for path in dict.fromkeys(map(translation.shown, step.executor.unsupported)):
            of.setdefault(path, []).append(step.name)
    everywhere = [step.name for step in found.steps]
    lines = [f"{path} ({'all steps' if names == everywhere else ', '.join(names)}): {translation.reason(path)}"
             for path, names in sorted(of.items())]
    return lines + [f"{path} (JobSet): {reason}" for path, reason in sorted(found.of_sets.items())]


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="kubeflow/pipeline.py", description=DESCRIPTION, epilog=EPILOG,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("overlay", type=Path, metavar="OVERLAY", help="the overlay's folder, e.g. overlays/kind")
    top.add_argument("--adapter", metavar="NAME",
                     help="only the steps of this adapter and of its environment (default: of all adapters)")
    top.add_argument("--output", type=Path, metavar="FILE", help="the file to write, *.yaml (default: stdout)")
    return top


def run(args: argparse.Namespace) -> None:
    if args.output and args.output.suffix not in (".yaml", ".yml"):
        raise UserError(f"--output {args.output}: KubeFlow takes files whose names end with .yaml")
    compiled = compile_pipeline(args.overlay, args.adapter)
    if args.output:
        try:
            args.output.write_text(compiled.text)
        except OSError as error:
            raise UserError(f"--output {args.output}: cannot be written: {error.strerror}") from None
    else:
        print(compiled.text, end="")
    print(f"{compiled.name}: {len(compiled.steps.steps)} Jobs, version {compiled.version}",
          "What the Jobs say and KubeFlow Pipelines cannot (docs/kubeflow.md says what to do):",
          *(f"  {line}" for line in unsupported(compiled.steps)), sep="\n", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_command(lambda: run(parser().parse_args())))
