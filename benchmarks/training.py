"""What training costs, beside other ways to train the same: `python -m benchmarks.training --help`."""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks import figures
from benchmarks.serving import progress
from benchmarks.training_ways import WAYS, Shape
from jobs.core.command import run_command
from jobs.core.errors import RetryableError, UserError

DESCRIPTION = """\
Measure what a training step costs here, and with TRL's SFTTrainer, padded batches, a bare loop and a hand-written
minimum: processor time and wall time per token of the data, memory, and the difference of the losses.

Each way is a process of its own. They take their steps in turn, one after another, so that a change of the machine's
speed favours none. Models have random weights in real shapes; nothing is downloaded. Nothing else should run meanwhile.
It takes up to 24 GB of memory, with `--shape tiny` 4 GB.
"""
OURS, TRL = "ours", "TRL"
PADDED = ("padded to the longest", "padded to max_length")
TINY = Shape("embedded tiny, 256 tokens a batch",
             {"vocab_size": 2048, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
              "num_key_value_heads": 4, "intermediate_size": 352, "max_position_embeddings": 512},
             tokens_per_batch=256, max_length=128, prompt=(10, 40), completion=(8, 40))
SMOLLM2 = Shape("SmolLM2-135M, 512 tokens a batch",
                {"vocab_size": 49152, "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
                 "num_key_value_heads": 3, "intermediate_size": 1536, "max_position_embeddings": 8192},
                tokens_per_batch=512, max_length=256, prompt=(10, 40), completion=(8, 40))
LONG = replace(SMOLLM2, name="SmolLM2-135M, 2048 tokens a batch", tokens_per_batch=2048)


@dataclass(frozen=True)
class Plan:
    """One shape: how often each way takes how many steps, and which ways."""

    shape: Shape
    rounds: int
    steps: int  # in a round
    ways: tuple[str, ...]


# Every way keeps the memory of its largest step. Rows of max_length take the most, so that way has its turns with ours
# alone; and of the longest batches, only three ways fit in memory.
FULL = (Plan(TINY, 12, 20, tuple(WAYS)),
        Plan(SMOLLM2, 8, 1, tuple(way for way in WAYS if way != PADDED[1])),
        Plan(replace(SMOLLM2, name=f"{SMOLLM2.name}, {PADDED[1]}"), 4, 1, (OURS, PADDED[1])),
        Plan(LONG, 5, 1, (OURS, TRL, "hand-written minimum")))
SHAPES = {"tiny": FULL[:1], "512": FULL[1:3], "2048": FULL[3:]}
QUICK = (Plan(TINY, 2, 2, tuple(WAYS)),)
CHECKED = 3  # steps in which losses are compared, without dropout


@dataclass
class Steps:
    """What a way's steps in one round took."""

    processor: float = 0.0  # seconds
    wall: float = 0.0
    tokens: int = 0
    megabytes: float = 0.0  # the most that the process ever had
    losses: list[float] = field(default_factory=list)

    def add(self, report: dict[str, Any]) -> None:
        self.processor += report["processor"]
        self.wall += report["wall"]
        self.tokens += report["tokens"]
        self.megabytes = report["megabytes"]
        self.losses.append(report["loss"])


class Way:
    """A way of training, as the process that runs it."""

    def __init__(self, name: str, folder: Path, log: Path) -> None:
        self.name, self._log = name, log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.training_ways", name, str(folder)], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=errors, text=True,
                env=os.environ | {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1",
                                  "PYTHONWARNINGS": "ignore"})

    def step(self, order: dict[str, Any]) -> dict[str, Any]:
        """Let it take a step.

        Raises:
            RetryableError: it ended, with the last lines of its log.
        """
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self.process.wait()
            reason = ("killed, as the kernel does when memory runs out: all ways together take up to 24 GB"
                      if code == -signal.SIGKILL else self._log.read_text()[-2000:])
            raise RetryableError(f"{self.name} ended with {code}: {reason}")
        report: dict[str, Any] = json.loads(line)
        return report


@contextmanager
def started(plan: Plan, ways: Sequence[str]) -> Iterator[list[Way]]:
    """The processes, with a model in a folder for each; ended and removed afterwards."""
    from tests.build_models import tiny_tokenizer

    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-training-")))
        model = place / "model"
        plan.shape.write(model)
        tiny_tokenizer(model)
        running = []
        for number, name in enumerate(ways):
            folder = place / str(number)
            folder.mkdir()
            for file in model.iterdir():
                (folder / file.name).symlink_to(file)
            way = Way(name, folder, place / f"{number}.log")
            stack.callback(way.process.wait)
            stack.callback(way.process.kill)
            running.append(way)
        yield running


