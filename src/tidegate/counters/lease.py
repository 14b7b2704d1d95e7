"""One lease: units of one subject that the store has charged already, for this instance to use."""

from __future__ import annotations

from tidegate.algorithms.leases import Ahead
from tidegate.counters import Counters
from tidegate.policy.limits import Limit, LimitSet


class Lease:
    """Units of one subject. The fields are written by `LeaseTable` alone."""

    __slots__ = (
        "ahead",
        "at_us",
        "base",
        "binding",
        "counted",
        "counters",
        "ends_us",
        "expires_ns",
        "granted",
        "idle_ns",
        "idle_since_ns",
        "left",
        "limits",
        "low",
        "next",
        "received_ns",
        "renewing",
        "reset_at_us",
        "sent_ns",
        "session",
        "swept_left",
        "unit_us",
    )

    counters: Counters
    granted: int
    left: int
    low: int
    """Below it the lease is renewed."""
    sent_ns: int
    """When its request was sent, monotonic."""
    expires_ns: int
    """When it ends here, monotonic."""
    ahead: Ahead | None
    """When its units come free; None where they are."""
    at_us: int
    """When it was granted, by the store's clock."""
    ends_us: int
    """When it ends, by the store's clock."""
    received_ns: int
    """When the grant arrived here, monotonic: no unit is used earlier."""
    base: int
    """What remained in the store after the grant."""
    binding: Limit | None
    limits: LimitSet | None
    reset_at_us: int
    """When the binding limit is replenished if all units are used."""
    unit_us: int
    """How much sooner that is for each unit that is not: of a bucket."""
    session: object
    counted: int
    """Units of those used that were counted elsewhere by `take_usage`."""
    next: Lease | None
    renewing: bool
    swept_left: int
    idle_since_ns: int
    idle_ns: int
    """It is given up when it was not used for so long."""
