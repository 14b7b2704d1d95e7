"""What the two caches of the catalog leave to the database, when each user has a key of their own.

Requests of a key come independently of each other (a Poisson process), at rates that fall with the power of the key's rank
(Zipf), and go to any instance alike. An entry lives for its TTL after it was fetched, so a cache that is asked for a key at rate
r answers the share rT / (1 + rT). Where memory is full before the TTL is over, its entries live for the time in which as many
distinct keys come as it holds, as in H. Che, Y. Tung, Z. Wang, "Hierarchical Web Caching Systems", IEEE JSAC 20(7), 2002.
Users whose requests come in bursts are answered more often than this says: it is the careful side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

_EXACT_RANKS: Final = 64
_STEP: Final = 1.05
"""Ranks above the first are taken together in steps of 5 %: rates inside one differ by no more."""


class Shares(NamedTuple):
    """Who answers look-ups, and what is held.

    Args:
        l1: share answered from memory.
        l2: share answered by the shared cache.
        database: share that reaches the database.
        l1_entries: keys that an instance holds.
        l2_entries: keys that the shared cache holds.
        hottest: share of all requests that the hottest key brings.
    """

    l1: float
    l2: float
    database: float
    l1_entries: float
    l2_entries: float
    hottest: float


def shares(
    keys: float,
    rate: float,
    instances: int,
    l1_ttl_s: float,
    l2_ttl_s: float,
    l1_keys: float,
    exponent: float,
) -> Shares:
    """Work out the caches.

    Args:
        keys: distinct keys in use, 1 or more.
        rate: requests a second, of all keys.
        instances: that share them.
        l1_ttl_s: how long an entry lives in memory, s.
        l2_ttl_s: how long in the shared cache, s.
        l1_keys: most entries of an instance.
        exponent: of Zipf's law, 0 for keys that are all alike.

    Returns:
        The shares; the first three add up to 1.
    """
    buckets = _buckets(max(round(keys), 1), exponent)
    rates = [(count, rate * weight) for count, weight in buckets]
    lives_s = l1_ttl_s
    if _held(rates, instances, lives_s) > l1_keys:
        low, high = 0.0, l1_ttl_s
        for _ in range(60):
            lives_s = (low + high) / 2
            low, high = (low, lives_s) if _held(rates, instances, lives_s) > l1_keys else (lives_s, high)
    missed_l1 = missed_l2 = l2_entries = 0.0
    for count, each in rates:
        to_l2 = each / (1 + each / instances * lives_s)
        hit = to_l2 * l2_ttl_s / (1 + to_l2 * l2_ttl_s)
        missed_l1 += count * to_l2
        missed_l2 += count * to_l2 * (1 - hit)
        l2_entries += count * hit
    l1, database = 1 - missed_l1 / rate, missed_l2 / rate
    return Shares(l1, 1 - l1 - database, database, _held(rates, instances, lives_s), l2_entries, buckets[0][1])


def _held(rates: Sequence[tuple[float, float]], instances: int, lives_s: float) -> float:
    """Entries of one instance."""
    return sum(count * (one := each / instances * lives_s) / (1 + one) for count, each in rates)


def _buckets(keys: int, exponent: float) -> list[tuple[int, float]]:
    """How many keys, and the share of all requests that each of them brings."""
    edges = list(range(1, min(keys, _EXACT_RANKS) + 1))
    while edges[-1] < keys:
        edges.append(min(max(int(edges[-1] * _STEP), edges[-1] + 1), keys))
    found = []
    for place, first in enumerate(edges):
        last = edges[place + 1] - 1 if place + 1 < len(edges) else first
        found.append((last - first + 1, math.exp(-exponent * (math.log(first) + math.log(last)) / 2)))
    total = sum(count * weight for count, weight in found)
    return [(count, weight / total) for count, weight in found]
