"""The evaluation as people read it: a table for terminals, report.md, and report.html (report_html.py)."""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from jobs.core import search
from jobs.core.metrics import Score
from jobs.evaluation import content
from jobs.evaluation.content import MARKS, OUTCOMES, ROLES, SEARCHED, Evaluation, History
from jobs.evaluation.gate import Check, Values
from jobs.evaluation.report_records import Flips, Generations, RecordByRecord, Sample

COLUMNS = 100  # of a terminal
LABEL = 34  # columns of a score's name at most
UNMET = 8  # rules that a message names at most: a pod's termination message has 4 KiB


def write(folder: Path, evaluation: Evaluation, history: History, generations: Generations,
          models: Mapping[str, Values] | None = None, *, answers: bool = True) -> None:
    """Write report.md and report.html into `folder`.

    Args:
        models: the values of each record by role.
        answers: whether questions, references and answers are shown.
    """
    from jobs.evaluation import report_html  # jinja2: what only prints tables needs none

    (folder / "report.md").write_text(markdown(evaluation, history, generations, models, answers=answers),
                                      encoding="utf-8")
    (folder / "report.html").write_text(report_html.page(evaluation, history, generations, models, answers=answers),
                                        encoding="utf-8")


# --- for terminals --------------------------------------------------------------------------------------------------


def table(evaluation: Evaluation) -> str:
    """The evaluation as plain text for a terminal: scores of the models, and each rule of the gate."""
    adapter, scores = evaluation["adapter"], evaluation["scores"]
    lines = scores_table(evaluation, content.all_scores(evaluation).values())
    bar = "─" * max(map(len, lines))
    return "\n".join([
        f"{adapter['name']}@{adapter['digest']} on {scores['fine_tuned']['records']} held-out records",
        bar, lines[0], bar, *lines[1:], bar, content.verdict(evaluation),
        *(line for check in content.checks(evaluation) for line in rule_lines(check)),
        *content.notes(evaluation),
        *(["settings chosen by search:", search.text_table(evaluation["search"])] if "search" in evaluation else [])])


def scores_table(evaluation: Evaluation, scores: Iterable[Score]) -> list[str]:
    """A line for each score after a header: the value of each model, with its interval for the fine-tuned one."""
    roles = content.roles(evaluation)
    rows = [["", *roles.values(), "better"]]
    rows += [[textwrap.shorten(score.label, LABEL, placeholder="…"), *(_cell(evaluation, role, score)
              for role in roles), score.better] for score in scores]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in
                                                  zip(row[1:], widths[1:], strict=True))]) for row in rows]


def _cell(evaluation: Evaluation, role: str, score: Score) -> str:
    text = score.shown(content.value(evaluation, role, score))
    return f"{text} {content.interval_text(evaluation, role, score)}".rstrip() if role == "fine_tuned" else text


def rule_lines(check: Check, indent: int = 2) -> list[str]:
    """A rule and what was found of it, as lines for a terminal."""
    return [*wrapped(f"{MARKS[check.outcome]} {content.rule(check)}", indent, indent + 4),
            *wrapped(content.finding(check), indent + 4, indent + 4)]


def unmet_rules(evaluation: Evaluation, indent: int = 2) -> list[str]:
    """The rules that an adapter did not pass, as lines for a terminal; those that failed first."""
    unmet = sorted((check for check in content.checks(evaluation) if not check.passed),
                   key=lambda check: check.outcome != "failed")
    more = [f"{' ' * indent}and {len(unmet) - UNMET} more rules, in the report"] if len(unmet) > UNMET else []
    return [*(line for check in unmet[:UNMET] for line in rule_lines(check, indent)), *more]


def wrapped(text: str, indent: int = 0, further: int = 0) -> list[str]:
    """A text as lines that fit a terminal, the first and the further ones indented by so many columns."""
    return textwrap.wrap(text, COLUMNS - 2, initial_indent=" " * indent, subsequent_indent=" " * further,
                         break_long_words=False, break_on_hyphens=False)


# --- Markdown -------------------------------------------------------------------------------------------------------


