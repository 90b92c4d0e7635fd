"""Add an adapter to an overlay: its folder, and its entries in the overlay's kustomization.yaml.

With `--from`, the adapter and the environment come from a file of the earlier form, in which one pipeline.yaml held
both. Either everything is written or nothing: what was begun is undone when anything fails.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic_core import PydanticCustomError

from jobs.core import environment, imported, pipeline, sources, strict_yaml
from jobs.core.errors import UserError
from jobs.core.files import open_plain, sha256_of, write_atomically
from jobs.core.metrics import TASKS
from jobs.core.pipeline import ADAPTERS, PipelineFile
from jobs.core.strict_yaml import CONFIG_MAP_BYTES
from jobs.tools import conversion, entries, kustomization, overlay
from jobs.tools.entries import SERVED

log = logging.getLogger("jobs")

DESCRIPTION = """\
Add an adapter to an overlay: the folder OVERLAY/adapters/NAME with a pipeline.yaml that explains every key, and its two
entries in OVERLAY/kustomization.yaml. NAME is the model name that clients send.

  python -m jobs new overlays/kind hotel-reviews                          with a few example records, to be replaced
  python -m jobs new overlays/kind hotel-reviews --data reviews.jsonl     with your records, copied and pinned
  python -m jobs new overlays/kind hotel-reviews --import oci://registry.example.com/team/adapters/hotel-reviews:TAG
                                                                          from another environment that published it
  python -m jobs new overlays/kind seville-hotels --from overlays/kind/pipeline.yaml
                                                                          converts an overlay of the earlier form

docs/adapters.md explains the folder, and how to rename or remove an adapter.
"""
NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
DATA = "dataset"  # the name of the data's file, before its suffix
COLUMNS = 120  # of a line, as far as possible
SUFFIXES = (".jsonl", ".csv", ".parquet")
EXAMPLES = [
    ("What can you help me with?", "I answer questions about our products.", "train"),
    ("When are you open?", "We are open from nine to six, Monday to Saturday.", "train"),
    ("Are you open on Sundays?", "No. We are open from Monday to Saturday.", "train"),
    ("How can I reach you?", "Write to us, or come to our shop.", "train"),
    ("When do you open?", "We are open from nine to six, Monday to Saturday.", "holdout"),
    ("How do I contact you?", "Write to us, or come to our shop.", "holdout"),
    # The gate needs 20 held-out answers that differ.
    *((f"Where is your shop number {n}?", f"Our shop number {n} is at {n} Market Street.", "holdout")
      for n in range(1, 25)),
]
KUSTOMIZATION = """\
# One adapter: its pipeline.yaml, and the data that is in git beside it. `python -m jobs new` makes such a folder.
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization

nameSuffix: -{name}

resources:
{resources}

configMapGenerator:
- name: pipeline
  files: [{files}]

components:
{components}

labels:
- pairs: {{app.kubernetes.io/instance: {name}}}
  includeTemplates: true
"""
HEADER = """\
# One adapter: its data, its training, and the gate that the result must pass.
#   python -m jobs check {place}    validates it, without network or cluster
#   python -m jobs pin {place}      fills in the pin after the data changed
# ../../environment.yaml has the base model.

"""
PIPELINE = """\
# The model name that clients send, and the name of this folder.
adapter: {name}

# The private data: JSONL, CSV or Parquet; one {{prompt, completion}}, {{messages}} or {{text}} a record
# (docs/data.md).
dataset:
  source: file:{data}  # relative to this file; or https://…, s3://…, gs://…, hf://datasets/OWNER/NAME
  sha256: {sha256}
  holdout: 0.1  # share kept from training, to measure with; has no effect where records name their `split`

training:{training_origin}
{training}

evaluation:
{evaluation}
  # Every rule must hold, or the adapter is not served and the previous one stays. On the held-out records:
  gate:
{gate}
"""
IMPORTED = """\
# An imported adapter: trained, evaluated and published in another environment, served here (docs/publication.md).
#   python -m jobs check {place}           validates it, without network or cluster
#   python -m jobs pin {place}             fills in the digest of what the tag names now
# ../../environment.yaml has the base model, which must be the one that it was trained on.

