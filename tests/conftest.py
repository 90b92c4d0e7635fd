"""Keeps test modules from each other: a stage that runs in the test's process changes that process, for ever."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import huggingface_hub.constants  # noqa: F401 - reads HF_HUB_OFFLINE once, when it is imported: before a stage sets it
import hypothesis
import pytest

from tests.build_embedded import embedded_models as embedded_models
from tests.build_embedded import trained as trained
from tests.rendered_once import _rendered_once as _rendered_once

# The modules that take longest, the longest first: from minutes to half a minute on an idle machine. A module that
# needs what another makes (tests/build_embedded.py) does not start at the same time.
LONGEST = ("test_serving_vllm", "test_end_to_end", "training/test_distributed", "training/test_search",
           "kubeflow/test_run", "tools/test_kind", "test_aliases", "training/test_train", "tools/test_changes",
           "training/test_merge", "relocation/test_embedded", "test_benchmarks", "test_reruns",
           "relocation/test_relocate", "evaluation/test_privacy", "tools/test_check", "tools/test_local",
           "tools/test_kustomization", "data/test_encode", "test_merged", "test_scan")
MODULES = pytest.StashKey[int]()  # how many were imported when what is imported was last put aside

# kubectl lives for a third of a second; a third of that it collects garbage.
os.environ.setdefault("GOGC", "off")

# How long an example takes says nothing on a machine that runs other tests at the same time.
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Garbage is not collected meanwhile: there is little, and each collection would look through all tests that were
    found and all modules that were imported, in every worker for seconds."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest modules come first, so that no worker of several is left alone with one at the end."""
    folder = Path(__file__).parent
    places = {folder / f"{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))  # a stable sort: modules stay whole


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """After a test that imported large libraries: they are never garbage, and each of the collections that evaluation
    and training ask for would look through them for a quarter of a second."""
    modules = item.config.stash.get(MODULES, 0)
    if len(sys.modules) > modules + 200:
        item.config.stash[MODULES] = len(sys.modules)
        gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _vllm_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """vLLM looks at a model's class in a process of its own, for ten seconds, and keeps what it found: for all servers
    of a run. It is valid as long as vLLM's own file is the same."""
    root = tmp_path_factory.getbasetemp()
    os.environ["VLLM_CACHE_ROOT"] = str((root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "vllm-cache")


@pytest.fixture(autouse=True, scope="module")
def _own_process() -> Iterator[None]:
    before, on_sigterm = dict(os.environ), signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, on_sigterm)
    os.environ.clear()
    os.environ.update(before)
