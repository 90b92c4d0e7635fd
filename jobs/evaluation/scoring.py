"""Measuring one model: perplexity on the held-out answers, ROUGE of its own answers, and acceptability."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import sys
import time
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.core.errors import UserError
from jobs.core.metrics import METRICS, Metric, metric_of, score_of
from jobs.core.progress import Progress
from jobs.data.chat import RecordError, special_tokens
from jobs.data.encoding import Encoded, Record, answer, encode, question
from jobs.data.records import Values, conversation_text, is_preference
from jobs.evaluation import harness, tasks
from jobs.evaluation.holdout import Chosen, JsonLines, answered_lines
from jobs.evaluation.metrics import Likelihood, Measurements, implementation, statistic

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from jobs.core.tasks import Task
    from jobs.data.encoded import Split

log = logging.getLogger("jobs")

# A batch's logits are its tokens times the vocabulary, in float32: 512 MiB of them is 2700 tokens at SmolLM2's 49152.
LOGITS_BYTES = 2**29
# With a small vocabulary the rest decides. CPU: a larger batch is no faster, and progress could not be logged every few
# seconds.
TOKENS_PER_BATCH = {"cuda": 16384, "cpu": 2048}
# Keys and values of questions and answers together: an 8 B model keeps about 150 kB a token in bfloat16, 2.4 GB, and
# twice that in float32. Every step reads all weights, so that larger batches are faster on a CPU, too.
TOKENS_PER_GENERATION = {"cuda": 16384, "cpu": 8192}


@dataclass(frozen=True)
class Material:
    """What every model is measured on, and the limits that go with it."""

    holdout: Sequence[Record]
    sentences: Sequence[tuple[str, bool]]  # and whether each is acceptable
    max_length: int  # tokens; longer records are left out, as in training
    max_new_tokens: int  # of an answer
    template: Mapping[str, Any] = field(default_factory=dict)  # arguments of the chat template
    metrics: Sequence[Metric] = METRICS
    answered_records: int = sys.maxsize  # how many held-out questions are answered at most
    # The holdout as the model's own tokenizer encoded it; None: `measure` encodes it.
    encoded: Split | None = None
    tasks: Sequence[tuple[Task, Sequence[Values]]] = ()  # each with its records

    @classmethod
    def read(cls, dataset: Path, acceptability: Path, *, max_length: int, max_new_tokens: int,
             template: Mapping[str, Any] | None = None, metrics: Sequence[Metric] = METRICS,
             answered_records: int = sys.maxsize) -> Material:
        """Read it from the dataset's and the acceptability set's artifacts."""
        return cls(JsonLines(dataset / "holdout.jsonl"),
                   [(line["text"], line["acceptable"]) for line in read_jsonl(acceptability / "acceptability.jsonl")],
                   max_length, max_new_tokens, template or {}, metrics, answered_records)


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file, one a line."""
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@dataclass(frozen=True)
class Measured:
    """What a scores artifact holds of one model: `summary` its scores and counts (scores.json), `values` those of each
    record and sentence by population (records.jsonl, sentences.jsonl, tasks.NAME.jsonl), `generations` its answers, and
    `task_answers` those to the tasks."""

    summary: Mapping[str, Any]
    values: Mapping[str, Sequence[Mapping[str, Any]]]
    generations: Sequence[Mapping[str, Any]]
    task_answers: Sequence[Mapping[str, Any]] = ()


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, material: Material, name: str) -> Measured:
    """Measure one model. A value is None when it is not a finite number, or when nothing in the held-out data can
    measure it.

    Raises:
        UserError: when no held-out record, or too few sentences, can be measured.
    """
    started = time.monotonic()
    positions = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    records = _fitting(tokenizer, material, min(material.max_length, positions), name)

    progress = Progress(f"{name}: held-out records read", len(records))
    sequences = negative_log_likelihoods(model, [each for _, encoded in records for each in encoded], progress,
                                         special_tokens(tokenizer))
    ends = list(itertools.accumulate((len(encoded) for _, encoded in records), initial=0))
    likelihoods = [Likelihood(math.fsum(each.nats for each in sequences[first:last]),
                              sum(each.tokens for each in sequences[first:last]),
                              math.fsum(each.special for each in sequences[first:last]))
                   for first, last in itertools.pairwise(ends)]

    chosen = set(answered_lines(material.holdout, material.answered_records))
    asking = [place for place, (_, encoded) in enumerate(records) if encoded[-1].prompt]
    prompts = {place: list(records[place][1][-1].prompt) for place in asking if records[place][0] in chosen}
    progress = Progress(f"{name}: held-out questions answered", len(prompts))
    answers = dict(zip(prompts, generate(model, tokenizer, list(prompts.values()), material.max_new_tokens, positions,
                                         progress), strict=True))

    tokens = tokenizer([text for text, _ in material.sentences])["input_ids"] if material.sentences else []
    sentences = [(text, acceptable, Encoded.of([], ids[:positions]))
                 for (text, acceptable), ids in zip(material.sentences, tokens, strict=True)]
    lines = [line for line, (*_, encoded) in enumerate(sentences, 1) if len(encoded) > 1]  # a lone token follows none
    sentences = [sentences[line - 1] for line in lines]
    progress = Progress(f"{name}: sentences read", len(sentences))
    sentence_likelihoods = negative_log_likelihoods(model, [encoded for *_, encoded in sentences], progress)

    held_out = Chosen(material.holdout, [line for line, _ in records])
    measurements = Measurements(held_out, likelihoods, [answers.get(place) for place in range(len(records))],
                                [(text, acceptable) for text, acceptable, _ in sentences], sentence_likelihoods)
    values = _values(measurements, {"records": [line for line, _ in records], "sentences": lines}, material.metrics)
    answered = [_answer_task(model, tokenizer, task, prompts_of_task, material, positions, name)
                for task, prompts_of_task in material.tasks]
    values |= {each.task.key: [*each.rows] for each in answered}
    summary = {"model": name, **scores_of(values, material.metrics), "records": len(records),
               "records_too_long": len(material.holdout) - len(records),
               "completion_tokens": sum(each.tokens for each in likelihoods), "questions": len(prompts),
               "questions_left_out": len(asking) - len(prompts), "sentences": len(sentences),
               "vocabulary": vocabulary(tokenizer),
               **({"tasks": {each.task.name: each.summary() for each in answered}} if answered else {})}
    log.info("%s: measured in %.0f s", name, time.monotonic() - started)
    generations = [{"record": row["line"], "question": question_text(record), "reference": answer(record),
                    "answer": text, "rougeL": row["rougeL"]}
                   for record, text, row in zip(held_out, measurements.answers, values["records"], strict=True)
                   if text is not None]
    return Measured(summary, values, generations, [row for each in answered for row in each.answers])


