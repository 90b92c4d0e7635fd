"""Finds errors in an overlay's kustomization that kustomize does not report, by rendering edited copies of it.

- An adapter's folder that does not render. kustomize then renders nothing at all: the others are checked without it.
- A source out of reach: a Job has a source to fetch, but the network policies let it reach nothing.
- An adapter whose Jobs are those of another kind: it is imported, and they train it, or none evaluates it.
- A name that is too long for what Kubernetes derives from it.
- A patch without effect. kustomize ignores a patch whose target matches nothing, so a mirror or a limit that applies to
  no Job would go unnoticed. Each patch is left out once: the overlay must render differently.
- A Job that would change under its name. The API server rejects that ("field is immutable"). Each file of which the
  overlay makes a ConfigMap or Secret is edited once: a Job that changes by it must get another name, and so must a
  ConfigMap that is named by its content.

Rendering takes a time that grows with the square of the number of adapters. So the overlay is rendered once as a whole,
and the edited copies list one adapter of each kind only: of those that render to the same but for their names.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from jobs.core import signing
from jobs.core.declarations import Source
from jobs.core.environment import LoadedEnvironment
from jobs.core.errors import UserError
from jobs.core.imported import LoadedAdapter, LoadedImport
from jobs.core.pipeline import ADAPTERS
from jobs.tools import pods

Content = dict[str, Any]  # what a kustomization holds
Change = Callable[[Path], object]  # what to do to the copy of a file

log = logging.getLogger("jobs")

# The keys under which a kustomization names the folders that it is made of; `bases` is what old ones call resources.
PARTS = ("resources", "bases", "components", "transformers", "generators", "validators")
COPIED_BYTES = 2**21  # of a larger file beside a kustomization no ConfigMap can be made
NAME_CHARACTERS = 63  # of a Job, which becomes a label of its pods; of a pod, which becomes its host name
POD_SUFFIX = 6  # characters that the Job controller adds to the name of a pod: -x7k2p
NAME = "app.kubernetes.io/name"
PUBLICATION = "adapter-publication"
NOWHERE = "192.0.2.1/32"  # in base/publication/network-policy.yaml, to be replaced
SIGNING_STAGES = frozenset({"model-training", "model-evaluation", "adapter-publication"})
INSTANCE = "app.kubernetes.io/instance"  # the label that has an adapter's name
THREADS = 4


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


@dataclass(frozen=True)
class Scope:
    """An overlay as it renders, and what of it is examined by edits."""

    overlay: Path
    whole: list[pods.Manifest]
    listed: frozenset[str]  # the adapters in `whole`
    examined: frozenset[str]  # one of each kind; or the one that was named
    only: str | None  # the one that was named

    def owner(self, file: Path) -> str | None:
        """The adapter in whose folder a file is."""
        folder = self.overlay.resolve() / ADAPTERS
        return file.relative_to(folder).parts[0] if file.is_relative_to(folder) and file.parent != folder else None

    def concerns(self, file: Path) -> bool:
        """Whether edits of the file are examined."""
        owner = self.owner(file)
        return owner in self.examined if owner else self.only is None


def check(overlay: Path, environment: LoadedEnvironment | None = None,
          adapters: Mapping[str, LoadedAdapter] | None = None, *, only: str | None = None,
          without: Collection[str] = ()) -> None:
    """Check the overlay as kubectl renders it.

    Args:
        overlay: its folder.
        environment, adapters: its valid files, whose sources must be in reach; the environment's only for all of it.
        only: the adapter to check; by default all, and what they share.
        without: adapters with entries that are known to be wrong: they are left out.
    Raises:
        UserError: it does not render, or with a line for each problem that was found.
    """
    if not any((overlay / name).exists() for name in pods.KUSTOMIZATIONS):
        return
    present = frozenset(names(overlay)) - frozenset(without)
    if only is not None:
        present &= {only}
    problems: list[str] = []
    try:
        whole = rendered(overlay, present) if without or only is not None else pods.render(overlay)
    except UserError as error:
        broken = not_rendering(overlay, present)
        problems += broken.values()
        present -= frozenset(broken)
        try:
            whole = rendered(overlay, present) if broken else pods.render(overlay)
        except UserError:
            raise UserError("\n".join([*problems, str(error)])) from None
    scope = narrowed(overlay, whole, present, only)
    problems += [*jobs_of_another_kind(overlay, whole, adapters or {}),
                 *sources_out_of_reach(overlay, whole, environment, adapters or {}),
                 *stages_without_key(overlay, whole, environment, adapters or {}),
                 *publication_without_place(overlay, whole, environment, adapters or {}),
                 *names_too_long(overlay, whole, only)]
    if scope:
        problems += [*patches_without_effect(scope), *names_that_do_not_follow(scope)]
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))


def find(folder: Path) -> Path | None:
    """The kustomization of a folder; None if it has none."""
    return next((path for name in pods.KUSTOMIZATIONS if (path := folder / name).is_file()), None)


def normal(path: Path) -> Path:
    """The absolute path without `..`, and with its links."""
    return Path(os.path.normpath(path.absolute()))


def read(file: Path) -> Content:
    """What a kustomization says, without the keys that have no value.

    Raises:
        UserError: it is not YAML, or no mapping.
    """
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), pods.KubernetesYaml)  # noqa: S506 - it is safe
    except Exception as error:  # whatever a hostile file makes PyYAML raise is one line: see `strict_yaml.read`
        problem = " ".join(str(error).split())
        raise UserError(f"{file}: not valid YAML: {problem}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: must hold a mapping with the key `resources` and others")
    return {key: value for key, value in content.items() if value is not None}


def texts(content: Content, key: str) -> list[str]:
    """The texts of a list in a kustomization; kustomize itself reports what is no list or no text."""
    value = content.get(key)
    return [part for part in value if isinstance(part, str)] if isinstance(value, list) else []


def mappings(content: Content, key: str) -> list[Content]:
    """The mappings of a list in a kustomization."""
    value = content.get(key)
    return [part for part in value if isinstance(part, dict)] if isinstance(value, list) else []


def generated_from(file: Path, generator: Content) -> list[tuple[str, Path]]:
    """The files of a generator in the kustomization `file`, by the keys that they get."""
    named = [(key or Path(path).name, path) for entry in texts(generator, "files")
             for key, _, path in [entry.rpartition("=")]]
    return [(key, normal(file.parent / path)) for key, path in named]


def kustomizations(folder: Path) -> dict[Path, Content]:
    """The kustomization of a folder and those on this machine that it includes: their content, by file. One that cannot
    be read has none; kustomize reports it."""
    found: dict[Path, Content] = {}
    _collect(folder, found)
    return found


def _collect(folder: Path, found: dict[Path, Content]) -> None:
    file = find(folder.resolve())
    if file is None or file in found:
        return
    try:
        found[file] = read(file)
    except UserError:
        found[file] = {}
    for part in (part for key in PARTS for part in texts(found[file], key)):
        if "\n" not in part:  # else it is an object, written in the kustomization itself
            _collect(file.parent / part, found)


def own(overlay: Path) -> dict[Path, Content]:
    """The kustomizations in the overlay's folder: its own, its components' and its adapters'. No other is checked."""
    return {file: content for file, content in kustomizations(overlay).items()
            if file.is_relative_to(overlay.resolve())}


