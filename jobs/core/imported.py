"""An imported adapter: its pipeline.yaml names what another environment published, instead of data and training.

    adapter: seville-hotels
    source: oci://registry.example.com/team/adapters/seville-hotels
    sha256: …

The pin alone identifies it. Which adapter and which evaluation that is, is known when `relocate adapter` has fetched
and verified it: it records both in an artifact of the kind `imported-adapter` (`Imported`).

With `dataset` and `evaluation`, the adapter is also evaluated here, and promoted only if it passes here. For that part
of the work it is like an adapter that is trained here: `ImportedAdapter.evaluated_here`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from jobs.core import declarations, pipeline, sources
from jobs.core.artifacts import Spec
from jobs.core.declarations import DatasetSource, Loaded, Source
from jobs.core.environment import Environment, LoadedEnvironment
from jobs.core.errors import UserError
from jobs.core.files import read_plain_file
from jobs.core.pipeline import AdapterFile, Evaluation, LoadedPipeline, Pipeline, Training, check_name, load_environment

RECORD = "imported.json"  # the file of an `imported-adapter` artifact
RECORD_BYTES = 2**20  # it has about 1 kB


class AdapterSource(Source):
    """An adapter with its evaluation, as an environment published them."""

    @model_validator(mode="after")
    def _allowed(self) -> AdapterSource:
        sources.check(self.source, "adapter", self.revision, self.sha256)
        return self


class ImportedFile(AdapterFile):
    """What the `pipeline.yaml` of an imported adapter holds."""

    # Where another environment published the adapter.
    source: str
    # The pin: the digest of the manifest in the registry; in a bucket, that of the file SHA256SUMS.
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    # Both or neither: records on which the adapter is evaluated here too, before it is promoted.
    dataset: DatasetSource | None = None
    evaluation: Evaluation | None = None

    @field_validator("source")
    @classmethod
    def _is_published(cls, source: str) -> str:
        sources.check(source, "adapter", None, None)
        return source

    @field_validator("sha256")
    @classmethod
    def _is_its_pin(cls, sha256: str | None, info: ValidationInfo) -> str | None:
        if source := info.data.get("source"):
            sources.check(source, "adapter", None, sha256)
        return sha256

    @model_validator(mode="after")
    def _evaluates(self) -> ImportedFile:
        if (self.dataset is None) != (self.evaluation is None):
            there, lacking = ("dataset", "evaluation") if self.dataset else ("evaluation", "dataset")
            raise PydanticCustomError("both", "`{there}` without `{lacking}`: to evaluate the imported adapter here as "
                                      "well, give both; to rely on the evaluation that was published with it, neither",
                                      {"there": there, "lacking": lacking, declarations.KEYS: there})
        if self.evaluation and self.evaluation.privacy:
            raise PydanticCustomError("privacy", "measures what training learned of the records here, and an imported "
                                      "adapter was trained elsewhere: remove evaluation.privacy",
                                      {declarations.KEYS: "evaluation.privacy"})
        return self

    @property
    def published(self) -> AdapterSource:
        """Where it comes from: in a bucket, a folder."""
        in_bucket = sources.scheme_of(self.source) == "s3"
        return AdapterSource(source=f"{self.source.rstrip('/')}/" if in_bucket else self.source, sha256=self.sha256)

    def sources(self) -> dict[str, Source]:
        """Every source by its key in the pipeline file, in the order in which people read it."""
        found: dict[str, Source] = {"source": self.published}
        if self.dataset and self.evaluation:
            found |= pipeline.sources_of(self.dataset, self.evaluation)
        return found


class EvaluatedImport(Pipeline):
    """An imported adapter that is evaluated here, as the stages of data and evaluation read it. Its `training` only
    says how long a record may be (`max_length`)."""

    published: AdapterSource

    def sources(self) -> dict[str, Source]:
        return {"source": self.published} | super().sources()


class ImportedAdapter(ImportedFile):
    """One imported adapter in its environment."""

    environment: Environment

    @model_validator(mode="after")
    def _consistent(self) -> ImportedAdapter:
        check_name(self.adapter, self.environment)
        if self.environment.serving.mode == "merged":
            raise PydanticCustomError("mode", "serving.mode of the environment is merged, and only adapters that are "
                                      "trained here are merged with the base model: import it into an environment with "
                                      "mode lora, or train it here", {declarations.KEYS: "source"})
        return self

    @property
    def evaluated_here(self) -> EvaluatedImport | None:
        """Its data and evaluation here, if it has any."""
        if self.dataset is None or self.evaluation is None:
            return None
        # Its parts are valid, and it has no `training` that could contradict the environment.
        return EvaluatedImport.model_construct(
            adapter=self.adapter, dataset=self.dataset, training=Training(), evaluation=self.evaluation,
            environment=self.environment, published=self.published)


@dataclass(frozen=True)
class LoadedImport(Loaded):
    """A valid imported adapter, the file it came from, and its environment."""

    pipeline: ImportedAdapter
    environment: LoadedEnvironment

    def evaluated_here(self) -> LoadedPipeline | None:
        """As `ImportedAdapter.evaluated_here`."""
        found = self.pipeline.evaluated_here
        return LoadedPipeline(self.path, found, self.environment) if found else None


LoadedAdapter = LoadedPipeline | LoadedImport
Adapter = Pipeline | ImportedAdapter


def load(path: Path, environment_file: Path | LoadedEnvironment | None = None, *, pinned: bool = True) -> LoadedImport:
    """Read and validate the pipeline file of an imported adapter. As `pipeline.load`."""
    loaded = load_any(path, environment_file, pinned=pinned)
    if isinstance(loaded, LoadedPipeline):
        raise UserError(f"{loaded.path}: this adapter is trained here: it has no `source` of a published adapter")
    return loaded


def load_any(path: Path, environment_file: Path | LoadedEnvironment | None = None, *, pinned: bool = True,
             changes: Sequence[str] = ()) -> LoadedAdapter:
    """Read and validate the pipeline file of an adapter, trained here or imported. As `pipeline.load`."""
    document = declarations.read(pipeline.find(path), "adapter")
    file = document.file
    if "source" not in document.values or changes:  # which are those of a training
        if "sha256" in document.values and "source" not in document.values:
            raise UserError(f"{file}:{document.line_of(['sha256'])}: sha256: is the pin of an imported adapter, and "
                            "`source` is missing: add it, or remove `sha256` to train the adapter here")
        return pipeline.from_document(document, environment_file, pinned=pinned, changes=changes)
    if "training" in document.values:
        raise UserError(f"{file}:{document.line_of(['training'])}: training: beside `source`: an imported adapter is "
                        "not trained here. Remove `training`, or, to train the adapter here, `source` and `sha256`")
    declarations.validate(document, ImportedFile, document.values)
    shared = load_environment(file, environment_file, pinned=pinned)
    found = declarations.validate(document, ImportedAdapter, document.values | {"environment": shared.environment})
    if pinned:
        declarations.require_pins(document, found.sources())
    return LoadedImport(file, found, shared)


def load_data(path: Path, environment_file: Path | LoadedEnvironment | None = None, *, changes: Sequence[str] = ()
              ) -> LoadedPipeline:
    """Read and validate the pipeline file of an adapter that is evaluated here, for the stages that make its data. As
    `pipeline.load`."""
    loaded = load_any(path, environment_file, changes=changes)
    if isinstance(loaded, LoadedPipeline):
        return loaded
    if found := loaded.evaluated_here():
        return found
    raise not_evaluated(loaded)


def not_evaluated(loaded: LoadedImport) -> UserError:
    """The error of the stages of evaluation and of its data, for an imported adapter that is not evaluated here."""
    return UserError(f"{loaded.path}: this adapter is imported and has no `dataset` and `evaluation`: nothing is "
                     "evaluated here. Its only stage is: python -m jobs relocate adapter")


# --- what relocation found --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Imported:
    """What a published adapter consists of."""

    adapter: Spec
    evaluation: Spec  # the one that was published with it

    def to_json(self) -> str:
        """The content of the file `RECORD`."""
        return json.dumps({each.kind: {"spec": dict(each.spec), "inputs": dict(each.inputs)}
                           for each in (self.adapter, self.evaluation)}, indent=2, ensure_ascii=False) + "\n"


def read(folder: Path, volume: str) -> Imported:
    """What the `imported-adapter` artifact in a folder says; its files are not verified.

    Args:
        volume: the volume on which adapter and evaluation are.
    Raises:
        UserError: it is damaged.
        OSError: it is not there or cannot be read; `filename` is set.
    """
    file = folder / RECORD
    try:
        values: Any = json.loads(read_plain_file(file, RECORD_BYTES))
        specs = [Spec(volume, kind, dict(values[kind]["spec"]), dict(values[kind]["inputs"]))
                 for kind in ("adapter", "evaluation")]
        for spec in specs:
            str(spec)  # canonical JSON can be made of it
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{file}: is damaged ({error}). Move {folder} away and run the relocation again") from None
    return Imported(*specs)
