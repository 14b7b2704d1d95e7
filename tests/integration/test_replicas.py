"""The catalog on a real PostgreSQL primary and two streaming replicas, which are killed, frozen, held back and promoted."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import psycopg
import pytest
from sqlalchemy import event, func, select, text
from sqlalchemy.exc import OperationalError

from tests.integration.catalog_keys import editor_of, listed_keys, make_key, revoke_key
from tests.moments import PATIENCE_S, until
from tests.servers.postgres import PostgresServer
from tests.servers.postgres_cluster import PostgresCluster, PostgresReplica
from tests.servers.redis_server import RedisServer
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.changes import ALL
from tidegate.catalog.shared import SharedCatalog
from tidegate.catalog.sql.catalog import SqlCatalog
from tidegate.catalog.sql.database import DatabaseOptions
from tidegate.catalog.sql.engine import open_engine
from tidegate.catalog.sql.tables import policy_state
from tidegate.counters.redis.store import RedisCounters
from tidegate.errors import CatalogUnavailable
from tidegate.policy.model import ApiKey, KeyStatus
from tidegate.policy.toml_reader import parse_policy

POLICY = """\
[[tiers]]
name = "free"
limits = ["1000/day"]
"""
SECRET = b"secret of this test's catalog"
CONNECT_S = 2.0
"""The least that libpq waits for a host."""
SLACK_S = PATIENCE_S
"""For the machine, which may be busy."""

Open = Callable[..., Awaitable[SqlCatalog]]


class Clock:
    """Seconds that a test adds to."""

    def __init__(self) -> None:
        self.added = 0.0
        self._began = time.monotonic()

    def __call__(self) -> float:
        return self._began + self.added


@pytest.fixture
async def open_catalog() -> AsyncIterator[Open]:
    """Opens the catalog of a cluster as an instance does, once all its servers have it."""
    opened: list[SqlCatalog] = []

    async def opener(cluster: PostgresCluster, name: str = "tidegate", **options: Any) -> SqlCatalog:
        replicas = tuple(cluster.replica_urls(name))
        catalog = await SqlCatalog.open(cluster.url(name), DatabaseOptions(**{"replicas": replicas, **options}))
        opened.append(catalog)
        await catalog.apply_policy(parse_policy(POLICY), "1")
        if catalog.database.replicas is not None:
            await asyncio.to_thread(cluster.wait_caught_up)
            await catalog.database.replicas.probe()
            assert {replica.ejected_because for replica in catalog.database.replicas.replicas} == {None}
        return catalog

    yield opener
    for catalog in opened:
        await catalog.close()


@pytest.fixture
def database(postgres_cluster: PostgresCluster) -> Iterator[str]:
    """The name of a database of its own on the cluster that tests share."""
    name = postgres_cluster.primary.new_database().rpartition("/")[2]
    postgres_cluster.wait_caught_up()
    yield name
    postgres_cluster.primary.drop_database(name)


class Asked:
    """Counts the statements that a catalog's servers get, those of the probes left out."""

    def __init__(self, catalog: SqlCatalog) -> None:
        self.counts: Counter[str] = Counter()
        replicas = catalog.database.replicas
        engines = {"primary": catalog.database._reader}
        engines |= {f"replica {at}": each.engine for at, each in enumerate(replicas.replicas if replicas else ())}
        for name, engine in engines.items():
            event.listen(engine.sync_engine, "before_cursor_execute", self._counter(name))

    def _counter(self, name: str) -> Callable[..., None]:
        def count(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
            if "api_keys" in statement:
                self.counts[name] += 1

        return count

    def take(self) -> dict[str, int]:
        taken, self.counts = dict(self.counts), Counter()
        return taken


@contextlib.asynccontextmanager
async def ticking() -> AsyncIterator[list[float]]:
    """Ticks every 10 ms; gives how much later than that each tick came, s."""
    late: list[float] = []

    async def tick() -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.01)
            late.append(time.monotonic() - before - 0.01)

    task = asyncio.create_task(tick())
    try:
        yield late
    finally:
        task.cancel()


async def timed(work: Awaitable[Any]) -> tuple[float, Any]:
    """What it gave or raised, and how long it took, s."""
    before = time.monotonic()
    try:
        found: Any = await work
    except CatalogUnavailable as error:
        found = error
    return time.monotonic() - before, found


