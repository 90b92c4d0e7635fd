"""The base of a server: a base model, a tokenizer, a mode and a chat format, which a vLLM process cannot change.

The environment file and the promotions on the volume decide, at the start and later. The environment file names the
desired base. A server runs on it if no promoted adapter would be lost by that. Otherwise, or if the environment file is
invalid, it runs on the base of the promoted adapters, which their manifests name. Therefore a restart does not change
what is served, whatever is in git at that moment. The server stores no state: its volumes are read-only.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.core import artifacts, models
from jobs.core.artifacts import canonical
from jobs.core.environment import SERVABLE_RANKS, Environment, Mode, Serving
from jobs.core.errors import RetryableError, UserError
from jobs.core.plan import (
    BASE_MODEL_VOLUME,
    FINE_TUNED_VOLUME,
    TOKENIZER_VOLUME,
    EnvironmentPlan,
    merged_model,
    plan_environment,
)
from jobs.core.promotion import DIGEST
from serving import candidates, untrusted, verification
from serving.candidates import Candidate
from serving.files import ENVIRONMENT, Declared, Files
from serving.refusal import NotYet, Refused
from serving.served import NO_ARGUMENTS, Served

log = logging.getLogger("serving")

POLL_SECONDS = 2.0
LOG_SECONDS = 60.0  # between two log lines while the server waits
# Each replica restarts in its own slot of a cycle. Two given replicas share a slot with a probability of 1/24.
SLOTS = 24


@dataclass(frozen=True)
class Base:
    """What a vLLM process cannot change: the digests of base model and tokenizer, the mode, and the arguments of the
    chat template."""

    base_model: str
    tokenizer: str
    mode: Mode
    template: str = NO_ARGUMENTS  # canonical JSON

    def folders(self, volumes: Path) -> list[Path]:
        """Where base model and tokenizer are, or will be."""
        return [volumes / BASE_MODEL_VOLUME / "base-model" / self.base_model,
                volumes / TOKENIZER_VOLUME / "tokenizer" / self.tokenizer]

    def is_there(self, volumes: Path) -> bool:
        return all(folder.exists() for folder in self.folders(volumes))

    def __str__(self) -> str:
        template = "" if self.template == NO_ARGUMENTS else f", chat_template {self.template}"
        return f"base-model/{self.base_model}, tokenizer/{self.tokenizer}, mode {self.mode}{template}"


@dataclass(frozen=True)
class Proven:
    """An adapter on the volume that passed the gate under a name."""

    adapter: str  # digest
    rank: int
    at: str  # when it was promoted (ISO 8601); empty if it never was


ByBase = dict[Base, dict[str, Proven]]  # the newest proven adapter of each name, by the base that it was trained on


@dataclass(frozen=True)
class Start:
    """The result of `start`."""

    base: Base
    declared: Declared
    adapters: int  # of how many aliases an adapter may be served on this base
    base_name: str  # the model name that clients send for the base model
    max_lora_rank: int
    slots: int | None  # `serving.slots`


# --- which base -------------------------------------------------------------------------------------------------------


def of(environment: Environment) -> Base:
    """The base that an environment file desires."""
    planned = _planned(environment)
    return Base(planned.base_model.digest, planned.tokenizer.digest, environment.serving.mode,
                canonical(environment.chat_template).decode())


@functools.lru_cache(maxsize=16)
def _planned(environment: Environment) -> EnvironmentPlan:
    return plan_environment(environment)


def running(served: Served) -> Base:
    """The base of a server that runs."""
    return Base(served.base_model, served.tokenizer, served.mode, served.template)


def order(declared: Declared, volumes: Path) -> list[Base]:
    """The bases on which a server may start, best first; empty if there is none.

    The desired base is first if no adapter is lost by it. The other bases are on the volume.

    Raises:
        OSError: when the volume cannot be read; a later attempt may succeed.
    """
    proven = find_proven(declared, volumes)
    before = _before(declared, proven, volumes)
    if declared.environment is None:
        return before
    desired = of(declared.environment)
    if not before:
        return [desired]
    ready = desired.is_there(volumes) and not lacking(declared, proven, volumes)
    return [desired, *before] if ready else [*before, desired]


def lacking(declared: Declared, proven: ByBase, volumes: Path, serving: Collection[str] = ()) -> list[str]:
    """The aliases that would lose their adapter if a server ran on the desired base.

    Empty if the environment file has `when_base_changes: at-once`.

    Args:
        proven: of `find_proven`.
        serving: aliases under which an adapter is served now.
    """
    environment = declared.environment
    if environment is None or environment.serving.when_base_changes == "at-once":
        return []
    before = _before(declared, proven, volumes)
    lost = {*serving, *(proven[before[0]] if before else ())} - proven.get(of(environment), {}).keys()
    return [name for name in declared.adapters if name in lost]


def _before(declared: Declared, proven: ByBase, volumes: Path) -> list[Base]:
    """The bases on the volume, other than the desired one, on which there are proven adapters, best first: of the most
    aliases, of the newest promotion. In mode merged if a merged model was made for it."""
    desired = of(declared.environment) if declared.environment else None
    return sorted((base for base in proven if base != desired and base.is_there(volumes)), reverse=True,
                  key=lambda base: (len(proven[base]), max(each.at for each in proven[base].values()),
                                    base.mode == "merged"))


def find_proven(declared: Declared, volumes: Path) -> ByBase:
    """The newest adapter of each alias that passed the gate and is whole, by the base that it can be served on.

    Raises:
        OSError: when the volume cannot be read; a later attempt may succeed.
    """
    found: ByBase = {}
    for name, pipeline in declared.adapters.items():
        for candidate, at in candidates.in_order(name, pipeline, volumes).items():
            manifest = _manifest(volumes / FINE_TUNED_VOLUME / "adapter" / candidate.adapter)
            for base in _bases(candidate.adapter, manifest, volumes):
                known = found.get(base, {})
                if base.mode == "merged" and known:  # one model runs: that of the first alias that has one
                    continue
                if name not in known and _is_proven(name, candidate, volumes, declared.trusted_keys):
                    found.setdefault(base, {})[name] = Proven(candidate.adapter, _rank(manifest), at)
    return found


def _bases(adapter: str, manifest: Mapping[str, Any], volumes: Path) -> Iterator[Base]:
    """The bases on which an adapter can be served, by its manifest."""
    inputs = manifest.get("inputs")
    if not isinstance(inputs, dict):
        return
    base_model, tokenizer = str(inputs.get("base_model")), str(inputs.get("tokenizer"))
    template = verification.template_of(manifest)
    if not (DIGEST.fullmatch(base_model) and DIGEST.fullmatch(tokenizer)):
        return
    if merged_model(adapter, base_model).path(volumes).exists():
        yield Base(base_model, tokenizer, "merged", template)
    lora = Base(base_model, tokenizer, "lora", template)
    try:
        servable = models.architecture(lora.folders(volumes)[0]) in models.SERVABLE
    except UserError:  # not there, or damaged: `check_startable` reports it
        servable = True
    if servable:
        yield lora


def _is_proven(name: str, candidate: Candidate, volumes: Path, keys: tuple[str, ...]) -> bool:
    """Whether the adapter is whole and its evaluation passed. Cached until the files or the keys change."""
    try:
        states = (untrusted.state_of(candidates.adapter_folder(candidate.adapter, volumes)),
                  untrusted.state_of(candidates.evaluation_folder(candidate.evaluation, volumes)))
    except NotYet:
        return False
    return _passes(name, candidate, volumes, states, keys)


@functools.lru_cache(maxsize=4096)
def _passes(name: str, candidate: Candidate, volumes: Path, states: object, keys: tuple[str, ...]) -> bool:
    try:
        untrusted.read_artifact(candidates.adapter_folder(candidate.adapter, volumes), "adapter", keys)
        verification.check_gate(candidate, name, volumes, keys)
        verification.read_proof(candidates.evaluation_folder(candidate.evaluation, volumes), keys)
    except Refused as error:
        log.warning("%s@%s cannot be served: %s", name, candidate.adapter, error)
        return False
    return True


def _manifest(folder: Path) -> Mapping[str, Any]:
    """An artifact's manifest, not verified; empty where there is none."""
    try:
        return untrusted.read_json(folder / artifacts.MANIFEST, "damaged", "is missing or damaged")
    except Refused:
        return {}


