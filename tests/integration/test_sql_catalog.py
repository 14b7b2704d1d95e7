"""The catalog in a database: in a file of SQLite, and on PostgreSQL."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import sqlite3
import stat
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from sqlalchemy import event, select, text
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.cases import attributes
from tests.integration.catalog_keys import listed_keys, make_key, revoke_key
from tests.servers.postgres import PostgresServer
from tests.unit.test_policy_file import WHOLE
from tidegate.catalog.sql import database
from tidegate.catalog.sql.catalog import SqlCatalog
from tidegate.catalog.sql.engine import open_engine
from tidegate.catalog.sql.schema import upgrade, upgrade_schema
from tidegate.catalog.sql.tables import metadata
from tidegate.errors import CatalogError, CatalogUnavailable, SettingsError, TidegateError
from tidegate.policy.attributes import CallerPolicy
from tidegate.policy.key_format import hash_api_key
from tidegate.policy.model import KeyStatus
from tidegate.policy.toml_reader import parse_policy

OTHER = '[[tiers]]\nname = "other"\n[[api_keys]]\nkey = "demo-other-key-001"\ntier = "other"\n'


@pytest.fixture
async def catalog(catalog_url: str) -> AsyncIterator[SqlCatalog]:
    made = await SqlCatalog.open(catalog_url)
    yield made
    await made.close()


@pytest.fixture
async def engine(catalog_url: str) -> AsyncIterator[AsyncEngine]:
    made = open_engine(catalog_url)
    yield made
    await made.dispose()


async def test_policy_comes_back_as_it_went_in(catalog: SqlCatalog) -> None:
    policy = parse_policy(WHOLE)
    assert await catalog.version() == 0
    assert await catalog.apply_policy(policy, "1") is True
    assert await catalog.list_tiers() == list(policy.tiers)
    assert (await catalog.tier("free"))[1] == policy.tiers[0]
    assert [(await catalog.api_key(key.sha256))[1] for key in policy.api_keys] == list(policy.api_keys)
    assert (await catalog.caller_policy())[1].anonymous_tier == "free"
    assert (await catalog.tier("none"))[1] is None
    assert (await catalog.api_key("0" * 64))[1] is None


async def test_attributes_and_callers_come_back_as_they_went_in(catalog: SqlCatalog) -> None:
    policy = parse_policy(attributes.POLICY)
    await catalog.apply_policy(policy, "1")
    assert (await catalog.caller_policy())[1] == policy.caller_policy
    assert [(await catalog.tier(tier.name))[1] for tier in policy.tiers] == list(policy.tiers)
    assert sorted(await catalog.list_tiers(), key=lambda tier: tier.name) == sorted(policy.tiers, key=lambda tier: tier.name)
    # Without a match, and with another subject, nothing of the old ones stays.
    changed = parse_policy(attributes.POLICY.replace('match = { region = "eu-*", plan = "pro" }', 'name = "POST /api/*"'))
    await catalog.apply_policy(changed, "2")
    assert (await catalog.tier("pro"))[1] == changed.tiers[1]
    await catalog.apply_policy(parse_policy(OTHER), "3")
    assert (await catalog.caller_policy())[1] == CallerPolicy()


async def test_applying_is_idempotent_and_follows_the_file(catalog: SqlCatalog) -> None:
    policy = parse_policy(WHOLE)
    await catalog.apply_policy(policy, "1")
    first = await catalog.version()
    assert await catalog.apply_policy(policy, "1") is False
    assert await catalog.version() == first
    changed = parse_policy(WHOLE.replace('endpoint = "/x"', 'endpoint = "/y"').replace('rule = "/x"', 'rule = "/y"') + OTHER)
    assert await catalog.apply_policy(changed, "2") is True
    assert {tier.name: tier for tier in await catalog.list_tiers()} == {tier.name: tier for tier in changed.tiers}
    assert await catalog.apply_policy(parse_policy(OTHER), "3") is True
    assert [tier.name for tier in await catalog.list_tiers()] == ["other"]
    assert (await catalog.api_key(policy.api_keys[0].sha256))[1] is None
    assert (await catalog.caller_policy())[1].anonymous_tier is None
    assert await catalog.version() > first + 1


async def test_a_file_is_applied_in_few_statements(catalog: SqlCatalog) -> None:
    """A rule that is put before a thousand others moves them all."""
    rule = '[[tiers.rules]]\nendpoint = "/{}"\nlimits = ["1/s"]\n'
    rules = "".join(rule.format(number) for number in range(1_000))
    keys = "".join(f'[[api_keys]]\nsha256 = "{number << 200:064x}"\ntier = "t"\n' for number in range(1_000))
    revoked = keys.replace("tier", "status = 'revoked'\ntier")
    statements: list[str] = []
    event.listen(
        catalog.database._writer.sync_engine, "before_cursor_execute", lambda *arguments: statements.append(arguments[2])
    )
    for file in (
        f'[[tiers]]\nname = "t"\n{rules}{keys}',
        f'[[tiers]]\nname = "t"\n{rule.format("first")}{rules}{revoked}',
        f'[[tiers]]\nname = "t"\n{rule.format("9")}',
    ):
        statements.clear()
        policy = parse_policy(file)
        assert await catalog.apply_policy(policy, str(len(file)))
        assert len(statements) < 60
        (tier,) = await catalog.list_tiers()
        assert tier == policy.tiers[0]
        for api_key in policy.api_keys[:3]:
            assert (await catalog.api_key(api_key.sha256))[1] == api_key


async def test_rows_made_otherwise_stay(catalog: SqlCatalog) -> None:
    await catalog.apply_policy(parse_policy(WHOLE), "1")
    in_an_hour_us = int((time.time() + 3600) * 1e6)
    api_key, record = await make_key(catalog, "free", name="acme", expires_at_us=in_an_hour_us)
    assert (await catalog.api_key(hash_api_key(api_key)))[1] == record
    await catalog.apply_policy(parse_policy(WHOLE.replace("20000", "30000")), "2")
    assert (await catalog.api_key(record.sha256))[1] == record
    # The file may not take the tier away from under the key, nor claim the key.
    version = await catalog.version()
    with pytest.raises(CatalogError, match="still use it"):
        await catalog.apply_policy(parse_policy(OTHER), "3")
    claim = f'[[api_keys]]\nsha256 = "{record.sha256}"\ntier = "free"\n'
    with pytest.raises(CatalogError, match="belongs to the catalog"):
        await catalog.apply_policy(parse_policy(WHOLE + claim), "4")
    assert await catalog.version() == version
    assert [tier.name for tier in await catalog.list_tiers()] == ["free"], "a refused policy leaves nothing behind"
    assert (await catalog.api_key(hash_api_key("demo-other-key-001")))[1] is None


async def test_the_file_does_not_take_over_tiers_and_rules_of_operators(catalog: SqlCatalog, engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.execute(text("INSERT INTO tiers (name, limits, managed_by_file) VALUES ('free', '[]', false)"))
    with pytest.raises(CatalogError, match="tier 'free'"):
        await catalog.apply_policy(parse_policy(OTHER + WHOLE), "1")
    assert [tier.name for tier in await catalog.list_tiers()] == ["free"]
    assert await catalog.version() == 0


async def test_keys_are_made_listed_and_revoked(catalog: SqlCatalog, engine: AsyncEngine, tmp_path: Path) -> None:
    await catalog.apply_policy(parse_policy(OTHER), "1")
    made = [await make_key(catalog, "other", name=f"n{number}") for number in range(5)]
    with pytest.raises(CatalogError, match="there are other"):
        await make_key(catalog, "none")
    first = await listed_keys(catalog, limit=4)
    rest = await listed_keys(catalog, limit=4, after=first[-1]["id"])
    assert [form["id"] for form in first + rest] == sorted(form["id"] for form in first + rest)
    assert {form["id"] for form in first + rest} >= {record.id for _, record in made}
    assert await listed_keys(catalog, tier="none") == []

    for _, record in made[:3]:
        await revoke_key(catalog, record.id, "leaked")
        assert (await catalog.api_key(record.sha256))[1] == msgspec.structs.replace(record, status=KeyStatus.REVOKED)
    (form,) = [form for form in await listed_keys(catalog) if form["id"] == made[0][1].id]
    assert form["revoked_reason"] == "leaked"
    assert form["revoked_at"] is not None
    for key, reason, said in (
        (made[0][1].id, "x", "already"),
        ("abc", "x", "not the id"),
        ("0" * 24, "x", "no API key"),
        ("%", "x", "not the id"),
        (hash_api_key("demo-other-key-001")[:24], "x", "policy file"),
        (made[3][1].id, " ", "reason"),
    ):
        with pytest.raises(TidegateError, match=said):
            await revoke_key(catalog, key, reason)
    async with engine.connect() as connection:
        rows = [str((await connection.execute(select(table))).all()) for table in metadata.sorted_tables]
    stored = "".join(rows).encode() + _files(tmp_path)
    assert all(record.sha256.encode() in stored for _, record in made)
    assert all(api_key.encode() not in stored for api_key, _ in made), "no key is stored"


@pytest.mark.parametrize("hostile", ["'; DROP TABLE tiers; --", '" OR 1=1', "%_\\", "𝕏" * 50, "${x}{{y}}", "عربي😀"])
async def test_hostile_texts_are_texts(hostile: str, catalog: SqlCatalog) -> None:
    await catalog.apply_policy(parse_policy(OTHER), "1")
    _, record = await make_key(catalog, "other", name=hostile)
    revoked = await revoke_key(catalog, record.id, hostile + "x")
    assert (revoked["name"], revoked["revoked_reason"]) == (hostile, hostile + "x")
    assert (await catalog.api_key(record.sha256))[1] == msgspec.structs.replace(record, status=KeyStatus.REVOKED)
    assert (await catalog.tier(hostile))[1] is None
    assert (await catalog.api_key(hostile))[1] is None
    assert await listed_keys(catalog, tier=hostile) == []
    with pytest.raises(CatalogError):
        await make_key(catalog, hostile)
    with pytest.raises(CatalogError):
        await revoke_key(catalog, hostile, "x")
    assert len(await catalog.list_tiers()) == 1


async def test_two_processes_see_each_other(catalog: SqlCatalog, catalog_url: str) -> None:
    other = await SqlCatalog.open(catalog_url)
    await catalog.apply_policy(parse_policy(OTHER), "1")
    applied = await other.version()
    assert applied > 0
    _, record = await make_key(other, "other")
    assert await catalog.version() > applied
    assert (await catalog.api_key(record.sha256))[1] == record
    await other.close()


async def test_writers_take_turns(catalog_url: str) -> None:
    """Eight catalogs open one new database and apply policies at once: all are applied, none by halves."""
    catalogs = await asyncio.gather(*(SqlCatalog.open(catalog_url) for _ in range(8)))
    policies = [parse_policy(WHOLE.replace("20000", str(1000 + number))) for number in range(8)]
    changed = await asyncio.gather(
        *(each.apply_policy(policy, str(n)) for n, (each, policy) in enumerate(zip(catalogs, policies, strict=True)))
    )
    assert all(changed)
    async with catalogs[0].database.reading() as connection:
        assert (await connection.execute(text("SELECT count(DISTINCT version) FROM catalog_changes"))).scalar() == 8
    assert (await catalogs[0].list_tiers())[0] in {policy.tiers[0] for policy in policies}
    same = await asyncio.gather(*(each.apply_policy(policies[0], "same") for each in catalogs))
    assert sum(same) == 1
    keys = await asyncio.gather(*(make_key(each, "free") for each in catalogs for _ in range(5)))
    assert len({key for key, _ in keys}) == len(await listed_keys(catalogs[0], limit=500)) - 2 == 40
    for each in catalogs:
        await each.close()


async def test_a_rejected_look_is_taken_again(tmp_path: Path) -> None:
    """SQLite refuses one of two that make a file a WAL one at once, without waiting: a race, so here it is refused on purpose."""
    url = f"sqlite:///{tmp_path}/new.db"
    refused = [True, True]
    engine = open_engine(url)

    def refuse(*_: object) -> None:
        if refused:
            refused.pop()
            _locked(tmp_path / "held.db")

    event.listen(engine.sync_engine, "do_connect", refuse)
    assert await upgrade_schema(url, engine) == await upgrade(url)
    assert not refused
    await engine.dispose()


@pytest.mark.parametrize("catalog_url", ["sqlite"], indirect=True)
async def test_look_ups_use_indexes(catalog: SqlCatalog, engine: AsyncEngine) -> None:
    """What `test_postgres_plans` asks of the statements that the code really makes."""
    await catalog.apply_policy(parse_policy(WHOLE), "1")
    queries = {
        "key": "SELECT * FROM api_keys JOIN tiers ON tiers.id = api_keys.tier_id WHERE api_keys.sha256 = 'x'",
        "tier": "SELECT * FROM tiers WHERE name = 'x'",
        "rules": "SELECT * FROM rate_limit_rules WHERE tier_id = 1 ORDER BY position, id",
        "prefix": "SELECT * FROM api_keys WHERE id >= 'abc' AND id < 'abcg'",
        "active": "SELECT * FROM api_keys WHERE status = 'active'",
    }
    async with engine.connect() as connection:
        for name, query in queries.items():
            plan = [str(row[3]) for row in await connection.execute(text("EXPLAIN QUERY PLAN " + query))]
            assert not any(step.startswith("SCAN") for step in plan), (name, plan)
        indexes = [row[0] for row in await connection.execute(text("SELECT name FROM sqlite_master WHERE type = 'index'"))]
    assert {"idx_rules_tier_endpoint", "idx_api_keys_status"} <= set(indexes)


async def test_files_have_mode_600(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        made = await SqlCatalog.open(f"sqlite:///{tmp_path}/new.db")
        await made.apply_policy(parse_policy(OTHER), "1")
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in _listed(tmp_path)}
        await made.close()
        assert modes == dict.fromkeys(modes, 0o600)
        assert {"new.db", "new.db-wal"} <= modes.keys()
        # One whose mode was chosen by somebody keeps it.
        (tmp_path / "new.db").chmod(0o640)
        await (await SqlCatalog.open(f"sqlite:///{tmp_path}/new.db")).close()
        assert [stat.S_IMODE(path.stat().st_mode) for path in _listed(tmp_path) if path.name == "new.db"] == [0o640]
    finally:
        os.umask(old)


async def test_databases_that_cannot_be_had(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("this is no database, but long enough to look at " * 100)
    (tmp_path / "file").write_text("")
    newer = open_engine(f"sqlite:///{tmp_path}/newer.db")
    await upgrade_schema("sqlite://", newer)
    async with newer.begin() as connection:
        await connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
        await connection.execute(text("UPDATE policy_state SET runs_from = '9999'"))
    await newer.dispose()
    for url, said in (
        (f"sqlite:///{tmp_path}", "unable to open"),
        (f"sqlite:///{tmp_path}/file/x.db", "directory that is there"),
        (f"sqlite:///{tmp_path}/absent/x.db", "directory that is there"),
        (f"sqlite:///{tmp_path}/text.db", "not a SQLite database"),
        (f"sqlite:///{tmp_path}/newer.db", "newer Tidegate"),
        ("mysql://user:secret@h/db", "'mysql'"),
        ("nonsense", "not a valid database URL"),
    ):
        with pytest.raises(SettingsError) as refused:
            await upgrade(url)
        assert said in refused.value.message
        assert "secret" not in refused.value.message
        assert "\n" not in refused.value.message


async def test_database_that_goes_away(catalog: SqlCatalog, engine: AsyncEngine) -> None:
    await catalog.apply_policy(parse_policy(OTHER), "1")
    async with engine.begin() as connection:
        await connection.execute(text("DROP TABLE policy_state"))
    with pytest.raises(CatalogUnavailable, match=r"no such table|does not exist"):
        await catalog.ping()
    with pytest.raises(CatalogUnavailable, match="rejected the change"):
        await make_key(catalog, "other")


@pytest.mark.parametrize("catalog_url", ["sqlite"], indirect=True)
async def test_health_reports_a_full_disk(catalog: SqlCatalog, tmp_path: Path) -> None:
    """The system refuses to let files grow, as it does where the disk is full."""
    await catalog.apply_policy(parse_policy(OTHER), "1")
    await catalog.ping()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
    try:
        with pytest.raises(CatalogUnavailable, match="rejected the change"):
            await make_key(catalog, "other")
        for _ in range(2):
            with pytest.raises(CatalogUnavailable, match="is not writable"):
                await catalog.ping()
        assert await catalog.version()  # it still reads
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    await catalog.ping()
    await make_key(catalog, "other")


@pytest.mark.parametrize("catalog_url", ["sqlite"], indirect=True)
async def test_health_detects_a_full_disk_without_writes(catalog: SqlCatalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "WRITE_PROBE_S", 0.0)
    version = await catalog.version()
    await catalog.ping()
    async with catalog.database.changing() as writing:
        writing.touch("none")
        await catalog.ping()  # whoever writes now is not waited for, and no fault
    assert await catalog.version() > version
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
    try:
        with pytest.raises(CatalogUnavailable, match="is not writable"):
            await catalog.ping()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    await catalog.ping()


async def test_health_reports_a_read_only_postgres(postgres_server: PostgresServer, postgres_url: str) -> None:
    name = postgres_url.rpartition("/")[2]
    owner = await SqlCatalog.open(postgres_url)
    await owner.close()
    postgres_server.execute("CREATE ROLE reader LOGIN", name)
    try:
        for grant in ("USAGE, CREATE ON SCHEMA public", "SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public"):
            postgres_server.execute(f"GRANT {grant} TO reader", name)
        catalog = await SqlCatalog.open(postgres_url.replace("postgres@", "reader@"))
        await catalog.ping()
        postgres_server.execute("REVOKE UPDATE ON policy_state FROM reader", name)
        with pytest.raises(CatalogUnavailable, match="rejected the change"):
            await catalog.apply_policy(parse_policy(OTHER), "1")
        with pytest.raises(CatalogUnavailable, match="is not writable"):
            await catalog.ping()
        postgres_server.execute("GRANT UPDATE ON policy_state TO reader", name)
        await catalog.ping()
        await catalog.close()
    finally:
        postgres_server.execute("DROP OWNED BY reader", name)
        postgres_server.execute("DROP ROLE reader", name)


async def test_in_memory() -> None:
    catalog = await SqlCatalog.open("sqlite://")
    await catalog.apply_policy(parse_policy(OTHER), "1")
    _, record = await make_key(catalog, "other")
    assert (await catalog.api_key(record.sha256))[1] == record
    await catalog.close()


def _locked(file: Path) -> None:
    """What SQLite says where another holds the file."""
    with contextlib.closing(sqlite3.connect(file)) as holder, contextlib.closing(sqlite3.connect(file, timeout=0)) as other:
        holder.execute("BEGIN EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")


def _listed(directory: Path) -> list[Path]:
    return sorted(directory.iterdir())


def _files(directory: Path) -> bytes:
    return b"".join(path.read_bytes() for path in directory.iterdir())
