"""Intervals are right: others compute the same, and in simulations they hold as often as they promise.

The simulations compute what `interval` does, for thousands of data sets at once, with 999 resamples each instead of
10,000; that both give the same is a test of its own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import scipy.stats  # type: ignore[import-untyped]

from jobs.core.pipeline import Evaluation
from jobs.evaluation import confidence, gate
from jobs.evaluation.confidence import (
    Array,
    Clusters,
    Difference,
    Exponential,
    Interval,
    Logarithm,
    Proportion,
    Ratio,
    Statistic,
    draws,
    interval,
)
from jobs.evaluation.metrics import statistic
from jobs.evaluation.metrics.acceptability import halves

RESAMPLES = 999  # of each data set of a simulation: a bound then varies by 2 % of its width
DATA_SETS = 10_000


def random(seed: int = 1) -> np.random.Generator:
    return np.random.default_rng(seed)


def sentences(count: int, shift: float = 1.5, seed: int = 1) -> list[dict[str, Any]]:
    """Sentences whose scores tell acceptable ones from others as well as `shift` says."""
    generator = random(seed)
    acceptable = generator.random(count) < 0.6
    half = halves([f"sentence {n}" for n in range(count)], acceptable.tolist())
    return [{"score": float(score), "acceptable": int(good), "half": int(each)} for score, good, each in
            zip(generator.normal(size=count) + shift * acceptable, acceptable, half, strict=True)]


def clustered(count: int, seed: int = 1) -> Clusters:
    """Rows in clusters of one to six, in no order."""
    generator = random(seed)
    return Clusters.of(generator.permutation(np.repeat(np.arange(count), generator.integers(1, 7, count))).tolist())


# Statistics.

def example(name: str, clusters: Clusters, seed: int = 1) -> Statistic:
    generator, rows = random(seed), len(clusters.of_row)
    first, second = generator.gamma(2.0, size=(2, rows))
    sizes = generator.integers(1, 30, rows).astype(np.float64)
    if name.startswith("acceptability"):
        return statistic(name, sentences(rows), clusters)
    made: dict[str, Callable[[], Statistic]] = {
        "mean": lambda: Ratio.mean(first, clusters),
        "ratio": lambda: Ratio.of(first, sizes, clusters),
        "exponential": lambda: Exponential(Ratio.of(first, sizes, clusters)),
        "logarithm": lambda: Logarithm(Ratio.of(first, sizes, clusters)),
        "difference": lambda: Difference(Ratio.mean(first, clusters), Ratio.mean(second, clusters)),
        "log ratio": lambda: Difference(Logarithm(Exponential(Ratio.of(first, sizes, clusters))),
                                        Logarithm(Exponential(Ratio.of(second, sizes, clusters)))),
        "perplexity": lambda: statistic("perplexity", [{"nats": nats, "tokens": size} for nats, size in
                                                       zip(first, sizes, strict=True)], clusters),
    }
    return made[name]()


EXAMPLES = ["mean", "ratio", "exponential", "logarithm", "difference", "log ratio", "perplexity", "acceptability_mcc",
            "acceptability_accuracy"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_slopes_are_the_derivatives_by_how_often_a_cluster_counts(name: str) -> None:
    """So small a change moves no threshold of acceptability: its slopes are those with fixed thresholds."""
    clusters = clustered(40)
    found, counts = example(name, clusters), next(draws(40, 5))
    _, slopes = found(counts)
    for cluster in range(40):
        step = np.zeros_like(counts)
        step[:, cluster] = 1e-6
        more, less = found(counts + step)[0], found(counts - step)[0]
        assert slopes[:, cluster] == pytest.approx((more - less) / 2e-6, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("key", ["rougeL", "perplexity", "bits_per_byte", "acceptability_mcc"])
def test_to_count_a_cluster_twice_is_to_have_its_rows_twice(key: str) -> None:
    clusters, generator = clustered(25), random()
    rows = [row | {"rougeL": generator.random(), "nats": generator.gamma(9), "special_nats": 0.5,
                   "tokens": int(generator.integers(1, 9)), "bytes": int(generator.integers(9, 90))}
            for row in sentences(len(clusters.of_row))]
    for counts in next(draws(25, 4)):
        repeated = [n for n, cluster in enumerate(clusters.of_row) for _ in range(int(counts[cluster]))]
        other = Clusters.of([int(clusters.of_row[n]) for n in repeated])
        drawn = statistic(key, [rows[n] for n in repeated], other)(np.ones((1, other.count)))[0][0]
        assert statistic(key, rows, clusters)(counts[None])[0][0] == pytest.approx(drawn)


def test_draws_are_of_whole_clusters_with_replacement_and_the_same_each_time() -> None:
    for clusters in (1, 30, 300_000):
        resamples = 500 if clusters < 1000 else 3
        counts = np.concatenate(list(draws(clusters, resamples)))
        assert counts.shape == (resamples, clusters) and (counts.sum(axis=1) == clusters).all()
        assert np.array_equal(counts, np.concatenate(list(draws(clusters, resamples))))
        if clusters > 1:
            assert (counts == 0).mean() == pytest.approx(math.exp(-1), abs=0.02)
            assert counts.var() == pytest.approx(1, rel=0.1)


def test_draws_are_those_of_a_fixed_seed_however_many_are_made_at_once_or_kept(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """The same on every machine: numpy promises that a generator's numbers stay."""
    drawn = np.random.default_rng(2026).integers(30, size=(5, 30))
    expected = np.array([np.bincount(row, minlength=30) for row in drawn])
    assert np.array_equal(np.concatenate(list(draws(30, 5))), expected)
    monkeypatch.setattr(confidence, "KEPT", 30 * 5 - 1)
    monkeypatch.setattr(confidence, "_kept", None)
    for block in (60, 1):
        monkeypatch.setattr(confidence, "BLOCK", block)
        blocks = list(draws(30, 5))
        assert [len(each) for each in blocks] == ([2, 2, 1] if block == 60 else [1] * 5)
        assert np.array_equal(np.concatenate(blocks), expected) and blocks[0].dtype == np.float64
    assert next(confidence._drawn(30, 5)).dtype == np.uint8, "what is kept takes a byte each"


