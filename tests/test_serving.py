"""Promises of `python -m serving`: what stops it before vLLM starts, and the whole of serving with real vLLM."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from jobs.errors import UserError
from jobs.pipeline import Pipeline
from serving import __main__ as serving
from serving.guard import ALLOWED
from tests import build_adapter
from tests.build_server import raw_request

BASE, NAME = "builtin:tiny", "seville-hotels"


def start(folder: Path, *flags: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "serving", "--pipelines", str(folder / "pipelines"), "--volumes",
               str(folder / "volumes"), "--host", "127.0.0.1", *flags]
    return subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True)


def outcome(process: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit code and what was said, without the log's lines."""
    _, said = process.communicate(timeout=30)
    return process.returncode, said


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_help_answers_without_loading_vllm_and_explains_the_key_and_vllms_flags() -> None:
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "serving", "--help"], capture_output=True,
                          text=True, check=True)
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "serving.adapters" in modules and not modules & {"torch", "transformers", "vllm"}
    for word in ("VLLM_API_KEY", "--pipelines", "--max-model-len", "promoted"):
        assert word in done.stdout


@pytest.mark.parametrize("flag", [
    ["--model", "x"], ["--model=x"], ["--tokenizer", "x"], ["--served-model-name", "x"], ["--served_model_name=x"],
    ["--enable-lora"], ["--no-enable-lora"], ["--enable_lora"], ["--max-lora-rank", "8"], ["--middleware", "x.Y"],
    ["--api-key", "secret"], ["--api-k", "secret"], ["--api_key=secret"], ["--lora-modules", "a=b"],
    ["--root-path", "/x"], ["--api-server-count", "2"], ["--config", "x.yaml"], ["--enforce-eager", "--middlew=x.Y"]])
def test_a_flag_that_contradicts_what_is_served_or_guarded_is_refused_by_name_however_spelt(flag: list[str]) -> None:
    with pytest.raises(UserError, match=r"vLLM's flag --[a-z-]+ cannot be given: "):
        serving.check_flags(flag)


def test_other_flags_of_vllm_pass() -> None:
    serving.check_flags(["--max-model-len", "256", "--enforce-eager", "--max-loras=4", "--tokenizer-mode", "auto"])
    serving.check_flags(["-tp", "2"])


def test_a_first_argument_that_is_no_flag_is_refused() -> None:
    with pytest.raises(UserError, match="'gpt2' is not a flag"):
        serving.check_flags(["gpt2"])


def test_no_pipeline_file_is_a_clear_error(tmp_path: Path) -> None:
    code, said = outcome(start(tmp_path))
    assert code == 2
    assert said.startswith("error: ")
    assert f"{tmp_path}/pipelines/NAME/pipeline.yaml" in said
    assert "Traceback" not in said


def test_a_port_that_is_taken_is_a_clear_error_before_vllm_is_loaded(tmp_path: Path) -> None:
    build_adapter.load(tmp_path / "pipelines" / "one")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, said = outcome(start(tmp_path, "--port", str(port)))
    assert code == 2
    assert said.startswith(f"error: cannot listen on 127.0.0.1:{port}"), "the first line: nothing was loaded before"
    assert "Traceback" not in said


@pytest.mark.parametrize(("key", "changes"), [
    ("base_model", {"base_model": {"source": "builtin:tiny-reference"}}),
    ("tokenizer", {"tokenizer": {"source": "builtin:tiny-reference"}}),
    ("serving.max_lora_rank", {"serving__max_lora_rank": 128})])
def test_pipelines_that_one_server_cannot_serve_together_are_refused_by_file_and_key(
        tmp_path: Path, key: str, changes: dict[str, Any]) -> None:
    build_adapter.load(tmp_path / "one")
    build_adapter.load(tmp_path / "two", **{"adapter": "granada-hotels", **changes})
    with pytest.raises(UserError, match=rf"two/pipeline\.yaml: {key} is not the same as in .*one/pipeline\.yaml"):
        serving.load(tmp_path)


def test_two_pipelines_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        build_adapter.load(tmp_path / folder)
    with pytest.raises(UserError, match=f"the adapter name {NAME} is taken"):
        serving.load(tmp_path)


def test_a_base_model_that_never_comes_is_worth_a_retry_and_named(tmp_path: Path) -> None:
    _, planned = build_adapter.load(tmp_path / "pipelines" / "one")
    code, said = outcome(start(tmp_path, "--port", str(free_port()), "--wait-seconds", "0.1"))
    assert code == 1
    assert f"base-model/{planned.base_model.digest}" in said


