"""What this server serves, as decided when it started."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass

from jobs.core.pipeline import Mode
from serving import bodies, heartbeat


@dataclass(frozen=True)
class Served:
    """The settings of this server process; the guard gets them through the environment."""

    pipelines: str  # the folder of pipeline folders
    volumes: str
    base_name: str  # the model name by which clients ask for the base
    base_model: str  # digest
    tokenizer: str  # digest
    base_folder: str
    max_lora_rank: int
    private_folder: str  # verified copies of adapters, out of everybody else's reach
    mode: Mode = "lora"
    merged: str | None = None  # in mode merged: the model that vLLM runs, as NAME@ADAPTER; None: the base model
    cpu_shield: bool = False  # whether vLLM computes LoRA on a CPU (serving/cpu_shield.py)
    drain_seconds: float = 55.0  # how long the last replies may take when the server ends
    restart_slot_seconds: float = 0.0  # how long one of several replicas has for a restart (base.next_turn)
    max_sequences: int | None = None  # for one request; None: a share of what the engine computes at once (guard.py)
    body_seconds: float = bodies.SECONDS
    body_memory: int = bodies.MEMORY_BYTES
    hang_seconds: float = heartbeat.SECONDS

    ENVIRONMENT = "SERVING_SETTINGS"

    def to_environment(self) -> dict[str, str]:
        return {self.ENVIRONMENT: json.dumps(asdict(self))}

    @classmethod
    def from_environment(cls) -> Served:
        return cls(**json.loads(os.environ[cls.ENVIRONMENT]))
