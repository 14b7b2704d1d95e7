"""Reads and writes `[[customers]]` of a policy file, for `toml_reader` and `toml_writer`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from tidegate.policy.customers import Customer, metadata_of, require_distinct
from tidegate.policy.fields import short
from tidegate.policy.model import Tier
from tidegate.policy.rules import Subject
from tidegate.policy.toml_overrides import read_overrides
from tidegate.policy.toml_tables import TableReader, nearest

MAX_CUSTOMERS: Final = 10_000
"""Most customers of one policy."""

_FIELDS: Final = ("name", "external_id", "tier", "anchor", "timezone", "metadata", "match", "limits", "quotas", "overrides")
_OWN: Final = ("external_id", "anchor", "timezone", "metadata", "match")


def read_customers(reader: TableReader, raw: dict[str, Any], tiers: Mapping[str, Tier]) -> dict[str, Customer]:
    """The customers of a policy, by name.

    Raises:
        PolicyError: with file, line and reason.
    """
    found: list[Customer] = []
    for at, table in reader.tables(raw, "customers", (), MAX_CUSTOMERS):
        reader.known(table, _FIELDS, at)
        reader.required(table, ("name",), at)
        tier = None
        if "tier" in table:
            tier = tiers.get(table["tier"]) if isinstance(table["tier"], str) else None
            if tier is None:
                raise reader.error(
                    f"tier {short(table['tier'])} is not in this policy{nearest(table['tier'], tiers)}", (*at, "tier")
                )
        overrides = read_overrides(reader, table, at, tier, "customer", (Subject.API_KEY, Subject.CUSTOMER))
        given = {field: table[field] for field in _OWN if field in table}
        tier_name = "" if tier is None else tier.name
        made = reader.placed(
            lambda name=table["name"], tier=tier_name, overrides=overrides, given=given: Customer.make(  # type: ignore[misc]
                name, tier=tier, overrides=overrides, **given
            ),
            at,
        )
        found.append(_of_file(made))
    reader.placed(lambda: require_distinct(found), ("customers",))
    return {customer.name: customer for customer in found}


def customer_fields(customer: Customer) -> list[str]:
    """The lines of a customer's table before its overrides."""
    lines = ["[[customers]]", f"name = {_string(customer.name)}"]
    for field, value in (
        ("external_id", customer.external_id),
        ("tier", customer.tier),
        ("anchor", customer.anchor),
        ("timezone", customer.timezone),
    ):
        if value:
            lines.append(f"{field} = {_string(value)}")
    if customer.metadata:
        lines.append(f"metadata = {_value(metadata_of(customer.metadata))}")
    if customer.match:
        matched = {name: values[0] if len(values) == 1 else list(values) for name, values in customer.match}
        lines.append(f"match = {_value(matched)}")
    return lines


def _of_file(customer: Customer) -> Customer:
    return Customer(
        customer.name,
        customer.external_id,
        customer.tier,
        customer.anchor,
        customer.timezone,
        customer.metadata,
        customer.match,
        customer.overrides,
        managed_by_file=True,
    )


def _value(value: Any) -> str:
    """A JSON value as TOML; null, which TOML lacks, is left out of tables."""
    if isinstance(value, Mapping):
        inside = ", ".join(f"{_string(name)} = {_value(each)}" for name, each in value.items() if each is not None)
        return f"{{ {inside} }}" if inside else "{}"
    if isinstance(value, list):
        return f"[{', '.join(_value(each) for each in value if each is not None)}]"
    return _string(value) if isinstance(value, str) else json.dumps(value)


def _string(text: str) -> str:
    # JSON's escapes are TOML's, but for DEL, which TOML does not take as it is.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
