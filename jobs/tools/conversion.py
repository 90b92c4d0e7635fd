"""Converts an overlay of the earlier form, in which one pipeline.yaml held the adapter and what all adapters share.

The text is divided by its top-level keys, so that comments stay where they belong.
"""

from __future__ import annotations

import copy
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from jobs.core import declarations, environment, pipeline
from jobs.core.declarations import Loaded, Source
from jobs.core.environment import Environment
from jobs.core.errors import UserError
from jobs.core.pipeline import ADAPTERS, Pipeline, PipelineFile
from jobs.core.strict_yaml import Document
from jobs.tools import entries, kustomization, pin, yaml_text
from jobs.tools.entries import SERVED
from jobs.tools.pods import KUSTOMIZATIONS

ENVIRONMENT_HEADER = """\
# What all adapters of this environment share: the base model, the reference model, and the server.
#   python -m jobs check {folder}    validates it and every adapter, without network or cluster
#   python -m jobs pin {folder}      fills in the pins after a source changed

"""
OUTDATED = "the one file to edit"  # in the comment at the top of the earlier form's examples


@dataclass(frozen=True)
class Converted:
    """The parts of a file of the earlier form."""

    pipeline: str  # the text of the adapter's pipeline.yaml
    data: dict[str, Path | str]  # each further file of its folder: where it is now
    environment: str | None  # the text of environment.yaml; None if the overlay has one


def convert(file: Path, folder: Path, name: str, header: str) -> Converted:
    """Divide a pipeline file of the earlier form.

    Args:
        file: the file.
        folder: the overlay that the adapter becomes a part of.
        name: the adapter's name.
        header: the comment at the top of its pipeline.yaml.
    Raises:
        UserError: it is not valid, or does not fit into this overlay.
    """
    file = pipeline.find(file)
    document = declarations.read(file, "adapter")
    shared = {key: value for key, value in document.values.items() if key in Environment.model_fields}
    own = {key: value for key, value in document.values.items() if key not in shared}
    if not shared:
        raise UserError(f"{file}: is not of the earlier form: it has none of {', '.join(Environment.model_fields)}. To "
                        f"use it, copy it into the folder that `python -m jobs new {folder} {name}` makes")
    found = declarations.validate(document, Environment, shared)
    parsed = declarations.validate(document, PipelineFile, own)
    declarations.validate(document, Pipeline, own | {"environment": found})
    if parsed.adapter != name:
        raise UserError(f"{file}:{document.line_of(['adapter'])}: the adapter's name is {parsed.adapter}. Run: "
                        f"python -m jobs new {folder} {parsed.adapter} --from {file}. docs/adapters.md explains how to "
                        "rename an adapter")
    text = document.file.read_bytes().decode("utf-8-sig")
    texts = divided(text, document.values)
    data, text = with_data(file, header + texts[False], parsed)
    shared_text = ENVIRONMENT_HEADER.format(folder=folder) + texts[True]
    if (folder / environment.FILE).exists():
        require_equal(found, document, environment.load(folder, pinned=False))
        return Converted(text, data, None)
    require_models(file, folder, found)
    return Converted(text, data, shared_text)


def divided(text: str, values: Mapping[str, Any]) -> dict[bool, str]:
    """The text of the adapter's part (False) and of the environment's (True), with comments and layout. Where the
    layout does not let them be told apart, they are written anew, without comments."""
    parts = {False: "", True: ""}
    try:
        for shared, block in _blocks(text):
            parts[shared] += block
    except (yaml.YAMLError, LookupError):
        parts = {False: "", True: ""}
    for shared in parts:
        wanted = {key: value for key, value in values.items() if (key in Environment.model_fields) == shared}
        parts[shared] = parts[shared].strip("\r\n") + "\n"
        try:
            same = yaml.safe_load(parts[shared]) == yaml.safe_load(yaml.safe_dump(_only(text, shared)))
        except yaml.YAMLError:  # e.g. an alias whose anchor is in the other part
            same = False
        if not same:
            parts[shared] = yaml.safe_dump(wanted, sort_keys=False, allow_unicode=True)
    return parts


