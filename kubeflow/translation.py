"""A Job as a step of a KubeFlow pipeline: every field becomes a setting of kfp, is listed as one that KubeFlow Pipelines
cannot say, or is refused because the step would do something else without it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kfp import dsl, kubernetes
from kubernetes.utils import parse_quantity

from jobs.core.errors import UserError
from jobs.tools.pods import HASH_SUFFIX, POD_FIELDS, Manifest
from kubeflow.fields import Fields

Setting = Callable[[dsl.PipelineTask], object]

# Retries as a Job makes them: 10 s, 20 s, 40 s, … apart. KFP has no limit for one pause; what it calls the maximal duration
# is the time since the first attempt started, after which Argo retries no more. Its default of one hour would leave a
# training of many hours without a retry.
FIRST_PAUSE = "10s"
PAUSE_FACTOR = 2.0
RETRIES_END_AFTER = f"{30 * 24 * 3600}s"
DEFAULT_BACKOFF_LIMIT = 6  # of Kubernetes

# What a Job says and KubeFlow Pipelines cannot, by the path of the field: what happens instead. A field that is not here is
# listed with DEFAULT_REASON.
UNSUPPORTED = {
    "metadata": "KFP makes no Job, so nothing bears them; labels and annotations of the pods are set",
    "spec.template.metadata": "of a pod, KFP sets labels and annotations only",
    "spec.podFailurePolicy": "KFP retries whatever the exit code: exit code 2 (a user must change something) is repeated "
                             "until the attempts are used up, and an eviction counts as one",
    "spec.activeDeadlineSeconds": "counts for each attempt, not for all of them",
    "spec.template.spec.serviceAccountName": "KFP has one service account for a whole run",
    "spec.template.spec.automountServiceAccountToken": "KFP's launcher in the pod needs the token",
    "spec.template.spec.enableServiceLinks": "the pod gets a variable for each Service of its namespace",
    "spec.template.spec.terminationGracePeriodSeconds": "30 seconds: a stop may lose work since the last checkpoint",
    "spec.template.spec.affinity": "of affinity, KFP has nodeAffinity only. ReadWriteOnce volumes need one node",
    "spec.template.spec.priorityClassName": "KFP has no priority of a pod",
    "spec.template.spec.securityContext.fsGroup": "the volumes must be writable for the group before: component "
                                                  "../../kubeflow/environment does it",
    "spec.template.spec.securityContext.fsGroupChangePolicy": "there is no fsGroup",
    "spec.template.spec.initContainers": "the order of the steps takes its place",
    "spec.template.spec.containers.securityContext.readOnlyRootFilesystem": "KFP's launcher writes to the root filesystem",
    "spec.template.spec.containers.terminationMessagePolicy": "the message is in the step's log",
    "spec.template.spec.containers.volumeMounts.readOnly": "KFP mounts claims writable",
    "spec.template.spec.containers.resources.requests.ephemeral-storage": "KFP has CPU, memory and one accelerator",
    "spec.template.spec.containers.resources.limits.ephemeral-storage": "KFP has CPU, memory and one accelerator",
}
DEFAULT_REASON = "KFP has no such field"


@dataclass(frozen=True)
class Executor:
    """A Job's container as kfp takes it."""

    image: str
    command: list[str]
    args: list[str]
    settings: list[Setting]  # to apply to the task
    unsupported: dict[str, Any]  # the fields that KubeFlow Pipelines cannot say: their values by their paths
    awaits: tuple[str, ...]  # artifacts for which its init containers wait


@dataclass(frozen=True)
class Mount:
    """How kfp mounts a volume."""

    method: Callable[..., object]
    arguments: dict[str, Any]
    read_only: bool = False  # whether Kubernetes mounts such a volume read-only in any case


def reason(path: str) -> str:
    """What happens instead of a field that KubeFlow Pipelines cannot say."""
    plain = without_names(path)
    known = [prefix for prefix in UNSUPPORTED if plain == prefix or plain.startswith(prefix + ".")]
    return UNSUPPORTED[max(known, key=len)] if known else DEFAULT_REASON


