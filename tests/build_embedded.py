"""The embedded models of overlays/kind, made once for all tests of a run: they take minutes of a processor."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from jobs.tools.pods import CHECKOUT

ENVIRONMENT = CHECKOUT / "overlays" / "kind" / "environment.yaml"
LOG = "log"  # what the commands wrote


def make(folder: Path) -> None:
    """Relocate base model, tokenizer and reference model into `folder`, side by side as the Jobs of the environment."""
    with (folder / LOG).open("w") as log:
        jobs = [subprocess.Popen([sys.executable, "-m", "jobs", "--environment", str(ENVIRONMENT), "--volumes",
                                  str(folder), "relocate", what], cwd=CHECKOUT, stdout=log, stderr=log,
                                 env=os.environ | {"OMP_NUM_THREADS": "1"})
                for what in ("base-model", "tokenizer", "reference-model")]
        codes = [job.wait() for job in jobs]
    assert codes == [0, 0, 0], (folder / LOG).read_text()


@pytest.fixture(scope="session")
def embedded_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The volumes with the embedded models, and a log of how they were made. All workers of a run share one."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder = root / "embedded-models"
    with FileLock(root / "embedded-models.lock"):
        if not folder.exists():
            draft = folder.with_name("embedded-models-draft")
            draft.mkdir()
            make(draft)
            draft.rename(folder)
    return folder
