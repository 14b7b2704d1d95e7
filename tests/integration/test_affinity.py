"""Key affinity of the shipped balancers: a key reaches one instance, all instances are used, and one that is down is skipped."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import httpx
import pytest

from tests.moments import wait_until
from tests.servers.api import Api
from tests.servers.deployed import haproxy, nginx_balancer
from tests.servers.envoy import Envoy

HOST = "127.0.0.1"
KEYS = [f"key-{number}" for number in range(24)]


@pytest.fixture
def apis() -> Iterator[list[Api]]:
    with ExitStack() as stack:
        yield [stack.enter_context(Api()) for _ in range(3)]


def by_key(apis: list[Api], url: str) -> dict[str, set[int]]:
    """Which instances got each key."""
    for api in apis:
        api.received.clear()
    with httpx.Client(timeout=30) as client:
        for _ in range(3):
            for key in KEYS:
                assert client.get(f"{url}/v1/authorize", headers={"X-API-Key": key, "X-Original-URI": "/x"}).status_code == 200
    found = defaultdict(set)
    for number, api in enumerate(apis):
        for each in api.received:
            for key in each["headers"].get("x-api-key", []):
                found[key].add(number)
    return found


def nginx(ports: list[int], text: str) -> str:
    text = text.replace("#affinity ", "").replace("proxy_pass http://tidegate_instances", "proxy_pass http://tidegate_affinity")
    for number, port in zip((1, 2, 3), ports, strict=True):
        text = text.replace(f"server 10.0.0.1{number}:8080", f"server {HOST}:{port}")
    return text


def haproxy_text(_: list[int], text: str) -> str:
    before, _, after = text.partition("backend tidegate\n    balance roundrobin\n")
    return before + "backend tidegate\n" + after.replace("#affinity ", "")


def started(kind: str, ports: list[int], stack: ExitStack) -> str:
    if kind == "envoy":
        replaced = {
            f"address: 10.0.0.1{number}, port_value: 8080": f"address: {HOST}, port_value: {port}"
            for number, port in zip((1, 2, 3), ports, strict=True)
        }
        envoy = Envoy("balancer.yaml", {port: port for port in ports}, replaced)
        stack.callback(envoy.stop)
        envoy.start()
        return envoy.url
    server, _ = haproxy(ports) if kind == "haproxy" else nginx_balancer(ports)
    change: Callable[[list[int], str], str] = haproxy_text if kind == "haproxy" else nginx
    server.configuration.write_text(change(ports, server.configuration.read_text()))
    assert "warn" not in server.check().lower()
    stack.callback(server.stop)
    server.start()
    return server.url


@pytest.mark.parametrize("kind", ["nginx", "haproxy", "envoy"])
def test_a_key_reaches_one_instance(kind: str, apis: list[Api]) -> None:
    with ExitStack() as stack:
        url = started(kind, [api.port for api in apis], stack)
        wait_until(lambda: httpx.get(f"{url}/v1/authorize", headers={"X-API-Key": "first"}, timeout=30).status_code == 200)
        found = by_key(apis, url)
        assert set(found) >= set(KEYS)
        # One request at a time: no instance is over its bound, except that HAProxy counts those of the last moment.
        alone = [key for key in KEYS if len(found[key]) == 1]
        assert len(alone) >= len(KEYS) - 2, found
        assert len({number for key in alone for number in found[key]}) == 3
