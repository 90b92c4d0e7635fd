"""Downloads: bring files into a folder, each verified against its digest, however bad the network is.

A file is written as `NAME.partial` and gets its name only once its digest is the expected one, so a kill at any moment
leaves bytes that the next run continues from, and never a wrong file. Every URL goes through fsspec, the hub's too:
hf_hub_download (2.4) throws away what it has when its process dies, and a 16 GB model deserves better.
"""

from __future__ import annotations

import email.utils
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from jobs.core.errors import RetryableError, UserError
from jobs.core.files import human_bytes, require_space, sha256_of
from jobs.core.progress import Progress

log = logging.getLogger("jobs")
T = TypeVar("T")

# Ten attempts in a row without a single new byte take about four minutes; then Kubernetes starts the pod again.
ATTEMPTS = int(os.environ.get("RETRY_ATTEMPTS", 10))
FIRST_PAUSE_S = float(os.environ.get("RETRY_FIRST_PAUSE_SECONDS", 1))  # doubles with every attempt, up to:
LONGEST_PAUSE_S = 60.0
LONGEST_RETRY_AFTER_S = 3600.0  # a server that asks for more is not worth holding a pod for
SILENCE_S = 60.0  # a connection on which nothing arrives for this long is dead
CHUNK = 1 << 20
PARTIAL = ".partial"
PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}  # what fsspec needs for a scheme beyond its own parts


@dataclass(frozen=True)
class Item:
    """One file that a source holds: where its bytes are, and the digest they must have."""

    name: str  # its path below the folder that it is fetched into
    url: str  # an URL, or a path on this machine
    size: int | None = None  # bytes
    sha256: str | None = None
    git_sha1: str | None = None  # what git calls the file's content: the hub's digest for files outside LFS
    pinned_in: str = "pipeline.yaml"  # who says the digest, for messages
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)  # may carry a token


def shown(url: str) -> str:
    """A URL as it may stand in a log: without user, password and query, which carry secrets in signed URLs."""
    scheme, separator, rest = url.partition("?")[0].partition("://")
    if not separator:
        return url  # a path, or hf://, which carries none
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def url_sha256(url: str) -> str:
    """The sha256 of what a URL gives, read once and kept nowhere: the pin of a URL.

    Raises:
        UserError, RetryableError: as `fetch`.
    """
    def read() -> str:
        digest = hashlib.sha256()
        with _open(url, 0, {}) as stream:
            while chunk := stream.read():
                digest.update(chunk)
        return digest.hexdigest()

    return patiently(read, shown(url))


def mismatch(where: str, pinned_in: str, expected: str, found: str) -> str:
    return (f"{where}: {pinned_in} says {expected}, but the content is {found}. Nothing was published. If the content "
            "was meant to change, run: python -m jobs pin")


def fetch(items: Iterable[Item], folder: Path) -> None:
    """Bring `items` into `folder`, continuing what an earlier run left there, and verify each.

    Raises:
        UserError: a digest is not the expected one (both are named), the source refuses, or the volume is too small.
        RetryableError: the source does not recover.
        OSError: the disk refuses, e.g. it is full.
    """
    todo = [item for item in items if not _there(item, folder / item.name)]
    here = sum(_size(_partial(folder / item.name)) for item in todo)
    known = [item.size for item in todo if item.size is not None]
    require_space(folder, max(0, sum(known) - here))
    progress = Progress("fetched", sum(known) if len(known) == len(todo) else None, human_bytes)
    for item in todo:
        _fetch(item, folder / item.name, progress)
    progress.finish()


def remove_others(folder: Path, items: Iterable[Item]) -> None:
    """Remove what does not belong in `folder`: leftovers of an interrupted run, or of another version of this code."""
    names = {name for item in items for name in (item.name, item.name + PARTIAL)}
    for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder comes before the folder
        if path.is_dir() and not path.is_symlink():
            with suppress(OSError):  # not empty: it holds an item
                path.rmdir()
        elif path.relative_to(folder).as_posix() not in names:
            path.unlink()


def _partial(file: Path) -> Path:
    return file.with_name(file.name + PARTIAL)


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _there(item: Item, file: Path) -> bool:
    """Whether an earlier run already brought the file. Its bytes are read again, since a power cut can lose them."""
    if not file.exists():
        return False
    if _wrong(item, file) is None:
        return True
    file.unlink()
    return False


def _wrong(item: Item, file: Path) -> str | None:
    """Why the file is not the item, naming both digests; None when it is."""
    if item.sha256:
        expected, found = item.sha256, sha256_of(file)
    elif item.git_sha1:
        content = file.read_bytes()  # small: the hub keeps large files in LFS
        expected, found = item.git_sha1, hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # noqa: S324
    else:
        expected, found = f"{item.size} bytes", f"{_size(file)} bytes"
        if item.size is None:
            return None
    return None if found == expected else mismatch(shown(item.url), item.pinned_in, expected, found)


