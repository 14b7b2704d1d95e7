"""Tokens of gateways and back ends: stored in the catalog, created in both ways, and in force on a running server."""

from __future__ import annotations

import json
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from tests.conftest import free_port
from tests.integration.admin_api import Admin
from tests.integration.cli_ways import TOKEN, Runner, over_api
from tests.integration.ratelimit_client import caller, health, request
from tests.moments import PATIENCE_S, wait_until
from tests.raw_http import ask, exchange
from tests.servers.certificates import Authority
from tidegate.admin.caller_tokens import create_caller_token
from tidegate.catalog.caller_tokens import CallerTokens, make_caller_token
from tidegate.client import Client
from tidegate.doors.grpc.messages import OK, SERVING
from tidegate.errors import CatalogError

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
HEADER = "X-Tidegate-Token"
CHECK = {"path": "/api", "ip": "192.0.2.1"}


async def test_tokens_in_the_catalog(admin: Admin, monkeypatch: pytest.MonkeyPatch) -> None:
    admin.cached.caller_tokens = tokens = CallerTokens(admin.catalog)
    made = await admin.http.post("/caller-tokens", json={"name": "edge", "scopes": ["lease", "check"]})
    assert (made.status_code, made.headers["cache-control"]) == (201, "no-store")
    edge = made.json()
    assert edge | {"scopes": ["check", "lease"], "status": "active", "expires_at": None, "revoked_at": None} == edge
    other = (await admin.http.post("/caller-tokens", json={"name": "mailer", "expires_at": "2100-01-01T00:00:00Z"})).json()
    assert other["scopes"] == ["check"]
    await tokens.load()
    found = await tokens.find(edge["token"].encode())
    assert found is not None
    assert (found.name, found.scopes, found.expires_at_us) == ("edge", {"check", "lease"}, None)

    rotated = (await admin.http.post(f"/caller-tokens/{edge['id']}/rotate", json={"grace_s": 60})).json()
    assert (rotated["name"], rotated["scopes"], rotated["expires_at"]) == ("edge", ["check", "lease"], None)
    assert rotated["replaces"]["status"] == "active"
    assert rotated["replaces"]["expires_at"] is not None
    replaced = (await admin.http.post(f"/caller-tokens/{rotated['id']}/rotate")).json()
    assert replaced["replaces"]["status"] == "revoked"
    assert (await admin.http.delete(f"/caller-tokens/{other['id']}")).json()["status"] == "revoked"
    await tokens.load()
    working = [await tokens.find(each["token"].encode()) is not None for each in (edge, other, rotated, replaced)]
    assert working == [True, False, False, True]

    listed = (await admin.http.get("/caller-tokens", params={"limit": 2})).json()
    rest = (await admin.http.get("/caller-tokens", params={"after": listed["next"]})).json()
    everything = listed["items"] + rest["items"]
    assert [(each["id"], each["name"]) for each in everything] == [(1, "edge"), (2, "mailer"), (3, "edge"), (4, "edge")]
    audit = (await admin.http.get("/audit-log", params={"kind": "caller_token"})).json()["items"]
    assert [(each["action"], each["target"]) for each in reversed(audit)] == [
        *(("create", "1"), ("create", "2"), ("rotate", "3"), ("rotate", "1"), ("rotate", "4"), ("rotate", "3"), ("revoke", "2"))
    ]
    assert "tgc_" not in json.dumps([everything, audit])

    monkeypatch.setattr("tidegate.admin.caller_tokens.MAX_LIVE", 2)
    with pytest.raises(CatalogError, match="2 caller tokens are active, and at most 2 are possible"):
        await create_caller_token(admin.editor, "me", "third", ["check"])


REFUSED: tuple[tuple[str, str, Any, int, str], ...] = (
    ("POST", "", {"name": ""}, 400, "at least 1 character"),
    ("POST", "", {"name": "n" * 201}, 400, "at most 200"),
    ("POST", "", {"name": "a\u202eb"}, 400, "U+202E"),
    ("POST", "", {"name": "edge"}, 409, "is named 'edge' already: rotate that one"),
    ("POST", "", {"name": "n", "scopes": []}, 400, "at least 1 item"),
    ("POST", "", {"name": "n", "scopes": ["admin"]}, 400, "'check', 'limit', 'hold' or 'lease'"),
    ("POST", "", {"name": "n", "expires_at": "2001-01-01T00:00:00Z"}, 400, "expires_at is in the past"),
    ("POST", "/1/rotate", {"grace_s": -1}, 400, "greater than or equal to 0"),
    ("POST", "/2/rotate", {}, 409, "is revoked: create a new one instead"),
    ("DELETE", "/2", None, 409, "revoked already"),
    ("DELETE", "/99", None, 404, "no caller token 99"),
    ("DELETE", "/0", None, 400, "greater than or equal to 1"),
    ("GET", "?after=x", None, 400, "after"),
)


