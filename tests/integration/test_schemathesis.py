"""schemathesis against the OpenAPI description that the data plane itself serves."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings

from tidegate import server
from tidegate.settings import CatalogSettings, PolicySettings, ServerSettings, Settings


@pytest.fixture(scope="module")
def api_schema(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    directory = tmp_path_factory.mktemp("schemathesis")
    example = Path(server.__file__).parent / "example.policy.toml"
    configured = Settings(
        server=ServerSettings(http="127.0.0.1:0", drain_s=1.0),
        policy=PolicySettings(file=str(example)),
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
    yield schemathesis.openapi.from_url(f"http://{address[0]}/openapi.json")
    stop.set()
    thread.join(30)


schema = schemathesis.pytest.from_fixture("api_schema")


@schema.parametrize()
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_500_and_no_breach_of_the_schema(case: Any) -> None:
    case.call_and_validate()
