"""Imported before `python -m jobs`, it makes FSDP divide a model among processes on CPUs.

accelerate divides a model among GPUs only, though torch's FSDP and gloo can do so among processes on CPUs. This makes
accelerate take them for GPUs, so that training with `sharding: fsdp` can be tried where there is none.
"""

from __future__ import annotations

from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

original = AcceleratorState.__init__


def patched(self: Any, *arguments: Any, fsdp_plugin: Any = None, **named: Any) -> None:
    original(self, *arguments, fsdp_plugin=fsdp_plugin, **named)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin


AcceleratorState.__init__ = patched
