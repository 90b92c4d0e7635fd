"""The published layout: the same artifacts give the same bytes, and private texts are not among them."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

from jobs.core import artifacts
from jobs.core.artifacts import Artifact
from jobs.publication import layout
from tests.publication.conftest import TEXT, make

PUBLIC = {"artifact.json", "adapter_config.json", "adapter_model.safetensors", "README.md", "training.json",
          "evaluation/artifact.json", "evaluation/evaluation.json", "evaluation/without-answers/report.md",
          "evaluation/without-answers/report.html"}
PRIVATE = {f"evaluation/{name}" for name in ("clusters.jsonl", "proof.json", "report.md", "report.html")}


def content(file: layout.File) -> bytes:
    return file.content if isinstance(file.content, bytes) else file.content.read_bytes()


def test_the_same_artifacts_give_the_same_manifest(tmp_path: Path) -> None:
    made = make(tmp_path)
    copies = tmp_path / "copies"
    subprocess.run(["cp", "-r", made.adapter.path.parents[1], copies], check=True)  # other times, other order
    adapter, evaluation = (artifacts.read(copies / path.path.relative_to(made.adapter.path.parents[1]))
                           for path in (made.adapter, made.evaluation))
    first = layout.manifest("hotels", "0123", layout.files(made.adapter, made.evaluation, answers=False))
    assert first == layout.manifest("hotels", "0123", layout.files(adapter, evaluation, answers=False))
    assert first != layout.manifest("hotels", "0123", layout.files(adapter, evaluation, answers=True))


def test_it_is_written_as_it_was_first(tmp_path: Path) -> None:
    """A change of one byte would give every adapter that is published another digest."""
    files = [layout.File.of("README.md", b"# a"), layout.File.of("adapter_config.json", b"{}"),
             layout.File.of("adapter_model.safetensors", b"w"), layout.File.of("evaluation/evaluation.json", b"{}")]
    manifest, config = layout.manifest("seville-hotels", "d24e1c364d5783f7", files)
    assert hashlib.sha256(manifest).hexdigest() == (
        "fc0c89673b053a8c04d086f732724b8499c2f409a95cdae3a8145b9a54847369")
    document = json.loads(manifest)
    assert document["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    assert [(layer["annotations"]["org.cncf.model.filepath"], layer["annotations"]["org.opencontainers.image.title"],
             layer["mediaType"].removeprefix("application/vnd.cncf.model.")) for layer in document["layers"]] == [
        ("README.md", "README.md", "doc.v1.raw"),
        ("adapter_config.json", "adapter_config.json", "weight.config.v1.raw"),
        ("adapter_model.safetensors", "adapter_model.safetensors", "weight.v1.raw"),
        ("evaluation/evaluation.json", "evaluation/evaluation.json", "doc.v1.raw")]
    assert json.loads(config)["modelfs"] == {"type": "layers", "diffIds": [
        layer["digest"] for layer in document["layers"]]}


def test_private_texts_are_left_out_and_the_manifest_says_so(tmp_path: Path) -> None:
    made = make(tmp_path)
    files = {file.path: file for file in layout.files(made.adapter, made.evaluation, answers=False)}
    assert files.keys() == PUBLIC
    assert not any(TEXT.encode() in content(file) for file in files.values())
    manifest = json.loads(content(files["evaluation/artifact.json"]))
    assert {file["path"] for file in manifest["files"]} == {
        name.removeprefix("evaluation/") for name in PUBLIC if name.startswith("evaluation/")} - {"artifact.json"}
    assert manifest["about"]["left_out"] == ["clusters.jsonl", "proof.json", "report.html", "report.md"]
    assert {key: manifest[key] for key in ("kind", "spec", "inputs", "digest")} == {
        key: made.evaluation.manifest[key] for key in ("kind", "spec", "inputs", "digest")}


def test_what_is_unpacked_is_a_verified_artifact(tmp_path: Path) -> None:
    made = make(tmp_path)
    for answers in (False, True):
        folder = tmp_path / str(answers)
        for file in layout.files(made.adapter, made.evaluation, answers=answers):
            target = folder / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content(file))
            assert (file.size, file.sha256) == (len(content(file)), hashlib.sha256(content(file)).hexdigest())
        (folder / "evaluation").rename(folder.with_name(made.evaluation.digest))
        assert artifacts.read(folder.with_name(made.evaluation.digest)).digest == made.evaluation.digest
        folder.rename(folder.with_name(made.adapter.digest))
        assert artifacts.read(folder.with_name(made.adapter.digest)).manifest == made.adapter.manifest
        folder.with_name(made.adapter.digest).rename(tmp_path / f"{answers}-adapter")
        folder.with_name(made.evaluation.digest).rename(tmp_path / f"{answers}-evaluation")


def test_with_answers_the_evaluation_is_published_as_it_is(tmp_path: Path) -> None:
    made = make(tmp_path)
    files = {file.path: file for file in layout.files(made.adapter, made.evaluation, answers=True)}
    assert files.keys() == PUBLIC | PRIVATE
    assert content(files["evaluation/artifact.json"]) == (made.evaluation.path / "artifact.json").read_bytes()


def test_a_report_without_answers_is_public(tmp_path: Path) -> None:
    made = make(tmp_path, evaluation__report_answers=False)
    assert {name for name in PRIVATE if "report" in name} <= {
        file.path for file in layout.files(made.adapter, made.evaluation, answers=False)}


def test_a_file_that_nobody_thought_of_does_not_leave(tmp_path: Path) -> None:
    made = make(tmp_path)
    odd = Artifact(made.evaluation.path, {**made.evaluation.manifest, "files": [
        *made.evaluation.manifest["files"], {"path": "new.jsonl", "size": 1, "sha256": "0" * 64}]})
    assert "evaluation/new.jsonl" not in {file.path for file in layout.files(made.adapter, odd, answers=False)}


def test_signatures_go_along_and_a_shortened_manifest_is_signed_again(tmp_path: Path) -> None:
    made = make(tmp_path)
    for artifact in (made.adapter, made.evaluation):
        (artifact.path / artifacts.SIGNATURE).write_bytes(b"signed at home")
    signed = {file.path: content(file) for file in layout.files(
        made.adapter, made.evaluation, answers=False, sign=lambda manifest: b"signed " + manifest)}
    assert signed["artifact.json.sig"] == b"signed at home"
    assert signed["evaluation/artifact.json.sig"] == b"signed " + signed["evaluation/artifact.json"]
    whole = {file.path: content(file) for file in layout.files(made.adapter, made.evaluation, answers=True)}
    assert whole["evaluation/artifact.json.sig"] == b"signed at home"


def test_the_sums_are_those_of_sha256sum(tmp_path: Path) -> None:
    made = make(tmp_path)
    files = layout.files(made.adapter, made.evaluation, answers=True)
    for file in files:
        (tmp_path / "out" / file.path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / file.path).write_bytes(content(file))
    (tmp_path / "out" / "SHA256SUMS").write_bytes(layout.sums(files))
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=tmp_path / "out", check=True)
