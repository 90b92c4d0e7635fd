"""The termination message: what `kubectl describe pod` shows of a container that ended."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

TERMINATION_LOG = Path("/dev/termination-log")
TERMINATION_LOG_BYTES = 4096  # Kubernetes keeps no more


def write_termination_message(text: str) -> None:
    """Leave a message where Kubernetes shows it; outside of a pod nothing happens.

    What UTF-8 cannot encode is escaped, and what is beyond the limit is cut off.
    """
    if os.access(TERMINATION_LOG, os.W_OK):
        data = text.encode(errors="backslashreplace")[:TERMINATION_LOG_BYTES]
        with suppress(OSError):  # the log has the same message
            TERMINATION_LOG.write_bytes(data.decode(errors="ignore").encode())  # no half a character at the end
