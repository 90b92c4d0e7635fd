"""Edits of YAML texts that keep comments and layout. The caller compares what the result holds with what it should."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml


def node_at(text: str, path: Sequence[str | int]) -> Any:
    """The node at keys of mappings and places of lists.

    Raises:
        LookupError: there is none.
        yaml.YAMLError: the text is not YAML.
    """
    node: Any = yaml.compose(text, Loader=yaml.SafeLoader)
    for key in path:
        if isinstance(key, int) and isinstance(node, yaml.SequenceNode):
            node = node.value[key]
        elif isinstance(node, yaml.MappingNode):
            node = next((value for name, value in node.value if name.value == key), None)
        else:
            node = None
        if node is None:
            raise LookupError(key)
    return node


def replace(text: str, path: Sequence[str | int], value: str) -> str:
    """The text with another value, written as YAML, in place of the one at `path`."""
    node = node_at(text, path)
    end = _end(text, node)
    start = node.start_mark.index
    block = isinstance(node, yaml.CollectionNode) and not node.flow_style
    if block:  # it stands on lines of its own: the value goes behind its key
        start = len(text[:start].rstrip())
        start, value = (start + 1, value) if text[start:start + 1] == " " else (start, f" {value}")
    return text[:start] + value + text[end:]


def append(text: str, path: Sequence[str | int], item: str, *, after: int = -1) -> str:
    """The text with another item in the list at `path`, behind the one at the place `after`.

    Raises:
        LookupError: there is no list, or it is empty and written as a block.
    """
    node = node_at(text, path)
    if not isinstance(node, yaml.SequenceNode):
        raise LookupError(path)
    if not node.value:
        return replace(text, path, f"[{item}]")
    end = _end(text, node.value[after])
    if node.flow_style:
        return f"{text[:end]}, {item}{text[end:]}"
    line = text.find("\n", end)
    line = len(text) if line < 0 else line
    newline = "\r\n" if text[:line].endswith("\r") else "\n"
    line -= len(newline) - 1
    return f"{text[:line]}{newline}{' ' * node.start_mark.column}- {item}{text[line:]}"


def _end(text: str, node: Any) -> int:
    """Where the text of a node ends. The mark of a block of lines is behind the comments that follow it."""
    while isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        if isinstance(last, tuple):  # of a mapping
            key, value = last
            last = value if value.end_mark.index > value.start_mark.index else key
        node = last
    return len(text[:node.end_mark.index].rstrip())
