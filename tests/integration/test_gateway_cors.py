"""CORS through the shipped gateways: preflight requests pass, refusals can be read by pages, in a real browser too."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.conftest import Serve
from tests.moments import PATIENCE_S
from tests.servers.api import Api
from tests.servers.browser import Page
from tests.servers.deployed import gateway
from tests.servers.envoy import GRPC, HTTP, SERVICE, Envoy
from tests.servers.nginx import Nginx

KEY, REVOKED, UNKNOWN = "demo-free-key-0001", "demo-revoked-key-01", "demo-unknown-key-01"
POLICY = f"""
[[tiers]]
name = "free"
  [[tiers.rules]]
  endpoint = "/*"
  limits = ["2/hour"]
[[api_keys]]
key = "{KEY}"
tier = "free"
[[api_keys]]
key = "{REVOKED}"
tier = "free"
status = "revoked"
"""
GATEWAYS = ("nginx", "ext_authz.yaml", "ratelimit.yaml")
READABLE = ("X-RateLimit-Remaining", "RateLimit", "Retry-After", "X-Tidegate-Error")
SCRIPT = """
const answers = [];
for (const key of %s) {
    const answer = await fetch(%s, {headers: {"X-API-Key": key}});
    const headers = Object.fromEntries(%s.map((name) => [name, answer.headers.get(name)]));
    answers.push({status: answer.status, headers});
}
return answers;
"""


@pytest.fixture
def page() -> Iterator[Page]:
    with Page() as page:
        yield page


@pytest.fixture
def api(page: Page) -> Iterator[Api]:
    """One that allows the page to send an API key."""
    with Api({"Access-Control-Allow-Origin": page.origin, "Access-Control-Allow-Headers": "X-API-Key"}) as api:
        yield api


@pytest.fixture
def start(serve: Callable[..., Serve], page: Page, api: Api, tmp_path: Path) -> Iterator[Callable[..., Envoy | Nginx]]:
    """Starts a gateway of a kind, with CORS for the page or as shipped."""
    started: list[Envoy | Nginx] = []
    (tmp_path / "tidegate.policy.toml").write_text(POLICY)
    tidegate = serve(grpc=True)

    def start(kind: str, cors: bool = True) -> Envoy | Nginx:
        made: Envoy | Nginx
        if kind == "nginx":
            made = gateway([tidegate.port], api.port)
            if cors:
                # As a user would: the example's origin by one of their own.
                made.change({'# "https://app.example.com"': f'"{page.origin}"'})
        else:
            changes = {"cors: 0": "cors: 100", "https://app[.]example[.]com": re.escape(page.origin).replace("\\", "\\\\")}
            ports = {GRPC: tidegate.grpc_port} if kind == "ratelimit.yaml" else {HTTP: tidegate.port}
            made = Envoy(kind, {**ports, SERVICE: api.port}, changes if cors else None)
        started.append(made)
        made.start()
        if isinstance(made, Envoy):
            made.wait_healthy("tidegate")
        return made

    yield start
    for each in started:
        each.stop()


def preflight(url: str, origin: str, **headers: str) -> httpx.Response:
    asked = {"Origin": origin, "Access-Control-Request-Method": "GET", "Access-Control-Request-Headers": "x-api-key"}
    return httpx.options(f"{url.rstrip('/')}/item", headers=asked | headers, timeout=PATIENCE_S)


@pytest.mark.parametrize("kind", GATEWAYS)
def test_preflights_pass_uncounted_and_without_a_key(
    kind: str, start: Callable[..., Envoy | Nginx], page: Page, api: Api
) -> None:
    url = start(kind).url
    for _ in range(5):
        answer = preflight(url, page.origin, **{"X-API-Key": KEY})
        assert (answer.status_code, answer.headers.get_list("access-control-allow-origin")) == (200, [page.origin])
        assert answer.headers["access-control-allow-headers"] == "X-API-Key"
        assert "x-api-key" not in api.received[-1]["headers"], "a key that was not verified does not reach the API"
    reached = len(api.received)
    # Of another origin, and what is no preflight request, are requests as any other.
    assert preflight(url, "https://elsewhere.example").status_code in (401, 429)
    assert httpx.options(f"{url.rstrip('/')}/item", headers={"Origin": page.origin}).status_code in (401, 429)
    method = {"Origin": page.origin, "Access-Control-Request-Method": "GET"}
    assert httpx.post(f"{url.rstrip('/')}/item", headers=method).status_code in (401, 429)
    assert len(api.received) == reached
    asked = {"X-API-Key": KEY, "Origin": page.origin}
    first = httpx.get(f"{url.rstrip('/')}/item", headers=asked)
    assert first.headers["x-ratelimit-remaining"] == "1", "no preflight request was counted"
    assert first.headers.get_list("access-control-allow-origin") == [page.origin]
    assert api.received[-1]["headers"]["x-api-key"] == [KEY]


@pytest.mark.parametrize("kind", GATEWAYS)
def test_a_page_reads_answers_and_refusals(kind: str, start: Callable[..., Envoy | Nginx], page: Page) -> None:
    url = f"{start(kind).url.rstrip('/')}/item"
    keys = [KEY, KEY, KEY, UNKNOWN, REVOKED]
    answers = page.run(SCRIPT % (json.dumps(keys), json.dumps(url), json.dumps(READABLE)))
    other = {"ratelimit.yaml": [429, 429]}.get(kind, [401, 403])
    assert [answer["status"] for answer in answers] == [200, 200, 429, *other]
    assert [answer["headers"]["X-RateLimit-Remaining"] for answer in answers[:3]] == ["1", "0", "0"]
    assert answers[2]["headers"]["RateLimit"].startswith('"2/hour";r=0;t=')
    assert int(answers[2]["headers"]["Retry-After"]) > 0
    assert [answer["headers"]["X-Tidegate-Error"] for answer in answers[3:]] == ["INVALID_API_KEY", "API_KEY_REVOKED"]


@pytest.mark.parametrize("kind", GATEWAYS)
def test_as_shipped_no_origin_is_allowed(kind: str, start: Callable[..., Envoy | Nginx], page: Page, api: Api) -> None:
    url = start(kind, cors=False).url
    for origin in (page.origin, "https://app.example.com"):
        refused = preflight(url, origin)
        assert refused.status_code in (401, 429)
        assert not any(name.startswith("access-control-") for name in refused.headers)
    assert api.received == []


def test_refusals_of_nginx_name_the_origin_they_are_for(start: Callable[..., Envoy | Nginx], page: Page) -> None:
    url = start("nginx").url.rstrip("/") + "/"
    for path, headers, status in (("item", {}, 401), ("a;b", {"X-API-Key": KEY}, 400), ("item", {"X-API-Key": REVOKED}, 403)):
        answer = httpx.get(url + path, headers={"Origin": page.origin, **headers})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, page.origin)
        assert answer.headers["vary"] == "Origin"
        assert "Retry-After" in answer.headers["access-control-expose-headers"]
        elsewhere = httpx.get(url + path, headers={"Origin": "https://elsewhere.example", **headers})
        assert elsewhere.status_code == status
        assert not any(name.startswith("access-control-") for name in elsewhere.headers)
