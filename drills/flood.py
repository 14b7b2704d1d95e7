"""One key far above its limit, then a flood of keys that nobody has: what other callers, memory and database see of it."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Final, NamedTuple

from tests.conftest import Serve
from tests.servers.postgres import PostgresServer
from tests.servers.process_tree import tree_of
from tests.servers.redis_server import RedisServer

from drills.findings import Findings, none_of
from drills.http_load import KEY
from drills.key_load import TOKEN, KeyLoad
from drills.outcome import Goal, at_most
from drills.postgres_failures import keys_of, p99_ms, policy_of, wait_ready
from drills.redis_outages import Size
from drills.running import Mark

LIMIT: Final = 50
TIMES: Final = 20
GOAL_MS: Final = 10.0
GROWTH_MIB: Final = 64.0
"""Unknown keys are remembered 10,000 at a time, some MiB; the rest is the allocator's."""
CONNECTIONS: Final = 13
"""`catalog.pool_size` for reading, 4 for writing, 1 for listening."""
PATIENCE_S: Final = 1800.0
SCRIPT: Final = Path(__file__).with_suffix(".lua")
HOT: Final = f"""
[[tiers]]
name = "hot"
  [[tiers.rules]]
  endpoint = "/*"
  algorithm = "fixed_window"
  limits = ["{LIMIT}/second"]
[[api_keys]]
key = "{KEY}"
tier = "hot"
"""


def rss_mib(pid: int) -> float:
    """Resident memory of a process and all below it, MiB; pages that they share count for each."""
    total = 0
    for each in tree_of(pid):
        try:
            found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{each}/status").read_text())
        except OSError:
            continue  # it has ended meanwhile
        total += int(found[1]) if found else 0
    return total / 1024


class _Watch:
    """Looks at the instance's memory and at its connections to the database, once a second."""

    def __init__(self, server: Serve, database: PostgresServer) -> None:
        self._server, self._database = server, database
        self.rss: list[float] = []
        self.connections: list[int] = []

    async def run(self, until: asyncio.Event) -> None:
        while not until.is_set():
            self.rss.append(await asyncio.to_thread(rss_mib, self._server.process.pid))
            query = "SELECT count(*) FROM pg_stat_activity WHERE datname = 'tidegate' AND pid <> pg_backend_pid()"
            self.connections.append((await asyncio.to_thread(self._database.execute, query))[0][0])
            await asyncio.sleep(1)


class _Queries(NamedTuple):
    """What the database has been asked.

    Args:
        calls: statements.
        rows: that they gave.
    """

    calls: int
    rows: int


def _queries(database: PostgresServer) -> _Queries:
    # The watch's own statements and transactions' begin and end are not look-ups.
    query = (
        "SELECT coalesce(sum(calls), 0)::bigint, coalesce(sum(rows), 0)::bigint FROM pg_stat_statements"
        " WHERE query ILIKE 'select%' AND query NOT LIKE '%pg_stat_%'"
    )
    return _Queries(*database.execute(query)[0])


async def _output_of(*command: str | Path) -> str:
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT)
    try:
        async with asyncio.timeout(PATIENCE_S):
            output = (await process.communicate())[0].decode()
    except BaseException:
        process.kill()
        await process.wait()
        raise
    if process.returncode != 0:
        raise RuntimeError(f"{command[0]} ended with {process.returncode}: {output}")
    return output


