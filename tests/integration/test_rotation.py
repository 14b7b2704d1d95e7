"""A key that is rotated goes on with its owner's counters; digests that no key matches are refused or warned of."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.integration.admin_api import Admin
from tests.integration.catalog_keys import editor_of, make_key
from tidegate.admin import api_keys
from tidegate.admin.import_export import import_policy
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.sql.catalog import SqlCatalog
from tidegate.counters.memory import MemoryCounters
from tidegate.decision import Check, Decision
from tidegate.errors import InvalidApiKey, PolicyError
from tidegate.gate.gate import Gate
from tidegate.gate.subjects import DescriptorCheck
from tidegate.policy.key_format import hash_api_key, parse_key_digest
from tidegate.policy.toml_reader import parse_policy

POLICY = """
[[tiers]]
name = "free"
limits = ["10/366d"]
  [[tiers.rules]]
  endpoint = "/a"
  limits = ["5/366d"]
  [[tiers.rules]]
  descriptor = { user = "*" }
  limits = ["3/366d"]
"""


@pytest.fixture
async def catalog(catalog_url: str) -> AsyncIterator[SqlCatalog]:
    opened = await SqlCatalog.open(catalog_url)
    await import_policy(editor_of(opened), "test", parse_policy(POLICY))
    yield opened
    await opened.close()


async def remaining(gate: Gate, key: str, cost: int = 1) -> int | None:
    return (await gate.check(Check.of("/a", api_key=key, cost=cost))).remaining


@pytest.mark.parametrize("grace_s", [0, 3600])
async def test_a_rotated_key_goes_on_with_the_counters_of_its_owner(catalog: SqlCatalog, grace_s: int) -> None:
    cached = CachedCatalog(catalog)
    gate, editor = Gate(cached, MemoryCounters()), editor_of(catalog, cached)
    key, record = await make_key(catalog, "free", "acme")
    assert await remaining(gate, key, 3) == 2
    (plan,) = await gate.plan_many([DescriptorCheck({"user": "x"}, key, 3)])
    assert plan is not None
    await gate.decide([plan])
    for turn in range(3):
        made = await api_keys.rotate_key(editor, "test", hash_api_key(key)[:24], grace_s)
        assert (made.counts_as, made.id == record.id, made.replaces.counts_as) == (record.id, False, record.id)
        key = made.api_key
        assert await remaining(gate, key, 0) == 2, f"rotation {turn}"
    assert await remaining(gate, key) == 1
    (plan,) = await gate.plan_many([DescriptorCheck({"user": "x"}, key, 1)])
    assert plan is not None
    (settled,) = await gate.decide([plan])
    assert isinstance(settled.outcome, Decision)
    assert not settled.outcome.allowed
    usage = await gate.usage(key)
    assert [rule.decision.remaining for rule in usage.rules] == [6, 1]
    await gate.reset(key)
    assert await remaining(gate, key) == 4
    other, _ = await make_key(catalog, "free")
    assert await remaining(gate, other) == 4, "another owner counts apart"


async def test_while_both_keys_work_they_count_together(catalog: SqlCatalog) -> None:
    cached = CachedCatalog(catalog)
    gate, editor = Gate(cached, MemoryCounters()), editor_of(catalog, cached)
    old, record = await make_key(catalog, "free")
    new = (await api_keys.rotate_key(editor, "test", record.id, 3600)).api_key
    assert [await remaining(gate, key) for key in (old, new, old, new)] == [4, 3, 2, 1]


async def test_an_import_leaves_a_rotated_key_its_owner(catalog: SqlCatalog) -> None:
    editor = editor_of(catalog)
    _, record = await make_key(catalog, "free")
    new = (await api_keys.rotate_key(editor, "test", record.id, 0)).api_key
    text = f'{POLICY}\n[[api_keys]]\nsha256 = "{hash_api_key(new)}"\ntier = "free"\nname = "renamed"\n'
    await import_policy(editor, "test", parse_policy(text))
    api_key = (await catalog.api_key(hash_api_key(new)))[1]
    assert api_key is not None
    assert (api_key.name, api_key.owner) == ("renamed", record.id)


async def test_operators_find_what_a_rotated_key_consumed(admin: Admin) -> None:
    await admin.http.post("/tiers", json={"name": "free", "limits": ["10/366d"]})
    made = (await admin.http.post("/api-keys", json={"tier": "free"})).json()
    rotated = (await admin.http.post(f"/api-keys/{made['id']}/rotate", json={"grace_s": 0})).json()
    assert (rotated["counts_as"], rotated["replaces"]["counts_as"]) == (made["id"], made["id"])
    await admin.gate.check(Check.of("/a", api_key=rotated["api_key"], cost=4))
    for key_id in (made["id"], rotated["id"]):
        usage = (await admin.http.get("/usage", params={"api_key_id": key_id})).json()
        assert usage["rules"][0]["remaining"] == 6
    await admin.http.post("/counters/reset", json={"api_key_id": rotated["id"]})
    usage = (await admin.http.get("/usage", params={"api_key_id": rotated["id"]})).json()
    assert usage["rules"][0]["remaining"] == 10
    for path in ("/violations", "/violations/top"):
        assert (await admin.http.get(path, params={"api_key_id": rotated["id"]})).status_code == 200


async def test_keys_of_another_service_work_once_their_digests_are_imported(admin: Admin) -> None:
    foreign = ["sk.live/of+another=service", "short", "k" * 512]
    tables = "".join(f'[[api_keys]]\nsha256 = "{hash_api_key(key)}"\ntier = "t"\n' for key in foreign)
    text = '[[tiers]]\nname = "t"\nlimits = ["5/day"]\n' + tables
    answer = await admin.http.post("/policy", content=text, headers={"Content-Type": "application/toml"})
    assert (answer.status_code, answer.json()["warnings"]) == (200, [])
    for key in foreign:
        for cost, left in ((2, 3), (3, 0)):
            decision = await admin.gate.check(Check.of("/a", api_key=key, cost=cost))
            assert (decision.allowed, decision.remaining) == (True, left)
    with pytest.raises(InvalidApiKey, match="unknown"):
        await admin.gate.check(Check.of("/a", api_key="sk.live/of+another=servicE"))
    with pytest.raises(InvalidApiKey, match="mistyped: copy it again"):
        await admin.gate.check(Check.of("/a", api_key="tg_mistyped"))


@pytest.mark.parametrize("text", ["", "\n"])
def test_the_digest_of_no_text_is_rejected(text: str) -> None:
    with pytest.raises(PolicyError, match="digest of no text at all"):
        parse_key_digest(sha256=hash_api_key(text).upper())
