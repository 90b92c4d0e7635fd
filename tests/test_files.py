"""Promises of the mounted files: the last valid content of each counts, and one file does not concern the others."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.core import environment, imported, signatures
from jobs.core.errors import UserError
from jobs.core.pipeline import Pipeline
from serving import files
from serving.files import Files
from tests import build_adapter, build_pipeline, build_signing
from tests.build_signing import pair
from tests.test_base import INVALID

NAME, SECOND = "seville-hotels", "granada-hotels"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (NAME, SECOND):
        build_adapter.declare(tmp_path, adapter=name)
    return tmp_path


def problem(read: Files, stem: str) -> tuple[str, str]:
    found = read.read().problems[stem]
    return found.reason, str(found)


def test_the_environment_and_the_adapters_are_read_by_the_names_of_their_files(folder: Path) -> None:
    (folder / "notes.txt").write_text("no")
    (folder / ".hidden.yaml").write_text("no")
    (folder / "folder.yaml").mkdir()
    declared = Files(folder).read()
    assert list(declared.adapters) == [SECOND, NAME]
    assert [each and each.adapter for each in declared.adapters.values()] == [SECOND, NAME]
    assert declared.environment == build_pipeline.build(base_model={"source": "builtin:tiny"}).environment
    assert not declared.problems
    # To a microsecond: nanoseconds divided by 1e9 are not rounded as `st_mtime` is.
    assert declared.changed == pytest.approx({name: (folder / f"{name}.yaml").stat().st_mtime
                                              for name in (SECOND, NAME)}, rel=0, abs=1e-6)


def test_a_folder_that_was_never_there_is_a_problem_that_says_what_must_be_in_it(tmp_path: Path) -> None:
    reason, message = problem(Files(tmp_path / "absent"), "environment")
    assert reason == "environment file"
    assert message.startswith(f"{tmp_path}/absent: there must be an environment.yaml")


def test_links_that_lead_nowhere_do_not_hide_the_files_beside_them(folder: Path) -> None:
    for number in range(50):  # before and behind the others, in whatever order they are listed
        (folder / f"{number}.yaml").symlink_to("absent")
    assert list(Files(folder).read().adapters) == [SECOND, NAME]


def test_nothing_is_parsed_again_until_a_file_changes_and_then_only_that_one(
        folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Files(folder)
    before = read.read()
    parsed: list[str] = []
    load = imported.load_any

    def counting(file: Path, *rest: Any) -> Any:
        parsed.append(file.stem)
        return load(file, *rest)

    monkeypatch.setattr(imported, "load_any", counting)
    assert read.read() is before
    os.utime(folder / f"{NAME}.yaml")  # the same content
    after = read.read()
    assert after.adapters[NAME] is before.adapters[NAME]
    assert not parsed
    build_adapter.declare(folder, training__seed=1)  # which writes the same environment again
    changed = read.read().adapters
    assert parsed == [NAME]
    assert isinstance(pipeline_now := changed[NAME], Pipeline) and pipeline_now.training.seed == 1
    assert changed[SECOND] is before.adapters[SECOND]


@pytest.mark.parametrize("text", INVALID)
def test_an_invalid_file_keeps_its_last_valid_content_and_the_others_go_on(folder: Path, text: str) -> None:
    read = Files(folder)
    before = read.read()
    (folder / f"{NAME}.yaml").write_text(text)
    build_adapter.declare(folder, adapter=SECOND, training__seed=1)
    after = read.read()
    assert after.adapters[NAME] is before.adapters[NAME]
    assert after.adapters[SECOND] is not before.adapters[SECOND]
    reason, message = problem(read, NAME)
    assert reason == "pipeline file"
    assert message.startswith(f"{folder}/{NAME}.yaml")
    assert dict(Files(folder).read().adapters) == {SECOND: after.adapters[SECOND], NAME: None}, "after a restart"
    build_adapter.declare(folder)
    assert not read.read().problems


@pytest.mark.parametrize("text", [*INVALID, "base_model: 5\n"])
def test_an_invalid_environment_keeps_its_last_valid_content_with_which_the_adapters_are_followed(
        folder: Path, text: str) -> None:
    read = Files(folder)
    before = read.read()
    (folder / "environment.yaml").write_text(text)
    build_pipeline.write_yaml(folder / f"{NAME}.yaml", build_pipeline.pipeline(training__seed=1))
    after = read.read()
    assert after.environment is before.environment
    assert isinstance(pipeline_now := after.adapters[NAME], Pipeline) and pipeline_now.training.seed == 1
    reason, message = problem(read, "environment")
    assert reason == "environment file"
    assert message.startswith(f"{folder}/environment.yaml")
    restarted = Files(folder).read()
    assert restarted.environment is None
    assert dict(restarted.adapters) == {SECOND: None, NAME: None}
    assert list(restarted.problems) == ["environment"], "the adapters' files are not to blame"


def test_a_changed_environment_is_that_of_all_adapters(folder: Path) -> None:
    read = Files(folder)
    read.read()
    build_adapter.declare(folder, serving={"max_lora_rank": 128})
    after = read.read()
    assert {each.environment.serving.max_lora_rank for each in after.adapters.values() if each} == {128}
    build_adapter.declare(folder, training__lora__r=100, serving={"max_lora_rank": 128})
    read.read()
    build_pipeline.write_yaml(folder / "environment.yaml", build_pipeline.environment(serving={"max_lora_rank": 8}))
    shrunk = read.read()
    assert "training.lora.r: is 100, above serving.max_lora_rank (8)" in problem(read, NAME)[1]
    assert isinstance(pipeline_now := shrunk.adapters[NAME], Pipeline) and pipeline_now.training.lora.r == 100


@pytest.mark.parametrize(("stem", "adapter", "is_alias"), [
    ("renamed", NAME, True), ("Not-A-Name", NAME, False), ("a.b", "a", False)])
def test_a_file_whose_name_is_not_its_adapters_is_refused(
        folder: Path, stem: str, adapter: str, is_alias: bool) -> None:
    build_pipeline.write_yaml(folder / f"{stem}.yaml", build_pipeline.pipeline(adapter=adapter))
    read = Files(folder)
    reason, message = problem(read, stem)
    assert reason == "name"
    assert message.startswith(f"{folder}/{stem}.yaml: ")
    assert (stem in read.read().adapters) == is_alias
    assert read.read().adapters.get(stem) is None


def test_a_removed_file_ends_its_adapter_at_the_second_look_because_an_editor_may_be_replacing_it(folder: Path) -> None:
    read = Files(folder)
    read.read()
    file = folder / f"{NAME}.yaml"
    content = file.read_bytes()
    file.unlink()
    assert list(read.read().adapters) == [SECOND, NAME]
    file.write_bytes(content)
    assert list(read.read().adapters) == [SECOND, NAME]
    file.unlink()
    read.read()
    assert list(read.read().adapters) == [SECOND]
    (folder / f"{SECOND}.yaml").unlink()
    read.read()
    assert not read.read().adapters
    assert read.read().environment


@pytest.mark.parametrize("vanish", [
    lambda folder: (folder / "environment.yaml").unlink(), lambda folder: folder.rename(folder.with_name("away"))])
def test_a_folder_that_is_gone_removes_no_adapter(folder: Path, vanish: Callable[[Path], object]) -> None:
    read = Files(folder / ".")
    before = read.read()
    vanish(folder)
    for _ in range(3):
        after = read.read()
    assert dict(after.adapters) == dict(before.adapters)
    assert after.environment is before.environment
    assert problem(read, "environment")[0] == "environment file"


def test_a_config_map_is_followed_by_its_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def update(number: int, *names: str) -> None:
        """As the kubelet does it."""
        data = tmp_path / f"..{number}"
        for name in names:
            build_adapter.declare(data, adapter=name, training__seed=number)
        (tmp_path / "..data_tmp").symlink_to(data.name)
        (tmp_path / "..data_tmp").rename(tmp_path / "..data")
        for file in data.iterdir():
            if not (tmp_path / file.name).is_symlink():
                (tmp_path / file.name).symlink_to(f"..data/{file.name}")
        for link in tmp_path.glob("*.yaml"):
            if not link.exists():
                link.unlink()

    read = Files(tmp_path)
    update(1, NAME, SECOND)
    assert list(read.read().adapters) == [SECOND, NAME]
    with monkeypatch.context() as idle:
        idle.setattr(os, "scandir", lambda _: pytest.fail("nothing changed"))
        read.read()
    update(2, NAME)
    after = read.read().adapters
    assert list(after) == [NAME], "at once: Kubernetes replaces all files in one step"
    assert isinstance(pipeline_now := after[NAME], Pipeline) and pipeline_now.training.seed == 2


@pytest.mark.parametrize("replace", [
    lambda file: os.mkfifo(file), lambda file: file.symlink_to("/dev/zero"),
    lambda file: file.write_bytes(b"x" * 2**21),
    lambda file: file.write_bytes(b"\xff"), lambda file: (file.write_text("x"), file.chmod(0))])
def test_whatever_lies_where_a_file_should_be_is_that_files_problem(
        folder: Path, replace: Callable[[Path], object]) -> None:
    read = Files(folder)
    before = read.read()
    file = folder / f"{NAME}.yaml"
    file.unlink()
    replace(file)
    after = read.read()
    assert after.adapters[NAME] is before.adapters[NAME]
    if os.getuid() or file.stat().st_mode & 0o777:  # root reads every file
        assert str(file) in problem(read, NAME)[1]


@pytest.mark.parametrize(("error", "words"), [
    (RecursionError("too deep"), "too deep"), (KeyError("x"), "'x'"), (OSError("gone"), "gone"),
    (MemoryError(), "MemoryError")])
def test_whatever_reading_a_file_raises_is_the_error_of_that_file(
        folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str) -> None:
    def raises(*_: Any) -> None:
        raise error

    monkeypatch.setattr(imported, "load_any", raises)
    read = Files(folder)
    assert dict(read.read().adapters) == {SECOND: None, NAME: None}
    assert problem(read, NAME)[1] == f"{folder}/{NAME}.yaml: cannot be read: {words}"
    with pytest.raises(UserError):
        files._valid(folder, lambda: raises())
    monkeypatch.setattr(environment, "load", raises)
    assert problem(Files(folder), "environment")[1] == f"{folder}/environment.yaml: cannot be read: {words}"


@pytest.mark.parametrize(("error", "words"), [(PermissionError(13, "Permission denied"), "Permission denied"),
                                              (OSError("gone"), "gone")])
def test_a_file_that_cannot_be_opened_is_named_with_the_systems_words(
        folder: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, words: str) -> None:
    def raises(*_: Any, **__: Any) -> bytes:
        raise error

    read = Files(folder)
    read.read()
    os.utime(folder / f"{NAME}.yaml")
    monkeypatch.setattr(files, "read_plain_file", raises)
    assert problem(read, NAME)[1] == f"{folder}/{NAME}.yaml: cannot be read: {words}"


# --- the trusted keys -------------------------------------------------------------------------------------------------

SIGNED = {"signing": {"public_keys": [pair("one").public]}}


def test_the_trusted_keys_are_those_of_the_environment(folder: Path) -> None:
    assert Files(folder).read().trusted_keys == ()
    build_adapter.declare(folder, adapter=NAME, **SIGNED)
    assert Files(folder).read().trusted_keys == (pair("one").public,)


def test_a_mistake_elsewhere_in_the_environment_does_not_switch_the_signatures_off(folder: Path) -> None:
    """A server that starts then has no valid environment, and serves what was promoted."""
    build_adapter.declare(folder, adapter=NAME, **SIGNED)
    file = folder / "environment.yaml"
    file.write_text(file.read_text() + "unknown: 1\n")
    read = Files(folder)
    assert problem(read, "environment")[0] == "environment file"
    assert read.read().trusted_keys == (pair("one").public,)


@pytest.mark.parametrize("text", ["signing: [", "signing: {public_keys: [x]}\n", "signing:\n  key: 1\n", "[signing]",
                                  "a: b: c\n# signing\n"])
def test_where_it_cannot_be_known_which_keys_are_trusted_none_is(folder: Path, text: str) -> None:
    (folder / "environment.yaml").write_text(text)
    assert Files(folder).read().trusted_keys == files.NO_KEY
    with pytest.raises(ValueError, match="none of signing.public_keys"):
        signatures.verify(b"x", build_signing.signer(pair("one")).sign(b"x").encode(), files.NO_KEY)


@pytest.mark.parametrize("text", ["adapter: [", "", "signing: null\nunknown: 1\n"])
def test_an_invalid_environment_that_asks_for_no_signatures_stops_nothing(folder: Path, text: str) -> None:
    (folder / "environment.yaml").write_text(text)
    assert Files(folder).read().trusted_keys == ()


def test_a_running_server_keeps_the_keys_of_the_last_valid_environment(folder: Path) -> None:
    build_adapter.declare(folder, adapter=NAME, **SIGNED)
    read = Files(folder)
    assert read.read().trusted_keys == (pair("one").public,)
    (folder / "environment.yaml").write_text("adapter: [")
    assert read.read().trusted_keys == (pair("one").public,)
    build_adapter.declare(folder, adapter=NAME, signing={"public_keys": [pair("two").public]})
    assert read.read().trusted_keys == (pair("two").public,)
