"""Promises of fetching through several connections: the right bytes, each once, whatever happens to one of them."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.core import artifacts, files, retries
from jobs.core.errors import RetryableError, UserError
from jobs.relocation import connection, download, partial, ranges, transfer, unfinished
from jobs.relocation.sources.interface import Item
from tests.hub_server import Fault, Hub
from tests.relocation.conftest import names

SMALLEST = 1 << 16
LARGE = random.Random(2).randbytes(32 * SMALLEST + 1234)
SECOND = len(LARGE) // 8 // 4096 * 4096  # where the second range starts, with four connections
SHA256 = hashlib.sha256(LARGE).hexdigest()
PARTIAL, JOURNAL = partial.leftovers("large.bin")
# In a process of its own, as `small_ranges` does here.
FETCH = """
import json, sys
from pathlib import Path
from jobs.relocation import download, unfinished
from jobs.relocation.sources.interface import Item
unfinished.SMALLEST, unfinished.RECORD, folder = int(sys.argv[1]), int(sys.argv[1]), Path(sys.argv[2])
download.fetch([Item(**each) for each in json.loads(sys.argv[3])], folder)
"""


@pytest.fixture(autouse=True)
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges of 64 KiB through four connections, so that a file of 2 MB is a large one."""
    monkeypatch.setattr(unfinished, "SMALLEST", SMALLEST)
    monkeypatch.setattr(unfinished, "RECORD", SMALLEST)
    monkeypatch.setattr(connection, "CONNECTIONS", 4)


@pytest.fixture
def large(hub: Hub) -> Item:
    """A file whose size and digest the hub gives."""
    hub.files["large.bin"] = LARGE
    return Item("large.bin", f"{hub.url}/files/large.bin", len(LARGE), SHA256)


def unsized(item: Item) -> Item:
    return Item(item.name, item.url, sha256=item.sha256)


def sent(hub: Hub) -> int:
    return sum(each.count for each in hub.sent)


# --- in parallel -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["known", "unknown"])
def test_a_large_file_comes_through_all_connections(hub: Hub, large: Item, draft: Path, size: str) -> None:
    hub.bytes_per_second = 1_000_000
    download.fetch([large if size == "known" else unsized(large)], draft)
    assert (draft / "large.bin").read_bytes() == LARGE
    assert names(draft) == ["large.bin"]
    assert hub.most_active >= 4
    if size == "known":  # else the first request was for everything, and had to be ended
        assert hub.most_active == 4
        assert sent(hub) == len(LARGE)
        assert sorted(byte for each in hub.sent for byte in (each.start, each.end))[::2] == sorted(
            each.start for each in hub.sent), "they overlap"


def test_small_files_do_not_wait_for_each_other(hub: Hub, draft: Path) -> None:
    """The server does not send a byte before it has four requests."""
    hub.together = threading.Barrier(4)
    hub.files |= {f"{number}.bin": b"%d" % number for number in range(8)}
    download.fetch([Item(f"{number}.bin", f"{hub.url}/files/{number}.bin", sha256=hashlib.sha256(b"%d" % number
                         ).hexdigest()) for number in range(8)], draft)
    assert [(draft / f"{number}.bin").read_bytes() for number in range(8)] == [b"%d" % n for n in range(8)]
    assert hub.most_active == 4


def test_one_connection_can_be_all(hub: Hub, large: Item, draft: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "CONNECTIONS", 1)
    download.fetch([large], draft)
    assert (draft / "large.bin").read_bytes() == LARGE
    assert hub.most_active == 1


def test_the_last_ranges_are_the_smallest(hub: Hub, large: Item, draft: Path) -> None:
    download.fetch([large], draft)
    lengths = [each.end - each.start for each in sorted(hub.sent, key=lambda each: each.start)]
    assert lengths[0] == SECOND
    assert all(after <= before for before, after in itertools.pairwise(lengths[:-1]))
    assert all(length < 2 * SMALLEST for length in lengths[-4:])


