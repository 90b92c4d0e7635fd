"""Promises of kubeflow/pipeline.py: it compiles a valid pipeline in the order of the plan, and another one for another
configuration; bad input is one clear line."""

from __future__ import annotations

import copy as copies
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.tools.pods import KubernetesYaml
from tests.kubeflow.environment import compile_all, python
from tests.manifests import CHECKOUT, Manifest, adapters, copy, of_kind, render
from tests.publication.test_manifests import rendered

FILES = Path("tests", "kubeflow")
OVERLAY = CHECKOUT / "overlays" / "kind"


def run_all(*calls: list[str]) -> list[dict[str, Any]]:
    """What kubeflow/pipeline.py does with each list of arguments: its exit `code`, `output` and `errors`."""
    done = python(FILES / "run_pipeline.py", stdin=json.dumps(calls))
    assert done.returncode == 0, done.stderr
    results: list[dict[str, Any]] = json.loads(done.stdout)
    return results


def tasks(text: str) -> dict[str, dict[str, Any]]:
    """The tasks of a pipeline, by name."""
    pipeline, _ = yaml.load_all(text, KubernetesYaml)
    found: dict[str, dict[str, Any]] = pipeline["root"]["dag"]["tasks"]
    return found


def after(text: str) -> dict[str, set[str]]:
    """What each task of a pipeline follows."""
    return {name: set(task.get("dependentTasks", [])) for name, task in tasks(text).items()}


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    """The overlays, compiled."""
    names = ("kind", "gpu")
    return dict(zip(names, compile_all([render(CHECKOUT / "overlays" / name) for name in names]), strict=True))


@pytest.mark.parametrize("overlay", ["kind", "gpu"])
def test_a_pipeline_is_valid_for_kfp(compiled: dict[str, dict[str, Any]], overlay: str) -> None:
    done = python(FILES / "validate_pipeline.py", stdin=compiled[overlay]["text"])
    assert done.returncode == 0, done.stderr


def test_a_publication_follows_the_evaluation_and_knows_with_which_values_the_run_is() -> None:
    """With other values than git has, it must not wait for a promotion that will not come."""
    manifests = [each for each in rendered("kind")
                 if each["metadata"].get("labels", {}).get("app.kubernetes.io/instance") != "hostel-guide"]
    (compiled,) = compile_all([manifests])
    step = "adapter-publication-seville-hotels"
    assert after(compiled["text"])[step] == {"model-evaluation-seville-hotels"}
    pipeline, _ = yaml.load_all(compiled["text"], KubernetesYaml)
    args = pipeline["deploymentSpec"]["executors"][f"exec-{step}"]["container"]["args"]
    assert args[:2] == ["publish", "--set=training.epochs={{$.inputs.parameters['epochs']}}"]


def test_an_imported_adapter_that_is_evaluated_here_is_shown_and_takes_no_settings_of_a_training() -> None:
    manifests = [each for each in render(OVERLAY) if not each["metadata"]["name"].startswith("model-training-hostel")]
    (files,) = [each["data"] for each in manifests if each["metadata"]["name"].startswith("pipeline-hostel-guide")]
    trained = yaml.safe_load(files["pipeline.yaml"])
    files["pipeline.yaml"] = yaml.safe_dump({key: trained[key] for key in ("adapter", "dataset", "evaluation")} | {
        "source": "oci://example.org/team/hostel-guide", "sha256": "0" * 64})
    (compiled,) = compile_all([manifests])
    assert "adapter-not-promoted-hostel-guide" in compiled["text"]
    pipeline, _ = yaml.load_all(compiled["text"], KubernetesYaml)
    args = {name.removeprefix("exec-"): [each for each in executor["container"]["args"] if each.startswith("--set=")]
            for name, executor in pipeline["deploymentSpec"]["executors"].items()}
    for step in ("model-evaluation", "evaluation-results"):
        assert args[f"{step}-seville-hotels"] and not args[f"{step}-hostel-guide"]


def test_the_order_of_the_steps_is_that_of_the_plan(compiled: dict[str, dict[str, Any]]) -> None:
    order = after(compiled["kind"]["text"])
    for adapter in adapters(OVERLAY):
        assert order[f"dataset-relocation-{adapter}"] == set()
        assert order[f"dataset-encoding-{adapter}"] == {f"dataset-relocation-{adapter}", "tokenizer-relocation"}
        assert order[f"model-training-{adapter}"] == {f"dataset-encoding-{adapter}", "model-relocation"}
        assert order[f"model-evaluation-{adapter}"] == {f"model-training-{adapter}", "model-reference-relocation"}
    for step in ("model-relocation", "tokenizer-relocation", "model-reference-relocation"):
        assert order[step] == set()


def test_of_a_jobset_its_jobs_are_steps_and_waiting_is_none(compiled: dict[str, dict[str, Any]]) -> None:
    order = after(compiled["gpu"]["text"])
    assert order["model-training-seville-hotels"] == {"dataset-encoding-seville-hotels", "model-relocation"}
    assert not [name for name in order if name.startswith("await")]
    # A Job of the set has no attempts of its own where the set starts again.
    assert tasks(compiled["gpu"]["text"])["model-training-seville-hotels"]["retryPolicy"]["maxRetryCount"] == 10
    assert any(line.startswith("spec.failurePolicy (JobSet)") for line in compiled["gpu"]["unsupported"])


