"""The files of a published adapter and the manifest that lists them, the same bytes for the same artifacts.

The manifest is that of ModelPack, the CNCF's specification for models as OCI artifacts. modctl and what builds on it
read the annotation `org.cncf.model.filepath`; oras and CRI-O read `org.opencontainers.image.title`. Every layer is one
file as it is, so a client that pulls them has a folder that PEFT loads. docs/publication.md compares the layouts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from jobs.core.artifacts import MANIFEST, SIGNATURE, Artifact
from jobs.core.published import EVALUATION, LEFT_OUT, WITHOUT_ANSWERS
from jobs.core.registry import FILE_PATH, OCI_MANIFEST, TITLE, digest_of

ARTIFACT_TYPE = "application/vnd.cncf.model.manifest.v1+json"
CONFIG_TYPE = "application/vnd.cncf.model.config.v1+json"
WEIGHTS = "application/vnd.cncf.model.weight.v1.raw"
SETTINGS = "application/vnd.cncf.model.weight.config.v1.raw"
DOCUMENT = "application/vnd.cncf.model.doc.v1.raw"
EVALUATED = "evaluation.json"

Sign = Callable[[bytes], bytes]


@dataclass(frozen=True)
class File:
    """A file as it is published."""

    path: str
    size: int  # bytes
    sha256: str  # in hex
    content: Path | bytes

    @classmethod
    def of(cls, path: str, content: bytes) -> File:
        """A file from its bytes."""
        return cls(path, len(content), hashlib.sha256(content).hexdigest(), content)


def files(adapter: Artifact, evaluation: Artifact, *, answers: bool, sign: Sign | None = None) -> list[File]:
    """The files of an adapter and of the evaluation that proved it, sorted by path.

    Args:
        answers: also those files of the evaluation that hold private texts. Without them, the published evaluation's
            manifest lists what is published and names the others.
        sign: signs such a manifest; None where signing is off.
    """
    found = _files(adapter, "")
    listed = evaluation.manifest["files"]
    public = [file for file in listed if answers or is_public(file["path"], evaluation)]
    if len(public) == len(listed):
        found += _files(evaluation, f"{EVALUATION}/")
    else:
        manifest = reduced(evaluation, public)
        found += [_file(evaluation, file, f"{EVALUATION}/") for file in public]
        found.append(File.of(f"{EVALUATION}/{MANIFEST}", manifest))
        if sign:
            found.append(File.of(f"{EVALUATION}/{SIGNATURE}", sign(manifest)))
    return sorted(found, key=lambda file: file.path)


def is_public(path: str, evaluation: Artifact) -> bool:
    """Whether a file of an evaluation holds no private text. What is not known to hold none does not leave."""
    if path == EVALUATED or PurePosixPath(path).parts[0] == WITHOUT_ANSWERS:
        return True
    return path in ("report.md", "report.html") and evaluation.manifest["spec"].get("report_answers") is False


def reduced(evaluation: Artifact, public: Iterable[dict[str, Any]]) -> bytes:
    """The manifest of an evaluation of which only some files are published."""
    public = list(public)
    names = {file["path"] for file in public}
    away = sorted(file["path"] for file in evaluation.manifest["files"] if file["path"] not in names)
    manifest = {**evaluation.manifest, "files": public, "about": {**evaluation.manifest["about"], LEFT_OUT: away}}
    return (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode()


def manifest(name: str, version: str, published: Iterable[File]) -> tuple[bytes, bytes]:
    """The manifest of an adapter in a registry, and the configuration that it refers to.

    Args:
        name: the adapter's name.
        version: its digest.
    """
    published = list(published)
    config = _json({
        "descriptor": {"name": name, "version": version, "title": f"LoRA adapter {name}"},
        "config": {"format": "safetensors"},
        "modelfs": {"type": "layers", "diffIds": [f"sha256:{file.sha256}" for file in published]}})
    content = _json({
        "schemaVersion": 2, "mediaType": OCI_MANIFEST, "artifactType": ARTIFACT_TYPE,
        "config": {"mediaType": CONFIG_TYPE, "digest": digest_of(config), "size": len(config)},
        "layers": [{"mediaType": _media_type(file.path), "digest": f"sha256:{file.sha256}", "size": file.size,
                    "annotations": {FILE_PATH: file.path, TITLE: file.path}} for file in published],
        "annotations": {TITLE: name, "org.opencontainers.image.version": version}})
    return content, config


def sums(published: Iterable[File]) -> bytes:
    """The file SHA256SUMS, as `sha256sum` writes it."""
    return "".join(f"{file.sha256}  {file.path}\n" for file in published).encode()


def _media_type(path: str) -> str:
    if path.startswith(f"{EVALUATION}/"):
        return DOCUMENT
    return {".safetensors": WEIGHTS, ".json": SETTINGS}.get(PurePosixPath(path).suffix, DOCUMENT)


def _files(artifact: Artifact, prefix: str) -> list[File]:
    """All files of an artifact, with its manifest and its signature as they are."""
    own = [name for name in (MANIFEST, SIGNATURE) if (artifact.path / name).exists()]
    return [*(_file(artifact, file, prefix) for file in artifact.manifest["files"]),
            *(File.of(prefix + name, (artifact.path / name).read_bytes()) for name in own)]


def _file(artifact: Artifact, file: dict[str, Any], prefix: str) -> File:
    return File(prefix + file["path"], file["size"], file["sha256"], artifact.path / file["path"])


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
