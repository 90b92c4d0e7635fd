"""Promises of the states: what the status of an object means, as Kubernetes 1.32 and Argo CD 3.5 write it."""

from __future__ import annotations

from typing import Any

from jobs.tools import argocd
from jobs.tools.pods import Manifest
from jobs.tools.status import condition, rolled_out

FAILED_JOB: Manifest = {"status": {"failed": 1, "conditions": [
    {"type": "FailureTarget", "status": "True", "reason": "PodFailurePolicy"},
    {"type": "Complete", "status": "False"},
    {"type": "Failed", "status": "True", "reason": "PodFailurePolicy", "message": "Container job for pod …"}]}}


def test_a_condition_counts_only_while_it_is_true() -> None:
    failed = condition(FAILED_JOB, "Failed")
    assert failed is not None
    assert failed["reason"] == "PodFailurePolicy"
    assert condition(FAILED_JOB, "Complete") is None
    assert condition({"status": {}}, "Complete") is None
    assert condition({}, "Complete") is None


def test_a_rollout_is_over_when_every_pod_is_new_and_ready() -> None:
    """Not when `Available` is true: with one replica and maxUnavailable 1 that is so from the start."""
    available = [{"type": "Available", "status": "True"}]
    over: Manifest = {"metadata": {"generation": 2}, "spec": {"replicas": 1}, "status": {
        "observedGeneration": 2, "replicas": 1, "updatedReplicas": 1, "availableReplicas": 1, "conditions": available}}
    assert rolled_out(over)
    for change in ({"observedGeneration": 1}, {"replicas": 2}, {"updatedReplicas": 0}, {"availableReplicas": 0}):
        assert not rolled_out({**over, "status": over["status"] | change}), change
    fresh = {"observedGeneration": 2, "replicas": 1, "updatedReplicas": 1, "unavailableReplicas": 1,
             "conditions": available}
    assert not rolled_out({**over, "status": fresh})


def application(**status: Any) -> Manifest:
    return {"metadata": {"annotations": {}}, "status": {
        "sync": {"status": "Synced", "revision": "c0ffee"}, "operationState": {"phase": "Succeeded"}} | status}


def test_synced_means_this_commit_and_not_still_at_it() -> None:
    assert argocd.synced(application(), "c0ffee")
    assert not argocd.synced(application(), "decaf")
    assert not argocd.synced(application(sync={"status": "OutOfSync", "revision": "c0ffee"}), "c0ffee")
    assert not argocd.synced(application(operationState={"phase": "Running"}), "c0ffee")
    assert not argocd.synced({"metadata": {}}, "c0ffee")


def test_what_drifts_is_named() -> None:
    synced = {"kind": "Job", "name": "model-training-abc", "status": "Synced"}
    drifted = {"kind": "Service", "name": "tensorboard", "status": "OutOfSync"}
    assert argocd.out_of_sync(application(resources=[synced])) == []
    assert argocd.out_of_sync(application(resources=[synced, drifted])) == ["Service tensorboard: OutOfSync"]
