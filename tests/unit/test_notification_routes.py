"""/admin/v1/notifications: the list, its filter and pages, and the retry of one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import insert, update

from tests.integration.admin_api import Admin, open_admin
from tests.servers.migrated import copy_sqlite
from tidegate.catalog.sql.tables import notifications
from tidegate.notifications.events import Event
from tidegate.policy.notify import EventType, NotifyTarget
from tidegate.timestamps import now_us

TARGET = NotifyTarget("https://hooks.example/", "env:HOOK", (80,))


@pytest.fixture
async def admin(tmp_path: Path) -> AsyncIterator[Admin]:
    copy_sqlite(tmp_path / "tidegate.db")
    made = await open_admin(f"sqlite:///{tmp_path}/tidegate.db")
    yield made
    await made.http.aclose()
    await made.catalog.close()


async def test_list_and_retry(admin: Admin) -> None:
    events = [Event(EventType.BLOCKED, (number,), f"b:{number}", 5, {"block_id": number}) for number in range(3)]
    rows = [row for number, event in enumerate(events) for row in event.rows([TARGET], 1_000_000 + number, 10)]
    failed = {"status": "failed", "attempts": 7, "answer": 500, "error": "the receiver answered 500"}
    async with admin.catalog.database.transaction() as connection:
        await connection.execute(insert(notifications), rows)
        await connection.execute(update(notifications).where(notifications.c.id == rows[0]["id"]).values(**failed))
        await connection.execute(update(notifications).where(notifications.c.id == rows[1]["id"]).values(status="delivered"))
    first = (await admin.http.get("/notifications", params={"limit": 2})).json()
    assert [item["subject"] for item in first["items"]] == ["b:2", "b:1"]
    second = (await admin.http.get("/notifications", params={"limit": 2, "after": first["next"]})).json()
    assert second == {
        "items": [
            {
                "id": rows[0]["id"],
                "event": "blocked",
                "subject": "b:0",
                "url": "https://hooks.example/",
                "body": {"type": "blocked", "timestamp": "1970-01-01T00:00:00.000005Z", "data": {"block_id": 0}},
                "status": "failed",
                "attempts": 7,
                "created_at": "1970-01-01T00:00:01Z",
                "attempted_at": None,
                "next_attempt_at": None,
                "answer": 500,
                "error": "the receiver answered 500",
            }
        ],
        "next": None,
    }
    pending = (await admin.http.get("/notifications", params={"status": "pending"})).json()["items"]
    assert [item["next_attempt_at"] for item in pending] == ["1970-01-01T00:00:01.000002Z"]
    assert (await admin.http.get("/notifications", params={"status": "lost"})).status_code == 400
    assert (await admin.http.get("/notifications", params={"after": "x"})).status_code == 400

    retried = await admin.http.post(f"/notifications/{rows[0]['id']}/retry")
    assert (retried.status_code, retried.json()["status"]) == (200, "pending")
    async with admin.catalog.database.reading() as connection:
        row = (await connection.execute(notifications.select().where(notifications.c.id == rows[0]["id"]))).mappings().one()
    assert row["next_at_us"] <= now_us() < row["give_up_at_us"]
    audited = (await admin.http.get("/audit-log")).json()["items"][0]
    assert (audited["action"], audited["kind"], audited["before"]) == ("retry", "notification", {"status": "failed"})
    refused = await admin.http.post(f"/notifications/{rows[1]['id']}/retry")
    assert (refused.status_code, "is delivered already" in refused.json()["error"]["message"]) == (409, True)
    assert (await admin.http.post("/notifications/msg_none/retry")).status_code == 404
