"""Privacy: what the adapter remembers of single records that it was trained on.

Three questions, each with numbers that a gate can bound (docs/privacy.md):
- Exposure (Carlini et al. 2019, The Secret Sharer): how likely is a canary's secret, compared with others that it might
  have had? log2(n) - log2(rank) among n of them, the mean over the canaries.
- Membership inference: can one tell, by the loss, what was trained on? The area under the ROC curve, and the true
  positive rate at 1 % false positives, as an attack that finds few records for sure is a leak that an average hides
  (Carlini et al. 2022, Membership Inference Attacks From First Principles).
- Verbatim: how many of the train records does greedy decoding continue word for word?

jobs/evaluation/privacy.py makes the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jobs.evaluation.confidence import Array, Clusters, Proportion, Ratio, Statistic, exact_bounds
from jobs.evaluation.metrics import Measurements, Row

FALSE_POSITIVES = 0.01  # the rate at which the true positive rate is measured
MINIMUM_NEGATIVES = 100  # of which at least one may be a false positive


def rows(measurements: Measurements) -> Sequence[Row | None]:
    """None of any record: privacy is measured on other records than these."""
    return [None] * len(measurements.records)


def statistic(key: str, rows: Sequence[Row], clusters: Clusters) -> Statistic:
    """A score of `PRIVACY` (jobs/core/metrics.py). Lower is better."""
    name = key.removeprefix("privacy.")
    if name == "exposure":
        return Ratio.mean([row[name] for row in rows], clusters)
    kind, _, what = name.rpartition("_")
    kind = {"membership": "record"}.get(kind, kind)
    if what == "auc":
        return AreaUnderCurve.of([row[f"{kind}_score"] for row in rows], [row["member"] for row in rows], clusters)
    return Proportion.mean([row["verbatim" if name == "verbatim" else f"{kind}_found"] for row in rows], clusters)


@dataclass(frozen=True)
class AreaUnderCurve:
    """The area under the ROC curve: the chance that of two random rows, one a member and one not, the member has the
    higher score; a tie counts half (Mann-Whitney). A `Statistic`: its derivatives are the placements of DeLong et al.
    (1988)."""

    order: np.ndarray  # of the rows by score
    group: np.ndarray  # of each row in this order: its number among the different scores
    member: np.ndarray  # of each row in this order
    clusters: Clusters
    finite: bool

    @classmethod
    def of(cls, scores: Sequence[float], member: Sequence[int], clusters: Clusters) -> AreaUnderCurve:
        values = np.array(scores, dtype=np.float64)
        order = np.argsort(values, kind="stable")
        ordered = values[order]
        group = np.cumsum(np.concatenate([[0], ordered[1:] > ordered[:-1]])[: len(ordered)])
        return cls(order, group, np.array(member, dtype=bool)[order], clusters, bool(np.isfinite(values).all()))

    def __call__(self, counts: Array) -> tuple[Array, Array]:
        if not self.finite:  # comparisons with NaN would give a rank without an error
            return np.full(len(counts), np.nan), np.full(counts.shape, np.nan)
        weights = self.clusters.of_rows(counts)[:, self.order]
        below, above = (self._placements(np.where(chosen, weights, 0)) for chosen in (~self.member, self.member))
        members = (weights * self.member).sum(axis=1, keepdims=True)
        others = (weights * ~self.member).sum(axis=1, keepdims=True)
        placed = np.where(self.member, below / others, 1 - above / members)
        values = (weights * self.member * placed).sum(axis=1, keepdims=True) / members
        slopes = np.empty_like(weights)
        slopes[:, self.order] = (placed - values) / np.where(self.member, members, others)
        return values[:, 0], self.clusters.of_clusters(slopes)

    def within(self, confidence: float) -> tuple[float, float]:
        """Bounds that hold in any case: the variance is never above that of a share in as many trials as there are
        clusters of the fewer kind (van Dantzig 1951). Draws say nothing where nearly all are told apart."""
        value = float(self(np.ones((1, self.clusters.count)))[0][0])
        kinds = [len(np.unique(self.clusters.of_row[self.order[chosen]])) for chosen in (self.member, ~self.member)]
        return exact_bounds(value, min(kinds), confidence) if self.finite and min(kinds) else (0.0, 1.0)

    def _placements(self, weights: Array) -> Array:
        """The weight below each row, and half of that of its own score."""
        starts = np.searchsorted(self.group, np.arange(self.group[-1] + 1))
        of_groups = np.add.reduceat(weights, starts, axis=1)
        placements: Array = (np.cumsum(of_groups, axis=1) - of_groups / 2)[:, self.group]
        return placements


def threshold(scores: Sequence[float]) -> float | None:
    """The lowest threshold that at most 1 % of these scores, of what was not trained on, exceed; None where they are
    too few to say."""
    allowed = int(len(scores) * FALSE_POSITIVES)
    return sorted(scores, reverse=True)[allowed] if len(scores) >= MINIMUM_NEGATIVES else None
