"""Entries of the shared cache: sealed when they are written, verified and validated when they are read.

Redis stores counters, and many clients may have write access. A forged entry could move a key to another tier, remove its limits,
or accept a revoked key. So an entry carries an HMAC-SHA256 under a secret of the catalog, over its name and its content; an entry
that was written by another client, modified, or copied from another name is rejected. An accepted entry is validated like a row
of the database, and must be the record that was looked up.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from typing import Final, TypeVar

import msgspec

from tidegate.errors import PolicyError
from tidegate.policy.attributes import CallerPolicy
from tidegate.policy.customers import Customer
from tidegate.policy.failures import FailureCount
from tidegate.policy.limits import Algorithm, AnyAlgorithm, Limit, fit_limits
from tidegate.policy.model import ApiKey, Tier
from tidegate.policy.overrides import Override
from tidegate.policy.quotas import Overage, Quota, fit_quotas, require_quotas
from tidegate.policy.rules import Rule

_TAG_BYTES: Final = 32
_KEY_ID: Final = re.compile(r"[0-9a-f]{24}", re.ASCII)


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """A cached value, with the catalog version it was read at."""

    version: int


class KeyEntry(Entry, frozen=True, array_like=True):
    """A single API key."""

    value: ApiKey


class TierEntry(Entry, frozen=True, array_like=True):
    """A tier with all its rules."""

    value: Tier


class CustomerEntry(Entry, frozen=True, array_like=True):
    """A customer without its metadata."""

    value: Customer


class CallersEntry(Entry, frozen=True, array_like=True):
    """What a policy says of callers without an API key."""

    value: CallerPolicy


AnyEntry = TypeVar("AnyEntry", KeyEntry, TierEntry, CustomerEntry, CallersEntry)


class InvalidEntry(Exception):
    """The value was not written by an instance of this catalog, or is invalid."""


class EntrySeal:
    """Seals entries, and opens entries sealed with the same secret. Costs about 2 µs per entry.

    Args:
        secret: the catalog's secret; 16 bytes or more.

    Attributes:
        form: identifies the schema of the entries and the secret; part of the Redis keys, so that instances with another schema
            or secret neither read nor overwrite these entries.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = hashlib.sha256(b"tidegate shared cache\0" + secret).digest()
        kinds = (KeyEntry, TierEntry, CustomerEntry, CallersEntry)
        described = msgspec.json.encode(msgspec.json.schema_components(kinds), order="sorted")
        self.form = hmac.digest(self._secret, described, "sha256").hex()[:6]

    def seal(self, name: bytes, entry: Entry) -> bytes:
        """Encode and seal an entry.

        Returns:
            The tag and the entry.
        """
        content = msgspec.msgpack.encode(entry)
        return self._tag(name, content) + content

    def open(self, name: bytes, raw: bytes, decoder: msgspec.msgpack.Decoder[AnyEntry]) -> AnyEntry:
        """Verify and decode an entry.

        Returns:
            The entry; only the types of its content are validated.

        Raises:
            InvalidEntry: with the reason.
        """
        content = raw[_TAG_BYTES:]
        if not hmac.compare_digest(raw[:_TAG_BYTES], self._tag(name, content)):
            raise InvalidEntry("it was not sealed with the secret of this catalog")
        try:
            return decoder.decode(content)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InvalidEntry(str(error)) from None

    def _tag(self, name: bytes, content: bytes) -> bytes:
        return hmac.digest(self._secret, b"%d:%b%b" % (len(name), name, content), "sha256")


def require_valid_key(api_key: ApiKey, sha256: str) -> None:
    """Reject a key's record that is not the requested one, or that no database row could contain.

    Raises:
        InvalidEntry: with the reason.
    """
    if api_key.sha256 != sha256:
        raise InvalidEntry("it belongs to another API key")
    if not api_key.tier or (api_key.expires_at_us is not None and abs(api_key.expires_at_us) >= 1 << 63):
        raise InvalidEntry("it has no tier, or a time that the database cannot store")
    if api_key.counts_as and _KEY_ID.fullmatch(api_key.counts_as) is None:
        raise InvalidEntry("its counts_as is not the id of an API key")
    _require_valid_overrides(api_key.overrides)


