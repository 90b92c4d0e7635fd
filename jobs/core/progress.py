"""Progress of long work as lines in a log: amount done, rate and time left."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

log = logging.getLogger("jobs")

INTERVAL_S = 5.0  # between two lines


def _number(count: float) -> str:
    return f"{count:.0f}" if count >= 10 or count == int(count) else f"{count:.2g}"


class Progress:
    """Logs at most every `INTERVAL_S` seconds how far the work is, and one line when it is finished.

    Args:
        what: the work, e.g. "base: held-out records read".
        total: how much there is to do; None when unknown.
        amount: how a message shows an amount of work, e.g. `human_bytes`.
    """

    def __init__(self, what: str, total: float | None, amount: Callable[[float], str] = _number) -> None:
        self.what, self.total, self.amount = what, total, amount
        self.done = 0.0
        self._added = 0.0  # without what an earlier run did, so that the rate is this run's
        self._finished = False
        self._started = self._logged = time.monotonic()

    @property
    def rate(self) -> float:
        """What this run does in a second."""
        seconds = time.monotonic() - self._started
        return self._added / seconds if seconds else 0.0

    def skip(self, count: float) -> None:
        """`count` was done before this run; a negative count has to be done again."""
        self.done += count

    def add(self, count: float, detail: Callable[[], str] | None = None) -> None:
        """`count` more is done. `detail` gives what is appended to a line, and is called only when one is due."""
        self.done += count
        self._added += count
        if self.total is not None and self.done >= self.total:
            self.finish(detail)
        elif (now := time.monotonic()) - self._logged >= INTERVAL_S:
            self._logged = now
            self._log(self._so_far(), detail)

    def finish(self, detail: Callable[[], str] | None = None) -> None:
        """The work is done: log the last line. `add` calls this where the total is known."""
        if self._added and not self._finished:
            self._finished = True
            seconds = time.monotonic() - self._started
            self._log(f"{self.amount(self._added)} in {_number(seconds)} s, {self.amount(self.rate)}/s", detail)

    def _so_far(self) -> str:
        rate = self.rate
        if self.total is None:
            return f"{self.amount(self.done)}, {self.amount(rate)}/s"
        left = f"{(self.total - self.done) / rate:.0f} s left" if rate else "stalled"
        return f"{self.amount(self.done)} of {self.amount(self.total)}, {self.amount(rate)}/s, {left}"

    def _log(self, line: str, detail: Callable[[], str] | None) -> None:
        log.info("%s: %s%s", self.what, line, f", {detail()}" if detail else "")
