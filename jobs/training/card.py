"""The adapter's files for people and for byte equality: configuration, loss history and model card."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jobs.core.pipeline import Pipeline
from jobs.core.search import FILE as SEARCH
from jobs.core.search import description
from jobs.data.encoded import Splits


def finish_adapter(folder: Path, pipeline: Pipeline, splits: Splits, history: list[dict[str, float]],
                   target_modules: list[str], dataset: str, search: Mapping[str, Any] | None = None) -> None:
    """Make what PEFT saved reproducible to the byte and self-explaining: config, loss history, model card.

    Args:
        search: the record of the search that chose settings, if there was one.
    """
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    # PEFT records the folder the base model was loaded from (a mount path) and a set in random order.
    base = pipeline.environment.base_model
    config |= {"base_model_name_or_path": base.name, "revision": base.revision,
               "target_modules": target_modules}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    steps = int(max(entry["step"] for entry in history))
    (folder / "training.json").write_text(json.dumps({
        "steps": steps, "records": {"train": len(splits.train) - splits.canaries, "holdout": len(splits.holdout),
                                    "too_long": splits.too_long}, "history": history}, indent=1) + "\n")
    if search:
        (folder / SEARCH).write_text(json.dumps(search, indent=1) + "\n")
    (folder / "README.md").write_text(model_card(pipeline, splits, history, target_modules, dataset, search),
                                      encoding="utf-8")


def model_card(pipeline: Pipeline, splits: Splits, history: list[dict[str, float]], target_modules: list[str],
               dataset: str, search: Mapping[str, Any] | None = None) -> str:
    """The model card: what this adapter is, what it was made from, and how well it fit."""
    training, base = pipeline.training, pipeline.environment.base_model
    last: Callable[[str], float] = lambda key: [e[key] for e in history if key in e][-1]  # noqa: E731
    rows = {"base model": f"{base.name} ({base.pin})", "dataset": f"{dataset} ({pipeline.dataset.pin})",
            "records": f"{len(splits.train) - splits.canaries} train, {len(splits.holdout)} held out, "
                       f"{splits.too_long} too long",
            **({"canaries": f"{splits.canaries}, trained on with the records"} if splits.canaries else {}),
            "LoRA": f"r {training.lora.r}, alpha {training.lora.alpha:g}, dropout {training.lora.dropout:g}",
            "target modules": ", ".join(target_modules),
            **({} if training.objective == "sft" else
               {"objective": f"{training.objective}, beta {training.strength:g}"}),
            "training": f"{training.epochs} epochs, learning rate {training.learning_rate:g} (cosine), at most "
                        f"{training.tokens_per_batch} tokens a batch and {training.max_length} a record, "
                        f"seed {training.seed}",
            **({"chosen by search": f"{description(search['settings'])}, among {len(search['trials'])} trials by the "
                                    "loss on the validation split"} if search else {}),
            "loss on the train split, last step": f"{last('loss'):.4f}",
            **{f"loss on the {name} split": f"{last(f'{name}_loss'):.4f}" for name in ("validation", "holdout")
               if any(f"{name}_loss" in entry for entry in history)}}
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return (f"---\nlibrary_name: peft\nbase_model: {base.name}\ntags: [lora]\n---\n# {pipeline.adapter}\n\n"
            f"A LoRA adapter on {base.name}. What it was measured to do stands in the evaluation artifact that names "
            f"its digest.\n\n| | |\n|---|---|\n{table}\n")