def test_a_tampered_base_model_is_not_served(tmp_path: Path) -> None:
    _, planned = build_adapter.load(tmp_path / "pipelines" / "one")
    build_adapter.base(tmp_path / "volumes", planned)
    (planned.base_model.path(tmp_path / "volumes") / "generation_config.json").write_text("{}")
    code, said = outcome(start(tmp_path, "--port", str(free_port())))
    assert code == 2
    assert "generation_config.json was changed" in said


def test_sigterm_ends_the_wait_for_the_base_model_at_once(tmp_path: Path) -> None:
    build_adapter.load(tmp_path / "pipelines" / "one")
    process = start(tmp_path, "--port", str(free_port()))
    assert process.stderr
    assert "waiting for" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    code, said = outcome(process)
    assert code == 143
    assert "Traceback" not in said


# With real vLLM

ENUMERATE = """
import json
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

def walk(routes, before=""):
    for route in routes:
        path = before + getattr(route, "path", "")
        if getattr(route, "routes", None):
            yield from walk(route.routes, path)
        else:
            yield path, sorted(getattr(route, "methods", None) or [])

app = build_app(make_arg_parser(FlexibleArgumentParser()).parse_args([]), ("generate", "render"))
print("ROUTES", json.dumps(list(walk(app.routes))))
"""
# Routes for developers too: they must be closed even where somebody switched them on.
OPENED = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}


