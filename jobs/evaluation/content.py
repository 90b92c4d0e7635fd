"""What a report contains, whatever its format: verdict, rules, scores with their intervals, notes and provenance. What
it says of single records is in report_records.py."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.core import search
from jobs.core.metrics import SCORES, Metric, Score, metric_of, score_of
from jobs.evaluation.gate import Check

Evaluation = Mapping[str, Any]  # the content of evaluation.json
History = Sequence[Mapping[str, float]]  # `history` of the adapter's training.json

ROLES = {"base": "base", "fine_tuned": "fine-tuned", "reference": "reference", "promoted": "promoted"}
MARKS = {"passed": "✓", "failed": "✗", "undecided": "?"}  # of outcomes, for readers who see no colours too
OUTCOMES = {"passed": "passes", "failed": "fails", "undecided": "undecided"}
SEARCHED = ("Training chose its settings among these trials, by the loss on the validation split. The held-out "
            "records, on which the scores and the gate are computed, had no part in it.")
EMBEDDED = "Embedded models: for trying out and testing only. They know nothing but a small grammar and your data."
NO_ANSWERS = ("Questions and answers are left out of this report. Records are named by their line in holdout.jsonl of "
              "the dataset.")


def read_evaluation(folder: Path) -> dict[str, Any]:
    """The `evaluation.json` in an evaluation artifact's folder."""
    evaluation: dict[str, Any] = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    return evaluation


# --- scores ---------------------------------------------------------------------------------------------------------


def scores(values: Iterable[str]) -> dict[str, Score]:
    """The scores among the keys of a scores.json, by key: first those of every pipeline, in the registry's order."""
    keys = list(values)
    found = {}
    for key in [*(key for key in SCORES if key in keys), *(key for key in keys if key not in SCORES)]:
        try:
            found[key] = score_of(key)
        except KeyError:  # a count or a name
            continue
    return found


def all_scores(evaluation: Evaluation) -> dict[str, Score]:
    """The scores of every pipeline, and the others that any of the models has, by key."""
    return scores(dict.fromkeys(key for values in evaluation["scores"].values() for key, value in values.items()
                                if key in SCORES or value is not None))


def metrics(evaluation: Evaluation) -> dict[Metric, list[Score]]:
    """The metrics that were measured, each with its scores."""
    found: dict[Metric, list[Score]] = {}
    for key, score in all_scores(evaluation).items():
        found.setdefault(metric_of(key), []).append(score)
    return found


def roles(evaluation: Evaluation) -> dict[str, str]:
    """The models that were measured: the role and its name."""
    return {role: name for role, name in ROLES.items() if role in evaluation["scores"]}


def value(evaluation: Evaluation, role: str, score: Score) -> float | None:
    """A model's score; None where it was not measured."""
    found: float | None = evaluation["scores"][role].get(score.key)
    return found


def bounds(evaluation: Evaluation, role: str, score: Score) -> tuple[float | None, float | None]:
    """The lower and the upper bound of a model's score; None where there is none."""
    low, high = evaluation.get("intervals", {}).get(role, {}).get(score.key) or (None, None)
    return low, high


def interval_text(evaluation: Evaluation, role: str, score: Score) -> str:
    """The bounds as people read them, e.g. `[1.23, 1.31]`: with as many digits as keep them apart from each other."""
    low, high = bounds(evaluation, role, score)
    if low is None and high is None:
        return ""
    for digits in range(2, 6):
        texts = [_shown(end, score, digits) for end in (low, high)]
        if texts[0] != texts[1]:
            break
    return f"[{texts[0]}, {texts[1]}]"


def _shown(end: float | None, score: Score, digits: int) -> str:
    if end is None:
        return "–"
    if abs(end) >= 100:
        return f"{end:,.0f}"
    return f"{end:.{digits + 1}g}" if score.significant_digits else f"{end:.{digits}f}"


def best(evaluation: Evaluation, score: Score) -> set[str]:
    """The roles with the best value of a score, as shown: two that read the same are both best. By a score per token,
    models with other tokens than the fine-tuned one's do not compete."""
    competing = set(roles(evaluation)) - (other_tokens(evaluation) if score.per_token else set())
    shown = {role: float(score.shown(found).replace(",", "")) for role in competing
             if (found := value(evaluation, role, score)) is not None}
    if len(shown) < 2:
        return set()
    top = (max if score.higher_is_better else min)(shown.values())
    return {role for role, found in shown.items() if found == top}


