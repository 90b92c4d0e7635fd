"""Tasks: each check finds what it promises, the interval of a macro F1 is right, and the gate goes by tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import f1_score

from jobs.core import models
from jobs.core.errors import UserError
from jobs.core.metrics import MINIMUM_CLUSTERS
from jobs.core.plan import plan
from jobs.core.tasks import Task
from jobs.data.encoding import encode, encode_question
from jobs.evaluation import checks, content, evaluate, gate, report, tasks
from jobs.evaluation.confidence import Clusters, interval
from jobs.evaluation.metrics import rouge, statistic
from jobs.evaluation.metrics.tasks import MacroF1
from tests import build_pipeline
from tests.build_models import RECORDS, published_pipeline, tiny_tokenizer


def task(check: str, **options: Any) -> Task:
    return Task(name="city", source="file:city.jsonl", check=check, **options)  # type: ignore[arg-type]


SEVILLE = {"expected": ["Seville", "Sevilla"]}
OBJECT = {"schema": {"type": "object", "required": ["city"], "properties": {"city": {"type": "string"}}}}


@pytest.mark.parametrize(("of", "record", "answer", "value"), [
    (task("exact"), SEVILLE, "Sevilla", 1), (task("exact"), SEVILLE, " Sevilla\n", 1),
    (task("exact"), SEVILLE, "sevilla", 0), (task("exact"), SEVILLE, "Sevilla.", 0), (task("exact"), SEVILLE, "", 0),
    (task("exact", case_sensitive=False), SEVILLE, "SEVILLA", 1),
    (task("exact"), {"expected": ["a  b"]}, "a b", 0),
    (task("exact", normalize=True), {"expected": ["a  b"]}, "a\u200b \u00a0 b", 1),
    (task("exact", normalize=True), {"expected": ["ﬁn"]}, "fin", 1),
    (task("exact", normalize=True), {"expected": ["Fin"]}, "fin", 0),
    (task("exact", case_sensitive=False), {"expected": ["straße"]}, "STRASSE", 1),
    (task("contains"), SEVILLE, "It is in Seville, Spain.", 1), (task("contains"), SEVILLE, "In Granada.", 0),
    (task("contains"), SEVILLE, "in seville", 0), (task("contains", case_sensitive=False), SEVILLE, "in seville", 1),
    (task("contains", normalize=True), {"expected": ["Casa  Azahar"]}, "the Casa\nAzahar.", 1),
    (task("regex"), {"pattern": r"^\d+ rooms$"}, "42 rooms", 1), (task("regex"), {"pattern": r"\d+"}, "none", 0),
    (task("regex", pattern="^yes$"), {}, "Yes", 0),
    (task("regex", pattern="^yes$", case_sensitive=False), {}, "Yes", 1),
    (task("regex", pattern="ü"), {}, "Grüße", 1),
    (task("json_schema"), OBJECT, '{"city": "Seville"}', 1), (task("json_schema"), OBJECT, ' {"city": "S"}\n', 1),
    (task("json_schema"), OBJECT, '{"city": 7}', 0), (task("json_schema"), OBJECT, '{"city": "S"', 0),
    (task("json_schema"), OBJECT, 'Sure: {"city": "S"}', 0), (task("json_schema"), OBJECT, "", 0),
    (task("json_schema", schema={}), {}, "NaN", 0), (task("json_schema", schema={}), {}, "[" * 100_000, 0),
    (task("json_schema", schema={}), {}, "1" * 5000, 0),
    (task("json_schema", schema={"type": "integer"}), {}, "1" * 400, 1),
    (task("json_schema"), OBJECT, '```json\n{"city": "S"}\n```', 0),
    (task("json_schema", fence=True), OBJECT, '```json\n{"city": "S"}\n```', 1),
    (task("json_schema", fence=True), OBJECT, '```\n{"city": "S"}\n```', 1),
    (task("json_schema", fence=True), OBJECT, '{"city": "S"}', 1),
    (task("json_schema", fence=True), OBJECT, '```json\n{"city": "S"}', 0),
    (task("json_schema", fence=True), OBJECT, '```json\n{"city": 7}\n```', 0),
    (task("json_schema", fence=True), OBJECT, ' ```JSON \n{"city": "S"}\n```\n', 1),
    (task("json_schema", fence=True), OBJECT, '```\n{"city": "S"}```', 1),
    (task("json_schema", fence=True), OBJECT, '```python\n{"city": "S"}\n```', 0),
    (task("json_schema", schema={}), {}, "-Infinity", 0), (task("json_schema", schema={}), {}, "7", 1),
    (task("exact", case_sensitive=False), {"expected": ["\u00c9"]}, "e\u0301", 1),  # one form of Unicode
    (task("exact"), {"expected": ["\u00e9"]}, "e\u0301", 0),
    (task("exact", normalize=True, case_sensitive=False), {"expected": ["Ca sa"]}, " CA\nSA ", 1),
    (task("label_f1", normalize=True), {"label": "a b"}, "a  b", 1),
    (task("label_f1"), {"label": "yes"}, "yes", 1), (task("label_f1"), {"label": "yes"}, "yes, it is", 0),
    (task("label_f1", case_sensitive=False), {"label": "Yes"}, "YES", 1),
])
def test_a_check_finds_what_it_promises(of: Task, record: dict[str, Any], answer: str, value: float) -> None:
    assert checks.value_of(of, record, answer) == value


def test_the_labels_of_a_task_are_those_of_its_records_as_they_are_compared() -> None:
    records = [{"label": "yes"}, {"label": "No"}, {"label": "no "}]
    assert checks.labels_of(task("label_f1", case_sensitive=False), records) == {"no": 0, "yes": 1}
    assert checks.labels_of(task("label_f1"), records) == {"No": 0, "no": 1, "yes": 2}
    assert checks.labels_of(task("exact"), [{"expected": ["a"]}]) == {}


def test_rouge_is_that_of_the_nearest_accepted_text() -> None:
    near, far = "the hotel in Seville", "a boat"
    assert checks.value_of(task("rougeL"), {"expected": [far, near]}, "hotel in Seville") == pytest.approx(
        rouge.each(near, "hotel in Seville")["rougeL"])


def test_macro_f1_is_that_of_scikit_learn_in_every_draw() -> None:
    random = np.random.default_rng(1)
    true, said = random.integers(0, 4, 50), random.integers(-1, 4, 50)
    clusters = Clusters.of(list(random.integers(0, 25, 50)))
    statistic = MacroF1.of(true, said, clusters)
    for counts in (np.ones(clusters.count), *random.integers(0, 3, (5, clusters.count))):
        rows = np.repeat(np.arange(50), clusters.of_rows(counts[None])[0].astype(int))
        present = sorted({*true[rows], *said[rows]} - {-1})
        expected = f1_score(true[rows], said[rows], labels=present, average="macro", zero_division=0)
        assert statistic(counts[None].astype(float))[0][0] == pytest.approx(expected)


def test_the_derivatives_of_macro_f1_are_those_of_finite_differences() -> None:
    random = np.random.default_rng(2)
    clusters = Clusters.of(list(random.integers(0, 12, 40)))
    statistic = MacroF1.of(random.integers(0, 3, 40), random.integers(-1, 3, 40), clusters)
    counts = random.uniform(0.5, 3, (4, clusters.count))
    slopes = statistic(counts)[1]
    for cluster in range(clusters.count):
        step = np.zeros_like(counts)
        step[:, cluster] = 1e-6
        difference = (statistic(counts + step)[0] - statistic(counts - step)[0]) / 2e-6
        np.testing.assert_allclose(slopes[:, cluster], difference, atol=1e-8)


def test_a_draw_without_a_label_is_a_number() -> None:
    clusters = Clusters.of([0, 1, 2])
    statistic = MacroF1.of([0, 1, 1], [0, -1, 1], clusters)
    values, slopes = statistic(np.array([[0.0, 3.0, 0.0], [0.0, 0.0, 3.0]]))
    np.testing.assert_allclose(values, [0, 1])
    assert np.isfinite(slopes).all()


def test_the_interval_of_macro_f1_covers_the_truth_as_often_as_it_promises() -> None:
    """Answers that are right with probability 0.7, or else any label: the truth is known from a million of them."""
    random = np.random.default_rng(3)

    def drawn(count: int) -> tuple[Any, Any]:
        true = random.integers(0, 3, count)
        return true, np.where(random.random(count) < 0.7, true, random.integers(-1, 3, count))

    truth = f1_score(*drawn(1_000_000), labels=[0, 1, 2], average="macro")
    clusters, missed = Clusters.of(range(100)), np.zeros(2)
    for _ in range(200):
        found = interval(MacroF1.of(*drawn(100), clusters), 100, 0.9, low=0, high=1, resamples=500)
        missed += [truth < found.low, truth > found.high]
    assert (missed / 200 < 0.1 + 3 * (0.1 * 0.9 / 200) ** 0.5).all(), missed


def test_a_prompt_is_asked_as_the_question_of_a_held_out_record_is(tmp_path: Path) -> None:
    """One place applies the template: a task and a held-out record with the same question give the same tokens."""
    tiny_tokenizer(tmp_path)
    tokenizer = models.load_tokenizer(tmp_path)
    for record in RECORDS:
        question = {"messages": record["messages"][:-1]} if "messages" in record else {"prompt": record["prompt"]}
        assert encode_question(tokenizer, question) == list(encode(tokenizer, record)[-1].prompt)


def test_a_prompt_that_the_template_rejects_is_named_and_long_ones_are_left_out(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path)
    tokenizer = models.load_tokenizer(tmp_path)
    records = [{"prompt": "Short?", "expected": ["a"]}, {"prompt": "Long? " * 50, "expected": ["a"]}]
    assert list(tasks.encode_prompts(tokenizer, task("exact"), records, 30, {}, "tiny")) == [0]
    with pytest.raises(UserError, match="tiny: tasks.city: none of the 2 prompts fits: 3 tokens are allowed"):
        tasks.encode_prompts(tokenizer, task("exact"), records, 3, {}, "tiny")
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(UserError, match=r"tiny: tasks.city: city.jsonl:1 of the tasks: messages\[0\] \(role user\)"):
        tasks.encode_prompts(tokenizer, task("exact"), records, 30, {}, "tiny")


def test_the_gate_compares_a_task_by_its_own_clusters() -> None:
    evaluation = build_pipeline.build(
        evaluation__tasks=[{"name": "city", "source": "file:city.jsonl", "sha256": "0" * 64, "check": "exact"}],
        evaluation__gate={"tasks.city": [{"min_gain": 0.3}, {"min": 0.9}]}).evaluation
    records = [{"prompt": f"Question {n // 2}?", "expected": ["a"]} for n in range(60)]

    def values(right: int) -> dict[str, Any]:
        answered = tasks.checked(evaluation.tasks[0], records, {n: "a" if n < right else "b" for n in range(60)})
        return {"tasks.city": answered.rows}

    gain, own = gate.evaluate_gate(evaluation, {"base": values(10), "fine_tuned": values(50)}, [])
    assert (gain.clusters, own.clusters) == (30, 30), "two records with the same prompt are one piece of evidence"
    assert gain.value == pytest.approx(40 / 60)
    assert (gain.outcome, own.outcome) == ("passed", "undecided")
    assert "tasks.city: fine-tuned - base is 0.667, at least" in gain.description
    assert "more records of the task would decide it" in own.description


def test_labels_have_an_interval_by_record() -> None:
    records = [{"prompt": f"{n}?", "label": "yes" if n % 2 else "no"} for n in range(40)]
    answered = tasks.checked(task("label_f1"), records, {n: "yes" if n < 30 else "what?" for n in range(40)})
    assert answered.rows[0] == {"line": 1, "cluster": 0, "value": 0.0, "label": 0, "predicted": 1}
    assert answered.rows[39]["predicted"] == -1
    found = statistic("tasks.city", answered.rows, Clusters.of(range(40)))(np.ones((1, 40)))[0][0]
    expected = f1_score([n % 2 for n in range(40)], [1] * 30 + [-1] * 10, labels=[0, 1], average="macro")
    assert found == pytest.approx(expected)


def test_a_value_that_is_no_number_fails_the_rule() -> None:
    evaluation = build_pipeline.build(
        evaluation__tasks=[{"name": "city", "source": "file:city.jsonl", "sha256": "0" * 64, "check": "exact"}],
        evaluation__gate={"tasks.city": {"min": 0}}).evaluation
    records = [{"prompt": f"Question {n}?", "expected": ["a"]} for n in range(30)]
    answered = tasks.with_values(evaluation.tasks[0], records, {n: (float("nan") if n == 7 else 1.0, "a")
                                                                for n in range(30)})
    assert answered.rows[7]["value"] is answered.answers[7]["value"] is None
    [check] = gate.evaluate_gate(evaluation, {"fine_tuned": {"tasks.city": answered.rows}}, [])
    assert check.outcome == "failed"


QUESTIONS = [{"prompt": f"Is room {n} free?", "expected": ["x"]} for n in range(MINIMUM_CLUSTERS)]
LABELS = [{"messages": [{"role": "user", "content": f"Room {n}?"}], "label": "ab"[n % 2]} for n in range(5)]


def test_an_evaluation_with_tasks_keeps_their_answers_values_and_verdict(tmp_path: Path) -> None:
    every = [{"name": "rooms", "check": "regex", "pattern": ".*",
              "records": [{"prompt": each["prompt"]} for each in QUESTIONS]},
             {"name": "labels", "check": "label_f1", "records": LABELS}]
    loaded, volumes = published_pipeline(tmp_path, tasks=every, gate={"tasks.rooms": {"min": 0.85}})
    evaluate.run(loaded, volumes, 0)
    wanted = plan(loaded.pipeline)
    folder = wanted.adapter_scores.path(volumes)
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["tasks.rooms"] == 1
    assert scores["tasks.labels"] == 0
    assert scores["tasks"] == {"rooms": {"records": 20, "records_too_long": 0},
                               "labels": {"records": 5, "records_too_long": 0}}
    lines = [json.loads(line) for line in (folder / "tasks.rooms.jsonl").read_text().splitlines()]
    assert lines[7] == {"line": 8, "cluster": 7, "value": 1.0}
    answers = [json.loads(line) for line in (folder / "task_answers.jsonl").read_text().splitlines()]
    assert [(each["task"], each["question"]) for each in answers[19:21]] == [
        ("rooms", "Is room 19 free?"), ("labels", "Room 0?")]
    evaluation = content.read_evaluation(wanted.evaluation.path(volumes))
    assert evaluation["passed"]
    low, high = evaluation["intervals"]["fine_tuned"]["tasks.rooms"]
    assert (low, high) == (pytest.approx(0.05 ** (1 / 20)), 1), "the rule of three: all answers passed"
    assert evaluation["sources"]["evaluation.tasks.rooms"]["source"] == "file:rooms.jsonl"
    assert "task rooms" in report.table(evaluation)
    for name in ("report.md", "report.html"):
        assert "task labels" in (wanted.evaluation.path(volumes) / name).read_text()


def test_a_rule_on_too_few_records_is_refused_before_the_adapter_is_waited_for(tmp_path: Path) -> None:
    few = [{"name": "labels", "check": "label_f1", "records": LABELS}]
    loaded, volumes = published_pipeline(tmp_path, tasks=few, gate={"tasks.labels": {"min": 0.1}}, without=["adapter"])
    with pytest.raises(UserError, match="evaluation.gate.tasks.labels: the task has 5 records in 5 clusters"):
        evaluate.run(loaded, volumes, 0)
