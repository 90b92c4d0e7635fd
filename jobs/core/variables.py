"""Settings from environment variables."""

from __future__ import annotations

import math
import os
from typing import TypeVar

from jobs.core.errors import UserError

WAIT_SECONDS = 6 * 3600.0
Default = TypeVar("Default", int, int | None)


def number(name: str, default: float, *, least: float = 0) -> float:
    """The number in an environment variable; `default` where it is not set, or empty.

    Raises:
        UserError: it is not a finite number of at least `least`.
    """
    text = os.environ.get(name, "").strip()
    return _checked(name, text, least) if text else default


def whole_number(name: str, default: Default, *, least: int = 0) -> int | Default:
    """The whole number in an environment variable; `default` where it is not set, or empty.

    Raises:
        UserError: it is not a whole number of at least `least`.
    """
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"{name} is {text!r}, but must be a whole number of at least {least}; correct or remove it")
    return int(text)


def wait_seconds(flag: str | None = None) -> float:
    """How long a stage waits for its inputs, or for another process that makes the same artifact, in seconds.

    Args:
        flag: what `--wait-seconds` says; None if it is not given.
    Raises:
        UserError: it is not a number of seconds.
    """
    return number("WAIT_SECONDS", WAIT_SECONDS) if flag is None else _checked("--wait-seconds", flag, 0)


def _checked(name: str, text: str, least: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= least):
        raise UserError(f"{name} is {text!r}, but must be a number of at least {least:g}; correct or remove it")
    return value
