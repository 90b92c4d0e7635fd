"""A compiled pipeline as a picture (SVG): each step right of those that it follows; one with a condition is dashed."""

from __future__ import annotations

from html import escape
from typing import Any

import yaml

WIDTH, HEIGHT, ACROSS, DOWN, MARGIN = 184, 34, 40, 18, 12  # pixels: of a box, and between boxes


def svg(text: str, adapter: str = "") -> str:
    """The steps of a compiled pipeline, and what each follows.

    Args:
        text: IR YAML.
        adapter: its name is left out of the names of the steps.
    """
    spec = next(iter(yaml.safe_load_all(text)))
    after = {_title(spec, name): [_title(spec, each) for each in task.get("dependentTasks", [])]
             for name, task in spec["root"]["dag"]["tasks"].items()}
    # From the right: a step is drawn just before the first that follows it, so that no line crosses a box.
    from_right: dict[str, int] = {}
    while len(from_right) < len(after):
        followers = {name: [each for each in after if name in after[each]] for name in after.keys() - from_right.keys()}
        from_right |= {name: max((from_right[each] + 1 for each in of_name), default=0)
                       for name, of_name in followers.items() if all(each in from_right for each in of_name)}
    place: dict[str, tuple[int, int]] = {}
    for number in range(max(from_right.values()), -1, -1):
        names = sorted((name for name in after if from_right[name] == number), key=lambda name: not after[name])
        x = MARGIN + (max(from_right.values()) - number) * (WIDTH + ACROSS)
        place |= {name: (x, MARGIN + row * (HEIGHT + DOWN)) for row, name in enumerate(names)}
    boxes = [f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#f4f7fb" stroke="#3b6ea5"'
             f'{" stroke-dasharray=" + chr(34) + "5 3" + chr(34) if name.startswith("if: ") else ""}/>'
             f'<text x="{x + WIDTH / 2}" y="{y + HEIGHT / 2 + 4}" text-anchor="middle">'
             f'{escape(name.replace(f"-{adapter}", "") if adapter else name)}</text>'
             for name, (x, y) in place.items()]
    lines = [_line(place[before], place[name]) for name in after for before in after[name]]
    width = max(x for x, _ in place.values()) + WIDTH + MARGIN
    height = max(y for _, y in place.values()) + HEIGHT + MARGIN
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="100%" '
            f'style="max-width: {width}px" font-family="sans-serif" font-size="13">'
            f'{"".join(lines)}{"".join(boxes)}</svg>')


def _title(spec: Any, name: str) -> str:
    """A step's name; of a condition, `if: ` and the steps that it guards."""
    task = spec["root"]["dag"]["tasks"][name]
    if "condition" not in task.get("triggerPolicy", {}):
        return name
    guarded = spec["components"][task["componentRef"]["name"]]["dag"]["tasks"]
    return f"if: {', '.join(guarded)}"


def _line(start: tuple[int, int], end: tuple[int, int]) -> str:
    x1, y1, x2, y2 = start[0] + WIDTH, start[1] + HEIGHT // 2, end[0], end[1] + HEIGHT // 2
    middle = (x1 + x2) // 2
    return (f'<path d="M{x1} {y1} C{middle} {y1} {middle} {y2} {x2 - 6} {y2}" fill="none" stroke="#8aa4c0"/>'
            f'<path d="M{x2 - 7} {y2 - 4} L{x2} {y2} L{x2 - 7} {y2 + 4} z" fill="#8aa4c0"/>')
