"""The drawings of report.html: where each dot, line and text of a chart is.

Charts whose width follows the page have their x in per cent of it, 0 to 100, so that their texts keep their size on a
narrow screen; their y are pixels. The chart of the loss is drawn 900 wide and scales as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jobs.core.metrics import Score, score_of
from jobs.core.pipeline import BOUNDS
from jobs.evaluation import content
from jobs.evaluation.content import Evaluation, History, held_out_losses
from jobs.evaluation.gate import Check
from jobs.evaluation.report_records import Comparison

NAMED_CURVES = 12  # with more, only that of the chosen trial has its name beside it
MARGIN = 3.0  # per cent of a chart's width on each side, for the dots at the ends
FACTOR = 3.0  # values that differ by more are on a logarithmic axis, where the score or the rule is of that kind
TICKS_LENGTH = 13  # characters of all texts below an axis that a phone has room for
BINS = 10  # of a histogram, on each side of "unchanged"
Anchor = Literal["start", "middle", "end"]
Point = tuple[float, float]


@dataclass(frozen=True)
class Tick:
    """A text below an axis."""

    x: float
    text: str
    anchor: Anchor = "middle"


@dataclass(frozen=True)
class Axis:
    """A horizontal axis from `low` to `high`."""

    low: float
    high: float
    logarithmic: bool = False
    ticks: list[Tick] = field(default_factory=list)

    def x(self, value: float) -> float:
        """Where a value is; at the axis's end where it is beyond."""
        scale = math.log if self.logarithmic else float
        low, high, at = scale(self.low), scale(self.high), scale(value)
        return MARGIN + min(max((at - low) / (high - low), 0.0), 1.0) * (100 - 2 * MARGIN)


@dataclass(frozen=True)
class Whisker:
    """One model's value with its interval. `dot` is None where the score was not measured; `low` and `high` where there
    is no interval. A bound that is not known reaches to the chart's end."""

    role: str
    name: str
    value: str
    interval: str
    best: bool
    dot: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class ScoreChart:
    """One score of all models."""

    score: Score
    axis: Axis | None
    whiskers: list[Whisker]


def score_chart(evaluation: Evaluation, score: Score) -> ScoreChart:
    """A dot and a whisker for each model."""
    best = content.best(evaluation, score)
    values = {role: content.value(evaluation, role, score) for role in content.roles(evaluation)}
    ends = {role: content.bounds(evaluation, role, score) for role in values}
    axis = _score_axis(score, [end for role, value in values.items() for end in (value, *ends[role])
                               if value is not None and end is not None])

    def whisker(role: str, value: float | None) -> Whisker:
        texts = (role, content.ROLES[role], score.shown(value), content.interval_text(evaluation, role, score)
                 if value is not None else "", role in best)
        if axis is None or value is None:
            return Whisker(*texts)
        low, high = ends[role]
        if low is None and high is None:
            return Whisker(*texts, axis.x(value))
        return Whisker(*texts, axis.x(value), 0.0 if low is None else axis.x(low),
                       100.0 if high is None else axis.x(high))

    return ScoreChart(score, axis, [whisker(role, value) for role, value in values.items()])


def _score_axis(score: Score, ends: Sequence[float]) -> Axis | None:
    """The axis that shows these values: logarithmic where models differ by a factor; the whole range of a score that
    has one, unless all values are near each other."""
    if not ends:
        return None
    low, high = min(ends), max(ends)
    if score.log_scale and low > 0 and high / low > FACTOR:
        return _logarithmic(score.low if score.low > 0 and low < FACTOR * score.low else low / 1.15, high * 1.15)
    if math.isfinite(score.high - score.low) and high - low > 0.4 * (score.high - score.low):
        return _linear(score.low, score.high)
    room = (high - low) * 0.15 if high - low > 1e-6 * abs(high) else abs(high) * 0.05 or 0.5
    return _linear(max(low - room, score.low), min(high + room, score.high))


@dataclass(frozen=True)
class Bullet:
    """One rule of the gate: the limit as a line, what it allows as a band, the value as a dot, and its interval as a
    whisker, thick towards the bound that decides."""

    check: Check
    label: str
    mark: str
    outcome: str
    finding: str
    band: tuple[float, float] | None = None  # first x and width
    limit: Tick | None = None
    same: Tick | None = None  # no difference from the model that it is compared with
    dot: float | None = None
    whisker: Point | None = None  # the whole interval
    deciding: Point | None = None  # the part of it between the value and the bound that decided
    logarithmic: bool = False


