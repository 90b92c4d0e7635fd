"""Acceptability: does the model still tell English from broken English? A guard against catastrophic forgetting.

Linguistic acceptability on a CoLA-like set of judged sentences (Warstadt et al. 2019, Neural Network Acceptability
Judgments). A language model classifies them with no training for it: a sentence's score is its mean token
log-probability (Lau et al. 2017, Grammaticality, Acceptability, and Probability, "Mean LP"), and it is called
acceptable from a threshold up: the one that accepts as many sentences as are acceptable, of the other half of the
sentences (cross-fitting). So no sentence takes part in choosing the threshold by which it is judged.

The threshold with the highest correlation would be the usual choice. It depends on a few sentences, so that another
sample may have quite another one: in simulations the difference of two models then varied by a third more, its interval
held in 90 % of cases instead of 95 %, and the correlation was no higher.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jobs.core.errors import UserError
from jobs.evaluation.confidence import Array, Clusters, Statistic
from jobs.evaluation.metrics import Measurements, Row


def rows(measurements: Measurements) -> Sequence[Row | None]:
    """Of each sentence: its score, whether it is acceptable, and its half, 0 or 1.

    Raises:
        UserError: when a class has too few sentences.
    """
    acceptable = [truth for _, truth in measurements.sentences]
    try:
        second = halves([text for text, _ in measurements.sentences], acceptable)
    except ValueError as error:
        raise UserError(f"evaluation.acceptability: {error} of two tokens or more") from None
    return [{"score": -each.nats / each.tokens, "acceptable": int(truth), "half": int(half)} for each, truth, half
            in zip(measurements.sentence_likelihoods, acceptable, second, strict=True)]


def statistic(key: str, rows: Sequence[Row], clusters: Clusters) -> Statistic:
    """`acceptability_mcc`: Matthews correlation, -1 to 1, 0 is chance. `acceptability_accuracy`: the share classified
    correctly, 0 to 1. Higher is better."""
    return Acceptance(np.array([row["score"] for row in rows], dtype=np.float64),
                      np.array([row["acceptable"] for row in rows], dtype=bool),
                      np.array([row["half"] for row in rows], dtype=bool), clusters, key == "acceptability_mcc")


@dataclass(frozen=True)
class Acceptance:
    """Matthews correlation (or accuracy) of the classes that the thresholds give; a `Statistic`. The thresholds are
    chosen again in every draw, so that the interval contains the luck of choosing them."""

    scores: Array
    acceptable: np.ndarray
    half: np.ndarray
    clusters: Clusters
    correlation: bool

    def __call__(self, counts: Array) -> tuple[Array, Array]:
        if not np.isfinite(self.scores).all():  # comparisons with NaN would give classes without an error
            return np.full(len(counts), np.nan), np.full(counts.shape, np.nan)
        weights = self.clusters.of_rows(counts)
        chosen = [thresholds(self.scores[rows], self.acceptable[rows], weights[:, rows])[:, None]
                  for rows in (~self.half, self.half)]
        accepted = self.scores >= np.where(self.half, *chosen)
        kept = np.where(accepted, weights, 0)
        tp, fp = kept @ self.acceptable, kept @ ~self.acceptable
        fn, tn = weights @ self.acceptable - tp, weights @ ~self.acceptable - fp
        if self.correlation:
            values, slopes = matthews(tp, fp, fn, tn), matthews_slopes(tp, fp, fn, tn)
        else:
            total = tp + fp + fn + tn
            values = (tp + tn) / total
            right, wrong = (1 - values) / total, -values / total
            slopes = [right, wrong, wrong, right]
        of_tp, of_fp, of_fn, of_tn = (slope[:, None] for slope in slopes)
        of_rows = np.where(self.acceptable, np.where(accepted, of_tp, of_fn), np.where(accepted, of_fp, of_tn))
        return values, self.clusters.of_clusters(of_rows)


def halves(texts: list[str], acceptable: list[bool]) -> np.ndarray:
    """The halves of the sentences: every other one of each class, in order of the text's sha256.

    So both halves hold both classes in the set's proportion, and the split depends on nothing but the sentences.

    Raises:
        ValueError: when a class has fewer than two sentences, one for each half.
    """
    half = np.zeros(len(texts), dtype=bool)
    for label in (True, False):
        members = [i for i, a in enumerate(acceptable) if bool(a) is label]
        if len(members) < 2:
            raise ValueError("needs at least two acceptable and two unacceptable sentences")
        members.sort(key=lambda i: hashlib.sha256(texts[i].encode()).digest())
        half[members[::2]] = True
    return half


def thresholds(scores: Array, acceptable: np.ndarray, weights: Array) -> Array:
    """The threshold that accepts as many of these sentences as are acceptable: a quantile of their scores, midway where
    it lies between two.

    Args:
        scores: of each sentence, (sentences,).
        weights: how often each sentence counts in each draw, (draws, sentences).
    Returns:
        a threshold for each draw, (draws,).
    """
    order = np.argsort(scores)
    ordered, sums = np.append(scores[order], math.inf), np.cumsum(weights[:, order], axis=1)
    rejected = (weights @ ~acceptable)[:, None]
    # The places of the lowest score above the quantile, and of the highest up to it. Weights are whole numbers.
    above, upto = ((sums < rejected + half).sum(axis=1) for half in (0.5, -0.5))
    chosen: Array = (ordered[above] + ordered[np.where(rejected[:, 0] > 0, upto, above)]) / 2
    return chosen


def matthews(tp: Array, fp: Array, fn: Array, tn: Array) -> Array:
    """Matthews correlation (Matthews 1975) of many 2x2 tables; 0 where a row or column is empty."""
    product = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    correlation: Array = np.divide(tp * tn - fp * fn, product, out=np.zeros_like(product), where=product > 0)
    return correlation


def matthews_slopes(tp: Array, fp: Array, fn: Array, tn: Array) -> list[Array]:
    """The derivatives of Matthews correlation by tp, fp, fn and tn; 0 where a row or column is empty."""
    product = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    there = product > 0
    half = matthews(tp, fp, fn, tn) / 2
    safe = np.where(there, product, 1)
    accepted, rejected, good, bad = (np.divide(half, total, out=np.zeros_like(half), where=there)
                                     for total in (tp + fp, tn + fn, tp + fn, tn + fp))
    slopes = [tn / safe - accepted - good, -fn / safe - accepted - bad, -fp / safe - rejected - good,
              tp / safe - rejected - bad]
    return [np.where(there, slope, 0) for slope in slopes]
