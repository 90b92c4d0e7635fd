"""Training with several processes: the GPUs of a node, and several nodes.

`python -m jobs train` is one process where there is at most one GPU. Where there are more, it is the launcher: it
starts a worker for each with torchrun's library, and ends as they end. The workers run the same command. `torchrun -m
jobs … train` and KubeFlow's trainer start workers without a launcher.

    NODES              how many nodes train (1)
    NODE_RANK          which of them this is, from 0 (JOB_COMPLETION_INDEX, which Kubernetes sets)
    MASTER_ADDR        the host name of node 0, where the nodes meet; MASTER_PORT (29500)
    PROCESSES_PER_NODE (the number of GPUs, at least 1)

A step takes the same batch whatever the number of processes: see `packing.Share`.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from jobs.core import variables
from jobs.core.errors import RetryableError, Terminated, UserError

log = logging.getLogger("jobs")

ERRORS = "JOBS_WORKER_ERRORS"  # where workers leave their error messages for the launcher, which reports one of them
# How long workers may take to end their step and save after SIGTERM; then they are killed. Just below the pod's grace
# period (base/model-training.yaml: 120 s). When one fails by itself, torchrun gives the others 30 s.
SHUTDOWN_SECONDS = 110
ENDED = {
    -signal.SIGKILL: ": it was killed, perhaps for memory (`kubectl describe pod` shows OOMKilled)",
    -signal.SIGABRT: ": it aborted; NCCL does when another process or node is gone, whose log has the reason",
}


@dataclass(frozen=True)
class Launch:
    """The processes that this node is to start, and where all nodes' meet."""

    nodes: int
    node_rank: int
    processes: int  # on this node
    address: str
    port: int


def is_worker() -> bool:
    """Whether torchrun, or its library, started this process. Without LOCAL_RANK it was not: accelerate would not let
    the processes exchange their gradients."""
    return {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys()


def is_main() -> bool:
    """Whether this process publishes, reports and decides: the only one, or the first of several."""
    return int(os.environ.get("RANK", "0")) == 0


def launch_wanted() -> Launch | None:
    """The launch that the environment describes; None for one process, which needs no launcher.

    Raises:
        UserError: a variable is not what it should be.
    """
    if variables.whole_number("WORLD_SIZE", 1, least=1) > 1:
        raise UserError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but LOCAL_RANK is not set: start the processes "
                        "with `torchrun -m jobs … train`, or set NODES, NODE_RANK and MASTER_ADDR instead")
    nodes = variables.whole_number("NODES", 1, least=1)
    processes = variables.whole_number("PROCESSES_PER_NODE", None, least=1)
    rank = variables.whole_number("NODE_RANK", None)
    if rank is None:
        rank = variables.whole_number("JOB_COMPLETION_INDEX", 0)
    address = os.environ.get("MASTER_ADDR", "")
    if rank >= nodes > 1:
        raise UserError(f"NODE_RANK is {rank}, but NODES is {nodes}: ranks go from 0 to {nodes - 1}")
    if nodes > 1 and not address:
        raise UserError(f"NODES is {nodes}, but MASTER_ADDR is not set: name the host of node 0")
    if processes is None:
        import torch

        processes = max(1, torch.cuda.device_count())
    if nodes * processes == 1:
        return None
    return Launch(nodes, rank, processes, address, variables.whole_number("MASTER_PORT", 29500, least=1))


def launch(wanted: Launch, arguments: Sequence[str], wait_seconds: float) -> None:
    """Start this node's workers, `python -m jobs ARGUMENTS`, and wait until all of them are done.

    Args:
        wait_seconds: how long to wait for the other nodes.
    Raises:
        UserError, Terminated: what a worker ended with.
        RetryableError: a worker failed otherwise, or another node did not come.
    """
    quiet = os.environ.setdefault("LOGLEVEL", "CRITICAL")  # torchrun's library would log the failure again, at length
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if quiet == "CRITICAL":
        del os.environ["LOGLEVEL"]  # not for the workers
    alone = wanted.nodes == 1
    log.info("training with %d processes on %s", wanted.processes,
             "this node" if alone else f"each of {wanted.nodes} nodes; this is node {wanted.node_rank}")
    config = LaunchConfig(
        min_nodes=wanted.nodes, max_nodes=wanted.nodes, nproc_per_node=wanted.processes, run_id="training",
        # Alone, any free port. Otherwise fixed ranks: node 0 is at the address that all nodes were given.
        rdzv_backend="c10d" if alone else "static",
        rdzv_endpoint="localhost:0" if alone else f"{wanted.address}:{wanted.port}",
        rdzv_configs={} if alone else {"rank": wanted.node_rank, "timeout": int(wait_seconds)},
        # No restarts by it: a process alone cannot join the others again. Kubernetes starts them all.
        max_restarts=0, monitor_interval=0.5, shutdown_timeout=SHUTDOWN_SECONDS, logs_specs=DefaultLogsSpecs())
    with tempfile.TemporaryDirectory() as errors:
        os.environ[ERRORS] = errors
        try:
            elastic_launch(config, sys.executable)("-m", "jobs", *arguments)
        except ChildFailedError as failure:
            _raise(failure.failures, Path(errors))
        except SignalException:
            raise Terminated("stopped by SIGTERM; a checkpoint is saved and the next attempt resumes there") from None
        finally:
            del os.environ[ERRORS]


