"""Promises of fetching: what is pinned is what arrives, whatever the network does, and a byte is fetched once."""

from __future__ import annotations

import hashlib
import logging
import random
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.core import retries
from jobs.core.errors import RetryableError, UserError
from jobs.relocation import connection, download
from jobs.relocation.sources.interface import Item
from tests.hub_server import Fault, Hub, nowhere, serve
from tests.relocation.conftest import CONTENT, PARTIAL, SHA256, names, ranges, url_item

# --- a URL on a bad network ------------------------------------------------------------------------------------------


def test_a_url_is_fetched_with_one_request(hub: Hub, draft: Path) -> None:
    download.fetch([url_item(hub)], draft)
    assert (draft / "data.bin").read_bytes() == CONTENT
    assert [(s.method, s.range) for s in hub.seen] == [("GET", None)]


def test_a_dropped_connection_is_resumed_from_the_byte_where_it_broke(hub: Hub, draft: Path) -> None:
    hub.faults.append(Fault("data.bin", drop_after=100_000))
    download.fetch([url_item(hub)], draft)
    assert (draft / "data.bin").read_bytes() == CONTENT
    assert ranges(hub) == [None, "bytes=100000-"]


def test_progress_renews_patience(hub: Hub, draft: Path) -> None:
    """More drops than attempts are allowed in a row, each after some bytes."""
    hub.faults.append(Fault("data.bin", times=9, drop_after=30_000))
    download.fetch([url_item(hub)], draft)
    assert (draft / "data.bin").read_bytes() == CONTENT
    assert len(hub.seen) == 10


def test_a_server_that_cannot_resume_starts_over_and_the_file_is_right(hub: Hub, draft: Path) -> None:
    hub.ranges = False
    hub.faults.append(Fault("data.bin", drop_after=200_000))
    download.fetch([url_item(hub)], draft)
    assert (draft / "data.bin").read_bytes() == CONTENT


def test_a_server_that_cannot_resume_and_always_drops_is_given_up(hub: Hub, draft: Path) -> None:
    hub.ranges = False
    hub.faults.append(Fault("data.bin", times=99, drop_after=200_000))
    with pytest.raises(RetryableError, match="gave up after 4 attempts in a row"):
        download.fetch([url_item(hub)], draft)
    assert len(hub.seen) == 4


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_server_in_trouble_is_asked_again(hub: Hub, draft: Path, status: int) -> None:
    hub.faults.append(Fault("data.bin", times=3, status=status))
    download.fetch([url_item(hub)], draft)
    assert (draft / "data.bin").read_bytes() == CONTENT


def test_pauses_grow(hub: Hub, draft: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    monkeypatch.setattr(retries, "FIRST_PAUSE_S", 1.0)
    monkeypatch.setattr(retries, "ATTEMPTS", 10)
    hub.faults.append(Fault("data.bin", times=9, status=503))
    download.fetch([url_item(hub)], draft)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_retry_after_is_honoured(hub: Hub, draft: Path) -> None:
    hub.faults.append(Fault("data.bin", status=429, retry_after="1"))
    download.fetch([url_item(hub)], draft)
    first, second = hub.seen
    assert 0.99 <= second.at - first.at < 10


def test_retry_after_may_be_a_date() -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=90))
    assert 80 < (retries.retry_after({"Retry-After": soon}) or 0) <= 90
    assert retries.retry_after({"Retry-After": format_datetime(datetime.now(UTC) - timedelta(days=1))}) == 0
    assert retries.retry_after({"Retry-After": "soonish"}) is None
    assert retries.retry_after({}) is None


def test_a_server_that_asks_for_a_day_is_left_to_the_next_pod(hub: Hub, draft: Path) -> None:
    hub.faults.append(Fault("data.bin", status=429, retry_after="86400"))
    with pytest.raises(RetryableError, match="requests a pause of 86400 s"):
        download.fetch([url_item(hub)], draft)


def test_a_server_that_never_recovers_is_named_with_its_last_answer(hub: Hub, draft: Path) -> None:
    hub.faults.append(Fault("data.bin", times=99, status=503))
    with pytest.raises(RetryableError, match=rf"{hub.url}/files/data\.bin: gave up after 4 attempts.*503"):
        download.fetch([url_item(hub)], draft)
    assert "data.bin" not in names(draft)


def test_a_server_that_is_not_there_is_worth_a_retry(hub: Hub, draft: Path) -> None:
    dead = nowhere()
    with pytest.raises(RetryableError, match=rf"{dead}/x: gave up.*[Cc]onnect"):
        download.fetch([Item("x", f"{dead}/x", sha256=SHA256)], draft)


@pytest.mark.parametrize(("status", "hint"), [(401, "HF_TOKEN"), (403, "HF_TOKEN"), (404, "typo"), (410, "410")])
def test_a_refusal_is_not_retried_and_says_what_to_do(hub: Hub, draft: Path, status: int, hint: str) -> None:
    hub.faults.append(Fault("data.bin", times=99, status=status))
    with pytest.raises(UserError, match=hint) as error:
        download.fetch([url_item(hub)], draft)
    assert f"{hub.url}/files/data.bin" in str(error.value)
    assert len(hub.seen) == 1


