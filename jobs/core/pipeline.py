"""The pipeline file: one strict, pinned description of what is trained from what, and the gate it must pass.

`load` turns `pipeline.yaml` into a `Pipeline`, or raises one `UserError` that lists every problem with its line, key
and value. No network, no heavy imports: `check`, the stages and the serving guard all start here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from jobs.core import sources, strict_yaml
from jobs.core.errors import UserError
from jobs.core.strict_yaml import Document

# The values vLLM accepts for --max-lora-rank (vllm.config.lora.MaxLoRARanks; tests/core/test_models.py compares them).
SERVABLE_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

Mode = Literal["lora", "merged"]
COMMIT = re.compile(r"[0-9a-f]{40}")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False,
                              validate_default=True)  # 32 and the default 32.0 must give one digest


class Source(_Strict):
    """Where something comes from, and the pin of its exact version: `revision`, a 40-digit commit, or `sha256`, by its
    scheme (jobs/core/sources.py). What this code makes has no pin."""

    source: str
    revision: Annotated[str, Field(min_length=1)] | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None

    @property
    def scheme(self) -> str:
        return sources.scheme_of(self.source)

    @property
    def location(self) -> str:
        """The source without its scheme: a path, or OWNER/NAME on the hub."""
        return self.source.partition(":")[2].removeprefix("//")

    @property
    def pin(self) -> str:
        """The pin, as people read it in logs; `this code` for embedded sources."""
        return self.revision or self.sha256 or "this code"

    def unpinned(self) -> str | None:
        """What keeps the source from being pinned, in words; None when it is pinned."""
        key = sources.SCHEMES[self.scheme].pin
        if key is None:
            return None
        pin = getattr(self, key)
        if key == "revision" and pin and not COMMIT.fullmatch(pin):
            return f"`revision: {pin}` is not a commit of 40 hex digits: what it names can change"
        return None if pin else f"`{key}` is missing"


class DatasetSource(Source):
    """The private data: one file or a folder of JSONL, CSV or Parquet."""

    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.1

    @model_validator(mode="after")
    def _allowed(self) -> DatasetSource:
        sources.check(self.source, "data", self.revision, self.sha256)
        return self


class ModelSource(Source):
    """A model: a hub repository, a folder, or an embedded model. `architecture` lets `check` reject it offline."""

    architecture: str | None = None

    @model_validator(mode="after")
    def _allowed(self) -> ModelSource:
        sources.check(self.source, "model", self.revision, self.sha256)
        return self

    @property
    def name(self) -> str:
        """The name under which the model is served and shown: the source without `hf://`."""
        return self.source.removeprefix("hf://")


class TokenizerSource(_Strict):
    """The base model's own tokenizer, unless `source` names another."""

    source: str | None = None
    revision: Annotated[str, Field(min_length=1)] | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None

    @model_validator(mode="after")
    def _allowed(self) -> TokenizerSource:
        if self.source is not None:
            sources.check(self.source, "model", self.revision, self.sha256)
        elif self.revision or self.sha256:
            raise PydanticCustomError("pin", "has a pin but no `source`; empty, it means the base model's own", {})
        return self


class AcceptabilitySource(Source):
    """Sentences with acceptability judgements: embedded, or GLUE CoLA from the hub."""

    source: str = sources.EMBEDDED_PAIRS

    @model_validator(mode="after")
    def _allowed(self) -> AcceptabilitySource:
        sources.check(self.source, "acceptability", self.revision, self.sha256)
        return self


class Lora(_Strict):
    """LoRA's shape (Hu et al. 2021): rank `r`, scale `alpha / r`, and the linear layers that get an adapter."""

    r: Annotated[int, Field(ge=1, le=max(SERVABLE_RANKS))] = 16
    alpha: Annotated[float, Field(gt=0)] = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"


class Training(_Strict):
    lora: Lora = Lora()
    epochs: Annotated[int, Field(ge=1)] = 3
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 2e-4
    max_length: Annotated[int, Field(ge=8)] = 1024
    tokens_per_batch: Annotated[int, Field(ge=8)] = 4096
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    # How often a checkpoint is written, in steps. It changes what a kill costs, never the result: not in the digest.
    checkpoint_steps: Annotated[int, Field(ge=1)] = 100
    # Memory for speed: activations are computed again instead of kept. The same result: not in the digest.
    gradient_checkpointing: bool = False
    # fsdp: with several processes, each holds a part of the base model. The same result: not in the digest.
    sharding: Literal["none", "fsdp"] = "none"
    # 4bit: QLoRA, the base model in 4 bits while training. Evaluated and served on the whole one. In the digest.
    quantization: Literal["none", "4bit"] = "none"

    @model_validator(mode="after")
    def _fits(self) -> Training:
        if self.sharding == "fsdp" and self.quantization == "4bit":
            raise PydanticCustomError("sharding", "sharding: fsdp and quantization: 4bit cannot be combined; a base "
                                      "model in 4 bits needs a quarter of the memory: choose one", {})
        if self.tokens_per_batch < self.max_length:
            raise PydanticCustomError("batch", "tokens_per_batch ({batch}) must be at least max_length ({length}): a "
                                      "batch holds whole records", {"batch": self.tokens_per_batch,
                                                                    "length": self.max_length})
        return self


