"""The catalog's databases, the control plane over each, and the two kinds of client: what is tested on one is tested on all."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.admin_api import Admin, open_admin
from tests.integration.client_driver import ClientDriver
from tests.moments import HOUR_S, stay_within
from tests.servers.migrated import copy_sqlite, empty_postgres, renew_postgres
from tests.servers.postgres import PostgresServer

DATABASES = ("sqlite", "postgresql")
SHORT_S = 10.0


@pytest.fixture(autouse=True)
def _no_hour_ends() -> None:
    """Within a short test no hour ends, and so no day or month: many use up "5/hour" on the machine's own clock."""
    stay_within(HOUR_S, SHORT_S)


@pytest.fixture(scope="session")
def reused_database(postgres_server: PostgresServer) -> Iterator[str]:
    """The name of a database on PostgreSQL that tests use one after the other: making one takes longer than most of them."""
    name = postgres_server.new_database().rpartition("/")[2]
    yield name
    postgres_server.drop_database(name)


@pytest.fixture(params=DATABASES)
def catalog_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a catalog with nothing in it: a file of SQLite, and a database on PostgreSQL.

    It has the newest schema, unless the test has the marker `empty_database`: then it has no tables at all.
    """
    empty = request.node.get_closest_marker("empty_database") is not None
    if request.param == "sqlite":
        file = tmp_path / "tidegate.db"
        if not empty:
            copy_sqlite(file)
        return f"sqlite:///{file}"
    server: PostgresServer = request.getfixturevalue("postgres_server")
    name: str = request.getfixturevalue("reused_database")
    if empty:
        empty_postgres(server, name)
    else:
        renew_postgres(server, name)
    return server.url(name)


@pytest.fixture
async def admin(catalog_url: str) -> AsyncIterator[Admin]:
    """The control plane of an empty catalog."""
    made = await open_admin(catalog_url)
    yield made
    await made.close()


@pytest.fixture(params=["sync", "async"])
async def new_client(request: pytest.FixtureRequest) -> AsyncIterator[Callable[..., ClientDriver]]:
    """Makes clients of one kind, and closes them."""
    made: list[ClientDriver] = []

    def make(*arguments: Any, **options: Any) -> ClientDriver:
        made.append(ClientDriver(request.param, *arguments, **options))
        return made[-1]

    yield make
    for one in made:
        await one.close()
