"""hf://: a repository on the Hugging Face hub or on a mirror of it, pinned by its commit."""

from __future__ import annotations

import fnmatch
import logging
import os
from typing import Any

from jobs.core.declarations import COMMIT, Loaded, Source
from jobs.core.errors import UserError
from jobs.relocation.connection import SILENCE_S, patiently
from jobs.relocation.sources.http import ADVICE, open_range
from jobs.relocation.sources.interface import Item, check_names

__all__ = ["ADVICE", "files", "find_pin", "open_range"]  # items have https:// URLs

log = logging.getLogger("jobs")


def find_pin(loaded: Loaded, source: Source) -> str:
    """The commit that a ref such as `main` stands for; of a source that has a commit or nothing, the newest one."""
    moving = source.revision if source.revision and not COMMIT.fullmatch(source.revision) else None
    return str(_hub_info(source.model_copy(update={"revision": moving})).sha)


def files(loaded: Loaded, source: Source) -> list[Item]:
    """The files at the pinned commit; for a dataset, those that the path behind the repository's name selects."""
    info = _hub_info(source)
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    if info.sha != source.revision:
        raise UserError(f"{source.source}: {loaded.path.name} says revision {source.revision}, but the hub answers "
                        f"for {info.sha}. Nothing was published. Is HF_ENDPOINT a mirror that ignores revisions?")
    repo_type, repo, pattern = _repository(source)
    headers = build_hf_headers()
    selected = [file for file in info.siblings or [] if _selected(file.rfilename, pattern)]
    check_names(source, [file.rfilename for file in selected])  # before URLs are made of them
    items = []
    for file in selected:
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

    def request() -> Any:
        try:
            info = api.repo_info(repo, repo_type=repo_type, revision=source.revision, files_metadata=True,
                                 timeout=SILENCE_S)
            _check_files(info.siblings or [])
            return info
        except RevisionNotFoundError:
            raise UserError(f"{source.source}: the hub has no revision {source.revision}. Run: python -m jobs pin"
                            ) from None
        except OfflineModeIsEnabled:
            raise UserError(f"{source.source}: HF_HUB_OFFLINE is set, which forbids requests to the hub. "
                            "Unset it") from None
        except HFValidationError as error:
            raise UserError(f"{source.source}: not a repository's name: {error}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{source.source}: {api.endpoint} does not answer as a hub does ({error!r}). Is "
                            "HF_ENDPOINT right?") from None

    return patiently(request, source.source, ADVICE)


def _check_files(files: list[Any]) -> None:
    """The hub's client takes any JSON for a name or a size.

    Raises:
        TypeError: one is none.
    """
    for file in files:
        sized = file.size is None or (type(file.size) is int and file.size >= 0)
        if not isinstance(file.rfilename, str) or not sized:
            raise TypeError(f"a file has the name {file.rfilename!r} and the size {file.size!r}")


def _selected(name: str, pattern: str) -> bool:
    """Whether a path is `pattern`, is below it, or matches it as a glob, where `*` does not cross a `/`."""
    if not pattern or name == pattern or name.startswith(pattern.rstrip("/") + "/"):
        return True
    names, patterns = name.split("/"), pattern.split("/")
    return len(names) == len(patterns) and all(map(fnmatch.fnmatchcase, names, patterns))
