"""What a report says of single records: how many got better and worse against another model, and which answers to
show."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.core.metrics import Score, metric_of, score_of
from jobs.evaluation.content import ROLES, Evaluation, other_tokens
from jobs.evaluation.gate import Values

Generations = Mapping[str, Sequence[Mapping[str, Any]]]  # each model's generations.jsonl, by role

# What is compared record by record: these scores, and the value of each record of a task.
BY_RECORD = ("rougeL", "perplexity")
# A record is unchanged whose value differs by less than 0.005, or, of scores that differ by a factor, by less than 1 %.
UNCHANGED, UNCHANGED_FACTOR = 0.005, 1.01


@dataclass(frozen=True)
class Sample:
    """One held-out question, its reference answer, and what each model answered with the answer's ROUGE-L."""

    question: str
    reference: str
    answers: Mapping[str, tuple[str, float]]  # by role
    record: int  # the line in holdout.jsonl


@dataclass(frozen=True)
class Change:
    """One record's score of the fine-tuned model beside that of another model."""

    record: int  # the line in holdout.jsonl, or in the task's file
    before: float
    after: float
    gain: float  # above 0 is better; of perplexity the logarithm of the ratio


@dataclass(frozen=True)
class Comparison:
    """What changed for each record against another model, the worst change first. The records are those of the
    holdout or, where the score is that of a task, of the task."""

    score: Score
    than: str  # a role
    changes: Sequence[Change]

    @property
    def unchanged(self) -> float:
        """Below this gain or loss a record counts as unchanged."""
        return math.log(UNCHANGED_FACTOR) if self.score.log_scale else UNCHANGED

    @property
    def worse(self) -> list[Change]:
        """The records that got worse, the worst first."""
        return [change for change in self.changes if change.gain <= -self.unchanged]

    @property
    def better(self) -> list[Change]:
        """The records that got better, the best first."""
        return [change for change in reversed(self.changes) if change.gain >= self.unchanged]

    @property
    def counts(self) -> str:
        """How many got better and worse, e.g. `66 better, 5 worse, 2 unchanged`."""
        better, worse = len(self.better), len(self.worse)
        return f"{better} better, {worse} worse, {len(self.changes) - better - worse} unchanged"


def comparisons(models: Mapping[str, Values], other_tokens: Collection[str] = ()) -> list[Comparison]:
    """What changed for each record against the base model and the promoted adapter: by its answer's ROUGE-L, by its
    perplexity, and for each task by what the check found.

    Args:
        models: the values of each model by role.
        other_tokens: the roles with other tokens than the fine-tuned model's: not compared per token.
    """
    tasks = [name for name, rows in models.get("fine_tuned", {}).items() if any("value" in row for row in rows)]
    found = [Comparison(score_of(key), than, _changes(score_of(key), models[than], models["fine_tuned"]))
             for than in ("base", "promoted") if than in models for key in (*BY_RECORD, *tasks)
             if not (score_of(key).per_token and than in other_tokens)]
    return [comparison for comparison in found if comparison.changes]


def _changes(score: Score, theirs: Values, mine: Values) -> list[Change]:
    population = metric_of(score.key).population
    before, after = ({row["line"]: row for row in of_model.get(population, [])} for of_model in (theirs, mine))
    changes = []
    for line in sorted(before.keys() & after.keys()):
        first, second = (_of_record(score.key, rows[line]) for rows in (before, after))
        if first is None or second is None:
            continue
        gain = _difference(second, first, by_factor=score.log_scale)
        changes.append(Change(line, first, second, gain if score.higher_is_better else -gain))
    return sorted(changes, key=lambda change: change.gain)


def _of_record(key: str, row: Mapping[str, Any]) -> float | None:
    """A record's own score; None where it has none."""
    if key != "perplexity":
        found: float | None = row.get("value", row.get(key))
        return found
    if "nats" not in row or not row["tokens"]:
        return None
    mean = math.inf if row["nats"] is None else row["nats"] / row["tokens"]
    return math.exp(mean) if mean < 700 else math.inf


def _difference(value: float, other: float, *, by_factor: bool) -> float:
    if value == other:  # also of two that are infinite
        return 0.0
    return _log(value) - _log(other) if by_factor else value - other


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def every_sample(generations: Generations) -> dict[int, Sample]:
    """The held-out questions that the fine-tuned model was asked, by record, with the answers of all models."""
    by_role = {role: {line["record"]: (line["answer"], line["rougeL"]) for line in lines}
               for role, lines in generations.items()}
    return {line["record"]: Sample(line["question"], line["reference"],
                                   {role: by_role[role][line["record"]] for role in ROLES
                                    if line["record"] in by_role.get(role, {})}, line["record"])
            for line in generations["fine_tuned"]}


def samples(generations: Generations, count: int = 6, worst: int = 3) -> tuple[list[Sample], list[Sample]]:
    """Held-out questions with the models' answers: `count` evenly spaced ones, and of the others the `worst` on
    which the fine-tuned model did worst (none that it got fully right)."""
    everything = list(every_sample(generations).values())
    step = max(1.0, (len(everything) - 1) / max(1, count - 1))
    places = sorted({round(i * step) for i in range(count)} & set(range(len(everything))))
    rest = [sample for place, sample in enumerate(everything) if place not in places]
    rest.sort(key=lambda sample: sample.answers["fine_tuned"][1])
    return ([everything[place] for place in places],
            [sample for sample in rest[:worst] if sample.answers["fine_tuned"][1] < 0.995])


@dataclass(frozen=True)
class Flips:
    """Some of the records that got worse, or better, than another model's: the largest change first."""

    title: str
    score: Score
    than: str  # a role
    total: int  # how many there are; `records` are the first of them
    records: Sequence[tuple[Change, Sample | None]]  # all with a sample, or none


@dataclass(frozen=True)
class RecordByRecord:
    """What the report says of single records."""

    comparisons: Sequence[Comparison]
    flips: Sequence[Flips]
    spaced: Sequence[Sample]  # evenly over the held-out questions
    lowest: Sequence[Sample]  # where the fine-tuned model does worst, of those that are shown nowhere else

    @classmethod
    def of(cls, evaluation: Evaluation, generations: Generations, models: Mapping[str, Values], *,
           answers: bool = True) -> RecordByRecord:
        """Choose the records to show.

        Args:
            models: the values of each model by role.
            answers: whether questions and answers may be shown; without them records are lines and numbers.
        """
        compared = comparisons(models, other_tokens(evaluation))
        by_record = every_sample(generations) if answers else {}
        flips: list[Flips] = []
        for comparison in compared:
            of_holdout = comparison.score.key in BY_RECORD
            if of_holdout and any(other.than == comparison.than and other.score.key in BY_RECORD for other in flips):
                continue  # the same records by perplexity
            known = by_record if of_holdout else {}
            name = "" if of_holdout else f"{comparison.score.label}: "
            for title, changes, count in (("worse", comparison.worse, 5), ("better", comparison.better, 3)):
                shown = [(change, known.get(change.record)) for change in changes[:count if known else 2 * count]]
                if any(sample is None for _, sample in shown):  # some are texts without a question
                    shown = [(change, None) for change, _ in shown]
                if shown:
                    flips.append(Flips(f"{name}{title} than the {ROLES[comparison.than]} model", comparison.score,
                                       comparison.than, len(changes), shown))
        spaced, lowest = samples(generations) if answers else ([], [])
        seen = {change.record for each in flips for change, sample in each.records if sample}
        return cls(compared, flips, spaced, [sample for sample in lowest if sample.record not in seen])
