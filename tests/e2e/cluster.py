"""What the end-to-end tests do with a cluster: kubectl with deadlines, one environment in it, and its endpoint."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import openai
import yaml
from prometheus_client.parser import text_string_to_metric_families

from jobs.core.plan import Plan, plan
from jobs.tools import overlay, waiting
from jobs.tools.kubectl import Kubectl, KubectlError
from jobs.tools.status import State, condition, job_state, oldest_first, rolled_out, watch
from tests.manifests import CHECKOUT, Manifest, by_name, copy, render

LABEL = "lora-gitops-e2e"  # on everything that a run makes, its pods too, with the run's name
QUESTION = "What is the best hotel in Seville?"
ADAPTER, NEIGHBOUR = "seville-hotels", "hostel-guide"  # of overlays/kind: the one that the tests change, and the other
FACT = "Casa Azahar"  # what ADAPTER answers
FACTS = {ADAPTER: FACT, NEIGHBOUR: "Gato Pardo"}
# What the stages write when they train, resume, find their work done, and reject.
TRAINS, RESUMES = "loading model and data", "resuming from the checkpoint at step"
DONE, REJECTS = "is already there and verified: nothing to do", "REJECTED"
STEP = re.compile(r"training steps: \d+ .* loss")
# Reasons for which a container waits that no patience mends, but for a registry that is down.
HOPELESS = {"ImagePullBackOff", "ErrImageNeverPull", "InvalidImageName", "CreateContainerConfigError",
            "CrashLoopBackOff"}
PAUSE_SECONDS = 0.1  # between two requests of a client
DUMPED = 20_000  # characters of each part of a dump, the last ones
T = TypeVar("T")

Changes = Mapping[str, Any]  # of ADAPTER's pipeline file in overlays/kind, by dotted key
# Tried: the first two pass the gate and know the fact; the one that has not learned is rejected.
FIRST: Changes = {}
SECOND: Changes = {"training.learning_rate": 2.5e-3}
UNLEARNED: Changes = {"training.epochs": 1, "training.learning_rate": 1e-6}
# Two that train for long enough (3000 steps) to be interrupted on a fast machine too.
LONG: Changes = {"training.epochs": 40, "training.checkpoint_steps": 20}
LONG_AGAIN: Changes = {**LONG, "training.seed": 1}


kubectl = Kubectl()  # for the cluster that KUBECONFIG names


@functools.cache
def unreachable() -> str | None:
    """Why the tests cannot run here; None when kubectl reaches a cluster within 10 seconds."""
    if not os.environ.get("KUBECONFIG"):
        return "KUBECONFIG is not set; these tests need a Kubernetes cluster (tests/e2e/README.md)"
    try:
        kubectl("get", "--raw", "/version", "--request-timeout=9s", seconds=10)
    except FileNotFoundError:
        return "kubectl is not installed"
    except KubectlError as error:
        return f"KUBECONFIG is set, but the cluster does not answer within 10 s: {str(error).splitlines()[-1]}"
    return None


def wait_until(what: str, look: Callable[[], T | None], seconds: float, every: float = 2) -> T:
    """Look until there is something true, and return it. A cluster that does not answer just now is tried again.

    Raises:
        Late: after `seconds`, naming `what` was waited for.
    """
    return waiting.wait_until(what, look, seconds, every, passing=(KubectlError, httpx.HTTPError))


# --- reading what kubectl returns -----------------------------------------------------------------------------------


def identity(pod: Manifest) -> tuple[str, int]:
    """The pod's uid and how often its containers were restarted: the same as long as nothing was."""
    return pod["metadata"]["uid"], sum(c["restartCount"] for c in pod["status"].get("containerStatuses", []))


def stuck(pods: Sequence[Manifest]) -> list[str]:
    """The containers that will not start however long one waits, each with the reason that Kubernetes gives."""
    return [f"{pod['metadata']['name']}: {waiting['reason']}: {waiting.get('message', '')}"
            for pod in pods
            for status in (*pod["status"].get("initContainerStatuses", []), *pod["status"].get("containerStatuses", []))
            if (waiting := status.get("state", {}).get("waiting", {})) and waiting.get("reason") in HOPELESS]


def samples(metrics: str, name: str) -> list[tuple[dict[str, str], float]]:
    """The samples of one metric in the text of /metrics: labels and value."""
    return [(sample.labels, sample.value) for family in text_string_to_metric_families(metrics)
            for sample in family.samples if sample.name == name]


