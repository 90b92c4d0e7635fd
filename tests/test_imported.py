"""Train here, serve there: an environment that never trained serves another one's adapter, by its digest."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.__main__ import main
from jobs.core import artifacts
from jobs.core.pipeline import Pipeline
from jobs.core.plan import Plan, plan, plan_import
from jobs.core.published import WITHOUT_ANSWERS
from jobs.publication import layout
from jobs.publication.push import Published
from serving import candidates, verification
from serving.candidates import Candidate
from serving.refusal import NotYet, Refused
from tests import build_adapter, build_published, registry_server
from tests.build_guarded import NAME, World, start, until


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """The environment that serves."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    yield from start(tmp_path, monkeypatch)


@pytest.fixture
def registry() -> Iterator[registry_server.Registry]:
    with registry_server.serve() as server:
        yield server


def train(folder: Path, **changes: Any) -> tuple[Pipeline, Plan]:
    """What another environment trained, evaluated and promoted on its volumes."""
    trained, planned = build_adapter.load(folder, **changes)
    build_adapter.promote(folder / "volumes", trained)
    return trained, planned


def publish(host: str, folder: Path, planned: Plan, *, answers: bool = False) -> Published:
    adapter, evaluation = (artifacts.read(each.path(folder / "volumes"))
                           for each in (planned.adapter, planned.evaluation))
    return build_published.publish(host, layout.files(adapter, evaluation, answers=answers))


def relocate(world: World) -> int:
    """The Job of the adapter whose file the server mounts."""
    files = ["--pipeline", f"{world.files}/{NAME}.yaml", "--environment", f"{world.files}/environment.yaml"]
    return main([*files, "--volumes", str(world.volumes), "relocate", "adapter"])


def declare(world: World, published: Published) -> None:
    """Commit the published adapter to the file of the environment that serves."""
    build_published.declare_served(world.files, published)


@pytest.mark.parametrize("answers", [False, True], ids=["without answers", "with the proof"])
def test_an_environment_that_never_trained_serves_it_and_reverts(
        world: World, registry: registry_server.Registry, tmp_path: Path, answers: bool) -> None:
    there = tmp_path / "there"
    first, second = (train(there, training__seed=seed)[1] for seed in (1, 2))
    published = [publish(registry.host, there, planned, answers=answers) for planned in (first, second)]

    declare(world, published[0])
    until(world.looked)
    refused = world.ask()
    assert refused.status_code == 503
    assert "is not there yet" in refused.json()["error"]["message"]
    assert relocate(world) == 0
    until(lambda: world.served() == world.model(first))

    declare(world, published[1])  # a promotion to this environment: one digest in a commit
    assert world.served() == world.model(first)
    assert relocate(world) == 0
    until(lambda: world.served() == world.model(second))

    declare(world, published[0])  # git revert: it is still on the volume, and its Job has not even run yet
    until(lambda: world.served() == world.model(first))
    registry.seen.clear()
    assert relocate(world) == 0
    assert not registry.seen
    assert candidates.promoted(NAME, world.volumes).adapter == first.adapter.digest


def test_an_adapter_that_was_tampered_with_is_not_served_and_the_one_before_stays(
        world: World, registry: registry_server.Registry, tmp_path: Path) -> None:
    there = tmp_path / "there"
    first, second = (train(there, training__seed=seed)[1] for seed in (1, 2))
    declare(world, publish(registry.host, there, first))
    assert relocate(world) == 0
    until(lambda: world.served() == world.model(first))
    weights = second.adapter.path(there / "volumes") / "adapter_model.safetensors"
    published = publish(registry.host, there, second)
    content = weights.read_bytes()
    (digest,) = (digest for digest, blob in registry.blobs.items() if blob == content)
    registry.blobs[digest] = bytes([*content[:-1], content[-1] ^ 1])
    declare(world, published)
    assert relocate(world) == 2
    assert world.served() == world.model(first)
    assert not second.adapter.path(world.volumes).exists()


# --- what the server goes by ------------------------------------------------------------------------------------------


def test_the_file_desires_what_its_relocation_found(tmp_path: Path, registry: registry_server.Registry) -> None:
    trained = build_published.trained(tmp_path / "there")
    published = build_published.publish(registry.host, build_published.files(tmp_path / "there" / "volumes", trained))
    loaded = build_published.declare(tmp_path / "here", published)
    volumes = tmp_path / "here" / "volumes"
    with pytest.raises(NotYet, match=r"the imported adapter \w{16} is not there yet"):
        candidates.desired(loaded.pipeline, volumes)
    assert candidates.in_order(NAME, loaded.pipeline, volumes) == {}
    from jobs.relocation import adapters

    adapters.run(loaded, volumes)
    found = plan(trained)
    expected = Candidate(found.adapter.digest, found.evaluation.digest)
    assert candidates.desired(loaded.pipeline, volumes) == expected
    assert list(candidates.in_order(NAME, loaded.pipeline, volumes)) == [expected]
    record = plan_import(loaded.pipeline).imported_adapter.path(volumes) / "imported.json"
    record.write_text("{")
    with pytest.raises(Refused, match="is damaged"):
        candidates.desired(loaded.pipeline, volumes)
    assert list(candidates.in_order(NAME, loaded.pipeline, volumes)) == [expected]  # the promotion


@pytest.mark.parametrize(("about", "accepted"), [
    ({"left_out": ["proof.json"]}, True), ({"left_out": ["report.md"]}, False), ({"left_out": "proof.json"}, False),
    ({"left_out": []}, False), ({}, False), ([], False)])
def test_a_proof_may_be_missing_only_where_the_manifest_says_that_it_was_not_published(
        tmp_path: Path, about: Any, accepted: bool) -> None:
    trained = build_published.trained(tmp_path)
    folder = build_published.evaluation(tmp_path, trained, lambda draft: (draft / "proof.json").unlink()).path
    manifest = folder / "artifact.json"
    manifest.write_text(build_published.with_about(manifest.read_text(), about))
    if accepted:
        assert verification.read_proof(folder) is None
    else:
        with pytest.raises(Refused, match="does not hold what the adapter answers"):
            verification.read_proof(folder)


def test_an_evaluation_may_hold_a_report_without_answers_in_a_folder_of_its_own(tmp_path: Path) -> None:
    """The report that can be published. No other folder, and nothing that is no file in it."""
    trained = build_published.trained(tmp_path)
    planned, volumes = plan(trained), tmp_path / "volumes"
    candidate = Candidate(planned.adapter.digest, planned.evaluation.digest)

    def report(folder: str) -> build_published.Change:
        def change(draft: Path) -> None:
            (draft / folder).mkdir(parents=True)
            (draft / folder / "report.md").write_text("# passed")
        return change

    for folder in ("without-answers/more", "other"):
        found = build_published.evaluation(volumes, trained, report(folder))
        with pytest.raises(Refused, match="is not a plain file"):
            verification.check_gate(candidate, NAME, volumes)
        shutil.rmtree(found.path)
    build_published.evaluation(volumes, trained, report(WITHOUT_ANSWERS))
    verification.check_gate(candidate, NAME, volumes)
