"""The log of a running server: what a request leaves in it, and that no secret ever does."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from tests.integration.ratelimit_client import SHOULD_RATE_LIMIT, ask, request
from tests.moments import PATIENCE_S
from tests.servers.postgres import PostgresServer
from tests.servers.redis_server import RedisServer
from tidegate.doors.grpc.messages import OK, OVER_LIMIT
from tidegate.policy.key_format import make_api_key

POLICY = """\
[[tiers]]
name = "free"
limits = ["2/day"]
[[api_keys]]
key = "policy-file-key-0001"
tier = "free"
"""
TOKEN = "the-operator-of-the-settings"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.fixture
def logged(serve: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    (tmp_path / "tidegate.policy.toml").write_text(POLICY)

    def start(**environment: str) -> Any:
        return serve(**{"TIDEGATE_ADMIN__TOKEN": TOKEN, **environment})

    return start


def lines_of(server: Any) -> list[dict[str, Any]]:
    code, _, err = server.stop()
    assert code == 0
    return [json.loads(line) for line in err.splitlines()]


def of(lines: list[dict[str, Any]], dataset: str) -> list[dict[str, Any]]:
    return [line for line in lines if line["event"]["dataset"] == dataset]


def test_the_access_log_reports_what_was_asked_and_decided(logged: Callable[..., Any]) -> None:
    server = logged(TIDEGATE_SERVER__ACCESS_LOG_SAMPLE="1")
    headers = {"X-API-Key": "policy-file-key-0001", "X-Original-URI": "/api/a?secret=1", "X-Original-Method": "PUT"}
    traced = {**headers, "X-Request-Id": "req-1", "traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}
    assert httpx.get(f"{server.url}/v1/authorize", headers=traced).status_code == 204
    assert httpx.get(f"{server.url}/v1/authorize", headers=headers).status_code == 204
    assert httpx.get(f"{server.url}/v1/authorize", headers=headers).status_code == 429
    refused = httpx.post(
        f"{server.url}/v1/check", json={"path": "/a", "api_key": "nobody-has-this-key"}, headers={"X-Request-Id": "r2"}
    )
    assert refused.status_code == 401
    assert refused.headers["x-request-id"] == "r2"
    assert httpx.post(f"{server.url}/v1/check", content="{").status_code == 400
    httpx.post(f"{server.url}/v1/check/batch", json={"checks": [{"path": "/a", "api_key": "policy-file-key-0001"}] * 3})
    first, second, third, unknown, malformed, batch = of(lines_of(server), "tidegate.access")
    assert first["http"] == {"request": {"id": "req-1", "method": "PUT"}, "response": {"status_code": 204}}
    assert first["trace"]["id"] == TRACE
    assert first["url"]["path"] == "/api/a"
    assert first["client"]["ip"] == "127.0.0.1"
    assert first["tidegate"]["tier"] == "free"
    assert first["tidegate"]["allowed"] is True
    assert first["tidegate"]["remaining"] == 1
    assert first["tidegate"]["key_id"]
    assert first["event"]["duration"] > 0
    assert len(second["http"]["request"]["id"]) == 32, "made where none came"
    assert third["tidegate"]["allowed"] is False
    assert third["http"]["response"]["status_code"] == 429
    assert unknown["error"]["code"] == "INVALID_API_KEY"
    assert unknown["event"]["outcome"] == "failure"
    assert malformed["error"]["code"] == "BAD_REQUEST"
    assert batch["tidegate"]["door"] == "/v1/check/batch"


def test_calls_over_grpc_are_in_the_access_log_too(serve: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "tidegate.policy.toml").write_text(POLICY)
    server = serve(grpc=True, TIDEGATE_ADMIN__TOKEN=TOKEN, TIDEGATE_SERVER__ACCESS_LOG_SAMPLE="1")
    address = f"127.0.0.1:{server.grpc_port}"
    entries = [
        ("api_key", "policy-file-key-0001"),
        ("method", "PUT"),
        ("path", "/api/a?secret=1"),
        ("remote_address", "203.0.113.7"),
    ]
    traceparent = f"00-{TRACE}-00f067aa0ba902b7-01"
    assert ask(address, request(entries), x_request_id="req-1", traceparent=traceparent).overall_code == OK
    ask(address, request(entries))
    assert ask(address, request(entries)).overall_code == OVER_LIMIT
    ask(address, request(entries, [("api_key", "nobody-has-this-key"), ("path", "/a")]))
    with pytest.raises(grpc.RpcError):
        ask(address, request(entries, domain=""), x_request_id="req-5")
    first, second, third, two, refused = of(lines_of(server), "tidegate.access")
    assert first["http"] == {"request": {"id": "req-1", "method": "PUT"}}
    assert first["trace"]["id"] == TRACE
    assert first["url"]["path"] == "/api/a"
    assert first["client"]["ip"] == "203.0.113.7"
    assert first["tidegate"]["door"] == SHOULD_RATE_LIMIT
    assert (first["tidegate"]["grpc_answer"], first["tidegate"]["allowed"]) == ("OK", True)
    assert first["event"]["duration"] > 0
    assert len(second["http"]["request"]["id"]) == 32, "made where none came"
    assert (third["tidegate"]["grpc_answer"], third["tidegate"]["allowed"]) == ("OVER_LIMIT", False)
    assert (two["tidegate"]["grpc_answer"], "url" in two) == ("OVER_LIMIT", False), "of several descriptors no path is the one"
    assert (refused["tidegate"]["grpc_answer"], refused["http"]["request"]["id"]) == ("INVALID_ARGUMENT", "req-5")
    assert "policy-file-key-0001" not in json.dumps([first, second, third, two, refused])


def test_a_sample_is_a_sample_and_off_by_default(logged: Callable[..., Any]) -> None:
    for sample, least, most in ((None, 0, 0), ("0.2", 1, 199)):
        server = logged(**({} if sample is None else {"TIDEGATE_SERVER__ACCESS_LOG_SAMPLE": sample}))
        with httpx.Client(base_url=server.url) as client:
            for _ in range(200):
                client.get("/v1/authorize")
        assert least <= len(of(lines_of(server), "tidegate.access")) <= most


def test_requests_at_once_are_distinguished(logged: Callable[..., Any]) -> None:
    server = logged(TIDEGATE_SERVER__ACCESS_LOG_SAMPLE="1")

    def ask(number: int) -> None:
        headers = {"X-Request-Id": f"req-{number}", "X-API-Key": "policy-file-key-0001", "X-Original-URI": f"/path/{number}"}
        httpx.get(f"{server.url}/v1/authorize", headers=headers)

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(ask, range(200)))
    told = {line["http"]["request"]["id"]: line["url"]["path"] for line in of(lines_of(server), "tidegate.access")}
    assert told == {f"req-{number}": f"/path/{number}" for number in range(200)}


def test_the_control_plane_reports_who_changed_what(logged: Callable[..., Any]) -> None:
    server = logged()
    admin = f"http://127.0.0.1:{server.admin_port}/admin/v1"
    headers = {"Authorization": f"Bearer {TOKEN}", "X-Request-Id": "change-1"}
    made = httpx.post(f"{admin}/tiers", json={"name": "pro"}, headers=headers)
    assert made.status_code == 201
    assert made.headers["x-request-id"] == "change-1"
    assert httpx.get(f"{admin}/tiers", headers=headers).headers["x-request-id"] == "change-1"
    refused = httpx.post(f"{admin}/tiers", json={"name": "pro"}, headers={"Authorization": "Bearer tga_wrong"})
    assert refused.status_code == 401
    assert refused.headers["x-request-id"]
    done, tried = of(lines_of(server), "tidegate.admin")
    assert done["http"]["request"] == {"id": "change-1", "method": "POST"}
    assert done["http"]["response"]["status_code"] == 201
    assert done["user"]["name"] == "settings"
    assert done["url"]["path"] == "/admin/v1/tiers"
    assert tried["http"]["response"]["status_code"] == 401
    assert "user" not in tried


def test_a_hung_reader_of_the_log_stops_no_check(logged: Callable[..., Any]) -> None:
    """Standard error is a pipe that this test does not read: a gateway must not wait for it."""
    server = logged(TIDEGATE_SERVER__ACCESS_LOG_SAMPLE="1")
    headers = {"X-API-Key": "policy-file-key-0001", "X-Original-URI": "/" + "a" * 400}
    with httpx.Client(base_url=server.url, headers=headers, timeout=PATIENCE_S) as client:
        for _ in range(300):  # some 250 kB of lines: four times what the pipe holds
            assert client.get("/v1/authorize").status_code in (204, 429)
    assert len(of(lines_of(server), "tidegate.access")) == 300, "what waited is read in the end"


def test_no_secret_is_in_any_log(logged: Callable[..., Any], postgres_server: PostgresServer, tmp_path: Path) -> None:
    """At the most talkative level, with everything going wrong that talks about keys, tokens or passwords."""
    made, unknown = make_api_key(), "unknown-key-of-nobody-0042"
    redis_password, postgres_password, token = "redis-pass-0001", "postgres-pass-0002", "tga_" + "Z9" * 20
    database = postgres_server.new_database()
    name = database.rpartition("/")[2]
    postgres_server.execute(f"CREATE ROLE secretive LOGIN SUPERUSER PASSWORD '{postgres_password}'")
    host_and_rest = database.partition("@")[2] or database.partition("://")[2]
    try:
        with RedisServer("redis", {"requirepass": redis_password}) as redis:
            server = logged(
                TIDEGATE_SERVER__LOG_LEVEL="debug",
                TIDEGATE_SERVER__ACCESS_LOG_SAMPLE="1",
                TIDEGATE_COUNTERS__URL=f"redis://:{redis_password}@127.0.0.1:{redis.port}",
                TIDEGATE_CATALOG__URL=f"postgresql://secretive:{postgres_password}@{host_and_rest}",
                TIDEGATE_CATALOG__TIMEOUT_S="0.5",
            )
            admin = httpx.Client(
                base_url=f"http://127.0.0.1:{server.admin_port}/admin/v1", headers={"Authorization": f"Bearer {TOKEN}"}
            )
            with admin:
                assert admin.post("/tiers", json={"name": "pro"}).status_code == 201
                answer = admin.post("/api-keys", json={"tier": "pro", "name": "shop"})
                created = answer.json()["api_key"]
                operator = admin.post("/tokens", json={"name": "bot", "role": "viewer"}).json()["token"]
                admin.get("/tiers", headers={"Authorization": f"Bearer {token}"})
                admin.post(f"/api-keys/{created}/revoke", json={"reason": "typed the key in place of its id"})
                admin.get("/violations", params={"api_key": created})
            paths = [f"/api/{made}/x", f"/api?api_key={unknown}", "/api/%00", "/a\r\nX-API-Key: " + unknown]
            for key in (made, unknown, created, "policy-file-key-0001", made[:-1], token):
                for path in paths:
                    httpx.post(f"{server.url}/v1/check", json={"path": path, "api_key": key})
                    httpx.post(
                        f"{server.url}/v1/check", json={"path": path, "api_key": key, "cost": "x"}, headers={"X-API-Key": unknown}
                    )
                httpx.post(f"{server.url}/v1/check", content=f'{{"api_key": "{key}", "path"')
                headers = {"X-API-Key": key, "X-Original-URI": "/a", "Authorization": f"Bearer {operator}"}
                httpx.get(f"{server.url}/v1/authorize?api_key={key}", headers=headers)
                httpx.get(f"{server.url}/nothing/{key}")
            # Now what they stand on goes away, and comes back.
            os.kill(redis.pid, signal.SIGSTOP)
            postgres_server.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
            postgres_server.execute("ALTER ROLE secretive PASSWORD 'changed-meanwhile'")
            for number in range(10):
                httpx.post(f"{server.url}/v1/check", json={"path": f"/b{number}", "api_key": created})
                httpx.post(f"{server.url}/v1/check", json={"path": "/b", "api_key": f"{unknown}{number}"})
            time.sleep(1.5)
            os.kill(redis.pid, signal.SIGCONT)
            time.sleep(0.5)
            code, out, err = server.stop()
    finally:
        postgres_server.drop_database(name)
        postgres_server.execute("DROP ROLE secretive")
    assert code == 0, err
    lines = [json.loads(line) for line in err.splitlines()]
    assert len(lines) > 50, "there is something to look through"
    assert any(line["log.level"] in ("warning", "error") for line in lines)
    for secret in (made, unknown, created, operator, token, TOKEN, redis_password, postgres_password, "policy-file-key-0001"):
        for where in (out, err):
            assert secret not in where, f"{secret} is in: {[line for line in where.splitlines() if secret in line][:2]}"