def names(overlay: Path) -> list[str]:
    """The adapters that the overlay lists and that have a kustomization."""
    folder = overlay.resolve() / ADAPTERS
    return [file.parent.name for file in kustomizations(overlay) if file.parent.parent == folder]


def not_rendering(overlay: Path, adapters: Collection[str]) -> dict[str, str]:
    """Why adapters' folders do not render by themselves, by name."""
    def render(name: str) -> str | None:
        try:
            pods.render(overlay / ADAPTERS / name)
        except UserError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(THREADS) as pool:
        found = zip(sorted(adapters), pool.map(render, sorted(adapters)), strict=True)
        return {name: error for name, error in found if error}


def narrowed(overlay: Path, whole: list[pods.Manifest], present: frozenset[str], only: str | None) -> Scope | None:
    """What to examine by edits: the smallest copy of the overlay that shows every kind of adapter. None if no copy
    renders as the overlay does."""
    examined = frozenset({only} & present if only else representatives(overlay, whole, present))
    for kept in dict.fromkeys((examined, present)):
        try:
            copy = rendered(overlay, kept)
        except UserError:  # e.g. a patch that names an adapter which is left out
            continue
        if _comparable(copy) == _comparable([m for m in whole if _instance(m) in kept or _instance(m) not in present]):
            return Scope(overlay, copy, kept, kept if only is None else examined, only)
    log.warning("%s: a copy of it renders otherwise, so its patches and names are not checked. Does it use a folder "
                "through a link, or a file of more than %d bytes?", overlay, COPIED_BYTES)
    return None


