"""Fixtures that tests of the evaluation share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def folder(evaluated: Path, tmp_path: Path) -> Path:
    """A copy of the evaluated pipeline of the module's fixture `evaluated`."""
    return Path(shutil.copytree(evaluated, tmp_path / "pipeline"))
