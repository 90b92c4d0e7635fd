"""Keeps test modules from each other: a stage that runs in the test's process changes that process, for ever."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import huggingface_hub.constants  # noqa: F401 - reads HF_HUB_OFFLINE once, when it is imported: before a stage sets it
import pytest


@pytest.fixture(autouse=True, scope="module")
def _own_process() -> Iterator[None]:
    before, on_sigterm = dict(os.environ), signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, on_sigterm)
    os.environ.clear()
    os.environ.update(before)
