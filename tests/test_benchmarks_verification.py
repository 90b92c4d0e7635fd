"""Promises of the benchmark of verification: its three ways are what they say, and its table has ratios."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import verification
from jobs.core import artifacts, files, seals


def test_only_the_sealed_way_reads_no_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seals, "LARGE", 1)
    monkeypatch.setattr(seals, "RESOLUTION_NS", 20 * 10**6)
    artifact = verification.publish(tmp_path, 2, 1)
    read: list[str] = []

    def sha256_of(file: Path) -> str:
        read.append(file.name)
        return files.sha256_of(file)

    monkeypatch.setattr(artifacts, "sha256_of", sha256_of)
    found = verification.measure(tmp_path, artifact, 3)
    assert [len(values) for values in found.values()] == [3, 3, 3]
    assert len(read) == 2 * 2 * 3


def test_the_table_has_medians_and_ratios() -> None:
    found = {"by its seal": [0.001, 0.002, 0.009], "in full, from memory": [4.0, 5.0, 9.0],
             "in full, from the disk": [8.0, 10.0, 10.0]}
    assert verification.table(found, 4.0).splitlines() == [
        "| 4.0 GB | seconds | GB/s | as long as by its seal |", "|---|---|---|---|",
        "| by its seal | 0.0020 |  | 1 times |", "| in full, from memory | 5.0000 | 0.80 | 2,500 times |",
        "| in full, from the disk | 10.0000 | 0.40 | 5,000 times |"]
