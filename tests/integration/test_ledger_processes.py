"""The usage ledger of real processes: one is killed under load, Redis is killed and loses everything, counters are restored."""

from __future__ import annotations

import concurrent.futures
import contextlib
import re
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from tests.conftest import Serve
from tests.moments import PATIENCE_S, wait_until
from tests.servers.redis_server import RedisServer
from tidegate.cli import app

KEY = "demo-free-key-0001"
POLICY = f"""\
[[tiers]]
name = "free"
quotas = ["90000/month", "80000/hour"]
  [[tiers.rules]]
  endpoint = "/api/*"
  algorithm = "fixed_window"
  limits = ["100000/month", "50000/day", "10000/second"]
  [[tiers.rules]]
  endpoint = "/slide/*"
  limits = ["50000/day"]
  [[tiers.rules]]
  endpoint = "/shared/*"
  algorithm = "fixed_window"
  subject = "customer"
  limits = ["60000/month"]
[[customers]]
name = "acme"
tier = "free"
[[api_keys]]
key = "{KEY}"
customer = "acme"
"""


def send(server: Serve, count: int, cost: int = 1, path: str = "/api/a") -> int:
    """Checks until the server is gone; returns the units that it admitted."""
    admitted = 0
    with httpx.Client(base_url=server.url) as client:
        for _ in range(count):
            answer = client.post("/v1/check", json={"path": path, "api_key": KEY, "cost": cost})
            admitted += cost if answer.json()["allowed"] else 0
    return admitted


def units_written(server: Serve) -> float:
    """As its metric has it."""
    found = re.search(r"^rate_limiter_ledger_units_written_total (\S+)$", httpx.get(f"{server.url}/metrics").text, re.MULTILINE)
    assert found
    return float(found[1])


def test_the_ledger_outlives_its_processes(
    serve: Callable[..., Serve], new_redis: Callable[..., RedisServer], tmp_path: Path
) -> None:
    (tmp_path / "tidegate.policy.toml").write_text(POLICY)
    redis = new_redis()
    shared = {
        "TIDEGATE_COUNTERS__URL": redis.url,
        "TIDEGATE_COUNTERS__TIMEOUT_MS": "5000",
        "TIDEGATE_LEDGER__FLUSH_S": "0.2",
    }
    one, two = serve(**shared), serve(**shared)

    def stored() -> int:
        with contextlib.closing(sqlite3.connect(tmp_path / "tidegate.db", timeout=PATIENCE_S)) as database:
            found = database.execute(
                "SELECT coalesce(sum(admitted), 0) FROM usage_ledger WHERE rule = '/api/*' AND customer = 'acme'"
            )
            return int(found.fetchone()[0])

    assert send(two, 5, path="/shared/a") == 5
    written = send(one, 30, cost=3) + send(two, 20)
    assert written == 110
    wait_until(lambda: stored() == written, PATIENCE_S, "both have written")

    # Killed under load: nothing that was stored is lost, what it admitted since its last write may be, and no more.
    answered: list[int] = []
    under_way = threading.Event()

    def load() -> None:
        with httpx.Client(base_url=one.url) as client, contextlib.suppress(httpx.HTTPError):
            while True:
                if client.post("/v1/check", json={"path": "/api/a", "api_key": KEY}).json()["allowed"]:
                    answered.append(1)
                if len(answered) > 100:
                    under_way.set()

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        loads = [pool.submit(load) for _ in range(4)]
        assert under_way.wait(PATIENCE_S)
        one.process.kill()
        other = send(two, 40)
        concurrent.futures.wait(loads)
    wait_until(lambda: units_written(two) == 25 + other, PATIENCE_S, "the other has written")
    # Each of the four may have had one more admitted, of which the answer was lost.
    assert written + other <= stored() <= written + other + len(answered) + 4

    # Redis is killed: what is decided without it is written too.
    redis.kill()
    before = stored()
    fallback = send(two, 25)
    assert fallback == 25
    wait_until(lambda: units_written(two) == 25 + other + fallback, PATIENCE_S, "decisions of the fallback are written")
    assert stored() == before + fallback
    assert two.stop()[0] == 0
    kept = stored()

    # It comes back without its counters, which are restored from the ledger; repeating it changes nothing.
    redis.start()
    redis.must("FLUSHALL")
    assert f"3 counters would be raised, by {3 * kept + 10} units" in two.run("counters", "restore", "--dry-run").stdout
    ran = two.run("counters", "restore")
    assert (ran.returncode, ran.stdout) == (0, f"3 counters were raised, by {3 * kept + 10} units together\n"), ran.stderr
    assert "not restored, starts from what the store has: free: /slide/*" in ran.stderr
    assert two.run("counters", "restore").stdout.startswith("0 counters were raised")
    three = serve(**shared)
    usage: dict[str, Any] = httpx.get(f"{three.url}/v1/usage", headers={"X-API-Key": KEY}).json()
    used = {rule["rule"]: sorted(each["used"] for each in rule["windows"]) for rule in usage["rules"]}
    assert used == {None: [0, kept + 5], "/api/*": [0, kept, kept], "/slide/*": [0], "/shared/*": [5]}


def test_counters_in_memory_cannot_be_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = CliRunner().invoke(app, ["counters", "restore"])
    assert "only those in Redis can be restored" in str(ran.exception)
