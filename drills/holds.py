"""An instance is killed while it has a thousand slots, and a client disconnects in the middle of a stream."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import uvicorn
from tests.servers.ports import free_port
from tests.servers.redis_server import RedisServer

from drills.findings import Findings, none_of
from drills.outcome import Goal, at_most
from drills.redis_outages import Size
from tidegate.counters import Charge
from tidegate.counters.guarded import GuardedCounters
from tidegate.counters.redis.store import RedisCounters
from tidegate.decision import Decision
from tidegate.doors.asgi import RateLimitMiddleware
from tidegate.doors.default_limits import Receive, Scope, Send
from tidegate.policy.limits import ConcurrencyAlgorithm, Limit, LimitSet

SLOTS: Final = 1000
HOLDER: Final = """
import asyncio, sys
from drills.holds import SLOTS, counters, store

async def main(url, ttl_s):
    held = store(url)
    opened = await asyncio.gather(*(held.open_hold(counters(), 1, ttl_s * 1_000_000) for _ in range(SLOTS)))
    print(sum(hold is not None and not decision.degraded for decision, hold in opened), flush=True)
    await asyncio.Event().wait()

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""
POLICY: Final = """
[[tiers]]
name = "free"
  [[tiers.rules]]
  endpoint = "/stream"
  limits = ["1 concurrent"]

[anonymous]
tier = "free"
"""


def counters() -> tuple[tuple[LimitSet, str], ...]:
    """The slots of the drill."""
    return ((LimitSet("drill:holds", ConcurrencyAlgorithm.CONCURRENT, [Limit.parse(f"{SLOTS} concurrent")]), "k"),)


def store(url: str) -> GuardedCounters:
    """The counters, with a long deadline: a busy machine must not decide without Redis."""
    return GuardedCounters(RedisCounters(url, timeout_s=10.0))


async def holds(size: Size) -> Findings:
    """kill -9 of an instance with 1,000 slots; a client that disconnects in the middle of a stream."""
    ttl_s = int(size.of(20, 5))
    with RedisServer() as server:
        taken, early, all_free_s = await _killed(server.url, ttl_s)
        freed_s = await _disconnected(server.url)
    figures = [
        ("slots of the killed instance", f"{taken}"),
        (f"all free after its death, ttl {ttl_s} s", f"{all_free_s:.2f} s"),
        ("slot of a client that disconnected free after", f"{freed_s:.3f} s"),
    ]
    goals = [
        Goal("slots taken by the instance", f"{taken}", f"{SLOTS}", taken == SLOTS),
        none_of("slots free before their ttl", early),
        at_most("all free after the ttl", max(all_free_s - ttl_s, 0), 1.0, "s")._replace(timed=True),
        at_most("slot free after a disconnect", freed_s, 1.0, "s")._replace(timed=True),
    ]
    return Findings(figures, goals)


async def _killed(url: str, ttl_s: int) -> tuple[int, int, float]:
    """How many slots a process took before it was killed, how many were free too early, and after how many s all were."""
    holder = await asyncio.create_subprocess_exec(sys.executable, "-c", HOLDER, url, str(ttl_s), stdout=asyncio.subprocess.PIPE)
    assert holder.stdout is not None
    began = time.monotonic()
    taken = int(await holder.stdout.readline())
    holder.kill()
    await holder.wait()
    killed, early = time.monotonic(), 0
    own = store(url)
    while (free := await _free(own)) < SLOTS:
        # The first of them was taken after `began`.
        if time.monotonic() < began + ttl_s:
            early = max(early, free)
        await asyncio.sleep(0.02)
    await own.close()
    return taken, early, time.monotonic() - killed


async def _free(own: GuardedCounters) -> int:
    [looked] = await own.charge([Charge(counters(), 0)])
    assert isinstance(looked, Decision)
    assert not looked.degraded
    return looked.remaining or 0


async def _disconnected(url: str) -> float:
    """After how many s the only slot is free when the client that streams disconnects."""
    with TemporaryDirectory() as directory:
        policy = Path(directory) / "policy.toml"
        policy.write_text(POLICY)
        app = RateLimitMiddleware(_stream, policy=policy, counters=url)
        port = free_port()
        server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", port, log_level="critical", lifespan="off"))
        serving = asyncio.create_task(server.serve())
        try:
            while not server.started:
                await asyncio.sleep(0.02)
            reader, writer = await _request(port)
            assert b" 200 " in await reader.readline()
            assert b" 429 " in await _status(port)
            writer.close()
            closed = time.monotonic()
            while b" 200 " not in await _status(port):
                await asyncio.sleep(0.01)
            return time.monotonic() - closed
        finally:
            server.should_exit = server.force_exit = True
            await serving


async def _stream(_: Scope, receive: Receive, send: Send) -> None:
    """Streams until its client disconnects."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    ended = asyncio.create_task(_disconnect(receive))
    while not ended.done():
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        await asyncio.wait((ended,), timeout=0.05)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _request(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
    return reader, writer


async def _status(port: int) -> bytes:
    reader, writer = await _request(port)
    line = await reader.readline()
    writer.close()
    return line


DRILLS: Final = (holds,)
