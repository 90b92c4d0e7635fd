"""Run an overlay in a cluster on this machine: kind, the images, the overlay, and its progress until it is served.

    python -m jobs kind overlays/kind             applies it with kubectl
    python -m jobs kind overlays/kind --argocd    installs Argo CD, which follows a repository

Everything is done with docker, kind and kubectl, as a person would. Each kubectl command names the context of the kind
cluster, so no other cluster is ever touched. Running it again takes up the cluster as it is.
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import os
import shutil
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from jobs.core.errors import RetryableError, UserError
from jobs.tools.pods import CHECKOUT, HASH_SUFFIX, Manifest, render

log = logging.getLogger("jobs")

ARGOCD = "v3.5.4"
ARGOCD_INSTALL = f"https://raw.githubusercontent.com/argoproj/argo-cd/{ARGOCD}/manifests/install.yaml"
GIT_URL = "git://git-server.git-demo.svc.cluster.local/lora-gitops.git"  # argocd/demo/git-server.yaml
GIT_PORT, GIT_BRANCH = 9418, "main"
APPLICATION, INFERENCE = "lora-gitops", "model-inference"
POLL_SECONDS = 3.0
ALIAS_SECONDS = 300.0  # from the last Job to the adapter under its name; verifying and loading it takes seconds

TOOLS = {
    "docker": "It runs the cluster and builds the images: https://docs.docker.com/get-docker/",
    "kind": "It makes the cluster: get 0.26 or newer (with Kubernetes 1.32, and network policies are enforced) from "
            "https://kind.sigs.k8s.io/docs/user/quick-start/#installation",
    "kubectl": "Get 1.32 or newer from https://kubernetes.io/docs/tasks/tools/",
    "git": "It brings the current commit into the cluster; or let Argo CD follow your fork with --repo",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    parser.add_argument("--argocd", action="store_true",
                        help="let Argo CD deploy: from --repo, else from a git server in the cluster with the current "
                             "commit")
    parser.add_argument("--repo", metavar="URL", help="the repository that Argo CD follows, e.g. your fork")
    parser.add_argument("--revision", help="its branch (default: main)")
    parser.add_argument("--name", default="lora-gitops", help="the kind cluster's name (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="where the endpoint answers here (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=60, help="give up after so long (default: %(default)s)")
    parser.add_argument("--exit", action="store_true", help="exit when the adapter is served")
    parser.add_argument("--check", action="store_true", help="only say whether everything needed is installed")


def run(args: argparse.Namespace) -> None:
    """Bring up the cluster and the overlay, show the progress, and keep the endpoint's port open until Ctrl-C.

    Raises:
        UserError: a tool or an image is missing, the overlay is invalid, or a Job failed with exit code 2.
        RetryableError: a command failed, a Job failed otherwise, or the time is over.
    """
    from jobs.core import pipeline
    from jobs.core.plan import plan
    from jobs.tools import check

    require_tools(["docker", "kind", "kubectl", *(["git"] if args.argocd and not args.repo else [])])
    check.run(args.overlay)
    manifests = render(args.overlay)
    if args.check:
        return
    deadline = time.monotonic() + 60 * args.minutes
    cluster = Cluster(args.name, namespace_of(manifests))
    images = images_of(manifests)
    require_images(images)
    cluster.create()
    show("kind", "load", "docker-image", "--name", args.name, *images)
    try:
        if args.argocd:
            cluster.install_argocd()
            cluster.follow(*repository(cluster, args))
        else:
            # In Argo CD's name, so that it may take over: what kubectl owns would outlive its removal from git.
            cluster.kubectl("apply", "--server-side", "--field-manager=argocd-controller", "-k", str(args.overlay))
            cluster.jobs = {m["metadata"]["name"] for m in manifests if m["kind"] == "Job"}
        watch(cluster, deadline)
        wanted = pipeline.load(args.overlay).pipeline
        report = plan(wanted).evaluation.path(Path("/volumes")) / "report.html"
        serve(cluster, wanted.adapter, report, args)
    except KeyboardInterrupt:
        pass
    log.info("the cluster goes on without this command; to remove it: kind delete cluster --name %s", args.name)


# --- what is needed --------------------------------------------------------------------------------------------------


def require_tools(names: list[str]) -> None:
    """Raise `UserError` for the first tool that is not installed, or when docker does not run."""
    for name in names:
        if shutil.which(name) is None:
            raise UserError(f"{name} is not installed. {TOOLS[name]}")
    done = subprocess.run(["docker", "info"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"docker does not answer ({last_line(done.stderr)}). Start it; on Linux, your user must be in "
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
    templates = [m["spec"]["template"]["spec"] for m in manifests if m["kind"] in ("Job", "Deployment")]
    return sorted({c["image"] for t in templates for c in [*t.get("initContainers", []), *t["containers"]]})


def namespace_of(manifests: list[Manifest]) -> str:
    """The name of the overlay's Namespace."""
    return next(str(m["metadata"]["name"]) for m in manifests if m["kind"] == "Namespace")


