"""Export: a promoted adapter as a folder that transformers with PEFT and plain vLLM load, with model card and SBOM."""

from __future__ import annotations

import argparse
import json
import logging
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.core import artifacts, imported, promotion
from jobs.core.artifacts import Artifact
from jobs.core.environment import SERVABLE_RANKS
from jobs.core.errors import UserError
from jobs.core.files import write_atomically
from jobs.core.imported import ImportedAdapter
from jobs.core.plan import FINE_TUNED_VOLUME, plan
from jobs.core.published import EVALUATION
from jobs.publication import bom, layout

log = logging.getLogger("jobs")

DESCRIPTION = """\
Copy a promoted adapter into a folder that transformers with PEFT and plain vLLM load, with a model card, a bill of
materials (CycloneDX), and the report without questions and answers.

  python -m jobs export seville-hotels --volumes .local/kind/volumes --output seville-hotels
  python -m jobs export overlays/kind/adapters/seville-hotels --volumes .local/kind/volumes --output seville-hotels

By its folder in git, the adapter is exported that its pipeline.yaml desires; it must be the promoted one.
"""
BILL = "bom.cdx.json"
CARD = "README.md"
CONFIG = "adapter_config.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("adapter", metavar="ADAPTER", help="the adapter's name, or its folder, OVERLAY/adapters/NAME")
    parser.add_argument("--volumes", type=Path, required=True, metavar="DIR", dest="export_volumes",
                        help="a folder with a folder for each volume (/volumes, or .local/NAME/volumes)")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="a folder that does not exist yet")


def run(target: str, volumes: Path, output: Path) -> None:
    """Export an adapter.

    Args:
        target: its name, or its folder in an overlay.
    Raises:
        UserError: it is not promoted, an artifact is damaged, or the output is there already.
    """
    if output.exists() or output.is_symlink():
        raise UserError(f"--output {output}: exists, and nothing is overwritten. Name another folder, or remove it")
    volume = fine_tuned_volume(volumes)
    name, desired, keys = _desired(target)
    promoted = promotion.current(volume, name)
    if promoted is None:
        raise UserError(f"{name}: no adapter is promoted under this name in {volume}, and no other is exported")
    if desired and promoted.adapter != desired:
        raise UserError(f"{target}: desires {name}@{desired}, but {name}@{promoted.adapter} is promoted. To export "
                        f"that one: python -m jobs export {name}")
    adapter = artifacts.read(volume / "adapter" / promoted.adapter, keys)
    evaluation = artifacts.read(volume / "evaluation" / promoted.evaluation, keys)
    draft = output.with_name(f".{output.name}.{secrets.token_hex(8)}")
    try:
        draft.mkdir(parents=True)
        write(draft, name, adapter, evaluation, json.loads((evaluation.path / layout.EVALUATED).read_bytes()))
        draft.rename(output)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written: {error.strerror}") from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{evaluation.path}: was made by an earlier version, or is not complete ({error!r}). Evaluate "
                        "the adapter again, then export it") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    log.info("exported %s@%s to %s: %s tells how to load it", name, adapter.digest, output, output / CARD)


def fine_tuned_volume(volumes: Path) -> Path:
    """The volume with the adapters: X, as a cluster mounts it, or X-pvc, as `jobs local` keeps it.

    Raises:
        UserError: neither is there.
    """
    for folder in (volumes / f"{FINE_TUNED_VOLUME}-pvc", volumes / FINE_TUNED_VOLUME):
        if folder.is_dir():
            return folder
    raise UserError(f"--volumes {volumes}: has no folder {FINE_TUNED_VOLUME}, nor {FINE_TUNED_VOLUME}-pvc")


def _desired(target: str) -> tuple[str, str | None, Sequence[str]]:
    """The adapter's name, the digest that git desires, if a folder in git is named, and the keys that it trusts."""
    if "/" not in target and not Path(target).exists():
        return target, None, ()
    loaded = imported.load_any(Path(target)).pipeline
    # Which adapter an imported one is, only the volume says.
    desired = None if isinstance(loaded, ImportedAdapter) else plan(loaded).adapter.digest
    return loaded.adapter, desired, loaded.environment.trusted_keys


def write(folder: Path, name: str, adapter: Artifact, evaluation: Artifact, verdict: Mapping[str, Any]) -> None:
    """Fill a folder with the export."""
    for file in adapter.manifest["files"]:
        if file["path"] != CARD:
            (folder / file["path"]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(adapter.path / file["path"], folder / file["path"])
    reports = {Path(file["path"]).name: file["path"] for file in evaluation.manifest["files"]
               if layout.is_public(file["path"], evaluation)}
    (folder / EVALUATION).mkdir()
    for file_name, path in reports.items():
        shutil.copyfile(evaluation.path / path, folder / EVALUATION / file_name)
    write_atomically(folder / CARD, card(name, adapter, evaluation, verdict))
    bill = bom.bill(name, adapter, evaluation, verdict)
    write_atomically(folder / BILL, json.dumps(bill, indent=2, ensure_ascii=False) + "\n")


def card(name: str, adapter: Artifact, evaluation: Artifact, verdict: Mapping[str, Any]) -> str:
    """The model card: that of the training, and then how to load the adapter, what it was measured to do, and where it
    comes from."""
    written = adapter.path / CARD
    lines = [written.read_text(encoding="utf-8").rstrip() if written.exists() else f"# {name}", "", "## Use", "",
             *_use(name, adapter, verdict), "", "## Evaluation", "",
             f"{verdict['outcome'][0].upper()}{verdict['outcome'][1:]}, on held-out records. `{EVALUATION}/` has the "
             "report."]
    if verdict["gate"]:
        lines += ["", "| rule | outcome |", "|---|---|"]
        lines += [f"| {check['description']} | {check['outcome']} |" for check in verdict["gate"]]
    lines += ["", "## Provenance", "", f"Adapter {adapter.digest}, evaluation {evaluation.digest}. `{BILL}` is a bill "
              "of materials in the format of CycloneDX: base model, data and libraries, by digest or version."]
    return "\n".join(lines) + "\n"


def _use(name: str, adapter: Artifact, verdict: Mapping[str, Any]) -> list[str]:
    """How to load the adapter, as lines of Markdown."""
    base, source = verdict["base_model"]["name"], verdict.get("sources", {}).get("base_model", {})
    on_hub, pin = str(source.get("source", "")).startswith("hf://"), source.get("pin", "unknown")
    load = f'"{base}", revision="{pin}"' if on_hub else '"BASE"'
    serve = f"{base} --revision {pin}" if on_hub else "BASE"
    template = adapter.manifest["spec"].get("chat_template")
    rank = json.loads((adapter.path / CONFIG).read_bytes()).get("r")
    served = next((each for each in SERVABLE_RANKS if isinstance(rank, int) and each >= rank), SERVABLE_RANKS[-1])
    lines = ["FOLDER is the folder of this file."] if on_hub else [
        f"FOLDER is the folder of this file, and BASE that of the base model: {base} ({pin}), no other."]
    lines += ["", "```python", "from peft import PeftModel", "from transformers import AutoModelForCausalLM", "",
              f"base = AutoModelForCausalLM.from_pretrained({load})",
              'model = PeftModel.from_pretrained(base, "FOLDER")', "```", "", "```sh",
              f"vllm serve {serve} --enable-lora --max-lora-rank {served} --lora-modules {name}=FOLDER"]
    if template:
        lines[-1] += " \\"
        lines += [f"  --default-chat-template-kwargs '{json.dumps(template)}'", "```", "",
                  "It was trained and measured with these arguments of the chat template."]
        return lines
    return [*lines, "```"]
