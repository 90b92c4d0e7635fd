"""Sources: what a pinned source holds, and the pin that says exactly which version of it is meant.

`listing` says which files a source holds, with the digest that each must have; download.py brings them here.
"""

from __future__ import annotations

import fnmatch
import hashlib
import logging
import os
from pathlib import Path, PurePosixPath
from typing import Any

from jobs.core.artifacts import canonical
from jobs.core.errors import UserError
from jobs.core.files import sha256_of, visible_files
from jobs.core.pipeline import Loaded, Source
from jobs.relocation.download import SILENCE_S, Item, mismatch, patiently, shown

log = logging.getLogger("jobs")


def path_sha256(path: Path) -> str:
    """The pin of a `file:` source: of a file the sha256 of its bytes, in hex; of a folder `folder_sha256`."""
    return folder_sha256(path) if path.is_dir() else sha256_of(path)


def folder_sha256(folder: Path) -> str:
    """The pin of a folder: the sha256 of the canonical JSON of its sorted [[path, sha256], …], in hex.

    Hidden files do not count (a mounted ConfigMap has its own bookkeeping there); links to files count as the files.
    """
    return _pin([(path, sha256_of(folder / path)) for path in visible_files(folder)])


def _pin(digests: list[tuple[str, str]]) -> str:
    return hashlib.sha256(canonical(sorted(digests))).hexdigest()


def hub_commit(source: Source) -> str:
    """The commit that `source.revision`, or without one the hub's default branch, stands for: the pin of a repository.

    Raises:
        UserError, RetryableError: as `listing`.
    """
    return str(_hub_info(source).sha)


def listing(loaded: Loaded, source: Source) -> list[Item]:
    """The files that a source holds, sorted by name; for a folder, after its pin was checked.

    Raises:
        UserError: when there is nothing, it may not be read, or it is not what the pin says.
        RetryableError: when the hub does not recover.
    """
    if source.scheme == "hf":
        items = _in_repository(source)
    elif source.scheme == "file":
        items = _on_this_machine(loaded.resolve(source), source)
    else:
        items = [Item(shown(source.source).rpartition("/")[2], source.source, sha256=source.sha256)]
    for item in items:
        path = PurePosixPath(item.name)
        if not item.name or path.is_absolute() or ".." in path.parts:
            raise UserError(f"{shown(source.source)}: {item.name!r} cannot be the name of a file")
    return sorted(items, key=lambda item: item.name)


def _on_this_machine(path: Path, source: Source) -> list[Item]:
    for file in (path, *(path / name for name in visible_files(path))):
        if file.exists() and not os.access(file, os.R_OK):
            raise UserError(f"{file}: this user may not read it")
    if path.is_file():
        return [Item(path.name, str(path), path.stat().st_size, source.sha256)]
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder ({source.source} is looked for beside pipeline.yaml)")
    items = [Item(name, str(path / name), (path / name).stat().st_size, sha256_of(path / name))
             for name in visible_files(path)]
    if not items:
        raise UserError(f"{path}: the folder holds no files")
    found = _pin([(item.name, str(item.sha256)) for item in items])
    if found != source.sha256:
        raise UserError(mismatch(str(path), "pipeline.yaml", str(source.sha256), found))
    return items


def _in_repository(source: Source) -> list[Item]:
    """The files at the pinned commit; for a dataset, those that the path behind the repository's name selects."""
    info = _hub_info(source)
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    if info.sha != source.revision:
        raise UserError(f"{source.source}: pipeline.yaml says revision {source.revision}, but the hub answers for "
                        f"{info.sha}. Nothing was published. Is HF_ENDPOINT a mirror that ignores revisions?")
    repo_type, repo, pattern = _repository(source)
    headers = build_hf_headers()
    items = []
    for file in info.siblings or []:
        if _selected(file.rfilename, pattern):
            url = hf_hub_url(repo, file.rfilename, repo_type=repo_type, revision=info.sha, endpoint=_hub_endpoint())
            sha256, git_sha1 = (file.lfs.sha256, None) if file.lfs else (None, file.blob_id)
            items.append(Item(file.rfilename, url, file.size, sha256, git_sha1, "the hub", headers))
    if not items:
        there = ", ".join(sorted(f.rfilename for f in info.siblings or [])[:10]) or "nothing"
        raise UserError(f"{source.source}: no file is selected by {pattern!r}; the repository holds {there}")
    blind = [item.name for item in items if not (item.sha256 or item.git_sha1)]
    if blind:
        log.warning("%s: the hub gives no digest for %s: only sizes are checked", source.source, ", ".join(blind[:5]))
    return items


def _repository(source: Source) -> tuple[str, str, str]:
    """What an hf:// source names: the type of repository, OWNER/NAME, and the path or glob of files in it."""
    parts = source.location.split("/")
    repo_type = "dataset" if parts[0] == "datasets" else "model"
    names, path = (parts[1:3], parts[3:]) if repo_type == "dataset" else (parts[:2], parts[2:])
    if len(names) != 2 or not all(names) or (repo_type == "model" and path):
        raise UserError(f"{source.source}: must be hf://OWNER/NAME for a model, hf://datasets/OWNER/NAME[/PATH] for a "
                        "dataset")
    return repo_type, "/".join(names), "/".join(path)


def _hub_endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or None


def _hub_info(source: Source) -> Any:
    """The hub's description of a repository at a revision: the commit, and every file with size and digest."""
    repo_type, repo, _ = _repository(source)
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # read once, when huggingface_hub is imported
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled, RevisionNotFoundError

    api = HfApi(endpoint=_hub_endpoint())

    def ask() -> Any:
        try:
            return api.repo_info(repo, repo_type=repo_type, revision=source.revision, files_metadata=True,
                                 timeout=SILENCE_S)
        except RevisionNotFoundError:
            raise UserError(f"{source.source}: the hub has no revision {source.revision}. Run: python -m jobs pin"
                            ) from None
        except OfflineModeIsEnabled:
            raise UserError(f"{source.source}: HF_HUB_OFFLINE is set, so the hub may not be asked. Unset it") from None
        except HFValidationError as error:
            raise UserError(f"{source.source}: not a repository's name: {error}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{source.source}: {api.endpoint} does not answer as a hub does ({error!r}). Is "
                            "HF_ENDPOINT right?") from None

    return patiently(ask, source.source)


def _selected(name: str, pattern: str) -> bool:
    """Whether a path is `pattern`, is below it, or matches it as a glob, where `*` does not cross a `/`."""
    if not pattern or name == pattern or name.startswith(pattern.rstrip("/") + "/"):
        return True
    names, patterns = name.split("/"), pattern.split("/")
    return len(names) == len(patterns) and all(map(fnmatch.fnmatchcase, names, patterns))
