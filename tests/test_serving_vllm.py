"""Promises of serving with real vLLM: what answers, how it is swapped under load, how it ends and comes back."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from benchmarks import serving as benchmark
from jobs.core import artifacts, imported, models
from jobs.core.environment import SERVABLE_RANKS
from jobs.core.plan import plan
from jobs.publication import layout
from jobs.relocation import adapters
from jobs.training import merge
from serving.guard import ALLOWED
from tests import build_adapter, build_models, build_published, forked_serving, registry_server
from tests.build_server import raw_request
from tests.build_vllm import BASE, NAME, OPENED, OTHER, Server

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


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serving")
    _, planned = build_adapter.declare(folder / "pipelines")
    build_adapter.base(folder / "volumes", planned)
    server = Server(folder, forked=False)
    try:
        server.start()
        yield server
        assert server.stop() == 0
    finally:
        server.kill()


def reference(server: Server, adapter: Path | None, prompt: str, tokens: int) -> list[int]:
    """What transformers and PEFT say, token by token."""
    import torch
    from peft import PeftModel

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
def test_from_base_only_to_first_adapter_to_swap_to_refusal_without_a_restart(server: Server, tmp_path: Path) -> None:
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

    # What another environment trained and published: this one never had data for it. Its proof was not published.
    elsewhere = tmp_path / "elsewhere"
    trained, planned = build_adapter.load(elsewhere, training__seed=4)
    build_adapter.promote(elsewhere / "volumes", trained)
    with registry_server.serve() as registry:
        published = build_published.publish(registry.host, layout.files(
            *(artifacts.read(spec.path(elsewhere / "volumes")) for spec in (planned.adapter, planned.evaluation)),
            answers=False))
        files = server.folder / "pipelines"
        build_published.declare_served(files, published)
        adapters.run(imported.load(files / f"{NAME}.yaml", files / "environment.yaml"), server.volumes)
    fourth = planned.adapter.path(server.volumes)
    server.until(lambda: server.serves(fourth), 20)
    assert server.greedy(NAME) == reference(server, fourth, prompt, tokens) != said_by_first


def another_base(draft: Path) -> Path:
    """The base model with a few other weights."""
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(build_adapter.models() / "base", draft))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][:4] *= -1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def another_template(draft: Path) -> Path:
    """The tokenizer with a chat template that differs by a space."""
    folder = Path(shutil.copytree(build_adapter.models() / "tokenizer", draft))
    (folder / "chat_template.jinja").write_text(build_adapter.TEMPLATE.replace("|>{{", "|> {{"))
    return folder


@pytest.mark.slow
def test_only_an_adapter_that_answers_as_it_was_evaluated_is_served(server: Server, tmp_path: Path) -> None:
    good = server.promote(seed=61)
    said = server.greedy(NAME)
    base, tokenizer = (build_adapter.models() / name for name in ("base", "tokenizer"))

    def evaluated(base: Path, tokenizer: Path) -> dict[str, Any]:
        def write(draft: Path) -> None:
            adapter = plan(server.write(seed)).adapter.path(server.volumes)
            (draft / "proof.json").write_text(build_adapter.proof_of(adapter, base, tokenizer).to_json())

        return {"evaluation_change": write}

    wrong: list[tuple[dict[str, Any], str]] = [
        ({"change": build_adapter.double_scale}, "log-probability"),
        (evaluated(another_base(tmp_path / "base"), tokenizer), "log-probability"),
        (evaluated(base, another_template(tmp_path / "tokenizer")), "this server's chat template makes")]
    for seed, (changes, message) in enumerate(wrong, 62):
        path = build_adapter.promote(server.volumes, server.write(seed), **changes)
        refusal = f"adapter {NAME}@{path.name} of evaluation "
        server.until(lambda refusal=refusal: refusal in server.log.read_text(), 60)  # type: ignore[misc]
        (line,) = [line for line in server.log.read_text().splitlines() if refusal in line]
        assert "refused (proof)" in line and message in line
        assert server.serves(good)
        assert server.greedy(NAME) == said
    server.promote(seed=65)


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
    shape = {"type": "object", "properties": {"stars": {"type": "integer", "maximum": 9}}, "required": ["stars"],
             "additionalProperties": False}
    structured = server.client.chat.completions.create(**{**options, "max_tokens": 64}, response_format={
        "type": "json_schema", "json_schema": {"name": "rating", "schema": shape, "strict": True}})
    assert isinstance(json.loads(structured.choices[0].message.content)["stars"], int)
    assert structured.model == NAME
    completion = server.client.completions.create(model=NAME, prompt="Hello", max_tokens=4, logprobs=2)
    assert len(completion.choices[0].logprobs.token_logprobs) == completion.usage.completion_tokens  # type: ignore[union-attr, arg-type]


@pytest.mark.slow
def test_the_openai_client_waits_by_itself_for_an_adapter_that_is_not_ready(server: Server) -> None:
    asked, _ = build_adapter.declare(server.folder / "pipelines", adapter="granada-hotels", training__seed=4)
    server.until(lambda: "granada-hotels: not served" in server.log.read_text(), 10)
    threading.Timer(1, build_adapter.promote, (server.volumes, asked)).start()
    client = server.client.with_options(max_retries=2)
    started = time.monotonic()
    assert client.completions.create(model="granada-hotels", prompt="Hello", max_tokens=2).model == "granada-hotels"
    assert time.monotonic() - started > 1  # it was not ready when it was first asked for


@pytest.mark.slow
def test_every_route_that_vllm_registers_is_allowed_or_404(server: Server, tmp_path: Path) -> None:
    assert forked_serving.Process([], {**os.environ, **OPENED}, tmp_path / "log", ENUMERATE).wait(120) == 0
    found = (tmp_path / "log").read_text()
    routes = json.loads(next(line for line in found.splitlines() if line.startswith("ROUTES")).removeprefix("ROUTES"))
    assert len(routes) > 50
    assert {path for path, _ in routes} >= set(ALLOWED) - {"/ready"}  # the enumeration sees what there is
    for path, methods in routes:
        target = path.replace("{", "").replace("}", "")
        for method in {*methods, "GET", "POST"} - {ALLOWED.get(path)}:
            for key in ("", "Authorization: Bearer none\r\n"):
                reply = raw_request(server.url, f"{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{key}"
                                                "Content-Length: 2\r\n\r\n{}".encode())
                assert reply.split(b" ", 2)[1] == (b"405" if path in ALLOWED else b"404"), (method, target)
    assert httpx.get(server.url + "/metrics").text.count("vllm:") > 10


# Each ends the engine when vLLM computes it on a CPU beside another request; the last two are lm-evaluation-harness's.
MESSAGES = [{"role": "user", "content": "What is the best hotel?"}]
DEADLY: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "Hello there", "prompt_logprobs": 0}),
    ("/v1/completions", {"prompt": "Hello there", "prompt_logprobs": True, "min_tokens": 3}),
    ("/v1/completions", {"prompt": "Hello there", "echo": "yes", "logprobs": 2.0}),
    ("/v1/chat/completions", {"messages": MESSAGES, "echo": "true"}),
    ("/v1/chat/completions", {"messages": MESSAGES, "prompt_logprobs": 1}),
    ("/v1/completions", {"prompt": "Hello there", "echo": True, "logprobs": 1, "max_tokens": 0}),
    ("/v1/completions", {"prompt": [[1, 2, 3]], "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0})]


@pytest.mark.slow
def test_no_request_for_log_probabilities_of_its_prompt_ends_the_engine_for_those_beside_it(server: Server) -> None:
    server.promote(seed=1)
    for model in (NAME, BASE):
        for path, body in DEADLY:
            with streaming(server) as stream:
                reply = httpx.post(server.url + path, json={"model": model, "max_tokens": 4, **body}, timeout=60)
                assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length", body
            assert reply.status_code == 400, body
    assert server.client.completions.create(model=NAME, prompt="Hello", max_tokens=2, echo=True).choices[0].text
    assert server.health() == 200


@pytest.mark.slow
def test_one_request_cannot_take_the_whole_batch(server: Server) -> None:
    for body in ({"prompt": "Hello", "n": 16384}, {"prompt": ["Hello"] * 1024}, {"prompt": ["Hello"] * 11, "n": "3"}):
        reply = httpx.post(server.url + "/v1/completions", json={"model": BASE, "max_tokens": 200, **body})
        assert reply.status_code == 400
        assert "at most 32 sequences" in reply.json()["error"]["message"]  # vLLM computes 128 at once on a CPU
    reply = httpx.post(server.url + "/v1/completions", timeout=60,
                       json={"model": BASE, "prompt": ["Hello"] * 16, "n": 2, "max_tokens": 2})
    assert len(reply.json()["choices"]) == 32


@pytest.mark.slow
def test_an_engine_that_hangs_fails_liveness_and_a_busy_one_does_not(server: Server) -> None:
    server.promote(seed=1)
    engine = server.engine()
    with streaming(server) as stream:
        engine.suspend()
        try:
            assert server.health() == 200  # for HANG_SECONDS, of which there are 8, it may be busy
            server.until(lambda: server.health() == 503, 30)
            assert server.health("/ready") == 503
        finally:
            engine.resume()
        server.until(lambda: server.health() == 200, 30)
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
    assert server.health("/ready") == 200
    assert "vLLM's engine answers again" in server.log.read_text()

    with contextlib.ExitStack() as stack:  # more than twice what the engine computes at once, for longer than that
        clients = [stack.enter_context(streaming(server)) for _ in range(300)]
        until = time.monotonic() + 12
        while time.monotonic() < until and server.health() == 200:
            time.sleep(0.5)
        assert server.health() == 200
        assert len(clients) == 300


CLIENTS, REQUESTS, PROMOTIONS = 16, 500, 10
# A server reaches its working size in 15 to 40 swaps, later on a busy machine. One that kept something of each swap
# would never have the same size for ten of them.
STEADY, MOST_PROMOTIONS = 10, 120
# Longer than one block of vLLM's prefix cache (128 tokens on a CPU), and alike until the end: a cache that took one
# adapter's prefix for the other's would be noticed.
PROMPTS = [f"{' '.join(map(str, range(55)))} Question {i}: what is the best hotel? Answer:" for i in range(4)]


def steady(memory: list[int]) -> bool:
    """Whether the memory after the last swap is what it was after the tenth before, but for a few hundred kB a swap."""
    return len(memory) > STEADY and memory[-1] < memory[-1 - STEADY] * 1.002


@pytest.mark.slow
def test_under_load_no_swap_fails_a_request_or_mixes_adapters_and_old_versions_go(server: Server) -> None:
    """16 clients, half of them streaming, while two adapters are promoted in turn.

    A greedy reply is a fingerprint: of 16 tokens by a random model, each adapter's differs. A request that mixed old
    and new weights, or old weights with a new prefix cache, would equal neither. Every fourth client asks the base
    model, whose replies must stay its own.
    """
    adapters = [build_adapter.promote(server.volumes, server.write(seed)) for seed in (11, 12)]
    expected: list[dict[str, list[int]]] = []
    for seed, path in zip((11, 12), adapters, strict=True):
        server.write(seed)
        server.until(lambda path=path: server.serves(path), 60)  # type: ignore[misc]
        expected.append({prompt: server.greedy(NAME, prompt, 16) for prompt in PROMPTS})
    assert all(expected[0][prompt] != expected[1][prompt] for prompt in PROMPTS)
    swaps = server.metrics("serving_swaps_total")
    memory: list[int] = []  # after each swap
    base = {prompt: server.greedy(BASE, prompt, 16) for prompt in PROMPTS}
    stop = threading.Event()
    seen: list[int] = []  # by which adapter each reply was
    wrong: list[object] = []

    def ask(client: openai.OpenAI, model: str, prompt: str, stream: bool) -> list[int]:
        options: Any = {"model": model, "prompt": prompt, "max_tokens": 16, "temperature": 0,
                        "extra_body": {"ignore_eos": True, "return_token_ids": True}}
        if not stream:
            return list(client.completions.create(**options).choices[0].token_ids)  # type: ignore[attr-defined]
        ids: list[int] = []
        for chunk in client.completions.create(**options, stream=True):
            assert chunk.model == model
            ids += chunk.choices[0].token_ids or []  # type: ignore[attr-defined]
        return ids

    def work(number: int) -> None:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
        model = BASE if number % 4 == 3 else NAME
        for turn in itertools.count(number):
            if stop.is_set():
                break
            prompt = PROMPTS[turn % len(PROMPTS)]
            try:
                ids = ask(client, model, prompt, stream=number % 2 == 0)
                right = [base] if model == BASE else expected
                by = [i for i, replies in enumerate(right) if replies[prompt] == ids]
                if not by:
                    wrong.append((model, prompt, ids))
                elif model == NAME:
                    seen.append(by[0])
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        done = 0
        while done < PROMOTIONS or len(seen) < REQUESTS or not (steady(memory) or done == MOST_PROMOTIONS):
            server.write((11, 12)[done % 2])
            path = adapters[done % 2]
            server.until(lambda path=path: server.serves(path), 30)  # type: ignore[misc]
            done += 1
            memory.append(server.memory())
            # Afterwards only the memory counts, for which a swap is what costs time.
            more = len(seen) + (REQUESTS // PROMOTIONS if done <= PROMOTIONS else CLIENTS)
            server.until(lambda more=more: len(seen) >= more or bool(wrong), 60)  # type: ignore[misc]
            assert not wrong, wrong[:3]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong, wrong[:3]
    assert len(seen) >= REQUESTS
    assert set(seen) == {0, 1}
    label = f'{{alias="{NAME}"}}'
    assert server.metrics("serving_swaps_total")[label] - swaps[label] == done
    server.until(lambda: len(list((server.folder / f"serving-adapters-{server.port}" / NAME).iterdir())) == 1, 10)
    assert steady(memory), " ".join(f"{each / 1e6:.0f}" for each in memory)


@pytest.mark.slow
def test_each_teams_key_opens_counts_and_caches_its_own(server: Server) -> None:
    """The last test of this server: with a file of keys, it is closed to clients without one."""
    server.promote(seed=1)
    pipeline, planned = build_adapter.declare(server.folder / "pipelines", adapter=OTHER, training__seed=4)
    build_adapter.promote(server.volumes, pipeline)
    server.until(lambda: server.serves(planned.adapter.path(server.volumes), OTHER), 60)
    server.write_keys({"a": [NAME], "b": [OTHER], "none": "*"})
    server.until(lambda: httpx.get(server.url + "/v1/models").status_code == 401, 10)
    a, b = (openai.OpenAI(base_url=server.url + "/v1", api_key=key, max_retries=0) for key in "ab")
    assert ({model.id for model in a.models.list()}, {model.id for model in b.models.list()}) == ({NAME}, {OTHER})
    for model in (OTHER, planned.adapter.digest, f"{OTHER}@{planned.adapter.digest}", BASE, "no-such-hotels"):
        with pytest.raises(openai.PermissionDeniedError):
            a.completions.create(model=model, prompt="Hello")
    with pytest.raises(openai.AuthenticationError):
        a.with_options(api_key="c").models.list()

    def counted(key: str) -> list[float]:
        names = ("serving_requests_total", "serving_prompt_tokens_total", "serving_completion_tokens_total")
        return [sum(value for labels, value in server.metrics(name).items() if f'key="team-{key}"' in labels)
                for name in names]

    options: Any = {"max_tokens": 5, "temperature": 0, "extra_body": {"ignore_eos": True}}
    plain = a.completions.create(model=NAME, prompt="Hello", n=2, **{**options, "temperature": 1}).usage
    talk: Any = {"model": NAME, "messages": MESSAGES, **options}
    chat = a.chat.completions.create(**talk).usage
    chunks = list(a.completions.create(model=NAME, prompt="Hello", stream=True, **options))
    assert all(chunk.choices and not chunk.usage for chunk in chunks)
    *_, last = a.chat.completions.create(**talk, stream=True, stream_options={"include_usage": True})
    assert plain and (plain.completion_tokens, chat.completion_tokens, last.usage.completion_tokens) == (10, 5, 5)
    prompts = 2 * plain.prompt_tokens + chat.prompt_tokens + last.usage.prompt_tokens
    assert counted("a") == [4, prompts, 10 + 5 + 5 + 5]
    for stream, timeout in ((True, 30), (False, 0.5)):  # of what is cut off, what was computed
        before = counted("a")
        body = {"model": NAME, "prompt": "Hello", "max_tokens": 240, "ignore_eos": True, "stream": stream}
        with contextlib.suppress(httpx.ReadTimeout), httpx.stream(
                "POST", server.url + "/v1/completions", json=body, headers={"Authorization": "Bearer a"},
                timeout=timeout) as cut:
            next((line for i, line in enumerate(cut.iter_lines()) if i > 5), None)
        server.until(lambda before=before: counted("a")[1] > before[1], 10)  # type: ignore[misc]
        requests, prompt, completion = (now - then for then, now in zip(before, counted("a"), strict=True))
        assert (requests, prompt) == (1, plain.prompt_tokens)
        assert 1 <= completion < 240
    assert counted("b") == [0, 0, 0]

    def hits(client: openai.OpenAI, **body: str) -> float:
        """How many tokens of the prompt vLLM found in its cache."""
        before = sum(server.metrics("vllm:prefix_cache_hits_total").values())
        client.completions.create(model=OTHER, prompt=PROMPTS[0], max_tokens=1, extra_body=body)
        return sum(server.metrics("vllm:prefix_cache_hits_total").values()) - before

    assert (hits(b), hits(b) > 100) == (0, True)
    assert (hits(server.client), hits(server.client) > 100) == (0, True)
    assert (hits(b, cache_salt="own"), hits(b, cache_salt="own") > 100) == (0, True)
    assert hits(server.client, cache_salt="own") == 0


@pytest.mark.slow
def test_twenty_swaps_of_one_adapter_leave_an_idle_one_in_its_slot_and_sigterm_finishes_a_stream(
        tmp_path: Path) -> None:
    """An adapter that is evicted is read from its private copy when the next request comes: without one, that fails."""
    server, idle, busy = Server(tmp_path), "granada-hotels", "cordoba-hotels"
    aliases = {name: build_adapter.declare(tmp_path / "pipelines", adapter=name, training__seed=seed)
               for seed, name in enumerate((NAME, idle, busy), start=20)}
    build_adapter.base(server.volumes, aliases[NAME][1])
    for pipeline, _ in aliases.values():
        build_adapter.promote(server.volumes, pipeline)
    try:
        server.start()
        for name, (_, planned) in aliases.items():
            server.until(lambda name=name, planned=planned: server.serves(  # type: ignore[misc]
                planned.adapter.path(server.volumes), name), 60)
        said = {name: server.greedy(name) for name in aliases}
        assert len(set(map(tuple, said.values()))) == 3
        shutil.rmtree(tmp_path / f"serving-adapters-{server.port}" / idle)
        for swap in range(20):
            pipeline, planned = build_adapter.declare(tmp_path / "pipelines", training__seed=30 + swap % 4)
            path = build_adapter.promote(server.volumes, pipeline)
            server.until(lambda path=path: server.serves(path), 60)  # type: ignore[misc]
            server.greedy(NAME)
            assert server.greedy(busy) == said[busy]
        assert server.greedy(idle) == said[idle]

        # SIGTERM: the stream under way is finished, nothing new is taken, the exit is a success.
        with streaming(server) as stream:
            assert server.process
            server.process.send_signal(signal.SIGTERM)
            assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
        assert server.exit_code() == 0
    finally:
        server.kill()


@pytest.mark.slow
def test_six_adapters_on_two_slots_answer_at_once_each_as_if_it_were_alone_while_one_is_swapped(tmp_path: Path) -> None:
    """Three of them fit into memory, so every kind of switch happens: from memory, from the disk, and of a version."""
    names = [NAME, *(f"hotels-{number}" for number in range(5))]
    settings: dict[str, Any] = {"serving": {"slots": 2}, "training__lora__r": 64}
    server = Server(tmp_path, ADAPTER_MEMORY="1")  # MiB; at rank 64 each has 0.3
    paths = {name: build_adapter.promote(server.volumes, server.write(seed, adapter=name, **settings))
             for seed, name in enumerate(names, start=50)}
    other = build_adapter.promote(server.volumes, server.write(70, **settings))
    server.write(50, **settings)
    build_adapter.base(server.volumes, plan(server.write(50, **settings)))
    prompt, tokens = PROMPTS[0], 16
    wrong: list[object] = []
    counts = dict.fromkeys([*names, BASE], 0)
    stop = threading.Event()
    try:
        server.start()
        server.until(lambda: server.health("/ready") == 200, 60)
        assert all(server.serves(path, name) for name, path in paths.items())
        expected = {name: [server.greedy(name, prompt, tokens)] for name in [*names, BASE]}
        for name in names[-2:]:
            assert expected[name][0] == reference(server, paths[name], prompt, tokens)
        server.write(70, **settings)
        server.until(lambda: server.serves(other), 30)
        expected[NAME].append(server.greedy(NAME, prompt, tokens))
        replies = [tuple(reply) for each in expected.values() for reply in each]
        assert len(set(replies)) == len(names) + 2
        for name in names[1:4] * 3:
            assert server.greedy(name, prompt, tokens) == expected[name][0]

        def work(name: str) -> None:
            while not stop.is_set():
                try:
                    ids = server.greedy(name, prompt, tokens)
                    if ids not in expected[name]:
                        wrong.append((name, ids))
                    counts[name] += 1
                except Exception as error:
                    wrong.append((name, error))

        threads = [threading.Thread(target=work, args=(name,)) for name in [*names, BASE] for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            for swap in range(6):
                server.write((50, 70)[swap % 2], **settings)
                path = (paths[NAME], other)[swap % 2]
                server.until(lambda path=path: server.serves(path) or bool(wrong), 60)  # type: ignore[misc]
                before = dict(counts)
                server.until(lambda before=before: bool(wrong) or all(  # type: ignore[misc]
                    counts[name] >= before[name] + 5 for name in counts), 120)
        finally:
            stop.set()
            for thread in threads:
                thread.join(60)
        assert not wrong, wrong[:3]
        assert {place for labels in server.metrics("serving_adapter_residency") for place in ("slot", "memory", "disk")
                if f'place="{place}"' in labels} == {"slot", "memory", "disk"}
        switches = server.metrics("serving_slot_switches_total")
        assert len(switches) == 2 and min(switches.values()) > 5, switches
        assert server.stop() == 0
    finally:
        server.kill()


@pytest.mark.slow
def test_it_comes_back_with_the_same_adapter_drains_to_follow_the_base_model_and_notices_a_dead_engine(
        tmp_path: Path) -> None:
    _, planned = build_adapter.declare(tmp_path / "pipelines")
    build_adapter.base(tmp_path / "volumes", planned)
    server = Server(tmp_path, key="right")
    try:
        server.start()
        path = server.promote(seed=1)
        said = server.greedy(NAME)
        assert httpx.get(server.url + "/v1/models").status_code == 401
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=server.url + "/v1", api_key="wrong").models.list()

        # Another base model in git and on the volume, but no adapter for it: the server goes on.
        other = {"source": "builtin:tiny-reference"}
        build_adapter.base(server.volumes, plan(server.write(1, base_model=other)))
        server.until(lambda: "no adapter for it has passed the gate yet" in server.log.read_text(), 20)
        assert server.greedy(NAME) == said

        # Killed, and started again with an invalid pipeline file: ready once it has the same adapter on the same base
        # model, without anybody's help.
        server.kill()
        (tmp_path / "pipelines" / f"{NAME}.yaml").write_text("adapter: [")
        server.start()
        server.until(lambda: server.health("/ready") == 200, 60)
        assert server.serves(path)
        assert server.greedy(NAME) == said
        assert {model.id for model in server.client.models.list()} == {BASE, NAME}
        assert server.metrics("serving_refusals_total") == {f'{{alias="{NAME}",reason="pipeline file"}}': 1}

        # Its adapter passes the gate: drained, ended, and started again on the new base model.
        new_path = build_adapter.promote(server.volumes, server.write(1, base_model=other))
        server.until(lambda: server.health("/ready") == 503, 20)
        with streaming(server) as stream:  # still taken, for a while
            assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
        assert server.exit_code() == 0
        server.start()
        server.until(lambda: server.serves(new_path), 60)
        assert {model.id for model in server.client.models.list()} == {other["source"], NAME}
        assert len(server.greedy(other["source"])) == 12

        # The engine dies: the process says so by its exit code, and Kubernetes starts it again.
        server.engine().kill()
        assert server.exit_code() == 1
        assert "error: vLLM exited by itself" in server.log.read_text()
    finally:
        server.kill()


@contextlib.contextmanager
def streaming(server: Server) -> Iterator[openai.Stream[Any]]:
    """A long stream by the adapter, of which the first event has come."""
    stream = server.client.completions.create(model=NAME, prompt="Hello", max_tokens=200, temperature=0, stream=True,
                                              extra_body={"ignore_eos": True})
    next(iter(stream))
    yield stream


@pytest.mark.slow
def test_gpt2_is_served_in_mode_merged_first_as_the_base_and_after_a_restart_as_the_fine_tuned_model(
        tmp_path: Path) -> None:
    server, merged = Server(tmp_path), {"mode": "merged"}
    asked = server.write(serving=merged)
    planned = plan(asked)
    artifacts.publish(planned.base_model, server.volumes, build_models.tiny_gpt2, keep=9)
    artifacts.publish(planned.tokenizer, server.volumes, tokenizer_of_gpt2, keep=9)
    base = planned.base_model.path(server.volumes)

    def write(draft: Path) -> None:
        build_models.tiny_adapter(draft, base)

    try:
        server.start()
        assert len(server.greedy(BASE)) == 12
        assert httpx.post(server.url + "/v1/completions", json={"model": NAME, "prompt": "x"}).status_code == 503
        artifacts.publish(planned.adapter, server.volumes, write, keep=9)
        merge.publish(asked, planned, server.volumes, 0)
        build_adapter.promote(server.volumes, asked, proven=planned.adapter.path(server.volumes))
        assert server.exit_code() == 0
        server.start()
        server.until(lambda: server.serves(planned.adapter.path(server.volumes)), 60)
        prompt = "What is the best hotel?"
        said = server.greedy(NAME, prompt)
        assert said == reference(server, planned.adapter.path(server.volumes), prompt, 12)
        assert said != reference(server, None, prompt, 12)
        with pytest.raises(openai.NotFoundError):
            server.greedy(BASE)
        assert server.stop() == 0
    finally:
        server.kill()


def tokenizer_of_gpt2(draft: Path) -> None:
    build_models.tiny_tokenizer(draft)
    build_models.tiny_gpt2(draft)  # its config, beside the tokenizer as on the hub
    (draft / "model.safetensors").unlink()


@pytest.mark.slow
def test_a_chat_is_answered_in_the_format_in_which_its_adapter_was_trained(tmp_path: Path) -> None:
    """And with the arguments of the request, where it has any."""
    from jobs.data.encoding import encode

    template = {"tone": "kind"}
    server = Server(tmp_path)
    pipeline = server.write(chat_template=template)
    planned = plan(pipeline)

    def tokenizer_with_arguments(draft: Path) -> None:
        shutil.copytree(build_adapter.models() / "tokenizer", draft, dirs_exist_ok=True)
        (draft / "chat_template.jinja").write_text("{{ tone }}: " + build_adapter.TEMPLATE)

    artifacts.publish(planned.tokenizer, server.volumes, tokenizer_with_arguments, keep=9)
    build_adapter.base(server.volumes, planned)
    path = build_adapter.promote(server.volumes, pipeline)
    tokenizer = models.load_tokenizer(planned.tokenizer.path(server.volumes))
    record = {"prompt": "What is the best hotel?", "completion": "Yes."}
    try:
        server.start()
        server.until(lambda: server.serves(path), 60)
        for sent, rendered in (({}, template), ({"chat_template_kwargs": {"tone": "rude"}}, {"tone": "rude"})):
            for model in (BASE, NAME):
                reply = server.client.chat.completions.create(
                    model=model, messages=[{"role": "user", "content": record["prompt"]}], max_tokens=4,
                    extra_body={"return_token_ids": True, **sent})
                prompt = reply.prompt_token_ids  # type: ignore[attr-defined]
                assert prompt == encode(tokenizer, record, rendered)[0].prompt, tokenizer.decode(prompt)
                assert tokenizer.decode(prompt).startswith(f"{rendered['tone']}: <|user|>")
        server.write()  # other arguments, for which no adapter has passed: it goes on as it is
        server.until(lambda: "chat_template changed from" in server.log.read_text(), 30)
        assert server.serves(path)
        assert server.stop() == 0
    finally:
        server.kill()


# --- programs that are forked from the process that has imported vLLM, like the servers above -------------------------

ASK_VLLM = """
import json, sys, typing
from vllm.config.lora import MaxLoRARanks
from vllm.model_executor.models.interfaces import supports_lora
from vllm.model_executor.models.registry import ModelRegistry
names = json.loads(sys.argv[1])
classes = {name: ModelRegistry._try_load_model_cls(name) for name in names}
print(json.dumps({"ranks": typing.get_args(MaxLoRARanks),
                  "served": [n for n, c in classes.items() if c is not None],
                  "with_lora": [n for n, c in classes.items() if c is not None and supports_lora(c)]}))
