"""What the kustomizations of an overlay must say of each adapter, and where they do not agree with its folder.

An adapter is named in six places: its folder, `adapter` in its pipeline.yaml, `nameSuffix` and the label
`app.kubernetes.io/instance` in its kustomization.yaml, and two entries in the overlay's kustomization.yaml, under
`resources` and in the ConfigMap `serving-pipelines`. kustomize compares none of them.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from jobs.core import environment, pipeline
from jobs.core.errors import UserError
from jobs.core.imported import LoadedAdapter
from jobs.core.pipeline import ADAPTERS
from jobs.tools import kustomization, yaml_text
from jobs.tools.kustomization import INSTANCE, Content
from jobs.tools.overlay import pipelines

SERVED = "serving-pipelines"  # the ConfigMap that serving mounts


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and the adapter that it concerns, if it is one."""

    adapter: str | None
    message: str


@dataclass
class Entries:
    """What the overlay's own kustomizations list."""

    file: Path  # the overlay's kustomization
    resources: Counter[str] = field(default_factory=Counter)  # the names of the adapters' folders
    served: list[tuple[str, Path]] = field(default_factory=list)  # each key of `serving-pipelines`, and its file
    generators: dict[str, Content] = field(default_factory=dict)  # the ConfigMaps' generators, by name


def read(overlay: Path) -> Entries | None:
    """What the kustomizations in the overlay's folder list; None if it has none.

    Raises:
        UserError: the overlay's own cannot be read.
    """
    file = kustomization.find(overlay)
    if file is None:
        return None
    kustomization.read(file)
    entries = Entries(file)
    folder = overlay.resolve()
    for each, content in kustomization.own(overlay).items():
        if each.is_relative_to(folder / ADAPTERS) and each.parent != folder / ADAPTERS:
            continue  # an adapter's
        for part in (*kustomization.texts(content, "resources"), *kustomization.texts(content, "bases")):
            path = kustomization.normal(each.parent / part)
            if path.parent == folder / ADAPTERS:
                entries.resources[path.name] += 1
        for generator in kustomization.mappings(content, "configMapGenerator"):
            name = str(generator.get("name"))
            entries.generators.setdefault(name, generator)
            if name == SERVED:
                entries.served += kustomization.generated_from(each, generator)
    return entries


def problems(overlay: Path, adapters: Mapping[str, LoadedAdapter]) -> Iterator[Problem]:
    """Where folders, entries and names do not agree. `adapters` are those with a valid pipeline.yaml, by folder."""
    entries = read(overlay)
    if entries is None:
        return
    folder = overlay / ADAPTERS
    there = {file.parent.name for file in pipelines(overlay)}
    served = Counter(file.parent.name for _, file in entries.served
                     if file.parent.parent == folder.resolve() and file.name == pipeline.FILE)
    for name in sorted(there | set(entries.resources) | set(served)):
        found = [*_entries_of(name, folder, entries, served[name]), *_folder_of(name, folder, adapters.get(name))]
        yield from (Problem(name, message) for message in found)
    yield from (Problem(name, message) for name, message in _of_no_adapter(overlay, entries))
    yield from (Problem(None, message) for message in _shared(overlay, entries))


def _entries_of(name: str, folder: Path, entries: Entries, served: int) -> Iterator[str]:
    """What the overlay's kustomization should list of an adapter, and does not, or twice."""
    path, key, listed = f"{ADAPTERS}/{name}", f"{name}.yaml", entries.resources[name]
    entry = f"{key}={path}/{pipeline.FILE}"
    if not (folder / name / pipeline.FILE).exists():
        what = "has no pipeline.yaml" if (folder / name).is_dir() else "does not exist"
        yield (f"{entries.file}: lists {path}, which {what}. Make it with `python -m jobs new`, or remove its entries "
               f"under `resources` and in `{SERVED}`")
        return
    if listed == 0:
        yield f"{entries.file}: `resources` does not list {path}, so its Jobs would not run. Add: - {path}"
    if served == 0:
        yield f"{entries.file}: `{SERVED}` has no file of {path}, so it would not be served. Add: - {entry}"
    if listed > 1:
        yield f"{entries.file}: lists {path} under `resources` {listed} times; keep one"
    if served > 1:
        yield f"{entries.file}: lists {path} in `{SERVED}` {served} times; keep one"
    keys = [other for other, file in entries.served if file == folder.resolve() / name / pipeline.FILE]
    for other in keys:
        if other != key:
            yield (f"{entries.file}: `{SERVED}` has {path} under the key {other}: clients would ask for "
                   f"{other.removesuffix('.yaml')}. Write: - {entry}")


def _of_no_adapter(overlay: Path, entries: Entries) -> Iterator[tuple[str, str]]:
    """The folders beside the adapters' that look like one and are none, by name."""
    used = kustomization.kustomizations(overlay)
    for folder in sorted((overlay / ADAPTERS).glob("[!.]*/")):
        file, name = kustomization.find(folder.resolve()), folder.name
        if file and file not in used and not (folder / pipeline.FILE).exists() and (
                name not in entries.resources):
            yield name, (f"{folder}: has no {pipeline.FILE}, and no kustomization lists it, so it is not an adapter. "
                         "Make adapters with `python -m jobs new`, or remove the folder")


