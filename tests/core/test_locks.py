"""Promises of locks: one holder at a time, waiting has an end, and a lock that hangs can be ended by hand."""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.core import locks
from jobs.core.errors import RetryableError


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Path]:
    """A file that another holder has locked, such as a dead node's."""
    with (tmp_path / ".lock-x").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield tmp_path / ".lock-x"


def test_a_lock_is_held_by_one_at_a_time_and_freed_at_the_end(tmp_path: Path) -> None:
    with locks.hold(tmp_path / "lock", 1, "works"):
        with locks.hold_if_free(tmp_path / "lock") as mine:
            assert not mine
        with pytest.raises(RetryableError), locks.hold(tmp_path / "lock", 0.05, "works", poll_s=0.01):
            pass
    with locks.hold_if_free(tmp_path / "lock") as mine:
        assert mine


@pytest.mark.timeout(20)
def test_waiting_for_a_lock_ends_and_says_what_to_do(
        held: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(locks, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    caplog.set_level(logging.INFO, "jobs")
    with (pytest.raises(RetryableError) as raised,
          locks.hold(held, 240, "makes adapter/0123456789abcdef")):
        pass
    assert str(raised.value).startswith("waited 240 s because another process makes adapter/0123456789abcdef: "
                                        f"{held} is locked. ")
    assert "remove that file" in str(raised.value)
    assert caplog.messages == [
        f"another process makes adapter/0123456789abcdef: waiting for it ({seconds} of at most 240 s)"
        for seconds in (0, 61, 122, 183)]


def test_the_first_wait_is_logged_at_once(held: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "jobs")
    with pytest.raises(RetryableError), locks.hold(held, 0.1, "works", poll_s=0.01):
        pass
    assert [record.getMessage() for record in caplog.records] == [
        "another process works: waiting for it (0 of at most 0 s)"]


def test_a_lock_whose_file_was_removed_in_between_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise two could work at once: one on the removed file, one on the new one."""
    file, flock, first = tmp_path / "lock", fcntl.flock, [True]

    def removed_first(handle: int, operation: int) -> None:
        if first:
            first.clear()
            file.unlink()
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    with locks.hold(file, 10, "works", poll_s=0.01), locks.hold_if_free(file) as mine:
        assert not mine


@pytest.mark.timeout(20)
def test_removing_the_file_ends_a_lock_that_hangs(held: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: held.unlink())
    with locks.hold(held, 60, "works"), locks.hold_if_free(held) as mine:
        assert not mine, "those who come later meet the new lock"


def test_a_lock_is_a_plain_file_of_its_own_and_no_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("elsewhere")
    with pytest.raises(OSError, match="link"), locks.hold(tmp_path / "link", 1, "works"):
        pass
    assert not (tmp_path / "elsewhere").exists()
    with locks.hold(tmp_path / "lock", 1, "works"):
        assert (tmp_path / "lock").stat().st_mode & 0o111 == 0


def test_a_volume_that_cannot_lock_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with (pytest.raises(RetryableError, match="lock: cannot be locked: No locks available. The volume's file system"),
          locks.hold(tmp_path / "lock", 1, "works")):
        pass
    assert len(list(Path("/proc/self/fd").iterdir())) == before
