"""The usage ledger and the traffic history: counting, bounds, and batches that are applied once, whatever fails."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncConnection

from tests.conftest import Clock
from tests.unit.test_telemetry import values
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.catalog.sql.database import Database
from tidegate.catalog.sql.tables import ledger_batches, traffic_callers, traffic_latency, traffic_minutes, usage_ledger
from tidegate.counters.holds import HoldAccount, HoldHandle, new_id
from tidegate.counters.memory import MemoryCounters
from tidegate.decision import Check, Decision
from tidegate.errors import BadRequest, CatalogUnavailable
from tidegate.gate.gate import Gate
from tidegate.latency import BUCKETS_S, LatencyHistogram
from tidegate.ledger import aggregate
from tidegate.ledger import buffer as buffers
from tidegate.ledger.aggregate import MINUTE_US, EntryKey, Minute, Units, UsageCounts
from tidegate.ledger.buffer import DAY_US, HOUR_US, Buffer
from tidegate.ledger.caller_table import CallerTable
from tidegate.ledger.maintenance import LEDGER, Retention
from tidegate.ledger.traffic import quantile
from tidegate.ledger.writer import UsageWriter
from tidegate.observation import Observation, UsageMemo
from tidegate.policy.limits import Algorithm, Limit, LimitSet
from tidegate.policy.toml_reader import parse_policy
from tidegate.telemetry.collectors import collect_usage
from tidegate.telemetry.metrics import Metrics

NOON_US = 1_700_049_600_000_000
KEY = "0" * 24


def limit_set(rule: str | None = "r", tier: str | None = "free") -> LimitSet:
    return LimitSet(f"{tier}/{rule}", Algorithm.FIXED_WINDOW, [Limit.parse("5/minute")], rule=rule, tier=tier)


LIMITS = limit_set()


def check(
    subject: str | None = "k:1",
    *,
    allowed: bool = True,
    cost: int = 1,
    at_us: int = NOON_US,
    limits: LimitSet | None = LIMITS,
    key_id: str = KEY,
    customer: str = "",
    overage: int = 0,
) -> Observation:
    unlimited = "internal" if limits is None else None
    decision = Decision(allowed, at_us=at_us, limits=limits, unlimited_tier=unlimited, overage=overage)
    return Observation(decision, None, 1, (), subject, None, cost, key_id, customer)


async def rows_of(counts: UsageCounts, max_callers: int = 1_000) -> dict[str, dict[Any, list[int]]]:
    """What was counted, as it would be written."""
    waiting = Buffer(max_callers)
    await waiting.add(counts.take(), counts.take_latency(), NOON_US)
    found: dict[str, dict[Any, list[int]]] = {"ledger": {}, "rules": {}, "callers": {}, "latency": {}}
    while len(waiting):
        batch = waiting.next_batch()
        assert 0 < len(batch) <= buffers.MAX_ROWS
        for name, rows in found.items():
            for key, units in getattr(batch, name):
                assert key not in rows, "no key comes twice"
                rows[key] = units
    return found


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)), max_size=300), st.integers(1, 40))
def test_the_table_beside_a_plain_count(units: list[tuple[int, int]], capacity: int) -> None:
    table: CallerTable[int] = CallerTable(capacity)
    truth: Counter[int] = Counter()
    removed: Counter[int] = Counter()
    for key, cost in units:
        entry = table.entries.get(key)
        if entry is None:
            entry, replaced = table.add_key(key)
            if replaced is not None:
                removed[replaced[0]] += replaced[1].admitted
        entry.admitted += cost
        truth[key] += cost
    counted = {key: entry.admitted for key, entry in table.entries.items()}
    assert len(counted) == min(len(truth), capacity)
    assert {key: counted.get(key, 0) + removed[key] for key in truth} == truth, "no unit is lost or counted twice"
    for key, count in truth.items():
        if count > truth.total() / capacity:
            assert key in counted
        assert counted.get(key, 0) >= count - truth.total() / capacity
        if key in counted:
            assert counted[key] <= count <= counted[key] + table.errors.get(key, 0)


async def test_units_are_counted_for_whom_they_were() -> None:
    counts = UsageCounts()
    counts.observe(check(cost=3))
    counts.observe(check(cost=5, overage=2))
    counts.observe(check(cost=2, allowed=False))
    counts.observe(check("i:192.0.2.1", key_id="", customer="acme"))
    counts.observe(check(None, limits=None, at_us=NOON_US))
    counts.observe(check(cost=0))
    counts.observe(Observation(None, "STORE_UNAVAILABLE", 1))
    assert len(counts) == 3
    found = await rows_of(counts)
    minute, hour, day = NOON_US, NOON_US - NOON_US % HOUR_US, NOON_US - NOON_US % DAY_US
    assert found["ledger"] == {
        (day, "", KEY, "free", "r"): [8, 2, 2],
        (day, "acme", "", "free", "r"): [1, 0, 0],
        (day, "", KEY, "internal", ""): [1, 0, 0],
    }
    assert found["rules"] == {(minute, "free", "r"): [9, 2, 2], (minute, "internal", ""): [1, 0, 0]}
    assert found["callers"] == {
        (hour, "free", "r", "k:1"): [8, 2, 2],
        (hour, "free", "r", "i:192.0.2.1"): [1, 0, 0],
        (hour, "internal", "", f"k:{KEY}"): [1, 0, 0],
    }
    assert len(counts) == 0, "what was taken is not counted again"


HELD = """
[[tiers]]
name = "free"
quotas = ["1000/month"]
overage = true
  [[tiers.rules]]
  endpoint = "/llm/*"
  name = "tokens"
  algorithm = "fixed_window"
  limits = ["800/minute"]
  [[tiers.rules]]
  endpoint = "/login"
  name = "log-in"
  limits = ["2/minute"]
  count = "failures"

