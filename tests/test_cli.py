"""Promises of the command line: it teaches, it answers at once, and its exit codes mean what base/ takes them to."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import __main__ as cli
from jobs.core import command, termination
from jobs.core.errors import RetryableError, Terminated, UserError
from jobs.tools.pods import CHECKOUT
from tests import build_pipeline


def jobs(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "jobs", *arguments], cwd=CHECKOUT, capture_output=True, text=True,
                          check=False)


def test_help_names_every_command_and_shows_examples() -> None:
    done = jobs("--help")
    assert done.returncode == 0
    for word in ("relocate", "train", "evaluate", "await", "new", "pin", "check", "local", "examples"):
        assert word in done.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["check", "overlays/kind"], ["local", "--help"], ["new", "--help"]])
def test_it_answers_without_loading_torch(arguments: list[str]) -> None:
    """Loading torch and transformers takes seconds; `--help`, `check` and a typo must not."""
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "jobs", *arguments], cwd=CHECKOUT,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "jobs.tools.local" in modules, "the measurement works"
    assert not modules & {"torch", "transformers", "peft", "datasets", "vllm", "huggingface_hub"}


@pytest.mark.parametrize("command", ["new", "pin", "check"])
@pytest.mark.parametrize("path", ["absent", ".", "file"])
def test_a_path_that_is_no_overlay_is_one_line(tmp_path: Path, command: str, path: str) -> None:
    (tmp_path / "file").touch()
    done = jobs(command, str(tmp_path / path), *(["reviews"] if command == "new" else []))
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "Name an overlay" in done.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("command", ["pin", "check"])
def test_help_of_what_takes_an_overlay_names_the_folder_of_an_adapter_too(command: str) -> None:
    done = jobs(command, "--help")
    assert done.returncode == 0
    assert "overlays/kind/adapters/NAME" in " ".join(done.stdout.split())


def test_bad_input_is_one_message_and_exit_code_2(tmp_path: Path) -> None:
    build_pipeline.write(tmp_path, training__lora__r=0)
    done = jobs("--pipeline", str(tmp_path / "pipeline.yaml"), "train")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_missing_input_is_exit_code_1(tmp_path: Path) -> None:
    build_pipeline.write(tmp_path)
    done = jobs("--pipeline", str(tmp_path / "pipeline.yaml"), "--volumes", str(tmp_path), "--wait-seconds", "0",
                "await", "base-model")
    assert done.returncode == 1
    assert "base-model/" in done.stderr


@pytest.mark.parametrize(("error", "code", "message"), [
    (UserError("change it"), 2, "change it"),
    (RetryableError("later"), 1, "later"),
    (Terminated("stopped"), 143, "stopped"),
    (OSError(errno.ENOSPC, "No space left on device", "/volumes/x"), 2, "the disk is full while writing /volumes/x"),
    (OSError(errno.EDQUOT, "Quota exceeded", "/volumes/x"), 2, "`retention.keep` in environment.yaml"),
    (PermissionError(errno.EACCES, "Permission denied", "/volumes/x"), 2, "/volumes/x: Permission denied for user"),
    (IsADirectoryError(errno.EISDIR, "Is a directory", "/volumes/x"), 2, "/volumes/x: Is a directory: another kind of"),
    (OSError(errno.ELOOP, "Too many levels", "/volumes/x"), 2, "/volumes/x: Too many levels: another kind of file is"),
    (OSError(errno.ESTALE, "Stale file handle", "/volumes/x"), 1, "/volumes/x: Stale file handle: its volume fails"),
])
def test_an_error_has_its_exit_code_and_its_reason_where_kubernetes_shows_it(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
        error: BaseException, code: int, message: str) -> None:
    def fail(_: object) -> None:
        raise error

    log = tmp_path / "termination-log"
    log.touch()
    monkeypatch.setattr(cli, "run", fail)
    monkeypatch.setattr(termination, "TERMINATION_LOG", log)
    assert cli.main(["train"]) == code
    assert message in capsys.readouterr().err
    assert message in log.read_text()


def test_the_termination_log_stays_within_what_kubernetes_keeps(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "termination-log"
    log.touch()
    monkeypatch.setattr(termination, "TERMINATION_LOG", log)
    command.fail("x" + "é" * 5000, 2)
    assert log.read_text() == "x" + "é" * 2047, "no half a character at the end"


def test_a_message_that_utf8_cannot_encode_is_reported_all_the_same(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A file's name, or JSON's `\\ud800`, can hold a lone surrogate."""
    log = tmp_path / "termination-log"
    log.touch()
    monkeypatch.setattr(termination, "TERMINATION_LOG", log)
    assert command.fail("data-\udcff.jsonl: no such file", 2) == 2
    assert log.read_text() == r"data-\udcff.jsonl: no such file"
    assert capsys.readouterr().err == "error: data-\\udcff.jsonl: no such file\n"


