"""overlays/gpu: one JobSet an adapter that lets no GPU wait, its hardware in one place, and what can be added."""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.tools import kustomization, pods
from serving import drain
from tests import manifests, renderings
from tests.manifests import (
    CHECKOUT,
    ENVIRONMENT_JOBS,
    Manifest,
    add_adapter,
    by_name,
    containers,
    of_kind,
    pod_templates,
    quantity,
    render,
)
from tests.validation import problems

GPU = CHECKOUT / "overlays" / "gpu"
# Of the Jobs of an adapter, by name, which replicated Job each has become.
STAGES = {"dataset-relocation": "relocate", "dataset-encoding": "encode", "model-training": "train",
          "model-evaluation": "evaluate"}
rendered = functools.cache(render)


def copy(folder: Path) -> Path:
    return manifests.copy(folder).parent / "gpu"


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1, f"{file} has {text.count(old)} of {old!r}"
    file.write_text(text.replace(old, new))


def job_sets(found: list[Manifest]) -> dict[str, Manifest]:
    """The JobSets by the names of their adapters."""
    return {m["metadata"]["labels"]["app.kubernetes.io/instance"]: m for m in of_kind(found, "JobSet")}


def job_set(folder: Path = GPU) -> Manifest:
    return job_sets(rendered(folder) if folder == GPU else render(folder))["seville-hotels"]


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
    edit(overlay / "adapter" / "kustomization.yaml", "- ../jobset\n- ../jobset/only\n", "")
    jobs = {name.removesuffix("-seville-hotels"): job for name, job in by_name(render(overlay), "Job").items()}
    assert set(replicated()) == {*STAGES.values(), "await"}
    assert jobs.keys() - by_name(rendered(GPU), "Job") == STAGES.keys()
    for name in ("dataset-relocation", "dataset-encoding", "model-evaluation"):
        assert replicated()[STAGES[name]]["template"]["spec"] == jobs[name]["spec"], name
    training, job = replicated()["train"]["template"]["spec"], jobs["model-training"]["spec"]
    assert main(replicated()["train"])["args"] == ["train"]
    assert training["template"]["spec"]["volumes"] == job["template"]["spec"]["volumes"]
    assert training["template"]["metadata"] == job["template"]["metadata"]


def test_the_job_set_renders_without_the_hardware(tmp_path: Path) -> None:
    """For a cluster whose nodes need neither selector nor toleration."""
    overlay = copy(tmp_path)
    edit(overlay / "adapter" / "kustomization.yaml", "- ../hardware/adapter\n", "")
    edit(overlay / "kustomization.yaml", "- hardware/environment\n", "")
    assert replicated(overlay).keys() == replicated().keys()
    spec = replicated(overlay)["await"]["template"]["spec"]["template"]["spec"]
    assert not {"nodeSelector", "tolerations"} & spec.keys()


@pytest.mark.parametrize(("part", "index"), [
    (file.parent.name, index) for file in sorted((GPU / "hardware").glob("*/kustomization.yaml"))
    for index in range(len(yaml.safe_load(file.read_text())["patches"]))])
def test_each_patch_of_the_hardware_has_an_effect(part: str, index: int, tmp_path: Path) -> None:
    """On the environment or on the adapters. kustomize ignores one that matches nothing, and `check` refuses it."""
    overlay = copy(tmp_path)
    file = overlay / "hardware" / part / "kustomization.yaml"
    content = yaml.safe_load(file.read_text())
    del content["patches"][index]
    file.write_text(yaml.safe_dump(content))
    assert render(overlay) != rendered(GPU)


def test_models_are_relocated_once_for_all_adapters_and_without_a_gpu(tmp_path: Path) -> None:
    overlay = copy(tmp_path)
    add_adapter(overlay, "cordoba-hotels")
    found = render(overlay)
    jobs = by_name(found, "Job")
    assert jobs.keys() == ENVIRONMENT_JOBS
    assert jobs == by_name(rendered(GPU), "Job")
    for job in jobs.values():
        assert not any("gpu" in key for c in containers(job["spec"]["template"]) for key in c["resources"]["limits"])
        assert "nodeSelector" not in job["spec"]["template"]["spec"]


