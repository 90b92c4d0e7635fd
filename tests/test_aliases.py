"""Promises of the aliases: a name is one proven version or a clear 503; whatever goes wrong, the last one serves."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file

from serving import aliases, base, candidates, drain, verification
from serving.replies import RETRY_AFTER_SECONDS
from tests import build_adapter, build_pipeline, build_signing
from tests.build_guarded import NAME, World, clock, replace_file, start, until
from tests.build_server import BASE
from tests.build_signing import pair


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    yield from start(tmp_path, monkeypatch)


def test_before_a_promotion_the_base_answers_and_the_alias_is_503_with_retry_after_and_the_reason(world: World) -> None:
    assert world.ask(BASE).json()["model"] == BASE
    until(lambda: "not there yet" in world.ask().text)
    reply = world.ask()
    assert (reply.status_code, reply.headers["retry-after"]) == (503, str(RETRY_AFTER_SECONDS))
    assert re.search(rf"{NAME}` is not ready: evaluation [0-9a-f]{{16}} is not there yet; no adapter was promoted",
                     reply.json()["error"]["message"])
    assert [body["model"] for body in world.vllm.asked] == [BASE]  # vLLM was never asked for the alias
    assert [m["id"] for m in httpx.get(world.url + "/v1/models").json()["data"]] == [BASE]


def test_a_promotion_goes_live_without_a_restart_and_replies_name_the_alias(world: World) -> None:
    pipeline, planned = world.write()
    build_adapter.promote(world.volumes, pipeline)
    assert until(world.served) == world.model(planned)
    for path in ("/v1/completions", "/v1/chat/completions"):
        assert world.ask(path=path, temperature=0.5).json()["model"] == NAME
        assert world.vllm.asked[-1] == {"model": world.model(planned), "prompt": "Hello", "temperature": 0.5}
    assert world.ask(BASE).json()["model"] == BASE
    error = world.ask(fail=True)
    assert (error.status_code, error.json()["error"]["message"]) == (400, f"{NAME} failed")
    assert world.ask(world.model(planned)).status_code == 404  # versions are nobody's business
    base, alias = httpx.get(world.url + "/v1/models").json()["data"]
    assert base["id"] == BASE
    assert (alias["id"], alias["root"], alias["parent"]) == (NAME, world.model(planned), BASE)


def test_a_stream_begun_before_a_swap_ends_on_its_version_which_is_then_unloaded(world: World) -> None:
    first, first_plan = world.write()
    build_adapter.promote(world.volumes, first)
    assert until(world.served) == world.model(first_plan)
    world.vllm.hold = threading.Event()
    with world.stream() as stream:
        lines = stream.iter_lines()
        models = [json.loads(next(lines).removeprefix("data: "))["model"]]
        second, second_plan = world.write(training__seed=1)
        build_adapter.promote(world.volumes, second)
        until(lambda: world.served() == world.model(second_plan))
        time.sleep(0.2)  # ten polls
        assert set(world.vllm.loaded) == {world.model(first_plan), world.model(second_plan)}
        world.vllm.hold.set()
        models += [json.loads(line.removeprefix("data: "))["model"] for line in lines if line.startswith("data: {")]
    assert models == [NAME, NAME]
    assert world.vllm.asked[-1]["model"] != world.model(first_plan)
    until(lambda: set(world.vllm.loaded) == {world.model(second_plan)})
    until(lambda: not (world.folder / "private" / NAME / first_plan.adapter.digest).exists())


def test_a_version_is_not_unloaded_while_an_update_could_point_back_to_it(
        world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    first, first_plan = world.write()
    build_adapter.promote(world.volumes, first)
    assert until(world.served) == world.model(first_plan)
    world.vllm.hold = threading.Event()
    with world.stream() as stream:
        lines = stream.iter_lines()
        next(lines)
        second, second_plan = world.write(training__seed=1)
        build_adapter.promote(world.volumes, second)
        until(lambda: world.served() == world.model(second_plan))
        promoted, slow, looking = candidates.promoted, threading.Event(), threading.Event()

        def slowly(*args: Any) -> Any:
            looking.set()
            slow.wait(20)
            return promoted(*args)

        monkeypatch.setattr(candidates, "promoted", slowly)  # a slow volume
        looking.wait(20)
        world.vllm.hold.set()
        list(lines)
    time.sleep(0.3)  # ten looks
    assert world.model(first_plan) in world.vllm.loaded
    slow.set()
    until(lambda: set(world.vllm.loaded) == {world.model(second_plan)})


def test_a_reverted_pipeline_file_serves_the_old_adapter_again_at_once(world: World) -> None:
    old, old_plan = world.write()
    build_adapter.promote(world.volumes, old)
    new, new_plan = world.write(training__seed=1)
    build_adapter.promote(world.volumes, new)
    until(lambda: world.served() == world.model(new_plan))
    world.write()  # git revert: the last promotion is still the new one
    until(lambda: world.served() == world.model(old_plan))


def test_the_last_promoted_adapter_serves_while_the_asked_one_is_trained_or_after_its_gate_failed(world: World) -> None:
    old, old_plan = world.write()
    build_adapter.promote(world.volumes, old)
    assert until(world.served) == world.model(old_plan)
    new, _ = world.write(training__seed=1)
    build_adapter.adapter(world.volumes, new)
    time.sleep(0.2)
    assert world.served() == world.model(old_plan)
    build_adapter.evaluation(world.volumes, new, passed=False)
    time.sleep(0.2)
    assert world.served() == world.model(old_plan)
    assert world.vllm.ever_loaded == [world.model(old_plan)]


def test_an_unfit_adapter_is_never_given_to_vllm_and_refused_once(
        world: World, caplog: pytest.LogCaptureFixture) -> None:
    old, old_plan = world.write()
    build_adapter.promote(world.volumes, old)
    assert until(world.served) == world.model(old_plan)
    new, new_plan = world.write(training__seed=1)
    weights = build_adapter.adapter(world.volumes, new) / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    build_adapter.evaluation(world.volumes, new)
    until(lambda: "refused" in caplog.text)
    time.sleep(0.3)
    assert caplog.text.count("refused (damaged)") == 1
    assert "sha256" in caplog.text
    assert world.served() == world.model(old_plan)
    assert world.model(new_plan) not in world.vllm.ever_loaded
    weights.write_bytes(content)  # mended: it is looked at again
    until(lambda: world.served() == world.model(new_plan))


@pytest.mark.parametrize(("trait", "reason"), [
    ("ineffective", "proof"), ("broken", "values"), ("unloadable", "load")])
def test_an_adapter_that_fails_its_proof_is_unloaded_and_the_one_before_keeps_serving(
        world: World, trait: str, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    old, old_plan = world.write()
    build_adapter.promote(world.volumes, old)
    assert until(world.served) == world.model(old_plan)
    new, new_plan = world.write(training__seed=1)
    getattr(world.vllm, trait).add(world.model(new_plan))
    build_adapter.promote(world.volumes, new)
    until(lambda: f"refused ({reason})" in caplog.text)
    time.sleep(0.2)
    assert world.vllm.ever_loaded.count(world.model(new_plan)) == 1
    assert set(world.vllm.loaded) == {world.model(old_plan)}
    assert world.served() == world.model(old_plan)


def test_an_adapter_with_another_scale_than_was_evaluated_is_refused_by_place_and_number(
        world: World, caplog: pytest.LogCaptureFixture) -> None:
    old, old_plan = world.write()
    build_adapter.promote(world.volumes, old)
    assert until(world.served) == world.model(old_plan)
    before = world.metric("serving_refusals_total", alias=NAME, reason="proof")
    new, new_plan = world.write(training__seed=1)
    build_adapter.promote(world.volumes, new, build_adapter.double_scale)
    until(lambda: "refused (proof)" in caplog.text)
    time.sleep(0.2)
    assert re.search(rf"{world.model(new_plan)}, prompt \d of 3: token \d+: log-probability -[\d.]+ expected, "
                     r"-[\d.]+ found", caplog.text)
    assert not any(text in caplog.text for text in ("best hotel", "orange trees", "Answer it"))
    assert world.metric("serving_refusals_total", alias=NAME, reason="proof") == before + 1
    assert world.vllm.ever_loaded.count(world.model(new_plan)) == 1
    assert world.served() == world.model(old_plan)


def test_an_adapter_is_refused_where_vllm_renders_another_chat_template(
        world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.vllm.template = "another"
    build_adapter.promote(world.volumes, world.write()[0])
    until(lambda: "refused: proof" in world.ask().text)
    assert re.search(r"this server's chat template makes \d+ tokens of its messages, the evaluation's \d+", caplog.text)


def test_an_adapter_is_refused_where_vllm_mixes_it_into_the_base_models_answers(
        world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.vllm.mixes = True
    build_adapter.promote(world.volumes, world.write()[0])
    until(lambda: "refused: proof" in world.ask().text)
    assert f"{BASE}, prompt 1 of 3: " in caplog.text


def test_an_adapter_is_refused_if_the_one_that_is_served_answers_otherwise_while_it_is_loaded(
        world: World, caplog: pytest.LogCaptureFixture) -> None:
    old, old_plan = world.write()
    build_adapter.promote(world.volumes, old)
    assert until(world.served) == world.model(old_plan)
    world.vllm.ineffective.add(world.model(old_plan))
    build_adapter.promote(world.volumes, world.write(training__seed=1)[0])
    until(lambda: "refused (proof)" in caplog.text)
    assert f"while it was loaded, another adapter answered otherwise: {world.model(old_plan)}, prompt 1" in caplog.text
    until(lambda: set(world.vllm.loaded) == {world.model(old_plan)})


def test_what_was_promoted_before_evaluations_had_a_proof_is_still_served_and_still_probed(
        world: World, caplog: pytest.LogCaptureFixture) -> None:
    """An upgrade of the server must not take down what it serves."""
    pipeline, planned = world.write()
    build_adapter.promote(world.volumes, pipeline, recipe=1)
    assert until(world.served) == world.model(planned)
    time.sleep(0.2)
    assert caplog.text.count("it was evaluated before evaluations had a proof") == 1
    other, other_plan = world.write(training__seed=1)
    world.vllm.ineffective.add(world.model(other_plan))
    build_adapter.promote(world.volumes, other, recipe=1)
    until(lambda: "refused (no effect)" in caplog.text)
    assert world.served() == world.model(planned)


def test_a_proof_that_is_too_long_for_this_server_is_no_refusal(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.vllm.engine.vllm_config.model_config.max_model_len = 4
    pipeline, planned = world.write()
    build_adapter.promote(world.volumes, pipeline)
    assert until(world.served) == world.model(planned)
    assert "no prompt of its proof fits into --max-model-len" in caplog.text


def test_an_operator_may_allow_more_than_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for world in start(tmp_path, monkeypatch, proof_tolerance=100.0):
        pipeline, planned = world.write(training__seed=1)
        build_adapter.promote(world.volumes, pipeline, build_adapter.double_scale)
        assert until(world.served) == world.model(planned)


def damaged(folder: Path) -> None:
    (folder / "proof.json").write_bytes(b'{"prompts": "secret \xff"}')


@pytest.mark.parametrize(("change", "reason", "message"), [
    (lambda folder: (folder / "proof.json").unlink(), "proof", "does not hold what the adapter answers"),
    (damaged, "damaged", "proof.json is no readable proof"),
    (lambda folder: (folder / "proof.json").write_text('{"prompts": "secret"}'), "damaged", "proof.json: dtype: "),
    (lambda folder: (folder / "proof.json").write_text("[" * 100_000), "damaged", "is no readable proof"),
    (lambda folder: (folder / "proof.json").write_text(" " * 2**21), "damaged", "is no readable proof")])
def test_an_evaluation_without_a_whole_proof_proves_nothing(
        world: World, change: Callable[[Path], object], reason: str, message: str,
        caplog: pytest.LogCaptureFixture) -> None:
    pipeline, planned = world.write()
    build_adapter.promote(world.volumes, pipeline, evaluation_change=change)
    until(lambda: f"refused: {reason}" in world.ask().text)
    assert message in caplog.text and "secret" not in caplog.text
    assert world.model(planned) not in world.vllm.ever_loaded


def test_a_refused_first_adapter_leaves_a_503_that_says_so_and_never_the_base(world: World) -> None:
    pipeline, planned = world.write()
    world.vllm.ineffective.add(world.model(planned))
    build_adapter.promote(world.volumes, pipeline)
    until(lambda: "refused: proof" in world.ask().text)
    assert world.ask().status_code == 503
    assert not world.vllm.asked


def test_a_pipeline_file_that_became_invalid_changes_nothing_and_is_reported_once(
        world: World, caplog: pytest.LogCaptureFixture) -> None:
    pipeline, planned = world.write()
    build_adapter.promote(world.volumes, pipeline)
    assert until(world.served) == world.model(planned)
    build_pipeline.write_yaml(world.files / f"{NAME}.yaml", build_pipeline.pipeline(adapter="Not A Name"))
    until(lambda: "stays in force" in caplog.text)
    time.sleep(0.2)
    assert caplog.text.count("stays in force") == 1
    assert world.served() == world.model(planned)


def test_a_vanished_volume_changes_nothing_and_its_return_is_noticed(world: World) -> None:
    pipeline, planned = world.write()
    build_adapter.promote(world.volumes, pipeline)
    assert until(world.served) == world.model(planned)
    world.volumes.rename(world.folder / "away")
    new, new_plan = world.write(training__seed=1)
    time.sleep(0.3)
    assert world.served() == world.model(planned)
    (world.folder / "away").rename(world.volumes)
    build_adapter.promote(world.volumes, new)
    until(lambda: world.served() == world.model(new_plan))


def test_nothing_that_goes_wrong_while_looking_stops_the_looking(
        world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pipeline, planned = world.write()
    with monkeypatch.context() as broken:
        broken.setattr("serving.verification.copy_verified", lambda *_: (_ for _ in ()).throw(OSError("I/O error")))
        build_adapter.promote(world.volumes, pipeline)
        until(lambda: "I/O error" in caplog.text)
        assert world.ask().status_code == 503
    until(lambda: world.served() == world.model(planned))


def test_a_config_map_update_is_noticed_as_kubernetes_makes_it(world: World) -> None:
    old, old_plan = world.write()
    build_adapter.promote(world.volumes, old)
    mount = world.files
    new, new_plan = build_adapter.declare(mount / "..2026_2", training__seed=1)
    build_adapter.promote(world.volumes, new)
    build_adapter.declare(mount / "..2026_1")
    (mount / "..data").symlink_to("..2026_1")
    for name in ("environment.yaml", f"{NAME}.yaml"):
        (mount / name).unlink()
        (mount / name).symlink_to(f"..data/{name}")
    until(lambda: world.served() == world.model(old_plan))
    (mount / "..data_tmp").symlink_to("..2026_2")
    (mount / "..data_tmp").rename(mount / "..data")
    until(lambda: world.served() == world.model(new_plan))


def test_a_renamed_adapter_answers_under_its_new_name_only(world: World) -> None:
    pipeline, _ = world.write()
    build_adapter.promote(world.volumes, pipeline)
    until(world.served)
    renamed, _ = world.write(adapter="granada-hotels")
    (world.files / f"{NAME}.yaml").unlink()
    build_adapter.promote(world.volumes, renamed)
    until(lambda: world.ask("granada-hotels").status_code == 200)
    until(lambda: world.ask(NAME).status_code == 404)
    until(lambda: len(world.vllm.loaded) == 1)


def test_two_pipelines_serve_two_adapters_over_one_base(world: World) -> None:
    one, one_plan = world.write()
    two, two_plan = world.write(adapter="granada-hotels", training__seed=1)
    for pipeline in (one, two):
        build_adapter.promote(world.volumes, pipeline)
    until(lambda: {world.ask(NAME).status_code, world.ask("granada-hotels").status_code} == {200})
    assert set(world.vllm.loaded) == {world.model(one_plan), f"granada-hotels@{two_plan.adapter.digest}"}
    assert world.ask("granada-hotels").json()["model"] == "granada-hotels"
    assert [m["id"] for m in httpx.get(world.url + "/v1/models").json()["data"]] == [BASE, "granada-hotels", NAME]


def test_private_copies_are_all_that_is_needed_after_loading(world: World) -> None:
    pipeline, planned = world.write()
    path = build_adapter.promote(world.volumes, pipeline)
    until(world.served)
    loaded = Path(world.vllm.loaded[world.model(planned)])
    shutil.rmtree(path)
    assert world.folder / "private" in loaded.parents
    assert (loaded / "adapter_model.safetensors").is_file()


# What does not speak against an adapter


def test_an_overloaded_server_is_no_reason_to_refuse_a_proven_adapter(
        world: World, caplog: pytest.LogCaptureFixture) -> None:
    def refusals() -> float:
        return sum(world.metric("serving_refusals_total", alias=NAME, reason=reason) for reason in ("values", "load"))

    before = refusals()
    world.vllm.fails_probes = 3
    pipeline, planned = world.write()
    build_adapter.promote(world.volumes, pipeline)
    assert until(world.served) == world.model(planned)
    assert world.vllm.fails_probes == 0
    assert "overloaded" in caplog.text and "trying again" in caplog.text
    assert refusals() == before
    assert list(world.vllm.engine.adapters.values()) == [world.model(planned)]  # nothing of the failed attempts


# The engine's slots


def test_a_replaced_or_refused_version_gives_its_slot_back_and_an_idle_adapter_keeps_its_own(world: World) -> None:
    idle, idle_plan = world.write(adapter="granada-hotels", training__seed=9)
    build_adapter.promote(world.volumes, idle)
    until(lambda: world.ask("granada-hotels").status_code == 200)
    for seed in (1, 2, 3):
        pipeline, planned = world.write(training__seed=seed)
        build_adapter.promote(world.volumes, pipeline)
        until(lambda planned=planned: world.served() == world.model(planned))  # type: ignore[misc]
    bad, bad_plan = world.write(training__seed=4)
    world.vllm.ineffective.add(world.model(bad_plan))
    build_adapter.promote(world.volumes, bad)
    until(lambda: world.model(bad_plan) in world.vllm.ever_loaded)
    kept = {world.model(planned), f"granada-hotels@{idle_plan.adapter.digest}"}
    until(lambda: set(world.vllm.engine.adapters.values()) == kept)


def test_a_version_stays_for_a_moment_after_its_last_request_because_the_engine_may_still_compute_it(
        world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.aliases.SETTLE_SECONDS", 1.0)
    first, first_plan = world.write()
    build_adapter.promote(world.volumes, first)
    assert until(world.served) == world.model(first_plan)
    world.vllm.hold = threading.Event()
    with world.stream() as stream:
        lines = stream.iter_lines()
        next(lines)
        second, second_plan = world.write(training__seed=1)
        build_adapter.promote(world.volumes, second)
        until(lambda: world.served() == world.model(second_plan))
        released = time.monotonic()
        world.vllm.hold.set()
        list(lines)
    until(lambda: list(world.vllm.engine.adapters.values()) == [world.model(second_plan)])
    assert time.monotonic() - released >= 1


def test_the_shields_adapter_of_zeros_keeps_a_slot_of_its_own(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for world in start(tmp_path, monkeypatch, cpu_shield=True):
        world.vllm.engine.vllm_config.lora_config.max_loras = 2
        for name in (NAME, "granada-hotels"):
            build_adapter.promote(world.volumes, world.write(adapter=name)[0])
        for name in (NAME, "granada-hotels") * 3:
            until(lambda name=name: world.ask(name).status_code == 200)  # type: ignore[misc]  # noqa: B023
            assert world.ask(BASE).status_code == 200
        assert world.vllm.guards[-1].aliases.residency.slots == 1
        assert world.vllm.ever_loaded.count(f"{BASE}@zero") == 1
        assert f"{BASE}@zero" not in world.vllm.engine.activations


def test_a_new_version_goes_live_though_every_slot_but_that_of_a_long_reply_is_taken(world: World) -> None:
    world.vllm.engine.vllm_config.lora_config.max_loras = 2
    first, first_plan = world.write()
    build_adapter.promote(world.volumes, first)
    assert until(world.served) == world.model(first_plan)
    world.vllm.hold = threading.Event()
    with world.stream() as stream:
        lines = stream.iter_lines()
        next(lines)
        for seed in (1, 2, 3):
            version, planned = world.write(training__seed=seed)
            build_adapter.promote(world.volumes, version)
            until(lambda planned=planned: world.served() == world.model(planned))  # type: ignore[misc]
        assert world.model(first_plan) in world.vllm.loaded
        world.vllm.hold.set()
        assert list(lines)[-2] == "data: [DONE]"
    until(lambda: list(world.vllm.engine.adapters.values()) == [world.model(planned)])


def test_while_all_slots_are_busy_a_request_waits_and_a_new_version_does_not_go_live_or_fall_back(
        world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("serving.residency.HOLD_SECONDS", 0.3)
    world.vllm.engine.vllm_config.lora_config.max_loras = 1
    first, first_plan = world.write()
    build_adapter.promote(world.volumes, first)
    assert until(world.served) == world.model(first_plan)
    world.vllm.hold = threading.Event()
    with world.stream() as stream:
        lines = stream.iter_lines()
        next(lines)
        second, second_plan = world.write(training__seed=1)
        build_adapter.promote(world.volumes, second)
        until(lambda: "all 1 LoRA slots are busy" in caplog.text)
        assert world.served() == world.model(first_plan)
        world.vllm.hold.set()
        list(lines)
    until(lambda: world.served() == world.model(second_plan))


def test_more_adapters_than_slots_answer_and_metrics_tell_where_each_is(world: World) -> None:
    world.vllm.engine.vllm_config.lora_config.max_loras = 2
    names = [NAME, *(f"hotels-{number}" for number in range(4))]
    plans = {}
    for seed, name in enumerate(names, start=60):
        pipeline, plans[name] = world.write(adapter=name, training__seed=seed)
        build_adapter.promote(world.volumes, pipeline)
    for name in names * 3:
        until(lambda name=name: world.ask(name).status_code == 200)  # type: ignore[misc]
        assert world.vllm.asked[-1]["model"] == f"{name}@{plans[name].adapter.digest}"
    assert {m["id"] for m in httpx.get(world.url + "/v1/models").json()["data"]} == {BASE, *names}
    loaded = list(world.vllm.ever_loaded)
    assert len(loaded) == len(names), "each is loaded once and verified once"

    def places(name: str) -> list[str]:
        digest = plans[name].adapter.digest
        return [place for place in ("slot", "memory", "disk")
                if world.metric("serving_adapter_residency", alias=name, digest=digest, place=place)]

    assert [places(name) for name in names] == [["memory"]] * 3 + [["slot"]] * 2
    assert all(world.metric("serving_alias_state", alias=name, state="current") == 1 for name in names)
    assert world.metric("serving_slot_switches_total", source="memory") > 0


def test_an_adapter_that_is_not_in_memory_is_read_from_its_verified_copy(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever happened to the volume since it was verified."""
    for world in start(tmp_path, monkeypatch, adapter_memory=1):
        world.vllm.engine.vllm_config.lora_config.max_loras = 1
        names = [NAME, "granada-hotels"]
        for seed, name in enumerate(names):
            path = build_adapter.promote(world.volumes, world.write(adapter=name, training__seed=seed)[0])
            until(lambda name=name: world.ask(name).status_code == 200)  # type: ignore[misc]  # noqa: B023
            shutil.rmtree(path)
        for name in names * 2:
            assert world.ask(name).status_code == 200
            assert len(world.vllm.engine.adapters) == 1
        assert len(world.vllm.engine.activations) >= 3


