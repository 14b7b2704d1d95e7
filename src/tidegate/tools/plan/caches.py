"""Hit rates of the two catalog caches, and the load that reaches the database, when each user has an API key of their own.

Requests of a key arrive independently of each other (a Poisson process), at rates that fall with a power of the key's rank
(Zipf), and are spread evenly over the instances. An entry lives for its TTL after it was fetched, so a cache that receives
look-ups of a key at rate r answers the share rT / (1 + rT). If memory is full before the TTL is over, entries live until as many
distinct keys have arrived as it holds, as in H. Che, Y. Tung, Z. Wang, "Hierarchical Web Caching Systems", IEEE JSAC 20(7), 2002.
Users whose requests arrive in bursts are answered from caches more often than this model says, so it is conservative.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

_EXACT_RANKS: Final = 64
_STEP: Final = 1.05
"""Ranks above the first 64 are grouped in steps of 5 %: rates within a group differ by no more than that."""


class CacheShares(NamedTuple):
    """CacheShares of look-ups by the level that answers them, and the entries in each cache.

    Args:
        l1: share answered from memory.
        l2: share answered by the shared cache in Redis.
        database: share that reaches the database.
        l1_entries: keys in the memory of one instance.
        l2_entries: keys in the shared cache.
        hottest: share of all requests that use the most requested key.
    """

    l1: float
    l2: float
    database: float
    l1_entries: float
    l2_entries: float
    hottest: float


def cache_shares(
    keys: float,
    rate: float,
    instances: int,
    l1_ttl_s: float,
    l2_ttl_s: float,
    l1_keys: float,
    exponent: float,
) -> CacheShares:
    """Calculate the hit rates of both caches.

    Args:
        keys: distinct keys in use, 1 or more.
        rate: requests/s of all keys together.
        instances: number of instances that share the requests.
        l1_ttl_s: TTL in memory, s.
        l2_ttl_s: TTL in the shared cache, s.
        l1_keys: maximum entries of an instance.
        exponent: of Zipf's law; 0 if all keys are requested equally.

    Returns:
        The shares; the first three add up to 1.
    """
    buckets = rank_groups(max(round(keys), 1), exponent)
    rates = [(count, rate * weight) for count, weight in buckets]
    lifetime_s = l1_ttl_s
    if _entries_of_one(rates, instances, lifetime_s) > l1_keys:
        low, high = 0.0, l1_ttl_s
        for _ in range(60):
            lifetime_s = (low + high) / 2
            low, high = (low, lifetime_s) if _entries_of_one(rates, instances, lifetime_s) > l1_keys else (lifetime_s, high)
    missed_l1 = missed_l2 = l2_entries = 0.0
    for count, each in rates:
        to_l2 = each / (1 + each / instances * lifetime_s)
        hit = to_l2 * l2_ttl_s / (1 + to_l2 * l2_ttl_s)
        missed_l1 += count * to_l2
        missed_l2 += count * to_l2 * (1 - hit)
        l2_entries += count * hit
    l1, database = 1 - missed_l1 / rate, missed_l2 / rate
    return CacheShares(l1, 1 - l1 - database, database, _entries_of_one(rates, instances, lifetime_s), l2_entries, buckets[0][1])


def _entries_of_one(rates: Sequence[tuple[float, float]], instances: int, lifetime_s: float) -> float:
    """Entries in the memory of one instance."""
    return sum(count * (hits := each / instances * lifetime_s) / (1 + hits) for count, each in rates)


def rank_groups(keys: int, exponent: float) -> list[tuple[int, float]]:
    """Groups of keys: the number of keys, and the share of all requests of each of them."""
    edges = list(range(1, min(keys, _EXACT_RANKS) + 1))
    while edges[-1] < keys:
        edges.append(min(max(int(edges[-1] * _STEP), edges[-1] + 1), keys))
    groups = []
    for index, first in enumerate(edges):
        last = edges[index + 1] - 1 if index + 1 < len(edges) else first
        groups.append((last - first + 1, math.exp(-exponent * (math.log(first) + math.log(last)) / 2)))
    total = sum(count * weight for count, weight in groups)
    return [(count, weight / total) for count, weight in groups]
