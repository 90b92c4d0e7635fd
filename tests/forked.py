"""Runs `python -m jobs` in processes that are forked from one that has imported torch and transformers.

Most of a stage's time on a tiny model is the import of these. Such a process is the same otherwise: it has its own
memory, its own exit code, and it can be killed. The workers of a training with several processes are forked from their
launcher; how a launcher and torchrun start them without this, tests/training/test_distributed.py sees too.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import set_forkserver_preload
from pathlib import Path

from jobs.tools.pods import CHECKOUT

PRELOADED = ["jobs.__main__", "torch.utils.tensorboard", "transformers.models.auto.modeling_auto",
             "transformers.models.auto.tokenization_auto", "transformers.models.llama.modeling_llama",
             "transformers.generation.utils", "transformers.trainer", "peft", "datasets", "evaluate",
             "rouge_score.rouge_scorer", "torch.distributed.launcher.api"]


class Job:
    """A running `python -m jobs ARGUMENTS`; as far as the tests need it, it is used like `subprocess.Popen`."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str] | None = None,
                 before: str = "") -> None:
        """`before`: statements that run in the process first."""
        with tempfile.NamedTemporaryFile(prefix="job-", delete=False) as output:
            self._output = Path(output.name)
        self._process = _context().Process(
            target=_run, args=([*arguments], {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
                               str(self._output), before))
        self._process.start()
        assert self._process.pid
        self.pid = self._process.pid

    def communicate(self, timeout: float | None = None) -> tuple[None, str]:
        """Wait until it ended; returns what it wrote on stderr, as the second of two.

        Raises:
            subprocess.TimeoutExpired: it did not end within `timeout` seconds.
        """
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("jobs", timeout or 0.0)
        text = self.written()
        self._output.unlink(missing_ok=True)
        return None, text

    def written(self) -> str:
        """What it wrote on stderr until now."""
        return self._output.read_text(encoding="utf-8") if self._output.exists() else ""

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self._process.kill()


def run(arguments: Sequence[str], environment: Mapping[str, str] | None = None, before: str = "",
        ) -> subprocess.CompletedProcess[str]:
    """Run one to its end, as `subprocess.run` does."""
    job = Job(arguments, environment, before)
    _, output = job.communicate()
    return subprocess.CompletedProcess([*arguments], job.returncode or 0, None, output)


def warm_up() -> None:
    """Do the imports now, so that they count to no job."""
    process = _context().Process(target=int)
    process.start()
    process.join()


def _context() -> ForkServerContext:
    set_forkserver_preload([__name__, *PRELOADED])
    return multiprocessing.get_context("forkserver")


def _run(arguments: list[str], environment: dict[str, str], output: str, before: str) -> None:
    """What the forked process does."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    from jobs.__main__ import main
    from jobs.training import distributed

    os.chdir(CHECKOUT)
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), 2)
    SubprocessHandler._popen = lambda _, command, variables: _Worker(command, variables)
    exec(before, {})
    distributed.end(main(arguments))


class _Worker:
    """What torchrun starts as `PYTHON -m jobs ARGUMENTS`, forked from its launcher; used like `subprocess.Popen`."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._code: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        from jobs.__main__ import main
        from jobs.training import distributed

        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the launcher's handlers
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(environment)
        try:
            distributed.end(main([*command[3:]]))
        finally:
            os._exit(1)  # an exception must not go on in the launcher's code

    def poll(self) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("worker", timeout)
            time.sleep(0.02)
        return code
