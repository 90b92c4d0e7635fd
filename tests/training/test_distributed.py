"""Promises of training with several processes: the same result as with one, and one exit code and one message.

Real processes, on CPUs (gloo). On GPUs the same code talks by NCCL.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from jobs.core import artifacts, pipeline
from jobs.core.errors import RetryableError, Terminated, UserError
from jobs.core.plan import plan
from jobs.tools.pods import CHECKOUT
from jobs.training import callbacks, distributed
from tests import build_models, forked

RECORDS = [{"prompt": f"How many rooms has house {n}?", "completion": f"It has {n} rooms. " * (1 + n % 3)}
           for n in range(40)]
TRAINING: dict[str, Any] = {"epochs": 4, "learning_rate": 1e-3, "checkpoint_steps": 10,
                            "lora": {"r": 4, "dropout": 0.1}}


# --- who is started -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("environment", "expected"), [
    ({"PROCESSES_PER_NODE": "1"}, None),
    ({"PROCESSES_PER_NODE": "4"}, (1, 0, 4, "", 29500)),
    ({"PROCESSES_PER_NODE": "8", "NODES": "2", "JOB_COMPLETION_INDEX": "1", "MASTER_ADDR": "a"}, (2, 1, 8, "a", 29500)),
    ({"PROCESSES_PER_NODE": "1", "NODES": "2", "NODE_RANK": "0", "JOB_COMPLETION_INDEX": "1", "MASTER_ADDR": "a",
      "MASTER_PORT": "1234"}, (2, 0, 1, "a", 1234)),
    ({}, None),  # no GPU here
])
def test_the_environment_says_how_many_processes(environment: dict[str, str], expected: tuple[Any, ...] | None,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NODES", "NODE_RANK", "JOB_COMPLETION_INDEX", "MASTER_ADDR", "MASTER_PORT", "PROCESSES_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert distributed.launch_wanted() == (None if expected is None else distributed.Launch(*expected))


@pytest.mark.parametrize(("environment", "message"), [
    ({"NODES": "two"}, "NODES is 'two', but must be a whole number of at least 1"),
    ({"PROCESSES_PER_NODE": "0"}, "PROCESSES_PER_NODE is '0', but must be a whole number of at least 1"),
    ({"NODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"}, "NODE_RANK is 2, but NODES is 2: ranks go from 0 to 1"),
    ({"NODES": "2"}, "NODES is 2, but MASTER_ADDR is not set"),
    # As some operators start processes: accelerate would let each of them train alone, on its share of the batches.
    ({"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but LOCAL_RANK is not set: start the processes with"),
])
def test_an_environment_that_cannot_work_is_refused_by_name(environment: dict[str, str], message: str,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        distributed.launch_wanted()


# --- how it ends ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("codes", "messages", "kind", "message"), [
    # torchrun stops the others when one fails: what they end with then is not the reason.
    ({0: 143, 1: 1}, {0: "143 stopped by SIGTERM"}, RetryableError, "the training process 1 failed"),
    ({0: 143, 1: -9}, {0: "143 stopped by SIGTERM"}, RetryableError, "process 1 ended with exit code -9: it was"),
    ({0: -15, 1: -6}, {}, RetryableError, "process 1 ended with exit code -6: it aborted; NCCL does"),
    ({0: 143, 1: 2}, {0: "143 stopped", 1: "2 lower max_length"}, UserError, "lower max_length"),
    ({0: 1, 1: 2}, {0: "1 the other one is gone", 1: "2 lower max_length"}, UserError, "lower max_length"),
    ({1: 1}, {0: "2 the disk is full"}, UserError, "the disk is full"),  # torchrun did not see it end
    ({0: 143, 1: 143}, {0: "143 stopped at step 7", 1: "143 stopped at step 7"}, Terminated, "stopped at step 7"),
])
def test_what_all_processes_end_with_becomes_one_reason(
        codes: dict[int, int], messages: dict[int, str], kind: type[BaseException], message: str,
        tmp_path: Path) -> None:
    for rank, text in messages.items():
        (tmp_path / str(rank)).write_text(text)
    with pytest.raises(kind, match=message):
        distributed._raise({rank: SimpleNamespace(exitcode=code) for rank, code in codes.items()}, tmp_path)


@pytest.mark.parametrize(("overlay", "code"), [("kind", 0), ("missing", 2)])
def test_a_worker_that_is_done_cannot_fail_while_python_ends(overlay: str, code: int) -> None:
    """Rarely, a thread of gloo aborts the process then: an adapter that is published would count as a failed Job.
    What it printed before is not lost."""
    program = ("import atexit, os, runpy; atexit.register(os.abort); print('printed'); "
               "runpy.run_module('jobs', run_name='__main__')")
    worker = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "PYTHONUNBUFFERED": ""}
    done = subprocess.run([sys.executable, "-c", program, "check", f"overlays/{overlay}"], cwd=CHECKOUT,
                          env=os.environ | worker, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (code, "printed\n"), done.stderr
    assert f"overlays/{overlay}" in done.stderr


# --- real processes -------------------------------------------------------------------------------------------------


def published_inputs(place: Path, **training: Any) -> tuple[Path, Path]:
    loaded, volumes = build_models.published_pipeline(place, without=["adapter", "reference_model"], records=RECORDS,
                                                      **(TRAINING | training))
    return loaded.path, volumes


def other_volumes(place: Path, volumes: Path) -> Path:
    """Volumes with the same inputs and no adapter."""
    place.mkdir()
    for volume in volumes.iterdir():
        if volume.name != "fine-tuned-model":
            (place / volume.name).symlink_to(volume)
    return place


COMMAND = (sys.executable, "-m", "jobs")


def start(file: Path, volumes: Path, *launcher: str, before: str = "",
          **environment: str) -> subprocess.Popen[str] | forked.Job:
    """The training, with the processes that `environment` asks for: forked, or started by a command such as COMMAND."""
    arguments = ["--pipeline", str(file), "--volumes", str(volumes), "--wait-seconds", "1", "train"]
    if not launcher:
        return forked.Job(arguments, environment, before)
    return subprocess.Popen([*launcher, *arguments], cwd=CHECKOUT, text=True, stderr=subprocess.PIPE,
                            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)


def trained(file: Path, volumes: Path, *launcher: str, **options: str) -> tuple[dict[str, Any], list[Any], str]:
    """Train to the end: the adapter's weights, its loss history, and its log."""
    process = start(file, volumes, *launcher, **options)
    _, output = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return *result(file, volumes), output


