"""A change is in force within a second, on every instance and worker, under load, whatever happens to the messages.

Real `tidegate serve` processes on PostgreSQL with Redis, on PostgreSQL alone (LISTEN and NOTIFY) and on SQLite (polling).
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psycopg
import pytest

from tests.moments import PATIENCE_S
from tests.servers.postgres import PostgresServer
from tests.servers.redis_server import RedisServer
from tests.servers.tcp_proxy import TcpProxy
from tidegate.catalog.sql.postgres_channel import PostgresChannel
from tidegate.counters.redis.channel import CATALOG, RedisChannel
from tidegate.counters.redis.store import RedisCounters
from tidegate.policy.key_format import make_api_key

TOKEN = "0123456789abcdef-of-a-test"
IN_FORCE_S = PATIENCE_S
"""The bound of these tests. A change applies within a second on idle cores, as `report` prints. If nothing announced or polled
it, an entry would serve on for an hour (`ENTRY_S`)."""
ENTRY_S = 3600
"""How long entries of both caches live where a test does not say."""
POLL_S = 0.5
"""What `catalog.poll_s` is where a test does not say."""
LINES = 6
"""Connections to each instance; more where it has several workers, so that each of them has some."""
PAUSE_S = 0.03
FILED = "demo-filed-key-0001"
POLICY = """\
[[tiers]]
name = "filed"
  [[tiers.rules]]
  endpoint = "/api/*"
  limits = ["{limit}/day"]
[[api_keys]]
key = "demo-filed-key-0001"
tier = "filed"
"""


class Answer(NamedTuple):
    """What a check was answered.

    Args:
        sent: when it was sent, s on the clock of the wall.
        came: when the answer came.
        status: of HTTP.
        told: the body.
    """

    sent: float
    came: float
    status: int
    told: dict[str, Any]

    @property
    def code(self) -> str:
        """Of the error; empty for none."""
        return str(self.told.get("error", {}).get("code", ""))


class Line:
    """One connection to an instance that stays; it is made anew where it is closed."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def check(self, body: dict[str, Any]) -> Answer:
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        raw = json.dumps(body).encode()
        sent = time.time()
        writer.write(b"POST /v1/check HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(raw), raw))
        head = await reader.readuntil(b"\r\n\r\n")
        told = await reader.readexactly(int(re.search(rb"content-length: (\d+)", head)[1]))  # type: ignore[index]
        return Answer(sent, time.time(), int(head[9:12]), json.loads(told))

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()


class Load:
    """Checks of some callers on all instances, a few hundred a second, as long as the context lasts.

    Args:
        checks: name → body.
    """

    def __init__(self, servers: Sequence[Any], **checks: dict[str, Any]) -> None:
        self.answers: dict[str, list[list[Answer]]] = {name: [] for name in checks}
        self._checks = checks
        self._lines = [
            Line(server.port)
            for server in servers
            for _ in range(LINES * int(server.environment.get("TIDEGATE_SERVER__WORKERS", "1")))
        ]
        self._settled: list[tuple[str, float, Callable[[Answer], bool]]] = []

    async def __aenter__(self) -> Load:
        self._tasks = [asyncio.create_task(self._ask(line)) for line in self._lines]
        await self.answered(*self._checks)
        return self

    async def __aexit__(self, kind: Any, *_: Any) -> None:
        for task in self._tasks:
            task.cancel()
        ended = await asyncio.gather(*self._tasks, return_exceptions=True)
        for line in self._lines:
            line.close()
        if kind is None:
            assert [error for error in ended if not isinstance(error, asyncio.CancelledError)] == []
            for name, moment, wanted in self._settled:
                back = [answer for place in self.answers[name] for answer in place if answer.sent > moment and not wanted(answer)]
                assert back == [], f"{name} went back"

    async def _ask(self, line: Line) -> None:
        own: dict[str, list[Answer]] = {}
        for name, places in self.answers.items():
            own[name] = []
            places.append(own[name])
        while True:
            for name, body in self._checks.items():
                own[name].append(await line.check(body))
                await asyncio.sleep(PAUSE_S)

    async def answered(self, *names: str) -> None:
        """Wait until every line has had an answer to a check sent from now on, of each name."""
        now = time.time()
        async with asyncio.timeout(PATIENCE_S):
            for name in names:
                while len(self.answers[name]) < len(self._lines) or not all(
                    place and place[-1].sent > now for place in self.answers[name]
                ):
                    await asyncio.sleep(0.005)

    async def in_force(self, name: str, since: float, wanted: Callable[[Answer], bool]) -> float:
        """Wait until every line is answered as wanted; from then on, it has to stay so.

        Returns:
            How long after a moment the last check was sent that was answered otherwise, s; 0 for none.
        """
        async with asyncio.timeout(PATIENCE_S):
            while not all(place and place[-1].sent > since and wanted(place[-1]) for place in self.answers[name]):
                await asyncio.sleep(0.005)
        others = [
            answer.sent - since for place in self.answers[name] for answer in place if answer.sent > since and not wanted(answer)
        ]
        took_s = max(others, default=0.0)
        self._settled.append((name, since + took_s, wanted))
        return took_s


def refused(answer: Answer) -> bool:
    return (answer.status, answer.code) == (403, "API_KEY_REVOKED")


def passed(answer: Answer) -> bool:
    return answer.status == 200


class Admin:
    """The control plane of an instance."""

    def __init__(self, server: Any) -> None:
        self._http = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{server.admin_port}/admin/v1",
            headers={"Authorization": f"Bearer {TOKEN}", "If-Match": "*"},
            timeout=PATIENCE_S,
        )

    async def ask(self, method: str, path: str, **given: Any) -> dict[str, Any]:
        answer = await self._http.request(method, path, json=given)
        assert answer.status_code in (200, 201), answer.text
        return dict(answer.json())

    async def remove(self, path: str) -> None:
        answer = await self._http.request("DELETE", path)
        assert answer.status_code == 204, answer.text

    async def key(self, **fields: Any) -> dict[str, Any]:
        return await self.ask("POST", "/api-keys", **{"tier": "free", **fields})

    async def revoke(self, key: dict[str, Any]) -> float:
        """Returns the moment of the answer."""
        await self.ask("POST", f"/api-keys/{key['id']}/revoke", reason="over")
        return time.time()

    async def close(self) -> None:
        await self._http.aclose()


