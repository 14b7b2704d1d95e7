"""Addresses with a port, brackets, a zone, or none at all, through every door that reads them."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cases.doors import FREE
from tests.integration.admin_api import Admin, open_admin
from tests.integration.ratelimit_client import headers as rls_headers
from tests.integration.ratelimit_client import request as rls_request
from tests.rsgi import call
from tidegate.doors.asgi import RateLimitMiddleware
from tidegate.doors.client_address import TrustedProxies
from tidegate.doors.grpc.messages import RateLimitResponse
from tidegate.doors.grpc.service import RateLimitService
from tidegate.doors.http import DataPlane
from tidegate.gate.gate import Gate
from tidegate.settings import EnvoySettings

# One client in each list, of a rule that lets it pass twice.
SAME_CLIENT = (
    ["198.51.100.9:5123", "[198.51.100.9]:5124", "::ffff:198.51.100.9"],
    ["[2001:db8:1:2::1]:443", "2001:db8:1:2:ffff::9", "2001:db8:1:2::1%eth0"],
)
Door = Callable[[str, str], Awaitable[tuple[int, str | None]]]


def _data_plane(header: str) -> Callable[[Gate], Door]:
    def door(gate: Gate) -> Door:
        async def ask(path: str, ip: str) -> tuple[int, str | None]:
            headers = {"X-API-Key": FREE, "X-Original-URI": path, "X-Original-Method": "POST", header: ip}
            answer = await call(DataPlane(gate, {}), "/v1/authorize", [(name, value.encode()) for name, value in headers.items()])
            return answer.status, answer.headers.get("x-tidegate-error")

        return ask

    return door


def _check(gate: Gate) -> Door:
    async def ask(path: str, ip: str) -> tuple[int, str | None]:
        body = json.dumps({"path": path, "method": "POST", "api_key": FREE, "ip": ip}).encode()
        answer = await call(DataPlane(gate, {}), "/v1/check", method="POST", body=body)
        return 204 if answer.status == 200 else answer.status, answer.headers.get("x-tidegate-error")

    return ask


def _grpc(gate: Gate) -> Door:
    async def ask(path: str, ip: str) -> tuple[int, str | None]:
        sent = rls_request([("path", path), ("method", "POST"), ("api_key", FREE), ("remote_address", ip)])
        answer = RateLimitResponse.FromString(await RateLimitService(gate, EnvoySettings()).answer(sent.SerializeToString()))
        error = rls_headers(answer).get("x-tidegate-error")
        return 204 if answer.overall_code == 1 else 400 if error else 429, error

    return ask


def _middleware(gate: Gate) -> Door:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})

    limited = RateLimitMiddleware(app, gate=gate, trusted_proxies=["127.0.0.1"])

    async def ask(path: str, ip: str) -> tuple[int, str | None]:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"x-api-key", FREE.encode()), (b"x-forwarded-for", ip.encode())]
        scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "client": ("127.0.0.1", 1)}
        await limited(scope, None, send)  # type: ignore[arg-type]
        found = dict(sent[0]["headers"]).get(b"x-tidegate-error")
        return sent[0]["status"], None if found is None else found.decode()

    return ask


DOORS: dict[str, Callable[[Gate], Door]] = {
    "X-Real-IP": _data_plane("X-Real-IP"),
    "X-Forwarded-For": _data_plane("X-Forwarded-For"),
    "check": _check,
    "gRPC": _grpc,
    "middleware": _middleware,
}


@pytest.mark.parametrize("spellings", SAME_CLIENT)
@pytest.mark.parametrize("door", DOORS)
async def test_one_client_is_counted_once(door: str, spellings: list[str], gate: Gate) -> None:
    ask = DOORS[door](gate)
    assert [await ask("/login", ip) for ip in spellings] == [(204, None), (204, None), (429, None)]


@pytest.mark.parametrize("door", [door for door in DOORS if door != "check"])
async def test_a_bad_address_matters_only_where_it_is_counted(door: str, gate: Gate) -> None:
    ask = DOORS[door](gate)
    for bad in ("unknown", "_hidden", "example.com:80"):
        assert await ask("/api/v1/users/7/x", bad) == (204, None)
        assert await ask("/login", bad) == (400, "BAD_REQUEST")


async def test_the_rejection_names_the_address(gate: Gate) -> None:
    headers = [("X-API-Key", FREE.encode()), ("X-Original-URI", b"/login"), ("X-Original-Method", b"POST"), ("X-Real-IP", b"no")]
    answer = await call(DataPlane(gate, {}), "/v1/authorize", headers)
    assert answer.json()["error"]["message"] == "ip 'no' is not an IPv4 or IPv6 address: the rule 'POST /login' counts by ip"


async def test_usage_leaves_out_what_a_bad_address_would_count(gate: Gate) -> None:
    data_plane = DataPlane(gate, {})
    for value, left_out in ((b"nowhere", ["POST /login"]), (b"198.51.100.9:80", [])):
        answer = await call(data_plane, "/v1/usage", [("X-API-Key", FREE.encode()), ("X-Real-IP", value)])
        assert (answer.status, answer.json()["not_counted"]) == (200, left_out)


async def test_a_server_on_a_unix_socket(gate: Gate) -> None:
    headers = [("X-API-Key", FREE.encode()), ("X-Original-URI", b"/login"), ("X-Original-Method", b"POST")]
    for trusted, statuses in ((["10.0.0.1"], [204, 204, 429]), (["unix"], [204, 204, 204])):
        data_plane = DataPlane(gate, {}, trusted=TrustedProxies(trusted))
        asked = [[*headers, ("X-Real-IP", b"192.0.2.%d" % n)] for n in range(3)]
        assert [(await call(data_plane, "/v1/authorize", each, client="unix:")).status for each in asked] == statuses


@pytest.fixture
async def admin(tmp_path: Path) -> Any:
    made: Admin = await open_admin(
        f"sqlite:///{tmp_path}/tidegate.db", trusted=TrustedProxies(["192.0.2.0/24"]), failed_rate="2/minute"
    )
    yield made
    await made.close()


@pytest.mark.parametrize("spellings", SAME_CLIENT)
async def test_wrong_tokens_are_counted_by_client(admin: Admin, spellings: list[str]) -> None:
    async with admin.client("wrong-token-0000000") as http:
        for ip, status in zip(spellings, (401, 401, 429), strict=True):
            assert (await http.get("/tiers", headers={"X-Forwarded-For": ip})).status_code == status
        # A proxy that adds a line of its own to what came: the client is in the first one.
        lines = [("X-Forwarded-For", spellings[0]), ("X-Forwarded-For", "192.0.2.7")]
        assert (await http.get("/tiers", headers=lines)).status_code == 429
        assert (await http.get("/tiers", headers={"Forwarded": f'for="{spellings[0]}"'})).status_code == 429
        assert (await http.get("/tiers", headers={"X-Forwarded-For": "203.0.113.1"})).status_code == 401
