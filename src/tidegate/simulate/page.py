"""The report as one self-contained page: charts in inline SVG, nothing fetched, everything escaped."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from html import escape
from typing import Final

from tidegate._version import __version__
from tidegate.simulate.report import Report, clean, notes
from tidegate.simulate.tallies import coarser

_WIDTH: Final = 960
_HEIGHT: Final = 260
_LEFT: Final = 56
_BOTTOM: Final = 28
_POINTS: Final = 120
_STYLE: Final = """
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
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; overflow-wrap: normal; white-space: nowrap; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--soft); font-size: 12px; }
.grid { stroke: var(--line); } .allowed { stroke: var(--allowed); fill: none; stroke-width: 1.5; }
.blocked { stroke: var(--blocked); fill: none; stroke-width: 1.5; } rect.blocked { fill: var(--blocked); stroke: none; }
.key::before { content: ""; display: inline-block; width: 1rem; height: .2rem; vertical-align: middle;
  margin-right: .4rem; background: currentColor; }
.key { margin-right: 1.5rem; } .of-allowed { color: var(--allowed); } .of-blocked { color: var(--blocked); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; color: var(--soft); }
"""


def render_page(report: Report, policy: str, logs: Sequence[str]) -> str:
    """The page.

    Args:
        report: what was found.
        policy: path of the policy.
        logs: paths of the logs.

    Returns:
        HTML.
    """
    share = f"{report.blocked / report.requests:.1%}" if report.requests else "none"
    worst = (
        f"Worst minute: {report.worst_minute.at}, {report.worst_minute.blocked:,} blocked."
        if report.worst_minute.at
        else "Nothing was blocked."
    )
    rules = [
        (
            row.rule,
            row.tier,
            row.mode,
            f"{row.requests:,}",
            f"{row.allowed:,}",
            f"{row.blocked:,}",
            _share(row.blocked, row.requests),
        )
        for row in report.rules
    ]
    blocked_by_rule = [
        (row.rule + (" (shadow)" if row.mode == "shadow" and "shadow" not in row.rule else ""), row.blocked)
        for row in report.rules
        if row.blocked
    ][:12]
    top = [(entry.subject, entry.rule, f"{entry.blocked:,}") for entry in report.top_blocked]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Tidegate simulation</title><style>{_STYLE}</style></head><body>
<h1>What {_safe(policy)} would have done</h1>
<p class="sum">{report.requests:,} requests from {_safe(report.from_ or "-")} to {_safe(report.to or "-")}:
{report.allowed:,} allowed, <b>{report.blocked:,} blocked</b> ({share}). {worst}</p>
<h2>Over time</h2>
<p><span class="key of-allowed">allowed</span><span class="key of-blocked">blocked</span>
<span class="soft">requests per {_step_text(_merged(report)[1])}</span></p>
{_lines(report)}
<h2>Blocked by rule</h2>
{_bars(blocked_by_rule)}
{_table(("rule", "tier", "mode", "requests", "allowed", "blocked", "share"), rules, 3)}
<h2>Blocked most</h2>
{_bars([(entry.subject, entry.blocked) for entry in report.top_blocked])}
{_table(("subject", "rule", "blocked"), top, 2)}
<h2>Notes</h2>
<pre>{escape(chr(10).join(notes(report)))}</pre>
<p class="soft">Tidegate {__version__}, from {_safe(", ".join(logs))}.</p>
</body></html>
"""


def _merged(report: Report) -> tuple[list[tuple[int, int, int]], int]:
    """The series in at most 120 steps, with zeros where nothing came; and the length of a step in s."""
    if not report.series:
        return [], report.step_s
    step_s = report.step_s
    while (report.series[-1][0] // step_s - report.series[0][0] // step_s) >= _POINTS:
        step_s = coarser(step_s)
    sums: dict[int, list[int]] = {}
    for at, allowed, blocked in report.series:
        both = sums.setdefault(at // step_s, [0, 0])
        both[0] += allowed
        both[1] += blocked
    numbers = range(min(sums), max(sums) + 1)
    return [(number * step_s, *sums.get(number, (0, 0))) for number in numbers], step_s


def _lines(report: Report) -> str:
    points, _ = _merged(report)
    if not points:
        return '<p class="soft">no requests</p>'
    most = max(max(allowed, blocked) for _, allowed, blocked in points) or 1
    width, height = _WIDTH - _LEFT - 8, _HEIGHT - _BOTTOM - 12

    def place(number: int, value: int) -> str:
        across = _LEFT + width * (number / (len(points) - 1) if len(points) > 1 else 0.5)
        return f"{across:.1f},{12 + height * (1 - value / most):.1f}"

    drawn = []
    for part in (0, 0.5, 1):
        y = 12 + height * (1 - part)
        drawn.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - 8}" y1="{y:.1f}" y2="{y:.1f}"/>')
        drawn.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{round(most * part):,}</text>')
    for part, anchor in ((0, "start"), (0.5, "middle"), (1, "end")):
        at = points[round((len(points) - 1) * part)][0]
        moment = datetime.datetime.fromtimestamp(at, datetime.UTC).strftime("%Y-%m-%d %H:%M")
        drawn.append(f'<text x="{_LEFT + width * part:.1f}" y="{_HEIGHT - 8}" text-anchor="{anchor}">{moment}</text>')
    for name, column in (("allowed", 1), ("blocked", 2)):
        path = " ".join(place(number, point[column]) for number, point in enumerate(points))
        total = sum(point[column] for point in points)
        drawn.append(f'<polyline class="{name}" points="{path}"><title>{name}: {total:,}</title></polyline>')
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="requests over time">{"".join(drawn)}</svg>'


def _bars(values: Sequence[tuple[str, int]]) -> str:
    if not values:
        return '<p class="soft">none</p>'
    most = max(value for _, value in values)
    drawn = []
    for number, (label, value) in enumerate(values):
        y = number * 26
        length = max((_WIDTH - 420) * value / most, 1)
        shown = label if len(label) <= 48 else label[:47] + "…"
        drawn.append(f'<text x="340" y="{y + 17}" text-anchor="end">{_safe(shown)}</text>')
        drawn.append(
            f'<rect class="blocked" x="350" y="{y + 4}" width="{length:.1f}" height="18">'
            f"<title>{_safe(label)}: {value}</title></rect>"
        )
        drawn.append(f'<text x="{356 + length:.1f}" y="{y + 17}">{value:,}</text>')
    return f'<svg viewBox="0 0 {_WIDTH} {len(values) * 26 + 4}" role="img" aria-label="blocked requests">{"".join(drawn)}</svg>'


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], numbers_from: int) -> str:
    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=number' if place >= numbers_from else ''}>{_safe(value)}</{tag}>"
            for place, value in enumerate(values)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><thead><tr>{cells('th', columns)}</tr></thead><tbody>{body}</tbody></table>"


def _safe(text: str) -> str:
    return escape(clean(text))


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _step_text(seconds: int) -> str:
    for name, length in (("day", 86_400), ("hour", 3_600), ("minute", 60)):
        if seconds % length == 0:
            return name if seconds == length else f"{seconds // length:,} {name}s"
    return f"{seconds} s"
