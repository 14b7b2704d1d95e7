"""What one HTTP check takes inside the process: Python calls, calls of C functions, bytecodes, and CPU beside a bare protocol.

    python -m bench.http_work [--smoke] [--functions]

The server's own protocol, data plane, gate, counters in memory and recorders are driven without sockets: a turn of the loop
brings a request on each of 32 connections. The calls and bytecodes of `GET /v1/authorize` and of `POST /v1/check` do not depend
on the machine or its load; they do depend on Python's version. Requests repeat on their connection, or vary as in `bench.http`.
CPU is that of the process in the fastest of many rounds, which take turns with a bare protocol that parses the same bytes and
answers fixed ones: system calls cost both the same and are not in it, so ratios are higher than those of `bench.http`.

`--functions` prints the bytecodes by function.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import uvloop

from bench.http import KEYS, VARIED_POLICY
from bench.measure import Goal, report
from bench.peers.bare_http import Bare
from tidegate import time_slice
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.counters.memory import MemoryCounters
from tidegate.doors.http import DataPlane
from tidegate.doors.http_connection import Connection
from tidegate.doors.http_server import HttpServer
from tidegate.gate.gate import Gate
from tidegate.ledger.aggregate import UsageCounts
from tidegate.policy.toml_reader import load_policy
from tidegate.server.observers import observe_all, observe_all_passed
from tidegate.telemetry.metrics import Metrics
from tidegate.violations.recorder import Violations

CONNECTIONS = 32


class Transport(asyncio.Transport):
    """Counts the bytes that are written."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 50000)})
        self.answers: list[bytes] = []
        self.write = self.answers.append  # type: ignore[method-assign,assignment]

    def is_closing(self) -> bool:
        """Never."""
        return False


def authorize(number: int) -> bytes:
    """A request as `bench.http` varies them."""
    return (
        f"GET /v1/authorize HTTP/1.1\r\nHost: 127.0.0.1\r\nX-API-Key: demo-free-key-{number % KEYS + 1:04}\r\n"
        f"X-Original-URI: /api/v1/items/{number * 7919 % 10007}\r\nX-Original-Method: GET\r\n"
        f"X-Real-IP: 203.0.113.{number % 251}\r\n\r\n"
    ).encode()


def check(number: int) -> bytes:
    """The same as a body."""
    body = (
        f'{{"api_key":"demo-free-key-{number % KEYS + 1:04}","method":"GET","path":"/api/v1/items/{number * 7919 % 10007}",'
        f'"ip":"203.0.113.{number % 251}"}}'
    )
    return (
        "POST /v1/check HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}"
    ).encode()


Turn = list[tuple[Callable[[bytes], None], bytes]]


class Case:
    """Connections of one server, and what arrives on them.

    Args:
        make: makes the protocol of a connection.
        request: gives the request of a number.
        varied: whether requests differ, or repeat on their connection.
    """

    def __init__(self, make: Callable[[], asyncio.Protocol], request: Callable[[int], bytes], varied: bool) -> None:
        self._transports = [Transport() for _ in range(CONNECTIONS)]
        protocols = [make() for _ in self._transports]
        for protocol, transport in zip(protocols, self._transports, strict=True):
            protocol.connection_made(transport)
        self._receive = [protocol.data_received for protocol in protocols]
        self._numbers = iter(range(1 << 62))
        self._request = request
        self._varied = varied

    def turns(self, count: int) -> list[Turn]:
        """What arrives in so many turns of the loop."""
        return [
            [
                (receive, self._request(next(self._numbers) if self._varied else place))
                for place, receive in enumerate(self._receive)
            ]
            for _ in range(count)
        ]

    async def run(self, turns: list[Turn]) -> None:
        """Have requests answered, turn by turn."""
        for turn in turns:
            for receive, data in turn:
                receive(data)
            await asyncio.sleep(0)
        deadline = time.monotonic() + 30
        while min(len(transport.answers) for transport in self._transports) < len(turns) and time.monotonic() < deadline:
            await asyncio.sleep(0)  # a check that had to look up its caller goes on in a later turn
        for transport in self._transports:
            answers = list(transport.answers)
            if len(answers) != len(turns) or not all(answer.startswith(b"HTTP/1.1 20") for answer in answers):
                raise RuntimeError(f"{len(answers)} answers to {len(turns)} requests: {answers[:1]}")
            transport.answers.clear()


