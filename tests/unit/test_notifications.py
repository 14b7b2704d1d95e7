"""Notifications from event to receiver, on SQLite and a real HTTP server: signature, retries, claims, the bounded queue."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import insert, select, update

from tests.moments import PATIENCE_S, until
from tests.servers.migrated import copy_sqlite
from tests.servers.webhook_receiver import SECRET, Received, WebhookReceiver
from tidegate.catalog.sql.catalog import SqlCatalog
from tidegate.catalog.sql.tables import api_keys, audit_log, notifications, tiers
from tidegate.counters.crossings import CrossingWatch
from tidegate.counters.memory import MemoryCounters
from tidegate.errors import PolicyError
from tidegate.notifications import notifier as notifying
from tidegate.notifications.delivery import Attempt, post
from tidegate.notifications.events import Event
from tidegate.notifications.notifier import Notifier, NotifierOptions
from tidegate.notifications.signature import signature
from tidegate.notifications.storage import add_rows, claim, delete_old, finish
from tidegate.policy.limits import Algorithm, Limit, LimitSet
from tidegate.policy.notify import EventType, NotifyTarget
from tidegate.timestamps import US_PER_S, now_us

LIMITS = LimitSet("pro:a", Algorithm.FIXED_WINDOW, [Limit.parse("10/hour")], rule="a", tier="pro")
ALL = tuple(EventType)
FAST = NotifierOptions(retry_s=0.01, timeout_s=5)


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOK", SECRET)


@pytest.fixture
def receiver() -> Iterator[WebhookReceiver]:
    made = WebhookReceiver()
    yield made
    made.close()


@pytest.fixture
async def catalog(tmp_path: Path) -> AsyncIterator[SqlCatalog]:
    copy_sqlite(tmp_path / "tidegate.db")
    made = await SqlCatalog.open(f"sqlite:///{tmp_path}/tidegate.db")
    yield made
    await made.close()


class Setup:
    """A notifier and the counters that it watches."""

    def __init__(self, catalog: SqlCatalog, *targets: NotifyTarget, options: NotifierOptions = FAST) -> None:
        self.targets: tuple[NotifyTarget, ...] = targets
        self.counters = MemoryCounters()
        self.database = catalog.database
        self.notifier = Notifier(catalog.database, self._read, self._watch, options)

    async def _read(self) -> tuple[NotifyTarget, ...]:
        return self.targets

    def _watch(self, watch: CrossingWatch | None) -> None:
        self.counters.watch = watch

    def charge(self, subject: str, cost: int) -> None:
        self.counters.charge_all(((LIMITS, subject),), cost)

    async def rows(self) -> list[dict[str, Any]]:
        async with self.database.reading() as connection:
            found = await connection.execute(select(notifications).order_by(notifications.c.subject, notifications.c.id))
            return [dict(row) for row in found.mappings()]


def _target(url: str, *, at: tuple[int, ...] = (80, 100), events: tuple[EventType, ...] = (EventType.THRESHOLD,)) -> NotifyTarget:
    return NotifyTarget(url, "env:HOOK", at, events)


def _verify(received: Received) -> None:
    """As docs/notifications.md shows it."""
    key = base64.b64decode(SECRET.removeprefix("whsec_"))
    signed = f"{received.headers['webhook-id']}.{received.headers['webhook-timestamp']}.".encode() + received.body
    expected = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    assert f"v1,{expected}" in received.headers["webhook-signature"].split()
    assert abs(int(received.headers["webhook-timestamp"]) - now_us() // US_PER_S) < 300


def test_the_signature_is_that_of_the_published_test_vector() -> None:
    key = base64.b64decode(SECRET.removeprefix("whsec_"))
    signed = signature(key, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert signed == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


async def test_a_crossing_is_delivered_signed_once(catalog: SqlCatalog, receiver: WebhookReceiver) -> None:
    # Two tables for one URL: one event.
    one, two = Setup(catalog, _target(receiver.url), _target(receiver.url, at=(80,))), Setup(catalog, _target(receiver.url))
    for each in (one, two):
        await each.notifier.load_targets()
        # As two processes that report the same crossing.
        each.charge("k:1", 8)
        await each.notifier.flush()
    assert len(await one.rows()) == 1
    assert [await each.notifier.deliver_due() for each in (one, two, one)] == [1, 0, 0]
    (received,) = receiver.received
    _verify(received)
    assert received.headers["content-type"] == "application/json"
    assert received.event["type"] == "threshold"
    assert (received.event["data"]["subject"], received.event["data"]["percent"], received.event["data"]["used"]) == (
        "k:1",
        80,
        8,
    )
    (row,) = await one.rows()
    assert (row["id"], row["status"], row["attempts"], row["answer"], row["error"]) == (received.id, "delivered", 1, 204, None)
    assert one.notifier.counts == {"delivered": 1, "retried": 0, "failed": 0, "dropped": 0}


async def test_a_receiver_that_is_down_gets_it_when_it_is_up(catalog: SqlCatalog, receiver: WebhookReceiver) -> None:
    port = receiver.port
    receiver.close()
    setup = Setup(catalog, _target(f"http://127.0.0.1:{port}/hooks"))
    await setup.notifier.load_targets()
    tasks = [asyncio.create_task(setup.notifier.write()), asyncio.create_task(setup.notifier.deliver())]
    setup.charge("k:1", 10)
    await until(lambda: setup.notifier.counts["retried"] >= 2)
    retried = await setup.rows()
    assert {(row["status"], row["answer"], row["error"]) for row in retried} == {
        ("pending", None, "cannot connect: Connection refused")
    }
    up = WebhookReceiver(port)
    try:
        await until(lambda: setup.notifier.counts["delivered"] == 2)
        assert sorted(data["percent"] for data in up.events()) == [80, 100]
        assert sorted(each.id for each in up.received) == sorted(row["id"] for row in await setup.rows())
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        up.close()


@pytest.mark.parametrize(
    ("answer", "location", "status", "error"),
    [
        (500, "", "pending", "the receiver answered 500"),
        (302, "/elsewhere", "pending", "the receiver answered 302, and redirections are not followed"),
        (410, "", "failed", "the receiver answered 410"),
    ],
)
async def test_what_is_not_accepted(
    catalog: SqlCatalog, receiver: WebhookReceiver, answer: int, location: str, status: str, error: str
) -> None:
    setup = Setup(catalog, _target(receiver.url, at=(80,)), options=NotifierOptions(retry_s=3000))
    await setup.notifier.load_targets()
    receiver.answer, receiver.location = answer, location
    setup.charge("k:1", 8)
    await setup.notifier.flush()
    assert await setup.notifier.deliver_due() == 1
    (row,) = await setup.rows()
    assert (row["status"], row["answer"], row["error"], len(receiver.received)) == (status, answer, error, 1)
    if status == "pending":
        assert row["next_at_us"] > now_us() + 1000 * US_PER_S
    # The URL is paused: another event waits, and is not counted as an attempt.
    setup.charge("k:2", 8)
    await setup.notifier.flush()
    assert await setup.notifier.deliver_due() == 0
    assert [row["attempts"] for row in await setup.rows()] == [1, 0]


async def test_it_gives_up_at_last(catalog: SqlCatalog, receiver: WebhookReceiver) -> None:
    setup = Setup(catalog, _target(receiver.url, at=(80,)), options=NotifierOptions(retry_s=3000, give_up_s=60))
    await setup.notifier.load_targets()
    receiver.answer = 503
    setup.charge("k:1", 8)
    await setup.notifier.flush()
    await setup.notifier.deliver_due()
    assert [(row["status"], row["answer"]) for row in await setup.rows()] == [("failed", 503)]
    assert setup.notifier.counts["failed"] == 1


async def test_a_url_or_a_secret_that_is_gone(
    catalog: SqlCatalog, receiver: WebhookReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup(catalog, _target(receiver.url, at=(80,)))
    needed = []
    setup.notifier.when_needed = lambda: needed.append(True)
    await setup.notifier.load_targets()
    assert needed == [True]
    await setup.notifier.ping()
    monkeypatch.delenv("HOOK")
    with pytest.raises(PolicyError, match="HOOK is not set"):
        await setup.notifier.ping()
    setup.charge("k:1", 8)
    await setup.notifier.flush()
    await setup.notifier.deliver_due()
    (row,) = await setup.rows()
    assert (row["status"], row["error"].split(":")[0]) == ("pending", "[[notify]] has the secret 'env")
    setup.targets = ()
    await setup.notifier.load_targets()
    assert setup.counters.watch is None
    await until(lambda: now_us() >= row["next_at_us"])
    assert await setup.notifier.deliver_due() == 1
    (row,) = await setup.rows()
    assert (row["status"], row["error"]) == ("failed", "the policy has no [[notify]] with this url any more")
    assert receiver.received == []


async def test_a_receiver_that_answers_a_byte_at_a_time_ends_within_a_bound(catalog: SqlCatalog) -> None:
    released, ended = asyncio.Event(), asyncio.Event()

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            writer.write(b"HTTP/1.1 200 OK\r\n")
            while not released.is_set():
                writer.write(b"a")
                await writer.drain()
                await asyncio.sleep(0.02)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        ended.set()

    server = await asyncio.start_server(drip, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    setup = Setup(catalog, _target(url, at=(80,)), options=NotifierOptions(retry_s=3000, timeout_s=0.2))
    await setup.notifier.load_targets()
    setup.charge("k:1", 8)
    await setup.notifier.flush()
    assert await setup.notifier.deliver_due() == 1
    assert [row["error"] for row in await setup.rows()] == ["the receiver did not answer in time"]
    released.set()
    await asyncio.wait_for(ended.wait(), PATIENCE_S)
    server.close()
    await server.wait_closed()


def test_a_certificate_that_nobody_vouches_for_is_refused() -> None:
    import ssl

    import trustme

    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    receiver = WebhookReceiver()
    receiver._server.socket = context.wrap_socket(receiver._server.socket, server_side=True)
    try:
        result = post(f"https://127.0.0.1:{receiver.port}/", b"k" * 16, "msg_1", 1, b"{}", 5)
    finally:
        receiver.close()
    assert result.error.startswith("the certificate is not valid: ")
    assert (result.answer, result.delivered, receiver.received) == (None, False, [])


async def test_the_queues_are_bounded_and_what_is_dropped_is_counted(
    catalog: SqlCatalog, receiver: WebhookReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup(catalog, _target(receiver.url, at=(80,)), options=NotifierOptions(max_pending=3))
    await setup.notifier.load_targets()
    monkeypatch.setattr(notifying, "MAX_QUEUE", 5)
    monkeypatch.setattr(notifying, "MAX_RECENT", 4)
    for number in range(8):
        setup.charge(f"k:{number}", 8)
    assert (setup.notifier.pending, setup.notifier.counts["dropped"]) == (5, 3)
    await setup.notifier.flush()
    assert (setup.notifier.pending, setup.notifier.counts["dropped"], len(await setup.rows())) == (0, 5, 3)


async def test_a_row_is_claimed_by_one_process_and_again_when_the_claim_has_ended(catalog: SqlCatalog) -> None:
    database = catalog.database
    event = Event(EventType.BLOCKED, (1,), "b:1", 5, {})
    rows = event.rows([_target("https://a.example"), _target("https://b.example")], 10, 1000)
    assert await add_rows(database, rows, 100) == 0
    assert await claim(database, 9, 99, 5) == ()
    assert await claim(database, 10, 20, 5, ["https://a.example", "https://b.example"]) == ()
    claims = await asyncio.gather(claim(database, 10, 20, 1), claim(database, 10, 20, 1), claim(database, 10, 20, 5))
    claimed = [row for each in claims for row in each]
    assert sorted(row["id"] for row in claimed) == sorted(row["id"] for row in rows)
    assert await claim(database, 19, 30, 5) == ()
    again = await claim(database, 20, 30, 5)
    assert [row["attempts"] for row in again] == [2, 2]
    # The result of the process whose claim has ended counts no more.
    await finish(database, claimed[0], Attempt(None, "late"), 21, None)
    for row in again:
        await finish(database, row, Attempt(200), 22, None)
    await delete_old(database, 10)
    async with database.reading() as connection:
        assert (await connection.execute(select(notifications.c.status))).scalars().all() == ["delivered"] * 2
    await delete_old(database, 11)
    async with database.reading() as connection:
        assert (await connection.execute(select(notifications.c.status))).scalars().all() == []


async def test_keys_and_blocks(catalog: SqlCatalog, receiver: WebhookReceiver) -> None:
    now = now_us()
    key = {"tier_id": 1, "status": "active", "overrides": [], "created_at_us": 1, "managed_by_file": False}
    audit = {"at_us": now, "actor": "ann", "before": None, "after": None}
    revoked = {"name": "old", "tier": "pro", "customer": "acme", "revoked_reason": "leaked", "status": "revoked"}
    block = {"cidr": "203.0.113.0/24", "until": None, "reason": "abuse"}
    async with catalog.database.transaction() as connection:
        await connection.execute(insert(tiers).values(id=1, name="pro", limits=[]))
        expiries = {"a": now - 2 * 3600 * US_PER_S, "b": now - 5, "c": now + 3600 * US_PER_S}
        for name, expires_at_us in expiries.items():
            values = {**key, "id": name * 24, "sha256": name * 64, "name": name, "expires_at_us": expires_at_us}
            await connection.execute(insert(api_keys).values(values))
        for values in (
            {"action": "revoke", "kind": "api_key", "target": "d" * 24, "before": {"status": "active"}, "after": revoked},
            {"action": "update", "kind": "api_key", "target": "e" * 24, "before": revoked, "after": revoked},
            {"action": "create", "kind": "block", "target": "7", "after": block},
            {"action": "delete", "kind": "block", "target": "7", "before": block, "after": block},
        ):
            await connection.execute(insert(audit_log).values({**audit, **values}))
    other = msgspec.structs.replace(_target("https://other.example", at=(), events=ALL[1:]), tiers=("free",))
    setups = [Setup(catalog, _target(receiver.url, events=ALL), other) for _ in range(2)]
    for setup in setups:
        await setup.notifier.load_targets()
        await setup.notifier.scan()
        await setup.notifier.flush()
    found = {(row["url"], row["event"]): json.loads(row["body"])["data"] for row in await setups[0].rows()}
    assert len(found) == len(await setups[0].rows()) == 4
    assert found[(receiver.url, "key_expired")]["api_key_id"] == "b" * 24
    assert found[(receiver.url, "key_revoked")]["reason"] == "leaked"
    assert found[(receiver.url, "blocked")] == found[("https://other.example", "blocked")]
    assert found[(receiver.url, "blocked")]["cidr"] == "203.0.113.0/24"
    # What happens later is found by the next look.
    async with catalog.database.transaction() as connection:
        await connection.execute(update(api_keys).where(api_keys.c.name == "c").values(expires_at_us=now - 1))
        changed = {"action": "revoke", "kind": "api_key", "target": "f" * 24, "before": {"status": "expired"}, "after": revoked}
        await connection.execute(insert(audit_log).values({**audit, **changed}))
    for setup in setups:
        await setup.notifier.scan()
        await setup.notifier.flush()
    assert len(await setups[0].rows()) == 6


async def test_what_waits_at_the_end_is_written(catalog: SqlCatalog) -> None:
    setup = Setup(catalog, _target("https://a.example"))
    await setup.notifier.load_targets()
    setup.charge("k:1", 8)
    await setup.notifier.flush_at_end()
    assert len(await setup.rows()) == 1
