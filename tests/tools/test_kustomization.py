"""Promises of the check of an overlay's kustomization: what kustomize ignores in silence is found before the push."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from jobs.core import environment
from jobs.core.errors import UserError
from jobs.core.files import sha256_of
from jobs.tools import check, kustomization, overlay, pin, pods
from tests import build_overlay, build_pipeline
from tests.build_signing import pair
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


def out_of_reach(folder: Path) -> list[str]:
    files = overlay.load(folder)
    return list(kustomization.sources_out_of_reach(folder, render(folder), files.environment, files.adapters))


def test_a_source_that_no_job_may_reach_is_an_error(tmp_path: Path) -> None:
    """A copy of overlays/kind for a model from the hub: relocation would try for an hour."""
    folder = copy(tmp_path)
    file = folder / "environment.yaml"
    hub = f"source: hf://HuggingFaceTB/SmolLM2-135M-Instruct\n  revision: {build_pipeline.COMMIT}\n"
    file.write_text(file.read_text().replace("source: builtin:tiny\n", hub))
    found = out_of_reach(folder)
    assert [line.partition(" reach nothing, but it must fetch hf://")[0].rpartition(" ")[2] for line in found] == [
        "model-relocation", "tokenizer-relocation"]
    text = (folder / "kustomization.yaml").read_text()
    (folder / "kustomization.yaml").write_text(text.replace("# - ../../base/egress ", "- ../../base/egress "))
    assert out_of_reach(folder) == []


def test_private_data_in_git_beside_an_open_network_is_warned_of(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = copy(tmp_path)
    file = folder / "kustomization.yaml"
    for option in ("egress ", "egress/models-only "):
        file.write_text(file.read_text().replace(f"# - ../../base/{option}", f"- ../../base/{option}"))
        caplog.clear()
        assert out_of_reach(folder) == []
        assert ("List the component base/egress/models-only" in caplog.text) == (option == "egress ")


def test_signatures_without_a_key_for_the_stages_are_an_error_before_the_push(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = copy(tmp_path)
    signed = yaml.safe_dump({"signing": {"public_keys": [pair().public]}})
    file, text = folder / "environment.yaml", (folder / "environment.yaml").read_text()

    def problems() -> list[str]:
        loaded = environment.load(folder)
        return list(kustomization.stages_without_key(folder, pods.render(folder), loaded, {}))

    assert problems() == []
    file.write_text(text + signed)
    (problem,) = problems()
    assert problem.startswith(f"{file}: asks for signatures (signing), but ")
    assert "model-evaluation, model-training have no key" in problem
    listing = (folder / "kustomization.yaml").read_text()
    (folder / "kustomization.yaml").write_text(listing.replace("# - ../../base/signing ", "- ../../base/signing "))
    assert problems() == []
    assert not caplog.text
    file.write_text(text)
    assert problems() == []
    assert "names no public key" in caplog.text


def test_a_patch_of_jobs_works_where_there_are_jobs(tmp_path: Path) -> None:
    kustomization.check(edited(copy(tmp_path), patches=[JOBS]))


@pytest.mark.parametrize("place", [".", "cpu", "adapters/seville-hotels"])
def test_a_patch_that_matches_nothing_is_an_error_of_check(tmp_path: Path, place: str) -> None:
    folder = copy(tmp_path)
    edited(folder / place, patches=[JOBS | {"target": {"kind": "CronJob"}}])
    with pytest.raises(UserError) as caught:
        check.run(folder)
    (line,) = str(caught.value).splitlines()
    file = (folder / place / "kustomization.yaml").resolve()
    assert line.startswith(f"{file}: the patch patches[")
    assert "of {kind: CronJob} has no effect" in line


def test_a_patch_that_is_undone_later_is_an_error_too(tmp_path: Path) -> None:
    folder = copy(tmp_path)
    image = {"op": "replace", "path": "/spec/template/spec/containers/0/image", "value": "mine"}
    deployment = {"kind": "Deployment", "name": "tensorboard"}
    for value in ("mine", "yours"):
        edited(folder, patches=[{"target": deployment, "patch": yaml.safe_dump([image | {"value": value}])}])
    with pytest.raises(UserError, match=r"patches\[0\] of {kind: Deployment, name: tensorboard} has no effect"):
        kustomization.check(folder)


def test_an_overlay_whose_jobs_do_not_follow_the_pipeline_is_an_error(tmp_path: Path) -> None:
    """kustomize renders it, and the cluster would refuse the next edit of pipeline.yaml."""
    folder = build_overlay.edit(copy(tmp_path).parent / "kind-smollm2",
                                 lambda content: content["components"].remove("../../base/metadata"))
    with pytest.raises(UserError, match="pipeline.yaml: its next change would change Job model-training-seville-"):
        kustomization.check(folder)


def test_a_further_config_map_of_a_job_must_keep_its_name(tmp_path: Path) -> None:
    folder = copy(tmp_path)
    (folder / "ca.crt").write_text("certificates")
    edited(folder, patches=[AUTHORITY], configMapGenerator=[{"name": "authority", "files": ["ca.crt"]}])
    with pytest.raises(UserError, match="ca.crt: its next change would change Job dataset-relocation-"):
        kustomization.check(folder)


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
    folder = copy(tmp_path)
    edit(folder)
    kustomization.check(folder)
    assert "not checked" not in caplog.text


def with_resource(folder: Path, manifest: Manifest | str) -> None:
    (folder / "more.yaml").write_text(manifest if isinstance(manifest, str) else yaml.safe_dump(manifest))
    edited(folder, resources=["more.yaml"])


def test_data_too_large_for_a_config_map_is_one_line(tmp_path: Path) -> None:
    folder = copy(tmp_path)
    data = folder / "adapters/seville-hotels/dataset.jsonl"
    data.write_bytes(data.read_bytes() * 40)
    pipeline = data.with_name("pipeline.yaml")
    pipeline.write_text(pin.set_value(pipeline.read_text(), ["dataset", "sha256"], sha256_of(data)))
    with pytest.raises(UserError, match="have 2[0-9]{6} bytes in total, and a ConfigMap holds 1048576") as caught:
        check.run(folder)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("key", ["bases", "transformers"])
def test_a_folder_under_another_key_does_not_hide_a_patch_without_effect(tmp_path: Path, key: str) -> None:
    folder = edited(copy(tmp_path), patches=[JOBS | {"target": {"kind": "CronJob"}}])
    more = folder.parent / "more"
    more.mkdir()
    (more / "kustomization.yaml").write_text("resources: [it.yaml]\n")
    (more / "it.yaml").write_text(yaml.safe_dump(POLICY if key == "bases" else {
        "apiVersion": "builtin", "kind": "AnnotationsTransformer", "metadata": {"name": "a"},
        "annotations": {"a": "b"}, "fieldSpecs": [{"path": "metadata/annotations", "create": True}]}))
    values: dict[str, list[Manifest | str]] = {key: ["../more"]}
    edited(folder, **values)
    with pytest.raises(UserError, match="of {kind: CronJob} has no effect"):
        kustomization.check(folder)


def test_a_patch_in_the_old_form_without_effect_is_an_error(tmp_path: Path) -> None:
    target: Manifest = {"group": "batch", "version": "v1", "kind": "Job", "name": "nobody"}
    folder = edited(copy(tmp_path), patchesJson6902=[JOBS | {"target": target}])
    with pytest.raises(UserError, match=r"the patch patchesJson6902\[0\] of {.*name: nobody} has no effect"):
        kustomization.check(folder)


def test_an_overlay_that_cannot_be_copied_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = copy(tmp_path)
    (folder / "linked").symlink_to("../gpu/autoscaling")
    edited(folder, components=["linked"])
    kustomization.check(folder)
    assert "its patches and names are not checked" in caplog.text


def test_a_kustomization_that_is_no_file_is_an_error(tmp_path: Path) -> None:
    folder = copy(tmp_path)
    (folder / "kustomization.yaml").unlink()
    (folder / "kustomization.yaml").mkdir()
    with pytest.raises(UserError, match=r"has no kustomization.yaml"):
        check.run(folder)


@pytest.mark.parametrize(("manifest", "message"), [
    ("{kind: Job, spec: {template: {spec: {containers: [{name: c}]}}}}", None),  # labels are no duty
    ("{kind: Job, spec: {template: {metadata: null, spec: {containers: [{name: c}]}}}}", None),
    ("{kind: SealedSecret, spec: {template: {type: Opaque}}}", None),  # no pod's
    ("{kind: Job, spec: {template: {spec: {}}}}", "mine: its manifest lacks `containers`; `kubectl explain Job`"),
    ("{kind: Job, spec: {template: {spec: {containers: []}}}}", "mine: its pod has no containers; `kubectl explain"),
    ("{kind: Deployment, spec: {template: null}}", "mine: its manifest is not as Kubernetes has it "),
    ("{kind: CronJob, spec: {schedule: '0 0 * * *'}}", "mine: its manifest lacks `jobTemplate`; `kubectl explain"),
    ("{kind: JobSet, spec: {replicatedJobs: [{name: x}]}}", "mine: its manifest lacks `template`; `kubectl explain"),
])
def test_a_workload_of_ones_own_is_taken_or_refused_in_one_line(tmp_path: Path, manifest: str, message: str | None
                                                                ) -> None:
    content = {"apiVersion": "batch/v1", "metadata": {"name": "mine"}, **yaml.safe_load(manifest)}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "kustomization.yaml").write_text("resources: [mine.yaml]\n")
    if message is None:
        kustomization.check(tmp_path)
    else:
        with pytest.raises(UserError) as error:
            kustomization.check(tmp_path)
        assert str(error.value).startswith(message)
        assert "\n" not in str(error.value)


def test_what_cannot_be_rendered_is_an_error_of_check(tmp_path: Path) -> None:
    folder = edited(copy(tmp_path), patches=[{"path": "absent.yaml"}])
    with pytest.raises(UserError, match="does not render: .*absent.yaml"):
        check.run(folder)


def test_an_adapter_whose_jobs_do_not_follow_its_files_is_an_error(tmp_path: Path) -> None:
    overlay = build_overlay.build(tmp_path, "boats")
    build_overlay.edit(overlay / "adapters/boats", lambda content: content.pop("components"))
    with pytest.raises(UserError, match="boats/pipeline.yaml: its next change would change Job .*-boats-") as raised:
        kustomization.check(overlay)
    assert "seville" not in str(raised.value)
    assert "base/adapter/names" in str(raised.value)
    kustomization.check(overlay, only="seville-hotels")


def test_a_patch_of_one_adapter_is_checked_in_its_folder_and_in_the_overlays(tmp_path: Path) -> None:
    """Adapters that render alike are checked once; a patch that concerns one of them makes no difference."""
    overlay = build_overlay.build(tmp_path, "boats", "trains")
    edited(overlay / "adapters/trains", patches=[JOBS])
    edited(overlay, patches=[JOBS | {"target": {"kind": "Job", "name": "model-training-boats"}}])
    kustomization.check(overlay)
    nobody: Manifest = {"target": {"kind": "Job", "name": "nobody"}}
    edited(overlay / "adapters/trains", patches=[JOBS | nobody])
    edited(overlay, patches=[JOBS | nobody])
    with pytest.raises(UserError) as raised:
        kustomization.check(overlay)
    found = str(raised.value).splitlines()
    assert [line.partition(" has no effect")[0].removeprefix(f"{overlay.resolve()}/") for line in found] == [
        "kustomization.yaml: the patch patches[1] of {kind: Job, name: nobody}",
        "adapters/trains/kustomization.yaml: the patch patches[1] of {kind: Job, name: nobody}"]


def test_adapters_that_render_alike_are_edited_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rendering grows with the square of the number of adapters: 50 of them must not be rendered 100 times."""
    overlay = build_overlay.build(tmp_path, *(f"team-{number}" for number in range(8)))
    renderings: list[int] = []
    real = pods.render

    def count(folder: Path) -> list[Manifest]:
        manifests = real(folder)
        renderings.append(sum(m["kind"] == "Job" and "model-training" in m["metadata"]["name"] for m in manifests))
        return manifests

    monkeypatch.setattr(pods, "render", count)
    kustomization.check(overlay)
    assert renderings.count(9) == 1, "as a whole, once"
    assert set(renderings) == {9, 1}
    assert len(renderings) < 10


