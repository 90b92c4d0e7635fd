"""Promises of the local run: failures are retried as the manifest describes and shown with their last lines, and
nothing is left running. Whole pipelines are in test_end_to_end.py."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.core.errors import UserError
from jobs.tools import local, pods
from tests import build_pipeline


def overlay(folder: Path, program: str, backoff_limit: int = 1, server: str | None = None) -> Path:
    """An overlay with one Job that runs `python -c PROGRAM` and one Deployment that listens, or runs `server`."""
    folder.mkdir()
    build_pipeline.write_yaml(folder / "environment.yaml", build_pipeline.environment())
    listens = "import http.server as h; h.HTTPServer(('127.0.0.1', %s), h.SimpleHTTPRequestHandler).serve_forever()"
    documents = [
        job("the-job", program, backoff_limit),
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "model-inference"}, "spec": {
            "selector": {"matchLabels": {"a": "b"}}, "template": {"metadata": {"labels": {"a": "b"}}, "spec": {
                "containers": [{"name": "main", "image": "x:1", "ports": [{"containerPort": 8000}],
                                "command": ["python", "-c", server or listens % free_port()]}]}}}},
    ]
    (folder / "all.yaml").write_text(yaml.safe_dump_all(documents))
    (folder / "kustomization.yaml").write_text("resources: [all.yaml]\n")
    return folder


def job(name: str, program: str, backoff_limit: int = 1, adapter: str | None = None) -> dict[str, Any]:
    labels = {"labels": {pods.ADAPTER_LABEL: adapter}} if adapter else {}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name, **labels}, "spec": {
        "backoffLimit": backoff_limit,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2]}}]},
        "template": {"spec": {"restartPolicy": "Never", "containers": [
            {"name": "main", "image": "x:1", "command": ["python", "-c", program]}]}}}}


def overlay_of_adapters(folder: Path, programs: dict[str, list[str]]) -> Path:
    """The overlay of these tests with Jobs of adapters in place of its own: NAME-0, NAME-1, … run the programs."""
    overlay(folder, "")
    jobs = []
    for name, of_adapter in programs.items():
        (folder / "adapters" / name).mkdir(parents=True)
        build_pipeline.write_yaml(folder / "adapters" / name / "pipeline.yaml", build_pipeline.pipeline(adapter=name))
        jobs += [job(f"{name}-{n}", program, 0, name) for n, program in enumerate(of_adapter)]
    deployment = list(yaml.safe_load_all((folder / "all.yaml").read_text()))[1]
    (folder / "all.yaml").write_text(yaml.safe_dump_all([*jobs, deployment]))
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    state = folder.parent / "state"
    return subprocess.Popen(
        [sys.executable, "-m", "jobs", "local", str(folder), "--state", str(state), "--port-offset",
         str(free_port() - 8000), *options],
        cwd=pods.CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(folder: Path, *options: str) -> tuple[int, str]:
    process = start(folder, *options)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def started(folder: Path) -> subprocess.Popen[str]:
    """A run whose Job has printed `up`."""
    process = start(folder)
    assert process.stdout
    while "up" not in process.stdout.readline():
        assert process.poll() is None
    return process


def marked(mark: str) -> list[str]:
    """The running processes whose command line holds `mark`."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark in (entry / "cmdline").read_text():
                found.append(entry.name)
        except OSError:
            continue
    return found


def test_exit_code_2_fails_at_once_with_the_pods_last_lines(tmp_path: Path) -> None:
    code, output = run(overlay(tmp_path / "o", "import sys; print('the data is wrong', flush=True); sys.exit(2)", 5))
    assert code == 2
    assert "the-job failed with exit code 2" in output
    assert output.rstrip().endswith("    the data is wrong")
    assert "attempt 2" not in output


def test_another_exit_code_is_retried_up_to_the_backoff_limit(tmp_path: Path) -> None:
    program = f"import sys; open('{tmp_path}/tries', 'a').write('x'); sys.exit(7)"
    code, output = run(overlay(tmp_path / "o", program, 1))
    assert code == 1
    assert (tmp_path / "tries").read_text() == "xx"
    assert "attempt 2 of 2" in output


