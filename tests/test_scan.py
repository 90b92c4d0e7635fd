"""A security scanner, checkov, finds nothing in what is applied but what .checkov.yaml leaves out with a reason."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.manifests import CHECKOUT, Manifest, by_name, of_kind
from tests.renderings import NAMES, rendered

# In a virtual environment of its own: its dependencies and vLLM's cannot be installed together.
CHECKOV = CHECKOUT / ".venv-checkov" / "bin" / "checkov"
CONFIG = CHECKOUT / ".checkov.yaml"
DOCKERFILES = sorted(CHECKOUT.glob("*/Dockerfile"))
SKIPPED = set(yaml.safe_load(CONFIG.read_text())["skip-check"])

# In a pod's spec: where, what is put there (None: it is removed), and the check that finds it.
WEAKENED: dict[str, tuple[str, Any, str]] = {
    "privileged": ("containers.0.securityContext.privileged", True, "CKV_K8S_16"),
    "escalation": ("containers.0.securityContext.allowPrivilegeEscalation", None, "CKV_K8S_20"),
    "writable": ("containers.0.securityContext.readOnlyRootFilesystem", None, "CKV_K8S_22"),
    "capabilities": ("containers.0.securityContext.capabilities", None, "CKV_K8S_37"),
    "no-context": ("containers.0.securityContext", None, "CKV_K8S_30"),
    "root": ("securityContext", {}, "CKV_K8S_23"),
    "low-user": ("securityContext.runAsUser", 1000, "CKV_K8S_40"),
    "unconfined": ("securityContext.seccompProfile", None, "CKV_K8S_31"),
    "host-network": ("hostNetwork", True, "CKV_K8S_19"),
    "token": ("automountServiceAccountToken", None, "CKV_K8S_38"),
    "memory": ("containers.0.resources.limits", None, "CKV_K8S_13"),
    "latest": ("containers.0.image", "lora-gitops-jobs:latest", "CKV_K8S_14"),
}

Finding = tuple[str, str, str]  # file, resource and check, e.g. overlays-kind.yaml Job.lora-gitops.NAME CKV_K8S_11


@dataclass(frozen=True)
class Scan:
    """What checkov said about one folder."""

    failed: set[Finding]
    passed: set[Finding]


def scan(folder: Path, config: Path) -> Scan:
    """Scan the manifests and Dockerfiles of a folder, without a network."""
    if not CHECKOV.is_file():
        pytest.fail(f"{CHECKOV.relative_to(CHECKOUT)} is missing, so nothing was scanned. Install it: make scan")
    home = folder.parent  # without the settings and the API key that somebody may have in theirs
    done = subprocess.run(
        [CHECKOV, "--directory", folder, "--config-file", config, "--framework", "kubernetes", "--framework",
         "dockerfile", "--skip-download", "--compact", "--output", "json"],
        cwd=home, env={"PATH": os.environ["PATH"], "HOME": str(home)}, capture_output=True, text=True, timeout=300,
        check=False)
    assert done.returncode in (0, 1), f"checkov failed:\n{done.stderr[-3000:]}"
    found: dict[str, set[Finding]] = {"failed_checks": set(), "passed_checks": set()}
    for report in json.loads(done.stdout):
        assert not report["results"]["parsing_errors"], report["results"]["parsing_errors"]
        for key, findings in found.items():
            findings |= {(c["file_path"].strip("/"), c["resource"], c["check_id"]) for c in report["results"][key]}
    return Scan(found["failed_checks"], found["passed_checks"])


def scannable(manifests: list[Manifest]) -> list[Manifest]:
    """The documents, and each Job of a JobSet as one of its own: checkov does not look into JobSets."""
    return manifests + [
        {"apiVersion": "batch/v1", "kind": "Job", "spec": job["template"]["spec"],
         "metadata": jobset["metadata"] | {"name": f"{jobset['metadata']['name']}-{job['name']}"}}
        for jobset in of_kind(manifests, "JobSet") for job in jobset["spec"]["replicatedJobs"]]


def workloads(manifests: list[Manifest]) -> set[str]:
    """As checkov names them."""
    return {f"{m['kind']}.{m['metadata']['namespace']}.{m['metadata']['name']}" for m in manifests
            if m["kind"] in ("Job", "Deployment")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that is applied, the Dockerfiles, and weakened workloads that must be found."""
    folder = tmp_path_factory.mktemp("scan") / "everything"
    folder.mkdir()
    for file in DOCKERFILES:
        (folder / file.parent.name).mkdir()
        shutil.copy(file, folder / file.parent.name)
    write(folder / "weakened.yaml", weakened())
    written: list[Manifest] = []
    for name in NAMES:
        new = [m for m in rendered(name) if m not in written]  # options change little: what is the same is scanned once
        write(folder / f"{name.replace('/', '-').replace(' ', '-')}.yaml", new)
        written += new
    return folder


