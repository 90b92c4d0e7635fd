"""Promises of a run: KubeFlow shows what the artifacts hold, the verdict ends the run, its parameters are edits of the
pipeline file, and the notebook does all of it without a cluster."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.core import artifacts, pipeline, promotion
from jobs.core.plan import Plan, plan
from jobs.tools.pods import CHECKOUT
from tests.build_embedded import as_claims

PYTHON = CHECKOUT / ".venv-kubeflow" / "bin" / "python"
NOTEBOOK = CHECKOUT / "kubeflow" / "GeneratePipeline.ipynb"
OVERLAY = CHECKOUT / "overlays" / "kind"
ADAPTER = "seville-hotels"
FINE_TUNED = Path("volumes", "fine-tuned-model-pvc")


def wanted(*changes: str) -> Plan:
    return plan(pipeline.load(OVERLAY / "adapters" / ADAPTER, changes=changes).pipeline)


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(PYTHON), *map(str, command)], cwd=CHECKOUT, env=os.environ | environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=840, check=False)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The pipeline of one adapter: the first document of its IR."""
    file = tmp_path_factory.mktemp("compiled") / "pipeline.yaml"
    done = run("kubeflow/pipeline.py", OVERLAY, "--adapter", ADAPTER, "--output", file)
    assert done.returncode == 0, done.stdout
    return next(iter(yaml.safe_load_all(file.read_text())))


# --- the compiled pipeline --------------------------------------------------------------------------------------------


def test_the_parameters_of_a_run_are_settings_with_the_values_in_git(compiled: dict[str, Any]) -> None:
    training = pipeline.load(OVERLAY / "adapters" / ADAPTER).pipeline.training
    parameters = compiled["root"]["inputDefinitions"]["parameters"]
    assert {name: each["defaultValue"] for name, each in parameters.items()} == {
        "epochs": training.epochs, "learning_rate": training.learning_rate, "lora_r": training.lora.r}
    expected = [f"--set=training.{key}={{{{$.inputs.parameters['{name}']}}}}" for name, key in (
        ("epochs", "epochs"), ("learning_rate", "learning_rate"), ("lora_r", "lora.r"))]
    taken = {label: [each for each in executor["container"]["args"] if each.startswith("--set=")]
             for label, executor in compiled["deploymentSpec"]["executors"].items()}
    assert {label: args for label, args in taken.items() if args} == {
        f"exec-{step}-{ADAPTER}": expected for step in ("model-training", "model-evaluation", "evaluation-results")}


def test_the_results_are_artifacts_of_kubeflow(compiled: dict[str, Any]) -> None:
    outputs = compiled["components"][f"comp-evaluation-results-{ADAPTER}"]["outputDefinitions"]
    assert {name: each["artifactType"]["schemaTitle"] for name, each in outputs["artifacts"].items()} == {
        "report": "system.HTML", "adapter": "system.Model", "base_scores": "system.Metrics",
        "fine_tuned_scores": "system.Metrics", "reference_scores": "system.Metrics"}
    (condition,) = [task for task in compiled["root"]["dag"]["tasks"].values() if "triggerPolicy" in task]
    assert condition["triggerPolicy"]["condition"].endswith("-verdict'] != 'passed'")
    guarded = compiled["components"][condition["componentRef"]["name"]]["dag"]["tasks"]
    assert list(guarded) == [f"adapter-not-promoted-{ADAPTER}"]
    assert "retryPolicy" not in guarded[f"adapter-not-promoted-{ADAPTER}"], "the result would be the same"


# --- the notebook -----------------------------------------------------------------------------------------------------


def test_the_notebook_has_no_outputs_in_git() -> None:
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None, cell["source"]


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Path:
    """A state in which the notebook ran, with `notebook.ipynb` and its outputs. The models and the adapter were made
    before; with another parameter, a run below trains and evaluates one from the start."""
    folder = tmp_path_factory.mktemp("state")
    as_claims(trained, folder)
    done = run("tests/kubeflow/execute_notebook.py", NOTEBOOK, folder / "notebook.ipynb", STATE=str(folder))
    assert done.returncode == 0, done.stdout[-5000:]
    return folder


