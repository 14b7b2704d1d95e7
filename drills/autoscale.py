"""Three days of traffic through Kubernetes' autoscaler: requests over capacity and pod-hours, by how fast it may change.

    python -m drills.autoscale [--smoke]

The traffic of 10M daily users over a day; the same with two spikes to ten times as much within a minute; the same with a flash
crowd that comes in five minutes and thins out over an hour. The autoscaler (`drills/hpa.py`) sees what a cluster would show it:
CPU from a scrape every 15 s over the last 15 s, the rate of checks from a scrape every 15 s over the last minute, each a moment
late. What a pod can decide, how long it takes to start and to drain is measured (`tidegate plan`); scheduling it and finding it
ready is assumed. `over capacity` counts requests beyond what the ready pods can decide in that second: they wait or fail.

Of all behaviours tried, the winner is the one with fewest pod-hours among those whose requests over capacity are within 5 % of
the fewest. Chart: drills/results/autoscale.png. Seeded: the same figures every time.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from drills.hpa import DEFAULT, SYNC_S, Autoscaler, Behaviour, Policy, Rules, Samples, Shipped, proposal, shipped_in
from tidegate.tools.plan.assumptions import assume
from tidegate.tools.plan.constants import measured
from tidegate.tools.plan.fleet import instance_capacity

RESULTS: Final = Path(__file__).parent / "results"
MANIFESTS: Final = Path(__file__).parents[1] / "deploy" / "kubernetes" / "base"
DAY_S: Final = 86_400
USERS: Final = 10_000_000
SPIKE_S: Final = 18 * 3600
CROWD_S: Final = 16 * 3600

SCHEDULE_S: Final = 3.0
"""From the decision to exec in a pod, the image being there: assumed."""
PROBE_S: Final = 2
"""Readiness probes come so often, and a pod is ready at the first that succeeds."""
SCRAPE_S: Final = 15
CPU_WINDOW_S: Final = 15
RATE_WINDOW_S: Final = 60
PRE_STOP_S: Final = 10.0
"""How long a pod that is to end waits until all balancers have removed it."""
LATE_S: Final = 3
"""From a scrape until the autoscaler can see it."""
WITHIN: Final = 1.05

WINNER: Final = Shipped(
    Behaviour(
        Rules(0, (Policy("Percent", 100, 15), Policy("Pods", 4, 15))),
        Rules(600, (Policy("Percent", 10, 60),)),
    ),
    least=3,
    most=50,
    cpu_percent=70,
    pod_rate=10_000,
)
"""What won here, and what `deploy/kubernetes/base` is to say; a test compares the two."""


class ChargeOutcome(NamedTuple):
    """Of one day under one behaviour.

    Args:
        over: requests over capacity.
        pod_hours: of pods that existed, starting and draining ones too.
        changes: how often the number of pods changed.
        series: second, load, capacity of the ready pods and their number, once a sync.
    """

    over: float
    requests: float
    pod_hours: float
    changes: int
    series: Sequence[tuple[int, float, float, int]]


Load = Callable[[int], float]
"""Requests in a second of the day."""


def diurnal(seed: int, users: float = USERS) -> list[float]:
    """A day's requests by second: night, morning, a peak in the evening three times the mean, gusts of 10 % over minutes."""
    use = assume().use
    mean = users * use["requests_per_user"] / DAY_S
    noise = random.Random(seed)
    # The power makes the peak so narrow that it is three times the mean, with a night of 2 % of the peak.
    curve = [((1 + math.cos(2 * math.pi * (second / DAY_S - 20 / 24))) / 2) ** 2.85 + 0.02 for second in range(DAY_S)]
    scale = mean * DAY_S / sum(curve)
    day = []
    gust = 0.0
    for value in curve:
        # An Ornstein-Uhlenbeck process: 10 % of standard deviation, forgotten within three minutes; and 2 % each second.
        gust += -gust / 180 + noise.gauss(0, 0.1) * math.sqrt(2 / 180)
        day.append(max(value * scale * (1 + gust) * noise.gauss(1, 0.02), 0.0))
    return day


