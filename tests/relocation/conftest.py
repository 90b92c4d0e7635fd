"""What the tests of relocation share: a hub, a pipeline file beside which files are looked for, a draft."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.core import retries
from jobs.core.declarations import Loaded
from jobs.core.pipeline import load
from jobs.relocation.sources.interface import Item
from tests import build_pipeline
from tests.hub_server import Hub, serve

CONTENT = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
PARTIAL = "data.bin.partial"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The local hub, named by HF_ENDPOINT, and a retry schedule for the impatient."""
    monkeypatch.setattr(retries, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(retries, "ATTEMPTS", 4)
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    with serve() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        server.files["data.bin"] = CONTENT
        yield server


@pytest.fixture
def here(tmp_path: Path) -> Loaded:
    """A pipeline file, beside which `file:` sources are looked for."""
    return load(build_pipeline.write(tmp_path))


@pytest.fixture
def draft(tmp_path: Path) -> Path:
    folder = tmp_path / "draft"
    folder.mkdir()
    return folder


def url_item(hub: Hub, sha256: str | None = SHA256) -> Item:
    return Item("data.bin", f"{hub.url}/files/data.bin", sha256=sha256)


def names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def ranges(hub: Hub, part: str = "data.bin") -> list[str | None]:
    return [seen.range for seen in hub.gets(part)]
