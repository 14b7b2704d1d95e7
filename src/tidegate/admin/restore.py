"""Restores counters from the usage ledger after the counter store was lost.

Restored are quotas of API keys and customers, and windows of whole days (a day, a week, a month, 30 days) of rules with the
algorithm fixed_window that count API keys, customers or the tier: the ledger has their units by day. It knows no addresses and
attributes, and no times within a day, so other counters start from nothing, and of a period that begins within a day of UTC the
first day is not counted. Each counter is raised to the units of the ledger and never lowered: repeating it changes nothing.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, TypeAlias

import msgspec
from sqlalchemy import func, select

from tidegate.algorithms import State
from tidegate.algorithms.calendar import bounds_of
from tidegate.catalog.cache_level import Caller
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.sql.catalog import SqlCatalog
from tidegate.catalog.sql.tables import api_keys, usage_ledger
from tidegate.counters.redis.store import RedisCounters
from tidegate.decision import Decision
from tidegate.errors import StoreUnavailable
from tidegate.gate.quotas import own_quotas
from tidegate.ledger.buffer import DAY_US
from tidegate.policy.limits import MAX_WINDOW_US, Algorithm, Limit, LimitSet, QuotaAlgorithm
from tidegate.policy.matching import CompiledTier
from tidegate.policy.model import KeyStatus
from tidegate.policy.quotas import QuotaLimit
from tidegate.policy.rule_index import CompiledRule
from tidegate.policy.rules import Subject
from tidegate.timestamps import US_PER_S

_KEYS: Final = 200
"""Keys whose units are read at a time."""
_COUNTERS: Final = 200
"""Counters that are raised at a time."""
_BY_KEY: Final = (Subject.API_KEY, Subject.CUSTOMER)
_Days: TypeAlias = Mapping[int, int]
"""Units by day."""


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


class _Counter:
    """A counter, and the units of the ledger in the current window of each of its limits.

    Args:
        limits: of the key that was added last.
        subject: that they count.
    """

    __slots__ = ("limits", "subject", "units")

    def __init__(self, limits: LimitSet, subject: str) -> None:
        self.limits = limits
        self.subject = subject
        self.units: dict[str, int] = {}

    def add(self, limits: LimitSet, units: Iterable[_Days], now_us: int) -> None:
        """Add the units of a key by rule and day."""
        self.limits = limits
        days = list(units)
        for limit in filter(_is_of_days, limits.limits):
            start_us = _start_of(limit, now_us)
            admitted = sum(count for each in days for day_us, count in each.items() if day_us >= start_us)
            self.units[limit.window_name] = self.units.get(limit.window_name, 0) + admitted


class _Counters:
    """All counters that the ledger has units of, by name and subject."""

    def __init__(self, now_us: int) -> None:
        self._now_us = now_us
        self.by_name: dict[tuple[str, str], _Counter] = {}

    def add(self, limits: LimitSet, subject: str, units: Iterable[_Days]) -> None:
        counter = self.by_name.setdefault((limits.name, subject), _Counter(limits, subject))
        counter.add(limits, units, self._now_us)


async def restore_counters(catalog: SqlCatalog, store: RedisCounters, now_us: int, *, dry_run: bool = False) -> Restored:
    """Raise the counters of all tiers to the units of the ledger. Memory grows with the number of counters.

    Args:
        store: of the counters; checks may be charged meanwhile.
        now_us: µs since the epoch.
        dry_run: change nothing.

    Raises:
        CatalogUnavailable: if the database does not answer.
        StoreUnavailable: if the store does not answer; some counters may have been raised: repeat it.
    """
    counters = _Counters(now_us)
    not_restored: list[str] = []
    for tier in await catalog.list_tiers():
        compiled = CompiledTier(tier)
        not_restored += [f"{tier.name}: {name}" for name in _not_restorable(compiled)]
        await _add_tier(catalog, compiled, counters, now_us)
    await _add_keys(catalog, counters, now_us)
    found = list(counters.by_name.values())
    raised = units = 0
    for start in range(0, len(found), _COUNTERS):
        more, added = await _raise(store, found[start : start + _COUNTERS], now_us, dry_run=dry_run)
        raised += more
        units += added
    return Restored(raised, units, tuple(not_restored))


async def _add_tier(catalog: SqlCatalog, compiled: CompiledTier, counters: _Counters, now_us: int) -> None:
    """The counters of rules that count the whole tier."""
    rules = {rule.rule.name: rule.limits for rule in compiled.rules if rule.subject is Subject.TIER and _restorable(rule)}
    if not rules:
        return
    c, name = usage_ledger.c, compiled.tier.name
    query = (
        select(c.rule, c.day_us, func.sum(c.admitted))
        .where(c.tier == name, c.rule.in_(rules), c.day_us >= now_us - MAX_WINDOW_US - DAY_US)
        .group_by(c.rule, c.day_us)
    )
    days: defaultdict[str, dict[int, int]] = defaultdict(dict)
    async with catalog.database.reading() as connection:
        for rule, day_us, admitted in await connection.execute(query):
            days[rule][day_us] = int(admitted)
    for rule, units in days.items():
        counters.add(rules[rule], f"t:{name}", [units])


async def _add_keys(catalog: SqlCatalog, counters: _Counters, now_us: int) -> None:
    """The counters of API keys, and the quotas of their customers."""
    c, k = usage_ledger.c, api_keys.c
    since_us = now_us - MAX_WINDOW_US - DAY_US
    # Of the keys of one owner, active ones last: their limits apply.
    query = (
        select(k.id, k.sha256)
        .where(k.id.in_(select(c.key_id).where(c.day_us >= since_us, c.key_id != "").distinct()))
        .order_by(k.status == KeyStatus.ACTIVE.value, k.id)
    )
    async with catalog.database.reading() as connection:
        keys = [(row.id, row.sha256) for row in await connection.execute(query)]
    cached = CachedCatalog(catalog, max_keys=_KEYS)
    customers: set[str] = set()
    for start in range(0, len(keys), _KEYS):
        chunk = keys[start : start + _KEYS]
        callers = await asyncio.gather(*(cached.caller(sha256) for _, sha256 in chunk))
        units: dict[str, defaultdict[tuple[str, str], dict[int, int]]] = {key: defaultdict(dict) for key, _ in chunk}
        by_key = (
            select(c.key_id, c.tier, c.rule, c.day_us, func.sum(c.admitted))
            .where(c.key_id.in_(units), c.day_us >= since_us)
            .group_by(c.key_id, c.tier, c.rule, c.day_us)
        )
        async with catalog.database.reading() as connection:
            for key, tier, rule, day_us, admitted in await connection.execute(by_key):
                units[key][tier, rule][day_us] = int(admitted)
        for (key, _), caller in zip(chunk, callers, strict=True):
            if caller is None:
                continue
            _add_units(_counters_of(caller), caller, units[key], counters)
            if caller.customer and caller.customer not in customers:
                customers.add(caller.customer)
                shared = [each for each in _counters_of(caller) if each[1] == caller.customer_subject]
                _add_units(shared, caller, await _units_without_key(catalog, caller.customer, since_us), counters)


async def _units_without_key(catalog: SqlCatalog, customer: str, since_us: int) -> defaultdict[tuple[str, str], dict[int, int]]:
    """Units of a customer's callers that have no API key, by tier and rule, and by day."""
    c = usage_ledger.c
    query = (
        select(c.tier, c.rule, c.day_us, func.sum(c.admitted))
        .where(c.customer == customer, c.key_id == "", c.day_us >= since_us)
        .group_by(c.tier, c.rule, c.day_us)
    )
    found: defaultdict[tuple[str, str], dict[int, int]] = defaultdict(dict)
    async with catalog.database.reading() as connection:
        for tier, rule, day_us, admitted in await connection.execute(query):
            found[tier, rule][day_us] = int(admitted)
    return found


