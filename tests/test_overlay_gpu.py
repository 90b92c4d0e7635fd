"""overlays/gpu: the stages as one JobSet that lets no GPU wait, its hardware in one place, and what can be added."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from jobs.tools import pods
from serving import drain
from tests import manifests, renderings
from tests.manifests import CHECKOUT, Manifest, by_name, containers, of_kind, pod_templates, quantity, render

GPU = CHECKOUT / "overlays" / "gpu"
rendered = functools.cache(render)


def copy(folder: Path) -> Path:
    return manifests.copy(folder).parent / "gpu"


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1, f"{file} has {text.count(old)} of {old!r}"
    file.write_text(text.replace(old, new))


def job_set(folder: Path = GPU) -> Manifest:
    (found,) = of_kind(rendered(folder) if folder == GPU else render(folder), "JobSet")
    return found


def replicated(folder: Path = GPU) -> dict[str, Manifest]:
    return {job["name"]: job for job in job_set(folder)["spec"]["replicatedJobs"]}


def main(job: Manifest) -> Manifest:
    """The one container of a replicated Job."""
    container: Manifest
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    return container


def env(container: Manifest) -> dict[str, Any]:
    return {e["name"]: e.get("value", e.get("valueFrom")) for e in container["env"]}


# --- the JobSet -----------------------------------------------------------------------------------------------------


def test_the_job_set_holds_what_the_jobs_would_be(tmp_path: Path) -> None:
    """Nothing is described twice: without the JobSet the same overlay has the Jobs, with the same pods."""
    overlay = copy(tmp_path)
    edit(overlay / "kustomization.yaml", "- jobset\n- jobset/only\n", "")
    jobs = by_name(render(overlay), "Job")
    assert set(replicated()) == {*jobs, "relocated"}
    assert not of_kind(rendered(GPU), "Job")
    for name in jobs.keys() - {"model-training"}:
        assert replicated()[name]["template"]["spec"] == jobs[name]["spec"], name
    training, job = replicated()["model-training"]["template"]["spec"], jobs["model-training"]["spec"]
    assert main(replicated()["model-training"])["args"] == ["train"]
    assert training["template"]["spec"]["volumes"] == job["template"]["spec"]["volumes"]


def test_the_job_set_renders_without_the_hardware(tmp_path: Path) -> None:
    """For a cluster whose nodes need neither selector nor toleration."""
    overlay = copy(tmp_path)
    edit(overlay / "kustomization.yaml", "- hardware\n", "")
    assert replicated(overlay).keys() == replicated().keys()
    spec = replicated(overlay)["relocated"]["template"]["spec"]["template"]["spec"]
    assert not {"nodeSelector", "tolerations"} & spec.keys()


def test_no_gpu_waits_for_another_stage() -> None:
    """A pod that has a GPU exists only when what it needs is there: each stage with one depends on another Job."""
    jobs = replicated()
    with_gpu = {name for name, job in jobs.items() if "nvidia.com/gpu" in main(job)["resources"]["limits"]}
    assert with_gpu == {"model-training", "model-evaluation"}
    assert jobs["model-training"]["dependsOn"] == [{"name": "relocated", "status": "Complete"}]
    assert jobs["model-evaluation"]["dependsOn"] == [{"name": "model-training", "status": "Complete"}]
    assert main(jobs["relocated"])["args"] == ["await", "dataset", "acceptability", "base-model", "tokenizer",
                                               "reference-model"]
    seen: list[str] = []
    for name, job in jobs.items():  # JobSet accepts only names that stand before
        assert {d["name"] for d in job.get("dependsOn", [])} <= set(seen), name
        seen.append(name)


def test_what_waits_without_a_gpu_is_not_kept_for_gpu_nodes() -> None:
    for name, template in pod_templates(rendered(GPU)).items():
        wants = any("nvidia.com/gpu" in c["resources"]["limits"] for c in containers(template))
        assert bool(template["spec"].get("tolerations")) == wants, name
        assert bool(template["spec"].get("nodeSelector")) == wants, name
        assert wants == name.endswith(("model-training", "model-evaluation", "model-inference")), name


def test_one_number_says_how_many_nodes_train(tmp_path: Path) -> None:
    overlay = copy(tmp_path)
    edit(overlay / "hardware" / "training.yaml", "parallelism: 1", "parallelism: 4")
    edit(overlay / "hardware" / "training.yaml", "nvidia.com/gpu: 1", "nvidia.com/gpu: 8")
    job = replicated(overlay)["model-training"]
    spec = job["template"]["spec"]
    assert (spec["parallelism"], spec["completions"], spec["completionMode"]) == (4, 4, "Indexed")
    assert env(main(job))["NODES"] == "4"
    assert main(job)["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert main(replicated(overlay)["model-evaluation"])["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_the_nodes_of_a_training_find_each_other() -> None:
    """JobSet writes the coordinator's host name on every pod, as a label: one of more than 63 characters is refused."""
    assert job_set()["spec"]["coordinator"] == {"replicatedJob": "model-training", "jobIndex": 0, "podIndex": 0}
    assert env(main(replicated()["model-training"]))["MASTER_ADDR"] == {
        "fieldRef": {"fieldPath": "metadata.labels['jobset.sigs.k8s.io/coordinator']"}}
    name = job_set()["metadata"]["name"]
    assert len(f"{name}-model-training-0-0.{name}") <= 63


