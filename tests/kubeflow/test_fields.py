"""Every field of a Job is translated, listed as one that KubeFlow Pipelines cannot say, or refused. None is dropped.

The comparison starts from the Job's fields. It knows nothing of kubeflow/translation.py: a field for which `said` has
no case must be listed.
"""

from __future__ import annotations

import copy
import functools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import yaml
from kubernetes_validate.utils import schema_contents

from jobs.tools.pods import CHECKOUT, HASH_SUFFIX, POD_FIELDS, KubernetesYaml, jobs_of_sets
from tests.kubeflow.environment import compile_all
from tests.manifests import Manifest, quantity, render
from tests.validation import KUBERNETES

OVERLAYS = sorted(file.parent.name for file in CHECKOUT.glob("overlays/*/kustomization.yaml"))
POD = ("spec", "template", "spec")
CONTAINER = (*POD, "containers", 0)
FieldPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Compiled:
    """One step of a compiled pipeline."""

    container: dict[str, Any]
    kubernetes: dict[str, Any]
    task: dict[str, Any]
    listed: set[str]  # the fields that are listed for this step


def steps(text: str, unsupported: list[str]) -> dict[str, Compiled]:
    """The steps of IR YAML by name, with what the program lists: `PATH (STEP, STEP): what happens instead`."""
    pipeline, platform = yaml.load_all(text, KubernetesYaml)
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    tasks = pipeline["root"]["dag"]["tasks"]
    listed: dict[str, set[str]] = {}
    for line in unsupported:
        path, _, rest = line.partition(" (")
        names, reason = rest.split("): ", 1)
        assert reason.strip()
        for name in names.split(", "):
            listed.setdefault(name, set()).add(path)
    return {name: Compiled(
        pipeline["deploymentSpec"]["executors"][f"exec-{name}"]["container"], executors.get(f"exec-{name}", {}),
        task, listed.get(name, set()) | listed.get("all steps", set())) for name, task in tasks.items()
        if f"exec-{name}" in pipeline["deploymentSpec"]["executors"]}


