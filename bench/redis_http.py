"""HTTP checks on Redis: CPU of the server beside FastAPI with `limits` and with fastapi-limiter, and latency at 70 % of the peak.

    python -m bench.redis_http [--smoke]

As `bench.http`, with one Redis for all on loopback. `limits` counts two sliding windows and asks for the stats that its headers
need; fastapi-limiter counts two fixed windows and sends no headers: each as its documentation says.

Tidegate leases units of a busy caller, as is the default; the row without leases asks Redis for each check, as the peers do.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile

from bench.http import interleaved, need_wrk, ours, paced, paced_figures, peer, ratio
from bench.measure import Goal, asked_for_smoke, report
from bench.redis_server import redis_server


def main() -> None:
    smoke = asked_for_smoke(__doc__)
    rounds, seconds = (1, 1) if smoke else (5, 3)
    need_wrk()
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryDirectory() as other, contextlib.ExitStack() as stack:
        redis = stack.enter_context(redis_server())
        own = stack.enter_context(ours(directory, TIDEGATE_COUNTERS__URL=redis.url))
        memory = stack.enter_context(ours(other))
        third = stack.enter_context(tempfile.TemporaryDirectory())
        unleased = stack.enter_context(ours(third, TIDEGATE_COUNTERS__URL=redis.url, TIDEGATE_LEASES__ENABLED="false"))
        limits = stack.enter_context(peer("limits_redis_app", REDIS_URL=redis.url))
        limiter = stack.enter_context(peer("fastapi_limiter_app", REDIS_URL=redis.url))
        cpu_us, rates = interleaved(
            {
                "ours": (own, "/v1/authorize", None),
                "memory": (memory, "/v1/authorize", None),
                "unleased": (unleased, "/v1/authorize", None),
                "limits": (limits, "/v1/authorize", None),
                "fastapi-limiter": (limiter, "/v1/authorize", None),
            },
            rounds,
            seconds,
        )
        peak = statistics.median(rates["ours"])
        latencies = paced(own[1], "/v1/authorize", peak, directory, rounds, seconds)
    report(
        "redis_http",
        "HTTP on Redis (CPU of the server's process)",
        [
            ("GET /v1/authorize, µs CPU", statistics.median(cpu_us["ours"]), Goal(at_most=60)),
            ("GET /v1/authorize, CPU to the same in memory", ratio(cpu_us, "ours", "memory"), Goal(at_most=1.7)),
            ("GET /v1/authorize without leases, µs CPU", statistics.median(cpu_us["unleased"]), None),
            ("GET /v1/authorize without leases, CPU to the same in memory", ratio(cpu_us, "unleased", "memory"), None),
            ("FastAPI + limits async, µs CPU", statistics.median(cpu_us["limits"]), None),
            ("FastAPI + fastapi-limiter, µs CPU", statistics.median(cpu_us["fastapi-limiter"]), None),
            ("checks per CPU second, ratio to FastAPI + limits", ratio(cpu_us, "limits", "ours"), Goal(at_least=20)),
            (
                "checks per CPU second, ratio to FastAPI + fastapi-limiter",
                ratio(cpu_us, "fastapi-limiter", "ours"),
                Goal(at_least=8),
            ),
            *paced_figures(peak, latencies),
        ],
        smoke=smoke,
    )


if __name__ == "__main__":
    main()
