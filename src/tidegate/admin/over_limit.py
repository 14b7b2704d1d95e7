"""What a change of limits finds in use: who has consumed more than is left to them now."""

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
from tidegate.policy.model import KeyStatus, Subject
from tidegate.timestamps import now_us
from tidegate.violations.queries import DAY_US, Blocked, top_violators

LOOKED_AT: Final = 1000
"""So many API keys of a tier are looked at; of a larger tier this is a sample, for ids are digests."""
MAX_BLOCKED: Final = 100
"""So many of those that the limits blocked most within a day are looked at besides."""


async def used_up_by_key(editor: CatalogEditor, gate: Gate, key_id: str) -> list[str]:
    """Limits of a key's own that leave it nothing now: what a change to them may not have meant.

    Raises:
        CatalogUnavailable: if the catalog does not answer.
    """
    caller = await caller_of(editor, gate, key_id)
    own = {override.rule for override in caller.api_key.overrides} if caller.api_key is not None else set()
    sets = [limits for limits in own_limits(caller.tier) if (limits.rule or "") in own][:MAX_USAGE_RULES]
    decisions = await peek(gate.counters, [(limits, caller.subject) for limits in sets])
    return [
        f"{_named(limits)}: the API key {key_id} has used up {decision.binding} already, and is refused for up to "
        f"{decision.reset_after:.0f} s"
        for limits, decision in zip(sets, decisions, strict=True)
        if _is_used_up(decision)
    ]


async def used_up_in_tier(editor: CatalogEditor, gate: Gate, tier: str, rule: str | None) -> list[str]:
    """Whom a rule, or a tier's own limits, leave nothing now.

    A rule that counts a whole tier is asked for it. One that counts each caller is asked for some of them: up to `LOOKED_AT` API
    keys of the tier that it holds for, and those that it blocked most within a day, for nobody has a list of all it counts.

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
        said = f"{_named(limits)}: tier {tier!r} has used up {decision.binding} already, and is refused for up to "
        return [f"{said}{decision.reset_after:.0f} s"] if _is_used_up(decision) else []
    subjects = await _some(editor, tier, rule or "", subject)
    decisions = await peek(gate.counters, [(limits, each) for each in subjects])
    over = [(each, decision) for each, decision in zip(subjects, decisions, strict=True) if _is_used_up(decision)]
    if not over:
        return []
    longest_s = max(decision.reset_after for _, decision in over)
    example = over[0][0]
    who = f"the API key {example[2:]}" if example.startswith("k:") else example[2:]
    return [
        f"{_named(limits)}: {len(over)} of {len(subjects)} callers that were looked at, such as {who}, have used up what it "
        f"allows now, and are refused for up to {longest_s:.0f} s"
    ]


async def _some(editor: CatalogEditor, tier: str, rule: str, subject: Subject) -> list[str]:
    """Callers that a rule may count."""
    found: dict[str, None] = {}
    overriding: set[str] = set()
    if subject is Subject.API_KEY:
        keys = select(api_keys.c.id, api_keys.c.counts_as, api_keys.c.overrides).join(tiers, tiers.c.id == api_keys.c.tier_id)
        keys = keys.where(tiers.c.name == tier, api_keys.c.status == KeyStatus.ACTIVE.value).limit(LOOKED_AT)
        async with editor.reading() as connection:
            for key_id, counts_as, overrides in await connection.execute(keys):
                if _overrides(overrides, rule):
                    overriding.add(f"k:{counts_as or key_id}")
                else:
                    found[f"k:{counts_as or key_id}"] = None
    now = now_us()
    for form in await top_violators(
        editor.catalog.database, MAX_BLOCKED, "subject", Blocked(now - DAY_US, now + 1, tier=tier, rule=rule)
    ):
        found[form["subject"]] = None
    kinds = ("i:",) if subject is Subject.IP else ("k:", "i:")
    return [each for each in found if each.startswith(kinds) and each not in overriding]


def _overrides(overrides: Collection[dict[str, object]], rule: str) -> bool:
    return any(each["rule"] == rule for each in overrides)


def _named(limits: LimitSet) -> str:
    return f"rule {limits.rule!r}" if limits.rule else "the limits over all endpoints"


def _is_used_up(decision: Decision) -> bool:
    return decision.remaining == 0 and not decision.degraded
