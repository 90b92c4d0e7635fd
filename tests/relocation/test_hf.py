"""Promises of hf:// sources, through the real huggingface_hub client."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jobs.core.declarations import Loaded, Source
from jobs.core.errors import RetryableError, UserError
from jobs.relocation import download, sources
from tests.hub_server import SIGNATURE, Fault, Hub, nowhere
from tests.relocation.conftest import CONTENT, names, ranges

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


def test_a_hub_that_speaks_xet_is_read_through_plain_urls(hub: Hub, here: Loaded, draft: Path) -> None:
    """Its answers name a chunk store, and where to get a token for it."""
    download.fetch(sources.listing(here, hub_source(hub)), draft)
    assert (draft / "model.safetensors").read_bytes() == CONTENT
    assert not [seen for seen in hub.seen if "xet" in seen.path]


def test_a_large_file_is_resumed_at_the_other_host_that_stores_it(hub: Hub, here: Loaded, draft: Path) -> None:
    source = hub_source(hub)
    hub.faults.append(Fault("model.safetensors?", drop_after=123_456))
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


def test_a_mirror_that_answers_for_another_commit_names_both_and_the_file_with_the_pin(hub: Hub, here: Loaded) -> None:
    source = hub_source(hub)
    hub.answers_for_commit = "f" * 40
    environment = Loaded(here.path.with_name("environment.yaml"))
    with pytest.raises(UserError, match=f"environment.yaml says revision {source.revision}.*{'f' * 40}"):
        sources.listing(environment, source)


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
    hub.faults.append(Fault("model.safetensors?", cut_after=1000))
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

    code = ("from jobs.relocation import sources; from jobs.core.declarations import Source\n"
            "sources.find_pin(None, Source(source='hf://acme/tiny'))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                          env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert "UserError: hf://acme/tiny: HF_HUB_OFFLINE is set" in done.stderr
