"""Promises of `--ask`: it waits for the adapter that was just trained, and shows no lines of the client."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest

from jobs.core import pipeline
from jobs.core.errors import RetryableError
from jobs.core.plan import plan
from jobs.tools import summary, waiting
from tests import build_pipeline
from tests.tools.test_waiting import endpoint


def test_while_the_server_restarts_the_only_progress_shown_is_our_own(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """In mode merged a new adapter is a restart: nothing listens for half a minute."""
    wanted = pipeline.load(build_pipeline.write(tmp_path, serving__mode="merged")).pipeline
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(waiting, "REMINDER_SECONDS", 0.5)
    with endpoint(wanted.adapter, plan(wanted).adapter.digest) as url:
        down = iter(["http://127.0.0.1:9"] * 4)
        served = waiting.served_adapter
        monkeypatch.setattr(summary, "served_adapter", lambda endpoint, alias: served(next(down, endpoint), alias))
        shown = summary.ask(wanted, tmp_path, url, "Who?")
    assert "fine-tuned (seville-hotels)  answer of seville-hotels" in shown
    name = f"{wanted.adapter}@{plan(wanted).adapter.digest}"
    ours = [m for m in caplog.messages if name in m]
    assert ours[0] == f"waiting for {name} to be served (at most 300 s)"
    assert len(ours) > 2
    assert not [m for m in caplog.messages if "Retrying" in m]


def test_the_adapter_before_is_not_asked_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = pipeline.load(build_pipeline.write(tmp_path)).pipeline
    monkeypatch.setattr(summary, "ALIAS_SECONDS", 0.0)
    with endpoint(wanted.adapter, "0" * 16) as url, pytest.raises(RetryableError, match="was not served within 0 s"):
        summary.ask(wanted, tmp_path, url, "Who?")


def test_a_server_that_refuses_the_question_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = pipeline.load(build_pipeline.write(tmp_path)).pipeline
    monkeypatch.setattr(summary, "served_adapter", lambda *_: plan(wanted).adapter.digest)
    began = time.monotonic()
    with pytest.raises(RetryableError, match=r"^http://127\.0\.0\.1:9: Connection error\.; the log of model-inference"):
        summary.ask(wanted, tmp_path, "http://127.0.0.1:9", "Who?")
    assert time.monotonic() - began < 10
