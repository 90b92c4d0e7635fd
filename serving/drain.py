"""Shuts the server down without failing a request: on a signal, or for a restart that the pipeline files need.

On SIGTERM, vLLM itself stops its engine while streams are open. Here, /ready first answers 503, so that clients use
another server; then the port closes; after the last reply, vLLM shuts down and the process exits.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from typing import Any

from serving import events

# How long the server still accepts requests after /ready became 503, if it ends by itself: two failed readiness probes,
# 5 s apart, and 5 s until no proxy sends new requests. (If Kubernetes ends the pod, the preStop pause before SIGTERM
# serves the same purpose.)
LINGER_SECONDS = 15.0

last_reason: str | None = None  # of this process; serving/__main__.py chooses the exit code by it


class Drain:
    """The shutdown of one server; `reason` is None until it begins."""

    def __init__(self, seconds: float) -> None:
        self.reason: str | None = None
        self._seconds = seconds  # for the replies in progress; then they are cut off
        self._server: Any = None

    def attach(self, app: Any) -> None:
        """Replace vLLM's handlers of SIGTERM and SIGINT. Call it on the event loop, before vLLM serves.

        Args:
            app: vLLM's application; its state holds the uvicorn server.
        """
        self._server = app.state.server
        self._server.config.timeout_graceful_shutdown = self._seconds
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, self._signalled, number)

    def begin(self, reason: str, linger: float | None = None) -> None:
        """Answer 503 on /ready, serve for `linger` more seconds, then close the port and exit after the last reply."""
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
            self._server.force_exit = True  # a second Ctrl-C: do not wait
        self.begin(f"stopped by {number.name}", linger=0)

    def _close(self) -> None:
        self._server.should_exit = True  # uvicorn closes the port and waits for the replies in progress
