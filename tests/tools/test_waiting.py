"""Promises of waiting: it shows what it waits for, gets over a server that restarts, and ends at its deadline."""

from __future__ import annotations

import http.server
import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from jobs.core.errors import RetryableError
from jobs.tools import waiting
from jobs.tools.waiting import served_adapter, wait_until


def fail() -> bool:
    raise ConnectionError("connection refused")


def test_at_the_deadline_it_names_what_was_waited_for_and_the_last_error() -> None:
    with pytest.raises(RetryableError, match=r"^waited 0 s for the moon; the last error: connection refused$"):
        wait_until("the moon", fail, 0, every=0, passing=(ConnectionError,))


def test_an_exception_that_does_not_pass_ends_it_at_once() -> None:
    with pytest.raises(ConnectionError):
        wait_until("the moon", fail, 60, every=0)


def test_an_error_is_shown_once_as_long_as_it_stays_the_same(caplog: pytest.LogCaptureFixture) -> None:
    def look() -> str | None:
        answer = next(answers)
        if answer == "down":
            raise ConnectionError(answer)
        return answer

    answers: Iterator[str | None] = iter(["down", "down", None, "down", "there"])
    assert wait_until("it", look, 10, every=0, passing=(ConnectionError,)) == "there"
    assert caplog.messages == ["down; trying again"] * 2


def test_a_long_wait_is_not_a_silent_one(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.INFO, logger="jobs")
    monkeypatch.setattr(waiting, "REMINDER_SECONDS", 0.0)
    answers = iter([False, False, True])
    wait_until("the adapter to be served", lambda: next(answers), 60, every=0)
    assert caplog.messages[0] == "waiting for the adapter to be served (at most 60 s)"
    assert caplog.messages[1:] == ["still waiting for the adapter to be served (0 of 60 s)"] * 2


@contextmanager
def endpoint(*served: tuple[str, str]) -> Iterator[str]:
    """The URL of a server whose /metrics has these aliases and digests, as the guard's has, and which completes every
    prompt."""
    class Guard(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/metrics" else 404)
            self.end_headers()
            for alias, digest in served:
                self.wfile.write(f'serving_adapter_info{{alias="{alias}",digest="{digest}"}} 1.0\n'.encode())

        def do_POST(self) -> None:
            model = json.loads(self.rfile.read(int(self.headers["content-length"])))["model"]
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps({"choices": [{"text": f"answer of {model}"}]}).encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Guard) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_which_adapter_answers_is_read_from_the_metrics() -> None:
    with endpoint(("hostel-guide", "26eebed5bcc62855"), ("seville-hotels", "81e9dc13a516d878")) as url:
        assert served_adapter(url, "seville-hotels") == "81e9dc13a516d878"
        assert served_adapter(url, "hostel-guide") == "26eebed5bcc62855"
        assert served_adapter(url, "seville") is None
    assert served_adapter(url, "seville-hotels") is None  # nothing listens there now
