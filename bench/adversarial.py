"""What hostile requests cost beside plain ones of the same size: CPU for each KB received.

    python -m bench.adversarial [--smoke] [--only TEXT]

Each row is an attack on its own: it makes what it needs, runs the attack and a plain request of that size in turn, and prints the
CPU of both for each KB that a client sent, and how many times the attack costs. The goal is 5 times at most, for each. Rows over
HTTP measure the CPU time of a server process; rows about tables at their bound and about logs measure the process, or the Redis,
that holds them, and count a check as 200 bytes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import sys
import tempfile
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.http import cpu_of_threads_s, server
from bench.measure import Goal, report
from bench.redis_server import redis_server
from tidegate.catalog.cached import CachedCatalog
from tidegate.catalog.changes import Changes
from tidegate.catalog.freshness import FreshnessTracker
from tidegate.catalog.in_memory import PolicyCatalog
from tidegate.catalog.sql.replicas import Replicas
from tidegate.counters import Charge, CounterStore
from tidegate.counters.factory import open_counters
from tidegate.errors import PolicyError
from tidegate.policy.key_format import hash_api_key, make_api_key
from tidegate.policy.limits import Algorithm, Limit, LimitSet
from tidegate.policy.model import ApiKey, Policy, Tier
from tidegate.policy.toml_reader import parse_policy, policy_warnings
from tidegate.settings import BreakerSettings, CounterSettings

GOAL = Goal(at_most=5)
CHECK_BYTES = 200
AROUND = 1.7
"""How often a table is filled: a dictionary is slow only where many entries were taken from its front since it was made anew."""
KEY = "demo-free-key-of-the-length-of-one-made-0"
STARS = "/*/a/*/b/*/c/*/z"
POLICY = f"""
[[tiers]]
name = "free"
limits = ["900000000/day"]
  [[tiers.rules]]
  endpoint = "/*"
  limits = ["100000000/minute"]
  [[tiers.rules]]
  endpoint = "{STARS}"
  limits = ["100000000/minute"]
[[api_keys]]
key = "{KEY}"
tier = "free"
"""


class Cost(NamedTuple):
    """CPU seconds of an attack and of what is plain, each over the bytes that were sent."""

    attack_s: float
    attack_bytes: int
    plain_s: float
    plain_bytes: int

    @property
    def attack(self) -> float:
        """µs of CPU a KB."""
        return self.attack_s * 1e6 / (self.attack_bytes / 1024)

    @property
    def plain(self) -> float:
        """µs of CPU a KB."""
        return self.plain_s * 1e6 / (self.plain_bytes / 1024)


# Over HTTP.


@contextlib.contextmanager
def serving() -> Iterator[tuple[int, http.client.HTTPConnection]]:
    """`tidegate serve` with counters in memory; its process id and a connection."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "tidegate.policy.toml").write_text(POLICY)
        places = {"TIDEGATE_SERVER__HTTP": "127.0.0.1:{port}", "TIDEGATE_SERVER__GRPC": "", "TIDEGATE_SERVER__ADMIN": ""}
        with server(lambda _: [sys.executable, "-m", "tidegate", "serve"], directory, **places) as (pid, port):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
            _post(connection, "/v1/check", _check("/warm"))
            yield pid, connection
            connection.close()


def _check(path: str, api_key: str = KEY) -> bytes:
    return json.dumps({"path": path, "api_key": api_key, "ip": "203.0.113.7"}, ensure_ascii=False).encode()


def _batch(paths: Sequence[str], keys: Sequence[str]) -> bytes:
    checks = [{"path": path, "api_key": key, "ip": "203.0.113.7"} for path, key in zip(paths, keys, strict=True)]
    return json.dumps({"checks": checks}, ensure_ascii=False).encode()


def _post(connection: http.client.HTTPConnection, path: str, body: bytes) -> None:
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    connection.getresponse().read()


