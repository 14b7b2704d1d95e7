"""What a plan of capacity needs beside the CPU of a check: bytes on the wire, start and drain, rows and look-ups of the database.

    python -m bench.capacity [--smoke]

1. bytes of a gateway's question and of its answer over HTTP, and of the call at Redis, without TCP's and IP's own headers
2. from exec of `tidegate serve` to 200 at /readyz, from SIGTERM to its end, and the resident memory in between; of the starts,
   the shortest is the one that neighbours on the machine held up least
3. one API key in PostgreSQL with its indexes, what the server's own processes spend on the look-up of one (the least of
   five rounds), and what it takes in the cache that instances share
"""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import uvloop
from tests.servers.ports import free_port
from tests.servers.postgres import PostgresServer
from tests.servers.process_tree import tree_of

from bench.catalog import fill, policy
from bench.http import HEADERS, POLICY, cpu_of_threads_s, ours
from bench.measure import Goal, asked_for_smoke, report
from bench.redis_server import info, redis_server
from tidegate.catalog.shared import SharedCatalog
from tidegate.catalog.sql.catalog import SqlCatalog
from tidegate.catalog.sql.database import DatabaseOptions
from tidegate.counters.redis.store import RedisCounters
from tidegate.policy.toml_reader import parse_policy

Figures = list[tuple[str, float, Goal | None]]
PATIENCE_S = 60.0
ROUNDS = 5


def ready(port: int) -> bool:
    """Whether the instance says that it can decide."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/readyz")
            return connection.getresponse().status == 200
        finally:
            connection.close()
    return False


def resident_mb(pid: int) -> float:
    """Resident memory of a process, MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS:")).split()[1]) / 1e3


def authorize(port: int, times: int) -> tuple[float, float]:
    """Ask as a gateway does, on one connection; bytes of a question and of its answer."""
    headers = "".join(f"{header}\r\n" for header in HEADERS)
    question = f"GET /v1/authorize HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n{headers}\r\n".encode()
    received = 0
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        for _ in range(times):
            connection.sendall(question)
            answer = b""
            while not answer.endswith(b"\r\n\r\n"):  # 204: no body
                piece = connection.recv(65_536)
                if not piece:
                    raise RuntimeError(f"the instance closed the connection after {answer!r}")
                answer += piece
            if not answer.startswith(b"HTTP/1.1 204"):
                raise RuntimeError(f"a check was not allowed: {answer[:80]!r}")
            received += len(answer)
    return len(question), received / times


def one_life(redis_url: str, directory: str) -> tuple[float, float, float]:
    """Start an instance, wait until it is ready, end it; s to start, s to end, and MB in between."""
    port = free_port()
    Path(directory, "tidegate.policy.toml").write_text(POLICY)
    environment = {
        **os.environ,
        "TIDEGATE_SERVER__HTTP": f"127.0.0.1:{port}",
        "TIDEGATE_SERVER__ADMIN": "",
        "TIDEGATE_SERVER__GRPC": "",
        "TIDEGATE_COUNTERS__URL": redis_url,
    }
    started = time.monotonic()
    command = [sys.executable, "-m", "tidegate", "serve"]
    process = subprocess.Popen(command, cwd=directory, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not ready(port):
            if process.poll() is not None or time.monotonic() - started > PATIENCE_S:
                raise RuntimeError(f"tidegate serve was not ready within {PATIENCE_S:g} s (exit code {process.poll()})")
            time.sleep(0.01)
        start_s = time.monotonic() - started
        authorize(port, 20)
        held_mb = resident_mb(process.pid)
        ended = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE_S)
        return start_s, time.monotonic() - ended, held_mb
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def wire(checks: int) -> Figures:
    """Bytes of a check at the door and at Redis."""
    with tempfile.TemporaryDirectory() as directory, redis_server(cluster=True) as redis, contextlib.ExitStack() as stack:
        url = redis.url.replace("redis://", "redis+cluster://").removesuffix("/0")
        _, port = stack.enter_context(
            ours(directory, TIDEGATE_COUNTERS__URL=url, TIDEGATE_SERVER__ADMIN="", TIDEGATE_SERVER__GRPC="")
        )
        deadline = time.monotonic() + PATIENCE_S
        while not ready(port):
            if time.monotonic() > deadline:
                raise RuntimeError("the instance does not get ready")
            time.sleep(0.05)
        authorize(port, 20)
        before = info(redis, "stats")
        question, answer = authorize(port, checks)
        after = info(redis, "stats")
    # Heartbeats and slot look-ups are in it; over some thousand checks they are less than 1 %.
    to_redis, from_redis = ((after[name] - before[name]) / checks for name in ("total_net_input_bytes", "total_net_output_bytes"))
    return [
        ("GET /v1/authorize, bytes of the question", question, None),
        ("GET /v1/authorize, bytes of the answer", answer, None),
        ("one check at Redis, bytes to it", to_redis, None),
        ("one check at Redis, bytes from it", from_redis, None),
    ]