def leaves(value: Any, path: FieldPath = ()) -> Iterator[tuple[FieldPath, Any]]:
    """Every field of a manifest that has no fields itself."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        yield from leaves(each, (*path, key))
    if not items:
        yield path, value


def at(manifest: Any, path: FieldPath) -> Any:
    """What is at a path; None if there is nothing."""
    for key in path:
        manifest = manifest.get(key) if isinstance(manifest, dict) else manifest and manifest[key]
    return manifest


def dropped(job: Manifest, step: Compiled, restarts: int = 0) -> list[str]:
    """The fields of a Job that are neither in its step nor listed."""
    found = []
    for path, value in leaves(job):
        plain = ".".join(str(key) for key in path if not isinstance(key, int))
        if not said(job, path, value, step, restarts) and not any(
                plain == each or plain.startswith(f"{each}.") for each in step.listed):
            found.append(f"{'.'.join(map(str, path))}: {value!r}")
    return found


def said(job: Manifest, path: FieldPath, value: Any, step: Compiled, restarts: int) -> bool:
    """Whether a step has a field of its Job, or does the same without."""
    config = step.kubernetes
    match path:
        case ("apiVersion" | "kind",) | ("metadata", "namespace"):
            return True  # a step instead of a Job, in the namespace of the run
        case ("metadata", "name"):
            return bool(step.task["taskInfo"]["name"] == HASH_SUFFIX.sub("", value))
        case ("spec", "backoffLimit"):
            return bool(step.task["retryPolicy"].get("maxRetryCount", 0) == max(value, restarts))
        case ("spec", "parallelism" | "completions"):
            return bool(value == 1)
        case ("spec", "completionMode"):
            return value in ("Indexed", "NonIndexed")
        case ("spec", "suspend"):
            return value is False
        case ("spec", "template", "metadata", ("labels" | "annotations") as kind, key):
            return bool(config["podMetadata"][kind].get(key) == value)
    if path[:3] == POD and path[3:5] != ("containers", 0):
        return said_of_pod(job, path[3:], value, config)
    return path[:5] == CONTAINER and said_of_container(job, path[5:], value, step)


def said_of_pod(job: Manifest, path: FieldPath, value: Any, config: dict[str, Any]) -> bool:
    pod, container = at(job, POD), at(job, CONTAINER)
    match path:
        case ("restartPolicy",):
            return bool(value == "Never")
        case ("schedulerName",):
            return bool(value == "default-scheduler")
        case ("dnsPolicy",):
            return bool(value == "ClusterFirst")
        case ("activeDeadlineSeconds",):
            least = min(value, job["spec"].get("activeDeadlineSeconds", value))
            return bool(config.get("activeDeadlineSeconds") == str(least))
        case ("nodeSelector", key):
            return bool(config["nodeSelector"]["labels"].get(key) == value)
        case ("tolerations", int(n), "tolerationSeconds"):
            return bool(config["tolerations"][n].get("tolerationSeconds") == str(value))
        case ("tolerations", int(n), key):
            return bool(config["tolerations"][n].get(key) == value)
        case ("affinity", "nodeAffinity", *_):
            (term,) = config["nodeAffinity"]
            return bool(term["nodeAffinityJson"]["runtimeValue"]["constant"] == pod["affinity"]["nodeAffinity"])
        case ("imagePullSecrets", int(n), "name"):
            return bool(config["imagePullSecret"][n]["secretName"] == value)
        case ("securityContext", ("runAsUser" | "runAsGroup" | "runAsNonRoot") as key):
            return key in container.get("securityContext", {}) or same(config["securityContext"].get(key), value)
        case ("securityContext", "seccompProfile", "type"):
            return bool(pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"})
        case ("volumes", int(n), *rest):
            name = pod["volumes"][n]["name"]
            mounts = [mount for mount in container.get("volumeMounts", []) if mount["name"] == name]
            return bool(mounts) and all(said_of_volume(rest, value, mount, config) for mount in mounts)
    return False


def said_of_volume(path: list[str | int], value: Any, mount: dict[str, Any], config: dict[str, Any]) -> bool:
    def mounted(kind: str) -> dict[str, Any]:
        return next((each for each in config.get(kind, []) if each["mountPath"] == mount["mountPath"]), {})

    match path:
        case ["name"]:
            return True
        case ["persistentVolumeClaim", "claimName"]:
            claim = mounted("pvcMount")
            return bool(claim.get("constant") == value and claim.get("subPath", "") == mount.get("subPath", ""))
        case ["configMap", "name"]:
            return bool(mounted("configMapAsVolume").get("configMapName") == value)
        case ["configMap", "optional"]:
            return bool(mounted("configMapAsVolume").get("optional") is value)
        case ["secret", "secretName"]:
            return bool(mounted("secretAsVolume").get("secretName") == value)
        case ["secret", "optional"]:
            return bool(mounted("secretAsVolume").get("optional") is value)
        case ["emptyDir"]:
            return bool(mounted("emptyDirMounts").get("volumeName") == mount["name"])
        case ["emptyDir", ("medium" | "sizeLimit") as key]:
            return bool(mounted("emptyDirMounts").get(key) == value)
    return False


def said_of_container(job: Manifest, path: FieldPath, value: Any, step: Compiled) -> bool:
    pod, container, config = at(job, POD), at(job, CONTAINER), step.kubernetes
    match path:
        case ("name",):
            return True  # the only one of its step
        case ("image",):
            return bool(step.container["image"] == value)
        case ("command", int()):
            return bool(step.container["command"] == container["command"])
        case ("args", int()):
            of_job, of_run = (step.container["args"][:len(container["args"])],
                              step.container["args"][len(container["args"]):])
            return of_job == container["args"] and all(each.startswith("--set=training.") for each in of_run)
        case ("imagePullPolicy",):
            return bool(config.get("imagePullPolicy") == value)
        case ("env", int(n), *rest):
            return said_of_variable(container["env"][n], rest, value, step)
        case ("resources", ("requests" | "limits") as kind, ("cpu" | "memory") as key):
            name = f"resource{key.capitalize()}{kind.capitalize().removesuffix('s')}"
            translated = step.container["resources"].get(name)
            return translated is not None and quantity(translated) == quantity(value)
        case ("resources", "limits", str(key)) if "/" in key:
            accelerator = step.container["resources"].get("accelerator", {})
            return bool(accelerator.get("resourceType") == key and accelerator["resourceCount"] == str(value))
        case ("resources", "requests", str(key)) if "/" in key:
            return bool(container["resources"]["limits"].get(key) == value) and said_of_container(
                job, ("resources", "limits", key), value, step)
        case ("securityContext", ("runAsUser" | "runAsGroup" | "runAsNonRoot") as key):
            return same(config["securityContext"].get(key), value)
        # KFP does this for every step.
        case ("securityContext", "allowPrivilegeEscalation"):
            return value is False
        case ("securityContext", "capabilities", *_):
            return bool(container["securityContext"]["capabilities"] == {"drop": ["ALL"]})
        case ("securityContext", "seccompProfile", *_):
            return bool(container["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"})
        case ("volumeMounts", int(n), ("name" | "mountPath" | "subPath") as key):
            mount = container["volumeMounts"][n]
            kinds = ("pvcMount", "configMapAsVolume", "secretAsVolume", "emptyDirMounts")
            found = [each for kind in kinds for each in config.get(kind, []) if each["mountPath"] == mount["mountPath"]]
            return len(found) == 1 and (key != "subPath" or found[0]["subPath"] == value)
        case ("volumeMounts", int(n), "readOnly"):
            volume = next(each for each in pod["volumes"] if each["name"] == container["volumeMounts"][n]["name"])
            return bool(value == ("configMap" in volume or "secret" in volume))
    return False


def said_of_variable(entry: dict[str, Any], path: list[str | int], value: Any, step: Compiled) -> bool:
    name = entry["name"]
    plain = {each["name"]: each.get("value", "") for each in step.container.get("env", [])}

    def source(kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
        return next(((each, key) for each in step.kubernetes.get(kind, []) for key in each["keyToEnv"]
                     if key["envVar"] == name), ({}, {}))

    match path:
        case ["name"]:
            return name in plain or any(f'"{name}"' in json.dumps(step.kubernetes.get(kind, []))
                                        for kind in ("secretAsEnv", "configMapAsEnv", "fieldPathAsEnv"))
        case ["value"]:
            return bool(plain.get(name) == value)
        case ["valueFrom", "fieldRef", "fieldPath"] if value in POD_FIELDS:
            return bool(plain.get(name) == POD_FIELDS[value])
        case ["valueFrom", "fieldRef", "fieldPath"]:
            return {"name": name, "fieldPath": value} in step.kubernetes.get("fieldPathAsEnv", [])
        case ["valueFrom", ("secretKeyRef" | "configMapKeyRef") as kind, key]:
            of = "secret" if kind == "secretKeyRef" else "configMap"
            whole, entry_of = source(f"{of}AsEnv")
            return bool({"name": whole.get(f"{of}Name"), "key": entry_of.get(f"{of}Key"),
                         "optional": whole.get("optional")}.get(str(key)) == value)
    return False


def same(translated: Any, value: Any) -> bool:
    """Whether protobuf's JSON, in which a whole number of 64 bits is a text, has a value."""
    return bool(translated == (value if isinstance(value, bool) else str(value)))