def test_where_nothing_is_positive_there_is_no_logarithm_and_without_draws_nothing_is_known() -> None:
    clusters = Clusters.of(range(2))
    for value in (0.0, -1.0):
        with np.errstate(all="ignore"):
            assert math.isnan(Logarithm(Ratio.mean([value] * 2, clusters))(np.ones((1, 2)))[0][0])
    assert confidence._quantiles(np.array([math.nan]), 20, 0.95) == (math.inf, -math.inf)


def test_rows_count_as_often_as_their_cluster() -> None:
    counts = np.array([[2.0, 0.0, 1.0]])
    assert Clusters.of("abc").of_rows(counts).tolist() == [[2, 0, 1]]
    assert Clusters.of("abcab").of_rows(counts).tolist() == [[2, 0, 1, 2, 0]]
    assert Clusters.of("abcab").of_clusters(np.array([[1.0, 2.0, 4.0, 8.0, 16.0]])).tolist() == [[9, 18, 4]]


# Others compute the same.

def by_hand(values: Callable[[Array], float], clusters: int, level: float, low: float, high: float) -> Interval:
    """The studentized bootstrap in a loop: values of data whose clusters count so often, errors by brute force (the
    jackknife: a cluster less, one by one)."""
    def error(counts: Array) -> float:
        less = [values(counts - np.eye(clusters)[c]) for c in range(clusters) for _ in range(int(counts[c]))]
        return float(np.sqrt((clusters - 1) * np.var(less)))

    once = np.ones(clusters)
    value, own = values(once), error(once)
    distances = [(values(counts) - value) / error(counts) for block in draws(clusters, 400) for counts in block]
    student = float(scipy.stats.t.ppf(level, clusters - 1))
    level = float(scipy.stats.norm.cdf(student * math.sqrt(clusters / (clusters - 1))))
    ordered = np.sort(distances)
    up, down = (float(ordered[place]) for place in (math.ceil(level * 399), math.floor((1 - level) * 399)))
    return Interval(value, max(value - max(up, student) * own, low), min(value - min(down, -student) * own, high))


