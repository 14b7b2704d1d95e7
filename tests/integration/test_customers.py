"""Customers in the admin API and on the command line, with a real catalog; the first journey also on PostgreSQL."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration.admin_api import Admin
from tests.integration.cli_ways import Runner, with_catalog
from tidegate.decision import Check
from tidegate.policy.toml_reader import parse_policy

RULES = """
[[tiers]]
name = "pro"
[[tiers.rules]]
endpoint = "/all"
subject = "customer"
limits = ["10/day"]
[[tiers.rules]]
endpoint = "/each"
limits = ["3/day"]
[[tiers]]
name = "free"
[callers]
default_tier = "free"
"""


async def test_the_life_of_a_customer(admin: Admin) -> None:
    assert (await admin.http.post("/policy", content=RULES)).status_code == 200
    body = {"name": "acme", "tier": "pro", "external_id": "cus_1", "match": {"org": "acme"}, "metadata": {"plan": "b"}}
    made = await admin.http.post("/customers", json={**body, "anchor": "2026-01-31", "timezone": "Europe/Berlin"})
    assert (made.status_code, made.headers["etag"]) == (201, '"1"'), made.text
    for wrong, status in (
        ({"name": "acme"}, 409),
        ({"name": "b", "external_id": "cus_1"}, 409),
        ({"name": "b", "match": {"org": ["x", "acme"]}}, 409),
        ({"name": "b", "timezone": "Mars/Olympus"}, 400),
        ({"name": "b", "tier": "none"}, 404),
        ({"name": "b", "limits": ["1/day"]}, 400),
        ({"name": "b", "metadata": {"text": "x" * 4096}}, 400),
    ):
        assert (await admin.http.post("/customers", json=wrong)).status_code == status, wrong
    key = (await admin.http.post("/api-keys", json={"customer": "acme"})).json()
    assert (key["customer"], key["tier"], key["inherits_tier"]) == ("acme", "pro", True)
    assert (await admin.http.post("/api-keys", json={})).status_code == 400
    checks = [Check.of("/all", api_key=key["api_key"]), Check.of("/all", attributes={"org": "acme"}, ip="192.0.2.1")]
    assert [(await admin.gate.check(check)).remaining for check in checks] == [9, 8]

    raised = {"overrides": [{"rule": "/all", "limits": ["20/day"], "until": "9000-01-01T00:00:00Z"}]}
    changed = await admin.http.patch("/customers/acme", json=raised, headers={"If-Match": '"1"'})
    assert (changed.status_code, changed.json()["overrides"]) == (200, raised["overrides"]), changed.text
    assert (changed.json()["external_id"], changed.json()["anchor"]) == ("cus_1", "2026-01-31")
    assert (await admin.http.patch("/customers/acme", json=raised, headers={"If-Match": '"1"'})).status_code == 412
    past = {"overrides": [{"rule": "/all", "limits": ["20/day"], "until": "2020-01-01T00:00:00Z"}]}
    assert (await admin.http.patch("/customers/acme", json=past, headers={"If-Match": "*"})).status_code == 400
    assert [(await admin.gate.check(check)).remaining for check in checks] == [17, 16]

    # What is exported and read again is the same policy.
    exported = (await admin.http.get("/policy")).text
    again = (await admin.http.post("/policy", content=exported, params={"dry_run": True})).json()
    assert again["changes"] == [], exported

    rotated = (await admin.http.post(f"/api-keys/{key['id']}/rotate", json={})).json()
    assert (rotated["customer"], rotated["inherits_tier"]) == ("acme", True)
    after = await admin.gate.check(Check.of("/all", api_key=rotated["api_key"]))
    assert (after.remaining, after.customer) == (15, "acme")
    assert [each["id"] for each in (await admin.http.get("/api-keys", params={"customer": "acme"})).json()["items"]] == sorted(
        [key["id"], rotated["id"]]
    )

    free = await admin.http.patch("/customers/acme", json={"tier": "free"}, headers={"If-Match": "*"})
    assert (free.json()["tier"], free.json()["overrides"]) == ("free", [])
    assert [(await admin.gate.check(check)).tier for check in (Check.of("/all", api_key=rotated["api_key"]), checks[1])] == [
        "free"
    ] * 2
    assert (await admin.http.get(f"/api-keys/{rotated['id']}")).json()["tier"] == "free"
    assert (await admin.http.delete("/tiers/free", headers={"If-Match": "*"})).status_code == 409

    refused = await admin.http.delete("/customers/acme", headers={"If-Match": "*"})
    assert refused.status_code == 409
    assert "revoke them" in refused.json()["error"]["message"]
    await admin.http.post(f"/api-keys/{rotated['id']}/revoke", json={"reason": "gone"})
    assert (await admin.http.delete("/customers/acme", headers={"If-Match": "*"})).status_code == 204
    assert (await admin.http.get("/customers/acme")).status_code == 404
    assert (await admin.http.get(f"/api-keys/{rotated['id']}")).json()["customer"] is None
    assert (await admin.gate.check(checks[1])).customer is None
    audit = (await admin.http.get("/audit-log", params={"kind": "customer"})).json()["items"]
    assert [each["action"] for each in audit] == ["delete", "update", "update", "create"]
    assert audit[2]["after"]["overrides"] == raised["overrides"]


async def test_the_policy_file_owns_its_customers(admin: Admin) -> None:
    with_customer = (
        RULES + '[[customers]]\nname = "acme"\ntier = "pro"\n[[api_keys]]\nkey = "a-key-of-the-file"\ncustomer = "acme"\n'
    )
    await admin.catalog.apply_policy(parse_policy(with_customer), "1")
    admin.cached.invalidate()
    decision = await admin.gate.check(Check.of("/all", api_key="a-key-of-the-file"))
    assert (decision.customer, decision.tier) == ("acme", "pro")
    assert (await admin.http.patch("/customers/acme", json={"tier": "free"}, headers={"If-Match": "*"})).status_code == 409
    own = await admin.http.post("/api-keys", json={"customer": "acme"})
    assert own.status_code == 201
    refused = await admin.http.post("/customers", json={"name": "acme"})
    assert refused.status_code == 409
    changed = with_customer.replace('tier = "pro"\n[[api_keys]]', 'tier = "free"\nmatch = { org = "a" }\n[[api_keys]]')
    await admin.catalog.apply_policy(parse_policy(changed), "2")
    admin.cached.invalidate()
    assert (await admin.gate.check(Check.of("/all", attributes={"org": "a"}))).customer == "acme"
    assert (await admin.gate.check(Check.of("/all", api_key=own.json()["api_key"]))).tier == "free"


def test_customers_and_limits_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_catalog(f"sqlite:///{tmp_path}/tidegate.db", lambda catalog: catalog.apply_policy(parse_policy(RULES), "1"))
    run = Runner(tmp_path, monkeypatch, capsys)
    made = run(
        "customers", "create", "acme", "--tier", "pro", "--match", "org=acme", "--match", "org=acme-eu", "--metadata", '{"a":1}'
    )
    assert made.code == 0, made.err
    assert "org=acme, org=acme-eu" in " ".join(made.out.split())
    key = json.loads(run("keys", "create", "--customer", "acme", "--json").out)
    assert key["tier"] == "pro"
    raised = run("keys", "limit", key["id"], "/each=9/day", "limits=100/day", "--until", "9000-01-01")
    assert raised.code == 0, raised.err
    assert "/each: 9/day until 9000-01-01T00:00:00Z" in raised.out
    back = run("keys", "limit", key["id"], "/each=default", "--json")
    assert [each.get("rule") for each in json.loads(back.out)["overrides"]] == [None]
    assert "is in the past" in run("keys", "limit", key["id"], "/each=9/day", "--until", "2020-01-01").err
    assert "counts by customer" in run("keys", "limit", key["id"], "/all=9/day").err
    updated = run("customers", "update", "acme", "--anchor", "2026-01-31", "--limit", "/all=50/day", "--until", "9000-01-01")
    assert updated.code == 0, updated.err
    assert "/all: 50/day until" in updated.out
    assert "Mars/Olympus" in run("customers", "update", "acme", "--timezone", "Mars/Olympus").err
    assert json.loads(run("customers", "list", "--json").out)[0]["anchor"] == "2026-01-31"
    assert key["id"] in run("keys", "list", "--customer", "acme").out
    more = run("customers", "update", "acme", "--limit", "quota=150000/month", "--until", "9000-01-01")
    assert more.code == 0, more.err
    assert "quotas: 150000/month until" in more.out
    assert "override them for the customer" in run("keys", "limit", key["id"], "quota=5/month").err
    refused = run("customers", "delete", "acme")
    assert (refused.code, "active API keys" in refused.err) == (2, True)
    run("keys", "revoke", key["id"], "--reason", "gone")
    assert run("customers", "delete", "acme").code == 0
    assert "NOT_FOUND" in run("customers", "show", "acme").err


async def test_usage_and_reset_of_a_customer(admin: Admin) -> None:
    policy = RULES.replace('name = "pro"\n', 'name = "pro"\nquotas = ["20/month"]\n', 1)
    assert (await admin.http.post("/policy", content=policy)).status_code == 200
    for body in ({"name": "acme", "tier": "pro", "match": {"org": "acme"}}, {"name": "none"}):
        assert (await admin.http.post("/customers", json=body)).status_code == 201
    key = (await admin.http.post("/api-keys", json={"customer": "acme"})).json()
    assert (await admin.gate.check(Check.of("/all", api_key=key["api_key"], cost=3))).allowed
    assert (await admin.gate.check(Check.of("/all", attributes={"org": "acme"}, ip="192.0.2.1", cost=4))).allowed
    assert (await admin.gate.check(Check.of("/each", api_key=key["api_key"]))).allowed
    read = (await admin.http.get("/usage", params={"customer": "acme"})).json()
    assert [(each["rule"], each["subject"], [window["used"] for window in each["windows"]]) for each in read["rules"]] == [
        (None, "customer", [8]),
        ("/all", "customer", [7]),
    ]
    assert (read["tier"], read["not_counted"], read["blocked_24h"]) == ("pro", ["/each"], 0)
    assert (await admin.http.get("/usage", params={"customer": "none", "tier": "free"})).json()["rules"] == []
    for wrong, status, why in (
        ({"customer": "none"}, 400, "has no tier of its own: send tier"),
        ({"customer": "acme", "tier": "gold"}, 400, "there is no tier 'gold'"),
        ({"customer": "nobody"}, 404, "there is no customer 'nobody'"),
        ({"customer": "acme", "ip": "192.0.2.1"}, 400, "together with another subject"),
    ):
        refused = await admin.http.get("/usage", params=wrong)
        assert (refused.status_code, why in refused.text) == (status, True), refused.text
    assert (await admin.http.post("/counters/reset", json={"api_key_id": key["id"]})).json() == {"reset": 1}
    assert (await admin.http.get("/usage", params={"api_key_id": key["id"]})).json()["rules"][0]["windows"][0]["used"] == 8
    assert (await admin.http.post("/counters/reset", json={"customer": "acme"})).json() == {"reset": 2}
    rules = (await admin.http.get("/usage", params={"customer": "acme"})).json()["rules"]
    assert [each["windows"][0]["used"] for each in rules] == [0, 0]
    assert (await admin.http.post("/counters/reset", json={"customer": "nobody"})).status_code == 404
    audit = (await admin.http.get("/audit-log", params={"kind": "counters"})).json()["items"]
    assert [entry["target"] for entry in audit] == ["customer acme", f"api_key_id {key['id']}"]
