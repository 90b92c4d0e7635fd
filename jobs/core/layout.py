"""Names on the volumes, below `<volume>/<kind>/` and `<volume>/`."""

from __future__ import annotations

from pathlib import Path

MANIFEST = "artifact.json"
# On the fine-tuned model's volume, what a training writes while it runs: `checkpoints/<adapter's digest>` and
# `tensorboard/<adapter's name>/<adapter's digest>`.
CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"
DRAFT = ".draft-"


def draft_folder(artifact: Path) -> Path:
    """Where an artifact is written before it is renamed to its place, and where it goes before it is removed."""
    return artifact.with_name(f"{DRAFT}{artifact.name}")


def lock_file(artifact: Path) -> Path:
    """The file that is locked while an artifact is made or removed."""
    return artifact.with_name(f".lock-{artifact.name}")
