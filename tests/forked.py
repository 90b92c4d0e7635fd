"""Runs `python -m jobs` in processes that are forked from one that has imported torch and transformers.

Most of a stage's time on a tiny model is the import of these. Such a process is the same otherwise: it has its own
memory, its own exit code, and it can be killed. The workers of a training with several processes are forked from their
launcher; how a launcher and torchrun start them without this, tests/training/test_distributed.py sees too.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import set_forkserver_preload
from pathlib import Path
from typing import IO, NoReturn

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
        """Wait until it ended; returns what it wrote, as the second of two.

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
        """What it wrote until now, on stdout and stderr."""
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


def run(arguments: Sequence[str], before: str = "") -> subprocess.CompletedProcess[str]:
    """Run one to its end, as `subprocess.run` does. All that it wrote is taken for its errors."""
    job = Job(arguments, before=before)
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

    os.chdir(CHECKOUT)
    os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), 1)
    os.dup2(1, 2)
    SubprocessHandler._popen = lambda _, command, variables: Python(command, variables, start_new_session=True)
    os.environ.clear()
    os.environ.update(environment)
    exec(before, {})
    _run_module("jobs", arguments)


class Python:
    """A running `PYTHON -m MODULE ARGUMENTS` that is forked from this process; used like `subprocess.Popen`."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], stdin: int | IO[str] | None = None,
                 stdout: int | IO[str] | None = None, stderr: int | IO[str] | None = None, text: bool = True,
                 start_new_session: bool = False) -> None:
        self.stdin: IO[str] | None = None
        self.stdout: IO[str] | None = None
        self._code: int | None = None
        ends = {number: given.fileno() for number, given in enumerate((stdin, stdout, stderr))
                if given is not None and not isinstance(given, int)}
        if stdin == subprocess.PIPE:
            ends[0], ours = os.pipe()
            self.stdin = os.fdopen(ours, "w")
        if stdout == subprocess.PIPE:
            ours, ends[1] = os.pipe()
            self.stdout = os.fdopen(ours)
        self.pid = os.fork()
        if not self.pid:
            if start_new_session:
                os.setsid()
            for number, end in ends.items():
                os.dup2(end, number)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the handlers of this process
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.environ.clear()
            os.environ.update(env)
            _run_module(command[2], command[3:])
        for number, given in ((0, stdin), (1, stdout)):
            if given == subprocess.PIPE:
                os.close(ends[number])

    def poll(self) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        started = time.monotonic()
        while (code := self.poll()) is None:
            if timeout is not None and time.monotonic() > started + timeout:
                raise subprocess.TimeoutExpired("python", timeout)
            time.sleep(0.02)
        return code

    def terminate(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def _run_module(module: str, arguments: Sequence[str]) -> NoReturn:
    """Do what `python -m MODULE ARGUMENTS` does, and end this process as it ends."""
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    sys.argv = [module, *arguments]
    code: object = 1
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))
