"""Advice on the settings of `training`, from experience with LoRA. `check` prints it, and never fails by it.

The source is "LoRA Without Regret" (Schulman et al., Thinking Machines, 2025): how LoRA learns as well as training all
weights. Where the numbers here are estimates, the thresholds are far from what would be wrong.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from jobs.core.pipeline import Pipeline

SOURCE = '("LoRA Without Regret", Schulman et al. 2025)'
CHARACTERS_PER_TOKEN = 4  # of English text
RECORDS_PER_BATCH = 128  # LoRA loses to training all weights with large batches; up to about 32 it did not
# Its best learning rates are about 10 times those of training all weights, 5e-4 for a hidden size of 2000.
LEARNING_RATES = (5e-5, 2e-3)
PREFERENCES = 5e-5  # dpo's and orpo's largest
BITS_PER_PARAMETER, BITS_PER_TOKEN = 2, 1  # what a parameter can hold, and what a learned token has
SPARE, HIGH_RANK = 100, 32  # a rank this high, with this many times what the data has, costs memory for nothing
FEED_FORWARD = {"gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "c_fc", "dense_h_to_4h",
                "dense_4h_to_h"}


def advice(pipeline: Pipeline, statistics: Mapping[str, Any] | None) -> Iterator[str]:
    """Lines of advice for an adapter. None for an embedded model, which is for trying out and knows nothing.

    Args:
        statistics: those of the split, where the data is at hand.
    """
    training, base = pipeline.training, pipeline.environment.base_model
    if base.scheme == "builtin":
        return
    low, high = LEARNING_RATES
    if training.objective != "sft":
        if training.learning_rate > PREFERENCES:
            yield (f"training.learning_rate is {training.learning_rate:g}, as for sft; preferences are learned with "
                   f"far less, with LoRA mostly up to {PREFERENCES:g} (all weights: 1e-6, Rafailov et al. 2023)")
    elif training.learning_rate < low:
        yield (f"training.learning_rate is {training.learning_rate:g}, as for training all weights; LoRA's best is "
               f"about 10 times that, 1e-4 to 5e-4 {SOURCE}")
    elif training.learning_rate > high:
        yield f"training.learning_rate is {training.learning_rate:g}; LoRA's best is mostly 1e-4 to 5e-4 {SOURCE}"
    modules = training.lora.target_modules
    if not isinstance(modules, str) and not FEED_FORWARD & set(modules):
        yield ("training.lora.target_modules has no feed-forward layer; attention alone learns less, also with as many "
               f"parameters: use all-linear {SOURCE}")
    lengths = (statistics or {}).get("characters", {}).get("train", {})
    if "completion" not in lengths:
        return
    records = statistics["records"]["train"] if statistics else 0
    answer = lengths["completion"]["median"] / CHARACTERS_PER_TOKEN
    whole = answer + lengths.get("prompt", {"median": 0})["median"] / CHARACTERS_PER_TOKEN
    per_batch = min(records, training.tokens_per_batch / max(1, whole))
    if per_batch > RECORDS_PER_BATCH:
        yield (f"training.tokens_per_batch is {training.tokens_per_batch}, about {per_batch:.0f} of these records a "
               f"step; LoRA learns best from about 32, {_round(32 * whole)} tokens {SOURCE}")
    size = parameters(base.name)
    if size is None:
        return
    held = BITS_PER_PARAMETER * lora_parameters(size, training.lora.r)
    learned = BITS_PER_TOKEN * answer * records
    if learned > held:
        yield (f"training.lora.r is {training.lora.r}, which can hold about {held / 1e6:.1f} Mbit, and the answers "
               f"have about {learned / 1e6:.1f} Mbit: raise it {SOURCE}")
    if training.lora.r >= HIGH_RANK and held > SPARE * learned:
        yield (f"training.lora.r is {training.lora.r}, which can hold {held / learned:.0f} times what the answers "
               f"have; 8 would do, in less memory {SOURCE}")


def parameters(name: str) -> float | None:
    """The number of parameters that the name of a model has, such as Qwen3-4B; None if it has none, or several."""
    found = re.findall(r"(?<![A-Za-z0-9.])(\d+(?:\.\d+)?)([MB])(?![A-Za-z0-9])", name.rsplit("/", 1)[-1], re.IGNORECASE)
    if len(found) != 1:
        return None
    number, unit = found[0]
    return float(number) * (1e6 if unit in "mM" else 1e9)


def lora_parameters(size: float, r: int) -> float:
    """About the parameters of an adapter of rank `r` on all linear layers: 30 for the root of each parameter of the
    model (26 in SmolLM2-135M, 32 in Qwen3-4B, 30 in Qwen3-8B)."""
    return 30 * r * math.sqrt(size)


def _round(tokens: float) -> int:
    """The power of two next to a number of tokens."""
    return int(2 ** round(math.log2(max(8, tokens))))
