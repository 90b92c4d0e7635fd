"""The same environment, made by Argo CD from a branch of a git repository, with argocd/ as it is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import yaml

from tests.e2e.cluster import LABEL, Changes, Environment, KubectlError, kubectl, said, wait_until
from tests.manifests import CHECKOUT, Manifest, unhashed

ARGOCD = "argocd"  # the namespace, as in argocd/kustomization.yaml


def missing() -> str | None:
    """Why nothing can be tried with Argo CD here; None when all is there."""
    for name in ("E2E_REPO_URL", "E2E_REPO_PUSH"):
        if not os.environ.get(name):
            return f"{name} is not set (tests/e2e/README.md)"
    try:
        kubectl("get", "crd", "applications.argoproj.io")
    except KubectlError as error:
        return f"Argo CD is not in this cluster: {error}"
    return None


class Followed(Environment):
    """A push is a commit on a branch of this run's own, and returns when Argo CD has synced it."""

    def __init__(self, folder: Path, namespace: str, run: str) -> None:
        super().__init__(folder, namespace, run)
        self.branch = f"e2e-{run}"
        self.application = f"lora-gitops-{self.branch}"  # and its AppProject
        self.git("init", "--quiet", f"--initial-branch={self.branch}")
        self.commit()

    def git(self, *arguments: str) -> str:
        done = subprocess.run(
            ["git", "-c", "user.name=e2e", "-c", "user.email=e2e@example.com", *arguments], cwd=self.folder,
            env={**os.environ, "GIT_TERMINAL_PROMPT": "0"}, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, f"git {' '.join(arguments)}: {done.stderr}"
        return done.stdout.strip()

    def commit(self) -> None:
        """Put the overlay, changed or not, into a commit and bring it where Argo CD looks."""
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message=e2e")
        self.git("push", "--quiet", os.environ["E2E_REPO_PUSH"], f"HEAD:refs/heads/{self.branch}")

    def bootstrap(self) -> None:
        """`kubectl apply -k argocd`, with settings.yaml edited as in a fork, under names of this run's own."""
        fork = self.folder.parent / "fork"
        shutil.copytree(CHECKOUT / "argocd", fork / "argocd")
        file = fork / "argocd" / "settings.yaml"
        settings = yaml.safe_load(file.read_text())
        settings["data"] = {"repoURL": os.environ["E2E_REPO_URL"], "revision": self.branch,
                            "overlay": "overlays/e2e", "namespace": self.namespace}
        file.write_text(yaml.safe_dump(settings))
        (fork / "kustomization.yaml").write_text(yaml.safe_dump({
            "resources": ["argocd"], "nameSuffix": f"-{self.branch}", "labels": [{"pairs": {LABEL: self.run}}],
            "replacements": [{"source": {"kind": "AppProject", "fieldPath": "metadata.name"},
                              "targets": [{"select": {"kind": "Application"}, "fieldPaths": ["spec.project"]}]}]}))
        kubectl("apply", "-k", str(fork))

    def push(self, changes: Changes, patches: Sequence[Manifest] = ()) -> None:
        self.write(changes, patches)
        self.commit()
        self.wait_until_synced()

    def jobs(self) -> dict[str, Manifest]:
        """All Jobs that are there: Argo CD prunes the others, and its kustomize may hash otherwise than kubectl's."""
        return {unhashed(job): job for job in self.get("jobs")}

    def application_now(self) -> Manifest:
        found = kubectl("-n", ARGOCD, "get", f"applications.argoproj.io/{self.application}", "-o", "json").stdout
        application: Manifest = json.loads(found)
        return application

    def refresh(self, how: str = "normal") -> Manifest:
        """Have Argo CD compare at once, as a webhook does, and return the Application when it has."""
        kubectl("-n", ARGOCD, "annotate", "--overwrite", f"applications.argoproj.io/{self.application}",
                f"argocd.argoproj.io/refresh={how}")

        def compared() -> Manifest | None:
            application = self.application_now()
            return application if refreshed(application) else None

        return wait_until("Argo CD to compare", compared, 120)

    def wait_until_synced(self, seconds: float = 300) -> Manifest:
        commit = self.git("rev-parse", "HEAD")
        self.refresh()

        def synced() -> Manifest | None:
            application = self.application_now()
            return application if synced_to(application, commit) else None

        return wait_until(f"Argo CD to sync {commit}", synced, seconds)

    def delete_application(self) -> None:
        """Delete this run's Application, and what an earlier run left; with all that they made, but for the volumes."""
        kubectl("-n", ARGOCD, "delete", "applications.argoproj.io", f"--selector={LABEL}", seconds=600)

    def make_room(self) -> None:
        self.delete_application()
        kubectl("-n", ARGOCD, "delete", "appprojects.argoproj.io", f"--selector={LABEL}")
        super().make_room()

    def remove(self) -> None:
        self.make_room()
        self.git("push", "--quiet", os.environ["E2E_REPO_PUSH"], f":refs/heads/{self.branch}")

    def dump(self) -> str:
        described = said("-n", ARGOCD, "describe", f"applications.argoproj.io/{self.application}")
        return f"{described}\n{super().dump()}"


def refreshed(application: Manifest) -> bool:
    """Whether Argo CD has done the comparison that was asked for: it then removes the annotation."""
    return "argocd.argoproj.io/refresh" not in application["metadata"].get("annotations", {})


def synced_to(application: Manifest, commit: str) -> bool:
    """Whether what is there is what the commit says: all of it applied, and nothing left to prune."""
    status = application.get("status", {})
    sync = status.get("sync", {})
    return (sync.get("status"), sync.get("revision")) == ("Synced", commit) and \
        status.get("operationState", {}).get("phase") == "Succeeded"  # and not still at it


def out_of_sync(application: Manifest) -> list[str]:
    """The objects that differ from git. (Since Argo CD 3 their health is not written here, only the Application's.)"""
    return [f"{each['kind']} {each['name']}: {each.get('status')}"
            for each in application["status"]["resources"] if each.get("status") != "Synced"]
