"""Promises of the benchmark of relocation: every way brings the same bytes, and its tables compare with ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import relocation


def test_quick_fetches_through_breaking_connections(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert relocation.main(["--quick", "--folder", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert output.count("| ours | ") == output.count("| snapshot_download | ") == 1
    assert "Killed 1 times, ours was sent " in output


def test_the_table_has_ratios_to_ours() -> None:
    found = {"ours": [relocation.Run(2.0, 1.0, 60), relocation.Run(1.0, 1.0, 60)],
             "curl": [relocation.Run(4.0, 3.0, 30), relocation.Run(2.0, 3.0, 30)]}
    lines = relocation.table(relocation.Setting("unlimited", 1), found, 100_000_000).splitlines()
    assert lines[-2:] == ["| ours | 1.50 | 67 | 1.00 (1.00 to 1.00) | 1.00 | 60 |",
                          "| curl | 3.00 | 33 | 2.00 (2.00 to 2.00) | 3.00 | 30 |"]
