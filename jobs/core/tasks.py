"""Tasks: what `evaluation.tasks` of the pipeline file declares. Prompts, and a check of the answer to each.

docs/tasks.md explains them. The records are read by jobs/data/tasks.py, the answers checked by
jobs/evaluation/checks.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from jobs.core import sources
from jobs.core.declarations import KEYS, Source
from jobs.core.metrics import TASKS

CheckName = Literal["exact", "contains", "regex", "json_schema", "label_f1", "rougeL", "lm_eval"]
HarnessMetric = Literal["acc", "acc_norm", "exact_match"]
COMPARING = ("case_sensitive", "normalize")


@dataclass(frozen=True)
class Check:
    """What a check needs: a key of each record, and the options that it takes."""

    needs: str | None  # of each record, unless the option of this name has it for all
    options: tuple[str, ...] = ()


CHECKS: Mapping[str, Check] = {
    "exact": Check("expected", COMPARING),
    "contains": Check("expected", COMPARING),
    "regex": Check("pattern", ("pattern", "case_sensitive")),
    "json_schema": Check("schema", ("schema", "fence")),
    "label_f1": Check("label", ("labels", *COMPARING)),
    "rougeL": Check("expected"),
    "lm_eval": Check(None, ("lm_eval",)),
}
assert tuple(CHECKS) == get_args(CheckName)


class HarnessFile(Source):
    """A task file of lm-evaluation-harness, and which of its metrics is the score; by default its first."""

    metric: HarnessMetric | None = None

    @model_validator(mode="after")
    def _allowed(self) -> HarnessFile:
        sources.check(self.source, "data", self.revision, self.sha256)
        return self


class Task(Source):
    """Prompts with a check: one entry of `evaluation.tasks`."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$")]
    check: CheckName
    # How long an answer may get; by default evaluation.max_new_tokens.
    max_new_tokens: Annotated[int, Field(ge=1, le=4096)] | None = None
    # Options of the checks; CHECKS says which takes which.
    case_sensitive: bool = True
    normalize: bool = False  # compare without what a reader does not see: forms of Unicode, runs of white space
    pattern: Annotated[str, Field(min_length=1)] | None = None  # that all answers must match
    json_schema: dict[str, Any] | None = Field(None, alias="schema")  # that all answers must match
    fence: bool = False  # also accept JSON in a Markdown fence: ```json
    labels: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=2)] | None = None
    lm_eval: HarnessFile | None = None

    @model_validator(mode="after")
    def _allowed(self) -> Task:
        sources.check(self.source, "data", self.revision, self.sha256)
        try:
            json.dumps(self.json_schema, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise PydanticCustomError("schema", "is not JSON: {error}", {"error": str(error), KEYS: "schema"}) from None
        options = {option for check in CHECKS.values() for option in check.options}
        for name in type(self).model_fields:
            key = "schema" if name == "json_schema" else name
            if name in self.model_fields_set and key in options and key not in CHECKS[self.check].options:
                allowed = ", ".join(CHECKS[self.check].options) or "none"
                raise PydanticCustomError("option", "is no option of the check {check}; its options: {allowed}",
                                          {"check": self.check, "allowed": allowed, KEYS: key})
        if self.check == "lm_eval" and self.lm_eval is None:
            raise PydanticCustomError("option", "the check lm_eval needs `lm_eval`: {file}", {
                "file": "{source: file:TASK.yaml}, a task file of lm-evaluation-harness"})
        return self

    @property
    def key(self) -> str:
        """Of its score, in the gate."""
        return TASKS + self.name

    @property
    def needs(self) -> str | None:
        """The key that each record must have beside its prompt; None where an option has it for all."""
        key = CHECKS[self.check].needs
        given = {"pattern": self.pattern, "schema": self.json_schema}
        return key if key is not None and given.get(key) is None else None

    def identity(self) -> dict[str, Any]:
        """What of it decides the scores, without its sources. Options that have their default are left out."""
        values = self.model_dump(by_alias=True, exclude_defaults=True,
                                 exclude={"source", "revision", "sha256", "lm_eval"})
        return values | ({"labels": sorted(self.labels)} if self.labels else {})


def check_names(tasks: list[Task]) -> list[Task]:
    """Each task must have a name of its own.

    Raises:
        PydanticCustomError: naming the second of two.
    """
    names = [task.name for task in tasks]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise PydanticCustomError("name", "{name} is the name of another task already",
                                      {"name": name, KEYS: f"{number}.name"})
    return tasks
