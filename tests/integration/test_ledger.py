"""The usage ledger and the traffic history in real databases: concurrent writers, outages, maintenance, what operators read."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import Table, func, select, text
from typer.testing import CliRunner

from tests.conftest import Serve
from tests.integration.admin_api import Admin
from tests.moments import PATIENCE_S, wait_until
from tests.servers.postgres import PostgresServer
from tests.servers.tcp_proxy import TcpProxy
from tests.unit.test_ledger import check, limit_set
from tidegate.catalog.sql.database import Database
from tidegate.catalog.sql.paging import cursor_of
from tidegate.catalog.sql.tables import traffic_callers, traffic_hours, traffic_latency, traffic_minutes, usage_ledger
from tidegate.cli import app
from tidegate.latency import LatencyHistogram
from tidegate.ledger.aggregate import MINUTE_US, UsageCounts
from tidegate.ledger.buffer import DAY_US, HOUR_US
from tidegate.ledger.export import COLUMNS
from tidegate.ledger.maintenance import LEDGER, Retention, maintain_tables
from tidegate.ledger.writer import UsageWriter
from tidegate.observation import Observation
from tidegate.timestamps import format_timestamp

NOW_US = 1_700_049_600_000_000
"""2023-11-15 12:00:00 UTC."""


async def rows_of(database: Database, table: Table) -> list[dict[str, Any]]:
    async with database.reading() as connection:
        return [dict(row) for row in (await connection.execute(select(table).order_by(*table.primary_key))).mappings()]


async def total_of(database: Database, table: Table) -> int:
    passed = table.c.admitted if table is usage_ledger else table.c.allowed
    async with database.reading() as connection:
        return int((await connection.execute(select(func.coalesce(func.sum(passed + table.c.blocked), 0)))).scalar_one())


async def write(database: Database, checks: Iterable[Observation], latency: LatencyHistogram | None = None) -> None:
    counts = UsageCounts(latency=LatencyHistogram())
    counts._latency = latency  # all of it was since the last write
    for each in checks:
        counts.observe(each)
    writer = UsageWriter(counts, database)
    await writer.flush(PATIENCE_S)
    assert writer.lost == 0


def range_of(from_us: int, to_us: int) -> dict[str, str]:
    return {"from": format_timestamp(from_us), "to": format_timestamp(to_us)}


async def test_sums_of_four_writers_at_once(admin: Admin, catalog_url: str) -> None:
    databases = [await Database.open(catalog_url) for _ in range(4)]
    truth: Counter[str] = Counter()

    async def work(database: Database, seed: int) -> UsageWriter:
        chance = random.Random(seed)
        counts = UsageCounts()
        writer = UsageWriter(counts, database)
        for _ in range(3):
            # All have the same keys, in an order of their own; and more rows than one batch has.
            for number in chance.sample(range(400), 400):
                cost = chance.randint(1, 3)
                counts.observe(check(f"k:{number}", key_id=f"{number:024x}", cost=cost))
                truth[f"{number:024x}"] += cost
            await writer._write_once()
        await writer.flush(PATIENCE_S)
        return writer

    writers = await asyncio.gather(*(work(each, seed) for seed, each in enumerate(databases)))
    assert [(writer.pending, writer.lost, writer.repeated) for writer in writers] == [(0, 0, 0)] * 4
    assert sum(writer.written for writer in writers) == truth.total()
    database = admin.catalog.database
    assert {row["key_id"]: row["admitted"] for row in await rows_of(database, usage_ledger)} == truth
    assert [await total_of(database, table) for table in (traffic_minutes, traffic_callers)] == [truth.total()] * 2
    for each in databases:
        await each.close()


async def test_odd_texts_are_stored(admin: Admin) -> None:
    database = admin.catalog.database
    subjects = ["k:" + "x" * 500, "k:" + "x" * 501, "k:nul\0", "k:\ud800", "k:ключ", "k:'; DROP TABLE x --", 'k:"\\']
    for _ in range(2):
        await write(database, [check(subject, customer="c" * 300, limits=limit_set("r" * 300)) for subject in subjects])
    assert [row["allowed"] for row in await rows_of(database, traffic_callers)] == [2] * len(subjects)
    assert [row["admitted"] for row in await rows_of(database, usage_ledger)] == [2 * len(subjects)]


async def test_an_outage_loses_nothing(postgres_server: PostgresServer, postgres_url: str) -> None:
    async with TcpProxy(postgres_server.port) as proxy:
        database = await Database.open(postgres_url.replace(f":{postgres_server.port}/", f":{proxy.port}/"))
        direct = await Database.open(postgres_url)
        counts = UsageCounts()
        writer = UsageWriter(counts, database)
        for round_ in range(3):
            counts.observe(check(cost=5, at_us=NOW_US + round_ * MINUTE_US))
            await writer._write_once()
            proxy.refuse = True
            proxy.drop_all()
            for _ in range(2):
                counts.observe(check(cost=7, at_us=NOW_US + round_ * MINUTE_US))
                await writer._write_once()
                assert writer.failing
            proxy.refuse = False
            # The answer of a commit is cut, wherever it begins: the batch is repeated.
            counts.observe(check("k:2", cost=11))
            proxy.cut_after = 150 + 40 * round_
            async with asyncio.timeout(PATIENCE_S):
                while writer.pending:
                    await writer._write_once()
        assert (writer.written, writer.lost) == (90, 0)
        assert await total_of(direct, usage_ledger) == await total_of(direct, traffic_minutes) == 90
        await database.close()
        await direct.close()


async def test_a_batch_is_repeated_while_its_first_attempt_still_runs(postgres_url: str) -> None:
    """The first attempt's transaction is open when the second comes: that one waits, and adds nothing."""
    one, two = await Database.open(postgres_url), await Database.open(postgres_url)
    counts = UsageCounts()
    writer = UsageWriter(counts, two)
    counts.observe(check(cost=5))
    claim = "INSERT INTO ledger_batches (instance, sequence, written_at_us) VALUES (:instance, 1, 0)"
    async with one.transaction() as connection:
        await connection.execute(text(claim), {"instance": writer.instance})
        repeating = asyncio.ensure_future(writer._write_once())
        waiting = text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%ledger_batches%'")
        async with asyncio.timeout(PATIENCE_S), two.reading() as looking:
            while not (await looking.execute(waiting)).scalar_one():
                await asyncio.sleep(0.01)
    await repeating
    assert (writer.repeated, writer.failing, await total_of(two, usage_ledger)) == (1, False, 0)
    await one.close()
    await two.close()


