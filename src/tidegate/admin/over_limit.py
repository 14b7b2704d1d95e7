"""Warnings after a change of limits: callers that have already used up the new limits."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from sqlalchemy import select

from tidegate.admin.rules import CatalogEditor
from tidegate.admin.usage import caller_of
from tidegate.catalog.sql.tables import api_keys, tiers
from tidegate.decision import Decision
from tidegate.gate.gate import Gate
from tidegate.gate.usage import MAX_USAGE_RULES, own_limits, peek
from tidegate.policy.limits import LimitSet
from tidegate.policy.model import KeyStatus
from tidegate.policy.rules import Subject
from tidegate.timestamps import now_us
from tidegate.violations.queries import DAY_US, ViolationFilter, top_violators

MAX_CHECKED_KEYS: Final = 1000
"""Maximum number of API keys of a tier that are checked; for a larger tier this is a random sample, because ids are digests."""
MAX_BLOCKED: Final = 100
"""Maximum number of subjects blocked most within a day that are also checked."""


async def used_up_by_key(editor: CatalogEditor, gate: Gate, key_id: str) -> list[str]:
    """Warnings about limits of a key's own that it has already used up.

    Raises:
        CatalogUnavailable: if the catalog does not answer.
    """
    caller = await caller_of(editor, gate, key_id)
    own = {override.rule for override in caller.api_key.overrides if not override.quotas} if caller.api_key is not None else set()
    sets = [limits for limits in own_limits(caller.tier) if (limits.rule or "") in own][:MAX_USAGE_RULES]
    decisions = await peek(gate.counters, [(limits, caller.subject) for limits in sets])
    return [
        f"{_named(limits)}: the API key {key_id} has used up {decision.binding} already, and is blocked for up to "
        f"{decision.reset_after:.0f} s"
        for limits, decision in zip(sets, decisions, strict=True)
        if _is_used_up(decision)
    ]


async def used_up_in_tier(editor: CatalogEditor, gate: Gate, tier: str, rule: str | None) -> list[str]:
    """A warning if callers of a tier have already used up a rule, or the tier's own limits.

    For a rule with one counter for the tier, this counter is read. Otherwise a sample of callers is checked, because there is no
    list of all counters: up to `MAX_CHECKED_KEYS` API keys of the tier, and the subjects that the rule blocked most within a day.

    Args:
        rule: name of the rule; None for the tier's own limits.

    Returns:
        One sentence, or none.

    Raises:
        CatalogUnavailable: if the catalog does not answer.
    """
    compiled = await gate.catalog.fresh_tier(tier)
    if compiled is None:
        return []
    found = next((each for each in compiled.rules if each.rule.name == rule), None)
    limits = compiled.limits if rule is None else None if found is None else found.limits
    if limits is None:
        return []
    subject = Subject.API_KEY if found is None else found.subject
    if subject is Subject.TIER:
        (decision,) = await peek(gate.counters, [(limits, f"t:{tier}")])
        warning = f"{_named(limits)}: tier {tier!r} has used up {decision.binding} already, and is blocked for up to "
        return [f"{warning}{decision.reset_after:.0f} s"] if _is_used_up(decision) else []
    subjects = await _sample(editor, tier, rule or "", subject)
    decisions = await peek(gate.counters, [(limits, each) for each in subjects])
    over = [(each, decision) for each, decision in zip(subjects, decisions, strict=True) if _is_used_up(decision)]
    if not over:
        return []
    longest_s = max(decision.reset_after for _, decision in over)
    example = over[0][0]
    who = f"the API key {example[2:]}" if example.startswith("k:") else example[2:]
    return [
        f"{_named(limits)}: {len(over)} of {len(subjects)} checked callers, e.g. {who}, have used up what it "
        f"allows now, and are blocked for up to {longest_s:.0f} s"
    ]


async def _sample(editor: CatalogEditor, tier: str, rule: str, subject: Subject) -> list[str]:
    """Some subjects that a rule may count."""
    found: dict[str, None] = {}
    overriding: set[str] = set()
    if subject is Subject.API_KEY:
        keys = select(api_keys.c.id, api_keys.c.counts_as, api_keys.c.overrides).join(tiers, tiers.c.id == api_keys.c.tier_id)
        keys = keys.where(tiers.c.name == tier, api_keys.c.status == KeyStatus.ACTIVE.value).limit(MAX_CHECKED_KEYS)
        async with editor.reading() as connection:
            for key_id, counts_as, overrides in await connection.execute(keys):
                if _overrides(overrides, rule):
                    overriding.add(f"k:{counts_as or key_id}")
                else:
                    found[f"k:{counts_as or key_id}"] = None
    now = now_us()
    for violator in await top_violators(
        editor.catalog.database, MAX_BLOCKED, "subject", ViolationFilter(now - DAY_US, now + 1, tier=tier, rule=rule)
    ):
        found[violator.subject or ""] = None
    kinds = {
        Subject.IP: ("i:",),
        Subject.ATTRIBUTES: ("a:", "h:", "i:"),
        Subject.CUSTOMER: ("c:", "k:", "i:"),
    }.get(subject, ("k:", "i:"))
    return [each for each in found if each.startswith(kinds) and each not in overriding]


def _overrides(overrides: Collection[dict[str, object]], rule: str) -> bool:
    return any(each["rule"] == rule and not each.get("quotas") for each in overrides)


def _named(limits: LimitSet) -> str:
    return f"rule {limits.rule!r}" if limits.rule else "the limits over all endpoints"


def _is_used_up(decision: Decision) -> bool:
    return decision.remaining == 0 and not decision.degraded