def spiked(seed: int) -> list[float]:
    """The day with two spikes at six in the evening, 20 minutes apart: ten times the load within a minute, for five minutes."""
    day = diurnal(seed)
    for start in (SPIKE_S, SPIKE_S + 20 * 60):
        for second in range(start, start + 60 + 300 + 60):
            into = second - start
            rise = min(into / 60, 1.0, (420 - into) / 60)
            day[second] *= 1 + 9 * rise
    return day


def crowded(seed: int) -> list[float]:
    """The day with a flash crowd at four in the afternoon: six times the load within five minutes, halved every 20."""
    day = diurnal(seed)
    for second in range(CROWD_S, CROWD_S + 4 * 3600):
        into = second - CROWD_S
        day[second] *= 1 + 5 * (into / 300 if into < 300 else 0.5 ** ((into - 300) / 1200))
    return day


DAYS: Final[Mapping[str, Callable[[int], list[float]]]] = {"a day": diurnal, "two spikes": spiked, "flash crowd": crowded}


class Pods:
    """Pods by when they are ready, and those that drain.

    Args:
        count: ready from the beginning.
        start_s: from exec to /readyz 200.
        drain_s: from SIGTERM to the end.
    """

    def __init__(self, count: int, start_s: float, drain_s: float) -> None:
        self.ready_at: list[float] = [-1e9] * count
        self._start_s = start_s
        self._drain_s = drain_s
        self._gone_at: list[float] = []

    def scale(self, now_s: int, count: int) -> None:
        """Start pods, or end some: those that are not ready first, as a ReplicaSet does, then the newest."""
        while len(self.ready_at) < count:
            up_at = now_s + SCHEDULE_S + self._start_s
            self.ready_at.append(math.ceil(up_at / PROBE_S) * PROBE_S)
        while len(self.ready_at) > count:
            self.ready_at.pop()
            self._gone_at.append(now_s + self._drain_s)
        self._gone_at = [at for at in self._gone_at if at > now_s]

    def ready(self, now_s: float) -> int:
        """How many take requests."""
        # In the order of their start, so the ready ones come first.
        count = len(self.ready_at)
        while count and self.ready_at[count - 1] > now_s:
            count -= 1
        return count

    def existing(self, now_s: float) -> int:
        """How many are paid for."""
        return len(self.ready_at) + sum(at > now_s for at in self._gone_at)


def replay(day: Sequence[float], shipped: Shipped, capacity: float, start_s: float, drain_s: float) -> ChargeOutcome:
    """One day under one behaviour.

    Args:
        day: requests by second.
        shipped: behaviour and targets.
        capacity: checks/s of a pod.
        start_s: from exec to /readyz 200.
        drain_s: from SIGTERM to the end.

    Returns:
        What it cost.
    """
    aim = min(capacity * shipped.cpu_percent / 100, shipped.pod_rate)
    pods = Pods(min(max(math.ceil(day[0] / aim), shipped.least), shipped.most), start_s, drain_s)
    scaler = Autoscaler(shipped.behaviour, shipped.least, shipped.most)
    served = [0.0] * len(day)
    """Checks/s of each ready pod; its CPU is that over its capacity."""
    over = pod_seconds = 0.0
    changes = 0
    series = []
    seen_at = -1
    ready = pods.ready(0)
    for second, load in enumerate(day):
        ready = pods.ready(second)
        able = ready * capacity
        over += max(load - able, 0.0)
        served[second] = min(load, able) / ready if ready else 0.0
        pod_seconds += pods.existing(second)
        if second % SCRAPE_S == 0:
            seen_at = second
        if second % SYNC_S == LATE_S and seen_at >= RATE_WINDOW_S:
            current = len(pods.ready_at)
            proposals = _proposals(pods, seen_at, served, capacity, shipped)
            wanted = scaler.decide(second, current, proposals)
            if wanted != current:
                changes += 1
                pods.scale(second, wanted)
                ready = pods.ready(second)
            series.append((second, load, able, current))
    return ChargeOutcome(over, sum(day), pod_seconds / 3600, changes, series)


