"""Perplexity, ROUGE and acceptability as classes of `evaluate`, for other programs: what the evaluation computes too.

    from jobs.evaluation.metrics.reusable import Rouge

    Rouge().compute(predictions=["a hotel in Seville"], references=["the hotel in Seville"])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import datasets
import evaluate
import numpy as np

from jobs.evaluation.confidence import Clusters
from jobs.evaluation.metrics import Implementation, Row, acceptability, perplexity, rouge


class _Reusable(evaluate.Metric):  # type: ignore[misc]
    """A metric whose `INPUTS` name its columns and their types."""

    INPUTS: ClassVar[dict[str, str]]

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__, citation="", inputs_description="",
            features=datasets.Features({name: datasets.Value(kind) for name, kind in self.INPUTS.items()}))


class Perplexity(_Reusable):
    """Perplexity (1 and up) and bits per byte (0 and up) of texts, lower is better.

    Args:
        nll: negative log-likelihood of each record's scored tokens, summed, in nats.
        special: the part of it that special tokens have, such as the end token.
        tokens: how many tokens were scored in each record.
        bytes: the UTF-8 bytes of the text that the other tokens spell, in each record.
    """

    INPUTS: ClassVar = {"nll": "float64", "special": "float64", "tokens": "int64", "bytes": "int64"}

    def _compute(self, nll: list[float], special: list[float], tokens: list[int],
                 bytes: list[int]) -> dict[str, float]:  # noqa: A002
        rows = [{"nats": total, "special_nats": apart, "tokens": scored, "bytes": size}
                for total, apart, scored, size in zip(nll, special, tokens, bytes, strict=True)]
        return {key: value_of(perplexity, key, rows) for key in ("perplexity", "bits_per_byte")}


class Rouge(_Reusable):
    """The mean F1 of ROUGE-1, ROUGE-2, ROUGE-L and ROUGE-Lsum, 0 to 1, higher is better.

    Args:
        predictions: the answers.
        references: the reference answer to each.
    """

    INPUTS: ClassVar = {"predictions": "string", "references": "string"}

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        rows = list(map(rouge.each, references, predictions))
        return {key: value_of(rouge, key, rows) for key in rouge.TYPES}


class Acceptability(_Reusable):
    """Matthews correlation (-1 to 1) and accuracy of calling sentences acceptable by their scores, higher is better.

    Args:
        texts: the sentences; their sha256 decides the halves, so the order of the set does not matter.
        predictions: each sentence's score.
        references: whether each sentence is acceptable.
    """

    INPUTS: ClassVar = {"texts": "string", "predictions": "float64", "references": "bool"}

    def _compute(self, texts: list[str], predictions: list[float], references: list[bool]) -> dict[str, float]:
        rows = [{"score": score, "acceptable": truth, "half": half} for score, truth, half
                in zip(predictions, references, acceptability.halves(texts, references), strict=True)]
        return {key: value_of(acceptability, key, rows) for key in ("acceptability_mcc", "acceptability_accuracy")}


def value_of(metric: Implementation, key: str, rows: Sequence[Row]) -> float:
    """A score over rows that each count once."""
    clusters = Clusters.of(range(len(rows)))
    return float(metric.statistic(key, rows, clusters)(np.ones((1, len(rows))))[0][0])
