"""The pipeline file: one adapter's data, training and gate. With its environment file it decides everything.

`load` turns `pipeline.yaml` and `environment.yaml` into a `Pipeline`, or raises one `UserError` that lists every
problem with its line, key and value. No network, no heavy imports: `check`, the stages and the serving guard all start
here.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from jobs.core import declarations, environment, settings
from jobs.core.declarations import KEYS, AcceptabilitySource, DatasetSource, Loaded, Source, Strict
from jobs.core.environment import Environment, LoadedEnvironment
from jobs.core.errors import UserError
from jobs.core.metrics import (
    KNOWN,
    METRICS,
    MINIMUM_CLUSTERS,
    OF_CANARIES,
    PRIVACY,
    SCORES,
    TASKS,
    Metric,
    Score,
    metric_of,
    score_of,
)
from jobs.core.search import Alpha, Dropout, Epochs, LearningRate, Rank, Search, TargetModules, normalized
from jobs.core.strict_yaml import Document
from jobs.core.tasks import Task, check_names

FILE = "pipeline.yaml"
NAME = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"  # of an adapter
ADAPTERS = "adapters"  # the folder of an overlay that holds a folder for each adapter
# What `check` says of it where the data is at hand, and the encoding where it is not.
NO_VALIDATION = ("training.keep: best chooses by the loss on the validation split, and the dataset has none: set "
                 'dataset.validation (0.1, for example) or, in some records, "split": "validation"; or remove the key')


class Lora(Strict):
    """LoRA's shape (Hu et al. 2021): rank `r`, scale `alpha / r`, and the linear layers that get an adapter."""

    r: Rank = 16
    alpha: Alpha = 32
    dropout: Dropout = 0.05
    target_modules: TargetModules = "all-linear"


class Training(Strict):
    # What is learned: sft, the answers; from preferences, dpo or orpo: one answer rather than another. In the digest.
    objective: Literal["sft", "dpo", "orpo"] = "sft"
    # How much preferences weigh. In dpo, the larger, the nearer to the base model the adapter stays; in orpo, the share
    # of the odds ratio in the loss. 0.1, as in both papers, where it is not set. In the digest.
    beta: Annotated[float, Field(gt=0)] | None = None
    lora: Lora = Lora()
    epochs: Epochs = 3
    learning_rate: LearningRate = 2e-4
    max_length: Annotated[int, Field(ge=8)] = 1024
    tokens_per_batch: Annotated[int, Field(ge=8)] = 4096
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    # best: the weights with the lowest loss on the validation split, instead of the last ones. In the digest.
    keep: Literal["last", "best"] = "last"
    # With keep: best, end after so many evaluations (there are ten) without a lower loss. In the digest.
    patience: Annotated[int, Field(ge=1)] | None = None
    # How many tokens of a batch are computed at once; by default as memory allows. The same result: not in the digest.
    tokens_per_micro_batch: Annotated[int, Field(ge=8)] | None = None
    # How often a checkpoint is written, in steps. It changes what a kill costs, never the result: not in the digest.
    checkpoint_steps: Annotated[int, Field(ge=1)] = 100
    # Memory for speed: activations are computed again instead of kept. The same result: not in the digest.
    gradient_checkpointing: bool = False
    # fsdp: with several processes, each holds a part of the base model. The same result: not in the digest.
    sharding: Literal["none", "fsdp"] = "none"
    # 4bit: QLoRA, the base model in 4 bits while training. Evaluated and served on the whole one. In the digest.
    quantization: Literal["none", "4bit"] = "none"
    # Settings that training chooses by itself. In the digest, instead of the keys that it names.
    search: Search | None = None

    @model_validator(mode="after")
    def _fits(self) -> Training:
        if self.sharding == "fsdp" and self.quantization == "4bit":
            raise PydanticCustomError("sharding", "sharding: fsdp and quantization: 4bit cannot be combined; a base "
                                      "model in 4 bits needs a quarter of the memory: choose one", {})
        if self.patience is not None and self.keep == "last":
            raise PydanticCustomError("patience", "patience is for keep: best, and keep is last; set keep: best, or "
                                      "remove patience", {})
        if self.objective == "sft" and self.beta is not None:
            raise PydanticCustomError("objective", "beta is for objective: dpo and objective: orpo, and objective is "
                                      "sft; remove beta", {})
        if self.objective == "dpo" and self.sharding == "fsdp":
            raise PydanticCustomError("objective", "objective: dpo and sharding: fsdp cannot be combined: dpo also "
                                      "computes the base model, with the adapter switched off; remove sharding, or "
                                      "take objective: orpo", {})
        if self.objective != "sft" and self.tokens_per_batch < 2 * self.max_length:
            raise PydanticCustomError("batch", "tokens_per_batch ({batch}) must be at least twice max_length "
                                      "({length}): a batch holds both answers of a preference, each after its prompt",
                                      {"batch": self.tokens_per_batch, "length": self.max_length})
        if self.tokens_per_batch < self.max_length:
            raise PydanticCustomError("batch", "tokens_per_batch ({batch}) must be at least max_length ({length}): a "
                                      "batch holds whole records", {"batch": self.tokens_per_batch,
                                                                    "length": self.max_length})
        return self

    @model_validator(mode="after")
    def _searched(self) -> Training:
        if self.search is None and "search" in self.model_fields_set:  # `search:` and nothing below it
            raise PydanticCustomError("search", "is empty: name `candidates`, or remove the key", {KEYS: "search"})
        for key, values in self.search.candidates.by_key().items() if self.search else ():
            owner, name = (self.lora, key.removeprefix("lora.")) if key.startswith("lora.") else (self, key)
            value = normalized(getattr(owner, name))
            if name in owner.model_fields_set and value not in values:
                raise PydanticCustomError("searched", "{key} is {value}, which is not among its candidates in "
                                          "`search`: remove the key, or add the value there",
                                          {"key": key, "value": str(value)})
        return self

    @property
    def strength(self) -> float:
        """The effective `beta`."""
        return 0.1 if self.beta is None else self.beta

    def trials(self) -> list[Training]:
        """The settings of each trial of the search; without one, these."""
        return [self.with_settings(settings) for settings in self.search.settings()] if self.search else [self]

    def with_settings(self, settings: Mapping[str, Any]) -> Training:
        """This training with settings that a search named, and without the search."""
        lora = {key.removeprefix("lora."): value for key, value in settings.items() if key.startswith("lora.")}
        own = {key: value for key, value in settings.items() if not key.startswith("lora.")}
        return self.model_copy(update={"search": None, "lora": self.lora.model_copy(update=lora), **own})


