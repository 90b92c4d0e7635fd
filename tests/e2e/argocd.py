"""The same environment, made by Argo CD from a branch of a git repository, with argocd/ as it is."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import yaml

from jobs.tools import argocd
from jobs.tools.argocd import with_settings
from jobs.tools.kubectl import KubectlError
from tests.e2e.cluster import LABEL, Changes, Environment, kubectl, transcript, wait_until
from tests.manifests import Manifest, unhashed


def missing() -> str | None:
    """Why nothing can be tried with Argo CD here; None when all is there."""
    for name in ("E2E_REPO_URL", "E2E_REPO_PUSH"):
        if not os.environ.get(name):
            return f"{name} is not set (tests/e2e/README.md)"
    try:
        kubectl("get", "crd", argocd.KIND)
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
        with_settings(fork, os.environ["E2E_REPO_URL"], self.branch, "overlays/e2e", self.namespace)
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
        (application,) = [a for a in kubectl.get(argocd.NAMESPACE, argocd.KIND)
                          if a["metadata"]["name"] == self.application]
        return application

    def refresh(self, how: str = "normal") -> Manifest:
        """Have Argo CD compare at once, as a webhook does, and return the Application when it has."""
        argocd.refresh(kubectl, self.application, how)

        def compared() -> Manifest | None:
            application = self.application_now()
            return application if argocd.refreshed(application) else None

        return wait_until("Argo CD to compare", compared, 120)

    def wait_until_synced(self, seconds: float = 300) -> Manifest:
        commit = self.git("rev-parse", "HEAD")
        self.refresh()

        def synced() -> Manifest | None:
            application = self.application_now()
            return application if argocd.synced(application, commit) else None

        return wait_until(f"Argo CD to sync {commit}", synced, seconds)

    def delete_application(self) -> None:
        """Delete this run's Application, and what an earlier run left; with all that they made, but for the volumes."""
        kubectl("-n", argocd.NAMESPACE, "delete", argocd.KIND, f"--selector={LABEL}", seconds=600)

    def make_room(self) -> None:
        self.delete_application()
        kubectl("-n", argocd.NAMESPACE, "delete", "appprojects.argoproj.io", f"--selector={LABEL}")
        super().make_room()

    def remove(self) -> None:
        self.make_room()
        self.git("push", "--quiet", os.environ["E2E_REPO_PUSH"], f":refs/heads/{self.branch}")

    def dump(self) -> str:
        described = transcript("-n", argocd.NAMESPACE, "describe", f"{argocd.KIND}/{self.application}")
        return f"{described}\n{super().dump()}"
