"""Promises of what `jobs local` shows at the end: a verdict on every adapter, and an answer of each that passed."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from jobs.core import imported
from jobs.core.artifacts import publish
from jobs.core.errors import RetryableError
from jobs.core.imported import Imported
from jobs.core.metrics import SCORES
from jobs.core.plan import plan
from jobs.evaluation.gate import Check
from jobs.tools import summary, waiting
from jobs.tools.summary import Result
from tests import build_pipeline, build_published
from tests.tools.test_waiting import endpoint


def evaluated(name: str = "seville-hotels", *, ratio: float = 0.25, **changes: Any) -> Result:
    """An adapter whose perplexity is `ratio` of the base model's; its gate takes up to 0.5."""
    pipeline = build_pipeline.build(adapter=name, **changes)
    check = Check("perplexity", "max_ratio", 0.5, "base", 0.95, "passed" if ratio <= 0.5 else "failed", ratio,
                  ratio - 0.02, ratio + 0.02, 60)
    scores = {role: dict.fromkeys(SCORES, 0.5) | {"records": 60, "vocabulary": "v", "perplexity": perplexity}
              for role, perplexity in (("base", 800.0), ("fine_tuned", 800 * ratio), ("reference", 400.0))}
    return Result(pipeline, plan(pipeline).adapter.digest,
                  {"passed": check.passed, "outcome": check.outcome, "gate": [check.to_json()],
                   "intervals": {"fine_tuned": {"perplexity": [800 * ratio - 9, 800 * ratio + 9]}},
                   "scores": scores, "embedded": True},
                  Path(f"/volumes/{name}/report.html"))


def test_of_few_adapters_each_rule_is_shown_with_the_scores_of_the_three_models() -> None:
    shown = summary.verdicts([evaluated("a"), evaluated("b", ratio=0.75)])
    assert f"  a@{evaluated('a').digest} passed: the rule of the gate holds on 60 held-out records\n" in shown
    assert "rejected: 1 of 1 rule of the gate does not hold on 60 held-out records" in " ".join(shown.split())
    assert re.search(r"perplexity +800 +200 \[191, 209\] +400 +lower\n", shown)
    assert "\n    ✓ perplexity: fine-tuned / base is at most 0.27 (95 %), must be at most 0.5\n" in shown
    assert ("\n    ✗ perplexity: fine-tuned / base must be at most 0.5\n"
            "        0.75, at least 0.73 with 95 % confidence\n") in shown
    assert shown.count("Embedded models") == 1
    assert max(len(line) for line in shown.splitlines() if "Embedded" not in line) <= 100


def test_of_an_undecided_adapter_the_rule_says_what_would_decide_it() -> None:
    result = evaluated("a")
    check = result.evaluation["gate"][0]
    check |= {"outcome": "undecided", "limit": 0.26, "more_records": 12}
    shown = summary.verdicts([result])
    assert "undecided: the data cannot decide 1 of 1 rule of the gate" in shown
    assert "    ? perplexity: fine-tuned / base must be at most 0.26\n" in shown
    assert "confidence; about 12 more held-out records would decide it" in " ".join(shown.split())


def test_of_many_adapters_each_has_a_line_and_only_rules_that_do_not_hold_are_shown() -> None:
    shown = summary.verdicts([*(evaluated(f"team-{n}") for n in range(50)), evaluated("late", ratio=0.75)])
    lines = [line for line in shown.splitlines() if line]
    assert sum("@" in line for line in lines) == 51
    assert [line.strip() for line in lines if "perplexity" in line] == [
        "✗ perplexity: fine-tuned / base must be at most 0.5"]
    assert "      0.75, at least 0.73 with 95 % confidence" in shown
    assert len(lines) == 54  # with the two of the rule, and the note on embedded models


def test_a_rejected_adapter_is_not_asked_and_does_not_hide_the_others(tmp_path: Path) -> None:
    rejected, passed = evaluated("rejected", ratio=0.75), evaluated("passed")
    with endpoint(("passed", passed.digest)) as url:
        shown = summary.ask([rejected, passed], tmp_path, url, "Who?").splitlines()
    assert [line.split(")", 1)[1].strip() for line in shown if ")" in line] == [
        "answer of HuggingFaceTB/SmolLM2-135M-Instruct", "answer of passed", "(not asked: it did not pass its gate)"]


