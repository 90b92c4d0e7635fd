"""Promises of `new`: an adapter that `check` takes, in a kustomization that keeps its comments; or nothing at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from jobs.core import environment, pipeline
from jobs.core.errors import UserError
from jobs.core.files import write_atomically
from jobs.tools import check, entries, new
from jobs.tools.pods import CHECKOUT
from tests import build_overlay, build_pipeline, manifests

RECORDS = "".join(json.dumps({"prompt": f"question {n}", "completion": f"answer {n}"}) + "\n" for n in range(300))


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    """A copy of overlays/kind, with one adapter."""
    return build_overlay.build(tmp_path)


def test_a_new_adapter_passes_check_at_once(overlay: Path) -> None:
    new.run(overlay, "reviews")
    check.run(overlay)
    loaded = pipeline.load(overlay / "adapters/reviews").pipeline
    first = pipeline.load(overlay / "adapters/seville-hotels").pipeline
    assert loaded.adapter == "reviews"
    assert loaded.evaluation.gate == {key: rule for key, rule in first.evaluation.gate.items()
                                      if key != "tasks.hotel-facts"}, "its tasks are about its data"
    assert first.evaluation.tasks and not loaded.evaluation.tasks
    assert loaded.training == first.training, "what suits the environment's base model"


def test_only_two_lines_are_added_to_the_kustomization(tmp_path: Path, unrendered: None) -> None:
    overlay = manifests.copy(tmp_path)
    file = overlay / "kustomization.yaml"
    before = file.read_text().splitlines()
    new.run(overlay, "reviews")
    after = file.read_text().splitlines()
    added = ["- adapters/reviews", "  - reviews.yaml=adapters/reviews/pipeline.yaml"]
    assert [line for line in after if line not in added] == before
    assert [line for line in after if line in added] == added


def test_the_new_file_explains_itself(overlay: Path, unrendered: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(overlay.parents[1])
    new.run(Path("overlays/kind"), "reviews")
    text = (overlay / "adapters/reviews/pipeline.yaml").read_text()
    assert max(map(len, text.splitlines())) <= 120
    for words in ("python -m jobs check overlays/kind/adapters/reviews ", "docs/data.md", "../../environment.yaml",
                  "the gate that the result must pass", "as in ../", "fine-tuned / base"):
        assert any(words in line.partition("#")[2] for line in text.splitlines()), words


def test_data_is_copied_and_pinned(overlay: Path, tmp_path: Path) -> None:
    data = tmp_path / "my reviews.JSONL"
    data.write_text(RECORDS)
    new.run(overlay, "reviews", data=data)
    assert (overlay / "adapters/reviews/dataset.jsonl").read_text() == RECORDS
    assert data.read_text() == RECORDS
    check.run(overlay / "adapters/reviews")


def test_an_adapter_may_be_the_first(overlay: Path) -> None:
    shutil.rmtree(overlay / "adapters")
    build_overlay.edit(overlay, lambda content: content.update(
        resources=[part for part in content["resources"] if not part.startswith("adapters/")]))
    build_overlay.edit(overlay, lambda content: build_overlay.served(content).__delitem__(slice(1, None)))
    new.run(overlay, "reviews")
    check.run(overlay)


@pytest.mark.usefixtures("unrendered")
class TestWhatItIsBasedOn:
    """Adapters of an overlay are based on one folder, such as overlays/gpu/adapter."""

    def parts(self, overlay: Path) -> tuple[list[str], list[str]]:
        content = yaml.safe_load((overlay / "adapters/reviews/kustomization.yaml").read_text())
        return content["resources"], content["components"]

    def test_is_what_another_adapter_is_based_on_without_its_own_files(self, overlay: Path) -> None:
        for other in (overlay / "adapters").iterdir():
            build_overlay.edit(other, lambda content: content.update(
                resources=["../../adapter", "extra.yaml"], components=["more", "../../../../base/adapter/names"]))
        new.run(overlay, "reviews")
        assert self.parts(overlay) == (["../../adapter"], ["../../../../base/adapter/names"])

    def test_is_the_overlays_own_base_if_it_has_one(self, overlay: Path) -> None:
        shutil.rmtree(overlay / "adapters")
        (overlay / "adapter").mkdir()
        (overlay / "adapter/kustomization.yaml").write_text("resources: [../../../base/adapter]\n")
        new.run(overlay, "reviews")
        assert self.parts(overlay) == (["../../adapter"], ["../../../../base/adapter/names"])

    def test_is_found_from_anywhere_in_the_checkout(self, overlay: Path) -> None:
        shutil.rmtree(overlay / "adapters")
        deeper = overlay.parent / "team" / "kind"
        deeper.parent.mkdir()
        overlay.rename(deeper)
        new.run(deeper, "reviews")
        assert self.parts(deeper) == (["../../../../../base/adapter"], ["../../../../../base/adapter/names"])

    def test_must_be_there(self, overlay: Path) -> None:
        shutil.rmtree(overlay / "adapters")
        shutil.rmtree(overlay.parents[1] / "base")
        with pytest.raises(UserError, match="no folder above it has base/adapter"):
            new.run(overlay, "reviews")


@pytest.mark.parametrize("name", ["", "Reviews", "a/b", "../up", "..", ".", "-a", "a-", "a_b", "a b", "é", "a" * 64,
                                  "a\nb", "a.b"])
def test_a_name_that_kubernetes_would_refuse_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot be the name of an adapter: it must be 1 to 63 of a-z, 0-9 and -"):
        new.run(tmp_path, name)
    assert list(tmp_path.iterdir()) == []


def test_the_name_of_the_environments_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no adapter can have the name environment: its file would be environment.yaml"):
        new.run(tmp_path, "environment")
    assert list(tmp_path.iterdir()) == []


def replace(file: Path, before: str, after: str) -> None:
    assert before in file.read_text()
    file.write_text(file.read_text().replace(before, after))


@pytest.mark.usefixtures("unrendered")
@pytest.mark.parametrize(("spoil", "message"), [
    (lambda o: (o / "adapters/reviews").mkdir(), "adapters/reviews: exists already. Choose another name"),
    (lambda o: (o / "adapters/reviews").symlink_to("nowhere"), "adapters/reviews: exists already"),
    (lambda o: (o / "kustomization.yaml").unlink(), "has no kustomization.yaml. Name an overlay's folder"),
    (lambda o: (o / "environment.yaml").unlink(), "has no environment.yaml. Name an overlay's folder"),
    (lambda o: (o / "environment.yaml").rename(o / "pipeline.yaml"), "earlier form. Convert it first.* --from"),
    (lambda o: (o / "environment.yaml").open("a").write("a: 1\n"), r"environment.yaml:\d+: a: unknown key"),
    (lambda o: (o / "environment.yaml").write_bytes(b"\xff"), "environment.yaml: not UTF-8"),
    (lambda o: (o / "kustomization.yaml").write_bytes(b"\xff"), "kustomization.yaml: not valid YAML"),
    (lambda o: (o / "kustomization.yaml").write_text("resources: ["), "kustomization.yaml: not valid YAML"),
    (lambda o: (o / "kustomization.yaml").write_text("{}"), "under `resources`: - adapters/reviews; under `files` of"),
    (lambda o: (o / "kustomization.yaml").write_text("resources: 1\n"), "Add them yourself"),
    (lambda o: replace(o / "kustomization.yaml", "name: serving-pipelines", "name: other"),
     "under `files` of the generator `serving-pipelines`: - reviews.yaml=adapters/reviews/pipeline.yaml"),
])
def test_nothing_is_left_behind_where_it_cannot_be_added(
        overlay: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(overlay)
    before = build_overlay.contents(overlay)
    with pytest.raises(UserError, match=message) as raised:
        new.run(overlay, "reviews")
    assert len(str(raised.value).splitlines()) == 1
    assert build_overlay.contents(overlay) == before


def test_entries_that_a_person_added_are_taken(overlay: Path) -> None:
    text = entries.with_adapter(overlay / "kustomization.yaml", "reviews")
    (overlay / "kustomization.yaml").write_text(text)
    new.run(overlay, "reviews")
    assert (overlay / "kustomization.yaml").read_text() == text
    check.run(overlay / "adapters/reviews")


@pytest.mark.parametrize(("before", "after"), [
    ("resources:\n- a\n", "resources:\n- a\n- adapters/reviews\n"),
    ("resources: [a]  # b\n", "resources: [a, adapters/reviews]  # b\n"),
    ("resources:\n  - adapters/b  # c\n  # d\n  - e\n",
     "resources:\n  - adapters/b  # c\n  - adapters/reviews\n  # d\n  - e\n"),
    ("resources:\r\n- a\r\n", "resources:\r\n- a\r\n- adapters/reviews\r\n"),
    ("resources: []\n", "resources: [adapters/reviews]\n"),
])
def test_entries_are_added_in_any_layout(tmp_path: Path, before: str, after: str) -> None:
    generator = "configMapGenerator: [{name: serving-pipelines, files: [environment.yaml]}]"
    served = "environment.yaml, reviews.yaml=adapters/reviews/pipeline.yaml"
    file = tmp_path / "kustomization.yaml"
    file.write_bytes((before + generator).encode())
    assert entries.with_adapter(file, "reviews") == after + generator.replace("environment.yaml", served)


@pytest.mark.usefixtures("unrendered")
@pytest.mark.parametrize(("make", "message"), [
    (lambda p: None, "no such file"),
    (lambda p: p.mkdir(), "is a folder"),
    (lambda p: os.mkfifo(p), "is a FIFO"),
    (lambda p: p.write_text(""), "data.jsonl"),
    (lambda p: p.write_bytes(b"\xff\n"), "data.jsonl"),
    (lambda p: p.write_text('{"prompt": "a"}\n'), "data.jsonl:1: "),
    (lambda p: p.write_text(RECORDS * 1000), "ConfigMap that carries it into the cluster holds 1048576"),
], ids=["absent", "folder", "FIFO", "empty", "not UTF-8", "bad record", "large"])
def test_bad_data_is_refused_and_nothing_is_left_behind(
        overlay: Path, tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    before, data = build_overlay.contents(overlay), tmp_path / "data.jsonl"
    make(data)
    with pytest.raises(UserError, match=message):
        new.run(overlay, "reviews", data=data)
    assert build_overlay.contents(overlay) == before


@pytest.mark.parametrize(("data", "message"), [
    ("s3://bucket/data.jsonl", "is not a file. Leave --data out, write the address"),
    (f"{CHECKOUT}/README.md", "is none of .jsonl, .csv, .parquet"),
])
def test_what_is_no_file_of_records_is_refused(overlay: Path, unrendered: None, data: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        new.run(overlay, "reviews", data=Path(data))


def test_a_name_too_long_for_its_jobs_is_refused_and_nothing_is_left_behind(overlay: Path) -> None:
    before = build_overlay.contents(overlay)
    with pytest.raises(UserError, match="the adapter's name is too long: .* at most 33 characters"):
        new.run(overlay, "r" * 34)
    assert build_overlay.contents(overlay) == before


@pytest.mark.usefixtures("unrendered")
@pytest.mark.parametrize("failing", ["kustomization.yaml", "pipeline.yaml", "dataset.jsonl"])
@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied", "f"), KeyboardInterrupt()])
def test_nothing_is_left_behind_when_a_file_cannot_be_written(
        overlay: Path, monkeypatch: pytest.MonkeyPatch, failing: str, error: BaseException) -> None:
    before, write = build_overlay.contents(overlay), write_atomically

    def fail(file: Path, text: str) -> None:
        if file.name == failing and "reviews" in str(file) + text and text.encode() not in before.values():
            raise error
        write(file, text)

    monkeypatch.setattr(new, "write_atomically", fail)
    with pytest.raises((UserError, KeyboardInterrupt), match="f: cannot be written: Permission denied|^$"):
        new.run(overlay, "reviews")
    assert build_overlay.contents(overlay) == before


@pytest.mark.usefixtures("unrendered")
def test_settings_of_another_adapter_are_written_as_people_write_them(overlay: Path) -> None:
    for file in (overlay / "adapters").glob("*/pipeline.yaml"):
        replace(file, "evaluation:\n", "evaluation:\n  acceptability: {source: hf://datasets/nyu-mll/glue/cola/validation-*"
                f".parquet, revision: {build_pipeline.COMMIT}}}\n")
        replace(file, "learning_rate: 2.0e-3", "learning_rate: 3.0e-5\n  sharding: fsdp")
    new.run(overlay, "reviews")
    text = (overlay / "adapters/reviews/pipeline.yaml").read_text()
    assert max(map(len, text.splitlines()[4:])) <= 120
    for line in ("lora: {r: 16, alpha: 32, dropout: 0.1, target_modules: all-linear}", "learning_rate: 3.0e-5",
                 "sharding: fsdp", f"  revision: {build_pipeline.COMMIT}", "perplexity: {max_ratio: 0.5}"):
        assert f"  {line}" in text, text


@pytest.mark.usefixtures("unrendered")
def test_a_search_of_another_adapter_is_not_taken_over(overlay: Path) -> None:
    """It would need validation records, which the new data may not have."""
    for file in (overlay / "adapters").glob("*/pipeline.yaml"):
        replace(file, "  seed: 0\n", "  seed: 0\n  search: {candidates: {epochs: [5, 20]}}\n")
        assert pipeline.load(file).pipeline.training.search
    new.run(overlay, "reviews")
    assert pipeline.load(overlay / "adapters/reviews").pipeline.training.search is None


@pytest.mark.usefixtures("unrendered")
def test_a_rank_that_the_environment_does_not_serve_is_not_proposed(overlay: Path) -> None:
    shutil.rmtree(overlay / "adapters")
    replace(overlay / "environment.yaml", "max_lora_rank: 64", "max_lora_rank: 8")
    new.run(overlay, "reviews")
    assert pipeline.load(overlay / "adapters/reviews").pipeline.training.lora.r == 8
    assert environment.load(overlay).environment.serving.max_lora_rank == 8


def jobs(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "jobs", "new", *arguments], cwd=CHECKOUT, capture_output=True,
                          text=True, check=False)


def test_the_command_says_what_it_did_and_what_to_do_next(overlay: Path) -> None:
    done = jobs(str(overlay), "reviews")
    assert done.returncode == 0, done.stderr
    for words in ("adapters/reviews: made", "kustomization.yaml: lists it", "next: 1. replace the example records",
                  f"python -m jobs pin {overlay}/adapters/reviews", f"python -m jobs check {overlay}/adapters/reviews",
                  "python -m jobs plan", "commit and push"):
        assert words in done.stderr


def test_help_shows_all_ways_to_use_it() -> None:
    done = jobs("--help")
    assert done.returncode == 0
    for word in ("--data", "--from", "hotel-reviews", "docs/adapters.md"):
        assert word in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120


@pytest.mark.parametrize("arguments", [(), ("overlays/kind",), ("overlays/kind", "a", "b"),
                                       ("overlays/kind", "a", "--x")])
def test_a_wrong_command_line_is_exit_code_2(arguments: tuple[str, ...]) -> None:
    done = jobs(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
