"""Which adapter a pipeline file asks for, whether the gate passed it, and whether its files are fit to be loaded.

vLLM answers 200 to adapters of all-NaN weights, of layers that do not exist and of another base model, so everything is
checked here first. No state and no vLLM: each function reads the volumes and returns, or raises `NotYet` or `Refused`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from jobs.core import artifacts, models, promotion
from jobs.core.errors import UserError
from jobs.core.files import human_bytes
from jobs.core.pipeline import Mode, Pipeline
from jobs.core.plan import FINE_TUNED_VOLUME, plan

DIGEST = re.compile(r"[0-9a-f]{16}")
TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# What an adapter artifact may hold. Not a list of what is forbidden: a pickle can have any name.
SUFFIXES = (".safetensors", ".json", ".md")
FILE_NAME = re.compile(r"[A-Za-z0-9_.-]{1,100}")
# The options of PEFT that may be set, and to what. Any other may change what the weights mean, and vLLM may not know
# it; two hold regular expressions, by which vLLM's engine could be kept busy for ever.
OPTIONS: dict[str, Callable[[Any], bool]] = {
    "peft_type": lambda v: v == "LORA",
    "task_type": lambda v: v == "CAUSAL_LM",
    "bias": lambda v: v == "none",
    "r": lambda v: type(v) is int and v > 0,
    "lora_alpha": lambda v: type(v) in (int, float) and 0 < v <= sys.float_info.max,
    "lora_dropout": lambda v: type(v) in (int, float) and 0 <= v < 1,
    "target_modules": lambda v: type(v) is list and v != [] and all(type(layer) is str for layer in v),
    **dict.fromkeys(("init_lora_weights", "inference_mode"), lambda v: type(v) is bool),
    **dict.fromkeys(("base_model_name_or_path", "revision", "peft_version", "megatron_core"), lambda v: type(v) is str),
    "qalora_group_size": lambda v: type(v) is int,
}
NEEDED = {"peft_type", "r", "lora_alpha", "target_modules"}
DTYPES = ("F32", "F16", "BF16")
# Above it a value is infinite in float16; weights of real adapters stay below 10, and a layer's output below 2000 for
# inputs of 1.
LARGEST = 65504.0
SMALLEST = 1e-8  # a change of a layer's output that float32 rounds away beside 1
# Bytes of a JSON file that is read, and of the weights' header: such files have a few kB, a header 130 bytes a tensor.
LARGEST_JSON = 2**20
# Bytes of an artifact beside the weights (the loss history grows with the steps), and files of an artifact.
LARGEST_REST = 64 * 2**20
MOST_FILES = 100

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
    mode: Mode = "lora"
    merged: str | None = None  # in mode merged: the model that vLLM runs, as NAME@ADAPTER; None: the base model
    cpu_shield: bool = False  # whether vLLM computes LoRA on a CPU (serving/cpu_shield.py)
    drain_seconds: float = 55.0  # how long the last replies may take when the server ends
    restart_slot_seconds: float = 0.0  # how long one of several replicas has for a restart (base.next_turn)

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


def promoted(name: str, volumes: Path) -> Wanted:
    """The adapter that was promoted last under a name.

    Raises:
        NotYet: when none ever was.
        Refused: when the promotion is damaged.
    """
    try:
        current = promotion.current(volumes / FINE_TUNED_VOLUME, name)
    except UserError as error:
        raise Refused("damaged", str(error)) from None
    if current is None:
        raise NotYet(f"no adapter was promoted as {name} yet")
    return Wanted(current.adapter, current.evaluation)


def earlier(name: str, volumes: Path) -> list[Wanted]:
    """The adapters that were promoted under a name before the last one, newest first."""
    history = promotion.history(volumes / FINE_TUNED_VOLUME, name)
    return list(dict.fromkeys(Wanted(each.adapter, each.evaluation) for each in history))


def proved_at(name: str, wanted: Wanted, volumes: Path) -> float:
    """When (Unix time) the adapter could be served at the earliest: its evaluation was published, or it was promoted.

    Raises:
        OSError: when the volume does not say.
    """
    times = [(evaluation_folder(wanted.evaluation, volumes) / artifacts.MANIFEST).stat().st_mtime]
    pointer = volumes / FINE_TUNED_VOLUME / promotion.FOLDER / name
    current = promotion.current(volumes / FINE_TUNED_VOLUME, name)
    if current and current.adapter == wanted.adapter:
        times.append(pointer.stat().st_mtime)
    return max(times)


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
    stats = [(p, p.lstat()) for p in sorted([folder, *folder.iterdir()])]  # flat, or it is refused
    return tuple((p.name, s.st_size, s.st_mtime_ns, s.st_ino) for p, s in stats)


def check_gate(asked: Wanted, name: str, volumes: Path) -> None:
    """Return if the evaluation artifact says that the gate passed exactly this adapter under this name.

    Raises:
        Refused: with reason `gate` when it did not pass, `damaged` when the evaluation cannot be trusted.
        OSError: when it cannot be read; a later attempt may succeed.
    """
    folder = evaluation_folder(asked.evaluation, volumes)
    size = sum(path.lstat().st_size for path in _files(folder))
    if size > LARGEST_REST:
        raise Refused("files", f"{folder} has {human_bytes(size)}; no evaluation is that large")
    manifest = _read(folder, "evaluation").manifest
    verdict = _json(folder / "evaluation.json", "damaged", "is no readable verdict")
    about = verdict.get("adapter")
    evaluated = about.get("digest") if isinstance(about, dict) else about
    known = manifest["inputs"].get("adapter"), manifest["spec"].get("adapter")
    if known != (asked.adapter, name) or evaluated != asked.adapter:
        raise Refused("damaged", _line(f"evaluation {asked.evaluation} is about {known[1]}@{known[0]} ({evaluated}), "
                                       f"not {name}@{asked.adapter}"))
    if "passed" not in verdict:
        raise Refused("damaged", f"evaluation {asked.evaluation} does not say whether {name}@{asked.adapter} passed")
    if verdict["passed"] is not True:
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
        largest = sum(4 * served.max_lora_rank * sum(shape) for shape in modules().values())
        _copy(source, copy, largest + LARGEST_REST)
        verify(copy, served, modules)
    except Refused as refused:  # the copy goes; what the message tells people to look at is the original
        shutil.rmtree(copy, ignore_errors=True)
        raise Refused(refused.reason, _line(str(refused).replace(str(copy), str(source)))) from None
    except BaseException:
        shutil.rmtree(copy, ignore_errors=True)
        raise
    return copy


def _copy(source: Path, target: Path, limit: int) -> None:
    """Copy the files of an adapter, of `limit` bytes in all; stop at whatever an adapter does not hold."""
    paths = _files(source)
    target.mkdir(parents=True)
    for path in paths:
        if path.suffix not in SUFFIXES or not FILE_NAME.fullmatch(path.name):
            raise Refused("files", f"it holds {path.name}; only {', '.join(SUFFIXES)} files are taken, no pickles")
        if path.suffix == ".safetensors" and path.name != WEIGHTS:
            raise Refused("files", f"it holds {path.name}; the only weights are {WEIGHTS}")
        # If it was replaced just now: no link is followed, and no pipe is waited for.
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(handle, "rb") as stream, (target / path.name).open("wb") as sink:  # noqa: PTH123 - by its handle
            while chunk := stream.read(2**20):
                limit -= len(chunk)
                if limit < 0:  # counted as it comes: the file may say another size, or grow
                    raise Refused("files", f"{path.name} is too large: no adapter for this base model is that large")
                sink.write(chunk)


def verify(folder: Path, served: Served, modules: Callable[[], Modules]) -> None:
    """Return if the adapter artifact in `folder` is whole, made for what is served, and free of harmful weights.

    Args:
        modules: gives the base model's linear layers.
    Raises:
        Refused: naming the first thing that is wrong.
    """
    manifest = _read(folder, "adapter").manifest
    for key, digest in (("base_model", served.base_model), ("tokenizer", served.tokenizer)):
        if manifest["inputs"].get(key) != digest:
            raise Refused("base", f"it was trained on {key} {manifest['inputs'].get(key)}; this server serves {digest}")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise Refused("files", f"{name} is missing")
    lora, known = _check_config(folder / CONFIG, served.max_lora_rank), modules()
    _check_weights(folder / WEIGHTS, lora, known)
    _check_asked(lora, manifest["spec"].get("lora"), known)


def _read(folder: Path, kind: str) -> artifacts.Artifact:
    _json(folder / artifacts.MANIFEST, "damaged", "is missing or damaged")
    try:
        artifact = artifacts.read(folder)
        manifest = artifact.manifest
        fits = isinstance(manifest["inputs"], dict) and isinstance(manifest["spec"], dict)
    except UserError as error:
        raise Refused("damaged", _line(str(error))) from None
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise Refused("damaged", _line(f"{folder}: {artifacts.MANIFEST} is damaged ({error!r})")) from None
    if not fits or manifest["kind"] != kind:
        raise Refused("damaged", _line(f"{folder} is an artifact of kind {manifest['kind']!r}, not {kind}"))
    return artifact


def _files(folder: Path) -> list[Path]:
    """The files in an artifact's folder; refused if anything else is there: a pipe, for one, is waited for in vain."""
    paths = sorted(islice(folder.iterdir(), MOST_FILES + 1))
    if len(paths) > MOST_FILES:
        raise Refused("files", f"{folder} holds more than {MOST_FILES} files")
    for path in paths:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise Refused("damaged", _line(f"{path} is not a plain file"))
    return paths


