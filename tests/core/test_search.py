"""Promises of `training.search` as it is declared: what cannot work is refused in one line, and the same file always
names the same trials, rungs and cost."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.core import pipeline
from jobs.core.errors import UserError
from jobs.core.search import EARLIEST, Search, description, rows, text_table
from tests import build_pipeline

RANKS = {"lora.r": [4, 8, 16]}


def search(**values: Any) -> Search:
    return Search(**({"candidates": RANKS} | values))


def load(folder: Path, search: Any, **changes: Any) -> pipeline.Training:
    return pipeline.load(build_pipeline.write(folder, training__search=search, **changes)).pipeline.training


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("declared", "message"), [
    ({}, "training.search.candidates: is missing"),
    ({"candidates": {"lora.alpha": [8, 16]}, "seed": 1}, "`seed` is for method: random; a grid takes all 2"),
    ({"candidates": {}}, "candidates: is empty: name a setting and its values, as in `lora.r: [8, 16]`"),
    ({"candidates": {"lora.alpha": []}}, "candidates.lora.alpha: a list: list should have at least 1 item"),
    ({"candidates": {"lora.alpha": [16]}}, "has one combination, so there is nothing to choose"),
    ({"candidates": {"lora.alpha": 16}}, "lora.alpha: 16: input should be a valid list"),
    ({"candidates": {"learning_rate": [1e-3, 2]}}, "candidates.learning_rate.1: 2: input should be less than 1"),
    ({"candidates": {"lora": {"dropout": [0, 1.0]}}}, "candidates.lora.dropout.1: 1.0: input should be less than 1"),
    ({"candidates": {"epochs": [1, 1.5]}}, "candidates.epochs.1: 1.5: input should be a valid integer"),
    ({"candidates": {"lora.target_modules": ["q_proj", "v_proj"]}}, "lora.target_modules.0: 'q_proj'"),
    ({"candidates": {"lora.alpha": [8, 16, 8.0]}}, "8.0 is there twice; each trial has other settings"),
    ({"candidates": {"lora.target_modules": [["k_proj", "q_proj"], ["q_proj", "k_proj"]]}}, "is there twice"),
    ({"candidates": {"lora.rank": [8, 16]}}, "training.search.candidates.lora.rank: unknown key; allowed: r, alpha"),
    ({"candidates": {"learning-rate": [0.1, 0.2]}}, "unknown key; did you mean `learning_rate`?"),
    ({"candidates": {"lora.alpha": [8, 16], "lora": {"alpha": [8]}}}, "names lora.alpha twice"),
    ({"candidates": {"lora": [8, 16]}}, "candidates.lora: a list: input should be a valid dictionary"),
    ({"candidates": {"lora.r": [8, 128]}}, "search.candidates.lora.r: has 128, above serving.max_lora_rank (64)"),
    ({"candidates": {"lora.alpha": list(range(1, 9)), "lora.dropout": [n / 10 for n in range(9)]}},
     "has 72 combinations, and at most 64 are trained: name fewer values, or draw some with method: random"),
    ({"candidates": {"lora.alpha": [8, 16]}, "method": "random"}, "method: random needs `trials`"),
    ({"candidates": {"lora.alpha": [8, 16]}, "method": "random", "trials": 3}, "trials is 3, but there are 2"),
    ({"candidates": {"lora.alpha": [8, 16]}, "method": "random", "trials": 65}, "less than or equal to 64"),
    ({"candidates": {"lora.alpha": list(range(1, 1100)), "lora.dropout": [n / 1000 for n in range(1000)]},
      "method": "random", "trials": 5}, "has 1099000 combinations, and at most 1000000 are drawn from"),
    ({"candidates": {"lora.alpha": [8, 16]}, "trials": 2}, "`trials` is for method: random"),
    ({"candidates": {"lora.alpha": [8, 16]}, "method": "bayes"}, "input should be 'grid' or 'random'"),
    ({"candidates": {"lora.alpha": [8, 16]}, "halving": {"factor": 1}}, "greater than or equal to 2"),
    ({"candidates": {"lora.r": [16, 32]}}, "lora.r is 8, which is not among its candidates in `search`"),
    ({"candidates": {"epochs": [2, 3]}}, "epochs is 1, which is not among its candidates in `search`"),
])
def test_a_search_that_cannot_work_is_refused_in_one_line(tmp_path: Path, declared: dict[str, Any], message: str
                                                         ) -> None:
    with pytest.raises(UserError) as error:
        load(tmp_path, declared)
    assert message in str(error.value)
    if "max_lora_rank" not in message:
        assert "training.search" in str(error.value) or "training: " in str(error.value)


def test_a_search_of_which_nothing_was_written_is_refused(tmp_path: Path) -> None:
    """As where only the first commented line of overlays/kind was switched on: it would train without a search."""
    file = build_pipeline.write(tmp_path, training=None)
    file.write_text(file.read_text() + "training:\n  search:\n")
    with pytest.raises(UserError, match="training.search: is empty: name `candidates`, or remove the key"):
        pipeline.load(file)


@pytest.mark.parametrize("text", ["lora.r: [8, 0]", "lora:\n        r: [8, 0]",
                                  "lora:\n        r:\n        - 8\n        - 0"])
def test_a_refused_value_is_named_with_its_line(tmp_path: Path, text: str) -> None:
    file = build_pipeline.write(tmp_path, training=None)
    lines = file.read_text() + f"training:\n  search:\n    candidates:\n      {text}\n"
    file.write_text(lines)
    with pytest.raises(UserError, match=f"pipeline.yaml:{len(lines.splitlines())}: .*lora.r.1: 0: input should be"):
        pipeline.load(file)


def test_a_value_that_is_set_and_searched_means_its_candidates(tmp_path: Path) -> None:
    training = load(tmp_path, {"candidates": RANKS})
    assert training.lora.r == 8
    assert [trial.lora.r for trial in training.trials()] == [4, 8, 16]


# --- what it means ----------------------------------------------------------------------------------------------------


def test_a_grid_takes_all_combinations_in_an_order_that_does_not_depend_on_the_files(tmp_path: Path) -> None:
    found = search(candidates={"learning_rate": [1e-3, 1e-4], "lora": {"r": [8, 4]}}).settings()
    assert found == [{"lora.r": r, "learning_rate": rate} for r in (8, 4) for rate in (1e-3, 1e-4)]
    assert description(found[0]) == "lora.r 8, learning_rate 0.001"
    modules = search(candidates={"lora.target_modules": [["v_proj", "q_proj"], "all-linear"]}).settings()
    assert [description(each) for each in modules] == ["lora.target_modules q_proj+v_proj",
                                                      "lora.target_modules all-linear"]


def test_each_trial_has_its_settings_and_all_others_of_the_file(tmp_path: Path) -> None:
    training = load(tmp_path, {"candidates": {"lora.dropout": [0.1, 0.2], "epochs": [1, 4]}}, training__seed=9)
    found = training.trials()
    assert [(trial.lora.dropout, trial.epochs) for trial in found] == [(0.1, 1), (0.1, 4), (0.2, 1), (0.2, 4)]
    assert {(trial.seed, trial.lora.r, trial.search) for trial in found} == {(9, 8, None)}


def test_random_trials_are_drawn_by_the_seed_and_never_twice() -> None:
    space = {"lora.alpha": list(range(1, 101)), "epochs": list(range(1, 101))}
    drawn = search(candidates=space, method="random", trials=20, seed=1).settings()
    assert drawn[:2] == [{"lora.alpha": 1, "epochs": 35}, {"lora.alpha": 5, "epochs": 65}], "the same on every machine"
    assert len({tuple(each.values()) for each in drawn}) == 20
    assert drawn != search(candidates=space, method="random", trials=20, seed=2).settings()
    small = {"candidates": {"lora.r": [4, 8]}}
    assert search(**small, method="random", trials=2).settings() == search(**small).settings()


@pytest.mark.parametrize(("trials", "halving", "rungs", "cost"), [
    (3, {}, [(3, "1/3"), (1, "1")], 5 / 3),
    (2, {}, [(2, "1/3"), (1, "1")], 4 / 3),
    (9, {}, [(9, "1/9"), (3, "1/3"), (1, "1")], 7 / 3),
    (10, {}, [(10, "1/9"), (4, "1/3"), (2, "1")], 10 / 9 + 4 * 2 / 9 + 2 * 2 / 3),  # not before a tenth
    (8, {"factor": 2}, [(8, "1/8"), (4, "1/4"), (2, "1/2"), (1, "1")], 2.5),
    (8, {"factor": 10}, [(8, "1/10"), (1, "1")], 1.7),
    (8, {"rungs": 1}, [(8, "1")], 8),
    (8, {"rungs": 2}, [(8, "1/3"), (3, "1")], 8 / 3 + 2),
])
def test_each_rung_keeps_the_best_and_the_cost_is_said_in_trainings(
        trials: int, halving: dict[str, int], rungs: list[tuple[int, str]], cost: float) -> None:
    declared = search(candidates={"lora.alpha": list(range(1, trials + 1))}, halving=halving)
    assert [(rung.trials, str(rung.share)) for rung in declared.rungs()] == rungs
    assert declared.cost(epochs=7) == pytest.approx(cost)


def test_the_cost_of_trials_of_several_lengths_is_in_trainings_of_the_longest() -> None:
    declared = search(candidates={"epochs": [1, 2, 4]})
    assert declared.cost(epochs=9) == pytest.approx((1 / 3) * (4 + 2 + 1) / 4 + 2 / 3)


@given(st.integers(2, 64), st.integers(2, 10), st.integers(1, 5000))
def test_rungs_come_in_order_and_end_with_the_training(trials: int, factor: int, steps: int) -> None:
    rungs = search(candidates={"lora.alpha": list(range(1, trials + 1))}, halving={"factor": factor}).rungs()
    assert rungs[0].trials == trials and rungs[-1].share == 1
    assert [rung.trials for rung in rungs] == sorted((rung.trials for rung in rungs), reverse=True)
    reached = [rung.step(steps) for rung in rungs]
    assert reached == sorted(reached) and reached[0] >= 1 and reached[-1] == steps
    assert rungs[0].share >= EARLIEST


@pytest.mark.parametrize(("declared", "line"), [
    ({}, "3 trials over lora.r: 3 to 1/3 of their steps, 1 to the end; 1.67 trainings"),
    ({"halving": {"rungs": 1}}, "3 trials over lora.r: 3 to the end; 3 trainings"),
    ({"candidates": {"learning_rate": [0.1, 0.01], "epochs": [1, 3]}, "method": "random", "trials": 3},
     "3 trials over learning_rate, epochs: 3 to 1/3 of their steps, 1 to the end; at most 1.44 trainings of the "
     "longest trial")])
def test_before_the_training_a_line_says_what_is_tried_and_what_it_costs(declared: dict[str, Any], line: str) -> None:
    assert search(**declared).summary(epochs=1) == line


GRID = search(candidates={"lora.r": [4, 8], "lora.target_modules": [["v", "q"], "all-linear"]})


@pytest.mark.parametrize(("other", "same"), [
    ({"candidates": {"lora": {"target_modules": [["q", "v"], "all-linear"], "r": [4, 8]}}}, True),
    ({"halving": {"rungs": 3}}, True),
    ({"halving": {"rungs": 1}}, False), ({"halving": {"factor": 2, "rungs": 3}}, False),
    ({"candidates": {"lora.r": [8, 4], "lora.target_modules": [["v", "q"], "all-linear"]}}, False),
    ({"candidates": {"lora.r": [4, 8], "learning_rate": [0.1, 0.2]}}, False),
    ({"method": "random", "trials": 4}, False)])
def test_two_declarations_of_the_same_trials_give_the_same_adapter(other: dict[str, Any], same: bool) -> None:
    assert (search(**({"candidates": GRID.candidates} | other)).identity() == GRID.identity()) is same


def test_an_adapter_keeps_the_digest_that_its_search_gave_it() -> None:
    """With other keys, every adapter that a search chose would be trained again."""
    candidates = {"lora.r": [4, 8, 16]}
    assert search().identity() == {"candidates": candidates, "method": "grid", "halving": {"factor": 3, "rungs": 2}}
    assert search(method="random", trials=2, seed=7).identity() == {
        "candidates": candidates, "method": "random", "trials": 2, "seed": 7, "halving": {"factor": 3, "rungs": 2}}


@pytest.mark.parametrize("changed", [{"seed": 1}, {"trials": 3}])
def test_what_draws_other_trials_makes_another_adapter(changed: dict[str, Any]) -> None:
    drawn = {"method": "random", "trials": 2, "seed": 0}
    assert search(**drawn).identity() != search(**drawn | changed).identity()


@pytest.mark.parametrize("declared", [
    {"candidates": {"lora.alpha": list(range(1, 65))}}, {"candidates": {"lora.alpha": [1, 2]}},
    {"candidates": {"lora.alpha": [1, 2]}, "method": "random", "trials": 2},
    {"candidates": {"lora.alpha": list(range(1, 1001)), "lora.dropout": [n / 1000 for n in range(1000)]},
     "method": "random", "trials": 64}])
def test_a_search_may_be_as_large_as_its_limits_and_no_larger(declared: dict[str, Any]) -> None:
    assert len(search(**declared).settings()) == declared.get("trials", len(declared["candidates"]["lora.alpha"]))


@pytest.mark.parametrize("declared", [
    {"candidates": {"lora.alpha": list(range(1, 66))}},
    {"candidates": {"lora.alpha": list(range(1, 1001)), "lora.dropout": [n / 1001 for n in range(1001)]},
     "method": "random", "trials": 64}])
def test_a_search_above_its_limits_is_refused(declared: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="combinations, and at most"):
        search(**declared)


def test_the_trials_are_shown_as_a_table_with_the_digits_that_were_compared() -> None:
    def trial(number: int, losses: list[float | None], ended: str) -> dict[str, Any]:
        return {"trial": number, "settings": {"lora.r": number * 4, "epochs": 1}, "steps": 30, "ended": ended,
                "rungs": [{"step": 10 * (n + 1), "validation_loss": loss} for n, loss in enumerate(losses)]}

    record = {"trials": [trial(1, [1.5, 1.23456], "chosen"), trial(2, [None], "stopped")]}
    assert rows(record)[1:] == [["1", "lora.r 4, epochs 1", "20 of 30", "1.235", "chosen"],
                                ["2", "lora.r 8, epochs 1", "10 of 30", "not finite", "stopped"]]
    assert text_table(record).splitlines() == [
        "trial  settings            step      validation loss  outcome",
        "1      lora.r 4, epochs 1  20 of 30  1.235            chosen",
        "2      lora.r 8, epochs 1  10 of 30  not finite       stopped"]


def test_the_step_of_a_rung_is_exact() -> None:
    """In floating point, a third of 3 could be 1.0000000000000002, and its ceiling 2."""
    first, last = search().rungs()
    assert (first.step(3), first.step(4), last.step(4), first.share) == (1, 2, 4, Fraction(1, 3))
