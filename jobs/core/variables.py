"""Settings from environment variables."""

from __future__ import annotations

import math
import os

from jobs.core.errors import UserError


def number(name: str, default: float, *, least: float = 0) -> float:
    """The number in an environment variable; `default` where it is not set, or empty.

    Raises:
        UserError: it is not a finite number of at least `least`.
    """
    text = os.environ.get(name, "").strip()
    try:
        value = float(text) if text else default
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= least):
        raise UserError(f"{name} is {text!r}, but must be a number of at least {least:g}; correct the environment "
                        "variable, or remove it")
    return value


def wait_seconds() -> float:
    """How long a stage waits for its inputs, or for another process that makes the same artifact, in seconds."""
    return number("WAIT_SECONDS", 6 * 3600)
