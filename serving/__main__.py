"""Starts the inference server: `python -m serving --help`.

Reads the pipeline files, waits for the base model and the tokenizer, and becomes vLLM's OpenAI server with the guard in
it. Exit codes as for the jobs: 2 when somebody must change something, else vLLM's own.
"""

from __future__ import annotations

import argparse
import logging
import os
import runpy
import shutil
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

from jobs import artifacts, models, pipeline
from jobs.__main__ import fail
from jobs.errors import RetryableError, Terminated, UserError
from jobs.plan import Plan, plan
from serving.adapters import Served, pipeline_files

log = logging.getLogger("serving")

DESCRIPTION = """\
Serve the base model and its fine-tuned adapters over vLLM's OpenAI-compatible API.

The base model answers as soon as vLLM is up; an adapter joins, with no restart, when it is promoted. Set VLLM_API_KEY
to require a key. Flags that are not listed here go to vLLM, for example --max-model-len or --enforce-eager.
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
    top.add_argument("--wait-seconds", type=float, default=float(os.environ.get("WAIT_SECONDS", 6 * 3600)), metavar="S",
                     help="how long to wait for base model and tokenizer (default: $WAIT_SECONDS, else 6 hours)")
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


def load(folder: Path) -> list[tuple[pipeline.Loaded, Plan]]:
    """Every pipeline in the folder and its plan. They share what one vLLM process can have only one of.

    Raises:
        UserError: when there is none, one is invalid, two have the same name, or they do not share the base.
    """
    loaded = [pipeline.load(file) for file in pipeline_files(folder)]
    if not loaded:
        raise UserError(f"{folder}: no pipeline files; there must be at least one {folder}/NAME/pipeline.yaml")
    plans = [plan(each.pipeline) for each in loaded]
    first = loaded[0]
    for other, planned in zip(loaded[1:], plans[1:], strict=True):
        for key, same in (("base_model", planned.base_model == plans[0].base_model),
                          ("tokenizer", planned.tokenizer == plans[0].tokenizer),
                          ("serving.max_lora_rank", other.pipeline.serving == first.pipeline.serving)):
            if not same:
                raise UserError(f"{other.path}: {key} is not the same as in {first.path}; one server serves adapters "
                                "of one base model. Give the pipelines a server each")
    names = [each.pipeline.adapter for each in loaded]
    for each, name in zip(loaded, names, strict=True):
        if names.count(name) > 1:
            raise UserError(f"{each.path}: the adapter name {name} is taken by another pipeline file in {folder}")
    return list(zip(loaded, plans, strict=True))


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
    """Wait for what is served and become vLLM's server; returns when that ends."""
    check_flags(flags)
    loaded = load(args.pipelines)
    check_port(args.host, args.port)
    (first, planned) = loaded[0]
    base, tokenizer = artifacts.wait([planned.base_model, planned.tokenizer], args.volumes, args.wait_seconds)
    models.check_servable(models.architecture(base.path), f"{first.path}: base_model")

    served = Served(pipelines=str(args.pipelines), volumes=str(args.volumes),
                    base_name=first.pipeline.base_model.name, base_model=base.digest, tokenizer=tokenizer.digest,
                    base_folder=str(base.path), max_lora_rank=first.pipeline.serving.max_lora_rank,
                    private_folder=str(private_folder(args.port)))
    os.environ.update(served.to_environment())
    os.environ.update(environment(flags))
    log.info("serving %s (%s) on %s:%d, adapters: %s", served.base_name, served.base_model, args.host, args.port,
             ", ".join(each.pipeline.adapter for each, _ in loaded))
    sys.argv = [MODULE, *vllm_arguments(served, tokenizer.path, args.host, args.port, len(loaded)), *flags]
    # In this process and not by exec: as a container's first process, Python would ignore SIGTERM until vLLM, after
    # many seconds of imports, sets its own handler; ours is in place all the while.
    runpy.run_module(MODULE, run_name="__main__", alter_sys=True)


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
    """vLLM's command line. What follows it on the line, from the user, overrides `--max-loras` alone."""
    return ["--model", served.base_folder, "--tokenizer", str(tokenizer), "--served-model-name", served.base_name,
            "--enable-lora", "--max-lora-rank", str(served.max_lora_rank),
            "--max-loras", str(adapters + 1),  # one more, for a new version beside the old one
            "--middleware", "serving.guard.Guard", "--host", host, "--port", str(port)]


def log_to_stderr() -> None:
    """Give our loggers a handler of their own: a library that vLLM imports silences the root logger below ERROR."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    for name in ("jobs", "serving"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
        logger.propagate = False


def terminate(*_: object) -> NoReturn:
    """End at once: there is nothing to save, and an exception could be caught by what happens to be imported."""
    os._exit(fail("stopped by SIGTERM before vLLM was up", Terminated.exit_code))


def main(argv: list[str] | None = None) -> int:
    log_to_stderr()
    args, flags = parser().parse_known_args(argv)
    signal.signal(signal.SIGTERM, terminate)
    try:
        run(args, flags)
    except (UserError, RetryableError) as error:
        return fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    return 0


if __name__ == "__main__":
    sys.exit(main())
