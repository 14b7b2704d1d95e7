"""Overrides for subjects as `subject_overrides` has them: a JSON list for each tier, each entry with its owner and revision.

They are loaded with their tier, in one statement, and most changes are of one entry. So they are one value: 10,000 entries take
about 1 MB, and reading a tier with them about 0.1 s of CPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, TypeAlias

from sqlalchemy import delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from tidegate.catalog.sql.tables import subject_overrides
from tidegate.errors import CatalogError, PolicyError
from tidegate.policy.descriptors import entries_text
from tidegate.policy.limits import Limit
from tidegate.policy.overrides import SubjectOverride
from tidegate.policy.subject_overrides import require_few

OverrideRow: TypeAlias = dict[str, Any]
OverrideKey: TypeAlias = tuple[str, str]
_FIELDS: Final = ("rule", "subject", "limits", "until_us")


def overrides_of(stored: Sequence[Mapping[str, Any]] | None) -> tuple[SubjectOverride, ...]:
    """The overrides of a stored list; None is none."""
    # Thousands of overrides have a few different limits.
    parsed: dict[str, Limit] = {}

    def limit(text: str) -> Limit:
        return parsed.get(text) or parsed.setdefault(text, Limit.parse(text))

    return tuple(
        SubjectOverride(row["rule"], tuple(sorted(row["subject"].items())), tuple(map(limit, row["limits"])), row["until_us"])
        for row in stored or ()
    )


def by_key(stored: Sequence[Mapping[str, Any]] | None) -> dict[OverrideKey, OverrideRow]:
    """The entries of a stored list by `SubjectOverride.key`, in order of rule and subject; None is none."""
    return dict(sorted(((row["rule"], entries_text(sorted(row["subject"].items()))), dict(row)) for row in stored or ()))


def changed_entry(existing: Mapping[str, Any] | None, override: SubjectOverride, managed_by_file: bool) -> OverrideRow:
    """The entry of an override that was made or changed; one that did not change keeps its revision."""
    fields = {
        "rule": override.rule,
        "subject": dict(override.subject),
        "limits": [limit.text for limit in override.limits],
        "until_us": override.until_us,
    }
    revision = 1
    if existing is not None:
        changed = any(existing[name] != fields[name] for name in _FIELDS)
        revision = existing["revision"] + (changed or existing["managed_by_file"] != managed_by_file)
    return {**fields, "managed_by_file": managed_by_file, "revision": revision}


def overrides_after_file(
    existing: Mapping[OverrideKey, OverrideRow], overrides: Iterable[SubjectOverride], tier: str
) -> dict[OverrideKey, OverrideRow]:
    """What a policy file leaves: its overrides, and those that operators made.

    Raises:
        CatalogError: if the file names one that operators made or changed, or there would be too many.
    """
    kept = {key: entry for key, entry in existing.items() if not entry["managed_by_file"]}
    for override in overrides:
        entry = existing.get(override.key)
        if entry is not None and not entry["managed_by_file"]:
            raise CatalogError(
                f"the override of rule {override.rule!r} of tier {tier!r} for {override.subject_text[:60]!r} in the policy file "
                "belongs to the catalog, where it was created or last changed: remove one of the two"
            )
        kept[override.key] = changed_entry(entry, override, True)
    require_few_entries(kept, tier)
    return kept


def require_few_entries(entries: Mapping[OverrideKey, Mapping[str, Any]], tier: str) -> None:
    """Refuse more entries than a tier can have.

    Raises:
        CatalogError: naming the bound and the remedy.
    """
    patterns = sum(any("*" in value for value in entry["subject"].values()) for entry in entries.values())
    try:
        require_few(len(entries), patterns, tier)
    except PolicyError as error:
        raise CatalogError(error.reason) from None


async def read_overrides(connection: AsyncConnection, tier_id: int) -> dict[OverrideKey, OverrideRow]:
    """The entries of a tier by key."""
    query = select(subject_overrides.c.entries).where(subject_overrides.c.tier_id == tier_id)
    return by_key((await connection.execute(query)).scalar())


async def read_all_overrides(connection: AsyncConnection) -> dict[int, list[OverrideRow]]:
    """The stored lists of all tiers by the tier's id."""
    rows = await connection.execute(select(subject_overrides.c.tier_id, subject_overrides.c.entries))
    return {row.tier_id: row.entries for row in rows}


async def write_overrides(connection: AsyncConnection, tier_id: int, entries: Mapping[OverrideKey, OverrideRow]) -> None:
    """Replace the entries of a tier."""
    own = subject_overrides.c.tier_id == tier_id
    values = [entries[key] for key in sorted(entries)]
    if not values:
        await connection.execute(delete(subject_overrides).where(own))
    elif (await connection.execute(update(subject_overrides).where(own).values(entries=values))).rowcount == 0:
        await connection.execute(insert(subject_overrides).values(tier_id=tier_id, entries=values))