@functools.cache
def compiled_overlays() -> dict[str, tuple[list[Manifest], dict[str, Compiled]]]:
    manifests = {name: render(CHECKOUT / "overlays" / name) for name in OVERLAYS}
    return {name: (manifests[name], steps(**result))
            for name, result in zip(manifests, compile_all(list(manifests.values())), strict=True)}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_field_of_every_job_is_translated_or_listed(overlay: str) -> None:
    manifests, compiled = compiled_overlays()[overlay]
    jobs = [(job, 0) for job in manifests if job["kind"] == "Job"] + [
        (job, jobset["spec"]["failurePolicy"]["maxRestarts"]) for jobset in manifests if jobset["kind"] == "JobSet"
        for job in jobs_of_sets([jobset]) if at(job, CONTAINER)["args"][0] != "await"]
    assert len(jobs) >= 3
    for job, restarts in jobs:
        name = HASH_SUFFIX.sub("", job["metadata"]["name"])
        assert not dropped(job, compiled[name], restarts), name


@functools.cache
def schemas() -> dict[str, Any]:
    types = schema_contents(f"kubernetes-json-schema/v{KUBERNETES}.0-local-strict/_definitions.json", KUBERNETES)
    definitions: dict[str, Any] = types["$defs"]
    return definitions


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    reference = schema.get("$ref", "")
    return resolved(schemas()[reference.rpartition("/")[2]]) if reference else schema


