"""Dropout that does not depend on the machine.

torch's dropout draws from one stream of random numbers, so a mask depends on everything that was drawn before: on the
number of processes, on how much is computed at once, on whether somebody evaluated in between. Here the mask of a token
follows from the seed, the step, the layer, its record and its position alone. It is cheaper, too: a mask is a piece of
one long tape of random values, at a place that a hash chooses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

PLACES = 2**20  # at which a mask can start
# Multipliers of splitmix64 (Steele et al. 2014) and of a Fibonacci hash (Knuth, TAOCP 3, section 6.4).
MIX, MIX_AGAIN, GOLDEN = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0x9E3779B97F4A7C15


class Masks:
    """The tape of the masks, and the keys of the tokens that are being computed."""

    def __init__(self, p: float, seed: int, widest: int) -> None:
        """Args: p: the share of features that is dropped; widest: the most features that a token has in a layer."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        self._tape = (torch.rand(PLACES + widest, generator=generator) >= p).float() / (1 - p)
        self._tapes: dict[Any, Tensor] = {}  # as a layer's input has it: device and type
        self._seed = seed
        self.keys: Tensor | None = None

    def choose(self, step: int, records: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any]) -> None:
        """Take masks for the tokens of these records, one after the other, in this step."""
        import numpy as np
        import torch

        starts = np.cumsum(lengths) - lengths
        positions = np.arange(int(lengths.sum())) - np.repeat(starts, lengths)
        keys = np.array([self._seed], dtype=np.uint64)
        for part in (np.array([step]), np.repeat(records, lengths), positions):
            keys = _mix(keys + (part.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN))
        self.keys = torch.from_numpy(keys.view(np.int64))

    def of(self, layer: int, values: Tensor) -> Tensor:
        """The mask of each token of `values`, which are [1, tokens, features].

        Args: layer: a number of 64 bits that no other layer has.
        """
        assert self.keys is not None and values.shape[-2] == len(self.keys), "`choose` is called for each batch"
        where = (values.device, values.dtype)
        if where not in self._tapes:
            self._tapes[where] = self._tape.to(values)
        keys = self.keys = self.keys.to(values.device)
        places = (((keys ^ layer) * (GOLDEN - 2**64)) >> 40) & (PLACES - 1)
        return self._tapes[where].unfold(0, values.shape[-1], 1)[places]


def _mix(keys: np.ndarray[Any, np.dtype[np.uint64]]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    import numpy as np

    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(MIX)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(MIX_AGAIN)
    return keys ^ (keys >> np.uint64(31))


def replace(model: nn.Module, p: float, seed: int) -> Masks:
    """Let the LoRA layers of `model` drop a share `p` of their inputs by masks, and nothing else drop anything.

    A base model's own dropout (GPT-2 and OPT have some) was meant for training all of its weights.
    """
    import numpy as np
    from peft.tuners.lora import LoraLayer
    from torch import nn

    for module in model.modules():
        for name, value in vars(module).items():
            if ("dropout" in name or "pdrop" in name) and isinstance(value, float):
                setattr(module, name, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    masks = Masks(p, seed, max(layer.in_features for layer in layers))
    if p:
        kind = _layer()
        numbers = _mix(np.arange(1, len(layers) + 1, dtype=np.uint64)).view(np.int64).tolist()
        for number, layer in zip(numbers, layers, strict=True):
            for adapter in layer.lora_dropout:
                layer.lora_dropout[adapter] = kind(masks, number)
    return masks


def _layer() -> Any:
    from torch import nn

    class MaskedDropout(nn.Module):
        def __init__(self, masks: Masks, layer: int) -> None:
            super().__init__()
            self._masks, self._layer = masks, layer

        def forward(self, values: Tensor) -> Tensor:
            return values * self._masks.of(self._layer, values) if self.training else values

    return MaskedDropout