def over_http(attacks: Sequence[Callable[[], bytes]], plain: Callable[[], bytes], path: str, count: int) -> Cost:
    """Send bodies in turn; the attack that costs the most a KB counts. Bodies are made outside of what is measured."""
    bodies = (*attacks, plain)
    spent = [0.0] * len(bodies)
    sizes = [0] * len(bodies)
    with serving() as (pid, connection):
        for _ in range(count):
            _post(connection, path, plain())
        for _ in range(count):
            # In turn: what else the machine does costs all of them alike.
            for place, body_of in enumerate(bodies):
                body = body_of()
                before = cpu_of_threads_s(pid)
                _post(connection, path, body)
                spent[place] += cpu_of_threads_s(pid) - before
                sizes[place] += len(body)
    *sent, ordinary = zip(spent, sizes, strict=True)
    return Cost(*max(sent, key=lambda each: each[0] / each[1]), *ordinary)


def odd_paths(smoke: bool) -> Cost:
    """Paths of characters that have to be encoded, escaped or refused."""
    paths = (
        "/" + "|" * 7600,
        "/" + "|" * 2700,
        "/" + "a|" * 2000,
        "/" + "%c3%a9" * 1300,
        "/" + "%C3" * 2700 + "%2f",
        "/" + "".join(chr(0x4E00 + 7 * number) for number in range(880)),
        "/" + "/a" * 3800 + "|",
    )
    attacks = [lambda path=path: _check(path) for path in paths]
    return over_http(attacks, lambda: _check("/" + "a" * 7600), "/v1/check", 3 if smoke else 200)


