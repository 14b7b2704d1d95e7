"""Who was blocked how often in which minute: counted in memory as it happens, written to the database every few seconds.

A check waits for none of it. What is held is bounded: subjects by a Space-Saving summary, rules and minutes by a number. Sums by
rule and by tier are exact whatever comes; a subject's count is a lower bound where more subjects were blocked than fit.

While the database fails, what was counted waits in memory within the same bounds. A violation may be lost with the database, and
is then counted as dropped; none is counted twice.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any, Final, TypeVar

from tidegate.background import SUPERVISOR, stop
from tidegate.catalog.sql.database import Database
from tidegate.decision import Observation
from tidegate.violations.space_saving import SpaceSaving
from tidegate.violations.storage import (
    MAX_ROWS,
    OTHERS,
    ViolationKey,
    WriteUnconfirmed,
    keep_violations,
    write_violations,
)

logger = logging.getLogger(__name__)

MAX_ENTRIES: Final = 10_000
MAX_SUMS: Final = 10_000
"""Most sums of a rule in a minute: of 100 rules that block all the time those of 100 minutes."""
FLUSH_S: Final = 1.5
"""How long the end of the process waits for the database: less than a worker may take to end."""

_MINUTE_US: Final = 60_000_000
_KEEP_EVERY_S: Final = 3600.0
_KEEP_AGAIN_S: Final = 60.0
_AGAIN_S: Final = 0.1
_CANCEL_S: Final = 0.2
_JITTER: Final = 0.1
_BATCH_SIZE: Final = 500
"""So many rows are looked at before checks get their turn, about 0.5 ms."""

_T = TypeVar("_T")


class Interval:
    """What was blocked between two writes.

    Args:
        max_entries: most subjects, each in its minute and rule.

    Attributes:
        sums: by minute, tier and rule: checks blocked, and which of these it is, from 0.
        summary: by that number and the subject. A key of two is looked up in half the time of one of four.
    """

    __slots__ = ("summary", "sums")

    def __init__(self, max_entries: int) -> None:
        self.sums: dict[tuple[int, str, str], list[int]] = {}
        self.summary: SpaceSaving[tuple[int, str]] = SpaceSaving(max_entries)

    def rows(self) -> Iterator[tuple[ViolationKey, int]]:
        """What is to be written; nothing may be counted meanwhile.

        Yields:
            Keys, each once, and counts that add up to `sums`: of a subject what is sure, and the rest as that of `OTHERS`.
        """
        groups = list(self.sums)
        rest = [blocked for blocked, _ in self.sums.values()]
        for (place, subject), blocked in self.summary.guaranteed():
            rest[place] -= blocked
            yield (*groups[place], subject), blocked
        for group, blocked in zip(groups, rest, strict=True):
            if blocked:
                yield (*group, OTHERS), blocked


class Violations:
    """Counts blocked checks. One event loop.

    Args:
        max_entries: most subjects between two writes, each in its minute and rule; `SpaceSaving` says what holds beyond.

    Attributes:
        dropped: blocked checks that were not counted, because more than `MAX_SUMS` minutes and rules were.
    """

    def __init__(self, max_entries: int = MAX_ENTRIES) -> None:
        self.max_entries = max_entries
        self.dropped = 0
        self._interval = Interval(max_entries)

    def __len__(self) -> int:
        """Subjects counted since the last `take`, each in its minute and rule."""
        return len(self._interval.summary)

    def observe(self, seen: Observation) -> None:
        """Count a check if it was blocked. Costs 0.06 µs where it was not, else about 1 µs; see `bench/violations.py`."""
        decision = seen.decision
        if decision is None or decision.allowed:
            return
        limits, subject = seen.denied_by, seen.subject
        if limits is None or not subject:
            return  # nothing limits the check, so nothing blocked it
        at_us = decision.at_us
        tier, rule = limits.tier or "", limits.rule or ""
        group = (at_us - at_us % _MINUTE_US, tier, rule)
        interval = self._interval
        known = interval.sums.get(group)
        if known is None:
            if len(interval.sums) == MAX_SUMS:
                self.dropped += 1
                return
            known = interval.sums[group] = [0, len(interval.sums)]
        known[0] += 1
        interval.summary.add((known[1], subject))

    def take(self) -> Interval:
        """What was counted since the last time; counting begins anew. Takes the same time however much it is.

        Returns:
            The interval, which nothing is added to any more.
        """
        taken, self._interval = self._interval, Interval(self.max_entries)
        return taken


class ViolationWriter:
    """Writes what `Violations` counts, and keeps the table. One event loop.

    Where the database fails, rows wait for the next time, and add up: at most `max_entries` of subjects, beyond which those with
    the least counts go into the rows of others, and `MAX_SUMS` of others, beyond which they are dropped. Where it went away
    before it said whether a transaction was committed, the rows of that transaction are not written again but counted as dropped:
    they may be there.

    Args:
        flush_s: how often, s; a tenth more or less each time, so that instances do not write all at once.
        keep_days: how long violations are kept, days.

    Attributes:
        written: blocked checks that are in the database.
        failing: whether the database did not take the last rows.
    """

    def __init__(self, violations: Violations, database: Database, flush_s: float = 5.0, keep_days: int = 30) -> None:
        self.written = 0
        self.failing = False
        self._violations = violations
        self._database = database
        self._flush_s = flush_s
        self._keep_days = keep_days
        self._dropped = 0
        self._waiting: dict[ViolationKey, int] = {}
        self._sums_waiting = 0
        self._writing: asyncio.Task[None] | None = None
        self._keeping: asyncio.Task[bool] | None = None

    @property
    def dropped(self) -> int:
        """Blocked checks that are not in the database and never will be, or of which nobody knows."""
        return self._dropped + self._violations.dropped

    @property
    def pending(self) -> int:
        """Entries that are not written yet."""
        return len(self._waiting) + len(self._violations)

    async def run(self) -> None:
        """Write and keep the table until cancelled. What has been begun goes on until `flush` waits for it or gives it up."""
        keeping = SUPERVISOR.start("violations_retention", self._keep_for_ever)
        try:
            await self._write_for_ever()
        finally:
            await stop(keeping)

    async def flush(self, within_s: float = FLUSH_S) -> None:
        """Write everything, at the end of the process. What cannot be written in time is counted as dropped.

        Args:
            within_s: how long it may take, s; 0.2 s more where the database does not let go.
        """
        now = asyncio.get_running_loop().time
        deadline = now() + within_s
        begun: set[asyncio.Task[Any]] = set() if self._keeping is None else {self._keeping}
        while (self.pending or self._writing is not None) and now() < deadline:
            task = self._write_once()
            done, _ = await asyncio.wait({task}, timeout=deadline - now())
            if not done:
                begun.add(task)
            elif self.failing:
                await asyncio.sleep(min(_AGAIN_S, max(deadline - now(), 0)))
        for task in begun:
            task.cancel()
        if begun:
            # Not awaited to its end: a driver may wait for a frozen server before it gives up.
            await asyncio.wait(begun, timeout=_CANCEL_S)
        for key, blocked in self._violations.take().rows():
            self._add(key, blocked)
        lost = sum(self._waiting.values())
        if lost:
            self._dropped += lost
            logger.warning("%d blocked checks are not in the database and are lost with this process", lost)
        self._waiting.clear()
        self._sums_waiting = 0

    async def _write_for_ever(self) -> None:
        while True:
            await asyncio.sleep(_jittered(self._flush_s))
            # Who cancels this does not want half a transaction, and not to wait for a frozen server either.
            await asyncio.shield(self._write_once())

    async def _keep_for_ever(self) -> None:
        failing = False
        while True:
            self._keeping = asyncio.create_task(self._keep(failing))
            failing = await asyncio.shield(self._keeping)
            await asyncio.sleep(_jittered(_KEEP_AGAIN_S if failing else _KEEP_EVERY_S))

    async def _keep(self, failing: bool) -> bool:
        """Keep the table; returns whether that failed."""
        try:
            await keep_violations(self._database, self._keep_days)
        except Exception as error:  # noqa: BLE001 - whatever a driver throws must not end the writing of violations
            if not failing:
                logger.warning("the table of violations is not kept, trying again every minute: %s", error)
            return True
        return False

    def _write_once(self) -> asyncio.Task[None]:
        """The writing that is on its way, or a new one: there are never two."""
        if self._writing is None:
            self._writing = asyncio.create_task(self._write())
            self._writing.add_done_callback(self._written)
        return self._writing

    def _written(self, _: asyncio.Task[None]) -> None:
        self._writing = None

    async def _write(self) -> None:
        await self._collect()
        await self._fold()
        keys = list(self._waiting)
        for start in range(0, len(keys), MAX_ROWS):
            # In transactions of their own: few rows are locked at a time, and few are in doubt if the database goes away.
            rows = [(key, self._waiting[key]) for key in keys[start : start + MAX_ROWS]]
            try:
                await write_violations(self._database, rows)
            except WriteUnconfirmed as error:
                self._dropped += self._forget(rows)
                self._failed(error)
                return
            except Exception as error:  # noqa: BLE001 - whatever a driver throws must not end the writing of violations
                self._failed(error)
                return
            self.written += self._forget(rows)
            if self.failing:
                self.failing = False
                logger.info("violations are written again")

    async def _collect(self) -> None:
        """Take what was counted to what waits."""
        rows = self._violations.take().rows()
        try:
            async for key, blocked in _in_turns(rows):
                self._add(key, blocked)
        finally:
            # Where this was cancelled: what is not looked at yet must not be lost without being counted.
            for key, blocked in rows:
                self._add(key, blocked)

    def _add(self, key: ViolationKey, blocked: int) -> None:
        held = self._waiting.get(key)
        if held is not None:
            self._waiting[key] = held + blocked
        elif key[3] != OTHERS:
            self._waiting[key] = blocked
        elif self._sums_waiting < MAX_SUMS:
            self._sums_waiting += 1
            self._waiting[key] = blocked
        else:
            self._dropped += blocked

    async def _fold(self) -> None:
        """Of more subjects than may wait, take those with the least counts to the others."""
        excess = len(self._waiting) - self._sums_waiting - self._violations.max_entries
        if excess <= 0:
            return
        named = [(key, blocked) for key, blocked in self._waiting.items() if key[3] != OTHERS]
        by_count: Counter[int] = Counter()
        async for _, blocked in _in_turns(named):
            by_count[blocked] += 1
        for most in sorted(by_count):
            if by_count[most] >= excess:
                break
            excess -= by_count[most]
        # All with less than `most`, and of those with as much so many as are too many.
        async for key, blocked in _in_turns(named):
            if blocked < most or (blocked == most and excess > 0):
                excess -= blocked == most
                del self._waiting[key]
                self._add((*key[:3], OTHERS), blocked)

    def _forget(self, rows: Iterable[tuple[ViolationKey, int]]) -> int:
        """Rows that wait no more; returns what they add up to."""
        total = 0
        for key, blocked in rows:
            # `flush` may have given them up already.
            if self._waiting.pop(key, None) is not None:
                total += blocked
                self._sums_waiting -= key[3] == OTHERS
        return total

    def _failed(self, error: Exception) -> None:
        if not self.failing:
            logger.warning("violations are not written, and wait in memory: %s", error)
        self.failing = True


async def _in_turns(items: Iterable[_T]) -> AsyncIterator[_T]:
    """All items; after every few, checks get their turn."""
    for number, item in enumerate(items, 1):
        yield item
        if number % _BATCH_SIZE == 0:
            await asyncio.sleep(0)


def _jittered(seconds: float) -> float:
    return seconds * random.uniform(1 - _JITTER, 1 + _JITTER)
