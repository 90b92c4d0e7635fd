"""The evaluation as people read it: a table for terminals, report.md, and report.html (report_html.py)."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Evaluation = Mapping[str, Any]  # what stands in evaluation.json
History = Sequence[Mapping[str, float]]  # `history` of the adapter's training.json
Generations = Mapping[str, Sequence[Mapping[str, Any]]]  # each model's generations.jsonl, by role

ROLES = {"base": "base", "fine_tuned": "fine-tuned", "reference": "reference"}
EMBEDDED = "Embedded models: for trying out and testing only. They know nothing but a small grammar and your data."


@dataclass(frozen=True)
class Metric:
    """How a score is named and read."""

    key: str
    label: str
    higher_is_better: bool
    scale: str  # what its values mean

    @property
    def better(self) -> str:
        return "higher" if self.higher_is_better else "lower"

    @property
    def arrow(self) -> str:
        return "↑" if self.higher_is_better else "↓"


METRICS = (
    Metric("perplexity", "perplexity", False, "1 is no surprise at all"),
    Metric("bits_per_byte", "bits per byte", False, "the same, whatever the tokenizer"),
    Metric("rouge1", "ROUGE-1", True, "words shared, 0 to 1"),
    Metric("rouge2", "ROUGE-2", True, "word pairs shared, 0 to 1"),
    Metric("rougeL", "ROUGE-L", True, "longest common sequence, 0 to 1"),
    Metric("rougeLsum", "ROUGE-Lsum", True, "the same, line by line, 0 to 1"),
    Metric("acceptability_mcc", "acceptability, MCC", True, "1 is perfect, 0 is chance"),
    Metric("acceptability_accuracy", "acceptability, accuracy", True, "share judged right"),
)
METHODS = {
    "Perplexity": "exp of the mean negative log-likelihood of the held-out answers' tokens, given their questions. "
                  "Bits per byte divides the same total by the answers' bytes.",
    "ROUGE": "greedy answers to the held-out questions against the reference answers; mean F1, stemmed (Lin 2004).",
    "Acceptability": "each sentence's mean token log-probability (Lau et al. 2017); the threshold between acceptable "
                     "and not is chosen on one half of the sentences, Matthews correlation and accuracy are measured "
                     "on the other (CoLA: Warstadt et al. 2019). It guards against forgetting the language.",
}


@dataclass(frozen=True)
class Sample:
    """One held-out question, its reference answer, and what each model answered with the answer's ROUGE-L."""

    question: str
    reference: str
    answers: Mapping[str, tuple[str, float]]  # by role


def write(folder: Path, evaluation: Evaluation, history: History, generations: Generations) -> None:
    """Write report.md and report.html into `folder`."""
    from jobs.evaluation import report_html

    (folder / "report.md").write_text(markdown(evaluation, history, generations), encoding="utf-8")
    (folder / "report.html").write_text(report_html.page(evaluation, history, generations), encoding="utf-8")


def number(metric: str, value: float | None) -> str:
    """A score as people read it: 812.4, 3.127, 0.912; a dash when it was not measured."""
    if value is None:
        return "–"
    if metric != "perplexity":
        return f"{value:.3f}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def best(evaluation: Evaluation, metric: Metric) -> set[str]:
    """The roles with the best value of a metric, as shown: two that read the same are both best. A perplexity over
    another tokenizer does not compete."""
    competing = [role for role in ROLES if metric.key != "perplexity" or comparable(evaluation) or role != "reference"]
    shown = {role: float(number(metric.key, value).replace(",", "")) for role in competing
             if (value := evaluation["scores"][role][metric.key]) is not None}
    top = (max if metric.higher_is_better else min)(shown.values(), default=None)
    return {role for role, value in shown.items() if value == top}


def comparable(evaluation: Evaluation) -> bool:
    """Whether the reference model's perplexity is over the same tokens as the fine-tuned model's."""
    scores = evaluation["scores"]
    return bool(scores["reference"]["vocabulary"] == scores["fine_tuned"]["vocabulary"])


def verdict(evaluation: Evaluation) -> str:
    """The gate's outcome in a sentence."""
    rules, failed = len(evaluation["gate"]), sum(not rule["passed"] for rule in evaluation["gate"])
    if evaluation["passed"]:
        return f"passed: {'the rule of the gate holds' if rules == 1 else f'all {rules} rules of the gate hold'}"
    verb = "do" if failed > 1 else "does"
    return f"rejected: {failed} of {rules} rule{'s' * (rules > 1)} of the gate {verb} not hold"


def notes(evaluation: Evaluation) -> list[str]:
    """What a reader must know to read the numbers right."""
    scores = evaluation["scores"]
    said = [EMBEDDED] if evaluation["embedded"] else []
    if not comparable(evaluation):
        said.append("The reference model has another tokenizer: its perplexity, which is per token, cannot be compared "
                    "with the others'. Bits per byte can.")
    for role, name in ROLES.items():
        if scores[role]["records_too_long"]:
            said.append(f"{scores[role]['records_too_long']} held-out records were too long for the {name} model and "
                        "are left out of its scores.")
    if scores["fine_tuned"]["questions"] == 0:
        said.append("The held-out records are plain text and ask no questions, so there is no ROUGE.")
    return said


