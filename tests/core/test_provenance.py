"""Promises of the provenance: it says what an adapter was made from, by pins, and only the key's holder can say so."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs.core import provenance, signatures
from jobs.core.errors import UserError
from tests import build_pipeline, build_signing
from tests.build_pipeline import COMMIT, SHA256
from tests.build_signing import pair

ADAPTER = json.dumps({"digest": "0123456789abcdef", "versions": {"python": "3.11.15", "torch": "2.13.0"},
                      "started": "2026-11-26T09:00:00+00:00", "finished": "2026-11-26T09:30:00+00:00",
                      "about": {}}).encode()
EVALUATION = json.dumps({"digest": "fedcba9876543210", "about": {"passed": True}}).encode()


def made(**changes: Any) -> bytes:
    return provenance.sign(build_pipeline.build(**changes), ADAPTER, EVALUATION, "evaluation/artifact.json",
                           build_signing.signer(pair()))


def statement(bundle: bytes) -> dict[str, Any]:
    payload, key = signatures.verify_envelope(bundle, [pair("two").public, pair().public])
    assert key == pair().public
    found: dict[str, Any] = json.loads(payload)
    return found


def test_it_is_about_the_manifest_and_names_sources_by_pin_versions_and_verdict() -> None:
    found = statement(made(tokenizer={"source": "file:tokenizer", "sha256": SHA256}))
    assert (found["_type"], found["predicateType"]) == (signatures.STATEMENT, "https://slsa.dev/provenance/v1")
    assert found["subject"] == [{"name": "artifact.json", "digest": {"sha256": hashlib.sha256(ADAPTER).hexdigest()}}]
    definition, details = found["predicate"]["buildDefinition"], found["predicate"]["runDetails"]
    assert definition["externalParameters"] == {"adapter": "seville-hotels", "digest": "0123456789abcdef"}
    by_name = {each.pop("name"): each for each in definition["resolvedDependencies"]}
    assert by_name == {
        "base_model": {"uri": "hf://HuggingFaceTB/SmolLM2-135M-Instruct", "digest": {"gitCommit": COMMIT}},
        "tokenizer": {"uri": "file:tokenizer", "digest": {"sha256": SHA256}},
        "reference_model": {"uri": "builtin:tiny-reference"},
        "dataset": {"uri": "file:dataset.jsonl", "digest": {"sha256": SHA256}},
        "evaluation.acceptability": by_name["evaluation.acceptability"]}
    assert definition["buildType"] == "urn:lora-gitops:adapter:1"
    assert details["builder"] == {"id": "urn:lora-gitops:jobs", "version": {"python": "3.11.15", "torch": "2.13.0"}}
    assert details["metadata"] == {"invocationId": "0123456789abcdef", "startedOn": "2026-11-26T09:00:00+00:00",
                                   "finishedOn": "2026-11-26T09:30:00+00:00"}
    assert details["byproducts"] == [{
        "name": "evaluation/artifact.json", "digest": {"sha256": hashlib.sha256(EVALUATION).hexdigest()},
        "annotations": {"digest": "fedcba9876543210", "passed": True}}]


def test_the_commit_is_there_where_training_knew_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "repository" not in json.dumps(statement(made()))
    manifest = json.dumps(json.loads(ADAPTER) | {"about": {"commit": COMMIT}}).encode()
    found = statement(provenance.sign(build_pipeline.build(), manifest, EVALUATION, "evaluation/artifact.json",
                                      build_signing.signer(pair())))
    assert {"name": "repository", "digest": {"gitCommit": COMMIT}} in (
        found["predicate"]["buildDefinition"]["resolvedDependencies"])


@pytest.mark.parametrize(("text", "commit"), [(None, None), ("", None), (f"{COMMIT}\n", COMMIT)])
def test_the_commit_comes_from_a_variable(monkeypatch: pytest.MonkeyPatch, text: str | None,
                                          commit: str | None) -> None:
    monkeypatch.delenv(provenance.VARIABLE, raising=False)
    if text is not None:
        monkeypatch.setenv(provenance.VARIABLE, text)
    assert provenance.commit() == commit


def test_a_variable_that_is_no_commit_is_an_error_before_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(provenance.VARIABLE, "main")
    with pytest.raises(UserError, match="GIT_COMMIT is 'main', but must be a commit"):
        provenance.commit()


@pytest.mark.parametrize(("source", "uri"), [
    ("https://user:secret@data.example.com/a/b.jsonl?X-Amz-Signature=secret#secret", "https://data.example.com/a/b.jsonl"),
    ("s3://bucket/data.jsonl", "s3://bucket/data.jsonl")])
def test_nothing_of_a_url_that_may_be_secret_is_told(source: str, uri: str) -> None:
    found = statement(made(dataset__source=source))
    assert "secret" not in json.dumps(found)
    assert uri in [each["uri"] for each in found["predicate"]["buildDefinition"]["resolvedDependencies"]]


def test_it_is_no_signature_of_the_manifest() -> None:
    with pytest.raises(ValueError, match="another kind of statement|no statement about a model"):
        signatures.verify(ADAPTER, made(), [pair().public])


def test_signatures_and_provenance_are_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    """protobuf orders a statement's keys by another seed in each; an adapter that is published again must keep its
    digest in the registry."""
    program = ("from tests.core.test_provenance import *; import hashlib\n"
               "print(hashlib.sha256(made() + build_signing.signer(pair()).sign(ADAPTER).encode()).hexdigest())")
    runs = {subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
            for _ in range(2)}
    runs.add(f"{hashlib.sha256(made() + build_signing.signer(pair()).sign(ADAPTER).encode()).hexdigest()}\n")
    assert len(runs) == 1
