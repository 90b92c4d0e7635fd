"""What training will learn of an adapter's data: a few records as tokens, and totals of a sample.

    python -m jobs check overlays/kind/adapters/seville-hotels --encode

Encodes as the Job `dataset-encoding` does, with the tokenizer and the data that can be read here: what is in git or
embedded, or, with `--volumes`, what was relocated.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.core import artifacts, models
from jobs.core.artifacts import Spec
from jobs.core.declarations import Source
from jobs.core.errors import UserError
from jobs.core.plan import plan
from jobs.core.sources import shown
from jobs.data import split
from jobs.data.formats import files_in
from jobs.tools import changes, overlay

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jobs.core.pipeline import LoadedPipeline
    from jobs.data.encoding import Encoded

SAMPLE = 1000  # records that are counted
LEARNED, BETWEEN = ("⟦", "⟧"), "│"
GREEN, PLAIN = "\033[42;30m", "\033[0m"


@dataclass(frozen=True)
class Inputs:
    """What encoding reads: folders as artifacts have them."""

    dataset: Path
    tokenizer: Path


def run(path: Path, count: int, volumes: Path | None) -> None:
    """Show the first `count` records of each adapter as tokens, and what a sample of its records adds up to.

    Args:
        volumes: a folder with a folder for each volume, for what is neither in git nor embedded.
    Raises:
        UserError: data or tokenizer cannot be read here, or the template rejects a record.
    """
    if volumes is not None:
        changes.check_volumes(volumes)
    for name, loaded in overlay.trained(overlay.load(path).adapters).items():
        with tempfile.TemporaryDirectory() as folder:
            for line in preview(loaded, find_inputs(loaded, volumes, Path(folder)), count, colour=sys.stdout.isatty()):
                print(f"{name}: {line}" if not line.startswith(" ") else line)


def find_inputs(loaded: LoadedPipeline, volumes: Path | None, folder: Path) -> Inputs:
    """The divided data and the tokenizer: relocated ones if they are there, else made in `folder` from what is in git
    or embedded.

    Raises:
        UserError: they are elsewhere; with what to do.
    """
    wanted, shared = plan(loaded.pipeline), loaded.pipeline.environment

    def relocated(spec: Spec) -> Path | None:
        found = changes.path(spec, volumes) if volumes else None
        return artifacts.read(found).path if found and found.is_dir() else None

    def require_here(what: str, source: Source, spec: Spec) -> None:
        if source.scheme not in ("file", "builtin"):
            seen = f"{volumes} does not hold {spec}" if volumes else "it is not here"
            raise UserError(f"{loaded.path}: {what} comes from {shown(source.source)}, and {seen}, so nothing can be "
                            f"encoded. Relocate it (python -m jobs --pipeline {loaded.path} --volumes DIR relocate "
                            f"{what}) and name its folder with --volumes DIR")

    tokenizer = relocated(wanted.tokenizer)
    if tokenizer is None:
        from jobs.relocation import relocate

        require_here("tokenizer", shared.tokenizer_source, wanted.tokenizer)
        tokenizer = folder / "tokenizer"
        tokenizer.mkdir()
        relocate.write_tokenizer(loaded.environment, tokenizer)
    dataset = relocated(wanted.dataset)
    if dataset is None:
        source = loaded.pipeline.dataset
        require_here("dataset", source, wanted.dataset)
        dataset = folder / "dataset"
        dataset.mkdir()
        split.split(files_in(loaded.resolve(source)), source.holdout, dataset, source.validation)
    return Inputs(dataset, tokenizer)


def preview(loaded: LoadedPipeline, inputs: Inputs, count: int, *, colour: bool) -> Iterator[str]:
    """The lines that show an adapter's data: the first records of its training data, and the totals of a sample."""
    from jobs.data.encoding import encode_for_training

    tokenizer = models.load_tokenizer(inputs.tokenizer)
    template, limit = loaded.pipeline.environment.chat_template, loaded.pipeline.training.max_length
    file = inputs.dataset / f"{split.TRAIN}.jsonl"
    with file.open("rb") as lines:
        records = sum(1 for _ in lines)
    every = max(1, records // SAMPLE)
    lengths, learned = list[int](), 0
    for line, record in enumerate(_records(file), 1):
        sampled = (line - 1) % every == 0
        if line > count and not sampled:
            continue
        try:
            sequences = encode_for_training(tokenizer, record, template)
        except UserError as error:
            raise UserError(f"{loaded.path}: {file.name}:{line} of the dataset: {error}") from None
        if line <= count:
            yield from _shown(tokenizer, f"{file.name}:{line}", sequences, limit, colour=colour)
        if sampled:
            lengths.append(max(map(len, sequences), default=0))
            learned += sum(each.scored for each in sequences) if lengths[-1] <= limit else 0
    fitting = [length for length in lengths if length <= limit]
    left_out = len(lengths) - len(fitting)
    yield (f"{len(lengths)} of {records} training records: {statistics.median(lengths):.0f} tokens at the median, "
           f"{max(lengths)} at most; {100 * learned / max(1, sum(fitting)):.0f} % are learned; {left_out} "
           f"({100 * left_out / len(lengths):.1f} %) are longer than training.max_length ({limit}) and left out")


def _records(file: Path) -> Iterator[Mapping[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _shown(tokenizer: PreTrainedTokenizerBase, place: str, sequences: list[Encoded], limit: int, *,
           colour: bool) -> Iterator[str]:
    """One record: its figures, and its tokens with those marked that are learned."""
    tokens, scored = sum(map(len, sequences)), sum(each.scored for each in sequences)
    long = f", longer than training.max_length ({limit}): left out" if max(map(len, sequences)) > limit else ""
    yield (f"{place}: {tokens} tokens in {len(sequences)} sequence{'s' if len(sequences) > 1 else ''}, "
           f"{scored} learned{long}")
    for sequence in sequences:
        yield from (f"    {line}" for line in marked(tokenizer, sequence, colour=colour).splitlines())


def marked(tokenizer: PreTrainedTokenizerBase, sequence: Encoded, *, colour: bool) -> str:
    """The tokens as text, with a line between two of them and a new line after a line's end. What is learned is in
    brackets, or coloured."""
    start, end = (GREEN, PLAIN) if colour else LEARNED
    ends = [0, *itertools.chain.from_iterable(sequence.learned), len(sequence)]
    parts = list[str]()
    for number, (first, last) in enumerate(itertools.pairwise(ends)):  # in turn not learned, learned, not learned, …
        text = BETWEEN.join(str(tokenizer.decode([token])) for token in sequence.tokens[first:last])
        text = text.replace("\n", "⏎\n")
        if number % 2 and colour:  # by lines: they are shown one by one
            text = start + text.replace("\n", f"{end}\n{start}") + end
        elif number % 2:
            text = start + text + end
        if text:
            parts.append(text)
    return BETWEEN.join(parts).replace(f"\n{BETWEEN}", "\n")
