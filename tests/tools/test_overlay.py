"""Promises of what a path names: an overlay, or one of its adapters."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jobs.core.errors import UserError
from jobs.tools import overlay
from tests import build_pipeline


def built(folder: Path) -> Path:
    build_pipeline.write_yaml(folder / "environment.yaml", build_pipeline.environment())
    for name in ("a", "b"):
        adapter(folder, name)
    return folder


def adapter(folder: Path, name: str) -> Path:
    (folder / "adapters" / name).mkdir(parents=True)
    build_pipeline.write_yaml(folder / "adapters" / name / "pipeline.yaml", build_pipeline.pipeline(adapter=name))
    return folder / "adapters" / name


@pytest.mark.parametrize("path", [".", "environment.yaml"])
def test_an_overlay_is_named_by_its_folder_or_a_file_in_it(tmp_path: Path, path: str) -> None:
    files = overlay.find(built(tmp_path) / path)
    assert (files.folder, files.adapter, [file.parent.name for file in files.pipelines]) == (tmp_path, None, ["a", "b"])
    assert list(overlay.load(tmp_path / path).adapters) == ["a", "b"]


@pytest.mark.parametrize("path", ["adapters/b", "adapters/b/pipeline.yaml"])
def test_an_adapter_is_named_by_its_folder_or_a_file_in_it(tmp_path: Path, path: str) -> None:
    files = overlay.find(built(tmp_path) / path)
    assert (files.folder, files.adapter, [file.parent.name for file in files.pipelines]) == (tmp_path, "b", ["b"])


def test_a_relative_path_names_an_adapter_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(built(tmp_path) / "adapters" / "b")
    files = overlay.find(Path())
    assert files.adapter == "b"
    assert files.folder.resolve() == tmp_path.resolve()
    assert list(overlay.load(Path()).adapters) == ["b"]


def test_an_overlay_may_have_no_adapter_yet(tmp_path: Path) -> None:
    build_pipeline.write_yaml(tmp_path / "environment.yaml", build_pipeline.environment())
    assert overlay.load(tmp_path).adapters == {}


def test_the_two_files_side_by_side_are_an_overlay_of_one_adapter(tmp_path: Path) -> None:
    build_pipeline.write(tmp_path)
    assert overlay.find(tmp_path).adapter is None
    assert len(overlay.load(tmp_path).adapters) == 1


def test_a_file_of_the_old_form_left_in_an_overlay_does_not_hide_its_adapters(tmp_path: Path) -> None:
    (built(tmp_path) / "pipeline.yaml").write_text("base_model: {source: builtin:tiny}\n")
    assert list(overlay.load(tmp_path).adapters) == ["a", "b"]


def test_an_overlay_of_the_old_form_is_one_line_that_says_how_to_convert_it(tmp_path: Path) -> None:
    build_pipeline.write_yaml(tmp_path / "pipeline.yaml", build_pipeline.values())
    with pytest.raises(UserError, match="python -m jobs new .* --from") as raised:
        overlay.load(tmp_path)
    assert len(str(raised.value).splitlines()) == 1


def test_every_problem_of_every_file_is_reported(tmp_path: Path) -> None:
    built(tmp_path)
    for name, text in (("a", "[" * 5000), ("b", "adapter: b\n")):
        (tmp_path / "adapters" / name / "pipeline.yaml").write_text(text)
    (tmp_path / "environment.yaml").write_bytes(b"\xff")
    with pytest.raises(UserError) as raised:
        overlay.load(tmp_path)
    named = [line.removeprefix(f"{tmp_path}/").partition(":")[0] for line in str(raised.value).splitlines()]
    assert named == ["environment.yaml", "adapters/a/pipeline.yaml", "adapters/b/pipeline.yaml",
                     "adapters/b/pipeline.yaml"]


def test_an_invalid_environment_is_reported_once(tmp_path: Path) -> None:
    (built(tmp_path) / "environment.yaml").write_text("base_model: {source: builtin:tiny}\n")
    with pytest.raises(UserError, match=r"environment.yaml:1: reference_model: is missing") as raised:
        overlay.load(tmp_path)
    assert len(str(raised.value).splitlines()) == 1


def test_a_rank_above_the_environments_names_both(tmp_path: Path) -> None:
    built(tmp_path)
    build_pipeline.write_yaml(tmp_path / "adapters" / "b" / "pipeline.yaml",
                              build_pipeline.pipeline(adapter="b", training__lora__r=128))
    with pytest.raises(UserError, match=r"adapters/b/pipeline.yaml:\d+: training.lora.r: is 128, above "
                                        r"serving.max_lora_rank \(64\)") as raised:
        overlay.load(tmp_path)
    number = int(str(raised.value).partition("pipeline.yaml:")[2].partition(":")[0])
    assert (tmp_path / "adapters" / "b" / "pipeline.yaml").read_text().splitlines()[number - 1].strip() == "r: 128"


def test_a_folder_with_neither_file_is_an_error_that_says_what_to_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has neither environment.yaml nor pipeline.yaml. Name an overlay"):
        overlay.find(tmp_path / "absent")


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_a_folder_without_permission_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(UserError, match="cannot be read: Permission denied"):
        overlay.find(tmp_path / "closed" / "kind")
