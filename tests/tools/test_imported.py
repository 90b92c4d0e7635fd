"""Promises of the tools about imported adapters: `new --import`, `pin`, `check` and `plan`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.core import imported
from jobs.core.artifacts import publish
from jobs.core.errors import UserError
from jobs.core.imported import ImportedAdapter
from jobs.core.plan import plan_import
from jobs.relocation.sources import oci
from jobs.tools import changes, changes_report, check, kustomization, new, overlay, pin
from jobs.tools.changes import Changes, Side
from tests import build_published, registry_server
from tests.build_pipeline import SHA256, build, environment
from tests.manifests import copy, render

NAME = "seville-hotels"
SOURCE = "oci://registry.example.com/team/adapters/seville-hotels"
GATE = {"gate": {"perplexity": {"max_ratio": 0.9}}}


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[registry_server.Registry]:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    oci._repository.cache_clear()
    with registry_server.serve() as server:
        yield server


@pytest.fixture
def serving(tmp_path: Path) -> Path:
    """A copy of overlays/kind-serving."""
    return copy(tmp_path / "checkout").parent / "kind-serving"


def test_a_new_import_is_pinned_by_its_tag_and_passes_check(
        registry: registry_server.Registry, serving: Path, tmp_path: Path) -> None:
    trained = build_published.trained(tmp_path / "there", adapter="reviews")
    published = build_published.publish(
        registry.host, build_published.files(tmp_path / "there" / "volumes", trained), "reviews")
    new.run(serving, "reviews", source=published.source)
    folder = serving / "adapters" / "reviews"
    with pytest.raises(UserError, match="source: oci://.* is not pinned: `sha256` is missing. Run: "):
        check.run(folder)
    before = (folder / "pipeline.yaml").read_text()
    pin.run(folder)
    assert (folder / "pipeline.yaml").read_text() == f"{before}sha256: {published.sha256}\n"
    check.run(folder)


def test_pin_moves_to_what_the_tag_names_now(registry: registry_server.Registry, serving: Path) -> None:
    file = serving / "adapters" / NAME / "pipeline.yaml"
    before = file.read_text()
    registry.push("team/adapters/seville-hotels", {"a": b"1"}, "stable")
    digest = registry.push("team/adapters/seville-hotels", {"a": b"2"}, "stable").removeprefix("sha256:")
    tagged = before.replace(SOURCE, f"oci://{registry.host}/team/adapters/seville-hotels:stable")
    file.write_text(tagged)
    pin.run(file.parent, update=True)
    assert file.read_text() == tagged.replace("0123456789abcdef" * 4, digest)


def test_pin_leaves_a_digest_without_a_tag_where_it_is(serving: Path) -> None:
    file = serving / "adapters" / NAME / "pipeline.yaml"
    before = file.read_text()
    pin.run(file.parent, update=True)  # the example's registry does not exist
    assert file.read_text() == before


@pytest.mark.parametrize(("options", "message"), [
    ({"source": "oci://UPPER/x y"}, "--import: oci://UPPER/x y must be oci://REGISTRY/NAME:TAG"),
    ({"source": "https://example.com"}, "--import: https://example.com is not a source; allowed: "),
    ({"source": SOURCE, "data": Path("x.jsonl")}, "leave --data and --from out"),
])
def test_an_import_that_cannot_be_added_changes_nothing(serving: Path, options: dict[str, Any], message: str) -> None:
    before = sorted(serving.rglob("*"))
    with pytest.raises(UserError, match=message):
        new.run(serving, "reviews", **options)
    assert sorted(serving.rglob("*")) == before


def test_a_trained_adapter_beside_an_imported_one_is_based_on_what_trains(serving: Path) -> None:
    new.run(serving, "reviews")
    text = (serving / "adapters" / "reviews" / "kustomization.yaml").read_text()
    assert "- ../../../../base/adapter\n" in text
    assert "imported-adapter" not in text
    for path in (serving, serving / "adapters" / "reviews"):
        with pytest.raises(UserError) as refused:
            check.run(path)
        assert str(refused.value) == (
            f"{serving}/adapters/reviews: it is trained here, and the component base/serving-only removes the volumes "
            "for that: leave it out of the overlay's kustomization.yaml")
    file = serving / "kustomization.yaml"
    file.write_text(file.read_text().replace("- ../../base/serving-only\n", ""))
    check.run(serving / "adapters" / "reviews")


def test_check_finds_an_import_that_the_network_policies_keep_out(serving: Path) -> None:
    file = serving / "kustomization.yaml"
    file.write_text(file.read_text().replace("- ../../base/egress  # the registry\n", ""))
    with pytest.raises(UserError, match="let adapter-relocation of seville-hotels reach nothing, but it"):
        check.run(serving)


def test_check_looks_at_the_data_of_an_import_that_is_evaluated_here(serving: Path) -> None:
    folder = serving / "adapters" / NAME
    (folder / "dataset.jsonl").write_text('{"text": "one record"}\n')
    with (folder / "pipeline.yaml").open("a") as file:
        file.write(f"dataset: {{source: 'file:dataset.jsonl', sha256: {SHA256}}}\n"
                   "evaluation: {gate: {perplexity: {max_ratio: 0.9}}}\n")
    with pytest.raises(UserError, match="dataset.jsonl: has sha256"):
        check.run(folder)


EVALUATED = ("# - ../../../../base/imported-adapter/evaluated", "- ../../../../base/imported-adapter/evaluated")
DATA = f"dataset: {{source: 'https://example.com/x.jsonl', sha256: {SHA256}}}\nevaluation: {json.dumps(GATE)}\n"


@pytest.mark.parametrize(("edits", "more", "message"), [
    ([("base/imported-adapter\n", "base/adapter\n")], "", "makes the Jobs of an adapter that is trained here"),
    ([EVALUATED], "", "has no `dataset` and `evaluation`"),
    ([], DATA, "no Job evaluates the adapter, so it would never be promoted"),
    ([EVALUATED], DATA, "the component base/serving-only removes the volumes for that"),
], ids=["trains", "evaluates for nothing", "does not evaluate", "no volumes"])
def test_check_finds_jobs_that_do_not_do_what_the_file_says(
        serving: Path, edits: list[tuple[str, str]], more: str, message: str) -> None:
    folder = serving / "adapters" / NAME
    text = (folder / "kustomization.yaml").read_text()
    for before, after in edits:
        assert before in text
        text = text.replace(before, after)
    (folder / "kustomization.yaml").write_text(text)
    with (folder / "pipeline.yaml").open("a") as file:
        file.write(more)
    (problem,) = wrong_jobs(serving)
    assert problem.startswith(f"{folder}: ")
    assert message in problem


def wrong_jobs(serving: Path) -> list[str]:
    return [*kustomization.jobs_of_another_kind(serving, render(serving), overlay.load(serving).adapters)]


def test_check_takes_an_import_that_is_evaluated_here(serving: Path) -> None:
    folder = serving / "adapters" / NAME
    for file, (before, after) in ((folder / "kustomization.yaml", EVALUATED),
                                  (serving / "kustomization.yaml", ("- ../../base/serving-only\n", ""))):
        file.write_text(file.read_text().replace(before, after))
    with (folder / "pipeline.yaml").open("a") as pipeline:
        pipeline.write(DATA)
    assert wrong_jobs(serving) == []


def test_check_finds_a_trained_adapter_with_the_job_of_an_imported_one(serving: Path) -> None:
    new.run(serving, "reviews")
    file = serving / "adapters" / "reviews" / "kustomization.yaml"
    file.write_text(file.read_text().replace("base/adapter\n", "base/imported-adapter\n"))
    with pytest.raises(UserError, match="pipeline.yaml has no `source`"):
        check.run(file.parent)


# --- plan -------------------------------------------------------------------------------------------------------------


def load(**values: Any) -> ImportedAdapter:
    shared = build(**{key: values.pop(key) for key in [*values] if key in environment()}).environment
    return ImportedAdapter(**{"adapter": NAME, "source": SOURCE, "sha256": SHA256, **values, "environment": shared})


def compared(before: imported.Adapter | None, after: imported.Adapter, volumes: Path | None = None) -> Changes:
    old = Side(before.environment, {NAME: before}, []) if before else None
    return changes.compare(old, Side(after.environment, {NAME: after}, []), volumes)


def table(found: Changes) -> str:
    report = changes_report.Report(Path("overlay"), None, [], found)
    changes_report.markdown(report)
    changes_report.as_json(report)
    return changes_report.table(report)


def test_a_promotion_is_one_digest_and_the_plan_shows_it() -> None:
    found = compared(load(), load(sha256="0" * 64))
    (artifact,) = found.adapters[NAME].artifacts
    assert (artifact.name, artifact.stage, artifact.new) == ("imported-adapter", "relocate adapter", True)
    assert artifact.reasons == (f"sha256: {SHA256[:12]}… -> {'0' * 12}…",) or "sha256: " in artifact.reasons[0]
    assert "1 adapter imported; " in table(found)
    assert "the promoted adapter is served until the new one is fetched and verified" in table(found)


def test_an_import_that_stays_while_the_base_model_changes_is_noted() -> None:
    assert compared(load(), load()).notes == []
    (note,) = compared(load(), load(base_model={"source": "builtin:tiny"})).notes
    assert "seville-hotels is imported and stays the same, and base_model and tokenizer of the environment" in note
    assert not compared(load(), load(base_model={"source": "builtin:tiny"}, sha256="0" * 64)).notes


def test_a_mirror_changes_nothing() -> None:
    found = compared(load(), load(source="oci://mirror.example.com/x"))
    assert [each.new for each in found.adapters[NAME].artifacts] == [False]
    assert "1 adapter unchanged; " in table(found)


def test_a_revert_is_served_at_once(tmp_path: Path) -> None:
    after = load()
    publish(plan_import(after).imported_adapter, tmp_path, lambda draft: None, keep=9)
    found = compared(load(sha256="0" * 64), after, tmp_path)
    assert found.adapters[NAME].service == "at once"
    assert "1 adapter restored; " in table(found)


def test_an_import_that_is_evaluated_here_shows_what_is_measured_again() -> None:
    dataset = {"source": "file:dataset.jsonl", "sha256": SHA256}
    before = load(dataset=dataset, evaluation=GATE)
    found = compared(before, load(dataset=dataset, evaluation={"gate": {"perplexity": {"max_ratio": 0.8}}}))
    assert {each.name for each in found.adapters[NAME].artifacts if each.new} == {"evaluation"}
    assert "1 adapter evaluated again; " in table(found)
    assert "by the import" in table(found)  # which adapter it is, only its relocation finds out
    found = compared(before, load(dataset=dataset, evaluation=GATE, sha256="0" * 64))
    assert {each.name for each in found.adapters[NAME].artifacts if each.new} == {
        "imported-adapter", "adapter-scores", "evaluation"}


def test_a_trained_adapter_that_is_imported_from_now_on_is_another_thing() -> None:
    for before, after in ((build(adapter=NAME), load()), (load(), build(adapter=NAME))):
        found = compared(before, after)
        assert found.adapters[NAME].status == "changed"
        table(found)


def test_the_overlay_has_both_kinds(serving: Path) -> None:
    new.run(serving, "reviews")
    loaded = overlay.load(serving)
    assert list(overlay.trained(loaded.adapters)) == ["reviews"]
    assert list(loaded.adapters) == ["reviews", NAME]
