"""What a quota costs a check: CPU of the server per `POST /v1/check`, and CPU of client and Redis per charge, with and without.

    python -m bench.quotas [--smoke]

Each with a quota per month, in a time zone, beside the same without, in rounds that alternate; medians of the ratios by round.
On Redis a quota is a counter of its own, charged in the same script: so it is shown beside what limits of the tier cost, too.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from pathlib import Path

import uvloop

from bench.http import cpu_of_threads_s, need_wrk, ours, wrk
from bench.measure import Goal, asked_for_smoke, report
from bench.redis_server import BenchRedis, info, redis_server
from tidegate.counters import Charge
from tidegate.counters.redis.store import RedisCounters
from tidegate.policy.limits import Algorithm, Limit, LimitSet
from tidegate.policy.periods import PeriodAnchor
from tidegate.policy.quotas import CompiledQuotas, fit_quotas

RULES = """
  [[tiers.rules]]
  endpoint = "/api/v1/*"
  limits = ["100000000/minute"]
"""
POLICY = f"""
[[tiers]]
name = "plain"
{RULES}
[[tiers]]
name = "sold"
quotas = ["1000000000000/month"]
{RULES}
[[api_keys]]
key = "demo-plain-key-0001"
tier = "plain"
[[api_keys]]
key = "demo-sold-key-00001"
tier = "sold"
"""
POST = """
wrk.method = "POST"
wrk.body = '{"api_key":"%s","method":"GET","path":"/api/v1/items","ip":"203.0.113.7"}'
wrk.headers["Content-Type"] = "application/json"
"""
PLAIN, TIER, QUOTA = "a rule", "a rule and limits of the tier", "a rule and a quota"
IN_FLIGHT = 64


def over_http(rounds: int, seconds: int) -> dict[str, list[float]]:
    """CPU µs of the server per check, by what limits it."""
    cpu_us: dict[str, list[float]] = {PLAIN: [], QUOTA: []}
    with tempfile.TemporaryDirectory() as directory, ours(directory, POLICY) as (pid, port):
        scripts = {}
        for name, key in ((PLAIN, "demo-plain-key-0001"), (QUOTA, "demo-sold-key-00001")):
            scripts[name] = Path(directory, f"{key}.lua")
            scripts[name].write_text(POST % key)
            wrk(port, "/v1/check", 1, 64, str(scripts[name]), ())
        for _ in range(rounds):
            for name, script in scripts.items():
                before = cpu_of_threads_s(pid)
                done = wrk(port, "/v1/check", seconds, 64, str(script), ())
                if done["errors"]:
                    raise RuntimeError(f"{done['errors']} checks with {name} failed")
                cpu_us[name].append((cpu_of_threads_s(pid) - before) / done["requests"] * 1e6)
    return cpu_us


def on_redis(server: BenchRedis, sets: tuple[LimitSet, ...], calls: int) -> tuple[float, float]:
    """CPU µs of the client and of Redis per charge."""

    async def measure() -> float:
        store = RedisCounters(server.url, timeout_s=5)
        charges = [Charge(tuple((limits, f"k:{number:024x}") for limits in sets)) for number in range(2000)]
        numbers = iter(range(calls))

        async def take_turns() -> None:
            for number in numbers:
                await store.charge((charges[number % len(charges)],))

        await store.charge(charges[:1])
        server.client.config_resetstat()
        started = time.process_time()
        await asyncio.gather(*(take_turns() for _ in range(IN_FLIGHT)))
        taken = time.process_time() - started
        await store.close()
        return taken / calls * 1e6

    client_us = uvloop.run(measure())
    return client_us, float(info(server, "commandstats")["cmdstat_evalsha"]["usec_per_call"])


def main() -> None:
    smoke = asked_for_smoke(__doc__)
    rounds, seconds, calls = (1, 1, 1_000) if smoke else (9, 2, 30_000)
    need_wrk()
    rule = LimitSet("sold:rule", Algorithm.SLIDING_WINDOW, [Limit.parse("1000000/minute")])
    tier = LimitSet("sold", Algorithm.SLIDING_WINDOW, [Limit.parse("1000000/hour")])
    quotas = CompiledQuotas(fit_quotas(["1000000000/month"]), None, None, "sold")
    quota = quotas.of(PeriodAnchor.make("2026-01-31", "Europe/Berlin"))
    redis: dict[str, list[tuple[float, float]]] = {PLAIN: [], TIER: [], QUOTA: []}
    with redis_server() as server:
        for _ in range(rounds):
            for name, sets in ((PLAIN, (rule,)), (TIER, (rule, tier)), (QUOTA, (rule, quota))):
                redis[name].append(on_redis(server, sets, calls))
    cpu_us = over_http(rounds, seconds)

    def ratio(place: int, base: str) -> float:
        return statistics.median(own[place] / plain[place] for own, plain in zip(redis[QUOTA], redis[base], strict=True))

    report(
        "quotas",
        "a check with a quota beside one without",
        [
            *((f"POST /v1/check with {name}, µs CPU", statistics.median(taken), None) for name, taken in cpu_us.items()),
            (
                "CPU of POST /v1/check with a quota to that without",
                statistics.median(sold / plain for sold, plain in zip(cpu_us[QUOTA], cpu_us[PLAIN], strict=True)),
                Goal(at_most=1.15),
            ),
            *(
                (f"client of Redis, {name}, µs CPU", statistics.median(each[0] for each in taken), None)
                for name, taken in redis.items()
            ),
            *((f"Redis, {name}, µs CPU", statistics.median(each[1] for each in taken), None) for name, taken in redis.items()),
            ("CPU of the client of Redis with a quota to that without", ratio(0, PLAIN), None),
            ("CPU of Redis with a quota to that with a rule alone", ratio(1, PLAIN), None),
            ("CPU of Redis with a quota to that with limits of the tier", ratio(1, TIER), Goal(at_most=1.15)),
        ],
        smoke=smoke,
    )


if __name__ == "__main__":
    main()
