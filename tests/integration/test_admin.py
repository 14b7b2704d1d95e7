"""The control plane: what operators read and change, on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import insert

from tests.cases import attributes
from tests.integration.admin_api import Admin
from tests.unit.test_policy_file import WHOLE
from tidegate.catalog.sql.tables import rate_limit_violations
from tidegate.decision import Check
from tidegate.errors import ApiKeyRevoked, TidegateError
from tidegate.policy.toml_reader import parse_policy


def _error(answer: Any, status: int, code: str) -> str:
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    assert set(answer.json()["error"]) == {"code", "message", "details"}
    assert answer.json()["error"]["code"] == code
    return str(answer.json()["error"]["message"])


async def test_tiers(admin: Admin) -> None:
    made = await admin.http.post("/tiers", json={"name": "free", "limits": ["60/60s"]})
    assert made.status_code == 201
    assert made.json() == {
        "name": "free",
        "limits": ["60/minute"],
        "managed_by_file": False,
        "revision": 1,
        "warnings": [],
        "quotas": [],
        "overage": False,
    }
    assert made.headers["etag"] == '"1"'
    _error(await admin.http.post("/tiers", json={"name": "free"}), 409, "CATALOG_REFUSED")
    assert "limit 'x'" in _error(await admin.http.post("/tiers", json={"name": "b", "limits": ["x"]}), 400, "POLICY_REFUSED")
    _error(await admin.http.patch("/tiers/free", json={"limits": []}), 428, "IF_MATCH_MISSING")
    changed = await admin.http.put("/tiers/free", json={"limits": ["7/day"]}, headers={"If-Match": made.headers["etag"]})
    assert (changed.json()["limits"], changed.headers["etag"]) == (["7/day"], '"2"')
    stale = await admin.http.put("/tiers/free", json={"limits": []}, headers={"If-Match": made.headers["etag"]})
    assert "revision 2" in _error(stale, 412, "REVISION_STALE")
    _error(await admin.http.delete("/tiers/free", headers={"If-Match": "2"}), 400, "BAD_REQUEST")
    _error(await admin.http.delete("/tiers/free", headers={"If-Match": 'W/"2"'}), 412, "REVISION_STALE")
    assert (await admin.http.get("/tiers/free")).headers["etag"] == '"2"'
    key = await admin.key()
    assert key["id"] in _error(await admin.http.delete("/tiers/free", headers={"If-Match": "*"}), 409, "CATALOG_REFUSED")
    await admin.http.post(f"/api-keys/{key['id']}/revoke", json={"reason": "test"})
    assert (await admin.http.delete(f"/api-keys/{key['id']}", headers={"If-Match": '"2"'})).status_code == 204
    assert (await admin.http.delete("/tiers/free", headers={"If-Match": '"1", "2"'})).status_code == 204
    assert "see GET" in _error(await admin.http.get("/tiers/free"), 404, "NOT_FOUND")


async def test_quotas(admin: Admin) -> None:
    sold = {"quotas": ["100000/month", "5000/day"], "overage": {"up_to": "20%"}}
    made = await admin.http.post("/tiers", json={"name": "pro", "limits": ["50/s"], **sold})
    assert (made.json()["quotas"], made.json()["overage"]) == (["5000/day", "100000/month"], {"up_to": "20%"})
    assert "same period" in _error(
        await admin.http.post("/tiers", json={"name": "b", "quotas": ["1/day", "2/day"]}), 400, "POLICY_REFUSED"
    )
    changed = await admin.http.patch("/tiers/pro", json={"overage": True}, headers={"If-Match": "*"})
    assert (changed.json()["limits"], changed.json()["quotas"], changed.json()["overage"]) == (
        ["50/second"],
        ["5000/day", "100000/month"],
        True,
    )
    whole = await admin.http.put("/tiers/pro", json={"limits": [], "quotas": ["9/year"]}, headers={"If-Match": "*"})
    assert (whole.json()["limits"], whole.json()["quotas"], whole.json()["overage"]) == ([], ["9/year"], False)
    _error(await admin.http.patch("/tiers/pro", json={}, headers={"If-Match": "*"}), 400, "BAD_REQUEST")
    rule = await admin.http.post(
        "/rate-limit-rules", json={"tier": "pro", "endpoint": "/a", "quotas": ["2/month"], "mode": "soft"}
    )
    assert (rule.status_code, rule.json()["limits"], rule.json()["quotas"], rule.json()["name"]) == (
        201,
        [],
        ["2/month"],
        "/a soft",
    )
    path = f"/rate-limit-rules/{rule.json()['id']}"
    patched = await admin.http.patch(path, json={"mode": "enforce", "overage": {"up_to": "50%"}}, headers={"If-Match": "*"})
    assert (patched.json()["quotas"], patched.json()["overage"], patched.json()["name"]) == (["2/month"], {"up_to": "50%"}, "/a")
    assert "0 limits" in _error(
        await admin.http.patch(path, json={"quotas": [], "overage": False}, headers={"If-Match": "*"}), 400, "POLICY_REFUSED"
    )
    key = await admin.key(tier="pro")
    check = Check.of("/a", api_key=key["api_key"], cost=3)
    decision = await admin.gate.check(check)
    assert (decision.allowed, decision.overage, str(decision.binding)) == (True, 1, "2/month")
    usage = (await admin.http.get("/usage", params={"api_key_id": key["id"]})).json()["rules"]
    assert [(each["rule"], each["windows"][0]["used"], each["windows"][0]["period"]) for each in usage] == [
        (None, 3, "year"),
        ("/a", 3, "month"),
    ]
    text = (await admin.http.get("/policy")).text
    assert 'quotas = ["9/year"]' in text
    again = parse_policy(text).tiers[0]
    assert (again.quotas[0].text, again.rules[0].overage is not None) == ("9/year", True)
    assert (await admin.http.post("/counters/reset", json={"api_key_id": key["id"]})).json() == {"reset": 2}
    assert (await admin.gate.check(check)).allowed
    own = {"overrides": [{"quotas": ["4/year"], "until": "2100-01-01T00:00:00Z"}, {"rule": "/a", "quotas": ["7/month"]}]}
    given = await admin.http.put(f"/api-keys/{key['id']}/overrides", json=own, headers={"If-Match": "*"})
    assert [(each.get("rule"), each["quotas"], each.get("until")) for each in given.json()["overrides"]] == [
        (None, ["4/year"], "2100-01-01T00:00:00Z"),
        ("/a", ["7/month"], None),
    ]
    last, denied = [await admin.gate.check(Check.of("/a", api_key=key["api_key"])) for _ in range(2)]
    assert (last.allowed, last.overage, denied.allowed, str(denied.binding)) == (True, 0, False, "4/year")
    empty = await admin.http.put(
        f"/api-keys/{key['id']}/overrides", json={"overrides": [{"rule": "/a"}]}, headers={"If-Match": "*"}
    )
    assert "limits and quotas are both empty" in _error(empty, 400, "BAD_REQUEST")


async def test_rules(admin: Admin) -> None:
    await admin.tier()
    rule = await admin.rule(methods=["get"], priority=3)
    assert (rule["name"], rule["methods"], rule["revision"], rule["warnings"]) == ("GET /api/*", ["GET"], 1, [])
    path = f"/rate-limit-rules/{rule['id']}"
    changed = await admin.http.patch(path, json={"endpoint": "/v2/*"}, headers={"If-Match": '"1"'})
    assert (changed.json()["name"], changed.json()["priority"], changed.json()["revision"]) == ("GET /v2/*", 3, 2)
    whole = await admin.http.put(path, json={"endpoint": "/v3", "limits": ["1/s"]}, headers={"If-Match": '"2"'})
    assert (whole.json()["methods"], whole.json()["priority"], whole.json()["name"]) == ([], 0, "/v3")
    again = await admin.http.post("/rate-limit-rules", json={"tier": "free", "endpoint": "/v3", "limits": ["2/s"]})
    assert f"id {rule['id']}" in _error(again, 409, "CATALOG_REFUSED")
    _error(await admin.http.patch(path, json={}, headers={"If-Match": "*"}), 400, "BAD_REQUEST")
    _error(await admin.http.patch(path, json={"limits": ["1/s burst 2"]}, headers={"If-Match": "*"}), 400, "POLICY_REFUSED")
    _error(await admin.http.post("/rate-limit-rules", json={"tier": "no", "endpoint": "/", "limits": ["1/s"]}), 404, "NOT_FOUND")
    assert (await admin.http.delete(path, headers={"If-Match": '"3"'})).status_code == 204
    _error(await admin.http.get(path), 404, "NOT_FOUND")


async def test_rules_that_never_answer_are_warned_of(admin: Admin) -> None:
    await admin.tier()
    wide = await admin.rule("/api/*", priority=10)
    hidden = await admin.rule("/api/{id}/items", methods=["GET"])
    assert len(hidden["warnings"]) == 1
    assert "'/api/*' is preferred" in hidden["warnings"][0]
    assert (await admin.rule("/api/shadow", mode="shadow"))["warnings"] == []
    lower = await admin.http.patch(f"/rate-limit-rules/{wide['id']}", json={"priority": -1}, headers={"If-Match": "*"})
    assert lower.json()["warnings"] == []
    higher = await admin.http.patch(f"/rate-limit-rules/{wide['id']}", json={"priority": 1}, headers={"If-Match": "*"})
    assert "never answers" in higher.json()["warnings"][0]


async def test_limits_that_are_used_up_are_warned_of(admin: Admin) -> None:
    await admin.tier()
    rule = await admin.rule(subject="tier", limits=["50/hour"])
    own = await admin.rule("/own", limits=["50/hour"])
    key = await admin.key()
    await admin.gate.check(Check.of("/api/a", api_key=key["api_key"], cost=20))
    await admin.gate.check(Check.of("/own", api_key=key["api_key"], cost=20))
    fine = await admin.http.patch(f"/rate-limit-rules/{rule['id']}", json={"limits": ["30/hour"]}, headers={"If-Match": "*"})
    assert fine.json()["warnings"] == []
    low = await admin.http.patch(f"/rate-limit-rules/{rule['id']}", json={"limits": ["10/hour"]}, headers={"If-Match": "*"})
    assert "tier 'free' has used up 10/hour" in low.json()["warnings"][0]
    overrides = {"overrides": [{"rule": own["name"], "limits": ["10/hour"]}]}
    low = await admin.http.put(f"/api-keys/{key['id']}/overrides", json=overrides, headers={"If-Match": "*"})
    assert "has used up 10/hour" in low.json()["warnings"][0]


async def test_a_created_key_works_and_a_revoked_one_stops(admin: Admin) -> None:
    await admin.tier()
    await admin.rule()
    answer = await admin.http.post("/api-keys", json={"tier": "free", "name": "Åsa", "expires_at": "2100-01-01T02:00:00+02:00"})
    key = answer.json()
    assert (answer.status_code, answer.headers["cache-control"]) == (201, "no-store")
    assert (key["name"], key["expires_at"], key["status"], len(key["id"])) == ("Åsa", "2100-01-01T00:00:00Z", "active", 24)
    assert (await admin.gate.check(Check.of("/api/a", api_key=key["api_key"]))).allowed
    read = (await admin.http.get(f"/api-keys/{key['id']}")).json()
    assert read == {name: value for name, value in key.items() if name != "api_key"}
    revoked = await admin.http.post(f"/api-keys/{key['id']}/revoke", json={"reason": "leaked"})
    assert (revoked.status_code, revoked.json()["status"], revoked.json()["revoked_reason"]) == (200, "revoked", "leaked")
    with pytest.raises(ApiKeyRevoked):
        await admin.gate.check(Check.of("/api/a", api_key=key["api_key"]))
    _error(await admin.http.post(f"/api-keys/{key['id']}/revoke", json={"reason": "x"}), 409, "CATALOG_REFUSED")
    _error(await admin.http.post(f"/api-keys/{key['id']}/revoke", json={"reason": " "}), 400, "BAD_REQUEST")
    _error(await admin.http.post(f"/api-keys/{key['id']}/rotate"), 409, "CATALOG_REFUSED")
    message = _error(await admin.http.get(f"/api-keys/{key['api_key']}"), 404, "NOT_FOUND")
    assert key["api_key"] not in message
    _error(await admin.http.post("/api-keys", json={"tier": "free", "expires_at": "2001-01-01T00:00:00Z"}), 400, "BAD_REQUEST")
    _error(await admin.http.post("/api-keys", json={"tier": "free", "expires_at": "2100-01-01T00:00:00"}), 400, "BAD_REQUEST")


async def test_an_expired_key_has_the_status_expired(admin: Admin) -> None:
    await admin.tier()
    until = datetime.now(UTC) + timedelta(seconds=3)
    key = await admin.key(expires_at=until.isoformat())
    assert key["status"] == "active"
    await asyncio.sleep((until - datetime.now(UTC)).total_seconds() + 0.01)
    assert (await admin.http.get(f"/api-keys/{key['id']}")).json()["status"] == "expired"
    for status, found in (("active", []), ("expired", ["expired"]), ("revoked", [])):
        listed = (await admin.http.get("/api-keys", params={"status": status})).json()["items"]
        assert [each["status"] for each in listed] == found


async def test_rotation(admin: Admin) -> None:
    await admin.tier()
    rule = await admin.rule()
    overrides = [{"rule": rule["name"], "limits": ["9/minute"]}]
    key = await admin.key(name="n", limits=["8/day"], overrides=overrides)
    graced = (await admin.http.post(f"/api-keys/{key['id']}/rotate", json={"grace_s": 60})).json()
    assert (graced["name"], graced["limits"], graced["overrides"]) == ("n", ["8/day"], overrides)
    assert (graced["replaces"]["status"], graced["replaces"]["expires_at"] is None) == ("active", False)
    for each in (key, graced):
        assert (await admin.gate.check(Check.of("/api/a", api_key=each["api_key"]))).allowed
    at_once = (await admin.http.post(f"/api-keys/{graced['id']}/rotate", json={})).json()
    assert at_once["replaces"]["revoked_reason"] == f"replaced by {at_once['id']}"
    with pytest.raises(ApiKeyRevoked):
        await admin.gate.check(Check.of("/api/a", api_key=graced["api_key"]))


async def test_overrides(admin: Admin) -> None:
    await admin.tier()
    await admin.tier("paid")
    rule, by_ip = await admin.rule(), await admin.rule("/ip", subject="ip")
    key = await admin.key()
    path = f"/api-keys/{key['id']}"
    given = {"limits": ["3/day"], "overrides": [{"rule": rule["name"], "limits": ["2/minute"]}]}
    changed = await admin.http.put(f"{path}/overrides", json=given, headers={"If-Match": '"1"'})
    assert (changed.json()["limits"], changed.json()["overrides"]) == (given["limits"], given["overrides"])
    assert (await admin.gate.check(Check.of("/api/a", api_key=key["api_key"]))).limit == 2
    for wrong in (by_ip["name"], "no such rule"):
        body = {"overrides": [{"rule": wrong, "limits": ["2/minute"]}]}
        _error(await admin.http.put(f"{path}/overrides", json=body, headers={"If-Match": "*"}), 400, "POLICY_REFUSED")
    moved = await admin.http.patch(path, json={"tier": "paid", "expires_at": None, "name": "m"}, headers={"If-Match": "*"})
    assert (moved.json()["tier"], moved.json()["limits"], moved.json()["overrides"]) == ("paid", ["3/day"], [])


async def test_one_of_many_changes_wins(admin: Admin) -> None:
    await admin.tier()
    rule = await admin.rule()
    path = f"/rate-limit-rules/{rule['id']}"
    answers = await asyncio.gather(
        *(admin.http.patch(path, json={"priority": number}, headers={"If-Match": '"1"'}) for number in range(20))
    )
    assert sorted(answer.status_code for answer in answers) == [200] + [412] * 19
    assert (await admin.http.get(path)).json()["revision"] == 2
    log = (await admin.http.get("/audit-log", params={"kind": "rule"})).json()["items"]
    assert [each["action"] for each in log] == ["update", "create"]


async def test_audit_log_reports_before_and_after(admin: Admin) -> None:
    await admin.tier(limits=("1/day",))
    await admin.http.put("/tiers/free", json={"limits": ["2/day"]}, headers={"If-Match": "*"})
    key = await admin.key()
    items = (await admin.http.get("/audit-log")).json()["items"]
    assert [(each["actor"], each["action"], each["kind"], each["target"]) for each in items] == [
        ("settings", "create", "api_key", key["id"]),
        ("settings", "update", "tier", "free"),
        ("settings", "create", "tier", "free"),
    ]
    assert (items[1]["before"]["limits"], items[1]["after"]["limits"]) == (["1/day"], ["2/day"])
    assert items[2]["before"] is None
    assert key["api_key"] not in str(items)
    assert [
        each["kind"] for each in (await admin.http.get("/audit-log", params={"target": "free", "kind": "tier"})).json()["items"]
    ] == [
        "tier",
        "tier",
    ]
    assert len(admin.versions) == 3
    assert admin.versions[-1] == await admin.catalog.version()


async def test_pages_are_stable(admin: Admin) -> None:
    await admin.tier()
    made = {(await admin.key(name=f"k{number % 2}"))["id"] for number in range(11)}
    seen: list[str] = []
    after = None
    while True:
        page = (await admin.http.get("/api-keys", params={"limit": 3, **({"after": after} if after else {})})).json()
        seen += [each["id"] for each in page["items"]]
        made.add((await admin.key())["id"])  # what comes meanwhile neither repeats nor hides others
        after = page["next"]
        if after is None:
            break
    assert len(seen) == len(set(seen)) >= 11
    assert seen == sorted(seen)
    assert set(seen) <= made
    first = sorted(made)[0]
    await admin.http.post(f"/api-keys/{first}/revoke", json={"reason": "r"})
    revoked = (await admin.http.get("/api-keys", params={"status": "revoked"})).json()
    assert ([each["id"] for each in revoked["items"]], revoked["next"]) == ([first], None)
    named = (await admin.http.get("/api-keys", params={"name": "K1", "tier": "free"})).json()["items"]
    assert len(named) == 5
    _error(await admin.http.get("/api-keys", params={"limit": 501}), 400, "BAD_REQUEST")
    _error(await admin.http.get("/api-keys", params={"teir": "free"}), 400, "BAD_REQUEST")
    _error(await admin.http.get("/audit-log", params={"after": "x"}), 400, "BAD_REQUEST")


async def test_filters_take_their_text_as_it_is(admin: Admin) -> None:
    await admin.tier("a_b")
    await admin.tier("axb")
    await admin.tier()
    await admin.rule("/Api/V1/*")
    assert [each["name"] for each in (await admin.http.get("/tiers", params={"name": "A_"})).json()["items"]] == ["a_b"]
    rules = (await admin.http.get("/rate-limit-rules", params={"endpoint": "/v1/", "tier": "free"})).json()["items"]
    assert [each["endpoint"] for each in rules] == ["/Api/V1/*"]
    assert (await admin.http.get("/rate-limit-rules", params={"endpoint": "%"})).json()["items"] == []


async def test_filters_know_cases_of_every_script(admin: Admin) -> None:
    await admin.tier()
    for name in ("ÄRGER", "Straße", "ΑΘΗΝΑ", "plain 100%"):
        await admin.key(name=name)

    async def found(part: str) -> list[str]:
        return [each["name"] for each in (await admin.http.get("/api-keys", params={"name": part})).json()["items"]]

    assert await found("ärg") == ["ÄRGER"]
    assert await found("STRAß") == ["Straße"]
    assert await found("αθη") == ["ΑΘΗΝΑ"]
    assert await found("PLAIN 100%") == ["plain 100%"]
    assert await found("ä%") == []


async def test_a_weak_etag_is_distinguished_from_a_stale_one(admin: Admin) -> None:
    await admin.tier()
    change = {"limits": ["5/day"]}
    weak = await admin.http.put("/tiers/free", json=change, headers={"If-Match": 'W/"1"'})
    message = _error(weak, 412, "REVISION_STALE")
    assert "weak ETag" in message
    assert "changed meanwhile" not in message
    assert (await admin.http.put("/tiers/free", json=change, headers={"If-Match": 'W/"7", "1"'})).status_code == 200
    assert "changed meanwhile" in _error(
        await admin.http.put("/tiers/free", json=change, headers={"If-Match": '"1"'}), 412, "REVISION_STALE"
    )


async def test_rows_of_the_policy_file_are_listed_and_not_changed(admin: Admin) -> None:
    await admin.catalog.apply_policy(parse_policy(WHOLE), "1")
    tier = (await admin.http.get("/tiers")).json()["items"][0]
    rule = (await admin.http.get("/rate-limit-rules")).json()["items"][0]
    key = (await admin.http.get("/api-keys")).json()["items"][0]
    assert all(each["managed_by_file"] for each in (tier, rule, key))
    any_tag = {"If-Match": "*"}
    for answer in (
        await admin.http.put(f"/tiers/{tier['name']}", json={"limits": []}, headers=any_tag),
        await admin.http.delete(f"/tiers/{tier['name']}", headers=any_tag),
        await admin.http.patch(f"/rate-limit-rules/{rule['id']}", json={"priority": 1}, headers=any_tag),
        await admin.http.delete(f"/rate-limit-rules/{rule['id']}", headers=any_tag),
        await admin.http.patch(f"/api-keys/{key['id']}", json={"name": "x"}, headers=any_tag),
        await admin.http.post(f"/api-keys/{key['id']}/revoke", json={"reason": "x"}),
        await admin.http.post(f"/api-keys/{key['id']}/rotate"),
    ):
        assert "policy file: change it there" in _error(answer, 409, "MANAGED_BY_FILE")
    added = await admin.http.post("/rate-limit-rules", json={"tier": tier["name"], "endpoint": "/added", "limits": ["1/s"]})
    assert added.status_code == 201
    assert await admin.catalog.apply_policy(parse_policy(WHOLE), "2")
    assert (await admin.http.get(f"/rate-limit-rules/{added.json()['id']}")).status_code == 200


async def test_an_exported_policy_can_be_imported(admin: Admin) -> None:
    taken = await admin.http.post("/policy", params={"dry_run": True}, content=WHOLE)
    assert (taken.status_code, taken.json()["dry_run"]) == (200, True)
    assert (await admin.http.get("/tiers")).json()["items"] == []
    wet = await admin.http.post("/policy", content=WHOLE)
    assert wet.json()["changes"][0] | {"after": None} == taken.json()["changes"][0] | {"after": None}
    out = await admin.http.get("/policy")
    assert out.headers["content-type"].startswith("application/toml")
    said, meant = parse_policy(out.text), parse_policy(WHOLE)
    assert sorted(said.tiers, key=lambda tier: tier.name) == sorted(meant.tiers, key=lambda tier: tier.name)
    assert sorted(said.api_keys, key=lambda key: key.sha256) == sorted(meant.api_keys, key=lambda key: key.sha256)
    assert said.anonymous_tier == meant.anonymous_tier
    version = await admin.catalog.version()
    assert (await admin.http.post("/policy", content=out.text, params={"prune": True})).json()["changes"] == []
    assert await admin.catalog.version() == version
    text = '[[tiers]]\nname = "free"\nlimits = ["1/day"]\n[[tiers]]\nname = "new"\n[anonymous]\ntier = "new"\n'
    changes = (await admin.http.post("/policy", content=text, params={"prune": True})).json()["changes"]
    assert {(each["action"], each["kind"]) for each in changes} >= {("delete", "rule"), ("update", "tier"), ("delete", "api_key")}
    assert [each["name"] for each in (await admin.http.get("/tiers")).json()["items"]] == ["free", "new"]
    assert "line" not in _error(await admin.http.post("/policy", content="x = 1"), 400, "POLICY_REFUSED")
    _error(await admin.http.post("/policy", content=b"\xff"), 400, "BAD_REQUEST")


async def test_a_policy_with_attributes_goes_out_and_in(admin: Admin) -> None:
    changes = (await admin.http.post("/policy", content=attributes.POLICY)).json()["changes"]
    assert [(each["kind"], each["after"]) for each in changes[-4:-2]] == [
        ("callers", {"tier_from": "plan", "default_tier": "public"}),
        ("attributes", {"user": "header:x-user-id", "plan": "header:x-plan", "team": "jwt:team"}),
    ]
    assert [each["kind"] for each in changes[-2:]] == ["jwt", "namespaces"]
    said = parse_policy((await admin.http.get("/policy")).text)
    meant = parse_policy(attributes.POLICY)
    assert (said.caller_policy, {tier.name: tier.rules for tier in said.tiers}) == (
        meant.caller_policy,
        {tier.name: tier.rules for tier in meant.tiers},
    )
    assert (await admin.http.post("/policy", content=attributes.POLICY)).json()["changes"] == []
    _error(await admin.http.delete("/tiers/public", headers={"If-Match": "*"}), 409, "CATALOG_REFUSED")
    # A text without the tables leaves them; the default tier cannot be pruned.
    other = '[[tiers]]\nname = "pro"\n'
    assert "default_tier" in _error(
        await admin.http.post("/policy", content=other, params={"prune": True}), 409, "CATALOG_REFUSED"
    )
    assert await admin.catalog.apply_policy(parse_policy('[[tiers]]\nname = "file"\n'), "1")
    assert "[callers], [attributes]" in _error(
        await admin.http.post("/policy", content=attributes.POLICY), 409, "MANAGED_BY_FILE"
    )


async def test_rules_by_attributes(admin: Admin) -> None:
    await admin.tier()
    rule = await admin.rule(subject=["org", "user"], match={"plan": "pro*"}, on_missing="skip")
    assert (rule["name"], rule["subject"], rule["match"], rule["on_missing"]) == (
        "/api/* plan=pro*",
        ["org", "user"],
        {"plan": "pro*"},
        "skip",
    )
    path = f"/rate-limit-rules/{rule['id']}"
    changed = (await admin.http.patch(path, json={"subject": "user"}, headers={"If-Match": '"1"'})).json()
    assert (changed["subject"], changed["match"], changed["on_missing"]) == ("user", {"plan": "pro*"}, "skip")
    whole = (await admin.http.put(path, json={"endpoint": "/v3", "limits": ["1/s"]}, headers={"If-Match": '"2"'})).json()
    assert (whole["subject"], whole["match"], whole["on_missing"]) == ("api_key", {}, "ip")
    for body, said in (
        ({"subject": "tier!"}, "subject"),
        ({"match": {"Plan": "x"}}, "match"),
        ({"on_missing": "deny"}, "on_missing 'deny' is for a subject with an attribute"),
        ({"subject": ["user", "tier"]}, "leave it out"),
    ):
        refused = await admin.http.patch(path, json=body, headers={"If-Match": "*"})
        assert refused.status_code == 400
        assert said in refused.text


async def test_import_does_not_contradict_the_file(admin: Admin) -> None:
    await admin.catalog.apply_policy(parse_policy(WHOLE), "1")
    assert (await admin.http.post("/policy", content=WHOLE)).json()["changes"] == []
    text = '[[tiers]]\nname = "first"\n[[tiers]]\nname = "free"\nlimits = ["77/day"]\n'
    assert "'free' differs from the policy file" in _error(await admin.http.post("/policy", content=text), 409, "MANAGED_BY_FILE")
    assert (await admin.http.get("/tiers/first")).status_code == 404


async def test_usage_and_reset(admin: Admin) -> None:
    await admin.tier(limits=())
    await admin.rule()
    key = await admin.key()
    for _ in range(5):
        await admin.gate.check(Check.of("/api/a", api_key=key["api_key"]))
    usage = (await admin.http.get("/usage", params={"api_key_id": key["id"]})).json()
    assert [(each["rule"], each["limit"], each["remaining"]) for each in usage["rules"]] == [("/api/*", 5, 0)]
    assert (usage["tier"], usage["blocked_24h"]) == ("free", 0)
    assert (await admin.http.post("/counters/reset", json={"api_key_id": key["id"]})).json() == {"reset": 1}
    usage = (await admin.http.get("/usage", params={"api_key_id": key["id"], "ip": "192.0.2.7"})).json()
    assert usage["rules"][0]["remaining"] == 5
    assert (await admin.http.post("/counters/reset", json={"tier": "free"})).json() == {"reset": 0}
    assert (await admin.http.post("/counters/reset", json={"ip": "192.0.2.7"})).json() == {"reset": 0}
    log = (await admin.http.get("/audit-log", params={"kind": "counters"})).json()["items"]
    assert log[-1]["target"] == f"api_key_id {key['id']}"
    _error(await admin.http.get("/usage"), 400, "BAD_REQUEST")
    _error(await admin.http.get("/usage", params={"ip": "192.0.2.7"}), 404, "NOT_FOUND")
    _error(await admin.http.get("/usage", params={"ip": "x"}), 400, "BAD_REQUEST")
    _error(await admin.http.post("/counters/reset", json={"tier": "free", "ip": "::1"}), 400, "BAD_REQUEST")
    _error(await admin.http.post("/counters/reset", json={"ip": "localhost"}), 400, "BAD_REQUEST")
    _error(await admin.http.post("/counters/reset", json={"tier": "no"}), 404, "NOT_FOUND")


async def test_usage_and_reset_of_subjects_of_attributes(admin: Admin) -> None:
    await admin.http.post("/policy", content=attributes.POLICY)
    check = Check.of("/api/x", attributes={"user": "4&2", "org": "acme"}, tier="pro", cost=9)
    assert (await admin.gate.check(check)).remaining == 0
    usage = (await admin.http.get("/usage", params={"subject": "user=4%262", "tier": "pro"})).json()
    assert [(rule["rule"], rule["subject"], rule["remaining"]) for rule in usage["rules"]] == [("/api/*", "user", 0)]
    assert (usage["tier"], usage["blocked_24h"]) == ("pro", 0)
    # By [callers], where no tier is given.
    assert (await admin.http.get("/usage", params={"subject": "plan=pro&user=4%262"})).json()["rules"][0]["remaining"] == 0
    assert (await admin.http.get("/usage", params={"subject": "user=4%262"})).json()["tier"] == "public"
    assert (await admin.http.post("/counters/reset", json={"subject": "user=4%262"})).json() == {"reset": 1}
    assert (await admin.gate.check(check)).allowed
    assert (await admin.http.get("/audit-log")).json()["items"][0]["target"] == "subject user=4%262"
    for params in (
        {"subject": "42"},
        {"subject": "user=1", "api_key_id": "0" * 24},
        {"subject": "api_key=1"},
        {"subject": "user=1", "tier": "gold"},
        {"ip": "192.0.2.7", "tier": "pro"},
    ):
        _error(await admin.http.get("/usage", params=params), 400, "BAD_REQUEST")
    _error(await admin.http.post("/counters/reset", json={"subject": "user"}), 400, "BAD_REQUEST")
    _error(await admin.http.post("/counters/reset", json={"subject": "user=1", "ip": "::1"}), 400, "BAD_REQUEST")


async def test_violations_of_subjects_of_attributes(admin: Admin) -> None:
    subjects = ("a:user=1", "a:user=2", "a:org=1&user=1", "a:org=1&plan=2&user=1", "a:u_er=1", "i:192.0.2.7", "h:0f")
    row = {"minute_us": 1_700_000_040_000_000, "tier": "free", "rule": "r"}
    async with admin.catalog.database.transaction() as connection:
        await connection.execute(
            insert(rate_limit_violations),
            [{**row, "subject": subject, "blocked": 10 - place} for place, subject in enumerate(subjects)],
        )
    span = {"since": "2023-11-14T22:14:00Z", "until": "2023-11-14T23:14:00Z"}

    async def top(**params: str) -> list[str]:
        items = (await admin.http.get("/violations/top", params={**span, **params})).json()["items"]
        return [each["subject"] for each in items]

    assert await top(attribute="user") == ["a:user=1", "a:user=2"]
    assert await top(attribute="user,org") == ["a:org=1&user=1"]
    assert await top(attribute="u_er") == ["a:u_er=1"]
    assert await top(subject="user=1&org=1") == ["a:org=1&user=1"]
    assert await top(subject="h:0f") == ["h:0f"]
    listed = (await admin.http.get("/violations", params={**span, "subject": "a:user=2"})).json()["items"]
    assert [each["blocked"] for each in listed] == [9]
    for params in ({"attribute": "User"}, {"subject": "1"}, {"subject": "user=1", "ip": "::1"}):
        _error(await admin.http.get("/violations/top", params={**span, **params}), 400, "BAD_REQUEST")


async def test_violations(admin: Admin) -> None:
    minute = 1_700_000_040_000_000
    rows = [
        {"minute_us": minute + 60_000_000 * number, "tier": "free", "rule": f"r{number % 2}", "subject": f"k:{number % 3:024x}"}
        for number in range(12)
    ]
    async with admin.catalog.database.transaction() as connection:
        await connection.execute(insert(rate_limit_violations), [{**row, "blocked": 1 + at} for at, row in enumerate(rows)])
    span = {"since": "2023-11-14T22:14:00Z", "until": "2023-11-14T23:14:00Z"}
    seen: list[Any] = []
    after = None
    while True:
        page = (await admin.http.get("/violations", params={**span, "limit": 5, **({"after": after} if after else {})})).json()
        seen += page["items"]
        after = page["next"]
        if after is None:
            break
    assert [each["blocked"] for each in seen] == list(range(12, 0, -1))
    assert seen[-1]["minute"] == "2023-11-14T22:14:00Z"
    top = (await admin.http.get("/violations/top", params={**span, "limit": 2})).json()["items"]
    assert [(each["subject"], each["blocked"]) for each in top] == [(f"k:{2:024x}", 30), (f"k:{1:024x}", 26)]
    by_rule = (await admin.http.get("/violations/top", params={**span, "by": "rule"})).json()["items"]
    assert [(each["tier"], each["rule"], each["blocked"]) for each in by_rule] == [("free", "r1", 42), ("free", "r0", 36)]
    one = (await admin.http.get("/violations", params={**span, "api_key_id": f"{1:024x}", "rule": "r0"})).json()["items"]
    assert [each["blocked"] for each in one] == [11, 5]
    assert (await admin.http.get("/violations")).json() == {"items": [], "next": None}
    _error(await admin.http.get("/violations", params={"since": span["until"], "until": span["since"]}), 400, "BAD_REQUEST")
    _error(await admin.http.get("/violations", params={"since": "yesterday"}), 400, "BAD_REQUEST")
    _error(await admin.http.get("/violations", params={"after": "AAAA"}), 400, "BAD_REQUEST")


async def test_a_catalog_that_is_unavailable_is_reported(admin: Admin) -> None:
    async with admin.catalog.database.transaction() as connection:
        await connection.exec_driver_sql("ALTER TABLE tiers RENAME TO away")
    answer = await admin.http.get("/tiers")
    _error(answer, 503, "CATALOG_UNAVAILABLE")
    assert answer.headers["retry-after"] == "1"
    with pytest.raises(TidegateError):
        await admin.catalog.list_tiers()