# --- commands --------------------------------------------------------------------------------------------------------


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it says nothing"])[-1]


def call(*argv: str, stdin: str | None = None) -> str:
    """What a command prints.

    Raises:
        RetryableError: it failed, with its last line.
    """
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RetryableError(f"{' '.join(argv)}: {last_line(done.stderr)}")
    return done.stdout


def show(*argv: str) -> None:
    """Run a command that takes a while, with its output for people to see."""
    log.info("%s", " ".join(argv))
    if subprocess.run(argv, check=False).returncode:
        raise RetryableError(f"{' '.join(argv)}: failed; the reason stands above")


@dataclass
class Cluster:
    """The kind cluster `name`; the overlay is in `namespace` there."""

    name: str
    namespace: str
    jobs: set[str] | None = None  # the Jobs that count, by name; None: those of the Application
    commit: str | None = None  # what the Application must have synced; None: whatever the repository has

    def create(self) -> None:
        if self.name not in call("kind", "get", "clusters").split():
            show("kind", "create", "cluster", "--name", self.name, "--wait", "120s")

    def kubectl(self, *argv: str, stdin: str | None = None) -> str:
        return call(*self._kubectl(*argv), stdin=stdin)

    def _kubectl(self, *argv: str) -> list[str]:
        return ["kubectl", "--context", f"kind-{self.name}", *argv]

    def get(self, namespace: str, kinds: str) -> list[Manifest]:
        items: list[Manifest] = json.loads(self.kubectl("-n", namespace, "get", kinds, "-o", "json"))["items"]
        return items

    def install_argocd(self) -> None:
        """Install Argo CD and wait for what syncs."""
        log.info("installing Argo CD %s", ARGOCD)
        self.kubectl("apply", "-f", "-", stdin="{apiVersion: v1, kind: Namespace, metadata: {name: argocd}}")
        # As Argo CD's own instructions say: a CRD of it is too large for a client-side apply.
        self.kubectl("apply", "-n", "argocd", "--server-side", "--force-conflicts", "-f", ARGOCD_INSTALL)
        for workload in ("deployment/argocd-repo-server", "statefulset/argocd-application-controller"):
            self.kubectl("-n", "argocd", "rollout", "status", workload, "--timeout", "600s")

    def follow(self, repo: str, revision: str, overlay: str) -> None:
        """Apply argocd/ with its settings as a fork would have them, and have the repository looked at now.

        An Application of another namespace is deleted first: Argo CD would forget what it made there, and leave it
        running.
        """
        for found in self.get("argocd", "applications.argoproj.io"):
            before = found["spec"]["destination"]["namespace"]
            if found["metadata"]["name"] == APPLICATION and before != self.namespace:
                log.info("deleting what runs in %s; its volumes stay", before)
                self.kubectl("-n", "argocd", "delete", "applications.argoproj.io", APPLICATION)
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(shutil.copytree(CHECKOUT / "argocd", Path(folder) / "argocd"))
            settings = yaml.safe_load((copy / "settings.yaml").read_text())
            settings["data"] = {"repoURL": repo, "revision": revision, "overlay": overlay, "namespace": self.namespace}
            (copy / "settings.yaml").write_text(yaml.safe_dump(settings))
            self.kubectl("apply", "-k", str(copy))
        self.kubectl("-n", "argocd", "annotate", "--overwrite", "application", APPLICATION,
                     "argocd.argoproj.io/refresh=normal")
        log.info("Argo CD follows %s at %s, %s", repo, revision, overlay)

    @contextmanager
    def forward(self, namespace: str, service: str, port: int, target: int
                ) -> Iterator[tuple[subprocess.Popen[str], int]]:
        """A service's port as a port of this machine (0: a free one), for as long as the context lasts or its pod
        lives. Gives the process, which ends with the pod, and the port.

        Raises:
            UserError: the port is taken.
            RetryableError: there is no pod to reach.
        """
        process = subprocess.Popen(
            self._kubectl("-n", namespace, "port-forward", "--address", "127.0.0.1", f"service/{service}",
                          f"{port or ''}:{target}"),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdout
        try:
            said = process.stdout.readline()
            if not said.startswith("Forwarding from"):
                said += process.stdout.read()
                if "unable to listen" in said.lower():
                    raise UserError(f"port {port} is taken. Stop what listens there, or choose another: --port 8001")
                raise RetryableError(f"kubectl port-forward service/{service}: {last_line(said)}")
            # It says a line for each connection; unread, they would stop it once the pipe is full.
            threading.Thread(target=collections.deque, args=(process.stdout, 0), daemon=True).start()
            yield process, int(said.partition("->")[0].rpartition(":")[2])
        finally:
            process.terminate()
            process.wait()


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
        log.warning("uncommitted changes are not deployed: what git says is what runs")
    cluster.commit = call("git", "-C", str(CHECKOUT), "rev-parse", "HEAD").strip()
    image = cluster.kubectl("-n", "argocd", "get", "deployment", "argocd-repo-server",
                            "-o", "jsonpath={.spec.template.spec.containers[0].image}")
    cluster.kubectl("apply", "-f", "-", stdin=git_server(image))
    cluster.kubectl("-n", "git-demo", "rollout", "status", "deployment/git-server", "--timeout", "300s")
    with cluster.forward("git-demo", "git-server", 0, GIT_PORT) as (_, port):
        call("git", "-C", str(CHECKOUT), "push", "--force",
             f"git://127.0.0.1:{port}/{GIT_URL.rpartition('/')[2]}", f"HEAD:refs/heads/{GIT_BRANCH}")
    return GIT_URL, GIT_BRANCH, path


def git_server(image: str) -> str:
    """The manifests of the demo's git server, which runs in Argo CD's image."""
    documents = list(yaml.safe_load_all((CHECKOUT / "argocd" / "demo" / "git-server.yaml").read_text()))
    for document in documents:
        if document["kind"] == "Deployment":
            spec = document["spec"]["template"]["spec"]
            for container in [*spec["initContainers"], *spec["containers"]]:
                container["image"] = image
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": documents})


# --- progress --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """How far an object is: a line for people, and whether it is done or has failed for good."""

    says: str
    done: bool = False
    exit_code: int | None = None  # of a failed Job's last pod


def watch(cluster: Cluster, deadline: float, pause: Callable[[float], None] = time.sleep) -> None:
    """Show every change until all Jobs are done and serving is ready.

    Raises:
        UserError, RetryableError: a Job failed, by its exit code; its pod's termination message is shown.
        RetryableError: `deadline` (by `time.monotonic`) has passed; names what is not done.
    """
    said: dict[str, str] = {}
    while True:
        application = cluster.get("argocd", "applications.argoproj.io") if cluster.jobs is None else []
        states = states_of([*application, *cluster.get(cluster.namespace, "jobs,deployments,pods")],
                           cluster.jobs, cluster.commit)
        for name, state in states.items():
            if said.get(name) != state.says:
                said[name] = state.says
                log.info("%s: %s", name, state.says)
        failed = next(((name, s) for name, s in states.items() if s.exit_code is not None), None)
        if failed:
            name, state = failed
            raise (UserError if state.exit_code == UserError.exit_code else RetryableError)(f"{name} {state.says}")
        if states and all(state.done for state in states.values()):
            return
        if time.monotonic() > deadline:
            late = ", ".join(f"{name} ({s.says})" for name, s in states.items() if not s.done)
            raise RetryableError(f"not done in time: {late}. Run it again to go on; docs/stuck.md says what each "
                                 "state means")
        pause(POLL_SECONDS)


def states_of(items: list[Manifest], jobs: set[str] | None, commit: str | None = None) -> dict[str, State]:
    """The state of every object that counts, by its name without the hash.

    Args:
        items: a snapshot of Jobs, Deployments and Pods, and of the Application where Argo CD deploys.
        jobs: the names of the Jobs that count (a plain apply leaves those of earlier configs behind); None: those that
            the Application has synced.
        commit: what the Application must have synced.
    """
    states: dict[str, State] = {}
    if jobs is None:
        application = by_name(items, "Application", APPLICATION) or {}
        states["Application"] = application_state(application, commit)
        if not states["Application"].done:
            return states
        jobs = {r["name"] for r in application["status"]["resources"]
                if r["kind"] == "Job" and not r.get("requiresPruning")}
    for name in sorted(jobs):
        pods = pods_with(items, {"batch.kubernetes.io/job-name": name})
        states[HASH_SUFFIX.sub("", name)] = job_state(by_name(items, "Job", name), pods)
    pods = pods_with(items, {"app.kubernetes.io/name": INFERENCE})
    states[INFERENCE] = deployment_state(by_name(items, "Deployment", INFERENCE), pods)
    return states


def by_name(items: list[Manifest], kind: str, name: str) -> Manifest | None:
    return next((i for i in items if (i["kind"], i["metadata"]["name"]) == (kind, name)), None)


def pods_with(items: list[Manifest], labels: Mapping[str, str]) -> list[Manifest]:
    """The pods that carry the labels, the newest last."""
    found = [i for i in items if i["kind"] == "Pod" and labels.items() <= i["metadata"].get("labels", {}).items()]
    return sorted(found, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))


