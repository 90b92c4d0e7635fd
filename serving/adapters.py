"""Which adapter a pipeline file asks for, whether the gate passed it, and whether its files are fit to be loaded.

vLLM answers 200 to adapters of all-NaN weights, of layers that do not exist and of another base model, so everything is
checked here first. No state and no vLLM: each function reads the volumes and returns, or raises `NotYet` or `Refused`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jobs import artifacts, models, promotion
from jobs.errors import UserError
from jobs.pipeline import Pipeline
from jobs.plan import FINE_TUNED_VOLUME, plan

DIGEST = re.compile(r"[0-9a-f]{16}")
TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# What an adapter artifact may hold. Not a list of what is forbidden: a pickle can have any name.
SUFFIXES = (".safetensors", ".json", ".md")
# Options of PEFT that change what the weights mean. vLLM ignores some of them and would serve another adapter.
UNSERVABLE = ("use_dora", "modules_to_save", "lora_bias", "layer_replication", "alora_invocation_tokens", "use_qalora",
              "use_bdlora", "trainable_token_indices", "target_parameters", "fan_in_fan_out")
# Above it a value is infinite in float16; weights of real adapters stay below 10.
LARGEST = 65504.0

Modules = dict[str, tuple[int, int]]  # the base model's linear layers by name: (features out, features in)
Signature = tuple[tuple[str, int, int, int], ...]


class NotYet(Exception):
    """What is asked for is not there yet. Not an error: it is looked for again."""


class Refused(Exception):
    """It is there and must not be served. `reason` is one of a few words, the message says it all."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Served:
    """What this server serves, as decided when it started; handed to the guard through the environment."""

    pipelines: str  # the folder of pipeline folders
    volumes: str
    base_name: str  # the model name by which clients ask for the base
    base_model: str  # digest
    tokenizer: str  # digest
    base_folder: str
    max_lora_rank: int
    private_folder: str  # verified copies of adapters, out of everybody else's reach

    ENVIRONMENT = "SERVING_SETTINGS"

    def to_environment(self) -> dict[str, str]:
        return {self.ENVIRONMENT: json.dumps(asdict(self))}

    @classmethod
    def from_environment(cls) -> Served:
        return cls(**json.loads(os.environ[cls.ENVIRONMENT]))


@dataclass(frozen=True)
class Wanted:
    """An adapter that may be served under a name, and the evaluation that has to have passed it (digests)."""

    adapter: str
    evaluation: str


def pipeline_files(folder: Path) -> list[Path]:
    """The pipeline files in a folder of pipeline folders, sorted. Hidden folders are Kubernetes' own (`..data`)."""
    return sorted(p for p in folder.glob("*/pipeline.yaml") if not p.parent.name.startswith("."))


def asked(pipeline: Pipeline, volumes: Path) -> Wanted:
    """The adapter that the pipeline file asks for, whether or not it exists."""
    named = plan(pipeline)
    return Wanted(named.adapter.digest, named.evaluation.digest)


def promoted(pipeline: Pipeline, volumes: Path) -> Wanted:
    """The adapter that was promoted last under the pipeline's name.

    Raises:
        NotYet: when none ever was.
        Refused: when the promotion is damaged.
    """
    try:
        current = promotion.current(volumes / FINE_TUNED_VOLUME, pipeline.adapter)
    except UserError as error:
        raise Refused("damaged", str(error)) from None
    if current is None:
        raise NotYet(f"no adapter was promoted as {pipeline.adapter} yet")
    return Wanted(current.adapter, current.evaluation)


def adapter_folder(digest: str, volumes: Path) -> Path:
    return _artifact_folder("adapter", digest, volumes)


def evaluation_folder(digest: str, volumes: Path) -> Path:
    return _artifact_folder("evaluation", digest, volumes)


def _artifact_folder(kind: str, digest: str, volumes: Path) -> Path:
    if not DIGEST.fullmatch(digest):  # it may come from a file: never let it name a path
        raise Refused("damaged", f"{digest!r} is not a digest")
    return volumes / FINE_TUNED_VOLUME / kind / digest