def _counters_of(caller: Caller) -> list[tuple[LimitSet, str]]:
    """What the ledger can restore of a caller: limits and subject."""
    found = []
    for rule in caller.tier.rules:
        if rule.subject in _BY_KEY and _restorable(rule):
            by_customer = rule.subject is Subject.CUSTOMER and caller.customer_subject
            found.append((rule.limits, caller.customer_subject if by_customer else caller.subject))
    found += [(limits, subject) for limits, subject in own_quotas(caller) if any(map(_is_of_days, limits.limits))]
    return found


def _add_units(
    restorable: Iterable[tuple[LimitSet, str]], caller: Caller, units: Mapping[tuple[str, str], _Days], counters: _Counters
) -> None:
    for limits, subject in restorable:
        # Quotas of all tiers share their counters.
        tier = None if isinstance(limits.algorithm, QuotaAlgorithm) else caller.tier.tier.name
        own = [days for (at, rule), days in units.items() if tier in (None, at) and limits.rule in (None, rule)]
        if own:
            counters.add(limits, subject, own)


async def _raise(store: RedisCounters, counters: Sequence[_Counter], now_us: int, *, dry_run: bool) -> tuple[int, int]:
    """Raise counters to the units of the ledger; returns how many were raised, and by how many units together."""
    current = await store.windows([(each.limits, each.subject) for each in counters])
    states: list[tuple[LimitSet, str, list[State]]] = []
    added = 0
    for counter, decisions in zip(counters, current, strict=True):
        if decisions is None:
            raise StoreUnavailable("the counter store does not answer: repeat the command when it does")
        state: list[State] = []
        for limit, decision in zip(counter.limits.limits, decisions, strict=True):
            missing = _missing(limit, decision, counter.units.get(limit.window_name, 0), now_us)
            state.append((_state_time(limit, decision.at_us), missing) if missing > 0 else None)
            added += missing
        if any(state):
            states.append((counter.limits, counter.subject, state))
    if states and not dry_run:
        for outcome in await store.absorb(states):
            if outcome is not None:
                raise outcome
    return len(states), added


