"""Relocation: bring a pinned source onto its volume, verified, in the form that the other stages read.

Models come as safetensors, config and tokenizer files only: a pickle can run code when it is loaded, and so can a
Python file, so neither is ever taken. Data comes as validated records, divided into train, validation and holdout.
"""

from __future__ import annotations

import fnmatch
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs.core import models
from jobs.core.artifacts import publish
from jobs.core.declarations import Loaded, Source
from jobs.core.environment import LoadedEnvironment
from jobs.core.errors import RetryableError, UserError
from jobs.core.files import human_bytes, noted_sha256
from jobs.core.pipeline import LoadedPipeline
from jobs.core.plan import plan, plan_environment
from jobs.core.tasks import Task
from jobs.data import acceptability, harness, split, tasks
from jobs.data.formats import File, readable
from jobs.relocation import download, sources
from jobs.relocation.connection import mismatch, shown
from jobs.relocation.sources.file import path_sha256
from jobs.relocation.sources.interface import Item, folder_pin

log = logging.getLogger("jobs")

INDEX = "model.safetensors.index.json"
# What transformers and vLLM load. Repositories may hold other forms of the same weights too: consolidated.safetensors.
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors")
TOKENIZER = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")  # one of them at least
TOKENIZER_EXTRAS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt",
                    "chat_template.jinja", "chat_template.json", "generation_config.json")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.joblib", "*.msgpack", "*.h5")
RAW = "raw"  # where a draft keeps the downloaded data until its records are written


def run_model(loaded: LoadedEnvironment, what: str, volumes: Path) -> None:
    """Publish what the environment file names under `what`: base-model, tokenizer or reference-model.

    Raises:
        UserError: the source, its pin or its content is not as it must be.
        RetryableError: the source does not recover.
    """
    artifact = publish(plan_environment(loaded.environment).named()[what], volumes,
                       lambda draft: MODELS[what](loaded, draft), keep=loaded.environment.retention.keep, resume=True)
    if what == "base-model":
        check_architecture(loaded, artifact.path)  # the file may name another architecture than when it was published


def run_dataset(loaded: LoadedPipeline, volumes: Path) -> None:
    """Publish the dataset of the pipeline file, and the acceptability sentences and the records of the tasks: they are
    data, on the same volume.

    Raises:
        UserError: the source, its pin or its content is not as it must be.
        RetryableError: the source does not recover.
    """
    check_data_in_git(loaded)
    wanted, keep = plan(loaded.pipeline), loaded.pipeline.environment.retention.keep
    # Both by the adapter's name: retention counts for each adapter, so that others' sentences do not push its own out.
    publish(wanted.dataset, volumes, lambda draft: write_dataset(loaded, draft), keep=keep, resume=True,
            adapter_name=loaded.pipeline.adapter)
    publish(wanted.acceptability, volumes, lambda draft: write_acceptability(loaded, draft), keep=keep, resume=True,
            adapter_name=loaded.pipeline.adapter)
    if loaded.pipeline.evaluation.tasks:
        publish(wanted.tasks, volumes, lambda draft: write_tasks(loaded, wanted.dataset.path(volumes), draft),
                keep=keep, resume=True, adapter_name=loaded.pipeline.adapter)
        tasks.require_evidence(loaded.pipeline.evaluation, tasks.read(wanted.tasks.path(volumes),
                                                                      loaded.pipeline.evaluation.tasks))


# --- data ------------------------------------------------------------------------------------------------------------


def check_data_in_git(loaded: LoadedPipeline) -> None:
    """Check the data beside the pipeline file against its pin, also when the pinned data was published already.

    Raises:
        UserError: the data was edited without its pin. Under the old pin, the edit would have no effect.
    """
    for source in loaded.pipeline.sources().values():
        path = loaded.resolve(source) if source.scheme == "file" else None
        if path and path.exists() and (found := path_sha256(path)) != source.sha256:
            raise UserError(mismatch(str(path), loaded.path.name, str(source.sha256), found))