def test_a_job_that_makes_no_artifact_follows_what_it_awaits_or_all_of_its_adapter() -> None:
    manifests = render(OVERLAY)
    evaluation = next(m for m in manifests if m["kind"] == "Job" and "evaluation-seville" in m["metadata"]["name"])
    other = copies.deepcopy(evaluation)
    other["metadata"]["name"] = "other"
    pod = other["spec"]["template"]["spec"]
    pod["containers"][0]["args"] = ["other"]
    awaiting = copies.deepcopy(other)
    awaiting["spec"]["template"]["spec"]["initContainers"] = [
        {"name": "await", "image": "image", "command": ["python", "-m", "jobs"], "args": ["await", "adapter"]}]
    alone, awaited = compile_all([[*manifests, other], [*manifests, awaiting]])
    assert after(alone["text"])["other"] == {"model-evaluation-seville-hotels"}
    assert after(awaited["text"])["other"] == {"model-training-seville-hotels"}
    line = "spec.template.spec.initContainers (other): the order of the steps takes its place"
    assert line in awaited["unsupported"] and line not in alone["unsupported"]


def test_jobs_that_wait_for_each_other_are_refused() -> None:
    manifests = render(OVERLAY)
    relocation = next(m for m in manifests if m["kind"] == "Job" and "dataset-relocation-sev" in m["metadata"]["name"])
    relocation["spec"]["template"]["spec"]["initContainers"] = [
        {"name": "await", "image": "image", "command": ["python", "-m", "jobs"], "args": ["await", "adapter"]}]
    (result,) = compile_all([manifests])
    assert result["error"] == ("dataset-encoding-seville-hotels, dataset-relocation-seville-hotels, "
                               "model-evaluation-seville-hotels, model-training-seville-hotels: wait for each other")


def test_a_manifest_that_kubernetes_would_refuse_is_one_line() -> None:
    whole = next(m for m in render(OVERLAY) if m["kind"] == "Job")
    jobs = []
    for path, value in (("spec", None), ("spec.template", "text"), ("spec.template.spec.containers", []),
                        ("spec.template.spec.containers", [{"name": "job", "args": "encode"}]),
                        ("spec.template.spec.volumes", ["text"]), ("spec.template.spec.securityContext", "text")):
        parent = job = copies.deepcopy(whole)
        *parents, key = path.split(".")
        for each in parents:
            parent = parent[each]
        parent[key] = value
        jobs.append([job])
    for result in compile_all(jobs):
        assert result["error"].startswith("dataset-encoding-hostel-guide: ") and "\n" not in result["error"]


def test_nothing_is_taken_from_kfps_cache_and_retries_last_as_long_as_a_training(
        compiled: dict[str, dict[str, Any]]) -> None:
    for task in tasks(compiled["kind"]["text"]).values():
        assert not task.get("cachingOptions", {}).get("enableCache")
        if "model-" in task["taskInfo"]["name"]:
            retries = task["retryPolicy"]
            assert (retries["backoffDuration"], retries["backoffFactor"], retries["maxRetryCount"]) == ("10s", 2, 6)
            assert int(retries["backoffMaxDuration"].removesuffix("s")) >= 7 * 24 * 3600


def test_another_file_is_another_pipeline_and_the_same_files_are_the_same(tmp_path: Path) -> None:
    overlay = copy(tmp_path)
    calls = [[str(overlay), "--adapter", name] for name in adapters(overlay)]  # of which seville-hotels is the second
    before = run_all(*calls, calls[0])
    file = overlay / "adapters" / "seville-hotels" / "pipeline.yaml"
    file.write_text(file.read_text().replace("epochs: ", "epochs: 1"))
    changed = run_all(*calls)
    assert before[0] == before[2]
    assert [one["output"] == other["output"] for one, other in zip(before[:2], changed, strict=True)] == [True, False]
    assert "pipeline-seville-hotels-" in before[1]["output"]  # by the hash in its name
    assert str(tmp_path) not in before[0]["output"]


def test_merged_mode_has_the_same_steps(tmp_path: Path) -> None:
    overlay = copy(tmp_path).parent / "kind-smollm2"
    with (overlay / "environment.yaml").open("a") as stream:
        stream.write("\nserving: {mode: merged}\n")
    (result,) = compile_all([render(overlay)])
    assert after(result["text"])["model-training-seville-hotels"] == {
        "dataset-encoding-seville-hotels", "model-relocation"}


