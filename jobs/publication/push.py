"""Pushes the files of a published adapter to a registry; what is there already is not uploaded again."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from jobs.core.files import human_bytes
from jobs.core.registry import Reference, Registry, digest_of
from jobs.publication import layout
from jobs.publication.layout import File

log = logging.getLogger("jobs")


@dataclass(frozen=True)
class Published:
    """Where a published adapter is, as the other environment's pipeline.yaml names it."""

    source: str
    sha256: str
    pushed: bool  # False: it was there already

    def lines(self) -> list[str]:
        """The lines for a pipeline.yaml."""
        return [f"source: {self.source}", f"sha256: {self.sha256}"]


def to_registry(published: Sequence[File], name: str, version: str, to: str) -> Published:
    """Push an adapter's files to the repository NAME below `to`, under the tag `version`.

    Args:
        name: the adapter's name.
        version: its digest.
        to: oci://REGISTRY/PREFIX.
    Raises:
        UserError: credentials or name are wrong.
        RetryableError: the registry does not recover.
    """
    where = Reference.parse(f"{to}/{name}")
    registry = Registry(where, push=True)
    content, config = layout.manifest(name, version, published)
    source, sha256 = str(Reference(where.registry, where.name, tag=version)), digest_of(content).removeprefix("sha256:")
    if registry.has_manifest(version) and registry.manifest(version).content == content:
        return Published(source, sha256, pushed=False)
    blobs = [*((file.content, f"sha256:{file.sha256}", file.size) for file in published),
             (config, digest_of(config), len(config))]
    sizes = [size for blob, digest, size in blobs if registry.push_blob(blob, digest, size)]
    registry.push_manifest(content, version)
    log.info("%s: pushed %d files (%s); %d were there", source, len(sizes), human_bytes(sum(sizes)),
             len(blobs) - len(sizes))
    return Published(source, sha256, pushed=True)
