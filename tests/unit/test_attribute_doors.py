"""Attributes through every door: the body of a check, headers of trusted proxies, descriptors, the middleware, usage."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.conftest import Clock
from tests.integration.ratelimit_client import headers as headers_of
from tests.integration.ratelimit_client import request
from tests.raw_http import RawAnswer
from tests.rsgi import call
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.client.bodies import check_body, usage_query
from tidegate.counters.memory import MemoryCounters
from tidegate.decision import Check
from tidegate.doors.asgi import RateLimitMiddleware
from tidegate.doors.grpc.messages import OK, OVER_LIMIT, RateLimitResponse
from tidegate.doors.grpc.service import RateLimitService
from tidegate.doors.http import DataPlane
from tidegate.errors import BadRequest
from tidegate.gate.gate import Gate
from tidegate.observation import Observation
from tidegate.policy.toml_reader import parse_policy
from tidegate.settings import EnvoySettings
from tidegate.wire import CheckRequest

KEY = "demo-free-key-0001"
POLICY = f"""
[attributes]
user = "header:X-User-Id"
org  = "header:X-Org"
plan = "header:X-Plan"
[callers]
tier_from = "plan"
default_tier = "public"
[[tiers]]
name = "public"
  [[tiers.rules]]
  endpoint = "/*"
  subject = "user"
  limits = ["2/day"]
  [[tiers.rules]]
  endpoint = "/both"
  subject = ["org", "user"]
  on_missing = "deny"
  limits = ["2/day"]
[[tiers]]
name = "pro"
  [[tiers.rules]]
  endpoint = "/*"
  subject = "user"
  limits = ["100/day"]
  [[tiers.rules]]
  endpoint = "/*"
  subject = "user"
  match = {{ org = "big-*" }}
  limits = ["900/day"]
  name = "big"
