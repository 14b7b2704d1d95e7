"""Callers by attribute at one running server (SQLite, memory): usage, reset, violations, and the command line."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric import ec

import jwt
from tests.conftest import Serve
from tests.moments import PATIENCE_S, wait_until

TOKEN = "token-of-the-settings"
POLICY = """
[attributes]
user = "header:X-User-Id"
org = "jwt:org"
[jwt]
jwks = "jwks.json"
audience = "api"
[callers]
default_tier = "users"
[[tiers]]
name = "users"
  [[tiers.rules]]
  endpoint = "/api/*"
  subject = "user"
  limits = ["2/hour"]
  [[tiers.rules]]
  endpoint = "/orgs/*"
  subject = ["org", "user"]
  on_missing = "deny"
  limits = ["1/hour"]
[[namespaces]]
name = "emails"
limits = ["1/hour"]
"""


def test_a_caller_by_attribute_from_check_to_reset(serve: Callable[..., Serve], tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    public = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(key.public_key()))
    (tmp_path / "jwks.json").write_text(json.dumps({"keys": [{**public, "kid": "a"}]}))
    bearer = jwt.encode({"aud": "api", "exp": int(time.time()) + 3600, "org": "acme"}, key, "ES256", headers={"kid": "a"})
    (tmp_path / "token").write_text(bearer)
    (tmp_path / "tidegate.policy.toml").write_text(POLICY)
    server = serve(TIDEGATE_ADMIN__TOKEN=TOKEN, TIDEGATE_VIOLATIONS__FLUSH_S="0.2")
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with (
        httpx.Client(base_url=server.url, timeout=PATIENCE_S) as data,
        httpx.Client(base_url=f"http://127.0.0.1:{server.admin_port}/admin/v1", headers=headers, timeout=PATIENCE_S) as admin,
    ):

        def check(path: str = "/api/a", **fields: Any) -> int:
            return data.post("/v1/check", json={"path": path, "ip": "203.0.113.7", **fields}).status_code

        user = {"attributes": {"user": "a&b"}}
        assert [check(**user) for _ in range(4)] == [200, 200, 429, 429]
        assert check(attributes={"user": "other"}) == 200
        both = {"path": "/orgs/a", "attributes": {"user": "a&b"}, "bearer": bearer}
        assert [check(**both) for _ in range(2)] == [200, 429]
        assert check("/orgs/a", **user) == 400, "the organisation is missing"

        # Usage at both planes; as a header, in the query, as a subject.
        for found in (
            data.get("/v1/usage", params={"attribute": "user=a&b"}),
            data.get("/v1/usage", headers={"X-User-Id": "a&b"}),
            admin.get("/usage", params={"subject": "user=a%26b"}),
        ):
            assert found.status_code == 200, found.text
            rules = {each["rule"]: each for each in found.json()["rules"]}
            assert (rules["/api/*"]["remaining"], rules["/api/*"]["subject"]) == (0, "user")
            assert rules["/api/*"]["windows"][0]["used"] == 2
        combined = data.get("/v1/usage", headers={"X-User-Id": "a&b", "Authorization": f"Bearer {bearer}"}).json()
        assert {each["rule"]: each["remaining"] for each in combined["rules"]} == {"/api/*": 0, "/orgs/*": 0}

        # Violations by attribute, and how often this caller was blocked.
        def top(**parameters: str) -> dict[str, int]:
            answer = admin.get("/violations/top", params=parameters)
            assert answer.status_code == 200, answer.text
            return {each["subject"]: each["blocked"] for each in answer.json()["items"]}

        wait_until(lambda: top() == {"a:user=a%26b": 2, "a:org=acme&user=a%26b": 1}, PATIENCE_S, "the violations are written")
        assert top(attribute="user") == {"a:user=a%26b": 2}
        assert top(attribute="org,user") == {"a:org=acme&user=a%26b": 1}
        assert top(subject="user=a%26b") == {"a:user=a%26b": 2}
        assert admin.get("/usage", params={"subject": "user=a%26b"}).json()["blocked_24h"] == 2

        metrics = data.get("/metrics").text
        assert not any(value in metrics for value in ("a&b", "a%26b", "acme")), (
            "subjects are no labels: their number is unbounded"
        )

        # A reset of this caller, and of nobody else.
        assert admin.post("/counters/reset", json={"subject": "user=a%26b"}).json()["reset"] >= 1
        assert [check(**user), check(**both), check(attributes={"user": "other"})] == [200, 429, 200]
        assert admin.post("/counters/reset", json={"subject": "org=acme&user=a%26b"}).status_code == 200
        assert check(**both) == 200

        made = admin.post(
            "/rate-limit-rules", json={"tier": "users", "endpoint": "/new", "subject": "user", "limits": ["1/hour"]}
        )
        assert (made.status_code, made.json()["subject"]) == (201, "user")
        assert [each["name"] for each in admin.get("/namespaces").json()["items"]] == ["emails"]
        assert admin.get("/callers").json()["attributes"] == {"user": "header:x-user-id", "org": "jwt:org"}

        # The command line: a check by attribute and by token, and what is active.
        done = server.run("check", "-", "GET", "/api/a", "--attribute", "user=cli", "--cost", "2")
        assert (done.returncode, "0 of 2 left" in done.stdout) == (0, True), (done.stdout, done.stderr)
        assert server.run("check", "-", "GET", "/api/a", "--attribute", "user=cli").returncode == 1
        done = server.run("check", "-", "GET", "/orgs/a", "--attribute", "user=cli", "--bearer-file", "token", "--json")
        assert json.loads(done.stdout)["rule"] == "/orgs/*"
        for wrong in (("--attribute", "user"), ("--attribute", "user=1", "--attribute", "user=2"), ("--bearer-file", "absent")):
            refused = server.run("check", "-", "GET", "/api/a", *wrong)
            assert (refused.returncode, refused.stdout) == (2, ""), refused
        listed = json.loads(server.run("namespaces", "--json").stdout)
        assert [(each["name"], each["limits"]) for each in listed] == [("emails", ["1/hour"])]
        settings = {each["setting"]: each["value"] for each in json.loads(server.run("callers", "--json").stdout)}
        assert (settings["callers.default_tier"], settings["attributes.org"]) == ("users", "jwt:org")
        assert settings["jwt.audience"] == "api"
