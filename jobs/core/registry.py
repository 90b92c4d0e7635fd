"""A client for one repository of an OCI registry: manifests and blobs, by digest (the OCI distribution specification).

Small and our own, on requests, because oras-py (0.2.43) reads a whole blob into memory to upload it, does not verify
what it downloads, and repeats every error, also a wrong name, for two minutes.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlencode, urljoin, urlsplit

from jobs.core.errors import RetryableError, UserError
from jobs.core.retries import Interrupted, Patience, retry_after

log = logging.getLogger("jobs")

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
MANIFESTS = (OCI_MANIFEST, "application/vnd.docker.distribution.manifest.v2+json")
INDEXES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
MANIFEST_BYTES = 4 * 2**20  # what registries accept at most
ANSWER_BYTES = 2**20  # of an error or a token
SILENCE_S = 60.0  # a connection on which nothing arrives for this long is dead
RETRIED = (408, 425, 429, 500, 502, 503, 504)
# The layers' names: what ModelPack's clients read, and what oras, CRI-O and others do.
FILE_PATH = "org.cncf.model.filepath"
TITLE = "org.opencontainers.image.title"
UNPACK = "io.deis.oras.content.unpack"
# Media types of archives: ModelPack's, and those of packed folders and of images' layers.
ARCHIVE = r"application/vnd\.cn(cf|ai)\.model\..*\.tar|.*\.tar[+.](gzip|zstd)"
ADVICE = "docs/publication.md, Credentials, says how to give a Job credentials"

_HOST = r"(?:[A-Za-z0-9.-]+|\[[0-9a-fA-F:]+\])(?::[0-9]+)?"
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
REPOSITORY = rf"oci://(?P<registry>{_HOST})/(?P<name>{_PART}(?:/{_PART})*)"
PATTERN = (rf"{REPOSITORY}(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{{0,127}}))?"
           r"(?:@(?P<digest>sha256:[0-9a-f]{64}))?")
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class Reference:
    """A repository, or a manifest in it: `oci://REGISTRY/NAME:TAG@sha256:…`."""

    registry: str  # the host, with its port
    name: str
    tag: str | None = None
    digest: str | None = None  # sha256:…

    @classmethod
    def parse(cls, text: str) -> Reference:
        """The reference in a text.

        Raises:
            UserError: it is none.
        """
        match = re.fullmatch(PATTERN, text)
        if not match:
            raise UserError(f"{text}: must be oci://REGISTRY/NAME:TAG or oci://REGISTRY/NAME@sha256:DIGEST, with NAME "
                            "in lower case")
        return cls(**match.groupdict())

    def __str__(self) -> str:
        tag, digest = f":{self.tag}" if self.tag else "", f"@{self.digest}" if self.digest else ""
        return f"oci://{self.registry}/{self.name}{tag}{digest}"


@dataclass(frozen=True)
class Layer:
    """A file that a manifest lists."""

    path: str
    size: int  # bytes
    sha256: str  # in hex


@dataclass(frozen=True)
class Manifest:
    """A manifest as the registry has it. Its digest was verified; what it holds was not."""

    where: Reference
    content: bytes

    @property
    def digest(self) -> str:
        return digest_of(self.content)

    def layers(self) -> list[Layer]:
        """The files that the manifest lists, each a layer of its own.

        Raises:
            UserError: it lists other manifests, or a layer is no plain file.
        """
        try:
            document = json.loads(self.content)
            if document.get("mediaType") in INDEXES or "manifests" in document:
                raise UserError(f"{self.where}: is an index of several manifests. Name one of them by its digest")
            layers = [_layer(layer) for layer in document["layers"]]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{self.where}: the manifest cannot be used: {error}") from None
        names = [layer.path for layer in layers]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"{self.where}: two layers are the file {twice[0]!r}")
        if not layers:
            raise UserError(f"{self.where}: the manifest lists no files")
        return layers


def _layer(layer: Mapping[str, Any]) -> Layer:
    notes = layer.get("annotations") or {}
    path, size, digest = notes.get(FILE_PATH) or notes.get(TITLE), layer["size"], layer["digest"]
    # oras gives plain files, too, the media type `…layer.v1.tar`; that of a packed folder has this annotation.
    archive = notes.get(UNPACK) == "true" or re.match(ARCHIVE, str(layer["mediaType"]))
    if not isinstance(path, str) or archive:
        raise ValueError(f"the layer {digest} ({layer['mediaType']}) is {'an archive' if archive else 'not a file'}. "
                         f"Each file must be a layer with the annotation {TITLE}, as `oras push REFERENCE FILE…` makes "
                         "them")
    if isinstance(size, bool) or not isinstance(size, int) or size < 0 or not DIGEST.fullmatch(digest):
        raise ValueError(f"the layer of {path!r} has the size {size!r} and the digest {digest!r}")
    return Layer(path, size, digest.removeprefix("sha256:"))


def digest_of(content: bytes) -> str:
    """The digest of a blob or manifest: `sha256:` and its sha256 in hex."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


