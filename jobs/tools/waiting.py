"""Wait until something is there, with progress that people can read."""

from __future__ import annotations

import http.client
import logging
import re
import time
import urllib.request
from collections.abc import Callable
from typing import TypeVar

from jobs.core.errors import RetryableError

log = logging.getLogger("jobs")

REMINDER_SECONDS = 30.0
# From readiness to the promoted adapter. Verifying, loading and proving it takes seconds; in mode merged the server
# restarts with it, which takes a minute with a small model.
ALIAS_SECONDS = 300.0
SERVED = re.compile(r'^serving_adapter_info{alias="([^"]*)",digest="([^"]*)"} 1(\.0)?$', re.MULTILINE)
T = TypeVar("T")


class Late(RetryableError):
    """The deadline passed."""


def wait_until(what: str | Callable[[], str], look: Callable[[], T | None], seconds: float, every: float = 2.0,
               passing: tuple[type[Exception], ...] = ()) -> T:
    """Call `look` until it returns something true, and return that.

    Args:
        what: what is waited for, in words. A function is called when the time is over, and `look` shows the progress;
            a text is shown at the start and every 30 seconds.
        seconds: how long to wait.
        every: seconds between two calls.
        passing: exceptions that a later call may not meet, e.g. of a server that restarts.

    Raises:
        Late: after `seconds`; names what was waited for and the last of the passing exceptions.
    """
    began = shown = time.monotonic()
    trouble = ""
    if isinstance(what, str):
        log.info("waiting for %s (at most %.0f s)", what, seconds)
    while True:
        found: T | None = None
        before, trouble = trouble, ""
        try:
            found = look()
        except passing as error:
            trouble = str(error)
            if trouble != before:
                log.warning("%s; trying again", trouble)
        if found:
            return found
        now = time.monotonic()
        if now - began >= seconds:
            name = what if isinstance(what, str) else what()
            raise Late(f"waited {seconds:.0f} s for {name}{f'; the last error: {trouble}' if trouble else ''}")
        if isinstance(what, str) and now - shown >= REMINDER_SECONDS:
            log.info("still waiting for %s (%.0f of %.0f s)", what, now - began, seconds)
            shown = now
        time.sleep(every)


def served_adapters(endpoint: str) -> dict[str, str]:
    """The digest of the adapter that answers under each alias, by /metrics; empty while the server starts."""
    try:
        with urllib.request.urlopen(f"{endpoint}/metrics", timeout=10) as reply:
            text = reply.read().decode()
    except (OSError, http.client.HTTPException):  # it starts, or restarts
        return {}
    return {alias: digest for alias, digest, _ in SERVED.findall(text)}


def served_adapter(endpoint: str, alias: str) -> str | None:
    """The digest of the adapter that answers under the alias; None while none does."""
    return served_adapters(endpoint).get(alias)