@pytest.mark.parametrize("name", ["mean", "perplexity", "log ratio"])
def test_a_plain_loop_gives_the_same_interval(name: str) -> None:
    clusters = clustered(30)
    found = example(name, clusters)
    slow = by_hand(lambda counts: float(found(counts[None])[0][0]), 30, 0.95, -math.inf, math.inf)
    fast = interval(found, 30, 0.95, resamples=400)
    assert fast.value == slow.value
    # The jackknife and the derivatives differ by about 1 / clusters.
    assert fast.low == pytest.approx(slow.low, abs=0.08 * (slow.value - slow.low))
    assert fast.high == pytest.approx(slow.high, abs=0.08 * (slow.high - slow.value))


def test_scipy_computes_the_same_value_error_and_distribution() -> None:
    """scipy has no studentized bootstrap: what goes into it is compared, and of much data, of which all bootstraps say
    the same, the bounds."""
    first, second = random().gamma(2.0, size=(2, 400))
    clusters = Clusters.of(range(400))
    found = interval(Difference(Ratio.mean(first, clusters), Ratio.mean(second, clusters)), 400, 0.95)
    others = scipy.stats.bootstrap((first, second), lambda a, b, axis: a.mean(axis) - b.mean(axis), paired=True,
                                   confidence_level=0.9, method="BCa", rng=random())
    assert found.value == pytest.approx(first.mean() - second.mean(), rel=1e-12)
    width = others.confidence_interval.high - others.confidence_interval.low
    assert found.low == pytest.approx(others.confidence_interval.low, abs=0.04 * width)
    assert found.high == pytest.approx(others.confidence_interval.high, abs=0.04 * width)
    _, slopes = Difference(Ratio.mean(first, clusters), Ratio.mean(second, clusters))(np.ones((1, 400)))
    assert confidence._errors(np.ones((1, 400)), slopes)[0] == pytest.approx(others.standard_error, rel=0.02)


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99, 0.999])
@pytest.mark.parametrize("freedom", [10, 19, 72, 1000])
def test_the_quantiles_of_students_t_are_those_of_scipy(level: float, freedom: int) -> None:
    assert confidence.student_t(level, freedom) == pytest.approx(scipy.stats.t.ppf(level, freedom), rel=1e-3)


@pytest.mark.parametrize("z", [0.3, 1.0, 2.5])
def test_the_expansion_of_students_t_is_the_published_one(z: float) -> None:
    """Abramowitz and Stegun 1964, 26.7.5: coefficients by power, highest first."""
    published = [np.polyval(each, z) / below for each, below in (
        ([1, 0], 1), ([1, 0, 1, 0], 4), ([5, 0, 16, 0, 3, 0], 96), ([3, 0, 19, 0, 17, 0, -15, 0], 384),
        ([79, 0, 776, 0, 1482, 0, -1920, 0, -945, 0], 92160))]
    found = confidence.student_t(NormalDist().cdf(z), 1)  # with one degree of freedom all terms weigh the same
    assert found == pytest.approx(sum(published), rel=1e-9)


def test_the_error_of_a_few_clusters_is_that_of_the_jackknife() -> None:
    assert confidence._errors(np.ones((1, 2)), np.array([[0.5, -0.5]])) == pytest.approx([1.0])
    assert confidence._errors(np.array([[2.0, 0.0], [1.0, 1.0]]), np.array([[3.0, 9.0], [1.0, 2.0]])) == pytest.approx(
        [6.0, math.sqrt(10)])
    assert confidence._errors(np.ones((1, 1)), np.array([[3.0]])) == pytest.approx([3.0])


