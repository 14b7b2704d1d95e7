"""CPU per HTTP check beside a bare asyncio protocol with fixed bytes, the last release on Granian, and FastAPI + slowapi; on
Redis with leases, which are the default, and without; and latency at 70 % of the peak.

    python -m bench.http [--smoke] [--bare] [--before DIRECTORY]

`--before` measures another version too, in the same run: DIRECTORY is its checkout (`git worktree add`).
The release is measured where `python -m bench.granian_release` has installed it.

Each server runs as a process of its own on loopback, wrk asks it from the other core, and the CPU time is what the kernel
accounts to the server's process. Rounds are interleaved; medians are printed, and the ratio to the peer measured in the same
run.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.granian_release import installed
from bench.measure import Goal, report
from bench.redis_server import redis_server

HERE = Path(__file__).parent
HEADERS = ("X-API-Key: demo-free-key-0001", "X-Original-URI: /api/v1/items", "X-Original-Method: GET", "X-Real-IP: 203.0.113.7")
POLICY = """
[[tiers]]
name = "free"
limits = ["900000000/day"]
  [[tiers.rules]]
  endpoint = "/api/v1/*"
  limits = ["100000000/minute"]
[[api_keys]]
key = "demo-free-key-0001"
tier = "free"
"""
LEASED, UNLEASED = "on Redis", "on Redis without leases"
KEYS = 499
VARIED_POLICY = POLICY + "".join(
    f'[[api_keys]]\nkey = "demo-free-key-{number:04}"\ntier = "free"\n' for number in range(2, KEYS + 1)
)
VARIED = f"""
-- No request is like the one before it on its connection: keys, paths and addresses vary.
local requests, number = {{}}, 0
function init()
  for each = 0, 4998 do
    local key = string.format("demo-free-key-%04d", each % {KEYS} + 1)
    requests[each] = wrk.format("GET", "/v1/authorize", {{
      ["Host"] = "127.0.0.1", ["X-API-Key"] = key, ["X-Original-URI"] = "/api/v1/items/" .. each * 7919 % 10007,
      ["X-Original-Method"] = "GET", ["X-Real-IP"] = "203.0.113." .. each % 251
    }})
  end
end
function request()
  number = (number + 1) % 4999
  return requests[number]
end
"""
"""For wrk: a proxy's connections, on which requests of many clients come."""
POST = """
wrk.method = "POST"
wrk.body = '{"api_key":"demo-free-key-0001","method":"GET","path":"/api/v1/items","ip":"203.0.113.7"}'
wrk.headers["Content-Type"] = "application/json"
"""


@contextlib.contextmanager
def server(command: Callable[[int], list[str]], directory: str, **environment: str) -> Iterator[tuple[int, int]]:
    """A server process on a free port; yields its process id and port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    process = subprocess.Popen(
        command(port),
        cwd=directory,
        env={**os.environ, **{name: value.format(port=port) for name, value in environment.items()}},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120  # a start takes 2 s of CPU, and other programs may run
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command(port)[0]} did not start (exit code {process.poll()})")
            time.sleep(0.05)
        yield process.pid, port
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:  # some peers finish only when their clients have left
            process.kill()
            process.wait(10)


def cpu_s(pid: int) -> float:
    """CPU seconds of a process with all its threads and the children it has waited for."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(field) for field in fields[11:15]) / os.sysconf("SC_CLK_TCK")


def cpu_of_threads_s(pid: int) -> float:
    """CPU seconds of a process's live threads, to the nanosecond; a tick of `cpu_s` is 10 ms."""
    return sum(int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir()) / 1e9


def cpu_of_tree(pid: int) -> float:
    """CPU seconds of a process and its live children (Granian's own command starts its worker as a child)."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return cpu_s(pid) + sum(cpu_of_tree(int(child)) for child in children)


def wrk(
    port: int, path: str, seconds: int, connections: int, script: str | None = None, headers: Sequence[str] = HEADERS
) -> dict[str, Any]:
    """Ask a path as fast as it answers; gives requests, errors and latencies in ms."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "--timeout", "5s"]
    for header in headers:
        command += ["-H", header]
    if script is not None:
        command += ["-s", script]
    done = subprocess.run([*command, f"http://127.0.0.1:{port}{path}"], capture_output=True, text=True, check=False)
    out = done.stdout + done.stderr
    requests = re.search(r"(\d+) requests in ([\d.]+)(m?s)", out)
    p99 = re.search(r"99%\s+([\d.]+)(us|ms|s)", out)
    p50 = re.search(r"50%\s+([\d.]+)(us|ms|s)", out)
    if requests is None or p99 is None or p50 is None:
        raise RuntimeError(f"wrk said:\n{out}")
    in_ms = {"us": 1e-3, "ms": 1.0, "s": 1e3}
    return {
        "requests": int(requests.group(1)),
        "rate": int(requests.group(1)) / float(requests.group(2)),
        "p50_ms": float(p50.group(1)) * in_ms[p50.group(2)],
        "p99_ms": float(p99.group(1)) * in_ms[p99.group(2)],
        "errors": sum(map(int, re.findall(r"(?:connect|read|write|timeout) (\d+)", out)))
        + sum(map(int, re.findall(r"Non-2xx or 3xx responses: (\d+)", out))),
    }