# The messages of a failed Job, as Kubernetes 1.32 words them, and what JobSet is to do.
FAILURES = [
    ("model-training", "PodFailurePolicy", "Pod ns/training-0-x has condition DisruptionTarget matching FailJob rule "
     "at index 1", "RestartJobSetAndIgnoreMaxRestarts"),
    ("model-training", "PodFailurePolicy", "Container job for pod ns/training-0-x failed with exit code 2 matching "
     "FailJob rule at index 0", "FailJobSet"),
    ("model-relocation", "PodFailurePolicy", "Container job for pod ns/relocation-0-x failed with exit code 2 matching "
     "FailJob rule at index 0", "FailJobSet"),
    ("model-training", "BackoffLimitExceeded", "Job has reached the specified backoff limit", "RestartJobSet"),
]


@pytest.mark.parametrize(("job", "reason", "message", "action"), FAILURES)
def test_only_a_user_error_ends_the_set_and_a_disruption_costs_no_restart(
        job: str, reason: str, message: str, action: str) -> None:
    def applies(rule: Manifest) -> bool:
        return (job in rule.get("targetReplicatedJobs", [job]) and reason in rule.get("onJobFailureReasons", [reason])
                and any(re.search(pattern, message) for pattern in rule.get("onJobFailureMessagePatterns", [""])))

    rules = job_set()["spec"]["failurePolicy"]["rules"]
    assert next((rule["action"] for rule in rules if applies(rule)), "RestartJobSet") == action