def _values(measurements: Measurements, lines: Mapping[str, Sequence[int]],
            metrics: Sequence[Metric]) -> dict[str, list[dict[str, Any]]]:
    """The values that each metric has of each record and sentence, by population; `line` is the line in the data."""
    values: dict[str, list[dict[str, Any]]] = {name: [{"line": line} for line in lines[name]] for name in lines}
    for metric in (metric for metric in metrics if metric.population in lines):  # tasks have prompts of their own
        for kept, row in zip(values[metric.population], implementation(metric).rows(measurements), strict=True):
            kept |= {key: value if math.isfinite(value) else None for key, value in (row or {}).items()}
    return values


def _answer_task(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, records: Sequence[Values],
                 material: Material, positions: int, name: str) -> tasks.Answered:
    """One model's greedy answers to the prompts of a task, checked."""
    limit = min(material.max_length, positions - 1)  # with room for an answer
    if task.lm_eval:
        return _answer_harness(model, tokenizer, task, records, material, limit, positions, name)
    prompts = tasks.encode_prompts(tokenizer, task, records, limit, material.template, name)
    progress = Progress(f"{name}: prompts of {task.key} answered", len(prompts))
    answers = generate(model, tokenizer, list(prompts.values()), task.max_new_tokens or material.max_new_tokens,
                       positions, progress)
    return tasks.checked(task, records, dict(zip(prompts, answers, strict=True)))


