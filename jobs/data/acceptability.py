"""Acceptability: sentences with judgements, validated and written in one form."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from jobs.core.errors import UserError
from jobs.data.formats import File, Problems, names_of, read_rows, to_jsonl
from jobs.data.records import JUDGEMENTS, judgement_of, sentence_of

ACCEPTABILITY = "acceptability.jsonl"


def convert(files: list[File], folder: Path) -> dict[str, int]:
    """Validate sentences with judgements and write them to `folder`/acceptability.jsonl as {"text", "acceptable"}.

    Returns:
        how many are acceptable and unacceptable.
    Raises:
        UserError: with the first ten problems; or when there are fewer than two of either kind.
    """
    problems = Problems()
    pairs = [(sentence_of(row), judgement_of(row)) for _, _, row in read_rows(files, JUDGEMENTS, problems)]
    problems.raise_if_any()
    good = sum(acceptable for _, acceptable in pairs)
    # The threshold is chosen on one half and measured on the other, so each half needs both kinds.
    if min(good, len(pairs) - good) < 2:
        raise UserError(f"{names_of(files)}: {good} acceptable and {len(pairs) - good} unacceptable sentences; at "
                        "least two of each are needed")
    write_pairs(pairs, folder)
    return {"acceptable": good, "unacceptable": len(pairs) - good}


def write_pairs(pairs: Iterable[tuple[str, bool]], folder: Path) -> None:
    """Write sentences with judgements to `folder`/acceptability.jsonl."""
    with (folder / ACCEPTABILITY).open("wb") as sink:
        for text, acceptable in pairs:
            sink.write(to_jsonl({"text": text, "acceptable": acceptable}))
