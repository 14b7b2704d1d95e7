"""Envoy with `path_prefix`, which is all that Istio's envoyExtAuthzHttp has: the path to decide follows the prefix.

Every trick through real Envoy, and at the door itself, as an Envoy would ask that tidies nothing up.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cases.doors import FREE
from tests.cases.gateway_tricks import KEY, PLAIN, POLICY, STRICT, TRICKS, Trick, is_strict, verdict
from tests.conftest import Clock, Serve
from tests.integration.test_envoy_tricks import TIDIED
from tests.raw_http import exchange
from tests.rsgi import call
from tests.servers.api import Api
from tests.servers.envoy import HTTP, SERVICE, Envoy
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.counters.memory import MemoryCounters
from tidegate.doors.http import DataPlane
from tidegate.gate.gate import Gate
from tidegate.policy.toml_reader import parse_policy
from tidegate.telemetry.access import AccessLog

PREFIX = "/v1/authorize/envoy"
REPLACED = {
    "path_override: /v1/authorize/envoy": f"path_prefix: {PREFIX}",
    "{exact: x-original-uri}, {exact: x-original-method}, ": "",
}


@pytest.fixture(scope="module")
def house() -> Iterator[tuple[Envoy, Api]]:
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "tidegate.policy.toml").write_text(POLICY)
        server = Serve(Path(directory))
        try:
            server.wait_ready()
            with Api() as api, Envoy("ext_authz.yaml", {HTTP: server.port, SERVICE: api.port}, REPLACED) as envoy:
                envoy.wait_healthy("tidegate")
                yield envoy, api
        finally:
            server.stop()


@pytest.mark.parametrize("trick", TRICKS, ids=lambda trick: trick.name)
def test_no_trick_gets_past_envoy(trick: Trick, house: tuple[Envoy, Api]) -> None:
    envoy, api = house
    api.received.clear()
    answers = exchange(envoy.port, trick.sent(f"127.0.0.1:{envoy.port}"), trick.method)
    answer = answers[0]
    found = verdict(answer.status, answer.headers.get("x-ratelimit-limit"), api.received)
    assert found in TIDIED.get(trick.name, trick.may_be), (answers, api.received)
    assert len(answers) == 1 or answers[1].status in (0, 400)


async def test_no_path_is_read_as_a_lenient_back_end_would_not(listen: Callable[..., Any], clock: Clock) -> None:
    gate = Gate(CachedCatalog(PolicyCatalog(parse_policy(POLICY))), MemoryCounters(clock=clock))
    port = int((await listen(DataPlane(gate, {}))).rpartition(":")[2])
    asked = 0
    for trick in TRICKS:
        line, _, rest = trick.sent(f"127.0.0.1:{port}").partition(b"\r\n")
        method, _, target = line.rpartition(b" ")[0].partition(b" ")
        if not target.startswith(b"/"):
            continue  # Envoy passes on paths alone
        asked += 1
        sent = b"%b %b%b HTTP/1.1\r\n%b" % (method, PREFIX.encode(), target, rest)
        answer = (await asyncio.to_thread(exchange, port, sent, method.decode("latin-1")))[0]
        if answer.status == 200:
            limit = int(answer.headers["x-ratelimit-limit"])
            assert limit != PLAIN or not is_strict(method.decode(), target.decode("latin-1")), trick.name
    assert asked > 80


@pytest.mark.parametrize(
    ("method", "path", "rule"),
    [
        ("POST", "/login", STRICT),
        ("POST", "/login?next=/open", STRICT),
        ("GET", "/login", PLAIN),
        ("DELETE", "/api/items/7", STRICT),
        ("GET", "/api/secret/%C3%A9", STRICT),
        ("GET", "/api/secret/\xc3\xa9", STRICT),
        ("GET", "/", PLAIN),
        ("GET", "/v1/check", PLAIN),
        ("GET", "/v1/authorize/envoy", PLAIN),
    ],
)
async def test_what_follows_is_decided_on(method: str, path: str, rule: int, clock: Clock) -> None:
    gate = Gate(CachedCatalog(PolicyCatalog(parse_policy(POLICY))), MemoryCounters(clock=clock))
    target = (PREFIX + path).partition("?")[0]
    # These headers may be the client's own.
    misleading = [("X-Original-URI", b"/open"), ("X-Original-Method", b"GET"), ("X-Forwarded-Uri", b"/open")]
    for headers in ([], misleading):
        answer = await call(DataPlane(gate, {}), target, [("X-API-Key", KEY.encode()), *headers], method)
        assert (answer.status, answer.headers["x-ratelimit-limit"]) == (200, str(rule))


@pytest.mark.parametrize("path", ["//login", "/x/../login", "/%6cogin", "/a%2Flogin", "/login;x", "/login%00", "/\xff", "/%zz"])
async def test_other_spellings_are_rejected(path: str, gate: Gate) -> None:
    key = ("X-API-Key", FREE.encode())
    answer = await call(DataPlane(gate, {}), PREFIX + path, [key])
    assert (answer.status, answer.json()["error"]["code"]) == (400, "BAD_REQUEST")
    answer = await call(DataPlane(gate, {}), PREFIX + path, [("X-Tidegate-Denied-Status", b"403"), key])
    assert (answer.status, answer.headers["x-tidegate-status"]) == (403, "400")


async def test_it_is_one_door_in_the_access_log(gate: Gate, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "tidegate.access"):
        await call(DataPlane(gate, {}, access=AccessLog(1.0)), f"{PREFIX}/api/v1/a", [("X-API-Key", FREE.encode())])
        answer = await call(DataPlane(gate, {}), f"{PREFIX}x/api", [("X-API-Key", FREE.encode())])
    assert answer.status == 404
    assert [record.getMessage() for record in caplog.records] == [f"{PREFIX} answered 200"]