def other_tokens(evaluation: Evaluation) -> set[str]:
    """The roles whose tokenizer is another than the fine-tuned model's: their perplexity is over other tokens."""
    scores = evaluation["scores"]
    return {role for role in roles(evaluation) if scores[role]["vocabulary"] != scores["fine_tuned"]["vocabulary"]}


# --- the gate -------------------------------------------------------------------------------------------------------


def checks(evaluation: Evaluation) -> list[Check]:
    """The rules of the gate and whether they hold."""
    return [Check.from_json(values) for values in evaluation["gate"]]


def outcome(evaluation: Evaluation) -> str:
    """`passed`, `rejected` or `undecided`."""
    return "rejected" if evaluation["outcome"] == "failed" else str(evaluation["outcome"])


def verdict(evaluation: Evaluation) -> str:
    """The gate's outcome in a sentence."""
    found = checks(evaluation)
    rules = f"{len(found)} rule{'s' * (len(found) > 1)} of the gate"
    failed, undecided = (sum(check.outcome == name for check in found) for name in ("failed", "undecided"))
    if failed:
        also = f", {undecided} {'is' if undecided == 1 else 'are'} undecided" if undecided else ""
        return f"rejected: {failed} of {rules} do{'es' * (failed == 1)} not hold{also}"
    if undecided:
        return f"undecided: the data cannot decide {undecided} of {rules}"
    return f"passed: {'the rule of the gate holds' if len(found) == 1 else f'all {rules} hold'}"


def next_step(evaluation: Evaluation) -> str:
    """What to do about a verdict; nothing where the adapter passed."""
    found = checks(evaluation)
    if outcome(evaluation) == "passed":
        return ""
    if outcome(evaluation) == "rejected":
        return "Train otherwise, bring other data, or change evaluation.gate in the pipeline file."
    more = dict.fromkeys(_evidence(check.metric) for check in found if check.outcome == "undecided")
    return (f"The evidence is too little to tell. Bring more {' and '.join(more)}, or demand less in evaluation.gate "
            "of the pipeline file.")


def rule(check: Check) -> str:
    """What a rule demands, with the key by which the pipeline file has it."""
    return f"{check.metric}: {check.expression} must be {check.requirement}"


def finding(check: Check) -> str:
    """What was found of a rule: the value and the bound that decided, or why there is none."""
    if check.reason:
        return check.reason
    if check.value is None:
        return "not a finite number"
    sure = f"with {check.confidence * 100:g} % confidence"
    bound = f"{check.value_text}, {f'no bound {sure}' if check.decisive is None else f'{check.known_text} {sure}'}"
    if check.outcome != "undecided":
        return bound
    if not check.more_records:
        return f"{bound}: undecided"
    return f"{bound}; {check.more_text} would decide it"


def _evidence(key: str) -> str:
    """What to bring more of for a score, and where."""
    population = metric_of(key).population
    if population == "records":
        return "held-out records (dataset.holdout)"
    if population == "sentences":
        return "sentences (evaluation.acceptability)"
    group, _, name = key.partition(".")
    return f"records of the task {name}" if group == "tasks" else f"records and canaries (evaluation.{group})"


# --- what a reader must know ----------------------------------------------------------------------------------------


def notes(evaluation: Evaluation) -> list[str]:
    """Notes that a reader needs to interpret the figures."""
    scores = evaluation["scores"]
    found = [EMBEDDED] if evaluation["embedded"] else []
    for role, name in roles(evaluation).items():
        if role in other_tokens(evaluation):
            found.append(f"The {name} model has another tokenizer: its perplexity, which is per token, cannot be "
                         "compared with the others'. Bits per byte can.")
        if scores[role]["records_too_long"]:
            found.append(f"{scores[role]['records_too_long']} held-out records were too long for the {name} model and "
                         "are left out of its scores.")
        for task, counts in scores[role].get("tasks", {}).items():
            if counts["records_too_long"]:
                found.append(f"{counts['records_too_long']} prompts of the task {task} were too long for the {name} "
                             "model and are left out of its score.")
    left_out = scores["fine_tuned"].get("questions_left_out")
    if left_out:
        answered = scores["fine_tuned"]["questions"]
        found.append(f"Of {answered + left_out:,} held-out questions, {answered:,} were answered, the first by sha256 "
                     "(evaluation.answered_records). Perplexity is over all of them.")
    if scores["fine_tuned"]["questions"] == 0:
        found.append("The held-out records are plain text without questions, so there is no ROUGE.")
    return found


