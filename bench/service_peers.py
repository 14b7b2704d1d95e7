"""CPU per check beside other rate limit services: envoyproxy/ratelimit, gubernator, limitador and throttlecrab.

    python -m bench.service_peers [--smoke] [--peers DIRECTORY]

Each service that is installed runs as one process on loopback with one limit that is never reached; those that are not are
listed with the command that installs them (docs/comparison.md). Programs are searched in DIRECTORY, by default that of the
environment variable BENCH_PEERS, then on the PATH. CPU is what the kernel accounts to the server's process and its children;
the Redis is not counted. Load: wrk with 64 connections over HTTP; over gRPC h2load with 64 calls in flight on 2 connections, as
Envoy makes them. The services take turns in each round; a ratio is the median over the rounds.

Every request of a service is the same, so all of them find it in their caches: this measures their servers, not their misses.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import grpc

from bench.grpc import METHOD, call_message, free_port, h2load, original
from bench.http import HEADERS, cpu_of_tree, need_wrk, ours, server, wrk
from bench.measure import Goal, report
from bench.redis_server import redis_server
from tidegate.doors.grpc.reply_template import varint

CONNECTIONS: Final = 64
KEY: Final = "demo-free-key-0001"
LIMIT: Final = 100_000_000
POLICY: Final = f"""
[[tiers]]
name = "free"
  [[tiers.rules]]
  endpoint = "/api/v1/*"
  limits = ["{LIMIT}/minute"]
[[api_keys]]
key = "{KEY}"
tier = "free"
"""
LIMITADOR_LIMITS: Final = f"""
- namespace: tidegate
  max_value: {LIMIT}
  seconds: 60
  conditions: []
  variables: ["descriptors[0].api_key"]
"""
INSTALL: Final = {
    "envoyproxy/ratelimit": ("service_cmd", "go install github.com/envoyproxy/ratelimit/src/service_cmd@latest"),
    "gubernator": ("gubernator", "go install github.com/gubernator-io/gubernator/v2/cmd/gubernator@latest"),
    "limitador": (
        "limitador-server",
        "apt-get install protobuf-compiler libclang-dev; "
        "cargo install --locked --git https://github.com/Kuadrant/limitador limitador-server",
    ),
    "throttlecrab": ("throttlecrab-server", "cargo install --locked throttlecrab-server"),
}
"""The program of each peer, and how to install it."""

GET, POST, CALL = "Tidegate, GET /v1/authorize", "Tidegate, POST /v1/check", "Tidegate, ShouldRateLimit"


class Case(NamedTuple):
    """What is measured.

    Args:
        pid: the server's process.
        load: makes load for one round and returns the number of requests.
    """

    pid: int
    load: Callable[[], int]


class Load(NamedTuple):
    """How much load is made.

    Args:
        directory: for the files of the load programs.
        seconds: of each round over HTTP.
        calls: of each round over gRPC.
    """

    directory: str
    seconds: int
    calls: int

    def http(self, pid: int, port: int, path: str, expected: str, body: object = None, headers: Sequence[str] = ()) -> Case:
        """Requests over HTTP: GET, or POST with a JSON body. One is made now, and its answer has to match `expected`."""
        url = f"http://127.0.0.1:{port}{path}"
        sent = dict(line.split(": ", 1) for line in headers)
        script = None
        data = None
        if body is not None:
            sent["Content-Type"] = "application/json"
            data = json.dumps(body).encode()
            file = Path(self.directory, f"{port}.lua")
            file.write_text(
                f"wrk.method = 'POST'\nwrk.body = [==[{data.decode()}]==]\nwrk.headers['Content-Type'] = 'application/json'\n"
            )
            script = str(file)
        with urllib.request.urlopen(urllib.request.Request(url, data, sent), timeout=30) as answer:
            text = f"{answer.status} {answer.read().decode()}"
        if re.search(expected, text) is None:
            raise RuntimeError(f"{url} answered {text}; expected {expected}")

        def load() -> int:
            asked = wrk(port, path, self.seconds, CONNECTIONS, script, headers)
            if asked["errors"]:
                raise RuntimeError(f"{url}: {asked['errors']} errors")
            return int(asked["requests"])

        return Case(pid, load)

    def grpc(
        self, pid: int, port: int, method: str = METHOD, message: bytes | None = None, expected: bytes = b"\x08\x01"
    ) -> Case:
        """Calls over gRPC. One is made now, and its answer has to begin with `expected`."""
        sent = call_message() if message is None else message
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            ask: Callable[..., bytes] = channel.unary_unary(method)
            answer = ask(sent, timeout=30, wait_for_ready=True)
        if not answer.startswith(expected):
            raise RuntimeError(f"{method} answered {answer!r}; expected it to begin with {expected!r}")

        def load() -> int:
            h2load(pid, port, self.directory, self.calls, method=method, message=sent)
            return self.calls

        return Case(pid, load)


def installed(name: str) -> bool:
    """Whether a peer's program is on the PATH."""
    return shutil.which(INSTALL[name][0]) is not None