def test_a_range_that_takes_long_is_divided_when_a_connection_is_free(
        hub: Hub, large: Item, draft: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file has two ranges at first, and the server is slow."""
    monkeypatch.setattr(unfinished, "SMALLEST", len(LARGE) // 2)
    monkeypatch.setattr(unfinished, "CHUNK", 1 << 18)
    monkeypatch.setattr(connection, "CHUNK", 1 << 16)
    monkeypatch.setattr(unfinished, "LONG_S", 0.5)
    monkeypatch.setattr(transfer, "TICK_S", 0.1)
    hub.bytes_per_second = 500_000
    hub.files["small.bin"] = b"small"
    download.fetch([large, *(Item(f"{number}.bin", f"{hub.url}/files/small.bin", 5) for number in range(3))], draft)
    assert (draft / "large.bin").read_bytes() == LARGE
    assert len([each for each in hub.sent if "large" in each.path]) > 2


def test_many_files_and_a_large_one_share_the_connections(hub: Hub, large: Item, draft: Path) -> None:
    hub.bytes_per_second = 2_000_000
    hub.files |= {f"{number}.bin": LARGE[number:SMALLEST] for number in range(20)}
    items = [Item(f"sub/{number}.bin", f"{hub.url}/files/{number}.bin", SMALLEST - number) for number in range(20)]
    download.fetch([large, *items], draft)
    assert (draft / "large.bin").read_bytes() == LARGE
    assert [(draft / item.name).read_bytes() for item in items] == [LARGE[number:SMALLEST] for number in range(20)]
    assert hub.most_active == 4


def test_git_digests_are_made_while_the_bytes_come(hub: Hub, large: Item, draft: Path) -> None:
    digest = hashlib.sha1(b"blob %d\0" % len(LARGE) + LARGE).hexdigest()
    download.fetch([Item("large.bin", large.url, git_sha1=digest)], draft)
    with pytest.raises(UserError, match=f"says {'0' * 40}, but the content is {digest}"):
        download.fetch([Item("again.bin", large.url, git_sha1="0" * 40)], draft)
    assert names(draft) == ["large.bin"]


def test_bytes_are_read_back_once(hub: Hub, large: Item, draft: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the manifest of an artifact says about them comes from the same reading."""
    hub.files["small.bin"] = b"small"
    read: list[int] = []
    preadv = os.preadv

    def read_and_count(handle: int, buffers: Any, at: int) -> int:
        read.append(preadv(handle, buffers, at))
        return read[-1]

    monkeypatch.setattr(os, "preadv", read_and_count)
    download.fetch([large, Item("small.bin", f"{hub.url}/files/small.bin")], draft)
    assert sum(read) == len(LARGE) + 5
    monkeypatch.setattr(files, "sha256_of", lambda file: pytest.fail(f"{file} is read again"))
    (draft / "large.bin").chmod(0o600)
    listed = {each["path"]: each["sha256"] for each in artifacts.listing(draft, digest=files.noted_sha256)}
    assert listed == {"large.bin": SHA256, "small.bin": hashlib.sha256(b"small").hexdigest()}
    monkeypatch.undo()
    (draft / "large.bin").write_bytes(b"other")
    assert files.noted_sha256(draft / "large.bin") == hashlib.sha256(b"other").hexdigest()


def test_space_is_checked_for_all_files_before_a_byte_is_requested(hub: Hub, large: Item, draft: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 3_000_000})())
    with pytest.raises(UserError, match=r"4\.2 MB are needed, but 3\.0 MB are free"):
        download.fetch([large, Item("again.bin", large.url, len(LARGE), SHA256)], draft)
    assert hub.seen == []


# --- a source in trouble ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["known", "unknown"])
def test_a_server_without_ranges_sends_a_large_file_once(hub: Hub, large: Item, draft: Path, size: str) -> None:
    hub.ranges = False
    download.fetch([large if size == "known" else unsized(large)], draft)
    assert (draft / "large.bin").read_bytes() == LARGE
    assert len(hub.sent) == 1


def test_a_server_that_stops_giving_ranges_is_read_whole(hub: Hub, large: Item, draft: Path) -> None:
    hub.faults.append(Fault("large.bin", times=3, answer_from=0, range="bytes=2"))
    download.fetch([large], draft)
    assert (draft / "large.bin").read_bytes() == LARGE