def _only(text: str, shared: bool) -> dict[str, Any]:
    return {key: value for key, value in yaml.safe_load(text).items() if (key in Environment.model_fields) == shared}


def _blocks(text: str) -> Iterator[tuple[bool, str]]:
    """Each piece of the text, and whether it belongs to the environment.

    A comment directly above a key belongs to that key. One that stands alone belongs to what is above it, unless it
    shows a key of the environment, such as `#   serving: {mode: merged}`.
    """
    root = yaml_text.node_at(text, [])
    if not isinstance(root, yaml.MappingNode) or root.flow_style:
        raise LookupError("no block of keys")
    lines = text.splitlines(keepends=True)
    starts = [key.start_mark.line for key, _ in root.value]
    above = []  # the first line of the comment directly above each key
    for start in starts:
        first = start
        while first > 0 and lines[first - 1].startswith("#"):
            first -= 1
        above.append(first)
    yield from ((False, piece) for piece, _ in _paragraphs(lines[:above[0]])
                if OUTDATED not in piece and piece.strip() != "---")
    for (key, _), start, first, end in zip(root.value, starts, above, [*above[1:], len(lines)], strict=True):
        shared = key.value in Environment.model_fields
        yield shared, "".join(lines[first:start + 1])
        for piece, alone in _paragraphs(lines[start + 1:end]):
            yield (shared or _shows_shared(piece)) if alone else shared, piece


def _paragraphs(lines: list[str]) -> Iterator[tuple[str, bool]]:
    """The lines in pieces that end with blank lines, and whether a piece is a comment that stands alone."""
    piece: list[str] = []
    for line in [*lines, None]:
        if piece and (line is None or (not piece[-1].strip() and line.strip())):
            filled = [each for each in piece if each.strip()]
            yield "".join(piece), bool(filled) and all(each.startswith("#") for each in filled)
            piece = []
        if line is not None:
            piece.append(line)


def _shows_shared(comment: str) -> bool:
    keys = tuple(f"{key}:" for key in Environment.model_fields)
    return any(line.lstrip("# ").startswith(keys) for line in comment.splitlines())


def with_data(file: Path, text: str, parsed: PipelineFile) -> tuple[dict[str, Path | str], str]:
    """The data that moves into the adapter's folder, by its name there, and the text that names it there.

    Raises:
        UserError: it does not exist, or two have one name.
    """
    data: dict[str, Path | str] = {}
    for key, source in _local(parsed):
        path = Loaded(file).resolve(source)
        if not path.exists():
            raise UserError(f"{file}: {key}: {path} does not exist")
        name = kustomization.normal(path).name
        if data.get(name, path) != path or name in (pipeline.FILE, *KUSTOMIZATIONS):
            raise UserError(f"{file}: {key}: another file of the adapter's folder is named {name} too. Rename {path}")
        data[name] = path
        if source.location != name:
            text = pin.with_values(text, {(*key.split("."), "source"): f"file:{name}"}, file)
    return data, text


def _local(parsed: PipelineFile) -> list[tuple[str, Source]]:
    return [(key, source) for key, source in parsed.sources().items() if source.scheme == "file"]


def require_equal(found: Environment, document: Document, there: environment.LoadedEnvironment) -> None:
    """The overlay's environment must be the one of the file.

    Raises:
        UserError: with every value that differs.
    """
    one, other = _flat(found.model_dump()), _flat(there.environment.model_dump())
    for values in (one, other):
        del values["base_model.architecture"]  # `pin` records it; no artifact depends on it
    differ = [f"{key}: {_shown(one.get(key))} there, {_shown(other.get(key))} here" for key in {**one, **other}
              if one.get(key) != other.get(key)]
    if differ:
        raise UserError(f"{document.file}: is for another environment than {there.path}: {'; '.join(differ)}. Change "
                        "the one or the other, or convert it in an overlay of its own")


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{before}{key}.") if isinstance(value, dict) else {f"{before}{key}": value}
    return flat


def _shown(value: Any) -> str:
    return "unset" if value is None else str(value)