def signature(folder: Path) -> Signature:
    """Name, size, time and inode of everything in an artifact's folder: cheap, and it changes when a file does.

    Raises:
        NotYet: when the folder is not there.
    """
    if not folder.is_dir():
        raise NotYet(f"{folder.parent.name} {folder.name} is not there yet")
    stats = [(p, p.lstat()) for p in sorted([folder, *folder.rglob("*")])]
    return tuple((p.name, s.st_size, s.st_mtime_ns, s.st_ino) for p, s in stats)


def check_gate(asked: Wanted, name: str, volumes: Path) -> None:
    """Return if the evaluation artifact says that the gate passed exactly this adapter under this name.

    Raises:
        Refused: with reason `gate` when it did not pass, `damaged` when the evaluation cannot be trusted.
    """
    evaluation = _read(evaluation_folder(asked.evaluation, volumes), "evaluation")
    try:
        verdict = json.loads((evaluation.path / "evaluation.json").read_bytes())
        passed, evaluated = verdict["passed"], verdict["adapter"]["digest"]
        known = evaluation.manifest["inputs"]["adapter"], evaluation.manifest["spec"]["adapter"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refused("damaged", f"evaluation {asked.evaluation} has no readable verdict ({error!r})") from None
    if known != (asked.adapter, name) or evaluated != asked.adapter:
        raise Refused("damaged", f"evaluation {asked.evaluation} is about {known[1]}@{known[0]} ({evaluated}), not "
                                 f"{name}@{asked.adapter}")
    if passed is not True:
        raise Refused("gate", f"evaluation {asked.evaluation} rejected {name}@{asked.adapter}: see its report.md")


def private_copy(name: str, digest: str, served: Served) -> Path:
    """Where the verified copy of an adapter is that is served under `name`."""
    return Path(served.private_folder) / name / digest


def take(name: str, digest: str, served: Served, modules: Callable[[], Modules]) -> Path:
    """Copy an adapter into the private folder, verify the copy, and return its path, fit to be loaded.

    A copy, because vLLM reads the files later, and again after evicting them from memory: what it reads must be what
    was verified, whatever happens to the volume.

    Raises:
        Refused: with the reason.
        OSError: when it cannot be read or copied; a later attempt may succeed.
    """
    source = adapter_folder(digest, Path(served.volumes))
    copy = private_copy(name, digest, served)
    shutil.rmtree(copy, ignore_errors=True)
    try:
        for path in source.rglob("*"):
            if not path.is_dir() and path.suffix not in SUFFIXES:
                raise Refused("files", f"it holds {path.name}; only {', '.join(SUFFIXES)} files are taken, no pickles")
        shutil.copytree(source, copy, symlinks=True)  # links stay links, which verification refuses
        verify(copy, served, modules)
    except BaseException:
        shutil.rmtree(copy, ignore_errors=True)
        raise
    return copy


def verify(folder: Path, served: Served, modules: Callable[[], Modules]) -> None:
    """Return if the adapter artifact in `folder` is whole, made for what is served, and free of harmful weights.

    Args:
        modules: gives the base model's linear layers; only called when all cheaper checks passed.
    Raises:
        Refused: naming the first thing that is wrong.
    """
    inputs = _read(folder, "adapter").manifest["inputs"]
    for key, digest in (("base_model", served.base_model), ("tokenizer", served.tokenizer)):
        if inputs.get(key) != digest:
            raise Refused("base", f"it was trained on {key} {inputs.get(key)}; this server serves {digest}")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise Refused("files", f"{name} is missing")
    rank = _check_config(folder / CONFIG, served.max_lora_rank)
    _check_weights(folder / WEIGHTS, rank, served.max_lora_rank, modules())


def _read(folder: Path, kind: str) -> artifacts.Artifact:
    try:
        artifact = artifacts.read(folder)
    except UserError as error:
        raise Refused("damaged", str(error)) from None
    if artifact.manifest["kind"] != kind:
        raise Refused("damaged", f"{folder} is an artifact of kind {artifact.manifest['kind']}, not {kind}")
    return artifact


def _check_config(file: Path, max_rank: int) -> int | None:
    """The rank that every weight must have; None when the config gives modules ranks of their own."""
    try:
        config: dict[str, Any] = json.loads(file.read_bytes())
        kind, r, bias = config["peft_type"], config["r"], config.get("bias", "none")
        ranks = [r, *(config.get("rank_pattern") or {}).values()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused("config", f"{file.name} is not a LoRA config ({error!r})") from None
    if kind != "LORA":
        raise Refused("config", f"{file.name}: peft_type is {kind}; only LORA is served")
    if not all(type(rank) is int and rank >= 1 for rank in ranks):
        raise Refused("config", f"{file.name}: {ranks} are not ranks")
    if max(ranks) > max_rank:
        raise Refused("rank", f"{file.name}: rank {max(ranks)} is above the server's {max_rank} "
                              "(serving.max_lora_rank in pipeline.yaml)")
    if bias != "none":
        raise Refused("config", f"{file.name}: bias is {bias!r}; vLLM serves no trained bias")
    for option in UNSERVABLE:
        if config.get(option):
            raise Refused("config", f"{file.name}: {option} is {config[option]!r}; vLLM cannot serve that")
    return r if len(ranks) == 1 else None


def _check_weights(file: Path, rank: int | None, max_rank: int, modules: Modules) -> None:
    import torch
    from safetensors import SafetensorError, safe_open

    ranks: dict[str, dict[str, int]] = {}  # module: side: rank
    changes = False
    try:
        with safe_open(file, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118 - not a mapping
                match = TENSOR.fullmatch(key)
                if not match:
                    raise Refused("module", f"{file.name}: {key} is not a LoRA weight")
                module, side = match["module"], match["side"]
                if module not in modules:
                    raise Refused("module", f"{file.name}: the base model has no layer {module} that vLLM can adapt")
                tensor = weights.get_tensor(key)  # one at a time: an adapter may be large
                outer = modules[module][1 if side == "A" else 0]
                shape = tuple(tensor.shape)
                own = shape[0 if side == "A" else -1] if len(shape) == 2 else 0
                if shape != ((own, outer) if side == "A" else (outer, own)) or not 1 <= own <= max_rank:
                    raise Refused("shape", f"{file.name}: {key} has shape {list(shape)}; the base model's layer is "
                                           f"{list(modules[module])}")
                if rank is not None and own != rank:
                    raise Refused("shape", f"{file.name}: {key} has rank {own}; {CONFIG} says {rank}")
                if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
                    raise Refused("values", f"{file.name}: {key} holds {tensor.dtype}, not floats of 16 or 32 bits")
                if not bool((tensor.abs() <= LARGEST).all()):  # false for NaN too
                    raise Refused("values", f"{file.name}: {key} holds NaN, infinite or huge values")
                changes = changes or (side == "B" and bool(torch.count_nonzero(tensor)))
                ranks.setdefault(module, {})[side] = own
    except SafetensorError as error:
        raise Refused("damaged", f"{file.name} is not a whole safetensors file ({error})") from None
    for module, sides in ranks.items():
        if len(sides) != 2 or sides["A"] != sides["B"]:
            raise Refused("shape", f"{file.name}: {module} lacks lora_A or lora_B, or their ranks differ")
    if not changes:
        raise Refused("no effect", f"{file.name}: every lora_B is zero, so it changes nothing")


def linear_modules(folder: Path) -> Modules:
    """The base model's linear layers that vLLM can adapt, by the names that PEFT gives them; reads no weights.

    From the architecture and not from the names in the checkpoint: those differ for several model families.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    servable = models.check_servable(models.architecture(folder), str(folder))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return {name: (module.out_features, module.in_features) for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in servable}