[anonymous]
tier = "free"
"""


async def test_what_holds_are_charged_in_the_end_is_counted() -> None:
    counts, clock = UsageCounts(), Clock(NOON_US)
    gate = Gate(CachedCatalog(PolicyCatalog(parse_policy(HELD))), MemoryCounters(clock=clock), counts.observe)
    gate.holds.on_settled = counts.count_settled

    async def opened(cost: int, path: str = "/llm/chat", ttl_s: int = 60) -> str:
        hold = (await gate.holds.open(Check(path, "POST", ip="192.0.2.1", cost=cost), ttl_s)).hold
        assert hold is not None
        return hold

    async def ledger() -> dict[tuple[str, str], list[int]]:
        return {key[3:]: units for key, units in (await rows_of(counts))["ledger"].items()}

    less, more, late, never = [await opened(100) for _ in range(4)]
    assert not (await gate.holds.open(Check("/llm/chat", "POST", ip="192.0.2.1", cost=500))).decision.allowed
    assert await ledger() == {("free", "tokens"): [0, 500, 0]}, "open holds are not charged yet"
    for _ in range(2):
        await gate.holds.settle(less, 30)
    await gate.holds.settle(more, 150)
    clock.advance(61)
    await gate.holds.settle(late, 7)
    assert await ledger() == {("free", "tokens"): [187, 0, 0]}
    await gate.check(Check("/other", "GET", ip="192.0.2.1", cost=743))
    first = await opened(100)
    assert sum((await ledger())[("free", "")]) == 743
    await gate.holds.settle(first, 90)
    assert await ledger() == {("free", "tokens"): [90, 0, 20]}, "187 + 743 + 90 is 20 above the quota"
    attempt = await opened(1, "/login")
    await gate.holds.settle(attempt, 0)
    assert await ledger() == {("free", "log-in"): [1, 0, 1]}, "quotas count every attempt"
    quota = (await gate.check(Check("/other", "GET", ip="192.0.2.1", cost=0))).overage
    assert quota == 187 + 743 + 90 + 1 - 1000, "as the quota has it"
    assert never


def test_whom_and_how_much_a_hold_counts() -> None:
    account = HoldAccount("free", "k:1", overage=20)
    assert [account.units_of(100, used) for used in (0, 79, 80, 90, 100, 130)] == [
        (0, 0), (79, 0), (80, 0), (90, 10), (100, 20), (130, 50),
    ]  # fmt: skip
    assert HoldAccount("free", "k:1").units_of(100, 130) == (130, 0)
    assert HoldAccount("free", "k:1", whole=True).units_of(1, 0) == (1, 0)
    for forged in (account, replace(account, tier="x" * 2000), replace(account, customer="a\nb"), replace(account, overage=-1)):
        text = HoldHandle(new_id(), 1, account=forged).text
        if forged is account:
            assert HoldHandle.of(text).account == account
        else:
            with pytest.raises(BadRequest, match="is not an id"):
                HoldHandle.of(text)


async def test_minutes_and_days_are_of_the_store_s_clock_in_any_order() -> None:
    counts = UsageCounts()
    midnight = 1_701_388_800_000_000  # 2023-12-01 00:00:00 UTC
    for at_us in (midnight, midnight - 1, midnight + MINUTE_US, midnight + MINUTE_US - 1, midnight - 1):
        counts.observe(check(at_us=at_us))
    found = await rows_of(counts)
    assert {key[0]: units[0] for key, units in found["rules"].items()} == {
        midnight - MINUTE_US: 2,
        midnight: 2,
        midnight + MINUTE_US: 1,
    }
    assert {key[0]: units[0] for key, units in found["ledger"].items()} == {midnight - DAY_US: 2, midnight: 3}
    assert LEDGER.partition_of(midnight - 1) == "usage_ledger_202311"
    assert LEDGER.partition_of(midnight) == "usage_ledger_202312"


async def test_a_check_without_limits_counts_now() -> None:
    counts = UsageCounts()
    counts.observe(check(None, limits=None, at_us=0))
    ((minute_us, *_),) = (await rows_of(counts))["rules"]
    assert minute_us > NOON_US


async def test_a_flood_of_subjects_hides_no_key_and_no_heavy_caller() -> None:
    counts = UsageCounts(max_entries=200)
    for number in range(20_000):
        counts.observe(check(f"i:{number}", key_id=f"{number % 7:024x}", allowed=number % 2 == 0))
        if number % 100 == 0:
            counts.observe(check("i:heavy", cost=10, key_id=""))
    assert len(counts) <= 200 + 7
    found = await rows_of(counts, max_callers=50)
    assert sum(units[0] + units[1] for units in found["ledger"].values()) == 22_000
    for number in range(7):
        own = found["ledger"][NOON_US - NOON_US % DAY_US, "", f"{number:024x}", "free", "r"]
        assert sum(own) in (2_857, 2_858), "exact for every key"
    assert len(found["callers"]) <= 51
    hour = NOON_US - NOON_US % HOUR_US
    assert 2_000 - 22_000 / 200 <= found["callers"][hour, "free", "r", "i:heavy"][0] <= 2_000
    assert sum(sum(units) for units in found["callers"].values()) == 22_000, "the rest is counted as others"


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 2), st.integers(0, 2), st.integers(1, 9), st.booleans(), st.integers(0, 7)),
        max_size=60,
    )
)
def test_what_is_counted_in_callers_changes_no_sum(steps: list[tuple[int, int, int, int, bool, int]]) -> None:
    rules = [limit_set(f"r{number}") for number in range(3)]
    # Where entries are removed for others, more come than fit.
    in_callers, plain = UsageCounts(max_entries=3), UsageCounts(max_entries=3)
    memos = [UsageMemo(str(caller)) for caller in range(6)]
    reading: list[tuple[Minute, Iterator[tuple[EntryKey, Units]]]] = []
    truth: Counter[tuple[int, object, str]] = Counter()
    found: dict[bool, Counter[tuple[int, object, str]]] = {True: Counter(), False: Counter()}

    def read(minute: Minute, rows: Iterable[tuple[EntryKey, Units]], *, plainly: bool = False) -> None:
        for (answer, _, key_id, _), units in rows:
            found[plainly][minute.start_us, answer, key_id] += units[0] + units[1]

    def read_sums(minute: Minute, *, plainly: bool) -> None:
        for (answer, key_id, _), sums in minute.sums.items():
            found[plainly][minute.start_us, answer, key_id] += sums[0] + sums[1]

    def read_all() -> None:
        for minute, rows in reading:
            read(minute, rows)
            read_sums(minute, plainly=False)
        for minute in plain.take():
            read(minute, minute.rows(), plainly=True)
            read_sums(minute, plainly=True)

    for caller, rule, minute, cost, allowed, then in steps:
        at_us = NOON_US + minute * MINUTE_US
        # One in four is of another subject than the rest, as of a rule that counts addresses.
        subject = f"k:{caller}" if cost % 4 else f"i:{cost}"
        one = check(subject, allowed=allowed, cost=cost, at_us=at_us, limits=rules[rule], key_id=str(caller))
        truth[at_us, rules[rule], str(caller)] += cost
        plain.observe(one)
        in_callers.observe(replace(one, memo=memos[caller]))
        if then == 0:
            # A write begins; checks go on while it reads what was counted.
            reading += [(each, each.rows()) for each in in_callers.take()]
        elif then == 1:
            for each, rows in reading:
                read(each, itertools.islice(rows, 1))
    reading += [(each, each.rows()) for each in in_callers.take()]
    read_all()
    assert found[True] == found[False] == truth


async def test_what_does_not_fit_keeps_its_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregate, "MAX_SUMS", 2)
    monkeypatch.setattr(aggregate, "MAX_MINUTES", 2)
    monkeypatch.setattr(buffers, "MAX_LEDGER", 3)
    counts = UsageCounts(max_entries=1)
    for number in range(10):
        counts.observe(check(f"i:{number}", key_id=f"{number:024x}", at_us=NOON_US + number * MINUTE_US))
        counts.observe(check(f"i:{number + 1}", key_id=f"{number:024x}", at_us=NOON_US + number * MINUTE_US))
    waiting = Buffer(10)
    await waiting.add(counts.take())
    assert waiting.units == 20, "sums are exact"
    assert counts.unattributed + waiting.unattributed > 0
    assert len(waiting.next_batch().ledger) <= 4


def test_latency_is_that_since_the_last_write() -> None:
    latency = LatencyHistogram()
    latency.add(1)
    counts = UsageCounts(latency=latency)
    for _ in range(3):
        latency.add(600_000)
    taken = counts.take_latency()
    assert (sum(taken), taken[5]) == (3, 3)
    assert sum(counts.take_latency()) == 0
    assert UsageCounts().take_latency() == []


def test_quantiles() -> None:
    buckets = [0] * (len(BUCKETS_S) + 1)
    assert quantile(buckets, 0.5) == 0.0
    buckets[0] = 10
    assert quantile(buckets, 0.5) == pytest.approx(BUCKETS_S[0] / 2)
    buckets[5] = 10
    assert quantile(buckets, 0.5) == pytest.approx(BUCKETS_S[0])
    assert quantile(buckets, 0.75) == pytest.approx((BUCKETS_S[4] + BUCKETS_S[5]) / 2)
    buckets[-1] = 1_000
    assert quantile(buckets, 0.99) == BUCKETS_S[-1], "beyond the last bound nothing is known"


class FailingDatabase:
    """A database of which transactions fail as a test says: before they are committed, or after, so that their answer is lost."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.dialect = database.dialect
        self.failures: list[str] = []

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection]:
        failure = self.failures.pop(0) if self.failures else ""
        if failure == "away":
            raise CatalogUnavailable("connection refused")
        async with self.database.transaction() as connection:
            yield connection
            if failure == "rolled back":
                raise CatalogUnavailable("connection lost before the commit")
        if failure == "answer lost":
            raise CatalogUnavailable("connection lost after the commit")


