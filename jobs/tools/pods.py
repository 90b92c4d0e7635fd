"""Kubernetes manifests as local processes: renders an overlay and maps each pod onto folders and ports of this machine.

PersistentVolumeClaims become folders, ConfigMaps become files (in the layout the kubelet uses), Secrets are read from
`STATE/secrets/NAME/KEY`, and each pod gets a root folder in which its mounts are links. In command, args and env, every
absolute path at, below or above a mount is moved under that root, `0.0.0.0` becomes `127.0.0.1`, and ports are shifted
by an offset. Images are not used: the containers' programs are the Python modules of this checkout.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from jobs.core.errors import UserError
from jobs.core.files import require_plain

CHECKOUT = Path(__file__).resolve().parents[2]  # the folder that holds the packages `jobs` and `serving`
Manifest = dict[str, Any]
# Kinds whose `spec.template` is a pod's. Others have one of something else: ApplicationSet, SealedSecret.
WORKLOADS = {"Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "Job"}
HASH_SUFFIX = re.compile(r"-[24-9bcdfghkmt]{10}$")  # in the alphabet of kustomize, which spells no words
ADAPTER_LABEL = "app.kubernetes.io/instance"  # on the Jobs of an adapter: its name
LOGGED = re.compile(r'[EF]\d{4} .*\] "command failed" err=')  # how klog begins the line of an error
KUSTOMIZATIONS = ("kustomization.yaml", "kustomization.yml", "Kustomization")  # the names that kustomize knows

# Fields of a pod's own manifest that are in its environment. Here all processes of a training are on one machine.
POD_FIELDS = {"metadata.labels['jobset.sigs.k8s.io/coordinator']": "127.0.0.1"}

# Requirements on a node. Ignored without a cluster, so that an overlay for GPUs can be tried on a CPU.
OF_NODES = {"REQUIRE_GPU"}

# A pod sees its own environment only, except for these: how this machine reaches the network and the hub.
INHERITED = ("PATH", "LANG", "LC_ALL", "TZ", "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY",
             "NO_PROXY", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "HF_ENDPOINT", "LD_LIBRARY_PATH")


@dataclass(frozen=True)
class Container:
    """One container as a process."""

    name: str
    argv: list[str]
    env: dict[str, str]
    ports: dict[str, int]  # by name, after the offset
    ready_url: str | None  # from the readiness probe


@dataclass(frozen=True)
class Pod:
    """One Job or Deployment; the local runner starts one pod of each."""

    kind: str  # Job or Deployment
    name: str  # as rendered, with the content hash
    title: str  # without it, for people
    init_containers: list[Container]
    containers: list[Container]
    grace_seconds: float
    adapter: str | None = None  # the adapter to which a Job belongs; None: the environment
    backoff_limit: int = 0
    fatal_exit_codes: frozenset[int] = frozenset()


@dataclass
class Placement:
    """How strings of one pod are moved onto this machine."""

    root: Path
    mounts: list[str] = field(default_factory=list)
    ports: dict[int, int] = field(default_factory=dict)

    def __call__(self, text: str) -> str:
        option, equals, value = text.rpartition("=") if text.startswith("-") else ("", "", text)
        return f"{option}{equals}{self._value(value)}"

    def _value(self, value: str) -> str:
        if value == "0.0.0.0":  # noqa: S104 - replaced, not used
            return "127.0.0.1"
        if value.isdigit() and int(value) in self.ports:
            return str(self.ports[int(value)])
        path = value.rstrip("/")
        near = any(path == m or path.startswith(m + "/") or m.startswith(path + "/") for m in self.mounts)
        return f"{self.root}{value}" if re.match(r"/.", value) and near else value


def render(overlay: Path) -> list[Manifest]:
    """What `kubectl apply -k OVERLAY` would send.

    Raises:
        UserError: kubectl is missing; or the overlay names a FIFO or the like, does not render (with kustomize's own
            message), or renders to a workload that Kubernetes would refuse.
    """
    if not any((overlay / name).is_file() for name in KUSTOMIZATIONS):
        raise UserError(f"{overlay}: has no kustomization.yaml. Name an overlay's folder, e.g. overlays/kind")
    if shutil.which("kubectl") is None:
        raise UserError("kubectl is not installed. It renders the overlay (no cluster is needed): get version 1.32 or "
                        "newer from https://kubernetes.io/docs/tasks/tools/ and put it on the PATH")
    _require_plain_files(overlay)
    done = subprocess.run(["kubectl", "kustomize", str(overlay)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{overlay}: does not render: {error_in(done.stderr)}")
    manifests = [document for document in yaml.load_all(done.stdout, KubernetesYaml) if document]
    for manifest in manifests:
        with _named(manifest):  # what reads the pods of a workload later finds them
            if not all(containers(template) for template in pod_templates([manifest]).values()):
                raise UserError(f"its pod has no containers; `kubectl explain {manifest['kind']}` describes what is "
                                "needed")
    return manifests


def _require_plain_files(overlay: Path) -> None:
    """Refuse a FIFO or the like that a kustomization names: kubectl would wait for its writer for ever."""
    files = [Path(folder, name) for folder, _, names in os.walk(overlay) for name in names]
    others = [file for file in files if file.exists() and not file.is_file()]
    for kustomization in files if others else ():
        if kustomization.name in KUSTOMIZATIONS and kustomization.is_file():
            text = kustomization.read_text(errors="replace")
            for file in others:
                if file.name in text:
                    require_plain(file)


class KubernetesYaml(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # libyaml: faster
    """SafeLoader for manifests: to Kubernetes and kustomize, `2026-99-99` and `=` are texts like any other."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as PyYAML has it
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("timestamp", "value")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()}


