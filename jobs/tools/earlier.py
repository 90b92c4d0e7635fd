"""An overlay as it was in an earlier revision. What cannot be read of it is taken as new, with a note."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path

from jobs.core import declarations, environment, pipeline, plan
from jobs.core.environment import Environment
from jobs.core.errors import UserError
from jobs.core.imported import Adapter
from jobs.core.pipeline import Pipeline
from jobs.tools import overlay, pods, revision
from jobs.tools.changes import Side
from jobs.tools.pods import Manifest
from jobs.tools.revision import GitError, Revision


def read(found: Revision, folder: Path, place: Path, notes: list[str]) -> Side | None:
    """The overlay in an earlier revision, or None if it cannot be compared with.

    Args:
        folder: the overlay in the working tree.
        place: an empty folder to write to.
        notes: gets a line for each thing that could not be read.
    """
    tree = place / "tree"
    try:
        revision.export(found, tree)
    except GitError as error:
        notes.append(f"everything is taken as new: {found} cannot be read: {error}")
        return None
    old = tree / folder.resolve().relative_to(found.repository.resolve())

    def readable(message: object) -> str:
        return str(message).replace(f"{tree}/", f"{found.name}:").replace("\n", "; ")

    if not (old / environment.FILE).is_file() and not (old / pipeline.FILE).is_file():
        notes.append(f"everything is new: {folder} is not in {found}")
        return None
    try:
        shared, adapters, problems = _files(old)
    except UserError as error:
        notes.append(f"everything is taken as new: {readable(error)}")
        return None
    notes += [f"an adapter is taken as new: {readable(problem)}" for problem in problems]
    try:
        manifests: list[Manifest] | None = pods.render(old)
    except UserError as error:
        notes.append(f"all Jobs are taken as new: {readable(error)}")
        manifests = None
    return Side(shared, adapters, manifests, _recipes(tree, found))


def _files(folder: Path) -> tuple[Environment, Mapping[str, Adapter], list[str]]:
    """The environment and the adapters of an overlay, and what is wrong with other adapters. Pins may be missing.

    Raises:
        UserError: the environment is invalid.
    """
    if not (folder / environment.FILE).is_file():
        return _one_file(folder / pipeline.FILE)
    shared, adapters, problems = overlay.read(overlay.find(folder), pinned=False)
    if shared is None:
        raise UserError("\n".join(problems))
    return shared.environment, {each.pipeline.adapter: each.pipeline for each in adapters.values()}, problems


def _one_file(file: Path) -> tuple[Environment, Mapping[str, Adapter], list[str]]:
    """The same of an overlay from before there was an environment.yaml: one pipeline.yaml has everything. Moving its
    keys to two files changed no digest."""
    document = declarations.read(file, "adapter")
    keys = {key: value for key, value in document.values.items() if key in Environment.model_fields}
    shared = declarations.validate(document, Environment, keys)
    rest = {key: value for key, value in document.values.items() if key not in keys}
    loaded = declarations.validate(document, Pipeline, rest | {"environment": shared})
    return shared, {loaded.adapter: loaded}, []


def _recipes(tree: Path, found: Revision) -> Mapping[str, int] | None:
    """The recipe numbers of the revision's code, if the code that runs is of the same repository and has others."""
    running = Path(plan.__file__).resolve()
    if not running.is_relative_to(found.repository.resolve()):
        return None
    file = tree / running.relative_to(found.repository.resolve())
    try:
        module = ast.parse(file.read_text(encoding="utf-8"))
        values = [ast.literal_eval(node.value) for node in module.body
                  if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "RECIPES"]
    except (OSError, ValueError, SyntaxError):
        return None
    return values[0] if values and values[0] != plan.RECIPES else None
