"""What argocd/ promises where Argo CD runs: a push is all it takes, and the commit is what runs.

In this order, in one environment, as in test_overlay.py; the last test deletes the Application.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from jobs.tools.argocd import out_of_sync
from tests.e2e import adapters, argocd
from tests.e2e.argocd import Followed
from tests.e2e.cluster import (
    ADAPTER,
    DONE,
    FACTS,
    FIRST,
    LONG,
    SECOND,
    TRAINS,
    wait_until,
)


@pytest.fixture(scope="module")
def environment(run: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Followed]:
    if reason := argocd.missing():
        pytest.skip(reason)
    namespace = os.environ.get("E2E_NAMESPACE", "lora-gitops-e2e")
    made = Followed(tmp_path_factory.mktemp("git") / "repository", f"{namespace}-argocd", run)
    made.make_room()
    made.bootstrap()
    yield made
    if not os.environ.get("E2E_KEEP"):
        made.remove()


def test_one_command_and_the_branch_is_synced_and_its_adapter_served(environment: Followed) -> None:
    environment.wait_until_synced()
    environment.wait_for_jobs(3600)  # with pulling the images
    environment.wait_until_ready()
    environment.wait_until_served()
    with environment.endpoint() as endpoint:
        for name, fact in FACTS.items():
            assert fact in endpoint.ask(name)


def test_a_push_during_the_training_prunes_it_and_is_served(environment: Followed) -> None:
    environment.push(LONG)
    environment.wait_until_training()
    superseded = environment.jobs()[f"model-training-{ADAPTER}"]["metadata"]["uid"]
    environment.push(SECOND)  # returns: the sync did not wait for the training
    assert superseded not in [job["metadata"]["uid"] for job in environment.get("jobs")]
    environment.wait_for_jobs()
    environment.wait_until_served()


def test_a_revert_serves_the_adapter_before_and_trains_nothing(environment: Followed) -> None:
    environment.settle(FIRST)
    environment.settle(SECOND)
    environment.push(FIRST)  # the tree that `git revert` gives
    environment.wait_until_served()
    environment.wait_for_jobs()
    logs = environment.logs_of(f"model-training-{ADAPTER}")
    assert DONE in logs
    assert TRAINS not in logs


def test_a_commit_that_changes_nothing_runs_no_job_again(environment: Followed) -> None:
    environment.settle(FIRST)
    before = environment.outcomes()
    environment.push(FIRST)
    assert environment.outcomes() == before


def test_a_third_adapter_joins_without_a_restart_and_without_touching_the_others(environment: Followed) -> None:
    adapters.joins(environment)


def test_a_removed_adapter_is_gone_and_returns_without_a_training(environment: Followed) -> None:
    adapters.leaves_and_returns(environment)


def test_what_somebody_changed_by_hand_is_set_back(environment: Followed) -> None:
    environment.settle(FIRST)
    environment.wait_until_ready()
    environment.kubectl("scale", "deployment/tensorboard", "--replicas=0")
    environment.kubectl("delete", "service/model-inference")

    def healed() -> bool:
        replicas = {d["metadata"]["name"]: d["spec"]["replicas"] for d in environment.get("deployments")}
        services = {s["metadata"]["name"] for s in environment.get("services")}
        return replicas["tensorboard"] == 1 and "model-inference" in services

    wait_until("Argo CD to set it back", healed, 180)


def test_when_all_is_done_nothing_drifts(environment: Followed) -> None:
    environment.settle(FIRST)
    environment.wait_until_ready()

    def healthy() -> bool:
        status = environment.refresh()["status"]
        return bool(status["sync"]["status"] == "Synced" and status["health"]["status"] == "Healthy")

    wait_until("the Application to be Synced and Healthy", healthy, 300)
    synced = environment.application_now()["status"]["operationState"]["finishedAt"]
    for how in ("normal", "hard", "normal"):  # hard: rendered anew
        application = environment.refresh(how)
        assert out_of_sync(application) == []
    assert application["status"]["operationState"]["finishedAt"] == synced  # no sync was needed meanwhile


def test_the_volumes_and_what_is_on_them_outlive_the_application(environment: Followed) -> None:
    environment.settle(FIRST)
    claims = {c["metadata"]["name"]: c["metadata"]["uid"] for c in environment.get("persistentvolumeclaims")}
    assert len(claims) == 5
    environment.delete_application()
    assert environment.get("jobs,deployments") == []
    left = environment.get("persistentvolumeclaims")
    assert {c["metadata"]["name"]: c["metadata"]["uid"] for c in left} == claims
    assert all("deletionTimestamp" not in c["metadata"] for c in left)
