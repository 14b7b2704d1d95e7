"""One table of cases through the library, the middleware, `POST /v1/check`, `GET /v1/authorize` and Envoy's rate limit
service. All give the same answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

import httpx
import pytest

from tests.cases.doors import CASES, Answer, Ask
from tests.integration.ratelimit_client import headers as rls_headers
from tests.integration.ratelimit_client import request
from tidegate.decision import Check
from tidegate.doors.asgi import RateLimitMiddleware
from tidegate.doors.grpc.messages import OK, OVER_LIMIT, RateLimitResponse
from tidegate.doors.grpc.service import RateLimitService
from tidegate.doors.http import DataPlane
from tidegate.doors.responses import decision_body
from tidegate.errors import TidegateError
from tidegate.gate.gate import Gate
from tidegate.settings import EnvoySettings

_FIELDS = ("limit", "remaining", "rule", "tier")


def _of_body(status: int, body: dict[str, Any]) -> Answer:
    if "error" in body and body["error"]["code"] != "RATE_LIMIT_EXCEEDED":
        return Answer(status, code=body["error"]["code"])
    decision = body["error"]["details"] if "error" in body else body
    return Answer(status, *(decision[field] for field in _FIELDS))


def _of_headers(response: httpx.Response, expected: Answer) -> Answer:
    """Doors without a body say numbers only; rule and tier are taken as expected."""
    code = response.headers.get("x-tidegate-error")
    if code is not None:
        return Answer(response.status_code, code=code)
    status = 200 if response.status_code == 204 else response.status_code
    limit, remaining = (response.headers.get(f"x-ratelimit-{name}") for name in ("limit", "remaining"))
    return Answer(status, limit and int(limit), remaining and int(remaining), expected.rule, expected.tier)


@pytest.mark.parametrize("name", CASES)
async def test_library(name: str, gate: Gate) -> None:
    for number, (ask, expected) in enumerate(CASES[name]):
        try:
            decision = await gate.check(Check.of(ask.path, ask.method, ask.api_key, ask.ip, ask.cost))
            body = decision_body(decision)
            answer = Answer(200 if decision.allowed else 429, *(getattr(body, field) for field in _FIELDS))
        except TidegateError as error:
            answer = Answer(error.status, code=error.code)
        assert answer == expected, f"step {number}: {ask}"


@pytest.mark.parametrize("name", CASES)
async def test_http_check(name: str, gate: Gate, listen: Callable[..., Any]) -> None:
    async with httpx.AsyncClient(base_url=await listen(DataPlane(gate, {}))) as client:
        for number, (ask, expected) in enumerate(CASES[name]):
            sent = {"path": ask.path, "method": ask.method, "api_key": ask.api_key, "ip": ask.ip, "cost": ask.cost}
            response = await client.post("/v1/check", json=sent)
            assert _of_body(response.status_code, response.json()) == expected, f"step {number}: {ask}"
            assert ("ratelimit" in response.headers) == (expected.limit is not None)
            assert ("retry-after" in response.headers) == (response.json().get("retry_after") not in (None, 0))


@pytest.mark.parametrize("name", CASES)
async def test_http_batch(name: str, gate: Gate, listen: Callable[..., Any]) -> None:
    steps = CASES[name]
    async with httpx.AsyncClient(base_url=await listen(DataPlane(gate, {}))) as client:
        checks = [
            {"path": ask.path, "method": ask.method, "api_key": ask.api_key, "ip": ask.ip, "cost": ask.cost} for ask, _ in steps
        ]
        response = await client.post("/v1/check/batch", json={"checks": checks})
        assert response.status_code == 200
        answers = []
        for decision, (_, expected) in zip(response.json()["decisions"], steps, strict=True):
            status = expected.status if "error" in decision else 200 if decision["allowed"] else 429
            answers.append(_of_body(status, decision))
        assert answers == [expected for _, expected in steps]


@pytest.mark.parametrize("name", CASES)
async def test_http_authorize(name: str, gate: Gate, listen: Callable[..., Any]) -> None:
    async with httpx.AsyncClient(base_url=await listen(DataPlane(gate, {}))) as client:
        for number, (ask, expected) in enumerate(CASES[name]):
            if ask.cost != 1:
                pytest.skip("/v1/authorize has no cost: every request counts as one")
            headers = {"X-Original-URI": ask.path, "X-Original-Method": ask.method, "X-Real-IP": ask.ip}
            if ask.api_key is not None:
                headers["X-API-Key"] = ask.api_key
            response = await client.request("HEAD" if number % 2 else "GET", "/v1/authorize", headers=headers)
            assert _of_headers(response, expected) == expected, f"step {number}: {ask}"
            assert response.content == b"" or response.status_code == 400


@pytest.mark.parametrize("name", CASES)
async def test_middleware(name: str, gate: Gate) -> None:
    reached: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-app", b"1")]})
        await send({"type": "http.response.body", "body": b"{}"})

    def cost(scope: Any) -> int:
        return int(dict(scope["headers"]).get(b"x-cost", b"1"))

    limited = RateLimitMiddleware(app, gate=gate, trusted_proxies=["127.0.0.0/8"], cost=cost)
    for number, (ask, expected) in enumerate(CASES[name]):
        reached.clear()
        headers = {"X-Real-IP": ask.ip, "X-Cost": str(ask.cost)}
        if ask.api_key is not None:
            headers["X-API-Key"] = ask.api_key
        response = await _call(limited, ask, headers)
        answer = _of_headers(response, expected)
        if response.status_code == 429:
            answer = _of_body(429, response.json())
        assert answer == expected, f"step {number}: {ask}"
        assert bool(reached) == (expected.status == 200)
        assert ("x-app" in response.headers) == (expected.status == 200)


@pytest.mark.parametrize("name", CASES)
async def test_grpc(name: str, gate: Gate) -> None:
    service = RateLimitService(gate, EnvoySettings())
    for number, (ask, expected) in enumerate(CASES[name]):
        entries = [("path", ask.path), ("method", ask.method), ("remote_address", ask.ip)]
        if ask.api_key is not None:
            entries.append(("api_key", ask.api_key))
        sent = request(entries, own_hits=[ask.cost])
        response = RateLimitResponse.FromString(await service.answer(sent.SerializeToString()))
        headers, status = rls_headers(response), response.statuses[0]
        # A look where nothing is left says so, and every refusal is a denial: an error would pass where Envoy fails open.
        passes = expected.status == 200 and not (ask.cost == 0 and expected.remaining == 0)
        assert response.overall_code == status.code == (OK if passes else OVER_LIMIT), f"step {number}: {ask}"
        assert headers.get("x-tidegate-error") == expected.code
        if expected.limit is not None:
            assert (headers["x-ratelimit-limit"], status.limit_remaining) == (str(expected.limit), expected.remaining)
            assert status.current_limit.name == (expected.rule or "")
        assert bool(response.raw_body) != passes


async def _call(app: Any, ask: Ask, headers: dict[str, str]) -> httpx.Response:
    """Call an ASGI app with a path exactly as it was sent; HTTP clients would tidy it up."""
    path, _, query = ask.path.partition("?")
    scope = {
        "type": "http",
        "method": ask.method,
        "path": unquote(path),
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        "client": ("127.0.0.1", 1),
    }
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    body = b"".join(message.get("body", b"") for message in sent)
    return httpx.Response(sent[0]["status"], headers=sent[0]["headers"], content=body)


async def test_retry_after_is_a_wait_that_suffices(gate: Gate, clock: Any, listen: Callable[..., Any]) -> None:
    ask = {"path": "/api/v1/a", "api_key": "demo-free-key-0001"}
    async with httpx.AsyncClient(base_url=await listen(DataPlane(gate, {}))) as client:
        while (response := await client.post("/v1/check", json=ask)).status_code == 200:
            pass
        exact = response.json()["retry_after"]
        clock.advance(exact - 0.000001)
        assert (await client.post("/v1/check", json=ask)).status_code == 429
        clock.advance(0.000001)
        assert (await client.post("/v1/check", json=ask)).status_code == 200
        assert float(response.headers["retry-after"]) >= exact


async def test_headers_follow_the_draft(gate: Gate, listen: Callable[..., Any]) -> None:
    async with httpx.AsyncClient(base_url=await listen(DataPlane(gate, {}))) as client:
        headers = {"X-API-Key": "demo-free-key-0001", "X-Original-URI": "/api/v1/a"}
        response = await client.get("/v1/authorize", headers=headers)
    assert response.status_code == 204
    assert response.headers["ratelimit-policy"] == '"3/minute";q=3;w=60, "50/day";q=50;w=86400, "tier 20/day";q=20;w=86400'
    # 20 s into the minute: one unit fades 40 s + 1 µs later.
    assert response.headers["ratelimit"] == '"3/minute";r=2;t=41'
    assert response.headers["x-ratelimit-reset"] == str(1_700_000_041)
    assert "retry-after" not in response.headers
