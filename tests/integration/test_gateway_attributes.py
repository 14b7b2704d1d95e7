"""Attributes through the shipped gateways and balancers: what a gateway knows gets through, what a client claims does not."""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec

import jwt
from tests.conftest import Serve
from tests.moments import PATIENCE_S, wait_until
from tests.raw_http import exchange
from tests.servers.api import Api
from tests.servers.deployed import gateway, haproxy, nginx_balancer
from tests.servers.envoy import GRPC, HTTP, SERVICE, Envoy
from tests.servers.ports import free_port
from tests.servers.redis_server import RedisServer
from tidegate.policy.key_format import hash_api_key
from tidegate.tools.simulate.command import simulate

KEY, STRANGER = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
OWN, FORGED, ORG, NOBODY, PRO = 111_111, 222_222, 333_333, 444_444, 555_555
"""The limit of each rule, which says in X-RateLimit-Limit what Tidegate knew of the caller."""
POLICY = """
[attributes]
user = "header:X-User-Id"
org = "jwt:org"
[jwt]
jwks = "{jwks}"
issuer = "https://issuer.example"
audience = "api"
[callers]
default_tier = "users"
[[tiers]]
name = "pro"
  [[tiers.rules]]
  endpoint = "/api/*"
  limits = ["555555/hour"]
[[customers]]
name = "acme-gmbh"
tier = "pro"
[[api_keys]]
key = "{key}"
customer = "acme-gmbh"
[[api_keys]]
key = "key-of-a-customer-02"
customer = "acme-gmbh"
[[api_keys]]
key = "{tiny}"
tier = "tiny"
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
  limits = ["444444/hour"]
  [[tiers.rules]]
  endpoint = "/*"
  subject = "user"
  match = {{ user = "known-to-the-gateway" }}
  limits = ["111111/hour"]
  [[tiers.rules]]
  endpoint = "/*"
  subject = "user"
  match = {{ user = "forged*" }}
  limits = ["222222/hour"]
  [[tiers.rules]]
  endpoint = "/*"
  subject = "org"
  match = {{ org = "acme" }}
  priority = 1
  limits = ["333333/hour"]
"""
USER = "known-to-the-gateway"
CUSTOMERS_KEY = "key-of-a-customer-01"
CALLER = {
    "x-tidegate-key-id": hash_api_key(CUSTOMERS_KEY)[:24],
    "x-tidegate-customer": "acme-gmbh",
    "x-tidegate-tier": "pro",
    "x-tidegate-rule": "/api/*",
}
ANYBODY = {"x-tidegate-tier": "users", "x-tidegate-rule": "/*"}
NAMES = (*CALLER, "x-tidegate-overage")
TINY = "key-with-one-request"
SECOND_KEY = "key-of-a-customer-02"
NEW_POLICY = """
[callers]
default_tier = "users"
[[tiers]]
name = "users"
  [[tiers.rules]]
  endpoint = "/*"
  subject = "ip"
  limits = ["9/hour"]
[[tiers]]
name = "pro"
  [[tiers.rules]]
  endpoint = "/api/*"
  subject = "customer"
  algorithm = "fixed_window"
  limits = ["1/year"]
"""


def bearer(key: Any = KEY, **claims: object) -> str:
    body = {"iss": "https://issuer.example", "aud": "api", "exp": int(time.time()) + 3600, **claims}
    return "Bearer " + jwt.encode(body, key, algorithm="ES256", headers={"kid": "a"})


@pytest.fixture(scope="module")
def tidegate() -> Iterator[Serve]:
    with tempfile.TemporaryDirectory() as directory:
        public = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(KEY.public_key()))
        jwks = Path(directory, "jwks.json")
        jwks.write_text(json.dumps({"keys": [{**public, "kid": "a"}]}))
        Path(directory, "tidegate.policy.toml").write_text(POLICY.format(jwks=jwks, key=CUSTOMERS_KEY, tiny=TINY))
        server = Serve(Path(directory), grpc=True)
        try:
            server.wait_ready()
            yield server
        finally:
            server.stop()


def answer(url: str, **headers: str) -> httpx.Response:
    return httpx.get(
        f"{url}/api/items", headers={name.replace("_", "-"): value for name, value in headers.items()}, timeout=PATIENCE_S
    )


def limit(url: str, **headers: str) -> int:
    response = answer(url, **headers)
    assert response.status_code in (200, 204), (response.status_code, response.headers, response.text)
    return int(response.headers["x-ratelimit-limit"])


def reached(api: Api, name: str) -> list[str] | None:
    """What the API got of a header with the last request."""
    values: list[str] | None = api.received[-1]["headers"].get(name)
    return values


def require_caller_headers(url: str, api: Api) -> None:
    """The API gets Tidegate's headers of who is calling, each once, and never those of the client."""
    forged = dict.fromkeys((name.replace("-", "_") for name in NAMES), "forged")
    for key, expected in (({"x_api_key": CUSTOMERS_KEY}, CALLER), ({}, ANYBODY), ({"x_api_key": CUSTOMERS_KEY}, CALLER)):
        found = answer(url, **forged, **key)
        assert found.status_code == 200, found.text
        assert {name: reached(api, name) for name in NAMES} == {
            name: [expected[name]] if name in expected else None for name in NAMES
        }
        assert not any(name in found.headers for name in NAMES), "for the API, not for clients"


