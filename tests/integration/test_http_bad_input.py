"""Whatever is sent to the data plane: a 4xx in the error form, nothing charged, never a 500."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.cases.doors import FREE
from tests.moments import PATIENCE_S
from tidegate.decision import Check
from tidegate.doors.http import MAX_BATCH_BYTES, MAX_CHECK_BYTES, DataPlane
from tidegate.gate.gate import Gate
from tidegate.observation import Observation

GOOD = {"path": "/api/v1/a", "api_key": FREE}


def _with(**fields: Any) -> bytes:
    return json.dumps({**GOOD, **fields}).encode()


BAD_CHECKS: dict[str, tuple[bytes, int, str]] = {
    "nothing": (b"", 400, "BAD_REQUEST"),
    "not JSON": (b"hello", 400, "BAD_REQUEST"),
    "half of JSON": (b'{"path":', 400, "BAD_REQUEST"),
    "not UTF-8": (b'{"path":"/\xff"}', 400, "BAD_REQUEST"),
    "a list": (b"[]", 400, "BAD_REQUEST"),
    "null": (b"null", 400, "BAD_REQUEST"),
    "deeply nested": (b'{"path":' + b"[" * 30_000, 400, "BAD_REQUEST"),
    "unknown field": (_with(weight=1), 400, "BAD_REQUEST"),
    "no path": (b"{}", 400, "BAD_REQUEST"),
    "path of another type": (_with(path=7), 400, "BAD_REQUEST"),
    "empty path": (_with(path=""), 400, "BAD_REQUEST"),
    "relative path": (_with(path="api"), 400, "BAD_REQUEST"),
    "absolute form": (_with(path="http://h/api/v1/a"), 400, "BAD_REQUEST"),
    "long path": (_with(path="/" + "a" * 60_000), 400, "BAD_REQUEST"),
    "control character": (_with(path="/api/v1/\x07"), 400, "BAD_REQUEST"),
    "line break": (_with(path="/api/v1/a\r\nX-Evil: 1"), 400, "BAD_REQUEST"),
    "encoded letter": (_with(path="/%61pi/v1/a"), 400, "BAD_REQUEST"),
    "double slash": (_with(path="//api/v1/a"), 400, "BAD_REQUEST"),
    "dot segment": (_with(path="/x/../api/v1/a"), 400, "BAD_REQUEST"),
    "path parameter": (_with(path="/api/v1/a;x=1"), 400, "BAD_REQUEST"),
    "broken escape": (_with(path="/api/v1/%zz"), 400, "BAD_REQUEST"),
    "negative cost": (_with(cost=-1), 400, "BAD_REQUEST"),
    "fractional cost": (_with(cost=1.5), 400, "BAD_REQUEST"),
    "huge whole float": (_with(cost=1e300), 400, "BAD_REQUEST"),
    "null for the path": (_with(path=None), 400, "BAD_REQUEST"),
    "empty method": (_with(method=""), 400, "BAD_REQUEST"),
    "cost as text": (_with(cost="1"), 400, "BAD_REQUEST"),
    "cost as truth": (_with(cost=True), 400, "BAD_REQUEST"),
    "huge cost": (_with(cost=10**30), 400, "BAD_REQUEST"),
    "infinite cost": (b'{"path":"/a","cost":1e999}', 400, "BAD_REQUEST"),
    "method of another type": (_with(method=7), 400, "BAD_REQUEST"),
    "method with a space": (_with(method="GET /"), 400, "BAD_REQUEST"),
    "no address": (_with(ip="example.com"), 400, "BAD_REQUEST"),
    "address out of range": (_with(ip="1.2.3.400"), 400, "BAD_REQUEST"),
    "key of another type": (_with(api_key=1), 400, "BAD_REQUEST"),
    "key with odd characters": (_with(api_key="demo free key 0001"), 401, "INVALID_API_KEY"),
    "long key": (_with(api_key="k" * 5000), 401, "INVALID_API_KEY"),
    "body over 64 KB": (b" " * (MAX_CHECK_BYTES + 1), 413, "PAYLOAD_TOO_LARGE"),
}


async def _nothing_charged(gate: Gate) -> bool:
    decision = await gate.check(Check.of("/api/v1/a", api_key=FREE, cost=0))
    return decision.remaining == decision.limit


@pytest.mark.parametrize("name", BAD_CHECKS)
async def test_bad_check(name: str, gate: Gate, seen: list[Observation], listen: Callable[..., Any]) -> None:
    body, status, code = BAD_CHECKS[name]
    async with httpx.AsyncClient(base_url=await listen(DataPlane(gate, {}, seen.append))) as client:
        response = await client.post("/v1/check", content=body)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert response.json()["error"]["message"]
    assert [each.error for each in seen] == [code], "each refusal is counted once"
    assert await _nothing_charged(gate)


async def test_bad_batches(gate: Gate, listen: Callable[..., Any]) -> None:
    async with httpx.AsyncClient(base_url=await listen(DataPlane(gate, {}))) as client:
        for sent, status in (
            ({"checks": []}, 400),
            ({"checks": [GOOD] * 1001}, 400),
            ({"checks": [GOOD, {"path": 1}]}, 400),
            ({"checks": [GOOD, {**GOOD, "cost": "1"}]}, 400),
            ({"checks": GOOD}, 400),
            ({"check": [GOOD]}, 400),
            ([GOOD], 400),
        ):
            response = await client.post("/v1/check/batch", json=sent)
            assert response.status_code == status
            assert response.json()["error"]["code"] == "BAD_REQUEST"
        response = await client.post("/v1/check/batch", content=b" " * (MAX_BATCH_BYTES + 1))
        assert response.status_code == 413
        assert await _nothing_charged(gate)
        # A check that makes no sense by its values has its own error, and the others are decided.
        mixed = {"checks": [GOOD, {**GOOD, "cost": 0.5}, {**GOOD, "path": "//x"}, GOOD]}
        decisions = (await client.post("/v1/check/batch", json=mixed)).json()["decisions"]
        assert [each.get("remaining") for each in decisions] == [2, None, None, 1]
        assert [each.get("error", {}).get("code") for each in decisions] == [None, "BAD_REQUEST", "BAD_REQUEST", None]


async def test_whole_floats_and_nulls_are_read(gate: Gate, listen: Callable[..., Any]) -> None:
    """As some languages write numbers, and writers that fill in every field."""
    async with httpx.AsyncClient(base_url=await listen(DataPlane(gate, {}))) as client:
        sent = {"path": "/api/v1/a", "api_key": FREE, "ip": None, "method": None, "cost": 1.0}
        assert (await client.post("/v1/check", json=sent)).json()["remaining"] == 2
        batch = {"checks": [{**sent, "cost": None}, {**sent, "cost": 0.0}, {**sent, "cost": -0.0}]}
        decisions = (await client.post("/v1/check/batch", json=batch)).json()["decisions"]
        assert [each["remaining"] for each in decisions] == [1, 1, 1]
        anonymous = {**sent, "api_key": None, "ip": "192.0.2.1"}
        assert (await client.post("/v1/check", json=anonymous)).json()["tier"] == "open"


@pytest.mark.parametrize("door", ["/v1/check", "/v1/check/batch"])
async def test_compressed_bodies_are_415(door: str, gate: Gate, seen: list[Observation], listen: Callable[..., Any]) -> None:
    async with httpx.AsyncClient(base_url=await listen(DataPlane(gate, {}, seen.append))) as client:
        for encoding in ("gzip", "br, gzip", "deflate"):
            response = await client.post(door, content=gzip.compress(_with()), headers={"Content-Encoding": encoding})
            assert (response.status_code, response.json()["error"]["code"]) == (415, "UNSUPPORTED_MEDIA_TYPE")
            assert response.headers["accept-encoding"] == "identity"
            assert encoding in response.json()["error"]["message"]
        assert [each.error for each in seen] == ["UNSUPPORTED_MEDIA_TYPE"] * 3
        body = _with() if door == "/v1/check" else b'{"checks":[' + _with() + b"]}"
        assert (await client.post(door, content=body, headers={"Content-Encoding": "identity"})).status_code == 200


async def test_a_thousand_checks_in_a_batch(gate: Gate, listen: Callable[..., Any]) -> None:
    async with httpx.AsyncClient(base_url=await listen(DataPlane(gate, {}))) as client:
        response = await client.post("/v1/check/batch", json={"checks": [GOOD] * 1000})
    assert sum(each["allowed"] for each in response.json()["decisions"]) == 3


async def test_chunked_body_is_bounded_too(gate: Gate, listen: Callable[..., Any]) -> None:
    async def chunks() -> Any:
        # No more than it takes: a client that is still sending when it is refused may see the connection go before the answer.
        for _ in range(9):
            yield b" " * 8192

    async def small() -> Any:
        yield _with()[:10]
        yield _with()[10:]

    async with httpx.AsyncClient(base_url=await listen(DataPlane(gate, {}))) as client:
        assert (await client.post("/v1/check", content=chunks())).status_code == 413
        assert await _nothing_charged(gate)
        assert (await client.post("/v1/check", content=small())).status_code == 200


@pytest.mark.parametrize("door", ["/v1/check", "/v1/authorize", "/v1/check/batch"])
async def test_two_keys_in_the_headers(door: str, gate: Gate, listen: Callable[..., Any]) -> None:
    headers = [("X-API-Key", FREE), ("X-API-Key", "demo-tight-key-0001"), ("X-Original-URI", "/api/v1/a")]
    bodies = {"/v1/check": {"path": "/a"}, "/v1/check/batch": {"checks": [{"path": "/a"}]}}
    async with httpx.AsyncClient(base_url=await listen(DataPlane(gate, {}))) as client:
        body = bodies.get(door)
        response = await client.request("POST" if body else "GET", door, headers=headers, json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "BAD_REQUEST")
    assert await _nothing_charged(gate)


async def test_key_in_body_and_header(gate: Gate, listen: Callable[..., Any]) -> None:
    async with httpx.AsyncClient(base_url=await listen(DataPlane(gate, {}))) as client:
        differing = await client.post("/v1/check", json=GOOD, headers={"X-API-Key": "demo-tight-key-0001"})
        assert differing.status_code == 400
        same = await client.post("/v1/check", json=GOOD, headers={"X-API-Key": FREE})
        assert same.json()["remaining"] == 2
        header = await client.post("/v1/check", json={"path": "/api/v1/a"}, headers={"X-API-Key": FREE})
        assert header.json()["remaining"] == 1


async def test_headers_over_8_kb(gate: Gate, seen: list[Observation], listen: Callable[..., Any]) -> None:
    headers = {"X-API-Key": FREE, "X-Original-URI": "/api/v1/a", "X-Filler": "f" * 9000}
    async with httpx.AsyncClient(base_url=await listen(DataPlane(gate, {}, seen.append))) as client:
        response = await client.get("/v1/authorize", headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (431, "HEADERS_TOO_LARGE")
        headers["X-Filler"] = "f" * 200_000
        assert (await client.get("/v1/authorize", headers=headers)).status_code == 431
    assert await _nothing_charged(gate)


async def test_other_paths_and_methods(gate: Gate, listen: Callable[..., Any]) -> None:
    async with httpx.AsyncClient(base_url=await listen(DataPlane(gate, {}))) as client:
        for method, path, status, code in (
            ("GET", "/nothing", 404, "NOT_FOUND"),
            ("GET", "/admin/v1/tiers", 404, "NOT_FOUND"),
            ("GET", "/v1/check", 405, "METHOD_NOT_ALLOWED"),
            ("DELETE", "/v1/check/batch", 405, "METHOD_NOT_ALLOWED"),
            ("POST", "/v1/authorize", 405, "METHOD_NOT_ALLOWED"),
        ):
            response = await client.request(method, path)
            assert (response.status_code, response.json()["error"]["code"]) == (status, code)
            assert ("allow" in response.headers) == (status == 405)
        response = await client.get("/v1/authorize", headers={"X-API-Key": FREE})
        assert (response.status_code, response.json()["error"]["code"]) == (400, "BAD_REQUEST")
        assert "X-Original-URI" in response.json()["error"]["message"]


async def test_forwarding_headers_of_untrusted_peers_are_not_believed(gate: Gate, listen: Callable[..., Any]) -> None:
    from tidegate.doors.client_address import TrustedProxies

    url = await listen(DataPlane(gate, {}, trusted=TrustedProxies(["10.0.0.0/8"])))
    async with httpx.AsyncClient(base_url=url) as client:
        spoofed = {"X-API-Key": FREE, "X-Original-URI": "/login", "X-Original-Method": "POST"}
        answers = [
            (await client.get("/v1/authorize", headers={**spoofed, "X-Real-IP": f"198.51.100.{n}"})).status_code for n in range(3)
        ]
        assert answers == [204, 204, 429], "all three count for the peer, whatever they claim"
        forwarded = {"X-API-Key": FREE, "X-Forwarded-Uri": "/login"}
        assert (await client.get("/v1/authorize", headers=forwarded)).status_code == 400


@pytest.mark.parametrize(
    "twice", ["X-API-Key", "X-Original-URI", "X-Original-Method", "X-Real-IP", "X-Forwarded-Uri", "X-Forwarded-Method"]
)
async def test_of_two_headers_none_is_chosen(twice: str, gate: Gate, listen: Callable[..., Any]) -> None:
    """One may be the client's and the other one the gateway's."""
    kind = "Forwarded" if "Forwarded" in twice else "Original"
    path, method = f"X-{kind}-{'Uri' if kind == 'Forwarded' else 'URI'}", f"X-{kind}-Method"
    headers = [("X-API-Key", FREE), (path, "/login"), (method, "POST"), ("X-Real-IP", "198.51.100.9")]
    async with httpx.AsyncClient(base_url=await listen(DataPlane(gate, {}))) as client:
        assert (await client.get("/v1/authorize", headers=headers)).status_code == 204
        response = await client.get(
            "/v1/authorize", headers=[*headers, *((name, value) for name, value in headers if name == twice)]
        )
        assert response.status_code == 400
        assert twice.lower() in response.json()["error"]["message"]


async def test_forwarded_for_of_a_trusted_peer(gate: Gate, listen: Callable[..., Any]) -> None:
    async with httpx.AsyncClient(base_url=await listen(DataPlane(gate, {}))) as client:

        async def ask(forwarded: str) -> int:
            headers = {"X-API-Key": FREE, "X-Forwarded-Uri": "/login", "X-Forwarded-Method": "POST", "X-Forwarded-For": forwarded}
            return (await client.get("/v1/authorize", headers=headers)).status_code

        assert await ask("198.51.100.9") == 204
        # What stands left of the last untrusted address was written by the client itself.
        assert await ask("1.1.1.1, 198.51.100.9, 127.0.0.1") == 204
        assert await ask("2.2.2.2, 198.51.100.9") == 429
        assert await ask("not an address") == 400


async def test_slow_clients(gate: Gate, listen: Callable[..., Any]) -> None:
    """A client that trickles its headers is cut off, one that trickles its body is told so; others are served meanwhile."""
    url = await listen(DataPlane(gate, {}, body_timeout_s=0.3), header_timeout_s=0.5)
    port = int(url.rpartition(":")[2])
    trickling = []
    for start in (
        b"GET /v1/authorize HTTP/1.1\r\nHost: x\r\nX-A",
        b"POST /v1/check HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{",
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(start)
        await writer.drain()
        trickling.append((reader, writer))
    async with httpx.AsyncClient(base_url=url) as client:
        assert (await client.post("/v1/check", json=GOOD)).status_code == 200
    answers = [await asyncio.wait_for(reader.read(), PATIENCE_S) for reader, _ in trickling]
    for _, writer in trickling:
        writer.close()
    assert answers[0] == b"" or answers[0].startswith(b"HTTP/1.1 408"), "cut off before a request was whole"
    assert answers[1].startswith(b"HTTP/1.1 408")
    assert b"REQUEST_TIMEOUT" in answers[1]


@pytest.mark.parametrize("door", ["raw", "check", "headers"])
async def test_fuzz_finds_no_500(door: str, gate: Gate, listen: Callable[..., Any]) -> None:
    """Random bytes at the raw door, random JSON at the check, random headers at authorize."""
    url = await listen(DataPlane(gate, {}))
    port = int(url.rpartition(":")[2])
    loop = asyncio.get_running_loop()
    statuses: set[int] = set()

    async def exchange(sent: bytes) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(sent)
            if door == "raw":
                writer.write_eof()  # random bytes rarely end a request: without this each would wait for the header timeout
            received = await asyncio.wait_for(reader.read(), PATIENCE_S)
        except ConnectionError:
            return
        finally:
            writer.close()
        found = [int(status) for status in re.findall(rb"^HTTP/1\.1 (\d{3})", received, re.MULTILINE)]
        assert all(status < 500 for status in found), (sent, received)
        statuses.update(found)

    header_text = st.binary(max_size=60).map(lambda raw: raw.replace(b"\n", b"").replace(b"\r", b""))
    json_values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=6,
    )
    checks = st.dictionaries(
        st.sampled_from(["path", "method", "api_key", "ip", "cost", "x"]), json_values | st.just("/a"), max_size=6
    )
    strategies: dict[str, st.SearchStrategy[bytes]] = {
        "raw": st.binary(max_size=300)
        | st.builds(
            lambda verb, path, rest: b"%s %s HTTP/1.1\r\n%s\r\n\r\n" % (verb, path, rest), *([st.binary(max_size=40)] * 3)
        ),
        "check": checks.map(lambda body: json.dumps(body).encode()).map(
            lambda body: (
                b"POST /v1/check HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
            )
        ),
        "headers": st.tuples(header_text, header_text, header_text, header_text).map(
            lambda four: (
                b"GET /v1/authorize HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-API-Key: %s\r\nX-Original-URI: /%s\r\n"
                b"X-Real-IP: %s\r\nX-Original-Method: %s\r\n\r\n" % four
            )
        ),
    }

    @settings(max_examples=100, suppress_health_check=list(HealthCheck))
    @given(sent=strategies[door])
    def fuzz(sent: bytes) -> None:
        asyncio.run_coroutine_threadsafe(exchange(sent), loop).result(20)

    await asyncio.to_thread(fuzz)
    assert statuses & {400, 401, 405}, "the fuzz got as far as the app"
