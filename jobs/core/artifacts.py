"""Artifacts: every stage's result, immutable, named by the digest of what made it, verified before it is used.

An artifact is a folder `<volume>/<kind>/<digest>/` with an `artifact.json` that lists every file with size and sha256.
It is written beside its place (`.draft-<digest>`), synced to disk, and renamed: a reader never sees half of one, and a
kill at any moment leaves either nothing, a draft that the next attempt continues or wipes, or the whole artifact.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jobs.core import seals, signatures
from jobs.core.errors import RetryableError, UserError
from jobs.core.files import human_bytes, noted_sha256, read_plain_file, sha256_of, sync_folder, write_atomically
from jobs.core.layout import DRAFT, MANIFEST_BYTES, draft_folder, lock_file
from jobs.core.layout import MANIFEST as MANIFEST
from jobs.core.layout import SIGNATURE as SIGNATURE
from jobs.core.locks import hold
from jobs.core.retention import retain
from jobs.core.signatures import NotSigned as NotSigned
from jobs.core.variables import wait_seconds as default_wait_seconds

if TYPE_CHECKING:
    from jobs.core.signing import Signer

log = logging.getLogger("jobs")

# Made by the stages that have the signing key, where the environment asks for signatures. Of what is relocated or
# encoded, the pins in git are known, but not the key: relocation connects to the outside (docs/signing.md).
SIGNED = frozenset({"adapter", "merged-model", "scores", "evaluation"})
VERSIONED = ("torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors", "evaluate", "datasets",
             "huggingface_hub")


@dataclass(frozen=True)
class Spec:
    """What identifies an artifact before it exists: its kind, the settings and the digests of the inputs."""

    volume: str  # the volume's folder below the volumes root, e.g. "fine-tuned-model"
    kind: str  # the folder in the volume, e.g. "adapter"
    spec: Mapping[str, Any]
    inputs: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """First 16 hex digits of the sha256 of the canonical JSON of kind, spec and inputs.

        64 bits: among a million artifacts of a kind, two share a name with probability below 3e-8.
        """
        return digest_of(self.kind, self.spec, self.inputs)

    def path(self, volumes: Path) -> Path:
        """Where the artifact is, or will be."""
        return volumes / self.volume / self.kind / self.digest

    def __str__(self) -> str:
        return f"{self.kind}/{self.digest}"


@dataclass(frozen=True)
class Artifact:
    """An artifact that exists and was verified."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def digest(self) -> str:
        return str(self.manifest["digest"])