@pytest.mark.parametrize("text", ["resources: [absent.yaml]\n", "resource: []\n", "[]", "\xff"])
def test_a_folder_that_does_not_render_is_named_and_the_others_are_checked(tmp_path: Path, text: str) -> None:
    overlay = build_overlay.build(tmp_path, "boats")
    edited(overlay, patches=[JOBS | {"target": {"kind": "CronJob"}}])
    (overlay / "adapters/boats/kustomization.yaml").write_text(text)
    with pytest.raises(UserError) as raised:
        kustomization.check(overlay)
    broken, patch = str(raised.value).splitlines()
    assert broken.startswith(f"{overlay}/adapters/boats: does not render: ")
    assert "of {kind: CronJob} has no effect" in patch
    kustomization.check(overlay, only="seville-hotels")


def test_a_name_may_be_as_long_as_kubernetes_allows(tmp_path: Path) -> None:
    """dataset-relocation-NAME-HASH is the longest."""
    kustomization.check(build_overlay.build(tmp_path, "a" * 33))


def test_a_name_too_long_for_a_job_is_one_line_with_the_limit(tmp_path: Path) -> None:
    overlay = build_overlay.build(tmp_path, "a" * 34, "b" * 63)
    with pytest.raises(UserError) as raised:
        kustomization.check(overlay)
    found = str(raised.value).splitlines()
    assert len(found) == 2
    assert found[0].startswith(f"{overlay}/adapters/{'a' * 34}: the adapter's name is too long: the Job "
                               f"dataset-relocation-{'a' * 34}-")
    assert "would have a name of 64 characters, and Kubernetes allows 63. Here" in found[0]
    assert found[0].endswith("an adapter's name has at most 33 characters")
    kustomization.check(overlay, only="seville-hotels")