def test_a_deployment_that_ends_with_0_is_started_again_as_often_as_it_likes(tmp_path: Path) -> None:
    ends = f"open('{tmp_path}/starts', 'a').write('x')"
    waits = f"import os, sys, time\nwhile os.path.getsize('{tmp_path}/starts') < 6: time.sleep(0.1)\nsys.exit(2)"
    (tmp_path / "starts").touch()
    code, _ = run(overlay(tmp_path / "o", waits, server=ends))
    assert code == 2, "the Job ended it, not the Deployment"


def test_a_killed_pod_is_retried(tmp_path: Path) -> None:
    program = (f"import os, sys; seen = os.path.exists('{tmp_path}/seen'); open('{tmp_path}/seen', 'w'); "
               "sys.exit(2) if seen else os.kill(os.getpid(), 9)")
    code, output = run(overlay(tmp_path / "o", program, 1))
    assert "the-job ended with exit code 137" in output
    assert code == 2, "the second attempt ran"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_when_the_runner_ends_however_it_ends_nothing_is_left_running(tmp_path: Path, number: signal.Signals) -> None:
    mark = f"mark-{os.getpid()}-{number}"
    process = started(overlay(tmp_path / "o", f"import time; print('up', flush=True); time.sleep(600)  # {mark}"))
    assert marked(mark)
    process.send_signal(number)
    process.communicate(timeout=30)
    deadline = time.monotonic() + 60
    while marked(mark):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_taken_port_is_named_before_anything_runs(tmp_path: Path) -> None:
    folder = overlay(tmp_path / "o", f"open('{tmp_path}/ran', 'w')")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, output = run(folder, "--port-offset", str(port - 8000))
    assert code == 2
    assert f"port {port}, which model-inference needs, is not available: Address already in use" in output
    assert not (tmp_path / "ran").exists()


def test_two_runners_over_one_state_are_refused(tmp_path: Path) -> None:
    folder = overlay(tmp_path / "o", "import time; print('up', flush=True); time.sleep(600)")
    first = started(folder)
    code, output = run(folder)
    first.terminate()
    first.communicate(timeout=30)
    assert code == 2
    assert "is in use by another `jobs local`" in output


def test_a_program_that_ignores_sigterm_is_killed_after_its_grace_period(tmp_path: Path) -> None:
    mark = f"mark-{os.getpid()}-stubborn"
    folder = overlay(tmp_path / "o", "import signal, time; signal.signal(15, signal.SIG_IGN); "
                                     f"print('up', flush=True); time.sleep(600)  # {mark}")
    file = folder / "all.yaml"
    file.write_text(file.read_text().replace("restartPolicy", "terminationGracePeriodSeconds: 1\n      restartPolicy"))
    process = started(folder)
    process.terminate()
    output, _ = process.communicate(timeout=30)
    assert "the-job did not stop in time: killed" in output
    assert not marked(mark)