def _json(file: Path, reason: str, otherwise: str) -> dict[str, Any]:
    """The mapping in a JSON file; refused with `reason` and `otherwise` if it is none."""
    try:
        with file.open("rb") as stream:
            content = stream.read(LARGEST_JSON + 1)
        if len(content) > LARGEST_JSON:
            raise ValueError(f"it has more than {LARGEST_JSON} bytes")
        value = json.loads(content.decode())  # as vLLM reads it: from bytes, json would take UTF-16 too
        if not isinstance(value, dict):
            raise TypeError(f"it holds a {type(value).__name__}")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, TypeError, RecursionError) as error:
        raise Refused(reason, _line(f"{file} {otherwise} ({error!r})")) from None
    return value


def _line(message: str) -> str:
    """For the log: one short line, whatever names and values of a bad artifact it quotes."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in message[:1000])


@dataclass(frozen=True)
class _Lora:
    """What an adapter's config says of its weights."""

    rank: int
    alpha: float
    layers: frozenset[str]  # the last parts of the names of the layers that it adapts

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def _check_config(file: Path, max_rank: int) -> _Lora:
    """The config of a plain LoRA, which means the same to PEFT and to vLLM."""
    config = _json(file, "config", "is not a LoRA config")
    patterns = config.get("rank_pattern")
    ranks = [config.get("r"), *(patterns.values() if isinstance(patterns, dict) else ())]
    largest = max((rank for rank in ranks if type(rank) is int), default=0)
    if largest > max_rank:
        raise Refused("rank", f"{file.name}: rank {largest} is above the server's {max_rank} "
                              "(serving.max_lora_rank in pipeline.yaml)")
    for option in sorted(config.keys() | NEEDED):
        value = config.get(option)
        if _is_unset(value) and option not in NEEDED:
            continue
        if option not in OPTIONS or not OPTIONS[option](value):
            raise Refused("config", f"{file.name}: {option} is {value!r}; vLLM cannot serve that")
    return _Lora(config["r"], config["lora_alpha"], frozenset(config["target_modules"]))


