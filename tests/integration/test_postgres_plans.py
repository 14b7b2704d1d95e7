"""How PostgreSQL and SQLite answer what the code really asks them, with many rows: 60,000 API keys, 11,000 rules.

The statements are those that the catalog sends, heard on their way. On PostgreSQL each is planned as it is for the first time,
and as a connection that has asked it often plans it, without looking at the values any more; and each plan is run, for a walk
over a whole index would look well otherwise.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, NamedTuple

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import event
from sqlalchemy.engine import Engine

from tests.servers.postgres import PostgresServer
from tidegate.admin import api_keys as editing_keys
from tidegate.admin import lists as reading
from tidegate.admin import tokens
from tidegate.admin.lists import STRIDE
from tidegate.admin.models import KeyCreate, KeyPatch, RevokeRequest
from tidegate.admin.notifications import list_notifications
from tidegate.admin.rules import CatalogEditor
from tidegate.catalog.sql.catalog import SqlCatalog
from tidegate.catalog.sql.paging import cursor_of
from tidegate.ledger.export import LedgerFilter, read_ledger
from tidegate.notifications.storage import claim
from tidegate.policy.toml_reader import parse_policy
from tidegate.violations.queries import DAY_US, ViolationFilter, blocked_total, list_violations, top_violators

KEYS = 60_000
TIERS = 4_000
BIG_TIER = "tier-1"
"""Has half of all keys."""
RULES_TIER = "tier-101"
"""Has 1,000 rules; a hundred others have 100 each."""
REVOKED = 10_007
EXPIRED = 10_009
"""One key of so many is revoked, or expired: 5 among 60,000 are rare."""
START_US = 1_700_006_400_000_000
"""Midnight, and the first minute with violations."""
HOUR_US = DAY_US // 24

# Rows in the order of the primary key, and foreign keys not checked one by one: a third of the time.
FILLING = f"""
SET session_replication_role = replica;
INSERT INTO tiers (name, limits, managed_by_file) SELECT 'tier-' || n, '[]', false FROM generate_series(1, {TIERS}) n;
INSERT INTO customers (name, anchor, timezone, metadata, overrides, created_at_us, managed_by_file)
  SELECT 'customer-' || n, '', '', '', '[]', 5, false FROM generate_series(1, 20000) n;
INSERT INTO subject_overrides SELECT n, '[]' FROM generate_series(1, {TIERS}) n;
INSERT INTO rate_limit_rules (tier_id, name, endpoint_pattern, methods, algorithm, limits, subject, priority, mode, on_failure,
    position, managed_by_file)
SELECT t, 'rule ' || n, '/api/' || n, '[]', 'sliding_window', '["1/second"]', 'api_key', 0, 'enforce', 'default', n, false
FROM generate_series(1, 101) t, generate_series(1, 1000) n WHERE n <= 100 OR t = 101;
INSERT INTO api_keys (id, sha256, tier_id, name, status, expires_at_us, overrides, created_at_us, managed_by_file)
SELECT substr(digest, 1, 24), digest, CASE WHEN n % 2 = 0 THEN 1 ELSE 2 + n % 3000 END, 'key ' || n,
    CASE WHEN n % {REVOKED} = 0 THEN 'revoked' ELSE 'active' END,
    CASE WHEN n % {EXPIRED} = 0 THEN 1 WHEN n % 10 = 1 THEN 4000000000000000 END, '[]', 1, n % 20011 = 0
