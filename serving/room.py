"""How much room adapters get in vLLM: LoRA slots on the GPU (--max-loras), and main memory."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from serving import lora

FEWEST_SLOTS = 8  # for Qwen3-8B at rank 64, 8 slots take 2.8 GB beside 16 GB of weights
SPARE_SLOTS = 2  # a new version is probed beside the old ones
SHARE_OF_BASE = 4  # slots together take at most a quarter of the memory of the base model's weights
BYTES_OF_A_WEIGHT = 2  # vLLM keeps adapters in the base model's type, usually of 16 bits
# A number only: vLLM reserves no memory by it. `Residency` evicts by bytes.
MOST_IN_MEMORY = 4096
SHARE_OF_MEMORY = 4  # adapters get a quarter of the main memory
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def slots(desired: int | None, adapters: int, max_rank: int, base_folder: Path) -> int:
    """The number of LoRA slots: as desired (`serving.slots`), else enough for `adapters`, if they fit.

    vLLM reserves the memory of all slots at the start: of max_rank * (features in + features out) values for each
    linear layer.
    """
    if desired is not None:
        return desired
    needed = adapters + SPARE_SLOTS
    if needed <= FEWEST_SLOTS:
        return FEWEST_SLOTS  # without loading torch
    slot = sum(BYTES_OF_A_WEIGHT * max_rank * sum(shape) for shape in lora.linear_modules(base_folder).values())
    weights = sum(file.stat().st_size for file in base_folder.glob("*.safetensors"))
    return max(FEWEST_SLOTS, min(needed, weights // SHARE_OF_BASE // slot))


def memory() -> int:
    """Bytes of main memory for adapters: a share of the container's limit, or of the machine's memory."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # there is no limit, or it is "max"
        available = min(available, int(CGROUP_LIMIT.read_text()))
    return available // SHARE_OF_MEMORY
