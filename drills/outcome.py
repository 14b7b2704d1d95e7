"""What a drill found: its table, and whether its goals were met."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from drills.check_load import TIGHT, Seen
from drills.exactness import limits_of_policy, prove
from drills.figures import admitted_of, asked_of, between, longest_gap_s, over_admitted, percentile_ms, under_admitted
from drills.running import WARM_S, Books, Look, Mark, Running
from tidegate.policy.toml_reader import load_policy


class Goal(NamedTuple):
    """One thing that had to hold.

    Args:
        met: whether it held.
        timed: whether it depends on how fast the machine is.
    """

    what: str
    measured: str
    wanted: str
    met: bool
    timed: bool = False

    def line(self, timed: bool = True) -> str:
        """As it is printed.

        Args:
            timed: whether goals are judged that depend on how fast the machine is.
        """
        verdict = "    " if self.timed and not timed else "pass" if self.met else "FAIL"
        return f"  {verdict}  {self.what:<46} {self.measured:>10}   goal {self.wanted}"


class Units(NamedTuple):
    """Of the tight rule, all subjects together.

    Args:
        limit: of one subject.
        limits: of all subjects together.
        admitted: units.
        over: above the limits.
        excess: the same as the checker of exactness proves it, from all answers.
        store_excess: of what Redis alone admitted.
        under: asked for, room for, not admitted.
    """

    limit: int
    limits: int
    admitted: int
    over: int
    excess: int
    store_excess: int
    under: int


class ChargeOutcome(NamedTuple):
    """A drill that is over.

    Args:
        name: of the drill.
        seen: all checks.
        event_s: when the bad thing happened, s since the start of the load.
        ended_s: when the load ended.
        units: of the tight rule.
        books: of the loose rule; None where Redis was not asked.
        goals: what had to hold.
        notes: further lines, name and text.
        marks: what happened.
        looks: what the instances said.
    """

    name: str
    seen: Sequence[Seen]
    event_s: float
    over_s: float
    ended_s: float
    units: Units
    books: Books | None
    goals: Sequence[Goal]
    notes: Sequence[tuple[str, str]]
    marks: Sequence[Mark]
    looks: Sequence[Look]

    @property
    def failures(self) -> Counter[str]:
        """Checks without a decision, by reason."""
        return Counter(each.failure for each in self.seen if each.failure is not None)

    def met(self, timed: bool = True) -> bool:
        """Whether all goals were met.

        Args:
            timed: whether those count that depend on how fast the machine is.
        """
        return all(goal.met for goal in self.goals if timed or not goal.timed)

    def spans(self) -> list[tuple[str, float, float]]:
        """Before, during and after: name, from and until, s since the start."""
        return [
            ("before", WARM_S, self.event_s),
            ("during", self.event_s, self.over_s),
            ("after", self.over_s, self.ended_s + 1),
        ]

    def table(self, timed: bool = True) -> str:
        """The lines that are printed.

        Args:
            timed: whether goals are judged that depend on how fast the machine is.
        """
        # What a busy machine lets miss its deadline.
        strays = sum(each.degraded and not self.event_s <= each.end_s <= self.over_s + 0.001 for each in self.seen)
        lines: list[tuple[str, str]] = [
            ("checks asked", f"{len(self.seen):,}"),
            ("client errors", f"{sum(self.failures.values()):,}  {dict(self.failures) or ''}".rstrip()),
            ("decided without Redis", f"{sum(each.degraded for each in self.seen):,}, {strays:,} of them before or after"),
            *_decided(self.looks),
            ("longest time without an answer", f"{longest_gap_s(self.seen, 0, self.ended_s):.2f} s"),
        ]
        for name, since_s, until_s in self.spans():
            span = between(self.seen, since_s, until_s)
            lines.append((f"p50, p99 {name}", f"{percentile_ms(span, 0.5):.1f}, {percentile_ms(span, 0.99):.1f} ms"))
        units = self.units
        share = f" ({100 * units.over / units.limits:.0f} % of all limits)" if units.over else ""
        lines += [
            (
                "over-admitted",
                f"{units.over:,} units{share}; by the checker {units.excess:,}, of Redis alone {units.store_excess:,}",
            ),
            ("under-admitted", f"{units.under:,} units"),
        ]
        if self.books is not None:
            lines += [
                ("admitted, not counted", f"{self.books.uncounted:,} of {self.books.admitted:,} units"),
                ("counted, not admitted", f"{self.books.counted_twice:,} units"),
                ("counters still owed at the end", f"{self.books.owed:,}"),
            ]
        lines += self.notes
        text = [f"  {name:<34} {value}" for name, value in lines]
        return "\n".join(text + [goal.line(timed) for goal in self.goals])


def _decided(looks: Sequence[Look]) -> list[tuple[str, str]]:
    """What the instances said at the end of how checks were decided."""
    if not looks:
        return []
    last = looks[-1]
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(last.fallbacks.items()) if count)
    return [("decided from leases", f"{last.leased:,}"), ("reasons of decisions without Redis", reasons or "none")]


def units_of(running: Running, policy_file: Path, limit: int) -> Units:
    """Hold what the tight rule admitted against its limit, of which no window ends during the drill.

    Args:
        running: whose load has ended.
        policy_file: that was active.
        limit: of each subject.
    """
    load = running.load
    admitted = admitted_of(load.seen, TIGHT)
    reports = prove(load.answers, limits_of_policy(load_policy(policy_file)))
    return Units(
        limit,
        limit * len(load.ips),
        sum(admitted.values()),
        over_admitted(admitted, limit),
        sum(each.excess_units for each in reports),
        sum(each.store_excess_units for each in reports),
        under_admitted(asked_of(load.seen, TIGHT), admitted, limit),
    )


def no_errors(seen: Iterable[Seen]) -> Goal:
    """That each check was decided.

    Args:
        seen: all checks.
    """
    failed = sum(each.failure is not None for each in seen)
    return Goal("client errors", f"{failed}", "0", failed == 0)


def at_most(what: str, measured: float | None, most: float, unit: str) -> Goal:
    """That something stays below a bound.

    Args:
        measured: None where it did not end before the drill did.
        most: the bound, which itself is too much.
        unit: of both.
    """
    if measured is None:
        return Goal(what, "not at all", f"< {most:.3g} {unit}", False)
    return Goal(what, f"{measured:.1f} {unit}", f"< {most:.3g} {unit}", measured < most, timed=True)


def nothing_above(units: Units) -> list[Goal]:
    """That no limit was exceeded, where no server is away.

    Args:
        units: of the tight rule.

    Returns:
        Two goals: of what Redis admitted, which holds always; and of all, which a machine so busy that checks meet their deadline
        does not keep.
    """
    return [
        Goal("over-admitted by Redis, units", f"{units.store_excess}", "0", units.store_excess == 0),
        Goal("over-admitted, units", f"{units.excess}", "0", units.excess == 0, timed=True),
    ]


def over_admission_within_limits(units: Units, limits: int | None = None) -> Goal:
    """That an outage admitted no more than each limit once more.

    Args:
        units: of the tight rule.
        limits: of the subjects that the outage met, all together; of all subjects where not given.
    """
    most = units.limits if limits is None else limits
    return Goal("over-admitted, units", f"{units.over}", f"≤ {most}, the limits once", units.over <= most)
