"""The parts of the end-to-end tests that need no cluster: what they make of its answers, and the overlay they apply."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from jobs.core import progress
from jobs.tools import waiting
from jobs.tools.kubectl import KubectlError
from serving import keys
from tests.e2e import adapters, cluster
from tests.manifests import (
    CHECKOUT,
    ENVIRONMENT_JOBS,
    Manifest,
    by_name,
    copy,
    jobs_of,
    of_kind,
    pod_templates,
    render,
)

# As vLLM and serving/events.py answer on /metrics.
METRICS = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="builtin:tiny"} 0.0
# HELP serving_adapter_info 1 for the adapter that answers under the alias, by digest.
# TYPE serving_adapter_info gauge
serving_adapter_info{alias="seville-hotels",digest="81e9dc13a516d878"} 1.0
# HELP serving_refusals_total Adapters, evaluations, promotions and pipeline files that were refused.
# TYPE serving_refusals_total counter
serving_refusals_total{alias="seville-hotels",reason="gate"} 2.0
# TYPE serving_refusals_created gauge
serving_refusals_created{alias="seville-hotels",reason="gate"} 1.7e+09
"""


def pod(name: str, **statuses: list[Manifest]) -> Manifest:
    return {"metadata": {"name": name, "uid": f"uid-of-{name}"}, "status": statuses}


def test_a_restarted_container_is_not_the_same_pod() -> None:
    before = pod("a", containerStatuses=[{"restartCount": 0}])
    assert cluster.identity(before) == cluster.identity(pod("a", containerStatuses=[{"restartCount": 0}]))
    assert cluster.identity(before) != cluster.identity(pod("a", containerStatuses=[{"restartCount": 1}]))
    assert cluster.identity(before) != cluster.identity(pod("b", containerStatuses=[{"restartCount": 0}]))


