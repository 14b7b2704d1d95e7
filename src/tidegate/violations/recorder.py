"""Counts blocked checks per subject, rule and minute in memory, and writes the counts to the database every few seconds.

No check waits for this. Memory is bounded: subjects by a Space-Saving summary, rules and minutes by `MAX_SUMS`. Sums by rule and
tier are always exact; a subject's count is a lower bound if more subjects were blocked than fit.

While the database fails, counts are buffered within the same bounds. Counts that may have been lost with the database are counted
as dropped; none is written twice.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Final, TypeVar

from tidegate.catalog.sql.database import Database
from tidegate.catalog.sql.partitions import PartitionedTable
from tidegate.observation import Observation
from tidegate.periodic_writer import PeriodicWriter
from tidegate.violations.space_saving import SpaceSaving
from tidegate.violations.storage import (
    MAX_ROWS,
    OTHERS,
    TABLE,
    ViolationKey,
    WriteUnconfirmed,
    maintain_table,
    write_violations,
)

logger = logging.getLogger(__name__)

MAX_ENTRIES: Final = 10_000
MAX_SUMS: Final = 10_000
"""Maximum number of sums per rule and minute: enough for 100 rules that block in each of 100 minutes."""
_MINUTE_US: Final = 60_000_000
_BATCH_SIZE: Final = 500
"""Number of rows processed before yielding to checks, about 0.5 ms."""

_T = TypeVar("_T")


class Interval:
    """Checks blocked between two writes.

    Args:
        max_entries: maximum number of subjects, each counted per minute and rule.

    Attributes:
        sums: by minute, tier and rule: the number of blocked checks, and the index of the group, from 0.
        summary: counts by index of the group and subject; look-ups of these keys take half the time of keys with four parts.
    """

    __slots__ = ("summary", "sums")

    def __init__(self, max_entries: int) -> None:
        self.sums: dict[tuple[int, str, str], list[int]] = {}
        self.summary: SpaceSaving[tuple[int, str]] = SpaceSaving(max_entries)

    def rows(self) -> Iterator[tuple[ViolationKey, int]]:
        """The rows to write; nothing may be counted during the iteration.

        Yields:
            Keys, each once, and counts that add up to `sums`: the guaranteed count of each subject, and the rest for `OTHERS`.
        """
        groups = list(self.sums)
        rest = [blocked for blocked, _ in self.sums.values()]
        for (index, subject), blocked in self.summary.guaranteed():
            rest[index] -= blocked
            yield (*groups[index], subject), blocked
        for group, blocked in zip(groups, rest, strict=True):
            if blocked:
                yield (*group, OTHERS), blocked


class Violations:
    """Counts blocked checks. For use in one event loop.

    Args:
        max_entries: maximum number of subjects between two writes, each counted per minute and rule; beyond it `SpaceSaving`
            approximates.

        shadow: counts the checks that shadow rules would have blocked; None where these are not counted.

    Attributes:
        dropped: blocked checks not counted because there were more than `MAX_SUMS` minutes and rules.
    """

    def __init__(self, max_entries: int = MAX_ENTRIES, shadow: Violations | None = None) -> None:
        self.max_entries = max_entries
        self._shadow = shadow
        self.dropped = 0
        self._interval = Interval(max_entries)

    def __len__(self) -> int:
        """Number of subjects counted since the last `take`, each per minute and rule."""
        return len(self._interval.summary)

    def observe(self, observation: Observation) -> None:
        """Count a check if it was blocked. Costs 0.06 µs if it was not, otherwise about 1 µs; see `bench/violations.py`."""
        decision = observation.decision
        if observation.shadow_denials and self._shadow is not None:
            for denial in observation.shadow_denials:
                self._shadow.add(denial.at_us, denial.tier, denial.rule, denial.subject)
        if decision is None or decision.allowed:
            return
        limits, subject = observation.denied_by, observation.subject
        if limits is None or not subject:
            return  # no rule applies, so none blocked it
        self.add(decision.at_us, limits.tier or "", limits.rule or "", subject)

    def add(self, at_us: int, tier: str, rule: str, subject: str) -> None:
        """Count a check that was blocked.

        Args:
            at_us: when, µs since the epoch.
            rule: that blocked it; empty for the tier's own limits.
        """
        group = (at_us - at_us % _MINUTE_US, tier, rule)
        interval = self._interval
        entry = interval.sums.get(group)
        if entry is None:
            if len(interval.sums) == MAX_SUMS:
                self.dropped += 1
                return
            entry = interval.sums[group] = [0, len(interval.sums)]
        entry[0] += 1
        interval.summary.add((entry[1], subject))

    def take(self) -> Interval:
        """The counts since the last call; counting starts again from zero. Takes constant time."""
        finished, self._interval = self._interval, Interval(self.max_entries)
        return finished


class ViolationWriter(PeriodicWriter):
    """Writes the counts of `Violations`, and maintains the table. For use in one event loop.

    If the database fails, rows are buffered and added up: at threshold `max_entries` with a subject, beyond which those with the
    lowest counts are added to the rows of `OTHERS`, and `MAX_SUMS` of these, beyond which they are dropped. If the connection is
    lost during a commit, the rows of that transaction are counted as dropped and not written again: they may have been committed.

    Args:
        flush_s: write interval, s, varied by ±10 % so that instances do not write at the same time.
        keep_days: retention of violations, days.
        table: where they are written.

    Attributes:
        written: blocked checks written to the database.
        failing: whether the last write failed.
    """

    def __init__(
        self,
        violations: Violations,
        database: Database,
        flush_s: float = 5.0,
        keep_days: int = 30,
        table: PartitionedTable = TABLE,
    ) -> None:
        super().__init__(flush_s, f"{table.kind.replace(' ', '_')}_retention", f"the {table.kind} table")
        self._table = table
        self.written = 0
        self._violations = violations
        self._database = database
        self._keep_days = keep_days
        self._dropped = 0
        self._buffer: dict[ViolationKey, int] = {}
        self._buffered_sums = 0

    @property
    def dropped(self) -> int:
        """Blocked checks that were not written to the database, or possibly not."""
        return self._dropped + self._violations.dropped

    @property
    def pending(self) -> int:
        """Number of entries not written yet."""
        return len(self._buffer) + len(self._violations)

    async def _give_up(self) -> None:
        for key, blocked in self._violations.take().rows():
            self._add(key, blocked)
        lost = sum(self._buffer.values())
        if lost:
            self._dropped += lost
            logger.warning("%d blocked checks are not in the database and are lost with this process", lost)
        self._buffer.clear()
        self._buffered_sums = 0

    async def _maintain(self) -> None:
        await maintain_table(self._database, self._keep_days, None, self._table)

    async def _write(self) -> None:
        await self._collect()
        await self._fold()
        keys = list(self._buffer)
        for start in range(0, len(keys), MAX_ROWS):
            # In separate transactions: few rows are locked at a time, and few are unconfirmed if the connection is lost.
            rows = [(key, self._buffer[key]) for key in keys[start : start + MAX_ROWS]]
            try:
                await write_violations(self._database, rows, self._table)
            except WriteUnconfirmed as error:
                self._dropped += self._remove(rows)
                self._failed(error)
                return
            except Exception as error:  # noqa: BLE001 - any error of a driver: writing must continue
                self._failed(error)
                return
            self.written += self._remove(rows)
            if self.failing:
                self.failing = False
                logger.info("writing %s works again", self._table.kind)

    async def _collect(self) -> None:
        """Move counts into the buffer."""
        rows = self._violations.take().rows()
        try:
            async for key, blocked in _yielding(rows):
                self._add(key, blocked)
        finally:
            # If this was cancelled: the remaining rows must not be lost.
            for key, blocked in rows:
                self._add(key, blocked)

    def _add(self, key: ViolationKey, blocked: int) -> None:
        buffered = self._buffer.get(key)
        if buffered is not None:
            self._buffer[key] = buffered + blocked
        elif key[3] != OTHERS:
            self._buffer[key] = blocked
        elif self._buffered_sums < MAX_SUMS:
            self._buffered_sums += 1
            self._buffer[key] = blocked
        else:
            self._dropped += blocked

    async def _fold(self) -> None:
        """If too many subjects are buffered, add those with the lowest counts to `OTHERS`."""
        excess = len(self._buffer) - self._buffered_sums - self._violations.max_entries
        if excess <= 0:
            return
        named = [(key, blocked) for key, blocked in self._buffer.items() if key[3] != OTHERS]
        by_count: Counter[int] = Counter()
        async for _, blocked in _yielding(named):
            by_count[blocked] += 1
        for threshold in sorted(by_count):
            if by_count[threshold] >= excess:
                break
            excess -= by_count[threshold]
        # All below `threshold`, and of those at `threshold` as many as exceed the limit.
        async for key, blocked in _yielding(named):
            if blocked < threshold or (blocked == threshold and excess > 0):
                excess -= blocked == threshold
                del self._buffer[key]
                self._add((*key[:3], OTHERS), blocked)

    def _remove(self, rows: Iterable[tuple[ViolationKey, int]]) -> int:
        """Remove rows from the buffer; returns the sum of their counts."""
        total = 0
        for key, blocked in rows:
            # `flush` may have dropped them already.
            if self._buffer.pop(key, None) is not None:
                total += blocked
                self._buffered_sums -= key[3] == OTHERS
        return total

    def _failed(self, error: Exception) -> None:
        if not self.failing:
            logger.warning("writing %s failed, they are buffered in memory: %s", self._table.kind, error)
        self.failing = True


async def _yielding(items: Iterable[_T]) -> AsyncIterator[_T]:
    """All items, yielding to checks after every batch."""
    for number, item in enumerate(items, 1):
        yield item
        if number % _BATCH_SIZE == 0:
            await asyncio.sleep(0)