class Rule(Strict):
    """One bound, or several, on one score of the fine-tuned model. Each must hold with `evaluation.confidence`. Ratio,
    gain and drop compare with another model, on the same held-out data: `base`, unless `than` names another."""

    max_ratio: Annotated[float, Field(gt=0)] | None = None  # fine-tuned / base
    min_gain: float | None = None  # fine-tuned - base
    max_drop: float | None = None  # base - fine-tuned
    min: float | None = None  # the fine-tuned model's own value
    max: float | None = None
    than: Literal["base", "promoted", "reference"] = "base"  # promoted: the adapter that is served until now

    @model_validator(mode="after")
    def _some(self) -> Rule:
        if not self.bounds():
            raise PydanticCustomError("rule", "needs a bound: one of {bounds}", {"bounds": ", ".join(BOUNDS)})
        alone = [bound for bound in self.bounds() if not BOUNDS[bound].compares]
        if alone and self.than != "base":
            raise PydanticCustomError("rule", "{bound} is a bound on the fine-tuned model's own value: `than` is for "
                                      "{comparing}", {"bound": alone[0], "comparing": ", ".join(
                                          name for name, bound in BOUNDS.items() if bound.compares)})
        return self

    def bounds(self) -> dict[str, float]:
        """The limits by bound."""
        return {name: limit for name in BOUNDS if (limit := getattr(self, name)) is not None}


def _kind(value: Any) -> str:
    return "list[rules]" if isinstance(value, list) else "list[rule]"  # as messages leave out of a key's path


# One rule, or several: one against the base model and one against the promoted adapter, for example.
Rules = Annotated[Annotated[Rule, Tag("list[rule]")] | Annotated[list[Rule], Tag("list[rules]"), Field(min_length=1)],
                  Discriminator(_kind)]


