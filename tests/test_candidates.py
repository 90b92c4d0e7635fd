"""Promises of finding candidates: the file's adapter, the promoted one and those before it, and nothing by accident."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.core import pipeline, promotion
from jobs.core.plan import FINE_TUNED_VOLUME, plan
from serving import candidates
from serving.candidates import Candidate
from serving.refusal import NotYet, Refused, one_line
from tests import build_pipeline

NAME = "seville-hotels"
A, B, C = ("a" * 16, "b" * 16, "c" * 16)
EVALUATED = "e" * 16


def promote(volumes: Path, *adapters: str) -> Path:
    """Promote one after another; returns the folder of the promotions."""
    for adapter in adapters:
        promotion.promote(volumes / FINE_TUNED_VOLUME, NAME, adapter, EVALUATED)
    return volumes / FINE_TUNED_VOLUME / "promoted"


def test_the_file_desires_an_adapter_and_the_evaluation_that_must_have_passed_it(tmp_path: Path) -> None:
    loaded = pipeline.load(build_pipeline.write(tmp_path)).pipeline
    planned = plan(loaded)
    assert candidates.desired(loaded, tmp_path) == Candidate(planned.adapter.digest, planned.evaluation.digest)


def test_the_adapters_that_were_promoted_before_come_newest_first_and_once(tmp_path: Path) -> None:
    assert candidates.earlier(NAME, tmp_path) == []
    promote(tmp_path, A, B, A, C)
    assert candidates.promoted(NAME, tmp_path) == Candidate(C, EVALUATED)
    assert candidates.earlier(NAME, tmp_path) == [Candidate(each, EVALUATED) for each in (C, A, B)]


@pytest.mark.parametrize(("damage", "reason", "message"), [
    (lambda file: file.write_text("{"), "damaged", "the promotion is damaged"),
    (Path.mkdir, "damaged", "is not a plain file"),
    (lambda file: os.truncate(file, 2**24 + 1), "damaged", "at most 65536 bytes are read"),
])
def test_a_pointer_that_cannot_be_read_is_refused_with_the_files_name(
        tmp_path: Path, damage: Callable[[Path], object], reason: str, message: str) -> None:
    pointer = promote(tmp_path, A) / NAME
    if damage is Path.mkdir:
        pointer.unlink()
    damage(pointer)
    with pytest.raises(Refused, match=message) as caught:
        candidates.promoted(NAME, tmp_path)
    assert caught.value.reason == reason
    assert str(caught.value).startswith(str(pointer))
    assert "UserError(" not in str(caught.value)


@pytest.mark.parametrize("which", ["current", "history"])
def test_a_volume_that_fails_is_a_refusal_by_the_systems_own_word(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    folder = promote(tmp_path, A)
    monkeypatch.setattr(promotion, which, _raise(OSError(5, "Input/output error")))
    look: Callable[[str, Path], object]
    look, file = ((candidates.promoted, NAME) if which == "current"
                  else (candidates.earlier, f"{NAME}.history.jsonl"))
    with pytest.raises(Refused) as caught:
        look(NAME, tmp_path)
    assert (caught.value.reason, str(caught.value)) == ("unreadable", f"{folder / file}: Input/output error")


def test_an_error_that_nobody_thought_of_is_a_refusal_in_one_line(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = promote(tmp_path, A)
    monkeypatch.setattr(promotion, "current", _raise(ValueError("one\ntwo")))
    with pytest.raises(Refused, match="is damaged") as caught:
        candidates.promoted(NAME, tmp_path)
    assert str(caught.value) == f"{folder / NAME} is damaged (ValueError('one\\ntwo'))"
    monkeypatch.setattr(promotion, "current", _raise(OSError("no number")))
    with pytest.raises(Refused, match="no number"):
        candidates.promoted(NAME, tmp_path)


def test_a_message_of_any_length_and_with_any_characters_is_one_short_line_of_the_log() -> None:
    assert one_line("one\ntwo\x1b[31m") == "one\N{REPLACEMENT CHARACTER}two\N{REPLACEMENT CHARACTER}[31m"
    assert one_line("x" * 5000) == "x" * 1000


def _raise(error: Exception) -> Callable[..., object]:
    def call(*_: object) -> object:
        raise error

    return call


def test_an_adapter_could_be_served_since_it_was_evaluated_or_promoted_whichever_is_later(tmp_path: Path) -> None:
    manifest = candidates.evaluation_folder(EVALUATED, tmp_path) / "artifact.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({}))
    os.utime(manifest, (1000, 1000))
    assert candidates.proved_at(NAME, Candidate(A, EVALUATED), tmp_path) == 1000, "not promoted yet"
    pointer = promote(tmp_path, A) / NAME
    os.utime(pointer, (2000, 2000))
    assert candidates.proved_at(NAME, Candidate(A, EVALUATED), tmp_path) == 2000
    assert candidates.proved_at(NAME, Candidate(B, EVALUATED), tmp_path) == 1000, "another one is promoted"
    os.utime(manifest, (3000, 3000))
    assert candidates.proved_at(NAME, Candidate(A, EVALUATED), tmp_path) == 3000
    pointer.write_text("{")
    assert candidates.proved_at(NAME, Candidate(A, EVALUATED), tmp_path) == 3000, "a damaged promotion tells nothing"
    with pytest.raises(FileNotFoundError):
        candidates.proved_at(NAME, Candidate(A, B), tmp_path)


def test_an_artifact_is_where_its_digest_says_and_nothing_else_is_a_digest(tmp_path: Path) -> None:
    assert candidates.adapter_folder(A, tmp_path) == tmp_path / "fine-tuned-model" / "adapter" / A
    assert candidates.evaluation_folder(A, tmp_path) == tmp_path / "fine-tuned-model" / "evaluation" / A
    for wrong in ("../" + "a" * 13, "A" * 16, "a" * 17, ""):
        with pytest.raises(Refused, match="is not a digest") as caught:
            candidates.adapter_folder(wrong, tmp_path)
        assert caught.value.reason == "damaged"


def test_nothing_promoted_is_no_refusal(tmp_path: Path) -> None:
    with pytest.raises(NotYet, match=f"no adapter was promoted as {NAME} yet"):
        candidates.promoted(NAME, tmp_path)
