"""The guard on a real Redis: what each rule answers while it is away, what comes back to it, and who is denied without asking."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable

import pytest

from tests.moments import PATIENCE_S, until
from tests.servers.redis_server import RedisServer
from tests.servers.tcp_proxy import TcpProxy
from tidegate.breaker import BreakerOptions
from tidegate.counters import Charge, ChargeOutcome
from tidegate.counters.degraded import GuardOptions
from tidegate.counters.guarded import GuardedCounters
from tidegate.counters.redis.store import RedisCounters
from tidegate.decision import Decision
from tidegate.errors import StoreUnavailable
from tidegate.policy.limits import Algorithm, Limit, LimitSet, OnFailure

NAMES = iter(range(1_000_000))
QUICK = BreakerOptions(failures=3, window_s=10, open_s=0.3)


def limit_set(text: str, on_failure: OnFailure = OnFailure.DEFAULT, algorithm: Algorithm = Algorithm.FIXED_WINDOW) -> LimitSet:
    return LimitSet(f"guarded:{next(NAMES)}", algorithm, [Limit.parse(text)], on_failure, rule="r")


def guarded(server: RedisServer, timeout_s: float = 20.0, **options: object) -> GuardedCounters:
    return GuardedCounters(RedisCounters(server.url, timeout_s), GuardOptions(breaker=QUICK, **options))  # type: ignore[arg-type]


async def ask(store: GuardedCounters, *counters: tuple[LimitSet, str], cost: int = 1) -> ChargeOutcome:
    return (await store.charge([Charge(tuple(counters), cost)]))[0]


async def decided(store: GuardedCounters, *counters: tuple[LimitSet, str], cost: int = 1) -> Decision:
    outcome = await ask(store, *counters, cost=cost)
    assert isinstance(outcome, Decision), outcome
    return outcome


async def exact_again(store: GuardedCounters) -> None:
    """Until Redis decides again, and nothing is owed."""
    probe, deadline = limit_set("1000000/day"), time.monotonic() + PATIENCE_S
    while (await decided(store, (probe, "probe"))).degraded or store.owed:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


@pytest.fixture
async def store(new_redis: Callable[..., RedisServer]) -> AsyncIterator[tuple[RedisServer, GuardedCounters]]:
    server = new_redis()
    counters = guarded(server)
    await counters.start()
    yield server, counters
    await counters.close()


async def test_each_rule_answers_in_its_own_way_while_redis_is_unavailable(store: tuple[RedisServer, GuardedCounters]) -> None:
    server, counters = store
    local, allow, deny = (limit_set("3/day", on_failure) for on_failure in (OnFailure.LOCAL, OnFailure.ALLOW, OnFailure.DENY))
    by_default = limit_set("3/day")
    assert not (await decided(counters, (local, "s"))).degraded
    server.kill()
    for limits, expected in ((local, [True] * 3 + [False]), (allow, [True] * 4), (by_default, [True] * 3 + [False])):
        answers = [await decided(counters, (limits, "t")) for _ in range(4)]
        assert all(answer.degraded for answer in answers)
        assert [answer.allowed for answer in answers] == expected
    for _ in range(4):
        assert isinstance(await ask(counters, (deny, "t")), StoreUnavailable)
    batch = await counters.charge([Charge(((limits, "u"),)) for limits in (local, allow, deny)])
    assert [type(outcome) for outcome in batch] == [Decision, Decision, StoreUnavailable]
    assert sum(counters.degraded.values()) == 4 * 4 + 3
    assert set(counters.degraded) <= {"disconnected", "breaker_open"}
    # Each attempt to reconnect that fails is one failure, however many checks meet it.
    deadline = time.monotonic() + PATIENCE_S
    while not counters.open_breakers:
        assert time.monotonic() < deadline
        await decided(counters, (allow, "t"))
        await asyncio.sleep(0.02)
    server.start()
    await exact_again(counters)
    assert counters.open_breakers == 0
    assert not (await decided(counters, (deny, "t"))).degraded


async def test_the_settings_default_holds_for_rules_that_do_not_say(new_redis: Callable[..., RedisServer]) -> None:
    server = new_redis()
    counters = guarded(server, on_failure=OnFailure.DENY)
    await counters.start()
    server.kill()
    assert isinstance(await ask(counters, (limit_set("3/day"), "s")), StoreUnavailable)
    assert (await decided(counters, (limit_set("3/day", OnFailure.LOCAL), "s"))).allowed
    await counters.close()


@pytest.mark.parametrize("algorithm", Algorithm)
async def test_what_was_admitted_locally_is_put_back(redis_server: RedisServer, algorithm: Algorithm) -> None:
    async with TcpProxy(redis_server.port) as proxy:
        counters = GuardedCounters(RedisCounters(proxy.url, 1.0), GuardOptions(breaker=QUICK))
        await counters.start()
        limits = limit_set("10/day burst 10" if algorithm.is_bucket else "10/day", algorithm=algorithm)
        tier = limit_set("100/day")
        for _ in range(2):
            await decided(counters, (limits, "s"), (tier, "s"))
        proxy.refuse = True
        proxy.drop_all()
        await until(lambda: not counters.store.connections()[0].up)
        for _ in range(5):
            answer = await decided(counters, (limits, "s"), (tier, "s"))
            assert (answer.degraded, answer.allowed) == (True, True)
        proxy.refuse = False
        await exact_again(counters)
        peek = await decided(counters, (limits, "s"), cost=0)
        assert (peek.degraded, peek.remaining) == (False, 3)
        assert (await decided(counters, (tier, "s"), cost=0)).remaining == 93
        assert counters.put_back >= 2
        await counters.close()


@pytest.mark.parametrize("algorithm", Algorithm)
async def test_what_a_slow_redis_counts_late_is_not_put_back(redis_server: RedisServer, algorithm: Algorithm) -> None:
    async with TcpProxy(redis_server.port) as proxy:
        counters = GuardedCounters(RedisCounters(proxy.url, 0.1), GuardOptions(breaker=QUICK))
        await counters.start()
        limits = limit_set("100/day burst 100" if algorithm.is_bucket else "100/day", algorithm=algorithm)
        for _ in range(2):
            await decided(counters, (limits, "s"))
        proxy.stall = True
        answers = await asyncio.gather(*(decided(counters, (limits, "s")) for _ in range(5)))
        assert all(answer.degraded and answer.allowed for answer in answers)
        proxy.stall = False
        await until(lambda: sum(counters.late.answers.values()) == 5)
        assert counters.late.answers == {"allowed": 5, "denied": 0, "lost": 0}
        await until(lambda: not len(counters.late))
        assert (counters.owed, counters.put_back, counters.open_breakers) == (0, 0, 0)
        assert (await decided(counters, (limits, "s"), cost=0)).remaining == 93
        await counters.close()


async def test_a_subjects_debt_is_paid_before_it_is_asked_about(store: tuple[RedisServer, GuardedCounters]) -> None:
    server, counters = store
    limits = limit_set("10/day")
    await decided(counters, (limits, "s"))
    server.call("CLIENT", "PAUSE", "100000", "WRITE")
    server.kill()
    answers = [await decided(counters, (limits, "s")) for _ in range(6)]
    assert all(answer.degraded for answer in answers)
    server.start()
    # The new server knows nothing: what is left says what was put back.
    await until(lambda: counters.store.connections()[0].up)
    first = await decided(counters, (limits, "s"))
    while first.degraded:
        await asyncio.sleep(0.05)
        first = await decided(counters, (limits, "s"), cost=0)
    assert first.remaining is not None
    assert first.remaining <= 4
    assert counters.owed == 0


async def test_a_debt_is_paid_first_also_where_the_tier_was_read_anew(new_redis: Callable[..., RedisServer]) -> None:
    server = new_redis()
    counters = GuardedCounters(RedisCounters(server.url, 20.0), GuardOptions(breaker=BreakerOptions(failures=1000)))
    await counters.start()
    limits = limit_set("10/day")
    server.kill()
    for _ in range(4):
        assert (await decided(counters, (limits, "s"))).degraded
    server.start()
    await until(lambda: counters.store.connections()[0].up)
    # No heartbeat came yet that might have put it back: the check itself must.
    again = LimitSet(limits.name, limits.algorithm, limits.limits, limits.on_failure, rule=limits.rule)
    first = await decided(counters, (again, "s"))
    assert not first.degraded
    assert first.remaining == 5
    await counters.close()


async def test_an_instance_that_starts_without_redis_counts_by_itself_until_it_comes(
    new_redis: Callable[..., RedisServer],
) -> None:
    server = new_redis()
    server.kill()
    counters = guarded(server, timeout_s=0.2, min_instances=4)
    await counters.start()
    limits = limit_set("8/day")
    answers = [await decided(counters, (limits, "s")) for _ in range(4)]
    assert [answer.allowed for answer in answers] == [True, True, False, False]
    assert all(answer.degraded and answer.limit == 8 for answer in answers)
    server.start()
    await exact_again(counters)
    assert (await decided(counters, (limits, "s"), cost=0)).remaining == 6
    await counters.close()


async def test_who_was_denied_is_denied_without_asking(store: tuple[RedisServer, GuardedCounters]) -> None:
    server, counters = store
    limits = limit_set("3/day")
    calls = lambda: int(str(server.call("INFO", "commandstats")).partition("cmdstat_evalsha:calls=")[2].partition(",")[0])  # noqa: E731
    for _ in range(3):
        await decided(counters, (limits, "s"))
    first = await decided(counters, (limits, "s"))
    await until(lambda: counters.instances == 1)
    before = calls()
    answers = [await decided(counters, (limits, "s")) for _ in range(500)]
    assert all(not answer.allowed and not answer.degraded for answer in answers)
    assert calls() - before < 100, "heartbeats alone, one a second"
    assert answers[-1].holds_until_us is not None
    assert first.holds_until_us is not None
    assert abs(answers[-1].holds_until_us - first.holds_until_us) < 10_000_000, "of a day"
    assert counters.denials.answered == 500
    assert (await decided(counters, (limits, "s"), cost=0)).allowed, "a peek is asked"
    raised = LimitSet(limits.name, Algorithm.FIXED_WINDOW, [Limit.parse("5/day")])
    assert (await decided(counters, (raised, "s"))).allowed, "a raised limit is asked"
    await counters.reset([(limits, "s")])
    assert (await decided(counters, (limits, "s"))).allowed, "a reset counter is asked"


async def test_a_denial_ends_when_its_window_does(store: tuple[RedisServer, GuardedCounters]) -> None:
    _, counters = store
    limits = limit_set("1/2s", algorithm=Algorithm.SLIDING_LOG)
    assert (await decided(counters, (limits, "s"))).allowed
    started = time.monotonic()
    while not (answer := await decided(counters, (limits, "s"))).allowed:
        assert time.monotonic() - started < PATIENCE_S
        await asyncio.sleep((answer.retry_after or 0) / 2 + 0.001)
    assert time.monotonic() - started >= 1.9


async def test_instances_hear_of_each_other_and_of_resets(new_redis: Callable[..., RedisServer]) -> None:
    server = new_redis()
    three = [guarded(server) for _ in range(3)]
    for counters in three:
        await counters.start()
    await until(lambda: all(counters.instances == 3 for counters in three))
    limits = limit_set("1/day")
    assert (await decided(three[0], (limits, "s"))).allowed
    for counters in three:
        assert not (await decided(counters, (limits, "s"))).allowed
    await three[0].reset([(limits, "s")])
    deadline = time.monotonic() + PATIENCE_S
    while not (await decided(three[2], (limits, "s"))).allowed:
        assert time.monotonic() < deadline, "a reset must reach the others"
        await asyncio.sleep(0.1)
    shared = limit_set("7/day")
    server.kill()
    admitted = [sum([(await decided(counters, (shared, "s"))).allowed for _ in range(7)]) for counters in three]
    assert admitted == [2, 2, 2], "7 over 3 instances, rounded down"
    server.start()
    for counters in three:
        await exact_again(counters)
    assert (await decided(three[1], (shared, "s"), cost=0)).remaining == 1
    await three.pop().close()
    await until(lambda: all(counters.instances == 2 for counters in three))
    for counters in three:
        await counters.close()


async def test_closing_puts_back_what_is_owed(new_redis: Callable[..., RedisServer]) -> None:
    server = new_redis()
    counters = GuardedCounters(RedisCounters(server.url, 20.0), GuardOptions(breaker=BreakerOptions(failures=1000)))
    await counters.start()
    limits = limit_set("10/day")
    server.kill()
    for _ in range(4):
        assert (await decided(counters, (limits, "s"))).degraded
    server.start()
    await until(lambda: counters.store.connections()[0].up)
    await counters.close()
    other = guarded(server)
    await other.start()
    assert (await decided(other, (limits, "s"), cost=0)).remaining == 6
    await other.close()


async def opened(counters: GuardedCounters, limits: LimitSet) -> None:
    """Ask until the breaker is open; each attempt to reconnect that fails is one failure."""
    deadline = time.monotonic() + PATIENCE_S
    while not counters.open_breakers:
        assert time.monotonic() < deadline
        await decided(counters, (limits, "s"))
        await asyncio.sleep(0.02)


async def test_what_is_owed_is_put_back_though_no_check_comes_again(store: tuple[RedisServer, GuardedCounters]) -> None:
    server, counters = store
    limits = limit_set("1000000/day")
    server.kill()
    await opened(counters, limits)
    assert counters.owed == 1
    server.start()
    # Nobody asks: a balancer may send everything to other instances, which are to know what this one has admitted.
    # While it is on its way it is not owed any more, and not put back yet.
    await until(lambda: counters.put_back == 1 and not counters.open_breakers)
    assert not counters.owed


async def test_probes_that_fail_leave_the_breaker_open_and_the_debt_owed(store: tuple[RedisServer, GuardedCounters]) -> None:
    server, counters = store
    server.kill()
    await opened(counters, limit_set("1000000/day"))
    probes = 0
    probe = counters.store.probe

    async def counted(shard: str, cost: int) -> None:
        nonlocal probes
        probes += 1
        await probe(shard, cost)

    counters.store.probe = counted  # type: ignore[method-assign]
    await until(lambda: probes >= 2)
    assert counters.open_breakers == 1
    assert counters.owed == 1
    assert counters.put_back == 0


async def test_closing_puts_back_what_is_owed_to_a_shard_with_an_open_breaker(new_redis: Callable[..., RedisServer]) -> None:
    server = new_redis()
    patient = BreakerOptions(failures=3, window_s=10, open_s=3600)
    counters = GuardedCounters(RedisCounters(server.url, 0.5), GuardOptions(breaker=patient))
    await counters.start()
    limits = limit_set("1000000/day")
    server.kill()
    await opened(counters, limits)
    server.start()
    await until(lambda: counters.store.connections()[0].up)
    admitted = sum(counters.degraded.values())
    await counters.close()
    other = guarded(server)
    await other.start()
    assert (await decided(other, (limits, "s"), cost=0)).remaining == 1_000_000 - admitted
    await other.close()


async def test_a_shard_that_returns_is_used_again_long_before_open_s(new_redis: Callable[..., RedisServer]) -> None:
    server = new_redis()
    counters = GuardedCounters(RedisCounters(server.url, 0.5), GuardOptions(breaker=BreakerOptions(3, 10, 3600)))
    await counters.start()
    limits = limit_set("1000000/day")
    server.kill()
    await opened(counters, limits)
    with pytest.raises(StoreUnavailable):
        await counters.ping()
    server.start()
    await until(lambda: not counters.open_breakers and not counters.owed)
    assert not (await decided(counters, (limits, "s"))).degraded
    await counters.ping()
    await counters.close()


async def test_a_long_debt_does_not_silence_the_heartbeat(redis_server: RedisServer) -> None:
    async with TcpProxy(redis_server.port) as proxy:
        counters = GuardedCounters(RedisCounters(proxy.url, 1.0), GuardOptions(breaker=QUICK), "debtor")
        await counters.start()
        await until(lambda: counters.instances >= 1 and counters._resets is not None)
        limits = limit_set("1000/day")
        for number in range(3_000):
            counters._local.owe(Charge(((limits, f"s{number}"),)), counters._store_now_us())
        # Each step of 200 takes 0.3 s: 4.5 s in all.
        proxy.delay_s = 0.3
        beats: set[int] = set()
        while counters.owed:
            score = redis_server.call("ZSCORE", "tg:{instances}", "debtor")
            beats.add(int(float(score)))
            await asyncio.sleep(0.05)
        assert len(beats) >= 3, "one a second or so, while the debt is put back"
        proxy.delay_s = 0.0
        await counters.close()


@pytest.mark.parametrize(
    ("refused", "works"),
    [(["-evalsha", "-eval"], False), (["-time"], False), (["-get"], False), (["-script|load"], True)],
)
async def test_health_runs_the_real_script(any_redis: RedisServer, refused: list[str], works: bool) -> None:
    any_redis.must("ACL", "SETUSER", "crippled", "reset", "on", ">pw", "~*", "&*", "+@all", *refused)
    any_redis.must("SCRIPT", "FLUSH")
    other = GuardedCounters(RedisCounters(any_redis.url.replace("redis://", "redis://crippled:pw@"), 5.0))
    await other.start()
    try:
        limits = limit_set("5/day")
        if works:
            assert not (await decided(other, (limits, "s"))).degraded
            await other.ping()
        else:
            assert (await decided(other, (limits, "s"))).degraded
            with pytest.raises(StoreUnavailable, match=r"refused|script error"):
                await other.ping()
    finally:
        await other.close()
        any_redis.must("ACL", "DELUSER", "crippled")


async def test_scripts_run_where_the_script_command_is_renamed() -> None:
    with RedisServer(options={"rename-command": "SCRIPT HIDDEN"}) as redis:
        counters = GuardedCounters(RedisCounters(redis.url, 5.0))
        await counters.start()
        try:
            limits = limit_set("2/day")
            answers = [await decided(counters, (limits, "s")) for _ in range(3)]
            assert [(each.allowed, each.degraded) for each in answers] == [(True, False), (True, False), (False, False)]
            await counters.ping()
        finally:
            await counters.close()
