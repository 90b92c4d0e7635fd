"""Perplexity: how surprised a model is by the held-out answers, from 1 (never) to the vocabulary's size (no idea).

Perplexity is exp(mean negative log-likelihood of a token) (Jelinek et al. 1977): the mean is over all scored tokens, so
a long record weighs as much as it is long. It depends on the tokenizer. Bits per byte, the total of the tokens that are
text divided by its UTF-8 bytes, does not, and compares models whose tokenizers differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from jobs.data.encoding import answers
from jobs.evaluation.confidence import Clusters, Exponential, Ratio, Statistic
from jobs.evaluation.metrics import Measurements, Row


def rows(measurements: Measurements) -> Sequence[Row | None]:
    """Of each record: the negative log-likelihood of its scored tokens in nats, the part of it that special tokens
    have, how many tokens were scored, and the UTF-8 bytes of the text that the others spell."""
    return [{"nats": each.nats, "special_nats": each.special, "tokens": each.tokens,
             "bytes": sum(len(text.encode()) for text in answers(record))}
            for record, each in zip(measurements.records, measurements.likelihoods, strict=True)]


def statistic(key: str, rows: Sequence[Row], clusters: Clusters) -> Statistic:
    """`perplexity`: 1 and up, lower is better. `bits_per_byte`: 0 and up, lower is better."""
    if key == "perplexity":
        return Exponential(Ratio.of([row["nats"] for row in rows], [row["tokens"] for row in rows], clusters))
    return Ratio.of([(row["nats"] - row["special_nats"]) / math.log(2) for row in rows],
                    [row["bytes"] for row in rows], clusters)
