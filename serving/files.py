"""The mounted files: `environment.yaml` and a `NAME.yaml` for each adapter, in one folder, usually one ConfigMap.

The name of a file is the alias of its adapter. An invalid file keeps its last valid content in force and does not
concern the other files. Files are parsed again only when their content changed.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from jobs.core import environment, imported, strict_yaml
from jobs.core.environment import Environment, LoadedEnvironment, Signing
from jobs.core.errors import UserError
from jobs.core.files import read_plain_file
from jobs.core.imported import Adapter, LoadedImport
from jobs.core.pipeline import LoadedPipeline
from jobs.core.plan import plan_adapter, plan_environment
from serving.refusal import Refused

SUFFIX = ".yaml"
ENVIRONMENT = "environment"  # the stem of the environment file; no adapter can have this name
NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")  # what `adapter:` allows
LARGEST = 2**20  # bytes of a file; the limit of a whole ConfigMap
NO_KEY = ("none, because the environment file cannot be read",)  # by which no signature verifies
# Under this name Kubernetes links to the folder that holds a ConfigMap's files; it replaces the link in one step.
LINK = "..data"

Read = TypeVar("Read")
Stamp = tuple[int, int, int]  # of a file: time of modification in ns, inode, size


@dataclass(frozen=True, eq=False)
class Declared:
    """The last valid content of the files. A new object whenever anything changed."""

    environment: Environment | None = None  # None: it was never valid since this process started
    # By alias, sorted. None: the file was never valid since this process started; the alias serves what was promoted.
    adapters: Mapping[str, Adapter | None] = field(default_factory=dict)
    # When (Unix time) an alias's file was written that has the content above.
    changed: Mapping[str, float] = field(default_factory=dict)
    # What is wrong with a file, by its stem.
    problems: Mapping[str, Refused] = field(default_factory=dict)
    # Where `environment` is None: the keys in the invalid file, if it has any.
    keys_of_invalid: tuple[str, ...] = ()

    @property
    def trusted_keys(self) -> tuple[str, ...]:
        """The public keys by one of which an adapter and its evaluation must be signed; empty: they need not be."""
        return self.environment.trusted_keys if self.environment else self.keys_of_invalid


@dataclass
class _File:
    """One adapter's file."""

    stamp: Stamp | None = None
    content: bytes | None = None
    environment: LoadedEnvironment | None = None  # with which the content was validated
    adapter: Adapter | None = None  # the last valid one
    changed: float = 0.0
    problem: Refused | None = None


