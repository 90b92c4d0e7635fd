"""Long work says every few seconds how far it is, and once that it is finished."""

from __future__ import annotations

import pytest

from jobs.core.files import human_bytes
from jobs.core.progress import Progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Clock:
    clock = Clock()
    monkeypatch.setattr("jobs.core.progress.time.monotonic", clock)
    caplog.set_level("INFO", "jobs")
    return clock


def test_a_line_every_five_seconds_and_a_last_one(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    progress = Progress("base: answers", 10)
    for second, count in ((2, 1), (6, 2), (7, 3), (10.9, 1), (11, 1), (20, 2)):
        clock.now = 100.0 + second
        progress.add(count)
    assert caplog.messages == ["base: answers: 3 of 10, 0.5/s, 14 s left", "base: answers: 8 of 10, 0.73/s, 3 s left",
                               "base: answers: 10 in 20 s, 0.5/s"]


def test_what_an_earlier_run_did_counts_as_done_and_not_as_fast(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    progress = Progress("fetching", 10_000, human_bytes)
    progress.skip(6000)
    clock.now += 10
    progress.add(2000)
    progress.skip(-1000)
    clock.now += 10
    progress.add(3000, lambda: "complete")
    assert caplog.messages == ["fetching: 8.0 kB of 10.0 kB, 200 bytes/s, 10 s left",
                               "fetching: 5.0 kB in 20 s, 250 bytes/s, complete"]


def test_an_unknown_total_has_no_time_left(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    progress = Progress("fetching", None, human_bytes)
    clock.now += 5
    progress.add(1000)
    progress.finish()
    progress.finish()
    assert caplog.messages == ["fetching: 1.0 kB, 200 bytes/s", "fetching: 1.0 kB in 5 s, 200 bytes/s"]


def test_work_that_was_all_done_before_logs_nothing(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    progress = Progress("fetching", 5)
    progress.skip(5)
    clock.now += 60
    progress.finish()
    assert caplog.messages == []
