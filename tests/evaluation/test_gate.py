"""The gate: each bound means what pipeline.yaml says, with the confidence that it names, and nothing that was not
measured passes."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from jobs.core.errors import UserError
from jobs.core.metrics import MINIMUM_CLUSTERS
from jobs.core.pipeline import BOUNDS, Evaluation
from jobs.evaluation import gate
from jobs.evaluation.confidence import Interval

CLUSTERS: list[gate.Cluster] = [("record", line) for line in range(1, 41)]


def model(rougeL: float | None = 0.5, perplexity: float = 10.0, count: int = 40) -> dict[str, Any]:  # noqa: N803
    """A model whose records vary around these values, each model's in a way of its own."""
    waves = [math.sin(line * (1 + (rougeL or 0) + perplexity)) for line in range(1, count + 1)]
    records = [{"line": line, "nats": 8 * math.log(perplexity) + 0.2 * wave, "special_nats": 0.0, "tokens": 8,
                "bytes": 30, **dict.fromkeys(("rouge1", "rouge2", "rougeL", "rougeLsum"),
                                None if rougeL is None else rougeL + 0.05 * wave)}
               for line, wave in enumerate(waves, 1)]
    return {"records": records, "sentences": []}


def checks(rules: dict[str, Any], **models: Any) -> list[gate.Check]:
    return gate.evaluate_gate(Evaluation.model_validate({"gate": rules}), models, CLUSTERS)


def only(rule: dict[str, Any], *, metric: str = "rougeL", **models: Any) -> gate.Check:
    (check,) = checks({metric: rule}, **models)
    return check


@pytest.mark.parametrize(("metric", "rule", "base", "fine_tuned", "value", "outcome"), [
    ("perplexity", {"max_ratio": 0.9}, {"perplexity": 10.0}, {"perplexity": 8.0}, 0.8, "passed"),
    ("perplexity", {"max_ratio": 0.7}, {"perplexity": 10.0}, {"perplexity": 8.0}, 0.8, "failed"),
    ("perplexity", {"max": 9.0}, {}, {"perplexity": 8.0}, 8.0, "passed"),
    ("perplexity", {"max": 7.0}, {}, {"perplexity": 8.0}, 8.0, "failed"),
    ("rougeL", {"min_gain": 0.2}, {"rougeL": 0.25}, {"rougeL": 0.5}, 0.25, "passed"),
    ("rougeL", {"min_gain": 0.3}, {"rougeL": 0.25}, {"rougeL": 0.5}, 0.25, "failed"),
    ("rougeL", {"max_drop": 0.3}, {"rougeL": 0.75}, {"rougeL": 0.5}, 0.25, "passed"),
    ("rougeL", {"max_drop": 0.05}, {"rougeL": 0.75}, {"rougeL": 0.5}, 0.25, "failed"),
    ("rougeL", {"max_drop": 0.0}, {"rougeL": 0.5}, {"rougeL": 0.75}, -0.25, "passed"),  # a rise is no drop
    ("rougeL", {"min": 0.4}, {}, {"rougeL": 0.5}, 0.5, "passed"),
    ("rougeL", {"min": 0.6}, {}, {"rougeL": 0.5}, 0.5, "failed"),
])
def test_each_bound_means_what_it_says(metric: str, rule: dict[str, float], base: dict[str, Any],
                                       fine_tuned: dict[str, Any], value: float, outcome: str) -> None:
    check = only(rule, metric=metric, base=model(**base), fine_tuned=model(**fine_tuned))
    assert check.value == pytest.approx(value, rel=0.02)
    assert check.outcome == outcome


@pytest.mark.parametrize("limit", [0.495, 0.5, 0.505])
def test_what_could_be_luck_is_undecided_and_says_how_much_more_evidence_would_decide(limit: float) -> None:
    check = only({"min": limit}, fine_tuned=model())
    assert check.outcome == "undecided" and not check.passed
    assert check.low is not None and check.high is not None and check.low < limit < check.high
    if limit != 0.5:
        assert check.more_clusters is not None
        more = {"records": model(count=40)["records"] * math.ceil((40 + check.more_clusters) / 40), "sentences": []}
        records = [row | {"line": line} for line, row in enumerate(more["records"], 1)]
        (check,) = gate.evaluate_gate(Evaluation.model_validate({"gate": {"rougeL": {"min": limit}}}),
                                      {"fine_tuned": {"records": records, "sentences": []}},
                                      [("record", line) for line in range(1, len(records) + 1)])
        assert check.outcome != "undecided"