# The state of each alias


def test_one_damaged_missing_or_rejected_adapter_touches_nobody_and_is_seen_in_the_metrics(world: World) -> None:
    good, damaged, rejected, missing = names = ("good", "damaged", "rejected", "missing")
    written = {name: world.write(adapter=name, training__seed=80 + seed)[0] for seed, name in enumerate(names)}
    build_adapter.promote(world.volumes, written[good])
    (build_adapter.adapter(world.volumes, written[damaged]) / "adapter_model.safetensors").write_bytes(b"torn")
    build_adapter.evaluation(world.volumes, written[damaged])
    build_adapter.adapter(world.volumes, written[rejected])
    build_adapter.evaluation(world.volumes, written[rejected], passed=False)
    until(lambda: world.ask(good).status_code == 200)
    states = {good: "current", damaged: "refused", rejected: "refused", missing: "waiting"}
    for name, state in states.items():
        until(lambda name=name, state=state: world.metric(  # type: ignore[misc]
            "serving_alias_state", alias=name, state=state) == 1)
        assert sum(world.metric("serving_alias_state", alias=name, state=each) for each in (
            "current", "previous", "waiting", "refused")) == 1
        assert world.ask(name).status_code == (200 if name == good else 503)
    assert [m["id"] for m in httpx.get(world.url + "/v1/models").json()["data"]] == [BASE, good]
    assert world.looked()
    world.write(adapter=good, training__seed=99)  # not trained yet
    until(lambda: world.metric("serving_alias_state", alias=good, state="previous") == 1)
    (world.files / f"{good}.yaml").unlink()
    until(lambda: world.ask(good).status_code == 404)
    assert not any(world.metric("serving_alias_state", alias=good, state=each) for each in ("current", "previous"))


