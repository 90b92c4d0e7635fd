"""A manifest whose fields are taken one by one, so that what nobody took is known at the end."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

MISSING: Any = object()


class Fields:
    """A mapping of a manifest. A field that is taken is gone; `left` has the others."""

    def __init__(self, manifest: dict[str, Any], path: str = "") -> None:
        self._left = copy.deepcopy(manifest)
        self._path = path
        self._children: list[Fields] = []

    def take(self, key: str, default: Any = None) -> Any:
        """The value of a field, which counts as translated from now on."""
        return self._left.pop(key, default)

    def get(self, key: str) -> Any:
        """The value of a field, which stays to be taken."""
        return self._left.get(key)

    def take_if(self, key: str, *values: Any) -> None:
        """Take a field if it has one of these values, which need no translation."""
        if self._left.get(key, MISSING) in values:
            del self._left[key]

    def keys(self) -> list[str]:
        """The keys that were not taken."""
        return sorted(self._left)

    def child(self, key: str) -> Fields:
        """The mapping below a key; an empty one if there is none."""
        value = self._left.pop(key, None)
        if value is not None and not isinstance(value, dict):
            raise TypeError(f"{_joined(self._path, key)} is no mapping")
        return self._add(value or {}, key)

    def children(self, key: str) -> list[Fields]:
        """The mappings in the list below a key, whose paths have their names: `containers[job]`."""
        return [self._add(value, f"{key}[{value.get('name', index)}]")
                for index, value in enumerate(self._left.pop(key, None) or [])]

    @property
    def path(self) -> str:
        return self._path

    def left(self) -> Iterator[tuple[str, Any]]:
        """The path and the value of every field that was not taken."""
        yield from self._leaves(self._left, self._path)
        for child in self._children:
            yield from child.left()

    def _add(self, value: dict[str, Any], name: str) -> Fields:
        child = Fields(value, _joined(self._path, name))
        self._children.append(child)
        return child

    def _leaves(self, value: Any, path: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict) and value:
            for key, each in value.items():
                yield from self._leaves(each, _joined(path, key))
        elif path != self._path:
            yield path, value


def _joined(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