def _answer_harness(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, records: Sequence[Values],
                    material: Material, limit: int, positions: int, name: str) -> tasks.Answered:
    """A task of lm-evaluation-harness, with the likelihoods and the answers of this module."""
    prompts = tasks.encode_prompts(tokenizer, task, records, limit, material.template, name)
    choices = tasks.encode_choices(tokenizer, task, records, material.template, name)
    fitting = [number for number in prompts if all(
        len(choices[records[number]["prompt"], choice]) <= limit for choice in records[number].get("choices", ()))]
    if not fitting:
        raise UserError(f"{name}: {task.key}: none of the {len(records)} prompts fits with its choices: {limit} tokens "
                        "are allowed (training.max_length, or what the model knows). Raise it, or shorten them")
    tokens = {records[number]["prompt"]: prompts[number] for number in prompts}

    def likelihoods(pairs: Sequence[tuple[str, str]]) -> list[float]:
        progress = Progress(f"{name}: choices of {task.key} read", len(pairs))
        found = negative_log_likelihoods(model, [choices[pair] for pair in pairs], progress, special_tokens(tokenizer))
        return [each.special - each.nats for each in found]  # of the text, without the token that ends a reply

    def answer_prompts(texts: Sequence[str]) -> list[str]:
        longest = records[0]["settings"]["generation"]["max_gen_toks"] or task.max_new_tokens or material.max_new_tokens
        return generate(model, tokenizer, [tokens[text] for text in texts], longest, positions,
                        Progress(f"{name}: prompts of {task.key} answered", len(texts)))

    values, texts = harness.values_of(task, [records[number] for number in fitting], likelihoods, answer_prompts)
    return tasks.with_values(task, records, dict(zip(fitting, zip(values, texts, strict=True), strict=True)))


def scores_of(values: Mapping[str, Sequence[Mapping[str, Any]]],
              metrics: Sequence[Metric]) -> dict[str, float | None]:
    """Every score of these metrics by its key; None where it is not a finite number, or nothing can measure it."""
    import numpy as np

    from jobs.evaluation.confidence import Clusters

    scores: dict[str, float | None] = {}
    for key in (score.key for metric in metrics for score in metric.scores):
        rows = measured(key, values)
        clusters = Clusters.of(range(len(rows)))
        with np.errstate(all="ignore"):
            value = float(statistic(key, rows, clusters)(np.ones((1, len(rows))))[0][0]) if rows else math.nan
        scores[key] = value if math.isfinite(value) else None
    return scores


def measured(key: str, values: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Mapping[str, Any]]:
    """The rows of those records or sentences that a score is measured on: a text without a question has no ROUGE."""
    metric = metric_of(key)
    columns = score_of(key).columns or metric.columns
    return [row for row in values.get(metric.population, ()) if all(column in row for column in columns)]


def question_text(record: Record) -> str:
    """A record's question as people read it: the messages before the answer, with roles where they are several."""
    return conversation_text(question(record) or [])


@dataclass(frozen=True)
class ScoredTokens:
    """The scored tokens of a batch of sequences. Tensors are on the CPU and have one value a token."""

    sequences: list[int]  # their numbers
    rows: Tensor  # of each token, the place of its sequence in `sequences`
    places: Tensor  # its place in its sequence
    tokens: Tensor
    nats: Tensor  # its negative log-likelihood, float64
    likeliest: Tensor  # whether the model would have chosen it

    def sums(self, values: Tensor) -> list[float]:
        """The sum of the tokens' values for each sequence."""
        import torch

        sums: list[float] = torch.zeros(len(self.sequences), dtype=torch.float64).index_add_(0, self.rows,
                                                                                             values).tolist()
        return sums


