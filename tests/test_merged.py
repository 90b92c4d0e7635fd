"""Promises of mode merged: a proven merged model runs under the alias, and another one is a drain and a restart."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file, save_file

from jobs.core import artifacts
from jobs.core.pipeline import Pipeline
from jobs.core.plan import Plan, plan
from jobs.training import merge
from serving import base, drain, merged
from serving.files import Files
from tests import build_adapter, build_signing
from tests.build_guarded import NAME, World, clock, publish_base, start, until
from tests.build_server import BASE, StandIn
from tests.build_signing import pair

Change = Callable[[Path], object]


def promote(world: World, pipeline: Pipeline, change: Change | None = None) -> Plan:
    """Promote an adapter and publish its merged model, after `change` had its way with that; returns the plan."""
    planned = plan(pipeline)
    build_adapter.promote(world.volumes, pipeline)
    merge.publish(pipeline, planned, world.volumes, 0)
    if change:
        folder = planned.merged_model.path(world.volumes)
        change(folder)
        manifest = json.loads((folder / artifacts.MANIFEST).read_text())
        (folder / artifacts.MANIFEST).write_text(json.dumps(manifest | {"files": artifacts.listing(folder)}))
    return planned


@pytest.fixture
def still(tmp_path: Path) -> World:
    """Volumes and a pipeline file in mode merged, without a server."""
    return World(tmp_path, StandIn())


def chosen(world: World, **changes: Any) -> str | None:
    served = publish_base(world, mode="merged")
    world.write(**changes)
    return merged.choose(Files(world.files).read(), served).merged


def test_the_base_model_runs_until_a_merged_model_is_promoted_and_then_that_one(still: World) -> None:
    assert chosen(still) is None
    pipeline, _ = still.write()
    build_adapter.promote(still.volumes, pipeline)
    assert chosen(still) is None  # it is not merged yet
    planned = promote(still, pipeline)
    assert chosen(still) == still.model(planned)
    assert chosen(still, training__seed=1) == still.model(planned)  # the last promoted, while another is trained
    served = publish_base(still, mode="merged")
    served = merged.choose(Files(still.files).read(), served)
    assert merged.vllm_arguments(served) == [
        "--model", str(planned.merged_model.path(still.volumes)), "--served-model-name", still.model(planned)]


def test_where_signatures_are_asked_for_only_a_signed_merged_model_runs(still: World) -> None:
    signing = {"public_keys": [pair().public]}
    assert chosen(still, signing=signing) is None
    planned = promote(still, still.write()[0])
    assert chosen(still, signing=signing) is None
    build_signing.sign_all(still.volumes, pair())
    assert chosen(still, signing=signing) == still.model(planned)
    for spec in (planned.merged_model, planned.adapter, planned.evaluation):
        file = spec.path(still.volumes) / artifacts.SIGNATURE
        content = file.read_bytes()
        file.unlink()
        assert chosen(still, signing=signing) is None
        file.write_bytes(content)


def test_a_merged_model_that_was_trained_in_another_chat_format_does_not_run(still: World) -> None:
    served = replace(publish_base(still, mode="merged"), template='{"enable_thinking":false}')
    pipeline, _ = still.write()
    planned = promote(still, pipeline)
    assert merged.choose(Files(still.files).read(), served).merged is None
    assert chosen(still) == still.model(planned)


def poisoned(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    next(iter(tensors.values())).view(-1)[5] = float("nan")
    save_file(tensors, folder / "model.safetensors")


def another_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))


@pytest.mark.parametrize(("change", "says"), [
    (poisoned, "holds NaN"),
    (another_architecture, "its architecture is not the base model's"),
    (lambda folder: (folder / "pytorch_model.bin").write_bytes(b"pickle"), "no pickles"),
    (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"torn"), "not a whole safetensors file")])
def test_an_unfit_merged_model_is_passed_over_for_the_one_before(
        still: World, change: Change, says: str, caplog: pytest.LogCaptureFixture) -> None:
    publish_base(still, mode="merged")
    good = promote(still, still.write()[0])
    promote(still, still.write(training__seed=1)[0], change)
    assert chosen(still, training__seed=1) == still.model(good)
    assert says in caplog.text


def test_a_changed_byte_or_a_failed_gate_is_passed_over_too(still: World) -> None:
    publish_base(still, mode="merged")
    good = promote(still, still.write()[0])
    bad = promote(still, still.write(training__seed=1)[0])
    with (bad.merged_model.path(still.volumes) / "config.json").open("a") as file:
        file.write(" ")
    assert chosen(still, training__seed=1) == still.model(good)
    failed, planned = still.write(training__seed=2)
    build_adapter.adapter(still.volumes, failed)
    merge.publish(failed, planned, still.volumes, 0)
    build_adapter.evaluation(still.volumes, failed, passed=False)
    assert chosen(still, training__seed=2) == still.model(good)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain, "LINGER_SECONDS", 0.0)


@pytest.mark.usefixtures("at_once")
def test_the_first_promotion_ends_a_server_of_the_base_model_when_the_merged_model_is_there(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for world in start(tmp_path, monkeypatch, mode="merged"):
        assert world.ask(BASE).json()["model"] == BASE
        pipeline, _ = world.write()
        build_adapter.promote(world.volumes, pipeline)
        until(lambda: "merged-model" in world.ask().text)  # noqa: B023 - the loop has one turn
        assert world.ask().status_code == 503
        assert not world.ended()
        promote(world, pipeline)
        until(world.ended)


def serving_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[World], object] = lambda _: None
                   ) -> Iterator[World]:
    def prepare(world: World) -> None:
        promote(world, world.write()[0])
        change(world)

    yield from start(tmp_path, monkeypatch, prepare=prepare, mode="merged")


@pytest.mark.usefixtures("at_once")
def test_the_merged_model_answers_under_the_alias_alone_and_another_one_is_a_restart(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for world in serving_merged(tmp_path, monkeypatch):
        planned = world.write()[1]
        assert until(world.served) == world.model(planned)
        assert world.ask().json()["model"] == NAME
        assert world.ask(BASE).status_code == 404
        assert [(m["id"], m["root"]) for m in httpx.get(world.url + "/v1/models").json()["data"]] == [
            (NAME, world.model(planned))]
        time.sleep(0.2)
        assert not world.ended()
        other, _ = world.write(training__seed=1)
        promote(world, other)
        until(world.ended)
        assert not world.vllm.ever_loaded


def test_a_merged_model_from_which_nothing_finite_comes_is_not_served_and_not_restarted_for(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for world in serving_merged(tmp_path, monkeypatch,
                                lambda world: world.vllm.broken.add(world.model(world.write()[1]))):
        until(lambda: "refused: values" in world.ask().text)  # noqa: B023 - the loop has one turn
        time.sleep(0.2)
        assert world.ask().status_code == 503
        assert not world.ended()


def test_a_merged_model_that_does_not_answer_as_was_evaluated_is_not_served(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for world in serving_merged(tmp_path, monkeypatch,
                                lambda world: world.vllm.ineffective.add(world.model(world.write()[1]))):
        until(lambda: "refused: proof" in world.ask().text)  # noqa: B023 - the loop has one turn
        assert re.search(r"prompt \d of 3: token \d+: log-probability -[\d.]+ expected", caplog.text)
        assert world.ask().status_code == 503
        assert not world.ended()
    (tmp_path / "private").rmdir()  # as a restart does
    caplog.clear()
    for _ in start(tmp_path, monkeypatch, mode="merged"):
        assert "with it, vLLM did not answer as was evaluated (proof)" in caplog.text


def test_a_merged_model_of_an_evaluation_without_a_proof_is_still_served(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(world: World) -> None:
        pipeline, planned = world.write()
        build_adapter.promote(world.volumes, pipeline, recipe=1)
        merge.publish(pipeline, planned, world.volumes, 0)

    for world in start(tmp_path, monkeypatch, prepare=prepare, mode="merged"):
        assert until(world.served) == world.model(world.write()[1])


@pytest.mark.usefixtures("at_once")
def test_a_merged_model_from_which_nothing_finite_comes_is_one_restart_with_the_one_before_and_not_an_endless_loop(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[Plan] = []

    def prepare(world: World) -> None:
        plans.extend(promote(world, world.write(training__seed=seed)[0]) for seed in (1, 2))
        world.vllm.broken.add(world.model(plans[1]))

    for world in start(tmp_path, monkeypatch, prepare=prepare, mode="merged"):
        assert world.vllm.runs == world.model(plans[1])
        until(world.ended)
    (tmp_path / "private").rmdir()  # as a restart does
    for world in start(tmp_path, monkeypatch, mode="merged"):
        assert world.vllm.runs == world.model(plans[0])
        assert until(world.served) == world.model(plans[0])
        time.sleep(0.3)  # more than ten looks
        assert not world.ended()


def test_a_probe_that_vllm_does_not_answer_is_tried_again_and_refuses_nothing(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def overload(world: World) -> None:
        world.vllm.fails_probes = 3

    for world in serving_merged(tmp_path, monkeypatch, overload):
        refusals = world.metric("serving_refusals_total", alias=NAME, reason="values")
        assert until(world.served) == world.model(world.write()[1])
        assert world.vllm.fails_probes == 0
        assert world.metric("serving_refusals_total", alias=NAME, reason="values") == refusals
        assert not world.ended()


@pytest.mark.usefixtures("at_once")
def test_a_turn_to_restart_that_git_no_longer_needed_is_not_kept_for_the_next_time(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def prepare(world: World) -> None:
        promote(world, world.write(training__seed=1)[0])
        promote(world, world.write()[0])

    now = clock(monkeypatch)
    monkeypatch.setattr(base, "next_turn", lambda now, *_: now + 3600)
    for world in start(tmp_path, monkeypatch, prepare=prepare, mode="merged", restart_slot_seconds=60.0):
        running = world.model(world.write()[1])
        assert until(world.served) == running
        world.write(training__seed=1)
        until(lambda: "in its turn" in caplog.text)
        world.write()  # a revert, before the turn
        until(lambda world=world: not world.vllm.guards[-1].aliases._turns)  # type: ignore[misc]
        now[0] += 3600
        world.write(training__seed=1)
        until(lambda: caplog.text.count("in its turn") == 2 or world.ended())  # noqa: B023 - the loop has one turn
        assert not world.ended(), "its turn is in an hour"


@pytest.mark.usefixtures("at_once")
def test_a_second_alias_in_mode_merged_is_not_a_reason_to_restart_without_end(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for world in serving_merged(tmp_path, monkeypatch):
        assert until(world.served) == world.model(world.write()[1])
        second, _ = world.write(adapter="zamora-hotels", training__seed=7)
        promote(world, second)
        until(lambda: "runs one" in world.ask("zamora-hotels").text)  # noqa: B023 - the loop has one turn
        time.sleep(0.3)
        assert not world.ended()
        assert world.served() == world.model(world.write()[1])


@pytest.mark.usefixtures("at_once")
def test_of_several_adapters_the_first_by_name_that_can_be_served_runs_and_the_others_are_named(
        still: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    publish_base(still, mode="merged")
    still.write(adapter="cordoba-hotels")  # never promoted: the second one does not wait for it
    planned = promote(still, still.write()[0])
    assert chosen(still) == still.model(planned)
    assert f"in mode merged one adapter runs: {NAME}, the first by name that can be served. These wait: " in caplog.text
    for world in start(tmp_path, monkeypatch, mode="merged"):
        assert until(world.served) == world.model(planned)
        first, _ = world.write(adapter="cordoba-hotels")
        promote(world, first)
        until(world.ended)
