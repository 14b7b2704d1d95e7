"""Calls to Redis for a check, with leases.

Requests of a user arrive independently of each other, at rates that fall with a power of the user's rank, as in `caches`. A
check finds a lease where the last one of the same user at the same instance was not too long before, so that a lease was
granted, and the lease has not ended. That is the renewal argument of `caches`, with the lives of leases in place of TTLs. Users
below their limits are assumed: checks above a limit are denied from memory and cost about as little. The demand is that of
`counters.lease_demand`.
"""

from __future__ import annotations

import math
from typing import Final

from tidegate.tools.plan.caches import rank_groups

CHECKS: Final = 16
LONGER: Final = 12
MAX_LIFE_S: Final = 60.0
PAUSES: Final = 3
RETURNS: Final = 1 / 50
"""Calls that give back, for each lease: one gives back up to 50."""


def lease_calls(keys: float, rate: float, instances: int, ttl_s: float, exponent: float) -> float:
    """Calls for a check.

    Args:
        keys: users, 1 or more.
        rate: checks/s of all together.
        instances: that a user's checks are spread over; 1 with key affinity.
        ttl_s: `leases.ttl_s`.
        exponent: of Zipf's law.

    Returns:
        Their number, at most 1.
    """
    calls = 0.0
    for count, weight in rank_groups(max(round(keys), 1), exponent):
        calls += count * weight * _calls_at(rate * weight / instances, ttl_s)
    return min(calls, 1.0)


def _calls_at(rate: float, ttl_s: float) -> float:
    """Calls for a check of a user whose checks reach an instance at a rate, 1/s."""
    longest_s = max(ttl_s, min(LONGER * ttl_s, MAX_LIFE_S))
    life_s = min(max(CHECKS / rate, ttl_s), longest_s)
    granted = -math.expm1(-rate * longest_s / PAUSES)
    leases = rate * life_s / (1 + rate * life_s)
    decided = granted * leases
    return (1 - decided) * (1 + granted * RETURNS)
