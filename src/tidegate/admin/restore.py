"""Restores counters from the usage ledger after the counter store was lost.

Restored are windows of whole days (a day, a week, a month, a year, 30 days) of rules with the algorithm fixed_window that count
API keys or the tier: the ledger has their units by day. It knows no addresses and attributes, and no times within a day, so other
counters start from nothing. Each counter is raised to the units of the ledger and never lowered: repeating it changes nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Final, TypeAlias

import msgspec
from sqlalchemy import ColumnElement, func, select

from tidegate.admin.api_keys import key_rows
from tidegate.algorithms import State
from tidegate.algorithms.calendar import bounds_of
from tidegate.catalog.sql.catalog import SqlCatalog
from tidegate.catalog.sql.rows import api_key_of
from tidegate.catalog.sql.tables import api_keys, tiers, usage_ledger
from tidegate.counters.redis.store import RedisCounters
from tidegate.decision import Decision
from tidegate.errors import StoreUnavailable
from tidegate.ledger.buffer import DAY_US
from tidegate.policy.limits import MAX_WINDOW_US, Algorithm, Limit, LimitSet
from tidegate.policy.matching import CompiledTier
from tidegate.policy.model import KeyStatus, Subject, Tier
from tidegate.policy.overrides import active_overrides, in_precedence
from tidegate.timestamps import now_us as current_us

_OWNERS: Final = 100
"""Owners of keys whose units are read at a time."""
_Units: TypeAlias = defaultdict[str, defaultdict[int, int]]
"""Units by rule and day."""


class Restored(msgspec.Struct, frozen=True):
    """What `restore_counters` did, or would do.

    Args:
        counters: that were raised.
        units: added to them.
        not_restored: rules whose counters the ledger cannot restore, as `tier: rule`.
    """

    counters: int
    units: int
    not_restored: tuple[str, ...]


class _Counter(msgspec.Struct, frozen=True):
    """A counter, and the units of its rule by day."""

    limits: LimitSet
    subject: str
    units: Mapping[int, int]


async def restore_counters(catalog: SqlCatalog, store: RedisCounters, now_us: int, *, dry_run: bool = False) -> Restored:
    """Raise the counters of all tiers to the units of the ledger.

    Args:
        store: of the counters; checks may be charged meanwhile.
        now_us: µs since the epoch.
        dry_run: change nothing.

    Raises:
        CatalogUnavailable: if the database does not answer.
        StoreUnavailable: if the store does not answer; some counters may have been raised: repeat it.
    """
    counters = units = 0
    not_restored: list[str] = []
    for tier in await catalog.list_tiers():
        compiled = CompiledTier(tier)
        not_restored += [f"{tier.name}: {name}" for name in _not_restorable(compiled)]
        async for batch in _batches(catalog, tier, compiled, now_us):
            raised, added = await _raise(store, batch, dry_run=dry_run)
            counters += raised
            units += added
    return Restored(counters, units, tuple(not_restored))


async def _batches(catalog: SqlCatalog, tier: Tier, compiled: CompiledTier, now_us: int) -> AsyncIterator[list[_Counter]]:
    """The counters of a tier, those of at most `_OWNERS` owners at a time."""
    c = usage_ledger.c
    # A year and its first day: no window is longer.
    since = (c.tier == tier.name, c.day_us >= now_us - MAX_WINDOW_US - DAY_US)
    by_tier = [rule.limits for rule in compiled.rules if rule.subject is Subject.TIER and _restorable(rule.limits)]
    if by_tier:
        query = select(c.rule, c.day_us, func.sum(c.admitted)).where(*since).group_by(c.rule, c.day_us)
        units: _Units = defaultdict(lambda: defaultdict(int))
        async with catalog.database.reading() as connection:
            for rule, day_us, admitted in await connection.execute(query):
                units[rule][day_us] += int(admitted)
        yield [_Counter(limits, f"t:{tier.name}", units[limits.rule or ""]) for limits in by_tier]
    if not any(rule.subject is Subject.API_KEY and rule.limits.algorithm is Algorithm.FIXED_WINDOW for rule in compiled.rules):
        return
    owners = await _owners(catalog, since)
    names = sorted(owners)
    for start in range(0, len(names), _OWNERS):
        chunk = names[start : start + _OWNERS]
        keys = [key for owner in chunk for key in owners[owner]]
        by_key = await _units_of(catalog, since, keys)
        overridden = await _overridden(catalog, tier, keys)
        yield [
            counter
            for owner in chunk
            for counter in _counters_of(owner, overridden.get(owner, compiled), [by_key[key] for key in owners[owner]])
        ]


async def _owners(catalog: SqlCatalog, since: tuple[ColumnElement[bool], ...]) -> dict[str, list[str]]:
    """The keys with units, by the key whose counters they use."""
    c, k = usage_ledger.c, api_keys.c
    query = (
        select(c.key_id, k.counts_as)
        .select_from(usage_ledger.outerjoin(api_keys, k.id == c.key_id))
        .where(*since, c.key_id != "")
        .distinct()
    )
    owners: defaultdict[str, list[str]] = defaultdict(list)
    async with catalog.database.reading() as connection:
        for key_id, counts_as in await connection.execute(query):
            owners[counts_as or key_id].append(key_id)
    return owners


async def _units_of(catalog: SqlCatalog, since: tuple[ColumnElement[bool], ...], keys: Sequence[str]) -> dict[str, _Units]:
    """Units of keys, by key, rule and day."""
    c = usage_ledger.c
    query = (
        select(c.key_id, c.rule, c.day_us, func.sum(c.admitted))
        .where(*since, c.key_id.in_(keys))
        .group_by(c.key_id, c.rule, c.day_us)
    )
    found: dict[str, _Units] = {key: defaultdict(lambda: defaultdict(int)) for key in keys}
    async with catalog.database.reading() as connection:
        for key_id, rule, day_us, admitted in await connection.execute(query):
            found[key_id][rule][day_us] += int(admitted)
    return found


async def _overridden(catalog: SqlCatalog, tier: Tier, keys: Sequence[str]) -> dict[str, CompiledTier]:
    """The tier with the limits of a key's own, by owner."""
    query = key_rows().where(api_keys.c.id.in_(keys), tiers.c.name == tier.name)
    async with catalog.database.reading() as connection:
        found = [api_key_of(row) for row in (await connection.execute(query)).mappings()]
    # Of several keys of one owner the active one.
    found.sort(key=lambda key: key.status is KeyStatus.ACTIVE)
    active = {key.owner: in_precedence(active_overrides(key.overrides, current_us())) for key in found}
    return {owner: CompiledTier(tier, overrides) for owner, overrides in active.items() if overrides}