def sample(schema: dict[str, Any], depth: int = 0) -> Any:
    """A value as Kubernetes' schema has it, with every field down to some depth."""
    schema = resolved(schema)
    if "oneOf" in schema:  # a quantity, or a port
        return "7"
    kinds = schema.get("type", "object")
    kind = kinds if isinstance(kinds, str) else next(each for each in kinds if each != "null")
    if "enum" in schema:
        return next(each for each in schema["enum"] if each is not None)
    if kind == "object" and "properties" in schema:
        return {key: sample(each, depth + 1) for key, each in schema["properties"].items()
                if depth < 2 or key in schema.get("required", [])}
    if kind == "array":
        return [sample(schema["items"], depth)]
    return {"string": "sample", "integer": 7, "number": 7, "boolean": True, "object": {"key": "sample"}}[kind]


def job_with_everything() -> Manifest:
    """A Job that uses all that KubeFlow Pipelines can say, and is no stage of the plan."""
    return {
        "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "sample", "namespace": "team-a"},
        "spec": {"backoffLimit": 3, "template": {
            "metadata": {"labels": {"a/b": "c"}, "annotations": {"d": "e"}},
            "spec": {
                "restartPolicy": "Never", "activeDeadlineSeconds": 60, "nodeSelector": {"gpu": "yes"},
                "imagePullSecrets": [{"name": "registry"}], "securityContext": {"runAsUser": 1, "runAsGroup": 2},
                "tolerations": [{"key": "gpu", "operator": "Equal", "value": "yes", "effect": "NoExecute",
                                 "tolerationSeconds": 9}],
                "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
                    {"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a", "b"]}]}]}}},
                "containers": [{
                    "name": "main", "image": "image:1", "command": ["program"], "args": ["--flag", "value"],
                    "imagePullPolicy": "IfNotPresent",
                    "env": [{"name": "PLAIN", "value": "1"}, {"name": "EMPTY"},
                            {"name": "SECRET", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}},
                            {"name": "MAP", "valueFrom": {"configMapKeyRef": {"name": "m", "key": "k"}}},
                            {"name": "FIELD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}],
                    "resources": {"requests": {"cpu": "20m", "memory": "64Mi", "amd.com/gpu": 2},
                                  "limits": {"cpu": 2, "memory": "1Gi", "amd.com/gpu": 2}},
                    "securityContext": {"runAsUser": 5, "runAsNonRoot": True, "allowPrivilegeEscalation": False},
                    "volumeMounts": [{"name": "claim", "mountPath": "/claim", "subPath": "below"},
                                     {"name": "map", "mountPath": "/map", "readOnly": True},
                                     {"name": "secret", "mountPath": "/secret"},
                                     {"name": "scratch", "mountPath": "/tmp"}]}],
                "volumes": [{"name": "claim", "persistentVolumeClaim": {"claimName": "pvc"}},
                            {"name": "map", "configMap": {"name": "files", "optional": True}},
                            {"name": "secret", "secret": {"secretName": "key"}},
                            {"name": "scratch", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}}]}}}}


# Where fields are added and changed, and Kubernetes' type of what is there.
PLACES: dict[FieldPath, str] = {
    ("spec",): "io.k8s.api.batch.v1.JobSpec",
    ("metadata",): "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta",
    ("spec", "template", "metadata"): "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta",
    POD: "io.k8s.api.core.v1.PodSpec",
    (*POD, "securityContext"): "io.k8s.api.core.v1.PodSecurityContext",
    (*POD, "affinity"): "io.k8s.api.core.v1.Affinity",
    (*POD, "tolerations", 0): "io.k8s.api.core.v1.Toleration",
    (*POD, "imagePullSecrets", 0): "io.k8s.api.core.v1.LocalObjectReference",
    (*POD, "volumes", 0): "io.k8s.api.core.v1.Volume",
    (*POD, "volumes", 0, "persistentVolumeClaim"): "io.k8s.api.core.v1.PersistentVolumeClaimVolumeSource",
    (*POD, "volumes", 1, "configMap"): "io.k8s.api.core.v1.ConfigMapVolumeSource",
    (*POD, "volumes", 2, "secret"): "io.k8s.api.core.v1.SecretVolumeSource",
    (*POD, "volumes", 3, "emptyDir"): "io.k8s.api.core.v1.EmptyDirVolumeSource",
    CONTAINER: "io.k8s.api.core.v1.Container",
    (*CONTAINER, "securityContext"): "io.k8s.api.core.v1.SecurityContext",
    (*CONTAINER, "resources"): "io.k8s.api.core.v1.ResourceRequirements",
    (*CONTAINER, "env", 0): "io.k8s.api.core.v1.EnvVar",
    (*CONTAINER, "env", 2, "valueFrom"): "io.k8s.api.core.v1.EnvVarSource",
    (*CONTAINER, "env", 2, "valueFrom", "secretKeyRef"): "io.k8s.api.core.v1.SecretKeySelector",
    (*CONTAINER, "env", 3, "valueFrom", "configMapKeyRef"): "io.k8s.api.core.v1.ConfigMapKeySelector",
    (*CONTAINER, "env", 4, "valueFrom", "fieldRef"): "io.k8s.api.core.v1.ObjectFieldSelector",
    (*CONTAINER, "volumeMounts", 0): "io.k8s.api.core.v1.VolumeMount",
    (*CONTAINER, "volumeMounts", 1): "io.k8s.api.core.v1.VolumeMount",
}


