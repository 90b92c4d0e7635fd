"""Promises of the packages: who may import whom, as pyproject.toml says, and what a wrong import looks like."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.tools.pods import CHECKOUT


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(Path(sys.executable).with_name("lint-imports")), "--no-cache"], cwd=folder, check=False,
                          capture_output=True, text=True, env={"COLUMNS": "200"})


def test_every_package_imports_only_what_it_may() -> None:
    done = lint_imports(CHECKOUT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("module", "imports", "message"), [
    ("jobs/core/errors.py", "jobs.data.encoding", "jobs.core is not allowed to import jobs.data"),
    ("jobs/data/encoding.py", "jobs.training.merge", "jobs.data is not allowed to import jobs.training"),
    ("jobs/training/merge.py", "jobs.evaluation.gate", "jobs.training is not allowed to import jobs.evaluation"),
    ("jobs/evaluation/gate.py", "jobs.relocation.download", "jobs.evaluation is not allowed to import jobs.relocation"),
    ("jobs/relocation/download.py", "jobs.tools.check", "jobs.relocation is not allowed to import jobs.tools"),
    ("serving/events.py", "jobs.training.train", "serving is not allowed to import jobs.training"),
    ("jobs/tools/check.py", "serving.events", "jobs is not allowed to import serving"),
    ("jobs/tools/check.py", "kubeflow.fields", "jobs is not allowed to import kubeflow"),
    ("jobs/core/errors.py", "jobs.core.files", "No cycles are allowed in jobs.core"),
    ("jobs/another/__init__.py", "jobs.core", "jobs.another"),
])
def test_a_wrong_import_is_found(tmp_path: Path, module: str, imports: str, message: str) -> None:
    shutil.copy(CHECKOUT / "pyproject.toml", tmp_path)
    for package in ("jobs", "serving", "benchmarks", "kubeflow"):
        shutil.copytree(CHECKOUT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / module).parent.mkdir(exist_ok=True)
    with (tmp_path / module).open("a") as stream:
        stream.write(f"\nimport {imports}\n")
    done = lint_imports(tmp_path)
    assert done.returncode == 1
    assert message in done.stdout
