"""oci:// against a registry over HTTP: what is pinned is what arrives, and what keeps it out is named."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from jobs.core import registry
from jobs.core.declarations import DatasetSource, Loaded, ModelSource, Source
from jobs.core.errors import RetryableError, UserError
from jobs.core.pipeline import load
from jobs.core.plan import plan
from jobs.core.registry import Reference, Registry, digest_of
from jobs.relocation import download, sources
from tests import build_pipeline, registry_server
from tests.registry_server import Fault
from tests.relocation.conftest import CONTENT, names

FILES = {"config.json": b'{"model_type": "llama"}', "data/train.bin": CONTENT}
ZEROS = "0" * 64


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    registry_server.isolate(monkeypatch, tmp_path)


@pytest.fixture
def server() -> Iterator[registry_server.Registry]:
    with registry_server.serve() as server:
        server.push("team/model", FILES, "v1")
        yield server


def pinned(server: registry_server.Registry, here: Loaded) -> Source:
    source = Source(source=f"oci://{server.host}/team/model:v1")
    return Source(source=source.source, sha256=sources.find_pin(here, source))


def fetch(source: Source, here: Loaded, draft: Path) -> dict[str, bytes]:
    download.fetch(sources.listing(here, source), draft)
    return {name: (draft / name).read_bytes() for name in names(draft)}


def test_the_tag_is_pinned_and_the_files_arrive(server: registry_server.Registry, here: Loaded, draft: Path) -> None:
    source = pinned(server, here)
    assert f"sha256:{source.sha256}" == digest_of(server.manifests["team/model", "v1"])
    assert fetch(source, here, draft) == FILES


def test_they_arrive_from_a_real_registry(here: Loaded, draft: Path, tmp_path: Path) -> None:
    with registry_server.real(tmp_path) as host:
        there = Registry(Reference(host, "team/model"), push=True)
        for content in (*FILES.values(), b"{}"):
            there.push_blob(content, digest_of(content), len(content))
        digest = there.push_manifest(json.dumps({
            "schemaVersion": 2, "mediaType": registry.OCI_MANIFEST,
            "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": digest_of(b"{}"), "size": 2},
            "layers": [{"mediaType": "application/octet-stream", "digest": digest_of(content), "size": len(content),
                        "annotations": {registry.TITLE: name}} for name, content in FILES.items()]}).encode(), "v1")
        source = Source(source=f"oci://{host}/team/model:v1")
        assert f"sha256:{sources.find_pin(here, source)}" == digest
        assert fetch(Source(source=f"oci://{host}/team/model@{digest}"), here, draft) == FILES


def test_a_tag_that_moves_changes_nothing(server: registry_server.Registry, here: Loaded, draft: Path) -> None:
    source = pinned(server, here)
    moved = server.push("team/model", {"config.json": b"{}"}, "v1")
    assert fetch(source, here, draft) == FILES
    del server.manifests["team/model", f"sha256:{source.sha256}"]
    with pytest.raises(UserError, match=rf"pipeline\.yaml says sha256 {source.sha256}, which the registry does not "
                                        rf"have; the tag is now {moved}\. .*jobs pin"):
        sources.listing(here, source)


def test_a_source_without_a_tag_cannot_be_pinned(here: Loaded) -> None:
    with pytest.raises(UserError, match="names neither a tag nor a digest"):
        sources.find_pin(here, Source(source="oci://registry.example.com/a"))


def test_the_digest_in_the_source_is_the_pin() -> None:
    within, beside = (ModelSource(source=f"oci://r.example.com/m@sha256:{ZEROS}"),
                      ModelSource(source="oci://r.example.com/m:v1", sha256=ZEROS))
    assert within.sha256 == beside.sha256 == ZEROS and within.unpinned() is None
    assert DatasetSource(source="oci://r.example.com/m:v1").unpinned() == "`sha256` is missing"
    with pytest.raises(ValidationError, match="names another digest than `sha256`"):
        ModelSource(source=f"oci://r.example.com/m@sha256:{ZEROS}", sha256="1" * 64)
    with pytest.raises(ValidationError, match="is not pinned by `revision`"):
        ModelSource(source="oci://r.example.com/m:v1", revision="a" * 40)
    with pytest.raises(ValidationError, match="must be oci://REGISTRY/NAME:TAG"):
        ModelSource(source="oci://r.example.com/Model:v1")


def test_where_it_comes_from_is_no_part_of_what_it_is(tmp_path: Path) -> None:
    digests = []
    for number, source in enumerate(("oci://a.example.com/m:v1.2", f"oci://b.example.com/n@sha256:{ZEROS}")):
        folder = tmp_path / str(number)
        folder.mkdir()
        wanted = plan(load(build_pipeline.write(folder, dataset__source=source, dataset__sha256=ZEROS,
                                                base_model={"source": source, "sha256": ZEROS})).pipeline)
        digests.append((wanted.base_model.digest, wanted.dataset.digest))
    assert digests[0] == digests[1]


def test_the_storage_behind_the_registry_gets_no_credentials(server: registry_server.Registry, here: Loaded,
                                                             draft: Path, tmp_path: Path) -> None:
    source = pinned(server, here)
    server.users, server.redirects = {"ci": "secret"}, True
    auth = base64.b64encode(b"ci:secret").decode()
    (tmp_path / "config.json").write_text(json.dumps({"auths": {server.host: {"auth": auth}}}))
    assert fetch(source, here, draft) == FILES
    stored = [seen for seen in server.seen if seen.host == "storage"]
    assert len(stored) >= 2 and not any("Authorization" in seen.headers for seen in stored)
    assert all("Authorization" in seen.headers for seen in server.seen
               if seen.host == "registry" and seen.method == "GET" and "/blobs/" in seen.path)


def test_a_token_that_expires_during_the_download_is_requested_again(server: registry_server.Registry, here: Loaded,
                                                                     draft: Path, tmp_path: Path) -> None:
    source = pinned(server, here)
    server.users = {"ci": "secret"}
    auth = base64.b64encode(b"ci:secret").decode()
    (tmp_path / "config.json").write_text(json.dumps({"auths": {server.host: {"auth": auth}}}))
    server.faults += [Fault(digest_of(content), method="GET", expire=True) for content in FILES.values()]
    assert fetch(source, here, draft) == FILES


def test_a_download_that_breaks_off_goes_on(server: registry_server.Registry, here: Loaded, draft: Path) -> None:
    source = pinned(server, here)
    server.faults.append(Fault(digest_of(CONTENT), cut_after=100_000))
    assert fetch(source, here, draft) == FILES
    assert any(seen.headers.get("Range") for seen in server.requests("GET", digest_of(CONTENT)))


def test_a_registry_without_ranges_serves_as_well(server: registry_server.Registry, here: Loaded, draft: Path) -> None:
    source = pinned(server, here)
    server.ranges = False
    server.faults.append(Fault(digest_of(CONTENT), cut_after=100_000))
    assert fetch(source, here, draft) == FILES


def test_wrong_content_is_not_taken(server: registry_server.Registry, here: Loaded, draft: Path) -> None:
    source = pinned(server, here)
    server.blobs[digest_of(CONTENT)] = CONTENT[:-1] + b"\0"
    with pytest.raises(UserError, match="its manifest says [0-9a-f]{64}, but the content is"):
        fetch(source, here, draft)
    server.blobs[digest_of(CONTENT)] = CONTENT[:-1]  # truncated
    with pytest.raises((UserError, RetryableError)):
        fetch(source, here, draft)
    assert "data/train.bin" not in names(draft)


def test_a_blob_that_ends_early_at_any_byte_is_not_taken(server: registry_server.Registry, here: Loaded,
                                                         draft: Path) -> None:
    small = b'{"a": 1}'
    server.push("team/model", {"small.json": small}, "v1")
    items = sources.listing(here, pinned(server, here))
    for end in range(len(small)):
        server.blobs[digest_of(small)] = small[:end]
        with pytest.raises((UserError, RetryableError)):
            download.fetch(items, draft)
        assert "small.json" not in names(draft)
    server.blobs[digest_of(small)] = small
    download.fetch(items, draft)
    assert (draft / "small.json").read_bytes() == small


def test_a_blob_that_the_registry_lost_is_named(server: registry_server.Registry, here: Loaded, draft: Path) -> None:
    source = pinned(server, here)
    del server.blobs[digest_of(CONTENT)]
    with pytest.raises(UserError, match=rf"team/model@{digest_of(CONTENT)}: the registry has no such blob"):
        fetch(source, here, draft)


def test_a_blob_that_is_denied_is_named_with_what_to_do(server: registry_server.Registry, here: Loaded,
                                                        draft: Path) -> None:
    source = pinned(server, here)
    server.faults.append(Fault("/blobs/", method="GET", times=9, status=403))
    with pytest.raises(UserError, match=r"not allowed \(403\)\. docs/publication\.md, Credentials"):
        fetch(source, here, draft)


def test_the_name_of_a_layer_cannot_leave_the_folder(server: registry_server.Registry, here: Loaded) -> None:
    server.push("team/model", {"../../etc/passwd": b"1"}, "v1")
    with pytest.raises(UserError, match="cannot be the name of a file"):
        sources.listing(here, pinned(server, here))
