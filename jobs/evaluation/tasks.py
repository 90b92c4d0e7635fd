"""Tasks: their prompts as one model gets them, and what the check of each finds the answers to be worth."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jobs.core.errors import UserError
from jobs.core.tasks import Task
from jobs.data.chat import RecordError
from jobs.data.encoding import Encoded, encode, encode_question, prompt_messages
from jobs.data.records import Values, conversation_text
from jobs.data.tasks import clusters_of, file_name
from jobs.evaluation import checks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("jobs")


@dataclass(frozen=True)
class Answered:
    """What one model did with a task.

    `rows` has of each answered record its line in the task's file, its cluster and its value; for label_f1 also the
    numbers of its label and of the answered one. `answers` has the texts, for people.
    """

    task: Task
    rows: Sequence[dict[str, Any]]
    answers: Sequence[dict[str, Any]]
    too_long: int  # records that are left out

    def summary(self) -> dict[str, Any]:
        """What scores.json has of it beside the score."""
        return {"records": len(self.rows), "records_too_long": self.too_long}


def encode_prompts(tokenizer: PreTrainedTokenizerBase, task: Task, records: Sequence[Values], limit: int,
                   template: Mapping[str, Any], name: str) -> dict[int, list[int]]:
    """The tokens of a task's prompts, as clients ask them, by the record's number from 0. Longer ones are left out.

    Args:
        limit: of tokens.
        template: the arguments of the chat template.
        name: the model's, for messages.
    Raises:
        UserError: the chat template rejects a prompt, or all are too long.
    """
    prompts: dict[int, list[int]] = {}
    for number, record in enumerate(records):
        try:
            tokens = encode_question(tokenizer, record, template)
        except RecordError as error:
            raise UserError(f"{name}: {task.key}: {file_name(task)}:{number + 1} of the tasks: {error}") from None
        if len(tokens) <= limit:
            prompts[number] = tokens
    if not prompts:
        raise UserError(f"{name}: {task.key}: none of the {len(records)} prompts fits: {limit} tokens are allowed "
                        "(training.max_length, or what the model knows). Raise it, or shorten the prompts")
    if len(prompts) < len(records):
        log.warning("%s: %s: %d of %d prompts have more than %d tokens and are left out", name, task.key,
                    len(records) - len(prompts), len(records), limit)
    return prompts


def encode_choices(tokenizer: PreTrainedTokenizerBase, task: Task, records: Sequence[Values],
                   template: Mapping[str, Any], name: str) -> dict[tuple[str, str], Encoded]:
    """Every choice of the records as the answer to its prompt, by prompt and choice.

    Raises:
        UserError: the chat template rejects one, or it holds a token that ends a reply.
    """
    found: dict[tuple[str, str], Encoded] = {}
    for number, record in enumerate(records, 1):
        for choice in record.get("choices", ()):
            try:
                [found[record["prompt"], choice]] = encode(
                    tokenizer, {"prompt": record["prompt"], "completion": choice}, template)
            except RecordError as error:
                raise UserError(f"{name}: {task.key}: {file_name(task)}:{number} of the tasks: {error}") from None
    return found


def checked(task: Task, records: Sequence[Values], texts: Mapping[int, str]) -> Answered:
    """Check the answers to a task.

    Args:
        texts: the answers by the record's number, from 0.
    """
    found = with_values(task, records, {number: (checks.value_of(task, records[number], text), text)
                                        for number, text in texts.items()})
    labels = checks.labels_of(task, records)
    for row, (number, text) in zip(found.rows, texts.items(), strict=True):
        if labels:
            row |= {"label": labels[checks.comparable(task, records[number]["label"])],
                    "predicted": labels.get(checks.comparable(task, text), -1)}
    return found


def with_values(task: Task, records: Sequence[Values], answered: Mapping[int, tuple[float | None, str]]) -> Answered:
    """The answers to a task whose values are known.

    Args:
        answered: value and text by the record's number, from 0. A value that is not a finite number is kept as None.
    """
    clusters = clusters_of(records)
    answered = {number: (value if value is not None and math.isfinite(value) else None, text)
                for number, (value, text) in answered.items()}
    rows = [{"line": number + 1, "cluster": clusters[number], "value": value}
            for number, (value, _) in answered.items()]
    answers = [{"task": task.name, "record": number + 1,
                "question": conversation_text(prompt_messages(records[number])), "answer": text, "value": value}
               for number, (value, text) in answered.items()]
    return Answered(task, rows, answers, len(records) - len(answered))
