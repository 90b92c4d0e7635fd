"""The report shows every number and every rule, opens by itself, and shows data without ever obeying it."""

from __future__ import annotations

import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from jobs.core.metrics import SCORES
from jobs.core.plan import plan
from jobs.evaluation import content, evaluate, gate, report, report_html
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
            "intervals": intervals, "adapter": {"name": "hotels", "digest": "00ff"},
            "base_model": {"name": "base/model", "digest": "aa11"},
            "dataset": {"digest": "cc33", "holdout_records": 40},
            "reference_model": {"name": "reference/model", "digest": "bb22"}, "embedded": False, "scores": three,
            "gate": [c.to_json() for c in checks], "training": training,
            "sources": {"dataset": {"source": "https://data.example/d.jsonl", "pin": "5b1f" * 16}}}


def generations(answer: str = "An answer.") -> dict[str, list[dict[str, Any]]]:
    return {role: [{"question": f"Question {i}?", "reference": f"Reference {i}.", "answer": f"{answer} {role} {i}",
                    "rougeL": i / 40} for i in range(40)] for role in content.ROLES}


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
    line = {"question": ATTACK, "reference": ATTACK, "answer": ATTACK, "rougeL": 0.0}
    attacked = {role: [line] for role in content.ROLES}
    values = evaluation(0.5)
    values["sources"]["dataset"]["source"] = values["base_model"]["name"] = values["scores"]["base"]["model"] = ATTACK
    values["adapter"] = {"name": ATTACK, "digest": ATTACK}
    values["reference_model"]["name"] = values["training"]["lora"]["target_modules"] = ATTACK
    page = report_html.page(values, HISTORY, attacked)
    assert page.count("&lt;script&gt;alert(") == 16 and "<script" not in page
    assert Tags(page).open == []
    assert set(Tags(page).seen) & {"script", "a", "h5", "img", "iframe"} == set()
    text = report.markdown(values, HISTORY, attacked)
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


def test_the_page_shows_every_score_a_bar_for_each_and_both_loss_curves() -> None:
    page = report_html.page(evaluation(0.5), HISTORY, generations())
    for shown in ("812.3", "3.142", "0.875", "-0.250", "✓ Passed", "held-out 0.2", "Evenly spaced", "Provenance"):
        assert shown in page
    assert page.count('<rect class="bar') == 3 * len(SCORES)
    assert page.count("<polyline") == 3 and page.count("<circle") == 3


def test_the_terminal_table_has_each_score_of_each_model_and_each_rule() -> None:
    lines = report.table(evaluation(0.3)).splitlines()
    assert lines[2].split() == ["base", "fine-tuned", "reference", "better"]
    assert lines[4].split() == ["perplexity", "812.3", "3.142", "812.3", "lower"]
    assert "passed: the rule of the gate holds" in lines
    assert "  ✓ rougeL: fine-tuned is 0.875, at least 0.865 with 95 % confidence, must be at least 0.3" in lines


def test_a_rejection_is_said_with_the_rule_its_value_and_its_bound(tmp_path: Path) -> None:
    values = evaluation(0.9)
    report.write(tmp_path, values, HISTORY, generations())
    assert "✗ rougeL: fine-tuned is 0.875, at least 0.865 with 95 % confidence, must be at least 0.9" in report.table(
        values)
    assert "**Rejected: 1 of 1 rule of the gate does not hold.**" in (tmp_path / "report.md").read_text()
    page = (tmp_path / "report.html").read_text()
    assert "✗ Rejected" in page and "✗ fails" in page and "The adapter is not promoted." in page


@pytest.mark.parametrize("history", [[], HISTORY[:1], HISTORY[-1:],
                                     [{"step": 1, "epoch": 1.0, "loss": float("nan"), "learning_rate": 0.1}]])
def test_a_short_or_broken_history_still_gives_a_report(history: list[dict[str, float]]) -> None:
    page = report_html.page(evaluation(0.5), history, generations())
    assert Tags(page).open == [] and not re.search(r"\bnan\b", page)


def test_what_was_not_measured_is_a_dash_not_a_zero() -> None:
    missing: dict[str, Any] = dict.fromkeys(("rouge1", "rouge2", "rougeL", "rougeLsum"))
    values = evaluation(0.5, questions=0, reference=missing, **missing)
    values["scores"]["base"] |= missing
    empty: dict[str, list[dict[str, Any]]] = {role: [] for role in content.ROLES}
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


def test_every_report_on_embedded_models_says_so() -> None:
    values = evaluation(0.5) | {"embedded": True}
    for text in (report.table(values), report.markdown(values, HISTORY, generations()),
                 report_html.page(values, HISTORY, generations())):
        assert "for trying out and testing only" in text


def test_samples_are_evenly_spaced_and_the_worst_are_shown_too() -> None:
    spaced, worst = content.samples(generations(), count=4, worst=2)
    assert [sample.question for sample in spaced] == [f"Question {i}?" for i in (0, 13, 26, 39)]
    assert [sample.question for sample in worst] == ["Question 1?", "Question 2?"]
    assert set(spaced[0].answers) == set(content.ROLES)


def test_a_perfect_adapter_has_no_worst_answers() -> None:
    perfect = {role: [line | {"rougeL": 1.0} for line in lines] for role, lines in generations().items()}
    assert content.samples(perfect)[1] == []


def test_a_question_that_one_model_could_not_be_asked_is_shown_with_the_other_answers() -> None:
    partial = generations() | {"reference": []}
    assert set(content.samples(partial)[0][0].answers) == {"base", "fine_tuned"}


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
    three = {role: scores(role) for role in content.ROLES}
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
