"""The gate: the rules of `evaluation.gate` in pipeline.yaml, held against what was measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from jobs.core.errors import UserError
from jobs.core.pipeline import Gate
from jobs.data.encoding import Record, question

Scores = Mapping[str, float | None]


@dataclass(frozen=True)
class Bound:
    """How one kind of bound is computed from the fine-tuned and the base model's values, and how people read it."""

    says: str
    value: Callable[[float, float], float]
    at_least: bool


BOUNDS = {
    "max_ratio": Bound("fine-tuned / base", lambda fine_tuned, base: fine_tuned / base, at_least=False),
    "min_gain": Bound("fine-tuned - base", lambda fine_tuned, base: fine_tuned - base, at_least=True),
    "max_drop": Bound("base - fine-tuned", lambda fine_tuned, base: base - fine_tuned, at_least=False),
    "min": Bound("fine-tuned", lambda fine_tuned, base: fine_tuned, at_least=True),
    "max": Bound("fine-tuned", lambda fine_tuned, base: fine_tuned, at_least=False),
}
AGAINST_BASE = ("max_ratio", "min_gain", "max_drop")


@dataclass(frozen=True)
class Check:
    """One bound on one metric, and whether it held. `value` is None when it is no finite number: that never passes."""

    metric: str
    bound: str
    limit: float
    value: float | None
    passed: bool
    says: str


def judge(gate: Gate, base: Scores, fine_tuned: Scores) -> list[Check]:
    """Hold every bound of every rule against the scores. The adapter passes when all of them hold."""
    rules = gate.model_dump(exclude_none=True)
    return [_check(metric, bound, limit, base, fine_tuned) for metric, rule in rules.items()
            for bound, limit in rule.items()]


def check_measurable(gate: Gate, holdout: Iterable[Record]) -> None:
    """Refuse a rule on ROUGE when no held-out record asks a question: found before hours of training, not after.

    Raises:
        UserError: naming the rules.
    """
    rules = [metric for metric in gate.model_dump(exclude_none=True) if metric.startswith("rouge")]
    if rules and all(question(record) is None for record in holdout):
        raise UserError(f"evaluation.gate.{', evaluation.gate.'.join(rules)}: cannot be measured: every held-out "
                        "record is plain {\"text\"}, which asks no question to answer. Remove the rule, or bring "
                        "{\"prompt\", \"completion\"} records")


def _check(metric: str, bound: str, limit: float, base: Scores, fine_tuned: Scores) -> Check:
    rule = BOUNDS[bound]
    measured, before = fine_tuned.get(metric), base.get(metric)
    try:
        value = rule.value(_number(measured), _number(before) if bound in AGAINST_BASE else math.nan)
    except ZeroDivisionError:
        value = math.nan
    passed = math.isfinite(value) and (value >= limit if rule.at_least else value <= limit)
    shown, bar = _tell_apart(value, limit)
    must = f"must be at {'least' if rule.at_least else 'most'} {bar}"
    return Check(metric, bound, limit, value if math.isfinite(value) else None, passed,
                 f"{metric}: {rule.says} is {shown}, {must}")


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _tell_apart(value: float, limit: float) -> tuple[str, str]:
    """Both numbers with as many digits as it takes to see that they differ: no "0.05 is not at least 0.05"."""
    if not math.isfinite(value):
        return "not a finite number", f"{limit:g}"
    for digits in range(3, 18):
        shown, bar = f"{value:.{digits}g}", f"{limit:.{digits}g}"
        if value == limit or float(shown) != float(bar):
            break
    return shown, f"{limit:g}" if float(f"{limit:g}") == limit else bar