def table(evaluation: Evaluation) -> str:
    """The evaluation as plain text for a terminal: scores of the three models, and each rule of the gate."""
    adapter, scores = evaluation["adapter"], evaluation["scores"]
    rows = [["", *ROLES.values(), "better"]]
    rows += [[m.label, *(number(m.key, scores[role][m.key]) for role in ROLES), m.better] for m in METRICS]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in
                                                   zip(row[1:], widths[1:], strict=True))]) for row in rows]
    rule = "─" * len(lines[0])
    return "\n".join([
        f"{adapter['name']}@{adapter['digest']} on {scores['fine_tuned']['records']} held-out records",
        rule, lines[0], rule, *lines[1:], rule, verdict(evaluation),
        *(f"  {'✓' if check['passed'] else '✗'} {check['says']}" for check in evaluation["gate"]),
        *notes(evaluation)])


def samples(generations: Generations, count: int = 6, worst: int = 3) -> tuple[list[Sample], list[Sample]]:
    """Held-out questions with the three models' answers: `count` evenly spaced ones, picked by nobody, and of the
    others the `worst` on which the fine-tuned model did worst (none that it got fully right)."""
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


def provenance(evaluation: Evaluation) -> list[tuple[str, str]]:
    """Everything that the numbers rest on, as (name, value): digests, pins, hyperparameters, sizes."""
    training, scores = evaluation["training"], evaluation["scores"]
    lora, tuned = training["lora"], scores["fine_tuned"]
    modules = lora["target_modules"] if isinstance(lora["target_modules"], str) else ", ".join(lora["target_modules"])
    return [
        ("adapter", f"{evaluation['adapter']['name']}@{evaluation['adapter']['digest']}"),
        *((key.replace("_", " "), f"{source['source']} ({source['pin']})")
          for key, source in evaluation["sources"].items()),
        ("artifacts", f"dataset/{evaluation['dataset']['digest']}, base-model/{evaluation['base_model']['digest']}, "
                      f"reference-model/{evaluation['reference_model']['digest']}"),
        ("LoRA", f"r {lora['r']}, alpha {lora['alpha']:g}, dropout {lora['dropout']:g}, {modules}"),
        ("training", f"{training['epochs']} epochs, learning rate {training['learning_rate']:g}, at most "
                     f"{training['max_length']} tokens a record and {training['tokens_per_batch']} a batch, seed "
                     f"{training['seed']}"),
        ("measured on", f"{tuned['records']} held-out records ({tuned['completion_tokens']} tokens of answers), "
                        f"{tuned['questions']} questions, {tuned['sentences']} judged sentences"),
    ]


def markdown(evaluation: Evaluation, history: History, generations: Generations) -> str:
    """The report as Markdown."""
    scores = evaluation["scores"]
    outcome = verdict(evaluation).capitalize()
    lines = [f"# {_text(evaluation['adapter']['name'])}: evaluation", "", f"**{outcome}.**", ""]
    for note in notes(evaluation):
        lines += [f"> {note}", ""]
    lines += ["## Gate", "", *_rows(["rule", "value", "bound", "holds"], (
        [f"{check['metric']} {check['bound']}", "–" if check["value"] is None else f"{check['value']:.4g}",
         f"{check['limit']:g}", "yes" if check["passed"] else "**no**"] for check in evaluation["gate"])), ""]
    lines += ["## Scores", "", *_rows(["metric", *ROLES.values(), "better"], (
        [metric.label, *(_strong(number(metric.key, scores[role][metric.key]), role in best(evaluation, metric))
                         for role in ROLES), metric.better] for metric in METRICS)), ""]
    lines += [f"Base: {_text(scores['base']['model'])}. Fine-tuned: {_text(scores['fine_tuned']['model'])}. "
              f"Reference: {_text(scores['reference']['model'])}.", ""]
    held_out = [entry for entry in history if "holdout_loss" in entry]
    if held_out:
        lines += ["## Loss on the held-out data while training", "", *_rows(["step", "epoch", "loss"], (
            [f"{entry['step']:g}", f"{entry['epoch']:.2f}", f"{entry['holdout_loss']:.4f}"] for entry in held_out)), ""]
    for title, chosen in zip(("Answers, evenly spaced over the held-out questions", "Where it does worst"),
                             samples(generations), strict=True):
        if chosen:
            lines += [f"## {title}", ""]
        for sample in chosen:
            answers = [[ROLES[role], _text(said), f"{overlap:.2f}"] for role, (said, overlap) in sample.answers.items()]
            lines += [f"### {_text(sample.question)}", "", *_rows(
                ["", "answer", "ROUGE-L"], [["expected", _text(sample.reference), ""], *answers]), ""]
    lines += ["## Provenance", "", *_rows(["", ""], ([_text(a), _text(b)] for a, b in provenance(evaluation))), ""]
    lines += ["## How it was measured", "", *(f"- **{name}**: {how}" for name, how in METHODS.items())]
    return "\n".join(lines) + "\n"


def _rows(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def _strong(text: str, yes: bool) -> str:
    return f"**{text}**" if yes else text


def _text(text: str) -> str:
    """Data as Markdown that shows it and does nothing: no markup, no HTML, no line break that ends a table's row."""
    safe = re.sub(r"([\\`*_{}\[\]#|~])", r"\\\1", html.escape(" ".join(text.split()), quote=False))
    return safe.replace("://", ":&#47;&#47;")  # no automatic link