def pod_templates(manifests: list[Manifest]) -> dict[str, Manifest]:
    """Every pod template by its workload, e.g. `Deployment/tensorboard` or `JobSet/pipeline-HASH/model-training`."""
    return {f"{m['kind']}/{m['metadata']['name']}": m["spec"]["template"] for m in manifests
            if m["kind"] in WORKLOADS and "template" in (m.get("spec") or {})} | {
        f"CronJob/{m['metadata']['name']}": m["spec"]["jobTemplate"]["spec"]["template"]
        for m in manifests if m["kind"] == "CronJob"} | {
        f"JobSet/{m['metadata']['name']}/{job['name']}": job["template"]["spec"]["template"]
        for m in manifests if m["kind"] == "JobSet" for job in m["spec"]["replicatedJobs"]}


def containers(template: Manifest) -> list[Manifest]:
    """All containers of a pod template, init containers first."""
    return [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]


def labels(template: Manifest) -> dict[str, str]:
    """The labels of a pod template, which may have none."""
    found: dict[str, str] = (template.get("metadata") or {}).get("labels") or {}
    return found


def error_in(stderr: str) -> str:
    """The error in what kubectl or another tool wrote, on one line: all from `error` on, else the last line."""
    lines = stderr.strip().splitlines() or ["no error message"]
    first = next((n for n, line in enumerate(lines) if line.lower().startswith("error") or LOGGED.match(line)),
                 len(lines) - 1)
    error = " ".join(" ".join(lines[first:]).split())
    if logged := LOGGED.match(error):
        error = error[logged.end():]
        # klog quotes an error, or puts one of several lines between < and >.
        quoted = error.startswith('"')
        error = error[1:-1].strip()
        error = error.replace('\\"', '"').replace("\\n", " ") if quoted else error
    return error.removeprefix("error: ")


def pods(manifests: list[Manifest], state: Path, port_offset: int = 0) -> list[Pod]:
    """Lay out volumes, ConfigMaps and pod roots below `state`, and return every pod to run.

    Layout: `volumes/<claim>/` and `secrets/<name>/` (kept), `configmaps/<name>/` (replaced), `pods/<name>/` (new).

    Raises:
        UserError: a pod cannot run without a cluster; names the workload and what it lacks.
    """
    shutil.rmtree(state / "pods", ignore_errors=True)  # links and scratch folders; never follows a link
    shutil.rmtree(state / "configmaps", ignore_errors=True)  # one that the overlay no longer makes must not be found
    for manifest in manifests:
        if manifest["kind"] == "ConfigMap":
            with _named(manifest):
                write_config_map(state / "configmaps" / manifest["metadata"]["name"], contents(manifest))
    return [_pod(m, state, port_offset) for m in [*manifests, *jobs_of_sets(manifests)]
            if m["kind"] in ("Job", "Deployment")]


def contents(config_map: Manifest) -> dict[str, str | bytes]:
    """The files of a ConfigMap: `data` as text, `binaryData` decoded.

    Raises:
        ValueError: `binaryData` is not base64.
    """
    files: dict[str, str | bytes] = dict(config_map.get("data") or {})
    for name, text in (config_map.get("binaryData") or {}).items():
        try:
            files[name] = base64.b64decode(text, validate=True)
        except binascii.Error as error:
            raise ValueError(f"binaryData.{name} is not base64: {error}") from None
    return files