def check_gate(gate: dict[str, Rules], info: ValidationInfo) -> dict[str, Rules]:
    """Every rule must be on a score that there is, and must not reward getting worse.

    Raises:
        PydanticCustomError: with what was probably meant.
    """
    tasks = info.data.get("tasks")  # None: they are invalid themselves
    allowed = [*KNOWN, *(task.key for task in tasks or ())]
    if not gate:
        raise PydanticCustomError("gate", "is empty: an adapter would be served unproven. Add a rule for one of "
                                  "{metrics}", {"metrics": ", ".join([*SCORES, *(task.key for task in tasks or ())])})
    for key, value in gate.items():
        if key not in allowed and not (tasks is None and key.startswith(TASKS)):
            close = difflib.get_close_matches(key, allowed, n=1)
            hint = f"did you mean `{close[0]}`?" if close else f"allowed: {', '.join(allowed)}"
            what = "evaluation.tasks has no task of this name" if key.startswith(TASKS) else "unknown metric"
            raise PydanticCustomError("metric", "{what}; {hint}", {"what": what, "hint": hint, KEYS: key})
        score = score_of(key)
        for rule in value if isinstance(value, list) else [value]:
            for bound in rule.bounds():
                if BOUNDS[bound].for_higher != score.higher_is_better:
                    raise PydanticCustomError("direction", "{bound} would let an adapter pass for being worse: of "
                                              "{label}, {better} is better. Did you mean {meant}?",
                                              {"bound": bound, "label": score.label, "better": score.better,
                                               "meant": BOUNDS[bound].meant, KEYS: f"{key}.{bound}"})
                _require_possible(key, score, bound, rule.bounds()[bound])
    return gate


def _require_possible(key: str, score: Score, bound: str, limit: float) -> None:
    """Some values of the score keep the rule, and some do not.

    Raises:
        PydanticCustomError: with the range.
    """
    kind, width = BOUNDS[bound], score.high - score.low
    low, high = (-width, width) if kind.compares else (score.low, score.high)
    if bound == "max_ratio":
        low, high = 0.0, math.inf
    if low <= limit <= high:
        return
    impossible = limit > high if kind.at_least else limit < low
    raise PydanticCustomError("range", "{limit}: {expression} is {low} to {high}, so {effect}",
                              {"limit": f"{limit:g}", "expression": kind.expression.format(other="base"),
                               "low": f"{low:g}", "high": f"{high:g}".replace("inf", "infinity"),
                               "effect": "no adapter could pass" if impossible else "this would prove nothing",
                               KEYS: f"{key}.{bound}"})


@dataclass(frozen=True)
class Bound:
    """A kind of bound."""

    expression: str  # what is compared with the limit
    at_least: bool  # the limit, or else at most
    for_higher: bool  # for scores of which higher values are better, or else lower ones
    meant: str  # by who writes it for a score of the other direction

    @property
    def compares(self) -> bool:
        """Whether with another model."""
        return "{other}" in self.expression


BOUNDS = {
    "max_ratio": Bound("fine-tuned / {other}", False, False, "min_gain, or max_drop"),
    "min_gain": Bound("fine-tuned - {other}", True, True, "max_ratio, below 1"),
    "max_drop": Bound("{other} - fine-tuned", False, True, "max_ratio, such as 1.05"),
    "min": Bound("fine-tuned", True, True, "max"),
    "max": Bound("fine-tuned", False, False, "min"),
}


ANSWERED_RECORDS = 1000


class Privacy(Strict):
    """What is measured of how much the adapter remembers of single records (docs/privacy.md). Canaries, made-up records
    with a random secret, are added to the train split: they are in the digest of the encoded dataset."""

    canaries: Annotated[int, Field(ge=0, le=1000)] = 100  # 0: none; only the real records are measured
    repetitions: Annotated[int, Field(ge=1, le=100)] = 1  # how often each canary is in the train split
    records: Annotated[int, Field(ge=100, le=100_000)] = 1000  # train records, and held-out ones, that are measured
    verbatim_tokens: Annotated[int, Field(ge=1)] = 50  # that count as a verbatim continuation

    @field_validator("canaries")
    @classmethod
    def _enough(cls, canaries: int) -> int:
        if 0 < canaries < MINIMUM_CLUSTERS:
            raise PydanticCustomError("canaries", "{canaries} canaries cannot prove anything: at least {minimum} are "
                                      "needed, or 0 for none", {"canaries": canaries, "minimum": MINIMUM_CLUSTERS})
        return canaries