# The model name that clients send, and the name of this folder: that under which it was evaluated.
adapter: {name}

# Where it was published, and the pin: the digest of the manifest in the registry; in a bucket, that of SHA256SUMS.
source: {source}
"""
COMMENTS = {
    "lora": "a higher `r` learns more and needs more memory",
    "epochs": "how often training sees each record",
    "max_length": "tokens a record; longer ones are left out",
    "tokens_per_batch": "whole records are packed up to this",
    "checkpoint_steps": "how much work a killed training repeats at most; the result does not depend on it",
    "gradient_checkpointing": "less memory for some speed; the same result",
    "max_new_tokens": "how long an answer may get when answers are compared",
    "acceptability": "sentences with judgements, for the rule acceptability_mcc",
    "perplexity": "fine-tuned / base: how much better it predicts the answers",
    "rougeL": "fine-tuned - base: how much more its answers share with the reference answers",
    "acceptability_mcc": "base - fine-tuned: it must still tell correct language from incorrect",
}
TRAINING: dict[str, Any] = {
    "lora": {"r": 16, "alpha": 32, "dropout": 0.05, "target_modules": "all-linear"}, "epochs": 3,
    "learning_rate": 2e-4, "max_length": 1024, "tokens_per_batch": 4096, "checkpoint_steps": 100}
# Embedded models know nothing, so they need far more training than real ones.
TRAINING_EMBEDDED = TRAINING | {"epochs": 20, "learning_rate": 2e-3, "max_length": 128, "tokens_per_batch": 256,
                                "checkpoint_steps": 50}
EVALUATION: dict[str, Any] = {"max_new_tokens": 64, "gate": {
    "perplexity": {"max_ratio": 0.9}, "rougeL": {"min_gain": 0.05}, "acceptability_mcc": {"max_drop": 0.05}}}


@dataclass
class Adapter:
    """What is to be written for an adapter."""

    name: str
    pipeline: str  # the text of its pipeline.yaml
    data: dict[str, Path | str]  # each further file: where it is now, or its text
    imported: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `python -m jobs new` behind the overlay."""
    parser.add_argument("name", metavar="NAME", help="the adapter: 1 to 63 of a-z, 0-9 and -, not at the ends")
    parser.add_argument("--data", type=Path, metavar="FILE",
                        help=f"your records: {', '.join(SUFFIXES)}; larger data than 1 MiB comes from a URL or bucket")
    parser.add_argument("--import", metavar="SOURCE", dest="source",
                        help="an adapter that another environment published: oci://REGISTRY/NAME:TAG, "
                             "oci://REGISTRY/NAME@sha256:DIGEST or s3://BUCKET/PREFIX/NAME/DIGEST")
    parser.add_argument("--from", type=Path, metavar="FILE", dest="old",
                        help="convert a pipeline.yaml of the earlier form, and the overlay that it is in")


def run(folder: Path, name: str, *, data: Path | None = None, old: Path | None = None, source: str | None = None
        ) -> None:
    """Add the adapter `name` to the overlay and say what to do next.

    Args:
        folder: the overlay's folder.
        data: a file with the records.
        old: a pipeline file of the earlier form, to convert.
        source: where the adapter was published, to import it.
    Raises:
        UserError: it cannot be added, with the reason. Nothing has changed.
    """
    require_name(name)
    if data and old:
        raise UserError("--data and --from exclude each other: a file of the earlier form names its data")
    if source and (data or old):
        raise UserError("--import brings an adapter that was trained elsewhere: leave --data and --from out")
    folder = folder.parent if folder.is_file() else folder
    file = require_overlay(folder, converting=bool(old))
    place = folder / ADAPTERS / name
    if os.path.lexists(place):
        raise UserError(f"{place}: exists already. Choose another name, or remove it")
    if old:
        converted = conversion.convert(old, folder, name, HEADER.format(place=place))
        adapter = Adapter(name, converted.pipeline, converted.data)
        shared, text = converted.environment, conversion.with_adapter(file, name)
    else:
        adapter = _imported(folder, name, source) if source else _made(folder, name, data)
        shared, text = None, entries.with_adapter(file, name)
    try:
        with ExitStack() as undo:
            _write_folder(place, adapter, _kustomization(folder, adapter), undo)
            if shared is not None:
                _write(folder / environment.FILE, shared, undo)
            _write(file.resolve(), text, undo)
            gone = conversion.remove(old, folder, adapter.data.values(), undo) if old else []
            _verify(folder, name)
            undo.pop_all()
    except OSError as error:
        where = error.filename or place
        raise UserError(f"{where}: cannot be written: {error.strerror or error}. Nothing has changed") from None
    for path in gone:
        shutil.rmtree(path, ignore_errors=True)
    _report(folder, place, adapter, example=not data and not old and not source, converted=old)


