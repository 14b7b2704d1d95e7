"""The matrix: every algorithm on every kind of Redis, through the port, beside the memory store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.servers.redis_server import RedisServer
from tidegate.counters import Charge, CounterStore
from tidegate.counters.guarded import GuardedCounters
from tidegate.counters.memory import MemoryCounters
from tidegate.counters.redis.keyspace import hash_tag
from tidegate.counters.redis.store import RedisCounters
from tidegate.decision import Decision
from tidegate.policy.limits import Algorithm, Limit, LimitSet

STORES = ("memory", "redis", "valkey", "unix", "tls", "sentinel", "cluster", "guarded")
TIMEOUT_S = 2.0
"""Far above what a call takes: these tests are about counts, and the machine may be busy."""


@pytest.fixture(params=STORES)
async def store(request: pytest.FixtureRequest, new_redis: Callable[..., RedisServer]) -> AsyncIterator[CounterStore]:
    kind = request.param
    made: CounterStore
    if kind == "memory":
        made = MemoryCounters()
    elif kind == "unix":
        made = RedisCounters(f"redis+unix://{new_redis(unix_socket=True).unix_path}", TIMEOUT_S)
    elif kind == "tls":
        made = RedisCounters(new_redis(tls=True).tls_url, TIMEOUT_S)
    elif kind == "sentinel":
        made = RedisCounters(request.getfixturevalue("redis_sentinel").url, TIMEOUT_S)
    elif kind == "cluster":
        made = RedisCounters(request.getfixturevalue("redis_cluster").url, TIMEOUT_S)
    elif kind == "guarded":
        made = GuardedCounters(RedisCounters(request.getfixturevalue("redis_server").url, TIMEOUT_S))
    else:
        made = RedisCounters(request.getfixturevalue(f"{kind}_server").url, TIMEOUT_S)
    if isinstance(made, RedisCounters | GuardedCounters):
        await made.start()
    yield made
    await made.close()


NAMES = iter(range(1_000_000))


def limit_set(algorithm: Algorithm, *texts: str) -> LimitSet:
    return LimitSet(f"matrix:{next(NAMES)}", algorithm, [Limit.parse(text) for text in texts])


async def decide(store: CounterStore, *counters: tuple[LimitSet, str], cost: int = 1) -> Decision:
    outcome = (await store.charge([Charge(tuple(counters), cost)]))[0]
    assert isinstance(outcome, Decision), outcome
    assert not outcome.degraded
    return outcome


def texts_of(algorithm: Algorithm, amount: int) -> tuple[str, str]:
    """Limits of which `amount` pass at once."""
    return (
        (f"{amount}/hour burst {amount}", f"{2 * amount}/day burst {2 * amount}")
        if algorithm.is_bucket
        else (f"{amount}/hour", f"{2 * amount}/month")
    )


@pytest.mark.parametrize("algorithm", Algorithm)
async def test_concurrent_checks_admit_exactly_the_limit(store: CounterStore, algorithm: Algorithm) -> None:
    limits = limit_set(algorithm, *texts_of(algorithm, 40))
    answers = await asyncio.gather(*(decide(store, (limits, "s")) for _ in range(100)))
    assert sum(answer.allowed for answer in answers) == 40
    assert sorted(answer.remaining or 0 for answer in answers if answer.allowed) == list(range(40))
    denied = [answer for answer in answers if not answer.allowed]
    assert all(answer.binding is limits.limits[0] and (answer.retry_after_us or 0) > 0 for answer in denied)


@pytest.mark.parametrize("algorithm", Algorithm)
async def test_peeks_costs_batches_and_resets(store: CounterStore, algorithm: Algorithm) -> None:
    limits = limit_set(algorithm, *texts_of(algorithm, 10))
    assert (await decide(store, (limits, "s"), cost=0)).remaining == 10
    assert (await decide(store, (limits, "s"), cost=7)).remaining == 3
    never = await decide(store, (limits, "s"), cost=11)
    assert (never.allowed, never.retry_after_us) == (False, None)
    assert not (await decide(store, (limits, "s"), cost=4)).allowed
    assert (await decide(store, (limits, "s"), cost=0)).remaining == 3
    outcomes = await store.charge([Charge(((limits, subject),)) for subject in ("s", "t", "s", "u", "s", "s")])
    assert [outcome.allowed for outcome in outcomes if isinstance(outcome, Decision)] == [True] * 5 + [False]
    await store.reset([(limits, "s"), (limits, "nobody")])
    assert (await decide(store, (limits, "s"))).remaining == 9
    assert (await decide(store, (limits, "t"), cost=0)).remaining == 9
    await store.ping()
    assert list(await store.charge([])) == []


@pytest.mark.parametrize("algorithm", Algorithm)
async def test_a_rule_and_a_tier_of_different_subjects_are_charged_together_or_not_at_all(
    store: CounterStore, algorithm: Algorithm
) -> None:
    rule = limit_set(Algorithm.SLIDING_WINDOW, "1000/hour")
    tier = limit_set(algorithm, *texts_of(algorithm, 6))
    # Ten addresses lie on different shards of a cluster than the key, nearly all.
    answers = [await decide(store, (rule, f"i:10.0.0.{number}"), (tier, "k:" + "ab" * 12)) for number in range(10)]
    assert [answer.allowed for answer in answers] == [True] * 6 + [False] * 4
    assert all(answer.limits is rule for answer in answers)
    left = [(await decide(store, (rule, f"i:10.0.0.{number}"), cost=0)).remaining for number in range(10)]
    assert left == [999] * 6 + [1000] * 4, "what the tier refused was not charged to the rule"


async def test_a_new_windows_counts_begin_and_the_others_stay(store: CounterStore) -> None:
    name = f"matrix:{next(NAMES)}"
    before = LimitSet(name, Algorithm.FIXED_WINDOW, [Limit.parse("10/hour")])
    after = LimitSet(name, Algorithm.FIXED_WINDOW, [Limit.parse("5/hour"), Limit.parse("100/month")])
    assert (await decide(store, (before, "s"), cost=3)).remaining == 7
    assert (await decide(store, (after, "s"), cost=0)).remaining == 2
    assert not (await decide(store, (after, "s"), cost=3)).allowed
    assert (await decide(store, (after, "s"), cost=2)).remaining == 0


@given(st.lists(st.text(min_size=1, max_size=60), min_size=2, max_size=20, unique=True))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_no_two_subjects_share_a_tag(subjects: list[str]) -> None:
    tags = {hash_tag(subject) for subject in subjects}
    assert len(tags) == len(subjects)
    assert not any(brace in tag for tag in tags for brace in b"{}")


@pytest.mark.parametrize(
    "subjects",
    [
        ("k:" + "0" * 24, "k:" + "0" * 23 + "1", "k:" + "g" * 24, "k:" + "A" * 24, "k:" + "a" * 24),
        ("=x", "x", "#x", "kx", "k"),
        ("a_b", "a", "b_c", "a}b", "a{b"),
    ],
)
def test_subjects_made_to_meet_do_not(subjects: tuple[str, ...]) -> None:
    tags = {hash_tag(subject) for subject in subjects}
    assert len(tags) == len(subjects)


async def test_keys_are_as_documented(redis_server: RedisServer) -> None:
    store = RedisCounters(redis_server.url, TIMEOUT_S)
    await store.start()
    limits = limit_set(Algorithm.SLIDING_WINDOW, "5/minute", "9/day")
    await decide(store, (limits, "i:203.0.113.7"))
    await decide(store, (limits, "k:" + "0f" * 12))
    await store.close()
    keys = list(redis_server.call("KEYS", "tg:{=i:203.0.113.7}*"))
    assert len(keys) == 1
    assert redis_server.call("TYPE", keys[0]) in (b"string", "string")
    assert 0 < redis_server.call("PTTL", keys[0]) <= 2 * 86_400_000
    (short,) = redis_server.call("KEYS", f"tg:{{{hash_tag('k:' + '0f' * 12).decode()}}}*")
    assert len(short) == 30
