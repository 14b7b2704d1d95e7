"""Blocks of operators: in the catalog and its audit log, by admin API and command line, and on running servers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from tests.integration.admin_api import Admin
from tests.integration.cli_ways import TOKEN, Runner, over_api
from tests.integration.ratelimit_client import caller, request
from tests.moments import PATIENCE_S, wait_until
from tidegate.admin.block_models import BlockCreate
from tidegate.admin.blocks import create_block
from tidegate.background import stop
from tidegate.catalog.blocks import Blocks
from tidegate.catalog.follower import CatalogFollower
from tidegate.decision import Check
from tidegate.doors.grpc.messages import OK, OVER_LIMIT
from tidegate.errors import Blocked, CatalogError
from tidegate.gate.gate import Gate

POLICY = """
[attributes]
user = "header:X-User-Id"
[anonymous]
tier = "free"
[[tiers]]
name = "free"
[[tiers.rules]]
endpoint = "/*"
subject = "ip"
limits = ["1000000/minute"]
"""


async def blocked(gate: Gate, **fields: Any) -> bool:
    try:
        await gate.check(Check.of("/a", **{"ip": "192.0.2.1", **fields}))
    except Blocked:
        return True
    return False


async def test_blocks_in_the_catalog(admin: Admin, monkeypatch: pytest.MonkeyPatch) -> None:
    await admin.tier()
    assert (await admin.http.post("/customers", json={"name": "acme"})).status_code == 201
    key = await admin.key()
    assert (await admin.http.post("/policy", content='[anonymous]\ntier = "free"\n[[tiers]]\nname = "free"')).status_code == 200
    admin.cached.blocks = blocks = Blocks(admin.catalog, admin.cached.access.replace_blocks)
    await blocks.load()

    async def post(**body: Any) -> dict[str, Any]:
        answer = await admin.http.post("/blocks", json=body)
        assert answer.status_code == 201, answer.text
        return dict(answer.json())

    network = await post(cidr="203.0.113.0/24", until="2100-01-01T00:00:00Z", reason="scraper", message="write to abuse@")
    assert network | {"id": 1, "cidr": "203.0.113.0/24", "status": "active", "attribute": None, "removed_at": None} == network
    assert (network["reason"], network["message"], network["created_by"]) == ("scraper", "write to abuse@", "settings")
    # Some clients send every field.
    of_key = await post(api_key_id=key["id"], cidr=None, customer=None, attribute=None, until=None, reason=None, message=None)
    of_user = await post(attribute={"user": "4&2", "org": "acme"})
    await post(customer="acme")
    assert (await post(cidr="2001:db8::5"))["cidr"] == "2001:db8::/64"
    assert blocks._wake.is_set(), "this process was notified"
    await blocks.load()
    asked: tuple[dict[str, Any], ...] = (
        {"ip": "203.0.113.9"},
        {"api_key": key["api_key"]},
        {"attributes": {"user": "4&2", "org": "acme"}},
        {"ip": "2001:db8::9"},
    )
    assert [await blocked(admin.gate, **each) for each in asked] == [True] * 4
    assert not await blocked(admin.gate, attributes={"user": "4&2"})

    listed = (await admin.http.get("/blocks", params={"limit": 2})).json()
    rest = (await admin.http.get("/blocks", params={"after": listed["next"]})).json()
    assert [each["id"] for each in listed["items"] + rest["items"]] == [5, 4, 3, 2, 1]
    for query, ids in (
        ({"ip": "203.0.113.77"}, [1]),
        ({"ip": "64:ff9b::203.0.113.77"}, [1]),
        ({"kind": "attribute"}, [3]),
        ({"target": "org=acme&user=4%262"}, [3]),
        ({"status": "ended"}, []),
    ):
        found = (await admin.http.get("/blocks", params=query)).json()["items"]
        assert [each["id"] for each in found] == ids, query

    removed = (await admin.http.delete("/blocks/1")).json()
    assert (removed["status"], removed["removed_at"] is not None) == ("removed", True)
    assert (await admin.http.get("/blocks/1")).json() == removed
    await blocks.load()
    assert [await blocked(admin.gate, **each) for each in asked] == [False, True, True, True]
    assert (await post(cidr="203.0.113.0/24"))["id"] == 6, "it can be blocked again"
    audit = (await admin.http.get("/audit-log", params={"kind": "block"})).json()["items"]
    assert [(each["action"], each["target"]) for each in audit] == [
        *(("create", "6"), ("delete", "1"), ("create", "5"), ("create", "4"), ("create", "3"), ("create", "2"), ("create", "1"))
    ]
    assert audit[1]["before"]["reason"] == "scraper"
    assert key["api_key"] not in json.dumps([listed, audit, of_key, of_user])

    # A process that starts later has them all.
    later = Blocks(admin.catalog, lambda _: None)
    await later.load()
    assert len(later) == 5

    monkeypatch.setattr("tidegate.admin.blocks.MAX_BLOCKS", 5)
    with pytest.raises(CatalogError, match="5 blocks are active, which is the maximum"):
        await create_block(admin.editor, "me", BlockCreate(cidr="198.51.100.1"))


async def test_another_instance_follows(admin: Admin) -> None:
    await admin.tier()
    admin.cached.blocks = blocks = Blocks(admin.catalog, admin.cached.access.replace_blocks)
    await blocks.load()
    admin.cached.changed(await admin.catalog.changes(0))
    follower = CatalogFollower(admin.catalog, admin.cached, 0.01)
    # As the command line does in the database: nothing tells this process.
    others = type(admin.editor)(admin.catalog, lambda *_: None)
    await create_block(others, "cli", BlockCreate(cidr="203.0.113.9", until="2100-01-01T00:00:00Z"))
    assert await follower.poll()
    running = asyncio.create_task(blocks.run())
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not len(blocks):
                await asyncio.sleep(0.01)
    finally:
        await stop(running)
    assert admin.cached.access.blocks.named.ipv4


REFUSED: tuple[tuple[str, str, Any, int, str], ...] = (
    ("POST", "", {}, 400, "exactly one of cidr, api_key_id, customer and attribute, not 0"),
    ("POST", "", {"cidr": "10.0.0.1", "customer": "acme"}, 400, "not 2"),
    ("POST", "", {"cidr": "10.0.0.7/8"}, 400, "write 10.0.0.0/8 for the network"),
    ("POST", "", {"cidr": "64.0.0.0/2"}, 400, "too wide for a block: at least /8"),
    ("POST", "", {"cidr": "2000::/3"}, 400, "too wide for a block: at least /16"),
    ("POST", "", {"cidr": "localhost"}, 400, "is not valid: write 203.0.113.0/24"),
    ("POST", "", {"cidr": "203.0.113.9/32"}, 409, "is blocked already, by block 1, without an end: delete that one first"),
    ("POST", "", {"cidr": "10.0.0.1", "until": "2001-01-01T00:00:00Z"}, 400, "until is in the past"),
    ("POST", "", {"cidr": "10.0.0.1", "until": "soon"}, 400, "until"),
    ("POST", "", {"api_key_id": "0" * 24}, 404, "there is no API key 000"),
    ("POST", "", {"customer": "nobody"}, 404, "there is no customer 'nobody'"),
    ("POST", "", {"api_key_id": "short"}, 400, "24 hex digits"),
    ("POST", "", {"attribute": {}}, 400, "is empty"),
    ("POST", "", {"attribute": {"user": "4*"}}, 400, "one exact value"),
    ("POST", "", {"attribute": {"ip": "1.2.3.4"}}, 400, "name of a subject"),
    ("POST", "", {"attribute": {"a": "x" * 256, "b": "y" * 256}}, 400, "may have 400 characters, and these have 517"),
    ("POST", "", {"cidr": "10.0.0.1", "reason": "x" * 1001}, 400, "at most 1000"),
    ("DELETE", "/2", None, 409, "is removed already"),
    ("DELETE", "/99", None, 404, "no block 99"),
    ("GET", "/99", None, 404, "no block 99"),
    ("GET", "?after=x", None, 400, "after"),
    ("GET", "?ip=x", None, 400, "is not an IPv4 or IPv6 address"),
    ("GET", "?status=gone", None, 400, "status"),
)


async def test_what_the_admin_api_refuses(admin: Admin) -> None:
    for address in ("203.0.113.9", "203.0.113.10"):
        await create_block(admin.editor, "me", BlockCreate(cidr=address))
    await admin.http.delete("/blocks/2")
    for method, path, body, status, said in REFUSED:
        answer = await admin.http.request(method, f"/blocks{path}", json=body)
        assert answer.status_code == status, (path, body, answer.text)
        assert said in answer.json()["error"]["message"]
    viewer = (await admin.http.post("/tokens", json={"name": "eyes", "role": "viewer"})).json()
    async with admin.client(viewer["token"]) as http:
        assert (await http.get("/blocks")).status_code == 200
        assert (await http.post("/blocks", json={"cidr": "10.0.0.1"})).status_code == 403


def test_a_running_server(
    serve: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tidegate.policy.toml").write_text(POLICY)
    server = serve(grpc=True, TIDEGATE_ADMIN__TOKEN=TOKEN, TIDEGATE_SERVER__TRUSTED_PROXIES="127.0.0.1")
    run = Runner(tmp_path, monkeypatch, capsys)
    in_database = run.way()
    api = over_api(run, server, tmp_path / "elsewhere")

    def made(way: Runner, *arguments: str) -> Any:
        ran = way("blocks", *arguments, "--json")
        assert ran.code == 0, ran.err
        return json.loads(ran.out)

    with httpx.Client(base_url=server.url, timeout=PATIENCE_S) as http:

        def check(ip: str, **fields: Any) -> int:
            return http.post("/v1/check", json={"path": "/api", "ip": ip, **fields}).status_code

        for number, way in enumerate((api, in_database)):
            ip = f"203.0.113.{number}"
            assert check(ip) == 200
            block = made(way, "add", ip, "--for", "1h", "--reason", "scraper")
            wait_until(lambda ip=ip: check(ip) == 403)
            assert made(way, "list", "--ip", ip) == [block]
            assert made(way, "remove", str(block["id"]))["status"] == "removed"
            wait_until(lambda ip=ip: check(ip) == 200)
        assert made(api, "list", "--ended") == made(in_database, "list", "--ended")

        made(api, "add", "198.51.100.0/24", "--reason", "secret reason", "--message", "write to abuse@example.com")
        made(api, "add", "--attribute", "user=42")
        wait_until(lambda: check("198.51.100.1") == 403 and check("192.0.2.1", attributes={"user": "42"}) == 403)
        answer = http.post("/v1/check", json={"path": "/api", "ip": "198.51.100.1"})
        assert answer.json() == {"error": {"code": "BLOCKED", "message": "write to abuse@example.com", "details": {}}}
        gateway = {"X-Original-URI": "/api", "X-Real-IP": "198.51.100.1"}
        for headers in (gateway, {**gateway, "X-Real-IP": "192.0.2.1", "X-User-Id": "42"}):
            answer = http.get("/v1/authorize", headers=headers)
            assert (answer.status_code, answer.headers["x-tidegate-error"], answer.content) == (403, "BLOCKED", b"")
            assert answer.headers["cache-control"] == "no-store"
        batch = http.post("/v1/check/batch", json={"checks": [{"path": "/a", "ip": ip} for ip in ("198.51.100.1", "192.0.2.1")]})
        assert [each.get("allowed") for each in batch.json()["decisions"]] == [None, True]
        made(api, "add", "--attribute", "namespace=emails&subject=spammer")
        limit = {"namespace": "emails", "subject": "spammer", "limits": ["1/day"]}
        wait_until(lambda: http.post("/v1/limit", json=limit).status_code == 403)
        with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
            for ip, code in (("198.51.100.1", OVER_LIMIT), ("192.0.2.1", OK)):
                message = request([("method", "GET"), ("path", "/api"), ("remote_address", ip)])
                replied = caller(channel)(message, timeout=PATIENCE_S, wait_for_ready=True)
                assert replied.overall_code == code
                assert ("x-tidegate-error" in [each.key for each in replied.response_headers_to_add]) == (code == OVER_LIMIT)
        metrics = http.get("/metrics").text
        assert 'rate_limiter_errors_total{type="blocked"}' in metrics
        assert "rate_limiter_blocks 3.0" in metrics
        assert 'rate_limiter_access_total{action="denied"}' in metrics

    refused = api("blocks", "remove", "1")
    assert (refused.code, refused.err) == (2, "tidegate: CATALOG_REFUSED: the block 1 is removed already\n")
    assert in_database("blocks", "remove", "1").err == refused.err
    assert api("blocks", "add").code == 2
    assert in_database("blocks", "add", "--attribute", "42").code == 2
    assert "secret reason" in api("blocks", "list").out
    code, out, err = server.stop()
    assert code == 0
    assert "secret reason" not in out + err