def replicas_of(catalog: SqlCatalog) -> Any:
    assert catalog.database.replicas is not None
    return catalog.database.replicas


async def make_keys(catalog: SqlCatalog, count: int) -> list[ApiKey]:
    return [(await make_key(catalog, "free"))[1] for _ in range(count)]


def status_on(server: PostgresServer, name: str, key: ApiKey) -> list[Any]:
    return server.execute("SELECT status FROM api_keys WHERE id = %s", name, [key.id])


# Who is asked.


async def test_reads_go_round_the_replicas(postgres_cluster: PostgresCluster, database: str, open_catalog: Open) -> None:
    catalog = await open_catalog(postgres_cluster, database)
    keys = await make_keys(catalog, 40)
    await asyncio.to_thread(postgres_cluster.wait_caught_up)
    asked = Asked(catalog)
    for key in keys:
        assert (await catalog.api_key(key.sha256))[1] == key
    assert asked.take() == {"replica 0": 20, "replica 1": 20}
    assert (await catalog.api_key("0" * 64))[1] is None
    assert (await catalog.tier("free"))[1] is not None
    assert "primary" not in asked.take()


async def test_a_writer_reads_its_own_write(postgres_cluster: PostgresCluster, database: str, open_catalog: Open) -> None:
    """And so does everybody who has heard of it, though no replica shows it yet."""
    catalog = await open_catalog(postgres_cluster, database)
    other = await open_catalog(postgres_cluster, database)
    (key,) = await make_keys(catalog, 1)
    await asyncio.to_thread(postgres_cluster.wait_caught_up)
    writer, listener = CachedCatalog(catalog), CachedCatalog(other)
    for each in (writer, listener):
        each.changed(await each.catalog.changes(0))  # type: ignore[attr-defined]
        caller = await each.caller(key.sha256)
        assert caller is not None
        assert caller.api_key == key
    for replica in postgres_cluster.replicas:
        replica.pause_replay()
    try:
        asked = Asked(catalog)
        await revoke_key(catalog, key.id, "over", writer)
        listener.changed(await other.changes(listener.version))
        for each in (writer, listener):
            caller = await each.caller(key.sha256)
            assert caller is not None
            assert caller.api_key is not None
            assert caller.api_key.status is KeyStatus.REVOKED
        assert asked.take()["primary"] == 1
        assert [status_on(replica, database, key) for replica in postgres_cluster.replicas] == [[("active",)]] * 2
        # A change that touches more than is told one by one.
        writer.touched(await catalog.version(), [(ALL, "")])
        assert (await writer.caller(key.sha256)).api_key.status is KeyStatus.REVOKED  # type: ignore[union-attr]
        assert asked.take()["primary"] == 1
    finally:
        for replica in postgres_cluster.replicas:
            replica.resume_replay()
    await asyncio.to_thread(postgres_cluster.wait_caught_up)
    # On busy cores a replica that has it may be probed, or may answer, too late for a while.
    async with asyncio.timeout(PATIENCE_S):
        primary_answers = True
        while primary_answers:
            writer.invalidate()
            await writer.caller(key.sha256)
            primary_answers = "primary" in asked.take()


async def test_a_replica_lags_by_what_it_misses_and_not_by_time(
    postgres_cluster: PostgresCluster, database: str, open_catalog: Open
) -> None:
    catalog = await open_catalog(postgres_cluster, database, max_replica_lag_s=5.0)
    reader = await open_catalog(postgres_cluster, database, max_replica_lag_s=5.0)
    keys = await make_keys(catalog, 4)
    await asyncio.to_thread(postgres_cluster.wait_caught_up)
    clocks = []
    for each in (catalog, reader):
        clock = replicas_of(each)._clock = Clock()
        clocks.append(clock)
    late: PostgresReplica = postgres_cluster.replicas[0]

    async def pass_time(seconds: float) -> None:
        for clock in clocks:
            clock.added += seconds
        for each in (catalog, reader):
            await replicas_of(each).probe()

    def out() -> list[list[bool]]:
        return [[replica.ejected_because is not None for replica in replicas_of(each).replicas] for each in (catalog, reader)]

    await pass_time(0)
    late.pause_replay()
    try:
        await pass_time(3600)
        assert out() == [[False, False]] * 2, "an idle primary is no lag"
        await make_keys(catalog, 1)
        postgres_cluster.replicas[1].caught_up(postgres_cluster.primary)
        await pass_time(0)
        await pass_time(4)
        assert out() == [[False, False]] * 2
        assert 4 <= replicas_of(reader).replicas[0].lag_s < 5
        await pass_time(1.5)
        assert out() == [[True, False]] * 2, "also at an instance that only reads"
        assert [replicas_of(each).replicas[0].ejections for each in (catalog, reader)] == [1, 1]
        asked = Asked(catalog)
        for key in keys:
            assert (await catalog.api_key(key.sha256))[1] == key
        assert asked.take() == {"replica 1": 4}
    finally:
        late.resume_replay()
    late.caught_up(postgres_cluster.primary)
    await pass_time(0)
    assert out() == [[False, False]] * 2
    assert replicas_of(catalog).replicas[0].lag_s == 0
    for key in keys:
        assert (await catalog.api_key(key.sha256))[1] == key
    assert asked.take() == {"replica 0": 2, "replica 1": 2}


