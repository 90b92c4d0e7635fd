"""Reads a YAML file that people edit: bounded in size and effort, without duplicate keys, and with line numbers.

PyYAML raises far more than its own errors for hostile or mistyped input (ValueError for the date `2026-99-99`,
TypeError for `{[a]: b}`, KeyError for `!!bool x`, RecursionError for many brackets), and a few lines of aliases can
expand to gigabytes. Here all of that is a `UserError` that names file and line.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from jobs.core.errors import UserError
from jobs.core.files import read_plain_file

CONFIG_MAP_BYTES = 2**20  # Kubernetes refuses more
# Far above what a pipeline file needs: its values, their depth, and the length of a message about one of them.
VALUES, DEPTH, SHOWN = 10_000, 32, 1000


@dataclass(frozen=True)
class Document:
    """What a YAML file holds, and where."""

    file: Path
    values: Any
    node: yaml.Node | None

    def line_of(self, keys: Sequence[str]) -> int:
        """The line (from 1) of the deepest of `keys` that the document has; in a list, a key is the index (from 0)."""
        line, node = 1, self.node
        for place, key in enumerate(keys):
            if isinstance(node, yaml.SequenceNode) and key.isdecimal() and int(key) < len(node.value):
                node = node.value[int(key)]
                line = node.start_mark.line + 1
                continue
            children = node.value if isinstance(node, yaml.MappingNode) else []
            match = next(((k, v) for k, v in children if k.value == key), None)
            if match is None:  # `lora.r` may stand for `r` in `lora`
                dotted = ".".join(keys[place:place + 2])
                match = next(((k, v) for k, v in children if k.value == dotted), None)
                if match is not None:
                    inner = Document(self.file, None, match[1]).line_of(keys[place + 2:])
                    line = max(match[0].start_mark.line + 1, inner)
                break
            line, node = match[0].start_mark.line + 1, match[1]
        return line


def read(file: Path) -> Document:
    """Read and parse a YAML file.

    Raises:
        UserError: one line that names the file and, where it is known, the line.
    """
    text = _text(file)
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        values = loader.construct_document(node) if node else None  # type: ignore[no-untyped-call]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{file}:{mark.line + 1}" if mark else str(file)
        raise UserError(one_line(f"{where}: not valid YAML: {error.problem or error.context}")) from None
    except yaml.reader.ReaderError as error:
        where = f"{file}:{text.count(chr(10), 0, error.position) + 1}"
        raise UserError(f"{where}: not valid YAML: the character U+{error.character:04X} is not allowed") from None
    except Exception as error:
        # The promise is one line whatever the file holds: a server that follows many files must not stop at one.
        raise UserError(one_line(f"{file}: not valid YAML: {type(error).__name__}: {error}")) from None
    finally:
        if loader:
            loader.dispose()  # type: ignore[no-untyped-call]
    return Document(file, values, node)


def one_line(message: str) -> str:
    """The message with nothing in it that a terminal or a log would not show as one line of a sensible length."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in message)
    return text if len(text) <= SHOWN else text[:SHOWN - 1] + "…"


def _text(file: Path) -> str:
    try:
        return read_plain_file(file, CONFIG_MAP_BYTES, follow_links=True).decode()  # a ConfigMap's files are links
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except OSError as error:
        problem = "no such file" if error.errno == errno.ENOENT else f"cannot be read: {error.strerror}"
        raise UserError(f"{file}: {problem}") from None


class _Loader(yaml.SafeLoader):
    """SafeLoader that rejects duplicate keys (YAML keeps the last one), reads 2e-4 as a number (as YAML 1.2 does), and
    rejects files that are far more complex than those that people edit."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._values = 0  # with an alias counted as all values that it expands to
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        where: Any = event.start_mark
        before = self._values
        self._depth += 1
        if self._depth > DEPTH:
            raise yaml.composer.ComposerError(None, None, f"more than {DEPTH} levels", where)
        node: Any = super().compose_node(parent, index)
        self._depth -= 1
        if not isinstance(event, yaml.AliasEvent):
            self._values += 1
            self._sizes[id(node)] = self._values - before
        elif id(node) in self._sizes:
            self._values += self._sizes[id(node)]
        else:
            raise yaml.composer.ComposerError(None, None, f"the alias *{event.anchor} contains itself", where)
        if self._values > VALUES:
            raise yaml.composer.ComposerError(None, None, f"more than {VALUES} values", where)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)  # type: ignore[no-untyped-call]
            if isinstance(value, int) and abs(value) >= 2**63:
                raise OverflowError
        except yaml.YAMLError:
            raise
        except Exception:
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(None, None, f"{_shown(node)} cannot be read as {kind}; quote text",
                                                    node.start_mark) from None
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            # No digest can be computed of it. JSON writes a character as two such halves.
            raise yaml.constructor.ConstructorError(None, None, f"{_shown(node)} holds half a character; write the "
                                                    "character itself", node.start_mark)
        return value


def _shown(node: yaml.Node) -> str:
    text = repr(node.value) if isinstance(node, yaml.ScalarNode) else "this"
    return text if len(text) <= 80 else text[:77] + "…"


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
                              list("-+0123456789"))


MERGE = "tag:yaml.org,2002:merge"


def _mapping(loader: _Loader, node: yaml.Node) -> dict[Any, Any]:
    if not isinstance(node, yaml.MappingNode):
        raise yaml.constructor.ConstructorError(None, None, "expected a mapping", node.start_mark)
    seen = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node) if key_node.tag != MERGE else None
        if not isinstance(key, str):
            problem = "merges (`<<`) are not supported" if key_node.tag == MERGE else "a key must be text; quote it"
            raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"duplicate key `{key}`", key_node.start_mark)
        seen.add(key)
    return {loader.construct_object(key): loader.construct_object(value, deep=True) for key, value in node.value}


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