# Without these a step would do something else, so its Job is refused.
REFUSED = {
    "spec.parallelism", "spec.completions",  # not one pod
    "spec.template.spec.initContainers", "spec.template.spec.containers.0.envFrom",
    "spec.template.spec.containers.0.env.0.valueFrom",  # from everything at once
    "spec.template.spec.containers.0.env.2.valueFrom.resourceFieldRef",
    "spec.template.spec.containers.0.imagePullPolicy", "spec.template.spec.containers.0.volumeMounts.0.name",
    "spec.template.spec.containers.0.volumeMounts.1.name", "spec.template.spec.containers.0.volumeMounts.1.subPath",
    "spec.template.spec.volumes.0.name",
    *(f"spec.template.spec.volumes.0.{kind}" for kind in ("configMap", "secret", "emptyDir")),  # with subPath
    *(f"spec.template.spec.volumes.0.{kind}" for kind in (
        "awsElasticBlockStore azureDisk azureFile cephfs cinder csi downwardAPI ephemeral fc flexVolume flocker "
        "gcePersistentDisk gitRepo glusterfs hostPath image iscsi nfs photonPersistentDisk portworxVolume projected "
        "quobyte rbd scaleIO storageos vsphereVolume").split())}
ONE_OF = {(*POD, "volumes", 0): {"name"}, (*CONTAINER, "env", 2, "valueFrom"): set[str]()}  # with what stays


def variants() -> Iterator[tuple[str, Manifest]]:
    """The Job with each field that Kubernetes has, one at a time; and with some of them at once, by chance."""
    added: list[tuple[FieldPath, str, Any]] = []
    for place, kind in PLACES.items():
        for key, schema in schemas()[kind]["properties"].items():
            before = at(job_with_everything(), (*place, key))
            if not isinstance(before, dict | list):
                added.append((place, key, sample(schema)))
    added += [((*CONTAINER, "resources", kind), key, value) for kind, key, value in (
        ("requests", "amd.com/gpu", 1), ("limits", "nvidia.com/gpu", 1), ("limits", "ephemeral-storage", "1Gi"),
        ("limits", "cpu", "1e3"), ("requests", "memory", "1.5Gi"))]
    for place, key, value in added:
        job = job_with_everything()
        if place in ONE_OF and key not in ONE_OF[place]:
            for other in at(job, place).keys() - ONE_OF[place]:
                del at(job, place)[other]
        at(job, place)[key] = value
        yield shown(place, key), job
    draw = random.Random(7)
    harmless = [each for each in added if shown(each[0], each[1]) not in REFUSED and each[0] not in ONE_OF]
    for number in range(20):
        job = job_with_everything()
        for place, key, value in draw.sample(harmless, 8):
            at(job, place)[key] = copy.deepcopy(value)
        yield f"by chance {number}", job


def shown(place: FieldPath, key: str) -> str:
    return ".".join(map(str, (*place, key)))


def test_what_kubeflow_pipelines_can_say_is_translated() -> None:
    job = job_with_everything()
    (result,) = compile_all([[job]])
    assert result["unsupported"] == []
    assert not dropped(job, steps(**result)["sample"])


def test_every_field_that_kubernetes_has_is_translated_listed_or_refused() -> None:
    names, jobs = zip(*variants(), strict=True)
    assert len(names) > 200
    refused, silent = {}, []
    for name, job, result in zip(names, jobs, compile_all([[job] for job in jobs]), strict=True):
        if "error" in result:
            refused[name] = result["error"]
        else:
            silent += [f"{name}: {field}" for field in dropped(job, steps(**result)["sample"])]
    assert not silent
    assert set(refused) == REFUSED
    for name, error in refused.items():
        assert error.startswith("sample: ") and "\n" not in error, name