def result(file: Path, volumes: Path) -> tuple[dict[str, Any], list[Any]]:
    from safetensors.numpy import load_file

    adapter = artifacts.find(plan(pipeline.load(file).pipeline).adapter, volumes)
    assert adapter is not None
    return (load_file(adapter.path / "adapter_model.safetensors"),
            json.loads((adapter.path / "training.json").read_text())["history"])


def assert_the_same(found: tuple[dict[str, Any], list[Any]], expected: tuple[dict[str, Any], list[Any]]) -> None:
    """Weights and losses to 1e-5: the order of additions differs, and nothing else."""
    import numpy

    assert found[0].keys() == expected[0].keys()
    for name, weights in expected[0].items():
        assert numpy.abs(found[0][name] - weights).max() < 1e-5, name
    assert [entry.keys() for entry in found[1]] == [entry.keys() for entry in expected[1]]
    for one, other in zip(found[1], expected[1], strict=True):
        assert one == pytest.approx(other, abs=1e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any], list[Any]]:
    """A pipeline, its volumes, and what one process makes of it."""
    file, volumes = published_inputs(tmp_path_factory.mktemp("alone"))
    weights, history, _ = trained(file, volumes, PROCESSES_PER_NODE="1")
    assert len(history) > 40
    return file, volumes, weights, history


