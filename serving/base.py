"""The base model that this server runs, which adapters fit it, and when a changed pipeline file asks for another.

A vLLM process has one base model, one tokenizer and one mode. The first pipeline file (by the name of its folder)
decides on them; the others only add adapters, and one that wants something else is refused.
"""

from __future__ import annotations

from pathlib import Path

from jobs.core import artifacts, models, pipeline
from jobs.core.errors import UserError
from jobs.core.pipeline import Loaded, Pipeline
from jobs.core.plan import Plan, plan
from serving.candidates import pipeline_files
from serving.refusal import Refused
from serving.served import Served


def leading(folder: Path) -> Loaded:
    """The pipeline file that decides on base model, tokenizer and mode.

    Raises:
        UserError: when there is none, or it is invalid.
    """
    files = pipeline_files(folder)
    if not files:
        raise UserError(f"{folder}: no pipeline files; there must be at least one {folder}/NAME/pipeline.yaml")
    return pipeline.load(files[0])


def following(folder: Path, leader: Loaded) -> list[Pipeline]:
    """The other pipelines that fit the leading one. What is wrong with the rest, the aliases report."""
    fitting, base = [], plan(leader.pipeline)
    for file in pipeline_files(folder):
        try:
            other = pipeline.load(file).pipeline
        except UserError:
            continue
        if file != leader.path and _shared(plan(other)) == _shared(base) and other.serving.mode == "lora":
            fitting.append(other)
    return fitting


def check_fits(wish: Pipeline, served: Served) -> None:
    """Return if an adapter of this pipeline can be served by this server.

    Raises:
        Refused: with reason `base` or `mode`.
    """
    planned = plan(wish)
    for key, digest, ours in (("base model", planned.base_model.digest, served.base_model),
                              ("tokenizer", planned.tokenizer.digest, served.tokenizer)):
        if digest != ours:
            raise Refused("base", f"its {key} is {digest}, this server's is {ours}; a server serves adapters of one "
                                  "base model. Give the pipeline a server of its own")
    if wish.serving.mode != served.mode:
        raise Refused("mode", f"its serving.mode is {wish.serving.mode}, this server's is {served.mode}. Give the "
                              "pipeline a server of its own")


def fits(wish: Pipeline, served: Served) -> bool:
    """`check_fits` as a question."""
    try:
        check_fits(wish, served)
    except Refused:
        return False
    return True


def changed(leader: Pipeline, others: list[Pipeline], served: Served) -> str | None:
    """Why the server must restart to follow the pipeline files, in words; None when it need not."""
    planned = plan(leader)
    if _shared(planned) != (served.base_model, served.tokenizer):
        return f"base model and tokenizer changed to {planned.base_model} and {planned.tokenizer}"
    if leader.serving.mode != served.mode:
        return f"serving.mode changed from {served.mode} to {leader.serving.mode}"
    rank = max_lora_rank(leader, others)
    if served.mode == "lora" and rank > served.max_lora_rank:
        return f"serving.max_lora_rank was raised from {served.max_lora_rank} to {rank}"
    return None


def folders(leader: Pipeline, volumes: Path) -> list[Path]:
    """Where base model and tokenizer are, or will be."""
    planned = plan(leader)
    return [planned.base_model.path(volumes), planned.tokenizer.path(volumes)]


def check_startable(leader: Pipeline, volumes: Path) -> None:
    """Return if a server could start with this pipeline file: the one that runs must not end before that is sure.

    Raises:
        Refused: with reason `base`.
    """
    try:
        folder, _ = (artifacts.read(each).path for each in folders(leader, volumes))
        models.check_servable(models.architecture(folder), "base_model", leader.serving.mode)
    except UserError as error:
        raise Refused("base", str(error)) from None


def max_lora_rank(leader: Pipeline, others: list[Pipeline]) -> int:
    """The rank for which vLLM must reserve room: every adapter's must fit."""
    return max(each.serving.max_lora_rank for each in (leader, *others))


def _shared(planned: Plan) -> tuple[str, str]:
    return planned.base_model.digest, planned.tokenizer.digest