# What is gone.


async def test_replicas_go_and_come_back_and_then_the_primary(
    new_postgres_cluster: Callable[..., PostgresCluster], open_catalog: Open
) -> None:
    cluster = new_postgres_cluster()
    timeout_s = 2.0
    catalog = await open_catalog(cluster, timeout_s=timeout_s)
    keys = await make_keys(catalog, 20)
    await asyncio.to_thread(cluster.wait_caught_up)
    asked = Asked(catalog)
    replicas = replicas_of(catalog).replicas
    first, second = cluster.replicas

    async def read_all() -> float:
        """Every key is found; says how long the slowest took."""
        slowest = 0.0
        for key in keys:
            took_s, found = await timed(catalog.api_key(key.sha256))
            assert found[1] == key
            slowest = max(slowest, took_s)
        return slowest

    async with ticking() as late:
        # Killed: its connections are closed, and new ones refused.
        await asyncio.to_thread(first.kill)
        killed_s = await read_all()
        assert set(asked.take()) <= {"replica 0", "replica 1"}, "the other replica answers, not the primary"
        assert replicas[0].ejected_because is not None
        await asyncio.to_thread(first.start)
        back_s = await until(lambda: replicas[0].ejected_because is None)
        asked.take()
        await read_all()
        assert asked.take() == {"replica 0": 10, "replica 1": 10}

        # Frozen: its connections stay, and say nothing.
        await asyncio.to_thread(second.pause)
        ticks = len(late)
        frozen_s = await read_all()
        assert replicas[1].ejected_because is not None
        assert frozen_s < timeout_s + SLACK_S
        # Whoever waits for an answer in the loop's own thread lets it turn once or twice meanwhile.
        assert len(late) - ticks >= 10, "the loop went on"
        asked.take()
        await read_all()
        assert asked.take() == {"replica 0": 20}, "it holds nobody up any more"

        # All of them.
        await asyncio.to_thread(first.kill)
        await read_all()
        asked.take()
        await until(lambda: replicas[0].ejected_because is not None)
        await read_all()
        assert asked.take() == {"primary": 20}
        await asyncio.to_thread(second.resume)
        await asyncio.to_thread(first.start)
        thawed_s = await until(lambda: all(replica.ejected_because is None for replica in replicas))
    print(
        f"\nslowest read while a replica is killed {killed_s * 1e3:.0f} ms, frozen {frozen_s * 1e3:.0f} ms (timeout "
        f"{timeout_s * 1e3:.0f} ms); back after {back_s:.2f} s, {thawed_s:.2f} s; latest tick {max(late) * 1e3:.0f} ms"
    )
    await asyncio.to_thread(cluster.wait_caught_up)

    # The primary: replicas serve, also one that is left out, where nobody else is left.
    version = await catalog.version()
    clock = replicas_of(catalog)._clock = Clock()
    await replicas_of(catalog).probe()
    first.pause_replay()
    revoked = keys[0]
    await revoke_key(catalog, revoked.id, "over")
    changed = await catalog.version()
    second.caught_up(cluster.primary)
    clock.added += 60
    await replicas_of(catalog).probe()
    assert [replica.ejected_because is None for replica in replicas] == [False, True]
    cluster.primary.kill()
    asked.take()
    for key in keys[1:]:
        assert (await catalog.api_key(key.sha256, min_version=version))[1] == key
    assert asked.take() == {"replica 1": 19}
    assert (await catalog.api_key(revoked.sha256, min_version=changed))[1].status is KeyStatus.REVOKED  # type: ignore[union-attr]
    second.kill()
    await until(lambda: replicas[1].ejected_because is not None)
    for key in keys[1:]:
        assert (await catalog.api_key(key.sha256, min_version=version))[1] == key
    assert asked.take()["replica 0"] >= 19, "the last resort"
    with pytest.raises(CatalogUnavailable):
        await catalog.api_key(revoked.sha256, min_version=changed)
    took_s, refused = await timed(make_key(catalog, "free"))
    assert isinstance(refused, CatalogUnavailable)
    assert took_s < CONNECT_S + SLACK_S


