"""The frame of every command line: logging, SIGTERM, and every expected error as one line with its exit code.

Exit codes: 0 done; 1 a retry can help; 2 a user must change something; 130 Ctrl-C; 143 SIGTERM. An unexpected
exception keeps its traceback, and Python ends with 1.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable

from jobs.core.errors import RetryableError, Terminated, UserError, of_volume
from jobs.core.termination import write_termination_message

INTERRUPTED = 130

Relay = Callable[[str, int], bool]


def run_command(work: Callable[[], None], *, set_up_logging: Callable[[], None] | None = None,
                on_sigterm: Callable[..., object] | None = None, relay: Relay | None = None) -> int:
    """Run a command line's work and return its exit code.

    Args:
        work: parses the arguments and runs the command.
        set_up_logging: `log_to_stderr`, unless another function is given.
        on_sigterm: the handler of SIGTERM; `terminate`, unless another one is given. `work` may replace it.
        relay: takes the error message and the exit code, and returns whether another process reports them.
    """
    (set_up_logging or log_to_stderr)()
    # As a container's first process, Python ignores SIGTERM unless it is handled, and is killed a grace period later.
    signal.signal(signal.SIGTERM, on_sigterm or terminate)
    try:
        work()
    except (UserError, RetryableError, Terminated) as error:
        return fail(str(error), error.exit_code, relay)
    except KeyboardInterrupt:
        return fail("interrupted", INTERRUPTED, relay)
    except OSError as error:
        if meaning := of_volume(error):
            return fail(str(meaning), meaning.exit_code, relay)
        raise
    return 0


def log_to_stderr() -> None:
    """Log to stderr, one line a message, without the libraries' chatter."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    for noisy in ("httpx", "httpx2", "fsspec", "filelock", "openai"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # its warnings show URLs, which may hold secrets


def terminate(*_: object) -> None:
    """Signal handler: end now, with everything unfinished left as a draft."""
    raise Terminated("stopped by SIGTERM; the next attempt resumes from what is saved")


def fail(message: str, code: int, relay: Relay | None = None) -> int:
    """Report an error on stderr and where Kubernetes shows it, and return the exit code."""
    # File names and data may hold what UTF-8 cannot encode, such as lone surrogates.
    message = message.encode(errors="backslashreplace").decode()
    if relay and relay(message, code):
        return code
    print(f"error: {message}", file=sys.stderr, flush=True)
    write_termination_message(message)
    return code
