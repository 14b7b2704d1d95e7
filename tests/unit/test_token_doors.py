"""Verified bearer tokens at the doors other than `/v1/authorize`: bodies of checks, usage, the middleware, the client."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.rsgi import call
from tests.unit.test_token_attributes import STRANGER, app, data_plane, token
from tidegate.client.bodies import check_body
from tidegate.client.replies import _error, _ErrorBody, _ErrorFields
from tidegate.decision import Check
from tidegate.doors.asgi import RateLimitMiddleware
from tidegate.doors.http import MAX_CHECK_BYTES, DataPlane
from tidegate.doors.http_exchange import PlainRequest
from tidegate.doors.http_requests import MAX_HEADER_BYTES
from tidegate.doors.plain_requests import plain_check
from tidegate.errors import BadRequest, InvalidToken, TokenKeysUnavailable, TooManyTokens
from tidegate.wire import CheckRequest

__all__ = ["app"]

IP = "203.0.113.7"


async def check(app: DataPlane, path: str = "/v1/check", /, **body: Any) -> tuple[int, Any]:
    answer = await call(app, path, method="POST", body=json.dumps(body).encode())
    return answer.status, json.loads(answer.body)


async def test_a_check_with_a_token_in_its_body(app: DataPlane) -> None:
    assert [(await check(app, path="/a", ip=IP, bearer=token()))[0] for _ in range(3)] == [200, 200, 429]
    status, body = await check(app, path="/a", ip=IP, bearer=f"Bearer {token(sub='user-2')}")
    assert (status, body["tier"], body["remaining"]) == (200, "pro", 1)
    # A verified claim takes precedence; other attributes stay.
    sent = {"user": "user-9", "region": "eu"}
    status, body = await check(app, path="/a", ip=IP, bearer=token(sub="user-3"), attributes=sent)
    assert (status, body["limit"], body["remaining"]) == (200, 3, 2)
    usage = json.loads((await call(app, "/v1/usage", [("Authorization", f"Bearer {token(sub='user-3')}".encode())])).body)
    assert (usage["tier"], usage["rules"][0]["subject"]) == ("pro", "user")
    for empty in (None, ""):
        assert (await check(app, path="/a", ip="198.51.100.1" if empty is None else IP, bearer=empty))[1]["tier"] == "public"


@pytest.mark.parametrize(
    ("bearer", "failed"),
    [
        (token(STRANGER), "signature"),
        (token(exp=1), "exp"),
        (token(nbf=2**32), "nbf"),
        (token(aud="other"), "aud"),
        ("x" * 100 * 512, "size"),
        ("a.b.c", "form"),
        ("é.é.é", "form"),
        ("\0", "form"),
    ],
    ids=["signature", "expired", "not yet valid", "audience", "50 KB", "no JSON", "not ASCII", "NUL"],
)
async def test_a_token_that_fails_in_a_body_is_401_and_charges_nothing(app: DataPlane, bearer: str, failed: str) -> None:
    status, body = await check(app, path="/a", ip=IP, bearer=bearer)
    assert (status, body["error"]["code"], body["error"]["details"]["check"]) == (401, "INVALID_TOKEN", failed)
    assert bearer[:40] not in json.dumps(body)
    assert [(await check(app, path="/a", ip=IP))[0] for _ in range(2)] == [200, 429]


async def test_a_token_of_100_kb_is_refused_unread_and_charges_nothing(app: DataPlane) -> None:
    large = "e" * 100 * 1024
    status, body = await check(app, path="/a", ip=IP, bearer=large)
    assert (status, body["error"]["code"]) == (413, "PAYLOAD_TOO_LARGE")
    sent = [("X-Original-URI", b"/a"), ("Authorization", f"Bearer {large}".encode())]
    answer = await call(app, "/v1/authorize", sent)
    assert (answer.status, answer.headers["x-tidegate-error"]) == (431, "HEADERS_TOO_LARGE")
    assert app._gate.tokens.counts == (0, 0), "no token was looked at"
    assert [(await check(app, path="/a", ip=IP))[0] for _ in range(2)] == [200, 429]


async def test_a_bearer_of_the_wrong_type_or_without_jwt_in_the_policy_is_400(app: DataPlane) -> None:
    status, body = await check(app, path="/a", bearer=7)
    assert (status, body["error"]["code"]) == (400, "BAD_REQUEST")
    many = {f"a{number}": "x" for number in range(15)}
    status, body = await check(app, path="/a", bearer=token(), attributes=many)
    assert (status, body["error"]["details"]["field"]) == (400, "attributes")
    from tidegate.catalog.cached import CachedCatalog
    from tidegate.catalog.in_memory import PolicyCatalog
    from tidegate.counters.memory import MemoryCounters
    from tidegate.gate.gate import Gate
    from tidegate.policy.toml_reader import parse_policy

    plain = DataPlane(
        Gate(CachedCatalog(PolicyCatalog(parse_policy('[[tiers]]\nname = "a"\n[anonymous]\ntier = "a"'))), MemoryCounters()), {}
    )
    status, body = await check(plain, path="/a", bearer=token())
    assert (status, body["error"]["details"]["field"]) == (400, "bearer")


async def test_tokens_of_a_batch_fail_one_by_one(app: DataPlane) -> None:
    checks = [{"path": "/a", "ip": IP, "bearer": each} for each in (token(), token(STRANGER), token(sub="user-2"))]
    status, body = await check(app, "/v1/check/batch", checks=[*checks, {"path": "/a", "ip": IP}])
    assert status == 200
    assert [each.get("tier") or each["error"]["code"] for each in body["decisions"]] == ["pro", "INVALID_TOKEN", "pro", "public"]


def plain(body: dict[str, Any]) -> PlainRequest:
    return cast("PlainRequest", SimpleNamespace(values={}, body=json.dumps(body).encode(), head_bytes=100, repeats=False))


async def test_the_reader_of_plain_checks_agrees(app: DataPlane) -> None:
    gate = app._gate

    def read(**body: Any) -> Check | None:
        return plain_check(plain(body), MAX_HEADER_BYTES, MAX_CHECK_BYTES, gate)

    valid = token()
    assert read(path="/a", bearer=valid) is None, "the policy is not loaded yet"
    assert (await check(app, path="/a", ip=IP, bearer=valid))[0] == 200
    claims = {"user": "user-1", "plan": "pro"}
    assert read(path="/a", ip=IP, bearer=valid) == Check("/a", ip=IP, attributes=claims)
    both = read(path="/a", bearer=valid, attributes={"user": "9", "org": "acme"})
    assert both == Check("/a", attributes={**claims, "org": "acme"})
    assert read(path="/a", bearer="") == Check("/a")
    for unknown in (token(sub="other"), f"Bearer {valid}", "é", valid + "x"):
        assert read(path="/a", bearer=unknown) is None
    assert read(path="/a", bearer=valid, attributes={f"a{number}": "x" for number in range(15)}) is None


async def test_the_middleware_verifies_tokens(tmp_path: Path) -> None:
    gate = data_plane(tmp_path)._gate
    served = []

    async def inner(_scope: Any, _receive: Any, send: Any) -> None:
        served.append(1)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def status(app: RateLimitMiddleware, *headers: tuple[bytes, bytes]) -> int:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "GET", "path": "/a", "headers": list(headers), "client": (IP, 1)}
        await app(scope, cast("Any", None), send)
        return int(sent[0]["status"])

    app = RateLimitMiddleware(inner, gate=gate)
    bearer = (b"authorization", f"Bearer {token()}".encode())
    assert [await status(app, bearer) for _ in range(3)] == [200, 200, 429]
    assert await status(app, (b"authorization", f"Bearer {token(STRANGER)}".encode())) == 401
    assert await status(app, bearer, bearer) == 400
    assert len(served) == 2
    # A function's attributes come second to claims, and add to them.
    named = RateLimitMiddleware(inner, gate=gate, attributes=lambda _scope: {"user": "9", "region": "eu"})
    other = (b"authorization", f"Bearer {token(sub='user-4')}".encode())
    assert [await status(named, other) for _ in range(4)] == [200, 200, 200, 429]
    await gate.close()


def test_the_client_sends_tokens_and_raises_the_servers_errors() -> None:
    assert json.loads(check_body(Check.of("/a"), "e.y.J"))["bearer"] == "e.y.J"
    assert b"bearer" not in check_body(Check.of("/a"))
    assert CheckRequest("/a").bearer is None
    with pytest.raises(BadRequest, match="no JSON Web Token has"):
        check_body(Check.of("/a"), "é")
    for kind in (InvalidToken, TooManyTokens, TokenKeysUnavailable):
        assert isinstance(_error(_ErrorBody(_ErrorFields(kind.code, "why"))), kind)
