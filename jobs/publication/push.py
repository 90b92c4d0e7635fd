"""Pushes the files of a published adapter to a registry or a bucket; what is there already is not uploaded again."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from jobs.core.errors import RetryableError, UserError
from jobs.core.files import human_bytes
from jobs.core.published import SUMS
from jobs.core.registry import Reference, Registry, digest_of
from jobs.publication import layout
from jobs.publication.layout import File

log = logging.getLogger("jobs")

PART = 16 * 2**20  # bytes of a large file in one request; S3 takes 10,000 parts
BUCKET_ADVICE = ("Credentials come from the service account's workload identity, or from AWS_ACCESS_KEY_ID and "
                 "AWS_SECRET_ACCESS_KEY; they need s3:GetObject, s3:PutObject and s3:ListBucket (docs/publication.md, "
                 "Credentials)")


@dataclass(frozen=True)
class Published:
    """Where a published adapter is, as the other environment's pipeline.yaml names it."""

    source: str
    sha256: str
    pushed: bool  # False: it was there already

    def lines(self) -> list[str]:
        """The lines for a pipeline.yaml."""
        return [f"source: {self.source}", f"sha256: {self.sha256}"]


def push(published: Sequence[File], name: str, version: str, to: str) -> Published:
    """Push an adapter's files to where `publication.to` says.

    Args:
        name: the adapter's name.
        version: its digest.
        to: oci://REGISTRY/PREFIX or s3://BUCKET/PREFIX.
    Raises:
        UserError: credentials or names are wrong.
        RetryableError: the registry or the bucket does not recover.
    """
    return (to_registry if to.startswith("oci://") else to_bucket)(published, name, version, to)


def to_registry(published: Sequence[File], name: str, version: str, to: str) -> Published:
    """Push to the repository NAME below `to`, under the tag `version`. As `push`."""
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


def to_bucket(published: Sequence[File], name: str, version: str, to: str) -> Published:
    """Write below `to/NAME/VERSION/`, and at last SHA256SUMS, whose digest is the pin. As `push`.

    Raises:
        UserError: also if another publication of this adapter is there. Others may have pinned it, and a bucket, unlike
            a registry, would not keep it.
    """
    source, sums = f"{to}/{name}/{version}", layout.sums(published)
    sha256 = hashlib.sha256(sums).hexdigest()
    with _explained(source):
        import fsspec

        bucket = fsspec.filesystem("s3", skip_instance_cache=True)
        try:
            there = bucket.cat_file(f"{source}/{SUMS}")
        except FileNotFoundError:
            there = None
        if there == sums:
            return Published(source, sha256, pushed=False)
        if there is not None:
            raise UserError(f"{source}: holds another publication of this adapter ({SUMS} has the sha256 "
                            f"{hashlib.sha256(there).hexdigest()}, not {sha256}): its evaluation was made again, or "
                            "`publication.answers` changed. Who pinned it could not fetch it any more. Remove that "
                            "folder to publish again")
        for file in published:
            if isinstance(file.content, bytes):
                bucket.pipe_file(f"{source}/{file.path}", file.content)
            else:
                bucket.put_file(str(file.content), f"{source}/{file.path}", chunksize=PART, max_concurrency=4)
        bucket.pipe_file(f"{source}/{SUMS}", sums)
    log.info("%s: wrote %d files (%s)", source, len(published) + 1, human_bytes(sum(file.size for file in published)))
    return Published(source, sha256, pushed=True)


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn what the bucket's libraries raise into one line."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{what}: s3:// needs the package s3fs, which cannot be imported ({error}). Build the image "
                        "from jobs/requirements.txt (docs/registries.md)") from None
    except PermissionError as error:
        raise UserError(f"{what}: not allowed ({_first_line(error)}). {BUCKET_ADVICE}") from None
    except FileNotFoundError:
        raise UserError(f"{what}: there is no such bucket. Is there a typo in `publication.to` of environment.yaml?"
                        ) from None
    except Exception as error:
        if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"):
            raise UserError(f"{what}: no credentials ({_first_line(error)}). {BUCKET_ADVICE}") from None
        if type(error).__module__.partition(".")[0] not in ("botocore", "aiobotocore", "aiohttp", "s3fs") and (
                not isinstance(error, OSError | TimeoutError) or error.filename):
            raise  # an error in this code, or of the volume
        raise RetryableError(f"{what}: {type(error).__name__}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
