"""Compiles manifests in .venv-kubeflow: reads a JSON list of lists of manifests, writes what became of each."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

from jobs.core.errors import UserError  # noqa: E402
from kubeflow import pipeline  # noqa: E402


def compiled(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    try:
        result = pipeline.compile_manifests(manifests)
    except UserError as error:
        return {"error": str(error)}
    return {"text": result.text, "unsupported": pipeline.unsupported(result.steps)}


if __name__ == "__main__":
    json.dump([compiled(manifests) for manifests in json.load(sys.stdin)], sys.stdout)
