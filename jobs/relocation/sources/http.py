"""https:// and http://: one file behind a URL, pinned by its sha256. The hub's files are opened here, too.

The client is urllib3, in the threads of the transfer: it reads a local server as fast as Python's own sockets do, 1.5
to 2.5 GB/s, keeps connections, and speaks to proxies.
"""

from __future__ import annotations

import base64
import re
import string
import threading
from collections.abc import Mapping
from contextlib import suppress
from contextvars import ContextVar
from functools import cache
from typing import Any
from urllib.parse import quote, unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from jobs.core.declarations import Loaded, Source
from jobs.core.errors import UserError
from jobs.relocation.connection import SILENCE_S, Interrupted, Stream, shown
from jobs.relocation.sources.interface import content_sha256, single_file

ADVICE = ("Is it gated or private? Then accept its terms and set HF_TOKEN (or sign the URL). Or is the name misspelt? "
          "Hubs give the same answer for both")
# Numbers of at most 18 digits, because Python makes none of more than 4300.
LENGTH = re.compile(r"[0-9]{1,18}")
CONTENT_RANGE = re.compile(r"bytes (?P<start>[0-9]{1,18})-(?P<end>[0-9]{1,18})/(?P<total>[0-9]{1,18}|\*)")
REDIRECTS = 10  # one after the other, at most
READ = 1 << 18  # bytes at a time; more is not faster
KEPT = 64  # connections to a host, open for the next request
SECRETS = ("authorization", "cookie")  # headers for the host that was named, not for those that it redirects to
PRINTABLE = "".join(sorted(set(string.printable) - set(string.whitespace)))

files = single_file


def find_pin(loaded: Loaded, source: Source) -> str:
    """The sha256 of what the URL gives."""
    return content_sha256(source.source, open_range, ADVICE)


def open_range(url: str, start: int, end: int | None, headers: Mapping[str, str]) -> Stream:
    """One GET request, read as a stream; of a part of the file, if the server answers with exactly that."""
    part_wanted = start > 0 or end is not None
    wanted = {"Range": f"bytes={start}-{'' if end is None else end - 1}"} if part_wanted else {}
    answer = _get(url, {**headers, "Accept-Encoding": "identity", **wanted})
    answered = answer.headers
    if answer.status == 416 and part_wanted:  # there is nothing behind what we have; only a fresh start shows why
        answer.close()
        return open_range(url, 0, None, _whole(headers))
    if answer.status not in (200, 206) or (answer.status == 206 and not part_wanted):
        answer.close()
        raise BadStatus(answer.status, answered)
    encoded = answered.get("Content-Encoding", "identity") != "identity"  # its bytes are not those of the file
    if answer.status == 206:
        part = CONTENT_RANGE.fullmatch(answered.get("Content-Range", ""))
        if encoded or not part or int(part["start"]) != start or not _complete(part, end):
            answer.close()
            return open_range(url, 0, None, _whole(headers))
        total = int(part["total"]) if part["total"] != "*" else None
        return Stream(_Body(answer), shown(url), ADVICE, start, total, end, _version(answered))
    length = "" if encoded else answered.get("Content-Length", "")
    total = int(length) if LENGTH.fullmatch(length) else None
    return Stream(_Body(answer, encoded), shown(url), ADVICE, 0, total, None, None if encoded else _version(answered),
                  parts=not part_wanted and not encoded and answered.get("Accept-Ranges", "").strip() == "bytes")


def _whole(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() != "if-range"}


def _complete(part: re.Match[str], end: int | None) -> bool:
    """Whether a part goes on to where it was requested to end; a server that does not send the total may."""
    after = int(part["end"]) + 1
    if end is not None and after >= end:
        return True
    return after == int(part["total"]) if part["total"] != "*" else end is None


def _version(answered: Mapping[str, str]) -> str | None:
    """The ETag, if it is a strong one: the same for the same bytes."""
    tag = answered.get("ETag", "").strip()
    return tag if tag.startswith('"') else None


class BadStatus(Exception):
    """An answer without the content. `classify_error` reads the attributes."""

    def __init__(self, status: int, headers: Mapping[str, str]) -> None:
        super().__init__(f"status {status}")
        self.status, self.headers = status, headers


class _Body:
    """The body of an answer as a file."""

    def __init__(self, answer: urllib3.BaseHTTPResponse, encoded: bool = False) -> None:
        self.answer: Any = answer
        self.encoded = encoded

    def read(self, amount: int) -> bytes:
        """What has arrived, at most `amount` bytes; waits if there is nothing. b"" at the end."""
        return bytes(self.answer.read1(min(amount, READ), decode_content=self.encoded))

    def close(self) -> None:
        self.answer.close()  # a body that was read to its end has given its connection back

    def abort(self) -> None:
        """From another thread: end a `read` that waits."""
        self.answer.shutdown()


# --- requests --------------------------------------------------------------------------------------------------------


