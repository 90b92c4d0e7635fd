"""Starts the inference server: `python -m serving --help`.

Reads the pipeline files, waits for the base model and the tokenizer, and becomes vLLM's OpenAI server with the guard in
it. Exit codes: 0 when it was told to stop or has to be started again to follow the pipeline files; 2 when somebody must
change something; 1 when vLLM ended by itself.
"""

from __future__ import annotations

import argparse
import logging
import os
import runpy
import shutil
import socket
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from jobs.core import variables
from jobs.core.command import fail, run_command
from jobs.core.errors import RetryableError, Terminated, UserError
from serving import base, cpu_shield, drain, merged
from serving.adapters import Served
from serving.events import log_to_stderr

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


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m serving", description=DESCRIPTION, allow_abbrev=False,
                                  formatter_class=argparse.RawDescriptionHelpFormatter,
                                  usage="python -m serving [options] [vLLM's flags…]")
    top.add_argument("--pipelines", type=Path, default=Path(os.environ.get("PIPELINES", "/etc/pipelines")),
                     metavar="DIR", help="where the pipeline files are, one folder each: DIR/*/pipeline.yaml "
                                         "(default: $PIPELINES, else %(default)s)")
    top.add_argument("--volumes", type=Path, default=Path(os.environ.get("VOLUMES", "/volumes")), metavar="DIR",
                     help="where the volumes are mounted, one folder each (default: $VOLUMES, else %(default)s)")
    top.add_argument("--wait-seconds", type=float, default=variables.wait_seconds(), metavar="S",
                     help="how long to wait for base model and tokenizer (default: $WAIT_SECONDS, else 6 hours)")
    top.add_argument("--wait", action="store_true",
                     help="only wait until base model and tokenizer are there to start with, as an init container")
    top.add_argument("--drain-seconds", type=float, default=variables.number("DRAIN_SECONDS", 55), metavar="S",
                     help="how long the last requests may take when the server ends (default: $DRAIN_SECONDS, else 55)")
    top.add_argument("--restart-slot-seconds", type=float, default=variables.number("RESTART_SLOT_SECONDS", 0),
                     metavar="S", help="for several replicas: how long a restart takes. Each restarts by itself in a "
                                       "time slot of its own (default: $RESTART_SLOT_SECONDS, else 0: at once)")
    top.add_argument("--host", default="0.0.0.0", help="the address to listen on (default: %(default)s)")  # noqa: S104
    top.add_argument("--port", type=int, default=8000, help="the port to listen on (default: %(default)s)")
    return top


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
    check_port(args.host, args.port)
    start = base.start(args.pipelines, args.volumes, args.wait_seconds)
    base_folder, tokenizer = start.base.folders(args.volumes)
    served = Served(pipelines=str(args.pipelines), volumes=str(args.volumes), base_name=start.base_name,
                    base_model=start.base.base_model, tokenizer=start.base.tokenizer, base_folder=str(base_folder),
                    mode=start.base.mode, max_lora_rank=start.max_lora_rank, drain_seconds=args.drain_seconds,
                    restart_slot_seconds=args.restart_slot_seconds, private_folder=str(private_folder(args.port)))
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
            "--disable-access-log-for-endpoints", "/health,/metrics"]
    if served.mode == "merged":
        return [*merged.vllm_arguments(served), *ours]
    return ["--model", served.base_folder, "--served-model-name", served.base_name, *ours,
            "--enable-lora", "--max-lora-rank", str(served.max_lora_rank),
            # one more, for a new version beside the old one
            "--max-loras", str(adapters + 1 + cpu_shield.slots(served))]


def terminate(*_: object) -> NoReturn:
    """End at once: there is nothing to save, and an exception could be caught by what happens to be imported."""
    os._exit(fail("stopped by SIGTERM before vLLM was up", Terminated.exit_code))


def main(argv: list[str] | None = None) -> int:
    return run_command(lambda: run(*parser().parse_known_args(argv)), set_up_logging=log_to_stderr,
                       on_sigterm=terminate)


if __name__ == "__main__":
    sys.exit(main())
