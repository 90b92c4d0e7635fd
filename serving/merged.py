"""Mode merged: base model and adapter as one model, for architectures on which vLLM has no LoRA, such as GPT-2.

vLLM runs the merged model as a plain model named NAME@DIGEST, behind the same guard and alias. A server runs one model,
so the base model is not served beside it, and every swap is a restart: when another merged model may be served, the
server drains and exits, to be restarted with it. Until there is a merged model, the server runs the base model.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp

from jobs.core import artifacts, models
from jobs.core.errors import UserError
from jobs.core.imported import Adapter
from jobs.core.plan import merged_model
from serving import candidates, events, untrusted, verification
from serving.aliases import Alias, Aliases, Version
from serving.candidates import Candidate
from serving.files import Declared
from serving.refusal import NotYet, Reason, Refused
from serving.served import Served

log = logging.getLogger("serving")

SUFFIXES = (".safetensors", ".json")
UNFIT = "with it, vLLM did not answer as was evaluated"
UNFIT_REASONS: tuple[Reason, ...] = ("values", "proof")  # what the model in vLLM can be refused for


def choose(declared: Declared, served: Served) -> Served:
    """Choose the model to run: the best merged model of the first alias (by name) that has one; else the base model."""
    volumes = Path(served.volumes)
    unfit = _unfit(served)
    for name, pipeline in declared.adapters.items():
        for candidate in candidates.in_order(name, pipeline, volumes):
            if reason := unfit.get(f"{name}@{candidate.adapter}"):
                log.warning("%s@%s: %s (%s)", name, candidate.adapter, UNFIT, reason)
                continue
            try:
                evaluation = candidates.evaluation_folder(candidate.evaluation, volumes)
                for folder in (evaluation, folder_of(candidate.adapter, served)):
                    untrusted.state_of(folder)  # raises NotYet if it is not there
                verification.check_gate(candidate, name, volumes, declared.trusted_keys)
                verification.read_proof(evaluation, declared.trusted_keys)
                verify(candidate.adapter, served, declared.trusted_keys)
            except (NotYet, Refused) as reason:
                log.warning("%s@%s: %s", name, candidate.adapter, reason)
                continue
            if len(declared.adapters) > 1:
                log.warning("in mode merged one adapter runs: %s, the first by name that can be served. These wait: %s",
                            name, ", ".join(each for each in declared.adapters if each != name))
            return replace(served, merged=f"{name}@{candidate.adapter}", evaluation=candidate.evaluation)
    return served


def _unfit_file(served: Served) -> Path:
    """A list, kept across restarts, of the merged models that failed their proof in vLLM, each with the reason.

    Without it the server would restart in a loop, with the previous model and then with the unfit one, which passes the
    checks of its files. The list is in the pod's temporary folder, so a new pod tries the model once more.
    """
    folder = Path(served.private_folder)
    return folder.with_name(f"{folder.name}.unfit")


def _unfit(served: Served) -> dict[str, Reason]:
    file = _unfit_file(served)
    try:
        with open(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), encoding="utf-8") as stream:  # noqa: PTH123
            ours = os.fstat(stream.fileno()).st_uid == os.getuid()  # other users can write to a temporary folder
            lines = stream.read(2**20).split("\n") if ours else []
    except (OSError, ValueError):
        return {}
    return {line.partition(" ")[0]: next((each for each in UNFIT_REASONS if each == line.partition(" ")[2]), "proof")
            for line in lines if line}


def _remember_unfit(served: Served, model: str, reason: Reason) -> None:
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        with open(os.open(_unfit_file(served), flags, 0o600), "a", encoding="utf-8") as stream:  # noqa: PTH123
            stream.write(f"{model} {reason}\n")
    except OSError as error:
        log.warning("cannot remember that %s is unfit: %s", model, error)


def folder_of(adapter: str, served: Served) -> Path:
    """Where the merged model of an adapter (its digest) is, or will be."""
    candidates.adapter_folder(adapter, Path(served.volumes))  # refuses what is not a digest
    return merged_model(adapter, served.base_model).path(Path(served.volumes))


def vllm_arguments(served: Served) -> list[str]:
    """vLLM's flags for the model to run and its name."""
    if served.merged is None:
        return ["--model", served.base_folder, "--served-model-name", served.base_name]
    folder = folder_of(served.merged.partition("@")[2], served)
    return ["--model", str(folder), "--served-model-name", served.merged]


