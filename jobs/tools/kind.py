"""Run an overlay in a cluster on this machine: kind, the images, the overlay, and its progress until all is served.

    python -m jobs kind overlays/kind             applies it with kubectl
    python -m jobs kind overlays/kind --argocd    installs Argo CD, which follows a repository

Everything is done with docker, kind and kubectl, as a person would. Each kubectl command names the context of the kind
cluster, so no other cluster is ever touched. A second run reuses the cluster.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.core.errors import RetryableError, UserError
from jobs.tools import argocd
from jobs.tools.kubectl import Kubectl, KubectlError
from jobs.tools.pods import CHECKOUT, HASH_SUFFIX, Manifest, containers, error_in, pod_templates, render
from jobs.tools.status import POLL_SECONDS, State, deployment_state, find, job_state, oldest_first, watch
from jobs.tools.summary import IN_DETAIL
from jobs.tools.waiting import ALIAS_SECONDS, Late, served_adapters, wait_until

if TYPE_CHECKING:
    from jobs.tools.overlay import Overlay

log = logging.getLogger("jobs")

ARGOCD = "v3.5.4"
ARGOCD_INSTALL = f"https://raw.githubusercontent.com/argoproj/argo-cd/{ARGOCD}/manifests/install.yaml"
# As in argocd/demo/git-server.yaml.
GIT_URL, GIT_PORT, GIT_BRANCH = "git://git-server.git-demo.svc.cluster.local/lora-gitops.git", 9418, "main"
NOT_PROMOTED = "did not pass the gate and is not promoted"  # as the evaluation's log has it
APPLICATION, INFERENCE = "lora-gitops", "model-inference"

TOOLS = {
    "docker": "It runs the cluster and builds the images: https://docs.docker.com/get-docker/",
    "kind": "It makes the cluster: get 0.26 or newer (with Kubernetes 1.32, and network policies are enforced) from "
            "https://kind.sigs.k8s.io/docs/user/quick-start/#installation",
    "kubectl": "Get 1.32 or newer from https://kubernetes.io/docs/tasks/tools/",
    "git": "It brings the current commit into the cluster; or let Argo CD follow your fork with --repo",
}

# A changed pipeline file reaches the running server when the kubelet next looks at the pod. Its default, a minute plus
# half of that at random, is most of the time that a revert takes.
CLUSTER_CONFIG = """\
kind: Cluster
apiVersion: kind.x-k8s.io/v1alpha4
kubeadmConfigPatches:
- |
  apiVersion: kubelet.config.k8s.io/v1beta1
  kind: KubeletConfiguration
  syncFrequency: 10s
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.add_argument("--argocd", action="store_true",
                        help="let Argo CD deploy: from --repo, else from a git server in the cluster with the current "
                             "commit")
    parser.add_argument("--repo", metavar="URL", help="the repository that Argo CD follows, e.g. your fork")
    parser.add_argument("--revision", help="its branch (default: main)")
    parser.add_argument("--name", default="lora-gitops", help="the kind cluster's name (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="where the endpoint answers here (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=60, help="time limit (default: %(default)s)")
    parser.add_argument("--exit", action="store_true", help="exit when the adapters are served")
    parser.add_argument("--check", action="store_true", help="only check whether everything needed is installed")


def run(args: argparse.Namespace) -> None:
    """Bring up the cluster and the overlay, show the progress, and keep the endpoint's port open until Ctrl-C.

    Raises:
        UserError: a tool or an image is missing, the overlay is invalid, or a Job failed with exit code 2.
        RetryableError: a command failed, a Job failed otherwise, or the time is over.
    """
    from jobs.tools import check, overlay

    require_tools(["docker", "kind", "kubectl", *(["git"] if args.argocd and not args.repo else [])])
    check.run(args.overlay)
    manifests = render(args.overlay)
    if args.check:
        return
    deadline = time.monotonic() + 60 * args.minutes
    cluster = Cluster(args.name, next(m["metadata"]["name"] for m in manifests if m["kind"] == "Namespace"))
    images = images_of(manifests)
    require_images(images)
    if args.name not in call("kind", "get", "clusters").split():
        show("kind", "create", "cluster", "--name", args.name, "--wait", "120s", "--config", "-", stdin=CLUSTER_CONFIG)
    show("kind", "load", "docker-image", "--name", args.name, *images)
    try:
        if args.argocd:
            install_argocd(cluster.kubectl)
            follow(cluster, *repository(cluster, args))
        else:
            # In Argo CD's name, so that it may take over: what kubectl owns would outlive its removal from git.
            cluster.kubectl("apply", "--server-side", "--field-manager=argocd-controller", "-k", str(args.overlay),
                            seconds=300)
            cluster.jobs = [m["metadata"]["name"] for m in manifests if m["kind"] == "Job"]
        watch(cluster.states, deadline - time.monotonic())
        serve(cluster, overlay.load(args.overlay), args)
    except KeyboardInterrupt:
        pass
    log.info("the cluster keeps running; to remove it: kind delete cluster --name %s", args.name)


# --- what is needed --------------------------------------------------------------------------------------------------


def require_tools(names: list[str]) -> None:
    """Raise `UserError` for the first tool that is not installed, or when docker does not run."""
    for name in names:
        if shutil.which(name) is None:
            raise UserError(f"{name} is not installed. {TOOLS[name]}")
    done = subprocess.run(["docker", "info"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"docker does not answer ({error_in(done.stderr)}). Start it; on Linux, your user must be in "
                        "the group docker")


def require_images(images: list[str]) -> None:
    """Raise `UserError` for images that this machine does not have."""
    missing = [image for image in images if subprocess.run(
        ["docker", "image", "inspect", image], capture_output=True, check=False).returncode]
    if missing:
        raise UserError(f"docker has no image {', '.join(missing)}. Build them with `make images`, or pull what the "
                        "overlay's `images:` names")


def images_of(manifests: list[Manifest]) -> list[str]:
    """The images of every container, each once."""
    return sorted({c["image"] for template in pod_templates(manifests).values() for c in containers(template)})


# --- commands --------------------------------------------------------------------------------------------------------


def call(*argv: str) -> str:
    """What a command prints.

    Raises:
        RetryableError: it failed, with its last line.
    """
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RetryableError(f"{' '.join(argv)}: {error_in(done.stderr)}")
    return done.stdout


def show(*argv: str, stdin: str | None = None) -> None:
    """Run a command that takes a while, with its output for people to see."""
    log.info("%s", " ".join(argv))
    if subprocess.run(argv, input=stdin, text=True, check=False).returncode:
        raise RetryableError(f"{' '.join(argv)}: failed; the reason is above")


# --- the overlay in the cluster -------------------------------------------------------------------------------------


@dataclass
class Cluster:
    """The kind cluster `name`; the overlay is in `namespace` there."""

    name: str
    namespace: str
    jobs: list[str] | None = None  # the Jobs that count, by name; None: those of the Application
    commit: str | None = None  # what the Application must have synced; None: whatever the repository has

    @property
    def kubectl(self) -> Kubectl:
        return Kubectl(f"kind-{self.name}")

    def states(self) -> dict[str, State]:
        """The state of the Application where Argo CD deploys, of each Job, and of serving."""
        items = [*(self.kubectl.get(argocd.NAMESPACE, argocd.KIND) if self.jobs is None else []),
                 *self.kubectl.get(self.namespace, "jobs,deployments,pods")]
        return states_of(items, self.jobs, self.commit)


def states_of(items: list[Manifest], jobs: list[str] | None, commit: str | None = None) -> dict[str, State]:
    """The state of every object that counts, by its name without the hash.

    Args:
        items: a snapshot of Jobs, Deployments and Pods, and of the Application where Argo CD deploys.
        jobs: the names of the Jobs that count (a plain apply leaves those of earlier configs behind); None: those that
            the Application has synced.
        commit: what the Application must have synced.
    """
    states: dict[str, State] = {}
    if jobs is None:
        application = find(items, "Application", APPLICATION)
        states["Application"] = argocd.state(application, commit)
        if not application or not states["Application"].done:
            return states
        jobs = argocd.jobs_of(application)
    states |= {HASH_SUFFIX.sub("", name): job_state(items, name) for name in sorted(jobs)}
    return {**states, INFERENCE: deployment_state(items, INFERENCE)}


def install_argocd(kubectl: Kubectl) -> None:
    """Install Argo CD and wait for what syncs."""
    log.info("installing Argo CD %s", ARGOCD)
    kubectl("apply", "-f", "-", stdin=f"{{apiVersion: v1, kind: Namespace, metadata: {{name: {argocd.NAMESPACE}}}}}")
    # As Argo CD's own instructions have it: a CRD of it is too large for a client-side apply.
    kubectl("apply", "-n", argocd.NAMESPACE, "--server-side", "--force-conflicts", "-f", ARGOCD_INSTALL, seconds=300)
    for workload in ("deployment/argocd-repo-server", "statefulset/argocd-application-controller"):
        kubectl.wait_for_rollout(argocd.NAMESPACE, workload)


def follow(cluster: Cluster, repo: str, revision: str, overlay: str) -> None:
    """Apply argocd/ with its settings as a fork would have them, and have the repository compared now.

    An Application of another namespace is deleted first: Argo CD would forget what it made there, and leave it running.
    """
    application = find(cluster.kubectl.get(argocd.NAMESPACE, argocd.KIND), "Application", APPLICATION)
    before = application["spec"]["destination"]["namespace"] if application else cluster.namespace
    if before != cluster.namespace:
        log.info("deleting what runs in %s; its volumes stay", before)
        cluster.kubectl("-n", argocd.NAMESPACE, "delete", argocd.KIND, APPLICATION, seconds=600)
    with tempfile.TemporaryDirectory() as folder:
        cluster.kubectl("apply", "-k", str(
            argocd.with_settings(Path(folder), repo, revision, overlay, cluster.namespace)))
    argocd.refresh(cluster.kubectl, APPLICATION)
    log.info("Argo CD follows %s at %s, %s", repo, revision, overlay)


def repository(cluster: Cluster, args: argparse.Namespace) -> tuple[str, str, str]:
    """The URL, branch and overlay that Argo CD is to follow: the user's, or the current commit in the cluster's own
    git server."""
    overlay = args.overlay.resolve()
    if not overlay.is_relative_to(CHECKOUT):
        raise UserError(f"{args.overlay}: is not in {CHECKOUT}; Argo CD reads it from the repository")
    path = overlay.relative_to(CHECKOUT).as_posix()
    if args.repo:
        return args.repo, args.revision or "main", path
    if args.revision:
        raise UserError("--revision names a branch of --repo; without --repo, the current commit is deployed")
    if call("git", "-C", str(CHECKOUT), "status", "--porcelain", "--", "base", "serving", "overlays"):
        log.warning("uncommitted changes are not deployed: Argo CD deploys the commit")
    cluster.commit = call("git", "-C", str(CHECKOUT), "rev-parse", "HEAD").strip()
    image = cluster.kubectl("-n", argocd.NAMESPACE, "get", "deployment", "argocd-repo-server",
                            "-o", "jsonpath={.spec.template.spec.containers[0].image}").stdout
    cluster.kubectl("apply", "-f", "-", stdin=argocd.git_server(image))
    cluster.kubectl.wait_for_rollout("git-demo", "deployment/git-server")
    with cluster.kubectl.forward("git-demo", "service/git-server", GIT_PORT) as tunnel:
        call("git", "-C", str(CHECKOUT), "push", "--force",
             f"git://127.0.0.1:{tunnel.port}/{GIT_URL.rpartition('/')[2]}", f"HEAD:refs/heads/{GIT_BRANCH}")
    return GIT_URL, GIT_BRANCH, path


# --- serving ---------------------------------------------------------------------------------------------------------


def serve(cluster: Cluster, overlay: Overlay, args: argparse.Namespace) -> None:
    """Show the evaluations, wait until every adapter that passed is served, and forward the port until Ctrl-C."""
    from jobs.core.plan import plan
    from jobs.tools.overlay import trained

    evaluated = {name: plan(loaded.pipeline) for name, loaded in trained(overlay.adapters).items()}
    rejected = show_evaluations(cluster, {name: named.adapter.digest for name, named in evaluated.items()})
    # Which adapter an imported one is, only the cluster's volume says.
    wanted = {name: evaluated[name].adapter.digest if name in evaluated else None
              for name in overlay.adapters if name not in rejected}
    if overlay.environment.environment.serving.mode == "merged":
        wanted = dict(list(wanted.items())[:1])  # a server runs one model: that of the first adapter by name
    endpoint = f"http://127.0.0.1:{args.port}"
    reports = {name: named.evaluation.path(Path("/volumes")) / "report.html" for name, named in evaluated.items()}

    def missing() -> list[str]:
        """The adapters that are not served. The commit that Argo CD deploys may have another version of them."""
        found = served_adapters(endpoint)
        known = {name: None if args.argocd else digest for name, digest in wanted.items()}
        return [f"{name}@{digest}" if digest else name for name, digest in known.items()
                if name not in found or (digest and found[name] != digest)]

    while True:
        with cluster.kubectl.forward(cluster.namespace, f"service/{INFERENCE}", 8000, args.port) as tunnel:
            try:
                wait_until(f"{len(wanted)} adapters to be served", lambda: not missing() or not tunnel.alive,
                           ALIAS_SECONDS, every=1)
            except Late:
                raise RetryableError(f"not served: {', '.join(missing())}. The log has the reason: "
                                     f"kubectl -n {cluster.namespace} logs deployment/{INFERENCE}") from None
            if tunnel.alive:
                print(places(cluster, endpoint, list(wanted), reports, args), flush=True)
                if args.exit:
                    return
                tunnel.process.wait()
        log.info("the pod behind %s ended: continuing with the next one", endpoint)
        time.sleep(POLL_SECONDS)
        watch(cluster.states, 60 * args.minutes)


def show_evaluations(cluster: Cluster, digests: Mapping[str, str]) -> list[str]:
    """Print the end of the newest evaluation's log of every adapter; returns the names of those that were rejected."""
    rejected = []
    jobs = cluster.kubectl.get(cluster.namespace, "jobs")
    for name, digest in digests.items():
        evaluations = oldest_first(job for job in jobs
                                   if HASH_SUFFIX.sub("", job["metadata"]["name"]) == f"model-evaluation-{name}")
        if evaluations:
            job = f"job/{evaluations[-1]['metadata']['name']}"
            try:
                text = cluster.kubectl("-n", cluster.namespace, "logs", job, "--tail=40").stdout
            except KubectlError as error:  # its pod is gone, for example with its node
                log.warning("the log of %s cannot be read: %s", job, error)
                continue
            print(text if len(digests) <= IN_DETAIL else "\n".join(
                line for line in text.splitlines() if f"{name}@{digest} " in line and "gate" in line))
            if f"{name}@{digest} {NOT_PROMOTED}" in text:
                rejected.append(name)
    return rejected


def places(cluster: Cluster, endpoint: str, aliases: Sequence[str], reports: Mapping[str, Path],
           args: argparse.Namespace) -> str:
    """Where a person finds the endpoint, the evaluations' reports, TensorBoard and Argo CD."""
    context = f"kubectl --context kind-{cluster.name}"
    read = f"{context} -n {cluster.namespace} exec deployment/tensorboard -- cat"
    lines = [f"  Endpoint     {endpoint}/v1  (models: {', '.join(aliases)})",
             *(f"  {'Report' if n == 0 else '':<11}  {read} {report} > {name}.html"
               for n, (name, report) in enumerate(reports.items()))]
    if reports:
        lines.append(f"  TensorBoard  {context} -n {cluster.namespace} port-forward service/tensorboard 6006")
    if args.argocd:
        initial = "get secret argocd-initial-admin-secret -o jsonpath='{.data.password}' | base64 -d"
        lines += [f"  Argo CD      {context} -n argocd port-forward service/argocd-server 8443:443",
                  f"    password   {context} -n argocd {initial}  (user: admin)"]
    if args.argocd and not args.repo:
        lines += ["  Push         commit, and run this again: it pushes the new commit to the cluster's git server"]
    return "\n".join(["", *lines, "", *([] if args.exit else ["Forwarding until you press Ctrl-C."])])