def write_dataset(loaded: LoadedPipeline, draft: Path) -> dict[str, Any]:
    """Fetch the data, validate every record, and write a file for each split, and statistics.json."""
    source = loaded.pipeline.dataset
    facts = split.split(fetch_data(loaded, source, draft), source.holdout, draft, source.validation)
    shutil.rmtree(draft / RAW)
    records = facts["records"]
    chosen = f", {records['validation']} to choose by" if "validation" in records else ""
    log.info("%s: %d records to train on%s, %d held out by %s, %d duplicates", shown(source.source),
             records["train"], chosen, records["holdout"], facts["split_by"], facts["duplicates"])
    return origin(source) | facts


def write_acceptability(loaded: LoadedPipeline, draft: Path) -> dict[str, Any]:
    """Write acceptability.jsonl: sentences from the embedded grammar, or fetched ones."""
    source = loaded.pipeline.evaluation.acceptability
    if source.scheme == "builtin":
        from jobs.relocation import embedded

        download.remove_others(draft, [])
        acceptability.write_pairs(embedded.acceptability_pairs(), draft)
        return origin(source)
    facts = acceptability.convert(fetch_data(loaded, source, draft), draft)
    shutil.rmtree(draft / RAW)
    return origin(source) | facts


def write_tasks(loaded: LoadedPipeline, dataset: Path, draft: Path) -> dict[str, Any]:
    """Fetch the records of every task, validate them, and write a file for each task.

    Args:
        dataset: the dataset's artifact; no task may ask what is trained on.
    """
    found: list[tasks.Placed] = []
    facts = {}
    for task in loaded.pipeline.evaluation.tasks:
        folder = draft / task.name
        folder.mkdir(exist_ok=True)
        task_file = fetch_task_file(loaded, task, folder) if task.lm_eval else None
        placed = tasks.convert(task, fetch_data(loaded, task, folder), draft / tasks.file_name(task), task_file)
        shutil.rmtree(folder)
        found += placed
        facts[task.name] = origin(task) | {"records": len(placed)}
        log.info("%s: %d records of the task %s", shown(task.source), len(placed), task.name)
    tasks.require_unseen(found, dataset)
    return {"tasks": facts}


def fetch_task_file(loaded: Loaded, task: Task, folder: Path) -> harness.TaskFile:
    """Fetch and read the task file of lm-evaluation-harness that a task names."""
    assert task.lm_eval is not None
    harness.require_installed(task.key)
    items = sources.listing(loaded, task.lm_eval)
    if len(items) != 1:
        raise UserError(f"{task.key}: {shown(task.lm_eval.source)} must be one file, and holds {len(items)}")
    fetch(items, task.lm_eval, folder)
    return harness.read(folder / items[0].name, f"{task.key}: {items[0].name}", task.lm_eval.metric)


def fetch_data(loaded: Loaded, source: Source, draft: Path) -> list[File]:
    """Fetch the files of records that a source holds into the draft's raw folder, and nothing else."""
    items = sources.listing(loaded, source)
    files = readable([File(draft / RAW / item.name, item.name) for item in items], shown(source.source))
    names = {file.name for file in files}
    if not pinned_as_a_whole(items, source):
        items = [item for item in items if item.name in names]
    fetch(items, source, draft, RAW)
    return files


# --- models ----------------------------------------------------------------------------------------------------------


def write_base_model(loaded: LoadedEnvironment, draft: Path) -> dict[str, Any]:
    """Fetch the base model, without a tokenizer; one that vLLM cannot serve is rejected before the download."""
    source = loaded.environment.base_model
    if source.scheme == "builtin":
        return embed(source, draft, model=True, tokenizer=False)
    items = sources.listing(loaded, source)
    wanted = model_files(items, source)
    download.remove_others(draft, wanted)
    download.fetch([item for item in wanted if item.name == "config.json"], draft)
    check_architecture(loaded, draft)
    fetch(wanted, source, draft)
    check_weights(draft, source)
    return origin(source) | left_out(items, wanted)


