"""Perplexity: how surprised a model is by the held-out answers, from 1 (never) to the vocabulary's size (no idea)."""

from __future__ import annotations

import math

import datasets
import evaluate

from jobs.data.encoding import answers
from jobs.evaluation.metrics import Measurements, compute

_DESCRIPTION = """\
Perplexity is exp(mean negative log-likelihood of a token) (Jelinek et al. 1977): the mean is over all scored tokens, so
a long record weighs as much as it is long. It depends on the tokenizer. Bits per byte, the total of the tokens that are
text divided by its UTF-8 bytes, does not, and compares models whose tokenizers differ.
"""
_INPUTS = """
Args:
    nll: negative log-likelihood of each record's scored tokens, summed, in nats.
    special: the part of it that special tokens have, such as the end token.
    tokens: how many tokens were scored in each record.
    bytes: the UTF-8 bytes of the text that the other tokens spell, in each record.
Returns:
    perplexity: 1 and up, lower is better; infinite when it exceeds what a float can hold.
    bits_per_byte: 0 and up, lower is better.
"""


def measure(measurements: Measurements) -> dict[str, float | None]:
    """Perplexity and bits per byte of the records' answers."""
    return {**compute(Perplexity, nll=[each.nats for each in measurements.likelihoods],
                      special=[each.special for each in measurements.likelihoods],
                      tokens=[each.tokens for each in measurements.likelihoods],
                      bytes=[sum(len(text.encode()) for text in answers(record)) for record in measurements.records])}


class Perplexity(evaluate.Metric):  # type: ignore[misc]
    """Columns `nll`, `special`, `tokens` and `bytes`, a row a record -> `perplexity` and `bits_per_byte`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation="", inputs_description=_INPUTS,
            features=datasets.Features({"nll": datasets.Value("float64"), "special": datasets.Value("float64"),
                                        "tokens": datasets.Value("int64"), "bytes": datasets.Value("int64")}))

    def _compute(self, nll: list[float], special: list[float], tokens: list[int],
                 bytes: list[int]) -> dict[str, float]:  # noqa: A002
        total = math.fsum(nll)
        return {"perplexity": _exp(total / sum(tokens)),
                "bits_per_byte": (total - math.fsum(special)) / math.log(2) / sum(bytes)}


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