@pytest.mark.parametrize("content_range", ["bytes 0-5/6", "bytes 0-{last}/{total}", "pages 1-2/3", "bytes 5-4/{total}"])
def test_a_wrong_content_range_of_one_connection_does_no_harm(hub: Hub, large: Item, draft: Path,
                                                             content_range: str) -> None:
    wrong = content_range.format(total=len(LARGE), last=len(LARGE) - 1)
    hub.faults += [Fault("large.bin", content_range=wrong, range=f"bytes={digit}") for digit in range(1, 10)]
    download.fetch([large], draft)
    assert (draft / "large.bin").read_bytes() == LARGE


@pytest.mark.parametrize("digest", [True, False])
def test_content_that_changes_between_ranges_is_fetched_anew(hub: Hub, large: Item, draft: Path, digest: bool,
                                                            caplog: pytest.LogCaptureFixture) -> None:
    """Both contents have the same size; where there is no digest, only the version shows it."""
    old = random.Random(3).randbytes(len(LARGE))
    hub.files["large.bin"], hub.versions["large.bin"] = old, '"old"'
    hub.bytes_per_second = 2_000_000

    def change() -> None:
        hub.versions["large.bin"], hub.files["large.bin"] = '"new"', LARGE

    threading.Timer(0.1, change).start()
    download.fetch([large if digest else Item("large.bin", large.url, len(LARGE))], draft)
    assert (draft / "large.bin").read_bytes() == LARGE
    assert [seen for seen in hub.seen if seen.headers.get("if-range") == '"old"']
    assert "starting over" in caplog.text or "the content changed" in caplog.text or "no longer gives" in caplog.text


def test_servers_that_each_have_a_version_of_their_own_are_one_source(hub: Hub, large: Item, draft: Path) -> None:
    hub.faults += [Fault("large.bin", version=f'"{number}"') for number in range(200)]
    download.fetch([large], draft)
    assert (draft / "large.bin").read_bytes() == LARGE


def test_a_total_that_changes_between_ranges_starts_over(hub: Hub, large: Item, draft: Path,
                                                        caplog: pytest.LogCaptureFixture) -> None:
    hub.faults.append(Fault("large.bin", range=f"bytes={SECOND}-",
                            content_range=f"bytes {SECOND}-{len(LARGE)}/{len(LARGE) + 1}"))
    download.fetch([Item("large.bin", large.url, len(LARGE))], draft)
    assert (draft / "large.bin").read_bytes() == LARGE
    assert f"the content changed: it had {len(LARGE)} bytes, now it has {len(LARGE) + 1}" in caplog.text


def test_a_pause_that_the_server_requests_holds_for_that_range(hub: Hub, large: Item, draft: Path) -> None:
    hub.faults.append(Fault("large.bin", status=429, retry_after="1", range=f"bytes={SECOND}-"))
    download.fetch([large], draft)
    assert (draft / "large.bin").read_bytes() == LARGE
    first, again = [seen for seen in hub.seen if (seen.range or "").startswith(f"bytes={SECOND}-")]
    assert again.at - first.at >= 0.99
    assert sent(hub) == len(LARGE)


def test_those_that_a_pause_is_not_for_go_on(hub: Hub, large: Item, draft: Path) -> None:
    """The server allows two connections, and requests a pause of two seconds from more."""
    hub.bytes_per_second = 2_000_000
    hub.most_connections, hub.retry_after = 2, "2"
    started = time.monotonic()
    download.fetch([large], draft)
    assert (draft / "large.bin").read_bytes() == LARGE
    within = [seen for seen in hub.seen if seen.at < started + 1.9]
    assert len(within) > 6, "further ranges were requested before the pause was over"


@pytest.mark.parametrize("retry_after", [None, "0"])
def test_a_server_that_allows_few_connections_gives_the_file_through_those(
        hub: Hub, large: Item, draft: Path, monkeypatch: pytest.MonkeyPatch, retry_after: str | None) -> None:
    """Two of four are refused, far more often in all than a server may fail in a row."""
    monkeypatch.setattr(retries, "ATTEMPTS", 10)
    monkeypatch.setattr(retries, "LONGEST_PAUSE_S", 0.02)
    hub.bytes_per_second = 2_000_000
    hub.most_connections, hub.retry_after = 2, retry_after
    download.fetch([large], draft)
    assert (draft / "large.bin").read_bytes() == LARGE
    assert sum(seen.range is not None for seen in hub.seen) > len(hub.sent) + 8


