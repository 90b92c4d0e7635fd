"""oci://REGISTRY/NAME:TAG: an artifact in an OCI registry, pinned by its manifest's digest. A layer is a file."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

from jobs.core.declarations import Loaded, Source
from jobs.core.errors import UserError
from jobs.core.registry import ADVICE as ADVICE
from jobs.core.registry import Reference, Registry, missing_blob
from jobs.relocation.connection import Stream
from jobs.relocation.sources import http
from jobs.relocation.sources.interface import Item


def find_pin(loaded: Loaded, source: Source) -> str:
    """The digest of the manifest that the tag stands for now; without a tag, the digest in the source, or its pin."""
    where = Reference.parse(source.source)
    if not (reference := where.tag or where.digest):
        if source.sha256:
            return source.sha256
        raise UserError(f"{source.source}: names neither a tag nor a digest. Write oci://REGISTRY/NAME:TAG")
    return _repository(where.registry, where.name).manifest(reference).digest.removeprefix("sha256:")


def files(loaded: Loaded, source: Source) -> list[Item]:
    """The files that the pinned manifest lists, each with its size and digest. The tag does not matter."""
    where = Reference.parse(source.source)
    repository = _repository(where.registry, where.name)
    pinned = f"sha256:{source.sha256}"
    try:
        manifest = repository.manifest(pinned)
    except UserError as error:
        if "(404)" in str(error) and where.tag and (now := _digest_of_tag(repository, where.tag)):
            raise UserError(f"{source.source}: {loaded.path.name} says sha256 {source.sha256}, which the registry does "
                            f"not have; the tag is now {now}. If that is meant, run: python -m jobs pin") from None
        raise
    return [Item(layer.path, str(Reference(where.registry, where.name, digest=f"sha256:{layer.sha256}")), layer.size,
                 layer.sha256, pinned_in="its manifest") for layer in manifest.layers()]


def open_range(url: str, start: int, end: int | None, headers: Mapping[str, str]) -> Stream:
    """A part of a blob. The registry may redirect to a storage host, which gets no credentials of ours."""
    where = Reference.parse(url)
    assert where.digest is not None
    repository = _repository(where.registry, where.name)
    blob, allowed = repository.blob_url(where.digest), repository.authorization(where.digest)
    try:
        try:
            stream = http.open_range(blob, start, end, {**headers, **allowed})
        except http.BadStatus as error:
            if error.status != 401:
                raise
            # A token lasts some minutes, and a download may take hours.
            allowed = repository.authorization(where.digest, rejected=allowed)
            stream = http.open_range(blob, start, end, {**headers, **allowed})
    except http.BadStatus as error:
        if error.status == 404:
            raise UserError(missing_blob(url)) from None
        raise
    return dataclasses.replace(stream, what=url, advice=ADVICE)


def _digest_of_tag(repository: Registry, tag: str) -> str | None:
    try:
        return repository.manifest(tag).digest
    except UserError:
        return None


@functools.lru_cache(maxsize=64)
def _repository(registry: str, name: str) -> Registry:
    """One client for each repository, so that all of its files share a token."""
    return Registry(Reference(registry, name))
