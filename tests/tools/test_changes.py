"""Promises of `python -m jobs plan`: it says before a push what the push does, and why, and changes nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs import __main__ as cli
from jobs.core import plan as core_plan
from jobs.core import promotion
from jobs.core.artifacts import publish
from jobs.core.environment import Serving
from jobs.core.errors import UserError
from jobs.core.files import sha256_of
from jobs.core.pipeline import Pipeline
from jobs.core.plan import RECIPES, EvaluatedImportPlan, Plan, plan
from jobs.tools import changes, changes_report, pods, values, workloads
from jobs.tools import plan as command
from jobs.tools.changes import Changes, Side
from jobs.tools.pods import CHECKOUT, Manifest
from tests import build_pipeline
from tests.manifests import copy

Edit = Callable[[Path], object]
A, B = "seville-hotels", "second"
OWN_GIT = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b",
           "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(folder), *arguments], env=os.environ | OWN_GIT, check=True,
                          capture_output=True, text=True).stdout


def commit(folder: Path) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--allow-empty", "--message", "a commit")


def edit(file: Path, before: str, after: str) -> None:
    text = file.read_text()
    assert before in text, f"{file} holds no {before!r}"
    file.write_text(text.replace(before, after))


def add_adapter(overlay: Path, name: str) -> None:
    """A copy of the adapter A, with its entries in the overlay's kustomization."""
    folder = shutil.copytree(overlay / "adapters" / A, overlay / "adapters" / name)
    edit(folder / "pipeline.yaml", f"adapter: {A}", f"adapter: {name}")
    edit(folder / "kustomization.yaml", A, name)
    file = overlay / "kustomization.yaml"
    edit(file, f"- adapters/{A}\n", f"- adapters/{A}\n- adapters/{name}\n")
    listed = f"  - {A}.yaml=adapters/{A}/pipeline.yaml\n"
    edit(file, listed, listed + listed.replace(A, name))


