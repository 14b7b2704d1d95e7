"""Holds of counters in memory. Expired ones give their units back before the next charge of any subject.

A hold costs about 110 bytes while it is open, and 90 for two minutes after it was settled: see `memory_hold_rows`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from heapq import heappop, heappush
from typing import Any, Final

from tidegate.algorithms import State
from tidegate.algorithms.holds import give_back, undrained_of
from tidegate.counters import Counters
from tidegate.counters.adjustments import of_adjustment
from tidegate.counters.crossings import CrossingWatch
from tidegate.counters.holds import (
    EXPIRED_KNOWN_US,
    MAX_HOLDS,
    SETTLED_KNOWN_US,
    HoldHandle,
    HoldSettlement,
    has_ended,
    not_found,
    too_many,
)
from tidegate.counters.memory_hold_rows import EXPIRED, MAX_STALE, OPEN, ROW_BITS, SETTLED, SETTLED_LATE, HeldCounter, HoldRows
from tidegate.counters.memory_storage import DEFAULT_MAX_SUBJECTS, CompiledLimits
from tidegate.counters.memory_units import NO_LEVELS, MemoryUnits
from tidegate.decision import Decision
from tidegate.errors import TooManyHolds
from tidegate.policy.limits import IN_PROGRESS, LimitSet

_EXPIRE_STEPS: Final = 1000
"""Holds that one charge lets expire at most: 2 to 4 ms."""
_FORGET_STEPS: Final = 16
_NO_BUCKET: Final[dict[str, int]] = {}
_NEVER: Final = 1 << 62


class MemoryHolds(MemoryUnits):
    """Counters with holds. `charge_all` is its subclass's.

    Attributes:
        max_holds: most open holds of one counter.
        expired_holds: holds that expired unsettled.
    """

    max_holds: int = MAX_HOLDS
    watch: CrossingWatch | None = None
    """Finds thresholds that charges cross; None for none."""

    def __init__(self, max_subjects: int = DEFAULT_MAX_SUBJECTS, clock: Callable[[], int] | None = None) -> None:
        super().__init__(max_subjects, clock)
        self._no_holds()

    def charge_all(self, counters: Counters, cost: int) -> Decision:
        """See `MemoryCounters`."""
        raise NotImplementedError

    def charge_one(self, limits: LimitSet, subject: str, cost: int) -> Decision:
        """See `MemoryCounters`."""
        raise NotImplementedError

    def _no_holds(self) -> None:
        self.expired_holds = 0
        self._open = 0
        self._rows = HoldRows()
        self._held: dict[str, HeldCounter] = {}
        # Heaps of marks: of the open holds, and of the ended ones by when they are forgotten.
        self._hold_ends: list[int] = []
        self._forget: list[int] = []
        self._next_hold_end = _NEVER

    def clear(self) -> None:
        """Reset all counters; holds are forgotten."""
        super().clear()
        self._no_holds()

    @property
    def open_holds(self) -> int:
        """Holds that are open."""
        return self._open

    def open_holds_of(self, limits: LimitSet, subject: str) -> int:
        """Holds of a counter that are open."""
        held = self._held.get(self._prepare(limits).token + subject)
        return held.open if held else 0

    def open_hold_now(
        self, counters: Counters, cost: int, ttl_us: int, rule: str | None = None
    ) -> tuple[Decision, HoldHandle | None]:
        """See `HoldingCounterStore.open_hold`."""
        now = self._clock()
        if now >= self._next_hold_end:
            self._expire_holds(now)
        if self._forget and self._forget[0] >> ROW_BITS <= now:
            self._forget_ended(now)
        if self._open >= self.max_subjects:
            raise TooManyHolds(
                f"{self.max_subjects} holds are open in this process, as many as counters.max_subjects: settle holds when their "
                "requests end"
            )
        limits, subject = counters[0]
        if len(counters) != 1 or limits.soft or limits.algorithm in IN_PROGRESS:
            return self._open_several(counters, cost, ttl_us, rule, now)
        compiled = self._compiled.get(limits) or self._prepare(limits)
        key = compiled.token + subject
        held = self._held.get(key)
        if held is not None and held.open >= self.max_holds:
            raise too_many(self.max_holds)
        if self.watch is None and limits.plain and compiled.only is not None:
            decision = self.charge_one(limits, subject, cost)
        else:
            decision = self.charge_all(counters, cost)
        if not decision.allowed:
            return decision, None
        level, levels = 0, None
        if cost and compiled.bucket:
            if compiled.only is not None:
                level = undrained_of(limits.algorithm, self._shards[hash(key) & 255][key])
            else:
                levels = self._levels(limits, key)
        if held is None:
            held = self._held[key] = HeldCounter(limits, subject, key)
        held.limits = limits
        held.open += 1
        held.rows += 1
        # As `_add_hold`; a call of each part would cost more than all this.
        rows = self._rows
        row = rows.add(decision.at_us, decision.at_us + ttl_us, cost, held, level)
        if levels is not None:
            rows.details[row] = [levels]
        self._open += 1
        mark = rows.mark[row]
        heappush(held.marks, mark)
        heappush(self._hold_ends, mark)
        if len(held.marks) > 2 * held.open + MAX_STALE:
            rows.drop_stale(held.marks)
        if len(self._hold_ends) > 2 * self._open + MAX_STALE:
            rows.drop_stale(self._hold_ends)
        self._next_hold_end = self._hold_ends[0] >> ROW_BITS
        return decision, HoldHandle(rows.id_of(row), cost, rule)

    def _open_several(
        self, counters: Counters, cost: int, ttl_us: int, rule: str | None, now: int
    ) -> tuple[Decision, HoldHandle | None]:
        """Several counters, soft ones, and slots."""
        keys = [(self._compiled.get(limits) or self._prepare(limits)).token + subject for limits, subject in counters]
        for key in keys:
            held = self._held.get(key)
            if held is not None and held.open >= self.max_holds:
                raise too_many(self.max_holds)
        if all(limits.plain for limits, _ in counters):
            return self._open_plain(counters, keys, cost, ttl_us, rule)
        slots = tuple(each for each in counters if each[0].algorithm in IN_PROGRESS)
        if slots and not cost:
            # A slot has to be free whatever the cost.
            decision = self.charge_all(slots, 1)
            if not decision.allowed:
                return decision, None
        before = [self._shards[hash(key) & 255].get(key) for key in keys]
        decision = self.charge_all(counters, cost)
        if not decision.allowed:
            return decision, None
        details: list[dict[str, int] | None] = []
        for (limits, _), key, old in zip(counters, keys, before, strict=True):
            # A soft limit that was reached was not charged.
            if cost and limits.soft and self._shards[hash(key) & 255].get(key) is old:
                details.append(None)
                continue
            details.append(self._levels(limits, key) if cost and limits.algorithm.is_bucket else _NO_BUCKET)
            if limits.algorithm in IN_PROGRESS:
                self._move_slots(limits, key, 1, now)
        at_us = decision.at_us
        if slots:
            peek = self.charge_all(counters, 0)
            decision = Decision(
                True, peek.binding, peek.remaining, peek.reset_after_us, 0, at_us, decision.limits, overage=decision.overage
            )
        kept = tuple(self._hold_counter(self._held.get(key), *counter, key) for counter, key in zip(counters, keys, strict=True))
        return decision, self._add_hold(at_us, ttl_us, cost, kept, rule, 0, details)

    def _open_plain(
        self,
        counters: Counters,
        keys: Sequence[str],
        cost: int,
        ttl_us: int,
        rule: str | None,
    ) -> tuple[Decision, HoldHandle | None]:
        """Several counters, none of them soft, of a quota or with slots."""
        decision = self.charge_all(counters, cost)
        if not decision.allowed:
            return decision, None
        details: list[dict[str, int] | None] = []
        kept = []
        for counter, key in zip(counters, keys, strict=True):
            limits = counter[0]
            details.append(self._levels(limits, key) if cost and limits.algorithm.is_bucket else _NO_BUCKET)
            kept.append(self._hold_counter(self._held.get(key), *counter, key))
        return decision, self._add_hold(decision.at_us, ttl_us, cost, tuple(kept), rule, 0, details)

    def settle_hold_now(self, handle: HoldHandle, cost: int, success: bool = False) -> HoldSettlement:
        """See `HoldingCounterStore.settle_hold`."""
        now = self._clock()
        if now >= self._next_hold_end:
            self._expire_holds(now)
        if self._forget and self._forget[0] >> ROW_BITS <= now:
            self._forget_ended(now)
        rows = self._rows
        row = rows.find(handle.id)
        if row is None:
            raise not_found()
        if rows.state[row] == OPEN:
            if rows.mark[row] >> ROW_BITS <= now:
                self._expire(row, now)
            else:
                settled = self._settle_plain(row, cost, now)
                if settled is not None:
                    return settled
        state = rows.state[row]
        if self.watch is not None and state in (OPEN, EXPIRED):
            counters = tuple((counter.limits, counter.subject) for counter, levels in self._charged(row) if levels is not None)
            with self._change_noted(counters, now):
                self._settle_row(row, state, handle.cost, cost, success, now)
        else:
            self._settle_row(row, state, handle.cost, cost, success, now)
        late = state in (EXPIRED, SETTLED_LATE)
        if state in (OPEN, EXPIRED):
            return self._settlement(row, cost, late=late)
        return self._settlement(row, rows.cost[row], late=late, repeated=True)

    def _settle_row(self, row: int, state: int, reserved: int, cost: int, success: bool, now: int) -> None:
        """Charge what a hold used, unless it was settled before."""
        if state == OPEN:
            self._settle_open(row, cost, success, now)
        elif state == EXPIRED:
            used = reserved if self._counts_failures(row) else cost
            for counter, levels in self._charged(row):
                if counter.limits.failures is not None:
                    self._settle_failures(counter.limits, counter.subject, cost, success, now)
                elif used and levels is not None:
                    self._charge_beyond(counter.limits, counter.subject, used, now)
            self._end(row, SETTLED_LATE, cost, now + EXPIRED_KNOWN_US)

    def _settle_plain(self, row: int, cost: int, now: int) -> HoldSettlement | None:
        """Settle an open hold in the common case: counters of one limit each, and no more used than reserved. None in others."""
        rows = self._rows
        counter, reserved = rows.counters[row], rows.cost[row]
        if cost > reserved:
            return None
        if type(counter) is not HeldCounter:
            return self._settle_several(row, counter, cost, now)
        if counter.reset:
            return None
        limits = counter.limits
        compiled = self._compiled.get(limits)
        if compiled is None or compiled.only is None or not limits.plain or compiled.other_layouts:
            return None
        shard = self._shards[hash(counter.key) & 255]
        state, limit = shard.get(counter.key), compiled.limit
        if not state:
            return None
        if cost < reserved:
            before = state
            state = shard[counter.key] = give_back(
                limits.algorithm, limit, state, now, reserved - cost, rows.at_us[row], rows.level[row]
            )
            if compiled.logs:
                self._log_entries += compiled.entries(state) - len(before[1])
        counter.open -= 1
        self._open -= 1
        self._end(row, SETTLED, cost, max(rows.mark[row] >> ROW_BITS, now + SETTLED_KNOWN_US))
        _, remaining, reset_us, _ = compiled.decide(limit, state, now, 0)
        return HoldSettlement(cost, False, limit.capacity, remaining, reset_us)

    def _settle_several(self, row: int, counters: tuple[HeldCounter, ...], cost: int, now: int) -> HoldSettlement | None:
        """As `_settle_plain`, for several counters."""
        rows = self._rows
        found: list[tuple[CompiledLimits, dict[str, Any], int]] = []
        for counter, levels in zip(counters, rows.details[row], strict=True):
            compiled = self._compiled.get(counter.limits)
            if compiled is None or compiled.only is None or not counter.limits.plain or compiled.other_layouts:
                return None
            shard = self._shards[hash(counter.key) & 255]
            if not shard.get(counter.key) or counter.reset or levels is None:
                return None
            found.append((compiled, shard, levels[compiled.limit.window_name] if levels else 0))
        unused, at_us = rows.cost[row] - cost, rows.at_us[row]
        least: HoldSettlement | None = None
        for counter, (compiled, shard, level) in zip(counters, found, strict=True):
            before: State = shard[counter.key]
            limit, state = compiled.limit, before
            if unused:
                state = shard[counter.key] = give_back(counter.limits.algorithm, limit, before, now, unused, at_us, level)
                if compiled.logs:
                    self._log_entries += compiled.entries(state) - compiled.entries(before)
            counter.open -= 1
            _, remaining, reset_us, _ = compiled.decide(limit, state, now, 0)
            if least is None or remaining < (least.remaining or 0):
                least = HoldSettlement(cost, False, limit.capacity, remaining, reset_us)
        self._open -= 1
        self._end(row, SETTLED, cost, max(rows.mark[row] >> ROW_BITS, now + SETTLED_KNOWN_US))
        return least

    def _settle_open(self, row: int, cost: int, success: bool, now: int) -> None:
        reserved = self._rows.cost[row]
        used = reserved if self._counts_failures(row) else cost
        for counter, levels in self._charged(row):
            self._release_hold(counter, levels is not None)
            if levels is None:
                continue
            if counter.limits.failures is not None:
                self._settle_failures(counter.limits, counter.subject, cost, success, now)
            elif used < reserved:
                self._give_back_row(counter, levels, row, reserved - used, now)
            elif used > reserved:
                self._charge_beyond(counter.limits, counter.subject, used - reserved, now)
        self._open -= 1
        self._end(row, SETTLED, cost, max(self._rows.moment(row), now + SETTLED_KNOWN_US))

    def renew_hold_now(self, handle: HoldHandle, ttl_us: int) -> None:
        """See `HoldingCounterStore.renew_hold`."""
        now, rows = self._clock(), self._rows
        row = rows.find(handle.id)
        if row is None:
            raise not_found()
        if rows.state[row] != OPEN or rows.moment(row) <= now:
            raise has_ended()
        self._file_hold(rows.move(row, now + ttl_us), rows.counters_of(row))

    async def open_hold(
        self, counters: Counters, cost: int, ttl_us: int, rule: str | None = None
    ) -> tuple[Decision, HoldHandle | None]:
        """See `HoldingCounterStore.open_hold`."""
        return self.open_hold_now(counters, cost, ttl_us, rule)

    async def settle_hold(self, handle: HoldHandle, cost: int, success: bool = False) -> HoldSettlement:
        """See `HoldingCounterStore.settle_hold`."""
        return self.settle_hold_now(handle, cost, success)

    async def count_holds(self, counters: Counters) -> Sequence[int]:
        """See `HoldCountingStore.count_holds`."""
        self._expire_holds(self._clock())
        return [self.open_holds_of(limits, subject) for limits, subject in counters]

    async def renew_hold(self, handle: HoldHandle, ttl_us: int) -> None:
        """See `HoldingCounterStore.renew_hold`."""
        self.renew_hold_now(handle, ttl_us)

    def adjust_now(self, counters: Counters, units: int) -> Decision:
        """See `AdjustingCounterStore.adjust`."""
        now = self._clock()
        self._expire_holds(now)
        if self.watch is not None and units > 0:
            with self._change_noted(counters, now):
                self._adjust(counters, units, now)
        else:
            self._adjust(counters, units, now)
        return of_adjustment(self.charge_all(counters, 0), units)

    def _adjust(self, counters: Counters, units: int, now: int) -> None:
        for limits, subject in counters:
            if units > 0:
                self._charge_beyond(limits, subject, units, now)
            elif units < 0:
                self._refund(limits, subject, -units, now)

    @contextmanager
    def _change_noted(self, counters: Counters, now: int) -> Iterator[None]:
        """Report the thresholds that are crossed within, by units charged whatever the limits say."""
        watch = self.watch
        watched = tuple(
            (limits, subject)
            for limits, subject in counters
            if watch is not None and limits.algorithm not in IN_PROGRESS and watch.marks(limits)
        )
        before = self._left(watched, now)
        yield
        if watch is not None and watched:
            watch.note_change(watched, before, self._left(watched, now), now)

    def _left(self, counters: Counters, now: int) -> list[int]:
        """What is left of each limit of some counters, below 0 above a quota."""
        left: list[int] = []
        for limits, subject in counters:
            compiled = self._prepare(limits)
            stored = self._shards[hash(compiled.token + subject) & 255].get(compiled.token + subject)
            if not stored and compiled.other_layouts:
                stored = self._inherit(compiled, subject) or stored
            states = zip(limits.limits, compiled.unpack(stored), strict=True)
            left += [compiled.decide(limit, state, now, 0)[1] for limit, state in states]
        return left

    async def adjust(self, counters: Counters, units: int) -> Decision:
        """See `AdjustingCounterStore.adjust`."""
        return self.adjust_now(counters, units)

    # For charges.

    def _expire_holds(self, now: int) -> None:
        """Let holds expire that are due, a bounded number at a time."""
        ends = self._hold_ends
        for _ in range(_EXPIRE_STEPS):
            if not ends or ends[0] >> ROW_BITS > now:
                break
            row = self._rows.live_row(heappop(ends))
            if row is not None:
                self._expire(row, now)
        self._next_hold_end = ends[0] >> ROW_BITS if ends else _NEVER

    def _until_next_end(self, decision: Decision, counters: Counters) -> Decision:
        """A denial lasts until the next hold of its counters expires, at most."""
        retry_us = decision.retry_after_us
        if not retry_us:
            return decision
        for limits, subject in counters:
            held = self._held.get(self._prepare(limits).token + subject)
            marks = held.marks if held else None
            while marks:
                if self._rows.live_row(marks[0]) is not None:
                    retry_us = max(min(retry_us, (marks[0] >> ROW_BITS) - decision.at_us), 1)
                    break
                heappop(marks)
        if retry_us == decision.retry_after_us:
            return decision
        return Decision(
            False, decision.binding, decision.remaining, decision.reset_after_us, retry_us, decision.at_us, decision.limits
        )

    def _void_holds(self, key: str) -> None:
        """A counter was reset: what holds charged to it before does not count any more."""
        held = self._held.pop(key, None)
        if held is not None:
            held.reset = True

    def _hold_counter(self, held: HeldCounter | None, limits: LimitSet, subject: str, key: str) -> HeldCounter:
        if held is None:
            held = self._held[key] = HeldCounter(limits, subject, key)
        held.limits = limits
        held.open += 1
        held.rows += 1
        return held

    def _add_hold(
        self,
        at_us: int,
        ttl_us: int,
        cost: int,
        counters: tuple[HeldCounter, ...],
        rule: str | None,
        level: int,
        details: list[dict[str, int] | None] | None,
    ) -> HoldHandle:
        rows = self._rows
        row = rows.add(at_us, at_us + ttl_us, cost, counters[0] if len(counters) == 1 else counters, level)
        if details is not None:
            rows.details[row] = details
        self._open += 1
        self._file_hold(rows.mark[row], counters)
        return HoldHandle(rows.id_of(row), cost, rule)

    def _file_hold(self, mark: int, counters: tuple[HeldCounter, ...]) -> None:
        self._rows.push(self._hold_ends, mark, self._open)
        self._next_hold_end = self._hold_ends[0] >> ROW_BITS
        for counter in counters:
            self._rows.push(counter.marks, mark, counter.open)

    def _charged(self, row: int) -> Iterable[tuple[HeldCounter, dict[str, int] | None]]:
        """The counters of a hold, and for each the levels of its windows where they are not in the row; None if not charged."""
        counters = self._rows.counters_of(row)
        details = self._rows.details.get(row)
        return ((counters[0], NO_LEVELS),) if details is None else zip(counters, details, strict=True)

    def _counts_failures(self, row: int) -> bool:
        return any(counter.limits.failures is not None for counter in self._rows.counters_of(row))

    def _release_hold(self, counter: HeldCounter, charged: bool) -> None:
        counter.open -= 1
        if charged and not counter.reset and counter.limits.algorithm in IN_PROGRESS:
            self._move_slots(counter.limits, counter.key, -1, 0)

    def _expire(self, row: int, now: int) -> None:
        self.expired_holds += 1
        self._open -= 1
        for counter, levels in self._charged(row):
            self._release_hold(counter, levels is not None)
            if levels is not None:
                self._give_back_row(counter, levels, row, self._rows.cost[row], now)
        self._end(row, EXPIRED, 0, now + EXPIRED_KNOWN_US)

    def _give_back_row(self, counter: HeldCounter, levels: dict[str, int], row: int, units: int, now: int) -> None:
        if units and not counter.reset:
            rows = self._rows
            self._give_back(counter.limits, counter.subject, levels, rows.level[row], rows.at_us[row], units, now)

    def _end(self, row: int, state: int, cost: int, until_us: int) -> None:
        rows = self._rows
        rows.state[row] = state
        rows.cost[row] = cost
        heappush(self._forget, rows.move(row, until_us))

    def _forget_ended(self, now: int) -> None:
        rows = self._rows
        for _ in range(_FORGET_STEPS):
            if not self._forget or self._forget[0] >> ROW_BITS > now:
                return
            mark = heappop(self._forget)
            row = rows.ended_row(mark)
            if row is None:
                continue
            for counter in rows.counters_of(row):
                counter.rows -= 1
                if not counter.rows and self._held.get(counter.key) is counter:
                    del self._held[counter.key]
            rows.free(row)

    def _settlement(self, row: int, cost: int, late: bool = False, repeated: bool = False) -> HoldSettlement:
        counters = self._rows.counters_of(row)
        peek = self.charge_all(tuple((each.limits, each.subject) for each in counters), 0)
        return HoldSettlement(cost, late, peek.limit, peek.remaining, peek.reset_after_us, repeated)
