"""lm-evaluation-harness through our model finds what it finds through its own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.core import models
from jobs.core.errors import UserError
from jobs.core.tasks import Task
from jobs.data import harness as task_files
from jobs.data import tasks
from jobs.data.encoding import encode_question
from jobs.data.formats import File
from jobs.evaluation import harness, scoring
from jobs.evaluation.tasks import encode_choices
from tests.build_models import tiny_llama, tiny_tokenizer, write_pipeline

pytest.importorskip("lm_eval", reason="the extra jobs/requirements-lm-eval.txt is not installed")

ROWS: list[dict[str, Any]] = [
    {"question": f"How many rooms has floor {n}?", "choices": [f"two and {n}", f"floor {n} has three", "many"],
     "answer": n % 3} for n in range(24)]
CHOICE = {"output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "choices",
          "doc_to_target": "answer", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}
GENERATE = {"output_type": "generate_until", "doc_to_text": "question", "doc_to_target": "{{choices[answer]}}",
            "generation_kwargs": {"until": [" "], "max_gen_toks": 6},
            "metric_list": [{"metric": "exact_match", "ignore_case": True}]}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: Any) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(folder)
    tiny_tokenizer(folder)
    return models.load_model(folder), models.load_tokenizer(folder)


def answered(folder: Path, loaded: tuple[Any, Any], config: dict[str, Any], *, max_length: int = 200,
             metric: str | None = None) -> Any:
    """A task, from its task file and rows to the values of its records."""
    (folder / "quiz.yaml").write_text(yaml.safe_dump(config))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    task = Task(name="quiz", source="file:rows.jsonl", check="lm_eval",
                lm_eval={"source": "file:quiz.yaml", "metric": metric})  # type: ignore[arg-type, call-arg]
    task_file = task_files.read(folder / "quiz.yaml", "quiz.yaml", metric)
    tasks.convert(task, [File(folder / "rows.jsonl", "rows.jsonl")], folder / "quiz.jsonl", task_file)
    material = scoring.Material([], [], max_length, 8, tasks=list(tasks.read(folder, [task])))
    return scoring._answer_task(*loaded, *material.tasks[0], material, 256, "tiny")


@pytest.mark.parametrize(("config", "metric"), [(CHOICE, "acc"), (CHOICE, "acc_norm"), (GENERATE, "exact_match")])
def test_it_finds_what_the_library_finds_with_its_own_model(tmp_path: Path, loaded: tuple[Any, Any],
                                                            config: dict[str, Any], metric: str) -> None:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    ours = answered(tmp_path, loaded, config, metric=metric)
    own = HFLM(pretrained=loaded[0], tokenizer=loaded[1], batch_size=4, max_length=256)
    theirs = simple_evaluate(own, tasks=[{
        **config, "task": "quiz", "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path)}}],
        apply_chat_template=True, bootstrap_iters=0, log_samples=True)["samples"]["quiz"]
    expected = {sample["doc_id"]: float(sample[metric]) for sample in theirs}
    assert [row["value"] for row in ours.rows] == [expected[n] for n in range(len(ROWS))]
    if config is CHOICE:
        assert {0.0, 1.0} == set(expected.values()), "the comparison can tell"
    else:
        answers = {sample["doc_id"]: sample["filtered_resps"][0].strip() for sample in theirs}
        assert [each["answer"] for each in ours.answers] == [answers[n] for n in range(len(ROWS))]


def test_what_is_too_long_is_left_out(tmp_path: Path, loaded: tuple[Any, Any]) -> None:
    whole = answered(tmp_path, loaded, CHOICE)
    [(task, records)] = tasks.read(tmp_path, [whole.task])
    tokens = encode_choices(loaded[1], task, records, {}, "tiny")
    limit = sorted(max(len(tokens[row["question"], choice]) for choice in row["choices"]) for row in ROWS)[9]
    some = answered(tmp_path, loaded, CHOICE, max_length=limit)
    assert 0 < some.too_long < len(ROWS)
    assert {row["line"]: row["value"] for row in some.rows}.items() <= {
        row["line"]: row["value"] for row in whole.rows}.items()


def test_what_fits_with_none_of_its_choices_is_refused(tmp_path: Path, loaded: tuple[Any, Any]) -> None:
    [(_, records)] = tasks.read(tmp_path, [answered(tmp_path, loaded, CHOICE).task])
    longest = max(len(encode_question(loaded[1], record)) for record in records)
    with pytest.raises(UserError, match="tiny: tasks.quiz: none of the 24 prompts fits with its choices"):
        answered(tmp_path, loaded, CHOICE, max_length=longest + 1)


def test_likelihoods_that_are_no_numbers_give_no_value(tmp_path: Path, loaded: tuple[Any, Any]) -> None:
    [(task, records)] = tasks.read(tmp_path, [answered(tmp_path, loaded, CHOICE).task])
    values, _ = harness.values_of(task, records, lambda pairs: [math.nan, *[-1.0] * (len(pairs) - 1)], lambda texts: [])
    assert math.isnan(values[0])
    assert not any(map(math.isnan, values[1:]))


def test_an_answer_ends_at_the_first_of_the_texts_that_end_it() -> None:
    assert harness._cut("a b\nc", ["\n", " "]) == "a"
    assert harness._cut("abc", ["", "x"]) == "abc"


def test_the_file_and_the_data_are_both_pinned_sources(tmp_path: Path) -> None:
    file = {"source": "file:quiz.yaml", "sha256": "1" * 64}
    loaded = write_pipeline(tmp_path, tasks=[{"name": "quiz", "check": "lm_eval", "lm_eval": file}])
    assert [*loaded.pipeline.sources()][-2:] == ["evaluation.tasks.0", "evaluation.tasks.0.lm_eval"]
