"""Changes of namespaces by operators, each in one transaction with its row in the audit log, and the tables about callers.

All namespaces are one value of the row `policy_state`, which the write lock protects.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from tidegate.admin.models.namespaces import CallersRead, JwtRead, NamespaceRead
from tidegate.admin.rules import CatalogEditor
from tidegate.admin.transaction import AuditedTransaction, ExpectedRevisions, NotFound, require_editable
from tidegate.catalog.changes import ANONYMOUS
from tidegate.catalog.sql import rows as policy_rows
from tidegate.catalog.sql.namespace_rows import NamespaceRow, changed_entry, entries_of
from tidegate.catalog.sql.paging import Page, page_of
from tidegate.catalog.sql.tables import policy_state
from tidegate.errors import CatalogError
from tidegate.policy.namespaces import Namespace
from tidegate.policy.toml_callers import MAX_NAMESPACES

_FIELDS: Final = ("limits", "algorithm", "on_failure", "overrides")


async def list_namespaces(editor: CatalogEditor, limit: int, after: str | None, name: str | None = None) -> Page[NamespaceRead]:
    """Namespaces by name.

    Args:
        name: substring of the name, case-insensitive.

    Raises:
        CatalogUnavailable: if the database does not answer.
    """
    async with editor.reading() as connection:
        entries = await _entries(connection)
    found = [
        NamespaceRead.of_row(entry)
        for entry in entries
        if (after is None or entry["name"] > after) and (name is None or name.lower() in entry["name"].lower())
    ]
    return page_of(found[: limit + 1], limit, lambda item: str(item.name))


async def get_namespace(editor: CatalogEditor, name: str) -> NamespaceRead:
    """One namespace.

    Raises:
        NotFound: with the names of existing ones.
        CatalogUnavailable: if the database does not answer.
    """
    async with editor.reading() as connection:
        return NamespaceRead.of_row(_named(await _entries(connection), name))


async def create_namespace(editor: CatalogEditor, actor: str, name: str, fields: Mapping[str, Any]) -> NamespaceRead:
    """Create a namespace.

    Args:
        fields: `limits`, `algorithm`, `on_failure` and `overrides`, as requests have them.

    Raises:
        PolicyError: if a value is not valid.
        CatalogError: if it exists, or there are too many.
        CatalogUnavailable: if the database does not answer.
    """
    made = _made(name, fields)
    async with editor.changing(actor) as transaction:
        entries = await _entries(transaction.connection)
        if any(entry["name"] == made.name for entry in entries):
            raise CatalogError(f"there is a namespace {made.name!r} already: change that one, or choose another name")
        if len(entries) >= MAX_NAMESPACES:
            raise CatalogError(f"there are {len(entries)} namespaces, which is the maximum: delete one first")
        entry = changed_entry(None, made, False)
        await _write(transaction, [*entries, entry])
        created = NamespaceRead.of_row(entry)
        await transaction.audit("create", "namespace", made.name, None, created)
        return created


async def edit_namespace(
    editor: CatalogEditor,
    actor: str,
    name: str,
    fields: Mapping[str, Any],
    expected_revisions: ExpectedRevisions,
) -> NamespaceRead:
    """Change a namespace; what is consumed is kept.

    Args:
        fields: as for `create_namespace`; omitted ones keep their values.

    Raises:
        NotFound, ManagedByFile, StaleRevision: see `CatalogEditor`.
        PolicyError: if a value is not valid.
        CatalogUnavailable: if the database does not answer.
    """
    async with editor.changing(actor) as transaction:
        entries = await _entries(transaction.connection)
        entry = _named(entries, name)
        require_editable(transaction, entry, expected_revisions, f"namespace {name!r}")
        changed = changed_entry(entry, _made(name, {**{field: entry[field] for field in _FIELDS}, **fields}), False)
        await _write(transaction, [changed if each is entry else each for each in entries])
        after = NamespaceRead.of_row(changed)
        await transaction.audit("update", "namespace", name, NamespaceRead.of_row(entry), after)
        return after


async def delete_namespace(editor: CatalogEditor, actor: str, name: str, expected_revisions: ExpectedRevisions) -> None:
    """Delete a namespace; requests that name it must bring their limits then.

    Raises:
        NotFound, ManagedByFile, StaleRevision: see `CatalogEditor`.
        CatalogUnavailable: if the database does not answer.
    """
    async with editor.changing(actor) as transaction:
        entries = await _entries(transaction.connection)
        entry = _named(entries, name)
        require_editable(transaction, entry, expected_revisions, f"namespace {name!r}")
        await _write(transaction, [each for each in entries if each is not entry])
        await transaction.audit("delete", "namespace", name, NamespaceRead.of_row(entry), None)


async def read_callers(editor: CatalogEditor) -> CallersRead:
    """What the policy says of callers without an API key.

    Raises:
        CatalogUnavailable: if the database does not answer.
    """
    async with editor.reading() as connection:
        row = (await connection.execute(select(policy_state))).mappings().one()
    policy = policy_rows.caller_policy_of(row)
    jwt = policy.jwt
    return CallersRead(
        anonymous_tier=policy.anonymous_tier,
        tier_from=None if policy.callers is None else policy.callers.tier_from or None,
        default_tier=None if policy.callers is None else policy.callers.default_tier or None,
        attributes={source.name: source.text for source in policy.attributes},
        jwt=None
        if jwt is None
        else JwtRead(
            jwks=jwt.jwks,
            issuer=jwt.issuer,
            audience=list(jwt.audience),
            header=jwt.header,
            algorithms=list(jwt.algorithms),
            leeway_s=jwt.leeway_s,
        ),
        managed_by_file=row["file_digest"] is not None,
    )


async def _entries(connection: AsyncConnection) -> list[NamespaceRow]:
    return entries_of((await connection.execute(select(policy_state.c.namespaces))).scalar())


async def _write(transaction: AuditedTransaction, entries: list[NamespaceRow]) -> None:
    transaction.touch(ANONYMOUS)
    await transaction.connection.execute(update(policy_state).values(namespaces=entries or None))


def _named(entries: list[NamespaceRow], name: str) -> NamespaceRow:
    for entry in entries:
        if entry["name"] == name:
            return entry
    names = ", ".join(str(entry["name"]) for entry in entries[:20])
    raise NotFound(f"there is no namespace {name[:64]!r}: there are {names or 'none yet; make one first'}")


def _made(name: str, fields: Mapping[str, Any]) -> Namespace:
    overrides = [(each["subject"], each["limits"]) for each in fields["overrides"]]
    return Namespace.make(name, fields["limits"], fields["algorithm"], fields["on_failure"], overrides)
