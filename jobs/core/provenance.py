"""The provenance of a published adapter: a signed in-toto statement with SLSA's predicate (https://slsa.dev/provenance).

Says of `artifact.json`, which lists the adapter's files: which sources by which pins it was made from, by which commit
and versions, and how it was evaluated. The file is a sigstore bundle, like a signature.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

from jobs.core.declarations import COMMIT, Source
from jobs.core.errors import UserError
from jobs.core.layout import MANIFEST
from jobs.core.pipeline import Pipeline
from jobs.core.signing import Signer
from jobs.core.sources import shown

FILE = "provenance.json"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:lora-gitops:adapter:1"
BUILDER = "urn:lora-gitops:jobs"
VARIABLE = "GIT_COMMIT"  # of the environment's repository; training records it, where it is set


def sign(pipeline: Pipeline, adapter: bytes, evaluation: bytes, evaluation_path: str, signer: Signer) -> bytes:
    """The content of `provenance.json`; the same for the same manifests, sources and key.

    Args:
        adapter: the content of the adapter's `artifact.json`.
        evaluation: that of the `artifact.json` of the evaluation that proved it, as it is published.
        evaluation_path: where that is in what is published.
    """
    return signer.sign_statement({MANIFEST: _sha256(adapter)}, PREDICATE, predicate(
        pipeline, json.loads(adapter), json.loads(evaluation), evaluation_path, _sha256(evaluation))).encode()


def commit() -> str | None:
    """The commit in GIT_COMMIT; None where it is not set.

    Raises:
        UserError: it is no commit.
    """
    found = os.environ.get(VARIABLE, "").strip()
    if found and not COMMIT.fullmatch(found):
        raise UserError(f"{VARIABLE} is {found!r}, but must be a commit of 40 hex digits; correct or remove it")
    return found or None


def predicate(pipeline: Pipeline, adapter: Mapping[str, Any], evaluation: Mapping[str, Any], evaluation_path: str,
              evaluation_sha256: str) -> dict[str, Any]:
    """SLSA's predicate about an adapter, from the manifests of adapter and evaluation. Has no numbers (`signing`)."""
    sources = pipeline.environment.sources() | pipeline.sources()
    made_from = [_dependency(key, source) for key, source in sources.items()]
    if trained_by := adapter["about"].get("commit"):
        made_from.append({"name": "repository", "digest": {"gitCommit": trained_by}})
    return {
        "buildDefinition": {
            "buildType": BUILD_TYPE,
            "externalParameters": {"adapter": pipeline.adapter, "digest": adapter["digest"]},
            "resolvedDependencies": made_from},
        "runDetails": {
            "builder": {"id": BUILDER, "version": dict(adapter["versions"])},
            "metadata": {"invocationId": adapter["digest"], "startedOn": adapter["started"],
                         "finishedOn": adapter["finished"]},
            "byproducts": [{"name": evaluation_path, "digest": {"sha256": evaluation_sha256},
                            "annotations": {"digest": evaluation["digest"], "passed": evaluation["about"]["passed"]}}]}}


def _dependency(key: str, source: Source) -> dict[str, Any]:
    """A source with its pin."""
    pin = {"gitCommit": source.revision} if source.revision else {"sha256": source.sha256} if source.sha256 else None
    return {"name": key, "uri": shown(source.source), **({"digest": pin} if pin else {})}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
