"""report.html: one file that opens by itself, with no script and no network, on a screen light or dark and on paper.

The page is the template report.html.j2; this module computes its content and the positions in its charts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from jobs.core import search
from jobs.core.metrics import Score
from jobs.evaluation import content
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

TEMPLATE = Path(__file__).with_name("report.html.j2")
NAMED_CURVES = 12  # with more, only that of the chosen trial has its name beside it
Point = tuple[float, float]


def page(evaluation: Evaluation, history: History, generations: Generations) -> str:
    """The whole report as one HTML document."""
    outcome, _, reason = verdict(evaluation).partition(": ")
    spaced, worst = samples(generations)
    scores = content.scores(evaluation["scores"]["base"])
    return _template().render(
        roles=ROLES, metrics=content.metrics(evaluation["scores"]["base"]), scores=scores.values(),
        labels={key: score.label for key, score in scores.items()},
        adapter=evaluation["adapter"], base=evaluation["base_model"]["name"],
        reference=evaluation["reference_model"]["name"], passed=evaluation["passed"], outcome=outcome, reason=reason,
        notes=notes(evaluation), checks=checks(evaluation), values=evaluation["scores"],
        best={score.key: best(evaluation, score) for score in scores.values()},
        bars=[_bar_chart(evaluation, score) for score in scores.values()], loss=_loss_chart(history), spaced=spaced,
        trials=search.rows(evaluation["search"]) if "search" in evaluation else [], searched=SEARCHED,
        chosen=evaluation["search"]["chosen"] if "search" in evaluation else None,
        search=_search_chart(evaluation["search"]) if "search" in evaluation else None,
        worst=worst, provenance=provenance(evaluation))


@functools.cache
def _template() -> Template:
    # Data and answers are whatever clients and models wrote: everything is escaped. A misspelt name is an error.
    environment = Environment(loader=FileSystemLoader(TEMPLATE.parent), autoescape=True, undefined=StrictUndefined,
                              keep_trailing_newline=True)
    environment.filters["px"] = lambda value: f"{value:.1f}"
    return environment.get_template(TEMPLATE.name)


@dataclass(frozen=True)
class Bar:
    """One model's bar; `width` is 0 where the score was not measured."""

    role: str
    middle: int
    x: float
    width: float
    text: str
    text_x: float


@dataclass(frozen=True)
class BarChart:
    """One score of the three models, in a drawing 212 wide."""

    score: Score
    height: int
    zero: float  # x of the axis
    bars: list[Bar]


def _bar_chart(evaluation: Evaluation, score: Score) -> BarChart:
    """Bars from zero, on a scale of the score's own."""
    values = {role: evaluation["scores"][role][score.key] for role in ROLES}
    known = [value for value in values.values() if value is not None]
    low, high = min([0.0, *known]), max([1.0 if score.higher_is_better else 0.0, *known]) or 1.0
    left, width, step = 68, 98, 24

    def x(value: float) -> float:
        return float(left + (value - low) / (high - low) * width)

    bars = []
    for place, (role, value) in enumerate(values.items()):
        start, end = sorted((x(0), x(value or 0)))
        bars.append(Bar(role, place * step + 12, start, 0 if value is None else max(end - start, 1),
                        score.shown(value), x(max(value or 0, 0)) + 6))
    return BarChart(score, len(ROLES) * step, x(0), bars)


@dataclass(frozen=True)
class LossChart:
    """The loss on the training and on the held-out data over the steps. Everything is in the drawing's coordinates."""

    width: int
    height: int
    left: int
    right: int
    bottom: int
    rows: list[tuple[float, str]]  # y and text of each grid line
    columns: list[tuple[float, str]]  # x and text of each step
    lines: list[tuple[str, list[Point]]]  # CSS classes and points
    dots: list[Point]
    labels: list[tuple[float, float, str, str]]  # x, y, text, CSS class


