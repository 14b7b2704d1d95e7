"""Gateways in front of Tidegates that answer slowly: others are served again at once, and refused keys stay refused."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import Serve
from tests.moments import wait_until
from tests.servers.api import Api
from tests.servers.deployed import gateway, haproxy, nginx_balancer
from tests.servers.envoy import GRPC, HTTP, SERVICE, Envoy
from tidegate.policy.key_format import hash_api_key

KEY, REVOKED, UNKNOWN = "demo-free-key-0001", "demo-revoked-key-01", "demo-unknown-key-01"
BLOCKED = "demo-blocked-key-01"
POLICY = f"""
[[tiers]]
name = "free"
  [[tiers.rules]]
  endpoint = "/*"
  limits = ["100000/hour"]
[[access]]
action = "deny"
api_key_id = "{hash_api_key(BLOCKED)[:24]}"
[[api_keys]]
key = "{KEY}"
tier = "free"
[[api_keys]]
key = "{BLOCKED}"
tier = "free"
[[api_keys]]
key = "{REVOKED}"
tier = "free"
status = "revoked"
"""
TRIES = 10
"""Each takes as long as the gateway waits for an answer, and no time at all where it asks nobody."""


@pytest.fixture
def api() -> Iterator[Api]:
    with Api() as api:
        yield api


def _serve(directory: Path) -> Serve:
    directory.mkdir()
    (directory / "tidegate.policy.toml").write_text(POLICY)
    return Serve(directory, grpc=True)


@pytest.fixture(scope="module")
def tidegates(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Serve]]:
    """Two instances for the tests of this file; they go on after each."""
    root = tmp_path_factory.mktemp("tidegates")
    started = [_serve(root / name) for name in ("a", "b")]
    for server in started:
        server.wait_ready()
    yield started
    for server in started:
        server.stop()


@pytest.fixture(autouse=True)
def _all_go_on(tidegates: list[Serve]) -> Iterator[None]:
    yield
    for server in tidegates:
        server.process.send_signal(signal.SIGCONT)


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[Serve]:
    """An instance that a test may change or kill."""
    server = _serve(tmp_path / "mortal")
    server.wait_ready()
    yield server
    server.stop()


def get(url: str, key: str | None = KEY, path: str = "/item", method: str = "GET") -> httpx.Response:
    headers = {"X-Original-URI": path} | ({} if key is None else {"X-API-Key": key})
    return httpx.request(method, url.rstrip("/") + path, headers=headers, timeout=60)


def occupy(servers: list[Serve], ask: Callable[[], object], requests: int = 12) -> list[Any]:
    """Let no instance answer while so many requests wait, then let all go on.

    Returns:
        What the requests were answered meanwhile.
    """
    for server in servers:
        server.process.send_signal(signal.SIGSTOP)
    with ThreadPoolExecutor(requests) as pool:
        answers = [each.result() for each in [pool.submit(ask) for _ in range(requests)]]
    for server in servers:
        server.process.send_signal(signal.SIGCONT)
    for server in servers:
        server.wait_ready()
    return answers


def first_decided(ask: Callable[[], httpx.Response], decided: Callable[[httpx.Response], bool]) -> bool:
    """Whether one of the first tries is decided."""
    return any(decided(ask()) for _ in range(TRIES))


def has_limits(answer: httpx.Response) -> bool:
    return answer.is_success and answer.headers.get("x-ratelimit-limit") == "100000"


@pytest.mark.parametrize("when_away", ["closed", "open"])
def test_nginx_asks_instances_that_were_slow(when_away: str, tidegates: list[Serve], api: Api) -> None:
    with gateway([server.port for server in tidegates], api.port, when_away=when_away, patient=False) as nginx:
        assert has_limits(get(nginx.url))
        answers = occupy(tidegates, lambda: get(nginx.url))
        assert {answer.status_code for answer in answers} == {503 if when_away == "closed" else 200}
        assert first_decided(lambda: get(nginx.url), has_limits)
        # An unknown key comes through only while nobody can decide.
        assert first_decided(lambda: get(nginx.url, UNKNOWN), lambda answer: answer.status_code == 401)


def test_nginx_asks_a_single_instance_that_was_slow(tidegates: list[Serve], api: Api) -> None:
    with gateway([tidegates[0].port], api.port, patient=False) as nginx:
        occupy(tidegates[:1], lambda: get(nginx.url))
        assert first_decided(lambda: get(nginx.url), has_limits)


def test_nginx_gives_a_slow_request_to_two_instances_at_most(tidegates: list[Serve], api: Api) -> None:
    with gateway([server.port for server in tidegates], api.port, patient=False) as nginx:
        nginx.add("log_format tries '$upstream_addr'; access_log tries.log tries; log_subrequest on;", first=True)
        nginx.stop()
        nginx.start()
        occupy(tidegates, lambda: get(nginx.url), requests=4)
        said = (nginx.directory / "tries.log").read_text().splitlines()
        assert max(line.count(",") + 1 for line in said) == 2


@pytest.mark.parametrize("kind", ["haproxy", "nginx"])
def test_a_balancer_asks_instances_that_were_slow(kind: str, tidegates: list[Serve]) -> None:
    ports = [server.port for server in tidegates]
    balancer, _ = haproxy(ports, patient=False) if kind == "haproxy" else nginx_balancer(ports, patient=False)
    with balancer:
        url = balancer.url.rstrip("/") + "/v1/authorize?"
        assert get(url).status_code == 204
        occupy(tidegates, lambda: get(url))
        assert first_decided(lambda: get(url), lambda answer: answer.status_code == 204)


def test_haproxy_asks_all_instances_when_its_checks_found_none(tidegates: list[Serve]) -> None:
    balancer, _ = haproxy([server.port for server in tidegates], patient=False)
    # Checks that always fail, as those of instances that are too slow to answer them.
    balancer.configuration.write_text(balancer.configuration.read_text().replace("uri /readyz", "uri /nothing"))
    with balancer:
        socket = str(balancer.directory / "admin.sock")
        wait_until(lambda: set(balancer.states(socket, "tidegate").values()) == {"DOWN"}, 60, "all are taken for down")
        assert get(balancer.url.rstrip("/") + "/v1/authorize?").status_code == 204


def test_keys_that_nginx_saw_rejected_stay_rejected_while_all_are_unavailable(mortal: Serve, api: Api) -> None:
    with gateway([mortal.port], api.port, when_away="open", patient=False) as nginx:
        long = "k" * 3000
        assert [get(nginx.url, key).status_code for key in (KEY, UNKNOWN, None, REVOKED, long)] == [200, 401, 401, 403, 401]
        blocked = get(nginx.url, BLOCKED)
        assert (blocked.status_code, blocked.json()["error"]["code"]) == (403, "BLOCKED")
        assert "ask the operator" in blocked.json()["error"]["message"]
        mortal.process.kill()
        reached = len(api.received)
        for _ in range(2):
            for method, path in (("GET", "/item"), ("DELETE", "/another/path")):
                for key, status, code in (
                    (UNKNOWN, 401, "INVALID_API_KEY"),
                    (None, 401, "MISSING_API_KEY"),
                    (REVOKED, 403, "API_KEY_REVOKED"),
                    (long, 401, "INVALID_API_KEY"),
                ):
                    answer = get(nginx.url, key, path, method)
                    assert (answer.status_code, answer.headers["x-tidegate-error"]) == (status, code)
                    assert answer.json()["error"]["code"] == code
                    assert answer.headers["cache-control"] == "no-store"
        assert len(api.received) == reached
        # Of others nothing is known: a valid key passes, and so does one that was never asked about. A client may be blocked for
        # its address: that says nothing about its key.
        assert [get(nginx.url, key).status_code for key in (KEY, "demo-never-seen-key", BLOCKED)] == [200, 200, 200]
        files = [path for path in (nginx.directory / "refusals").rglob("*") if path.is_file()]
        assert len(files) == 4
        for path in files:
            assert path.stat().st_mode & 0o077 == 0


def test_a_key_that_is_accepted_again_is_not_rejected(mortal: Serve, api: Api) -> None:
    with gateway([mortal.port], api.port, when_away="open", patient=False) as nginx:
        assert get(nginx.url, UNKNOWN).status_code == 401
        policy = mortal.directory / "tidegate.policy.toml"
        policy.write_text(POLICY + f"[[api_keys]]\nkey = '{UNKNOWN}'\ntier = 'free'\n")
        wait_until(lambda: get(nginx.url, UNKNOWN).status_code == 200, 60, "Tidegate accepts the key")


def test_nothing_is_recorded_where_nginx_is_closed(tidegates: list[Serve], api: Api) -> None:
    with gateway([tidegates[0].port], api.port, patient=False) as nginx:
        assert [get(nginx.url, key).status_code for key in (UNKNOWN, REVOKED)] == [401, 403]
        assert [path for path in (nginx.directory / "refusals").rglob("*") if path.is_file()] == []


def _envoy(configuration: str, server: Serve, api: Api, replaced: dict[str, str] | None = None) -> Envoy:
    port = {GRPC: server.grpc_port} if configuration == "ratelimit.yaml" else {HTTP: server.port}
    return Envoy(configuration, {**port, SERVICE: api.port}, replaced, patient=False)


@pytest.mark.parametrize("configuration", ["ext_authz.yaml", "ratelimit.yaml"])
def test_envoy_asks_an_instance_that_was_slow_and_lets_nothing_pass(configuration: str, tidegates: list[Serve], api: Api) -> None:
    with _envoy(configuration, tidegates[0], api) as envoy:
        envoy.wait_healthy("tidegate")
        assert has_limits(get(envoy.url))
        reached = len(api.received)
        answers = occupy(tidegates[:1], lambda: get(envoy.url, UNKNOWN))
        assert {answer.status_code for answer in answers} == {503}
        assert len(api.received) == reached
        assert first_decided(lambda: get(envoy.url), has_limits)


@pytest.mark.parametrize("configuration", ["ext_authz.yaml", "ratelimit.yaml"])
def test_envoy_asks_instances_although_its_checks_found_none(configuration: str, tidegates: list[Serve], api: Api) -> None:
    # Checks that always fail, as those of an instance that is too slow to answer them.
    failing = (
        {"path: /readyz": "path: /nothing"} if configuration == "ext_authz.yaml" else {"service_name: envoy": "service_name: no"}
    )
    with _envoy(configuration, tidegates[0], api, failing) as envoy:
        envoy.wait_healthy("tidegate", False)
        assert has_limits(get(envoy.url))
