"""The gate: each bound means what pipeline.yaml says, and nothing that was not measured passes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.core.errors import UserError
from jobs.core.pipeline import Gate, Rule
from jobs.evaluation import gate

FINITE = st.floats(-1e6, 1e6)


def only(rule: Rule, base: float | None, fine_tuned: float | None) -> gate.Check:
    (check,) = gate.evaluate_gate(Gate(rougeL=rule), {"rougeL": base}, {"rougeL": fine_tuned})
    return check


@pytest.mark.parametrize(("rule", "base", "fine_tuned", "value", "passed"), [
    (Rule(max_ratio=0.9), 10.0, 9.0, 0.9, True),
    (Rule(max_ratio=0.9), 10.0, 9.1, 0.91, False),
    (Rule(min_gain=0.25), 0.25, 0.5, 0.25, True),
    (Rule(min_gain=0.3), 0.25, 0.5, 0.25, False),
    (Rule(max_drop=0.25), 0.75, 0.5, 0.25, True),
    (Rule(max_drop=0.05), 0.75, 0.5, 0.25, False),
    (Rule(max_drop=0.0), 0.5, 0.75, -0.25, True),  # a rise is no drop
    (Rule(min=0.5), 9.0, 0.5, 0.5, True),
    (Rule(min=0.6), 9.0, 0.5, 0.5, False),
    (Rule(max=0.5), 9.0, 0.5, 0.5, True),
    (Rule(max=0.4), 9.0, 0.5, 0.5, False),
])
def test_each_bound_means_what_it_says_and_includes_its_limit(
        rule: Rule, base: float, fine_tuned: float, value: float, passed: bool) -> None:
    check = only(rule, base, fine_tuned)
    assert check.value == pytest.approx(value)
    assert check.passed is passed


@pytest.mark.parametrize("bound", gate.BOUNDS)
@pytest.mark.parametrize("fine_tuned", [None, math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_a_finite_number_never_passes(bound: str, fine_tuned: float | None) -> None:
    check = only(Rule(**{bound: 1e9}), 1.0, fine_tuned)
    assert not check.passed and check.value is None and "not a finite number" in check.description


@pytest.mark.parametrize("bound", gate.AGAINST_BASE)
@pytest.mark.parametrize("base", [None, math.nan])
def test_a_comparison_with_a_base_that_was_not_measured_never_passes(bound: str, base: float | None) -> None:
    assert not only(Rule(**{bound: 1e9}), base, 1.0).passed


def test_an_absolute_bound_needs_no_base() -> None:
    assert only(Rule(min=0.5), None, 0.6).passed


def test_a_ratio_to_zero_does_not_pass_and_does_not_crash() -> None:
    assert not only(Rule(max_ratio=2.0), 0.0, 0.0).passed


def test_every_bound_of_every_rule_is_checked_by_itself_and_named() -> None:
    checks = gate.evaluate_gate(Gate(perplexity=Rule(max_ratio=0.5, max=20), acceptability_mcc=Rule(max_drop=0.05)),
                        {"perplexity": 100.0, "acceptability_mcc": 0.6}, {"perplexity": 30.0, "acceptability_mcc": 0.6})
    assert [(c.metric, c.bound, c.limit, c.passed) for c in checks] == [
        ("perplexity", "max_ratio", 0.5, True), ("perplexity", "max", 20, False),
        ("acceptability_mcc", "max_drop", 0.05, True)]
    assert checks[1].description == "perplexity: fine-tuned is 30, must be at most 20"


@given(FINITE, FINITE)
def test_the_sentence_never_shows_a_failed_value_equal_to_its_limit(value: float, limit: float) -> None:
    """No "0.05 must be at least 0.05: failed"."""
    check = only(Rule(min=limit), None, value)
    shown, bar = check.description.partition(" is ")[2].split(", must be at least ")
    assert check.passed is (value >= limit)
    if not check.passed:
        assert float(shown) < float(bar)


def test_a_rouge_rule_on_plain_text_is_refused_before_anything_is_measured() -> None:
    with pytest.raises(UserError, match=r"evaluation\.gate\.rouge1, evaluation\.gate\.rougeL: cannot be measured"):
        gate.check_measurable(Gate(rouge1=Rule(min=0.5), rougeL=Rule(min=0.5)), [{"text": "One."}, {"text": "Two."}])
    gate.check_measurable(Gate(perplexity=Rule(max=9)), [{"text": "One."}])
    gate.check_measurable(Gate(rougeL=Rule(min=0.5)), [{"text": "One."}, {"prompt": "a", "completion": "b"}])