def markdown(evaluation: Evaluation, history: History, generations: Generations,
             models: Mapping[str, Values] | None = None, *, answers: bool = True) -> str:
    """The report as Markdown.

    Args:
        models: the values of each record by role.
        answers: whether questions, references and answers are shown.
    """
    scores, roles = evaluation["scores"], content.roles(evaluation)
    verdict = content.verdict(evaluation)
    lines = [f"# {_text(evaluation['adapter']['name'])}: evaluation", "",
             f"**{verdict[0].upper()}{verdict[1:]}.** {content.next_step(evaluation)}".rstrip(), ""]
    for note in [*content.notes(evaluation), *([] if answers else [content.NO_ANSWERS])]:
        lines += [f"> {note}", ""]
    lines += ["## Gate", "", *_rows(["rule", "found", "outcome"], (
        [_text(content.rule(check)), _text(content.finding(check)),
         _strong(f"{MARKS[check.outcome]} {OUTCOMES[check.outcome]}", not check.passed)]
        for check in content.checks(evaluation))), ""]
    lines += ["## Scores", "", content.bounds_meaning(evaluation), ""]
    for metric, of_metric in content.metrics(evaluation).items():
        lines += [f"### {_text(metric.title)}", "", _text(metric.method[:1].upper() + metric.method[1:]), "",
                  *_rows(["score", *roles.values(), "better"], (
                      [_text(score.label), *(_score(evaluation, role, score) for role in roles), score.better]
                      for score in of_metric)), ""]
    lines += [" ".join(f"{name[0].upper()}{name[1:]}: {_text(scores[role]['model'])}." for role, name in roles.items()),
              ""]
    for title, rows in content.privacy_tables(evaluation):
        lines += [f"### {_text(title)}", "", *_rows(rows[0], rows[1:]), ""]
    lines += _records(RecordByRecord.of(evaluation, generations, models or {}, answers=answers))
    if "search" in evaluation:
        header, *trials = search.rows(evaluation["search"])
        lines += ["## Search", "", SEARCHED, "", *_rows(header, ([*map(_text, row)] for row in trials)), ""]
    held_out = content.held_out_losses(history)
    if held_out:
        lines += [f"## Loss on the {held_out[0][0]} split while training", "", *_rows(["step", "epoch", "loss"], (
            [f"{entry['step']:g}", f"{entry['epoch']:.2f}", f"{loss:.4f}"] for _, entry, loss in held_out)), ""]
    lines += ["## Provenance", "", *_rows(["", ""], ([_text(a), _text(b)] for a, b in content.provenance(evaluation)))]
    return "\n".join(lines) + "\n"


def _records(records: RecordByRecord) -> list[str]:
    lines = []
    if records.comparisons:
        lines += ["## Record by record", "", *(
            f"- {comparison.score.label}, against the {ROLES[comparison.than]} model: {comparison.counts}"
            for comparison in records.comparisons), ""]
    for flips in records.flips:
        lines += _flips(flips)
    for title, chosen in (("Answers, evenly spaced over the held-out questions", records.spaced),
                          ("Where it does worst", records.lowest)):
        if chosen:
            lines += [f"## {title}", ""]
        for sample in chosen:
            lines += _sample(sample)
    return lines


def _flips(flips: Flips) -> list[str]:
    title = _text(flips.title[0].upper() + flips.title[1:])
    lines = [f"### {title}: {len(flips.records)} of {flips.total}", "", *_rows(
        ["record", f"{flips.score.label}, {ROLES[flips.than]}", "fine-tuned"],
        ([str(change.record), flips.score.shown(change.before), flips.score.shown(change.after)]
         for change, _ in flips.records)), ""]
    for _, sample in flips.records:
        lines += _sample(sample) if sample else []
    return lines


def _sample(sample: Sample) -> list[str]:
    answers = [[ROLES[role], _text(text), f"{overlap:.2f}"] for role, (text, overlap) in sample.answers.items()]
    return [f"#### {sample.record}: {_text(sample.question)}", "", *_rows(
        ["", "answer", "ROUGE-L"], [["expected", _text(sample.reference), ""], *answers]), ""]


def _score(evaluation: Evaluation, role: str, score: Score) -> str:
    text = _strong(score.shown(content.value(evaluation, role, score)), role in content.best(evaluation, score))
    return f"{text} {_text(content.interval_text(evaluation, role, score))}".rstrip()


def _rows(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def _strong(text: str, yes: bool) -> str:
    return f"**{text}**" if yes else text


def _text(text: str) -> str:
    """Data as Markdown that shows it and does nothing: no markup, no HTML, no line break that ends a table's row."""
    safe = re.sub(r"([\\`*_{}\[\]#|~])", r"\\\1", html.escape(" ".join(text.split()), quote=False))
    return safe.replace("://", ":&#47;&#47;")  # no automatic link
