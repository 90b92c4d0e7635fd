"""The report shows every number and every rule, opens by itself, and shows data without ever obeying it."""

from __future__ import annotations

import math
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.core import metrics
from jobs.core.metrics import SCORES, Metric, Score
from jobs.core.plan import plan
from jobs.evaluation import charts, content, evaluate, gate, report, report_html, report_records
from jobs.tools.pods import CHECKOUT
from tests import build_pipeline

ATTACK = "<script>alert('x')</script> & \"quoted\" | pipe\n# heading [link](http://evil.example)"
HISTORY = [{"step": s, "epoch": s / 10, "loss": 5.0 / s, "learning_rate": 0.1} for s in range(1, 31)] + [
    {"step": s, "epoch": s / 10, "holdout_loss": 6.0 / s} for s in (10, 20, 30)]


def scores(model: str, **changes: Any) -> dict[str, Any]:
    return {"model": model, "perplexity": 812.34, "bits_per_byte": 3.9, "rouge1": 0.1, "rouge2": 0.05, "rougeL": 0.09,
            "rougeLsum": 0.09, "acceptability_mcc": -0.25, "acceptability_accuracy": 0.8,
            "records": 40, "records_too_long": 0, "completion_tokens": 900,
            "questions": 40, "sentences": 100,
            "vocabulary": "same"} | changes


