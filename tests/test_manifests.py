"""The manifests as `kubectl kustomize` renders them: valid, restricted, complete, and re-run exactly when they must."""

from __future__ import annotations

import functools
import ipaddress
import json
import re
import shutil
import tomllib
from collections.abc import Callable, Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.__main__ import parser
from jobs.core import imported, signing
from jobs.core.files import sha256_of
from jobs.tools.kustomization import selects
from serving import drain
from tests import renderings
from tests.manifests import (
    ADAPTER_JOBS,
    CHECKOUT,
    ENVIRONMENT_JOBS,
    Manifest,
    adapters,
    add_adapter,
    by_name,
    containers,
    copy,
    jobs_of,
    of_kind,
    pod_templates,
    quantity,
    render,
    restricted_violations,
)
from tests.validation import KUBERNETES, problems

KIND = CHECKOUT / "overlays" / "kind"
SERVING_ONLY = CHECKOUT / "overlays" / "kind-serving"
OVERLAYS = sorted(p.parent for p in (CHECKOUT / "overlays").glob("*/kustomization.yaml"))
PVCS = {f"{name}-pvc" for name in ("dataset", "base-model", "base-tokenizer", "reference-model", "fine-tuned-model")}

SEVILLE = Path("adapters") / "seville-hotels"

# As the README lists the stages: the arguments of each Job, the volumes it reads and the one it writes.
STAGES: dict[str, tuple[list[str], set[str], str]] = {
    "dataset-relocation": (["relocate", "dataset"], set(), "dataset"),
    "model-relocation": (["relocate", "base-model"], set(), "base-model"),
    "tokenizer-relocation": (["relocate", "tokenizer"], set(), "base-tokenizer"),
    "model-reference-relocation": (["relocate", "reference-model"], set(), "reference-model"),
    "dataset-encoding": (["encode"], {"base-tokenizer"}, "dataset"),
    "model-training": (["train"], {"dataset", "base-model", "base-tokenizer"}, "fine-tuned-model"),
    "model-evaluation": (["evaluate"], {"dataset", "base-model", "base-tokenizer", "reference-model"},
                         "fine-tuned-model"),
}

# Secrets that somebody has to make before the pods start (docs/operations.md); all others may be absent.
REQUIRED_SECRETS = {"gpu": {"serving-api-key"}}

rendered = functools.cache(render)  # the tests only read what it returns
every_overlay = pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda p: p.name)


def names(manifests: list[Manifest], kind: str) -> set[str]:
    return {m["metadata"]["name"] for m in of_kind(manifests, kind)}


def all_jobs(overlay: Path) -> set[str]:
    """The Jobs of an overlay without a JobSet: those of the environment and of each adapter."""
    return ENVIRONMENT_JOBS.union(*(jobs_of(adapter) for adapter in adapters(overlay)))


def instance(manifest: Manifest) -> str | None:
    """The adapter of which an object or a pod template is."""
    name: str | None = manifest["metadata"]["labels"].get("app.kubernetes.io/instance")
    return name


def stage(manifest: Manifest) -> str:
    """The name of a Job or of a pod's role, without adapter and hash."""
    name: str = manifest["metadata"]["labels"]["app.kubernetes.io/name"]
    return name


def mounts(container: Manifest) -> dict[str, Manifest]:
    return {m["mountPath"]: m for m in container.get("volumeMounts", [])}


def env(container: Manifest) -> dict[str, Any]:
    return {e["name"]: e.get("value", e.get("valueFrom")) for e in container.get("env", [])}


def write(file: Path, text: str) -> None:
    file.write_text(text)


