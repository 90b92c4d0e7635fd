"""Linear layers through oneDNN on processors on which torch's default, Intel's MKL, is slow.

MKL multiplies float32 matrices on AMD's processors at less than half of their speed: 105 GFLOP/s a thread where oneDNN,
which is part of torch too, reaches 230. The result is the same up to rounding. The processor decides, not a
measurement: every attempt of a job on a machine computes the same way, so a resumed training ends with the same bytes.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

# Multiplications below which MKL is as fast or faster: for few rows, as in generation, or small layers.
LEAST_WORK = 2**23
# oneDNN compiles a kernel for each number of rows, and 0.5 to 3 MB of memory stay with each: batches of all lengths
# would take gigabytes in the end. So rows are filled up to a multiple of this.
ROWS = 64


def use_onednn(model: PreTrainedModel) -> None:
    """Compute the model's float32 linear layers with oneDNN where that is faster, while their weights are frozen.

    Layers that are trained, such as those of an adapter that is added later, stay as they are.
    """
    if not mkl_is_slow():
        return
    faster = _faster_classes()
    for module in model.modules():
        if type(module) in faster and module.weight.device.type == "cpu":
            module.__class__ = faster[type(module)]


@functools.cache
def mkl_is_slow() -> bool:
    """Whether this is a processor of AMD, and torch has both libraries."""
    import torch

    try:
        processor = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return False
    return "AuthenticAMD" in processor and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


@functools.cache
def _faster_classes() -> dict[type, type]:
    """For each kind of linear layer, the same one through oneDNN: layers change their class, and nothing else."""
    import torch
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        filled = nn.functional.pad(rows, (0, 0, 0, -len(rows) % ROWS))
        product: Tensor = torch.ops.mkldnn._linear_pointwise(filled, weight, bias, "none", [], "")
        return product[: len(rows)].view(*x.shape[:-1], -1)

    class Frozen(torch.autograd.Function):
        """The operator has no gradient of its own. The weight, [out, in], needs none."""

        @staticmethod
        def forward(context: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            context.save_for_backward(weight)
            return multiply(x, weight, bias)

        @staticmethod
        def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
            (weight,) = context.saved_tensors
            return multiply(gradient, weight.t(), None), None, None

    def suits(layer: Any, x: Tensor) -> bool:
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in layer.parameters()):
            return False
        rows = x.numel() // x.shape[-1]
        return bool(x.dtype == layer.weight.dtype == torch.float32 and x.device.type == "cpu"
                    and rows * layer.weight.numel() >= LEAST_WORK)

    class OneDnnLinear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return Frozen.apply(x, self.weight, self.bias) if suits(self, x) else super().forward(x)

    class OneDnnConv1D(Conv1D):
        """GPT-2's linear layer, which keeps its weight as [in, out]."""

        def forward(self, x: Tensor) -> Tensor:
            return Frozen.apply(x, self.weight.t(), self.bias) if suits(self, x) else super().forward(x)

    return {nn.Linear: OneDnnLinear, Conv1D: OneDnnConv1D}