def _rank(manifest: Mapping[str, Any]) -> int:
    """The adapter's rank; if a search chose it, the largest that it could have."""
    try:
        spec = manifest["spec"]
        return int(spec["lora"]["r"]) if "r" in spec["lora"] else max(map(int, spec["search"]["candidates"]["lora.r"]))
    except (LookupError, TypeError, ValueError, OverflowError):
        return 1


def is_for(adapter: str, base: Base, volumes: Path) -> bool:
    """Whether an adapter on the volume was trained on this base model and tokenizer, in this chat format."""
    manifest = _manifest(candidates.adapter_folder(adapter, volumes))
    inputs = manifest.get("inputs")
    return isinstance(inputs, dict) and (
        inputs.get("base_model"), inputs.get("tokenizer"), verification.template_of(manifest)) == (
        base.base_model, base.tokenizer, base.template)


# --- start ------------------------------------------------------------------------------------------------------------


def start(files: Files, volumes: Path, deadline_s: float) -> Start:
    """Wait until a server can start, verify its base model and tokenizer, and return what it starts with.

    Raises:
        UserError: there is nothing to start from, or the base model cannot be served.
        RetryableError: base model or tokenizer were not there within `deadline_s` seconds.
    """
    declared, bases = wait(files, volumes, deadline_s)
    refused: UserError | None = None
    for base in bases:
        try:
            check_startable(base, volumes)
        except UserError as error:
            log.error("cannot start on %s: %s", base, error)
            refused = refused or error
            continue
        proven = find_proven(declared, volumes).get(base, {})
        desired = declared.environment and of(declared.environment) == base
        fitting = [name for name in declared.adapters if desired or name in proven]
        return Start(base, declared, len(fitting), base_name(base, declared, volumes),
                     max_lora_rank(base, declared, proven),
                     declared.environment.serving.slots if declared.environment else None)
    raise refused or UserError("there is no base model to start on")


