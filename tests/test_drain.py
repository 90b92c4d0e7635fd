"""Promises of draining: what was begun is answered, nothing new is taken, and the server ends in time."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests import build_adapter
from tests.build_guarded import World, start, until


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    yield from start(tmp_path, monkeypatch, drain_seconds=60.0)


@contextlib.contextmanager
def held_stream(world: World) -> Iterator[tuple[Iterator[str], threading.Event]]:
    """The lines of a reply by the adapter, of which the first has come; the others are held back until the event."""
    pipeline, _ = world.write()
    build_adapter.promote(world.volumes, pipeline)
    until(world.served)
    hold = world.vllm.hold = threading.Event()
    with world.stream() as stream:
        lines = stream.iter_lines()
        next(lines)
        yield lines, hold


def test_a_stream_is_finished_while_no_new_connection_is_taken_and_then_the_server_ends(world: World) -> None:
    with held_stream(world) as (lines, hold):
        world.drain(linger=0)
        until(lambda: refuses(world.url))
        assert not world.ended()
        hold.set()
        assert [line for line in lines if line][-1] == "data: [DONE]"
    until(world.ended)


def test_while_others_still_send_requests_they_are_answered_and_told_to_go_elsewhere(world: World) -> None:
    until(lambda: world.ask().status_code == 503)
    world.drain(linger=3600)
    with httpx.Client() as client:
        until(lambda: client.get(world.url + "/ready").status_code == 503)
        assert client.get(world.url + "/health").status_code == 200  # it lives: nobody has to restart it
        reply = client.post(world.url + "/v1/completions", json={"model": "builtin:tiny", "prompt": "x"})
        assert (reply.status_code, reply.headers["connection"]) == (200, "close")
    assert world.metric("serving_draining") == 1
    world.drain(linger=0)
    until(world.ended)


def test_after_that_time_the_server_ends(world: World) -> None:
    world.drain(linger=0.1)
    until(world.ended)


def test_a_reply_that_takes_longer_than_the_grace_period_is_cut_off(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for world in start(tmp_path, monkeypatch, drain_seconds=1.0):
        with held_stream(world) as (lines, hold):
            started = time.monotonic()
            world.drain(linger=0)
            until(world.ended)
            with pytest.raises(httpx.RemoteProtocolError):
                list(lines)
        assert time.monotonic() - started >= 1
        assert not hold.is_set()


def refuses(url: str) -> bool:
    try:
        httpx.get(url + "/health")
    except httpx.ConnectError:
        return True
    except httpx.TransportError:  # the system had accepted the connection before the server stopped to listen
        return False
    return False
