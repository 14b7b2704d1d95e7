"""What we override of psycopg is still called by it: with another version these fail before a deadline silently is none."""

from __future__ import annotations

import asyncio
from typing import Any

import psycopg
import pytest

from tests.servers.postgres import PostgresServer
from tidegate.catalog.sql import postgres_connection
from tidegate.catalog.sql.postgres_connection import Connection, connection_factory
from tidegate.errors import SettingsError


@pytest.mark.parametrize("name", sorted(postgres_connection._OVERRIDDEN))
def test_a_psycopg_without_what_is_overridden_is_rejected(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    connection_factory("postgresql://h/d", "catalog.url", writes=True, timeout_s=1)
    monkeypatch.delattr(psycopg.AsyncConnection, name)
    with pytest.raises(SettingsError, match=rf"no AsyncConnection\.{name}"):
        connection_factory("postgresql://h/d", "catalog.url", writes=True, timeout_s=1)


def test_a_psycopg_with_other_parameters_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    async def cancel(self: Any) -> None:
        """Without the timeout that psycopg 3.3 passes."""

    monkeypatch.setattr(psycopg.AsyncConnection, "_try_cancel", cancel)
    with pytest.raises(SettingsError, match="_try_cancel"):
        connection_factory("postgresql://h/d", "catalog.url", writes=True, timeout_s=1)


async def test_psycopg_waits_and_cancels_by_our_methods(postgres_server: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    for name in ("wait", "_try_cancel"):
        real = getattr(Connection, name)

        async def noted(self: Any, *arguments: Any, real: Any = real, name: str = name, **named: Any) -> Any:
            called.append(name)
            return await real(self, *arguments, **named)

        monkeypatch.setattr(Connection, name, noted)
    connection = await connection_factory(postgres_server.url(), "catalog.url", writes=True, timeout_s=60)()
    await connection.execute("SELECT 1")
    assert set(called) == {"wait"}
    query = asyncio.ensure_future(connection.execute("SELECT pg_sleep(60)"))
    while connection.pgconn.transaction_status != psycopg.pq.TransactionStatus.ACTIVE:
        await asyncio.sleep(0.001)
    query.cancel()
    with pytest.raises(asyncio.CancelledError):
        await query
    assert "_try_cancel" in called
    assert connection.closed or connection.broken
    await connection.close()