def representatives(overlay: Path, whole: list[pods.Manifest], adapters: Collection[str]) -> set[str]:
    """One adapter of each kind: those of a kind have the same kustomization and render to the same, but for their name
    and the content of their files."""
    rest = {name: [m for m in whole if _instance(m) == name] for name in adapters}
    kinds: dict[str, str] = {}
    for name in sorted(adapters):
        file = find(overlay / ADAPTERS / name)
        content = [read(file) if file else {}, *map(_without_content, rest[name])]
        text = re.sub(r"-[24-9bcdfghkmt]{10}\b", "-HASH", json.dumps(content, sort_keys=True, default=str))
        kinds.setdefault(re.sub(rf"(?<![a-z0-9]){re.escape(name)}(?![a-z0-9])", "NAME", text), name)
    return set(kinds.values())


def _without_content(manifest: pods.Manifest) -> pods.Manifest:
    """The object, with the keys of a ConfigMap or Secret alone."""
    return manifest | {key: sorted(manifest[key] or {}) for key in ("data", "binaryData") if key in manifest}


def _instance(manifest: pods.Manifest) -> str | None:
    """The adapter to which an object belongs."""
    name = (manifest["metadata"].get("labels") or {}).get(INSTANCE)
    return str(name) if name is not None else None


def _comparable(manifests: list[pods.Manifest]) -> list[pods.Manifest]:
    """The objects, without the content of ConfigMaps that are not named by it: one lists all adapters."""
    return [m if m["kind"] != "ConfigMap" or pods.HASH_SUFFIX.search(m["metadata"]["name"]) else m | {"data": None}
            for m in manifests]


def sources_out_of_reach(overlay: Path, whole: list[pods.Manifest], environment: LoadedEnvironment | None,
                         adapters: Mapping[str, LoadedAdapter]) -> Iterator[str]:
    """The sources behind a network that the network policies do not let their Job reach."""
    wanted: list[tuple[str, str | None, list[Source]]] = []
    if environment:
        shared = environment.environment
        wanted += [("model-relocation", None, [shared.base_model]),
                   ("tokenizer-relocation", None, [shared.tokenizer_source]),
                   ("model-reference-relocation", None, [shared.reference_model])]
    for name, loaded in adapters.items():
        of_adapter = loaded.pipeline.sources()
        if published := of_adapter.pop("source", None):
            wanted.append(("adapter-relocation", name, [published]))
        if of_adapter:
            wanted.append(("dataset-relocation", name, list(of_adapter.values())))
    policies = [m.get("spec") or {} for m in whole if m["kind"] == "NetworkPolicy"]
    # Of one adapter alone it cannot be told.
    open_without_need = bool(environment) and any(job == "dataset-relocation" for job, *_ in wanted)
    for job, adapter, sources in wanted:
        outside = [source.source for source in sources if source.scheme not in ("builtin", "file")]
        labels = {"app.kubernetes.io/name": job, "app.kubernetes.io/component": "relocation"}
        labels |= {INSTANCE: adapter} if adapter else {}
        egress = [spec.get("egress", []) for spec in policies
                  if "Egress" in spec.get("policyTypes", ["Egress"] if "egress" in spec else [])
                  and selects(spec.get("podSelector") or {}, labels)]
        if job == "dataset-relocation":
            open_without_need &= not outside and any(egress)
        if outside and egress and not any(egress):
            of = f" of {adapter}" if adapter else ""
            yield (f"{overlay}: the network policies let {job}{of} reach nothing, but it must fetch "
                   f"{', '.join(outside)}. List the component base/egress in its kustomization.yaml, without "
                   "models-only if data is fetched")
    if open_without_need:
        log.warning("%s: the data is in git, but dataset-relocation may reach the network. List the component "
                    "base/egress/models-only in its kustomization.yaml", overlay)


def jobs_of_another_kind(overlay: Path, whole: list[pods.Manifest], adapters: Mapping[str, LoadedAdapter]
                         ) -> Iterator[str]:
    """The adapters whose Jobs do not do what their pipeline.yaml says: train, import, or import and evaluate."""
    claims = {m["metadata"]["name"] for m in whole if m["kind"] == "PersistentVolumeClaim"}
    serves_only = "dataset-pvc" not in claims and any(file.parent.name == "serving-only"
                                                      for file in kustomizations(overlay))
    labels = [pods.labels(template) for template in pods.pod_templates(whole).values()]
    for name, loaded in adapters.items():
        jobs = {each[NAME] for each in labels if each.get(INSTANCE) == name and NAME in each}
        if jobs and (problem := _wrong_jobs(loaded, jobs, serves_only=serves_only)):
            yield f"{overlay / ADAPTERS / name}: {problem}"