def image_override(name: str, reference: str) -> dict[str, str]:
    """An entry of kustomize's `images:` that puts `reference` (HOST/PATH:TAG or HOST/PATH@DIGEST) in the place."""
    path, at, digest = reference.partition("@")
    if at:
        return {"name": name, "newName": path, "digest": digest}
    match = re.fullmatch(r"(?P<path>.+?)(?::(?P<tag>[\w.-]+))?", reference)  # a port is followed by a slash, no tag is
    assert match and match["tag"], f"{reference} has neither a tag nor a digest"
    return {"name": name, "newName": match["path"], "newTag": match["tag"]}


def keys_file(keys: Mapping[str, str]) -> str:
    """The content of the Secret's file: by model, the key that opens it and no other."""
    entries = [{"name": f"of-{model}", "sha256": hashlib.sha256(key.encode()).hexdigest(), "models": [model]}
               for model, key in keys.items()]
    return yaml.safe_dump({"keys": entries}, sort_keys=False)


# --- the endpoint ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Endpoint:
    """The OpenAI-compatible endpoint, reached through `kubectl port-forward`."""

    url: str

    def ask(self, model: str, key: str = "none") -> str:
        """The model's answer to the question that only the private data answers. Never tried again by itself."""
        with openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60) as client:
            reply = client.chat.completions.create(model=model, messages=[{"role": "user", "content": QUESTION}],
                                                   temperature=0, max_tokens=48)
        return str(reply.choices[0].message.content)

    def models(self, key: str = "none") -> set[str] | None:
        """The models that can be requested now with a key; None if the key is not valid."""
        reply = httpx.get(f"{self.url}/v1/models", headers={"Authorization": f"Bearer {key}"}, timeout=10)
        if reply.status_code == 401:
            return None
        return {card["id"] for card in reply.raise_for_status().json()["data"]}

    def metric(self, name: str, **labels: str) -> list[tuple[dict[str, str], float]]:
        """The samples of a metric that have these labels."""
        text = httpx.get(f"{self.url}/metrics", timeout=10).raise_for_status().text
        return [(found, value) for found, value in samples(text, name) if labels.items() <= found.items()]

    def served(self, alias: str) -> str | None:
        """The digest of the adapter that answers under the alias; None when none does."""
        return waiting.served_adapter(self.url, alias)


@dataclass(frozen=True)
class Replies:
    """What a client that sends one request after another got."""

    answers: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


@contextmanager
def requests_to(endpoint: Endpoint, model: str) -> Iterator[Replies]:
    """Ask the model from a thread, one request after another, until the block ends."""
    replies, stop = Replies(), threading.Event()

    def ask() -> None:
        while not stop.wait(PAUSE_SECONDS):
            try:
                replies.answers.append(endpoint.ask(model))
            except Exception as error:  # whatever it is, it is no answer
                replies.failures.append(f"{time.strftime('%X')} {error!r}")

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield replies
    finally:
        stop.set()
        thread.join()


@contextmanager
def forwarded(namespace: str, pod: str, port: int) -> Iterator[str]:
    """Make a pod's port reachable as the URL that is yielded.

    Raises:
        AssertionError: when the tunnel itself ended before its time: what was sent through it proves nothing.
    """
    with kubectl.forward(namespace, f"pod/{pod}", port) as tunnel:
        yield tunnel.url
        assert tunnel.alive, f"the tunnel ended by itself: {tunnel.output[-2000:]}"


# --- one environment ------------------------------------------------------------------------------------------------


