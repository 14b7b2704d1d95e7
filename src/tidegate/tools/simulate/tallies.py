"""Counts of a simulation, in memory that does not grow with the log."""

from __future__ import annotations

from typing import Final

from tidegate.timestamps import US_PER_S

MINUTE_US: Final = 60_000_000
MAX_SERIES: Final = 2_000
MAX_TOP: Final = 10_000
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
        tier: name of its tier.
        rule: its name, `(tier)` or `(no rule)`.
        endpoint: its pattern; empty without a rule.
        mode: enforce, shadow or none.
    """

    __slots__ = ("allowed", "blocked", "endpoint", "mode", "rule", "tier")

    def __init__(self, tier: str, rule: str, endpoint: str, mode: str) -> None:
        self.tier = tier
        self.rule = rule
        self.endpoint = endpoint
        self.mode = mode
        self.allowed = 0
        self.blocked = 0


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


class TopBlocked:
    """The subjects blocked most, in bounded memory.

    Exact up to 10,000 pairs of subject and rule that were blocked at all. Beyond that as in the space-saving sketch (Metwally,
    Agrawal, El Abbadi 2005), only that the half blocked least is dropped at once: a newcomer then starts from the highest count
    that was dropped, `floor`. So a count is never too low, and too high by at most `floor`.

    Args:
        max_entries: maximum number of pairs, 2 or more.
    """

    def __init__(self, max_entries: int = MAX_TOP) -> None:
        self.floor = 0
        self.counts: dict[tuple[str, str], int] = {}
        self._max_entries = max_entries

    def add(self, subject: str, rule: str) -> None:
        """Count one blocked request.

        Args:
            subject: who was blocked.
            rule: by which rule.
        """
        entry = (subject, rule)
        count = self.counts.get(entry)
        if count is None and len(self.counts) >= self._max_entries:
            self._shed()
        self.counts[entry] = (count or self.floor) + 1

    def _shed(self) -> None:
        ordered = sorted(self.counts.items(), key=lambda item: item[1], reverse=True)
        self.floor = ordered[len(ordered) // 2][1]
        self.counts = dict(ordered[: len(ordered) // 2])

    def top(self, count: int) -> list[tuple[str, str, int]]:
        """The subjects blocked most.

        Args:
            count: maximum number of entries.

        Returns:
            Subject, rule and count, the highest first; equal counts by name.
        """
        ordered = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        return [(subject, rule, count) for (subject, rule), count in ordered[:count]]
