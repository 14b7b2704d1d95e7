"""Holds on real Redis servers: several processes, instances that die, several shards, and a server that is gone."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable

import pytest
from werkzeug.test import create_environ

from tests.moments import PATIENCE_S, wait_until
from tests.servers.redis_cluster import RedisCluster
from tests.servers.redis_server import RedisServer
from tidegate.counters import Charge
from tidegate.counters.factory import open_blocking
from tidegate.counters.guarded import GuardedCounters
from tidegate.counters.holds import HeldCounter, HoldHandle, new_id
from tidegate.counters.leased import LeasedCounters
from tidegate.counters.redis.keyspace import hash_tag, key_of, name_of, slot_of
from tidegate.counters.redis.store import RedisCounters
from tidegate.decision import Decision
from tidegate.doors.exceeded import RateLimitExceeded
from tidegate.doors.limit import limit
from tidegate.doors.limiter import SyncLimiter
from tidegate.doors.stores import TIMEOUT_VARIABLE, close_shared
from tidegate.errors import HoldNotFound, StoreUnavailable, TooManyHolds
from tidegate.policy.limits import Algorithm, ConcurrencyAlgorithm, Limit, LimitSet
from tidegate.settings import CounterSettings
from tidegate.wsgi import RateLimitMiddleware as WsgiMiddleware

NAMES = iter(range(1_000_000))
TIMEOUT_S = 5.0
MINUTE_US = 60_000_000


def limit_set(text: str, algorithm: Algorithm = Algorithm.FIXED_WINDOW) -> LimitSet:
    return LimitSet(f"holds:{next(NAMES)}", algorithm, [Limit.parse(text)])


async def remaining(store: GuardedCounters, *counters: tuple[LimitSet, str]) -> int | None:
    [outcome] = await store.charge([Charge(counters, 0)])
    assert isinstance(outcome, Decision)
    return outcome.remaining


def run_processes(arguments: list[list[str]]) -> list[int]:
    """Start processes, let all begin at once, and end them without notice when each has said how many holds were allowed."""
    command = [sys.executable, "-m", "tests.hold_process"]
    processes = [
        subprocess.Popen([*command, *each], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for each in arguments
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        return [int(process.stdout.readline()) for process in processes if process.stdout is not None]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


async def test_processes_reserve_exactly_the_limit_and_what_a_dead_one_held_goes_back(redis_server: RedisServer) -> None:
    """Each of 5 opens 100 holds of 10 units at once, under a limit of 1,000; then all are killed, which settles nothing."""
    subject = f"processes-{next(NAMES)}"
    allowed = run_processes([[redis_server.url, "1000/day", subject, "100", "0", "10"]] * 5)
    assert sum(allowed) == 100
    store = GuardedCounters(RedisCounters(redis_server.url, TIMEOUT_S))
    limits = LimitSet("hold_process", Algorithm.FIXED_WINDOW, [Limit.parse("1000/day")])
    [decision] = await store.charge([Charge(((limits, subject),), 1000)])
    assert isinstance(decision, Decision)
    # On a busy machine they may have expired already; none gives back before.
    assert decision.allowed or (decision.retry_after_us or 0) <= 10_000_000
    await until_true(lambda: _passes(store, ((limits, subject),), 1000), decision.allowed)
    await store.close()


async def test_settled_holds_of_processes_charge_what_was_used(redis_server: RedisServer) -> None:
    subject = f"processes-{next(NAMES)}"
    allowed = run_processes([[redis_server.url, "1000/day", subject, "20", "20", "600"]] * 3)
    assert allowed == [20] * 3
    store = GuardedCounters(RedisCounters(redis_server.url, TIMEOUT_S))
    limits = LimitSet("hold_process", Algorithm.FIXED_WINDOW, [Limit.parse("1000/day")])
    assert await remaining(store, (limits, subject)) == 1000 - 60 * 4
    await store.close()


async def until_true(holds: Callable[[], Awaitable[bool]], already: bool = False) -> None:
    """Ask again and again until something holds."""
    async with asyncio.timeout(PATIENCE_S):
        while not (already or await holds()):
            await asyncio.sleep(0.05)


async def test_holds_and_checks_share_the_limit(redis_server: RedisServer) -> None:
    store = GuardedCounters(RedisCounters(redis_server.url, TIMEOUT_S))
    counters = ((limit_set("100/day"), "k"), (limit_set("50/day", Algorithm.SLIDING_LOG), "k"))
    decision, hold = await store.open_hold(counters, 50, MINUTE_US, "r")
    assert (decision.allowed, decision.remaining, decision.binding) == (True, 0, counters[1][0].limits[0])
    assert hold is not None
    assert HoldHandle.of(hold.text) == hold
    [denied] = await store.charge([Charge(counters, 1)])
    assert isinstance(denied, Decision)
    assert not denied.allowed
    assert 0 < (denied.retry_after_us or 0) <= MINUTE_US
    await store.renew_hold(hold, MINUTE_US * 60)
    # Another instance settles it, twice.
    other = GuardedCounters(RedisCounters(redis_server.url, TIMEOUT_S))
    settled = await other.settle_hold(hold, 20)
    assert (settled.cost, settled.late, settled.limit, settled.remaining, settled.repeated) == (20, False, 50, 30, False)
    again = await store.settle_hold(hold, 0)
    assert (again.cost, again.repeated, again.remaining) == (20, True, 30)
    [allowed] = await other.charge([Charge(counters, 30)])
    assert isinstance(allowed, Decision)
    assert allowed.allowed
    # The first instance forgets its denial when it hears of units that came back.
    await until_true(lambda: _passes(store, counters[:1], 40))
    for each in (store, other):
        await each.close()


async def _passes(store: GuardedCounters, counters: tuple[tuple[LimitSet, str], ...], cost: int) -> bool:
    [outcome] = await store.charge([Charge(counters, cost)])
    return isinstance(outcome, Decision) and outcome.allowed


async def test_slots_of_an_instance_that_died_are_free_when_they_expire(redis_server: RedisServer) -> None:
    dead = GuardedCounters(RedisCounters(redis_server.url, TIMEOUT_S))
    store = GuardedCounters(RedisCounters(redis_server.url, TIMEOUT_S))
    slots = LimitSet(f"holds:{next(NAMES)}", ConcurrencyAlgorithm.CONCURRENT, [Limit.parse("20 concurrent")])
    counters = ((limit_set("1000/day"), "k"), (slots, "k"))
    opened = await asyncio.gather(*(dead.open_hold(counters, 1, 2_000_000) for _ in range(30)))
    assert sum(decision.allowed for decision, _ in opened) == 20
    [denied] = await store.charge([Charge(counters, 1)])
    assert isinstance(denied, Decision)
    assert (denied.allowed, denied.binding) == (False, slots.limits[0])
    assert await remaining(store, (slots, "k")) == 0
    await until_true(lambda: _passes(store, counters, 1))
    assert await remaining(store, (slots, "k")) == 20
    _, hold = await store.open_hold(counters, 0, MINUTE_US)
    assert hold is not None
    for _ in range(2):
        settled = await store.settle_hold(hold, 3)
        assert (settled.cost, settled.limit, settled.remaining) == (3, 20, 20)
    for each in (store, dead):
        await each.close()


async def test_unknown_and_forged_ids(redis_server: RedisServer) -> None:
    store = GuardedCounters(RedisCounters(redis_server.url, TIMEOUT_S))
    limits = limit_set("100/day")
    _, hold = await store.open_hold(((limits, "k"),), 50, MINUTE_US)
    assert hold is not None
    [[counter]] = hold.parts
    forged = [
        HoldHandle(new_id(), 50, None, hold.parts),
        HoldHandle(hold.id, 50, None, ((HeldCounter(counter.tag, counter.name, counter.parameters, b"\x93\x01"),),)),
        HoldHandle(hold.id, 50, None, ((HeldCounter(counter.tag, b"AAAAAAAA", counter.parameters, counter.record),),)),
        HoldHandle(new_id(), 50, None, ((HeldCounter(counter.tag, counter.name, b"\xc1", counter.record),),)),
        HoldHandle(new_id(), 50, None, ((HeldCounter(counter.tag, counter.name, b"\x91\xa5loops", counter.record),),)),
    ]
    for each in forged:
        with pytest.raises(HoldNotFound):
            await store.settle_hold(each, 10)
    with pytest.raises(HoldNotFound):
        await store.renew_hold(forged[0], MINUTE_US)
    assert await remaining(store, (limits, "k")) == 50
    assert (await store.settle_hold(hold, 10)).remaining == 90
    await store.close()


async def test_a_subject_has_a_bounded_number_of_holds(redis_server: RedisServer) -> None:
    store = RedisCounters(redis_server.url, TIMEOUT_S)
    store.holds.most = 3
    counters = ((limit_set("100/day"), "k"),)
    held = [(await store.open_hold(counters, 0, MINUTE_US))[1] for _ in range(3)]
    with pytest.raises(TooManyHolds):
        await store.open_hold(counters, 0, MINUTE_US)
    assert held[0] is not None
    await store.settle_hold(held[0], 0)
    assert (await store.open_hold(counters, 0, MINUTE_US))[1] is not None
    await store.close()


async def test_several_shards(redis_cluster: RedisCluster) -> None:
    store = GuardedCounters(RedisCounters(redis_cluster.url, TIMEOUT_S))
    first = f"a{next(NAMES)}"
    second = next(f"b{n}" for n in range(10_000) if (slot_of(f"b{n}") < 5000) != (slot_of(first) < 5000))
    rule, tier = limit_set("100/day"), limit_set("50/day", Algorithm.TOKEN_BUCKET)
    counters = ((rule, first), (tier, second))
    decision, hold = await store.open_hold(counters, 40, MINUTE_US)
    assert (decision.allowed, decision.remaining, decision.limits) == (True, 10, rule)
    assert hold is not None
    assert len(hold.parts) == 2
    # What the first shard reserved goes back where the second denies.
    decision, none = await store.open_hold(counters, 20, MINUTE_US)
    assert (decision.allowed, decision.binding, none) == (False, tier.limits[0], None)
    assert await remaining(store, (rule, first)) == 60
    settled = await store.settle_hold(hold, 70)
    assert (settled.cost, settled.remaining) == (70, 0)
    assert await remaining(store, (rule, first)) == 30
    await store.close()


async def test_a_reset_forgets_what_holds_charged(redis_server: RedisServer) -> None:
    store = GuardedCounters(RedisCounters(redis_server.url, TIMEOUT_S))
    counter = (limit_set("100/day"), "k")
    _, hold = await store.open_hold((counter,), 60, 3600 * 1_000_000)
    await store.reset([counter])
    key = key_of(*counter).decode()
    assert redis_server.call("PTTL", f"{key}.reset") > 3600 * 1_000
    assert await _passes(store, (counter,), 50)
    assert hold is not None
    assert (await store.settle_hold(hold, 0)).remaining == 50
    await store.close()


async def test_while_the_store_is_away_nothing_is_reserved(new_redis: Callable[[], RedisServer]) -> None:
    server = new_redis()
    store = GuardedCounters(RedisCounters(server.url, 0.5))
    counters = ((limit_set("100/day"), "k"),)
    _, known = await store.open_hold(counters, 10, MINUTE_US)
    assert known is not None
    server.kill()
    decision, hold = await store.open_hold(counters, 60, MINUTE_US)
    assert (decision.allowed, decision.degraded) == (True, True)
    assert hold is not None
    assert not hold.counted
    with pytest.raises(StoreUnavailable):
        await store.settle_hold(known, 5)
    denied = LimitSet("holds:deny", Algorithm.FIXED_WINDOW, [Limit.parse("100/day")], counters[0][0].on_failure.DENY)
    with pytest.raises(StoreUnavailable):
        await store.open_hold(((denied, "k"),), 60, MINUTE_US)
    await store.close()


async def test_a_promoted_replica_knows_all_holds(new_redis: Callable[[], RedisServer]) -> None:
    """The server is killed while holds are open, settled and expired: nothing is lost or given back twice."""
    server, replica = new_redis(), new_redis()
    replica.must("REPLICAOF", "127.0.0.1", str(server.port))
    first = GuardedCounters(RedisCounters(server.url, TIMEOUT_S))
    slots = LimitSet(f"holds:{next(NAMES)}", ConcurrencyAlgorithm.CONCURRENT, [Limit.parse("4 concurrent")])
    counters = ((limit_set("100/day"), "k"), (slots, "k"))
    held = [(await first.open_hold(counters, 25, MINUTE_US))[1] for _ in range(4)]
    assert held[0] is not None
    await first.settle_hold(held[0], 5)
    await until_true(lambda: is_replicated(server))
    server.kill()
    await first.close()
    replica.must("REPLICAOF", "NO", "ONE")
    store = GuardedCounters(RedisCounters(replica.url, TIMEOUT_S))
    again = await store.settle_hold(held[0], 25)
    assert (again.cost, again.repeated) == (5, True)
    assert await remaining(store, *counters[:1]) == 20
    assert await remaining(store, (slots, "k")) == 1
    for hold, used in zip(held[1:], (10, 25, 40), strict=True):
        assert hold is not None
        for _ in range(2):
            assert (await store.settle_hold(hold, used)).cost == used
    assert await remaining(store, *counters[:1]) == 20
    assert await remaining(store, (slots, "k")) == 4
    await store.close()


class RandomHolds:
    """Holds that are opened, renewed, settled with less, as much, more, twice or late, and never, at three instances: what may be
    reserved follows from what was settled and what is open.

    Args:
        choices: what is done next, at random.
        url: of the server.
    """

    LIMIT, SLOTS, SHORT_US = 200, 6, 30_000

    def __init__(self, choices: random.Random, url: str) -> None:
        self.random = choices
        self.limits = limit_set(f"{self.LIMIT}/day")
        self.slots = LimitSet(f"random:{next(NAMES)}", ConcurrencyAlgorithm.CONCURRENT, [Limit.parse(f"{self.SLOTS} concurrent")])
        self.counters = ((self.limits, "k"), (self.slots, "k"))
        self.charged = 0
        self.open: dict[HoldHandle, bool] = {}
        """Those that were not settled, and whether they are sure to be open."""
        self.lost: list[HoldHandle] = []
        """Those of instances that died; they expire."""
        self.connect(url)

    def connect(self, url: str) -> None:
        self.stores = [GuardedCounters(RedisCounters(url, TIMEOUT_S)) for _ in range(3)]

    async def close(self) -> None:
        for store in self.stores:
            await store.close()

    async def step(self) -> None:
        store = self.random.choice(self.stores)
        if self.random.random() < 0.5 or not self.open:
            await self.open_one(store)
            return
        handle = self.random.choice(list(self.open))
        if self.random.random() < 0.15:
            # Its instance dies: nobody settles it. A long one would be open until the end of the test.
            if not self.open[handle]:
                self.lost.append(handle)
                del self.open[handle]
            return
        if self.open[handle] and self.random.random() < 0.2:
            await store.renew_hold(handle, 2 * MINUTE_US)
            return
        await self.settle(store, handle, self.random.choice((0, handle.cost // 2, handle.cost, handle.cost + 15)))

    async def open_one(self, store: GuardedCounters) -> None:
        cost, is_long = self.random.randrange(60), self.random.random() < 0.6
        sure = [each for each, known in self.open.items() if known]
        decision, handle = await store.open_hold(self.counters, cost, MINUTE_US if is_long else self.SHORT_US)
        if handle is not None:
            # A hold of nothing passes, also where settlements have charged more than the limit.
            assert not cost or self.charged + sum(each.cost for each in sure) + cost <= self.LIMIT
            assert len(sure) < self.SLOTS
            self.open[handle] = is_long
            return
        maybe = [*self.open, *self.lost]
        assert not decision.degraded
        assert self.charged + sum(each.cost for each in maybe) + cost > self.LIMIT or len(maybe) >= self.SLOTS

    async def settle(self, store: GuardedCounters, handle: HoldHandle, used: int) -> None:
        settled = await store.settle_hold(handle, used)
        assert (settled.cost, settled.repeated) == (used, False)
        assert not (settled.late and self.open[handle])
        again = await self.random.choice(self.stores).settle_hold(handle, used + 1)
        assert (again.cost, again.repeated) == (used, True)
        self.charged += used
        del self.open[handle]

    async def finish(self) -> None:
        """Settle what is open: then exactly what was settled is used, and all slots are free."""
        for handle in list(self.open):
            await self.settle(self.stores[0], handle, handle.cost)

        async def is_exact() -> bool:
            left = await remaining(self.stores[1], self.counters[0]), await remaining(self.stores[2], self.counters[1])
            return left == (max(self.LIMIT - self.charged, 0), self.SLOTS)

        await until_true(is_exact)
        await self.close()


async def test_random_holds_of_instances_that_die_and_a_redis_that_is_promoted(new_redis: Callable[[], RedisServer]) -> None:
    server, replica = new_redis(), new_redis()
    replica.must("REPLICAOF", "127.0.0.1", str(server.port))
    runs = [RandomHolds(random.Random(seed), server.url) for seed in range(6)]
    for run in runs:
        for _ in range(40):
            await run.step()
    await until_true(lambda: is_replicated(server))
    server.kill()
    replica.must("REPLICAOF", "NO", "ONE")
    for run in runs:
        await run.close()
        run.connect(replica.url)
        for _ in range(40):
            await run.step()
        await run.finish()


async def is_replicated(server: RedisServer) -> bool:
    """WAIT is for what the same connection wrote; the replica applies all writes in order."""

    def waited() -> bool:
        server.must("SET", "last", "1")
        return bool(server.must("WAIT", "1", "100"))

    return await asyncio.to_thread(waited)


async def test_charges_above_the_limit_and_refunds(new_redis: Callable[[], RedisServer]) -> None:
    server = new_redis()
    store = GuardedCounters(RedisCounters(server.url, TIMEOUT_S))
    counters = ((limit_set("100/day"), "k"), (limit_set("50/day", Algorithm.SLIDING_LOG), "k"))
    assert (await store.adjust(counters, 70)).remaining == 0
    assert (await store.adjust(counters[:1], 0)).remaining == 30
    assert not await _passes(store, counters, 1)
    # What was denied passes now: the denial is forgotten.
    assert (await LeasedCounters(store).adjust(counters, -30)).remaining == 10
    assert await _passes(store, counters, 10)
    assert (await store.adjust(counters, -1000)).remaining == 50
    server.kill()
    # The fallback decides as it does a check, and gives nothing back.
    degraded = await store.adjust(counters[:1], 20)
    assert (degraded.allowed, degraded.degraded) == (True, True)
    denied = LimitSet("holds:deny", Algorithm.FIXED_WINDOW, [Limit.parse("100/day")], counters[0][0].on_failure.DENY)
    with pytest.raises(StoreUnavailable):
        await store.adjust(((denied, "k"),), -5)
    await store.close()


async def test_memory_of_open_holds(redis_server: RedisServer) -> None:
    """At most 120 bytes a hold, where one subject has few; figures are in docs/holds.md."""
    store = RedisCounters(redis_server.url, TIMEOUT_S)
    limits = limit_set("100000/day")
    await asyncio.gather(*(store.open_hold(((limits, "k"),), 5, MINUTE_US) for _ in range(100)))
    key = f"tg:{{{hash_tag('k').decode()}}}{name_of(limits).decode()}.holds"
    assert redis_server.call("ZCARD", key) == 100
    assert redis_server.call("MEMORY", "USAGE", key) <= 120 * 100
    await store.close()


def test_threads_hold_together_with_event_loops(redis_server: RedisServer) -> None:
    name = f"threads-{next(NAMES)}"
    store = open_blocking(CounterSettings(url=redis_server.url, timeout_ms=10_000))
    with SyncLimiter("100/day", counters=store, name=name) as limiter:
        with limiter.hold("u", cost=80) as hold:
            assert limiter.check("u", 0).remaining == 20
            hold.renew(120)
            hold.settle(30)
        assert hold.settlement is not None
        assert (hold.settlement.remaining, hold.settlement.late) == (70, False)
        with pytest.raises(RateLimitExceeded), limiter.hold("u", cost=71):
            pass


async def test_instances_together_know_how_many_holds_are_open(redis_server: RedisServer) -> None:
    stores = [RedisCounters(redis_server.url, TIMEOUT_S) for _ in range(2)]
    limits = limit_set("1000/day")
    counters = ((limits, "gauge"),)
    handles = [(await stores[0].open_hold(counters, 1, MINUTE_US))[1] for _ in range(3)]
    assert all(handles)

    def figures() -> tuple[int, int]:
        return sum(each.holds.ends.open for each in stores), sum(each.holds.ends.expired for each in stores)

    assert figures() == (3, 0)
    assert list(await stores[1].count_holds((*counters, (limits, "other"), (limit_set("1/day"), "gauge")))) == [3, 0, 0]
    one, other, third = (each for each in handles if each is not None)
    for _ in range(2):
        await stores[1].settle_hold(one, 1)
    assert figures() == (2, 0), "settled twice at another instance, counted once"
    await stores[1].renew_hold(other, 2 * MINUTE_US)
    assert figures() == (2, 0)
    for handle in (other, third):
        await stores[0].settle_hold(handle, 1)
    assert figures() == (0, 0)
    for store in stores:
        await store.close()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits of apps wait longer for Redis, on a busy machine."""
    monkeypatch.setenv(TIMEOUT_VARIABLE, "10000")


