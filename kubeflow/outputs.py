"""Writes what a run shows in KubeFlow: scores, report, adapter and verdict, from the artifacts on the volumes.

The step `adapter-results` runs this text in the image of the jobs (`python -c TEXT`), which has no kfp: KubeFlow's
launcher reads plain files. It passes where they go as JSON (kfp's ExecutorInput), and takes the metadata of artifacts
from a file of JSON (kfp's ExecutorOutput).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.core import artifacts, imported, promotion, settings
from jobs.core.command import run_command
from jobs.core.layout import MANIFEST
from jobs.core.pipeline import LoadedPipeline
from jobs.core.plan import FINE_TUNED_VOLUME, Plan
from jobs.evaluation import content, evaluate, report


def main(arguments: list[str]) -> None:
    """Write the outputs of a run.

    Raises:
        UserError: an artifact is missing or damaged.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--executor-input", type=json.loads, metavar="JSON", help="where kfp wants which output")
    parser.add_argument("--report", type=Path, metavar="FILE", help="where the report goes")
    parser.add_argument("--adapter", type=Path, metavar="FILE", help="where the adapter's manifest goes")
    parser.add_argument("--claim", metavar="NAME", help="the PersistentVolumeClaim that has the adapter")
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="KEY=VALUE")
    args = parser.parse_args(arguments)

    volumes = Path(os.environ["VOLUMES"])
    loaded = imported.load_any(Path(os.environ["PIPELINE"]), Path(os.environ["ENVIRONMENT_FILE"]),
                               changes=args.changes)
    _, wanted = evaluate.planned(loaded, volumes, wait_seconds=0)
    folder = artifacts.read(wanted.evaluation.path(volumes)).path
    evaluation = content.read_evaluation(folder)
    current = promotion.current(volumes / FINE_TUNED_VOLUME, loaded.pipeline.adapter)
    promoted = current is not None and current.adapter == wanted.adapter.digest

    copy(folder / "report.html", args.report)
    # Not its weights: they stay on the volume, and the manifest has the sha256 of each file.
    copy(wanted.adapter.path(volumes) / MANIFEST, args.adapter)
    outputs = args.executor_input["outputs"]
    metadata = {"adapter": model(evaluation, wanted, args.claim, promoted=promoted)} | {
        f"{role}_scores": scores(evaluation, role) for role in evaluation["scores"]}
    text = summary(evaluation, loaded.changed if isinstance(loaded, LoadedPipeline) else {})
    write(outputs["parameters"]["verdict"]["outputFile"], content.outcome(evaluation))
    write(outputs["parameters"]["summary"]["outputFile"], text)
    write(outputs["outputFile"], json.dumps({"artifacts": {
        name: {"artifacts": [{"name": each["name"], "uri": each["uri"], "metadata": metadata.get(name, {})}]}
        for name, of_name in outputs["artifacts"].items() for each in of_name["artifacts"]}}))
    print(text)


def scores(evaluation: content.Evaluation, role: str) -> dict[str, float]:
    """What was measured of a model. KubeFlow takes numbers only."""
    values = {key: content.value(evaluation, role, score) for key, score in content.all_scores(evaluation).items()}
    return {key: value for key, value in values.items() if value is not None and math.isfinite(value)}


def model(evaluation: content.Evaluation, wanted: Plan, claim: str, *, promoted: bool) -> dict[str, str]:
    """What identifies an adapter, and where it is."""
    return {"framework": "PEFT", "name": evaluation["adapter"]["name"], "digest": wanted.adapter.digest,
            "storage": f"pvc://{claim}/{wanted.adapter.kind}/{wanted.adapter.digest}",
            "base_model": f"{evaluation['base_model']['name']}@{wanted.base_model.digest}",
            "dataset": wanted.dataset.digest, "evaluation": wanted.evaluation.digest,
            "verdict": content.outcome(evaluation), "promoted": "yes" if promoted else "no"}


def summary(evaluation: content.Evaluation, changed: Mapping[str, Any]) -> str:
    """The verdict, with the rules that do not hold, and what to do next."""
    adapter = evaluation["adapter"]
    lines = [f"{adapter['name']}@{adapter['digest']} {content.verdict(evaluation)}", *report.unmet_rules(evaluation)]
    if changed:
        lines += ["This run took other values than the pipeline file, so it promotes nothing.",
                  *(["To promote the adapter, commit:"] if evaluation["passed"] else ["Its own values:"]),
                  *(f"  {line}" for line in settings.edit(changed).splitlines())]
    return "\n".join([*lines, *([step] if (step := content.next_step(evaluation)) else [])])


def copy(file: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, to)


def write(file: str, text: str) -> None:
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