def _field(number: int, value: str | int | bytes) -> bytes:
    """A field of a protobuf message."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    text = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(text)) + text


@contextlib.contextmanager
def tidegate(load: Load, redis_url: str | None = None) -> Iterator[dict[str, Case]]:
    """Tidegate, on a Redis or in memory."""
    grpc_port = free_port()
    with tempfile.TemporaryDirectory() as own:
        places = {"TIDEGATE_SERVER__GRPC": f"127.0.0.1:{grpc_port}", "TIDEGATE_SERVER__ADMIN": ""}
        if redis_url is not None:
            places["TIDEGATE_COUNTERS__URL"] = redis_url
        body = {"api_key": KEY, "method": "GET", "path": "/api/v1/items", "ip": "203.0.113.7"}
        with ours(own, POLICY, **places) as (pid, port):
            yield {
                GET: load.http(pid, port, "/v1/authorize", "^2", headers=HEADERS),
                POST: load.http(pid, port, "/v1/check", '"allowed":true', body),
                CALL: load.grpc(pid, grpc_port),
            }


@contextlib.contextmanager
def limitador(load: Load, redis_url: str | None = None) -> Iterator[dict[str, Case]]:
    """limitador, on a Redis or in memory."""
    limits, grpc_port = Path(load.directory, "limitador.yaml"), free_port()
    limits.write_text(LIMITADOR_LIMITS)
    storage = ["memory"] if redis_url is None else ["redis", redis_url]
    body = {"namespace": "tidegate", "values": {"api_key": KEY}, "delta": 1, "response_headers": "DraftVersion03"}

    def command(port: int) -> list[str]:
        places = ["--http-ip", "127.0.0.1", "--http-port", str(port), "--rls-ip", "127.0.0.1", "--rls-port", str(grpc_port)]
        return ["limitador-server", *places, "--rate-limit-headers", "DRAFT_VERSION_03", str(limits), *storage]

    with server(command, load.directory) as (pid, port):
        yield {
            "limitador over HTTP": load.http(pid, port, "/check_and_report", "^200", body),
            "limitador over gRPC": load.grpc(pid, grpc_port),
        }


@contextlib.contextmanager
def throttlecrab(load: Load) -> Iterator[dict[str, Case]]:
    """throttlecrab, which counts in memory only."""
    grpc_port = free_port()
    body = {"key": KEY, "max_burst": LIMIT, "count_per_period": LIMIT, "period": 60, "quantity": 1}
    message = _field(1, KEY) + _field(2, LIMIT) + _field(3, LIMIT) + _field(4, 60) + _field(5, 1)

    def command(port: int) -> list[str]:
        places = ["--http-host", "127.0.0.1", "--http-port", str(port), "--grpc-host", "127.0.0.1", "--grpc-port", str(grpc_port)]
        return ["throttlecrab-server", "--http", "--grpc", *places, "--log-level", "error"]

    with server(command, load.directory) as (pid, port):
        yield {
            "throttlecrab over HTTP": load.http(pid, port, "/throttle", '"allowed":true', body),
            "throttlecrab over gRPC": load.grpc(pid, grpc_port, "/throttlecrab.RateLimiter/Throttle", message),
        }


@contextlib.contextmanager
def gubernator(load: Load) -> Iterator[dict[str, Case]]:
    """gubernator, which counts in memory only; one node."""
    grpc_port = free_port()
    limit = {"name": "requests", "unique_key": KEY, "hits": 1, "limit": LIMIT, "duration": 60_000}
    one = _field(1, "requests") + _field(2, KEY) + _field(3, 1) + _field(4, LIMIT) + _field(5, 60_000)
    places = {
        "GUBER_HTTP_ADDRESS": "127.0.0.1:{port}",
        "GUBER_GRPC_ADDRESS": f"127.0.0.1:{grpc_port}",
        "GUBER_ADVERTISE_ADDRESS": f"127.0.0.1:{grpc_port}",
        "GUBER_PEER_DISCOVERY_TYPE": "none",
        "GUBER_LOG_LEVEL": "error",
    }
    with server(lambda _: ["gubernator"], load.directory, **places) as (pid, port):
        yield {
            "gubernator over HTTP": load.http(pid, port, "/v1/GetRateLimits", "UNDER_LIMIT|remaining", {"requests": [limit]}),
            "gubernator over gRPC": load.grpc(pid, grpc_port, "/pb.gubernator.V1/GetRateLimits", _field(1, one), b"\x0a"),
        }


@contextlib.contextmanager
def envoys(load: Load) -> Iterator[dict[str, Case]]:
    """envoyproxy/ratelimit, which counts on Redis."""
    with original(load.directory) as (pid, port):
        yield {"envoyproxy/ratelimit over gRPC": load.grpc(pid, port)}


def measured(cases: Mapping[str, Case], rounds: int) -> dict[str, list[float]]:
    """CPU µs of a request, by case and round; the cases take turns."""
    if rounds > 1:
        for case in cases.values():
            case.load()
    cpu_us: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            before = cpu_of_tree(case.pid)
            requests = case.load()
            cpu_us[name].append((cpu_of_tree(case.pid) - before) / requests * 1e6)
    return cpu_us


GOALS: Final[Mapping[tuple[str, str, str], Goal]] = {
    ("in memory", GET, "limitador over HTTP"): Goal(at_most=1),
    ("in memory", GET, "throttlecrab over HTTP"): Goal(at_most=1),
    ("in memory", GET, "gubernator over HTTP"): Goal(at_most=1 / 3),
    ("in memory", POST, "limitador over HTTP"): Goal(at_most=1.3),
    ("in memory", POST, "throttlecrab over HTTP"): Goal(at_most=1.3),
    ("on Redis", GET, "limitador over HTTP"): Goal(at_most=0.5),
    ("on Redis", CALL, "envoyproxy/ratelimit over gRPC"): Goal(at_most=0.6),
}


def figures(place: str, cpu_us: Mapping[str, list[float]]) -> list[tuple[str, float, Goal | None]]:
    """CPU of each case, and the ratio of each of Tidegate's to each peer over the same protocol."""
    found: list[tuple[str, float, Goal | None]] = [
        (f"{name}, {place}, µs CPU", statistics.median(values), None) for name, values in cpu_us.items()
    ]
    for own in (GET, POST, CALL):
        for theirs, values in cpu_us.items():
            if theirs.endswith("over gRPC" if own == CALL else "over HTTP"):
                # A round that is too short for a tick of the kernel's clock says nothing.
                pairs = [a / b for a, b in zip(cpu_us[own], values, strict=True) if b > 0]
                if pairs:
                    goal = GOALS.get((place, own, theirs))
                    found.append((f"{own}, CPU to {theirs}, {place}", statistics.median(pairs), goal))
    return found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="the smallest size: that it works, not how fast or how much")
    parser.add_argument("--peers", default=os.environ.get("BENCH_PEERS", ""), metavar="DIRECTORY", help="where the programs are")
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    if arguments.peers:
        os.environ["PATH"] = f"{Path(arguments.peers).absolute()}:{os.environ['PATH']}"
    need_wrk()
    if shutil.which("h2load") is None:
        sys.exit("this bench needs h2load: install the Debian package nghttp2-client")
    rounds = 1 if arguments.smoke else 5
    found: list[tuple[str, float, Goal | None]] = []
    with tempfile.TemporaryDirectory() as directory, redis_server() as redis:
        load = Load(directory, 1, 500) if arguments.smoke else Load(directory, 3, 20_000)
        in_memory = {"limitador": limitador, "throttlecrab": throttlecrab, "gubernator": gubernator}
        with contextlib.ExitStack() as stack:
            cases = stack.enter_context(tidegate(load))
            for name, start in in_memory.items():
                if installed(name):
                    cases |= stack.enter_context(start(load))
            found += figures("in memory", measured(cases, rounds))
        with contextlib.ExitStack() as stack:
            cases = stack.enter_context(tidegate(load, redis.url))
            if installed("limitador"):
                cases |= stack.enter_context(limitador(load, redis.url))
            if installed("envoyproxy/ratelimit"):
                cases |= stack.enter_context(envoys(load))
            found += figures("on Redis", measured(cases, rounds))
    report("service_peers", "Rate limit services (CPU of the server's process)", found, smoke=arguments.smoke)
    for name, (_, command) in INSTALL.items():
        if not installed(name):
            print(f"  {name} is not installed: {command}")


if __name__ == "__main__":
    main()