def bounds_meaning(evaluation: Evaluation) -> str:
    """What the ends of an interval mean."""
    return (f"Each end of an interval is a bound by itself: with {evaluation['confidence'] * 100:g} % confidence the "
            "true value is not below the lower one, and with the same confidence not above the upper one.")


def privacy_tables(evaluation: Evaluation) -> list[tuple[str, list[list[str]]]]:
    """What was found of single records, such as the canaries that are known best: titles and tables with a header. Of
    each record its position and numbers: never a text."""
    tables = []
    for key, found in (evaluation.get("privacy") or {}).items():
        entries = [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
        columns = list(dict.fromkeys(name for entry in entries for name, value in entry.items()
                                     if isinstance(value, int | float)))
        if columns:
            tables.append((f"Privacy: {_words(key)}", [[_words(name) for name in columns], *(
                [_number(entry.get(name)) for name in columns] for entry in entries)]))
    return tables


def _words(key: str) -> str:
    return key.replace("_", " ")


def _number(value: Any) -> str:
    return "–" if not isinstance(value, int | float) else f"{value:.4g}" if isinstance(value, float) else str(value)


def held_out_losses(history: History) -> list[tuple[str, Mapping[str, float], float]]:
    """The loss on what was held out from training, as (name, entry, loss): of the validation split if there was one."""
    return [(name, entry, entry[f"{name}_loss"]) for name in ("validation", "holdout") for entry in history
            if f"{name}_loss" in entry]


def provenance(evaluation: Evaluation) -> list[tuple[str, str]]:
    """The provenance of the figures, as (name, value): digests, pins, hyperparameters, sizes."""
    scores = evaluation["scores"]
    tuned = scores["fine_tuned"]
    return [
        ("adapter", f"{evaluation['adapter']['name']}@{evaluation['adapter']['digest']}"),
        *((key.rpartition(".")[2].replace("_", " "), f"{source['source']} ({source['pin']})")
          for key, source in evaluation["sources"].items()),
        ("artifacts", f"dataset/{evaluation['dataset']['digest']}, base-model/{evaluation['base_model']['digest']}, "
                      f"reference-model/{evaluation['reference_model']['digest']}"),
        *(_training(evaluation["training"]) if "training" in evaluation else
          [("training", "in another environment: the model card (README.md) of the adapter describes it")]),
        *([("settings", f"{search.description(evaluation['search']['settings'])}: chosen among "
                        f"{len(evaluation['search']['trials'])} trials by the loss on the validation split")]
          if "search" in evaluation else []),
        ("measured on", f"{tuned['records']} held-out records ({tuned['completion_tokens']} tokens of answers), "
                        f"{tuned['questions']} questions, {tuned['sentences']} judged sentences"),
        *([("privacy", ", ".join(f"{count} {kind}" for kind, count in counts.items()))]
          if (counts := evaluation.get("privacy", {}).get("counts")) else []),
        *([("compared with", _promoted(evaluation))] if "promoted" in scores else []),
        ("confidence", _confidence(evaluation)),
    ]


def _training(training: Mapping[str, Any]) -> list[tuple[str, str]]:
    lora = training["lora"]
    modules = lora["target_modules"] if isinstance(lora["target_modules"], str) else ", ".join(lora["target_modules"])
    return [("LoRA", f"r {lora['r']}, alpha {lora['alpha']:g}, dropout {lora['dropout']:g}, {modules}"),
            ("training", f"{training['epochs']} epochs, learning rate {training['learning_rate']:g}, at most "
                         f"{training['max_length']} tokens a record and {training['tokens_per_batch']} a batch, seed "
                         f"{training['seed']}")]


def _promoted(evaluation: Evaluation) -> str:
    base = evaluation.get("promoted", {}).get("base_model", evaluation["base_model"]["digest"])
    other = "" if base == evaluation["base_model"]["digest"] else f", trained on base-model/{base}"
    return f"{evaluation['scores']['promoted']['model']}, which was promoted then{other}"


def _confidence(evaluation: Evaluation) -> str:
    text = f"{evaluation['confidence'] * 100:g} % for each bound by itself"
    drawn = evaluation.get("resampling")
    if drawn is None:
        return text
    cluster = "one `group`, or the same answer" if drawn["by"] == "answer" else "one `group`"
    return (f"{text}, from {drawn['resamples']:,} resamples (seed {drawn['seed']}) of {drawn['clusters']} clusters of "
            f"held-out records; a cluster is the records of {cluster}")