async def flood(size: Size) -> Findings:
    """One key at 20 times its limit, then a million distinct unknown keys (100,000 in smoke)."""
    wrk = shutil.which("wrk")
    if wrk is None:
        raise RuntimeError("wrk is missing: apt-get install wrk")
    unknown, seconds = (100_000, 5.0) if size.smoke else (1_000_000, 20.0)
    others = keys_of(200)
    walking = itertools.cycle(others)
    options = {"shared_preload_libraries": "pg_stat_statements"}
    with PostgresServer(options) as database, RedisServer() as redis, tempfile.TemporaryDirectory() as directory:
        database.execute("CREATE EXTENSION pg_stat_statements")
        (Path(directory) / "tidegate.policy.toml").write_text(policy_of(others) + HOT)
        settings = {
            "TIDEGATE_CATALOG__URL": database.url(),
            "TIDEGATE_COUNTERS__URL": redis.url,
            "TIDEGATE_ADMIN__TOKEN": TOKEN,
        }
        server = Serve(Path(directory), (), None, Path(directory) / "tidegate.log", False, True, **settings)
        try:
            await asyncio.to_thread(wait_ready, server)
            until = asyncio.Event()
            load, watch = KeyLoad(server.url, 100, lambda: next(walking)), _Watch(server, database)
            began = time.monotonic()
            running = [asyncio.create_task(load.run(until)), asyncio.create_task(watch.run(until))]
            await asyncio.sleep(2 + seconds)
            hot_s = time.monotonic() - began
            asking = (sys.executable, "-m", "drills.http_load", server.url, str(seconds), str(LIMIT * TIMES))
            hot = json.loads((await _output_of(*asking)).splitlines()[-1])
            calm_s = time.monotonic() - began
            await asyncio.sleep(2)
            before, size_before = await asyncio.to_thread(_queries, database), redis.call("DBSIZE")
            rss_before = watch.rss[-1]
            flood_s = time.monotonic() - began
            command = (wrk, "-t1", "-c16", f"-d{PATIENCE_S:.0f}s", "-s", SCRIPT, server.url, "--", str(unknown))
            output = await _output_of(*command)
            over_s = time.monotonic() - began
            await asyncio.sleep(2)
            after, size_after = await asyncio.to_thread(_queries, database), redis.call("DBSIZE")
            until.set()
            await asyncio.gather(*running)
        finally:
            await asyncio.to_thread(server.stop)
    spans = {
        "before": [each for each in load.results if 2 <= each.at_s < hot_s],
        "beside the hot key": [each for each in load.results if hot_s <= each.at_s < calm_s],
        "beside the flood": [each for each in load.results if flood_s <= each.at_s < over_s],
    }
    statuses = re.findall(r"(\d+):(\d+)", output.rpartition("statuses")[2])
    # 429: beyond the bound on the unknown keys of one address, which spares the database.
    refused = sum(int(count) for status, count in statuses if status in ("401", "429"))
    queries = after.calls - before.calls
    took_s = over_s - flood_s
    admitted = hot["asked"] - hot["failures"].get("status 429", 0)
    odd = {reason: count for reason, count in hot["failures"].items() if reason != "status 429"}
    growth = max(watch.rss) - rss_before
    most_connections = max(watch.connections)
    kept = int(size_after) - int(size_before)
    figures = [
        *((f"others' p99 {name}", f"{p99_ms(span):.1f} ms of {len(span):,}") for name, span in spans.items()),
        ("the hot key: asked, admitted", f"{hot['asked']:,}, {admitted:,} in {seconds:g} s; other failures {odd or 'none'}"),
        ("unknown keys", f"{unknown:,} in {took_s:.0f} s, {unknown / took_s:,.0f} a second; answers {dict(statuses)}"),
        ("resident memory before, at most, at the end", f"{rss_before:.0f}, {max(watch.rss):.0f}, {watch.rss[-1]:.0f} MiB"),
        ("database: look-ups in all, a second", f"{queries:,}, {queries / took_s:,.0f}"),
        ("unknown keys in one of them", f"{unknown / max(queries, 1):.1f}"),
        ("keys in Redis before and after", f"{size_before}, {size_after}"),
    ]
    # A window may be entered at its end: one more than the seconds it lasted, and the moment until the load said so.
    most = LIMIT * (int(seconds) + 3)
    goals = [
        none_of("other callers without a decision", sum(not each.decided for each in load.results)),
        at_most("others' p99 beside the hot key", p99_ms(spans["beside the hot key"]), GOAL_MS, "ms"),
        at_most("others' p99 beside the flood", p99_ms(spans["beside the flood"]), GOAL_MS, "ms"),
        Goal("the hot key admitted", f"{admitted:,}", f"≤ {most:,}", admitted <= most),
        Goal("unknown keys answered 401 or 429", f"{refused:,}", f"≥ {unknown:,}", refused >= unknown),
        Goal("memory's growth", f"{growth:.0f} MiB", f"≤ {GROWTH_MIB:g} MiB", growth <= GROWTH_MIB),
        Goal("connections to the database", f"{most_connections}", f"≤ {CONNECTIONS}", most_connections <= CONNECTIONS),
        Goal("look-ups for one unknown key", f"{queries / unknown:.2f}", "≤ 1", queries <= unknown),
        Goal("keys more in Redis", f"{kept}", f"≤ {len(others)}", kept <= len(others)),
    ]
    marks = [
        Mark(hot_s, "one key at 20 times its limit"),
        Mark(calm_s, "it ends"),
        Mark(flood_s, "unknown keys"),
        Mark(over_s, "they end"),
    ]
    return Findings(figures, goals, [each.seen for each in load.results], marks)


DRILLS: Final = (flood,)
