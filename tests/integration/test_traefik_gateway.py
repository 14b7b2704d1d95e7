"""deploy/traefik/tidegate.yml in a real Traefik, before real Tidegate and an API that says what reached it."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

import jwt
from tests.cases import gateway_tricks
from tests.cases.gateway_tricks import TRICKS, verdict
from tests.conftest import Serve
from tests.moments import PATIENCE_S
from tests.raw_http import exchange
from tests.servers.api import Api
from tests.servers.ports import HOST, free_port
from tests.servers.traefik import Traefik
from tidegate.policy.key_format import hash_api_key

KEY, STRANGER = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
CUSTOMERS_KEY, TINY = "key-of-a-customer-01", "key-with-one-request"
REGION, ORG, NOBODY = 111_111, 333_333, 444_444
"""The limit of each rule, which says what Tidegate knew of the caller."""
POLICY = f"""
[attributes]
user = "header:X-User-Id"
region = "header:X-Region"
org = "jwt:org"
[jwt]
jwks = "jwks.json"
issuer = "https://issuer.example"
audience = "api"
[callers]
default_tier = "users"
[[customers]]
name = "acme-gmbh"
tier = "pro"
[[api_keys]]
key = "{CUSTOMERS_KEY}"
customer = "acme-gmbh"
[[api_keys]]
key = "{TINY}"
tier = "tiny"
[[tiers]]
name = "pro"
  [[tiers.rules]]
  endpoint = "/api/*"
  limits = ["555555/hour"]
[[tiers]]
name = "tiny"
  [[tiers.rules]]
  endpoint = "/api/*"
  limits = ["1/hour"]
[[tiers]]
name = "users"
  [[tiers.rules]]
  endpoint = "/*"
  subject = "ip"
  limits = ["{NOBODY}/hour"]
  [[tiers.rules]]
  endpoint = "/*"
  subject = "user"
  match = {{ user = "*" }}
  limits = ["222222/hour"]
  priority = 3
  [[tiers.rules]]
  endpoint = "/*"
  subject = ["ip", "region"]
  match = {{ region = "eu-west" }}
  limits = ["{REGION}/hour"]
  [[tiers.rules]]
  endpoint = "/*"
  subject = "region"
  match = {{ region = "forged" }}
  limits = ["222222/hour"]
  priority = 2
  [[tiers.rules]]
  endpoint = "/*"
  subject = "org"
  match = {{ org = "acme" }}
  priority = 1
  limits = ["{ORG}/hour"]
