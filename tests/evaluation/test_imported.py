"""One environment trains, evaluates and publishes; another one imports the adapter and evaluates it on data of its own,
under a name of its own. The gate there promotes it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.__main__ import main
from jobs.core import artifacts, imported, pipeline, promotion
from jobs.core.artifacts import Artifact
from jobs.core.errors import UserError
from jobs.core.plan import deciding_evaluation, plan, plan_import
from jobs.evaluation import content, evaluate, scoring
from tests import registry_server
from tests.build_models import FAILING, published_pipeline

NAME = "guests"  # in the environment that imports it; "hotels" in the other one
VOLUME = "fine-tuned-model"


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[registry_server.Registry]:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    with registry_server.serve() as server:
        yield server


def edit(file: Path, *removed: str, **values: Any) -> None:
    content = yaml.safe_load(file.read_text()) | values
    file.write_text(yaml.safe_dump({key: value for key, value in content.items() if key not in removed}))


def test_it_is_measured_on_the_data_here_and_gets_its_name_by_the_gate_here(
        tmp_path: Path, registry: registry_server.Registry, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    _, volumes = published_pipeline(there, max_length=1024, tokens_per_batch=4096)
    edit(there / "environment.yaml", publication={"to": f"oci://{registry.host}/team"})
    command = ["--pipeline", str(there / "pipeline.yaml"), "--volumes", str(volumes), "--wait-seconds", "0"]
    assert main([*command, "evaluate"]) == main([*command, "publish"]) == 0
    wanted = plan(pipeline.load(there).pipeline)
    ((_, digest),) = {key for key in registry.manifests if key[1].startswith("sha256:")}

    shutil.copytree(there, here)  # the models and the data, and what was measured of all three models
    volumes = here / "volumes"
    for kind in ("adapter", "evaluation", "promoted"):
        shutil.rmtree(volumes / VOLUME / kind)
    edit(here / "pipeline.yaml", "training", adapter=NAME, source=f"oci://{registry.host}/team/hotels",
         sha256=digest.removeprefix("sha256:"))
    command = ["--pipeline", str(here / "pipeline.yaml"), "--volumes", str(volumes), "--wait-seconds", "0"]
    assert main([*command, "evaluate"]) == 1
    assert "waited 0 s for imported-adapter/" in capsys.readouterr().err
    assert main([*command, "relocate", "adapter"]) == 0
    assert promotion.current(volumes / VOLUME, NAME) is None

    def measured(*_: object, **__: object) -> None:
        raise AssertionError("it was measured already: the scores of an adapter do not depend on its name")

    monkeypatch.setattr(scoring, "measure", measured)
    assert main([*command, "evaluate"]) == 0
    adapter = imported.load(here).pipeline
    arrived = imported.read(plan_import(adapter).imported_adapter.path(volumes), VOLUME)
    assert arrived.adapter.digest == wanted.adapter.digest
    decides = deciding_evaluation(adapter, arrived)
    current = promotion.current(volumes / VOLUME, NAME)
    assert current and (current.adapter, current.evaluation) == (wanted.adapter.digest, decides.digest)
    evaluation = content.read_evaluation(artifacts.read(decides.path(volumes)).path)
    assert evaluation["adapter"] == {"name": NAME, "digest": wanted.adapter.digest}
    assert evaluation["sources"]["source"]["source"] == f"oci://{registry.host}/team/hotels"
    assert "training" not in evaluation  # nothing here knows how it was trained
    assert "in another environment" in (decides.path(volumes) / "report.md").read_text()

    edit(here / "pipeline.yaml", evaluation={"gate": dict(FAILING), "max_new_tokens": 12})
    evaluate.run(imported.load(here), volumes, 0)
    assert promotion.current(volumes / VOLUME, NAME) == current
    rejected = deciding_evaluation(imported.load(here).pipeline, arrived)
    assert json.loads((rejected.path(volumes) / "evaluation.json").read_text())["passed"] is False


def test_a_signed_adapter_is_evaluated_on_other_data_than_it_was_trained_on_and_never_on_changed_inputs() -> None:
    def artifact(kind: str, digest: str, content: str, **more: Any) -> Artifact:
        return Artifact(Path(kind), {"kind": kind, "digest": digest, "inputs": {}, "about": {}, "files": [
            {"path": "x", "size": 1, "sha256": content}], **more})

    base, data = artifact("base-model", "b", "1"), artifact("dataset", "d", "2")
    read = {"base_model": artifacts.content_digest(base.manifest), "dataset": artifacts.content_digest(data.manifest)}
    adapter = artifact("adapter", "a", "3", inputs={"base_model": "b", "dataset": "d"}, about={artifacts.READ: read})
    evaluate.check_unchanged([adapter, base, data])
    evaluate.check_unchanged([adapter, base, artifact("dataset", "of another environment", "4")])
    for changed in (artifact("dataset", "d", "5"), artifact("base-model", "b", "5")):
        with pytest.raises(UserError, match="is not what the adapter was trained on"):
            evaluate.check_unchanged([adapter, changed])
