"""A fleet that grows from 1 to 100 million daily users: what is full first, what is added, and what cannot be added.

    python -m drills.fleet [--smoke]

Users have a key each and ask by Zipf's law; instances find keys in memory (L1), in Redis (L2) or in PostgreSQL; each check is one
call at one Redis shard. The fleet stays as it is until a part of it is above its target at the peak; then one more of that part
is added, and the line is printed. Costs of a check and sizes of keys are measured (`tidegate plan`).

The caches are computed by formula (`tidegate.tools.plan.caches`); a seeded replay of single requests through two
caches is printed beside it. Chart: drills/results/fleet.png.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

from tidegate.tools.plan.assumptions import Assumptions, assume
from tidegate.tools.plan.caches import CacheShares, cache_shares
from tidegate.tools.plan.constants import Constant, measured
from tidegate.tools.plan.fleet import DAY_S, key_look_ups, target_load
from tidegate.tools.plan.quantities import short

RESULTS: Final = Path(__file__).parent / "results"
FIRST: Final = 1_000_000
LAST: Final = 100_000_000


class Fleet(NamedTuple):
    """What there is of each part."""

    instances: int
    shards: int
    replicas: int


class Busy(NamedTuple):
    """How full each part is at the peak: 1 is at its target.

    Args:
        instances: checks of an instance.
        redis_cpu: of a shard's core.
        redis_memory: of a shard.
        replicas: CPU of a read replica.
        hottest: the busiest key's share of one shard's core; it cannot be spread.
        found: what the caches do.
    """

    instances: float
    redis_cpu: float
    redis_memory: float
    replicas: float
    hottest: float
    found: CacheShares


def busy(users: float, fleet: Fleet, constants: Mapping[str, Constant], assumed: Assumptions) -> Busy:
    """How full a fleet is.

    Args:
        users: daily.
        constants: measured.
        assumed: targets.

    Returns:
        The parts, 1 where the target is met.
    """
    use = assumed.use
    known = {name: constant.value for name, constant in constants.items()}
    peak = users * use["requests_per_user"] / DAY_S * use["peak_factor"]
    found = key_look_ups(users, peak, fleet.instances, assumed)
    calls = peak * (2 - found.l1)
    core_us = 1e6 * use["redis_cpu_target"]
    held = users * use["counters_per_user"] * known["counter_bytes"] + found.l2_entries * known["cache_entry_bytes"]
    # One of them may be away.
    serving = max(fleet.instances - int(use["spare_instances"]), 1)
    return Busy(
        instances=peak / (serving * target_load(constants, assumed)),
        redis_cpu=calls * known["redis_cpu_us"] / (fleet.shards * core_us),
        redis_memory=held / (fleet.shards * use["shard_gb"] * 1e9 * use["shard_fill"]),
        replicas=peak * found.database * known["look_up_cpu_us"]
        / (fleet.replicas * use["database_cores"] * use["database_cpu_target"] * 1e6),
        hottest=peak * found.hottest * known["redis_cpu_us"] / core_us,
        found=found,
    )  # fmt: skip


class Step(NamedTuple):
    """One size on the way.

    Args:
        users: daily.
        fleet: as it is after what was added here.
        before: how full it was before that.
        after: how full it is then.
        reasons: parts that were above their targets.
    """

    users: float
    fleet: Fleet
    before: Busy
    after: Busy
    reasons: tuple[str, ...]


def grow(constants: Mapping[str, Constant], assumed: Assumptions, per_decade: int) -> list[Step]:
    """Let the users grow, and add what is full.

    Args:
        constants: measured.
        assumed: targets.
        per_decade: sizes between 1M and 10M.

    Returns:
        All sizes.
    """
    use = assumed.use
    fleet = Fleet(int(use["min_instances"]), int(use["min_shards"]), int(use["min_replicas"]))
    steps = []
    for number in range(2 * per_decade + 1):
        users = FIRST * (LAST / FIRST) ** (number / (2 * per_decade))
        before = seen = busy(users, fleet, constants, assumed)
        reasons = []
        # More instances see less of each key, so what is added to one part may fill another.
        while max(seen[:4]) > 1:
            part = max(range(4), key=lambda place: seen[place])
            if Busy._fields[part] not in reasons:
                reasons.append(Busy._fields[part])
            fleet = (
                fleet._replace(instances=fleet.instances + 1),
                fleet._replace(shards=fleet.shards + 1),
                fleet._replace(shards=fleet.shards + 1),
                fleet._replace(replicas=fleet.replicas + 1),
            )[part]
            seen = busy(users, fleet, constants, assumed)
        steps.append(Step(users, fleet, before, seen, tuple(reasons)))
    return steps


def replayed(keys: int, rate: float, instances: int, requests: int, assumed: Assumptions, seed: int) -> tuple[float, float]:
    """Single requests through the caches of several instances and the shared one.

    Args:
        keys: distinct ones.
        rate: requests a second.
        instances: that share them.
        requests: how many; the first third warms the caches and is not counted.
        assumed: TTLs and the exponent.
        seed: of all chance.

    Returns:
        The shares answered by memory and by the shared cache.
    """
    chance = random.Random(seed)
    use = assumed.use
    weights = list(itertools.accumulate(1 / (rank + 1) ** use["zipf_exponent"] for rank in range(keys)))
    chosen = chance.choices(range(keys), cum_weights=weights, k=requests)
    memory: list[dict[int, float]] = [{} for _ in range(instances)]
    shared: dict[int, float] = {}
    now = 0.0
    counted = hits = shared_hits = 0
    for number, key in enumerate(chosen):
        now += chance.expovariate(rate)
        counts = number >= requests // 3
        counted += counts
        own = memory[chance.randrange(instances)]
        if own.get(key, 0.0) > now:
            hits += counts
            continue
        own[key] = now + use["l1_ttl_s"]
        if shared.get(key, 0.0) > now:
            shared_hits += counts
        else:
            shared[key] = now + use["l2_ttl_s"]
    return hits / counted, shared_hits / counted


def draw(steps: list[Step], path: Path) -> None:
    """The fleet's parts, and how full they were, by users."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    users = [step.users for step in steps]
    figure, (above, below) = plt.subplots(2, 1, figsize=(10, 8), layout="constrained", sharex=True)
    for name in Fleet._fields:
        above.step(users, [getattr(step.fleet, name) for step in steps], where="post", label=name)
    above.set(xscale="log", yscale="log", ylabel="how many")
    above.legend()
    for name in Busy._fields[:5]:
        below.plot(users, [getattr(step.before, name) for step in steps], label=name.replace("_", " "), linewidth=1)
    below.plot(
        users, [step.before.found.database for step in steps], ":", color="black", label="share of look-ups at the database"
    )
    below.axhline(1, color="grey", linewidth=0.8)
    below.set(xlabel="daily users", ylabel="of its target, before adding")
    below.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Grow, print what is full first, and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="few sizes, a short replay")
    parser.add_argument("--seed", type=int, default=1, help="of the replay")
    asked = parser.parse_args()
    constants, assumed = measured(), assume()
    steps = grow(constants, assumed, 4 if asked.smoke else 60)
    print("   users  instances  shards  replicas    L1    L2  database  queries/s  busiest key  added for")
    before: Fleet | None = None
    for step in steps:
        if step.fleet != before or step is steps[-1]:
            found = step.after.found
            peak = step.users * assumed.use["requests_per_user"] / DAY_S * assumed.use["peak_factor"]
            print(
                f"  {short(step.users):>6}  {step.fleet.instances:>9}  {step.fleet.shards:>6}  {step.fleet.replicas:>8}  "
                f"{found.l1:>4.0%}  {found.l2:>4.0%}  {found.database:>8.1%}  {peak * found.database:>9,.0f}  "
                f"{step.after.hottest:>11.0%}  {', '.join(step.reasons).replace('_', ' ')}"
            )
        before = step.fleet
    print()
    for part in Busy._fields[:4]:
        first = next((step for step in steps if part in step.reasons), None)
        print(f"{part.replace('_', ' '):<13} {'full at ' + short(first.users) if first else 'never full'}")
    over = next((step for step in steps if step.fleet.instances > assumed.use["max_instances"]), None)
    most = assumed.use["max_instances"]
    print(f"{'maxReplicas':<13} {f'{most:g} pass at ' + short(over.users) if over else f'{most:g} are enough'}")
    hot = next((step for step in steps if step.after.hottest > 1), None)
    print(f"{'busiest key':<13} {'fills a shard at ' + short(hot.users) if hot else 'never fills a shard'}")
    keys, instances, count = (2_000, 4, 60_000) if asked.smoke else (50_000, 10, 1_500_000)
    use = assumed.use
    rate = keys * use["requests_per_user"] / DAY_S * use["peak_factor"]
    l1, l2 = replayed(keys, rate, instances, count, assumed, asked.seed)
    model = cache_shares(keys, rate, instances, use["l1_ttl_s"], use["l2_ttl_s"], use["l1_keys"], use["zipf_exponent"])
    print(
        f"\n{count:,} single requests of {keys:,} keys at {instances} instances: L1 {l1:.1%}, L2 {l2:.1%}, "
        f"database {1 - l1 - l2:.1%}; by formula {model.l1:.1%}, {model.l2:.1%}, {model.database:.1%}"
    )
    longer = assume(overrides=["l2_ttl_s=3600"])
    end, at_end = steps[-1], busy(LAST, steps[-1].fleet, constants, longer)
    print(
        f"at {short(end.users)} with cache.l2_ttl_s = 3600: database {at_end.found.database:.1%} of the look-ups instead of "
        f"{end.after.found.database:.1%}, replicas at {at_end.replicas:.0%} of their target"
    )
    RESULTS.mkdir(exist_ok=True)
    draw(steps, RESULTS / "fleet.png")
    print(f"\nchart: {RESULTS / 'fleet.png'}")


if __name__ == "__main__":
    main()
