"""Attempts at what another server does: how often, after which pauses, and when to give up."""

from __future__ import annotations

import email.utils
import logging
import time
from collections.abc import Mapping

from jobs.core import variables
from jobs.core.errors import RetryableError

log = logging.getLogger("jobs")

# Ten attempts in a row without a single new byte take about four minutes; then Kubernetes starts the pod again.
ATTEMPTS = variables.whole_number("RETRY_ATTEMPTS", 10, least=1)
FIRST_PAUSE_S = variables.number("RETRY_FIRST_PAUSE_SECONDS", 1)  # doubles with every attempt, up to:
LONGEST_PAUSE_S = 60.0
LONGEST_RETRY_AFTER_S = 3600.0  # for a longer pause, the pod ends instead of waiting


class Interrupted(Exception):
    """The source broke off, or requests a pause: another attempt may succeed."""

    def __init__(self, message: str, after_s: float | None = None) -> None:
        super().__init__(message)
        self.after_s = after_s  # the pause that the server requests


class Patience:
    """Waits between attempts, longer each time, until too many in a row bring no new byte."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.failures = 0

    def reset(self) -> None:
        self.failures = 0

    def pause_after(self, interruption: Interrupted, failures: int = 0, *, counts: bool = True) -> float:
        """Count a failed attempt, and return for how many seconds to wait before the next one.

        Args:
            failures: how many in a row one connection had, of several that share this patience.
            counts: whether the attempt is one of those that may not be too many.
        Raises:
            RetryableError: there were too many in a row, or the server requests a pause that is too long.
        """
        self.failures += counts
        if counts and self.failures >= ATTEMPTS:
            raise RetryableError(f"{self.what}: gave up after {self.failures} attempts in a row. The last "
                                 f"error: {interruption}")
        pause = min(FIRST_PAUSE_S * 2.0 ** (max(failures, self.failures, 1) - 1), LONGEST_PAUSE_S)
        if interruption.after_s is not None:
            pause = interruption.after_s
        if pause > LONGEST_RETRY_AFTER_S:
            raise RetryableError(f"{self.what}: the server requests a pause of {pause:.0f} s: {interruption}")
        return pause

    def wait(self, interruption: Interrupted) -> None:
        """Count a failed attempt, and sleep before the next one. Raises like `pause_after`."""
        pause = self.pause_after(interruption)
        log.warning("%s: %s; trying again in %.1f s", self.what, interruption, pause)
        time.sleep(pause)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds that a Retry-After header requests, given as seconds or as a date; None if it is neither."""
    value = headers.get("Retry-After", "").strip()
    try:
        if value.isdecimal():  # `isdigit` would take ², which is no number
            return float(value)
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