def test_each_adapter_has_a_job_set_of_its_own(tmp_path: Path) -> None:
    """Its pods mount its own pipeline and bear its name; the first adapter's set does not change by it."""
    overlay = copy(tmp_path)
    add_adapter(overlay, "cordoba-hotels")
    found = render(overlay)
    assert job_sets(found).keys() == {"seville-hotels", "cordoba-hotels"}
    assert job_sets(found)["seville-hotels"] == job_set()
    configs = {m["metadata"]["name"] for m in of_kind(found, "ConfigMap")}
    for name, each in job_sets(found).items():
        assert re.fullmatch(rf"ft-{name}-[a-z0-9]{{10}}", each["metadata"]["name"])
        for job in each["spec"]["replicatedJobs"]:
            template = job["template"]["spec"]["template"]
            assert template["metadata"]["labels"]["app.kubernetes.io/instance"] == name
            mounted = {v["name"]: v["configMap"]["name"] for v in template["spec"]["volumes"] if "configMap" in v}
            assert re.fullmatch(rf"pipeline-{name}-[a-z0-9]{{10}}", mounted["pipeline"])
            assert re.fullmatch(r"environment-[a-z0-9]{10}", mounted["environment"])
            assert set(mounted.values()) <= configs


def test_the_trainings_of_two_adapters_do_not_talk_to_each_other(tmp_path: Path) -> None:
    """Each has learned, and holds in memory, what its team does not share."""
    overlay = copy(tmp_path)
    add_adapter(overlay, "cordoba-hotels")
    found = render(overlay)
    pods_ = {name: next(j for j in each["spec"]["replicatedJobs"] if j["name"] == "train")["template"]["spec"][
        "template"]["metadata"]["labels"] for name, each in job_sets(found).items()}
    policies = [m["spec"] for m in of_kind(found, "NetworkPolicy") if m["metadata"]["name"].startswith("training-")]
    assert len(policies) == 2
    for spec in policies:
        into, out = spec["ingress"][0]["from"][0]["podSelector"], spec["egress"][0]["to"][0]["podSelector"]
        assert into == out == spec["podSelector"]
        assert len([labels for labels in pods_.values() if kustomization.selects(into, labels)]) == 1


def test_no_gpu_waits_for_another_stage() -> None:
    """A pod that has a GPU exists only when what it needs is there: each stage with one depends on another Job."""
    jobs = replicated()
    with_gpu = {name for name, job in jobs.items() if "nvidia.com/gpu" in main(job)["resources"]["limits"]}
    assert with_gpu == {"train", "evaluate"}
    assert jobs["encode"]["dependsOn"] == [{"name": "relocate", "status": "Complete"}]
    assert jobs["train"]["dependsOn"] == [{"name": "await", "status": "Complete"}]
    assert jobs["evaluate"]["dependsOn"] == [{"name": "train", "status": "Complete"}]
    assert main(jobs["await"])["args"] == ["await", "encoded-dataset", "acceptability", "base-model", "tokenizer",
                                           "reference-model"]
    seen: list[str] = []
    for name, job in jobs.items():  # JobSet accepts only names that stand before
        assert {d["name"] for d in job.get("dependsOn", [])} <= set(seen), name
        seen.append(name)


def test_a_hundred_adapters_that_wait_leave_room_on_a_small_node() -> None:
    """What waits holds neither a GPU nor what relocation needs on a node of 4 CPUs and 16 GiB."""
    waits = main(replicated()["await"])["resources"]["requests"]
    relocates = [main_of["resources"]["requests"] for name, job in by_name(rendered(GPU), "Job").items()
                 for main_of in job["spec"]["template"]["spec"]["containers"] if name.startswith("model-")]
    assert 100 * quantity(waits["cpu"]) + sum(quantity(r["cpu"]) for r in relocates) < 4
    assert 100 * quantity(waits["memory"]) + sum(quantity(r["memory"]) for r in relocates) < 14 * 2**30


def test_what_waits_without_a_gpu_is_not_kept_for_gpu_nodes() -> None:
    for name, template in pod_templates(rendered(GPU)).items():
        wants = any("nvidia.com/gpu" in c["resources"]["limits"] for c in containers(template))
        assert bool(template["spec"].get("tolerations")) == wants, name
        assert bool(template["spec"].get("nodeSelector")) == wants, name
        assert wants == name.endswith(("/train", "/evaluate", "model-inference")), name


