"""report.html: one file that opens by itself, with no script and no network, on a screen light or dark and on paper.

The page is the template report.html.j2; this module gives it its content, and charts.py the positions in its charts.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from jobs.core import search
from jobs.evaluation import charts, content
from jobs.evaluation.content import ROLES, SEARCHED, Evaluation, History
from jobs.evaluation.gate import Values
from jobs.evaluation.report_records import Generations, RecordByRecord

TEMPLATE = Path(__file__).with_name("report.html.j2")


def page(evaluation: Evaluation, history: History, generations: Generations,
         models: Mapping[str, Values] | None = None, *, answers: bool = True) -> str:
    """The whole report as one HTML document.

    Args:
        models: the values of each record by role.
        answers: whether questions, references and answers are shown.
    """
    searched = evaluation.get("search")
    records = RecordByRecord.of(evaluation, generations, models or {}, answers=answers)
    return _template().render(
        roles=ROLES, adapter=evaluation["adapter"], base=evaluation["base_model"]["name"],
        reference=evaluation["reference_model"]["name"], outcome=content.outcome(evaluation),
        mark=content.MARKS[evaluation["outcome"]], reason=content.verdict(evaluation).partition(": ")[2],
        next_step=content.next_step(evaluation), notes=content.notes(evaluation),
        rules=[charts.bullet(check) for check in content.checks(evaluation)],
        confidence=f"{evaluation['confidence'] * 100:g} %", meaning=content.bounds_meaning(evaluation),
        metrics=[(metric, [charts.score_chart(evaluation, score) for score in scores])
                 for metric, scores in content.metrics(evaluation).items()],
        privacy=content.privacy_tables(evaluation), records=records, no_answers="" if answers else content.NO_ANSWERS,
        histograms=[charts.histogram(comparison) for comparison in records.comparisons],
        histogram_height=charts.HISTOGRAM_HEIGHT, loss=charts.loss_chart(history),
        trials=search.rows(searched) if searched else [], searched=SEARCHED,
        chosen=searched["chosen"] if searched else None, search=charts.search_chart(searched) if searched else None,
        provenance=content.provenance(evaluation))


@functools.cache
def _template() -> Template:
    # Data and answers are whatever clients and models wrote: everything is escaped. A misspelt name is an error.
    environment = Environment(loader=FileSystemLoader(TEMPLATE.parent), autoescape=True, undefined=StrictUndefined,
                              keep_trailing_newline=True)
    environment.filters["px"] = lambda value: f"{value:.1f}"
    environment.filters["pc"] = lambda value: f"{value:.2f}%"
    return environment.get_template(TEMPLATE.name)
