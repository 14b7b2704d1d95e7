"""What becomes of checks and of operators' changes when PostgreSQL fails: its primary, a moment of silence, all of it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import httpx
from tests.conftest import Serve
from tests.servers.postgres_cluster import PostgresCluster
from tests.servers.postgres_failover import PostgresFailover
from tests.servers.redis_server import RedisServer

from drills.check_load import Seen
from drills.findings import Findings, none_of
from drills.key_load import TOKEN, CheckResult, KeyLoad, Operator
from drills.outcome import Goal, at_most
from drills.redis_outages import Size
from drills.running import Mark, in_thread

TIER: Final = "free"
GOAL_S: Final = 10.0
PAUSES_S: Final = (1.0, 2.0, 4.0)
OUTAGE_S: Final = 300.0
"""What `pg-all` stands for, with every lifetime of the caches as it is set by default; the drill divides all of them."""
L1_TTL_S: Final = 60.0
L2_TTL_S: Final = 300.0
STALE_S: Final = 3600.0


def policy_of(keys: Sequence[str]) -> str:
    """A policy file with one tier, whose limit nobody meets.

    Args:
        keys: of the tier.
    """
    head = f'[[tiers]]\nname = "{TIER}"\nlimits = ["100000000/day"]\n'
    return head + "".join(f'[[api_keys]]\nkey = "{key}"\ntier = "{TIER}"\n' for key in keys)


def keys_of(count: int, kind: str = "known") -> list[str]:
    """Keys as a policy file may name them.

    Args:
        kind: a word that tells them from others.
    """
    return [f"drill-{kind}-key-{number:06}" for number in range(count)]


@contextlib.contextmanager
def instances(count: int, keys: Sequence[str], **environment: str) -> Iterator[list[Serve]]:
    """Tidegates that serve a policy.

    Args:
        keys: of the policy file.
        environment: their settings.
    """
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as running:
        started: list[Serve] = []
        for number in range(count):
            where = Path(directory) / f"tidegate{number}"
            where.mkdir()
            (where / "tidegate.policy.toml").write_text(policy_of(keys))
            each = Serve(where, (), None, where / "tidegate.log", False, True, TIDEGATE_ADMIN__TOKEN=TOKEN, **environment)
            running.callback(each.stop)
            wait_ready(each)  # the first one makes the tables
            started.append(each)
        yield started


def wait_ready(server: Serve) -> None:
    """As `Serve.wait_ready`, with the patience for a machine that starts several databases at once."""
    for last in (False, False, True):
        try:
            server.wait_ready()
        except AssertionError:
            if last or server.process.poll() is not None:
                raise
        else:
            return


class Clocked(NamedTuple):
    """Loads that run, and the moment they began.

    Args:
        checks: one load an instance.
        operator: who writes.
        began: on the monotonic clock.
        marks: what happened.
    """

    checks: list[KeyLoad]
    operator: Operator
    began: float
    marks: list[Mark]

    @property
    def now_s(self) -> float:
        """Since the start."""
        return time.monotonic() - self.began

    @property
    def results(self) -> list[CheckResult]:
        """Every check, of all instances."""
        return [each for load in self.checks for each in load.results]

    @property
    def seen(self) -> list[Seen]:
        """The same, for the picture."""
        return [each.seen for each in self.results]

    def mark(self, what: str, at_s: float | None = None) -> None:
        """Note that something happened.

        Args:
            at_s: when, s since the start; now if None.
        """
        self.marks.append(Mark(self.now_s if at_s is None else at_s, what))
        print(f"  {self.marks[-1].at_s:6.1f} s  {what}", flush=True)


@contextlib.asynccontextmanager
async def asked(servers: Sequence[Serve], next_key: Callable[[], str], rate: float = 100) -> AsyncIterator[Clocked]:
    """Checks at every instance, and an operator at the last.

    Args:
        next_key: who asks next.
        rate: checks a second at each.
    """
    until = asyncio.Event()
    loads = [KeyLoad(each.url, rate, next_key) for each in servers]
    operator = Operator(f"http://127.0.0.1:{servers[-1].admin_port}", TIER)
    running = [asyncio.create_task(each.run(until)) for each in loads]
    running.append(asyncio.create_task(operator.run(until)))
    try:
        yield Clocked(loads, operator, time.monotonic(), [])
    finally:
        until.set()
        await asyncio.gather(*running)


def p99_ms(results: Sequence[CheckResult]) -> float:
    """The 99th percentile of the checks that were decided, ms; 0 where there are too few.

    Args:
        results: checks.
    """
    latencies = [each.latency_s * 1000 for each in results if each.decided]
    return statistics.quantiles(latencies, n=100, method="inclusive")[-1] if len(latencies) > 1 else 0.0


async def pg_primary(size: Size) -> Findings:
    """The primary's whole process tree is killed under load, again and again; pg_auto_failover promotes a standby."""
    rounds = 1 if size.smoke else 3
    keys = keys_of(500)
    with PostgresFailover() as failover, RedisServer() as redis:
        replicas = ",".join(node.url() for node in failover.nodes)
        where = {"TIDEGATE_CATALOG__URL": failover.url(), "TIDEGATE_CATALOG__REPLICAS": replicas}
        with instances(2, keys, TIDEGATE_COUNTERS__URL=redis.url, TIDEGATE_COUNTERS__TIMEOUT_MS="500", **where) as servers:
            walking = itertools.cycle(keys)
            async with asked(servers, lambda: next(walking)) as load:
                await asyncio.sleep(2)
                away: list[float | None] = []
                spans: list[tuple[float, float]] = []
                for _ in range(rounds):
                    victim = failover.primary()
                    killed_s = load.now_s
                    await in_thread(victim.kill)
                    load.mark(f"{victim.name} is killed", killed_s)
                    # To find and end all its processes takes a moment, in which it may still take a write.
                    dead_s = load.now_s
                    while (back_s := load.operator.away_s(dead_s)) is None and load.now_s < killed_s + 60:
                        await asyncio.sleep(0.05)
                    away.append(None if back_s is None else back_s + dead_s - killed_s)
                    spans.append((killed_s, load.now_s))
                    load.mark("operators write again")
                    victim.start()
                    await in_thread(failover.wait_whole)
                    await asyncio.sleep(1)
            lost = await asyncio.to_thread(_missing, servers[0], [each.key for each in load.operator.writes if each.key])
    results = load.results
    undecided = [each for each in results if not each.decided]
    during = [each for each in results if any(since <= each.at_s < until for since, until in spans)]
    known_away = [each for each in away if each is not None]
    worst = max(known_away) if len(known_away) == len(away) else None
    figures = [
        ("checks asked, while no primary took writes", f"{len(results):,}, {len(during):,}"),
        ("checks' p99, while no primary took writes", f"{p99_ms(results):.1f}, {p99_ms(during):.1f} ms"),
        (
            "writes: made, failed",
            f"{sum(w.status == 201 for w in load.operator.writes)}, {sum(w.status != 201 for w in load.operator.writes)}",
        ),
        ("without a decision", _status_counts(undecided)),
        ("… sent after the kill, s", ", ".join(f"{each.at_s - spans[0][0]:.1f}" for each in undecided[:20]) or "-"),
        ("writes back after", ", ".join("never" if each is None else f"{each:.1f} s" for each in away)),
    ]
    goals = [
        none_of("checks without a decision", len(undecided)),
        none_of("acknowledged keys that are lost", lost),
        at_most("writes back, worst, required", worst, 30, "s"),
        at_most("writes back, worst, with these settings", worst, GOAL_S, "s"),
    ]
    return Findings(figures, goals, load.seen, load.marks)


