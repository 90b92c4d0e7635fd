"""Runs `python -m jobs` in processes that are forked from one that has imported torch and transformers.

Most of a stage's time on a tiny model is the import of these. Such a process is the same otherwise: it has its own
memory, its own exit code, and it can be killed.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import set_forkserver_preload
from pathlib import Path

from jobs.tools.pods import CHECKOUT

PRELOADED = ["jobs.__main__", "torch.utils.tensorboard", "transformers.models.auto.modeling_auto",
             "transformers.models.auto.tokenization_auto", "transformers.models.llama.modeling_llama",
             "transformers.generation.utils", "transformers.trainer", "peft", "datasets", "evaluate",
             "rouge_score.rouge_scorer"]


class Job:
    """A running `python -m jobs ARGUMENTS`; as far as the tests need it, it is used like `subprocess.Popen`."""

    def __init__(self, arguments: Sequence[str]) -> None:
        with tempfile.NamedTemporaryFile(prefix="job-", delete=False) as output:
            self._output = Path(output.name)
        self._process = _context().Process(target=_run, args=([*arguments], str(self._output)))
        self._process.start()

    def communicate(self, timeout: float | None = None) -> str:
        """Wait until it ended; returns what it wrote on stderr.

        Raises:
            subprocess.TimeoutExpired: it did not end within `timeout` seconds.
        """
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("jobs", timeout or 0.0)
        text = self._output.read_text(encoding="utf-8") if self._output.exists() else ""
        self._output.unlink(missing_ok=True)
        return text

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        """Send SIGKILL."""
        self._process.kill()


def warm_up() -> None:
    """Do the imports now, so that they count to no job."""
    process = _context().Process(target=int)
    process.start()
    process.join()


def _context() -> ForkServerContext:
    set_forkserver_preload([__name__, *PRELOADED])
    return multiprocessing.get_context("forkserver")


def _run(arguments: list[str], output: str) -> None:
    """What the forked process does."""
    os.chdir(CHECKOUT)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), 2)
    from jobs.__main__ import main

    sys.exit(main(arguments))
