"""The cluster that KUBECONFIG names, one environment in it for each module, and what was there when a test failed."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Generator, Iterator

import pytest

from tests.e2e import cluster
from tests.e2e.cluster import Environment

Report = pytest.TestReport

for client in ("httpx", "httpx2"):  # openai's; a line for each of thousands of requests would hide what is waited for
    logging.getLogger(client).setLevel(logging.WARNING)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark every test here; without a cluster they are skipped, for one reason on one line."""
    item.add_marker(pytest.mark.e2e)
    item.add_marker(pytest.mark.timeout(2 * 3600))  # every wait has a deadline of its own; this is for what hangs
    if reason := cluster.unreachable():
        item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def run() -> str:
    """The name of this run, in a label on all that it makes."""
    return f"run-{secrets.token_hex(4)}"  # never a number to YAML, as 12345678 or 1234e567 would be


@pytest.fixture(scope="module")
def environment(run: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    """An environment of its own, not applied yet; removed at the end unless E2E_KEEP is set."""
    made = Environment(tmp_path_factory.mktemp("e2e"), os.environ.get("E2E_NAMESPACE", "lora-gitops-e2e"), run)
    made.make_room()
    yield made
    if not os.environ.get("E2E_KEEP"):
        made.remove()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Function) -> Generator[None, Report, Report]:
    report = yield
    environment = item.funcargs.get("environment")
    if report.failed and report.when != "teardown" and isinstance(environment, Environment):
        report.sections.append(("the namespace when it failed", environment.dump()))
    return report