STEP = st.one_of(
    st.tuples(st.just("check"), st.integers(0, 2), st.integers(0, 4), st.integers(1, 5), st.booleans()),
    st.tuples(
        st.just("write"), st.integers(0, 2), st.lists(st.sampled_from(["", "away", "rolled back", "answer lost"]), max_size=3)
    ),
    st.tuples(st.just("crash"), st.integers(0, 2)),
)


def test_the_ledger_is_the_sum_of_what_was_counted() -> None:
    """Three instances that crash and are started again; what one had not written when it crashed may be missing, no more."""
    with asyncio.Runner() as runner:
        database = runner.run(Database.open("sqlite://"))  # once: to migrate it takes longer than an example

        @given(st.lists(STEP, max_size=40))
        @settings(max_examples=60)
        def compare(steps: list[tuple[Any, ...]]) -> None:
            runner.run(_compare(database, steps))

        compare()
        runner.run(database.close())


async def _compare(database: Database, steps: list[tuple[Any, ...]]) -> None:
    async with database.transaction() as connection:
        for table in (usage_ledger, ledger_batches, traffic_minutes, traffic_callers):
            await connection.execute(delete(table))
    failing = FailingDatabase(database)

    def started() -> tuple[UsageCounts, UsageWriter]:
        counts = UsageCounts()
        return counts, UsageWriter(counts, failing)  # type: ignore[arg-type]

    instances = [started() for _ in range(3)]
    # Since its last complete write: what a crash may lose.
    unwritten: list[Counter[tuple[str, int]]] = [Counter() for _ in instances]
    truth: Counter[tuple[str, int]] = Counter()
    may_miss: Counter[tuple[str, int]] = Counter()
    for kind, number, *rest in steps:
        counts, writer = instances[number]
        if kind == "check":
            key, cost, allowed = rest
            counts.observe(check(f"k:{key}", key_id=f"{key:024x}", cost=cost, allowed=allowed))
            unwritten[number][f"{key:024x}", not allowed] += cost
            truth[f"{key:024x}", not allowed] += cost
        elif kind == "write":
            failing.failures = list(*rest)
            await writer._write_once()
            failing.failures = []
            if not writer.failing:
                assert writer.pending == 0
                unwritten[number].clear()
        else:
            may_miss += unwritten[number]
            unwritten[number].clear()
            instances[number] = started()
    for _, writer in instances:
        await writer.flush(60)
        assert (writer.pending, writer.lost, writer.failing) == (0, 0, False)
    stored = await _stored(database)
    for at in truth:
        assert truth[at] - may_miss[at] <= stored[at] <= truth[at], at
    assert set(stored) <= set(truth)