[[api_keys]]
key = "{KEY}"
tier = "pro"
"""


@pytest.fixture
def gate(clock: Clock, seen: list[Observation]) -> Gate:
    return Gate(CachedCatalog(PolicyCatalog(parse_policy(POLICY))), MemoryCounters(clock=clock), seen.append)


@pytest.fixture
def app(gate: Gate, seen: list[Observation]) -> DataPlane:
    return DataPlane(gate, {}, seen.append)


async def check(app: DataPlane, path: str = "/v1/check", /, **body: Any) -> Any:
    answer = await call(app, path, method="POST", body=json.dumps(body).encode())
    return answer.status, json.loads(answer.body)


async def test_the_body_of_a_check(app: DataPlane) -> None:
    sent = {"path": "/x", "attributes": {"user": "42", "org": None}, "ip": "203.0.113.7"}
    assert [(await check(app, **sent))[0] for _ in range(3)] == [200, 200, 429]
    assert (await check(app, **{**sent, "attributes": {"user": "43"}}))[1]["remaining"] == 1
    status, body = await check(app, **{**sent, "tier": "pro"})
    assert (status, body["tier"], body["limit"]) == (200, "pro", 100)
    status, body = await check(app, path="/x", attributes={"user": "1", "plan": "pro", "org": "big-1"})
    assert (body["tier"], body["rule"], body["remaining"]) == ("pro", "big", 899)
    for wrong, said in (
        ({"attributes": {"user": "x" * 257}}, "257 characters"),
        ({"attributes": {"User": "x"}}, "lower-case"),
        ({"attributes": {"user": 42}}, "not a check"),
        ({"attributes": [["user", "42"]]}, "not a check"),
        ({"attributes": {f"a{number}": "x" for number in range(17)}}, "at most 16"),
        ({"tier": "gold"}, "there is no tier 'gold'"),
        ({"tier": "pro", "api_key": KEY}, "tier and api_key came together"),
        ({"path": "/both", "attributes": {"user": "42"}}, "'org' is missing"),
    ):
        status, body = await check(app, **{**sent, **wrong})
        assert (status, body["error"]["code"]) == (400, "BAD_REQUEST")
        assert said in body["error"]["message"]


async def test_a_batch(app: DataPlane) -> None:
    one = {"path": "/both", "attributes": {"user": "42", "org": "a"}}
    other = {**one, "attributes": {"user": "42"}}
    status, body = await check(app, "/v1/check/batch", checks=[one, other, one, one, {**one, "tier": "pro", "path": "/x"}])
    assert status == 200
    assert [each.get("allowed", each.get("error", {}).get("code")) for each in body["decisions"]] == [
        True,
        "BAD_REQUEST",
        True,
        False,
        True,
    ]


async def authorize(app: DataPlane, *headers: tuple[str, bytes], path: str = "/v1/authorize", **fields: Any) -> RawAnswer:
    return await call(app, path, [("X-Original-URI", b"/x"), ("X-Real-IP", b"203.0.113.7"), *headers], **fields)


async def test_headers_of_a_trusted_proxy(app: DataPlane, seen: list[Observation]) -> None:
    assert [(await authorize(app, ("X-User-Id", b"42"))).status for _ in range(3)] == [204, 204, 429]
    assert seen[-1].subject == "a:user=42"
    pro = await authorize(app, ("X-User-Id", b"42"), ("X-Plan", b"pro"))
    assert (pro.status, pro.headers["x-ratelimit-limit"]) == (204, "100")
    assert (await authorize(app, ("X-User-Id", b"7"), path="/v1/authorize/envoy")).status == 200
    assert seen[-1].subject == "a:user=7"
    # An empty header is none.
    await authorize(app, ("X-User-Id", b""))
    assert seen[-1].subject == "i:203.0.113.7"


async def test_headers_of_anybody_else_are_not_believed(app: DataPlane, seen: list[Observation]) -> None:
    for _ in range(2):
        forged = await authorize(app, ("X-User-Id", b"42"), ("X-Plan", b"pro"), client="198.51.100.9:1")
        assert (forged.status, forged.headers["x-ratelimit-limit"]) == (204, "2")
        assert seen[-1].subject == "i:198.51.100.9"


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ([("X-User-Id", b"1"), ("x-user-id", b"2")], "2 x-user-id headers came: send one"),
        ([("X-User-Id", "é".encode())], "bytes above 0x7F"),
        ([("X-User-Id", b"x" * 257)], "257 characters: at most 256"),
    ],
)
async def test_headers_that_are_refused(
    headers: list[tuple[str, bytes]], said: str, app: DataPlane, seen: list[Observation]
) -> None:
    answer = await authorize(app, *headers)
    error = json.loads(answer.body)["error"]
    assert (answer.status, error["code"]) == (400, "BAD_REQUEST")
    assert said in error["message"]
    assert [each.decision for each in seen] == [None], "nothing was charged"


async def test_descriptors(gate: Gate) -> None:
    service = RateLimitService(gate, EnvoySettings())

    async def ask(*entries: tuple[str, str]) -> tuple[int, dict[str, str]]:
        sent = request([("path", "/x"), ("remote_address", "203.0.113.7"), *entries])
        response = RateLimitResponse.FromString(await service.answer(sent.SerializeToString()))
        return response.overall_code, headers_of(response)

    assert [(await ask(("user", "42")))[0] for _ in range(3)] == [OK, OK, OVER_LIMIT]
    code, headers = await ask(("user", "42"), ("plan", "pro"), ("User-Agent", "x" * 1000))
    assert (code, headers["x-ratelimit-limit"]) == (OK, "100")
    # An entry that no rule reads may be of any length, one that a rule reads may not.
    assert (await ask(("user", "43"), ("note", "x" * 1000)))[0] == OK
    code, headers = await ask(("user", "x" * 257))
    assert (code, headers["x-tidegate-error"]) == (OVER_LIMIT, "BAD_REQUEST")
    assert (await ask(("user", "44"), ("user", "42"), ("header_match", "a"), ("header_match", "b")))[0] == OK


async def middleware(app: RateLimitMiddleware, *headers: tuple[bytes, bytes], client: str = "203.0.113.9") -> dict[bytes, bytes]:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/x", "headers": headers, "client": (client, 1), "user": "42"}
    await app(scope, None, send)  # type: ignore[arg-type]
    return {b":status": str(sent[0]["status"]).encode(), **dict(sent[0]["headers"])}


async def test_the_middleware(gate: Gate, seen: list[Observation]) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    by_callable = RateLimitMiddleware(app, gate=gate, attributes=lambda scope: {"user": scope["user"], "plan": "pro"})
    answer = await middleware(by_callable, (b"x-user-id", b"7"))
    assert (answer[b":status"], answer[b"x-ratelimit-limit"], seen[-1].subject) == (b"200", b"100", "a:user=42")
    wrong = RateLimitMiddleware(app, gate=gate, attributes=lambda _: {"User": "x"})
    assert (await middleware(wrong))[b":status"] == b"400"
    by_header = RateLimitMiddleware(app, gate=gate, trusted_proxies=["203.0.113.9"])
    await middleware(by_header, (b"X-User-Id", b"7"))
    assert seen[-1].subject == "a:user=7"
    await middleware(by_header, (b"X-User-Id", b"7"), client="198.51.100.1")
    assert seen[-1].subject == "i:198.51.100.1"


async def usage(app: DataPlane, query: str = "", *headers: tuple[str, bytes], client: str = "127.0.0.1:1") -> tuple[int, Any]:
    answer = await call(app, "/v1/usage", headers, query_string=query, client=client)
    return answer.status, json.loads(answer.body)


async def test_usage(app: DataPlane) -> None:
    await check(app, path="/x", attributes={"user": "42"}, cost=2)
    await check(app, path="/x", attributes={"user": "4&2", "org": "big-1"}, tier="pro")

    def left(body: Any) -> dict[str, tuple[str, int]]:
        return {rule["rule"]: (rule["subject"], rule["remaining"]) for rule in body["rules"]}

    status, body = await usage(app, "attribute=user=42")
    assert (status, body["tier"], left(body), body["not_counted"]) == (200, "public", {"/*": ("user", 0)}, ["/both"])
    assert left((await usage(app, "", ("X-User-Id", b"42")))[1]) == {"/*": ("user", 0)}
    assert left((await usage(app, "attribute=user=4%262&attribute=org%3Dbig-1&tier=pro"))[1]) == {
        "/*": ("user", 100),
        "big": ("user", 899),
    }
    await check(app, path="/x", attributes={"user": "a&b=ü %"}, tier="pro", cost=7)
    sent_by_the_client = usage_query({"user": "a&b=ü %"}, "pro").removeprefix("?")
    assert left((await usage(app, sent_by_the_client))[1])["/*"] == ("user", 93)
    assert usage_query({}, None) == ""
    with pytest.raises(BadRequest, match="lone surrogate"):
        usage_query({"user": "\ud800"}, None)
    assert left((await usage(app, "attribute=user=1&attribute=org=2", ("X-Real-IP", b"203.0.113.7")))[1])["/both"] == (
        "org,user",
        2,
    )
    assert left((await usage(app, "", ("X-Real-IP", b"203.0.113.7")))[1]) == {"/*": ("ip", 2)}
    for query, said in (
        ("attribute=user", "malformed"),
        ("attribute=user=1&attribute=user=2", "came twice"),
        ("tier=pro&tier=pro", "tier came twice"),
        ("tier=gold", "there is no tier"),
        ("attribute=User=1", "lower-case"),
        ("attribute=user=%FF", "percent-encode it as UTF-8"),
    ):
        status, body = await usage(app, query)
        assert status == 400
        assert said in body["error"]["message"]
    status, body = await usage(app, "attribute=user=42", client="198.51.100.1:1")
    assert (status, body["error"]["code"]) == (400, "BAD_REQUEST")


async def test_a_reset(gate: Gate, app: DataPlane) -> None:
    for attributes in ({"user": "42"}, {"user": "42", "org": "a&b"}):
        await check(app, path="/x" if len(attributes) == 1 else "/both", attributes=attributes, cost=2)
    assert await gate.reset(subject="org=a%26b&user=42") == 1
    assert (await check(app, path="/both", attributes={"user": "42", "org": "a&b"}))[0] == 200
    assert (await check(app, path="/x", attributes={"user": "42"}))[0] == 429
    assert await gate.reset(subject="a:user=42") == 3, "in every tier"
    assert (await check(app, path="/x", attributes={"user": "42"}))[0] == 200
    await check(app, path="/x", ip="203.0.113.7", cost=2)
    await gate.reset(ip="203.0.113.7")
    assert (await check(app, path="/x", ip="203.0.113.7"))[0] == 200, "those without the attribute count by ip"
    for wrong in ("user", "User=1", "user=1&user=2", "=1", "user=", "tier=pro", ""):
        with pytest.raises(BadRequest):
            await gate.reset(subject=wrong)


def test_what_a_client_sends() -> None:
    """Servers of before attributes refuse fields that they do not know."""
    assert json.loads(check_body(Check.of("/x", api_key=KEY))) == {"path": "/x", "api_key": KEY}
    sent = check_body(Check.of("/x", attributes={"user": "42"}, tier="pro"))
    assert json.loads(sent) == {"path": "/x", "attributes": {"user": "42"}, "tier": "pro"}
    with pytest.raises(BadRequest, match="lone surrogate"):
        check_body(Check.of("/x", attributes={"user": "\ud800"}))
    assert CheckRequest("/x").attributes is None
