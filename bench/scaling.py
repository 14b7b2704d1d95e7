"""Does a check cost the same with more instances and with more keys? Instances on a Redis Cluster of three masters.

    python -m bench.scaling [--smoke] [--keys 10000000]

Each instance is a process of its own and is asked by wrk at the same steady rate, about subjects drawn at random; two, three and
four of them together are asked two, three and four times as much. What is printed is the CPU time that the kernel accounts to the
processes, so that neighbours on the machine change it little: of the instances, and of the Redis servers, by check. Sizes
are interleaved round by round; medians are printed, and the ratio to the smallest size. The chart is bench/results/scaling.png.

The last part is one instance at its peak: there many checks share a turn of the event loop, and cost less each.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tests.servers.ports import free_port
from tests.servers.redis_cluster import RedisCluster
from tests.servers.redis_server import RedisServer

from bench.capacity import PATIENCE_S, ready
from bench.http import cpu_of_threads_s, need_wrk
from bench.measure import RESULTS, Goal, report

INSTANCES = 4
CONNECTIONS = 16
PAUSE_MS = 20
"""What wrk waits on each connection: about 700 checks a second and instance."""
BATCH = 1_000
TOLD_EVERY = 500_000
"""Keys are made in minutes: progress is printed."""
WITHIN = Goal(at_least=0.9, at_most=1.1)
POLICY = """
[[tiers]]
name = "public"
  [[tiers.rules]]
  endpoint = "/api/v1/*"
  limits = ["1000000/minute", "100000000/day"]
  subject = "ip"
[anonymous]
tier = "public"
"""
SCRIPT = """
function setup(thread) thread:set("seed", {seed}) end
function init() math.randomseed(seed) end
function request()
  local n = math.random(0, {keys} - 1)
  local ip = string.format("10.%d.%d.%d", math.floor(n / 65536), math.floor(n / 256) % 256, n % 256)
  return wrk.format("POST", "/v1/check", {{["Content-Type"] = "application/json"}},
    '{{"method":"GET","path":"/api/v1/items","ip":"' .. ip .. '"}}')