def test_more_evidence_is_counted_in_records_not_clusters() -> None:
    clusters: list[gate.Cluster] = [("group", line // 2) for line in range(120)]
    evaluation = Evaluation.model_validate({"gate": {"rougeL": {"min": 0.495}}})
    (check,) = gate.evaluate_gate(evaluation, {"fine_tuned": model(count=120)}, clusters)
    assert (check.outcome, check.clusters) == ("undecided", 60)
    assert check.more_clusters and check.more_records == 2 * check.more_clusters
    assert check.description.endswith(f": undecided; about {check.more_records} more held-out records would decide it")


def test_more_evidence_for_acceptability_is_more_sentences() -> None:
    random = np.random.default_rng(1)
    rows = [{"line": line, "score": float(random.normal() + good), "acceptable": good, "half": line // 2 % 2}
            for line, good in enumerate([0, 1] * 100, 1)]
    check = only({"min": 0.3}, metric="acceptability_mcc", fine_tuned={"records": [], "sentences": rows})
    assert (check.outcome, check.clusters, check.more_records) == ("undecided", 200, check.more_clusters)
    assert "more sentences would decide it" in check.description


def test_how_much_more_is_said_no_more_exactly_than_it_is_known() -> None:
    check = gate.Check("rougeL", "min", 0.5, "base", 0.95, "undecided", 0.5, 0.4, 0.6, 40, 12_345, 24_690)
    assert check.more_text == "about 25,000 more held-out records"


@pytest.mark.parametrize(("metric", "rule", "sentence"), [
    ("perplexity", {"max_ratio": 0.9}, "perplexity: fine-tuned / base is 1, must be at most 0.9: undecided: nearly "
                                       "all clusters have the same value, which says nothing of others"),
    ("rougeL", {"max_drop": 0.0}, "rougeL: base - fine-tuned is 0, at most 0.0722 with 95 % confidence, must be at "
                                  "most 0: undecided"),
])
def test_an_adapter_that_changes_nothing_is_not_proven_by_equal_values(
        metric: str, rule: dict[str, float], sentence: str) -> None:
    check = only(rule, metric=metric, base=model(), fine_tuned=model())
    assert (check.outcome, check.description) == ("undecided", sentence)
    json.dumps(check.to_json(), allow_nan=False)  # bounds that are infinite are none


def test_one_record_decides_nothing() -> None:
    check = only({"min": 0.1}, fine_tuned=model(count=1))
    assert (check.outcome, check.clusters, check.more_records) == ("undecided", 1, 19)
    assert check.description.endswith(
        "must be at least 0.1: undecided: 1 cluster cannot prove anything, at least 20 are needed; "
        "about 19 more held-out records would decide it")
    rules = Evaluation.model_validate({"gate": {"rougeL": {"min": 0.1}}})
    with pytest.raises(UserError, match=r"rougeL: 1 held-out record in 1 cluster cannot prove anything"):
        gate.check_measurable(rules, [{"prompt": "a", "completion": "b"}])


def test_groups_that_swallow_the_holdout_are_refused() -> None:
    rules = Evaluation.model_validate({"gate": {"perplexity": {"max": 9}}})
    holdout = [{"prompt": f"{n}", "completion": f"{n}", "group": "one" if n else "two"} for n in range(500)]
    with pytest.raises(UserError, match=r"500 held-out records in 2 clusters .* smaller groups"):
        gate.check_measurable(rules, holdout)


def test_models_are_compared_record_by_record() -> None:
    """Both vary widely, and one is better by the same on every record: that is no luck."""
    random = np.random.default_rng(1).uniform(0, 0.9, 40)
    base, better = model(), model()
    for row, other, value in zip(base["records"], better["records"], random, strict=True):
        row["rougeL"], other["rougeL"] = value, value + 0.05 + 0.001 * math.sin(9 * value)
    assert only({"min_gain": 0.04}, base=base, fine_tuned=better).passed
    assert only({"min": 0.45}, fine_tuned=better).outcome == "undecided", "each by itself is known to 0.1 only"


def test_records_of_one_cluster_are_one_piece_of_evidence() -> None:
    fine_tuned = model()
    alone = only({"min": 0.4}, fine_tuned=fine_tuned)
    (together,) = gate.evaluate_gate(Evaluation.model_validate({"gate": {"rougeL": {"min": 0.4}}}),
                                     {"fine_tuned": fine_tuned}, [("group", line % 2) for line in range(40)])
    assert (alone.outcome, alone.clusters) == ("passed", 40)
    assert (together.outcome, together.clusters, together.more_clusters) == ("undecided", 2, 18)


def test_only_records_that_both_models_have_measured_are_compared() -> None:
    base = model(0.25)
    base["records"] = base["records"][:30]
    assert only({"min_gain": 0.2}, base=base, fine_tuned=model()).clusters == 30


@pytest.mark.parametrize("bound", BOUNDS)
def test_a_value_that_is_not_a_finite_number_never_passes(bound: str) -> None:
    metric = "rougeL" if BOUNDS[bound].for_higher else "perplexity"
    damaged = model()
    damaged["records"][7]["rougeL" if metric == "rougeL" else "nats"] = None
    limit = {"min_gain": -1.0, "min": 0.0, "max_drop": 1.0}.get(bound, 1e9)
    check = only({bound: limit}, metric=metric, base=model(), fine_tuned=damaged)
    assert (check.value, check.outcome) == (None, "failed")
    assert "is not a finite number, must be at " in check.description


def test_an_infinite_perplexity_never_passes() -> None:
    hopeless = model()
    for row in hopeless["records"]:
        row["nats"] = 8000.0
    assert only({"max_ratio": 1e9}, metric="perplexity", base=model(), fine_tuned=hopeless).passed is False


@pytest.mark.parametrize("rule", [{"min_gain": -1.0}, {"max_drop": 1.0}])
def test_a_comparison_with_a_base_that_was_not_measured_never_passes(rule: dict[str, float]) -> None:
    nothing: dict[str, Any] = {"records": [], "sentences": []}
    check = only(rule, base=nothing, fine_tuned=model())
    assert check.outcome == "failed" and "no held-out record measures it" in check.description
    assert only(rule, base=model(None), fine_tuned=model()).outcome == "failed"


def test_an_absolute_bound_needs_no_base() -> None:
    assert only({"min": 0.4}, fine_tuned=model()).passed


def test_the_first_adapter_has_nothing_promoted_to_be_compared_with() -> None:
    rules = Evaluation.model_validate({"gate": {"rougeL": {"min_gain": 0.1, "than": "promoted"}}})
    (check,) = gate.evaluate_gate(rules, {"fine_tuned": model()}, CLUSTERS, {"promoted": "it is the first"})
    assert (check.passed, check.reason) == (True, "it is the first")
    check = only({"min_gain": 0.1, "than": "promoted"}, base=model(), fine_tuned=model())
    assert check.passed and "no promoted model to compare with" in check.description
    worse = only({"max_drop": 0.1, "than": "promoted"}, base=model(0.1), fine_tuned=model(), promoted=model(0.9))
    assert worse.outcome == "failed" and worse.expression == "promoted - fine-tuned"


def test_every_bound_of_every_rule_is_checked_by_itself_and_named() -> None:
    found = checks({"rougeL": [{"min": 0.1, "min_gain": 0.4}, {"max_drop": 0.1, "than": "reference"}],
                    "perplexity": {"max_ratio": 0.5, "max": 20}},
                   base=model(perplexity=100.0), fine_tuned=model(perplexity=30.0), reference=model())
    assert [(c.metric, c.bound, c.limit, c.than, c.outcome) for c in found] == [
        ("perplexity", "max_ratio", 0.5, "base", "passed"), ("perplexity", "max", 20, "base", "failed"),
        ("rougeL", "min_gain", 0.4, "base", "failed"), ("rougeL", "min", 0.1, "base", "passed"),
        ("rougeL", "max_drop", 0.1, "reference", "passed")]
    assert gate.outcome_of(found) == "failed"
    assert gate.outcome_of(found[:1]) == "passed"
    assert gate.outcome_of([found[0], only({"min": 0.5}, fine_tuned=model())]) == "undecided"


def described(value: float, limit: float, bound: str = "min") -> str:
    return gate.Check("rougeL", bound, limit, "base", 0.95, "passed", value, value, value).description


@pytest.mark.parametrize(("bound", "value", "limit", "sentence"), [
    ("max", 0.912345, 0.9, "is 0.912, at most 0.912 with 95 % confidence, must be at most 0.9"),
    ("max", 0.05004, 0.05, "is 0.05, at most 0.05004 with 95 % confidence, must be at most 0.05"),
    ("min", 0.5, 0.12345, "is 0.5, at least 0.5 with 95 % confidence, must be at least 0.12345"),
    ("max", 0.3333334, 1 / 3, "is 0.333, at most 0.3333334 with 95 % confidence, must be at most 0.3333333"),
])
def test_the_sentence_has_as_many_digits_as_it_needs(bound: str, value: float, limit: float, sentence: str) -> None:
    assert described(value, limit, bound) == f"rougeL: fine-tuned {sentence}"


def test_of_a_rule_that_failed_the_bound_that_refutes_it_is_known() -> None:
    """That a value of 0.506 is "at least 0.446" does not show that it is below 0.6: "at most 0.562" does."""
    known = {(outcome, bound): gate.Check("rougeL", bound, 0.6, "base", 0.95, outcome, 0.5, 0.4, 0.55).known_text
             for outcome in ("passed", "failed", "undecided") for bound in ("min_gain", "max_drop")}  # type: ignore[arg-type]
    assert known == {("passed", "min_gain"): "at least 0.4", ("passed", "max_drop"): "at most 0.55",
                     ("failed", "min_gain"): "at most 0.55", ("failed", "max_drop"): "at least 0.4",
                     ("undecided", "min_gain"): "at least 0.4", ("undecided", "max_drop"): "at most 0.55"}
    near = gate.Check("rougeL", "min", 0.05, "base", 0.95, "failed", 0.03, 0.02, 0.04996)
    assert near.known_text == "at most 0.04996"


def test_a_check_is_read_from_evaluation_json_as_it_was_written() -> None:
    check = only({"min_gain": 0.2}, base=model(0.25), fine_tuned=model())
    assert gate.Check.from_json(check.to_json()) == check
    assert check.to_json()["description"].startswith("rougeL: fine-tuned - base is 0.252, at least 0.237 with 95 %")


@pytest.mark.parametrize(("by", "records", "clusters"), [
    ("answer", [{"prompt": "a", "completion": "Yes."}, {"prompt": "b", "completion": " yes. "}], 1),
    ("record", [{"prompt": "a", "completion": "Yes."}, {"prompt": "b", "completion": "Yes."}], 2),
    ("record", [{"prompt": "a", "completion": "x", "group": "g"}, {"prompt": "b", "completion": "y", "group": "g"}], 1),
    ("answer", [{"prompt": "a", "completion": "x", "group": "g"}, {"prompt": "b", "completion": "x"}], 2),
    ("answer", [{"text": "a"}, {"text": "a"}], 2),
])
def test_a_cluster_is_a_group_or_the_records_with_the_same_answer(
        by: str, records: list[dict[str, Any]], clusters: int) -> None:
    assert len(set(gate.clusters_of(records, by))) == clusters


def test_a_rouge_rule_on_plain_text_is_refused_before_anything_is_measured() -> None:
    texts = [{"text": f"Number {n}."} for n in range(30)]
    both = Evaluation.model_validate({"gate": {"rouge1": {"min": 0.5}, "rougeL": {"min": 0.5}}})
    with pytest.raises(UserError, match=r"evaluation\.gate\.rouge1, evaluation\.gate\.rougeL: cannot be measured"):
        gate.check_measurable(both, texts)
    gate.check_measurable(Evaluation.model_validate({"gate": {"perplexity": {"max": 9}}}), texts)


def test_too_little_evidence_is_refused_before_anything_is_measured() -> None:
    rules = Evaluation.model_validate({"answered_records": 60, "gate": {"perplexity": {"max": 9}}})
    labels = [{"prompt": f"Is {n} even?", "completion": "yes" if n % 2 == 0 else "no"} for n in range(60)]
    with pytest.raises(UserError, match=r"gate\.perplexity: 60 held-out records in 2 clusters .* at least 20 .*"
                                        r"Raise dataset\.holdout, .*evaluation\.clusters: record"):
        gate.check_measurable(rules, labels)
    gate.check_measurable(rules, [{"text": f"Number {n}."} for n in range(MINIMUM_CLUSTERS)])
    gate.check_measurable(rules.model_copy(update={"clusters": "record"}), labels)


def test_rules_on_answers_need_evidence_among_the_records_that_are_answered() -> None:
    rules = Evaluation.model_validate({"answered_records": 19, "gate": {"perplexity": {"max": 9}}})
    records = [{"prompt": f"Who is {n}?", "completion": f"Number {n}."} for n in range(60)]
    gate.check_measurable(rules, records)
    answers = Evaluation.model_validate({"answered_records": 19, "gate": {"rougeL": {"min": 0.5}}})
    with pytest.raises(UserError, match=r"gate\.rougeL: 19 held-out .* Raise evaluation\.answered_records or dataset"):
        gate.check_measurable(answers, records)


@pytest.mark.parametrize(("metric", "than", "vocabularies", "refused"), [
    ("perplexity", "promoted", {"fine_tuned": "a", "promoted": "b"}, True),
    ("perplexity", "promoted", {"fine_tuned": "a", "promoted": "a"}, False),
    ("perplexity", "promoted", {"fine_tuned": "a"}, False),  # there is none to compare with
    ("perplexity", "base", {"fine_tuned": "a", "base": "a", "promoted": "b"}, False),
    ("bits_per_byte", "promoted", {"fine_tuned": "a", "promoted": "b"}, False)])
def test_values_per_token_are_compared_only_of_models_with_the_same_tokens(
        metric: str, than: str, vocabularies: dict[str, str], refused: bool) -> None:
    rules = Evaluation.model_validate({"gate": {metric: {"max_ratio": 1.0, "than": than}}})
    if not refused:
        gate.check_comparable(rules, vocabularies)
        return
    with pytest.raises(UserError, match="^evaluation.gate.perplexity: the promoted model has another tokenizer, and "
                                        "perplexity is per token, .* Use bits_per_byte for this rule$"):
        gate.check_comparable(rules, vocabularies)


@pytest.mark.parametrize(("metric", "rule"), [("rougeL", {"min": 0.4}), ("perplexity", {"max": 20.0})])
def test_the_interval_of_a_score_is_that_of_its_rule_in_whatever_order_the_rows_are(
        metric: str, rule: dict[str, float]) -> None:
    values = model()
    for row in values["records"][5:9]:
        row["rougeL"] = 0.9  # of one cluster
    clusters = CLUSTERS[:5] + [("group", "one")] * 4 + CLUSTERS[9:]
    (check,) = gate.evaluate_gate(Evaluation.model_validate({"gate": {metric: rule}}), {"fine_tuned": values}, clusters)
    found = gate.score_interval(metric, values, clusters, 0.95)
    assert found is not None and (found.value, found.low, found.high) == (check.value, check.low, check.high)
    surer = gate.score_interval(metric, values, clusters, 0.99)
    assert surer is not None and surer.low < found.low < found.high < surer.high
    values["records"].reverse()
    assert gate.score_interval(metric, values, clusters, 0.95) == found


def test_what_was_not_measured_has_no_interval() -> None:
    assert gate.score_interval("rougeL", model(None) | {"records": []}, CLUSTERS, 0.95) is None


@pytest.mark.parametrize(("clusters", "confidence", "gain"), [(100, 0.95, 0.0746), (25, 0.95, 0.1492),
                                                              (100, 0.99, 0.0950)])
def test_the_smallest_gain_that_evidence_shows_shrinks_with_the_root_of_its_amount(
        clusters: int, confidence: float, gain: float) -> None:
    assert gate.detectable_gain(clusters, confidence) == pytest.approx(gain, abs=1e-4)


@pytest.mark.parametrize(("metric", "more", "text"), [
    ("rougeL", 7, "about 7 more held-out records"), ("acceptability_mcc", 123, "about 120 more sentences"),
    ("tasks.city", 1_250, "about 1,200 more records of the task"), ("privacy.exposure", 7, "about 7 more records"),
    ("rougeL", None, "about 0 more held-out records")])
def test_more_evidence_is_named_by_what_it_is_evidence_of(metric: str, more: int | None, text: str) -> None:
    assert gate.Check(metric, "min", 0.5, "base", 0.95, "undecided", 0.5, more_records=more).more_text == text


def test_a_bound_that_nothing_is_known_of_is_unknown() -> None:
    check = gate.Check("rougeL", "min", 0.123456789, "base", 0.95, "undecided", 0.5)
    assert (check.bound_text, check.requirement) == ("at least unknown", "at least 0.123457")
    assert check.known_text == "at least unknown"


def test_the_clusters_of_a_task_are_its_own_and_each_sentence_is_one() -> None:
    rows: list[dict[str, Any]] = [{"line": 1, "cluster": "a"}, {"line": 3, "cluster": "a"}, {"line": 5}]
    assert gate._names("tasks.city", rows, []) == ["a", "a", 5]
    assert gate._names("acceptability_mcc", rows[2:], []) == [5]
    assert gate._names("rougeL", rows, CLUSTERS) == [("record", 1), ("record", 3), ("record", 5)]


def test_a_cluster_is_named_by_what_its_records_have_in_common() -> None:
    records: list[dict[str, Any]] = [{"prompt": "a", "completion": " Yes\n so", "group": 7},
                                     {"prompt": "b", "completion": " Yes\n so"}, {"text": "c"}]
    assert gate.clusters_of(records, "answer") == [("group", 7), ("answer", "yes so"), ("record", 3)]
    assert gate.clusters_of(records, "record") == [("group", 7), ("record", 2), ("record", 3)]


@pytest.mark.parametrize(("value", "sentence"), [
    (None, "rougeL: fine-tuned must be at least 0.5: nothing measures it"),
    (0.25, "rougeL: fine-tuned is 0.25, must be at least 0.5: nothing measures it")])
def test_what_decided_without_numbers_is_in_the_sentence(value: float | None, sentence: str) -> None:
    check = gate.Check("rougeL", "min", 0.5, "base", 0.95, "failed", value, reason="nothing measures it")
    assert check.description == sentence
    assert check.value_text == ("not a finite number" if value is None else "0.25")


@pytest.mark.parametrize(("value", "low", "high", "limit", "log", "more"), [
    (0.5, 0.25, 1.0, 0.375, False, 120),  # half as wide an interval: four times as much evidence
    (0.5, 0.25, 1.0, 0.625, False, 600), (0.5, 0.3, 0.9, 0.3001, False, 1),
    (0.5, 0.3, 0.9, 0.5, False, None), (0.5, -math.inf, 0.9, 0.4, False, None),
    (100.0, 0.0, 200.0, 99.0, False, 399_960), (100.0, 0.0, 200.0, 99.005, False, None),
    (1.0, 0.25, 4.0, 0.5, True, 120), (1.0, 0.0, 4.0, 0.5, True, None)])
def test_bounds_come_nearer_with_the_root_of_the_evidence(value: float, low: float, high: float, limit: float,
                                                          log: bool, more: int | None) -> None:
    assert gate._more(Interval(value, low, high), limit, 40, log=log) == more


def test_a_factor_beyond_all_numbers_is_infinite() -> None:
    assert [gate._exp(value) for value in (-math.inf, 0.0, 800.0, math.inf)] == [0, 1, math.inf, math.inf]
    assert [gate._log(value) for value in (-1.0, 0.0, 0.5, 1.0)] == [-math.inf, -math.inf, math.log(0.5), 0]
