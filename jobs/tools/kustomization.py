"""Finds errors in an overlay's kustomization that kustomize does not report, by rendering edited copies of it.

- A source out of reach: a Job has a source to fetch, but the network policies let it reach nothing.
- A patch without effect. kustomize ignores a patch whose target matches nothing, so a mirror or a limit that applies to
  no Job would go unnoticed. Each patch is left out once: the overlay must render differently.
- A Job that would change under its name. The API server rejects that ("field is immutable"). Each file of which the
  overlay makes a ConfigMap or Secret is edited once: a Job that changes by it must get another name, and so must a
  ConfigMap that is named by its content.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from jobs.core import pipeline
from jobs.core.errors import UserError
from jobs.core.pipeline import Source
from jobs.tools import pods

Edit = tuple[Path, Callable[[Path], object]]  # a file, and what to do to the copy of it

log = logging.getLogger("jobs")

# The keys under which a kustomization names the folders that it is made of; `bases` is what old ones call resources.
PARTS = ("resources", "bases", "components", "transformers", "generators", "validators")
COPIED_BYTES = 2**21  # of a larger file beside a kustomization no ConfigMap can be made


@dataclass(frozen=True)
class Patch:
    """One entry under `patches` of a kustomization, or under `patchesJson6902`, as old ones call it."""

    file: Path
    key: str
    index: int
    entry: dict[str, Any]

    def __str__(self) -> str:
        target = ", ".join(f"{key}: {value}" for key, value in (self.entry.get("target") or {}).items())
        where = self.entry.get("path") or f"{self.key}[{self.index}]"
        return f"{self.file}: the patch {where}{f' of {{{target}}}' if target else ''}"


def check(overlay: Path) -> None:
    """Check the overlay as kubectl renders it.

    Raises:
        UserError: it does not render, or with a line for each problem that was found.
    """
    if not any((overlay / name).exists() for name in pods.KUSTOMIZATIONS):
        return
    whole = pods.render(overlay)
    if rendered(overlay, [(overlay.resolve(), lambda _: None)]) != [whole]:
        log.warning("%s: a copy of it renders otherwise, so its patches and names are not checked. Does it use a "
                    "folder through a link, or a file of more than %d bytes?", overlay, COPIED_BYTES)
    problems = [*sources_out_of_reach(overlay, whole), *patches_without_effect(overlay, whole),
                *names_that_do_not_follow(overlay, whole)]
    if problems:
        raise UserError("\n".join(problems))


def kustomizations(folder: Path) -> dict[Path, dict[str, Any]]:
    """The kustomization of a folder and those on this machine that it includes: their content, by file."""
    file = next((path for name in pods.KUSTOMIZATIONS if (path := folder.resolve() / name).is_file()), None)
    if file is None:
        return {}
    content = read(file)
    found = {file: content}
    for part in (part for key in PARTS for part in content.get(key, [])):
        if "\n" not in part:  # else it is an object, written in the kustomization itself
            found |= kustomizations(folder / part)
    return found


def read(file: Path) -> dict[str, Any]:
    """What a kustomization says, without the keys that have no value."""
    content: dict[str, Any] = yaml.load(file.read_text(), pods.KubernetesYaml)  # noqa: S506 - it is safe
    return {key: value for key, value in content.items() if value is not None}


def sources_out_of_reach(overlay: Path, whole: list[pods.Manifest]) -> Iterator[str]:
    """The sources behind a network that the network policies do not let their Job reach."""
    wanted = pipeline.load(overlay).pipeline
    sources: dict[str, list[Source]] = {
        "dataset-relocation": [wanted.dataset, wanted.evaluation.acceptability],
        "model-relocation": [wanted.base_model], "tokenizer-relocation": [wanted.tokenizer_source],
        "model-reference-relocation": [wanted.reference_model]}
    policies = [m.get("spec") or {} for m in whole if m["kind"] == "NetworkPolicy"]
    for job, found in sources.items():
        outside = [source.source for source in found if source.scheme not in ("builtin", "file")]
        labels = {"app.kubernetes.io/name": job, "app.kubernetes.io/component": "relocation"}
        egress = [spec.get("egress", []) for spec in policies
                  if "Egress" in spec.get("policyTypes", ["Egress"] if "egress" in spec else [])
                  and selects(spec.get("podSelector") or {}, labels)]
        if job == "dataset-relocation" and not outside and any(egress):
            log.warning("%s: the data is in git, but %s may reach the network. List the component "
                        "base/egress/models-only in its kustomization.yaml", overlay, job)
        if outside and egress and not any(egress):
            yield (f"{overlay}: the network policies let {job} reach nothing, but it must fetch {', '.join(outside)}. "
                   "List the component base/egress in its kustomization.yaml, without models-only if data is fetched")


def selects(selector: pods.Manifest, labels: dict[str, str]) -> bool:
    """Whether a label selector of Kubernetes selects what has these labels."""
    def holds(key: str, operator: str, values: Sequence[str] = ()) -> bool:
        found = labels.get(key) in values if "In" in operator else key in labels
        return found == (operator in ("In", "Exists"))

    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        holds(**expression) for expression in selector.get("matchExpressions", []))


def own(overlay: Path) -> dict[Path, dict[str, Any]]:
    """The kustomizations in the overlay's folder: its own and its components'. Other folders are not checked."""
    return {file: content for file, content in kustomizations(overlay).items()
            if file.is_relative_to(overlay.resolve())}


def patches_without_effect(overlay: Path, whole: list[pods.Manifest]) -> list[str]:
    """The patches without which the overlay would render to the same."""
    patches = [Patch(file, key, index, entry) for file, content in own(overlay).items()
               for key in ("patches", "patchesJson6902") for index, entry in enumerate(content.get(key, []))]

    def leave_out(patch: Patch) -> Edit:
        def edit(file: Path) -> None:
            content = read(file)
            del content[patch.key][patch.index]
            file.write_text(yaml.safe_dump(content, sort_keys=False))
        return patch.file, edit

    results = rendered(overlay, [leave_out(patch) for patch in patches])
    return [f"{patch} has no effect: it matches nothing, or something later undoes it. In an overlay with a JobSet, "
            "patch the Jobs in a component that is listed before `jobset` (docs/registries.md has one)"
            for patch, result in zip(patches, results, strict=True) if result == whole]


def names_that_do_not_follow(overlay: Path, whole: list[pods.Manifest]) -> list[str]:
    """What an edit of a generated ConfigMap or Secret would change under its name."""
    files = sorted({file.parent / name.rpartition("=")[2] for file, content in own(overlay).items()
                    for generator in [*content.get("configMapGenerator", []), *content.get("secretGenerator", [])]
                    for name in generator.get("files", [])})
    files = [file for file in files if file.stat().st_size <= COPIED_BYTES]  # the API server refuses a larger one
    results = rendered(overlay, [(file, lambda copy: copy.write_bytes(copy.read_bytes() + b"\n")) for file in files])
    return [f"{file}: its next change would change {kind} {name} under its name: the cluster would reject it "
            "(\"field is immutable\"), or nothing would run again. List the component base/metadata, and give every "
            "generator but `pipeline` the `options: {disableNameSuffixHash: true}`"
            for file, result in zip(files, results, strict=True)
            for (kind, name), content in immutable(result).items()
            if immutable(whole).get((kind, name), content) != content]


def immutable(manifests: list[pods.Manifest]) -> dict[tuple[str, str], pods.Manifest]:
    """The Jobs, and what is named by its content."""
    return {(m["kind"], m["metadata"]["name"]): m for m in manifests if m["kind"] in ("Job", "JobSet")
            or (m["kind"] in ("ConfigMap", "Secret") and pods.HASH_SUFFIX.search(m["metadata"]["name"]))}


def rendered(overlay: Path, edits: list[Edit]) -> list[list[pods.Manifest]]:
    """The overlay after each of the edits alone; nothing where it does not render."""
    def render(edit: Edit) -> list[pods.Manifest]:
        file, change = edit
        with tempfile.TemporaryDirectory() as root:
            for part in kustomizations(overlay):  # each folder that it is made of, at its path below the temporary one
                shutil.copytree(part.parent, _below(root, part.parent), ignore=_not_copied, dirs_exist_ok=True)
            change(_below(root, file))
            try:
                return pods.render(_below(root, overlay.resolve()))
            except UserError:
                return []

    with ThreadPoolExecutor(4) as pool:  # kubectl takes a third of a second
        return list(pool.map(render, edits))


def _not_copied(folder: str, names: list[str]) -> list[str]:
    """What lies beside a kustomization and cannot be a part of it: large data, FIFOs, links to nowhere; and links to
    folders, which may lead anywhere."""
    def copied(path: Path) -> bool:
        if path.is_file():
            return path.stat().st_size <= COPIED_BYTES
        return path.is_dir() and not path.is_symlink()

    return [name for name in names if not copied(Path(folder, name))]


def _below(root: str, path: Path) -> Path:
    return Path(root, *path.parts[1:])
