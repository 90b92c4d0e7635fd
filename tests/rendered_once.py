"""Has kubectl render the same files once in a run: the tests render the same overlays hundreds of times.

`kubectl kustomize` takes a third of a second of a processor. What it writes follows from the files that it can read:
those below the folder, and below the folders that a kustomization names.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from jobs.core.files import write_atomically
from jobs.tools import pods

KUBECTL = shutil.which("kubectl")
RENDERS = {KUBECTL}  # the programs that render as it does: it, and fakes in tests that call it for that
MOST_FILES = 1000  # more are not looked at, and rendered anew


class Unknown(Exception):
    """What the folder is made of cannot be told: it has links or pipes, or it is not readable."""


@pytest.fixture(autouse=True, scope="session")
def _rendered_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder = root / "rendered"
    folder.mkdir(exist_ok=True)

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        try:
            known = folder / key(Path(command[-1]))
        except (Unknown, OSError, yaml.YAMLError):
            known = None
        if known is None or command[:-1] != ["kubectl", "kustomize"] or shutil.which("kubectl") not in RENDERS:
            return subprocess.run(command, **options)
        if known.exists():
            return subprocess.CompletedProcess(command, 0, known.read_text(encoding="utf-8"), "")
        done = subprocess.run(command, **options)
        if not done.returncode:
            write_atomically(known, done.stdout)
        return done

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(pods, "subprocess", SimpleNamespace(**{**vars(subprocess), "run": run}))
        yield


def key(folder: Path) -> str:
    """The digest of all that kustomize can read for a folder: the files' content, and where they are from there."""
    top, files = folder.resolve(strict=True), set[Path]()
    _collect(top, files, set())
    digest = hashlib.sha256()
    for file in sorted(files):
        content = file.read_bytes()
        digest.update(f"{os.path.relpath(file, top)}\0{len(content)}\0".encode("utf-8", "surrogateescape") + content)
    return digest.hexdigest()


def _collect(folder: Path, files: set[Path], seen: set[Path]) -> None:
    if folder in seen:
        return
    seen.add(folder)
    for path in folder.rglob("*"):
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            continue
        if not stat.S_ISREG(mode) or len(files) > MOST_FILES:
            raise Unknown
        files.add(path)
        if path.name in pods.KUSTOMIZATIONS:
            for text in _texts(path.read_bytes()):
                other = path.parent / text
                if other.is_dir():
                    _collect(other.resolve(), files, seen)


@functools.lru_cache(maxsize=1000)
def _texts(content: bytes) -> frozenset[str]:
    """The texts in a kustomization that can be the path of a folder outside of its own."""
    def walk(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            for each in value.values():
                yield from walk(each)
        elif isinstance(value, list):
            for each in value:
                yield from walk(each)
        elif (isinstance(value, str) and "/" in value) or value == "..":
            yield value

    return frozenset(walk(yaml.load(content, pods.KubernetesYaml)))
