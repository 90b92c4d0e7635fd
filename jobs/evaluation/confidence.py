"""Confidence: how sure a measured value is, by a studentized bootstrap over clusters of records.

Records that belong together (the same group, or the same answer) are no independent evidence, so whole clusters are
drawn: as many as there are, with replacement, 10,000 times, with a fixed seed. Models are compared on the same draws
(paired). Of each draw the value is computed again, and its distance from the measured value in units of its own
standard error; the quantiles of these distances give the bounds (the bootstrap-t of Efron 1979: Efron and Tibshirani
1993, chapter 12.5; Hall 1988). With few clusters the quantiles are taken further out (Hesterberg 2015), and no bound is
nearer than Student's t has it: of values that are mostly equal, or have heavy tails, draws alone promise too much.

How often a bound promises too much, where 5 % is allowed (tests/evaluation/test_confidence.py; 10,000 data sets each):
- at most about 5 % from 20 clusters up, for values that are normal, exponential, heavy-tailed, bounded or binary, and
  for gains and losses that are rare;
- more where the values that would decide otherwise are rare and extreme, so that most samples lack them: log-normal
  losses (sigma 1) have 9 % at 20 clusters, 7.5 % at 50, 7 % at 100. Percentiles have 19 %, 13 % and 10 % there;
- what happens in fewer than 3 of n clusters can be missed by any method. Where all clusters say the same, the bounds
  allow for it (the rule of three); where they differ a little and rarely by much, nothing can.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Protocol, Self

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]

RESAMPLES = 10_000
SEED = 2026
BLOCK = 128_000  # counts that are computed with at once: 1 MB, which a processor's cache holds
KEPT = 128_000_000  # counts that are kept for the next statistic, in a byte each; more are drawn again


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

    @functools.cached_property
    def single(self) -> bool:
        """Whether each row is a cluster, in their order."""
        return np.array_equal(self.of_row, np.arange(self.count))

    def sums(self, columns: Array) -> Array:
        """The sums of each cluster: (rows, k) -> (clusters, k)."""
        return self.of_clusters(columns.T).T

    def of_rows(self, counts: Array) -> Array:
        """How often each row counts: (draws, clusters) -> (draws, rows)."""
        return counts if self.single else counts[:, self.of_row]

    def of_clusters(self, values: Array) -> Array:
        """The sums over the rows of each cluster: (draws, rows) -> (draws, clusters)."""
        if self.single:
            return values
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
    def of(cls, above: Sequence[float] | Array, below: Sequence[float] | Array, clusters: Clusters) -> Self:
        return cls(clusters.sums(np.array([above, below], dtype=np.float64).T))

    @classmethod
    def mean(cls, values: Sequence[float] | Array, clusters: Clusters) -> Self:
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
    up, down = _quantiles(np.concatenate(distances), clusters, confidence)
    return Interval(value, min(max(value - up * error, low), value), max(min(value - down * error, high), value))


def _quantiles(distances: Array, clusters: int, confidence: float) -> tuple[float, float]:
    """How many standard errors a value may be above and below the truth, with the confidence each."""
    student = student_t(confidence, clusters - 1)
    # Few clusters vary less than what they are drawn from (Hesterberg 2015, "What Teachers Should Know About the
    # Bootstrap", expanded percentiles).
    level = NormalDist().cdf(student * math.sqrt(clusters / (clusters - 1)))
    distances = distances[~np.isnan(distances)]
    if not len(distances):
        return math.inf, -math.inf
    # Of two neighbouring draws the wider one: never more sure than the draws are.
    up, down = (float(np.quantile(distances, at, method=method))  # type: ignore[call-overload]
                for at, method in ((level, "higher"), (1 - level, "lower")))
    return max(up, student), min(down, -student)


def student_t(confidence: float, freedom: int) -> float:
    """The quantile of Student's t distribution, to 0.1 % from 10 degrees of freedom up at confidences up to 0.99
    (Abramowitz and Stegun 1964, 26.7.5)."""
    z = NormalDist().inv_cdf(confidence)
    terms = (z, (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
             (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160)
    return math.fsum(term / freedom**power for power, term in enumerate(terms))


def draws(clusters: int, resamples: int = RESAMPLES) -> Iterator[Array]:
    """How often each cluster is drawn: blocks of (draws, clusters). The same for every statistic of so many."""
    blocks = _kept if clusters * resamples <= KEPT else _drawn
    for block in blocks(clusters, resamples):
        yield block.astype(np.float64)


def _drawn(clusters: int, resamples: int) -> Iterator[np.ndarray[Any, np.dtype[np.uint8]]]:
    random = np.random.default_rng(SEED)
    most = max(1, BLOCK // clusters)
    for first in range(0, resamples, most):
        size = min(most, resamples - first)
        drawn = random.integers(clusters, size=(size, clusters)) + np.arange(size)[:, None] * clusters
        # More than 255 of one cluster are drawn once in 10^500 draws.
        yield np.bincount(drawn.ravel(), minlength=size * clusters).reshape(size, clusters).astype(np.uint8)


@functools.lru_cache(maxsize=2)  # records and sentences
def _kept(clusters: int, resamples: int) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], ...]:
    return tuple(_drawn(clusters, resamples))


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
