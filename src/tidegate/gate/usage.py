"""What callers have left, and resetting it. Nothing here charges a counter.

`Gate` calls these functions for callers that sent their API key, the control plane for keys of which only the id is known.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from typing import Final, TypeAlias

from tidegate.catalog.cache_level import Caller
from tidegate.counters import Charge, ChargeOutcome, CounterStore
from tidegate.counters.holds import HoldCountingStore
from tidegate.decision import Decision, RuleUsage, Usage
from tidegate.errors import StoreUnavailable
from tidegate.policy.attributes import NO_ATTRIBUTES, OnMissing
from tidegate.policy.limits import LimitSet
from tidegate.policy.match_index import entries_hold
from tidegate.policy.matching import CompiledRule, CompiledTier, attribute_subject, counted_by, subject_of
from tidegate.policy.rules import Mode, Subject, subject_text

MAX_USAGE_RULES: Final = 1000
"""Maximum number of rules in one answer: as many as a batch has checks."""

_RESET_BATCH_SIZE: Final = 1000
_WINDOWS_BATCH_SIZE: Final = 32
"""Counters of several windows read in one call: a thousand rules of sixteen windows must not delay checks."""

Counter: TypeAlias = tuple[LimitSet, str]
"""Limits and the subject that they count."""
Counters: TypeAlias = tuple[Counter, ...]
CounterUsage: TypeAlias = tuple[Decision, tuple[Decision, ...]]
"""The decision for a check of cost 0, and one for each limit alone; none of the latter if the store did not answer."""


async def caller_usage(
    store: CounterStore,
    caller: Caller,
    client: str | None,
    attributes: Mapping[str, str] = NO_ATTRIBUTES,
    *,
    count_holds: bool = False,
) -> Usage:
    """What is left to a caller, in each window of each rule.

    Args:
        caller: with or without an API key.
        client: the client's address in canonical text; None if it is not known.
        attributes: of the caller, by name.
        count_holds: whether the open holds of each rule are counted, with another call to the store.

    Returns:
        The tier's own limits and its rules, shadow rules included; of more than `MAX_USAGE_RULES` rules the first ones by
        priority. Rules with an action, and rules whose match does not hold, are left out. Rules that count by an address or an
        attribute that is not known are in `not_counted`.
    """
    tier, has_key = caller.tier, bool(caller.subject)
    rules = [
        rule for rule in tier.rules if rule.action is None and (not rule.rule.match or entries_hold(rule.rule.match, attributes))
    ]
    listed: list[CompiledRule | None] = [] if tier.limits is None and tier.quotas is None else [None]
    listed += rules[:MAX_USAGE_RULES]
    counted: list[tuple[CompiledRule | None, str]] = []
    counters: list[Counters] = []
    not_counted: list[str | None] = []
    for rule in listed:
        if rule is not None and rule.subject is Subject.ATTRIBUTES:
            kind, subject = _by_attributes(rule, caller, client, attributes)
        else:
            counts = counted_by(Subject.API_KEY if rule is None else rule.subject, has_key, bool(caller.customer_subject))
            kind, subject = counts.value, subject_of(counts, caller.subject, client, tier.tier.name, caller.customer_subject)
        own = _customer_quotas(rule, caller) if subject is None else _counters(rule, caller, subject, attributes)
        if subject is None:
            kind = Subject.CUSTOMER.value
            not_counted += [] if own else [None if rule is None else rule.rule.name]
        if own:
            counted.append((rule, kind))
            counters.append(own)
    used_by_rule = [
        RuleUsage(
            None if rule is None else rule.rule.name,
            None if rule is None else rule.rule.endpoint,
            Mode.ENFORCE if rule is None else rule.rule.mode,
            kind,
            tuple(limit for limits, _ in own for limit in limits.limits),
            *used,
            holds,
        )
        for (rule, kind), own, used, holds in zip(
            counted,
            counters,
            await peek_windows(store, counters),
            await _open_holds(store, counters) if count_holds else [None] * len(counters),
            strict=True,
        )
    ]
    return Usage(tier.tier.name, tuple(used_by_rule), tuple(not_counted), len(rules) > MAX_USAGE_RULES)


def _counters(rule: CompiledRule | None, caller: Caller, subject: str, attributes: Mapping[str, str]) -> Counters:
    """The limits and the quotas of a rule, or of the tier for None."""
    if rule is not None and (rule.quotas is None or rule.subject is not Subject.API_KEY):
        return rule.counters(subject, caller.anchor, attributes)
    quota_subject = caller.quota_subject or subject
    if rule is not None:
        assert rule.quotas is not None, "a rule without quotas is above"
        own = (rule.quotas.of(caller.anchor), quota_subject)
        slots: Counters = () if rule.slots is None else ((rule.slots, subject),)
        return ((rule.limits, subject), own, *slots) if rule.limited else (own, *slots)
    limits = caller.tier.limits
    found: Counters = () if limits is None else ((limits, subject),)
    return found if caller.quotas is None else (*found, (caller.quotas, quota_subject))


def _customer_quotas(rule: CompiledRule | None, caller: Caller) -> Counters:
    """The quotas of a rule, or of the tier for None, that count the customer of a caller of which no more is known."""
    quotas = caller.quotas if rule is None else None
    if rule is not None and rule.quotas is not None and rule.subject is Subject.API_KEY:
        quotas = rule.quotas.of(caller.anchor)
    return () if quotas is None or not caller.customer_subject else ((quotas, caller.customer_subject),)


def _by_attributes(
    rule: CompiledRule, caller: Caller, client: str | None, attributes: Mapping[str, str]
) -> tuple[str, str | None]:
    """What a rule by attributes counts, and the subject; None where it cannot be known."""
    found = attribute_subject(rule.parts, attributes, caller.subject, client)
    if found is None and rule.rule.on_missing is OnMissing.IP and any(part not in attributes for part in rule.parts):
        return Subject.IP.value, None if client is None else f"i:{client}"
    return subject_text(rule.rule), found


async def _open_holds(store: CounterStore, checks: Sequence[Counters]) -> Sequence[int | None]:
    """How many holds are open of the first counter of each check; None where the store could not say."""
    if isinstance(store, HoldCountingStore):
        with contextlib.suppress(StoreUnavailable):
            return await store.count_holds(tuple(counters[0] for counters in checks))
    return [None] * len(checks)


async def peek(store: CounterStore, counters: Sequence[Counter]) -> list[Decision]:
    """The decision for a check of cost 0 of each counter; degraded and without numbers if the store did not answer."""
    return [
        _unknown(limits) if isinstance(outcome, StoreUnavailable) else outcome
        for outcome, (limits, _) in zip(await _charge_nothing(store, [(each,) for each in counters]), counters, strict=True)
    ]


async def peek_windows(store: CounterStore, checks: Sequence[Counters]) -> list[CounterUsage]:
    """The decision for a check of cost 0 of counters that are charged together, and that of each limit alone.

    Args:
        checks: for each check its counters, at least one.
    """
    found: list[CounterUsage] = []
    several: list[tuple[int, Counter]] = []
    for place, (outcome, counters) in enumerate(zip(await _charge_nothing(store, checks), checks, strict=True)):
        if isinstance(outcome, StoreUnavailable):
            found.append((_unknown(counters[0][0]), ()))
        elif len(counters) == 1 and len(counters[0][0].limits) == 1:
            found.append((outcome, (outcome,)))
        else:
            found.append((outcome, ()))
            if not outcome.degraded:
                several.extend((place, counter) for counter in counters)
    unanswered: set[int] = set()
    for start in range(0, len(several), _WINDOWS_BATCH_SIZE):
        asked = several[start : start + _WINDOWS_BATCH_SIZE]
        for (place, _), windows in zip(asked, await store.windows([counter for _, counter in asked]), strict=True):
            if windows is None:
                unanswered.add(place)
            found[place] = (found[place][0], () if place in unanswered else (*found[place][1], *(windows or ())))
        # A store in memory never suspends.
        await asyncio.sleep(0)
    return found


async def reset_counters(store: CounterStore, counters: Sequence[Counter]) -> int:
    """Delete counters, in batches.

    Returns:
        How many there were in `counters`, whether they had consumption or not.

    Raises:
        StoreUnavailable: if the counter store fails; some may have been reset.
    """
    for start in range(0, len(counters), _RESET_BATCH_SIZE):
        await store.reset(counters[start : start + _RESET_BATCH_SIZE])
        # A store in memory never suspends: without this, many tiers would stop all checks until the last one is done.
        await asyncio.sleep(0)
    return len(counters)


def own_limits(tier: CompiledTier, *, has_customer: bool = False) -> list[LimitSet]:
    """The limits that count each caller of a tier separately: by its key, or by its address if it has none.

    Args:
        has_customer: whether the caller is a customer's, which rules by customer count in its place.
    """
    kinds = (Subject.API_KEY,) if has_customer else (Subject.API_KEY, Subject.CUSTOMER)
    counted = [rule for rule in tier.rules if rule.subject in kinds]
    found = [rule.limits for rule in counted if rule.limited] + [rule.slots for rule in counted if rule.slots is not None]
    return found if tier.limits is None else [tier.limits, *found]


async def _charge_nothing(store: CounterStore, checks: Sequence[Counters]) -> Sequence[ChargeOutcome]:
    return await store.charge([Charge(counters, cost=0) for counters in checks]) if checks else ()


def _unknown(limits: LimitSet) -> Decision:
    return Decision(False, limits=limits, degraded=True)
