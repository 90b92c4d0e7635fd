"""Builds the files that people edit, for tests: a valid environment and pipeline, with single values replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from jobs.core.environment import Environment
from jobs.core.files import write_atomically
from jobs.core.pipeline import Pipeline

COMMIT = "12fd25f77366fa6b3b4b768ec3050bf629380bac"
SHA256 = "5b1f" * 16


def values(**changes: Any) -> dict[str, Any]:
    """A valid environment and pipeline in one mapping; `changes` are dotted keys with `__` for the dots. The value None
    removes a key."""
    both: dict[str, Any] = {
        "adapter": "seville-hotels",
        "dataset": {"source": "file:dataset.jsonl", "sha256": SHA256},
        "base_model": {"source": "hf://HuggingFaceTB/SmolLM2-135M-Instruct", "revision": COMMIT},
        "reference_model": {"source": "builtin:tiny-reference"},
        "training": {"lora": {"r": 8}, "epochs": 1},
        "evaluation": {"gate": {"perplexity": {"max_ratio": 0.9}}},
    }
    for dotted, value in changes.items():
        *parents, key = dotted.split("__")
        at = both
        for parent in parents:
            at = at.setdefault(parent, {})
        if value is None:
            at.pop(key, None)
        else:
            at[key] = value
    return both


def environment(**changes: Any) -> dict[str, Any]:
    """The part of `values(**changes)` that an environment file holds."""
    return {key: value for key, value in values(**changes).items() if key in Environment.model_fields}


def pipeline(**changes: Any) -> dict[str, Any]:
    """The part of `values(**changes)` that a pipeline file holds; unknown keys belong to it."""
    return {key: value for key, value in values(**changes).items() if key not in Environment.model_fields}


def build(**changes: Any) -> Pipeline:
    """The pipeline in its environment, as `jobs.core.pipeline.load` returns it."""
    return Pipeline(**pipeline(**changes), environment=Environment(**environment(**changes)))


def write(folder: Path, **changes: Any) -> Path:
    """Write `folder/pipeline.yaml`, and `folder/environment.yaml` beside it, and return the pipeline file. Like a
    ConfigMap's, they change at once: a server that watches one would report an empty one."""
    write_yaml(folder / "environment.yaml", environment(**changes))
    write_yaml(folder / "pipeline.yaml", pipeline(**changes))
    return folder / "pipeline.yaml"


def write_yaml(file: Path, content: dict[str, Any]) -> None:
    write_atomically(file, yaml.safe_dump(content, sort_keys=False))
