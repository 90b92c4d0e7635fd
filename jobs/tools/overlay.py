"""The files of an overlay that people edit: its environment.yaml, and a pipeline.yaml in the folder of each adapter."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from jobs.core import environment, imported, pipeline
from jobs.core.environment import LoadedEnvironment
from jobs.core.errors import UserError
from jobs.core.imported import LoadedAdapter
from jobs.core.pipeline import ADAPTERS, LoadedPipeline


@dataclass(frozen=True)
class Files:
    """Where the files are. `pipelines` are those that were named: all, or that of one adapter, which is `adapter`."""

    folder: Path
    environment: Path
    pipelines: list[Path]
    adapter: str | None = None

    @property
    def names(self) -> list[str]:
        """The names of the folders of `pipelines`."""
        return [file.parent.absolute().name for file in self.pipelines]


@dataclass(frozen=True)
class Overlay:
    """The valid files of an overlay; `adapters` by the name of their folder."""

    folder: Path
    environment: LoadedEnvironment
    adapters: dict[str, LoadedAdapter]


def trained(adapters: Mapping[str, LoadedAdapter]) -> dict[str, LoadedPipeline]:
    """Of adapters, those that are trained here."""
    return {name: loaded for name, loaded in adapters.items() if isinstance(loaded, LoadedPipeline)}


def find(path: Path) -> Files:
    """The files that a person means by an overlay's folder, or by the folder of one of its adapters.

    Raises:
        UserError: there are none.
    """
    try:
        if path.is_file():
            path = path.parent
        if (path / pipeline.FILE).exists() and not ((path / environment.FILE).exists() and (path / ADAPTERS).is_dir()):
            file = path / pipeline.FILE
            shared = pipeline.find_environment(file)
            return Files(shared.parent, shared, [file], None if shared.parent == path else path.absolute().name)
        if not (path / environment.FILE).exists():
            raise UserError(f"{path}: has neither {environment.FILE} nor {pipeline.FILE}. Name an overlay, e.g. "
                            f"overlays/kind, or the folder of an adapter, overlays/kind/{ADAPTERS}/NAME")
        return Files(path, path / environment.FILE, pipelines(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def pipelines(folder: Path) -> list[Path]:
    """The pipeline files of all adapters of an overlay."""
    found = (folder / ADAPTERS).glob(f"*/{pipeline.FILE}")
    return sorted(file for file in found if not file.parent.name.startswith("."))


def load(path: Path, *, pinned: bool = True, only: Collection[str] = ()) -> Overlay:
    """Read and validate the files of `find(path)`.

    Args:
        only: the adapters that are needed, by their folders; the others' files are not read. Empty: all.
    Raises:
        UserError: with every problem of every file, a line each.
    """
    files = find(path)
    if only:
        needed = [file for file, name in zip(files.pipelines, files.names, strict=True) if name in only]
        files = replace(files, pipelines=needed)
    shared, adapters, problems = read(files, pinned=pinned)
    if problems or shared is None:
        raise UserError("\n".join(problems))
    return Overlay(files.folder, shared, adapters)


def read(files: Files, *, pinned: bool = True) -> tuple[LoadedEnvironment | None, dict[str, LoadedAdapter], list[str]]:
    """The environment and the adapters whose files are valid, and every problem of the others."""
    shared, adapters, problems = None, dict[str, LoadedAdapter](), list[str]()
    try:
        shared = environment.load(files.environment, pinned=pinned)
    except UserError as error:
        if files.environment.exists() or not files.pipelines:  # else `pipeline.load` reports it, or what is to do first
            problems += str(error).splitlines()
    for file, name in zip(files.pipelines, files.names, strict=True):
        try:
            adapters[name] = imported.load_any(file, shared or files.environment, pinned=pinned)
        except UserError as error:
            problems += str(error).splitlines()
    return shared, adapters, list(dict.fromkeys(problems))
