"""Promises of `check`: what would fail in the cluster is found before the push, with no network."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.core.errors import UserError
from jobs.relocation.sources.file import path_sha256
from jobs.tools import check
from jobs.tools.pods import CHECKOUT
from tests import build_overlay, build_pipeline

RECORDS = [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(300)]


def overlay(folder: Path, records: list[dict[str, Any]] | None = None, **changes: Any) -> Path:
    """An overlay's folder with valid data, correctly pinned."""
    data = folder / "dataset.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records or RECORDS))
    build_pipeline.write(folder, **({"dataset__sha256": path_sha256(data)} | changes))
    return folder


@pytest.mark.parametrize("overlay", sorted(p.parent for p in (CHECKOUT / "overlays").glob("*/environment.yaml")),
                         ids=lambda p: p.name)
def test_every_overlay_in_the_repository_is_valid(overlay: Path) -> None:
    check.run(overlay)


@pytest.mark.parametrize("name", ["dataset.jsonl", "sentences/a.jsonl", "base/config.json"])
def test_a_fifo_is_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    folder = overlay(tmp_path, evaluation__acceptability={"source": "file:sentences", "sha256": "0" * 64},
                     base_model={"source": "file:base", "sha256": "0" * 64})
    for each in ("sentences", "base"):
        (folder / each).mkdir()
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match=rf"{name}: is a FIFO, not a plain file"):
        check.run(folder)


def test_a_valid_overlay_passes(tmp_path: Path) -> None:
    check.run(overlay(tmp_path))


@pytest.mark.parametrize(("changes", "message"), [
    ({"dataset__sha256": "0" * 64}, "but .*pins dataset at 0000.*If the change is meant, run: python -m jobs pin"),
    ({"dataset__source": "file:other.jsonl"}, "dataset: .*other.jsonl does not exist"),
    ({"base_model__architecture": "GPT2LMHeadModel"}, "vLLM cannot serve a LoRA adapter on GPT2LMHeadModel"),
    ({"base_model__architecture": "LlamaForCausalLM", "training__lora__target_modules": ["c_attn"]},
     "c_attn cannot be served on LlamaForCausalLM; allowed: down_proj"),
    ({"base_model": {"source": "builtin:tiny"}, "training__lora__target_modules": ["c_attn"]}, "c_attn cannot"),
    ({"base_model__architecture": "GPT2LMHeadModel"}, "Set `serving: {mode: merged}`"),
    ({"base_model__architecture": "GPTJForCausalLM", "serving__mode": "merged"},
     "training cannot adapt, GPTJForCausalLM. .*LlamaForCausalLM.*GPT2LMHeadModel"),
    ({"base_model__architecture": "GPT2LMHeadModel", "serving__mode": "merged",
      "training__lora__target_modules": ["c_attn", "lm_head"]},
     "lm_head cannot be served on GPT2LMHeadModel; allowed: c_attn, c_fc, c_proj"),
    ({"training__lora__r": 0}, "training.lora.r: 0"),
])
def test_what_would_fail_in_the_cluster_is_refused_here(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check.run(overlay(tmp_path, **changes))


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "LlamaForCausalLM"])
def test_in_mode_merged_a_model_without_lora_in_vllm_passes_too(tmp_path: Path, architecture: str) -> None:
    check.run(overlay(tmp_path, base_model__architecture=architecture, serving__mode="merged"))


SEARCH = {"candidates": {"lora.r": [4, 8, 16]}}


def test_a_search_is_shown_with_its_cost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "jobs"):
        check.run(overlay(tmp_path, training__search=SEARCH, dataset__validation=0.2))
    assert (f"{tmp_path}/pipeline.yaml: training.search: 3 trials over lora.r: 3 to 1/3 of their steps, 1 to the end; "
            "1.67 trainings") in caplog.messages


def test_a_search_without_records_to_choose_by_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pipeline.yaml: training.search chooses .* split, which is empty. Set "):
        check.run(overlay(tmp_path, training__search=SEARCH))


