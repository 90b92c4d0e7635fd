"""Task files of lm-evaluation-harness: read strictly, and applied to the rows of their data.

Of a task file only what cannot run code is taken: no `!function`, no `include`, no filters. Its templates are rendered
here, in Jinja's sandbox, before training; the harness itself gets finished texts (jobs/evaluation/harness.py).
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from jobs.core import declarations, strict_yaml
from jobs.core.declarations import Strict
from jobs.core.errors import UserError
from jobs.core.tasks import HarnessMetric
from jobs.data.records import Values, text_problem

METRICS: Mapping[str, tuple[HarnessMetric, ...]] = {
    "multiple_choice": ("acc", "acc_norm"), "generate_until": ("exact_match",)}
MISSING = ("lm-evaluation-harness is not installed here. Run: pip install --no-deps -r "
           "jobs/requirements-lm-eval.txt; for a cluster, in an image of your own")
# The harness's own environment, made safe: the templates come with the data.
TEMPLATES = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)


class MetricEntry(Strict):
    """One entry of `metric_list`."""

    metric: HarnessMetric
    aggregation: Literal["mean"] = "mean"
    higher_is_better: Literal[True] = True
    ignore_case: bool = False
    ignore_punctuation: bool = False
    ignore_numbers: bool = False


class Generation(Strict):
    """`generation_kwargs`: answers are greedy."""

    until: list[str] | str = Field(default_factory=list)
    max_gen_toks: Annotated[int, Field(ge=1, le=4096)] | None = None
    do_sample: Literal[False] = False
    temperature: Literal[0] | None = None


class TaskFile(Strict):
    """The keys of a task file that are taken. Those in the second part are known and have no effect: the data is the
    `source` of the task in the pipeline file."""

    output_type: Literal["multiple_choice", "generate_until"]
    doc_to_text: str
    doc_to_target: str | int
    doc_to_choice: str | list[str] | None = None
    metric_list: list[MetricEntry] = Field(min_length=1)
    generation_kwargs: Generation = Generation()
    num_fewshot: Literal[0] | None = None

    task: str | None = None
    task_alias: str | None = None
    tag: str | list[str] | None = None
    dataset_path: str | None = None
    dataset_name: str | None = None
    dataset_kwargs: dict[str, Any] | None = None
    training_split: str | None = None
    validation_split: str | None = None
    test_split: str | None = None
    metadata: dict[str, Any] | None = None

    @field_validator("doc_to_text", "doc_to_target", "doc_to_choice")
    @classmethod
    def _compiles(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, str):
            try:
                TEMPLATES.from_string(value)
            except TemplateError as error:
                raise PydanticCustomError("template", "is no template: {error}", {"error": str(error)}) from None
        return value

    @model_validator(mode="after")
    def _consistent(self) -> TaskFile:
        wrong = [entry.metric for entry in self.metric_list if entry.metric not in METRICS[self.output_type]]
        if wrong:
            raise PydanticCustomError("metric", "{metric} is no metric of {type}; allowed: {allowed}",
                                      {"metric": wrong[0], "type": self.output_type,
                                       "allowed": ", ".join(METRICS[self.output_type])})
        if (self.output_type == "multiple_choice") != (self.doc_to_choice is not None):
            raise PydanticCustomError("choices", "doc_to_choice is for output_type multiple_choice, which needs it", {})
        return self

    def metric_of(self, wanted: str | None) -> MetricEntry | None:
        """The entry of the desired metric; by default the first. None if there is none."""
        return next((entry for entry in self.metric_list if wanted in (None, entry.metric)), None)


    def settings(self, wanted: str | None) -> Values:
        """What the measuring needs beside the rendered rows."""
        metric = self.metric_of(wanted)
        assert metric is not None, "`read` rejects a task file without it"
        return {"output_type": self.output_type, "metric": metric.model_dump(),
                "generation": self.generation_kwargs.model_dump()}


def require_installed(key: str) -> None:
    """Raise `UserError` if lm-evaluation-harness is not installed.

    Args:
        key: of the task that needs it.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"{key}: {MISSING}")


def read(file: Path, name: str, metric: str | None) -> TaskFile:
    """Read a task file.

    Args:
        name: of the file, for messages.
        metric: the desired one, if one is.
    Raises:
        UserError: naming file, line and key of what is not taken.
    """
    try:
        document = strict_yaml.read(file)
        if not isinstance(document.values, dict):
            raise UserError(f"{file}: must hold a mapping, such as a task file of lm-evaluation-harness")
        found = declarations.validate(document, TaskFile, document.values)
    except UserError as error:
        message = str(error).replace(str(file), name)
        hint = ". Functions, includes and filters run code that came with the data" if "!function" in message else ""
        raise UserError(message + hint) from None
    if found.metric_of(metric) is None:
        raise UserError(f"{name}: metric_list has no {metric}")
    return found


def rendered(task_file: TaskFile, row: Values) -> Values:
    """What the templates of a task file make of one row: its `prompt`; `target`, the right answer; or `choices`, and as
    `target` the number of the right one.

    Raises:
        ValueError: with the key of the task file, and what is wrong.
    """
    prompt = _value(task_file.doc_to_text, row, "doc_to_text")
    if wrong := text_problem(prompt):
        raise ValueError(f"doc_to_text {wrong}")
    target = task_file.doc_to_target
    if isinstance(target, str):
        target = _value(target, row, "doc_to_target")
    if task_file.output_type == "generate_until":
        if not isinstance(target, str) or (wrong := text_problem(target)):
            raise ValueError(f"doc_to_target {wrong if isinstance(target, str) else 'must be text'}")
        return {"prompt": prompt, "target": target}
    choices = task_file.doc_to_choice
    if isinstance(choices, str):
        choices = _value(choices, row, "doc_to_choice")
        if isinstance(choices, str):
            try:
                choices = ast.literal_eval(choices)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                choices = None
    if not isinstance(choices, list) or len(choices) < 2 or any(map(text_problem, choices)):
        raise ValueError("doc_to_choice must be a list of at least two texts")
    if isinstance(target, str):
        target = choices.index(target) if target in choices else int(target) if target.isdecimal() else -1
    if isinstance(target, bool) or not isinstance(target, int) or not 0 <= target < len(choices):
        raise ValueError(f"doc_to_target must be one of the {len(choices)} choices, or its number from 0")
    return {"prompt": prompt, "choices": choices, "target": target}


def _value(template: str, row: Values, key: str) -> Any:
    """A column of the row, or what a template makes of it."""
    if template in row:
        return row[template]
    try:
        return TEMPLATES.from_string(template).render(**row)
    except Exception as error:  # a template can raise anything
        raise ValueError(f"{key}: {error or type(error).__name__}") from None
