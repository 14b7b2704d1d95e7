"""Units that go back to counters in memory, that are charged whatever the limits say, and slots and failures."""

from __future__ import annotations

from typing import Final

from tidegate.algorithms import State, failures
from tidegate.algorithms.holds import charge, give_back, refund, undrained_of
from tidegate.counters.holds import MAX_TTL_S
from tidegate.counters.memory_storage import CompiledLimits, MemoryStorage
from tidegate.policy.limits import IN_PROGRESS, ConcurrencyAlgorithm, LimitSet
from tidegate.timestamps import US_PER_S

_LONGEST_US: Final = MAX_TTL_S * US_PER_S
NO_LEVELS: Final[dict[str, int]] = {}
"""For a hold of one counter with one limit: its level is in its row."""


class MemoryUnits(MemoryStorage):
    """Counters whose units go back. Parameters: see `MemoryCounters`."""

    def _levels(self, limits: LimitSet, key: str) -> dict[str, int]:
        """The levels of a bucket's windows just after a charge."""
        states = self._prepare(limits).unpack(self._shards[hash(key) & 255].get(key))
        return {
            limit.window_name: undrained_of(limits.algorithm, state) for limit, state in zip(limits.limits, states, strict=True)
        }

    def _move_slots(self, limits: LimitSet, key: str, by: int, now: int) -> None:
        """Take or free slots of a counter."""
        shard = self._shards[hash(key) & 255]
        stored = shard.get(key)
        if limits.failures is not None:
            compiled = self._prepare(limits)
            in_progress, *rest = compiled.unpack(stored)[0] or failures.FRESH
            self._save_failures(compiled, key, (max(in_progress + by, 0), *rest), now)
            return
        taken = (stored[0] if stored else 0) + by
        if taken > 0:
            shard[key] = (taken,)
            if stored is None:
                self._file_new(key, now + _LONGEST_US, now)
        elif stored:
            shard[key] = ()

    def _save_failures(self, compiled: CompiledLimits, key: str, state: State, now: int) -> None:
        shard = self._shards[hash(key) & 255]
        known = key in shard
        # All limits of a counter of failures have one state.
        shard[key] = compiled.pack([state] * len(compiled.limits.limits))
        if not known:
            self._file_new(key, now + _LONGEST_US, now)

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

    def _give_back(
        self, limits: LimitSet, subject: str, levels: dict[str, int], level: int, at_us: int, units: int, now: int
    ) -> None:
        """Return units to a counter, also where its states are those of a rule that has other windows now.

        Args:
            levels: of the windows of a bucket just after the charge; `NO_LEVELS` where it has one, and
            level: the level of that.
            at_us: when the units were charged.
        """
        if limits.algorithm in IN_PROGRESS:
            return
        compiled = self._prepare(limits)
        algorithm = limits.algorithm
        for each in (compiled, *compiled.other_layouts) if compiled.other_layouts else (compiled,):
            key = each.token + subject
            shard = self._shards[hash(key) & 255]
            stored = shard.get(key)
            if not stored or each.limits.algorithm is not algorithm:
                continue
            if each.only is not None and not each.logs and levels is NO_LEVELS and each is compiled:
                shard[key] = give_back(algorithm, each.only, stored, now, units, at_us, level)
                continue
            if levels is NO_LEVELS:
                levels = {limits.limits[0].window_name: level}
            states = [
                give_back(algorithm, limit, state, now, units, at_us, levels.get(limit.window_name, 0))
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
