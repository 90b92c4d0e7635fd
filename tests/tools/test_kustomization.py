"""Promises of the check of an overlay's kustomization: what kustomize ignores in silence is found before the push."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from jobs.core.errors import UserError
from jobs.core.files import sha256_of
from jobs.tools import check, kustomization, pin
from tests import build_pipeline
from tests.manifests import Manifest, copy, render

JOBS = {"target": {"kind": "Job", "name": ".*-relocation"},
        "patch": "- {op: add, path: /spec/activeDeadlineSeconds, value: 9}"}
AUTHORITY = {"target": {"kind": "Job", "name": "dataset-relocation"}, "patch": """\
- op: add
  path: /spec/template/spec/volumes/-
  value: {name: authority, configMap: {name: authority}}
"""}


def edited(folder: Path, **changes: list[Manifest | str]) -> Path:
    """The folder, with entries added to lists of its kustomization."""
    file = folder / "kustomization.yaml"
    content = yaml.safe_load(file.read_text())
    for key, values in changes.items():
        content[key] = [*content.get(key, []), *values]
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return folder


def test_a_source_that_no_job_may_reach_is_an_error(tmp_path: Path) -> None:
    """A copy of overlays/kind for a model from the hub: relocation would try for an hour."""
    overlay = copy(tmp_path)
    file = overlay / "pipeline.yaml"
    hub = f"source: hf://HuggingFaceTB/SmolLM2-135M-Instruct\n  revision: {build_pipeline.COMMIT}\n"
    file.write_text(file.read_text().replace("source: builtin:tiny\n", hub))
    found = list(kustomization.sources_out_of_reach(overlay, render(overlay)))
    assert [line.partition(" reach nothing, but it must fetch hf://")[0].rpartition(" ")[2] for line in found] == [
        "model-relocation", "tokenizer-relocation"]
    text = (overlay / "kustomization.yaml").read_text()
    (overlay / "kustomization.yaml").write_text(text.replace("# - ../../base/egress ", "- ../../base/egress "))
    assert list(kustomization.sources_out_of_reach(overlay, render(overlay))) == []


def test_private_data_in_git_beside_an_open_network_is_warned_of(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    overlay = copy(tmp_path)
    file = overlay / "kustomization.yaml"
    for option in ("egress ", "egress/models-only "):
        file.write_text(file.read_text().replace(f"# - ../../base/{option}", f"- ../../base/{option}"))
        caplog.clear()
        assert list(kustomization.sources_out_of_reach(overlay, render(overlay))) == []
        assert ("List the component base/egress/models-only" in caplog.text) == (option == "egress ")


def test_a_patch_of_jobs_works_where_there_are_jobs(tmp_path: Path) -> None:
    kustomization.check(edited(copy(tmp_path), patches=[JOBS]))


@pytest.mark.parametrize(("folder", "kind"), [(".", "Job"), ("hardware", "CronJob")])
def test_a_patch_that_matches_nothing_is_an_error_of_check(tmp_path: Path, folder: str, kind: str) -> None:
    """In overlays/gpu the Jobs are gone when its own patches come."""
    overlay = copy(tmp_path).parent / "gpu"
    edited(overlay / folder, patches=[JOBS | {"target": {"kind": kind}}])
    with pytest.raises(UserError) as caught:
        check.run(overlay)
    (line,) = str(caught.value).splitlines()
    file = (overlay / folder / "kustomization.yaml").resolve()
    assert line.startswith(f"{file}: the patch patches[")
    assert f"of {{kind: {kind}}} has no effect" in line


def test_a_patch_that_is_undone_later_is_an_error_too(tmp_path: Path) -> None:
    overlay = copy(tmp_path)
    image = {"op": "replace", "path": "/spec/template/spec/containers/0/image", "value": "mine"}
    deployment = {"kind": "Deployment", "name": "tensorboard"}
    for value in ("mine", "yours"):
        edited(overlay, patches=[{"target": deployment, "patch": yaml.safe_dump([image | {"value": value}])}])
    with pytest.raises(UserError, match=r"patches\[2\] of {kind: Deployment, name: tensorboard} has no effect"):
        kustomization.check(overlay)


def test_an_overlay_whose_jobs_do_not_follow_the_pipeline_is_an_error(tmp_path: Path) -> None:
    """kustomize renders it, and the next edit of pipeline.yaml would be refused by the cluster."""
    overlay = copy(tmp_path).parent / "kind-smollm2"
    file = overlay / "kustomization.yaml"
    content = yaml.safe_load(file.read_text())
    content["components"].remove("../../base/metadata")
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=r"pipeline.yaml: its next change would change ConfigMap pipeline-\w+"):
        kustomization.check(overlay)


def test_a_further_config_map_of_a_job_must_keep_its_name(tmp_path: Path) -> None:
    overlay = copy(tmp_path)
    (overlay / "ca.crt").write_text("certificates")
    edited(overlay, patches=[AUTHORITY], configMapGenerator=[{"name": "authority", "files": ["ca.crt"]}])
    with pytest.raises(UserError, match="ca.crt: its next change would change Job dataset-relocation-"):
        kustomization.check(overlay)


POLICY = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "x"},
          "spec": {"podSelector": {}}}


@pytest.mark.parametrize("edit", [
    lambda o: edited(o, secretGenerator=[]).joinpath("kustomization.yaml").open("a").write("crds:\nreplacements:\n"),
    lambda o: (o / "kustomization.yaml").write_text(
        (o / "kustomization.yaml").read_text().partition("patches:")[0] + "patches:\nsecretGenerator:\n"),
    lambda o: (o / "kustomization.yaml").rename(o / "kustomization.yml"),
    lambda o: (o / "nowhere").symlink_to("absent"),
    lambda o: (o / "itself").symlink_to("."),
    lambda o: os.mkfifo(o / "fifo"),
    lambda o: (o / "large.bin").open("wb").truncate(2**22),
    lambda o: with_resource(o, POLICY),
    lambda o: with_resource(o, POLICY | {"spec": None}),
    lambda o: with_resource(o, "{apiVersion: v1, kind: ConfigMap, metadata: {name: x}, data: {a: 2026-99-99, b: =}}"),
], ids=["null keys", "null patches", "kustomization.yml", "dead link", "link loop", "FIFO", "large file",
        "policy without policyTypes", "policy without spec", "what PyYAML cannot read"])
def test_an_overlay_that_kustomize_takes_is_checked(
        tmp_path: Path, caplog: pytest.LogCaptureFixture, edit: Callable[[Path], object]) -> None:
    overlay = copy(tmp_path)
    edit(overlay)
    kustomization.check(overlay)
    assert "not checked" not in caplog.text


def with_resource(overlay: Path, manifest: Manifest | str) -> None:
    (overlay / "more.yaml").write_text(manifest if isinstance(manifest, str) else yaml.safe_dump(manifest))
    edited(overlay, resources=["more.yaml"])


def test_data_too_large_for_a_config_map_is_one_line(tmp_path: Path) -> None:
    overlay = copy(tmp_path)
    data = overlay / "dataset.jsonl"
    data.write_bytes(data.read_bytes() * 40)
    pipeline = overlay / "pipeline.yaml"
    pipeline.write_text(pin.set_value(pipeline.read_text(), ["dataset", "sha256"], sha256_of(data)))
    with pytest.raises(UserError, match="have 2[0-9]{6} bytes in total, and a ConfigMap holds 1048576") as caught:
        check.run(overlay)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("key", ["bases", "transformers"])
def test_a_folder_under_another_key_does_not_hide_a_patch_without_effect(tmp_path: Path, key: str) -> None:
    overlay = edited(copy(tmp_path), patches=[JOBS | {"target": {"kind": "CronJob"}}])
    more = overlay.parent / "more"
    more.mkdir()
    (more / "kustomization.yaml").write_text("resources: [it.yaml]\n")
    (more / "it.yaml").write_text(yaml.safe_dump(POLICY if key == "bases" else {
        "apiVersion": "builtin", "kind": "AnnotationsTransformer", "metadata": {"name": "a"},
        "annotations": {"a": "b"}, "fieldSpecs": [{"path": "metadata/annotations", "create": True}]}))
    values: dict[str, list[Manifest | str]] = {key: ["../more"]}
    edited(overlay, **values)
    with pytest.raises(UserError, match="of {kind: CronJob} has no effect"):
        kustomization.check(overlay)


def test_a_patch_in_the_old_form_without_effect_is_an_error(tmp_path: Path) -> None:
    target: Manifest = {"group": "batch", "version": "v1", "kind": "Job", "name": "nobody"}
    overlay = edited(copy(tmp_path), patchesJson6902=[JOBS | {"target": target}])
    with pytest.raises(UserError, match=r"the patch patchesJson6902\[0\] of {.*name: nobody} has no effect"):
        kustomization.check(overlay)


def test_an_overlay_that_cannot_be_copied_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    overlay = copy(tmp_path)
    (overlay / "linked").symlink_to("../gpu/autoscaling")
    edited(overlay, components=["linked"])
    kustomization.check(overlay)
    assert "its patches and names are not checked" in caplog.text


def test_a_kustomization_that_is_no_file_is_an_error(tmp_path: Path) -> None:
    overlay = copy(tmp_path)
    (overlay / "kustomization.yaml").unlink()
    (overlay / "kustomization.yaml").mkdir()
    with pytest.raises(UserError, match=r"has no kustomization.yaml"):
        check.run(overlay)


def test_what_cannot_be_rendered_is_an_error_of_check(tmp_path: Path) -> None:
    overlay = edited(copy(tmp_path), patches=[{"path": "absent.yaml"}])
    with pytest.raises(UserError, match="does not render: .*absent.yaml"):
        check.run(overlay)
