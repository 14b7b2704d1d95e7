"""Changes of the schema: forward, back, by many at once, and with the first version of Tidegate beside this one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sqlite3
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect, text
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.cases import first_version
from tests.integration.catalog_keys import editor_of, listed_keys, make_key
from tests.moments import PATIENCE_S
from tests.servers import forked
from tidegate.admin.api_keys import create_key, edit_key
from tidegate.admin.models import KeyCreate, KeyPatch
from tidegate.admin.rules import CatalogEditor
from tidegate.catalog.freshness import FreshnessTracker
from tidegate.catalog.sql.catalog import SqlCatalog
from tidegate.catalog.sql.engine import open_engine
from tidegate.catalog.sql.schema import downgrade, migration_config, upgrade, upgrade_schema
from tidegate.catalog.sql.tables import metadata
from tidegate.errors import SettingsError
from tidegate.violations.storage import maintain_table

pytestmark = pytest.mark.empty_database

Rows = dict[str, list[dict[str, Any]]]

FILLING = {
    **dict(zip(("tiers", "rate_limit_rules", "api_keys", "policy_state"), first_version.ROWS, strict=True)),
    "rate_limit_violations": """INSERT INTO rate_limit_violations (minute_us, tier, rule, subject, blocked)
        VALUES (60000000, 't', 'r', 's', 3)""",
    "shadow_violations": """INSERT INTO shadow_violations (minute_us, tier, rule, subject, blocked)
        VALUES (60000000, 't', 'r', 's', 3)""",
    "admin_tokens": "INSERT INTO admin_tokens (name, sha256, role, created_at_us) VALUES ('n', 'digest', 'viewer', 5)",
    "audit_log": """INSERT INTO audit_log (at_us, actor, action, kind, target, before, after)
        VALUES (6, 'me', 'update', 'tier', 'free', '{"limits": []}', 'null')""",
    "caller_tokens": """INSERT INTO caller_tokens (name, sha256, scopes, created_at_us)
        VALUES ('edge', 'digest', '["check"]', 5)""",
    "usage_ledger": """INSERT INTO usage_ledger (day_us, customer, key_id, tier, rule, admitted, blocked, over_limit)
        VALUES (0, '', 'k', 't', 'r', 3, 2, 1)""",
    "ledger_batches": "INSERT INTO ledger_batches (instance, sequence, written_at_us) VALUES ('i', 1, 5)",
    "traffic_minutes": """INSERT INTO traffic_minutes (minute_us, tier, rule, allowed, blocked, over_limit)
        VALUES (60000000, 't', 'r', 3, 2, 1)""",
    "traffic_hours": """INSERT INTO traffic_hours (hour_us, tier, rule, allowed, blocked, over_limit)
        VALUES (0, 't', 'r', 3, 2, 1)""",
    "traffic_callers": """INSERT INTO traffic_callers (hour_us, tier, rule, subject, allowed, blocked, over_limit)
        VALUES (0, 't', 'r', 's', 3, 2, 1)""",
    "traffic_latency": "INSERT INTO traffic_latency (step_s, at_us, bucket, checks) VALUES (60, 60000000, 4, 9)",
    "customers": """INSERT INTO customers (name, anchor, timezone, metadata, overrides, created_at_us, managed_by_file)
        VALUES ('acme', '', '', '', '[]', 5, false)""",
    "customer_values": "INSERT INTO customer_values (digest, customer_id, attribute) VALUES ('digest', 1, 'org')",
    "subject_overrides": "INSERT INTO subject_overrides (tier_id, entries) VALUES (1, '[]')",
    "blocks": """INSERT INTO blocks (kind, target, reason, message, created_at_us, created_by, version)
        VALUES ('cidr', '203.0.113.0/24', 'r', '', 5, 'me', 5)""",
    "console_sessions": """INSERT INTO console_sessions (sha256, token_sha256, created_at_us, used_at_us)
        VALUES ('session', 'digest', 5, 6)""",
    "what_if_runs": """INSERT INTO what_if_runs (id, actor, state, progress, created_at_us, changed_at_us, result)
        VALUES ('run', 'me', 'done', 1, 5, 6, '{"note": null}')""",
    "notifications": """INSERT INTO notifications (id, event, subject, url, body, status, attempts, created_at_us, next_at_us,
        give_up_at_us) VALUES ('msg_1', 'blocked', 'b:1', 'https://hooks.example', '{}', 'pending', 0, 5, 5, 9)""",
    "catalog_changes": "INSERT INTO catalog_changes (version, previous, kind, name) VALUES (7, 6, 'all', '')",
}
"""A row or more for every table, as the step that made it would have it."""


@pytest.fixture
async def engine(catalog_url: str) -> AsyncIterator[AsyncEngine]:
    made = open_engine(catalog_url)
    yield made
    await made.dispose()


def _scripts() -> list[str]:
    """All revisions, oldest first."""
    scripts = ScriptDirectory.from_config(migration_config(None))
    return [each.revision for each in scripts.walk_revisions()][::-1]


REVISIONS = _scripts()
HEAD = REVISIONS[-1]


async def _step(engine: AsyncEngine, how: Callable[..., None], revision: str) -> None:
    async with engine.begin() as connection:
        await connection.run_sync(lambda held: how(migration_config(held), revision))


async def _write(engine: AsyncEngine, *statements: str) -> None:
    async with engine.begin() as connection:
        for each in statements:
            await connection.execute(text(each))


def _partitions(connection: Connection) -> set[str]:
    if connection.dialect.name != "postgresql":
        return set()
    return set(connection.execute(text("SELECT relname FROM pg_class WHERE relispartition AND relkind = 'r'")).scalars())


def _tables(connection: Connection) -> list[str]:
    return sorted(set(inspect(connection).get_table_names()) - _partitions(connection) - {"alembic_version"})


async def _rows(engine: AsyncEngine) -> Rows:
    async with engine.connect() as connection:
        return {
            table: [dict(row) for row in (await connection.execute(text(f"SELECT * FROM {table} ORDER BY 1"))).mappings()]
            for table in await connection.run_sync(_tables)
        }


def _kept(before: Rows, after: Rows) -> None:
    """Tables that are there before and after hold the same, in the columns that are."""
    for table in before.keys() & after.keys():
        columns = before[table][0].keys() & after[table][0].keys()
        assert columns
        assert [{name: row[name] for name in columns} for row in after[table]] == [
            {name: row[name] for name in columns} for row in before[table]
        ], table


async def test_each_step_keeps_what_it_does_not_drop(catalog_url: str, engine: AsyncEngine) -> None:
    at: dict[str, Rows] = {}
    before: Rows = {}
    for revision in REVISIONS:
        await _step(engine, command.upgrade, revision)
        new = (await _rows(engine)).keys() - before.keys()
        assert new <= FILLING.keys(), f"add rows for the new tables of revision {revision} to FILLING"
        await _write(engine, *(FILLING[table] for table in FILLING if table in new))
        at[revision] = await _rows(engine)
        assert all(at[revision].values())
        _kept(before, at[revision])
        before = at[revision]
    assert before.keys() == metadata.tables.keys()
    for revision in [*REVISIONS[-2::-1], "base"]:
        await _step(engine, command.downgrade, revision)
        after = await _rows(engine)
        _kept(before, after)
        assert after.keys() == (at[revision].keys() if revision != "base" else set())
        assert {table: list(rows[0]) for table, rows in after.items()} == {
            table: list(rows[0]) for table, rows in at.get(revision, {}).items()
        }
        before = after
    # What was taken back is made again.
    assert await upgrade_schema(catalog_url, engine) == HEAD


def _reflected(connection: Connection) -> dict[str, Any]:
    """All that a database says of its tables, by name: in which order columns were added does not matter."""
    seen = inspect(connection)

    def by_name(described: list[Any]) -> dict[str, Any]:
        return {str(each["name"]): _plain(each) for each in described}

    return {
        table: {
            "columns": by_name(seen.get_columns(table)),
            "indexes": by_name(seen.get_indexes(table)),
            "unique": by_name(seen.get_unique_constraints(table)),
            "foreign": by_name(seen.get_foreign_keys(table)),
            "checks": by_name(seen.get_check_constraints(table)),
            "primary": by_name([seen.get_pk_constraint(table)]),
        }
        for table in metadata.tables
    }


def _plain(value: Any) -> Any:
    return {name: _plain(each) for name, each in value.items()} if isinstance(value, dict) else str(value)


async def test_migrations_make_what_the_tables_say(catalog_url: str, engine: AsyncEngine) -> None:
    assert await upgrade_schema(catalog_url, engine) == HEAD
    assert await upgrade_schema(catalog_url, engine) == HEAD
    catalog = await SqlCatalog.open(catalog_url)
    await maintain_table(catalog.database, 30)  # makes partitions
    await catalog.close()

    def compare(connection: Connection) -> Any:
        partitions = _partitions(connection)
        assert bool(partitions) == (engine.dialect.name == "postgresql")
        options = {
            "compare_type": True,
            "compare_server_default": True,
            "include_name": lambda name, kind, _: kind != "table" or name not in partitions,
        }
        return compare_metadata(MigrationContext.configure(connection, opts=options), metadata)

    def made_anew(connection: Connection) -> dict[str, Any]:
        command.downgrade(migration_config(connection), "base")
        metadata.create_all(connection)
        return _reflected(connection)

    async with engine.begin() as connection:
        assert await connection.run_sync(compare) == []
        migrated = await connection.run_sync(_reflected)
        # Alembic compares neither conditions of indexes nor checks: both ways lead to the same.
        assert migrated == await connection.run_sync(made_anew)
    partial = {name for name, index in migrated["api_keys"]["indexes"].items() if "where" in str(index)}
    assert {"idx_api_keys_status", "idx_api_keys_revoked"} <= partial
    assert migrated["policy_state"]["checks"].keys() == {"ck_policy_state_single_row"}


async def test_a_step_that_fails_leaves_nothing_behind(catalog_url: str, engine: AsyncEngine) -> None:
    await _step(engine, command.upgrade, "0001")
    # The second step adds columns and two tables, before it finds this one.
    await _write(engine, *first_version.ROWS, "CREATE TABLE audit_log (id INTEGER)")
    before = await _rows(engine)
    with pytest.raises(SettingsError, match="tables of another program"):
        await upgrade(catalog_url)
    assert await _rows(engine) == before
    await _write(engine, "DROP TABLE audit_log")
    assert await upgrade(catalog_url) == HEAD


async def test_what_the_first_version_wrote_reads_the_same(catalog_url: str, engine: AsyncEngine) -> None:
    await _step(engine, command.upgrade, first_version.REVISION)
    await _write(engine, *first_version.ROWS)
    catalog = await SqlCatalog.open(catalog_url)
    assert await catalog.list_tiers() == first_version.TIERS
    assert [(await catalog.tier(tier.name))[1] for tier in first_version.TIERS] == first_version.TIERS
    assert [(await catalog.api_key(key.sha256))[1] for key in first_version.KEYS] == first_version.KEYS
    listed = await listed_keys(catalog)
    assert [form["id"] for form in listed] == [key.id for key in first_version.KEYS]
    assert [form["created_at"] for form in listed] == [f"2023-11-14T22:13:20.00000{number}Z" for number in range(1, 5)]
    assert (listed[-1]["revoked_at"], listed[-1]["revoked_reason"]) == ("2023-11-14T22:13:20.000005Z", 'leaked: "x"')
    assert (await catalog.caller_policy())[1].anonymous_tier == first_version.ANONYMOUS
    assert await catalog.version() == first_version.VERSION
    changes = await catalog.changes(first_version.VERSION - 1)
    assert (changes.version, changes.floor, changes.items) == (first_version.VERSION, first_version.VERSION, ())
    assert (await catalog.changes(first_version.VERSION)).items == ()
    # The file is known as it was applied, and every row is changed as one of this version is.
    assert await catalog.apply_policy(None, first_version.DIGEST) is False  # type: ignore[arg-type]
    editor = editor_of(catalog)
    rule = await editor.edit_rule("me", 4, {"priority": 5}, {1})
    assert (rule.name, rule.revision, rule.limits) == ("l", 2, ["7/hour"])
    key = await edit_key(editor, "me", "c" * 24, KeyPatch(name="renamed"), {1})
    assert (key.name, key.revision, key.created_at) == ("renamed", 2, "2023-11-14T22:13:20.000003Z")
    items = (await catalog.changes(first_version.VERSION)).items
    assert [item for _, item in items] == [("tier", "own"), ("key", "c" * 64)]
    await catalog.close()


async def _tidegate(url: str, *arguments: str) -> tuple[int | None, str, str]:
    environment = {**os.environ, "TIDEGATE_CATALOG__URL": url}
    ran = await asyncio.to_thread(forked.run, ("db", *arguments), PATIENCE_S, env=environment)
    return ran.returncode, ran.stdout, ran.stderr


async def test_processes_that_start_at_once_on_a_new_database(catalog_url: str, engine: AsyncEngine) -> None:
    if engine.dialect.name == "postgresql":
        # A sequence goes on even where a transaction is rolled back: it counts the attempts too.
        await _write(
            engine,
            "CREATE SEQUENCE tables_made",
            """CREATE FUNCTION count_table() RETURNS event_trigger LANGUAGE plpgsql AS
               $$ BEGIN PERFORM nextval('public.tables_made'); END $$""",
            "CREATE EVENT TRIGGER counts ON ddl_command_end WHEN TAG IN ('CREATE TABLE') EXECUTE FUNCTION count_table()",
        )
    said = f"the database is at revision {HEAD}\n"
    assert await asyncio.gather(*(_tidegate(catalog_url, "upgrade") for _ in range(4))) == [(0, said, "")] * 4
    if engine.dialect.name == "postgresql":
        async with engine.begin() as connection:
            made = (await connection.execute(text("SELECT last_value FROM tables_made"))).scalar_one()
            tables = await connection.run_sync(lambda held: inspect(held).get_table_names())
            await connection.execute(text("DROP EVENT TRIGGER counts"))
        assert made == len(tables), "one process made all, no other began"
    catalog = await SqlCatalog.open(catalog_url)
    assert await catalog.version() == 0
    await catalog.close()


async def test_going_back(catalog_url: str, engine: AsyncEngine) -> None:
    await upgrade_schema(catalog_url, engine)
    await _write(engine, *first_version.ROWS)
    before = await _rows(engine)
    unknown = await _tidegate(catalog_url, "downgrade", "0815", "--yes")
    assert unknown == (2, "", f"tidegate: there is no revision '0815' of the schema: there are {', '.join(REVISIONS)}\n")
    assert await _rows(engine) == before, "nothing was done"
    assert await _tidegate(catalog_url, "downgrade", "0001", "--yes") == (0, "the database is at revision 0001\n", "")
    _kept(before, await _rows(engine))
    for revision in ("0001", "0002"):  # where it is, and what is not behind it
        if revision == "0001":
            assert await downgrade(catalog_url, revision) == revision
            continue
        with pytest.raises(SettingsError, match=r"is at revision 0001, which is before 0002: use 'tidegate db upgrade'"):
            await downgrade(catalog_url, revision)
    assert await upgrade(catalog_url) == HEAD
    catalog = await SqlCatalog.open(catalog_url)
    assert await catalog.list_tiers() == first_version.TIERS
    await catalog.close()


async def test_going_back_where_nothing_is(catalog_url: str) -> None:
    with pytest.raises(SettingsError, match=r"is empty, which is before 0001: use 'tidegate db upgrade'"):
        await downgrade(catalog_url, "0001")
    assert await upgrade(catalog_url) == HEAD


async def test_a_newer_schema(catalog_url: str, engine: AsyncEngine) -> None:
    await upgrade_schema(catalog_url, engine)
    await _write(engine, *first_version.ROWS, "UPDATE alembic_version SET version_num = '9999'")
    for runs_from in ("0001", HEAD):
        await _write(engine, f"UPDATE policy_state SET runs_from = '{runs_from}'")
        assert await upgrade(catalog_url) == "9999"
        catalog = await SqlCatalog.open(catalog_url)
        assert await catalog.list_tiers() == first_version.TIERS
        since = await catalog.version()
        _, key = await make_key(catalog, "own")
        assert [item[0] for _, item in (await catalog.changes(since)).items] == ["key"]
        assert any(form["id"] == key.id for form in await listed_keys(catalog))
        await catalog.close()
    await _write(engine, f"UPDATE policy_state SET runs_from = '{int(HEAD) + 1:04}'")
    for act in (upgrade(catalog_url), SqlCatalog.open(catalog_url), downgrade(catalog_url, "0002")):
        with pytest.raises(SettingsError) as refused:
            await act
        place = re.escape(catalog_url.replace("postgres@", ""))
        assert re.match(
            rf"the database {place} was made by a newer Tidegate: (run|downgrade it with) that version", str(refused.value)
        )
    await _write(engine, "ALTER TABLE policy_state DROP COLUMN runs_from")
    with pytest.raises(SettingsError, match="newer Tidegate"):
        await upgrade(catalog_url)


class _Old:
    """An instance of the first version, as far as the database sees it."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def change(self, number: int) -> None:
        async with self._engine.begin() as connection:
            for statement in (first_version.TAKE_TURN, *first_version.CHANGES):
                await connection.execute(text(statement.format(n=number)))

    async def read(self, number: int) -> list[list[Any]]:
        async with self._engine.connect() as connection:
            return [list(await connection.execute(text(each.format(n=number)))) for each in first_version.READS]


