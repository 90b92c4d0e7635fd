"""Promises of `jobs kind`: what is missing is named in one line, no other cluster is touched, each change is shown.

Neither docker nor a cluster can run where the tests do: docker, kind, kubectl and git are small programs on the PATH
here that write down how they were called and answer as each test sets. Only `kubectl kustomize` is the real one.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.__main__ import main
from jobs.core.errors import RetryableError, UserError
from jobs.core.plan import plan
from jobs.tools import argocd, kind, overlay, status
from jobs.tools.kind import states_of
from jobs.tools.status import State
from tests import rendered_once
from tests.manifests import CHECKOUT, Manifest, of_kind, pod_templates, render, restricted_violations
from tests.tools.test_local import free_port
from tests.tools.test_waiting import endpoint as serving

OVERLAY = CHECKOUT / "overlays" / "kind"
DIGESTS = {name: plan(loaded.pipeline).adapter.digest for name, loaded in
           overlay.trained(overlay.load(OVERLAY).adapters).items()}
COMMIT = "1ccbb815cf6bdf30dd97893c841a763d57cb4cf2"

FAKE = """\
#!{python}
import json, os, subprocess, sys
folder, name, argv = "{folder}", os.path.basename(sys.argv[0]), sys.argv[1:]
line = " ".join([name, *argv])
stdin = sys.stdin.read() if "-" in argv else ""
applied = argv[argv.index("-k") + 1] if "-k" in argv else ""
if "kustomize" in argv:
    os.execv("{kubectl}", [name, *argv])
if applied:  # what is sent, since a temporary folder is gone afterwards
    stdin = subprocess.run(["{kubectl}", "kustomize", applied], capture_output=True, text=True).stdout
with open(folder + "/calls", "a") as calls:
    calls.write(json.dumps([line, stdin]) + "\\n")
answers = json.load(open(folder + "/answers"))
for wanted, replies in answers:
    if wanted in line:
        count = sum(wanted in json.loads(call)[0] for call in open(folder + "/calls"))
        code, out = replies[min(count, len(replies)) - 1]
        print(out, file=sys.stderr if code else sys.stdout, flush=True)
        if "port-forward" in argv and not code:
            import signal
            signal.pause()
        sys.exit(code)
"""


class Tools:
    """The fake programs: how they were called, and what they answer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        (folder / "calls").touch()
        self.answers: list[tuple[str, list[tuple[int, str]]]] = []
        for name in ("docker", "kind", "kubectl", "git"):
            program = folder / "bin" / name
            program.write_text(FAKE.format(python=PYTHON, folder=folder, kubectl=KUBECTL))
            program.chmod(0o755)
        rendered_once.RENDERS.add(str(folder / "bin" / "kubectl"))
        self.say()

    def say(self, *answers: tuple[str, list[tuple[int, str]]]) -> None:
        """Answer a command that contains the text with each (exit code, output) in turn, the last one for ever."""
        self.answers = [*answers, *self.answers]
        (self.folder / "answers").write_text(json.dumps(self.answers))

    @property
    def calls(self) -> list[str]:
        return [json.loads(line)[0] for line in (self.folder / "calls").read_text().splitlines()]

    def sent(self, text: str) -> str:
        """The standard input of the one call that contains the text, or what it applied."""
        (stdin,) = [stdin for line, stdin in map(json.loads, (self.folder / "calls").read_text().splitlines())
                    if text in line]
        return str(stdin)


KUBECTL = shutil.which("kubectl")
PYTHON = f"{Path(sys.executable).resolve()} -IS"  # starts fast: without the packages of the virtual environment