def scored_tokens(model: PreTrainedModel, sequences: Sequence[Encoded]) -> Iterator[ScoredTokens]:
    """Read sequences, and score the tokens of each that are learned. A first token is not scored: nothing precedes it.

    Batches hold sequences of similar length, padded on the right, with logits in float32 whatever the model computes
    in.
    """
    import torch

    vocabulary_size = int(model.get_output_embeddings().weight.shape[0])
    budget = min(TOKENS_PER_BATCH[model.device.type], LOGITS_BYTES // (4 * vocabulary_size))
    for batch in batches([len(s) for s in sequences], budget):
        chosen = [sequences[i] for i in batch]
        longest = max(map(len, chosen))
        ids = torch.zeros(len(chosen), longest, dtype=torch.long)
        attended, scored = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for row, sequence in enumerate(chosen):
            ids[row, : len(sequence)] = torch.tensor(sequence.tokens)
            attended[row, : len(sequence)] = 1
            for first, last in sequence.learned:
                scored[row, max(first, 1) : last] = True  # nothing precedes a first token
        wanted, tokens = scored[:, 1:], ids[:, 1:][scored[:, 1:]]
        with torch.inference_mode():
            logits = model(input_ids=ids.to(model.device), attention_mask=attended.to(model.device),
                           use_cache=False).logits[:, :-1][wanted.to(model.device)].float()
            nats = torch.nn.functional.cross_entropy(logits, tokens.to(model.device), reduction="none")
            likeliest = logits.argmax(-1).cpu() == tokens
        rows, places = wanted.nonzero(as_tuple=True)
        yield ScoredTokens(batch, rows, places + 1, tokens, nats.double().cpu(), likeliest)


def negative_log_likelihoods(model: PreTrainedModel, sequences: Sequence[Encoded],
                             progress: Progress, special: AbstractSet[int] = frozenset()) -> list[Likelihood]:
    """For each sequence, the summed negative log-likelihood of its learned tokens.

    Args:
        special: the tokens that are no text; their share of the sum is counted apart.
    """
    import torch

    results = [Likelihood(0.0, 0)] * len(sequences)
    no_text = torch.tensor(sorted(special), dtype=torch.long)
    for batch in scored_tokens(model, sequences):
        of_special = batch.nats.where(torch.isin(batch.tokens, no_text), 0.0)  # also of infinite ones
        for i, *sums in zip(batch.sequences, batch.sums(batch.nats), batch.sums(of_special), strict=True):
            results[i] = Likelihood(sums[0], sequences[i].scored, sums[1])
        progress.add(len(batch.sequences))
    return results


def generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]],
             max_new_tokens: int, positions: int, progress: Progress) -> list[str]:
    """The model's greedy answer to each prompt: up to its end token, at most `max_new_tokens`, and no further than the
    model has positions. Batches hold prompts of similar length, padded on the left."""
    import torch
    from transformers import GenerationConfig

    results = [""] * len(prompts)
    stops = stop_tokens(model, tokenizer)
    # Replaces the model's own defaults (sampling, repetition penalties): this measures the model, not its settings.
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=stops, pad_token_id=tokenizer.pad_token_id)
    rooms = [min(max_new_tokens, positions - len(prompt)) for prompt in prompts]
    with torch.inference_mode():
        for room, batch in _of_equal_room([len(prompt) for prompt in prompts], rooms,
                                          TOKENS_PER_GENERATION[model.device.type]):
            chosen = [prompts[i] for i in batch]
            longest = max(map(len, chosen))
            ids = torch.full((len(chosen), longest), int(tokenizer.pad_token_id))
            attended = torch.zeros_like(ids)
            for row, prompt in enumerate(chosen):
                ids[row, longest - len(prompt) :] = torch.tensor(prompt)
                attended[row, longest - len(prompt) :] = 1
            written = model.generate(input_ids=ids.to(model.device), attention_mask=attended.to(model.device),
                                     max_new_tokens=room)
            for i, tokens in zip(batch, written[:, longest:].tolist(), strict=True):
                end = next((at for at, token in enumerate(tokens) if token in stops), len(tokens))
                results[i] = str(tokenizer.decode(tokens[:end], skip_special_tokens=True)).strip()
            progress.add(len(batch))
    return results