def _wrong_jobs(loaded: LoadedAdapter, jobs: Collection[str], *, serves_only: bool) -> str | None:
    """What is wrong with the Jobs of an adapter, by their names without suffix; None if nothing is."""
    evaluates, component = "model-evaluation" in jobs, "the component base/imported-adapter/evaluated"
    no_volumes = ("the component base/serving-only removes the volumes for that: leave it out of the overlay's "
                  "kustomization.yaml")
    if not isinstance(loaded, LoadedImport):
        if "adapter-relocation" in jobs:
            return ("pipeline.yaml has no `source`, and its kustomization.yaml makes the Job of an imported adapter. "
                    "List base/adapter under `resources`")
        return f"it is trained here, and {no_volumes}" if serves_only else None
    if "adapter-relocation" not in jobs or "model-training" in jobs:
        return ("pipeline.yaml has a `source`, and its kustomization.yaml makes the Jobs of an adapter that is trained "
                "here. List base/imported-adapter under `resources` instead")
    if loaded.pipeline.evaluation is None:
        return (f"its kustomization.yaml lists {component}, and pipeline.yaml has no `dataset` and `evaluation`. "
                "Remove the one or add the others") if evaluates else None
    if not evaluates:
        return ("pipeline.yaml has `evaluation`, and no Job evaluates the adapter, so it would never be promoted. List "
                f"{component} in its kustomization.yaml, before base/adapter/names")
    return f"it is evaluated here, and {no_volumes}" if serves_only else None


def stages_without_key(overlay: Path, whole: list[pods.Manifest], environment: LoadedEnvironment | None,
                       adapters: Mapping[str, LoadedAdapter]) -> Iterator[str]:
    """The stages that are to sign what they publish, and have no key; without the key they fail."""
    shared = environment or next(iter(adapters.values())).environment if environment or adapters else None
    if shared is None:
        return
    signs = {(labels[NAME], any(entry["name"] == signing.VARIABLE for container in pods.containers(template)
                                for entry in container.get("env") or []))
             for template in pods.pod_templates(whole).values()
             if (labels := pods.labels(template)).get(NAME) in SIGNING_STAGES}
    without = sorted(name for name, has_key in signs if not has_key)
    if shared.environment.signing and without:
        yield (f"{shared.path}: asks for signatures (signing), but {', '.join(without)} "
               f"{'has' if len(without) == 1 else 'have'} no key. List the component base/signing in the "
               "kustomization.yaml (of a JobSet: overlays/gpu/jobset/signing; docs/signing.md)")
    if not shared.environment.signing and any(has_key for _, has_key in signs):
        log.warning("%s: the signing key is mounted, but %s names no public key (signing.public_keys), so nothing is "
                    "signed", overlay, shared.path)


def publication_without_place(overlay: Path, whole: list[pods.Manifest], environment: LoadedEnvironment | None,
                              adapters: Mapping[str, LoadedAdapter]) -> Iterator[str]:
    """What keeps the publication of adapters from its place: no place, no component, or no address."""
    shared = environment or next(iter(adapters.values())).environment if environment or adapters else None
    if shared is None:
        return
    publishes = [template for template in pods.pod_templates(whole).values()
                 if pods.labels(template).get(NAME) == PUBLICATION]
    place = shared.environment.publication
    if not publishes:
        if place and environment:
            log.warning("%s: says where adapters are published, but no adapter is: list base/publication/adapter in "
                        "the kustomization.yaml of those that are (docs/publication.md)", shared.path)
        return
    if place is None:
        yield (f"{overlay}: has the Job {PUBLICATION}, but {shared.path} does not say where to publish. Add "
               "`publication: {to: oci://REGISTRY/PREFIX}` to it")
    if not any(m["kind"] == "ServiceAccount" and m["metadata"]["name"] == "publication" for m in whole):
        yield (f"{overlay}: has the Job {PUBLICATION}, but not its service account and network policy. List the "
               "component base/publication in its kustomization.yaml")
    if any(NOWHERE in str(m.get("spec")) for m in whole if m["kind"] == "NetworkPolicy"):
        yield (f"{overlay}: the network policy `publication` lets {PUBLICATION} reach nothing. Patch in the address of "
               "the registry or the bucket, or list base/publication/public (docs/publication.md)")


