"""What a quota costs a check: CPU of the server per `POST /v1/check`, and CPU of client and Redis per charge, with and without.

    python -m bench.quotas [--smoke]

Each with a quota per month, in a time zone, beside the same without, in rounds that alternate; medians of the ratios by round.
On Redis a quota is a counter of its own, charged in the same script: so it is shown beside what limits of the tier cost, and
beside a script that does nothing but the reads and writes of one counter and of two, the minimum. With leases most checks
of a busy caller need no call, with a quota or without: measured with 50 callers in turn.
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
from bench.redis_server import BenchRedis, redis_cpu_us, redis_server
from tidegate.counters import Charge
from tidegate.counters.guarded import GuardedCounters
from tidegate.counters.leased import LeasedCounters
from tidegate.counters.redis.keyspace import key_of
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
LEASED_CALLERS = 50
READS_AND_WRITES = """
redis.call('TIME')
for k = 1, #KEYS do
  redis.call('GET', KEYS[k])
end
for k = 1, #KEYS do
  redis.call('SET', KEYS[k], '0123456789abcdef', 'PX', 100000)
end
return {1, 2, 3, 4, 5}
"""


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

    async def measure() -> tuple[float, float]:
        store = RedisCounters(server.url, timeout_s=5)
        charges = [Charge(tuple((limits, f"k:{number:024x}") for limits in sets)) for number in range(2000)]
        numbers = iter(range(calls))

        async def take_turns() -> None:
            for number in numbers:
                await store.charge((charges[number % len(charges)],))

        await store.charge(charges[:1])
        before_us, started = redis_cpu_us(server), time.process_time()
        await asyncio.gather(*(take_turns() for _ in range(IN_FLIGHT)))
        taken, redis_us = time.process_time() - started, redis_cpu_us(server) - before_us
        await store.close()
        return taken / calls * 1e6, redis_us / calls

    return uvloop.run(measure())


def leased(server: BenchRedis, sets: tuple[LimitSet, ...], calls: int) -> tuple[float, float]:
    """CPU µs of this process and of Redis per check, with leases."""

    async def measure() -> tuple[float, float]:
        store = LeasedCounters(GuardedCounters(RedisCounters(server.url, timeout_s=5)))
        counters = [tuple((limits, f"k:{number:024x}") for limits in sets) for number in range(LEASED_CALLERS)]
        for number in range(20 * LEASED_CALLERS):
            await store.charge((Charge(counters[number % LEASED_CALLERS]),))
        before_us, started = redis_cpu_us(server), time.process_time()
        for number in range(calls):
            if store.charge_now(counters[number % LEASED_CALLERS], 1) is None:
                await store.charge((Charge(counters[number % LEASED_CALLERS]),))
            if not number % IN_FLIGHT:
                await asyncio.sleep(0)
        taken, redis_us = time.process_time() - started, redis_cpu_us(server) - before_us
        await store.close()
        return taken / calls * 1e6, redis_us / calls

    return uvloop.run(measure())


def reads_and_writes(server: BenchRedis, sets: tuple[LimitSet, ...], calls: int) -> float:
    """CPU µs of Redis for a script that reads and writes the counters and decides nothing."""
    sha = str(server.client.script_load(READS_AND_WRITES))
    before_us = redis_cpu_us(server)
    for first in range(0, calls, IN_FLIGHT):
        pipeline = server.client.pipeline(transaction=False)
        for number in range(first, first + IN_FLIGHT):
            # Keys of its own: what it writes is no counter.
            keys = [b"x" + key_of(limits, f"k:{number % 2000:024x}") for limits in sets]
            pipeline.evalsha(sha, len(keys), *keys)
        pipeline.execute()
    return (redis_cpu_us(server) - before_us) / (-(-calls // IN_FLIGHT) * IN_FLIGHT)


def main() -> None:
    smoke = asked_for_smoke(__doc__)
    rounds, seconds, calls = (1, 1, 1_000) if smoke else (9, 2, 30_000)
    need_wrk()
    rule = LimitSet("sold:rule", Algorithm.SLIDING_WINDOW, [Limit.parse("1000000/minute")])
    tier = LimitSet("sold", Algorithm.SLIDING_WINDOW, [Limit.parse("1000000/hour")])
    quotas = CompiledQuotas(fit_quotas(["1000000000/month"]), None, None, "sold")
    quota = quotas.of(PeriodAnchor.make("2026-01-31", "Europe/Berlin"))
    rounds_on_redis = [(PLAIN, (rule,)), (TIER, (rule, tier)), (QUOTA, (rule, quota))]
    redis: dict[str, list[tuple[float, float]]] = {PLAIN: [], TIER: [], QUOTA: []}
    with_leases: dict[str, list[tuple[float, float]]] = {PLAIN: [], QUOTA: []}
    floor: list[tuple[float, float]] = []
    with redis_server() as server:
        for _ in range(rounds):
            for name, sets in rounds_on_redis:
                redis[name].append(on_redis(server, sets, calls))
                if name in with_leases:
                    with_leases[name].append(leased(server, sets, calls))
            floor.append((reads_and_writes(server, (rule,), calls // 2), reads_and_writes(server, (rule, quota), calls // 2)))
    cpu_us = over_http(rounds, seconds)
    report("quotas", "a check with a quota beside one without", figures(cpu_us, redis, with_leases, floor), smoke=smoke)


Pairs = dict[str, list[tuple[float, float]]]


def figures(
    cpu_us: dict[str, list[float]], redis: Pairs, with_leases: Pairs, floor: list[tuple[float, float]]
) -> list[tuple[str, float, Goal | None]]:
    """Medians, and medians of the ratios by round."""

    def ratio(measured: Pairs, place: int, base: str) -> float:
        return statistics.median(own[place] / plain[place] for own, plain in zip(measured[QUOTA], measured[base], strict=True))

    def medians(label: str, measured: Pairs, place: int) -> list[tuple[str, float, Goal | None]]:
        return [
            (f"{label}, {name}, µs CPU", statistics.median(each[place] for each in taken), None)
            for name, taken in measured.items()
        ]

    over_http = statistics.median(sold / plain for sold, plain in zip(cpu_us[QUOTA], cpu_us[PLAIN], strict=True))
    return [
        *((f"POST /v1/check with {name}, µs CPU", statistics.median(taken), None) for name, taken in cpu_us.items()),
        ("CPU of POST /v1/check with a quota to that without", over_http, Goal(at_most=1.15)),
        *medians("client of Redis", redis, 0),
        *medians("Redis", redis, 1),
        ("CPU of the client of Redis with a quota to that without", ratio(redis, 0, PLAIN), None),
        ("CPU of Redis with a quota to that with a rule alone", ratio(redis, 1, PLAIN), Goal(at_most=1.15)),
        ("CPU of Redis with a quota to that with limits of the tier", ratio(redis, 1, TIER), Goal(at_most=1.15)),
        ("Redis, reads and writes of one counter alone, µs CPU", statistics.median(one for one, _ in floor), None),
        ("Redis, reads and writes of two counters alone, µs CPU", statistics.median(two for _, two in floor), None),
        ("reads and writes of two counters to those of one", statistics.median(two / one for one, two in floor), None),
        *medians("with leases: library", with_leases, 0),
        *medians("with leases: Redis", with_leases, 1),
        ("with leases: CPU of the library with a quota to that without", ratio(with_leases, 0, PLAIN), Goal(at_most=1.15)),
    ]


if __name__ == "__main__":
    main()
