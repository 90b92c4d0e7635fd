"""Ending without hurting a request: when the server is told to stop, or when a restart has to follow the pipeline file.

vLLM's own answer to SIGTERM ends the engine under its streams. Here requests under way are answered first: /ready
says 503, so that new ones go elsewhere; then the port closes; when the last reply is out, vLLM goes down, and the
process ends.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from typing import Any

from serving import events

# How long the server goes on taking requests after /ready became 503 when nobody outside knows that it will end: two
# failed readiness probes, 5 s apart, and 5 s until no proxy sends new ones. (When Kubernetes ends the pod, it is told
# to stop only after the preStop pause, which is there for the same purpose.)
LINGER_SECONDS = 15.0

last_reason: str | None = None  # of this process, for who has to choose an exit code


class Drain:
    """The end of one server; `reason` is None until it begins."""

    def __init__(self, seconds: float) -> None:
        self.reason: str | None = None
        self._seconds = seconds  # for the replies under way; then they are cut off
        self._server: Any = None

    def attach(self, app: Any) -> None:
        """Take SIGTERM and SIGINT over from vLLM. Called on the event loop, when vLLM is about to serve.

        Args:
            app: vLLM's application, in whose state vLLM keeps its uvicorn server.
        """
        self._server = app.state.server
        self._server.config.timeout_graceful_shutdown = self._seconds
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, self._signalled, number)

    def begin(self, reason: str, linger: float | None = None) -> None:
        """Say 503 on /ready, go on serving for `linger` seconds, then take no more and end after the last reply."""
        linger = LINGER_SECONDS if linger is None else linger
        global last_reason
        if self.reason is None:
            self.reason = last_reason = reason
            events.draining(reason)
        if linger:
            asyncio.get_running_loop().call_later(linger, self._close)
        else:
            self._close()

    def _signalled(self, number: signal.Signals) -> None:
        if number == signal.SIGINT and self.reason is not None:
            self._server.force_exit = True  # a second Ctrl-C: somebody does not want to wait
        self.begin(f"stopped by {number.name}", linger=0)

    def _close(self) -> None:
        self._server.should_exit = True  # uvicorn stops listening and waits for the replies under way