@pytest.mark.usefixtures("patient")
async def test_limits_of_apps_hold_in_threads_and_event_loops_together(redis_server: RedisServer) -> None:
    scope = f"apps-{next(NAMES)}"
    url = redis_server.url
    slots = limit("3 concurrent", scope=scope, counters=url)
    released, entered = threading.Event(), threading.Semaphore(0)

    @slots
    def blocking() -> None:
        entered.release()
        assert released.wait(PATIENCE_S)

    @slots
    async def asynchronous(end: asyncio.Event) -> None:
        entered.release()
        await end.wait()

    end = asyncio.Event()
    thread = asyncio.ensure_future(asyncio.to_thread(blocking))
    tasks = [asyncio.ensure_future(asynchronous(end)) for _ in range(2)]
    for _ in range(3):
        assert await asyncio.to_thread(entered.acquire, True, PATIENCE_S)
    for denied in (asynchronous(end), asyncio.to_thread(blocking)):
        with pytest.raises(RateLimitExceeded) as error:
            await denied
        assert error.value.decision.limit == 3
    tasks[0].cancel()
    await asyncio.wait(tasks[:1])
    released.set()
    end.set()
    await asyncio.gather(thread, tasks[1])
    await asyncio.gather(*(asynchronous(end) for _ in range(3)))

    @limit("2/day", scope=f"{scope} failures", counters=url, deduct_when=lambda result: result == "wrong")
    async def log_in(result: str) -> str:
        await asyncio.sleep(0)
        return result

    attempts = await asyncio.gather(*(log_in("wrong") for _ in range(50)), return_exceptions=True)
    assert sum(each == "wrong" for each in attempts) == 2
    await close_shared()


@pytest.mark.usefixtures("patient")
def test_a_response_that_is_dropped_frees_its_slot(redis_server: RedisServer) -> None:
    """As a middleware does that answers something else: nobody closes it."""
    app = WsgiMiddleware(lambda environ, start: [start("200 OK", []), b""][1:], "1 concurrent", counters=redis_server.url)

    def status() -> tuple[str, object]:
        statuses: list[str] = []
        body = app(create_environ("/"), lambda text, headers, exc_info=None: statuses.append(text))
        return statuses[0], body

    first, body = status()
    assert (first, status()[0]) == ("200 OK", "429 Too Many Requests")
    del body
    wait_until(lambda: status()[0] == "200 OK")