@pytest.mark.parametrize(("spec", "longest"), [
    ({}, 64 - len("set--x-0")),
    ({"completionMode": "Indexed", "completions": 1}, 64 - len("set--x-0-0-abcde")),
    ({"completionMode": "Indexed", "completions": 11}, 64 - len("set--x-0-10-abcde")),
])
def test_a_name_too_long_for_what_a_job_set_makes_is_found(spec: Manifest, longest: int) -> None:
    """JobSet refuses names of its Jobs and pods that are too long, as its webhook computes them."""
    def found(length: int) -> list[str]:
        metadata = {"name": f"set-{'n' * length}", "labels": {"app.kubernetes.io/instance": "n" * length}}
        job_set: Manifest = {"kind": "JobSet", "metadata": metadata,
                             "spec": {"replicatedJobs": [{"name": "x", "template": {"spec": spec}}]}}
        return list(kustomization.names_too_long(Path("o"), [job_set]))

    assert found(longest - 1) == []
    assert f"at most {longest - 1} characters" in found(longest)[0]


def test_sources_of_each_adapter_must_be_in_reach(tmp_path: Path) -> None:
    overlay = build_overlay.build(tmp_path, "boats")
    file = overlay / "adapters/boats/pipeline.yaml"
    file.write_text(file.read_text().replace("file:dataset.jsonl", "https://example.com/boats.jsonl"))
    (line,) = out_of_reach(overlay)
    assert "let dataset-relocation of boats reach nothing, but it must fetch https://example.com/boats.jsonl" in line


def test_a_kustomization_that_includes_itself_ends(tmp_path: Path) -> None:
    overlay = edited(copy(tmp_path), components=["."])
    with pytest.raises(UserError, match="does not render"):
        check.run(overlay)