def _get(url: str, headers: Mapping[str, str]) -> urllib3.BaseHTTPResponse:
    """The answer to a GET request, after redirects. Its body is not read yet."""
    headers = dict(headers)
    for hop in range(REDIRECTS + 1):
        problem = _unusable(url)
        if problem and not hop:
            raise UserError(f"{shown(url)}: not a URL that can be opened: {problem}")
        if problem:
            raise Interrupted(f"what the server redirects to is no URL: {problem}")
        parts = urlsplit(url)
        if not hop and not any(name.lower() == "authorization" for name in headers):
            headers |= _login(parts.username, parts.password)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        exact = _exact_target.set(quote(target, safe=PRINTABLE))
        try:
            answer = _pool(_proxy(url)).request("GET", url, headers=headers, preload_content=False, redirect=False,
                                                retries=False)
        finally:
            _exact_target.reset(exact)
        location = answer.headers.get("Location") if answer.status in (301, 302, 303, 307, 308) else None
        if location is None:
            return answer
        _leave(answer)
        try:
            onward = urljoin(url, location)
        except ValueError as error:
            raise Interrupted(f"what the server redirects to is no URL: {error}") from None
        if _origin(url) != _origin(onward):
            headers = {name: value for name, value in headers.items() if name.lower() not in SECRETS}
        url = onward
    raise Interrupted(f"the server redirects more than {REDIRECTS} times")


def _origin(url: str) -> tuple[str, str]:
    """The scheme of a URL, and its host with the port."""
    parts = urlsplit(url)
    return parts.scheme, parts.netloc.rpartition("@")[2]


def _login(user: str | None, password: str | None) -> dict[str, str]:
    """The header for a user and a password that a URL names."""
    if user is None:
        return {}
    text = f"{unquote(user)}:{unquote(password or '')}"
    return {"Authorization": f"Basic {base64.b64encode(text.encode()).decode()}"}


def _leave(answer: urllib3.BaseHTTPResponse) -> None:
    """Be done with an answer whose body does not matter. A short one is read, so that the connection can be kept; with
    a long one, which may never end, the connection is closed."""
    with suppress(urllib3.exceptions.HTTPError, OSError):
        answer.read1(READ, decode_content=False)
    answer.close()


def _unusable(url: str) -> str | None:
    """Why a URL cannot be requested. Quotes nothing of it: what cannot be a port may be a password with a `/`."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return "its host or its port is none; in a password, / ? # @ must be written as %2F %3F %23 %40"
    if parts.scheme not in ("http", "https"):
        return "it must begin with https:// or http://"
    return None if parts.hostname else "it names no host"


def _proxy(url: str) -> str | None:
    """The proxy that HTTPS_PROXY, HTTP_PROXY and NO_PROXY choose for a URL."""
    parts = urlsplit(url)
    proxy = getproxies().get(parts.scheme)
    return None if proxy is None or proxy_bypass(parts.netloc.rpartition("@")[2]) else proxy


_lock = threading.Lock()


def _pool(proxy: str | None) -> urllib3.PoolManager:
    with _lock:
        return _pools(proxy)


@cache
def _pools(proxy: str | None) -> urllib3.PoolManager:
    """The connections of this process, kept for further requests."""
    options: dict[str, Any] = {"maxsize": KEPT, "timeout": urllib3.Timeout(connect=SILENCE_S, read=SILENCE_S)}
    if proxy is None:
        manager = urllib3.PoolManager(**options)
    else:
        proxy = proxy if "://" in proxy else f"http://{proxy}"
        user = urlsplit(proxy).netloc.rpartition("@")[0]
        login = urllib3.make_headers(proxy_basic_auth=user) if user else None
        manager = urllib3.ProxyManager(proxy, proxy_headers=login, **options)
    manager.pool_classes_by_scheme = {"http": _ExactPool, "https": _ExactSecurePool}
    return manager


# The path and query of the request, as it was given. urllib3 would rewrite %2f to %2F, and a signed URL, ours or one
# that we are sent on to, may be valid only exactly as written.
_exact_target: ContextVar[str] = ContextVar("_exact_target")


def _exact(target: str) -> str:
    if target.startswith("/"):
        return _exact_target.get()
    parts = urlsplit(target)  # a proxy gets a whole URL
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{_exact_target.get()}"


class _ExactConnection(HTTPConnection):
    def putrequest(self, method: str, url: str, *args: Any, **kwargs: Any) -> None:
        super().putrequest(method, _exact(url), *args, **kwargs)


class _ExactSecureConnection(HTTPSConnection):
    def putrequest(self, method: str, url: str, *args: Any, **kwargs: Any) -> None:
        super().putrequest(method, _exact(url), *args, **kwargs)


class _ExactPool(HTTPConnectionPool):
    ConnectionCls = _ExactConnection


class _ExactSecurePool(HTTPSConnectionPool):
    ConnectionCls = _ExactSecureConnection
