"""The two reasons not to serve something: it is not there yet, or it is refused.

To add a refusal, raise `Refused` in the check that finds the fault (serving/verification.py for adapters as a whole,
serving/lora.py for their config and weights, serving/files.py for the mounted files). Add a new reason to
`Reason` and to the table in docs/serving.md.
"""

from __future__ import annotations

from typing import Literal

Reason = Literal["damaged", "unreadable", "files", "config", "rank", "module", "shape", "values", "no effect", "proof",
                 "signature", "base", "not promoted", "gate", "load", "environment file", "pipeline file", "name"]


class NotYet(Exception):
    """Something is not there yet. Not an error: the server looks again."""


class Refused(Exception):
    """It is there and must not be served. `reason` is the label of the metric; the message is for the log."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def one_line(message: str) -> str:
    """The message as one short printable line: it may quote names and values of a damaged artifact."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in message[:1000])