class Registry:
    """One repository of a registry. Its methods may be called from several threads.

    All raise `UserError` where a person must change something (credentials, a name, a digest), and `RetryableError`
    where the registry does not recover. Both are one line.
    """

    def __init__(self, where: Reference, *, push: bool = False) -> None:
        """The repository of `where`; with `push` tokens are requested that allow writing."""
        self.where = Reference(where.registry, where.name)
        self._push = push
        self._api = f"{_scheme(where.registry)}://{_host(where.registry)}/v2/{where.name}/"
        self._header: str | None = None  # Authorization
        self._admitted = False  # by this header, or without any
        self._lock = threading.Lock()
        self._session: Any = None

    # --- reading -----------------------------------------------------------------------------------------------------

    def manifest(self, reference: str) -> Manifest:
        """The manifest of a tag or a digest; of a digest, after it was verified."""
        where = Reference(self.where.registry, self.where.name, **(
            {"digest": reference} if DIGEST.fullmatch(reference) else {"tag": reference}))
        answer = self._send("GET", self._api + f"manifests/{reference}", str(where),
                            headers={"Accept": ", ".join((*MANIFESTS, *INDEXES))})
        if answer.status_code == 404:
            raise UserError(f"{where}: not found (404). Is there a typo in the name or the tag, or was it removed?")
        self._require(answer, str(where), 200)
        found = Manifest(where, _read(answer, MANIFEST_BYTES, str(where)))
        if where.digest and found.digest != where.digest:
            raise UserError(f"{where}: the registry answers with another manifest, {found.digest}")
        return found

    def has_manifest(self, reference: str) -> bool:
        """Whether the registry has a manifest of this tag or digest."""
        return self._exists(f"manifests/{reference}", {"Accept": ", ".join((*MANIFESTS, *INDEXES))})

    def blob(self, digest: str, limit: int) -> bytes:
        """A small blob, verified, of at most `limit` bytes."""
        what = f"{self.where}@{digest}"
        answer = self._send("GET", self.blob_url(digest), what)
        if answer.status_code == 404:
            raise UserError(missing_blob(what))
        self._require(answer, what, 200)
        content = _read(answer, limit, what)
        if digest_of(content) != digest:
            raise UserError(f"{what}: the registry answers with other content, {digest_of(content)}")
        return content

    def blob_url(self, digest: str) -> str:
        """The URL of a blob, for a client that reads it in ranges with `authorization`."""
        return self._api + f"blobs/{digest}"

    def authorization(self, digest: str, *, rejected: Mapping[str, str] | None = None) -> dict[str, str]:
        """The headers with which a blob may be read.

        Args:
            rejected: the headers that the registry did not take, since the token expired: they are made again.
        """
        if rejected is not None:
            with self._lock:
                if self._header == rejected.get("Authorization"):  # else another thread was here already
                    self._header, self._admitted = None, False
        if not self._admitted:
            self.has_blob(digest)  # the registry's answer says which credentials it takes, if any
        return {"Authorization": self._header} if self._header else {}

    def has_blob(self, digest: str) -> bool:
        """Whether the registry has the blob."""
        return self._exists(f"blobs/{digest}", {})

    def _exists(self, path: str, headers: Mapping[str, str]) -> bool:
        answer = self._send("HEAD", self._api + path, str(self.where), headers=headers)
        if answer.status_code == 404:
            answer.close()
            return False
        self._finish(answer, str(self.where), 200)
        return True

    # --- writing -----------------------------------------------------------------------------------------------------

    def push_blob(self, content: Path | bytes, digest: str, size: int) -> bool:
        """Upload a blob as a stream, unless it is there. Returns whether it was uploaded.

        An upload that breaks off begins again: what was uploaded before, other blobs, is not repeated.
        """
        if self.has_blob(digest):
            return False
        what = f"{self.where}: {content.name if isinstance(content, Path) else digest}"

        def upload() -> Any:
            # A new session each time: one that broke off has a part already, to which registries would append.
            started = self._authorized("POST", self._api + "blobs/uploads/", what)
            self._finish(started, what, 202)
            place = urljoin(started.url, started.headers.get("Location", ""))
            place += ("&" if urlsplit(place).query else "?") + f"digest={digest}"
            headers = {"Content-Type": "application/octet-stream"}
            if isinstance(content, Path) and size:  # of an empty file, requests would send chunks instead of a length
                with content.open("rb") as stream:
                    return self._authorized("PUT", place, what, headers=headers, data=stream)
            return self._authorized("PUT", place, what, headers=headers,
                                    data=content if isinstance(content, bytes) else b"")

        self._finish(self._patiently(upload, what), what, 201)
        return True

    def push_manifest(self, content: bytes, tag: str, media_type: str = OCI_MANIFEST) -> str:
        """Write a manifest under a tag, which may have had another one. Returns its digest."""
        what = f"{self.where}:{tag}"
        answer = self._send("PUT", self._api + f"manifests/{tag}", what, data=content,
                            headers={"Content-Type": media_type})
        self._finish(answer, what, 201)
        found = str(answer.headers.get("Docker-Content-Digest") or digest_of(content))
        if found != digest_of(content):
            raise UserError(f"{what}: the registry changed the manifest: it was {digest_of(content)} and is {found}")
        return found

    # --- requests ----------------------------------------------------------------------------------------------------

    def _send(self, method: str, url: str, what: str, *, headers: Mapping[str, str] | None = None,
              data: bytes | None = None) -> Any:
        """One request, repeated while the registry is busy. Returns the answer, as `_authorized`."""
        return self._patiently(lambda: self._authorized(method, url, what, headers=headers, data=data), what)

    def _authorized(self, method: str, url: str, what: str, *, headers: Mapping[str, str] | None = None,
                    data: bytes | IO[bytes] | None = None) -> Any:
        """One request, and once more with new credentials where the registry requests them.

        Returns:
            the answer, whatever its status but those for which another attempt may help; its body is not read yet.
        Raises:
            Interrupted: another attempt may help.
        """
        own = self._own(url)
        answer = self._request(method, url, what, headers, data, self._authorize if own else _no_authorization)
        if answer.status_code == 401 and own:
            self._authenticate(answer, what)
            answer = self._request(method, url, what, headers, data, self._authorize)
        self._admitted = self._admitted or (own and answer.status_code not in (401, 403))
        return answer

    def _request(self, method: str, url: str, what: str, headers: Mapping[str, str] | None,
                 data: bytes | IO[bytes] | None, authorize: Callable[[Any], Any], *, redirects: bool = True) -> Any:
        import requests

        if data is not None and not isinstance(data, bytes):
            data.seek(0)
        try:
            answer = self._client().request(method, url, data=data, headers=headers, stream=True, auth=authorize,
                                            timeout=SILENCE_S, allow_redirects=redirects)
        except requests.exceptions.SSLError as error:
            raise UserError(f"{what}: the TLS certificate is not trusted ({_reason(error)}). Set SSL_CERT_FILE to the "
                            "authority's; if the registry has no TLS, name its host in REGISTRY_PLAIN_HTTP") from None
        except (requests.exceptions.InvalidURL, requests.exceptions.MissingSchema,
                requests.exceptions.InvalidSchema, requests.exceptions.TooManyRedirects) as error:
            raise UserError(f"{what}: cannot be requested: {_reason(error)}") from None
        except requests.exceptions.RequestException as error:
            raise Interrupted(_reason(error)) from None
        if answer.status_code in RETRIED:
            raise Interrupted(f"{urlsplit(url).netloc} answers {_described(answer)}", retry_after(answer.headers))
        return answer

    def _patiently(self, work: Callable[[], Any], what: str) -> Any:
        """What `work` returns, called again while the registry is busy."""
        patience = Patience(what)
        while True:
            try:
                return work()
            except Interrupted as interruption:
                patience.wait(interruption)

    def _client(self) -> Any:
        with self._lock:
            if self._session is None:
                import requests

                self._session = requests.Session()
                self._session.headers["User-Agent"] = "lora-gitops"
                self._session.headers["Accept-Encoding"] = "identity"
                # requests has its own variable for it; the rest of relocation goes by this one.
                self._session.verify = os.environ.get("SSL_CERT_FILE") or True
            return self._session

    def _own(self, url: str) -> bool:
        """Whether a URL is the registry's; credentials are sent nowhere else."""
        return urlsplit(url)[:2] == urlsplit(self._api)[:2]

    def _authorize(self, request: Any) -> Any:
        if self._header:
            request.headers["Authorization"] = self._header
        return request

    def _require(self, answer: Any, what: str, status: int) -> None:
        """Raise what an answer means that is not the expected one."""
        if answer.status_code == status:
            return
        action = "push to" if self._push else "pull from"
        if answer.status_code == 401:
            raise UserError(f"{what}: not allowed (401): {self._blame()}. {ADVICE}")
        if answer.status_code == 403:
            user = credentials(self.where)
            who = f"{user.name} may not {action} it" if user else "it needs credentials"
            raise UserError(f"{what}: not allowed ({_described(answer)}): {who}. {ADVICE}")
        if answer.status_code == 404:
            raise UserError(f"{what}: not found ({_described(answer)}). Is there a typo in the name?")
        raise UserError(f"{what}: the registry rejects the request ({_described(answer)})")

    def _finish(self, answer: Any, what: str, status: int) -> None:
        """As `_require`, for an answer without content."""
        self._require(answer, what, status)
        _read(answer, ANSWER_BYTES, what)

    def _blame(self) -> str:
        """What is wrong with the credentials, once the registry did not take them."""
        user = credentials(self.where)
        if user is None:
            return f"{credentials_file()} has no credentials for {self.where.registry}"
        return f"the credentials of {user.name} for {self.where.registry} in {credentials_file()} are wrong or expired"

    def _authenticate(self, answer: Any, what: str) -> None:
        """Do what the registry's answer requests: get a token, or use the password itself."""
        challenge = answer.headers.get("WWW-Authenticate", "")
        answer.close()
        bearer = re.search(r"(?i)\bbearer\s+(.*)", challenge)
        user = credentials(self.where)
        if bearer:
            parameters = dict(re.findall(r'(\w+)="([^"]*)"', bearer[1]))
            header = f"Bearer {self._token(parameters, user, what)}"
        elif user and user.password and re.search(r"(?i)\bbasic\b", challenge):
            header = _basic_header(user)
        else:
            raise UserError(f"{what}: not allowed (401): {self._blame()}. {ADVICE}")
        with self._lock:
            self._header = header

    def _token(self, challenge: Mapping[str, str], user: Credentials | None, what: str) -> str:
        """A token for this repository from the service that the registry names."""
        realm = challenge.get("realm", "")
        if urlsplit(realm).scheme != "https" and not (self._api.startswith("http://") and realm.startswith("http://")):
            raise UserError(f"{what}: the registry names {realm!r} for tokens, which is not https: no password is sent "
                            "there")
        scope = f"repository:{self.where.name}:{'pull,push' if self._push else 'pull'}"
        parameters = {"scope": scope, **({"service": challenge["service"]} if "service" in challenge else {})}
        if user and user.identity_token:
            body = urlencode(parameters | {"grant_type": "refresh_token", "client_id": "lora-gitops",
                                           "refresh_token": user.identity_token}).encode()
            form = {"Content-Type": "application/x-www-form-urlencoded"}
            # A redirect could lead to another host, which would get the body.
            answer = self._request("POST", realm, what, form, body, _no_authorization, redirects=False)
        else:
            url = realm + ("&" if urlsplit(realm).query else "?") + urlencode(parameters)
            answer = self._request("GET", url, what, None, None, _basic(user) if user else _no_authorization)
        if answer.status_code in (400, 401, 403):
            raise UserError(f"{what}: not allowed: {urlsplit(realm).netloc} gives no token ({answer.status_code}): "
                            f"{self._blame()}. {ADVICE}")
        self._require(answer, what, 200)
        try:
            values = json.loads(_read(answer, ANSWER_BYTES, what))
            return str(values.get("token") or values["access_token"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise RetryableError(f"{what}: {urlsplit(realm).netloc} answers without a token") from None


def missing_blob(what: str) -> str:
    """The message about a blob that a manifest lists and the registry lacks."""
    return f"{what}: the registry has no such blob, although the manifest lists it. Push the artifact again"


def _basic_header(user: Credentials) -> str:
    return "Basic " + base64.b64encode(f"{user.name}:{user.password}".encode()).decode()


def _basic(user: Credentials) -> Callable[[Any], Any]:
    def authorize(request: Any) -> Any:
        request.headers["Authorization"] = _basic_header(user)
        return request

    return authorize


def _no_authorization(request: Any) -> Any:
    """Without any, requests would take a password from ~/.netrc."""
    return request


def _read(answer: Any, limit: int, what: str) -> bytes:
    """The body of an answer, of at most `limit` bytes."""
    import requests
    import urllib3

    try:
        content = bytes(answer.raw.read(limit + 1, decode_content=True))
    except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
        raise RetryableError(f"{what}: the connection broke off: {_reason(error)}") from None
    finally:
        answer.close()
    if len(content) > limit:
        raise UserError(f"{what}: has more than {limit} bytes")
    return content


def _described(answer: Any) -> str:
    """A status with the reason that registries give in the body, in one line."""
    try:
        error = json.loads(_read(answer, ANSWER_BYTES, ""))["errors"][0]
        reason = " ".join(f"{error['code']}: {error.get('message', '')}".split())
        return f"{answer.status_code} {reason[:300]}".rstrip(": ")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, UserError, RetryableError):
        return str(answer.status_code)


def _reason(error: Exception) -> str:
    """A library's exception in one line, without the URL, which may hold secrets."""
    inner = error.args[0] if error.args and isinstance(error.args[0], Exception) else error
    inner = getattr(inner, "reason", None) or inner
    text = re.sub(r"https?://\S+|<[^>]*>:?|/v2/\S+", "…", " ".join(str(inner).split()))
    return f"{type(error).__name__}: {text[:200]}"


# --- where, and as whom -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Credentials:
    """A user's name and password, or a token with which tokens are requested."""

    name: str
    password: str = ""
    identity_token: str = ""

    def __repr__(self) -> str:
        return f"Credentials({self.name!r})"


def _host(registry: str) -> str:
    return "registry-1.docker.io" if registry in ("docker.io", "index.docker.io") else registry


def _scheme(registry: str) -> str:
    """https, and http for this machine and for the hosts in REGISTRY_PLAIN_HTTP."""
    plain = os.environ.get("REGISTRY_PLAIN_HTTP", "").replace(",", " ").split()
    host = registry.rpartition(":")[0] if re.search(r":\d+$", registry) else registry
    return "http" if registry in plain or host in ("localhost", "127.0.0.1", "[::1]") else "https"


def credentials_file() -> Path:
    """The file with the registries' credentials, as docker, podman and Kubernetes write it."""
    if named := os.environ.get("REGISTRY_AUTH_FILE"):
        return Path(named)
    return Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker") / "config.json"


def credentials(where: Reference) -> Credentials | None:
    """The credentials for a repository: its own, those of a part of its name, or the registry's.

    Raises:
        UserError: the file cannot be read, or is none; no message shows what it holds.
    """
    file = credentials_file()
    try:
        entries = json.loads(file.read_bytes()).get("auths") or {}
        by_name = {re.sub(r"^https?://|(/v[12])?/?$", "", key): entry for key, entry in entries.items()}
        parts = where.name.split("/")
        names = [f"{where.registry}/{'/'.join(parts[:n])}" for n in range(len(parts), 0, -1)] + [where.registry]
        if _host(where.registry) == "registry-1.docker.io":
            names += ["index.docker.io", "docker.io"]
        for name in names:
            if entry := by_name.get(name):
                return _entry(entry)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a docker config.json"
        raise UserError(f"{file}: the registries' credentials cannot be read: {reason}. {ADVICE}") from None
    return None


def _entry(entry: Mapping[str, str]) -> Credentials | None:
    try:
        decoded = base64.b64decode(entry.get("auth", ""), validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        raise ValueError("auth") from None
    name, _, password = decoded.partition(":")
    found = Credentials(entry.get("username") or name, entry.get("password") or password,
                        entry.get("identitytoken", ""))
    return found if found.password or found.identity_token else None