def _proposals(pods: Pods, seen_at: int, served: Sequence[float], capacity: float, shipped: Shipped) -> list[int | None]:
    """What both metrics ask for, as of the last scrape."""
    current = len(pods.ready_at)
    cpu = 100 * sum(served[seen_at - CPU_WINDOW_S : seen_at]) / CPU_WINDOW_S / capacity
    rate = sum(served[seen_at - RATE_WINDOW_S : seen_at]) / RATE_WINDOW_S
    # A CPU sample counts once its whole window lies after the pod was ready; a rate needs two scrapes of a ready pod.
    with_cpu = sum(at + CPU_WINDOW_S <= seen_at for at in pods.ready_at)
    with_rate = sum(at + RATE_WINDOW_S <= seen_at for at in pods.ready_at)
    up = pods.ready(seen_at)
    return [
        proposal(current, Samples([cpu] * with_cpu, unready=current - with_cpu), shipped.cpu_percent, 100.0),
        proposal(
            current, Samples([rate] * with_rate, unready=current - up, missing=up - with_rate), shipped.pod_rate, shipped.pod_rate
        ),
    ]


def behaviours(smoke: bool) -> dict[str, Behaviour]:
    """What is tried: some by name, and a grid of policies."""
    named = {
        "Kubernetes' default": DEFAULT,
        "one pod a minute up": Behaviour(Rules(0, (Policy("Pods", 1, 60),)), DEFAULT.down),
        "up only after 60 s": Behaviour(DEFAULT.up._replace(window_s=60), DEFAULT.down),
        "down at once": Behaviour(DEFAULT.up, Rules(0, (Policy("Percent", 100, 15),))),
        "the winner": WINNER.behaviour,
    }
    if smoke:
        return named
    ups = (
        Rules(0, (Policy("Percent", 100, 15), Policy("Pods", 4, 15))),
        Rules(0, (Policy("Percent", 100, 15), Policy("Pods", 10, 15))),
        Rules(0, (Policy("Percent", 300, 15),)),
    )
    slow = Rules(0, (Policy("Percent", 100, 30), Policy("Pods", 4, 30)))
    downs = [Rules(600, (Policy("Pods", 1, 120),))]
    downs += [
        Rules(window_s, (Policy("Percent", percent, 60),))
        for window_s, percent in itertools.product((300, 600, 900), (10, 50, 100))
    ]
    for up, down in itertools.product((*ups, slow), downs):
        named[f"up {_written(up)}; down {_written(down)}"] = Behaviour(up, down)
    return named


def _written(rules: Rules) -> str:
    policies = " or ".join(
        f"{policy.value}{'%' if policy.type == 'Percent' else ' pods'}/{policy.period_s}s" for policy in rules.policies
    )
    return f"{policies}, {rules.window_s}s"


