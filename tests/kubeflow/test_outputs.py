"""Promises of what the step `evaluation-results` writes, in the form that KubeFlow's launcher reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.core import artifacts
from jobs.core.plan import plan
from jobs.evaluation import evaluate
from kubeflow import outputs
from tests.build_models import FAILING, published_pipeline

ARTIFACTS = ("report", "adapter", "base_scores", "fine_tuned_scores", "reference_scores")


def executor_input(folder: Path) -> str:
    """The places that kfp names: of artifacts their URIs, of parameters and metadata files."""
    return json.dumps({"inputs": {}, "outputs": {
        "outputFile": str(folder / "kfp_outputs" / "output_metadata.json"),
        "parameters": {name: {"outputFile": str(folder / "kfp" / "outputs" / name)} for name in ("verdict", "summary")},
        "artifacts": {name: {"artifacts": [{"name": name, "uri": f"minio://bucket/{name}"}]} for name in ARTIFACTS}}})


def test_a_rejected_adapter_is_shown_with_its_scores_and_the_rules_that_do_not_hold(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, volumes = published_pipeline(tmp_path, gate=FAILING)
    evaluate.run(loaded, volumes, 0)
    for name, value in (("PIPELINE", loaded.path), ("ENVIRONMENT_FILE", loaded.environment.path), ("VOLUMES", volumes)):
        monkeypatch.setenv(name, str(value))
    out = tmp_path / "out"
    outputs.main(["--executor-input", executor_input(out), "--report", str(out / "minio" / "report"),
                  "--adapter", str(out / "minio" / "adapter"), "--claim", "fine-tuned-model-pvc",
                  "--set=training.seed=0"])

    wanted = plan(loaded.pipeline)
    assert (out / "kfp" / "outputs" / "verdict").read_text() == "rejected"
    summary = (out / "kfp" / "outputs" / "summary").read_text()
    assert summary.startswith(f"hotels@{wanted.adapter.digest} rejected: 1 of 2 rules of the gate does not hold\n"
                              "  ✗ perplexity: fine-tuned / base must be at most 1e-06\n")
    evaluation = artifacts.read(wanted.evaluation.path(volumes)).path
    assert (out / "minio" / "report").read_bytes() == (evaluation / "report.html").read_bytes()
    assert json.loads((out / "minio" / "adapter").read_text())["digest"] == wanted.adapter.digest

    written = json.loads((out / "kfp_outputs" / "output_metadata.json").read_text(), parse_constant=pytest.fail)
    found: dict[str, Any] = {name: written["artifacts"][name]["artifacts"][0] for name in ARTIFACTS}
    assert {each["uri"] for each in found.values()} == {f"minio://bucket/{name}" for name in ARTIFACTS}
    for name in ARTIFACTS[2:]:
        assert found[name]["metadata"] and {type(value) for value in found[name]["metadata"].values()} <= {int, float}
    assert found["adapter"]["metadata"] == {
        "framework": "PEFT", "name": "hotels", "digest": wanted.adapter.digest,
        "storage": f"pvc://fine-tuned-model-pvc/adapter/{wanted.adapter.digest}",
        "base_model": f"{loaded.pipeline.environment.base_model.name}@{wanted.base_model.digest}",
        "dataset": wanted.dataset.digest, "evaluation": wanted.evaluation.digest, "verdict": "rejected",
        "promoted": "no"}
