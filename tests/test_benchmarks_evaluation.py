"""Promises of `make bench-evaluation`: both ways give the same values, and ratios are taken within a round."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks import evaluation
from benchmarks.evaluation import BEFORE, OURS, Cost, Run
from jobs.core.errors import UserError
from tests import forked

# Each of its three processes would import torch and transformers.
BENCHMARK = """
import subprocess, sys, types
from benchmarks import evaluation
from tests import forked

def run(command, env, **options):
    process = forked.Python(command, env, stdout=subprocess.PIPE)
    output = process.stdout.read()
    return subprocess.CompletedProcess(command, process.wait(), output)

evaluation.subprocess = types.SimpleNamespace(**{**vars(subprocess), "run": run})
sys.exit(evaluation.main(["--quick"]))
"""
VALUES = {"base": {"nats": [2.0, 4.0], "tokens": [3, 5], "answers": ["Yes.", "No."], "sentences": [-1.0],
                   "scores": {"perplexity": 3.0}}}


def run(speed: float, imports: float = 4.0) -> Run:
    return Run({"imports": Cost(imports, imports), "loading": Cost(0.5, 0.5), "measuring": Cost(speed, 2 * speed)},
               VALUES)


def test_ratios_are_those_within_a_round_with_imports_and_without() -> None:
    """The machine was ten times slower in the second round."""
    lines = evaluation.table({OURS: [run(1.0), run(10.0)], BEFORE: [run(5.0), run(50.0)]})
    assert lines[2] == "| imports | 4.00 | 4.00 | 4.00 | 4.00 | 1.0 (1.0 to 1.0) | 1.0 (1.0 to 1.0) |"
    assert lines[4] == "| measuring | 5.50 | 11.00 | 27.50 | 55.00 | 5.0 (5.0 to 5.0) | 5.0 (5.0 to 5.0) |"
    assert lines[5].startswith("| all | 10.00 | 15.50 | 32.00 | 59.50 |")


def test_values_that_differ_are_found_and_other_records_are_an_error() -> None:
    base = VALUES["base"]
    other = dataclasses.replace(run(1.0), values={"base": {**base, "nats": [2.0, 4.4], "answers": ["Yes.", "Never."]}})
    assert evaluation.differences(run(1.0), run(2.0)) == {"numbers": 0.0, "scores": 0.0, "answers": 0.0}
    assert evaluation.differences(run(1.0), other) == {"numbers": pytest.approx(0.4 / 4.4), "scores": 0.0,
                                                       "answers": 1.0}
    with pytest.raises(UserError, match="base: the ways did not measure the same tokens"):
        evaluation.differences(run(1.0), dataclasses.replace(other, values={"base": {**base, "tokens": [3]}}))


@pytest.mark.slow
def test_a_quick_run_measures_both_ways_and_their_values_are_the_same() -> None:
    done = forked.run([], BENCHMARK)
    assert done.returncode == 0, done.stderr[-5000:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stderr.splitlines()
            if line.startswith("| ")]
    assert [row[0] for row in rows[1:5]] == [*evaluation.PARTS, "all"]
    assert [row[0].split()[0] for row in rows[6:]] == list(evaluation.GATE)
    assert all(float(cell) >= 0 for row in [*rows[2:5], *rows[6:]] for cell in row[1:3])
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("Largest relative difference")]
    numbers, scores = (float(word.strip(",.")) for word in said.split() if "e-" in word)
    assert numbers < 1e-4 and scores < 1e-4
    assert said.endswith("Answers that differ: 0.")
