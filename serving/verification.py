"""Checks whether a candidate may be served: its evaluation passed the gate, and its files are whole and harmless.

Each function returns or raises `Refused`. The module has no state and does not use vLLM. serving/lora.py checks the
adapter's config and weights.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.core import proof
from jobs.core.artifacts import MANIFEST, READ, SIGNATURE, canonical, content_digest
from jobs.core.errors import UserError
from jobs.core.files import human_bytes
from jobs.core.proof import Proof
from jobs.core.published import WITHOUT_ANSWERS
from serving import lora
from serving.candidates import Candidate, adapter_folder, evaluation_folder
from serving.lora import CONFIG, WEIGHTS, Modules
from serving.refusal import Refused, one_line
from serving.served import Served
from serving.untrusted import LARGEST_REST, plain_files, read_artifact, read_json

# The files that an adapter artifact may hold. An allowlist, because a pickle can have any name.
SUFFIXES = (".safetensors", ".json", ".md")
# The recipe of evaluations (jobs/core/plan.py) that have no proof. A server still serves what they promoted.
LAST_WITHOUT_PROOF = 1
FILE_NAME = re.compile(r"[A-Za-z0-9_.-]{1,100}")


def check_gate(candidate: Candidate, name: str, volumes: Path, keys: Sequence[str] = ()) -> None:
    """Return if this adapter passed the gate under this name, by its evaluation artifact.

    Args:
        keys: the trusted public keys, if the environment file asks for signatures.
    Raises:
        Refused: with reason `gate` when it was rejected, `damaged` or `signature` when the evaluation is not
            trustworthy.
        OSError: when it cannot be read; a later attempt may succeed.
    """
    folder = evaluation_folder(candidate.evaluation, volumes)
    size = sum(path.lstat().st_size for path in plain_files(folder, [WITHOUT_ANSWERS]))
    if size > LARGEST_REST:
        raise Refused("files", f"{folder} has {human_bytes(size)}; no evaluation is that large")
    manifest, adapter = read_artifact(folder, "evaluation", keys).manifest, f"{name}@{candidate.adapter}"
    verdict = read_json(folder / "evaluation.json", "damaged", "is no readable verdict")
    about = verdict.get("adapter")
    evaluated = about.get("digest") if isinstance(about, dict) else about
    known = manifest["inputs"].get("adapter"), manifest["spec"].get("adapter")
    if known != (candidate.adapter, name) or evaluated != candidate.adapter:
        raise Refused("damaged", one_line(f"evaluation {folder.name} is about {known[1]}@{known[0]} ({evaluated}), "
                                          f"not {adapter}"))
    if "passed" not in verdict:
        raise Refused("damaged", f"evaluation {folder.name} does not say whether {adapter} passed")
    if verdict["passed"] is not True:
        raise Refused("gate", f"evaluation {folder.name} rejected {adapter}: see its report.md")


def read_proof(folder: Path, keys: Sequence[str] = ()) -> Proof | None:
    """The proof of an evaluation; None if the evaluation was made before they had one, or if it was published without:
    a proof holds private text, and what was left out is in the manifest.

    Args:
        keys: as for `check_gate`.
    Raises:
        Refused: with reason `damaged` or `signature`, or `proof` where it is missing.
        OSError: when it cannot be read; a later attempt may succeed.
    """
    manifest, file = read_artifact(folder, "evaluation", keys).manifest, folder / proof.FILE
    if not file.exists():
        if manifest["spec"].get("recipe") == LAST_WITHOUT_PROOF or proof.FILE in left_out(manifest):
            return None
        raise Refused("proof", f"evaluation {folder.name} does not hold what the adapter answers ({proof.FILE})")
    try:
        return proof.validate(read_json(file, "damaged", ""))
    except Refused:  # without its message: the file holds private text
        raise Refused("damaged", f"{file} is no readable proof") from None
    except UserError as error:
        raise Refused("damaged", one_line(f"{file}: {error}")) from None


def left_out(manifest: Mapping[str, Any]) -> list[Any]:
    """The files of an evaluation that were not published with it."""
    about = manifest.get("about")
    names = about.get("left_out") if isinstance(about, dict) else None
    return names if isinstance(names, list) else []


def private_copy(name: str, digest: str, served: Served) -> Path:
    """The folder of the verified copy of an adapter that is served under `name`."""
    return Path(served.private_folder) / name / digest


def copy_verified(name: str, digest: str, served: Served, modules: Callable[[], Modules],
                  keys: Sequence[str] = ()) -> Path:
    """Copy an adapter into the private folder, verify the copy, and return its path, fit to be loaded.

    A copy, because vLLM reads the files later, and again after it evicted the adapter. It must read what was verified,
    whatever happens to the volume.

    Args:
        keys: as for `check_gate`.
    Raises:
        Refused: with the reason.
        OSError: when it cannot be read or copied; a later attempt may succeed.
    """
    source = adapter_folder(digest, Path(served.volumes))
    copy = private_copy(name, digest, served)
    shutil.rmtree(copy, ignore_errors=True)
    try:
        largest = sum(4 * served.max_lora_rank * sum(shape) for shape in modules().values())
        _copy(source, copy, largest + LARGEST_REST)
        verify(copy, served, modules, keys)
    except Refused as refused:  # the copy is removed, so the message names the original
        shutil.rmtree(copy, ignore_errors=True)
        raise Refused(refused.reason, one_line(str(refused).replace(str(copy), str(source)))) from None
    except BaseException:
        shutil.rmtree(copy, ignore_errors=True)
        raise
    return copy


def _copy(source: Path, target: Path, limit: int) -> None:
    """Copy the files of an adapter, at most `limit` bytes. Refuses files that an adapter must not hold."""
    paths = plain_files(source)
    target.mkdir(parents=True)
    for path in paths:
        if not FILE_NAME.fullmatch(path.name) or (path.suffix not in SUFFIXES and path.name != SIGNATURE):
            raise Refused("files", f"it holds {path.name}; only {', '.join(SUFFIXES)} files are taken, no pickles")
        if path.suffix == ".safetensors" and path.name != WEIGHTS:
            raise Refused("files", f"it holds {path.name}; the only weights are {WEIGHTS}")
        # The file may have been replaced meanwhile: follow no link and wait for no pipe.
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(handle, "rb") as stream, (target / path.name).open("wb") as sink:  # noqa: PTH123 - by its handle
            while chunk := stream.read(2**20):
                limit -= len(chunk)
                if limit < 0:  # counted while reading: the file may grow
                    raise Refused("files", f"{path.name} is too large: no adapter for this base model is that large")
                sink.write(chunk)


def verify(folder: Path, served: Served, modules: Callable[[], Modules], keys: Sequence[str] = ()) -> None:
    """Return if the adapter artifact in `folder` is whole, made for this server's base, and harmless.

    Args:
        modules: returns the base model's linear layers.
        keys: as for `check_gate`.
    Raises:
        Refused: naming the first fault.
    """
    manifest = read_artifact(folder, "adapter", keys).manifest
    for key, digest in (("base_model", served.base_model), ("tokenizer", served.tokenizer)):
        if manifest["inputs"].get(key) != digest:
            raise Refused("base", f"it was trained on {key} {manifest['inputs'].get(key)}; this server serves {digest}")
    if keys:
        check_base_unchanged(manifest, served)
    check_template(manifest, served)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise Refused("files", f"{name} is missing")
    config, known = lora.check_config(folder / CONFIG, served.max_lora_rank), modules()
    lora.check_weights(folder / WEIGHTS, config, known)
    lora.check_desired(config, manifest["spec"].get("lora"), known)


def check_base_unchanged(manifest: Mapping[str, Any], served: Served) -> None:
    """Return if the base model on the volume is still what a signed adapter was trained on: it is not signed itself.

    Raises:
        Refused: with reason `base`.
    """
    about = manifest.get("about")
    read = about.get(READ) if isinstance(about, dict) else None
    expected = read.get("base_model") if isinstance(read, dict) else None
    if expected is None:
        return
    try:
        found = content_digest(read_json(Path(served.base_folder) / MANIFEST, "base", "cannot be read"))
    except (LookupError, ValueError) as error:
        raise Refused("base", one_line(f"the manifest of base model {served.base_model} is damaged ({error!r})")) \
            from None
    if found != expected:
        raise Refused("base", f"base model {served.base_model} is not what it was trained on: its content was changed "
                              "since")


def check_template(manifest: Mapping[str, Any], served: Served) -> None:
    """Return if the adapter was trained in the chat format of this server.

    Raises:
        Refused: with reason `base`.
    """
    if (template := template_of(manifest)) != served.template:
        raise Refused("base", f"it was trained with chat_template {template or 'damaged'}; this server has "
                              f"{served.template}")


def template_of(manifest: Mapping[str, Any]) -> str:
    """The arguments of the chat template with which an adapter was trained, as canonical JSON."""
    spec = manifest.get("spec")
    try:
        return canonical(spec.get("chat_template", {}) if isinstance(spec, dict) else {}).decode()
    except ValueError:  # not a number, or half a character: no environment file has it
        return ""
