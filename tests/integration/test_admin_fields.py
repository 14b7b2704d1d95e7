"""Every text and every number that the control plane takes, one after the other, filled with what databases choke on.

The fields are those of the OpenAPI description: a new field is tested too, or the test fails because it lacks a valid value.
PostgreSQL enforces lengths, and refuses NUL, lone surrogates and numbers out of range, where SQLite does not.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

from sqlalchemy import func, inspect, select

from tests.integration.admin_api import TOKEN, Admin
from tidegate.catalog.sql.tables import admin_tokens, api_keys, metadata, rate_limit_rules, tiers

INJECTION = "'; DROP TABLE api_keys; --"
STORABLE = (INJECTION, "%_\\", "عربي😀" + "é" * 9)
"""Texts as any other, wherever any text may stand."""
BROKEN = ("a\0b", "a\ud800b")
LONG = ("x" * 5_000 + "é" * 5_000,)
"""Longer in bytes than in characters, and longer than any limit in either."""
LONG_IN_ADDRESSES = ("x" * 6_000 + "é" * 4_000,)
"""Percent-encoded, what is not ASCII is six times as long: still within the 64 KiB that a server reads of a request's head."""
NUMBERS = (2**31, 2**63, 2**64, -(2**63) - 1)
PREFIX = "/admin/v1"

Place = tuple[Any, ...]


@functools.cache
def _quoted(value: str) -> str:
    """A text as it stands in an address. The long ones take milliseconds, and go to every parameter."""
    return quote(value.encode(errors="surrogatepass"), safe="")


class Request(NamedTuple):
    """A request of which one field is to be replaced.

    Attributes:
        path: with `{name}` for each parameter in it.
        named: values of those.
    """

    method: str
    path: str
    named: dict[str, str]
    query: dict[str, str]
    headers: dict[str, str]
    body: Any


class Answer(NamedTuple):
    status: int
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)


