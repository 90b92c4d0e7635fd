"""The tests' own promise: what kubectl rendered before is used again only if it would render the same."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests import rendered_once
from tests.manifests import copy, render


def test_copies_have_one_key_and_whatever_is_edited_within_reach_has_another(tmp_path: Path) -> None:
    kind, other = copy(tmp_path / "a"), copy(tmp_path / "b" / "deeper")
    before = rendered_once.key(kind)
    assert rendered_once.key(other) == before
    for file in ("kustomization.yaml", "adapters/seville-hotels/dataset.jsonl", "../../base/jobs/job.yaml",
                 "../../serving/service.yaml"):
        text = (kind / file).read_text()
        (kind / file).write_text(text + "\n")
        assert rendered_once.key(kind) != before, file
        (kind / file).write_text(text)
    assert rendered_once.key(kind) == before
    (kind / "added.yaml").touch()
    assert rendered_once.key(kind) != before
    (kind / "link.yaml").symlink_to("added.yaml")
    with pytest.raises(rendered_once.Unknown):
        rendered_once.key(kind)


def test_an_edit_is_rendered_and_the_same_files_are_rendered_once(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = copy(tmp_path)
    before = render(kind)
    with monkeypatch.context() as offline:
        offline.setattr(subprocess, "run", lambda *_, **__: pytest.fail("rendered again"))
        assert render(kind) == before
    file = tmp_path / "base" / "jobs" / "job.yaml"
    file.write_text(file.read_text().replace("backoffLimit: ", "backoffLimit: 1"))
    assert render(kind) != before
