"""schemathesis against the OpenAPI description that the data plane itself serves."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

import tidegate
from tests.moments import PATIENCE_S
from tidegate.server import run as server
from tidegate.settings import CatalogSettings, PolicySettings, ServerSettings, Settings

OPERATIONS = {
    ("post", "/v1/check"),
    ("post", "/v1/check/batch"),
    ("post", "/v1/limit"),
    ("post", "/v1/limit/batch"),
    ("post", "/v1/holds"),
    ("post", "/v1/holds/{id}/settle"),
    ("post", "/v1/holds/{id}/renew"),
    ("post", "/v1/reserve"),
    ("post", "/v1/reserve/{id}/cancel"),
    ("get", "/v1/authorize"),
    ("get", "/v1/usage"),
    ("head", "/v1/usage"),
    ("head", "/v1/authorize"),
    ("get", "/health"),
    ("get", "/readyz"),
    ("get", "/livez"),
    ("get", "/metrics"),
    *((method, "/v1/authorize/envoy") for method in ("get", "head", "post", "put", "patch", "delete", "options")),
}
# What a schema cannot say: which spellings of a path are refused, and that 1.0 is no whole number here.
BEYOND_SCHEMA = ("positive_data_acceptance", "negative_data_rejection")


@pytest.fixture(scope="module")
def description(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The description as a running instance serves it."""
    import schemathesis  # takes a second of CPU time, which only those pay who run these tests

    directory = tmp_path_factory.mktemp("schemathesis")
    configured = Settings(
        server=ServerSettings(http="127.0.0.1:0", admin="", grpc="", drain_s=1.0),
        policy=PolicySettings(file=str(Path(tidegate.__file__).parent / "example.policy.toml")),
        catalog=CatalogSettings(url=f"sqlite:///{directory}/tidegate.db"),
    )
    address: list[str] = []
    started, stop = threading.Event(), threading.Event()

    async def run() -> None:
        async with server.running(configured) as instance:
            address.append(instance.address)
            started.set()
            await asyncio.to_thread(stop.wait)

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    assert started.wait(30)
    try:
        yield schemathesis.openapi.from_url(f"http://{address[0]}/openapi.json")
    finally:
        stop.set()
        thread.join(PATIENCE_S)


def test_every_operation_is_described(description: Any) -> None:
    described = {(operation.ok().method, operation.ok().path) for operation in description.get_all_operations()}
    assert described == OPERATIONS


@pytest.mark.parametrize(("method", "path"), sorted(OPERATIONS))
def test_no_500_and_no_breach_of_the_schema(method: str, path: str, description: Any) -> None:
    from schemathesis import checks

    beyond = [getattr(checks, name) for name in BEYOND_SCHEMA]
    operation = description[path][method]

    @settings(max_examples=40, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy())
    def ask(case: Any) -> None:
        case.call_and_validate(excluded_checks=beyond)

    ask()
