"""Promises of `make bench-training`: ratios are taken within a round, and every way trains the same."""

from __future__ import annotations

import pytest

from benchmarks import training
from benchmarks.training_ways import WAYS
from tests import forked

# Each of its thirteen processes would import torch and transformers.
BENCHMARK = """
import subprocess, sys, types
from benchmarks import training
from tests import forked
training.subprocess = types.SimpleNamespace(**{**vars(subprocess), "Popen": forked.Python})
sys.exit(training.main(["--quick"]))
"""


def test_ratios_are_those_within_a_round_and_times_are_for_a_thousand_tokens() -> None:
    """The machine was ten times slower in the second round; TRL took twice the time in both."""
    ours = [training.Steps(1.0, 2.0, 1000, 500.0, [1.0]), training.Steps(10.0, 20.0, 1000, 600.0, [1.0])]
    trl = [training.Steps(4.0, 8.0, 2000, 900.0, [1.0]), training.Steps(40.0, 80.0, 2000, 800.0, [1.0])]
    lines = training.table({"ours": ours, "TRL": trl}, {"TRL": 2e-7})
    assert lines[2] == "| ours | 5500 | 1 | 11000 | 1 | 600 |  |"
    assert lines[3] == "| TRL | 11000 | 2.00 (2.00 to 2.00) | 22000 | 2.00 (2.00 to 2.00) | 900 | 2e-07 |"


@pytest.mark.slow
def test_a_quick_run_measures_all_ways_and_their_losses_are_the_same() -> None:
    done = forked.run([], BENCHMARK)
    assert done.returncode == 0, done.stderr[-5000:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stderr.splitlines()
            if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == list(WAYS)
    assert all(float(row[1]) > 0 and float(row[3]) > 0 and float(row[5]) > 0 for row in rows)
    compared = {row[0]: float(row[6]) for row in rows if row[6]}
    assert compared.keys() == WAYS.keys() - {"padded to the longest"}, "with which the others are compared"
    assert max(compared.values()) < 1e-5
