"""Models on a volume: their config, whether vLLM can serve adapters for them, and loading them.

Loading is always offline, from safetensors, and never runs code that came with a model.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.core import linear
from jobs.core.environment import Mode
from jobs.core.errors import RetryableError, UserError
from jobs.core.files import require_plain
from jobs.core.imports import fast_imports

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONFIG = ("config.json", "generation_config.json")  # what a model's folder holds besides its weights

_LLAMA_LAYERS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})

# The architectures on which vLLM serves LoRA, with the linear layers it can adapt. tests/test_serving_vllm.py compares
# each with the installed vLLM. Kept as a table because importing vLLM takes 10 s and the jobs image does not carry it.
SERVABLE: dict[str, frozenset[str]] = {
    "LlamaForCausalLM": _LLAMA_LAYERS,
    "MistralForCausalLM": _LLAMA_LAYERS,
    "Qwen2ForCausalLM": _LLAMA_LAYERS,
    "Qwen3ForCausalLM": _LLAMA_LAYERS,
    "Gemma2ForCausalLM": _LLAMA_LAYERS,
    "Gemma3ForCausalLM": _LLAMA_LAYERS,
    "GraniteForCausalLM": _LLAMA_LAYERS,
    "SmolLM3ForCausalLM": _LLAMA_LAYERS,
    "Phi3ForCausalLM": frozenset({"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
    "OPTForCausalLM": frozenset({"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}),
    "GPTNeoXForCausalLM": frozenset({"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
}

# The architectures that vLLM serves, but not with LoRA: only mode merged takes them. With the layers that training
# adapts; tests/training/test_merge.py trains and merges one of each. Others fail in training's packing with
# transformers: Falcon lets the records in a batch see each other, Bloom and GPT-J have no sdpa attention.
MERGED_ONLY: dict[str, frozenset[str]] = {
    "GPT2LMHeadModel": frozenset({"c_attn", "c_proj", "c_fc"}),
    "StableLmForCausalLM": _LLAMA_LAYERS,
}


def check_servable(architecture: str, where: str, mode: Mode = "lora") -> frozenset[str]:
    """The layers of `architecture` that can carry an adapter, served in this mode.

    Raises:
        UserError: when vLLM cannot serve it in this mode; `where` (a file or key) starts the message.
    """
    servable = SERVABLE if mode == "lora" else SERVABLE | MERGED_ONLY
    if architecture in servable:
        return servable[architecture]
    choose = f"Choose a base model of one of these architectures: {', '.join(servable)}"
    if architecture in MERGED_ONLY:
        choose = f"Set `serving: {{mode: merged}}`, to serve adapter and base model as one model. Or: {choose}"
    what = "serve a LoRA adapter on" if mode == "lora" else "serve, or training cannot adapt,"
    raise UserError(f"{where}: vLLM cannot {what} {architecture}. {choose}")


def check_target_modules(architecture: str, target_modules: str | list[str], where: str,
                         mode: Mode = "lora") -> list[str]:
    """The layers that training adapts, sorted; `all-linear` means all that can be served on this architecture.

    Raises:
        UserError: naming each layer that could not be served.
    """
    layers = check_servable(architecture, where, mode)
    if isinstance(target_modules, str):
        return sorted(layers)
    wrong = sorted(set(target_modules) - layers)
    if wrong:
        raise UserError(f"{where}: training.lora.target_modules: {', '.join(wrong)} cannot be served on "
                        f"{architecture}; allowed: {', '.join(sorted(layers))}, or all-linear")
    return sorted(set(target_modules))


def read_config(folder: Path) -> dict[str, Any]:
    """A model folder's `config.json`.

    Raises:
        UserError: when it is missing or not a JSON mapping.
    """
    try:
        require_plain(folder / "config.json")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: has no config.json, so it is not a model in the Hugging Face format") from None
    except (OSError, ValueError, RecursionError) as error:
        raise loading_error(f"{folder / 'config.json'}: cannot be read", error) from None
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.json'}: must hold a JSON mapping")
    return config


def architecture(folder: Path) -> str:
    """The model class that `config.json` names, e.g. `LlamaForCausalLM`."""
    names = read_config(folder).get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise UserError(f"{folder / 'config.json'}: `architectures` must name one class, not {names!r}")
    return names[0]


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, with a padding token (the end token where it has none of its own)."""
    with fast_imports():
        from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True,
                                                                           trust_remote_code=False)
    except Exception as error:
        raise loading_error(f"{folder}: the tokenizer cannot be loaded", error) from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"{folder}: the tokenizer has no end-of-sequence token; replies would never end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def stop_tokens(folder: Path) -> set[int]:
    """The tokens (ids) at which vLLM ends a reply beside the tokenizer's end token: `eos_token_id` in the
    generation_config.json of a folder; without that file, in its config.json.

    Raises:
        UserError: when the file cannot be read.
    """
    file = next((folder / name for name in reversed(CONFIG) if (folder / name).is_file()), None)
    if file is None:
        return set()
    try:
        require_plain(file)
        found = json.loads(file.read_text(encoding="utf-8"))["eos_token_id"]
    except (KeyError, TypeError):  # none
        return set()
    except (OSError, ValueError, RecursionError) as error:
        raise loading_error(f"{file}: cannot be read", error) from None
    return {number for number in (found if isinstance(found, list) else [found]) if type(number) is int}