# Who is promoted.


async def test_a_promoted_standby_is_found_and_a_demoted_primary_left(
    new_postgres_cluster: Callable[..., PostgresCluster], open_catalog: Open
) -> None:
    cluster = new_postgres_cluster()
    catalog = await open_catalog(cluster)
    (key,) = await make_keys(catalog, 1)
    before = await catalog.version()
    await asyncio.to_thread(cluster.wait_caught_up)
    old, (first, second) = cluster.primary, cluster.replicas
    # Connections stay open, and take no writes any more: what a pool finds that a switchover left behind.
    old.execute("ALTER SYSTEM SET default_transaction_read_only = on", "postgres")
    old.execute("SELECT pg_reload_conf()", "postgres")
    assert old.execute("SHOW default_transaction_read_only") == [("on",)]
    first.promote()
    await revoke_key(catalog, key.id, "over")
    assert status_on(first, "tidegate", key) == [("revoked",)]
    assert status_on(old, "tidegate", key) == [("active",)]
    # Reading follows, too: what was written is read, and others' changes are heard of.
    version = await catalog.version()
    assert version > before
    assert (await catalog.changes(before)).floor == before
    assert (await catalog.api_key(key.sha256, min_version=version))[1].status is KeyStatus.REVOKED  # type: ignore[union-attr]

    # The new primary dies, and the last one takes its place.
    cluster.follow(second, first)
    second.caught_up(first)
    first.kill()
    second.promote()
    (made,) = await make_keys(catalog, 1)
    assert await catalog.version() > version
    assert status_on(second, "tidegate", made) == [("active",)]
    assert (await catalog.api_key(made.sha256, min_version=await catalog.version()))[1] == made


async def test_the_primary_is_killed_under_writers(
    new_postgres_cluster: Callable[..., PostgresCluster], open_catalog: Open
) -> None:
    cluster = new_postgres_cluster()
    catalog = await open_catalog(cluster)
    editor = editor_of(catalog)
    acknowledged: list[tuple[float, str, int]] = []
    failed: list[str] = []
    over = asyncio.Event()

    async def write(writer: int) -> None:
        number = 0
        while not over.is_set():
            number += 1
            name = f"{writer} {number}"
            try:
                async with editor.changing("test") as change:
                    # Several rows: a key, its line in the audit log, and what the change touched.
                    version = change.version
                    made = await _insert(change, name)
                acknowledged.append((time.monotonic(), made, version))
            except CatalogUnavailable:
                failed.append(name)
                await asyncio.sleep(0.02)

    async def _insert(change: Any, name: str) -> str:
        from tidegate.admin.api_keys import _insert_key, _owner
        from tidegate.admin.transaction import load_tier_row

        made = await _insert_key(change, await load_tier_row(change, "free"), name, None, (), _owner(None, False))
        return made.name

    writers = [asyncio.create_task(write(number)) for number in range(20)]
    await until(lambda: len(acknowledged) > 200, 60)
    killed = time.monotonic()
    await asyncio.to_thread(cluster.primary.kill)
    gone = time.monotonic()
    await asyncio.to_thread(cluster.replicas[0].promote)
    new = cluster.replicas[0]
    promoted_s = time.monotonic() - killed
    await until(lambda: acknowledged[-1][0] > killed + promoted_s, 60)
    again_s = min(at for at, _, _ in acknowledged if at > gone) - killed
    enough = len(acknowledged) + 200
    await until(lambda: len(acknowledged) > enough, 60)
    over.set()
    await asyncio.gather(*writers)

    keys = {name for (name,) in new.execute("SELECT name FROM api_keys WHERE NOT managed_by_file")}
    audited = {
        name for (name,) in new.execute("SELECT after->>'name' FROM audit_log WHERE kind = 'api_key' AND action = 'create'")
    }
    logged = dict(new.execute("SELECT version, name FROM catalog_changes WHERE kind = 'key'"))
    digests = dict(new.execute("SELECT sha256, name FROM api_keys"))
    assert keys == audited == {digests[sha256] for sha256 in logged.values() if sha256 in digests}, "wholly or not at all"
    versions = [version for _, _, version in acknowledged]
    assert len(set(versions)) == len(versions), "no version is given twice"
    lost = [(name, version) for _, name, version in acknowledged if name not in keys]
    held_before = [version for at, name, version in acknowledged if name in keys and at < killed]
    if lost:
        assert min(version for _, version in lost) > max(held_before), "what is lost are the last ones"
    assert all(name in keys for at, name, _ in acknowledged if at > killed + promoted_s)
    chain = new.execute("SELECT DISTINCT version, previous FROM catalog_changes ORDER BY version")
    assert all(before[0] == after[1] for before, after in itertools.pairwise(chain)), "the chain of versions is whole"
    print(
        f"\n{len(acknowledged)} changes acknowledged, {len(lost)} of them lost with the primary, {len(failed)} refused; promoted "
        f"{promoted_s:.2f} s after the kill, written again after {again_s:.2f} s"
    )