def _fetch(item: Item, file: Path, progress: Progress) -> None:
    """Download, verify and name one file. What was put together from pieces gets a second chance from the start: the
    content behind the URL may have changed between the pieces, or a power cut may have torn the partial file."""
    partial = _partial(file)
    partial.parent.mkdir(parents=True, exist_ok=True)
    resumed = _download(item, partial, progress)
    wrong = _wrong(item, partial)
    if wrong and resumed:
        log.warning("%s: its pieces do not fit together: starting over", item.name)
        progress.skip(-_size(partial))
        partial.unlink()
        _download(item, partial, progress)
        wrong = _wrong(item, partial)
    if wrong:
        partial.unlink()
        raise UserError(wrong)
    partial.rename(file)


def _download(item: Item, partial: Path, progress: Progress) -> bool:
    """Append to `partial` until it is whole. Returns whether it was put together from more than one answer."""
    patience = _Patience(shown(item.url))
    partial.touch()
    have = furthest = _size(partial)
    resumed = have > 0
    if resumed:
        log.info("%s: continuing after %s", item.name, human_bytes(have))
        progress.skip(have)
    while item.size is None or have < item.size:
        try:
            with _open(item.url, have, item.headers) as stream, partial.open("ab") as out:
                if stream.start != have:  # the server cannot resume
                    out.truncate(stream.start)
                    progress.skip(stream.start - have)
                    have = stream.start
                resumed = have > 0
                if item.size is None and stream.total is not None:
                    require_space(partial.parent, stream.total - have)
                    progress.total = stream.total
                while chunk := stream.read():
                    out.write(chunk)  # here an error is the disk's, not the source's: it is not caught
                    have += len(chunk)
                    progress.add(len(chunk))
                    if item.size is not None and have > item.size:
                        return resumed  # more than there should be: the digest will say so
            total = item.size if item.size is not None else stream.total
            if total is not None and have < total:
                raise Interrupted(f"the connection ended after {have} of {total} bytes")
            return resumed
        except Interrupted as interruption:
            if have > furthest:
                furthest = have
                patience.reset()
            patience.wait(interruption)
    return resumed


# --- the wire --------------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    """The source broke off, or asked to be left alone for a while; worth another attempt."""

    def __init__(self, message: str, after_s: float | None = None) -> None:
        super().__init__(message)
        self.after_s = after_s  # what the server asked for


