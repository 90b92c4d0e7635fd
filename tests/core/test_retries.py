"""Promises of attempts: longer pauses each time, what the server requests within limits, and an end."""

from __future__ import annotations

from datetime import UTC, datetime
from email.utils import format_datetime
from types import SimpleNamespace

import pytest

from jobs.core import retries
from jobs.core.errors import RetryableError
from jobs.core.retries import Interrupted, Patience, retry_after

NOW = datetime(2026, 11, 26, 9, 0, tzinfo=UTC)


@pytest.fixture(autouse=True)
def schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_PAUSE_S", 1.5)
    monkeypatch.setattr(retries, "ATTEMPTS", 9)


def test_pauses_double_up_to_a_minute_and_then_come_to_an_end() -> None:
    patience = Patience("models/x")
    assert [patience.pause_after(Interrupted("no")) for _ in range(8)] == [1.5, 3, 6, 12, 24, 48, 60, 60]
    with pytest.raises(RetryableError) as raised:
        patience.pause_after(Interrupted("503"))
    assert str(raised.value) == "models/x: gave up after 9 attempts in a row. The last error: 503"


def test_a_new_byte_begins_anew() -> None:
    patience = Patience("x")
    for _ in range(3):
        assert [patience.pause_after(Interrupted("no")) for _ in range(8)][:3] == [1.5, 3, 6]
        patience.reset()


def test_one_of_several_connections_may_fail_often_while_others_go_on() -> None:
    """It waits longer each time, and only those that count come to an end."""
    patience = Patience("x")
    assert [patience.pause_after(Interrupted("no"), n, counts=False) for n in (0, 1, 2, 5, 20)] == [1.5, 1.5, 3, 24, 60]
    assert patience.pause_after(Interrupted("no")) == 1.5


@pytest.mark.parametrize("requested", [0.0, 0.2, 7.0, 90.0, 3600.0])
def test_the_pause_that_the_server_requests_is_kept_up_to_an_hour(requested: float) -> None:
    assert Patience("x").pause_after(Interrupted("busy", requested)) == requested


def test_a_longer_pause_is_left_to_the_next_pod() -> None:
    with pytest.raises(RetryableError, match="^x: the server requests a pause of 3601 s: busy$"):
        Patience("x").pause_after(Interrupted("busy", 3601))


def test_each_pause_is_logged_and_slept(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    slept: list[float] = []
    monkeypatch.setattr(retries, "time", SimpleNamespace(sleep=slept.append))
    patience = Patience("data.bin")
    patience.wait(Interrupted("broke off"))
    patience.wait(Interrupted("429", 2))
    assert slept == [1.5, 2]
    assert caplog.messages == ["data.bin: broke off; trying again in 1.5 s", "data.bin: 429; trying again in 2.0 s"]


@pytest.mark.parametrize(("value", "seconds"), [
    ("7", 7), (" 7 ", 7), ("0", 0), (format_datetime(NOW.replace(minute=2)), 120),
    (format_datetime(NOW.replace(hour=8)), 0), (None, None), ("", None), ("soonish", None), ("1.5", None),
    ("-7", None), ("²", None), ("Thu, 26 Nov 2026 09:00:00 +" + "9" * 30, None)])
def test_retry_after_is_seconds_or_a_date_and_anything_else_is_nothing(
        monkeypatch: pytest.MonkeyPatch, value: str | None, seconds: float | None) -> None:
    monkeypatch.setattr(retries, "time", SimpleNamespace(time=NOW.timestamp))
    assert retry_after({} if value is None else {"Retry-After": value}) == seconds
