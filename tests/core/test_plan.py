"""Promises of the plan: an edit renames exactly what it changes, and what stands in git names everything."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from jobs.core import pipeline
from jobs.core.artifacts import Spec
from jobs.core.environment import SERVABLE_RANKS, Environment
from jobs.core.metrics import METRICS
from jobs.core.plan import RECIPES, Plan, merged_model, plan, scores_of_adapter
from jobs.core.tasks import CHECKS
from tests import build_pipeline
from tests.build_signing import pair

EVALUATIONS = {"adapter_scores", "evaluation"}
ADAPTER = {"adapter", "merged_model"} | EVALUATIONS
ENCODED = {"encoded_dataset"} | ADAPTER
SCORES = {"base_scores", "adapter_scores", "reference_scores", "evaluation"}
TASKS = {"tasks"} | SCORES


def planned(folder: Path, **changes: Any) -> Plan:
    return plan(pipeline.load(build_pipeline.write(folder, **changes)).pipeline)


@pytest.mark.parametrize(("changes", "renamed"), [
    ({}, set()),
    ({"training__lora__r": 4}, ADAPTER),
    ({"training__checkpoint_steps": 7}, set()),
    ({"training__gradient_checkpointing": True, "training__sharding": "fsdp"}, set()),
    ({"training__quantization": "4bit"}, ADAPTER),
    ({"retention__keep": 9}, set()),
    ({"serving__max_lora_rank": 128}, set()),
    ({"serving__when_base_changes": "at-once"}, set()),
    ({"serving__slots": 4}, set()),
    ({"serving__mode": "merged"}, EVALUATIONS),  # of the merged model, which clients get
    ({"adapter": "other"}, {"evaluation"}),
    ({"evaluation__gate__perplexity__max_ratio": 0.8}, {"evaluation"}),
    ({"evaluation__max_new_tokens": 9}, SCORES),
    ({"reference_model__source": "builtin:tiny"}, {"reference_model", "reference_scores", "evaluation"}),
    ({"dataset__sha256": "00" * 32}, {"dataset", "tasks"} | ENCODED | SCORES),
    ({"dataset__source": "https://example.com/copy.jsonl"}, set()),  # the same bytes from elsewhere
    ({"base_model__revision": "0" * 40}, {"base_model", "tokenizer", "base_scores"} | ENCODED),
    ({"tokenizer": {"source": "builtin:tiny"}}, {"tokenizer", "base_scores"} | ENCODED),
])
def test_an_edit_renames_exactly_what_it_changes(tmp_path: Path, changes: dict[str, Any], renamed: set[str]) -> None:
    before, after = planned(tmp_path), planned(tmp_path, **changes)
    assert {name for name, spec in vars(after).items() if spec.digest != vars(before)[name].digest} == renamed


def test_privacy_renames_only_where_it_is_set(tmp_path: Path) -> None:
    """Without canaries the training is the same, and so is the adapter; the reference model has no part in it."""
    before, without, canaries = planned(tmp_path), planned(tmp_path, evaluation__privacy={"canaries": 0}), planned(
        tmp_path, evaluation__privacy={})

    def renamed(after: Plan) -> set[str]:
        return {name for name, spec in vars(after).items() if spec.digest != vars(before)[name].digest}

    assert renamed(without) == {"base_scores"} | EVALUATIONS
    assert renamed(canaries) == {"base_scores"} | ENCODED
    assert canaries == planned(tmp_path, evaluation__privacy={"canaries": 100, "repetitions": 1})
    assert canaries.encoded_dataset.spec["canaries"] == {"recipe": RECIPES["canaries"], "count": 100, "repetitions": 1}


def test_writing_out_a_default_renames_nothing(tmp_path: Path) -> None:
    assert planned(tmp_path, training__seed=0, training__lora__alpha=32) == planned(tmp_path)


def test_tasks_are_in_the_digests_only_where_there_are_some_and_in_any_order(tmp_path: Path) -> None:
    one, two = ({"name": name, "source": f"file:{name}.csv", "sha256": digit * 64, "check": "exact"}
                for name, digit in (("a", "1"), ("b", "2")))
    none, some = planned(tmp_path), planned(tmp_path, evaluation__tasks=[one, two])
    assert "tasks" not in none.base_scores.inputs
    assert some.base_scores.inputs["tasks"] == some.tasks.digest
    assert some.adapter == none.adapter
    assert some == planned(tmp_path, evaluation__tasks=[two, one | {"case_sensitive": True}]), "a default, written out"
    assert some.tasks.spec["tasks"][0] == {"name": "a", "sha256": "1" * 64, "check": "exact", "format": "csv"}


def test_the_order_of_target_modules_renames_nothing(tmp_path: Path) -> None:
    one = planned(tmp_path, training__lora__target_modules=["q_proj", "v_proj"])
    assert one == planned(tmp_path, training__lora__target_modules=["v_proj", "q_proj"])


def test_two_declarations_of_the_same_search_give_one_name(tmp_path: Path) -> None:
    """What is searched has no value of its own, and how its declaration is written does not matter."""
    def searched(search: dict[str, Any], **lora: Any) -> Plan:
        return planned(tmp_path, training__lora=lora, training__search=search)

    one = searched({"candidates": {"lora.r": [4, 8], "learning_rate": [1e-3, 1e-4]}})
    assert "r" not in one.adapter.spec["lora"] and "learning_rate" not in one.adapter.spec
    assert searched({"candidates": {"learning_rate": [1e-3, 1e-4], "lora": {"r": [4, 8]}}}, r=8) == one
    assert searched({"candidates": {"lora.r": [4, 8], "learning_rate": [1e-3, 1e-4]}, "method": "grid",
                     "halving": {"factor": 3, "rungs": 3}}) == one, "the defaults, written out"
    assert searched({"candidates": {"lora.r": [8, 4], "learning_rate": [1e-3, 1e-4]}}) != one, "trials in another order"


def test_a_pipeline_is_planned_once(tmp_path: Path) -> None:
    """Serving asks for the plan of each alias every second."""
    loaded = pipeline.load(build_pipeline.write(tmp_path)).pipeline
    assert plan(loaded) is plan(loaded)
    assert plan(loaded) is not plan(loaded.model_copy())


def test_anyone_can_compute_the_name_of_an_artifact_from_the_pipeline_file(tmp_path: Path) -> None:
    """All that the digests are made of. A change here renames what exists, so that everything is trained again."""
    of = planned(tmp_path, training__lora__target_modules=["v_proj", "q_proj", "v_proj"], training__quantization="4bit",
                 dataset__source="https://example.com/a/Data.JSONL?x=y.csv",
                 evaluation__acceptability__source="hf://datasets/acme/pairs.v2",
                 evaluation__acceptability__revision=build_pipeline.COMMIT)
    commit, digest = {"revision": build_pipeline.COMMIT}, {name: spec.digest for name, spec in vars(of).items()}
    fine_tuned, model = "fine-tuned-model", {"source": "hf://HuggingFaceTB/SmolLM2-135M-Instruct", **commit}
    scores = {"recipe": RECIPES["scores"], "max_new_tokens": 64, "max_length": 1024, "chat_template": {},
              "metrics": {metric.module: metric.version for metric in METRICS}}
    data = {"dataset": digest["dataset"], "acceptability": digest["acceptability"]}
    base = {"encoded_dataset": digest["encoded_dataset"], "model": digest["base_model"],
            "tokenizer": digest["tokenizer"]}
    assert vars(of) == {
        "dataset": Spec("dataset", "dataset", {"recipe": RECIPES["dataset"], "sha256": build_pipeline.SHA256,
                                               "format": "jsonl", "holdout": 0.1}),
        "acceptability": Spec("dataset", "acceptability", {"recipe": RECIPES["acceptability"], "format": "v2",
                                                           "source": "hf://datasets/acme/pairs.v2", **commit}),
        "tasks": Spec("dataset", "tasks", {"recipe": RECIPES["tasks"], "tasks": []}, {"dataset": digest["dataset"]}),
        "base_model": Spec("base-model", "base-model", {"recipe": RECIPES["base-model"], **model}),
        "tokenizer": Spec("base-tokenizer", "tokenizer", {"recipe": RECIPES["tokenizer"], **model}),
        "reference_model": Spec("reference-model", "reference-model", {
            "recipe": RECIPES["reference-model"], "source": "builtin:tiny-reference",
            "embedded": RECIPES["embedded"]}),
        "encoded_dataset": Spec("dataset", "encoded-dataset", {
            "recipe": RECIPES["encoded-dataset"], "max_length": 1024, "chat_template": {}},
            {"dataset": digest["dataset"], "tokenizer": digest["tokenizer"]}),
        "adapter": Spec(fine_tuned, "adapter", {
            "recipe": RECIPES["adapter"],
            "lora": {"r": 8, "alpha": 32, "dropout": 0.05, "target_modules": ["q_proj", "v_proj"]},
            "epochs": 1, "learning_rate": 2e-4, "tokens_per_batch": 4096, "seed": 0,
            "quantization": "4bit"},
            {"dataset": digest["dataset"], "encoded_dataset": digest["encoded_dataset"],
             "base_model": digest["base_model"], "tokenizer": digest["tokenizer"]}),
        "merged_model": Spec(fine_tuned, "merged-model", {"recipe": RECIPES["merged-model"]},
                             {"adapter": digest["adapter"], "base_model": digest["base_model"]}),
        "base_scores": Spec(fine_tuned, "scores", scores, data | base),
        "adapter_scores": Spec(fine_tuned, "scores", scores, data | base | {"adapter": digest["adapter"]}),
        "reference_scores": Spec(fine_tuned, "scores", scores, data | {"model": digest["reference_model"]}),
        "evaluation": Spec(fine_tuned, "evaluation", {
            "recipe": RECIPES["evaluation"], "adapter": "seville-hotels",
            "gate": [{"score": "perplexity", "than": "base", "max_ratio": 0.9}], "confidence": 0.95,
            "clusters": "answer"},
            {"adapter": digest["adapter"], "base_scores": digest["base_scores"],
             "adapter_scores": digest["adapter_scores"], "reference_scores": digest["reference_scores"]}),
    }
    as_default = planned(tmp_path)
    assert as_default.adapter.spec["lora"]["target_modules"] == "all-linear"
    assert "quantization" not in as_default.adapter.spec, "what was named before the setting existed keeps its name"


@pytest.mark.parametrize(("source", "name"), [
    ("file:a.csv", "csv"), ("https://x.org/data", ""), ("https://x.org/a.b/data", ""),
    ("s3://x/y/z.tar.PARQUET", "parquet")])
def test_the_format_of_data_is_what_its_name_ends_with(tmp_path: Path, source: str, name: str) -> None:
    assert planned(tmp_path, dataset__source=source).dataset.spec["format"] == name


def test_in_mode_merged_the_scores_are_those_of_the_merged_model(tmp_path: Path) -> None:
    wanted = planned(tmp_path, serving__mode="merged")
    assert wanted.adapter_scores.inputs["model"] == wanted.merged_model.digest
    assert wanted.adapter_scores.inputs["adapter"] == wanted.adapter.digest, "retention looks for it"
    assert wanted.base_scores == planned(tmp_path).base_scores


def test_an_adapter_has_one_name_for_its_scores_on_a_dataset_whoever_measures_it(tmp_path: Path) -> None:
    """As the one that a pipeline desires, and as the promoted one that a later pipeline compares with."""
    first, second = planned(tmp_path), planned(tmp_path, training__seed=1)
    assert first.adapter_scores.digest == scores_of_adapter(
        second, first.adapter.digest, model=first.base_model.digest, tokenizer=first.tokenizer.digest,
        chat_template={}, encoded=True, private=True).digest
    assert "encoded_dataset" not in scores_of_adapter(
        second, first.adapter.digest, model="b" * 16, tokenizer="c" * 16, chat_template={}, encoded=False,
        private=False).inputs


def test_serving_names_the_merged_model_of_an_earlier_adapter_by_two_digests(tmp_path: Path) -> None:
    """It knows a promoted adapter by its digest only, not by the pipeline file that made it."""
    wanted = planned(tmp_path)
    assert merged_model(wanted.adapter.digest, wanted.base_model.digest) == wanted.merged_model
    assert wanted.named()["merged-model"] == wanted.merged_model
    assert wanted.merged_model.inputs == {"adapter": wanted.adapter.digest, "base_model": wanted.base_model.digest}


# --- every key of the environment file and the pipeline file --------------------------------------------------------

SHA256, COMMIT = (st.text("0123456789abcdef", min_size=digits, max_size=digits) for digits in (64, 40))
MODELS = st.sampled_from(["hf://acme/one", "hf://acme/two", "hf://other/one"])
BASE_MODEL = {"base_model", "tokenizer", "base_scores"} | ENCODED
TOKENIZER = {"tokenizer", "base_scores"} | ENCODED
REFERENCE = {"reference_model", "reference_scores", "evaluation"}
PINNED = {"revision": build_pipeline.COMMIT}
SEARCH = {"candidates": {"lora.alpha": list(range(1, 13))}}
RANDOM = SEARCH | {"method": "random", "trials": 3}


class Key(NamedTuple):
    """A key of a file: the artifacts that it renames, values for it, and what else the file then says."""

    renames: set[str]
    values: st.SearchStrategy[Any]
    beside: dict[str, Any] = {}  # noqa: RUF012 - never changed
    at: str | None = None  # the key that the values are for, where it is not this one


def several(values: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    return st.lists(values, min_size=2, max_size=4, unique_by=repr)


def tasks_with(**values: st.SearchStrategy[Any]) -> st.SearchStrategy[list[dict[str, Any]]]:
    """A list of one task with these values."""
    task = {"name": "city", "source": "file:city.jsonl", "check": "exact", "sha256": build_pipeline.SHA256}
    return st.fixed_dictionaries(values).map(lambda some: [{**task, **some}])


def harness_with(**values: st.SearchStrategy[Any]) -> st.SearchStrategy[list[dict[str, Any]]]:
    """A list of one task with a task file of lm-evaluation-harness that has these values."""
    file = {"source": "file:city.yaml", "sha256": build_pipeline.SHA256}
    files = st.fixed_dictionaries(values).map(lambda some: {**file, **some})
    return tasks_with(check=st.just("lm_eval"), lm_eval=files)


KEYS = {
    "adapter": Key({"evaluation"}, st.sampled_from(["hotels", "seville-hotels", "a1"])),
    # Bytes that are pinned are the same wherever they come from; a hub's are named by repository and commit.
    "dataset.source": Key(set(), st.sampled_from(["file:a.jsonl", "https://x/b.jsonl", "s3://x/y/c.jsonl"])),
    "dataset.sha256": Key({"dataset", "tasks"} | ENCODED | SCORES, SHA256),
    "dataset.revision": Key({"dataset", "tasks"} | ENCODED | SCORES, COMMIT,
                            {"dataset": {"source": "hf://datasets/acme/x"}}),
    "dataset.holdout": Key({"dataset", "tasks"} | ENCODED | SCORES, st.floats(0.01, 0.99)),
    "dataset.validation": Key({"dataset", "tasks"} | ENCODED | SCORES, st.floats(0.01, 0.5)),
    "chat_template": Key(ENCODED | SCORES, st.dictionaries(st.text("abc"), st.booleans())),
    "base_model.source": Key(BASE_MODEL, MODELS),
    "base_model.revision": Key(BASE_MODEL, COMMIT),
    "base_model.sha256": Key(BASE_MODEL, SHA256, {"base_model": {"source": "file:model"}}),
    "base_model.architecture": Key(set(), st.sampled_from(["LlamaForCausalLM", "Qwen3ForCausalLM", None])),
    "tokenizer.source": Key(TOKENIZER, MODELS, {"tokenizer": PINNED}),
    "tokenizer.revision": Key(TOKENIZER, COMMIT, {"tokenizer": {"source": "hf://acme/tokenizer"}}),
    "tokenizer.sha256": Key(TOKENIZER, SHA256, {"tokenizer": {"source": "file:tokenizer"}}),
    "reference_model.source": Key(REFERENCE, MODELS, {"reference_model": PINNED}),
    "reference_model.revision": Key(REFERENCE, COMMIT, {"reference_model": {"source": "hf://acme/large"}}),
    "reference_model.sha256": Key(REFERENCE, SHA256, {"reference_model": {"source": "file:large"}}),
    "reference_model.architecture": Key(set(), st.sampled_from(["LlamaForCausalLM", "Qwen3ForCausalLM", None])),
    "training.lora.r": Key(ADAPTER, st.integers(1, 64)),
    "training.lora.alpha": Key(ADAPTER, st.floats(0.5, 256)),
    "training.lora.dropout": Key(ADAPTER, st.floats(0, 0.9)),
    "training.lora.target_modules": Key(ADAPTER, st.sampled_from(["all-linear", ["q_proj"], ["q_proj", "v_proj"]])),
    "training.epochs": Key(ADAPTER, st.integers(1, 100)),
    "training.learning_rate": Key(ADAPTER, st.floats(1e-6, 0.1)),
    "training.max_length": Key(ENCODED | SCORES, st.integers(8, 4096)),
    "training.tokens_per_batch": Key(ADAPTER, st.integers(1024, 100_000)),
    "training.seed": Key(ADAPTER, st.integers(0, 2**32 - 1)),
    "training.objective": Key(ADAPTER, st.sampled_from(["sft", "dpo", "orpo"])),
    "training.beta": Key(ADAPTER, st.floats(0.2, 1) | st.none(), {"training": {"objective": "dpo"}}),
    "training.keep": Key(ADAPTER, st.sampled_from(["last", "best"])),
    "training.patience": Key(ADAPTER, st.integers(1, 10) | st.none(), {"training": {"keep": "best"}}),
    "training.tokens_per_micro_batch": Key(set(), st.integers(8, 10_000) | st.none()),
    "training.checkpoint_steps": Key(set(), st.integers(1, 1000)),
    "training.gradient_checkpointing": Key(set(), st.booleans()),
    "training.sharding": Key(set(), st.sampled_from(["none", "fsdp"])),
    "training.quantization": Key(ADAPTER, st.sampled_from(["none", "4bit"])),
    # With the values that the file sets.
    "training.search.candidates.lora.r": Key(ADAPTER, st.integers(9, 64).map(lambda value: [8, value])),
    "training.search.candidates.epochs": Key(ADAPTER, st.integers(2, 99).map(lambda value: [1, value])),
    "training.search.candidates.lora.alpha": Key(ADAPTER, several(st.floats(0.5, 256))),
    "training.search.candidates.lora.dropout": Key(ADAPTER, several(st.floats(0, 0.9))),
    "training.search.candidates.lora.target_modules": Key(ADAPTER, several(
        st.sampled_from(["all-linear", ["q_proj"], ["v_proj"], ["q_proj", "v_proj"]]))),
    "training.search.candidates.learning_rate": Key(ADAPTER, several(st.floats(1e-6, 0.1))),
    "training.search.method": Key(ADAPTER, st.sampled_from([SEARCH, RANDOM]), at="training.search"),
    "training.search.trials": Key(ADAPTER, st.integers(2, 9), {"training__search": RANDOM}),
    "training.search.seed": Key(ADAPTER, st.integers(0, 2**32 - 1), {"training__search": RANDOM}),
    "training.search.halving.factor": Key(ADAPTER, st.integers(2, 10), {"training__search": SEARCH}),
    "training.search.halving.rungs": Key(ADAPTER, st.integers(1, 6), {"training__search": SEARCH}),
    "evaluation.acceptability.source": Key(
        {"acceptability"} | SCORES, st.sampled_from(["hf://datasets/acme/x", "hf://datasets/acme/y"]),
        {"evaluation__acceptability": PINNED}),
    "evaluation.acceptability.revision": Key(
        {"acceptability"} | SCORES, COMMIT, {"evaluation__acceptability": {"source": "hf://datasets/acme/x"}}),
    "evaluation.acceptability.sha256": Key(
        {"acceptability"} | SCORES, SHA256, {"evaluation__acceptability": {"source": "file:pairs.csv"}}),
    "evaluation.tasks.source": Key(set(), tasks_with(source=st.sampled_from(["file:a.jsonl", "s3://x/y/c.jsonl"])),
                                   at="evaluation.tasks"),
    "evaluation.tasks.revision": Key(TASKS, tasks_with(source=st.just("hf://datasets/acme/x"), sha256=st.just(None),
                                                       revision=COMMIT), at="evaluation.tasks"),
    "evaluation.tasks.sha256": Key(TASKS, tasks_with(sha256=SHA256), at="evaluation.tasks"),
    "evaluation.tasks.name": Key(TASKS, tasks_with(name=st.sampled_from(["a", "b-1"])), at="evaluation.tasks"),
    "evaluation.tasks.check": Key(TASKS, tasks_with(check=st.sampled_from([*CHECKS][:-1])), at="evaluation.tasks"),
    "evaluation.tasks.max_new_tokens": Key(TASKS, tasks_with(max_new_tokens=st.integers(1, 99)), at="evaluation.tasks"),
    "evaluation.tasks.case_sensitive": Key(TASKS, tasks_with(case_sensitive=st.booleans()), at="evaluation.tasks"),
    "evaluation.tasks.normalize": Key(TASKS, tasks_with(normalize=st.booleans()), at="evaluation.tasks"),
    "evaluation.tasks.pattern": Key(TASKS, tasks_with(check=st.just("regex"), pattern=st.sampled_from(["a", "b"])),
                                    at="evaluation.tasks"),
    "evaluation.tasks.json_schema": Key(TASKS, tasks_with(
        check=st.just("json_schema"), schema=st.sampled_from([{}, {"type": "object"}])), at="evaluation.tasks"),
    "evaluation.tasks.fence": Key(TASKS, tasks_with(check=st.just("json_schema"), fence=st.booleans()),
                                  at="evaluation.tasks"),
    "evaluation.tasks.labels": Key(TASKS, tasks_with(
        check=st.just("label_f1"), labels=st.sampled_from([["a", "b"], ["a", "c"]])), at="evaluation.tasks"),
    "evaluation.tasks.lm_eval.source": Key(set(), harness_with(
        source=st.sampled_from(["file:a.yaml", "s3://x/y.yaml"])), at="evaluation.tasks"),
    "evaluation.tasks.lm_eval.revision": Key(TASKS, harness_with(source=st.just("hf://datasets/acme/x/a.yaml"),
                                                                 sha256=st.just(None), revision=COMMIT),
                                             at="evaluation.tasks"),
    "evaluation.tasks.lm_eval.sha256": Key(TASKS, harness_with(sha256=SHA256), at="evaluation.tasks"),
    "evaluation.tasks.lm_eval.metric": Key(TASKS, harness_with(metric=st.sampled_from(["acc", "acc_norm", None])),
                                           at="evaluation.tasks"),
    "evaluation.max_new_tokens": Key(SCORES, st.integers(1, 4096)),
    "evaluation.answered_records": Key(SCORES, st.integers(1, 10**6)),
    "evaluation.confidence": Key({"evaluation"}, st.floats(0.5, 0.999)),
    "evaluation.clusters": Key({"evaluation"}, st.sampled_from(["answer", "record"])),
    "evaluation.privacy.canaries": Key(ENCODED | {"base_scores"}, st.integers(20, 1000)),
    "evaluation.privacy.repetitions": Key(ENCODED | {"base_scores"}, st.integers(1, 100)),
    "evaluation.privacy.records": Key({"base_scores"} | EVALUATIONS, st.integers(100, 100_000)),
    "evaluation.privacy.verbatim_tokens": Key({"base_scores"} | EVALUATIONS, st.integers(1, 100)),
    "evaluation.gate": Key({"evaluation"}, st.builds(
        lambda bound, limit, than: {"perplexity": {bound: limit, **({"than": than} if bound == "max_ratio" else {})}},
        st.sampled_from(["max", "max_ratio"]), st.floats(1.5, 100), st.sampled_from(["base", "promoted"]))),
    "evaluation.report_answers": Key({"evaluation"}, st.booleans()),
    "serving.mode": Key(EVALUATIONS, st.sampled_from(["lora", "merged"])),
    "serving.max_lora_rank": Key(set(), st.sampled_from(SERVABLE_RANKS[2:])),
    "serving.slots": Key(set(), st.integers(1, 1024)),
    "serving.when_base_changes": Key(set(), st.sampled_from(["wait-for-adapters", "at-once"])),
    "retention.keep": Key(set(), st.integers(1, 100)),
    "publication.to": Key(set(), st.sampled_from(["oci://registry.example.com/a", "s3://bucket/a"])),
    "publication.answers": Key(set(), st.booleans(), {"publication": {"to": "oci://registry.example.com/a"}}),
    "signing.public_keys": Key(set(), st.sampled_from([[pair("one").public], [pair("two").public]])),
}


def keys_of(model: type[BaseModel], before: str = "") -> Iterator[str]:
    """The dotted names of all keys that hold a value."""
    for name, field in model.model_fields.items():
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        inner = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if inner:
            yield from keys_of(inner, f"{before}{name}.")
        else:
            yield before + name


@pytest.mark.parametrize("name", [*keys_of(Environment), *keys_of(pipeline.PipelineFile)])
def test_every_key_renames_exactly_the_artifacts_that_it_should(name: str) -> None:
    """A key that is missing in a digest serves an old result as a new one; one too many trains for nothing."""
    listed = [key for pattern, key in KEYS.items() if fnmatch(name, pattern)]
    assert listed, f"{name} is a new key: list in KEYS which artifacts it renames"

    @settings(max_examples=6, deadline=None, derandomize=True)
    @given(st.lists(listed[0].values, min_size=2, max_size=2, unique_by=repr))
    def check(values: list[Any]) -> None:
        before, after = (plan(_validated(listed[0].at or name, value, listed[0].beside)) for value in values)
        renamed = {kind for kind, spec in vars(before).items() if spec.digest != vars(after)[kind].digest}
        assert renamed == listed[0].renames

    check()


def _validated(name: str, value: Any, beside: dict[str, Any]) -> pipeline.Pipeline:
    """A valid pipeline with a value at a dotted name; None leaves the key out."""
    copies = {key: dict(entry) for key, entry in beside.items()}
    return build_pipeline.build(**copies, **{name.replace(".", "__"): value})