def check_gpu() -> None:
    """Refuse to compute on the CPU where a GPU is required (REQUIRE_GPU, which overlays/gpu sets): it would take
    weeks and give no error.

    Raises:
        UserError: torch sees no GPU that it can use.
    """
    import torch

    if os.environ.get("REQUIRE_GPU") and not torch.cuda.is_available():
        raise UserError(f"REQUIRE_GPU is set, but torch {torch.__version__} sees no GPU that it can use. Is the image "
                        "the one for GPUs (make images FLAVOUR=cuda), and the node's driver new enough "
                        "(docs/registries.md)? `nvidia-smi` in the pod shows what is there")


@contextmanager
def gpu_memory(advice: str) -> Iterator[None]:
    """Make a `UserError` with the advice of running out of a GPU's memory: another attempt would end the same way."""
    try:
        yield
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; importing it for its name would take seconds
            raise
        raise UserError(f"the GPU has too little memory: {'. '.join(str(error).split('. ')[:2])}. {advice}") from None


def load_model(folder: Path, *, use_gpu: bool = True, four_bits: bool = False,
               stay_on_cpu: bool = False) -> PreTrainedModel:
    """The model in `folder`, in evaluation mode: bfloat16 on a GPU where there is one, else float32 on the CPU.

    Args:
        four_bits: quantize the weights of its linear layers to 4 bits (NF4 with double quantization, computing in
            bfloat16: QLoRA, Dettmers et al. 2023), to train an adapter on it.
        stay_on_cpu: load a model for GPUs into the CPU's memory; the caller divides it among several GPUs.
    Raises:
        UserError: the files are no model, the pod has too little memory, or bitsandbytes, which quantizes, is not
            installed.
        RetryableError: the volume or the GPU failed.
        torch.OutOfMemoryError: the GPU has too little memory; see `gpu_memory`.
    """
    with fast_imports():
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

    logging.disable_progress_bar()  # bars are for terminals; a pod's log gets one line for each redraw
    if use_gpu:
        check_gpu()
    gpu = use_gpu and torch.cuda.is_available()
    quantized = _four_bits() if four_bits else {}
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16 if gpu else torch.float32, attn_implementation="sdpa",
            local_files_only=True, trust_remote_code=False, use_safetensors=True, **quantized)
        if not quantized:
            model.to("cuda" if gpu and not stay_on_cpu else "cpu")  # type: ignore[arg-type]
    except torch.OutOfMemoryError:  # `gpu_memory` adds what to change
        raise
    except Exception as error:
        raise loading_error(f"{folder}: the model cannot be loaded", error) from error
    if getattr(model.config, "attn_logit_softcapping", None):
        # Gemma 2 bends its attention scores, as vLLM does too; with sdpa transformers leaves that out, without a word.
        model.set_attn_implementation("eager")
    linear.use_onednn(model)
    return model.eval()


# These errors come from the kind of file. All other errors of the operating system come from the volume.
_OF_THE_FILE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG}
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # how safetensors, written in Rust, ends the message of such an error
_GPU_ERROR = re.compile(r"\b(CUDA|cuDNN|CUBLAS|cuBLAS|NCCL|NVML)\b")
_WRONG_BUILD = ("no kernel image is available", "driver version is insufficient")  # the GPU itself works
_NO_MEMORY = re.compile(r"can't allocate memory|Cannot allocate memory")


def loading_error(what: str, error: Exception) -> UserError | RetryableError:
    """What an exception while reading a model or tokenizer means: the libraries raise many types, and chain them.

    An error of the volume or of the GPU is worth a retry, on this node or another. Everything else is a bad file, or a
    pod with too little memory, and ends the same way every time.

    Args:
        what: starts the message: which folder or file, and what cannot be done.
    """
    for cause in _causes(error):
        text = str(cause)
        if isinstance(cause, MemoryError) or _NO_MEMORY.search(text):
            return UserError(f"{what}: the pod has too little memory ({text or 'MemoryError'}). Raise its memory limit")
        number = cause.errno if isinstance(cause, OSError) else None
        if number is None and (match := _OS_ERROR.search(text)):
            number = int(match[1])
        if number is not None and number not in _OF_THE_FILE:
            return RetryableError(f"{what}: {os.strerror(number)}: its volume fails or is gone; look at node and "
                                  "storage")
        if isinstance(cause, RuntimeError) and _GPU_ERROR.search(text):
            first = text.splitlines()[0]
            if any(sign in text for sign in _WRONG_BUILD):
                return UserError(f"{what}: {first}. The image's torch does not fit this GPU or its driver "
                                 "(docs/registries.md)")
            return RetryableError(f"{what}: {first}: the GPU fails or is taken; `nvidia-smi` on the node shows its "
                                  "state")
    return UserError(f"{what}: {' '.join(str(error).split())}")  # of some errors the reason is on the second line


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The exception, and those that it was raised from or while handling."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _four_bits() -> dict[str, Any]:
    import importlib.util

    import torch
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("training.quantization: 4bit needs the package bitsandbytes, which the CUDA image has "
                        "(jobs/requirements-cuda.txt). Install it, or remove the key")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                bnb_4bit_compute_dtype=torch.bfloat16)
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    return {"quantization_config": config, "device_map": {"": device}}


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Refuse a tokenizer that can produce ids the model has no embedding for (an index error deep in torch).

    Raises:
        UserError: with both sizes.
    """
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr]
    if len(tokenizer) > rows:
        raise UserError(f"{where}: the tokenizer knows {len(tokenizer)} tokens but the model only {rows}; they do not "
                        "belong together. Remove the `tokenizer` source to use the base model's own")
