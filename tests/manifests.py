"""What the tests of the manifests share: rendering, pod templates, edited copies, and the Pod Security rules."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobs.tools.pods import CHECKOUT, Manifest, containers, pod_templates, render

__all__ = ["ADAPTER_JOBS", "CHECKOUT", "ENVIRONMENT_JOBS", "Manifest", "adapters", "add_adapter", "by_name",
           "containers", "copy", "jobs_of", "of_kind", "pod_templates", "quantity", "render", "restricted_violations",
           "unhashed"]

ENVIRONMENT_JOBS = {"model-relocation", "tokenizer-relocation", "model-reference-relocation"}
# Each with the adapter's name behind it.
ADAPTER_JOBS = {"dataset-relocation", "dataset-encoding", "model-training", "model-evaluation"}


def copy(folder: Path) -> Path:
    """Copy everything that kustomize reads into `folder`, over what is there, to be edited; returns overlays/kind."""
    ignored = shutil.ignore_patterns("*.py", "__pycache__", "*.txt")
    for name in ("base", "serving", "overlays"):
        shutil.copytree(CHECKOUT / name, folder / name, ignore=ignored, dirs_exist_ok=True)
    return folder / "overlays" / "kind"


def adapters(overlay: Path) -> list[str]:
    """The names of an overlay's adapters."""
    return sorted(file.parent.name for file in overlay.glob("adapters/*/kustomization.yaml"))


def jobs_of(adapter: str) -> set[str]:
    """The Jobs of an adapter, without their hashes."""
    return {f"{job}-{adapter}" for job in ADAPTER_JOBS}


def add_adapter(overlay: Path, name: str, source: str = "seville-hotels") -> None:
    """Another adapter in a copy of an overlay, with the files of one that is there, as a person would add it."""
    shutil.copytree(overlay / "adapters" / source, overlay / "adapters" / name)
    for file in (overlay / "adapters" / name).glob("*.yaml"):
        file.write_text(file.read_text().replace(source, name))
    file = overlay / "kustomization.yaml"
    for line in (f"- adapters/{source}\n", f"  - {source}.yaml=adapters/{source}/pipeline.yaml\n"):
        text = file.read_text()
        assert text.count(line) == 1, line
        file.write_text(text.replace(line, line + line.replace(source, name)))


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    return [m for m in manifests if m["kind"] == kind]


def by_name(manifests: list[Manifest], kind: str) -> dict[str, Manifest]:
    """The manifests of a kind by name, Jobs without their hash."""
    return {unhashed(m) if kind == "Job" else m["metadata"]["name"]: m for m in of_kind(manifests, kind)}


def unhashed(manifest: Manifest) -> str:
    """The name without kustomize's hash of ten characters."""
    return str(manifest["metadata"]["name"]).rpartition("-")[0]


def quantity(text: str | int) -> float:
    """A Kubernetes quantity as a number: `500m` is 0.5, `1Gi` is 2**30."""
    units = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    text = str(text)
    unit = next((u for u in sorted(units, key=len, reverse=True) if text.endswith(u)), "")
    return float(text.removesuffix(unit)) * units.get(unit, 1)


# Pod Security Standards, profile `restricted` (which includes `baseline`), v1.32.
VOLUME_TYPES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected",
                "secret"}
SELINUX_TYPES = {None, "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}
SAFE_SYSCTLS = {"kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.ip_unprivileged_port_start",
                "net.ipv4.tcp_syncookies", "net.ipv4.ping_group_range", "net.ipv4.ip_local_reserved_ports",
                "net.ipv4.tcp_keepalive_time", "net.ipv4.tcp_fin_timeout", "net.ipv4.tcp_keepalive_intvl",
                "net.ipv4.tcp_keepalive_probes"}


def restricted_violations(template: Manifest) -> list[str]:
    """What a namespace that enforces `restricted` would refuse in the pod template; empty when it is admitted."""
    return list(_pod_violations(template)) + [
        f"{c['name']}: {problem}" for c in containers(template)
        for problem in _container_violations(c, template["spec"].get("securityContext", {}))]


def _pod_violations(template: Manifest) -> Iterator[str]:
    spec = template["spec"]
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(key):
            yield key
    for volume in spec.get("volumes", []):
        if not volume.keys() - {"name"} <= VOLUME_TYPES:
            yield f"volume {volume['name']}: {', '.join(volume.keys() - {'name'})}"
    context = spec.get("securityContext", {})
    for sysctl in context.get("sysctls", []):
        if sysctl["name"] not in SAFE_SYSCTLS:
            yield f"sysctl {sysctl['name']}"
    yield from _common_violations(context)
    for key, value in template["metadata"].get("annotations", {}).items():
        if key.startswith("container.apparmor.security.beta.kubernetes.io/") and value == "unconfined":
            yield f"annotation {key}"


def _container_violations(container: Manifest, pod: dict[str, Any]) -> Iterator[str]:
    own = container.get("securityContext", {})
    yield from _common_violations(own)
    if own.get("privileged"):
        yield "privileged"
    if own.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation is not false"
    capabilities = own.get("capabilities", {})
    if "ALL" not in capabilities.get("drop", []):
        yield "capabilities.drop lacks ALL"
    if not set(capabilities.get("add", [])) <= {"NET_BIND_SERVICE"}:
        yield "capabilities.add"
    if own.get("procMount", "Default") != "Default":
        yield "procMount"
    if own.get("runAsNonRoot", pod.get("runAsNonRoot")) is not True:
        yield "runAsNonRoot is not true"
    if own.get("seccompProfile", pod.get("seccompProfile", {})).get("type") not in ("RuntimeDefault", "Localhost"):
        yield "seccompProfile"
    for port in container.get("ports", []):
        if port.get("hostPort"):
            yield f"hostPort {port['hostPort']}"


def _common_violations(context: dict[str, Any]) -> Iterator[str]:
    """What is forbidden alike for a pod and for a container."""
    if context.get("runAsUser") == 0:
        yield "runAsUser is 0"
    if context.get("seccompProfile", {}).get("type") == "Unconfined":
        yield "seccompProfile is Unconfined"
    if context.get("appArmorProfile", {}).get("type") == "Unconfined":
        yield "appArmorProfile is Unconfined"
    if context.get("windowsOptions", {}).get("hostProcess"):
        yield "windowsOptions.hostProcess"
    selinux = context.get("seLinuxOptions", {})
    if selinux.get("type") not in SELINUX_TYPES or selinux.get("user") or selinux.get("role"):
        yield "seLinuxOptions"
