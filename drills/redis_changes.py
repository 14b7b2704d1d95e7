"""Redis grows or is far away, or clocks are wrong, and what the clients of a stack see of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import pytest
from tests.conftest import Serve
from tests.servers.deployed import DEPLOY
from tests.servers.redis_server import RedisServer

from drills.check_load import TIER, TIGHT, fill, policy_of
from drills.exactness import limits_of_policy, prove
from drills.figures import between, percentile_ms, recovery_s, under_in_windows
from drills.outcome import ChargeOutcome, Goal, Units, at_most, no_errors, nothing_above, over_admission_within_limits, units_of
from drills.redis_outages import RATE, SUBJECTS, Size, closed, is_bad, loaded, stacked
from drills.running import WARM_S, Running, in_thread
from drills.stack import Stack
from tidegate.policy.toml_reader import load_policy

RESHARD: Final = DEPLOY / "redis/reshard.sh"
GROWN_WITHIN_S: Final = 600
"""A guard against a hang: on two busy cores, six pairs take three minutes."""
DELAYS_MS: Final = (5, 20, 80)
SHIFT_S: Final = 600
WINDOW_S: Final = 10
WINDOW_LIMIT: Final = 12
"""Of each subject in each window; two checks a second are asked."""


async def redis_reshard(size: Size) -> ChargeOutcome:
    """A cluster grows from 3 to 9 shards by one run of deploy/redis/reshard.sh, with all its counters."""
    more = 2 if size.smoke else 6
    with stacked("cluster", size) as stack:
        cluster = stack.cluster
        shards = stack.sizes.shards
        member = cluster.nodes[0]
        fill(stack.instances[0].url, 3_000 if size.smoke else 18_000)
        async with loaded(stack, size) as running:
            running.mark(f"{2 * more} nodes are started")
            new = await in_thread(lambda: cluster.new_nodes(2 * more))
            event_s = running.mark("reshard.sh")
            # Neighbours are a shard: master, replica, master, replica …
            await in_thread(lambda: _reshard(member, new))
            over_s = running.mark(f"{shards + more} shards count")
            await running.rest(3)
        books = await running.books()
        masters = await in_thread(cluster.masters)
        keys = [int(master.must("DBSIZE")) for master in masters]
        slots = [int(master.facts("CLUSTER", "INFO")["cluster_slots_assigned"]) for master in masters]
        units = units_of(running, stack.policy_file, size.limit)
    load = running.load
    calm = ((WARM_S, event_s), (over_s + 0.5, running.ended_s))
    quiet = [each for since_s, until_s in calm for each in between(load.seen, since_s, until_s)]
    own_ms = max(running.own_percentile_ms(0.99, *span) for span in calm)
    degraded = sum(each.degraded for each in load.seen)
    # The binomial spread of so many keys over equal shards, three deviations either way.
    even = sum(keys) / len(keys)
    spread = 3 * even**0.5 + 0.02 * even
    goals = [
        no_errors(load.seen),
        *nothing_above(units),
        at_most("p99 of the instances outside the moves", own_ms, 10, "ms"),
        Goal("shards", f"{len(masters)}", f"{shards + more}", len(masters) == shards + more and min(slots) == 16_384),
        Goal(
            "keys of each shard",
            f"{min(keys)}–{max(keys)}",
            f"{even:.0f} ± {spread:.0f}",
            max(abs(one - even) for one in keys) <= spread,
        ),
    ]
    notes = [
        ("p99 outside the moves", f"{own_ms:.2f} ms at the instances, {percentile_ms(quiet, 0.99):.1f} ms through the balancer"),
        ("moved within", f"{over_s - event_s:.1f} s"),
        ("decided without Redis meanwhile", f"{degraded} of {len(between(load.seen, event_s, over_s))} checks"),
    ]
    return ChargeOutcome(
        "redis-reshard", load.seen, event_s, over_s, running.ended_s, units, books, goals, notes, running.marks, running.looks
    )


def _reshard(member: RedisServer, new: Sequence[RedisServer]) -> None:
    command = [str(RESHARD), *(f"{node.host}:{node.port}" for node in (member, *new))]
    environment = {name: value for name, value in os.environ.items() if name not in ("REDISCLI_AUTH", "REDIS_CLI")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=GROWN_WITHIN_S, check=False)
    if done.returncode:
        raise RuntimeError(f"{RESHARD.name} ended with {done.returncode}: {done.stderr[-1000:]}")


async def slow_network(size: Size) -> ChargeOutcome:
    """Answers of Redis come 5, 20 and 80 ms later; a check may take 50 ms."""
    settings = {"TIDEGATE_BREAKER__OPEN_S": "3"} if size.smoke else {}
    spans: list[tuple[int, float, float]] = []
    with stacked("standalone", size, settings=settings, proxied=True) as stack:
        assert stack.proxy is not None
        async with loaded(stack, size) as running:
            spans.append((0, WARM_S, running.now_s))
            for delay_ms in DELAYS_MS:
                began_s = running.mark(f"{delay_ms} ms")
                stack.proxy.delay(delay_ms / 1000)
                await running.rest(size.of(8, 3))
                spans.append((delay_ms, began_s, running.now_s))
            stack.proxy.delay(0)
            returned_s = running.mark("at once again")
            closes = await closed(running)
            await running.rest(2)
        books = await running.books()
        units = units_of(running, stack.policy_file, size.limit)
    load = running.load
    goals, notes = [no_errors(load.seen)], []
    usual_ms = 0.0
    for delay_ms, since_s, until_s in spans:
        span = between(load.seen, since_s, until_s)
        rate = len(span) / (until_s - since_s)
        p99_ms = percentile_ms(span, 0.99)
        degraded = sum(each.degraded for each in span) / max(len(span), 1)
        p50_ms = percentile_ms(span, 0.5)
        own_ms = running.own_percentile_ms(0.99, since_s, until_s)
        alone = f"{100 * degraded:.1f} % without Redis"
        latencies = f"p50 {p50_ms:.1f}, p99 {p99_ms:.1f} ms, at the instances {own_ms:.1f} ms"
        notes.append((f"{delay_ms} ms", f"{rate:.0f} checks/s, {latencies}, {alone}"))
        if not delay_ms:
            usual_ms = p99_ms
            continue
        goals.append(
            Goal(f"throughput kept at {delay_ms} ms", f"{rate:.0f}/s", f"≥ {0.95 * RATE:.0f}/s", rate >= 0.95 * RATE, True)
        )
        # 50 ms, and about 2 ms more until the mark in the stream of questions is seen.
        goals.append(at_most(f"p99 at {delay_ms} ms", p99_ms, min(delay_ms, 52) + max(usual_ms, 3) + 5, "ms"))
    goals.append(Goal("breakers close by themselves", "yes" if closes else "no", "yes", closes))
    goals.append(Goal("admitted and not put back, units", f"{books.uncounted}", "0", books.uncounted == 0))
    goals.append(over_admission_within_limits(units))
    event_s = spans[1][1]
    late_s = spans[-1][1]  # later than the deadline, from here on
    back_s = recovery_s(load.seen, late_s, is_bad)
    over_s = returned_s if back_s is None else max(returned_s, late_s + back_s)
    return ChargeOutcome(
        "slow-network", load.seen, event_s, over_s, running.ended_s, units, books, goals, notes, running.marks, running.looks
    )


async def clock(size: Size) -> ChargeOutcome:
    """The clocks of three instances are 10 minutes slow, right, and 10 minutes fast."""
    shifts = (-SHIFT_S, 0, SHIFT_S)
    each = [_shifted(shift) for shift in shifts]
    policy = policy_of(f"{WINDOW_LIMIT}/{WINDOW_S}s")
    # Deadlines are not what is tried: on a busy machine no check is to meet them.
    patient = {"TIDEGATE_COUNTERS__TIMEOUT_MS": "5000"}
    with stacked("standalone", size, each=each, policy=policy, settings=patient) as stack:
        async with Running(stack, RATE, SUBJECTS) as running:
            event_s = running.mark("clocks are wrong from the start")
            await running.rest(size.of(45, 22))
        books = await running.books()
        measured = [_shift_of(instance) for instance in stack.instances]
        units, windows = _in_windows(running, stack)
    load = running.load
    wrong = max(abs(one - shift) for one, shift in zip(measured, shifts, strict=True))
    goals = [
        no_errors(load.seen),
        # That the clocks are what they are said to be: else nothing would have been tried.
        Goal("clock shifts read from the logs", " ".join(f"{one:+.0f}" for one in measured), "-600 +0 +600 s", wrong < 5),
        Goal("units above the limits, by the checker", f"{units.excess}", "0", units.excess == 0),
        Goal("units not admitted", f"{units.under}", "0", units.under == 0),
        Goal("admitted and not counted", f"{books.uncounted}", "0", books.uncounted == 0),
        Goal("decided without Redis", f"{sum(map(is_bad, load.seen))}", "0", not any(map(is_bad, load.seen))),
    ]
    notes = [("windows looked at", f"{windows} of {WINDOW_LIMIT} units each")]
    return ChargeOutcome(
        "clock", load.seen, event_s, running.ended_s, running.ended_s, units, books, goals, notes, running.marks, running.looks
    )


def _shifted(shift_s: int) -> dict[str, str]:
    """The environment of an instance whose calendar is wrong; how long things take it measures rightly, as machines do."""
    if not shift_s:
        return {}
    library = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
    if library is None:
        pytest.skip("libfaketime is not installed: it comes with the Debian package libfaketime")
    return {
        "LD_PRELOAD": str(library),
        "FAKETIME": f"{shift_s:+d}",
        "DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }


def _shift_of(instance: Serve) -> float:
    """How far an instance's clock is from ours, by what it logged when it started and when that file was written, s."""
    assert instance.log is not None
    line = next(line for line in reversed(instance.log.read_text().splitlines()) if line.startswith("{"))
    said = datetime.fromisoformat(re.sub("Z$", "+00:00", json.loads(line)["@timestamp"]))
    written = datetime.fromtimestamp(instance.log.stat().st_mtime, UTC)
    return (said - written).total_seconds()


def _in_windows(running: Running, stack: Stack) -> tuple[Units, int]:
    """The units of the tight rule, whose windows end meanwhile."""
    load = running.load
    reports = prove(load.answers, limits_of_policy(load_policy(stack.policy_file)))
    excess = sum(each.excess_units for each in reports)
    tight = [answer for answer in load.answers if answer.limits == f"{TIER}:{TIGHT}"]
    under, windows = under_in_windows(tight, WINDOW_LIMIT, WINDOW_S * 1_000_000)
    admitted = sum(answer.cost for answer in tight if answer.allowed)
    store_excess = sum(each.store_excess_units for each in reports)
    return Units(WINDOW_LIMIT, WINDOW_LIMIT * windows, admitted, excess, excess, store_excess, under), windows


DRILLS: Final[Sequence[Callable[[Size], Any]]] = (redis_reshard, slow_network, clock)