def test_kubectl_missing_is_a_clear_error(tmp_path: Path) -> None:
    folder = overlay(tmp_path / "o", "pass")
    done = subprocess.run([sys.executable, "-m", "jobs", "local", str(folder), "--state", str(tmp_path / "state")],
                          cwd=pods.CHECKOUT, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert (done.returncode, shutil.which("kubectl") is not None) == (2, True)
    assert done.stderr.startswith("error: kubectl is not installed")


# --- several adapters -------------------------------------------------------------------------------------------------

WAITS_FOR_EVER = "import time; print('waits', flush=True); time.sleep(600)"


def test_a_failed_job_of_one_adapter_stops_its_others_and_not_another_adapters(tmp_path: Path) -> None:
    fails = "import sys, time; time.sleep(0.5); print('the data is wrong', flush=True); sys.exit(2)"
    works = f"import time; time.sleep(3); open('{tmp_path}/done', 'w')"
    code, output = run(overlay_of_adapters(tmp_path / "o", {"bad": [fails, WAITS_FOR_EVER], "good": [works]}), "--exit")
    assert code == 2
    assert (tmp_path / "done").exists()
    assert "bad-0 failed with exit code 2. The other Jobs of bad are stopped; other adapters continue" in output
    assert output.rstrip().endswith("    the data is wrong")
    assert "Traceback" not in output


def test_every_adapter_that_failed_is_named_at_the_end(tmp_path: Path) -> None:
    code, output = run(overlay_of_adapters(tmp_path / "o", {
        name: [f"import sys; print('{name} is wrong', flush=True); sys.exit({code})", WAITS_FOR_EVER]
        for name, code in (("first", 2), ("second", 7))}), "--exit")
    assert code == 2, "a retry does not help, even if it may help one of them"
    end = output.partition("error: ")[2]
    for name in ("first", "second"):
        assert re.search(rf"{name}-0 failed with exit code \d\. Its last lines .*\n    {name} is wrong", end)


def test_without_exit_a_failed_adapter_ends_the_run_when_the_others_are_done(tmp_path: Path) -> None:
    code, output = run(overlay_of_adapters(tmp_path / "o", {"bad": ["raise SystemExit(2)"], "good": ["pass"]}))
    assert code == 2
    assert "keep answering" not in output


def test_the_jobs_of_the_adapters_that_are_named_run_and_no_others(tmp_path: Path) -> None:
    folder = overlay_of_adapters(tmp_path / "o", {
        name: [f"open('{tmp_path}/{name}', 'w')"] for name in ("first", "second", "third")})
    code, output = run(folder, "--exit", "--adapter", "first", "--adapter", "third")
    assert code == 0, output
    assert [(tmp_path / name).exists() for name in ("first", "second", "third")] == [True, False, True]
    assert "--adapter fourth: " in (line := refused(folder, "--adapter", "fourth"))
    assert line.endswith("has no such adapter; it has first, second, third")


def test_a_broken_file_of_another_team_keeps_nobody_from_running_an_own_adapter(tmp_path: Path) -> None:
    folder = overlay_of_adapters(tmp_path / "o", {"broken": ["print('ran: broken')"], "own": ["print('ran: own')"]})
    (folder / "adapters" / "broken" / "pipeline.yaml").write_bytes(b"adapter: \xff")
    code, output = run(folder, "--exit", "--adapter", "own")
    assert code == 0, output
    assert "ran: own" in output and "ran: broken" not in output
    assert "broken/pipeline.yaml: not UTF-8" in refused(folder)
    assert "broken/pipeline.yaml: not UTF-8" in refused(folder, "--adapter", "own", "--adapter", "broken")


# --- odd overlays and options -----------------------------------------------------------------------------------------


def edited(folder: Path, edit: Callable[[dict[str, Any], dict[str, Any]], object]) -> Path:
    """The overlay of these tests after `edit(job, deployment)`, each the spec of a pod."""
    overlay(folder, "print('ran')")
    documents = list(yaml.safe_load_all((folder / "all.yaml").read_text()))
    edit(*(document["spec"]["template"]["spec"] for document in documents))
    (folder / "all.yaml").write_text(yaml.safe_dump_all(documents))
    return folder


def mount(pod: dict[str, Any], volume: dict[str, Any], **more: str) -> None:
    pod["volumes"] = [{"name": "data", **volume}]
    pod["containers"][0]["volumeMounts"] = [{"name": "data", "mountPath": "/data", **more}]


def refused(folder: Path, *options: str) -> str:
    """The one line with which `jobs local` refuses the overlay or the options."""
    code, output = run(folder, *options)
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert (code, lines) == (2, output.splitlines()[-1:]), output
    assert "Traceback" not in output
    return lines[0]


@pytest.mark.parametrize(("edit", "message"), [
    (lambda job, _: job["containers"][0].pop("command"), "the-job: the container main has no `command`"),
    (lambda job, _: job["containers"][0].update(command=[]), "the-job: the container main has no `command`"),
    (lambda job, _: job["containers"][0].update(volumeMounts=[{"name": "data", "mountPath": "/data"}]),
     "the-job: the container main mounts data, and the pod has no such volume"),
    (lambda job, _: mount(job, {"emptyDir": {}}, subPath="a"), "the-job: the container main has `subPath`"),
    (lambda job, _: job["containers"][0].update(envFrom=[{"secretRef": {"name": "s"}}]),
     "the-job: the container main has `envFrom`"),
    (lambda job, _: job["containers"][0].update(args=5), "the-job: its manifest is not as Kubernetes has it"),
    (lambda job, _: job["containers"][0].pop("name"), "the-job: its manifest lacks `name`"),
    (lambda job, _: mount(job, {"hostPath": {"path": "/"}}),
     "the-job: the volume data is a hostPath, .*persistentVolumeClaim, configMap, secret, emptyDir"),
    (lambda job, _: mount(job, {"secret": {"secretName": "keys"}}),
     "the-job: the volume data is the Secret keys. .* each of its keys to a file in .*/state/secrets/keys"),
    (lambda job, _: mount(job, {"configMap": {"name": "nowhere"}}),
     "the-job: .*ConfigMap nowhere, which the overlay does not make"),
    (lambda job, _: job["containers"][0].update(command=["no-such-program"]),
     "the-job: the container main cannot start no-such-program: No such file or directory"),
    (lambda job, _: job["containers"][0].update(command=["/usr"]),
     "the-job: the container main cannot start /usr: Permission denied"),
    (lambda _, inference: inference["containers"][0].update(readinessProbe={"httpGet": {"path": "/", "port": "http"}}),
     "model-inference: the container main is probed at port http, which is not among its `ports`"),
    (lambda _, inference: inference["containers"][0].update(readinessProbe={"httpGet": {"path": "/", "port": 81}}),
     "model-inference: the container main is probed at port 81, which is not among its `ports`"),
    (lambda job, _: job["containers"][0]["command"].append("a\0b"),
     "the-job: the container main cannot start .*: embedded null byte"),
    (lambda job, _: job["containers"][0].update(command=[None]), "the-job: the container main cannot start None: "),
    (lambda job, _: job["containers"][0].update(env=[{"name": "A=B", "value": "1"}]),
     "the-job: the container main cannot start .*: illegal environment variable name"),
    (lambda job, _: job["containers"][0].update(ports=[{"containerPort": 80.5}]), "the-job: .*port 80.5 is no integer"),
    (lambda job, _: mount(job, {"persistentVolumeClaim": {"claimName": "a" * 300}}), "--state .*: File name too long"),
    (lambda job, _: job.update(volumes=[{"name": "a", "emptyDir": {}}], containers=[job["containers"][0] | {
        "volumeMounts": [{"name": "a", "mountPath": "/a/b"}, {"name": "a", "mountPath": "/a"}]}]),
     "the-job: two volumes are mounted at .*/a, or one above another, which is not supported"),
])
def test_an_overlay_that_cannot_run_is_refused_in_one_line(
        tmp_path: Path, edit: Callable[[dict[str, Any], dict[str, Any]], object], message: str) -> None:
    assert re.search(message, refused(edited(tmp_path / "o", edit)))


@pytest.mark.parametrize(("manifest", "message"), [
    ("{apiVersion: v1, kind: ConfigMap, metadata: {name: x}, data: {a: 5}}", "x: its manifest is not as Kuber"),
    ("{apiVersion: v1, kind: ConfigMap, metadata: {name: x}, data: [a]}", "x: its manifest is not as Kuber"),
    ("{apiVersion: v1, kind: ConfigMap, metadata: {name: x}, data: {a/b: c}}", "--state .*a/b: No such file"),
    ("{apiVersion: v1, kind: ConfigMap, metadata: {name: x}, binaryData: {a: '?'}}", "x: .*binaryData.a is not base64"),
    ("{apiVersion: jobset.x-k8s.io/v1alpha2, kind: JobSet, metadata: {name: x}, spec: {}}",
     "x: its manifest lacks `replicatedJobs`; `kubectl explain JobSet`"),
    ("{apiVersion: jobset.x-k8s.io/v1alpha2, kind: JobSet, metadata: {name: x}}", "x: its manifest lacks `spec`"),
])
def test_an_object_that_the_api_server_would_refuse_is_refused_in_one_line(
        tmp_path: Path, manifest: str, message: str) -> None:
    folder = overlay(tmp_path / "o", "pass")
    (folder / "more.yaml").write_text(manifest)
    (folder / "kustomization.yaml").write_text("resources: [all.yaml, more.yaml]\n")
    assert re.search(message, refused(folder))


def test_a_config_map_of_an_earlier_run_does_not_stand_in_for_one_that_is_gone(tmp_path: Path) -> None:
    pods.write_config_map(tmp_path / "state" / "configmaps" / "gone", {"a": "1"})
    folder = edited(tmp_path / "o", lambda job, _: mount(job, {"configMap": {"name": "gone"}}))
    assert "ConfigMap gone, which the overlay does not make" in refused(folder)


@pytest.mark.parametrize(("offset", "message"), [
    ("60000", r"port 8000 .*--port-offset 60000.* 68000.*from 1 to 65535"),
    ("-8000", r"port 8000 .*--port-offset -8000.* 0.*from 1 to 65535"),
    ("-9000", r"port 8000 .*--port-offset -9000.* -1000.*from 1 to 65535"),
])
def test_a_port_offset_out_of_range_is_refused_in_one_line(tmp_path: Path, offset: str, message: str) -> None:
    assert re.search(message, refused(overlay(tmp_path / "o", "pass"), "--port-offset", offset))


def test_a_state_folder_that_cannot_be_one_is_refused_in_one_line(tmp_path: Path) -> None:
    folder, file = overlay(tmp_path / "o", "pass"), tmp_path / "file"
    file.touch()
    for state in (file, file / "below"):
        assert re.search(f"--state {state}: cannot be used as a folder: (File exists|Not a directory)",
                         refused(folder, "--state", str(state)))
    for name, make in ((".lock", Path.mkdir), ("pods", Path.touch), ("configmaps", Path.touch), ("logs", Path.touch)):
        state = tmp_path / f"state-{name}"
        state.mkdir()
        make(state / name)
        folder = edited(tmp_path / f"o-{name}", lambda job, _: mount(job, {"emptyDir": {}}))
        (folder / "c.yaml").write_text("{apiVersion: v1, kind: ConfigMap, metadata: {name: x}, data: {a: b}}")
        (folder / "kustomization.yaml").write_text("resources: [all.yaml, c.yaml]\n")
        assert re.search(rf"--state {state}: {state}/{name}.*: (Not a directory|Is a directory|File exists)",
                         refused(folder, "--state", str(state)))


@pytest.mark.timeout(20)
def test_a_lock_that_is_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".lock")
    with ExitStack() as stack, ExitStack() as other:
        local.own(tmp_path, stack)
        with pytest.raises(UserError, match="is in use by another `jobs local`"):
            local.own(tmp_path, other)


