"""The connection against everything that can stand between it and Redis: delays, cuts, split and forged replies, refusals."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable

import pytest

from tests.moments import PATIENCE_S, until
from tests.redis_deadline import NEVER_S, set_deadline
from tests.servers.redis_server import RedisServer
from tests.servers.tcp_proxy import TcpProxy
from tidegate.counters import Charge, ChargeOutcome
from tidegate.counters.redis.store import RedisCounters
from tidegate.decision import Decision
from tidegate.errors import StoreUnavailable
from tidegate.policy.limits import Algorithm, Limit, LimitSet

NAMES = iter(range(1_000_000))


def limit_set(text: str = "1000/hour") -> LimitSet:
    return LimitSet(f"connection:{next(NAMES)}", Algorithm.FIXED_WINDOW, [Limit.parse(text)])


async def ask(store: RedisCounters, limits: LimitSet, subject: str, cost: int = 1) -> ChargeOutcome:
    try:
        return await store.charge_one(Charge(((limits, subject),), cost))
    except StoreUnavailable as error:
        return error


async def must(store: RedisCounters, limits: LimitSet, subject: str, cost: int = 1) -> Decision:
    outcome = await ask(store, limits, subject, cost)
    assert isinstance(outcome, Decision), outcome
    return outcome


async def back(store: RedisCounters) -> None:
    """Until it is connected and answers."""
    limits, deadline = limit_set(), time.monotonic() + PATIENCE_S
    while isinstance(await ask(store, limits, "back"), StoreUnavailable):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


def reason(outcome: ChargeOutcome) -> object:
    assert isinstance(outcome, StoreUnavailable), outcome
    return outcome.details["reason"]


async def test_replies_split_byte_by_byte_are_understood(redis_server: RedisServer) -> None:
    async with TcpProxy(redis_server.port) as proxy:
        proxy.split = True
        store = RedisCounters(f"redis://127.0.0.1:{proxy.port}", timeout_s=NEVER_S)
        await store.start()
        limits = limit_set("50/hour")
        answers = await asyncio.gather(*(must(store, limits, "s") for _ in range(100)))
        assert sum(answer.allowed for answer in answers) == 50
        await store.close()


async def test_a_reply_after_its_deadline_is_discarded_and_the_others_are_not_shifted(redis_server: RedisServer) -> None:
    async with TcpProxy(redis_server.port) as proxy:
        store = RedisCounters(f"redis://127.0.0.1:{proxy.port}", timeout_s=NEVER_S)
        await store.start()
        sets = [limit_set(f"{100 + number}/hour") for number in range(20)]
        await must(store, limit_set(), "s")
        # Each limit says in its answer which question it was.
        proxy.stall = True
        late = [asyncio.ensure_future(ask(store, limits, "s")) for limits in sets[:10]]
        set_deadline(store, 0.2)
        assert {reason(outcome) for outcome in await asyncio.gather(*late)} == {"timeout"}
        # Those that were given up are in front of these, and are answered first.
        set_deadline(store, NEVER_S)
        (connection,) = store.connections()
        in_time = [asyncio.ensure_future(ask(store, limits, "s")) for limits in sets[10:]]
        await until(lambda: connection.in_flight >= 20)
        proxy.stall = False
        answers = await asyncio.gather(*in_time)
        assert [answer.remaining for answer in answers if isinstance(answer, Decision)] == [109 + number for number in range(10)]
        for number, limits in enumerate(sets):
            peek = await must(store, limits, "s", cost=0)
            assert (peek.limit, peek.remaining) == (100 + number, 99 + number), "the late ones were charged by Redis"
        await store.close()


async def test_a_connection_cut_in_the_middle_of_a_reply(redis_server: RedisServer) -> None:
    async with TcpProxy(redis_server.port) as proxy:
        store = RedisCounters(f"redis://127.0.0.1:{proxy.port}", timeout_s=NEVER_S)
        await store.start()
        limits = limit_set()
        await must(store, limits, "s")
        for cut in (1, 7, 40, 100):
            proxy.cut_after = cut
            async with asyncio.timeout(PATIENCE_S):
                outcomes = await asyncio.gather(*(ask(store, limits, "s") for _ in range(20)))
            failed = [outcome for outcome in outcomes if isinstance(outcome, StoreUnavailable)]
            assert failed
            assert {reason(outcome) for outcome in failed} == {"disconnected"}
            # While it is known to be away, nobody waits: not for the deadline, which is ten times as far.
            async with asyncio.timeout(PATIENCE_S):
                assert reason(await ask(store, limits, "s")) == "disconnected"
            await back(store)
        await store.close()


async def test_a_delay_beyond_the_deadline_is_a_timeout_and_a_stall_is_disconnected(redis_server: RedisServer) -> None:
    async with TcpProxy(redis_server.port) as proxy:
        store = RedisCounters(f"redis://127.0.0.1:{proxy.port}", timeout_s=0.1)
        await store.start()
        set_deadline(store, NEVER_S)
        limits = limit_set()
        await must(store, limits, "s")
        set_deadline(store, 0.1)
        proxy.stall = True
        before = proxy.connections
        seen: list[object] = []
        async with asyncio.timeout(PATIENCE_S):
            while "disconnected" not in seen:
                seen.append(reason(await ask(store, limits, "s")))
        assert seen[0] == "timeout", "found by deadline first, then given up as hung"
        assert set(seen) == {"timeout", "disconnected"}
        proxy.stall = False
        set_deadline(store, NEVER_S)
        await back(store)
        assert proxy.connections > before
        await store.close()


async def test_open_questions_are_bounded(redis_server: RedisServer) -> None:
    async with TcpProxy(redis_server.port) as proxy:
        store = RedisCounters(f"redis://127.0.0.1:{proxy.port}", timeout_s=NEVER_S, max_in_flight=50)
        await store.start()
        limits = limit_set()
        await must(store, limits, "s")
        proxy.stall = True
        asked = [asyncio.ensure_future(ask(store, limits, "s")) for _ in range(80)]
        await until(lambda: sum(task.done() for task in asked) >= 30)
        done = [task.result() for task in asked if task.done()]
        assert len(done) == 30
        assert {reason(outcome) for outcome in done} == {"overload"}
        assert isinstance(done[0], StoreUnavailable)
        assert "max_in_flight" in done[0].message
        set_deadline(store, 0.2)
        await asyncio.gather(*asked)
        # Those given up still have their places: the server may yet answer them.
        assert reason(await ask(store, limits, "s")) == "overload"
        proxy.stall = False
        set_deadline(store, NEVER_S)
        await back(store)
        await store.close()


@pytest.mark.parametrize("seed", range(12))
async def test_forged_replies_never_hang_and_never_answer_the_wrong_question(redis_server: RedisServer, seed: int) -> None:
    rng = random.Random(seed)
    kinds: list[Callable[[bytes], bytes]] = [
        lambda piece: bytes(rng.randrange(256) for _ in range(len(piece))),
        lambda piece: piece[: len(piece) // 2],
        lambda piece: piece + b":1\r\n",
        lambda piece: b"*5\r\n:1\r\n:2\r\n:3\r\n:4\r\n$-1\r\n",
        lambda piece: b"*3\r\n:1\r\n:2\r\n:3\r\n",
        lambda piece: b"-MOVED banana\r\n",
        lambda piece: b"-ASK 1 nowhere:x\r\n",
        lambda piece: b"-" + bytes(rng.choice(b"ABC ") for _ in range(12)) + b"\r\n",
        # hiredis makes room for what is announced: 80 MB here.
        lambda piece: b"*10000000\r\n",
        lambda piece: b"$5\r\nhello\r\n",
        lambda piece: b">2\r\n+message\r\n+x\r\n" + piece,
        lambda piece: b"_\r\n",
    ]
    async with TcpProxy(redis_server.port) as proxy:
        store = RedisCounters(f"redis://127.0.0.1:{proxy.port}", timeout_s=0.2)
        await store.start()
        limits = limit_set()
        await must(store, limits, "s")
        forge = kinds[seed]
        proxy.rewrite = lambda piece: forge(piece) if rng.random() < 0.7 else piece
        for _ in range(6):
            async with asyncio.timeout(PATIENCE_S):
                outcomes = await asyncio.gather(*(ask(store, limits, "s", cost=number) for number in range(8)))
            # Whatever is taken for an answer is one that the script gives.
            assert all(
                isinstance(outcome, StoreUnavailable) or (outcome.limit == 1000 and 0 <= (outcome.remaining or 0) <= 1000)
                for outcome in outcomes
            )
            await asyncio.sleep(0.05)
        proxy.rewrite = None
        await back(store)
        sets = [limit_set(f"{100 + number}/hour") for number in range(20)]
        answers = await asyncio.gather(*(must(store, each, "s") for each in sets))
        assert [answer.limit for answer in answers] == [100 + number for number in range(20)]
        await store.close()


async def test_passwords_users_and_databases(new_redis: Callable[..., RedisServer]) -> None:
    server = new_redis(options={"requirepass": "s3cret"})
    limits = limit_set()
    for wrong in (server_url(server), server_url(server, ":wrong@"), server_url(server, "nobody:s3cret@")):
        store = RedisCounters(wrong, timeout_s=1)
        await store.start()
        outcome = await ask(store, limits, "s")
        assert reason(outcome) == "disconnected"
        assert isinstance(outcome, StoreUnavailable)
        assert "refused the connection" in outcome.message
        assert "s3cret" not in outcome.message
        await store.close()
    assert server.call("ACL", "SETUSER", "gate", "on", ">pw", "~tg:*", "+@all") in (b"OK", "OK")
    for right in (server_url(server, ":s3cret@"), server_url(server, "gate:pw@"), server_url(server, ":s3cret@") + "/3"):
        store = RedisCounters(right, timeout_s=1, name="a-name")
        await store.start()
        assert (await must(store, limits, "s")).allowed
        assert "name=a-name" in str(server.call("CLIENT", "LIST"))
        await store.close()
    assert "db3:keys=1" in str(server.call("INFO", "keyspace"))


def server_url(server: RedisServer, credentials: str = "") -> str:
    return f"redis://{credentials}127.0.0.1:{server.port}"


async def test_tls_asks_for_the_right_authority_and_a_certificate(new_redis: Callable[..., RedisServer]) -> None:
    server = new_redis(tls=True, client_certificates="required")
    assert server.authority is not None
    stranger = server.authority.unrelated()
    authority, limits = server.authority, limit_set()
    right = RedisCounters(server.tls_url, timeout_s=2)
    await right.start()
    assert (await must(right, limits, "s")).allowed
    await right.close()
    base = server.tls_url.partition("?")[0]
    for wrong in (
        f"{base}?ca={stranger.ca}&cert={authority.client_cert}&key={authority.client_key}",
        f"{base}?ca={authority.ca}&cert={stranger.client_cert}&key={stranger.client_key}",
        f"{base}?ca={authority.ca}",
        base,
    ):
        store = RedisCounters(wrong, timeout_s=1)
        await store.start()
        assert reason(await ask(store, limits, "s")) == "disconnected"
        await store.close()


async def test_a_url_of_another_topology_names_it(redis_server: RedisServer, redis_cluster: object) -> None:
    limits = limit_set()
    for url, remedy in (
        (redis_server.url.replace("redis://", "redis+cluster://"), "redis:// for redis+cluster://"),
        (redis_cluster.url.replace("redis+cluster://", "redis://").split(",")[0], "redis+cluster://"),  # type: ignore[attr-defined]
    ):
        store = RedisCounters(url, timeout_s=0.5)
        await store.start()
        outcome = await ask(store, limits, "s")
        assert isinstance(outcome, StoreUnavailable)
        with pytest.raises(StoreUnavailable):
            await store.ping()
        connections = store.connections()
        told = outcome.message + "".join(connection.down_reason for connection in connections)
        assert remedy in told or not connections
        await store.close()