def evaluation(limit: float, *, reference: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    three = {"base": scores("base/model"), "reference": scores("reference/model", **(reference or {})),
             "fine_tuned": scores("hotels@00ff", **({"perplexity": 3.14159, "rougeL": 0.875} | changes))}
    value = three["fine_tuned"]["rougeL"] or 0.0
    checks = [gate.Check("rougeL", "min", limit, "base", 0.95, "passed" if value >= limit else "failed", value,
                         value - 0.01, value + 0.01, 40)]
    intervals = {role: {key: [found[key] * 0.9, found[key] * 1.1] for key in SCORES if found[key] is not None}
                 for role, found in three.items()}
    training = {"lora": {"r": 16, "alpha": 32.0, "dropout": 0.05, "target_modules": "all-linear"}, "epochs": 3,
                "learning_rate": 2e-4, "max_length": 128, "tokens_per_batch": 256, "seed": 7}
    return {"passed": all(c.passed for c in checks), "outcome": gate.outcome_of(checks), "confidence": 0.95,
            "resampling": {"resamples": 10_000, "seed": 2026, "clusters": 38, "by": "answer"},
            "intervals": intervals, "adapter": {"name": "hotels", "digest": "00ff"},
            "base_model": {"name": "base/model", "digest": "aa11"},
            "dataset": {"digest": "cc33", "holdout_records": 40},
            "reference_model": {"name": "reference/model", "digest": "bb22"}, "embedded": False, "scores": three,
            "gate": [c.to_json() for c in checks], "training": training,
            "sources": {"dataset": {"source": "https://data.example/d.jsonl", "pin": "5b1f" * 16}}}


THREE = ("base", "fine_tuned", "reference")


def generations(answer: str = "An answer.") -> dict[str, list[dict[str, Any]]]:
    return {role: [{"record": i + 1, "question": f"Question {i}?", "reference": f"Reference {i}.",
                    "answer": f"{answer} {role} {i}", "rougeL": i / 40} for i in range(40)] for role in THREE}


def values(**rouge: list[float]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """The values of each record by role, of models with these ROUGE-L; their perplexity is 8 divided by the place of
    the role."""
    return {role: {"records": [{"line": line, "nats": 10 * math.log(8 / place), "tokens": 10, "rougeL": score}
                               for line, score in enumerate(scores, 1)], "sentences": []}
            for place, (role, scores) in enumerate(rouge.items(), 1)}


def undecided(**changes: Any) -> dict[str, Any]:
    """An evaluation of which the rule is undecided, with other fields of its check."""
    found = evaluation(0.9)
    found["gate"][0] |= {"outcome": "undecided", "low": 0.8, "high": 0.95, "more_records": 1234} | changes
    return found | {"outcome": "undecided"}


class Tags(HTMLParser):
    """Every tag and attribute of a page, and whether tags are closed in order."""

    VOID = frozenset({"meta", "br", "rect", "line", "polyline", "circle"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_data_from_clients_and_models_is_shown_and_never_becomes_markup() -> None:
    line = {"record": 1, "question": ATTACK, "reference": ATTACK, "answer": ATTACK, "rougeL": 0.0}
    attacked = {role: [line] for role in THREE}
    found = evaluation(0.5)
    found["sources"]["dataset"]["source"] = found["base_model"]["name"] = found["scores"]["base"]["model"] = ATTACK
    found["adapter"] = {"name": ATTACK, "digest": ATTACK}
    found["reference_model"]["name"] = found["training"]["lora"]["target_modules"] = ATTACK
    page = report_html.page(found, HISTORY, attacked, values(base=[1.0], fine_tuned=[0.0]))
    # In the heading, in the provenance, and five times in each of two samples: evenly spaced, and worse than the base.
    assert page.count("&lt;script&gt;alert(") == 21 and "<script" not in page
    assert Tags(page).open == []
    assert set(Tags(page).seen) & {"script", "a", "h5", "img", "iframe"} == set()
    text = report.markdown(found, HISTORY, attacked, values(base=[1.0], fine_tuned=[0.0]))
    assert "<script" not in text and not re.search(r"(?<!\\)\]\(", text) and not re.search(r"^# heading", text, re.M)
    rows = [line for line in text.splitlines() if line.startswith("| base |") or line.startswith("| expected |")]
    assert rows and all(len(re.findall(r"(?<!\\)\|", row)) == 4 for row in rows)


def test_the_page_opens_by_itself_with_no_script_and_no_network() -> None:
    tags = Tags(report_html.page(evaluation(0.5), HISTORY, generations()))
    assert tags.open == [], "every tag is closed"
    assert not set(tags.seen) & {"script", "link", "img", "iframe", "object"}
    assert not {name for name, _ in tags.attributes} & {"src", "href", "onload", "onclick"}
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in tags.attributes
    style = report_html.TEMPLATE.read_text()
    assert "url(" not in style and "@import" not in style


def test_a_name_that_the_template_is_not_given_is_an_error_and_not_a_gap() -> None:
    from jinja2 import UndefinedError

    with pytest.raises(UndefinedError):
        report_html._template().render()


def test_the_template_is_in_the_package() -> None:
    """setuptools takes only modules, and what package-data names. (That it is in the image: tests/test_images.py.)"""
    with (CHECKOUT / "pyproject.toml").open("rb") as file:
        patterns = tomllib.load(file)["tool"]["setuptools"]["package-data"]["jobs.evaluation"]
    assert list((CHECKOUT / "jobs").rglob("*.j2")) == [report_html.TEMPLATE]
    assert any(report_html.TEMPLATE.match(pattern) for pattern in patterns)


def test_the_page_shows_every_score_with_its_interval_and_both_loss_curves() -> None:
    page = report_html.page(evaluation(0.5), HISTORY, generations())
    for shown in ("812.3", "[731, 894]", "3.142", "[2.83, 3.46]", "0.875", "-0.250", "✓ Passed", "held-out 0.2",
                  "Evenly spaced", "Provenance"):
        assert shown in page
    assert drawn(page) == dict.fromkeys(SCORES, (3, 3))
    assert page.count("<polyline") == 3 and page.count('r="4"') == 3


def drawn(page: str) -> dict[str, tuple[int, int]]:
    """How many dots and whiskers the chart of each score has."""
    figures = page.split("<figure><figcaption>")[1:]
    keys = {score.label: key for key, score in SCORES.items()}
    return {keys[figure.partition(" <small>")[0]]: (figure.count('r="4.5"'), figure.count('class="whisker"'))
            for figure in figures if 'class="plot"' in figure}


def test_the_report_says_what_an_interval_means_and_where_it_comes_from() -> None:
    for text in (report_html.page(evaluation(0.5), HISTORY, generations()),
                 report.markdown(evaluation(0.5), HISTORY, generations())):
        assert "with 95 % confidence the true value is not below the lower one" in " ".join(text.split())
        assert "from 10,000 resamples (seed 2026) of 38 clusters of held-out records" in text


@pytest.mark.parametrize(("low", "high", "shown"), [
    (1.2324, 1.3106, "[1.23, 1.31]"), (461.4, 901.4, "[461, 901]"), (1093.3, 1807.6, "[1,093, 1,808]"),
    (3.14159, 3.14201, "[3.1416, 3.142]"), (None, 2.0, "[–, 2]"), (None, None, "")])
def test_the_ends_of_an_interval_are_short_and_never_read_the_same(
        low: float | None, high: float | None, shown: str) -> None:
    found = evaluation(0.5)
    found["intervals"]["fine_tuned"]["perplexity"] = [low, high]
    assert content.interval_text(found, "fine_tuned", SCORES["perplexity"]) == shown


def test_scores_that_differ_by_a_factor_are_drawn_on_a_logarithmic_scale() -> None:
    """641 and 1.27 on a scale from zero: of the one nothing would be seen, of the other only that it is larger."""
    chart = charts.score_chart(evaluation(0.5, perplexity=1.27), SCORES["perplexity"])
    places = {whisker.role: whisker.dot for whisker in chart.whiskers}
    assert chart.axis and chart.axis.logarithmic
    assert [tick.text for tick in chart.axis.ticks] == ["1", "10", "100", "1k"]
    assert places["base"] == places["reference"] and 0 < (places["fine_tuned"] or 0) < (places["base"] or 0) / 2
    near = charts.score_chart(evaluation(0.5, perplexity=700.0), SCORES["perplexity"])
    assert near.axis and not near.axis.logarithmic


@given(st.lists(st.floats(-1, 1, allow_subnormal=False), min_size=9, max_size=9), st.sampled_from(list(SCORES)))
def test_every_dot_lies_between_the_ends_of_its_whisker_and_within_the_chart(numbers: list[float], key: str) -> None:
    score = SCORES[key]
    found = evaluation(0.5)
    for role, place in zip(THREE, range(0, 9, 3), strict=True):
        low, value, high = sorted(score.low + (n + 1) / 2 * (min(score.high, 1000.0) - score.low)
                                  for n in numbers[place:place + 3])
        found["scores"][role][key], found["intervals"][role][key] = value, [low, high]
    chart = charts.score_chart(found, score)
    assert chart.axis and 2 <= len(chart.axis.ticks) <= 4
    for whisker in chart.whiskers:
        assert None not in (whisker.low, whisker.dot, whisker.high)
        assert 0 <= whisker.low <= whisker.dot <= whisker.high <= 100  # type: ignore[operator]


def register(monkeypatch: pytest.MonkeyPatch, metric: Metric) -> None:
    """A metric that only some pipelines have."""
    for module in (content, report_records):
        for name, found in (("score_of", metric.scores[0]), ("metric_of", metric)):
            before = getattr(metrics, name)
            monkeypatch.setattr(module, name, lambda key, found=found, before=before:
                                found if key == metric.scores[0].key else before(key))


def test_any_registered_score_is_shown_under_its_metric_and_a_model_without_it_has_a_dash(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores that exist for some pipelines only, such as those of the user's own tasks."""
    score = Score("tasks.address", "address", True, "share correct")
    register(monkeypatch, Metric("tasks", 1, "Task: address", "the share of answers that are right.", ("x",), (score,)))
    found = evaluation(0.5)
    found["scores"]["fine_tuned"]["tasks.address"] = 0.93
    found["intervals"]["fine_tuned"]["tasks.address"] = [0.88, 0.97]
    found["scores"]["reference"]["tasks.address"] = None
    page, text = report_html.page(found, HISTORY, generations()), report.markdown(found, HISTORY, generations())
    assert "<h3>Task: address</h3>" in page and "The share of answers that are right." in page
    assert "### Task: address" in text and "| address | – | 0.930 \\[0.88, 0.97\\] | – | higher |" in text
    assert ["address", "–", "0.930", "[0.88,", "0.97]", "–", "higher"] in [
        line.split() for line in report.table(found).splitlines()]
    found["scores"]["fine_tuned"]["tasks.address"] = None
    assert "address" not in report.table(found), "a score that no model has"


def test_the_terminal_table_has_each_score_of_each_model_and_each_rule() -> None:
    lines = report.table(evaluation(0.3)).splitlines()
    assert lines[2].split() == ["base", "fine-tuned", "reference", "better"]
    assert lines[4].split() == ["perplexity", "812.3", "3.142", "[2.83,", "3.46]", "812.3", "lower"]
    place = lines.index("passed: the rule of the gate holds")
    assert lines[place + 1:place + 3] == ["  ✓ rougeL: fine-tuned must be at least 0.3",
                                          "      0.875, at least 0.865 with 95 % confidence"]


def test_the_terminal_table_fits_100_columns() -> None:
    """With a promoted adapter, long names of scores, and a rule of which much is to be said."""
    found = undecided(metric="acceptability_mcc", bound="max_drop", than="promoted")
    found["scores"]["promoted"] = scores("hotels@0001", perplexity=123456.0)
    assert max(map(len, report.table(found).splitlines())) <= 100
    assert "promoted - fine-tuned must be at most 0.9" in report.table(found)


def test_a_rejection_is_said_with_the_rule_its_value_and_the_bound_that_refutes_it(tmp_path: Path) -> None:
    found = evaluation(0.9)
    report.write(tmp_path, found, HISTORY, generations())
    assert report.unmet_rules(found) == ["  ✗ rougeL: fine-tuned must be at least 0.9",
                                         "      0.875, at most 0.885 with 95 % confidence"]
    text = (tmp_path / "report.md").read_text()
    assert "**Rejected: 1 of 1 rule of the gate does not hold.** Train otherwise" in text
    assert ("| rougeL: fine-tuned must be at least 0.9 | 0.875, at most 0.885 with 95 % confidence | **✗ fails** |"
            in text)
    page = (tmp_path / "report.html").read_text()
    assert "✗ Rejected" in page and "✗ fails" in page and "The adapter is not promoted." in page


def test_an_undecided_adapter_is_not_called_rejected_and_the_report_says_what_to_do(tmp_path: Path) -> None:
    found = undecided()
    report.write(tmp_path, found, HISTORY, generations())
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    for shown in (page, text, report.table(found)):
        assert "he data cannot decide 1 of 1 rule of the gate" in shown and "Rejected" not in shown
        assert "about 1,200 more held-out records would decide it" in " ".join(shown.split())
    for shown in (page, text):
        assert "Bring more held-out records (dataset.holdout), or demand less in evaluation.gate" in shown
        assert "? undecided" in shown
    assert "? Undecided" in page and "The adapter is not promoted." in page


def test_what_to_bring_more_of_depends_on_what_the_rule_measures() -> None:
    found = undecided(metric="acceptability_mcc", bound="max_drop")
    assert "Bring more sentences (evaluation.acceptability), or" in content.next_step(found)
    assert "about 1,200 more sentences would decide it" in " ".join(report.table(found).split())


def test_a_rejection_with_undecided_rules_says_both() -> None:
    found = evaluation(0.9)
    found["gate"] += undecided()["gate"]
    assert content.verdict(found) == "rejected: 1 of 2 rules of the gate does not hold, 1 is undecided"
    assert [line[2] for line in report.unmet_rules(found) if line[2] != " "] == ["✗", "?"]


def test_a_rule_that_no_number_decided_is_shown_with_the_reason() -> None:
    found = evaluation(0.5)
    found["gate"][0] |= {"value": None, "low": None, "high": None, "reason": "there is no promoted model"}
    page = report_html.page(found, HISTORY, generations())
    assert "There is no promoted model" in page and "There is no promoted model".lower() in report.table(found)
    assert '<svg class="bullet"' not in page and "✓ passes" in page


def test_a_rule_without_a_bound_says_so() -> None:
    found = undecided(low=None, high=None, more_records=None)
    assert "      0.875, no bound with 95 % confidence: undecided" in report.table(found).splitlines()
    assert '<svg class="bullet"' in report_html.page(found, HISTORY, generations())


@pytest.mark.parametrize(("value", "tick"), [(1e300, "1e+"), (0.8581125142423945, "0.8")])
def test_values_that_are_huge_or_all_the_same_are_drawn(value: float, tick: str) -> None:
    found = evaluation(0.5, perplexity=value)
    for of_model in found["scores"].values():
        of_model["rougeL"] = 0.8581125142423945
    found["intervals"]["fine_tuned"] = {"perplexity": [value, value * (1 + 1e-15)], "rougeL": [0.85811251424239, 1.0]}
    found["intervals"]["base"] = found["intervals"]["reference"] = {}
    page = report_html.page(found, HISTORY, generations())
    assert tick in page and Tags(page).open == [] and not re.search(r"\b(nan|inf)%", page)


def test_of_many_rules_a_message_names_the_first_failed_ones() -> None:
    """A pod's termination message has 4 KiB, and what to do and where the report is come after the rules."""
    found = undecided()
    found["gate"] = [*found["gate"] * 30, *evaluation(0.9)["gate"]]
    lines = report.unmet_rules(found)
    assert lines[0].startswith("  ✗") and lines[-1] == "  and 23 more rules, in the report"
    assert len("\n".join(lines).encode()) < 3000


@pytest.mark.parametrize(("bound", "limit", "low", "value", "high", "outcome"), [
    ("max_ratio", 0.5, 0.0014, 0.0020, 0.0027, "passed"), ("max_ratio", 0.5, 0.4, 0.45, 0.6, "undecided"),
    ("min_gain", 0.3, 0.1, 0.15, 0.2, "failed"), ("max_drop", 0.1, 0.02, 0.04, 0.07, "passed"),
    ("max_drop", 0.05, 0.02, 0.04, 0.07, "undecided"), ("min", 0.9, 0.8, 0.85, 0.89, "failed")])
def test_a_rule_is_drawn_as_it_was_decided(bound: str, limit: float, low: float, value: float, high: float,
                                           outcome: Any) -> None:
    """It passes where the deciding bound lies in the band of what is allowed, and fails where no part of it does."""
    key = "perplexity" if bound == "max_ratio" else "rougeL"
    drawing = charts.bullet(gate.Check(key, bound, limit, "base", 0.95, outcome, value, low, high, 40))
    assert drawing.band and drawing.dot and drawing.whisker and drawing.deciding
    first, last = drawing.band[0], sum(drawing.band)
    inside = [first <= x <= last for x in drawing.deciding]
    assert all(inside) == (outcome == "passed")
    assert any(first <= x <= last for x in drawing.whisker) == (outcome != "failed")
    assert drawing.whisker[0] <= drawing.dot <= drawing.whisker[1] and drawing.dot in drawing.deciding


# --- records that changed -------------------------------------------------------------------------------------------


def test_the_report_counts_and_shows_the_records_that_got_worse_and_better_the_worst_first() -> None:
    models = values(base=[0.5, 0.5, 0.5, 0.5, 0.5], fine_tuned=[0.9, 0.5, 0.1, 0.4, 0.502])
    page = report_html.page(evaluation(0.5), HISTORY, generations(), models)
    assert "against the base model: 1 better, 2 worse, 2 unchanged" in page
    assert "against the base model: 5 better, 0 worse, 0 unchanged" in page, "of perplexity"
    worse = page.partition(">Worse than the base model")[2].partition(">Better than the base model")[0]
    assert re.findall(r'<p class="question">(.*?)</p>', worse) == ["Question 2?", "Question 3?"]
    assert "ROUGE-L 0.500 → 0.100" in worse and "2 of 2, the largest change first" in worse
    better = page.partition(">Better than the base model")[2].partition("<h2>")[0]
    assert re.findall(r'<p class="question">(.*?)</p>', better) == ["Question 0?"]
    assert Tags(page).open == []
    text = report.markdown(evaluation(0.5), HISTORY, generations(), models)
    assert "- ROUGE-L, against the base model: 1 better, 2 worse, 2 unchanged" in text
    assert text.index("### Worse than the base model: 2 of 2") < text.index("#### 3: Question 2?") < text.index(
        "#### 4: Question 3?") < text.index("### Better than the base model: 1 of 1")


def test_the_records_of_a_task_that_flipped_are_counted_and_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    score = Score("tasks.address", "task address", True, "share correct")
    population: Any = "tasks.address"
    register(monkeypatch, Metric("tasks", 1, "Task address", "checked.", ("value",), (score,), population))
    models = {role: {**of_model, "tasks.address": [{"line": line, "value": right} for line, right in enumerate(row, 1)]}
              for (role, of_model), row in zip(values(base=[0.5], fine_tuned=[0.5]).items(),
                                               ([1, 0, 0, 1], [1, 1, 1, 0]), strict=True)}
    page = report_html.page(evaluation(0.5), HISTORY, generations(), models)
    assert "against the base model: 2 better, 1 worse, 1 unchanged" in page
    worse = page.partition(">Task address: worse than the base model")[2].partition("<h3>")[0]
    assert re.findall(r"<tr><td>(\d+)</td>", worse) == ["4"]
    text = report.markdown(evaluation(0.5), HISTORY, generations(), models)
    assert "- task address, against the base model: 2 better, 1 worse, 1 unchanged" in text
    assert "| 4 | 1.000 | 0.000 |" in text


def test_records_are_compared_with_the_promoted_adapter_where_it_was_measured() -> None:
    models = values(base=[0.1, 0.1], fine_tuned=[0.5, 0.5], promoted=[0.6, 0.4])
    found = evaluation(0.5)
    found["scores"]["promoted"] = scores("hotels@0001")
    page = report_html.page(found, HISTORY, generations(), models)
    assert "against the promoted model: 1 better, 1 worse, 0 unchanged" in page
    assert ">Worse than the promoted model" in page and ">Worse than the base model" not in page
    assert "hotels@0001, which was promoted then</dd>" in page
    found["scores"]["promoted"]["vocabulary"] = "other"
    found["promoted"] = {"name": "hotels", "digest": "0001", "base_model": "ff99"}
    other = report_html.page(found, HISTORY, generations(), models)
    assert "hotels@0001, which was promoted then, trained on base-model/ff99" in other
    assert page.count("against the promoted model") - other.count("against the promoted model") == 1
    assert "The promoted model has another tokenizer" in other and "another tokenizer" not in page
    assert drawn(page)["rougeL"] == (4, 3), "without an interval no whisker: the value would look certain"


def test_records_are_joined_by_their_line_and_of_a_text_without_a_question_the_perplexity_is_compared() -> None:
    models: dict[str, gate.Values] = {
        "base": {"records": [{"line": 7, "nats": 20.0, "tokens": 10}, {"line": 9, "nats": None, "tokens": 10}]},
        "fine_tuned": {"records": [{"line": 8, "nats": 1.0, "tokens": 10}, {"line": 9, "nats": 10.0, "tokens": 5},
                                   {"line": 7, "nats": 30.0, "tokens": 10}]}}
    (comparison,) = report_records.comparisons(models)
    assert [change.record for change in comparison.changes] == [7, 9]
    assert [change.before for change in comparison.changes] == pytest.approx([math.exp(2), math.inf])
    assert [change.after for change in comparison.changes] == pytest.approx([math.exp(3), math.exp(2)])
    empty: dict[str, list[dict[str, Any]]] = {role: [] for role in THREE}
    page = report_html.page(evaluation(0.5), HISTORY, empty, models)
    assert "1 better, 1 worse, 0 unchanged" in page and not re.search(r"\b(nan|inf)%", page)
    assert "<tr><td>7</td>" in page.partition(">Worse than the base model")[2]


def test_texts_without_a_question_among_questions_are_listed_by_their_perplexity() -> None:
    """The answers are all the same, and only a text got worse: there is no answer to show."""
    models = values(base=[0.5, 0.5], fine_tuned=[0.5, 0.5])
    for of_model, nats in zip(models.values(), (10.0, 20.0), strict=True):
        of_model["records"][1].pop("rougeL")
        of_model["records"][1]["nats"] = nats
    asked = {role: lines[:1] for role, lines in generations().items()}
    page = report_html.page(evaluation(0.5), HISTORY, asked, models)
    worse = page.partition(">Worse than the base model")[2].partition("<h3>")[0]
    assert "<tr><td>2</td>" in worse and "2.718" in worse and "7.389" in worse


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=50))
def test_a_histogram_counts_every_record_on_its_side(pairs: list[tuple[float, float]]) -> None:
    first, *_ = report_records.comparisons(values(base=[a for a, _ in pairs], fine_tuned=[b for _, b in pairs]))
    columns = charts.histogram(first).columns
    counts = {kind: sum(column.count for column in columns if column.kind == kind)
              for kind in ("better", "worse", "unchanged")}
    assert counts == {"better": len(first.better), "worse": len(first.worse),
                      "unchanged": len(pairs) - len(first.better) - len(first.worse)}


def test_where_answers_are_private_the_report_has_numbers_and_lines_only(tmp_path: Path) -> None:
    models = values(base=[0.5, 0.5], fine_tuned=[0.9, 0.1])
    report.write(tmp_path, evaluation(0.5), HISTORY, generations("Secret"), models, answers=False)
    for name in ("report.html", "report.md"):
        text = (tmp_path / name).read_text()
        assert not re.search(r"Secret|Question \d|Reference \d", text)
        assert "Questions and answers are left out" in text
        assert "1 better, 1 worse, 0 unchanged" in text and "0.100" in text
    assert "| 2 | 0.500 | 0.100 |" in (tmp_path / "report.md").read_text()
    report.write(tmp_path, evaluation(0.5), HISTORY, generations("Secret"), models)
    assert "Secret" in (tmp_path / "report.html").read_text() and "Secret" in (tmp_path / "report.md").read_text()


def test_what_privacy_found_of_single_records_is_shown_as_positions_and_numbers() -> None:
    found = evaluation(0.5) | {"privacy": {
        "canaries": 100, "counts": {"canary": 100, "train": 365},
        "worst_canaries": [{"position": 12, "exposure": 5.87654, "text": "a secret"}, {"position": 40}],
        "longest_verbatim": []}}
    page, text = report_html.page(found, HISTORY, generations()), report.markdown(found, HISTORY, generations())
    assert "### Privacy: worst canaries" in text and "<h3>Privacy: worst canaries</h3>" in page
    assert "| 12 | 5.877 |" in text and "| 40 | – |" in text and '<td class="n">5.877</td>' in page
    assert "100 canary, 365 train" in page and "ongest verbatim" not in page + text
    assert "a secret" not in page + text


@pytest.mark.parametrize("history", [[], HISTORY[:1], HISTORY[-1:],
                                     [{"step": 1, "epoch": 1.0, "loss": float("nan"), "learning_rate": 0.1}]])
def test_a_short_or_broken_history_still_gives_a_report(history: list[dict[str, float]]) -> None:
    page = report_html.page(evaluation(0.5), history, generations())
    assert Tags(page).open == [] and not re.search(r"\bnan\b", page)


def test_what_was_not_measured_is_a_dash_not_a_zero() -> None:
    missing: dict[str, Any] = dict.fromkeys(("rouge1", "rouge2", "rougeL", "rougeLsum"))
    values = evaluation(0.5, questions=0, reference=missing, **missing)
    values["scores"]["base"] |= missing
    empty: dict[str, list[dict[str, Any]]] = {role: [] for role in THREE}
    page, text = report_html.page(values, HISTORY, empty), report.table(values)
    assert [line.split() for line in text.splitlines() if line.startswith("ROUGE-L ")] == [
        ["ROUGE-L", "–", "–", "–", "higher"]]
    assert "plain text without questions" in text and "plain text without questions" in page
    assert "Answers to held-out" not in page


def test_perplexities_over_different_tokenizers_are_not_compared() -> None:
    """The reference has the lowest perplexity, but per token of another tokenizer: it is said, and not marked best."""
    values = evaluation(0.5, reference={"perplexity": 1.5, "vocabulary": "other"})
    perplexity, bits = SCORES["perplexity"], SCORES["bits_per_byte"]
    assert "another tokenizer" in report.table(values)
    assert content.best(values, perplexity) == {"fine_tuned"}
    assert content.best(values, bits) == {"base", "fine_tuned", "reference"}
    same = evaluation(0.5, reference={"perplexity": 1.5})
    assert "another tokenizer" not in report.table(same) and content.best(same, perplexity) == {"reference"}


def test_prompts_of_a_task_that_were_too_long_are_said() -> None:
    found = evaluation(0.5, tasks={"address": {"records": 30, "records_too_long": 2}})
    assert content.notes(found) == [
        "2 prompts of the task address were too long for the fine-tuned model and are left out of its score."]


def test_every_report_on_embedded_models_says_so() -> None:
    values = evaluation(0.5) | {"embedded": True}
    for text in (report.table(values), report.markdown(values, HISTORY, generations()),
                 report_html.page(values, HISTORY, generations())):
        assert "for trying out and testing only" in text


def test_samples_are_evenly_spaced_and_the_worst_are_shown_too() -> None:
    spaced, worst = report_records.samples(generations(), count=4, worst=2)
    assert [sample.question for sample in spaced] == [f"Question {i}?" for i in (0, 13, 26, 39)]
    assert [sample.question for sample in worst] == ["Question 1?", "Question 2?"]
    assert set(spaced[0].answers) == set(THREE)


def test_a_perfect_adapter_has_no_worst_answers() -> None:
    perfect = {role: [line | {"rougeL": 1.0} for line in lines] for role, lines in generations().items()}
    assert report_records.samples(perfect)[1] == []


def test_a_question_that_one_model_could_not_be_asked_is_shown_with_the_other_answers() -> None:
    partial = generations() | {"reference": []}
    assert set(report_records.samples(partial)[0][0].answers) == {"base", "fine_tuned"}


# --- settings that a search chose -----------------------------------------------------------------------------------


def searched(trials: int = 3, **changes: Any) -> dict[str, Any]:
    """The record of a search over ranks, of which the second trial was chosen."""
    found: list[dict[str, Any]] = [
        {"trial": n, "settings": {"lora.r": 4 * n}, "steps": 60, "ended": "stopped: place 3 of 3",
         "rungs": [{"step": 20, "validation_loss": 1.5 + n / 10}], "curve": [[10, 3.0], [20, 1.5 + n / 10]]}
        for n in range(1, trials + 1)]
    found[1]["ended"] = "chosen"
    found[1]["rungs"].append({"step": 60, "validation_loss": 0.75})
    found[1]["curve"].append([60, 0.75])
    return {"chosen": 2, "settings": {"lora.r": 8}, "trials": found} | changes


def test_every_trial_of_a_search_is_in_all_reports_with_its_curve() -> None:
    values = evaluation(0.5) | {"search": searched()}
    page = report_html.page(values, HISTORY, generations())
    plain = report_html.page(evaluation(0.5), HISTORY, generations())
    assert Tags(page).open == []
    assert page.count("<polyline") == plain.count("<polyline") + 3
    assert page.count("<circle") == plain.count("<circle") + 3, "the points of the chosen trial"
    for text in ("lora.r 12", "20 of 60", "1.800", "0.750", "stopped: place 3 of 3", ">trial 3<", "had no part in it",
                 "lora.r 8: chosen among 3 trials by the loss on the validation split"):
        assert text in page and ">Search<" in page
        assert text not in plain and ">Search<" not in plain
    assert page.count('<td class="n best">2</td>') == 1
    assert "| 2 | lora.r 8 | 60 of 60 | 0.750 | chosen |" in report.markdown(values, HISTORY, generations())
    assert [line.split() for line in report.table(values).splitlines()][-2] == [
        "2", "lora.r", "8", "60", "of", "60", "0.750", "chosen"]


def test_the_evaluation_names_the_settings_that_were_chosen() -> None:
    wanted = build_pipeline.build(training__search={"candidates": {"lora.r": [4, 8], "epochs": [1, 5]}})
    three = {role: scores(role) for role in THREE}
    record = searched() | {"settings": {"lora.r": 4, "epochs": 5}}
    found = evaluate.summary(wanted, plan(wanted), three, [], {}, record)
    assert (found["training"]["lora"]["r"], found["training"]["epochs"]) == (4, 5)
    assert found["search"] == record and "search" not in found["training"]
    assert "search" not in evaluate.summary(build_pipeline.build(), plan(build_pipeline.build()), three, [], {})


def test_many_trials_and_broken_ones_still_give_a_report() -> None:
    record = searched(trials=20)
    record["trials"][0] |= {"rungs": [{"step": 20, "validation_loss": None}], "curve": [], "ended": ATTACK}
    page = report_html.page(evaluation(0.5) | {"search": record}, HISTORY, generations())
    assert Tags(page).open == [] and "not finite" in page and "<script" not in page
    assert ">trial 2<" in page and ">trial 3<" not in page, "20 names would be on each other"
    for trial in record["trials"]:
        trial["curve"] = []
    page = report_html.page(evaluation(0.5) | {"search": record}, HISTORY, generations())
    assert "Loss on the validation split of each trial" not in page


def test_the_loss_on_the_validation_split_is_shown_where_training_measured_that_instead() -> None:
    history = [{"step": s, "epoch": s / 10, "validation_loss": 6.0 / s} for s in (10, 20, 30)]
    assert "validation 0.2" in report_html.page(evaluation(0.5), history, generations())
    assert "## Loss on the validation split while training" in report.markdown(evaluation(0.5), history,
                                                                              generations())


def test_a_limit_on_the_questions_that_are_answered_is_said_in_every_report() -> None:
    limited = evaluation(0.5, questions=1000, questions_left_out=99_000)
    note = ("Of 100,000 held-out questions, 1,000 were answered, the first by sha256 (evaluation.answered_records). "
            "Perplexity is over all of them.")
    assert content.notes(limited) == [note]
    assert note in report.table(limited) and note in report_html.page(limited, HISTORY, generations())
    assert content.notes(evaluation(0.5, questions_left_out=0)) == []
