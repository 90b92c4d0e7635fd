"""The termination message is whole characters, within what Kubernetes keeps, and never a failure of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.core import termination


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "termination-log"
    file.touch()
    monkeypatch.setattr(termination, "TERMINATION_LOG", file)
    return file


@pytest.mark.parametrize(("text", "kept"), [
    ("why", "why"), ("x" + "é" * 5000, "x" + "é" * 2047), ("a lone \udc80 surrogate", "a lone \\udc80 surrogate")])
def test_the_message_is_cut_to_whole_characters_that_utf8_has(log: Path, text: str, kept: str) -> None:
    termination.write_termination_message(text)
    assert log.read_bytes() == kept.encode()


def test_outside_of_a_pod_nothing_is_written(log: Path) -> None:
    log.unlink()
    termination.write_termination_message("why")
    assert not log.exists()
