"""Promises of promotions: pointer and history agree, and what somebody else puts in their place does no harm."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from jobs.core import promotion
from jobs.core.errors import RetryableError, UserError
from jobs.core.locks import hold

Change = Callable[[Path], object]


def test_a_promotion_is_one_file_and_a_line_of_history(tmp_path: Path) -> None:
    assert promotion.current(tmp_path, "name") is None
    assert promotion.promote(tmp_path, "name", "a" * 16, "e" * 16)
    assert not promotion.promote(tmp_path, "name", "a" * 16, "e" * 16), "already there"
    assert promotion.promote(tmp_path, "name", "b" * 16, "f" * 16)
    now = promotion.current(tmp_path, "name")
    assert now is not None
    assert (now.adapter, now.evaluation) == ("b" * 16, "f" * 16)
    assert [each.adapter for each in promotion.history(tmp_path, "name")] == ["b" * 16, "a" * 16], "the newest first"
    lines = [json.loads(line) for line in (tmp_path / "promoted" / "name.history.jsonl").read_text().splitlines()]
    assert [(entry["before"], entry["adapter"]) for entry in lines] == [(None, "a" * 16), ("a" * 16, "b" * 16)]
    assert promotion.promoted_digests(tmp_path) == {"b" * 16, "f" * 16}


def test_a_promotion_says_when_it_was_made(tmp_path: Path) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    promotion.promote(tmp_path, "name", "a" * 16, "e" * 16)
    now = promotion.current(tmp_path, "name")
    assert now is not None
    assert before <= datetime.fromisoformat(now.at) <= datetime.now(UTC)
    assert promotion.history(tmp_path, "name") == [now]


def test_a_volume_on_which_nothing_was_promoted_has_no_promotions(tmp_path: Path) -> None:
    volume = tmp_path / "volumes" / "fine-tuned-model"
    assert promotion.promoted_digests(volume) == set()
    assert promotion.promote(volume, "name", "a" * 16, "e" * 16), "its folders are made"


def test_nobody_else_promotes_while_the_lock_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation compares with what is promoted: that must still be so when its adapter is promoted."""
    monkeypatch.setattr(promotion, "LOCK_SECONDS", 0.05)
    with promotion.lock(tmp_path, "name"):
        with pytest.raises(RetryableError, match="another process promotes name"):
            promotion.promote(tmp_path, "name", "b" * 16, "f" * 16)
        assert promotion.promote(tmp_path, "other", "b" * 16, "f" * 16)
        assert promotion.move(tmp_path, "name", "a" * 16, "e" * 16)
    assert not promotion.promote(tmp_path, "name", "a" * 16, "e" * 16)


def test_a_promotion_that_hangs_elsewhere_is_waited_for_with_an_end(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promotion, "LOCK_SECONDS", 0.05)
    (tmp_path / "promoted").mkdir()
    with (hold(tmp_path / "promoted" / ".lock-name", 1, "tests"),
          pytest.raises(RetryableError, match="because another process promotes name: ")):
        promotion.promote(tmp_path, "name", "a" * 16, "e" * 16)


def _sparse(file: Path) -> None:
    with file.open("wb") as stream:
        stream.truncate(2 * 10**9)


def _link(file: Path) -> None:
    (file.parent / "another.json").write_text(json.dumps({"adapter": "a" * 16, "evaluation": "e" * 16, "at": "now"}))
    file.symlink_to("another.json")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("damage", [
    lambda file: file.write_text("{"), lambda file: file.write_text("[" * 60_000), lambda file: file.write_text("[]"),
    lambda file: file.write_text('{"adapter": "../../x", "evaluation": "e", "at": "now"}'),
    lambda file: file.write_bytes(b"\xff"), os.mkfifo, Path.mkdir, _link, _sparse])
def test_a_damaged_promotion_is_an_error_not_a_fresh_start(tmp_path: Path, damage: Change) -> None:
    promotion.promote(tmp_path, "name", "a" * 16, "e" * 16)
    pointer = tmp_path / "promoted" / "name"
    pointer.unlink()
    damage(pointer)
    for attempt in (lambda: promotion.current(tmp_path, "name"), lambda: promotion.promoted_digests(tmp_path),
                    lambda: promotion.promote(tmp_path, "name", "b" * 16, "f" * 16)):
        with pytest.raises(UserError) as raised:
            attempt()
        assert str(raised.value).startswith(f"{pointer}: ")
        assert "the promotion is damaged" in str(raised.value)
        assert "(None)" not in str(raised.value)
        assert str(raised.value).endswith("Remove it and run the evaluation again")
        assert len(str(raised.value)) < 1000


@pytest.mark.timeout(20)
@pytest.mark.parametrize("damage", [os.mkfifo, Path.mkdir, _link])
def test_a_history_that_is_no_plain_file_proves_nothing_and_is_not_written_to(tmp_path: Path, damage: Change) -> None:
    (tmp_path / "promoted").mkdir()
    history = tmp_path / "promoted" / "name.history.jsonl"
    damage(history)
    assert promotion.history(tmp_path, "name") == []
    with pytest.raises(UserError, match="name.history.jsonl: is not a plain file"):
        promotion.promote(tmp_path, "name", "a" * 16, "e" * 16)
    assert promotion.current(tmp_path, "name") is None, "pointer and history agree"


def test_of_a_long_history_the_last_part_is_read(tmp_path: Path) -> None:
    (tmp_path / "promoted").mkdir()
    history = tmp_path / "promoted" / "name.history.jsonl"
    _sparse(history)
    promotion.promote(tmp_path, "name", "a" * 16, "e" * 16)
    assert [each.adapter for each in promotion.history(tmp_path, "name")] == ["a" * 16]


def test_a_line_of_the_history_that_cannot_be_read_is_skipped(tmp_path: Path) -> None:
    promotion.promote(tmp_path, "name", "a" * 16, "e" * 16)
    with (tmp_path / "promoted" / "name.history.jsonl").open("a") as stream:
        stream.write('{"adapter": "../x", "evaluation": "e", "at": "now"}\n[1]\n{"adapt')
    promotion.promote(tmp_path, "name", "b" * 16, "f" * 16)
    assert [each.adapter for each in promotion.history(tmp_path, "name")] == ["b" * 16, "a" * 16]


def _promote_often(volume: Path, letter: str) -> None:
    for number in range(20):
        promotion.promote(volume, "name", letter + f"{number:015x}", "e" * 16)


def test_evaluations_that_promote_at_once_leave_pointer_and_history_that_agree(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_promote_often, args=(tmp_path, letter)) for letter in "abc"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    lines = [json.loads(line) for line in (tmp_path / "promoted" / "name.history.jsonl").read_text().splitlines()]
    assert len(lines) == 60
    assert [line["before"] for line in lines] == [None, *(line["adapter"] for line in lines[:-1])]
    now = promotion.current(tmp_path, "name")
    assert now is not None
    assert now.adapter == lines[-1]["adapter"]
