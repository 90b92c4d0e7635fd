"""Connections: what a source's errors mean, waiting between attempts, and reading on from a byte.

A library's exception becomes a `UserError` where another attempt cannot help, else `Interrupted`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from jobs.core import variables
from jobs.core.errors import RetryableError, UserError
from jobs.core.retries import Interrupted as Interrupted
from jobs.core.retries import Patience as Patience
from jobs.core.retries import retry_after
from jobs.core.sources import shown as shown

log = logging.getLogger("jobs")
T = TypeVar("T")

# How many connections all files of a fetch share; a large file has many.
CONNECTIONS = variables.whole_number("RELOCATION_CONNECTIONS", 16, least=1)
SILENCE_S = 60.0  # a connection on which nothing arrives for this long is dead
CHUNK = 1 << 20
# Of the buckets' libraries, where there is nothing to sign a request with; a failing metadata server has other names.
NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError")


def mismatch(where: str, pinned_in: str, expected: str, found: str) -> str:
    """The message about content that does not match its pin."""
    again = "write SHA256SUMS again and " if pinned_in == "SHA256SUMS" else ""
    return (f"{where}: {pinned_in} says {expected}, but the content is {found}. Nothing was published. If the content "
            f"was meant to change, {again}run: python -m jobs pin")


def patiently(request: Callable[[], T], what: str, advice: str) -> T:
    """What `request` returns, called again while the source is interrupted. For `advice` see `classify_error`."""
    patience = Patience(what)
    while True:
        try:
            with classified(what, advice):
                return request()
        except Interrupted as interruption:
            patience.wait(interruption)


@dataclass
class Stream:
    """An open source, from byte `start` on. `total` is None where the source does not give it."""

    raw: Any  # a binary file of fsspec's or Python's
    what: str  # for messages, as `advice`
    advice: str
    start: int
    total: int | None  # bytes of the whole source
    end: int | None = None  # where reading ends, before that byte; None: at the end of the source
    # What is the same for all ranges of the same content, a strong ETag for example; None where the source has nothing.
    version: str | None = None
    parts: bool = True  # whether the source gives ranges, as far as this answer shows
    at: int = field(init=False)  # the byte that is read next

    def __post_init__(self) -> None:
        self.at = self.start

    def read(self) -> bytes:
        """The next bytes, at most `CHUNK`; b"" at the end."""
        amount = CHUNK if self.end is None else min(CHUNK, self.end - self.at)
        with classified(self.what, self.advice):
            data = bytes(self.raw.read(amount)) if amount > 0 else b""
        self.at += len(data)
        return data

    def require_end(self) -> None:
        """Raise `Interrupted` unless everything was read."""
        if self.total is not None and self.at < self.total:
            raise Interrupted(f"the connection ended after {self.at} of {self.total} bytes")

    def abort(self) -> None:
        """From another thread: end a `read` that waits, where the source can do that."""
        abort = getattr(self.raw, "abort", None)
        if abort:
            with suppress(Exception):  # it ends by itself just now
                abort()


@contextmanager
def classified(what: str, advice: str) -> Iterator[None]:
    """Turn what the libraries raise for a source into `UserError` (it will not help to try again) or `Interrupted`."""
    try:
        yield
    except (UserError, RetryableError, Interrupted):
        raise
    except Exception as error:
        raise classify_error(error, what, advice) from error


def classify_error(error: Exception, what: str, advice: str) -> Exception:
    """What a library's exception means. `advice` is what to do when the source denies access."""
    library = type(error).__module__.partition(".")[0]
    answer = getattr(error, "response", None)  # huggingface_hub's errors carry one; aiohttp's are like one
    status = getattr(error, "status", None) or getattr(answer, "status_code", None) or getattr(error, "code", None)
    if isinstance(error, FileNotFoundError):
        status = 404
    elif isinstance(error, PermissionError):
        status = 403
    message = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
    if status in (401, 403):
        return UserError(f"{what}: not allowed ({status}). {advice}")
    if type(error).__name__ in NO_CREDENTIALS:
        return UserError(f"{what}: no credentials ({message}). {advice}")
    if status == 404:
        return UserError(f"{what}: not found (404). Is there a typo in the name, the path or the revision?")
    if type(error).__name__ == "ParamValidationError":  # of the client of s3://, before it sends anything
        return UserError(f"{what}: not the name of an object ({' '.join(str(error).split())})")
    if "Certificate" in type(error).__name__ or "CERTIFICATE_VERIFY_FAILED" in message:
        return UserError(f"{what}: the TLS certificate is not trusted ({message}). Set SSL_CERT_FILE (for s3:// "
                         "AWS_CA_BUNDLE) to the authority's")
    if type(error).__name__ in ("InvalidURL", "InvalidUrlClientError", "NonHttpUrlClientError"):
        return UserError(f"{what}: not a URL that can be opened")  # the message would show a signed URL's secrets
    if isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429):
        return UserError(f"{what}: the server rejects the request ({status})")  # likewise
    if isinstance(status, int):
        headers = getattr(error, "headers", None) or getattr(answer, "headers", None) or {}
        return Interrupted(f"the server answers {status}", retry_after(headers))
    if library in ("builtins", "fsspec") and not isinstance(error, OSError):
        return error  # an error in this code, not of the source
    return Interrupted(message)