@contextmanager
def _named(manifest: Manifest) -> Iterator[None]:
    """Name the object in what is wrong with its manifest, which the API server would have refused."""
    title = HASH_SUFFIX.sub("", manifest["metadata"]["name"])
    explain = f"`kubectl explain {manifest['kind']}` describes what is needed"
    try:
        yield
    except UserError as error:
        raise UserError(f"{title}: {error}") from None
    except KeyError as error:
        raise UserError(f"{title}: its manifest lacks `{error.args[0]}`; {explain}") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{title}: its manifest is not as Kubernetes has it ({error}); {explain}") from None


def jobs_of_sets(manifests: list[Manifest]) -> Iterator[Manifest]:
    """The Jobs of every JobSet, named by their pods' labels as the Jobs of other overlays are. What one depends on it
    waits for by itself, so all start at once here."""
    for manifest in manifests:
        if manifest["kind"] == "JobSet":
            suffix = HASH_SUFFIX.search(manifest["metadata"]["name"])
            with _named(manifest):
                for job in manifest["spec"]["replicatedJobs"]:
                    found = labels(job["template"]["spec"]["template"])
                    parts = (found.get("app.kubernetes.io/name", job["name"]), found.get(ADAPTER_LABEL))
                    name = "-".join(part for part in parts if part) + (suffix.group() if suffix else "")
                    yield {"kind": "Job", "metadata": {"name": name, "labels": found}, "spec": job["template"]["spec"]}