class Evaluation(Strict):
    acceptability: AcceptabilitySource = AcceptabilitySource()
    max_new_tokens: Annotated[int, Field(ge=1, le=4096)] = 64
    # How many held-out questions each model answers, at most: the first by sha256. The mean ROUGE of 1000 answers is
    # known to about 0.016 with 95 % confidence (single values vary by about 0.3): finer than any sensible rule.
    answered_records: Annotated[int, Field(ge=1)] = ANSWERED_RECORDS
    # How sure each rule must be. Of adapters that do not keep a rule, at most 1 - confidence pass it by luck.
    confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.95
    # What counts as one piece of evidence: all records of a `group`, and of the others all with the same answer; or,
    # where answers are labels, each record without a group by itself.
    clusters: Literal["answer", "record"] = "answer"
    # The user's own tasks: prompts, and a check of the answer to each (docs/tasks.md).
    tasks: Annotated[list[Task], AfterValidator(check_names)] = Field(default_factory=list)
    # Without it, nothing of privacy is measured, and training is on the data alone.
    privacy: Privacy | None = None
    # Every rule must hold, or the adapter is not served.
    gate: Annotated[dict[str, Rules], AfterValidator(check_gate)]
    # false: the report shows numbers and line numbers only, no questions, references and answers.
    report_answers: bool = True

    def metrics(self) -> tuple[Metric, ...]:
        """What is measured."""
        return (*METRICS, *([PRIVACY] if self.privacy else []), *(metric_of(task.key) for task in self.tasks))

    def scores(self) -> dict[str, Score]:
        """The scores of what is measured, by key."""
        return {score.key: score for metric in self.metrics() for score in metric.scores}

    @model_validator(mode="after")
    def _measures_privacy(self) -> Evaluation:
        for key in (score.key for score in PRIVACY.scores if score.key in self.gate):
            if self.privacy is None:
                raise PydanticCustomError("privacy", "is not measured: add `{key}` to evaluation, or remove the rule",
                                          {"key": "privacy: {}", KEYS: f"gate.{key}"})
            if key in OF_CANARIES and not self.privacy.canaries:
                raise PydanticCustomError("privacy", "is measured with canaries, and evaluation.privacy.canaries is 0: "
                                          "raise it, or remove the rule", {KEYS: f"gate.{key}"})
            rules = self.gate[key]
            for rule in rules if isinstance(rules, list) else [rules]:
                if other := [bound for bound in rule.bounds() if bound != "max"]:
                    raise PydanticCustomError("privacy", "privacy is not compared with other models: they were trained "
                                              "on other records. Write max", {KEYS: f"gate.{key}.{other[0]}"})
        return self

    def rules(self) -> list[tuple[str, Rule]]:
        """The rules, each with the key of its score; in the registry's order, whatever that of the file."""
        return [(key, rule) for key in self.scores() if (value := self.gate.get(key)) is not None
                for rule in (value if isinstance(value, list) else [value])]


class AdapterFile(Strict):
    """What every `pipeline.yaml` holds, of a trained adapter or of an imported one (jobs/core/imported.py)."""

    # The model name that clients send. No "@" (it separates name and digest inside vLLM), no "/" (it is a file name).
    adapter: Annotated[str, Field(pattern=f"^{NAME}$")]

    @field_validator("adapter")
    @classmethod
    def _is_free(cls, name: str) -> str:
        if name == Path(environment.FILE).stem:  # serving mounts NAME.yaml beside environment.yaml
            raise PydanticCustomError("name", "no adapter can have this name: its file would be {file} for the server",
                                      {"file": environment.FILE})
        return name


def check_name(adapter: str, shared: Environment) -> None:
    """An adapter must not have the base model's name.

    Raises:
        PydanticCustomError: it does.
    """
    if adapter == shared.base_model.name:
        raise PydanticCustomError("name", "has the base model's name: clients could not tell them apart",
                                  {KEYS: "adapter"})


class PipelineFile(AdapterFile):
    """What `pipeline.yaml` holds. `overlays/kind/adapters/seville-hotels/pipeline.yaml` explains every key."""

    dataset: DatasetSource
    training: Training = Training()
    evaluation: Evaluation

    def sources(self) -> dict[str, Source]:
        """Every source by its key in the pipeline file, in the order in which people read it."""
        return sources_of(self.dataset, self.evaluation)


def sources_of(dataset: DatasetSource, evaluation: Evaluation) -> dict[str, Source]:
    """Every source of data by its key in the pipeline file."""
    found: dict[str, Source] = {"dataset": dataset, "evaluation.acceptability": evaluation.acceptability}
    for number, task in enumerate(evaluation.tasks):
        found[f"evaluation.tasks.{number}"] = task
        if task.lm_eval:
            found[f"evaluation.tasks.{number}.lm_eval"] = task.lm_eval
    return found


class Pipeline(PipelineFile):
    """One adapter, end to end, in its environment."""

    environment: Environment

    @model_validator(mode="after")
    def _consistent(self) -> Pipeline:
        serving, search = self.environment.serving, self.training.search
        searched = search.candidates.lora.r if search else None
        r = max(searched or [self.training.lora.r])
        if serving.mode == "lora" and r > serving.max_lora_rank:
            raise PydanticCustomError("rank", "{verb} {r}, above serving.max_lora_rank ({max}) of the environment: "
                                      "vLLM would refuse the adapter. Lower the one or raise the other",
                                      {"verb": "has" if searched else "is", "r": r, "max": serving.max_lora_rank,
                                       KEYS: f"training.{'search.candidates.' if searched else ''}lora.r"})
        if self.evaluation.privacy and self.training.objective != "sft":
            raise PydanticCustomError("privacy", "evaluation.privacy measures what `training.objective: sft` learned, "
                                      "and the objective is {objective}: remove evaluation.privacy",
                                      {"objective": self.training.objective})
        check_name(self.adapter, self.environment)
        return self