def wait(files: Files, volumes: Path, deadline_s: float) -> tuple[Declared, list[Base]]:
    """Wait until base model and tokenizer are on the volume; returns the files' content, and the bases in `order`.

    The files are read again at every poll: a push may change the base model meanwhile.

    Raises:
        UserError: there is nothing to start from: no valid environment file, and no promotion.
        RetryableError: base model or tokenizer were not there within `deadline_s` seconds.
    """
    problems: Mapping[str, Refused] = {}
    started, logged, waiting_for = time.monotonic(), 0.0, ""
    while True:
        declared = files.read()
        bases = order(declared, volumes)
        if not bases:
            raise UserError(str(declared.problems[ENVIRONMENT]))
        for stem, problem in declared.problems.items():
            if str(problems.get(stem)) != str(problem):
                log.error("%s; the server uses the promotions on the volume", problem)
        problems = declared.problems
        missing = ", ".join(f"{folder.parent.name}/{folder.name}" for folder in bases[0].folders(volumes)
                            if not folder.exists())
        if not missing:
            return declared, bases
        now = time.monotonic()
        if now - started > deadline_s:
            raise RetryableError(f"waited {deadline_s:.0f} s for {missing}. See the log of its Job")
        if missing != waiting_for or now - logged > LOG_SECONDS:
            log.info("waiting for %s (%.0f s)", missing, now - started)
            logged, waiting_for = now, missing
        time.sleep(POLL_SECONDS)


def check_startable(base: Base, volumes: Path) -> None:
    """Return if a server can start on this base: all of its files are as published, and vLLM can serve it.

    Raises:
        UserError: naming what is wrong.
    """
    folder, _ = (artifacts.read(each).path for each in base.folders(volumes))
    models.check_servable(models.architecture(folder), "base_model", base.mode)