@pytest.mark.parametrize("edge", [False, True], ids=["without edge cache", "with edge cache"])
def test_nginx(tidegate: Serve, edge: bool) -> None:
    with Api() as api, contextlib.ExitStack() as stack:
        shipped = stack.enter_context(gateway([tidegate.port], api.port, edge=edge))
        assert limit(shipped.url, x_user_id="forged") == NOBODY
        assert reached(api, "x-user-id") is None
        require_caller_headers(shipped.url, api)
        # A denial, which the edge cache keeps, changes nothing for other keys.
        assert answer(shipped.url, x_api_key=TINY, x_tidegate_tier="pro").status_code in (200, 429)
        assert [answer(shipped.url, x_api_key=TINY).status_code for _ in range(2)] == [429, 429]
        require_caller_headers(shipped.url, api)
        # As shipped, tokens are the API's own.
        assert limit(shipped.url, authorization=bearer(org="acme")) == NOBODY
        own = stack.enter_context(gateway([tidegate.port], api.port, edge=edge, user=USER, bearer=True))
        assert limit(own.url) == OWN
        assert limit(own.url, x_user_id="forged") == OWN
        assert reached(api, "x-user-id") == [USER]
        assert limit(own.url, authorization=bearer(org="acme")) == ORG
        for refused in (bearer(STRANGER, org="acme"), bearer(org="acme", exp=1), "Bearer x"):
            found = answer(own.url, authorization=refused)
            assert (found.status_code, found.json()["error"]["code"]) == (401, "INVALID_TOKEN")
        # Of two, the API gets none that Tidegate did not read.
        valid, other = bearer(org="acme"), bearer(org="other")
        for name, first, second in (("X-User-Id", "forged-1", "forged-2"), ("Authorization", valid, other)):
            api.received.clear()
            head = f"GET /api/items HTTP/1.1\r\nHost: {own.address}\r\nConnection: close\r\n"
            [twice] = exchange(own.port, f"{head}{name}: {first}\r\n{name}: {second}\r\n\r\n".encode())
            if twice.status == 200:
                assert reached(api, name.lower()) == ([USER] if name == "X-User-Id" else [valid])
                assert int(twice.headers["x-ratelimit-limit"]) == (OWN if name == "X-User-Id" else ORG)
            else:
                assert twice.status in (400, 401)


