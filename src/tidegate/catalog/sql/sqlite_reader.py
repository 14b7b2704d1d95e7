"""Reads a SQLite file for checks: each query in one step of a thread.

aiosqlite hands every step of a query (create a cursor, execute, fetch, close, roll back) to its thread and waits for it, which
takes four times the CPU. Checks look up keys, tiers and customers here, so that unknown keys stay cheap; all other statements run
on the connections of aiosqlite.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sqlalchemy import Engine, RowMapping, Select
from sqlalchemy.pool import QueuePool


class SqliteReader:
    """Runs queries in threads of its own, each with a connection.

    Args:
        engine: synchronous; its pool has as many connections.
        threads: maximum number of concurrent queries, 1 or more.
    """

    def __init__(self, engine: Engine, threads: int) -> None:
        self._engine = engine
        self._executor = ThreadPoolExecutor(threads, "sqlite-reader")

    @property
    def connections(self) -> tuple[int, int]:
        """How many connections are in use, and idle."""
        pool = self._engine.pool
        return (pool.checkedout(), pool.checkedin()) if isinstance(pool, QueuePool) else (0, 0)

    async def rows(self, query: Select[Any], parameters: Mapping[str, Any] | None) -> Sequence[RowMapping]:
        """The rows of a query.

        Raises:
            SQLAlchemyError: if SQLite rejects it.
        """
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._rows, query, parameters)

    def _rows(self, query: Select[Any], parameters: Mapping[str, Any] | None) -> Sequence[RowMapping]:
        with self._engine.connect() as connection:
            return connection.execute(query, parameters).mappings().all()

    async def close(self) -> None:
        """Close all connections, after the queries in progress."""
        await asyncio.get_running_loop().run_in_executor(None, self._executor.shutdown)
        self._engine.dispose()
