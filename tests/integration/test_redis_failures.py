"""Real failures of real servers under load: nobody gets an error, nothing is counted wrong, and exact counting resumes.

The drills print the same with their times; here stands only what must hold on any machine.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
from drills import redis_failures
from drills.redis_failures import Result

LEAST_S = 3.0
"""Two seconds more than until the failure: within that time each has led to degraded checks, and then the load lasts until the
store is back."""


def must_be_back(result: Result) -> None:
    """No error was given, and at the end the store decides again."""
    load = result.load
    assert not load.errors
    assert load.counted.keys() == set(load.subjects), "the store answered about each at the end"
    assert all(store.owed == 0 for store in load.stores), "what was admitted locally is put back"


def nothing_is_lost(result: Result) -> None:
    """Redis knows of every unit that was admitted."""
    assert result.load.uncounted == 0


def most_by_shares(result: Result) -> int:
    """Units that the shares of all instances allow once, above what was counted before."""
    load = result.load
    return len(load.subjects) * len(load.stores) * max(load.amount // len(load.stores), 1)


@pytest.fixture(autouse=True)
def _busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten times the deadline of a drill: without a core for 50 ms, checks are degraded though nothing has failed."""
    monkeypatch.setattr(redis_failures, "TIMEOUT_S", 0.5)


@pytest.fixture
def patient(_busy_machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """For what must not cost a single check its answer: a deadline that a machine with busy cores keeps too."""
    monkeypatch.setattr(redis_failures, "TIMEOUT_S", 5.0)


@pytest.mark.usefixtures("patient")
async def test_while_it_is_well_exactly_the_limits_are_admitted() -> None:
    load = (await redis_failures.nothing_happens()).load
    assert not load.errors
    assert not load.degraded
    assert (load.uncounted, load.counted_twice) == (0, 0)
    admitted = {subject: sum(each.allowed for each in load.seen if each.subject == subject) for subject in load.subjects}
    assert set(admitted.values()) == {load.amount}
    assert load.excess() == (0, 0)


@pytest.mark.usefixtures("patient")
async def test_flushed_scripts_are_loaded_again_within_the_check() -> None:
    result = await redis_failures.scripts_flushed(LEAST_S)
    nothing_is_lost(result)
    # On a busy machine some come after their deadline; none of them costs anything.
    assert result.load.over_admitted == 0
    assert {reason for store in result.load.stores for reason in store.degraded} <= {"timeout", "noscript"}
    must_be_back(result)


async def test_killed_connections_come_back() -> None:
    result = await redis_failures.clients_killed(LEAST_S)
    nothing_is_lost(result)
    must_be_back(result)
    assert result.load.degraded
    assert result.load.over_admitted <= most_by_shares(result)
    assert result.load.excess() == (result.load.over_admitted, 0), "what is too much the shares admitted, not the store"


@pytest.mark.usefixtures("patient")
async def test_flushed_counters_begin_anew_and_nothing_else_happens() -> None:
    result = await redis_failures.everything_flushed(LEAST_S)
    must_be_back(result)
    assert not result.load.degraded
    assert 0 < result.load.over_admitted <= result.load.amount * len(result.load.subjects)
    assert result.load.excess() == (result.load.over_admitted,) * 2, "the checker finds what the store forgot"


async def test_a_full_redis_is_a_fallback_and_no_error() -> None:
    result = await redis_failures.out_of_memory(LEAST_S)
    nothing_is_lost(result)
    must_be_back(result)
    reasons = {reason for store in result.load.stores for reason in store.degraded}
    assert reasons - {"timeout"} == {"out_of_memory", "breaker_open"}
    assert result.load.over_admitted <= most_by_shares(result)


async def test_a_hung_redis_is_found_by_the_deadline() -> None:
    result = await redis_failures.hung(LEAST_S)
    nothing_is_lost(result)
    must_be_back(result)
    # Checks that wait while the connection is given up are "disconnected"; on a busy machine there may be none.
    reasons = {reason for store in result.load.stores for reason in store.degraded}
    assert "timeout" in reasons
    assert result.load.over_admitted <= most_by_shares(result)


async def test_a_lost_redis_and_its_empty_successor() -> None:
    result = await redis_failures.gone(LEAST_S)
    must_be_back(result)
    # What the old one had counted is lost with it.
    assert result.load.over_admitted <= most_by_shares(result) + result.load.amount * len(result.load.subjects)


async def test_a_rule_that_allows_gives_no_error() -> None:
    must_be_back(await redis_failures.gone_and_allow(LEAST_S))


@pytest.mark.usefixtures("patient")
async def test_slots_move_unnoticed() -> None:
    result = await redis_failures.slots_migrated(LEAST_S)
    nothing_is_lost(result)
    must_be_back(result)
    # On a busy machine answers come after their deadline while slots move: slow is not away, and nothing is admitted above.
    assert result.load.over_admitted == 0
    assert {reason for store in result.load.stores for reason in store.degraded} <= {"timeout", "migrating", "noscript"}


@pytest.mark.parametrize(
    ("drill", "timeout_s"), [(redis_failures.cluster_master_killed, 10.0), (redis_failures.cluster_master_hung, 2.0)]
)
async def test_a_lost_master_of_a_cluster_degrades_its_own_subjects_alone(
    drill: Callable[[float], Awaitable[Result]], timeout_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On busy cores the answer of a healthy shard may take longer than the drill's 50 ms; a killed one refuses at once.
    monkeypatch.setattr(redis_failures, "TIMEOUT_S", timeout_s)
    result = await drill(LEAST_S)
    must_be_back(result)
    assert result.load.degraded
    assert result.notes["degraded subjects of other shards"] == 0
    assert result.load.over_admitted <= most_by_shares(result)


@pytest.mark.parametrize("drill", [redis_failures.sentinel_master_killed, redis_failures.sentinel_master_hung])
async def test_a_lost_master_of_sentinels_is_followed(drill: Callable[[float], Awaitable[Result]]) -> None:
    result = await drill(LEAST_S)
    must_be_back(result)
    assert result.load.degraded
    assert result.load.over_admitted <= most_by_shares(result)
