"""Overrides for subjects in the admin API and on the command line; the first journey on SQLite and PostgreSQL."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration.admin_api import Admin
from tests.integration.cli_ways import Runner, with_catalog
from tidegate.decision import Check
from tidegate.errors import CatalogError
from tidegate.policy.toml_reader import parse_policy

FILE = """
[callers]
default_tier = "free"
[[tiers]]
name = "free"
  [[tiers.rules]]
  name = "users"
  endpoint = "/*"
  subject = "user"
  limits = ["5/day"]
  [[tiers.rules]]
  endpoint = "/key"
  limits = ["5/day"]
  [[tiers.overrides]]
  rule = "users"
  subject = { user = "file" }
  limits = ["9/day"]
"""
PATH = "/tiers/free/overrides"
ANY = {"If-Match": "*"}


async def left(admin: Admin, user: str, cost: int = 0) -> int | None:
    check = Check.of("/x", ip="192.0.2.1", cost=cost, attributes={"user": user})
    return (await admin.gate.check(check)).remaining


async def test_from_creation_to_deletion(admin: Admin) -> None:
    await admin.catalog.apply_policy(parse_policy(FILE), "1")
    assert (await left(admin, "42", 1), await left(admin, "file")) == (4, 9)
    sent = {"rule": "users", "subject": {"user": "42"}, "limits": ["7/day"], "until": "9000-01-01T00:00:00Z"}
    made = await admin.http.post(PATH, json=sent)
    assert (made.status_code, made.headers["etag"]) == (201, '"1"')
    body = made.json()
    assert body == {**sent, "id": body["id"], "tier": "free", "ended": False, "managed_by_file": False, "revision": 1}
    assert await left(admin, "42") == 6, "in force at once, and what was consumed is kept"
    one = f"{PATH}/{body['id']}"
    assert (await admin.http.get(one)).json() == body
    pattern = (await admin.http.post(PATH, json={"rule": "users", "subject": {"user": "4*"}, "limits": ["6/day"]})).json()
    assert (await left(admin, "43"), await left(admin, "42"), await left(admin, "5")) == (6, 6, 5)
    # Listed by subject, and in pages.
    found = (await admin.http.get(PATH, params={"subject": "user=42"})).json()["items"]
    assert {each["id"] for each in found} == {body["id"], pattern["id"]}
    page = (await admin.http.get(PATH, params={"limit": 2})).json()
    rest = (await admin.http.get(PATH, params={"after": page["next"]})).json()
    assert (len(page["items"]), len(rest["items"]), rest["next"]) == (2, 1, None)
    assert (await admin.http.get(PATH, params={"rule": "other"})).json()["items"] == []
    # What the file has is read only.
    theirs = next(each for each in [*page["items"], *rest["items"]] if each["managed_by_file"])
    for answer in (
        await admin.http.put(f"{PATH}/{theirs['id']}", json={"limits": ["1/day"]}, headers=ANY),
        await admin.http.delete(f"{PATH}/{theirs['id']}", headers=ANY),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "MANAGED_BY_FILE")
    again = await admin.http.post(PATH, json=sent)
    assert (again.status_code, body["id"] in again.json()["error"]["message"]) == (409, True)
    # A changed revision is required.
    changed = await admin.http.put(one, json={"limits": ["8/day"]}, headers={"If-Match": '"1"'})
    assert (changed.status_code, changed.json()["until"], changed.json()["revision"]) == (200, None, 2)
    assert (await admin.http.put(one, json={"limits": ["9/day"]}, headers={"If-Match": '"1"'})).status_code == 412
    assert (await admin.http.delete(one)).status_code == 428
    assert await left(admin, "42") == 7
    # A file that is applied again keeps those of operators; one that names the same is refused as a whole.
    await admin.catalog.apply_policy(parse_policy(FILE.replace("9/day", "10/day")), "2")
    admin.cached.invalidate()
    assert (await left(admin, "file"), await left(admin, "42")) == (10, 7)
    with pytest.raises(CatalogError, match="'user=42' in the policy file belongs to the catalog"):
        await admin.catalog.apply_policy(parse_policy(FILE.replace('user = "file"', 'user = "42"')), "3")
    # An export has all of them, and an import of it changes nothing.
    text = (await admin.http.get("/policy")).text
    assert {each.subject_text for each in parse_policy(text).tiers[0].overrides} == {"user=42", "user=4*", "user=file"}
    same = await admin.http.post("/policy", content=text)
    assert (same.status_code, same.json()["changes"]) == (200, [])
    fewer = text.replace('"8/day"', '"20/day"').replace('{ user = "4*" }', '{ user = "9*" }')
    done = (await admin.http.post("/policy", content=fewer, params={"prune": "true"})).json()["changes"]
    assert sorted(each["action"] for each in done if each["kind"] == "override") == ["create", "delete", "update"]
    assert (await left(admin, "42"), await left(admin, "43"), await left(admin, "99")) == (19, 5, 6)
    assert (await admin.http.delete(one, headers=ANY)).status_code == 204
    assert (await admin.http.get(one)).status_code == 404
    assert await left(admin, "42") == 4
    log = (await admin.http.get("/audit-log", params={"kind": "override"})).json()["items"]
    assert [each["action"] for each in log][0::5] == ["delete", "create"]
    assert log[0]["target"] == f"free/{body['id']}"


async def test_what_is_not_valid_is_refused(admin: Admin) -> None:
    await admin.catalog.apply_policy(parse_policy(FILE), "1")
    good = {"rule": "users", "subject": {"user": "42"}, "limits": ["7/day"]}
    for fields, said in (
        ({"rule": "other"}, "has no rule 'other'"),
        ({"rule": "/key"}, "counts by api_key"),
        ({"subject": {"org": "a"}}, "does not count by"),
        ({"subject": {}}, "subject"),
        ({"subject": {"user": "a\0"}}, "printable"),
        ({"limits": []}, "limits"),
        ({"limits": ["often"]}, "often"),
        ({"until": "2020-01-01T00:00:00Z"}, "in the past"),
        ({"tier": "free"}, "tier"),
    ):
        answer = await admin.http.post(PATH, json={**good, **fields})
        assert answer.status_code == 400, fields
        assert said in answer.json()["error"]["message"]
    assert (await admin.http.post("/tiers/none/overrides", json=good)).status_code == 404
    assert (await admin.http.get("/tiers/none/overrides")).status_code == 404
    assert (await admin.http.get(PATH, params={"subject": "42"})).status_code == 400
    assert len((await admin.http.get(PATH)).json()["items"]) == 1


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with_catalog(f"sqlite:///{tmp_path}/tidegate.db", lambda catalog: catalog.apply_policy(parse_policy(FILE), "1"))
    run = Runner(tmp_path, monkeypatch, capsys)
    made = run("overrides", "set", "free", "users", "user=42", "7/day", "100/month", "--until", "9000-01-01")
    assert (made.code, made.out.strip()) == (0, "user=42 of rule users: 7/day, 100/month until 9000-01-01T00:00:00Z"), made.err
    assert run("overrides", "set", "free", "users", "user=4*", "6/day").code == 0
    assert run("overrides", "set", "free", "users", "user=42", "8/day").code == 0, "again: it is changed"
    listed = json.loads(run("overrides", "list", "free", "--json").out)
    assert [(each["subject"]["user"], each["limits"], each["revision"]) for each in listed] == [
        ("4*", ["6/day"], 1),
        ("42", ["8/day"], 2),
        ("file", ["9/day"], 1),
    ]
    assert "user=file" not in run("overrides", "list", "free", "--subject", "user=42").out
    removed = run("overrides", "remove", "free", "users", "user=4*")
    assert (removed.code, removed.out.strip()) == (0, "removed the limits of user=4*")
    for arguments, said in (
        (("remove", "free", "users", "user=4*"), "has no override for 'user=4*'"),
        (("remove", "free", "users", "user=file"), "MANAGED_BY_FILE"),
        (("set", "free", "users", "42", "1/day"), "is not a subject of attributes"),
        (("set", "free", "users", "user=1", "often"), "often"),
        (("set", "free", "users", "user=1", "1/day", "--until", "2020-01-01"), "is in the past"),
        (("set", "none", "users", "user=1", "1/day"), "there is no tier 'none'"),
        (("list", "none"), "there is no tier 'none'"),
    ):
        refused = run("overrides", *arguments)
        assert (refused.code, said in " ".join(refused.err.split())) == (2, True), (arguments, refused.err)
