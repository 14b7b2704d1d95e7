"""Blocks: operators stop a network, an API key, a customer or the values of attributes, until a time or until they lift it."""

from __future__ import annotations

import ipaddress
from typing import Any, Final

from sqlalchemy import RowMapping, and_, delete, func, insert, not_, or_, select, update

from tidegate.admin.block_models import BlockCreate, BlockRead
from tidegate.admin.rules import CatalogEditor
from tidegate.admin.transaction import AuditedTransaction, NotFound
from tidegate.catalog.blocks import API_KEY_ID, ATTRIBUTE, CIDR, CUSTOMER, MAX_BLOCKS, MAX_TARGET, attributes_text
from tidegate.catalog.changes import BLOCK
from tidegate.catalog.sql.catalog import holding_blocks
from tidegate.catalog.sql.paging import Page, invalid_cursor, page_of, rows_of
from tidegate.catalog.sql.tables import api_keys, blocks, customers
from tidegate.errors import BadRequest, CatalogError, PolicyError
from tidegate.ip_addresses import canonical_ip, embedded_ipv4
from tidegate.policy.access import require_customer, require_exact_attributes, require_key_id
from tidegate.policy.networks import Network, parse_network
from tidegate.timestamps import now_us, parse_timestamp

MIN_PREFIX: Final = {4: 8, 6: 16}
"""Shortest prefix of a block, by IP version: a mistyped one would stop a large part of the internet."""
KEPT_MS: Final = 30 * 86_400_000
"""How long the rows of ended blocks are kept."""
_PURGE: Final = 500
_KIND: Final = "block"


async def list_blocks(
    editor: CatalogEditor,
    limit: int,
    after: str | None,
    status: str = "active",
    kind: str | None = None,
    target: str | None = None,
    ip: str | None = None,
) -> Page[BlockRead]:
    """Blocks, the newest first.

    Args:
        limit: maximum number of items, 1 to 500.
        after: `next` of the previous page.
        status: active, ended (expired or removed), or all.
        kind: what is blocked, as `BlockCreate` names it; None for any.
        target: exactly this network, id, customer, or attributes such as `org=acme&user=42`.
        ip: only networks that contain this address.

    Raises:
        BadRequest: if `after` is not from this list, or `ip` is not an address.
        CatalogUnavailable: if the database does not answer.
    """
    query = select(blocks).order_by(blocks.c.id.desc())
    if status != "all":
        holding = and_(*holding_blocks())
        query = query.where(holding if status == "active" else not_(holding))
    if kind is not None:
        query = query.where(blocks.c.kind == kind)
    if target is not None:
        query = query.where(blocks.c.target == target)
    if ip is not None:
        query = query.where(blocks.c.kind == CIDR, blocks.c.target.in_(_networks_of(ip)))
    if after is not None:
        if not after.isascii() or not after.isdecimal() or len(after) > 18:
            raise invalid_cursor(after)
        query = query.where(blocks.c.id < int(after))
    rows = await rows_of(editor.catalog.database, query, limit)
    return page_of([BlockRead.of_row(row) for row in rows], limit, lambda item: str(item.id))


async def create_block(editor: CatalogEditor, actor: str, given: BlockCreate) -> BlockRead:
    """Block someone, on every instance within a second.

    Args:
        given: whom, until when and why.

    Raises:
        BadRequest: if it does not name exactly one, or a value is not valid.
        NotFound: if there is no such API key or customer.
        CatalogError: if the same is blocked already, or too many blocks hold.
        CatalogUnavailable: if the database does not answer.
    """
    kind, target = _target_of(given)
    until_us = None if given.until is None else parse_timestamp(given.until, "until")
    now = now_us()
    if until_us is not None and until_us <= now:
        raise BadRequest("until is in the past: send a later time, or leave it out for a block without an end", field="until")
    async with editor.changing(actor) as transaction:
        transaction.touch(BLOCK)
        if kind == API_KEY_ID and await transaction.one(select(api_keys.c.id).where(api_keys.c.id == target)) is None:
            raise NotFound(f"there is no API key {target}: see GET /admin/v1/api-keys")
        if kind == CUSTOMER and await transaction.one(select(customers.c.name).where(customers.c.name == target)) is None:
            raise NotFound(f"there is no customer {target[:64]!r}: see GET /admin/v1/customers")
        await _end_expired(transaction, kind, target, now)
        count = select(func.count()).select_from(blocks).where(blocks.c.ended_at_us.is_(None))
        if (await transaction.connection.execute(count)).scalar_one() >= MAX_BLOCKS:
            raise CatalogError(
                f"{MAX_BLOCKS} blocks are active, which is the maximum: remove some, or block a wider network instead"
            )
        await _purge(transaction)
        values: dict[str, Any] = {
            "kind": kind,
            "target": target,
            "reason": given.reason,
            "message": given.message,
            "created_at_us": now,
            "created_by": actor[:200],
            "until_us": until_us,
            "ended_at_us": None,
            "version": transaction.version,
        }
        block_id = (await transaction.connection.execute(insert(blocks).values(values).returning(blocks.c.id))).scalar_one()
        made = BlockRead.of_row({**values, "id": block_id})
        await transaction.audit("create", _KIND, str(block_id), None, made)
    return made