def test_draws_without_spread_that_say_the_same_are_as_near_as_can_be() -> None:
    """Were they left out, or far away, a few draws that differ would decide the bounds."""
    def steps(counts: Array) -> tuple[Array, Array]:
        """The value of the data by 50 more where the first cluster is drawn three times; mostly without any spread."""
        often, data = counts[:, 0], (counts == 1).all(axis=1)
        slopes = np.where(data | (often >= 2), 1.0, 0.0)[:, None] * np.where(np.arange(20) % 2, 1.0, -1.0)
        more = np.where(often >= 3, 50.0, np.where(often == 2, 0.0, 1e-7))  # 1e-7 is rounding at a million
        return 1e6 + np.where(data, 0.0, more), slopes

    found, error = interval(steps, 20, 0.8), math.sqrt(20 * 20 / 19)
    away = scipy.stats.t.ppf(0.8, 19) * error
    assert (found.value, found.low, found.high) == pytest.approx((1e6, 1e6 - away, 1e6 + away), rel=0, abs=1e-3)


def test_ten_thousand_resamples_of_ten_thousand_records_take_seconds() -> None:
    first, second = random().gamma(2.0, size=(2, 10_000))
    clusters, started = Clusters.of(range(10_000)), time.process_time()
    interval(Difference(Ratio.mean(first, clusters), Ratio.mean(second, clusters)), 10_000, 0.95, resamples=10_000)
    assert time.process_time() - started < 10, "0.6 s on the machine where this was written"


# Simulations.

def bounds(values: Array, level: float = 0.95) -> tuple[Array, Array]:
    """The bounds of the mean of each of many data sets: (data sets, clusters) -> low and high."""
    return ratio_bounds(values, np.ones_like(values), level)


def ratio_bounds(above: Array, below: Array, level: float = 0.95) -> tuple[Array, Array]:
    """As `interval` of `Ratio`, for many data sets at once."""
    clusters = above.shape[1]
    counts = np.concatenate(list(draws(clusters, RESAMPLES))).T
    low, high = np.empty(len(above)), np.empty(len(above))
    with np.errstate(all="ignore"):
        for first in range(0, len(above), 1000):
            a, b = above[first:first + 1000], below[first:first + 1000]
            value = (a.sum(axis=1) / b.sum(axis=1))[:, None]
            a = a - value * b  # so that the value is 0
            correction = math.sqrt(clusters / (clusters - 1))
            error = correction * np.sqrt((a**2).sum(axis=1)) / b.sum(axis=1)
            total = b @ counts
            away = (a @ counts) / total
            squares = (a**2) @ counts - 2 * away * ((a * b) @ counts) + away**2 * ((b**2) @ counts)
            errors = correction * np.sqrt(np.maximum(squares, 0)) / total
            errors[errors < 1e-7 * error[:, None]] = 0
            distances = np.where(np.abs(away) <= 1e-9 * error[:, None], 0, away / errors)
            student = float(scipy.stats.t.ppf(level, clusters - 1))
            expanded = float(scipy.stats.norm.cdf(student * correction))
            up = np.maximum(np.quantile(distances, expanded, axis=1, method="higher"), student)
            down = np.minimum(np.quantile(distances, 1 - expanded, axis=1, method="lower"), -student)
            constant = error <= 1e-12 * np.maximum(1, np.abs(value[:, 0]))
            share = 1 - (1 - level) ** (1 / clusters)  # of differences, which are from -1 to 1
            low[first:first + 1000] = np.where(constant, value[:, 0] - share * (value[:, 0] + 1),
                                               value[:, 0] - up * error)
            high[first:first + 1000] = np.where(constant, value[:, 0] + share * (1 - value[:, 0]),
                                                value[:, 0] - down * error)
    return low, high


def test_the_simulations_compute_what_the_evaluation_does() -> None:
    above, below = random().gamma(2.0, size=(2, 5, 40))
    low, high = ratio_bounds(above, below)
    clusters = Clusters.of(range(40))
    for n in range(5):
        found = interval(Ratio.of(above[n], below[n], clusters), 40, 0.95, resamples=RESAMPLES)
        assert (found.low, found.high) == pytest.approx((low[n], high[n]), rel=1e-6)