"""
CALLER = ("x-tidegate-key-id", "x-tidegate-customer", "x-tidegate-tier", "x-tidegate-rule", "x-tidegate-overage")
LIMIT = {'"X-Tidegate-Overage"]': '"X-Tidegate-Overage", "X-RateLimit-Limit"]'}
"""As docs/gateways.md has it: the API gets the limit that was decided on, since Traefik gives it to no client."""
TOKENS = {'["X-API-Key", "X-User-Id", "X-Region"]': '["X-API-Key", "X-User-Id", "X-Region", "Authorization"]'}
TIDIED = {"POST /login with a dot segment at the end": "strict"}
"""Traefik resolves the dot to /login, decides on that, and asks the API for that."""


@contextlib.contextmanager
def serving(policy: str) -> Iterator[Serve]:
    with tempfile.TemporaryDirectory() as directory:
        public = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(KEY.public_key()))
        Path(directory, "jwks.json").write_text(json.dumps({"keys": [{**public, "kid": "a"}]}))
        Path(directory, "tidegate.policy.toml").write_text(policy)
        server = Serve(Path(directory))
        try:
            server.wait_ready()
            yield server
        finally:
            server.stop()


@pytest.fixture(scope="module")
def api() -> Iterator[Api]:
    with Api() as api:
        yield api


@pytest.fixture(scope="module")
def traefik(api: Api) -> Iterator[Traefik]:
    with serving(POLICY) as tidegate, Traefik(tidegate.port, api.port, LIMIT | TOKENS) as started:
        yield started


def get(traefik: Traefik, headers: Mapping[str, str] | None = None) -> httpx.Response:
    return httpx.get(f"http://{HOST}:{traefik.clients}/api/items", headers=dict(headers or {}), timeout=PATIENCE_S)


def reached(api: Api, name: str) -> list[str] | None:
    """What the API got of a header with the last request."""
    values: list[str] | None = api.received[-1]["headers"].get(name)
    return values


def bearer(key: Any = KEY, **claims: object) -> str:
    body = {"iss": "https://issuer.example", "aud": "api", "exp": int(time.time()) + 3600, **claims}
    return "Bearer " + jwt.encode(body, key, algorithm="ES256", headers={"kid": "a"})


@pytest.mark.parametrize("forged", [{}, {"X-User-Id": "1", "X-Region": "forged"}, {"Connection": "close, X-User-Id, X-Region"}])
def test_attributes_are_those_of_the_gateway(traefik: Traefik, api: Api, forged: dict[str, str]) -> None:
    assert get(traefik, forged).status_code == 200
    assert reached(api, "x-ratelimit-limit") == [str(REGION)]
    assert (reached(api, "x-region"), reached(api, "x-user-id")) == (["eu-west"], None)


def test_tokens_are_verified(traefik: Traefik, api: Api) -> None:
    assert get(traefik, {"Authorization": bearer(org="acme")}).status_code == 200
    assert reached(api, "x-ratelimit-limit") == [str(ORG)]
    api.received.clear()
    for refused in (bearer(STRANGER, org="acme"), bearer(org="acme", exp=1), "Bearer x"):
        found = get(traefik, {"Authorization": refused})
        assert (found.status_code, found.headers["x-tidegate-error"]) == (401, "INVALID_TOKEN")
    valid, other = bearer(org="acme"), bearer(org="other")
    head = f"GET /api/items HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n"
    [twice] = exchange(traefik.clients, f"{head}Authorization: {valid}\r\nAuthorization: {other}\r\n\r\n".encode())
    assert twice.status == 400
    assert api.received == []


def test_the_api_learns_who_is_calling(traefik: Traefik, api: Api) -> None:
    forged = dict.fromkeys(CALLER, "forged")
    expected = (hash_api_key(CUSTOMERS_KEY)[:24], "acme-gmbh", "pro", "/api/*", None)
    for key, values in (({"X-API-Key": CUSTOMERS_KEY}, expected), ({}, (None, None, "users", "/* region=eu-west", None))):
        found = get(traefik, {**forged, **key})
        assert found.status_code == 200
        assert [reached(api, name) for name in CALLER] == [None if value is None else [value] for value in values]
        assert not any(name in found.headers for name in CALLER), "for the API, not for clients"


def test_refusals_reach_the_client_with_their_headers(traefik: Traefik, api: Api) -> None:
    assert get(traefik, {"X-API-Key": TINY}).status_code == 200
    api.received.clear()
    denied = get(traefik, {"X-API-Key": TINY})
    assert (denied.status_code, denied.headers["x-ratelimit-limit"], denied.headers["x-ratelimit-remaining"]) == (429, "1", "0")
    assert int(denied.headers["retry-after"]) > 0
    unknown = get(traefik, {"X-API-Key": "nobody-knows-this"})
    assert (unknown.status_code, unknown.headers["x-tidegate-error"]) == (401, "INVALID_API_KEY")
    assert api.received == []


def test_no_trick_gets_past(api: Api) -> None:
    wrong = {}
    with serving(gateway_tricks.POLICY) as tidegate, Traefik(tidegate.port, api.port, LIMIT) as traefik:
        for trick in TRICKS:
            api.received.clear()
            answers = exchange(traefik.clients, trick.sent(f"{HOST}:{traefik.clients}"), trick.method)
            decided = api.received[0]["headers"].get("x-ratelimit-limit", [None])[0] if api.received else None
            found = verdict(answers[0].status, decided, api.received)
            # A second answer is one to what stood behind the request: it must not have reached the API either.
            if found not in (*trick.may_be, TIDIED.get(trick.name)) or any(each.status not in (0, 400) for each in answers[1:]):
                wrong[trick.name] = (found, answers)
    assert wrong == {}


def test_without_tidegate_it_is_closed(api: Api) -> None:
    with Traefik(free_port(), api.port) as traefik:
        api.received.clear()
        assert get(traefik, {"X-API-Key": CUSTOMERS_KEY}).status_code == 500
        assert api.received == []
