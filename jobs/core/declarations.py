"""What `environment.yaml` and `pipeline.yaml` have in common: strict validation, and sources with their pins.

`validate` turns a parsed file into a model of pydantic, or raises one `UserError` that lists every problem with its
line, key and value.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from jobs.core import sources, strict_yaml
from jobs.core.errors import UserError
from jobs.core.strict_yaml import Document

COMMIT = re.compile(r"[0-9a-f]{40}")
PROBLEMS = 20  # that are listed; the rest is counted
KEYS = "below"  # in the context of a PydanticCustomError: the keys below the value that was checked, with dots
Model = TypeVar("Model", bound=BaseModel)


class Strict(BaseModel):
    """A mapping in a file that people edit. Unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False,
                              validate_default=True)  # 32 and the default 32.0 must give one digest


class Source(Strict):
    """Where something comes from, and the pin of its exact version: `revision`, a 40-digit commit, or `sha256`, by its
    scheme (jobs/core/sources.py). What this code makes has no pin."""

    source: str
    revision: Annotated[str, Field(min_length=1)] | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None

    @model_validator(mode="before")
    @classmethod
    def _pinned_within(cls, values: Any) -> Any:
        """A digest in the source itself is the pin."""
        if isinstance(values, dict) and isinstance(source := values.get("source"), str) and not values.get("sha256"):
            return values | {"sha256": digest} if (digest := sources.digest_in(source)) else values
        return values

    @property
    def scheme(self) -> str:
        return sources.scheme_of(self.source)

    @property
    def location(self) -> str:
        """The source without its scheme: a path, or OWNER/NAME on the hub."""
        return self.source.partition(":")[2].removeprefix("//")

    @property
    def pin(self) -> str:
        """The pin, as people read it in logs; `this code` for embedded sources."""
        return self.revision or self.sha256 or "this code"

    def unpinned(self) -> str | None:
        """What keeps the source from being pinned, in words; None when it is pinned."""
        key = sources.SCHEMES[self.scheme].pin
        if key is None:
            return None
        pin = getattr(self, key)
        if key == "revision" and pin and not COMMIT.fullmatch(pin):
            return f"`revision: {pin}` is not a commit of 40 hex digits: what it names can change"
        return None if pin else f"`{key}` is missing"


class DatasetSource(Source):
    """The private data: one file or a folder of JSONL, CSV or Parquet."""

    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.1
    # The share by which training chooses among checkpoints and settings. The gate never sees it.
    validation: Annotated[float, Field(ge=0, lt=1)] = 0

    @model_validator(mode="after")
    def _allowed(self) -> DatasetSource:
        sources.check(self.source, "data", self.revision, self.sha256)
        if self.holdout + self.validation >= 1:
            raise PydanticCustomError("shares", "holdout ({holdout}) and validation ({validation}) leave nothing to "
                                      "train on: their sum must be below 1",
                                      {"holdout": self.holdout, "validation": self.validation})
        return self


class ModelSource(Source):
    """A model: a hub repository, a folder, or an embedded model. `architecture` lets `check` reject it offline."""

    architecture: str | None = None

    @model_validator(mode="after")
    def _allowed(self) -> ModelSource:
        sources.check(self.source, "model", self.revision, self.sha256)
        return self

    @property
    def name(self) -> str:
        """The name under which the model is served and shown: the source without `hf://`."""
        return self.source.removeprefix("hf://")


class TokenizerSource(Strict):
    """The base model's own tokenizer, unless `source` names another."""

    source: str | None = None
    revision: Annotated[str, Field(min_length=1)] | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None

    @model_validator(mode="after")
    def _allowed(self) -> TokenizerSource:
        if self.source is not None:
            sources.check(self.source, "model", self.revision, self.sha256)
        elif self.revision or self.sha256:
            raise PydanticCustomError("pin", "has a pin but no `source`; empty, it means the base model's own", {})
        return self


class AcceptabilitySource(Source):
    """Sentences with acceptability judgements: embedded, or GLUE CoLA from the hub."""

    source: str = sources.EMBEDDED_PAIRS

    @model_validator(mode="after")
    def _allowed(self) -> AcceptabilitySource:
        sources.check(self.source, "acceptability", self.revision, self.sha256)
        return self


@dataclass(frozen=True)
class Loaded:
    """A valid file that people edit, against which its `file:` sources are resolved."""

    path: Path

    def resolve(self, source: Source) -> Path:
        """The path of a `file:` source, relative to the file."""
        return self.path.parent / source.location


