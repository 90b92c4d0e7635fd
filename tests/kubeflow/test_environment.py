"""Promises of kubeflow/environment and kubeflow/tensorboard: what docs/kubeflow.md says to apply is valid, has what the
steps of a pipeline need, and fits a KubeFlow profile."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.kubeflow.environment import compile_all
from tests.manifests import CHECKOUT, Manifest, copy, of_kind, pod_templates, render, restricted_violations, unhashed
from tests.validation import problems

PAGE = CHECKOUT / "docs" / "kubeflow.md"


def overlay(folder: Path, on: str = "kind", *, tensorboard: bool = True) -> list[Manifest]:
    """The overlay that the page describes, on another one of this project."""
    place = copy(folder).parent / "team-a"
    shutil.copytree(CHECKOUT / "kubeflow", folder / "kubeflow",
                    ignore=shutil.ignore_patterns("*.py", "*.ipynb", "__pycache__"))
    place.mkdir()
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text().partition("2. Apply it")[0], re.DOTALL)
    text = re.sub("^   ", "", text, flags=re.MULTILINE).replace("../kind", f"../{on}")
    if not tensorboard:
        text = text.replace("- ../../kubeflow/tensorboard\n", "")
    (place / "kustomization.yaml").write_text(text)
    return render(place)


@pytest.mark.parametrize("on", ["kind", "gpu"])
def test_an_environment_for_a_pipeline_has_all_but_the_stages(tmp_path: Path, on: str) -> None:
    manifests, whole = overlay(tmp_path, on), render(CHECKOUT / "overlays" / on)
    assert {f"{m['kind']} {m['metadata']['name']}": found for m in manifests if (found := problems(m))} == {}
    assert {m["metadata"]["namespace"] for m in manifests} == {"team-a"}
    assert [unhashed(job) for job in of_kind(manifests, "Job")] == ["volumes"]
    kinds = {m["kind"] for m in manifests}
    assert not kinds & {"Namespace", "JobSet"}
    gone = {(m["kind"], m["metadata"]["name"]) for m in whole} - {(m["kind"], m["metadata"]["name"]) for m in manifests}
    assert {kind for kind, name in gone if name != "tensorboard"} <= {"Job", "JobSet", "Namespace"}
    assert {name for kind, name in gone if kind == "ConfigMap"} == set()  # the hashes too: the steps mount them


def test_its_pods_fit_a_profile(tmp_path: Path) -> None:
    manifests = overlay(tmp_path, tensorboard=False)
    templates = pod_templates(manifests)
    assert {name.partition("/")[0] for name in templates} == {"Deployment", "Job"}
    for name, template in templates.items():
        assert template["metadata"]["labels"]["sidecar.istio.io/inject"] == "false", name
        assert restricted_violations(template) == [], name
    assert "Deployment/tensorboard" in templates


def test_only_its_own_pods_lose_their_network(tmp_path: Path) -> None:
    """The namespace also has notebooks and pods of KubeFlow. Steps have the labels of their Jobs."""
    manifests = overlay(tmp_path)
    policies = {m["metadata"]["name"]: m["spec"]["podSelector"] for m in of_kind(manifests, "NetworkPolicy")}
    own = {"app.kubernetes.io/part-of": "lora-gitops"}
    assert policies["default-deny"] == {"matchLabels": own}
    assert policies["kubeflow-pipelines"]["matchLabels"].items() > own.items()
    assert all(policies.values())
    (board,) = of_kind(manifests, "Tensorboard")  # whose labels its pods get
    jobsets = of_kind(render(CHECKOUT / "overlays" / "gpu"), "JobSet")
    for pod in (*pod_templates([*manifests, *jobsets]).values(), board):
        assert pod["metadata"]["labels"].items() >= own.items()


def test_every_volume_is_made_writable_for_the_user_of_the_steps(tmp_path: Path) -> None:
    manifests = overlay(tmp_path)
    (job,) = of_kind(manifests, "Job")
    pod = job["spec"]["template"]["spec"]
    mounted = {v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"]}
    assert mounted == {claim["metadata"]["name"] for claim in of_kind(manifests, "PersistentVolumeClaim")}
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    for stage in of_kind(render(CHECKOUT / "overlays" / "kind"), "Job"):
        of_stage = stage["spec"]["template"]["spec"]
        assert of_stage["securityContext"] == pod["securityContext"]
        assert of_stage["containers"][0]["image"] == pod["containers"][0]["image"]


def test_kubeflows_tensorboard_replaces_ours(tmp_path: Path) -> None:
    manifests = overlay(tmp_path)
    (board,) = of_kind(manifests, "Tensorboard")
    claim, _, path = board["spec"]["logspath"].removeprefix("pvc://").partition("/")
    assert claim in {c["metadata"]["name"] for c in of_kind(manifests, "PersistentVolumeClaim")}
    assert path == ""  # a missing folder would be made as root
    assert not [m for m in manifests if m["metadata"]["name"] == "tensorboard"]
    (policy,) = [m for m in of_kind(manifests, "NetworkPolicy") if m["metadata"]["name"] == "trainings"]
    assert policy["spec"]["podSelector"]["matchLabels"] == {"app": board["metadata"]["name"]}


def test_the_page_explains_every_field_that_is_listed() -> None:
    explained = {name for row in re.findall(r"^\| (`.*?) \|", PAGE.read_text(), re.MULTILINE)
                 for name in re.findall(r"`([^`]+)`", row)}
    for result in compile_all([render(CHECKOUT / "overlays" / name) for name in ("kind", "gpu")]):
        assert len(result["unsupported"]) > 10
        for line in result["unsupported"]:
            path = line.partition(" (")[0]
            assert any(path == name or path.startswith(f"{name}.") for name in explained), line
