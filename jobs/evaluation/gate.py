"""The gate: checks the rules of `evaluation.gate` in pipeline.yaml against the scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from jobs.core.errors import UserError
from jobs.core.pipeline import Gate
from jobs.data.encoding import Record, question
from jobs.evaluation.metrics import METRICS

Scores = Mapping[str, float | None]


@dataclass(frozen=True)
class Bound:
    """How one kind of bound is computed from the fine-tuned and the base model's values, and how people read it."""

    expression: str
    value: Callable[[float, float], float]
    at_least: bool


BOUNDS = {
    "max_ratio": Bound("fine-tuned / base", lambda fine_tuned, base: fine_tuned / base, at_least=False),
    "min_gain": Bound("fine-tuned - base", lambda fine_tuned, base: fine_tuned - base, at_least=True),
    "max_drop": Bound("base - fine-tuned", lambda fine_tuned, base: base - fine_tuned, at_least=False),
    "min": Bound("fine-tuned", lambda fine_tuned, base: fine_tuned, at_least=True),
    "max": Bound("fine-tuned", lambda fine_tuned, base: fine_tuned, at_least=False),
}


@dataclass(frozen=True)
class Check:
    """One bound on one metric, and whether it held. `value` is None when it is no finite number: that never passes."""

    metric: str
    bound: str
    limit: float
    value: float | None
    passed: bool

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Check:
        """A check as it is written to evaluation.json."""
        return cls(values["metric"], values["bound"], values["limit"], values["value"], values["passed"])

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"description": self.description}

    @property
    def expression(self) -> str:
        """What is compared with the limit, e.g. `fine-tuned / base`."""
        return BOUNDS[self.bound].expression

    @property
    def value_text(self) -> str:
        return _distinguishable(self.value, self.limit)[0]

    @property
    def requirement(self) -> str:
        """What the value must be, e.g. `at most 0.9`."""
        return f"at {'least' if BOUNDS[self.bound].at_least else 'most'} {_distinguishable(self.value, self.limit)[1]}"

    @property
    def description(self) -> str:
        """The check in a sentence: rule, value and limit."""
        return f"{self.metric}: {self.expression} is {self.value_text}, must be {self.requirement}"


def evaluate_gate(gate: Gate, base: Scores, fine_tuned: Scores) -> list[Check]:
    """Check every bound of every rule against the scores. The adapter passes when all of them hold."""
    rules = gate.model_dump(exclude_none=True)
    return [_check(metric, bound, limit, base, fine_tuned) for metric, rule in rules.items()
            for bound, limit in rule.items()]


def check_measurable(gate: Gate, holdout: Iterable[Record]) -> None:
    """Reject a rule that needs questions when no held-out record has one: before hours of training, not after.

    Raises:
        UserError: naming the rules.
    """
    need_questions = {score.key for metric in METRICS if metric.needs_questions for score in metric.scores}
    rules = [metric for metric in gate.model_dump(exclude_none=True) if metric in need_questions]
    if rules and all(question(record) is None for record in holdout):
        raise UserError(f"evaluation.gate.{', evaluation.gate.'.join(rules)}: cannot be measured: every held-out "
                        "record is plain {\"text\"}, which has no question to answer. Remove the rule, or bring "
                        "{\"prompt\", \"completion\"} records")


def _check(metric: str, bound: str, limit: float, base: Scores, fine_tuned: Scores) -> Check:
    rule = BOUNDS[bound]
    measured, before = fine_tuned.get(metric), base.get(metric)
    try:
        value = rule.value(_number(measured), _number(before))
    except ZeroDivisionError:
        value = math.nan
    if not math.isfinite(value):
        return Check(metric, bound, limit, None, False)
    return Check(metric, bound, limit, value, value >= limit if rule.at_least else value <= limit)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _distinguishable(value: float | None, limit: float) -> tuple[str, str]:
    """Both numbers as texts, with enough digits to show that they differ: never "0.05 is not at least 0.05"."""
    if value is None:
        return "not a finite number", f"{limit:g}"
    for digits in range(3, 18):
        shown, bar = f"{value:.{digits}g}", f"{limit:.{digits}g}"
        if value == limit or float(shown) != float(bar):
            break
    return shown, f"{limit:g}" if float(f"{limit:g}") == limit else bar
