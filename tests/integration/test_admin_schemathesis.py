"""schemathesis against the OpenAPI description of the control plane, with an operator's token, on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from tests.integration.admin_api import TOKEN, open_admin
from tests.integration.conftest import DATABASES
from tests.moments import PATIENCE_S, wait_until
from tests.servers.postgres import PostgresServer
from tests.unit.test_policy_file import WHOLE
from tidegate.doors.http_asgi import AsgiAdapter
from tidegate.policy.toml_reader import parse_policy
from tidegate.server.addresses import free_address
from tidegate.server.listener import Listener

OPERATIONS = {
    *(("get", path) for path in ("/tiers", "/tiers/{name}", "/rate-limit-rules", "/rate-limit-rules/{rule_id}")),
    *(("get", path) for path in ("/api-keys", "/api-keys/{key_id}", "/tokens", "/usage", "/audit-log", "/policy")),
    *(("get", path) for path in ("/violations", "/violations/top", "/explain", "/system", "/live")),
    *(("get", path) for path in ("/traffic", "/traffic/callers", "/usage/export")),
    *(("post", path) for path in ("/tiers", "/rate-limit-rules", "/api-keys", "/tokens", "/counters/reset", "/policy")),
    *(("post", path) for path in ("/api-keys/{key_id}/revoke", "/api-keys/{key_id}/rotate")),
    *((method, "/tiers/{name}") for method in ("put", "patch", "delete")),
    *((method, "/rate-limit-rules/{rule_id}") for method in ("put", "patch", "delete")),
    *((method, "/api-keys/{key_id}") for method in ("patch", "delete")),
    ("put", "/api-keys/{key_id}/overrides"),
    *((method, "/customers") for method in ("get", "post")),
    *((method, "/customers/{name}") for method in ("get", "patch", "delete")),
    ("delete", "/tokens/{token_id}"),
    ("post", "/api-keys/import"),
    *((method, "/caller-tokens") for method in ("get", "post")),
    ("post", "/caller-tokens/{token_id}/rotate"),
    ("delete", "/caller-tokens/{token_id}"),
    *((method, "/namespaces") for method in ("get", "post")),
    *((method, "/namespaces/{name}") for method in ("get", "put", "patch", "delete")),
    ("get", "/callers"),
    *((method, "/tiers/{name}/overrides") for method in ("get", "post")),
    *((method, "/tiers/{name}/overrides/{override_id}") for method in ("get", "put", "delete")),
    ("post", "/what-if"),
    *((method, "/what-if/{run_id}") for method in ("get", "delete")),
    ("get", "/notifications"),
    ("post", "/notifications/{notification_id}/retry"),
    *((method, "/blocks") for method in ("get", "post")),
    *((method, "/blocks/{block_id}") for method in ("get", "delete")),
}
EXAMPLES = int(os.environ.get("SCHEMA_EXAMPLES", "15"))
"""Requests to each operation on each of two databases; `test_admin_fields` fills every field and parameter one by one."""

# What a schema cannot say: which texts are limits, patterns and moments, and that 1.0 is no whole number here. And the missing
# header that it looks for is answered 428, as RFC 6585 has it.
BEYOND_SCHEMA = ("positive_data_acceptance", "negative_data_rejection", "missing_required_header")


def _toml(_: Any, value: Any) -> bytes:
    return str(value).encode(errors="replace")


@pytest.fixture(scope="module", params=DATABASES)
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One database for all operations, so that they meet what the others made."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path_factory.mktemp('schemathesis')}/tidegate.db"
        return
    server: PostgresServer = request.getfixturevalue("postgres_server")
    made = server.new_database()
    yield made
    server.drop_database(made.rpartition("/")[2])


@pytest.fixture(scope="module")
def description(url: str) -> Iterator[Any]:
    """The description as a listener serves it."""
    import schemathesis  # takes a second of CPU time, which only those pay who run these tests

    schemathesis.serializer("application/toml")(_toml)
    address: list[str] = []
    started, stop = threading.Event(), threading.Event()

    async def run() -> None:
        admin = await open_admin(url, failed_rate="1000000/minute", failed_rate_overall="1000000/minute")
        await admin.catalog.apply_policy(parse_policy(WHOLE), "1")
        await admin.tier("own")
        host, port = free_address("127.0.0.1:0", "server.admin")
        listener = Listener(AsgiAdapter(admin.app), host, port)
        await listener.start()
        address.append(f"http://{host}:{port}")
        started.set()
        await asyncio.to_thread(stop.wait)
        await listener.stop(5)
        await admin.close()

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    try:
        assert started.wait(30)
        host, _, port = address[0].removeprefix("http://").partition(":")
        wait_until(lambda: socket.create_connection((host, int(port))).close() is None, 60, "the listener takes connections")
        yield schemathesis.openapi.from_url(f"{address[0]}/admin/v1/openapi.json")
    finally:
        stop.set()
        thread.join(PATIENCE_S)


def test_every_operation_is_described(description: Any) -> None:
    described = {(operation.ok().method, operation.ok().path) for operation in description.get_all_operations()}
    assert described == {(method, f"/admin/v1{path}") for method, path in OPERATIONS}


@pytest.mark.parametrize(("method", "path"), sorted(OPERATIONS))
def test_no_500_and_no_breach_of_the_schema(method: str, path: str, description: Any) -> None:
    from schemathesis import checks

    beyond = [getattr(checks, name) for name in BEYOND_SCHEMA]
    operation = description[f"/admin/v1{path}"][method]

    @settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy())
    def ask(case: Any) -> None:
        case.call_and_validate(headers={"Authorization": f"Bearer {TOKEN}"}, excluded_checks=beyond)

    ask()
