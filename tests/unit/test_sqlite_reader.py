"""Look-ups of checks in a SQLite file."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import pytest

from tidegate.catalog.sql.catalog import SqlCatalog
from tidegate.errors import CatalogUnavailable
from tidegate.policy.key_format import hash_api_key


async def test_look_ups_use_connections_that_are_counted_and_closed(tmp_path: Path) -> None:
    file = tmp_path / "t.db"
    catalog = await SqlCatalog.open(f"sqlite:///{file}")
    before = catalog.database.connections
    digests = [hash_api_key(f"an-unknown-key-{number}") for number in range(20)]
    found = await asyncio.gather(*(catalog.api_key(digest) for digest in digests))
    assert [key for _, key in found] == [None] * 20
    assert len({version for version, _ in found}) == 1
    after = catalog.database.connections
    assert before["in_use"] == after["in_use"] == 0
    assert after["idle"] > before["idle"]
    await catalog.close()
    # SQLite removes it with the last connection.
    assert not file.with_name("t.db-wal").exists()


async def test_a_look_up_that_sqlite_rejects_says_so(tmp_path: Path) -> None:
    file = tmp_path / "t.db"
    catalog = await SqlCatalog.open(f"sqlite:///{file}")
    try:
        with sqlite3.connect(file) as connection:
            connection.execute("ALTER TABLE api_keys RENAME TO gone")
        connection.close()
        with pytest.raises(CatalogUnavailable, match="the catalog's database does not answer: no such table: api_keys"):
            await catalog.api_key(hash_api_key("a-key-of-somebody"))
    finally:
        await catalog.close()