def test_many_connections_that_break_at_once_are_one_failure(hub: Hub, large: Item, draft: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "CONNECTIONS", 16)
    hub.faults.append(Fault("large.bin", times=16, drop_after=0, linger_s=0.2))
    download.fetch([large], draft)
    assert (draft / "large.bin").read_bytes() == LARGE


def test_a_server_that_fails_for_good_is_given_up(hub: Hub, large: Item, draft: Path) -> None:
    hub.faults += [Fault("large.bin", drop_after=1000, range="bytes=0-"), Fault("large.bin", times=999, status=503)]
    with pytest.raises(RetryableError, match=r"large\.bin: gave up after 4 attempts in a row.*503"):
        download.fetch([large], draft)
    assert (draft / PARTIAL).read_bytes()[:1000] == LARGE[:1000]


@pytest.mark.parametrize("rate", [1000, 1e-9])
def test_a_connection_that_trickles_is_replaced(hub: Hub, large: Item, draft: Path, monkeypatch: pytest.MonkeyPatch,
                                                caplog: pytest.LogCaptureFixture, rate: float) -> None:
    """At that rate the range would take minutes, or for ever."""
    monkeypatch.setattr(transfer, "SLOW_S", 0.3)
    monkeypatch.setattr(transfer, "TICK_S", 0.05)
    hub.bytes_per_second = 500_000
    hub.faults.append(Fault("large.bin", bytes_per_second=rate, range=f"bytes={SECOND}-"))
    caplog.set_level("INFO", "jobs")
    download.fetch([large], draft)
    assert (draft / "large.bin").read_bytes() == LARGE
    assert "replacing it" in caplog.text
    trickled = next(each for each in hub.sent if each.start == SECOND)
    assert trickled.count < 60_000
    again = [each for each in hub.sent if SECOND <= each.start < trickled.end and each is not trickled]
    assert again[0].start >= SECOND + trickled.count - 4096, "it went on where the slow connection was"


def test_one_wrong_file_ends_the_others(hub: Hub, large: Item, draft: Path) -> None:
    hub.bytes_per_second = 100_000
    hub.files["x"] = b"x"
    with pytest.raises(UserError, match="x: pipeline.yaml says 0000"):
        download.fetch([Item("x", f"{hub.url}/files/x", sha256="0" * 64), large], draft)
    assert sent(hub) < len(LARGE)
    assert not {"x", "large.bin"} & set(names(draft))


def test_wrong_bytes_of_one_range_are_fetched_once_more(hub: Hub, large: Item, draft: Path,
                                                       caplog: pytest.LogCaptureFixture) -> None:
    hub.faults.append(Fault("large.bin", wrong_bytes=True, range="bytes=2"))
    download.fetch([large], draft)
    assert (draft / "large.bin").read_bytes() == LARGE
    assert "starting over" in caplog.text


def test_a_wrong_digest_of_a_large_file_names_both_and_leaves_nothing(hub: Hub, large: Item, draft: Path) -> None:
    with pytest.raises(UserError, match=f"says {'0' * 64}, but the content is {SHA256}"):
        download.fetch([Item("large.bin", large.url, len(LARGE), "0" * 64)], draft)
    assert names(draft) == []


@pytest.mark.parametrize("size", [1, 2])
def test_a_file_that_is_longer_than_its_source_said_is_refused(hub: Hub, draft: Path, size: int) -> None:
    hub.files["x"] = b"xyz"
    with pytest.raises(UserError, match=rf"says {size} bytes, but the content is 3 bytes"):
        download.fetch([Item("x", f"{hub.url}/files/x", size)], draft)


def test_an_empty_file_is_a_file(hub: Hub, draft: Path) -> None:
    hub.files["x"] = b""
    empty = hashlib.sha256().hexdigest()
    download.fetch([Item("known", f"{hub.url}/files/x", 0, empty), Item("unknown", f"{hub.url}/files/x", None, empty)],
                   draft)
    assert [(path.name, path.read_bytes()) for path in sorted(draft.iterdir())] == [("known", b""), ("unknown", b"")]


# --- interruptions ---------------------------------------------------------------------------------------------------


