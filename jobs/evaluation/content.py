"""What a report contains, whatever its format: verdict, notes, samples of answers, provenance."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.core import search
from jobs.core.metrics import KNOWN, TASKS, Metric, Score, metric_of, score_of
from jobs.evaluation.gate import Check

Evaluation = Mapping[str, Any]  # the content of evaluation.json
History = Sequence[Mapping[str, float]]  # `history` of the adapter's training.json
Generations = Mapping[str, Sequence[Mapping[str, Any]]]  # each model's generations.jsonl, by role

ROLES = {"base": "base", "fine_tuned": "fine-tuned", "reference": "reference"}
SEARCHED = ("Training chose its settings among these trials, by the loss on the validation split. The held-out "
            "records, on which the scores and the gate are computed, had no part in it.")
EMBEDDED = "Embedded models: for trying out and testing only. They know nothing but a small grammar and your data."


@dataclass(frozen=True)
class Sample:
    """One held-out question, its reference answer, and what each model answered with the answer's ROUGE-L."""

    question: str
    reference: str
    answers: Mapping[str, tuple[str, float]]  # by role


def read_evaluation(folder: Path) -> dict[str, Any]:
    """The `evaluation.json` in an evaluation artifact's folder."""
    evaluation: dict[str, Any] = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    return evaluation


def scores(values: Mapping[str, Any]) -> dict[str, Score]:
    """The scores that one model's scores.json holds, by key."""
    return {key: score_of(key) for key in values if key in KNOWN or key.startswith(TASKS)}


def metrics(values: Mapping[str, Any]) -> list[Metric]:
    """The metrics of these scores."""
    return list(dict.fromkeys(map(metric_of, scores(values))))


def checks(evaluation: Evaluation) -> list[Check]:
    """The rules of the gate and whether they hold."""
    return [Check.from_json(values) for values in evaluation["gate"]]


def best(evaluation: Evaluation, score: Score) -> set[str]:
    """The roles with the best value of a score, as shown: two that read the same are both best. Where tokenizers
    differ, the reference model's score per token does not compete."""
    competing = [role for role in ROLES if not score.per_token or comparable(evaluation) or role != "reference"]
    shown = {role: float(score.shown(value).replace(",", "")) for role in competing
             if (value := evaluation["scores"][role][score.key]) is not None}
    top = (max if score.higher_is_better else min)(shown.values(), default=None)
    return {role for role, value in shown.items() if value == top}


def comparable(evaluation: Evaluation) -> bool:
    """Whether the reference model's perplexity is over the same tokens as the fine-tuned model's."""
    scores = evaluation["scores"]
    return bool(scores["reference"]["vocabulary"] == scores["fine_tuned"]["vocabulary"])


def verdict(evaluation: Evaluation) -> str:
    """The gate's outcome in a sentence."""
    found = checks(evaluation)
    rules = len(found)
    if evaluation["passed"]:
        return f"passed: {'the rule of the gate holds' if rules == 1 else f'all {rules} rules of the gate hold'}"
    failed, undecided = (sum(check.outcome == outcome for check in found) for outcome in ("failed", "undecided"))
    count, outcome = (failed, "not hold") if failed else (undecided, "not surely hold")
    return (f"{'rejected' if failed else 'undecided'}: {count} of {rules} rule{'s' * (rules > 1)} of the gate "
            f"do{'es' * (count == 1)} {outcome}")


def notes(evaluation: Evaluation) -> list[str]:
    """Notes that a reader needs to interpret the figures."""
    scores = evaluation["scores"]
    found = [EMBEDDED] if evaluation["embedded"] else []
    if not comparable(evaluation):
        found.append("The reference model has another tokenizer: its perplexity, which is per token, cannot be "
                     "compared with the others'. Bits per byte can.")
    for role, name in ROLES.items():
        if scores[role]["records_too_long"]:
            found.append(f"{scores[role]['records_too_long']} held-out records were too long for the {name} model and "
                         "are left out of its scores.")
        for task, counts in scores[role].get("tasks", {}).items():
            if counts["records_too_long"]:
                found.append(f"{counts['records_too_long']} prompts of the task {task} were too long for the {name} "
                             "model and are left out of its score.")
    left_out = scores["fine_tuned"].get("questions_left_out")
    if left_out:
        asked = scores["fine_tuned"]["questions"]
        found.append(f"Of {asked + left_out:,} held-out questions, {asked:,} were answered, the first by sha256 "
                     "(evaluation.answered_records). Perplexity is over all of them.")
    if scores["fine_tuned"]["questions"] == 0:
        found.append("The held-out records are plain text without questions, so there is no ROUGE.")
    return found


def samples(generations: Generations, count: int = 6, worst: int = 3) -> tuple[list[Sample], list[Sample]]:
    """Held-out questions with the three models' answers: `count` evenly spaced ones, and of the others the `worst` on
    which the fine-tuned model did worst (none that it got fully right)."""
    by_role = {role: {(line["question"], line["reference"]): (line["answer"], line["rougeL"])
                      for line in generations[role]} for role in ROLES}
    everything = [Sample(*key, {role: lines[key] for role, lines in by_role.items() if key in lines})
                  for key in by_role["fine_tuned"]]
    step = max(1.0, (len(everything) - 1) / max(1, count - 1))
    places = sorted({round(i * step) for i in range(count)} & set(range(len(everything))))
    rest = [sample for place, sample in enumerate(everything) if place not in places]
    rest.sort(key=lambda sample: sample.answers["fine_tuned"][1])
    return ([everything[place] for place in places],
            [sample for sample in rest[:worst] if sample.answers["fine_tuned"][1] < 0.995])


def held_out_losses(history: History) -> list[tuple[str, Mapping[str, float], float]]:
    """The loss on what was held out from training, as (name, entry, loss): of the validation split if there was one."""
    return [(name, entry, entry[f"{name}_loss"]) for name in ("validation", "holdout") for entry in history
            if f"{name}_loss" in entry]


def provenance(evaluation: Evaluation) -> list[tuple[str, str]]:
    """The provenance of the figures, as (name, value): digests, pins, hyperparameters, sizes."""
    training, scores = evaluation["training"], evaluation["scores"]
    lora, tuned = training["lora"], scores["fine_tuned"]
    modules = lora["target_modules"] if isinstance(lora["target_modules"], str) else ", ".join(lora["target_modules"])
    return [
        ("adapter", f"{evaluation['adapter']['name']}@{evaluation['adapter']['digest']}"),
        *((key.rpartition(".")[2].replace("_", " "), f"{source['source']} ({source['pin']})")
          for key, source in evaluation["sources"].items()),
        ("artifacts", f"dataset/{evaluation['dataset']['digest']}, base-model/{evaluation['base_model']['digest']}, "
                      f"reference-model/{evaluation['reference_model']['digest']}"),
        ("LoRA", f"r {lora['r']}, alpha {lora['alpha']:g}, dropout {lora['dropout']:g}, {modules}"),
        ("training", f"{training['epochs']} epochs, learning rate {training['learning_rate']:g}, at most "
                     f"{training['max_length']} tokens a record and {training['tokens_per_batch']} a batch, seed "
                     f"{training['seed']}"),
        *([("settings", f"{search.description(evaluation['search']['settings'])}: chosen among "
                        f"{len(evaluation['search']['trials'])} trials by the loss on the validation split")]
          if "search" in evaluation else []),
        ("measured on", f"{tuned['records']} held-out records ({tuned['completion_tokens']} tokens of answers), "
                        f"{tuned['questions']} questions, {tuned['sentences']} judged sentences"),
    ]
