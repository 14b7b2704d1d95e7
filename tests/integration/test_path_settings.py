"""`[paths]`: encoded slashes and escapes of unreserved characters through every door, refused where the setting does not say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cases.doors import FREE
from tests.conftest import Serve
from tests.integration.ratelimit_client import ask, request
from tests.moments import PATIENCE_S
from tests.servers import forked
from tidegate.client import Client
from tidegate.doors.asgi import RateLimitMiddleware
from tidegate.doors.grpc.messages import OK, OVER_LIMIT
from tidegate.errors import BadRequest

POLICY = f"""
[[tiers]]
name = "free"
  [[tiers.rules]]
  endpoint = "/projects/{{id}}"
  limits = ["1000/day"]
  [[tiers.rules]]
  endpoint = "/projects/group%2Fname"
  limits = ["1000/hour"]
  [[tiers.rules]]
  endpoint = "/~user"
  limits = ["1000/minute"]
[[api_keys]]
key = "{FREE}"
tier = "free"
[anonymous]
tier = "free"
"""
SLASH, NAMED, TILDE, OTHER = "/projects/a%2fb", "/projects/group%2fname", "/%7euser", "/other/a%2Fb"
RULES = {SLASH: "/projects/{id}", NAMED: "/projects/group%2Fname", TILDE: "/~user"}


def _by_path(server: Serve) -> dict[str, tuple[int, str | None]]:
    """Status of each path at /v1/authorize, and the rule that answers in /v1/check."""
    answers = {}
    with httpx.Client(base_url=server.url) as client:
        for path in (*RULES, OTHER):
            authorized = client.get("/v1/authorize", headers={"X-API-Key": FREE, "X-Original-URI": path})
            checked = client.post("/v1/check", json={"path": path, "api_key": FREE}).json()
            batch = client.post("/v1/check/batch", json={"checks": [{"path": path, "api_key": FREE}]}).json()["decisions"][0]
            assert checked.get("rule") == batch.get("rule")
            answers[path] = (authorized.status_code, checked.get("rule"))
    return answers


def test_the_server_lets_through_what_its_settings_say(serve: Callable[..., Serve], tmp_path: Path) -> None:
    (tmp_path / "tidegate.policy.toml").write_text(POLICY)
    server = serve(grpc=True, TIDEGATE_PATHS__ENCODED_SLASHES="/projects/*", TIDEGATE_PATHS__DECODE_UNRESERVED="true")
    assert _by_path(server) == {**{path: (204, rule) for path, rule in RULES.items()}, OTHER: (400, None)}
    address = f"127.0.0.1:{server.grpc_port}"
    for path in (*RULES, OTHER):
        answer = ask(address, request([("path", path), ("api_key", FREE)]))
        assert answer.overall_code == (OVER_LIMIT if path == OTHER else OK), path
    with Client(server.url) as client:
        for path, rule in RULES.items():
            assert client.check(path, api_key=FREE).rule == rule
        with pytest.raises(BadRequest, match="encoded slash"):
            client.check(OTHER, api_key=FREE)


def test_by_default_the_server_rejects_them(serve: Callable[..., Serve], tmp_path: Path) -> None:
    (tmp_path / "tidegate.policy.toml").write_text(POLICY)
    server = serve(grpc=True)
    assert _by_path(server) == dict.fromkeys((*RULES, OTHER), (400, None))
    answer = ask(f"127.0.0.1:{server.grpc_port}", request([("path", SLASH), ("api_key", FREE)]))
    assert answer.overall_code == OVER_LIMIT


def test_a_pattern_that_no_path_matches_ends_the_start(serve: Callable[..., Serve]) -> None:
    code, _, err = serve("--demo", wait=False, TIDEGATE_PATHS__ENCODED_SLASHES="projects/*").stop_by_itself()
    assert code == 2
    assert "paths.encoded_slashes has 'projects/*'" in err


@pytest.mark.parametrize("opened", [True, False])
async def test_the_middleware_takes_the_same_options(tmp_path: Path, opened: bool) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    (tmp_path / "policy.toml").write_text(POLICY)
    options: dict[str, Any] = {"encoded_slashes": ["/projects/*"], "decode_unreserved": True} if opened else {}
    limited = RateLimitMiddleware(app, policy=tmp_path / "policy.toml", **options)
    transport = httpx.ASGITransport(limited)
    async with httpx.AsyncClient(transport=transport, base_url="http://api") as client:
        statuses = {path: (await client.get(path, headers={"X-API-Key": FREE})).status_code for path in (SLASH, NAMED, OTHER)}
    assert statuses == {SLASH: 200 if opened else 400, NAMED: 200 if opened else 400, OTHER: 400}


@pytest.mark.parametrize("opened", [True, False])
def test_simulate_takes_the_same_options(tmp_path: Path, opened: bool) -> None:
    (tmp_path / "policy.toml").write_text(POLICY)
    line = '203.0.113.7 - - [17/May/2015:10:05:03 +0000] "GET {} HTTP/1.1" 200 5\n'
    (tmp_path / "access.log").write_text("".join(line.format(path) for path in (*RULES, OTHER)))
    options = ["--encoded-slashes", "/projects/*", "--decode-unreserved"] if opened else []
    done = forked.run(("simulate", "access.log", "-p", "policy.toml", "--json", *options), PATIENCE_S, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    allowed = {each["rule"]: each["allowed"] for each in json.loads(done.stdout)["rules"]}
    assert allowed == {rule: int(opened) for rule in RULES.values()}