def bullet(check: Check) -> Bullet:
    """The drawing of a rule; its texts alone where there is no value."""
    label = score_of(check.metric).label
    texts = (check, label, content.MARKS[check.outcome], content.OUTCOMES[check.outcome], content.finding(check))
    kind = BOUNDS[check.bound]
    if check.value is None:
        return Bullet(*texts)
    neutral = None if not kind.compares else 1.0 if check.bound == "max_ratio" else 0.0
    known = [end for end in (check.value, check.low, check.high, check.limit, neutral) if end is not None]
    low, high = min(known), max(known)
    by_factor = (check.bound == "max_ratio" or score_of(check.metric).log_scale) and low > 0
    if by_factor and high / low > FACTOR:
        axis = Axis(low / (high / low) ** 0.12, high * (high / low) ** 0.12, True)
    else:
        room = (high - low) * 0.12 or abs(high) * 0.1 or 0.5
        axis = Axis(low - room, high + room)
    at, limit = axis.x(check.value), axis.x(check.limit)
    ends = [axis.x(end) if end is not None else edge for end, edge in ((check.low, 0.0), (check.high, 100.0))]
    decides = ends[0] if kind.at_least != (check.outcome == "failed") else ends[1]
    same = None
    if neutral is not None:
        same = Tick(axis.x(neutral), f"same as {check.than}", _anchor(axis.x(neutral)))
        if abs(same.x - limit) < (30 if same.anchor == "middle" else 45):  # the texts would be on each other
            same = None
    measured = check.low is not None or check.high is not None
    return Bullet(*texts, (limit, 100 - limit) if kind.at_least else (0.0, limit),
                  Tick(limit, f"limit {check.limit:g}", _anchor(limit)), same, at,
                  (ends[0], ends[1]) if measured else None,
                  (min(at, decides), max(at, decides)) if measured else None, axis.logarithmic)


@dataclass(frozen=True)
class Column:
    """One bin of a histogram."""

    x: float
    width: float
    height: float  # of HISTOGRAM_HEIGHT
    count: int
    kind: Literal["worse", "unchanged", "better"]


@dataclass(frozen=True)
class Histogram:
    """How many records changed by how much, from worse on the left to better on the right."""

    comparison: Comparison
    columns: list[Column]
    ticks: list[Tick]


HISTOGRAM_HEIGHT = 64


def histogram(comparison: Comparison) -> Histogram:
    """Columns of equal width: as many for what got worse as for what got better, and one between for the unchanged."""
    gains = [change.gain for change in comparison.changes]
    finite = [abs(gain) for gain in gains if math.isfinite(gain)]
    ratio = comparison.score.log_scale
    reach = max([*finite, 0.1]) if ratio else 1.0
    counts = [0] * (2 * BINS + 1)
    for gain in gains:
        away = 0 if abs(gain) < comparison.unchanged else min(BINS, 1 + int(min(abs(gain) / reach, 1.0) * BINS))
        counts[BINS + (away if gain > 0 else -away)] += 1
    width = 100 / len(counts)
    columns = [Column(place * width, width, count / max(counts) * HISTOGRAM_HEIGHT, count,
                      "worse" if place < BINS else "better" if place > BINS else "unchanged")
               for place, count in enumerate(counts)]
    factor = math.exp(min(reach, 600))
    far = f"{factor:,.0f} times " if 100 <= factor < 1e9 else f"{factor:.3g} times "
    texts = (f"{far}worse", "same", f"{far}better") if ratio else ("worse by 1", "same", "better by 1")
    return Histogram(comparison, columns, [Tick(0, texts[0], "start"), Tick(50, texts[1]), Tick(100, texts[2], "end")])


def _linear(low: float, high: float) -> Axis:
    """A linear axis with two to four round numbers below it."""
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    for step in (power * factor for factor in (1, 2, 2.5, 5, 10, 20)):
        values = [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
        if len(values) <= 4:
            break
    if len(values) > 2 and sum(len(_short(value)) for value in values) > TICKS_LENGTH:
        values = values[::2]
    return _with_ticks(Axis(low, high), values)


def _logarithmic(low: float, high: float) -> Axis:
    """A logarithmic axis with two to four round numbers below it."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    candidates: Iterable[list[float]] = ([factor * 10.0**power for power in powers for factor in factors
                                          if low <= factor * 10.0**power <= high]
                                         for factors in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)))
    values = next((found for found in candidates if len(found) <= 4), [])
    if not values:  # many powers of ten: some of them
        found = [10.0**power for power in powers if low <= 10.0**power <= high]
        values = found[::math.ceil(len(found) / 4)]
    return _with_ticks(Axis(low, high, True), values)


def _with_ticks(axis: Axis, values: Iterable[float]) -> Axis:
    return Axis(axis.low, axis.high, axis.logarithmic,
                [Tick(axis.x(value), _short(value), _anchor(axis.x(value))) for value in values])


def _short(value: float) -> str:
    """A round number in few characters: 0.25, 100, 20k, 1M, 1e+12."""
    if abs(value) >= 1e9:
        return f"{value:.3g}"
    for unit, suffix in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.6g}{suffix}"
    return f"{value:.6g}"


def _anchor(x: float) -> Anchor:
    """How a text stands at its place: within the chart at its ends, else around it."""
    return "start" if x < 12 else "end" if x > 88 else "middle"


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


def loss_chart(history: History) -> LossChart | None:
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


def search_chart(record: Mapping[str, Any]) -> LossChart | None:
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
