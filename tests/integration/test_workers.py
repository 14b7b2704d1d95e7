"""`[server] workers` above 1: several processes behind one port, on a real Redis, signalled and killed as an operator may."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.moments import PATIENCE_S, wait_until
from tests.servers.forked import REALLY_STARTED
from tests.servers.redis_server import RedisServer
from tidegate.telemetry.merge_workers import combine

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are looked at in /proc")

POLICY = """\
[[tiers]]
name = "free"
  [[tiers.rules]]
  endpoint = "/api/*"
  limits = ["1000000/day"]
[[api_keys]]
key = "demo-free-key-0001"
tier = "free"
"""
CHECK = {"path": "/api/a", "api_key": "demo-free-key-0001"}
WORKERS = 2


@pytest.fixture
def start(serve: Callable[..., Any], redis_server: RedisServer, tmp_path: Path) -> Callable[..., Any]:
    """Starts `tidegate serve` with workers and reads the line that all of them listen."""
    (tmp_path / "tidegate.policy.toml").write_text(POLICY)

    def started(workers: int = WORKERS, **environment: str) -> Any:
        # Nobody reads the log while the test runs: at the level of warnings it never fills the pipe.
        server = serve(
            wait=False,
            TIDEGATE_SERVER__WORKERS=str(workers),
            TIDEGATE_COUNTERS__URL=redis_server.url,
            # A busy machine misses 50 ms, and what may have been counted is counted again.
            TIDEGATE_COUNTERS__TIMEOUT_MS="5000",
            TIDEGATE_SERVER__LOG_LEVEL="warning",
            TIDEGATE_ADMIN__TOKEN="token-of-the-settings",  # else the first line is the first operator's
            **environment,
        )
        line = server.process.stdout.readline()
        assert server.url in line, server.stop_by_itself()[2]
        return server

    return started


def _workers(server: Any) -> list[int]:
    """Process ids of the workers that live now."""
    pid = server.process.pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split() if _lives(int(child))]


def _lives(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def _metrics(server: Any) -> dict[str, float]:
    """One scrape on a connection of its own, so by a worker of chance."""
    text = httpx.get(f"{server.url}/metrics").text
    return {name: float(value) for name, value in re.findall(r"^([^#\s]\S*) (\S+)$", text, re.MULTILINE)}


def _of_all(text: str, workers: int) -> str:
    """An exposition, if it is of all workers: one that has no core for half a second is left out of a scrape."""
    return text if f"rate_limiter_workers {workers}.0\n" in text else ""


def _decided(samples: dict[str, float]) -> float:
    return samples['rate_limiter_requests_total{status="allowed"}']


def _check(server: Any, times: int = 1) -> None:
    for _ in range(times):
        assert httpx.post(f"{server.url}/v1/check", json=CHECK).status_code == 200  # a new connection each


def _answers_again(server: Any, times: int) -> None:
    """Checks until so many were answered; a connection that a killed worker had not taken yet is cut, and is made again."""
    answered = 0
    for _ in range(times * 2):
        with contextlib.suppress(httpx.TransportError):
            answered += httpx.post(f"{server.url}/v1/check", json=CHECK).status_code == 200
        if answered == times:
            return
    raise AssertionError(f"{answered} of {times * 2} checks were answered")


def _connections(server: Any, pid: int) -> int:
    """How many connections at the port a process holds."""
    inodes = set()
    with contextlib.suppress(FileNotFoundError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                inodes.add(descriptor.readlink().name.removeprefix("socket:[").rstrip("]"))
    established = 0
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[1].partition(":")[2], 16) == server.port and fields[3] == "01" and fields[9] in inodes:
            established += 1
    return established


def test_every_worker_answers_and_metrics_are_of_all(start: Callable[..., Any]) -> None:
    server = start(3)
    pids = _workers(server)
    assert len(pids) == 3
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(httpx.Client()) for _ in range(60)]
        for client in clients:
            for _ in range(5):
                assert client.post(f"{server.url}/v1/check", json=CHECK).status_code == 200
        wait_until(lambda: sum(_connections(server, pid) for pid in pids) == 60)
        assert all(_connections(server, pid) > 0 for pid in pids)
        for client in clients[:20]:  # whatever worker it is that answers
            text = wait_until(lambda client=client: _of_all(client.get(f"{server.url}/metrics").text, 3))
            assert 'rate_limiter_requests_total{status="allowed"} 300.0\n' in text
            assert "rate_limiter_latency_seconds_count 300.0\n" in text
            assert 'rate_limiter_latency_seconds_bucket{le="+Inf"} 300.0\n' in text
            assert "rate_limiter_policy_valid 1.0\n" in text
            assert re.search(r"^rate_limiter_policy_version 1\.[0-9]+e\+0?12$", text, re.MULTILINE), (
                "ms since the epoch, not a sum"
            )
            assert text.count("# TYPE rate_limiter_requests_total ") == 1
    # Units that a worker leased and did not use count as used at the others, until they are given back.
    wait_until(lambda: httpx.post(f"{server.url}/v1/check", json={**CHECK, "cost": 0}).json()["remaining"] == 1_000_000 - 300)
    code, _, err = server.stop()
    assert (code, err) == (0, "")
    assert not any(map(_lives, pids))


def test_a_killed_worker_comes_back_and_no_counter_goes_backwards(start: Callable[..., Any]) -> None:
    server = start()
    _check(server, 60)
    assert _decided(_metrics(server)) == 60
    victim = _workers(server)[0]
    os.kill(victim, signal.SIGKILL)
    _answers_again(server, 30)
    told = 60.0
    while len(_workers(server)) < WORKERS or _metrics(server)["rate_limiter_workers"] < WORKERS:
        samples = _metrics(server)
        assert _decided(samples) >= told
        told = _decided(samples)
    assert _decided(_metrics(server)) == 90
    assert victim not in _workers(server)
    _check(server, 30)
    assert _decided(_metrics(server)) == 120
    code, _, err = server.stop()
    assert code == 0
    assert f"(pid {victim}) was killed by SIGKILL" in err
    assert "Traceback" not in err


def test_a_worker_drains_after_sigterm_and_is_replaced(start: Callable[..., Any]) -> None:
    server = start()
    _check(server, 20)
    first, second = _workers(server)
    os.kill(first, signal.SIGTERM)
    wait_until(lambda: not _lives(first))
    wait_until(lambda: len(_workers(server)) == 2 and _metrics(server)["rate_limiter_workers"] == 2)
    assert second in _workers(server)
    assert _decided(_metrics(server)) == 20, "what was not scraped before the drain is not lost"
    code, _, err = server.stop()
    assert code == 0
    assert "ended with exit code 0, restarting" in err


def test_a_hung_worker_does_not_hold_up_a_scrape(start: Callable[..., Any]) -> None:
    server = start()
    _check(server, 30)
    assert _decided(_metrics(server)) == 30
    pids = _workers(server)
    os.kill(pids[1], signal.SIGSTOP)

    def scraped() -> dict[str, float] | None:
        try:  # the kernel gives the hung worker connections as before
            text = httpx.get(f"{server.url}/metrics", timeout=1).text
        except httpx.TimeoutException:
            return None
        return {name: float(value) for name, value in re.findall(r"^([^#\s]\S*) (\S+)$", text, re.MULTILINE)}

    samples = wait_until(scraped)
    os.kill(pids[1], signal.SIGCONT)
    assert samples["rate_limiter_workers"] == WORKERS - 1
    assert _decided(samples) == 30, "its last told counts stand in"
    assert server.stop()[0] == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_all_workers(start: Callable[..., Any], number: signal.Signals) -> None:
    server = start(TIDEGATE_SERVER__DRAIN_S="120")
    pids = _workers(server)
    with httpx.Client() as client:
        assert client.post(f"{server.url}/v1/check", json=CHECK).status_code == 200
        began = time.monotonic()
        # A service manager signals every process, not the supervisor alone: that is no second signal.
        for pid in (server.process.pid, *pids):
            os.kill(pid, number)
        assert server.process.wait(PATIENCE_S) == 0
    assert time.monotonic() - began < PATIENCE_S, "nothing is in flight: the drain does not take its time"
    assert not any(map(_lives, pids))


def test_a_worker_that_does_not_end_is_killed(start: Callable[..., Any]) -> None:
    server = start(TIDEGATE_SERVER__DRAIN_S="0.5")
    pids = _workers(server)
    os.kill(pids[0], signal.SIGSTOP)
    code, _, err = server.stop()
    assert code == 0
    assert "did not end within 2.5 s" in err
    assert not any(map(_lives, pids))


def test_a_second_signal_hurries(start: Callable[..., Any]) -> None:
    server = start(TIDEGATE_SERVER__DRAIN_S="600")
    pids = _workers(server)
    request = b"POST /v1/check HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S))
            connection.sendall(request)  # the rest never comes
        wait_until(lambda: _metrics(server)["rate_limiter_in_flight"] >= 8)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(1)
        assert any(map(_lives, pids)), "they wait for the requests in flight"
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(PATIENCE_S) == 0
    assert not any(map(_lives, pids))


def test_no_worker_outlives_a_killed_supervisor(start: Callable[..., Any]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        server = start(TMPDIR=scratch, **REALLY_STARTED)
        (made,) = Path(scratch).iterdir()
        assert made.stat().st_mode & 0o777 == 0o700, "nobody else may ask the workers"
        pids = _workers(server)
        assert len(pids) == WORKERS
        server.process.kill()
        try:
            wait_until(lambda: not any(map(_lives, pids)), 60)
        finally:
            for pid in filter(_lives, pids):
                os.kill(pid, signal.SIGKILL)
        assert not made.exists(), "the last worker leaves nothing behind"


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"TIDEGATE_CATALOG__URL": "sqlite:////proc/none/tidegate.db"}, "/proc/none/tidegate.db"),
        ({"TIDEGATE_POLICY__FILE": "absent.toml"}, "absent.toml"),
        ({"TIDEGATE_COUNTERS__URL": "memory://"}, "memory://"),
        ({"TIDEGATE_COUNTERS__URL": "pigeon://"}, "pigeon"),
        ({"TIDEGATE_SERVER__HTTP": "192.0.2.1:80"}, "cannot listen on"),
        ({"TIDEGATE_WORKER": "1"}, "TIDEGATE_WORKER"),
    ],
)
def test_what_cannot_start_is_reported_once(
    serve: Callable[..., Any], redis_server: RedisServer, environment: dict[str, str], said: str
) -> None:
    server = serve(wait=False, **{"TIDEGATE_SERVER__WORKERS": "3", "TIDEGATE_COUNTERS__URL": redis_server.url, **environment})
    code, out, err = server.stop_by_itself()
    assert (code, out) == (2, "")
    assert said in err
    assert len(err.strip().splitlines()) == 1


def test_a_second_supervisor_finds_the_port_in_use(start: Callable[..., Any], serve: Callable[..., Any]) -> None:
    first = start()
    second = serve(wait=False, **{**first.environment, "TIDEGATE_SERVER__HTTP": f"127.0.0.1:{first.port}"})
    code, _, err = second.stop_by_itself()
    assert (code, "port is in use" in err) == (2, True)
    _check(first)


def test_expositions_are_combined() -> None:
    text = """\
# HELP a_total Sum.
# TYPE a_total counter
a_total{{rule="x \\"y\\""}} {0}
# HELP held Sum.
# TYPE held gauge
held {0}
# HELP rate_limiter_policy_valid Least.
# TYPE rate_limiter_policy_valid gauge
rate_limiter_policy_valid {1}
# HELP rate_limiter_policy_version Most.
# TYPE rate_limiter_policy_version gauge
rate_limiter_policy_version {0}
"""
    live = [text.format(2, 1).encode(), text.format(3, 0).encode()]
    combined = combine(live, past=[text.format(5, 0).encode(), b""], answered=2).decode()
    assert re.findall(r"^[^#].*$", combined, re.MULTILINE) == [
        'a_total{rule="x \\"y\\""} 10.0',
        "held 5.0",
        "rate_limiter_policy_valid 0.0",
        "rate_limiter_policy_version 3.0",
        "rate_limiter_workers 2.0",
    ]
    assert combine([combine(live)]) == combine(live)
