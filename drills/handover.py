"""Restarts without a balancer: a new process takes over the address from the old one, and what clients saw of it.

    python -m drills.handover [--smoke]

One instance with `server.reuse_port = true` is replaced again and again under load: the new process is started at the same
address, and when it is ready the old one gets SIGTERM. Two loads run all the time: clients that keep their connections, and
clients that open one for each request. Goal: no request is lost. Connections whose handshake is in progress when the old socket
closes are reset unless `net.ipv4.tcp_migrate_req` is 1, which is printed; on loopback a handshake takes microseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import httpx
from tests.conftest import Serve
from tests.servers.ports import free_port

from drills.http_load import KEY, POLICY, HttpLoad

KEPT_RATE: Final = 400
SHORT_RATE: Final = 100
CONNECTIONS: Final = 16
RESTARTS: Final = 20
PATIENCE_S: Final = 60.0
MIGRATION: Final = Path("/proc/sys/net/ipv4/tcp_migrate_req")


class ShortLoad(HttpLoad):
    """Clients that open a connection for each request."""

    def question(self) -> tuple[bytes, Any]:
        """The same request, after which the connection ends."""
        request, about = super().question()
        return request[:-2] + b"Connection: close\r\n\r\n", about


class Address:
    """An address at which one process after the other serves.

    Args:
        directory: for the files of the processes.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._port = free_port()
        self._number = 0
        self.current = self._start()
        self.current.wait_ready()

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self._port}"

    def _start(self) -> Serve:
        self._number += 1
        own = self._directory / str(self._number)
        own.mkdir()
        (own / "tidegate.policy.toml").write_text(POLICY)
        return Serve(own, port=self._port, log=own / "log", TIDEGATE_SERVER__REUSE_PORT="true")

    def replace(self) -> tuple[float, float]:
        """Start a new process, wait until it listens, end the old one; gives the seconds that each of both took."""
        old, began = self.current, time.monotonic()
        self.current = self._start()
        _wait(lambda: "listening on http" in self._said(self.current), "the new process does not listen")
        started = time.monotonic()
        old.stop()
        said = self._said(old)
        if "no more connections are accepted here" not in said:
            raise RuntimeError(f"the old process did not hand its address over:\n{said}")
        return started - began, time.monotonic() - started

    def _said(self, process: Serve) -> str:
        assert process.log is not None
        if process.process.poll() not in (None, 0):
            raise RuntimeError(f"a process ended with {process.process.returncode}:\n{process.log.read_text()}")
        return process.log.read_text() if process.log.exists() else ""


def _wait(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{otherwise} within {PATIENCE_S:g} s")
        time.sleep(0.02)


async def _drill(address: Address, restarts: int) -> bool:
    loads = {
        f"connections that are kept ({CONNECTIONS})": HttpLoad(address.url, KEPT_RATE, CONNECTIONS, PATIENCE_S),
        "a connection for each request": ShortLoad(address.url, SHORT_RATE, 4, PATIENCE_S),
    }
    until = asyncio.Event()
    running = [asyncio.create_task(load.run(until)) for load in loads.values()]
    took: list[tuple[float, float]] = []
    await asyncio.sleep(1)
    for _ in range(restarts):
        took.append(await asyncio.to_thread(address.replace))
        await asyncio.sleep(0.2)
    until.set()
    await asyncio.gather(*running)
    print(f"\n{restarts} restarts without a balancer")
    lost = 0
    for name, load in loads.items():
        failed = sum(load.failures.values())
        lost += failed
        print(f"  {name}")
        print(f"    {'requests':<34} {len(load.asked):>12,}")
        print(f"    {'lost (goal 0)':<34} {failed:>12,}  {dict(load.failures) or ''}")
        print(f"    {'longest time without an answer, s':<34} {load.longest_gap_s:>12.2f}")
        print(f"    {'p50, p99 ms':<34} {load.latency_ms(0.5):>12.2f} {load.latency_ms(0.99):.2f}")
    print(f"  {'start, longest, s':<36} {max(start for start, _ in took):>12.2f}")
    print(f"  {'drain, longest, s':<36} {max(drain for _, drain in took):>12.2f}")
    print(
        f"  {'net.ipv4.tcp_migrate_req':<36} {MIGRATION.read_text().strip() if MIGRATION.exists() else 'unknown':>12}", flush=True
    )
    return lost == 0


def main() -> None:
    """Run the drill; the exit code is 1 if a request was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="two restarts")
    smoke = parser.parse_args().smoke
    with tempfile.TemporaryDirectory() as directory:
        address = Address(Path(directory))
        try:
            httpx.get(f"{address.url}/v1/authorize", headers={"X-API-Key": KEY, "X-Original-URI": "/item"}).raise_for_status()
            good = asyncio.run(_drill(address, 2 if smoke else RESTARTS))
        finally:
            address.current.stop()
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