def measure(plan: Plan) -> dict[str, list[Steps]]:
    """Each way's rounds. ours leads, and the others take its batches, but TRL, which makes its own."""
    found: dict[str, list[Steps]] = {way: [] for way in plan.ways}
    shape = replace(plan.shape, steps=2 * (plan.rounds + 1) * plan.steps + 4)  # more than are taken
    with started(replace(plan, shape=shape), plan.ways) as ways:
        for number in range(plan.rounds + 1):
            orders = [ways[0].step({}) for _ in range(plan.steps)]
            of_round = {OURS: orders}
            others = ways[1:] if number % 2 else ways[:0:-1]
            for way in others:
                of_round[way.name] = [way.step(order) for order in orders]
            if number == 0:  # the first steps are slower
                continue
            for name, reports in of_round.items():
                steps = Steps()
                for report in reports:
                    steps.add(report)
                found[name].append(steps)
            progress(f"{shape.name}: round {number} of {plan.rounds}")
    return found


def difference(plan: Plan) -> dict[str, float]:
    """The largest difference between a way's losses and those of padded rows on the same batches, over some steps."""
    shape = replace(plan.shape, dropout=0.0, steps=2 * CHECKED + 8)
    padded = PADDED[0]
    largest: dict[str, float] = {}
    for leader in (way for way in (OURS, TRL) if way in plan.ways):
        # Of a larger shape only the two: each process keeps the memory of its largest step.
        others = [way for way in plan.ways if way not in (OURS, TRL, padded)]
        followers = others if leader == OURS and plan.shape == TINY else []
        with started(replace(plan, shape=shape), [leader, padded, *followers]) as (first, second, *more):
            for _ in range(CHECKED):
                order = first.step({})
                expected = second.step(order)["loss"]
                losses = {leader: order["loss"]} | {way.name: way.step(order)["loss"] for way in more}
                for name, loss in losses.items():
                    largest[name] = max(largest.get(name, 0.0), abs(loss - expected))
    return largest


def table(found: dict[str, list[Steps]], differences: dict[str, float]) -> list[str]:
    """A Markdown table: medians of the times for 1000 tokens, and of the ratios to ours within a round."""
    lines = ["| | processor, ms | : ours | wall, ms | : ours | memory, MB | losses differ by |",
             "|---|---|---|---|---|---|---|"]
    for name, rounds in found.items():
        cells = [name]
        for of_way, of_ours in (([each.processor for each in rounds], [each.processor for each in found[OURS]]),
                                ([each.wall for each in rounds], [each.wall for each in found[OURS]])):
            cost = [1e6 * seconds / each.tokens for seconds, each in zip(of_way, rounds, strict=True)]
            ratio = figures.ratios(cost, [1e6 * seconds / each.tokens
                                          for seconds, each in zip(of_ours, found[OURS], strict=True)])
            cells += [f"{statistics.median(cost):.0f}",
                      "1" if name == OURS else f"{ratio.middle:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"]
        cells += [f"{max(each.megabytes for each in rounds):.0f}",
                  f"{differences[name]:.0e}" if name in differences else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def benchmark(plans: Sequence[Plan]) -> str:
    """Measure all shapes; the tables."""
    text = []
    for plan in plans:
        progress(f"{plan.shape.name}: comparing losses")
        differences = difference(plan)
        found = measure(plan)
        text += [f"**{plan.shape.name}**", "", *table(found, differences), ""]
    return "\n".join(text).rstrip()


def run_benchmark(argv: Sequence[str] | None) -> None:
    """Parse the arguments, measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=DESCRIPTION,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="show that it works, on the smallest shape alone")
    parser.add_argument("--shape", choices=tuple(SHAPES), help="one shape instead of all")
    parser.add_argument("--rounds", type=int, help="how often each way has its turn")
    args = parser.parse_args(argv)
    if args.rounds is not None and args.rounds < 1:
        raise UserError("--rounds must be at least 1")
    os.environ["OMP_NUM_THREADS"] = "1"
    plans: Sequence[Plan] = QUICK if args.quick else FULL
    if args.shape and not args.quick:
        plans = SHAPES[args.shape]
    if args.rounds:
        plans = tuple(replace(plan, rounds=args.rounds) for plan in plans)
    progress(f"load average {os.getloadavg()[0]:.1f}")
    print(benchmark(plans))


def main(argv: Sequence[str] | None = None) -> int:
    # No log: the result is printed, and progress by `progress`.
    return run_command(lambda: run_benchmark(argv), set_up_logging=lambda: None)


if __name__ == "__main__":
    sys.exit(main())
