"""Attention by record: the records of a pack never attend to each other, so each is computed by itself.

A pack is one row of tokens. transformers' sdpa computes all pairs of its tokens and then masks away those of different
records, which takes time and memory quadratic in the pack. Record by record it is linear, with the same result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

NAME = "by_record"


def attend_by_record(model: PreTrainedModel) -> None:
    """Let a model attend by record from now on, where that is needed or known to be faster: on CPUs.

    Each call of the model then takes one pack, with the records' boundaries as `DataCollatorWithFlattening` gives them
    with `return_flash_attn_kwargs`. It stays as it is on GPUs, and for models whose class has attention of its own.
    """
    import torch
    from transformers import AttentionInterface

    # OPT's own mask has no regard for positions, so the records in a pack would see each other (transformers 5.19).
    if not torch.cuda.is_available() or model.config.model_type == "opt":
        # Without a mask function of this name, transformers builds no mask.
        AttentionInterface.register(NAME, _attention)
        model.set_attn_implementation(NAME)


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

    assert query.shape[0] == 1 and attention_mask is None, "attention by record takes one pack without padding"
    assert getattr(module, "is_causal", True), "attention by record is causal"
    if cu_seq_lens_q is not None:
        lengths = cu_seq_lens_q.diff().tolist()
    else:
        assert position_ids is not None, "attention by record needs the boundaries of the records"
        starts = (position_ids[0] == 0).nonzero()[:, 0]
        lengths = starts.diff(append=starts.new_tensor([query.shape[2]])).tolist()
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
