"""Descriptors that record hits and are not decided: `is_negative_hits`, and the entry `[envoy] forced_entry`.

Envoy does not mark the call that `apply_on_stream_done` makes after the response. So the actions of that descriptor have to add
an entry, which is removed here: the counter is that of the same descriptor without it.
"""

from __future__ import annotations

from typing import Any, Final

from tidegate.gate.adjusting import CHARGE, OUTCOME, REFUND

STATUS: Final = b"status"
"""Value of the entry that makes the hits an HTTP status."""
MAX_ENTRIES: Final = 64
"""Most entries of a descriptor; one with more is refused later, and its entries are not read here."""


def adjusts(request: Any, forced_entry: bytes) -> bool:
    """Whether a request has a descriptor that records hits.

    Args:
        request: a `RateLimitRequest`.
        forced_entry: key of the entry that forces a charge.
    """
    return any(each.is_negative_hits or _has_entry(each, forced_entry) for each in request.descriptors)


def take_sign(descriptor: Any, forced_entry: bytes) -> int:
    """Remove the entry that forces a charge from a descriptor.

    Returns:
        `CHARGE` if it was there, `OUTCOME` if its value is `status`, `REFUND` for negative hits with or without it, 0 for a
        descriptor that is decided.
    """
    forced = _has_entry(descriptor, forced_entry)
    is_status = False
    if forced:
        is_status = any(entry.key == forced_entry and entry.value == STATUS for entry in descriptor.entries)
        kept = [(entry.key, entry.value) for entry in descriptor.entries if entry.key != forced_entry]
        del descriptor.entries[:]
        for key, value in kept:
            descriptor.entries.add(key=key, value=value)
    if descriptor.is_negative_hits:
        return REFUND
    if forced:
        return OUTCOME if is_status else CHARGE
    return 0


def _has_entry(descriptor: Any, key: bytes) -> bool:
    return len(descriptor.entries) <= MAX_ENTRIES and any(entry.key == key for entry in descriptor.entries)
