"""Reservations of the counters in memory. Twin of `redis/reserve.lua` and `redis/release.lua`."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

from tidegate.algorithms import AlgorithmResult
from tidegate.algorithms.reservations import followed, released, reserved
from tidegate.counters import Counters
from tidegate.counters.holds import new_id
from tidegate.counters.memory_storage import SWEEP_STEPS, CompiledLimits, MemoryStorage
from tidegate.counters.reservations import MAX_NAMED, Reservation, ReservationHandle, not_found
from tidegate.decision import Decision
from tidegate.errors import TooManyReservations


class _Loaded:
    """A counter: what was prepared for its limits, where it is stored, and its states."""

    __slots__ = ("compiled", "key", "shard", "states", "stored")

    def __init__(self, compiled: CompiledLimits, shard: dict[str, Any], key: str, stored: Any) -> None:
        self.compiled = compiled
        self.shard = shard
        self.key = key
        self.stored = stored
        self.states = compiled.unpack(stored)

    def decide(self, now: int, cost: int) -> list[AlgorithmResult]:
        decide, limits = self.compiled.decide, self.compiled.limits.limits
        return [decide(limit, state, now, cost) for limit, state in zip(limits, self.states, strict=True)]


class _NamedReservations:
    """Reservations by id, until their moments. At most `MAX_NAMED`."""

    def __init__(self) -> None:
        self._by_id: dict[str, Reservation | bool] = {}
        self._moments: list[tuple[int, str]] = []

    def __len__(self) -> int:
        return len(self._by_id)

    def make_room(self, now: int) -> None:
        """Forget those whose moments have come; raises TooManyReservations if no room is left."""
        while self._moments and self._moments[0][0] <= now:
            del self._by_id[heapq.heappop(self._moments)[1]]
        if len(self._by_id) >= MAX_NAMED:
            raise TooManyReservations(
                f"{MAX_NAMED} reservations wait for their moments, as many as counters in memory remember: reserve less far "
                "ahead, or count in Redis (counters.url)"
            )

    def add(self, reservation: Reservation) -> ReservationHandle:
        handle = ReservationHandle(new_id(), reservation.cost, reservation.at_us)
        self._by_id[handle.id] = reservation
        heapq.heappush(self._moments, (reservation.at_us, handle.id))
        return handle

    def release(self, handle: ReservationHandle, release: Callable[[Reservation], bool]) -> bool:
        known = self._by_id.get(handle.id)
        if known is None:
            raise not_found()
        if isinstance(known, Reservation):
            known = self._by_id[handle.id] = release(known)
        return known

    def clear(self) -> None:
        self._by_id.clear()
        self._moments.clear()


class MemoryReservations(MemoryStorage):
    """`ReservingCounterStore` and `NamedReservingStore` in memory. Parameters: see `MemoryCounters`."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._named = _NamedReservations()

    async def reserve(self, counters: Counters, cost: int, ahead_us: int) -> Reservation:
        """See `ReservingCounterStore.reserve`."""
        return self._reserve(counters, cost, ahead_us)

    async def release(self, reservation: Reservation) -> bool:
        """See `ReservingCounterStore.release`."""
        return self._release(reservation)

    async def reserve_named(self, counters: Counters, cost: int, ahead_us: int) -> tuple[Reservation, ReservationHandle | None]:
        """See `NamedReservingStore.reserve_named`."""
        self._named.make_room(self._clock())
        place = self._reserve(counters, cost, ahead_us)
        return place, self._named.add(place) if place.wait_s and cost else None

    async def release_named(self, handle: ReservationHandle) -> bool:
        """See `NamedReservingStore.release_named`."""
        return self._clock() < handle.at_us and self._named.release(handle, self._release)

    def clear(self) -> None:
        """See `MemoryStorage.clear`."""
        super().clear()
        self._named.clear()

    def _reserve(self, counters: Counters, cost: int, ahead_us: int) -> Reservation:
        now = self._clock()
        loaded = [self._load(limits, subject) for limits, subject in counters]
        first = outcomes = [each.decide(now, cost) for each in loaded]
        ahead = 0
        if any(state is None for each in outcomes for state, *_ in each):
            later = _latest([retry for each in outcomes for _, _, _, retry in each])
            if later is None or later > ahead_us:
                return Reservation(self._decision(counters, first, now, later), cost=cost)
            ahead = later
            outcomes = [each.decide(now + ahead, cost) for each in loaded]
            if any(state is None for each in outcomes for state, *_ in each):
                return Reservation(self._decision(counters, first, now, ahead), cost=cost)
        if cost:
            values = [
                [
                    reserved(each.compiled.limits.algorithm, charged, state, now)
                    for (charged, *_), state in zip(own, each.states, strict=True)
                    if charged is not None
                ]
                for own, each in zip(outcomes, loaded, strict=True)
            ]
            if any(value is None for own in values for value in own):
                return Reservation(self._decision(counters, first, now, ahead), cost=cost)
            for each, own in zip(loaded, values, strict=True):
                self._store(each, each.compiled.pack(own), now)
        if now >= self._next_due:
            self.sweep(SWEEP_STEPS, now)
        return Reservation(self._decision(counters, outcomes, now, ahead), counters, cost, now + ahead)

    def _release(self, reservation: Reservation) -> bool:
        now = self._clock()
        if now >= reservation.at_us or not reservation.cost:
            return False
        loaded = [(limits, self._load(limits, subject)) for limits, subject in reservation.counters]
        whole = all(each.stored for _, each in loaded)
        at_us = reservation.at_us
        last = not any(
            followed(limits.algorithm, limit, state, now, at_us)
            for limits, each in loaded
            if each.stored
            for limit, state in zip(limits.limits, each.states, strict=True)
        )
        for limits, each in loaded:
            if not each.stored:
                continue
            given = [
                released(limits.algorithm, limit, state, now, at_us, reservation.cost, last=last)
                for limit, state in zip(limits.limits, each.states, strict=True)
            ]
            whole = whole and all(units == reservation.cost for _, units in given)
            if any(units for _, units in given):
                each.shard[each.key] = each.compiled.pack([state for state, _ in given])
        return whole

    def _load(self, limits: Any, subject: str) -> _Loaded:
        compiled = self._prepare(limits)
        key = compiled.token + subject
        shard = self._shards[hash(key) & 255]
        stored = shard.get(key)
        if not stored and compiled.other_layouts:
            stored = self._inherit(compiled, subject) or stored
        return _Loaded(compiled, shard, key, stored)

    def _store(self, each: _Loaded, value: Any, now: int) -> None:
        known = each.key in each.shard
        each.shard[each.key] = value
        if not known:
            self._file_new(each.key, each.compiled.expiry(value), now)

    @staticmethod
    def _decision(counters: Counters, outcomes: list[list[AlgorithmResult]], now: int, ahead: int | None) -> Decision:
        """The decision that reports the limit with the least left; of those that deny, where any does."""
        denied = any(state is None for each in outcomes for state, *_ in each)
        least, limit, reset = min(
            (
                (remaining, limit, reset)
                for (limits, _), own in zip(counters, outcomes, strict=True)
                for limit, (state, remaining, reset, _) in zip(limits.limits, own, strict=True)
                if (state is None) is denied
            ),
            key=lambda each: each[0],
        )
        if denied:
            return Decision(False, limit, least, reset, ahead, now, counters[0][0])
        return Decision(True, limit, least, (ahead or 0) + reset, 0, now, counters[0][0])


def _latest(retries: list[int | None]) -> int | None:
    """When all of these have come, µs; None where one of them never does."""
    known = [retry for retry in retries if retry is not None]
    return max(known) if len(known) == len(retries) else None
