"""Acceptability: does the model still tell English from broken English? A guard against catastrophic forgetting."""

from __future__ import annotations

import hashlib
import math

import datasets
import evaluate
import numpy as np

from jobs.core.errors import UserError
from jobs.evaluation.metrics import Measurements, compute

_DESCRIPTION = """\
Linguistic acceptability on a CoLA-like set of judged sentences (Warstadt et al. 2019, Neural Network Acceptability
Judgments). A language model classifies them with no training for it: a sentence's score is its mean token
log-probability (Lau et al. 2017, Grammaticality, Acceptability, and Probability, "Mean LP"), and it is called
acceptable from a threshold up. The threshold is chosen on one half of the set, to maximise Matthews correlation, and
measured on the other half.
"""
_INPUTS = """
Args:
    texts: the sentences; their sha256 decides the halves, so the order of the set does not matter.
    predictions: each sentence's score.
    references: whether each sentence is acceptable.
Returns:
    acceptability_mcc: Matthews correlation on the measured half, -1 to 1, higher is better, 0 is chance.
    acceptability_accuracy: share of the measured half classified correctly, 0 to 1.
    acceptability_threshold: the score from which a sentence is called acceptable.
"""


def measure(measurements: Measurements) -> dict[str, float | None]:
    """Acceptability from the sentences' likelihoods; a sentence's score is the mean log-probability of a token.

    Raises:
        UserError: when a class has too few sentences.
    """
    try:
        return {**compute(Acceptability, texts=[text for text, _ in measurements.sentences],
                          predictions=[-each.nats / each.tokens for each in measurements.sentence_likelihoods],
                          references=[acceptable for _, acceptable in measurements.sentences])}
    except ValueError as error:
        raise UserError(f"evaluation.acceptability: {error} of two tokens or more") from None


class Acceptability(evaluate.Metric):  # type: ignore[misc]
    """Columns `texts`, `predictions` and `references` -> `acceptability_mcc`, `_accuracy` and `_threshold`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation="", inputs_description=_INPUTS,
            features=datasets.Features({"texts": datasets.Value("string"), "predictions": datasets.Value("float64"),
                                        "references": datasets.Value("bool")}))

    def _compute(self, texts: list[str], predictions: list[float], references: list[bool]) -> dict[str, float]:
        scores, acceptable = np.asarray(predictions, dtype=np.float64), np.asarray(references, dtype=bool)
        if not np.isfinite(scores).all():  # a damaged model; comparisons with NaN would give classes without an error
            return dict.fromkeys(("acceptability_mcc", "acceptability_accuracy", "acceptability_threshold"), math.nan)
        choosing = choosing_half(texts, references)
        threshold = best_threshold(scores[choosing], acceptable[choosing])
        accepted, truth = scores[~choosing] >= threshold, acceptable[~choosing]
        tp, fp = int((accepted & truth).sum()), int((accepted & ~truth).sum())
        fn, tn = int((~accepted & truth).sum()), int((~accepted & ~truth).sum())
        return {"acceptability_mcc": float(matthews(tp, fp, fn, tn)),
                "acceptability_accuracy": (tp + tn) / (tp + fp + fn + tn),
                "acceptability_threshold": threshold}


def choosing_half(texts: list[str], acceptable: list[bool]) -> np.ndarray:
    """Which sentences choose the threshold: every other one of each class, in order of the text's sha256.

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


def best_threshold(scores: np.ndarray, acceptable: np.ndarray) -> float:
    """The threshold with the highest Matthews correlation; of equals the most accurate, then the lowest.

    Candidates lie midway between neighbouring scores (and at the lowest score, which accepts everything).
    """
    order = np.argsort(scores)
    scores, acceptable = scores[order], acceptable[order]
    fn = np.concatenate([[0], np.cumsum(acceptable)])[:-1]  # acceptable sentences below candidate i
    tn = np.concatenate([[0], np.cumsum(~acceptable)])[:-1]
    tp, fp = acceptable.sum() - fn, (~acceptable).sum() - tn
    candidates = np.concatenate([scores[:1], (scores[:-1] + scores[1:]) / 2])
    possible = np.concatenate([[True], scores[1:] > scores[:-1]])  # a threshold cannot separate equal scores
    ranking = np.lexsort((-np.arange(len(scores)), tp + tn, matthews(tp, fp, fn, tn), possible))
    return float(candidates[ranking[-1]])


def matthews(tp: np.ndarray | int, fp: np.ndarray | int, fn: np.ndarray | int, tn: np.ndarray | int) -> np.ndarray:
    """Matthews correlation (Matthews 1975) of a 2x2 table, or of many; 0 where a row or column is empty."""
    tp, fp, fn, tn = (np.asarray(count, dtype=np.float64) for count in (tp, fp, fn, tn))
    product: np.ndarray = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    correlation: np.ndarray = np.divide(tp * tn - fp * fn, product, out=np.zeros_like(product), where=product > 0)
    return correlation
