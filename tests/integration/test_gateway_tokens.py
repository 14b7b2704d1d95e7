"""The shipped gateways in front of a Tidegate that requires a token: they send their own, never a client one, and log none."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.moments import PATIENCE_S, wait_until
from tests.servers.api import Api
from tests.servers.deployed import gateway
from tests.servers.envoy import GRPC, HTTP, SERVICE, Envoy
from tidegate.catalog.caller_tokens import make_caller_token

POLICY = """
[anonymous]
tier = "free"
[[tiers]]
name = "free"
[[tiers.rules]]
endpoint = "/*"
subject = "ip"
limits = ["1000000/minute"]
"""


def test_shipped_gateways_send_their_own_token(
    serve: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tidegate.policy.toml").write_text(POLICY)
    server = serve(grpc=True, TIDEGATE_CALLERS_AUTH__MODE="token")
    made = server.run("caller-tokens", "create", "--name", "gateways")
    assert made.returncode == 0, made.stderr
    token = made.stdout.strip()
    of_client = {"X-Tidegate-Token": make_caller_token()}
    with Api() as api, contextlib.ExitStack() as stack:
        nginx = gateway([server.port], api=api.port, level="info")
        monkeypatch.setenv("TIDEGATE_TOKEN", token)
        ports = {SERVICE: api.port, HTTP: server.port, GRPC: server.grpc_port}
        envoys = [Envoy("ext_authz.yaml", ports), Envoy("ratelimit.yaml", ports)]
        for each in (nginx, *envoys):
            stack.callback(each.stop)
            each.start()

        def answer(url: str) -> httpx.Response:
            return httpx.get(f"{url}/api/v1/a", headers=of_client, timeout=PATIENCE_S)

        # Without its token nginx is refused: its client sees a limiter that is away, and not a key that is missing.
        refused = answer(nginx.url)
        assert (refused.status_code, refused.headers["x-tidegate-error"]) == (503, "LIMITER_UNAVAILABLE")
        nginx.stop()
        (nginx.directory / "snippets" / "tidegate-token.conf").write_text(f'proxy_set_header X-Tidegate-Token "{token}";\n')
        nginx.start()
        for url in (nginx.url, *(envoy.url for envoy in envoys)):
            wait_until(lambda url=url: answer(url).status_code == 200)
            reached = answer(url).json()
            assert "x-tidegate-token" not in reached["headers"], url
        logs = [nginx.access_log.read_text(), *(envoy.log.read_text() for envoy in envoys)]
        assert not [log for log in logs if token in log]
