"""Descriptors that record hits instead of asking for a decision: `is_negative_hits`, and the entry `[envoy] forced_entry`.

Nothing in a request of Envoy says that it is the second one of a request, sent by `apply_on_stream_done`. So the actions of that
descriptor have to add an entry, which is removed here: the counter is that of the same descriptor without it.
"""

from __future__ import annotations

from typing import Any

from tidegate.gate.adjusting import CHARGE, REFUND


def adjusts(request: Any, forced_entry: bytes) -> bool:
    """Whether a request has a descriptor that records hits.

    Args:
        request: a `RateLimitRequest`.
        forced_entry: key of the entry that forces a charge.
    """
    return any(each.is_negative_hits or any(entry.key == forced_entry for entry in each.entries) for each in request.descriptors)


def take_sign(descriptor: Any, forced_entry: bytes) -> int:
    """Remove the entry that forces a charge from a descriptor.

    Args:
        descriptor: of the request.
        forced_entry: key of the entry.

    Returns:
        `CHARGE` if it was there, `REFUND` for negative hits with or without it, 0 for a descriptor that asks for a decision.
    """
    kept = [entry for entry in descriptor.entries if entry.key != forced_entry]
    forced = len(kept) < len(descriptor.entries)
    if forced:
        copies = [(entry.key, entry.value) for entry in kept]
        del descriptor.entries[:]
        for key, value in copies:
            descriptor.entries.add(key=key, value=value)
    if descriptor.is_negative_hits:
        return REFUND
    return CHARGE if forced else 0