def remove_adapter(overlay: Path, name: str) -> None:
    shutil.rmtree(overlay / "adapters" / name)
    file = overlay / "kustomization.yaml"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if f"adapters/{name}" not in line))


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the overlays, all committed. overlays/kind has the adapters A and B. Only to be copied."""
    folder = tmp_path_factory.mktemp("committed")
    overlay = copy(folder)
    for name in ("kind-smollm2", "gpu", "kind-serving"):
        shutil.rmtree(folder / "overlays" / name)
    for other in sorted((overlay / "adapters").iterdir()):
        if other.name != A:
            remove_adapter(overlay, other.name)
    add_adapter(overlay, B)
    git(folder, "init", "--quiet", "--initial-branch=main")
    commit(folder)
    return folder


@pytest.fixture
def overlay(committed: Path, tmp_path: Path) -> Path:
    """overlays/kind in a repository of its own."""
    return shutil.copytree(committed, tmp_path / "repository", symlinks=True) / "overlays" / "kind"


def planned(overlay: Path, since: str | None = None, volumes: Path | None = None) -> Changes:
    return command.make(overlay, since, volumes).changes


def new(part: changes.Part) -> dict[str, tuple[str, ...]]:
    """The new artifacts, and why they are."""
    assert all(bool(each.reasons) == each.new for each in part.artifacts) or part.status == "added"
    return {each.name: each.reasons for each in part.artifacts if each.new}


def running(found: Changes) -> dict[str, tuple[str, ...]]:
    """The Jobs with new names, without their hash, and what each makes."""
    return {run.workload.title: run.makes for run in found.runs if run.new}


def of(adapter: str) -> set[str]:
    """The Jobs of an adapter."""
    return {f"{job}-{adapter}"
            for job in ("dataset-relocation", "dataset-encoding", "model-training", "model-evaluation")}


SHARED_JOBS = {"model-relocation", "tokenizer-relocation", "model-reference-relocation"}


# --- what changes, and why --------------------------------------------------------------------------------------------


def test_without_a_change_nothing_is_new_and_nothing_runs(overlay: Path) -> None:
    found = planned(overlay)
    assert {part.status for part in [found.environment, *found.adapters.values()]} == {"unchanged"}
    assert (running(found), found.removed, found.restarts, found.rollouts) == ({}, [], [], [])
    assert len(found.runs) == 11
    assert changes_report.summary(found) == "2 adapters unchanged; no Job runs; serving does not restart"


def test_a_setting_of_training_concerns_its_adapter_only_and_is_named(overlay: Path) -> None:
    edit(overlay / "adapters" / A / "pipeline.yaml", "r: 16", "r: 32")
    found = planned(overlay)
    assert new(found.adapters[A]) == {
        "adapter": ("training.lora.r: 16 -> 32",), "adapter-scores": ("new input: adapter",),
        "evaluation": ("new input: adapter, adapter-scores",)}
    assert new(found.environment) == new(found.adapters[B]) == {}
    assert running(found) == {f"dataset-relocation-{A}": (), f"dataset-encoding-{A}": (),
                              f"model-training-{A}": (f"{A}/adapter",),
                              f"model-evaluation-{A}": (f"{A}/adapter-scores", f"{A}/evaluation")}
    assert (found.adapters[A].service, found.adapters[B].service) == ("kept", "unchanged")
    assert changes_report.summary(found) == ("1 adapter trained again, 1 unchanged; 4 Jobs run, 2 for nothing new; "
                                             "serving does not restart")


def test_new_data_is_a_reason_by_its_pin(overlay: Path) -> None:
    folder = overlay / "adapters" / B
    before = sha256_of(folder / "dataset.jsonl")
    with (folder / "dataset.jsonl").open("a") as stream:
        stream.write('{"prompt": "?", "completion": "!"}\n')
    report = command.make(overlay)
    assert new(report.changes.adapters[B]) == {}
    assert running(report.changes).keys() == of(B)
    assert any(note.startswith("its relocation would fail: ") and "python -m jobs pin" in note
               for note in report.notes)
    edit(folder / "pipeline.yaml", before, after := sha256_of(folder / "dataset.jsonl"))
    report = command.make(overlay)
    why = new(report.changes.adapters[B])
    assert why["dataset"] == (f"dataset.sha256: {before[:12]}… -> {after[:12]}…",)
    assert why["encoded-dataset"] == ("new input: dataset",)
    assert why["adapter"] == ("new input: dataset, encoded-dataset",)
    assert not any("relocation would fail" in note for note in report.notes)


def test_a_new_base_model_makes_every_adapter_new_and_serving_waits_for_them(overlay: Path) -> None:
    hub = f"source: hf://HuggingFaceTB/SmolLM2-135M-Instruct\n  revision: {build_pipeline.COMMIT}\n"
    edit(overlay / "environment.yaml", "source: builtin:tiny\n", hub)
    found = planned(overlay)
    why = new(found.environment)
    assert why.keys() == {"base-model", "tokenizer"}
    assert why["base-model"] == why["tokenizer"] == (
        "base_model.source: builtin:tiny -> hf://HuggingFaceTB/SmolLM2-135M-Instruct",
        f"base_model.revision: none -> {build_pipeline.COMMIT[:12]}…")
    for name in (A, B):
        assert new(found.adapters[name])["adapter"] == ("new input: encoded-dataset, base-model, tokenizer",)
        assert found.adapters[name].service == "kept"
    assert running(found).keys() == SHARED_JOBS | of(A) | of(B)
    assert [(each.when, each.reason) for each in found.restarts] == [
        ("adapters passed", "the base model changes and the tokenizer changes")]
    edit(overlay / "environment.yaml", "  max_lora_rank: 64", "  max_lora_rank: 64\n  when_base_changes: at-once")
    found = planned(overlay)
    assert [each.when for each in found.restarts] == ["base model there"]
    assert {part.service for part in found.adapters.values()} == {"interrupted"}


def test_only_the_gate_is_evaluated_again(overlay: Path) -> None:
    edit(overlay / "adapters" / A / "pipeline.yaml", "rougeL: {min_gain: 0.3}", "rougeL: {min_gain: 0.2, max_drop: 0}")
    found = planned(overlay)
    assert new(found.adapters[A]) == {"evaluation": ("evaluation.gate.rougeL.min_gain: 0.3 -> 0.2",
                                                     "evaluation.gate.rougeL.max_drop: none -> 0.0")}
    assert found.adapters[A].service == "kept"
    assert changes_report.work(found.adapters[A]) == "evaluated again"


@pytest.mark.parametrize(("before", "after", "shown"), [
    ("checkpoint_steps: 50", "checkpoint_steps: 60", ["training.checkpoint_steps: 50 -> 60"]),
    ("# Every rule must hold", "# Each rule must hold", []),
], ids=["a setting in no digest", "a comment"])
def test_a_job_that_runs_for_nothing_is_told_from_one_that_works(
        overlay: Path, before: str, after: str, shown: list[str]) -> None:
    edit(overlay / "adapters" / A / "pipeline.yaml", before, after)
    found = planned(overlay)
    assert new(found.adapters[A]) == {}
    assert running(found) == dict.fromkeys(of(A), ())
    assert [str(each) for each in found.adapters[A].settings] == shown
    assert changes_report.summary(found) == ("2 adapters unchanged; 4 Jobs run for nothing new; serving does not "
                                             "restart")


def test_the_folder_of_an_adapter_stands_for_its_overlay(overlay: Path) -> None:
    report = command.make(overlay / "adapters" / A)
    assert (report.overlay, set(report.changes.adapters)) == (overlay, {A, B})


def test_adapters_come_and_go_without_a_restart(overlay: Path) -> None:
    remove_adapter(overlay, B)
    add_adapter(overlay, "third")
    found = planned(overlay)
    assert {name: (part.status, part.service) for name, part in found.adapters.items()} == {
        A: ("unchanged", "unchanged"), B: ("removed", "removed"), "third": ("added", "unavailable")}
    assert running(found).keys() == of("third")
    assert {name.rpartition("-")[0] for name in found.removed} == of(B)
    assert found.restarts == []
    assert changes_report.summary(found) == ("1 adapter added, 1 removed, 1 unchanged; 4 Jobs run; serving does not "
                                             "restart")


def test_an_adapter_that_no_kustomization_lists_is_said_not_to_run(overlay: Path) -> None:
    before = (overlay / "kustomization.yaml").read_text()
    add_adapter(overlay, "third")
    (overlay / "kustomization.yaml").write_text(before)
    notes = command.make(overlay).notes
    assert any("`resources` does not list adapters/third, so its Jobs would not run" in note for note in notes)


@pytest.mark.parametrize(("file", "before", "after", "restarts"), [
    ("cpu/vllm-cpu.yaml", "--max-model-len=512", "--max-model-len=256",
     [("rollout", "its pods change: spec.containers.vllm.args: [--max-model-len=512] -> [--max-model-len=256]")]),
    ("environment.yaml", "max_lora_rank: 64", "max_lora_rank: 128",
     [("at once", "serving.max_lora_rank: 64 -> 128")]),
    ("environment.yaml", "max_lora_rank: 64", "max_lora_rank: 32", []),
    ("environment.yaml", "serving:\n", "serving:\n  slots: 4\n", [("at once", "serving.slots: none -> 4")]),
    ("environment.yaml", "serving:\n", "serving:\n  slots: 4\n  mode: merged\n",
     [("adapters passed", "serving.mode changes from lora to merged")]),
    ("environment.yaml", "keep: 5", "keep: 6", []),
    ("environment.yaml", "serving:\n", "serving:\n  mode: merged\n",
     [("adapters passed", "serving.mode changes from lora to merged")]),
    ("environment.yaml", "serving:\n", "chat_template: {enable_thinking: false}\nserving:\n",
     [("adapters passed", "chat_template changes from {} to {enable_thinking: false}")]),
], ids=["a flag of vLLM", "a higher rank", "a lower rank", "slots", "slots and the mode", "retention", "mode merged",
        "arguments of the chat template"])
def test_whether_serving_restarts_and_when(overlay: Path, file: str, before: str, after: str,
                                           restarts: list[tuple[str, str]]) -> None:
    edit(overlay / file, before, after)
    assert [(each.when, each.reason) for each in planned(overlay).restarts] == restarts


def test_a_further_setting_of_the_server_restarts_it() -> None:
    """Until serving/base.py has a rule for it, a wrong "does not restart" would be the worse mistake."""
    class More(Serving):
        threads: int = 1

    pipeline = build_pipeline.build()
    deployment = {"kind": "Deployment", "metadata": {"name": "model-inference"}, "spec": {"template": {}}}
    sides = [Side(pipeline.environment.model_copy(update={"serving": More(threads=number)}), {}, [deployment])
             for number in (1, 2)]
    assert [str(each) for each in changes.compare(sides[0], sides[1]).restarts] == [
        str(changes.Restart("at once", "serving.threads: 1 -> 2"))]


def test_mode_merged_makes_one_more_artifact_and_restarts_with_every_adapter(overlay: Path) -> None:
    edit(overlay / "environment.yaml", "serving:\n", "serving:\n  mode: merged\n")
    found = planned(overlay)
    assert new(found.adapters[A]) == {"merged-model": ("serving.mode: lora -> merged",),
                                      "adapter-scores": ("new input: merged-model",),
                                      "evaluation": ("new input: adapter-scores",)}
    assert running(found)[f"model-training-{A}"] == (f"{A}/merged-model",)
    commit(overlay)
    edit(overlay / "adapters" / A / "pipeline.yaml", "r: 16", "r: 32")
    assert [each.when for each in planned(overlay).restarts] == ["adapters passed"]


def test_another_image_of_the_jobs_runs_them_all_and_makes_nothing(overlay: Path) -> None:
    file = overlay / "kustomization.yaml"
    file.write_text(file.read_text().replace("newName: lora-gitops-jobs", "newName: example.com/lora-gitops-jobs"))
    found = planned(overlay)
    assert running(found) == dict.fromkeys(SHARED_JOBS | of(A) | of(B), ())
    assert (found.restarts, found.rollouts) == ([], ["tensorboard"])


def test_another_namespace_is_another_environment(overlay: Path) -> None:
    edit(overlay / "kustomization.yaml", "namespace: lora-gitops\n", "namespace: elsewhere\n")
    found = planned(overlay)
    assert "changes from lora-gitops to elsewhere" in found.notes[0]
    assert (found.server, found.restarts) == ("starts", [])


# --- reasons follow from the plan -------------------------------------------------------------------------------------


def alone(**edits: Any) -> Changes:
    """What changes between two valid files, without manifests."""
    before, after = build_pipeline.build(), build_pipeline.build(**edits)
    sides = [Side(each.environment, {each.adapter: each}, []) for each in (before, after)]
    return changes.compare(sides[0], sides[1])


@pytest.mark.parametrize(("edits", "reasons"), [
    ({"dataset__source": "https://example.com/x.jsonl"}, {}),  # bytes with the same pin are the same
    ({"dataset__source": "file:dataset.csv"}, {"dataset": ("dataset.source: file:dataset.jsonl -> file:dataset.csv",)}),
    ({"dataset__holdout": 0.2}, {"dataset": ("dataset.holdout: 0.1 -> 0.2",)}),
    ({"dataset": {"source": "hf://datasets/a/b", "revision": build_pipeline.COMMIT}}, {"dataset": (
        "dataset.source: file:dataset.jsonl -> hf://datasets/a/b", f"dataset.revision: none -> {'12fd25f77366'}…",
        "dataset.sha256: 5b1f5b1f5b1f… -> none")}),
    ({"training__quantization": "4bit"}, {"adapter": ("training.quantization: none -> 4bit",)}),
    ({"training__max_length": 512}, {"encoded-dataset": ("training.max_length: 1024 -> 512",),
                                     "adapter": ("new input: encoded-dataset",),
                                     "base-scores": ("training.max_length: 1024 -> 512",
                                                     "new input: encoded-dataset")}),
    ({"training__lora__target_modules": ["q_proj"]},
     {"adapter": ("training.lora.target_modules: all-linear -> [q_proj]",)}),
    ({"tokenizer": {"source": "hf://a/b", "revision": build_pipeline.COMMIT}}, {
        "tokenizer": ("tokenizer.source: none -> hf://a/b", f"tokenizer.revision: none -> {'12fd25f77366'}…"),
        "encoded-dataset": ("new input: tokenizer",), "adapter": ("new input: encoded-dataset, tokenizer",)}),
    ({"evaluation__gate": {"rougeL": {"min_gain": 0.1}}}, {"evaluation": (
        "evaluation.gate.perplexity: {max_ratio: 0.9} -> none", "evaluation.gate.rougeL: none -> {min_gain: 0.1}")}),
    ({"base_model__architecture": "LlamaForCausalLM"}, {}),
])
def test_the_reasons_are_the_keys_that_the_digest_follows(
        edits: dict[str, Any], reasons: dict[str, tuple[str, ...]]) -> None:
    found = alone(**edits)
    why = new(found.environment) | new(found.adapters[A])
    assert {name: why[name] for name in reasons} == reasons
    assert bool(why) == bool(reasons)


def test_every_artifact_of_the_plan_belongs_to_one_stage_that_the_command_line_knows() -> None:
    made = [name for names in changes.STAGES.values() for name in names]
    assert sorted(made) == sorted({each.name for kind in (Plan, EvaluatedImportPlan)
                                   for each in dataclasses.fields(kind)})
    for stage in changes.STAGES:
        cli.parser().parse_args(stage.split())


def test_another_recipe_is_a_reason_too() -> None:
    """The digests of before are those of the code of before."""
    pipeline = build_pipeline.build()
    before = Side(pipeline.environment, {A: pipeline}, [], RECIPES | {"adapter": RECIPES["adapter"] + 1})
    found = changes.compare(before, Side(pipeline.environment, {A: pipeline}, []))
    why = new(found.adapters[A])
    number = RECIPES["adapter"]
    assert why["adapter"] == (f"recipe: {number + 1} -> {number} (RECIPES in jobs/core/plan.py)",)
    assert why.keys() == {"adapter", "adapter-scores", "evaluation"}


def test_the_recipes_of_the_revision_are_those_of_its_code(overlay: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = overlay.parents[1] / "jobs" / "core" / "plan.py"
    code.parent.mkdir(parents=True)
    shutil.copy(CHECKOUT / "jobs" / "core" / "plan.py", code)
    number = RECIPES["acceptability"]
    edit(code, f'"acceptability": {number}', f'"acceptability": {number + 1}')
    commit(overlay)
    assert new(planned(overlay).adapters[A]) == {}, "the code that runs is of another repository"
    monkeypatch.setattr(core_plan, "__file__", str(code))
    assert new(planned(overlay).adapters[A])["acceptability"] == (
        f"recipe: {number + 1} -> {number} (RECIPES in jobs/core/plan.py)",)


def test_a_secret_in_a_url_is_not_shown() -> None:
    for url in ("https://user:hunter2@example.com/x.jsonl", "https://example.com/x.jsonl?sig=hunter2#a"):
        assert values.shown(url) in ("https://example.com/x.jsonl", "https://example.com/x.jsonl?…#a")
        found = alone(dataset={"source": url, "sha256": "0" * 64})
        report = changes_report.Report(Path("overlay"), None, [], found)
        for form in (changes_report.table, changes_report.markdown, changes_report.as_json):
            assert "example.com/x.jsonl" in form(report)
            assert "hunter2" not in form(report)


# --- Jobs and JobSets -------------------------------------------------------------------------------------------------


def job_set(name: str, adapter: str | None, *stages: str) -> list[Manifest]:
    """A JobSet with a Job for each stage, and the ConfigMap that its pods mount."""
    volumes = [{"name": "x", "projected": {"sources": [{"configMap": {"name": f"pipeline-{adapter}"}}]}}]
    jobs = [{"name": stage.replace(" ", "-"), "template": {"spec": {"template": {"spec": {
        "containers": [{"name": "job", "args": stage.split()}], "volumes": volumes if adapter else []}}}}}
        for stage in stages]
    return [{"kind": "ConfigMap", "metadata": {"name": f"pipeline-{adapter}"},
             "data": {"pipeline.yaml": f"adapter: {adapter}\n"}},
            {"kind": "JobSet", "metadata": {"name": name}, "spec": {"replicatedJobs": jobs}}]


def test_a_jobset_is_one_name_for_all_of_its_stages() -> None:
    stages = ("relocate dataset", "encode", "await encoded-dataset base-model", "train", "evaluate")
    models = job_set("models-2222222222", None, "relocate base-model", "relocate tokenizer")
    before, after = build_pipeline.build(), build_pipeline.build(training__lora__r=16)
    found = changes.compare(
        Side(before.environment, {A: before}, job_set(f"pipeline-{A}-4444444444", A, *stages) + models),
        Side(after.environment, {A: after}, job_set(f"pipeline-{A}-5555555555", A, *stages) + models))
    of_adapter, of_models = sorted(found.runs, key=lambda run: run.workload.name, reverse=True)
    assert (of_adapter.before, of_adapter.new) == (f"pipeline-{A}-4444444444", True)
    assert of_adapter.workload.stages == tuple((stage, A) for stage in stages if "await" not in stage)
    assert of_adapter.makes == (f"{A}/adapter", f"{A}/adapter-scores", f"{A}/evaluation")
    assert (of_models.new, of_models.makes) == (False, ())
    assert "1 JobSet runs; " in changes_report.summary(found)
    assert f"JobSet pipeline-{A}  4444444444 -> 5555555555" in changes_report.table(
        changes_report.Report(Path("overlay"), None, [], found))


def test_the_jobs_of_every_overlay_carry_out_every_stage() -> None:
    """A Job whose arguments were read wrongly would be missing in every plan."""
    from tests.manifests import render

    for folder in sorted(CHECKOUT.glob("overlays/*/environment.yaml")):
        found = workloads.find(render(folder.parent), changes.COMMANDS)
        adapters: list[str | None] = [path.name for path in (folder.parent / "adapters").iterdir()]
        stages = [stage for workload in found for stage in workload.stages]
        serves = folder.parent.name == "kind-serving"
        trains = changes.COMMANDS.keys() - {"relocate adapter"}
        carried = {"relocate base-model", "relocate tokenizer", "relocate adapter"} if serves else trains
        expected = [(command, adapter) for command, own in changes.COMMANDS.items() if command in carried
                    for adapter in (adapters if own else [None])]
        assert sorted(stages, key=str) == sorted(expected, key=str), folder


# --- what is on the volumes -------------------------------------------------------------------------------------------


def pipeline_of(overlay: Path, name: str) -> Pipeline:
    from jobs.tools import overlay as files

    return files.trained(files.load(overlay).adapters)[name].pipeline


def make_all(pipeline: Pipeline, volumes: Path, *, passed: bool = True) -> None:
    """Publish every artifact of a pipeline, in folders named as a cluster mounts them."""
    for name, spec in plan(pipeline).named().items():
        if name != "merged-model":
            def write(draft: Path) -> dict[str, Any]:
                (draft / "file").write_text("content")
                return {"passed": passed}

            publish(spec, volumes, write, keep=9)


@pytest.mark.parametrize("suffix", ["", "-pvc"])
def test_volumes_show_what_is_there_and_what_would_be_made(overlay: Path, tmp_path: Path, suffix: str) -> None:
    volumes = tmp_path / "volumes"
    make_all(pipeline_of(overlay, A), volumes)
    edit(overlay / "adapters" / A / "pipeline.yaml", "r: 16", "r: 32")
    if suffix:
        for folder in list(volumes.iterdir()):
            folder.rename(folder.with_name(folder.name + suffix))
    found = planned(overlay, volumes=volumes)
    there = {each.name: each.there for each in found.adapters[A].artifacts}
    assert there == {"dataset": True, "acceptability": True, "tasks": True, "encoded-dataset": True, "adapter": False,
                     "base-scores": True, "adapter-scores": False, "reference-scores": True, "evaluation": False}
    assert running(found)[f"dataset-relocation-{A}"] == ()
    assert running(found)[f"model-training-{A}"] == (f"{A}/adapter",)
    table = changes_report.table(command.make(overlay, None, volumes))
    assert re.search(r"train +adapter +\w{16} +new +would be made +runs", table)
    assert re.search(r"relocate dataset +dataset +\w{16} +unchanged +there +runs", table)
    assert re.search(r"evaluation +\w{16} +unchanged +not there", table), "of B, of which no Job runs"


def test_a_revert_restores_an_adapter_without_training(overlay: Path, tmp_path: Path) -> None:
    old = pipeline_of(overlay, A)
    make_all(old, tmp_path / "volumes")
    file = overlay / "adapters" / A / "pipeline.yaml"
    edit(file, "r: 16", "r: 32")
    commit(overlay)
    promoted = plan(pipeline_of(overlay, A))
    promotion.promote(tmp_path / "volumes" / "fine-tuned-model", A, promoted.adapter.digest, promoted.evaluation.digest)
    edit(file, "r: 32", "r: 16")
    found = planned(overlay, volumes=tmp_path / "volumes")
    part = found.adapters[A]
    assert part.artifact("adapter").new  # type: ignore[union-attr]
    assert (part.service, part.promoted, changes_report.work(part)) == ("at once", promoted.adapter.digest, "restored")
    assert set(running(found).values()) == {()}
    assert changes_report.summary(found).startswith("1 adapter restored, 1 unchanged; 4 Jobs run for nothing new")


@pytest.mark.parametrize(("passed", "promoted", "service"), [
    (None, False, "unavailable"), (None, True, "kept"), (False, True, "rejected"), (True, True, "at once")])
def test_what_clients_get_until_the_new_adapter_passes(
        overlay: Path, tmp_path: Path, passed: bool | None, promoted: bool, service: str) -> None:
    volumes = tmp_path / "volumes"
    (volumes / "fine-tuned-model").mkdir(parents=True)
    if promoted:
        promotion.promote(volumes / "fine-tuned-model", A, "1" * 16, "2" * 16)
    edit(overlay / "adapters" / A / "pipeline.yaml", "r: 16", "r: 32")
    if passed is not None:
        make_all(pipeline_of(overlay, A), volumes, passed=passed)
    part = planned(overlay, volumes=volumes).adapters[A]
    assert part.service == service
    assert ("now seville-hotels@1111111111111111" in changes_report.title(A, part)) == (service in ("kept", "rejected"))


def test_scores_that_nobody_needs_any_more_are_not_made_again(overlay: Path, tmp_path: Path) -> None:
    """Retention may have removed them, and an evaluation that is there is not made again."""
    volumes = tmp_path / "volumes"
    make_all(pipeline_of(overlay, A), volumes)
    shutil.rmtree(volumes / "fine-tuned-model" / "scores")
    edit(overlay / "adapters" / A / "pipeline.yaml", "# Every rule", "# Each rule")
    assert running(planned(overlay, volumes=volumes)) == dict.fromkeys(of(A), ())
    assert "not needed" in changes_report.table(command.make(overlay, None, volumes))


def test_a_folder_without_volumes_is_an_error(overlay: Path, tmp_path: Path) -> None:
    (tmp_path / "state" / "volumes" / "dataset-pvc").mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds no folder of a volume, such as .* Did you mean .*/state/volumes\?"):
        planned(overlay, volumes=tmp_path / "state")
    with pytest.raises(UserError, match="holds no folder of a volume"):
        planned(overlay, volumes=tmp_path / "absent")


# --- the other side ---------------------------------------------------------------------------------------------------


def test_by_default_it_compares_with_the_upstream_and_else_with_head(overlay: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", str(overlay.parents[1]), str(clone))
    mine = clone / "overlays" / "kind"
    edit(mine / "adapters" / A / "pipeline.yaml", "r: 16", "r: 32")
    commit(mine)
    report = command.make(mine)
    assert report.since and report.since.name == "origin/main"
    assert new(report.changes.adapters[A]), "a commit that was not pushed"
    assert report.notes == []
    git(mine, "checkout", "--quiet", "--no-track", "-b", "feature")
    edit(mine / "adapters" / B / "pipeline.yaml", "r: 16", "r: 8")
    report = command.make(mine)
    assert report.since and report.since.name == "HEAD"
    assert (new(report.changes.adapters[A]), len(new(report.changes.adapters[B]))) == ({}, 3)
    assert report.notes == [
        "the current branch has no upstream: compared with HEAD, which has all that is committed. Name what the "
        "cluster follows, e.g. --since origin/main",
        f"not committed, and so not part of a push yet: overlays/kind/adapters/{B}/pipeline.yaml"]


def test_commits_of_others_that_are_not_merged_are_said_to_appear_as_undone(overlay: Path) -> None:
    git(overlay, "checkout", "--quiet", "-b", "feature")
    git(overlay, "checkout", "--quiet", "main")
    edit(overlay / "adapters" / A / "pipeline.yaml", "r: 16", "r: 32")
    commit(overlay)
    git(overlay, "checkout", "--quiet", "feature")
    (note,) = command.make(overlay, "main").notes
    assert re.match(r"main \(\w{7}\) has a commit that HEAD does not have; what they changed appears as undone", note)


def test_a_revision_that_does_not_exist_is_an_error_that_says_what_to_name(overlay: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--since nowhere: .* has no such commit. Name a commit, a tag or a branch"):
        planned(overlay, "nowhere")
    commit(overlay)
    git(tmp_path, "clone", "--quiet", "--depth=1", f"file://{overlay.parents[1]}", str(tmp_path / "shallow"))
    with pytest.raises(UserError, match="This clone is shallow: fetch more of the history"):
        planned(tmp_path / "shallow" / "overlays" / "kind", "HEAD^1")


def test_without_git_everything_is_new(overlay: Path) -> None:
    shutil.rmtree(overlay.parents[1] / ".git")
    report = command.make(overlay)
    assert report.notes == [f"nothing to compare with: {overlay}: not a git repository (or any of the parent "
                            "directories): .git"]
    assert {part.status for part in report.changes.adapters.values()} == {"added"}
    assert report.changes.server == "starts"
    with pytest.raises(UserError, match="--since HEAD: .* not a git repository"):
        planned(overlay, "HEAD")
    git(overlay, "init", "--quiet")
    assert "has no commit yet" in command.make(overlay).notes[0]


def test_an_overlay_that_is_not_in_the_revision_is_new(overlay: Path) -> None:
    other = shutil.copytree(overlay, overlay.with_name("other"))
    report = command.make(other)
    assert f"everything is new: {other} is not in HEAD" in " ".join(report.notes)
    assert {part.status for part in report.changes.adapters.values()} == {"added"}
    assert all(run.new for run in report.changes.runs)


def test_an_overlay_of_one_file_is_compared_by_its_settings(overlay: Path) -> None:
    """Moving an overlay to two files must not look as if everything were trained again."""
    adapter = overlay / "adapters" / A
    remove_adapter(overlay, B)
    keep = {file: file.read_text() for file in (adapter / "pipeline.yaml", overlay / "environment.yaml")}
    (overlay / "pipeline.yaml").write_text("".join(keep.values()))
    for file in keep:
        file.unlink()
    (overlay / "kustomization.yaml").rename(overlay / "kept")
    commit(overlay)
    (overlay / "kept").rename(overlay / "kustomization.yaml")
    (overlay / "pipeline.yaml").unlink()
    for file, text in keep.items():
        file.write_text(text)
    report = command.make(overlay)
    assert {part.status for part in [report.changes.environment, *report.changes.adapters.values()]} == {"unchanged"}
    assert "all Jobs are taken as new: HEAD:overlays/kind: has no kustomization.yaml" in " ".join(report.notes)
    assert changes_report.summary(report.changes).endswith("; whether serving restarts is not known")


def test_what_cannot_be_read_of_the_old_side_is_taken_as_new_and_said(overlay: Path) -> None:
    file = overlay / "adapters" / A / "pipeline.yaml"
    good = file.read_text()
    file.write_text(good.replace("r: 16", "r: 0"))
    commit(overlay)
    file.write_text(good)
    report = command.make(overlay)
    assert {name: part.status for name, part in report.changes.adapters.items()} == {A: "added", B: "unchanged"}
    assert any(note.startswith("an adapter is taken as new: HEAD:overlays/kind/adapters/seville-hotels/pipeline.yaml:")
               for note in report.notes)
    shared = overlay / "environment.yaml"
    good = shared.read_text()
    shared.write_text(good.replace("serving:", "surfing:"))
    commit(overlay)
    shared.write_text(good)
    report = command.make(overlay)
    assert {part.status for part in report.changes.adapters.values()} == {"added"}
    assert any(note.startswith("everything is taken as new: HEAD:overlays/kind/environment.yaml:")
               for note in report.notes)


def test_nothing_of_the_repository_is_touched(overlay: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a git hook, whose environment points at other files, and with all that an index can be."""
    top = overlay.parents[1]
    (top / ".gitattributes").write_text("environment.yaml export-ignore\n")
    commit(overlay)
    git(overlay, "config", "core.splitIndex", "true")
    edit(overlay / "adapters" / A / "pipeline.yaml", "r: 16", "r: 32")
    git(overlay, "add", "--all")
    edit(overlay / "adapters" / A / "pipeline.yaml", "r: 32", "r: 8")

    def state() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in sorted(top.rglob("*")) if path.is_file()}

    before = state()
    monkeypatch.setenv("GIT_DIR", ".git")
    monkeypatch.setenv("GIT_INDEX_FILE", "/nowhere/index")
    assert new(planned(overlay).adapters[A])["adapter"] == ("training.lora.r: 16 -> 8",)
    assert state() == before