Case = tuple[tuple[int, int], str, str | None]
"""What is asked: process id and port, path, and a script for wrk."""


def need_wrk() -> None:
    """End with what to do where wrk is not there."""
    if shutil.which("wrk") is None:
        sys.exit("this bench needs wrk: install the Debian package wrk")


def ours(
    directory: str, policy: str = POLICY, python: str = sys.executable, **environment: str
) -> contextlib.AbstractContextManager[tuple[int, int]]:
    """`tidegate serve` with a policy, one process."""
    Path(directory, "tidegate.policy.toml").write_text(policy)
    places = {
        "TIDEGATE_SERVER__HTTP": "127.0.0.1:{port}",
        "TIDEGATE_SERVER__GRPC": "",
        "TIDEGATE_SERVER__ADMIN": "",
        **environment,
    }
    return server(lambda _: [python, "-m", "tidegate", "serve"], directory, **places)


def bare() -> contextlib.AbstractContextManager[tuple[int, int]]:
    """A bare asyncio protocol with httptools on uvloop that answers fixed bytes, one process."""
    return server(lambda port: [sys.executable, str(HERE / "peers" / "bare_http.py"), str(port)], str(HERE / "peers"))


def peer(app: str, **environment: str) -> contextlib.AbstractContextManager[tuple[int, int]]:
    """An ASGI app of bench/peers under the same HTTP server, one process."""
    flags = ("--interface", "asgi", "--loop", "uvloop", "--no-ws", "--workers", "1", "--log-level", "error")
    return server(
        lambda port: [sys.executable, "-m", "granian", *flags, "--host", "127.0.0.1", "--port", str(port), f"{app}:app"],
        str(HERE / "peers"),
        **environment,
    )


