"""The records of tasks: validated, written in one form, and kept apart from what is trained on.

A record is a question, {"prompt"} or {"messages"}, with what the check of its task needs: `expected` (a text, or a list
of accepted ones), `pattern`, `schema` or `label`; and an optional `group`. Patterns and schemas are compiled here, so
that one that does not compile is found before training.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from jobs.core.errors import UserError
from jobs.core.metrics import MINIMUM_CLUSTERS
from jobs.core.pipeline import Evaluation
from jobs.core.strict_yaml import one_line
from jobs.core.tasks import Task
from jobs.data import harness
from jobs.data.formats import File, Problems, names_of, read_rows, to_jsonl
from jobs.data.harness import TaskFile
from jobs.data.records import Schema, Values, abbreviated, question_of, text_problem, validate_question
from jobs.data.split import HOLDOUT, TRAIN, VALIDATION

QUESTION_KEYS = ("prompt", "messages", "tools")
ANSWER = {"role": "assistant", "content": ""}  # completes the messages of a question where a whole record is expected


class Placed(NamedTuple):
    """A record, and its place in the user's file as messages name it."""

    place: str
    record: Values


def file_name(task: Task) -> str:
    """The name of its records in the artifact."""
    return f"{task.name}.jsonl"


def settings_name(task: Task) -> str:
    """The name of what its records share in the artifact: the settings of a task file of lm-evaluation-harness."""
    return f"{task.name}.settings.json"


def convert(task: Task, files: Sequence[File], target: Path | None, task_file: TaskFile | None = None) -> list[Placed]:
    """Validate the records of a task and write them to `target`, if given, in one form. Returns them.

    Args:
        task_file: what `lm_eval` of the task names.
    Raises:
        UserError: with the first ten problems; or when there are no records, or labels without any.
    """
    named = [File(file.path, f"{task.key}: {file.name}") for file in files]
    check_options(task)
    problems = Problems()
    if task_file:
        placed = list(_rendered(task_file, named, problems))
    else:
        placed = [Placed(named[number].place(line), _as_written(row, task))
                  for number, line, row in read_rows(named, _schema(task), problems)]
    problems.raise_if_any()
    records = [each.record for each in placed]
    if not records:
        raise UserError(f"{names_of(named)}: no records")
    if task.check == "label_f1":
        _require_labels(task, records, names_of(named))
    if target:
        target.write_bytes(b"".join(map(to_jsonl, records)))
        if task_file and task.lm_eval:
            target.with_name(settings_name(task)).write_bytes(to_jsonl(task_file.settings(task.lm_eval.metric)))
    return placed


def clusters_of(records: Iterable[Values]) -> list[int]:
    """The cluster of each record by number: those of a group, and of the others those with the same question, are one
    piece of evidence."""
    numbers: dict[tuple[str, str], int] = {}
    names = (("group", record["group"]) if "group" in record else ("question", _question(record))
             for record in records)
    return [numbers.setdefault(name, len(numbers)) for name in names]


def require_evidence(evaluation: Evaluation, records: Iterable[tuple[Task, Sequence[Values]]]) -> None:
    """Reject rules on tasks with too few records to decide anything.

    Raises:
        UserError: naming the first such rule.
    """
    ruled = {key for key, _ in evaluation.rules()}
    for task, rows in records:
        found = len(set(clusters_of(rows)))
        if task.key in ruled and found < MINIMUM_CLUSTERS:
            raise UserError(f"evaluation.gate.{task.key}: the task has {len(rows)} record{'s' * (len(rows) != 1)} in "
                            f"{found} cluster{'s' * (found != 1)}, which cannot prove anything: at least "
                            f"{MINIMUM_CLUSTERS} are needed. A cluster is a `group`, or the records with the same "
                            "prompt. Bring more records, or remove the rule")


def require_unseen(placed: Iterable[Placed], dataset: Path) -> None:
    """No task may ask what is trained on, or what settings are chosen by: it would measure what was learned by heart.

    Args:
        dataset: the folder with the records of the splits.
    Raises:
        UserError: with the first ten records that do, and how many there are.
    """
    places: dict[bytes, list[str]] = {}
    for place, record in placed:
        places.setdefault(_digest(_question(record)), []).append(place)
    problems = Problems()
    for name in (TRAIN, VALIDATION):
        file = dataset / f"{name}.jsonl"
        with file.open("rb") if file.exists() else nullcontext(()) as lines:
            for line in lines:
                for place in places.pop(_digest(question_of(json.loads(line))), ()):
                    problems.add(place, f"the same prompt is in the split {name} of the dataset, so the task would "
                                 "measure what was learned by heart. Remove it here or there, or give the "
                                 f'record of the dataset "split": "{HOLDOUT}"')
    problems.raise_if_any()


# --- patterns and schemas --------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=10_000)
def compiled_pattern(pattern: str, case_sensitive: bool = True) -> Callable[[str], object]:
    """A regular expression, as a function that searches a text for it.

    By RE2, which takes time in proportion to the text, whatever the expression: the answer of a model can keep Python's
    `re` busy for ever, and with a time limit the machine's speed would decide the result.

    Raises:
        ValueError: it does not compile; RE2 has no look-around and no back-references.
    """
    import re2

    options = re2.Options()
    options.log_errors = False
    options.case_sensitive = case_sensitive
    try:
        search: Callable[[str], object] = re2.compile(pattern, options).search
        return search
    except re2.error as error:
        text = error.args[0].decode() if error.args and isinstance(error.args[0], bytes) else str(error)
        raise ValueError(f"is not a regular expression of RE2: {text}") from None


