"""Parts of self-contained HTML pages: inline SVG and tables. Nothing is loaded from outside, everything is escaped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Final

from tidegate.errors import SettingsError

WIDTH: Final = 960
HEIGHT: Final = 260
_LEFT: Final = 56
_BOTTOM: Final = 28
_SHORT: Final = 10
COLOURS: Final = ("allowed", "blocked")
"""CSS classes of lines and bars."""
STYLE: Final = """
:root { color-scheme: light dark; --ink: #1b2733; --soft: #5b6b7b; --line: #d5dde5; --paper: #fff;
  --allowed: #2166ac; --blocked: #d6604d; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9aa7b4; --line: #313d49; --paper: #10161d; --allowed: #6aaeea; --blocked: #f08a72; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1000px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
p.sum { font-size: 1.1rem; } .soft { color: var(--soft); }
table { border-collapse: collapse; width: 100%; } th { text-align: left; font-weight: 600; }
th, td { padding: .3rem .6rem .3rem 0; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
td.short, th.short { white-space: nowrap; overflow-wrap: normal; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; overflow-wrap: normal; white-space: nowrap; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--soft); font-size: 12px; }
.grid { stroke: var(--line); } .allowed { stroke: var(--allowed); fill: none; stroke-width: 1.5; }
.blocked { stroke: var(--blocked); fill: none; stroke-width: 1.5; } rect.blocked { fill: var(--blocked); stroke: none; }
.key::before { content: ""; display: inline-block; width: 1rem; height: .2rem; vertical-align: middle;
  margin-right: .4rem; background: currentColor; }
.key { margin-right: 1.5rem; } .of-allowed { color: var(--allowed); } .of-blocked { color: var(--blocked); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; color: var(--soft); }
"""


def head(title: str) -> str:
    """The HTML of a page with this title up to the start of its body."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{safe(title)}</title><style>{STYLE}</style></head><body>"""


def clean(text: str) -> str:
    """Make untrusted text safe for a terminal: control and invisible characters are replaced by escapes."""
    return text if text.isprintable() else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def safe(text: str) -> str:
    """Make untrusted text safe for HTML: non-printable characters are replaced by escapes, then it is HTML-escaped."""
    return escape(clean(text))


def lines(
    series: Sequence[tuple[str, Sequence[float]]],
    labels: Sequence[str],
    about: str,
    shown: Callable[[float], str] = lambda value: f"{round(value):,}",
) -> str:
    """A line chart as SVG, over steps of equal width.

    Args:
        series: title and values of each line, at most as many as `COLOURS`; as many values as labels.
        labels: labels of the steps; the first, the middle and the last are drawn.
        about: text alternative for screen readers.
        shown: formats a value.
    """
    highest = max(max(values) for _, values in series) or 1
    width, height = WIDTH - _LEFT - 8, HEIGHT - _BOTTOM - 12
    last = len(labels) - 1

    def point(number: int, value: float) -> str:
        across = _LEFT + width * (number / last if last else 0.5)
        return f"{across:.1f},{12 + height * (1 - value / highest):.1f}"

    drawn = []
    for part in (0, 0.5, 1):
        y = 12 + height * (1 - part)
        drawn.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - 8}" y1="{y:.1f}" y2="{y:.1f}"/>')
        drawn.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{safe(shown(highest * part))}</text>')
    for part, anchor in ((0, "start"), (0.5, "middle"), (1, "end")):
        label = labels[round(last * part)]
        drawn.append(f'<text x="{_LEFT + width * part:.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{safe(label)}</text>')
    for colour, (title, values) in zip(COLOURS, series, strict=False):
        path = " ".join(point(number, value) for number, value in enumerate(values))
        drawn.append(f'<polyline class="{colour}" points="{path}"><title>{safe(title)}</title></polyline>')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{safe(about)}">{"".join(drawn)}</svg>'


def bars(
    values: Sequence[tuple[str, float]],
    about: str = "blocked requests",
    text: Callable[[float], str] = lambda value: f"{value:,}",
) -> str:
    """A bar chart as SVG.

    Args:
        values: label and value of each bar.
        about: text alternative for screen readers.
        text: formats a value.
    """
    if not values:
        return '<p class="soft">none</p>'
    highest = max(value for _, value in values)
    drawn = []
    for number, (label, value) in enumerate(values):
        y = number * 26
        length = max((WIDTH - 460) * value / highest if highest else 0, 1)
        shown = label if len(label) <= 48 else label[:47] + "…"
        drawn.append(f'<text x="340" y="{y + 17}" text-anchor="end">{safe(shown)}</text>')
        drawn.append(
            f'<rect class="blocked" x="350" y="{y + 4}" width="{length:.1f}" height="18">'
            f"<title>{safe(label)}: {safe(text(value))}</title></rect>"
        )
        drawn.append(f'<text x="{356 + length:.1f}" y="{y + 17}">{safe(text(value))}</text>')
    return f'<svg viewBox="0 0 {WIDTH} {len(values) * 26 + 4}" role="img" aria-label="{safe(about)}">{"".join(drawn)}</svg>'


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], numbers_from: int) -> str:
    """An HTML table; columns from index `numbers_from` on are aligned right."""

    def css_class(index: int, value: str) -> str:
        if index >= numbers_from:
            return " class=number"
        # Short values stay on one line; long ones may break anywhere, so that the page does not become wider.
        return " class=short" if len(value) <= _SHORT else ""

    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(f"<{tag}{css_class(index, value)}>{safe(value)}</{tag}>" for index, value in enumerate(values))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><thead><tr>{cells('th', columns)}</tr></thead><tbody>{body}</tbody></table>"


def write_page(path: Path, page: str) -> None:
    """Write an HTML page to the file of the option `--html`.

    Raises:
        SettingsError: if it cannot be written.
    """
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"--html {path} cannot be written: {error.strerror or error}") from None
