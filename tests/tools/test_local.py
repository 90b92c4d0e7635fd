"""Promises of the local run: failures are retried as the manifest says, shown with their last lines, and nothing is
left running. Whole pipelines are in test_end_to_end.py."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from jobs.tools import pods
from tests import build_pipeline


def overlay(folder: Path, program: str, backoff_limit: int = 1, server: str | None = None) -> Path:
    """An overlay with one Job that runs `python -c PROGRAM` and one Deployment that listens, or runs `server`."""
    folder.mkdir()
    build_pipeline.write(folder)
    listens = "import http.server as h; h.HTTPServer(('127.0.0.1', %s), h.SimpleHTTPRequestHandler).serve_forever()"
    documents = [
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "the-job"}, "spec": {
            "backoffLimit": backoff_limit,
            "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2]}}]},
            "template": {"spec": {"restartPolicy": "Never", "containers": [
                {"name": "main", "image": "x:1", "command": ["python", "-c", program]}]}}}},
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "model-inference"}, "spec": {
            "selector": {"matchLabels": {"a": "b"}}, "template": {"metadata": {"labels": {"a": "b"}}, "spec": {
                "containers": [{"name": "main", "image": "x:1", "ports": [{"containerPort": 8000}],
                                "command": ["python", "-c", server or listens % free_port()]}]}}}},
    ]
    (folder / "all.yaml").write_text(yaml.safe_dump_all(documents))
    (folder / "kustomization.yaml").write_text("resources: [all.yaml]\n")
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
    process = start(overlay(tmp_path / "o", f"import time; print('up', flush=True); time.sleep(600)  # {mark}"))
    assert process.stdout
    while "up" not in process.stdout.readline():
        assert process.poll() is None
    assert marked(mark)
    process.send_signal(number)
    process.communicate(timeout=30)
    deadline = time.monotonic() + 10
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
    assert f"port {port}, which model-inference needs, is taken" in output
    assert not (tmp_path / "ran").exists()


def test_two_runners_over_one_state_are_refused(tmp_path: Path) -> None:
    folder = overlay(tmp_path / "o", "import time; print('up', flush=True); time.sleep(600)")
    first = start(folder)
    assert first.stdout
    while "up" not in first.stdout.readline():
        assert first.poll() is None
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
    process = start(folder)
    assert process.stdout
    while "up" not in process.stdout.readline():
        assert process.poll() is None
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
