"""A Job as a step of a KubeFlow pipeline. Every field of it becomes a setting of kfp, is listed as one that KubeFlow
Pipelines cannot say, or is refused because the step would do something else without it.
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

# Retries as a Job makes them: 10 s, 20 s, 40 s, … apart. What KFP calls the maximal duration is no limit for a pause,
# but the time from the start of the first attempt after which Argo retries no more. Its default of one hour would leave
# a training of many hours without a retry.
FIRST_PAUSE = "10s"
PAUSE_FACTOR = 2.0
RETRIES_END_AFTER = f"{30 * 24 * 3600}s"
DEFAULT_BACKOFF_LIMIT = 6  # of Kubernetes

# What a Job says and KubeFlow Pipelines cannot, by the path of the field, and what happens instead. Fields that are not
# here are listed with DEFAULT_REASON. The table in docs/kubeflow.md says more.
UNSUPPORTED = {
    "metadata": "KFP makes no Job that could bear it; labels and annotations of the pods are set",
    "spec.activeDeadlineSeconds": "limits each attempt instead of all of them",
    "spec.podFailurePolicy": "KFP retries whatever the exit code, also 2, and counts evictions as attempts",
    "spec.template.metadata": "of a pod, KFP sets labels and annotations only",
    "spec.template.spec.affinity": "KFP has node affinity only; see ReadWriteOnce volumes",
    "spec.template.spec.automountServiceAccountToken": "the launcher of KFP in the pod needs the token",
    "spec.template.spec.containers.resources": "KFP has CPU, memory and one kind of accelerator",
    "spec.template.spec.containers.securityContext": "KFP sets user and group, and drops capabilities; nothing else",
    "spec.template.spec.containers.securityContext.readOnlyRootFilesystem": "the root filesystem is writable",
    "spec.template.spec.containers.terminationMessagePolicy": "read the log of the step",
    "spec.template.spec.containers.volumeMounts.readOnly": "KFP mounts claims writable",
    "spec.template.spec.enableServiceLinks": "pods get variables for each Service of the namespace",
    "spec.template.spec.initContainers": "the order of the steps takes its place",
    "spec.template.spec.priorityClassName": "pods get the default priority of the cluster",
    "spec.template.spec.securityContext": "KFP sets user and group only; kubeflow/environment makes volumes writable",
    "spec.template.spec.serviceAccountName": "KFP has one service account for a whole run",
    "spec.template.spec.volumes": "KFP mounts all keys, by their own names, with the usual permissions",
    "spec.template.spec.terminationGracePeriodSeconds": "30 seconds; later, work since the last checkpoint is repeated",
    "spec.ttlSecondsAfterFinished": "KFP removes pods of finished runs by its own settings",
}
DEFAULT_REASON = "KFP has no such field"
WHOLE = ("metadata", "spec.podFailurePolicy", "spec.template.spec.affinity.podAffinity",
         "spec.template.spec.affinity.podAntiAffinity", "spec.template.spec.initContainers")
ADVICE = "Make it a Job of its own, or leave it out of the overlay that is compiled"


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


def shown(path: str) -> str:
    """A field as it is listed: without names in lists (`containers[job].args` is `containers.args`), and those of WHOLE
    without what is below them."""
    plain = re.sub(r"\[[^]]*\]", "", path)
    return next((whole for whole in WHOLE if plain.startswith(f"{whole}.")), plain)


def reason(path: str) -> str:
    """What happens instead of a field that KubeFlow Pipelines cannot say."""
    known = [prefix for prefix in UNSUPPORTED if path == prefix or path.startswith(f"{prefix}.")]
    return UNSUPPORTED[max(known, key=len)] if known else DEFAULT_REASON


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
            raise UserError(f"{pod.path}.containers: has {len(containers)}, and a step of KFP has one. {ADVICE}")
        image, command, args = self._container(containers[0], pod)
        self._pod(pod)
        self.unsupported |= dict(self.job.left())
        return Executor(image, command, args, self.settings, self.unsupported, awaits)

    def _job(self, spec: Fields) -> None:
        retries = max(spec.take("backoffLimit", DEFAULT_BACKOFF_LIMIT), self.restarts)
        if retries:  # without a policy there are none; in the IR, a policy with 0 has no number
            self.set(dsl.PipelineTask.set_retry, retries, FIRST_PAUSE, PAUSE_FACTOR, RETRIES_END_AFTER)
        for key in ("parallelism", "completions"):
            if spec.take(key, 1) != 1:
                raise UserError(f"spec.{key}: must be 1, because a step of KFP is one pod. Set it to 1, or leave "
                                "training on several nodes to the JobSet (docs/kubeflow.md)")
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
                raise UserError(f"{pod.path}.initContainers[{container['name']}]: a step of KFP has none. {ADVICE}")
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
        for toleration in pod.children("tolerations"):
            self.set(kubernetes.add_toleration, toleration_seconds=toleration.take("tolerationSeconds"),
                     **{key: toleration.take(key) for key in ("key", "operator", "value", "effect")})
        if node_affinity := pod.child("affinity").take("nodeAffinity"):
            self.set(kubernetes.add_node_affinity_json, node_affinity)
        if secrets := [secret.take("name") for secret in pod.children("imagePullSecrets")]:
            self.set(kubernetes.set_image_pull_secrets, secrets)

    def _container(self, container: Fields, pod: Fields) -> tuple[str, list[str], list[str]]:
        container.take("name")
        image, command, args = container.take("image"), container.take("command"), container.take("args") or []
        if not command:
            raise UserError(f"{container.path}.command: is missing, and KFP does not use the image's own. Name the "
                            "program")
        if policy := container.take("imagePullPolicy"):
            self.set(kubernetes.set_image_pull_policy, policy)
        self._env(container)
        for text in (image, *command, *args):
            _check_text(text, container.path)
        self._resources(container.child("resources"))
        self._security(pod.child("securityContext"), container.child("securityContext"))
        self._volumes(container, pod)
        return image, [str(each) for each in command], [str(each) for each in args]

    def _env(self, container: Fields) -> None:
        if container.take("envFrom"):
            raise UserError(f"{container.path}.envFrom: KFP has no such field. Name each variable under `env`")
        entries = container.children("env")
        referred = {entry.get("name") for entry in entries if entry.get("valueFrom")}
        for entry in entries:
            name, source = entry.take("name"), entry.child("valueFrom")
            kinds = source.keys()
            of = source.child(kinds[0]) if len(kinds) == 1 else source
            match kinds:
                case []:
                    value = entry.take("value", "")
                    _check_text(value, entry.path)
                    for other in referred & set(re.findall(r"\$\(([^()]+)\)", value)):
                        raise UserError(f"{entry.path}.value: refers to $({other}), which KFP sets later, so it would "
                                        "stay as it is")
                    self.set(dsl.PipelineTask.set_env_variable, name, value)
                case ["secretKeyRef"]:
                    self.set(kubernetes.use_secret_as_env, of.take("name"), {of.take("key"): name},
                             optional=bool(of.take("optional")))
                case ["configMapKeyRef"]:
                    self.set(kubernetes.use_config_map_as_env, of.take("name"), {of.take("key"): name},
                             optional=bool(of.take("optional")))
                case ["fieldRef"]:
                    of.take_if("apiVersion", "v1")
                    if (field := of.take("fieldPath")) in POD_FIELDS:  # what a JobSet says of its pods
                        self.set(dsl.PipelineTask.set_env_variable, name, POD_FIELDS[field])
                    else:
                        self.set(kubernetes.use_field_path_as_env, name, field)
                case _:
                    raise UserError(f"{source.path}: is {', '.join(kinds)}, which KFP does not have as the source of a "
                                    "variable. Give it a `value`")

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
                raise UserError(f"{mount.path}: the pod has no such volume; it has {', '.join(volumes) or 'none'}")
            if name not in mounted:
                mounted[name] = self._volume(name, volumes[name])
            mount.take_if("readOnly", mounted[name].read_only)
            if not sub_path:
                self.set(mounted[name].method, mount_path=path, **mounted[name].arguments)
            elif mounted[name].method is kubernetes.mount_pvc:
                self.set(kubernetes.mount_pvc, mount_path=path, sub_path=sub_path, **mounted[name].arguments)
            else:
                raise UserError(f"{mount.path}.subPath: KFP has it for a persistentVolumeClaim only. Mount the whole "
                                "volume")

    def _volume(self, name: str, volume: Fields) -> Mount:
        kinds = volume.keys()
        source = volume.child(kinds[0]) if len(kinds) == 1 else volume
        match kinds:
            case ["persistentVolumeClaim"]:
                return Mount(kubernetes.mount_pvc, {"pvc_name": source.take("claimName")})
            case ["configMap" | "secret"]:
                optional = bool(source.take("optional"))
                moved = [item for item in source.get("items") or [] if item["path"] != item["key"]]
                if moved and not optional:  # a step can do without what is optional
                    raise UserError(f"{source.path}.items: KFP mounts keys by their own names. Name the key "
                                    f"{moved[0]['path']} instead of {moved[0]['key']}, and leave `items` out")
                if kinds == ["secret"]:
                    return Mount(kubernetes.use_secret_as_volume,
                                 {"secret_name": source.take("secretName"), "optional": optional}, read_only=True)
                return Mount(kubernetes.use_config_map_as_volume,
                             {"config_map_name": source.take("name"), "optional": optional}, read_only=True)
            case ["emptyDir"]:
                return Mount(kubernetes.empty_dir_mount, {"volume_name": name, "medium": source.take("medium"),
                                                          "size_limit": source.take("sizeLimit")})
        raise UserError(f"{volume.path}: is {', '.join(kinds) or 'of no type'}, which KFP cannot mount. It mounts "
                        "persistentVolumeClaim, configMap, secret and emptyDir")


def _check_text(text: Any, path: str) -> None:
    if "{{" in str(text):
        raise UserError(f"{path}: has `{{{{`, with which placeholders of KFP and Argo begin. Write it differently")


def _cpu(value: Any) -> str:
    """A quantity of CPUs as kfp reads it: `4`, `0.5` or `20m`."""
    text = str(value)
    return text if re.fullmatch(r"([0-9]*\.)?[0-9]+m?", text) else f"{int(parse_quantity(text) * 1000)}m"


def _memory(value: Any) -> str:
    """A quantity of memory as kfp reads it: a whole number with a unit."""
    text = str(value)
    return text if re.fullmatch(r"[0-9]+([EPTGMK]i?)?", text) else str(int(parse_quantity(text)))
