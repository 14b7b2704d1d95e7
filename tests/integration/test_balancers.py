"""deploy/haproxy/haproxy.cfg and deploy/nginx/lb.conf as real balancers in front of Tidegate."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from drills.http_load import KEY, POLICY, HttpLoad

from tests.conftest import Serve
from tests.moments import PATIENCE_S, wait_until
from tests.servers.api import Api
from tests.servers.deployed import haproxy, nginx_balancer
from tests.servers.haproxy import HAProxy
from tests.servers.nginx import Nginx
from tests.servers.ports import free_port

BALANCERS = ("haproxy", "nginx")
ASK = {"X-API-Key": KEY, "X-Original-URI": "/item"}


class Balancer(NamedTuple):
    """A running balancer and where it says how it is."""

    server: HAProxy | Nginx
    alive: str


@pytest.fixture
def balance() -> Iterator[Callable[..., Balancer]]:
    """Starts a balancer over these ports; `changes` are made to its configuration first."""
    started: list[HAProxy | Nginx] = []

    def start(kind: str, ports: list[int], changes: dict[str, str] | None = None, **options: Any) -> Balancer:
        server: HAProxy | Nginx
        server, operators = haproxy(ports, **options) if kind == "haproxy" else nginx_balancer(ports, **options)
        text = server.configuration.read_text()
        for old, new in (changes or {}).items():
            assert old in text
            text = text.replace(old, new)
        server.configuration.write_text(text)
        started.append(server)
        server.start()
        return Balancer(server, f"http://127.0.0.1:{operators}/alive")

    yield start
    for server in started:
        server.stop()


@pytest.fixture
def tidegates(tmp_path: Path) -> Iterator[Callable[[int], list[Serve]]]:
    started: list[Serve] = []

    def start(count: int) -> list[Serve]:
        for number in range(count):
            directory = tmp_path / str(number)
            directory.mkdir()
            (directory / "tidegate.policy.toml").write_text(POLICY)
            started.append(Serve(directory))
        for server in started:
            server.wait_ready()
        return started

    yield start
    for server in started:
        server.stop()


@pytest.fixture
def api() -> Iterator[Api]:
    with Api() as api:
        yield api


async def _under_load(url: str, *events: Callable[[], object]) -> HttpLoad:
    load, until = HttpLoad(url, rate=200), asyncio.Event()
    running = asyncio.create_task(load.run(until))
    for event in events:
        await asyncio.sleep(0.5)
        await asyncio.to_thread(event)
    await asyncio.sleep(1)
    until.set()
    await running
    return load


@pytest.mark.parametrize("kind", BALANCERS)
def test_the_configuration_is_read_without_a_warning(kind: str, balance: Callable[..., Balancer]) -> None:
    assert "warn" not in balance(kind, [free_port()]).server.check().lower()


@pytest.mark.parametrize("kind", BALANCERS)
def test_the_data_plane_and_nothing_else(kind: str, balance: Callable[..., Balancer], api: Api) -> None:
    url = balance(kind, [api.port]).server.url
    for path in ("/v1/check", "/v1/check/batch", "/v1/usage", "/v1/authorize"):
        assert httpx.post(url + path, json={"path": "/item"}, headers=ASK).status_code == 200
        seen = [each for each in api.received if each["path"] != "/readyz"][-1]
        assert (seen["path"], seen["headers"]["x-api-key"], seen["body"]) == (path, [KEY], '{"path":"/item"}')
    api.received.clear()
    for path in (
        "/admin/v1/tiers",
        "/metrics",
        "/health",
        "/readyz",
        "/livez",
        "/openapi.json",
        "/",
        "/v1/",
        "/V1/check",
        "/v1/checks",
    ):
        answer = httpx.get(url + path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "NOT_FOUND")
    assert all(each["path"] == "/readyz" for each in api.received)


@pytest.mark.parametrize("kind", BALANCERS)
@pytest.mark.parametrize("believed", [True, False])
def test_whose_request_it_is_comes_from_gateways_alone(
    kind: str, believed: bool, balance: Callable[..., Balancer], api: Api
) -> None:
    strange = {"haproxy": {"127.0.0.0/8 ": ""}, "nginx": {"127.0.0.0/8  1;": ""}}[kind]
    url = balance(kind, [api.port], None if believed else strange).server.url

    def told(**headers: str) -> tuple[Any, Any]:
        httpx.get(f"{url}/v1/authorize", headers={name.replace("_", "-"): value for name, value in headers.items()})
        seen = [each for each in api.received if each["path"] != "/readyz"][-1]["headers"]
        return seen.get("x-real-ip"), seen["x-forwarded-for"]

    here = ["127.0.0.1"]
    assert told() == (None, here)
    if believed:
        assert told(X_Real_IP="203.0.113.7") == (["203.0.113.7"], here)
        assert told(X_Forwarded_For="203.0.113.7, 10.0.0.1") == (None, ["203.0.113.7, 10.0.0.1"])
    else:
        assert told(X_Real_IP="203.0.113.7", X_Forwarded_For="203.0.113.7") == (None, here)


@pytest.mark.parametrize("kind", BALANCERS)
async def test_a_killed_instance_costs_no_request(
    kind: str, balance: Callable[..., Balancer], tidegates: Callable[..., list[Serve]]
) -> None:
    servers = await asyncio.to_thread(tidegates, 2)
    url = (await asyncio.to_thread(balance, kind, [server.port for server in servers])).server.url
    load = await _under_load(url, servers[0].process.kill)
    assert len(load.asked) > 50
    assert load.failures == {}


async def test_a_draining_instance_is_left_before_it_ends(
    balance: Callable[..., Balancer], tidegates: Callable[..., list[Serve]]
) -> None:
    servers = await asyncio.to_thread(tidegates, 2)
    balancer = await asyncio.to_thread(balance, "haproxy", [server.port for server in servers])
    haproxy = balancer.server
    assert isinstance(haproxy, HAProxy)
    socket = str(haproxy.directory / "admin.sock")

    def drained() -> None:
        servers[0].process.send_signal(signal.SIGTERM)
        wait_until(lambda: haproxy.states(socket, "tidegate")["tidegate1"] == "DOWN", 60, "HAProxy leaves it alone")
        wait_until(lambda: servers[0].process.poll() is not None, 60, "it ends")

    load = await _under_load(haproxy.url, drained)
    assert load.failures == {}
    assert servers[0].process.returncode == 0
    assert haproxy.states(socket, "tidegate")["tidegate2"] == "UP"


@pytest.mark.parametrize("kind", BALANCERS)
def test_with_all_unavailable_the_answer_reports_it(kind: str, balance: Callable[..., Balancer]) -> None:
    balancer = balance(kind, [free_port(), free_port()], patient=False)
    for _ in range(3):
        answer = httpx.get(f"{balancer.server.url}/v1/authorize", headers=ASK, timeout=PATIENCE_S)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "LIMITER_UNAVAILABLE")
    if kind == "haproxy":  # nginx has no checks: of its instances it knows nothing while nobody asks
        wait_until(
            lambda: httpx.get(balancer.alive).status_code == 503, PATIENCE_S, "it says that it has nobody to send requests to"
        )
    else:
        assert httpx.get(balancer.alive).status_code == 200


def test_the_answer_of_an_instance_is_passed_on(balance: Callable[..., Balancer], tidegates: Callable[..., list[Serve]]) -> None:
    server = tidegates(1)[0]
    for kind in BALANCERS:
        url = balance(kind, [server.port]).server.url
        answer = httpx.get(f"{url}/v1/authorize", headers=ASK)
        assert answer.status_code == 204
        assert answer.headers["x-ratelimit-limit"] == "100000000"
        refused = httpx.get(f"{url}/v1/authorize", headers={**ASK, "X-API-Key": "nobody-knows-this-key"})
        assert (refused.status_code, refused.headers["x-tidegate-error"]) == (401, "INVALID_API_KEY")
        checked = httpx.post(f"{url}/v1/check", json={"path": "/item", "api_key": KEY})
        assert checked.json()["allowed"] is True


def test_haproxy_reports_prometheus_how_its_instances_are(balance: Callable[..., Balancer], api: Api) -> None:
    said = httpx.get(balance("haproxy", [api.port]).alive.replace("/alive", "/metrics")).text
    assert 'haproxy_server_status{proxy="tidegate",server="tidegate1",state="UP"} 1' in said
