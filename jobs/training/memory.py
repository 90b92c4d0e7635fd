"""How many tokens of a step are computed at once, from the memory that there is. It never changes what is learned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jobs.core.pipeline import Training

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# On a CPU more tokens at once are no faster, and what few of them need stays in its caches.
TOKENS_ON_CPU = 512
# Of a GPU's free memory: the rest is for the gradients' and the optimizer's state, and for what fragments.
SHARE_OF_MEMORY = 0.8


def tokens_at_once(model: PreTrainedModel, training: Training, processes: int) -> int:
    """`training.tokens_per_micro_batch`, or by default as many as fit into the free memory by an estimate; never more
    than a batch has. Where the estimate is too high, training halves it: see `trainer.team_trainer`.

    Args:
        processes: those that divide among them a model that is not on a GPU yet.
    """
    import torch

    if training.tokens_per_micro_batch:
        return min(training.tokens_per_micro_batch, training.tokens_per_batch)
    if not torch.cuda.is_available():
        return min(TOKENS_ON_CPU, training.tokens_per_batch)
    free, _ = torch.cuda.mem_get_info()
    to_come = sum(weight.nbytes for weight in model.parameters() if weight.device.type == "cpu") / processes
    fitting = int(SHARE_OF_MEMORY * (free - to_come) / bytes_per_token(model.config, training.gradient_checkpointing))
    return max(8, min(fitting, training.tokens_per_batch))


def bytes_per_token(config: Any, gradient_checkpointing: bool) -> int:
    """About what the activations of one token take in training, in bfloat16.

    A layer keeps for the backward pass, by features of 2 bytes: its residuals and norms, the latter in float32 (10
    hidden), queries, keys, values and attention's output (4), the masked inputs of seven linear layers and the masks
    (12 hidden and 2 intermediate), the feed-forward's gate, up, activation and product (4 intermediate). Recomputed,
    it keeps its input, and one layer at a time the rest. The logits are in bfloat16, in float32, and there are the
    gradients of both.
    """
    hidden: int = config.hidden_size
    intermediate = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
    layer = 2 * (26 * hidden + 6 * intermediate)
    layers: int = config.num_hidden_layers
    logits: int = 12 * config.vocab_size
    return logits + (layers * 2 * hidden + layer if gradient_checkpointing else layers * layer)
