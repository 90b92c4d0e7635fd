"""The settings of a server process, fixed at its start."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass

from jobs.core.environment import Mode
from serving import bodies, heartbeat

NO_ARGUMENTS = "{}"


@dataclass(frozen=True)
class Served:
    """The settings of this server process; the guard gets them through the environment."""

    pipelines: str  # the folder of environment.yaml and a NAME.yaml for each adapter
    volumes: str
    base_name: str  # the model name that clients send for the base model
    base_model: str  # digest
    tokenizer: str  # digest
    base_folder: str
    max_lora_rank: int
    private_folder: str  # for verified copies of adapters; other users cannot write to it
    mode: Mode = "lora"
    template: str = NO_ARGUMENTS  # the arguments of the chat template, as canonical JSON
    slots: int | None = None  # LoRA slots, as the environment file desires; None: derived (serving/room.py)
    adapter_memory: int = 2**30  # bytes of main memory for adapters
    merged: str | None = None  # in mode merged: the model that vLLM runs, as NAME@ADAPTER; None: the base model
    evaluation: str | None = None  # the one by which `merged` passed
    cpu_shield: bool = False  # whether vLLM computes LoRA on a CPU (serving/cpu_shield.py)
    drain_seconds: float = 55.0  # how long replies in progress may take when the server shuts down
    proof_tolerance: float | None = None  # of a log-probability (serving/proof.py); None: derived from the precision
    restart_slot_seconds: float = 0.0  # the length of a replica's time slot (base.next_turn); 0: none
    max_sequences: int | None = None  # of one request; None: a share of the engine's batch (guard.SHARE_OF_BATCH)
    body_seconds: float = bodies.SECONDS
    body_memory: int = bodies.MEMORY_BYTES
    hang_seconds: float = heartbeat.SECONDS

    ENVIRONMENT = "SERVING_SETTINGS"

    def to_environment(self) -> dict[str, str]:
        return {self.ENVIRONMENT: json.dumps(asdict(self))}

    @classmethod
    def from_environment(cls) -> Served:
        return cls(**json.loads(os.environ[cls.ENVIRONMENT]))