def test_of_a_jobset_every_field_is_listed_or_refused() -> None:
    def changed(change: Callable[[dict[str, Any], dict[str, Any]], object]) -> list[Manifest]:
        manifests = render(CHECKOUT / "overlays" / "gpu")
        (jobset,) = of_kind(manifests, "JobSet")
        change(jobset, jobset["spec"]["replicatedJobs"][3])  # `train`
        return manifests

    listed, several, nodes = compile_all([
        changed(lambda jobset, train: (jobset["metadata"]["labels"].update({"kueue.x-k8s.io/queue-name": "gpu"}),
                                       jobset["spec"].update({"suspend": True, "successPolicy": {"operator": "All"}}),
                                       train["template"].update({"metadata": {"annotations": {"a": "b"}}}))),
        changed(lambda jobset, train: train.update({"replicas": 2})),
        changed(lambda jobset, train: train["template"]["spec"].update({"parallelism": 2}))])
    of_set = {line.partition(" (JobSet): ")[0] for line in listed["unsupported"] if " (JobSet): " in line}
    assert of_set == {"metadata", "spec.coordinator", "spec.failurePolicy", "spec.network", "spec.replicatedJobs",
                      "spec.successPolicy", "spec.suspend"}
    assert several["error"].startswith("ft-seville-hotels: spec.replicatedJobs[train].replicas: must be 1")
    assert nodes["error"].startswith("model-training-seville-hotels: spec.parallelism: must be 1, because a step of")
    assert "\n" not in several["error"] + nodes["error"]


def test_texts_that_would_not_arrive_as_they_are_are_refused() -> None:
    def with_variables(*variables: dict[str, Any]) -> list[Manifest]:
        job = next(m for m in render(OVERLAY) if m["kind"] == "Job")
        container = job["spec"]["template"]["spec"]["containers"][0]
        container |= {"args": ["no-stage"], "env": [*container["env"], *variables]}
        return [job]

    secret = {"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}
    later, placeholder = compile_all([with_variables(secret, {"name": "URL", "value": "https://$(TOKEN)@host"}),
                                      with_variables({"name": "TEMPLATE", "value": "{{workflow.name}}"})])
    assert "env[URL].value: refers to $(TOKEN)" in later["error"]
    assert "env[TEMPLATE]: has `{{`" in placeholder["error"]


def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "kustomization.yaml").write_text("resources: [missing.yaml]\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "kustomization.yaml").write_text("configMapGenerator: [{name: a, literals: [b=c]}]\n")
    overlay = copy(tmp_path / "copy")
    (overlay / "adapters" / "hostel-guide" / "pipeline.yaml").write_text("adapter: hostel-guide\nepochs: 3\n")
    unpinned = copy(tmp_path / "unpinned")
    environment = unpinned / "environment.yaml"
    environment.write_text(environment.read_text().replace("source: builtin:tiny\n", "source: hf://acme/tiny\n", 1))
    kind = str(OVERLAY)
    expected = {
        (str(tmp_path),): f"{tmp_path}: has no kustomization.yaml",
        (str(tmp_path / "broken"),): f"{tmp_path / 'broken'}: does not render",
        (str(tmp_path / "empty"),): "the overlay has no Jobs",
        (str(unpinned),): "ConfigMap environment/environment.yaml:9: base_model: hf://acme/tiny is not pinned: "
                          "`revision` is missing. Run: python -m jobs pin OVERLAY",
        (kind, "--adapter", "hostel"): "--adapter hostel: the overlay has no such adapter; it has hostel-guide, "
                                       "seville-hotels",
        (kind, "--output", str(tmp_path / "none" / "x.yaml")): f"--output {tmp_path}/none/x.yaml: cannot be written",
        (kind, "--output", str(tmp_path)): f"--output {tmp_path}: KubeFlow takes files whose names end with .yaml",
    }
    results = run_all(*map(list, expected), [str(overlay)])
    for result, message in zip(results, expected.values(), strict=False):
        assert result["code"] == 2
        assert result["errors"].startswith(f"error: {message}") and result["errors"].count("\n") == 1
        assert result["output"] == ""
    # Each problem of a file is a line, as everywhere.
    assert results[-1]["code"] == 2
    assert results[-1]["errors"].startswith("error: ConfigMap pipeline-hostel-guide/pipeline.yaml:1: dataset: is")


def test_without_kfp_it_says_where_kfp_is() -> None:
    done = subprocess.run([sys.executable, "kubeflow/pipeline.py", "overlays/kind"], cwd=CHECKOUT, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: kfp is not installed in this Python. Run `make kubeflow`")
    assert done.stderr.count("\n") == 1


def test_the_help_teaches() -> None:
    (result,) = run_all(["--help"])
    assert result["code"] == 0
    for text in ("OVERLAY", "--adapter NAME", "--output FILE", "examples", "docs/kubeflow.md"):
        assert text in result["output"]


def test_a_summary_lists_what_kfp_cannot_say_as_the_pipeline_does(tmp_path: Path) -> None:
    file = tmp_path / "pipeline.yaml"
    done = python("kubeflow/pipeline.py", OVERLAY, "--adapter", "seville-hotels", "--output", file)
    assert done.returncode == 0 and done.stdout == ""
    title, _, *listed = done.stderr.splitlines()
    assert title.startswith("lora-gitops-seville-hotels: 7 Jobs, version ")
    pipeline, _ = yaml.load_all(file.read_text(), KubernetesYaml)
    shown = pipeline["pipelineInfo"]["description"]
    assert len(listed) > 8
    assert all(f"\n- {line.strip()}" in shown for line in listed)
