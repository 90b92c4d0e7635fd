"""The plan of a push as people and programs read it: a table, Markdown, JSON."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.tools.changes import Change, Changes, Part, Restart, Run, Setting, is_made
from jobs.tools.revision import Revision
from jobs.tools.values import shown

FORMAT = 1  # of the JSON; raised when a key changes its meaning
COLUMNS = 98  # of prose
MARKDOWN_CHARACTERS = 30_000  # after which artifacts are left out: GitHub refuses a comment with more than 65,536
LISTED = 20  # Jobs that the table lists one by one

SERVICE = {
    "kept": "the promoted adapter is served until the new one passes the gate",
    "interrupted": "the promoted adapter is served until serving restarts; then 503 until the new one passes the gate",
    "unavailable": "answers 503 until it passes the gate",
    "at once": "is served at once: it is there and passed the gate",
    "rejected": "is there and did not pass the gate: the promoted adapter is served",
    "removed": "is no longer served; its artifacts stay on the volumes",
}
# Of an imported adapter that is not evaluated here.
SERVICE_IMPORTED = SERVICE | {
    "kept": "the promoted adapter is served until the new one is fetched and verified",
    "unavailable": "answers 503 until it is fetched and verified",
    "at once": "is served at once: it is there and was verified",
}
NOW = ("kept", "interrupted", "rejected")  # what clients get first is the promoted adapter
WHEN = {
    "rollout": "at the sync",
    "at once": "as soon as the file reaches the pod",
    "base model there": "as soon as the new base model is there",
    "adapters passed": "when the adapters that are served have passed the gate",
}


@dataclass(frozen=True)
class Report:
    """A plan, and what it was made from."""

    overlay: Path
    since: Revision | None
    notes: Sequence[str]
    changes: Changes
    problems: Sequence[str] = ()  # of the adapters that are left out


# --- in words ---------------------------------------------------------------------------------------------------------


def summary(changes: Changes) -> str:
    """The plan in one line."""
    counts: dict[str, int] = {}
    for part in changes.adapters.values():
        counts[work(part)] = counts.get(work(part), 0) + 1
    order = ("added", "imported", "trained again", "restored", "evaluated again", "merged again", "removed",
             "unchanged")
    adapters = ", ".join(f"{counts[key]} {key}" for key in order if key in counts) or "no adapters"
    adapters = re.sub(r"^(\d+)", lambda count: f"{count[0]} adapter{'' if count[0] == '1' else 's'}", adapters)
    return f"{adapters}; {_running(changes)}; {serving(changes)}"


def _running(changes: Changes) -> str:
    new = [run for run in changes.runs if run.new]
    numbers = {kind: sum(run.workload.kind == kind for run in new) for kind in ("Job", "JobSet")}
    counted = " and ".join(f"{number} {kind}{'' if number == 1 else 's'}" for kind, number in numbers.items() if number)
    if not new:
        return "no Job runs"
    idle, s = sum(not run.makes for run in new), "s" if len(new) == 1 else ""
    if idle == len(new):
        return f"{counted} run{s} for nothing new"
    return f"{counted} run{s}" + (f", {idle} for nothing new" if idle else "")


def work(part: Part) -> str:
    """What an adapter needs, in a word or two."""
    if part.status in ("added", "removed"):
        return part.status
    adapter, evaluation = part.artifact("adapter"), part.artifact("evaluation")
    imported = part.artifact("imported-adapter")
    if imported and imported.new:
        return "restored" if imported.there else "imported"
    if adapter and adapter.new:
        return "restored" if adapter.there else "trained again"
    if evaluation and evaluation.new:
        return "evaluated again" if not evaluation.there else "restored"
    return "merged again" if any(each.new and each.name == "merged-model" for each in part.artifacts) else "unchanged"


def serving(changes: Changes) -> str:
    """What happens to the server, in a few words."""
    if changes.restarts:
        return "serving restarts"
    return {"none": "nothing is served", "starts": "serving starts", "stops": "serving stops",
            "unknown": "whether serving restarts is not known"}.get(changes.server, "serving does not restart")


def details(changes: Changes) -> list[str]:
    """What else there is to say about Deployments, one line each."""
    return [*(f"{restart(each)}: {each.reason}" for each in changes.restarts), *map(rollout, changes.rollouts)]


def restart(each: Restart) -> str:
    return f"serving restarts {WHEN[each.when]}"


def rollout(deployment: str) -> str:
    return f"Deployment {deployment} replaces its pods"


def title(name: str, part: Part) -> str:
    """An adapter in one line: its name, what it needs and what its clients get."""
    service = (SERVICE_IMPORTED if part.artifact("imported-adapter") and not part.artifact("evaluation") else SERVICE
               ).get(part.service)
    promoted = f" (now {name}@{part.promoted})" if part.promoted and part.service in NOW else ""
    return f"{name}: {work(part)}{f'; {service}{promoted}' if service else ''}"


def there(change: Change, part: Part, runs: bool) -> str:
    """What `--volumes` found, and what becomes of it."""
    if change.there is None or change.there:
        return "there" if change.there else ""
    if not is_made(change, part.artifact("evaluation")):
        return "not needed"
    return "would be made" if runs else "not there"


def digest(change: Change) -> str:
    """The digest of an artifact, as far as it is known."""
    return change.spec.digest if change.known else "by the import"


def idle(changes: Changes, name: str) -> bool:
    """Whether there is nothing to show of an adapter."""
    part = changes.adapters[name]
    return part.status == "unchanged" and all(each.there is not False for each in part.artifacts)


def without_effect(part: Part) -> list[Setting]:
    """The changed keys that no artifact depends on."""
    return [each for each in part.settings if not each.artifacts]


def running(changes: Changes, adapter: str | None) -> set[str]:
    """The stages of an adapter, or of the environment, that run."""
    return {stage for run in changes.runs if run.new for stage, of in run.workload.stages if of == adapter}


# --- a table ----------------------------------------------------------------------------------------------------------


def table(report: Report) -> str:
    """For a terminal."""
    changes, volumes = report.changes, any(a.there is not None for a in report.changes.environment.artifacts)
    head = ["stage", "artifact", "digest", "compared", *(["on the volume"] if volumes else []), "Job"]
    rows: list[list[str] | str] = [head]
    rows += ["environment", *_rows(changes, None, changes.environment, volumes)]
    quiet = [name for name in changes.adapters if idle(changes, name)]
    for name, part in changes.adapters.items():
        if name not in quiet:
            rows += [title(name, part), *_rows(changes, name, part, volumes)]
    for name in quiet:
        part = changes.adapters[name]
        adapter = part.artifact("adapter") or part.artifact("imported-adapter")
        rows.append([f"{name}", adapter.name if adapter else "adapter", digest(adapter) if adapter else "", "unchanged",
                     *(["there"] if volumes else []), "runs" if running(changes, name) else "-"])
    cells = [row for row in rows if isinstance(row, list)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = [row if isinstance(row, str) else
             "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    rule = "─" * max(len(line) for line, row in zip(lines, rows, strict=True) if isinstance(row, list))
    notes = _wrapped(f"note: {note}" for note in report.notes)
    lines = [heading(report), *notes, rule, lines[0], rule, *lines[1:], rule]
    return "\n".join([*lines, *_listed(changes), *_wrapped(details(changes)), summary(changes)]) + "\n"


def _wrapped(lines: Iterable[str]) -> list[str]:
    return [part for line in lines for part in textwrap.wrap(line, COLUMNS, subsequent_indent="  ",
                                                             break_long_words=False, break_on_hyphens=False)]


def heading(report: Report) -> str:
    return f"{report.overlay}: the working tree compared with {report.since or 'nothing: everything is new'}"


def _rows(changes: Changes, name: str | None, part: Part, volumes: bool) -> Iterator[list[str] | str]:
    runs, stage = running(changes, name), ""
    for each in part.artifacts:
        first, stage = each.stage != stage, each.stage
        yield [f"  {each.stage}" if first else "", each.name, digest(each), "new" if each.new else "unchanged",
               *([there(each, part, each.stage in runs)] if volumes else []),
               "" if not first else "runs" if each.stage in runs else "-"]
        yield from (f"      {reason}" for reason in each.reasons)
    for setting in without_effect(part):
        yield f"  no artifact depends on {setting}"


def _listed(changes: Changes) -> Iterator[str]:
    """The Jobs with new names, and those that are no more."""
    new = [run for run in changes.runs if run.new]
    if new:
        yield f"new names ({len(new)}):"
    width = max((len(f"{run.workload.kind} {run.workload.title}") for run in new[:LISTED]), default=0)
    for run in new[:LISTED]:
        yield f"  {f'{run.workload.kind} {run.workload.title}':<{width}}  {_hashes(run)}  {_makes(run)}".rstrip()
    if len(new) > LISTED:
        yield f"  and {len(new) - LISTED} more; --json lists all"
    if changes.removed:
        more = f" and {len(changes.removed) - LISTED} more" if len(changes.removed) > LISTED else ""
        yield f"no longer declared ({len(changes.removed)}): {', '.join(changes.removed[:LISTED])}{more}"


def _hashes(run: Run) -> str:
    return f"{run.before.rpartition('-')[2] if run.before else 'new':>10} -> {run.workload.hash}"


def _makes(run: Run) -> str:
    return "" if run.makes else "nothing new"


# --- Markdown ---------------------------------------------------------------------------------------------------------


def markdown(report: Report) -> str:
    """For a comment on a pull request: the summary first, the details folded."""
    changes = report.changes
    volumes = any(each.there is not None for each in changes.environment.artifacts)
    lines = [f"### {report.overlay}", "", f"**{summary(changes)}**", "",
             f"Compared with {_code(str(report.since))}." if report.since else "Everything is new.", ""]
    if report.notes:  # a note begins its line, so it cannot end the block
        lines += ["```text", *(f"note: {note}" for note in report.notes), "```", ""]
    lines += [f"- {restart(each)}: {_code(each.reason)}" for each in changes.restarts]
    lines += [f"- {rollout(each)}" for each in changes.rollouts]
    parts: list[tuple[str | None, Part]] = [(None, changes.environment), *changes.adapters.items()]
    listed = [(name, part) for name, part in parts
              if (name and not idle(changes, name)) or (name is None and part.status != "unchanged")]
    lines += ["", *_cells(["", "what happens"], (
        [f"`{name}`", title(name, part).partition(": ")[2]] for name, part in listed if name)), ""] if any(
        name for name, _ in listed) else []
    head = ["stage", "artifact", "digest", "compared", *(["on the volume"] if volumes else []), "Job", "why"]
    folded = 0
    for name, part in listed:
        if len("\n".join(lines)) > MARKDOWN_CHARACTERS:
            folded += 1
        elif part.artifacts:
            runs = running(changes, name)
            lines += ["<details>", f"<summary>{name or 'environment'}: {work(part) if name else part.status}</summary>",
                      "", *_cells(head, (
                          [each.stage, each.name, f"`{digest(each)}`", "**new**" if each.new else "unchanged",
                           *([there(each, part, each.stage in runs)] if volumes else []),
                           "runs" if each.stage in runs else "", "<br>".join(map(_code, each.reasons))]
                          for each in part.artifacts)), ""]
            lines += [f"- no artifact depends on {_code(str(each))}" for each in without_effect(part)]
            lines += ["", "</details>", ""]
    if folded:
        lines += [f"The artifacts of {folded} more: `python -m jobs plan {report.overlay}`.", ""]
    new = [run for run in changes.runs if run.new]
    if (new or changes.removed) and not folded:
        lines += ["<details>", f"<summary>Jobs: {len(new)} new names, {len(changes.removed)} no longer declared"
                  "</summary>", "", *_cells(["before", "after", ""], (
                      [f"`{run.before}`" if run.before else "", f"`{run.workload.name}`", _makes(run)] for run in new)),
                  *([""] if changes.removed else []), *(f"- removed: `{name}`" for name in changes.removed), "",
                  "</details>", ""]
    return "\n".join(lines)


def _cells(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    escaped = ([cell.replace("|", "\\|") for cell in cells] for cells in (header, ["---"] * len(header), *rows))
    return [f"| {' | '.join(cells)} |" for cells in escaped]


def _code(text: str) -> str:
    """A text that Markdown shows as it is: no markup, no mention."""
    return f"`{text.replace('`', chr(39))}`"


# --- JSON -------------------------------------------------------------------------------------------------------------


def as_json(report: Report) -> str:
    """For programs: docs/plan.md describes the keys."""
    changes = report.changes
    content = {
        "format": FORMAT,
        "overlay": str(report.overlay),
        "since": {"revision": report.since.name, "commit": report.since.commit} if report.since else None,
        "summary": summary(changes),
        "notes": list(report.notes),
        "environment": _part(changes.environment),
        "adapters": {name: {**_part(part), "work": work(part), "service": part.service, "promoted": part.promoted}
                     for name, part in changes.adapters.items()},
        "jobs": [{"kind": run.workload.kind, "name": run.workload.name, "before": run.before, "runs": run.new,
                  "stages": [{"stage": stage, "adapter": adapter} for stage, adapter in run.workload.stages],
                  "makes": list(run.makes)} for run in changes.runs],
        "removed_jobs": list(changes.removed),
        "serving": {"state": changes.server, "restarts": [{"when": each.when, "reason": each.reason}
                                                          for each in changes.restarts]},
        "other_rollouts": list(changes.rollouts),
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _part(part: Part) -> dict[str, Any]:
    return {
        "status": part.status,
        "settings": [{"key": each.key, "before": shown(each.before), "after": shown(each.after),
                      "artifacts": list(each.artifacts)} for each in part.settings],
        "artifacts": {each.name: {
            "stage": each.stage,
            "path": f"{each.spec.volume}/{each.spec.kind}/{each.spec.digest}" if each.known else None,
            "kind": each.spec.kind, "digest": each.spec.digest if each.known else None,
            "before": each.before if each.known else None, "new": each.new,
            "reasons": list(each.reasons), "there": each.there} for each in part.artifacts},
    }