def base_name(base: Base, declared: Declared, volumes: Path) -> str:
    """The model name of the base model: from the environment file if it desires it, else from its artifact."""
    if declared.environment and of(declared.environment).base_model == base.base_model:
        return declared.environment.base_model.name
    manifest = _manifest(base.folders(volumes)[0])
    facts = [manifest.get("spec"), manifest.get("about")]  # a source that is pinned by sha256 is not in the spec
    sources = [each["source"] for each in facts if isinstance(each, dict) and isinstance(each.get("source"), str)]
    return sources[0].removeprefix("hf://") if sources else "base-model"


def max_lora_rank(base: Base, declared: Declared, proven: Mapping[str, Proven]) -> int:
    """The rank for which vLLM reserves memory: enough for the environment file and all proven adapters."""
    environment = declared.environment
    wanted = environment.serving if environment and of(environment) == base else Serving()
    largest = max([wanted.max_lora_rank, *(each.rank for each in proven.values())])
    return next((rank for rank in SERVABLE_RANKS if rank >= largest), SERVABLE_RANKS[-1])


# --- a server that runs -----------------------------------------------------------------------------------------------


def changed(declared: Declared, served: Served) -> str | None:
    """A description of the change in the environment file that needs a restart; None if there is none."""
    environment, ours = declared.environment, running(served)
    if environment is None:
        return None
    desired = of(environment)
    if (desired.base_model, desired.tokenizer) != (ours.base_model, ours.tokenizer):
        return f"base model and tokenizer changed to base-model/{desired.base_model} and tokenizer/{desired.tokenizer}"
    if desired.template != ours.template:
        return f"chat_template changed from {ours.template} to {desired.template}"
    if desired.mode != ours.mode:
        return f"serving.mode changed from {ours.mode} to {desired.mode}"
    rank = max_lora_rank(ours, declared, {})
    if served.mode == "lora" and rank > served.max_lora_rank:
        return f"serving.max_lora_rank was raised from {served.max_lora_rank} to {rank}"
    if served.mode == "lora" and environment.serving.slots != served.slots:
        return f"serving.slots changed from {served.slots or 'derived'} to {environment.serving.slots or 'derived'}"
    return None


def check_restart(declared: Declared, served: Served, serving: Collection[str]) -> None:
    """Return if a restart would bring the desired base, with no adapter lost by it.

    Args:
        serving: the aliases under which an adapter is served now.
    Raises:
        NotYet: something is not there yet.
        Refused: with reason `base`: the desired base cannot be served.
    """
    environment, volumes = declared.environment, Path(served.volumes)
    if environment is None:
        raise NotYet("the environment file is invalid")
    desired = of(environment)
    if not desired.is_there(volumes):
        missing = next(folder for folder in desired.folders(volumes) if not folder.exists())
        raise NotYet(f"{missing.parent.name} {missing.name} is not there yet")
    if desired != running(served):
        lost = lacking(declared, find_proven(declared, volumes), volumes, serving)
        if lost:
            raise NotYet(f"{', '.join(lost)}: no adapter for it has passed the gate yet")
    try:
        check_startable(desired, volumes)
    except UserError as error:
        raise Refused("base", str(error)) from None


def next_turn(now: float, slot_seconds: float, replica: str) -> float:
    """When (Unix time) this replica may restart by itself: at the start of its slot in the cycle of `SLOTS`.

    The replicas cannot reach each other or the API server, or write to a volume. So the pod's name decides the slot.

    Args:
        slot_seconds: the length of a slot, which is the duration of a restart; 0: at once, for a single replica.
        replica: the pod's name.
    """
    if slot_seconds <= 0:
        return now
    slot = int.from_bytes(hashlib.sha256(replica.encode()).digest()[:8], "big") % SLOTS
    return now + (slot * slot_seconds - now) % (SLOTS * slot_seconds)