def find(path: Path, name: str, folder: str) -> Path:
    """The file that a person means: the file itself, or `name` in a folder.

    Args:
        folder: what the folder is, for the message about one without the file.
    Raises:
        UserError: there is none.
    """
    try:
        file = path / name if path.is_dir() else path
        there = file.exists()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not there:
        raise UserError(f"{file}: no such file. Name {folder}, or its {name}")
    return file


def read(file: Path, hint: str) -> Document:
    """Read a file that must hold a mapping.

    Args:
        hint: the key that it must have, for the message about a file without any.
    Raises:
        UserError: one line that names the file and, where it is known, the line.
    """
    document = strict_yaml.read(file)
    if not isinstance(document.values, dict):
        raise UserError(f"{file}: must hold a mapping with the key `{hint}` and others, not "
                        f"{_description(document.values)}")
    return document


def validate(document: Document, model: type[Model], values: Any) -> Model:
    """Validate values that come from a document.

    Raises:
        UserError: with one line for each problem: file, line, key, what is wrong, what is allowed. Nothing else,
            whatever the file holds.
    """
    try:
        try:
            return model.model_validate(values)
        except ValidationError as error:
            refuse(_problem(document, model, dict(e)) for e in error.errors())
            raise
    except UserError:
        raise
    except Exception as error:  # one line, whatever it is: see `strict_yaml.read`
        raise UserError(strict_yaml.one_line(f"{document.file}: {type(error).__name__}: {error}")) from None


def require_pins(document: Document, named: dict[str, Source]) -> None:
    """Every source, by its key in the document, must be pinned.

    Raises:
        UserError: with a line for each that is not.
    """
    file = document.file
    refuse(f"{file}:{document.line_of(key.split('.'))}: {key}: {sources.shown(source.source)} is not pinned: {why}. "
           f"Run: python -m jobs pin {file.parent}"
           for key, source in named.items() if (why := source.unpinned()))


def refuse(problems: Iterable[str]) -> None:
    """Raise `UserError` if there are problems, with a line for each."""
    lines = list(dict.fromkeys(map(strict_yaml.one_line, problems)))
    if len(lines) > PROBLEMS:
        lines[PROBLEMS:] = [f"{lines[-1].partition(': ')[0]}: and {len(lines) - PROBLEMS} more problems"]
    if lines:
        raise UserError("\n".join(lines))


def _description(value: Any) -> str:
    """A value as a message shows it."""
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = repr(sources.shown(value) if isinstance(value, str) else value)
    return text if len(text) <= 80 else text[:77] + "…"


def _problem(document: Document, model: type[BaseModel], error: dict[str, Any]) -> str:
    """One problem as one line; pydantic's own wording where it is already what a user needs."""
    keys = [str(k) for k in error["loc"] if not (isinstance(k, str) and k.startswith(("literal[", "list[")))]
    if KEYS in error.get("ctx", {}):
        keys += error["ctx"][KEYS].split(".")
        where = f"{document.file}:{document.line_of(keys)}: {'.'.join(keys)}"
        return f"{where}: {error['msg']}"
    where = f"{document.file}:{document.line_of(keys)}: {'.'.join(keys) or 'the file'}"
    description = _description(error["input"])
    if error["type"] == "extra_forbidden":
        allowed = _fields(model, keys[:-1])
        close = difflib.get_close_matches(keys[-1], allowed, n=1)
        hint = f"did you mean `{close[0]}`?" if close else f"allowed: {', '.join(allowed)}"
        return f"{where}: unknown key; {hint}"
    if error["type"] == "missing":
        return f"{where}: is missing"
    patterns = {"sha256": "64 hex digits (quote it if it is all digits)",
                "adapter": "1 to 63 of a-z, 0-9 and -, not at the ends",
                "name": "1 to 40 of a-z, 0-9 and -, not at the ends"}
    if error["type"] == "string_pattern_mismatch" and keys[-1] in patterns:
        return f"{where}: {description} must be {patterns[keys[-1]]}"
    if isinstance(error.get("input"), BaseModel | dict) and error["type"] not in {"int_type", "float_type",
                                                                                 "string_type", "model_type"}:
        return f"{where}: {error['msg']}"
    return f"{where}: {description}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _fields(model: type[BaseModel], keys: list[str]) -> list[str]:
    """The keys that the model at `keys` allows."""
    for key in keys:
        field = model.model_fields.get(key)
        if field is not None:  # else an index of a list, or a key of a mapping, whose annotation was followed already
            model = next(_models_in(field.annotation))
    return [field.alias or name for name, field in model.model_fields.items()]


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that an annotation names, such as those of a union or of a mapping's values."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)