async def test_what_the_admin_api_refuses(admin: Admin) -> None:
    for name in ("edge", "gone"):
        await create_caller_token(admin.editor, "me", name, ["check"])
    await admin.http.delete("/caller-tokens/2")
    for method, path, body, status, said in REFUSED:
        answer = await admin.http.request(method, f"/caller-tokens{path}", json=body)
        assert answer.status_code == status, (path, body, answer.text)
        assert said in answer.json()["error"]["message"]


async def test_viewers_neither_read_nor_make_them(admin: Admin) -> None:
    viewer = (await admin.http.post("/tokens", json={"name": "eyes", "role": "viewer"})).json()
    async with admin.client(viewer["token"]) as http:
        assert (await http.get("/caller-tokens")).status_code == 403
        assert (await http.post("/caller-tokens", json={"name": "n"})).status_code == 403


def called(channel: grpc.Channel, metadata: list[tuple[str, str]] | None = None) -> grpc.StatusCode | None:
    """The status of a refused call of `ShouldRateLimit`; None for one that is answered."""
    message = request([("method", "GET"), ("path", "/api"), ("remote_address", "192.0.2.1")])
    try:
        assert caller(channel)(message, timeout=PATIENCE_S, wait_for_ready=True, metadata=metadata).overall_code == OK
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()  # type: ignore[attr-defined]
        return code
    return None


