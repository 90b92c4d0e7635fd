"""Strict validation of manifests: Kubernetes' own schemas, and for custom resources those in tests/schemas."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import kubernetes_validate
from kubernetes_validate.utils import schema_contents
from referencing import Registry, Resource

from tests.manifests import CHECKOUT, Manifest

KUBERNETES = "1.32"
SCHEMAS = CHECKOUT / "tests" / "schemas"
NAME_LENGTH = 63  # characters of a pod's host name, and of a label's value


def problems(manifest: Manifest) -> list[str]:
    """What a cluster would refuse or silently drop: unknown fields, wrong types and values, missing fields.

    One line each, e.g. `spec.replicas: 'two' is not of type 'integer'`. A kind without a schema is a problem, too.
    """
    kind, version = manifest.get("kind", "?"), manifest.get("apiVersion", "?")
    file = SCHEMAS / f"{kind.lower()}-{version.replace('/', '-')}.json"
    if not file.is_file():
        return _kubernetes(manifest)
    validator = jsonschema.Draft202012Validator(json.loads(file.read_text()), registry=_registry())
    found = [description(error) for error in validator.iter_errors(manifest)]
    if not found and kind == "JobSet":
        found = list(_jobset(manifest))
    return found


def _kubernetes(manifest: Manifest) -> list[str]:
    try:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [description(error)]
    except (kubernetes_validate.SchemaNotFoundError, KeyError):
        return [f"no schema for {manifest.get('apiVersion')} {manifest.get('kind')}: add it to tests/schemas"]
    return []


def description(error: jsonschema.ValidationError) -> str:
    return f"{'.'.join(map(str, error.absolute_path))}: {error.message}"


@functools.cache
def _registry() -> Registry[Any]:
    """What the schemas of custom resources refer to: Kubernetes' own types (metadata, pod templates, selectors), and
    each other by the names of their files."""
    types = schema_contents(f"kubernetes-json-schema/v{KUBERNETES}.0-local-strict/_definitions.json", KUBERNETES)
    files = [(file.name, Resource.from_contents(json.loads(file.read_text()))) for file in SCHEMAS.glob("*.json")]
    return (Resource.from_contents(types) @ Registry()).with_resources(files)


def _jobset(manifest: Manifest) -> Iterator[str]:
    """What JobSet's admission webhook refuses beyond its schema, and names that its pods could not have."""
    name, spec = manifest["metadata"]["name"], manifest["spec"]
    jobs = {job["name"]: job for job in spec["replicatedJobs"]}
    known: list[str] = []
    for title, job in jobs.items():
        for dependency in job.get("dependsOn", []):
            if dependency["name"] not in known:
                yield f"{title}: dependsOn {dependency['name']}, which does not stand before it"
        known.append(title)
        # JobSet makes every Job an indexed one, whose pods have these host names. With `completions`, its webhook also
        # counts the random suffix of the pods' names.
        completions = job["template"]["spec"].get("completions")
        pod = f"{name}-{title}-{job.get('replicas', 1) - 1}-{(completions or 1) - 1}{'-abcde' if completions else ''}"
        if len(pod) > NAME_LENGTH:
            yield f"{title}: its pods' names have {len(pod)} characters, e.g. {pod}"
    rules = spec.get("failurePolicy", {}).get("rules", [])
    targets = [t for group in (spec.get("successPolicy", {}), *rules) for t in group.get("targetReplicatedJobs", [])]
    if "coordinator" in spec:
        coordinator = spec["coordinator"]
        targets.append(coordinator["replicatedJob"])
        subdomain = spec.get("network", {}).get("subdomain", name)
        host = (f"{name}-{coordinator['replicatedJob']}-{coordinator.get('jobIndex', 0)}-"
                f"{coordinator.get('podIndex', 0)}.{subdomain}")
        if len(host) > NAME_LENGTH:  # JobSet puts it on every pod as a label
            yield f"coordinator: its address has {len(host)} characters: {host}"
    yield from (f"{target}: is named but not one of the replicatedJobs" for target in targets if target not in jobs)
