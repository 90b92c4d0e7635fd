"""What a seal saves: `python -m benchmarks.verification --help`."""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from jobs.core import artifacts, seals
from jobs.core.artifacts import Spec
from jobs.core.command import run_command
from jobs.core.layout import seal_file
from jobs.tools.verify import forget

DESCRIPTION = """\
Measure how long a stage takes to verify an artifact of some files that all are on the disk: by its seal, and in full,
from the disk and from memory. The three take turns.
"""
SPEC = Spec("base-model", "base-model", {"source": "random"})
CHUNK = 1 << 20


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks.verification", description=DESCRIPTION,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--files", type=int, default=4, metavar="N", help="default: %(default)s")
    top.add_argument("--megabytes", type=int, default=1000, metavar="N", help="of each file (default: %(default)s)")
    top.add_argument("--rounds", type=int, default=5, metavar="N", help="default: %(default)s")
    top.add_argument("--folder", type=Path, metavar="DIR", help="where to put them (default: a temporary folder)")
    return top


def publish(volumes: Path, files: int, megabytes: int) -> Path:
    """An artifact of random bytes."""
    def write(draft: Path) -> None:
        for number in range(files):
            with (draft / f"model-{number}.safetensors").open("wb") as stream:
                for _ in range(megabytes):
                    stream.write(os.urandom(CHUNK))

    return artifacts.publish(SPEC, volumes, write, keep=1).path


def seconds(volumes: Path) -> float:
    """How long a stage takes to find the artifact."""
    started = time.perf_counter()
    assert artifacts.find(SPEC, volumes)
    return time.perf_counter() - started


def measure(volumes: Path, artifact: Path, rounds: int) -> dict[str, list[float]]:
    """The seconds of every round, by how the artifact is verified."""
    found: dict[str, list[float]] = {"by its seal": [], "in full, from memory": [], "in full, from the disk": []}
    content = seal_file(artifact).read_text()
    for _ in range(rounds):
        for way, values in found.items():
            if way == "by its seal":
                seal_file(artifact).write_text(content)
            else:
                seal_file(artifact).unlink()
            if way == "in full, from the disk":
                for file in artifacts.files_of(artifact):
                    forget(file)
            values.append(seconds(volumes))
    return found


def table(found: dict[str, list[float]], size: float) -> str:
    """The medians, and how often the seal's goes into the others'."""
    sealed = statistics.median(found["by its seal"])
    lines = [f"| {size:.1f} GB | seconds | GB/s | as long as by its seal |", "|---|---|---|---|"]
    for way, values in found.items():
        median = statistics.median(values)
        rate = "" if median == sealed else f"{size / median:.2f}"
        lines.append(f"| {way} | {median:.4f} | {rate} | {median / sealed:,.0f} times |")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="verification-") as folder:
        artifact = publish(Path(folder), args.files, args.megabytes)
        assert seal_file(artifact).exists() or args.files * args.megabytes * CHUNK < seals.LARGE
        print(table(measure(Path(folder), artifact, args.rounds), args.files * args.megabytes * CHUNK / 1e9))


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: run(parser().parse_args())))