def cluster(*items: Manifest) -> str:
    return json.dumps({"kind": "List", "items": list(items)})


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tools:
    fake = Tools(tmp_path / "tools")
    monkeypatch.setenv("PATH", f"{fake.folder / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(kind, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(status, "POLL_SECONDS", 0.01)
    fake.say(("port-forward", [(0, "Forwarding from 127.0.0.1:8000 -> 8000")]), ("get clusters", [(0, "other")]),
             ("rev-parse", [(0, COMMIT)]), ("jsonpath", [(0, "argocd-image:v3")]))
    return fake


@pytest.fixture
def endpoint() -> Iterator[int]:
    """The port of a server whose metrics have the overlay's adapters."""
    with serving(*DIGESTS.items()) as url:
        yield int(url.rpartition(":")[2])


# --- snapshots, as `kubectl get -o json` gives them (shortened) -----------------------------------------------------


def job(name: str, condition: str | None = None, message: str = "") -> Manifest:
    conditions = [{"type": condition, "status": "True", "message": message}] if condition else []
    return {"apiVersion": "batch/v1", "kind": "Job", "status": {"conditions": conditions},
            "metadata": {"name": name, "creationTimestamp": "2026-11-23T03:00:00Z"}}


def pod(owner: str, state: dict[str, Any] | None = None, *, name: str = "p", at: str = "03:00:00", init: bool = False,
        **more: Any) -> Manifest:
    status = {"initContainerStatuses" if init else "containerStatuses": [{"name": "job", "state": state, **more}]}
    label = "app.kubernetes.io/name" if owner == kind.INFERENCE else "batch.kubernetes.io/job-name"
    return {"apiVersion": "v1", "kind": "Pod", "status": status if state else {},
            "metadata": {"name": name, "labels": {label: owner}, "creationTimestamp": f"2026-11-23T{at}Z"}}


def inference(available: int = 1) -> Manifest:
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": kind.INFERENCE, "generation": 1},
            "spec": {"replicas": 1, "selector": {"matchLabels": {"app.kubernetes.io/name": kind.INFERENCE}}},
            "status": {"observedGeneration": 1, "replicas": 1, "updatedReplicas": 1, "availableReplicas": available}}


def application(sync: str = "Synced", revision: str = COMMIT, jobs: list[str] | None = None, **status: Any) -> Manifest:
    resources = [{"group": "batch", "kind": "Job", "name": name, "status": "Synced"} for name in jobs or []]
    return {"apiVersion": "argoproj.io/v1alpha1", "kind": "Application", "metadata": {"name": "lora-gitops"},
            "spec": {"destination": {"namespace": "lora-gitops"}},
            "status": {"sync": {"status": sync, "revision": revision}, "health": {"status": "Progressing"},
                       "resources": resources, **status}}


@functools.cache
def all_done() -> list[Manifest]:
    return [*(job(m["metadata"]["name"], "Complete") for m in of_kind(render(OVERLAY), "Job")), inference()]


TRAINING = "model-training-5b2c8d9f7k"
RUNNING = {"running": {"startedAt": "2026-11-23T03:00:05Z"}}