def _of_equal_room(lengths: Sequence[int], rooms: Sequence[int], tokens: int) -> Iterator[tuple[int, list[int]]]:
    """`batches` of prompts, each with how many tokens its answers may have: a long prompt, which leaves little room to
    the model's last position, must not cut the other answers of its batch short."""
    for room in sorted(set(rooms)):
        members = [i for i, each in enumerate(rooms) if each == room]
        for batch in batches([lengths[i] + room for i in members], tokens):
            yield room, [members[place] for place in batch]


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens at which an answer ends, as vLLM has them: the tokenizer's end token and those of the model's
    generation_config.json."""
    own = model.generation_config.eos_token_id if model.generation_config else None
    return sorted({int(tokenizer.eos_token_id), *([own] if isinstance(own, int) else own or [])})


def batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, at most `tokens` each with padding, one item at least. The longest come
    first, so that memory too small shows at once and time left is never underestimated."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        size = max(1, tokens // lengths[order[0]])
        yield order[:size]
        order = order[size:]


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of the tokens and their ids: models with the same one have comparable perplexities."""
    tokens = sorted((str(token), int(number)) for token, number in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16]


def _fitting(tokenizer: PreTrainedTokenizerBase, material: Material, limit: int,
             name: str) -> list[tuple[int, list[Encoded]]]:
    """The held-out records of at most `limit` tokens by line, encoded; the rest is left out, with a warning.

    So is a record whose answers are special tokens only: it has no text to measure.
    """
    records: Iterable[tuple[int, Sequence[Encoded]]]
    if material.encoded is None:
        records = _encode(tokenizer, material, name)
    else:
        lines = material.encoded.records.tolist()
        records = ((line, [sequence for _, sequence in sequences]) for line, sequences
                   in itertools.groupby(zip(lines, material.encoded, strict=True), key=lambda each: each[0]))
        if material.holdout and is_preference(material.holdout[0]):  # chosen answer, rejected answer
            records = ((line, encoded[:1]) for line, encoded in records)
    special, fitting, shortest = special_tokens(tokenizer), [], sys.maxsize
    for line, encoded in records:
        longest = max(map(len, encoded))
        shortest = min(shortest, longest)
        if longest <= limit and any(each.has_text(special) for each in encoded):
            # As arrays: a list of Python's numbers takes up to nine times the memory.
            fitting.append((line, [Encoded(array("i", each.tokens), each.learned) for each in encoded]))
    if not fitting:  # an encoded holdout leaves out what is longer than training.max_length, and always holds some
        raise UserError(f"{name}: none of the {len(material.holdout)} held-out records fits: the shortest has "
                        f"{shortest if shortest < sys.maxsize else 0} tokens and {limit} are allowed "
                        "(training.max_length, or what the model knows). Raise it, or shorten the records")
    if len(fitting) < len(material.holdout):
        log.warning("%s: %d of %d held-out records have more than %d tokens and are left out", name,
                    len(material.holdout) - len(fitting), len(material.holdout), limit)
    return fitting


def _encode(tokenizer: PreTrainedTokenizerBase, material: Material,
            name: str) -> Iterator[tuple[int, list[Encoded]]]:
    for line, record in enumerate(material.holdout, 1):
        try:
            yield line, encode(tokenizer, record, material.template)
        except RecordError as error:
            raise UserError(f"{name}: holdout.jsonl:{line} of the dataset: {error}") from None
