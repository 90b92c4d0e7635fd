"""The merged model: base model and adapter in one, for architectures on which vLLM has no LoRA.

Training publishes it after the adapter, in `serving: {mode: merged}`; vLLM then serves it as a plain model, with the
tokenizer's artifact beside it. It is the base model's checkpoint with other values: its config, its architecture, its
dtype.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import shutil
from collections import Counter
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.core import artifacts, models
from jobs.core.errors import UserError
from jobs.core.pipeline import Pipeline
from jobs.core.plan import Plan
from jobs.core.signing import Signer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

log = logging.getLogger("jobs")

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' names, and torch's


def publish(pipeline: Pipeline, wanted: Plan, volumes: Path, wait_seconds: float,
            signer: Signer | None = None) -> None:
    """Merge the pipeline's adapter into its base model, and publish the result.

    Raises:
        UserError: the adapter changes nothing, or to values that are not finite numbers.
        RetryableError: an input did not appear in time.
    """
    base_model, adapter = artifacts.wait([wanted.base_model, wanted.adapter], volumes, wait_seconds,
                                         keys=pipeline.environment.trusted_keys)

    def write(draft: Path) -> dict[str, Any]:
        log.info("merging %s into %s", wanted.adapter, pipeline.environment.base_model.name)
        dtype = write_merged(base_model.path, adapter.path, draft)
        return {"base_model": pipeline.environment.base_model.name, "adapter": adapter.digest, "dtype": dtype}

    merged = artifacts.publish(wanted.merged_model, volumes, write, keep=pipeline.environment.retention.keep,
                               adapter_name=pipeline.adapter, wait_seconds=wait_seconds, signer=signer)
    log.info("merged: %s", merged.path)


def write_merged(base: Path, adapter: Path, folder: Path) -> str:
    """Write the merged model of two artifacts' folders into `folder`; returns its dtype, which is the base model's.

    Raises:
        UserError: the adapter changes nothing, or to values that are not finite numbers.
    """
    import torch
    from peft import PeftModel

    name = stored_dtype(base)
    dtype: torch.dtype = getattr(torch, name)
    gc.collect()  # training's model may still be there, in Trainer's reference cycles
    # Added up in float32 and rounded once: in bfloat16 an adapter's small change would be rounded, then its sum with
    # the weight again. On the CPU, so that the result does not depend on whether there is a GPU.
    model = models.load_model(base, use_gpu=False)
    before = fingerprint(model, dtype)
    try:
        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)
    except ValueError as error:  # what safe_merge raises
        raise UserError(f"{adapter}: cannot be merged: {error}. Train it otherwise, e.g. with a lower "
                        "training.learning_rate") from None
    model.to(dtype)  # type: ignore[arg-type]
    if not all(bool(weight.isfinite().all()) for weight in model.parameters()):
        raise UserError(f"{adapter}: merged, the model has values beyond what {name} can hold. Train the adapter "
                        "otherwise, e.g. with a lower training.learning_rate")
    if fingerprint(model, dtype) == before:
        raise UserError(f"{adapter}: merged, it changes no weight of the base model as {name}: clients would get the "
                        "base model. Train it longer, or with a higher training.learning_rate")
    model.save_pretrained(folder)
    for file in models.CONFIG:  # the base model's own: what transformers writes differs from version to version
        (folder / file).unlink(missing_ok=True)
        if (base / file).exists():
            shutil.copyfile(base / file, folder / file)
    return name


def stored_dtype(folder: Path) -> str:
    """The dtype, by torch's name, in which most of a model's values are stored.

    Raises:
        UserError: when it is none that an adapter can be merged into, i.e. when the model is quantized.
    """
    values: Counter[str] = Counter()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:  # an 8-byte length, then JSON: no need to load a library, or the weights
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for tensor in (value for key, value in header.items() if key != "__metadata__"):
            values[tensor["dtype"]] += prod(tensor["shape"])
    found = max(values, key=lambda name: values[name], default="nothing")
    if found not in DTYPES:
        raise UserError(f"{folder}: the base model is stored as {found}, into which no adapter can be merged "
                        f"(serving.mode: merged). Choose one stored as {', '.join(DTYPES)}")
    return DTYPES[found]


def fingerprint(model: PreTrainedModel, dtype: torch.dtype) -> str:
    """A digest of the model's weights as `dtype`: two models in memory at once might not fit."""
    import torch

    digest = hashlib.sha256()
    for weight in model.parameters():
        # -0.0 + 0 is 0.0, and adding nothing to -0.0 gives 0.0: not a change.
        digest.update((weight.detach().to(dtype) + 0).flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
