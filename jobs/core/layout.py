"""Names on the volumes, below `<volume>/<kind>/` and `<volume>/`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jobs.core.files import read_plain_file

MANIFEST = "artifact.json"
MANIFEST_BYTES = 64 * 2**20  # 300,000 files
# Beside the manifest where the environment asks for signatures (signing.py). The manifest cannot list it.
SIGNATURE = "artifact.json.sig"
SIGNATURE_BYTES = 64 * 2**10  # one has 3 kB; a certificate and its log entry have 10
# On the fine-tuned model's volume, what a training writes while it runs: `checkpoints/<adapter's digest>` and
# `tensorboard/<adapter's name>/<adapter's digest>`.
CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"
DRAFT = ".draft-"
SEAL = ".verified-"


def draft_folder(artifact: Path) -> Path:
    """Where an artifact is written before it is renamed to its place, and where it goes before it is removed."""
    return artifact.with_name(f"{DRAFT}{artifact.name}")


def lock_file(artifact: Path) -> Path:
    """The file that is locked while an artifact is made or removed."""
    return artifact.with_name(f".lock-{artifact.name}")


def seal_file(artifact: Path) -> Path:
    """The file that records that an artifact was verified (seals.py)."""
    return artifact.with_name(f"{SEAL}{artifact.name}")


def read_manifest(artifact: Path) -> Any:
    """What an artifact's manifest holds, which may be anything.

    Raises:
        UserError, OSError, ValueError, RecursionError: it cannot be read, or is not JSON.
    """
    return json.loads(read_plain_file(artifact / MANIFEST, MANIFEST_BYTES))
