"""What nginx costs that asks Tidegate first: latency of the hop, and what a flood of denied requests costs Tidegate.

    python -m bench.gateways [--smoke]

deploy/nginx/gateway.conf in a real nginx, one worker, between wrk and an API that is another nginx and answers at once. The same
API is asked directly, through an nginx that only proxies, and through the gateway: rounds interleaved, 4 connections that pause
2 ms after each answer, medians. Then one blocked key floods the gateway as fast as it is answered, without and with the edge
cache; what reaches Tidegate is what nginx counts on its connections to it.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.servers.deployed import gateway
from tests.servers.nginx import Nginx
from tests.servers.ports import free_port

from bench.http import cpu_of_tree, need_wrk, server, wrk
from bench.measure import Goal, asked_for_smoke, report

POLICY = """
[[tiers]]
name = "free"
  [[tiers.rules]]
  endpoint = "/api/v1/*"
  limits = ["100000000/minute"]
  [[tiers.rules]]
  endpoint = "/few"
  limits = ["1/hour"]
[[api_keys]]
key = "demo-free-key-0001"
tier = "free"
"""
_API = "server {{ listen 127.0.0.1:{port}; keepalive_requests 1000000; location / {{ return 200 'from the API'; }} }}"
_PROXY = """
upstream api {{ server 127.0.0.1:{api}; keepalive 64; }}
server {{
    listen 127.0.0.1:{port};
    location / {{
        proxy_pass http://api;
        proxy_http_version 1.1;
        proxy_set_header Connection "";
    }}
}}
"""
_COUNTED = "log_subrequest on; access_log {log} reaching; internal;"


def _nginx(http: str, **ports: int) -> Nginx:
    port = free_port()
    return Nginx(http.format(port=port, **ports), port)


def _latencies(ways: dict[str, int], directory: str, rounds: int, seconds: int) -> dict[str, dict[str, float]]:
    """Median p50 and p99 of each way, ms."""
    script = Path(directory, "paced.lua")
    script.write_text("function delay() return 2 end\n")
    seen: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, port in ways.items():
            asked = wrk(port, "/api/v1/items", seconds, 4, str(script))
            if asked["errors"]:
                raise RuntimeError(f"{name}: {asked['errors']} errors")
            seen[name].append(asked)
    return {
        name: {quantile: statistics.median(each[quantile] for each in asked) for quantile in ("p50_ms", "p99_ms")}
        for name, asked in seen.items()
    }


def _flood(tidegate: tuple[int, int], api: int, edge: bool, seconds: int) -> dict[str, float]:
    """A blocked key asks as fast as it is answered; gives what reaches Tidegate of each 1,000 requests, and its CPU."""
    pid, port = tidegate
    made = gateway([port], api, edge=edge)
    log = made.directory / "reaching.log"
    snippet = made.directory / "snippets/tidegate-server.conf"
    made.add("log_format reaching '$upstream_bytes_sent $upstream_bytes_received';\n", first=True)
    snippet.write_text(snippet.read_text().replace("internal;", _COUNTED.format(log=log), 1))
    with made:
        before = cpu_of_tree(pid)
        asked = wrk(made.port, "/few", seconds, 8)
        cpu_s = cpu_of_tree(pid) - before
    reaching = [line.split() for line in log.read_text().splitlines()]
    sent = [(int(out), int(back)) for out, back in reaching if out.isdecimal() and back.isdecimal()]
    thousands = asked["requests"] / 1000
    return {
        "rate": asked["rate"],
        "requests": len(sent) / thousands,
        "bytes": sum(map(sum, sent)) / thousands,
        "cpu_us": cpu_s * 1e6 / asked["requests"],
    }


def main() -> None:
    smoke = asked_for_smoke(__doc__)
    rounds, seconds = (1, 1) if smoke else (5, 3)
    need_wrk()
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        Path(directory, "tidegate.policy.toml").write_text(POLICY)
        own = stack.enter_context(
            server(
                lambda _: [sys.executable, "-m", "tidegate", "serve"],
                directory,
                TIDEGATE_SERVER__HTTP="127.0.0.1:{port}",
                TIDEGATE_SERVER__ADMIN="",
                TIDEGATE_SERVER__GRPC="",
            )
        )
        api = stack.enter_context(_nginx(_API))
        proxy = stack.enter_context(_nginx(_PROXY, api=api.port))
        with gateway([own[1]], api.port) as asking:
            ways = {"the API itself": api.port, "through nginx": proxy.port, "through nginx that asks Tidegate": asking.port}
            latencies = _latencies(ways, directory, rounds, seconds)
        plain, edge = (_flood(own, api.port, with_edge, seconds) for with_edge in (False, True))
    through, asked = latencies["through nginx"], latencies["through nginx that asks Tidegate"]
    report(
        "gateways",
        "nginx that asks Tidegate first",
        [
            *((f"{name}: {quantile[:3]}, ms", value, None) for name, of in latencies.items() for quantile, value in of.items()),
            ("added by nginx: p50, ms", through["p50_ms"] - latencies["the API itself"]["p50_ms"], None),
            ("added by asking Tidegate: p50, ms", asked["p50_ms"] - through["p50_ms"], None),
            ("added by asking Tidegate: p99, ms", asked["p99_ms"] - through["p99_ms"], Goal(at_most=10)),
            ("flood of a blocked key, no edge cache: answers/s", plain["rate"], None),
            ("requests that reach Tidegate, of 1,000", plain["requests"], None),
            ("bytes to and from Tidegate, for 1,000", plain["bytes"], None),
            ("CPU of Tidegate a request of the flood, µs", plain["cpu_us"], None),
            ("the same, with edge cache: answers/s", edge["rate"], None),
            ("requests that reach Tidegate, of 1,000, with edge cache", edge["requests"], Goal(at_most=10)),
            ("bytes to and from Tidegate, for 1,000, with edge cache", edge["bytes"], None),
            ("CPU of Tidegate a request of the flood, µs, with edge cache", edge["cpu_us"], None),
        ],
        smoke=smoke,
    )


if __name__ == "__main__":
    main()
