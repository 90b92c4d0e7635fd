"""The bill of materials of an adapter: a CycloneDX ML-BOM of the model, what it was made from, and what made it.

Every value follows from the adapter's and the evaluation's manifests, so the same adapter has the same bill. Licences
of libraries are those of the packages installed here, if they are the versions that trained the adapter.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

from jobs.core.artifacts import Artifact
from jobs.core.metrics import metric_of
from jobs.core.sources import shown

SPEC_VERSION = "1.6"
ROLE = "fine_tuned"
NAMESPACE = uuid.UUID("5f0a4a7e-6b1c-5e0e-9d0a-6a5b1f0c7d11")  # any: serial numbers are made from it and the digests
SLICES = {"records": "held-out records", "sentences": "acceptability sentences"}
SHORT = 40  # characters of a licence's name; what is longer is its text


def bill(name: str, adapter: Artifact, evaluation: Artifact, verdict: Mapping[str, Any]) -> dict[str, Any]:
    """The bill of materials, as JSON.

    Args:
        name: the adapter's name.
        verdict: the content of evaluation.json.
    """
    sources = verdict.get("sources", {})
    libraries = [library(package, version) for package, version in sorted(adapter.manifest["versions"].items())]
    components = [base_model(verdict, sources), dataset(adapter, sources), *libraries]
    return {
        "$schema": f"http://cyclonedx.org/schema/bom-{SPEC_VERSION}.schema.json",
        "bomFormat": "CycloneDX", "specVersion": SPEC_VERSION, "version": 1,
        "serialNumber": f"urn:uuid:{uuid.uuid5(NAMESPACE, f'{adapter.digest} {evaluation.digest}')}",
        "metadata": {
            "timestamp": adapter.manifest["finished"],
            "tools": {"components": [{"type": "application", "name": "lora-gitops"}]},
            "component": {
                "type": "machine-learning-model", "bom-ref": "adapter", "name": name, "version": adapter.digest,
                "description": f"LoRA adapter on {verdict['base_model']['name']}",
                "modelCard": model_card(verdict),
                "pedigree": {"ancestors": [{"type": "machine-learning-model", "name": verdict["base_model"]["name"]}]},
                "components": [{"type": "file", "name": file["path"], "hashes": [_sha256(file["sha256"])]}
                               for file in adapter.manifest["files"]],
                "properties": _properties({
                    "evaluation": evaluation.digest, "evaluation.outcome": verdict["outcome"],
                    **{f"training.{key}": value for key, value in _flat(verdict.get("training", {}))}})}},
        "components": components,
        "dependencies": [{"ref": "adapter", "dependsOn": [each["bom-ref"] for each in components]},
                         *({"ref": each["bom-ref"]} for each in components)],
    }


def base_model(verdict: Mapping[str, Any], sources: Mapping[str, Any]) -> dict[str, Any]:
    """The component of the base model."""
    return {"type": "machine-learning-model", "bom-ref": "base-model", "name": verdict["base_model"]["name"],
            **_identity(sources.get("base_model", {})),
            "properties": _properties({"artifact": verdict["base_model"]["digest"]})}


def dataset(adapter: Artifact, sources: Mapping[str, Any]) -> dict[str, Any]:
    """The component of the data that the adapter was trained on: where it is, and its digest, but nothing of it."""
    source = sources.get("dataset", {})
    return {"type": "data", "bom-ref": "dataset", "name": shown(str(source.get("source", "dataset"))),
            **_identity(source), "data": [{"type": "dataset", "name": "training data", "classification": "private"}],
            "properties": _properties({"artifact": adapter.manifest["inputs"]["dataset"]})}


def library(package: str, version: str) -> dict[str, Any]:
    """The component of a library in the version that made the adapter."""
    if package == "python":
        return {"type": "platform", "bom-ref": "python", "name": "python", "version": version}
    normal = re.sub(r"[-_.]+", "-", package).lower()
    purl = f"pkg:pypi/{normal}@{version.replace('+', '%2B')}"
    found: dict[str, Any] = {"type": "library", "bom-ref": purl, "name": package, "version": version, "purl": purl}
    if licences := _licences(package, version):
        found["licenses"] = licences
    return found


def _licences(package: str, version: str) -> list[dict[str, Any]]:
    """The licence of an installed package in this version; nothing if it has another, or does not say."""
    try:
        installed = metadata.metadata(package)
    except metadata.PackageNotFoundError:
        return []
    if installed["Version"] != version:
        return []
    if "License-Expression" in installed:
        return [{"expression": installed["License-Expression"]}]
    names = [classifier.rpartition(" :: ")[2] for classifier in installed.get_all("Classifier") or []
             if classifier.startswith("License :: ") and classifier.count(" :: ") > 1]
    named = installed["License"].strip() if "License" in installed else ""
    if not names and 0 < len(named) <= SHORT:
        names = [named]
    return [{"license": {"name": name}} for name in names]


def model_card(verdict: Mapping[str, Any]) -> dict[str, Any]:
    """How the adapter was trained and what was measured, as CycloneDX has it."""
    intervals, scores = verdict.get("intervals", {}).get(ROLE, {}), verdict.get("scores", {}).get(ROLE, {})
    metrics = []
    for key, value in scores.items():
        try:
            population = metric_of(key).population
        except KeyError:  # a count or a name
            continue
        if value is None:
            continue
        metric: dict[str, Any] = {"type": key, "value": f"{value:.6g}", "slice": SLICES.get(population, population)}
        low, high = intervals.get(key) or (None, None)
        if low is not None and high is not None:
            metric["confidenceInterval"] = {"lowerBound": f"{low:.6g}", "upperBound": f"{high:.6g}"}
        metrics.append(metric)
    text = [{"format": "text/plain"}]
    return {"modelParameters": {"approach": {"type": "supervised"}, "task": "text-generation",
                                "architectureFamily": "LoRA", "datasets": [{"ref": "dataset"}],
                                "inputs": text, "outputs": text},
            **({"quantitativeAnalysis": {"performanceMetrics": metrics}} if metrics else {})}


def _identity(source: Mapping[str, Any]) -> dict[str, Any]:
    """Version, package URL and hash of a pinned source."""
    where, pin = str(source.get("source", "")), str(source.get("pin", ""))
    found: dict[str, Any] = {"version": pin} if pin else {}
    if re.fullmatch("[0-9a-f]{64}", pin):
        found["hashes"] = [_sha256(pin)]
    parts = where.removeprefix("hf://").split("/")
    if where.startswith("hf://") and len(parts) == 2 and all(parts):
        found["purl"] = f"pkg:huggingface/{parts[0]}/{parts[1]}@{pin}"
    return found


def _sha256(digest: str) -> dict[str, str]:
    return {"alg": "SHA-256", "content": digest}


def _properties(values: Mapping[str, Any]) -> list[dict[str, str]]:
    return [{"name": f"lora-gitops:{name}", "value": str(value)} for name, value in values.items()]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value
