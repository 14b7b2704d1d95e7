"""Leases of limiters inside programs, on real Redis: never above the limit, whatever forks, ends or runs two event loops."""

from __future__ import annotations

import asyncio
import secrets
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
from fastapi import Depends, FastAPI

from tests.moments import wait_until
from tests.servers.redis_server import RedisServer
from tidegate import Gate, Limiter, RateLimitExceeded, RateLimitMiddleware, SettingsError, SyncLimiter, limit
from tidegate.counters.blocking_leases import BlockingLeases
from tidegate.counters.blocking_redis import BlockingRedis
from tidegate.counters.factory import LEASES_VARIABLE
from tidegate.counters.guarded import GuardedCounters
from tidegate.counters.process_leases import ProcessLeases
from tidegate.doors.stores import TIMEOUT_VARIABLE, close_shared, shared_store

with warnings.catch_warnings():
    # Starlette 1.x prefers a successor of httpx.
    warnings.simplefilter("ignore")
    from starlette.testclient import TestClient

LIMIT = 400


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TIMEOUT_VARIABLE, "20000")


def used(url: str, name: str, limits: str = f"{LIMIT}/day") -> int:
    """What the store has counted, leased units among it."""
    with SyncLimiter(limits, counters=url, name=name, leases=False) as other:
        return LIMIT - (other.check("s", 0).remaining or 0)


def leased(url: str, **arguments: Any) -> tuple[SyncLimiter, BlockingLeases]:
    checked = SyncLimiter(f"{LIMIT}/day", counters=url, **arguments)
    assert isinstance(checked.counters, BlockingLeases)
    return checked, checked.counters


def check_until_leased(checked: SyncLimiter, store: BlockingLeases) -> int:
    """Returns how many checks passed."""
    passed = 0
    while store.table.units < 2:
        passed += checked.check("s").allowed
        assert passed < LIMIT
    return passed


def test_most_checks_need_no_call_and_one_process_gets_exactly_the_limit(redis_server: RedisServer) -> None:
    checked, store = leased(redis_server.url, name=secrets.token_hex(8))
    with checked:
        answers = [checked.check("s") for _ in range(LIMIT + 20)]
        assert [each.allowed for each in answers] == [True] * LIMIT + [False] * 20
        assert store.table.decisions > LIMIT / 2
        assert not any(each.degraded for each in answers)


@pytest.mark.parametrize("algorithm", ["fixed_window", "token_bucket", "sliding_log"])
def test_close_gives_the_units_back(redis_server: RedisServer, algorithm: str) -> None:
    name = secrets.token_hex(8)
    checked, store = leased(redis_server.url, name=name, algorithm=algorithm)
    with checked:
        passed = sum(checked.check("s").allowed for _ in range(40))
        assert bool(store.table.leased) is (algorithm != "sliding_log")
    assert store.table.units == 0
    with SyncLimiter(f"{LIMIT}/day", counters=redis_server.url, name=name, algorithm=algorithm, leases=False) as other:
        assert LIMIT - (other.check("s", 0).remaining or 0) == passed == 40


def test_units_that_are_not_used_go_back_beside_the_calls(redis_server: RedisServer) -> None:
    name = secrets.token_hex(8)
    checked, store = leased(redis_server.url, name=name)
    passed = check_until_leased(checked, store)
    assert used(redis_server.url, name) > passed
    wait_until(lambda: used(redis_server.url, name) == passed)
    wait_until(lambda: all(thread.name != "tidegate-leases" for thread in threading.enumerate()))
    assert check_until_leased(checked, store), "a thread begins again"
    checked.close()


def test_a_reset_elsewhere_ends_the_leases(redis_server: RedisServer) -> None:
    name = secrets.token_hex(8)
    checked, store = leased(redis_server.url, name=name)
    with checked, SyncLimiter(f"{LIMIT}/day", counters=redis_server.url, name=name, leases=False) as other:
        check_until_leased(checked, store)
        ended = store.table.leases.get(next(iter(store.table.leases)))
        other.reset("s")

        def is_gone() -> bool:
            checked.check("s")
            return ended not in store.table.leases.values()

        wait_until(is_gone)