@pytest.mark.parametrize(("text", "message"), [
    ("commonLabels: {a: b}\nresources: [missing.yaml]\n", r"accumulating resources: .*missing\.yaml"),
    ("bogus: 1\n", 'invalid Kustomization: json: unknown field "bogus"$'),
])
def test_an_overlay_that_does_not_render_is_refused_with_kustomizes_message(
        tmp_path: Path, text: str, message: str) -> None:
    folder = overlay(tmp_path / "o", "pass")
    (folder / "kustomization.yaml").write_text(text)
    assert re.search(f"o: does not render: {message}", refused(folder))


def test_an_overlay_without_inference_runs_its_jobs(tmp_path: Path) -> None:
    folder = overlay(tmp_path / "o", "print('ran')")
    file = folder / "all.yaml"
    file.write_text(file.read_text().partition("---")[0])
    code, output = run(folder, "--exit")
    assert code == 0, output
    assert "the-job | ran" in output
    assert "Endpoint" not in output


def test_asking_an_overlay_without_inference_is_refused_before_anything_runs(tmp_path: Path) -> None:
    folder = overlay(tmp_path / "o", f"open('{tmp_path}/ran', 'w')")
    file = folder / "all.yaml"
    file.write_text(file.read_text().partition("---")[0])
    assert "--ask: this overlay has no Deployment model-inference to ask" in refused(folder, "--ask", "Who?")
    assert not (tmp_path / "ran").exists()