def _is_unset(value: Any) -> bool:
    """PEFT's ways to say no; zero can be a layer's number."""
    return value is None or value is False or value == [] or value == {}


def _check_weights(file: Path, lora: _Lora, modules: Modules) -> None:
    """Refuse weights that are not exactly a pair of fitting shape for each targeted layer, sane, and of an effect."""
    import torch
    from safetensors import SafetensorError, safe_open

    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
    if length > LARGEST_JSON:
        raise Refused("damaged", f"{file.name} is not a whole safetensors file (its header has {length} bytes)")
    generator = torch.Generator().manual_seed(0)
    effect = 0.0
    try:
        with safe_open(file, framework="pt") as weights:
            pairs = _pairs(file, weights, lora, modules)
            for module, keys in pairs.items():
                a, b = (weights.get_tensor(key).double() for key in keys)  # a pair at a time: there may be many
                for key, largest in zip(keys, (a.abs().max(), b.abs().max() * lora.scale), strict=True):
                    if not bool(largest <= LARGEST):  # false for NaN too
                        raise Refused("values", f"{file.name}: {key} holds NaN, infinite or huge values")
                # The norms bound the product, which would be large to compute, for every input of at most 1.
                if not bool(a.abs().sum(1).max() * b.abs().sum(1).max() * lora.scale <= LARGEST):
                    raise Refused("values", f"{file.name}: the weights of {module} multiply to huge values")
                # Neither is zero if their product is not; a product that is not zero moves nearly every input.
                moved = b @ (a @ torch.randn(a.shape[1], dtype=a.dtype, generator=generator)) * lora.scale
                effect = max(effect, float(moved.abs().max()))
    except SafetensorError as error:
        raise Refused("damaged", f"{file.name} is not a whole safetensors file ({error})") from None
    if effect < SMALLEST:
        raise Refused("no effect", f"{file.name}: every lora_B times lora_A is zero, so it changes nothing")


