"""Promises of the check of adapters' names and entries: each disagreement is one line that says what to write."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.core.errors import UserError
from jobs.tools import check, entries, overlay
from tests import build_overlay
from tests.build_overlay import served


def problems(folder: Path) -> list[tuple[str | None, str]]:
    _, adapters, _ = overlay.read(overlay.find(folder))
    return [(problem.adapter, problem.message) for problem in entries.problems(folder, adapters)]


def replace(file: Path, before: str, after: str) -> None:
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after))


def drop_data(o: Path) -> None:
    replace(o / "adapters/boats/kustomization.yaml", "pipeline.yaml, dataset.jsonl", "pipeline.yaml")


def test_an_overlay_whose_names_agree_has_no_problems(tmp_path: Path) -> None:
    assert problems(build_overlay.build(tmp_path, "boats")) == []


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda o: build_overlay.edit(o, lambda c: c["resources"].remove("adapters/boats")),
     "`resources` does not list adapters/boats, so its Jobs would not run. Add: - adapters/boats"),
    (lambda o: build_overlay.edit(o, lambda c: served(c).remove("boats.yaml=adapters/boats/pipeline.yaml")),
     "has no file of adapters/boats, so it would not be served. Add: - boats.yaml=adapters/boats/pipeline.yaml"),
    (lambda o: shutil.rmtree(o / "adapters/boats"), "lists adapters/boats, which does not exist."),
    (lambda o: (o / "adapters/boats/pipeline.yaml").unlink(), "lists adapters/boats, which has no pipeline.yaml."),
    (lambda o: (o / "adapters/boats/kustomization.yaml").unlink(), "adapters/boats: has no kustomization.yaml"),
    (lambda o: build_overlay.edit(o, lambda c: c["resources"].append("adapters/boats")),
     "lists adapters/boats under `resources` 2 times"),
    (lambda o: build_overlay.edit(o, lambda c: served(c).append("boats.yaml=adapters/boats/pipeline.yaml")),
     "lists adapters/boats in `serving-pipelines` 2 times"),
    (lambda o: build_overlay.edit(o, lambda c: served(c).__setitem__(-1, "ships.yaml=adapters/boats/pipeline.yaml")),
     "has adapters/boats under the key ships.yaml: .* Write: - boats.yaml=adapters/boats/pipeline.yaml"),
    (lambda o: replace(o / "adapters/boats/pipeline.yaml", "adapter: boats", "adapter: seville-hotels"),
     "boats/pipeline.yaml: adapter: seville-hotels is not the name of its folder, boats"),
    (lambda o: replace(o / "adapters/boats/kustomization.yaml", "nameSuffix: -boats", "nameSuffix: -seville-hotels"),
     "nameSuffix is -seville-hotels, .* Write: nameSuffix: -boats"),
    (lambda o: replace(o / "adapters/boats/kustomization.yaml", "nameSuffix: -boats", ""), "nameSuffix is None"),
    (lambda o: replace(o / "adapters/boats/kustomization.yaml", "instance: boats", "instance: ships"),
     "label app.kubernetes.io/instance is ships, but must be the folder's name"),
    (drop_data, "the ConfigMap `pipeline` lacks dataset.jsonl"),
    (lambda o: replace(o / "adapters/boats/kustomization.yaml", "nameSuffix", "\tnameSuffix"), "not valid YAML"),
    (lambda o: (o / "adapters/boats/kustomization.yaml").write_text("[]"), "must hold a mapping"),
    (lambda o: (o / "adapters/boats/kustomization.yaml").write_bytes(b"\xff"), "not valid YAML: .*utf-8"),
])
def test_what_does_not_agree_is_one_line(
        tmp_path: Path, spoil: Callable[[Path], object], message: str) -> None:
    folder = build_overlay.build(tmp_path, "boats")
    spoil(folder)
    ((adapter, line),) = problems(folder)
    assert adapter == "boats"
    with pytest.raises(UserError, match=message):
        raise UserError(line)


@pytest.mark.parametrize("spoil", [
    lambda o: shutil.rmtree(o / "adapters/boats"),
    lambda o: build_overlay.edit(o, lambda c: c["resources"].append("adapters/boats")),
    lambda o: (o / "adapters/boats/kustomization.yaml").write_text("[]"),
], ids=["gone", "twice", "no mapping"])
def test_where_kustomize_renders_nothing_the_others_are_checked(
        tmp_path: Path, spoil: Callable[[Path], object]) -> None:
    folder = build_overlay.build(tmp_path, "boats")
    spoil(folder)
    ((_, line),) = problems(folder)
    with pytest.raises(UserError) as raised:
        check.run(folder)
    assert str(raised.value) == line, "and nothing else is reported"
    check.run(folder / "adapters" / "seville-hotels")


def test_two_folders_with_one_name_are_two_lines(tmp_path: Path) -> None:
    """A copied folder: its names are those of the one that it was copied from."""
    folder = build_overlay.build(tmp_path)
    shutil.copytree(folder / "adapters/seville-hotels", folder / "adapters/copy")
    found = problems(folder)
    assert {adapter for adapter, _ in found} == {"copy"}
    assert len(found) == 5


def test_a_folder_without_a_pipeline_file_that_nothing_lists_is_one_line(tmp_path: Path) -> None:
    """For example because the file's name is pipeline.yml."""
    folder = build_overlay.build(tmp_path, "boats")
    build_overlay.unlist(folder, "boats")
    (folder / "adapters/boats/pipeline.yaml").rename(folder / "adapters/boats/pipeline.yml")
    assert problems(folder) == [("boats", f"{folder}/adapters/boats: has no pipeline.yaml, and no kustomization lists "
                                          "it, so it is not an adapter. Make adapters with `python -m jobs new`, or "
                                          "remove the folder")]


