"""Every trick through a real nginx with deploy/nginx/gateway.conf, real Tidegate and an API that says what reached it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cases.gateway_tricks import POLICY, TRICKS, Trick, verdict
from tests.conftest import Serve
from tests.raw_http import exchange
from tests.servers.api import Api
from tests.servers.deployed import gateway
from tests.servers.nginx import Nginx


@pytest.fixture(scope="module", params=["without edge cache", "with edge cache"])
def house(request: pytest.FixtureRequest) -> Iterator[tuple[Nginx, Api]]:
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "tidegate.policy.toml").write_text(POLICY)
        server = Serve(Path(directory))
        try:
            server.wait_ready()
            with Api() as api, gateway([server.port], api.port, edge=request.param == "with edge cache") as nginx:
                yield nginx, api
        finally:
            server.stop()


@pytest.mark.parametrize("trick", TRICKS, ids=lambda trick: trick.name)
def test_no_trick_gets_past(trick: Trick, house: tuple[Nginx, Api]) -> None:
    nginx, api = house
    api.received.clear()
    answers = exchange(nginx.port, trick.sent(nginx.address), trick.method)
    answer = answers[0]
    found = verdict(answer.status, answer.headers.get("x-ratelimit-limit"), api.received)
    assert found in trick.may_be, (answers, api.received)
    # A second answer is one to what stood behind the request: it must not have reached the API either.
    assert len(answers) == 1 or answers[1].status in (0, 400)
