"""Usage and reset of API keys by id; `tidegate.gate.usage` reads and resets the counters."""

from __future__ import annotations

from sqlalchemy import select

from tidegate.admin.customers import get_customer
from tidegate.admin.lists import key_row
from tidegate.admin.rules import CatalogEditor
from tidegate.admin.transaction import NotFound
from tidegate.catalog.cache_level import Caller
from tidegate.catalog.sql.tables import api_keys
from tidegate.decision import Usage
from tidegate.errors import BadRequest, MissingApiKey, clip
from tidegate.gate.customers import customer_caller
from tidegate.gate.gate import Gate
from tidegate.gate.quotas import key_counters
from tidegate.gate.usage import caller_usage, reset_counters
from tidegate.ip_addresses import client_of
from tidegate.policy.attributes import is_name, parse_subject
from tidegate.policy.descriptors import entries_subject
from tidegate.timestamps import now_us


async def caller_of(editor: CatalogEditor, gate: Gate, key_id: str) -> Caller:
    """The caller of an API key, including revoked and expired keys.

    Raises:
        NotFound: if there is no such key.
        CatalogUnavailable: if the catalog does not answer.
    """
    row = await key_row(editor, key_id)
    caller = await gate.catalog.caller(row["sha256"])
    if caller is None:
        raise NotFound(f"the API key {key_id} was deleted: see GET /admin/v1/api-keys")
    caller.end_overrides(now_us())
    return caller


async def subject_of_key(editor: CatalogEditor, key_id: str) -> str:
    """The subject of a key in counters and violations: the first key of its chain of rotations.

    Returns:
        The subject; the key's own id if its record was deleted.

    Raises:
        CatalogUnavailable: if the catalog does not answer.
    """
    async with editor.reading() as connection:
        counts_as = (await connection.execute(select(api_keys.c.counts_as).where(api_keys.c.id == key_id))).scalar()
    return f"k:{counts_as or key_id}"


async def key_usage(editor: CatalogEditor, gate: Gate, key_id: str, ip: str | None) -> Usage:
    """The usage of an API key; unlike `Gate.usage` also for revoked and expired keys.

    Args:
        ip: address of the key's client, for rules that count by address; None to omit these.

    Raises:
        NotFound: if there is no such key.
        BadRequest: if the ip is not a valid address.
        CatalogUnavailable: if the catalog does not answer.
    """
    client = None if ip is None else client_of(ip)
    return await caller_usage(gate.counters, await caller_of(editor, gate, key_id), client, count_holds=True)


async def subject_usage(gate: Gate, subject: str, ip: str | None, tier: str | None) -> tuple[Usage, str]:
    """What is left to a subject of attributes.

    Args:
        gate: whose counters are read.
        subject: such as `user=42`.
        ip: address of its client, for rules that count by address; None to leave those out.
        tier: of the subject; None where the policy is to decide by the attributes.

    Returns:
        The usage, and the subject as violations have it.

    Raises:
        NotFound: if the policy has no tier for such a caller.
        BadRequest: if the subject is malformed, the ip is not a valid address, or there is no such tier.
        CatalogUnavailable: if the catalog does not answer.
    """
    entries = parse_subject(subject)
    if "api_key" in entries:
        raise BadRequest("a subject with api_key cannot be read by its attributes alone: give api_key_id", field="subject")
    attributes = {name: value for name, value in entries.items() if name != "ip"}
    try:
        usage = await gate.usage(ip=ip or entries.get("ip"), attributes=attributes, tier=tier, count_holds=True)
    except MissingApiKey:
        raise NotFound("the policy has no tier for callers without an API key and with these attributes: give tier") from None
    return usage, attribute_subject_text(subject)


def attribute_subject_text(subject: str) -> str:
    """A subject of attributes as counters and violations have it.

    Args:
        subject: such as `user=42`; a digest (`h:…`), which stands for a long one, as it is.

    Raises:
        BadRequest: if it is malformed.
    """
    if subject.startswith("h:"):
        return subject
    return entries_subject(sorted(parse_subject(subject).items()), prefix="a:")


def attribute_names(text: str) -> tuple[str, ...]:
    """Names of attributes, separated by commas; sorted, as subjects have them.

    Raises:
        BadRequest: if one is not a valid name.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if not is_name(name):
            raise BadRequest(f"attribute {clip(name)} is not a valid name: write user, or org,user", field="attribute")
    return tuple(sorted(set(names)))


async def reset_key(editor: CatalogEditor, gate: Gate, key_id: str) -> int:
    """Reset the counters of an API key; those of its customer stay.

    Returns:
        The number of counters reset.

    Raises:
        NotFound: if there is no such key.
        CatalogUnavailable: if the catalog does not answer.
        StoreUnavailable: if the counter store fails; some may have been reset.
    """
    caller = await caller_of(editor, gate, key_id)
    return await reset_counters(gate.counters, key_counters(caller))


async def customer_usage(editor: CatalogEditor, gate: Gate, name: str, tier: str | None) -> tuple[Usage, str]:
    """What is left to a customer: its quotas, and rules by customer.

    Args:
        tier: of its callers; None for the customer's own.

    Returns:
        The usage, and the subject as violations have it.

    Raises:
        NotFound: if there is no such customer.
        BadRequest: if there is no such tier, or the customer has none and none was given.
        CatalogUnavailable: if the catalog does not answer.
    """
    await get_customer(editor, name)
    caller = await customer_caller(gate.catalog, name, tier)
    return await caller_usage(gate.counters, caller, None, count_holds=True), caller.customer_subject


async def reset_customer(editor: CatalogEditor, gate: Gate, name: str) -> int:
    """Reset the counters of a customer; those of its keys alone stay.

    Returns:
        The number of counters reset.

    Raises:
        NotFound: if there is no such customer.
        CatalogUnavailable: if the catalog does not answer.
        StoreUnavailable: if the counter store fails; some may have been reset.
    """
    await get_customer(editor, name)
    return await gate.reset(customer=name)
