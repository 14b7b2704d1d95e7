"""The door of plain Python code."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import Clock
from tidegate import BadRequest, Limiter, MemoryCounters, PolicyError, SettingsError, SyncLimiter
from tidegate.counters.storage_uri import counters_url
from tidegate.policy.limits import Algorithm


async def test_counts_each_subject_by_itself() -> None:
    limiter = Limiter("2/day")
    answers = [(await limiter.check(subject)).allowed for subject in ("a", "a", "a", "b")]
    assert answers == [True, True, False, True]
    denied = await limiter.check("a")
    assert (denied.rule, denied.tier, denied.limit, denied.remaining) == ("2/day", None, 2, 0)
    assert denied.retry_after is not None
    assert 0 < denied.retry_after <= 172_800
    await limiter.reset("a")
    assert (await limiter.check("a")).remaining == 1
    await limiter.close()


@pytest.mark.parametrize("algorithm", list(Algorithm))
async def test_every_algorithm(algorithm: str) -> None:
    clock = Clock()
    limiter = Limiter("1/minute", algorithm=algorithm, counters=MemoryCounters(clock=clock))
    assert (await limiter.check("u")).allowed
    denied = await limiter.check("u")
    assert not denied.allowed
    assert denied.retry_after_us is not None
    clock.now_us += denied.retry_after_us
    assert (await limiter.check("u")).allowed


async def test_several_limits_and_costs() -> None:
    limiter = Limiter(["5/minute", "8/day"], counters=MemoryCounters(clock=Clock()))
    decisions = await limiter.check_many([("u", 4), ("u", 2), ("u", 1), ("u", 0)])
    assert [each.allowed for each in decisions] == [True, False, True, True]
    assert [each.remaining for each in decisions] == [1, 1, 0, 0]
    assert (await limiter.check("u", cost=9)).retry_after is None


async def test_limiters_of_one_name_share_a_store() -> None:
    store = MemoryCounters(clock=Clock())
    one, same, other = (Limiter("5/day", counters=store, name=name) for name in ("a", "a", "b"))
    assert [(await each.check("u")).remaining for each in (one, same, other)] == [4, 3, 4]


@pytest.mark.parametrize("subject", ["", None, 5, b"u"])
async def test_subjects_that_make_no_sense(subject: Any) -> None:
    limiter = Limiter("5/day")
    for call in (limiter.check(subject), limiter.check_many([(subject, 1)]), limiter.reset(subject)):
        with pytest.raises(BadRequest, match="non-empty string"):
            await call


@pytest.mark.parametrize("cost", [-1, 1.0, "1", None, True, 10**10])
async def test_costs_that_make_no_sense(cost: Any) -> None:
    limiter = Limiter("5/day")
    for call in (limiter.check("u", cost), limiter.check_many([("v", 1), ("u", cost)])):
        with pytest.raises(BadRequest, match="whole number"):
            await call
    assert (await limiter.check("v", 0)).remaining == 5, "nothing of a refused batch was charged"


async def test_long_subjects_do_not_make_long_keys() -> None:
    store = MemoryCounters(clock=Clock())
    limiter = Limiter("5/day", counters=store)
    for subject in ("x" * 100_000, "\ud800" * 200):
        assert [(await limiter.check(subject)).remaining for _ in range(2)] == [4, 3]
    assert all(len(key) < 150 for shard in store._shards for key in shard)


def test_wrong_arguments() -> None:
    with pytest.raises(PolicyError, match="fortnight"):
        Limiter("5/fortnight")
    with pytest.raises(SettingsError, match="memory://"):
        Limiter("5/day", counters="carrier-pigeon://x")
    with pytest.raises(PolicyError, match="gcra"):
        Limiter("5/day", algorithm="gcra")


def test_the_same_without_an_event_loop() -> None:
    with SyncLimiter(["5/minute", "8/day"]) as limiter:
        assert [limiter.check("u", cost).allowed for cost in (4, 2, 1, 0)] == [True, False, True, True]
        assert [each.allowed for each in limiter.check_many([("v", 5), ("v", 1)]) if not isinstance(each, Exception)] == [
            True,
            False,
        ]
        limiter.reset("u")
        assert limiter.check("u").remaining == 4
        for wrong in (lambda: limiter.check("", 1), lambda: limiter.check("u", -1), lambda: limiter.check_many([("u", 1.5)])):
            with pytest.raises(BadRequest):
                wrong()
    with pytest.raises(SettingsError, match="cannot be used without an event loop"):
        SyncLimiter("5/day", counters=MemoryCounters())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("uri", "same"),
    [
        ("memory://", "memory://"),
        ("async+memory://", "memory://"),
        ("redis://:secret@localhost:6379/3", "redis://:secret@localhost:6379/3"),
        ("async+redis+sentinel://h:26379,i/mymaster", "redis+sentinel://h:26379,i/mymaster"),
        ("valkey://localhost", "redis://localhost"),
        ("valkeys+cluster://h:7000,h:7001", "rediss+cluster://h:7000,h:7001"),
        ("redis+unix:///run/redis.sock", "redis+unix:///run/redis.sock"),
    ],
)
def test_storage_uris_of_other_limiters(uri: str, same: str) -> None:
    assert counters_url(uri) == same
    Limiter("5/day", counters=uri)
    SyncLimiter("5/day", counters=uri).close()


@pytest.mark.parametrize(
    "uri", ["memcached://h", "async+memcached://h", "mongodb+srv://u:secret@h", "etcd://h", "", "redis", "pigeon://h"]
)
def test_storage_uris_that_cannot_be_used(uri: str) -> None:
    for kind in (Limiter, SyncLimiter):
        with pytest.raises(SettingsError) as caught:
            kind("5/day", counters=uri)
        assert "redis" in caught.value.message
        assert "secret" not in caught.value.message


async def test_attributes_are_a_subject_of_their_own() -> None:
    limiter = Limiter("1/day")
    one = {"org": "acme", "user": "42"}
    assert (await limiter.check(one)).allowed
    assert not (await limiter.check({"user": "42", "org": "acme"})).allowed, "the order does not matter"
    for other in ({"org": "acme"}, {"user": "42"}, {"org": "acme&user=42"}, "org=acme&user=42", "a:org=acme&user=42"):
        assert (await limiter.check(other)).allowed, other
    await limiter.reset(one)
    assert [each.allowed for each in await limiter.check_many([(one, 1), (one, 1)])] == [True, False]  # type: ignore[union-attr]
    assert SyncLimiter("1/day").check(one).allowed
    for wrong in ({}, {"org": ""}, {"Org": "x"}, {"org": "x" * 257}, {"ip": "1.1.1.1"}, {"org": 7}):
        with pytest.raises(BadRequest):
            await limiter.check(wrong)  # type: ignore[arg-type]
