"""Who may ask the control plane, how often, and with what; on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy import event, select, update

from tests.integration.admin_api import TOKEN, Admin, open_admin
from tests.moments import MINUTE_S, stay_within
from tidegate.admin.tokens import Principal, first_token
from tidegate.catalog.sql.tables import admin_tokens
from tidegate.doors.admin.guard import Guard
from tidegate.doors.client_address import TrustedProxies

INJECTIONS = (
    "' OR '1'='1",
    "x'; DROP TABLE tiers; --",
    '"; DELETE FROM api_keys; --',
    "\\'; --",
    "%' OR 1=1 --",
    "1) UNION SELECT 1--",
)
ANY = {"If-Match": "*"}


@pytest.fixture
async def admin(catalog_url: str) -> AsyncIterator[Admin]:
    made = await open_admin(catalog_url, trusted=TrustedProxies(["192.0.2.0/24"]))
    yield made
    await made.close()


async def _token(admin: Admin, role: str, name: str = "n", **fields: Any) -> dict[str, Any]:
    made = await admin.http.post("/tokens", json={"name": name, "role": role, **fields})
    assert made.status_code == 201, made.text
    return dict(made.json())


async def test_no_token_and_wrong_ones(admin: Admin) -> None:
    for token, code in (
        (None, "MISSING_TOKEN"),
        ("", "MISSING_TOKEN"),
        ("nope", "INVALID_TOKEN"),
        ("tga_" + "a" * 40, "INVALID_TOKEN"),
    ):
        async with admin.client(token) as http:
            answer = await http.get("/tiers")
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, code)
            assert answer.headers["www-authenticate"] == "Bearer"
            assert (await http.get("/nothing")).status_code == 401
            assert (await http.get("/openapi.json")).status_code == 200
    async with admin.client(None) as http:
        basic = await http.get("/tiers", headers={"Authorization": "Basic abc"})
        assert basic.json()["error"]["code"] == "MISSING_TOKEN"


async def test_roles(admin: Admin) -> None:
    await admin.tier()
    viewer, operator = await _token(admin, "viewer", "v"), await _token(admin, "operator", "o")
    async with admin.client(viewer["token"]) as http:
        assert (await http.get("/tiers")).status_code == 200
        for answer in (
            await http.post("/tiers", json={"name": "x"}),
            await http.put("/tiers/free", json={"limits": []}, headers=ANY),
            await http.delete("/tiers/free", headers=ANY),
            await http.post("/policy", params={"dry_run": True}, content="x"),
            await http.get("/tokens"),
        ):
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "FORBIDDEN")
    async with admin.client(operator["token"]) as http:
        assert (await http.post("/tiers", json={"name": "x"})).status_code == 201
        assert (await http.get("/audit-log")).json()["items"][0]["actor"] == "o"
        assert len((await http.get("/tokens")).json()["items"]) == 2


async def test_tokens_end(admin: Admin) -> None:
    made = await _token(admin, "viewer", expires_at="2100-01-01T00:00:00Z")
    taken = await admin.http.post("/tokens", json={"name": "n"})
    assert taken.status_code == 409
    assert (await admin.http.post("/tokens", json={"name": "settings"})).status_code == 400
    assert (await admin.http.post("/tokens", json={"name": "p", "expires_at": "2001-01-01T00:00:00Z"})).status_code == 400
    async with admin.client(made["token"]) as http:
        assert (await http.get("/tiers")).status_code == 200
        async with admin.catalog.database.transaction() as connection:
            await connection.execute(update(admin_tokens).values(expires_at_us=1))
        assert (await http.get("/tiers")).status_code == 401
        async with admin.catalog.database.transaction() as connection:
            await connection.execute(update(admin_tokens).values(expires_at_us=None))
        revoked = await admin.http.delete(f"/tokens/{made['id']}")
        assert revoked.json()["revoked_at"] is not None
        assert (await http.get("/tiers")).status_code == 401
    assert (await admin.http.delete(f"/tokens/{made['id']}")).status_code == 409
    assert (await admin.http.delete("/tokens/77")).status_code == 404
    async with admin.editor.reading() as connection:
        rows = (await connection.execute(select(admin_tokens))).mappings().all()
    assert made["token"] not in str(rows)
    assert made["token"] not in (await admin.http.get("/audit-log")).text


async def test_the_first_token_is_made_once(admin: Admin) -> None:
    token = await first_token(admin.editor)
    assert token is not None
    assert await first_token(admin.editor) is None
    async with admin.client(token) as http:
        assert (await http.post("/tiers", json={"name": "x"})).status_code == 201


async def test_each_token_has_its_limit(catalog_url: str) -> None:
    admin = await open_admin(catalog_url, rate="3/minute")
    stay_within(MINUTE_S, 5)
    other = await _token(admin, "viewer")
    assert [(await admin.http.get("/tiers")).status_code for _ in range(3)] == [200, 200, 429]
    answer = await admin.http.get("/tiers")
    assert answer.json()["error"]["code"] == "RATE_LIMIT_EXCEEDED"
    assert 0 < int(answer.headers["retry-after"]) <= 120
    async with admin.client(other["token"]) as http:
        assert (await http.get("/tiers")).status_code == 200
    await admin.close()


async def test_guesses_are_stopped_for_each_address_and_the_right_token_passes(catalog_url: str) -> None:
    admin = await open_admin(catalog_url)
    stay_within(MINUTE_S, 10)
    made = await _token(admin, "viewer")
    async with admin.client("tga_" + "a" * 40) as http, admin.client(made["token"]) as viewer:
        guessed, answered = [], []
        for _ in range(38):
            guessed.append((await http.get("/tiers")).status_code)
            answered += [(await admin.http.get("/tiers")).status_code, (await viewer.get("/tiers")).status_code]
        assert guessed == [401] * 20 + [429] * 18
        assert answered == [200] * 76
        assert "retry-after" in (await http.get("/tiers")).headers
        # One that was made meanwhile passes as well, one that was revoked does not.
        newest = await _token(admin, "viewer", "newest")
        async with admin.client(newest["token"]) as other:
            assert (await other.get("/tiers")).status_code == 200
            await admin.http.delete(f"/tokens/{newest['id']}")
            assert (await other.get("/tiers")).status_code == 429
    await admin.close()


@pytest.mark.parametrize("header", ["X-Real-IP", "X-Forwarded-For"])
async def test_untrusted_headers_do_not_change_the_address(catalog_url: str, header: str) -> None:
    admin = await open_admin(catalog_url)
    stay_within(MINUTE_S, 5)
    async with admin.client("wrong-token-of-somebody") as http:
        statuses = [(await http.get("/tiers", headers={header: f"198.51.100.{number}"})).status_code for number in range(25)]
    assert statuses == [401] * 20 + [429] * 5
    await admin.close()


async def test_proxies_of_the_control_plane_name_the_address(catalog_url: str) -> None:
    admin = await open_admin(
        catalog_url, trusted=TrustedProxies(["192.0.2.0/24"]), failed_rate="2/minute", failed_rate_overall="9/minute"
    )
    stay_within(MINUTE_S, 5)

    async def guess(address: str) -> int:
        return (await http.get("/tiers", headers={"X-Forwarded-For": address})).status_code

    async with admin.client("wrong-token-of-somebody") as http:
        assert [await guess("198.51.100.7") for _ in range(4)] == [401, 401, 429, 429]
        # The addresses of one IPv6 network are one guesser.
        assert [await guess(f"2001:db8::{number:x}") for number in range(4)] == [401, 401, 429, 429]
        assert [await guess(f"203.0.113.{number}") for number in range(8)] == [401] * 5 + [429] * 3  # nine from everywhere
    assert (await admin.http.get("/tiers")).status_code == 200
    await admin.close()


@pytest.mark.parametrize(
    "pairs",
    [
        [("X-Real-IP", b"\xff"), ("X-Forwarded-For", b"198.51.100.7")],
        [("X-Forwarded-For", b"198.51.100.7\xe9")],
        [("X-Real-IP", b"198.51.100.7"), ("X-Real-IP", b"198.51.100.8")],
        [("Forwarded", b'for="198.51.100.7\xff"')],
        [("Authorization", b"Bearer tga_\xff")],
        [("Authorization", b"Bearer tga_a"), ("Authorization", b"Bearer " + TOKEN.encode())],
    ],
)
async def test_header_values_that_cannot_be_read_are_refused(catalog_url: str, pairs: list[tuple[str, bytes]]) -> None:
    admin = await open_admin(catalog_url, trusted=TrustedProxies(["192.0.2.0/24"]))
    mine = [] if pairs[0][0] == "Authorization" else [("Authorization", b"Bearer " + TOKEN.encode())]
    async with admin.client(None) as http:
        answer = await http.get("/tiers", headers=[(name.encode(), value) for name, value in (*mine, *pairs)])
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "BAD_REQUEST")
    assert "tga_" not in answer.text, "tokens are not repeated"
    assert TOKEN not in answer.text
    await admin.close()


async def test_many_guesses_share_a_query(catalog_url: str) -> None:
    admin = await open_admin(catalog_url, failed_rate="1/minute")
    stay_within(MINUTE_S, 5)
    queries: list[str] = []

    def count(_: Any, __: Any, statement: str, *rest: Any) -> None:
        queries.append(statement)

    event.listen(admin.catalog.database._reader.sync_engine, "before_cursor_execute", count)
    async with admin.client(None) as http:

        async def guess(number: int) -> int:
            return (await http.get("/tiers", headers={"Authorization": f"Bearer tga_{number:040}"})).status_code

        assert await guess(0) == 401
        queries.clear()
        assert await asyncio.gather(*(guess(number) for number in range(100))) == [429] * 100
    assert len(queries) < 20
    await admin.close()


@pytest.mark.parametrize(
    "path", ["tokens%0A", "tokens%0D", "%0Atokens", "tokens%00", "tokens%7F", "tokens%C2%85", "tiers%0A", "tokens/%0A"]
)
async def test_paths_with_control_characters_are_rejected(admin: Admin, path: str) -> None:
    viewer = await _token(admin, "viewer", "v")
    async with admin.client(viewer["token"]) as http:
        answer = await http.get(f"http://admin/admin/v1/{path}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "BAD_REQUEST")
        assert "items" not in answer.text
    async with admin.client(None) as http:
        assert (await http.get("http://admin/x%0A")).status_code == 400


async def test_every_route_has_a_role(admin: Admin) -> None:
    """Whatever is added: without a token nothing is read, and a viewer changes nothing and reads no tokens."""
    viewer = await _token(admin, "viewer", "v")
    described = (await admin.http.get("/openapi.json")).json()["paths"]
    assert len(described) > 15
    async with admin.client(None) as anonymous, admin.client(viewer["token"]) as http:
        for path, operations in described.items():
            filled = "http://admin" + re.sub(r"\{[^}]*\}", "1", path)
            for method in operations:
                answer = await anonymous.request(method, filled)
                assert answer.status_code == 401, (method, path)
                answer = await http.request(method, filled)
                if method != "get" or "tokens" in path:
                    assert answer.status_code == 403, (method, path)
                else:
                    assert answer.status_code != 403, (method, path)


async def test_the_routes_have_roles_of_their_own(admin: Admin) -> None:
    """Also where a request passed the guard by mistake."""
    scope = {"type": "http", "method": "GET", "path": "/admin/v1/tokens", "headers": [], "query_string": b"", "state": {}}
    behind: Any = admin.app.build_middleware_stack()
    while not isinstance(behind, Guard):
        behind = behind.app
    behind = behind._app
    for principal, status in (
        (None, 401),
        (Principal("v", "viewer", "token 1"), 403),
        (Principal("o", "operator", "token 2"), 200),
    ):
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any, sent: list[Any] = sent) -> None:
            sent.append(message)

        state = {} if principal is None else {"principal": principal}
        await behind({**scope, "state": state, "app": admin.app}, receive, send)
        assert sent[0]["status"] == status


async def test_viewers_get_no_digests(admin: Admin) -> None:
    await admin.tier()
    await admin.key()
    viewer = await _token(admin, "viewer", "v")
    assert "sha256" in (await admin.http.get("/policy")).text
    assert "sha256" not in (await admin.http.get("/policy", params={"keys": False})).text
    async with admin.client(viewer["token"]) as http:
        exported = await http.get("/policy")
        assert (exported.status_code, "sha256" in exported.text) == (200, False)
        assert (await http.get("/policy", params={"keys": False})).status_code == 200
        refused = await http.get("/policy", params={"keys": True})
        assert (refused.status_code, "sha256" in refused.text) == (403, False)
        for path in ("/api-keys", "/audit-log", "/tiers", "/rate-limit-rules", "/violations"):
            assert re.search(r"[0-9a-f]{64}", (await http.get(path)).text) is None


HIDDEN_NAMES = (
    "a\x07b",
    "a\x1b[31mb",
    "a\u202eb",
    "a\u2066b",
    "a\u200bb",
    "a\u200db",
    "\ufeffa",
    "a\u00adb",
    "a\u3164b",
    "a\u2028b",
    "a\U000e0041",
)
IMITATIONS = (
    "settings",
    "Settings",
    "ѕettings",
    "set tings",
    "ｓettings",
    "cli:root",
    "CLI:root",
    "cli\uff1aroot",
    "cli : root",
    "сli:root",
)


async def test_names_show_what_they_are(admin: Admin) -> None:
    await admin.tier()
    key = await admin.key()
    for name in (*HIDDEN_NAMES, *IMITATIONS, " a", "a "):
        for answer in (
            await admin.http.post("/tokens", json={"name": name}),
            await admin.http.post("/api-keys", json={"tier": "free", "name": name}),
            await admin.http.patch(f"/api-keys/{key['id']}", json={"name": name}, headers=ANY),
        ):
            assert answer.status_code == 400, (name, answer.text)
            assert answer.json()["error"]["message"].isprintable(), name
    for name in HIDDEN_NAMES:
        text = (
            '[[tiers]]\nname = "t"\n[[api_keys]]\ntier = "t"\nsha256 = "'
            + "ab" * 32
            + f'"\nname = {json.dumps(name, ensure_ascii=False)}\n'
        )
        answer = await admin.http.post("/policy", content=text)
        assert (answer.status_code, "does not show" in answer.text) == (400, True), answer.text
    for name in ("Ünïcode", "日本語", "عربى", "cli", "client: x", "settings of Ada", "first"):
        assert (await admin.http.post("/tokens", json={"name": name})).status_code == 201, name
        assert (await admin.http.post("/api-keys", json={"tier": "free", "name": name})).status_code == 201, name


async def test_bodies_are_bounded(admin: Admin) -> None:
    for content in (b"x" * 1_000_001, _chunks()):
        answer = await admin.http.post("/tiers", content=content, headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "PAYLOAD_TOO_LARGE")


async def _chunks() -> AsyncIterator[bytes]:
    for _ in range(20):
        yield b"x" * 100_000


async def _every_string(admin: Admin, text: str) -> dict[str, Any]:
    """One answer for each field that takes a text."""
    key, rule = await admin.key(), await admin.rule(f"/{(await admin.key())['id']}")
    rule_body = {"tier": "free", "endpoint": "/x", "limits": ["1/s"]}
    http, found = admin.http, {}
    fields = {"endpoint": text, "tier": text, "name": text, "limits": [text], "methods": [text], "algorithm": text}
    for field, value in {**fields, "subject": text, "mode": text, "on_failure": text}.items():
        found[f"rule {field}"] = await http.post("/rate-limit-rules", json={**rule_body, field: value})
        if field != "tier":
            path = f"/rate-limit-rules/{rule['id']}"
            found[f"rule patch {field}"] = await http.patch(path, json={field: value}, headers=ANY)
    for field, value in {"name": text, "limits": [text]}.items():
        found[f"tier {field}"] = await http.post("/tiers", json={"name": "t", field: value})
    overrides = [{"rule": text, "limits": ["1/s"]}]
    for field, value in {"tier": text, "name": text, "expires_at": text, "limits": [text], "overrides": overrides}.items():
        found[f"key {field}"] = await http.post("/api-keys", json={"tier": "free", field: value})
        found[f"key patch {field}"] = await http.patch(f"/api-keys/{key['id']}", json={field: value}, headers=ANY)
    for field in ("name", "role", "expires_at"):
        found[f"token {field}"] = await http.post("/tokens", json={"name": "n", field: text})
    for field in ("api_key_id", "ip", "tier", "subject"):
        found[f"reset {field}"] = await http.post("/counters/reset", json={field: text})
    found["policy"] = await http.post("/policy", content=text.encode())
    found["unknown field"] = await http.post("/tiers", json={"name": "u", text: 1})
    found["reason"] = await http.post(f"/api-keys/{key['id']}/revoke", json={"reason": text})
    return found


async def _every_parameter(admin: Admin, text: str) -> dict[str, Any]:
    found = {}
    for path, names in {
        "/tiers": "after name limit",
        "/rate-limit-rules": "after tier endpoint name",
        "/api-keys": "after tier status name",
        "/tokens": "after",
        "/audit-log": "after kind target actor",
        "/violations": "after since until tier rule api_key_id ip subject",
        "/violations/top": "by since until tier rule api_key_id ip subject attribute",
        "/traffic": "from to step limit tier rule api_key_id ip subject",
        "/traffic/callers": "from to limit sort tier rule api_key_id ip subject",
        "/usage/export": "from to format customer api_key limit after",
        "/usage": "api_key_id ip subject tier",
        "/policy": "keys",
    }.items():
        for name in [*names.split(), text]:
            found[f"{path} {name[:20]}"] = await admin.http.get(path, params={name: text})
    for path in ("/tiers/", "/rate-limit-rules/", "/api-keys/"):
        escaped = "".join(f"%{byte:02x}" for byte in text.encode())
        found[path] = await admin.http.get(path + escaped)
    found["if-match"] = await admin.http.put("/tiers/free", json={"limits": []}, headers={"If-Match": text.encode()})
    return found


async def test_injections_change_nothing(admin: Admin) -> None:
    await admin.tier()
    for text in INJECTIONS:
        for what, answer in {**await _every_string(admin, text), **await _every_parameter(admin, text)}.items():
            assert answer.status_code in (200, 201, 400, 404, 409), (what, answer.text)
            if answer.status_code >= 400:
                assert answer.json()["error"]["message"], what
    # What may be any text is kept as it is.
    names = {each["name"] for each in (await admin.http.get("/api-keys", params={"limit": 500})).json()["items"]}
    assert set(INJECTIONS) <= names
    assert (await admin.http.get("/tiers/free")).status_code == 200
    assert (await admin.http.get("/tiers", params={"name": INJECTIONS[0]})).json()["items"] == []


async def test_what_is_too_long_is_rejected(admin: Admin) -> None:
    await admin.tier()
    long = "a" * 20_000  # as much as the URL of a test takes
    answers = {**await _every_string(admin, long), **await _every_parameter(admin, long)}
    assert {what: answer.status_code for what, answer in answers.items() if answer.status_code not in (400, 404)} == {}
    assert max(len(answer.text) for answer in answers.values()) < 3000
    megabyte = await admin.http.post("/api-keys", json={"tier": "free", "name": "a" * 999_000})
    assert (megabyte.status_code, len(megabyte.text) < 1000) == (400, True)
    beyond = await admin.http.post("/api-keys", json={"tier": "free", "name": "a" * 1_000_000})
    assert beyond.status_code == 413


async def test_nul_and_lone_surrogates_are_rejected(admin: Admin) -> None:
    await admin.tier()
    answers = {**await _every_string(admin, "a\0b"), **await _every_parameter(admin, "a\0b")}
    assert {what: answer.status_code for what, answer in answers.items() if answer.status_code not in (400, 404)} == {}
    for raw in (b'{"name": "\\ud800"}', b'{"\\ud800": 1, "name": "x"}', b'{"name": "\xff"}'):
        answer = await admin.http.post("/tiers", content=raw, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400, answer.text


OPTIONAL = {
    ("/tiers", "limits"),
    ("/rate-limit-rules", "priority"),
    ("/rate-limit-rules", "mode"),
    ("/api-keys", "overrides"),
    ("/tokens", "role"),
}
"""Fields in which null counts as left out."""


@pytest.mark.parametrize("wrong", [None, 1, 1.5, True, [], {}, [[]], [None], {"a": 1}, 10**400])
async def test_wrong_types_are_rejected(admin: Admin, wrong: object) -> None:
    await admin.tier()
    for path, body in {
        "/tiers": {"name": "t", "limits": ["1/s"]},
        "/rate-limit-rules": {"tier": "free", "endpoint": "/x", "limits": ["1/s"], "priority": 1, "mode": "enforce"},
        "/api-keys": {"tier": "free", "overrides": []},
        "/tokens": {"name": "n", "role": "viewer"},
    }.items():
        for field, right in body.items():
            if type(wrong) is type(right) and (wrong == [] or field == "priority"):
                continue
            if wrong is None and (path, field) in OPTIONAL:
                continue
            answer = await admin.http.post(path, json={**body, field: wrong})
            assert answer.status_code == 400, (path, field, answer.text)
            assert field in answer.json()["error"]["message"]
        whole = await admin.http.post(path, content=json.dumps(wrong), headers={"Content-Type": "application/json"})
        assert whole.status_code == 400


async def test_invalid_json_is_reported(admin: Admin) -> None:
    for content, kind, word in (
        (b"{", "application/json", "JSON"),
        (b"", "application/json", "missing"),
        (b"[" * 100_000, "application/json", ""),
        (b'{"name": "x"}', "text/plain", "Content-Type: application/json"),
        (b'{"name": "x"}', "application/x-www-form-urlencoded", "Content-Type: application/json"),
    ):
        answer = await admin.http.post("/tiers", content=content, headers={"Content-Type": kind})
        assert answer.status_code == 400
        assert word in answer.json()["error"]["message"]


async def test_errors_have_one_form(admin: Admin) -> None:
    for answer, status in (
        (await admin.http.get("/nothing"), 404),
        (await admin.http.get("/tiers/"), 404),
        (await admin.http.delete("/tiers"), 405),
        (await admin.http.get("/rate-limit-rules/0"), 400),
        (await admin.http.get("/rate-limit-rules/99999999999999999999999"), 400),
        (await admin.http.get("http://admin/"), 404),
    ):
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"code", "message", "details"}
    assert "GET" in (await admin.http.delete("/tiers")).headers["allow"]


async def test_nulls_and_compressed_bodies(admin: Admin) -> None:
    """Null is a field left out, as everywhere; what would have to be unpacked is refused by what it is."""
    await admin.tier()
    sent = {
        "tier": "free",
        "endpoint": "/n/*",
        "limits": ["5/minute"],
        "methods": None,
        "priority": None,
        "mode": None,
        "name": None,
    }
    made = await admin.http.post("/rate-limit-rules", json=sent)
    assert (made.status_code, made.json()["priority"], made.json()["mode"]) == (201, 0, "enforce")
    for required in ("tier", "endpoint", "limits"):
        refused = await admin.http.post("/rate-limit-rules", json={**sent, required: None})
        # Without limits a rule may still have quotas or an action: only the policy knows.
        code = "POLICY_REFUSED" if required == "limits" else "BAD_REQUEST"
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, code)
    compressed = await admin.http.post("/tiers", content=b"\x1f\x8b", headers={"Content-Encoding": "gzip"})
    assert (compressed.status_code, compressed.json()["error"]["code"]) == (415, "UNSUPPORTED_MEDIA_TYPE")
