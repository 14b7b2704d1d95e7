"""Whether 99.99 % holds: minutes a year without service, by component, from measured recoveries and assumed failure rates.

    python -m drills.availability

Inputs are the tables below. A component of `n` machines that needs `k` of them is out of service while it switches, after each
failure, and while fewer than `k` are up, which they are independently of each other: the binomial distribution over
u = failures a year x repair / a year. What that leaves out is in docs/availability.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

MINUTES_A_YEAR: Final = 365 * 24 * 60
BUDGET_MIN: Final = MINUTES_A_YEAR * 0.0001
"""52.56: what 99.99 % leaves."""
CHECKS, EXACT, CHANGES = "checks", "exact counts", "changes"
"""The three services: every check is decided; it is counted exactly; operators can change the catalog."""
SERVICES: Final = (CHECKS, EXACT, CHANGES)


class Rate(NamedTuple):
    """How often something happens, and how long until it is repaired.

    Args:
        a_year: times a year, of each machine or process.
        repair_min: minutes until it is back, where nothing takes its place.
        source: of the two.
    """

    a_year: float
    repair_min: float
    source: str


MACHINE: Final = Rate(1, 240, "assumed: each machine is lost once a year, and replaced within 4 hours")
LONE_MACHINE: Final = Rate(1, 60, "assumed: once a year, and somebody is woken and has it back within the hour")
REBOOT: Final = Rate(12, 1, "assumed: a kernel a month, one minute")
CRASH: Final = Rate(4, 0.05, "assumed: four crashes a year; systemd starts it again within 3 s")
RELEASE: Final = Rate(12, 0.05, "assumed: one a month; a restart of 3 s")


class Measured(NamedTuple):
    """How long a failure lasts for a service until something else has taken over.

    Args:
        seconds: the worst of the runs.
        source: command and date.
    """

    seconds: float
    source: str


NOTHING: Final = Measured(
    0, "no client error: python -m drills redis-cluster-master redis-sentinel-master, python -m drills.redis_failures"
)
INSTANCE: Final = Measured(0, "0 of 11,603 requests failed: python -m drills.instance")
BALANCER: Final = Measured(2.1, "1.4-1.7 s killed, 1.5-2.1 s cut off: python -m drills.balancer")
CLUSTER: Final = Measured(6.0, "as shipped, a third of the subjects: python -m drills redis-cluster-master, 2026-11-28")
SENTINEL: Final = Measured(5.9, "as shipped: python -m drills redis-sentinel-master, 2026-11-28")
POSTGRES: Final = Measured(8.6, "6.4-8.6 s until writes: python -m drills pg-primary, 2026-11-25 and 2026-11-28")


class Component(NamedTuple):
    """Some machines or processes that do one thing.

    Args:
        needed: how many must be up.
        rate: of the failures of each.
        switching: what a single failure costs each service that notices it.
        without: the services that are gone while fewer than needed are up.
    """

    name: str
    machines: int
    needed: int
    rate: Rate
    switching: dict[str, Measured]
    without: Sequence[str]

    def minutes(self, service: str) -> float:
        """Minutes a year without a service because of this component.

        Args:
            service: one of `SERVICES`.
        """
        switching = self.switching.get(service)
        switched = 0.0 if switching is None else self.machines * self.rate.a_year * switching.seconds / 60
        return switched + (self.short() * MINUTES_A_YEAR if service in self.without else 0.0)

    def short(self) -> float:
        """The share of the year in which fewer than needed are up, 0 to 1."""
        down = min(self.rate.a_year * self.rate.repair_min / MINUTES_A_YEAR, 1.0)
        return sum(
            math.comb(self.machines, lost) * down**lost * (1 - down) ** (self.machines - lost)
            for lost in range(self.machines - self.needed + 1, self.machines + 1)
        )


class Topology(NamedTuple):
    """An installation."""

    name: str
    components: Sequence[Component]

    def minutes(self, service: str) -> float:
        """Minutes a year without a service: the sum, as if no two failures ever overlapped.

        Args:
            service: one of `SERVICES`.
        """
        return sum(each.minutes(service) for each in self.components)

    def scaled(self, failures: float = 1.0, repair: float = 1.0) -> Topology:
        """The same with other rates.

        Args:
            failures: factor of how often everything fails.
            repair: factor of how long repairs take.
        """
        return self._replace(
            components=[
                each._replace(
                    rate=each.rate._replace(a_year=each.rate.a_year * failures, repair_min=each.rate.repair_min * repair)
                )
                for each in self.components
            ]
        )

    def common_cause_min(self) -> float:
        """Minutes a year that whole components would be gone if *every* loss of a machine took all of its component with it."""
        return sum(
            each.machines * each.rate.a_year * each.rate.repair_min
            for each in self.components
            if CHECKS in each.without and each.machines > each.needed
        )


def _pair(name: str, machines: int, needed: int, switching: dict[str, Measured], without: Sequence[str]) -> Component:
    return Component(name, machines, needed, MACHINE, switching, without)


_ROLLING: Final = [
    Component("instances: crashes", 3, 0, CRASH, {CHECKS: INSTANCE}, []),
    Component("instances: releases, one by one", 3, 0, RELEASE, {CHECKS: INSTANCE}, []),
]
TOPOLOGIES: Final = [
    Topology(
        "a single machine: memory, SQLite",
        [
            Component("machine lost", 1, 1, LONE_MACHINE, {}, SERVICES),
            Component("machine rebooted", 1, 1, REBOOT, {}, SERVICES),
            Component("Tidegate crashes", 1, 1, CRASH, {}, SERVICES),
            Component("Tidegate released", 1, 1, RELEASE, {}, SERVICES),
        ],
    ),
    Topology(
        "one balancer, 3 instances, Redis + Sentinel, one PostgreSQL",
        [
            Component("balancer lost", 1, 1, LONE_MACHINE, {}, SERVICES),
            Component("balancer rebooted", 1, 1, REBOOT, {}, SERVICES),
            _pair("instances, 2 of 3 carry the load", 3, 2, {CHECKS: INSTANCE}, SERVICES),
            *_ROLLING,
            _pair("Redis, master and replica", 2, 1, {CHECKS: NOTHING, EXACT: SENTINEL}, [EXACT]),
            Component("PostgreSQL lost", 1, 1, LONE_MACHINE, {CHECKS: NOTHING}, [CHANGES]),
        ],
    ),
    Topology(
        "two balancers, 3 instances, Redis Cluster of 3 + 3, PostgreSQL under pg_auto_failover",
        [
            _pair("balancers", 2, 1, {CHECKS: BALANCER, EXACT: BALANCER}, [CHECKS, EXACT]),
            _pair("instances, 2 of 3 carry the load", 3, 2, {CHECKS: INSTANCE}, SERVICES),
            *_ROLLING,
            *[_pair(f"Redis shard {shard}", 2, 1, {CHECKS: NOTHING, EXACT: CLUSTER}, [EXACT]) for shard in (1, 2, 3)],
            _pair("PostgreSQL, 2 of 3 for changes", 3, 2, {CHECKS: NOTHING, CHANGES: POSTGRES}, [CHANGES]),
            _pair("PostgreSQL's monitor and primary at once", 2, 1, {}, [CHANGES]),
        ],
    ),
]


def holds_until(holds: Callable[[float], bool], most: float = 1e6) -> float:
    """The largest factor for which something holds; it holds for all smaller ones.

    Args:
        holds: whether it does for a factor.
        most: where to stop.
    """
    low, high = 0.0, most
    if holds(high):
        return most
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def table(topology: Topology) -> str:
    """The lines that are printed."""
    lines = [f"{topology.name}", f"  {'minutes a year without':<44}" + "".join(f"{service:>14}" for service in SERVICES)]
    for each in topology.components:
        lines.append(f"  {each.name:<44}" + "".join(f"{each.minutes(service):>14.3f}" for service in SERVICES))
    lines.append(f"  {'all':<44}" + "".join(f"{topology.minutes(service):>14.3f}" for service in SERVICES))
    shares = (f"{100 * (1 - topology.minutes(service) / MINUTES_A_YEAR):>12.5f} %" for service in SERVICES)
    lines.append(f"  {'available':<44}" + "".join(shares))
    verdicts = ("holds" if topology.minutes(service) <= BUDGET_MIN else "DOES NOT" for service in SERVICES)
    lines.append(f"  {f'99.99 %: at most {BUDGET_MIN:.2f} minutes':<44}" + "".join(f"{verdict:>14}" for verdict in verdicts))
    if topology.minutes(CHECKS) <= BUDGET_MIN:
        failures = holds_until(lambda factor: topology.scaled(failures=factor).minutes(CHECKS) <= BUDGET_MIN, 1000)
        repair = holds_until(lambda factor: topology.scaled(repair=factor).minutes(CHECKS) <= BUDGET_MIN, 1000)
        share = (BUDGET_MIN - topology.minutes(CHECKS)) / topology.common_cause_min()
        lines += [
            f"  checks hold until everything fails {failures:.0f} times as often, or repairs take {repair:.0f} times as long,",
            f"  or {100 * share:.1f} % of the lost machines take all of their kind with them",
        ]
    return "\n".join(lines)


def main() -> None:
    """Print inputs and results."""
    print("Assumed:")
    for what, rate in [
        ("machine", MACHINE),
        ("lone machine", LONE_MACHINE),
        ("reboot", REBOOT),
        ("crash", CRASH),
        ("release", RELEASE),
    ]:
        print(f"  {what:<14}{rate.a_year:>4g} a year, {rate.repair_min:>6g} min   {rate.source}")
    print("Measured:")
    for what, measured in [
        ("instance", INSTANCE),
        ("balancer", BALANCER),
        ("Redis Cluster", CLUSTER),
        ("Sentinel", SENTINEL),
        ("PostgreSQL", POSTGRES),
    ]:
        print(f"  {what:<14}{measured.seconds:>6g} s   {measured.source}")
    for topology in TOPOLOGIES:
        print(f"\n{table(topology)}")


if __name__ == "__main__":
    main()