def _folder_of(name: str, folder: Path, loaded: LoadedAdapter | None) -> Iterator[str]:
    """Where what is in an adapter's folder has other names than the folder."""
    if not (folder / name / pipeline.FILE).exists():
        return
    if loaded and loaded.pipeline.adapter != name:
        yield (f"{loaded.path}: adapter: {loaded.pipeline.adapter} is not the name of its folder, {name}. "
               "Rename one of them")
    file = kustomization.find(folder / name)
    if file is None:
        yield f"{folder / name}: has no kustomization.yaml. Copy that of another adapter and change the names in it"
        return
    try:
        content = kustomization.read(file)
    except UserError as error:
        yield str(error)
        return
    if content.get("nameSuffix") != f"-{name}":
        yield (f"{file}: nameSuffix is {content.get('nameSuffix')}, but the Jobs of two adapters would have the same "
               f"names if it were not the folder's. Write: nameSuffix: -{name}")
    pairs: dict[str, Any] = {}
    for label in kustomization.mappings(content, "labels"):
        pairs |= label["pairs"] if isinstance(label.get("pairs"), dict) else {}
    pairs |= content["commonLabels"] if isinstance(content.get("commonLabels"), dict) else {}
    if pairs.get(INSTANCE) != name:
        yield (f"{file}: the label {INSTANCE} is {pairs.get(INSTANCE)}, but must be the folder's name. "
               f"Write under `labels`: - pairs: {{{INSTANCE}: {name}}}")
    yield from _generated(file, content, loaded)


def _generated(file: Path, content: Content, loaded: LoadedAdapter | None) -> Iterator[str]:
    """What the adapter's Jobs would not find in their ConfigMap `pipeline`."""
    keys = [key for generator in kustomization.mappings(content, "configMapGenerator")
            if generator.get("name") == "pipeline" for key, _ in kustomization.generated_from(file, generator)]
    needed = [pipeline.FILE, *(source.location for source in (loaded.pipeline.sources().values() if loaded else ())
                               if source.scheme == "file" and loaded and loaded.resolve(source).is_file()
                               and kustomization.normal(loaded.resolve(source)).parent
                               == kustomization.normal(loaded.path.parent))]
    for key in needed:
        if key.removeprefix("./") not in keys:
            yield (f"{file}: the ConfigMap `pipeline` lacks {key}, so the Jobs would not find it. Add it to `files` of "
                   "that generator")


def _shared(overlay: Path, entries: Entries) -> Iterator[str]:
    """What all adapters need in the overlay's kustomization."""
    shared = overlay.resolve() / environment.FILE
    for name, purpose in (("environment", "the Jobs"), (SERVED, "serving")):
        if name not in entries.generators:
            yield (f"{entries.file}: `configMapGenerator` does not make `{name}`, which {purpose} mount. "
                   "overlays/kind/kustomization.yaml has it")
    if SERVED not in entries.generators:
        return
    if (environment.FILE, shared) not in entries.served:
        yield f"{entries.file}: `{SERVED}` lacks {environment.FILE}. Add: - {environment.FILE}"
    options = entries.generators[SERVED].get("options")
    if not isinstance(options, dict) or options.get("disableNameSuffixHash") is not True:
        yield (f"{entries.file}: `{SERVED}` gets another name with each change, which restarts the server. Give it "
               "`options: {disableNameSuffixHash: true}`")
    adapters = overlay.resolve() / ADAPTERS
    for key, file in entries.served:
        if file != shared and (file.parent.parent != adapters or file.name != pipeline.FILE):
            yield (f"{entries.file}: `{SERVED}` has {key}={file.name}, which is neither {environment.FILE} nor the "
                   f"{pipeline.FILE} of a folder of {ADAPTERS}. Remove it")


def with_adapter(file: Path, name: str) -> str:
    """The text of the overlay's kustomization with the entries of an adapter; those that are there stay.

    Raises:
        UserError: its layout does not let them be added; has the entries, for a person to add them.
    """
    content = kustomization.read(file)
    text = file.read_bytes().decode()
    entry, served = f"{ADAPTERS}/{name}", f"{name}.yaml={ADAPTERS}/{name}/{pipeline.FILE}"
    wanted = copy.deepcopy(content)
    try:
        if entry not in wanted["resources"]:
            at = [n for n, part in enumerate(wanted["resources"]) if str(part).startswith(f"{ADAPTERS}/")]
            after = at[-1] if at else len(wanted["resources"]) - 1
            wanted["resources"].insert(after + 1, entry)
            text = yaml_text.append(text, ["resources"], entry, after=after)
        number = next(n for n, generator in enumerate(wanted["configMapGenerator"]) if generator["name"] == SERVED)
        if served not in wanted["configMapGenerator"][number]["files"]:
            wanted["configMapGenerator"][number]["files"].append(served)
            text = yaml_text.append(text, ["configMapGenerator", number, "files"], served)
        if holds(text, wanted):
            return text
    except (yaml.YAMLError, LookupError, TypeError, AttributeError, StopIteration):
        pass  # reported below
    raise UserError(f"{file}: its layout does not let the adapter's entries be added. Add them yourself, then run this "
                    f"again: under `resources`: - {entry}; under `files` of the generator `{SERVED}`: - {served}")


def holds(text: str, content: dict[str, Any]) -> bool:
    """Whether a text of YAML holds this content, keys without a value aside."""
    found = yaml.safe_load(text)
    return isinstance(found, dict) and {key: value for key, value in found.items() if value is not None} == content