def test_an_adapter_whose_file_is_removed_finishes_its_requests_and_is_gone(world: World) -> None:
    pipeline, planned = world.write()
    build_adapter.promote(world.volumes, pipeline)
    assert until(world.served) == world.model(planned)
    world.vllm.hold = threading.Event()
    with world.stream() as stream:
        lines = stream.iter_lines()
        next(lines)
        (world.files / f"{NAME}.yaml").unlink()
        until(lambda: world.ask().status_code == 404)
        time.sleep(0.2)
        assert world.model(planned) in world.vllm.loaded
        world.vllm.hold.set()
        assert list(lines)[-2] == "data: [DONE]"
    until(lambda: not world.vllm.engine.adapters)
    assert world.ask(BASE).status_code == 200
    assert not world.ended()
    world.write()
    until(lambda: world.served() == world.model(planned))


def test_an_idle_server_with_many_adapters_looks_at_a_few_at_a_time_and_misses_nothing(
        world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.aliases.RECENT_SECONDS", 0.0)
    names = [f"hotels-{number:02}" for number in range(40)]
    plans = {name: world.write(adapter=name, training__seed=7) for name in names}
    until(lambda: world.looked() and len(world.vllm.guards[-1].aliases.current) == 41)
    looked: list[str] = []
    update = world.vllm.guards[-1].aliases._update

    async def counting(name: str, *rest: Any) -> None:
        looked.append(name)
        await update(name, *rest)

    monkeypatch.setattr(world.vllm.guards[-1].aliases, "_update", counting)
    time.sleep(0.2)
    looked.clear()
    until(lambda: len(set(looked)) == 41)  # in turns: files can be replaced in place
    assert all(looked.count(name) <= 3 for name in names)
    looked.clear()
    build_adapter.promote(world.volumes, plans["hotels-33"][0])
    until(lambda: world.ask("hotels-33").status_code == 200)


# Promotions that cannot be read


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def link(file: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


def huge(file: Path) -> None:
    os.truncate(file, 2**41)


def garbage(file: Path) -> None:
    file.write_bytes(os.urandom(99))


@pytest.mark.parametrize("suffix", ["", ".history.jsonl"])
@pytest.mark.parametrize("damage", [pipe, link, huge, garbage])
def test_whatever_lies_where_promotions_are_the_pipeline_file_is_followed_and_the_server_ends(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None], suffix: str,
        caplog: pytest.LogCaptureFixture) -> None:
    plans = []

    def prepare(world: World) -> None:
        for seed in (1, 0):
            pipeline, planned = world.write(training__seed=seed)
            build_adapter.promote(world.volumes, pipeline)
            plans.append(planned)
        damage(world.volumes / "fine-tuned-model" / "promoted" / f"{NAME}{suffix}")

    for world in start(tmp_path, monkeypatch, prepare=prepare):
        assert until(world.served) == world.model(plans[1])
        world.write(training__seed=1)
        until(lambda: world.served() == world.model(plans[0]))  # noqa: B023 - the loop has one turn
        if not suffix:
            until(lambda: "refused (damaged)" in caplog.text)
            assert f"promoted/{NAME}" in caplog.text
            assert world.metric("serving_refusals_total", alias=NAME, reason="damaged") > 0
    assert world.ended()  # no thread waits for a pipe


def test_a_promotion_that_may_not_be_read_is_refused_by_name_once_and_followed_when_it_may(
        world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    before = world.metric("serving_refusals_total", alias=NAME, reason="unreadable")
    with monkeypatch.context() as forbidden:
        forbidden.setattr("jobs.core.promotion.current", lambda *_: (_ for _ in ()).throw(PermissionError(
            13, "Permission denied")))
        old, old_plan = world.write()
        build_adapter.adapter(world.volumes, old)
        build_adapter.evaluation(world.volumes, old)
        (world.volumes / "fine-tuned-model" / "promoted").mkdir()
        replace_file(world.volumes / "fine-tuned-model" / "promoted" / NAME, "{}")
        assert until(world.served) == world.model(old_plan)
        until(lambda: "refused (unreadable)" in caplog.text)
        time.sleep(0.2)  # ten looks
        assert caplog.text.count("refused (unreadable)") == 1
        assert re.search(rf"unreadable\): .*/promoted/{NAME}: Permission denied", caplog.text)
        assert world.metric("serving_refusals_total", alias=NAME, reason="unreadable") == before + 1
    new, new_plan = world.write(training__seed=1)
    (world.volumes / "fine-tuned-model" / "promoted" / NAME).unlink()
    build_adapter.promote(world.volumes, new)
    until(lambda: world.served() == world.model(new_plan))


def test_a_promotion_of_what_is_no_digest_is_logged_and_counted(
        world: World, caplog: pytest.LogCaptureFixture) -> None:
    before = world.metric("serving_refusals_total", alias=NAME, reason="damaged")
    folder = world.volumes / "fine-tuned-model" / "promoted"
    folder.mkdir(parents=True)
    replace_file(folder / NAME, json.dumps({"adapter": "../../elsewhere", "evaluation": "x", "at": "2026"}))
    until(lambda: "refused (damaged)" in caplog.text)
    time.sleep(0.2)  # ten looks
    assert caplog.text.count("refused (damaged)") == 1
    assert world.metric("serving_refusals_total", alias=NAME, reason="damaged") == before + 1


# Refusals


def test_a_repair_that_keeps_size_and_time_is_noticed_and_the_same_damage_again_is_another_refusal(
        world: World, caplog: pytest.LogCaptureFixture) -> None:
    pipeline, planned = world.write()
    weights = build_adapter.adapter(world.volumes, pipeline) / "adapter_model.safetensors"
    good, times = weights.read_bytes(), (weights.stat().st_atime_ns, weights.stat().st_mtime_ns)
    bad = good[:-1] + bytes([good[-1] ^ 1])

    def write(content: bytes) -> None:
        with weights.open("r+b") as stream:  # the same inode
            stream.write(content)
        os.utime(weights, ns=times)

    before = world.metric("serving_refusals_total", alias=NAME, reason="damaged")
    write(bad)
    build_adapter.evaluation(world.volumes, pipeline)
    for refusals in (1, 2):
        until(lambda n=refusals: world.metric(  # type: ignore[misc]
            "serving_refusals_total", alias=NAME, reason="damaged") == before + n)
        time.sleep(0.2)  # ten looks
        assert caplog.text.count("refused (damaged)") == refusals
        write(bad)  # somebody tried to repair it, in vain
    write(good)
    until(lambda: world.served() == world.model(planned))


def test_one_candidate_that_cannot_be_read_does_not_keep_the_others_from_being_served(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    plans = []

    def prepare(world: World) -> None:
        for seed in (1, 2):
            pipeline, planned = world.write(training__seed=seed)
            build_adapter.promote(world.volumes, pipeline)
            plans.append(planned)

    copy_verified = verification.copy_verified

    def fails(name: str, digest: str, *rest: Any) -> Path:
        if digest == plans[1].adapter.digest:
            raise OSError(5, "Input/output error", digest)
        return copy_verified(name, digest, *rest)

    with monkeypatch.context() as broken:
        broken.setattr(verification, "copy_verified", fails)
        for world in start(tmp_path, monkeypatch, prepare=prepare):
            assert until(world.served) == world.model(plans[0])
            until(lambda: "Input/output error" in caplog.text)
            broken.undo()
            until(lambda: world.served() == world.model(plans[1]))  # noqa: B023 - the loop has one turn


def test_a_volume_that_fails_while_an_adapter_is_served_changes_nothing(
        world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    build_adapter.promote(world.volumes, world.write()[0])
    _, served_plan = world.write(training__seed=1)
    for seed in (1, 2):
        pipeline, _ = build_adapter.load(world.folder / "elsewhere", training__seed=seed)
        build_adapter.adapter(world.volumes, pipeline)
        build_adapter.evaluation(world.volumes, pipeline)
    assert until(lambda: world.served() == world.model(served_plan))
    monkeypatch.setattr(verification, "copy_verified", lambda *_: (_ for _ in ()).throw(OSError(5, "failing disk")))
    world.write(training__seed=2)
    until(lambda: "failing disk" in caplog.text)
    time.sleep(0.3)  # more than ten looks
    assert world.served() == world.model(served_plan)  # and not the last promotion, which could be read


# When the server is ready


def test_the_first_look_is_done_when_what_can_be_served_is_served(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_verified, slow = verification.copy_verified, threading.Event()

    def slowly(*args: Any) -> Path:
        slow.wait(20)
        return copy_verified(*args)

    def prepare(world: World) -> None:
        build_adapter.promote(world.volumes, world.write()[0])
        world.write(adapter="granada-hotels", training__seed=1)

    monkeypatch.setattr(verification, "copy_verified", slowly)
    for world in start(tmp_path, monkeypatch, prepare=prepare):
        until(lambda: "not there yet" in world.ask("granada-hotels").text)  # noqa: B023 - the loop has one turn
        time.sleep(0.3)  # more than ten looks
        assert not world.looked()
        slow.set()
        until(world.looked)
        assert world.ask().status_code == 200


def test_the_first_look_is_done_when_an_adapter_is_refused_and_does_not_wait_for_a_broken_volume_for_ever(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(world: World) -> None:
        pipeline, planned = world.write()
        world.vllm.ineffective.add(world.model(planned))
        build_adapter.promote(world.volumes, pipeline)
        other, _ = world.write(adapter="granada-hotels", training__seed=1)
        build_adapter.promote(world.volumes, other)

    copy_verified = verification.copy_verified

    def fails(name: str, *rest: Any) -> Path:
        if name == "granada-hotels":
            raise OSError("I/O error")
        return copy_verified(name, *rest)

    monkeypatch.setattr(verification, "copy_verified", fails)
    for world in start(tmp_path, monkeypatch, prepare=prepare):
        until(world.looked)
        assert "refused: proof" in world.ask().text
        assert "tries again" in world.ask("granada-hotels").text


# What operators see


def test_metrics_and_log_say_which_adapter_answers_since_when_and_what_was_refused_and_why(
        world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    before = {name: world.metric(name, alias=NAME) for name in (
        "serving_promotions_seen_total", "serving_swaps_total", "serving_promotion_to_live_seconds_count")}
    refused = world.metric("serving_refusals_total", alias=NAME, reason="values")
    old, old_plan = world.write()
    build_adapter.promote(world.volumes, old)
    assert until(world.served) == world.model(old_plan)
    assert world.metric("serving_adapter_info", alias=NAME, digest=old_plan.adapter.digest) == 1
    until(lambda: world.metric("serving_promotions_seen_total", alias=NAME) > before["serving_promotions_seen_total"])
    new, new_plan = world.write(training__seed=1)
    build_adapter.promote(world.volumes, new)
    until(lambda: world.served() == world.model(new_plan))
    assert world.metric("serving_adapter_info", alias=NAME, digest=new_plan.adapter.digest) == 1
    assert world.metric("serving_adapter_info", alias=NAME, digest=old_plan.adapter.digest) == 0
    until(lambda: all(world.metric(name, alias=NAME) == value + 2 for name, value in before.items()))
    bad, bad_plan = world.write(training__seed=2)
    world.vllm.broken.add(world.model(bad_plan))
    build_adapter.promote(world.volumes, bad)
    until(lambda: world.metric("serving_refusals_total", alias=NAME, reason="values") == refused + 1)
    time.sleep(0.2)  # ten looks
    assert world.metric("serving_refusals_total", alias=NAME, reason="values") == refused + 1
    assert world.metric("serving_adapter_info", alias=NAME, digest=new_plan.adapter.digest) == 1
    fields = [record.fields for record in caplog.records if hasattr(record, "fields")]
    swap = next(f for f in fields if f["event"] == "swap" and f["adapter"] == new_plan.adapter.digest)
    assert (swap["alias"], swap["before"]) == (NAME, old_plan.adapter.digest)
    assert float(swap["seconds"]) >= 0


def test_an_adapter_that_was_promoted_before_the_server_started_is_not_timed(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(world: World) -> None:
        build_adapter.promote(world.volumes, world.write()[0])
        for file in [*world.volumes.rglob("*"), *(world.folder / "pipelines").rglob("*")]:
            os.utime(file, (time.time() - 100,) * 2)

    for world in start(tmp_path, monkeypatch, prepare=prepare):
        count = world.metric("serving_promotion_to_live_seconds_count", alias=NAME)
        until(world.served)
        assert world.metric("serving_promotion_to_live_seconds_count", alias=NAME) == count


def test_an_adapter_that_no_evaluation_passed_is_refused_by_name_until_one_did(
        world: World, caplog: pytest.LogCaptureFixture) -> None:
    before = world.metric("serving_refusals_total", alias=NAME, reason="not promoted")
    pipeline, planned = world.write()
    build_adapter.adapter(world.volumes, pipeline)
    until(lambda: "refused: not promoted" in world.ask().text)
    time.sleep(0.2)
    assert caplog.text.count("refused (not promoted)") == 1
    assert world.metric("serving_refusals_total", alias=NAME, reason="not promoted") == before + 1
    assert not world.vllm.ever_loaded
    build_adapter.evaluation(world.volumes, pipeline)
    until(lambda: world.served() == world.model(planned))


def test_an_adapter_that_vllm_could_not_load_is_tried_again_later(
        world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.aliases.RETRY_SECONDS", 0.1)
    pipeline, planned = world.write()
    world.vllm.unloadable.add(world.model(planned))  # out of memory, say
    build_adapter.promote(world.volumes, pipeline)
    until(lambda: "refused: load" in world.ask().text)
    world.vllm.unloadable.clear()
    until(lambda: world.served() == world.model(planned))


# After a restart


def test_after_a_restart_a_damaged_promotion_is_refused_and_the_one_before_serves(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = []

    def prepare(world: World) -> None:
        for seed in (1, 2, 3):
            pipeline, planned = world.write(training__seed=seed)
            path = build_adapter.promote(world.volumes, pipeline)
            plans.append(planned)
        (path / "adapter_model.safetensors").write_bytes(b"torn")

    for world in start(tmp_path, monkeypatch, prepare=prepare):
        assert until(world.served) == world.model(plans[1])
        assert not set(world.vllm.loaded) & {world.model(plans[2]), world.model(plans[0])}


def test_a_promotion_that_cannot_be_read_after_a_restart_is_looked_up_in_the_history(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = []

    def prepare(world: World) -> None:
        pipeline, planned = world.write(training__seed=1)
        build_adapter.promote(world.volumes, pipeline)
        plans.append(planned)
        (world.volumes / "fine-tuned-model" / "promoted" / NAME).write_text("{")
        world.write(training__seed=2)  # not trained yet

    for world in start(tmp_path, monkeypatch, prepare=prepare):
        assert until(world.served) == world.model(plans[0])


# Several adapters, and the base model


def test_an_adapter_on_another_base_is_refused_with_the_reason_and_the_others_serve(
        world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.write(adapter="granada-hotels")
    one, one_plan = world.write()
    two, _ = build_adapter.load(world.folder / "elsewhere", adapter="granada-hotels",
                                base_model={"source": "builtin:tiny-reference"})
    for pipeline in (one, two):
        build_adapter.promote(world.volumes, pipeline)
    assert until(world.served) == world.model(one_plan)
    until(lambda: "refused: base" in world.ask("granada-hotels").text)
    assert world.ask("granada-hotels").status_code == 503
    assert "it was trained on base_model" in caplog.text
    assert world.metric("serving_refusals_total", alias="granada-hotels", reason="base") > 0
    assert world.vllm.ever_loaded == [world.model(one_plan)]
    assert not world.ended()


def test_one_adapter_that_takes_long_does_not_keep_the_others_waiting(
        world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_verified, large = verification.copy_verified, threading.Event()

    def slowly(name: str, *rest: Any) -> Path:
        assert name == "granada-hotels" or large.wait(20)
        return copy_verified(name, *rest)

    monkeypatch.setattr(verification, "copy_verified", slowly)
    one, one_plan = world.write()
    two, _ = world.write(adapter="granada-hotels", training__seed=1)
    for pipeline in (one, two):
        build_adapter.promote(world.volumes, pipeline)
    until(lambda: world.ask("granada-hotels").status_code == 200)
    assert "being verified and loaded" in world.ask().text
    large.set()
    until(lambda: world.served() == world.model(one_plan))


@pytest.mark.parametrize(("alias", "text"), [
    ("granada-hotels", "adapter: granada-hotels\ntraining: {seed: 2026-99-99}\n"), ("two", "[" * 3000),
    ("two", "? [a]\n: b\n"), ("two", "a: !!bool x\n"), ("two", b"\xff\xfe"), ("two", "")])
def test_an_invalid_pipeline_file_is_that_files_refusal_counted_and_named_and_the_others_go_on(
        world: World, caplog: pytest.LogCaptureFixture, alias: str, text: str | bytes) -> None:
    before = world.metric("serving_refusals_total", alias=alias, reason="pipeline file")
    replace_file(world.files / f"{alias}.yaml", text)
    pipeline, planned = world.write()
    build_adapter.promote(world.volumes, pipeline)
    assert until(world.served) == world.model(planned)
    changed, changed_plan = world.write(training__seed=1)
    build_adapter.promote(world.volumes, changed)
    until(lambda: world.served() == world.model(changed_plan))
    assert caplog.text.count(f"file {alias} refused (pipeline file): {world.files}/{alias}.yaml") == 1
    assert world.metric("serving_refusals_total", alias=alias, reason="pipeline file") == before + 1


def test_a_server_that_starts_with_an_invalid_file_serves_what_was_promoted_and_the_file_when_it_is_mended(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = []

    def prepare(world: World) -> None:
        pipeline, planned = world.write(training__seed=1)
        build_adapter.promote(world.volumes, pipeline)
        plans.append(planned)
        (world.files / f"{NAME}.yaml").write_text("adapter: [")

    for world in start(tmp_path, monkeypatch, prepare=prepare):
        assert until(world.served) == world.model(plans[0])
        assert world.metric("serving_refusals_total", reason="pipeline file") > 0
        pipeline, planned = world.write(training__seed=2)
        build_adapter.promote(world.volumes, pipeline)
        until(lambda: world.served() == world.model(planned))  # noqa: B023 - the loop has one turn


def test_a_new_base_model_ends_the_server_only_when_every_adapter_that_is_served_has_one_for_it(
        world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(drain, "LINGER_SECONDS", 0.0)
    other: dict[str, Any] = {"base_model": {"source": "builtin:tiny-reference"}}
    old, old_plan = world.write()
    old_two, _ = world.write(adapter="granada-hotels")
    for pipeline in (old, old_two):
        build_adapter.promote(world.volumes, pipeline)
    assert until(world.served) == world.model(old_plan)
    until(lambda: world.ask("granada-hotels").status_code == 200)

    new, new_plan = world.write(**other)
    new_two, _ = world.write(adapter="granada-hotels", **other)
    build_adapter.base(world.volumes, new_plan)
    until(lambda: f"granada-hotels, {NAME}: no adapter for it has passed the gate yet" in caplog.text)
    build_adapter.adapter(world.volumes, new)
    build_adapter.evaluation(world.volumes, new, passed=False)  # rejected
    build_adapter.promote(world.volumes, new_two)
    until(lambda: f", but {NAME}: no adapter for it has passed the gate yet" in caplog.text)
    time.sleep(0.2)
    assert world.served() == world.model(old_plan)
    assert world.ask("granada-hotels").status_code == 200
    assert httpx.get(world.url + "/health").status_code == 200
    assert "refused (base)" not in caplog.text, "what is for the next base model is no fault"

    better, _ = world.write(training__seed=1, **other)
    build_adapter.promote(world.volumes, better)
    until(world.ended)


def test_one_of_several_replicas_ends_in_its_turn_and_goes_on_if_git_changes_its_mind_before(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(drain, "LINGER_SECONDS", 0.0)
    now = clock(monkeypatch)
    monkeypatch.setattr(base, "next_turn", lambda now, slot_seconds, replica: now + 3600)
    for world in start(tmp_path, monkeypatch, restart_slot_seconds=60.0):
        world.write(serving={"max_lora_rank": 128})
        until(lambda: "in its turn" in caplog.text)
        world.write()
        until(lambda world=world: "base" not in world.vllm.guards[-1].aliases._turns)  # type: ignore[misc]
        now[0] += 3600
        world.write(serving={"max_lora_rank": 128})
        until(lambda: caplog.text.count("in its turn") == 2)
        assert httpx.get(world.url + "/health").status_code == 200
        now[0] += 3600
        until(world.ended)


def test_git_may_change_its_mind_while_the_server_looks_whether_it_can_restart(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long that took: looking again waits for a multiple of that time."""
    monkeypatch.setattr(drain, "LINGER_SECONDS", 0.0)
    monkeypatch.setattr(aliases, "FOLLOW_PAUSES", 1e9)
    monkeypatch.setattr(base, "next_turn", lambda now, slot_seconds, replica: now + 3600)
    looks, go_on = threading.Event(), threading.Event()

    def check_restart(*_: object) -> None:
        looks.set()
        assert go_on.wait(20)

    monkeypatch.setattr(base, "check_restart", check_restart)
    for world in start(tmp_path, monkeypatch, restart_slot_seconds=60.0):
        world.write(serving={"max_lora_rank": 128})
        found = world.vllm.guards[-1].aliases
        until(looks.is_set)
        changed = found._declared
        world.write()
        until(lambda found=found, changed=changed: found._declared is not changed)  # type: ignore[misc]
        go_on.set()
        until(lambda found=found: "" not in found._updates)  # type: ignore[misc]
        until(lambda found=found: "base" not in found._turns and "base" not in found._logged)  # type: ignore[misc]
        assert not world.ended()


def test_a_changed_base_model_is_waited_for_and_then_the_server_drains_and_ends(
        world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(drain, "LINGER_SECONDS", 3600.0)
    caplog.set_level("INFO")
    old, old_plan = world.write()
    build_adapter.promote(world.volumes, old)
    assert until(world.served) == world.model(old_plan)
    new, new_plan = world.write(base_model={"source": "builtin:tiny-reference"})
    until(lambda: "is not there yet; until then the server continues unchanged" in caplog.text)
    time.sleep(0.2)
    assert world.served() == world.model(old_plan)  # while the new base model is on its way
    assert httpx.get(world.url + "/health").status_code == 200
    world.vllm.hold = threading.Event()
    with world.stream() as stream:
        lines = stream.iter_lines()
        next(lines)
        build_adapter.base(world.volumes, new_plan)
        build_adapter.promote(world.volumes, new)
        until(lambda: httpx.get(world.url + "/ready").status_code == 503)
        reply = world.ask(BASE)
        assert (reply.status_code, reply.headers["connection"]) == (200, "close")  # until nobody sends new requests
        world.drain(linger=0)  # that time is over
        until(lambda: not listens(world.url))
        assert not world.ended()
        world.vllm.hold.set()
        assert list(lines)[-2] == "data: [DONE]"
    until(world.ended)
    assert f"draining: base model and tokenizer changed to {new_plan.base_model}" in caplog.text


def test_a_new_base_model_that_cannot_be_served_or_is_damaged_does_not_end_the_server(
        world: World, caplog: pytest.LogCaptureFixture) -> None:
    old, old_plan = world.write()
    build_adapter.promote(world.volumes, old)
    assert until(world.served) == world.model(old_plan)
    asked: dict[str, Any] = {"base_model": {"source": "builtin:tiny-reference"},
                             "serving": {"when_base_changes": "at-once"}}
    _, new_plan = build_adapter.load(world.folder / "not served", **asked)
    build_adapter.base(world.volumes, new_plan)
    (new_plan.base_model.path(world.volumes) / "config.json").write_text("{}")
    world.write(**asked)  # last: whole for a moment, the new base model would end the server
    until(lambda: "config.json was changed" in caplog.text or world.ended())
    time.sleep(0.2)
    assert caplog.text.count("config.json was changed") == 1
    assert not world.ended()
    assert world.served() == world.model(old_plan)
    world.write()
    time.sleep(0.2)
    assert not world.ended()


def test_a_rank_above_what_the_server_reserved_is_a_restart(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain, "LINGER_SECONDS", 0.0)
    world.write(serving={"max_lora_rank": 128})
    until(world.ended)


def test_requests_to_the_base_model_are_shielded_from_adapters_where_vllm_would_mix_them_in(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for world in start(tmp_path, monkeypatch, cpu_shield=True):
        until(lambda: f"{BASE}@zero" in world.vllm.loaded)  # noqa: B023 - the loop has one turn
        assert world.ask(BASE).json()["model"] == BASE
        assert world.vllm.asked[-1]["model"] == f"{BASE}@zero"
        pipeline, planned = world.write()
        build_adapter.promote(world.volumes, pipeline)
        assert until(world.served) == world.model(planned)
        listed = httpx.get(world.url + "/v1/models").json()["data"]
        assert [card["id"] for card in listed] == [BASE, NAME]
        zero = Path(world.vllm.loaded[f"{BASE}@zero"])
        assert not any(t.any() for t in load_file(zero / "adapter_model.safetensors").values())


def listens(url: str) -> bool:
    host, _, port = url.removeprefix("http://").partition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError:
        return False
    return True


def test_an_alias_that_is_renamed_while_its_adapter_is_verified_is_not_reported_as_served(
        world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_verified, verifying, go_on = verification.copy_verified, threading.Event(), threading.Event()

    def slowly(name: str, *rest: Any) -> Path:
        if name == NAME:
            verifying.set()
            go_on.wait(20)
        return copy_verified(name, *rest)

    monkeypatch.setattr(verification, "copy_verified", slowly)
    pipeline, planned = world.write(training__seed=47)  # of no other test: metrics belong to the process
    build_adapter.promote(world.volumes, pipeline)
    assert verifying.wait(20)
    (world.files / f"{NAME}.yaml").unlink()
    until(lambda: world.ask().status_code == 404)
    go_on.set()
    until(lambda: world.model(planned) in world.vllm.ever_loaded)
    until(lambda: not world.vllm.loaded)
    assert world.metric("serving_adapter_info", alias=NAME, digest=planned.adapter.digest) == 0


def test_a_version_whose_removal_failed_halfway_is_loaded_again_before_it_answers(
        world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    first, first_plan = world.write()
    build_adapter.promote(world.volumes, first)
    assert until(world.served) == world.model(first_plan)
    remove_lora = world.vllm.engine.remove_lora
    failed = threading.Event()

    async def fails(_: int) -> bool:
        failed.set()
        raise TimeoutError

    monkeypatch.setattr(world.vllm.engine, "remove_lora", fails)
    monkeypatch.setattr("serving.aliases.BACKOFF_SECONDS", 0.5)
    second, second_plan = world.write(training__seed=1)
    build_adapter.promote(world.volumes, second)
    until(lambda: world.served() == world.model(second_plan))
    assert failed.wait(20)
    world.write()  # a revert; vLLM has forgotten the version, but its slot is still taken
    monkeypatch.setattr(world.vllm.engine, "remove_lora", remove_lora)
    while world.served() != world.model(first_plan):
        assert world.ask().status_code == 200
        time.sleep(0.01)
    until(lambda: list(world.vllm.engine.adapters.values()) == [world.model(first_plan)])


# --- signatures -------------------------------------------------------------------------------------------------------


def signing(*names: str) -> dict[str, Any]:
    return {"signing": {"public_keys": [pair(name).public for name in names]}}


def test_only_a_signed_adapter_goes_live_and_a_forged_one_is_refused_and_counted(
        world: World, caplog: pytest.LogCaptureFixture) -> None:
    before = world.metric("serving_refusals_total", alias=NAME, reason="signature")
    pipeline, planned = world.write(**signing("one"))
    build_adapter.promote(world.volumes, pipeline)
    until(lambda: "refused (signature)" in caplog.text)
    assert "environment.yaml asks for signatures" in caplog.text
    assert until(lambda: world.metric("serving_refusals_total", alias=NAME, reason="signature")) > before
    assert (world.served(), world.vllm.ever_loaded) == (None, [])
    build_signing.sign_all(world.volumes, pair("another"))
    until(lambda: "none of signing.public_keys" in caplog.text)
    assert (world.served(), world.vllm.ever_loaded) == (None, [])
    build_signing.sign_all(world.volumes, pair("one"))
    assert until(world.served) == world.model(planned)


def test_the_key_is_changed_without_a_restart_and_what_is_in_service_stays(
        world: World, caplog: pytest.LogCaptureFixture) -> None:
    pipeline, planned = world.write(**signing("one"))
    build_adapter.promote(world.volumes, pipeline)
    build_signing.sign_all(world.volumes, pair("one"))
    assert until(world.served) == world.model(planned)
    second, second_plan = world.write(training__seed=1, **signing("one"))
    build_adapter.promote(world.volumes, second)
    build_signing.sign(second_plan.adapter.path(world.volumes), pair("two"))
    build_signing.sign(second_plan.evaluation.path(world.volumes), pair("two"))
    until(lambda: "none of signing.public_keys" in caplog.text)
    assert world.served() == world.model(planned)
    world.write(training__seed=1, **signing("one", "two"))  # the new key is added
    until(lambda: world.served() == world.model(second_plan))
    world.write(training__seed=1, **signing("two"))  # and the old one removed
    time.sleep(0.3)
    assert world.served() == world.model(second_plan)
    world.write(**signing("two"))  # git revert, to an adapter of the old key
    until(lambda: caplog.text.count("refused (signature)") > 1)
    assert world.served() == world.model(second_plan)


def test_switching_signatures_on_leaves_in_service_what_is_until_there_is_a_signed_one(
        world: World, caplog: pytest.LogCaptureFixture) -> None:
    pipeline, planned = world.write()
    build_adapter.promote(world.volumes, pipeline)
    assert until(world.served) == world.model(planned)
    world.write(**signing("one"))
    until(lambda: "refused (signature)" in caplog.text)
    time.sleep(0.2)
    assert world.served() == world.model(planned)
