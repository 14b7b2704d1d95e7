"""PostgreSQL under pg_auto_failover as deploy/postgres sets it up, and a Tidegate that writes on when the primary is gone."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from tests.moments import PATIENCE_S
from tests.servers.postgres_failover import SCRIPTS, Keeper, PostgresFailover

TOKEN = "0123456789abcdef-of-a-test"
PROMISE_S = 60.0
"""Far above what a quiet machine takes, under 10 s: the figure is the drill's."""
POLICY = """\
[[tiers]]
name = "free"
limits = ["1000000/day"]
[[api_keys]]
key = "demo-free-key-0001"
tier = "free"
"""


@pytest.fixture(scope="module")
def failover() -> Iterator[PostgresFailover]:
    with PostgresFailover() as made:
        yield made


@pytest.fixture
def whole(failover: PostgresFailover) -> PostgresFailover:
    """A primary and two standbys, whatever the test before has done."""
    for keeper in [failover.monitor, *failover.nodes]:
        keeper.start()
    failover.wait_whole()
    return failover


def ask(keeper: Keeper, query: str, database: str = "tidegate") -> list[tuple[Any, ...]]:
    with psycopg.connect(keeper.url(database), autocommit=True, connect_timeout=5) as connection:
        asked = connection.execute(query)  # type: ignore[arg-type]
        return [] if asked.description is None else asked.fetchall()


def settings_of(file: str) -> dict[str, str]:
    """What a fragment of deploy/postgres sets."""
    lines = (line.partition("#")[0].partition("=") for line in (SCRIPTS / file).read_text().splitlines())
    return {name.strip(): value.strip().strip("'") for name, _, value in lines if name.strip()}


def test_it_forms_with_the_settings_of_the_fragments(whole: PostgresFailover) -> None:
    primary = whole.primary()
    ours = {"shared_buffers"}  # the starter's, for a small server
    for keeper, file, database in [
        (whole.monitor, "monitor.conf", "pg_auto_failover"),
        *((n, "tidegate.conf", "tidegate") for n in whole.nodes),
    ]:
        for name, value in settings_of(file).items():
            if name not in ours:
                # As PostgreSQL writes it: 3000 is `3s`.
                query = f"SELECT setting, unit, current_setting('{name}') FROM pg_settings WHERE name = '{name}'"
                ((setting, _, shown),) = ask(keeper, query, database)
                assert value in (setting, shown), f"{name} of {keeper}"
    query = "SELECT prosrc FROM pg_proc WHERE proname = 'get_most_advanced_standby'"
    assert ["fast_forward" in source for (source,) in ask(whole.monitor, query, "pg_auto_failover")] == [True], "it is mended"
    assert ask(primary, "SHOW synchronous_standby_names")[0][0].startswith("ANY 1 "), "a commit waits for one standby"
    assert ask(primary, "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'") == [(2,)]
    for standby in whole.nodes:
        if standby is not primary:
            assert ask(standby, "SELECT pg_is_in_recovery()") == [(True,)]


def test_tidegate_writes_again_after_the_primary_and_its_keeper_are_killed(
    whole: PostgresFailover, serve: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "tidegate.policy.toml").write_text(POLICY)
    server = serve(
        TIDEGATE_CATALOG__URL=whole.url(),
        TIDEGATE_CATALOG__REPLICAS=",".join(node.url() for node in whole.nodes),
        TIDEGATE_ADMIN__TOKEN=TOKEN,
    )
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with httpx.Client(base_url=f"http://127.0.0.1:{server.admin_port}/admin/v1", headers=headers, timeout=PATIENCE_S) as admin:

        def make(name: str) -> httpx.Response:
            return admin.post("/api-keys", json={"tier": "free", "name": name})

        def passes(key: str) -> bool:
            return httpx.post(f"{server.url}/v1/check", json={"path": "/a", "api_key": key}).status_code == 200

        acknowledged = [str(make(f"before {number}").json()["api_key"]) for number in range(5)]
        assert passes("demo-free-key-0001")
        killed = whole.primary()
        killed.kill()
        deadline = time.monotonic() + PROMISE_S
        while (made := make("after")).status_code != 201:
            assert made.status_code == 503, made.text
            assert passes("demo-free-key-0001"), "what is cached goes on"
            assert time.monotonic() < deadline, made.text
            time.sleep(0.1)
        assert whole.primary() is not killed
        # Nobody had asked for them before: they are read from the new primary, or from a standby that follows it.
        assert all(passes(key) for key in [*acknowledged, str(made.json()["api_key"])])
        names = {each["name"] for each in admin.get("/api-keys", params={"limit": 100}).json()["items"]}
        assert names >= {*(f"before {number}" for number in range(5)), "after"}, "what was acknowledged is not lost"
    killed.start()
    whole.wait_whole()
    assert ask(killed, "SELECT pg_is_in_recovery()") == [(True,)], "who was the primary follows the new one"


def test_without_its_monitor_the_primary_goes_on(whole: PostgresFailover) -> None:
    primary = whole.primary()
    whole.monitor.kill()
    time.sleep(6)  # longer than `timeout.network_partition_timeout`: its standbys are there, so it need not stop
    assert ask(primary, "SELECT pg_is_in_recovery()") == [(False,)]
    ask(primary, "CREATE TABLE IF NOT EXISTS written (number integer)")
    assert ask(primary, "INSERT INTO written VALUES (1) RETURNING number") == [(1,)]


@pytest.mark.parametrize(("script", "arguments"), [("create-monitor", 3), ("create-node", 5)])
def test_a_script_reports_what_it_needs(script: str, arguments: int) -> None:
    for given in ([], ["x"] * (arguments + 1)):
        told = subprocess.run([SCRIPTS / script, *given], capture_output=True, text=True, check=False)
        assert told.returncode == 2
        assert told.stderr.startswith(f"{script} ")
        assert "PGDATA PORT HOST" in told.stderr