FROM (SELECT n, encode(sha256(n::text::bytea), 'hex') AS digest FROM generate_series(1, {KEYS}) n ORDER BY 2) made;
INSERT INTO audit_log (at_us, actor, action, kind, target)
SELECT n, 'actor ' || n % 500, 'update', CASE WHEN n % 100 = 0 THEN 'rule' ELSE 'api_key' END, 'target ' || n % 10000
FROM generate_series(1, 50000) n;
INSERT INTO admin_tokens (name, sha256, role, created_at_us)
SELECT 'token ' || n, encode(sha256(n::text::bytea), 'hex'), 'viewer', 1 FROM generate_series(1, 5000) n;
INSERT INTO catalog_changes SELECT now_ms - 60000 + n, now_ms - 60001 + n, 'key', encode(sha256(n::text::bytea), 'hex')
FROM generate_series(1, 20000) n, (SELECT (extract(epoch FROM now()) * 1000)::bigint AS now_ms) clock;
UPDATE policy_state SET (version, previous) = (SELECT max(version), max(previous) FROM catalog_changes);
INSERT INTO rate_limit_violations (minute_us, tier, rule, subject, blocked)
SELECT {START_US} + n % 2880 * 60000000::bigint, 'tier-1', 'rule ' || n % 100, 'k:' || lpad((n % 1000)::text, 24, '0'), 1
FROM generate_series(1, 60000) n ON CONFLICT DO NOTHING;
INSERT INTO shadow_violations (minute_us, tier, rule, subject, blocked)
SELECT minute_us, tier, rule, subject, blocked FROM rate_limit_violations WHERE minute_us < {START_US + HOUR_US};
INSERT INTO usage_ledger (day_us, customer, key_id, tier, rule, admitted, blocked, over_limit)
SELECT {START_US} + n % 30 * 86400000000::bigint, 'customer ' || n % 1000, lpad((n % 5000)::text, 24, '0'), 'tier-1',
    'rule ' || n % 100, 1, 0, 0
FROM generate_series(1, 60000) n ON CONFLICT DO NOTHING;
INSERT INTO notifications (id, event, subject, url, body, status, attempts, created_at_us, next_at_us, give_up_at_us)
SELECT 'msg_' || n, 'threshold', 'k:' || n % 5000, 'https://hooks.example/' || n % 3, '{{}}',
    CASE WHEN n % 100 = 0 THEN 'pending' WHEN n % 1000 = 1 THEN 'failed' ELSE 'delivered' END, 1, n, n, 4000000000000000