def application_state(application: Manifest, commit: str | None) -> State:
    """Done as soon as everything is applied: Jobs and Deployment tell the rest."""
    status = application.get("status", {})
    sync, operation = status.get("sync", {}), status.get("operationState", {})
    errors = [c["message"] for c in status.get("conditions", []) if c["type"].endswith("Error")]
    if operation.get("phase") in ("Failed", "Error") or operation.get("retryCount"):
        errors += [operation.get("message", ""),
                   *(f"{r['kind']}/{r['name']}: {r.get('message')}"
                     for r in operation.get("syncResult", {}).get("resources", []) if r.get("status") == "SyncFailed")]
    says = " ".join([f"{sync.get('status', 'not looked at yet')}, {status.get('health', {}).get('status', 'unknown')}",
                     *(f"({error})" for error in errors)])
    # Argo CD removes the annotation when it has compared; until then it speaks of the commit before.
    compared = "argocd.argoproj.io/refresh" not in application.get("metadata", {}).get("annotations", {})
    synced = sync.get("status") == "Synced" and operation.get("phase") != "Running"
    return State(says, done=compared and synced and commit in (None, sync.get("revision")))


def job_state(job: Manifest | None, pods: list[Manifest]) -> State:
    if job is None:
        return State("not there yet")
    conditions = {c["type"]: c for c in job.get("status", {}).get("conditions", []) if c["status"] == "True"}
    if "Complete" in conditions:
        return State("done", done=True)
    if "Failed" in conditions:
        ends = [end for pod in pods for end in endings(pod) if end["exitCode"]]
        if not ends:
            return State(f"failed: {conditions['Failed'].get('message')}", exit_code=1)
        return State(f"failed with exit code {ends[-1]['exitCode']}: {message_of(ends[-1])}",
                     exit_code=ends[-1]["exitCode"])
    return State(pod_says(pods[-1]) if pods else "no pod yet")


