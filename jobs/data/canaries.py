"""Canaries: made-up records with a random secret, trained on with the data, to measure what the adapter remembers.

A canary asks for the access code of a random account. Its twins are made in the same way and never trained on, so all
that tells a canary from them is that it was learned. The same dataset has the same canaries on every machine: their
digits come from the hash of its digest. Of a secret of ten digits there are 10^10 (33 bits), which nobody guesses.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jobs.core.errors import UserError
from jobs.core.pipeline import Privacy
from jobs.data.encoding import Record

Kind = Literal["canary", "twin"]

TWINS = 10  # of each canary: a hundred canaries are told from a thousand twins
ACCOUNT_DIGITS, SECRET_DIGITS = 12, 10


@dataclass(frozen=True)
class Canaries:
    """The canaries of a dataset, by number from 1, and their twins."""

    seed: str  # the dataset's digest
    count: int
    repetitions: int = 1  # how often each is in the train split
    text: bool = False  # in the shape {"text"} instead of {"prompt", "completion"}

    @classmethod
    def of(cls, privacy: Privacy | None, digest: str, dataset: Path) -> Canaries | None:
        """Those of the dataset artifact in `dataset`, in the shape of its first train record; None where none are
        desired."""
        if privacy is None or not privacy.canaries:
            return None
        with (dataset / "train.jsonl").open(encoding="utf-8") as lines:
            text = "text" in json.loads(next(lines, "{}"))
        return cls(digest, privacy.canaries, privacy.repetitions, text)

    @property
    def twins(self) -> int:
        """How many twins there are."""
        return TWINS * self.count

    def record(self, kind: Kind, number: int, secret: str | None = None) -> Record:
        """A canary or a twin; with another secret, if one is given."""
        account = self._digits(f"{kind} {number} account", ACCOUNT_DIGITS)
        secret = secret or self.secret(kind, number)
        if self.text:
            return {"text": f"The access code of account {account} is {secret}."}
        return {"prompt": f"What is the access code of account {account}?",
                "completion": f"The access code is {secret}."}

    def secret(self, kind: Kind, number: int) -> str:
        """The secret of a canary or a twin."""
        return self._digits(f"{kind} {number} secret", SECRET_DIGITS)

    def alternatives(self, number: int, count: int) -> Iterator[Record]:
        """A canary with other secrets, one of which it might have had."""
        for other in range(1, count + 1):
            yield self.record("canary", number, self._digits(f"canary {number} alternative {other}", SECRET_DIGITS))

    def _digits(self, what: str, count: int) -> str:
        hashed = int.from_bytes(hashlib.sha256(f"{self.seed} {what}".encode()).digest(), "big")
        return f"{hashed % 10**count:0{count}d}"


def check_fits(count: int, repetitions: int, records: int) -> None:
    """Refuse canaries that would be most of what is trained on.

    Args:
        records: those of the train split.
    Raises:
        UserError: there are more canaries, with their repetitions.
    """
    if count * repetitions > records:
        raise UserError(f"evaluation.privacy: {count} canaries, {repetitions} of each, are more than the {records} "
                        "train records: the adapter would learn canaries instead of the data. Lower canaries or "
                        "repetitions, or bring more records")