def test_in_mode_merged_the_one_adapter_that_is_served_is_asked(tmp_path: Path) -> None:
    first, second = evaluated("first", serving__mode="merged"), evaluated("second", serving__mode="merged")
    with endpoint(("first", first.digest)) as url:
        shown = summary.ask([first, second], tmp_path, url, "Who?").splitlines()
    assert [line.split(")", 1)[1].strip() for line in shown if ")" in line] == [
        "answer of first", "(not asked: in mode merged, one adapter is served)"]


def test_every_report_is_listed_and_of_many_models_the_first(tmp_path: Path) -> None:
    results = [evaluated(f"team-{n}") for n in range(12)]
    shown = summary.places(results[0].pipeline.environment, results, tmp_path, "http://127.0.0.1:8000", None, "Who?",
                           serving=True)
    assert [f"/volumes/team-{n}/report.html" in shown for n in range(12)] == [True] * 12
    assert "(models: team-0, team-1, team-2, team-3, team-4, team-5, team-6, team-7, 5 more)" in shown
    assert '"model": "team-0"' in shown


def test_an_adapter_that_no_job_evaluated_has_no_result(tmp_path: Path) -> None:
    assert summary.results([build_pipeline.build()], tmp_path) == []


def test_while_the_server_restarts_the_only_progress_shown_is_our_own(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """In mode merged a new adapter is a restart: nothing listens for half a minute."""
    result = evaluated(serving__mode="merged")
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(waiting, "REMINDER_SECONDS", 0.5)
    with endpoint((result.name, result.digest)) as url:
        down = iter(["http://127.0.0.1:9"] * 4)
        served = waiting.served_adapter
        monkeypatch.setattr(summary, "served_adapter", lambda endpoint, alias: served(next(down, endpoint), alias))
        shown = summary.ask([result], tmp_path, url, "Who?")
    assert "fine-tuned (seville-hotels)  answer of seville-hotels" in shown
    assert "base model" not in shown
    name = f"{result.name}@{result.digest}"
    ours = [m for m in caplog.messages if name in m]
    assert ours[0] == f"waiting for {name} to be served (at most 300 s)"
    assert len(ours) > 2
    assert not [m for m in caplog.messages if "Retrying" in m]


def test_the_adapter_before_is_not_asked_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = evaluated("first"), evaluated("second")
    monkeypatch.setattr(summary, "ALIAS_SECONDS", 0.0)
    with endpoint(("first", first.digest), ("second", "0" * 16)) as url, \
            pytest.raises(RetryableError, match=f"^second@{second.digest} is promoted but was not served within 0 s"):
        summary.ask([first, second], tmp_path, url, "Who?")


def test_a_server_that_refuses_the_question_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = evaluated()
    monkeypatch.setattr(summary, "served_adapter", lambda *_: result.digest)
    with pytest.raises(RetryableError, match=r"^http://127\.0\.0\.1:9: Connection error\.; the log of model-inference"):
        summary.ask([result], tmp_path, "http://127.0.0.1:9", "Who?")


def test_an_imported_adapter_is_shown_by_the_evaluation_that_was_published_with_it(tmp_path: Path) -> None:
    values = {"dataset": None, "training": None, "evaluation": None, "sha256": "0" * 64,
              "source": "oci://registry.example.com/x", "base_model": {"source": "builtin:tiny"}}
    adapter = imported.load(build_pipeline.write(tmp_path, **values)).pipeline
    volumes = tmp_path / "volumes"
    assert summary.results([adapter], volumes) == []  # its relocation has not run
    (volumes / "fine-tuned-model-pvc").mkdir(parents=True)
    (volumes / "fine-tuned-model").symlink_to("fine-tuned-model-pvc")
    trained = plan(build_pipeline.build(base_model={"source": "builtin:tiny"}))
    arrived = Imported(trained.adapter, trained.evaluation)

    def published(draft: Path) -> None:
        (draft / "evaluation.json").write_text(json.dumps(evaluated().evaluation))
        (draft / "without-answers").mkdir()
        (draft / "without-answers" / "report.html").write_text("<p>passed")

    build_published.record(volumes, adapter, arrived)
    publish(trained.evaluation, volumes, published, keep=1)
    (result,) = summary.results([adapter], volumes)
    assert (result.name, result.digest, result.passed) == ("seville-hotels", trained.adapter.digest, True)
    assert result.report.read_text() == "<p>passed"
    assert f"seville-hotels@{trained.adapter.digest} passed" in summary.verdicts([result])
