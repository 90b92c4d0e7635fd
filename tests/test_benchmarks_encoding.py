"""Promises of the benchmark of encoding: its data is what relocation takes, and its table compares with before."""

from __future__ import annotations

from pathlib import Path

from benchmarks import encoding
from jobs.relocation import embedded


def test_each_step_gives_what_the_earlier_way_gives(tmp_path: Path) -> None:
    encoding.generate(tmp_path / "data.jsonl", 300, 20)
    assert encoding.divide(tmp_path) == encoding.divide_before(tmp_path) == 3
    (tmp_path / "tokenizer").mkdir()
    embedded.write_tokenizer(tmp_path / "tokenizer")
    tokens = encoding.encode_before(tmp_path)
    assert tokens > 300 * 20
    assert encoding.encode(tmp_path) == tokens
    assert 0 < encoding.open_encoded(tmp_path) < tokens, "of the training data alone"


def test_a_step_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    encoding.generate(tmp_path / "data.jsonl", 300, 20)
    found = encoding.measure(tmp_path, 300, "split")
    assert found.seconds > 0
    assert 10 < found.proportional <= found.resident < 500


def test_the_table_ends_with_ratios() -> None:
    found = [encoding.Measurement(10, "split", 2.0, 50, 40), encoding.Measurement(10, "split before", 3.0, 100, 60),
             encoding.Measurement(10, "encode", 5.0, 900, 500, 10**6),
             encoding.Measurement(10, "open", 0.5, 90, 45, 10**6),
             encoding.Measurement(10, "encode and open before", 10.0, 1800, 900, 10**6)]
    lines = encoding.table(found).splitlines()
    assert lines[4] == "| 10 | encode | 5.0 | 2 | 0.20 | 900 | 500 |"
    assert lines[-3:] == ["| 10 | split before : split | 1.5 | | | 2.0 | 1.5 |",
                          "| 10 | encode and open before : encode | 2.0 | | | 2.0 | 1.8 |",
                          "| 10 | encode and open before : open | 20.0 | | | 20.0 | 20.0 |"]
