"""Header values with bytes above 0x7F, in every header that a decision depends on, at every door.

A value that cannot be read is refused, never skipped: what would be read in its place may be the client's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tests.cases.doors import FREE
from tests.integration.ratelimit_client import headers as rls_headers
from tests.integration.ratelimit_client import request
from tests.raw_http import RawAnswer, exchange
from tests.rsgi import call
from tidegate.decision import Check
from tidegate.doors.asgi import RateLimitMiddleware
from tidegate.doors.grpc.messages import OVER_LIMIT, RateLimitResponse
from tidegate.doors.grpc.service import RateLimitService
from tidegate.doors.http import DataPlane
from tidegate.gate.gate import Gate
from tidegate.observation import Observation
from tidegate.settings import EnvoySettings

KEY = ("X-API-Key", FREE.encode())
PATH = ("X-Original-URI", b"/api/v1/a")
LOGIN = [KEY, ("X-Original-URI", b"/login"), ("X-Original-Method", b"POST")]

Pairs = Sequence[tuple[str, bytes]]
REFUSED: dict[str, tuple[str, Pairs]] = {
    # What would be decided without the refusal stands behind each.
    "path, then another path": ("/v1/authorize", [KEY, ("X-Original-URI", b"/api/\xe9"), ("X-Forwarded-Uri", b"/free")]),
    "forwarded path": ("/v1/authorize", [KEY, ("X-Forwarded-Uri", b"/api/\xff")]),
    "path for Envoy": ("/v1/authorize/envoy", [KEY, ("X-Original-URI", b"/api/\xe9"), ("X-Forwarded-Uri", b"/free")]),
    "method, then GET": ("/v1/authorize", [KEY, PATH, ("X-Original-Method", b"PO\xc3\x9fT")]),
    "method, then another": ("/v1/authorize", [KEY, PATH, ("X-Original-Method", b"\xff"), ("X-Forwarded-Method", b"GET")]),
    "forwarded method": ("/v1/authorize", [KEY, PATH, ("X-Forwarded-Method", b"PO\xffST")]),
    "key, then anonymous": ("/v1/authorize", [("X-API-Key", b"k\xc3\xa9y-with-an-accent"), PATH, ("X-Real-IP", b"192.0.2.1")]),
    "key, not UTF-8": ("/v1/authorize", [("X-API-Key", FREE.encode() + b"\xff"), PATH, ("X-Real-IP", b"192.0.2.1")]),
    "real ip, then the forwarded one": ("/v1/authorize", [*LOGIN, ("X-Real-IP", b"\xff"), ("X-Forwarded-For", b"192.0.2.1")]),
    "real ip, then the peer": ("/v1/authorize", [*LOGIN, ("X-Real-IP", b"192.0.2.1\xc2\xa0")]),
    "forwarded for, then the peer": ("/v1/authorize", [*LOGIN, ("X-Forwarded-For", b"\xe9, 192.0.2.1")]),
    "key of usage": ("/v1/usage", [("X-API-Key", b"\xc3\xa9" * 10), ("X-Real-IP", b"192.0.2.1")]),
    "real ip of usage": ("/v1/usage", [KEY, ("X-Real-IP", b"\xff")]),
    "forwarded for of usage": ("/v1/usage", [KEY, ("X-Forwarded-For", b"\xff")]),
    "key of a check": ("/v1/check", [("X-API-Key", b"\xff")]),
    "key of a batch": ("/v1/check/batch", [("X-API-Key", b"\xff")]),
}
BODIES = {
    "/v1/check": b'{"path":"/api/v1/a","ip":"192.0.2.1"}',
    "/v1/check/batch": b'{"checks":[{"path":"/api/v1/a","ip":"192.0.2.1"}]}',
}


@pytest.fixture(params=["server", "no server"])
async def ask(request: pytest.FixtureRequest, gate: Gate, seen: list[Observation], listen: Callable[..., Any]) -> Any:
    """Sends a request to the data plane: through its HTTP server, and as values that nothing was left out of."""
    data_plane = DataPlane(gate, {}, seen.append)

    async def in_process(path: str, pairs: Pairs) -> RawAnswer:
        body = BODIES.get(path, b"")
        return await call(data_plane, path, pairs, "POST" if body else "GET", body)

    if request.param == "no server":
        return in_process
    port = int((await listen(data_plane)).rpartition(":")[2])

    async def over_http(path: str, pairs: Pairs) -> RawAnswer:
        body = BODIES.get(path, b"")
        lines = [b"%b %b HTTP/1.1" % (b"POST" if body else b"GET", path.encode()), b"Host: x", b"Connection: close"]
        lines += [name.encode() + b": " + value for name, value in pairs]
        lines.append(b"Content-Length: %d" % len(body))
        return (await asyncio.to_thread(exchange, port, b"\r\n".join([*lines, b"", body])))[0]

    return over_http


@pytest.mark.parametrize("name", REFUSED)
async def test_a_value_that_cannot_be_read_is_rejected(name: str, ask: Any, gate: Gate, seen: list[Observation]) -> None:
    path, pairs = REFUSED[name]
    answer = await ask(path, pairs)
    assert (answer.status, answer.json()["error"]["code"]) == (400, "BAD_REQUEST")
    assert FREE not in answer.json()["error"]["message"], "keys are not repeated"
    assert [each.error for each in seen] == ["BAD_REQUEST"]
    decision = await gate.check(Check.of("/api/v1/a", api_key=FREE, cost=0))
    assert decision.remaining == decision.limit, "nothing was charged"


async def test_two_values_of_which_one_cannot_be_read(gate: Gate) -> None:
    for name, good in (("X-API-Key", FREE.encode()), ("X-Original-URI", b"/api/v1/a")):
        pairs = [pair for pair in (KEY, PATH) if pair[0] != name]
        answer = await call(DataPlane(gate, {}), "/v1/authorize", [*pairs, (name, good), (name, b"\xff")])
        assert answer.status == 400


async def test_raw_utf_8_in_a_path_is_the_path_of_its_escapes(gate: Gate) -> None:
    data_plane = DataPlane(gate, {})
    for raw, left in ((b"/api/v1/caf\xc3\xa9", "2"), (b"/api/v1/caf%C3%A9?q=\xc3\xa9", "1")):
        answer = await call(data_plane, "/v1/authorize", [KEY, ("X-Original-URI", raw)])
        assert (answer.status, answer.headers["x-ratelimit-remaining"]) == (204, left)


async def test_other_headers_may_have_any_bytes(ask: Any) -> None:
    answer = await ask("/v1/authorize", [KEY, PATH, ("Referer", b"/caf\xc3\xa9"), ("User-Agent", b"\xff\xfe")])
    assert answer.status == 204


async def test_8_kb_of_headers_are_counted_in_bytes(gate: Gate) -> None:
    data_plane = DataPlane(gate, {})
    for value, status in (
        (b"x" * 7500, 204),
        (b"x" * 8300, 431),
        ("é".encode() * 3750, 204),
        ("é".encode() * 4150, 431),
        ("😀".encode() * 1900, 204),
        ("😀".encode() * 2050, 431),
        (b"\xff" * 7500, 204),
        (b"\xff" * 8300, 431),
    ):
        answer = await call(data_plane, "/v1/authorize", [KEY, ("X-Original-URI", b"/free"), ("X-Filler", value)])
        assert answer.status == status, value[:8]


async def _through_middleware(gate: Gate, path: bytes, pairs: Pairs, raw_path: bool = True) -> list[Any]:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "GET",
        "path": path.decode("utf-8", "surrogateescape"),
        "headers": [(name.lower().encode(), value) for name, value in pairs],
        "client": ("127.0.0.1", 1),
    }
    if raw_path:
        scope["raw_path"] = path
    limited = RateLimitMiddleware(app, gate=gate, trusted_proxies=["127.0.0.0/8"])
    await limited(scope, None, send)  # type: ignore[arg-type]
    return sent


@pytest.mark.parametrize(
    ("path", "pairs"),
    [
        (b"/api/v1/a", [("X-API-Key", b"k\xc3\xa9y-with-an-accent"), ("X-Real-IP", b"192.0.2.1")]),
        (b"/api/v1/a", [KEY, ("X-API-Key", b"\xff")]),
        (b"/login", [KEY, ("X-Real-IP", b"\xff"), ("X-Forwarded-For", b"192.0.2.1")]),
        (b"/login", [KEY, ("X-Forwarded-For", b"\xe9, 192.0.2.1")]),
        (b"/api/v1/\xff", [KEY]),
    ],
)
async def test_the_middleware_rejects_it_too(path: bytes, pairs: Pairs, gate: Gate) -> None:
    start, body = await _through_middleware(gate, path, pairs)
    assert start["status"] == 400, body


@pytest.mark.parametrize("raw_path", [True, False])
async def test_the_middleware_reads_raw_utf_8_in_a_path(raw_path: bool, gate: Gate) -> None:
    start, *_ = await _through_middleware(gate, "/api/v1/café".encode(), [KEY], raw_path)
    assert (start["status"], dict(start["headers"])[b"x-ratelimit-remaining"]) == (200, b"2")
    start, *_ = await _through_middleware(gate, b"/api/v1/\xff", [KEY], raw_path)
    assert start["status"] == (400 if raw_path else 200)


@pytest.mark.parametrize(
    ("entry", "code"), [("path", "BAD_REQUEST"), ("method", "BAD_REQUEST"), ("remote_address", "BAD_REQUEST"),
                        ("api_key", "INVALID_API_KEY")],
)  # fmt: skip
async def test_grpc_denies_it(entry: str, code: str, gate: Gate) -> None:
    entries = {"path": b"/login", "method": b"POST", "remote_address": b"192.0.2.1", "api_key": FREE.encode()}
    sent = request(list({**entries, entry: entries[entry] + b"\xff"}.items()))
    answer = RateLimitResponse.FromString(await RateLimitService(gate, EnvoySettings()).answer(sent.SerializeToString()))
    assert (answer.overall_code, rls_headers(answer)["x-tidegate-error"]) == (OVER_LIMIT, code)