def shown(state: Path, source: str) -> str:
    """What the cell of the notebook printed that has this in its source."""
    (cell,) = [each for each in json.loads((state / "notebook.ipynb").read_text())["cells"]
               if each["cell_type"] == "code" and source in "".join(each["source"])]
    return "".join("".join(output.get("text", "")) for output in cell["outputs"])


@pytest.mark.slow
def test_the_notebook_runs_the_pipeline_which_makes_and_promotes_the_artifacts_of_the_jobs(state: Path) -> None:
    """The digests follow from the files in git, so these are the artifacts of `make demo`."""
    expected = wanted()
    for spec in (expected.adapter, expected.evaluation):
        artifacts.read(state / FINE_TUNED / spec.kind / spec.digest)
    promoted = promotion.current(state / FINE_TUNED, ADAPTER)
    assert promoted is not None
    assert (promoted.adapter, promoted.evaluation) == (expected.adapter.digest, expected.evaluation.digest)
    first = shown(state, "(result,) = local.run")
    assert "Pipeline 'lora-gitops-seville-hotels' finished with status SUCCESS" in without_colours(first)
    assert f"Adapter  {state}/{FINE_TUNED}/adapter/{expected.adapter.digest}\n" in first


@pytest.mark.slow
def test_a_second_run_trains_nothing(state: Path) -> None:
    again = shown(state, "time.monotonic")
    # Of the environment three, of the adapter four Jobs; the relocation of its dataset has three artifacts.
    assert again.count("is already there and verified: nothing to do") == 3 + 4 + 2
    assert "published" not in again
    seconds = re.search(r"^(\d+) seconds$", again, re.MULTILINE)
    assert seconds and int(seconds.group(1)) < 120, "each step starts a process; alone on two cores it takes ten"


@pytest.mark.slow
def test_kubeflow_shows_the_scores_and_the_report_of_the_evaluation(state: Path) -> None:
    folder = state / FINE_TUNED / "evaluation" / wanted().evaluation.digest
    evaluation = json.loads((folder / "evaluation.json").read_text())
    for run_folder in (state / "kubeflow").glob("lora-gitops-*"):
        results = run_folder / f"evaluation-results-{ADAPTER}"
        metadata = {name: of_name["artifacts"][0]["metadata"] for name, of_name in
                    json.loads((results / "executor_output.json").read_text())["artifacts"].items()}
        for role in ("base", "fine_tuned", "reference"):
            scores = metadata[f"{role}_scores"]
            assert {key: evaluation["scores"][role][key] for key in scores} == scores
            assert {"perplexity", "rougeL", "acceptability_mcc", "tasks.hotel-facts"} <= scores.keys()
        assert (results / "report").read_bytes() == (folder / "report.html").read_bytes()
        assert json.loads((results / "adapter").read_text())["digest"] == wanted().adapter.digest
        assert metadata["adapter"]["digest"] == wanted().adapter.digest and metadata["adapter"]["promoted"] == "yes"
        assert (results / "verdict").read_text() == "passed"


# --- verdict and parameters -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_with_another_parameter_is_the_file_with_that_value_and_fails_with_the_rules_that_do_not_hold(
        state: Path) -> None:
    before = promotion.current(state / FINE_TUNED, ADAPTER)
    done = run("kubeflow/local.py", OVERLAY, "--adapter", ADAPTER, "--state", state, "--parameter", "epochs=1")
    output = without_colours(done.stdout)
    assert done.returncode == 1, output[-5000:]
    expected = wanted("training.epochs=1")
    evaluation = artifacts.read(state / FINE_TUNED / "evaluation" / expected.evaluation.digest)
    assert evaluation.manifest["about"]["passed"] is False
    assert promotion.current(state / FINE_TUNED, ADAPTER) == before
    assert f"Executing task 'adapter-not-promoted-{ADAPTER}'" in output
    refused = output.partition(f"Executing task 'adapter-not-promoted-{ADAPTER}'")[2]
    assert f"{ADAPTER}@{expected.adapter.digest} rejected: " in refused
    assert "✗ rougeL: fine-tuned - base must be at least 0.3" in refused
    assert "Its own values:\n      training:\n        epochs: 1\n" in refused


