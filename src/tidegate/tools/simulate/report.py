"""What a simulation found: as a record, as JSON, as a table in the terminal."""

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
    """What one rule did.

    Args:
        rule: its name; `(tier)` for a tier's own limits alone, `(no rule)` where nothing limits.
        endpoint: its pattern.
        requests: it answered.
        allowed: of those.
        blocked: of those; for a shadow rule: would have been.
        tier: name of its tier.
        mode: enforce, shadow, or none.
    """

    rule: str
    endpoint: str
    requests: int
    allowed: int
    blocked: int
    tier: str
    mode: str


class TopRow(msgspec.Struct, frozen=True):
    """A subject that was blocked often.

    Args:
        subject: who.
        rule: by which rule.
        blocked: how often.
    """

    subject: str
    rule: str
    blocked: int


class WorstMinute(msgspec.Struct, frozen=True):
    """The UTC minute with most blocked requests.

    Args:
        at: its start, ISO 8601; None where nothing was blocked.
        blocked: requests blocked in it.
    """

    at: str | None
    blocked: int


class Report(msgspec.Struct, frozen=True):
    """What a simulation found.

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
        late: of those, decided at a later moment than their own because they came too late to be put in order.
        refused_paths: requests whose path the live door refuses with 400; decided and charged by no rule.
        refused_keys: requests whose API key the policy has revoked or let expire by then; the live door refuses them with 403.
        untrusted_chains: lines with a chain of addresses of which the last one was counted, as it is no trusted proxy's.
        no_address: lines whose client is not an address; the live door refuses such a check with 400.
        unknown_keys: requests whose API key the policy does not know, decided as if they had brought none.
        without_subject: requests without the field that names the caller, counted by ip.
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
) -> Report:
    """Sum a simulation up.

    Args:
        replay: after its end.
        order: after its end.
        lines: read.
        malformed: of those.
        examples: of malformed lines.
        broken: why logs ended early.
        no_address: lines whose client is not an address.
        untrusted_chains: lines with a chain that ends with an untrusted address.
        no_address_examples: of those.

    Returns:
        The report.
    """
    rows = [
        RuleRow(tally.rule, tally.endpoint, tally.allowed + tally.blocked, tally.allowed, tally.blocked, tally.tier, tally.mode)
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
    )


def as_json(report: Report) -> dict[str, Any]:
    """The report as JSON types.

    Args:
        report: the report.

    Returns:
        What to print.
    """
    found: dict[str, Any] = msgspec.to_builtins(report)
    return found


def print_report(report: Report, policy: str) -> None:
    """Print the report as tables on stdout.

    Args:
        report: the report.
        policy: path of the policy, for the title.
    """
    # Markup is off and every text is shown clean: what stands in a log was written by whoever sent the request.
    console = open_console(markup=False, highlight=False, emoji=False, soft_wrap=True)
    console.print(
        f"{report.requests:,} requests from {report.from_} to {report.to} under {clean(policy)}: "
        f"{report.allowed:,} allowed, {report.blocked:,} blocked ({_share(report.blocked, report.requests)})"
    )
    console.print()
    table = _table(("rule", "tier", "requests", "allowed", "blocked", "share"))
    for row in report.rules:
        name = row.rule + (" (shadow)" if row.mode == "shadow" and "shadow" not in row.rule else "")
        numbers = (f"{row.requests:,}", f"{row.allowed:,}", f"{row.blocked:,}", _share(row.blocked, row.requests))
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
    """What else is to be known about a report.

    Args:
        report: the report.

    Returns:
        Sentences, clean.
    """
    told = [
        f"{report.lines:,} lines read, {report.malformed:,} malformed; {report.out_of_order:,} out of order, "
        f"{report.late:,} too late to be put in order"
    ]
    told.extend(f"  malformed: {clean(example)}" for example in report.malformed_examples)
    told.extend(clean(reason) for reason in report.broken)
    if report.refused_paths:
        told.append(f"refused with 400 for the spelling of their paths, and charged to no rule: {report.refused_paths:,}")
        told.extend(f"  refused: {clean(example)}" for example in report.refused_examples)
    if report.refused_keys:
        told.append(f"{report.refused_keys:,} requests bring a revoked or expired API key, which is refused with 403")
    if report.no_address:
        told.append(f"{report.no_address:,} lines have a client that is not an address, which is refused with 400")
        told.extend(f"  refused: {clean(example)}" for example in report.no_address_examples)
    if report.untrusted_chains:
        told.append(
            f"{report.untrusted_chains:,} lines have a chain of addresses, of which the last was counted: if that is a proxy of "
            "yours, name it with --trusted-proxies"
        )
    if report.unknown_keys:
        told.append(f"{report.unknown_keys:,} requests bring an API key that the policy does not know: decided as if without")
    if report.without_subject:
        told.append(f"{report.without_subject:,} requests do not name their caller and were counted by ip")
    if report.top_over_by_at_most:
        told.append(
            "more subjects were blocked than are kept apart: those blocked most may be counted "
            f"too high by up to {report.top_over_by_at_most:,}"
        )
    if report.evicted:
        told.append(f"{report.evicted:,} counters were dropped for want of room: raise --max-subjects")
    return told


def _table(columns: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        numeric = column in ("requests", "allowed", "blocked", "share")
        table.add_column(column, justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
    return table


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _iso(us: int) -> str:
    return datetime.datetime.fromtimestamp(us / US_PER_S, datetime.UTC).isoformat(timespec="seconds")
