"""The embedded models of overlays/kind, and an adapter of it, made once for all tests of a run: they take minutes of a
processor."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from jobs.tools.pods import CHECKOUT
from tests import forked

OVERLAY = CHECKOUT / "overlays" / "kind"
ENVIRONMENT = OVERLAY / "environment.yaml"
ADAPTER = "seville-hotels"  # the one that is trained
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


def train(folder: Path) -> None:
    """Relocate and encode the data of ADAPTER, and train it, as its Jobs do, on the models in `folder`."""
    file = OVERLAY / "adapters" / ADAPTER / "pipeline.yaml"
    for stage in (["relocate", "dataset"], ["encode"], ["train"]):
        done = forked.run(["--pipeline", str(file), "--volumes", str(folder), "--wait-seconds", "0", *stage])
        assert done.returncode == 0, done.stderr


def as_claims(volumes: Path, state: Path) -> None:
    """Copy volumes into the state of a local run, where they have the names of their claims."""
    for volume in volumes.iterdir():
        if volume.is_dir():
            shutil.copytree(volume, state / "volumes" / f"{volume.name}-pvc")


@pytest.fixture(scope="session")
def embedded_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The volumes with the embedded models, and a log of how they were made. All workers of a run share one."""
    return _once(tmp_path_factory, "embedded-models", make)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, embedded_models: Path) -> Path:
    """These volumes with ADAPTER, which is not evaluated. Two ways to run the overlay start from it: each evaluates
    it, and each trains another adapter itself."""
    def copy_and_train(folder: Path) -> None:
        shutil.copytree(embedded_models, folder, dirs_exist_ok=True)
        train(folder)

    return _once(tmp_path_factory, "trained", copy_and_train)


def _once(tmp_path_factory: pytest.TempPathFactory, name: str, write: Callable[[Path], None]) -> Path:
    """A folder that the first of the run's workers writes that needs it."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder = root / name
    with FileLock(root / f"{name}.lock"):
        if not folder.exists():
            draft = folder.with_name(f"{name}-draft")
            shutil.rmtree(draft, ignore_errors=True)  # of a worker whose attempt failed
            draft.mkdir()
            write(draft)
            draft.rename(folder)
    return folder
