"""The metrics: a module for each entry of the registry (jobs/core/metrics.py), with two functions.

- `rows(measurements)` returns the values of each member of the metric's population, a mapping of numbers each, or None
  for a member that it cannot measure (a text without a question). They are kept in the scores artifact, in
  records.jsonl or sentences.jsonl.
- `statistic(key, rows, clusters)` returns the value of one score over such rows as a function of how often each
  cluster of them counts (jobs/evaluation/confidence.py): from it follow the value of all and its interval.

A task (jobs/evaluation/tasks.py) has prompts of its own, so its module has `statistic` alone.

The classes `Perplexity`, `Rouge` and `Acceptability` are the same as `evaluate.Metric`, for other programs.
(`evaluate.load("rouge")` downloads a script from the hub.) The modules are imported late: they take seconds.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

from jobs.core.metrics import Metric, metric_of
from jobs.data.encoding import Record

if TYPE_CHECKING:
    import evaluate

    from jobs.evaluation.confidence import Clusters, Statistic

Row = Mapping[str, Any]  # the numbers of one record or sentence, as they are kept


class Likelihood(NamedTuple):
    """A negative log-likelihood in nats, and over how many tokens."""

    nats: float
    tokens: int
    special: float = 0.0  # the nats of special tokens, such as the end token: they are no text


@dataclass(frozen=True)
class Measurements:
    """What one model did with the held-out data; every metric is computed from it."""

    records: Sequence[Record]
    likelihoods: Sequence[Likelihood]  # of each record's answers
    answers: Sequence[str | None]  # the model's own answer to each record's question; None where there is none
    sentences: Sequence[tuple[str, bool]]  # and whether each is acceptable
    sentence_likelihoods: Sequence[Likelihood]


class Implementation(Protocol):
    """What a metric's module has."""

    def rows(self, measurements: Measurements) -> Sequence[Row | None]: ...

    def statistic(self, key: str, rows: Sequence[Row], clusters: Clusters) -> Statistic: ...


def implementation(metric: Metric) -> Implementation:
    """The module of a metric."""
    return cast(Implementation, importlib.import_module(f"{__name__}.{metric.module}"))


def statistic(key: str, rows: Sequence[Row], clusters: Clusters) -> Statistic:
    """A score by its key over `rows`, as a function of how often each cluster counts. A value that was kept as None was
    no finite number, and makes the score none."""
    numbers = [{name: math.nan if value is None else value for name, value in row.items()} for row in rows]
    return implementation(metric_of(key)).statistic(key, numbers, clusters)


def compute(metric: type[evaluate.Metric], **inputs: Any) -> dict[str, float]:
    """Compute one `evaluate.Metric` over columns of inputs (equally long lists, by the names in its docstring).

    `evaluate` makes a cache folder in the home directory, even for data kept in memory: a pod's home is read-only.
    """
    with TemporaryDirectory(prefix="metric-") as cache:
        result: dict[str, float] = metric(cache_dir=cache, keep_in_memory=True).compute(**inputs)
    return result
