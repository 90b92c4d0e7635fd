"""Mode merged: base model and adapter as one model, for architectures on which vLLM has no LoRA, such as GPT-2.

vLLM runs the merged model as a plain one under NAME@DIGEST, behind the same guard and alias. It runs one model, so
the base model is not served beside it, and a swap is a restart: when another adapter is to be served and its merged
model is there and whole, the server drains and ends, to be started again with it. Until the first one is there, it
runs the base model.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp

from jobs.core import artifacts, models
from jobs.core.errors import UserError
from jobs.core.pipeline import Pipeline
from jobs.core.plan import merged_model
from serving import adapters, base
from serving.adapters import NotYet, Refused, Served, Wanted
from serving.aliases import Aliases, Version

log = logging.getLogger("serving")

SUFFIXES = (".safetensors", ".json")


def choose(named: base.Named, served: Served) -> Served:
    """What to run at start: the first merged model of the first alias that may be served; else the base model.

    Args:
        named: the pipelines by alias. The first decides, since one model runs.
    """
    name, pipeline = next(iter(named.items()))
    volumes = Path(served.volumes)
    for wanted in _candidates(name, pipeline, volumes):
        try:
            for folder in (adapters.evaluation_folder(wanted.evaluation, volumes), folder_of(wanted.adapter, served)):
                adapters.signature(folder)  # says so if it is not there yet
            adapters.check_gate(wanted, name, volumes)
            verify(wanted.adapter, served)
        except (NotYet, Refused) as reason:
            log.warning("%s@%s: %s", name, wanted.adapter, reason)
            continue
        return replace(served, merged=f"{name}@{wanted.adapter}")
    return served


def _candidates(name: str, pipeline: Pipeline | None, volumes: Path) -> Iterator[Wanted]:
    if pipeline:
        yield adapters.asked(pipeline, volumes)
    try:
        yield adapters.promoted(name, volumes)
    except (NotYet, Refused) as reason:
        log.warning("%s: %s", name, reason)
    yield from adapters.earlier(name, volumes)


def folder_of(adapter: str, served: Served) -> Path:
    """Where the merged model of an adapter (its digest) is, or will be."""
    adapters.adapter_folder(adapter, Path(served.volumes))  # refuses what is not a digest
    return merged_model(adapter, served.base_model).path(Path(served.volumes))


def vllm_arguments(served: Served) -> list[str]:
    """vLLM's flags that say which model to run, and under which name."""
    if served.merged is None:
        return ["--model", served.base_folder, "--served-model-name", served.base_name]
    folder = folder_of(served.merged.partition("@")[2], served)
    return ["--model", str(folder), "--served-model-name", served.merged]


def verify(adapter: str, served: Served) -> None:
    """Return if the adapter's merged model is whole, of the base model's architecture, and finite throughout.

    In place and not as a copy, unlike an adapter: it is as large as the base model, which is read in place too.

    Raises:
        Refused: naming the first thing that is wrong.
    """
    folder = folder_of(adapter, served)
    try:
        manifest = artifacts.read(folder).manifest
        if models.architecture(folder) != models.architecture(Path(served.base_folder)):
            raise Refused("base", f"{folder}: its architecture is not the base model's")
    except UserError as error:
        raise Refused("damaged", str(error)) from None
    wrong = [each["path"] for each in manifest["files"] if not each["path"].endswith(SUFFIXES)]
    if wrong:
        raise Refused("files", f"{folder}: holds {wrong[0]}; only {', '.join(SUFFIXES)} files are taken, no pickles")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise Refused("files", f"{folder}: holds no weights")
    for file in files:
        _check_finite(file)


def _check_finite(file: Path) -> None:
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118 - not a mapping
                tensor: Any = weights.get_tensor(key)
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    raise Refused("values", f"{file}: {key} holds NaN or infinite values")
    except SafetensorError as error:
        raise Refused("damaged", f"{file} is not a whole safetensors file ({error})") from None


class MergedAliases(Aliases):
    """The alias of a server in mode merged: it points to the model that runs, or the server restarts with another."""

    def __init__(self, served: Served, vllm: ASGIApp, restart: Callable[[str], None]) -> None:
        super().__init__(served, vllm, restart)
        self._verified: set[str] = set()

    async def _prepare_base(self) -> None:
        """Prove the model that runs, before the alias points to it."""
        if self.served.merged is None:
            return
        name, _, digest = self.served.merged.partition("@")
        version = Version(name, digest)
        if await self._logprobs(version.model) is not None:
            self._loaded.append(version)

    def _folder(self, digest: str) -> Path:
        return folder_of(digest, self.served)

    async def _admit(self, version: Version) -> None:
        if version.model == self.served.merged:
            raise Refused("values", "vLLM cannot compute finite probabilities with it")
        if version.model not in self._verified:  # once: the server may wait for its turn to restart
            await asyncio.to_thread(verify, version.digest, self.served)
            self._verified.add(version.model)
        self._restart_in_turn("merged", f"{version.model} is there to be served, and in mode merged that is a restart")
        raise NotYet("the server restarts with it")

    async def _unload_unused(self) -> None:
        """Nothing: the model that runs is what the process is there for."""