def test_a_user_error_ends_the_set_and_a_lost_node_restarts_it() -> None:
    assert job_set()["spec"]["failurePolicy"]["maxRestarts"] >= 1
    training = replicated()["model-training"]["template"]["spec"]
    assert training["backoffLimit"] == 0  # one pod alone cannot come back
    rules = training["podFailurePolicy"]["rules"]
    disruption = rules.index({"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]})
    stopped = rules.index({"action": "Ignore",
                           "onExitCodes": {"containerName": "job", "operator": "In", "values": [143]}})
    assert disruption < stopped  # the first that holds counts, and an evicted pod exits with 143
    for name, job in replicated().items():
        rules = job["template"]["spec"]["podFailurePolicy"]["rules"]
        assert {"action": "FailJob", "onExitCodes": {"containerName": "job", "operator": "In", "values": [2]}} in rules
        assert job["template"]["spec"]["template"]["spec"]["restartPolicy"] == "Never", name
    assert "ttlSecondsAfterFinished" not in job_set()["spec"]


RERUN: dict[str, Callable[[Path], object]] = {
    "training": lambda gpu: edit(gpu / "pipeline.yaml", "epochs: 3", "epochs: 4"),
    "data without its pin": lambda gpu: (gpu / "dataset.jsonl").write_text('{"prompt": "a", "completion": "b"}\n'),
    "image": lambda gpu: edit(gpu / "kustomization.yaml", "team/lora-gitops-jobs", "other/lora-gitops-jobs"),
    "nodes": lambda gpu: edit(gpu / "hardware" / "training.yaml", "parallelism: 1", "parallelism: 2"),
}
NO_RERUN: dict[str, Callable[[Path], None]] = {
    "serving flags": lambda gpu: edit(gpu / "hardware" / "inference.yaml", "model-len=8192", "model-len=4096"),
    "serving image": lambda gpu: edit(gpu / "kustomization.yaml", "team/lora-gitops-serving", "other/serving"),
    "storage class": lambda gpu: edit(gpu / "hardware" / "storage.yaml", "value: standard-rwx", "value: efs-sc"),
}


@pytest.mark.parametrize("change", RERUN.values(), ids=RERUN)
def test_a_changed_config_starts_a_new_set_and_undoing_it_brings_the_old_one_back(
        change: Callable[[Path], object], tmp_path: Path) -> None:
    overlay = copy(tmp_path)
    change(overlay)
    assert job_set(overlay)["metadata"]["name"] != job_set()["metadata"]["name"]
    copy(tmp_path)
    assert job_set(overlay) == job_set()


@pytest.mark.parametrize("change", NO_RERUN.values(), ids=NO_RERUN)
def test_an_unrelated_change_starts_no_set(change: Callable[[Path], None], tmp_path: Path) -> None:
    overlay = copy(tmp_path)
    change(overlay)
    assert job_set(overlay) == job_set()


def test_the_same_overlay_runs_without_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`jobs local` takes the JobSet apart into the same pods, by the names that people know."""
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    local = {pod.title: pod for pod in pods.pods(rendered(GPU), tmp_path)}
    assert set(replicated()) < set(local)
    training = local["model-training"]
    assert training.kind == "Job"
    assert training.fatal_exit_codes == {2}
    assert training.containers[0].argv[1:] == ["-m", "jobs", "train"]
    assert (training.containers[0].env["NODES"], training.containers[0].env["MASTER_ADDR"]) == ("1", "127.0.0.1")
    assert "REQUIRE_GPU" not in training.containers[0].env  # it can be tried on a CPU


def test_a_stage_that_was_given_a_gpu_does_not_compute_without() -> None:
    for name in ("model-training", "model-evaluation"):
        container = main(replicated()[name])
        assert container["resources"]["limits"]["nvidia.com/gpu"], name
        assert env(container)["REQUIRE_GPU"] == "1", name


def test_the_nodes_disk_is_asked_for_and_bounded() -> None:
    """An image pull that fills the disk evicts first what asked for none of it."""
    for name, template in pod_templates(rendered(GPU)).items():
        for container in template["spec"]["containers"]:
            if "model-" not in name or "tokenizer" in name:
                continue
            resources = container["resources"]
            asked, bound = (quantity(resources[key]["ephemeral-storage"]) for key in ("requests", "limits"))
            assert 2**30 <= asked <= bound, name


# --- serving --------------------------------------------------------------------------------------------------------


def test_serving_on_a_cluster_needs_an_api_key() -> None:
    (vllm,) = by_name(rendered(GPU), "Deployment")["model-inference"]["spec"]["template"]["spec"]["containers"]
    assert env(vllm)["VLLM_API_KEY"]["secretKeyRef"] == {"name": "serving-api-key", "key": "key", "optional": False}


def test_volumes_can_be_used_from_several_nodes() -> None:
    claims = of_kind(rendered(GPU), "PersistentVolumeClaim")
    assert {tuple(c["spec"]["accessModes"]) for c in claims} == {("ReadWriteMany",)}
    assert len({c["spec"]["storageClassName"] for c in claims}) == 1


# --- what can be added ----------------------------------------------------------------------------------------------


@pytest.fixture
def everything() -> list[Manifest]:
    """The overlay with all its optional components, by removing the comment signs as a person would."""
    return renderings.rendered("overlays/gpu with options")


def test_serving_scales_on_vllms_own_queue(everything: list[Manifest]) -> None:
    (scaler,) = of_kind(everything, "ScaledObject")
    deployment = by_name(everything, "Deployment")["model-inference"]
    assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert "replicas" not in deployment["spec"]  # or Argo CD would undo what the autoscaler did
    assert scaler["spec"]["minReplicaCount"] >= 1
    (trigger,) = scaler["spec"]["triggers"]
    assert f'vllm:num_requests_waiting{{namespace="{deployment["metadata"]["namespace"]}"' in (
        trigger["metadata"]["query"])


def test_several_replicas_do_not_all_restart_at_once_for_another_base_model(everything: list[Manifest]) -> None:
    (container,) = by_name(everything, "Deployment")["model-inference"]["spec"]["template"]["spec"]["containers"]
    values = {each["name"]: each.get("value") for each in container["env"]}
    assert float(values["RESTART_SLOT_SECONDS"]) > drain.LINGER_SECONDS + float(values["DRAIN_SECONDS"])


def test_prometheus_finds_the_metrics_and_may_reach_them(everything: list[Manifest]) -> None:
    (monitor,) = of_kind(everything, "PodMonitor")
    template = by_name(everything, "Deployment")["model-inference"]["spec"]["template"]
    labels = template["metadata"]["labels"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["path"] == "/metrics"
    assert endpoint["port"] in {p["name"] for c in template["spec"]["containers"] for p in c["ports"]}
    policy = by_name(everything, "NetworkPolicy")["monitoring"]["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    assert policy["ingress"][0]["ports"] == [{"protocol": "TCP", "port": endpoint["port"]}]


def test_kueue_finds_its_queue_and_nothing_else_changes(everything: list[Manifest]) -> None:
    (queued,) = of_kind(everything, "JobSet")
    assert queued["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    spec = deepcopy(queued["spec"])
    for job in spec["replicatedJobs"]:
        del job["template"]["spec"]["template"]["spec"]["priorityClassName"]  # another option
    assert spec == job_set()["spec"]
    assert "suspend" not in queued["spec"]  # Kueue's to set


def test_replicas_spread_over_nodes_without_needing_them() -> None:
    spec = by_name(rendered(GPU), "Deployment")["model-inference"]["spec"]["template"]["spec"]
    (constraint,) = spec["topologySpreadConstraints"]
    assert constraint["whenUnsatisfiable"] == "ScheduleAnyway"


def test_an_overlay_on_top_brings_its_own_images_pipeline_and_namespace(tmp_path: Path) -> None:
    top = copy(tmp_path).parent / "top"
    top.mkdir()
    (top / "pipeline.yaml").write_text((GPU / "pipeline.yaml").read_text().replace("seville-hotels", "other-adapter"))
    (top / "kustomization.yaml").write_text("""\
namespace: other
resources: [../gpu]
components: [../../base/metadata]
images:
- {name: registry.example.com/team/lora-gitops-jobs, newName: mine/jobs, digest: "sha256:%s"}
- {name: registry.example.com/team/lora-gitops-serving, newName: mine/serving, newTag: 1.2.3}
configMapGenerator:
- {name: pipeline, behavior: merge, files: [pipeline.yaml]}
- {name: serving-pipeline, behavior: merge, files: [pipeline.yaml], options: {disableNameSuffixHash: true}}
""" % ("0" * 64))
    found = render(top)
    assert {m["metadata"].get("namespace", m["metadata"]["name"]) for m in found} == {"other"}
    assert job_set(top)["metadata"]["name"] != job_set()["metadata"]["name"]
    config = {m["metadata"]["name"]: m["data"] for m in of_kind(found, "ConfigMap")}
    for name, template in pod_templates(found).items():
        assert all(c["image"].startswith("mine/") for c in containers(template)), name
        for volume in template["spec"]["volumes"]:
            if "configMap" in volume:
                assert "adapter: other-adapter" in config[volume["configMap"]["name"]]["pipeline.yaml"], name


# --- beside other environments --------------------------------------------------------------------------------------


def test_environments_in_one_cluster_share_nothing() -> None:
    """Every object of an overlay is in its own namespace, and nothing is outside of one but that namespace."""
    overlays = [p.parent for p in (CHECKOUT / "overlays").glob("*/kustomization.yaml")]
    assert len(overlays) >= 3
    namespaces = []
    for overlay in overlays:
        (namespace,) = {m["metadata"].get("namespace") for m in rendered(overlay) if m["kind"] != "Namespace"}
        namespaces.append(namespace)
        assert [m["metadata"]["name"] for m in of_kind(rendered(overlay), "Namespace")] == [namespace]
    assert len(set(namespaces)) == len(overlays)


def test_the_examples_data_is_the_same_everywhere() -> None:
    kind = (CHECKOUT / "overlays" / "kind" / "dataset.jsonl").read_bytes()
    for overlay in ("gpu", "kind-smollm2"):
        assert (CHECKOUT / "overlays" / overlay / "dataset.jsonl").read_bytes() == kind, overlay