def _raise(failures: dict[int, Any], errors: Path) -> None:
    """Raise what the workers ended with; what a user must change comes before what a retry can help.

    When one fails, torchrun's library stops the others. So a worker that was stopped counts only if all were.
    """
    codes = {rank: failure.exitcode for rank, failure in failures.items()}
    messages = {}
    for file in errors.iterdir():
        code, _, why = file.read_text(encoding="utf-8").partition(" ")
        rank = int(file.name)
        codes[rank], messages[rank] = int(code), why
    if set(codes.values()) == {Terminated.exit_code}:
        raise Terminated(next(iter(messages.values()), "stopped by SIGTERM"))
    stopped = {Terminated.exit_code, -signal.SIGTERM}
    codes = {rank: code for rank, code in codes.items() if code not in stopped} or codes
    for kind in (UserError, RetryableError):
        of_kind = sorted(rank for rank, code in codes.items() if code == kind.exit_code)
        if of_kind:
            message = next((messages[rank] for rank in of_kind if rank in messages), None)
            raise kind(message or f"the training process {of_kind[0]} failed; its messages are above")
    rank, code = min(codes.items())
    raise RetryableError(f"the training process {rank} ended with exit code {code}{ENDED.get(code, '')}")


def say_to_launcher(message: str, code: int) -> bool:
    """In a worker: leave exit code and error message to the launcher. False where there is none."""
    folder = os.environ.get(ERRORS)
    if not folder or not is_worker():
        return False
    (Path(folder) / os.environ["RANK"]).write_text(f"{code} {message}", encoding="utf-8")
    return True


def end(code: int) -> NoReturn:
    """End this process.

    A worker ends without Python's finalization: a thread of gloo that lets go of a tensor at that time aborts the
    process ("terminate called without an active exception", exit code -6), though all its work is done.
    """
    if is_worker():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    gc.freeze()  # or Python would search all that was imported for garbage before it ends: over a second, with torch
    sys.exit(code)


# --- in a worker --------------------------------------------------------------------------------------------------


class Team:
    """The processes of one training, as one of them sees them. With a single process nothing is exchanged."""

    def __init__(self, wait_seconds: float = 0.0) -> None:
        """Meet the others.

        Args:
            wait_seconds: how long the others wait for the main one, which may wait for another job's lock.
        """
        self.rank, self.size = 0, 1
        self._group: Any = None
        if os.environ.get(ERRORS):
            _die_with_launcher()
        if is_worker():
            import torch
            from torch import distributed

            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
            self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
            # Their messages go over the CPU, apart from the gradients and with a timeout of their own.
            self._group = distributed.new_group(backend="gloo", timeout=timedelta(seconds=max(1800.0, wait_seconds)))

    @property
    def main(self) -> bool:
        """Whether this is the process that publishes, saves and reports."""
        return self.rank == 0

    def broadcast(self, value: Any = None) -> Any:
        """The main process's `value`, in every process; what the others pass is ignored."""
        if self._group is None:
            return value
        from torch import distributed

        values = [value]
        distributed.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in at least one of the processes."""
        if self._group is None:
            return flag
        import torch
        from torch import distributed

        flags = torch.tensor([int(flag)])
        distributed.all_reduce(flags, op=distributed.ReduceOp.MAX, group=self._group)
        return bool(flags.item())

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.any(False)

    def leave(self) -> None:
        """End the exchange; the processes go on alone."""
        if self._group is not None:
            from torch import distributed

            distributed.destroy_process_group()


def _die_with_launcher() -> None:
    """Get SIGKILL when the launcher dies, also by SIGKILL, so that no worker keeps running alone (Linux)."""
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
