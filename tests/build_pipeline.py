"""Builds pipeline files for tests: a valid one, with single values replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from jobs.core.files import write_atomically

COMMIT = "12fd25f77366fa6b3b4b768ec3050bf629380bac"
SHA256 = "5b1f" * 16


def values(**changes: Any) -> dict[str, Any]:
    """A valid pipeline; `changes` are dotted keys with `__` for the dots. The value None removes a key."""
    pipeline: dict[str, Any] = {
        "adapter": "seville-hotels",
        "dataset": {"source": "file:dataset.jsonl", "sha256": SHA256},
        "base_model": {"source": "hf://HuggingFaceTB/SmolLM2-135M-Instruct", "revision": COMMIT},
        "reference_model": {"source": "builtin:tiny-reference"},
        "training": {"lora": {"r": 8}, "epochs": 1},
        "evaluation": {"gate": {"perplexity": {"max_ratio": 0.9}}},
    }
    for dotted, value in changes.items():
        *parents, key = dotted.split("__")
        at = pipeline
        for parent in parents:
            at = at.setdefault(parent, {})
        if value is None:
            at.pop(key, None)
        else:
            at[key] = value
    return pipeline


def write(folder: Path, **changes: Any) -> Path:
    """Write `values(**changes)` as `folder/pipeline.yaml` and return the file. Like a ConfigMap's, it changes at once:
    a server that watches it would report an empty one."""
    file = folder / "pipeline.yaml"
    write_atomically(file, yaml.safe_dump(values(**changes), sort_keys=False))
    return file
