"""Real Envoy with the shipped `deploy/envoy/ext_authz.yaml`, only ports substituted, before a real service."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.servers.api import Api
from tests.servers.envoy import HTTP, SERVICE, Envoy

CONFIGURATION = "ext_authz.yaml"
KEY, REVOKED = "demo-free-key-0001", "demo-revoked-key-01"
POLICY = f"""
[[tiers]]
name = "free"
  [[tiers.rules]]
  endpoint = "/api/*"
  limits = ["3/hour"]
  [[tiers.rules]]
  endpoint = "/login"
  methods = ["POST"]
  limits = ["2/hour"]
  subject = "ip"
  [[tiers.rules]]
  endpoint = "/wide/*"
  limits = ["1000/hour"]
[[api_keys]]
key = "{KEY}"
tier = "free"
[[api_keys]]
key = "{REVOKED}"
tier = "free"
status = "revoked"
"""


@pytest.fixture
def house(serve: Callable[..., Any], tmp_path: Any) -> Iterator[Callable[..., tuple[Envoy, Any, Api]]]:
    (tmp_path / "tidegate.policy.toml").write_text(POLICY)
    tidegate = serve()
    with Api() as service:
        started: list[Envoy] = []

        def start(**replaced: str) -> tuple[Envoy, Any, Api]:
            envoy = Envoy(CONFIGURATION, {HTTP: tidegate.port, SERVICE: service.port}, replaced)
            started.append(envoy)
            envoy.start()
            envoy.wait_healthy("tidegate")
            return envoy, tidegate, service

        yield start
        for envoy in started:
            envoy.stop()


def test_limits_hold_and_headers_reach_the_client(house: Callable[..., Any]) -> None:
    envoy, _, service = house()
    with httpx.Client(base_url=envoy.url, headers={"X-API-Key": KEY}) as client:
        for method, left in (("GET", 2), ("POST", 1), ("PUT", 0)):
            response = client.request(method, "/api/items?page=2", content=b"x" * 1000 if method != "GET" else None)
            assert (response.status_code, response.json()["path"]) == (200, "/api/items?page=2")
            assert response.headers["x-ratelimit-remaining"] == str(left)
            assert response.headers["ratelimit"].startswith(f'"3/hour";r={left};t=')
        denied = client.get("/api/other")
        assert (denied.status_code, denied.headers["x-ratelimit-remaining"]) == (429, "0")
        assert int(denied.headers["retry-after"]) > 0
        assert len(service.received) == 3
        assert client.get("/elsewhere").status_code == 200
        # The method and the address are the request's own, and what a client says of them counts for nothing.
        forged = {
            "X-Original-Method": "GET",
            "X-Original-URI": "/wide/x",
            "X-Real-IP": "198.51.100.7",
            "X-Forwarded-For": "198.51.100.7",
        }
        assert [client.post("/login", headers=forged).status_code for _ in range(3)] == [200, 200, 429]


def test_refusals_are_as_they_are(house: Callable[..., Any]) -> None:
    envoy, _, service = house()
    with httpx.Client(base_url=envoy.url) as client:
        for key, status, code in (
            (None, 401, "MISSING_API_KEY"),
            ("demo-unknown-key-01", 401, "INVALID_API_KEY"),
            (REVOKED, 403, "API_KEY_REVOKED"),
        ):
            response = client.get("/api/x", headers={} if key is None else {"X-API-Key": key})
            assert (response.status_code, response.headers["x-tidegate-error"]) == (status, code)
        odd = client.get("/api/a;b", headers={"X-API-Key": KEY})
        assert (odd.status_code, odd.json()["error"]["code"]) == (400, "BAD_REQUEST")
        assert service.received == []


@pytest.mark.parametrize(("as_shipped", "status"), [(True, 503), (False, 200)])
def test_without_tidegate(house: Callable[..., Any], as_shipped: bool, status: int) -> None:
    envoy, tidegate, _ = house(**{} if as_shipped else {"failure_mode_allow: false": "failure_mode_allow: true"})
    with httpx.Client(base_url=envoy.url, headers={"X-API-Key": KEY}) as client:
        assert client.get("/wide/x").headers["x-ratelimit-limit"] == "1000"
        tidegate.process.terminate()
        # While it drains it is asked until Envoy has seen that, and answers.
        asked_at = time.monotonic()
        while envoy.healthy("tidegate"):
            answer = client.get("/wide/x")
            pause_s, asked_at = time.monotonic() - asked_at, time.monotonic()
            if answer.status_code != 200:
                # Whom nobody asks for 0.2 s ends before Envoy has seen it; on a busy machine this test is as slow as that.
                assert answer.status_code == status
                assert pause_s > 0.15 or not envoy.healthy("tidegate")
                break
        assert tidegate.stop()[0] == 0
        assert client.get("/api/x").status_code == status
