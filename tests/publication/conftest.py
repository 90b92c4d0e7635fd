"""What the tests of publication share: a small adapter that passed its evaluation and is promoted, and a registry."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jobs.core import artifacts, promotion
from jobs.core.artifacts import Artifact
from jobs.core.pipeline import LoadedPipeline, load
from jobs.core.plan import FINE_TUNED_VOLUME, plan
from tests import build_pipeline, registry_server

TEXT = "Room 7 opens with the brass key."  # private


@dataclass
class Made:
    """An adapter with its evaluation on the volumes."""

    loaded: LoadedPipeline
    volumes: Path
    adapter: Artifact
    evaluation: Artifact


def make(folder: Path, *, passed: bool = True, promoted: bool = True, **changes: Any) -> Made:
    """Publish an adapter and its evaluation on the volumes `folder/volumes`: files of the right names, no weights."""
    folder.mkdir(exist_ok=True)
    file = build_pipeline.write(folder, **{"base_model": {"source": "builtin:tiny"}, **changes})
    loaded, volumes = load(file), folder / "volumes"
    wanted = plan(loaded.pipeline)

    def write_adapter(draft: Path) -> None:
        (draft / "adapter_config.json").write_text(json.dumps({
            "base_model_name_or_path": "builtin:tiny", "peft_type": "LORA", "r": 8, "lora_alpha": 32}))
        (draft / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 40)
        (draft / "training.json").write_text(json.dumps({"steps": 3, "history": []}))
        (draft / "README.md").write_text("---\nlibrary_name: peft\n---\n# seville-hotels\n")

    def write_evaluation(draft: Path) -> dict[str, Any]:
        (draft / "evaluation.json").write_text(json.dumps({
            "passed": passed, "outcome": "passed" if passed else "failed",
            "adapter": {"name": loaded.pipeline.adapter, "digest": wanted.adapter.digest}, "gate": [], "scores": {}}))
        for name in ("clusters.jsonl", "proof.json", "report.md", "report.html"):
            (draft / name).write_text(TEXT)
        (draft / "without-answers").mkdir()
        for name in ("report.md", "report.html"):
            (draft / "without-answers" / name).write_text("scores only")
        return {"passed": passed}

    name = loaded.pipeline.adapter
    adapter = artifacts.publish(wanted.adapter, volumes, write_adapter, keep=9, adapter_name=name)
    evaluation = artifacts.publish(wanted.evaluation, volumes, write_evaluation, keep=9, adapter_name=name)
    if passed and promoted:
        promotion.promote(volumes / FINE_TUNED_VOLUME, name, adapter.digest, evaluation.digest)
    return Made(loaded, volumes, adapter, evaluation)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    registry_server.isolate(monkeypatch, tmp_path)


@pytest.fixture
def server() -> Iterator[registry_server.Registry]:
    with registry_server.serve() as server:
        yield server
