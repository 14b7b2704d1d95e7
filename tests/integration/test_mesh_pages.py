"""docs/istio.md and docs/envoy-gateway.md: a real Envoy with the filter that these make of what the pages say."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.conftest import Serve
from tests.servers.api import Api
from tests.servers.envoy import HTTP, SERVICE, Envoy, with_path_prefix

ROOT = Path(__file__).parents[2]
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
[[api_keys]]
key = "{KEY}"
tier = "free"
[[api_keys]]
key = "{REVOKED}"
tier = "free"
status = "revoked"
"""


def documents(page: str) -> list[Any]:
    """The YAML that a page shows, each document that can be pasted."""
    text = (ROOT / "docs" / page).read_text()
    return [yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)]


def istio() -> dict[str, str]:
    (provider,) = documents("istio.md")[0]["meshConfig"]["extensionProviders"]
    told = provider["envoyExtAuthzHttp"]
    assert (told["failOpen"], told["statusOnError"]) == (False, "503")
    return with_path_prefix(
        told["pathPrefix"],
        told["includeRequestHeadersInCheck"],
        told["headersToDownstreamOnAllow"],
        told["headersToDownstreamOnDeny"],
    )


def envoy_gateway() -> dict[str, str]:
    told = documents("envoy-gateway.md")[0]["spec"]["extAuth"]
    assert told["failOpen"] is False
    # It sets no status for errors.
    without = {"                      status_on_error: {code: ServiceUnavailable}\n": ""}
    return with_path_prefix(told["http"]["path"], told["headersToExtAuth"], [], []) | without


PAGES: dict[str, Callable[[], dict[str, str]]] = {"istio.md": istio, "envoy-gateway.md": envoy_gateway}


@pytest.fixture(params=PAGES)
def house(request: pytest.FixtureRequest, serve: Callable[..., Serve], tmp_path: Path) -> Iterator[tuple[str, Envoy, Serve, Api]]:
    (tmp_path / "tidegate.policy.toml").write_text(POLICY)
    tidegate = serve()
    with Api() as api, Envoy("ext_authz.yaml", {HTTP: tidegate.port, SERVICE: api.port}, PAGES[request.param]()) as envoy:
        envoy.wait_healthy("tidegate")
        yield request.param, envoy, tidegate, api


def test_decides_on_the_path_behind_the_prefix(house: tuple[str, Envoy, Serve, Api]) -> None:
    page, envoy, tidegate, api = house
    with httpx.Client(base_url=envoy.url, headers={"X-API-Key": KEY}) as client:
        for method, left in (("GET", "2"), ("POST", "1"), ("DELETE", "0")):
            answer = client.request(method, "/api/items?page=2", content=b"x" * 1000 if method == "POST" else None)
            assert (answer.status_code, api.received[-1]["path"]) == (200, "/api/items?page=2")
            # Envoy Gateway cannot give these to clients.
            assert answer.headers.get("x-ratelimit-remaining") == (left if page == "istio.md" else None)
        denied = client.get("/api/other")
        assert (denied.status_code, denied.headers["x-ratelimit-remaining"]) == (429, "0")
        assert int(denied.headers["retry-after"]) > 0
        assert client.get("/elsewhere").status_code == 200
        # Method and address are the request's own, whatever a client sends.
        forged = {"X-Original-Method": "GET", "X-Original-URI": "/elsewhere", "X-Real-IP": "198.51.100.7"}
        assert [client.post("/login", headers=forged).status_code for _ in range(3)] == [200, 200, 429]
        reached = len(api.received)
        assert client.get("/api/a;b").status_code == 400
        revoked = client.get("/elsewhere", headers={"X-API-Key": REVOKED})
        assert (revoked.status_code, revoked.headers["x-tidegate-error"]) == (403, "API_KEY_REVOKED")
        unknown = client.get("/elsewhere", headers={"X-API-Key": "demo-unknown-key-01"})
        assert (unknown.status_code, unknown.headers["x-tidegate-error"]) == (401, "INVALID_API_KEY")
        tidegate.stop()
        assert client.get("/elsewhere").status_code == (503 if page == "istio.md" else 403)
        assert len(api.received) == reached


def test_the_pages_name_what_is_deployed() -> None:
    services = [
        each
        for each in yaml.safe_load_all((ROOT / "deploy/kubernetes/base/data-plane.yaml").read_text())
        if each["kind"] == "Service"
    ]
    ports = {each["metadata"]["name"]: {port["port"] for port in each["spec"]["ports"]} for each in services}
    told = documents("istio.md")[0]["meshConfig"]["extensionProviders"][0]["envoyExtAuthzHttp"]
    name, namespace = told["service"].split(".")[:2]
    assert namespace == "tidegate"
    assert told["port"] in ports[name]
    (backend,) = documents("envoy-gateway.md")[0]["spec"]["extAuth"]["http"]["backendRefs"]
    assert backend["port"] in ports[backend["name"]]
    assert backend["namespace"] == "tidegate"
    for page in PAGES:
        assert "tidegate.access/gateways=true" in (ROOT / "docs" / page).read_text()
    (provider,) = documents("istio.md")[0]["meshConfig"]["extensionProviders"]
    assert documents("istio.md")[1]["spec"]["provider"]["name"] == provider["name"]
