"""The evaluation as people read it: a table for terminals, report.md, and report.html (report_html.py)."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from jobs.core import search
from jobs.evaluation import content, report_html
from jobs.evaluation.content import (
    ROLES,
    SEARCHED,
    Evaluation,
    Generations,
    History,
    best,
    checks,
    held_out_losses,
    notes,
    provenance,
    samples,
    verdict,
)


def write(folder: Path, evaluation: Evaluation, history: History, generations: Generations) -> None:
    """Write report.md and report.html into `folder`."""
    (folder / "report.md").write_text(markdown(evaluation, history, generations), encoding="utf-8")
    (folder / "report.html").write_text(report_html.page(evaluation, history, generations), encoding="utf-8")


def table(evaluation: Evaluation) -> str:
    """The evaluation as plain text for a terminal: scores of the three models, and each rule of the gate."""
    adapter, scores = evaluation["adapter"], evaluation["scores"]
    rows = [["", *ROLES.values(), "better"]]
    rows += [[score.label, *(score.shown(scores[role][score.key]) for role in ROLES), score.better]
             for score in content.scores(scores["base"]).values()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in
                                                   zip(row[1:], widths[1:], strict=True))]) for row in rows]
    rule = "─" * len(lines[0])
    return "\n".join([
        f"{adapter['name']}@{adapter['digest']} on {scores['fine_tuned']['records']} held-out records",
        rule, lines[0], rule, *lines[1:], rule, verdict(evaluation),
        *(f"  {'✓' if check.passed else '✗'} {check.description}" for check in checks(evaluation)),
        *notes(evaluation), *(["settings chosen by search:", search.text_table(evaluation["search"])]
                              if "search" in evaluation else [])])


def markdown(evaluation: Evaluation, history: History, generations: Generations) -> str:
    """The report as Markdown."""
    scores = evaluation["scores"]
    outcome = verdict(evaluation).capitalize()
    lines = [f"# {_text(evaluation['adapter']['name'])}: evaluation", "", f"**{outcome}.**", ""]
    for note in notes(evaluation):
        lines += [f"> {note}", ""]
    lines += ["## Gate", "", *_rows(["rule", "value", "bound", "holds"], (
        [f"{check.metric} {check.bound}", "–" if check.value is None else f"{check.value:.4g}", f"{check.limit:g}",
         "yes" if check.passed else "**no**"] for check in checks(evaluation))), ""]
    lines += ["## Scores", "", *_rows(["metric", *ROLES.values(), "better"], (
        [score.label, *(_strong(score.shown(scores[role][score.key]), role in best(evaluation, score))
                        for role in ROLES), score.better] for score in content.scores(scores["base"]).values())), ""]
    lines += [f"Base: {_text(scores['base']['model'])}. Fine-tuned: {_text(scores['fine_tuned']['model'])}. "
              f"Reference: {_text(scores['reference']['model'])}.", ""]
    if "search" in evaluation:
        header, *trials = search.rows(evaluation["search"])
        lines += ["## Search", "", SEARCHED, "", *_rows(header, ([*map(_text, row)] for row in trials)), ""]
    held_out = held_out_losses(history)
    if held_out:
        lines += [f"## Loss on the {held_out[0][0]} split while training", "", *_rows(["step", "epoch", "loss"], (
            [f"{entry['step']:g}", f"{entry['epoch']:.2f}", f"{loss:.4f}"] for _, entry, loss in held_out)), ""]
    for title, chosen in zip(("Answers, evenly spaced over the held-out questions", "Where it does worst"),
                             samples(generations), strict=True):
        if chosen:
            lines += [f"## {title}", ""]
        for sample in chosen:
            answers = [[ROLES[role], _text(text), f"{overlap:.2f}"] for role, (text, overlap) in sample.answers.items()]
            lines += [f"### {_text(sample.question)}", "", *_rows(
                ["", "answer", "ROUGE-L"], [["expected", _text(sample.reference), ""], *answers]), ""]
    lines += ["## Provenance", "", *_rows(["", ""], ([_text(a), _text(b)] for a, b in provenance(evaluation))), ""]
    lines += ["## How it was measured", "",
              *(f"- **{metric.title}**: {metric.method}" for metric in content.metrics(scores["base"]))]
    return "\n".join(lines) + "\n"


def _rows(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def _strong(text: str, yes: bool) -> str:
    return f"**{text}**" if yes else text


def _text(text: str) -> str:
    """Data as Markdown that shows it and does nothing: no markup, no HTML, no line break that ends a table's row."""
    safe = re.sub(r"([\\`*_{}\[\]#|~])", r"\\\1", html.escape(" ".join(text.split()), quote=False))
    return safe.replace("://", ":&#47;&#47;")  # no automatic link
