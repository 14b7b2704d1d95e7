"""What a change would have done: an access log replayed as the policy is and as it would be, by a process of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.admin_api import Admin, open_admin
from tests.moments import PATIENCE_S
from tidegate.admin.what_if_history import blocked_bounds
from tidegate.admin.what_if_runs import MAX_RUNS, SILENT_S, start_run
from tidegate.catalog.sql.tables import traffic_callers, what_if_runs
from tidegate.policy.limits import Limit
from tidegate.timestamps import US_PER_S, now_us

LOG = "".join(f'203.0.113.{n % 2} - - [01/Nov/2026:10:00:{n:02} +0000] "GET /api/a HTTP/1.1" 200 1\n' for n in range(40))


@pytest.fixture
async def admin(tmp_path: Path) -> AsyncIterator[Admin]:
    made = await open_admin(f"sqlite:///{tmp_path}/tidegate.db")
    await made.tier(limits=())
    yield made
    await made.close()


async def _ended(admin: Admin, run: dict[str, Any]) -> dict[str, Any]:
    async with asyncio.timeout(PATIENCE_S):
        while run["state"] == "running":
            await asyncio.sleep(0.1)
            run = (await admin.http.get(f"/what-if/{run['id']}")).json()
    return run


async def test_a_lower_limit_shows_who_would_have_been_blocked(admin: Admin) -> None:
    rule = await admin.rule("/api/*", limits=["30/minute"], subject="ip")
    body = {"rule": {"id": rule["id"], "limits": ["5/minute"]}, "log": LOG}
    answer = await admin.http.post("/what-if", json=body)
    assert answer.status_code == 202, answer.text
    run = await _ended(admin, answer.json())
    assert (run["state"], run["progress"]) == ("done", 1.0), run
    before, after = run["result"]["before"], run["result"]["after"]
    assert (before["requests"], before["blocked"]) == (40, 0)
    assert (after["requests"], after["blocked"]) == (40, 30)
    assert {(each["subject"], each["blocked"]) for each in after["top_blocked"]} == {("203.0.113.0", 15), ("203.0.113.1", 15)}
    assert (await admin.http.get(f"/rate-limit-rules/{rule['id']}")).json()["limits"] == ["30/minute"], "nothing was changed"


async def test_what_cannot_be_tried_is_refused(admin: Admin) -> None:
    rule = await admin.rule()
    change = {"id": rule["id"], "limits": ["5/minute"]}
    for body, status in (
        ({}, 400),
        ({"log": LOG}, 400),
        ({"rule": change, "log": ""}, 400),
        ({"policy": "[[tiers]]"}, 400),
        ({"rule": change, "policy": "x", "log": LOG}, 400),
        ({"rule": {**change, "limits": ["5/fortnight"]}, "log": LOG}, 400),
        ({"rule": {**change, "id": 99}, "log": LOG}, 404),
        ({"policy": "[[tiers", "log": LOG}, 400),
        ({"rule": change, "log": 7}, 400),
        ({"rule": change, "log": LOG, "more": 1}, 400),
    ):
        answer = await admin.http.post("/what-if", json=body)
        assert answer.status_code == status, (body, answer.text)
    assert (await admin.http.post("/what-if", content=b"{")).status_code == 400
    for run_id in ("x", "0" * 32, "0" * 33):
        assert (await admin.http.get(f"/what-if/{run_id}")).status_code in (400, 404)


async def test_a_log_that_cannot_be_read_and_a_cancelled_run_say_so(admin: Admin) -> None:
    rule = await admin.rule()
    body: dict[str, Any] = {"rule": {"id": rule["id"], "limits": ["5/minute"]}, "log": "nothing that is a log\n"}
    failed = (await admin.http.post("/what-if", json=body)).json()
    cancelled = (await admin.http.post("/what-if", json={**body, "log": LOG})).json()
    third = await admin.http.post("/what-if", json=body)
    assert (third.status_code, "under way" in third.text) == (409, True)
    run = (await admin.http.delete(f"/what-if/{cancelled['id']}")).json()
    assert run["state"] == "cancelled"
    run = await _ended(admin, failed)
    assert (run["state"], run["result"]) == ("failed", None)
    assert "known format" in run["message"]
    assert "/tmp" not in run["message"]
    assert (await admin.http.get(f"/what-if/{cancelled['id']}")).json()["state"] == "cancelled"
    viewer = (await admin.http.post("/tokens", json={"name": "v", "role": "viewer"})).json()
    async with admin.client(viewer["token"]) as http:
        assert (await http.post("/what-if", json=body)).status_code == 403
        assert (await http.get(f"/what-if/{failed['id']}")).status_code == 200


async def test_runs_are_bounded_and_one_whose_instance_ended_has_failed(admin: Admin) -> None:
    database = admin.catalog.database
    ids = [await start_run(database, "a") for _ in range(MAX_RUNS + 3)]
    async with database.transaction() as connection:
        assert len((await connection.execute(what_if_runs.select())).all()) == MAX_RUNS
        long_ago = now_us() - (SILENT_S + 1) * US_PER_S
        await connection.execute(what_if_runs.update().values(changed_at_us=long_ago))
    run = (await admin.http.get(f"/what-if/{ids[-1]}")).json()
    assert (run["state"], "has ended" in run["message"]) == ("failed", True)


@pytest.mark.parametrize(
    ("units", "limits", "bounds"),
    [
        ({0: 100}, ["10/minute"], (0, 90)),
        ({0: 1000}, ["10/minute"], (400, 990)),
        ({0: 100, 3600: 100}, ["150/day"], (50, 50)),
        ({0: 100, 86_400: 100}, ["150/day"], (0, 0)),
        ({0: 100}, ["70/hour", "90/day"], (30, 40)),
        ({0: 5}, ["1/minute", "1/hour"], (4, 5)),
    ],
)
def test_bounds_of_what_limits_would_have_blocked(units: dict[int, int], limits: list[str], bounds: tuple[int, int]) -> None:
    assert blocked_bounds(units, [Limit.parse(each) for each in limits]) == bounds


async def test_without_a_log_the_traffic_history_gives_bounds(admin: Admin) -> None:
    rule = await admin.rule("/api/*", limits=["100/minute"], subject="ip")
    body = {"rule": {"id": rule["id"], "limits": ["10/minute"]}}
    run = await _ended(admin, (await admin.http.post("/what-if", json=body)).json())
    assert (run["state"], "no request that this rule answered" in run["message"]) == ("failed", True)
    hour_us = now_us() // (3600 * US_PER_S) * 3600 * US_PER_S
    row = {"hour_us": hour_us, "tier": "free", "rule": rule["name"], "allowed": 900, "blocked": 100, "over_limit": 0}
    async with admin.catalog.database.transaction() as connection:
        await connection.execute(
            traffic_callers.insert(), [{**row, "subject": "i:203.0.113.9"}, {**row, "subject": "i:203.0.113.8"}]
        )
    run = await _ended(admin, (await admin.http.post("/what-if", json=body)).json())
    before, after = run["result"]["before"], run["result"]["after"]
    assert (before["requests"], before["blocked"]) == (2000, 200)
    assert (after["blocked"], after["blocked_at_most"]) == (800, 1980)
    assert {each["subject"] for each in after["top_blocked"]} == {"203.0.113.8", "203.0.113.9"}
    assert "per caller and hour" in run["result"]["note"]
