"""Instances behind a balancer that die and restart under load, and what clients saw of it.

    python -m drills.instance [--smoke]

Three instances count on one Redis, behind HAProxy with deploy/haproxy/haproxy.cfg. One is killed by SIGKILL and started again;
then all three are restarted one after the other by SIGTERM. Goal: no client request fails.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import httpx
from tests.conftest import Serve
from tests.servers.deployed import haproxy
from tests.servers.ports import free_port
from tests.servers.redis_server import RedisServer

from drills.http_load import POLICY, HttpLoad

RATE: Final = 400
INSTANCES: Final = 3


class House:
    """Three instances on one Redis.

    Args:
        directory: for their files.
        redis_url: where they count.
    """

    def __init__(self, directory: Path, redis_url: str) -> None:
        self.ports = [free_port() for _ in range(INSTANCES)]
        self._directory = directory
        self._redis_url = redis_url
        self.instances = [self._start(port) for port in self.ports]
        for instance in self.instances:
            instance.wait_ready()

    def kill(self, number: int) -> None:
        """SIGKILL."""
        self.instances[number].process.kill()
        self.instances[number].stop()

    def start(self, number: int) -> None:
        """Start anew at the same port, and wait until it is ready."""
        self.instances[number] = self._start(self.ports[number])
        self.instances[number].wait_ready()

    def restart(self, number: int) -> float:
        """SIGTERM, and start anew; gives the seconds until it has ended."""
        started = time.monotonic()
        self.instances[number].stop()
        took_s = time.monotonic() - started
        self.start(number)
        return took_s

    def stop(self) -> None:
        """End all."""
        for instance in self.instances:
            instance.stop()

    def _start(self, port: int) -> Serve:
        directory = self._directory / str(port)
        directory.mkdir(exist_ok=True)
        (directory / "tidegate.policy.toml").write_text(POLICY)
        return Serve(directory, port=port, TIDEGATE_COUNTERS__URL=self._redis_url)


async def _drill(house: House, url: str, operators: str, smoke: bool) -> bool:
    good = True

    async def under_load(name: str, event: Callable[[], Awaitable[None]]) -> None:
        nonlocal good
        load, until = HttpLoad(url, RATE), asyncio.Event()
        running = asyncio.create_task(load.run(until))
        await asyncio.sleep(1)
        await event()
        await asyncio.sleep(1)
        until.set()
        await running
        failed = sum(load.failures.values())
        good = good and failed == 0
        print(f"\n{name}")
        print(f"  {'requests':<36} {len(load.asked):>12,}")
        print(f"  {'failed (goal 0)':<36} {failed:>12,}  {dict(load.failures) or ''}")
        print(f"  {'longest time without an answer, s':<36} {load.longest_gap_s:>12.2f}")
        print(f"  {'p50, p99 ms':<36} {load.latency_ms(0.5):>12.2f} {load.latency_ms(0.99):.2f}", flush=True)

    async def nothing() -> None:
        await asyncio.sleep(1)

    async def killed() -> None:
        await asyncio.to_thread(house.kill, 0)
        await asyncio.sleep(2 if smoke else 20)  # longer than three checks: then HAProxy knows
        await asyncio.to_thread(house.start, 0)
        await _all_up(operators)

    async def rolling() -> None:
        for number in range(1 if smoke else INSTANCES):
            took_s = await asyncio.to_thread(house.restart, number)
            print(f"  drained and ended within {took_s:.1f} s", flush=True)
            await _all_up(operators)

    await under_load("nothing happens", nothing)
    await under_load("one instance is killed by SIGKILL, and comes back", killed)
    await under_load("one instance is restarted" if smoke else "all are restarted, one after the other", rolling)
    return good


async def _all_up(operators: str) -> None:
    """Wait until the balancer sends requests to all instances: only then may the next one be restarted."""
    deadline = time.monotonic() + 60
    async with httpx.AsyncClient() as client:
        while time.monotonic() < deadline:
            said = (await client.get(operators)).text
            if f'haproxy_backend_active_servers{{proxy="tidegate"}} {INSTANCES}' in said:
                return
            await asyncio.sleep(0.2)
    raise RuntimeError(f"not all {INSTANCES} instances are up within 60 s")


def main() -> None:
    """Run the drill; the exit code is 1 if a request failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="the shortest way through")
    smoke = parser.parse_args().smoke
    with tempfile.TemporaryDirectory() as directory, RedisServer() as redis:
        house = House(Path(directory), redis.url)
        try:
            balancer, operators = haproxy(house.ports, patient=False)
            with balancer:
                good = asyncio.run(_drill(house, balancer.url, f"http://127.0.0.1:{operators}/metrics", smoke))
        finally:
            house.stop()
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