def write_reference_model(loaded: LoadedEnvironment, draft: Path) -> dict[str, Any]:
    """Fetch the reference model and the tokenizer that belongs to it."""
    source = loaded.environment.reference_model
    if source.scheme == "builtin":
        return embed(source, draft, model=True, tokenizer=True)
    items = sources.listing(loaded, source)
    wanted = {item.name: item for item in [*model_files(items, source), *tokenizer_files(items, source)]}
    fetch(wanted.values(), source, draft)
    models.architecture(draft)  # any will do, since it carries no adapter, but the config must name one
    check_weights(draft, source)
    return origin(source) | left_out(items, wanted.values())


def write_tokenizer(loaded: LoadedEnvironment, draft: Path) -> dict[str, Any]:
    """Fetch the tokenizer: the base model's, or the one that the environment file names."""
    source = loaded.environment.tokenizer_source
    if source.scheme == "builtin":
        return embed(source, draft, model=False, tokenizer=True)
    fetch(tokenizer_files(sources.listing(loaded, source), source), source, draft)
    return origin(source)


def embed(source: Source, draft: Path, *, model: bool, tokenizer: bool) -> dict[str, Any]:
    """Make an embedded model, or its tokenizer, on the spot."""
    from jobs.relocation import embedded

    download.remove_others(draft, [])
    if tokenizer:
        embedded.write_tokenizer(draft)
    if tokenizer and not model:  # by it transformers and vLLM know the tokenizer's class without guessing
        (draft / "config.json").write_text('{"model_type": "llama"}\n')
    if model:
        log.info("%s: training it here", source.source)
        embedded.write_model(source.source, draft)
    return origin(source) | {"note": "an embedded model, for trying out and for tests"}


def model_files(items: Iterable[Item], source: Source) -> list[Item]:
    """Of all that a source holds, the weights in safetensors and the config.

    Raises:
        UserError: when there are none, naming the pickles that the source has instead and how to convert them.
    """
    items = list(items)
    names = [item.name for item in items]
    if "config.json" not in names:
        raise UserError(f"{source.source}: holds no config.json, so it is not a model in the Hugging Face format")
    if not matching(items, WEIGHTS):
        pickles = ", ".join(item.name for item in matching(items, PICKLES)) or "no weights at all"
        raise UserError(f"{source.source}: holds no model.safetensors, but {pickles}. Pickles are not accepted: "
                        "loading one can run any code. Convert the model where you trust it (transformers: "
                        "AutoModelForCausalLM.from_pretrained(MODEL).save_pretrained(FOLDER)) and name the result")
    return matching(items, (*WEIGHTS, INDEX, *models.CONFIG))


def tokenizer_files(items: Iterable[Item], source: Source) -> list[Item]:
    """Of all that a source holds, the tokenizer's files; config.json, which names its kind; and
    generation_config.json, which names the tokens that end a reply.

    Raises:
        UserError: when there is no tokenizer.
    """
    items = list(items)
    if not matching(items, TOKENIZER):
        raise UserError(f"{source.source}: holds no tokenizer, i.e. none of {', '.join(TOKENIZER)}. Name one that does "
                        "under `tokenizer`")
    return matching(items, (*TOKENIZER, *TOKENIZER_EXTRAS, "config.json"))


def matching(items: Iterable[Item], patterns: Iterable[str]) -> list[Item]:
    """The items at the top of the source whose name matches a pattern."""
    patterns = list(patterns)
    return [item for item in items
            if "/" not in item.name and any(fnmatch.fnmatchcase(item.name, pattern) for pattern in patterns)]


def check_architecture(loaded: LoadedEnvironment, folder: Path) -> None:
    """Check that the base model has the declared architecture, and that its adapters can be served in the desired mode.

    Raises:
        UserError: naming what is wrong and what can be chosen instead.
    """
    base = loaded.environment.base_model
    found = models.architecture(folder)
    if base.architecture and base.architecture != found:
        raise UserError(f"{loaded.path}: base_model.architecture is {base.architecture}, but {base.source} at "
                        f"{base.pin} is a {found}. Correct the key, or run: python -m jobs pin {loaded.path.parent}")
    models.check_servable(found, f"{loaded.path}: base_model", loaded.environment.serving.mode)