def deployment_state(deployment: Manifest | None, pods: list[Manifest]) -> State:
    if deployment is None:
        return State("not there yet")
    if deployment.get("status", {}).get("availableReplicas"):
        return State("ready", done=True)
    return State(pod_says(pods[-1]) if pods else "no pod yet")


def pod_says(pod: Manifest) -> str:
    """What a pod that is not done yet does, or waits for."""
    status = pod.get("status", {})
    for condition in status.get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return f"waits for a node: {condition.get('message')}"
    for kind, running in (("initContainerStatuses", "waits for its inputs"), ("containerStatuses", "runs")):
        for container in status.get(kind, []):
            state = container["state"]
            if "running" in state:
                return running
            ended = state.get("terminated", {})
            if ended.get("exitCode"):
                return f"exit code {ended['exitCode']}, to be tried again: {message_of(ended)}"
            waiting = state.get("waiting", {})
            if waiting.get("reason", "PodInitializing") not in ("PodInitializing", "ContainerCreating"):
                before = container.get("lastState", {}).get("terminated")
                return f"{waiting['reason']}: {message_of(before) if before else waiting.get('message')}"
    return "starts"


def endings(pod: Manifest) -> list[dict[str, Any]]:
    """How the pod's containers ended, those that did."""
    return [c["state"]["terminated"] for c in pod.get("status", {}).get("containerStatuses", [])
            if "terminated" in c["state"]]


