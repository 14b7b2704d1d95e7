"""What callers have left and what is reset, by the ids of their keys."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select

from tidegate.admin.lists import key_row
from tidegate.admin.rules import CatalogEditor
from tidegate.admin.transaction import NotThere
from tidegate.catalog.cache_level import Caller
from tidegate.catalog.sql.tables import api_keys
from tidegate.counters import Charge
from tidegate.decision import Decision, RuleUsage, Usage, client_of
from tidegate.errors import StoreUnavailable
from tidegate.gate import usage
from tidegate.gate.gate import MAX_USAGE_RULES, Gate
from tidegate.policy.limits import LimitSet
from tidegate.policy.matching import CompiledTier, counted_by, subject_of
from tidegate.policy.model import Mode, Subject

_RESET_BATCH_SIZE = 1000


async def caller_of(editor: CatalogEditor, gate: Gate, key_id: str) -> Caller:
    """The caller that a key's id stands for; revoked and expired ones too.

    Args:
        editor: of the catalog.
        gate: knows callers by their keys' digests.
        key_id: the id.

    Returns:
        The caller.

    Raises:
        NotThere: if there is no such key.
        CatalogUnavailable: if the catalog does not answer.
    """
    row = await key_row(editor, key_id)
    caller = await gate.catalog.caller(row["sha256"])
    if caller is None:
        raise NotThere(f"there is no API key {key_id} any more: see GET /admin/v1/api-keys")
    return caller


async def subject_of_key(editor: CatalogEditor, key_id: str) -> str:
    """Whom counters and violations name for a key: the first key of its owner.

    Args:
        editor: of the catalog.
        key_id: the key's id.

    Returns:
        The subject; that of the id itself where the key's record is gone.

    Raises:
        CatalogUnavailable: if the catalog does not answer.
    """
    async with editor.reading() as connection:
        counts_as = (await connection.execute(select(api_keys.c.counts_as).where(api_keys.c.id == key_id))).scalar()
    return f"k:{counts_as or key_id}"


async def usage_of_key(editor: CatalogEditor, gate: Gate, key_id: str, ip: str | None) -> Usage:
    """What is left to a key; as `Gate.usage`, for a key of which only the id is known, and for refused ones too.

    Args:
        editor: of the catalog.
        gate: what counts.
        key_id: the key's id.
        ip: address of its client, or None.

    Returns:
        The usage.

    Raises:
        NotThere: if there is no such key.
        BadRequest: if the ip is no address.
        CatalogUnavailable: if the catalog does not answer.
    """
    client = None if ip is None else client_of(ip)
    caller = await caller_of(editor, gate, key_id)
    tier = caller.tier
    looked_at: list[tuple[str | None, str | None, Mode, Subject, LimitSet]] = []
    if tier.limits is not None:
        looked_at.append((None, None, Mode.ENFORCE, Subject.API_KEY, tier.limits))
    for each in tier.rules[:MAX_USAGE_RULES]:
        looked_at.append((each.rule.name, each.rule.endpoint, each.rule.mode, counted_by(each.subject, True), each.limits))
    subjects = [subject_of(kind, caller.subject, client, tier.tier.name) for *_, kind, _ in looked_at]
    counted = [(entry, subject) for entry, subject in zip(looked_at, subjects, strict=True) if subject is not None]
    seen = await usage.peek(gate.counters, [(entry[-1], subject) for entry, subject in counted])
    rules = tuple(
        RuleUsage(name, endpoint, mode, kind, limits.limits, *each)
        for ((name, endpoint, mode, kind, limits), _), each in zip(counted, seen, strict=True)
    )
    not_counted = tuple(entry[0] for entry, subject in zip(looked_at, subjects, strict=True) if subject is None)
    return Usage(tier.tier.name, rules, not_counted, len(tier.rules) > MAX_USAGE_RULES)


async def reset_key(editor: CatalogEditor, gate: Gate, key_id: str) -> int:
    """Forget what a key consumed; as `Gate.reset`, for a key of which only the id is known.

    Args:
        editor: of the catalog.
        gate: what counts.
        key_id: the key's id.

    Returns:
        How many counters were reset.

    Raises:
        NotThere: if there is no such key.
        CatalogUnavailable: if the catalog does not answer.
        StoreUnavailable: if the counter store fails; some may have been reset.
    """
    caller = await caller_of(editor, gate, key_id)
    counters = [(limits, caller.subject) for limits in own_sets(caller.tier)]
    for start in range(0, len(counters), _RESET_BATCH_SIZE):
        await gate.counters.reset(counters[start : start + _RESET_BATCH_SIZE])
    return len(counters)


async def peek(gate: Gate, counters: Sequence[tuple[LimitSet, str]]) -> list[Decision]:
    """What is left of counters; charges nothing.

    Args:
        gate: what counts.
        counters: each limit set with the subject that it counts.

    Returns:
        For each the answer to a check of cost 0; degraded, without numbers, where the store did not say.
    """
    charges = [Charge((counter,), cost=0) for counter in counters]
    outcomes = await gate.counters.charge(charges) if charges else ()
    return [
        Decision(False, limits=limits, degraded=True) if isinstance(outcome, StoreUnavailable) else outcome
        for outcome, (limits, _) in zip(outcomes, counters, strict=True)
    ]


def own_sets(tier: CompiledTier) -> list[LimitSet]:
    """What counts each key of a tier by itself.

    Args:
        tier: as a key sees it.

    Returns:
        The tier's own limits and its rules by key.
    """
    found = [rule.limits for rule in tier.rules if rule.subject is Subject.API_KEY]
    return found if tier.limits is None else [tier.limits, *found]