def rare(share: float) -> Callable[[np.random.Generator, int], Array]:
    """Gains and losses of 1, as rare as each other: of exact matches, most stay as they were."""
    def values(generator: np.random.Generator, clusters: int) -> Array:
        drawn = generator.random((DATA_SETS, clusters))
        return (drawn < share).astype(np.float64) - (drawn > 1 - share).astype(np.float64)
    return values


def right(share: float) -> Callable[[np.random.Generator, int], Array]:
    """Shares that are right, less what is expected."""
    return lambda generator, clusters: (generator.random((DATA_SETS, clusters)) < share).astype(np.float64) - share


NULL: dict[str, Callable[[np.random.Generator, int], Array]] = {
    "normal": lambda generator, n: generator.normal(size=(DATA_SETS, n)) / 10,
    "heavy tails": lambda generator, n: generator.standard_t(3, (DATA_SETS, n)) / 10,
    "two peaks": lambda generator, n: generator.beta(0.5, 0.5, (DATA_SETS, n)) - 0.5,
    "mostly near 1": lambda generator, n: generator.beta(5, 0.5, (DATA_SETS, n)) - 5 / 5.5,
    "mostly near 0": lambda generator, n: generator.beta(0.5, 5, (DATA_SETS, n)) - 0.5 / 5.5,
    "skewed losses": lambda generator, n: 1 - generator.exponential(size=(DATA_SETS, n)),
    "skewed gains": lambda generator, n: generator.exponential(size=(DATA_SETS, n)) - 1,
    "half are right": right(0.5),
    "nine of ten are right": right(0.9),
    "nearly all are right": right(0.98),
    "a tenth changed": rare(0.05),
    "nearly none changed": rare(0.01),
}
# Of 10,000 data sets, 5 % varies by 0.22 % (one standard error): 5.7 % is three of these above.
FALSE_PROMOTIONS = 0.057


@pytest.mark.parametrize("clusters", [20, 50, 200])
@pytest.mark.parametrize("name", NULL)
def test_an_adapter_that_is_no_better_passes_at_most_as_often_as_the_confidence_allows(
        name: str, clusters: int) -> None:
    """`min_gain: 0` when the true gain is 0, in 10,000 simulated evaluations with 999 resamples each."""
    low, _ = bounds(NULL[name](random(clusters), clusters))
    assert (low > 1e-9).mean() <= FALSE_PROMOTIONS


@pytest.mark.parametrize(("clusters", "found"), [(20, 0.09), (50, 0.075), (200, 0.065)])
def test_rare_and_extreme_losses_are_missed_as_often_as_the_documentation_says(clusters: int, found: float) -> None:
    values = math.exp(0.5) - random(clusters).lognormal(0, 1, (DATA_SETS, clusters))
    assert (bounds(values)[0] > 0).mean() == pytest.approx(found, abs=0.01)


def simulated(generator: np.random.Generator, clusters: int, sizes: Array, data_sets: int) -> tuple[Array, Array]:
    """Sums of each cluster of records that are alike in a cluster: of values of mean 0, and of how many there are."""
    shared = generator.normal(size=(data_sets, clusters))
    own = generator.normal(size=(data_sets, clusters)) * np.sqrt(sizes)
    return sizes * shared + own, np.broadcast_to(sizes, (data_sets, clusters))


@pytest.mark.parametrize("clusters", [20, 60])
def test_records_of_a_cluster_that_are_alike_promise_no_more(clusters: int) -> None:
    """Clusters of 1 to 12 records, which share half of their variance."""
    generator = random(3)
    sizes = generator.integers(1, 13, clusters).astype(float)
    low, high = ratio_bounds(*simulated(generator, clusters, sizes, 5000))
    assert (low > 0).mean() <= FALSE_PROMOTIONS + 0.004 and (high < 0).mean() <= FALSE_PROMOTIONS + 0.004


