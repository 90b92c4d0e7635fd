"""Builds published adapters, for tests: what one environment publishes and another one imports.

The adapters are small files in the right places, with neither weights nor torch: whoever only moves them reads no
weights. tests/build_adapter.py builds those that a server can serve.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.core import artifacts, imported, pipeline
from jobs.core.artifacts import Artifact
from jobs.core.imported import Imported, ImportedAdapter, LoadedImport
from jobs.core.pipeline import Pipeline
from jobs.core.plan import plan, plan_import
from jobs.core.signing import Signer
from jobs.publication import layout, push
from jobs.publication.layout import File
from jobs.publication.push import Published
from tests import build_pipeline

NAME = "seville-hotels"
HERE = {"base_model": {"source": "builtin:tiny"}}
Change = Callable[[Path], object]


def trained(folder: Path, **changes: Any) -> Pipeline:
    """The pipeline of an environment that trains, with changes as in build_pipeline."""
    folder.mkdir(parents=True, exist_ok=True)
    return pipeline.load(build_pipeline.write(folder, **{**HERE, **changes})).pipeline


def adapter(volumes: Path, of: Pipeline, change: Change | None = None, signer: Signer | None = None) -> Artifact:
    """Publish the adapter on the volume that the pipeline desires, after `change` had its way with its files."""
    def write(draft: Path) -> None:
        base = of.environment.base_model.name
        config = {"peft_type": "LORA", "r": of.training.lora.r, "base_model_name_or_path": base}
        (draft / "adapter_config.json").write_text(json.dumps(config))
        (draft / "adapter_model.safetensors").write_bytes(bytes(range(256)) + str(of.training.seed).encode())
        (draft / "README.md").write_text(f"# {of.adapter}\n")
        if change:
            change(draft)

    return artifacts.publish(plan(of).adapter, volumes, write, keep=9, adapter_name=of.adapter, signer=signer)


def evaluation(volumes: Path, of: Pipeline, change: Change | None = None, signer: Signer | None = None, **verdict: Any
               ) -> Artifact:
    """Publish the evaluation of it, which passed, after `change` had its way with its files; `verdict` in
    evaluation.json."""
    planned = plan(of)

    def write(draft: Path) -> dict[str, Any]:
        content = {"passed": True, "adapter": {"name": of.adapter, "digest": planned.adapter.digest}} | verdict
        (draft / "evaluation.json").write_text(json.dumps(content))
        (draft / "proof.json").write_text('{"private": "text"}')
        if change:
            change(draft)
        return {"passed": content["passed"]}

    return artifacts.publish(planned.evaluation, volumes, write, keep=9, adapter_name=of.adapter, signer=signer)


def files(volumes: Path, of: Pipeline, *, answers: bool = False, signer: Signer | None = None) -> list[File]:
    """The files that are published of an adapter on the volume that passed; they are made if they are not there."""
    sign = (lambda content: signer.sign(content).encode()) if signer else None
    return layout.files(adapter(volumes, of, signer=signer), evaluation(volumes, of, signer=signer), answers=answers,
                        sign=sign)


def publish(host: str, published: list[File], name: str = NAME) -> Published:
    """Push the files to `oci://HOST/team/NAME`."""
    return push.to_registry(published, name, "v1", f"oci://{host}/team")


def declare_served(folder: Path, published: Published, **changes: Any) -> None:
    """Write `folder/environment.yaml` and `folder/NAME.yaml`, as a server mounts them, with the imported adapter."""
    values = {**HERE, "dataset": None, "training": None, "evaluation": None, "source": published.source,
              "sha256": published.sha256, **changes}
    build_pipeline.write_yaml(folder / "environment.yaml", build_pipeline.environment(**values))
    build_pipeline.write_yaml(folder / f"{NAME}.yaml", build_pipeline.pipeline(**values))


def record(volumes: Path, adapter: ImportedAdapter, arrived: Imported) -> None:
    """Publish what the relocation of an imported adapter records."""
    def write(draft: Path) -> None:
        (draft / imported.RECORD).write_text(arrived.to_json())

    artifacts.publish(plan_import(adapter).imported_adapter, volumes, write, keep=9)


def with_about(manifest: str, about: Any) -> str:
    """The text of an artifact's manifest with other facts for people."""
    return json.dumps(json.loads(manifest) | {"about": about})


def declare(folder: Path, published: Published, **changes: Any) -> LoadedImport:
    """The files of an environment that imports the adapter, with changes as in build_pipeline."""
    folder.mkdir(parents=True, exist_ok=True)
    return imported.load(build_pipeline.write(folder, **{
        **HERE, "dataset": None, "training": None, "evaluation": None, "source": published.source,
        "sha256": published.sha256, **changes}))