def test_a_training_worker_leaves_its_error_to_the_launcher(tmp_path: Path) -> None:
    build_pipeline.write(tmp_path, training__seed=-1)
    done = subprocess.run([sys.executable, "-m", "jobs", "--pipeline", str(tmp_path / "pipeline.yaml"), "train"],
                          cwd=CHECKOUT, capture_output=True, text=True, check=False,
                          env={**os.environ, "JOBS_WORKER_ERRORS": str(tmp_path), "RANK": "3", "WORLD_SIZE": "4",
                               "LOCAL_RANK": "3"})
    assert done.returncode == 2
    assert done.stderr == ""
    assert (tmp_path / "3").read_text().startswith(f"2 {tmp_path}/pipeline.yaml:")


@pytest.mark.parametrize("program", ["jobs", "serving"])
@pytest.mark.parametrize("value", ["abc", "-1", "nan", "inf"])
def test_a_setting_in_the_environment_that_is_no_number_is_one_line(program: str, value: str) -> None:
    done = subprocess.run([sys.executable, "-m", program, *(["train"] if program == "jobs" else [])], cwd=CHECKOUT,
                          env={**os.environ, "WAIT_SECONDS": value}, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    *usage, line = done.stderr.splitlines()  # serving prints its usage first
    assert "error: " in line and "WAIT_SECONDS" in line and f"'{value}'" in line
    assert len(usage) <= 1


def test_a_wrong_setting_in_the_environment_does_not_take_the_help_away() -> None:
    done = subprocess.run([sys.executable, "-m", "jobs", "--help"], cwd=CHECKOUT, capture_output=True, text=True,
                          env={**os.environ, "WAIT_SECONDS": "abc"}, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("value", ["abc", "-1", "nan", "inf", ""])
def test_a_flag_that_is_no_number_is_one_line(value: str) -> None:
    done = jobs(f"--wait-seconds={value}", "train")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert f"--wait-seconds is {value!r}, but must be a number of at least 0" in done.stderr


def test_how_patient_relocation_is_must_be_a_number_too(tmp_path: Path) -> None:
    build_pipeline.write(tmp_path)
    done = subprocess.run([sys.executable, "-m", "jobs", "--pipeline", str(tmp_path), "relocate", "dataset"],
                          cwd=CHECKOUT, env={**os.environ, "RETRY_ATTEMPTS": "many"}, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: RETRY_ATTEMPTS is 'many', but must be a whole number of at least 1; ")
    assert len(done.stderr.splitlines()) == 1


def test_our_own_mistakes_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "run", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["train"])


def test_sigterm_ends_a_waiting_stage_at_once(tmp_path: Path) -> None:
    """As a container's first process Python would ignore SIGTERM and be killed a grace period later."""
    build_pipeline.write(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs", "--pipeline", str(tmp_path / "pipeline.yaml"), "--volumes", str(tmp_path),
         "await", "base-model"], cwd=CHECKOUT, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    assert "waiting for base-model" in process.stderr.readline()
    os.kill(process.pid, signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143, stderr
    assert "stopped by SIGTERM" in stderr


def test_a_command_ends_without_a_search_for_garbage_in_all_that_it_imported() -> None:
    """Python's last one takes over a second in each stage that imported torch."""
    code = ("import gc, runpy, sys; sys.argv = ['jobs', '--pipeline', 'missing', 'await', 'base-model']\n"
            "try: runpy.run_module('jobs', run_name='__main__')\n"
            "except SystemExit as ended: print(ended.code, gc.get_freeze_count() > 10_000)")
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "True"]
