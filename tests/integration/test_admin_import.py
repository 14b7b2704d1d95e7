"""A policy that is imported: what it costs those who wait meanwhile, and what becomes of changes made at the same time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy import event

from tests.integration.admin_api import Admin, open_admin
from tidegate.admin import import_export as importing
from tidegate.doors.admin import policy as policy_door

RULES = 2_000


def policy(rules: int, tier: str = "t") -> str:
    return f'[[tiers]]\nname = "{tier}"\n' + "".join(
        f'[[tiers.rules]]\nendpoint = "/r{number}"\nlimits = ["1/s"]\n' for number in range(rules)
    )


@pytest.fixture
async def admin(catalog_url: str) -> AsyncIterator[Admin]:
    made = await open_admin(catalog_url)
    yield made
    await made.close()


async def _imported(admin: Admin, text: str, **parameters: bool) -> list[dict[str, Any]]:
    answer = await admin.http.post("/policy", content=text, params=parameters)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["changes"])


async def test_a_dry_run_takes_no_write_lock(admin: Admin) -> None:
    await admin.tier()
    version = await admin.catalog.version()
    async with admin.editor.changing("somebody else"):
        changes = await _imported(admin, policy(3), dry_run=True)
    assert [(each["action"], each["kind"], each["target"]) for each in changes] == [
        ("create", "tier", "t"),
        *(("create", "rule", f"/r{number}") for number in range(3)),
    ]
    assert changes[1]["after"]["id"] is None
    assert (changes[1]["after"]["tier"], changes[1]["after"]["endpoint"]) == ("t", "/r0")
    assert await admin.catalog.version() > version  # by somebody else
    assert (await admin.http.get("/tiers/t")).status_code == 404


async def test_an_import_reads_outside_the_event_loop(admin: Admin, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: dict[str, int] = {}

    def noted(module: Any, name: str) -> None:
        real = getattr(module, name)

        def call(*arguments: Any, **named: Any) -> Any:
            threads[name] = threading.get_ident()
            return real(*arguments, **named)

        monkeypatch.setattr(module, name, call)

    for module, name in (
        (policy_door, "parse_policy"),
        (policy_door, "policy_warnings"),
        (policy_door, "policy_text"),
        (importing, "plan_import"),
    ):
        noted(module, name)
    await _imported(admin, policy(1))
    assert (await admin.http.get("/policy")).status_code == 200
    assert len(threads) == 4
    assert threading.get_ident() not in threads.values()


async def test_many_rules_are_written_in_few_statements(admin: Admin) -> None:
    statements: list[str] = []
    engine = admin.catalog.database._writer.sync_engine

    def count(_: Any, __: Any, statement: str, *rest: Any) -> None:
        statements.append(statement)

    event.listen(engine, "before_cursor_execute", count)
    changes = await _imported(admin, policy(RULES))
    assert len(changes) == RULES + 1
    assert len(statements) < 100
    rules = (await admin.http.get("/rate-limit-rules", params={"limit": 500})).json()["items"]
    made = {each["target"]: each["after"]["name"] for each in changes}
    assert {str(each["id"]): each["name"] for each in rules}.items() <= made.items()
    audited = (await admin.http.get("/audit-log", params={"target": changes[-1]["target"], "kind": "rule"})).json()["items"]
    assert [each["after"] for each in audited] == [changes[-1]["after"]]
    assert await _imported(admin, policy(RULES)) == []
    statements.clear()
    assert (await admin.http.delete("/tiers/t", headers={"If-Match": "*"})).status_code == 204
    assert len(statements) < 50


async def test_positions_follow_those_there_are(admin: Admin) -> None:
    await _imported(admin, policy(2))
    text = policy(0) + "".join(f'[[tiers.rules]]\nendpoint = "/{name}"\nlimits = ["1/s"]\n' for name in ("b", "a", "r1"))
    await _imported(admin, text)
    (tier,) = await admin.catalog.list_tiers()
    assert [rule.name for rule in tier.rules] == ["/r0", "/r1", "/b", "/a"]


@pytest.mark.parametrize("times", [1, 2, 3])
async def test_a_concurrent_change_is_detected(admin: Admin, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """The plan is made without the lock: where the catalog changed since, it is made again, at last with the lock."""
    loop, real, calls = asyncio.get_running_loop(), importing.plan_import, 0

    def plan(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        found = real(*arguments, **named)
        if calls <= times:
            other = admin.editor.create_tier("other", "t" if calls == 1 else f"o{calls}", [])
            asyncio.run_coroutine_threadsafe(other, loop).result()
        return found

    monkeypatch.setattr(importing, "plan_import", plan)
    changes = await _imported(admin, policy(1))
    assert calls == times + 1
    assert [(each["action"], each["kind"]) for each in changes] == [("create", "rule")]
    assert [tier.name for tier in await admin.catalog.list_tiers()] == sorted(["t", *(f"o{n}" for n in range(2, times + 1))])


async def test_imports_at_once_are_all_made(admin: Admin) -> None:
    await asyncio.gather(*(_imported(admin, policy(5, tier=f"t{number}")) for number in range(6)))
    found = await admin.catalog.list_tiers()
    assert [len(tier.rules) for tier in found] == [5] * 6


async def test_what_an_import_goes_through_is_bounded(admin: Admin, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = "".join(f'[[api_keys]]\nsha256 = "{number:064x}"\ntier = "t"\n' for number in (1 << 200, 2 << 200, 3 << 200, 4 << 200))
    await _imported(admin, policy(3) + keys)
    monkeypatch.setattr(importing, "MAX_KEYS", 3)
    refused = await admin.http.post("/policy", content=policy(3), params={"prune": True, "dry_run": True})
    assert (refused.status_code, "more than 3 API keys would be removed" in refused.text) == (409, True)
    monkeypatch.setattr(importing, "MAX_COMPARED_RULES", 2)
    refused = await admin.http.post("/policy", content=policy(3))
    assert (refused.status_code, "more than 2 rules" in refused.text) == (409, True)


async def test_a_text_that_takes_long_to_read_is_rejected(admin: Admin) -> None:
    refused = await admin.http.post("/policy", content="a." * 8_000 + "a = 1", params={"dry_run": True})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "POLICY_REFUSED")
