"""Confidence: how sure a measured value is, by a studentized bootstrap over clusters of records.

Records that belong together (the same group, or the same answer) are no independent evidence, so whole clusters are
drawn: as many as there are, with replacement, 10,000 times, with a fixed seed. Models are compared on the same draws
(paired). Of each draw the value is computed again, and its distance from the measured value in units of its own
standard error; the quantiles of these distances give the bounds (the bootstrap-t of Efron 1979: Efron and Tibshirani
1993, chapter 12.5; Hall 1988). In simulations (tests/evaluation/test_confidence.py) it keeps its promise on skewed and
on few values, where percentiles and BCa promise too much.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]

RESAMPLES = 10_000
SEED = 2026
BLOCK = 2_000_000  # counts that are held at once: 16 MB, which a processor's cache nearly holds


@dataclass(frozen=True)
class Clusters:
    """Which cluster each row belongs to."""

    of_row: np.ndarray[Any, np.dtype[np.int64]]  # 0 to count - 1
    count: int

    @classmethod
    def of(cls, names: Sequence[Hashable]) -> Clusters:
        """Rows with the same name are one cluster."""
        numbers: dict[Hashable, int] = {}
        of_row = np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=np.int64)
        return cls(of_row, len(numbers))

    def sums(self, columns: Array) -> Array:
        """The sums of each cluster: (rows, k) -> (clusters, k)."""
        return self.of_clusters(columns.T).T

    def of_rows(self, counts: Array) -> Array:
        """How often each row counts: (draws, clusters) -> (draws, rows)."""
        return counts[:, self.of_row]

    def of_clusters(self, values: Array) -> Array:
        """The sums over the rows of each cluster: (draws, rows) -> (draws, clusters)."""
        order = np.argsort(self.of_row, kind="stable")
        starts = np.searchsorted(self.of_row[order], np.arange(self.count))
        sums: Array = np.add.reduceat(values[:, order], starts, axis=1)
        return sums


class Statistic(Protocol):
    """A value of all rows as a function of how often each cluster counts."""

    def __call__(self, counts: Array) -> tuple[Array, Array]:
        """Compute it for several draws at once.

        Args:
            counts: how often each cluster counts in each draw, (draws, clusters).
        Returns:
            the values, (draws,), and their derivatives by the counts, (draws, clusters).
        """


@dataclass(frozen=True)
class Ratio:
    """A ratio of two sums over the rows, such as a mean: the usual statistic."""

    totals: Array  # (clusters, 2)

    @classmethod
    def of(cls, above: Sequence[float], below: Sequence[float], clusters: Clusters) -> Self:
        return cls(clusters.sums(np.array([above, below], dtype=np.float64).T))

    @classmethod
    def mean(cls, values: Sequence[float], clusters: Clusters) -> Self:
        return cls.of(values, [1.0] * len(values), clusters)

    def __call__(self, counts: Array) -> tuple[Array, Array]:
        above, below = (counts @ self.totals).T
        values = above / below
        return values, (self.totals[:, 0] - values[:, None] * self.totals[:, 1]) / below[:, None]


@dataclass(frozen=True)
class Proportion(Ratio):
    """The share of the rows with a property: a mean of values that are 0 or 1.

    Its interval is exact instead of drawn: where few rows or none have the property, draws without any say nothing.
    Clopper and Pearson (1934), with as many rows as would be as sure if they were independent (Korn and Graubard 1998).
    """

    def interval(self, confidence: float) -> Interval:
        clusters, (found, rows) = len(self.totals), self.totals.sum(axis=0)
        value = float(found / rows)
        if not math.isfinite(value):
            return Interval(value, math.nan, math.nan)
        away = self.totals[:, 0] - value * self.totals[:, 1]
        variance = float((away**2).sum() / rows**2) * clusters / max(1, clusters - 1)
        # Where all clusters say the same, or each is one row, each counts once.
        alone = clusters == rows or variance < 1e-15
        effective = clusters if alone else int(min(rows, value * (1 - value) / variance))
        return Interval(value, *exact_bounds(value, effective, confidence))


def exact_bounds(share: float, trials: int, confidence: float) -> tuple[float, float]:
    """Both bounds of a share that was found in so many independent trials (Clopper and Pearson 1934). What are no whole
    hits is rounded so that the bounds become wider."""
    hits = share * trials
    return (1 - _most(trials - math.floor(hits + 1e-9), trials, confidence),
            _most(math.ceil(hits - 1e-9), trials, confidence))


def _most(hits: int, trials: int, confidence: float) -> float:
    """The largest share with which so few hits in so many independent trials are no rarer than 1 - confidence."""
    if hits >= trials:
        return 1.0
    chosen = np.arange(hits + 1)
    choices = np.array([math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1) for k in chosen])
    low, high = hits / trials, 1.0
    while high - low > 1e-9:
        share = (low + high) / 2
        tail = np.exp(choices + chosen * math.log(share) + (trials - chosen) * math.log1p(-share)).sum()
        low, high = (share, high) if tail > 1 - confidence else (low, share)
    return high


@dataclass(frozen=True)
class Exponential:
    """exp of a statistic."""

    inner: Statistic

    def __call__(self, counts: Array) -> tuple[Array, Array]:
        values, slopes = self.inner(counts)
        values = np.exp(values)
        return values, values[:, None] * slopes


@dataclass(frozen=True)
class Logarithm:
    """The logarithm of a statistic; NaN where it is not positive."""

    inner: Statistic

    def __call__(self, counts: Array) -> tuple[Array, Array]:
        values, slopes = self.inner(counts)
        values = np.where(values > 0, values, np.nan)
        return np.log(values), slopes / values[:, None]


@dataclass(frozen=True)
class Difference:
    """One statistic less another, on the same draws."""

    first: Statistic
    second: Statistic

    def __call__(self, counts: Array) -> tuple[Array, Array]:
        (values, slopes), (others, others_slopes) = self.first(counts), self.second(counts)
        return values - others, slopes - others_slopes


@dataclass(frozen=True)
class Interval:
    """A value, and its bounds: each holds by itself with the confidence. NaN where nothing could be measured."""

    value: float
    low: float
    high: float

    def map(self, function: Any) -> Interval:
        """The interval of an increasing function of the value."""
        return Interval(function(self.value), function(self.low), function(self.high))


def interval(statistic: Statistic, clusters: int, confidence: float, *, low: float = -math.inf, high: float = math.inf,
             resamples: int = RESAMPLES) -> Interval:
    """The value of a statistic and its two one-sided bounds.

    Args:
        clusters: how many there are.
        confidence: of each bound by itself, e.g. 0.95.
        low: the smallest possible value of the statistic, to which the bounds are limited; `high`: the largest.
    """
    if isinstance(statistic, Proportion):
        return statistic.interval(confidence)
    within = getattr(statistic, "within", None)  # bounds that hold in any case, where draws without spread have none
    if within:
        low, high = within(confidence)
    with np.errstate(all="ignore"):  # an infinite perplexity is a result, and shows as one
        values, slopes = statistic(np.ones((1, clusters)))
        value, error = float(values[0]), float(_errors(np.ones((1, clusters)), slopes)[0])
        if not math.isfinite(value):
            return Interval(value, math.nan, math.nan)
        if not error > 1e-12 * max(1.0, abs(value)):
            return Interval(value, low, high) if within else _without_spread(value, clusters, confidence, low, high)
        distances = []
        for counts in draws(clusters, resamples):
            values, slopes = statistic(counts)
            away = values - value
            # A draw without any spread is infinitely far away, unless it has the same value.
            distances.append(np.where(np.abs(away) <= 1e-12 * max(1.0, abs(value)), 0.0,
                                      away / _errors(counts, slopes)))
    ordered = np.concatenate(distances)
    ordered = ordered[~np.isnan(ordered)]
    # Of two neighbouring draws the wider one: never more sure than the draws are.
    up = float(np.quantile(ordered, confidence, method="higher")) if len(ordered) else math.inf
    down = float(np.quantile(ordered, 1 - confidence, method="lower")) if len(ordered) else -math.inf
    return Interval(value, min(max(value - up * error, low), value), max(min(value - down * error, high), value))


def draws(clusters: int, resamples: int) -> Iterator[Array]:
    """How often each cluster is drawn: blocks of (draws, clusters). The same for every statistic of so many."""
    random = np.random.default_rng(SEED)
    block = max(1, BLOCK // clusters)
    for first in range(0, resamples, block):
        size = min(block, resamples - first)
        drawn = random.integers(clusters, size=(size, clusters)) + np.arange(size)[:, None] * clusters
        yield np.bincount(drawn.ravel(), minlength=size * clusters).reshape(size, clusters).astype(np.float64)


def _errors(counts: Array, slopes: Array) -> Array:
    """The standard error of each draw's value: by its derivatives (infinitesimal jackknife, Jaeckel 1972)."""
    clusters = counts.shape[1]
    errors: Array = np.sqrt(np.einsum("dc,dc,dc->d", counts, slopes, slopes) * clusters / max(1, clusters - 1))
    return errors


def _without_spread(value: float, clusters: int, confidence: float, low: float, high: float) -> Interval:
    """The bounds where every cluster says the same. It does not show that others would: a share p of all clusters is
    missed by n draws with the chance (1 - p)^n, so up to 1 - (1 - confidence)^(1/n) of them may be as bad as possible
    (at 95 % about 3 / n: the rule of three, Hanley and Lippman-Hand 1983)."""
    share = 1 - (1 - confidence) ** (1 / clusters)
    return Interval(value, value - share * (value - low), value + share * (high - value))