def test_holds_and_places_come_from_the_store(redis_server: RedisServer) -> None:
    """Never from a lease; together with leases they admit exactly the limit."""
    name = secrets.token_hex(8)
    checked, store = leased(redis_server.url, name=name)
    with checked:
        passed = check_until_leased(checked, store)
        units = store.table.units
        with checked.hold("s", cost=50):
            assert checked.reserve("s", 7, at_most_s=0).allowed
        assert store.table.units == units
        assert checked.check("s", 0).remaining == LIMIT - passed - 57, "its own leased units are left to it"
        passed += sum(checked.check("s").allowed for _ in range(LIMIT))
    assert passed + 57 == LIMIT == used(redis_server.url, name)


PROGRAM = """
import os, signal, sys
from tidegate import SyncLimiter
limiter = SyncLimiter("400/day", counters={url!r}, name={name!r})
passed = 0
while limiter.counters.table.units < 2:
    passed += limiter.check("s").allowed
"""


@contextmanager
def program(text: str, warnings: str = "error") -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-W", warnings, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def output(text: str) -> str:
    with program(text) as process:
        out, errors = process.communicate(timeout=120)
    assert errors == ""
    return out


def test_the_end_of_a_script_gives_the_units_back(redis_server: RedisServer) -> None:
    name = secrets.token_hex(8)
    passed = int(output(PROGRAM.format(url=redis_server.url, name=name) + "print(passed)"))
    assert used(redis_server.url, name) == passed


def test_a_killed_process_loses_its_units_and_no_more(redis_server: RedisServer) -> None:
    name = secrets.token_hex(8)
    text = PROGRAM.format(url=redis_server.url, name=name)
    text += "print(passed, limiter.counters.table.units, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    passed, lost = map(int, output(text).split())
    assert used(redis_server.url, name) == passed + lost
    with SyncLimiter(f"{LIMIT}/day", counters=redis_server.url, name=name) as other:
        assert sum(other.check("s").allowed for _ in range(LIMIT)) == LIMIT - passed - lost


def test_a_forked_child_does_not_use_the_leases_of_its_parent(redis_server: RedisServer) -> None:
    """Both go on as if they had the units; `-W error`: no thread of ours is left beside the fork."""
    name = secrets.token_hex(8)
    text = PROGRAM.format(url=redis_server.url, name=name)
    text += """
child = os.fork()
first = limiter.counters.table.units
for _ in range(450):
    passed += limiter.check("s").allowed
if child == 0:
    os.write(1, f"{first} {passed}\\n".encode())
    os._exit(0)
os.waitpid(child, 0)
print(first, passed, flush=True)
limiter.close()
"""
    # What had passed before the fork is in both numbers.
    (there, child), (here, parent) = (map(int, line.split()) for line in output(text + "\n").splitlines())
    assert there == 0 < here
    before = int(output(PROGRAM.format(url=redis_server.url, name=secrets.token_hex(8)) + "print(passed)"))
    assert child + parent - before == LIMIT == used(redis_server.url, name)


def test_a_child_forked_inside_a_running_loop(redis_server: RedisServer) -> None:
    """Neither uses the connection, nor the leases, of the other."""
    name = secrets.token_hex(8)
    text = f"""
import asyncio, os
from tidegate import Limiter
limiter = Limiter("400/day", counters={redis_server.url!r}, name={name!r})

async def passed(times):
    return sum([(await limiter.check("s")).allowed for _ in range(times)])

async def main():
    before = 0
    while limiter.counters.table.units < 2:
        before += await passed(1)
    instance = limiter.counters.guarded.instance
    child = os.fork()
    if child == 0:
        asyncio.events._set_running_loop(None)
        units = limiter.counters.table.units
        there = asyncio.run(passed(450))
        os.write(1, f"{{there}} {{units}} {{instance != limiter.counters.guarded.instance}}\\n".encode())
        os._exit(0)
    os.waitpid(child, 0)
    print(before, await passed(450))
    await limiter.close()

asyncio.run(main())
"""
    with program(text, "ignore") as process:
        out, errors = process.communicate(timeout=120)
    there, units, renamed, before, here = out.split()
    assert (units, renamed) == ("0", "True"), errors
    assert int(there) + int(before) + int(here) == LIMIT, errors


