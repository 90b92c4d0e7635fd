"""What an environment of several adapters promises in a real cluster, applied by kubectl or by Argo CD."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest

from tests.e2e.cluster import (
    ADAPTER,
    DONE,
    FACTS,
    FIRST,
    NEIGHBOUR,
    TRAINS,
    Endpoint,
    Environment,
    identity,
    requests_to,
    wait_until,
)
from tests.manifests import jobs_of

THIRD = "third"
REQUESTS = 20  # to each of the others: fewer prove nothing
AFTERWARDS_SECONDS = 10.0  # a version that is not used any more is unloaded meanwhile


def joins(environment: Environment) -> None:
    """A third adapter joins: it is trained and served, and touches nothing of the others."""
    if THIRD in environment.adapters:
        environment.drop(THIRD)
    environment.settle(FIRST)
    with others_unharmed(environment) as endpoint:
        environment.add(THIRD)
        environment.settle(FIRST)  # all three are served
        assert FACTS[NEIGHBOUR] in endpoint.ask(THIRD)  # it has learned the same data
        assert {ADAPTER, NEIGHBOUR, THIRD} <= (endpoint.models() or set())
    assert {title for title in environment.jobs() if title.endswith(f"-{THIRD}")} == jobs_of(THIRD)


def leaves_and_returns(environment: Environment) -> None:
    """The third adapter's folder is removed: it is not served any more, and touches nothing of the others. When the
    folder is there again, its artifacts are too: it is served without a training."""
    if THIRD not in environment.adapters:
        environment.add(THIRD)
    environment.settle(FIRST)
    digest = environment.served(THIRD)
    assert digest
    with others_unharmed(environment) as endpoint:
        environment.drop(THIRD)
        environment.push(FIRST)
        wait_until("the adapter that was removed not to be served", lambda: THIRD not in (endpoint.models() or ()), 300)
        with pytest.raises(openai.NotFoundError):
            endpoint.ask(THIRD)
        wait_until("its Jobs to be removed",
                   lambda: not environment.get("jobs", f"--selector=app.kubernetes.io/instance={THIRD}"), 300)
        environment.add(THIRD)
        environment.settle(FIRST)
        assert endpoint.served(THIRD) == digest
    logs = environment.logs_of(f"model-training-{THIRD}")
    assert DONE in logs
    assert TRAINS not in logs


@contextmanager
def others_unharmed(environment: Environment) -> Iterator[Endpoint]:
    """Both other adapters are under load until the block ends. No request to them fails or gets another adapter's
    answer, no Job of theirs, or of the environment, gets another name or runs again, and the server does not
    restart."""
    pod, before = identity(environment.wait_until_ready()), outcomes_of_others(environment)
    with environment.endpoint() as endpoint, requests_to(endpoint, ADAPTER) as first, \
            requests_to(endpoint, NEIGHBOUR) as second:
        yield endpoint
        time.sleep(AFTERWARDS_SECONDS)
    for name, replies in ((ADAPTER, first), (NEIGHBOUR, second)):
        assert not replies.failures, f"{name}: requests failed: {replies.failures}"
        assert len(replies.answers) > REQUESTS, f"{name}: only {len(replies.answers)} answers"
        wrong = [answer for answer in replies.answers if FACTS[name] not in answer]
        assert not wrong, f"{name}: answers of others: {wrong}"
    after = identity(environment.wait_until_ready())
    assert after == pod, f"the server restarted: it was {pod}, and is {after}"
    jobs = outcomes_of_others(environment)
    assert jobs == before, f"Jobs of others changed: {[title for title in before if jobs.get(title) != before[title]]}"


def outcomes_of_others(environment: Environment) -> dict[str, Any]:
    """Name, uid and status of each Job that is not the third adapter's."""
    names = {title: job["metadata"]["name"] for title, job in environment.jobs().items()}
    return {title: (names[title], *outcome) for title, outcome in environment.outcomes().items()
            if not title.endswith(f"-{THIRD}")}
