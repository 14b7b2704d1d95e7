"""What an operator's signals do to a server, and what a policy file that is refused does to one that starts."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import Serve
from tests.moments import PATIENCE_S, wait_until
from tests.servers.certificates import Authority
from tests.servers.redis_server import RedisServer
from tidegate.counters.redis.store import RedisCounters
from tidegate.errors import CatalogError, StoreUnavailable
from tidegate.policy.toml_reader import load_policy
from tidegate.server.policy_file import PolicyFile
from tidegate.server.run import running
from tidegate.settings import CatalogSettings, PolicySettings, ServerSettings, Settings

POLICY = """\
[[tiers]]
name = "free"
  [[tiers.rules]]
  endpoint = "/api/*"
  limits = ["{limit}/day"]
[[api_keys]]
key = "demo-free-key-0001"
tier = "free"
"""
CHECK = {"path": "/api/a", "api_key": "demo-free-key-0001"}
HARMLESS = [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]


def _check(server: Any, cost: int = 1) -> dict[str, Any]:
    answer = httpx.post(f"{server.url}/v1/check", json={**CHECK, "cost": cost}, timeout=PATIENCE_S)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def _logged(server: Any, text: str) -> int:
    return int(server.log.read_text().count(text))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Starts `tidegate serve`, whose log is a file."""

    servers: list[Serve] = []

    def started(**environment: str) -> Any:
        server = Serve(tmp_path, log=tmp_path / "log", **environment)
        servers.append(server)
        server.wait_ready()
        return server

    yield started
    for server in servers:
        server.stop()


def test_no_signal_but_those_that_say_so_ends_a_server(start: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "tidegate.policy.toml").write_text(POLICY.format(limit=10))
    server = start()
    assert _check(server, 3)["remaining"] == 7
    for number in HARMLESS * 2:
        server.process.send_signal(number)
    wait_until(lambda: _logged(server, "reloading the policy file") >= 1)
    assert _check(server, 0)["remaining"] == 7, "the counters are in its memory, and it is still the same process"
    wait_until(lambda: _logged(server, "policy file unchanged") >= 1)
    code, _, _ = server.stop()
    assert code == 0


def test_sighup_judges_a_rejected_file_once_more(start: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "tidegate.policy.toml"
    file.write_text(POLICY.format(limit=10))
    server = start()
    file.write_text(POLICY.format(limit=10).replace("/day", "/fortnight"))
    wait_until(lambda: _logged(server, "policy file refused") == 1)
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: _logged(server, "policy file refused") == 2)
    health = httpx.get(f"{server.url}/health", timeout=PATIENCE_S).json()
    assert health["components"]["policy"]["status"] == "unhealthy"
    file.write_text(POLICY.format(limit=20))
    wait_until(lambda: _check(server, 0)["remaining"] == 20)
    wait_until(lambda: httpx.get(f"{server.url}/health", timeout=PATIENCE_S).status_code == 200)


def test_signals_to_a_supervisor_and_its_workers(start: Callable[..., Any], tmp_path: Path, redis_server: RedisServer) -> None:
    (tmp_path / "tidegate.policy.toml").write_text(POLICY.format(limit=10))
    server = start(
        TIDEGATE_SERVER__WORKERS="2",
        TIDEGATE_COUNTERS__URL=redis_server.url,
        TIDEGATE_COUNTERS__TIMEOUT_MS="5000",
        TIDEGATE_SERVER__LOG_FORMAT="text",
    )
    wait_until(lambda: _logged(server, " is listening") == 2)
    pids = [int(pid) for pid in re.findall(r"worker \d \(pid (\d+)\) listens", server.log.read_text())]
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: _logged(server, "reloading the policy file") == 2, what="each worker reloads")
    for pid in (server.process.pid, *pids):
        for number in HARMLESS:
            os.kill(pid, number)
    wait_until(lambda: _logged(server, "reloading the policy file") >= 4)
    assert _check(server)["allowed"]
    assert server.stop()[0] == 0
    assert _logged(server, " is listening") == 2, "no worker had to be started again"
    assert _logged(server, "was killed by") == 0


