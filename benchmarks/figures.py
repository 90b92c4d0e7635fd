"""Statistics of the benchmark: medians of paired differences, their confidence intervals, verdicts on targets."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

RESAMPLES = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A median, and where it lies with 95 % confidence."""

    middle: float
    low: float
    high: float


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed."""
    if not values:
        raise ValueError("no values")
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def median_of(values: Sequence[float]) -> Interval:
    """The median of the rounds, with a bootstrap interval: the medians of rounds drawn again and again from these."""
    chance = random.Random(0)
    medians = [statistics.median(chance.choices(values, k=len(values))) for _ in range(RESAMPLES)]
    outside = (1 - CONFIDENCE) / 2
    return Interval(statistics.median(values), percentile(medians, outside), percentile(medians, 1 - outside))


def ratios(guard: Sequence[float], plain: Sequence[float]) -> Interval:
    """The ratios guard / plain of each round: their median and interval."""
    return median_of([g / p for g, p in zip(guard, plain, strict=True)])


def differences(guard: Sequence[float], plain: Sequence[float]) -> Interval:
    """The differences guard - plain of each round: their median and interval."""
    return median_of([g - p for g, p in zip(guard, plain, strict=True)])


def verdict(found: Interval, *, at_least: float = -math.inf, at_most: float = math.inf) -> str:
    """`met` or `missed` if the whole interval is on one side of the bound, else `unclear`: the noise is too large."""
    if at_least <= found.low and found.high <= at_most:
        return "met"
    if found.high < at_least or found.low > at_most:
        return "missed"
    return "unclear"


def overall(verdicts: Sequence[str]) -> str:
    """`missed` if any measure missed the target, else `unclear` if any is unclear, else `met`."""
    return next((word for word in ("missed", "unclear") if word in verdicts), "met")