def _missing(limit: Limit, decision: Decision, admitted: int, now_us: int) -> int:
    """Units of the current window that the ledger has and the counter has not; at most what can pass in the window."""
    if not admitted or _start_of(limit, decision.at_us) != _start_of(limit, now_us):
        return 0  # by the store's clock it is another window
    used = limit.amount - (limit.amount if decision.remaining is None else decision.remaining) + decision.overage
    most = limit.most if isinstance(limit, QuotaLimit) else limit.amount
    return max(min(admitted, most) - used, 0)


def _state_time(limit: Limit, at_us: int) -> int:
    """The time in a counter's state: of a quota the last charge, else the start of the window."""
    return at_us - at_us % US_PER_S if isinstance(limit, QuotaLimit) else _start_of(limit, at_us)


def _start_of(limit: Limit, at_us: int) -> int:
    if isinstance(limit, QuotaLimit):
        return limit.clock.bounds(at_us)[0]
    return bounds_of(limit, at_us)[0] if limit.is_calendar else at_us - at_us % limit.window_us


def _is_of_days(limit: Limit) -> bool:
    if isinstance(limit, QuotaLimit):
        return limit.clock.period.fixed_us is None
    return limit.is_calendar or limit.window_us % DAY_US == 0


def _restorable(rule: CompiledRule) -> bool:
    return rule.limited and rule.limits.algorithm is Algorithm.FIXED_WINDOW and any(map(_is_of_days, rule.limits.limits))


def _not_restorable(compiled: CompiledTier) -> Iterator[str]:
    """What has windows of a day or longer that the ledger cannot restore."""
    if compiled.limits is not None and any(limit.window_us >= DAY_US for limit in compiled.limits.limits):
        yield "limits of the tier, which slide"
    for rule in compiled.rules:
        by_key = rule.subject in (*_BY_KEY, Subject.TIER)
        limits = rule.limited and any(limit.window_us >= DAY_US for limit in rule.limits.limits)
        if (limits and not (by_key and _restorable(rule))) or (rule.quotas and rule.subject is not Subject.API_KEY):
            yield rule.rule.name
