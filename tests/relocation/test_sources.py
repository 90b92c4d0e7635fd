"""Promises of fetching: what is pinned is what arrives, whatever the network does, and a byte is fetched once."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.core.errors import RetryableError, UserError
from jobs.core.pipeline import Loaded, Source, load
from jobs.relocation import download, sources
from jobs.relocation.download import Item
from tests import build_pipeline
from tests.hub_server import SIGNATURE, Fault, Hub, nowhere, serve

CONTENT = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
PARTIAL = "data.bin.partial"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The local hub, named by HF_ENDPOINT, and a retry schedule for the impatient."""
    monkeypatch.setattr(download, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(download, "ATTEMPTS", 4)
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    with serve() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        server.files["data.bin"] = CONTENT
        yield server


@pytest.fixture
def here(tmp_path: Path) -> Loaded:
    """A pipeline file, beside which `file:` sources are looked for."""
    return load(build_pipeline.write(tmp_path))


@pytest.fixture
def draft(tmp_path: Path) -> Path:
    folder = tmp_path / "draft"
    folder.mkdir()
    return folder


def url_item(hub: Hub, sha256: str | None = SHA256) -> Item:
    return Item("data.bin", f"{hub.url}/files/data.bin", sha256=sha256)


def names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def ranges(hub: Hub, part: str = "data.bin") -> list[str | None]:
    return [seen.range for seen in hub.gets(part)]


# --- pins of what is on this machine ---------------------------------------------------------------------------------


def test_the_pin_of_a_folder_is_what_the_documentation_says(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.txt").write_text("x")
    (tmp_path / "a.txt").write_text("a")
    listed = [["a.txt", hashlib.sha256(b"a").hexdigest()], ["b/x.txt", hashlib.sha256(b"x").hexdigest()]]
    by_hand = hashlib.sha256(json.dumps(listed, separators=(",", ":")).encode()).hexdigest()
    assert sources.folder_sha256(tmp_path) == by_hand


def test_the_pin_of_a_folder_changes_with_content_and_names_and_not_with_hidden_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    pin = sources.folder_sha256(tmp_path)
    (tmp_path / ".hidden").write_text("editor's")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("main")
    assert sources.folder_sha256(tmp_path) == pin
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    renamed = sources.folder_sha256(tmp_path)
    (tmp_path / "b.txt").write_text("b")
    assert len({pin, renamed, sources.folder_sha256(tmp_path)}) == 3


def test_a_folder_mounted_from_a_config_map_is_read_like_the_folder_in_git(tmp_path: Path, here: Loaded,
                                                                          draft: Path) -> None:
    plain, mounted = tmp_path / "plain", tmp_path / "mounted"
    plain.mkdir()
    (plain / "a.jsonl").write_text("{}")
    (mounted / "..2026_11_22").mkdir(parents=True)
    (mounted / "..2026_11_22" / "a.jsonl").write_text("{}")
    (mounted / "..data").symlink_to("..2026_11_22")
    (mounted / "a.jsonl").symlink_to("..data/a.jsonl")
    source = Source(source="file:mounted", sha256=sources.folder_sha256(plain))
    download.fetch(sources.listing(here, source), draft)
    assert names(draft) == ["a.jsonl"]
    assert not (draft / "a.jsonl").is_symlink()


def test_a_file_that_is_not_there_is_named(here: Loaded) -> None:
    with pytest.raises(UserError, match=r"nothing\.jsonl: no such file or folder"):
        sources.listing(here, Source(source="file:nothing.jsonl", sha256=SHA256))


@pytest.mark.parametrize("folder", [False, True])
def test_a_wrong_pin_of_a_file_or_folder_names_both_digests_and_leaves_nothing(
        here: Loaded, draft: Path, folder: bool) -> None:
    path = here.path.parent / "data"
    if folder:
        path.mkdir()
        (path / "a.jsonl").write_text("{}")
        found = sources.folder_sha256(path)
    else:
        path.write_text("{}")
        found = sources.path_sha256(path)
    with pytest.raises(UserError) as error:
        download.fetch(sources.listing(here, Source(source="file:data", sha256=SHA256)), draft)
    assert SHA256 in str(error.value)
    assert found in str(error.value)
    assert "jobs pin" in str(error.value)
    assert names(draft) == []


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
    monkeypatch.setattr(download, "FIRST_PAUSE_S", 1.0)
    monkeypatch.setattr(download, "ATTEMPTS", 10)
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
    assert 80 < (download._retry_after({"Retry-After": soon}) or 0) <= 90
    assert download._retry_after({"Retry-After": format_datetime(datetime.now(UTC) - timedelta(days=1))}) == 0
    assert download._retry_after({"Retry-After": "soonish"}) is None
    assert download._retry_after({}) is None


def test_a_server_that_asks_for_a_day_is_left_to_the_next_pod(hub: Hub, draft: Path) -> None:
    hub.faults.append(Fault("data.bin", status=429, retry_after="86400"))
    with pytest.raises(RetryableError, match="come back in 86400 s"):
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
        patch.setattr(download, "FIRST_PAUSE_S", 0.0)
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
    assert download.shown("https://me:hush@example.org/a/b.jsonl?k=hush") == "https://example.org/a/b.jsonl"


@pytest.mark.parametrize("url", ["http://host:door/data.jsonl", "https://[::1/data.jsonl", "http:///data.jsonl"])
def test_a_url_that_cannot_be_one_is_refused(hub: Hub, draft: Path, url: str) -> None:
    with pytest.raises(UserError, match="not a URL that can be opened"):
        download.fetch([Item("data.jsonl", url, sha256=SHA256)], draft)


def test_a_bucket_whose_package_is_missing_names_the_package(draft: Path) -> None:
    for scheme, package in (("s3", "s3fs"), ("gs", "gcsfs")):
        with pytest.raises(UserError, match=rf"{scheme}:// needs the package {package}"):
            download.fetch([Item("data.bin", f"{scheme}://bucket/data.bin", sha256=SHA256)], draft)


def test_any_filesystem_of_fsspec_is_resumed_too(draft: Path) -> None:
    """s3:// and gs:// go the way that fsspec's memory:// goes here."""
    import fsspec

    fsspec.filesystem("memory").pipe_file("/bucket/data.bin", CONTENT)
    (draft / PARTIAL).write_bytes(CONTENT[:1234])
    download.fetch([Item("data.bin", "memory://bucket/data.bin", sha256=SHA256)], draft)
    assert (draft / "data.bin").read_bytes() == CONTENT
    with pytest.raises(UserError, match="not found"):
        download.fetch([Item("other.bin", "memory://bucket/other.bin", sha256=SHA256)], draft)


# --- space, leftovers, progress --------------------------------------------------------------------------------------


@pytest.mark.parametrize("told", ["by the hub", "by the first answer"])
def test_too_small_a_volume_is_said_before_a_byte_is_written(hub: Hub, draft: Path, monkeypatch: pytest.MonkeyPatch,
                                                           told: str) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    item = Item("data.bin", f"{hub.url}/files/data.bin", len(CONTENT) if told == "by the hub" else None, SHA256)
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


# --- the hub, through the real huggingface_hub client ----------------------------------------------------------------

FILES = {"config.json": b'{"architectures": ["LlamaForCausalLM"]}', "model.safetensors": CONTENT,
         "onnx/model.bin": b"pickle"}


def hub_source(hub: Hub, files: dict[str, bytes] | None = None, kind: str = "models", path: str = "") -> Source:
    commit = hub.add(kind, "acme/tiny", FILES if files is None else files)
    return Source(source=f"hf://{'datasets/' if kind == 'datasets' else ''}acme/tiny{path}", revision=commit)


def test_a_repository_is_fetched_at_its_pinned_commit_and_nothing_else_is_left(hub: Hub, here: Loaded,
                                                                             draft: Path) -> None:
    source = hub_source(hub)
    hub.add("models", "acme/tiny", {"config.json": b"a later commit"})
    items = sources.listing(here, source)
    assert [(i.name, i.size) for i in items] == [(n, len(FILES[n])) for n in sorted(FILES)]
    download.fetch(items, draft)
    assert {n: (draft / n).read_bytes() for n in names(draft)} == FILES
    assert not any("telemetry" in s.path or "harness" in s.path for s in hub.seen)


def test_a_large_file_is_resumed_at_the_other_host_that_stores_it(hub: Hub, here: Loaded, draft: Path) -> None:
    source = hub_source(hub)
    hub.faults.append(Fault("/cdn/models/acme/tiny", drop_after=123_456))
    download.fetch(sources.listing(here, source), draft)
    assert (draft / "model.safetensors").read_bytes() == CONTENT
    assert ranges(hub, "model.safetensors") == [None, "bytes=123456-"]
    assert all(s.path.endswith(SIGNATURE) for s in hub.gets("model.safetensors"))


def test_the_token_goes_to_the_hub_and_not_to_the_other_host(hub: Hub, here: Loaded, draft: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated.add("models/acme/tiny")
    source = hub_source(hub)
    with pytest.raises(UserError, match=r"hf://acme/tiny: not allowed.*HF_TOKEN"):
        sources.listing(here, source)
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    download.fetch(sources.listing(here, source), draft)
    assert (draft / "model.safetensors").read_bytes() == CONTENT
    assert [s.headers.get("authorization") for s in hub.gets("/resolve/")][-1] == "Bearer hf_good"
    assert [s.headers.get("authorization") for s in hub.gets("/cdn/")] == [None, None]


def test_a_repository_that_is_not_there_says_what_it_may_be(hub: Hub, here: Loaded) -> None:
    with pytest.raises(UserError, match=r"hf://acme/tyni: not allowed \(401\).*misspelt"):
        sources.listing(here, Source(source="hf://acme/tyni", revision="0" * 40))


def test_a_revision_that_is_not_there_is_named(hub: Hub, here: Loaded) -> None:
    hub_source(hub)
    with pytest.raises(UserError, match=f"hf://acme/tiny: the hub has no revision {'0' * 40}.*jobs pin"):
        sources.listing(here, Source(source="hf://acme/tiny", revision="0" * 40))


def test_a_mirror_that_answers_for_another_commit_names_both(hub: Hub, here: Loaded) -> None:
    source = hub_source(hub)
    hub.commit_told = "f" * 40
    with pytest.raises(UserError, match=f"{source.revision}.*{'f' * 40}"):
        sources.listing(here, source)


@pytest.mark.parametrize(("name", "path"), [("model.safetensors", "/cdn/"), ("config.json", "/resolve/")])
def test_wrong_bytes_from_the_hub_name_both_digests(hub: Hub, here: Loaded, draft: Path, name: str, path: str) -> None:
    """LFS files are checked by sha256, the others by what git calls their content."""
    item = next(i for i in sources.listing(here, hub_source(hub)) if i.name == name)
    hub.faults.append(Fault(path, times=99, wrong_bytes=True))
    with pytest.raises(UserError, match=f"the hub says {item.sha256 or item.git_sha1}, but the content is [0-9a-f]+"):
        download.fetch([item], draft)
    assert names(draft) == []


def test_a_body_that_ends_early_is_continued(hub: Hub, here: Loaded, draft: Path) -> None:
    """The hub said the size, so a short answer that looks whole is known to be cut off."""
    hub.faults.append(Fault("/cdn/", cut_after=1000))
    download.fetch(sources.listing(here, hub_source(hub)), draft)
    assert (draft / "model.safetensors").read_bytes() == CONTENT
    assert ranges(hub, "model.safetensors") == [None, "bytes=1000-"]


def test_the_hub_in_trouble_is_asked_again_and_then_given_up(hub: Hub, here: Loaded) -> None:
    source = hub_source(hub)
    hub.faults.append(Fault("/api/", times=2, status=503))
    hub.faults.append(Fault("/api/", status=429, retry_after="0"))
    assert len(sources.listing(here, source)) == 3
    hub.faults.append(Fault("/api/", times=99, status=502))
    with pytest.raises(RetryableError, match=r"hf://acme/tiny: gave up after 4 attempts.*502"):
        sources.listing(here, source)


def test_a_hub_that_is_not_there_is_worth_a_retry(hub: Hub, here: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", nowhere())
    with pytest.raises(RetryableError, match="hf://acme/tiny: gave up"):
        sources.listing(here, Source(source="hf://acme/tiny", revision="0" * 40))


def test_an_endpoint_that_is_no_hub_is_named(hub: Hub, here: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files[f"api/models/acme/tiny/revision/{'0' * 40}"] = b"<html>Welcome</html>"
    monkeypatch.setenv("HF_ENDPOINT", f"{hub.url}/files")
    with pytest.raises(UserError, match=f"{hub.url}/files does not answer as a hub does.*HF_ENDPOINT"):
        sources.listing(here, Source(source="hf://acme/tiny", revision="0" * 40))


def test_a_mirror_without_digests_is_taken_with_a_warning(hub: Hub, here: Loaded, draft: Path,
                                                          caplog: pytest.LogCaptureFixture) -> None:
    source = hub_source(hub)
    hub.blobs = False
    download.fetch(sources.listing(here, source), draft)
    assert "no digest for config.json, model.safetensors" in caplog.text
    assert (draft / "model.safetensors").read_bytes() == CONTENT


@pytest.mark.parametrize(("path", "chosen"), [
    ("", ["README.md", "cola/test-0.parquet", "cola/validation-0.parquet", "sst2/validation-0.parquet"]),
    ("/cola", ["cola/test-0.parquet", "cola/validation-0.parquet"]),
    ("/cola/validation-*.parquet", ["cola/validation-0.parquet"]),
    ("/*/validation-*.parquet", ["cola/validation-0.parquet", "sst2/validation-0.parquet"]),
    ("/cola/test-0.parquet", ["cola/test-0.parquet"]),
])
def test_a_path_chooses_files_of_a_dataset(hub: Hub, here: Loaded, path: str, chosen: list[str]) -> None:
    there = ["README.md", "cola/validation-0.parquet", "cola/test-0.parquet", "sst2/validation-0.parquet"]
    files = dict.fromkeys(there, b"x")
    assert [i.name for i in sources.listing(here, hub_source(hub, files, "datasets", path))] == chosen


def test_a_path_that_chooses_nothing_says_what_is_there(hub: Hub, here: Loaded) -> None:
    with pytest.raises(UserError, match=r"no file is selected by 'colla/\*'; the repository holds cola/a\.parquet"):
        sources.listing(here, hub_source(hub, {"cola/a.parquet": b"x"}, "datasets", "/colla/*"))


def test_a_file_name_that_leaves_its_folder_is_refused(hub: Hub, here: Loaded) -> None:
    with pytest.raises(UserError, match="cannot be the name of a file"):
        sources.listing(here, hub_source(hub, {"../../etc/passwd.jsonl": b"x"}, "datasets"))


@pytest.mark.parametrize("name", ["hf://gpt2", "hf://acme/tiny/main", "hf://datasets/acme", "hf:///tiny"])
def test_a_name_that_is_no_repository_says_the_shape(here: Loaded, name: str) -> None:
    with pytest.raises(UserError, match="must be hf://OWNER/NAME"):
        sources.listing(here, Source(source=name, revision="0" * 40))


def test_offline_mode_is_named_as_the_reason(tmp_path: Path) -> None:
    """In a process of its own: huggingface_hub reads the variable once."""
    import subprocess
    import sys

    code = ("from jobs.relocation import sources; from jobs.core.pipeline import Source\n"
            "sources.hub_commit(Source(source='hf://acme/tiny'))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                          env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert "UserError: hf://acme/tiny: HF_HUB_OFFLINE is set" in done.stderr


# --- what `pin` asks for ---------------------------------------------------------------------------------------------


def test_pins_are_looked_up_where_the_source_is(hub: Hub) -> None:
    source = hub_source(hub)
    hub.faults.append(Fault("data.bin", drop_after=1000))
    assert download.url_sha256(f"{hub.url}/files/data.bin") == SHA256
    assert sources.hub_commit(Source(source="hf://acme/tiny")) == source.revision
    assert sources.hub_commit(Source(source="hf://acme/tiny", revision="main")) == source.revision
    with pytest.raises(UserError, match="not found"):
        download.url_sha256(f"{hub.url}/files/nothing")