def test_wrong_bytes_name_both_digests_and_leave_nothing(hub: Hub, draft: Path) -> None:
    hub.faults.append(Fault("data.bin", times=99, wrong_bytes=True))
    with pytest.raises(UserError) as error:
        download.fetch([url_item(hub)], draft)
    wrong = hashlib.sha256(bytes([CONTENT[0] ^ 1]) + CONTENT[1:]).hexdigest()
    assert SHA256 in str(error.value)
    assert wrong in str(error.value)
    assert names(draft) == []


def test_a_file_cut_off_at_the_source_is_refused(hub: Hub, draft: Path) -> None:
    hub.faults.append(Fault("data.bin", times=99, cut_after=1000))
    with pytest.raises(UserError, match=hashlib.sha256(CONTENT[:1000]).hexdigest()):
        download.fetch([url_item(hub)], draft)
    assert names(draft) == []


def test_a_file_cut_off_where_no_size_is_given_is_fetched_once_more(hub: Hub, draft: Path) -> None:
    """It looks like a whole file with another content, and is a broken connection."""
    hub.lengths = False
    hub.faults.append(Fault("data.bin", cut_after=1000))
    download.fetch([url_item(hub)], draft)
    assert (draft / "data.bin").read_bytes() == CONTENT
    assert ranges(hub) == [None, None]