def _status_counts(results: Sequence[CheckResult]) -> str:
    """What checks were answered, by status and code."""
    return (
        ", ".join(f"{count:,} x {answer}" for answer, count in Counter(f"{each.status} {each.code}" for each in results).items())
        or "none"
    )


def _missing(server: Serve, keys: Sequence[str]) -> int:
    """How many keys an instance does not accept."""
    with httpx.Client(base_url=server.url, timeout=10) as client:
        return sum(client.post("/v1/check", json={"path": "/item", "api_key": key}).status_code != 200 for key in keys)


async def pg_pause(size: Size) -> Findings:
    """The primary is silent for a moment and comes back: what counts as death, and what a false alarm costs operators."""
    rounds = 1 if size.smoke else 3
    figures: list[tuple[str, str]] = []
    goals: list[Goal] = []
    keys = keys_of(100)
    with PostgresFailover() as failover:
        where = {"TIDEGATE_CATALOG__URL": failover.url()}
        with instances(1, keys, TIDEGATE_CATALOG__REPLICAS=",".join(node.url() for node in failover.nodes), **where) as servers:
            walking = itertools.cycle(keys)
            async with asked(servers, lambda: next(walking)) as load:
                await asyncio.sleep(1)
                stuck = 0
                for pause_s in PAUSES_S[-1:] if size.smoke else PAUSES_S:
                    alarms, away = 0, []
                    for _ in range(rounds):
                        primary = failover.primary()
                        await in_thread(primary.pause)
                        silent_s = load.now_s
                        load.mark(f"silent for {pause_s:g} s")
                        await asyncio.sleep(pause_s)
                        await in_thread(primary.resume)
                        began = load.now_s
                        alarm = False
                        while load.now_s < began + 3:
                            states = await in_thread(failover.states)
                            alarm |= states[primary.name] != ("primary", "primary")
                            await asyncio.sleep(0.1)
                        try:
                            await in_thread(failover.wait_whole)
                        except TimeoutError as error:
                            stuck += 1
                            print(f"  {error}", flush=True)
                            break
                        # The old primary may take a write between its return and its replacement: the longest gap counts.
                        while load.operator.writes[-1].status != 201:
                            await asyncio.sleep(0.05)
                        alarms += alarm
                        away.append(load.operator.longest_gap_s(silent_s, load.now_s))
                    worst = f"{max(away):.1f} s" if away else "not measured"
                    figures.append(
                        (
                            f"silent for {pause_s:g} s",
                            f"the monitor acted {alarms} of {rounds} times; writes away for at most {worst}",
                        )
                    )
    goals.append(none_of("checks without a decision", sum(not each.decided for each in load.results)))
    goals.append(none_of("silences after which the nodes did not find together", stuck))
    return Findings(figures, goals, load.seen, load.marks)