@dataclass(frozen=True)
class LoadedPipeline(Loaded):
    """A valid pipeline, the file it came from, and its environment."""

    pipeline: Pipeline
    environment: LoadedEnvironment
    changed: Mapping[str, Any] = field(default_factory=dict)  # what one run takes instead of the file's values


def find_environment(file: Path) -> Path:
    """The environment file of a pipeline file: beside it, or that of the overlay whose adapter it is
    (`OVERLAY/adapters/NAME/pipeline.yaml`)."""
    beside, folder = file.with_name(environment.FILE), file.parent
    if folder.absolute().parent.name != ADAPTERS or beside.exists():
        return beside
    overlay = folder.parent.parent if len(folder.parts) > 2 else folder.absolute().parent.parent
    return overlay / environment.FILE


def load_environment(file: Path, environment_file: Path | LoadedEnvironment | None, *, pinned: bool
                     ) -> LoadedEnvironment:
    """The environment of a pipeline file; by default that of `find_environment`."""
    if isinstance(environment_file, LoadedEnvironment):
        return environment_file
    return environment.load(environment_file or find_environment(file), pinned=pinned)


def load(path: Path, environment_file: Path | LoadedEnvironment | None = None, *, pinned: bool = True,
         changes: Sequence[str] = ()) -> LoadedPipeline:
    """Read and validate a pipeline file and the environment file that it belongs to.

    Args:
        path: the pipeline file, or the adapter's folder.
        environment_file: the environment file, or what was loaded from it; by default that of `find_environment`.
        pinned: also require that every source is pinned (`pin` itself reads unpinned files).
        changes: KEY=VALUE, what one run takes instead of the file's values.
    Raises:
        UserError: with one line for each problem: file, line, key, what is wrong, what is allowed. Nothing else,
            whatever the files hold.
    """
    return from_document(declarations.read(find(path), "adapter"), environment_file, pinned=pinned, changes=changes)


def from_document(document: Document, environment_file: Path | LoadedEnvironment | None, *, pinned: bool,
                  changes: Sequence[str] = ()) -> LoadedPipeline:
    """As `load`, of a pipeline file that was read already."""
    file = document.file
    moved = [key for key in Environment.model_fields if key in document.values]
    if moved:
        raise UserError(f"{file}:{document.line_of(moved[:1])}: {', '.join(moved)}: what all adapters share is in "
                        f"{environment.FILE}{_what_to_do(document)}")
    if "source" in document.values:
        raise UserError(f"{file}:{document.line_of(['source'])}: source: this adapter is imported, not trained here. "
                        "Its stage is: python -m jobs relocate adapter")
    declarations.validate(document, PipelineFile, document.values)
    shared = load_environment(file, environment_file, pinned=pinned)
    pipeline = declarations.validate(document, Pipeline, document.values | {"environment": shared.environment})
    if pinned:
        declarations.require_pins(document, pipeline.sources())
    changed = settings.changes(pipeline.training, changes) if changes else {}
    if changed:
        try:
            pipeline = declarations.validate(document, Pipeline, settings.applied(document.values, changed) | {
                "environment": shared.environment})
        except UserError as error:
            raise UserError(f"with --set {' --set '.join(changes)}: {error}") from None
    return LoadedPipeline(file, pipeline, shared, changed)


def _what_to_do(document: Document) -> str:
    """What to do with a pipeline file that has keys of the environment: those of an adapter's folder are in the wrong
    file; any other file is one of the earlier form, in which one file held everything."""
    file, shared = document.file, find_environment(document.file)
    if shared.parent != file.parent:
        return f". Remove it here; for all, set it in {shared}"
    name = document.values.get("adapter")
    named = name if isinstance(name, str) and re.fullmatch(NAME, name) else "NAME"
    return f" now. To convert this file, run: python -m jobs new {file.parent} {named} --from {file}"


def find(path: Path) -> Path:
    """The pipeline file that a person means: the file itself, or `pipeline.yaml` in an adapter's folder."""
    return declarations.find(path, FILE, "an adapter's folder")
