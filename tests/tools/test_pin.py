"""Promises of `pin`: pins become what is there, and nothing else in the file changes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.core import pipeline
from jobs.core.errors import UserError
from jobs.tools import pin
from tests.hub_server import Hub, serve

FILE = """\
adapter: hotels  # the name that clients send
dataset:
  source: file:data.jsonl  # private
  holdout: 0.2
base_model: {source: "hf://acme/base", revision: main}
tokenizer:
  source: hf://acme/base
reference_model:
  # bigger
  source: hf://acme/reference

evaluation:
  gate: {perplexity: {max_ratio: 0.9}}
"""


@pytest.fixture
def overlay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Hub]]:
    (tmp_path / "pipeline.yaml").write_text(FILE)
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with serve() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        for name in ("base", "reference"):
            hub.add("models", f"acme/{name}", {"config.json": b'{"architectures": ["LlamaForCausalLM"]}',
                                               "README.md": name.encode()})
        yield tmp_path, hub


def commit(hub: Hub, name: str) -> str:
    return list(hub.repos[f"models/acme/{name}"])[-1]


def test_pins_are_filled_and_nothing_else_changes(overlay: tuple[Path, Hub]) -> None:
    folder, hub = overlay
    pin.run(folder)
    sha256 = hashlib.sha256((folder / "data.jsonl").read_bytes()).hexdigest()
    base = commit(hub, "base")
    assert (folder / "pipeline.yaml").read_text() == (
        FILE.replace("# private\n", f"# private\n  sha256: {sha256}\n")
        .replace('acme/base", revision: main', f'acme/base", architecture: LlamaForCausalLM, revision: {base}')
        .replace("acme/base\n", f"acme/base\n  revision: {base}\n")
        .replace("acme/reference\n", f"acme/reference\n  revision: {commit(hub, 'reference')}\n"))
    assert pipeline.load(folder).pipeline.base_model.architecture == "LlamaForCausalLM"


def test_changed_data_is_pinned_again_and_hub_pins_stay(overlay: tuple[Path, Hub]) -> None:
    folder, hub = overlay
    pin.run(folder)
    before = pipeline.load(folder).pipeline
    (folder / "data.jsonl").write_text('{"text": "b"}\n')
    hub.add("models", "acme/base", {"config.json": b'{"architectures": ["LlamaForCausalLM"]}', "README.md": b"new"})
    pin.run(folder)
    after = pipeline.load(folder).pipeline
    assert after.dataset.sha256 == hashlib.sha256((folder / "data.jsonl").read_bytes()).hexdigest()
    assert after.base_model == before.base_model


def test_update_moves_to_the_newest_commit(overlay: tuple[Path, Hub]) -> None:
    folder, hub = overlay
    pin.run(folder)
    newest = hub.add("models", "acme/reference", {"config.json": b"{}", "README.md": b"new"})
    pin.run(folder, update=True)
    assert pipeline.load(folder).pipeline.reference_model.revision == newest


def test_a_second_pin_changes_nothing(overlay: tuple[Path, Hub]) -> None:
    folder, _ = overlay
    pin.run(folder)
    first = (folder / "pipeline.yaml").read_bytes()
    pin.run(folder)
    assert (folder / "pipeline.yaml").read_bytes() == first


def test_when_a_source_does_not_exist_the_file_stays_as_it_was(overlay: tuple[Path, Hub]) -> None:
    folder, hub = overlay
    hub.repos.pop("models/acme/reference")
    with pytest.raises(UserError, match="acme/reference"):
        pin.run(folder)
    assert (folder / "pipeline.yaml").read_text() == FILE


def test_a_missing_file_is_named_with_its_key(overlay: tuple[Path, Hub]) -> None:
    folder, _ = overlay
    (folder / "data.jsonl").unlink()
    with pytest.raises(UserError, match=r"dataset: .*data\.jsonl does not exist"):
        pin.run(folder)


@pytest.mark.parametrize(("before", "after"), [
    ("dataset:\n  source: file:data.jsonl\n  sha256:\n", "dataset:\n  source: file:data.jsonl\n  sha256: PIN\n"),
    ("dataset: {source: file:data.jsonl, sha256: }\n", "dataset: {source: file:data.jsonl, sha256: PIN }\n"),
    ("dataset: {source: file:data.jsonl, sha256}\n", "dataset: {source: file:data.jsonl, sha256: PIN}\n"),
    ("dataset: &d\n  source: file:data.jsonl\n", "dataset: &d\n  source: file:data.jsonl\n  sha256: PIN\n"),
    ("dataset:\r\n  source: file:data.jsonl\r\n", "dataset:\r\n  source: file:data.jsonl\r\n  sha256: PIN\r\n"),
    ("\ufeffdataset:\n  source: file:data.jsonl\n", "\ufeffdataset:\n  source: file:data.jsonl\n  sha256: PIN\n"),
    ("dataset:\n  source: |-\n    file:data.jsonl\n", "dataset:\n  source: |-\n    file:data.jsonl\n  sha256: PIN\n"),
])
def test_a_pin_is_written_into_any_layout(tmp_path: Path, before: str, after: str) -> None:
    rest = ("adapter: hotels\nbase_model: {source: builtin:tiny}\nreference_model: {source: builtin:tiny-reference}\n"
            "evaluation: {gate: {perplexity: {max_ratio: 0.9}}}\n")
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n')
    real = tmp_path / "real.yaml"
    real.write_bytes((before + rest).encode())
    (tmp_path / "pipeline.yaml").symlink_to("real.yaml")
    pin.run(tmp_path)
    sha256 = hashlib.sha256((tmp_path / "data.jsonl").read_bytes()).hexdigest()
    assert real.read_bytes().decode() == after.replace("PIN", sha256) + rest
    assert (tmp_path / "pipeline.yaml").is_symlink()


def test_pins_that_cannot_be_written_are_shown_and_the_file_stays(tmp_path: Path) -> None:
    """The value of two keys is one, by an alias, and they need two."""
    text = (f"adapter: hotels\ndataset: {{source: file:data.jsonl, sha256: &pin {'a' * 64}}}\n"
            "base_model: {source: builtin:tiny}\n"
            "reference_model: {source: builtin:tiny-reference}\nevaluation:\n"
            "  acceptability: {source: file:pairs.jsonl, sha256: *pin}\n  gate: {perplexity: {max_ratio: 0.9}}\n")
    for name in ("data", "pairs"):
        (tmp_path / f"{name}.jsonl").write_text(name)
    (tmp_path / "pipeline.yaml").write_text(text)
    with pytest.raises(UserError, match="cannot be written into its layout. Write them yourself: dataset.sha256: "):
        pin.run(tmp_path)
    assert (tmp_path / "pipeline.yaml").read_text() == text