class Files:
    """Reads the folder again and again. Not safe for use by several threads at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.declared = Declared()
        # Of the folder, when it was read last; None: it could not be read.
        self._stamps: dict[str, Stamp] | tuple[str, Stamp] | tuple[()] | None = ()
        self._environment: LoadedEnvironment | None = None
        self._environment_file = _File()
        self._adapters: dict[str, _File] = {}
        self._keys_of_invalid: tuple[str, ...] = ()
        self._gone: set[str] = set()  # files that were missing when the folder was read last

    def read(self) -> Declared:
        """The files' last valid content; the same object as before if nothing changed."""
        linked = self._link()
        if linked is not None and linked == self._stamps:
            return self.declared
        files = self._scan()
        if linked is None and files == self._stamps and not self._gone:
            return self.declared
        self._stamps = linked or files
        if files is None or ENVIRONMENT not in files:
            # Not the folder of an environment at this moment: its adapters were not removed either.
            problem = Refused("environment file", f"{self.folder}: there must be an {environment.FILE} and a "
                                                  "NAME.yaml for each adapter")
            self._environment_file = _File(problem=problem)
        else:
            self._read_environment(files[ENVIRONMENT])
        names = {stem: stamp for stem, stamp in (files or {}).items() if stem != ENVIRONMENT}
        for stem, stamp in names.items():
            self._read_adapter(stem, stamp)
        if files is not None and ENVIRONMENT in files:
            gone = self._adapters.keys() - names.keys()
            # An editor may be replacing it; Kubernetes replaces all files in one step.
            for stem in gone if linked else gone & self._gone:
                del self._adapters[stem]
            self._gone = self._adapters.keys() - names.keys()
        self.declared = self._declare()
        return self.declared

    def _link(self) -> tuple[str, Stamp] | None:
        """Where Kubernetes' link points to; None in a folder of plain files."""
        try:
            return os.readlink(self.folder / LINK), _stamp((self.folder / LINK).stat())  # noqa: PTH115 - as text
        except OSError:
            return None

    def _scan(self) -> dict[str, Stamp] | None:
        """The files by stem, without hidden ones; None if the folder cannot be read."""
        found = {}
        try:
            with os.scandir(self.folder) as entries:
                for entry in entries:
                    stem = entry.name.removesuffix(SUFFIX)
                    if stem == entry.name or entry.name.startswith("."):
                        continue
                    try:
                        status = entry.stat()  # follows Kubernetes' links
                    except OSError:
                        continue
                    if not stat.S_ISDIR(status.st_mode):
                        found[stem] = _stamp(status)
        except OSError:
            return None
        return found

    def _read_environment(self, stamp: Stamp) -> None:
        known, file = self._environment_file, self.folder / environment.FILE
        if known.stamp == stamp:
            return
        content = None
        try:
            content = _content(file)
            if content != known.content:
                self._environment = _valid(file, lambda: environment.load(file))
        except UserError as error:
            self._environment_file = _File(stamp, problem=Refused("environment file", str(error)))
            self._keys_of_invalid = _keys(file, content or b"")
        else:
            self._environment_file = _File(stamp, content)

    def _read_adapter(self, stem: str, stamp: Stamp) -> None:
        known, file, shared = self._adapters.setdefault(stem, _File()), self.folder / f"{stem}{SUFFIX}", \
            self._environment
        if known.stamp == stamp and known.environment is shared:
            return
        known.stamp = stamp
        try:
            content = _content(file)
            if content == known.content and known.environment is shared:
                return
            known.content, known.environment, known.problem = content, shared, None
            if not NAME.fullmatch(stem):
                raise Refused("name", f"{file}: the name of a file must be an adapter's: 1 to 63 of a-z, 0-9 and -, "
                                      "not at the ends")
            if shared is None:
                return
            loaded = _valid(file, lambda: imported.load_any(file, shared)).pipeline
            if loaded.adapter != stem:
                raise Refused("name", f"{file}: `adapter` is {loaded.adapter}, but the file's name says {stem}; they "
                                      "must be the same")
            known.adapter, known.changed = loaded, stamp[0] / 1e9
        except UserError as error:
            known.problem = Refused("pipeline file", str(error))
        except Refused as refused:
            known.problem = refused

    def _declare(self) -> Declared:
        adapters = {stem: file for stem, file in sorted(self._adapters.items()) if NAME.fullmatch(stem)}
        problems = {stem: file.problem for stem, file in sorted(self._adapters.items()) if file.problem}
        if self._environment_file.problem:
            problems = {ENVIRONMENT: self._environment_file.problem, **problems}
        return Declared(self._environment.environment if self._environment else None,
                        MappingProxyType({stem: file.adapter for stem, file in adapters.items()}),
                        MappingProxyType({stem: file.changed for stem, file in adapters.items() if file.adapter}),
                        MappingProxyType(problems), self._keys_of_invalid)


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_mtime_ns, status.st_ino, status.st_size


def _content(file: Path) -> bytes:
    try:
        return read_plain_file(file, LARGEST, follow_links=True)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from None


def _keys(file: Path, content: bytes) -> tuple[str, ...]:
    """The trusted keys of an environment file that is invalid. A mistake in another key must not switch the signatures
    off; where it cannot be known which keys are meant, none is trusted."""
    if b"signing" not in content:
        return ()
    try:
        values = strict_yaml.read(file).values.get("signing")
        return () if values is None else Signing.model_validate(values).keys
    except Exception:  # the problem is reported as that of the whole file
        return NO_KEY


def _valid(file: Path, load: Callable[[], Read]) -> Read:
    """What `load` reads from a file. Raises `UserError` for anything that is wrong with the file: one file must not
    stop the others."""
    try:
        loaded = load()
        if isinstance(loaded, LoadedEnvironment):
            plan_environment(loaded.environment)
        elif isinstance(loaded, LoadedPipeline | LoadedImport):
            plan_adapter(loaded.pipeline)  # computes every digest
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{file}: cannot be read: {str(error)[:200] or type(error).__name__}") from None
    return loaded