def test_to_ignore_the_clusters_would_promise_too_much() -> None:
    generator = random(4)
    of_row = np.repeat(np.arange(30), generator.integers(1, 9, 30))
    shared = generator.normal(size=(2000, 30))[:, of_row]
    rows = shared + generator.normal(size=shared.shape)
    assert (bounds(rows)[0] > 0).mean() > 0.15
    sums = np.stack([rows[:, of_row == c].sum(axis=1) for c in range(30)], axis=1)
    sizes = np.broadcast_to(np.bincount(of_row).astype(float), sums.shape)
    assert (ratio_bounds(sums, sizes)[0] > 0).mean() <= 0.07


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("kind", ["mean", "ratio", "difference", "log ratio"])
def test_bounds_hold_as_often_as_they_promise(kind: str, grouped: bool) -> None:
    """Each in 95 % of cases, for values as the metrics have them, through `interval` itself."""
    generator, data_sets = random(5), 600
    held = np.zeros(2)
    for _ in range(data_sets):
        clusters = Clusters.of(np.repeat(np.arange(40), generator.integers(1, 6, 40) if grouped else 1).tolist())
        rows = len(clusters.of_row)
        hard = generator.normal(size=40)[clusters.of_row]  # a cluster is hard for both models
        tokens = generator.integers(5, 40, rows).astype(np.float64)
        first, second = (tokens * np.exp(mean + 0.3 * hard + 0.2 * generator.normal(size=rows)) for mean in (0.5, 0.2))
        spread = math.exp((0.3**2 + 0.2**2) / 2)
        pairs: dict[str, tuple[Statistic, float]] = {
            "mean": (Ratio.mean(generator.beta(2, 2, rows) + 0.1 * hard, clusters), 0.5),
            "ratio": (Ratio.of(first, tokens, clusters), math.exp(0.5) * spread),
            "difference": (Difference(Ratio.of(first, tokens, clusters), Ratio.of(second, tokens, clusters)),
                           (math.exp(0.5) - math.exp(0.2)) * spread),
            "log ratio": (Difference(Logarithm(Ratio.of(first, tokens, clusters)),
                                     Logarithm(Ratio.of(second, tokens, clusters))), 0.3),
        }
        found, truth = pairs[kind]
        bound = interval(found, 40, 0.95, resamples=299)
        held += bound.low <= truth, bound.high >= truth
    # 600 data sets: one standard error is 0.9 %.
    assert (held / data_sets >= 0.95 - 0.027).all() and (held / data_sets <= 0.985).all()


def test_power_grows_with_evidence() -> None:
    """A true gain of half a standard deviation passes `min_gain: 0` nearly as often as the best test of normal values
    would let it pass (by the non-central t distribution): with 100 records nearly always."""
    passed = []
    for clusters in (20, 25, 50, 100):
        values = random(clusters).normal(0.5, 1, (4000, clusters))
        passed.append(float((bounds(values)[0] > 0).mean()))
        best = scipy.stats.nct.sf(scipy.stats.t.ppf(0.95, clusters - 1), clusters - 1, 0.5 * math.sqrt(clusters))
        assert best - 0.08 <= passed[-1] <= best + 0.02
    assert passed == sorted(passed) and passed[-1] > 0.99


@pytest.mark.parametrize("values", [0.0, 0.5, 1.0])
def test_where_all_clusters_say_the_same_the_rule_of_three_holds(values: float) -> None:
    found = interval(Ratio.mean([values] * 60, Clusters.of(range(60))), 60, 0.95, low=0.0, high=1.0)
    share = 1 - 0.05 ** (1 / 60)
    assert share == pytest.approx(3 / 60, rel=0.05)
    assert (found.low, found.high) == pytest.approx((values - share * values, values + share * (1 - values)))
    noisy = [1e9 + values, 1e9 + values + 2e-7] * 30  # differ by what numbers of this size are rounded by
    found = interval(Ratio.mean(noisy, Clusters.of(range(60))), 60, 0.95, low=0.0, high=2e9)
    assert found.low == pytest.approx(1e9 * (1 - share))
    unbounded = interval(Ratio.mean([values] * 60, Clusters.of(range(60))), 60, 0.95)
    assert (unbounded.low, unbounded.high) == (-math.inf, math.inf)