async def test_minutes_become_hours_and_old_rows_go(admin: Admin) -> None:
    database = admin.catalog.database
    retention = Retention(keep_days=60, traffic_days=30, minutes_days=2, max_callers=3)
    hour_us = NOW_US - 3 * DAY_US
    latency = LatencyHistogram()
    latency.add(600_000)
    ages = (0, 1, 3, 29, 32, 70, 150)
    await write(database, [check(cost=age + 1, at_us=NOW_US - age * DAY_US + MINUTE_US) for age in ages], latency)
    await write(database, [check(at_us=hour_us + minute * MINUTE_US) for minute in range(60)])
    before = await total_of(database, traffic_minutes)
    assert before == sum(age + 1 for age in ages) + 60
    for _ in range(2):
        assert await maintain_tables(database, retention, NOW_US)
    kept = {row["minute_us"] for row in await rows_of(database, traffic_minutes)}
    assert kept == {NOW_US + MINUTE_US, NOW_US - DAY_US + MINUTE_US}
    hours = {row["hour_us"]: row["allowed"] for row in await rows_of(database, traffic_hours)}
    assert hours == {hour_us: 4 + 60, NOW_US - 29 * DAY_US: 30}
    ledger = {row["day_us"] for row in await rows_of(database, usage_ledger)}
    days = {at_us - at_us % DAY_US for at_us in (NOW_US - age * DAY_US for age in ages)}
    # On PostgreSQL a month goes when all of it is old; rows in the default partition when they are.
    assert ledger == {day for day in days if day >= NOW_US - 60 * DAY_US}
    # A minute that comes late is added to its hour.
    await write(database, [check(cost=2, at_us=hour_us + MINUTE_US)])
    assert await maintain_tables(database, retention, NOW_US)
    assert {row["hour_us"]: row["allowed"] for row in await rows_of(database, traffic_hours)}[hour_us] == 66


