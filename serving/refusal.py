"""Why something is not served: it is not there yet, or it is refused, for one of a few reasons.

To add a refusal, raise `Refused` in the check that finds the fault (serving/verification.py for adapters as a whole,
serving/lora.py for their config and weights, serving/base.py for pipeline files). A new reason is one more word in
`Reason` and one more line of the table in docs/serving.md.
"""

from __future__ import annotations

from typing import Literal

Reason = Literal["damaged", "unreadable", "files", "config", "rank", "module", "shape", "values", "no effect", "base",
                 "mode", "not promoted", "gate", "load", "pipeline file", "name"]


class NotYet(Exception):
    """What is desired is not there yet. Not an error: the server looks again."""


class Refused(Exception):
    """It is there and must not be served. `reason` is the label of the metric; the message is for the log."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def one_line(message: str) -> str:
    """The message as one short line for the log, whatever names and values of a bad artifact it quotes."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in message[:1000])