def interleaved(cases: dict[str, Case], rounds: int, seconds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Ask each case in turn, round by round.

    Returns:
        CPU µs a request and requests a second, by case and round.
    """
    for (_, port), path, script in cases.values():
        wrk(port, path, 1, 32, script)
    cpu_us: dict[str, list[float]] = {name: [] for name in cases}
    rates: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, ((pid, port), path, script) in cases.items():
            before = cpu_of_tree(pid)
            asked = wrk(port, path, seconds, 32, script)
            if asked["errors"]:
                raise RuntimeError(f"{name}: {asked['errors']} errors")
            cpu_us[name].append((cpu_of_tree(pid) - before) / asked["requests"] * 1e6)
            rates[name].append(asked["rate"])
    return cpu_us, rates


def paced(port: int, path: str, peak: float, directory: str, rounds: int, seconds: int) -> list[dict[str, Any]]:
    """Ask at about 70 % of the peak: wrk pauses 2 ms on each connection, and a trial says how many connections that takes."""
    script = Path(directory, "paced.lua")
    script.write_text("function delay() return 2 end\n")
    trial = wrk(port, path, 1, 32, str(script))
    connections = max(round(32 * 0.7 * peak / trial["rate"]), 1)
    return [wrk(port, path, seconds, connections, str(script)) for _ in range(rounds)]


def paced_figures(peak: float, latencies: list[dict[str, Any]]) -> list[tuple[str, float, Goal | None]]:
    """What `paced` found, for the report."""
    return [
        ("peak, requests/s", peak, None),
        ("rate at the latency run, share of the peak", statistics.median(each["rate"] for each in latencies) / peak, None),
        ("p50 there, ms", statistics.median(each["p50_ms"] for each in latencies), None),
        ("p99 there, ms", statistics.median(each["p99_ms"] for each in latencies), Goal(at_most=10)),
    ]


def ratio(cpu_us: dict[str, list[float]], theirs: str, own: str) -> float:
    """How many times the requests per CPU second, median over the rounds."""
    return statistics.median(a / b for a, b in zip(cpu_us[theirs], cpu_us[own], strict=True))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="the smallest size: that it works, not how fast or how much")
    parser.add_argument("--bare", action="store_true", help="only the checks beside the bare protocol; writes no results")
    parser.add_argument("--before", metavar="DIRECTORY", help="a checkout of another version, measured beside this one")
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    smoke = arguments.smoke
    rounds, seconds = (1, 1) if smoke else (5, 3)  # wrk takes whole seconds
    need_wrk()
    release = installed()
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryDirectory() as other, contextlib.ExitStack() as stack:
        post = Path(directory, "post.lua")
        post.write_text(POST)
        varied = Path(directory, "varied.lua")
        varied.write_text(VARIED)
        own = stack.enter_context(ours(directory, VARIED_POLICY))
        least = stack.enter_context(bare())
        cases: dict[str, Case] = {
            "bare": (least, "/v1/authorize", None),
            "GET /v1/authorize": (own, "/v1/authorize", None),
            "bare, varied": (least, "/v1/authorize", str(varied)),
            "varied": (own, "/v1/authorize", str(varied)),
            "POST /v1/check": (own, "/v1/check", str(post)),
        }
        before: list[tuple[str, str, str]] = []
        if arguments.before:
            place = stack.enter_context(tempfile.TemporaryDirectory())
            earlier = stack.enter_context(ours(place, VARIED_POLICY, PYTHONPATH=str(Path(arguments.before, "src").absolute())))
            for name, least_name in (("GET /v1/authorize", "bare"), ("varied", "bare, varied"), ("POST /v1/check", "bare")):
                cases[f"{name}, before"] = (earlier, *cases[name][1:])
                before.append((name, f"{name}, before", least_name))
        redis = stack.enter_context(redis_server())
        for name, leases in ((LEASED, "true"), (UNLEASED, "false")):
            place = stack.enter_context(tempfile.TemporaryDirectory())
            on_redis = ours(place, VARIED_POLICY, TIDEGATE_COUNTERS__URL=redis.url, TIDEGATE_LEASES__ENABLED=leases)
            cases[name] = (stack.enter_context(on_redis), "/v1/authorize", None)
        if release is not None:
            cases["release"] = (stack.enter_context(ours(other, python=release)), "/v1/authorize", None)
        if not arguments.bare:
            cases["FastAPI + slowapi"] = (stack.enter_context(peer("slowapi_app")), "/v1/authorize", None)
        cpu_us, rates = interleaved(cases, rounds, seconds)
        median = {name: statistics.median(values) for name, values in cpu_us.items()}
        figures: list[tuple[str, float, Goal | None]] = [
            ("bare asyncio protocol + httptools, fixed bytes, µs CPU", median["bare"], None),
            ("GET /v1/authorize, µs CPU", median["GET /v1/authorize"], Goal(at_most=45)),
            ("GET /v1/authorize, CPU to the bare protocol", ratio(cpu_us, "GET /v1/authorize", "bare"), Goal(at_most=2)),
            ("the bare protocol with requests of varied keys, paths and addresses, µs CPU", median["bare, varied"], None),
            ("GET /v1/authorize with them, µs CPU", median["varied"], Goal(at_most=45)),
            ("the same, CPU to the bare protocol", ratio(cpu_us, "varied", "bare, varied"), Goal(at_most=2)),
            ("POST /v1/check, µs CPU", median["POST /v1/check"], Goal(at_most=70)),
            ("POST /v1/check, CPU to the bare protocol", ratio(cpu_us, "POST /v1/check", "bare"), Goal(at_most=2.5)),
            ("GET /v1/authorize on Redis, µs CPU", median[LEASED], None),
            ("the same, CPU to memory", ratio(cpu_us, LEASED, "GET /v1/authorize"), Goal(at_most=1.7)),
            ("GET /v1/authorize on Redis without leases, µs CPU", median[UNLEASED], None),
            ("the same, CPU to memory", ratio(cpu_us, UNLEASED, "GET /v1/authorize"), None),
        ]
        if release is not None:
            figures += [
                ("GET /v1/authorize in the last release on Granian, µs CPU", median["release"], None),
                ("GET /v1/authorize, CPU to that release", ratio(cpu_us, "GET /v1/authorize", "release"), Goal(at_most=0.3)),
            ]
        for name, earlier_name, least_name in before:
            figures += [
                (f"{earlier_name}, CPU to the bare protocol", ratio(cpu_us, earlier_name, least_name), None),
                (f"{name}, CPU to that before", ratio(cpu_us, name, earlier_name), None),
            ]
        if arguments.bare:
            for label, value, goal in figures:
                print(f"  {label:<78}{value:>8.2f}  {'' if goal is None else f'goal {goal}'}")
            return
        peak = statistics.median(rates["GET /v1/authorize"])
        latencies = paced(own[1], "/v1/authorize", peak, directory, rounds, seconds)
    report(
        "http",
        "HTTP on the embedded default (CPU of the server's process)",
        [
            *figures,
            ("FastAPI + slowapi (memory), µs CPU", median["FastAPI + slowapi"], None),
            (
                "requests per CPU second, ratio to FastAPI + slowapi",
                ratio(cpu_us, "FastAPI + slowapi", "GET /v1/authorize"),
                Goal(at_least=15),
            ),
            *paced_figures(peak, latencies),
        ],
        smoke=smoke,
    )


if __name__ == "__main__":
    main()