class _Patience:
    """Waits between attempts, longer each time, until too many in a row brought nothing."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.failures = 0

    def reset(self) -> None:
        self.failures = 0

    def wait(self, interruption: Interrupted) -> None:
        self.failures += 1
        if self.failures >= ATTEMPTS:
            raise RetryableError(f"{self.what}: gave up after {self.failures} attempts in a row. The last "
                                 f"error: {interruption}")
        pause = min(FIRST_PAUSE_S * 2 ** (self.failures - 1), LONGEST_PAUSE_S)
        if interruption.after_s is not None:
            pause = interruption.after_s
        if pause > LONGEST_RETRY_AFTER_S:
            raise RetryableError(f"{self.what}: the server asks to come back in {pause:.0f} s: {interruption}")
        log.warning("%s: %s; trying again in %.1f s", self.what, interruption, pause)
        time.sleep(pause)


def patiently(ask: Callable[[], T], what: str) -> T:
    """What `ask` returns, asked again while the source is interrupted."""
    patience = _Patience(what)
    while True:
        try:
            with _judging(what):
                return ask()
        except Interrupted as interruption:
            patience.wait(interruption)


@dataclass(frozen=True)
class _Stream:
    """An open source, from byte `start` on."""

    raw: Any  # a binary file of fsspec's or Python's
    what: str
    start: int
    total: int | None  # bytes from the source's first to its last, where it says so

    def read(self) -> bytes:
        """The next bytes, b"" at the end."""
        with _judging(self.what):
            return bytes(self.raw.read(CHUNK))


@contextmanager
def _open(url: str, start: int, headers: Mapping[str, str]) -> Iterator[_Stream]:
    """Open a URL or path at byte `start`; at 0 if the server cannot.

    Raises:
        Interrupted: another attempt may succeed.
        UserError: it cannot, e.g. there is no such file.
    """
    scheme = url.partition("://")[0] if "://" in url else "file"
    with _judging(shown(url)):
        if scheme in ("http", "https"):
            stream = _open_http(url, start, headers)
        elif scheme == "file":
            raw = Path(url).open("rb")  # noqa: SIM115 - closed below
            raw.seek(start)
            stream = _Stream(raw, url, start, None)
        else:
            stream = _open_bucket(scheme, url, start)
    try:
        yield stream
    finally:
        stream.raw.close()


def _open_http(url: str, start: int, headers: Mapping[str, str]) -> _Stream:
    import aiohttp
    import fsspec

    files = fsspec.filesystem("http", encoded=True, client_kwargs={
        # aiohttp's default ends every download after five minutes.
        "timeout": aiohttp.ClientTimeout(total=None, sock_connect=SILENCE_S, sock_read=SILENCE_S),
        "trust_env": True,  # HTTPS_PROXY
        # Signed URLs, ours (`encoded`) and those that we are sent on to, are valid only exactly as written.
        "requote_redirect_url": False})
    try:
        _ = urlsplit(url).port
    except ValueError as error:
        raise UserError(f"{shown(url)}: not a URL that can be opened: {error}") from None
    asked = {**headers, "Accept-Encoding": "identity", **({"Range": f"bytes={start}-"} if start else {})}
    try:
        # block_size 0 is one request read as a stream; any size keeps fsspec from sending a HEAD request first.
        raw = files.open(url, "rb", block_size=0, size=1, headers=asked)
    except aiohttp.ClientResponseError as error:
        if error.status == 416 and start:  # there is nothing behind what we have; only a fresh start shows why
            return _open_http(url, 0, headers)
        raise
    status, answered = raw.r.status, raw.r.headers
    if start and status == 206:
        if not answered.get("Content-Range", "").startswith(f"bytes {start}-"):  # not the part that we asked for
            raw.close()
            return _open_http(url, 0, headers)
        total = answered["Content-Range"].rpartition("/")[2]
    else:
        start = 0
        total = "" if "Content-Encoding" in answered else answered.get("Content-Length", "")
    return _Stream(raw, shown(url), start, int(total) if total.isdigit() else None)


def _open_bucket(scheme: str, url: str, start: int) -> _Stream:
    import fsspec

    try:
        files = fsspec.filesystem(scheme)
    except ImportError:
        package = PACKAGES.get(scheme, f"fsspec's package for {scheme}")
        raise UserError(f"{shown(url)}: {scheme}:// needs the package {package}, which is not installed. Add it to "
                        "jobs/requirements.txt and build the image (docs/registries.md), or give an https:// URL"
                        ) from None
    raw = files.open(url, "rb")
    raw.seek(start)
    return _Stream(raw, shown(url), start, getattr(raw, "size", None))


@contextmanager
def _judging(what: str) -> Iterator[None]:
    """Turn what the libraries raise for a source into `UserError` (it will not help to try again) or `Interrupted`."""
    try:
        yield
    except (UserError, RetryableError, Interrupted):
        raise
    except Exception as error:
        raise _judge(error, what) from error


def _judge(error: Exception, what: str) -> Exception:
    library = type(error).__module__.partition(".")[0]
    answer = getattr(error, "response", None)  # huggingface_hub's errors carry one; aiohttp's are like one
    status = getattr(error, "status", None) or getattr(answer, "status_code", None)
    if isinstance(error, FileNotFoundError):
        status = 404
    elif isinstance(error, PermissionError):
        status = 403
    message = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
    if status in (401, 403):
        return UserError(f"{what}: not allowed ({status}). Is it gated or private? Then accept its terms and set "
                         "HF_TOKEN (or sign the URL). Or is the name misspelt? Hubs answer the same then")
    if status == 404:
        return UserError(f"{what}: not found (404). Is there a typo in the name, the path or the revision?")
    if "Certificate" in type(error).__name__:
        return UserError(f"{what}: the TLS certificate is not trusted ({message}). Set SSL_CERT_FILE to the "
                         "authority's")
    if type(error).__name__ in ("InvalidURL", "InvalidUrlClientError", "NonHttpUrlClientError"):
        return UserError(f"{what}: not a URL that can be opened")  # the message would show a signed URL's secrets
    if isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429):
        return UserError(f"{what}: the server refuses ({status})")  # likewise
    if isinstance(status, int):
        headers = getattr(error, "headers", None) or getattr(answer, "headers", None) or {}
        return Interrupted(f"the server answers {status}", _retry_after(headers))
    if isinstance(error, OSError) or library in ("aiohttp", "httpx2", "httpcore2"):
        return Interrupted(message)
    if library in ("builtins", "fsspec"):
        return error  # a mistake of ours, not the source's
    return RetryableError(f"{what}: {message}")  # a bucket's library, e.g. no credentials


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds that a Retry-After header asks for, given as seconds or as a date."""
    value = headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
