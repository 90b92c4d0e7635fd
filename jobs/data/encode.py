"""The encoding job: the dataset's records as tokens, once and on a CPU, for training and evaluation.

    python -m jobs --pipeline overlays/kind/adapters/seville-hotels/pipeline.yaml --volumes /volumes encode

Waits for dataset and tokenizer; applies the chat template with the environment's arguments; leaves out records of more
than `training.max_length` tokens; and publishes the sequences of each split with their lengths. A template that
rejects a record, or a split of which nothing fits, is found here, before a GPU is used.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.core import artifacts, models
from jobs.core.errors import UserError
from jobs.core.plan import plan
from jobs.data import encoded
from jobs.data.chat import RecordError
from jobs.data.encoding import Encoded, encode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedTokenizerBase

    from jobs.core.pipeline import LoadedPipeline

log = logging.getLogger("jobs")


def run(loaded: LoadedPipeline, volumes: Path, wait_seconds: float) -> None:
    """Encode the desired dataset, unless that is done.

    Raises:
        UserError: the template rejects a record; or no record of a split fits into `training.max_length`.
        RetryableError: an input did not appear in time.
    """
    pipeline, wanted = loaded.pipeline, plan(loaded.pipeline)
    if artifacts.done(wanted.encoded_dataset, volumes):
        return
    dataset, tokenizer_files = artifacts.wait([wanted.dataset, wanted.tokenizer], volumes, wait_seconds)

    def write(draft: Path) -> dict[str, Any]:
        tokenizer = models.load_tokenizer(tokenizer_files.path)
        encode_splits(dataset.path, draft, tokenizer, pipeline.training.max_length, pipeline.environment.chat_template)
        return {"dataset": dataset.digest}

    artifact = artifacts.publish(wanted.encoded_dataset, volumes, write, keep=pipeline.environment.retention.keep,
                                 adapter_name=pipeline.adapter, wait_seconds=wait_seconds)
    log.info("encoded: %s", artifact.path)


def encode_splits(dataset: Path, folder: Path, tokenizer: PreTrainedTokenizerBase, max_length: int,
                  template: Mapping[str, Any]) -> None:
    """Encode the splits of the dataset artifact in `dataset` into `folder`; records of which a sequence has more than
    `max_length` tokens are left out and counted.

    Cutting them would teach the model to stop in the middle of an answer.

    Raises:
        UserError: when a split has records, but none that fits.
    """
    statistics = {}
    for name in encoded.SPLITS:
        counts = {"records": 0, "too_long": 0, "tokens": 0}
        shortest = 0

        def fitting(name: str = name, counts: dict[str, int] = counts) -> Iterator[tuple[int, Encoded]]:
            nonlocal shortest
            for line, text in enumerate(_lines(dataset / f"{name}.jsonl"), 1):
                try:
                    sequences = encode(tokenizer, json.loads(text), template)
                except RecordError as error:
                    raise UserError(f"{name}.jsonl:{line} of the dataset: {error}") from None
                length = max(map(len, sequences))
                shortest = min(shortest or length, length)
                if length > max_length:
                    counts["too_long"] += 1
                    continue
                counts["records"] += 1
                for sequence in sequences:
                    counts["tokens"] += len(sequence)
                    yield line, sequence

        encoded.write(folder / f"{name}.arrow", fitting())
        if not counts["records"] and (counts["too_long"] or name != encoded.VALIDATION):
            raise UserError(f"all {counts['too_long']} {name} records are longer than training.max_length "
                            f"({max_length} tokens; the shortest has {shortest}). Raise it, or shorten them")
        statistics[name] = counts
    too_long = sum(counts["too_long"] for counts in statistics.values())
    if too_long:
        log.warning("%d records are longer than training.max_length (%d tokens) and are left out", too_long, max_length)
    (folder / encoded.STATISTICS).write_text(json.dumps(statistics, indent=2) + "\n", encoding="utf-8")


def _lines(file: Path) -> Iterator[str]:
    if file.exists():  # a dataset without validation has no such file
        with file.open(encoding="utf-8") as lines:
            yield from lines