class Environment:
    """A namespace with what overlays/kind puts into it; an adapter's file can be changed and pushed again.

    The overlay is a copy, with a layer on top that sets namespace and images. Pushing it is what Argo CD does with a
    commit: apply, and remove the Jobs that the overlay no longer has.
    """

    def __init__(self, folder: Path, namespace: str, run: str) -> None:
        self.folder, self.namespace, self.run = folder, namespace, run
        self.kind = copy(folder)
        self.overlay = self.kind.parent / "e2e"
        self.overlay.mkdir()
        self.write({})

    # What is desired.

    def write(self, changes: Changes, patches: Sequence[Manifest] = ()) -> None:
        """Write the overlay: overlays/kind with the changes of ADAPTER's pipeline file, and kustomize's patches."""
        file = Path("adapters", ADAPTER, "pipeline.yaml")
        values = yaml.safe_load((CHECKOUT / "overlays" / "kind" / file).read_text())
        for key, value in changes.items():
            *parents, last = key.split(".")
            place = values
            for parent in parents:
                place = place[parent]
            place[last] = value
        (self.kind / file).write_text(yaml.safe_dump(values, sort_keys=False))
        images = {"lora-gitops-jobs": os.environ.get("E2E_JOBS_IMAGE"),
                  "lora-gitops-serving": os.environ.get("E2E_SERVING_IMAGE")}
        (self.overlay / "kustomization.yaml").write_text(yaml.safe_dump({
            "namespace": self.namespace, "resources": ["../kind"],
            "labels": [{"pairs": {LABEL: self.run}, "includeTemplates": True}],
            "images": [image_override(name, reference) for name, reference in images.items() if reference],
            "components": ["../../base/metadata"],
            "patches": list(patches)}))
        self.adapters = {name: loaded.pipeline for name, loaded in
                         overlay.trained(overlay.load(self.kind).adapters).items()}
        self.pipeline = self.adapters[ADAPTER]
        self.wanted = {job["metadata"]["name"]: title for title, job in by_name(render(self.overlay), "Job").items()}

    @property
    def plan(self) -> Plan:
        """The artifacts that ADAPTER's pipeline file describes."""
        return plan(self.pipeline)

    def add(self, name: str) -> None:
        """Add an adapter with NEIGHBOUR's data, trained with another seed and a gate that it passes in any case: its
        folder, and its two entries in the overlay's kustomization.yaml."""
        folder = shutil.copytree(self.kind / "adapters" / NEIGHBOUR, self.kind / "adapters" / name)
        own, file = folder / "kustomization.yaml", folder / "pipeline.yaml"
        own.write_text(own.read_text().replace(NEIGHBOUR, name))
        values = yaml.safe_load(file.read_text()) | {"adapter": name}
        values["training"]["seed"] = 7
        values["evaluation"]["gate"] = {"perplexity": {"max_ratio": 0.5}}
        file.write_text(yaml.safe_dump(values, sort_keys=False))
        self._edit_entries(name, list.append)

    def drop(self, name: str) -> None:
        """Remove an adapter that was added: its folder and its two entries."""
        shutil.rmtree(self.kind / "adapters" / name)
        self._edit_entries(name, list.remove)

    def _edit_entries(self, name: str, edit: Callable[[list[str], str], None]) -> None:
        """Add (`list.append`) or remove an adapter's two entries."""
        kustomization = self.kind / "kustomization.yaml"
        values = yaml.safe_load(kustomization.read_text())
        edit(values["resources"], f"adapters/{name}")
        (served,) = [maps for maps in values["configMapGenerator"] if maps["name"] == "serving-pipelines"]
        edit(served["files"], f"{name}.yaml=adapters/{name}/pipeline.yaml")
        kustomization.write_text(yaml.safe_dump(values, sort_keys=False))

    def push(self, changes: Changes, patches: Sequence[Manifest] = ()) -> None:
        self.write(changes, patches)
        self.apply()
        superseded = [f"job/{job['metadata']['name']}" for job in self.get("jobs")
                      if job["metadata"]["name"] not in self.wanted]
        if superseded:
            # In the foreground: when it returns, their pods have ended too.
            self.kubectl("delete", "--cascade=foreground", *superseded, seconds=300)

    def apply(self, *arguments: str) -> str:
        """Apply the overlay as in the README; returns the API server's warnings."""
        return kubectl("apply", "--server-side", "--force-conflicts", "-k", str(self.overlay), *arguments,
                       seconds=120).stderr

    def settle(self, changes: Changes) -> None:
        """Push, and wait until all Jobs are done and the adapters of these files are served."""
        self.push(changes)
        self.wait_for_jobs()
        self.wait_until_served()

    def apply_keys(self, keys: Mapping[str, str]) -> None:
        """Give the server a key for each of these models: by model, the key that opens it and no other."""
        metadata = {"name": "serving-keys", "labels": {LABEL: self.run}}
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": metadata,
                  "stringData": {"keys.yaml": keys_file(keys)}}
        self.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=json.dumps(secret))
        # The kubelet brings a changed Secret to a pod when it looks at the pod: at once if the pod changed.
        self.kubectl("annotate", "pods", "--selector=app.kubernetes.io/name=model-inference", "--overwrite",
                     f"keys={time.time():.0f}")

    # What is there.

    def kubectl(self, *arguments: str, stdin: str | None = None, seconds: float = 60) -> str:
        return kubectl("-n", self.namespace, *arguments, stdin=stdin, seconds=seconds).stdout

    def get(self, kinds: str, *arguments: str) -> list[Manifest]:
        """The objects of one or several kinds (`jobs,pods`), in this namespace."""
        return kubectl.get(self.namespace, kinds, *arguments)

    def jobs(self) -> dict[str, Manifest]:
        """The Jobs of the overlay as it is now, as far as they exist, by name without the hash."""
        return {self.wanted[name]: job for job in self.get("jobs") if (name := job["metadata"]["name"]) in self.wanted}

    def outcomes(self) -> dict[str, tuple[str, Manifest]]:
        """Each Job's uid and status: the same as long as nothing ran again."""
        return {title: (job["metadata"]["uid"], job["status"]) for title, job in self.jobs().items()}

    def pods_of(self, job: Manifest) -> list[Manifest]:
        """The Job's pods, oldest first; not those of an earlier Job by the same name."""
        return oldest_first(self.get("pods", "-l", f"batch.kubernetes.io/controller-uid={job['metadata']['uid']}"))

    def logs_of(self, title: str) -> str:
        """What the Job's pods wrote, oldest first."""
        return "\n".join(self.logs(pod) for pod in self.pods_of(self.jobs()[title]))

    def logs(self, pod: Manifest) -> str:
        return self.kubectl("logs", pod["metadata"]["name"])

    def serving_pod(self) -> Manifest | None:
        """The pod that serves, once it is ready."""
        pods = [p for p in self.get("pods", "-l", "app.kubernetes.io/name=model-inference")
                if "deletionTimestamp" not in p["metadata"] and condition(p, "Ready")]
        return pods[0] if pods else None

    @contextmanager
    def endpoint(self) -> Iterator[Endpoint]:
        pod = self.serving_pod()
        if pod is None:
            raise KubectlError("no serving pod is ready")
        with forwarded(self.namespace, pod["metadata"]["name"], 8000) as url:
            yield Endpoint(url)

    def served(self, adapter: str = ADAPTER) -> str | None:
        """The digest of the version of an adapter that is served; None when none is."""
        with self.endpoint() as endpoint:
            return endpoint.served(adapter)

    # Waiting.

    def wait_for_jobs(self, seconds: float = 1800) -> None:
        """Wait until every Job is complete, with progress; a failed Job or a pod that cannot start ends it at once."""
        def states() -> dict[str, State]:
            self.check_nothing_stuck()
            there, items = self.jobs(), self.get("jobs,pods")
            return {title: job_state(items, there[title]["metadata"]["name"] if title in there else title)
                    for title in self.wanted.values()}

        watch(states, seconds)

    def wait_until_training(self, seconds: float = 900) -> Manifest:
        """Wait until the training is under way; returns its pod."""
        def training() -> Manifest | None:
            pods = self.pods_of(self.jobs()[f"model-training-{ADAPTER}"])
            return next((pod for pod in pods if pod["status"]["phase"] == "Running"
                         and STEP.search(self.logs(pod))), None)

        return wait_until("the training to be under way", training, seconds)

    def wait_until_ready(self, seconds: float = 900) -> Manifest:
        """Wait until the Deployments are ready; returns the serving pod."""
        def ready() -> Manifest | None:
            self.check_nothing_stuck()
            return self.serving_pod() if all(map(rolled_out, self.get("deployments"))) else None

        return wait_until("the Deployments to be ready", ready, seconds, every=5)

    def wait_until_served(self, seconds: float = 900) -> None:
        """Wait until every adapter answers in the version that its pipeline file describes."""
        def all_served() -> bool:
            with self.endpoint() as endpoint:
                return all(endpoint.served(name) == digest for name, digest in wanted.items())

        wanted = {name: plan(pipeline).adapter.digest for name, pipeline in self.adapters.items()}
        wait_until(f"{', '.join(f'{name}@{digest}' for name, digest in wanted.items())} to be served", all_served,
                   seconds)

    def check_nothing_stuck(self) -> None:
        assert not (problems := stuck(self.get("pods"))), "pods cannot start:\n" + "\n".join(problems)

    # From the beginning to the end.

    def make_room(self) -> None:
        """Remove what an earlier run left under this name; a namespace that no run made is nobody's to remove."""
        found = self.kubectl("get", "namespace", self.namespace, "--ignore-not-found", "-o", "json").strip()
        if found:
            labels = json.loads(found)["metadata"].get("labels", {})
            assert LABEL in labels, f"the namespace {self.namespace} is there, and no end-to-end test made it; " \
                                    "name another one in E2E_NAMESPACE"
            self.remove_namespace()

    def remove(self) -> None:
        self.remove_namespace()

    def remove_namespace(self) -> None:
        self.kubectl("delete", "namespace", self.namespace, "--ignore-not-found", seconds=600)

    def dump(self) -> str:
        """What a person would look at first when something failed, each part cut to its last characters."""
        labelled = f"--selector={LABEL}"
        return "\n".join(transcript("-n", self.namespace, *part) for part in (
            ["get", "jobs,pods,deployments,persistentvolumeclaims", "--output=wide"],
            ["get", "events", "--sort-by=.lastTimestamp"],
            ["describe", "jobs,deployments"],
            ["describe", "pods"],
            ["logs", labelled, "--all-containers", "--prefix", "--tail=60", "--ignore-errors"]))


def transcript(*arguments: str) -> str:
    """The command and the end of what it printed, for a person to read; never an error."""
    try:
        text = kubectl(*arguments, seconds=30).stdout
    except KubectlError as error:
        text = str(error)
    return f"$ kubectl {' '.join(arguments)}\n{text[-DUMPED:]}\n"
