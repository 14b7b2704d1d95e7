"""Result of a simulation: as a record, as JSON, and as tables in the terminal."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any, Final

import msgspec
from rich.table import Table
from rich.text import Text

from tidegate.timestamps import US_PER_S
from tidegate.tools.charts import clean
from tidegate.tools.simulate.replay import Replay
from tidegate.tools.simulate.time_order import TimeOrder
from tidegate.tools.terminal import open_console

TOP: Final = 10


class RuleRow(msgspec.Struct, frozen=True):
    """Requests that one rule decided.

    `rule` is `(tier)` for a tier's own limits alone, and `(no rule)` without any limit; `mode` is enforce, shadow, or none. For a
    shadow rule, `blocked` counts requests that it would have blocked. Units are requests where the log has no costs.
    `blocked_in_progress` are those of `blocked` for which no slot was free.
    """

    rule: str
    endpoint: str
    requests: int
    allowed: int
    blocked: int
    tier: str
    mode: str
    allowed_units: int
    blocked_units: int
    blocked_in_progress: int = 0


class TopRow(msgspec.Struct, frozen=True):
    """A subject that a rule blocked often."""

    subject: str
    rule: str
    blocked: int


class WorstMinute(msgspec.Struct, frozen=True):
    """The UTC minute with most blocked requests; `at` is its start (ISO 8601), or None if nothing was blocked."""

    at: str | None
    blocked: int


class Report(msgspec.Struct, frozen=True):
    """Result of a simulation.

    Args:
        lines: read, empty ones left out.
        malformed: of those.
        span_s: from the first request to the last, s.
        rules: what each did, most requests first.
        top_blocked: subjects blocked most.
        worst_minute: the minute with most blocked.
        requests: decided.
        allowed: of those.
        blocked: of those.
        out_of_order: lines earlier than one before them.
        late: of those, too late to be sorted, and decided at a later time than their own.
        refused_paths: requests whose path a live check rejects with 400; not counted by any rule.
        refused_keys: requests with a revoked or expired API key, which a live check rejects with 403.
        untrusted_chains: lines with a chain of addresses of which the last one was counted, as it is no trusted proxy's.
        no_address: lines whose client is not an address; a live check rejects them with 400.
        unknown_keys: requests with an API key that is not in the policy, decided as requests without a key.
        without_subject: requests without the field that names the caller, counted by ip.
        refused_attributes: requests without an attribute that their rule insists on, which a live check rejects with
            400; not counted by any rule.
        evicted: counters dropped because there were too many subjects: their requests may count as allowed too often.
        top_over_by_at_most: how much too high counts of `top_blocked` may be; 0 where they are exact.
        broken: logs that ended early, with the reason.
        from_: moment of the first request, ISO 8601.
        to: moment of the last.
        malformed_examples: the first few, with their places and reasons.
        refused_examples: the first few, with the reasons.
        no_address_examples: the first few, with their places.
        series: moment in unix seconds, allowed, blocked.
        step_s: length of a step of the series, s.
        with_costs: whether costs were read from the log.
        not_simulated: rules whose limits of requests in progress or of failures were not applied.
    """

    lines: int
    malformed: int
    span_s: float
    rules: list[RuleRow]
    top_blocked: list[TopRow]
    worst_minute: WorstMinute
    requests: int
    allowed: int
    blocked: int
    out_of_order: int
    late: int
    refused_paths: int
    refused_keys: int
    no_address: int
    untrusted_chains: int
    unknown_keys: int
    without_subject: int
    refused_attributes: int
    evicted: int
    top_over_by_at_most: int
    broken: list[str]
    from_: str | None = msgspec.field(name="from")
    to: str | None
    malformed_examples: list[str]
    refused_examples: list[str]
    no_address_examples: list[str]
    series: list[tuple[int, int, int]]
    step_s: int
    with_costs: bool = False
    not_simulated: list[str] = []
    with_durations: bool = False
    without_duration: int = 0
    ended_early: int = 0


def make_report(
    replay: Replay,
    order: TimeOrder,
    *,
    lines: int,
    malformed: int,
    examples: Sequence[str],
    broken: Sequence[str],
    no_address: int = 0,
    untrusted_chains: int = 0,
    no_address_examples: Sequence[str] = (),
    with_costs: bool = False,
) -> Report:
    """Create the report of a simulation after its end; the arguments are its totals and examples."""
    rows = [
        RuleRow(
            tally.rule,
            tally.endpoint,
            tally.allowed + tally.blocked,
            tally.allowed,
            tally.blocked,
            tally.tier,
            tally.mode,
            tally.allowed_units,
            tally.blocked_units,
            tally.blocked_in_progress,
        )
        for tally in sorted(
            replay.tallies.values(), key=lambda each: (each.mode == "shadow", -(each.allowed + each.blocked), each.rule)
        )
    ]
    counted = [row for row in rows if row.mode != "shadow"]
    step_s = replay.series.step_s
    return Report(
        lines=lines,
        malformed=malformed,
        span_s=0.0 if replay.first_us is None else (replay.now_us - replay.first_us) / US_PER_S,
        rules=rows,
        top_blocked=[TopRow(replay.label(subject), rule, blocked) for (subject, rule), blocked in replay.top.top(TOP)],
        worst_minute=WorstMinute(*((_iso(replay.worst_minute[0]), replay.worst_minute[1]) if replay.worst_minute else (None, 0))),
        requests=sum(row.requests for row in counted),
        allowed=sum(row.allowed for row in counted),
        blocked=sum(row.blocked for row in counted),
        out_of_order=order.out_of_order,
        late=order.late,
        refused_paths=replay.refused_count,
        refused_keys=replay.refused_keys,
        no_address=no_address,
        untrusted_chains=untrusted_chains,
        unknown_keys=replay.unknown_keys,
        without_subject=replay.without_subject,
        refused_attributes=replay.refused_attributes,
        evicted=replay.counters.evicted,
        top_over_by_at_most=replay.top.floor,
        broken=list(broken),
        from_=None if replay.first_us is None else _iso(replay.first_us),
        to=None if replay.first_us is None else _iso(replay.now_us),
        malformed_examples=list(examples),
        refused_examples=[f"{target[:80]}: {reason}" for target, reason in replay.refused],
        no_address_examples=list(no_address_examples),
        series=[(number * step_s, *counts) for number, counts in sorted(replay.series.steps.items())],  # type: ignore[misc]
        step_s=step_s,
        with_costs=with_costs,
        not_simulated=replay.not_applied,
        with_durations=replay.in_progress is not None,
        without_duration=replay.without_duration,
        ended_early=0 if replay.in_progress is None else replay.in_progress.ended_early,
    )


def as_json(report: Report) -> dict[str, Any]:
    """The report as JSON types."""
    built: dict[str, Any] = msgspec.to_builtins(report)
    return built


def print_report(report: Report, policy: str) -> None:
    """Print the report as tables on stdout; `policy` is the path of the policy, for the title."""
    # Markup is off and all text is cleaned: text in a log was written by the clients.
    console = open_console(markup=False, highlight=False, emoji=False, soft_wrap=True)
    console.print(
        f"{report.requests:,} requests from {report.from_} to {report.to} under {clean(policy)}: "
        f"{report.allowed:,} allowed, {report.blocked:,} blocked ({_share(report.blocked, report.requests)})"
    )
    console.print()
    further = [
        *(("units allowed", "units blocked") if report.with_costs else ()),
        *(("no free slot",) if report.with_durations else ()),
    ]
    table = _table(("rule", "tier", "requests", "allowed", "blocked", "share", *further))
    for row in report.rules:
        name = row.rule + (" (shadow)" if row.mode == "shadow" and "shadow" not in row.rule else "")
        numbers: tuple[str, ...] = (
            f"{row.requests:,}",
            f"{row.allowed:,}",
            f"{row.blocked:,}",
            _share(row.blocked, row.requests),
        )
        if report.with_costs:
            numbers += (f"{row.allowed_units:,}", f"{row.blocked_units:,}")
        if report.with_durations:
            numbers += (f"{row.blocked_in_progress:,}",)
        table.add_row(Text(clean(name)), Text(clean(row.tier)), *numbers)
    console.print(table)
    if report.top_blocked:
        console.print()
        top = _table(("most blocked", "rule", "blocked"))
        for entry in report.top_blocked:
            top.add_row(Text(clean(entry.subject)), Text(clean(entry.rule)), f"{entry.blocked:,}")
        console.print(top)
        console.print()
        console.print(f"Worst minute: {report.worst_minute.at}, {report.worst_minute.blocked:,} blocked")
    console.print()
    for line in notes(report):
        console.print(line)


def notes(report: Report) -> list[str]:
    """Notes on skipped and rejected lines, one per line, safe for a terminal."""
    lines = [
        f"{report.lines:,} lines read, {report.malformed:,} malformed; {report.out_of_order:,} out of order, "
        f"{report.late:,} too late to be sorted"
    ]
    lines.extend(f"  malformed: {clean(example)}" for example in report.malformed_examples)
    lines.extend(clean(reason) for reason in report.broken)
    if report.refused_paths:
        lines.append(
            f"rejected with 400 because of the encoding of their paths, and not counted by any rule: {report.refused_paths:,}"
        )
        lines.extend(f"  rejected: {clean(example)}" for example in report.refused_examples)
    if report.refused_keys:
        lines.append(f"{report.refused_keys:,} requests have a revoked or expired API key, which is rejected with 403")
    if report.no_address:
        lines.append(f"{report.no_address:,} lines have a client that is not an address, which is rejected with 400")
        lines.extend(f"  rejected: {clean(example)}" for example in report.no_address_examples)
    if report.untrusted_chains:
        lines.append(
            f"{report.untrusted_chains:,} lines have a chain of addresses, of which the last was counted: if it is one of "
            "your proxies, name it with --trusted-proxies"
        )
    if report.unknown_keys:
        lines.append(
            f"{report.unknown_keys:,} requests have an API key that is not in the policy: decided as requests without a key"
        )
    if report.without_subject:
        lines.append(f"{report.without_subject:,} requests do not identify their caller and were counted by ip")
    if report.refused_attributes:
        lines.append(
            f"{report.refused_attributes:,} requests lack an attribute that their rule counts by, which is rejected with 400 "
            '(on_missing = "deny"): name its field with --field NAME=FIELD if the log has it'
        )
    if report.not_simulated:
        lines.append(
            "not simulated, because a log does not say how requests ended: limits of failures, of the rules "
            if report.with_durations
            else "not simulated, because the log does not say how long requests took (--duration-field) and how they ended: "
            "limits of requests in progress and of failures, of the rules "
        )
        lines[-1] += clean(", ".join(report.not_simulated[:20]))
    if report.without_duration:
        lines.append(
            f"{report.without_duration:,} requests have no duration: they were denied where no slot was free, but took none, so "
            "limits of requests in progress may have blocked too few"
        )
    if report.ended_early:
        lines.append(f"{report.ended_early:,} requests in progress lost their slots too early: increase --max-subjects")
    if report.top_over_by_at_most:
        lines.append(
            "more subjects were blocked than are counted exactly: the counts of those blocked most may be "
            f"too high by up to {report.top_over_by_at_most:,}"
        )
    if report.evicted:
        lines.append(f"{report.evicted:,} counters were evicted: increase --max-subjects")
    return lines


def _table(columns: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        numeric = column not in ("rule", "tier", "most blocked")
        table.add_column(column, justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
    return table


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _iso(us: int) -> str:
    return datetime.datetime.fromtimestamp(us / US_PER_S, datetime.UTC).isoformat(timespec="seconds")