Start = Callable[..., Awaitable[list[Any]]]


@pytest.fixture
async def start(serve: Callable[..., Any]) -> AsyncIterator[Start]:
    """Starts instances with these variables each, all at the same time, and makes the tier `free` with a rule."""
    admins: list[Admin] = []

    async def started(*environments: dict[str, str]) -> list[Any]:
        # Nobody reads the log while the test runs: at the level of errors it never fills the pipe.
        usual = {
            "TIDEGATE_ADMIN__TOKEN": TOKEN,
            "TIDEGATE_SERVER__LOG_LEVEL": "error",
            "TIDEGATE_COUNTERS__TIMEOUT_MS": "500",
            "TIDEGATE_CACHE__L1_TTL_S": str(ENTRY_S),
            "TIDEGATE_CACHE__L2_TTL_S": str(ENTRY_S),
        }
        servers = [serve(wait=False, **{**usual, **environment}) for environment in environments]
        await asyncio.gather(*(asyncio.to_thread(server.wait_ready) for server in servers))
        for server in servers:
            server.admin = Admin(server)
            admins.append(server.admin)
        await servers[0].admin.ask("POST", "/tiers", name="free", limits=["1000000/day"])
        servers[0].rule = await servers[0].admin.ask(
            "POST", "/rate-limit-rules", tier="free", endpoint="/api/*", limits=["900000/day"]
        )
        return servers

    yield started
    for admin in admins:
        await admin.close()


def body(key: dict[str, Any] | str, path: str = "/api/a") -> dict[str, Any]:
    return {"path": path, "api_key": key if isinstance(key, str) else key["api_key"]}


