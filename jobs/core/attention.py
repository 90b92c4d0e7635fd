"""Attention by record: the records of a pack never attend to each other, so each is computed by itself.

A pack is one row of tokens. transformers' sdpa computes all pairs of its tokens and then masks away those of different
records, which takes time and memory quadratic in the pack. Record by record it is linear, with the same result.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

log = logging.getLogger("jobs")

NAME = "by_record"  # each record by itself
IN_ONE_KERNEL = "by_record_in_one_kernel"  # torch's FlashAttention for packs, on GPUs
# The share of a result by which bfloat16 may be off. Seeing a token too many, or too few, is off by far more.
ROUNDING = 0.05


def attend_by_record(model: PreTrainedModel) -> None:
    """Let a model attend by record from now on: on a CPU each record by itself, on a GPU by torch's kernel for packs.

    Each call of the model then takes one pack, with the records' boundaries as `DataCollatorWithFlattening` gives them
    with `return_flash_attn_kwargs`. It stays as it is on GPUs on which the kernel does not work, and for models whose
    class has attention of its own.
    """
    import torch
    from transformers import AttentionInterface

    # Without a mask function of these names, transformers builds no mask.
    AttentionInterface.register(NAME, _attention)
    AttentionInterface.register(IN_ONE_KERNEL, _attention_in_one_kernel)
    if not torch.cuda.is_available():
        model.set_attn_implementation(NAME)
    elif kernel_works(model.config, "cuda"):
        model.set_attn_implementation(IN_ONE_KERNEL)
    elif model.config.model_type == "opt":
        # Its own mask has no regard for positions, so the records in a pack would see each other (transformers 5.19).
        model.set_attn_implementation(NAME)


def kernel_works(config: Any, device: str) -> bool:
    """Whether torch's kernel for packs computes on this device what attention record by record does.

    The kernel is for GPUs from Ampere on, some widths of heads, and no bent scores. Trying it out, with its gradients
    and with a sliding window, takes no time beside a training and finds all of that.
    """
    import torch

    if getattr(config, "attn_logit_softcapping", None):
        return False
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    ends = torch.tensor([0, 1, 8, 40], dtype=torch.int32, device=device)
    random = torch.Generator().manual_seed(0)  # the training's own random numbers stay as they are
    query, key, value = inputs = [
        torch.randn(1, count, 40, width, generator=random).to(device, torch.bfloat16).requires_grad_()
        for count in (heads, groups, groups)]
    weights = torch.randn(1, 40, heads, width, generator=random).to(device)
    try:
        for window in (None, 5):
            results = []
            for attend in (_attention_in_one_kernel, _attention):
                output, _ = attend(None, query, key, value, None, sliding_window=window, cu_seq_lens_q=ends,
                                   max_length_q=32)
                results.append([output, *torch.autograd.grad((output.float() * weights).sum(), inputs)])
            for found, expected in zip(*results, strict=True):
                off = ((found - expected).float().norm() / expected.float().norm()).item()
                if not off <= ROUNDING:  # NaN is not, either
                    raise RuntimeError(f"a result is off by {off:.0%}")
    except (RuntimeError, ImportError) as error:
        log.info("torch's attention for packs does not work here (%s): the model keeps its own",
                 str(error).partition("\n")[0])
        return False
    return True


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
               dropout: float = 0.0, scaling: float | None = None, sliding_window: int | None = None,
               softcap: float | None = None, cu_seq_lens_q: Tensor | None = None,
               position_ids: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:
    """An attention function of transformers: [1, heads, tokens, width] to [1, tokens, heads, width].

    Args:
        sliding_window: how many tokens a token sees, itself included.
        softcap: the bound to which scores are bent (Gemma 2), which torch's sdpa cannot do.
        cu_seq_lens_q: where each record starts, and the end of the last one. Some models (StableLM) hand on the
            positions instead, which restart at each record.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    _require_one_pack(module, query, attention_mask)
    lengths = _ends(query, cu_seq_lens_q, position_ids).diff().tolist()
    grouped = query.shape[1] != key.shape[1]
    outputs = []
    for q, k, v in zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True):
        seen = None
        if softcap is not None or (sliding_window is not None and q.shape[2] > sliding_window):
            seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
            if sliding_window is not None:
                seen = seen.triu(1 - sliding_window)
        if softcap is None:
            output = sdpa(q, k, v, attn_mask=seen, is_causal=seen is None, dropout_p=dropout, scale=scaling,
                          enable_gqa=grouped)
        else:
            assert scaling is not None and seen is not None
            k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for each in (k, v))
            scores = softcap * torch.tanh(q @ k.transpose(2, 3) * scaling / softcap)
            weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1, dtype=torch.float32).to(q.dtype)
            output = torch.dropout(weights, dropout, module.training) @ v
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1), None


def _attention_in_one_kernel(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
                             dropout: float = 0.0, scaling: float | None = None, sliding_window: int | None = None,
                             softcap: float | None = None, cu_seq_lens_q: Tensor | None = None,
                             max_length_q: int | None = None, position_ids: Tensor | None = None,
                             **_: Any) -> tuple[Tensor, None]:
    """As `_attention`, of all records at once, in half precision and without dropout and softcap.

    Args:
        max_length_q: the tokens of the longest record.
    """
    import torch
    from torch.nn.attention.varlen import varlen_attn

    _require_one_pack(module, query, attention_mask)
    assert not dropout and softcap is None, "the kernel has neither dropout nor softcap"
    ends = _ends(query, cu_seq_lens_q, position_ids)
    longest = int(ends.diff().max()) if max_length_q is None else int(max_length_q)
    # Layers that are kept in float32, such as norms of a model in 4 bits, leave queries of it; `sdpa` casts them, too.
    kind = query.dtype if query.dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
    q, k, v = (tensor[0].transpose(0, 1).to(kind) for tensor in (query, key, value))
    window = (-1 if sliding_window is None else sliding_window - 1, 0)  # tokens before a token, and after it
    output = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scaling, window_size=window,
                         enable_gqa=q.shape[1] != k.shape[1])
    return output[None], None


def _require_one_pack(module: Any, query: Tensor, attention_mask: Tensor | None) -> None:
    assert query.shape[0] == 1 and attention_mask is None, "attention by record takes one pack without padding"
    assert getattr(module, "is_causal", True), "attention by record is causal"


def _ends(query: Tensor, cu_seq_lens_q: Tensor | None, position_ids: Tensor | None) -> Tensor:
    """Where each record of the pack starts, and the end of the last one."""
    import torch

    if cu_seq_lens_q is not None:
        return cu_seq_lens_q
    assert position_ids is not None, "attention by record needs the boundaries of the records"
    starts = (position_ids[0] == 0).nonzero()[:, 0].int()
    return torch.cat([starts, starts.new_tensor([query.shape[2]])])
