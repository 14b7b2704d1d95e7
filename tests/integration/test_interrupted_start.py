"""An instance that is told to end, or fails, while it starts leaves nothing behind: no listener, no task, no error unheard."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.moments import PATIENCE_S
from tests.servers.ports import free_port
from tidegate.errors import SettingsError
from tidegate.server.instance import Instance
from tidegate.server.run import started
from tidegate.settings import CatalogSettings, ServerSettings, Settings


@pytest.fixture
async def unheard() -> AsyncIterator[list[dict[str, Any]]]:
    """What the loop tells of tasks that failed and whose error nobody took; nothing may be there at the end."""
    found: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: found.append(context))
    yield found
    for _ in range(3):
        gc.collect()
        await asyncio.sleep(0.01)
    assert found == []


def _settings(catalog_url: str) -> Settings:
    http, admin = (f"127.0.0.1:{free_port()}" for _ in range(2))
    return Settings(server=ServerSettings(http=http, admin=admin, grpc=""), catalog=CatalogSettings(url=catalog_url))


def _others() -> set[asyncio.Task[Any]]:
    return asyncio.all_tasks() - {asyncio.current_task()}  # type: ignore[arg-type]


async def _until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds():
            await asyncio.sleep(0)


class StopsAtTheControlPlane(Instance):
    """An instance whose start goes no further than the control plane."""

    async def _start_admin(self, *given: Any) -> None:
        await super()._start_admin(*given)
        await asyncio.Event().wait()


async def test_sigterm_when_the_control_plane_listens_already(tmp_path: Path, unheard: list[dict[str, Any]]) -> None:
    settings = _settings(f"sqlite:///{tmp_path}/tidegate.db")
    before = _others()
    instance, stop = StopsAtTheControlPlane(settings), asyncio.Event()
    starting = asyncio.create_task(started(instance, stop))
    await _until(lambda: instance.admin_address)
    stop.set()
    assert await starting is False
    assert _others() <= before
    host, _, port = settings.server.admin.rpartition(":")
    with socket.create_server((host, int(port))):
        pass


class FailsInTheEnd(Instance):
    """What is cancelled may fail in its clean-up: then the error takes the cancellation's place."""

    async def start(self) -> None:
        try:
            await super().start()
        except asyncio.CancelledError:
            raise SettingsError("the database went away") from None


@pytest.fixture
def hung_database() -> Iterator[socket.socket]:
    """Takes connections and says nothing: whoever opens it waits."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield server


def _url(server: socket.socket) -> str:
    return f"postgresql://nobody@127.0.0.1:{server.getsockname()[1]}/none"


async def test_a_start_that_fails_after_sigterm(
    hung_database: socket.socket, unheard: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "tidegate.server")
    stop = asyncio.Event()
    starting = asyncio.create_task(started(FailsInTheEnd(_settings(_url(hung_database))), stop))
    connection, _ = await asyncio.get_running_loop().sock_accept(hung_database)
    with connection:
        stop.set()
        assert await starting is False
    assert "stopped during startup, which failed: the database went away" in caplog.text


async def test_a_program_that_gives_up_waiting(hung_database: socket.socket, unheard: list[dict[str, Any]]) -> None:
    before = _others()
    starting = asyncio.create_task(started(Instance(_settings(_url(hung_database))), asyncio.Event()))
    connection, _ = await asyncio.get_running_loop().sock_accept(hung_database)
    with connection:
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert _others() <= before