@pytest.mark.slow
def test_two_processes_give_what_one_gives_and_say_it_once(
        tmp_path: Path, alone: tuple[Path, Path, dict[str, Any], list[Any]]) -> None:
    file, volumes, *expected = alone
    weights, history, output = trained(file, other_volumes(tmp_path / "v", volumes), *COMMAND, PROCESSES_PER_NODE="2")
    assert_the_same((weights, history), tuple(expected))  # type: ignore[arg-type]
    assert output.count("published adapter/") == output.count("loading model and data") == 1
    assert "training with 2 processes on this node" in output


@pytest.mark.slow
def test_two_processes_that_compute_little_at_once_give_what_one_gives(
        tmp_path: Path, alone: tuple[Path, Path, dict[str, Any], list[Any]]) -> None:
    file, volumes, *expected = alone
    divided = with_keys(file, tmp_path, "tokens_per_micro_batch: 40")
    weights, history, output = trained(divided, other_volumes(tmp_path / "v", volumes), PROCESSES_PER_NODE="2")
    assert "in micro-batches of 40 tokens" in output
    assert_the_same((weights, history), tuple(expected))  # type: ignore[arg-type]


@pytest.mark.slow
def test_two_processes_prefer_what_one_prefers(tmp_path: Path) -> None:
    """Also where one of them has nothing to compute: a batch holds three preferences at most."""
    records = [{"prompt": f"Which is house {n}?", "chosen": f"House {n}.", "rejected": "No idea."} for n in range(12)]
    loaded, volumes = build_models.published_pipeline(
        tmp_path / "one", without=["adapter", "reference_model"], records=records, objective="dpo",
        **(TRAINING))
    *expected, _ = trained(loaded.path, volumes, PROCESSES_PER_NODE="1")
    *found, _ = trained(loaded.path, other_volumes(tmp_path / "v", volumes), PROCESSES_PER_NODE="2")
    assert_the_same(tuple(found), tuple(expected))  # type: ignore[arg-type]


