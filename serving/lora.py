"""The checks of an adapter's config and weights: a plain LoRA that fits the base model, with sane values and an effect.

vLLM loads adapters with NaN weights or with weights for layers that do not exist, and NaN weights corrupt the replies
of other adapters. So vLLM only gets adapters that passed these checks.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.core import artifacts, models
from serving.refusal import Refused
from serving.untrusted import LARGEST_JSON, read_json

TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# PEFT's options that may be set, and their allowed values. Any other option may change the meaning of the weights
# without vLLM's support; two hold regular expressions, which could keep vLLM's engine busy for ever.
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
SMALLEST = 1e-8  # a change of a layer's output that is lost to rounding in float32 beside 1

Modules = dict[str, tuple[int, int]]  # the base model's linear layers by name: (features out, features in)


@dataclass(frozen=True)
class LoraConfig:
    """The settings in an adapter's config that give its weights their meaning."""

    rank: int
    alpha: float
    layers: frozenset[str]  # the last parts of the names of the layers that it adapts

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def check_config(file: Path, max_rank: int) -> LoraConfig:
    """The config of a plain LoRA, which means the same to PEFT and to vLLM."""
    config = read_json(file, "config", "is not a LoRA config")
    patterns = config.get("rank_pattern")
    ranks = [config.get("r"), *(patterns.values() if isinstance(patterns, dict) else ())]
    largest = max((rank for rank in ranks if type(rank) is int), default=0)
    if largest > max_rank:
        raise Refused("rank", f"{file.name}: rank {largest} is above the server's {max_rank} "
                              "(serving.max_lora_rank in environment.yaml)")
    for option in sorted(config.keys() | NEEDED):
        value = config.get(option)
        if _is_unset(value) and option not in NEEDED:
            continue
        if option not in OPTIONS or not OPTIONS[option](value):
            raise Refused("config", f"{file.name}: {option} is {value!r}; vLLM cannot serve that")
    return LoraConfig(config["r"], config["lora_alpha"], frozenset(config["target_modules"]))


def _is_unset(value: Any) -> bool:
    """Whether PEFT takes the value as not set. Not so for 0, which can be a layer's number."""
    return value is None or value is False or value == [] or value == {}


def check_weights(file: Path, lora: LoraConfig, modules: Modules) -> None:
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


def _pairs(file: Path, weights: Any, lora: LoraConfig, modules: Modules) -> dict[str, tuple[str, str]]:
    """The names of lora_A and lora_B by layer, after all checks that need only the header."""
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
            raise Refused("shape", f"{file.name}: {key} has shape {tensor.get_shape()}, not {fitting}; {CONFIG} has "
                                   f"rank {lora.rank}, the base model's layer is {list(modules[module])}")
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


def check_desired(lora: LoraConfig, desired: Any, modules: Modules) -> None:
    """Refuse an adapter whose settings differ from those in its manifest, which its digest covers."""
    try:
        layers = desired["target_modules"]
        every = {_layer(module) for module in modules}
        expected = LoraConfig(desired["r"], desired["alpha"], frozenset(every if layers == "all-linear" else layers))
    except (KeyError, TypeError) as error:
        raise Refused("damaged", f"{artifacts.MANIFEST} lacks the LoRA settings ({error!r})") from None
    for setting, found, wanted in (("r", lora.rank, expected.rank), ("alpha", lora.alpha, expected.alpha),
                              ("target modules", set(lora.layers), set(expected.layers))):
        if found != wanted:
            raise Refused("config", f"{CONFIG} has {setting} {found}; the pipeline file has {setting} {wanted}")


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