def write_config_map(folder: Path, data: Mapping[str, str | bytes]) -> None:
    """Write a ConfigMap as the kubelet does: files are links through `..data`, which is switched atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    version = folder / f"..{time.time_ns()}"
    version.mkdir()
    for name, content in data.items():
        (version / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    link = folder / "..data_tmp"
    link.symlink_to(version.name)
    before = folder / (folder / "..data").readlink() if (folder / "..data").is_symlink() else None
    link.replace(folder / "..data")
    for name in data:
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"..data/{name}")
    for entry in folder.iterdir():
        if not entry.name.startswith("..") and entry.name not in data:
            entry.unlink()
    if before:
        shutil.rmtree(before, ignore_errors=True)


def _pod(manifest: Manifest, state: Path, port_offset: int) -> Pod:
    with _named(manifest):
        return _workload(manifest, state, port_offset)


def _workload(manifest: Manifest, state: Path, port_offset: int) -> Pod:
    name, spec = manifest["metadata"]["name"], manifest["spec"]
    template = spec["template"]["spec"]
    root = state / "pods" / name
    rules = spec.get("podFailurePolicy", {}).get("rules", [])
    return Pod(
        kind=manifest["kind"], name=name, title=HASH_SUFFIX.sub("", name),
        init_containers=[_container(c, template, root, state, port_offset)
                         for c in template.get("initContainers", [])],
        containers=[_container(c, template, root, state, port_offset) for c in template["containers"]],
        grace_seconds=float(template.get("terminationGracePeriodSeconds", 30)),
        adapter=manifest["metadata"].get("labels", {}).get(ADAPTER_LABEL) if manifest["kind"] == "Job" else None,
        backoff_limit=int(spec.get("backoffLimit", 6)),
        fatal_exit_codes=frozenset(code for rule in rules if rule["action"] == "FailJob" and "onExitCodes" in rule
                                   for code in rule["onExitCodes"]["values"]))


def _container(container: Manifest, template: Manifest, root: Path, state: Path, port_offset: int) -> Container:
    name = container["name"]
    volumes = {volume["name"]: volume for volume in template.get("volumes", [])}
    moved = Placement(root, ports={p["containerPort"]: _shifted(p["containerPort"], port_offset)
                                  for p in container.get("ports", [])})
    for mount in container.get("volumeMounts", []):
        if mount["name"] not in volumes:
            raise UserError(f"the container {name} mounts {mount['name']}, and the pod has no such volume; its "
                            f"volumes: {', '.join(volumes) or 'none'}")
        if "subPath" in mount:
            raise UserError(f"the container {name} has `subPath`, which is not supported without a cluster")
        moved.mounts.append(mount["mountPath"].rstrip("/"))
        _link(root / mount["mountPath"].strip("/"), _volume(volumes[mount["name"]], root, state))
    env = {name: os.environ[name] for name in INHERITED if name in os.environ}
    env |= {"PYTHONPATH": str(CHECKOUT)} | dict(_env(container, moved))
    if "envFrom" in container:
        raise UserError(f"the container {name} has `envFrom`, which is not supported without a cluster")
    if not container.get("command"):
        raise UserError(f"the container {name} has no `command`. Without a cluster images are not used, so the "
                        "manifest must name the program")
    command = [*container["command"], *container.get("args", [])]
    program = sys.executable if command[0] in ("python", "python3") else command[0]
    ports = {p.get("name", str(p["containerPort"])): moved.ports[p["containerPort"]]
             for p in container.get("ports", [])}
    probe = container.get("readinessProbe", {}).get("httpGet")
    return Container(name, [program, *(moved(argument) for argument in command[1:])], env, ports,
                     f"http://127.0.0.1:{_probed_port(probe, name, ports, moved)}{probe['path']}" if probe else None)


def _shifted(port: int, offset: int) -> int:
    if type(port) is not int:
        raise TypeError(f"the port {port!r} is no integer")
    if not 1 <= port + offset <= 65535:
        raise UserError(f"port {port} with --port-offset {offset} is {port + offset}; ports are from 1 to 65535")
    return port + offset


def _probed_port(probe: Manifest, container: str, ports: Mapping[str, int], moved: Placement) -> int:
    port = ports.get(probe["port"]) if isinstance(probe["port"], str) else moved.ports.get(probe["port"])
    if port is None:
        raise UserError(f"the container {container} is probed at port {probe['port']}, which is not among its `ports`")
    return port


def _env(container: Manifest, moved: Placement) -> Iterator[tuple[str, str]]:
    for entry in container.get("env", []):
        if entry["name"] in OF_NODES:
            continue
        if "valueFrom" not in entry:
            yield entry["name"], moved(entry.get("value", ""))
        elif "secretKeyRef" in entry.get("valueFrom", {}):
            # Locally a Secret is the environment variable of the same name.
            if entry["name"] in os.environ:
                yield entry["name"], os.environ[entry["name"]]
            elif not entry["valueFrom"]["secretKeyRef"].get("optional"):
                raise UserError(f"the container {container['name']} needs the Secret "
                                f"{entry['valueFrom']['secretKeyRef']['name']}: set {entry['name']} in the environment")
        elif entry.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath") in POD_FIELDS:
            yield entry["name"], POD_FIELDS[entry["valueFrom"]["fieldRef"]["fieldPath"]]
        else:
            raise UserError(f"the container {container['name']} takes {entry['name']} from {entry['valueFrom']}, which "
                            "has no meaning without a cluster; give it a default `value` in the overlay")


def _volume(volume: Manifest, root: Path, state: Path) -> Path:
    """The local folder behind a pod's volume."""
    folder: Path
    if "persistentVolumeClaim" in volume:
        folder = state / "volumes" / volume["persistentVolumeClaim"]["claimName"]
    elif "configMap" in volume:
        source = volume["configMap"]
        folder = state / "configmaps" / source["name"]
        if not folder.is_dir() and not source.get("optional"):
            raise UserError(f"the volume {volume['name']} is the ConfigMap {source['name']}, which the "
                            "overlay does not make; add it to `configMapGenerator` in its kustomization.yaml")
        folder = _selected(folder, source, root / ".selected" / volume["name"])
    elif "secret" in volume:
        source = volume["secret"]
        folder = state / "secrets" / source["secretName"]
        if not folder.is_dir() and not source.get("optional"):
            raise UserError(f"the volume {volume['name']} is the Secret {source['secretName']}. Without a cluster, "
                            f"write each of its keys to a file in {folder}")
        folder = _selected(folder, source, root / ".selected" / volume["name"])
    elif "emptyDir" in volume:
        folder = root / ".emptydir" / volume["name"]
    else:
        kind = ", ".join(volume.keys() - {"name"}) or "volume of no type"
        raise UserError(f"the volume {volume['name']} is a {kind}, which has no meaning without a cluster; "
                        "possible: persistentVolumeClaim, configMap, secret, emptyDir")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _selected(folder: Path, source: Manifest, selection: Path) -> Path:
    """The files of a ConfigMap or Secret that its volume has: all, or those that `items` lists, by their paths."""
    if "items" not in source:
        return folder
    for item in source["items"]:
        if item["path"].startswith("/") or ".." in Path(item["path"]).parts:
            raise ValueError(f"the path {item['path']} of `items` is not below the volume")
        if folder.is_dir() and not (folder / item["key"]).exists():
            raise UserError(f"`items` names the key {item['key']}, which {folder.name} does not have")
        _link(selection / item["path"], folder / item["key"])
    return selection


def _link(place: Path, target: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.is_symlink() and place.readlink() == target:  # of another container of the pod
        return
    try:
        place.symlink_to(target)
    except FileExistsError:
        raise UserError(f"two volumes are mounted at {place}, or one above another, which is not supported without a "
                        "cluster") from None
