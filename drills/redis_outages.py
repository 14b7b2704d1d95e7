"""Redis dies, hangs or is gone, and what the clients of a stack see of it."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from tests.servers.redis_server import RedisServer

from drills.check_load import Seen, policy_of
from drills.figures import between, percentile_ms, recovery_s
from drills.outcome import ChargeOutcome, Goal, at_most, no_errors, over_admission_within_limits, units_of
from drills.running import Running, in_thread
from drills.stack import Sizes, Stack, Topology

RATE: Final = 240
SUBJECTS: Final = 60
LIMIT: Final = 40
"""Of each subject under the tight rule: two checks a second each, so it is met after 20 s where all is well."""
SMOKE_LIMIT: Final = 15
FOREVER: Final = "366d"
PROMOTED_WITHIN_S: Final = 40.0
GIVEN_UP_S: Final = 45.0
"""How long to wait for a breaker to close: with the shipped settings it asks again after 30 s."""


class Size(NamedTuple):
    """How long a drill takes its time.

    Args:
        smoke: whether it is the smallest.
        leases: whether the instances lease units.
    """

    smoke: bool = False
    leases: bool = True

    def of(self, full: float, smoke: float) -> float:
        """One of two lengths, s."""
        return smoke if self.smoke else full

    @property
    def limit(self) -> int:
        """Of the tight rule."""
        return SMOKE_LIMIT if self.smoke else LIMIT

    @property
    def sizes(self) -> Sizes:
        """Of the stack."""
        return Sizes(postgres_replicas=0 if self.smoke else 2)


@contextlib.contextmanager
def stacked(topology: Topology, size: Size, **options: Any) -> Iterator[Stack]:
    """A stack for one drill, with its limits."""
    with tempfile.TemporaryDirectory() as directory:
        policy = options.pop("policy", policy_of(f"{size.limit}/{FOREVER}"))
        options["settings"] = {"TIDEGATE_LEASES__ENABLED": str(size.leases).lower()} | dict(options.get("settings", {}))
        with Stack(Path(directory), policy, topology, options.pop("sizes", size.sizes), **options) as stack:
            yield stack


@contextlib.asynccontextmanager
async def loaded(stack: Stack, size: Size) -> AsyncIterator[Running]:
    """The load of one drill, and its quiet part before anything happens."""
    async with Running(stack, RATE, SUBJECTS) as running:
        await running.rest(size.of(5, 2.5))
        yield running


def is_bad(each: Seen) -> bool:
    """Whether a check was not decided as it is when all is well."""
    return each.degraded or each.failure is not None


async def redis_cluster_master(size: Size) -> ChargeOutcome:
    """kill -9 of one of three masters of a cluster, settings as shipped."""
    with stacked("cluster", size) as stack:
        cluster = stack.cluster
        victim = cluster.owner_of(0)
        (replica,) = cluster.replicas_of(victim)
        first_slot_of_others = 16_384 // stack.sizes.shards
        async with loaded(stack, size) as running:
            event_s = running.mark("kill -9 of one of three masters")
            await in_thread(victim.kill)
            promoted_s = await running.until(lambda: _is_master(replica), PROMOTED_WITHIN_S, "its replica is promoted")
            await running.rest(size.of(14, 6))
        books = await running.books()
        load = running.load
        units = units_of(running, stack.policy_file, size.limit)
    lost = [each for each in load.seen if each.slot < first_slot_of_others]
    others = [each for each in load.seen if each.slot >= first_slot_of_others]
    back_s = recovery_s(lost, event_s, is_bad)
    over_s = promoted_s if back_s is None else max(promoted_s, event_s + back_s)
    before_ms = percentile_ms(between(others, 1.5, event_s), 0.99)
    during_ms = percentile_ms(between(others, event_s, over_s), 0.99)
    strangers = sum(map(is_bad, between(others, event_s, over_s)))
    limits = size.limit * sum(1 for ip in load.ips if _slot(ip) < first_slot_of_others)
    goals = [
        no_errors(load.seen),
        at_most("exact again after the promotion", None if back_s is None else event_s + back_s - promoted_s, 5, "s"),
        # A machine so busy that checks meet their deadline does not keep it.
        Goal("checks of other shards without Redis meanwhile", f"{strangers}", "0", strangers == 0, timed=True),
        at_most("p99 of other shards: more than before by", during_ms - before_ms, 10, "ms"),
        over_admission_within_limits(units, limits),
    ]
    notes = [
        ("promoted after", f"{promoted_s - event_s:.1f} s"),
        ("lost shard exact again after", "not at all" if back_s is None else f"{back_s:.1f} s, all in all"),
        ("p99 of other shards", f"{before_ms:.1f} ms before, {during_ms:.1f} ms during"),
    ]
    return ChargeOutcome(
        "redis-cluster-master",
        load.seen,
        event_s,
        over_s,
        running.ended_s,
        units,
        books,
        goals,
        notes,
        running.marks,
        running.looks,
    )


async def redis_sentinel_master(size: Size) -> ChargeOutcome:
    """kill -9 of the master that three sentinels watch, settings as shipped."""
    sizes = size.sizes._replace(redis_replicas=2)
    with stacked("sentinel", size, sizes=sizes) as stack:
        victim = stack.sentinel.master()
        replicas = [each for each in stack.sentinel.servers if each is not victim]
        async with loaded(stack, size) as running:
            event_s = running.mark("kill -9 of the master")
            await in_thread(victim.kill)
            promoted_s = await running.until(lambda: any(map(_is_master, replicas)), PROMOTED_WITHIN_S, "a replica is promoted")
            await running.rest(size.of(14, 6))
        books = await running.books()
        units = units_of(running, stack.policy_file, size.limit)
    load = running.load
    back_s = recovery_s(load.seen, event_s, is_bad)
    over_s = promoted_s if back_s is None else max(promoted_s, event_s + back_s)
    goals = [
        no_errors(load.seen),
        at_most("service restored after the kill", back_s, 30, "s"),
        over_admission_within_limits(units),
    ]
    notes = [
        ("promoted after", f"{promoted_s - event_s:.1f} s"),
        ("exact again after the promotion", "not at all" if back_s is None else f"{event_s + back_s - promoted_s:.1f} s"),
    ]
    return ChargeOutcome(
        "redis-sentinel-master",
        load.seen,
        event_s,
        over_s,
        running.ended_s,
        units,
        books,
        goals,
        notes,
        running.marks,
        running.looks,
    )


async def redis_hang(size: Size) -> ChargeOutcome:
    """SIGSTOP of a Redis without replicas for 20 s: connections stay, answers do not come."""
    settings = {"TIDEGATE_BREAKER__OPEN_S": "4"} if size.smoke else {}
    with stacked("standalone", size, settings=settings) as stack:
        server = stack.standalone
        async with loaded(stack, size) as running:
            event_s = running.mark("SIGSTOP of Redis")
            await in_thread(server.pause)
            await running.rest(size.of(20, 3))
            resumed_s = running.mark("SIGCONT")
            await in_thread(server.resume)
            closes = await closed(running)
            await running.rest(3)
        books = await running.books()
        units = units_of(running, stack.policy_file, size.limit)
    load = running.load
    opened_s = running.first_look_s(lambda look: all(look.open_breakers), event_s)
    back_s = recovery_s(load.seen, event_s, is_bad)
    over_s = resumed_s if back_s is None else event_s + back_s
    open_ms = None if opened_s is None else running.own_percentile_ms(0.99, opened_s, resumed_s)
    client_ms = 0.0 if opened_s is None else percentile_ms(between(load.seen, opened_s, resumed_s), 0.99)
    goals = [
        no_errors(load.seen),
        Goal(
            "breakers open", "never" if opened_s is None else f"{opened_s - event_s:.1f} s", "all of them", opened_s is not None
        ),
        at_most("p99 of the instances while they are open", open_ms, 5, "ms"),
        Goal("breakers close by themselves", "yes" if closes else "no", "yes", closes),
        Goal("admitted and not put back, units", f"{books.uncounted}", "0", books.uncounted == books.owed == 0),
        over_admission_within_limits(units),
    ]
    notes = [
        ("p99 while they are open", f"{open_ms or 0:.2f} ms at the instances, {client_ms:.1f} ms through the balancer"),
        ("breakers open after", "never" if opened_s is None else f"≤ {opened_s - event_s:.2f} s (looked at every 0.25 s)"),
        ("exact again", "not at all" if back_s is None else f"{event_s + back_s - resumed_s:.1f} s after it went on"),
    ]
    return ChargeOutcome(
        "redis-hang", load.seen, event_s, over_s, running.ended_s, units, books, goals, notes, running.marks, running.looks
    )


async def redis_gone(size: Size) -> ChargeOutcome:
    """kill -9 of every Redis; after a minute all are back."""
    settings = {"TIDEGATE_BREAKER__OPEN_S": "5"} if size.smoke else {}
    with stacked("cluster", size, settings=settings) as stack:
        nodes = stack.cluster.nodes
        async with loaded(stack, size) as running:
            event_s = running.mark("kill -9 of every Redis")
            await in_thread(lambda: _each(RedisServer.kill, nodes))
            await running.rest(size.of(60, 20))
            returned_s = running.mark("all are started again")
            await in_thread(lambda: _each(RedisServer.launch, nodes))
            await in_thread(lambda: _each(RedisServer.wait_ready, nodes))
            await running.until(stack.cluster.is_ok, 30, "the cluster is well", 0.2)
            closes = await closed(running)
            await running.rest(2)
        books = await running.books()
        units = units_of(running, stack.policy_file, size.limit)
    load = running.load
    back_s = recovery_s(load.seen, event_s, is_bad)
    over_s = returned_s if back_s is None else event_s + back_s
    goals = [
        no_errors(load.seen),
        Goal("breakers close by themselves", "yes" if closes else "no", "yes", closes),
        Goal("admitted and not counted at the end, units", f"{books.uncounted}", "0", books.uncounted == books.owed == 0),
        over_admission_within_limits(units),
    ]
    notes = [("exact again", "not at all" if back_s is None else f"{event_s + back_s - returned_s:.1f} s after the start")]
    return ChargeOutcome(
        "redis-gone", load.seen, event_s, over_s, running.ended_s, units, books, goals, notes, running.marks, running.looks
    )


async def closed(running: Running) -> bool:
    """Whether all breakers close in time."""
    try:
        await running.until(lambda: running.breakers_open(0), GIVEN_UP_S, "all breakers are closed")
    except TimeoutError:
        running.mark("the breakers are still open")
        return False
    return True


def _each(act: Callable[[RedisServer], None], servers: Sequence[RedisServer]) -> None:
    for server in servers:
        act(server)


def _is_master(server: RedisServer) -> bool:
    return bool(server.must("ROLE")[0] == b"master")


def _slot(ip: str) -> int:
    return Seen(0, 0, "", ip, False, False).slot


DRILLS: Final[Sequence[Callable[[Size], Any]]] = (redis_cluster_master, redis_sentinel_master, redis_hang, redis_gone)