@pytest.mark.parametrize(("items", "description"), [
    ([], "not there yet"),
    ([job(TRAINING)], "no pod yet"),
    ([job(TRAINING), pod(TRAINING)], "starts"),
    ([job(TRAINING), pod(TRAINING, {"waiting": {"reason": "ContainerCreating"}})], "starts"),
    ([job(TRAINING), pod(TRAINING, RUNNING)], "runs"),
    ([job(TRAINING), pod("another-job", RUNNING)], "no pod yet"),
    ([job(TRAINING), pod(TRAINING, {"waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}})],
     "ImagePullBackOff: Back-off pulling image"),
    ([job(TRAINING), pod(TRAINING, {"terminated": {"exitCode": 1, "message": "the hub is down\n"}})],
     "exit code 1, will be retried: the hub is down"),
    ([job(TRAINING), pod(TRAINING, {"terminated": {"exitCode": 137, "reason": "OOMKilled"}})],
     "exit code 137, will be retried: OOMKilled"),
    ([job(TRAINING), pod(TRAINING, {"terminated": {"exitCode": 137, "reason": "OOMKilled",
                                                   "message": "step 1\nstep 2\n"}})],
     "exit code 137, will be retried: OOMKilled: step 2"),
    ([job(TRAINING), pod(TRAINING, {"terminated": {"exitCode": 1, "reason": "Error",
                                                   "message": "Traceback …\nKeyError: 'x'\n"}})],
     "exit code 1, will be retried: KeyError: 'x'"),
    ([job(TRAINING), pod(TRAINING, RUNNING, at="03:01:00"),  # the newest attempt counts, wherever it stands in the list
      pod(TRAINING, {"terminated": {"exitCode": 137, "reason": "OOMKilled"}})], "runs"),
    ([job(TRAINING, "Complete")], "done"),
    ([job(TRAINING, "Failed", "Job has reached the specified backoff limit")],
     "failed: Job has reached the specified backoff limit"),
    ([job(TRAINING, "Failed"), pod(TRAINING, {"terminated": {"exitCode": 1, "message": "first"}}),
      pod(TRAINING, {"terminated": {"exitCode": 2, "message": "the data is wrong"}}, at="03:01:00")],
     "failed with exit code 2: the data is wrong"),
    ([job(TRAINING), {**pod(TRAINING), "status": {"conditions": [
        {"type": "PodScheduled", "status": "False", "reason": "Unschedulable",
         "message": "0/1 nodes are available: 1 Insufficient memory."}]}}],
     "waits for a node: 0/1 nodes are available: 1 Insufficient memory."),
])
def test_a_jobs_state_in_words(items: list[Manifest], description: str) -> None:
    state = states_of(items, [TRAINING])["model-training"]
    assert state.description == description
    assert state.done == (description == "done")
    assert (state.exit_code is not None) == description.startswith("failed")


@pytest.mark.parametrize(("items", "description"), [
    ([], "not there yet"),
    ([inference(0), pod(kind.INFERENCE, RUNNING, init=True)], "waits for its inputs"),
    ([inference(0), pod(kind.INFERENCE, RUNNING)], "runs"),
    ([inference(0), pod(kind.INFERENCE, {"waiting": {"reason": "CreateContainerConfigError",
                                                     "message": 'secret "serving-api-key" not found'}})],
     'CreateContainerConfigError: secret "serving-api-key" not found'),
    ([inference(0), pod(kind.INFERENCE, {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 40s"}},
                        lastState={"terminated": {"exitCode": 2, "message": "VLLM_API_KEY is empty"}})],
     "CrashLoopBackOff: VLLM_API_KEY is empty"),
    ([inference()], "ready"),
])
def test_servings_state_in_words(items: list[Manifest], description: str) -> None:
    assert states_of(items, [])[kind.INFERENCE] == State(description, done=description == "ready")


@pytest.mark.parametrize(("found", "description"), [
    (application(), "Synced, Progressing"),
    (application("OutOfSync"), "OutOfSync, Progressing"),
    (application("Unknown", conditions=[{"type": "ComparisonError", "message": "authentication required"}]),
     "Unknown, Progressing (authentication required)"),
    (application("OutOfSync", operationState={
        "phase": "Running", "retryCount": 2, "message": "one or more objects failed to apply. Retrying attempt #3"}),
     "OutOfSync, Progressing (one or more objects failed to apply. Retrying attempt #3)"),
    (application("OutOfSync", operationState={
        "phase": "Failed", "message": "one or more objects failed to apply", "syncResult": {"resources": [
            {"kind": "Service", "name": "tensorboard", "status": "Synced", "message": "serverside-applied"},
            {"kind": "Deployment", "name": "tensorboard", "status": "SyncFailed", "message": "field is immutable"},
        ]}}),
     "OutOfSync, Progressing (one or more objects failed to apply) (Deployment/tensorboard: field is immutable)"),
])
def test_the_applications_state_in_words(found: Manifest, description: str) -> None:
    assert states_of([found], None)["Application"].description == description


def test_before_argo_cd_has_synced_this_commit_nothing_counts_as_done() -> None:
    """Else the Jobs of the commit before, all done, would end the wait at once."""
    before = [application(revision="0" * 40, jobs=[TRAINING]), job(TRAINING, "Complete"), inference()]
    assert [s.done for s in states_of(before, None, COMMIT).values()] == [False]
    assert all(s.done for s in states_of(before, None).values())
    after = [application(jobs=[TRAINING]), *before[1:]]
    assert all(s.done for s in states_of(after, None, COMMIT).values())


def test_a_status_from_before_the_refresh_does_not_count() -> None:
    """On a second run with --repo it is still about the commit before, whatever that was."""
    requested = application(jobs=[TRAINING])
    requested["metadata"]["annotations"] = {"argocd.argoproj.io/refresh": "normal"}
    syncing = application(jobs=[TRAINING], operationState={"phase": "Running"})
    for found in (requested, syncing):
        assert [s.done for s in states_of([found, job(TRAINING, "Complete"), inference()], None).values()] == [False]


def test_a_job_that_argo_cd_still_has_to_prune_does_not_count() -> None:
    synced = application(jobs=[TRAINING])
    synced["status"]["resources"].append({"kind": "Job", "name": "model-training-old", "requiresPruning": True})
    found = states_of([synced, job(TRAINING, "Complete"), job("model-training-old", "Failed"), inference()], None)
    assert found.keys() == {"Application", "model-training", kind.INFERENCE}
    assert all(s.done for s in found.values())


def test_the_job_of_an_earlier_config_does_not_count() -> None:
    """A plain apply leaves it behind."""
    items = [job(TRAINING, "Complete"), job("model-training-bbbbbbbbbb", "Failed"), inference()]
    assert all(state.done for state in states_of(items, [TRAINING]).values())


# --- watching -------------------------------------------------------------------------------------------------------


def watch(tools: Tools, *snapshots: list[Manifest], seconds: float = 60) -> None:
    tools.say(("get jobs,deployments,pods", [(0, cluster(*snapshot)) for snapshot in snapshots]))
    status.watch(kind.Cluster("lora-gitops", "lora-gitops", jobs=[TRAINING]).states, seconds)


def test_each_change_is_one_line(tools: Tools, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="jobs")
    waits, runs = [job(TRAINING), inference(0)], [job(TRAINING), pod(TRAINING, RUNNING), inference(0)]
    watch(tools, waits, waits, runs, runs, [job(TRAINING, "Complete"), inference()])
    assert caplog.messages == ["model-training: no pod yet", "model-inference: no pod yet", "model-training: runs",
                               "model-training: done", "model-inference: ready"]


@pytest.mark.parametrize(("code", "error"), [(2, UserError), (1, RetryableError)])
def test_a_failed_job_ends_it_with_the_pods_own_words(tools: Tools, code: int, error: type[Exception]) -> None:
    ended = pod(TRAINING, {"terminated": {"exitCode": code, "message": "pipeline.yaml: dataset is not as pinned"}})
    with pytest.raises(error, match=f"model-training failed with exit code {code}: pipeline.yaml: dataset is not as"):
        watch(tools, [job(TRAINING), inference(0)], [job(TRAINING, "Failed"), ended, inference(0)])


def test_a_cluster_that_does_not_answer_for_a_moment_is_asked_again(tools: Tools, caplog: pytest.LogCaptureFixture
                                                                   ) -> None:
    tools.say(("get jobs,deployments,pods", [(1, "error: connection refused"), (1, "error: connection refused"),
                                             (0, cluster(job(TRAINING, "Complete"), inference()))]))
    status.watch(kind.Cluster("lora-gitops", "lora-gitops", jobs=[TRAINING]).states, 60)
    (line,) = caplog.messages
    assert line.endswith("get jobs,deployments,pods -o json: connection refused; trying again")


def test_when_the_time_is_over_it_names_what_is_not_done(tools: Tools) -> None:
    with pytest.raises(RetryableError, match=r"not done in time: .* model-inference \(waits for its inputs\)"):
        watch(tools, [job(TRAINING, "Complete"), inference(0), pod(kind.INFERENCE, RUNNING, init=True)], seconds=0)


# --- the whole command ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["docker", "kind", "kubectl", "git"])
def test_a_missing_tool_is_one_clear_line(tools: Tools, name: str, monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", str(tools.folder / "bin"))
    (tools.folder / "bin" / name).unlink()
    assert main(["kind", str(OVERLAY), "--argocd", "--check"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {name} is not installed. ")


def test_a_docker_that_does_not_run_is_one_clear_line(tools: Tools, capsys: pytest.CaptureFixture[str]) -> None:
    tools.say(("docker info", [(1, "Cannot connect to the Docker daemon at unix:///var/run/docker.sock.")]))
    assert main(["kind", str(OVERLAY)]) == 2
    assert "error: docker does not answer (Cannot connect to the Docker daemon" in capsys.readouterr().err
    assert tools.calls == ["docker info"]


def test_images_that_were_not_built_are_named(tools: Tools, capsys: pytest.CaptureFixture[str]) -> None:
    tools.say(("image inspect lora-gitops-serving", [(1, "No such image")]))
    assert main(["kind", str(OVERLAY)]) == 2
    assert ("error: docker has no image lora-gitops-serving:0.1.0. Build them with `make images`"
            in capsys.readouterr().err)
    assert not [c for c in tools.calls if c.startswith("kind")]


def test_an_invalid_overlay_is_refused_before_anything_is_made(tools: Tools, tmp_path: Path,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(OVERLAY, tmp_path / "overlay")
    file = tmp_path / "overlay" / "adapters" / "seville-hotels" / "pipeline.yaml"
    file.write_text(file.read_text().replace("epochs: 20", "epochs: 0"))
    assert main(["kind", str(tmp_path / "overlay")]) == 2
    assert "training.epochs: 0" in capsys.readouterr().err
    assert tools.calls == ["docker info"]


def test_kubectl_applies_the_overlay_in_the_kind_cluster_and_nowhere_else(
        tools: Tools, endpoint: int, capsys: pytest.CaptureFixture[str]) -> None:
    tools.say(("get jobs,deployments,pods", [(0, cluster(inference(0))), (0, cluster(*all_done()))]),
              ("get jobs ", [(0, cluster(*all_done()))]), ("logs", [(0, "the evaluation's table")]))
    assert main(["kind", str(OVERLAY), "--name", "trial", "--port", str(endpoint), "--exit"]) == 0
    steps = ["docker info", "docker image inspect lora-gitops-jobs:0.1.0",
             "docker image inspect lora-gitops-serving:0.1.0", "kind get clusters",
             "kind create cluster --name trial --wait 120s --config -",
             "kind load docker-image --name trial lora-gitops-jobs:0.1.0 lora-gitops-serving:0.1.0",
             f"kubectl --context kind-trial apply --server-side --field-manager=argocd-controller -k {OVERLAY}"]
    assert tools.calls[:len(steps)] == steps
    (kubelet,) = yaml.safe_load(tools.sent("create cluster"))["kubeadmConfigPatches"]
    assert yaml.safe_load(kubelet)["syncFrequency"] == "10s"  # a revert is served within seconds
    assert {c.split()[2] for c in tools.calls if c.startswith("kubectl")} == {"kind-trial"}
    output = capsys.readouterr().out
    assert "the evaluation's table" in output
    assert f"Endpoint     http://127.0.0.1:{endpoint}/v1  (models: hostel-guide, seville-hotels)" in output
    # The path is the one at which the pod of TensorBoard has it.
    for name in DIGESTS:
        assert re.search(r"deployment/tensorboard -- cat /volumes/fine-tuned-model/evaluation/[0-9a-f]{16}/"
                         rf"report\.html > {name}\.html", output)


def test_a_cluster_that_is_there_is_taken_up(tools: Tools, endpoint: int) -> None:
    tools.say(("get clusters", [(0, "other\nlora-gitops")]), ("get jobs", [(0, cluster(*all_done()))]))
    assert main(["kind", str(OVERLAY), "--port", str(endpoint), "--exit"]) == 0
    assert not [c for c in tools.calls if "create cluster" in c]


def test_argo_cd_follows_the_users_repository(tools: Tools) -> None:
    jobs = [i["metadata"]["name"] for i in all_done() if i["kind"] == "Job"]
    tools.say(("get applications.argoproj.io", [(0, cluster()), (0, cluster()),
                                                (0, cluster(application(revision="ab12", jobs=jobs)))]),
              ("get jobs", [(0, cluster(*all_done()))]))
    with serving(*((name, "0" * 16) for name in DIGESTS)) as url:  # the fork has other pipeline files
        assert main(["kind", str(OVERLAY), "--argocd", "--repo", "https://git.example.org/me/fork.git",
                     "--revision", "trial", "--port", url.rpartition(":")[2], "--exit"]) == 0
    applied = list(yaml.safe_load_all(tools.sent("apply -k ")))
    (followed,) = of_kind(applied, "Application")
    assert followed["spec"]["source"] == {"repoURL": "https://git.example.org/me/fork.git", "targetRevision": "trial",
                                          "path": "overlays/kind"}
    assert followed["spec"]["destination"]["namespace"] == "lora-gitops"
    (project,) = of_kind(applied, "AppProject")
    assert project["spec"]["sourceRepos"] == ["https://git.example.org/me/fork.git"]
    (install,) = [c for c in tools.calls if "install.yaml" in c]
    assert kind.ARGOCD_INSTALL in (CHECKOUT / "docs" / "operations.md").read_text()
    assert "--server-side --force-conflicts" in install
    assert f"/{kind.ARGOCD}/" in install
    assert not [c for c in tools.calls if c.startswith("git ") or "git-demo" in c]
    assert not [c for c in tools.calls if f"-k {OVERLAY}" in c]  # Argo CD does it
    assert not [c for c in tools.calls if "delete" in c]


def test_without_a_repository_the_current_commit_is_pushed_into_the_cluster(tools: Tools, endpoint: int) -> None:
    jobs = [i["metadata"]["name"] for i in all_done() if i["kind"] == "Job"]
    before = cluster(application(revision="0" * 40, jobs=jobs))
    tools.say(("get applications.argoproj.io", [(0, before), (0, before), (0, cluster(application(jobs=jobs)))]),
              ("port-forward", [(0, "Forwarding from 127.0.0.1:43210 -> 9418"),
                                (0, "Forwarding from 127.0.0.1:8000 -> 8000")]),
              ("get jobs", [(0, cluster(*all_done()))]))
    assert main(["kind", str(OVERLAY), "--argocd", "--port", str(endpoint), "--exit"]) == 0
    order = ["apply -f -", "install.yaml", "rollout status deployment/git-server", "port-forward --address 127.0.0.1 "
             "service/git-server :9418", "push --force git://127.0.0.1:43210/lora-gitops.git HEAD:refs/heads/main",
             "apply -k", "refresh=normal", "get jobs,deployments,pods"]
    positions = [next(n for n, call in enumerate(tools.calls) if text in call) for text in order]
    assert positions == sorted(positions)
    (followed,) = of_kind(list(yaml.safe_load_all(tools.sent("apply -k "))), "Application")
    assert followed["spec"]["source"] == {"repoURL": kind.GIT_URL, "targetRevision": "main", "path": "overlays/kind"}


def test_another_overlays_environment_ends_before_the_application_forgets_it(tools: Tools, endpoint: int) -> None:
    jobs = [i["metadata"]["name"] for i in all_done() if i["kind"] == "Job"]
    elsewhere = application(jobs=jobs)
    elsewhere["spec"]["destination"]["namespace"] = "lora-gitops-smollm2"
    tools.say(("get applications.argoproj.io", [(0, cluster(elsewhere)), (0, cluster(application(jobs=jobs)))]),
              ("get jobs", [(0, cluster(*all_done()))]))
    assert main(["kind", str(OVERLAY), "--argocd", "--repo", "https://git.example.org/me/fork.git",
                 "--port", str(endpoint), "--exit"]) == 0
    order = ["-n argocd delete applications.argoproj.io lora-gitops", "apply -k"]
    positions = [next(n for n, call in enumerate(tools.calls) if text in call) for text in order]
    assert positions == sorted(positions)


def test_a_port_that_is_taken_is_one_clear_line(tools: Tools, capsys: pytest.CaptureFixture[str]) -> None:
    tools.say(("get jobs", [(0, cluster(*all_done()))]), ("port-forward", [
        (1, "Unable to listen on port 8000: Listeners failed to create\n"
            "error: unable to listen on any of the requested ports: [{8000 8000}]")]))
    assert main(["kind", str(OVERLAY)]) == 2
    assert "error: port 8000 is taken." in capsys.readouterr().err


def test_an_adapter_that_is_never_served_is_not_waited_for_without_end(
        tools: Tools, endpoint: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(kind, "ALIAS_SECONDS", 0.0)
    monkeypatch.setattr(kind, "served_adapters", lambda _: dict.fromkeys(DIGESTS, "0" * 16))  # the ones before
    tools.say(("get jobs", [(0, cluster(*all_done()))]))
    assert main(["kind", str(OVERLAY), "--port", str(endpoint)]) == 1
    assert "not served: " + ", ".join(f"{n}@{d}" for n, d in DIGESTS.items()) in capsys.readouterr().err


def test_an_adapter_that_its_gate_rejected_is_shown_and_not_waited_for(
        tools: Tools, capsys: pytest.CaptureFixture[str]) -> None:
    rejected = f"hostel-guide@{DIGESTS['hostel-guide']} did not pass the gate and is not promoted:"
    tools.say(("logs job/model-evaluation-hostel-guide", [(0, rejected)]), ("logs", [(0, "passed")]),
              ("get jobs", [(0, cluster(*all_done()))]))
    tools.say(("logs job/model-evaluation-seville-hotels", [(1, "error: pods not found")]))  # no reason to give up
    with serving(("seville-hotels", DIGESTS["seville-hotels"])) as url:
        assert main(["kind", str(OVERLAY), "--port", url.rpartition(":")[2], "--exit"]) == 0
    output = capsys.readouterr().out
    assert rejected in output
    assert "(models: seville-hotels)" in output


# --- the demo's git server ------------------------------------------------------------------------------------------


def test_the_git_server_is_restricted_and_runs_in_argo_cds_own_image() -> None:
    documents = json.loads(argocd.git_server("argocd-image:v3"))["items"]
    (namespace,) = of_kind(documents, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for template in pod_templates(documents).values():
        assert restricted_violations({"metadata": {}, "spec": template["spec"]}) == []
        assert {c["image"] for c in [*template["spec"]["initContainers"], *template["spec"]["containers"]]} == {
            "argocd-image:v3"}
    (service,) = of_kind(documents, "Service")
    host, _, repository = kind.GIT_URL.removeprefix("git://").partition("/")
    assert host.startswith(f"{service['metadata']['name']}.{namespace['metadata']['name']}.svc")
    assert service["spec"]["ports"][0]["port"] == kind.GIT_PORT
    (init,) = of_kind(documents, "Deployment")[0]["spec"]["template"]["spec"]["initContainers"]
    assert init["command"][-1] == f"/srv/{repository}"
    assert f"--initial-branch={kind.GIT_BRANCH}" in init["command"]
    assert not [m for m in render(CHECKOUT / "argocd") if m["metadata"].get("namespace") == "git-demo"]


@pytest.mark.skipif(not Path("/usr/lib/git-core/git-daemon").exists(), reason="git has no daemon here")
def test_the_git_servers_commands_take_a_push_and_give_it_back(tmp_path: Path) -> None:
    """The very commands of the manifest, with real git, on another port and folder."""
    (deployment,) = of_kind(json.loads(argocd.git_server("x"))["items"], "Deployment")
    spec = deployment["spec"]["template"]["spec"]
    init, daemon = ([a.replace("/srv", str(tmp_path / "srv")) for a in c[0]["command"]]
                    for c in (spec["initContainers"], spec["containers"]))
    (tmp_path / "srv").mkdir()
    (tmp_path / "work").mkdir()
    environment = {**os.environ, "HOME": str(tmp_path)}
    of_pod = {e["name"]: e["value"] for e in spec["containers"][0]["env"] if e["name"] != "HOME"}

    def git(*argv: str) -> str:
        return subprocess.run(["git", "-C", str(tmp_path / "work"), *argv], check=True, text=True, env=environment,
                              capture_output=True).stdout

    subprocess.run(init, check=True, env=environment, capture_output=True)
    git("init", "--quiet", "origin")
    for message in ("first", "second"):
        git("-C", "origin", "-c", "user.name=n", "-c", "user.email=e",
            "commit", "--quiet", "--allow-empty", "-m", message)
    git("clone", "--quiet", "--depth=1", f"file://{tmp_path}/work/origin", "shallow")  # as many people's clones are
    port = free_port()
    server = subprocess.Popen([*daemon, "--listen=127.0.0.1", f"--port={port}"], env=environment | of_pod)
    url = f"git://127.0.0.1:{port}/{kind.GIT_URL.rpartition('/')[2]}"
    try:
        for _ in range(600):
            with suppress(subprocess.CalledProcessError):  # while the daemon starts
                git("-C", "shallow", "push", "--force", url, "HEAD:refs/heads/main")
                break
            time.sleep(0.1)
        commit = git("-C", "origin", "rev-parse", "HEAD").strip()
        assert git("ls-remote", url).split() == [commit, "HEAD", commit, "refs/heads/main"]
    finally:
        server.terminate()
        server.wait()