def canonical(value: Any) -> bytes:
    """JSON with sorted keys and no spaces: the same value always gives the same bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_of(kind: str, spec: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    return hashlib.sha256(canonical({"kind": kind, "spec": dict(spec), "inputs": dict(inputs)})).hexdigest()[:16]


def listing(folder: Path, progress: Callable[[int], None] | None = None,
            digest: Callable[[Path], str] | None = None) -> list[dict[str, Any]]:
    """Every file below `folder` but the manifest and its signature: path, size in bytes, sha256; sorted by path.

    Args:
        progress: is called with the size of each file that was read.
        digest: gives the sha256 of a file; by default from its bytes.
    Raises:
        UserError: for a link or a special file, which could point outside the artifact.
    """
    files = files_of(folder)
    found: list[dict[str, Any]] = []
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashing releases the GIL
        for file, sha256 in zip(files, pool.map(digest or sha256_of, files), strict=True):
            found.append({"path": file.relative_to(folder).as_posix(), "size": file.stat().st_size, "sha256": sha256})
            if progress:
                progress(found[-1]["size"])
    return found


def files_of(folder: Path) -> list[Path]:
    """The files that `listing` lists. Raises `UserError` like it."""
    files = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()) or (path.is_dir() and path == folder / SIGNATURE):
            raise UserError(f"{path}: is not a plain file; an artifact holds files and folders only")
        if path.is_file() and path not in (folder / MANIFEST, folder / SIGNATURE):
            files.append(path)
    return files


def find(spec: Spec, volumes: Path, keys: Sequence[str] = ()) -> Artifact | None:
    """The artifact if it is there and every byte is as recorded; None if it is not there. Of a large one, a seal shows
    that its bytes were verified before and did not change since (seals.py).

    Args:
        keys: the trusted public keys, if the environment asks for signatures. What is signed by none of them is as good
            as not there: its stage makes it again, and never signs what it only found.
    Raises:
        UserError: if it is there but does not match its manifest. It is never used, and never removed: it may be
            evidence. The message explains how to have it made again.
    """
    try:
        return _read_input(spec.path(volumes), _keys_of(spec, keys)) if spec.path(volumes).exists() else None
    except NotSigned as error:
        log.warning("%s. It is not used", error)
        return None


def _keys_of(spec: Spec, keys: Sequence[str]) -> Sequence[str]:
    return keys if spec.kind in SIGNED else ()


def _read_input(path: Path, keys: Sequence[str]) -> Artifact:
    """Read and verify an artifact; by its seal, unless it must be signed: who may write to the volume can forge a
    seal, and no signature."""
    return read(path, keys, by="bytes" if keys else "seal")


def read(path: Path, keys: Sequence[str] = (), advice: str | None = None, *,
         by: Literal["bytes", "seal", "sealing"] = "bytes",
         progress: Callable[[int], None] | None = None) -> Artifact:
    """Read and verify the artifact at `path`: manifest, name, and every file's presence, size and sha256.

    Args:
        keys: the trusted public keys; its signature must verify by one of them. Empty: it needs none.
        advice: what to do about one that is damaged; by default, how to have it made again.
        by: `bytes` reads every file. `seal` does not where a valid seal shows that they were verified already
            (seals.py); otherwise it reads them and seals the artifact. `sealing` does that whatever the seal shows.
        progress: as for `listing`.
    Raises:
        UserError: naming the first file that is missing, extra or changed, and both digests.
        NotSigned: it is whole, and its signature does not verify.
    """
    hint = advice or f"Move {path} away to have it made again"
    try:
        content = read_plain_file(path / MANIFEST, MANIFEST_BYTES)
        manifest = json.loads(content)
        named = digest_of(manifest["kind"], manifest["spec"], manifest["inputs"])
        recorded = {os.fspath(f["path"]): (f["size"], f["sha256"]) for f in manifest["files"]}
    except (UserError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: {MANIFEST} is missing or damaged ({error}). {hint}") from None
    if not path.name == manifest["digest"] == named:
        raise UserError(f"{path}: {MANIFEST} describes {manifest['digest']} (computed: {named}), not {path.name}. "
                        f"{hint}")
    sealing = None
    if by != "bytes" and seals.is_large(before := seals.state_of(path, files_of(path))):
        size = human_bytes(seals.size_of(before))
        if by == "seal" and seals.is_sealed(path, content, before):
            log.info("%s/%s: verified by its seal (%s)", path.parent.name, path.name, size)
            return Artifact(path, manifest)
        sealing = seals.begin(path, content, before)
    found = {f["path"]: (f["size"], f["sha256"]) for f in listing(path, progress)}
    for name in sorted(recorded.keys() | found.keys()):
        if name not in found:
            raise UserError(f"{path}: {name} is missing. {hint}")
        if name not in recorded:
            raise UserError(f"{path}: {name} is not listed in {MANIFEST}. {hint}")
        if found[name] != recorded[name]:
            (size, digest), (found_size, found_digest) = recorded[name], found[name]
            raise UserError(f"{path}: {name} was changed: {MANIFEST} says {size} bytes, sha256 {digest}; the file has "
                            f"{found_size} bytes, sha256 {found_digest}. {hint}")
    if sealing:
        unsealed = sealing.end(seals.state_of(path, files_of(path)))
        log.info("%s/%s: verified (%s read)%s", path.parent.name, path.name, size, f", {unsealed}" if unsealed else "")
    if keys:
        signatures.check(path, manifest, keys)
    return Artifact(path, manifest)


def done(spec: Spec, volumes: Path, signer: Signer | None = None) -> Artifact | None:
    """Like `find`, for the stage that makes it: logs, and marks it as just used so that retention keeps it.

    Args:
        signer: signs what is signed by another trusted key, so that this one can be removed from the list of keys.
    """
    artifact = find(spec, volumes, signer.keys if signer else ())
    if artifact is not None:
        if signer and spec.kind in SIGNED:
            key, content = signatures.check(artifact.path, artifact.manifest, signer.keys)
            if key != signer.own:
                write_atomically(artifact.path / SIGNATURE, signer.sign(content))
                log.info("%s was signed by another trusted key, and is signed again", spec)
        os.utime(artifact.path / MANIFEST)
        log.info("%s is already there and verified: nothing to do", spec)
    return artifact


def wait(specs: list[Spec], volumes: Path, deadline_s: float, poll_s: float = 2.0,
         keys: Sequence[str] = ()) -> list[Artifact]:
    """Wait until every artifact is there, verify them, and return them in order.

    Args:
        keys: as for `find`: what is signed by none of them is waited for, because its stage makes it again.
    Raises:
        RetryableError: when `deadline_s` seconds passed; names what is still missing.
        UserError: when one is there but damaged.
        NotSigned: when `deadline_s` seconds passed, and one is still not signed.
    """
    started = time.monotonic()
    wait_until_there(specs, volumes, deadline_s, poll_s)
    return [_wait_for_signature(s, volumes, started + deadline_s, poll_s, _keys_of(s, keys)) for s in specs]


def _wait_for_signature(spec: Spec, volumes: Path, deadline: float, poll_s: float, keys: Sequence[str]) -> Artifact:
    """Read an artifact that is there; wait for its stage to make it again if it is not signed by one of the keys."""
    path, refused = spec.path(volumes), ""
    while True:
        try:
            return _read_input(path, keys)
        except NotSigned as error:
            if time.monotonic() > deadline:
                raise
            if refused != str(error):
                refused = str(error)
                log.warning("%s. Waiting until the stage that makes it has made it again", error)
        except UserError:
            if not refused or time.monotonic() > deadline:  # else its stage may be replacing it at this moment
                raise
        time.sleep(poll_s)


def wait_until_there(specs: list[Spec], volumes: Path, deadline_s: float, poll_s: float = 2.0) -> None:
    """Wait until every artifact is there. Published artifacts are complete; their readers verify them.

    Raises:
        RetryableError: when `deadline_s` seconds passed; names what is still missing.
    """
    started = reported = time.monotonic()
    missing = [s for s in specs if not s.path(volumes).exists()]
    if missing:
        log.info("waiting for %s", ", ".join(map(str, missing)))
    while missing:
        now = time.monotonic()
        if now - started > deadline_s:
            raise RetryableError(f"waited {deadline_s:.0f} s for {', '.join(map(str, missing))}. See the logs of the "
                                 "job that makes it")
        if now - reported > 60:
            log.info("still waiting for %s (%.0f s)", ", ".join(map(str, missing)), now - started)
            reported = now
        time.sleep(poll_s)
        missing = [s for s in specs if not s.path(volumes).exists()]


@contextmanager
def lock(spec: Spec, volumes: Path, wait_seconds: float) -> Iterator[None]:
    """Hold the artifact's lock: of two processes that would make it, one works and the other waits.

    Raises:
        RetryableError: when `wait_seconds` passed; names the lock's file and what to do.
    """
    target = spec.path(volumes)
    target.parent.mkdir(parents=True, exist_ok=True)
    with hold(lock_file(target), wait_seconds, f"makes {spec}"):
        yield


def publish(spec: Spec, volumes: Path, write: Callable[[Path], Mapping[str, Any] | None], *,
            keep: int, resume: bool = False, replace: bool = False, adapter_name: str = "",
            wait_seconds: float | None = None, signer: Signer | None = None) -> Artifact:
    """Make the artifact with `write(draft_folder)`, unless it is already there, and publish it whole.

    Args:
        write: fills the draft folder; what it returns is written to `artifact.json` under `about` (facts for people).
        keep: how many artifacts of the kind, and for the same adapter, retention keeps.
        resume: hand `write` what an interrupted attempt left (downloads continue) instead of an empty folder.
        replace: make it although it is there, and put it in the place of that one: for a result that does not follow
            from its spec alone.
        adapter_name: the adapter that it is made for; empty for what all adapters of an environment share.
        wait_seconds: how long to wait for another process that makes it; by default as long as for inputs.
        signer: signs it. What is there without a signature by a trusted key is replaced.
    Raises:
        RetryableError: when the other process did not end in time.
    """
    target = spec.path(volumes)
    with lock(spec, volumes, default_wait_seconds() if wait_seconds is None else wait_seconds):
        existing = None if replace else done(spec, volumes, signer)
        if existing is not None:
            return existing
        # Before writing: on a full volume, the write would fail before anything is removed.
        retain(target.parent, keep=keep, protected={spec.digest})
        draft = draft_folder(target)
        if draft.is_symlink() or draft.is_file():  # no stage made it, and a link may lead to what others own
            draft.unlink()
        elif draft.exists() and not resume:
            shutil.rmtree(draft)
        draft.mkdir(exist_ok=True)
        started = datetime.now(UTC)
        about = {"adapter_name": adapter_name} if adapter_name else {}
        about |= write(draft) or {}
        for unfinished in (*draft.glob(f".{MANIFEST}.*"), *draft.glob(f".{SIGNATURE}.*"), draft / SIGNATURE):
            unfinished.unlink(missing_ok=True)  # an attempt was killed while it wrote the manifest
        _open_to_readers(draft)
        _sync(draft)  # the bytes that are hashed below are the bytes on the disk
        settled = seals.settle(draft, seals.state_of(draft, files_of(draft)))
        manifest: dict[str, Any] = {
            "kind": spec.kind, "digest": spec.digest, "spec": dict(spec.spec), "inputs": dict(spec.inputs),
            "files": listing(draft, digest=noted_sha256), "about": about, "versions": _versions(),
            "started": started.isoformat(timespec="seconds"),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        write_atomically(draft / MANIFEST, text)
        if signer:
            write_atomically(draft / SIGNATURE, signer.sign(text.encode()))
        before = draft.with_name(f"{draft.name}-before")  # a draft's name: what a kill leaves is removed by age
        replaces = target.exists()
        if replaces:
            shutil.rmtree(before, ignore_errors=True)
            target.rename(before)
        draft.rename(target)
        sync_folder(target.parent)
        if replaces:
            shutil.rmtree(before, ignore_errors=True)
        if settled:
            seals.Sealing(target, text.encode(), *settled).end(seals.state_of(target, files_of(target)))
    size = sum(f["size"] for f in manifest["files"])
    log.info("published %s: %d files, %s", spec, len(manifest["files"]), human_bytes(size))
    retain(target.parent, keep=keep, protected={spec.digest})
    return Artifact(target, manifest)


def place(spec: Spec, folder: Path, volumes: Path, *, keep: int, replace: bool = False) -> None:
    """Publish an artifact that was made elsewhere. It is in `folder`, on the same volume, whole and verified.

    Args:
        keep: as in `publish`.
        replace: put it in the place of the one that is there; else that one stays.
    """
    target = spec.path(volumes)
    with lock(spec, volumes, default_wait_seconds()):
        if target.exists() and not replace:
            return
        _open_to_readers(folder)
        _sync(folder)
        os.utime(folder / MANIFEST)  # just used: retention keeps it
        before = target.with_name(f"{DRAFT}{target.name}-before")
        if target.exists():
            shutil.rmtree(before, ignore_errors=True)
            target.rename(before)
        folder.rename(target)
        sync_folder(target.parent)
        shutil.rmtree(before, ignore_errors=True)
    log.info("published %s", spec)
    retain(target.parent, keep=keep, protected={spec.digest})


def _open_to_readers(folder: Path) -> None:
    """safetensors writes files that only their owner may read; the pod that serves them may be another user."""
    for path in folder.rglob("*"):
        if not path.is_symlink():  # `listing` refuses it; what it points to is not ours to change
            path.chmod(0o755 if path.is_dir() else 0o644)


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
        elif path.is_dir():
            sync_folder(path)
    sync_folder(folder)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