async def _stored(database: Database) -> Counter[tuple[str, int]]:
    """Units in the ledger by key and whether they were blocked; the other tables must agree with it."""
    stored: Counter[tuple[str, int]] = Counter()
    async with database.reading() as connection:
        for row in (await connection.execute(select(usage_ledger))).mappings():
            stored.update({(row["key_id"], 0): row["admitted"], (row["key_id"], 1): row["blocked"]})
        for table in (traffic_minutes, traffic_callers):
            rows = (await connection.execute(select(table))).mappings().all()
            assert sum(row["allowed"] + row["blocked"] for row in rows) == stored.total(), table.name
        await connection.execute(select(ledger_batches))
    return +stored


async def test_a_batch_whose_answer_was_lost_is_not_added_twice(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="tidegate.ledger")
    database = await Database.open("sqlite://")
    failing = FailingDatabase(database)
    latency = LatencyHistogram()
    counts = UsageCounts(latency=latency)
    writer = UsageWriter(counts, failing, retention=Retention(max_callers=10))  # type: ignore[arg-type]
    counts.observe(check(cost=7))
    latency.add(1)
    failing.failures = ["answer lost"]
    await writer._write_once()
    with pytest.raises(CatalogUnavailable, match="wait in memory: connection lost after the commit"):
        await writer.ping()
    assert (writer.written, writer.pending) == (0, 4)
    counts.observe(check(cost=2))
    failing.failures = ["away", "away"]
    await writer._write_once()
    await writer._write_once()
    await writer._write_once()
    await writer.ping()
    assert (writer.written, writer.repeated, writer.pending) == (9, 1, 0)
    assert (await _stored(database))[KEY, 0] == 9
    async with database.reading() as connection:
        assert (await connection.execute(select(traffic_latency.c.bucket, traffic_latency.c.checks))).all() == [(0, 1)]
    lines = [record.message for record in caplog.records]
    assert len(lines) == 2, "one line when it fails, one when it works again"
    assert "would be lost with this process" in lines[0]
    await database.close()


async def test_what_a_database_that_is_away_costs_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    database = await Database.open("sqlite://")
    failing = FailingDatabase(database)
    counts = UsageCounts()
    writer = UsageWriter(counts, failing)  # type: ignore[arg-type]
    counts.observe(check(cost=5))
    failing.failures = ["away"] * 1_000
    await writer._write_once()
    counts.observe(check(cost=3))
    await writer.flush(0.01)
    assert writer.lost == 8
    assert "8 units of usage are not confirmed" in caplog.text
    await database.close()


def test_metrics() -> None:
    metrics = Metrics("x")
    counts = UsageCounts()
    writer = UsageWriter(counts, object.__new__(Database))
    collect_usage(metrics, writer)
    counts.observe(check())
    counts.unattributed = 3
    writer.written = 5
    found = values(metrics)
    assert found["rate_limiter_ledger_units_written_total", ()] == 5
    assert found["rate_limiter_ledger_units_unattributed_total", ()] == 3
    assert found["rate_limiter_ledger_pending", ()] == 1
    assert found["rate_limiter_ledger_batches_repeated_total", ()] == 0
    assert found["rate_limiter_traffic_rows_dropped_total", ()] == 0