async def get_block(editor: CatalogEditor, block_id: int) -> BlockRead:
    """One block.

    Raises:
        NotFound: if there is none with this id.
        CatalogUnavailable: if the database does not answer.
    """
    rows = await rows_of(editor.catalog.database, select(blocks).where(blocks.c.id == block_id), 1)
    if not rows:
        raise _no_such(block_id)
    return BlockRead.of_row(rows[0])


async def remove_block(editor: CatalogEditor, actor: str, block_id: int) -> BlockRead:
    """Lift a block, on every instance within a second. Its record stays for 30 days.

    Raises:
        NotFound: if there is none with this id.
        CatalogError: if it has ended already.
        CatalogUnavailable: if the database does not answer.
    """
    async with editor.changing(actor) as transaction:
        row = await transaction.one(select(blocks).where(blocks.c.id == block_id))
        if row is None:
            raise _no_such(block_id)
        before = BlockRead.of_row(row)
        if before.status != "active":
            raise CatalogError(f"the block {block_id} is {before.status} already")
        transaction.touch(BLOCK)
        after = BlockRead.of_row({**row, **await _end(transaction, row, now_us())})
        await transaction.audit("delete", _KIND, str(block_id), before, after)
    return after


def _target_of(given: BlockCreate) -> tuple[str, str]:
    """The kind of a block and what it is for, as stored."""
    named = {
        CIDR: given.cidr,
        API_KEY_ID: given.api_key_id,
        CUSTOMER: given.customer,
        ATTRIBUTE: given.attribute,
    }
    kinds = [kind for kind, value in named.items() if value is not None]
    if len(kinds) != 1:
        raise BadRequest(
            f"a block needs exactly one of cidr, api_key_id, customer and attribute, not {len(kinds)}: send one of them",
            field=kinds[1] if kinds else CIDR,
        )
    kind = kinds[0]
    try:
        if kind == CIDR:
            return kind, _network_text(parse_network(given.cidr))
        if kind == API_KEY_ID:
            return kind, require_key_id(given.api_key_id)
        if kind == CUSTOMER:
            return kind, require_customer(given.customer)
        target = attributes_text(require_exact_attributes(dict(given.attribute or {})))
    except PolicyError as error:
        raise BadRequest(error.reason, field=kind) from None
    if len(target) > MAX_TARGET:
        raise BadRequest(
            f"attribute is too long: names and values together may have {MAX_TARGET} characters, and these have {len(target)}; "
            "name fewer attributes",
            field=kind,
        )
    return kind, target


def _network_text(network: Network) -> str:
    shortest = MIN_PREFIX[network.version]
    if network.prefixlen < shortest:
        raise PolicyError(
            f"network {network} is too wide for a block: at least /{shortest} is needed; to deny so many, use [[access]] in the "
            "policy"
        )
    return str(network)


def _networks_of(ip: str) -> list[str]:
    """All networks that contain an address, as texts."""
    address = ipaddress.ip_address(canonical_ip(ip))
    addresses = [address]
    if isinstance(address, ipaddress.IPv6Address) and (embedded := embedded_ipv4(address)) is not None:
        addresses.append(embedded)
    return [
        str(ipaddress.ip_network((int(each), prefix), strict=False))
        if each.version == 4
        else str(ipaddress.IPv6Network((int(each), prefix), strict=False))
        for each in addresses
        for prefix in range(MIN_PREFIX[each.version], each.max_prefixlen + 1)
    ]


async def _end_expired(transaction: AuditedTransaction, kind: str, target: str, now: int) -> None:
    """Make room for a new block of a target whose block has expired."""
    query = select(blocks).where(blocks.c.kind == kind, blocks.c.target == target, blocks.c.ended_at_us.is_(None))
    row = await transaction.one(query)
    if row is None:
        return
    if row["until_us"] is None or row["until_us"] > now:
        until = BlockRead.of_row(row).until
        raise CatalogError(
            f"{kind} {target[:60]!r} is blocked already, by block {row['id']}, "
            f"{'without an end' if until is None else f'until {until}'}: delete that one first to change it",
            id=row["id"],
        )
    await _end(transaction, row, row["until_us"])


async def _end(transaction: AuditedTransaction, row: RowMapping, at_us: int) -> dict[str, Any]:
    values = {"ended_at_us": at_us, "version": transaction.version}
    await transaction.connection.execute(update(blocks).where(blocks.c.id == row["id"]).values(values))
    return values


async def _purge(transaction: AuditedTransaction) -> None:
    """Delete some rows of blocks that ended long ago: every process has read that."""
    old = select(blocks.c.id).where(
        blocks.c.version <= transaction.version - KEPT_MS,
        or_(blocks.c.ended_at_us.is_not(None), blocks.c.until_us <= now_us() - KEPT_MS * 1000),
    )
    await transaction.connection.execute(delete(blocks).where(blocks.c.id.in_(old.limit(_PURGE))))


def _no_such(block_id: int) -> NotFound:
    return NotFound(f"there is no block {block_id}: see GET /admin/v1/blocks?status=all")
