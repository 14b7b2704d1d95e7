"""Notifications of real processes on one Redis and one PostgreSQL: five race across the thresholds, one receiver."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Callable
from pathlib import Path

import httpx

from tests.conftest import Serve
from tests.moments import PATIENCE_S, until
from tests.servers.postgres import PostgresServer
from tests.servers.redis_server import RedisServer
from tests.servers.webhook_receiver import SECRET, WebhookReceiver

KEYS = ("demo-free-key-0001", "demo-free-key-0002")
POLICY = """\
[[tiers]]
name = "free"
quotas = ["30/month"]
  [[tiers.rules]]
  endpoint = "/api/*"
  algorithm = "fixed_window"
  limits = ["20/year"]
""" + "".join(f'[[api_keys]]\nkey = "{key}"\ntier = "free"\n' for key in KEYS)
NOTIFY = '[[notify]]\nat = [50, 80, 100]\nurl = "{url}"\nsecret = "env:HOOK"\n'
EXPECTED = {("20/year", 50), ("20/year", 80), ("20/year", 100), ("30/month", 50)}


async def test_five_processes_send_each_event_once(
    serve: Callable[..., Serve],
    redis_server: RedisServer,
    postgres_server: PostgresServer,
    postgres_url: str,
    tmp_path: Path,
) -> None:
    down = WebhookReceiver()
    down.close()
    (tmp_path / "tidegate.policy.toml").write_text(POLICY + NOTIFY.format(url=down.url))
    server = serve(
        HOOK=SECRET,
        TIDEGATE_SERVER__WORKERS="5",
        TIDEGATE_COUNTERS__URL=redis_server.url,
        TIDEGATE_COUNTERS__TIMEOUT_MS="30000",
        TIDEGATE_CATALOG__URL=postgres_url,
        TIDEGATE_NOTIFICATIONS__RETRY_S="0.1",
    )
    # Each connection is one worker's; many, so that most have some.
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:
        checks = [client.post("/v1/check", json={"path": "/api/a", "api_key": key}) for _ in range(21) for key in KEYS]
        answers = [answer.json() for answer in await asyncio.gather(*checks)]
    assert sum(answer["allowed"] and not answer["degraded"] for answer in answers) == 20 * len(KEYS)
    database = postgres_url.rpartition("/")[2]

    def rows(status: str) -> list[tuple[object, ...]]:
        return postgres_server.execute(f"SELECT id, error FROM notifications WHERE status = '{status}'", database)

    events = len(EXPECTED) * len(KEYS)
    await until(lambda: len(rows("pending")) == events and any(error for _, error in rows("pending")))
    up = WebhookReceiver(down.port)
    try:
        await until(lambda: len(rows("delivered")) == events)
        assert rows("pending") == rows("failed") == []
    finally:
        up.close()
    assert sorted(each.id for each in up.received) == sorted(str(row[0]) for row in rows("delivered"))
    counted = collections.Counter((event["limit"], event["percent"]) for event in up.events())
    assert counted == dict.fromkeys(EXPECTED, len(KEYS))
    assert len({(event["subject"], event["limit"], event["percent"]) for event in up.events()}) == events
    assert server.stop()[0] == 0


def test_a_secret_that_is_not_set_is_an_error_at_start(serve: Callable[..., Serve], tmp_path: Path) -> None:
    (tmp_path / "tidegate.policy.toml").write_text(POLICY + NOTIFY.format(url="https://hooks.example/"))
    code, _, err = serve(wait=False).stop_by_itself()
    assert code == 2
    assert "has the secret 'env:HOOK', but the environment variable HOOK is not set" in err