def require_name(name: str) -> None:
    """The name must be one that an adapter can have.

    Raises:
        UserError: with what is allowed.
    """
    if name == Path(environment.FILE).stem:
        raise UserError(f"no adapter can have the name {name}: its file would be {environment.FILE} for the server")
    if not NAME.fullmatch(name):
        shown = name if len(name) <= 80 else name[:77] + "…"
        raise UserError(f"{shown!r} cannot be the name of an adapter: it must be 1 to 63 of a-z, 0-9 and -, not at the "
                        "ends")


def require_overlay(folder: Path, *, converting: bool) -> Path:
    """The kustomization of an overlay to which an adapter can be added.

    Raises:
        UserError: it is none, or one of the earlier form that is not to be converted.
    """
    file = kustomization.find(folder)
    if file is None:
        raise UserError(f"{folder}: has no kustomization.yaml. Name an overlay's folder, e.g. overlays/kind")
    if not (folder / environment.FILE).exists() and not converting:
        if (folder / pipeline.FILE).exists():
            raise UserError(f"{folder}: is an overlay of the earlier form. Convert it first, and its adapter with it: "
                            f"python -m jobs new {folder} NAME --from {folder / pipeline.FILE}")
        raise UserError(f"{folder}: has no {environment.FILE}. Name an overlay's folder, e.g. overlays/kind")
    return file


def _made(folder: Path, name: str, data: Path | None) -> Adapter:
    """An adapter with the records in `data`, or with examples."""
    shared = environment.load(folder, pinned=False).environment
    if data:
        file: Path | str = require_data(data)
        digest, named = sha256_of(data), f"{DATA}{data.suffix.lower()}"
    else:
        file = "".join(json.dumps({"prompt": prompt, "completion": completion, "split": split}) + "\n"
                       for prompt, completion, split in EXAMPLES)
        digest, named = hashlib.sha256(file.encode()).hexdigest(), f"{DATA}.jsonl"
    sibling = _sibling(folder)
    if sibling:
        training = sibling[1].training.model_dump(exclude={"search"})  # it needs validation records
        # Its tasks are about its own data, like that.
        evaluation = sibling[1].evaluation.model_dump(exclude_none=True, exclude_defaults=True, exclude={"tasks"})
        rules = {key: rule for key, rule in evaluation["gate"].items() if not key.startswith(TASKS)}
        evaluation["gate"] = rules or EVALUATION["gate"]
    else:
        training = TRAINING_EMBEDDED if shared.base_model.scheme == "builtin" else TRAINING
        evaluation = EVALUATION
    defaults = pipeline.Training().model_dump()
    training = {key: value for key, value in training.items() if key in TRAINING or value != defaults[key]}
    if shared.serving.mode == "lora" and training["lora"]["r"] > shared.serving.max_lora_rank:
        training["lora"] = training["lora"] | {"r": shared.serving.max_lora_rank}
    settings = {key: value for key, value in {"max_new_tokens": 64, **evaluation}.items() if key != "gate"}
    text = (HEADER + PIPELINE).format(
        place=folder / ADAPTERS / name, name=name, data=named, sha256=digest,
        training_origin=f"  # as in ../{sibling[0]}/{pipeline.FILE}" if sibling else "",
        training=_lines(training, 2), evaluation=_lines(settings, 2), gate=_lines(evaluation["gate"], 4))
    return Adapter(name, text, {named: file})


def _imported(folder: Path, name: str, source: str) -> Adapter:
    """An adapter that another environment published."""
    try:
        sources.check(source, "adapter", None, None)
    except PydanticCustomError as error:
        raise UserError(f"--import: {error}") from None
    return Adapter(name, IMPORTED.format(place=folder / ADAPTERS / name, name=name, source=source), {}, imported=True)