async def test_the_first_version_works_beside_this_one(catalog_url: str, engine: AsyncEngine) -> None:
    rounds = 20
    await _step(engine, command.upgrade, first_version.REVISION)
    old = _Old(engine)
    await old.change(1000)
    catalog = await SqlCatalog.open(catalog_url)
    versions: list[int] = []
    editor = CatalogEditor(catalog, lambda version, _: versions.append(version))
    await editor.create_tier("me", "new", ())
    rule = await editor.create_rule("me", "new", {"endpoint": "/new", "limits": ["1/s"]})
    made: list[str] = []

    async def old_ones() -> None:
        for number in range(rounds):
            await old.change(number)
            assert all((await old.read(number))[:-1])

    async def new_ones() -> None:
        for number in range(rounds):
            made.append((await create_key(editor, "me", KeyCreate(tier="new", name=str(number)))).id)
            await editor.edit_rule("me", rule.id, {"priority": number}, {number + 1})

    await asyncio.gather(old_ones(), new_ones(), _reading(old, catalog, rounds))
    # Each sees what the other wrote.
    for number in (*range(rounds), 1000):
        tier = (await catalog.tier(f"old-{number}"))[1]
        assert tier is not None
        assert [limit.text for limit in tier.rules[0].limits] == ["6/second"]
        key = (await catalog.api_key(f"{number:064x}"))[1]
        assert key is not None
        assert key.status == ("active" if number % 2 else "revoked")
    async with engine.connect() as connection:
        of_new = "SELECT count(*) FROM api_keys JOIN tiers ON tiers.id = api_keys.tier_id WHERE tiers.name = 'new'"
        assert (await connection.execute(text(of_new))).scalar_one() == rounds == len(set(made))
    assert versions == sorted(set(versions))
    # Rows that the old one made are changed as any other.
    edited = await edit_key(editor, "me", f"{3:024x}", KeyPatch(name="renamed"), {1})
    assert (edited.revision, edited.tier) == (2, "old-3")
    await catalog.close()


