"""Backup and restore, by the commands that docs/backup.md states, while a writer writes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import sqlite3
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import func, select, text

from tests.moments import PATIENCE_S
from tests.servers.postgres import PostgresServer, need
from tidegate.admin.api_keys import create_key
from tidegate.admin.models import KeyCreate
from tidegate.admin.rules import CatalogEditor
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.follower import CatalogFollower
from tidegate.catalog.sql.catalog import SqlCatalog
from tidegate.catalog.sql.tables import api_keys, audit_log, catalog_changes, rate_limit_rules, rate_limit_violations
from tidegate.policy.key_format import hash_api_key
from tidegate.violations.queries import DAY_US
from tidegate.violations.storage import maintain_table, partition_of, write_violations

PAGE = Path(__file__).parents[2] / "docs" / "backup.md"
PAIR = ("k:" + "1" * 24, "k:" + "2" * 24)
"""Two subjects that are always blocked equally often, each in a partition of its own."""


def commands(heading: str) -> list[str]:
    """The shell commands below a heading of the page, block by block."""
    (section,) = re.findall(rf"^###? {re.escape(heading)}\n(.*?)(?=^##|\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    blocks = re.findall(r"^( *)```sh\n(.*?)^ *```$", section, re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in blocks]


async def run(command: str, directory: Path, **environment: str) -> None:
    """Run a block as a person does who has the programs in the search path; fails with what it said."""
    search = os.pathsep.join((str(need()), str(Path(sys.executable).parent), os.environ["PATH"]))
    process = await asyncio.create_subprocess_exec(
        *("bash", "-euc", command),
        cwd=directory,
        env={**os.environ, "PATH": search, **environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate()
    assert process.returncode == 0, f"{command}\n{said.decode()}"


class Writer:
    """Writes without end, in such a way that a state which is half of one moment and half of another shows."""

    def __init__(self, catalog: SqlCatalog) -> None:
        self.catalog = catalog
        self.editor = CatalogEditor(catalog, lambda *_: None)
        self.changes = 0
        self.rule_id = 0

    async def prepare(self) -> None:
        now_us = time.time_ns() // 1000
        self.days = (now_us, now_us + DAY_US)
        assert await maintain_table(self.catalog.database, 30, now_us)
        await self.editor.create_tier("writer", "free", ["100/day"])
        rule = await self.editor.create_rule("writer", "free", {"endpoint": "/x", "limits": ["5/s"]})
        self.rule_id = rule.id
        await self.write()

    async def write(self) -> None:
        await self.editor.edit_rule("writer", self.rule_id, {"priority": self.changes}, None)
        await create_key(self.editor, "writer", KeyCreate(tier="free", name=f"key {self.changes}"))
        minute = self.changes % 2 * 60_000_000
        pair = [((day - day % DAY_US + minute, "free", "/x", subject), 1) for day, subject in zip(self.days, PAIR, strict=True)]
        await write_violations(self.catalog.database, [*pair, ((60_000_000, "free", "/x", "i:192.0.2.7"), 1)])
        self.changes += 1

    @contextlib.asynccontextmanager
    async def writing(self) -> AsyncIterator[None]:
        """Writes as long as it lasts, and a little before and behind."""
        going = True

        async def go() -> None:
            while going:
                await self.write()

        async def more() -> None:
            begun = self.changes
            while self.changes < begun + 3 and not task.done():
                await asyncio.sleep(0.001)

        task = asyncio.create_task(go())
        try:
            await more()
            yield
            await more()
        finally:
            going = False
            await task


async def is_of_one_moment(catalog: SqlCatalog, rule_id: int) -> int:
    """Nothing is there by halves. Gives the version of that moment."""
    async with catalog.database.reading() as connection:

        async def one(query: Any) -> Any:
            return (await connection.execute(query)).scalar_one()

        c = catalog_changes.c
        logged = [tuple(row) for row in await connection.execute(select(c.version, c.previous).order_by(c.version))]
        last = select(audit_log.c.after).where(audit_log.c.kind == "rule").order_by(audit_log.c.id.desc()).limit(1)
        rule = (await connection.execute(select(rate_limit_rules))).mappings().one()
        after = await one(last)
        assert (rule["id"], rule["priority"], rule["revision"]) == (rule_id, after["priority"], after["revision"])
        keys = await one(select(func.count()).select_from(api_keys))
        assert keys == await one(select(func.count()).select_from(audit_log).where(audit_log.c.kind == "api_key"))
        assert rule["revision"] - 1 in (keys, keys + 1), "a key is made after each change of the rule"
        # Each change is one version and one row of the audit log, and hangs on the one before it.
        assert await one(select(func.count()).select_from(audit_log)) == len(logged)
        assert all(later[1] == earlier[0] for earlier, later in itertools.pairwise(logged))
        version = await catalog.version()
        assert logged[-1][0] == version
        v = rate_limit_violations.c
        counts = {row[0]: row[1] for row in await connection.execute(select(v.subject, func.sum(v.blocked)).group_by(v.subject))}
        assert len(counts) == 3
        assert len(set(counts.values())) == 1
        assert keys - 2 <= counts[PAIR[0]] <= keys
    return version


async def goes_on(catalog: SqlCatalog, rule_id: int) -> None:
    """Takes changes as any other database: numbers of rows and upkeep go on where they were."""
    writer = Writer(catalog)
    writer.rule_id = rule_id
    now_us = time.time_ns() // 1000
    writer.days = (now_us, now_us + DAY_US)
    await writer.write()
    await writer.editor.create_tier("writer", "new", ())
    rule = await writer.editor.create_rule("writer", "new", {"endpoint": "/y", "limits": ["5/s"]})
    assert rule.id == rule_id + 1
    assert await maintain_table(catalog.database, 30, now_us)


@contextlib.asynccontextmanager
async def opened(url: str) -> AsyncIterator[SqlCatalog]:
    catalog = await SqlCatalog.open(url)
    try:
        yield catalog
    finally:
        await catalog.close()


@contextlib.asynccontextmanager
async def following(catalog: SqlCatalog) -> AsyncIterator[CachedCatalog]:
    """An instance's cache, which asks the database all the time."""
    cached = CachedCatalog(catalog)
    task = asyncio.create_task(CatalogFollower(catalog, cached, poll_s=0.005).run())
    try:
        yield cached
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def comes(asked: Callable[[], bool]) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(PATIENCE_S):
        while not asked():
            await asyncio.sleep(0.005)