def replace(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1, f"{file} has {text.count(old)} of {old!r}"
    file.write_text(text.replace(old, new))


# --- what is rendered ---------------------------------------------------------------------------------------------


@every_overlay
def test_nothing_is_rendered_twice_or_outside_the_namespace(overlay: Path) -> None:
    manifests = rendered(overlay)
    keys = [(m["kind"], m["metadata"]["name"]) for m in manifests]
    assert len(keys) == len(set(keys))
    namespace = names(manifests, "Namespace")
    assert len(namespace) == 1
    assert {m["metadata"]["namespace"] for m in manifests if m["kind"] != "Namespace"} == namespace


def assert_writes(manifest: Manifest, args: list[str], writes: str, reads: Iterable[str] = ()) -> Manifest:
    """The Job has this command, can write this volume, and has the others read-only; returns its container."""
    spec = manifest["spec"]["template"]["spec"]
    (job,) = spec["containers"]
    assert (job["command"], job["args"]) == (["python", "-m", "jobs"], args)
    claims = {v["name"]: v["persistentVolumeClaim"]["claimName"] for v in spec["volumes"]
              if "persistentVolumeClaim" in v}
    assert set(claims) == {*reads, writes}
    for volume, claim in claims.items():
        assert claim == f"{volume}-pvc"
        mount = mounts(job)[f"/volumes/{volume}"]
        assert (mount["name"], mount.get("readOnly", False)) == (volume, volume != writes)
    return dict(job)


def test_the_stages_are_the_jobs_of_the_design() -> None:
    """Each Job runs its stage, reads its inputs read-only and can write its own volume alone."""
    manifests = rendered(KIND)
    jobs = by_name(manifests, "Job")
    assert STAGES.keys() == ENVIRONMENT_JOBS | ADAPTER_JOBS
    assert jobs.keys() == all_jobs(KIND)
    assert names(manifests, "PersistentVolumeClaim") == PVCS
    for name, manifest in jobs.items():
        args, reads, writes = STAGES[stage(manifest)]
        job = assert_writes(manifest, args, writes, reads)
        config = {path for path in mounts(job) if path.startswith("/etc/")}
        assert config == {"/etc/lora-gitops"} | ({"/etc/pipeline"} if stage(manifest) in ADAPTER_JOBS else set()), name
        assert all(mounts(job)[path]["readOnly"] for path in config)


def test_an_overlay_that_only_serves_has_no_other_jobs() -> None:
    """It fetches base model, tokenizer and adapters; nothing in it trains, evaluates, or reads private data."""
    manifests = rendered(SERVING_ONLY)
    jobs = by_name(manifests, "Job")
    assert jobs.keys() == {"model-relocation", "tokenizer-relocation", "adapter-relocation-seville-hotels"}
    assert names(manifests, "Deployment") == {"model-inference"}
    assert_writes(jobs["adapter-relocation-seville-hotels"], ["relocate", "adapter"], "fine-tuned-model")


def test_an_imported_adapter_can_be_evaluated_where_it_is_served(tmp_path: Path) -> None:
    """With a component: its data is fetched and encoded, and its gate decides. It is not trained."""
    overlay = copy(tmp_path)
    folder = overlay.parent / "kind-serving" / "adapters" / "seville-hotels"
    for name in ("dataset.jsonl", "hotel-facts.jsonl"):
        shutil.copy(overlay / SEVILLE / name, folder)
    replace(folder / "kustomization.yaml", "files: [pipeline.yaml]", "files: [pipeline.yaml, dataset.jsonl]")
    replace(folder / "kustomization.yaml", "# - ../../../../base/imported", "- ../../../../base/imported")
    replace(folder.parents[1] / "kustomization.yaml", "- ../../base/serving-only\n", "")
    jobs = by_name(render(folder.parents[1]), "Job")
    assert jobs.keys() == ENVIRONMENT_JOBS | {f"{job}-seville-hotels" for job in (
        "adapter-relocation", "dataset-relocation", "dataset-encoding", "model-evaluation")}
    (job,) = jobs["model-evaluation-seville-hotels"]["spec"]["template"]["spec"]["containers"]
    assert mounts(job)["/etc/pipeline"]


@every_overlay
def test_what_belongs_to_an_adapter_says_to_which(overlay: Path) -> None:
    """By the recommended label, on the object and on its pods; what all adapters share has no such label."""
    named = set()
    for manifest in rendered(overlay):
        own = next((name for name in adapters(overlay) if re.search(rf"-{name}(-[a-z0-9]{{10}})?$",
                                                                    manifest["metadata"]["name"])), None)
        assert instance(manifest) == own, manifest["metadata"]["name"]
        named.add(own)
        for title, template in pod_templates([manifest]).items():
            assert instance(template) == own, title
    assert named == {None, *adapters(overlay)}


def test_every_job_command_is_one_that_the_program_knows() -> None:
    for name, template in pod_templates(rendered(KIND)).items():
        for container in containers(template):
            if container["command"] == ["python", "-m", "jobs"]:
                assert parser().parse_args(container["args"]).command, name


@every_overlay
def test_the_volumes_outlive_argo_cd_and_its_application(overlay: Path) -> None:
    """Neither a volume nor the namespace around it is ever removed by a sync or with the Application."""
    kept = [m for m in rendered(overlay) if m["kind"] in ("PersistentVolumeClaim", "Namespace")]
    assert {m["metadata"]["name"] for m in kept if m["kind"] == "PersistentVolumeClaim"} == (
        PVCS - {"dataset-pvc", "reference-model-pvc"} if overlay == SERVING_ONLY else PVCS)
    assert [m["kind"] for m in kept].count("Namespace") == 1
    for manifest in kept:
        options = manifest["metadata"]["annotations"]["argocd.argoproj.io/sync-options"].split(",")
        assert {"Prune=false", "Delete=false"} <= set(options)
        assert manifest["metadata"]["annotations"]["kustomize.toolkit.fluxcd.io/prune"] == "disabled"


@pytest.mark.parametrize("name", renderings.NAMES)
def test_every_object_says_what_it_is_of(name: str) -> None:
    """The recommended labels, on the objects. Not in pod templates: a new version must not replace pods by itself."""
    version = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["version"]
    for manifest in renderings.rendered(name):
        labels = manifest["metadata"]["labels"]
        title = f"{manifest['kind']} {manifest['metadata']['name']}"
        assert labels["app.kubernetes.io/name"], title
        assert labels["app.kubernetes.io/part-of"] == "lora-gitops", title
        assert labels["app.kubernetes.io/managed-by"] == "kustomize", title
        assert labels["app.kubernetes.io/version"] == version, title
    workloads = [m for m in renderings.rendered(name) if m["kind"] != "ApplicationSet"]  # whose template is of no pod
    for title, template in pod_templates(workloads).items():
        assert template["metadata"]["labels"].keys() - {"app.kubernetes.io/instance"} == {
            f"app.kubernetes.io/{key}" for key in ("name", "component", "part-of")}, title
    for manifest in renderings.rendered(name):
        if manifest["kind"] in ("Job", "Deployment"):
            assert (manifest["metadata"]["labels"]["app.kubernetes.io/name"]
                    == manifest["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/name"])


@every_overlay
def test_every_reference_resolves(overlay: Path) -> None:
    """ConfigMaps, claims and accounts exist; mounts have volumes and volumes mounts; Secrets may be absent."""
    manifests = rendered(overlay)
    for name, template in pod_templates(manifests).items():
        spec = template["spec"]
        assert spec["serviceAccountName"] in names(manifests, "ServiceAccount"), name
        volumes = {v["name"]: v for v in spec["volumes"]}
        used = {m["name"] for c in containers(template) for m in c["volumeMounts"]}
        assert used == set(volumes), name
        for volume in volumes.values():
            if "configMap" in volume:
                assert volume["configMap"]["name"] in names(manifests, "ConfigMap"), name
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in names(manifests, "PersistentVolumeClaim"), name
        for container in containers(template):
            for variable in env(container).values():
                if "secretKeyRef" in variable:
                    reference = variable["secretKeyRef"]
                    assert reference.get("optional") or reference["name"] in REQUIRED_SECRETS[overlay.name], name


@every_overlay
def test_pods_that_share_one_node_volumes_are_kept_on_one_node(overlay: Path) -> None:
    """A ReadWriteOnce volume cannot follow its pods to several nodes: they would hang with "Multi-Attach error"."""
    manifests = rendered(overlay)
    modes = {mode for c in of_kind(manifests, "PersistentVolumeClaim") for mode in c["spec"]["accessModes"]}
    if "ReadWriteOnce" not in modes:
        return
    for name, template in pod_templates(manifests).items():
        terms = template["spec"]["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert [t["topologyKey"] for t in terms] == ["kubernetes.io/hostname"], name
        for other in pod_templates(manifests).values():  # itself too, or the first pod could go nowhere
            assert terms[0]["labelSelector"]["matchLabels"].items() <= other["metadata"]["labels"].items(), name


@every_overlay
def test_every_service_reaches_the_port_of_one_deployment(overlay: Path) -> None:
    manifests = rendered(overlay)
    services = {name: service for name, service in by_name(manifests, "Service").items()
                if service["spec"].get("clusterIP") != "None"}  # one without an address only gives pods names
    assert services.keys() == {"model-inference"} | (set() if overlay == SERVING_ONLY else {"tensorboard"})
    templates = pod_templates(manifests)
    for name, service in services.items():
        selected = [t for t in templates.values()
                    if service["spec"]["selector"].items() <= t["metadata"]["labels"].items()]
        assert selected == [templates[f"Deployment/{name}"]]
        ports = {p["name"] for c in selected[0]["spec"]["containers"] for p in c.get("ports", [])}
        assert {p["targetPort"] for p in service["spec"]["ports"]} <= ports


@every_overlay
def test_the_files_that_people_edit_are_where_the_programs_look(overlay: Path) -> None:
    """Each variable leads into a mounted ConfigMap. All Jobs have the environment, an adapter's also its pipeline with
    the data beside it, and the server has all of them by name."""
    manifests = rendered(overlay)
    config = by_name(manifests, "ConfigMap")
    environment = (overlay / "environment.yaml").read_text()
    pipelines = {name: (overlay / "adapters" / name / "pipeline.yaml").read_text() for name in adapters(overlay)}
    seen = set()
    for name, template in pod_templates(manifests).items():
        volumes = {v["name"]: v for v in template["spec"]["volumes"]}
        for container in containers(template):
            def data(folder: str, container: Manifest = container, volumes: Manifest = volumes) -> dict[str, str]:
                found: dict[str, str] = config[volumes[mounts(container)[folder]["name"]]["configMap"]["name"]]["data"]
                return found

            variables = env(container)
            if "PIPELINES" in variables:
                assert data(variables["PIPELINES"]) == {"environment.yaml": environment} | {
                    f"{adapter}.yaml": text for adapter, text in pipelines.items()}
                continue
            if "ENVIRONMENT_FILE" not in variables:
                assert name == "Deployment/tensorboard"
                continue
            folder, _, file = variables["ENVIRONMENT_FILE"].rpartition("/")
            assert data(folder) == {file: environment}, name
            adapter = instance(template)
            assert ("PIPELINE" in variables) == bool(adapter), name
            if adapter:
                folder, _, file = variables["PIPELINE"].rpartition("/")
                assert data(folder)[file] == pipelines[adapter], name
                source = imported.load_any(overlay / "adapters" / adapter).pipeline.dataset
                assert source is None or source.scheme != "file" or source.location in data(folder), name
            seen.add(adapter)
    assert seen == {None, *adapters(overlay)}


@every_overlay
def test_every_written_path_is_on_a_mount(overlay: Path) -> None:
    """The root file system is read-only, so each folder that the environment or an argument names must be mounted."""
    for name, template in pod_templates(rendered(overlay)).items():
        for container in containers(template):
            arguments = [a.rpartition("=")[2] for a in container.get("args", [])]
            paths = [p for p in [*env(container).values(), *arguments] if isinstance(p, str) and p.startswith("/")]
            for path in paths:
                assert any(path == m or path.startswith(m + "/") or m.startswith(path + "/")
                           for m in mounts(container)), f"{name}: {path}"
            assert env(container)["HOME"] == "/tmp", name


@every_overlay
def test_images_are_pinned_to_a_version(overlay: Path) -> None:
    for name, template in pod_templates(rendered(overlay)).items():
        for container in containers(template):
            tag = container["image"].rpartition("/")[2].partition(":")[2]
            assert tag not in ("", "latest"), f"{name}: {container['image']}"


# --- security -----------------------------------------------------------------------------------------------------


@every_overlay
def test_the_namespace_refuses_pods_that_are_not_restricted(overlay: Path) -> None:
    (namespace,) = of_kind(rendered(overlay), "Namespace")
    labels = namespace["metadata"]["labels"]
    for mode in ("enforce", "audit", "warn"):
        assert labels[f"pod-security.kubernetes.io/{mode}"] == "restricted"
        assert labels[f"pod-security.kubernetes.io/{mode}-version"] == f"v{KUBERNETES}"


@every_overlay
def test_every_pod_is_admitted_as_restricted(overlay: Path) -> None:
    """And more than that: one fixed user everywhere, no writable root file system, no credentials for the cluster."""
    for name, template in pod_templates(rendered(overlay)).items():
        assert restricted_violations(template) == [], name
        spec = template["spec"]
        context = spec["securityContext"]
        assert {context["runAsUser"], context["runAsGroup"], context["fsGroup"]} == {10001}, name
        assert context["fsGroupChangePolicy"] == "OnRootMismatch", name
        assert spec["automountServiceAccountToken"] is False, name
        assert spec["enableServiceLinks"] is False, name
        for container in containers(template):
            assert container["securityContext"]["readOnlyRootFilesystem"] is True, name


def weaken(path: str, value: Any) -> Callable[[Manifest], None]:
    def change(template: Manifest) -> None:
        *parents, last = path.split(".")
        node = template
        for key in parents:
            node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
        node[last] = value
    return change


@pytest.mark.parametrize(("path", "value"), [
    ("spec.hostNetwork", True),
    ("spec.hostPID", True),
    ("spec.volumes.0.hostPath", {"path": "/"}),
    ("spec.securityContext.runAsNonRoot", False),
    ("spec.securityContext.runAsUser", 0),
    ("spec.securityContext.seccompProfile", {"type": "Unconfined"}),
    ("spec.securityContext.sysctls", [{"name": "kernel.msgmax", "value": "1"}]),
    ("spec.containers.0.securityContext", {}),
    ("spec.containers.0.securityContext.privileged", True),
    ("spec.containers.0.securityContext.runAsNonRoot", False),
    ("spec.containers.0.securityContext.runAsUser", 0),
    ("spec.containers.0.securityContext.allowPrivilegeEscalation", True),
    ("spec.containers.0.securityContext.capabilities.drop", ["NET_RAW"]),
    ("spec.containers.0.securityContext.capabilities.add", ["SYS_ADMIN"]),
    ("spec.containers.0.securityContext.seLinuxOptions", {"type": "spc_t"}),
    ("spec.containers.0.securityContext.procMount", "Unmasked"),
    ("spec.containers.0.ports", [{"containerPort": 1, "hostPort": 1}]),
    ("spec.initContainers.0.securityContext.capabilities.drop", []),
])
def test_the_restricted_check_finds_what_the_cluster_would_refuse(path: str, value: Any) -> None:
    template = deepcopy(pod_templates(rendered(KIND))["Deployment/model-inference"])
    weaken(path, value)(template)
    assert restricted_violations(template)


@every_overlay
def test_no_pod_gets_a_cluster_token(overlay: Path) -> None:
    accounts = of_kind(rendered(overlay), "ServiceAccount")
    assert [a["automountServiceAccountToken"] for a in accounts] == [False] * len(accounts) != []


@every_overlay
def test_every_role_has_a_service_account_of_its_own(overlay: Path) -> None:
    """What is given to one of them outside of the cluster, such as a bucket, no other pod gets."""
    roles: dict[str, set[str]] = {}
    for template in pod_templates(rendered(overlay)).values():
        role = template["metadata"]["labels"]["app.kubernetes.io/component"]
        roles.setdefault(template["spec"]["serviceAccountName"], set()).add(role)
    assert roles == {account: {"inference" if account == "model-inference" else account}
                     for account in names(rendered(overlay), "ServiceAccount")}
    assert "relocation" in roles


@every_overlay
def test_only_relocation_sees_the_hub_token_and_only_relocation_is_online(overlay: Path) -> None:
    for name, template in pod_templates(rendered(overlay)).items():
        relocates = template["metadata"]["labels"]["app.kubernetes.io/component"] == "relocation"
        assert relocates == stage(template).endswith("-relocation"), name
        for container in template["spec"]["containers"]:
            variables = env(container)
            assert ("HF_TOKEN" in variables) == relocates, name
            if name != "Deployment/tensorboard":  # it imports nothing that knows the hub
                for flag in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
                    assert (variables.get(flag) == "1") == (not relocates), f"{name}: {flag}"
                for flag in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
                    assert variables[flag] == "1", f"{name}: {flag}"


def policies(manifests: list[Manifest], template: Manifest, direction: str) -> list[Manifest]:
    """The network policies that isolate the pod in a direction."""
    return [p for p in of_kind(manifests, "NetworkPolicy") if direction in p["spec"]["policyTypes"]
            and selects(p["spec"]["podSelector"], template["metadata"]["labels"])]


def reaches(manifests: list[Manifest], template: Manifest, address: str, port: int) -> bool:
    """Whether the network policies let the pod out to the address, over TCP."""
    ip = ipaddress.ip_address(address)

    def holds(block: Manifest) -> bool:
        return ip in ipaddress.ip_network(block["cidr"]) and not any(
            ip in ipaddress.ip_network(e) for e in block.get("except", []))

    return any({"protocol": "TCP", "port": port} in rule["ports"]
               and ("to" not in rule or any("ipBlock" in peer and holds(peer["ipBlock"]) for peer in rule["to"]))
               for policy in policies(manifests, template, "Egress") for rule in policy["spec"].get("egress", [])
               if "ports" in rule)


@every_overlay
def test_pods_talk_to_nobody_but_whom_their_role_needs(overlay: Path) -> None:
    """Relocation: DNS and HTTP(S) out, where something comes from outside. Serving and TensorBoard: in from labelled
    clients. All else: nothing."""
    manifests = rendered(overlay)
    for name, template in pod_templates(manifests).items():
        role = template["metadata"]["labels"]["app.kubernetes.io/component"]
        ingress, egress = (policies(manifests, template, d) for d in ("Ingress", "Egress"))
        assert ingress, f"{name}: anybody may come in"
        assert egress, f"{name}: may go anywhere"

        out = [rule for policy in egress for rule in policy["spec"].get("egress", [])]
        into = [rule for policy in ingress for rule in policy["spec"].get("ingress", [])]
        if name.startswith("JobSet") and role == "training":  # its processes, on several nodes, are one training
            own = {"podSelector": {"matchLabels": {"app.kubernetes.io/component": "training",
                                                   "app.kubernetes.io/instance": instance(template)}}}
            assert (into.pop(), out.pop(0)) == ({"from": [own]}, {"to": [own]})
        ports = {(p["protocol"], p["port"]) for rule in out for p in rule["ports"]}
        dns = {("UDP", 53), ("TCP", 53)}
        web = dns | {("TCP", 80), ("TCP", 443)}
        wanted = {"relocation": set() if overlay == KIND else web, "training": dns if out else set()}
        assert ports == wanted.get(role, set()), name

        client = {"inference": "inference-client", "tensorboard": "tensorboard-client"}.get(role)
        assert bool(into) == bool(client), name
        for rule in into:
            assert [p["port"] for p in rule["ports"]] == ["http"]
            selector = {"matchLabels": {client: "true"}}  # a pod of this namespace, or any of one with the label
            assert rule["from"] == [{"podSelector": selector}, {"namespaceSelector": selector}]


PUBLIC = ["18.164.174.55", "2600:9000:2491:c00::1"]
LINK_LOCAL = ["169.254.169.254", "169.254.170.2", "fe80::1", "fd00:ec2::254", "168.63.129.16", "100.100.100.200"]
PRIVATE = ["10.96.0.1", "172.18.0.2", "192.168.1.10", "fd12::1"]


def relocations(manifests: list[Manifest]) -> dict[str, Manifest]:
    return {template["metadata"]["labels"]["app.kubernetes.io/name"]: template
            for template in pod_templates(manifests).values()
            if template["metadata"]["labels"]["app.kubernetes.io/component"] == "relocation"}


def with_components(kind: Path, *components: str) -> list[Manifest]:
    """overlays/kind with components of base/ switched on, as a person would."""
    file = kind / "kustomization.yaml"
    text = file.read_text()
    for component in components:
        assert len(re.findall(rf"(?m)^# - ../../base/{component} .*$", text)) == 1
        text = re.sub(rf"(?m)^# (- ../../base/{component} .*)$", r"\1", text)
    file.write_text(text)
    return render(kind)


@pytest.mark.parametrize(("components", "reached"), [
    ([], []), (["egress"], PUBLIC), (["egress", "egress/private"], [*PUBLIC, *PRIVATE]),
])
def test_relocation_reaches_sources_but_no_metadata_service_and_nothing_private_unasked(
        components: list[str], reached: list[str], tmp_path: Path) -> None:
    manifests = with_components(copy(tmp_path), *components)
    assert relocations(manifests).keys() == {name for name in STAGES if name.endswith("-relocation")}
    for name, template in relocations(manifests).items():
        for address in [*PUBLIC, *LINK_LOCAL, *PRIVATE]:
            for port in (80, 443):
                assert reaches(manifests, template, address, port) == (address in reached), f"{name} {address}"
        assert reaches(manifests, template, "10.96.0.10", 53) == bool(components), name  # DNS


@pytest.mark.parametrize("private", [[], ["egress/private"]])
def test_private_data_in_git_is_handled_by_a_pod_without_network(private: list[str], tmp_path: Path) -> None:
    manifests = with_components(copy(tmp_path), "egress", "egress/models-only", *private)
    for name, template in relocations(manifests).items():
        for address, port in ((PUBLIC[0], 443), ("10.96.0.10", 53)):
            assert reaches(manifests, template, address, port) == (name != "dataset-relocation"), name
    isolated = policies(manifests, relocations(manifests)["dataset-relocation"], "Egress")
    assert [p["metadata"]["name"] for p in isolated] == ["default-deny"]


def test_an_overlay_with_models_from_the_hub_reaches_it_and_nothing_private() -> None:
    for overlay in OVERLAYS:
        for name, template in relocations(rendered(overlay)).items():
            assert reaches(rendered(overlay), template, PUBLIC[0], 443) == (overlay != KIND), name
            assert not reaches(rendered(overlay), template, PRIVATE[0], 443), name


# --- Jobs ---------------------------------------------------------------------------------------------------------


def test_jobs_fail_at_once_on_user_errors_and_survive_evictions() -> None:
    """Exit code 2 ends a Job, a disruption does not count, anything else is retried a few times."""
    for name, job in by_name(rendered(KIND), "Job").items():
        spec = job["spec"]
        rules = spec["podFailurePolicy"]["rules"]
        (main,) = spec["template"]["spec"]["containers"]
        assert {"action": "FailJob",
                "onExitCodes": {"containerName": main["name"], "operator": "In", "values": [2]}} in rules, name
        assert {"action": "Ignore",
                "onExitCodes": {"containerName": main["name"], "operator": "In", "values": [143]}} in rules, name
        assert {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]} in rules, name
        assert spec["template"]["spec"]["restartPolicy"] == "Never", name  # podFailurePolicy is refused without it
        assert spec["backoffLimit"] >= 3, name
        assert "ttlSecondsAfterFinished" not in spec, name  # Argo CD would run a removed Job again


def test_a_pods_status_says_why_it_ended() -> None:
    """What a program writes to its termination log, or the last lines it printed when it could not write any."""
    for overlay in OVERLAYS:
        for name, template in pod_templates(rendered(overlay)).items():
            for container in containers(template):
                assert container.get("terminationMessagePolicy") == "FallbackToLogsOnError", name
                assert "terminationMessagePath" not in container, name  # jobs/__main__.py writes to the default one


def test_the_same_data_gives_the_same_adapter_on_a_laptop() -> None:
    """One thread: with more, the order of additions and so the last digits change from run to run."""
    for name, job in by_name(rendered(KIND), "Job").items():
        (main,) = job["spec"]["template"]["spec"]["containers"]
        assert env(main)["OMP_NUM_THREADS"] == "1", name


def requests(templates: Iterable[Manifest]) -> dict[str, float]:
    """What pods request of a node: CPUs and bytes of memory."""
    total = {"cpu": 0.0, "memory": 0.0}
    for template in templates:
        for key in total:
            main = [quantity(c["resources"]["requests"][key]) for c in template["spec"]["containers"]]
            init = [quantity(c["resources"]["requests"][key]) for c in template["spec"].get("initContainers", [])]
            total[key] += max([sum(main), *init])
    return total


def test_all_pods_together_fit_a_small_node() -> None:
    """All pods start at once and wait for each other: for one that is Pending for want of CPU or memory, for hours.

    The nodes are those of kind with 2 CPUs and 7 GiB, and with 4 and 16; kind's own pods request 0.95 CPUs and 0.3 GiB.
    """
    templates = list(pod_templates(rendered(KIND)).values())
    for container in (c for template in templates for c in containers(template)):
        resources = container["resources"]
        assert quantity(resources["requests"]["memory"]) <= quantity(resources["limits"]["memory"])
    shared = requests(template for template in templates if not instance(template))
    adapter = requests(template for template in templates if instance(template) == "seville-hotels")
    for cpus, gib, many in ((2, 7, 2), (4, 16, 8)):
        assert shared["cpu"] + many * adapter["cpu"] < cpus - 0.95
        assert shared["memory"] + many * adapter["memory"] < (gib - 0.3) * 2**30
    assert len(adapters(KIND)) <= 2
    comment = " ".join((CHECKOUT / "base" / "jobs" / "job.yaml").read_text().replace("#", " ").split())
    assert f"requests {shared['cpu']:.1f} CPUs and {shared['memory'] / 2**30:.1f} GiB with its server" in comment
    assert f"each adapter {adapter['cpu']:.2f} CPUs and {adapter['memory'] / 2**30:.1f} GiB" in comment


# What each stage waits for (jobs/core/plan.py).
WAITS = {"dataset-encoding": {"dataset-relocation", "tokenizer-relocation"},
         "model-training": {"dataset-encoding", "model-relocation", "tokenizer-relocation"},
         "model-evaluation": {*STAGES} - {"model-evaluation"},
         "adapter-publication": {"model-evaluation"},
         **{name: set() for name in STAGES if name.endswith("-relocation")}}


def test_with_priorities_by_stage_no_number_of_adapters_keeps_out_what_they_wait_for() -> None:
    """A Job that finds no room takes that of the Jobs that may wait for it, so some Job always makes progress."""
    classes = {c["metadata"]["name"]: c for c in
               yaml.safe_load_all((CHECKOUT / "base" / "priorities" / "classes.yaml").read_text())}
    used = {stage(job): classes[job["spec"]["template"]["spec"]["priorityClassName"]]
            for job in of_kind(renderings.rendered("overlays/kind with options"), "Job")}
    assert used.keys() == WAITS.keys()
    for waiting, producers in WAITS.items():
        for producer in producers:
            assert used[producer]["value"] > used[waiting]["value"], f"{waiting} keeps out {producer}"
            assert used[producer].get("preemptionPolicy", "PreemptLowerPriority") == "PreemptLowerPriority", producer
    assert classes["lora-gitops-serving"]["value"] > max(c["value"] for c in used.values())


SIGNS = {"model-training", "model-evaluation", "adapter-publication"}


@pytest.mark.parametrize("overlay", ["overlays/kind", "overlays/gpu"])
def test_only_what_signs_can_read_the_signing_key(overlay: str) -> None:
    """Relocation connects to the outside, and serving answers clients: neither may be able to sign."""
    assert "signing-key" not in yaml.safe_dump_all(renderings.rendered(overlay)), "off by default"
    seen = set()
    for template in pod_templates(renderings.rendered(f"{overlay} with options")).values():
        name, pod = template["metadata"]["labels"]["app.kubernetes.io/name"], template["spec"]
        seen.add(name)
        if name not in SIGNS:
            assert "signing-key" not in yaml.safe_dump(template), name
            continue
        assert "signing-key" not in yaml.safe_dump(pod.get("initContainers", [])), "they only wait"
        (volume,) = (volume for volume in pod["volumes"] if volume["name"] == "signing-key")
        assert volume == {"name": "signing-key", "secret": {"secretName": "signing-key"}}
        (container,) = pod["containers"]
        (mount,) = (mount for mount in container["volumeMounts"] if mount["name"] == "signing-key")
        assert mount == {"name": "signing-key", "mountPath": "/etc/signing-key", "readOnly": True}
        assert {"name": signing.VARIABLE, "value": "/etc/signing-key/key"} in container["env"]
    assert {"model-training", "model-evaluation"} <= seen


@every_overlay
def test_no_autoscaler_ends_a_training_to_save_a_node(overlay: Path) -> None:
    for name, template in pod_templates(rendered(overlay)).items():
        annotations = template["metadata"].get("annotations", {})
        trains = template["metadata"]["labels"]["app.kubernetes.io/name"] == "model-training"
        assert (annotations.get("karpenter.sh/do-not-disrupt") == "true") == trains, name
        assert (annotations.get("cluster-autoscaler.kubernetes.io/safe-to-evict") == "false") == trains, name


def test_serving_goes_before_jobs_where_the_cluster_has_the_classes() -> None:
    classes = {c["metadata"]["name"]: c for c in
               yaml.safe_load_all((CHECKOUT / "base" / "priorities" / "classes.yaml").read_text())}
    assert [problem for c in classes.values() for problem in problems(c)] == []
    used: dict[str, set[str]] = {}
    for template in pod_templates(renderings.rendered("overlays/gpu with options")).values():
        role = template["metadata"]["labels"]["app.kubernetes.io/component"]
        used.setdefault(template["spec"].get("priorityClassName", ""), set()).add(role)
    jobs = {"relocation", "encoding", "training", "evaluation", "publication", "verification"}
    assert used == {"lora-gitops-serving": {"inference"}, "lora-gitops-jobs": jobs, "": {"tensorboard"}}
    assert classes["lora-gitops-serving"]["value"] > classes["lora-gitops-jobs"]["value"] > 0
    assert classes["lora-gitops-jobs"]["preemptionPolicy"] == "Never"


# --- re-running exactly when they must ------------------------------------------------------------------------------

Edit = Callable[[Path], None]

# What is edited, and whose Jobs run again: those of the adapter `seville-hotels`, or all.
RERUN: dict[str, tuple[Edit, bool]] = {
    "rank": (lambda kind: replace(kind / SEVILLE / "pipeline.yaml", "r: 16,", "r: 8,"), False),
    "learning rate": (lambda kind: replace(kind / SEVILLE / "pipeline.yaml", "learning_rate: 2.0e-3",
                                           "learning_rate: 1.0e-3"), False),
    "gate": (lambda kind: replace(kind / SEVILLE / "pipeline.yaml", "max_ratio: 0.5", "max_ratio: 0.4"), False),
    "base model": (lambda kind: replace(kind / "environment.yaml", "source: builtin:tiny\n", "source: file:model\n"),
                   True),
    "image": (lambda kind: replace(kind / "kustomization.yaml", "newName: lora-gitops-jobs", "newName: mine/jobs"),
              True),
    "data": (lambda kind: change_data(kind / SEVILLE), False),
    "data without its pin": (lambda kind: add_record(kind / SEVILLE), False),
}
NO_RERUN: dict[str, Edit] = {
    "serving flags": lambda kind: replace(kind / "cpu" / "vllm-cpu.yaml", "--max-model-len=512", "--max-model-len=256"),
    "serving image": lambda kind: replace(kind / "kustomization.yaml", "newName: lora-gitops-serving",
                                              "newName: mine/serving"),
    "tensorboard": lambda kind: replace(kind / "../../base/environment/tensorboard.yaml", "cpu: 50m", "cpu: 60m"),
    "volume size": lambda kind: replace(kind / "../../base/environment/volumes.yaml", "storage: 5Gi", "storage: 50Gi"),
    "unrelated file": lambda kind: write(kind / "README.md", "hello"),
    "comment in a manifest": lambda kind: replace(kind / "cpu" / "one-thread.yaml", "# One thread a Job.", "# One."),
}


def add_record(adapter: Path) -> None:
    with (adapter / "dataset.jsonl").open("a") as stream:
        stream.write(json.dumps({"prompt": "Is there a pool?", "completion": "Yes.", "split": "train"}) + "\n")


def change_data(adapter: Path) -> None:
    """Add a record and pin the data again, as `jobs pin` does."""
    before = sha256_of(adapter / "dataset.jsonl")
    add_record(adapter)
    replace(adapter / "pipeline.yaml", before, sha256_of(adapter / "dataset.jsonl"))


@pytest.mark.parametrize(("edit", "shared"), RERUN.values(), ids=RERUN)
def test_a_changed_config_starts_new_jobs_and_undoing_it_brings_the_old_ones_back(
        edit: Edit, shared: bool, tmp_path: Path) -> None:
    kind = copy(tmp_path)
    edit(kind)
    before, after = by_name(rendered(KIND), "Job"), by_name(render(kind), "Job")
    assert after.keys() == before.keys() == all_jobs(KIND)
    same = {name for name in before if after[name]["metadata"]["name"] == before[name]["metadata"]["name"]}
    assert same == (set() if shared else all_jobs(KIND) - jobs_of("seville-hotels"))
    copy(tmp_path)
    assert by_name(render(kind), "Job") == before


@pytest.mark.parametrize("edit", NO_RERUN.values(), ids=NO_RERUN)
def test_an_unrelated_change_starts_no_job(edit: Edit, tmp_path: Path) -> None:
    kind = copy(tmp_path)
    edit(kind)
    assert of_kind(render(kind), "Job") == of_kind(rendered(KIND), "Job")


def test_a_pipeline_edit_restarts_neither_serving_nor_tensorboard(tmp_path: Path) -> None:
    """It reaches the running pod instead: the same ConfigMap, by the same name, with the new text."""
    kind = copy(tmp_path)
    RERUN["rank"][0](kind)
    before, after = rendered(KIND), render(kind)
    assert of_kind(after, "Deployment") == of_kind(before, "Deployment")
    assert by_name(after, "ConfigMap")["serving-pipelines"] != by_name(before, "ConfigMap")["serving-pipelines"]


def test_an_added_adapter_touches_neither_the_others_nor_the_server(tmp_path: Path) -> None:
    """Its objects are new, and of all that was there only the text of the server's ConfigMap changes."""
    kind = copy(tmp_path)
    add_adapter(kind, "cordoba-hotels")
    before = {(m["kind"], m["metadata"]["name"]): m for m in rendered(KIND)}
    after = {(m["kind"], m["metadata"]["name"]): m for m in render(kind)}
    assert before.keys() <= after.keys()
    assert {key for key in before if after[key] != before[key]} == {("ConfigMap", "serving-pipelines")}
    assert {instance(after[key]) for key in after.keys() - before.keys()} == {"cordoba-hotels"}


def test_a_job_of_ones_own_keeps_its_name(tmp_path: Path) -> None:
    """And need not mount the environment."""
    kind = copy(tmp_path)
    job = deepcopy(by_name(rendered(KIND), "Job")["model-relocation"])
    job["metadata"] = {"name": "own"}
    job["spec"]["template"]["spec"]["volumes"].clear()
    (kind / "own.yaml").write_text(yaml.safe_dump(job))
    replace(kind / "kustomization.yaml", "- ../../serving\n", "- ../../serving\n- own.yaml\n")
    assert names(render(kind), "Job") == names(rendered(KIND), "Job") | {"own"}


@pytest.mark.parametrize("edit", ["rank", "base model"])
def test_a_jobs_pod_never_sees_a_config_of_another_version(edit: str, tmp_path: Path) -> None:
    """A Job's ConfigMaps are named by their content, so a retried pod reads what its Job was started with."""
    kind = copy(tmp_path)
    RERUN[edit][0](kind)
    before, after = ({name: {v["name"]: v["configMap"]["name"] for v in job["spec"]["template"]["spec"]["volumes"]
                             if "configMap" in v} for name, job in by_name(manifests, "Job").items()}
                     for manifests in (rendered(KIND), render(kind)))
    for mounted in [*before.values(), *after.values()]:
        assert all(re.fullmatch(r"(environment|pipeline-.*)-[a-z0-9]{10}", name) for name in mounted.values())
    for name in before:
        changed = {"rank": {"pipeline"} if name in jobs_of("seville-hotels") else set(), "base model": {"environment"}}
        assert {volume for volume in before[name] if before[name][volume] != after[name][volume]} == changed[edit], name


def test_ten_lines_on_top_of_an_overlay_make_another_environment(tmp_path: Path) -> None:
    """Other models, other registry, other namespace: the same adapters, and nothing else of the first environment."""
    kind = copy(tmp_path)
    top = kind.parent / "top"
    top.mkdir()
    (top / "environment.yaml").write_text((kind / "environment.yaml").read_text().replace("keep: 5", "keep: 4"))
    (top / "kustomization.yaml").write_text("""\
namespace: other
resources: [../kind]
components: [../../base/metadata]
images:
- {name: lora-gitops-jobs, newName: registry.example.com/jobs, digest: "sha256:%s"}
- {name: lora-gitops-serving, newName: registry.example.com/serving, newTag: 1.2.3}
configMapGenerator:
- {name: environment, behavior: merge, files: [environment.yaml]}
- {name: serving-pipelines, behavior: merge, files: [environment.yaml], options: {disableNameSuffixHash: true}}
""" % ("0" * 64))
    manifests = render(top)
    assert names(manifests, "Namespace") == {"other"}
    assert {m["metadata"]["namespace"] for m in manifests if m["kind"] != "Namespace"} == {"other"}
    assert by_name(manifests, "Job").keys() == all_jobs(KIND)
    assert not names(manifests, "Job") & names(rendered(KIND), "Job")
    for template in pod_templates(manifests).values():
        assert all(c["image"].startswith("registry.example.com/") for c in containers(template))
    texts = [c["data"]["environment.yaml"] for c in of_kind(manifests, "ConfigMap") if "environment.yaml" in c["data"]]
    assert len(texts) == 2
    assert all("keep: 4" in text for text in texts)


# --- serving ------------------------------------------------------------------------------------------------------


def serving() -> Manifest:
    return by_name(rendered(KIND), "Deployment")["model-inference"]


def test_serving_reads_its_volumes_and_writes_only_scratch() -> None:
    spec = serving()["spec"]["template"]["spec"]
    (vllm,) = spec["containers"]
    assert vllm["command"] == ["python", "-m", "serving"]
    assert {"--host=0.0.0.0", "--port=8000"} <= set(vllm["args"])
    read_only = {path for path, mount in mounts(vllm).items() if mount.get("readOnly")}
    assert {path for path in read_only if path.startswith("/volumes/")} == {
        "/volumes/base-model", "/volumes/base-tokenizer", "/volumes/fine-tuned-model"}
    assert "/etc/pipelines" in read_only
    volumes = {v["name"]: v for v in spec["volumes"]}
    writable = {path: volumes[m["name"]] for path, m in mounts(vllm).items() if path not in read_only}
    assert writable.keys() == {"/tmp", "/dev/shm"}
    assert writable["/tmp"] == {"name": "tmp", "emptyDir": {}}
    assert writable["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    assert "VLLM_CPU_KVCACHE_SPACE" not in env(vllm)  # it would override --kv-cache-memory-bytes


def test_a_changed_pipeline_reaches_the_running_pod() -> None:
    """Its ConfigMap keeps its name, and is mounted as a folder: subPath mounts are never updated."""
    spec = serving()["spec"]["template"]["spec"]
    assert "serving-pipelines" in {v["configMap"]["name"] for v in spec["volumes"] if "configMap" in v}
    for container in containers(serving()["spec"]["template"]):
        assert all("subPath" not in mount for mount in mounts(container).values())


def test_serving_waits_for_the_base_model_without_being_judged() -> None:
    """The init container decides by the same files and volumes as the server what there is to wait for; the
    Deployment's deadline outlasts it and vLLM's start."""
    spec = serving()["spec"]
    (wait,) = spec["template"]["spec"]["initContainers"]
    (vllm,) = spec["template"]["spec"]["containers"]
    assert (wait["command"], wait["args"]) == (vllm["command"], ["--wait"])
    assert wait["image"] == vllm["image"]
    for name in ("PIPELINES", "VOLUMES"):
        assert env(wait)[name] == env(vllm)[name]
    read = {path: mount for path, mount in mounts(vllm).items() if path.startswith(("/etc/pipelines", "/volumes"))}
    assert read.items() <= mounts(wait).items()
    assert all(mount["readOnly"] for mount in read.values())
    startup = vllm["startupProbe"]
    budget = startup["periodSeconds"] * startup["failureThreshold"]
    assert budget >= 300
    assert spec["progressDeadlineSeconds"] > int(env(wait)["WAIT_SECONDS"]) + budget
    for probe, path in (("startupProbe", "/health"), ("readinessProbe", "/ready"), ("livenessProbe", "/health")):
        assert vllm[probe]["httpGet"] == {"path": path, "port": "http"}


def test_a_rollout_of_serving_cannot_deadlock_on_one_gpu_or_one_node() -> None:
    """The old pod goes before the new one comes."""
    assert serving()["spec"]["strategy"]["rollingUpdate"]["maxSurge"] == 0


@every_overlay
def test_a_pod_that_ends_has_time_for_the_longest_reply(overlay: Path) -> None:
    """As slowly as a client is answered on a busy server; then the pod is killed."""
    tokens_per_second = 20 if overlay.name == "gpu" else 10
    spec = by_name(rendered(overlay), "Deployment")["model-inference"]["spec"]["template"]["spec"]
    (vllm,) = spec["containers"]
    (longest,) = [int(a.removeprefix("--max-model-len=")) for a in vllm["args"] if a.startswith("--max-model-len=")]
    drain_seconds = float(env(vllm)["DRAIN_SECONDS"])
    assert drain_seconds >= longest / tokens_per_second
    pause = vllm["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert spec["terminationGracePeriodSeconds"] >= pause + drain_seconds + 5


def test_while_serving_drains_by_itself_its_readiness_fails_before_its_port_closes() -> None:
    (vllm,) = serving()["spec"]["template"]["spec"]["containers"]
    probe = vllm["readinessProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] + 5 <= drain.LINGER_SECONDS


def test_a_node_drain_takes_one_serving_pod_at_a_time_and_is_never_blocked() -> None:
    (budget,) = of_kind(rendered(KIND), "PodDisruptionBudget")
    labels = serving()["spec"]["template"]["metadata"]["labels"]
    assert budget["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert budget["spec"]["maxUnavailable"] == 1
    assert budget["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


# --- the files that people edit -----------------------------------------------------------------------------------


@every_overlay
def test_the_committed_files_are_valid_and_the_data_is_as_pinned(overlay: Path) -> None:
    assert adapters(overlay)
    for name in adapters(overlay):
        loaded = imported.load_any(overlay / "adapters" / name)
        assert loaded.pipeline.adapter == name
        dataset = loaded.pipeline.dataset
        if dataset and dataset.scheme == "file":
            assert sha256_of(loaded.resolve(dataset)) == dataset.sha256, f"run: python -m jobs pin {overlay}"


def test_the_scheduled_verification_reaches_every_volume_and_nobody() -> None:
    manifests = renderings.rendered("overlays/kind with options")
    cron = by_name(manifests, "CronJob")["artifact-verification"]
    template = pod_templates([cron])["CronJob/artifact-verification"]
    assert restricted_violations(template) == []
    (container,) = containers(template)
    assert container["args"] == ["verify"]
    assert {v["persistentVolumeClaim"]["claimName"] for v in template["spec"]["volumes"]
            if "persistentVolumeClaim" in v} == names(manifests, "PersistentVolumeClaim")
    assert {m["mountPath"] for m in container["volumeMounts"]} == {
        "/tmp", *(f"/volumes/{claim.removesuffix('-pvc')}" for claim in names(manifests, "PersistentVolumeClaim"))}
    for direction in ("Ingress", "Egress"):
        found = policies(manifests, template, direction)
        assert [policy["metadata"]["name"] for policy in found] == ["default-deny"]
    terms = template["spec"]["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert terms[0]["labelSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    assert cron["spec"]["jobTemplate"]["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2]
    assert template["spec"]["serviceAccountName"] in names(manifests, "ServiceAccount")