async def _reading(old: _Old, catalog: SqlCatalog, rounds: int) -> None:
    for number in range(rounds):
        await old.read(1000)
        await catalog.tier("new")
        await catalog.api_key(f"{number:064x}")
        await catalog.changes(0)


async def test_a_change_of_the_first_version_counts_as_one_of_everything(catalog_url: str, engine: AsyncEngine) -> None:
    catalog = await SqlCatalog.open(catalog_url)
    editor = editor_of(catalog)
    await editor.create_tier("me", "first", ())
    known = FreshnessTracker()
    known.note(await catalog.changes(0))
    since = known.version
    assert known.min_version("tier", "first") == since
    assert known.min_version("tier", "another") == 0

    await _Old(engine).change(1)
    changes = await catalog.changes(since)
    assert (changes.version, changes.floor, changes.items) == (since + 1, since + 1, ())
    known.note(changes)
    assert known.min_version("tier", "another") == since + 1, "whatever was cached before is not served"

    # One of ours behind it hides nothing of it from who has seen neither, and is itself told by name.
    await editor.create_tier("me", "second", ())
    changes = await catalog.changes(since)
    assert changes.floor == since + 1
    assert changes.items == ((changes.version, ("tier", "second")),)
    assert (await catalog.changes(since + 1)).floor == since + 1
    # And one of it between two of ours.
    seen = changes.version
    await editor.create_tier("me", "third", ())
    await _Old(engine).change(2)
    await editor.create_tier("me", "fourth", ())
    changes = await catalog.changes(seen)
    assert seen < changes.floor < changes.version
    assert [item for _, item in changes.items] == [("tier", "fourth")]
    await catalog.close()


def test_loops_of_several_threads_upgrade_at_once(tmp_path: Path) -> None:
    """Alembic keeps what it runs on in globals: the steps of one database must not be run on another."""

    async def some(names: str) -> list[str]:
        return list(await asyncio.gather(*(upgrade(f"sqlite:///{tmp_path}/{name}.db") for name in names)))

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(lambda names: asyncio.run(some(names)), ("abc", "def", "ghi", "abc"))) == [[HEAD] * 3] * 4
    for name in "abcdefghi":
        with contextlib.closing(sqlite3.connect(tmp_path / f"{name}.db")) as database:
            assert database.execute("SELECT version FROM policy_state").fetchall() == [(0,)]
