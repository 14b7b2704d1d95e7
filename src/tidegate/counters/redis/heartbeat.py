"""Heartbeats: each instance writes one every second, into one sorted set of the store, which gives their number."""

from __future__ import annotations

from typing import Final

import msgspec

from tidegate.counters.redis.scripts import script
from tidegate.counters.redis.store import RedisCounters
from tidegate.errors import StoreUnavailable

INTERVAL_S: Final = 1.0
EXPIRY_S: Final = 5.0
_TAG: Final = b"instances"
_INSTANCES: Final = b"tg:{instances}"
_RESETS: Final = b"tg:{instances}resets"
_LEASING: Final = b"tg:{instances}leases"
_KEYS: Final = (_INSTANCES, _RESETS, _LEASING)
_RESETS_TTL_MS: Final = 86_400_000


class Beat(msgspec.Struct, frozen=True):
    """The result of a heartbeat.

    Args:
        instances: number that are alive, this one included.
        resets: number of resets so far, by all instances; only a change is significant.
        at_us: the store's clock, µs since the epoch.
        without_leases: how many of the instances are of a version that does not know leases.
    """

    instances: int
    resets: int
    at_us: int
    without_leases: int = 0


async def beat(store: RedisCounters, instance: str) -> Beat:
    """Send the heartbeat of an instance.

    Raises:
        StoreUnavailable: if the store does not answer.
    """
    work = script("heartbeat", frozenset())
    arguments = (instance, str(round(EXPIRY_S * 1000)))
    try:
        reply = await store.run(_TAG, work, _KEYS, arguments)
    except StoreUnavailable as error:
        if "WRONGTYPE" not in error.message:
            raise
        # Another program wrote these keys: no heartbeat would work as long as they exist.
        await store.call(_TAG, "UNLINK", *_KEYS)
        reply = await store.run(_TAG, work, _KEYS, arguments)
    try:
        return Beat(*(int(number) for number in reply))
    except (TypeError, ValueError):
        raise StoreUnavailable(f"unexpected reply from Redis to a heartbeat: {str(reply)[:100]}", reason="garbage") from None


async def leave(store: RedisCounters, instance: str) -> None:
    """Remove an instance that shuts down, so that the others need not wait for it to expire.

    Raises:
        StoreUnavailable: if the store does not answer.
    """
    for key in (_INSTANCES, _LEASING):
        await store.call(_TAG, "ZREM", key, instance)


async def announce_reset(store: RedisCounters) -> None:
    """Announce to all instances that a counter was reset; they receive it with their next heartbeat.

    Raises:
        StoreUnavailable: if the store does not answer.
    """
    await store.call(_TAG, "INCR", _RESETS)
    await store.call(_TAG, "PEXPIRE", _RESETS, str(_RESETS_TTL_MS))