def without_names(path: str) -> str:
    """A field's path without the names in lists: `containers[job].args` becomes `containers.args`."""
    return re.sub(r"\[[^]]*\]", "", path)


def translate(job: Manifest, restarts: int = 0) -> Executor:
    """Translate a Job.

    Args:
        restarts: how often what the Job is a part of, a JobSet, is started again after it failed.
    Raises:
        UserError: names the Job and the field without which the step would do something else.
    """
    try:
        return _Translation(job, restarts).executor()
    except UserError as error:
        raise UserError(f"{HASH_SUFFIX.sub('', job['metadata']['name'])}: {error}") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{HASH_SUFFIX.sub('', job['metadata']['name'])}: its manifest is not as Kubernetes has it, or "
                        f"kfp refuses a value ({error})") from None


class _Translation:
    """Takes every field of a Job that kfp has a setting for."""

    def __init__(self, job: Manifest, restarts: int) -> None:
        self.job = Fields(job)
        self.restarts = restarts
        self.deadline: int | None = None
        self.settings: list[Setting] = []
        self.unsupported: dict[str, Any] = {}

    def set(self, method: Callable[..., object], *args: Any, **keywords: Any) -> None:
        """Call a method of a task, or a function of kfp.kubernetes, when there is a task."""
        self.settings.append(lambda task: method(task, *args, **keywords))

    def executor(self) -> Executor:
        for key in ("apiVersion", "kind"):
            self.job.take(key)
        metadata = self.job.child("metadata")
        for key in ("name", "namespace"):  # the step's name; the namespace is that of the run
            metadata.take(key)
        spec = self.job.child("spec")
        self._job(spec)
        template = spec.child("template")
        self._pod_metadata(template.child("metadata"))
        pod = template.child("spec")
        awaits = self._init_containers(pod)
        containers = pod.children("containers")
        if len(containers) != 1:
            raise UserError(f"{pod.path}.containers: has {len(containers)}, and a step of KFP has one. Make it a Job of its "
                            "own, or leave it out of the overlay that is compiled")
        image, command, args = self._container(containers[0], pod)
        self._pod(pod)
        self.unsupported |= dict(self.job.left())
        return Executor(image, command, args, self.settings, self.unsupported, awaits)

    def _job(self, spec: Fields) -> None:
        retries = spec.take("backoffLimit", DEFAULT_BACKOFF_LIMIT)
        self.set(dsl.PipelineTask.set_retry, max(retries, self.restarts), FIRST_PAUSE, PAUSE_FACTOR, RETRIES_END_AFTER)
        for key in ("parallelism", "completions"):
            if spec.take(key, 1) != 1:
                raise UserError(f"spec.{key}: is more than 1, and a step of KFP is one pod. Train on one node here, or leave "
                                "several nodes to the JobSet of overlays/gpu")
        spec.take_if("completionMode", "NonIndexed", "Indexed")  # the only pod has index 0
        spec.take_if("suspend", False)
        if (deadline := spec.take("activeDeadlineSeconds")) is not None:
            self.deadline = deadline
            self.unsupported["spec.activeDeadlineSeconds"] = deadline

    def _pod_metadata(self, metadata: Fields) -> None:
        for key, value in (metadata.take("labels") or {}).items():
            self.set(kubernetes.add_pod_label, key, value)
        for key, value in (metadata.take("annotations") or {}).items():
            self.set(kubernetes.add_pod_annotation, key, value)

    def _init_containers(self, pod: Fields) -> tuple[str, ...]:
        """What the init containers await. Only those that await are replaced, by the order of the steps."""
        awaits: list[str] = []
        containers = pod.take("initContainers") or []
        for container in containers:
            line = [*container.get("command", []), *container.get("args", [])]
            if "await" not in line:
                raise UserError(f"spec.template.spec.initContainers[{container['name']}]: a step of KFP has no init "
                                "containers. Make it a Job of its own, or leave it out of the overlay that is compiled")
            awaits += line[line.index("await") + 1:]
            self.unsupported[f"spec.template.spec.initContainers[{container['name']}]"] = " ".join(line)
        return tuple(awaits)

    def _pod(self, pod: Fields) -> None:
        pod.take_if("restartPolicy", "Never")  # as KFP has it
        pod.take_if("schedulerName", "default-scheduler")
        pod.take_if("dnsPolicy", "ClusterFirst")
        deadlines = [seconds for seconds in (self.deadline, pod.take("activeDeadlineSeconds")) if seconds is not None]
        if deadlines:
            self.set(kubernetes.set_timeout, min(deadlines))
        for key, value in (pod.take("nodeSelector") or {}).items():
            self.set(kubernetes.add_node_selector, key, value)
        for toleration in pod.take("tolerations") or []:
            self.set(kubernetes.add_toleration, key=toleration.get("key"), operator=toleration.get("operator"),
                     value=toleration.get("value"), effect=toleration.get("effect"),
                     toleration_seconds=toleration.get("tolerationSeconds"))
        if node_affinity := pod.child("affinity").take("nodeAffinity"):
            self.set(kubernetes.add_node_affinity_json, node_affinity)
        if secrets := pod.take("imagePullSecrets"):
            self.set(kubernetes.set_image_pull_secrets, [secret["name"] for secret in secrets])

    def _container(self, container: Fields, pod: Fields) -> tuple[str, list[str], list[str]]:
        container.take("name")
        image, command, args = container.take("image"), container.take("command"), container.take("args") or []
        if not command:
            raise UserError(f"{container.path}.command: is missing. KFP replaces the image's own, so the manifest must name "
                            "the program")
        if policy := container.take("imagePullPolicy"):
            self.set(kubernetes.set_image_pull_policy, policy)
        self._env(container)
        self._resources(container.child("resources"))
        self._security(pod.child("securityContext"), container.child("securityContext"))
        self._volumes(container, pod)
        return image, [str(each) for each in command], [str(each) for each in args]

    def _env(self, container: Fields) -> None:
        if container.take("envFrom"):
            raise UserError(f"{container.path}.envFrom: KFP has no such field. Name each variable under `env`")
        for entry in container.children("env"):
            name, source = entry.take("name"), entry.child("valueFrom")
            if secret := source.take("secretKeyRef"):
                self.set(kubernetes.use_secret_as_env, secret["name"], {secret["key"]: name},
                         optional=bool(secret.get("optional")))
            elif config_map := source.take("configMapKeyRef"):
                self.set(kubernetes.use_config_map_as_env, config_map["name"], {config_map["key"]: name},
                         optional=bool(config_map.get("optional")))
            elif field := source.take("fieldRef"):
                if field["fieldPath"] in POD_FIELDS:  # what a JobSet says of its pods
                    self.set(dsl.PipelineTask.set_env_variable, name, POD_FIELDS[field["fieldPath"]])
                else:
                    self.set(kubernetes.use_field_path_as_env, name, field["fieldPath"])
            elif unknown := dict(source.left()):
                raise UserError(f"{', '.join(unknown)}: KFP has no such source of a variable. Give it a `value`")
            else:
                self.set(dsl.PipelineTask.set_env_variable, name, entry.take("value", ""))

    def _resources(self, resources: Fields) -> None:
        requests, limits = resources.child("requests"), resources.child("limits")
        task = dsl.PipelineTask
        for of, cpu, memory in ((requests, task.set_cpu_request, task.set_memory_request),
                                (limits, task.set_cpu_limit, task.set_memory_limit)):
            if (value := of.take("cpu")) is not None:
                self.set(cpu, _cpu(value))
            if (value := of.take("memory")) is not None:
                self.set(memory, _memory(value))
        devices = [path.removeprefix(limits.path + ".") for path, _ in limits.left() if "/" in path]
        if devices:
            count = limits.take(devices[0])
            requests.take_if(devices[0], count)  # Kubernetes wants them equal
            self.set(task.set_accelerator_type, devices[0])
            self.set(task.set_accelerator_limit, count)

    def _security(self, pod: Fields, container: Fields) -> None:
        """The container's own values take precedence, as in Kubernetes."""
        names = {"runAsUser": "run_as_user", "runAsGroup": "run_as_group", "runAsNonRoot": "run_as_non_root"}
        values = {name: value for key, name in names.items()
                  if (value := container.take(key, pod.take(key))) is not None}
        if values:
            self.set(kubernetes.set_security_context, **values)
        # KFP sets these for every step by itself.
        for context in (pod, container):
            context.take_if("seccompProfile", {"type": "RuntimeDefault"})
        container.take_if("allowPrivilegeEscalation", False)
        container.take_if("capabilities", {"drop": ["ALL"]})

    def _volumes(self, container: Fields, pod: Fields) -> None:
        volumes = {volume.take("name"): volume for volume in pod.children("volumes")}
        mounted: dict[str, Mount] = {}
        for mount in container.children("volumeMounts"):
            name, path, sub_path = mount.take("name"), mount.take("mountPath"), mount.take("subPath")
            if name not in volumes:
                raise UserError(f"{mount.path}: the pod has no volume {name}; its volumes: {', '.join(volumes) or 'none'}")
            if name not in mounted:
                mounted[name] = self._volume(name, volumes[name])
            if mounted[name].read_only:
                mount.take_if("readOnly", True)
            if not sub_path:
                self.set(mounted[name].method, mount_path=path, **mounted[name].arguments)
            elif mounted[name].method is kubernetes.mount_pvc:
                self.set(kubernetes.mount_pvc, mount_path=path, sub_path=sub_path, **mounted[name].arguments)
            else:
                raise UserError(f"{mount.path}.subPath: KFP has it of a persistentVolumeClaim only. Mount the whole volume")

    def _volume(self, name: str, volume: Fields) -> Mount:
        kinds = sorted({path.removeprefix(f"{volume.path}.").partition(".")[0] for path, _ in volume.left()})
        source = volume.child(kinds[0]) if len(kinds) == 1 else volume
        match kinds:
            case ["persistentVolumeClaim"]:
                return Mount(kubernetes.mount_pvc, {"pvc_name": source.take("claimName")})
            case ["configMap" | "secret"]:
                if source.take("items"):
                    raise UserError(f"{source.path}.items: KFP mounts all keys, by their own names. Leave `items` out")
                optional = bool(source.take("optional"))
                if kinds == ["secret"]:
                    return Mount(kubernetes.use_secret_as_volume,
                                 {"secret_name": source.take("secretName"), "optional": optional}, read_only=True)
                return Mount(kubernetes.use_config_map_as_volume,
                             {"config_map_name": source.take("name"), "optional": optional}, read_only=True)
            case ["emptyDir"]:
                return Mount(kubernetes.empty_dir_mount, {"volume_name": name, "medium": source.take("medium"),
                                                          "size_limit": source.take("sizeLimit")})
        raise UserError(f"{volume.path}: is a {', '.join(kinds) or 'volume of no type'}. KFP mounts persistentVolumeClaim, "
                        "configMap, secret and emptyDir")


def _cpu(value: Any) -> str:
    """A quantity of CPUs as kfp reads it: `4`, `0.5` or `20m`."""
    text = str(value)
    return text if re.fullmatch(r"([0-9]*\.)?[0-9]+m?", text) else f"{int(parse_quantity(text) * 1000)}m"


def _memory(value: Any) -> str:
    """A quantity of memory as kfp reads it: a whole number with a unit."""
    text = str(value)
    return text if re.fullmatch(r"[0-9]+([EPTGMK]i?)?", text) else str(int(parse_quantity(text)))
