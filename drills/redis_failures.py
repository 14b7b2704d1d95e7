"""What Redis can do to a running limiter, and what it costs: answers, time and units admitted above the limits.

    python -m drills.redis_failures [--smoke] [--leases both|on|off] [NAME ...]

Three instances ask 900 times a second about 60 subjects, each of which may have fewer units than are asked for; the breaker's
open time is 2 s, so that a drill is short. `over-admitted` counts units above the limits, all subjects together; while the store
is well it must be 0. `excess by the checker` is the same figure as `drills.exactness` proves it from what each client saw. What a
subject was admitted by shares is put back, so an outage costs at most the limit once more. Each drill runs without leases and
with them, in two columns; the exit code is 1 where the store alone, or all instances while it was available, admitted units above
a limit, other than those that it lost.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from tests.servers.redis_cluster import RedisCluster
from tests.servers.redis_sentinel import RedisSentinel
from tests.servers.redis_server import RedisServer
from tests.servers.tcp_proxy import TcpProxy

from drills.load import LEASES, Load
from tidegate.counters.redis.keyspace import slot_of
from tidegate.policy.limits import OnFailure

TIMEOUT_S: Final = 0.05
OPTIONS: Final = {
    # By default a cluster that has lost one master refuses what the others count, until the replica is promoted.
    "cluster-require-full-coverage": "no",
    # A replica may stand for election however long its master was paused.
    "cluster-replica-validity-factor": "0",
}


class Result(NamedTuple):
    """What a drill saw.

    Args:
        load: every check of it.
        event_s: when the failure happened, s since the start.
        notes: further figures.
    """

    load: Load
    event_s: float
    notes: Mapping[str, float] = MappingProxyType({})

    def figures(self) -> dict[str, float]:
        """By name."""
        load = self.load
        limit = load.amount * len(load.subjects)
        excess, store_excess = load.excess()
        return {
            "checks": len(load.seen),
            "errors": sum(load.errors.values()),
            "degraded": len(load.degraded),
            "back after, s": max(load.back_after_s - self.event_s, 0.0),
            "over-admitted": load.over_admitted,
            "excess by the checker": excess,
            "excess of the store alone": store_excess,
            "over-admitted, % of all limits": 100 * load.over_admitted / limit,
            "admitted and not counted": load.uncounted,
            "counted and not admitted": load.counted_twice,
            "p99 before, ms": load.latency_ms(0.99, until_s=self.event_s),
            "decided from leases": sum(leased.table.decisions for leased in load.leased),
            "p99 after, ms": load.latency_ms(0.99, since_s=self.event_s),
            **self.notes,
        }


async def _drill(url: str, event_s: float, after_s: float, *events: tuple[float, Callable[[], Any]], **options: Any) -> Result:
    load = Load(url, timeout_s=TIMEOUT_S, **options)
    try:
        await load.run(event_s + after_s, [(event_s + at_s, _in_thread(act)) for at_s, act in events])
        await load.settle()
    finally:
        await load.close()
    return Result(load, event_s)


def _in_thread(act: Callable[[], Any]) -> Callable[[], Awaitable[object]]:
    """Servers are controlled by blocking calls, which must not delay the load."""
    return lambda: asyncio.to_thread(act)


async def nothing_happens(seconds: float = 3.0) -> Result:
    """For comparison."""
    with RedisServer() as server:
        return await _drill(server.url, 0.0, seconds)


async def scripts_flushed(seconds: float = 3.0) -> Result:
    """SCRIPT FLUSH, again and again."""
    with RedisServer() as server:
        flush = [(at / 10, lambda: server.call("SCRIPT", "FLUSH")) for at in range(10)]
        return await _drill(server.url, 1.0, seconds - 1, *flush)


async def clients_killed(seconds: float = 4.0) -> Result:
    """CLIENT KILL of every connection, three times."""
    with RedisServer() as server:
        kills = [(at, lambda: server.call("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")) for at in (0.0, 0.7, 1.4)]
        return await _drill(server.url, 1.0, seconds - 1, *kills)


async def everything_flushed(seconds: float = 3.0) -> Result:
    """FLUSHALL: all counts are gone, which nothing can mend; the limit is admitted once more."""
    with RedisServer() as server:
        return await _drill(server.url, 1.0, seconds - 1, (0.0, lambda: server.call("FLUSHALL")))


async def out_of_memory(seconds: float = 5.0) -> Result:
    """Redis at maxmemory refuses every write; then it has room again."""
    with RedisServer(options={"maxmemory-policy": "noeviction"}) as server:
        return await _drill(
            server.url,
            1.0,
            seconds - 1,
            (0.0, lambda: server.call("CONFIG", "SET", "maxmemory", "1")),
            (1.0, lambda: server.call("CONFIG", "SET", "maxmemory", "0")),
        )


async def hung(seconds: float = 8.0) -> Result:
    """SIGSTOP: connections stay open and nothing answers. After 2 s it goes on."""
    with RedisServer() as server:
        result = await _drill(server.url, 1.0, seconds - 1, (0.0, server.pause), (2.0, server.resume))
    load = result.load
    opened = min((each.at_s for each in load.degraded if each.latency_s < TIMEOUT_S / 2), default=result.event_s)
    return result._replace(
        notes={
            "breaker open after, s": opened - result.event_s,
            "p99 until it opens, ms": load.latency_ms(0.99, result.event_s, opened),
            "p99 while it is open, ms": load.latency_ms(0.99, opened + 0.01, result.event_s + 1.9),
        }
    )


async def gone(seconds: float = 7.0) -> Result:
    """kill -9 of the only server; after 1.5 s another one, empty, takes its port."""
    with RedisServer() as server:
        return await _drill(server.url, 1.0, seconds - 1, (0.0, server.kill), (1.5, server.start))


async def gone_and_allow(seconds: float = 5.0) -> Result:
    """kill -9, under a rule that allows: everything passes, no error is given."""
    with RedisServer() as server:
        return await _drill(server.url, 1.0, seconds - 1, (0.0, server.kill), (1.0, server.start), on_failure=OnFailure.ALLOW)


async def cluster_master_killed(seconds: float = 9.0) -> Result:
    """kill -9 of one master of three; its replica is promoted. The other shards must not notice."""
    with RedisCluster(masters=3, replicas=1, node_timeout_ms=1000, options=OPTIONS) as cluster:
        victim = cluster.owner_of(0)
        result = await _drill(cluster.url, 1.0, seconds - 1, (0.0, victim.kill))
    return result._replace(notes={"degraded subjects of other shards": _strangers(result, 3)})


async def cluster_master_hung(seconds: float = 10.0) -> Result:
    """SIGSTOP of one master of three; its replica is promoted, and it comes back as a replica."""
    with RedisCluster(masters=3, replicas=1, node_timeout_ms=1000, options=OPTIONS) as cluster:
        victim = cluster.owner_of(0)
        result = await _drill(cluster.url, 1.0, seconds - 1, (0.0, victim.pause), (6.0, victim.resume))
    return result._replace(notes={"degraded subjects of other shards": _strangers(result, 3)})


async def slots_migrated(seconds: float = 6.0) -> Result:
    """Every slot that holds a counter moves to another master, under load."""
    with RedisCluster(masters=3, replicas=0, options=OPTIONS) as cluster:
        cluster.be_patient()
        load = Load(cluster.url, timeout_s=TIMEOUT_S)
        slots = sorted({slot_of(subject) for subject in load.subjects})

        def migrate() -> None:
            for slot in slots:
                owner = cluster.owner_of(slot)
                cluster.migrate_slot(slot, next(node for node in cluster.nodes if node is not owner))

        try:
            await load.run(seconds, [(1.0, _in_thread(migrate))])
            await load.settle()
        finally:
            await load.close()
        return Result(load, 1.0, {"slots moved": len(slots)})


async def slow_answers(share: float, seconds: float = 6.0, rate: int = 900) -> Result:
    """Some answers come 60 to 500 ms late, and what is behind them on a connection waits for them."""
    with RedisServer() as server:
        async with TcpProxy(server.port) as proxy:
            load = Load(proxy.url, timeout_s=TIMEOUT_S, rate=rate)

            async def begin() -> None:
                proxy.vary_delay = lambda: random.uniform(0.06, 0.5) if random.random() < share else 0.0

            try:
                await load.run(seconds, [(0.3, begin)])
                proxy.vary_delay = None
                await load.settle()
            finally:
                await load.close()
            answers = Counter[str]()
            for store in load.stores:
                answers.update(store.late.answers)
            notes = {f"late answers, {name}": float(count) for name, count in answers.items()}
            notes["used of what was charged late"] = float(sum(store.late.used for store in load.stores))
            notes["breakers opened"] = float(sum(b.opened for store in load.stores for b in store.breakers.values()))
            return Result(load, 0.3, notes)


async def few_answers_late() -> Result:
    """5 % of the answers come 60 to 500 ms late."""
    return await slow_answers(0.05)


async def many_answers_late() -> Result:
    """50 % of the answers come 60 to 500 ms late."""
    return await slow_answers(0.5)


async def sentinel_master_killed(seconds: float = 12.0) -> Result:
    """kill -9 of the master that sentinels watch; they promote the replica."""
    with RedisSentinel(sentinels=3, replicas=1, down_after_ms=1000) as sentinel:
        return await _drill(sentinel.url, 1.0, seconds - 1, (0.0, sentinel.master().kill))


async def sentinel_master_hung(seconds: float = 14.0) -> Result:
    """SIGSTOP of the master that sentinels watch; it comes back when another one is the master, and must not be written to."""
    with RedisSentinel(sentinels=3, replicas=1, down_after_ms=1000) as sentinel:
        master = sentinel.master()
        return await _drill(sentinel.url, 1.0, seconds - 1, (0.0, master.pause), (7.0, master.resume))


def _strangers(result: Result, masters: int) -> int:
    """Subjects of shards that nothing happened to, of which a check was degraded."""
    share = 16_384 // masters
    return len({each.subject for each in result.load.degraded if slot_of(each.subject) >= share})


Drill = Callable[[], Awaitable[Result]]

DRILLS: Final[dict[str, Drill]] = {
    drill.__name__: drill
    for drill in (
        nothing_happens,
        scripts_flushed,
        clients_killed,
        everything_flushed,
        out_of_memory,
        hung,
        gone,
        gone_and_allow,
        few_answers_late,
        many_answers_late,
        slots_migrated,
        cluster_master_killed,
        cluster_master_hung,
        sentinel_master_killed,
        sentinel_master_hung,
    )
}
SMOKE: Final = ("nothing_happens", "clients_killed", "hung")


async def _awaited(drill: Drill) -> Result:
    return await drill()


def main() -> None:
    """Run the drills that were asked for."""
    logging.disable(logging.CRITICAL)  # what the instances say of the failure is known here
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which drills; all where none is given: {', '.join(DRILLS)}")
    parser.add_argument("--smoke", action="store_true", help=f"the quickest ones: {', '.join(SMOKE)}")
    parser.add_argument("--leases", choices=("both", "on", "off"), default="both", help="whether units are leased; default both")
    asked = parser.parse_args()
    unknown = sorted(set(asked.names) - set(DRILLS))
    if unknown:
        parser.error(f"there is no drill {unknown[0]!r}: {', '.join(DRILLS)}")
    choices = {"both": (False, True), "on": (True,), "off": (False,)}[asked.leases]
    missed = []
    for name in asked.names or (SMOKE if asked.smoke else DRILLS):
        print(f"\n{name}: {(DRILLS[name].__doc__ or '').strip()}", flush=True)
        columns = []
        for LEASES[0] in choices:
            result: Result = asyncio.run(_awaited(DRILLS[name]))
            columns.append(result.figures())
            load = result.load
            if max(load.excess()[1], 0 if load.degraded else load.over_admitted) > load.uncounted:
                missed.append(name)
        print(f"  {'':<36}" + "".join(f" {'leases' if leases else 'no leases':>12}" for leases in choices))
        for label in dict.fromkeys(label for column in columns for label in column):
            print(f"  {label:<36}" + "".join(f" {column.get(label, 0.0):>12,.2f}" for column in columns))
    if missed:
        sys.exit(f"\nunits above a limit while the store was available: {', '.join(missed)}")


if __name__ == "__main__":
    main()
