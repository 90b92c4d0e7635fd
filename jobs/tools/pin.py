"""Fill or refresh the pins in an overlay's files, like a lock file: what runs is then exactly what is in git.

Files and folders get the sha256 of what is there now; a missing pin of a URL or a hub repository is looked up, and a
hub ref such as `main` becomes the commit it stands for. Existing pins stay; `--update` moves them to the
newest. Only the pins change in the file: comments and layout stay as they are.
"""

from __future__ import annotations

import functools
import logging
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from jobs.core import declarations, strict_yaml
from jobs.core.declarations import Loaded, Source
from jobs.core.errors import UserError
from jobs.core.files import write_atomically
from jobs.core.sources import SCHEMES
from jobs.tools import overlay

log = logging.getLogger("jobs")


def run(path: Path, *, update: bool = False) -> None:
    """Pin every source of the overlay's files, or of the adapter whose folder is named, and print what changed.

    Raises:
        UserError: a file is invalid, or a source does not exist.
        RetryableError: a server does not answer. In either case, no file has changed.
    """
    files = overlay.find(path)
    named = overlay.load(path, pinned=False)
    of_adapters = [(loaded, loaded.pipeline.sources()) for loaded in named.adapters.values()]
    of_environment = [] if files.adapter else [(named.environment, named.environment.environment.sources())]
    edits: list[tuple[Path, str, list[str]]] = []
    for loaded, sources in [*of_environment, *of_adapters]:
        if edit := _edit(loaded, sources, update=update):
            edits.append((loaded.path, *edit))
    _write({file: text for file, text, _ in edits})
    # What was written must load; anything else is our mistake and must be seen here.
    require_pinned(overlay.load(path, pinned=not files.adapter))
    for file, _, changes in edits:
        for change in changes:
            log.info("%s: %s", file, change)
    count = sum(len(changes) for _, _, changes in edits)
    log.info("%s: %s", path, f"{count} pin(s) written; review and commit them" if count else "every source is pinned")


def require_pinned(named: overlay.Overlay) -> None:
    """Every source of the adapters is pinned; the environment is another's where only an adapter was named."""
    for loaded in named.adapters.values():
        declarations.require_pins(strict_yaml.read(loaded.path), loaded.pipeline.sources())


def _edit(loaded: Loaded, sources: Mapping[str, Source], *, update: bool) -> tuple[str, list[str]] | None:
    """The text of the file with its pins, and what changes in words; None if nothing does."""
    written: dict[tuple[str, ...], str] = {}
    changes = []
    for name, source in sources.items():
        for key, value in pins(loaded, name, source, update=update).items():
            before = getattr(source, key, None)
            if value != before:
                at = (*_mapping_of(name), key)
                written[at] = value
                changes.append(f"{'.'.join(at)}: {before or 'unset'} -> {value}")
    return (with_values(loaded.path.read_bytes().decode(), written, loaded.path), changes) if changes else None


def _mapping_of(name: str) -> list[str]:
    """The keys of the mapping that has a source and its pin: an imported adapter's are those of the file itself."""
    return [] if name == "source" else name.split(".")


def _write(texts: Mapping[Path, str]) -> None:
    """Write all files, or none."""
    before = {file.resolve(): file.read_bytes().decode() for file in texts}
    written: list[Path] = []
    try:
        for file, text in texts.items():
            write_atomically(file.resolve(), text)
            written.append(file.resolve())
    except BaseException:
        for file in written:
            write_atomically(file, before[file])
        raise


def pins(loaded: Loaded, name: str, source: Source, *, update: bool) -> dict[str, str]:
    """The pins that `source`, at the key `name`, should have."""
    from jobs.relocation import sources

    scheme = SCHEMES[source.scheme]
    if scheme.pin is None or (source.unpinned() is None and not update and not scheme.local):
        return {}
    try:
        value = sources.find_pin(loaded, source)
    except UserError as error:
        raise UserError(f"{loaded.path}: {name}: {error}") from None
    found: dict[str, str] = {scheme.pin: value}
    if name == "base_model" and not scheme.local:
        found["architecture"] = find_architecture(loaded, source.model_copy(update=found))
    return found


def find_architecture(loaded: Loaded, source: Source) -> str:
    """The architecture that a pinned model's `config.json` names, so that `check` can check it offline."""
    from jobs.core import models
    from jobs.relocation import download, sources

    config = [item for item in sources.listing(loaded, source) if item.name == "config.json"]
    with tempfile.TemporaryDirectory() as folder:
        download.fetch(config, Path(folder))
        return models.architecture(Path(folder))


def with_values(text: str, values: Mapping[tuple[str, ...], str], file: Path) -> str:
    """`text`, the content of `file`, with the value at each of the paths.

    Raises:
        UserError: its layout does not let them be set one by one; has the values, for a person to write them.
    """
    try:
        for keys, value in values.items():
            text = set_value(text, list(keys), value)
        found = yaml.safe_load(text)
        if all(functools.reduce(_item, keys, found) == value for keys, value in values.items()):
            return text
    except (yaml.YAMLError, StopIteration, LookupError, TypeError, ValueError):
        pass  # reported below
    wanted = ", ".join(f"{'.'.join(keys)}: {value}" for keys, value in values.items())
    raise UserError(f"{file}: the pins cannot be written into its layout. Write them yourself: {wanted}")


def _item(part: Any, key: str) -> Any:
    """The value at a key of a mapping, or at an index of a list."""
    return part[int(key)] if isinstance(part, list) else part[key]


def set_value(text: str, keys: list[str], value: str) -> str:
    """`text`, a YAML mapping, with the value at `keys` replaced, or added after the `source` of its mapping.

    In a list, a key is the index.

    Edits the text and not the parsed values, so that comments, order and quoting survive.
    """
    node: Any = yaml.compose(text, Loader=yaml.SafeLoader)
    for key in keys[:-1]:
        if isinstance(node, yaml.SequenceNode):
            node = node.value[int(key)]
        else:
            node = next(child for name, child in node.value if name.value == key)
    for name, present in node.value:
        if name.value != keys[-1]:
            continue
        if present.start_mark.index == present.end_mark.index:  # the key stands there without a value
            end = name.end_mark.index
            return f"{text[:end]}: {value}{re.sub('^ *:', '', text[end:])}"
        return text[: present.start_mark.index] + value + text[present.end_mark.index:]
    after = next(child for name, child in node.value if name.value == "source").end_mark.index
    after = len(text[:after].rstrip())  # of a block of lines, the mark is at the next key
    if node.flow_style:
        return f"{text[:after]}, {keys[-1]}: {value}{text[after:]}"
    end = text.find("\n", after)
    end = len(text) if end < 0 else end
    newline = "\r\n" if text[:end].endswith("\r") else "\n"
    end -= len(newline) - 1
    indent = " " * node.value[0][0].start_mark.column
    return f"{text[:end]}{newline}{indent}{keys[-1]}: {value}{text[end:]}"