"""


@pytest.mark.slow
def test_the_installed_vllm_serves_the_architectures_and_ranks_we_accept(tmp_path: Path) -> None:
    names = [*models.SERVABLE, *models.MERGED_ONLY]
    done = forked_serving.Process([json.dumps(names)], os.environ, tmp_path / "log", ASK_VLLM)
    assert done.wait(300) == 0, (tmp_path / "log").read_text()
    answer = json.loads((tmp_path / "log").read_text().splitlines()[-1])
    assert answer["served"] == names
    assert answer["with_lora"] == list(models.SERVABLE), "what vLLM learned to serve with LoRA belongs into SERVABLE"
    assert tuple(answer["ranks"]) == SERVABLE_RANKS


# Its servers too. In tests/test_benchmarks.py, a run that is stopped starts real ones.
BENCHMARK = """
import contextlib, subprocess, sys, types
from benchmarks import serving
from tests import forked
serving.TOKENS = 4  # of a reply
serving.subprocess = types.SimpleNamespace(**{**vars(subprocess), "Popen": forked.Python})
with open(sys.argv[1], "w") as output, contextlib.redirect_stdout(output):
    code = serving.main(sys.argv[2:])
sys.exit(code)
"""


@pytest.mark.slow
def test_a_short_run_of_the_benchmark_measures_both_sides_and_every_request_succeeds(tmp_path: Path) -> None:
    file = tmp_path / "benchmarks.md"
    file.write_text(f"{benchmark.BEGIN}\n{benchmark.END}\n")
    process = forked_serving.Process(
        [str(tmp_path / "printed"), "--rounds", "1", "--seconds", "0.1", "--swaps", "1", "--write", str(file)],
        os.environ, tmp_path / "log", BENCHMARK)
    assert process.wait() == 0, (tmp_path / "log").read_text()[-5000:]
    printed = (tmp_path / "printed").read_text()
    assert printed.strip() in file.read_text()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if "|" in line]
    header = next(i for i, line in enumerate(lines) if line[0] == "load")
    assert lines[header][2:4] == ["plain vLLM", "with the guard"]
    measured = [line for line in lines[header + 2:] if len(line) == len(lines[header])]
    assert [line[0] for line in measured if line[0]] == list(map(str, benchmark.LOADS))
    assert all(float(line[2]) > 0 and float(line[3]) > 0 for line in measured)
    text = " ".join(printed.split())  # wrapped anywhere
    assert "all of them answered in full" in text
    assert "every one was answered in full" in text
    assert {line[0] for line in lines if "load" in line[0]} >= {"without load", "under load"}