def test_one_number_says_how_many_nodes_train(tmp_path: Path) -> None:
    overlay = copy(tmp_path)
    edit(overlay / "hardware" / "adapter" / "training.yaml", "parallelism: 1", "parallelism: 4")
    edit(overlay / "hardware" / "adapter" / "training.yaml", "nvidia.com/gpu: 1", "nvidia.com/gpu: 8")
    job = replicated(overlay)["train"]
    spec = job["template"]["spec"]
    assert (spec["parallelism"], spec["completions"], spec["completionMode"]) == (4, 4, "Indexed")
    assert env(main(job))["NODES"] == "4"
    assert main(job)["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert main(replicated(overlay)["evaluate"])["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_adapters_of_one_environment_can_have_different_hardware(tmp_path: Path) -> None:
    """As docs/gpu.md describes it: by another folder from which an adapter starts."""
    overlay = copy(tmp_path)
    add_adapter(overlay, "cordoba-hotels")
    for folder in ("hardware/adapter", "adapter"):
        shutil.copytree(overlay / folder, overlay / f"{folder}-large")
    edit(overlay / "hardware" / "adapter-large" / "training.yaml", "parallelism: 1", "parallelism: 4")
    edit(overlay / "adapter-large" / "kustomization.yaml", "- ../hardware/adapter\n", "- ../hardware/adapter-large\n")
    edit(overlay / "adapters" / "cordoba-hotels" / "kustomization.yaml", "- ../../adapter ", "- ../../adapter-large ")
    found = job_sets(render(overlay))
    assert found["seville-hotels"] == job_set()
    training = next(j for j in found["cordoba-hotels"]["spec"]["replicatedJobs"] if j["name"] == "train")
    assert (training["template"]["spec"]["completions"], env(main(training))["NODES"]) == (4, "4")


def test_the_nodes_of_a_training_find_each_other() -> None:
    """By names of one headless Service, which is in git: JobSet makes one only if there is none of this name."""
    spec = job_set()["spec"]
    assert spec["coordinator"] == {"replicatedJob": "train", "jobIndex": 0, "podIndex": 0}
    assert env(main(replicated()["train"]))["MASTER_ADDR"] == {
        "fieldRef": {"fieldPath": "metadata.labels['jobset.sigs.k8s.io/coordinator']"}}
    service = by_name(rendered(GPU), "Service")[spec["network"]["subdomain"]]["spec"]
    assert (service["clusterIP"], service["publishNotReadyAddresses"]) == ("None", True)
    labels = replicated()["train"]["template"]["spec"]["template"]["metadata"]["labels"]
    assert service["selector"].items() <= labels.items()


@pytest.mark.parametrize(("nodes", "longest"), [(1, 33), (10, 33), (11, 32)])
def test_an_adapters_name_may_be_as_long_as_the_comments_say(nodes: int, longest: int, tmp_path: Path) -> None:
    """Of the names that JobSet makes, the pods' and the meeting point's of training are the longest."""
    overlay = copy(tmp_path)
    edit(overlay / "hardware" / "adapter" / "training.yaml", "parallelism: 1", f"parallelism: {nodes}")
    for letters in (longest, longest + 1):
        add_adapter(overlay, "a" * letters)
    found = job_sets(render(overlay))
    assert problems(found["a" * longest]) == []
    assert any("pods' names have 64 characters" in line for line in problems(found["a" * (longest + 1)]))
    comment = (overlay / "jobset" / "jobset.yaml").read_text()
    assert f"leave {longest} to the adapter's name" in comment or f"({longest} from {nodes} nodes on)" in comment


# The messages of a failed Job, as Kubernetes 1.32 words them, and what JobSet is to do.
FAILURES = [
    ("train", "PodFailurePolicy", "Pod ns/training-0-x has condition DisruptionTarget matching FailJob rule "
     "at index 1", "RestartJobSetAndIgnoreMaxRestarts"),
    ("train", "PodFailurePolicy", "Container job for pod ns/training-0-x failed with exit code 2 matching "
     "FailJob rule at index 0", "FailJobSet"),
    ("relocate", "PodFailurePolicy", "Container job for pod ns/relocation-0-x failed with exit code 2 matching "
     "FailJob rule at index 0", "FailJobSet"),
    ("train", "BackoffLimitExceeded", "Job has reached the specified backoff limit", "RestartJobSet"),
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
    training = replicated()["train"]["template"]["spec"]
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


SEVILLE = Path("adapters") / "seville-hotels"
RERUN: dict[str, Callable[[Path], object]] = {
    "training": lambda gpu: edit(gpu / SEVILLE / "pipeline.yaml", "epochs: 3", "epochs: 4"),
    "data without its pin": lambda gpu: (gpu / SEVILLE / "dataset.jsonl").write_text(
        '{"prompt": "a", "completion": "b"}\n'),
    "base model": lambda gpu: edit(gpu / "environment.yaml", "source: hf://Qwen/Qwen3-4B", "source: hf://Qwen/Qwen3-1.7B"),
    "image": lambda gpu: edit(gpu / "kustomization.yaml", "team/lora-gitops-jobs", "other/lora-gitops-jobs"),
    "nodes": lambda gpu: edit(gpu / "hardware" / "adapter" / "training.yaml", "parallelism: 1", "parallelism: 2"),
}
NO_RERUN: dict[str, Callable[[Path], None]] = {
    "serving flags": lambda gpu: edit(gpu / "hardware" / "environment" / "inference.yaml", "model-len=8192",
                                      "model-len=4096"),
    "serving image": lambda gpu: edit(gpu / "kustomization.yaml", "team/lora-gitops-serving", "other/serving"),
    "storage class": lambda gpu: edit(gpu / "hardware" / "environment" / "storage.yaml", "value: standard-rwx",
                                      "value: efs-sc"),
    "memory of relocation": lambda gpu: edit(gpu / "hardware" / "environment" / "relocation.yaml", "memory: 1Gi",
                                             "memory: 2Gi"),
    "another adapter": lambda gpu: add_adapter(gpu, "cordoba-hotels"),
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
    """`jobs local` takes the JobSets apart into the same pods, by the names that people know from other overlays."""
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    overlay = copy(tmp_path / "copy")
    add_adapter(overlay, "cordoba-hotels")
    local = {pod.title: pod for pod in pods.pods(render(overlay), tmp_path / "state")}
    assert {f"{name}-{adapter}" for name in [*STAGES, "await"] for adapter in ("seville-hotels", "cordoba-hotels")
            } | ENVIRONMENT_JOBS <= set(local)
    training = local["model-training-seville-hotels"]
    assert training.kind == "Job"
    assert training.fatal_exit_codes == {2}
    assert training.containers[0].argv[1:] == ["-m", "jobs", "train"]
    assert (training.containers[0].env["NODES"], training.containers[0].env["MASTER_ADDR"]) == ("1", "127.0.0.1")
    assert "REQUIRE_GPU" not in training.containers[0].env  # it can be tried on a CPU


def test_a_stage_that_was_given_a_gpu_does_not_compute_without() -> None:
    for name in ("train", "evaluate"):
        container = main(replicated()[name])
        assert container["resources"]["limits"]["nvidia.com/gpu"], name
        assert env(container)["REQUIRE_GPU"] == "1", name


def test_the_nodes_disk_is_asked_for_and_bounded() -> None:
    """An image pull that fills the disk evicts first what asked for none of it."""
    for name, template in pod_templates(rendered(GPU)).items():
        for container in template["spec"]["containers"]:
            if not template["metadata"]["labels"]["app.kubernetes.io/name"].startswith("model-"):
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
        pod = job["template"]["spec"]["template"]["spec"]
        del pod["priorityClassName"]  # another option
        if job["name"] in ("train", "evaluate"):  # and another one
            assert pod["volumes"].pop()["name"] == pod["containers"][0]["volumeMounts"].pop()["name"] == "signing-key"
            assert pod["containers"][0]["env"].pop()["name"] == "SIGNING_KEY"
    assert spec == job_set()["spec"]
    assert "suspend" not in queued["spec"]  # Kueue's to set


def test_replicas_spread_over_nodes_without_needing_them() -> None:
    spec = by_name(rendered(GPU), "Deployment")["model-inference"]["spec"]["template"]["spec"]
    (constraint,) = spec["topologySpreadConstraints"]
    assert constraint["whenUnsatisfiable"] == "ScheduleAnyway"


def test_an_overlay_on_top_brings_its_own_images_models_and_namespace(tmp_path: Path) -> None:
    top = copy(tmp_path).parent / "top"
    top.mkdir()
    (top / "environment.yaml").write_text((GPU / "environment.yaml").read_text().replace("keep: 3", "keep: 4"))
    (top / "kustomization.yaml").write_text("""\
namespace: other
resources: [../gpu]
components: [../../base/metadata]
images:
- {name: registry.example.com/team/lora-gitops-jobs, newName: mine/jobs, digest: "sha256:%s"}
- {name: registry.example.com/team/lora-gitops-serving, newName: mine/serving, newTag: 1.2.3}
configMapGenerator:
- {name: environment, behavior: merge, files: [environment.yaml]}
- {name: serving-pipelines, behavior: merge, files: [environment.yaml], options: {disableNameSuffixHash: true}}
""" % ("0" * 64))
    found = render(top)
    assert {m["metadata"].get("namespace", m["metadata"]["name"]) for m in found} == {"other"}
    assert job_set(top)["metadata"]["name"] != job_set()["metadata"]["name"]
    config = {m["metadata"]["name"]: m["data"] for m in of_kind(found, "ConfigMap")}
    for name, template in pod_templates(found).items():
        assert all(c["image"].startswith("mine/") for c in containers(template)), name
        for volume in template["spec"]["volumes"]:
            if volume["name"] == "environment":
                assert "keep: 4" in config[volume["configMap"]["name"]]["environment.yaml"], name


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
    data = {overlay: (CHECKOUT / "overlays" / overlay / SEVILLE / "dataset.jsonl").read_bytes()
            for overlay in ("kind", "gpu", "kind-smollm2")}
    assert len(set(data.values())) == 1
