"""The evaluation job measures each model once, promotes only what passed, and loses at most one model to a kill."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs.__main__ import main
from jobs.core import artifacts, models, promotion, proof
from jobs.core.errors import RetryableError, UserError
from jobs.core.metrics import SCORES
from jobs.core.plan import plan
from jobs.core.published import WITHOUT_ANSWERS
from jobs.data import encoding
from jobs.evaluation import evaluate, scoring
from tests.build_models import FAILING, HELD_OUT, PASSING, published_pipeline, tiny_gpt2, tiny_tokenizer

VOLUME = "fine-tuned-model"


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: Any) -> Path:
    """A pipeline whose evaluation passed; tests copy it."""
    folder: Path = tmp_path_factory.mktemp("pipeline")
    evaluate.run(*published_pipeline(folder), 0)
    return folder


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the models that get measured from here on."""
    names: list[str] = []
    real = scoring.measure

    def watch(model: Any, tokenizer: Any, material: Any, name: str) -> Any:
        names.append(name)
        return real(model, tokenizer, material, name)

    monkeypatch.setattr(scoring, "measure", watch)
    return names


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def promoted(volumes: Path) -> str | None:
    current = promotion.current(volumes / VOLUME, "hotels")
    return current.adapter if current else None


def test_three_models_are_measured_with_two_loads_and_the_adapter_is_promoted(
        tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[Path] = []
    real = models.load_model

    def watch(path: Path) -> Any:
        loads.append(path)
        return real(path)

    monkeypatch.setattr(models, "load_model", watch)
    loaded, volumes = published_pipeline(tmp_path)
    evaluate.run(loaded, volumes, 0)
    wanted = plan(loaded.pipeline)
    assert measured == ["file:base", f"hotels@{wanted.adapter.digest}", "file:reference"]
    assert loads == [wanted.base_model.path(volumes), wanted.reference_model.path(volumes)]
    assert promoted(volumes) == wanted.adapter.digest


def test_the_base_is_measured_as_it_is_without_the_adapter(folder: Path) -> None:
    """One load for two models must not let the adapter leak into the base's scores."""
    loaded, volumes = published_pipeline(folder)
    wanted = plan(loaded.pipeline)
    material = scoring.Material.read(wanted.dataset.path(volumes), wanted.acceptability.path(volumes), max_length=128,
                                     max_new_tokens=12)
    alone = scoring.measure(models.load_model(wanted.base_model.path(volumes)),
                                     models.load_tokenizer(wanted.tokenizer.path(volumes)), material, "file:base")
    base, tuned = (spec.path(volumes) for spec in (wanted.base_scores, wanted.adapter_scores))
    assert {key: read(base / "scores.json")[key] for key in SCORES} == pytest.approx(
        {key: alone.summary[key] for key in SCORES}, rel=1e-6)
    assert scoring.read_jsonl(base / "generations.jsonl") == alone.generations
    assert read(tuned / "scores.json")["perplexity"] != pytest.approx(alone.summary["perplexity"], rel=1e-3)


def test_the_evaluation_says_what_was_measured_on_what_and_why_it_passed(folder: Path) -> None:
    loaded, volumes = published_pipeline(folder)
    wanted = plan(loaded.pipeline)
    artifact = artifacts.read(wanted.evaluation.path(volumes))
    assert {f["path"] for f in artifact.manifest["files"]} == {
        "evaluation.json", "clusters.jsonl", "proof.json", "report.md", "report.html", "without-answers/report.md",
        "without-answers/report.html"}
    evaluation = read(artifact.path / "evaluation.json")
    proven = proof.validate(read(artifact.path / "proof.json"))
    assert len(proven.prompts) == len(proven.answers) == len(proven.base_answers or []) == proof.PROMPTS
    assert (artifact.path / "proof.json").read_bytes() == (
        wanted.adapter_scores.path(volumes) / "proof.json").read_bytes()
    assert evaluation["passed"] is True and evaluation["embedded"] is False
    assert evaluation["adapter"] == {"name": "hotels", "digest": wanted.adapter.digest}
    assert evaluation["base_model"] == {"name": "file:base", "digest": wanted.base_model.digest}
    assert evaluation["reference_model"] == {"name": "file:reference", "digest": wanted.reference_model.digest}
    assert evaluation["dataset"] == {"digest": wanted.dataset.digest, "holdout_records": len(HELD_OUT)}
    scores = evaluation["scores"]
    (rule,) = evaluation["gate"]
    assert rule["value"] == pytest.approx(scores["fine_tuned"]["perplexity"] / scores["base"]["perplexity"])
    assert rule["low"] < rule["value"] < rule["high"]
    assert (rule["metric"], rule["bound"], rule["limit"], rule["outcome"]) == (
        "perplexity", "max_ratio", 1000.0, "passed")
    for role, spec in (("base", wanted.base_scores), ("fine_tuned", wanted.adapter_scores),
                       ("reference", wanted.reference_scores)):
        assert scores[role] == read(spec.path(volumes) / "scores.json")


def test_a_report_without_answers_is_made_from_the_same_scores(folder: Path, measured: list[str]) -> None:
    public, volumes = published_pipeline(folder)
    settings = public.pipeline.evaluation.model_copy(update={"report_answers": False})
    private = dataclasses.replace(public, pipeline=public.pipeline.model_copy(update={"evaluation": settings}))
    evaluate.run(private, volumes, 0)
    assert measured == []
    shown, hidden = (plan(loaded.pipeline).evaluation.path(volumes) for loaded in (public, private))
    for name in ("report.html", "report.md"):
        assert "Which key opens room" in (shown / name).read_text()
        assert "room" not in (hidden / name).read_text() and "unchanged" in (hidden / name).read_text()
        assert "room" not in (shown / WITHOUT_ANSWERS / name).read_text(), "the copy that may be published"
    assert not (hidden / WITHOUT_ANSWERS).exists(), "the report itself may be published"


def test_running_again_changes_nothing_and_answers_without_torch(folder: Path) -> None:
    """An already-done stage answers within two seconds, because it imports none of what takes longer."""
    loaded, volumes = published_pipeline(folder)
    before = {path: path.read_bytes() for path in volumes.rglob("*") if path.is_file()}
    code = ("import sys; from pathlib import Path; from jobs.__main__ import main; "
            "code = main(sys.argv[1:]); slow = {'torch', 'transformers', 'numpy', 'pyarrow', 'nltk', 'datasets'}; "
            "assert not slow & set(sys.modules), slow & set(sys.modules); sys.exit(code)")
    done = subprocess.run([sys.executable, "-c", code, "--pipeline", str(loaded.path), "--volumes", str(volumes),
                           "evaluate"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ALREADY PROMOTED" in done.stderr and "perplexity" in done.stderr
    assert before == {path: path.read_bytes() for path in volumes.rglob("*") if path.is_file()}


def test_a_rejected_adapter_is_a_result_and_nothing_is_promoted(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaded, volumes = published_pipeline(tmp_path, gate=FAILING)
    with caplog.at_level("INFO", "jobs"):
        evaluate.run(loaded, volumes, 0)
    evaluation = read(plan(loaded.pipeline).evaluation.path(volumes) / "evaluation.json")
    assert [check["outcome"] for check in evaluation["gate"]] == ["failed", "passed"] and evaluation["passed"] is False
    assert promoted(volumes) is None
    (loud,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "REJECTED" in loud and "✗ perplexity: fine-tuned / base must be at most 1e-06" in loud
    assert "acceptability_accuracy" not in loud, "only the rules that failed"
    assert "Nothing is promoted as hotels yet" in loud


def test_the_pod_ends_with_the_verdict_as_its_termination_message(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rejection is no failure, so the Job completes: `kubectl describe pod` still shows what happened and why."""
    log = tmp_path / "termination-log"
    log.touch()
    monkeypatch.setattr("jobs.core.termination.TERMINATION_LOG", log)
    loaded, volumes = published_pipeline(tmp_path / "rejected", gate=FAILING)
    assert main(["--pipeline", str(loaded.path), "--volumes", str(volumes), "evaluate"]) == 0
    wanted = plan(loaded.pipeline)
    rule = read(wanted.evaluation.path(volumes) / "evaluation.json")["gate"][0]
    assert log.read_text().splitlines() == [
        f"REJECTED: hotels@{wanted.adapter.digest} did not pass the gate and is not promoted:",
        "  ✗ perplexity: fine-tuned / base must be at most 1e-06",
        f"      {rule['value']:.3g}, at least {rule['low']:.3g} with 95 % confidence",
        "Nothing is promoted as hotels yet, so it is not served.",
        "Train otherwise, bring other data, or change evaluation.gate in the pipeline file.",
        f"report: {wanted.evaluation.path(volumes)}/report.html"]
    loaded, _ = published_pipeline(tmp_path / "rejected", gate=PASSING)
    assert main(["--pipeline", str(loaded.path), "--volumes", str(volumes), "evaluate"]) == 0
    assert log.read_text().startswith(f"PROMOTED: hotels@{wanted.adapter.digest} passed the gate")


def test_an_evaluation_of_an_older_version_can_still_be_read(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its rules have the sentence under another key; the verdict needs the numbers only."""
    loaded, volumes = published_pipeline(folder)
    file = plan(loaded.pipeline).evaluation.path(volumes) / "evaluation.json"
    values = read(file)
    for rule in values["gate"]:
        rule["says"] = rule.pop("description")
    artifact = artifacts.read(file.parent)
    file.write_text(json.dumps(values))
    with caplog.at_level("INFO", "jobs"):
        evaluate.announce(loaded.pipeline, plan(loaded.pipeline), volumes, artifact, False)
    assert "✓ perplexity: fine-tuned / base must be at most" in caplog.text


def test_a_rejection_leaves_the_adapter_before_it_promoted_and_names_it(
        folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, volumes = published_pipeline(folder)
    before = promoted(volumes)
    loaded, _ = published_pipeline(folder, seed=1, gate=FAILING)
    evaluate.run(loaded, volumes, 0)
    assert before == promoted(volumes) != plan(loaded.pipeline).adapter.digest
    assert f"hotels@{before} stays promoted" in caplog.text


def test_a_new_adapter_has_only_itself_measured(folder: Path, measured: list[str]) -> None:
    loaded, volumes = published_pipeline(folder, seed=1)
    evaluate.run(loaded, volumes, 0)
    digest = plan(loaded.pipeline).adapter.digest
    assert measured == [f"hotels@{digest}"] and promoted(volumes) == digest


def test_a_changed_gate_measures_nothing_and_needs_no_model(folder: Path, measured: list[str]) -> None:
    """Only the verdict is made again, even when the models are no longer on their volumes."""
    published_pipeline(folder)
    for volume in ("base-model", "base-tokenizer", "reference-model"):
        shutil.rmtree(folder / "volumes" / volume)
    loaded, volumes = published_pipeline(folder, gate={"perplexity": {"max": 1e9}},
                                         without=("base_model", "tokenizer", "reference_model"))
    evaluate.run(loaded, volumes, 0)
    assert measured == [] and plan(loaded.pipeline).evaluation.path(volumes).is_dir()


def test_reverting_the_pipeline_file_promotes_the_old_adapter_without_measuring(
        folder: Path, measured: list[str]) -> None:
    first, volumes = published_pipeline(folder)
    evaluate.run(*published_pipeline(folder, seed=1), 0)
    assert promoted(volumes) != plan(first.pipeline).adapter.digest
    measured.clear()
    evaluate.run(first, volumes, 0)
    assert promoted(volumes) == plan(first.pipeline).adapter.digest and measured == []


def test_a_run_with_other_values_than_the_files_measures_and_promotes_nothing_until_they_are_committed(
        folder: Path, measured: list[str], caplog: pytest.LogCaptureFixture) -> None:
    edited, volumes = published_pipeline(folder, seed=1)
    first, _ = published_pipeline(folder)
    evaluate.run(first, volumes, 0)
    measured.clear()
    with caplog.at_level("INFO", "jobs"):
        assert main(["--pipeline", str(first.path), "--volumes", str(volumes), "evaluate",
                     "--set", "training.seed=1"]) == 0
    wanted = plan(edited.pipeline)
    assert measured == [f"hotels@{wanted.adapter.digest}"]
    assert read(wanted.evaluation.path(volumes) / "evaluation.json")["passed"] is True
    assert promoted(volumes) == plan(first.pipeline).adapter.digest
    assert "PASSED, NOT PROMOTED" in caplog.text and "┃   training:\n┃     seed: 1\n" in caplog.text

    evaluate.run(edited, volumes, 0)
    assert promoted(volumes) == wanted.adapter.digest and len(measured) == 1, "what was measured is not measured again"


def test_an_evaluation_whose_adapter_is_gone_does_not_promote_it(folder: Path) -> None:
    """Retention may have removed it: promoting a name with nothing behind it would break serving."""
    loaded, volumes = published_pipeline(folder)
    shutil.rmtree(plan(loaded.pipeline).adapter.path(volumes))
    (volumes / VOLUME / "promoted" / "hotels").unlink()
    with pytest.raises(RetryableError, match="adapter/"):
        evaluate.run(loaded, volumes, 0)
    assert promoted(volumes) is None


def test_a_kill_between_two_models_costs_only_the_second(
        tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, volumes = published_pipeline(tmp_path)
    watch = scoring.measure

    def killed(model: Any, tokenizer: Any, material: Any, name: str) -> Any:
        if name.startswith("hotels@"):
            raise KeyboardInterrupt
        return watch(model, tokenizer, material, name)

    with monkeypatch.context() as patch:
        patch.setattr(scoring, "measure", killed)
        with pytest.raises(KeyboardInterrupt):
            evaluate.run(loaded, volumes, 0)
    assert measured == ["file:base"] and promoted(volumes) is None
    evaluate.run(loaded, volumes, 0)
    assert measured.count("file:base") == 1 and len(measured) == 3 and promoted(volumes)


def test_keeping_one_artifact_of_a_kind_keeps_the_scores_of_all_three_models(tmp_path: Path) -> None:
    loaded, volumes = published_pipeline(tmp_path, keep=1)
    evaluate.run(loaded, volumes, 0)
    assert promoted(volumes) == plan(loaded.pipeline).adapter.digest


def test_a_verdict_names_its_sources_without_what_is_secret_in_a_url(tmp_path: Path) -> None:
    """It is published and exported; the file in git, where the URL stands, is not."""
    loaded, volumes = published_pipeline(tmp_path)
    dataset = loaded.pipeline.dataset
    signed = dataset.model_copy(update={"source": "https://me:PASSWORD@host/data.jsonl?signature=SECRET"})
    loaded = dataclasses.replace(loaded, pipeline=loaded.pipeline.model_copy(update={"dataset": signed}))
    evaluate.run(loaded, volumes, 0)
    folder = plan(loaded.pipeline).evaluation.path(volumes)
    assert read(folder / "evaluation.json")["sources"]["dataset"] == {"source": "https://host/data.jsonl",
                                                                      "pin": dataset.sha256}
    assert not [file for file in folder.rglob("*") if file.is_file()
                and any(secret in file.read_bytes() for secret in (b"PASSWORD", b"SECRET"))]


def test_gpt2_is_measured_against_a_larger_one_with_no_chat_template(tmp_path: Path) -> None:
    def larger(folder: Path) -> None:
        tiny_tokenizer(folder, chat=False)
        tiny_gpt2(folder, seed=1, heads=3)

    records = [*HELD_OUT, {"text": "The cook reads the book."}]
    loaded, volumes = published_pipeline(tmp_path, records=records, base_model=tiny_gpt2, reference_model=larger,
                                         chat=False, mode="merged")
    evaluate.run(loaded, volumes, 0)
    wanted = plan(loaded.pipeline)
    base, tuned, reference = (read(spec.path(volumes) / "scores.json") for spec in
                              (wanted.base_scores, wanted.adapter_scores, wanted.reference_scores))
    assert {scores["records"] for scores in (base, tuned, reference)} == {25}
    assert {scores["questions"] for scores in (base, tuned, reference)} == {24}, "a text asks nothing"
    assert len({scores["perplexity"] for scores in (base, tuned, reference)}) == 3
    assert promoted(volumes) == wanted.adapter.digest


def test_in_mode_merged_an_adapter_is_promoted_once_its_merged_model_is_there(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"base_model": tiny_gpt2, "mode": "merged"}
    loaded, volumes = published_pipeline(tmp_path, without=("merged_model",), **settings)
    with pytest.raises(RetryableError, match=str(plan(loaded.pipeline).merged_model)):
        evaluate.run(loaded, volumes, 0)
    assert promoted(volumes) is None
    evaluate.run(*published_pipeline(tmp_path, **settings), 0)
    assert promoted(volumes) == plan(loaded.pipeline).adapter.digest


def test_an_adapter_of_nan_weights_is_rejected(tmp_path: Path) -> None:
    """vLLM would load it and answer nonsense."""
    from safetensors.torch import load_file, save_file

    loaded, volumes = published_pipeline(tmp_path, without=("adapter",))
    donor, _ = published_pipeline(tmp_path, seed=1)
    source = plan(donor.pipeline).adapter.path(volumes)

    def damaged(draft: Path) -> None:
        shutil.copytree(source, draft, dirs_exist_ok=True)
        (draft / artifacts.MANIFEST).unlink()
        file = draft / "adapter_model.safetensors"
        save_file({name: tensor * float("nan") for name, tensor in load_file(file).items()}, file)

    artifacts.publish(plan(loaded.pipeline).adapter, volumes, damaged, keep=5)
    evaluate.run(loaded, volumes, 0)
    evaluation = read(plan(loaded.pipeline).evaluation.path(volumes) / "evaluation.json")
    assert evaluation["passed"] is False and evaluation["gate"][0]["value"] is None and promoted(volumes) is None


def test_a_rouge_rule_on_plain_text_fails_before_waiting_for_the_adapter(tmp_path: Path) -> None:
    loaded, volumes = published_pipeline(
        tmp_path, records=[{"text": "The cook reads."}] * 30, gate={"rougeL": {"min": 0.5}},
        without=("base_model", "tokenizer", "encoded_dataset", "reference_model", "adapter"))
    with pytest.raises(UserError, match=r"evaluation\.gate\.rougeL: cannot be measured"):
        evaluate.run(loaded, volumes, 0)


def test_only_the_reference_model_encodes_the_holdout_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others read what the encoding job made for training, where the template was checked on every record."""
    loaded, volumes = published_pipeline(tmp_path)
    tokenizers = []

    def encode(tokenizer: Any, *arguments: Any) -> Any:
        tokenizers.append(tokenizer.name_or_path)
        return encoding.encode(tokenizer, *arguments)

    monkeypatch.setattr(scoring, "encode", encode)
    evaluate.run(loaded, volumes, 0)
    assert set(tokenizers) == {str(plan(loaded.pipeline).reference_model.path(volumes))}


def test_plain_text_is_evaluated_by_perplexity(tmp_path: Path) -> None:
    loaded, volumes = published_pipeline(tmp_path, records=[{"text": f"The cook reads {n} books."} for n in range(30)])
    evaluate.run(loaded, volumes, 0)
    assert "plain text without questions" in (plan(loaded.pipeline).evaluation.path(volumes) / "report.md").read_text()
    assert promoted(volumes)


def test_a_missing_adapter_is_waited_for_and_named(tmp_path: Path) -> None:
    loaded, volumes = published_pipeline(tmp_path, without=("adapter", "reference_model"))
    wanted = plan(loaded.pipeline)
    with pytest.raises(RetryableError, match=f"{wanted.adapter}, {wanted.reference_model}"):
        evaluate.run(loaded, volumes, 0)


def test_tensorboard_has_each_score_of_each_model_once_even_after_running_twice(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    evaluate.run(*published_pipeline(folder, gate={"perplexity": {"max": 1e9}}), 0)
    loaded, volumes = published_pipeline(folder)
    wanted = plan(loaded.pipeline)
    runs = volumes / VOLUME / "tensorboard" / "hotels" / wanted.adapter.digest / "evaluation"
    for role, spec in (("base", wanted.base_scores), ("fine-tuned", wanted.adapter_scores),
                       ("reference", wanted.reference_scores)):
        events = EventAccumulator(str(runs / role))
        events.Reload()
        scores = read(spec.path(volumes) / "scores.json")
        assert set(events.Tags()["scalars"]) == {f"evaluation/{key}" for key in SCORES}
        (point,) = events.Scalars("evaluation/perplexity")
        assert (point.step, point.value) == (2, pytest.approx(scores["perplexity"], rel=1e-6))


def test_every_report_on_an_embedded_model_says_so(tmp_path: Path) -> None:
    loaded, volumes = published_pipeline(tmp_path, base="builtin:tiny")
    evaluate.run(loaded, volumes, 0)
    result = plan(loaded.pipeline).evaluation.path(volumes)
    assert read(result / "evaluation.json")["embedded"] is True
    for name in ("report.md", "report.html"):
        assert "for trying out and testing only" in (result / name).read_text()


@pytest.mark.slow
def test_the_job_runs_with_no_network_and_no_writable_home(tmp_path: Path) -> None:
    loaded, volumes = published_pipeline(tmp_path, gate=PASSING)
    code = """
import socket, sys
def refuse(*_): raise AssertionError("the network was used")
socket.socket.connect = socket.getaddrinfo = refuse
from jobs.__main__ import main
code = main(sys.argv[1:])
assert not {"evaluate", "datasets"} & set(sys.modules), "they take seconds, and compute nothing here"
sys.exit(code)
"""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_"))} | {"HOME": "/dev/null"}
    done = subprocess.run([sys.executable, "-c", code, "--pipeline", str(loaded.path), "--volumes", str(volumes),
                           "evaluate"], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert promoted(volumes) == plan(loaded.pipeline).adapter.digest