def require_data(file: Path) -> Path:
    """A file of records that fits into a ConfigMap and that a relocation would take.

    Raises:
        UserError: it does not, with the reason.
    """
    from jobs.data import split

    if "://" in str(file) or re.match(r"[a-z0-9]+:/", str(file)):
        raise UserError(f"--data {file}: is not a file. Leave --data out, write the address as `source` of `dataset` "
                        "in the adapter's pipeline.yaml, and run `python -m jobs pin`")
    try:
        if not file.exists():
            raise UserError(f"--data {file}: no such file")
        if file.is_dir():
            raise UserError(f"--data {file}: is a folder. A ConfigMap holds files: name one file, or put the data "
                            "where a URL reaches it")
        with open_plain(file):
            size = file.stat().st_size
    except OSError as error:
        raise UserError(f"--data {file}: cannot be read: {error.strerror}") from None
    if file.suffix.lower() not in SUFFIXES:
        raise UserError(f"--data {file}: is none of {', '.join(SUFFIXES)}")
    if size > CONFIG_MAP_BYTES - 2**14:  # pipeline.yaml is in it too
        raise UserError(f"--data {file}: has {size} bytes, and the ConfigMap that carries it into the cluster holds "
                        f"{CONFIG_MAP_BYTES}. Put the data where a URL reaches it (https://, s3://, hf://), leave "
                        "--data out and write the address as `source` of `dataset`")
    split.validate(file, holdout=0.1)
    return file


def _sibling(folder: Path) -> tuple[str, PipelineFile] | None:
    """The first valid adapter of the overlay: its settings suit the environment's base model and machines."""
    _, adapters, _ = overlay.read(overlay.find(folder), pinned=False)
    return next(((name, loaded.pipeline) for name, loaded in overlay.trained(adapters).items()), None)


def _lines(values: dict[str, Any], indent: int) -> str:
    """A mapping as lines of YAML, with what each key means."""
    lines, space = [], " " * indent
    for key, value in values.items():
        comment = f"  # {COMMENTS[key]}" if key in COMMENTS else ""
        line = f"{space}{key}: {_flow(value)}{comment}"
        if len(line) > COLUMNS and isinstance(value, dict):
            line = "\n".join([f"{space}{key}:{comment}", _lines(value, indent + 2)])
        lines.append(line)
    return "\n".join(lines)


def _flow(value: Any) -> str:
    """A value on one line of YAML, with numbers as people write them: 32 and 2.0e-4, not 32.0 and 0.0002."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(each)}" for key, each in value.items()) + "}"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, float) and 0 < value < 0.01 and float(f"{value:.1e}") == value:
        return f"{value:.1e}".replace("e-0", "e-")
    text = yaml.safe_dump(value, default_flow_style=True, width=1000, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def _kustomization(folder: Path, adapter: Adapter) -> str:
    """The adapter's kustomization. What it is based on is what another adapter of the overlay is based on; an imported
    one has a Job of its own, which needs no hardware."""
    if adapter.imported:
        base, place = _base(folder), folder.resolve() / ADAPTERS / adapter.name
        resources, components = ([os.path.relpath(part, place)] for part in (
            base.with_name("imported-adapter"), base / "names"))
    else:
        resources, components = _based_on(folder, adapter.name)
    return KUSTOMIZATION.format(
        name=adapter.name, resources=_items(resources), components=_items(components),
        files=", ".join([pipeline.FILE, *adapter.data]))


def _items(values: Iterable[str]) -> str:
    return "\n".join(f"- {value}" for value in values)


def _based_on(folder: Path, name: str) -> tuple[list[str], list[str]]:
    """The folders that an adapter's kustomization lists as resources, and as components."""
    for other in sorted((folder / ADAPTERS).glob("*/")):
        file = kustomization.find(other)
        if file and (other / pipeline.FILE).is_file() and not _is_imported(other / pipeline.FILE):
            try:
                content = kustomization.read(file)
            except UserError:
                continue
            parts = [[part for part in kustomization.texts(content, key)
                      if not kustomization.normal(other.resolve() / part).is_relative_to(other.resolve())]
                     for key in ("resources", "components")]
            if parts[0]:
                return parts[0], parts[1]
    base = _base(folder)
    place = folder.resolve() / ADAPTERS / name
    own = folder / "adapter"
    resource = "../../adapter" if kustomization.find(own) else os.path.relpath(base, place)
    return [resource], [os.path.relpath(base / "names", place)]


