"""The report as one self-contained HTML page with inline SVG charts; everything is escaped."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from html import escape
from typing import Final

from tidegate._version import __version__
from tidegate.tools.charts import bars, head, lines, safe, table
from tidegate.tools.simulate.report import Report, notes
from tidegate.tools.simulate.tallies import coarser

_POINTS: Final = 120


def render_page(report: Report, policy: str, logs: Sequence[str]) -> str:
    """Render the page as HTML; `policy` and `logs` are paths, for its texts."""
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
    return f"""{head("Tidegate simulation")}
<h1>What {safe(policy)} would have done</h1>
<p class="sum">{report.requests:,} requests from {safe(report.from_ or "-")} to {safe(report.to or "-")}:
{report.allowed:,} allowed, <b>{report.blocked:,} blocked</b> ({share}). {worst}</p>
<h2>Over time</h2>
<p><span class="key of-allowed">allowed</span><span class="key of-blocked">blocked</span>
<span class="soft">requests per {_step_text(_merged(report)[1])}</span></p>
{_lines(report)}
<h2>Blocked by rule</h2>
{bars(blocked_by_rule)}
{table(("rule", "tier", "mode", "requests", "allowed", "blocked", "share"), rules, 3)}
<h2>Blocked most</h2>
{bars([(entry.subject, entry.blocked) for entry in report.top_blocked])}
{table(("subject", "rule", "blocked"), top, 2)}
<h2>Notes</h2>
<pre>{escape(chr(10).join(notes(report)))}</pre>
<p class="soft">Tidegate {__version__}, from {safe(", ".join(logs))}.</p>
</body></html>
"""


def _merged(report: Report) -> tuple[list[tuple[int, int, int]], int]:
    """The series in at most 120 steps, with zeros for steps without requests; and the length of a step in s."""
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
    labels = [datetime.datetime.fromtimestamp(at, datetime.UTC).strftime("%Y-%m-%d %H:%M") for at, _, _ in points]
    columns = (("allowed", [point[1] for point in points]), ("blocked", [point[2] for point in points]))
    return lines([(f"{name}: {sum(values):,}", values) for name, values in columns], labels, "requests over time")


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _step_text(seconds: int) -> str:
    for name, length in (("day", 86_400), ("hour", 3_600), ("minute", 60)):
        if seconds % length == 0:
            return name if seconds == length else f"{seconds // length:,} {name}s"
    return f"{seconds} s"
