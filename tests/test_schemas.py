"""Every document that can be applied is valid: no unknown or misspelt field, no wrong type, no kind without schema."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml

from tests.manifests import CHECKOUT, Manifest
from tests.renderings import FOLDERS, NAMES, parts, rendered
from tests.validation import SCHEMAS, problems

# One good document of each custom resource, with the fields that the project uses or may soon use.
GOOD: dict[str, Manifest] = {document["kind"]: document for document in yaml.safe_load_all("""
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata: {name: pipeline, annotations: {a: b}, labels: {kueue.x-k8s.io/queue-name: gpu}}
spec:
  coordinator: {replicatedJob: second, jobIndex: 0, podIndex: 0}
  failurePolicy:
    maxRestarts: 3
    rules:
    - {name: userError, action: FailJobSet, onJobFailureReasons: [PodFailurePolicy], targetReplicatedJobs: [first]}
  replicatedJobs:
  - name: first
    template: &template
      spec:
        backoffLimit: 0
        template:
          metadata: {labels: {a: b}}
          spec:
            restartPolicy: Never
            containers: [{name: job, image: "i:1", resources: {limits: {nvidia.com/gpu: 1}}}]
  - name: second
    replicas: 1
    dependsOn: [{name: first, status: Complete}]
    template: *template