class Server:
    """`python -m serving` with real vLLM over a tiny base model, and its volumes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.volumes = folder, folder / "volumes"
        self.url = f"http://127.0.0.1:{free_port()}"
        self.client = openai.OpenAI(base_url=self.url + "/v1", api_key="none", max_retries=0)
        self.log = folder / "log"

    def write(self, seed: int = 0) -> Pipeline:
        return build_adapter.load(self.folder / "pipelines" / "one", training__seed=seed)[0]

    def promote(self, seed: int) -> Path:
        """Promote an adapter and wait until it is served; returns its folder."""
        path = build_adapter.promote(self.volumes, self.write(seed))
        self.until(lambda: self.serves(path), 60)
        return path

    def serves(self, path: Path) -> bool:
        return any(m["root"] == f"{NAME}@{path.name}" for m in httpx.get(self.url + "/v1/models").json()["data"])

    def until(self, condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not in {seconds} s\n{self.log.read_text()[-3000:]}"
            time.sleep(0.1)

    def greedy(self, model: str, prompt: str = "What is the best hotel?", tokens: int = 12) -> list[int]:
        reply = self.client.completions.create(
            model=model, prompt=prompt, max_tokens=tokens, temperature=0,
            extra_body={"ignore_eos": True, "return_token_ids": True})
        assert reply.model == model
        return list(reply.choices[0].token_ids)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serving")
    _, planned = build_adapter.load(folder / "pipelines" / "one")
    build_adapter.base(folder / "volumes", planned)
    server = Server(folder)
    (folder / "bin").mkdir()  # a PATH without a C++ compiler, as in a small image; vLLM on a CPU does need lscpu
    (folder / "bin" / "lscpu").symlink_to(str(shutil.which("lscpu")))
    environment = {
        **os.environ, **OPENED, "OMP_NUM_THREADS": "1", "PATH": f"{folder}/bin", "TMPDIR": str(folder),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "VLLM_CACHE_ROOT": str(folder / "cache")}
    environment.pop("VLLM_API_KEY", None)
    flags = ["--max-model-len", "256", "--enforce-eager", "--kv-cache-memory-bytes", str(128 * 1024**2),
             "--dtype", "float32"]
    command = [sys.executable, "-m", "serving", "--pipelines", str(folder / "pipelines"), "--volumes",
               str(folder / "volumes"), "--host", "127.0.0.1", "--port", server.url.rpartition(":")[2], *flags]
    with server.log.open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def healthy() -> bool:
        assert process.poll() is None, server.log.read_text()[-3000:]
        try:
            return httpx.get(server.url + "/health").status_code == 200
        except httpx.TransportError:
            return False

    try:
        server.until(healthy, 300)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def reference(server: Server, adapter: Path | None, prompt: str, tokens: int) -> list[int]:
    """What transformers and PEFT say, token by token."""
    import torch
    from peft import PeftModel

    from jobs import models

    planned = build_adapter.load(server.folder / "elsewhere")[1]
    model: Any = models.load_model(planned.base_model.path(server.volumes)).to("cpu", torch.float32)  # type: ignore[arg-type]
    if adapter:
        model = PeftModel.from_pretrained(model, adapter).eval()
    ids = models.load_tokenizer(planned.tokenizer.path(server.volumes))(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        for _ in range(tokens):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    return [int(i) for i in ids[0, -tokens:]]


@pytest.mark.slow
def test_from_base_only_to_first_adapter_to_swap_to_refusal_without_a_restart(server: Server) -> None:
    prompt, tokens = "What is the best hotel?", 12
    base = server.greedy(BASE)
    assert base == reference(server, None, prompt, tokens)

    refused = httpx.post(server.url + "/v1/completions", json={"model": NAME, "prompt": prompt})
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) > 0
    assert "no adapter was promoted" in refused.json()["error"]["message"]

    first = server.promote(seed=1)
    said_by_first = server.greedy(NAME)
    assert said_by_first == reference(server, first, prompt, tokens) != base
    assert server.greedy(BASE) == base

    second = server.promote(seed=2)
    said_by_second = server.greedy(NAME)
    assert said_by_second == reference(server, second, prompt, tokens)
    assert said_by_second != said_by_first
    assert server.greedy(BASE) == base

    asked = server.write(seed=3)
    weights = build_adapter.adapter(server.volumes, asked) / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    build_adapter.evaluation(server.volumes, asked)
    server.until(lambda: "refused (damaged)" in server.log.read_text(), 20)
    assert server.greedy(NAME) == said_by_second

    server.write(seed=1)  # git revert: the old adapter is still on the volume
    server.until(lambda: server.serves(first), 20)
    assert server.greedy(NAME) == said_by_first


@pytest.mark.slow
def test_the_openai_client_chats_streams_and_lists_models_under_the_alias(server: Server) -> None:
    server.promote(seed=1)
    messages: Any = [{"role": "user", "content": "What is the best hotel?"}]
    options: Any = {"model": NAME, "messages": messages, "max_tokens": 8, "temperature": 0}
    reply = server.client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    assert reply.model == NAME
    assert len(reply.choices[0].logprobs.content) == reply.usage.completion_tokens
    chunks = list(server.client.chat.completions.create(**options, stream=True))
    assert {chunk.model for chunk in chunks} == {NAME}
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == reply.choices[0].message.content
    listed = {model.id: model for model in server.client.models.list()}
    assert {BASE, NAME} <= set(listed)
    assert listed[NAME].parent == BASE  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        server.client.chat.completions.create(**{**options, "model": listed[NAME].root})  # type: ignore[attr-defined]
    with pytest.raises(openai.BadRequestError):
        server.client.chat.completions.create(**{**options, "max_tokens": 100_000})


@pytest.mark.slow
def test_the_openai_client_waits_by_itself_for_an_adapter_that_is_not_ready(server: Server) -> None:
    asked, _ = build_adapter.load(server.folder / "pipelines" / "two", adapter="granada-hotels", training__seed=4)
    server.until(lambda: "granada-hotels: not served" in server.log.read_text(), 10)
    threading.Timer(1, build_adapter.promote, (server.volumes, asked)).start()
    client = server.client.with_options(max_retries=2)
    started = time.monotonic()
    assert client.completions.create(model="granada-hotels", prompt="Hello", max_tokens=2).model == "granada-hotels"
    assert time.monotonic() - started > 1  # it was not ready when it was first asked for


@pytest.mark.slow
def test_every_route_that_vllm_registers_is_allowed_or_404(server: Server) -> None:
    found = subprocess.run([sys.executable, "-c", ENUMERATE], capture_output=True, text=True, check=True,
                           env={**os.environ, **OPENED}).stdout
    routes = json.loads(next(line for line in found.splitlines() if line.startswith("ROUTES")).removeprefix("ROUTES"))
    assert len(routes) > 50
    assert {path for path, _ in routes} >= set(ALLOWED)  # the enumeration sees what there is
    for path, methods in routes:
        target = path.replace("{", "").replace("}", "")
        for method in {*methods, "GET", "POST"} - {ALLOWED.get(path)}:
            reply = raw_request(server.url, f"{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                                            "Content-Length: 2\r\n\r\n{}".encode())
            assert reply.split(b" ", 2)[1] == (b"405" if path in ALLOWED else b"404"), (method, target)
    assert httpx.get(server.url + "/metrics").text.count("vllm:") > 10