@functools.lru_cache(maxsize=10_000)
def compiled_schema(schema: str) -> Callable[[Any], bool]:
    """A JSON schema, as a function that says whether a value matches.

    Its patterns take linear time too. References lead to the schema itself only: nothing is fetched.

    Args:
        schema: as JSON.
    Raises:
        ValueError: it does not compile.
    """
    import jsonschema_rs

    def retrieve(uri: str) -> Any:
        raise ValueError("a schema must hold all that it refers to")

    try:
        valid: Callable[[Any], bool] = jsonschema_rs.validator_for(
            json.loads(schema), pattern_options=jsonschema_rs.RegexOptions(), retriever=retrieve).is_valid
        return valid
    except Exception as error:  # ValidationError, ReferencingError, and what the library raises for other values
        raise ValueError(f"is not a JSON schema: {str(error).splitlines()[0] or type(error).__name__}") from None


def check_options(task: Task) -> None:
    """Compile the pattern or the schema that all records of a task share.

    Raises:
        UserError: it does not compile.
    """
    try:
        if task.pattern is not None:
            compiled_pattern(task.pattern, task.case_sensitive)
        if task.json_schema is not None:
            compiled_schema(json.dumps(task.json_schema))
    except ValueError as error:
        raise UserError(f"{task.key}: `{'schema' if task.json_schema is not None else 'pattern'}` {error}") from None


# --- records ---------------------------------------------------------------------------------------------------------


def _rendered(task_file: TaskFile, files: list[File], problems: Problems) -> Iterator[Placed]:
    """The records that a task file of lm-evaluation-harness makes of the rows of its data."""
    any_row = Schema((), {"row": ()}, lambda row: [] if isinstance(row, dict) else [
        f"must be a JSON object, not {abbreviated(row)}"])
    for number, line, row in read_rows(files, any_row, problems):
        place = files[number].place(line)
        try:
            record = harness.rendered(task_file, row)
        except ValueError as error:
            problems.add(place, one_line(str(error)))
            continue
        group = row.get("group")
        yield Placed(place, record | ({"group": group} if isinstance(group, str) and group else {}))


def _schema(task: Task) -> Schema:
    needed = (task.needs,) if task.needs else ()
    keys = (*QUESTION_KEYS, *needed, "group")
    shapes = {shape: (shape, *needed) for shape in ("prompt", "messages")}

    def validate(record: Any) -> list[str]:
        found = validate_question(record, keys)
        for key in needed if isinstance(record, dict) else ():
            if key not in record:
                found.append(f"`{key}` is missing: the check {task.check} needs it")
            elif wrong := _problem(task, key, record[key]):
                found.append(f"`{key}` {wrong}")
        return found

    return Schema(keys, shapes, validate)


def _problem(task: Task, key: str, value: Any) -> str | None:
    """What is wrong with what a record's answer is checked against."""
    if key == "expected" and isinstance(value, list):
        return next(filter(None, map(text_problem, value)), None) if value else "is empty"
    if key == "schema":
        try:
            text = _schema_text(value)
        except (ValueError, TypeError, RecursionError) as error:
            return f"must be an object (a JSON schema): {error}"
        try:
            compiled_schema(text)
        except ValueError as error:
            return str(error)
        return None
    wrong = text_problem(value)
    if wrong:
        return wrong
    if key == "pattern":
        try:
            compiled_pattern(value, task.case_sensitive)
        except ValueError as error:
            return str(error)
    if key == "label" and task.labels and value not in task.labels:
        return f"must be one of the task's labels, not {abbreviated(value)}"
    return None


def _schema_text(value: Any) -> str:
    """A schema as JSON; CSV and Parquet have it as a text."""
    parsed = json.loads(value) if isinstance(value, str) else value
    if not isinstance(parsed, dict):
        raise ValueError(f"not {abbreviated(parsed)}")
    return json.dumps(parsed, ensure_ascii=False, allow_nan=False)


def _as_written(row: Values, task: Task) -> Values:
    """A record in the form that the evaluation reads: the accepted texts as a list, the schema as an object."""
    written = {key: row[key] for key in (*QUESTION_KEYS, *([task.needs] if task.needs else []), "group") if key in row}
    if "expected" in written and isinstance(written["expected"], str):
        written["expected"] = [written["expected"]]
    if "schema" in written:
        written["schema"] = json.loads(_schema_text(written["schema"]))
    return written


def _require_labels(task: Task, records: Sequence[Values], where: str) -> None:
    found = {record["label"] for record in records}
    missing = [label for label in task.labels or () if label not in found]
    if missing:
        raise UserError(f"{where}: no record has the label {', '.join(map(abbreviated, missing))} of the task's "
                        "labels, so it cannot be measured. Bring some, or remove it")
    if len(found) < 2:
        raise UserError(f"{where}: every record has the label {abbreviated(next(iter(found)))}, so there is nothing to "
                        "tell apart. Bring records with other labels, or use the check exact")


def _question(record: Values) -> str:
    return question_of({**record, "messages": [*record["messages"], ANSWER]} if "messages" in record else record)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def read(folder: Path, tasks: Iterable[Task]) -> Iterator[tuple[Task, list[Values]]]:
    """The records of each task, from the artifact; those for lm-evaluation-harness with the `settings` they share."""
    for task in tasks:
        shared = {"settings": json.loads((folder / settings_name(task)).read_bytes())} if task.lm_eval else {}
        with (folder / file_name(task)).open(encoding="utf-8") as lines:
            yield task, [json.loads(line) | shared for line in lines]
