"""The encoding job: the dataset's records as tokens, once and on a CPU, for training and evaluation.

    python -m jobs --pipeline overlays/kind/adapters/seville-hotels/pipeline.yaml --volumes /volumes encode

Waits for dataset and tokenizer; applies the chat template with the environment's arguments; leaves out records of more
than `training.max_length` tokens; and publishes the sequences of each split with their lengths. A template that
rejects a record, or a split of which nothing fits, is found here, before a GPU is used.

Lines go in chunks to several processes and come back in order as batches of the file to write. The chunks follow from
the data alone, so the files are the same however many processes encode, and no more than a few chunks are in memory.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.core import artifacts, models
from jobs.core.errors import RetryableError, UserError
from jobs.core.files import human_bytes
from jobs.core.imported import EvaluatedImport
from jobs.core.plan import Plan, plan
from jobs.core.progress import Progress
from jobs.data import encoded
from jobs.data.canaries import Canaries, check_fits
from jobs.data.encoding import Encoded, encode, encode_for_training
from jobs.data.records import is_preference
from jobs.data.split import SPLITS, TRAIN, VALIDATION

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from jobs.core.pipeline import LoadedPipeline, Pipeline

log = logging.getLogger("jobs")

# What goes to a process at once: enough to keep it busy for about a second, little enough to wait for at SIGTERM.
LINES_PER_CHUNK, CHUNK_BYTES = 512, 2**21
# Data of less is encoded in this process: until others have imported the tokenizer's libraries, it is done.
SMALL_BYTES = 4 * 2**20
# Of the pod's memory: the tokenizer's libraries, which the processes share, and this one; then each further process.
SHARED_BYTES, PROCESS_BYTES = 700 * 2**20, 160 * 2**20
MOST_PROCESSES = 32  # beyond, they wait for this process, which writes
LISTED = 10  # problems with records after which the rest of the data is not encoded

LIBRARIES = ("pyarrow", "transformers.models.auto.tokenization_auto")  # `transformers` alone imports next to nothing

CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Settings:
    """What decides how records are encoded."""

    tokenizer: Path
    max_length: int
    template: Mapping[str, Any] = field(default_factory=dict)
    canaries: Canaries | None = None  # that are trained on with the data


@dataclass
class Counts:
    """What is counted of a split; also what a chunk adds to it."""

    records: int = 0  # that were encoded
    too_long: int = 0  # that were left out
    sequences: int = 0
    tokens: int = 0
    learned: int = 0  # tokens that are learned and scored
    preferences: int = 0  # records that are pairs of sequences: the chosen answer, and the rejected one
    longest: int = 0  # tokens of the longest sequence of any record, also of those that were left out
    shortest: int = 0  # … and of the record whose longest sequence is the shortest

    def add(self, other: Counts) -> None:
        for name in ("records", "too_long", "sequences", "tokens", "learned", "preferences"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.longest = max(self.longest, other.longest)
        self.shortest = min(filter(None, (self.shortest, other.shortest)), default=0)


def run(loaded: LoadedPipeline, volumes: Path, wait_seconds: float) -> None:
    """Encode the desired dataset, unless that is done, and check that it suits the training.

    Raises:
        UserError: the template rejects a record; no record of a split fits into `training.max_length`; or the settings
            of the training need other records, which is found here, before a GPU is used.
        RetryableError: an input did not appear in time, or a process was killed.
    """
    pipeline, wanted = loaded.pipeline, plan(loaded.pipeline)
    if not artifacts.done(wanted.encoded_dataset, volumes):
        publish(pipeline, wanted, volumes, wait_seconds)
    if not isinstance(pipeline, EvaluatedImport):  # which is not trained here
        found = encoded.read_statistics(wanted.encoded_dataset.path(volumes))
        encoded.check_suits(pipeline.training, preferences=bool(found[TRAIN].get("preferences")),
                            validation=found[VALIDATION]["sequences"] > 0)


def publish(pipeline: Pipeline, wanted: Plan, volumes: Path, wait_seconds: float) -> None:
    """Wait for dataset and tokenizer, encode and publish."""
    dataset, tokenizer = artifacts.wait([wanted.dataset, wanted.tokenizer], volumes, wait_seconds)

    def write(draft: Path) -> dict[str, Any]:
        settings = Settings(tokenizer.path, pipeline.training.max_length, pipeline.environment.chat_template,
                            Canaries.of(pipeline.evaluation.privacy, dataset.digest, dataset.path))
        return {"dataset": dataset.digest, **encode_splits(dataset.path, draft, settings)}

    artifact = artifacts.publish(wanted.encoded_dataset, volumes, write, keep=pipeline.environment.retention.keep,
                                 adapter_name=pipeline.adapter, wait_seconds=wait_seconds)
    log.info("encoded: %s", artifact.path)


def encode_splits(dataset: Path, folder: Path, settings: Settings, processes: int | None = None) -> dict[str, Any]:
    """Encode the splits of the dataset artifact in `dataset` into `folder`; records of which a sequence has more than
    `max_length` tokens are left out and counted.

    Cutting them would teach the model to stop in the middle of an answer.

    Args:
        processes: how many encode; by default as many as the pod has CPUs and memory for, and 1 for little data.
    Returns:
        what was counted of each split, and of the canaries if there are any, which is also written to `folder`.
    Raises:
        UserError: records, or canaries, that cannot be encoded; or a split has records, but none that fits.
        RetryableError: a process was killed.
    """
    files = {name: dataset / f"{name}.jsonl" for name in SPLITS}
    files = {name: file for name, file in files.items() if file.exists()}  # there may be no validation
    size = sum(file.stat().st_size for file in files.values())
    if processes is None:
        processes = 1 if size < SMALL_BYTES else most_processes()
    log.info("encoding %s in %d process%s", human_bytes(size), processes, "es" if processes > 1 else "")
    statistics = {}
    with _encoders(settings, processes) as submit:
        for name in SPLITS:
            counts, problems = Counts(), list[str]()
            progress = Progress(f"{name}: records encoded", None)
            with encoded.writer(folder / f"{name}.arrow") as write:
                for chunk in _in_order(submit, chunks(files[name]) if name in files else iter(()), 2 * processes):
                    problems += chunk.problems
                    if len(problems) >= LISTED:
                        break
                    if chunk.batch is not None:
                        write(chunk.batch)
                    counts.add(chunk.counts)
                    progress.add(chunk.counts.records + chunk.counts.too_long,
                                 lambda counts=counts: f"{counts.tokens:,} tokens")  # type: ignore[misc]
                if name == TRAIN and settings.canaries and not problems:
                    statistics["canaries"] = asdict(_add_canaries(settings, settings.canaries, counts.records, write))
            progress.finish(lambda counts=counts: f"{counts.tokens:,} tokens")  # type: ignore[misc]
            if problems:
                raise UserError("\n".join(f"{name}.jsonl:{problem}" for problem in problems[:LISTED])
                                + "\nNothing was published")
            _require_some(name, counts, settings.max_length)
            if counts.preferences not in (0, counts.records):
                raise UserError(f"{name}.jsonl of the dataset: {counts.preferences} of {counts.records} records are "
                                "preferences (`chosen` and `rejected`): training learns from one kind or the other. "
                                "Bring them as two datasets")
            statistics[name] = asdict(counts)
    kinds = {bool(statistics[name]["preferences"]) for name in SPLITS if statistics[name]["records"]}
    if len(kinds) > 1:
        raise UserError("the dataset: some splits are preferences (`chosen` and `rejected`) and others are not: "
                        "training learns from one kind or the other. Bring them as two datasets")
    too_long = sum(counts["too_long"] for counts in statistics.values())
    if too_long:
        log.warning("%d records are longer than training.max_length (%d tokens) and are left out", too_long,
                    settings.max_length)
    (folder / encoded.STATISTICS).write_text(json.dumps(statistics, indent=2) + "\n", encoding="utf-8")
    return statistics


def _add_canaries(settings: Settings, canaries: Canaries, records: int, write: Callable[[bytes], None]) -> Counts:
    """Encode the canaries and add them to the train split. Their record is their number, negated: it is no line.

    Args:
        records: how many the train split has without them.
    """
    check_fits(canaries.count, canaries.repetitions, records)
    counts, rows, tokenizer = Counts(), list[tuple[int, Encoded]](), _tokenizer(settings.tokenizer)
    for number in range(1, canaries.count + 1):
        try:
            sequences = encode(tokenizer, canaries.record("canary", number), settings.template)
        except UserError as error:
            raise UserError(f"canary {number} (evaluation.privacy): {error}") from None
        one = _count(sequences, settings.max_length)
        if one.too_long:
            raise UserError(f"canary {number} (evaluation.privacy) has {one.longest} tokens, more than "
                            f"training.max_length ({settings.max_length}): raise it, or set evaluation.privacy."
                            "canaries: 0")
        if canaries.secret("canary", number) not in tokenizer.decode(sequences[-1].tokens).replace(" ", ""):
            raise UserError(f"canary {number} (evaluation.privacy): the tokenizer cannot write its digits, so there "
                            "is nothing to learn. Set evaluation.privacy.canaries: 0")
        for _ in range(canaries.repetitions):
            counts.add(one)
            rows += [(-number, sequence) for sequence in sequences]
    write(encoded.serialized(rows))
    log.info("train: %d canaries added, each %d time%s", canaries.count, canaries.repetitions,
             "s" * (canaries.repetitions > 1))
    return counts


def _require_some(name: str, counts: Counts, max_length: int) -> None:
    if not counts.records and (counts.too_long or name != VALIDATION):
        raise UserError(f"all {counts.too_long} {name} records are longer than training.max_length ({max_length} "
                        f"tokens; the shortest has {counts.shortest}). Raise it, or shorten them")


# --- chunks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chunk:
    """What came of a chunk of lines."""

    batch: bytes | None  # a serialized batch of the file to write; None when no record fits
    counts: Counts
    problems: list[str]  # each with the line


Lines = tuple[int, list[bytes]]  # the number of the first, and the lines


def chunks(file: Path) -> Iterator[Lines]:
    """The lines of a file in chunks."""
    first, size, lines = 1, 0, list[bytes]()
    with file.open("rb") as stream:
        for line in stream:
            lines.append(line)
            size += len(line)
            if len(lines) == LINES_PER_CHUNK or size >= CHUNK_BYTES:
                yield first, lines
                first, size, lines = first + len(lines), 0, []
    if lines:
        yield first, lines


def encode_chunk(settings: Settings, chunk: Lines) -> Chunk:
    """Encode the records of a chunk. Runs in any process."""
    tokenizer = _tokenizer(settings.tokenizer)
    counts, problems, rows = Counts(), list[str](), list[tuple[int, Encoded]]()
    for line, text in enumerate(chunk[1], chunk[0]):
        try:
            record = json.loads(text)
            sequences = encode_for_training(tokenizer, record, settings.template)
            if not any(sequence.scored for sequence in sequences):
                raise UserError("encodes to nothing that could be learned: the tokenizer leaves no token of its "
                                "answer. Remove the record")
        except UserError as error:
            problems.append(f"{line} of the dataset: {error}")
            continue
        one = _count(sequences, settings.max_length)
        if not one.too_long:
            one.preferences = int(is_preference(record))
            rows += [(line, sequence) for sequence in sequences]
        counts.add(one)
    return Chunk(encoded.serialized(rows) if rows else None, counts, problems)


def _count(sequences: Sequence[Encoded], max_length: int) -> Counts:
    """What one record adds."""
    length = max(map(len, sequences))
    if length > max_length:
        return Counts(too_long=1, longest=length, shortest=length)
    return Counts(records=1, sequences=len(sequences), tokens=sum(map(len, sequences)),
                  learned=sum(sequence.scored for sequence in sequences), longest=length, shortest=length)


@functools.lru_cache(maxsize=1)
def _tokenizer(folder: Path) -> Any:
    return models.load_tokenizer(folder)


# --- processes -------------------------------------------------------------------------------------------------------


def most_processes() -> int:
    """How many processes the pod has CPUs and memory for, at least 1."""
    cpus, memory = len(os.sched_getaffinity(0)), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    quota = _cgroup("cpu.max")
    if len(quota) == 2 and quota[0].isdigit():
        cpus = min(cpus, max(1, int(quota[0]) // int(quota[1])))
    limit = _cgroup("memory.max")
    if limit and limit[0].isdigit():
        memory = min(memory, int(limit[0]))
    return max(1, min(cpus, (memory - SHARED_BYTES) // PROCESS_BYTES, MOST_PROCESSES))


def _cgroup(name: str) -> list[str]:
    """The words of a file of the container's own cgroup (version 2)."""
    try:
        return (CGROUP / name).read_text().split()
    except OSError:
        return []


