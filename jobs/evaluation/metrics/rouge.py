"""ROUGE: how many words, word pairs and longest common sequences an answer shares with the reference answer.

ROUGE-1, ROUGE-2, ROUGE-L and ROUGE-Lsum (Lin 2004) through the rouge_score package, with stemming: the F1 of each pair,
averaged over the pairs. ROUGE-Lsum treats each line as a sentence.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

from nltk.stem.porter import PorterStemmer  # type: ignore[import-untyped]
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer

from jobs.data.encoding import answer
from jobs.evaluation.confidence import Clusters, Ratio, Statistic
from jobs.evaluation.metrics import Measurements, Row

TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")

# A word is a run of letters and digits; a character of a script written without spaces is a word by itself.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")


def rows(measurements: Measurements) -> Sequence[Row | None]:
    """The F1 of each of `TYPES` for the answer to each record's question; None for a record without one."""
    return [None if text is None else each(answer(record), text)
            for record, text in zip(measurements.records, measurements.answers, strict=True)]


def statistic(key: str, rows: Sequence[Row], clusters: Clusters) -> Statistic:
    """The mean of one of `TYPES`: 0 to 1, higher is better."""
    return Ratio.mean([row[key] for row in rows], clusters)


class Words(Tokenizer):  # type: ignore[misc]
    """rouge_score's own tokenizer drops every letter outside a-z, so that any two Russian or Chinese answers score 0
    and "Málaga" is two words. This one gives the same words for ASCII text, and words for all other text."""

    def __init__(self) -> None:
        # Three quarters of ROUGE's time, and the same words come again and again.
        self._stem = functools.lru_cache(2**16)(PorterStemmer().stem)

    def tokenize(self, text: str) -> list[str]:
        words = _WORD.findall(text.lower())
        return [self._stem(w) if len(w) > 3 and w.isascii() else w for w in words]


_scorer = RougeScorer(list(TYPES), tokenizer=Words())


def each(reference: str, prediction: str) -> dict[str, float]:
    """The F1 of each of `TYPES` for one pair."""
    scores: dict[str, Any] = _scorer.score(reference, prediction)
    return {kind: float(scores[kind].fmeasure) for kind in TYPES}
