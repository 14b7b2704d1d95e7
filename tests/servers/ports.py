"""Where servers of tests listen."""

from __future__ import annotations

import functools
import os
import random
import socket

HOST = "127.0.0.1"
BUS_OFFSET = 10_000
"""What a node of a Redis Cluster adds to its port for the port of its bus."""

_given: set[int] = set()


@functools.cache
def _ports() -> range:
    """Of processes that run tests side by side each has ports of its own: two would choose the same one now and then."""
    side_by_side = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    place = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    return range(10_500 + place, 20_500, side_by_side)


def free_port() -> int:
    """Choose a port for a server, so that the port of a cluster's bus is free as well.

    Both lie below the range that Linux hands out by itself: no connection takes one between the choice and the start.

    Returns:
        A loopback port in 10500…20499, never the same twice in one run of the tests.
    """
    chooser = random.SystemRandom()  # tests seed the shared generator
    for _ in range(1000):
        port = chooser.choice(_ports())
        if port not in _given and _is_free(port) and _is_free(port + BUS_OFFSET):
            _given.add(port)
            return port
    raise RuntimeError("no free pair of ports in 10500…20499 and 20500…30499")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As the servers do: a port with old connections in TIME_WAIT is free for them.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def accepts(port: int) -> bool:
    """Whether a connection to a loopback port is accepted."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((HOST, port)) == 0
