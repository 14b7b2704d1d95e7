"""The breakers of the shards: who is a probe, what a failure elsewhere means, and how often is probed in the background."""

from __future__ import annotations

from functools import partial

from tidegate.breaker import BreakerOptions, BreakerState
from tidegate.counters.recovery import Breakers
from tidegate.counters.redis.topology import NO_SHARD
from tidegate.errors import StoreUnavailable

OPTIONS = BreakerOptions(failures=2, window_s=10, open_s=30)


class Shards:
    """Shards that are away or not."""

    complete = True

    def __init__(self, *names: str) -> None:
        self.names = set(names)
        self.away: set[str] = set()
        self.probed: list[str] = []

    def shard_of(self, subject: str) -> str:
        return subject

    def shards(self) -> set[str]:
        return self.names

    async def probe(self, shard: str, cost: int) -> None:
        assert cost == 1
        self.probed.append(shard)
        if shard in self.away:
            raise gone(shard)

    async def absorb(self, states: object) -> list[StoreUnavailable | None]:
        return []


def gone(shard: str) -> StoreUnavailable:
    return StoreUnavailable(f"{shard} is gone", reason="disconnected", event=object(), shard=shard)


def opened(shards: Shards, *names: str, at: float = 100.0) -> Breakers:
    breakers = Breakers(shards, OPTIONS)
    for name in names:
        for _ in range(2):
            breakers.failed(name, gone(name), at)
    assert set(breakers.open) == set(names)
    return breakers


def test_a_check_of_two_shards_is_the_probe_of_both_or_of_none() -> None:
    breakers = opened(Shards("a", "b", "c"), "a")
    for _ in range(2):
        breakers.failed("b", gone("b"), 120.0)
    assert not breakers.admit(["a", "b"], 131), "b's time has not come"
    assert breakers.admit(["a", "c"], 131), "a's probe was not used up by that"
    assert not breakers.admit(["a"], 131)
    breakers.release(["a"])
    assert breakers.admit(["a"], 131), "what failed elsewhere said nothing of a"
    breakers.succeeded("a", 131)
    assert set(breakers.open) == {"b"}


async def test_a_shard_is_probed_in_the_background_and_less_often_when_it_fails_again_soon() -> None:
    shards = Shards("a", "b")
    breakers = opened(shards, "a")
    shards.away = {"a"}
    now = 100.0
    for _ in range(20):
        await breakers.probe(partial(float, now))
        now += 0.1
    assert len(shards.probed) == 4, "every half second, and b not at all"
    shards.away.clear()
    waits = []
    for _ in range(9):
        now += breakers.by_shard["a"].wait_s
        await breakers.probe(partial(float, now))
        assert breakers.by_shard["a"].state is BreakerState.CLOSED
        for _ in range(2):
            breakers.failed("a", gone("a"), now)
        waits.append(breakers.by_shard["a"].wait_s)
    assert waits == [1, 2, 4, 8, 16, 30, 30, 30, 30]
    now += 30
    await breakers.probe(partial(float, now))
    now += 11
    for _ in range(2):
        breakers.failed("a", gone("a"), now)
    assert breakers.by_shard["a"].wait_s == 0.5, "it was well for longer than the window"


async def test_breakers_of_servers_that_count_nothing_any_more_are_forgotten() -> None:
    shards = Shards("a", "b")
    breakers = opened(shards, "a", NO_SHARD)
    shards.complete = False
    shards.names.discard("a")
    await breakers.probe(lambda: 100.0)
    assert set(breakers.open) == {NO_SHARD}, "some slots have no server"
    shards.complete = True
    await breakers.probe(lambda: 101.0)
    assert not breakers.open
    assert not shards.probed
