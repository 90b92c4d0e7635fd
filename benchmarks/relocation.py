"""How fast a model is fetched, beside what is used instead: `python -m benchmarks.relocation --help`."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures import ratios
from benchmarks.relocation_server import COMMIT, DIGESTS, REPO
from benchmarks.serving import progress
from jobs.core.command import run_command
from jobs.core.errors import RetryableError

DESCRIPTION = """\
Measure how long it takes to fetch a model and verify its digests, from a server on this machine: unlimited, with
limited connections, and with connections that break at random; as several files and as one. Beside ours:

  snapshot_download  huggingface_hub's, into a folder; it does not verify digests (then sha256sum: "+ sha256sum")
  aria2              aria2c with 16 connections and its own verification, if it is installed
  curl               16 transfers at a time, then sha256sum; one connection a file
  cp                 the same bytes from this disk, then sha256sum
  wire, disk         the bytes through 16 connections and thrown away; and written, from memory

Every run is a process of its own. The ways run in turn; each ratio is to ours in the same round.
"""
CONNECTIONS = 16
BLOCK = 1 << 20


@dataclass(frozen=True)
class Setting:
    """What a server does, in bytes and bytes a second (benchmarks/relocation_server.py)."""

    name: str
    files: int
    rate: float = 0
    cut: float = 0

    def ways(self) -> list[str]:
        """What is measured. cp and disk know no connections; curl waits longer and longer when they break."""
        missing = {"cp", "disk"} if self.rate else set()
        missing |= {"wire", "curl"} if self.cut else set()
        missing |= set() if shutil.which("aria2c") else {"aria2"}
        return [way for way in WAYS if way not in missing]


@dataclass(frozen=True)
class Run:
    """One way, once. The resident memory is that of the largest process, in MiB."""

    seconds: float
    processor: float
    resident: float


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks.relocation", description=DESCRIPTION, allow_abbrev=False,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--megabytes", type=int, default=2000, metavar="N", help="of the model (default: %(default)s)")
    top.add_argument("--rate", type=float, default=50, metavar="MIB",
                     help="MiB a second of a limited connection (default: %(default)s)")
    top.add_argument("--rounds", type=int, default=5, metavar="N", help="default: %(default)s")
    top.add_argument("--kills", type=int, default=5, metavar="N", help="default: %(default)s")
    top.add_argument("--folder", type=Path, metavar="DIR", help="where to put the bytes (default: a temporary folder)")
    top.add_argument("--quick", action="store_true", help="24 MB, breaking connections: shows that it works")
    top.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    top.add_argument("--endpoint", help=argparse.SUPPRESS)
    return top


def generate(folder: Path, files: int, total: int) -> None:
    """A repository of `files` safetensors of `total` bytes, whose digests differ. Files have holes: cheap to make."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    digests = {}
    for number in range(files):
        file = folder / f"model-{number + 1:05}-of-{files:05}.safetensors"
        with file.open("w+b") as stream:
            stream.write(b"%d" % number)
            stream.truncate(total // files)
            stream.seek(0)
            digests[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    folder.with_name(DIGESTS).write_text(json.dumps(digests))


@contextmanager
def serve(folder: Path, setting: Setting) -> Iterator[str]:
    """The URL of a server of the folder, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.relocation_server", str(folder), "--rate", str(setting.rate),
               "--cut", str(setting.cut)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def sent_by(endpoint: str) -> int:
    """The bytes of files that the server has sent."""
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{endpoint}/sent") as answer:
        return int(answer.read())


def url_of(endpoint: str, name: str) -> str:
    return f"{endpoint}/{REPO}/resolve/{COMMIT}/{name}"


# --- the ways, each in a process of its own; they return the seconds without imports --------------------------------


def fetch_ours(endpoint: str, source: Path, target: Path) -> float:
    os.environ["HF_ENDPOINT"] = endpoint
    from huggingface_hub import HfApi, hf_hub_url  # noqa: F401 - imports are not measured
    from huggingface_hub.utils import build_hf_headers  # noqa: F401

    from jobs.core.declarations import Loaded, Source
    from jobs.relocation import download, sources

    started = time.monotonic()
    items = sources.listing(Loaded(path=source), Source(source=f"hf://{REPO}", revision=COMMIT))
    download.fetch(items, target)
    return time.monotonic() - started


def fetch_snapshot(endpoint: str, source: Path, target: Path) -> float:
    os.environ |= {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1",
                   "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": str(target.with_name("hf-home"))}
    from huggingface_hub import snapshot_download

    started = time.monotonic()
    for attempt in range(100):
        try:
            snapshot_download(REPO, revision=COMMIT, local_dir=target)
            break
        except Exception:
            if attempt == 99:
                raise
    return time.monotonic() - started


def fetch_snapshot_verified(endpoint: str, source: Path, target: Path) -> float:
    return fetch_snapshot(endpoint, source, target) + sha256sum(target)


def fetch_aria2(endpoint: str, source: Path, target: Path) -> float:
    digests = json.loads(source.with_name(DIGESTS).read_text())
    listing = target.with_name("aria2.txt")
    listing.write_text("".join(f"{url_of(endpoint, name)}\n  out={name}\n  checksum=sha-256={digest}\n"
                               for name, digest in digests.items()))
    return run(["aria2c", "--quiet", f"--input-file={listing}", f"--dir={target}", f"-x{CONNECTIONS}",
                f"-s{CONNECTIONS}", f"-j{CONNECTIONS}", "--min-split-size=8M", "--file-allocation=none",
                "--max-tries=0", "--retry-wait=0", "--no-conf", "--no-proxy=127.0.0.1"])


def fetch_curl(endpoint: str, source: Path, target: Path) -> float:
    names = [name for file in sorted(source.iterdir()) for name in ("-o", str(target / file.name),
                                                                    url_of(endpoint, file.name))]
    return run(["curl", "--silent", "--fail", "--noproxy", "*", "--parallel", "--parallel-max", str(CONNECTIONS),
                *names]) + sha256sum(target)


def copy(endpoint: str, source: Path, target: Path) -> float:
    return run(["cp", "--sparse=never", *map(str, sorted(source.iterdir())), str(target)]) + sha256sum(target)


def read_wire(endpoint: str, source: Path, target: Path) -> float:
    from jobs.relocation.sources.http import open_range

    def read(part: tuple[str, int, int]) -> None:
        stream = open_range(*part, {})
        while stream.read():
            pass
        stream.raw.close()

    started = time.monotonic()
    parts = []
    for file in sorted(source.iterdir()):
        size = file.stat().st_size
        step = max(BLOCK, size // CONNECTIONS)
        parts += [(url_of(endpoint, file.name), start, min(start + step, size)) for start in range(0, size, step)]
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        list(pool.map(read, parts))
    return time.monotonic() - started


def write_disk(endpoint: str, source: Path, target: Path) -> float:
    started, block = time.monotonic(), bytes(BLOCK)
    for file in source.iterdir():
        with (target / file.name).open("wb", buffering=0) as stream:
            for at in range(0, file.stat().st_size, BLOCK):
                stream.write(block[:file.stat().st_size - at])
    return time.monotonic() - started


def run(command: list[str]) -> float:
    started = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - started


def sha256sum(target: Path) -> float:
    return run(["sha256sum", *(str(file) for file in sorted(target.iterdir()) if file.is_file())])


WAYS: dict[str, Callable[[str, Path, Path], float]] = {
    "ours": fetch_ours, "snapshot_download": fetch_snapshot, "snapshot_download + sha256sum": fetch_snapshot_verified,
    "aria2": fetch_aria2, "curl": fetch_curl, "cp": copy, "wire": read_wire, "disk": write_disk}
UNVERIFIED = ("wire", "disk")


# --- measuring -------------------------------------------------------------------------------------------------------


def command(way: str, endpoint: str, folder: Path) -> list[str]:
    return [sys.executable, "-m", "benchmarks.relocation", "--way", way, "--endpoint", endpoint, "--folder",
            str(folder)]


def measure(way: str, endpoint: str, folder: Path) -> Run:
    """Run one way, into an empty folder, and check what it brought."""
    target = empty(folder / "target")  # what is deleted here need not be written to the disk any more
    with (folder / "log").open("w") as log:  # huggingface_hub logs every connection that breaks
        process = subprocess.Popen(command(way, endpoint, folder), stdout=subprocess.PIPE, stderr=log, text=True)
    assert process.stdout
    output = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RetryableError(f"{way} failed: {(folder / 'log').read_text()[-2000:]}")
    if way not in UNVERIFIED:
        sizes = {file.name: file.stat().st_size for file in (folder / "source").iterdir()}
        found = {file.name: file.stat().st_size for file in target.iterdir() if file.is_file()}
        if found != sizes:
            raise RetryableError(f"{way} brought {found}, not {sizes}")
    return Run(float(output), used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


def empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def measure_all(folder: Path, setting: Setting, total: int, rounds: int) -> dict[str, list[Run]]:
    """Every way in every round; which one is first changes."""
    generate(folder / "source", setting.files, total)
    found: dict[str, list[Run]] = {way: [] for way in setting.ways()}
    with serve(folder / "source", setting) as endpoint:
        for number in range(rounds):
            progress(f"{setting.name}: round {number + 1} of {rounds}")
            ways = list(found)
            for way in ways[number % len(ways):] + ways[:number % len(ways)]:
                found[way].append(measure(way, endpoint, folder))
    return found


def fetched_again(folder: Path, setting: Setting, total: int, kills: int) -> tuple[int, int]:
    """The bytes that are sent more than once when ours is killed at random moments, and those that are sent in all."""
    generate(folder / "source", setting.files, total)
    target, chance = empty(folder / "target"), random.Random(0)
    with serve(folder / "source", setting) as endpoint:
        progress("kills")
        for _ in range(kills):
            before = sent_by(endpoint)
            process = subprocess.Popen(command("ours", endpoint, folder), stdout=subprocess.DEVNULL)
            while sent_by(endpoint) == before and process.poll() is None:
                time.sleep(0.02)
            share = total / setting.files / (kills + 1)
            time.sleep(chance.uniform(0.5, 1) * share / (setting.rate * CONNECTIONS))
            process.kill()
            process.wait()
        subprocess.run(command("ours", endpoint, folder), check=True, stdout=subprocess.DEVNULL)
        sent = sent_by(endpoint)
    assert sum(file.stat().st_size for file in target.iterdir()) == total // setting.files * setting.files
    return sent - total // setting.files * setting.files, sent


def table(setting: Setting, found: dict[str, list[Run]], total: int) -> str:
    """The medians of every way, and the ratio of its time to ours."""
    lines = [f"| {setting.name} | s | MB/s | time : ours | processor, s | MiB |", "|---|---|---|---|---|---|"]
    ours = [each.seconds for each in found["ours"]]
    for way, runs in found.items():
        seconds = statistics.median(each.seconds for each in runs)
        ratio = ratios([each.seconds for each in runs], ours)
        lines.append(f"| {way} | {seconds:.2f} | {total / seconds / 1e6:,.0f} | {ratio.middle:.2f} "
                     f"({ratio.low:.2f} to {ratio.high:.2f}) | {statistics.median(r.processor for r in runs):.2f} | "
                     f"{statistics.median(each.resident for each in runs):.0f} |")
    return "\n".join(lines)


def run_all(args: argparse.Namespace, folder: Path) -> None:
    total, rounds, kills = (24_000_000, 1, 1) if args.quick else (args.megabytes * 1_000_000, args.rounds, args.kills)
    rate, cut = args.rate * 2**20, total / (8 if args.quick else 40)
    settings = [Setting("unlimited, 8 files", 8), Setting("unlimited, 1 file", 1),
                Setting(f"{args.rate:g} MiB/s a connection, 8 files", 8, rate=rate),
                Setting(f"{args.rate:g} MiB/s a connection, 1 file", 1, rate=rate),
                Setting(f"breaks after {cut / 1e6:.0f} MB on average, 8 files", 8, rate=rate, cut=cut)]
    for setting in settings[4:] if args.quick else settings:
        print(table(setting, measure_all(folder, setting, total, rounds), total) + "\n", flush=True)
    again, sent = fetched_again(folder, settings[3], total, kills)
    print(f"Killed {kills} times, ours was sent {again / 1e6:.1f} MB of {sent / 1e6:.1f} MB again.")


def main_run(args: argparse.Namespace) -> None:
    if args.way:
        print(WAYS[args.way](args.endpoint, args.folder / "source", args.folder / "target"))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        run_all(args, folder)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: main_run(parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