end
"""
DELAY = "function delay() return {pause_ms} end\n"


class Cost(NamedTuple):
    """Of a check.

    Args:
        instance_us: CPU of the instance, µs.
        redis_us: CPU of the Redis servers, µs.
        rate: checks a second of all instances together.
    """

    instance_us: float
    redis_us: float
    rate: float


class Fleet:
    """Some instances that run, and what they count on."""

    def __init__(self, cluster: RedisCluster, directory: str, instances: int) -> None:
        self.masters: Sequence[RedisServer] = cluster.nodes
        self.directory = directory
        Path(directory, "tidegate.policy.toml").write_text(POLICY)
        self.ports = [free_port() for _ in range(instances)]
        self.processes = [self._start(port, cluster.url) for port in self.ports]

    def wait_ready(self) -> None:
        """Until every instance is ready."""
        deadline = time.monotonic() + PATIENCE_S
        while not all(ready(port) for port in self.ports):
            if time.monotonic() > deadline or any(process.poll() is not None for process in self.processes):
                raise RuntimeError("an instance does not get ready")
            time.sleep(0.05)

    def fill(self, keys: int) -> None:
        """Count each subject once, so that its key is live."""
        connection = http.client.HTTPConnection("127.0.0.1", self.ports[0], timeout=60)
        for start in range(0, keys, BATCH):
            checks = [{"path": "/api/v1/items", "ip": _ip(number)} for number in range(start, min(start + BATCH, keys))]
            connection.request("POST", "/v1/check/batch", json.dumps({"checks": checks}), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            decisions = json.loads(answer.read())["decisions"]
            if start and start % TOLD_EVERY == 0:
                print(f"  {start:,} of {keys:,} keys are live", file=sys.stderr, flush=True)
            if answer.status != 200 or any(each["degraded"] or not each["allowed"] for each in decisions):
                raise RuntimeError(f"a batch was not counted: {answer.status}, {decisions[0]}")
        connection.close()

    def ask(self, instances: int, keys: int, seconds: int, pause_ms: int = PAUSE_MS, connections: int = CONNECTIONS) -> Cost:
        """Ask so many instances at once; the cost of a check there."""
        asked = self.processes[:instances]
        before = [cpu_of_threads_s(process.pid) for process in asked], [cpu_of_threads_s(node.pid) for node in self.masters]
        with ThreadPoolExecutor(instances) as pool:
            lines = pool.map(lambda number: self._wrk(number, keys, seconds, pause_ms, connections), range(instances))
            counts, rates = zip(*lines, strict=True)
        own = sum(cpu_of_threads_s(process.pid) for process in asked) - sum(before[0])
        redis = sum(cpu_of_threads_s(node.pid) for node in self.masters) - sum(before[1])
        return Cost(own / sum(counts) * 1e6, redis / sum(counts) * 1e6, sum(rates))

    def close(self) -> None:
        """End the instances."""
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait(PATIENCE_S)

    def _start(self, port: int, url: str) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ,
            "TIDEGATE_SERVER__HTTP": f"127.0.0.1:{port}",
            "TIDEGATE_SERVER__ADMIN": "",
            "TIDEGATE_SERVER__GRPC": "",
            "TIDEGATE_COUNTERS__URL": url,
            # A database of its own: what is measured is the way to Redis.
            "TIDEGATE_CATALOG__URL": f"sqlite:///{self.directory}/{port}.db",
            # Busy neighbours must not send a check to the local fallback.
            "TIDEGATE_COUNTERS__TIMEOUT_MS": "5000",
        }
        command = [sys.executable, "-m", "tidegate", "serve"]
        quiet = subprocess.DEVNULL
        return subprocess.Popen(command, cwd=self.directory, env=environment, stdout=quiet, stderr=quiet)

    def _wrk(self, number: int, keys: int, seconds: int, pause_ms: int, connections: int) -> tuple[int, float]:
        script = Path(self.directory, f"ask-{number}.lua")
        delay = DELAY.format(pause_ms=pause_ms) if pause_ms else ""
        script.write_text(SCRIPT.format(seed=number + 1, keys=keys) + delay)
        url = f"http://127.0.0.1:{self.ports[number]}"
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s", "-s", str(script), url]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = re.search(r"(\d+) requests in ([\d.]+)s", out)
        if found is None or "Non-2xx" in out or "Socket errors" in out:
            raise RuntimeError(f"wrk said:\n{out}")
        return int(found[1]), int(found[1]) / float(found[2])


def _ip(number: int) -> str:
    return f"10.{number // 65_536}.{number // 256 % 256}.{number % 256}"


def _middle(costs: Sequence[Cost]) -> Cost:
    return Cost(*(statistics.median(each[place] for each in costs) for place in range(3)))


def draw(by_instances: dict[int, list[Cost]], by_keys: dict[int, list[Cost]], path: Path) -> None:
    """The chart: CPU of a check by instances, and by keys; the goal is the band."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    sides = (("instances", by_instances, "linear"), ("live keys", by_keys, "log"))
    for axis, (name, seen, scale) in zip(axes, sides, strict=True):
        sizes = sorted(seen)
        for label, place in (("instance", 0), ("Redis, all masters", 1)):
            middle = [statistics.median(each[place] for each in seen[size]) for size in sizes]
            line = axis.plot(sizes, middle, marker="o", label=label)[0]
            axis.fill_between(sizes, 0.9 * middle[0], 1.1 * middle[0], alpha=0.15, color=line.get_color())
            axis.scatter(
                [size for size in sizes for _ in seen[size]], [each[place] for size in sizes for each in seen[size]], s=6
            )
        axis.set(xlabel=name, ylabel="µs CPU a check", xscale=scale, ylim=(0, None))
        if scale == "linear":
            axis.set_xticks(sizes)
        axis.legend()
    figure.suptitle("CPU of a check by instances and live keys (lines: medians of the dots; bands: ±10 % of the smallest size)")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def figures(name: str, seen: dict[int, list[Cost]]) -> list[tuple[str, float, Goal | None]]:
    """Of one part: medians, and ratios to the smallest size, round by round."""
    rows: list[tuple[str, float, Goal | None]] = []
    first = seen[min(seen)]
    for size in sorted(seen):
        cost = _middle(seen[size])
        rows += [
            (f"{size:,} {name}, instance, µs CPU a check", cost.instance_us, None),
            (f"{size:,} {name}, Redis, µs CPU a check", cost.redis_us, None),
            (f"{size:,} {name}, checks/s of all", cost.rate, None),
        ]
        if size != min(seen):
            own = [one.instance_us / base.instance_us for one, base in zip(seen[size], first, strict=True)]
            rows.append((f"{size:,} {name}, instance, ratio to {min(seen):,}", statistics.median(own), WITHIN))
            redis = [one.redis_us / base.redis_us for one, base in zip(seen[size], first, strict=True)]
            rows.append((f"{size:,} {name}, Redis, ratio to {min(seen):,}", statistics.median(redis), Goal(at_most=1.1)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="the smallest size: that it works, not how fast")
    parser.add_argument("--keys", type=int, default=1_000_000, metavar="N", help="most live keys (10,000,000 need 3 GB)")
    asked = parser.parse_args()
    most = 10_000 if asked.smoke else asked.keys
    if not 1_000 <= most <= 16_000_000:
        parser.error(f"--keys {most} is out of range: give 1,000 to 16,000,000")
    rounds, seconds, instances = (1, 1, 2) if asked.smoke else (7, 2, INSTANCES)
    need_wrk()
    sizes = [10**power for power in range(3, 9) if 10**power < most] + [most]
    by_instances: dict[int, list[Cost]] = {number + 1: [] for number in range(instances)}
    by_keys: dict[int, list[Cost]] = {size: [] for size in sizes}
    peaks: list[Cost] = []
    with RedisCluster(masters=3) as cluster, tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        fleet = Fleet(cluster, directory, instances)
        stack.callback(fleet.close)
        fleet.wait_ready()
        fleet.fill(sizes[1] if len(sizes) > 1 else most)
        fleet.ask(instances, sizes[0], 1)  # connections are made, scripts loaded
        for _ in range(rounds):
            for number, costs in by_instances.items():
                costs.append(fleet.ask(number, min(10_000, most), seconds))
        fleet.fill(most)
        for _ in range(rounds):
            for size, costs in by_keys.items():
                costs.append(fleet.ask(1, size, seconds))
        for _ in range(rounds):
            peaks.append(fleet.ask(1, min(10_000, most), seconds, pause_ms=0, connections=64))
    peak = _middle(peaks)
    rows = figures("instance(s)", by_instances) + figures("keys", by_keys)
    rows += [
        ("one instance at its peak, µs CPU a check", peak.instance_us, None),
        ("one instance at its peak, Redis, µs CPU a check", peak.redis_us, None),
    ]
    RESULTS.mkdir(exist_ok=True)
    draw(by_instances, by_keys, RESULTS / "scaling.png")
    report("scaling", "Cost of a check by instances and keys, three masters of Redis Cluster", rows, smoke=asked.smoke)


if __name__ == "__main__":
    main()
