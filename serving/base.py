"""What a server runs on: one base model, one tokenizer and one mode, which a vLLM process cannot change.

Two sources decide, for a server that starts as for one that runs: the pipeline files, and the promotions on the volume.
The first valid pipeline file (by the name of its folder) names the desired base. A server runs on it if no promoted
adapter would be lost by that. Otherwise, and if no pipeline file is valid, it runs on the base of the adapters that
were promoted before; their manifests name it. So a server that starts comes up with what was served before, whatever
git says at that moment. Nothing has to be remembered: serving can only read its volumes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.core import artifacts, models, promotion
from jobs.core.errors import RetryableError, UserError
from jobs.core.files import read_plain_file
from jobs.core.pipeline import SERVABLE_RANKS, Mode, Pipeline, Serving, load
from jobs.core.plan import BASE_MODEL_VOLUME, FINE_TUNED_VOLUME, TOKENIZER_VOLUME, merged_model, plan
from serving import candidates, untrusted, verification
from serving.candidates import Candidate, pipeline_files
from serving.refusal import NotYet, Refused
from serving.served import Served

log = logging.getLogger("serving")

POLL_SECONDS = 2.0
LOG_SECONDS = 60.0  # between two lines of a server that waits
# Replicas restart in slots of one cycle, each in its own. Two given replicas share one with probability 1/24.
SLOTS = 24
LARGEST_MANIFEST = 2**20  # bytes
LARGEST_PIPELINE = 2**20  # bytes of an invalid pipeline file that are searched for its name; a ConfigMap holds no more
NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
NAME_KEY = re.compile(rf"""^adapter:[ \t]*["']?({NAME.pattern})["']?[ \t]*(#.*)?$""", re.MULTILINE)

# The pipelines by alias, in the order of their files. None: the file is invalid and was never valid while this process
# ran; the alias keeps what was promoted under its name.
Named = Mapping[str, Pipeline | None]


@dataclass(frozen=True)
class Base:
    """What a vLLM process cannot change: the digests of base model and tokenizer, and the mode."""

    base_model: str
    tokenizer: str
    mode: Mode

    def folders(self, volumes: Path) -> list[Path]:
        """Where base model and tokenizer are, or will be."""
        return [volumes / BASE_MODEL_VOLUME / "base-model" / self.base_model,
                volumes / TOKENIZER_VOLUME / "tokenizer" / self.tokenizer]

    def is_there(self, volumes: Path) -> bool:
        return all(folder.exists() for folder in self.folders(volumes))

    def __str__(self) -> str:
        return f"base-model/{self.base_model}, tokenizer/{self.tokenizer}, mode {self.mode}"


@dataclass(frozen=True)
class Proven:
    """An adapter on the volume that passed the gate under a name."""

    adapter: str  # digest
    rank: int
    at: str  # when it was promoted (ISO 8601); empty if it is only what the pipeline file asks for


ByBase = dict[Base, dict[str, Proven]]  # the newest proven adapter of each name, by the base that it was trained on


@dataclass(frozen=True)
class Start:
    """What a server starts with."""

    base: Base
    named: Named
    adapters: int  # of how many of these names an adapter may be served on this base
    base_name: str  # the model name by which clients ask for the base model
    max_lora_rank: int


# --- pipeline files ---------------------------------------------------------------------------------------------------


def read(file: Path) -> Pipeline:
    """The pipeline in a file.

    Raises:
        UserError: whatever is wrong with the file. One bad file must not stop the other adapters.
    """
    try:
        pipeline = load(file).pipeline
        plan(pipeline)  # computes every digest
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{file}: cannot be read as a pipeline file: {str(error)[:200] or type(error).__name__}") \
            from None
    return pipeline


def name_files(files: Mapping[Path, Pipeline | None], volumes: Path) -> Named:
    """The pipelines by alias, in the order of their files. Of two files with one name, the first counts.

    Args:
        files: the pipeline in each file; None where it is invalid and was never valid while this process ran.
    """
    taken = {each.adapter for each in files.values() if each}
    named: dict[str, Pipeline | None] = {}
    for file, each in sorted(files.items()):
        name = each.adapter if each else name_of_invalid(file, taken | named.keys(), volumes, alone=len(files) == 1)
        if name:
            named.setdefault(name, each)
    return named


def name_of_invalid(file: Path, taken: Collection[str], volumes: Path, *, alone: bool) -> str | None:
    """The alias of an invalid pipeline file: what its `adapter` line or its folder says, if that was promoted.

    Args:
        taken: the names of other files.
        alone: it is the only pipeline file. Then it stands for the newest promotion, if nothing else says its name.
    """
    promoted = [name for name in _promoted_names(volumes) if name not in taken]
    written = _written_name(file)
    for name in (written, file.parent.name):
        if name in promoted:
            return name
    return promoted[0] if promoted and alone else written if written not in taken else None


def _written_name(file: Path) -> str | None:
    try:
        text = read_plain_file(file, LARGEST_PIPELINE, follow_links=True).decode(errors="replace")
    except (OSError, UserError):
        return None
    match = NAME_KEY.search(text)
    return match[1] if match else None


def _promoted_names(volumes: Path) -> list[str]:
    """The names under which an adapter was promoted, newest promotion first; damaged promotions last."""
    folder = volumes / FINE_TUNED_VOLUME
    try:
        names = [path.name for path in (folder / promotion.FOLDER).iterdir() if NAME.fullmatch(path.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    at = {}
    for name in names:
        try:
            current = promotion.current(folder, name)
        except UserError:
            current = None
        at[name] = current.at if current else ""
    return sorted(names, key=lambda name: (at[name], name), reverse=True)


# --- which base -------------------------------------------------------------------------------------------------------


def of(pipeline: Pipeline) -> Base:
    """The base that a pipeline file asks for."""
    planned = plan(pipeline)
    return Base(planned.base_model.digest, planned.tokenizer.digest, pipeline.serving.mode)


def running(served: Served) -> Base:
    """The base of a server that runs."""
    return Base(served.base_model, served.tokenizer, served.mode)


def deciding(named: Named) -> Pipeline | None:
    """The first valid pipeline: it names the desired base. None if there is none."""
    return next((each for each in named.values() if each), None)


def order(named: Named, volumes: Path) -> list[Base]:
    """The bases from which a server may start, best first; empty when nothing says any.

    The desired one comes first if no adapter is lost by it. All but it are on the volume.

    Raises:
        OSError: when the volume cannot be read; a later attempt may succeed.
    """
    pipeline, proven = deciding(named), find_proven(named, volumes)
    before = _before(named, proven, volumes)
    if pipeline is None:
        return before
    desired = of(pipeline)
    if not before:
        return [desired]
    ready = desired.is_there(volumes) and not lacking(named, proven, volumes)
    return [desired, *before] if ready else [*before, desired]


def lacking(named: Named, proven: ByBase, volumes: Path, serving: Collection[str] = ()) -> list[str]:
    """The names that would lose their adapter if a server ran on the desired base.

    Empty if the pipeline file says `when_base_changes: at-once`.

    Args:
        proven: of `find_proven`.
        serving: names under which an adapter is served now.
    """
    pipeline = deciding(named)
    if pipeline is None or pipeline.serving.when_base_changes == "at-once":
        return []
    before = _before(named, proven, volumes)
    lost = {*serving, *(proven[before[0]] if before else ())} - proven.get(of(pipeline), {}).keys()
    return [name for name in named if name in lost]


def _before(named: Named, proven: ByBase, volumes: Path) -> list[Base]:
    """The bases on the volume, other than the desired one, on which there are proven adapters, best first: of the most
    names, of the first name, of the newest promotion. In mode merged if a merged model was made for it."""
    first, pipeline = next(iter(named), None), deciding(named)
    desired = of(pipeline) if pipeline else None
    return sorted((base for base in proven if base != desired and base.is_there(volumes)), reverse=True,
                  key=lambda base: (len(proven[base]), first in proven[base],
                                    max(each.at for each in proven[base].values()), base.mode == "merged"))


def find_proven(named: Named, volumes: Path) -> ByBase:
    """The newest adapter of each name that passed the gate and is whole, by the base that it can be served on.

    Raises:
        OSError: when the volume cannot be read; a later attempt may succeed.
    """
    found: ByBase = {}
    first = next(iter(named), None)
    for name, pipeline in named.items():
        for candidate, at in _candidates(name, pipeline, volumes).items():
            manifest = _manifest(volumes / FINE_TUNED_VOLUME / "adapter" / candidate.adapter)
            for base in _bases(candidate.adapter, manifest, volumes):
                if base.mode == "merged" and name != first:  # one model runs
                    continue
                if name not in found.get(base, {}) and _is_proven(name, candidate, volumes):
                    found.setdefault(base, {})[name] = Proven(candidate.adapter, _rank(manifest), at)
    return found


def _candidates(name: str, pipeline: Pipeline | None, volumes: Path) -> dict[Candidate, str]:
    """The adapters that may be served under a name, in the order of serving/aliases.py, and when each was promoted."""
    folder = volumes / FINE_TUNED_VOLUME
    promoted = promotion.history(folder, name)
    try:
        if current := promotion.current(folder, name):
            promoted.insert(0, current)
    except UserError:  # damaged: the history names it too
        pass
    found = {candidates.desired(pipeline): ""} if pipeline else {}
    for each in promoted:
        candidate = Candidate(each.adapter, each.evaluation)
        found[candidate] = found.get(candidate) or each.at
    return {candidate: at for candidate, at in found.items()
            if candidates.DIGEST.fullmatch(candidate.adapter) and candidates.DIGEST.fullmatch(candidate.evaluation)}


def _bases(adapter: str, manifest: Mapping[str, Any], volumes: Path) -> Iterator[Base]:
    """The bases on which an adapter can be served, by its manifest."""
    inputs = manifest.get("inputs")
    if not isinstance(inputs, dict):
        return
    base_model, tokenizer = str(inputs.get("base_model")), str(inputs.get("tokenizer"))
    if not (candidates.DIGEST.fullmatch(base_model) and candidates.DIGEST.fullmatch(tokenizer)):
        return
    if merged_model(adapter, base_model).path(volumes).exists():
        yield Base(base_model, tokenizer, "merged")
    lora = Base(base_model, tokenizer, "lora")
    try:
        servable = models.architecture(lora.folders(volumes)[0]) in models.SERVABLE
    except UserError:  # it is not there, or damaged: whoever starts on it finds that out
        servable = True
    if servable:
        yield lora


def _is_proven(name: str, candidate: Candidate, volumes: Path) -> bool:
    """Whether the adapter is whole and its evaluation passed. Remembered for as long as the files stay the same."""
    try:
        signatures = (untrusted.signature(candidates.adapter_folder(candidate.adapter, volumes)),
                      untrusted.signature(candidates.evaluation_folder(candidate.evaluation, volumes)))
    except NotYet:
        return False
    return _passes(name, candidate, volumes, signatures)


@functools.lru_cache(maxsize=256)
def _passes(name: str, candidate: Candidate, volumes: Path, signatures: object) -> bool:
    try:
        artifacts.read(candidates.adapter_folder(candidate.adapter, volumes))
        verification.check_gate(candidate, name, volumes)
    except (UserError, Refused) as error:
        log.warning("%s@%s cannot be served: %s", name, candidate.adapter, error)
        return False
    return True


def _manifest(folder: Path) -> Mapping[str, Any]:
    """An artifact's manifest, not verified; empty where there is none."""
    try:
        manifest = json.loads(read_plain_file(folder / artifacts.MANIFEST, LARGEST_MANIFEST))
    except (FileNotFoundError, NotADirectoryError, UserError, ValueError, RecursionError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _rank(manifest: Mapping[str, Any]) -> int:
    try:
        return int(manifest["spec"]["lora"]["r"])
    except (LookupError, TypeError, ValueError, OverflowError):
        return 1


def is_for(adapter: str, base: Base, volumes: Path) -> bool:
    """Whether an adapter on the volume was trained on this base model and tokenizer."""
    inputs = _manifest(candidates.adapter_folder(adapter, volumes)).get("inputs")
    return isinstance(inputs, dict) and (inputs.get("base_model"), inputs.get("tokenizer")) == (
        base.base_model, base.tokenizer)


# --- start ------------------------------------------------------------------------------------------------------------


def start(pipelines: Path, volumes: Path, deadline_s: float) -> Start:
    """Wait until a server can start, verify its base model and tokenizer, and return what it starts with.

    Raises:
        UserError: there is nothing to start from, or the base model cannot be served.
        RetryableError: base model or tokenizer did not come in `deadline_s` seconds.
    """
    named, bases = wait(pipelines, volumes, deadline_s)
    refused: UserError | None = None
    for base in bases:
        try:
            check_startable(base, volumes)
        except UserError as error:
            log.error("cannot start on %s: %s", base, error)
            refused = refused or error
            continue
        proven = find_proven(named, volumes).get(base, {})
        fitting = [name for name, each in named.items() if each is None or of(each) == base or name in proven]
        return Start(base, named, len(fitting), base_name(base, named, volumes), max_lora_rank(base, named, proven))
    raise refused or UserError("there is no base model to start on")


def wait(pipelines: Path, volumes: Path, deadline_s: float) -> tuple[Named, list[Base]]:
    """Wait until base model and tokenizer are on the volume; returns the pipelines, and the bases in `order`.

    The pipeline files are read again at each look: a push may ask for another base model meanwhile.

    Raises:
        UserError: there is nothing to start from: no valid pipeline file, and no promotion.
        RetryableError: base model or tokenizer did not come in `deadline_s` seconds.
    """
    files: dict[Path, Pipeline | None] = {}
    problems: dict[Path, str] = {}
    started, logged, waiting_for = time.monotonic(), 0.0, ""
    while True:
        _read_files(pipelines, files, problems)
        named = name_files(files, volumes)
        bases = order(named, volumes)
        if not bases:
            missing = f"{pipelines}: no pipeline files; there must be at least one {pipelines}/NAME/pipeline.yaml"
            raise UserError("; ".join(problems.values()) or missing)
        missing = ", ".join(f"{folder.parent.name}/{folder.name}" for folder in bases[0].folders(volumes)
                            if not folder.exists())
        if not missing:
            return named, bases
        now = time.monotonic()
        if now - started > deadline_s:
            raise RetryableError(f"waited {deadline_s:.0f} s for {missing}. See the logs of the job that makes it")
        if missing != waiting_for or now - logged > LOG_SECONDS:
            log.info("waiting for %s (%.0f s)", missing, now - started)
            logged, waiting_for = now, missing
        time.sleep(POLL_SECONDS)


def _read_files(folder: Path, files: dict[Path, Pipeline | None], problems: dict[Path, str]) -> None:
    """Read the pipeline files. One that is invalid counts as it was before."""
    for file in pipeline_files(folder):
        try:
            files[file] = read(file)
            problems.pop(file, None)
        except UserError as error:
            files.setdefault(file, None)
            if problems.get(file) != str(error):
                log.error("%s; what was promoted before is served", error)
            problems[file] = str(error)


def check_startable(base: Base, volumes: Path) -> None:
    """Return if a server can start on this base: all of its files are as published, and vLLM can serve it.

    Raises:
        UserError: naming what is wrong.
    """
    folder, _ = (artifacts.read(each).path for each in base.folders(volumes))
    models.check_servable(models.architecture(folder), "base_model", base.mode)


def base_name(base: Base, named: Named, volumes: Path) -> str:
    """The name by which clients ask for the base model: of a pipeline file that asks for it, or of its artifact."""
    for each in named.values():
        if each and of(each).base_model == base.base_model:
            return each.base_model.name
    manifest = _manifest(base.folders(volumes)[0])
    facts = [manifest.get("spec"), manifest.get("about")]  # a source that is pinned by sha256 is not in the spec
    sources = [each["source"] for each in facts if isinstance(each, dict) and isinstance(each.get("source"), str)]
    return sources[0].removeprefix("hf://") if sources else "base-model"


def max_lora_rank(base: Base, named: Named, proven: Mapping[str, Proven]) -> int:
    """The rank for which vLLM must reserve room: that of every pipeline file, and of every adapter served before."""
    fitting = [each.serving.max_lora_rank for each in named.values() if each and of(each) == base]
    largest = max([*(each.rank for each in proven.values()), *(fitting or [Serving().max_lora_rank])])
    return next((rank for rank in SERVABLE_RANKS if rank >= largest), SERVABLE_RANKS[-1])


# --- a server that runs -----------------------------------------------------------------------------------------------


def check_fits(pipeline: Pipeline, served: Served) -> None:
    """Return if an adapter of this pipeline can be served by this server.

    Raises:
        Refused: with reason `base` or `mode`.
    """
    theirs, ours = of(pipeline), running(served)
    for key, digest, own in (("base model", theirs.base_model, ours.base_model),
                             ("tokenizer", theirs.tokenizer, ours.tokenizer)):
        if digest != own:
            raise Refused("base", f"its {key} is {digest}, this server's is {own}; a server serves adapters of one "
                                  "base model. Give the pipeline a server of its own")
    if theirs.mode != ours.mode:
        raise Refused("mode", f"its serving.mode is {theirs.mode}, this server's is {ours.mode}. Give the pipeline a "
                              "server of its own")


def changed(named: Named, served: Served) -> str | None:
    """What the pipeline files ask for that only a restart can bring, in words; None if there is nothing."""
    pipeline, ours = deciding(named), running(served)
    if pipeline is None:
        return None
    desired = of(pipeline)
    if (desired.base_model, desired.tokenizer) != (ours.base_model, ours.tokenizer):
        return f"base model and tokenizer changed to base-model/{desired.base_model} and tokenizer/{desired.tokenizer}"
    if desired.mode != ours.mode:
        return f"serving.mode changed from {ours.mode} to {desired.mode}"
    rank = max_lora_rank(ours, named, {})
    if served.mode == "lora" and rank > served.max_lora_rank:
        return f"serving.max_lora_rank was raised from {served.max_lora_rank} to {rank}"
    return None


def check_restart(named: Named, served: Served, serving: Collection[str]) -> None:
    """Return if a restart would bring the desired base, with no adapter lost by it.

    Args:
        serving: the names under which an adapter is served now.
    Raises:
        NotYet: something is not there yet; the server goes on as it is.
        Refused: with reason `base`: the desired base cannot be served.
    """
    pipeline, volumes = deciding(named), Path(served.volumes)
    if pipeline is None:
        raise NotYet("there is no valid pipeline file")
    desired = of(pipeline)
    if not desired.is_there(volumes):
        missing = next(folder for folder in desired.folders(volumes) if not folder.exists())
        raise NotYet(f"{missing.parent.name} {missing.name} is not there yet")
    if desired != running(served):
        lost = lacking(named, find_proven(named, volumes), volumes, serving)
        if lost:
            raise NotYet(f"{', '.join(lost)}: no adapter for it has passed the gate yet")
    try:
        check_startable(desired, volumes)
    except UserError as error:
        raise Refused("base", str(error)) from None


def next_turn(now: float, slot_seconds: float, replica: str) -> float:
    """When (Unix time) this replica may restart by itself: at the beginning of its slot in the cycle of `SLOTS`.

    The replicas cannot speak to each other, to the API server, or write to a volume, so each takes the slot that its
    name gives it.

    Args:
        slot_seconds: how long a slot is, which is as long as a restart takes; 0: at once, for a single replica.
        replica: the pod's name.
    """
    if slot_seconds <= 0:
        return now
    slot = int.from_bytes(hashlib.sha256(replica.encode()).digest()[:8], "big") % SLOTS
    return now + (slot * slot_seconds - now) % (SLOTS * slot_seconds)
