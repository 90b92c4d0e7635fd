"""Validate an overlay with no network and no cluster: what a pre-commit hook or CI runs before a push.

Checks the pipeline file, that every source is pinned, that data in git matches its pin and that every record of
it is valid, that vLLM can serve the base model's architecture in the desired mode, that the overlay's ConfigMap fits,
and that every patch of its kustomization has an effect.
"""

from __future__ import annotations

import logging
from pathlib import Path

from jobs.core import models, pipeline
from jobs.core.errors import UserError
from jobs.core.pipeline import Loaded, Source
from jobs.core.strict_yaml import CONFIG_MAP_BYTES

log = logging.getLogger("jobs")


def run(overlay: Path) -> None:
    """Check the overlay.

    Raises:
        UserError: with every problem that was found, a line each.
    """
    loaded = pipeline.load(overlay)
    problems: list[str] = []
    for check in (check_data, check_architecture, check_size, check_kustomization):
        try:
            check(loaded)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    log.info("%s: valid", loaded.path)


def check_data(loaded: Loaded) -> None:
    """The data that lies beside the pipeline file: pinned content, and records that a relocation would take."""
    from jobs.data import split

    for name, source in data_in_git(loaded).items():
        require_pin(loaded, name, source)
    source = loaded.pipeline.dataset
    if source.scheme == "file":
        split.validate(loaded.resolve(source), source.holdout)


def data_in_git(loaded: Loaded) -> dict[str, Source]:
    """The data that lies beside the pipeline file, by key: records, and sentences with judgements."""
    named = {"dataset": loaded.pipeline.dataset, "evaluation.acceptability": loaded.pipeline.evaluation.acceptability}
    return {name: source for name, source in named.items() if source.scheme == "file"}


def require_pin(loaded: Loaded, name: str, source: Source) -> None:
    """The `file:` source at key `name` must exist and match its pin."""
    from jobs.relocation.sources import file

    path = loaded.resolve(source)
    if not path.exists():
        raise UserError(f"{loaded.path}: {name}: {path} does not exist")
    found = file.path_sha256(path)
    if found != source.sha256:
        raise UserError(f"{path}: has sha256 {found}, but {loaded.path} pins {name} at {source.sha256}. If the change "
                        f"is meant, run: python -m jobs pin {loaded.path.parent}")


def check_architecture(loaded: Loaded) -> None:
    """vLLM can serve an adapter of the base model in the desired mode, by the architecture in its file or folder."""
    from jobs.relocation import embedded

    base = loaded.pipeline.base_model
    where = f"{loaded.path}: base_model"
    if base.scheme == "builtin":
        architecture: str | None = embedded.ARCHITECTURE
    elif base.scheme == "file" and loaded.resolve(base).is_dir():
        architecture = models.architecture(loaded.resolve(base))
    else:
        architecture = base.architecture
    if architecture is None:
        log.warning("%s: its architecture is not recorded, so `check` cannot tell whether vLLM can serve it; "
                    "relocation does. Record it with: python -m jobs pin %s --update", where, loaded.path.parent)
        return
    models.check_target_modules(architecture, loaded.pipeline.training.lora.target_modules, where,
                                loaded.pipeline.serving.mode)


def check_size(loaded: Loaded) -> None:
    """Pipeline file and data in git fit into the ConfigMap that carries them into the cluster."""
    data = [loaded.resolve(source) for source in data_in_git(loaded).values()]
    files = [loaded.path, *(path for path in data if path.is_file())]
    total = sum(file.stat().st_size for file in files)
    if total > CONFIG_MAP_BYTES:
        raise UserError(f"{loaded.path}: the pipeline file and the data beside it have {total} bytes in total, and "
                        f"a ConfigMap holds {CONFIG_MAP_BYTES}. Put the data where a URL reaches it (https://, s3://, hf://)")


def check_kustomization(loaded: Loaded) -> None:
    """The overlay renders, every patch of it has an effect, and its Jobs can be changed."""
    from jobs.tools import kustomization

    kustomization.check(loaded.path.parent)