def test_one_cluster_and_values_that_are_not_finite_are_bounded_by_nothing() -> None:
    alone = interval(Ratio.mean([0.3, 0.7], Clusters.of(["a", "a"])), 1, 0.95, low=0.0, high=1.0)
    assert (alone.value, alone.low, alone.high) == pytest.approx((0.5, 0.025, 0.975))
    nothing = interval(Ratio.mean([math.nan, 0.7], Clusters.of("ab")), 2, 0.95)
    assert all(map(math.isnan, (nothing.value, nothing.low, nothing.high)))


def test_an_increasing_function_of_a_value_has_the_bounds_that_it_makes_of_them() -> None:
    assert Interval(2.0, 1.0, 4.0).map(lambda value: value * value) == Interval(4.0, 1.0, 16.0)


def test_bounds_stay_within_what_is_possible() -> None:
    few = interval(Ratio.mean([1.0] * 19 + [0.9], Clusters.of(range(20))), 20, 0.99, low=0.0, high=1.0)
    assert 0.0 <= few.low < few.value < few.high <= 1.0


# Shares.

def clopper_pearson(hits: float, trials: int, more: float, level: float) -> tuple[float, float]:
    """The lower bound of so many hits and the upper one of `more`, by scipy."""
    return (float(scipy.stats.beta.ppf(1 - level, hits, trials - hits + 1)) if hits else 0.0,
            float(scipy.stats.beta.ppf(level, more + 1, trials - more)) if more < trials else 1.0)


@pytest.mark.parametrize(("share", "trials", "level", "low", "high"), [
    (0.0, 7, 0.95, 0, 0), (1.0, 7, 0.95, 7, 7), (0.3, 10, 0.95, 3, 3), (0.3, 10, 0.8, 3, 3),
    (0.7, 1000, 0.99, 700, 700), (0.25, 10, 0.95, 2, 3), (0.01, 10, 0.9, 0, 1), (0.0, 1, 0.95, 0, 0),
    (1 / 3, 3, 0.95, 1, 1)])
def test_a_share_is_bounded_as_scipy_does_and_what_is_no_whole_hit_makes_the_bounds_wider(
        share: float, trials: int, level: float, low: int, high: int) -> None:
    found = confidence.exact_bounds(share, trials, level)
    assert found == pytest.approx(clopper_pearson(low, trials, high, level), abs=1e-8)


@pytest.mark.parametrize(("rows", "trials"), [
    ([[1, 0, 0, 1], [0, 0, 0], [1], [0, 1], [0, 0]], None),  # they differ: by the design effect
    ([[0, 0, 0, 1], [0, 0, 1, 1]], None),
    ([[0, 1]] * 8 + [[0, 1, 1]], 19),  # clusters are more alike than rows: no surer than that many rows
    ([[1], [0], [0], [0]], 4),  # one row each
    ([[0, 1]] * 9, 9),  # all clusters say the same
])
def test_a_share_of_clustered_rows_is_as_sure_as_that_of_fewer_rows(
        rows: list[list[float]], trials: int | None) -> None:
    """Korn and Graubard 1998: as many as have the same variance."""
    values = [value for cluster in rows for value in cluster]
    clusters = Clusters.of([n for n, cluster in enumerate(rows) for _ in cluster])
    share, count = sum(values) / len(values), len(rows)
    if trials is None:
        residuals = sum((sum(cluster) - share * len(cluster)) ** 2 for cluster in rows)
        variance = residuals / len(values) ** 2 * count / (count - 1)
        trials = int(min(len(values), share * (1 - share) / variance))
    found = interval(Proportion.mean(values, clusters), count, 0.95)
    assert found.value == pytest.approx(share)
    assert (found.low, found.high) == confidence.exact_bounds(found.value, trials, 0.95)


