"""Argo CD: its settings as a fork would have them, and what the status of an Application means."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import yaml

from jobs.tools.kubectl import Kubectl
from jobs.tools.pods import CHECKOUT, Manifest, containers
from jobs.tools.status import State

NAMESPACE = "argocd"  # as in argocd/kustomization.yaml
KIND = "applications.argoproj.io"
REFRESH = "argocd.argoproj.io/refresh"


def with_settings(folder: Path, repo: str, revision: str, overlay: str, namespace: str) -> Path:
    """Copy argocd/ into `folder`, which must not have it, with its settings edited; returns the copy.

    It deploys this one environment: those that are listed in the settings are left out.
    """
    copy = Path(shutil.copytree(CHECKOUT / "argocd", folder / "argocd"))
    documents = list(yaml.safe_load_all((copy / "settings.yaml").read_text()))
    for document in documents:
        match document["kind"]:
            case "ConfigMap":
                document["data"] = {"repoURL": repo, "revision": revision, "overlay": overlay, "namespace": namespace}
            case "ApplicationSet":
                document["spec"]["generators"] = [{"list": {"elements": []}}]
            case "AppProject":  # the first of each list is the one of `namespace`
                for key in ("destinations", "clusterResourceWhitelist"):
                    del document["spec"][key][1:]
    (copy / "settings.yaml").write_text(yaml.safe_dump_all(documents))
    return copy


def refresh(kubectl: Kubectl, application: str, how: str = "normal") -> None:
    """Have Argo CD compare the Application with git now, as a webhook does (`hard`: and render it anew)."""
    kubectl("-n", NAMESPACE, "annotate", "--overwrite", KIND, application, f"{REFRESH}={how}")


def refreshed(application: Manifest) -> bool:
    """Whether Argo CD has compared since `refresh`: it then removes the annotation. Until then its status is about the
    commit before."""
    return REFRESH not in application.get("metadata", {}).get("annotations", {})


def synced(application: Manifest, commit: str | None = None) -> bool:
    """Whether everything that the commit describes is applied (None: whatever commit the branch has)."""
    status = application.get("status", {})
    sync, phase = status.get("sync", {}), status.get("operationState", {}).get("phase", "Succeeded")
    return bool(refreshed(application) and sync.get("status") == "Synced" and phase == "Succeeded"
                and commit in (None, sync.get("revision")))


def out_of_sync(application: Manifest) -> list[str]:
    """The objects that differ from git. (Since Argo CD 3 their health is not written here, only the Application's.)"""
    return [f"{each['kind']} {each['name']}: {each.get('status')}"
            for each in application["status"]["resources"] if each.get("status") != "Synced"]


def state(application: Manifest | None, commit: str | None) -> State:
    """Done as soon as everything is applied; the state of Jobs and Deployments is their own."""
    if application is None:
        return State("not there yet")
    status = application.get("status", {})
    operation = status.get("operationState", {})
    errors = [c["message"] for c in status.get("conditions", []) if c["type"].endswith("Error")]
    if operation.get("phase") in ("Failed", "Error") or operation.get("retryCount"):
        errors += [operation.get("message", ""),
                   *(f"{r['kind']}/{r['name']}: {r.get('message')}"
                     for r in operation.get("syncResult", {}).get("resources", []) if r.get("status") == "SyncFailed")]
    sync, health = status.get("sync", {}).get("status"), status.get("health", {}).get("status", "unknown")
    return State(" ".join([f"{sync or 'not compared yet'}, {health}", *(f"({error})" for error in errors)]),
                 done=synced(application, commit))


def jobs_of(application: Manifest) -> list[str]:
    """The names of the Jobs that the Application has synced, without those that it still has to prune."""
    return [r["name"] for r in application["status"]["resources"]
            if r["kind"] == "Job" and not r.get("requiresPruning")]


def git_server(image: str) -> str:
    """The manifests of the demo's git server, which runs in Argo CD's image."""
    documents = list(yaml.safe_load_all((CHECKOUT / "argocd" / "demo" / "git-server.yaml").read_text()))
    for document in documents:
        if document["kind"] == "Deployment":
            for container in containers(document["spec"]["template"]):
                container["image"] = image
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": documents})
