"""What the catalog's bounded tables cost once they are full: the same for each new entry, however large the bound is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from tests.cases.doors import POLICY
from tests.cpu_time import assert_growth_below, cpu_s
from tidegate.catalog import cached as cached_module
from tidegate.catalog import shared as shared_module
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.changes import KEY, TIER, Changes
from tidegate.catalog.freshness import FreshnessTracker
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.catalog.shared import SharedCatalog
from tidegate.catalog.sql import replicas as replicas_module
from tidegate.catalog.sql.replicas import Replicas
from tidegate.policy.model import ApiKey, Tier
from tidegate.policy.toml_reader import parse_policy

SMALL, LARGE = 500, 100_000
ADDED = 50_000
RATIO = 5
"""A table whose evictions walk over removed entries takes 8 to 30 times as long at the large bound; any other 1 to 2 times."""

Fill = Callable[[int, pytest.MonkeyPatch], Callable[[int], None]]


def last_changes(most: int, _: pytest.MonkeyPatch) -> Callable[[int], None]:
    last = FreshnessTracker(most)
    return lambda number: last.remember([(number, (KEY, str(number)))])


def versions_of_replicas(most: int, patch: pytest.MonkeyPatch) -> Callable[[int], None]:
    patch.setattr(replicas_module, "_VERSIONS_KEPT", most)
    replicas = Replicas((), 1.0, 1.0, lambda: asyncio.sleep(0, 0))
    return replicas.changed


def versions_of_the_shared_cache(most: int, patch: pytest.MonkeyPatch) -> Callable[[int], None]:
    patch.setattr(shared_module, "MAX_READ", most)
    latest = [0]

    class Source:
        async def changes(self, since: int) -> Changes:
            return Changes(latest[0], since, versions=(since, latest[0]))

    source: Any = Source()
    store: Any = None
    shared = SharedCatalog(source, store, b"secret of a test")

    def add(number: int) -> None:
        since, latest[0] = latest[0], number
        coroutine = shared.changes(since)
        with pytest.raises(StopIteration):
            coroutine.send(None)

    return add


def unknown_keys(most: int, patch: pytest.MonkeyPatch) -> Callable[[int], None]:
    patch.setattr(cached_module, "MAX_UNKNOWN", most)
    cached = CachedCatalog(PolicyCatalog(parse_policy(POLICY)))
    return lambda number: cached._note_unknown(f"{number:064x}")


def entries_in_doubt(most: int, _: pytest.MonkeyPatch) -> Callable[[int], None]:
    cached = CachedCatalog(PolicyCatalog(parse_policy(POLICY)), max_keys=most)
    caller: Any = None

    def add(number: int) -> None:
        cached._callers.put(str(number), caller, 1.0)
        cached._callers.mark_stale(str(number))

    return add


@pytest.mark.parametrize(
    "fill", [last_changes, versions_of_replicas, versions_of_the_shared_cache, unknown_keys, entries_in_doubt]
)
def test_a_new_entry_costs_the_same_whatever_the_bound(fill: Fill, monkeypatch: pytest.MonkeyPatch) -> None:
    def cost_s(most: int) -> float:
        add = fill(most, monkeypatch)
        for number in range(1, most + 1):
            add(number)

        def work() -> None:
            for number in range(most + 1, most + ADDED + 1):
                add(number)

        return cpu_s(work)

    assert_growth_below(RATIO, cost_s, SMALL, LARGE)


async def test_what_is_in_doubt_is_bounded_when_it_is_doubted_one_by_one() -> None:
    class Every(PolicyCatalog):
        async def tier(self, name: str, min_version: int = 0) -> tuple[int, Tier | None]:
            return 1, Tier.make(name)

        async def api_key(self, sha256: str, min_version: int = 0) -> tuple[int, ApiKey | None]:
            return 1, ApiKey(sha256, "t")

    cached = CachedCatalog(Every(parse_policy(POLICY)))
    cached._tiers.max_entries = 10
    for number in range(100):
        await cached.tier(f"t{number}")
        cached.touched(number + 1, [(TIER, f"t{number}")])
    assert len(cached._tiers.stale) <= 10