class RequestSender:
    """Sends requests as they are, past the limits that clients have, and looks at what each has done."""

    def __init__(self, admin: Admin) -> None:
        self.admin = admin
        self.counter = itertools.count(1)
        self.sent = 0
        self._version: int | None = None
        self.made = {"tier": 0, "rule": 0, "api_key": 0, "token": 0}

    async def send(self, request: Request) -> Answer:
        """Send it; whatever is refused must have changed nothing."""
        # Nobody else writes: what one request has left is what the next one finds.
        version = await self.admin.catalog.version() if self._version is None else self._version
        answer = await self._sent(request)
        self._version = None
        self.sent += 1
        told = f"{request.method} {request.path} {str(request)[:300]} → {answer.status} {answer.text[:300]}"
        assert answer.status < 500, told
        if answer.status >= 400:
            error = answer.json["error"]
            assert error["code"], told
            assert error["message"], told
            assert len(answer.text) < 4000, told
        if answer.status >= 400 or request.method == "get":
            self._version = await self.admin.catalog.version()
            assert self._version == version, told
        self._note(request, answer)
        return answer

    def _note(self, request: Request, answer: Answer) -> None:
        kinds = {"/tiers": "tier", "/rate-limit-rules": "rule", "/api-keys": "api_key", "/tokens": "token"}
        if request.method == "post" and request.path == "/policy" and answer.status == 200 and not answer.json["dry_run"]:
            for change in answer.json["changes"]:
                assert change["action"] in ("create", "update"), "without prune nothing goes"
                self.made[change["kind"]] += change["action"] == "create"
        elif request.method == "post" and request.path in kinds:
            self.made[kinds[request.path]] += answer.status == 201

    async def _sent(self, request: Request) -> Answer:
        raw = request.path
        for name, value in request.named.items():
            raw = raw.replace(f"{{{name}}}", _quoted(value))
        if isinstance(request.body, bytes):
            content, kind = request.body, b"application/toml"
        else:
            content, kind = b"" if request.body is None else json.dumps(request.body).encode(), b"application/json"
        query = "&".join(f"{quote(name)}={_quoted(value)}" for name, value in request.query.items())
        headers = {"authorization": f"Bearer {TOKEN}", **request.headers}
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": request.method.upper(),
            "scheme": "http",
            "path": PREFIX + unquote(raw, errors="replace"),
            "raw_path": (PREFIX + raw).encode(),
            "query_string": query.encode(),
            "headers": [
                (b"content-type", kind),
                *((name.lower().encode(), value.encode(errors="surrogatepass")) for name, value in headers.items()),
            ],
            "client": ("192.0.2.1", 1234),
            "server": ("admin", 80),
        }
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": content, "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        await self.admin.app(scope, receive, send)
        status = next(each["status"] for each in sent if each["type"] == "http.response.start")
        body = b"".join(each.get("body", b"") for each in sent if each["type"] == "http.response.body")
        return Answer(status, body.decode())

    async def key(self) -> str:
        """The id of a key that nobody else uses."""
        return (await self._made("/api-keys", {"tier": "free"}))["id"]

    async def _made(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = await self.send(Request("post", path, {}, {}, {}, body))
        assert answer.status == 201, answer.text
        return dict(answer.json)

    def bodies(self, form: str) -> list[dict[str, Any]]:
        """Right bodies of a form, with every field in one of them; what must be new is new."""
        number = next(self.counter)
        rule = {
            "endpoint": f"/new/{number}",
            "limits": ["1/s"],
            "methods": ["GET"],
            "algorithm": "sliding_window",
            "subject": "api_key",
            "priority": 1,
            "mode": "enforce",
            "on_failure": "default",
            "name": f"new {number}",
            "match": {"plan": "pro"},
            "on_missing": "ip",
            "quotas": ["100/month"],
            "overage": {"up_to": "20%"},
            "leases": False,
        }
        acting = {"endpoint": f"/acting/{number}", "action": "deny"}
        failing = {
            "endpoint": f"/failing/{number}",
            "limits": ["5/15m"],
            "count": "failures",
            "statuses": [401, 422],
            "clear_on_success": True,
            "penalty": ["1m", "5m"],
        }
        sold = {"limits": ["1/s"], "quotas": ["1000/month", "50/day"], "overage": {"up_to": "20%"}}
        override = {"rule": "/kept", "limits": ["2/s"], "quotas": ["9/month"], "until": "2100-01-01T00:00:00Z"}
        own = {"limits": ["9/day"], "overrides": [override]}
        namespace = {
            "limits": ["1/s"],
            "algorithm": "sliding_window",
            "on_failure": "default",
            "overrides": [{"subject": "vip-*", "limits": ["2/s"]}],
        }
        customer = {
            "external_id": f"id {number}",
            "tier": "free",
            "anchor": "2026-01-31",
            "timezone": "UTC",
            # Any JSON may be in it.
            "metadata": {},
            "match": {"org": f"org {number}"},
            **own,
        }
        key = {"tier": "free", "name": "n", "expires_at": "2100-01-01T00:00:00Z", **own}
        # Quotas count the customer, so its keys override none.
        owned = {**key, "customer": "free", "overrides": [{**override, "quotas": []}]}
        return {
            "TierCreate": [{"name": f"new-{number}", **sold}],
            "TierLimits": [sold],
            "TierPatch": [sold],
            "RuleCreate": [{"tier": "free", **rule}, {"tier": "free", **acting}, {"tier": "free", **failing}],
            "RuleFields": [rule, acting, failing],
            "RulePatch": [
                rule,
                {**failing, "quotas": [], "overage": False},
                {**acting, "limits": [], "quotas": [], "overage": False, "count": "requests"},
            ],
            "CustomerCreate": [{"name": f"new-{number}", **customer}],
            "CustomerPatch": [customer],
            "KeyCreate": [key, owned],
            "KeyPatch": [key, owned],
            "KeyImportRequest": [
                {
                    "dry_run": True,
                    "keys": [{"sha256": f"{number:064x}", "tier": "free", "name": "n", "expires_at": key["expires_at"]}],
                }
            ],
            "OverridesRequest": [own],
            "RevokeRequest": [{"reason": "r"}],
            "RotateRequest": [{"grace_s": 1}],
            "TokenCreate": [{"name": f"new {number}", "role": "viewer", "expires_at": "2100-01-01T00:00:00Z"}],
            "CallerTokenCreate": [{"name": f"new {number}", "scopes": ["check"], "expires_at": "2100-01-01T00:00:00Z"}],
            "BlockCreate": [
                {"cidr": f"203.0.113.{number % 256}", "until": "2100-01-01T00:00:00Z", "reason": "r", "message": "m"},
                {"api_key_id": "0" * 24},
                {"customer": f"new {number}"},
                {"attribute": {"user": f"{number}"}},
            ],
            "SubjectOverrideCreate": [
                {"rule": "users", "subject": {"user": f"{number}"}, "limits": ["2/s"], "until": "2100-01-01T00:00:00Z"}
            ],
            "SubjectOverrideFields": [{"limits": ["2/s"], "until": "2100-01-01T00:00:00Z"}],
            "NamespaceCreate": [{"name": f"new-{number}", **namespace}],
            "NamespaceFields": [namespace],
            "NamespacePatch": [namespace],
            "ResetRequest": [
                {"api_key_id": "0" * 24},
                {"ip": "192.0.2.7"},
                {"tier": "free"},
                {"customer": "acme"},
                {"subject": "user=1"},
                {"namespace": "emails", "subject": "user-42"},
            ],
        }[form]


def _leaves(value: Any, place: Place = ()) -> Iterator[Place]:
    """Where in a body a text or a number stands."""
    if isinstance(value, dict):
        for name, each in value.items():
            yield from _leaves(each, (*place, name))
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from _leaves(each, (*place, number))
    else:
        yield place


def _at(body: Any, place: Place) -> Any:
    for step in place:
        body = body[step]
    return body


def _with(body: Any, place: Place, value: Any) -> Any:
    changed = copy.deepcopy(body)
    _at(changed, place[:-1])[place[-1]] = value
    return changed


def _described(admin: Admin) -> Iterator[tuple[str, str, dict[str, Any], str | None]]:
    """Method, path, description and name of the body's form of every operation."""
    for path, operations in admin.app.openapi()["paths"].items():
        for method, operation in operations.items():
            content = operation.get("requestBody", {}).get("content", {}).get("application/json")
            form = None
            if content is not None:
                schema = content["schema"]
                refs = [each["$ref"] for each in (schema, *schema.get("anyOf", ())) if "$ref" in each]
                form = refs[0].rpartition("/")[2] if refs else None
            yield method, path.removeprefix(PREFIX), operation, form


def _values(long: tuple[str, ...] = LONG) -> Iterator[str]:
    yield from (*STORABLE, *BROKEN, *long, *map(str, NUMBERS))


async def _prepared(admin: Admin) -> dict[str, str]:
    """Something of everything; gives the parameters that paths have."""
    await admin.tier()
    rule = await admin.rule()
    # For overrides of keys: the other one is renamed.
    await admin.rule("/kept")
    await admin.rule("/users", name="users", subject="user")
    override = {"rule": "users", "subject": {"user": "kept"}, "limits": ["1/s"]}
    made = (await admin.http.post("/tiers/free/overrides", json=override)).json()
    token = await admin.http.post("/tokens", json={"name": "one"})
    assert (await admin.http.post("/namespaces", json={"name": "free"})).status_code == 201
    # The name of the tier: one parameter stands for both.
    assert (await admin.http.post("/customers", json={"name": "free", "tier": "free"})).status_code == 201
    return {
        "run_id": "0" * 32,
        "name": "free",
        "rule_id": str(rule["id"]),
        "override_id": made["id"],
        "key_id": (await admin.key())["id"],
        "token_id": str(token.json()["id"]),
        "block_id": str((await admin.http.post("/blocks", json={"cidr": "198.51.100.1"})).json()["id"]),
    }


async def _counted(admin: Admin) -> dict[str, int]:
    async with admin.editor.reading() as connection:
        there = await connection.run_sync(lambda held: set(inspect(held).get_table_names()))
        assert metadata.tables.keys() <= there
        kinds = {"tier": tiers, "rule": rate_limit_rules, "api_key": api_keys, "token": admin_tokens}
        return {
            kind: (await connection.execute(select(func.count()).select_from(table))).scalar_one()
            for kind, table in kinds.items()
        }


async def _settled(sender: RequestSender, before: dict[str, int]) -> None:
    """All tables are there, and hold what was answered to be made, no more and no less."""
    assert await _counted(sender.admin) == {kind: count + sender.made[kind] for kind, count in before.items()}
    assert (await sender.admin.http.get("/tiers/free")).status_code == 200


async def test_every_field_of_every_body(admin: Admin) -> None:
    named = await _prepared(admin)
    before = await _counted(admin)
    sender = RequestSender(admin)
    kept: set[str] = set()
    forms = set()
    for method, path, _, form in _described(admin):
        if form is None:
            continue
        forms.add(form)
        known = admin.app.openapi()["components"]["schemas"][form]["properties"].keys()
        assert {name for body in sender.bodies(form) for name in body} == known, f"give right values for all fields of {form}"
        for number, right in enumerate(sender.bodies(form)):
            for place in _leaves(right):
                field = next(step for step in place[::-1] if isinstance(step, str))
                # Where a text belongs, any number is refused for its type.
                numbers = NUMBERS[:1] if isinstance(_at(right, place), str) else NUMBERS
                for value in (*STORABLE, *BROKEN, *LONG, *numbers):
                    # A key can be revoked once, so each request uses a new key and new names.
                    if path.endswith("/revoke"):
                        named = {**named, "key_id": await sender.key()}
                    body = _with(sender.bodies(form)[number], place, value)
                    answer = await sender.send(Request(method, path, named, {}, {"if-match": "*"}, body))
                    told = f"{method} {path} {place} {str(value)[:20]!r} {answer}"
                    if isinstance(value, int) or value in BROKEN or value in LONG:
                        assert answer.status == 400, told
                        message = answer.json["error"]["message"]
                        # A surrogate is no text at all: the JSON itself is refused.
                        assert field in message or "JSON" in message or "surrogate" in message, told
                    else:
                        assert answer.status in (200, 201, 400, 404, 409), told
                        if answer.status < 300 and field in ("name", "reason"):
                            kept.add(value)
    assert forms == {
        *(form for form in admin.app.openapi()["components"]["schemas"] if form.endswith(("Create", "Request", "Patch"))),
        *("TierLimits", "RuleFields", "NamespaceFields", "SubjectOverrideFields"),
    }
    assert kept == set(STORABLE), "what may be any text is"
    listed, after = set(), {}
    while True:
        page = (await admin.http.get("/api-keys", params={"limit": 500, **after})).json()
        listed |= {each["name"] for each in page["items"]}
        if page["next"] is None:
            break
        after = {"after": page["next"]}
    assert set(STORABLE) <= listed
    assert sender.sent > 600
    await _settled(sender, before)


async def test_every_parameter(admin: Admin) -> None:
    named = await _prepared(admin)
    before = await _counted(admin)
    sender = RequestSender(admin)
    seen = set()
    for method, path, operation, form in _described(admin):
        body = None if form is None else sender.bodies(form)[0]
        if path == "/policy" and method == "post":
            body = b'[[tiers]]\nname = "free"\nlimits = ["1000/day"]\n'
        right = Request(method, path, named, {}, {"if-match": "*"}, body)
        for parameter in operation.get("parameters", ()):
            name, where = parameter["name"], parameter["in"]
            seen.add((where, name))
            for value in _values(LONG_IN_ADDRESSES):
                request = {
                    "path": right._replace(named={**named, name: value}),
                    "query": right._replace(query={name: value}),
                    "header": right._replace(headers={name: value}),
                }[where]
                answer = await sender.send(request)
                told = f"{method} {path} {name} {value[:20]!r} {answer}"
                assert answer.status in (200, 400, 404), told
                if where != "path" and (value in LONG_IN_ADDRESSES or "\0" in value or where == "header"):
                    assert answer.status == 400, told
                    assert name in answer.json["error"]["message"], told
                if where == "path":
                    assert answer.status in (400, 404), told
            if where == "query":
                answer = await sender.send(right._replace(query={name + INJECTION: "x"}))
                assert answer.status == 400
                assert "unknown query parameter" in answer.json["error"]["message"]
    assert seen >= {("path", name) for name in named} | {("header", "If-Match"), ("query", "after"), ("query", "target")}
    assert sender.sent > 600
    await _settled(sender, before)


def _toml(text: str) -> str:
    """A string of TOML; what cannot stand there as it is is escaped."""
    return '"' + re.sub(r'[\x00-\x1f"\\\ud800-\udfff]', lambda found: f"\\u{ord(found[0]):04x}", text) + '"'


async def test_every_text_of_a_policy(admin: Admin) -> None:
    await _prepared(admin)
    before = await _counted(admin)
    sender = RequestSender(admin)
    template = """\
[[tiers]]
name = {tier}
limits = [{tier_limit}]
  [[tiers.rules]]
  endpoint = {endpoint}
  methods = [{method}]
  limits = [{limit}]
  algorithm = {algorithm}
  subject = {subject}
  mode = {mode}
  on_failure = {on_failure}
  name = {rule}
[[api_keys]]
key = {key}
tier = {tier}
name = {name}
limits = [{own}]
  [[api_keys.overrides]]
  rule = {override}
  limits = [{limit}]
"""
    right = {
        **{"tier_limit": "9/day", "limit": "1/s", "own": "8/day", "method": "GET", "algorithm": "sliding_window", "name": "n"},
        **{"subject": "api_key", "mode": "enforce", "on_failure": "default"},
    }
    kept = set()
    for field in [*right, "tier", "endpoint", "rule", "key", "override"]:
        for number, value in enumerate(_values()):
            new = {
                **{"tier": f"p-{field}-{number}", "endpoint": f"/p/{number}", "rule": f"rule {number}"},
                **{"key": f"a-key-of-the-policy-{field}-{number}", "override": f"rule {number}"},
            }
            texts = {**right, **new, field: value}
            if field == "rule":
                texts["override"] = value
            body = template.format(**{name: _toml(text) for name, text in texts.items()}).encode()
            answer = await sender.send(Request("post", "/policy", {}, {}, {}, body))
            told = f"{field} {value[:20]!r} {answer}"
            if value in (*BROKEN, *LONG):
                assert answer.status == 400, told
            else:
                assert answer.status in (200, 400), told
            if field == "name" and answer.status == 200:
                kept.add(value)
        dry = await sender.send(Request("post", "/policy", {}, {"dry_run": "true"}, {}, body))
        assert dry.status in (200, 400)
    assert kept >= set(STORABLE)
    assert sender.made["tier"] > 5
    await _settled(sender, before)


async def test_endpoints_too_long_to_name_their_rule_by(admin: Admin) -> None:
    await admin.tier()
    long = "/" + "a" * 300
    body = {"tier": "free", "endpoint": long, "limits": ["1/s"]}
    refused = await admin.http.post("/rate-limit-rules", json=body)
    assert refused.status_code == 400
    assert "needs a 'name'" in refused.json()["error"]["message"]
    many = [f"METHOD-{number}-{'M' * 15}" for number in range(20)]
    assert (await admin.http.post("/rate-limit-rules", json={**body, "endpoint": "/", "methods": many})).status_code == 400
    made = await admin.http.post("/rate-limit-rules", json={**body, "name": "long one"})
    assert made.status_code == 201
    path = f"/rate-limit-rules/{made.json()['id']}"
    changed = await admin.http.patch(path, json={"priority": 2}, headers={"If-Match": "*"})
    assert (changed.json()["name"], changed.json()["priority"]) == ("long one", 2)
    assert (await admin.http.patch(path, json={"name": None}, headers={"If-Match": "*"})).status_code == 400
    assert (await admin.http.get(path)).json()["revision"] == 2


async def test_times_at_the_ends_of_time(admin: Admin) -> None:
    """With its offset, a moment that can be written lies in a year that cannot."""
    await admin.tier()
    for beyond in ("9999-12-31T23:59:59-23:59", "0001-01-01T00:00:00+23:59"):
        for path, body in (("/api-keys", {"tier": "free"}), ("/tokens", {"name": "n"})):
            answer = await admin.http.post(path, json={**body, "expires_at": beyond})
            assert answer.status_code == 400
            assert "expires_at" in answer.json()["error"]["message"]
        for name in ("since", "until"):
            answer = await admin.http.get("/violations", params={name: beyond})
            assert answer.status_code == 400
            assert name in answer.json()["error"]["message"]
        policy = f'[[tiers]]\nname = "free"\n[[api_keys]]\nkey = "a-key-of-the-policy"\ntier = "free"\nexpires_at = {beyond}\n'
        answer = await admin.http.post("/policy", content=policy)
        assert answer.status_code == 400
        assert "years 1 to 9999" in answer.json()["error"]["message"]
    last = "9999-12-31T23:59:59.999999Z"
    made = await admin.http.post("/api-keys", json={"tier": "free", "expires_at": last})
    assert made.json()["expires_at"] == last
    assert (await admin.http.get("/violations", params={"since": "0001-01-01T00:00:00Z", "until": last})).status_code == 200
    assert len((await admin.http.get("/api-keys")).json()["items"]) == 1