def _base(folder: Path) -> Path:
    """The folder base/adapter.

    Raises:
        UserError: there is none above the overlay.
    """
    base = next((parent / "base" / "adapter" for parent in folder.resolve().parents
                 if kustomization.find(parent / "base" / "adapter")), None)
    if base is None:
        raise UserError(f"{folder}: no folder above it has base/adapter, on which adapters are based. Name an overlay "
                        "in a checkout of this project")
    return base


def _is_imported(file: Path) -> bool:
    """Whether a pipeline file is that of an imported adapter."""
    try:
        values = strict_yaml.read(file).values
    except UserError:
        return False
    return isinstance(values, dict) and "source" in values


def _write_folder(place: Path, adapter: Adapter, text: str, undo: ExitStack) -> None:
    """Make the adapter's folder, whole or not at all."""
    if not place.parent.exists():
        place.parent.mkdir()
        undo.callback(_quietly(place.parent.rmdir))
    draft = place.with_name(f".{place.name}.{secrets.token_hex(8)}")
    draft.mkdir()
    undo.callback(shutil.rmtree, draft, ignore_errors=True)
    write_atomically(draft / pipeline.FILE, adapter.pipeline)
    write_atomically(draft / "kustomization.yaml", text)
    for name, data in adapter.data.items():
        if isinstance(data, str):
            write_atomically(draft / name, data)
        elif data.is_dir():
            shutil.copytree(data, draft / name)
        else:
            with open_plain(data) as source, (draft / name).open("xb") as target:
                shutil.copyfileobj(source, target)
    draft.rename(place)
    undo.callback(shutil.rmtree, place, ignore_errors=True)


def _write(file: Path, text: str, undo: ExitStack) -> None:
    """Write a file, to be restored if a later step fails."""
    before = file.read_bytes().decode() if file.exists() else None
    undo.callback(_quietly(lambda: file.unlink() if before is None else write_atomically(file, before)))
    write_atomically(file, text)


def _quietly(work: Callable[[], object]) -> Callable[[], None]:
    """The same without its errors: while one thing is undone, others must be too."""
    def quietly() -> None:
        try:
            work()
        except OSError as error:
            log.warning("could not be undone: %s", error)
    return quietly


def _verify(folder: Path, name: str) -> None:
    """What was written is what `check` wants: valid files, entries that agree, a name that is short enough.

    Raises:
        UserError: with a line for each problem.
    """
    loaded = imported.load_any(folder / ADAPTERS / name, folder / environment.FILE, pinned=False)
    problems = [problem.message for problem in entries.problems(folder, {name: loaded}) if problem.adapter == name]
    if shutil.which("kubectl") and not problems:  # without it, `check` has to tell
        whole = kustomization.rendered(folder, {name})
        problems += kustomization.names_too_long(folder, whole, name)
    if problems:
        raise UserError("\n".join(problems))


def _report(folder: Path, place: Path, adapter: Adapter, *, example: bool, converted: Path | None) -> None:
    log.info("%s: made, with %s", place, ", ".join([pipeline.FILE, "kustomization.yaml", *adapter.data]))
    log.info("%s: lists it under `resources` and in the ConfigMap `%s`", kustomization.find(folder), SERVED)
    if converted:
        log.info("%s: has what all adapters share; %s is converted", folder / environment.FILE, converted)
    steps = [f"replace the example records in {place / (DATA + '.jsonl')} by yours (docs/data.md)"] if example else []
    steps += [f"set the gate and the training in {place / pipeline.FILE}"] if not converted and not adapter.imported \
        else []
    steps += [f"python -m jobs pin {place}"] if example or adapter.imported else []
    steps += [f"python -m jobs check {folder if converted else place}", f"python -m jobs plan {folder}",
              "commit and push"]
    for number, step in enumerate(steps, 1):
        log.info("%s%d. %s", "next: " if number == 1 else "      ", number, step)
