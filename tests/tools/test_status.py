"""Promises of the states: what the status of an object means, as Kubernetes 1.32 and Argo CD 3.5 write it."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.core.errors import RetryableError, UserError
from jobs.tools import argocd, status
from jobs.tools.pods import Manifest
from jobs.tools.status import State, condition, rolled_out

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


def watched(*snapshots: dict[str, State]) -> None:
    """`watch` over these snapshots, each once and the last one for ever, for at most a second."""
    looks = iter(snapshots)
    status.watch(lambda: next(looks, snapshots[-1]), 1)


RUNS, DONE = State("runs"), State("done", done=True)


def failed(code: int, adapter: str | None = None) -> State:
    return State(f"failed with exit code {code}", exit_code=code, adapter=adapter)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "POLL_SECONDS", 0.01)


def test_after_a_failed_job_of_one_adapter_the_other_adapters_are_waited_for_and_its_other_jobs_are_not() -> None:
    waits = State("waits for its inputs", adapter="bad")
    before = {"train-bad": failed(2, "bad"), "evaluate-bad": waits, "train-good": State("runs", adapter="good")}
    looks = []

    def look() -> dict[str, State]:
        looks.append(1)
        return before if len(looks) < 3 else before | {"train-good": State("done", done=True, adapter="good")}

    with pytest.raises(UserError, match="^train-bad failed with exit code 2$"):
        status.watch(look, 60)
    assert len(looks) == 3


def test_a_failed_job_of_the_environment_ends_it_at_once() -> None:
    with pytest.raises(RetryableError, match="^model-relocation failed with exit code 1$"):
        watched({"model-relocation": failed(1), "train-a": State("runs", adapter="a"), "model-inference": RUNS})


def test_all_adapters_that_failed_are_named_and_what_a_user_must_change_decides_the_exit_code() -> None:
    with pytest.raises(UserError, match="^train-a failed with exit code 1\ntrain-b failed with exit code 2$"):
        watched({"train-a": failed(1, "a"), "train-b": failed(2, "b"), "model-inference": DONE})


def test_what_is_given_up_is_not_named_as_late() -> None:
    with pytest.raises(RetryableError, match=r"waited 1 s for model-inference \(runs\)\. Run it again"):
        watched({"train-a": failed(2, "a"), "evaluate-a": State("runs", adapter="a"), "model-inference": RUNS})


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
