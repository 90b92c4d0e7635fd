"""The checks of tasks: what the answer to one record is worth, from 0 to 1.

docs/tasks.md explains each to its users; jobs/core/tasks.py has their options.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jobs.core.tasks import CHECKS, Task
from jobs.data.records import INVISIBLE, Values
from jobs.data.tasks import compiled_pattern, compiled_schema

Value = float


def value_of(task: Task, record: Values, answer: str) -> Value:
    """What an answer is worth: 1 is right, 0 wrong; with rougeL what it shares with the reference."""
    return _CHECKS[task.check](task, record, answer)


def labels_of(task: Task, records: Sequence[Values]) -> dict[str, int]:
    """The labels of the records as they are compared, with their numbers; none where the check has no labels."""
    if task.check != "label_f1":
        return {}
    names = sorted({comparable(task, record["label"]) for record in records})
    return {name: number for number, name in enumerate(names)}


def comparable(task: Task, text: str) -> str:
    """A text as the task compares it: with `normalize` in Unicode's compatible form (NFKC), without invisible
    characters, each run of white space one blank; unless `case_sensitive`, with its case folded. Always without white
    space at its ends."""
    if task.normalize:
        text = " ".join(INVISIBLE.sub("", unicodedata.normalize("NFKC", text)).split())
    if not task.case_sensitive:
        text = unicodedata.normalize("NFC", text.casefold())
    return text.strip()


def exact(task: Task, record: Values, answer: str) -> Value:
    """The answer is one of the accepted texts."""
    return float(comparable(task, answer) in [comparable(task, text) for text in record["expected"]])


def contains(task: Task, record: Values, answer: str) -> Value:
    """The answer contains one of the accepted texts."""
    found = comparable(task, answer)
    return float(any(comparable(task, text) in found for text in record["expected"]))


def regex(task: Task, record: Values, answer: str) -> Value:
    """A part of the answer matches the regular expression."""
    pattern = task.pattern if task.pattern is not None else record["pattern"]
    return float(bool(compiled_pattern(pattern, task.case_sensitive)(answer)))


def json_schema(task: Task, record: Values, answer: str) -> Value:
    """The answer is JSON, and matches the schema."""
    schema = task.json_schema if task.json_schema is not None else record["schema"]
    try:
        value = json.loads(_without_fence(answer) if task.fence else answer, parse_constant=_no_json)
        return float(compiled_schema(json.dumps(schema))(value))
    except (ValueError, RecursionError):  # also of JSON that is nested too deeply, or whose number has too many digits
        return 0.0


def label(task: Task, record: Values, answer: str) -> Value:
    """The answer is the label, and nothing else."""
    return float(comparable(task, answer) == comparable(task, record["label"]))


def rouge(task: Task, record: Values, answer: str) -> Value:
    """The ROUGE-L of the answer and the accepted text that it is nearest to."""
    from jobs.evaluation.metrics.rouge import each

    return max(each(text, answer)["rougeL"] for text in record["expected"])


def _without_fence(answer: str) -> str:
    """What is in the Markdown fence that an answer consists of; an answer that is none as it is."""
    first, _, rest = answer.strip().partition("\n")
    return rest[:-3] if first.rstrip().lower() in ("```", "```json") and rest.endswith("```") else answer


def _no_json(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")  # NaN and Infinity, which Python reads


_CHECKS: Mapping[str, Callable[[Task, Values, str], Value]] = {
    "exact": exact, "contains": contains, "regex": regex, "json_schema": json_schema, "label_f1": label,
    "rougeL": rouge}
assert _CHECKS.keys() | {"lm_eval"} == CHECKS.keys(), "the harness finds the values of its tasks itself"