@pytest.mark.slow
def test_an_impossible_value_ends_the_run_at_once_with_the_reason(state: Path) -> None:
    done = run("kubeflow/local.py", OVERLAY, "--adapter", ADAPTER, "--state", state, "--parameter", "learning_rate=3")
    assert done.returncode == 2, done.stdout[-5000:]
    assert re.search(r"with --set .*/pipeline.yaml:\d+: training.learning_rate: 3.0: .* less than 1\n", done.stdout)
    assert done.stdout.endswith(f"error: model-training-{ADAPTER} ended with exit code 2: its last lines say why\n")


def test_a_parameter_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    code = """
import sys
from jobs.core.command import run_command
from kubeflow import local
for parameter in sys.argv[1].split():
    args = local.parser().parse_args([*sys.argv[2:], "--parameter", parameter])
    print("code", run_command(lambda: local.main(args)), flush=True)
"""
    messages = {"seed=1": "the pipeline has no parameter seed; it has epochs, learning_rate, lora_r",
                "epochs=1.5": "the parameter epochs is 1.5, but must be a whole number",
                "epochs=many": "--parameter epochs=many: must be NAME=NUMBER, such as epochs=3"}
    done = run("-c", code, " ".join(messages), OVERLAY, "--adapter", ADAPTER, "--state", tmp_path)
    assert done.returncode == 0, done.stdout
    assert [line for line in done.stdout.splitlines() if line.startswith(("error", "code"))] == [
        line for message in messages.values() for line in (f"error: {message}", "code 2")]


def test_with_docker_every_step_has_the_mounts_of_all_so_two_adapters_are_refused(tmp_path: Path) -> None:
    """What kfp.local passes to Docker. Here is none to run it."""
    code = """
import json, sys
from pathlib import Path
import yaml
from kubeflow import local, pipeline
spec, platform = yaml.safe_load_all(pipeline.compile_pipeline(Path(sys.argv[1]), *sys.argv[2:]).text)
mounts = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
jobs = [local.job(label, executor["container"], mounts[label])
        for label, executor in spec["deploymentSpec"]["executors"].items()]
arguments = local.docker_runner(jobs, Path("/state")).container_run_args
print(json.dumps({**{mount["Target"]: mount["Source"] for mount in arguments["mounts"]}, **arguments["tmpfs"]}))
"""
    done = run("-c", code, OVERLAY, ADAPTER)
    assert done.returncode == 0, done.stdout
    mounts = json.loads(done.stdout)
    assert mounts.pop("/etc/pipeline").startswith(f"/state/configmaps/pipeline-{ADAPTER}-")
    assert mounts.pop("/etc/lora-gitops").startswith("/state/configmaps/environment-")
    assert mounts == {"/tmp": "", "/var/run/registry": "/state/secrets/relocation-registry"} | {
        f"/volumes/{name}": f"/state/volumes/{name}-pvc" for name in (
        "dataset", "base-model", "base-tokenizer", "reference-model", "fine-tuned-model")}
    refused = run("-c", code, OVERLAY)
    assert refused.stdout.splitlines()[-1].endswith(
        "UserError: /etc/pipeline: two steps mount different volumes there, and with Docker all steps have the same. "
        "Run one adapter: --adapter NAME")


def without_colours(text: str) -> str:
    return re.sub(r"\x1b\[\d+m", "", text)
