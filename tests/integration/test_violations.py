"""Violations in real databases: what is written, what is lost when the database goes away, and how the table is kept."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, text

from tests.moments import PATIENCE_S
from tests.servers.postgres import PostgresServer
from tests.servers.tcp_proxy import TcpProxy
from tests.unit.test_violations import MINUTE_US, NOON_US, blocked, limit_set
from tidegate import periodic_writer
from tidegate.admin.rules import CatalogEditor
from tidegate.catalog.sql import partitions as partitioning
from tidegate.catalog.sql.catalog import SqlCatalog
from tidegate.catalog.sql.database import Database
from tidegate.errors import CatalogUnavailable
from tidegate.violations import recorder as module
from tidegate.violations import storage as table
from tidegate.violations.queries import ViolationFilter, Violator, blocked_total, list_violations, top_violators
from tidegate.violations.recorder import Violations, ViolationWriter
from tidegate.violations.storage import ViolationKey, maintain_table, partition_of, write_violations

DAY_US = 86_400_000_000
EVER = ViolationFilter(0, 2**62)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/tidegate.db"
    found: str = request.getfixturevalue("postgres_url")
    return found


@pytest.fixture
async def catalog(url: str) -> AsyncIterator[SqlCatalog]:
    made = await SqlCatalog.open(url)
    yield made
    await made.close()


@pytest.fixture
async def postgres(postgres_url: str) -> AsyncIterator[Database]:
    made = await Database.open(postgres_url)
    yield made
    await made.close()


def count(violations: Violations, checks: Iterable[tuple[str, int]], at_us: int = NOON_US) -> int:
    """Blocks each subject so many times; returns how many checks that were."""
    total = 0
    for subject, times in checks:
        for _ in range(times):
            violations.observe(blocked(subject, at_us))
        total += times
    return total


def editor_of(catalog: SqlCatalog) -> CatalogEditor:
    return CatalogEditor(catalog, lambda version, items: None)


async def listed(catalog: SqlCatalog) -> dict[tuple[str, str, str, str], int]:
    """All rows as operators read them, page by page."""
    rows: list[Any] = []
    after = None
    while True:
        page = await list_violations(catalog.database, 500, after, EVER)
        rows += page.items
        if (after := page.next) is None:
            return {(row.minute, row.tier, row.rule, row.subject): row.blocked for row in rows}


async def execute(database: Database, statement: str, **parameters: Any) -> list[Any]:
    async with database.transaction() as connection:
        result = await connection.execute(text(statement), parameters)
        return list(result.all()) if result.returns_rows else []


async def partitions(database: Database) -> dict[str, int]:
    """Rows by partition."""
    names = await execute(
        database,
        """SELECT relname FROM pg_inherits JOIN pg_class c ON c.oid = inhrelid
            WHERE inhparent = CAST('rate_limit_violations' AS regclass) ORDER BY 1""",
    )
    return {name: (await execute(database, f"SELECT count(*) FROM {name}"))[0][0] for (name,) in names}


def row(at_us: int, subject: str = "k:1", blocked: int = 1) -> tuple[ViolationKey, int]:
    return (at_us - at_us % MINUTE_US, "free", "r", subject), blocked


async def test_sums_of_four_writers_at_once(url: str, catalog: SqlCatalog) -> None:
    catalogs = [catalog, *[await SqlCatalog.open(url) for _ in range(3)]]
    truth: Counter[str] = Counter()

    async def work(each: SqlCatalog, seed: int) -> ViolationWriter:
        chance = random.Random(seed)
        violations = Violations()
        writer = ViolationWriter(violations, each.database)
        for _ in range(5):
            # All have the same subjects, met in an order of their own.
            checks = [(f"k:{number}", chance.randint(1, 3)) for number in range(400)]
            chance.shuffle(checks)
            count(violations, checks)
            truth.update(dict(checks))
            await writer._write_once()
        await writer.flush(PATIENCE_S)
        return writer

    writers = await asyncio.gather(*(work(each, seed) for seed, each in enumerate(catalogs)))
    assert {subject: blocked for (*_, subject), blocked in (await listed(catalog)).items()} == truth
    assert sum(writer.written for writer in writers) == truth.total()
    assert [writer.dropped + writer.pending for writer in writers] == [0, 0, 0, 0]
    editor = editor_of(catalog)
    assert await blocked_total(editor.catalog.database, EVER) == truth.total()
    most = sorted(truth.items(), key=lambda item: (-item[1], item[0]))[:3]
    assert [(each.subject, each.blocked) for each in await top_violators(editor.catalog.database, 3, "subject", EVER)] == most
    for each in catalogs[1:]:
        await each.close()


async def test_more_rows_than_one_transaction_has(catalog: SqlCatalog) -> None:
    violations = Violations()
    writer = ViolationWriter(violations, catalog.database)
    total = count(violations, [(f"k:{number:05}", 1 + number % 3) for number in range(2 * table.MAX_ROWS + 1)])
    await writer._write_once()
    assert (writer.written, writer.pending, writer.dropped, writer.failing) == (total, 0, 0, False)
    rows = await listed(catalog)
    assert {key[3]: blocked for key, blocked in rows.items()} == {f"k:{n:05}": 1 + n % 3 for n in range(1001)}
    assert {key[:3] for key in rows} == {("2023-11-15T12:00:00Z", "free", "r")}


async def test_others_count_by_rule_and_are_not_a_subject(catalog: SqlCatalog) -> None:
    violations = Violations(100)
    writer = ViolationWriter(violations, catalog.database)
    count(violations, [("k:heavy", 500)])
    total = 500 + count(violations, [(f"i:{number}", 1) for number in range(1_000)])
    violations.observe(blocked("k:heavy", limits=limit_set(rule=None)))
    await writer._write_once()
    rows = await listed(catalog)
    others = [(rule, blocked) for (_, _, rule, subject), blocked in rows.items() if subject == table.OTHERS]
    # The place of the one under the tier's own limits was taken by nobody: it came last.
    assert others == [("r", total - sum(n for key, n in rows.items() if key[2] == "r" and key[3]))]
    assert others[0][1] > 800
    editor = editor_of(catalog)
    top = await top_violators(editor.catalog.database, 100, "subject", EVER)
    assert top[0] == Violator("k:heavy", blocked=501)
    assert all(each.subject for each in top)
    by_rule = await top_violators(editor.catalog.database, 10, "rule", EVER)
    assert [(each.tier, each.rule, each.blocked) for each in by_rule] == [("free", "r", total), ("free", "", 1)]
    assert [each.blocked for each in await top_violators(editor.catalog.database, 10, "tier", EVER)] == [total + 1]


async def test_odd_texts_are_taken(catalog: SqlCatalog) -> None:
    subjects = ["k:" + "x" * 200, "k:" + "x" * 201, "k:nul\0", "k:\ud800", "k:ключ", "k:'; DROP TABLE x --", 'k:"\\']
    await write_violations(catalog.database, [row(NOON_US, subject, 1 + at) for at, subject in enumerate(subjects)])
    await write_violations(catalog.database, [row(NOON_US, subject, 10) for subject in subjects])
    rows = {key[3]: blocked for key, blocked in (await listed(catalog)).items()}
    assert sorted(rows.values()) == [11 + at for at in range(len(subjects))]
    assert all(rows[subject] == 15 + at for at, subject in enumerate(subjects[4:]))
    await write_violations(catalog.database, [])
    large = (NOON_US, "t", "r", "s"), 2**53 + 1
    await write_violations(catalog.database, [large])
    assert (await listed(catalog))["2023-11-15T12:00:00Z", "t", "r", "s"] == 2**53 + 1


class Breakable:
    """A catalog whose database can be taken away."""

    def __init__(self, catalog: SqlCatalog, away: Callable[[], Awaitable[Any]], back: Callable[[], Awaitable[Any]]) -> None:
        self.catalog = catalog
        self.away = away
        self.back = back
        self.violations = Violations(1_000)
        self.writer = ViolationWriter(self.violations, catalog.database)


@contextlib.asynccontextmanager
async def behind_a_proxy(server: PostgresServer, url: str) -> AsyncIterator[tuple[SqlCatalog, TcpProxy]]:
    async with TcpProxy(server.port) as proxy:
        catalog = await SqlCatalog.open(url.replace(f":{server.port}/", f":{proxy.port}/"))
        try:
            yield catalog, proxy
        finally:
            proxy.refuse = False
            await catalog.close()


@pytest.fixture
async def breakable(url: str, request: pytest.FixtureRequest) -> AsyncIterator[Breakable]:
    if url.startswith("sqlite"):
        catalog = await SqlCatalog.open(url)
        database = catalog.database
        yield Breakable(
            catalog,
            lambda: execute(database, "ALTER TABLE rate_limit_violations RENAME TO gone"),
            lambda: execute(database, "ALTER TABLE gone RENAME TO rate_limit_violations"),
        )
        await catalog.close()
        return
    async with behind_a_proxy(request.getfixturevalue("postgres_server"), url) as (catalog, proxy):

        async def away() -> None:
            proxy.refuse = True
            proxy.drop_all()

        async def back() -> None:
            proxy.refuse = False

        yield Breakable(catalog, away, back)


async def test_an_outage_loses_nothing_that_fits_the_buffer(breakable: Breakable, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    violations, writer = breakable.violations, breakable.writer
    total = count(violations, [("k:1", 3), ("k:2", 1)])
    await writer._write_once()
    await breakable.away()
    for interval in range(3):
        total += count(violations, [(f"k:{number}", 1) for number in range(600)], NOON_US + interval % 2 * MINUTE_US)
        await writer._write_once()
        assert (writer.written, writer.dropped, writer.failing) == (4, 0, True)
    assert writer.pending == 1_200 - 200 + 2, "the least go to the others, of each minute one"
    await breakable.back()
    total += count(violations, [("k:1", 1)])
    assert total == 1_805
    await writer._write_once()
    assert (writer.written, writer.dropped, writer.pending, writer.failing) == (total, 0, 0, False)
    rows = await listed(breakable.catalog)
    assert sum(rows.values()) == total
    said = [each.getMessage() for each in caplog.records if each.name == module.__name__]
    assert len(said) == 2
    assert said[0].startswith("writing violations failed, they are buffered in memory: the catalog's database")
    assert said[1] == "writing violations works again"


async def test_what_is_beyond_the_bounds_is_counted_as_dropped(breakable: Breakable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SUMS", 4)
    violations = Violations(100)
    writer = ViolationWriter(violations, breakable.catalog.database)
    await breakable.away()
    total = 0
    for minute in range(10):
        checks = [("k:heavy", 50), *((f"i:{number}", 1) for number in range(30))]
        total += count(violations, checks, NOON_US + minute * MINUTE_US)
        await writer._write_once()
    assert writer.failing
    assert writer.pending == 100 + 4
    assert writer.dropped > 0
    await breakable.back()
    await writer._write_once()
    assert writer.pending == 0
    assert writer.written + writer.dropped == total == 800
    rows = await listed(breakable.catalog)
    assert sum(rows.values()) == writer.written
    assert [blocked for key, blocked in rows.items() if key[3] == "k:heavy"] == [50] * 10, "of what fits the most stay"
    assert sum(not key[3] for key in rows) == 4


async def test_the_end_of_the_process(breakable: Breakable, caplog: pytest.LogCaptureFixture) -> None:
    violations, writer = breakable.violations, breakable.writer
    await writer.flush()
    assert (writer.written, writer.dropped) == (0, 0), "nothing to do"
    total = count(violations, [(f"k:{number}", 2) for number in range(700)])
    await writer.flush()
    assert (writer.written, writer.dropped, writer.pending) == (total, 0, 0)
    await breakable.away()
    lost = count(violations, [("k:1", 5), ("k:2", 2)])
    async with asyncio.timeout(PATIENCE_S):
        await writer.flush(0.5)
    assert (writer.written, writer.dropped, writer.pending) == (total, lost, 0)
    assert "7 blocked checks are not in the database and are lost with this process" in caplog.text
    await breakable.back()
    await writer.flush()
    assert sum((await listed(breakable.catalog)).values()) == total, "what was told as dropped is not written later"


async def test_the_end_waits_for_a_database_that_comes_back(breakable: Breakable) -> None:
    count(breakable.violations, [("k:1", 5)])
    await breakable.away()
    flushing = asyncio.create_task(breakable.writer.flush(2 * PATIENCE_S))
    while not breakable.writer.failing:
        await asyncio.sleep(0.01)
    await breakable.back()
    await flushing
    assert (breakable.writer.written, breakable.writer.dropped) == (5, 0)


async def test_it_runs_by_itself(catalog: SqlCatalog) -> None:
    violations = Violations()
    writer = ViolationWriter(violations, catalog.database, flush_s=0.1)
    running = asyncio.create_task(writer.run())
    now_us = time.time_ns() // 1000
    total = 0
    for _ in range(3):
        total += count(violations, [("k:1", 2)], now_us)
        async with asyncio.timeout(PATIENCE_S):
            while writer.written < total:
                await asyncio.sleep(0.02)
    async with asyncio.timeout(PATIENCE_S):
        while catalog.database.dialect == "postgresql" and len(await partitions(catalog.database)) < 5:
            await asyncio.sleep(0.02)
    total += count(violations, [("k:2", 1)], now_us)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await writer.flush()
    assert (writer.written, writer.dropped, sum((await listed(catalog)).values())) == (total, 0, total)


async def test_a_commit_without_an_answer_is_not_repeated(
    postgres_server: PostgresServer, postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with behind_a_proxy(postgres_server, postgres_url) as (catalog, proxy):
        violations = Violations()
        writer = ViolationWriter(violations, catalog.database)
        total = count(violations, [(f"k:{number:04}", 1) for number in range(2 * table.MAX_ROWS)])

        @event.listens_for(catalog.database._writer.sync_engine, "commit", once=True)
        def cut(_: Any) -> None:
            proxy.cut_after = 0  # the server commits, and its answer is lost

        await writer._write_once()
        assert (writer.written, writer.dropped, writer.failing) == (0, table.MAX_ROWS, True)
        assert writer.pending == table.MAX_ROWS
        await writer._write_once()
        assert (writer.written, writer.dropped, writer.failing) == (table.MAX_ROWS, table.MAX_ROWS, False)
        rows = await listed(catalog)
        assert set(rows.values()) == {1}, "none is counted twice"
        assert len(rows) == total, "here the commit had gone through"
        assert "the last rows may or may not be written" in caplog.text


async def test_a_frozen_database_does_not_hold_up_the_end(postgres_server: PostgresServer, postgres_url: str) -> None:
    async with behind_a_proxy(postgres_server, postgres_url) as (catalog, proxy):
        violations = Violations()
        writer = ViolationWriter(violations, catalog.database, flush_s=0.1)
        count(violations, [("k:1", 1)])
        await writer._write_once()
        proxy.stall = True
        running = asyncio.create_task(writer.run())
        count(violations, [("k:2", 4)])
        while writer._writing is None:
            await asyncio.sleep(0.01)
        count(violations, [("k:3", 3)])
        async with asyncio.timeout(PATIENCE_S):
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            begun = [writer._writing, writer._maintaining]
            await writer.flush(0.5)
        assert (writer.written, writer.dropped, writer.pending) == (1, 7, 0)
        proxy.stall = False
        await asyncio.gather(*(task for task in begun if task is not None), return_exceptions=True)
        assert (writer.written, writer.dropped, writer.pending) == (1, 7, 0)


async def test_old_days_go(catalog: SqlCatalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partitioning, "_DELETE_BATCH_SIZE", 7)
    database = catalog.database
    today_us = NOON_US - NOON_US % DAY_US
    ages = [0, 1, 29, 30, 31, 32, 400]
    await write_violations(database, [row(today_us - age * DAY_US, f"k:{n}") for age in ages for n in range(10)])
    assert await maintain_table(database, 30, today_us) is True
    assert sum((await listed(catalog)).values()) == 40, "30 days ago to the minute is kept"
    assert await maintain_table(database, 30, today_us + MINUTE_US) is True
    assert await maintain_table(database, 30, today_us + MINUTE_US) is True, "nothing is left to be done"
    assert sum((await listed(catalog)).values()) == 30
    # A day that has a partition goes with it, as soon as the whole of it is old.
    assert await maintain_table(database, 1, today_us + DAY_US + DAY_US // 2) is True
    rows = await listed(catalog)
    assert sum(rows.values()) == (10 if database.dialect == "postgresql" else 0)
    assert await maintain_table(database, 1, today_us + 2 * DAY_US) is True
    assert await listed(catalog) == {}


async def test_the_clock_is_the_database_s(catalog: SqlCatalog) -> None:
    now_us = time.time_ns() // 1000
    await write_violations(catalog.database, [row(now_us), row(now_us - 3 * DAY_US)])
    await maintain_table(catalog.database, 2)
    assert len(await listed(catalog)) == 1


async def test_partitions_are_made_and_dropped(postgres: Database) -> None:
    today_us = 1_704_067_200_000_000 - 2 * DAY_US  # 2023-12-30: the days ahead end in the next year
    now_us = today_us + DAY_US // 3
    await maintain_table(postgres, 30, now_us)
    days = [f"rate_limit_violations_{day}" for day in ("20231230", "20231231", "20240101", "20240102")]
    assert await partitions(postgres) == {**dict.fromkeys(days, 0), "rate_limit_violations_default": 0}
    edges = [today_us - 1, today_us, today_us + DAY_US - 1, today_us + DAY_US, today_us + 4 * DAY_US - 1, today_us + 4 * DAY_US]
    await write_violations(postgres, [((edge, "free", "r", "k:1"), 1) for edge in edges])
    assert await partitions(postgres) == {
        **dict(zip(days, (2, 1, 0, 1), strict=True)),
        "rate_limit_violations_default": 2,
    }
    assert await maintain_table(postgres, 1, now_us + 3 * DAY_US) is True
    left = await partitions(postgres)
    assert list(left) == [partition_of(today_us + ahead * DAY_US) for ahead in range(2, 7)] + ["rate_limit_violations_default"]
    # The row behind the last day was moved when its day got a partition; the one before the first day was deleted.
    assert left[partition_of(today_us + 4 * DAY_US)] == 1
    assert left["rate_limit_violations_default"] == 0


async def test_a_day_of_the_default_partition_moves(postgres: Database) -> None:
    today_us = NOON_US - NOON_US % DAY_US
    rows = [row(today_us + n * MINUTE_US, f"k:{n % 7}", 1 + n) for n in range(-3, 1_443)]
    for start in range(0, len(rows), 500):
        await write_violations(postgres, rows[start : start + 500])
    assert await maintain_table(postgres, 30, today_us) is True
    assert await partitions(postgres) == {
        partition_of(today_us): 1_440,
        partition_of(today_us + DAY_US): 3,
        partition_of(today_us + 2 * DAY_US): 0,
        partition_of(today_us + 3 * DAY_US): 0,
        "rate_limit_violations_default": 3,
    }
    catalog = SqlCatalog(postgres)
    assert sum((await listed(catalog)).values()) == sum(blocked for _, blocked in rows)
    await write_violations(postgres, rows[:500])
    assert len(await listed(catalog)) == len(rows), "rows that were moved are added to as before"
    indexes = await execute(
        postgres,
        "SELECT count(*) FROM pg_index JOIN pg_inherits ON inhrelid = indexrelid WHERE indrelid = CAST(:name AS regclass)",
        name=partition_of(today_us),
    )
    assert indexes == [(2,)], "the partition's indexes belong to those of the whole"


async def test_too_many_rows_stay_in_the_default_partition(
    postgres: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(partitioning, "_MAX_MOVED", 5)
    today_us = NOON_US - NOON_US % DAY_US
    await write_violations(postgres, [row(today_us + n * MINUTE_US) for n in range(6)])
    assert await maintain_table(postgres, 30, today_us) is True
    assert partition_of(today_us) not in await partitions(postgres)
    assert "violations of 20231115 stay in the default partition" in caplog.text
    assert sum((await listed(SqlCatalog(postgres))).values()) == 6
    assert await maintain_table(postgres, 1, today_us + 3 * DAY_US) is True
    assert await listed(SqlCatalog(postgres)) == {}, "and are deleted in time"


async def test_one_keeps_at_a_time(postgres: Database, postgres_url: str) -> None:
    others = [await Database.open(postgres_url) for _ in range(3)]
    async with postgres.transaction() as connection:
        await connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": table.TABLE.lock})
        assert await maintain_table(others[0], 30, NOON_US) is False
    assert list(await partitions(postgres)) == ["rate_limit_violations_default"]
    await write_violations(postgres, [row(NOON_US - age * DAY_US) for age in (0, 40)])
    done = await asyncio.gather(*(maintain_table(each, 30, NOON_US) for each in (postgres, *others)))
    assert any(done)
    assert len(await partitions(postgres)) == 5
    assert len(await listed(SqlCatalog(postgres))) == 1
    for each in others:
        await each.close()


async def test_a_table_in_use_is_not_waited_for(postgres: Database, postgres_url: str) -> None:
    await write_violations(postgres, [row(NOON_US - 40 * DAY_US), row(NOON_US)])
    other = await Database.open(postgres_url)
    async with other.transaction() as reader:
        await reader.execute(text("SELECT 1 FROM rate_limit_violations"))
        keeping = asyncio.create_task(maintain_table(postgres, 30, NOON_US))
        # Four days are tried; without a limit, they and these writers would wait for the reader for ever.
        async with asyncio.timeout(PATIENCE_S):
            while not keeping.done():
                await write_violations(other, [row(NOON_US)])
                await asyncio.sleep(0.02)
        with pytest.raises(CatalogUnavailable, match="lock timeout"):
            await keeping
    assert len(await listed(SqlCatalog(postgres))) == 1, "the other steps were taken: what was old is deleted"
    assert await maintain_table(postgres, 30, NOON_US) is True
    assert len(await partitions(postgres)) == 5
    await other.close()


async def test_keeping_while_others_write(postgres: Database, postgres_url: str, caplog: pytest.LogCaptureFixture) -> None:
    databases = [await Database.open(postgres_url) for _ in range(3)]
    today_us = NOON_US - NOON_US % DAY_US
    keeping = True
    truth = 0

    async def write(database: Database) -> ViolationWriter:
        nonlocal truth
        violations = Violations()
        writer = ViolationWriter(violations, database)
        round_ = 0
        while keeping:
            round_ += 1
            # Over the days that get partitions meanwhile, so that rows are on their way to the default one.
            for ahead in range(6):
                truth += count(violations, [(f"k:{round_ % 50}", 1)], today_us + ahead * DAY_US)
            await writer._write_once()
        await writer.flush(PATIENCE_S)
        return writer

    async def keep() -> None:
        nonlocal keeping
        for ahead in (0, 1, 2):
            await asyncio.sleep(0.2)
            for each in (postgres, databases[0]):
                # A wait for writers that is given up is tried again, as the writer does.
                with contextlib.suppress(CatalogUnavailable):
                    await maintain_table(each, 30, today_us + ahead * DAY_US)
        keeping = False

    *writers, _ = await asyncio.gather(*(write(each) for each in databases), keep())
    assert not caplog.records, "a partition that is made under a row's feet is no failure"
    assert await maintain_table(postgres, 30, today_us + 2 * DAY_US) is True
    assert sum(writer.written for writer in writers) == truth > 0
    assert [writer.dropped for writer in writers] == [0, 0, 0]
    held = await partitions(postgres)
    assert len(held) == 7
    assert held["rate_limit_violations_default"] == 0
    assert sum((await listed(SqlCatalog(postgres))).values()) == truth
    for each in databases:
        await each.close()


async def test_failed_maintenance_is_logged_once(
    breakable: Breakable, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(periodic_writer, "MAINTENANCE_RETRY_S", 0.01)
    tries = 0

    async def counted(*arguments: Any) -> bool:
        nonlocal tries
        tries += 1
        return await maintain_table(*arguments)

    monkeypatch.setattr(module, "maintain_table", counted)
    await breakable.away()
    running = asyncio.create_task(breakable.writer.run())
    async with asyncio.timeout(PATIENCE_S):
        while tries < 3:
            await asyncio.sleep(0.01)
    await breakable.back()
    async with asyncio.timeout(PATIENCE_S):
        while not caplog.records:
            await asyncio.sleep(0.01)
    assert not running.done()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await breakable.writer.flush()
    assert sum("maintenance of the violations table failed" in each.getMessage() for each in caplog.records) == 1
