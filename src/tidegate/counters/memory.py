"""Counters in the memory of one process: exact, bounded, without a sweep that blocks the process.

Not thread-safe: use it from one event loop, or with a lock around it. Layout, expiry and bounds: see `memory_storage`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tidegate.algorithms import MERGE, State
from tidegate.counters import Charge
from tidegate.counters.crossings import CrossingWatch
from tidegate.counters.memory_holds import MemoryHolds
from tidegate.counters.memory_reservations import MemoryReservations
from tidegate.counters.memory_storage import SWEEP_STEPS
from tidegate.decision import Decision
from tidegate.policy.limits import LimitSet


class MemoryCounters(MemoryReservations, MemoryHolds):
    """Counters of one process. A subclass whose `charge` has to await something sets `immediate` to False.

    Args:
        max_subjects: most counters, 1 or more; each costs about 200 bytes for one limit.
        clock: gives µs since the epoch and never goes back; `store_clock()` where not given.
    """

    immediate = True

    async def charge(self, charges: Sequence[Charge]) -> list[Decision]:
        """See `CounterStore.charge`; never raises `StoreUnavailable`."""
        return [self.charge_all(charge.counters, charge.cost) for charge in charges]

    def charge_one(self, limits: LimitSet, subject: str, cost: int) -> Decision:
        """Decide and charge one counter: the hot path. Costs about 0.6 µs for one sliding-window limit.

        Args:
            limits: of the counter; plain.
            cost: units, 0 (peek) or more.

        Returns:
            The decision.
        """
        compiled = self._compiled.get(limits) or self._prepare(limits)
        limit = compiled.only
        if limit is None:
            return self.charge_all(((limits, subject),), cost)
        now = self._clock()
        if now >= self._next_hold_end:
            self._expire_holds(now)
        key = compiled.token + subject
        shard = self._shards[hash(key) & 255]
        stored = shard.get(key)
        if not stored and compiled.other_layouts:
            stored = self._inherit(compiled, subject) or stored
        state, remaining, reset, retry = compiled.decide(limit, stored or None, now, cost)
        if state is not None and cost:
            shard[key] = state
            if stored is None:
                self._file_new(key, now + reset, now)
            if compiled.logs:
                self._count_log_entries(len(state[1]) - (len(stored[1]) if stored else 0), now)
        elif state is None and compiled.logs:
            self._drop_expired_entries(compiled, shard, key, now)
        if now >= self._next_due:
            self.sweep(SWEEP_STEPS, now)
        decision = Decision(state is not None, limit, remaining, reset, retry, now, limits)
        return decision if state is not None or not self._open else self._until_next_end(decision, ((limits, subject),))

    def charge_all(self, counters: tuple[tuple[LimitSet, str], ...], cost: int) -> Decision:
        """Decide several counters and charge all of them or none.

        Args:
            counters: pairs of limits and subject, the rule's first.
            cost: units, 0 (peek) or more.

        Returns:
            The decision. The limit with the least left is reported; where some deny, the one of those, with the latest retry: all
            limits must pass.
        """
        if self.watch is not None and cost and self.watch.watches(counters):
            return self._charge_watched(self.watch, counters, cost)
        if len(counters) != 2:
            if len(counters) == 1 and counters[0][0].plain and len(counters[0][0].limits) == 1:
                return self.charge_one(counters[0][0], counters[0][1], cost)
            return self._charge_several(counters, cost)
        # Two counters, as those of a rule and its tier: two thirds of the cost of `_charge_several` where each has one limit.
        (limits, subject), (other_limits, other_subject) = counters
        try:
            compiled, other = self._compiled[limits], self._compiled[other_limits]
            key, other_key = compiled.token + subject, other.token + other_subject
            shard, other_shard = self._shards[hash(key) & 255], self._shards[hash(other_key) & 255]
            state, other_state = shard[key], other_shard[other_key]
        except KeyError:
            return self._charge_several(counters, cost)
        if not compiled.simple or not other.simple or not state or not other_state or self._open:
            return self._charge_several(counters, cost)
        now = self._clock()
        limit, other_limit = compiled.limit, other.limit
        state, least, reset_after, retry_after = compiled.decide(limit, state, now, cost)
        other_state, remaining, reset, retry = other.decide(other_limit, other_state, now, cost)
        allowed = False
        if state is not None:
            if other_state is not None:
                allowed = True
                if cost:
                    shard[key] = state
                    other_shard[other_key] = other_state
                if remaining < least:
                    limit, least, reset_after = other_limit, remaining, reset
            else:
                limit, least, reset_after, retry_after = other_limit, remaining, reset, retry
        elif other_state is None:
            if remaining < least:
                limit, least, reset_after = other_limit, remaining, reset
            # Both must pass; one of them may never.
            retry_after = None if retry_after is None or retry is None else max(retry_after, retry)
        if now >= self._next_due:
            self.sweep(SWEEP_STEPS, now)
        if least < 0:
            return Decision(True, limit, 0, reset_after, 0, now, limits, overage=min(-least, cost or -least))
        return Decision(allowed, limit, least, reset_after, retry_after, now, limits)

    def _charge_watched(self, watch: CrossingWatch, counters: tuple[tuple[LimitSet, str], ...], cost: int) -> Decision:
        """As `charge_all`, and report the thresholds that are crossed."""
        watched = [(limits, subject) for limits, subject in counters if watch.marks(limits)]
        before = [self._stored(limits, subject) for limits, subject in watched]
        decision = self._charge_several(counters, cost)
        if decision.allowed:
            for (limits, subject), old in zip(watched, before, strict=True):
                stored = self._stored(limits, subject)
                # A soft limit that was reached is not charged: its state is the same object.
                if stored and stored is not old:
                    compiled, now = self._prepare(limits), decision.at_us
                    states = zip(limits.limits, compiled.unpack(stored), strict=True)
                    left = [compiled.decide(limit, state, now, 0)[1] for limit, state in states]
                    watch.note(limits, subject, left, cost, now)
        return decision

    def _stored(self, limits: LimitSet, subject: str) -> Any:
        key = self._prepare(limits).token + subject
        return self._shards[hash(key) & 255].get(key)

    def _charge_several(self, counters: tuple[tuple[LimitSet, str], ...], cost: int) -> Decision:
        now = self._clock()
        if now >= self._next_hold_end:
            self._expire_holds(now)
        writes = []
        binding, least, reset_after, retry_after = counters[0][0].limits[0], -1, 0, 0
        never = denied = False
        over = 0
        for limits, subject in counters:
            compiled = self._compiled.get(limits) or self._prepare(limits)
            key = compiled.token + subject
            shard = self._shards[hash(key) & 255]
            stored = shard.get(key)
            if not stored and compiled.other_layouts:
                stored = self._inherit(compiled, subject) or stored
            states = []
            longest = 0
            charged = True
            only, decide = compiled.only, compiled.decide
            # Most often one limit: then neither `zip` nor `states_of` is paid for, a tenth of the whole.
            olds = ((only, stored or None),) if only is not None else zip(limits.limits, stored or compiled.fresh, strict=True)
            for limit, old in olds:
                state, remaining, reset, retry = decide(limit, old, now, cost)
                if state is None and limits.soft:
                    charged = False
                    over = max(over, cost)
                    if not denied and (remaining < least or least < 0):
                        binding, least, reset_after = limit, remaining, reset
                elif state is None:
                    if not denied or remaining < least:
                        binding, least, reset_after = limit, remaining, reset
                    denied = True
                    if retry is None:
                        never = True
                    elif retry > retry_after:
                        retry_after = retry
                else:
                    if remaining < 0:
                        over = max(over, min(-remaining, cost or -remaining))
                        remaining = 0
                    if not denied and (remaining < least or least < 0):
                        binding, least, reset_after = limit, remaining, reset
                states.append(state)
                if reset > longest:  # noqa: PLR1730 - a call of max() costs 50 ns here
                    longest = reset
            if charged:
                writes.append((compiled, shard, key, stored, states, longest))
        if cost and not denied:
            for compiled, shard, key, stored, states, longest in writes:
                # Making room for one counter of this check may have evicted another of them: then that one is new again.
                known = key in shard
                value = shard[key] = states[0] if compiled.only is not None else tuple(states)
                if not known:
                    self._file_new(key, now + longest, now)
                if compiled.logs:
                    self._count_log_entries(compiled.entries(value) - (compiled.entries(stored) if stored and known else 0), now)
        elif denied:
            for compiled, shard, key, *_ in writes:
                if compiled.logs:
                    self._drop_expired_entries(compiled, shard, key, now)
        # Only now: a sweep may drop what was read above.
        if now >= self._next_due:
            self.sweep(SWEEP_STEPS, now)
        if over and not denied:
            return Decision(True, binding, 0, reset_after, 0, now, counters[0][0], overage=over)
        decision = Decision(not denied, binding, least, reset_after, None if never else retry_after, now, counters[0][0])
        return self._until_next_end(decision, counters) if denied and self._open else decision

    async def windows(self, counters: Sequence[tuple[LimitSet, str]]) -> list[tuple[Decision, ...]]:
        """See `CounterStore.windows`."""
        now = self._clock()
        self._expire_holds(now)
        found = []
        for limits, subject in counters:
            compiled = self._prepare(limits)
            stored = self._shards[hash(compiled.token + subject) & 255].get(compiled.token + subject)
            if not stored and compiled.other_layouts:
                stored = self._inherit(compiled, subject) or stored
            own = []
            for limit, state in zip(limits.limits, compiled.unpack(stored), strict=True):
                _, remaining, reset, _ = compiled.decide(limit, state, now, 0)
                own.append(
                    Decision(True, limit, max(remaining, 0), reset, 0, now, limits, overage=0 if remaining > 0 else -remaining)
                )
            found.append(tuple(own))
        return found

    async def reset(self, counters: Sequence[tuple[LimitSet, str]]) -> None:
        """See `CounterStore.reset`."""
        self._reset(counters)

    def _reset(self, counters: Sequence[tuple[LimitSet, str]]) -> None:
        for limits, subject in counters:
            compiled = self._prepare(limits)
            for each in (compiled, *compiled.other_layouts):
                self._empty(each, subject)
                self._void_holds(each.token + subject)

    def take(self, limits: LimitSet, subject: str) -> tuple[State, ...] | None:
        """Take out what a subject consumed; afterwards it has consumed nothing here.

        Returns:
            A state for each limit; None where nothing still counts.
        """
        compiled = self._prepare(limits)
        key = compiled.token + subject
        stored = self._shards[hash(key) & 255].get(key)
        if not stored and compiled.other_layouts:
            stored = self._inherit(compiled, subject) or stored
        if not stored or compiled.expiry(stored) <= self._clock():
            return None
        self._empty(compiled, subject)
        return compiled.unpack(stored)

    def add(self, limits: LimitSet, subject: str, states: Sequence[State]) -> None:
        """Add what was admitted elsewhere, without asking any limit.

        Args:
            states: one for each limit, None for nothing.
        """
        compiled = self._prepare(limits)
        key = compiled.token + subject
        shard = self._shards[hash(key) & 255]
        stored = shard.get(key)
        merge, now = MERGE[limits.algorithm], self._clock()
        merged = []
        for limit, mine, other in zip(limits.limits, compiled.unpack(stored), states, strict=True):
            state = mine if other is None else merge(limit, mine, other)
            # A limit that was given nothing begins with the state of a peek.
            merged.append(compiled.decide(limit, state, now, 0)[0])
        value = shard[key] = compiled.pack(merged)
        if stored is None:
            self._file_new(key, compiled.expiry(value), now)
        if compiled.logs:
            self._count_log_entries(compiled.entries(value) - (compiled.entries(stored) if stored else 0), now)

    async def ping(self) -> None:
        """See `CounterStore.ping`: memory always answers."""
