"""Tasks: the mean value of a task's answers; of label_f1 the F1 of each label, averaged over the labels (macro F1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jobs.evaluation.confidence import Array, Clusters, Ratio, Statistic
from jobs.evaluation.metrics import Row

Numbers = np.ndarray[Any, np.dtype[np.int64]]


def statistic(key: str, rows: Sequence[Row], clusters: Clusters) -> Statistic:
    """0 to 1, higher is better. Rows that have a `label` and a `predicted` one make a macro F1, others a mean."""
    if "label" not in rows[0]:
        return Ratio.mean([row["value"] for row in rows], clusters)
    return MacroF1.of([row["label"] for row in rows], [row["predicted"] for row in rows], clusters)


@dataclass(frozen=True)
class MacroF1:
    """The F1 of each label, averaged over the labels; a `Statistic`.

    The F1 of a label is 2 hits / (records that have it + answers that name it) (van Rijsbergen 1979). Of a draw, labels
    that neither have a record in it nor are answered in it do not count, as with scikit-learn.
    """

    hits: Array  # of each label, (clusters, labels)
    named: Array  # records that have it, plus answers that name it

    @classmethod
    def of(cls, labels: Sequence[int] | Numbers, predicted: Sequence[int] | Numbers, clusters: Clusters) -> MacroF1:
        """Args:
            labels: of each record, from 0.
            predicted: the label that was answered; below 0 for an answer that is no label.
        """
        true, answered = np.array(labels), np.array(predicted)
        numbers = np.arange(max(true.max(), answered.max()) + 1)
        is_label, is_answer = (each[:, None] == numbers for each in (true, answered))
        return cls(clusters.sums((is_label & is_answer).astype(np.float64)),
                   clusters.sums(is_label.astype(np.float64) + is_answer.astype(np.float64)))

    def __call__(self, counts: Array) -> tuple[Array, Array]:
        hits, named = counts @ self.hits, counts @ self.named
        there = named > 0
        present = np.maximum(1, there.sum(axis=1, keepdims=True))
        safe = np.where(there, named, 1)
        each = 2 * hits / safe
        weight = there / safe / present
        values: Array = (each * there / present).sum(axis=1)
        return values, 2 * weight @ self.hits.T - (weight * each) @ self.named.T