@pytest.mark.slow
def test_two_nodes_meet_and_give_what_one_process_gives(
        tmp_path: Path, alone: tuple[Path, Path, dict[str, Any], list[Any]]) -> None:
    """As JobSet starts them: each node with its rank, and the address of the first."""
    file, volumes, *expected = alone
    shared = other_volumes(tmp_path / "v", volumes)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    nodes = [start(file, shared, NODES="2", JOB_COMPLETION_INDEX=str(rank), PROCESSES_PER_NODE="1",
                   MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for rank in (0, 1)]
    for node in nodes:
        _, output = node.communicate(timeout=240)
        assert node.returncode == 0, output
    assert_the_same(result(file, shared), tuple(expected))  # type: ignore[arg-type]


@pytest.mark.slow
def test_told_to_stop_all_save_one_checkpoint_and_the_next_attempt_goes_on_there(
        tmp_path: Path, alone: tuple[Path, Path, dict[str, Any], list[Any]]) -> None:
    """SIGTERM to the launcher, as Kubernetes sends it. The next attempt may even have another number of processes."""
    file, volumes, *expected = alone
    own = other_volumes(tmp_path / "v", volumes)
    process = start(file, own, PROCESSES_PER_NODE="2")
    wait_for_checkpoint(own, process)
    process.send_signal(signal.SIGTERM)
    _, output = process.communicate(timeout=120)
    assert process.returncode == 143, output
    assert output.count("error: ") == 1
    assert "a checkpoint is saved" in output
    assert "Traceback" not in output
    weights, history, output = trained(file, own, PROCESSES_PER_NODE="1")
    assert "resuming from the checkpoint at step" in output
    assert_the_same((weights, history), tuple(expected))  # type: ignore[arg-type]


def wait_for_checkpoint(volumes: Path, process: subprocess.Popen[str] | forked.Job) -> None:
    deadline = time.monotonic() + 120
    while not list(volumes.glob(f"fine-tuned-model/checkpoints/*/checkpoint-*/{callbacks.CHECKPOINT_MARKER}")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
def test_when_the_launcher_is_killed_no_process_is_left_behind(
        tmp_path: Path, alone: tuple[Path, Path, dict[str, Any], list[Any]]) -> None:
    file, volumes, *_ = alone
    own = other_volumes(tmp_path / "v", volumes)
    process = start(file, own, PROCESSES_PER_NODE="2")
    wait_for_checkpoint(own, process)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 30
    while left := [each for each in workers if runs(each)]:
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.05)


@pytest.mark.slow
def test_what_somebody_must_change_is_said_once_and_is_no_reason_to_retry(tmp_path: Path) -> None:
    file, volumes = published_inputs(tmp_path, max_length=4096, tokens_per_batch=4096)
    process = start(file, volumes, PROCESSES_PER_NODE="2")
    _, output = process.communicate(timeout=120)
    assert process.returncode == 2, output
    assert output.count("max_length is 4096, but the base model knows only") == 1
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.parametrize("when", ["while loading", "after a checkpoint"])
def test_a_killed_process_ends_all_and_is_worth_a_retry(
        when: str, tmp_path: Path, alone: tuple[Path, Path, dict[str, Any], list[Any]]) -> None:
    """Never 143, as which the others end that torchrun stops then: Kubernetes would retry it without end."""
    file, volumes, *_ = alone
    own = other_volumes(tmp_path / "v", volumes)
    process = start(file, own, PROCESSES_PER_NODE="2")
    if when == "while loading":
        assert isinstance(process, forked.Job)
        while "loading model and data" not in process.written():
            assert process.poll() is None
            time.sleep(0.01)
    else:
        wait_for_checkpoint(own, process)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout
    os.kill(int(workers.split()[-1]), signal.SIGKILL)
    _, output = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert output.count("error: ") == 1


@pytest.mark.slow
def test_workers_that_torchrun_started_train_as_ours_do(
        tmp_path: Path, alone: tuple[Path, Path, dict[str, Any], list[Any]]) -> None:
    """`torchrun -m jobs … train`, which is what KubeFlow's trainer runs."""
    file, volumes, *expected = alone
    weights, history, _ = trained(file, other_volumes(tmp_path / "v", volumes), sys.executable, "-m",
                                  "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "jobs")
    assert_the_same((weights, history), tuple(expected))  # type: ignore[arg-type]


def with_keys(file: Path, folder: Path, *keys: str) -> Path:
    """A copy of the pipeline file and its environment, with more keys of `training`."""
    shutil.copy(file.with_name("environment.yaml"), folder)
    copy = folder / "pipeline.yaml"
    copy.write_text(file.read_text().replace("training:\n", "\n  ".join(["training:", *keys]) + "\n"))
    return copy


@pytest.mark.slow
def test_a_model_divided_among_processes_gives_what_one_process_gives(
        tmp_path: Path, alone: tuple[Path, Path, dict[str, Any], list[Any]]) -> None:
    """`sharding: fsdp` in small micro-batches, of which some processes have fewer than others; stopped and resumed.
    With accelerate set to take CPUs: tests/sharding_on_cpus.py."""
    file, volumes, *expected = alone
    sharded = with_keys(file, tmp_path, "sharding: fsdp", "tokens_per_micro_batch: 40")
    assert plan(pipeline.load(sharded).pipeline).adapter == plan(pipeline.load(file).pipeline).adapter
    own = other_volumes(tmp_path / "v", volumes)
    options = {"before": "import tests.sharding_on_cpus", "PROCESSES_PER_NODE": "2"}
    process = start(sharded, own, **options)
    wait_for_checkpoint(own, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    weights, history, output = trained(sharded, own, **options)
    assert "resuming from the checkpoint at step" in output
    assert_the_same((weights, history), tuple(expected))  # type: ignore[arg-type]


@pytest.mark.slow
def test_dividing_a_model_among_cpus_is_refused_and_not_ignored(
        tmp_path: Path, alone: tuple[Path, Path, dict[str, Any], list[Any]]) -> None:
    file, volumes, *_ = alone
    sharded = with_keys(file, tmp_path, "sharding: fsdp")
    process = start(sharded, other_volumes(tmp_path / "v", volumes), PROCESSES_PER_NODE="2")
    _, output = process.communicate(timeout=120)
    assert process.returncode == 2, output
    assert output.count("error: training.sharding: fsdp needs GPUs") == 1
