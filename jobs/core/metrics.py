"""The registry of metrics: what the gate, the digests, the report and TensorBoard know of each, in one place.

To add a metric: an entry in `METRICS`, a module of its name in jobs/evaluation/metrics/ with `rows` and `statistic`
(that package says what they are), and a test. Validation of the gate, the scores' digest, intervals, report and
TensorBoard follow from these. Bump `version` when the module would give other values: scores of another version are
other artifacts, so that old ones are never read as new ones.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

# What a metric has one value of, and the name of the file of its values: "records", "sentences", "privacy" (canaries
# and records, trained on and not), or the key of a task.
Population = str

TASKS = "tasks."  # before the name of a task, in the key of its score
# Below so many clusters no rule is decided: the standard error itself is then known to 16 % only (1 / sqrt(2 n)).
MINIMUM_CLUSTERS = 20


@dataclass(frozen=True)
class Score:
    """One number of a metric: its key in scores.json and in the gate, and how people read it."""

    key: str
    label: str
    higher_is_better: bool
    scale: str  # what its values mean
    low: float = 0.0  # its smallest and largest possible value
    high: float = 1.0
    per_token: bool = False  # models whose tokenizers differ cannot be compared by it
    log_scale: bool = False  # models differ by a factor: intervals are computed on its logarithm
    significant_digits: bool = False  # shown with four of them instead of three decimals
    columns: tuple[str, ...] = ()  # that the rows which it is measured on have; by default its metric's

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

    module: str  # in jobs/evaluation/metrics/
    version: int
    title: str
    method: str  # how it is measured, in sentences for the report
    columns: tuple[str, ...]  # the values of one record or sentence, as they are kept
    scores: tuple[Score, ...]
    population: Population = "records"
    needs_questions: bool = False  # cannot be measured on records of plain text


METRICS = (
    Metric("perplexity", 1, "Perplexity",
           "the exponential of the mean negative log-likelihood of the held-out answers' tokens, given their "
           "questions. Bits per byte divides that of their text, without special tokens, by its bytes.",
           ("nats", "special_nats", "tokens", "bytes"),
           (Score("perplexity", "perplexity", False, "1 is no surprise at all", 1.0, float("inf"), per_token=True,
                  log_scale=True, significant_digits=True),
            Score("bits_per_byte", "bits per byte", False, "the same, whatever the tokenizer", 0.0, float("inf"),
                  log_scale=True))),
    Metric("rouge", 1, "ROUGE",
           "greedy answers to the held-out questions against the reference answers; mean F1, stemmed (Lin 2004).",
           ("rouge1", "rouge2", "rougeL", "rougeLsum"),
           (Score("rouge1", "ROUGE-1", True, "words shared, 0 to 1"),
            Score("rouge2", "ROUGE-2", True, "word pairs shared, 0 to 1"),
            Score("rougeL", "ROUGE-L", True, "longest common sequence, 0 to 1"),
            Score("rougeLsum", "ROUGE-Lsum", True, "the same, line by line, 0 to 1")),
           needs_questions=True),
    Metric("acceptability", 2, "Acceptability",
           "each sentence's mean token log-probability (Lau et al. 2017) against a threshold between acceptable and "
           "not: the one that accepts as many sentences of the other half as are acceptable there, chosen again in "
           "every draw of the interval. Matthews correlation and accuracy of the classes (CoLA: Warstadt et al. 2019). "
           "It guards against forgetting the language.",
           ("score", "acceptable", "half"),
           (Score("acceptability_mcc", "acceptability, MCC", True, "1 is perfect, 0 is chance", -1.0),
            Score("acceptability_accuracy", "acceptability, accuracy", True, "share classified correctly")),
           population="sentences"),
)
SCORES = {score.key: score for metric in METRICS for score in metric.scores}

ALTERNATIVES = 63  # secrets that might have been a canary's, among which it is ranked
# Measured where `evaluation.privacy` is set: of the base and the fine-tuned model.
PRIVACY = Metric(
    "privacy", 1, "Privacy",
    f"canaries are made-up records with a random secret, trained on with the data. Exposure (Carlini et al. 2019): "
    f"log2 of {ALTERNATIVES + 1} less log2 of the secret's rank by likelihood among {ALTERNATIVES} others, mean over "
    f"the canaries; {math.log2(ALTERNATIVES + 1):g} bits if each is the likeliest, 1.4 if nothing was learned. "
    "Membership inference: records are called trained on by their loss as a share of the base model's (Carlini et al. "
    "2021); canaries against their twins, which are made alike and never trained on, and train against held-out "
    "records. AUC is the chance that the trained one of two is told apart; the true positive rate is the share of the "
    "trained ones that are called so by the threshold that at most 1 % of the others exceed (Carlini et al. 2022). "
    "Verbatim: the share of the train records that greedy decoding continues word for word, from the prompt, for as "
    "many tokens as evaluation.privacy says. The base model, which was trained on none of these, is the control.",
    ("position",),
    (Score("privacy.exposure", "exposure of canaries", False, "bits; 1.4 is no memory of the secrets", 0.0,
           math.log2(ALTERNATIVES + 1), columns=("exposure",)),
     Score("privacy.canary_auc", "canaries, AUC", False, "0.5 is chance, 1 is all told apart",
           columns=("canary_score", "member")),
     Score("privacy.canary_tpr", "canaries, found at 1 % false", False, "0.01 is chance, 1 is all",
           columns=("canary_found",)),
     Score("privacy.membership_auc", "train records, AUC", False, "0.5 is chance, 1 is all told apart",
           columns=("record_score", "member")),
     Score("privacy.membership_tpr", "train records, found at 1 % false", False, "0.01 is chance, 1 is all",
           columns=("record_found",)),
     Score("privacy.verbatim", "train records, continued verbatim", False, "share, 0 to 1", columns=("verbatim",))),
    population="privacy")
OF_CANARIES = ("privacy.exposure", "privacy.canary_auc", "privacy.canary_tpr")  # not measured without canaries

KNOWN = SCORES | {score.key: score for score in PRIVACY.scores}  # also what only some pipelines measure
_METRIC_OF = {score.key: metric for metric in (*METRICS, PRIVACY) for score in metric.scores}


def score_of(key: str) -> Score:
    """The score of a key that the gate takes.

    Raises:
        KeyError: there is none.
    """
    return task_metric(key).scores[0] if key.startswith(TASKS) else KNOWN[key]


def metric_of(key: str) -> Metric:
    """The metric that a score belongs to.

    Raises:
        KeyError: there is none.
    """
    return task_metric(key) if key.startswith(TASKS) else _METRIC_OF[key]


@functools.cache
def task_metric(key: str) -> Metric:
    """The metric of a task of the pipeline file, by the key of its score: `tasks.NAME`."""
    name = key.removeprefix(TASKS)
    return Metric("tasks", 1, f"Task {name}",
                  "greedy answers to the task's prompts, checked one by one: the share of the answers that pass; with "
                  "the check label_f1 the F1 of each label, averaged over the labels; with rougeL the mean ROUGE-L; "
                  "with lm_eval the mean of what lm-evaluation-harness finds.",
                  ("value",), (Score(key, f"task {name}", True, "1 is every answer right"),), population=key)
