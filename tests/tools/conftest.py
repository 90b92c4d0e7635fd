"""What the tests of the tools share."""

from __future__ import annotations

import shutil

import pytest


@pytest.fixture
def unrendered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without kubectl: for the tests in which rendering is not the point."""
    monkeypatch.setattr(shutil, "which", lambda _: None)
