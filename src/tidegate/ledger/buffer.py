"""What was counted and is not written yet, added up within bounds, and the batches that it is written in."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, TypeAlias, TypeVar

import msgspec

from tidegate.ledger.aggregate import MINUTE_US, Answer, Minute, add_units
from tidegate.policy.limits import LimitSet
from tidegate.time_slice import TimeSlice

DAY_US: Final = 86_400_000_000
HOUR_US: Final = 3_600_000_000
OTHERS: Final = ""
"""The subject of the row with the units of an hour and rule that are not counted under another subject."""
MAX_ROWS: Final = 500
"""Maximum number of rows of a batch: bounds the time that other writers wait."""
MAX_LEDGER: Final = 200_000
"""Maximum number of ledger rows that wait, about 60 MB; beyond it units are added to a row without customer and API key."""
MAX_RULES: Final = 50_000
"""Maximum number of rows of traffic by rule that wait; as many of latency."""

LedgerKey: TypeAlias = tuple[int, str, str, str, str]
"""Day (µs since the epoch), customer, API key, tier, rule; empty texts for none."""
RuleKey: TypeAlias = tuple[int, str, str]
"""Minute, tier, rule."""
SubjectKey: TypeAlias = tuple[int, str, str, str]
"""Hour, tier, rule, subject."""
LatencyKey: TypeAlias = tuple[int, int]
"""Minute, bucket."""

_K = TypeVar("_K")


class Batch(msgspec.Struct, frozen=True):
    """Rows that are added to the database together, once.

    Args:
        sequence: number of the batch among those of its process, from 1.
        ledger: keys and units admitted, blocked and over.
        rules: the same of traffic by rule.
        callers: the same of traffic by caller.
        latency: keys and numbers of checks.
    """

    sequence: int
    ledger: list[tuple[LedgerKey, list[int]]]
    rules: list[tuple[RuleKey, list[int]]]
    callers: list[tuple[SubjectKey, list[int]]]
    latency: list[tuple[LatencyKey, list[int]]]

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.ledger) + len(self.rules) + len(self.callers) + len(self.latency)

    @property
    def units(self) -> int:
        """Units admitted and blocked that it adds to the ledger."""
        return sum(units[0] + units[1] for _, units in self.ledger)


class Buffer:
    """Adds up what waits to be written. For use in one event loop.

    Args:
        max_callers: maximum number of subjects, each in its hour and rule, that are added at a time, and four times that wait.

    Attributes:
        unattributed: units that lost their customer and API key because more than `MAX_LEDGER` rows waited.
        dropped: rows of the traffic history that were dropped because more than `MAX_RULES` waited.
    """

    def __init__(self, max_callers: int) -> None:
        self.max_callers = max_callers
        self.unattributed = 0
        self.dropped = 0
        self._ledger: dict[LedgerKey, list[int]] = {}
        self._rules: dict[RuleKey, list[int]] = {}
        self._callers: dict[SubjectKey, list[int]] = {}
        self._latency: dict[LatencyKey, list[int]] = {}
        self._sequence = 0

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._ledger) + len(self._rules) + len(self._callers) + len(self._latency)

    @property
    def units(self) -> int:
        """Units admitted and blocked that wait for the ledger."""
        return sum(units[0] + units[1] for units in self._ledger.values())

    async def add(self, minutes: Sequence[Minute], latency: Sequence[int] = (), at_us: int = 0) -> None:
        """Add what was counted; yields to checks in between, and adds all of it even if it is cancelled.

        Args:
            minutes: that were taken.
            latency: checks by bucket.
            at_us: a time of the minute of `latency`.
        """
        callers = _TopCallers(self.max_callers)
        steps = self._steps(minutes, callers)
        slice_ = TimeSlice()
        try:
            for _ in steps:
                if slice_.over:
                    await slice_.pause()
        finally:
            for _ in steps:
                pass
            self._add_callers(callers)
            self._add_latency(latency, at_us - at_us % MINUTE_US)

    def next_batch(self) -> Batch:
        """Remove rows from the buffer; never more than `MAX_ROWS`."""
        self._sequence += 1
        ledger = _take(self._ledger, MAX_ROWS)
        left = MAX_ROWS - len(ledger)
        rules = _take(self._rules, left)
        left -= len(rules)
        callers = _take(self._callers, left)
        left -= len(callers)
        return Batch(self._sequence, ledger, rules, callers, _take(self._latency, left))

    def _steps(self, minutes: Sequence[Minute], callers: _TopCallers) -> Iterator[None]:
        """A generator: one step for each row."""
        for minute in minutes:
            minute_us = minute.start_us
            hour_us = minute_us - minute_us % HOUR_US
            for (answer, subject, key_id, customer), units in minute.rows():
                tier, rule = _names(answer)
                self._add_units(minute_us, customer, key_id, tier, rule, units)
                # Nothing counted a key without limits.
                callers.add((hour_us, tier, rule, subject or (f"k:{key_id}" if key_id else OTHERS)), units)
                yield
            for (answer, key_id, customer), sums in minute.sums.items():
                tier, rule = _names(answer)
                self._add_units(minute_us, customer, key_id, tier, rule, sums)
                callers.add((hour_us, tier, rule, OTHERS), sums)
                yield

    def _add_units(self, minute_us: int, customer: str, key_id: str, tier: str, rule: str, units: Sequence[int]) -> None:
        row: LedgerKey = (minute_us - minute_us % DAY_US, customer, key_id, tier, rule)
        stored = self._ledger.get(row)
        if stored is None:
            if len(self._ledger) >= MAX_LEDGER and (customer or key_id):
                self.unattributed += units[0] + units[1]
                row = (row[0], "", "", tier, rule)
            stored = self._ledger.setdefault(row, [0, 0, 0])
        add_units(stored, units)
        at: RuleKey = (minute_us, tier, rule)
        if at in self._rules or len(self._rules) < MAX_RULES:
            add_units(self._rules.setdefault(at, [0, 0, 0]), units)
        else:
            self.dropped += 1

    def _add_callers(self, callers: _TopCallers) -> None:
        for (hour_us, tier, rule, subject), units in callers.rows():
            row: SubjectKey = (hour_us, tier, rule, subject)
            if row not in self._callers and len(self._callers) >= 4 * self.max_callers:
                row = (hour_us, tier, rule, OTHERS)
                if row not in self._callers and len(self._callers) >= 4 * self.max_callers + MAX_RULES:
                    self.dropped += 1
                    continue
            add_units(self._callers.setdefault(row, [0, 0, 0]), units)

    def _add_latency(self, latency: Sequence[int], minute_us: int) -> None:
        for bucket, checks in enumerate(latency):
            at: LatencyKey = (minute_us, bucket)
            if checks and (at in self._latency or len(self._latency) < MAX_RULES):
                self._latency.setdefault(at, [0])[0] += checks
            elif checks:
                self.dropped += 1


class _TopCallers:
    """Units by hour, rule and subject of one interval; all but those with the most units are added to `OTHERS`."""

    def __init__(self, max_callers: int) -> None:
        self._max_callers = max_callers
        self._units: dict[SubjectKey, list[int]] = {}

    def add(self, key: SubjectKey, units: Sequence[int]) -> None:
        add_units(self._units.setdefault(key, [0, 0, 0]), units)

    def rows(self) -> Iterable[tuple[SubjectKey, list[int]]]:
        if len(self._units) <= self._max_callers:
            return self._units.items()
        named = heapq.nlargest(
            self._max_callers, (each for each in self._units.items() if each[0][3] != OTHERS), key=lambda each: sum(each[1][:2])
        )
        kept = dict(named)
        for key, units in self._units.items():
            if key[3] == OTHERS or key not in kept:
                add_units(kept.setdefault((*key[:3], OTHERS), [0, 0, 0]), units)
        return kept.items()


def _names(answer: Answer) -> tuple[str, str]:
    """Tier and rule."""
    if isinstance(answer, LimitSet):
        return answer.tier or "", answer.rule or ""
    if isinstance(answer, tuple):
        return answer
    return answer or "", ""


def _take(rows: dict[_K, list[int]], count: int) -> list[tuple[_K, list[int]]]:
    """Remove rows, the newest first: finding the oldest takes longer the more were removed before."""
    return [rows.popitem() for _ in range(min(count, len(rows)))]
