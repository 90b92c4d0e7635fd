"""Whether vLLM's engine still runs. vLLM's own /health notices an engine process that ended, not one that hangs.

The guard keeps asking the engine a question that costs nothing. The engine answers between two steps, so a busy one
answers later, and one that hangs (a stopped process, a kernel or a collective operation that never ends) not at all.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

log = logging.getLogger("serving")

PAUSE_SECONDS = 5.0  # between an answer and the next question
# How long the engine may leave a question unanswered. Its longest step computes --max-num-batched-tokens of prompts: on
# a CPU 2048 by default, which take a model of 7B 70 s on 8 cores (14 GFLOP a token, 0.4 TFLOP/s); on a GPU 8192, about
# a second. Adapters that are loaded between two steps take as long as they are read, seconds. vLLM itself ends a step
# that takes 300 s (VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS), but not when its own process is the one that hangs.
SECONDS = 120.0


class Heartbeat:
    """The questions to one engine; lives on vLLM's event loop."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._asked: float | None = None  # when (monotonic) the question was sent that is not answered yet
        self._task: asyncio.Task[None] | None = None

    def start(self, engine: Any) -> None:
        """Begin to ask.

        Args:
            engine: vLLM's EngineClient.
        """
        if hasattr(engine, "is_paused"):
            self._task = asyncio.get_running_loop().create_task(self._forever(engine))
        else:
            log.warning("this vLLM's engine cannot be asked whether it runs; /health will not notice one that hangs")

    async def stop(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    @property
    def hangs(self) -> bool:
        """Whether the engine has left a question unanswered for too long."""
        return self._asked is not None and time.monotonic() - self._asked > self._seconds

    async def _forever(self, engine: Any) -> None:
        while True:
            self._asked = time.monotonic()
            late = asyncio.get_running_loop().call_later(self._seconds, self._report)
            try:
                await engine.is_paused()
            except Exception as error:  # an answer, too; a dead engine is reported by vLLM
                log.debug("the engine answers %r", error)
            finally:
                late.cancel()
            if self.hangs:
                log.info("vLLM's engine runs again, after %.0f s", time.monotonic() - self._asked)
            self._asked = None
            await asyncio.sleep(PAUSE_SECONDS)

    def _report(self) -> None:
        log.error("vLLM's engine has not answered for %.0f s; /health says 503 until it does", self._seconds)