---
apiVersion: argoproj.io/v1alpha1
kind: AppProject
metadata: {name: lora-gitops, namespace: argocd}
spec:
  description: private fine-tuning
  sourceRepos: [https://git.example.com/lora-gitops.git]
  destinations: [{server: https://kubernetes.default.svc, namespace: lora-gitops}]
  clusterResourceWhitelist: [{group: "", kind: Namespace}]
  namespaceResourceWhitelist: [{group: batch, kind: Job}]
  orphanedResources: {warn: false}
---
apiVersion: argoproj.io/v1alpha1
kind: Application
metadata: {name: kind, namespace: argocd}
spec:
  project: lora-gitops
  source: {repoURL: https://git.example.com/lora-gitops.git, targetRevision: main, path: overlays/kind}
  destination: {server: https://kubernetes.default.svc, namespace: lora-gitops}
  syncPolicy:
    automated: {prune: true, selfHeal: true}
    retry: {limit: 5, backoff: {duration: 5s, factor: 2, maxDuration: 3m}}
    syncOptions: [ServerSideApply=true]
  ignoreDifferences: [{group: apps, kind: Deployment, jsonPointers: [/spec/replicas]}]
---
apiVersion: argoproj.io/v1alpha1
kind: ApplicationSet
metadata: {name: environments, namespace: argocd}
spec:
  goTemplate: true
  goTemplateOptions: [missingkey=error]
  generators: [{list: {elements: [{name: kind, path: overlays/kind}]}}]
  syncPolicy: {preserveResourcesOnDeletion: false, applicationsSync: sync}
  template:
    metadata: {name: "{{ .name }}", labels: {a: b}, finalizers: [resources-finalizer.argocd.argoproj.io]}
    spec:
      project: lora-gitops
      source: {repoURL: https://git.example.com/lora-gitops.git, targetRevision: main, path: "{{ .path }}"}
      destination: {server: https://kubernetes.default.svc, namespace: lora-gitops}
---
apiVersion: tensorboard.kubeflow.org/v1alpha1
kind: Tensorboard
metadata: {name: trainings}
spec: {logspath: pvc://volume/folder}
---
apiVersion: keda.sh/v1alpha1
kind: ScaledObject
metadata: {name: model-inference}
spec:
  scaleTargetRef: {name: model-inference}
  minReplicaCount: 1
  maxReplicaCount: 4
  advanced: {horizontalPodAutoscalerConfig: {behavior: {scaleDown: {stabilizationWindowSeconds: 600}}}}
  triggers: [{type: prometheus, metricType: AverageValue, metadata: {query: "sum(x)", threshold: "4"}}]
---
apiVersion: monitoring.coreos.com/v1
kind: PodMonitor
metadata: {name: model-inference}
spec:
  selector: {matchLabels: {app.kubernetes.io/name: model-inference}}
  podMetricsEndpoints: [{port: http, path: /metrics, interval: 15s}]
""")}
POD = "spec.replicatedJobs.0.template.spec.template.spec"


@pytest.mark.parametrize("name", NAMES)
def test_every_document_is_valid(name: str) -> None:
    found = {f"{m['kind']} {m['metadata']['name']}": problems(m) for m in rendered(name)}
    assert len(found) > 0
    assert {document: lines for document, lines in found.items() if lines} == {}


def test_every_component_is_in_what_is_checked() -> None:
    """As it is, or offered in a comment of a kustomization.yaml: nothing lies about that nobody renders."""
    checked = set().union(*(parts(folder) for folder in FOLDERS))
    components = {p.parent for part in ("base", "serving", "overlays")
                  for p in (CHECKOUT / part).rglob("kustomization.yaml") if "kind: Component" in p.read_text()}
    assert components <= checked


def test_every_file_of_argocd_that_is_applied_is_in_what_is_rendered() -> None:
    content = yaml.safe_load((CHECKOUT / "argocd" / "kustomization.yaml").read_text())
    used = {*content["resources"], *(patch["path"] for patch in content["patches"])}
    found = {file.name for file in (CHECKOUT / "argocd").glob("*.yaml")}
    assert found - used == {"kustomization.yaml", "jobset-health.yaml", "pod-security.yaml"}  # settings of the cluster


@pytest.mark.parametrize("kind", GOOD)
def test_a_good_custom_resource_has_no_problems(kind: str) -> None:
    assert problems(GOOD[kind]) == []


@pytest.mark.parametrize("file", sorted(SCHEMAS.glob("*.json")), ids=lambda p: p.stem)
def test_every_schema_is_a_schema_and_tried_on_a_document(file: Any) -> None:
    schema = json.loads(file.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    tried = {f"{m['kind'].lower()}-{m['apiVersion'].replace('/', '-')}.json" for m in GOOD.values()}
    assert file.name in tried
    assert file.name in (SCHEMAS / "README.md").read_text(), "its source belongs into the README"


@pytest.mark.parametrize(("kind", "path", "value", "message"), [
    # misspelt: the cluster would drop it without a word
    ("JobSet", "spec.replicatedJob", [], "'replicatedJob' was unexpected"),
    ("JobSet", f"{POD}.restartpolicy", "Never", "'restartpolicy' was unexpected"),
    ("JobSet", f"{POD}.containers.0.volumeMount", [], "'volumeMount' was unexpected"),
    ("AppProject", "spec.sourceRepo", ["*"], "'sourceRepo' was unexpected"),
    ("Application", "spec.syncPolicy.automated.selfheal", True, "'selfheal' was unexpected"),
    ("Application", "metadata.label", {}, "'label' was unexpected"),
    ("ApplicationSet", "spec.template.spec.syncPolicy", {"automatic": {}}, "'automatic' was unexpected"),
    ("ApplicationSet", "spec.generators.0.lists", {}, "'lists' was unexpected"),
    ("ScaledObject", "spec.maxReplicas", 4, "'maxReplicas' was unexpected"),
    ("PodMonitor", "spec.podMetricsEndpoints.0.intervall", "15s", "'intervall' was unexpected"),
    # of a wrong type
    ("JobSet", "spec.replicatedJobs.0.replicas", "1", "spec.replicatedJobs.0.replicas: '1' is not of type 'integer'"),
    ("JobSet", f"{POD}.containers.0.image", 1, "1 is not of type 'string'"),
    ("AppProject", "spec.destinations", {}, "{} is not of type 'array'"),
    ("Application", "spec.syncPolicy.automated.prune", "true", "'true' is not of type 'boolean'"),
    ("ScaledObject", "spec.triggers.0.metadata.threshold", 4, "4 is not of type 'string'"),
    ("ScaledObject", "spec.advanced.horizontalPodAutoscalerConfig.behavior.scaleDown.stabilizationWindowSeconds", "600",
     "'600' is not of type 'integer'"),
    ("PodMonitor", "spec.selector.matchLabels", [], "[] is not of type 'object'"),
    # a value that does not exist
    ("JobSet", "spec.replicatedJobs.1.dependsOn", [{"name": "first", "status": "Completed"}], "'Completed' is not one"),
    ("JobSet", "spec.failurePolicy.rules.0.action", "Fail", "'Fail' is not one of"),
    ("JobSet", "spec.failurePolicy.rules.0.name", "user-error", "'user-error' does not match"),
    ("JobSet", "spec.failurePolicy.rules.0.onJobFailureReasons", ["Exit2"], "'Exit2' is not one of"),
    ("ApplicationSet", "spec.syncPolicy.applicationsSync", "never", "'never' is not one of"),
    ("Application", "apiVersion", "argoproj.io/v1", "no schema for argoproj.io/v1 Application"),
    ("PodMonitor", "spec.podMetricsEndpoints.0.interval", "15 s", "'15 s' does not match"),
    # what JobSet's webhook refuses
    ("JobSet", "spec.replicatedJobs.1.dependsOn", [{"name": "first", "status": "Complete"}] * 2, "is too long"),
    ("JobSet", "spec.replicatedJobs.0.dependsOn", [{"name": "second", "status": "Complete"}], "stand before it"),
    ("JobSet", "spec.failurePolicy.rules.0.targetReplicatedJobs", ["third"], "third: is named but not one"),
    ("JobSet", "spec.coordinator.replicatedJob", "third", "third: is named but not one"),
    ("JobSet", "metadata.name", "a-name-" * 8, "its pods' names have 66 characters"),
    ("JobSet", "spec.replicatedJobs.1.template.spec.completions", 10**40, "its pods' names have 64 characters"),
    ("JobSet", "metadata.name", "a-name-" * 4, "coordinator: its address has 68 characters"),
])
def test_a_mistake_in_a_custom_resource_is_found(kind: str, path: str, value: Any, message: str) -> None:
    document = deepcopy(GOOD[kind])
    node: Any = document
    *parents, last = path.split(".")
    for key in parents:
        node = node[int(key) if key.isdigit() else key]
    node[last] = value
    assert any(message in line for line in problems(document)), problems(document)


@pytest.mark.parametrize(("kind", "path"), [
    ("JobSet", "spec.replicatedJobs.0.template"), ("JobSet", "spec.replicatedJobs.1.dependsOn.0.status"),
    ("AppProject", "spec"), ("Application", "spec.project"), ("Application", "spec.destination"),
    ("ApplicationSet", "spec.template.spec.project"), ("ApplicationSet", "spec.generators.0.list.elements"),
    ("ScaledObject", "spec.scaleTargetRef"), ("ScaledObject", "spec.triggers"), ("PodMonitor", "spec.selector"),
    ("PodMonitor", "metadata"),
])
def test_a_field_that_is_missing_is_found(kind: str, path: str) -> None:
    document = deepcopy(GOOD[kind])
    node: Any = document
    *parents, last = path.split(".")
    for key in parents:
        node = node[int(key) if key.isdigit() else key]
    del node[last]
    assert any(f"'{last}' is a required property" in line for line in problems(document)), problems(document)


@pytest.mark.parametrize("document", [
    {"apiVersion": "kueue.x-k8s.io/v1beta1", "kind": "LocalQueue", "metadata": {"name": "gpu"}},
    {"apiVersion": "batch/v2", "kind": "Job", "metadata": {"name": "a"}},
    {"apiVersion": "batch.example.com/v1", "kind": "Job", "metadata": {"name": "a"}},
    {"kind": "Job", "metadata": {"name": "a"}},
])
def test_a_kind_without_a_schema_is_a_problem_and_not_skipped(document: Manifest) -> None:
    assert problems(document)
