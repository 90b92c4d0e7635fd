"""The gate: checks the rules of `evaluation.gate` in pipeline.yaml, each with the confidence that the file demands.

All rules must hold, so each needs no correction for the others: an adapter that breaks any rule passes all of them at
most as often as it passes that one (intersection-union test: Berger 1982).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Literal

from jobs.core.errors import UserError
from jobs.core.metrics import MINIMUM_CLUSTERS, TASKS, metric_of, score_of
from jobs.core.pipeline import BOUNDS, Evaluation, Rule
from jobs.data.encoding import Record, answer, question
from jobs.evaluation.holdout import Chosen, answered_lines

if TYPE_CHECKING:
    from jobs.evaluation.confidence import Interval

Values = Mapping[str, Sequence[Mapping[str, Any]]]  # of one model: the rows of each population
Cluster = tuple[str, Any]  # what its records have in common, e.g. ("group", "hotel 7")
Outcome = Literal["passed", "failed", "undecided"]

FINE_TUNED = "fine_tuned"
# How much the gain in a score from 0 to 1 varies from cluster to cluster: its standard deviation, before it is known.
# That of ROUGE is 0.2 to 0.33 on overlays/kind; of answers that are right or wrong, the root of the share that changes.
SPREAD_OF_GAINS = 0.3


@dataclass(frozen=True)
class Check:
    """One bound on one score, and whether it held.

    `value` is the measured one, `low` and `high` its bounds, each with the confidence by itself; None where they are no
    finite numbers. `reason` says what decided where no numbers did.
    """

    metric: str
    bound: str
    limit: float
    than: str
    confidence: float
    outcome: Outcome
    value: float | None = None
    low: float | None = None
    high: float | None = None
    clusters: int = 0
    more_clusters: int | None = None  # how many more would about decide it, if the values stay as they are
    more_records: int | None = None  # the same in held-out records (or sentences)
    reason: str | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Check:
        """A check as it is written to evaluation.json."""
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"description": self.description}

    @property
    def passed(self) -> bool:
        return self.outcome == "passed"

    @property
    def expression(self) -> str:
        """What is compared with the limit, e.g. `fine-tuned / base`."""
        return BOUNDS[self.bound].expression.format(other=self.than)

    @property
    def decisive(self) -> float | None:
        """The bound that decides: the true value is no worse, with the confidence."""
        return self.low if BOUNDS[self.bound].at_least else self.high

    @property
    def value_text(self) -> str:
        return "not a finite number" if self.value is None else f"{self.value:.3g}"

    @property
    def bound_text(self) -> str:
        """The bound that decides, e.g. `at most 0.31`."""
        return f"{self._direction} {_distinguishable(self.decisive, self.limit)[0]}"

    @property
    def known_text(self) -> str:
        """What is known of the true value, e.g. `at most 0.31`: the bound that decides, or of a rule that failed the
        other one, which shows that it does not hold."""
        if self.outcome != "failed":
            return self.bound_text
        at_least = BOUNDS[self.bound].at_least
        other = _distinguishable(self.high if at_least else self.low, self.limit)[0]
        return f"{'at most' if at_least else 'at least'} {other}"

    @property
    def requirement(self) -> str:
        """What the value must be, e.g. `at most 0.9`."""
        return f"{self._direction} {_distinguishable(self.decisive, self.limit)[1]}"

    @property
    def more_text(self) -> str:
        """How much more evidence would decide it, e.g. `about 40 more held-out records`."""
        population = metric_of(self.metric).population
        what = {"records": "held-out records", "sentences": "sentences"}.get(
            population, "records of the task" if population.startswith(TASKS) else "records")
        return f"about {float(f'{self.more_records or 0:.2g}'):,.0f} more {what}"

    @property
    def _direction(self) -> str:
        return "at least" if BOUNDS[self.bound].at_least else "at most"

    @property
    def description(self) -> str:
        """The check in a sentence: rule, value, bound and limit."""
        if self.reason:
            value = "" if self.value is None else f"is {self.value_text}, "
            more = f"; {self.more_text} would decide it" if self.more_records else ""
            return f"{self.metric}: {self.expression} {value}must be {self.requirement}: {self.reason}{more}"
        if self.value is None:
            return f"{self.metric}: {self.expression} is not a finite number, must be {self.requirement}"
        bound = f"{self.bound_text} with {self.confidence * 100:g} % confidence"
        more = f"; {self.more_text} would decide it" if self.more_records else ""
        return (f"{self.metric}: {self.expression} is {self.value_text}, {bound}, must be {self.requirement}"
                + (f": undecided{more}" if self.outcome == "undecided" else ""))


def outcome_of(checks: Iterable[Check]) -> Outcome:
    """The verdict on an adapter: failed if a rule surely does not hold, passed if all surely do."""
    outcomes = {check.outcome for check in checks}
    return "failed" if "failed" in outcomes else "undecided" if "undecided" in outcomes else "passed"


def clusters_of(holdout: Sequence[Record], by: str) -> list[Cluster]:
    """The cluster of each held-out record: its group; without one its answer, where `by` says so, or itself."""
    names: list[Cluster] = []
    for line, record in enumerate(holdout, 1):
        if "group" in record:
            names.append(("group", record["group"]))
        elif by == "answer" and question(record) is not None:
            names.append(("answer", " ".join(answer(record).casefold().split())))
        else:
            names.append(("record", line))
    return names


def evaluate_gate(evaluation: Evaluation, models: Mapping[str, Values], clusters: Sequence[Cluster],
                  absent: Mapping[str, str] | None = None) -> list[Check]:
    """Check every bound of every rule. The adapter passes when all of them hold.

    Args:
        models: the values of each model by role: `base`, `fine_tuned`, and others that rules compare with.
        clusters: of each held-out record, by line.
        absent: why there is no model of a role that rules compare with; they pass.
    """
    return [_check(key, rule, bound, limit, evaluation.confidence, models, clusters, absent or {})
            for key, rule in evaluation.rules() for bound, limit in rule.bounds().items()]


def score_interval(key: str, values: Values, clusters: Sequence[Cluster], confidence: float) -> Interval | None:
    """One score of one model with its bounds; None where nothing can be measured."""
    rows = _measured(key, values)
    ordered = [rows[line] for line in sorted(rows)]
    return _interval(key, ordered, ordered, _names(key, ordered, clusters), confidence, "min")[0] if rows else None


def check_measurable(evaluation: Evaluation, holdout: Sequence[Record]) -> None:
    """Reject rules that the held-out records cannot decide: before hours of training, not after.

    Raises:
        UserError: naming the rules.
    """
    rules = [key for key, _ in evaluation.rules() if metric_of(key).needs_questions]
    asking = Chosen(holdout, answered_lines(holdout, evaluation.answered_records))
    if rules and not asking:
        raise UserError(f"evaluation.gate.{', evaluation.gate.'.join(rules)}: cannot be measured: every held-out "
                        "record is plain {\"text\"}, which has no question to answer. Remove the rule, or bring "
                        "{\"prompt\", \"completion\"} records")
    for key, _ in evaluation.rules():
        metric = metric_of(key)
        if metric.population != "records":
            continue
        records = asking if metric.needs_questions else holdout
        found = len(set(clusters_of(records, evaluation.clusters)))
        if found < MINIMUM_CLUSTERS:
            limited = metric.needs_questions and len(records) == evaluation.answered_records
            capped = "evaluation.answered_records or " if limited else ""
            raise UserError(
                f"evaluation.gate.{key}: {_counted(len(records), 'held-out record')} in {_counted(found, 'cluster')} "
                f"cannot prove anything: at least {MINIMUM_CLUSTERS} are needed. A cluster is a `group`, or the "
                f"records with the same answer. Raise {capped}dataset.holdout, bring more records or smaller groups; "
                "or, if answers are labels that repeat, set evaluation.clusters: record")


def detectable_gain(clusters: int, confidence: float) -> float:
    """The smallest true gain, in a score from 0 to 1, that so many clusters would show in 80 % of cases."""
    # A gain is shown when its lower bound, value - z(confidence) * error, is above 0. Values vary around the true gain
    # with the same error, sd / sqrt(clusters), so that 80 % of them are above gain - z(0.8) * error.
    return (NormalDist().inv_cdf(confidence) + NormalDist().inv_cdf(0.8)) * SPREAD_OF_GAINS / math.sqrt(clusters)


def check_comparable(evaluation: Evaluation, vocabularies: Mapping[str, str]) -> None:
    """Refuse rules that compare values per token of models whose tokens differ.

    Args:
        vocabularies: the digest of each model's tokens, by role.
    Raises:
        UserError: naming the rule and the score that can be compared.
    """
    for key, rule in evaluation.rules():
        theirs = vocabularies.get(rule.than)
        if score_of(key).per_token and theirs is not None and theirs != vocabularies[FINE_TUNED]:
            raise UserError(f"evaluation.gate.{key}: the {rule.than} model has another tokenizer, and {key} is per "
                            "token, so that they cannot be compared. Use bits_per_byte for this rule")


def _check(key: str, rule: Rule, bound: str, limit: float, confidence: float, models: Mapping[str, Values],
           clusters: Sequence[Cluster], absent: Mapping[str, str]) -> Check:
    result = functools.partial(Check, key, bound, limit, rule.than, confidence)
    kind = BOUNDS[bound]
    if kind.compares and rule.than not in models:
        return result("passed", reason=absent.get(rule.than, f"there is no {rule.than} model to compare with"))
    mine = _measured(key, models[FINE_TUNED])
    theirs = _measured(key, models[rule.than]) if kind.compares else mine
    lines = sorted(mine.keys() & theirs.keys())
    if not lines:
        return result("failed", reason="no held-out record measures it")
    found, count = _interval(key, [mine[line] for line in lines], [theirs[line] for line in lines],
                             _names(key, [mine[line] for line in lines], clusters), confidence, bound)
    if not math.isfinite(found.value):
        return result("failed", clusters=count)
    if count < MINIMUM_CLUSTERS:
        missing = MINIMUM_CLUSTERS - count
        return result("undecided", value=found.value, clusters=count, more_clusters=missing,
                      more_records=_records(missing, lines, count),
                      reason=f"undecided: {_counted(count, 'cluster')} cannot prove anything, at least "
                             f"{MINIMUM_CLUSTERS} are needed")
    if found.low >= limit if kind.at_least else found.high <= limit:
        outcome: Outcome = "passed"
    else:
        outcome = "failed" if (found.high < limit if kind.at_least else found.low > limit) else "undecided"
    more = _more(found, limit, count, log=bound == "max_ratio") if outcome == "undecided" else None
    unknown = outcome == "undecided" and (math.isinf(found.low) or math.isinf(found.high))
    return result(outcome, value=found.value, low=_finite(found.low), high=_finite(found.high), clusters=count,
                  more_clusters=more, more_records=more and _records(more, lines, count),
                  reason="undecided: nearly all clusters have the same value, which says nothing of others"
                  if unknown else None)


def _interval(key: str, mine: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]],
              names: Sequence[Hashable], confidence: float, bound: str) -> tuple[Interval, int]:
    """The interval of what a bound is on, and over how many clusters."""
    from jobs.evaluation.confidence import Clusters, Difference, Logarithm, interval
    from jobs.evaluation.metrics import statistic

    score, clusters = score_of(key), Clusters.of(names)
    first, second = (statistic(key, rows, clusters) for rows in (mine, theirs))
    if bound == "max_ratio":
        found = interval(Difference(Logarithm(first), Logarithm(second)), clusters.count, confidence)
        return found.map(_exp), clusters.count
    if BOUNDS[bound].compares:
        difference = Difference(first, second) if bound == "min_gain" else Difference(second, first)
        width = score.high - score.low
        return interval(difference, clusters.count, confidence, low=-width, high=width), clusters.count
    if score.log_scale:
        found = interval(Logarithm(first), clusters.count, confidence, low=_log(score.low), high=_log(score.high))
        return found.map(_exp), clusters.count
    return interval(first, clusters.count, confidence, low=score.low, high=score.high), clusters.count


def _measured(key: str, values: Values) -> dict[int, Mapping[str, Any]]:
    """The rows that a score is measured on, by line."""
    from jobs.evaluation.scoring import measured

    return {row["line"]: row for row in measured(key, values)}


def _names(key: str, rows: Sequence[Mapping[str, Any]], clusters: Sequence[Cluster]) -> Sequence[Hashable]:
    """The clusters of some rows. Those of tasks and privacy name theirs; sentences and canaries are each one by
    itself."""
    if metric_of(key).population == "records":
        return [clusters[row["line"] - 1] for row in rows]
    return [row.get("cluster", row["line"]) for row in rows]


def _more(found: Interval, limit: float, clusters: int, *, log: bool) -> int | None:
    """About how many more clusters would decide a rule whose value stays as it is: bounds come nearer with the square
    root of the number. None where the value is too near to its limit, or nothing is known of its spread."""
    scale: Callable[[float], float] = _log if log else float
    distance = abs(scale(found.value) - scale(limit))
    towards = found.low if found.value > limit else found.high
    width = abs(scale(found.value) - scale(towards))
    if not math.isfinite(width) or distance < width / 100:
        return None
    return max(1, math.ceil(clusters * ((width / distance) ** 2 - 1)))


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _records(more: int, lines: Sequence[int], clusters: int) -> int:
    """How many records so many more clusters have, if they are as large as those that there are."""
    return math.ceil(more * len(lines) / clusters)


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _distinguishable(value: float | None, limit: float) -> tuple[str, str]:
    """Both numbers as texts, with enough digits to show that they differ: never "0.05 is not at least 0.05"."""
    if value is None:
        return "unknown", f"{limit:g}"
    for digits in range(3, 18):
        shown, bar = f"{value:.{digits}g}", f"{limit:.{digits}g}"
        if value == limit or float(shown) != float(bar):
            break
    return shown, f"{limit:g}" if float(f"{limit:g}") == limit else bar
