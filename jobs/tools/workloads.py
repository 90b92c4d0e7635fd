"""What an overlay runs, by its rendered manifests: which Job or JobSet carries out which stage of which adapter, and
what changed in the pods of a Deployment.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from jobs.core import pipeline
from jobs.tools import pods
from jobs.tools.pods import HASH_SUFFIX, Manifest


@dataclass(frozen=True)
class Workload:
    """One Job, or one JobSet."""

    kind: str
    name: str  # as rendered, with the hash of its content
    stages: tuple[tuple[str, str | None], ...]  # its commands (`relocate dataset`), and for which adapter each is

    @property
    def title(self) -> str:
        """The name without the hash."""
        return HASH_SUFFIX.sub("", self.name)

    @property
    def hash(self) -> str:
        return self.name.removeprefix(self.title).removeprefix("-")


def find(manifests: list[Manifest], commands: Mapping[str, bool]) -> list[Workload]:
    """The Jobs and JobSets that carry out stages, by name.

    Args:
        commands: of every stage, such as `relocate dataset`, and whether it belongs to an adapter.
    """
    adapters = _adapters(manifests)
    found = []
    for manifest in manifests:
        if manifest["kind"] == "Job":
            templates = [manifest["spec"]["template"]]
        elif manifest["kind"] == "JobSet":
            templates = [job["template"]["spec"]["template"] for job in manifest["spec"]["replicatedJobs"]]
        else:
            continue
        stages = tuple(stage for template in templates for stage in _stages(template, commands, adapters))
        if stages:
            found.append(Workload(manifest["kind"], manifest["metadata"]["name"], stages))
    return sorted(found, key=lambda workload: workload.name)


def _adapters(manifests: list[Manifest]) -> dict[str, str]:
    """The adapter whose pipeline file is in a ConfigMap, by the ConfigMap's name."""
    found = {}
    for manifest in manifests:
        text = (manifest.get("data") or {}).get(pipeline.FILE) if manifest["kind"] == "ConfigMap" else None
        if isinstance(text, str):
            try:
                content = yaml.load(text, pods.KubernetesYaml)  # noqa: S506 - it is safe
            except yaml.YAMLError:
                continue
            if isinstance(content, dict):
                found[manifest["metadata"]["name"]] = str(content.get("adapter"))
    return found


def _stages(template: Manifest, commands: Mapping[str, bool], adapters: Mapping[str, str]) \
        -> Iterator[tuple[str, str | None]]:
    """The stages that a pod carries out, by the arguments of its containers; none if it does something else."""
    for container in template["spec"]["containers"]:
        arguments = [str(argument) for argument in container.get("args") or []]
        for command, of_adapter in commands.items():
            if arguments[-len(command.split()):] == command.split():
                mounted = [adapters[name] for name in _config_maps(template) if name in adapters]
                if not of_adapter:
                    yield command, None
                elif mounted:
                    yield command, mounted[0]


def _config_maps(template: Manifest) -> Iterator[str]:
    """The ConfigMaps that a pod mounts."""
    for volume in template["spec"].get("volumes") or []:
        for source in [volume, *(volume.get("projected") or {}).get("sources", [])]:
            if config_map := source.get("configMap"):
                yield config_map["name"]


def pod_templates(manifests: list[Manifest]) -> dict[str, Manifest]:
    """The pod template of every Deployment, by its name."""
    return {m["metadata"]["name"]: m["spec"]["template"] for m in manifests if m["kind"] == "Deployment"}


def namespace(manifests: list[Manifest]) -> str | None:
    """The namespace of the overlay's Jobs and Deployments."""
    return next((m["metadata"].get("namespace") for m in manifests if m["kind"] in ("Job", "JobSet", "Deployment")),
                None)


def differences(before: Any, after: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """What differs between two manifests: the path, and both values; None for what is not there. Entries of lists are
    matched by their names."""
    before, after = _by_name(before), _by_name(after)
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys([*before, *after]):
            yield from differences(before.get(key), after.get(key), f"{path}.{key}" if path else str(key))
    elif before != after:
        yield path, before, after


def _by_name(value: Any) -> Any:
    named = isinstance(value, list) and value and all(isinstance(each, dict) and "name" in each for each in value)
    return {each["name"]: {k: v for k, v in each.items() if k != "name"} for each in value} if named else value


