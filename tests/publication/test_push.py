"""Pushing a published adapter: to any registry, and only what is not there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.core.errors import UserError
from jobs.core.registry import Reference, Registry
from jobs.publication import layout, push
from tests import registry_server
from tests.publication.conftest import make
from tests.registry_server import Fault


@pytest.fixture(params=["python", "docker-registry"])
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with registry_server.either(request.param, tmp_path) as name:
        yield name


def test_what_is_pushed_is_there_under_the_digest_that_is_named(host: str, tmp_path: Path) -> None:
    made = make(tmp_path / "made")
    files = layout.files(made.adapter, made.evaluation, answers=False)
    published = push.to_registry(files, "seville-hotels", made.adapter.digest, f"oci://{host}/team/adapters")
    assert published.pushed and published.source == f"oci://{host}/team/adapters/seville-hotels:{made.adapter.digest}"
    assert published.lines() == [f"source: {published.source}", f"sha256: {published.sha256}"]
    there = Registry(Reference.parse(published.source))
    manifest = there.manifest(f"sha256:{published.sha256}")
    assert manifest.content == there.manifest(made.adapter.digest).content
    assert [(each.path, each.sha256) for each in manifest.layers()] == [(each.path, each.sha256) for each in files]
    assert all(there.has_blob(f"sha256:{each.sha256}") for each in files)


def test_a_second_push_uploads_nothing(host: str, tmp_path: Path) -> None:
    made = make(tmp_path / "made")
    files = layout.files(made.adapter, made.evaluation, answers=False)
    first, second = (push.to_registry(files, "seville-hotels", "d1", f"oci://{host}/team") for _ in range(2))
    assert (first.pushed, second.pushed) == (True, False) and first.lines() == second.lines()


def test_an_interrupted_push_goes_on_and_shows_nothing_before_it_is_whole(server: registry_server.Registry,
                                                                         tmp_path: Path) -> None:
    made = make(tmp_path / "made")
    files = layout.files(made.adapter, made.evaluation, answers=False)
    server.faults.append(Fault("manifests", method="PUT", status=400))
    with pytest.raises(UserError, match="rejects the request"):
        push.to_registry(files, "seville-hotels", "d1", f"oci://{server.host}/team")
    assert not server.manifests and server.blobs
    uploads = len(server.requests("PUT", "uploads"))
    assert push.to_registry(files, "seville-hotels", "d1", f"oci://{server.host}/team").pushed
    assert len(server.requests("PUT", "uploads")) == uploads, "no file twice"


def test_the_tag_of_an_adapter_follows_its_evaluation(server: registry_server.Registry, tmp_path: Path) -> None:
    made = make(tmp_path / "made")
    both = [push.to_registry(layout.files(made.adapter, made.evaluation, answers=answers), "seville-hotels", "d1",
                             f"oci://{server.host}/team") for answers in (False, True)]
    assert [each.pushed for each in both] == [True, True]
    there = Registry(Reference.parse(both[0].source))
    assert there.manifest("d1").digest == f"sha256:{both[1].sha256}"
    assert json.loads(there.manifest(f"sha256:{both[0].sha256}").content), "the earlier one stays for who pinned it"