def require_models(file: Path, folder: Path, found: Environment) -> None:
    """Models in a folder beside the file must be there beside environment.yaml too.

    Raises:
        UserError: they are elsewhere.
    """
    for key, source in found.sources().items():
        path = folder / source.location
        if source.scheme == "file" and (not path.exists() or path.resolve() != Loaded(file).resolve(source).resolve()):
            raise UserError(f"{file}: {key}: {source.source} is relative to this file. Put the model at {path}, or "
                            f"the file into {folder}")


def with_adapter(file: Path, name: str) -> str:
    """The text of the overlay's kustomization in the form of today, with the adapter's entries.

    Raises:
        UserError: its layout does not let it be converted; has what is to be changed, for a person to do it.
    """
    content = kustomization.read(file)
    generators = {generator.get("name"): number
                  for number, generator in enumerate(kustomization.mappings(content, "configMapGenerator"))}
    if SERVED in generators:
        return entries.with_adapter(file, name)
    text, wanted = file.read_bytes().decode(), copy.deepcopy(content)
    entry, served = f"{ADAPTERS}/{name}", [environment.FILE, f"{name}.yaml={ADAPTERS}/{name}/{pipeline.FILE}"]
    try:
        text, base = _with_base(file, text, wanted)
        wanted["resources"].append(entry)
        text = yaml_text.append(text, ["resources"], entry)
        for before, after, files in (("pipeline", "environment", [environment.FILE]),
                                     ("serving-pipeline", SERVED, served)):
            number = generators[before]
            generator = wanted["configMapGenerator"][number]
            if "behavior" in generator:
                raise LookupError("it changes a ConfigMap of the overlay below")
            generator |= {"name": after, "files": files}
            text = yaml_text.replace(text, ["configMapGenerator", number, "name"], after)
            text = yaml_text.replace(text, ["configMapGenerator", number, "files"], f"[{', '.join(files)}]")
        if base and entries.holds(text, wanted):
            return text
    except (yaml.YAMLError, LookupError, TypeError, AttributeError):
        pass  # reported below
    raise UserError(
        f"{file}: cannot be converted by itself. Change it so that `resources` lists base/environment (not base), "
        f"serving and {entry}; that the generator `pipeline` is `environment`, of {environment.FILE}; and that the "
        f"generator `serving-pipeline` is `{SERVED}`, of {' and '.join(served)}. An overlay that was built on another "
        "one lists these itself: see overlays/kind-smollm2/kustomization.yaml. Then run this again")


def _with_base(file: Path, text: str, wanted: dict[str, Any]) -> tuple[str, bool]:
    """The text with base/environment in place of base, and whether it was there."""
    for number, part in enumerate(wanted["resources"]):
        place = file.parent / str(part)
        if kustomization.find(place / "environment") and (not kustomization.find(place) or place.name == "base"):
            wanted["resources"][number] = f"{str(part).rstrip('/')}/environment"
            return yaml_text.replace(text, ["resources", number], wanted["resources"][number]), True
    return text, any(Path(str(part)).parts[-2:] == ("base", "environment") for part in wanted["resources"])


def remove(file: Path, folder: Path, data: Iterable[Path | str], undo: ExitStack) -> list[Path]:
    """Take the converted file and its data out of the overlay's folder; what lies elsewhere stays.

    Returns:
        folders with what was taken out, to be deleted when nothing can fail any more.
    """
    file = pipeline.find(file)
    if file.parent.resolve() != folder.resolve():
        return []
    trash = folder / f".converted.{secrets.token_hex(8)}"
    trash.mkdir()
    undo.callback(trash.rmdir)
    needed = {path for each, content in kustomization.own(folder).items() if each.parent == folder.resolve()
              for generator in kustomization.mappings(content, "configMapGenerator")
              for _, path in kustomization.generated_from(each, generator)}
    for path in [file, *(path for path in data if isinstance(path, Path))]:
        if path.parent.resolve() == folder.resolve() and kustomization.normal(path) not in needed:
            path.rename(trash / path.name)
            undo.callback((trash / path.name).rename, path)
    return [trash]