def test_a_running_server(
    serve: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tidegate.policy.toml").write_text(POLICY)
    environment = {"TIDEGATE_CALLERS_AUTH__MODE": "token", "TIDEGATE_SERVER__LOG_LEVEL": "debug"}
    server = serve(grpc=True, TIDEGATE_ADMIN__TOKEN=TOKEN, **environment)
    run = Runner(tmp_path, monkeypatch, capsys)
    in_database = run.way()
    api = over_api(run, server, tmp_path / "elsewhere")

    def made(way: Runner, *arguments: str) -> Any:
        ran = way("caller-tokens", *arguments, "--json")
        assert ran.code == 0, ran.err
        return json.loads(ran.out)

    def status(token: str, path: str = "/v1/check", **options: Any) -> int:
        body = None if path == "/v1/usage" else CHECK
        with httpx.Client(base_url=server.url, headers={HEADER: token}) as http:
            return http.request("GET" if body is None else "POST", path, json=body, **options).status_code

    edge = made(api, "create", "--name", "edge")
    mailer = made(in_database, "create", "--name", "mailer", "--scope", "limit")
    # At once where it was created, and within a second of a change in the database.
    assert status(edge["token"]) == 200
    wait_until(lambda: status(mailer["token"]) == 403)
    assert status(edge["token"], "/v1/usage") == 200
    assert status(make_caller_token()) == 401
    assert httpx.post(f"{server.url}/v1/check", json=CHECK).status_code == 401
    for path in ("/health", "/metrics", "/readyz", "/livez", "/openapi.json"):
        assert httpx.get(f"{server.url}{path}").status_code == 200
    schemes = httpx.get(f"{server.url}/openapi.json").json()["components"]["securitySchemes"]
    assert schemes["CallerToken"]["name"].lower() == HEADER.lower()

    # gRPC: the token is in the metadata, and health needs none.
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        assert health(channel) == SERVING
        for sent, expected in (
            ([], grpc.StatusCode.UNAUTHENTICATED),
            ([("x-tidegate-token", make_caller_token())], grpc.StatusCode.UNAUTHENTICATED),
            ([("x-tidegate-token", mailer["token"])], grpc.StatusCode.PERMISSION_DENIED),
            ([("x-tidegate-token", edge["token"])] * 2, grpc.StatusCode.INVALID_ARGUMENT),
            ([("x-tidegate-token", edge["token"])], None),
            ([("x-tidegate-token", edge["token"])], None),
        ):
            assert called(channel, sent) == expected
    codes = httpx.get(f"{server.url}/metrics").text
    assert 'type="caller_forbidden"' in codes

    # The client and the command send it; the client treats a refusal as a failure of the limiter, which on_failure decides.
    with Client(server.url, deadline_s=30, on_failure="raise", token=edge["token"]) as client:
        assert client.check("/api", ip="192.0.2.1").allowed
        assert client.usage().tier == "free"
    with Client(server.url, deadline_s=30, token=mailer["token"]) as client:
        answer = client.check("/api", ip="192.0.2.1")
        assert (answer.allowed, answer.failed) == (True, True)
        assert "CALLER_FORBIDDEN" in str(answer.failure)
    (tmp_path / "edge.token").write_text(edge["token"] + "\n")
    check = ("check", "-", "GET", "/api", "--ip", "192.0.2.1", "--url", server.url)
    assert run(*check, "--token-file", "edge.token").code == 0
    assert run.way(TIDEGATE_TOKEN=edge["token"])(*check).code == 0
    without = run(*check)
    assert (without.code, "CALLER_UNAUTHENTICATED: the caller sent no token" in without.err) == (2, True)

    # Bytes that only a raw request can have; the connection that has a known token does not lend it to the next request.
    port, token = server.port, edge["token"].encode()
    head = b"GET /v1/authorize HTTP/1.1\r\nHost: t\r\nX-Original-URI: /api\r\n"
    line = b"x-tidegate-token: "
    requests = [
        line + token,
        b"",
        line + token + b"\r\n" + line + token,
        line + token[:-1] + b"\xe9",
        line + token,
        line + b"x" * 10_000 + b"\r\nConnection: close",
    ]
    answers = exchange(port, b"".join(head + (each and each + b"\r\n") + b"\r\n" for each in requests))
    assert [answer.status for answer in answers] == [204, 401, 400, 401, 204, 401]
    assert answers[1].headers["x-tidegate-error"] == "CALLER_UNAUTHENTICATED"
    assert ask(port, "/v1/authorize", headers={HEADER: "Bearer " + edge["token"], "X-Original-URI": "/api"}).status == 204

    # A kept connection is refused as soon as its token is revoked, whichever way that was done.
    for way in (api, in_database):
        used = made(way, "rotate", str(edge["id"]), "--grace", "1h")
        with httpx.Client(base_url=server.url, headers={HEADER: used["token"]}) as http:
            wait_until(lambda http=http: http.post("/v1/check", json=CHECK).status_code == 200)
            assert made(way, "revoke", str(used["id"]))["status"] == "revoked"
            wait_until(lambda http=http: http.post("/v1/check", json=CHECK).status_code == 401)
    assert status(edge["token"]) == 200, "its time of grace has not passed"
    assert [each["status"] for each in made(api, "list")] == ["active", "active", "revoked", "revoked"]
    assert made(api, "list") == made(in_database, "list")

    refused = api("caller-tokens", "revoke", "3")
    assert (refused.code, refused.err) == (2, "tidegate: CATALOG_REFUSED: the caller token 3 is revoked already\n")
    assert in_database("caller-tokens", "revoke", "3").err == refused.err
    assert api("caller-tokens", "create", "--name", " ").code == 2

    code, out, err = server.stop()
    assert code == 0
    assert "caller at 127.0.0.1 refused: " in err
    assert not [each for each in (edge, mailer) if each["token"] in out + err]


def test_callers_with_certificates(serve: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "tidegate.policy.toml").write_text(POLICY)
    authority, probes = Authority(tmp_path / "pki"), free_port()
    server = serve(
        wait=False,
        grpc=True,
        TIDEGATE_SERVER__PROBES=f"127.0.0.1:{probes}",
        TIDEGATE_TLS__CERT=str(authority.server_cert),
        TIDEGATE_TLS__KEY=str(authority.server_key),
        TIDEGATE_TLS__CLIENT_CA=str(authority.ca),
        TIDEGATE_CALLERS_AUTH__MODE="mtls",
        TIDEGATE_CALLERS_AUTH__NAMES="*.tidegate.test",
    )
    server.url = f"http://127.0.0.1:{probes}"
    server.wait_ready()
    for files, status, code in (
        ((authority.client_cert, authority.client_key), 200, None),
        (authority.issue("other", "client.other.test"), 403, grpc.StatusCode.PERMISSION_DENIED),
    ):
        context = ssl.create_default_context(cafile=authority.ca)
        context.load_cert_chain(*files)
        with httpx.Client(base_url=f"https://127.0.0.1:{server.port}", verify=context) as http:
            # A token does not count, and probes need no name.
            headers = {HEADER: make_caller_token()}
            assert [http.post("/v1/check", json=CHECK, headers=headers).status_code for _ in range(2)] == [status] * 2
            assert http.get("/readyz").status_code == 200
        credentials = grpc.ssl_channel_credentials(authority.ca.read_bytes(), files[1].read_bytes(), files[0].read_bytes())
        with grpc.secure_channel(f"127.0.0.1:{server.grpc_port}", credentials) as channel:
            assert health(channel) == SERVING
            assert [called(channel) for _ in range(2)] == [code] * 2
