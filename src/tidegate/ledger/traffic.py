"""Reads the traffic history: units by rule and time, callers, latency."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Final, TypeVar

import msgspec
from sqlalchemy import ColumnElement, FromClause, Select, Table, func, literal_column, select, tuple_, union_all

from tidegate.catalog.sql.database import Database
from tidegate.catalog.sql.tables import traffic_callers, traffic_hours, traffic_latency, traffic_minutes
from tidegate.errors import BadRequest
from tidegate.latency import BUCKETS_S
from tidegate.ledger.buffer import OTHERS
from tidegate.time_slice import TimeSlice
from tidegate.timestamps import US_PER_S, format_timestamp

STEPS_S: Final = (60, 3_600, 86_400)
MAX_ITEMS: Final = 20_000
"""Maximum number of steps of a range, times the number of rules that are listed separately."""
_HOUR_S: Final = 3_600
_UNITS: Final = ("allowed", "blocked", "over_limit")
_T = TypeVar("_T")


class TrafficFilter(msgspec.Struct, frozen=True):
    """Selects traffic; None selects all.

    Args:
        from_us: from this time on, µs since the epoch; a minute or hour that begins before it is left out.
        to_us: before this time.
        rule: empty for units that no rule of the tier answered.
        subject: `k:` and the id of a key's first version, `i:` and an address, `t:` and a tier, `a:` and attributes.
    """

    from_us: int
    to_us: int
    tier: str | None = None
    rule: str | None = None
    subject: str | None = None


class TrafficItem(msgspec.Struct, frozen=True):
    """Units of a rule in a step.

    Args:
        at: its start, ISO 8601.
        span_s: duration that the units are of, s: the step, or 3600 where minutes were rolled up.
        tier: None for the sum of the rules that are not listed separately.
        rule: None likewise; empty for units that no rule answered.
        allowed: units admitted.
        over: of these, units above a quota or a soft limit.
    """

    at: str
    span_s: int
    tier: str | None
    rule: str | None
    allowed: int
    blocked: int
    over: int


class LatencyItem(msgspec.Struct, frozen=True):
    """Latency of the checks in a step: quantiles, interpolated within the buckets of `rate_limiter_latency_seconds`.

    Args:
        at: its start, ISO 8601.
        span_s: as `TrafficItem.span_s`.
    """

    at: str
    span_s: int
    checks: int
    p50_ms: float
    p90_ms: float
    p99_ms: float


class TrafficCaller(msgspec.Struct, frozen=True):
    """Units of a caller under the selected rules."""

    subject: str
    tier: str
    allowed: int
    blocked: int
    over: int


async def read_traffic(database: Database, selected: TrafficFilter, step_s: int, limit: int) -> list[TrafficItem]:
    """Units by step and rule, oldest first.

    Args:
        step_s: one of `STEPS_S`; with a subject at least 3600.
        limit: number of rules, those with the most units, that are listed separately; the others are summed.

    Raises:
        BadRequest: if there would be too many items, or the step is too short.
        CatalogUnavailable: if the database does not answer.
    """
    _require_bounded(selected, step_s, limit)
    source = _units_of(selected, step_s)
    c = source.c
    sums = [func.sum(c[name]).label(name) for name in _UNITS]
    by_step = select(c.start_us, c.span_s, *sums).group_by(c.start_us, c.span_s)
    total = func.sum(c.allowed + c.blocked).desc()
    ranking = select(c.tier, c.rule).group_by(c.tier, c.rule).order_by(total, c.tier, c.rule).limit(limit + 1)
    async with database.reading() as connection:
        ranked = [(row.tier, row.rule) for row in await connection.execute(ranking)]
        if not ranked:
            return []
        query = by_step.add_columns(c.tier, c.rule).group_by(c.tier, c.rule)
        if len(ranked) > limit:
            query = query.where(tuple_(c.tier, c.rule).in_(ranked[:limit]))
        rows = [dict(row) for row in (await connection.execute(query)).mappings()]
        if len(ranked) > limit:
            rows += _others((await connection.execute(by_step)).mappings().all(), rows)
    rows.sort(key=lambda row: (row["start_us"], row["tier"] is None, row["tier"] or "", row["rule"] or ""))
    return await _converted(rows, _item)


async def read_latency(database: Database, selected: TrafficFilter, step_s: int) -> list[LatencyItem]:
    """Latency of all checks by step, oldest first, whatever the tier, rule and subject.

    Raises:
        BadRequest: if there would be too many items.
        CatalogUnavailable: if the database does not answer.
    """
    _require_bounded(selected, step_s, 1)
    c = traffic_latency.c
    start = _start(c.at_us, step_s)
    query = (
        select(start, c.step_s, c.bucket, func.sum(c.checks).label("checks"))
        .where(c.at_us >= selected.from_us, c.at_us < selected.to_us)
        .group_by(literal_column("start_us"), c.step_s, c.bucket)
    )
    counts: defaultdict[tuple[int, int], list[int]] = defaultdict(lambda: [0] * (len(BUCKETS_S) + 1))
    async with database.reading() as connection:
        for row in (await connection.execute(query)).mappings():
            # Buckets of a later version would be beyond the last one.
            bucket = min(row["bucket"], len(BUCKETS_S))
            counts[row["start_us"], max(step_s, row["step_s"])][bucket] += int(row["checks"])
    return [
        LatencyItem(
            format_timestamp(start_us),
            span_s,
            sum(buckets),
            *(round(quantile(buckets, share) * 1e3, 3) for share in (0.5, 0.9, 0.99)),
        )
        for (start_us, span_s), buckets in sorted(counts.items())
    ]


async def top_callers(database: Database, selected: TrafficFilter, limit: int, sort: str = "total") -> list[TrafficCaller]:
    """The callers with the most units, highest first; the units of an hour count in full if it begins in the range.

    Args:
        sort: total (allowed and blocked), allowed, blocked or over.

    Raises:
        CatalogUnavailable: if the database does not answer.
    """
    c = traffic_callers.c
    sums = {name: func.sum(c[name]) for name in _UNITS}
    most = {
        "total": sums["allowed"] + sums["blocked"],
        "allowed": sums["allowed"],
        "blocked": sums["blocked"],
        "over": sums["over_limit"],
    }[sort]
    query = (
        select(c.subject, c.tier, *(total.label(name) for name, total in sums.items()))
        .where(*_conditions(traffic_callers, c.hour_us, selected), c.subject != OTHERS)
        .group_by(c.subject, c.tier)
        .having(most > 0)
        .order_by(most.desc(), c.subject, c.tier)
        .limit(limit)
    )
    async with database.reading() as connection:
        rows = (await connection.execute(query)).mappings().all()
    return [
        TrafficCaller(row["subject"], row["tier"], int(row["allowed"]), int(row["blocked"]), int(row["over_limit"]))
        for row in rows
    ]


def quantile(buckets: list[int], share: float) -> float:
    """A quantile of the durations counted in the buckets of `tidegate.latency`, as Prometheus' `histogram_quantile` computes it.

    Args:
        buckets: counts by bucket; those beyond the last bound count as the last bound.
        share: 0 to 1.

    Returns:
        s; 0 if there are none.
    """
    rank = share * sum(buckets)
    below = 0
    for number, count in enumerate(buckets[: len(BUCKETS_S)]):
        if count and below + count >= rank:
            lower = BUCKETS_S[number - 1] if number else 0.0
            return lower + (BUCKETS_S[number] - lower) * (rank - below) / count
        below += count
    return BUCKETS_S[-1] if any(buckets) else 0.0


def _require_bounded(selected: TrafficFilter, step_s: int, limit: int) -> None:
    if selected.subject is not None and step_s < _HOUR_S:
        raise BadRequest("step 60 is not kept by subject: use step 3600 or 86400", field="step")
    steps = -(-(selected.to_us - selected.from_us) // (step_s * US_PER_S))
    if steps * limit > MAX_ITEMS:
        raise BadRequest(
            f"the range has {steps} steps of {step_s} s, for {limit} rules: at most {MAX_ITEMS} items are returned; use a longer "
            "step, a shorter range or a lower limit",
            field="step",
        )


def _units_of(selected: TrafficFilter, step_s: int) -> FromClause:
    """Rows with the start of their step, the duration that they are of, tier, rule and units."""
    if selected.subject is not None:
        sources = [(traffic_callers, traffic_callers.c.hour_us, _HOUR_S)]
    else:
        sources = [(traffic_minutes, traffic_minutes.c.minute_us, 60), (traffic_hours, traffic_hours.c.hour_us, _HOUR_S)]
    parts: list[Select[Any]] = [
        select(
            _start(at, step_s),
            literal_column(str(max(step_s, span_s))).label("span_s"),
            *(table.c[name] for name in ("tier", "rule", *_UNITS)),
        ).where(*_conditions(table, at, selected))
        for table, at, span_s in sources
    ]
    return (union_all(*parts) if len(parts) > 1 else parts[0]).subquery()


def _start(at: ColumnElement[int], step_s: int) -> ColumnElement[int]:
    # Not a parameter: PostgreSQL would not recognize the expression in GROUP BY.
    return (at - at % literal_column(str(step_s * US_PER_S))).label("start_us")


def _conditions(table: Table, at: ColumnElement[int], selected: TrafficFilter) -> list[ColumnElement[bool]]:
    conditions = [at >= selected.from_us, at < selected.to_us]
    for name in ("tier", "rule", "subject"):
        value = getattr(selected, name)
        if value is not None:
            conditions.append(table.c[name] == value)
    return conditions


def _others(everything: Iterable[Mapping[Any, Any]], listed: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What all rules have, without those that are listed."""
    rest = {(row["start_us"], row["span_s"]): {**row, "tier": None, "rule": None} for row in everything}
    for row in listed:
        step = rest.get((row["start_us"], row["span_s"]))
        if step is not None:
            for name in _UNITS:
                # The two queries may have read different states of the current step.
                step[name] = max(step[name] - row[name], 0)
    return [row for row in rest.values() if row["allowed"] or row["blocked"]]


async def _converted(rows: Iterable[Mapping[str, Any]], convert: Any) -> list[Any]:
    """Rows as items; yields to checks in between."""
    items = []
    slice_ = TimeSlice()
    for row in rows:
        items.append(convert(row))
        if slice_.over:
            await slice_.pause()
    return items


def _item(row: Mapping[str, Any]) -> TrafficItem:
    return TrafficItem(
        format_timestamp(row["start_us"]),
        int(row["span_s"]),
        row["tier"],
        row["rule"],
        int(row["allowed"]),
        int(row["blocked"]),
        int(row["over_limit"]),
    )