def message_of(ending: Mapping[str, Any]) -> str:
    """What a stage wrote when it failed, or the last line that it logged; and Kubernetes' word, such as OOMKilled."""
    reason, lines = str(ending.get("reason", "Error")), str(ending.get("message", "")).strip().splitlines()
    return ": ".join([*([reason] if reason != "Error" or not lines else []), *lines[-1:]])


# --- serving ---------------------------------------------------------------------------------------------------------


def serve(cluster: Cluster, alias: str, report: Path, args: argparse.Namespace) -> None:
    """Show the evaluation, wait until the adapter answers under its name, and keep its port open until Ctrl-C."""
    jobs = cluster.get(cluster.namespace, "jobs")
    evaluation = max((j for j in jobs if j["metadata"]["name"].startswith("model-evaluation-")),
                     key=lambda j: str(j["metadata"]["creationTimestamp"]), default=None)
    if evaluation:
        print(cluster.kubectl("-n", cluster.namespace, "logs", f"job/{evaluation['metadata']['name']}", "--tail=40"))
    endpoint = f"http://127.0.0.1:{args.port}"
    deadline = time.monotonic() + ALIAS_SECONDS
    while True:
        with cluster.forward(cluster.namespace, INFERENCE, args.port, 8000) as (forwarding, _):
            while alias not in models_at(endpoint) and forwarding.poll() is None:
                if time.monotonic() > deadline:
                    raise RetryableError(f"{alias} does not answer. Did it pass the gate (above)? The log says more: "
                                         f"kubectl -n {cluster.namespace} logs deployment/{INFERENCE}")
                time.sleep(1)
            if forwarding.poll() is None:
                print(places(cluster, endpoint, alias, report, args), flush=True)
                if args.exit:
                    return
                forwarding.wait()
        log.info("the pod behind %s ended: going on with the next one", endpoint)
        time.sleep(POLL_SECONDS)
        watch(cluster, time.monotonic() + 60 * args.minutes)
        deadline = time.monotonic() + ALIAS_SECONDS


def models_at(endpoint: str) -> set[str]:
    """The models that the endpoint lists; none while it does not answer.

    Raises:
        UserError: it asks for an API key.
    """
    key = os.environ.get("VLLM_API_KEY", "")
    request = urllib.request.Request(f"{endpoint}/v1/models", headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=10) as reply:
            return {model["id"] for model in json.load(reply)["data"]}
    except urllib.error.HTTPError as error:
        if error.code == 401:
            raise UserError("serving asks for its API key: set VLLM_API_KEY to what the Secret serving-api-key holds"
                            ) from None
        return set()
    except OSError:
        return set()


def places(cluster: Cluster, endpoint: str, alias: str, report: Path, args: argparse.Namespace) -> str:
    """Where a person finds the endpoint, the evaluation's report, TensorBoard and Argo CD."""
    context = f"kubectl --context kind-{cluster.name}"
    read = f"-n {cluster.namespace} exec deployment/tensorboard -- cat {report}"
    lines = [f"  Endpoint     {endpoint}/v1  (model: {alias})",
             f"  Report       {context} {read} > report.html",
             f"  TensorBoard  {context} -n {cluster.namespace} port-forward service/tensorboard 6006"]
    if args.argocd:
        initial = "get secret argocd-initial-admin-secret -o jsonpath='{.data.password}' | base64 -d"
        lines += [f"  Argo CD      {context} -n argocd port-forward service/argocd-server 8443:443",
                  f"    password   {context} -n argocd {initial}  (user: admin)"]
    if args.argocd and not args.repo:
        lines += ["  Push         commit, and run this again: it pushes the new commit to the cluster's git server"]
    return "\n".join(["", *lines, "", *([] if args.exit else ["Forwarding until you press Ctrl-C."])])
