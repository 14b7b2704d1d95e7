"""CPU of one check through the client, blocking and on asyncio, beside a bare POST with httpx and http.client.

    python -m bench.client [--smoke]

One `tidegate serve` on loopback; all ask it over one connection that is kept alive, one question after another. The CPU time is
that of the asking process alone. Rounds are interleaved; medians and the median of the ratios round by round are printed.
"""

from __future__ import annotations

import asyncio
import http.client
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from typing import Any

import httpx

from bench.http import ours
from bench.measure import Goal, asked_for_smoke, report
from tidegate.client import AsyncClient, Client
from tidegate.decision import Check

BODY = b'{"api_key":"demo-free-key-0001","method":"GET","path":"/api/v1/items","ip":"203.0.113.7"}'
ASKED: dict[str, Any] = {"api_key": "demo-free-key-0001", "ip": "203.0.113.7"}
JSON = {"Content-Type": "application/json"}
BATCH = [Check.of("/api/v1/items", "GET", **ASKED)] * 100


def cpu_us(ask: Callable[[], object], count: int) -> float:
    """CPU µs of one blocking call."""
    started = time.process_time()
    for _ in range(count):
        ask()
    return (time.process_time() - started) / count * 1e6


async def async_cpu_us(ask: Callable[[], Awaitable[object]], count: int) -> float:
    """CPU µs of one awaited call."""
    started = time.process_time()
    for _ in range(count):
        await ask()
    return (time.process_time() - started) / count * 1e6


async def measure(port: int, rounds: int, count: int) -> dict[str, list[float]]:
    """CPU µs by name and round."""
    url = f"http://127.0.0.1:{port}"
    bare = http.client.HTTPConnection("127.0.0.1", port)
    us: dict[str, list[float]] = {name: [] for name in ("sync", "async", "httpx", "async httpx", "http.client", "batch")}

    def post_bare() -> None:
        bare.request("POST", "/v1/check", BODY, JSON)
        if bare.getresponse().read()[:15] != b'{"allowed":true':
            raise RuntimeError("the check was not allowed")

    with Client(url, deadline_s=5, on_failure="raise") as client, httpx.Client() as posting:
        async with AsyncClient(url, deadline_s=5, on_failure="raise") as async_client, httpx.AsyncClient() as async_posting:
            for warm_up in (True, *[False] * rounds):
                bare.close()  # it opens itself again: the server ends connections that are not used for 10 s
                measured = {
                    "sync": cpu_us(lambda: client.check("/api/v1/items", **ASKED), count),
                    "httpx": cpu_us(lambda: posting.post(f"{url}/v1/check", content=BODY, headers=JSON).content, count),
                    "http.client": cpu_us(post_bare, count),
                    "async": await async_cpu_us(lambda: async_client.check("/api/v1/items", **ASKED), count),
                    "async httpx": await async_cpu_us(
                        lambda: async_posting.post(f"{url}/v1/check", content=BODY, headers=JSON), count
                    ),
                    "batch": cpu_us(lambda: client.check_many(BATCH), count // 20) / len(BATCH),
                }
                if not warm_up:
                    for name, value in measured.items():
                        us[name].append(value)
    bare.close()
    return us


def main() -> None:
    smoke = asked_for_smoke(__doc__)
    rounds, count = (1, 100) if smoke else (7, 2_000)
    with tempfile.TemporaryDirectory() as directory, ours(directory) as (_, port):
        us = asyncio.run(measure(port, rounds, count))

    def median(name: str) -> float:
        return statistics.median(us[name])

    def ratio(name: str, peer: str) -> float:
        return statistics.median(own / theirs for own, theirs in zip(us[name], us[peer], strict=True))

    report(
        "client",
        "One check through the client (CPU of the asking process)",
        [
            ("Client.check, µs CPU", median("sync"), None),
            ("httpx.Client.post of the same body, µs CPU", median("httpx"), None),
            ("http.client of the same body, µs CPU", median("http.client"), None),
            ("AsyncClient.check, µs CPU", median("async"), None),
            ("httpx.AsyncClient.post of the same body, µs CPU", median("async httpx"), None),
            ("Client.check, CPU to httpx", ratio("sync", "httpx"), Goal(at_most=1)),
            ("AsyncClient.check, CPU to httpx", ratio("async", "async httpx"), Goal(at_most=1)),
            ("Client.check_many of 100, µs CPU a check", median("batch"), None),
        ],
        smoke=smoke,
    )


if __name__ == "__main__":
    main()
