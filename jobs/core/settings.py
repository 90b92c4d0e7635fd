"""Settings of one run: `--set training.epochs=30` takes this value instead of the pipeline file's.

The artifacts are those that the file would name if it had the value, and are validated as the file is. Such a run
promotes nothing: what clients get is what git says. Once the value is committed, the artifacts are there already.
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from pydantic import BaseModel

from jobs.core.errors import UserError

GROUP = "training"
FORMAT = f"KEY=VALUE, for example {GROUP}.epochs=3"


def changes(training: BaseModel, settings: Sequence[str]) -> dict[str, Any]:
    """The values that differ from those of the pipeline file, by key with dots. An empty value means the file's.

    Args:
        training: the pipeline file's `training`.
        settings: as typed, such as `training.lora.r=8`.
    Raises:
        UserError: one is not KEY=VALUE, or names no key of `training`.
    """
    allowed = dict(_leaves(training, GROUP))
    found = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting}: must be {FORMAT}")
        if key not in allowed:
            close = difflib.get_close_matches(key, allowed, n=1)
            raise UserError(f"--set {key}: " + (
                f"unknown key; did you mean `{close[0]}`?" if close and key.startswith(f"{GROUP}.") else
                f"a run can change single values of `{GROUP}` only: {', '.join(allowed)}. Data, pins and gate are what "
                "git has: edit the pipeline file"))
        if text and (value := _value(text)) != allowed[key]:
            found[key] = value
    return found


def applied(values: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a pipeline file with the changed values in place of its own."""
    result = copy.deepcopy(dict(values))
    for dotted, value in changed.items():
        *parents, key = dotted.split(".")
        at = result
        for parent in parents:
            at = at.setdefault(parent, {})
        at[key] = value
    return result


def edit(changed: Mapping[str, Any]) -> str:
    """The changed values as the lines of a pipeline file."""
    return yaml.safe_dump(applied({}, changed), sort_keys=False, allow_unicode=True).rstrip()


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _leaves(model: BaseModel, path: str) -> Iterator[tuple[str, Any]]:
    """Every value below a model, by its key with dots; a search is a decision of its own."""
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, BaseModel) and name != "search":
            yield from _leaves(value, f"{path}.{name}")
        elif name != "search":
            yield f"{path}.{name}", value