def verify(adapter: str, served: Served, keys: Sequence[str] = ()) -> None:
    """Return if the adapter's merged model is whole, has the base model's architecture, and is finite throughout.

    Unlike an adapter it is not copied: it is as large as the base model, which is read in place too.

    Args:
        keys: the trusted public keys, if the environment file asks for signatures.
    Raises:
        Refused: naming the first thing that is wrong.
    """
    folder, trained_folder = folder_of(adapter, served), candidates.adapter_folder(adapter, Path(served.volumes))
    manifest = untrusted.read_artifact(folder, "merged-model", keys).manifest
    trained = untrusted.read_artifact(trained_folder, "adapter", keys).manifest if keys else untrusted.read_json(
        trained_folder / artifacts.MANIFEST, "damaged", "is missing or damaged")
    verification.check_template(trained, served)
    try:
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
    """The alias of a server in mode merged points to the model that runs; another one needs a restart."""

    def __init__(self, served: Served, vllm: ASGIApp, restart: Callable[[str], None]) -> None:
        super().__init__(served, vllm, restart)
        self._verified: set[str] = set()
        self._needs_restart: set[str] = set()  # the aliases for which the last look found another model to run
        self._ran_unfit: Refused | None = None  # why the model that runs is not served, if it failed its proof

    async def _prepare_base(self) -> None:
        """Prove the model that runs, before the alias points to it. Raises until vLLM answers."""
        if self.served.merged is None or self.served.evaluation is None:
            return
        name, _, digest = self.served.merged.partition("@")
        version = Version(name, digest)
        evaluation = candidates.evaluation_folder(self.served.evaluation, self._volumes)
        try:
            version.proof = await asyncio.to_thread(verification.read_proof, evaluation, self._keys)
            await self._prove(version)
        except Refused as refused:
            self._ran_unfit = refused
            if refused.reason in UNFIT_REASONS:  # else `choose` finds it, too
                await asyncio.to_thread(_remember_unfit, self.served, version.model, refused.reason)
        else:
            self._loaded[version.model] = version

    async def _probe(self, version: Version) -> None:
        await self.engine.logprobs(version.model)  # there is no base model beside it to compare it with

    async def _update(self, name: str, alias: Alias, pipeline: Adapter | None) -> None:
        runs = self.served.merged and self.served.merged.partition("@")[0]
        # As in `choose`: a restart would not bring an alias behind the one that runs.
        if runs and name > runs and runs in self.current and self._ran_unfit is None:
            alias.why = f"a server in mode merged runs one adapter, and {runs} is before it by name"
            events.state(name, "waiting")
            self._log_change(name, alias.why,
                             partial(events.waiting, name, alias.version.digest if alias.version else None))
            return
        self._needs_restart.discard(name)
        await super()._update(name, alias, pipeline)
        if name not in self._needs_restart:
            self._turns.pop(f"merged {name}", None)  # a later restart gets a turn of its own

    def _forget_checks(self) -> None:
        super()._forget_checks()
        self._verified.clear()

    def _folders(self, candidate: Candidate) -> tuple[Path, Path]:
        return (candidates.evaluation_folder(candidate.evaluation, self._volumes),
                folder_of(candidate.adapter, self.served))

    async def _admit(self, version: Version, evaluation: Path) -> None:
        if version.model == self.served.merged and self._ran_unfit:
            raise self._ran_unfit
        if reason := (await asyncio.to_thread(_unfit, self.served)).get(version.model):
            raise Refused(reason, UNFIT)
        await asyncio.to_thread(verification.read_proof, evaluation, self._keys)
        if version.model not in self._verified:  # once: the server may wait for its turn to restart
            await asyncio.to_thread(verify, version.digest, self.served, self._keys)
            self._verified.add(version.model)
        self._needs_restart.add(version.name)
        self._restart_in_turn(f"merged {version.name}",
                              f"{version.model} may be served, which needs a restart in mode merged")
        raise NotYet("the server restarts with it")

    async def _unload_unused(self) -> None:
        """Do nothing: the process runs one model."""