def draw(outcomes: Mapping[str, Mapping[str, ChargeOutcome]], path: Path) -> None:
    """Load and capacity around the spikes, for the behaviours that have names."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    days = list(next(iter(outcomes.values())))
    figure, axes = plt.subplots(len(days), 1, figsize=(10, 3.2 * len(days)), layout="constrained", squeeze=False)
    for axis, day in zip(axes[:, 0], days, strict=True):
        for place, (name, by_day) in enumerate(outcomes.items()):
            series = by_day[day].series
            if day == "two spikes":
                series = [each for each in series if SPIKE_S - 600 <= each[0] <= SPIKE_S + 3600]
            hours = [each[0] / 3600 for each in series]
            if not place:
                axis.plot(hours, [each[1] for each in series], color="black", linewidth=1, label="requests/s")
            axis.plot(hours, [each[2] for each in series], linewidth=1, label=f"can decide: {name}")
        axis.set(title=day, xlabel="hour of the day", ylabel="1/s", ylim=(0, None))
    axes[0, 0].legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Replay the days and print what each behaviour costs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one day and the behaviours that have names")
    parser.add_argument("--seed", type=int, default=1, help="of the noise")
    asked = parser.parse_args()
    constants, assumed = measured(), assume()
    capacity = instance_capacity(constants, assumed)
    start_s, drain_s = constants["start_s"].value, PRE_STOP_S + constants["drain_s"].value
    shipped = shipped_in(MANIFESTS)
    base, where = (WINNER, "drills/autoscale.py") if shipped is None else (shipped, "deploy/kubernetes/base")
    days = {name: make(asked.seed) for name, make in DAYS.items() if not asked.smoke or name == "two spikes"}
    print(
        f"a pod decides {capacity:,.0f} checks/s, is ready {SCHEDULE_S + start_s:.1f} s (and a probe) after the decision, "
        f"drains in {drain_s:.1f} s;\n"
        f"{base.least} to {base.most} pods, CPU {base.cpu_percent:g} %, {base.pod_rate:,.0f} checks/s a pod ({where})"
    )
    outcomes: dict[str, dict[str, ChargeOutcome]] = {}
    tried = behaviours(asked.smoke)
    if base.behaviour not in tried.values():
        tried["as shipped"] = base.behaviour
    for name, behaviour in tried.items():
        outcomes[name] = {
            day: replay(loads, base._replace(behaviour=behaviour), capacity, start_s, drain_s) for day, loads in days.items()
        }
    _print_days({name: outcomes[name] for name in behaviours(smoke=True)})
    ranked = ranking(outcomes)
    best = ranked[0]
    print("\nall days together, the best ten: over capacity, pod-hours")
    for name in ranked[:10]:
        print(f"  {name:<52} {_over(outcomes[name]):>13,.0f} {_pod_hours(outcomes[name]):>9,.1f}")
    print(f"\nfewest pod-hours within {WITHIN - 1:.0%} of the fewest requests over capacity, all days together: {best}")
    print(f"  scaleUp   {_written(tried[best].up)}, select {tried[best].up.select}")
    print(f"  scaleDown {_written(tried[best].down)}, select {tried[best].down.select}")
    if tried[best] != WINNER.behaviour:
        print("  NOT what drills/autoscale.py has as WINNER: change it there, and in deploy/kubernetes")
    print(
        f"\nA pod has no more CPU than it asks for, so a round can multiply the pods by {100 / base.cpu_percent:.2f} (by CPU) or "
        f"{capacity / base.pod_rate:.2f} (by rate)\nat most, whatever the policies allow. What that cannot serve in time takes "
        "pods that are there before: minReplicas, or a lower CPU target."
    )
    for least in (base.least, 6, 12, 25):
        seen = {day: replay(loads, base._replace(least=least), capacity, start_s, drain_s) for day, loads in days.items()}
        over, hours = sum(each.over for each in seen.values()), sum(each.pod_hours for each in seen.values())
        print(f"  minReplicas {least:>2}: {over:>13,.0f} over capacity, {hours:>8,.1f} pod-hours")
    RESULTS.mkdir(exist_ok=True)
    draw({name: outcomes[name] for name in behaviours(smoke=True)}, RESULTS / "autoscale.png")
    print(f"\nchart: {RESULTS / 'autoscale.png'}")


def _print_days(outcomes: Mapping[str, Mapping[str, ChargeOutcome]]) -> None:
    width = max(map(len, outcomes))
    for day, first in outcomes["the winner"].items():
        print(f"\n{day}: {first.requests:,.0f} requests")
        print(f"  {'':<{width}} over capacity      share   pod-hours  changes")
        for name, by_day in outcomes.items():
            seen = by_day[day]
            share = f"{seen.over / seen.requests:.3%}"
            print(f"  {name:<{width}} {seen.over:>13,.0f} {share:>10} {seen.pod_hours:>11,.1f} {seen.changes:>8,}")


def _over(by_day: Mapping[str, ChargeOutcome]) -> float:
    return sum(each.over for each in by_day.values())


def _pod_hours(by_day: Mapping[str, ChargeOutcome]) -> float:
    return sum(each.pod_hours for each in by_day.values())


def ranking(outcomes: Mapping[str, Mapping[str, ChargeOutcome]]) -> list[str]:
    """Behaviours, best first: those with few enough requests over capacity by pod-hours, then the others by what is over.

    Args:
        outcomes: by behaviour and day.

    Returns:
        Their names; of equals, the first given stays first.
    """
    enough = min(map(_over, outcomes.values())) * WITHIN

    def cost(name: str) -> tuple[bool, float]:
        over = _over(outcomes[name])
        return over > enough, over if over > enough else round(_pod_hours(outcomes[name]), 3)

    return sorted(outcomes, key=cost)


if __name__ == "__main__":
    main()