async def test_latency_is_rolled_up(admin: Admin) -> None:
    database = admin.catalog.database
    insert = text("INSERT INTO traffic_latency (step_s, at_us, bucket, checks) VALUES (60, :at_us, :bucket, :checks)")
    async with database.transaction() as connection:
        for minute, bucket, checks in ((0, 3, 5), (1, 3, 6), (1, 9, 1), (60, 3, 2)):
            at_us = NOW_US - 3 * DAY_US + minute * MINUTE_US
            await connection.execute(insert, {"at_us": at_us, "bucket": bucket, "checks": checks})
    assert await maintain_tables(database, Retention(), NOW_US)
    rows = [(row["step_s"], row["at_us"], row["bucket"], row["checks"]) for row in await rows_of(database, traffic_latency)]
    start_us = NOW_US - 3 * DAY_US
    assert rows == [(3600, start_us, 3, 11), (3600, start_us, 9, 1), (3600, start_us + HOUR_US, 3, 2)]


async def test_callers_with_few_units_are_merged(admin: Admin) -> None:
    database = admin.catalog.database
    hour_us = NOW_US - 2 * HOUR_US
    await write(database, [check(f"i:{number}", cost=number + 1, at_us=hour_us) for number in range(10)])
    assert await maintain_tables(database, Retention(max_callers=3), NOW_US)
    rows = {row["subject"]: row["allowed"] for row in await rows_of(database, traffic_callers)}
    assert rows == {"i:9": 10, "i:8": 9, "i:7": 8, "": 28}
    assert await maintain_tables(database, Retention(max_callers=3), NOW_US)
    assert await total_of(database, traffic_callers) == 55


async def test_partitions_of_months(postgres_url: str) -> None:
    database = await Database.open(postgres_url)
    december_us = NOW_US + 30 * DAY_US
    await write(database, [check(at_us=at_us) for at_us in (NOW_US, december_us, NOW_US + 300 * DAY_US)])
    for at_us in (NOW_US, december_us):
        assert await maintain_tables(database, Retention(), at_us)
    names = """SELECT relname FROM pg_inherits JOIN pg_class c ON c.oid = inhrelid
        WHERE inhparent = CAST('usage_ledger' AS regclass)"""
    async with database.reading() as connection:
        found = sorted((await connection.execute(text(names))).scalars())
        sizes = {name: (await connection.execute(text(f"SELECT count(*) FROM {name}"))).scalar_one() for name in found}
    months = ("202311", "202312", "202401", "202402", "202403")
    assert found == [*(f"usage_ledger_{month}" for month in months), "usage_ledger_default"]
    assert LEDGER.partition_of(december_us) == "usage_ledger_202312"
    assert (sizes["usage_ledger_202311"], sizes["usage_ledger_202312"], sizes["usage_ledger_default"]) == (1, 1, 1)
    await database.close()


async def test_traffic_by_rule_and_time(admin: Admin) -> None:
    database = admin.catalog.database
    rules = [limit_set(f"/r{number}") for number in range(4)]
    checks = [
        check(cost=10 - number, at_us=NOW_US + minute * MINUTE_US, limits=rules[number], allowed=minute % 3 > 0)
        for number in range(4)
        for minute in range(0, 120, 20)
    ]
    await write(database, checks)
    span = range_of(NOW_US, NOW_US + 2 * HOUR_US)
    answer = await admin.http.get("/traffic", params={**span, "limit": 2})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["step_s"] == 3600
    assert body["items"][:3] == [
        {
            "at": "2023-11-15T12:00:00Z", "span_s": 3600, "tier": tier, "rule": rule, "allowed": allowed, "blocked": blocked,
            "over": 0,
        }
        for tier, rule, allowed, blocked in (("free", "/r0", 20, 10), ("free", "/r1", 18, 9), (None, None, 30, 15))
    ]  # fmt: skip
    assert len(body["items"]) == 6
    by_minute = (await admin.http.get("/traffic", params={**span, "step": 60, "rule": "/r3"})).json()["items"]
    assert [(item["at"][11:16], item["allowed"], item["blocked"]) for item in by_minute] == [
        ("12:00", 0, 7), ("12:20", 7, 0), ("12:40", 7, 0), ("13:00", 0, 7), ("13:20", 7, 0), ("13:40", 7, 0),
    ]  # fmt: skip
    by_day = (await admin.http.get("/traffic", params={**span, "step": 86400, "tier": "free"})).json()["items"]
    assert sum(item["allowed"] + item["blocked"] for item in by_day) == 6 * 34
    assert (await admin.http.get("/traffic", params={**span, "tier": "gold"})).json() == {
        "step_s": 3600, "items": [], "latency": [],
    }  # fmt: skip
    # Rolled up, the same units are there, by hour.
    assert await maintain_tables(database, Retention(), NOW_US + 5 * DAY_US)
    assert (await admin.http.get("/traffic", params={**span, "limit": 2})).json() == body
    by_minute = (await admin.http.get("/traffic", params={**span, "step": 60, "rule": "/r3"})).json()["items"]
    assert [(item["at"][11:16], item["span_s"], item["allowed"]) for item in by_minute] == [
        ("12:00", 3600, 14), ("13:00", 3600, 14),
    ]  # fmt: skip