def write(file: Path, manifests: list[Manifest]) -> None:
    file.write_text("\n---\n".join(json.dumps(m, indent=1) for m in scannable(manifests)))  # JSON is YAML, written fast


def test_the_scanner_finds_what_is_weakened_and_nothing_else_but_what_the_config_leaves_out(folder: Path) -> None:
    failed = scan(folder, CONFIG).failed
    assert {finding for finding in failed if finding[0] != "weakened.yaml"} == set()
    found = {(resource, check) for _, resource, check in failed}
    for name, (_, _, check) in WEAKENED.items():
        assert (f"Deployment.somewhere.{name}", check) in found
        assert (f"Job.somewhere.{name}-job", check) in found  # of the JobSet of that name


def test_the_scanner_sees_every_pod_and_image_and_nothing_is_left_out_in_vain(folder: Path) -> None:
    """Without the config, exactly what it leaves out is found: no line of it hides what is not there."""
    (folder.parent / "empty.yaml").write_text("{}")
    result = scan(folder, folder.parent / "empty.yaml")
    assert {check for file, _, check in result.failed if file != "weakened.yaml"} == SKIPPED
    seen = {resource for _, resource, _ in result.passed}
    assert set().union(*(workloads(scannable(rendered(name))) for name in NAMES)) <= seen
    assert {f"{file.parent.name}/Dockerfile" for file in DOCKERFILES} <= {file for file, _, _ in result.passed}


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda p: p.parent.name)
def test_every_base_image_has_a_version(file: Path) -> None:
    """What checkov cannot see, because it does not follow build arguments."""
    text = file.read_text()
    defaults = dict(re.findall(r"^ARG (\w+)=(\S+)$", text, re.MULTILINE))
    stages = set(re.findall(r"^FROM \S+ AS (\S+)$", text, re.MULTILINE))
    images = {re.sub(r"\$\{(\w+)\}", lambda m: defaults[m[1]], image)
              for image in re.findall(r"^FROM (\S+)", text, re.MULTILINE)} - stages
    assert images
    for image in images:
        assert re.search(r":.*\d", image), f"{image}: which version?"


def weakened() -> list[Manifest]:
    """TensorBoard once for each of WEAKENED, as a Deployment and in a JobSet."""
    deployment = by_name(rendered("overlays/kind"), "Deployment")["tensorboard"]
    documents = []
    for name, (path, value, _) in WEAKENED.items():
        template = weaken(deployment["spec"]["template"], path, value)
        metadata = {"name": name, "namespace": "somewhere"}
        jobs = [{"name": "job", "template": {"spec": {"template": template}}}]
        documents += [deployment | {"metadata": metadata, "spec": deployment["spec"] | {"template": template}},
                      {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": metadata,
                       "spec": {"replicatedJobs": jobs}}]
    return documents


def weaken(template: Manifest, path: str, value: Any) -> Manifest:
    template = deepcopy(template)
    *parents, last = path.split(".")
    node = template["spec"]
    for key in parents:
        node = node[int(key) if key.isdigit() else key]
    if value is None:
        del node[last]
    else:
        node[last] = value
    return template
