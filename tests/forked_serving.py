"""Runs `python -m serving` in processes that are forked from one that has imported vLLM.

Of the processor time until a tiny model is served, nine tenths are these imports: in the server, in vLLM's engine, and
in the engine's worker. A forked server is the same otherwise: the three are processes of their own, with real vLLM.
What the imports and the start by `spawn` do is seen by the servers that tests do not fork.

    python -m tests.forked_serving    the process to fork from; it reads what to do from its standard input
"""

from __future__ import annotations

import functools
import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

PRELOADED = ["vllm.entrypoints.openai.api_server", "vllm.v1.engine.core", "vllm.v1.executor.multiproc_executor",
             "vllm.v1.worker.cpu_worker", "vllm.v1.worker.cpu_model_runner", "vllm.model_executor.models.llama"]
SERVING = "import sys; from serving.__main__ import main; sys.exit(main(sys.argv[1:]))"


class Process:
    """A running `python -m serving ARGUMENTS`, or another program with vLLM; as far as the tests need it, it is used
    like `subprocess.Popen`. It writes all its output to `log`."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path,
                 program: str = SERVING) -> None:
        log.touch()
        self._code: int | None = None
        self.pid: int = _ask({"program": program, "arguments": [*arguments], "environment": {**environment},
                              "log": str(log)})

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        if self._code is None:
            self._code = _ask({"ended": self.pid})
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it ended; returns its exit code."""
        started = time.monotonic()
        while (code := self.poll()) is None:
            if timeout is not None and time.monotonic() > started + timeout:
                raise subprocess.TimeoutExpired("serving", timeout)
            time.sleep(0.05)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it ended."""
        if self.poll() is None:  # its number is not used again before `poll` saw it end
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


@functools.cache
def _parent() -> subprocess.Popen[str]:
    """The process to fork from. It ends with this one."""
    from serving.__main__ import environment

    return subprocess.Popen([sys.executable, "-m", "tests.forked_serving"], stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, text=True,
                            env={**os.environ, **environment(["--enforce-eager"]), "OMP_NUM_THREADS": "1"})


def _ask(what: dict[str, Any]) -> Any:
    """What the process to fork from replies."""
    parent = _parent()
    assert parent.stdin and parent.stdout
    parent.stdin.write(json.dumps(what) + "\n")
    parent.stdin.flush()
    return json.loads(parent.stdout.readline())


def main() -> None:
    """Import vLLM, then do what the lines of standard input say until it is closed."""
    replies, sys.stdout = sys.stdout, sys.stderr  # what the imports print is no reply
    for name in PRELOADED:
        importlib.import_module(name)
    # vLLM starts the processes of its engine by `spawn` where it has no GPU, whatever its settings say.
    vars(sys.modules["vllm.utils.system_utils"])["multiprocessing"] = SimpleNamespace(
        get_context=lambda _: multiprocessing.get_context("fork"))
    # And it looks at a model's class in another process, so that CUDA is not started in this one.
    vars(sys.modules["vllm.model_executor.models.registry"])["_run_in_subprocess"] = lambda look: look()
    for line in sys.stdin:
        what = json.loads(line)
        if "ended" in what:
            pid, status = os.waitpid(what["ended"], os.WNOHANG)
            reply = os.waitstatus_to_exitcode(status) if pid else None
        else:
            reply = os.fork()
            if not reply:
                _run(**what)
        print(json.dumps(reply), file=replies, flush=True)


def _run(program: str, arguments: list[str], environment: dict[str, str], log: str) -> None:
    """What the forked process does."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(log, os.O_WRONLY), 1)
    os.dup2(1, 2)
    sys.stdout = os.fdopen(1, "w")
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # TMPDIR is another
    sys.argv = ["-c", *arguments]
    code = 1
    try:
        exec(program, {"__name__": "__main__"})
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