def test_what_adapters_share_may_lie_beside_them(tmp_path: Path) -> None:
    folder = build_overlay.build(tmp_path, "boats")
    common = folder / "adapters/common"
    common.mkdir()
    (common / "kustomization.yaml").write_text("resources: [../../../../base/adapter]\n")
    build_overlay.edit(folder / "adapters/boats", lambda c: c.update(resources=["../common"]))
    (folder / "adapters/notes").mkdir()
    assert problems(folder) == []


@pytest.mark.parametrize(("change", "message"), [
    (lambda c: c.pop("configMapGenerator"), "does not make `environment`, which the Jobs mount"),
    (lambda c: served(c).remove("environment.yaml"), "`serving-pipelines` lacks environment.yaml"),
    (lambda c: c["configMapGenerator"][1].pop("options"), "restarts the server"),
    (lambda c: served(c).append("cpu/one-thread.yaml"), "has one-thread.yaml=one-thread.yaml, which is neither"),
])
def test_what_all_adapters_share_is_checked(
        tmp_path: Path, change: build_overlay.Change, message: str) -> None:
    folder = build_overlay.edit(build_overlay.build(tmp_path), change)
    assert [line for adapter, line in problems(folder) if adapter is None and message in line]


def test_adapters_may_be_listed_in_a_kustomization_of_their_own(tmp_path: Path) -> None:
    folder = build_overlay.build(tmp_path, "boats")
    (folder / "adapters/kustomization.yaml").write_text("resources: [boats, seville-hotels]\n")
    build_overlay.edit(folder, lambda c: c.update(
        resources=[r for r in c["resources"] if not r.startswith("adapters/")] + ["adapters"]))
    check.run(folder)
    (folder / "adapters/kustomization.yaml").write_text("resources: [seville-hotels]\n")
    assert "`resources` does not list adapters/boats" in problems(folder)[0][1]


@pytest.mark.parametrize("text", [
    "resources: 1\n", "resources: [1, {a: b}]\nconfigMapGenerator: [1]\n", "resources: [.]\n",
    "configMapGenerator: [{name: serving-pipelines, files: {a: 1}}]\n",
    "labels: [1, {pairs: 1}]\ncommonLabels: 1\n"])
def test_a_strange_kustomization_is_reported_and_nothing_breaks(tmp_path: Path, text: str) -> None:
    folder = build_overlay.build(tmp_path)
    for place in (folder, folder / "adapters/seville-hotels"):
        before = (place / "kustomization.yaml").read_text()
        (place / "kustomization.yaml").write_text(text)
        with pytest.raises(UserError):
            check.run(folder)
        (place / "kustomization.yaml").write_text(before)