@pytest.mark.parametrize("location", ["http://127.0.0.1:99999/x", "http://[bad", "file:///etc/passwd", "http:///x"])
def test_a_redirect_to_what_is_no_url_is_tried_again(hub: Hub, draft: Path, location: str) -> None:
    hub.faults.append(Fault("data.bin", status=302, location=location))
    download.fetch([url_item(hub)], draft)
    assert (draft / "data.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("what", ["half", "whole", "torn", "too long"])
def test_what_an_earlier_run_left_is_continued_or_replaced(hub: Hub, draft: Path, what: str) -> None:
    left = {"half": CONTENT[:150_000], "whole": CONTENT, "torn": bytes(150_000), "too long": CONTENT + b"!"}[what]
    (draft / PARTIAL).write_bytes(left)
    download.fetch([url_item(hub)], draft)
    assert names(draft) == ["data.bin"]
    assert (draft / "data.bin").read_bytes() == CONTENT
    if what == "half":
        assert ranges(hub) == ["bytes=150000-"]
    if what == "torn":
        assert ranges(hub) == ["bytes=150000-", None]


@pytest.mark.parametrize("fault", [
    Fault("data.bin", answer_from=0), Fault("data.bin", answer_from=1000),
    Fault("data.bin", content_range="bytes 0-299999/300000"), Fault("data.bin", content_range="bytes 150000-299999"),
    Fault("data.bin", content_range="bytes 150000-200000/300000"), Fault("data.bin", content_range="pages 1-2/3"),
], ids=lambda fault: fault.content_range or f"from {fault.answer_from}")
def test_only_the_part_that_was_requested_is_appended(hub: Hub, draft: Path, fault: Fault) -> None:
    """Nothing but the Content-Range can show it here: the source gives no digest, and no size."""
    (draft / PARTIAL).write_bytes(CONTENT[:150_000])
    hub.faults.append(replace(fault))
    download.fetch([url_item(hub, sha256=None)], draft)
    assert (draft / "data.bin").read_bytes() == CONTENT
    assert ranges(hub) == ["bytes=150000-", None]


@pytest.mark.parametrize("known", ["by the hub", "by an earlier answer"])
def test_a_total_that_changed_between_two_answers_starts_over(hub: Hub, draft: Path, known: str,
                                                              caplog: pytest.LogCaptureFixture) -> None:
    size = len(CONTENT) if known == "by the hub" else None
    if known == "by the hub":
        (draft / PARTIAL).write_bytes(CONTENT[:150_000])
    else:
        hub.faults.append(Fault("data.bin", drop_after=150_000))
    hub.faults.append(Fault("data.bin", content_range="bytes 150000-300000/300001"))
    download.fetch([Item("data.bin", f"{hub.url}/files/data.bin", size)], draft)
    assert (draft / "data.bin").read_bytes() == CONTENT
    assert ranges(hub)[-2:] == ["bytes=150000-", None]
    assert "the content changed: it had 300000 bytes, now it has 300001" in caplog.text


def test_content_that_changed_behind_the_url_is_fetched_anew(hub: Hub, draft: Path) -> None:
    """Half of the old content is here; the pin and the server are of the new."""
    new = random.Random(1).randbytes(300_000)
    (draft / PARTIAL).write_bytes(CONTENT[:150_000])
    hub.files["data.bin"] = new
    download.fetch([url_item(hub, hashlib.sha256(new).hexdigest())], draft)
    assert (draft / "data.bin").read_bytes() == new


def test_a_finished_file_is_not_fetched_again_unless_its_bytes_were_lost(hub: Hub, draft: Path) -> None:
    (draft / "data.bin").write_bytes(CONTENT)
    download.fetch([url_item(hub)], draft)
    assert hub.seen == []
    (draft / "data.bin").write_bytes(bytes(len(CONTENT)))  # what a power cut can leave of a file that was not synced
    download.fetch([url_item(hub)], draft)
    assert (draft / "data.bin").read_bytes() == CONTENT


@settings(max_examples=25, deadline=None)
@given(drops=st.lists(st.integers(1, 5000), max_size=6), resumable=st.booleans(), left=st.binary(max_size=2000))
def test_whatever_the_drops_and_leftovers_the_file_is_right(tmp_path_factory: pytest.TempPathFactory, drops: list[int],
                                                          resumable: bool, left: bytes) -> None:
    draft = tmp_path_factory.mktemp("draft")
    content = CONTENT[:5000]
    with serve() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr(retries, "FIRST_PAUSE_S", 0.0)
        hub.files["data.bin"], hub.ranges = content, resumable
        hub.faults += [Fault("data.bin", drop_after=count, linger_s=0) for count in drops]
        (draft / PARTIAL).write_bytes(left)
        download.fetch([url_item(hub, hashlib.sha256(content).hexdigest())], draft)
    assert (draft / "data.bin").read_bytes() == content


@pytest.mark.parametrize("status", [503, 429, 410, 404, 403])
def test_secrets_in_a_url_reach_the_server_and_no_message(hub: Hub, draft: Path, caplog: pytest.LogCaptureFixture,
                                                          status: int) -> None:
    url = f"{hub.url}/files/data.bin?X-Amz-Signature=hush%2Fhush"
    hub.faults.append(Fault("data.bin", times=99, status=status))
    with caplog.at_level(logging.INFO), pytest.raises((RetryableError, UserError)) as error:
        download.fetch([Item("data.bin", url, sha256=SHA256)], draft)
    assert hub.seen[0].path.endswith("X-Amz-Signature=hush%2Fhush")
    assert "hush" not in caplog.text + str(error.value)
    assert connection.shown("https://me:hush@example.org/a/b.jsonl?k=hush") == "https://example.org/a/b.jsonl"


@pytest.mark.parametrize("url", ["http://host:door/data.jsonl", "https://[::1/data.jsonl", "http:///data.jsonl"])
def test_a_url_that_cannot_be_one_is_refused(hub: Hub, draft: Path, url: str) -> None:
    with pytest.raises(UserError, match="not a URL that can be opened"):
        download.fetch([Item("data.jsonl", url, sha256=SHA256)], draft)


# --- space, leftovers, progress --------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", ["by the hub", "by the first answer"])
def test_too_small_a_volume_is_said_before_a_byte_is_written(hub: Hub, draft: Path, monkeypatch: pytest.MonkeyPatch,
                                                           known: str) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    item = Item("data.bin", f"{hub.url}/files/data.bin", len(CONTENT) if known == "by the hub" else None, SHA256)
    with pytest.raises(UserError, match=r"300\.0 kB are needed, but 1\.0 kB are free.*[Ee]nlarge") as error:
        download.fetch([item], draft)
    assert str(draft) in str(error.value)
    assert sum(p.stat().st_size for p in draft.iterdir()) == 0


def test_only_what_is_still_to_come_needs_space(hub: Hub, draft: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (draft / PARTIAL).write_bytes(CONTENT[:-500])
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    download.fetch([Item("data.bin", f"{hub.url}/files/data.bin", len(CONTENT), SHA256)], draft)
    assert (draft / "data.bin").read_bytes() == CONTENT


def test_leftovers_that_do_not_belong_are_removed_and_partial_files_kept(draft: Path) -> None:
    for name in (PARTIAL, "old.bin", "old.bin.partial", ".cache/huggingface/x.lock", "raw/a.jsonl", ".artifact.json.7"):
        (draft / name).parent.mkdir(parents=True, exist_ok=True)
        (draft / name).write_text("x")
    (draft / "link").symlink_to("/etc/hostname")
    download.remove_others(draft, [Item("data.bin", "x"), Item("raw/a.jsonl", "x")])
    assert sorted(p.relative_to(draft).as_posix() for p in draft.rglob("*")) == [PARTIAL, "raw", "raw/a.jsonl"]


def test_progress_says_bytes_rate_and_time_left(hub: Hub, draft: Path, monkeypatch: pytest.MonkeyPatch,
                                                caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("jobs.core.progress.INTERVAL_S", 0.1)
    hub.bytes_per_second = 400_000
    (draft / PARTIAL).write_bytes(CONTENT[:50_000])
    with caplog.at_level(logging.INFO, "jobs"):
        download.fetch([url_item(hub)], draft)
    assert "continuing after 50.0 kB" in caplog.text
    said = [r.getMessage() for r in caplog.records if "s left" in r.getMessage()]
    assert len(said) >= 3
    assert "of 300.0 kB" in said[0]
    assert "kB/s" in said[0]