FROM generate_series(1, 50000) n;
ANALYZE;
"""


class Server(NamedTuple):
    """The filled database, and a key in it."""

    url: str
    key_id: str
    sha256: str


@pytest.fixture(scope="module")
def filled_server() -> Iterator[PostgresServer]:
    # Statistics stay as ANALYZE makes them.
    # 150,000 rows are looked at for statistics: of fewer, a rare value would be found now, and now not.
    statistics = {"autovacuum": "off", "jit": "off", "default_statistics_target": 500}
    # As on any disk without an arm: else how many keys the sample makes out to be revoked decides between two ways of joining.
    statistics["random_page_cost"] = 1.1
    filling = {"shared_buffers": "256MB", "work_mem": "64MB", "max_wal_size": "4GB", "wal_level": "minimal", "max_wal_senders": 0}
    with PostgresServer({**statistics, **filling, "full_page_writes": "off"}) as server:
        yield server


@pytest.fixture(scope="module")
def filled(filled_server: PostgresServer) -> dict[str, Any]:
    """Filled by the first test that opens a catalog on it."""
    return {"url": filled_server.url(), "server": filled_server}


@pytest.fixture
async def database(filled: dict[str, Any]) -> AsyncIterator[tuple[SqlCatalog, Server]]:
    catalog = await SqlCatalog.open(filled["url"])
    if "key" not in filled:
        filled["server"].execute(FILLING)
        ((filled["key"], filled["sha256"]),) = filled["server"].execute("SELECT id, sha256 FROM api_keys OFFSET 17777 LIMIT 1")
    yield catalog, Server(filled["url"], filled["key"], filled["sha256"])
    await catalog.close()


class LookUp(NamedTuple):
    """Something that is asked of the catalog, and how it is to be answered.

    Attributes:
        ask: does it.
        indexes: of which one is in the plan of some statement.
        rows: so many the plan of each statement may look at, and so, too, put in order.
    """

    ask: Callable[[SqlCatalog, CatalogEditor, Server], Awaitable[Any]]
    indexes: tuple[str, ...]
    rows: int = 300


def _keys(after: str | None = None, **filters: Any) -> Callable[..., Awaitable[Any]]:
    return lambda catalog, editor, server: reading.list_keys(editor, 100, after, **filters)


def _rules(after: str | None = None, **filters: Any) -> Callable[..., Awaitable[Any]]:
    return lambda catalog, editor, server: reading.list_rules(editor, 100, after, **filters)


def _audit(after: str | None = None, **filters: Any) -> Callable[..., Awaitable[Any]]:
    return lambda catalog, editor, server: reading.list_audit(editor, 100, after, **filters)


def _violations(until_us: int, after: str | None = None, **filters: Any) -> Callable[..., Awaitable[Any]]:
    return lambda catalog, editor, server: list_violations(
        catalog.database, 100, after, ViolationFilter(START_US, until_us, **filters)
    )


SUBJECT = "k:" + "77".rjust(24, "0")
MIDDLE = "8" * 24


def _usage(after: str | None = None, **filters: Any) -> Callable[..., Awaitable[Any]]:
    selected = LedgerFilter(START_US, START_US + 31 * DAY_US, **filters)
    return lambda catalog, editor, server: read_ledger(catalog.database, selected, after, 100)


def _notifications(after: str | None = None, **filters: Any) -> Callable[..., Awaitable[Any]]:
    return lambda catalog, editor, server: list_notifications(editor, 100, after, **filters)


USAGE_PLACE = cursor_of((START_US + 20 * DAY_US, "customer 5", "0" * 24, "tier-1", "rule 5"))
BY_DAY = ("usage_ledger_default_pkey", "pk_usage_ledger")
BY_CUSTOMER = ("usage_ledger_default_customer_day_us_idx",)
PLACE = cursor_of((START_US + 20 * HOUR_US, "tier-1", "rule 5", "k:"))
TODAY_US = START_US + DAY_US
BY_KEY = ("pk_api_keys",)
BY_TIER = ("idx_api_keys_tier_id",)
BY_EITHER = ("idx_api_keys_tier_id", "pk_api_keys")
RULES_OF_TIER = ("idx_rules_tier_id", "idx_rules_tier_endpoint", "uq_rate_limit_rules_tier_id_name")
BY_MINUTE = ("rate_limit_violations_default_pkey", "pk_rate_limit_violations")
BY_SHADOW_MINUTE = ("shadow_violations_default_pkey", "pk_shadow_violations")
BY_SHADOW_SUBJECT = ("shadow_violations_default_subject_minute_us_idx", "idx_shadow_violations_subject_minute")
PLACE_IN_SHADOW = cursor_of((START_US + HOUR_US // 2, "tier-1", "rule 5", "k:"))
BY_SUBJECT = ("rate_limit_violations_default_subject_minute_us_idx", "idx_violations_subject_minute")

LOOK_UPS = {
    # What checks ask.
    "a key": LookUp(lambda catalog, editor, server: catalog.api_key(server.sha256), ("uq_api_keys_sha256",), 10),
    "an unknown key": LookUp(lambda catalog, editor, server: catalog.api_key("0" * 64), ("uq_api_keys_sha256",), 10),
    "a tier": LookUp(lambda catalog, editor, server: catalog.tier("tier-7"), ("uq_tiers_name",), 110),
    "a tier of 1,000 rules": LookUp(
        lambda catalog, editor, server: catalog.tier(RULES_TIER), RULES_OF_TIER, 1010
    ),
    "the anonymous tier": LookUp(lambda catalog, editor, server: catalog.caller_policy(), (), 1),
    "the last changes": LookUp(
        lambda catalog, editor, server: _after_version(catalog, 100), ("pk_catalog_changes",), 250
    ),
    "all changes": LookUp(lambda catalog, editor, server: catalog.changes(0), ("pk_catalog_changes",), 20_010),
    # Pages of API keys.
    "keys": LookUp(_keys(), BY_KEY),
    "keys after a place": LookUp(_keys(MIDDLE), BY_KEY),
    "keys of a tier": LookUp(_keys(tier="tier-7"), BY_TIER),
    "keys of a big tier": LookUp(_keys(tier=BIG_TIER), BY_EITHER),
    "keys of a big tier after a place": LookUp(_keys(MIDDLE, tier=BIG_TIER), BY_EITHER),
    "keys of no tier": LookUp(_keys(tier="nobody's"), BY_TIER, 10),
    "active keys": LookUp(_keys(status="active"), BY_KEY),
    "active keys of a tier": LookUp(_keys(status="active", tier=BIG_TIER), BY_EITHER),
    "revoked keys": LookUp(_keys(status="revoked"), ("idx_api_keys_revoked",)),
    "revoked keys after a place": LookUp(_keys(MIDDLE, status="revoked"), ("idx_api_keys_revoked",)),
    "revoked keys of a tier": LookUp(_keys(status="revoked", tier=BIG_TIER), ("idx_api_keys_revoked",)),
    "expired keys": LookUp(_keys(status="expired"), ("idx_api_keys_expires",)),
    "expired keys after a place": LookUp(_keys(MIDDLE, status="expired"), ("idx_api_keys_expires",)),
    "keys by the beginning of an id": LookUp(_keys(id_prefix="abcd"), BY_KEY),
    "keys with a frequent text": LookUp(_keys(name="KEY 7"), BY_KEY, 2 * STRIDE),
    "keys with a rare text": LookUp(_keys(name="key 999999"), BY_KEY, 2 * STRIDE + 10),
    "keys of a tier with no such text": LookUp(_keys(name="nothing", tier=BIG_TIER), BY_EITHER, 2 * STRIDE + 10),
    "one key": LookUp(lambda catalog, editor, server: reading.key_row(editor, server.key_id), BY_KEY, 10),
    # Pages of tiers and rules.
    "tiers": LookUp(lambda catalog, editor, server: reading.list_tiers(editor, 100, None), ("uq_tiers_name",)),
    "tiers after a place": LookUp(lambda catalog, editor, server: reading.list_tiers(editor, 100, "tier-5"), ("uq_tiers_name",)),
    "tiers with no such text": LookUp(
        lambda catalog, editor, server: reading.list_tiers(editor, 100, None, "nothing"), ("uq_tiers_name",), 2 * STRIDE
    ),
    "rules": LookUp(_rules(), ("pk_rate_limit_rules",)),
    "rules after a place": LookUp(_rules("5000"), ("pk_rate_limit_rules",)),
    "rules of a tier": LookUp(_rules(tier="tier-7"), ("idx_rules_tier_id",)),
    "rules of a tier of 1,000": LookUp(_rules(tier=RULES_TIER), ("idx_rules_tier_id",)),
    "rules with no such text": LookUp(_rules(endpoint="nothing", name="no"), ("pk_rate_limit_rules",), 2 * STRIDE),
    "one rule": LookUp(lambda catalog, editor, server: reading.get_rule(editor, 5), ("pk_rate_limit_rules",), 10),
    # Records.
    "tokens": LookUp(lambda catalog, editor, server: reading.list_tokens(editor, 100, "50"), ("pk_admin_tokens",)),
    "a token": LookUp(
        lambda catalog, editor, server: tokens.TokenCheck(editor, None).principal("tga_" + "a" * 40),
        ("uq_admin_tokens_sha256",),
        1,
    ),
    "the audit log": LookUp(_audit(), ("pk_audit_log",)),
    "the audit log of a thing": LookUp(_audit(kind="api_key", target="target 77"), ("idx_audit_log_kind_target",)),
    "the audit log of a thing after a place": LookUp(
        _audit("25000", kind="api_key", target="target 77"), ("idx_audit_log_kind_target", "idx_audit_log_target")
    ),
    "the audit log of a target": LookUp(_audit(target="target 78"), ("idx_audit_log_target",)),
    "the audit log of an actor": LookUp(_audit(actor="actor 9"), ("idx_audit_log_actor",)),
    "the audit log of a kind": LookUp(_audit(kind="rule"), ("pk_audit_log", "idx_audit_log_kind_target"), 12_000),
    "the audit log of a kind that is not there": LookUp(_audit(kind="none"), ("idx_audit_log_kind_target",), 10),
    "violations": LookUp(_violations(START_US + HOUR_US), BY_MINUTE, 400),
    "violations of a day": LookUp(_violations(TODAY_US), BY_MINUTE, 400),
    "violations after a place": LookUp(_violations(TODAY_US, PLACE), BY_MINUTE, 600),
    "violations of a subject": LookUp(_violations(TODAY_US, subject=SUBJECT), BY_SUBJECT),
    "violations of a rule": LookUp(_violations(TODAY_US, rule="rule 8"), BY_MINUTE, 400),
    "shadow violations after a place": LookUp(_violations(TODAY_US, PLACE_IN_SHADOW, shadow=True), BY_SHADOW_MINUTE, 600),
    "shadow violations of a subject": LookUp(_violations(TODAY_US, subject=SUBJECT, shadow=True), BY_SHADOW_SUBJECT),
    "whom shadow rules would have blocked most": LookUp(
        lambda catalog, editor, server: top_violators(
            catalog.database, 10, "subject", ViolationFilter(START_US, START_US + HOUR_US // 6, shadow=True)
        ),
        BY_SHADOW_MINUTE,
        1500,
    ),
    "usage": LookUp(_usage(), BY_DAY),
    "usage after a place": LookUp(_usage(USAGE_PLACE), BY_DAY),
    "usage of a customer": LookUp(_usage(customer="customer 7"), BY_CUSTOMER),
    "usage of a key": LookUp(_usage(key_id="0" * 21 + "123"), ("usage_ledger_default_key_id_day_us_idx",)),
    "notifications": LookUp(_notifications(), ("idx_notifications_created",)),
    "notifications after a place": LookUp(
        _notifications(cursor_of((25_000, "msg_25000"))), ("idx_notifications_created",)
    ),
    "failed notifications": LookUp(_notifications(status="failed"), ("idx_notifications_status",)),
    "due notifications": LookUp(
        lambda catalog, editor, server: claim(catalog.database, 25_000, 25_001, 8), ("idx_notifications_due",), 300
    ),
    "how often a subject was blocked": LookUp(
        lambda catalog, editor, server: blocked_total(
            catalog.database, ViolationFilter(START_US, TODAY_US, subject=SUBJECT)
        ),
        BY_SUBJECT,
    ),
    "who was blocked most": LookUp(
        lambda catalog, editor, server: top_violators(
            catalog.database, 10, "subject", ViolationFilter(START_US, START_US + HOUR_US)
        ),
        BY_MINUTE,
        7000,
    ),
    # Changes.
    "making a key": LookUp(
        lambda catalog, editor, server: editing_keys.create_key(editor, "me", KeyCreate(tier="tier-7", name="made")), BY_KEY
    ),
    "changing a key": LookUp(
        lambda catalog, editor, server: editing_keys.edit_key(editor, "me", server.key_id, KeyPatch(name="new"), None), BY_KEY
    ),
    "replacing a key": LookUp(
        lambda catalog, editor, server: editing_keys.rotate_key(editor, "me", server.key_id, 60), BY_KEY
    ),
    "revoking a key": LookUp(
        lambda catalog, editor, server: editing_keys.revoke_key(editor, "me", server.key_id, RevokeRequest(reason="leaked")),
        BY_KEY,
    ),
    "making a rule": LookUp(
        lambda catalog, editor, server: editor.create_rule("me", RULES_TIER, {"endpoint": "/new", "limits": ["1/s"]}),
        RULES_OF_TIER,
        1010,
    ),
    "changing a rule": LookUp(
        lambda catalog, editor, server: editor.edit_rule("me", 5, {"priority": 3}, None), ("pk_rate_limit_rules",)
    ),
    "removing a tier": LookUp(
        lambda catalog, editor, server: _removed(editor), ("idx_api_keys_tier_id", "idx_rules_tier_endpoint")
    ),
}  # fmt: skip


async def _after_version(catalog: SqlCatalog, back: int) -> None:
    await catalog.changes(await catalog.version() - back)


async def _removed(editor: CatalogEditor) -> None:
    """A tier that has just been made, for each plan anew."""
    name = f"made-{time.time_ns()}"
    await editor.create_tier("me", name, ())
    await editor.delete_tier("me", name, None)


@contextlib.contextmanager
def _heard() -> Iterator[dict[str, Any]]:
    """The statements that are sent meanwhile, each once, with the parameters of its first time."""
    said: dict[str, Any] = {}

    def hear(connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        if re.match(r"(SELECT|INSERT|UPDATE|DELETE|WITH)\b", statement) and "pg_notify" not in statement:
            said.setdefault(statement, parameters[0] if many else parameters)

    event.listen(Engine, "before_cursor_execute", hear)
    try:
        yield said
    finally:
        event.remove(Engine, "before_cursor_execute", hear)


Plan = dict[str, Any]


def _plans(connection: psycopg.Connection[Any], statement: str, parameters: dict[str, Any]) -> list[Plan]:
    """How a statement is run the first time, and after it was asked often."""
    names: list[str] = []

    def numbered(found: re.Match[str]) -> str:
        if found[1] not in names:
            names.append(found[1])
        return f"${names.index(found[1]) + 1}"

    # What is inserted is there already.
    explain = "EXPLAIN (FORMAT JSON) " if statement.startswith("INSERT") else "EXPLAIN (ANALYZE, FORMAT JSON) "
    prepared = re.sub(r"%\((\w+)\)s", numbered, statement).replace("%%", "%")
    values = sql.SQL(", ").join(sql.Literal(parameters[name]) for name in names)
    execute = sql.SQL("EXECUTE asked({})").format(values) if names else sql.SQL("EXECUTE asked")
    plans = []
    with connection.transaction(force_rollback=True):
        plans += _explained(connection, explain + statement, parameters)
    with connection.transaction(force_rollback=True):
        connection.execute(f"PREPARE asked AS {prepared}".encode())
        for _ in range(6):  # five plans are made for their values, then one for all
            connection.execute(sql.SQL("EXPLAIN ") + execute)
        plans += _explained(connection, sql.SQL(explain) + execute, None)
        connection.execute("DEALLOCATE asked")
    return plans


def _explained(connection: psycopg.Connection[Any], query: Any, parameters: Any) -> list[Plan]:
    row = connection.execute(query, parameters).fetchone()
    assert row is not None
    return [row[0][0]["Plan"]]


def _nodes(plan: Plan) -> Iterator[Plan]:
    yield plan
    for each in plan.get("Plans", ()):
        yield from _nodes(each)


def _looked_at(plan: Plan) -> int:
    """Rows that all nodes have had in hand, those thrown away too."""
    return sum(
        sum(node.get(part, 0) for part in ("Actual Rows", "Rows Removed by Filter", "Rows Removed by Join Filter"))
        * node.get("Actual Loops", 0)
        for node in _nodes(plan)
        if "Relation Name" in node
    )


@pytest.mark.parametrize("name", LOOK_UPS)
async def test_postgres_finds_it_by_an_index(name: str, database: tuple[SqlCatalog, Server]) -> None:
    catalog, server = database
    look_up = LOOK_UPS[name]
    with _heard() as said:
        await look_up.ask(catalog, CatalogEditor(catalog, lambda *_: None), server)
    assert said
    used: set[str] = set()
    with psycopg.connect(server.url, autocommit=True) as connection:
        for statement, parameters in said.items():
            for plan in _plans(connection, statement, parameters):
                told = f"{statement}\n{plan}"
                scanned = {node["Relation Name"] for node in _nodes(plan) if "Seq Scan" in node["Node Type"]}
                assert scanned <= {"policy_state"}, told
                assert _looked_at(plan) <= look_up.rows + 10, told
                used |= {node["Index Name"] for node in _nodes(plan) if "Index Name" in node}
    assert not look_up.indexes or used & set(look_up.indexes), used


async def test_the_policy_file_finds_its_keys_by_an_index(database: tuple[SqlCatalog, Server]) -> None:
    catalog, server = database
    with _heard() as said:
        await catalog.apply_policy(parse_policy('[[tiers]]\nname = "of-the-file"\n'), "digest")
    of_file = [each for each in said if each.startswith("SELECT api_keys") and each.endswith("WHERE api_keys.managed_by_file")]
    assert len(of_file) == 1
    with psycopg.connect(server.url, autocommit=True) as connection:
        for plan in _plans(connection, of_file[0], said[of_file[0]]):
            assert {node.get("Index Name") for node in _nodes(plan)} & {"idx_api_keys_file"}, plan


async def test_a_search_finds_what_is_behind_many_rows(database: tuple[SqlCatalog, Server]) -> None:
    """Walking in strides leaves nothing out, at their seams neither."""
    catalog, _ = database
    editor = CatalogEditor(catalog, lambda *_: None)
    page = await reading.list_keys(editor, 500, None, name="KEY 1234")
    assert {item.name for item in page.items} == {"key 1234", *(f"key 1234{digit}" for digit in range(10))}
    assert [item.id for item in page.items] == sorted(item.id for item in page.items)
    assert page.next is None
    found: list[str] = []
    after = None
    while True:
        page = await reading.list_keys(editor, 30, after, name="key 123", tier=BIG_TIER)
        found += [item.id for item in page.items]
        after = page.next
        if after is None:
            break
        assert len(page.items) == 30
    # Of 123, 1230 to 1239 and 12300 to 12399, those that are even.
    assert len(found) == len(set(found)) == 5 + 50
    assert found == sorted(found)
    tail = (await reading.list_tiers(editor, 500, None, "TIER-399")).items
    assert [item.name for item in tail] == sorted(item.name for item in tail)
    assert len(tail) == 11


async def test_sqlite_finds_it_by_an_index(tmp_path_factory: pytest.TempPathFactory) -> None:
    """SQLite plans without looking at what is there: an almost empty database has the plans of a full one."""
    catalog = await SqlCatalog.open(f"sqlite:///{tmp_path_factory.mktemp('plans')}/tidegate.db")
    editor = CatalogEditor(catalog, lambda *_: None)
    await editor.create_tier("me", RULES_TIER, ())
    await editor.create_tier("me", "tier-7", ())
    for number in range(5):
        await editor.create_rule("me", "tier-7", {"endpoint": f"/{number}", "limits": ["1/s"]})
    key = await editing_keys.create_key(editor, "me", KeyCreate(tier="tier-7"))
    with _heard() as said:
        for look_up in LOOK_UPS.values():
            await look_up.ask(catalog, editor, Server("", key.id, key.id + "0" * 40))
    assert len(said) > len(LOOK_UPS)
    scans = []
    async with catalog.database.transaction() as connection:
        for statement, parameters in said.items():
            for *_, step in await connection.exec_driver_sql("EXPLAIN QUERY PLAN " + statement, parameters):
                scan = re.fullmatch(r"SCAN (\w+)", step)
                # A table that is numbered is walked in the order of its numbers, as far as the page goes.
                walked = scan is not None and f"ORDER BY {scan[1]}.id" in statement and "LIMIT" in statement
                if scan is not None and not walked and scan[1] not in ("policy_state", "anon_1"):
                    scans.append(f"{step}: {statement}")
    await catalog.close()
    assert scans == []