def check_weights(folder: Path, source: Source) -> None:
    """Check that every safetensors file is complete and has the tensors that the index lists for it.

    Raises:
        UserError: naming the file.
        RetryableError: the volume failed.
    """
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, set[str]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="numpy") as weights:
                tensors[file.name] = set(weights.keys())
        except (SafetensorError, OSError) as error:
            meaning = models.loading_error(f"{source.source}: {file.name} cannot be read", error)
            if isinstance(meaning, RetryableError):
                raise meaning from None
            raise UserError(f"{source.source}: {file.name} is damaged or cut off: {error}") from None
    if not (folder / INDEX).exists():
        return
    try:
        index = json.loads((folder / INDEX).read_bytes())["weight_map"]
        lost = [f"{tensor} in {file}" for tensor, file in sorted(index.items()) if tensor not in tensors.get(file, ())]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{source.source}: {INDEX} cannot be read: {error!r}") from None
    if lost:
        raise UserError(f"{source.source}: {INDEX} lists {', '.join(lost[:3])}, which "
                        f"{'is' if len(lost) == 1 else f'(with {len(lost) - 1} more) are'} not there")


# --- both ------------------------------------------------------------------------------------------------------------


def fetch(items: Iterable[Item], source: Source, draft: Path, folder: str = "") -> None:
    """Bring exactly `items` into a folder of the draft, and verify them; remove other files of an interrupted run."""
    items = list(items)
    download.remove_others(draft, [replace(item, name=f"{folder}/{item.name}") for item in items] if folder else items)
    into = draft / folder
    into.mkdir(exist_ok=True)
    continued = any(path.is_file() for path in into.rglob("*"))
    sizes = [item.size for item in items if item.size is not None]
    size = human_bytes(sum(sizes)) if len(sizes) == len(items) else "unknown size"
    log.info("%s at %s: fetching %s (%s)", shown(source.source), source.pin,
             items[0].name if len(items) == 1 else f"{len(items)} files", size)
    download.fetch(items, into)
    if not pinned_as_a_whole(items, source):
        return
    wrong = wrong_pin(items, source, into)
    if wrong and continued:  # what was there already may be of an earlier content
        log.warning("%s: its files do not fit together: starting over", shown(source.source))
        download.remove_others(into, [])
        download.fetch(items, into)
        wrong = wrong_pin(items, source, into)
    if wrong:
        download.remove_others(into, [])
        raise UserError(wrong)


def pinned_as_a_whole(items: Iterable[Item], source: Source) -> bool:
    """Whether the files have no digests of their own, and the pin covers all of them."""
    return source.sha256 is not None and not all(item.sha256 for item in items)


def wrong_pin(items: Sequence[Item], source: Source, folder: Path) -> str | None:
    """Why the files in a folder are not those that were pinned as a whole; None if they are."""
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashing releases the GIL
        digests = list(pool.map(lambda item: (item.name, noted_sha256(folder / item.name)), items))
    found = folder_pin(digests)
    if found == source.sha256:
        return None
    return mismatch(shown(source.source), items[0].pinned_in, str(source.sha256), found)


def origin(source: Source) -> dict[str, Any]:
    """Where an artifact came from, for people; a URL without its secrets."""
    return {"source": shown(source.source), "pin": source.pin}


def left_out(items: Iterable[Item], taken: Iterable[Item]) -> dict[str, Any]:
    """The files of a source that were not relocated, for people."""
    names = {item.name for item in taken}
    return {"left_out": [item.name for item in items if item.name not in names]}


MODELS: dict[str, Callable[[LoadedEnvironment, Path], dict[str, Any]]] = {
    "base-model": write_base_model,
    "tokenizer": write_tokenizer,
    "reference-model": write_reference_model,
}