def test_killed_at_any_moment_it_fetches_again_only_what_was_on_its_way(hub: Hub, large: Item, draft: Path,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELOCATION_CONNECTIONS", "8")
    moments, record = random.Random(4), SMALLEST // 4
    items = json.dumps([{"name": "large.bin", "url": large.url, "size": len(LARGE), "sha256": SHA256}])
    command = [sys.executable, "-c", FETCH, str(record), str(draft), items]
    here = 0
    for _ in range(3):
        hub.bytes_per_second = 200_000  # of each connection
        before = sent(hub)
        process = subprocess.Popen(command)
        while sent(hub) == before and process.poll() is None:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        process.wait()
        while hub.active:
            time.sleep(0.01)
        content = np.frombuffer((draft / PARTIAL).read_bytes(), np.uint8)
        written = int((content == np.frombuffer(LARGE, np.uint8)[:len(content)]).sum())
        recorded = ranges.read_journal(draft / JOURNAL, len(content)) if (draft / JOURNAL).exists() else None
        here = recorded.present.size if recorded else len(content)
        assert written - here <= 8 * record + len(LARGE) // 200, "a piece of each connection, and bytes that are 0"
    hub.bytes_per_second = None
    hub.sent.clear()
    assert subprocess.run(command, check=False).returncode == 0
    assert (draft / "large.bin").read_bytes() == LARGE
    assert names(draft) == ["large.bin"]
    assert sent(hub) == len(LARGE) - here


def interrupted(draft: Path, journal: bytes | None, partial: bytes) -> None:
    (draft / PARTIAL).write_bytes(partial)
    if journal is not None:
        (draft / JOURNAL).write_bytes(journal)


def test_what_the_journal_names_is_not_fetched_again(hub: Hub, large: Item, draft: Path) -> None:
    head = b'{"total": %d, "version": null}\n' % len(LARGE)
    there = [(0, 1000), (500_000, 1_000_000)]
    partial = bytearray(len(LARGE))
    for start, end in there:
        partial[start:end] = LARGE[start:end]
    interrupted(draft, head + b"".join(b"%d %d\n" % each for each in there) + b"1500000 15", bytes(partial))
    download.fetch([large], draft)
    assert (draft / "large.bin").read_bytes() == LARGE
    assert sent(hub) == len(LARGE) - 501_000


@pytest.mark.parametrize(("journal", "partial"), [
    (b'{"total": 2098386, "version": null}\n0 2000000\n', bytes(len(LARGE))),  # a power cut: it was never written
    (b'{"total": 2098386, "version": null}\n0 2000000\n', LARGE[:1000]), (b'{"total": 20', LARGE[:500_000]),
    (b'{"total": 7, "version": null}\n0 5\n', LARGE[:500_000]), (b"[]\n", LARGE), (b"", LARGE[:500_000]),
    (None, LARGE + b"!"), (None, LARGE[:-1] + b"!"),
], ids=["zeros", "short", "torn", "another total", "no journal", "empty", "too long", "another end"])
def test_leftovers_that_are_not_what_they_should_be_do_no_harm(hub: Hub, large: Item, draft: Path,
                                                              journal: bytes | None, partial: bytes) -> None:
    interrupted(draft, journal, partial)
    download.fetch([large], draft)
    assert (draft / "large.bin").read_bytes() == LARGE
    assert names(draft) == ["large.bin"]


def test_every_length_of_a_partial_file_and_of_its_journal_is_continued(tmp_path: Path) -> None:
    """A file on this machine, fetched from every byte on, with every part of a journal."""
    content = random.Random(5).randbytes(150)
    source = tmp_path / "source"
    source.write_bytes(content)
    journal = b'{"total": 150, "version": null}\n0 10\n40 60\n100 120\n'
    for length in range(max(len(content), len(journal)) + 1):
        for with_journal in (True, False):
            draft = tmp_path / f"{length}-{with_journal}"
            draft.mkdir()
            interrupted(draft, journal[:length] if with_journal else None, content if with_journal else
                        content[:length])
            download.fetch([Item("large.bin", str(source), 150, hashlib.sha256(content).hexdigest())], draft)
            assert (draft / "large.bin").read_bytes() == content
            assert names(draft) == ["large.bin"]


def test_an_answer_cut_off_at_every_byte_is_continued_or_refused(hub: Hub, draft: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    content = random.Random(6).randbytes(120)
    digest = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(retries, "FIRST_PAUSE_S", 0.0)
    items = []
    for length in range(len(content)):
        hub.files[f"{length}.bin"] = content
        hub.faults.append(Fault(f"/{length}.bin", cut_after=length))
        items.append(Item(f"{length}.bin", f"{hub.url}/files/{length}.bin", len(content), digest))
    download.fetch(items, draft)
    assert {(draft / item.name).read_bytes() for item in items} == {content}
    hub.faults.append(Fault("/5.bin", times=9, cut_after=5))
    with pytest.raises(UserError, match=hashlib.sha256(content[:5]).hexdigest()):
        download.fetch([Item("cut", f"{hub.url}/files/5.bin", sha256=digest)], draft)


def test_memory_does_not_grow_with_the_file(hub: Hub, draft: Path) -> None:
    hub.files["huge"] = bytes(256 << 20)
    code = ("import resource, sys; from pathlib import Path; from jobs.relocation import download, sources\n"
            "from jobs.relocation.sources.interface import Item\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "download.fetch([Item('huge', sys.argv[1], 256 << 20)], Path(sys.argv[2]))\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)")
    done = subprocess.run([sys.executable, "-c", code, f"{hub.url}/files/huge", str(draft)], capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (draft / "huge").stat().st_size == 256 << 20
    assert int(done.stdout) < 64 << 10, "KiB"


# --- ranges ----------------------------------------------------------------------------------------------------------


def test_ranges_merge_and_show_their_gaps() -> None:
    found = ranges.Ranges([(10, 20), (30, 40), (0, 5)])
    assert (found.prefix, found.size, found.end, found.first_gap(50)) == (5, 25, 40, (5, 10))
    found.add(5, 10)
    assert (list(found), found.first_gap(50)) == ([(0, 20), (30, 40)], (20, 30))
    found.add(15, 35)
    found.add(7, 7)
    assert (list(found), found.first_gap(50), found.first_gap(None), found.first_gap(40)) == (
        [(0, 40)], (40, 50), (40, None), None)


# --- requests --------------------------------------------------------------------------------------------------------


def test_a_redirect_is_followed_exactly_as_written(hub: Hub, large: Item, draft: Path) -> None:
    """A signature may cover the text of a URL."""
    target = f"{hub.url}/files/large.bin?sig=a%2fb%2FC~(1)%20|"
    hub.faults.append(Fault("/signed", times=99, status=302, location=target))
    hub.files["signed"] = b""
    download.fetch([Item("x", f"{hub.url}/files/signed?k=%2f", sha256=SHA256)], draft)
    assert {seen.path for seen in hub.seen if "large" in seen.path} == {
        "/files/large.bin?sig=a%2fb%2FC~(1)%20|"}
    assert hub.seen[0].path == "/files/signed?k=%2f"


def test_redirects_that_go_round_in_circles_are_given_up(hub: Hub, draft: Path) -> None:
    hub.faults.append(Fault("/x", times=999, status=302, location=f"{hub.url}/files/x"))
    with pytest.raises(RetryableError, match="redirects more than 10 times"):
        download.fetch([Item("x", f"{hub.url}/files/x", sha256=SHA256)], draft)


def test_a_proxy_is_spoken_to(hub: Hub, draft: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", hub.url)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    download.fetch([Item("a", "http://proxied/files/data.bin?k=%2f"), Item("b", f"{hub.url}/files/data.bin")], draft)
    assert {seen.path for seen in hub.seen} == {"/files/data.bin", "http://proxied/files/data.bin?k=%2f"}


def test_compressed_answers_are_unpacked(hub: Hub, draft: Path) -> None:
    """Stores keep objects with a Content-Encoding and send them so, whatever was requested."""
    hub.files["packed"] = gzip.compress(LARGE)
    hub.encodings["packed"] = "gzip"
    download.fetch([Item("x", f"{hub.url}/files/packed", sha256=SHA256)], draft)
    assert (draft / "x").read_bytes() == LARGE
    assert re.fullmatch("identity", hub.seen[0].headers["accept-encoding"])
