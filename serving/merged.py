"""Mode merged: base model and adapter as one model, for architectures on which vLLM has no LoRA, such as GPT-2.

vLLM runs the merged model as a plain one under NAME@DIGEST, behind the same guard and alias. It runs one model, so
the base model is not served beside it, and a swap is a restart: when another adapter is to be served and its merged
model is there and whole, the server drains and ends, to be started again with it. Until the first one is there, it
runs the base model.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp

from jobs.core import artifacts, models
from jobs.core.errors import UserError
from jobs.core.pipeline import Pipeline
from jobs.core.plan import merged_model
from serving import base, candidates, untrusted, verification
from serving.aliases import Aliases, Version
from serving.candidates import Candidate
from serving.refusal import NotYet, Refused
from serving.served import Served

log = logging.getLogger("serving")

SUFFIXES = (".safetensors", ".json")


def choose(named: base.Named, served: Served) -> Served:
    """What to run at start: the first merged model of the first alias that may be served; else the base model.

    Args:
        named: the pipelines by alias. The first decides, since one model runs.
    """
    name, pipeline = next(iter(named.items()))
    volumes = Path(served.volumes)
    unfit = _unfit(served)
    for candidate in _candidates(name, pipeline, volumes):
        if f"{name}@{candidate.adapter}" in unfit:
            log.warning("%s@%s: its probabilities were not finite when it ran", name, candidate.adapter)
            continue
        try:
            evaluation = candidates.evaluation_folder(candidate.evaluation, volumes)
            for folder in (evaluation, folder_of(candidate.adapter, served)):
                untrusted.signature(folder)  # says so if it is not there yet
            verification.check_gate(candidate, name, volumes)
            verify(candidate.adapter, served)
        except (NotYet, Refused) as reason:
            log.warning("%s@%s: %s", name, candidate.adapter, reason)
            continue
        return replace(served, merged=f"{name}@{candidate.adapter}")
    return served


def _candidates(name: str, pipeline: Pipeline | None, volumes: Path) -> Iterator[Candidate]:
    if pipeline:
        yield candidates.desired(pipeline)
    try:
        yield candidates.promoted(name, volumes)
    except (NotYet, Refused) as reason:
        log.warning("%s: %s", name, reason)
    try:
        yield from candidates.earlier(name, volumes)
    except Refused as reason:
        log.warning("%s: %s", name, reason)


def _unfit_file(served: Served) -> Path:
    """Remembers across restarts which merged models ran and gave nothing finite.

    Without it the server would restart without end: with the one before, then with the unfit one again, which is
    the first that is verified. It is in the pod's temporary folder, so a new pod finds out once more.
    """
    folder = Path(served.private_folder)
    return folder.with_name(f"{folder.name}.unfit")


def _unfit(served: Served) -> set[str]:
    file = _unfit_file(served)
    try:
        with open(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), encoding="utf-8") as stream:  # noqa: PTH123
            ours = os.fstat(stream.fileno()).st_uid == os.getuid()  # temporary folders are everybody's
            return set(stream.read(2**20).split("\n")) if ours else set()
    except (OSError, ValueError):
        return set()


def _remember_unfit(served: Served, model: str) -> None:
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        with open(os.open(_unfit_file(served), flags, 0o600), "a", encoding="utf-8") as stream:  # noqa: PTH123
            stream.write(f"{model}\n")
    except OSError as error:
        log.warning("cannot remember that %s is unfit: %s", model, error)


def folder_of(adapter: str, served: Served) -> Path:
    """Where the merged model of an adapter (its digest) is, or will be."""
    candidates.adapter_folder(adapter, Path(served.volumes))  # refuses what is not a digest
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
        self._ran_unfit: str | None = None  # the model that runs, if its probabilities are not finite

    async def _prepare_base(self) -> None:
        """Prove the model that runs, before the alias points to it. To be tried again until vLLM answers."""
        if self.served.merged is None:
            return
        name, _, digest = self.served.merged.partition("@")
        version = Version(name, digest)
        try:
            await self.engine.logprobs(version.model)
        except Refused:
            self._ran_unfit = version.model
            await asyncio.to_thread(_remember_unfit, self.served, version.model)
        else:
            self._loaded.append(version)

    def _folders(self, candidate: Candidate) -> tuple[Path, Path]:
        return (candidates.evaluation_folder(candidate.evaluation, self._volumes),
                folder_of(candidate.adapter, self.served))

    async def _admit(self, version: Version) -> None:
        if version.model == self._ran_unfit or version.model in await asyncio.to_thread(_unfit, self.served):
            raise Refused("values", "vLLM cannot compute finite probabilities with it")
        if version.model not in self._verified:  # once: the server may wait for its turn to restart
            await asyncio.to_thread(verify, version.digest, self.served)
            self._verified.add(version.model)
        self._restart_in_turn("merged", f"{version.model} is there to be served, and in mode merged that is a restart")
        raise NotYet("the server restarts with it")

    async def _unload_unused(self) -> None:
        """Nothing: the model that runs is what the process is there for."""