def test_a_rejected_file_does_not_keep_a_server_from_starting(start: Callable[..., Any], tmp_path: Path) -> None:
    """A scale-up after a bad rollout decides by the last valid policy, and says so wherever one looks."""
    file = tmp_path / "tidegate.policy.toml"
    file.write_text(POLICY.format(limit=10))
    start().stop()
    file.write_text(POLICY.format(limit=10).replace("/day", "/fortnight"))
    server = start()
    decided = _check(server)
    assert (decided["limit"], decided["remaining"], decided["degraded"]) == (10, 9, False)
    health = httpx.get(f"{server.url}/health", timeout=PATIENCE_S)
    policy = health.json()["components"]["policy"]
    assert (health.status_code, policy["status"]) == (503, "unhealthy")
    assert policy["reason"] == "POLICY_REFUSED"
    assert _logged(server, "tidegate.policy.toml:5") >= 1
    assert httpx.get(f"{server.url}/readyz", timeout=PATIENCE_S).status_code == 200
    metrics = httpx.get(f"{server.url}/metrics", timeout=PATIENCE_S).text
    assert "\nrate_limiter_policy_valid 0.0\n" in metrics
    assert "\nrate_limiter_policy_reload_errors_total 1.0\n" in metrics
    assert _logged(server, "policy file refused, the last valid policy in the catalog stays active") == 1
    file.write_text(POLICY.format(limit=20))
    wait_until(lambda: _check(server, 0)["limit"] == 20)
    wait_until(lambda: httpx.get(f"{server.url}/health", timeout=PATIENCE_S).status_code == 200)


@pytest.mark.parametrize("text", [None, "[[tiers]\n"], ids=["no file", "no TOML"])
def test_an_empty_catalog_and_a_rejected_file_are_no_start(serve: Callable[..., Any], tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "p.toml").write_text(text)
    server = serve(wait=False, TIDEGATE_POLICY__FILE=str(tmp_path / "p.toml"))
    code, out, err = server.stop_by_itself()
    assert (code, out) == (2, "")
    assert "p.toml" in err.splitlines()[-1]


async def test_a_file_that_contradicts_the_catalog_starts_on_the_catalog(tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    file.write_text(POLICY.format(limit=10))
    settings = Settings(
        server=ServerSettings(http="127.0.0.1:0", admin="", grpc="", drain_s=0),
        policy=PolicySettings(file=str(file)),
        catalog=CatalogSettings(url=f"sqlite:///{tmp_path}/tidegate.db"),
    )
    async with running(settings):
        pass
    with sqlite3.connect(tmp_path / "tidegate.db") as database:
        database.execute("UPDATE tiers SET managed_by_file = 0")
    database.close()
    file.write_text(POLICY.format(limit=20))
    async with running(settings) as instance:
        assert await instance.cached.tier("free") is not None
        assert (await instance.health.report()).components["policy"].status == "unhealthy"
        with pytest.raises(CatalogError, match="tier 'free' of the policy file"):
            await PolicyFile(file, instance.catalog, instance.metrics).apply(
                load_policy(file), instance.cached, instance.follower.poll
            )


async def test_certificates_are_read_again(
    new_redis: Callable[..., RedisServer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """PEM files that were renewed in place are used for the next connection, without a restart; broken ones are not."""
    server = new_redis(tls=True, client_certificates="required")
    assert server.authority is not None
    cert, key = tmp_path / "client.pem", tmp_path / "client.key"

    def renew(authority: Authority) -> None:
        shutil.copy(authority.client_cert, cert)
        shutil.copy(authority.client_key, key)

    renew(server.authority.unrelated())
    base = server.tls_url.partition("?")[0]
    store = RedisCounters(f"{base}?ca={server.authority.ca}&cert={cert}&key={key}", timeout_s=2)
    await store.start()
    with pytest.raises(StoreUnavailable):
        await store.ping()
    cert.write_text("no certificate")
    store.reload_certificates()
    assert "certificates not reloaded, the previous ones stay active" in caplog.text
    renew(server.authority)
    store.reload_certificates()
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                await store.ping()
                break
            except StoreUnavailable:
                await asyncio.sleep(0.02)
    await store.close()