def lives(rounds: int) -> Figures:
    """Start, end and memory of an instance."""
    with redis_server() as redis, tempfile.TemporaryDirectory() as directory:
        seen = [one_life(redis.url, directory) for _ in range(rounds)]
    return [
        ("start to /readyz 200, s", statistics.median(each[0] for each in seen), None),
        ("start to /readyz 200, shortest, s", min(each[0] for each in seen), None),
        ("start to /readyz 200, longest, s", max(each[0] for each in seen), None),
        ("SIGTERM to the end with nothing in flight, s", statistics.median(each[1] for each in seen), None),
        ("resident memory of an instance, MB", statistics.median(each[2] for each in seen), None),
    ]


async def database(server: PostgresServer, count: int, look_ups: int) -> Figures:
    """Bytes a key and CPU a look-up, by the server's own processes."""
    catalog = await SqlCatalog.open(server.url(), DatabaseOptions(timeout_s=10))
    try:
        await catalog.apply_policy(parse_policy(policy()), "bench")
        keys = fill(server, count)
        size = server.execute("SELECT pg_total_relation_size('api_keys')")[0][0]
        for key in keys[:100]:
            await catalog.api_key(key)
        step = max(len(keys) // look_ups, 1)
        asked = keys[::step][:look_ups]
        spent = [await look_up_cpu_s(server, catalog, asked[number::ROUNDS]) for number in range(ROUNDS)]
        entry = await cached_bytes(catalog, asked)
    finally:
        await catalog.close()
    return [
        ("an API key in PostgreSQL with its indexes, bytes", size / count, None),
        ("look-up of a key, µs CPU of PostgreSQL", min(spent) * 1e6, None),
        ("a key in the shared cache, bytes of Redis", entry, None),
    ]


async def look_up_cpu_s(server: PostgresServer, catalog: SqlCatalog, keys: Sequence[str]) -> float:
    """CPU seconds of PostgreSQL's processes for the look-up of one key."""
    # Processes that live on keep their times: none may end between the two readings.
    before = {pid: cpu_of_threads_s(pid) for pid in tree_of(server.pid)}
    for key in keys:
        await catalog.api_key(key)
    return sum(cpu_of_threads_s(pid) - before.get(pid, 0.0) for pid in tree_of(server.pid)) / len(keys)


async def cached_bytes(catalog: SqlCatalog, keys: Sequence[str]) -> float:
    """Redis memory of a key's entry in the shared cache."""
    with redis_server(cluster=True) as redis:
        store = RedisCounters(redis.url.replace("redis://", "redis+cluster://").removesuffix("/0"), timeout_s=10)
        await store.start()
        try:
            shared = SharedCatalog(catalog, store, await catalog.cache_secret())
            await shared.api_key(keys[0])
            await shared.settle()
            before, held = info(redis, "memory")["used_memory"], int(redis.client.dbsize())  # type: ignore[arg-type]
            for key in keys[1:]:
                await shared.api_key(key)
            await shared.settle()
            more = int(redis.client.dbsize()) - held  # type: ignore[arg-type]
            return float((info(redis, "memory")["used_memory"] - before) / more)
        finally:
            await store.close()


def main() -> None:
    smoke = asked_for_smoke(__doc__)
    figures = wire(200 if smoke else 5_000) + lives(1 if smoke else 9)
    with PostgresServer({"autovacuum": "off"}) as server:  # its workers come and go between two readings
        figures += uvloop.run(database(server, 2_000 if smoke else 100_000, 200 if smoke else 10_000))
    report("capacity", "What a plan of capacity rests on", figures, smoke=smoke)


if __name__ == "__main__":
    main()