def test_a_share_that_is_no_number_has_no_bounds() -> None:
    found = interval(Proportion.mean([math.nan, 1.0], Clusters.of("ab")), 2, 0.95)
    assert all(map(math.isnan, (found.value, found.low, found.high)))


def test_a_statistic_may_know_bounds_that_hold_in_any_case() -> None:
    """Those of an area under a curve, for one: with draws without any spread, they are all that is known."""
    class Known(Ratio):
        def within(self, confidence: float) -> tuple[float, float]:
            return 0.5 - confidence / 10, 0.9

    clusters = Clusters.of(range(20))
    found = interval(Known.mean([0.5] * 20, clusters), 20, 0.95, low=0.0, high=1.0)
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.405, 0.9))
    wide = [0.0, 1.0] * 10
    found = interval(Known.mean(wide, clusters), 20, 0.95)
    assert (found.low, found.value) == pytest.approx((0.405, 0.5)) and 0.5 < found.high < 0.9
    assert interval(Ratio.mean(wide, clusters), 20, 0.95).low < 0.4


# Through the gate.

def test_a_gate_promotes_an_adapter_that_is_no_better_in_at_most_5_percent() -> None:
    """`evaluate_gate` itself, with records in groups that change alike, and all 10,000 resamples."""
    evaluation = Evaluation.model_validate({"gate": {"rougeL": {"min_gain": 0.0}}})
    clusters: list[gate.Cluster] = [("group", n // 2) for n in range(60)]
    generator, passed, data_sets = random(6), 0, 300
    for _ in range(data_sets):
        hard = np.repeat(generator.normal(0, 0.1, 30), 2)
        change = np.repeat(generator.normal(0, 0.1, 30), 2)
        models = {role: {"records": [
            {"line": line, **dict.fromkeys(("rouge1", "rouge2", "rougeL", "rougeLsum"), 0.5 + value)}
            for line, value in enumerate(hard + sign * change + generator.normal(0, 0.05, 60), 1)], "sentences": []}
            for role, sign in (("base", -0.5), ("fine_tuned", 0.5))}
        (check,) = gate.evaluate_gate(evaluation, models, clusters)
        passed += check.passed
    assert passed / data_sets <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / data_sets)
    assert passed, "it can pass"


# Acceptability.

def population_mcc(shift: float) -> float:
    """The highest correlation that any threshold has, of infinitely many such sentences."""
    limits = np.linspace(-3, 4, 2001)
    tp, fp = 0.6 * scipy.stats.norm.sf(limits - shift), 0.4 * scipy.stats.norm.sf(limits)
    fn, tn = 0.6 - tp, 0.4 - fp
    return float(((tp * tn - fp * fn) / np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))).max())


def test_the_interval_of_acceptability_covers_the_choice_of_the_threshold() -> None:
    """The drop of the correlation, each model with thresholds of its own, against that of infinitely many sentences."""
    count, data_sets, generator = 300, 400, random(7)
    truth = population_mcc(1.5) - population_mcc(1.2)
    clusters, held = Clusters.of(range(count)), np.zeros(2)
    for _ in range(data_sets):
        acceptable = generator.random(count) < 0.6
        common, half = generator.normal(size=count), np.zeros(count, dtype=bool)
        for label in (True, False):
            half[np.flatnonzero(acceptable == label)[::2]] = True
        first, second = (statistic("acceptability_mcc", [
            {"score": score, "acceptable": good, "half": each} for score, good, each in
            zip(0.9 * common + math.sqrt(0.19) * generator.normal(size=count) + shift * acceptable, acceptable, half,
                strict=True)], clusters) for shift in (1.5, 1.2))
        found = interval(Difference(first, second), count, 0.95, low=-2.0, high=2.0, resamples=299)
        held += found.low <= truth, found.high >= truth
    assert (held / data_sets >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / data_sets)).all()
