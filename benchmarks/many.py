"""What many adapters on one server cost: real vLLM on a CPU: `python -m benchmarks.many --help`."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks import figures
from benchmarks.load import Connection, Reply, post
from benchmarks.serving import Server, Setting, free_ports, progress, running, stop
from jobs.core.command import run_command
from jobs.core.errors import RetryableError

DESCRIPTION = """\
Measure what many adapters on one server cost, with real vLLM and a tiny model.

First one server after another with more and more adapters: how long it takes to start, memory, what it does while
idle, and how long a promotion takes to go live. Then 16 adapters on 8 slots and on 16: the time to the first token of
adapters that are always busy and of those that are seldom requested. Nothing else should run meanwhile.
"""
COUNTS = (1, 10, 100, 300)
ADAPTERS, SLOTS = 16, (16, 8)
HOT = 4  # adapters that are always busy, with two clients each; the others are requested one after another
WEIGHTS = 8  # different weights; adapters share them in turn
START_SECONDS = 900
IDLE_SECONDS, LOAD_SECONDS, PROMOTIONS = 20.0, 30.0, 5
TOKENS = 32


@dataclass(frozen=True)
class Scale:
    """One server with a number of adapters."""

    adapters: int
    healthy: float  # seconds from the start until vLLM is up
    ready: float  # and until all adapters are served
    megabytes: float  # resident memory of all processes
    idle: float  # share of a core
    look: float  # ms
    live: float  # s from a promotion to the first reply by it, the median


@dataclass(frozen=True)
class FirstTokens:
    """Times to the first token (ms) on one number of slots."""

    slots: int
    busy: list[float]  # of the adapters that are always busy
    seldom: list[float]
    even: list[float]  # all adapters equally busy


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks.many", description=DESCRIPTION, allow_abbrev=False,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--counts", type=int, nargs="+", default=COUNTS, metavar="N",
                     help="numbers of adapters (default: 1 10 100 300)")
    top.add_argument("--quick", action="store_true", help="1 and 10 adapters and short loads: shows that it works")
    return top


def name_of(number: int) -> str:
    return f"hotels-{number:03}"


def promote(setting: Setting, number: int, seed: int, **changes: Any) -> str:
    """Declare, publish and promote a version of an adapter; returns its name inside vLLM."""
    from jobs.core import artifacts, promotion
    from jobs.core.plan import FINE_TUNED_VOLUME
    from tests import build_adapter

    pipeline, planned = build_adapter.declare(setting.pipelines, adapter=name_of(number), training__seed=seed,
                                              **changes)
    artifacts.publish(planned.adapter, setting.volumes, lambda draft: build_adapter.write_adapter(
        draft, r=pipeline.training.lora.r, seed=seed % WEIGHTS, alpha=pipeline.training.lora.alpha), keep=9999)
    build_adapter.evaluation(setting.volumes, pipeline, proven=planned.adapter.path(setting.volumes))
    promotion.promote(setting.volumes / FINE_TUNED_VOLUME, pipeline.adapter, planned.adapter.digest,
                      planned.evaluation.digest)
    return f"{pipeline.adapter}@{planned.adapter.digest}"


def prepare(folder: Path, adapters: int, **changes: Any) -> Setting:
    """Base model, tokenizer and promoted adapters, of the tests."""
    from tests import build_adapter

    setting = Setting(folder, name_of(0), folder)
    build_adapter.base(setting.volumes, build_adapter.declare(
        setting.pipelines, adapter=name_of(0), **changes)[1])
    for number in range(adapters):
        promote(setting, number, number, **changes)
    return setting


def wait(server: Server, path: str) -> float:
    """Wait until the server answers 200; returns how long that took (s)."""
    started = time.monotonic()
    while True:
        server.check()
        with suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{server.port}{path}").status_code == 200:
                return time.monotonic() - started
        if time.monotonic() - started > START_SECONDS:
            raise RetryableError(f"{path} did not answer 200 within {START_SECONDS} s; see {server.log}")
        time.sleep(0.05)


def metric(server: Server, name: str) -> float:
    lines = httpx.get(f"http://127.0.0.1:{server.port}/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((name + " ", name + "{")))


def scale(adapters: int, idle_seconds: float, promotions: int) -> Scale:
    """Start a server with so many adapters, and measure it."""
    with tempfile.TemporaryDirectory(prefix="many-") as folder:
        setting = prepare(Path(folder), adapters)
        with running("guard", setting, free_ports(1)[0]) as server:
            healthy = wait(server, "/health")
            ready = healthy + wait(server, "/ready")
            process = psutil.Process(server.process.pid)
            megabytes = sum(each.memory_info().rss for each in [process, *process.children(recursive=True)]) / 1e6
            time.sleep(3)  # until nothing on the volume is recent any more
            before = server.seconds(), metric(server, "serving_look_seconds_sum"), metric(
                server, "serving_look_seconds_count")
            time.sleep(idle_seconds)
            after = server.seconds(), metric(server, "serving_look_seconds_sum"), metric(
                server, "serving_look_seconds_count")
            live = []
            for turn in range(promotions):
                number = turn % adapters
                version = promote(setting, number, 1000 + turn)
                started = time.monotonic()
                while version not in httpx.get(f"http://127.0.0.1:{server.port}/v1/models").text:
                    server.check()
                    time.sleep(0.02)
                live.append(time.monotonic() - started)
            progress(f"{adapters} adapters: measured")
            return Scale(adapters, healthy, ready, megabytes, (after[0] - before[0]) / idle_seconds,
                         1e3 * (after[1] - before[1]) / max(1.0, after[2] - before[2]), statistics.median(live))


async def stream_until(port: int, names: Sequence[str], until: float, pause: float = 0.0) -> list[Reply]:
    """One client that requests one adapter after another, in turn; returns the replies."""
    connection, replies = await Connection.to(port), []
    try:
        for name in itertools.cycle(names):
            if time.monotonic() > until:
                break
            replies.append(await connection.ask(post("/v1/completions", {
                "model": name, "prompt": "What is the best hotel?", "max_tokens": TOKENS, "ignore_eos": True,
                "temperature": 0, "stream": True})))
            await asyncio.sleep(pause)
    finally:
        connection.close()
    return replies


def first_tokens(slots: int, seconds: float) -> FirstTokens:
    """The times to the first token with so many slots."""
    names = [name_of(number) for number in range(ADAPTERS)]

    async def load(port: int) -> tuple[list[Reply], list[Reply], list[Reply]]:
        until = time.monotonic() + seconds
        *busy, seldom = await asyncio.gather(
            *(stream_until(port, [name], until) for name in names[:HOT] for _ in range(2)),
            stream_until(port, names[HOT:], until, 0.1))
        until = time.monotonic() + seconds
        even = await asyncio.gather(*(stream_until(port, [name], until) for name in names))
        return [r for each in busy for r in each], seldom, [r for each in even for r in each]

    with tempfile.TemporaryDirectory(prefix="many-") as folder:
        setting = prepare(Path(folder), ADAPTERS, serving={"slots": slots})
        with running("guard", setting, free_ports(1)[0]) as server:
            wait(server, "/ready")
            found = asyncio.run(load(server.port))
            failed = [reply for replies in found for reply in replies if reply.status != 200]
            if failed:
                raise RetryableError(f"{len(failed)} requests failed, the first with {failed[0].data[:500]!r}")
            progress(f"{slots} slots: measured")
            busy, seldom, even = ([1e3 * reply.first for reply in replies] for replies in found)
            return FirstTokens(slots, busy, seldom, even)


def table_of_scales(scales: Sequence[Scale]) -> str:
    first, last = scales[0], scales[-1]
    rows = ["| adapters | vLLM up, s | all served after, s | memory, MB | idle, % of a core | a look, ms | "
            "promotion to live, s |", "|---|---|---|---|---|---|---|"]
    rows += [f"| {s.adapters} | {s.healthy:.0f} | {s.ready - s.healthy:.1f} | {s.megabytes:.0f} | {100 * s.idle:.1f} | "
             f"{s.look:.2f} | {s.live:.2f} |" for s in scales]
    rows.append(f"| {last.adapters} : {first.adapters} | {last.healthy / first.healthy:.1f} | | "
                f"{last.megabytes / first.megabytes:.2f} | {last.idle / max(first.idle, 1e-9):.1f} | "
                f"{last.look / max(first.look, 1e-9):.1f} | {last.live / first.live:.1f} |")
    return "\n".join(rows)


def table_of_first_tokens(found: Sequence[FirstTokens]) -> str:
    def cells(each: FirstTokens) -> list[float]:
        return [value for times in (each.busy, each.seldom, each.even)
                for value in (statistics.median(times), figures.percentile(times, 0.99))]

    rows = [f"| {ADAPTERS} adapters | {HOT} busy: median, ms | p99 | {ADAPTERS - HOT} seldom: median | p99 | "
            "all busy: median | p99 |", "|---|---|---|---|---|---|---|"]
    rows += [" | ".join([f"| {each.slots} slots", *(f"{value:.0f}" for value in cells(each))]) + " |" for each in found]
    if len(found) > 1:
        few, many = cells(found[-1]), cells(found[0])
        rows.append(" | ".join([f"| {found[-1].slots} : {found[0].slots}",
                                *(f"{a / b:.1f}" for a, b in zip(few, many, strict=True))]) + " |")
    return "\n".join(rows)


def run(args: argparse.Namespace) -> None:
    """Measure and print the tables."""
    counts, idle, load, promotions = args.counts, IDLE_SECONDS, LOAD_SECONDS, PROMOTIONS
    if args.quick:
        counts, idle, load, promotions = [1, 10], 3.0, 5.0, 1
    scales = [scale(count, idle, promotions) for count in counts]
    print(table_of_scales(scales), end="\n\n", flush=True)
    print(table_of_first_tokens([first_tokens(slots, load) for slots in SLOTS]))


def main(argv: list[str] | None = None) -> int:
    # No log: the tables are printed, and progress by `progress`.
    return run_command(lambda: run(parser().parse_args(argv)), set_up_logging=lambda: None, on_sigterm=stop)


if __name__ == "__main__":
    sys.exit(main())
