"""Promises of the pipeline file: what is wrong is refused, with line, key, value and what to do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from jobs.core import pipeline
from jobs.core.declarations import Source
from jobs.core.errors import UserError
from tests import build_pipeline


def test_a_valid_file_loads_with_its_defaults(tmp_path: Path) -> None:
    loaded = pipeline.load(build_pipeline.write(tmp_path))
    assert loaded.pipeline.dataset.holdout == 0.1
    assert loaded.pipeline.environment.tokenizer_source == Source(
        source="hf://HuggingFaceTB/SmolLM2-135M-Instruct", revision=build_pipeline.COMMIT)
    assert loaded.resolve(loaded.pipeline.dataset) == tmp_path / "dataset.jsonl"


def test_an_adapters_folder_stands_for_its_file(tmp_path: Path) -> None:
    build_pipeline.write(tmp_path)
    assert pipeline.load(tmp_path).path == tmp_path / "pipeline.yaml"


TASK = {"name": "city", "source": "file:city.jsonl", "check": "exact", "sha256": build_pipeline.SHA256}


@pytest.mark.parametrize(("changes", "message"), [
    ({"training__lora__alpah": 3}, "training.lora.alpah: unknown key; did you mean `alpha`?"),
    ({"modle": 3}, "modle: unknown key; allowed: adapter, dataset,"),
    ({"adapter": None}, "adapter: is missing"),
    ({"adapter": "Seville_Hotels"}, "adapter: 'Seville_Hotels' must be 1 to 63 of a-z, 0-9 and -"),
    ({"adapter": "environment"}, "no adapter can have this name: its file would be environment.yaml"),
    ({"training__epochs": "3"}, "training.epochs: '3': input should be a valid integer"),
    ({"training__epochs": True}, "training.epochs: True: input should be a valid integer"),
    ({"training__lora__r": 0}, "training.lora.r: 0: input should be greater than or equal to 1"),
    ({"training__lora__r": 128}, "training.lora.r: is 128, above serving.max_lora_rank (64)"),
    ({"training__lora__r": 1024}, "training.lora.r: 1024: input should be less than or equal to 512"),
    ({"training__learning_rate": -0.1}, "training.learning_rate: -0.1: input should be greater than 0"),
    ({"training__learning_rate": float("nan")}, "training.learning_rate: nan: input should be"),
    ({"training__lora__target_modules": "all"}, "training.lora.target_modules: 'all'"),
    ({"training__sharding": "fsdp", "training__quantization": "4bit"},
     "training: sharding: fsdp and quantization: 4bit cannot be combined"),
    ({"training__max_length": 8192}, "tokens_per_batch (4096) must be at least max_length (8192)"),
    ({"serving__mode": "both"}, "serving.mode: 'both': input should be 'lora' or 'merged'"),
    ({"serving__max_lora_rank": 24}, "max_lora_rank 24 is not one vLLM serves; allowed: 1, 8, 16,"),
    ({"dataset__holdout": 0}, "dataset.holdout: 0"),
    ({"dataset__sha256": None}, "dataset: file:dataset.jsonl is not pinned: `sha256` is missing. Run: python -m jobs "
                                "pin"),
    ({"dataset__sha256": "5b1f"}, "dataset.sha256: '5b1f' must be 64 hex digits"),
    ({"base_model__revision": "main"}, "is not pinned: `revision: main` is not a commit of 40 hex digits"),
    ({"base_model__sha256": build_pipeline.SHA256}, "has two pins"),
    ({"base_model__source": "ftp://x/y"}, "ftp://x/y is not a source; allowed: hf://OWNER/NAME, file:PATH"),
    ({"dataset__source": "file:a\0b.jsonl"}, "'file:a\\x00b.jsonl' holds a control character"),
    ({"base_model__source": "file:a\nb"}, "'file:a\\nb' holds a control character"),
    ({"base_model__source": "hf://datasets/acme/data"}, "hf://datasets/acme/data must be hf://OWNER/NAME"),
    ({"dataset": {"source": "hf://acme/data"}}, "hf://acme/data must be hf://datasets/OWNER/NAME"),
    ({"dataset__source": "s3://bucket"}, "s3://bucket must be s3://BUCKET/KEY"),
    ({"dataset__source": "gs:///key"}, "gs:///key must be gs://BUCKET/KEY"),
    ({"dataset__source": "https:///data.jsonl"}, "https:///data.jsonl must be https://…"),
    ({"base_model": {"source": "builtin:huge"}}, "builtin:huge must be builtin:tiny or builtin:tiny-reference"),
    ({"tokenizer": {"revision": build_pipeline.COMMIT}}, "tokenizer: has a pin but no `source`"),
    ({"evaluation__gate": {}}, "evaluation.gate: is empty: an adapter would be served unproven"),
    ({"evaluation__gate__perplexity": {}}, "evaluation.gate.perplexity: needs a bound: one of max_ratio,"),
    ({"evaluation__gate__bleu": {"min": 1}}, "evaluation.gate.bleu: unknown metric; allowed: perplexity, "),
    ({"evaluation__tasks": [TASK | {"name": "My_Task"}]},
     "evaluation.tasks.0.name: 'My_Task' must be 1 to 40 of a-z, 0-9 and -"),
    ({"evaluation__tasks": [TASK, TASK | {"check": "contains"}]},
     "evaluation.tasks.1.name: city is the name of another task already"),
    ({"evaluation__tasks": [TASK | {"check": "bleu"}]}, "evaluation.tasks.0.check: 'bleu': input should be 'exact',"),
    ({"evaluation__tasks": [TASK | {"pattern": "x"}]},
     "evaluation.tasks.0.pattern: is no option of the check exact; its options: case_sensitive, normalize"),
    ({"evaluation__tasks": [TASK | {"schema": {}}]}, "evaluation.tasks.0.schema: is no option of the check exact"),
    ({"evaluation__tasks": [TASK | {"check": "json_schema", "shema": {}}]},
     "evaluation.tasks.0.shema: unknown key; did you mean `schema`?"),
    ({"evaluation__tasks": [TASK | {"check": "json_schema", "schema": {"const": float("inf")}}]},
     "evaluation.tasks.0.schema: is not JSON"),
    ({"evaluation__tasks": [TASK | {"check": "rougeL", "case_sensitive": False}]}, "its options: none"),
    ({"evaluation__tasks": [TASK | {"source": "hf://acme/data"}]}, "must be hf://datasets/OWNER/NAME"),
    ({"evaluation__tasks": [TASK | {"sha256": None}]}, "evaluation.tasks.0: file:city.jsonl is not pinned"),
    ({"evaluation__tasks": [TASK | {"check": "lm_eval"}]}, "evaluation.tasks.0: the check lm_eval needs `lm_eval`:"),
    ({"evaluation__tasks": [TASK | {"lm_eval": {"source": "file:a.yaml"}}]},
     "evaluation.tasks.0.lm_eval: is no option of the check exact"),
    ({"evaluation__tasks": [TASK | {"check": "lm_eval", "lm_eval": {"source": "file:a.yaml"}}]},
     "evaluation.tasks.0.lm_eval: file:a.yaml is not pinned"),
    ({"evaluation__gate": {"tasks.city": {"min": 0.5}}},
     "evaluation.gate.tasks.city: evaluation.tasks has no task of this name; allowed: perplexity, "),
    ({"evaluation__tasks": [TASK], "evaluation__gate": {"tasks.citi": {"min": 0.5}}},
     "evaluation.gate.tasks.citi: evaluation.tasks has no task of this name; did you mean `tasks.city`?"),
    ({"evaluation__tasks": [TASK], "evaluation__gate": {"tasks.city": {"max_ratio": 0.5}}},
     "evaluation.gate.tasks.city.max_ratio: max_ratio would let an adapter pass for being worse: of task city, "),
    ({"evaluation__tasks": [TASK | {"check": "bleu"}], "evaluation__gate": {"tasks.city": {"min": 0.5}}},
     "evaluation.tasks.0.check"),
])
def test_what_is_wrong_is_named_with_its_key(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    file = build_pipeline.write(tmp_path, **changes)
    with pytest.raises(UserError) as raised:
        pipeline.load(file)
    assert message in str(raised.value)
    assert str(raised.value).startswith((f"{file}:", f"{file.with_name('environment.yaml')}:"))
    assert len(str(raised.value).splitlines()) <= 2, "one mistake, one line (a union may need two)"


@pytest.mark.parametrize(("metric", "bound", "limit", "message"), [
    ("rougeL", "min", 1.5, "1.5: fine-tuned is 0 to 1, so no adapter could pass"),
    ("rougeL", "min_gain", 2, "2: fine-tuned - base is -1 to 1, so no adapter could pass"),
    ("rougeL", "max_drop", 5, "5: base - fine-tuned is -1 to 1, so this would prove nothing"),
    ("acceptability_mcc", "max_drop", -2.5, "-2.5: base - fine-tuned is -2 to 2, so no adapter could pass"),
    ("acceptability_mcc", "min", -1.5, "-1.5: fine-tuned is -1 to 1, so this would prove nothing"),
    ("perplexity", "max", 0.9, "0.9: fine-tuned is 1 to infinity, so no adapter could pass"),
])
def test_a_limit_that_no_value_or_every_value_reaches_is_refused(
        tmp_path: Path, metric: str, bound: str, limit: float, message: str) -> None:
    file = build_pipeline.write(tmp_path, **{f"evaluation__gate__{metric}": {bound: limit}})
    with pytest.raises(UserError, match=re.escape(f"evaluation.gate.{metric}.{bound}: {message}")):
        pipeline.load(file)


def test_in_mode_merged_vllm_loads_no_adapter_so_its_rank_is_free(tmp_path: Path) -> None:
    loaded = pipeline.load(build_pipeline.write(tmp_path, training__lora__r=128, serving__mode="merged"))
    assert loaded.pipeline.training.lora.r > loaded.pipeline.environment.serving.max_lora_rank


def test_the_error_names_the_line(tmp_path: Path) -> None:
    file = build_pipeline.write(tmp_path)
    file.write_text(file.read_text().replace("epochs: 1", "epochs: 0"))
    line = next(n for n, text in enumerate(file.read_text().splitlines(), 1) if "epochs" in text)
    with pytest.raises(UserError, match=rf"pipeline.yaml:{line}: training.epochs"):
        pipeline.load(file)


def test_every_problem_is_listed_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        pipeline.load(build_pipeline.write(tmp_path, training__epochs=0, training__learning_rate=-1.0, adapter="A"))
    assert len(str(raised.value).splitlines()) == 3


@pytest.mark.parametrize(("text", "message"), [
    ("adapter: a\nadapter: b\n", "pipeline.yaml:2: not valid YAML: duplicate key `adapter`"),
    ("adapter: [\n", "pipeline.yaml:2: not valid YAML"),
    ("- a\n", "must hold a mapping"),
    ("", "must hold a mapping"),
])
def test_broken_yaml_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "pipeline.yaml").write_text(text)
    with pytest.raises(UserError) as raised:
        pipeline.load(tmp_path / "pipeline.yaml")
    assert message in str(raised.value)


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pipeline.yaml").write_bytes(b"adapter: caf\xe9\n")
    with pytest.raises(UserError, match="not UTF-8 at byte 12"):
        pipeline.load(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pipeline\.yaml: no such file"):
        pipeline.load(tmp_path)


def test_a_learning_rate_may_be_written_without_a_dot(tmp_path: Path) -> None:
    """YAML 1.1 reads 2e-4 as text; people mean a number."""
    file = build_pipeline.write(tmp_path)
    file.write_text(file.read_text().replace("epochs: 1", "learning_rate: 2e-4"))
    assert pipeline.load(file).pipeline.training.learning_rate == 2e-4


# --- the environment that a pipeline belongs to -----------------------------------------------------------------------


def test_an_adapter_of_an_overlay_belongs_to_the_overlays_environment(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "mine" / "adapters" / "seville-hotels"
    folder.mkdir(parents=True)
    build_pipeline.write(folder)
    (folder / "environment.yaml").rename(tmp_path / "mine" / "environment.yaml")
    assert pipeline.load(folder).environment.path == tmp_path / "mine" / "environment.yaml"
    monkeypatch.chdir(folder)
    assert pipeline.load(Path("pipeline.yaml")).environment.path == tmp_path / "mine" / "environment.yaml"


def test_sources_are_relative_to_the_file_that_names_them(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        build_pipeline.write(tmp_path / name, base_model={"source": "file:model", "sha256": build_pipeline.SHA256})
    loaded = pipeline.load(tmp_path / "one", tmp_path / "two" / "environment.yaml")
    assert loaded.resolve(loaded.pipeline.dataset) == tmp_path / "one" / "dataset.jsonl"
    shared = loaded.environment
    assert shared.resolve(shared.environment.base_model) == tmp_path / "two" / "model"


def test_a_missing_environment_file_is_named(tmp_path: Path) -> None:
    build_pipeline.write(tmp_path)
    (tmp_path / "environment.yaml").unlink()
    with pytest.raises(UserError, match=r"environment\.yaml: no such file"):
        pipeline.load(tmp_path)


def test_a_key_of_the_environment_in_a_pipeline_file_says_where_it_belongs_and_what_converts_it(tmp_path: Path) -> None:
    file = build_pipeline.write(tmp_path)
    build_pipeline.write_yaml(file, build_pipeline.values())
    with pytest.raises(UserError) as raised:
        pipeline.load(file)
    line = next(n for n, text in enumerate(file.read_text().splitlines(), 1) if "base_model" in text)
    assert str(raised.value) == (
        f"{file}:{line}: base_model, reference_model: what all adapters share is in environment.yaml now. To convert "
        f"this file, run: python -m jobs new {tmp_path} seville-hotels --from {file}")


def test_a_key_of_the_environment_in_an_adapters_folder_is_to_be_removed_there(tmp_path: Path) -> None:
    folder = tmp_path / "adapters" / "boats"
    folder.mkdir(parents=True)
    build_pipeline.write_yaml(folder / "pipeline.yaml", build_pipeline.pipeline(adapter="boats") | {"serving": {}})
    with pytest.raises(UserError) as raised:
        pipeline.load(folder)
    assert str(raised.value).endswith(
        f"serving: what all adapters share is in environment.yaml. Remove it here; for all, set it in "
        f"{tmp_path}/environment.yaml")


@pytest.mark.parametrize("name", [None, 7, "Not A Name; rm -rf /"])
def test_the_command_that_converts_names_only_what_can_be_a_name(tmp_path: Path, name: Any) -> None:
    build_pipeline.write_yaml(tmp_path / "pipeline.yaml", build_pipeline.values() | {"adapter": name})
    with pytest.raises(UserError, match=f"run: python -m jobs new {tmp_path} NAME --from {tmp_path}/pipeline.yaml$"):
        pipeline.load(tmp_path)


def test_an_environment_cannot_be_written_into_a_pipeline_file(tmp_path: Path) -> None:
    file = build_pipeline.write(tmp_path)
    build_pipeline.write_yaml(file, build_pipeline.pipeline(environment=build_pipeline.environment()))
    with pytest.raises(UserError, match=r"environment: unknown key; allowed: adapter, dataset, training, evaluation$"):
        pipeline.load(file)


@pytest.mark.parametrize("key", ["adapter", "training"])
def test_a_key_of_the_pipeline_in_an_environment_file_is_unknown(tmp_path: Path, key: str) -> None:
    file = build_pipeline.write(tmp_path)
    shared = file.with_name("environment.yaml")
    build_pipeline.write_yaml(shared, build_pipeline.environment() | {key: "x"})
    with pytest.raises(UserError, match=rf"environment\.yaml:\d+: {key}: unknown key"):
        pipeline.load(file)


# --- what is just allowed, and what messages name ---------------------------------------------------------------------


@pytest.mark.parametrize("changes", [
    {"training__sharding": "fsdp"}, {"training__quantization": "4bit"},
    {"training__max_length": 4096, "training__tokens_per_batch": 4096}, {"training__lora__r": 64}])
def test_what_is_just_allowed_is_taken(tmp_path: Path, changes: dict[str, Any]) -> None:
    pipeline.load(build_pipeline.write(tmp_path, **changes))


def test_an_empty_gate_lists_the_metrics_that_a_rule_can_bound(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Add a rule for one of perplexity, .*, acceptability_accuracy$"):
        pipeline.load(build_pipeline.write(tmp_path, evaluation__gate={}))


def test_an_adapter_cannot_have_the_name_of_the_base_model(tmp_path: Path) -> None:
    file = build_pipeline.write(tmp_path, adapter="tiny", base_model={
        "source": "hf://tiny", "revision": build_pipeline.COMMIT})
    with pytest.raises(UserError, match="pipeline.yaml:1: adapter: has the base model's name: clients could not"):
        pipeline.load(file)


def test_sources_are_named_by_their_keys(tmp_path: Path) -> None:
    found = pipeline.load(build_pipeline.write(tmp_path)).pipeline
    assert found.sources() == {"dataset": found.dataset, "evaluation.acceptability": found.evaluation.acceptability}


def test_a_task_is_a_source_and_a_score_that_the_gate_takes(tmp_path: Path) -> None:
    gate = {"tasks.city": [{"min": 0.5}, {"min_gain": 0.1}], "perplexity": {"max_ratio": 0.9}}
    found = pipeline.load(build_pipeline.write(tmp_path, evaluation__tasks=[TASK], evaluation__gate=gate)).pipeline
    assert found.sources()["evaluation.tasks.0"] == found.evaluation.tasks[0]
    assert [key for key, _ in found.evaluation.rules()] == ["perplexity", "tasks.city", "tasks.city"]
    assert found.evaluation.scores()["tasks.city"].label == "task city"


@pytest.mark.parametrize(("file", "shared"), [
    ("pipeline.yaml", "environment.yaml"), ("x/y/z/pipeline.yaml", "x/y/z/environment.yaml"),
    ("mine/adapters/a/pipeline.yaml", "mine/environment.yaml"),
    ("overlays/mine/adapters/a/pipeline.yaml", "overlays/mine/environment.yaml")])
def test_the_environment_file_is_named_as_people_named_the_pipeline_file(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, shared: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert pipeline.find_environment(Path(file)) == Path(shared)


def test_an_environment_file_beside_the_pipeline_file_is_taken_first(tmp_path: Path) -> None:
    """As in a pod, where the folder may have any name."""
    folder = tmp_path / "adapters" / "a"
    folder.mkdir(parents=True)
    build_pipeline.write(folder)
    assert pipeline.find_environment(folder / "pipeline.yaml") == folder / "environment.yaml"


def test_an_environment_that_was_read_before_is_taken_as_it_is(tmp_path: Path) -> None:
    file = build_pipeline.write(tmp_path)
    shared = pipeline.load(file).environment
    shared.path.unlink()
    assert pipeline.load(file, shared).environment is shared


def test_pin_reads_files_without_pins(tmp_path: Path) -> None:
    file = build_pipeline.write(tmp_path, dataset__sha256=None, base_model__revision=None)
    assert pipeline.load(file, pinned=False).pipeline.dataset.sha256 is None


def test_a_pipeline_file_without_a_mapping_names_the_key_that_it_needs(tmp_path: Path) -> None:
    (tmp_path / "pipeline.yaml").write_text("- a\n")
    with pytest.raises(UserError, match="must hold a mapping with the key `adapter` and others, not a list"):
        pipeline.load(tmp_path)


def test_a_path_that_cannot_be_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a+: cannot be read: File name too long"):
        pipeline.load(tmp_path / ("a" * 300))
