"""Diagrams: a text form, drawn as SVG.

A block of a page,

    ```diagram
    alt: what the picture shows, for those who do not see it
    box api 3,1 The API | FastAPI, Go, anything
    box gate 1,1 2x1 Gate
    arrow gate -> api allowed
    ```

is drawn on a grid: `column,row` of a box, then its size in columns and rows if it is not 1x1, then its title, and after `|` a
second line. `soft` in place of `box` draws a dashed one, `dashed` in place of `arrow` a dashed arrow. Arrows run between boxes
that share a row or a column. The drawing has no color of its own: text and lines have the color of the text around, so that it
can be read on light and dark pages.

    python scripts/diagrams.py docs/index.md docs/img/overview.svg

draws the first diagram of a page into a file, which follows the reader's light or dark setting by itself.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Final

CELL_WIDTH: Final = 200
CELL_HEIGHT: Final = 92
GAP_X: Final = 40
"""Between boxes of one row, px; half of it on each side."""
GAP_Y: Final = 36
_CHARACTER_PX: Final = {"title": 8.4, "text": 6.6, "label": 6.2}
"""The widest average of the fonts that browsers use for system-ui."""
_BOX: Final = re.compile(r"(box|soft) (\w+) (\d+),(\d+)(?: (\d+)x(\d+))? ([^|]+)(?:\|(.*))?")
_ARROW: Final = re.compile(r"(arrow|dashed) (\w+) -> (\w+)(?: (.*))?")
_FENCE: Final = re.compile(r"^```diagram\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_STYLE: Final = """
text{font-family:system-ui,sans-serif;fill:currentColor;stroke:none}
.title{font-size:14px;font-weight:600;text-anchor:middle}.text{font-size:12px;text-anchor:middle}
.label{font-size:11px;text-anchor:middle}rect{fill:currentColor;fill-opacity:.07;stroke:currentColor;stroke-width:1.2}
.soft,.dashed{stroke-dasharray:5 4}path{stroke:currentColor;stroke-width:1.2;fill:none}.head{fill:currentColor;stroke:none}
"""
_ENTITY: Final = re.compile(r"(\w+) \{\n(.*?)\n\s*\}", re.DOTALL)
_COLUMN: Final = re.compile(r'(\w+) (\w+)(?: (PK|FK|UK))?(?: "([^"]*)")?')
_RELATION: Final = re.compile(r"(\w+) \|\|--o\{ (\w+) : (\w+)")
_OWN_COLORS: Final = "svg{color:#1f2328}@media (prefers-color-scheme:dark){svg{color:#e6edf3}}"


class DiagramError(ValueError):
    """A line of a diagram that cannot be drawn."""


@dataclass(frozen=True)
class _Box:
    kind: str
    left: float
    top: float
    width: float
    height: float
    title: str
    text: str

    @property
    def middle(self) -> tuple[float, float]:
        return self.left + self.width / 2, self.top + self.height / 2


def draw(source: str, *, stands_alone: bool = False) -> str:
    """Draw a diagram.

    Args:
        source: in the text form above.
        stands_alone: for a file of its own, with its own colors.

    Returns:
        An `svg` element.

    Raises:
        DiagramError: with the line, if it is not understood, names no box, or has a text that does not fit.
    """
    boxes: dict[str, _Box] = {}
    arrows: list[str] = []
    alt = ""
    for line in filter(None, map(str.strip, source.splitlines())):
        if line.startswith("alt:"):
            alt = line.removeprefix("alt:").strip()
        elif found := _BOX.fullmatch(line):
            boxes[found[2]] = _box(found, line)
        elif found := _ARROW.fullmatch(line):
            for name in (found[2], found[3]):
                if name not in boxes:
                    raise DiagramError(f"no box {name!r} before the line {line!r}")
            arrows.append(_arrow(found[1], boxes[found[2]], boxes[found[3]], found[4] or "", line))
        else:
            raise DiagramError(f"not a line of a diagram: {line!r}")
    if not alt:
        raise DiagramError("a diagram needs a line 'alt: …' for readers who do not see it")
    width = max(box.left + box.width for box in boxes.values()) + 2
    height = max(box.top + box.height for box in boxes.values()) + 2
    style = _STYLE + (_OWN_COLORS if stands_alone else "")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="diagram" role="img" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'style="max-width:{width:.0f}px;width:100%;height:auto">',
        f"<title>{escape(alt)}</title><style>{style.replace(chr(10), '')}</style>",
        *map(_drawn, boxes.values()),
        *arrows,
        "</svg>",
    ]
    return "\n".join(parts)


def _box(found: re.Match[str], line: str) -> _Box:
    columns, rows = int(found[5] or 1), int(found[6] or 1)
    width = columns * CELL_WIDTH - GAP_X
    title, text = found[7].strip(), (found[8] or "").strip()
    for kind, written in (("title", title), ("text", text)):
        if len(written) * _CHARACTER_PX[kind] > width:
            raise DiagramError(f"{written!r} is too long for its box of {width} px: {line!r}")
    left, top = (int(found[3]) - 1) * CELL_WIDTH + 2, (int(found[4]) - 1) * CELL_HEIGHT + 2
    return _Box(found[1], left, top, width, rows * CELL_HEIGHT - GAP_Y, title, text)


def _drawn(box: _Box) -> str:
    x, y = box.middle
    frame = f'<rect class="{box.kind}" x="{box.left:g}" y="{box.top:g}" width="{box.width:g}" height="{box.height:g}" rx="7"/>'
    if not box.text:
        return f'{frame}<text class="title" x="{x:g}" y="{y + 5:g}">{escape(box.title)}</text>'
    lines = f'<text class="title" x="{x:g}" y="{y - 4:g}">{escape(box.title)}</text>'
    return f'{frame}{lines}<text class="text" x="{x:g}" y="{y + 15:g}">{escape(box.text)}</text>'


def _arrow(kind: str, start: _Box, end: _Box, label: str, line: str) -> str:
    across = _shared(start.top, start.height, end.top, end.height)
    down = _shared(start.left, start.width, end.left, end.width)
    if across is not None:
        rightwards = end.left > start.left
        x1 = start.left + start.width if rightwards else start.left
        x2 = end.left if rightwards else end.left + end.width
        y1 = y2 = across
        step = 7 if rightwards else -7
        head = f"M{x2:g} {y2:g}l{-step} -4v8z"
        room, x, y = abs(x2 - x1) + GAP_X, (x1 + x2) / 2, y1 - 6
    elif down is not None:
        downwards = end.top > start.top
        y1 = start.top + start.height if downwards else start.top
        y2 = end.top if downwards else end.top + end.height
        x1 = x2 = down
        step = 7 if downwards else -7
        head = f"M{x2:g} {y2:g}l-4 {-step}h8z"
        room, x, y = CELL_WIDTH, x1, (y1 + y2) / 2 + 4
        # Beside the line, not on it.
        x += len(label) * _CHARACTER_PX["label"] / 2 + 8
    else:
        raise DiagramError(f"the boxes share neither a row nor a column: {line!r}")
    if len(label) * _CHARACTER_PX["label"] > room:
        raise DiagramError(f"{label!r} is too long for its arrow of {room:g} px: {line!r}")
    written = f'<text class="label" x="{x:g}" y="{y:g}">{escape(label)}</text>' if label else ""
    return f'<path class="{kind}" d="M{x1:g} {y1:g}L{x2:g} {y2:g}"/><path class="head" d="{head}"/>{written}'


def _shared(first: float, size: float, second: float, other: float) -> float | None:
    """The middle of what two spans share; None where they share less than 8 px."""
    low, high = max(first, second), min(first + size, second + other)
    return (low + high) / 2 if high - low >= 8 else None


def fence(source: str, language: str, css_class: str, options: dict[str, Any], md: Any, **_: Any) -> str:
    """Draw a block of a page: a custom fence of pymdownx.superfences."""
    del language, css_class, options, md
    return f'<figure style="width:100%">{draw(source)}</figure>'


def schema(source: str, language: str, css_class: str, options: dict[str, Any], md: Any, **_: Any) -> str:
    """Write an `erDiagram` of Mermaid as tables: a custom fence of pymdownx.superfences, which loads no script.

    Raises:
        DiagramError: with the line, for any other diagram of Mermaid.
    """
    del language, css_class, options, md
    if not source.startswith("erDiagram\n"):
        raise DiagramError(f"of Mermaid, only erDiagram is understood: {source.splitlines()[0]!r}")
    parts = [f"<p><code>{one}</code> {verb} many <code>{many}</code></p>" for one, many, verb in _RELATION.findall(source)]
    for name, body in _ENTITY.findall(source):
        rows = []
        for line in map(str.strip, body.splitlines()):
            found = _COLUMN.fullmatch(line)
            if found is None:
                raise DiagramError(f"not a column of {name}: {line!r}")
            kind, column, key, note = found.groups("")
            cells = (f"<code>{column}</code>", kind, key, escape(note))
            rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
        head = f"<tr><th>{name}</th><th>type</th><th>key</th><th>meaning</th></tr>"
        parts.append(f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>")
    return "\n".join(parts)


def main() -> None:
    """Draw the first diagram of a page into a file."""
    page, file = map(Path, sys.argv[1:])
    found = _FENCE.search(page.read_text())
    if found is None:
        raise SystemExit(f"{page} has no block ```diagram")
    file.write_text(draw(found[1], stands_alone=True) + "\n")


if __name__ == "__main__":
    main()