def test_simulate_reads_the_documented_log_by_customer(
    tidegate: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (Path(__file__).parents[2] / "docs" / "simulate.md").read_text()
    found = re.search(r"```nginx\n(log_format tidegate .*?)```", text, re.DOTALL)
    assert found is not None
    policy = tmp_path / "new.policy.toml"
    policy.write_text(NEW_POLICY)
    with Api() as api, contextlib.ExitStack() as stack:
        nginx = gateway([tidegate.port], api.port)
        log = nginx.directory / "tidegate.log"
        log_format, access_log, _ = found[1].replace("/var/log/nginx/tidegate.log", str(log)).rsplit("\n", 2)
        nginx.add(log_format, first=True)
        nginx.change({"include snippets/tidegate-check.conf;": f"include snippets/tidegate-check.conf;\n{access_log}"})
        stack.enter_context(nginx)
        for key in (CUSTOMERS_KEY, CUSTOMERS_KEY, SECOND_KEY, None):
            assert answer(nginx.url, **({"x_api_key": key} if key else {})).status_code == 200
        wait_until(lambda: log.exists() and log.read_text().count("\n") == 4, what="the log")
        assert not any(key in log.read_text() for key in (CUSTOMERS_KEY, SECOND_KEY))
        capsys.readouterr()
        assert simulate([str(log)], policy, as_json_=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert {each["tier"]: (each["allowed"], each["blocked"]) for each in report["rules"]} == {"pro": (1, 2), "users": (1, 0)}
    assert report["top_blocked"] == [{"subject": "acme-gmbh", "rule": "/api/*", "blocked": 2}]


def test_nginx_that_passes_without_tidegate_removes_the_clients_headers() -> None:
    with Api() as api, gateway([free_port()], api.port, when_away="open") as nginx:
        assert answer(nginx.url, **dict.fromkeys((name.replace("-", "_") for name in NAMES), "forged")).status_code == 200
        assert [reached(api, name) for name in NAMES] == [None] * len(NAMES)


def test_envoy_over_http(tidegate: Serve) -> None:
    changes = {
        '# - append: {header: {key: x-user-id, value: "%DOWNSTREAM_PEER_URI_SAN%"}}': (
            f"- append: {{header: {{key: x-user-id, value: {USER}}}}}"
        ),
        "# {exact: authorization},": "{exact: authorization},",
    }
    with Api() as api, contextlib.ExitStack() as stack:
        ports = {HTTP: tidegate.port, SERVICE: api.port}
        shipped, own = Envoy("ext_authz.yaml", ports), Envoy("ext_authz.yaml", ports, changes)
        for each in (shipped, own):
            stack.callback(each.stop)
            each.start()
            each.wait_healthy("tidegate")
        assert limit(shipped.url, x_user_id="forged") == NOBODY
        assert reached(api, "x-user-id") is None
        require_caller_headers(shipped.url, api)
        assert limit(own.url, x_user_id="forged") == OWN
        assert reached(api, "x-user-id") == [USER]
        assert limit(own.url, authorization=bearer(org="acme")) == ORG
        refused = answer(own.url, authorization=bearer(STRANGER, org="acme"))
        assert (refused.status_code, refused.headers["x-tidegate-error"]) == (401, "INVALID_TOKEN")


def test_envoy_over_grpc(tidegate: Serve) -> None:
    """Envoy verifies the token, and its claim is the user."""
    text = (Path(__file__).parents[2] / "deploy" / "envoy" / "ratelimit.yaml").read_text()
    start = text.index("                  # - name: envoy.filters.http.jwt_authn")
    block = text[start : text.index("                  - name: envoy.filters.http.ratelimit", start)]
    enabled = block.replace("                  # ", "                  ")
    with Api() as api, contextlib.ExitStack() as stack:
        jwks = tidegate.directory / "jwks.json"
        enabled = enabled.replace("/etc/envoy/jwks.json", str(jwks))
        ports = {GRPC: tidegate.grpc_port, SERVICE: api.port}
        own = Envoy("ratelimit.yaml", ports, {block: enabled})
        stack.callback(own.stop)
        own.start()
        assert limit(own.url, x_user_id="forged") == NOBODY
        assert reached(api, "x-user-id") is None
        require_caller_headers(own.url, api)
        assert limit(own.url, x_user_id="forged", authorization=bearer(sub=USER)) == OWN
        assert reached(api, "x-user-id") == [USER]
        assert answer(own.url, authorization=bearer(STRANGER, sub=USER)).status_code == 401


@pytest.mark.parametrize("kind", ["haproxy", "nginx"])
def test_balancers_pass_headers_of_gateways_only(kind: str, tidegate: Serve) -> None:
    def ask(url: str, named: Mapping[str, str] | None = None, **headers: str) -> int:
        sent = {"X-Original-URI": "/api/items", **{name.replace("_", "-"): value for name, value in headers.items()}}
        response = httpx.get(f"{url}/v1/authorize", headers=sent, timeout=PATIENCE_S)
        assert response.status_code == 204, response.headers
        assert (named or {}).items() <= dict(response.headers).items()
        return int(response.headers["x-ratelimit-limit"])

    for is_gateway in (True, False):
        balancer, _ = haproxy([tidegate.port]) if kind == "haproxy" else nginx_balancer([tidegate.port])
        if not is_gateway:
            text = balancer.configuration.read_text()
            assert "127.0.0.0/8" in text
            balancer.configuration.write_text(text.replace("127.0.0.0/8", "192.0.2.0/24"))
        with balancer:
            assert ask(balancer.url, x_user_id=USER) == (OWN if is_gateway else NOBODY)
            assert ask(balancer.url, authorization=bearer(org="acme")) == ORG
            assert ask(balancer.url, x_api_key=CUSTOMERS_KEY, named=CALLER) == PRO
            limited = httpx.post(
                f"{balancer.url}/v1/limit",
                json={"namespace": "mails", "subject": kind + str(is_gateway), "limits": ["3/hour"]},
                timeout=PATIENCE_S,
            )
            assert (limited.status_code, limited.json()["remaining"]) == (200, 2)


def test_traefik_and_kong_files_remove_and_set_the_same_headers(redis_server: RedisServer) -> None:
    """Where these gateways do not run: the files are parsed, and Kong's function is compiled by the Lua of Redis."""
    deploy = Path(__file__).parents[2] / "deploy"
    traefik = yaml.safe_load((deploy / "traefik" / "tidegate.yml").read_text())["http"]
    changed = traefik["middlewares"]["tidegate-attributes"]["headers"]["customRequestHeaders"]
    asked = traefik["middlewares"]["tidegate"]["forwardAuth"]
    assert changed == {"X-User-Id": "", "X-Region": "eu-west"}
    assert [name.lower() for name in asked["authResponseHeaders"]] == list(NAMES)
    assert asked["trustForwardHeader"] is False
    assert set(asked["authRequestHeaders"]) == {"X-API-Key", *changed}, "nothing that a client says of itself but its key"
    assert traefik["routers"]["api"]["middlewares"] == ["tidegate-attributes", "tidegate"], "the attributes first"
    (plugin,) = yaml.safe_load((deploy / "kong" / "kong.yml").read_text())["plugins"]
    (function,) = plugin["config"]["access"]
    assert redis_server.must("SCRIPT", "LOAD", function)
    assert 'clear_header("X-User-Id")' in function
    named = re.search(r"local callers = \{(.*)\}", function)
    assert named is not None
    assert re.findall(r'"([^"]+)"', named[1].lower()) == list(NAMES)
    assert 'set_header("X-Region", region)' in function