def _loss_chart(history: History) -> LossChart | None:
    """None where the training recorded no loss."""
    train = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry and math.isfinite(entry["loss"])]
    held_out = [(entry["step"], loss) for _, entry, loss in held_out_losses(history) if math.isfinite(loss)]
    if not train + held_out:
        return None
    left, right, top, bottom = 44, 765, 10, 290
    last = max(step for step, _ in train + held_out)
    losses = _ticks(0, max(loss for _, loss in train + held_out))
    steps = [tick for tick in _ticks(0, last, 8) if tick <= last and tick == int(tick)]

    def place(point: Point) -> Point:
        return left + point[0] / last * (right - left), bottom - point[1] / losses[-1] * (bottom - top)

    lines: list[tuple[str, list[Point]]] = []
    ends: list[tuple[Point, str, str]] = []
    dots = [place(point) for point in held_out]
    if train:
        smooth = _smoothed(train)
        lines += [("line faint base", [place(point) for point in _thinned(train)]),
                  ("line base", [place(point) for point in _thinned(smooth)])]
        ends.append((place(smooth[-1]), "training", "base"))
    if held_out:
        lines.append(("line fine_tuned", dots))
        name = "held-out" if any("holdout_loss" in entry for entry in history) else "validation"
        ends.append((dots[-1], f"{name} {held_out[-1][1]:.3g}", "fine_tuned"))
    return LossChart(900, 330, left, right, bottom, [(place((0, tick))[1], f"{tick:g}") for tick in losses],
                     [(place((tick, 0))[0], f"{tick:,.0f}") for tick in steps], lines, dots, _labels(ends))


def _search_chart(record: Mapping[str, Any]) -> LossChart | None:
    """The validation loss of each trial over its steps; the chosen trial's last, and strong."""
    curves = {trial["trial"]: trial["curve"] for trial in record["trials"] if trial["curve"]}
    if not curves:
        return None
    left, right, top, bottom = 44, 765, 10, 290
    last = max(step for curve in curves.values() for step, _ in curve)
    found = [loss for curve in curves.values() for _, loss in curve]
    spacing = _ticks(0, max(found) - min(found))[1]
    lowest = math.floor(min(found) / spacing) * spacing
    losses = [lowest + n * spacing for n in range(math.ceil((max(found) - lowest) / spacing - 1e-9) + 1)]
    steps = [tick for tick in _ticks(0, last, 8) if tick <= last and tick == int(tick)]

    def place(step: float, loss: float) -> Point:
        return (left + step / last * (right - left),
                bottom - (loss - lowest) / ((losses[-1] - lowest) or 1) * (bottom - top))

    lines: list[tuple[str, list[Point]]] = []
    ends: list[tuple[Point, str, str]] = []
    dots: list[Point] = []
    for trial in sorted(curves, key=lambda trial: trial == record["chosen"]):
        points = [place(*point) for point in curves[trial]]
        role = "fine_tuned" if trial == record["chosen"] else "base"
        lines.append((f"line {role}", points))
        dots = points if trial == record["chosen"] else dots
        if trial == record["chosen"] or len(curves) <= NAMED_CURVES:
            ends.append((points[-1], f"trial {trial}", role))
    return LossChart(900, 330, left, right, bottom, [(place(0, tick)[1], f"{tick:.4g}") for tick in losses],
                     [(place(tick, 0)[0], f"{tick:,.0f}") for tick in steps], lines, dots, _labels(ends))


def _labels(ends: list[tuple[Point, str, str]]) -> list[tuple[float, float, str, str]]:
    """Texts at the ends of lines, never on each other."""
    labels = []
    lowest = -math.inf
    for (x, y), text, role in sorted(ends, key=lambda end: end[0][1]):
        lowest = max(y + 4, lowest + 16)
        labels.append((x + 10, lowest, text, role))
    return labels


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from `low` up to at least `high`, about `count` of them."""
    raw = max(high - low, 1e-9) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * (1 - 1e-9))
    return [low + i * step for i in range(math.ceil((high - low) / step - 1e-9) + 1)]


def _smoothed(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """A centred moving average over about a twentieth of the steps."""
    reach = len(points) // 40
    windows = ((i, points[max(0, i - reach): i + reach + 1]) for i in range(len(points)))
    return [(points[i][0], math.fsum(loss for _, loss in window) / len(window)) for i, window in windows]


def _thinned(points: list[tuple[float, float]], most: int = 800) -> list[tuple[float, float]]:
    """At most about `most` of the points, the last among them: a screen shows no more."""
    stride = math.ceil(len(points) / most)
    return points[::stride] if len(points) % stride == 1 or stride == 1 else [*points[::stride], points[-1]]
