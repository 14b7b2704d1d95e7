"""Fixtures that several tests share: real listeners on free loopback ports, a clock that stands still."""

from __future__ import annotations

from tests import garbage, line_coverage

# isort: split
import asyncio
import contextlib
import os
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from httpx._config import DEFAULT_TIMEOUT_CONFIG, create_ssl_context
from httpx._transports import default as _httpx_transports
from hypothesis import HealthCheck, settings

from tests import markers, run_order, worker_server
from tests.cases.doors import POLICY
from tests.moments import PATIENCE_S
from tests.servers import forked
from tests.servers.fixtures import (  # noqa: F401 - fixtures are found by their names
    any_redis,
    new_cluster,
    new_postgres,
    new_postgres_cluster,
    new_redis,
    new_sentinel,
    postgres_cluster,
    postgres_server,
    postgres_url,
    redis_cluster,
    redis_sentinel,
    redis_server,
    running_cluster,
    running_redis,
    running_sentinel,
    running_valkey,
    valkey_server,
)
from tests.servers.ports import accepts, free_port
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.counters.memory import MemoryCounters
from tidegate.gate.gate import Gate
from tidegate.observation import Observation
from tidegate.policy.toml_reader import parse_policy

# httpx gives up after 5 s where a test says nothing else; a server that starts on busy cores may need longer for an answer.
for _part in ("connect", "read", "write", "pool"):
    setattr(DEFAULT_TIMEOUT_CONFIG, _part, PATIENCE_S)

_default_tls = create_ssl_context()


def _tls_of(verify: Any = True, cert: Any = None, trust_env: bool = True) -> ssl.SSLContext:
    """One context for all clients that say nothing about TLS: to read the authorities takes 25 ms of CPU time."""
    return _default_tls if verify is True and cert is None else create_ssl_context(verify, cert, trust_env)


setattr(_httpx_transports, "create_ssl_context", _tls_of)  # noqa: B010 - the module does not export it

# No example fails because it took long: on a busy machine any of them may wait for a core. Everything else stays as Hypothesis
# chose it for where it runs: under CI its examples are the same in every run.
settings.register_profile(
    "tidegate",
    settings(),
    deadline=None,
    suppress_health_check=[*settings().suppress_health_check, HealthCheck.too_slow],
)
settings.load_profile("tidegate")

MOMENT_US = 1_700_000_000_000_000
"""2023-11-14 22:13:20 UTC: 20 s into its minute, so that no window ends by itself while the clock stands."""


def pytest_configure(config: pytest.Config) -> None:
    if line_coverage.counter is not None:
        config.pluginmanager.register(line_coverage.counter, "line-coverage")
    for name, meaning in markers.MEANINGS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    config.addinivalue_line("markers", "empty_database: catalog_url gives a database without tables, for tests that migrate it")


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(markers.kind_of(item.path, getattr(item, "fixturenames", ())))
    if "PYTEST_XDIST_TESTRUNUID" in os.environ:  # a worker's process
        items[:] = run_order.in_order(items)


@pytest.hookimpl(tryfirst=True)  # also in the process that distributes the tests
def pytest_runtestloop() -> None:
    garbage.collect_from_now_on()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config, specs: list[Any]) -> None:
    worker_server.start_workers_from_here(config, specs)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> run_order.Portions | None:
    return run_order.Portions(config, log) if config.getoption("dist") == "loadfile" else None


class Clock:
    """A clock that a test moves."""

    def __init__(self, now_us: int = MOMENT_US) -> None:
        self.now_us = now_us

    def __call__(self) -> int:
        return self.now_us

    def advance(self, seconds: float) -> None:
        self.now_us += round(seconds * 1e6)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def seen() -> list[Observation]:
    return []


@pytest.fixture
def gate(clock: Clock, seen: list[Observation]) -> Gate:
    """A gate over the policy of the door cases, with nothing consumed."""
    return Gate(CachedCatalog(PolicyCatalog(parse_policy(POLICY))), MemoryCounters(clock=clock), seen.append)


class Serve:
    """A `tidegate serve` process of its own, in a directory of its own; at a free port, if none is given.

    What it says is kept in pipes, 64 KiB each, or in the log that is given. The control plane is on for those
    who give a token or ask for it: its code takes time to load.
    """

    def __init__(
        self,
        directory: Path,
        arguments: tuple[str, ...] = (),
        port: int | None = None,
        log: Path | None = None,
        grpc: bool = False,
        admin: bool = False,
        **environment: str,
    ) -> None:
        self.directory = directory
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.admin_port = free_port()
        self.grpc_port = free_port()
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("TIDEGATE_")},
            "TIDEGATE_SERVER__HTTP": f"127.0.0.1:{self.port}",
            "TIDEGATE_SERVER__ADMIN": f"127.0.0.1:{self.admin_port}" if admin or "TIDEGATE_ADMIN__TOKEN" in environment else "",
            "TIDEGATE_SERVER__GRPC": f"127.0.0.1:{self.grpc_port}" if grpc else "",
            **environment,
        }
        self.log = log
        with contextlib.ExitStack() as files:
            said = subprocess.PIPE if log is None else files.enter_context(log.open("ab"))
            self.process = forked.start(("serve", *arguments), directory, self.environment, stdout=said, stderr=said)

    def wait_ready(self) -> None:
        """Until it answers; fails with what it said if it ends instead."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                said = self.log.read_text() if self.log is not None else self.process.stderr.read()  # type: ignore[union-attr]
                raise AssertionError(f"serve ended with {self.process.returncode}: {said}")
            # A try to connect is cheap; a request by httpx takes time from the server that is about to start.
            if accepts(self.port):
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{self.url}/readyz", timeout=1).status_code == 200:
                        return
            time.sleep(0.05)
        raise AssertionError("serve did not get ready within 60 s")

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs another command of Tidegate with the same settings, in the same directory."""
        return forked.run(arguments, PATIENCE_S, cwd=self.directory, env={**self.environment, **environment})

    def stop_by_itself(self) -> tuple[int, str, str]:
        """Waits until it ends without being told to; returns exit code, stdout, stderr; of both nothing, where it has a log."""
        out, err = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, out or "", err or ""

    def stop(self) -> tuple[int, str, str]:
        """SIGTERM; returns exit code, stdout, stderr."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.stop_by_itself()
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.stop_by_itself()
        except ValueError:  # a test has read the pipes to their end already
            return self.process.returncode, "", ""


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Serve]]:
    """Starts `tidegate serve` in a directory of the test; ends it by its own process id."""
    started: list[Serve] = []

    def start(*arguments: str, wait: bool = True, grpc: bool = False, admin: bool = False, **environment: str) -> Serve:
        server = Serve(tmp_path, arguments, None, None, grpc, admin, **environment)
        started.append(server)
        if wait:
            server.wait_ready()
        return server

    yield start
    for server in started:
        server.stop()


@pytest.fixture
async def listen() -> AsyncIterator[Callable[..., object]]:
    """Serves an RSGI app on a free port of loopback; gives its base URL."""
    from tidegate.server.listener import Listener

    listeners: list[Listener] = []

    async def start(app: object, header_timeout_s: float = 10.0) -> str:
        port = free_port()
        listener = Listener(app, "127.0.0.1", port, header_timeout_s=header_timeout_s)
        await listener.start()
        listeners.append(listener)
        for _ in range(200):
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.02)
            else:
                writer.close()
                break
        return f"http://127.0.0.1:{port}"

    yield start
    for listener in listeners:
        await listener.stop(5)
