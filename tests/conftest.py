"""Keeps test modules from each other: a stage that runs in the test's process sets variables for it, for ever."""

from __future__ import annotations

import os
from collections.abc import Iterator

import huggingface_hub.constants  # noqa: F401 - reads HF_HUB_OFFLINE once, when it is imported: before a stage sets it
import pytest


@pytest.fixture(autouse=True, scope="module")
def _own_environment() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
