"""Counts of a simulation, in memory that does not grow with the log."""

from __future__ import annotations

from typing import Final

from tidegate.timestamps import US_PER_S

MINUTE_US: Final = 60_000_000
MAX_SERIES: Final = 2_000
MAX_TOP: Final = 10_000
"""Pairs of subject and rule that are counted to find those blocked most."""
_STEPS_S: Final = (60, 300, 900, 3_600, 21_600, 86_400)


def coarser(step_s: int) -> int:
    """The next longer step of a series: each holds whole ones of the last.

    Args:
        step_s: 60, or what this function gave, s.

    Returns:
        Up to a day 5 and 15 minutes, 1 and 6 hours; then twice as long each time, s.
    """
    return next((longer for longer in _STEPS_S if longer > step_s), 2 * step_s)


class RuleTally:
    """Requests that one rule decided.

    Args:
        rule: its name, `(tier)` or `(no rule)`.
        endpoint: its pattern; empty without a rule.
        mode: enforce, shadow or none.
    """

    __slots__ = (
        "allowed",
        "allowed_units",
        "blocked",
        "blocked_in_progress",
        "blocked_units",
        "endpoint",
        "mode",
        "rule",
        "tier",
    )

    def __init__(self, tier: str, rule: str, endpoint: str, mode: str) -> None:
        self.tier = tier
        self.rule = rule
        self.endpoint = endpoint
        self.mode = mode
        self.allowed = self.allowed_units = 0
        self.blocked = self.blocked_units = 0
        self.blocked_in_progress = 0

    def add(self, allowed: bool, cost: int) -> None:
        """Count one request.

        Args:
            cost: its units.
        """
        if allowed:
            self.allowed += 1
            self.allowed_units += cost
        else:
            self.blocked += 1
            self.blocked_units += cost


class Series:
    """Allowed and blocked over time, in at most 2,000 steps: when there are more, the steps become longer."""

    def __init__(self) -> None:
        self.step_s = 60
        self.steps: dict[int, list[int]] = {}

    def add(self, at_us: int, blocked: bool) -> None:
        """Count one request.

        Args:
            at_us: µs since the epoch.
            blocked: whether it was blocked.
        """
        step = self.steps.get(at_us // (self.step_s * US_PER_S))
        if step is None:
            step = self._new(at_us)
        step[blocked] += 1

    def _new(self, at_us: int) -> list[int]:
        while len(self.steps) >= MAX_SERIES:
            longer_s = coarser(self.step_s)
            merged: dict[int, list[int]] = {}
            for number, (allowed, blocked) in self.steps.items():
                step = merged.setdefault(number * self.step_s // longer_s, [0, 0])
                step[0] += allowed
                step[1] += blocked
            self.steps, self.step_s = merged, longer_s
        return self.steps.setdefault(at_us // (self.step_s * US_PER_S), [0, 0])
