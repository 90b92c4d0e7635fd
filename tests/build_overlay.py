"""Builds overlays with several adapters, for tests: edited copies of overlays/kind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tests.manifests import copy

FIRST = "seville-hotels"  # the adapter of overlays/kind that others are made from
Change = Callable[[dict[str, Any]], object]


def build(folder: Path, *names: str) -> Path:
    """A copy of overlays/kind, with only its first adapter and with more like it."""
    overlay = copy(folder)
    for other in sorted((overlay / "adapters").iterdir()):
        if other.name != FIRST:
            shutil.rmtree(other)
            unlist(overlay, other.name)
    for name in names:
        add(overlay, name)
    return overlay


def add(overlay: Path, name: str, *, of: str = FIRST) -> Path:
    """A further adapter, in its folder and listed, as `of` is."""
    place = overlay / "adapters" / name
    shutil.copytree(overlay / "adapters" / of, place)
    for file in place.glob("*.yaml"):
        file.write_text(file.read_text().replace(of, name))

    def entries(content: dict[str, Any]) -> None:
        content["resources"].append(f"adapters/{name}")
        served(content).append(f"{name}.yaml=adapters/{name}/pipeline.yaml")

    edit(overlay, entries)
    return place


def unlist(overlay: Path, name: str) -> None:
    """Remove an adapter's entries."""
    def entries(content: dict[str, Any]) -> None:
        content["resources"].remove(f"adapters/{name}")
        served(content).remove(f"{name}.yaml=adapters/{name}/pipeline.yaml")

    edit(overlay, entries)


def served(content: dict[str, Any]) -> list[str]:
    """The files of the ConfigMap `serving-pipelines` in the content of a kustomization."""
    generators = {each["name"]: each for each in content["configMapGenerator"]}
    files: list[str] = generators["serving-pipelines"]["files"]
    return files


def edit(folder: Path, change: Change) -> Path:
    """Change the content of a folder's kustomization."""
    file = folder / "kustomization.yaml"
    content = yaml.safe_load(file.read_text())
    change(content)
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return folder


def contents(folder: Path) -> dict[str, bytes | None]:
    """What a folder holds: every file's bytes, and None for a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
            for path in sorted(folder.rglob("*"))}
