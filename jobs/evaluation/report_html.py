"""report.html: one file that opens by itself, with no script and no network, on a screen light or dark and on paper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from jobs.evaluation.report import (
    METHODS,
    METRICS,
    ROLES,
    Evaluation,
    Generations,
    History,
    Metric,
    Sample,
    best,
    notes,
    number,
    provenance,
    samples,
    verdict,
)

STYLE = """
:root { --paper: #fdfcf9; --panel: #f5f2eb; --ink: #22252a; --muted: #6a6e75; --rule: #ddd8cd;
  --base: #9a9890; --fine_tuned: #0b7068; --reference: #6d7bb8; --pass: #1d7a46; --fail: #b42a20; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181b; --panel: #1f2226; --ink: #e8e5de; --muted: #9c9fa5;
  --rule: #363a40; --base: #85878a; --fine_tuned: #45bfb0; --reference: #95a2e2; --pass: #52c689; --fail: #ff857b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.5;
  font: 16px/1.55 "Iowan Old Style", "Palatino Linotype", Palatino, "URW Palladio L", Georgia, serif; }
main { max-width: 60rem; margin: 0 auto; padding: 3.5rem 1.5rem 5rem; }
.sans, th, td, dt, dd, figcaption, .tag, svg text { font-family: ui-sans-serif, system-ui, "Segoe UI", "Helvetica Neue",
  Arial, sans-serif; font-variant-numeric: tabular-nums; }
.overline { font-size: .78rem; letter-spacing: .09em; text-transform: uppercase; color: var(--muted); margin: 0; }
h1 { font-size: 2.5rem; line-height: 1.15; font-weight: 600; margin: .2rem 0 .4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.35rem; font-weight: 600; margin: 3.2rem 0 .9rem; padding-top: .9rem;
  border-top: 1px solid var(--rule); }
