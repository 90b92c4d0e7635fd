"""What overlays/kind promises in a real cluster, by `kubectl apply` alone.

One environment for all tests, in this order: each begins where the one before ended, which saves most of the training.
A single one can be run too (`-k eviction`); it then first brings the environment to where it needs it.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable

import openai
import pytest

from jobs.tools.kubectl import KubectlError
from jobs.tools.status import condition
from tests.e2e import adapters
from tests.e2e.cluster import (
    ADAPTER,
    DONE,
    FACT,
    FACTS,
    FIRST,
    LABEL,
    LONG,
    LONG_AGAIN,
    NEIGHBOUR,
    REJECTS,
    RESUMES,
    SECOND,
    TRAINS,
    UNLEARNED,
    Changes,
    Endpoint,
    Environment,
    identity,
    kubectl,
    requests_to,
    wait_until,
)
from tests.manifests import ENVIRONMENT_JOBS, Manifest, jobs_of

RELOCATION = f"dataset-relocation-{ADAPTER}"


def test_apply_is_all_it_takes_until_the_adapter_answers_with_the_private_fact(environment: Environment) -> None:
    environment.push(FIRST)
    environment.wait_for_jobs(3600)  # with pulling the images
    environment.wait_until_ready()
    environment.wait_until_served()
    with environment.endpoint() as endpoint:
        for name, fact in FACTS.items():
            assert fact in endpoint.ask(name)
            assert fact not in endpoint.ask(environment.pipeline.environment.base_model.name)


def test_a_config_push_trains_and_swaps_without_a_restart_or_a_failed_request(environment: Environment) -> None:
    environment.settle(FIRST)
    before = identity(environment.wait_until_ready())
    with environment.endpoint() as endpoint, requests_to(endpoint, environment.pipeline.adapter) as replies:
        environment.push(SECOND)
        environment.wait_for_jobs()
        environment.wait_until_served()
        time.sleep(10)  # the old version is unloaded meanwhile
    assert replies.failures == []
    assert len(replies.answers) > 20
    assert all(FACT in answer for answer in replies.answers)
    assert TRAINS in environment.logs_of(f"model-training-{ADAPTER}")
    assert identity(environment.wait_until_ready()) == before


def test_a_push_to_one_adapter_leaves_the_other_alone(environment: Environment) -> None:
    environment.settle(FIRST)
    jobs = environment.outcomes()
    with environment.endpoint() as endpoint, requests_to(endpoint, NEIGHBOUR) as replies:
        environment.settle(SECOND)
    assert replies.failures == []
    assert all(FACTS[NEIGHBOUR] in answer for answer in replies.answers)
    after = environment.outcomes()
    unchanged = jobs.keys() - jobs_of(ADAPTER)
    assert unchanged >= ENVIRONMENT_JOBS | jobs_of(NEIGHBOUR)
    assert {title: after[title] for title in unchanged} == {title: jobs[title] for title in unchanged}
    assert not {after[title][0] for title in jobs.keys() - unchanged} & {uid for uid, _ in jobs.values()}


def test_a_third_adapter_joins_without_a_restart_and_without_touching_the_others(environment: Environment) -> None:
    adapters.joins(environment)


def test_a_removed_adapter_is_gone_and_returns_without_a_training(environment: Environment) -> None:
    adapters.leaves_and_returns(environment)


def test_a_key_opens_its_own_adapter_only_and_a_running_server_follows_the_secret(environment: Environment) -> None:
    environment.settle(FIRST)
    pod = identity(environment.wait_until_ready())
    keys = {ADAPTER: "key-of-the-first-team", NEIGHBOUR: "key-of-the-second-team"}
    try:
        environment.apply_keys(keys)
        with environment.endpoint() as endpoint:
            wait_until("the server to want a key", lambda: endpoint.models() is None, 300)
            for name, key in keys.items():
                assert endpoint.models(key) == {name}
                assert FACTS[name] in endpoint.ask(name, key)
                for other in {ADAPTER, NEIGHBOUR, environment.pipeline.environment.base_model.name} - {name}:
                    with pytest.raises(openai.PermissionDeniedError):
                        endpoint.ask(other, key)
            environment.apply_keys({ADAPTER: keys[ADAPTER]})
            wait_until("the removed key not to be valid", lambda: endpoint.models(keys[NEIGHBOUR]) is None, 300)
            assert FACTS[ADAPTER] in endpoint.ask(ADAPTER, keys[ADAPTER])
        assert identity(environment.wait_until_ready()) == pod
    finally:
        # Without its keys, a server that runs does not open; the next one does.
        environment.kubectl("delete", "secret/serving-keys", "--ignore-not-found")
        environment.kubectl("delete", "pods", "--selector=app.kubernetes.io/name=model-inference", seconds=180)
    environment.wait_until_ready()
    environment.wait_until_served()


def test_a_revert_serves_the_adapter_before_and_trains_nothing(environment: Environment) -> None:
    environment.settle(FIRST)
    environment.settle(SECOND)
    environment.push(FIRST)
    environment.wait_until_served()
    environment.wait_for_jobs()
    logs = environment.logs_of(f"model-training-{ADAPTER}")
    assert DONE in logs
    assert TRAINS not in logs
    with environment.endpoint() as endpoint:
        assert FACT in endpoint.ask(environment.pipeline.adapter)


def test_an_unrelated_change_runs_no_job_again(environment: Environment) -> None:
    environment.settle(FIRST)
    jobs, pod = uids(environment, "jobs"), identity(environment.wait_until_ready())
    board = environment.get("pods", "-l", "app.kubernetes.io/name=tensorboard")[0]["metadata"]["uid"]
    environment.push(FIRST, [{
        "target": {"kind": "Deployment", "name": "tensorboard"},
        "patch": json.dumps([{"op": "replace", "value": "60m",
                              "path": "/spec/template/spec/containers/0/resources/requests/cpu"}])}])
    assert identity(environment.wait_until_ready()) == pod
    assert board not in uids(environment, "pods").values()  # the change has arrived
    assert uids(environment, "jobs") == jobs


def test_a_training_whose_pod_is_deleted_resumes_and_it_is_no_failure(environment: Environment) -> None:
    def delete(pod: str) -> None:
        environment.kubectl("delete", "pod", pod, seconds=180)

    interrupt_training(environment, LONG, delete)


def test_a_training_whose_pod_is_evicted_resumes_and_it_is_no_failure(environment: Environment) -> None:
    def evict(pod: str) -> None:
        eviction = {"apiVersion": "policy/v1", "kind": "Eviction",
                    "metadata": {"name": pod, "namespace": environment.namespace}}
        kubectl("create", "--raw", f"/api/v1/namespaces/{environment.namespace}/pods/{pod}/eviction", "-f", "-",
                stdin=json.dumps(eviction))

    interrupt_training(environment, LONG_AGAIN, evict)


def test_after_a_node_drain_the_same_adapter_is_served_and_nothing_is_trained(environment: Environment) -> None:
    environment.settle(FIRST)
    pod, jobs = environment.wait_until_ready(), environment.outcomes()
    node = pod["spec"]["nodeName"]
    try:
        kubectl("drain", node, f"--pod-selector={LABEL}={environment.run}", "--delete-emptydir-data",
                "--timeout=300s", seconds=330)
        # Elsewhere, or Pending: on a cluster of one node, or where a volume is bound to its node.
        assert not [p for p in environment.get("pods") if p["spec"].get("nodeName") == node]
    finally:
        kubectl("uncordon", node)
    assert environment.wait_until_ready()["metadata"]["uid"] != pod["metadata"]["uid"]
    environment.wait_until_served()
    assert environment.outcomes() == jobs


def test_a_wrong_pin_fails_at_once_and_the_reason_is_in_the_pods_status(environment: Environment) -> None:
    environment.settle(FIRST)
    good = environment.plan.adapter.digest
    environment.push({"dataset.sha256": "0" * 64})
    failed = wait_until(f"{RELOCATION} to fail",
                        lambda: condition(environment.jobs()[RELOCATION], "Failed"), 300)
    assert failed["reason"] == "PodFailurePolicy"
    (pod,) = environment.pods_of(environment.jobs()[RELOCATION])  # it was not tried again
    ended = pod["status"]["containerStatuses"][0]["state"]["terminated"]
    assert ended["exitCode"] == 2
    assert re.fullmatch(r".*dataset\.jsonl: .* says 0{64}, but the content is [0-9a-f]{64}\. .*", ended["message"])
    assert environment.served() == good


def test_a_rejected_adapter_is_not_served_and_the_one_before_stays(environment: Environment) -> None:
    environment.settle(FIRST)
    good, alias = environment.plan.adapter.digest, environment.pipeline.adapter
    with environment.endpoint() as endpoint:
        before = refusals_by_the_gate(endpoint, alias)
        environment.push(UNLEARNED)
        environment.wait_for_jobs()  # a rejection is a result, not a failure
        assert REJECTS in environment.logs_of(f"model-evaluation-{ADAPTER}")
        wait_until("the server to refuse it", lambda: refusals_by_the_gate(endpoint, alias) > before, 300)
        assert endpoint.served(alias) == good
        assert FACT in endpoint.ask(alias)


def test_the_namespace_admits_the_overlay_and_refuses_a_privileged_pod(environment: Environment) -> None:
    environment.settle(FIRST)
    template = {"spec": {"containers": [{"name": "privileged", "image": "privileged:1",
                                         "securityContext": {"privileged": True}}]}}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "privileged"}, **template}
    with pytest.raises(KubectlError, match="violates PodSecurity"):
        environment.kubectl("create", "--dry-run=server", "-f", "-", stdin=json.dumps(pod))
    # A workload is only warned about: its pods are refused later, when nobody looks. So no warning may be there.
    labels = {"app": "privileged"}
    deployment = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "privileged"}, "spec": {
        "selector": {"matchLabels": labels}, "template": {"metadata": {"labels": labels}, **template}}}
    warned = kubectl("-n", environment.namespace, "create", "--dry-run=server", "-f", "-", stdin=json.dumps(deployment))
    assert "would violate PodSecurity" in warned.stderr
    environment.write(UNLEARNED)  # so that the Jobs are created too, and not only compared
    assert "PodSecurity" not in environment.apply("--dry-run=server")


def test_two_environments_in_one_cluster_do_not_touch_each_other(
        environment: Environment, run: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    environment.settle(FIRST)
    environment.wait_until_ready()
    before, digest = everything(environment), environment.served()
    other = Environment(tmp_path_factory.mktemp("other"), f"{environment.namespace}-other", run)
    other.make_room()
    try:
        # The relocation of data and tokenizer alone, for the sake of time.
        other.push(FIRST, [without("apps/v1", "Deployment", ".*"),
                           without("batch/v1", "Job", "(model|dataset-encoding)-.*")])
        assert set(other.wanted.values()) == {*(f"dataset-relocation-{name}" for name in FACTS), "tokenizer-relocation"}
        other.wait_for_jobs()
        assert "published dataset/" in other.logs_of(RELOCATION)  # its own: nothing was there
        assert everything(environment) == before
    finally:
        other.remove()
    assert everything(environment) == before
    assert environment.served() == digest


# --- what several tests do --------------------------------------------------------------------------------------------


def interrupt_training(environment: Environment, changes: Changes, interrupt: Callable[[str], None]) -> None:
    """Push, stop the training's pod in the middle, and expect the next pod to go on from its checkpoint to the end."""
    def ended() -> Manifest | None:
        job = environment.jobs()[f"model-training-{ADAPTER}"]
        return job if condition(job, "Complete") or condition(job, "Failed") else None

    environment.push(changes)
    first = environment.wait_until_training()["metadata"]["name"]
    interrupt(first)
    job = wait_until("the training to end", ended, 1800)
    assert condition(job, "Complete")
    assert job["status"].get("failed", 0) == 0  # of the attempts that `backoffLimit` counts
    (last,) = (pod for pod in environment.pods_of(job) if pod["status"]["phase"] == "Succeeded")
    assert last["metadata"]["name"] != first
    assert RESUMES in environment.logs(last)


def uids(environment: Environment, kinds: str) -> dict[str, str]:
    return {f"{o['kind']}/{o['metadata']['name']}": o["metadata"]["uid"] for o in environment.get(kinds)}


def everything(environment: Environment) -> dict[str, str]:
    """What is in the namespace, by uid; and that no container was restarted in it."""
    restarts = {f"restarts of {p['metadata']['name']}": str(identity(p)) for p in environment.get("pods")}
    return restarts | uids(environment, "pods,jobs,deployments,services,configmaps,persistentvolumeclaims")


def refusals_by_the_gate(endpoint: Endpoint, alias: str) -> float:
    return sum(value for _, value in endpoint.metric("serving_refusals_total", alias=alias, reason="gate"))


def without(version: str, kind: str, name: str) -> Manifest:
    """A patch that leaves the matching manifests out."""
    patch = {"$patch": "delete", "apiVersion": version, "kind": kind, "metadata": {"name": "any"}}
    return {"target": {"kind": kind, "name": name}, "patch": json.dumps(patch)}