# --- the command ------------------------------------------------------------------------------------------------------


def test_invalid_files_are_exit_code_2_with_a_line_for_each(overlay: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (A, B):
        edit(overlay / "adapters" / name / "pipeline.yaml", "r: 16", "r: 0")
    assert cli.main(["plan", str(overlay)]) == 2
    assert [line.count("training.lora.r") for line in capsys.readouterr().err.splitlines()] == [1, 1]


@pytest.mark.parametrize("form", [[], ["--markdown"], ["--json"]], ids=["table", "markdown", "json"])
def test_an_invalid_file_of_one_adapter_does_not_hide_what_happens_to_the_others(
        overlay: Path, capsys: pytest.CaptureFixture[str], form: list[str]) -> None:
    edit(overlay / "adapters" / A / "pipeline.yaml", "r: 16", "r: 0")
    edit(overlay / "adapters" / B / "pipeline.yaml", "r: 16", "r: 32")
    assert cli.main(["plan", str(overlay), *form]) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert f"adapters/{A}/pipeline.yaml" in line and "training.lora.r" in line
    assert "training.lora.r: 16 -> 32" in printed.out
    assert "1 adapter trained again; 4 Jobs run, 2 for nothing new; serving does not restart" in printed.out
    notes = " ".join(printed.out.split())
    assert "left out: " in notes and "removed" not in notes.replace("removed_jobs", "")
    if form == ["--json"]:
        content = json.loads(printed.out)
        assert content["adapters"].keys() == {B}
        assert {stage["adapter"] for job in content["jobs"] for stage in job["stages"]} == {None, B}


def test_it_needs_no_more_packages_than_the_page_installs(overlay: Path) -> None:
    """A CI job need not install torch."""
    page = (CHECKOUT / "docs" / "plan.md").read_text()
    allowed = {name.lower().replace("-", "_") for match in re.findall(r"\^\(([\w|-]+)\)==", page)
               for name in match.split("|")} - {"pyyaml"} | {"yaml", "_yaml", "_distutils_hack"}
    program = ("import sys; from jobs.__main__ import main; main(['plan', sys.argv[1]]); "
               "print(*{name.partition('.')[0] "
               "for name, m in sys.modules.items() if 'site-packages' in (getattr(m, '__file__', None) or '')}, "
               "file=sys.stderr)")
    done = subprocess.run([sys.executable, "-c", program, str(overlay)], cwd=CHECKOUT, capture_output=True, text=True,
                          check=True)
    assert {"yaml", "pydantic"} <= set(done.stderr.splitlines()[-1].split()) <= allowed


@pytest.mark.parametrize("before", ["r: 16", "# Every rule"])
def test_the_exit_code_is_0_whether_or_not_anything_changes(
        overlay: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], before: str) -> None:
    edit(overlay / "adapters" / A / "pipeline.yaml", before, before.replace("16", "32"))
    monkeypatch.chdir(overlay.parents[1])
    assert cli.main(["plan", "overlays/kind"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1].endswith("serving does not restart")
    assert max(map(len, out)) <= 100


def test_json_has_the_keys_that_are_documented(overlay: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(overlay / "adapters" / A / "pipeline.yaml", "r: 16", "r: 32")
    remove_adapter(overlay, B)
    assert cli.main(["plan", str(overlay), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    documented = set(re.findall(r"`(\w+)`", (CHECKOUT / "docs" / "plan.md").read_text().partition("## JSON")[2]))

    def keys(value: Any) -> set[str]:
        if isinstance(value, list):
            return set().union(*map(keys, value))
        return set(value) | set().union(*map(keys, value.values())) if isinstance(value, dict) else set()

    names = {A, B, *(spec.replace("_", "-") for made in changes.STAGES.values() for spec in made)}
    assert keys(content) - names <= documented
    assert content["adapters"][A]["artifacts"]["adapter"]["reasons"] == ["training.lora.r: 16 -> 32"]
    assert content["adapters"][B] == {"status": "removed", "settings": [], "artifacts": {}, "work": "removed",
                                      "service": "removed", "promoted": None}
    assert content["since"] == {"revision": "HEAD", "commit": git(overlay, "rev-parse", "HEAD").strip()}


def test_markdown_shows_values_as_they_are(overlay: Path) -> None:
    edit(overlay / "adapters" / A / "pipeline.yaml", "target_modules: all-linear",
         "target_modules: ['a|b', '`@team`', '<img src=x>']")
    text = changes_report.markdown(command.make(overlay))
    assert "`training.lora.target_modules: all-linear -> [a\\|b, '@team', <img src=x>]`" in text
    assert text.splitlines()[2].startswith("**1 adapter trained again, 1 unchanged; ")
    for row in (line for line in text.splitlines() if line.startswith("| train")):
        assert len(re.findall(r"(?<!\\)\|", row)) == 7


def test_fifty_adapters_are_planned_with_one_rendering_of_each_side(
        overlay: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rendering is what takes seconds."""
    for number in range(48):
        add_adapter(overlay, f"team-{number:02}")
    commit(overlay)
    edit(overlay / "environment.yaml", "max_lora_rank: 64", "max_lora_rank: 128")
    edit(overlay / "adapters" / B / "pipeline.yaml", "r: 16", "r: 32")
    rendered, run = [], vars(pods)["subprocess"].run

    def counted(arguments: list[str], **options: Any) -> Any:
        rendered.append(arguments[-1])
        return run(arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pods, "subprocess", SimpleNamespace(**{**vars(subprocess), "run": counted}))
        report = command.make(overlay)
    assert len(rendered) == 2
    assert len(new(report.changes.adapters[B])) == 3
    assert len(running(report.changes)) == 3 + 50 * 4
    assert len(changes_report.table(report).splitlines()) < 120
    edit(overlay / "environment.yaml", "source: builtin:tiny-reference", "source: builtin:tiny")
    assert len(changes_report.markdown(command.make(overlay))) < 65536, "GitHub refuses a longer comment"


def test_the_yaml_of_a_new_key_needs_no_code() -> None:
    """Reasons come from comparing plans: this holds for every key that a digest follows, now and later."""
    pipeline = build_pipeline.build()
    settings = pipeline.training.model_dump()
    others = {"epochs": 2, "learning_rate": 0.01, "max_length": 99, "tokens_per_batch": 2048, "seed": 7}
    for key, value in others.items():
        assert settings[key] != value
        found = new(alone(**{f"training__{key}": value}).adapters[A])
        reason = (f"training.{key}: {values.shown(settings[key])} -> {value}",)
        # What a key changes itself has it as its reason, and what follows from that has the new input.
        first = "encoded-dataset" if key == "max_length" else "adapter"
        assert found[first] == reason
        assert first == "adapter" or found["adapter"] == (f"new input: {first}",)
