"""Source schemes: what a `source` in the pipeline file may begin with, what it may be used for and how it is pinned.

To add a scheme: a line in `SCHEMES`, a module in jobs/relocation/sources/ that lists, opens and pins it, a line in
that package's `IMPLEMENTATIONS`, and a test. Validation, digests, `pin` and messages follow from these.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic_core import PydanticCustomError

from jobs.core import registry

Use = Literal["model", "data", "acceptability", "adapter"]
Pin = Literal["revision", "sha256"]

EMBEDDED_PAIRS = "builtin:pairs"


@dataclass(frozen=True)
class Form:
    """How a source is written: for people, and as a pattern that the whole of it matches."""

    shape: str
    pattern: str


@dataclass(frozen=True)
class Scheme:
    """One scheme, as the pipeline file and the digests know it.

    `pin` is the key that fixes the version. It decides what identifies the source in a digest: with `sha256`
    the content alone, wherever it comes from; with `revision` the source and its commit; with None (made by this code)
    the source and the recipe number of what makes it.
    """

    pin: Pin | None
    forms: Mapping[Use, Form]  # what it may be used for, and how it is written there
    local: bool = False  # beside the pipeline file: needs no network


OCI = Form("oci://REGISTRY/NAME:TAG or oci://REGISTRY/NAME@sha256:DIGEST, with NAME in lower case", registry.PATTERN)


def _data(shape: str, pattern: str) -> dict[Use, Form]:
    return {"data": Form(shape, pattern), "acceptability": Form(shape, pattern)}


def _bucket(scheme: str) -> dict[Use, Form]:
    return {"model": Form(f"{scheme}://BUCKET/FOLDER", rf"{scheme}://[^/]+/[^*?]*"),
            **_data(f"{scheme}://BUCKET/KEY, a folder with / at its end, or a glob", f"{scheme}://[^/]+/.*")}


SCHEMES: dict[str, Scheme] = {
    "hf": Scheme("revision", {"model": Form("hf://OWNER/NAME", r"hf://(?!datasets/).+"),
                              **_data("hf://datasets/OWNER/NAME, with a path or glob behind it",
                                      r"hf://datasets/.+")}),
    "file": Scheme("sha256", {"model": Form("file:PATH", "file:.+"), **_data("file:PATH", "file:.+")}, local=True),
    "https": Scheme("sha256", _data("https://…", "https://[^/].*")),
    "http": Scheme("sha256", _data("http://…", "http://[^/].*")),
    "s3": Scheme("sha256", {**_bucket("s3"), "adapter": Form("s3://BUCKET/PREFIX/NAME/DIGEST",
                                                             "s3://[^/]+/[^*?]*[^*?/]/?")}),
    "oci": Scheme("sha256", {"model": OCI, "data": OCI, "acceptability": OCI, "adapter": OCI}),
    "gs": Scheme("sha256", _bucket("gs")),
    "builtin": Scheme(None, {"model": Form("builtin:tiny or builtin:tiny-reference", "builtin:tiny(-reference)?"),
                             "acceptability": Form(EMBEDDED_PAIRS, EMBEDDED_PAIRS)}),
}


def scheme_of(source: str) -> str:
    """The text before the colon; it may be an unknown scheme."""
    return source.partition(":")[0]


def digest_in(source: str) -> str | None:
    """The sha256 that is a part of a source itself, as in `oci://REGISTRY/NAME@sha256:DIGEST`; in hex."""
    match = re.fullmatch(registry.PATTERN, source)
    return match["digest"].removeprefix("sha256:") if match and match["digest"] else None


def shown(url: str) -> str:
    """A source as it may be logged and published: a URL without user, password and query, which carry secrets."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url  # a path, which carries none
    if scheme not in ("s3", "gs"):  # an object's name may hold a `?`, and a glob does
        rest = rest.partition("?")[0]
    host, slash, path = rest.partition("/")
    host = host.rpartition("@")[2]
    if scheme in ("http", "https") and not re.fullmatch(r"(\[[^]]*\]|[^:]*)(:[0-9]*)?", host):
        return f"{scheme}://…"  # no host: it may be the beginning of a password with a `/`
    return f"{scheme}://{host}{slash}{path}"


def check(source: str, use: Use, revision: str | None, sha256: str | None) -> None:
    """A source must be one that `use` allows, and have no pin that its scheme does not know.

    Raises:
        PydanticCustomError: naming what is allowed.
    """
    if any(unicodedata.category(character) == "Cc" for character in source):
        raise PydanticCustomError("source", "{source} holds a control character", {"source": repr(shown(source))})
    scheme = SCHEMES.get(scheme_of(source))
    form = scheme.forms.get(use) if scheme else None
    if scheme is None or form is None:
        allowed = ", ".join(each.forms[use].shape for each in SCHEMES.values() if use in each.forms)
        raise PydanticCustomError("source", "{source} is not a source; allowed: {allowed}",
                                  {"source": shown(source), "allowed": allowed})
    if not re.fullmatch(form.pattern, source):
        raise PydanticCustomError("source", "{source} must be {shape}", {"source": shown(source), "shape": form.shape})
    pins = {"revision": revision, "sha256": sha256}
    wrong = [key for key, value in pins.items() if value and key != scheme.pin]
    if sha256 and (within := digest_in(source)) and within != sha256:
        raise PydanticCustomError("pin", "{source} names another digest than `sha256`: keep one of them",
                                  {"source": shown(source)})
    if scheme.pin in pins and all(pins.values()):
        raise PydanticCustomError("pin", "has two pins; keep `{pin}`", {"pin": scheme.pin})
    if wrong:
        raise PydanticCustomError("pin", "{source} is not pinned by `{wrong}`; remove it and run: python -m jobs pin",
                                  {"source": shown(source), "wrong": wrong[0]})