async def test_a_change_that_is_lost_with_its_primary_is_dropped(
    new_postgres_cluster: Callable[..., PostgresCluster], open_catalog: Open, redis_server: RedisServer
) -> None:
    """Replication is asynchronous: a change that was acknowledged, and served, may be gone. Then nobody goes on serving it.

    One standby has not got it and is promoted; the other one has, and cannot follow.
    """
    cluster = new_postgres_cluster()
    behind, strayed = cluster.replicas
    urls = cluster.replica_urls()
    catalogs = [await open_catalog(cluster, replicas=(urls[1],)) for _ in range(2)]
    key, other = await make_keys(catalogs[0], 2)
    await asyncio.to_thread(cluster.wait_caught_up)
    stores = [RedisCounters(redis_server.url, 0.5) for _ in range(2)]
    shared = [SharedCatalog(catalog, store, SECRET) for catalog, store in zip(catalogs, stores, strict=True)]
    saw_it, slept = caches = [CachedCatalog(each) for each in shared]

    async def look(at: int) -> None:
        caches[at].changed(await shared[at].changes(caches[at].version))

    async def status(cached: CachedCatalog, of: ApiKey = key) -> KeyStatus:
        caller = await cached.caller(of.sha256)
        assert caller is not None
        assert caller.api_key is not None
        for each in shared:
            await each.settle()
        return caller.api_key.status

    try:
        for store in stores:
            await store.start()
        for at in (0, 1):
            await look(at)
            assert await status(caches[at]) is KeyStatus.ACTIVE
        kept = saw_it.version
        # Not frozen, which would only hold up what lies in its socket already.
        behind.execute("ALTER SYSTEM SET primary_conninfo = ''", "postgres")
        behind.execute("SELECT pg_reload_conf()", "postgres")
        await until(lambda: behind.execute("SELECT 1 FROM pg_stat_wal_receiver") == [])

        await revoke_key(catalogs[0], key.id, "over")
        await look(0)
        lost = saw_it.version
        assert await status(saw_it) is KeyStatus.REVOKED
        strayed.caught_up(cluster.primary)
        cluster.primary.kill()
        behind.promote()

        changes = await shared[0].changes(lost)
        assert (changes.version, changes.floor, changes.items) == (kept, kept, ())
        for at in (0, 1):
            await look(at)
        assert [each.version for each in caches] == [kept, kept]
        slept.invalidate()
        assert [await status(each) for each in caches] == [KeyStatus.ACTIVE] * 2
        assert status_on(behind, "tidegate", key) == [("active",)]
        assert status_on(strayed, "tidegate", key) == [("revoked",)], "it still shows what is lost"
        for catalog in catalogs:
            await replicas_of(catalog).probe()
            assert replicas_of(catalog).replicas[0].ejected_because is not None

        # Later versions have gone past the lost one.
        await revoke_key(catalogs[0], other.id, "over")
        assert await catalogs[0].version() > lost
        for at in (0, 1):
            await look(at)
            for cached in (caches[at], CachedCatalog(shared[at])):
                cached.invalidate()
                assert [await status(cached), await status(cached, other)] == [KeyStatus.ACTIVE, KeyStatus.REVOKED]
    finally:
        for store in stores:
            await store.close()