async def pg_all(size: Size) -> Findings:
    """Primary and replica are gone for 5 minutes, and so are the lifetimes of the caches, all divided by the same number."""
    divisor = size.of(10, 60)
    outage_s = OUTAGE_S / divisor
    known, revoked, unseen = keys_of(300), keys_of(20, "revoked"), keys_of(500, "unseen")
    lifetimes = {
        "TIDEGATE_CACHE__L1_TTL_S": f"{L1_TTL_S / divisor}",
        "TIDEGATE_CACHE__L2_TTL_S": f"{L2_TTL_S / divisor}",
        "TIDEGATE_CACHE__STALE_IF_ERROR_S": f"{STALE_S / divisor}",
    }
    with PostgresCluster(replicas=1) as database, RedisServer() as redis:
        where = {
            "TIDEGATE_CATALOG__URL": database.url(),
            "TIDEGATE_CATALOG__REPLICAS": ",".join(database.replica_urls()),
            "TIDEGATE_COUNTERS__URL": redis.url,
            "TIDEGATE_COUNTERS__TIMEOUT_MS": "500",
        }
        with instances(2, [*known, *unseen], **where, **lifetimes) as servers:
            await asyncio.to_thread(_make_and_revoke, servers[0], revoked)
            asks = itertools.cycle([*known, *revoked])
            strangers = iter([key for pair in zip(unseen, keys_of(len(unseen), "stranger"), strict=True) for key in pair])
            async with asked(servers, lambda: next(asks), 150) as load:
                # Each instance itself: what another one has seen it finds in Redis, but only until l2_ttl_s is over.
                await asyncio.to_thread(_show, servers, [*known, *revoked])
                await asyncio.sleep(4)
                until = asyncio.Event()
                new = KeyLoad(servers[0].url, 20, lambda: next(strangers), connections=4)
                gone_s = load.now_s
                for each in database.servers:
                    await in_thread(each.kill)
                load.mark(f"all of PostgreSQL is gone, for {outage_s:g} s", gone_s)
                asking = asyncio.create_task(new.run(until))
                await asyncio.sleep(outage_s)
                until.set()
                await asking
                back_s = load.now_s
                for each in database.servers:
                    await in_thread(each.start)
                load.mark("PostgreSQL is back")
                again_s = await asyncio.to_thread(_answers_again, servers, load, unseen[-1])
    is_revoked = set(revoked)
    during = [each for each in load.results if gone_s <= each.at_s < back_s]
    ours = [each for each in during if each.key not in is_revoked]
    theirs = [each for each in during if each.key in is_revoked]
    unclear = [each for each in new.results if (each.status, each.code) != (503, "CATALOG_UNAVAILABLE")]
    figures = [
        (
            "everything is divided by",
            f"{divisor:g}: the outage lasts {outage_s:g} s, l1_ttl_s is {L1_TTL_S / divisor:g} s, and so on",
        ),
        ("checks of known keys meanwhile, p99", f"{len(ours):,}, {p99_ms(ours):.1f} ms"),
        (
            "checks of revoked keys meanwhile",
            f"{len(theirs):,}: {_status_counts(theirs)}",
        ),
        (
            "checks of keys that nobody had seen",
            f"{len(new.results):,}: {_status_counts(new.results)}",
        ),
        ("… the slowest answer", f"{max((each.latency_s for each in new.results), default=0):.2f} s"),
    ]
    goals = [
        none_of("known keys without a decision", sum(not each.decided for each in ours)),
        none_of("revoked keys that were let through", sum(each.status == 200 for each in theirs)),
        none_of("unknown keys without 503 CATALOG_UNAVAILABLE", len(unclear)),
        at_most("new keys answered after the return", again_s, GOAL_S, "s"),
    ]
    return Findings(figures, goals, load.seen, load.marks)


