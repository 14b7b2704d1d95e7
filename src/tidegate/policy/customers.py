"""Customers: who owns API keys and values of attributes, so that all of them count as one."""

from __future__ import annotations

import datetime
import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec

from tidegate.errors import PolicyError
from tidegate.policy.attributes import MAX_VALUE, require_attribute_name
from tidegate.policy.fields import short
from tidegate.policy.labels import label_fault
from tidegate.policy.overrides import Override
from tidegate.policy.periods import DEFAULT_ANCHOR, PeriodAnchor

MAX_METADATA_BYTES: Final = 4096
MAX_VALUES: Final = 1_000
"""Most attribute values of one customer."""
MAX_EXTERNAL_ID: Final = 200

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", re.ASCII)
UTC: Final = "UTC"


class Customer(msgspec.Struct, frozen=True, gc=False):
    """A customer.

    Args:
        name: 1 to 64 of `[A-Za-z0-9_.-]`; counters use it, so it never changes.
        external_id: what other systems call it; empty for nothing.
        tier: of its keys and attribute values that have no tier of their own; empty for none.
        anchor: date on whose day its quota periods begin, such as `2026-01-31`; empty for the 1st.
        timezone: IANA name of the zone in which they begin; empty for UTC.
        metadata: JSON object for other systems, as text; empty for none. Not read by checks.
        match: attributes and their values, sorted; callers without an API key that have one of them are this customer's.
        overrides: other limits in its tier.
        managed_by_file: whether the policy file owns it.
    """

    name: str
    external_id: str = ""
    tier: str = ""
    anchor: str = ""
    timezone: str = ""
    metadata: str = ""
    match: tuple[tuple[str, tuple[str, ...]], ...] = ()
    overrides: tuple[Override, ...] = ()
    managed_by_file: bool = False

    @classmethod
    def make(
        cls,
        name: object,
        external_id: object = "",
        tier: str = "",
        anchor: object = "",
        timezone: object = "",
        metadata: object = None,
        match: object = None,
        overrides: Iterable[Override] = (),
    ) -> Customer:
        """Validate a customer.

        Args:
            name: see the class; so are all others.
            tier: an existing one, or empty.
            anchor: a date, or its text.
            metadata: a JSON object.
            match: values, or lists of values, by attribute.
            overrides: validated.

        Raises:
            PolicyError: naming the field, its value and the remedy.
        """
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise PolicyError(f"customer name {short(name)} must be 1 to 64 of letters, digits, '_', '.', '-'")
        if not isinstance(external_id, str) or len(external_id) > MAX_EXTERNAL_ID:
            raise PolicyError(f"external_id {short(external_id)} must be a string of at most {MAX_EXTERNAL_ID} characters")
        fault = label_fault(external_id)
        if fault is not None:
            raise PolicyError(f"external_id {fault}")
        # Dates as text: as the database and the cache keep them.
        anchor = anchor.isoformat() if isinstance(anchor, datetime.date) else anchor
        timezone = timezone or ""
        PeriodAnchor.make(anchor or None, timezone or UTC)
        return cls(
            name,
            external_id,
            tier,
            str(anchor or ""),
            str(timezone),
            metadata_text(metadata),
            _match(match),
            tuple(overrides),
        )

    @property
    def period_anchor(self) -> PeriodAnchor:
        """When its quota periods begin."""
        return PeriodAnchor.make(self.anchor or None, self.timezone or UTC) if self.anchor or self.timezone else DEFAULT_ANCHOR

    @property
    def values(self) -> tuple[tuple[str, str], ...]:
        """Each attribute value that it owns."""
        return tuple((name, value) for name, values in self.match for value in values)


def value_digest(attribute: str, value: str) -> str:
    """What an attribute value is found by: 64 lower-case hex digits. Costs 1 µs."""
    return hashlib.sha256(f"{attribute}={value}".encode("utf-8", "surrogatepass")).hexdigest()


def customer_attributes(customers: Iterable[Customer]) -> tuple[str, ...]:
    """The attributes by which callers are a customer's, sorted."""
    return tuple(sorted({name for customer in customers for name, _ in customer.match}))


def require_distinct(customers: Iterable[Customer]) -> None:
    """Refuse customers of which two have the same name, external id or attribute value.

    Raises:
        PolicyError: naming both.
    """
    owners: dict[tuple[str, str], str] = {}
    for customer in customers:
        claimed = [("name", customer.name), *((f"match.{name}", value) for name, value in customer.values)]
        if customer.external_id:
            claimed.append(("external_id", customer.external_id))
        for claim in claimed:
            if claim in owners:
                raise PolicyError(
                    f"customers {owners[claim]!r} and {customer.name!r} have the same {claim[0]} {short(claim[1])}: remove one"
                )
            owners[claim] = customer.name


def metadata_text(metadata: object) -> str:
    """A customer's metadata as text.

    Args:
        metadata: a JSON object; None for none.

    Raises:
        PolicyError: if it is not one, or longer than `MAX_METADATA_BYTES`.
    """
    if metadata is None or metadata == {}:
        return ""
    if not isinstance(metadata, Mapping):
        raise PolicyError(f'metadata {short(metadata)} must be a table such as {{ plan = "2026-b" }}')
    try:
        _require_json(metadata, 0)
        text = msgspec.json.encode(metadata)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise PolicyError(f"metadata cannot be written as JSON: {str(error)[:100]}") from None
    if len(text) > MAX_METADATA_BYTES:
        raise PolicyError(f"metadata has {len(text)} bytes as JSON: at most {MAX_METADATA_BYTES} are kept")
    return text.decode()


def metadata_of(text: str) -> dict[str, Any]:
    """The metadata that `metadata_text` wrote."""
    return msgspec.json.decode(text, type=dict[str, Any]) if text else {}


def _require_json(value: object, depth: int) -> None:
    """Refuse what JSON has no form for: msgspec would write dates and infinities as something else."""
    if depth > 32:
        raise ValueError("it is nested too deeply")
    if isinstance(value, Mapping):
        for key, each in value.items():
            if not isinstance(key, str) or "\0" in key:
                raise ValueError("a key is not a string, or has a NUL character")
            _require_json(each, depth + 1)
    elif isinstance(value, list):
        for each in value:
            _require_json(each, depth + 1)
    elif isinstance(value, str) and "\0" in value:
        raise ValueError("a text has a NUL character")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is not a JSON number")
    elif not (value is None or isinstance(value, str | int | float)):
        raise ValueError(f"{short(value)} is not a JSON value: write it in quotes")


def _match(value: object) -> tuple[tuple[str, tuple[str, ...]], ...]:
    if value is None:
        return ()
    if not isinstance(value, Mapping):
        raise PolicyError(f'match {short(value)} must be a table such as {{ org = "acme" }}')
    found: list[tuple[str, tuple[str, ...]]] = []
    for name, given in value.items():
        require_attribute_name(name)
        values = given if isinstance(given, list | tuple) else [given]
        for each in values:
            if not isinstance(each, str) or not 1 <= len(each) <= MAX_VALUE or not each.isprintable():
                raise PolicyError(
                    f"match has for {name} the value {short(each)}: it must be 1 to {MAX_VALUE} printable characters"
                )
        if not values:
            raise PolicyError(f"match has no value for {name}: give one, or leave it out")
        found.append((str(name), tuple(sorted({str(each) for each in values}))))
    if sum(len(values) for _, values in found) > MAX_VALUES:
        raise PolicyError(f"match has more than {MAX_VALUES} values: one customer has at most so many")
    return tuple(sorted(found))