def data_plane(directory: str) -> Callable[[], Connection]:
    """Makes connections of a server as `tidegate serve` has it."""
    policy = Path(directory, "policy.toml")
    policy.write_text(VARIED_POLICY)
    metrics = Metrics("bench")
    usage = UsageCounts(latency=metrics.latency)
    observe = observe_all([metrics.observe, Violations().observe, usage.observe])
    passed = observe_all_passed([metrics.observe_passed, usage.observe_passed])
    gate = Gate(CachedCatalog(PolicyCatalog(load_policy(policy))), MemoryCounters(), observe, observe_passed=passed)
    server = HttpServer(DataPlane(gate, {}, metrics.observe))
    server._loop = asyncio.get_running_loop()  # as `start`, without a socket
    server.now = server._loop.time
    server._tick()
    return lambda: Connection(server)


async def counts(case: Case, turns: int) -> tuple[float, float, float, Counter[str]]:
    """Python calls, calls of C functions, bytecodes and bytecodes by function, of one check."""
    calls: Counter[str] = Counter()
    by_function: Counter[str] = Counter()

    def profile(_frame: FrameType, event: str, _argument: Any) -> None:
        calls[event] += 1

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        if event == "call":
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        elif event == "opcode":
            by_function[frame.f_code.co_qualname if sys.version_info >= (3, 11) else frame.f_code.co_name] += 1
        return trace

    slice_ns = time_slice.SLICE_NS
    vars(time_slice)["SLICE_NS"] = 1 << 62  # to count takes longer than the work itself
    brought = case.turns(turns)
    sys.setprofile(profile)
    await case.run(brought)
    sys.setprofile(None)
    brought = case.turns(turns)
    sys.settrace(trace)
    await case.run(brought)
    sys.settrace(None)
    vars(time_slice)["SLICE_NS"] = slice_ns
    for name in [each for each in by_function if each.startswith("Case.") or "asyncio" in each]:
        del by_function[name]
    checks = turns * CONNECTIONS
    return calls["call"] / checks, calls["c_call"] / checks, sum(by_function.values()) / checks, by_function


async def cpu_us(case: Case, turns: int) -> float:
    """CPU µs of a request."""
    brought = case.turns(turns)
    started = time.process_time()
    await case.run(brought)
    return (time.process_time() - started) / (turns * CONNECTIONS) * 1e6


def _figures(
    name: str, counted: tuple[float, float, float, Counter[str]], us: dict[str, list[float]], base: str
) -> Iterator[tuple[str, float, Goal | None]]:
    yield f"{name}: Python calls", counted[0], None
    yield f"{name}: calls of C functions", counted[1], None
    yield f"{name}: bytecodes", counted[2], None
    yield f"{name}: µs CPU without system calls", min(us[name]), None
    yield f"{name}: CPU to the bare protocol, without system calls", min(us[name]) / min(us[base]), None


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="the smallest size: that it works, not how fast or how much")
    parser.add_argument("--functions", action="store_true", help="print the bytecodes by function")
    arguments = parser.parse_args()
    rounds, turns = (2, 20) if arguments.smoke else (60, 25)
    with tempfile.TemporaryDirectory() as directory:
        make = data_plane(directory)
        cases = {
            "bare": Case(Bare, authorize, True),
            "repeated GET /v1/authorize": Case(make, authorize, False),
            "varied GET /v1/authorize": Case(make, authorize, True),
            "varied POST /v1/check": Case(make, check, True),
        }
        for case in cases.values():
            await case.run(case.turns(2 * KEYS // CONNECTIONS + 1))  # every caller is known, every layout learned
        gc.collect()
        gc.freeze()
        us: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(rounds):
            for name, case in cases.items():
                us[name].append(await cpu_us(case, turns))
        figures: list[tuple[str, float, Goal | None]] = [
            ("bare protocol + httptools: µs CPU without system calls", min(us["bare"]), None)
        ]
        for name, case in list(cases.items())[1:]:
            counted = await counts(case, 16)
            figures += _figures(name, counted, us, "bare")
            if arguments.functions:
                print(f"\n{name}: bytecodes by function")
                for function, count in counted[3].most_common(40):
                    print(f"  {count / 16 / CONNECTIONS:8.1f}  {function}")
    report("http_work", "What one HTTP check takes inside the process", figures, smoke=arguments.smoke)


if __name__ == "__main__":
    uvloop.run(main())