def _make_and_revoke(server: Serve, names: list[str]) -> None:
    """Make keys through the admin API and revoke them; the names become the keys."""
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with httpx.Client(base_url=f"http://127.0.0.1:{server.admin_port}/admin/v1", headers=headers, timeout=20) as admin:
        for number, name in enumerate(names):
            made = admin.post("/api-keys", json={"tier": TIER, "name": name}).raise_for_status().json()
            admin.post(f"/api-keys/{made['id']}/revoke", json={"reason": "drill"}).raise_for_status()
            names[number] = made["api_key"]


def _show(servers: Sequence[Serve], keys: Sequence[str]) -> None:
    """Let each instance look up each key."""
    with httpx.Client(timeout=10) as client:
        for each in servers:
            for key in keys:
                answer = client.post(f"{each.url}/v1/check", json={"path": "/item", "api_key": key})
                if answer.status_code not in (200, 403):
                    raise RuntimeError(f"{key} was answered {answer.status_code} before anything happened: {answer.text}")


def _answers_again(servers: Sequence[Serve], load: Clocked, key: str) -> float | None:
    """How long after now a key that nobody had seen is accepted by all instances, s; None if not within 30 s."""
    began = load.now_s
    with httpx.Client(timeout=10) as client:
        while load.now_s < began + 30:
            if all(
                client.post(f"{each.url}/v1/check", json={"path": "/item", "api_key": key}).status_code == 200 for each in servers
            ):
                return load.now_s - began
            time.sleep(0.05)
    return None


DRILLS: Final = (pg_primary, pg_pause, pg_all)
