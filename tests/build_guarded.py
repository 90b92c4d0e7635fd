"""Builds a guarded server for tests: the stand-in for vLLM, the mounted files, volumes, and what a client does."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from jobs.core.pipeline import Pipeline
from jobs.core.plan import Plan
from serving import aliases, candidates, merged
from serving.files import Files
from serving.served import Served
from tests import build_adapter
from tests.build_server import BASE, StandIn, running

NAME = "seville-hotels"


def until(condition: Callable[[], Any], seconds: float = 20) -> Any:
    """Wait for a condition and return its value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
    return value


def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The Unix time that the aliases see, for a test to set."""
    now = [time.time()]
    monkeypatch.setattr(aliases, "time", SimpleNamespace(**{**vars(time), "time": lambda: now[0]}))
    return now


def replace_file(file: Path, content: str | bytes) -> None:
    """Replace a file that a server watches in one step, as the kubelet does: the server never reads a part of it."""
    draft = file.with_name(f".{file.name}.draft")
    draft.write_bytes(content.encode() if isinstance(content, str) else content)
    draft.replace(file)


class World:
    """A guarded server over one folder of files and its volumes."""

    def __init__(self, folder: Path, vllm: StandIn) -> None:
        self.folder, self.volumes, self.vllm = folder, folder / "volumes", vllm
        self.url = ""
        self.app: Any = None
        self.defaults: dict[str, Any] = {}  # of the files

    def write(self, **changes: Any) -> tuple[Pipeline, Plan]:
        return build_adapter.declare(self.files, **{**self.defaults, **changes})

    @property
    def files(self) -> Path:
        return self.folder / "pipelines"

    def model(self, planned: Plan) -> str:
        return f"{NAME}@{planned.adapter.digest}"

    def ask(self, model: object = NAME, path: str = "/v1/completions", **body: Any) -> httpx.Response:
        return httpx.post(self.url + path, json={"model": model, "prompt": "Hello", **body}, timeout=20)

    def stream(self) -> contextlib.AbstractContextManager[httpx.Response]:
        body = {"model": NAME, "prompt": "Hello", "stream": True}
        return httpx.stream("POST", self.url + "/v1/completions", json=body, timeout=20)

    def metric(self, name: str, **labels: str) -> float:
        """The value of a metric, 0 if it was never set. Of the whole test process: compare it with what it was."""
        for family in text_string_to_metric_families(httpx.get(self.url + "/metrics").text):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    return float(sample.value)
        return 0.0

    def drain(self, linger: float) -> None:
        """What SIGTERM does (tests/test_serving_vllm.py sends a real one), on the server's own event loop."""
        guard = self.vllm.guards[-1]
        assert guard.aliases._task
        guard.aliases._task.get_loop().call_soon_threadsafe(guard.drain.begin, "stopped by a test", linger)

    def looked(self) -> bool:
        """Whether every alias was looked for once."""
        return bool(self.vllm.guards[-1].aliases.first_look_done.is_set())

    def ended(self) -> bool:
        """Whether the server has ended by itself."""
        return not self.app.state.server.thread.is_alive()

    def served(self) -> str | None:
        """The version that answers under the alias."""
        if self.ask().status_code != 200:
            return None
        return str(self.vllm.asked[-1]["model"])


def start(folder: Path, monkeypatch: pytest.MonkeyPatch, key: str | None = None,
          prepare: Callable[[World], object] = lambda _: None, **settings: Any) -> Iterator[World]:
    """Serve a `World`, after `prepare` had its way with it; `settings` are fields of `Served`."""
    monkeypatch.setattr(aliases, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(aliases, "BACKOFF_SECONDS", 0.05)
    monkeypatch.setattr(aliases, "SETTLE_SECONDS", 0.05)
    if key:
        monkeypatch.setenv("VLLM_API_KEY", key)
    else:
        monkeypatch.delenv("VLLM_API_KEY", raising=False)
    world = World(folder, StandIn(key))
    (folder / "private").mkdir()
    served = publish_base(world, **settings)
    prepare(world)
    if served.mode == "merged":
        world.write()
        served = merged.choose(Files(Path(served.pipelines)).read(), served)
        world.vllm.runs = served.merged or BASE
        if served.merged:
            world.vllm.merged = candidates.adapter_folder(served.merged.partition("@")[2], world.volumes)
    for name, value in served.to_environment().items():
        monkeypatch.setenv(name, value)
    app = world.vllm.app()
    with running(app) as world.url:
        world.app = app
        yield world


def publish_base(world: World, **settings: Any) -> Served:
    """Publish the base model of the world's environment file; returns what a server of it serves."""
    if "mode" in settings:
        world.defaults["serving"] = {"mode": settings["mode"]}
    _, planned = world.write()
    build_adapter.base(world.volumes, planned)
    folder = world.folder
    return Served(
        pipelines=str(folder / "pipelines"), volumes=str(world.volumes), base_name=BASE,
        base_model=planned.base_model.digest, tokenizer=planned.tokenizer.digest,
        base_folder=str(planned.base_model.path(world.volumes)), max_lora_rank=64,
        private_folder=str(folder / "private"), **settings)