def selects(selector: pods.Manifest, labels: dict[str, str]) -> bool:
    """Whether a label selector of Kubernetes selects what has these labels."""
    def holds(key: str, operator: str, values: Sequence[str] = ()) -> bool:
        found = labels.get(key) in values if "In" in operator else key in labels
        return found == (operator in ("In", "Exists"))

    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        holds(**expression) for expression in selector.get("matchExpressions", []))


def names_too_long(overlay: Path, whole: list[pods.Manifest], only: str | None = None) -> Iterator[str]:
    """The names of Jobs, or of what a JobSet makes, that Kubernetes would refuse; the longest of each adapter."""
    longest: dict[str | None, tuple[str, str]] = {}
    for manifest in whole:
        for kind, name in derived_names(manifest):
            adapter = _instance(manifest)
            if len(name) > len(longest.get(adapter, ("", ""))[1]):
                longest[adapter] = kind, name
    for adapter, (kind, name) in longest.items():
        excess = len(name) - NAME_CHARACTERS
        if excess > 0 and only in (None, adapter):
            where = f"{overlay / ADAPTERS / adapter}: the adapter's name" if adapter else f"{overlay}: a name"
            room = len(adapter) - excess if adapter else 0
            advice = f"Here an adapter's name has at most {room} characters" if room > 0 else "Shorten it"
            yield (f"{where} is too long: the {kind} {name} would have a name of {len(name)} characters, and "
                   f"Kubernetes allows {NAME_CHARACTERS}. {advice}")


def derived_names(manifest: pods.Manifest) -> Iterator[tuple[str, str]]:
    """The names of a Job and of its pods' hosts, and of the Jobs and pods that a JobSet makes."""
    name, spec = manifest["metadata"]["name"], manifest.get("spec") or {}
    if manifest["kind"] == "Job":
        yield "Job", name
        if spec.get("completionMode") == "Indexed":
            yield "pod", f"{name}-{spec.get('completions', 1) - 1}"
    if manifest["kind"] == "JobSet":
        for job in spec.get("replicatedJobs") or []:
            child, of_job = f"{name}-{job['name']}-{job.get('replicas', 1) - 1}", job["template"].get("spec") or {}
            yield "Job", child
            if "completions" in of_job:  # JobSet checks the names of pods then
                yield "pod", f"{child}-{of_job['completions'] - 1}" + "-" + "x" * (POD_SUFFIX - 1)


def patches_without_effect(scope: Scope) -> list[str]:
    """The patches without which the overlay would render to the same."""
    patches = [Patch(file, key, index, entry) for file, content in own(scope.overlay).items() if scope.concerns(file)
               for key in ("patches", "patchesJson6902") for index, entry in enumerate(mappings(content, key))]

    def without(patch: Patch) -> Change:
        def change(file: Path) -> None:
            content = read(file)
            del content[patch.key][patch.index]
            file.write_text(yaml.safe_dump(content, sort_keys=False))
        return change

    def without_effect(scope: Scope, patches: list[Patch]) -> list[Patch]:
        results = edited(scope, [(patch.file, without(patch)) for patch in patches])
        return [patch for patch, (before, after) in zip(patches, results, strict=True) if before == after]

    suspects = without_effect(scope, patches)
    present = frozenset(names(scope.overlay))
    if suspects and scope.only is None and present != scope.listed:  # does one concern an adapter that is left out?
        try:
            everything = Scope(scope.overlay, rendered(scope.overlay, present), present, present, None)
        except UserError:
            everything = scope
        suspects = without_effect(everything, suspects)
    return [f"{patch} has no effect: it matches nothing, or something later undoes it. In an overlay with a JobSet, "
            "patch the Jobs in a component that is listed before `jobset` (docs/registries.md has one)"
            for patch in suspects]


def names_that_do_not_follow(scope: Scope) -> list[str]:
    """What an edit of a generated ConfigMap or Secret would change under its name."""
    files = sorted({path for file, content in own(scope.overlay).items()
                    for key in ("configMapGenerator", "secretGenerator") for generator in mappings(content, key)
                    for _, path in generated_from(file, generator)
                    if scope.concerns(path) and path.is_file() and path.stat().st_size <= COPIED_BYTES})

    def edit(copy: Path) -> None:
        copy.write_bytes(copy.read_bytes() + b"\n")

    return [f"{file}: its next change would change {kind} {name} under its name: the cluster would reject it "
            "(\"field is immutable\"), or nothing would run again. List the component base/metadata in the overlay and "
            "base/adapter/names in the adapter's folder, both as the last, and give every generator but `environment` "
            "and `pipeline` the `options: {disableNameSuffixHash: true}`"
            for file, (before, after) in zip(files, edited(scope, [(file, edit) for file in files]), strict=True)
            for (kind, name), content in immutable(after).items()
            if immutable(before).get((kind, name), content) != content]


