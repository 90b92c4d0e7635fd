"""The shield for vLLM on a CPU, which has two faults in its LoRA kernels (vllm/lora/ops/torch_ops/lora_ops.py, 0.32).

1. A request to the base model that is computed in one batch with an adapter's request gets the weights in the last LoRA
   slot: the kernels take "no adapter" (-1) for an index. So requests to the base model get an adapter of zeros, which
   adds nothing, instead of none: no batch has a request without an adapter.
2. A request for log-probabilities of its prompt, computed beside any other request, ends the engine for everybody. So
   such requests are refused.

When upstream is mended, delete this module and what `grep -rn cpu_shield serving` finds.
"""

from __future__ import annotations

import json
from pathlib import Path

from serving.adapters import CONFIG, WEIGHTS, Modules, Served

ZERO = "zero"  # what the adapter of zeros has in place of a digest


def needed() -> bool:
    """Whether vLLM will compute on a CPU. Imports vLLM, which is to be imported anyway."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def slots(served: Served) -> int:
    """How many LoRA slots the shield takes."""
    return 1 if served.cpu_shield else 0


def write_zero(modules: Modules, served: Served) -> Path:
    """Write an adapter that changes nothing, of rank 1 on one layer, into the private folder; returns its folder."""
    import torch
    from safetensors.torch import save_file

    name, (features_out, features_in) = next(iter(modules.items()))
    folder = Path(served.private_folder) / ZERO
    folder.mkdir(exist_ok=True)
    save_file({f"base_model.model.{name}.lora_A.weight": torch.zeros(1, features_in),
               f"base_model.model.{name}.lora_B.weight": torch.zeros(features_out, 1)}, folder / WEIGHTS)
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": [name.rpartition(".")[2]]}
    (folder / CONFIG).write_text(json.dumps(config))
    return folder
