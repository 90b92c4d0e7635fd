"""Runs kubeflow/ in its own environment."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from tests.manifests import CHECKOUT, Manifest

PYTHON = CHECKOUT / ".venv-kubeflow" / "bin" / "python"


def python(*arguments: object, stdin: str | None = None, cwd: Path = CHECKOUT) -> subprocess.CompletedProcess[str]:
    """Run Python with kfp."""
    assert PYTHON.exists(), "make test installs .venv-kubeflow; by hand: make .venv-kubeflow/installed"
    return subprocess.run([str(PYTHON), *map(str, arguments)], input=stdin, cwd=cwd, capture_output=True, text=True,
                          timeout=300, check=False)


def compile_all(manifests: list[list[Manifest]]) -> list[dict[str, Any]]:
    """What becomes of each list of manifests: `text` (IR YAML) and `unsupported`, or `error`."""
    done = python(Path("tests", "kubeflow", "compile_jobs.py"), stdin=json.dumps(manifests))
    assert done.returncode == 0, done.stderr
    results: list[dict[str, Any]] = json.loads(done.stdout)
    return results