class Rule(_Strict):
    """One bound, or several, on one metric of the fine-tuned model. Ratio, gain and drop compare it with the base."""

    max_ratio: Annotated[float, Field(gt=0)] | None = None  # fine-tuned / base
    min_gain: float | None = None  # fine-tuned - base
    max_drop: float | None = None  # base - fine-tuned
    min: float | None = None  # the fine-tuned model's own value
    max: float | None = None

    @model_validator(mode="after")
    def _some(self) -> Rule:
        if not self.model_dump(exclude_none=True):
            raise PydanticCustomError("rule", "needs a bound: one of {bounds}",
                                      {"bounds": ", ".join(Rule.model_fields)})
        return self


class Gate(_Strict):
    """The gate: every rule must hold, or the adapter is not served."""

    perplexity: Rule | None = None
    rouge1: Rule | None = None
    rouge2: Rule | None = None
    rougeL: Rule | None = None  # noqa: N815 - the metric's name in the field
    rougeLsum: Rule | None = None  # noqa: N815
    acceptability_mcc: Rule | None = None
    acceptability_accuracy: Rule | None = None

    @model_validator(mode="after")
    def _some(self) -> Gate:
        if not self.model_dump(exclude_none=True):
            raise PydanticCustomError("gate", "is empty: an adapter would be served unproven. Add a rule for one of "
                                      "{metrics}", {"metrics": ", ".join(Gate.model_fields)})
        return self


class Evaluation(_Strict):
    acceptability: AcceptabilitySource = AcceptabilitySource()
    max_new_tokens: Annotated[int, Field(ge=1, le=4096)] = 64
    gate: Gate


class Serving(_Strict):
    # lora: vLLM loads the adapter beside the base model, and swaps it without a restart. merged: training also makes
    # one model of both, for base models on which vLLM has no LoRA (GPT-2), and vLLM restarts for a new one.
    mode: Mode = "lora"
    # Mode lora: vLLM reserves buffers of this rank at start, and cannot load an adapter of a higher one.
    max_lora_rank: Annotated[int, Field(ge=1)] = 64
    # wait-for-adapters: the server changes to another base model when every adapter that it serves has one for it that
    # passed the gate. at-once: as soon as the base model is there, and without adapters until they have passed.
    when_base_changes: Literal["wait-for-adapters", "at-once"] = "wait-for-adapters"

    @model_validator(mode="after")
    def _servable(self) -> Serving:
        if self.max_lora_rank not in SERVABLE_RANKS:
            raise PydanticCustomError("rank", "max_lora_rank {rank} is not one vLLM serves; allowed: {allowed}",
                                      {"rank": self.max_lora_rank, "allowed": ", ".join(map(str, SERVABLE_RANKS))})
        return self


class Retention(_Strict):
    keep: Annotated[int, Field(ge=1)] = 5


class Pipeline(_Strict):
    """One adapter, end to end. `overlays/kind/pipeline.yaml` explains every key in comments."""

    # The model name that clients send. No "@" (it separates name and digest inside vLLM), no "/" (it is a file name).
    adapter: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
    dataset: DatasetSource
    base_model: ModelSource
    tokenizer: TokenizerSource = TokenizerSource()
    reference_model: ModelSource
    training: Training = Training()
    evaluation: Evaluation
    serving: Serving = Serving()
    retention: Retention = Retention()

    @model_validator(mode="after")
    def _consistent(self) -> Pipeline:
        if self.serving.mode == "lora" and self.training.lora.r > self.serving.max_lora_rank:
            raise PydanticCustomError("rank", "training.lora.r is {r}, above serving.max_lora_rank ({max}): vLLM would "
                                      "refuse the adapter. Lower the one or raise the other",
                                      {"r": self.training.lora.r, "max": self.serving.max_lora_rank})
        if self.adapter == self.base_model.name:
            raise PydanticCustomError("name", "adapter has the base model's name: clients could not tell them apart",
                                      {})
        return self

    @property
    def tokenizer_source(self) -> Source:
        """The tokenizer's source: its own, or the base model's."""
        named = self.tokenizer if self.tokenizer.source else self.base_model
        return Source(source=str(named.source), revision=named.revision, sha256=named.sha256)

    def sources(self) -> dict[str, Source]:
        """Every source by its key in the file, in the order in which people read it."""
        named: dict[str, Source] = {"dataset": self.dataset, "base_model": self.base_model}
        if self.tokenizer.source:
            named["tokenizer"] = self.tokenizer_source
        return named | {"reference_model": self.reference_model,
                        "evaluation.acceptability": self.evaluation.acceptability}


