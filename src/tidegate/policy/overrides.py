"""Which overrides apply at a time. Each process knows the time, so none needs an event for the end of an override."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tidegate.policy.model import Override


def active_overrides(overrides: Iterable[Override], now_us: int) -> tuple[Override, ...]:
    """The overrides that have not ended.

    Args:
        overrides: of one key or customer.
        now_us: µs since the epoch.
    """
    return tuple(each for each in overrides if each.until_us is None or each.until_us > now_us)


def first_end_us(overrides: Iterable[Override]) -> int | None:
    """The earliest end of overrides, µs since the epoch; None if none of them ends."""
    return min((each.until_us for each in overrides if each.until_us is not None), default=None)


def in_precedence(overrides: Iterable[Override]) -> Sequence[Override]:
    """Overrides in the order in which a later one takes precedence: those that end after the permanent ones."""
    return sorted(overrides, key=lambda each: each.until_us is not None)
