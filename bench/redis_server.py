"""A Redis of the bench's own: a free loopback port, no persistence, ended with it."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from redis import Redis


class BenchRedis(NamedTuple):
    """A running server.

    Args:
        client: a blocking client to ask about it.
    """

    url: str
    pid: int
    client: Redis


@contextlib.contextmanager
def redis_server(cluster: bool = False) -> Iterator[BenchRedis]:
    """Start a server; it ends with the block.

    Args:
        cluster: in cluster mode, with all slots: it keeps 16 bytes more a key.
    """
    binary = shutil.which("redis-server")
    if binary is None:
        sys.exit("this bench needs a Redis: install the Debian package redis-server")
    with socket.socket() as probe, socket.socket() as second:
        probe.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        port, bus = int(probe.getsockname()[1]), int(second.getsockname()[1])
    with tempfile.TemporaryDirectory() as directory:
        options: tuple[str, ...] = (
            "--port",
            str(port),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--appendonly",
            "no",
            "--dir",
            directory,
        )
        if cluster:
            options += ("--cluster-enabled", "yes", "--cluster-port", str(bus))
        process = subprocess.Popen([binary, *options], stdout=subprocess.DEVNULL)
        client = Redis(host="127.0.0.1", port=port)
        try:
            deadline = time.monotonic() + 10
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"redis-server did not start (exit code {process.poll()})")
                time.sleep(0.02)
            if cluster:
                run: Any = client.execute_command  # redis-py leaves it untyped
                run("CLUSTER", "ADDSLOTSRANGE", "0", "16383")
                while "cluster_state:ok" not in str(run("CLUSTER", "INFO")):
                    time.sleep(0.05)
            yield BenchRedis(f"redis://127.0.0.1:{port}/0", process.pid, client)
        finally:
            client.close()
            process.terminate()
            process.wait(10)


def info(server: BenchRedis, section: str) -> dict[str, Any]:
    """A section of INFO; redis-py types it as perhaps awaitable."""
    answer: Any = server.client.info(section)
    found: dict[str, Any] = answer
    return found


def redis_cpu_us(server: BenchRedis) -> float:
    """CPU time of the server's process so far, µs. What INFO commandstats has is time: more where the machine is busy."""
    used = info(server, "cpu")
    return (float(used["used_cpu_user"]) + float(used["used_cpu_sys"])) * 1e6