def _pairs(file: Path, weights: Any, lora: _Lora, modules: Modules) -> dict[str, tuple[str, str]]:
    """The names of lora_A and lora_B by layer, after everything was checked that the header tells."""
    found: dict[str, dict[str, str]] = {}  # layer: side: name
    for key in weights.keys():  # noqa: SIM118 - not a mapping
        match = TENSOR.fullmatch(key)
        if not match:
            raise Refused("module", f"{file.name}: {key} is not a LoRA weight")
        module, side = match["module"], match["side"]
        if module not in modules:
            raise Refused("module", f"{file.name}: the base model has no layer {module} that vLLM can adapt")
        outer, inner = modules[module]
        tensor = weights.get_slice(key)
        fitting = [lora.rank, inner] if side == "A" else [outer, lora.rank]
        if list(tensor.get_shape()) != fitting:
            raise Refused("shape", f"{file.name}: {key} has shape {tensor.get_shape()}, not {fitting}; {CONFIG} says "
                                   f"{lora.rank}, the base model's layer is {list(modules[module])}")
        if tensor.get_dtype() not in DTYPES:
            raise Refused("values", f"{file.name}: {key} holds {tensor.get_dtype()}, not {' or '.join(DTYPES)}")
        found.setdefault(module, {})[side] = key
    for module, sides in found.items():
        if len(sides) != 2:
            raise Refused("shape", f"{file.name}: {module} lacks lora_A or lora_B")
    if not found:
        raise Refused("no effect", f"{file.name} holds no weights, so it changes nothing")
    unknown = lora.layers - {_layer(module) for module in modules}
    if unknown:
        raise Refused("module", f"{CONFIG}: the base model has no {', '.join(sorted(unknown))} that vLLM can adapt")
    targeted = {module for module in modules if _layer(module) in lora.layers}
    for module in sorted(found.keys() - targeted):
        raise Refused("module", f"{file.name}: {module} has weights; target_modules in {CONFIG} leaves it out")
    for module in sorted(targeted - found.keys()):
        raise Refused("module", f"{file.name}: the weights of {module} are missing")
    return {module: (sides["A"], sides["B"]) for module, sides in found.items()}


def _layer(module: str) -> str:
    return module.rpartition(".")[2]


def _check_asked(lora: _Lora, asked: Any, modules: Modules) -> None:
    """Refuse an adapter that is not what it is named for: the artifact's digest stands for these settings."""
    try:
        layers = asked["target_modules"]
        every = {_layer(module) for module in modules}
        wanted = _Lora(asked["r"], asked["alpha"], frozenset(every if layers == "all-linear" else layers))
    except (KeyError, TypeError) as error:
        raise Refused("damaged", f"{artifacts.MANIFEST} does not say what was asked for ({error!r})") from None
    for what, said, ought in (("r", lora.rank, wanted.rank), ("alpha", lora.alpha, wanted.alpha),
                              ("target modules", set(lora.layers), set(wanted.layers))):
        if said != ought:
            raise Refused("config", f"{CONFIG} says {what} {said}; the pipeline asked for {what} {ought}")


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
