"""The environment file: the base model, the reference model and the settings of the server, for all its adapters.

`load` turns `environment.yaml` into an `Environment`, or raises one `UserError` that lists every problem with its
line, key and value. No network, no heavy imports.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from jobs.core import declarations, registry, signatures
from jobs.core.declarations import Loaded, ModelSource, Source, Strict, TokenizerSource

FILE = "environment.yaml"
# The values vLLM accepts for --max-lora-rank (vllm.config.lora.MaxLoRARanks; tests/test_serving_vllm.py compares them).
SERVABLE_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

Mode = Literal["lora", "merged"]

# What transformers and vLLM pass to a chat template, or take for themselves (apply_chat_template's parameters;
# tests/data/test_templates.py compares them).
TEMPLATE_RESERVED = frozenset({
    "messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt",
    "continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs"})


def _in_one_line(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """One problem for a value of several types; pydantic has one for each of them."""
    try:
        return validate(value)
    except ValidationError:
        raise PydanticCustomError("argument", "must be true, false, a finite number or a text", {}) from None


TemplateArgument = Annotated[bool | int | Annotated[float, Field(allow_inf_nan=False)] | str,
                             WrapValidator(_in_one_line)]


class Serving(Strict):
    # lora: vLLM loads the adapter beside the base model, and swaps it without a restart. merged: training also makes
    # one model of both, for base models on which vLLM has no LoRA (GPT-2), and vLLM restarts for a new one.
    mode: Mode = "lora"
    # Mode lora: vLLM reserves buffers of this rank at start, and cannot load an adapter of a higher one.
    max_lora_rank: Annotated[int, Field(ge=1)] = 64
    # Mode lora: how many adapters vLLM computes with at once, each in a slot on the GPU. There may be more adapters
    # than slots; a request then waits for one. By default 8, or more for more adapters if they fit (serving/room.py).
    slots: Annotated[int, Field(ge=1, le=1024)] | None = None
    # wait-for-adapters: the server changes to another base model when every adapter that it serves has one for it that
    # passed the gate. at-once: as soon as the base model is there, and without adapters until they have passed.
    when_base_changes: Literal["wait-for-adapters", "at-once"] = "wait-for-adapters"

    @model_validator(mode="after")
    def _servable(self) -> Serving:
        if self.max_lora_rank not in SERVABLE_RANKS:
            raise PydanticCustomError("rank", "max_lora_rank {rank} is not one vLLM serves; allowed: {allowed}",
                                      {"rank": self.max_lora_rank, "allowed": ", ".join(map(str, SERVABLE_RANKS))})
        return self


class Signing(Strict):
    # PEM. What adapters, evaluations and the like are signed by; any of them will do. To change the key, the new one is
    # added, and the old one removed once nothing that it signed is needed.
    public_keys: Annotated[list[str], Field(min_length=1)]

    @model_validator(mode="before")
    @classmethod
    def _public(cls, values: Any) -> Any:
        """The keys as OpenSSL writes them. No message quotes a value: it may be a private key by mistake."""
        keys = values.get("public_keys") if isinstance(values, dict) else None
        if not isinstance(keys, list) or not keys or not all(isinstance(key, str) for key in keys):
            problem = signatures.PRIVATE if signatures.is_private(str(values)) else (
                "must be a list of public keys in PEM, each as text (`- |`)")
            raise PydanticCustomError("keys", "{problem}", {"problem": problem, declarations.KEYS: "public_keys"})
        found: list[str] = []
        for number, text in enumerate(keys):
            where = {declarations.KEYS: f"public_keys.{number}"}
            try:
                found.append(signatures.public_key(text))
            except ValueError as error:
                raise PydanticCustomError("key", "{problem}", {"problem": str(error), **where}) from None
            if found[-1] in found[:-1]:
                raise PydanticCustomError("key", "is in the list twice", where)
        return {**values, "public_keys": found}

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self.public_keys)


class Retention(Strict):
    keep: Annotated[int, Field(ge=1)] = 5


class Publication(Strict):
    # Where promoted adapters go, each below its name: oci://REGISTRY/PREFIX or s3://BUCKET/PREFIX.
    to: str
    # Also the files of the evaluation that hold private texts: questions, answers, and the proof that a server checks.
    answers: bool = False

    @field_validator("to")
    @classmethod
    def _is_a_place(cls, to: str) -> str:
        if not re.fullmatch(rf"{registry.REPOSITORY}|s3://[^/\s]+(/[^/\s]+)*", to):
            raise PydanticCustomError("place", "must be oci://REGISTRY/PREFIX, in lower case and without a tag, or "
                                      "s3://BUCKET/PREFIX; the adapter's name is appended", {})
        return to


class Environment(Strict):
    """What all adapters of an environment share. `overlays/kind/environment.yaml` explains every key in comments."""

    base_model: ModelSource
    tokenizer: TokenizerSource = TokenizerSource()
    reference_model: ModelSource
    # Arguments of the chat templates, of base and reference model: the same in training, evaluation and serving.
    chat_template: dict[str, TemplateArgument] = Field(default_factory=dict)
    serving: Serving = Serving()
    retention: Retention = Retention()
    publication: Publication | None = None
    # In no digest: who vouches for an artifact changes nothing in it.
    signing: Signing | None = None

    def __hash__(self) -> int:
        """Equal environments have equal models; a dict, such as `chat_template`, has no hash."""
        return hash((self.base_model, self.tokenizer, self.reference_model))

    @field_validator("chat_template")
    @classmethod
    def _arguments(cls, value: dict[str, Any]) -> dict[str, Any]:
        if reserved := sorted(TEMPLATE_RESERVED & value.keys()):
            raise PydanticCustomError("reserved", "{keys} cannot be set: the server passes it to the template itself",
                                      {"keys": ", ".join(reserved)})
        return value

    @property
    def trusted_keys(self) -> tuple[str, ...]:
        """The public keys of `signing`, in PEM; empty where the environment asks for no signatures."""
        return self.signing.keys if self.signing else ()

    @property
    def tokenizer_source(self) -> Source:
        """The tokenizer's source: its own, or the base model's."""
        named = self.tokenizer if self.tokenizer.source else self.base_model
        return Source(source=str(named.source), revision=named.revision, sha256=named.sha256)

    def sources(self) -> dict[str, Source]:
        """Every source by its key in the file, in the order in which people read it."""
        named: dict[str, Source] = {"base_model": self.base_model}
        if self.tokenizer.source:
            named["tokenizer"] = self.tokenizer_source
        return named | {"reference_model": self.reference_model}


@dataclass(frozen=True)
class LoadedEnvironment(Loaded):
    """A valid environment and the file it came from."""

    environment: Environment


def load(path: Path, *, pinned: bool = True) -> LoadedEnvironment:
    """Read and validate an environment file.

    Args:
        path: the file, or the folder of an overlay.
        pinned: also require that every source is pinned (`pin` itself reads unpinned files).
    Raises:
        UserError: with one line for each problem: file, line, key, what is wrong, what is allowed. Nothing else,
            whatever the file holds.
    """
    file = declarations.find(path, FILE, "an overlay's folder")
    document = declarations.read(file, "base_model")
    environment = declarations.validate(document, Environment, document.values)
    if pinned:
        declarations.require_pins(document, environment.sources())
    return LoadedEnvironment(file, environment)