def metric(text: str, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    assert found, f"{name} is not in:\n{text}"
    return float(found.group(1))


async def metric_of(server: Any, name: str) -> float:
    async with httpx.AsyncClient() as http:
        return metric((await http.get(f"{server.url}/metrics", timeout=PATIENCE_S)).text, name)


async def get(server: Any, path: str) -> httpx.Response:
    async with httpx.AsyncClient() as http:
        return await http.get(f"{server.url}{path}", timeout=PATIENCE_S)


async def until(holds: Callable[[], Awaitable[bool]], within_s: float = PATIENCE_S) -> float:
    """Waits until something holds; says how long that took, s."""
    began = time.monotonic()
    while not await holds():
        assert time.monotonic() - began < within_s
        await asyncio.sleep(0.02)
    return time.monotonic() - began


def tidegate(server: Any, *arguments: str, **environment: str) -> None:
    ended = server.run(*arguments, **environment)
    assert ended.returncode == 0, ended.stderr


def report(what: str, took: dict[str, float]) -> None:
    print(f"\n{what}: " + ", ".join(f"{name} {took_s * 1e3:.0f} ms" for name, took_s in took.items()))


# Every change.


@pytest.mark.parametrize("stack", ["postgresql and redis", "postgresql", "sqlite"])
async def test_every_change_is_active_everywhere(
    stack: str, request: pytest.FixtureRequest, start: Start, tmp_path: Path
) -> None:
    environment: dict[str, str] = {}
    if stack != "sqlite":
        environment["TIDEGATE_CATALOG__URL"] = request.getfixturevalue("postgres_url")
    if "redis" in stack:
        environment["TIDEGATE_COUNTERS__URL"] = request.getfixturevalue("redis_server").url
    file = tmp_path / "policy.toml"
    file.write_text(POLICY.format(limit=800_000))
    several = {"TIDEGATE_SERVER__WORKERS": "2"} if "redis" in stack else {}
    servers = await start({**environment, "TIDEGATE_POLICY__FILE": str(file)}, {**environment, **several}, environment)
    admin, elsewhere = servers[0].admin, servers[2].admin
    by_api, by_command, unannounced, by_other, limited, moved = [await admin.key(name=f"n{number}") for number in range(6)]
    await admin.ask(
        "POST", "/rate-limit-rules", tier="free", name="users", endpoint="/users/*", subject="user", limits=["90/day"]
    )
    ended = await admin.ask("POST", "/tiers/free/overrides", rule="users", subject={"user": "43"}, limits=["70000/day"])
    took: dict[str, float] = {}
    async with Load(
        servers,
        overridden={**body(limited, "/users/a"), "attributes": {"user": "42"}, "cost": 0},
        override_removed={**body(limited, "/users/a"), "attributes": {"user": "43"}, "cost": 0},
        by_api=body(by_api),
        by_command=body(by_command),
        unannounced=body(unannounced),
        by_other=body(by_other),
        limited=body(limited),
        moved=body(moved),
        ruled=body(limited, "/new/a"),
        tiered=body(limited, "/other"),
        filed=body(FILED),
    ) as load:
        assert all(passed(answer) for places in load.answers.values() for place in places for answer in place)
        took["revoked"] = await load.in_force("by_api", await admin.revoke(by_api), refused)
        took["revoked elsewhere"] = await load.in_force("by_other", await elsewhere.revoke(by_other), refused)
        await asyncio.to_thread(tidegate, servers[0], "keys", "revoke", by_command["id"], "--reason", "over")
        took["revoked by command"] = await load.in_force("by_command", time.time(), refused)
        # By somebody who knows nothing of the Redis that the instances listen to.
        revoke = ("keys", "revoke", unannounced["id"], "--reason", "over")
        await asyncio.to_thread(tidegate, servers[0], *revoke, TIDEGATE_COUNTERS__URL="memory://")
        took["revoked unannounced"] = await load.in_force("unannounced", time.time(), refused)
        limits = {"limits": ["550000/day"], "overrides": []}
        await admin.ask("PUT", f"/api-keys/{moved['id']}/overrides", **limits)
        took["limit of a key"] = await load.in_force("moved", time.time(), lambda answer: answer.told.get("limit") == 550_000)
        await admin.ask("POST", "/tiers/free/overrides", rule="users", subject={"user": "42"}, limits=["80000/day"])
        since = time.time()
        took["override for a subject"] = await load.in_force("overridden", since, lambda answer: answer.told["limit"] == 80_000)
        assert {place[-1].told["limit"] for place in load.answers["override_removed"]} == {70_000}
        await elsewhere.remove(f"/tiers/free/overrides/{ended['id']}")
        since = time.time()
        took["override removed"] = await load.in_force("override_removed", since, lambda answer: answer.told["limit"] == 90)
        await admin.ask("PUT", "/tiers/free", limits=["650000/day"])
        took["limit of a tier"] = await load.in_force("tiered", time.time(), lambda answer: answer.told.get("limit") == 650_000)
        await elsewhere.ask("PATCH", f"/rate-limit-rules/{servers[0].rule['id']}", limits=["600000/day"])
        took["limit of a rule"] = await load.in_force("limited", time.time(), lambda answer: answer.told.get("limit") == 600_000)
        assert {place[-1].told["rule"] for place in load.answers["ruled"]} == {None}
        await admin.ask("POST", "/rate-limit-rules", tier="free", endpoint="/new/*", limits=["500000/day"])
        took["a rule more"] = await load.in_force("ruled", time.time(), lambda answer: answer.told.get("rule") == "/new/*")
        assert {place[-1].told["limit"] for place in load.answers["filed"]} == {800_000}
        file.write_text(POLICY.format(limit=400_000))
        file_s = await load.in_force("filed", time.time(), lambda answer: answer.told.get("limit") == 400_000)
        checks = sum(len(place) for places in load.answers.values() for place in places)
    report(f"{stack}, {checks} checks", {**took, "policy file": file_s})
    assert all(took_s < IN_FORCE_S for took_s in took.values()), took
    # There is no answer to measure from: one process looks at the file twice before it begins, which a busy machine stretches.
    assert file_s < IN_FORCE_S


# Lost messages.


async def test_messages_that_redis_loses_are_caught(
    start: Start, postgres_url: str, new_redis: Callable[..., RedisServer]
) -> None:
    redis = new_redis()
    environment = {"TIDEGATE_CATALOG__URL": postgres_url, "TIDEGATE_COUNTERS__URL": redis.url, "TIDEGATE_BREAKER__OPEN_S": "0.5"}
    async with TcpProxy(redis.port) as proxy:
        servers = await start(
            environment,
            {**environment, "TIDEGATE_SERVER__WORKERS": "2"},
            {**environment, "TIDEGATE_COUNTERS__URL": proxy.url, "TIDEGATE_COUNTERS__TIMEOUT_MS": "100"},
        )
        admin = servers[0].admin
        names = ("killed", "down", "back", "cut", "stalled")
        keys = {name: await admin.key(name=name) for name in names}
        took: dict[str, float] = {}
        listeners = 4

        async def all_listen() -> bool:
            return await asyncio.to_thread(_listeners, redis) == listeners

        async with Load(servers, **{name: body(key) for name, key in keys.items()}) as load:
            await until(all_listen)
            # All who listen are cut off, and come back by themselves.
            assert await asyncio.to_thread(redis.call, "CLIENT", "KILL", "TYPE", "pubsub") == listeners
            took["killed"] = await load.in_force("killed", await admin.revoke(keys["killed"]), refused)
            await until(all_listen)
            # Redis is gone, and with it counting: rules are decided locally meanwhile.
            await asyncio.to_thread(redis.kill)
            took["down"] = await load.in_force("down", await admin.revoke(keys["down"]), refused)
            await asyncio.to_thread(redis.start)
            # Some may be connected to it again, others not: least of all who is to announce.
            took["back"] = await load.in_force("back", await admin.revoke(keys["back"]), refused)
            await until(all_listen)
            # One instance is cut off from Redis.
            proxy.refuse = True
            proxy.drop_all()
            took["cut"] = await load.in_force("cut", await admin.revoke(keys["cut"]), refused)
            proxy.refuse = False
            await until(all_listen)
            # One instance is cut off, and nobody tells it.
            proxy.stall = True
            took["stalled"] = await load.in_force("stalled", await admin.revoke(keys["stalled"]), refused)
            proxy.stall = False
    report("messages lost on Redis", took)
    assert took["killed"] < IN_FORCE_S
    assert took["back"] < IN_FORCE_S
    assert took["down"] < IN_FORCE_S
    assert took["cut"] < IN_FORCE_S
    # Until its connection is found out, it relies on it.
    assert took["stalled"] < IN_FORCE_S


async def test_a_channel_that_comes_back_brings_what_was_missed(
    start: Start, postgres_url: str, new_redis: Callable[..., RedisServer]
) -> None:
    """Where nothing else does: this instance does not poll."""
    redis = new_redis()
    environment = {"TIDEGATE_CATALOG__URL": postgres_url, "TIDEGATE_COUNTERS__URL": redis.url}
    async with TcpProxy(redis.port) as proxy:
        alone = {"TIDEGATE_COUNTERS__URL": proxy.url, "TIDEGATE_CATALOG__POLL_S": "3600"}
        servers = await start(environment, {**environment, **alone})
        admin = servers[0].admin
        key = await admin.key()

        async def listen(count: int) -> bool:
            return await asyncio.to_thread(_listeners, redis) == count

        async with Load(servers[1:], key=body(key)) as load:
            await until(lambda: listen(2))
            proxy.refuse = True
            proxy.drop_all()
            await until(lambda: listen(1))
            # It looks once when it has lost its channel: only then is there something to miss.
            reconnecting = proxy.connections
            await until(lambda: _true(proxy.connections > reconnecting))
            revoked = await admin.revoke(key)
            await load.answered("key")
            assert {place[-1].status for place in load.answers["key"]} == {200}, "nobody has told it"
            proxy.refuse = False
            await until(lambda: listen(2))
            back = time.time()
            took_s = await load.in_force("key", back, refused)
    report(f"channel back {back - revoked:.2f} s after the change", {"in force": took_s})
    assert took_s < IN_FORCE_S


async def test_messages_that_postgres_loses_are_caught(start: Start, postgres_server: PostgresServer, postgres_url: str) -> None:
    servers = await start(*[{"TIDEGATE_CATALOG__URL": postgres_url}] * 3)
    admin = servers[0].admin
    database = postgres_url.rpartition("/")[2]
    listening = "FROM pg_stat_activity WHERE datname = %s AND (query LIKE 'LISTEN%%' OR query LIKE '%%pg_is_in_recovery%%')"

    def ask(what: str) -> list[Any]:
        return postgres_server.execute(f"SELECT {what} {listening} AND pid <> pg_backend_pid()", "postgres", [database])

    async def all_listen() -> bool:
        return len(await asyncio.to_thread(ask, "pid")) == 3

    keys = {name: await admin.key(name=name) for name in ("at once", "again", "all")}
    took: dict[str, float] = {}
    async with Load(servers, **{name: body(key) for name, key in keys.items()}) as load:
        for name in ("at once", "again"):
            await until(all_listen)
            assert await asyncio.to_thread(ask, "pg_terminate_backend(pid)") == [(True,)] * 3
            took[name] = await load.in_force(name, await admin.revoke(keys[name]), refused)
        # And every other connection with them.
        await until(all_listen)
        await asyncio.to_thread(
            postgres_server.execute,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s AND application_name = 'tidegate'",
            "postgres",
            [database],
        )
        took["all"] = await load.in_force("all", await admin.revoke(keys["all"]), refused)
    report("messages lost on PostgreSQL", took)
    assert all(took_s < IN_FORCE_S for took_s in took.values()), took


@pytest.mark.parametrize("kind", ["redis", "postgresql"])
async def test_a_channel_reports_when_it_is_lost_and_when_it_is_back(kind: str, request: pytest.FixtureRequest) -> None:
    """Whoever relies on it would else go on doing so for seconds."""
    redis: RedisServer = request.getfixturevalue("redis_server")
    postgres: PostgresServer = request.getfixturevalue("postgres_server")
    heard: list[bool] = []
    channel: RedisChannel | PostgresChannel
    async with TcpProxy(redis.port if kind == "redis" else postgres.port) as proxy:
        store = RedisCounters(proxy.url, 0.5)
        channel = (
            RedisChannel(store, "test:channel")
            if kind == "redis"
            else PostgresChannel(f"postgresql://postgres@127.0.0.1:{proxy.port}/tidegate", 2.0)
        )
        listening = asyncio.create_task(channel.listen(lambda: heard.append(channel.connected)))
        try:
            await until(lambda: _true(heard[-1:] == [True]))
            for _ in range(3):
                heard.clear()
                proxy.drop_all()
                await until(lambda: _true(len(heard) >= 2))
                assert heard[:2] == [False, True]
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
            await store.close()


# A part is away.


async def test_without_redis_a_cold_instance_asks_the_database(
    start: Start, postgres_url: str, new_redis: Callable[..., RedisServer]
) -> None:
    redis = new_redis()
    (server,) = await start(
        {
            "TIDEGATE_CATALOG__URL": postgres_url,
            "TIDEGATE_COUNTERS__URL": redis.url,
            "TIDEGATE_COUNTERS__TIMEOUT_MS": "50",
            "TIDEGATE_CATALOG__POOL_SIZE": "3",
        }
    )
    keys = [await server.admin.key(name=f"{number}") for number in range(40)]
    redis.pause()
    asked = await metric_of(server, "rate_limiter_database_queries_total")
    lines = [Line(server.port) for _ in keys]
    before = time.time()
    answers = await asyncio.gather(*(line.check(body(key)) for line, key in zip(lines, keys, strict=True)))
    slowest_s = max(answer.came for answer in answers) - before
    for line in lines:
        line.close()
    assert {answer.status for answer in answers} == {200}
    assert all(answer.told["degraded"] for answer in answers)
    queries = await metric_of(server, "rate_limiter_database_queries_total") - asked
    assert 1 <= queries <= 41
    assert await metric_of(server, "rate_limiter_shared_cache_errors_total") >= 1
    print(f"\nRedis hangs: {len(keys)} keys never seen answered within {slowest_s * 1e3:.0f} ms by {queries:.0f} queries")
    assert slowest_s < IN_FORCE_S
    redis.resume()


async def test_the_database_is_unavailable_and_comes_back(start: Start, new_postgres: Callable[..., PostgresServer]) -> None:
    postgres = new_postgres()
    servers = await start(
        *[
            {
                "TIDEGATE_CATALOG__URL": postgres.url(),
                "TIDEGATE_CACHE__L1_TTL_S": "0.5",
                "TIDEGATE_CATALOG__TIMEOUT_S": "1",
            }
        ]
        * 2
    )
    admin = servers[0].admin
    cached, revoked, later = [await admin.key(name=f"{number}") for number in range(3)]
    unknown = make_api_key()
    async with Load(servers, cached=body(cached), revoked=body(revoked), later=body(later)) as load:
        await load.in_force("revoked", await admin.revoke(revoked), refused)
        await asyncio.to_thread(postgres.stop)
        down = time.time()
        stale = [await metric_of(server, "rate_limiter_cache_stale_total") for server in servers]

        async def grows() -> bool:
            now = [await metric_of(server, "rate_limiter_cache_stale_total") for server in servers]
            return all(after > before + 20 for after, before in zip(now, stale, strict=True))

        await until(grows)
        for server in servers:
            line = Line(server.port)
            answer = await line.check(body(unknown))
            line.close()
            assert (answer.status, answer.code) == (503, "CATALOG_UNAVAILABLE")
            assert "catalog" in answer.told["error"]["message"], "what it is, not where it is"
            health = await get(server, "/health")
            assert (health.status_code, health.json()["components"]["database"]["status"]) == (503, "unhealthy")
            assert (await get(server, "/readyz")).status_code == 200, "who can decide stays in the load balancer"
        # Longer than an entry lives.
        await until(lambda: _true(time.time() > down + 1.5))
        await load.answered("cached", "revoked")
        assert all(passed(answer) for place in load.answers["cached"] for answer in place if answer.sent > down)
        with pytest.raises(AssertionError, match="CATALOG_UNAVAILABLE"):
            await admin.ask("POST", f"/api-keys/{later['id']}/revoke", reason="over")
        await asyncio.to_thread(postgres.start)
        back = time.monotonic()

        async def is_well() -> bool:
            health = [await get(server, "/health") for server in servers]
            return all(each.status_code == 200 for each in health)

        await until(is_well)
        line = Line(servers[1].port)
        assert (await line.check(body(unknown))).status == 401
        line.close()
        well_s = time.monotonic() - back
        took_s = await load.in_force("later", await admin.revoke(later), refused)

        async def is_fresh() -> bool:
            first = [await metric_of(server, "rate_limiter_cache_stale_total") for server in servers]
            await load.answered("cached", "revoked", "later")
            return first == [await metric_of(server, "rate_limiter_cache_stale_total") for server in servers]

        await until(is_fresh)
        fresh_s = time.monotonic() - back
        assert all(passed(answer) for place in load.answers["cached"] for answer in place)
    report("database back", {"well": well_s, "nothing stale": fresh_s, "revoked": took_s})
    assert took_s < IN_FORCE_S


# Races.


async def test_keys_that_end_while_they_are_checked(start: Start, postgres_url: str) -> None:
    servers = await start(*[{"TIDEGATE_CATALOG__URL": postgres_url}] * 2)
    admin = servers[0].admin
    key = await admin.key(name="revoked")
    grain_s = 0.05
    ends = time.time() + 3
    moment = datetime.datetime.fromtimestamp(ends, datetime.UTC).isoformat()
    expiring = await admin.key(name="expires", expires_at=moment)
    answers: dict[str, list[Answer]] = {"revoked": [], "expires": []}
    over = asyncio.Event()

    async def race(server: Any) -> None:
        line = Line(server.port)
        while not over.is_set():
            for name, body_of in (("revoked", body(key)), ("expires", body(expiring))):
                answers[name].append(await line.check(body_of))
        line.close()

    tasks = [asyncio.create_task(race(servers[number % 2])) for number in range(8)]
    await until(lambda: _true(len(answers["revoked"]) > 200))
    begun = time.time()
    revoked = await admin.revoke(key)

    def is_over() -> bool:
        late_ones = sum(answer.sent > ends + grain_s for answer in answers["expires"])
        return late_ones > 200 and not any(passed(answer) for answer in answers["revoked"][-200:])

    await until(lambda: _true(is_over()))
    over.set()
    await asyncio.gather(*tasks)

    late = [answer.sent - revoked for answer in answers["revoked"] if passed(answer) and answer.sent > revoked]
    early = [answer for answer in answers["revoked"] if answer.came < begun]
    assert all(passed(answer) for answer in early)
    assert {answer.code for answer in answers["revoked"] if not passed(answer)} == {"API_KEY_REVOKED"}
    assert max(late, default=0.0) < IN_FORCE_S
    before = [answer for answer in answers["expires"] if answer.came < ends - grain_s]
    after = [answer for answer in answers["expires"] if answer.sent > ends + grain_s]
    assert before
    assert len(after) > 200
    assert all(passed(answer) for answer in before)
    assert {(answer.status, answer.code) for answer in after} == {(403, "API_KEY_EXPIRED")}
    print(
        f"\n{len(answers['revoked'])} checks of a key that is revoked: the last one passed {max(late, default=0.0) * 1e3:.0f} ms "
        f"after the answer"
    )


async def test_a_stampede_is_one_query(start: Start, postgres_url: str) -> None:
    """A thousand checks of one key arrive at a cold instance before the database has answered the first."""
    stampede = 1000
    (server,) = await start({"TIDEGATE_CATALOG__URL": postgres_url, "TIDEGATE_CATALOG__TIMEOUT_S": "60"})
    key, other = [await server.admin.key(name=name) for name in ("key", "other")]
    lines = [Line(server.port) for _ in range(stampede)]
    # The tier is known: what is counted is the key.
    assert (await lines[0].check(body(other))).status == 200
    queries = await metric_of(server, "rate_limiter_database_queries_total")
    async with await psycopg.AsyncConnection.connect(postgres_url) as holding:
        await holding.execute("LOCK TABLE api_keys IN ACCESS EXCLUSIVE MODE")
        asked = [asyncio.create_task(line.check(body(key))) for line in lines]

        async def all_wait() -> bool:
            return await metric_of(server, "rate_limiter_in_flight") > stampede

        await until(all_wait)
    answers = await asyncio.gather(*asked)
    for line in lines:
        line.close()
    assert {answer.status for answer in answers} == {200}
    assert await metric_of(server, "rate_limiter_database_queries_total") - queries == 1


def _listeners(redis: RedisServer) -> int:
    with contextlib.suppress(OSError):
        return int(redis.call("PUBSUB", "NUMSUB", CATALOG)[1])
    return -1


async def _true(value: bool) -> bool:
    return value