# Connections.


async def test_pools_are_bounded(postgres_cluster: PostgresCluster, database: str, open_catalog: Open) -> None:
    pool_size = 3
    catalog = await open_catalog(postgres_cluster, database, pool_size=pool_size, timeout_s=2 * PATIENCE_S)
    keys = await make_keys(catalog, 10)
    most: Counter[PostgresServer] = Counter()
    over = False

    def watch() -> None:
        query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'tidegate' AND datname = %s"
        while not over:
            for server in postgres_cluster.servers:
                ((count,),) = server.execute(query, "postgres", [database])
                most[server] = max(most[server], count)

    watching = asyncio.create_task(asyncio.to_thread(watch))
    try:
        versions = (0, 0, await catalog.version())
        reads = [catalog.tier("free", min_version=version) for version in versions for _ in range(100)]
        reads += [catalog.api_key(key.sha256) for key in keys]  # type: ignore[misc]
        writes = [make_key(catalog, "free") for _ in range(30)]
        lists = [listed_keys(catalog) for _ in range(100)]
        found, changed = await asyncio.gather(asyncio.gather(*reads), asyncio.gather(*writes, *lists))  # type: ignore[arg-type]
        assert all(value is not None for _, value in found)
        assert all(changed)
    finally:
        # Whatever happened: the loop does not end before its threads do.
        over = True
        await watching
    assert 1 < most[postgres_cluster.primary] <= pool_size + 4
    assert all(1 <= most[replica] <= pool_size for replica in postgres_cluster.replicas)


async def test_replicas_that_are_merely_busy_are_not_left_out(
    postgres_cluster: PostgresCluster, database: str, open_catalog: Open
) -> None:
    catalog = await open_catalog(postgres_cluster, database, pool_size=1, timeout_s=3.0)
    replicas = replicas_of(catalog)
    slow = select(policy_state.c.version.label("read_version"), func.pg_sleep(0.2))
    # 12 s of work for two connections, which each may be waited for 3 s: most find none free.
    answers = await asyncio.gather(*(replicas.rows(slow, 0) for _ in range(60)), replicas.probe())
    answered = sum(rows is not None for rows in answers)
    assert 2 <= answered < 60
    assert [(replica.ejected_because, replica.ejections) for replica in replicas.replicas] == [(None, 0), (None, 0)]
    assert (await catalog.tier("free"))[1] is not None, "nothing is held by who has given up"
    assert all(not replica.free.locked() for replica in replicas.replicas)


async def test_replicas_that_hang_are_left_out_however_busy(
    postgres_cluster: PostgresCluster, database: str, open_catalog: Open
) -> None:
    catalog = await open_catalog(postgres_cluster, database, pool_size=1, timeout_s=2.0)
    replicas = replicas_of(catalog)
    forever = select(policy_state.c.version.label("read_version"), func.pg_sleep(30))
    assert await asyncio.gather(*(replicas.rows(forever, 0) for _ in range(6))) == [None] * 6
    assert all(replica.ejections for replica in replicas.replicas)
    assert (await catalog.tier("free"))[1] is not None, "the primary is asked"
    await until(lambda: all(replica.ejected_because is None for replica in replicas.replicas))