async def limit_of(cached: CachedCatalog) -> str:
    tier = await cached.tier("free")
    assert tier is not None
    return tier.tier.limits[0].text


async def test_postgres(new_postgres: Callable[..., PostgresServer], tmp_path: Path) -> None:
    server = new_postgres()
    url = server.url("tidegate")
    here = {"SERVER": url.removesuffix("/tidegate"), "TIDEGATE_CATALOG__URL": url}
    async with opened(url) as catalog, following(catalog) as instance:
        writer = Writer(catalog)
        await writer.prepare()
        (take,) = commands("Take a backup")
        server.execute("CREATE TABLE of_another ()")
        with psycopg.connect(url) as another:
            another.execute("LOCK TABLE of_another")
            async with writer.writing():
                before = await catalog.version()
                taking = asyncio.create_task(run(take, tmp_path, **here))
                # It has its moment, and waits for a table; what comes from now on is not in it.
                waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'of_another'::regclass"
                await comes(lambda: server.execute(waiting) == [(1,)])
                moment = await catalog.version()
                begun = writer.changes
                await comes(lambda: writer.changes > begun + 5)
                another.rollback()
                await taking

        # The instance sees what comes after the backup.
        await writer.editor.edit_tier("writer", "free", ["777/day"], None)
        key = (await create_key(writer.editor, "writer", KeyCreate(tier="free"))).api_key
        lost = await catalog.version()
        await comes(lambda: instance.version == lost)
        assert await instance.caller(hash_api_key(key)) is not None
        assert await limit_of(instance) == "777/day"

        make, rename = commands("Restore it")
        await run(make, tmp_path, **here)
        async with opened(server.url("tidegate_restored")) as restored:
            version = await is_of_one_moment(restored, writer.rule_id)
            assert before <= version <= moment < lost
            await is_in_partitions(restored, writer.days)
            changes = await restored.changes(lost)
            assert (changes.version, changes.floor, changes.items) == (version, version, ())
            assert (await restored.changes(version)).items == ()

        # It takes the place of the one in use, under the eyes of the instance.
        await run(rename, tmp_path, **here)
        await comes(lambda: instance.version == version)
        assert await limit_of(instance) == "100/day"
        assert await instance.caller(hash_api_key(key)) is None
        await goes_on(catalog, writer.rule_id)
        assert await catalog.version() > lost, "no version is given twice"
        changes = await catalog.changes(lost)
        assert changes.floor == changes.version, "who has not seen it go back finds out later"


async def is_in_partitions(catalog: SqlCatalog, days: tuple[int, int]) -> None:
    """Each violation is in the partition of its day."""
    async with catalog.database.reading() as connection:
        there = await connection.execute(text("SELECT relname FROM pg_class WHERE relispartition AND relkind = 'r'"))
        filled = {"rate_limit_violations_default", *map(partition_of, days)}
        assert set(there.scalars()) > filled
        for partition in filled:
            assert (await connection.execute(text(f"SELECT count(*) FROM {partition}"))).scalar_one() > 0, partition


async def test_sqlite(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/tidegate.db"
    async with opened(url) as catalog:
        writer = Writer(catalog)
        await writer.prepare()
        (copy,) = commands("Copy the file")
        async with writer.writing():
            before = await catalog.version()
            await run(copy, tmp_path)
            after = await catalog.version()
        lost = await catalog.version()
    (back,) = commands("Put it back")
    await run(back, tmp_path)
    async with opened(url) as restored:
        version = await is_of_one_moment(restored, writer.rule_id)
        assert before <= version <= after < lost
        changes = await restored.changes(lost)
        assert (changes.version, changes.floor, changes.items) == (version, version, ())
        await goes_on(restored, writer.rule_id)


async def test_copying_the_file_of_a_running_sqlite_is_no_backup(tmp_path: Path) -> None:
    """Why the page says so: what was changed last is not in the file."""
    async with opened(f"sqlite:///{tmp_path}/tidegate.db") as catalog:
        await Writer(catalog).prepare()
        await run("cp tidegate.db copy.db", tmp_path)
    with contextlib.closing(sqlite3.connect(tmp_path / "copy.db")) as copied, pytest.raises(sqlite3.Error, match="no such table"):
        copied.execute("SELECT * FROM tiers").fetchall()


def test_the_page_reports_how_far_it_was_tried() -> None:
    page = PAGE.read_text()
    assert len(re.findall(r"```sh\n", page)) == 5
    assert [len(commands(heading)) for heading in ("Take a backup", "Restore it", "Copy the file", "Put it back")] == [1, 2, 1, 1]
    for word in ("archive_mode", "archive_command", "pg_basebackup", "restore_command", "recovery_target_time", "not tested"):
        assert word in page