def _counters_of(owner: str, compiled: CompiledTier, units: Sequence[_Units]) -> Iterator[_Counter]:
    for rule in compiled.rules:
        if rule.subject is Subject.API_KEY and _restorable(rule.limits):
            days: defaultdict[int, int] = defaultdict(int)
            for each in units:
                for day_us, admitted in each[rule.rule.name].items():
                    days[day_us] += admitted
            if days:
                yield _Counter(rule.limits, f"k:{owner}", days)


async def _raise(store: RedisCounters, counters: Sequence[_Counter], *, dry_run: bool) -> tuple[int, int]:
    """Raise counters to the units of the ledger; returns how many were raised, and by how many units together."""
    current = await store.windows([(each.limits, each.subject) for each in counters])
    states: list[tuple[LimitSet, str, list[State]]] = []
    added = 0
    for counter, decisions in zip(counters, current, strict=True):
        if decisions is None:
            raise StoreUnavailable("the counter store does not answer: repeat the command when it does")
        state: list[State] = []
        for limit, decision in zip(counter.limits.limits, decisions, strict=True):
            missing = _missing(limit, decision, counter.units) if _is_of_days(limit) else 0
            state.append((_start_of(limit, decision.at_us), missing) if missing > 0 else None)
            added += missing
        if any(state):
            states.append((counter.limits, counter.subject, state))
    if states and not dry_run:
        for outcome in await store.absorb(states):
            if outcome is not None:
                raise outcome
    return len(states), added


def _missing(limit: Limit, decision: Decision, units: Mapping[int, int]) -> int:
    """Units of the current window that the ledger has and the counter has not; at most what the limit has left."""
    start_us = _start_of(limit, decision.at_us)
    admitted = sum(count for day_us, count in units.items() if day_us >= start_us)
    left = limit.amount if decision.remaining is None else decision.remaining
    return max(min(admitted, limit.amount) - (limit.amount - left), 0)


def _start_of(limit: Limit, at_us: int) -> int:
    return bounds_of(limit, at_us)[0] if limit.is_calendar else at_us - at_us % limit.window_us


def _is_of_days(limit: Limit) -> bool:
    return limit.is_calendar or limit.window_us % DAY_US == 0


def _restorable(limits: LimitSet) -> bool:
    return limits.algorithm is Algorithm.FIXED_WINDOW and any(map(_is_of_days, limits.limits))


def _not_restorable(compiled: CompiledTier) -> Iterator[str]:
    """What has windows of a day or longer that the ledger cannot restore."""
    if compiled.limits is not None and any(limit.window_us >= DAY_US for limit in compiled.limits.limits):
        yield "limits of the tier, which slide"
    for rule in compiled.rules:
        long = any(limit.window_us >= DAY_US for limit in rule.limits.limits)
        if long and not (_restorable(rule.limits) and rule.subject in (Subject.API_KEY, Subject.TIER)):
            yield rule.rule.name
