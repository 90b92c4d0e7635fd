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
    assert check == gate.Check("rougeL", bound, 1e9, None, False)
    assert "is not a finite number, must be at " in check.description


@pytest.mark.parametrize("bound", ["max_ratio", "min_gain", "max_drop"])
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


@pytest.mark.parametrize(("rule", "value", "sentence"), [
    (Rule(max=0.9), 0.912345, "rougeL: fine-tuned is 0.912, must be at most 0.9"),
    (Rule(max=0.05), 0.05004, "rougeL: fine-tuned is 0.05004, must be at most 0.05"),
    (Rule(min=0.12345), 0.5, "rougeL: fine-tuned is 0.5, must be at least 0.12345"),
    (Rule(min=0.123456), 0.123456, "rougeL: fine-tuned is 0.123, must be at least 0.123456"),
    (Rule(max=1 / 3), 0.34, "rougeL: fine-tuned is 0.34, must be at most 0.333"),
    (Rule(max=1 / 3), 0.3333334, "rougeL: fine-tuned is 0.3333334, must be at most 0.3333333"),
])
def test_the_sentence_has_as_many_digits_as_it_needs(rule: Rule, value: float, sentence: str) -> None:
    assert only(rule, None, value).description == sentence


def test_a_check_is_read_from_evaluation_json_as_it_was_written() -> None:
    check = only(Rule(min_gain=0.25), 0.25, 0.75)
    assert check.to_json() == {"metric": "rougeL", "bound": "min_gain", "limit": 0.25, "value": 0.5, "passed": True,
                               "description": "rougeL: fine-tuned - base is 0.5, must be at least 0.25"}
    assert gate.Check.from_json(check.to_json()) == check


def test_a_rouge_rule_on_plain_text_is_refused_before_anything_is_measured() -> None:
    with pytest.raises(UserError, match=r"evaluation\.gate\.rouge1, evaluation\.gate\.rougeL: cannot be measured"):
        gate.check_measurable(Gate(rouge1=Rule(min=0.5), rougeL=Rule(min=0.5)), [{"text": "One."}, {"text": "Two."}])
    gate.check_measurable(Gate(perplexity=Rule(max=9)), [{"text": "One."}])
    gate.check_measurable(Gate(rougeL=Rule(min=0.5)), [{"text": "One."}, {"prompt": "a", "completion": "b"}])