async def test_traffic_by_caller(admin: Admin) -> None:
    await admin.tier()
    key = await admin.key()
    database = admin.catalog.database
    subject = f"k:{key['id']}"
    await write(
        database,
        [
            *(check(subject, at_us=NOW_US + hour * HOUR_US, cost=3) for hour in range(2)),
            check("i:192.0.2.1", at_us=NOW_US, cost=5, allowed=False),
            check("a:user=42", at_us=NOW_US),
            check("a:user=42", at_us=NOW_US, limits=limit_set("other")),
        ],
    )
    span = range_of(NOW_US, NOW_US + 2 * HOUR_US)

    async def top(**query: str) -> list[tuple[str, int, int]]:
        answer = await admin.http.get("/traffic/callers", params={**span, **query})
        assert answer.status_code == 200, answer.text
        return [(item["subject"], item["allowed"], item["blocked"]) for item in answer.json()["items"]]

    assert await top() == [(subject, 6, 0), ("i:192.0.2.1", 0, 5), ("a:user=42", 2, 0)]
    assert await top(sort="blocked") == [("i:192.0.2.1", 0, 5)]
    assert await top(rule="other") == [("a:user=42", 1, 0)]
    for query, units in (
        ({"api_key_id": key["id"]}, [3, 3]), ({"subject": subject}, [3, 3]), ({"ip": "192.0.2.1"}, [5]), ({"subject": "user=42"},
        [1, 1]),
    ):  # fmt: skip
        items = (await admin.http.get("/traffic", params={**span, **query})).json()["items"]
        assert [item["allowed"] + item["blocked"] for item in items] == units, query


async def test_latency_by_minute(admin: Admin) -> None:
    latency = LatencyHistogram()
    for _ in range(10):
        latency.add(60_000)
    await write(admin.catalog.database, [check()], latency)
    (item,) = (await admin.http.get("/traffic", params={"step": 60})).json()["latency"]
    assert (item["checks"], item["span_s"]) == (10, 60)
    assert 0.05 < item["p50_ms"] < item["p90_ms"] < item["p99_ms"] <= 0.1


async def test_bad_requests(admin: Admin) -> None:
    for query, message in (
        ({"step": "61"}, "step"),
        ({"from": "yesterday"}, "not a valid timestamp"),
        ({"from": "2026-01-02T00:00:00Z", "to": "2026-01-01T00:00:00Z"}, "swap the two"),
        ({"from": "2020-01-01T00:00:00Z", "to": "2026-01-01T00:00:00Z", "step": "60"}, "a shorter range or a lower limit"),
        ({"step": "60", "subject": "user=42"}, "use step 3600 or 86400"),
        ({"subject": "user=42", "ip": "192.0.2.1"}, "send one of them"),
        ({"limit": "101"}, "limit"),
        ({"subject": "nothing"}, "subject"),
    ):
        answer = await admin.http.get("/traffic", params=query)
        assert answer.status_code == 400, query
        assert message in answer.json()["error"]["message"]


