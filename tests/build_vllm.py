"""Builds servers for slow tests: `python -m serving` as a process of its own, with real vLLM over a tiny base model."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil

from jobs.core.files import write_atomically
from jobs.core.pipeline import Pipeline
from tests import build_adapter, forked_serving

BASE, NAME, OTHER = "builtin:tiny", "seville-hotels", "granada-hotels"
# Routes for developers too: they must be closed even where somebody switched them on.
OPENED = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
FLAGS = ["--max-model-len", "256", "--enforce-eager", "--kv-cache-memory-bytes", str(128 * 1024**2),
         "--dtype", "float32"]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class Server:
    """One serving process after another over the same volumes, and what a client does with it."""

    def __init__(self, folder: Path, key: str | None = None, *, forked: bool = True, **variables: str) -> None:
        """`forked`: from a process that has imported vLLM, in a tenth of the time (tests/forked_serving.py)."""
        self.folder, self.volumes, self.key, self.forked = folder, folder / "volumes", key, forked
        self.variables = variables  # of the server's environment
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = openai.OpenAI(base_url=self.url + "/v1", api_key=key or "none", max_retries=0)
        self.log = folder / "log"
        self.process: subprocess.Popen[bytes] | forked_serving.Process | None = None
        (folder / "bin").mkdir()  # a PATH without a C++ compiler, as in a small image; vLLM on a CPU does need lscpu
        (folder / "bin" / "lscpu").symlink_to(str(shutil.which("lscpu")))
        # The path of a Unix socket has at most 107 characters, and a test's folder can take most of them. Removed with
        # this object: a server that was killed is started again.
        self._sockets = tempfile.TemporaryDirectory(prefix="vllm-")

    def start(self) -> None:
        """Start it and wait until it is healthy."""
        values = {**os.environ, **OPENED, "OMP_NUM_THREADS": "1", "PATH": f"{self.folder}/bin", "HANG_SECONDS": "8",
                  "TMPDIR": str(self.folder), "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "inductor"),
                  "VLLM_CACHE_ROOT": os.environ.get("VLLM_CACHE_ROOT", str(self.folder / "cache")),
                  "VLLM_RPC_BASE_PATH": self._sockets.name,
                  "KEYS_FILE": str(self.folder / "keys.yaml"),
                  # Left alone, every server on a machine of two cores computes on the first one.
                  "VLLM_CPU_OMP_THREADS_BIND": "nobind", **self.variables}
        values.pop("VLLM_API_KEY", None)
        if self.key:
            values["VLLM_API_KEY"] = self.key
        arguments = ["--pipelines", str(self.folder / "pipelines"), "--volumes", str(self.volumes),
                     "--host", "127.0.0.1", "--port", str(self.port), *FLAGS]
        with self.log.open("w") as log:
            self.process = forked_serving.Process(arguments, values, self.log) if self.forked else subprocess.Popen(
                [sys.executable, "-m", "serving", *arguments], env=values, stdout=log, stderr=log)
        self.until(lambda: self.health() == 200, 600)

    def stop(self) -> int:
        """Tell it to stop and return its exit code."""
        assert self.process
        self.process.send_signal(signal.SIGTERM)
        return self.exit_code()

    def exit_code(self) -> int:
        """Wait until it ended."""
        assert self.process
        return self.process.wait(90)

    def kill(self) -> None:
        """Leave nothing of it, whatever the test did."""
        if self.process and self.process.poll() is None:
            for process in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
                process.kill()
            self.process.wait()

    def health(self, path: str = "/health") -> int:
        """The status of /health, or of /ready; 0 while nothing listens."""
        assert self.process
        assert self.process.poll() is None, self.log.read_text()[-3000:]
        try:
            return httpx.get(self.url + path).status_code
        except httpx.TransportError:
            return 0

    def engine(self) -> psutil.Process:
        """vLLM's engine process: of the server's processes, the one with the most memory beside the first."""
        assert self.process
        return max(psutil.Process(self.process.pid).children(recursive=True), key=lambda p: p.memory_info().rss)

    def write(self, seed: int = 0, **changes: Any) -> Pipeline:
        """Write the environment file and an adapter's; adapters differ by `seed`."""
        return build_adapter.declare(self.folder / "pipelines", training__seed=seed, **changes)[0]

    def write_keys(self, models: dict[str, list[str] | str]) -> None:
        """Write the file of keys: a key is `team-KEY`'s."""
        keys = [{"name": f"team-{key}", "sha256": hashlib.sha256(key.encode()).hexdigest(), "models": each}
                for key, each in models.items()]
        write_atomically(self.folder / "keys.yaml", json.dumps({"keys": keys}))

    def promote(self, seed: int) -> Path:
        """Promote an adapter and wait until it is served; returns its folder."""
        path = build_adapter.promote(self.volumes, self.write(seed))
        self.until(lambda: self.serves(path), 60)
        return path

    def serves(self, path: Path, alias: str = NAME) -> bool:
        headers = {"Authorization": f"Bearer {self.key}"}
        listed = httpx.get(self.url + "/v1/models", headers=headers).json()["data"]
        return any(model["root"] == f"{alias}@{path.name}" for model in listed)

    def until(self, condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not in {seconds} s\n{self.log.read_text()[-3000:]}"
            time.sleep(0.1)

    def greedy(self, model: str, prompt: str = "What is the best hotel?", tokens: int = 12) -> list[int]:
        """The ids of the reply's tokens."""
        reply = self.client.completions.create(
            model=model, prompt=prompt, max_tokens=tokens, temperature=0,
            extra_body={"ignore_eos": True, "return_token_ids": True})
        assert reply.model == model
        return list(reply.choices[0].token_ids)  # type: ignore[attr-defined]

    def metrics(self, name: str) -> dict[str, float]:
        """The samples of a metric by their labels, as they are written."""
        lines = httpx.get(self.url + "/metrics").text.splitlines()
        return {line[len(name):].rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines
                if line.startswith((name + "{", name + " "))}

    def memory(self) -> int:
        """Bytes of memory that the server's processes hold together."""
        assert self.process
        process = psutil.Process(self.process.pid)
        return sum(each.memory_info().rss for each in [process, *process.children(recursive=True)])