def test_a_search_on_data_that_is_elsewhere_is_warned_that_records_must_name_a_validation_split(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    elsewhere: dict[str, Any] = {"training__search": SEARCH, "dataset__source": "https://example.com/data.jsonl"}
    check.run(overlay(tmp_path, **elsewhere))
    assert "dataset.validation is 0: some records of https://example.com/data.jsonl must have" in caplog.text
    caplog.clear()
    check.run(overlay(tmp_path, **elsewhere, dataset__validation=0.1))
    assert "some records" not in caplog.text


def test_what_difference_the_held_out_data_can_show_is_said_before_training(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """2.49 standard errors (1.645 for the confidence, 0.842 for 80 %) of 0.3 / sqrt(25)."""
    records = [record | {"split": "holdout" if n < 50 else "train", "group": f"group {n // 2}"}
               for n, record in enumerate(RECORDS)]
    with caplog.at_level(logging.INFO, "jobs"):
        check.run(overlay(tmp_path, records, evaluation__gate={"rougeL": {"max_drop": 0.1}}))
    assert (f"{tmp_path}/pipeline.yaml: evaluation: 50 held-out records in 25 clusters. With 95 % confidence they "
            "show, in 4 of 5 cases, a true gain of 0.15 in a score from 0 to 1, if gains vary by 0.3 (standard "
            "deviation)") in caplog.messages
    assert (f"{tmp_path}/pipeline.yaml: advice: evaluation.gate.rougeL.max_drop: 0.1 is nearer than 0.15, so that an "
            "adapter that is as good as the base model may be undecided. Bring more held-out records"
            ) in caplog.messages


def test_too_few_clusters_are_refused_before_training(tmp_path: Path) -> None:
    labels = [record | {"completion": "yes" if n % 2 else "no"} for n, record in enumerate(RECORDS)]
    with pytest.raises(UserError, match=r"pipeline\.yaml: evaluation\.gate\.perplexity: \d+ held-out records in 2 "
                                        r"clusters cannot prove anything: at least 20 .* evaluation\.clusters: record"):
        check.run(overlay(tmp_path, labels))
    check.run(overlay(tmp_path, labels, evaluation__clusters="record"))


def test_rules_per_token_against_the_reference_model_come_with_a_warning(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "jobs"):
        check.run(overlay(tmp_path, evaluation__gate={"perplexity": {"max_ratio": 1, "than": "reference"}}))
    assert "if their tokenizers are the same; bits_per_byte compares the reference model in any case" in caplog.text


def test_layers_that_only_a_search_names_are_checked_too(tmp_path: Path) -> None:
    named = {"candidates": {"lora.target_modules": [["q_proj"], ["c_attn"]]}}
    with pytest.raises(UserError, match="c_attn cannot be served on LlamaForCausalLM"):
        check.run(overlay(tmp_path, training__search=named, dataset__validation=0.2,
                          base_model__architecture="LlamaForCausalLM"))


def test_in_mode_merged_one_adapter_is_served_and_that_is_said(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = build_overlay.build(tmp_path, "cordoba-hotels")
    check.run(folder)
    assert "not served" not in caplog.text
    file = folder / "environment.yaml"
    file.write_text(file.read_text().replace("serving:\n", "serving:\n  mode: merged\n"))
    check.run(folder)
    assert "environment.yaml: serving.mode is merged, so the server runs one adapter" in caplog.text
    assert "1 more are trained and not served" in caplog.text


def test_bad_records_are_listed_with_their_lines(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dataset\.jsonl:301: `completion` is empty"):
        check.run(overlay(tmp_path, [*RECORDS, {"prompt": "question", "completion": ""}]))


def test_data_too_large_for_a_config_map_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a ConfigMap holds 1048576"):
        check.run(overlay(tmp_path, [{"prompt": f"q{n}", "completion": "x" * 30_000} for n in range(40)]))


def test_sentences_in_git_are_held_to_their_pin_too(tmp_path: Path) -> None:
    (tmp_path / "cola.jsonl").write_text('{"text": "The cook reads.", "acceptable": true}\n')
    source = {"source": "file:cola.jsonl", "sha256": "0" * 64}
    with pytest.raises(UserError, match="pins evaluation.acceptability at 0000"):
        check.run(overlay(tmp_path, evaluation__acceptability=source))


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        check.run(overlay(tmp_path, dataset__sha256="0" * 64, base_model__architecture="GPT2LMHeadModel"))
    assert len(str(raised.value).splitlines()) == 2


def adapter(overlay: Path, name: str, **changes: Any) -> Path:
    """Values of an adapter's pipeline file, replaced."""
    file = overlay / "adapters" / name / "pipeline.yaml"
    content = yaml.safe_load(file.read_text())
    for dotted, value in changes.items():
        *parents, key = dotted.split("__")
        at = content
        for parent in parents:
            at = at[parent]
        at[key] = value
    build_pipeline.write_yaml(file, content)
    return file


def lines(overlay: Path) -> list[str]:
    with pytest.raises(UserError) as raised:
        check.run(overlay)
    return str(raised.value).splitlines()


def test_problems_of_all_files_are_reported_a_line_each(tmp_path: Path) -> None:
    overlay = build_overlay.build(tmp_path, "boats", "trains")
    adapter(overlay, "boats", dataset__sha256="0" * 64)
    adapter(overlay, "trains", training__lora__r=128, training__epochs=0)
    adapter(overlay, "seville-hotels", evaluation__gate={})
    (overlay / "adapters" / "trains" / "kustomization.yaml").write_text("resources: [absent]\n")
    found = lines(overlay)
    for message in ("boats/dataset.jsonl: has sha256", "training.epochs: 0", "evaluation.gate: is empty",
                    "trains/kustomization.yaml: nameSuffix"):
        assert sum(message in line for line in found) == 1, found


def test_a_problem_of_one_adapter_does_not_hide_what_is_shared(tmp_path: Path) -> None:
    overlay = build_overlay.build(tmp_path, "boats")
    (overlay / "adapters" / "boats" / "pipeline.yaml").write_bytes(b"\xff")
    build_overlay.edit(overlay, lambda content: content.update(patches=[
        {"target": {"kind": "CronJob"}, "patch": "- {op: add, path: /spec/suspend, value: true}"}]))
    found = lines(overlay)
    assert len(found) == 2
    assert "boats/pipeline.yaml: not UTF-8 at byte 0" in found[0]
    assert "kind/kustomization.yaml: the patch patches[0] of {kind: CronJob} has no effect" in found[1]


def test_one_adapter_is_checked_without_the_others(tmp_path: Path) -> None:
    overlay = build_overlay.build(tmp_path, "boats", "trains")
    adapter(overlay, "trains", dataset__sha256="0" * 64)
    (overlay / "adapters" / "trains" / "kustomization.yaml").write_text("resources: [absent]\n")
    check.run(overlay / "adapters" / "boats")
    adapter(overlay, "boats", dataset__sha256="1" * 64)
    (line,) = lines(overlay / "adapters" / "boats")
    assert "boats/dataset.jsonl: has sha256" in line
    assert "python -m jobs pin" in line


def test_one_adapter_is_not_blamed_for_the_environment(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nor is it told to close a network that others need."""
    overlay = build_overlay.build(tmp_path)
    file = overlay / "environment.yaml"
    hub = f"source: hf://acme/base\n  revision: {build_pipeline.COMMIT}\n  architecture: LlamaForCausalLM\n"
    file.write_text(file.read_text().replace("source: builtin:tiny\n", hub, 1))
    check.run(overlay / "adapters" / "seville-hotels")
    assert any("let model-relocation reach nothing" in line for line in lines(overlay))
    build_overlay.edit(overlay, lambda content: content["components"].insert(1, "../../base/egress"))
    check.run(overlay / "adapters" / "seville-hotels")
    assert "models-only" not in caplog.text


def test_target_modules_are_checked_for_each_adapter(tmp_path: Path) -> None:
    overlay = build_overlay.build(tmp_path, "boats")
    adapter(overlay, "boats", training__lora__target_modules=["c_attn"])
    (line,) = lines(overlay)
    assert "boats/pipeline.yaml: training.lora.target_modules: c_attn cannot be served" in line


def test_a_base_model_that_cannot_be_served_is_one_line_for_all_adapters(tmp_path: Path) -> None:
    overlay = build_overlay.build(tmp_path, "boats", "trains")
    file = overlay / "environment.yaml"
    file.write_text(file.read_text().replace(
        "source: builtin:tiny\n", f"source: hf://openai-community/gpt2\n  revision: {build_pipeline.COMMIT}\n"
        "  architecture: GPT2LMHeadModel\n", 1).replace("tokenizer: {}", "tokenizer: {source: builtin:tiny}"))
    build_overlay.edit(overlay, lambda content: content["components"].insert(1, "../../base/egress"))
    (line,) = lines(overlay)
    assert "environment.yaml: base_model: vLLM cannot serve a LoRA adapter on GPT2LMHeadModel" in line


def test_the_config_map_of_serving_has_a_limit_of_its_own(tmp_path: Path) -> None:
    """Each adapter's file fits by itself, and all of them together do not."""
    overlay = build_overlay.build(tmp_path, "boats")
    for name in ("boats", "seville-hotels"):
        file = overlay / "adapters" / name / "pipeline.yaml"
        file.write_text("# " + "x" * 600_000 + "\n" + file.read_text())
    (line,) = lines(overlay)
    assert "environment.yaml and the 2 pipeline files have 120" in line
    assert "`serving-pipelines` holds 1048576" in line


def test_an_overlay_of_the_old_form_is_one_line(tmp_path: Path) -> None:
    shutil.copytree(Path(__file__).with_name("earlier_form"), tmp_path / "old")
    (line,) = lines(tmp_path / "old")
    assert line.endswith(f"run: python -m jobs new {tmp_path}/old seville-hotels --from {tmp_path}/old/pipeline.yaml")


TASK: dict[str, Any] = {"name": "city", "source": "file:city.jsonl", "check": "regex"}


def with_task(folder: Path, records: list[dict[str, Any]], gate: dict[str, Any] | None = None, **options: Any) -> Path:
    """An overlay's folder with a task, correctly pinned."""
    (folder / "city.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    task = TASK | {"sha256": path_sha256(folder / "city.jsonl")} | options
    return overlay(folder, evaluation__tasks=[task], evaluation__gate=gate or {"perplexity": {"max_ratio": 0.9}})


@pytest.mark.parametrize(("records", "options", "message"), [
    ([], {}, "tasks.city: .*city.jsonl: no records"),
    ([{"prompt": "A?"}], {}, "city.jsonl:1: `pattern` is missing: the check regex needs it"),
    ([{"prompt": "A?"}], {"pattern": "("}, r"tasks.city: `pattern` is not a regular expression of RE2: missing \): \("),
    ([{"prompt": "question 3", "pattern": "x"}], {}, "city.jsonl:1: the same prompt is in the split train"),
    ([{"prompt": "A?", "pattern": "x"}], {"sha256": "0" * 64}, "pins evaluation.tasks.0 at 0000"),
    ([{"prompt": "A?"}], {"check": "json_schema", "schema": {"$ref": "#/no"}}, "`schema` is not a JSON schema: P"),
])
def test_what_is_wrong_with_a_task_is_found(tmp_path: Path, records: list[dict[str, Any]], options: dict[str, Any],
                                            message: str) -> None:
    with pytest.raises(UserError, match=message):
        check.run(with_task(tmp_path, records, **options))


def test_a_small_task_is_refused_only_where_a_rule_needs_it(tmp_path: Path) -> None:
    records = [{"prompt": f"task {n}?"} for n in range(19)]
    check.run(with_task(tmp_path, records, pattern="a"))
    with pytest.raises(UserError, match="evaluation.gate.tasks.city: the task has 19 records in 19 clusters"):
        check.run(with_task(tmp_path, records, {"tasks.city": {"min": 0.5}}, pattern="a"))


def test_a_pattern_of_a_task_whose_records_are_elsewhere_is_compiled(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a regular expression of RE2: invalid perl operator"):
        check.run(overlay(tmp_path, evaluation__tasks=[TASK | {
            "source": "https://example.com/city.jsonl", "sha256": "0" * 64, "pattern": "(?=a)"}]))


def test_a_task_file_of_lm_evaluation_harness_is_read_and_its_rows_are_rendered(tmp_path: Path) -> None:
    (tmp_path / "quiz.yaml").write_text("output_type: generate_until\ndoc_to_text: '{{a}}'\ndoc_to_target: b\n"
                                        "metric_list: [{metric: exact_match}]\n")
    lm_eval = {"source": "file:quiz.yaml", "sha256": path_sha256(tmp_path / "quiz.yaml")}
    check.run(with_task(tmp_path, [{"a": "x", "b": "y"}], check="lm_eval", lm_eval=lm_eval))
    with pytest.raises(UserError, match="city.jsonl:1: doc_to_text: 'a' is undefined"):
        check.run(with_task(tmp_path, [{"b": "y"}], check="lm_eval", lm_eval=lm_eval))
    (tmp_path / "quiz.yaml").write_text("output_type: generate_until\nprocess_docs: !function utils.f\n")
    lm_eval["sha256"] = path_sha256(tmp_path / "quiz.yaml")
    with pytest.raises(UserError, match=r"quiz.yaml:2: not valid YAML: .*!function.* run code that came with the data"):
        check.run(with_task(tmp_path, [{"a": "x", "b": "y"}], check="lm_eval", lm_eval=lm_eval))
