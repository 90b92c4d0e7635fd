"""What the status of Kubernetes objects means: how far a Job, a Deployment or a pod is."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.core.errors import RetryableError, UserError
from jobs.tools.kubectl import KubectlError
from jobs.tools.pods import ADAPTER_LABEL, Manifest
from jobs.tools.waiting import Late, wait_until

log = logging.getLogger("jobs")

POLL_SECONDS = 3.0


@dataclass(frozen=True)
class State:
    """How far an object is: a description for people, and whether it is done or has failed for good."""

    description: str
    done: bool = False
    exit_code: int | None = None  # of a failed Job's last pod
    adapter: str | None = None  # the adapter to which the Job belongs; None: the environment


def watch(look: Callable[[], Mapping[str, State]], seconds: float) -> None:
    """Log every change of the states until all are done. A cluster that does not answer is tried again.

    A failed Job of the environment ends it at once. After a failed Job of an adapter, the adapter's other Jobs are not
    waited for, and other adapters are.

    Raises:
        UserError, RetryableError: Jobs failed, by their exit codes; with their pods' termination messages.
        RetryableError: the time is over; names what is not done.
    """
    shown: dict[str, str] = {}
    states: Mapping[str, State] = {}

    def all_done() -> bool:
        nonlocal states
        states = look()
        for name, state in states.items():
            if shown.get(name) != state.description:
                shown[name] = state.description
                log.info("%s: %s", name, state.description)
        failed = {name: state for name, state in states.items() if state.exit_code is not None}
        if failed and (not pending() or any(state.adapter is None for state in failed.values())):
            fatal = any(state.exit_code == UserError.exit_code for state in failed.values())
            raise (UserError if fatal else RetryableError)(
                "\n".join(f"{name} {state.description}" for name, state in failed.items()))
        return bool(states) and not pending()

    def pending() -> dict[str, State]:
        given_up = {state.adapter for state in states.values() if state.exit_code is not None}
        return {name: state for name, state in states.items()
                if not state.done and state.exit_code is None
                and (state.adapter is None or state.adapter not in given_up)}

    def late() -> str:
        return ", ".join(f"{name} ({state.description})" for name, state in pending().items()) or "the cluster"

    try:
        wait_until(late, all_done, seconds, POLL_SECONDS, passing=(KubectlError,))
    except Late as error:
        raise RetryableError(f"not done in time: {error}. Run it again to continue; docs/stuck.md explains each "
                             "state") from None


def find(items: Sequence[Manifest], kind: str, name: str) -> Manifest | None:
    return next((i for i in items if (i["kind"], i["metadata"]["name"]) == (kind, name)), None)


def pods_with(items: Sequence[Manifest], label: str, value: str) -> list[Manifest]:
    """The pods that carry the label, the newest last."""
    return oldest_first(i for i in items if i["kind"] == "Pod" and i["metadata"].get("labels", {}).get(label) == value)


def oldest_first(items: Iterable[Manifest]) -> list[Manifest]:
    return sorted(items, key=lambda item: str(item["metadata"]["creationTimestamp"]))


def condition(manifest: Manifest, kind: str) -> Manifest | None:
    """The condition of that type in the status, if it is true."""
    return next((c for c in manifest.get("status", {}).get("conditions", [])
                 if c["type"] == kind and c["status"] == "True"), None)


def rolled_out(deployment: Manifest) -> bool:
    """Whether all pods are of the newest template and ready. The condition `Available` is not enough: with one replica
    and `maxUnavailable: 1` it is true without any pod."""
    replicas, status = deployment["spec"]["replicas"], deployment.get("status", {})
    return bool(status.get("observedGeneration") == deployment["metadata"]["generation"]
                and status.get("replicas", 0) == status.get("updatedReplicas", 0) == replicas
                and status.get("availableReplicas", 0) == replicas)


def job_state(items: Sequence[Manifest], name: str) -> State:
    """The state of the Job among `items`, a snapshot of Jobs and pods."""
    job, pods = find(items, "Job", name), pods_with(items, "batch.kubernetes.io/job-name", name)
    if job is None:
        return State("not there yet")
    adapter = job["metadata"].get("labels", {}).get(ADAPTER_LABEL)
    if condition(job, "Complete"):
        return State("done", done=True, adapter=adapter)
    if failed := condition(job, "Failed"):
        ends = [end for pod in pods for end in _terminations(pod) if end["exitCode"]]
        if not ends:
            return State(f"failed: {failed.get('message')}", exit_code=1, adapter=adapter)
        return State(f"failed with exit code {ends[-1]['exitCode']}: {_message(ends[-1])}",
                     exit_code=ends[-1]["exitCode"], adapter=adapter)
    return State(_of_newest(pods), adapter=adapter)


def deployment_state(items: Sequence[Manifest], name: str) -> State:
    """The state of the Deployment among `items`, a snapshot of Deployments and pods."""
    deployment = find(items, "Deployment", name)
    if deployment is None:
        return State("not there yet")
    if rolled_out(deployment):
        return State("ready", done=True)
    return State(_of_newest(pods_with(items, "app.kubernetes.io/name", name)))


def _of_newest(pods: Sequence[Manifest]) -> str:
    return pod_description(pods[-1]) if pods else "no pod yet"


def pod_description(pod: Manifest) -> str:
    """What a pod that is not done yet does, or waits for."""
    status = pod.get("status", {})
    for found in status.get("conditions", []):
        if found["type"] == "PodScheduled" and found["status"] == "False":
            return f"waits for a node: {found.get('message')}"
    for kind, running in (("initContainerStatuses", "waits for its inputs"), ("containerStatuses", "runs")):
        for container in status.get(kind, []):
            state = container["state"]
            if "running" in state:
                return running
            ended = state.get("terminated", {})
            if ended.get("exitCode"):
                return f"exit code {ended['exitCode']}, will be retried: {_message(ended)}"
            waiting = state.get("waiting", {})
            if waiting.get("reason", "PodInitializing") not in ("PodInitializing", "ContainerCreating"):
                before = container.get("lastState", {}).get("terminated")
                return f"{waiting['reason']}: {_message(before) if before else waiting.get('message')}"
    return "starts"


def _terminations(pod: Manifest) -> list[dict[str, Any]]:
    """How the pod's containers ended, those that did."""
    return [c["state"]["terminated"] for c in pod.get("status", {}).get("containerStatuses", [])
            if "terminated" in c["state"]]


def _message(ending: Mapping[str, Any]) -> str:
    """What a stage wrote when it failed, or the last line that it logged; and Kubernetes' reason, such as OOMKilled."""
    reason, lines = str(ending.get("reason", "Error")), str(ending.get("message", "")).strip().splitlines()
    return ": ".join([*([reason] if reason != "Error" or not lines else []), *lines[-1:]])
