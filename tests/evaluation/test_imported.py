"""An imported adapter is evaluated here as a trained one is, on the data here; the gate here promotes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from jobs.__main__ import main
from jobs.core import imported, promotion
from jobs.core.artifacts import Spec
from jobs.core.imported import Imported
from jobs.core.plan import deciding_evaluation, plan
from jobs.evaluation import content, evaluate
from tests import build_published
from tests.build_models import FAILING, published_pipeline

NAME = "guests"  # not the name in the environment that trained it


def test_it_is_measured_on_the_data_here_and_gets_its_name_by_the_gate_here(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    trained, volumes = published_pipeline(tmp_path, max_length=1024, tokens_per_batch=4096)
    wanted, file = plan(trained.pipeline), tmp_path / "pipeline.yaml"
    values = yaml.safe_load(file.read_text())
    del values["training"]
    values |= {"adapter": NAME, "source": "oci://registry.example.com/x", "sha256": "0" * 64}
    file.write_text(yaml.safe_dump(values))
    command = ["--pipeline", str(file), "--volumes", str(volumes), "--wait-seconds", "0", "evaluate"]
    assert main(command) == 1
    assert "waited 0 s for imported-adapter/" in capsys.readouterr().err

    loaded = imported.load(file)
    arrived = Imported(wanted.adapter, Spec("fine-tuned-model", "evaluation", {"adapter": "hotels"}))
    build_published.record(volumes, loaded.pipeline, arrived)
    assert main(command) == 0
    decides = deciding_evaluation(loaded.pipeline, arrived)
    current = promotion.current(volumes / "fine-tuned-model", NAME)
    assert current and (current.adapter, current.evaluation) == (wanted.adapter.digest, decides.digest)
    # The scores are those that a trained adapter of this digest has on this data.
    assert wanted.adapter_scores.path(volumes).exists()
    evaluation = content.read_evaluation(decides.path(volumes))
    assert evaluation["sources"]["source"] == {"source": "oci://registry.example.com/x", "pin": "0" * 64}
    assert "training" not in evaluation  # nothing here knows how it was trained
    assert "in another environment" in (decides.path(volumes) / "report.md").read_text()

    def measured(*_: object, **__: object) -> None:
        raise AssertionError("it is measured already")

    from jobs.evaluation import scoring

    monkeypatch.setattr(scoring, "measure", measured)
    values["evaluation"]["gate"] = dict(FAILING)
    file.write_text(yaml.safe_dump(values))
    evaluate.run(imported.load(file), volumes, 0)
    assert promotion.current(volumes / "fine-tuned-model", NAME) == current
    rejected = deciding_evaluation(imported.load(file).pipeline, arrived)
    assert json.loads((rejected.path(volumes) / "evaluation.json").read_text())["passed"] is False