async def test_the_ledger_is_exported_in_pages(admin: Admin) -> None:
    database = admin.catalog.database
    keys = [f"{number:024x}" for number in range(60)]
    customers = ["", "acme", 'a "b", c']
    for day in range(40):
        at_us = NOW_US + day * DAY_US
        await write(
            database,
            [
                check(at_us=at_us, key_id=key, customer=customers[number % 3], cost=number + 1, allowed=day > 0)
                for number, key in enumerate(keys)
            ],
        )

    async def pages(**query: Any) -> list[Any]:
        found = []
        after: dict[str, str] = {}
        while True:
            params = {"from": "2023-11-15", "to": "2023-12-25", **query, **after}
            answer = await admin.http.get("/usage/export", params=params)
            assert answer.status_code == 200, answer.text
            found.append(answer)
            if (cursor := answer.headers.get("x-tidegate-next")) is None:
                return found
            after = {"after": cursor}

    as_json = await pages(format="jsonl", limit=7 * 60)
    assert [answer.headers["content-type"] for answer in as_json] == ["application/jsonl"] * 6
    rows = [json.loads(line) for answer in as_json for line in answer.text.splitlines()]
    assert rows[1] == dict(
        zip(COLUMNS, ("2023-11-15", "", keys[3], "free", "r", 0, 4, 0), strict=True),
    )
    order = [(row["day"], row["customer"], row["api_key_id"]) for row in rows]
    assert len(order) == 40 * 60
    assert sum(row["admitted"] for row in rows) == 39 * 30 * 61
    if database.dialect == "sqlite":
        assert order == sorted(order)
    as_csv = list(csv.DictReader(io.StringIO("".join(answer.text for answer in await pages(limit=2_399)))))
    assert [{**row, **{name: int(row[name]) for name in ("admitted", "blocked", "over")}} for row in as_csv] == rows
    assert len((await pages(limit=10_000, customer="acme"))[0].text.splitlines()) == 1 + 40 * 20
    assert len((await pages(api_key=keys[5], format="jsonl"))[0].text.splitlines()) == 40
    one_day = await pages(format="jsonl", to="2023-11-16")
    assert {json.loads(line)["day"] for line in one_day[0].text.splitlines()} == {"2023-11-15"}
    assert (await pages(customer="nobody", format="jsonl"))[0].text == ""
    for query, message in (
        ({"from": "2023-11-31"}, "from '2023-11-31' is not a valid day; write it as 2026-11-30"),
        ({"to": "2023-11-15T00:00:00Z"}, "is not a valid day"),
        ({"from": "2023-12-25"}, "from is not before to"),
        ({"after": "x"}, "is not valid for this list"),
        ({"after": cursor_of((-1, "", "", "", ""))}, "is not valid for this list"),
        ({"format": "xml"}, "format"),
        ({"limit": "10001"}, "limit"),
    ):
        answer = await admin.http.get("/usage/export", params={"from": "2023-11-15", "to": "2023-12-25", **query})
        assert answer.status_code == 400, query
        assert message in answer.json()["error"]["message"]


def test_the_command_writes_the_same_from_both(serve: Callable[..., Serve], tmp_path: Path) -> None:
    """Over the admin API of a server, and from its database; and the units are those that it was sent."""
    policy = '[[tiers]]\nname = "free"\nlimits = ["5/day"]\n[[api_keys]]\nkey = "demo-free-key-0001"\ntier = "free"\n'
    (tmp_path / "tidegate.policy.toml").write_text(policy)
    server = serve(TIDEGATE_ADMIN__TOKEN="token-of-the-settings", TIDEGATE_LEDGER__FLUSH_S="0.2")
    for _ in range(7):
        httpx.post(f"{server.url}/v1/check", json={"api_key": "demo-free-key-0001", "path": "/x", "cost": 1})
    (tmp_path / "token").write_text("token-of-the-settings")
    remote = ["--url", f"http://127.0.0.1:{server.admin_port}", "--token-file", str(tmp_path / "token")]
    local = ["--config", str(tmp_path / "local.toml")]
    (tmp_path / "local.toml").write_text(f'[catalog]\nurl = "sqlite:///{tmp_path}/tidegate.db"\n')
    runner = CliRunner()

    def exported(arguments: list[str]) -> list[list[str]]:
        ran = runner.invoke(app, ["usage", "export", "--output", str(tmp_path / "usage.csv"), *arguments])
        assert ran.exit_code == 0, ran.output
        assert "lines written to" in ran.output
        return list(csv.reader((tmp_path / "usage.csv").read_text().splitlines()))

    def written() -> bool:
        rows = exported(remote)[1:]
        return [(row[3], *map(int, row[5:])) for row in rows] == [("free", 5, 2, 0)]

    wait_until(written, PATIENCE_S, "all units are in the ledger")
    assert exported(local) == exported(remote)
    assert len(exported([*local, "--customer", "acme"])) == 1
    ran = runner.invoke(app, ["usage", "export", "--output", str(tmp_path / "none" / "usage.csv"), *local])
    assert "cannot be written: No such file or directory" in str(ran.exception or ran.output)
    assert runner.invoke(app, ["usage", "export", "--format", "jsonl", *local]).output.count('"admitted":5') == 1
    assert server.stop()[0] == 0
