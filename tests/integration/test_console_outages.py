"""The console on PostgreSQL and Redis, and what it shows while either is gone. One server, one browser."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import Serve
from tests.integration.console_browser import TOKEN, Console, opened, see, settled
from tests.servers.postgres import PostgresServer
from tests.servers.redis_server import RedisServer


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with RedisServer("redis") as server:
        yield server


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    with PostgresServer() as server:
        yield server


@pytest.fixture(scope="module")
def console(tmp_path_factory: pytest.TempPathFactory, redis: RedisServer, postgres: PostgresServer) -> Iterator[Console]:
    server = Serve(
        tmp_path_factory.mktemp("console"),
        TIDEGATE_ADMIN__TOKEN=TOKEN,
        TIDEGATE_CATALOG__URL=postgres.url(),
        TIDEGATE_COUNTERS__URL=redis.url,
        # So that a slow Redis is not taken for one that is unavailable.
        TIDEGATE_COUNTERS__TIMEOUT_MS="5000",
        TIDEGATE_BREAKER__OPEN_S="1",
        TIDEGATE_VIOLATIONS__FLUSH_S="0.2",
        TIDEGATE_LEDGER__FLUSH_S="0.2",
    )
    with opened(server) as made:
        made.refusals += "|503"
        yield made


@pytest.fixture(scope="module")
def key(console: Console) -> tuple[str, str]:
    """Id and text of a key, which has used 3 of 2."""
    console.post("/tiers", name="free")
    console.post("/rate-limit-rules", tier="free", endpoint="/api/*", limits=["2/hour"])
    console.post("/customers", name="acme", tier="free")
    made = console.post("/api-keys", customer="acme", name="blocked key")
    assert [console.check(made["api_key"], "/api/x") for _ in range(3)] == [200, 200, 429]
    console.wait_for_violation("/api/*")
    return made["id"], made["api_key"]


@pytest.fixture(autouse=True)
def no_problems(console: Console) -> Iterator[None]:
    console.problems.clear()
    yield
    assert console.problems == []


def test_every_page_has_its_data_on_postgresql(console: Console, key: tuple[str, str]) -> None:
    page = console.open()
    for path, text in (
        ("/", "All 4 components are healthy."),
        ("/callers", "blocked key"),
        (f"/callers?key={key[0]}", "Counters now"),
        ("/customers?name=acme", "blocked key"),
        ("/policy", "/api/*"),
        ("/violations", "Blocked most"),
        ("/audit", "create api_key"),
        ("/system", "(this one)"),
    ):
        page.goto(console.base + path)
        see(page, text)
    page.context.close()


def test_without_redis_callers_and_rules_are_shown_and_checks_go_on(
    console: Console, key: tuple[str, str], redis: RedisServer
) -> None:
    page = console.open(f"/callers?key={key[0]}")
    page.get_by_label("2 of 2 used").wait_for()
    other = page.context.new_page()
    other.goto(console.base)
    see(other, "components are healthy")
    redis.kill()
    try:
        see(page, "The counter store does not answer")
        see(other, "redis:")
        assert console.check(key[1], "/api/x") in (200, 429), "decided without Redis"
        for path, text in (("/policy", "/api/*"), ("/callers", "blocked key"), ("/system", "Decided without the store")):
            other.goto(console.base + path)
            see(other, text)
    finally:
        redis.start()
    page.get_by_text("The counter store does not answer").wait_for(state="detached")
    other.goto(console.base)
    see(other, "components are healthy")
    page.context.close()


def test_without_the_database_the_outage_is_shown_and_checks_go_on(
    console: Console, key: tuple[str, str], postgres: PostgresServer
) -> None:
    page = console.open("/callers")
    see(page, "blocked key")
    other = page.context.new_page()
    other.goto(f"{console.base}/system")
    see(other, "(this one)")
    postgres.kill()
    try:
        see(page, "Not up to date")
        see(page, "blocked key")
        see(page, "Checks go on with what is cached.")
        see(other, "unhealthy")
        assert console.check(key[1], "/other") == 200
        other.goto(console.base)
        see(other, "database:")
        other.goto(f"{console.base}/customers?name=acme")
        see(other, "Nothing can be read from the database now.")
        refused = console.api.post("/tiers", json={"name": "late"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "CATALOG_UNAVAILABLE")
    finally:
        postgres.start()
    # Nobody loads a page again: what failed is read again, and what was out of date is not any more.
    see(other, "blocked key")
    page.get_by_text("Not up to date").wait_for(state="detached")
    settled(page)
    page.context.close()
