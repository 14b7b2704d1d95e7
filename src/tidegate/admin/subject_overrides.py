"""Changes of overrides for subjects by operators, each in one transaction with its row in the audit log.

They may be of tiers and rules of the policy file; those that the file itself has cannot be changed.
"""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import RowMapping, select
from sqlalchemy.ext.asyncio import AsyncConnection

from tidegate.admin.models.subject_overrides import SubjectOverrideCreate, SubjectOverrideFields, SubjectOverrideRead
from tidegate.admin.rules import CatalogEditor
from tidegate.admin.transaction import AuditedTransaction, ExpectedRevisions, NotFound, load_tier_row, require_editable
from tidegate.catalog.changes import TIER
from tidegate.catalog.sql import rows as policy_rows
from tidegate.catalog.sql.override_rows import (
    OverrideKey,
    OverrideRow,
    changed_entry,
    read_overrides,
    require_few_entries,
    write_overrides,
)
from tidegate.catalog.sql.paging import Page, page_of
from tidegate.catalog.sql.tables import rate_limit_rules, tiers
from tidegate.errors import BadRequest, CatalogError, PolicyError
from tidegate.policy.attributes import parse_subject
from tidegate.policy.match_index import entries_hold
from tidegate.policy.overrides import SubjectOverride
from tidegate.policy.subject_overrides import override_id, subject_override
from tidegate.timestamps import now_us, parse_timestamp


async def list_overrides(
    editor: CatalogEditor,
    tier: str,
    limit: int,
    after: str | None = None,
    rule: str | None = None,
    subject: str | None = None,
) -> Page[SubjectOverrideRead]:
    """Overrides of a tier by id, those that have ended too.

    Args:
        rule: only those of this rule.
        subject: only those whose values match this subject, such as `user=42`.

    Raises:
        NotFound: if there is no such tier.
        BadRequest: if the subject is malformed.
        CatalogUnavailable: if the database does not answer.
    """
    values = None if subject is None else parse_subject(subject)
    async with editor.reading() as connection:
        entries = await read_overrides(connection, await _tier_id(connection, tier))
    found = sorted(
        (override_id(entry["rule"], entry["subject"]), key)
        for key, entry in entries.items()
        if (rule is None or entry["rule"] == rule) and (values is None or entries_hold(entry["subject"].items(), values))
    )
    keys = [key for name, key in found if after is None or name > after]
    items = [SubjectOverrideRead.of_entry(tier, entries[key]) for key in keys[: limit + 1]]
    return page_of(items, limit, lambda item: str(item.id))


async def get_override(editor: CatalogEditor, tier: str, name: str) -> SubjectOverrideRead:
    """One override.

    Raises:
        NotFound: if there is no such tier or override.
        CatalogUnavailable: if the database does not answer.
    """
    async with editor.reading() as connection:
        entries = await read_overrides(connection, await _tier_id(connection, tier))
    return SubjectOverrideRead.of_entry(tier, entries[_named(entries, tier, name)])


async def create_override(editor: CatalogEditor, actor: str, tier: str, sent: SubjectOverrideCreate) -> SubjectOverrideRead:
    """Add an override; what is consumed is kept.

    Raises:
        NotFound: if there is no such tier.
        PolicyError: if a value is not valid, or the tier has no such rule.
        BadRequest: if it ends in the past.
        CatalogError: if there is one for this rule and subject, or there are too many.
        CatalogUnavailable: if the database does not answer.
    """
    async with editor.changing(actor) as transaction:
        row = await load_tier_row(transaction, tier)
        made = await _made(transaction, row, sent.rule, sent.subject, sent)
        entries = await read_overrides(transaction.connection, row["id"])
        if made.key in entries:
            raise CatalogError(
                f"rule {made.rule!r} of tier {tier!r} has an override for {made.subject_text[:60]!r} already: "
                f"change that one, with id {override_id(sent.rule, sent.subject)}"
            )
        entry = entries[made.key] = changed_entry(None, made, False)
        require_few_entries(entries, tier)
        return await _write(transaction, row, entries, "create", None, entry)


