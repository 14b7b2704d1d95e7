"""What a drill found: figures of its own, and goals that were met or missed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from drills.check_load import Seen
from drills.outcome import Goal
from drills.running import Mark


class Findings(NamedTuple):
    """A drill that is over.

    Args:
        figures: name and text of each.
        goals: what had to hold.
        seen: the checks, for the picture.
        marks: what happened.
    """

    figures: Sequence[tuple[str, str]]
    goals: Sequence[Goal]
    seen: Sequence[Seen] = ()
    marks: Sequence[Mark] = ()

    def met(self, timed: bool = True) -> bool:
        """Whether all goals were met.

        Args:
            timed: whether those count that depend on how fast the machine is.
        """
        return all(goal.met for goal in self.goals if timed or not goal.timed)

    def table(self, timed: bool = True) -> str:
        """The lines that are printed.

        Args:
            timed: whether goals are judged that depend on how fast the machine is.
        """
        lines = [f"  {name:<52} {value}" for name, value in self.figures]
        return "\n".join(lines + [goal.line(timed) for goal in self.goals])


def none_of(what: str, count: int, timed: bool = False) -> Goal:
    """That something never happened.

    Args:
        count: how often it did.
        timed: whether it depends on how fast the machine is.
    """
    return Goal(what, f"{count:,}", "0", count == 0, timed)