h3 { font-size: 1.1rem; font-weight: 600; margin: 2.4rem 0 .8rem; }
p { margin: .5rem 0; }
.lead { color: var(--muted); font-size: 1.05rem; margin: 0; overflow-wrap: anywhere; }
code { font: .88em ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
.legend { font-size: .82rem; color: var(--muted); }
.verdict { margin: 2rem 0 0; padding: 1.1rem 1.4rem; background: var(--panel); border-left: .4rem solid var(--pass); }
.verdict strong { display: block; font-size: 1.6rem; line-height: 1.25; color: var(--pass); }
.rejected { border-color: var(--fail); } .rejected strong { color: var(--fail); }
.note { margin: .9rem 0 0; padding-left: 1rem; border-left: .2rem solid var(--rule); color: var(--muted); }
table { border-collapse: collapse; width: 100%; font-size: .93rem; }
.wide { overflow-x: auto; }
th { text-align: left; font-weight: 500; color: var(--muted); font-size: .82rem; padding: .3rem .8rem .3rem 0;
  border-bottom: 1.5px solid var(--ink); vertical-align: bottom; }
td { padding: .5rem .8rem .5rem 0; border-bottom: 1px solid var(--rule); vertical-align: baseline; }
th.n, td.n { text-align: right; white-space: nowrap; }
td.best { font-weight: 700; }
td small, th small { display: block; color: var(--muted); font-size: .78rem; font-weight: 400; }
th:last-child, td:last-child { padding-right: 0; }
.yes { color: var(--pass); font-weight: 700; } .no { color: var(--fail); font-weight: 700; }
.key::before { content: ""; display: inline-block; width: .65em; height: .65em; margin-right: .4em;
  background: var(--c); }
.base { --c: var(--base); } .fine_tuned { --c: var(--fine_tuned); } .reference { --c: var(--reference); }
.bars { display: grid; grid-template-columns: repeat(auto-fill, minmax(12rem, 1fr)); gap: 1.6rem 1.8rem;
  margin-top: 1.6rem; }
figure { margin: 0; break-inside: avoid; } figcaption { font-size: .88rem; font-weight: 600; margin-bottom: .25rem; }
figcaption small { font-weight: 400; color: var(--muted); font-size: .78rem; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font-size: 12px; fill: var(--ink); } svg text.quiet { fill: var(--muted); }
svg.chart { min-width: 40rem; }
svg .grid { stroke: var(--rule); } svg .axis { stroke: var(--muted); }
svg .bar, svg text.line { fill: var(--c); } svg .line { stroke: var(--c); fill: none; stroke-width: 2; }
svg .faint { stroke-width: 1; opacity: .35; } svg .dot { fill: var(--c); stroke: var(--paper); stroke-width: 1.5; }
svg text.line { stroke: none; font-weight: 600; }
.sample { margin: 1.3rem 0 1.9rem; break-inside: avoid; }
.question { font-size: 1.08rem; font-weight: 600; margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.expected { margin: .1rem 0 .7rem; color: var(--muted); white-space: pre-wrap; overflow-wrap: anywhere; }
.answers { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 1rem; }
.answer { border-top: 3px solid var(--c); background: var(--panel); padding: .6rem .8rem .8rem; }
.answer p { margin: .25rem 0 0; font-size: .94rem; line-height: 1.45; white-space: pre-wrap; overflow-wrap: anywhere; }
.tag { display: flex; justify-content: space-between; font-size: .78rem; color: var(--muted); }
dl { display: grid; grid-template-columns: 9.5rem minmax(0, 1fr); gap: .45rem 1rem; font-size: .88rem; margin: 0; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) { main { padding-top: 2rem; } .answers, dl { grid-template-columns: 1fr; } dl { gap: .1rem; }
  dd { margin-bottom: .6rem; } h1 { font-size: 1.9rem; } }
@media print { main { max-width: none; padding: 0; } .verdict, .answer, .bar { print-color-adjust: exact; } }
"""


def page(evaluation: Evaluation, history: History, generations: Generations) -> str:
    """The whole report as one HTML document. Every value from the data is escaped, and the policy allows no script."""
    name = escape(evaluation["adapter"]["name"])
    base, reference = escape(evaluation["base_model"]["name"]), escape(evaluation["reference_model"]["name"])
    passed = evaluation["passed"]
    outcome, _, reason = verdict(evaluation).partition(": ")
    promise = "The adapter is promoted." if passed else "The adapter is not promoted."
    sections = [
        f'<p class="overline sans">Evaluation report</p><h1>{name}</h1>'
        f'<p class="lead">A LoRA adapter on {base}, measured against {base} itself and the larger {reference}.<br>'
        f"<code>{name}@{escape(evaluation['adapter']['digest'])}</code></p>",
        f'<div class="verdict{"" if passed else " rejected"}"><strong>{"✓" if passed else "✗"} {outcome.capitalize()}'
        f"</strong>{escape(reason.capitalize())}. {promise}</div>",
        *(f'<p class="note">{escape(note)}</p>' for note in notes(evaluation)),
        "<h2>The gate</h2>", _gate(evaluation),
        "<h2>Scores</h2>", _scores(evaluation),
        f'<div class="bars">{"".join(_bars(evaluation, metric) for metric in METRICS)}</div>',
        "<h2>Loss while training</h2>", _loss(history),
        *_answers(generations),
        "<h2>Provenance</h2>",
        "<dl>", *(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in provenance(evaluation)), "</dl>",
        "<h2>How it was measured</h2>",
        *(f"<p><strong>{escape(key)}.</strong> {escape(how[0].upper() + how[1:])}</p>" for key, how in METHODS.items()),
    ]
    body = "\n".join(sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{name}: {outcome}</title>
<style>{STYLE}</style>
</head>
<body><main>
{body}
</main></body>
</html>
"""


def _gate(evaluation: Evaluation) -> str:
    labels = {metric.key: metric.label for metric in METRICS}
    rows = []
    for check in evaluation["gate"]:
        what, _, must = check["says"].partition(": ")[2].partition(" is ")
        value, _, bound = must.partition(", must be ")
        mark = '<span class="yes">✓ holds</span>' if check["passed"] else '<span class="no">✗ fails</span>'
        rows.append(f"<tr><td>{escape(labels[check['metric']])}<small>{escape(what)}</small></td>"
                    f'<td class="n">{escape(value)}</td><td class="n">{escape(bound)}</td>'
                    f'<td class="n">{mark}</td></tr>')
    return ('<table><thead><tr><th>rule</th><th class="n">value</th><th class="n">must be</th><th class="n"></th></tr>'
            f"</thead><tbody>{''.join(rows)}</tbody></table>")


def _scores(evaluation: Evaluation) -> str:
    head = "".join(f'<th class="n"><span class="key {role}">{label}</span></th>' for role, label in ROLES.items())
    rows = []
    for metric in METRICS:
        winners = best(evaluation, metric)
        cells = "".join(f'<td class="n{" best" if role in winners else ""}">'
                        f"{number(metric.key, evaluation['scores'][role][metric.key])}</td>" for role in ROLES)
        rows.append(f'<tr><td>{metric.label}<small>{metric.scale}</small></td>{cells}<td class="n">'
                    f"{metric.arrow} {metric.better}</td></tr>")
    return (f'<div class="wide"><table><thead><tr><th>metric</th>{head}<th class="n">better</th></tr></thead>'
            f"<tbody>{''.join(rows)}</tbody></table></div>")


def _bars(evaluation: Evaluation, metric: Metric) -> str:
    """One metric of the three models as bars from zero, on a scale of its own."""
    values = {role: evaluation["scores"][role][metric.key] for role in ROLES}
    known = [value for value in values.values() if value is not None]
    low, high = min([0.0, *known]), max([1.0 if metric.higher_is_better else 0.0, *known]) or 1.0
    left, width, step = 68, 98, 24

    def x(value: float) -> float:
        return float(left + (value - low) / (high - low) * width)

    parts = []
    for place, (role, value) in enumerate(values.items()):
        middle = place * step + 12
        parts.append(f'<text class="quiet" x="0" y="{middle + 4}">{ROLES[role]}</text>')
        if value is not None:
            start, end = sorted((x(0), x(value)))
            parts.append(f'<rect class="bar {role}" x="{start:.1f}" y="{middle - 7}" width="{max(end - start, 1):.1f}" '
                         'height="14"/>')
        parts.append(f'<text x="{x(max(value or 0, 0)) + 6:.1f}" y="{middle + 4}">{number(metric.key, value)}</text>')
    parts.append(f'<line class="axis" x1="{x(0):.1f}" x2="{x(0):.1f}" y1="0" y2="{3 * step}"/>')
    return (f'<figure><figcaption>{metric.label} <small title="{metric.better} is better">{metric.arrow}</small>'
            f'</figcaption><svg viewBox="0 0 212 {3 * step}" role="img" aria-label="{metric.label}">{"".join(parts)}'
            "</svg></figure>")


def _loss(history: History) -> str:
    """The loss on the training and on the held-out data over the steps."""
    train = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry and math.isfinite(entry["loss"])]
    held_out = [(entry["step"], entry["holdout_loss"]) for entry in history
                if "holdout_loss" in entry and math.isfinite(entry["holdout_loss"])]
    points = train + held_out
    if not points:
        return '<p class="note">The training recorded no loss.</p>'
    left, right, top, bottom, height = 44, 785, 10, 290, 330
    last = max(step for step, _ in points)
    ticks = _ticks(0, max(loss for _, loss in points))
    steps = [tick for tick in _ticks(0, last, 8) if tick <= last and tick == int(tick)]

    def place(point: tuple[float, float]) -> tuple[float, float]:
        return left + point[0] / last * (right - left), bottom - point[1] / ticks[-1] * (bottom - top)

    parts = []
    for tick in ticks:
        y = place((0, tick))[1]
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
                     f'<text class="quiet" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in steps:
        x = place((tick, 0))[0]
        parts.append(f'<text class="quiet" x="{x:.1f}" y="{bottom + 20}" text-anchor="middle">{tick:,.0f}</text>')
    parts.append(f'<line class="axis" x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>'
                 f'<text class="quiet" x="{right}" y="{bottom + 38}" text-anchor="end">training step</text>')
    ends = []
    if train:
        parts.append(_line("line faint base", [place(p) for p in _thinned(train)]))
        parts.append(_line("line base", [place(p) for p in _thinned(_smoothed(train))]))
        ends.append((place(_smoothed(train)[-1]), "training", "base"))
    if held_out:
        spots = [place(p) for p in held_out]
        parts.append(_line("line fine_tuned", spots))
        parts += [f'<circle class="dot fine_tuned" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in spots]
        ends.append((spots[-1], f"held-out {held_out[-1][1]:.3g}", "fine_tuned"))
    ends.sort()
    ends.sort(key=lambda end: end[0][1])
    lowest = -math.inf
    for (x, y), label, role in ends:  # labels at the lines' ends, never on top of each other
        lowest = max(y + 4, lowest + 16)
        parts.append(f'<text class="line {role}" x="{x + 10:.1f}" y="{lowest:.1f}">{label}</text>')
    return (f'<div class="wide"><svg class="chart" viewBox="0 0 900 {height}" role="img" '
            f'aria-label="Loss over training steps">{"".join(parts)}</svg></div><p class="legend sans">Loss is the '
            "mean negative log-likelihood of a token, in nats. Training: each step faint, a moving average strong.</p>")


def _line(kind: str, points: Sequence[tuple[float, float]]) -> str:
    return f'<polyline class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'


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


def _answers(generations: Generations) -> list[str]:
    spaced, worst = samples(generations)
    parts = []
    if spaced:
        parts.append("<h2>Answers to held-out questions</h2>"
                     '<p class="lead">Evenly spaced over the held-out questions; nobody picked them.</p>')
        parts += map(_sample, spaced)
    if worst:
        parts.append("<h3>Where the fine-tuned model does worst</h3>")
        parts += map(_sample, worst)
    return parts


def _sample(sample: Sample) -> str:
    answers = "".join(f'<div class="answer {role}"><div class="tag"><span>{ROLES[role]}</span>'
                      f"<span>ROUGE-L {overlap:.2f}</span></div><p>{escape(said) or '(nothing)'}</p></div>"
                      for role, (said, overlap) in sample.answers.items())
    return (f'<div class="sample"><p class="question">{escape(sample.question)}</p>'
            f'<p class="expected">Expected: {escape(sample.reference)}</p><div class="answers">{answers}</div></div>')
