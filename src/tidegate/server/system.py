"""What the console's page System shows of this process: its components, its stores, and its settings without secrets."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec

from tidegate._version import __version__
from tidegate.counters import CounterStore
from tidegate.counters.factory import guard_of
from tidegate.counters.guarded import GuardedCounters
from tidegate.counters.leased import LeasedCounters
from tidegate.counters.memory import MemoryCounters
from tidegate.counters.redis.instances import InstanceState
from tidegate.gate.holds import HoldFigures
from tidegate.settings import Settings
from tidegate.url_parts import without_secrets

if TYPE_CHECKING:
    from tidegate.server.instance import Instance

HIDDEN: Final = "(hidden)"

_SECRET: Final = re.compile(r"(?:^|_)(?:token|secret|password|key|pepper)s?$")


def system_report(instance: Instance) -> Callable[[], Any]:
    """The function that reports on an instance.

    Args:
        instance: started as far as its counters and its catalog.

    Returns:
        A coroutine function that returns JSON types.
    """
    shown = settings_without_secrets(instance.settings)

    async def report() -> dict[str, Any]:
        health = await instance.health.report()
        database = instance.catalog.database
        replicas = database.replicas
        return {
            "version": __version__,
            "started_at": instance.started_at,
            "instance": _name(instance.counters),
            "instances": [msgspec.to_builtins(each) for each in _instances(instance)],
            "health": msgspec.to_builtins(health),
            "catalog": {
                "database": database.name,
                "kind": database.dialect,
                "version": instance.cached.version,
                "cached_keys": len(instance.cached),
                "hits": instance.cached.hits,
                "misses": instance.cached.misses,
                "stale": instance.cached.stale,
                "replicas": [
                    {"name": each.name, "lag_s": each.lag_s, "removed_because": each.ejected_because}
                    for each in (() if replicas is None else replicas.replicas)
                ],
            },
            "counters": counters_report(instance.counters),
            "holds": holds_report(instance.holds, _instances(instance)),
            "requests": {"in_flight": instance.in_flight, "connections": instance.connections},
            "settings": shown,
        }

    return report


def state_of(instance: Instance) -> InstanceState:
    """What an instance reports of itself to the others."""
    name = _name(instance.counters) or "single"
    return InstanceState(
        name, instance.address, __version__, instance.cached.version, instance.started_at, *open_and_expired(instance.counters)
    )


def _instances(instance: Instance) -> Sequence[InstanceState]:
    """The instances that share the counter store; this one alone where none is shared."""
    own = state_of(instance)
    known = () if instance.states is None else instance.states.known
    return [own, *(each for each in known if each.name != own.name)]


def counters_report(counters: CounterStore) -> dict[str, Any]:
    """The state of a counter store, as JSON types."""
    if isinstance(counters, LeasedCounters):
        table = counters.table
        leases = {
            "leases": len(table.leases),
            "decisions_from_leases": table.decisions,
            "leased": table.leased,
            "returned": table.returned,
            "lost": table.lost,
        }
        return {**(counters_report(counters.store) if isinstance(counters.store, GuardedCounters) else {}), "leases": leases}
    if isinstance(counters, GuardedCounters):
        connections = list(counters.store.connections())
        return {
            "kind": "redis",
            "instances": counters.instances,
            "shards": dict.fromkeys(counters.store.shards(), "closed")
            | {shard: breaker.state.value for shard, breaker in counters.breakers.items()},
            "connections": len(connections),
            "connections_up": sum(each.up for each in connections),
            "breakers_open": counters.open_breakers,
            "without_store": dict(counters.degraded),
            "owed": counters.owed,
            "put_back": counters.put_back,
        }
    if isinstance(counters, MemoryCounters):
        return {"kind": "memory", "subjects": len(counters), "evicted": counters.evicted}
    return {"kind": type(counters).__name__}


def open_and_expired(counters: CounterStore) -> tuple[int, int]:
    """Open holds, and those that expired unsettled, as this process counts them."""
    if isinstance(counters, MemoryCounters):
        return counters.open_holds, counters.expired_holds
    guard = guard_of(counters)
    return (0, 0) if guard is None else (guard.store.holds.ends.open, guard.store.holds.ends.expired)


def holds_report(figures: HoldFigures, instances: Sequence[InstanceState]) -> dict[str, int]:
    """Holds, as JSON types.

    Args:
        figures: what became of those of this process.
        instances: all that share the store.
    """
    return {
        # The number of one instance is below 0 where others opened what it settled.
        "open": max(sum(each.holds_open for each in instances), 0),
        "expired_unsettled": max(sum(each.holds_expired for each in instances), 0),
        "opened": figures.opened,
        "denied": figures.denied,
        "settled": figures.settled,
        "late": figures.late,
        "degraded": figures.degraded,
    }


def settings_without_secrets(settings: Settings) -> dict[str, dict[str, Any]]:
    """All settings by section and name. Secrets are hidden, and URLs have neither user nor password."""
    sections: dict[str, dict[str, Any]] = msgspec.to_builtins(settings)
    return {
        section: {name: HIDDEN if _is_secret(name, value) else _shown(value) for name, value in values.items()}
        for section, values in sections.items()
    }


def _name(counters: CounterStore) -> str | None:
    if isinstance(counters, LeasedCounters):
        return _name(counters.store) if isinstance(counters.store, GuardedCounters) else None
    return counters.instance if isinstance(counters, GuardedCounters) else None


def _is_secret(name: str, value: Any) -> bool:
    return isinstance(value, str) and bool(value) and _SECRET.search(name) is not None


def _shown(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_shown(each) for each in value]
    return without_secrets(value) if isinstance(value, str) and "://" in value else value
