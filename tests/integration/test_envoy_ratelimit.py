"""Real Envoy with the shipped `deploy/envoy/ratelimit.yaml`, only ports substituted, before a real service."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.servers.api import Api
from tests.servers.envoy import GRPC, SERVICE, Envoy

CONFIGURATION = "ratelimit.yaml"
KEY = "demo-free-key-0001"
POLICY = f"""
[[tiers]]
name = "free"
  [[tiers.rules]]
  endpoint = "/api/*"
  limits = ["3/hour"]
  [[tiers.rules]]
  endpoint = "/wide/*"
  limits = ["1000/hour"]
[[tiers]]
name = "public"
  [[tiers.rules]]
  endpoint = "/login"
  methods = ["POST"]
  limits = ["2/hour"]
  subject = "ip"
[anonymous]
tier = "public"
[[api_keys]]
key = "{KEY}"
tier = "free"
"""


@pytest.fixture
def service() -> Iterator[Api]:
    with Api() as service:
        yield service


def _policy(directory: Any) -> None:
    (directory / "tidegate.policy.toml").write_text(POLICY)


@pytest.fixture
def gateway(serve: Callable[..., Any], service: Api, tmp_path: Any) -> Iterator[tuple[Envoy, Any]]:
    _policy(tmp_path)
    tidegate = serve(grpc=True)
    with Envoy(CONFIGURATION, {GRPC: tidegate.grpc_port, SERVICE: service.port}) as envoy:
        envoy.wait_healthy("tidegate")
        yield envoy, tidegate


def test_limits_hold_and_headers_reach_the_client(gateway: tuple[Envoy, Any], service: Api) -> None:
    envoy, _ = gateway
    with httpx.Client(base_url=envoy.url, headers={"X-API-Key": KEY}) as client:
        for left in (2, 1, 0):
            response = client.get("/api/items?page=2")
            assert response.status_code == 200
            assert response.json()["path"] == "/api/items?page=2"
            assert response.headers["x-ratelimit-limit"] == "3"
            assert response.headers["x-ratelimit-remaining"] == str(left)
            assert response.headers["ratelimit"].startswith(f'"3/hour";r={left};t=')
        denied = client.get("/api/other")
        assert denied.status_code == 429
        assert int(denied.headers["retry-after"]) > 0
        assert denied.headers["x-ratelimit-remaining"] == "0"
        assert denied.headers.get_list("content-type") == ["application/json"]
        assert denied.json()["error"]["code"] == "RATE_LIMIT_EXCEEDED"
        assert denied.json()["error"]["details"]["rule"] == "/api/*"
        assert len(service.received) == 3
        assert client.get("/elsewhere").status_code == 200


def test_requests_without_a_key_are_counted_by_address_and_unknown_keys_are_denied(gateway: tuple[Envoy, Any]) -> None:
    envoy, _ = gateway
    with httpx.Client(base_url=envoy.url) as client:
        assert [client.post("/login").status_code for _ in range(3)] == [200, 200, 429]
        # Who forges the address is not believed: Envoy tells its own peer's.
        assert client.post("/login", headers={"X-Forwarded-For": "198.51.100.9"}).status_code == 429
        assert client.get("/login").status_code == 200
        unknown = client.get("/wide/x", headers={"X-API-Key": "demo-unknown-key-01"})
        assert (unknown.status_code, unknown.headers["x-tidegate-error"]) == (429, "INVALID_API_KEY")
        assert unknown.json()["error"]["code"] == "INVALID_API_KEY"
        # Of two keys the first counts, and the service sees no other.
        two = [("X-API-Key", KEY), ("X-API-Key", "demo-other-key-0001")]
        seen = client.get("/wide/x", headers=two)
        assert (seen.status_code, seen.headers["x-ratelimit-limit"]) == (200, "1000")
        assert seen.json()["headers"]["x-api-key"] == [KEY]
        assert client.get("/wide/x", headers=two[::-1]).status_code == 429


def test_bytes_that_are_no_text_are_denied_and_not_let_through(gateway: tuple[Envoy, Any]) -> None:
    envoy, _ = gateway
    with httpx.Client(base_url=envoy.url) as client:
        response = client.get("/wide/x", headers=[(b"X-API-Key", b"demo-\xff\xfe-key-0001")])
        assert response.status_code == 429
        long = client.get("/wide/" + "x" * 9000, headers={"X-API-Key": KEY})
        assert (long.status_code, long.headers["x-tidegate-error"]) == (429, "BAD_REQUEST")
        huge = client.get("/wide/x", headers={"X-API-Key": "k" * 50_000})
        assert huge.status_code == 429


def test_the_log_reports_a_request_by_the_id_that_envoy_gave_it(serve: Callable[..., Any], service: Api, tmp_path: Any) -> None:
    _policy(tmp_path)
    tidegate = serve(grpc=True, TIDEGATE_ADMIN__TOKEN="token-of-the-settings", TIDEGATE_SERVER__ACCESS_LOG_SAMPLE="1")
    with Envoy(CONFIGURATION, {GRPC: tidegate.grpc_port, SERVICE: service.port}) as envoy:
        envoy.wait_healthy("tidegate")
        headers = {"X-API-Key": KEY, "X-Request-Id": "of-the-client"}
        response = httpx.get(f"{envoy.url}/api/items", headers=headers)
    assert response.status_code == 200
    (told,) = (json.loads(line) for line in tidegate.stop()[2].splitlines() if '"tidegate.access"' in line)
    assert told["http"]["request"]["id"] == response.json()["headers"]["x-request-id"][0] != "of-the-client"


def test_drain_is_noticed_before_the_end_and_failing_closed(gateway: tuple[Envoy, Any], serve: Callable[..., Any]) -> None:
    envoy, tidegate = gateway
    with httpx.Client(base_url=envoy.url, headers={"X-API-Key": KEY}) as client:
        assert client.get("/wide/x").headers["x-ratelimit-limit"] == "1000"
        tidegate.process.terminate()
        asked_at = time.monotonic()
        while envoy.healthy("tidegate"):
            answer = client.get("/wide/x")
            pause_s, asked_at = time.monotonic() - asked_at, time.monotonic()
            if answer.status_code != 200:
                # An instance that nobody asks for 0.2 s may end before Envoy has seen that it drains: a busy machine.
                assert answer.status_code == 503
                assert pause_s > 0.15 or not envoy.healthy("tidegate")
                break
        envoy.wait_healthy("tidegate", False)
        code, _, said = tidegate.stop()
        assert (code, "Traceback" in said) == (0, False)
        # As shipped, no request passes while no Tidegate answers, whatever its key.
        response = client.get("/api/x")
        assert (response.status_code, "x-ratelimit-limit" in response.headers) == (503, False)
        again = serve(grpc=True, TIDEGATE_SERVER__GRPC=f"127.0.0.1:{tidegate.grpc_port}")
        envoy.wait_healthy("tidegate")
        assert client.get("/wide/x").headers["x-ratelimit-limit"] == "1000"
        again.stop()


def test_failing_open(serve: Callable[..., Any], service: Api, tmp_path: Any) -> None:
    _policy(tmp_path)
    tidegate = serve(grpc=True)
    open_ = {"failure_mode_deny: true": "failure_mode_deny: false"}
    with Envoy(CONFIGURATION, {GRPC: tidegate.grpc_port, SERVICE: service.port}, open_) as envoy:
        envoy.wait_healthy("tidegate")
        with httpx.Client(base_url=envoy.url, headers={"X-API-Key": KEY}) as client:
            assert client.get("/wide/x").status_code == 200
            tidegate.stop()
            response = client.get("/api/x")
            assert (response.status_code, "x-ratelimit-limit" in response.headers) == (200, False)


def test_in_place_of_envoyproxy_ratelimit(serve: Callable[..., Any], service: Api, tmp_path: Any) -> None:
    _policy(tmp_path)
    (tmp_path / "limits").mkdir()
    (tmp_path / "limits" / "orders.yaml").write_text(
        "domain: orders\ndescriptors:\n  - key: api_key\n    descriptors:\n      - key: method\n        descriptors:\n"
        "          - key: path\n            value: /orders*\n            descriptors:\n"
        "              - {key: remote_address, rate_limit: {unit: day, requests_per_unit: 2}}\n"
    )
    tidegate = serve(grpc=True, TIDEGATE_ENVOY__CONFIG="limits")
    other = {"domain: tidegate": "domain: orders"}
    with Envoy(CONFIGURATION, {GRPC: tidegate.grpc_port, SERVICE: service.port}, other) as envoy:
        envoy.wait_healthy("tidegate")
        with httpx.Client(base_url=envoy.url, headers={"X-API-Key": KEY}) as client:
            assert [client.get("/orders/1").status_code for _ in range(3)] == [200, 200, 429]
            assert client.post("/orders/1").headers["ratelimit"].startswith('"2/day";r=1;t=')
            assert client.get("/other").status_code == 200
