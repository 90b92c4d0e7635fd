"""Promises of `pin`: pins become what is there, and nothing else in the file changes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs.core import environment, pipeline
from jobs.core.errors import UserError
from jobs.core.files import write_atomically
from jobs.tools import pin
from tests.hub_server import Hub, serve

ENVIRONMENT = """\
base_model: {source: "hf://acme/base", revision: main}
tokenizer:
  source: hf://acme/base
reference_model:
  # bigger
  source: hf://acme/reference
"""
PIPELINE = """\
adapter: hotels  # the name that clients send
dataset:
  source: file:data.jsonl  # private
  holdout: 0.2

evaluation:
  gate: {perplexity: {max_ratio: 0.9}}
"""
EMBEDDED = "base_model: {source: builtin:tiny}\nreference_model: {source: builtin:tiny-reference}\n"


def add(overlay: Path, name: str, text: str = PIPELINE) -> Path:
    folder = overlay / "adapters" / name
    folder.mkdir(parents=True)
    (folder / "pipeline.yaml").write_text(text.replace("hotels", name))
    (folder / "data.jsonl").write_text(f'{{"text": "{name}"}}\n')
    return folder


def sha256_of(folder: Path) -> str:
    return hashlib.sha256((folder / "data.jsonl").read_bytes()).hexdigest()


@pytest.fixture
def overlay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Hub]]:
    (tmp_path / "environment.yaml").write_text(ENVIRONMENT)
    for name in ("hotels", "boats"):
        add(tmp_path, name)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with serve() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        for name in ("base", "reference"):
            hub.add("models", f"acme/{name}", {"config.json": b'{"architectures": ["LlamaForCausalLM"]}',
                                               "README.md": name.encode()})
        yield tmp_path, hub


def contents(overlay: Path) -> dict[str, str]:
    return {str(file.relative_to(overlay)): file.read_text() for file in overlay.rglob("*.yaml")}


def commit(hub: Hub, name: str) -> str:
    return list(hub.repos[f"models/acme/{name}"])[-1]


def test_pins_are_filled_and_nothing_else_changes(overlay: tuple[Path, Hub]) -> None:
    folder, hub = overlay
    pin.run(folder)
    base = commit(hub, "base")
    assert (folder / "environment.yaml").read_text() == (
        ENVIRONMENT
        .replace('acme/base", revision: main', f'acme/base", architecture: LlamaForCausalLM, revision: {base}')
        .replace("acme/base\n", f"acme/base\n  revision: {base}\n")
        .replace("acme/reference\n", f"acme/reference\n  revision: {commit(hub, 'reference')}\n"))
    for name in ("hotels", "boats"):
        adapter = folder / "adapters" / name
        assert (adapter / "pipeline.yaml").read_text() == PIPELINE.replace("hotels", name).replace(
            "# private\n", f"# private\n  sha256: {sha256_of(adapter)}\n")
    assert environment.load(folder).environment.base_model.architecture == "LlamaForCausalLM"


def test_an_adapters_team_pins_its_own_file_only(overlay: tuple[Path, Hub]) -> None:
    folder, hub = overlay
    hub.repos.clear()  # nothing is looked up that is not this adapter's
    before = contents(folder)
    pin.run(folder / "adapters" / "boats")
    after = contents(folder)
    assert [name for name in before if before[name] != after[name]] == ["adapters/boats/pipeline.yaml"]


def test_changed_data_is_pinned_again_and_hub_pins_stay(overlay: tuple[Path, Hub]) -> None:
    folder, hub = overlay
    pin.run(folder)
    before = contents(folder)
    boats = folder / "adapters" / "boats"
    (boats / "data.jsonl").write_text('{"text": "b"}\n')
    hub.add("models", "acme/base", {"config.json": b'{"architectures": ["LlamaForCausalLM"]}', "README.md": b"new"})
    pin.run(folder)
    assert pipeline.load(boats).pipeline.dataset.sha256 == sha256_of(boats)
    after = contents(folder)
    assert [name for name in before if before[name] != after[name]] == ["adapters/boats/pipeline.yaml"]


def test_update_moves_to_the_newest_commit(overlay: tuple[Path, Hub]) -> None:
    folder, hub = overlay
    pin.run(folder)
    newest = hub.add("models", "acme/reference", {"config.json": b"{}", "README.md": b"new"})
    pin.run(folder, update=True)
    assert environment.load(folder).environment.reference_model.revision == newest


def test_a_second_pin_changes_nothing(overlay: tuple[Path, Hub]) -> None:
    folder, _ = overlay
    pin.run(folder)
    first = contents(folder)
    pin.run(folder)
    assert contents(folder) == first


@pytest.mark.parametrize("spoil", [
    lambda folder, hub: hub.repos.pop("models/acme/reference"),
    lambda folder, hub: (folder / "adapters" / "hotels" / "data.jsonl").unlink(),
    lambda folder, hub: add(folder, "zebras", PIPELINE + "surplus: 1\n"),
    lambda folder, hub: (folder / "environment.yaml").write_text(ENVIRONMENT + "surplus: 1\n"),
], ids=["a source does not exist", "data does not exist", "an invalid adapter", "an invalid environment"])
def test_when_one_file_cannot_be_pinned_all_stay_as_they_were(
        overlay: tuple[Path, Hub], spoil: Callable[[Path, Hub], object]) -> None:
    folder, hub = overlay
    spoil(folder, hub)
    before = contents(folder)
    with pytest.raises(UserError):
        pin.run(folder)
    assert contents(folder) == before


def test_when_one_file_cannot_be_written_all_stay_as_they_were(
        overlay: tuple[Path, Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = overlay
    before = contents(folder)
    write = write_atomically

    def fail(file: Path, text: str) -> None:
        if "sha256" in text and file.parent.name == "hotels":
            raise PermissionError(13, "Permission denied", str(file))
        write(file, text)

    monkeypatch.setattr(pin, "write_atomically", fail)
    with pytest.raises(PermissionError):
        pin.run(folder)
    assert contents(folder) == before


def test_a_missing_file_is_named_with_its_key(overlay: tuple[Path, Hub]) -> None:
    folder, _ = overlay
    (folder / "adapters" / "boats" / "data.jsonl").unlink()
    with pytest.raises(UserError, match=r"boats/pipeline.yaml: dataset: .*data\.jsonl does not exist"):
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
    rest = "adapter: hotels\nevaluation: {gate: {perplexity: {max_ratio: 0.9}}}\n"
    (tmp_path / "environment.yaml").write_text(EMBEDDED)
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
            "evaluation:\n"
            "  acceptability: {source: file:pairs.jsonl, sha256: *pin}\n  gate: {perplexity: {max_ratio: 0.9}}\n")
    for name in ("data", "pairs"):
        (tmp_path / f"{name}.jsonl").write_text(name)
    (tmp_path / "pipeline.yaml").write_text(text)
    (tmp_path / "environment.yaml").write_text(EMBEDDED)
    with pytest.raises(UserError, match="cannot be written into its layout. Write them yourself: dataset.sha256: "):
        pin.run(tmp_path)
    assert (tmp_path / "pipeline.yaml").read_text() == text


def test_each_task_is_pinned_in_its_entry_of_the_list(overlay: tuple[Path, Hub]) -> None:
    folder, _ = overlay
    tasks = """\
  tasks:
  - name: flow
    source: file:data.jsonl  # kept
    check: exact
  - {name: brackets, check: rougeL, source: "file:data.jsonl"}
  - name: quiz
    source: file:data.jsonl
    check: lm_eval
    lm_eval: {source: "file:data.jsonl"}
"""
    add(folder, "cars", PIPELINE.replace("  gate:", tasks + "  gate:"))
    pin.run(folder)
    text = (folder / "adapters/cars/pipeline.yaml").read_text()
    digest = sha256_of(folder / "adapters/cars")
    assert f"    source: file:data.jsonl  # kept\n    sha256: {digest}\n    check: exact\n" in text
    assert f'- {{name: brackets, check: rougeL, source: "file:data.jsonl", sha256: {digest}}}\n' in text
    assert [task.sha256 for task in pipeline.load(folder / "adapters/cars").pipeline.evaluation.tasks] == [digest] * 3
    assert f'    lm_eval: {{source: "file:data.jsonl", sha256: {digest}}}\n' in text
