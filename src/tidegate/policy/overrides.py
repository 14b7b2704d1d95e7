"""Overrides of API keys, customers and subjects, and which of them apply at a time.

Each process knows the time, so none needs an event for the end of an override.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from tidegate.policy.descriptors import entries_text
from tidegate.policy.limits import Limit
from tidegate.policy.quotas import Quota


class Override(msgspec.Struct, frozen=True, gc=False):
    """Other limits, or other quotas, for one key or customer.

    A rule may have two for each of them: a permanent one, and one that ends, which applies until then.

    Args:
        rule: name of the rule in the tier; empty for the tier's own limits.
        limits: what holds instead; empty for one of quotas.
        until_us: µs since the epoch (UTC) from which it no longer applies; None for never.
        quotas: what holds in place of the quotas of the rule or the tier; empty for one of limits.
    """

    rule: str
    limits: tuple[Limit, ...]
    until_us: int | None = None
    quotas: tuple[Quota, ...] = ()

    @property
    def key(self) -> tuple[str, bool, bool]:
        """What a key or customer has at most one override of."""
        return self.rule, bool(self.quotas), self.until_us is not None

    @property
    def subject(self) -> str:
        """What it replaces, for messages."""
        if self.quotas:
            return f"quotas of the rule {self.rule!r} are" if self.rule else "the tier's quotas are"
        return f"rule {self.rule!r} is" if self.rule else "the tier's own limits are"


class SubjectOverride(msgspec.Struct, frozen=True, gc=False):
    """Other limits for some subjects of a rule that counts by attributes; `subject_overrides` validates it.

    Args:
        rule: name of the rule in the tier.
        subject: names of attributes and their values or patterns, sorted by name; any value of those that are not named.
        limits: what holds instead.
        until_us: µs since the epoch (UTC) from which it no longer applies; None for never.
    """

    rule: str
    subject: tuple[tuple[str, str], ...]
    limits: tuple[Limit, ...]
    until_us: int | None = None

    @property
    def subject_text(self) -> str:
        """The subject as one text, such as `org=acme&user=42`."""
        return entries_text(self.subject)

    @property
    def key(self) -> tuple[str, str]:
        """What a tier has at most one override of."""
        return self.rule, self.subject_text

    @property
    def has_pattern(self) -> bool:
        """Whether one of its values has a `*`."""
        return any("*" in value for _, value in self.subject)


def active_overrides(overrides: Iterable[Override], now_us: int) -> tuple[Override, ...]:
    """The overrides that have not ended.

    Args:
        overrides: of one key or customer.
        now_us: µs since the epoch.
    """
    return tuple(each for each in overrides if each.until_us is None or each.until_us > now_us)


def first_end_us(*overrides: Iterable[Override]) -> int | None:
    """The earliest end of overrides, µs since the epoch; None if none of them ends."""
    return min((each.until_us for some in overrides for each in some if each.until_us is not None), default=None)


def in_precedence(overrides: Iterable[Override]) -> tuple[Override, ...]:
    """Overrides in the order in which a later one takes precedence: those that end after the permanent ones."""
    return tuple(sorted(overrides, key=lambda each: each.until_us is not None))