def require_valid_customer(customer: Customer, name: str) -> None:
    """Reject a customer that is not the requested one, or that no database row could contain.

    Raises:
        InvalidEntry: with the reason.
    """
    if customer.name != name:
        raise InvalidEntry("it belongs to another customer")
    try:
        customer.period_anchor  # noqa: B018 - computing it validates the date and the time zone
    except PolicyError as error:
        raise InvalidEntry(error.reason) from None
    _require_valid_overrides(customer.overrides)


def require_valid_tier(tier: Tier, name: str) -> None:
    """Reject a tier that is not the requested one, or that no database rows could contain.

    Raises:
        InvalidEntry: with the reason.
    """
    if tier.name != name:
        raise InvalidEntry("it belongs to another tier")
    if tier.limits:
        _require_valid_limits(tier.limits, Algorithm.SLIDING_WINDOW)
    _require_valid_quotas(tier)
    names = set()
    for rule in tier.rules:
        if rule.limits or not (rule.quotas or rule.action):
            _require_valid_limits(rule.limits, rule.counting)
        _require_valid_failures(rule.failures)
        _require_valid_quotas(rule)
        names.add(rule.name)
    if len(names) < len(tier.rules) or "" in names:
        raise InvalidEntry("two of its rules have the same name, or one has no name")
    _require_valid_subject_overrides(tier)


def _require_valid_failures(failures: FailureCount | None) -> None:
    try:
        if failures is not None and FailureCount.of_stored(failures.stored) != failures:
            raise InvalidEntry("what it says of failures does not match its text")
    except PolicyError as error:
        raise InvalidEntry(error.reason) from None


def _require_valid_subject_overrides(tier: Tier) -> None:
    if len({override.key for override in tier.overrides}) < len(tier.overrides):
        raise InvalidEntry("two of its overrides are for the same subject of a rule")
    # Thousands of overrides have a few different limits.
    for limits in {override.limits for override in tier.overrides}:
        _require_valid_limits(limits)
    for override in tier.overrides:
        if not override.rule or not override.subject or not override.limits:
            raise InvalidEntry("an override has no rule, subject or limits")
        if override.until_us is not None and abs(override.until_us) >= 1 << 63:
            raise InvalidEntry("an override ends at a time that the database cannot store")


def _require_valid_quotas(record: Tier | Rule | Override) -> None:
    try:
        if any(Quota.parse(quota.text) != quota for quota in record.quotas) or fit_quotas(record.quotas) != record.quotas:
            raise InvalidEntry("a quota does not match its text, or quotas are not in order")
        if isinstance(record, Override):
            return
        if record.overage is not None and Overage.parse(record.overage.value) != record.overage:
            raise InvalidEntry("an overage does not match its text")
        require_quotas(record.overage, record.quotas)
    except PolicyError as error:
        raise InvalidEntry(str(error)) from None


def _require_valid_overrides(overrides: tuple[Override, ...]) -> None:
    for override in overrides:
        _require_valid_limits(override.limits)
        _require_valid_quotas(override)
        if override.limits and override.quotas:
            raise InvalidEntry("an override has both limits and quotas")
        if override.until_us is not None and abs(override.until_us) >= 1 << 63:
            raise InvalidEntry("an override ends at a time that the database cannot store")
        if any(Quota.parse(quota.text) != quota for quota in override.quotas):
            raise InvalidEntry("a quota does not match its text")


def _require_valid_limits(limits: tuple[Limit, ...], algorithm: AnyAlgorithm | None = None) -> None:
    """Reject limits that differ from their own text: the database stores the texts."""
    try:
        for limit in limits:
            if Limit.parse(limit.text) != limit:
                raise InvalidEntry(f"the limit {limit.text[:60]!r} does not match its text")
        if algorithm is not None:
            fit_limits(algorithm, limits)
    except (PolicyError, AssertionError) as error:
        raise InvalidEntry(str(error)) from None
