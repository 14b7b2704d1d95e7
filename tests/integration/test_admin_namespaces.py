"""Namespaces in the admin API, beside those of a policy file, and what the policy says of callers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.cases.attributes import POLICY
from tests.integration.admin_api import Admin
from tests.rsgi import call
from tidegate.doors.http import DataPlane
from tidegate.errors import CatalogError
from tidegate.policy.toml_reader import parse_policy

FILE = '[[namespaces]]\nname = "{name}"\nlimits = ["10/hour"]\n[[tiers]]\nname = "free"\n'
ANY = {"If-Match": "*"}


async def limit(admin: Admin, subject: str = "user-42", namespace: str = "emails", **fields: Any) -> tuple[int, Any]:
    body = json.dumps({"namespace": namespace, "subject": subject, **fields}).encode()
    answer = await call(DataPlane(admin.gate, {}), "/v1/limit", method="POST", body=body)
    return answer.status, json.loads(answer.body)


async def test_from_creation_to_deletion(admin: Admin) -> None:
    assert (await limit(admin))[0] == 400, "without a namespace the request needs limits"
    fields = {"name": "emails", "limits": ["2/hour"], "overrides": [{"subject": "vip-*", "limits": ["5/hour"]}]}
    made = await admin.http.post("/namespaces", json=fields)
    assert (made.status_code, made.headers["etag"]) == (201, '"1"')
    assert made.json() == {
        **fields,
        "algorithm": "sliding_window",
        "on_failure": "default",
        "managed_by_file": False,
        "revision": 1,
    }
    assert (await limit(admin))[1]["remaining"] == 1
    assert (await limit(admin, "vip-1"))[1]["remaining"] == 4
    # What is consumed is kept, and a changed revision is required.
    patched = await admin.http.patch("/namespaces/emails", json={"limits": ["7/hour"]}, headers={"If-Match": '"1"'})
    assert (patched.status_code, patched.json()["revision"], patched.json()["overrides"]) == (200, 2, fields["overrides"])
    assert (await limit(admin))[1]["remaining"] == 5
    stale = await admin.http.patch("/namespaces/emails", json={"limits": ["9/hour"]}, headers={"If-Match": '"1"'})
    assert (stale.status_code, stale.json()["error"]["code"]) == (412, "REVISION_STALE")
    assert (await admin.http.delete("/namespaces/emails")).status_code == 428
    replaced = await admin.http.put("/namespaces/emails", json={"limits": ["3/hour"], "algorithm": "fixed_window"}, headers=ANY)
    assert (replaced.json()["revision"], replaced.json()["overrides"]) == (3, [])
    again = await admin.http.post("/namespaces", json={"name": "emails"})
    assert (again.status_code, again.json()["error"]["code"]) == (409, "CATALOG_REFUSED")
    await admin.http.post("/namespaces", json={"name": "alarms", "limits": ["1/hour"]})
    page = (await admin.http.get("/namespaces", params={"limit": 1})).json()
    assert ([each["name"] for each in page["items"]], page["next"]) == (["alarms"], "alarms")
    page = (await admin.http.get("/namespaces", params={"limit": 1, "after": "alarms"})).json()
    assert ([each["name"] for each in page["items"]], page["next"]) == (["emails"], None)
    exported = (await admin.http.get("/policy")).text
    assert {each.name for each in parse_policy(exported).namespaces} == {"alarms", "emails"}
    assert (await admin.http.delete("/namespaces/emails", headers=ANY)).status_code == 204
    assert (await admin.http.get("/namespaces/emails")).status_code == 404
    assert (await limit(admin))[0] == 400
    log = (await admin.http.get("/audit-log", params={"kind": "namespace"})).json()["items"]
    assert [each["action"] for each in log] == ["delete", "create", "update", "update", "create"]


async def test_a_reset_in_a_namespace(admin: Admin) -> None:
    sent = {"limits": ["1/hour"], "algorithm": "fixed_window"}
    assert [(await limit(admin, **sent))[0] for _ in range(2)] == [200, 429]
    assert (await limit(admin, "other", **sent))[0] == 200
    answer = await admin.http.post("/counters/reset", json={"namespace": "emails", "subject": "user-42"})
    assert answer.json() == {"reset": 1}
    assert [(await limit(admin, **sent))[0], (await limit(admin, "other", **sent))[0]] == [200, 429]
    for wrong in (
        {"namespace": "emails"},
        {"namespace": "emails", "subject": "a", "tier": "b"},
        {"namespace": "a/b", "subject": "x"},
    ):
        assert (await admin.http.post("/counters/reset", json=wrong)).status_code == 400


async def test_a_policy_file_owns_its_own_only(admin: Admin) -> None:
    await admin.http.post("/namespaces", json={"name": "ours", "limits": ["1/hour"]})
    await admin.catalog.apply_policy(parse_policy(FILE.format(name="theirs")), "1")
    read = {each["name"]: each["managed_by_file"] for each in (await admin.http.get("/namespaces")).json()["items"]}
    assert read == {"ours": False, "theirs": True}
    for answer in (
        await admin.http.patch("/namespaces/theirs", json={"limits": ["2/hour"]}, headers=ANY),
        await admin.http.delete("/namespaces/theirs", headers=ANY),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "MANAGED_BY_FILE")
    with pytest.raises(CatalogError, match="namespace 'ours' of the policy file belongs to the catalog"):
        await admin.catalog.apply_policy(parse_policy(FILE.format(name="ours")), "2")
    # A file that no longer names one deletes it, and leaves the catalog's.
    await admin.catalog.apply_policy(parse_policy(FILE.format(name="new")), "3")
    names = [each["name"] for each in (await admin.http.get("/namespaces")).json()["items"]]
    assert names == ["new", "ours"]


async def test_an_import_keeps_revisions_of_what_it_does_not_change(admin: Admin) -> None:
    for name in ("a", "b"):
        await admin.http.post("/namespaces", json={"name": name, "limits": ["1/hour"]})
    text = FILE.format(name="a").replace("10/hour", "1/hour") + '[[namespaces]]\nname = "b"\nlimits = ["2/hour"]\n'
    assert (await admin.http.post("/policy", content=text)).status_code == 200
    read = {each["name"]: (each["limits"], each["revision"]) for each in (await admin.http.get("/namespaces")).json()["items"]}
    assert read == {"a": (["1/hour"], 1), "b": (["2/hour"], 2)}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"name": "a/b"}, "1 to 64 of letters"),
        ({"name": "a", "limits": ["often"]}, "often"),
        ({"name": "a", "algorithm": "magic"}, "algorithm"),
        ({"name": "a", "overrides": [{"subject": "x", "limits": []}]}, "limits"),
        ({"name": "a", "overrides": [{"subject": "x", "limits": ["1/s"]}] * 2}, "two overrides"),
        ({"name": "a", "overrides": [{"subject": f"{n}*", "limits": ["1/s"]} for n in range(101)]}, "at most 100"),
        ({"name": "a", "limit": ["1/s"]}, "limit"),
    ],
)
async def test_what_is_not_valid_is_refused(admin: Admin, fields: dict[str, Any], said: str) -> None:
    answer = await admin.http.post("/namespaces", json=fields)
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]
    assert (await admin.http.get("/namespaces")).json()["items"] == []


async def test_what_the_policy_says_of_callers(admin: Admin) -> None:
    nobody = (await admin.http.get("/callers")).json()
    assert nobody == {
        **dict.fromkeys(("anonymous_tier", "tier_from", "default_tier", "jwt")),
        "attributes": {},
        "managed_by_file": False,
    }
    await admin.catalog.apply_policy(parse_policy(POLICY), "1")
    read = (await admin.http.get("/callers")).json()
    assert (read["tier_from"], read["default_tier"], read["managed_by_file"]) == ("plan", "public", True)
    assert read["attributes"] == {"user": "header:x-user-id", "plan": "header:x-plan", "team": "jwt:team"}
    assert read["jwt"] == {
        "jwks": "https://issuer.example/jwks.json",
        "issuer": "",
        "audience": ["api"],
        "header": "Authorization",
        "algorithms": ["RS256", "ES256", "EdDSA"],
        "leeway_s": 30,
    }