@dataclass(frozen=True)
class Loaded:
    """A valid pipeline and the file it came from, against which `file:` sources are resolved."""

    path: Path
    pipeline: Pipeline

    def resolve(self, source: Source) -> Path:
        """The path of a `file:` source, relative to the pipeline file."""
        return self.path.parent / source.location


PROBLEMS = 20  # that are listed; the rest is counted


def find(path: Path) -> Path:
    """The pipeline file that a person means: the file itself, or `pipeline.yaml` in an overlay's folder."""
    try:
        file = path / "pipeline.yaml" if path.is_dir() else path
        there = file.exists()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not there:
        raise UserError(f"{file}: no such file. Name an overlay's folder, or its pipeline.yaml")
    return file


def load(path: Path, *, pinned: bool = True) -> Loaded:
    """Read and validate a pipeline file.

    Args:
        path: the file, or an overlay's folder.
        pinned: also require that every source is pinned (`pin` itself reads unpinned files).
    Raises:
        UserError: with one line for each problem: file, line, key, what is wrong, what is allowed. Nothing else,
            whatever the file holds.
    """
    file = find(path)
    document = strict_yaml.read(file)
    if not isinstance(document.values, dict):
        raise UserError(f"{file}: must hold a mapping with the key `adapter` and others, not "
                        f"{_description(document.values)}")
    pipeline = _validate(document)
    if pinned:
        _refuse(f"{file}:{document.line_of(key.split('.'))}: {key}: {source.source} is not pinned: {why}. "
                f"Run: python -m jobs pin {file.parent}"
                for key, source in pipeline.sources().items() if (why := source.unpinned()))
    return Loaded(file, pipeline)


def _validate(document: Document) -> Pipeline:
    try:
        try:
            return Pipeline.model_validate(document.values)
        except ValidationError as error:
            _refuse(_problem(document, dict(e)) for e in error.errors())
            raise
    except UserError:
        raise
    except Exception as error:  # one line, whatever it is: see `strict_yaml.read`
        raise UserError(strict_yaml.one_line(f"{document.file}: {type(error).__name__}: {error}")) from None


def _refuse(problems: Iterable[str]) -> None:
    """Raise `UserError` if there are problems, with a line for each."""
    lines = list(dict.fromkeys(map(strict_yaml.one_line, problems)))
    if len(lines) > PROBLEMS:
        lines[PROBLEMS:] = [f"{lines[-1].partition(': ')[0]}: and {len(lines) - PROBLEMS} more problems"]
    if lines:
        raise UserError("\n".join(lines))


def _description(value: Any) -> str:
    """A value as a message shows it."""
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def _problem(document: Document, error: dict[str, Any]) -> str:
    """One problem as one line; pydantic's own wording where it is already what a user needs."""
    keys = [str(k) for k in error["loc"] if not (isinstance(k, str) and k.startswith(("literal[", "constrained-",
                                                                                     "list[")))]
    where = f"{document.file}:{document.line_of(keys)}: {'.'.join(keys) or 'the file'}"
    description = _description(error["input"])
    if error["type"] == "extra_forbidden":
        allowed = _fields(keys[:-1])
        close = difflib.get_close_matches(keys[-1], allowed, n=1)
        hint = f"did you mean `{close[0]}`?" if close else f"allowed: {', '.join(allowed)}"
        return f"{where}: unknown key; {hint}"
    if error["type"] == "missing":
        return f"{where}: is missing"
    patterns = {"sha256": "64 hex digits (quote it if it is all digits)",
                "adapter": "1 to 63 of a-z, 0-9 and -, not at the ends"}
    if error["type"] == "string_pattern_mismatch" and keys[-1] in patterns:
        return f"{where}: {description} must be {patterns[keys[-1]]}"
    if isinstance(error.get("input"), BaseModel | dict) and error["type"] not in {"int_type", "float_type",
                                                                                 "string_type", "model_type"}:
        return f"{where}: {error['msg']}"
    return f"{where}: {description}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _fields(keys: list[str]) -> list[str]:
    """The keys that the model at `keys` allows."""
    model: type[BaseModel] = Pipeline
    for key in keys:
        annotation = model.model_fields[key].annotation
        kinds = [annotation, *getattr(annotation, "__args__", ())]
        model = next(k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel))
    return list(model.model_fields)
