"""Holds of counters in memory. Expired ones give their units back before the next charge of any subject.

A hold costs about 600 bytes while it is open, and about 200 for two minutes after it was settled.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Final

from tidegate.algorithms import State, failures
from tidegate.algorithms.holds import charge, give_back, refund, undrained_of
from tidegate.counters import Counters
from tidegate.counters.adjustments import of_adjustment
from tidegate.counters.holds import (
    EXPIRED_KNOWN_US,
    MAX_HOLDS,
    MAX_TTL_S,
    SETTLED_KNOWN_US,
    HoldHandle,
    HoldSettlement,
    has_ended,
    new_id,
    not_found,
    too_many,
)
from tidegate.counters.memory_storage import DEFAULT_MAX_SUBJECTS, CompiledLimits, MemoryStorage
from tidegate.decision import Decision
from tidegate.errors import TooManyHolds
from tidegate.policy.limits import IN_PROGRESS, ConcurrencyAlgorithm, LimitSet
from tidegate.timestamps import US_PER_S

_EXPIRE_STEPS: Final = 1000
"""Holds that one charge lets expire at most: 2 to 4 ms."""
_FORGET_STEPS: Final = 16
_MAX_STALE: Final = 64
"""Entries of ended holds that a heap may have beside as many as there are open ones."""
_NEVER: Final = 1 << 62


class _Record:
    """What a hold charged to one counter; `undrained` by window, for buckets."""

    __slots__ = ("at_us", "key", "limits", "reset", "subject", "undrained")

    def __init__(self, limits: LimitSet, subject: str, key: str, at_us: int) -> None:
        self.limits = limits
        self.subject = subject
        self.key = key
        self.at_us = at_us
        self.undrained: dict[str, int] = {}
        self.reset = False


class _OpenHold:
    __slots__ = ("cost", "counters", "ends_us", "records")

    def __init__(self, counters: Counters, cost: int, ends_us: int, records: list[_Record]) -> None:
        self.counters = counters
        self.cost = cost
        self.ends_us = ends_us
        self.records = records


class _EndedHold:
    """A hold that was settled, or, where `cost` is None, has expired."""

    __slots__ = ("cost", "counters", "late", "uncharged", "until_us")

    def __init__(self, counters: Counters, uncharged: Counters, cost: int | None, late: bool) -> None:
        self.until_us = 0
        self.counters = counters
        self.uncharged = uncharged
        self.cost = cost
        self.late = late


def _counts_failures(counters: Counters) -> bool:
    return any(limits.failures is not None for limits, _ in counters)


class MemoryHolds(MemoryStorage):
    """Counters with holds. `charge_all` is its subclass's.

    Attributes:
        max_holds: most open holds of one counter.
        expired_holds: holds that expired unsettled.
    """

    max_holds = MAX_HOLDS

    def __init__(self, max_subjects: int = DEFAULT_MAX_SUBJECTS, clock: Callable[[], int] | None = None) -> None:
        super().__init__(max_subjects, clock)
        self._no_holds()

    def charge_all(self, counters: Counters, cost: int) -> Decision:
        """See `MemoryCounters`."""
        raise NotImplementedError

    def _no_holds(self) -> None:
        self.expired_holds = 0
        self._open: dict[str, _OpenHold] = {}
        self._ended: dict[str, _EndedHold] = {}
        self._forget: list[tuple[int, str]] = []
        # Heaps of (end, id), of all holds and of each counter's. Entries of holds that ended or were renewed stay for a while.
        self._ends_of_holds: list[tuple[int, str]] = []
        self._holds_by_key: dict[str, list[tuple[int, str]]] = {}
        self._open_by_key: dict[str, int] = {}
        self._next_hold_end = _NEVER

    def clear(self) -> None:
        """Reset all counters; holds are forgotten."""
        super().clear()
        self._no_holds()

    @property
    def open_holds(self) -> int:
        """Holds that are open."""
        return len(self._open)

    def open_hold_now(
        self, counters: Counters, cost: int, ttl_us: int, rule: str | None = None
    ) -> tuple[Decision, HoldHandle | None]:
        """See `HoldingCounterStore.open_hold`."""
        now = self._clock()
        self._expire_holds(now)
        self._forget_ended(now)
        keys = [self._prepare(limits).token + subject for limits, subject in counters]
        if len(self._open) >= self.max_subjects:
            raise TooManyHolds(
                f"{self.max_subjects} holds are open in this process, as many as counters.max_subjects: settle holds when their "
                "requests end"
            )
        if any(self._open_by_key.get(key, 0) >= self.max_holds for key in keys):
            raise too_many(self.max_holds)
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
        records = []
        for (limits, subject), key, old in zip(counters, keys, before, strict=True):
            stored = self._shards[hash(key) & 255].get(key)
            # A soft limit that was reached was not charged.
            if cost and stored is old and limits.soft:
                continue
            record = _Record(limits, subject, key, decision.at_us)
            if cost and limits.algorithm.is_bucket:
                states = self._prepare(limits).unpack(stored)
                for limit, state in zip(limits.limits, states, strict=True):
                    record.undrained[limit.window_name] = undrained_of(limits.algorithm, state)
            records.append(record)
            if limits.algorithm in IN_PROGRESS:
                self._move_slots(record, 1, now)
        if slots:
            peek = self.charge_all(counters, 0)
            decision = Decision(
                True,
                peek.binding,
                peek.remaining,
                peek.reset_after_us,
                0,
                decision.at_us,
                decision.limits,
                overage=decision.overage,
            )
        handle = HoldHandle(new_id(), cost, rule)
        self._open[handle.id] = _OpenHold(counters, cost, decision.at_us + ttl_us, records)
        self._file_hold(handle.id, decision.at_us + ttl_us, records)
        for record in records:
            self._open_by_key[record.key] = self._open_by_key.get(record.key, 0) + 1
        return decision, handle

    def settle_hold_now(self, handle: HoldHandle, cost: int, success: bool = False) -> HoldSettlement:
        """See `HoldingCounterStore.settle_hold`."""
        now = self._clock()
        self._expire_holds(now)
        self._forget_ended(now)
        hold = self._open.get(handle.id)
        if hold is not None and hold.ends_us <= now:
            self._expire(handle.id, hold, now)
            hold = None
        if hold is not None:
            del self._open[handle.id]
            used = hold.cost if _counts_failures(hold.counters) else cost
            for record in hold.records:
                self._release_hold(record)
                if record.limits.failures is not None:
                    self._settle_failures(record.limits, record.subject, cost, success, now)
                elif used < hold.cost:
                    self._give_back(record, hold.cost - used, now)
                elif used > hold.cost:
                    self._charge_beyond(record.limits, record.subject, used - hold.cost, now)
            self._end(handle.id, _EndedHold(hold.counters, (), cost, False), max(hold.ends_us, now + SETTLED_KNOWN_US))
            return self._settlement(hold.counters, cost)
        ended = self._ended.get(handle.id)
        if ended is None:
            raise not_found()
        if ended.cost is not None:
            return self._settlement(ended.counters, ended.cost, ended.late, repeated=True)
        used = handle.cost if _counts_failures(ended.uncharged) else cost
        for limits, subject in ended.uncharged:
            if limits.failures is not None:
                self._settle_failures(limits, subject, cost, success, now)
            elif used:
                self._charge_beyond(limits, subject, used, now)
        self._end(handle.id, _EndedHold(ended.counters, (), cost, True), now + EXPIRED_KNOWN_US)
        return self._settlement(ended.counters, cost, late=True)

    def renew_hold_now(self, handle: HoldHandle, ttl_us: int) -> None:
        """See `HoldingCounterStore.renew_hold`."""
        now = self._clock()
        hold = self._open.get(handle.id)
        if hold is None or hold.ends_us <= now:
            if hold is None and handle.id not in self._ended:
                raise not_found()
            raise has_ended()
        hold.ends_us = now + ttl_us
        self._file_hold(handle.id, hold.ends_us, hold.records)

    async def open_hold(
        self, counters: Counters, cost: int, ttl_us: int, rule: str | None = None
    ) -> tuple[Decision, HoldHandle | None]:
        """See `HoldingCounterStore.open_hold`."""
        return self.open_hold_now(counters, cost, ttl_us, rule)

    async def settle_hold(self, handle: HoldHandle, cost: int, success: bool = False) -> HoldSettlement:
        """See `HoldingCounterStore.settle_hold`."""
        return self.settle_hold_now(handle, cost, success)

    async def renew_hold(self, handle: HoldHandle, ttl_us: int) -> None:
        """See `HoldingCounterStore.renew_hold`."""
        self.renew_hold_now(handle, ttl_us)

    def adjust_now(self, counters: Counters, units: int) -> Decision:
        """See `AdjustingCounterStore.adjust`."""
        now = self._clock()
        self._expire_holds(now)
        for limits, subject in counters:
            if units > 0:
                self._charge_beyond(limits, subject, units, now)
            elif units < 0:
                self._refund(limits, subject, -units, now)
        return of_adjustment(self.charge_all(counters, 0), units)

    async def adjust(self, counters: Counters, units: int) -> Decision:
        """See `AdjustingCounterStore.adjust`."""
        return self.adjust_now(counters, units)

    # For charges.

    def _expire_holds(self, now: int) -> None:
        """Let holds expire that are due, a bounded number at a time."""
        ends = self._ends_of_holds
        for _ in range(_EXPIRE_STEPS):
            if not ends or ends[0][0] > now:
                break
            at, hold_id = heapq.heappop(ends)
            hold = self._open.get(hold_id)
            if hold is not None and hold.ends_us == at:
                self._expire(hold_id, hold, now)
        self._next_hold_end = ends[0][0] if ends else _NEVER

    def _until_next_end(self, decision: Decision, counters: Counters) -> Decision:
        """A denial lasts until the next hold of its counters expires, at most."""
        retry_us = decision.retry_after_us
        if not retry_us:
            return decision
        for limits, subject in counters:
            holds = self._holds_by_key.get(self._prepare(limits).token + subject)
            while holds:
                at, hold_id = holds[0]
                hold = self._open.get(hold_id)
                if hold is not None and hold.ends_us == at:
                    retry_us = max(min(retry_us, at - decision.at_us), 1)
                    break
                heapq.heappop(holds)
        if retry_us == decision.retry_after_us:
            return decision
        return Decision(
            False, decision.binding, decision.remaining, decision.reset_after_us, retry_us, decision.at_us, decision.limits
        )

    def _void_holds(self, key: str) -> None:
        """A counter was reset: what holds charged to it before does not count any more."""
        for _, hold_id in self._holds_by_key.get(key, ()):
            hold = self._open.get(hold_id)
            for record in () if hold is None else hold.records:
                if record.key == key:
                    record.reset = True

    def _file_hold(self, hold_id: str, ends_us: int, records: list[_Record]) -> None:
        self._push(self._ends_of_holds, ends_us, hold_id, len(self._open))
        self._next_hold_end = self._ends_of_holds[0][0]
        for record in records:
            heap = self._holds_by_key.setdefault(record.key, [])
            self._push(heap, ends_us, hold_id, self._open_by_key.get(record.key, 0))

    def _push(self, heap: list[tuple[int, str]], ends_us: int, hold_id: str, live: int) -> None:
        heapq.heappush(heap, (ends_us, hold_id))
        if len(heap) > 2 * live + _MAX_STALE:
            heap[:] = [each for each in heap if (hold := self._open.get(each[1])) is not None and hold.ends_us == each[0]]
            heapq.heapify(heap)

    def _move_slots(self, record: _Record, by: int, now: int) -> None:
        """Take or free slots of a counter."""
        key = record.key
        shard = self._shards[hash(key) & 255]
        stored = shard.get(key)
        if record.limits.failures is not None:
            compiled = self._prepare(record.limits)
            taken, *rest = compiled.unpack(stored)[0] or failures.FRESH
            self._save_failures(compiled, key, (max(taken + by, 0), *rest), now)
            return
        taken = (stored[0] if stored else 0) + by
        if taken > 0:
            shard[key] = (taken,)
            if stored is None:
                self._file_new(key, now + MAX_TTL_S * US_PER_S, now)
        elif stored:
            shard[key] = ()

    def _save_failures(self, compiled: CompiledLimits, key: str, state: State, now: int) -> None:
        shard = self._shards[hash(key) & 255]
        known = key in shard
        # All limits of a counter of failures have one state.
        shard[key] = compiled.pack([state] * len(compiled.limits.limits))
        if not known:
            self._file_new(key, now + MAX_TTL_S * US_PER_S, now)

    def _settle_failures(self, limits: LimitSet, subject: str, failed: int, success: bool, now: int) -> None:
        """Record the outcome of an attempt that is not in progress any more."""
        assert limits.failures is not None
        compiled = self._prepare(limits)
        key = compiled.token + subject
        stored = self._shards[hash(key) & 255].get(key)
        if not stored and compiled.other_layouts:
            stored = self._inherit(compiled, subject) or stored
        state = compiled.unpack(stored)[0]
        self._save_failures(compiled, key, failures.settle(limits.failures, limits.limits, state, now, failed, success), now)

    def _release_hold(self, record: _Record) -> None:
        if record.limits.algorithm in IN_PROGRESS and not record.reset:
            self._move_slots(record, -1, 0)
        left = self._open_by_key.get(record.key, 1) - 1
        if left:
            self._open_by_key[record.key] = left
        else:
            self._open_by_key.pop(record.key, None)
            self._holds_by_key.pop(record.key, None)

    def _expire(self, hold_id: str, hold: _OpenHold, now: int) -> None:
        del self._open[hold_id]
        self.expired_holds += 1
        for record in hold.records:
            self._release_hold(record)
            self._give_back(record, hold.cost, now)
        charged = tuple((record.limits, record.subject) for record in hold.records)
        self._end(hold_id, _EndedHold(hold.counters, charged, None, True), now + EXPIRED_KNOWN_US)

    def _end(self, hold_id: str, ended: _EndedHold, until_us: int) -> None:
        ended.until_us = until_us
        self._ended[hold_id] = ended
        heapq.heappush(self._forget, (until_us, hold_id))

    def _forget_ended(self, now: int) -> None:
        for _ in range(_FORGET_STEPS):
            if not self._forget or self._forget[0][0] > now:
                return
            until_us, hold_id = heapq.heappop(self._forget)
            if self._ended[hold_id].until_us == until_us:
                del self._ended[hold_id]

    def _settlement(self, counters: Counters, cost: int, late: bool = False, repeated: bool = False) -> HoldSettlement:
        peek = self.charge_all(counters, 0)
        return HoldSettlement(cost, late, peek.limit, peek.remaining, peek.reset_after_us, repeated)

    def _give_back(self, record: _Record, units: int, now: int) -> None:
        """Return units to the counter, also where its states are those of a rule that has other windows now."""
        if record.reset or not units or record.limits.algorithm in IN_PROGRESS:
            return
        compiled = self._prepare(record.limits)
        for each in (compiled, *compiled.other_layouts):
            key = each.token + record.subject
            shard = self._shards[hash(key) & 255]
            stored = shard.get(key)
            if not stored or each.limits.algorithm is not record.limits.algorithm:
                continue
            states = [
                give_back(
                    each.limits.algorithm, limit, state, now, units, record.at_us, record.undrained.get(limit.window_name, 0)
                )
                for limit, state in zip(each.limits.limits, each.unpack(stored), strict=True)
            ]
            value = shard[key] = each.pack(states)
            if each.logs:
                self._log_entries += each.entries(value) - each.entries(stored)

    def _charge_beyond(self, limits: LimitSet, subject: str, cost: int, now: int) -> None:
        """Charge units whatever the limits say."""
        if limits.algorithm is ConcurrencyAlgorithm.CONCURRENT:
            return
        if limits.failures is not None:
            self._settle_failures(limits, subject, cost, False, now)
            return
        compiled = self._prepare(limits)
        key = compiled.token + subject
        shard = self._shards[hash(key) & 255]
        stored = shard.get(key)
        if not stored and compiled.other_layouts:
            stored = self._inherit(compiled, subject) or stored
        states: list[State] = [
            charge(limits.algorithm, limit, state, now, cost)
            for limit, state in zip(limits.limits, compiled.unpack(stored), strict=True)
        ]
        known = key in shard
        value = shard[key] = compiled.pack(states)
        if not known:
            self._file_new(key, compiled.expiry(value), now)
        if compiled.logs:
            self._count_log_entries(compiled.entries(value) - (compiled.entries(stored) if stored else 0), now)

    def _refund(self, limits: LimitSet, subject: str, units: int, now: int) -> None:
        if limits.failures is not None:
            return
        compiled = self._prepare(limits)
        key = compiled.token + subject
        shard = self._shards[hash(key) & 255]
        stored = shard.get(key)
        if not stored and compiled.other_layouts:
            stored = self._inherit(compiled, subject) or stored
        if not stored:
            return
        states = [
            refund(limits.algorithm, limit, state, now, units)
            for limit, state in zip(limits.limits, compiled.unpack(stored), strict=True)
        ]
        value = shard[key] = compiled.pack(states)
        if compiled.logs:
            self._log_entries += compiled.entries(value) - compiled.entries(stored)