def odd_batch(smoke: bool) -> Cost:
    """A batch of 1,000 such paths, beside a batch of as many plain ones."""
    keys = [KEY] * 1000
    attacks = [
        lambda part=part: _batch(["/" + part * (900 // len(part.encode()))] * 1000, keys)
        for part in ("|", "é", "%c3%a9", "a|", "%C3")
    ]
    return over_http(attacks, lambda: _batch(["/" + "a" * 900] * 1000, keys), "/v1/check/batch", 1 if smoke else 10)


def several_stars(smoke: bool) -> Cost:
    """A path of 6 KB that nearly matches a pattern with four `*`."""
    plain = lambda: _check("/" + "a" * 6000)  # noqa: E731 - beside its attack
    return over_http([lambda: _check("/" + "a/b/" * 1500 + "z")], plain, "/v1/check", 1 if smoke else 200)


def unknown_keys(smoke: bool) -> Cost:
    """One API key after the other that is well formed and unknown."""
    attack = lambda: _check("/a", make_api_key())  # noqa: E731
    return over_http([attack], lambda: _check("/a"), "/v1/check", 5 if smoke else 500)


def cold_batch(smoke: bool) -> Cost:
    """A batch of 1,000 checks, each with another unknown API key, beside a batch with one known key."""
    paths = ["/a"] * 1000
    attack = lambda: _batch(paths, [make_api_key() for _ in range(1000)])  # noqa: E731
    return over_http([attack], lambda: _batch(paths, [KEY] * 1000), "/v1/check/batch", 1 if smoke else 10)


# Tables at their bound.


async def measured(step: Callable[[int], Awaitable[object]], numbers: range) -> tuple[float, int]:
    """CPU of this process for steps, and the bytes that a client sends for them."""
    before = time.process_time()
    for number in numbers:
        await step(number)
    return time.process_time() - before, len(numbers) * CHECK_BYTES


async def at_its_bound(
    step: Callable[[int], Awaitable[object]], fill: Callable[[range], Awaitable[object]], most: int, count: int
) -> Cost:
    """A step while the table is empty, and once it has been full for a while; steps differ by their number."""
    plain = await measured(step, range(count))
    await fill(range(count, count + most))
    warm = range(count + most, 2 * count + most)
    await measured(step, warm)
    return Cost(*await measured(step, range(warm.stop, warm.stop + count)), *plain)


@contextlib.asynccontextmanager
async def opened(url: str, **settings: object) -> AsyncIterator[CounterStore]:
    """A counter store that no heartbeat of another disturbs."""
    breaker = BreakerSettings(failures=1, window_s=60, open_s=3600)
    store = open_counters(CounterSettings(url=url, timeout_ms=5000, **settings), breaker)  # type: ignore[arg-type]
    try:
        yield store
    finally:
        await store.close()


def denials(smoke: bool) -> Cost:
    """New denials while 100,000 are remembered: a client denied under one subject after the other."""
    limits = LimitSet("bench", Algorithm.FIXED_WINDOW, [Limit.parse("1/day")])

    async def run() -> Cost:
        with redis_server() as redis:
            async with opened(redis.url) as store:

                async def step(number: int) -> None:
                    charge = Charge(((limits, f"s{number}"),), 1)
                    await store.charge((charge,))
                    await store.charge((charge,))

                async def fill(numbers: range) -> None:
                    for start in range(numbers.start, numbers.stop, 500):
                        some = range(start, min(start + 500, numbers.stop))
                        await store.charge([Charge(((limits, f"s{number}"),), 1) for number in some for _ in range(2)])

                return await at_its_bound(step, fill, 1_000 if smoke else int(100_000 * AROUND), 100 if smoke else 3_000)

    return asyncio.run(run())


def fallback_shares(smoke: bool) -> Cost:
    """New subjects while the counter store is away and the table of what is owed is full."""
    limits = LimitSet("bench", Algorithm.FIXED_WINDOW, [Limit.parse("100/day")])
    most = 1_000 if smoke else 50_000

    async def run() -> Cost:
        async with opened("redis://127.0.0.1:1/0", max_subjects=most) as store:

            async def step(number: int) -> None:
                await store.charge((Charge(((limits, f"s{number}"),), 1),))

            async def fill(numbers: range) -> None:
                for number in numbers:
                    await step(number)

            await step(-1)
            return await at_its_bound(step, fill, int(most * AROUND), 100 if smoke else 5_000)

    return asyncio.run(run())


def cached_keys(smoke: bool) -> Cost:
    """Unknown API keys while 10,000 of them are cached; and known ones while the cache is full: the worse of both."""
    most = 1_000 if smoke else 20_000
    count = 100 if smoke else 3_000

    async def run(known: bool) -> Cost:
        digests = [hash_api_key(f"bench-key-{number:08}") for number in range(2 * most + 4 * count)]
        records = tuple(ApiKey(digest, "t") for digest in digests) if known else ()
        cached = CachedCatalog(PolicyCatalog(Policy((Tier("t"),), records)), max_keys=most)

        async def step(number: int) -> None:
            await cached.caller(digests[number])

        async def fill(numbers: range) -> None:
            for number in numbers:
                await step(number)

        return await at_its_bound(step, fill, int(most * AROUND), count)

    return max(asyncio.run(run(True)), asyncio.run(run(False)), key=lambda cost: cost.attack / cost.plain)


def changes(smoke: bool) -> Cost:
    """Changes of the catalog while 10,000 are remembered, and versions while their table is full: the worse of both."""
    most, count = (10_000, 100) if smoke else (10_000, 3_000)

    async def version() -> int:
        return 0

    async def run(table: str) -> Cost:
        last = FreshnessTracker()
        replicas = Replicas((), 1, 1, version)

        async def step(number: int) -> None:
            if table == "changes":
                last.note(Changes(number + 1, 0, ((number + 1, ("key", f"k{number}")),)))
            else:
                replicas.add_version(number + 1)

        async def fill(numbers: range) -> None:
            for number in numbers:
                await step(number)

        return await at_its_bound(step, fill, int(most * AROUND), count)

    return max((asyncio.run(run(table)) for table in ("changes", "replicas")), key=lambda cost: cost.attack / cost.plain)


# Logs.


async def fill_log(store: CounterStore, limits: LimitSet, amount: int) -> None:
    for _ in range(0, amount, 500):
        await store.charge([Charge(((limits, "s"),), 1)] * 500)


async def denied_by_logs(store: CounterStore, smoke: bool, cpu_s: Callable[[], float]) -> Cost:
    """Denials by a log of 100,000 entries, of costs from one to nearly all of them; beside a log of 500."""
    costs: list[tuple[float, int]] = []
    for amount in (500, 1_000 if smoke else 100_000):
        limits = LimitSet(f"bench{amount}", Algorithm.SLIDING_LOG, [Limit.parse(f"{amount}/day")])
        await fill_log(store, limits, amount)
        # Each cost is asked for once, since a denial is remembered.
        asked = range(1, amount, max(amount // (20 if smoke else 50), 1))
        before = cpu_s()
        for cost in asked:
            outcome = (await store.charge((Charge(((limits, "s"),), cost),)))[0]
            if getattr(outcome, "allowed", True):
                raise RuntimeError(f"a check that must be denied was not: {outcome}")
        costs.append((cpu_s() - before, len(asked) * CHECK_BYTES))
    return Cost(*costs[1], *costs[0])


def log_in_memory(smoke: bool) -> Cost:
    """A sliding log in memory."""

    async def run() -> Cost:
        async with opened("memory://") as store:
            return await denied_by_logs(store, smoke, time.process_time)

    return asyncio.run(run())


def log_in_redis(smoke: bool) -> Cost:
    """A sliding log on Redis: the CPU is that of Redis, which all instances share."""

    async def run() -> Cost:
        with redis_server() as redis:
            async with opened(redis.url) as store:
                return await denied_by_logs(store, smoke, lambda: cpu_of_threads_s(redis.pid))

    return asyncio.run(run())


# Policies.


def policies(smoke: bool) -> Cost:
    """Policy texts of deep keys, of many rules and of many descriptors, beside ordinary ones of that size."""
    size = (16 if smoke else 64) * 1024
    rule = '[[tiers.rules]]\nendpoint = "/{place}/r{number}/*"\nlimits = ["10/minute"]\n'

    def tiers(rules_of_each: int, place: str = "api") -> str:
        texts: list[str] = []
        length = number = 0
        while length < size:
            if number % rules_of_each == 0:
                texts.append(f'[[tiers]]\nname = "t{number}"\n')
            texts.append(rule.format(place=place, number=number))
            length += len(texts[-1])
            number += 1
        return "".join(texts)

    attacks = (
        "a" + ".a" * (size // 2) + " = 1\n",
        "[" + ".".join(["a"] * (size // 2)) + "]\n",
        "".join(f"[{'.'.join(['a'] * 100)}.k{number}]\n" for number in range(size // 210)),
        "x = " + "[" * (size // 2) + "]" * (size // 2) + "\n",
        tiers(1_000_000),
        tiers(1_000_000, "*/a/*/b"),
        '[[tiers]]\nname = "t"\nlimits = [' + '"1/s", ' * (size // 7) + "]\n",
    )
    plain = tiers(20)

    def read(text: str) -> tuple[float, int]:
        before = time.process_time()
        with contextlib.suppress(PolicyError):
            policy_warnings(parse_policy(text))
        return time.process_time() - before, len(text.encode())

    read(plain)
    costs = [read(text) for text in attacks]
    return Cost(*max(costs, key=lambda each: each[0] / each[1]), *min(read(plain) for _ in range(3)))


ROWS: dict[str, Callable[[bool], Cost]] = {
    "odd characters in a path": odd_paths,
    "a batch of 1,000 odd paths": odd_batch,
    "several * in a pattern": several_stars,
    "unknown API keys": unknown_keys,
    "a batch of 1,000 unknown API keys": cold_batch,
    "denials at their bound": denials,
    "shares of the fallback at their bound": fallback_shares,
    "cached API keys at their bound": cached_keys,
    "changes and versions at their bound": changes,
    "a sliding log's denials in memory": log_in_memory,
    "a sliding log's denials on Redis": log_in_redis,
    "policy text": policies,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="the smallest size: that it works, not how much")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose name has this text")
    asked = parser.parse_args()
    figures: list[tuple[str, float, Goal | None]] = []
    failed = []
    for name, row in ROWS.items():
        if asked.only not in name:
            continue
        try:
            cost = row(asked.smoke)
        except Exception:  # noqa: BLE001 - a row that cannot run says so, and leaves the others their figures
            traceback.print_exc()
            failed.append(name)
            continue
        figures += [
            (f"{name}, µs CPU a KB", cost.attack, None),
            (f"{name}, plain, µs CPU a KB", cost.plain, None),
            (f"{name}, times a plain request", cost.attack / cost.plain, GOAL),
        ]
    if figures:
        report("adversarial", "Hostile requests, CPU for each KB received", figures, smoke=asked.smoke)
    if failed:
        sys.exit(f"these rows could not run: {', '.join(failed)}")


if __name__ == "__main__":
    main()