def test_an_image_that_cannot_be_pulled_ends_the_waiting_and_a_pod_that_starts_does_not() -> None:
    waiting = {"state": {"waiting": {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "nowhere:1"'}}}
    starting = {"state": {"waiting": {"reason": "ContainerCreating"}}}
    running = {"state": {"running": {"startedAt": "2026-11-23T03:00:00Z"}}}
    pods = [pod("a", containerStatuses=[starting]), pod("b", containerStatuses=[running]), pod("pending")]
    assert cluster.stuck(pods) == []
    initializing = {"state": {"waiting": {"reason": "PodInitializing"}}}
    stuck = pod("c", initContainerStatuses=[waiting], containerStatuses=[initializing])
    assert cluster.stuck([*pods, stuck]) == ['c: ImagePullBackOff: Back-off pulling image "nowhere:1"']


def test_metrics_are_read_by_name_and_labels() -> None:
    assert cluster.samples(METRICS, "serving_adapter_info") == [
        ({"alias": "seville-hotels", "digest": "81e9dc13a516d878"}, 1.0)]
    assert cluster.samples(METRICS, "serving_refusals_total") == [({"alias": "seville-hotels", "reason": "gate"}, 2.0)]
    assert cluster.samples(METRICS, "serving_swaps_total") == []


@pytest.mark.parametrize(("reference", "entry"), [
    ("registry.example.com/team/jobs:1.2", {"newName": "registry.example.com/team/jobs", "newTag": "1.2"}),
    ("localhost:5001/jobs:dev", {"newName": "localhost:5001/jobs", "newTag": "dev"}),
    ("localhost:5001/jobs@sha256:" + "0" * 64, {"newName": "localhost:5001/jobs", "digest": "sha256:" + "0" * 64}),
])
def test_an_image_by_variable_becomes_an_entry_of_kustomize(reference: str, entry: dict[str, str]) -> None:
    assert cluster.image_override("lora-gitops-jobs", reference) == {"name": "lora-gitops-jobs", **entry}


def test_an_image_that_means_latest_is_refused() -> None:
    with pytest.raises(AssertionError, match="neither a tag nor a digest"):
        cluster.image_override("lora-gitops-jobs", "localhost:5001/jobs")


def test_what_the_tests_look_for_in_the_logs_is_what_the_stages_write(
        monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """On a cluster a reworded line would show only after an hour, or not at all."""
    written = "".join(file.read_text() for file in (CHECKOUT / "jobs").rglob("*.py"))
    for words in (cluster.TRAINS, cluster.RESUMES, cluster.DONE, cluster.REJECTS):
        assert words in written, words
    monkeypatch.setattr(progress, "INTERVAL_S", 0.0)
    caplog.set_level(logging.INFO, logger="jobs")
    progress.Progress("training steps", 1500).add(12, lambda: "loss 4.2000")
    assert cluster.STEP.search(caplog.messages[0])
    assert 'Progress("training steps"' in written


# --- the overlay ------------------------------------------------------------------------------------------------------


def test_the_overlay_under_test_is_overlays_kind_in_another_namespace_with_other_images(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("E2E_JOBS_IMAGE", "registry.example.com/jobs:9")
    monkeypatch.setenv("E2E_SERVING_IMAGE", "registry.example.com/serving@sha256:" + "1" * 64)
    environment = cluster.Environment(tmp_path / "e2e", "elsewhere", "run1")
    kind, rendered = render(copy(tmp_path / "plain")), render(environment.overlay)
    assert {m["metadata"].get("namespace", m["metadata"]["name"]) for m in rendered} == {"elsewhere"}
    for kinds in ("Job", "Deployment", "ConfigMap", "PersistentVolumeClaim", "NetworkPolicy", "Service"):
        assert len(of_kind(rendered, kinds)) == len(of_kind(kind, kinds)), kinds
    for name, template in pod_templates(rendered).items():
        assert template["metadata"]["labels"][cluster.LABEL] == "run1", name  # a drain finds them by it
        assert all(c["image"].startswith("registry.example.com/") for c in template["spec"]["containers"]), name
    assert sorted(environment.wanted.values()) == sorted(by_name(kind, "Job"))


def test_a_change_of_an_adapter_renames_its_jobs_alone_and_undoing_it_brings_the_names_back(tmp_path: Path) -> None:
    environment = cluster.Environment(tmp_path, "elsewhere", "run1")
    first, digest = environment.wanted, environment.plan.adapter.digest
    environment.write(cluster.SECOND)
    assert sorted(first[name] for name in first.keys() - environment.wanted.keys()) == [
        f"{stage}-{cluster.ADAPTER}"
        for stage in ("dataset-encoding", "dataset-relocation", "model-evaluation", "model-training")]
    assert environment.plan.adapter.digest != digest
    environment.write(cluster.FIRST)
    assert (environment.wanted, environment.plan.adapter.digest) == (first, digest)


def test_an_adapter_that_is_added_brings_its_jobs_and_leaves_the_names_of_the_others(tmp_path: Path) -> None:
    environment = cluster.Environment(tmp_path, "elsewhere", "run1")
    first = environment.wanted
    environment.add("third")
    environment.write(cluster.FIRST)
    assert first.items() <= environment.wanted.items()
    assert sorted(environment.wanted[name] for name in environment.wanted.keys() - first.keys()) == [
        f"{stage}-third"
        for stage in ("dataset-encoding", "dataset-relocation", "model-evaluation", "model-training")]
    assert environment.adapters.keys() == {cluster.ADAPTER, cluster.NEIGHBOUR, "third"}
    (served,) = [m for m in of_kind(render(environment.overlay), "ConfigMap")
                 if m["metadata"]["name"] == "serving-pipelines"]
    assert served["data"].keys() == {"environment.yaml", *(f"{name}.yaml" for name in environment.adapters)}


def test_an_adapter_that_is_dropped_leaves_nothing_behind_and_may_come_again(tmp_path: Path) -> None:
    environment = cluster.Environment(tmp_path, "elsewhere", "run1")
    first = environment.wanted
    environment.add("third")
    environment.write(cluster.FIRST)
    third = environment.wanted
    environment.drop("third")
    environment.write(cluster.FIRST)
    assert environment.wanted == first
    assert environment.adapters.keys() == {cluster.ADAPTER, cluster.NEIGHBOUR}
    environment.add("third")
    environment.write(cluster.FIRST)
    assert environment.wanted == third


def test_the_jobs_of_the_overlay_are_those_that_the_tests_tell_apart(tmp_path: Path) -> None:
    environment = cluster.Environment(tmp_path, "elsewhere", "run1")
    assert set(environment.wanted.values()) == (
        ENVIRONMENT_JOBS | jobs_of(cluster.ADAPTER) | jobs_of(cluster.NEIGHBOUR))


def test_each_key_of_the_tests_opens_one_model(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(cluster.keys_file({cluster.ADAPTER: "one", cluster.NEIGHBOUR: "two"}))
    held = keys.Keys(file, None)
    for key, opened, other in ((b"one", cluster.ADAPTER, cluster.NEIGHBOUR),
                               (b"two", cluster.NEIGHBOUR, cluster.ADAPTER)):
        found = held.find(key)
        assert found and found.may_use(opened) and not found.may_use(other)


class Cluster:
    """An environment in a cluster, as far as `others_unharmed` looks at it."""

    def __init__(self) -> None:
        self.restarts = 0
        self.names = {title: f"{title}-hash" for title in ("model-training-a", "model-training-third")}
        self.answers = {name: f"It is the {fact}." for name, fact in cluster.FACTS.items()}
        self.asked = 0

    def wait_until_ready(self) -> Manifest:
        return pod("server", containerStatuses=[{"restartCount": self.restarts}])

    def jobs(self) -> dict[str, Manifest]:
        return {title: {"metadata": {"name": name}} for title, name in self.names.items()}

    def outcomes(self) -> dict[str, tuple[str, Manifest]]:
        return {title: (f"uid-of-{name}", {}) for title, name in self.names.items()}

    @contextlib.contextmanager
    def endpoint(self) -> Iterator[Cluster]:
        yield self

    def ask(self, model: str) -> str:
        self.asked += 1
        if not self.answers[model]:
            raise ConnectionError
        return self.answers[model]


@pytest.mark.parametrize(("harm", "seen"), [
    (lambda c: None, None),
    (lambda c: c.names.update({"model-training-third": "model-training-third-other"}), None),
    (lambda c: setattr(c, "restarts", 1), "the server restarted"),
    (lambda c: c.names.update({"model-training-a": "model-training-a-other"}), "Jobs of others changed: .*-a"),
    (lambda c: c.names.pop("model-training-a"), "Jobs of others changed: .*-a"),
    (lambda c: c.answers.update({cluster.ADAPTER: c.answers[cluster.NEIGHBOUR]}), cluster.FACTS[cluster.NEIGHBOUR]),
    (lambda c: c.answers.update({cluster.NEIGHBOUR: ""}), "ConnectionError"),
], ids=["nothing", "a Job of the third", "a restart", "another name", "a Job less", "another's answer", "a failure"])
def test_harm_to_the_others_is_noticed(monkeypatch: pytest.MonkeyPatch, harm: Callable[[Cluster], object],
                                       seen: str | None) -> None:
    monkeypatch.setattr(adapters, "AFTERWARDS_SECONDS", 0.0)
    monkeypatch.setattr(adapters, "REQUESTS", 0)
    monkeypatch.setattr(cluster, "PAUSE_SECONDS", 0.001)
    environment = Cluster()

    def change() -> None:
        with adapters.others_unharmed(environment):  # type: ignore[arg-type]
            harm(environment)
            asked = environment.asked
            waiting.wait_until("requests", lambda: environment.asked > asked + 10, 20, every=0.001)

    if seen is None:
        change()
    else:
        with pytest.raises(AssertionError, match=seen):
            change()


def test_no_two_pipelines_of_the_tests_give_the_same_adapter(tmp_path: Path) -> None:
    environment = cluster.Environment(tmp_path, "elsewhere", "run1")
    digests = set()
    for changes in (cluster.FIRST, cluster.SECOND, cluster.UNLEARNED, cluster.LONG, cluster.LONG_AGAIN):
        environment.write(changes)
        digests.add(environment.plan.adapter.digest)
    assert len(digests) == 5  # and retention keeps 5: the first is still there when it is wanted again
    assert environment.pipeline.environment.retention.keep == 5


# --- kubectl ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a program in kubectl's place: there is no cluster here."""
    def replace(program: str) -> None:
        file = tmp_path / "bin" / "kubectl"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/sh\n{program}\n")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{file.parent}:/usr/bin:/bin")

    return replace


def test_without_a_cluster_the_reason_is_one_line(kubectl: Callable[[str], None],
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    unreachable = cluster.unreachable.__wrapped__
    monkeypatch.delenv("KUBECONFIG", raising=False)
    assert "KUBECONFIG is not set" in str(unreachable())
    monkeypatch.setenv("KUBECONFIG", "config")
    kubectl("echo 'E1123 trying' >&2; echo 'Unable to connect to the server: timeout' >&2; exit 1")
    assert re.fullmatch("KUBECONFIG is set, but the cluster does not answer within 10 s: .*: Unable to connect to the "
                        "server: timeout", str(unreachable()))
    kubectl("echo '{}'")
    assert unreachable() is None


def test_a_namespace_that_no_run_made_is_never_removed(kubectl: Callable[[str], None], tmp_path: Path) -> None:
    environment = cluster.Environment(tmp_path / "e2e", "production", "run1")
    found = json.dumps({"metadata": {"name": "production", "labels": {"kubernetes.io/metadata.name": "production"}}})
    kubectl(f"case \"$*\" in *delete*) touch {tmp_path}/deleted;; *) echo '{found}';; esac")
    with pytest.raises(AssertionError, match="no end-to-end test made it"):
        environment.make_room()
    assert not (tmp_path / "deleted").exists()


def test_a_tunnel_is_waited_for_and_one_that_cannot_be_made_gives_the_reason(kubectl: Callable[[str], None]) -> None:
    kubectl("sleep 0.3; echo 'Forwarding from 127.0.0.1:43211 -> 8000'; exec sleep 60")
    with cluster.forwarded("ns", "pod", 8000) as url:
        assert url == "http://127.0.0.1:43211"
    kubectl("echo 'error: unable to forward port because pod is not running. Current status=Pending' >&2; exit 1")
    with pytest.raises(KubectlError, match="Current status=Pending"), cluster.forwarded("ns", "pod", 8000):
        pass


def test_what_is_asked_through_a_tunnel_that_ended_proves_nothing(
        kubectl: Callable[[str], None], tmp_path: Path) -> None:
    kubectl(f"echo $$ >{tmp_path}/pid; echo 'Forwarding from 127.0.0.1:43211 -> 8000'; "
            f"until [ -e {tmp_path}/ends ]; do sleep 0.05; done; echo 'lost connection to pod' >&2; exit 1")

    def end() -> None:
        (tmp_path / "ends").touch()
        process = psutil.Process(int((tmp_path / "pid").read_text()))
        while process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)

    with pytest.raises(AssertionError, match="lost connection to pod"), cluster.forwarded("ns", "pod", 8000):
        end()
