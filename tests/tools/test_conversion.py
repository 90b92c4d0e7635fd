"""Promises of `new --from`: an overlay of the earlier form becomes one of today that desires the same artifacts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from jobs.core import environment, pipeline
from jobs.core.errors import UserError
from jobs.core.pipeline import Pipeline
from jobs.core.plan import plan
from jobs.tools import check, conversion, new
from tests import build_overlay, build_pipeline, manifests

OLD = Path(__file__).with_name("earlier_form")  # overlays/kind as it was in version 0.1
PIN = "b65b6e291901ad06dec8d91ce892611248ec34b72caaf5ee4c2008dd5bad5ad2"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """An overlay of the earlier form, in a checkout of today."""
    data = manifests.copy(tmp_path) / "adapters/seville-hotels/dataset.jsonl"
    overlay = tmp_path / "overlays" / "old"
    shutil.copytree(OLD, overlay)
    shutil.copy(data, overlay / "dataset.jsonl")
    return overlay


def convert(overlay: Path, name: str = "seville-hotels") -> None:
    new.run(overlay, name, old=overlay / "pipeline.yaml")


def test_an_overlay_of_the_earlier_form_becomes_one_that_check_takes(old: Path) -> None:
    values = yaml.safe_load((old / "pipeline.yaml").read_text())
    convert(old)
    check.run(old)
    assert sorted(path.name for path in old.iterdir()) == [
        "adapters", "environment.yaml", "kustomization.yaml", "one-thread.yaml", "vllm-cpu.yaml"]
    shared = environment.Environment(**{key: values.pop(key) for key in list(values)
                                        if key in environment.Environment.model_fields})
    assert plan(pipeline.load(old / "adapters/seville-hotels").pipeline) == plan(
        Pipeline(**values, environment=shared)), "the same artifacts: nothing runs again that has run"


def test_comments_stay_where_they_belong(old: Path, unrendered: None) -> None:
    before = (old / "pipeline.yaml").read_text().splitlines()
    convert(old)
    shared = (old / "environment.yaml").read_text()
    own = (old / "adapters/seville-hotels/pipeline.yaml").read_text()
    assert [line for line in before if line not in (shared + own).splitlines()] == [
        "# The models, the data, the training, and the gate that the result must pass: the one file to edit.",
        "#   python -m jobs check overlays/kind    validates it, without network or cluster",
        "#   python -m jobs pin overlays/kind      fills in the pins after a source or the data changed"]
    for text in ("# The base model's own", "#   serving: {mode: merged}", "# A larger model"):
        assert text in shared and text not in own
    for text in ("# The private data", "# at most half the base model's", "# The model name that clients send."):
        assert text in own and text not in shared


def test_the_kustomization_changes_in_four_places_only(old: Path, unrendered: None) -> None:
    before = (old / "kustomization.yaml").read_text().splitlines()
    convert(old)
    after = (old / "kustomization.yaml").read_text().splitlines()
    assert [line for line in before if line not in after] == [
        "- ../../base", "- name: pipeline  # for the Jobs", "  files: [pipeline.yaml, dataset.jsonl]",
        "- name: serving-pipeline  # for serving: unhashed, so that a change reaches the running pod instead of "
        "restarting it", "  files: [pipeline.yaml]"]
    assert [line for line in after if line not in before] == [
        "- ../../base/environment", "- adapters/seville-hotels", "- name: environment  # for the Jobs",
        "  files: [environment.yaml]",
        "- name: serving-pipelines  # for serving: unhashed, so that a change reaches the running pod instead of "
        "restarting it", "  files: [environment.yaml, seville-hotels.yaml=adapters/seville-hotels/pipeline.yaml]"]


def test_a_second_file_joins_the_environment_that_is_there(old: Path, tmp_path: Path, unrendered: None) -> None:
    other = tmp_path / "elsewhere"
    other.mkdir()
    shutil.copy(old / "dataset.jsonl", other / "records.jsonl")
    text = (old / "pipeline.yaml").read_text().replace("adapter: seville-hotels", "adapter: boats")
    (other / "pipeline.yaml").write_text(text.replace("file:dataset.jsonl", "file:records.jsonl"))
    convert(old)
    before, shared = build_overlay.contents(other), (old / "environment.yaml").read_bytes()
    new.run(old, "boats", old=other / "pipeline.yaml")
    assert build_overlay.contents(other) == before, "what is elsewhere stays"
    assert (old / "environment.yaml").read_bytes() == shared
    assert (old / "adapters/boats/records.jsonl").is_file()
    assert pipeline.load(old / "adapters/boats").pipeline.adapter == "boats"


def test_another_environment_is_an_error_that_shows_what_differs(old: Path, tmp_path: Path, unrendered: None) -> None:
    text = (old / "pipeline.yaml").read_text()
    convert(old)
    other = tmp_path / "other.yaml"
    shutil.copy(old / "adapters/seville-hotels/dataset.jsonl", tmp_path)
    text = text.replace("adapter: seville-hotels", "adapter: boats").replace("builtin:tiny-reference", "builtin:tiny")
    other.write_text(text + "serving: {max_lora_rank: 32}\nretention: {keep: 2}\n")
    before = build_overlay.contents(old)
    with pytest.raises(UserError) as raised:
        new.run(old, "boats", old=other)
    assert ("environment.yaml: reference_model.source: builtin:tiny there, builtin:tiny-reference here; "
            "serving.max_lora_rank: 32 there, 64 here; retention.keep: 2 there, 5 here. Change") in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1
    assert build_overlay.contents(old) == before


def replace(file: Path, before: str, after: str) -> None:
    assert before in file.read_text()
    file.write_text(file.read_text().replace(before, after))


@pytest.mark.usefixtures("unrendered")
@pytest.mark.parametrize(("spoil", "message"), [
    (lambda o: (o / "pipeline.yaml").unlink(), "pipeline.yaml: no such file"),
    (lambda o: (o / "pipeline.yaml").write_bytes(b"\xff"), "pipeline.yaml: not UTF-8"),
    (lambda o: (o / "pipeline.yaml").write_text("[]"), "must hold a mapping"),
    (lambda o: replace(o / "pipeline.yaml", "epochs: 20", "epoch: 20"),
     r"pipeline.yaml:\d+: training.epoch: unknown key"),
    (lambda o: replace(o / "pipeline.yaml", "source: builtin:tiny\n", "source: builtin:no\n"), r"base_model"),
    (lambda o: replace(o / "pipeline.yaml", "r: 16", "r: 128"), "above serving.max_lora_rank"),
    (lambda o: replace(o / "pipeline.yaml", "adapter: seville-hotels", "adapter: boats"),
     r"pipeline.yaml:\d+: the adapter's name is boats. Run: python -m jobs new .* boats --from"),
    (lambda o: (o / "dataset.jsonl").unlink(), "dataset: .*dataset.jsonl does not exist"),
    (lambda o: build_pipeline.write_yaml(o / "pipeline.yaml", build_pipeline.pipeline()),
     "is not of the earlier form"),
    (lambda o: replace(o / "kustomization.yaml", "- ../../base\n", "- ../kind\n"),
     "cannot be converted by itself. Change it"),
    (lambda o: replace(o / "kustomization.yaml", "- name: serving-", "- behavior: merge\n  name: serving-"),
     "see overlays/kind-smollm2/kustomization.yaml. Then run this again"),
    (lambda o: (o / "adapters/seville-hotels").mkdir(parents=True), "exists already"),
])
def test_nothing_changes_where_it_cannot_be_converted(
        old: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(old)
    before = build_overlay.contents(old)
    with pytest.raises(UserError, match=message) as raised:
        convert(old)
    assert len(str(raised.value).splitlines()) == 1
    assert build_overlay.contents(old) == before


@pytest.mark.usefixtures("unrendered")
@pytest.mark.parametrize("step", ["_verify", "_report_nothing", "remove"])
def test_nothing_changes_when_it_is_interrupted(old: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    before = build_overlay.contents(old)
    monkeypatch.setattr(conversion if step == "remove" else new, step if step != "_report_nothing" else "_write", fail)
    with pytest.raises(KeyboardInterrupt):
        convert(old)
    assert build_overlay.contents(old) == before


def test_data_and_from_exclude_each_other(old: Path) -> None:
    with pytest.raises(UserError, match="--data and --from exclude each other"):
        new.run(old, "seville-hotels", old=old / "pipeline.yaml", data=old / "dataset.jsonl")


@pytest.mark.parametrize("text", [
    "{adapter: a, base_model: {source: builtin:tiny}}\n",
    "adapter: &a a\nbase_model: {source: *a}\n",
    "adapter: a\nbase_model:\n  source: 'x\n\n    # no comment\n\n    y'\n",
    "---\nadapter: a\nbase_model: {source: b}\n...\n",
])
def test_any_layout_is_divided(text: str) -> None:
    values = yaml.safe_load(text)
    parts = conversion.divided(text, values)
    assert yaml.safe_load(parts[False]) == {"adapter": values["adapter"]}
    assert yaml.safe_load(parts[True]) == {"base_model": values["base_model"]}


@pytest.mark.usefixtures("unrendered")
def test_linked_and_other_data_moves_into_the_adapters_folder(old: Path) -> None:
    """Sentences with judgements beside the file too; a link becomes a file, since the folder must hold its data."""
    (old / "dataset.jsonl").rename(old.parent / "shared.jsonl")
    (old / "dataset.jsonl").symlink_to("../shared.jsonl")
    (old / "cola.jsonl").write_text('{"text": "The cook reads.", "acceptable": true}\n')
    replace(old / "pipeline.yaml", "  max_new_tokens",
            f"  acceptability: {{source: file:./cola.jsonl, sha256: {PIN}}}\n  max_new_tokens")
    convert(old)
    place = old / "adapters/seville-hotels"
    assert (place / "dataset.jsonl").is_file() and not (place / "dataset.jsonl").is_symlink()
    assert not os.path.lexists(old / "dataset.jsonl") and (old.parent / "shared.jsonl").is_file()
    assert pipeline.load(place).pipeline.evaluation.acceptability.source == "file:cola.jsonl"
    assert "files: [pipeline.yaml, dataset.jsonl, cola.jsonl]" in (place / "kustomization.yaml").read_text()
