"""Relocation of a published adapter: fetch it with its evaluation, verify both, and promote it under its name.

What was published has the layout of jobs/core/published.py. Here adapter and evaluation become what they were there,
`adapter/DIGEST` and `evaluation/DIGEST`, to the byte. Nothing appears on the volume, and nothing is promoted, before
every check has passed. What is on the volume already is checked too: the environment file, and the keys in it, may have
changed.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from jobs.core import artifacts, imported, promotion, signatures
from jobs.core.artifacts import Artifact, Spec, canonical
from jobs.core.errors import UserError
from jobs.core.files import read_plain_file, sha256_of
from jobs.core.imported import Imported, LoadedImport
from jobs.core.layout import MANIFEST, read_manifest
from jobs.core.plan import FINE_TUNED_VOLUME, plan_environment, plan_import
from jobs.core.promotion import DIGEST
from jobs.core.published import EVALUATION, PROVENANCE, SUMS
from jobs.core.signatures import NotSigned
from jobs.relocation import sources
from jobs.relocation.connection import shown
from jobs.relocation.relocate import fetch, origin

log = logging.getLogger("jobs")

FETCHED = "fetched"  # where a draft keeps what was published until it is verified
VERDICT = "evaluation.json"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# The files that an adapter may hold, as for the server (serving/verification.py): never a pickle.
SUFFIXES = (".safetensors", ".json", ".md")
JSON_BYTES = 2**20  # a config or a verdict has a few kB


def run(loaded: LoadedImport, volumes: Path) -> None:
    """Bring the imported adapter and its evaluation onto the volume, and promote it, unless it is evaluated here first.

    Raises:
        UserError: it is not what the pin, its manifests, its signatures or this environment say that it must be.
        RetryableError: the source does not recover.
    """
    adapter, wanted = loaded.pipeline, plan_import(loaded.pipeline).imported_adapter
    record = artifacts.publish(wanted, volumes, lambda draft: write(loaded, volumes, draft), resume=True,
                               replace=not _is_whole(wanted, volumes), keep=adapter.environment.retention.keep,
                               adapter_name=adapter.adapter)
    found = imported.read(record.path, FINE_TUNED_VOLUME)
    placed = [artifacts.read(spec.path(volumes)) for spec in (found.adapter, found.evaluation)]
    require_fit(loaded, *placed)
    for artifact in placed:
        os.utime(artifact.path / MANIFEST)  # just used: retention keeps it
    name = f"{adapter.adapter}@{found.adapter.digest}"
    if adapter.evaluation:
        log.info("%s is there; it is promoted when it passes the gate here", name)
    elif promotion.promote(volumes / FINE_TUNED_VOLUME, adapter.adapter, found.adapter.digest, found.evaluation.digest):
        log.info("%s promoted: it passed %s, which was published with it", name, found.evaluation)
    else:
        log.info("%s is promoted already", name)


def _is_whole(wanted: Spec, volumes: Path) -> bool:
    """Whether all that an earlier relocation recorded is still there: retention may have removed it. True if there was
    none."""
    folder = wanted.path(volumes)
    if not folder.exists():
        return True
    found = imported.read(folder, FINE_TUNED_VOLUME)
    return found.adapter.path(volumes).exists() and found.evaluation.path(volumes).exists()


def write(loaded: LoadedImport, volumes: Path, draft: Path) -> dict[str, Any]:
    """Fetch and verify what was published, place adapter and evaluation on the volume, and record which they are."""
    source = loaded.pipeline.published
    items = sources.listing(loaded, source)
    if unlisted := [item.name for item in items if item.sha256 is None]:
        raise UserError(f"{shown(source.source)}: {SUMS} is missing, so nothing says what {unlisted[0]} must be. Name "
                        "the folder that `python -m jobs publish` has written")
    fetch(items, source, draft, FETCHED)
    adapter, evaluation = divide(draft, shown(source.source))
    require_fit(loaded, adapter, evaluation)
    require_provenance(loaded, draft / PROVENANCE, adapter, evaluation)
    found = Imported(*(Spec(FINE_TUNED_VOLUME, each.manifest["kind"], each.manifest["spec"], each.manifest["inputs"])
                       for each in (adapter, evaluation)))
    pairs = [(found.adapter, adapter), (found.evaluation, evaluation)]
    replaced = [has_to_be_replaced(loaded, spec.path(volumes), artifact, adapter.digest) for spec, artifact in pairs]
    for (spec, artifact), replaces in zip(pairs, replaced, strict=True):
        artifacts.place(spec, artifact.path, volumes, keep=loaded.pipeline.environment.retention.keep, replace=replaces)
    for folder in (FETCHED, "adapter", "evaluation"):
        shutil.rmtree(draft / folder, ignore_errors=True)
    (draft / imported.RECORD).write_text(found.to_json(), encoding="utf-8")
    return origin(source) | {"adapter": found.adapter.digest, "evaluation": found.evaluation.digest}


# --- what was published -----------------------------------------------------------------------------------------------


def divide(draft: Path, source: str) -> tuple[Artifact, Artifact]:
    """The adapter and the evaluation that were fetched, each in a folder of its own in the draft, and whole.

    Raises:
        UserError: a file is missing, is not listed, or was changed; or it is no published adapter at all.
    """
    fetched = draft / FETCHED
    if (fetched / PROVENANCE).is_file():
        (fetched / PROVENANCE).rename(draft / PROVENANCE)
    return (_artifact(fetched, fetched / EVALUATION, draft, "evaluation", source),
            _artifact(fetched, fetched, draft, "adapter", source))[::-1]


def _artifact(fetched: Path, folder: Path, draft: Path, kind: str, source: str) -> Artifact:
    where = f"{source}: {folder.relative_to(fetched.parent) / MANIFEST}".replace(f"{FETCHED}/", "")
    advice = "It is not what `python -m jobs publish` published: publish it again, or name another `source`"
    try:
        manifest = read_manifest(folder)
        found, digest = manifest["kind"], str(manifest["digest"])
    except FileNotFoundError:
        raise UserError(f"{where} is missing. {advice}") from None
    except (UserError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{where} is damaged ({error}). {advice}") from None
    if found != kind or not DIGEST.fullmatch(digest) or not all(isinstance(manifest.get(key), dict)
                                                                for key in ("spec", "inputs")):
        raise UserError(f"{where} describes {found}/{digest}, not an artifact of the kind {kind}. {advice}")
    place = draft / kind / digest
    place.parent.mkdir(exist_ok=True)
    folder.rename(place)
    try:
        return artifacts.read(place, advice=advice)
    except UserError as error:
        raise UserError(str(error).replace(f"{place}:", f"{source}: {kind}/{digest}:")) from None


def has_to_be_replaced(loaded: LoadedImport, place: Path, artifact: Artifact, adapter: str) -> bool:
    """Whether an artifact on the volume has to give way to the one that was fetched: when no key signed it that the
    environment trusts.

    Args:
        place: where it is, or will be.
        adapter: the digest of the adapter.
    Raises:
        UserError: what is there is another adapter of this name, or an evaluation that rejected it.
    """
    if not place.exists():
        return False
    there, where = artifacts.read(place), f"{place.parent.name}/{place.name}"
    try:
        require_signature(loaded, there, where)
    except NotSigned:
        return True
    if artifact.manifest["kind"] == "adapter" and there.manifest["files"] != artifact.manifest["files"]:
        raise UserError(f"{shown(loaded.pipeline.source)}: {where} is on this volume already, with other weights: it "
                        "was trained here too, and a training on other hardware ends with other numbers. Remove "
                        f"`source` from {loaded.path} to serve that one, or move {place} away")
    if artifact.manifest["kind"] == "evaluation":
        require_verdict(loaded, there, adapter, f"{where} on this volume")
    return False


# --- whether it may be served here ------------------------------------------------------------------------------------


def require_fit(loaded: LoadedImport, adapter: Artifact, evaluation: Artifact) -> None:
    """The adapter and its evaluation are signed where that is asked for, it passed, and this environment can serve it.

    Raises:
        UserError: with the first thing that is wrong, and what to do.
    """
    source = shown(loaded.pipeline.source)
    for artifact in (adapter, evaluation):
        require_signature(loaded, artifact, f"{source}: {artifact.manifest['kind']}/{artifact.digest}")
    require_verdict(loaded, evaluation, adapter.digest, f"{source}: evaluation/{evaluation.digest}")
    require_files(adapter, source)
    require_base(loaded, adapter, source)


def require_signature(loaded: LoadedImport, artifact: Artifact, where: str) -> None:
    """The artifact's signature is by one of the environment's keys, where it has any.

    Raises:
        NotSigned: it is not.
    """
    keys = loaded.pipeline.environment.trusted_keys
    if not keys:
        return
    try:
        signatures.check(artifact.path, artifact.manifest, keys)
    except NotSigned as error:
        raise NotSigned(f"{where}: {str(error).removeprefix(f'{artifact.path}: ')}") from None


def require_provenance(loaded: LoadedImport, file: Path, adapter: Artifact, evaluation: Artifact) -> None:
    """The provenance, where there is one and the environment has keys, is signed, and about this adapter and this
    evaluation. It is kept for people: what decides is signed by itself.

    Raises:
        NotSigned: it is not.
    """
    keys = loaded.pipeline.environment.trusted_keys
    if not keys or not file.exists():
        return
    try:
        statement = json.loads(signatures.verify_envelope(read_plain_file(file, JSON_BYTES), keys)[0])
        named = [each["digest"]["sha256"] for each in (*statement["subject"],
                                                       *statement["predicate"]["runDetails"]["byproducts"])]
        if named != [sha256_of(artifact.path / MANIFEST) for artifact in (adapter, evaluation)]:
            raise ValueError("it is about other artifacts")
    except (UserError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise NotSigned(f"{shown(loaded.pipeline.source)}: {PROVENANCE} does not verify: {error}") from None


def require_verdict(loaded: LoadedImport, evaluation: Artifact, adapter: str, where: str) -> None:
    """The evaluation is about this adapter, under the name that it has here, and it passed.

    An adapter that is evaluated here gets its name by that evaluation, so it may have had another one.

    Raises:
        UserError: naming what is wrong.
    """
    verdict = _json(evaluation.path / VERDICT, where)
    about = verdict.get("adapter")
    evaluated = about.get("digest") if isinstance(about, dict) else about
    if not evaluation.manifest["inputs"].get("adapter") == evaluated == adapter:
        raise UserError(f"{where} is about the adapter {evaluated}, not about {adapter}: an adapter is imported "
                        "with the evaluation that it passed. Publish it again, or name another `source`")
    if verdict.get("passed") is not True:
        raise UserError(f"{where} did not let the adapter {adapter} pass, so it cannot be imported. Name another "
                        "`source`")
    name = evaluation.manifest["spec"].get("adapter")
    if name != loaded.pipeline.adapter and loaded.pipeline.evaluation is None:
        raise UserError(f"{loaded.path}: adapter: {loaded.pipeline.adapter} is not the name under which it was "
                        f"evaluated ({name}). Give it that name here too, or add `dataset` and `evaluation`, to "
                        "have it evaluated here under its new name (docs/publication.md)")


def require_files(adapter: Artifact, source: str) -> None:
    """An adapter has its two files, and no pickles or other files that nothing needs.

    Raises:
        UserError: naming the file.
    """
    names = {each["path"] for each in adapter.manifest["files"]}
    if lacking := sorted({CONFIG, WEIGHTS} - names):
        raise UserError(f"{source}: adapter/{adapter.digest}: {lacking[0]} is missing: it is no LoRA adapter")
    if others := sorted(name for name in names if not name.endswith(SUFFIXES) or "/" in name):
        raise UserError(f"{source}: adapter/{adapter.digest}: holds {others[0]}; only {', '.join(SUFFIXES)} files are "
                        "taken, never code or pickles")


def require_base(loaded: LoadedImport, adapter: Artifact, source: str) -> None:
    """The adapter is for the base model, the tokenizer and the chat format of this environment, and for its server.

    Raises:
        UserError: naming both sides, and what to change.
    """
    shared, file = loaded.pipeline.environment, loaded.environment.path
    config, wanted = _json(adapter.path / CONFIG, f"{source}: {CONFIG}"), plan_environment(shared)
    trained = adapter.manifest["inputs"]
    revision = f" at {config['revision']}" if config.get("revision") else ""
    sides = {"base_model": (wanted.base_model, f"{config.get('base_model_name_or_path')}{revision}", shared.base_model),
             "tokenizer": (wanted.tokenizer, "another one", shared.tokenizer_source)}
    for key, (spec, theirs, ours) in sides.items():
        if trained.get(key) != spec.digest:
            raise UserError(
                f"{source}: the adapter was trained with the {key} {theirs} ({spec.kind}/{trained.get(key)}), and this "
                f"environment has {ours.source} at {ours.pin} ({spec}). Set {key} in {file} to what it was trained "
                "with, or import an adapter for this one")
    template, wanted_template = (canonical(each).decode() for each in (
        adapter.manifest["spec"].get("chat_template", {}), shared.chat_template))
    if template != wanted_template:
        raise UserError(f"{source}: the adapter was trained with chat_template {template}, and {file} has "
                        f"{wanted_template}: the server would write questions in another form. Set it to the same")
    rank = config.get("r")
    if not isinstance(rank, int) or rank > shared.serving.max_lora_rank:
        raise UserError(f"{source}: the adapter has rank {rank}, above serving.max_lora_rank "
                        f"({shared.serving.max_lora_rank}) in {file}: vLLM would refuse it. Raise it there")


def _json(file: Path, where: str) -> dict[str, Any]:
    try:
        value = json.loads(read_plain_file(file, JSON_BYTES))
        if not isinstance(value, dict):
            raise ValueError("it is no mapping")
    except FileNotFoundError:
        raise UserError(f"{where}: {file.name} is missing") from None
    except (UserError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: {file.name} cannot be read ({error})") from None
    return value
