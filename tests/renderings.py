"""Everything that can be applied to a cluster, rendered: for the tests that hold for every document of the project."""

from __future__ import annotations

import functools
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml

from tests.manifests import CHECKOUT, Manifest, copy, render

# A resource or component that a kustomization offers in a comment, or an environment that Argo CD's settings offer.
OPTION = re.compile(r"^( *)# (- .+|{.+},)$", re.MULTILINE)

# What is applied: each overlay, and argocd/.
FOLDERS = [*sorted(p.parent for p in CHECKOUT.glob("overlays/*/kustomization.yaml")), CHECKOUT / "argocd"]


def with_options(file: Path) -> str:
    """The text of a file with everything switched on that it offers."""
    return OPTION.sub(r"\1\2", file.read_text())


def offering(folder: Path) -> list[Path]:
    """The files of a folder that offer something."""
    return [file for name in ("kustomization.yaml", "settings.yaml") for file in sorted(folder.rglob(name))
            if with_options(file) != file.read_text()]


# By name: each as it is, and with all of its options switched on.
NAMES = [str(folder.relative_to(CHECKOUT)) + suffix for folder in FOLDERS for suffix in ("", " with options")
         if not suffix or offering(folder)]


@functools.cache
def rendered(name: str) -> list[Manifest]:
    """The documents of one of NAMES. Shared: only to be read."""
    folder, _, options = name.partition(" with ")
    if not options:
        return render(CHECKOUT / folder)
    with tempfile.TemporaryDirectory() as place:
        copy(Path(place))
        shutil.copytree(CHECKOUT / "argocd", Path(place, "argocd"))
        for file in offering(Path(place, folder)):
            file.write_text(with_options(file))
        return render(Path(place, folder))


def parts(folder: Path) -> set[Path]:
    """The files and folders that a kustomization is made of, or can be by its options, with all of theirs."""
    content: dict[str, Any] = yaml.safe_load(with_options(folder / "kustomization.yaml"))
    named = {(folder / part).resolve() for key in ("resources", "components") for part in content.get(key, [])}
    return named.union(*(parts(part) for part in named if part.is_dir()))
