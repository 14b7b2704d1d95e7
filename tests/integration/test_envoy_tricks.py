"""Every trick through real Envoy, as shipped, with both ways to ask Tidegate, before an API that says what reached it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cases.gateway_tricks import POLICY, TRICKS, Trick, verdict
from tests.conftest import Serve
from tests.raw_http import exchange
from tests.servers.api import Api
from tests.servers.envoy import GRPC, HTTP, SERVICE, Envoy, with_path_prefix

TIDIED = {
    # Envoy resolves the dots to /login/, as RFC 3986 has it, decides on that and asks the API for that.
    "POST /login with dots at the end": ("plain",),
    # Envoy takes the tab for one of the blanks before the version.
    "POST /login with a raw tab": ("strict",),
}
"""Where Envoy passes on another request than the one that came: what it passed on is what was decided."""


PREFIX = with_path_prefix("/v1/authorize/envoy", ["x-api-key", "x-forwarded-for"], ["x-ratelimit-*"], [])
"""As Istio and Envoy Gateway ask."""


@pytest.fixture(scope="module", params=["ratelimit.yaml", "ext_authz.yaml", "path_prefix"])
def house(request: pytest.FixtureRequest) -> Iterator[tuple[Envoy, Api]]:
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "tidegate.policy.toml").write_text(POLICY)
        server = Serve(Path(directory), grpc=True)
        try:
            server.wait_ready()
            with Api() as api:
                ports = {GRPC: server.grpc_port, HTTP: server.port, SERVICE: api.port}
                prefixed = request.param == "path_prefix"
                with Envoy("ext_authz.yaml" if prefixed else request.param, ports, PREFIX if prefixed else None) as envoy:
                    envoy.wait_healthy("tidegate")
                    yield envoy, api
        finally:
            server.stop()


@pytest.mark.parametrize("trick", TRICKS, ids=lambda trick: trick.name)
def test_no_trick_gets_past(trick: Trick, house: tuple[Envoy, Api]) -> None:
    envoy, api = house
    api.received.clear()
    answers = exchange(envoy.port, trick.sent(f"127.0.0.1:{envoy.port}"), trick.method)
    answer = answers[0]
    found = verdict(answer.status, answer.headers.get("x-ratelimit-limit"), api.received)
    assert found in TIDIED.get(trick.name, trick.may_be), (answers, api.received)
    # A second answer is one to what stood behind the request: it must not have reached the API either.
    assert len(answers) == 1 or answers[1].status in (0, 400)