def test_the_end_of_an_event_loop_gives_the_units_back(redis_server: RedisServer) -> None:
    name = secrets.token_hex(8)
    limiter = Limiter(f"{LIMIT}/day", counters=redis_server.url, name=name)
    store = limiter.counters
    assert isinstance(store, ProcessLeases)

    async def check() -> tuple[int, int]:
        passed = 0
        while store.table.units < 2:
            passed += (await limiter.check("s")).allowed
        return passed, store.table.units

    passed, units = asyncio.run(check())
    assert units
    assert store.table.units == 0
    # Written without waiting for the answer.
    wait_until(lambda: used(redis_server.url, name) == passed)
    again, _ = asyncio.run(check())
    wait_until(lambda: used(redis_server.url, name) == passed + again)


def test_two_event_loops_at_once(redis_server: RedisServer) -> None:
    """Each in a thread, with a limiter of its own; threads of `def` functions beside them: together exactly the limit."""
    name = secrets.token_hex(8)
    passed: list[int] = []
    denied = threading.Barrier(3)

    async def in_loop() -> None:
        async with Limiter(f"{LIMIT}/day", counters=redis_server.url, name=name) as limiter:
            own = 0
            while (await limiter.check("s")).allowed:
                own += 1
                await asyncio.sleep(0)
            passed.append(own)
            assert isinstance(limiter.counters, ProcessLeases)
            assert limiter.counters.table.units == 0, "a denial comes after the last leased unit"

    def in_thread() -> None:
        with SyncLimiter(f"{LIMIT}/day", counters=redis_server.url, name=name) as limiter:
            own = 0
            while limiter.check("s").allowed:
                own += 1
            passed.append(own)

    works: list[Callable[[], object]] = [in_thread, *(lambda: asyncio.run(in_loop()) for _ in range(2))]
    threads = [threading.Thread(target=lambda work=work: (denied.wait(), work())) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Units that came back at an end are for those who ask later.
    with SyncLimiter(f"{LIMIT}/day", counters=redis_server.url, name=name, leases=False) as last:
        assert sum(passed) + sum(last.check("s").allowed for _ in range(LIMIT)) == LIMIT


def test_threads_of_one_limiter_never_use_a_unit_twice(redis_server: RedisServer) -> None:
    checked, store = leased(redis_server.url, name=secrets.token_hex(8))
    passed: list[int] = []

    def check() -> None:
        passed.append(sum(checked.check("s").allowed for _ in range(LIMIT // 2)))

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=check) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert sum(passed) == LIMIT
    assert store.table.decisions
    checked.close()


def test_who_leases(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    url = redis_server.url
    assert isinstance(Limiter("9/day", counters=url).counters, ProcessLeases)
    assert isinstance(Limiter("9/day", counters=url, leases=False).counters, GuardedCounters)
    assert isinstance(SyncLimiter("9/day", counters=url, leases=False).counters, BlockingRedis)
    monkeypatch.setenv(LEASES_VARIABLE, "false")
    assert isinstance(Limiter("9/day", counters=url).counters, GuardedCounters)
    assert isinstance(SyncLimiter("9/day", counters=url).counters, BlockingRedis)
    assert isinstance(SyncLimiter("9/day", counters=url, leases=True).counters, BlockingLeases)
    monkeypatch.setenv(LEASES_VARIABLE, "perhaps")
    with pytest.raises(SettingsError, match="true or false"):
        Limiter("9/day", counters=url)


def test_gate_and_middleware_lease(redis_server: RedisServer, tmp_path: Any) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text('[[tiers]]\nname = "t"\n[anonymous]\ntier = "t"\n')
    assert isinstance(Gate.from_policy(policy, counters=redis_server.url).counters, ProcessLeases)
    assert isinstance(Gate.from_policy(policy, counters=redis_server.url, leases=False).counters, GuardedCounters)

    async def app(*_: Any) -> None: ...

    middleware = RateLimitMiddleware(app, policy=policy, counters=redis_server.url)
    assert isinstance(middleware.gate.counters, ProcessLeases)
    middleware = RateLimitMiddleware(app, policy=policy, counters=redis_server.url, leases=False)
    assert isinstance(middleware.gate.counters, GuardedCounters)


@pytest.mark.parametrize("with_lifespan", [True, False])
def test_a_test_client(redis_server: RedisServer, with_lifespan: bool) -> None:
    """Without `with`, it has an event loop for each request, which ends without closing anything."""
    scope = secrets.token_hex(8)
    app = FastAPI(dependencies=[Depends(limit("60/day", key=lambda: "all", scope=scope, counters=redis_server.url))])
    app.add_middleware(RateLimitMiddleware, default_limits=[])

    @app.get("/")
    def answer() -> str:
        return "passed"

    client = TestClient(app)
    with client if with_lifespan else nullcontext():
        answers = [client.get("/") for _ in range(70)]
    assert [each.status_code for each in answers] == [200] * 60 + [429] * 10
    left = [int(each.headers["x-ratelimit-remaining"]) for each in answers]
    assert all(said <= true for said, true in zip(left, [*range(59, -1, -1), *[0] * 10], strict=True)), "a lower bound"


@pytest.mark.parametrize("leases", [True, False])
def test_limited_functions_of_both_kinds(redis_server: RedisServer, leases: bool) -> None:
    scope = secrets.token_hex(8)

    @limit(f"{LIMIT}/day", key="user", scope=scope, counters=redis_server.url, leases=leases)
    def blocking(user: str) -> str:
        return user

    @limit(f"{LIMIT}/day", key="user", scope=scope, counters=redis_server.url, leases=leases)
    async def asynchronous(user: str) -> str:
        return user

    async def many() -> int:
        for passed in range(LIMIT):
            try:
                await asynchronous("a")
            except RateLimitExceeded:
                return passed
        return LIMIT

    store: Any = shared_store(redis_server.url)
    before = store._blocking.table.decisions
    for _ in range(100):
        blocking("a")
    assert (store._blocking.table.decisions > before) is leases

    async def rest() -> tuple[int, int]:
        passed = await many()
        decisions = store._shared.table.decisions
        await close_shared()
        return passed, decisions

    passed, decisions = asyncio.run(rest())
    assert bool(decisions) is leases
    # `close_shared` gave back what the other kind had leased.
    assert 100 + passed + sum(_passes(blocking) for _ in range(LIMIT)) == LIMIT
    asyncio.run(close_shared())


def _passes(function: Callable[[str], str]) -> bool:
    try:
        return function("a") == "a"
    except RateLimitExceeded:
        return False


def test_while_redis_is_away_a_lease_goes_on_and_then_counts_against_the_share(new_redis: Callable[..., RedisServer]) -> None:
    server = new_redis()
    checked, store = leased(server.url, name="outage")
    check_until_leased(checked, store)
    units = store.table.units
    server.kill()
    answers = [checked.check("s") for _ in range(units + 5)]
    assert [each.degraded for each in answers] == [False] * units + [True] * 5
    assert all(each.allowed for each in answers)
    # One instance's share is the limit; what its lease had used is part of it.
    rest = sum(checked.check("s").allowed for _ in range(LIMIT))
    assert units + 5 + rest <= LIMIT
    checked.close()
