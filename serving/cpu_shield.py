"""Works around two faults of vLLM 0.32 in its LoRA kernels for CPUs (vllm/lora/ops/torch_ops/lora_ops.py).

1. A request to the base model in one batch with a request to an adapter is computed with the weights in the last LoRA
   slot: the kernels use "no adapter" (-1) as an index. So the guard routes requests to the base model to an adapter of
   zeros, which adds nothing. Then no batch has a request without an adapter.
2. A request for log-probabilities of its prompt crashes the engine if any other request is computed beside it. So the
   guard answers 400 to such requests.

When vLLM is fixed, delete this module and what `grep -rn cpu_shield serving` finds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from starlette.responses import Response

from serving import parameters
from serving.lora import CONFIG, WEIGHTS, Modules
from serving.replies import error
from serving.served import Served

ZERO = "zero"  # in place of a digest, in the name of the adapter of zeros


def needed() -> bool:
    """Whether vLLM will compute on a CPU. Imports vLLM, which the server needs anyway."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def slots(served: Served) -> int:
    """The number of LoRA slots that the adapter of zeros uses."""
    return 1 if served.cpu_shield else 0


def refusal(path: str, request: dict[str, Any], served: Served) -> Response | None:
    """The reply to a request that could crash the engine; None for any other."""
    if not served.cpu_shield or not parameters.wants_prompt_logprobs(path, request):
        return None
    param = "prompt_logprobs" if request.get("prompt_logprobs") is not None else "echo"
    return error(400, "This server computes on a CPU, where vLLM cannot compute log-probabilities of the prompt beside "
                      "other requests. Leave out `prompt_logprobs`, and `echo` together with `logprobs` (in chat: "
                      "`echo`)", param=param)


def write_zero(modules: Modules, served: Served) -> Path:
    """Write an adapter of zeros, of rank 1 on one layer, into the private folder; returns its folder."""
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
