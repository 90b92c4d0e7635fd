"""The registry of metrics: what each is called, how its scores read, and the module that computes it.

To add a metric, add a module here with a function `measure(measurements)`, an entry in `METRICS`, and a test. Scores,
report, TensorBoard and the checks of the gate follow from the entry. `jobs.core.pipeline.Gate` names the scores on
which the gate takes rules; a test holds the two equal.

The modules compute with `evaluate.Metric` classes. `evaluate.load("rouge")` downloads a script from the hub; these
classes are the same interface without that. They are imported late: they take seconds, and a report needs none.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from jobs.data.encoding import Record

if TYPE_CHECKING:
    import evaluate


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
    questions: Sequence[Record]  # the records that ask one
    answers: Sequence[str]  # the model's own answer to each of them
    sentences: Sequence[tuple[str, bool]]  # and whether each is acceptable
    sentence_likelihoods: Sequence[Likelihood]


@dataclass(frozen=True)
class Score:
    """One number of a metric, and how it is named and read."""

    key: str  # in scores.json and in the gate
    label: str
    higher_is_better: bool
    scale: str  # what its values mean
    gated: bool = True  # whether the gate takes rules on it
    per_token: bool = False  # models whose tokenizers differ cannot be compared by it
    significant_digits: bool = False  # shown with four of them instead of three decimals

    @property
    def better(self) -> str:
        return "higher" if self.higher_is_better else "lower"

    @property
    def arrow(self) -> str:
        return "↑" if self.higher_is_better else "↓"

    def shown(self, value: float | None) -> str:
        """A value as people read it: 812.4, 3.127, 0.912; a dash when it was not measured."""
        if value is None:
            return "–"
        if not self.significant_digits:
            return f"{value:.3f}"
        return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


@dataclass(frozen=True)
class Metric:
    """One entry of the registry."""

    module: str  # of this package; has `measure(measurements) -> values by key, None where nothing can be measured`
    title: str
    method: str  # how it is measured, for the report
    scores: tuple[Score, ...]
    needs_questions: bool = False  # cannot be measured on records of plain text

    def measure(self, measurements: Measurements) -> dict[str, float | None]:
        """The values of its scores, by key, and what else the module finds worth keeping."""
        values: dict[str, float | None] = importlib.import_module(f"{__name__}.{self.module}").measure(measurements)
        return values


METRICS = (
    Metric("perplexity", "Perplexity",
           "the exponential of the mean negative log-likelihood of the held-out answers' tokens, given their "
           "questions. Bits per byte divides that of their text, without special tokens, by its bytes.",
           (Score("perplexity", "perplexity", False, "1 is no surprise at all", per_token=True,
                  significant_digits=True),
            Score("bits_per_byte", "bits per byte", False, "the same, whatever the tokenizer", gated=False))),
    Metric("rouge", "ROUGE",
           "greedy answers to the held-out questions against the reference answers; mean F1, stemmed (Lin 2004).",
           (Score("rouge1", "ROUGE-1", True, "words shared, 0 to 1"),
            Score("rouge2", "ROUGE-2", True, "word pairs shared, 0 to 1"),
            Score("rougeL", "ROUGE-L", True, "longest common sequence, 0 to 1"),
            Score("rougeLsum", "ROUGE-Lsum", True, "the same, line by line, 0 to 1")),
           needs_questions=True),
    Metric("acceptability", "Acceptability",
           "each sentence's mean token log-probability (Lau et al. 2017); the threshold between acceptable and not is "
           "chosen on one half of the sentences, Matthews correlation and accuracy are measured on the other (CoLA: "
           "Warstadt et al. 2019). It guards against forgetting the language.",
           (Score("acceptability_mcc", "acceptability, MCC", True, "1 is perfect, 0 is chance"),
            Score("acceptability_accuracy", "acceptability, accuracy", True, "share classified correctly"))),
)
SCORES = tuple(score for metric in METRICS for score in metric.scores)


def compute(metric: type[evaluate.Metric], **inputs: Any) -> dict[str, float]:
    """Compute one metric over columns of inputs (equally long lists, by the names in its docstring).

    `evaluate` makes a cache folder in the home directory, even for data kept in memory: a pod's home is read-only.
    """
    with TemporaryDirectory(prefix="metric-") as cache:
        result: dict[str, float] = metric(cache_dir=cache, keep_in_memory=True).compute(**inputs)
    return result
