"""`training.search`: settings that training chooses by itself, as the pipeline file declares them.

What is decided here follows from the declaration alone: which trials there are, how far each rung goes, and what the
search costs. jobs/training/search.py runs them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from jobs.core.declarations import Strict
from jobs.core.environment import SERVABLE_RANKS

# The kinds of the settings that can be searched, which are also those of the keys themselves.
Rank = Annotated[int, Field(ge=1, le=max(SERVABLE_RANKS))]
Alpha = Annotated[float, Field(gt=0)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
TargetModules = Literal["all-linear"] | Annotated[list[str], Field(min_length=1)]
Epochs = Annotated[int, Field(ge=1)]
LearningRate = Annotated[float, Field(gt=0, lt=1)]

FILE = "search.json"  # in an adapter that a search chose
PRECISION = 3  # digits of the losses that are compared, in nats a token
NO_VALIDATION = ("training.search chooses by the loss on the validation split, which is empty. Set dataset.validation, "
                 "for example to 0.1, or `\"split\": \"validation\"` in some records")
MOST_TRIALS = 64
MOST_COMBINATIONS = 1_000_000  # of which `method: random` draws trials
# The learning rate rises during the first tenth of a training. To compare trials before that would be too early.
EARLIEST = Fraction(1, 10)

T = TypeVar("T")


def normalized(value: Any) -> Any:
    """A setting, so that two that mean the same are equal: the order of target modules means nothing."""
    return sorted(set(value)) if isinstance(value, list) else value


def _distinct(values: list[T]) -> list[T]:
    seen: list[Any] = []
    for value in map(normalized, values):
        if value in seen:
            raise PydanticCustomError("duplicate", "{value} is there twice; each trial has other settings",
                                      {"value": str(value)})
        seen.append(value)
    return values


Values = Annotated[list[T], Field(min_length=1), AfterValidator(_distinct)]


class LoraCandidates(Strict):
    r: Values[Rank] | None = None
    alpha: Values[Alpha] | None = None
    dropout: Values[Dropout] | None = None
    target_modules: Values[TargetModules] | None = None


class Candidates(Strict):
    """The values of each setting that is searched. `lora.r: [4, 8]` is the same as `lora: {r: [4, 8]}`."""

    lora: LoraCandidates = LoraCandidates()
    learning_rate: Values[LearningRate] | None = None
    epochs: Values[Epochs] | None = None

    @model_validator(mode="before")
    @classmethod
    def _nested(cls, values: Any) -> Any:
        """Dotted keys become nested ones."""
        if not isinstance(values, dict):
            return values
        nested = {key: value for key, value in values.items() if not str(key).startswith("lora.")}
        lora = nested.get("lora", {})
        if not isinstance(lora, dict):
            return values
        dotted = {key.removeprefix("lora."): value for key, value in values.items() if key not in nested}
        if both := sorted(lora.keys() & dotted.keys()):
            raise PydanticCustomError("twice", "names lora.{key} twice, as `lora.{key}` and in `lora`",
                                      {"key": both[0]})
        return {**nested, "lora": {**lora, **dotted}} if dotted else values

    def by_key(self) -> dict[str, list[Any]]:
        """The values of each key that is searched: `lora.r` and the like, in a fixed order."""
        found = {f"lora.{name}": getattr(self.lora, name) for name in LoraCandidates.model_fields}
        found |= {name: getattr(self, name) for name in Candidates.model_fields if name != "lora"}
        return {key: list(map(normalized, values)) for key, values in found.items() if values is not None}


class Halving(Strict):
    """Successive halving (Jamieson and Talwalkar 2016): at each rung, the best of the trials go on."""

    # One trial in `factor` goes on, rounded up, and the next rung is `factor` times as far.
    factor: Annotated[int, Field(ge=2, le=10)] = 3
    # The last is the end of the training; with 1, all trials are trained to the end. By default as many as leave one
    # trial for the last, the first not before a tenth of the training.
    rungs: Annotated[int, Field(ge=1, le=6)] | None = None


@dataclass(frozen=True)
class Rung:
    """A point at which trials are compared: how many reach it, and the share of its steps that each has done there."""

    trials: int
    share: Fraction

    def step(self, steps: int) -> int:
        """The step of the rung in a training of `steps`."""
        return math.ceil(self.share * steps)


class Search(Strict):
    """Settings that training chooses among, by the loss on the validation split."""

    candidates: Candidates
    method: Literal["grid", "random"] = "grid"  # all combinations, or `trials` of them, drawn by `seed`
    trials: Annotated[int, Field(ge=2, le=MOST_TRIALS)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    halving: Halving = Halving()

    @field_validator("candidates")
    @classmethod
    def _some(cls, candidates: Candidates) -> Candidates:
        found = _combinations(candidates)
        if not candidates.by_key():
            raise PydanticCustomError("candidates", "is empty: name a setting and its values, as in `lora.r: [8, 16]`",
                                      {})
        if found < 2:
            raise PydanticCustomError("candidates", "has one combination, so there is nothing to choose: add values, "
                                      "or remove `search`", {})
        return candidates

    @model_validator(mode="after")
    def _feasible(self) -> Search:
        found = _combinations(self.candidates)
        drawn = [key for key in ("trials", "seed") if key in self.model_fields_set]
        if self.method == "grid" and drawn:
            raise PydanticCustomError("trials", "`{key}` is for method: random; a grid takes all {found} combinations",
                                      {"key": drawn[0], "found": found})
        if self.method == "grid" and found > MOST_TRIALS:
            raise PydanticCustomError("trials", "has {found} combinations, and at most {most} are trained: name fewer "
                                      "values, or draw some with method: random and trials: N",
                                      {"found": found, "most": MOST_TRIALS})
        if self.method == "random" and self.trials is None:
            raise PydanticCustomError("trials", "method: random needs `trials`, the number of combinations to draw",
                                      {})
        if self.trials is not None and self.trials > found:
            raise PydanticCustomError("trials", "trials is {trials}, but there are {found} combinations: name more "
                                      "values, or lower it", {"trials": self.trials, "found": found})
        if found > MOST_COMBINATIONS:
            raise PydanticCustomError("trials", "has {found} combinations, and at most {most} are drawn from: name "
                                      "fewer values", {"found": found, "most": MOST_COMBINATIONS})
        return self

    def settings(self) -> list[dict[str, Any]]:
        """The settings of each trial, by key, in the order in which trials are numbered."""
        candidates = self.candidates.by_key()
        numbers: Sequence[int] = range(_combinations(self.candidates))
        if self.trials is not None:
            numbers = sorted(random.Random(self.seed).sample(numbers, self.trials))
        return [_combination(candidates, number) for number in numbers]

    def rungs(self) -> list[Rung]:
        """The rungs, in order; the last is the end of the training."""
        trials, factor = self.trials or _combinations(self.candidates), self.halving.factor
        count = self.halving.rungs
        if count is None:
            count = 1
            while factor ** (count - 1) < trials and Fraction(1, factor**count) >= EARLIEST:
                count += 1
        return [Rung(-(-trials // factor**n), Fraction(1, factor ** (count - 1 - n))) for n in range(count)]

    def cost(self, epochs: int) -> float:
        """The steps of all trials, in trainings of the longest of them; at most, where `epochs` is searched.

        Args:
            epochs: of a trial, where they are not searched.
        """
        longest = sorted((trial.get("epochs", epochs) for trial in self.settings()), reverse=True)
        done, total = Fraction(0), Fraction(0)
        for rung in self.rungs():
            total += sum(longest[:rung.trials]) * (rung.share - done)
            done = rung.share
        return float(total / longest[0])

    def summary(self, epochs: int) -> str:
        """How many trials there are, and what they cost, in a line."""
        rungs, keys = self.rungs(), list(self.candidates.by_key())
        parts = [f"{rung.trials} to {'the end' if rung.share == 1 else f'{rung.share} of their steps'}"
                 for rung in rungs]
        at_most = "at most " if "epochs" in keys else ""
        return (f"{rungs[0].trials} trials over {', '.join(keys)}: {', '.join(parts)}; {at_most}"
                f"{self.cost(epochs):.3g} trainings{' of the longest trial' if at_most else ''}")

    def identity(self) -> dict[str, Any]:
        """What the digest of the adapter needs of the search: two declarations of the same trials have the same."""
        drawn = {"trials": self.trials, "seed": self.seed} if self.method == "random" else {}
        return {"candidates": self.candidates.by_key(), "method": self.method, **drawn,
                "halving": {"factor": self.halving.factor, "rungs": len(self.rungs())}}


def description(settings: Mapping[str, Any]) -> str:
    """The settings of a trial as people read them: `lora.r 8, learning_rate 0.001`."""
    return ", ".join(f"{key} {'+'.join(value) if isinstance(value, list) else value}"
                     for key, value in settings.items())


def shown(loss: float | None) -> str:
    """A loss with the digits that are compared."""
    return "not finite" if loss is None else f"{loss:.{PRECISION}f}"


def rows(record: Mapping[str, Any]) -> list[list[str]]:
    """The trials of a search, by its record in FILE, as a table with a header."""
    table = [["trial", "settings", "step", "validation loss", "outcome"]]
    for trial in record["trials"]:
        last = trial["rungs"][-1]
        table.append([str(trial["trial"]), description(trial["settings"]), f"{last['step']} of {trial['steps']}",
                      shown(last["validation_loss"]), trial["ended"]])
    return table


def text_table(record: Mapping[str, Any]) -> str:
    """The trials of a search as plain text for a log."""
    table = rows(record)
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                     for row in table)


def _combinations(candidates: Candidates) -> int:
    return math.prod(map(len, candidates.by_key().values()))


def _combination(candidates: Mapping[str, list[Any]], number: int) -> dict[str, Any]:
    """The combination of a number in the grid, of which the last key changes fastest."""
    chosen = {}
    for key in reversed(list(candidates)):
        number, place = divmod(number, len(candidates[key]))
        chosen[key] = candidates[key][place]
    return {key: chosen[key] for key in candidates}