async def edit_override(
    editor: CatalogEditor,
    actor: str,
    tier: str,
    name: str,
    sent: SubjectOverrideFields,
    expected_revisions: ExpectedRevisions,
) -> SubjectOverrideRead:
    """Replace limits and end of an override; what is consumed is kept.

    Raises:
        NotFound, ManagedByFile, StaleRevision: see `CatalogEditor`.
        PolicyError: if a value is not valid, or the tier has no such rule any more.
        BadRequest: if it ends in the past.
        CatalogUnavailable: if the database does not answer.
    """
    async with editor.changing(actor) as transaction:
        row = await load_tier_row(transaction, tier)
        entries = await read_overrides(transaction.connection, row["id"])
        key = _named(entries, tier, name)
        before = entries[key]
        require_editable(transaction, before, expected_revisions, f"override {name} of tier {tier!r}")
        made = await _made(transaction, row, before["rule"], before["subject"], sent)
        entries[key] = changed_entry(before, made, False)
        return await _write(transaction, row, entries, "update", before, entries[key])


async def delete_override(
    editor: CatalogEditor, actor: str, tier: str, name: str, expected_revisions: ExpectedRevisions
) -> SubjectOverrideRead:
    """Delete an override: the limits of the rule apply again, and what is consumed is kept.

    Raises:
        NotFound, ManagedByFile, StaleRevision: see `CatalogEditor`.
        CatalogUnavailable: if the database does not answer.
    """
    async with editor.changing(actor) as transaction:
        row = await load_tier_row(transaction, tier)
        entries = await read_overrides(transaction.connection, row["id"])
        key = _named(entries, tier, name)
        before = entries[key]
        require_editable(transaction, before, expected_revisions, f"override {name} of tier {tier!r}")
        del entries[key]
        return await _write(transaction, row, entries, "delete", before, None)


async def _write(
    transaction: AuditedTransaction,
    tier: RowMapping,
    entries: Mapping[OverrideKey, OverrideRow],
    action: str,
    before: OverrideRow | None,
    after: OverrideRow | None,
) -> SubjectOverrideRead:
    # Each process reads the tier again, and with it all of its overrides.
    transaction.touch(TIER, tier["name"])
    await write_overrides(transaction.connection, tier["id"], entries)
    states = [None if entry is None else SubjectOverrideRead.of_entry(tier["name"], entry) for entry in (before, after)]
    read = states[1] or states[0]
    assert read is not None, "there is one of them"
    await transaction.audit(action, "override", read.target, *states)
    return read


async def _made(
    transaction: AuditedTransaction, tier: RowMapping, rule: str, subject: Mapping[str, str], sent: SubjectOverrideFields
) -> SubjectOverride:
    query = select(rate_limit_rules).where(rate_limit_rules.c.tier_id == tier["id"], rate_limit_rules.c.name == rule)
    row = await transaction.one(query)
    if row is None:
        raise PolicyError(f"tier {tier['name']!r} has no rule {rule[:60]!r} to override: see GET /admin/v1/rate-limit-rules")
    until_us = None if sent.until is None else parse_timestamp(sent.until, "until")
    if until_us is not None and until_us <= now_us():
        raise BadRequest(f"until {sent.until} is in the past: send a later time, or delete the override", field="until")
    return subject_override(policy_rows.rule_of(row), subject, sent.limits, until_us)


async def _tier_id(connection: AsyncConnection, tier: str) -> int:
    found = (await connection.execute(select(tiers.c.id).where(tiers.c.name == tier))).scalar()
    if found is None:
        raise NotFound(f"there is no tier {tier[:64]!r}: see GET /admin/v1/tiers")
    return int(found)


def _named(entries: Mapping[OverrideKey, OverrideRow], tier: str, name: str) -> OverrideKey:
    for key, entry in entries.items():
        if override_id(entry["rule"], entry["subject"]) == name:
            return key
    raise NotFound(f"tier {tier[:64]!r} has no override {name[:24]!r}: see GET /admin/v1/tiers/{tier[:64]}/overrides")
