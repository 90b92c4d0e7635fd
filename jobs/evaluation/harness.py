"""lm-evaluation-harness: its task files on our models, scored by the library itself.

The library gets a model of its own interface (`lm_eval.api.model.LM`) that answers through our code: so the chat
template, batches and stops are those of all other metrics. It gets finished texts (jobs/data/harness.py), renders no
template, reads no file and needs no network.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jobs.core.tasks import Task
from jobs.data.harness import require_installed
from jobs.data.records import Values

Likelihoods = Callable[[Sequence[tuple[str, str]]], Sequence[float]]  # of pairs of prompt and choice, in nats
Generate = Callable[[Sequence[str]], Sequence[str]]


def values_of(task: Task, records: Sequence[Values], likelihoods: Likelihoods,
              generate: Generate) -> tuple[list[float], list[str]]:
    """The metric of each record, from 0 to 1 (NaN if the model gives no numbers), and what was answered.

    Args:
        likelihoods: the log-likelihood of each choice after its prompt.
        generate: the greedy answer to each prompt.
    Raises:
        UserError: the library is not installed.
    """
    require_installed(task.key)
    import datasets
    from lm_eval.api.model import LM
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate

    settings: Mapping[str, Any] = records[0]["settings"]
    choosing = settings["output_type"] == "multiple_choice"
    until = settings["generation"]["until"]
    stops = [until] if isinstance(until, str) else list(until)

    class Model(LM):
        """Our model, as the library asks one."""

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return [(value, False) for value in likelihoods([request.args for request in requests])]

        def generate_until(self, requests: list[Any]) -> list[str]:
            return [_cut(text, stops) for text in generate([request.args[0] for request in requests])]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            raise NotImplementedError("no task file that is taken needs it")

    keys = ("prompt", "choices", "target") if choosing else ("prompt", "target")
    rows = datasets.Dataset.from_list([{key: record[key] for key in keys} for record in records])
    metric = {key: value for key, value in settings["metric"].items() if not choosing or not key.startswith("ignore_")}
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every default
    configured = ConfigurableTask(config={
        "task": task.name, "custom_dataset": lambda **_: {"test": rows}, "test_split": "test",
        "output_type": settings["output_type"], "doc_to_text": "prompt", "doc_to_target": "target",
        **({"doc_to_choice": "choices"} if choosing else {"generation_kwargs": {"until": stops}}),
        "target_delimiter": "", "num_fewshot": 0, "metric_list": [metric]})
    found = evaluate(Model(), {task.name: configured}, bootstrap_iters=0, log_samples=True)
    samples = sorted(found["samples"][task.name], key=lambda sample: sample["doc_id"])
    answers = [_answer(record, sample, choosing) for record, sample in zip(records, samples, strict=True)]
    # Of likelihoods that are no numbers, the library would take one for the highest.
    values = [math.nan if choosing and any(math.isnan(each) for each, _ in sample["filtered_resps"])
              else float(sample[metric["metric"]]) for sample in samples]
    return values, answers


def _answer(record: Values, sample: Mapping[str, Any], choosing: bool) -> str:
    """What was answered: the text, or the likeliest choice."""
    if not choosing:
        return str(sample["filtered_resps"][0])
    values = [value for value, _ in sample["filtered_resps"]]
    return str(record["choices"][values.index(max(values))])


def _cut(text: str, stops: Sequence[str]) -> str:
    """A text up to the first of the texts that end it."""
    ends = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text
