"""From the settings of the counters to the store. What Redis needs is imported where a URL names one."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from tidegate.counters import CounterStore
from tidegate.counters.blocking import BlockingCounterStore, BlockingMemory
from tidegate.counters.memory import MemoryCounters
from tidegate.counters.storage_uri import counters_url
from tidegate.errors import SettingsError
from tidegate.policy.limits import OnFailure
from tidegate.settings import BreakerSettings, CounterSettings, LeaseSettings
from tidegate.url_parts import scheme_of

if TYPE_CHECKING:
    from tidegate.counters.degraded import GuardOptions
    from tidegate.counters.guarded import GuardedCounters

LEASES_VARIABLE: Final = "TIDEGATE_LEASES__ENABLED"
"""Environment variable that says whether units are leased, true or false: the server reads the same one."""
KINDS: Final = ("memory://", "redis://", "rediss://", "redis+unix://", "redis+sentinel://", "redis+cluster://")


def open_counters(
    settings: CounterSettings | str,
    breaker: BreakerSettings | None = None,
    clock: Callable[[], int] | None = None,
    leases: LeaseSettings | None = None,
    *,
    embedded: bool = False,
) -> CounterStore:
    """Open the counter store that a URL names. One on Redis connects at its first call.

    Args:
        settings: of the counters, or a URL alone; all else has its default then.
        breaker: when calls to a failing store stop; by default as in the settings.
        clock: for `memory://`: gives µs since the epoch and never goes back; the machine's where not given.
        leases: with Redis, whether and how units are leased; not where None.
        embedded: whether it is for a process that is not ours, which may fork, or end its event loop without closing the store.

    Returns:
        The store; one on Redis is guarded, and leased if `leases` says so.

    Raises:
        SettingsError: if the URL names no store that this version has, or is not understood.
    """
    if isinstance(settings, str):
        settings = CounterSettings(url=settings)
    breaker = breaker or BreakerSettings()
    url = settings.url
    if url == "memory://":
        memory = MemoryCounters(settings.max_subjects, clock)
        memory.max_holds = settings.max_holds
        return memory
    _require_redis(url)
    from tidegate.counters.guarded import GuardedCounters
    from tidegate.counters.redis.store import RedisCounters

    store = RedisCounters(url, settings.timeout_ms / 1000, settings.max_in_flight)
    store.holds.most = settings.max_holds
    guarded = GuardedCounters(store, _guard_options(settings, breaker))
    if leases is None or not leases.enabled:
        return guarded
    if embedded:
        from tidegate.counters.process_leases import ProcessLeases

        return ProcessLeases(guarded, leases.ttl_s, leases.max_subjects)
    from tidegate.counters.leased import LeasedCounters

    return LeasedCounters(guarded, leases.ttl_s, leases.max_subjects)


def open_blocking(
    settings: CounterSettings | str, clock: Callable[[], int] | None = None, leases: LeaseSettings | None = None
) -> BlockingCounterStore:
    """Open the counter store that a URL names for threads without an event loop. One on Redis connects at its first call.

    Args:
        settings: as for `open_counters`.
        clock: as for `open_counters`.
        leases: as for `open_counters`.

    Returns:
        The store; one on Redis has a fallback, and is leased if `leases` says so.

    Raises:
        SettingsError: as `open_counters`.
    """
    if isinstance(settings, str):
        settings = CounterSettings(url=settings)
    url = settings.url
    if url == "memory://":
        memory = BlockingMemory(settings.max_subjects, clock)
        memory.max_holds = settings.max_holds
        return memory
    _require_redis(url)
    from tidegate.counters.blocking_redis import BlockingRedis
    from tidegate.counters.redis.blocking import BlockingRedisCounters

    store = BlockingRedisCounters(url, settings.timeout_ms / 1000)
    store.holds.most = settings.max_holds
    guarded = BlockingRedis(store, _guard_options(settings, BreakerSettings()))
    if leases is None or not leases.enabled:
        return guarded
    from tidegate.counters.blocking_leases import BlockingLeases

    return BlockingLeases(guarded, leases.ttl_s, leases.max_subjects)


def open_embedded(url: str, leases: bool | None = None) -> CounterStore:
    """The store of a gate inside a program.

    Args:
        url: as other packages write it, too.
        leases: see `embedded_leases`.

    Raises:
        SettingsError: as `open_counters`.
    """
    return open_counters(counters_url(url), leases=embedded_leases(leases), embedded=True)


def embedded_leases(enabled: bool | None) -> LeaseSettings:
    """Whether limiters inside a program lease: what it says, else the environment variable, else yes.

    Args:
        enabled: as the program gave it.

    Raises:
        SettingsError: if the environment variable has another value than true or false.
    """
    if enabled is None:
        text = os.environ.get(LEASES_VARIABLE) or "true"
        if text.lower() not in ("true", "false"):
            raise SettingsError(f"{LEASES_VARIABLE} {text[:40]!r} must be true or false")
        enabled = text.lower() == "true"
    return LeaseSettings(enabled=enabled)


def _require_redis(url: str) -> None:
    # Only the scheme is repeated: the rest of a store's URL may hold a password.
    scheme = scheme_of(url)
    if not scheme.startswith("redis"):
        raise SettingsError(f"counters.url with the scheme {scheme!r} is not supported: use {', '.join(KINDS)}")


def _guard_options(settings: CounterSettings, breaker: BreakerSettings) -> GuardOptions:
    from tidegate.breaker import BreakerOptions
    from tidegate.counters.degraded import GuardOptions

    return GuardOptions(
        OnFailure(settings.on_failure),
        BreakerOptions(breaker.failures, breaker.window_s, breaker.open_s),
        settings.min_instances,
        settings.max_subjects,
    )


def guard_of(store: CounterStore) -> GuardedCounters | None:
    """The guard of a store on Redis, leased or not; None for others."""
    from tidegate.counters.guarded import GuardedCounters
    from tidegate.counters.leased import LeasedCounters

    inner = store.store if isinstance(store, LeasedCounters) else store
    return inner if isinstance(inner, GuardedCounters) else None
