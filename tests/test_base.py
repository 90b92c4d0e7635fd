"""Promises about what a server runs on: which base model it starts with, and what it changes to another one for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs.core.errors import RetryableError, UserError
from jobs.core.pipeline import Pipeline
from jobs.core.plan import FINE_TUNED_VOLUME, plan
from jobs.training import merge
from serving import base
from serving.files import Declared, Files
from serving.refusal import NotYet, Refused
from serving.served import Served
from tests import build_adapter, build_signing
from tests.build_guarded import World, publish_base
from tests.build_server import StandIn
from tests.build_signing import pair

OTHER_BASE: dict[str, Any] = {"base_model": {"source": "builtin:tiny-reference"}}
OTHER_TOKENIZER: dict[str, Any] = {"tokenizer": {"source": "builtin:tiny-reference"}}
OTHER_TEMPLATE: dict[str, Any] = {"chat_template": {"enable_thinking": False}}
MERGED: dict[str, Any] = {"serving": {"mode": "merged"}}
AT_ONCE: dict[str, Any] = {"serving": {"when_base_changes": "at-once"}}
NAME, SECOND = "seville-hotels", "granada-hotels"

INVALID = ["adapter: seville-hotels\ntraining: {seed: 2026-99-99}\n", "[" * 3000, "? [a]\n: b\n", "a: !!bool x\n",
           "\x00", "", "adapter: Not A Name\n", "adapter: seville-hotels\nunknown: 1\n"]


class Git:
    """Files and volumes, without a server."""

    def __init__(self, folder: Path) -> None:
        self.files, self.volumes = folder / "pipelines", folder / "volumes"

    def write(self, **changes: Any) -> Pipeline:
        return build_adapter.declare(self.files, **changes)[0]

    def spoil(self, stem: str = "environment", text: str = "adapter: [") -> None:
        self.files.mkdir(parents=True, exist_ok=True)
        (self.files / f"{stem}.yaml").write_text(text)

    def read(self) -> Declared:
        return Files(self.files).read()

    def relocate(self, pipeline: Pipeline) -> None:
        build_adapter.base(self.volumes, plan(pipeline))

    def promote(self, pipeline: Pipeline) -> None:
        self.relocate(pipeline)
        build_adapter.promote(self.volumes, pipeline)

    def start(self) -> base.Start:
        return base.start(Files(self.files), self.volumes, 0)

    def starts_on(self) -> base.Base:
        return self.start().base


@pytest.fixture
def git(tmp_path: Path) -> Git:
    return Git(tmp_path)


@pytest.fixture
def served(tmp_path: Path) -> Served:
    return publish_base(World(tmp_path, StandIn()))


# --- files ------------------------------------------------------------------------------------------------------------


def test_the_environment_decides_and_an_adapter_whose_file_is_invalid_stops_nobody(git: Git) -> None:
    git.write(adapter="one")
    first = git.write(adapter="two", serving={"max_lora_rank": 128})
    git.relocate(first)
    for number, text in enumerate(INVALID):
        git.spoil(f"bad-{number}", text.replace(NAME, f"bad-{number}"))
    start = git.start()
    assert start.base == base.of(first.environment)
    assert (start.base_name, start.max_lora_rank) == ("builtin:tiny", 128)
    assert [name for name, pipeline in start.declared.adapters.items() if pipeline] == ["one", "two"]
    assert start.adapters == len(INVALID) + 2


def test_an_environment_without_adapters_starts_on_its_base_model(git: Git) -> None:
    pipeline = git.write()
    git.relocate(pipeline)
    (git.files / f"{NAME}.yaml").unlink()
    start = git.start()
    assert (start.base, start.adapters) == (base.of(pipeline.environment), 0)
    assert not start.declared.adapters


def test_without_a_valid_environment_and_a_promotion_there_is_nothing_to_start_from(git: Git) -> None:
    with pytest.raises(UserError, match=r"there must be an environment\.yaml and a NAME\.yaml for each adapter"):
        git.start()
    git.relocate(git.write())
    git.spoil(text="base_model: 5\n")
    with pytest.raises(UserError, match=r"environment\.yaml:1: base_model"):
        git.start()


@pytest.mark.parametrize("text", INVALID)
def test_an_invalid_environment_file_starts_from_what_was_promoted(
        git: Git, text: str, caplog: pytest.LogCaptureFixture) -> None:
    pipeline = git.write(training__lora__r=128, serving={"max_lora_rank": 256})
    git.promote(pipeline)
    git.spoil(text=text)
    start = git.start()
    assert (start.base, start.adapters) == (base.of(pipeline.environment), 1)
    assert (start.base_name, start.max_lora_rank) == ("builtin:tiny", 128)
    assert dict(start.declared.adapters) == {NAME: None}
    assert f"{git.files}/environment.yaml" in caplog.text


def test_the_init_container_waits_for_what_the_server_starts_from(git: Git) -> None:
    pipeline = git.write()
    git.promote(pipeline)
    git.spoil()
    command = [sys.executable, "-m", "serving", "--wait", "--pipelines", str(git.files), "--volumes", str(git.volumes),
               "--wait-seconds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pipelines/environment.yaml" in done.stderr
    git.write(dataset__holdout=0.2, **OTHER_BASE, **AT_ONCE)
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0  # on the old base, meanwhile
    (git.volumes / FINE_TUNED_VOLUME).rename(git.volumes / "away")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "waited 1 s for base-model/" in done.stderr


def test_who_waits_for_a_base_model_follows_a_push_that_asks_for_another_and_ignores_an_invalid_one(
        git: Git, monkeypatch: pytest.MonkeyPatch) -> None:
    git.write(**OTHER_BASE)
    pushes = [git.spoil, lambda: git.relocate(git.write())]
    monkeypatch.setattr("time.sleep", lambda _: pushes.pop(0)())
    assert base.start(Files(git.files), git.volumes, 60).base == base.of(git.write().environment)
    assert not pushes


def test_a_base_model_that_does_not_come_is_named_and_worth_a_retry(git: Git) -> None:
    digest = plan(git.write()).base_model.digest
    with pytest.raises(RetryableError, match=f"waited 0 s for base-model/{digest}, tokenizer/"):
        git.start()


# --- which base -------------------------------------------------------------------------------------------------------


def test_a_server_starts_on_the_old_base_until_the_adapter_for_the_new_one_has_passed(git: Git) -> None:
    old = git.write(serving={"max_lora_rank": 128})
    git.promote(old)
    new = git.write(**OTHER_BASE)
    assert git.starts_on() == base.of(old.environment)  # the new base model is not there
    git.relocate(new)
    assert git.starts_on() == base.of(old.environment)  # its adapter is not trained
    build_adapter.adapter(git.volumes, new)
    assert git.starts_on() == base.of(old.environment)  # its gate has not passed
    assert git.start().base_name == "builtin:tiny"
    build_adapter.evaluation(git.volumes, new)
    assert git.starts_on() == base.of(new.environment)
    assert git.start().base_name == "builtin:tiny-reference"
    git.promote(new)
    assert git.starts_on() == base.of(new.environment)
    git.write()  # git revert: the old adapter is still there
    assert git.starts_on() == base.of(old.environment)


def test_a_rejected_adapter_for_the_new_base_never_counts_and_a_damaged_one_neither(git: Git) -> None:
    old = git.write()
    git.promote(old)
    rejected = git.write(**OTHER_BASE)
    git.relocate(rejected)
    build_adapter.adapter(git.volumes, rejected)
    build_adapter.evaluation(git.volumes, rejected, passed=False)
    assert git.starts_on() == base.of(old.environment)
    damaged = git.write(training__seed=1, **OTHER_BASE)
    path = build_adapter.adapter(git.volumes, damaged)
    build_adapter.evaluation(git.volumes, damaged)
    (path / "adapter_model.safetensors").write_bytes(b"torn")
    assert git.starts_on() == base.of(old.environment)


def test_at_once_starts_on_the_new_base_as_soon_as_it_is_there(git: Git) -> None:
    old = git.write()
    git.promote(old)
    new = git.write(**OTHER_BASE, **AT_ONCE)
    assert git.starts_on() == base.of(old.environment)
    git.relocate(new)
    assert git.starts_on() == base.of(new.environment)


def test_a_changed_tokenizer_alone_is_another_base(git: Git) -> None:
    old = git.write()
    git.promote(old)
    new = git.write(**OTHER_TOKENIZER)
    git.relocate(new)
    assert git.starts_on() == base.of(old.environment)
    git.promote(new)
    assert git.starts_on() == base.of(new.environment)


def test_other_arguments_of_the_chat_template_are_another_base(git: Git, caplog: pytest.LogCaptureFixture) -> None:
    """An adapter is served only in the format in which it was trained, also where its pipeline file is gone."""
    old = git.write()
    git.promote(old)
    new = git.write(**OTHER_TEMPLATE)
    assert git.starts_on() == base.of(old.environment) != base.of(new.environment)
    assert git.starts_on().template == "{}"
    git.promote(new)
    assert git.starts_on() == base.of(new.environment)
    assert git.starts_on().template == '{"enable_thinking":false}'
    assert str(git.starts_on()).endswith(', mode lora, chat_template {"enable_thinking":false}')
    assert base.is_for(plan(new).adapter.digest, base.of(new.environment), git.volumes)
    assert not base.is_for(plan(old).adapter.digest, base.of(new.environment), git.volumes)
    git.spoil()
    assert git.starts_on() == base.of(new.environment)
    git.write()  # git revert: the old adapter is still there
    assert git.starts_on() == base.of(old.environment)
    assert len({base.of(git.write(chat_template={"level": level}).environment) for level in (1, True, 1.0)}) == 3


def test_of_several_adapters_all_must_have_one_for_the_new_base(git: Git) -> None:
    old = [git.write(), git.write(adapter=SECOND)]
    new = [git.write(**OTHER_BASE), git.write(adapter=SECOND, **OTHER_BASE)]
    for each in (*old, new[0]):  # the first one's promotion is for the new base already
        git.promote(each)
    git.write(adapter="cordoba-hotels", **OTHER_BASE)  # never had one: it loses nothing
    assert git.starts_on() == base.of(old[0].environment)
    git.promote(new[1])
    assert git.starts_on() == base.of(new[0].environment)
    git.spoil(NAME)
    git.spoil(SECOND)
    assert git.starts_on() == base.of(new[0].environment)


def test_a_damaged_new_base_model_is_passed_over_for_the_old_one(git: Git, caplog: pytest.LogCaptureFixture) -> None:
    old = git.write()
    git.promote(old)
    new = git.write(**OTHER_BASE)
    git.promote(new)
    folder = base.of(new.environment).folders(git.volumes)[0]
    (folder / "generation_config.json").write_text("{}")
    assert git.starts_on() == base.of(old.environment)
    assert "generation_config.json was changed" in caplog.text
    (base.of(old.environment).folders(git.volumes)[0] / "generation_config.json").write_text("{}")
    with pytest.raises(UserError, match=rf"{folder.name}: generation_config\.json was changed"):
        git.start()


def test_a_damaged_promotion_is_looked_up_in_the_history(git: Git) -> None:
    old = git.write()
    git.promote(old)
    (git.volumes / FINE_TUNED_VOLUME / "promoted" / NAME).write_text("{")
    git.spoil()
    assert git.starts_on() == base.of(old.environment)


def test_room_is_reserved_for_the_promoted_adapter_when_git_asks_for_a_lower_rank(git: Git) -> None:
    git.promote(git.write(training__lora__r=100, serving={"max_lora_rank": 128}))
    git.write(training__lora__r=8, serving={"max_lora_rank": 8})
    assert git.start().max_lora_rank == 128


def test_room_is_reserved_for_whatever_rank_a_search_chose(git: Git) -> None:
    git.promote(git.write(training__search={"candidates": {"lora.r": [8, 100, 16]}}, serving={"max_lora_rank": 128}))
    git.write(training__search=None, serving={"max_lora_rank": 8})
    assert git.start().max_lora_rank == 128


def test_another_mode_waits_for_the_merged_model_and_is_kept_when_the_file_turns_invalid(git: Git) -> None:
    lora = git.write()
    git.promote(lora)
    merged = git.write(**MERGED)
    assert git.starts_on() == base.of(lora.environment)
    merge.publish(merged, plan(merged), git.volumes, 0)
    assert git.starts_on() == base.of(merged.environment)
    git.spoil()
    assert git.starts_on() == base.of(merged.environment)
    git.write()
    assert git.starts_on() == base.of(lora.environment)


def test_the_name_of_a_base_model_that_is_pinned_by_digest_comes_from_its_artifact(git: Git) -> None:
    pipeline = git.write(base_model={"source": "file:model", "sha256": "5b1f" * 16})
    git.promote(pipeline)
    assert git.start().base_name == "file:model"
    manifest = base.of(pipeline.environment).folders(git.volumes)[0] / "artifact.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"about": {"source": "file:elsewhere"}}))
    git.spoil()
    assert git.start().base_name == "file:elsewhere"


# --- a server that runs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "message"), [
    (OTHER_BASE, "base model and tokenizer changed to base-model/"),
    (OTHER_TEMPLATE, 'chat_template changed from {} to {"enable_thinking":false}'),
    (MERGED, "changed from lora to merged"),
    ({"serving": {"max_lora_rank": 128}}, "raised from 64 to 128")])
def test_what_a_running_server_cannot_follow_is_named_and_nothing_else_restarts_it(
        git: Git, served: Served, changes: dict[str, Any], message: str) -> None:
    assert base.changed(Declared(), served) is None
    for harmless in ({}, {"training__seed": 5}, {"serving": {"max_lora_rank": 8}}, {"retention": {"keep": 2}}, AT_ONCE):
        git.write(**harmless)
        assert base.changed(git.read(), served) is None
    git.write(**changes)
    assert message in str(base.changed(git.read(), served))


def test_a_running_server_restarts_for_what_a_server_would_start_with_and_for_nothing_else(
        git: Git, served: Served) -> None:
    git.promote(git.write())
    new = git.write(**OTHER_BASE)
    with pytest.raises(NotYet, match=r"base-model [0-9a-f]{16} is not there yet"):
        base.check_restart(git.read(), served, [NAME])
    git.relocate(new)
    with pytest.raises(NotYet, match=f"{NAME}: no adapter for it has passed the gate yet"):
        base.check_restart(git.read(), served, [NAME])
    git.promote(new)
    base.check_restart(git.read(), served, [NAME])
    git.spoil(SECOND)
    with pytest.raises(NotYet, match=f"{SECOND}: no adapter for it"):
        base.check_restart(git.read(), served, [NAME, SECOND])
    (git.files / f"{SECOND}.yaml").unlink()
    base.check_restart(git.read(), served, [NAME, SECOND])  # its adapter is not wanted any more
    (base.of(new.environment).folders(git.volumes)[0] / "config.json").write_text("{}")
    with pytest.raises(Refused, match=r"config\.json was changed"):
        base.check_restart(git.read(), served, [NAME])


def test_replicas_restart_each_in_a_slot_of_its_own() -> None:
    assert base.next_turn(1234.5, 0, "pod") == 1234.5
    now, slot = 1_000_000.25, 300.0
    turns = {f"model-inference-{number}": base.next_turn(now, slot, f"model-inference-{number}")
             for number in range(500)}
    assert all(now <= turn < now + base.SLOTS * slot for turn in turns.values())
    assert len(set(turns.values())) == base.SLOTS, "every slot is used, and nothing between two slots"
    assert all(turn % slot == 0 for turn in turns.values())
    counts = [list(turns.values()).count(turn) for turn in set(turns.values())]
    assert max(counts) < 3 * 500 / base.SLOTS, "no slot is preferred"
    later = {name: base.next_turn(turn + 1, slot, name) for name, turn in turns.items()}
    assert all(later[name] == turns[name] + base.SLOTS * slot for name in turns), "it stays the replica's own"


@pytest.mark.parametrize("damage", [{"files": [{"path": 5, "size": 1, "sha256": "x"}]}, {"files": 5}, {"spec": []}])
def test_an_adapter_with_a_damaged_manifest_does_not_keep_the_server_from_starting(git: Git, damage: Any) -> None:
    good = git.write()
    git.promote(good)
    bad = git.write(training__seed=1)
    folder = build_adapter.adapter(git.volumes, bad)
    build_adapter.evaluation(git.volumes, bad)
    manifest = json.loads((folder / "artifact.json").read_text())
    (folder / "artifact.json").write_text(json.dumps(manifest | damage))
    start = git.start()
    assert start.base == base.of(good.environment)
    assert start.adapters == 1


# --- signatures -------------------------------------------------------------------------------------------------------


def test_only_signed_adapters_decide_on_which_base_a_server_starts(git: Git) -> None:
    """Else one who can write to the volume would choose the base model."""
    pipeline = git.write(signing={"public_keys": [pair().public]})
    git.promote(pipeline)
    assert not base.find_proven(git.read(), git.volumes)
    build_signing.sign_all(git.volumes, pair())
    (found,) = base.find_proven(git.read(), git.volumes).values()
    assert found[NAME].adapter == plan(pipeline).adapter.digest
    git.write(signing={"public_keys": [pair("two").public]})
    assert not base.find_proven(git.read(), git.volumes), "what was found by other keys is not remembered"


@pytest.mark.parametrize("kind", ["adapter", "evaluation"])
def test_both_must_be_signed(git: Git, kind: str) -> None:
    planned = plan(pipeline := git.write(signing={"public_keys": [pair().public]}))
    git.promote(pipeline)
    build_signing.sign_all(git.volumes, pair())
    (getattr(planned, kind).path(git.volumes) / "artifact.json.sig").unlink()
    assert not base.find_proven(git.read(), git.volumes)