@pytest.mark.parametrize("role", ["primary", "replica"])
async def test_a_query_whose_connection_is_cut_is_repeated(
    postgres_cluster: PostgresCluster, database: str, open_catalog: Open, role: str
) -> None:
    """The cut says nothing about the server: a replica stays in rotation."""
    catalog = await open_catalog(postgres_cluster, database, timeout_s=PATIENCE_S)
    replicas = replicas_of(catalog)
    server: PostgresServer = postgres_cluster.primary if role == "primary" else postgres_cluster.replicas[0]
    waiting = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'advisory' AND datname = %s"

    def waiting_pids() -> list[int]:
        return [pid for (pid,) in server.execute(waiting, "postgres", [database])]

    # The query waits for a lock, so that it is still running when its connection is cut.
    query = select(policy_state.c.version.label("read_version"), func.pg_advisory_xact_lock_shared(1))
    async with await psycopg.AsyncConnection.connect(server.url(database)) as other:
        await other.execute("SELECT pg_advisory_lock(1)")
        from_primary, from_replica = catalog.database._read_primary, replicas._query
        rows = asyncio.ensure_future(
            from_primary(query, None) if role == "primary" else from_replica(replicas.replicas[0], query, None, PATIENCE_S)
        )
        await until(waiting_pids)
        [pid] = waiting_pids()
        await asyncio.to_thread(server.execute, "SELECT pg_terminate_backend(%s)", "postgres", [pid])
        await other.execute("SELECT pg_advisory_unlock(1)")
        assert (await rows)[0]["read_version"] == await catalog.database.version()
    assert [replica.ejections for replica in replicas.replicas] == [0, 0]


async def test_connections_that_are_cut_are_found(postgres_cluster: PostgresCluster, database: str, open_catalog: Open) -> None:
    # On busy cores forty reads at once may wait for one of eight connections longer than 2 s.
    catalog = await open_catalog(postgres_cluster, database, timeout_s=PATIENCE_S)
    keys = await make_keys(catalog, 20)
    await asyncio.to_thread(postgres_cluster.wait_caught_up)
    terminate = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'tidegate' AND datname = %s"
    for _ in range(3):
        await asyncio.gather(*(catalog.tier("free") for _ in range(20)), *(listed_keys(catalog) for _ in range(20)))
        cut = sum(len(server.execute(terminate, "postgres", [database])) for server in postgres_cluster.servers)
        assert cut >= 6
        for key in keys:
            assert (await catalog.api_key(key.sha256))[1] == key
        await make_key(catalog, "free")
        await catalog.changes(0)
    assert [replica.ejections for replica in replicas_of(catalog).replicas] == [0, 0]


async def test_a_late_answer_is_reported_as_one(new_postgres: Callable[..., PostgresServer]) -> None:
    engine = open_engine(new_postgres().url(), timeout_s=0.5)
    with pytest.raises(OperationalError, match=r"no answer within 0\.5 s"):
        async with engine.connect() as connection:
            await connection.execute(text("SELECT pg_sleep(20)"))
    async with engine.connect() as connection:
        assert (await connection.execute(text("SELECT 1"))).scalar() == 1
    await engine.dispose()


async def test_a_frozen_server_holds_no_answer_and_never_the_loop(
    new_postgres: Callable[..., PostgresServer],
) -> None:
    server = new_postgres()
    timeout_s = 1.0
    catalog = await SqlCatalog.open(server.url(), DatabaseOptions(timeout_s=timeout_s, pool_size=4))
    try:
        await catalog.apply_policy(parse_policy(POLICY), "1")
        keys = await make_keys(catalog, 30)
        await asyncio.gather(*(catalog.tier("free") for _ in range(20)))
        server.pause()
        async with ticking() as late:
            answers = await asyncio.gather(
                *(timed(catalog.api_key(key.sha256)) for key in keys),
                *(timed(catalog.tier("free")) for _ in range(30)),
                *(timed(catalog.changes(0)) for _ in range(3)),
            )
            again = await asyncio.gather(*(timed(catalog.api_key(key.sha256)) for key in keys))
        server.resume()
        assert {type(found) for _, found in answers + again} == {CatalogUnavailable}
        slowest, slowest_again = max(took_s for took_s, _ in answers), max(took_s for took_s, _ in again)
        print(
            f"\nfrozen: slowest answer {slowest:.2f} s, then {slowest_again:.2f} s (timeout {timeout_s:g} s, connecting "
            f"{CONNECT_S:g} s); latest tick {max(late) * 1e3:.0f} ms, median {statistics.median(late) * 1e3:.1f} ms"
        )
        assert slowest < timeout_s + CONNECT_S + SLACK_S
        assert slowest_again < timeout_s + CONNECT_S + SLACK_S
        assert len(late) >= 20, "the loop went on, through two timeouts"
        async with asyncio.timeout(PATIENCE_S):
            while (await timed(catalog.api_key(keys[0].sha256)))[1][1] != keys[0]:
                await asyncio.sleep(0.05)
    finally:
        await catalog.close()
