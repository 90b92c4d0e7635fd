"""Detects an engine that hangs. vLLM's own /health notices an engine process that ended, but not one that hangs.

The guard queries the engine at intervals, at no cost. The engine answers between two steps, so a busy engine answers
late, and one that hangs (a stopped process, a kernel or a collective operation that never ends) does not answer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

log = logging.getLogger("serving")

PAUSE_SECONDS = 5.0  # between an answer and the next query
# How long the engine may leave a query unanswered. Its longest step computes --max-num-batched-tokens of prompts: on
# a CPU 2048 by default, 70 s of a 7B model on 8 cores (14 GFLOP a token, 0.4 TFLOP/s); on a GPU 8192, about
# a second. Loading an adapter between two steps takes seconds. vLLM itself aborts a step after 300 s
# (VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS), but not if the process that would abort it hangs.
SECONDS = 120.0


class Heartbeat:
    """Queries one engine; lives on vLLM's event loop."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._sent: float | None = None  # when (monotonic) the unanswered query was sent; None: no query is open
        self._task: asyncio.Task[None] | None = None

    def start(self, engine: Any) -> None:
        """Begin to query the engine.

        Args:
            engine: vLLM's EngineClient.
        """
        if hasattr(engine, "is_paused"):
            self._task = asyncio.get_running_loop().create_task(self._forever(engine))
        else:
            log.warning("this vLLM's engine has no `is_paused`; /health will not notice an engine that hangs")

    async def stop(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    @property
    def hangs(self) -> bool:
        """Whether a query has been unanswered for too long."""
        return self._sent is not None and time.monotonic() - self._sent > self._seconds

    async def _forever(self, engine: Any) -> None:
        while True:
            self._sent = time.monotonic()
            late = asyncio.get_running_loop().call_later(self._seconds, self._report)
            try:
                await engine.is_paused()
            except Exception as error:  # also an answer; vLLM reports a dead engine
                log.debug("the engine answered with %r", error)
            finally:
                late.cancel()
            if self.hangs:
                log.info("vLLM's engine answers again, after %.0f s", time.monotonic() - self._sent)
            self._sent = None
            await asyncio.sleep(PAUSE_SECONDS)

    def _report(self) -> None:
        log.error("vLLM's engine has not answered for %.0f s; /health answers 503 until it does", self._seconds)