def immutable(manifests: list[pods.Manifest]) -> dict[tuple[str, str], pods.Manifest]:
    """The Jobs, and what is named by its content."""
    return {(m["kind"], m["metadata"]["name"]): m for m in manifests if m["kind"] in ("Job", "JobSet")
            or (m["kind"] in ("ConfigMap", "Secret") and pods.HASH_SUFFIX.search(m["metadata"]["name"]))}


def edited(scope: Scope, edits: list[tuple[Path, Change]]) -> list[tuple[list[pods.Manifest], list[pods.Manifest]]]:
    """What each of the edits alone can change, before and after it; nothing after one that does not render. An edit in
    an adapter's folder can change its objects."""
    def render(edit: tuple[Path, Change]) -> tuple[list[pods.Manifest], list[pods.Manifest]]:
        owner = scope.owner(edit[0])
        after: list[pods.Manifest] = []
        for kept in dict.fromkeys((frozenset({owner}) if owner else scope.listed, scope.listed)):
            try:
                after = rendered(scope.overlay, kept, edit)
                break
            except UserError:  # of one adapter alone: perhaps a patch names another
                continue
        if owner is None:
            return scope.whole, after
        return [m for m in scope.whole if _instance(m) == owner], [m for m in after if _instance(m) == owner]

    with ThreadPoolExecutor(THREADS) as pool:  # kubectl takes a third of a second
        return list(pool.map(render, edits))


def rendered(overlay: Path, kept: Collection[str], edit: tuple[Path, Change] | None = None) -> list[pods.Manifest]:
    """A copy of the overlay, with these of its adapters and after an edit.

    Raises:
        UserError: it does not render.
    """
    with tempfile.TemporaryDirectory() as root:
        parts = kustomizations(overlay)
        try:
            for part in parts:  # each folder that it is made of, at its path below the temporary one
                shutil.copytree(part.parent, _below(root, part.parent), ignore=_not_copied, dirs_exist_ok=True)
        except OSError as error:  # e.g. a file was removed meanwhile
            raise UserError(f"{overlay}: cannot be copied to be checked: {error}") from None
        folder = overlay.resolve() / ADAPTERS
        for file in parts:
            if file.is_relative_to(overlay.resolve()) and file.parent.parent != folder:
                _keep(_below(root, file), partial(_is_left_out, file.parent, folder, kept))
        if edit:
            edit[1](_below(root, edit[0]))
        try:
            return pods.render(_below(root, overlay.resolve()))
        except UserError as error:
            raise UserError(str(error).replace(str(Path(root).resolve()), "").replace(root, "")) from None


def _is_left_out(place: Path, folder: Path, kept: Collection[str], path: str) -> bool:
    """Whether a path in a kustomization at `place` is in the folder of an adapter that is not kept."""
    found = normal(place / path)
    return found.is_relative_to(folder) and found != folder and found.relative_to(folder).parts[0] not in kept


def _keep(file: Path, left_out: Callable[[str], bool]) -> None:
    """Take the entries of adapters that are left out from a kustomization."""
    try:
        content = read(file)
    except UserError:
        return  # kustomize reports it
    lists = [(content, "resources"), (content, "bases"),
             *((generator, "files") for generator in mappings(content, "configMapGenerator"))]
    changed = False
    for mapping, key in lists:
        gone = [entry for entry in texts(mapping, key) if left_out(entry.rpartition("=")[2])]
        if gone:
            mapping[key] = [entry for entry in mapping[key] if entry not in gone]
            changed = True
    if changed:
        file.write_text(yaml.safe_dump(content, sort_keys=False))


def _not_copied(folder: str, names: list[str]) -> list[str]:
    """What lies beside a kustomization and cannot be a part of it: large data, FIFOs, links to nowhere, what this user
    may not read; and links to folders, which may lead anywhere."""
    def copied(path: Path) -> bool:
        if not os.access(path, os.R_OK):
            return False
        if path.is_file():
            return path.stat().st_size <= COPIED_BYTES
        return path.is_dir() and not path.is_symlink()

    return [name for name in names if not copied(Path(folder, name))]


def _below(root: str, path: Path) -> Path:
    return Path(root, *path.parts[1:])