@contextmanager
def _encoders(settings: Settings, processes: int) -> Iterator[Callable[[Lines], Future[Chunk]]]:
    """What takes a chunk and returns its result-to-be: this process, or a pool of others."""
    work = functools.partial(encode_chunk, settings)
    if processes == 1:
        def here(chunk: Lines) -> Future[Chunk]:
            done: Future[Chunk] = Future()
            done.set_result(work(chunk))
            return done

        yield here
        return
    # One process imports the tokenizer's libraries; those that encode are forked from it and share its memory.
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__, *LIBRARIES])
    pool = ProcessPoolExecutor(processes, context, initializer=_start_process)
    try:
        yield functools.partial(pool.submit, work)
    except BrokenProcessPool:
        raise RetryableError("a process that encodes was killed. If the pod ran out of memory, raise the limit of "
                             "dataset-encoding") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _start_process() -> None:
    """Leave the end to the process that started this one, which waits for the current chunks: a signal to its group
    does not come here. And end with it, even when it is killed."""
    os.setpgid(0, 0)
    # The pool ends by it those that are left when one was killed; they may wait for a lock that the killed one held.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := parent_process():
        parent.join()
        os._exit(1)


def _in_order(submit: Callable[[Lines], Future[Chunk]], source: Iterator[Lines], ahead: int) -> Iterator[Chunk]:
    """The results of all chunks, in order, with at most `ahead` chunks on their way."""
    pending = deque(map(submit, itertools.islice(source, ahead)))
    while pending:
        yield pending.popleft().result()
        pending.extend(map(submit, itertools.islice(source, 1)))
