"""A counter store that may be away, guarded: a deadline on every call, a breaker a shard, a fallback for each rule.

While the store is well, this adds a look at the denials that are remembered. When a call fails, or the breaker of its shard is
open, the rule says what holds: `local` counts in memory at this instance's share of the limit, `allow` lets pass, `deny` refuses
with `StoreUnavailable`. All such decisions are degraded, and counted by reason.

When a shard is back, what was admitted locally is added to its counters: for a subject before it is asked about again by this
instance, for all others in the background. Where it is not known whether the store took it (an answer that did not come), it is
added again: an outage may cost a subject units, it never gives any.

One event loop; any number of its tasks.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Sequence
from typing import Final

import msgspec

from tidegate.algorithms import State
from tidegate.background import SUPERVISOR, stop
from tidegate.breaker import Breaker, BreakerOptions, BreakerState
from tidegate.counters import Charge, Outcome
from tidegate.counters.denials import DenialMemory
from tidegate.counters.local_shares import LocalShares
from tidegate.counters.redis import heartbeat
from tidegate.counters.redis.store import RedisCounters
from tidegate.decision import Decision
from tidegate.errors import StoreUnavailable
from tidegate.latency import LatencyTally
from tidegate.limits import LimitSet, OnFailure

logger = logging.getLogger(__name__)

_AT_ONCE: Final = 200
_SWEEP_STEPS: Final = 2000
_BREAKERS_KEPT: Final = 1000


class GuardOptions(msgspec.Struct, frozen=True):
    """How a store is guarded.

    Args:
        on_failure: for limits that say `default`.
        breaker: when a shard is left alone.
        min_instances: at least so many share the limits, also while none was heard of, 1 or more.
        max_subjects: most counters of the fallback.
    """

    on_failure: OnFailure = OnFailure.LOCAL
    breaker: BreakerOptions = BreakerOptions()
    min_instances: int = 1
    max_subjects: int = 1_000_000


class GuardedCounters:
    """The counters of an instance that shares a Redis with others.

    Args:
        store: what is guarded; this takes it over, its end included.
        options: see there.
        instance: a name that no other instance has; made where not given.
    """

    def __init__(self, store: RedisCounters, options: GuardOptions | None = None, instance: str | None = None) -> None:
        self.store = store
        self.options = options or GuardOptions()
        self.instance = instance or f"{os.uname().nodename}:{os.getpid()}:{secrets.token_hex(4)}"
        self.instances = self.options.min_instances
        self.degraded: dict[str, int] = {}
        """Decisions made without the store, by reason."""
        self.put_back = 0
        """Counters added to the store after an outage."""
        self.latency = LatencyTally()
        """Of calls to the store that were answered, or given up at their deadline."""
        self.denials = DenialMemory()
        self.breakers: dict[str, Breaker] = {}
        self._local = LocalShares(self.options.max_subjects, self._store_now_us)
        self._offset_us = time.time_ns() // 1000 - time.monotonic_ns() // 1000
        self._latest_us = 0
        self._resets: int | None = None
        self._beating: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        """In which it has started; None before."""

    @property
    def owed(self) -> int:
        """Counters that are still to be added to the store."""
        return len(self._local.owed)

    @property
    def open_breakers(self) -> int:
        """Shards that are left alone now."""
        return sum(breaker.state is not BreakerState.CLOSED for breaker in self.breakers.values())

    async def start(self) -> None:
        """Connect, in the running event loop, anew where it is another one than before; does not fail where the store is away."""
        if self._beating is None or self._beating.get_loop() is not asyncio.get_running_loop():
            self._stop_beating_elsewhere()
            self._beating = SUPERVISOR.start("redis_heartbeat", self._beat)
        # All who come before it is connected wait for the same attempt.
        await self.store.start()
        self._loop = asyncio.get_running_loop()

    async def charge(self, charges: Sequence[Charge]) -> Sequence[Outcome]:
        """See `CounterStore.charge`."""
        if self._loop is not asyncio.get_running_loop():
            await self.start()
        if len(charges) != 1:
            return await self._charge_many(charges)
        charge = charges[0]
        asked_ns = time.monotonic_ns()
        asked_us = asked_ns // 1000
        if self.denials:
            denied = self.denials.find(charge.counters, charge.cost, asked_us)
            if denied is not None:
                return (denied,)
        if self.breakers or self._local.owed:
            return await self._charge_many(charges)
        try:
            decision = await self.store.charge_one(charge)
        except StoreUnavailable as error:
            if error.details.get("reason") == "timeout":
                self.latency.add(time.monotonic_ns() - asked_ns)
            return (self._failed(charge, error),)
        self.latency.add(time.monotonic_ns() - asked_ns)
        if not decision.allowed:
            self.denials.remember(charge.counters, charge.cost, decision, asked_us)
        return (decision,)

    async def windows(self, counters: Sequence[tuple[LimitSet, str]]) -> Sequence[Sequence[Decision] | None]:
        """See `CounterStore.windows`; of the store alone, for the fallback has shares of the limits and not the limits."""
        if self._loop is not asyncio.get_running_loop():
            await self.start()
        return await self.store.windows(counters)

    async def reset(self, counters: Sequence[tuple[LimitSet, str]]) -> None:
        """See `CounterStore.reset`; the other instances forget their remembered denials within a second."""
        if self._loop is not asyncio.get_running_loop():
            await self.start()
        for limits, subject in counters:
            self._local.forget(limits, subject)
        await self.store.reset(counters)
        self.denials.clear()
        await heartbeat.announce_reset(self.store)

    async def ping(self) -> None:
        """See `CounterStore.ping`."""
        await self.store.ping()

    async def close(self) -> None:
        """See `CounterStore.close`: what is owed is put back first, as far as the store can be reached."""
        self._loop = None
        if self._beating is not None and self._beating.get_loop() is asyncio.get_running_loop():
            await stop(self._beating)
            self._beating = None
        self._stop_beating_elsewhere()
        if self.store.started:
            try:
                # Whatever the breakers say: nobody will ask again.
                await self._probe_debtors(last=True)
                await self._settle_debts()
                await heartbeat.leave(self.store, self.instance)
            except StoreUnavailable as error:
                logger.debug("the store does not answer at the end: %s", error)
            if self.owed:
                logger.warning("%d counters of an outage could not be put back", self.owed)
        await self.store.close()

    def _stop_beating_elsewhere(self) -> None:
        """The heartbeat of another event loop: cancelled there, if that loop runs again."""
        beating, self._beating = self._beating, None
        if beating is not None and not beating.done() and not beating.get_loop().is_closed():
            beating.get_loop().call_soon_threadsafe(beating.cancel)

    # Many, or in trouble.

    async def _charge_many(self, charges: Sequence[Charge]) -> list[Outcome]:
        answers: list[Outcome | None] = [None] * len(charges)
        asked_us = time.monotonic_ns() // 1000
        now = asked_us / 1e6
        open_places: list[int] = []
        for place, charge in enumerate(charges):
            denied = self.denials.find(charge.counters, charge.cost, asked_us) if self.denials else None
            if denied is not None:
                answers[place] = denied
            elif self.breakers and not self._admits(charge, now):
                answers[place] = self._fallback(charge, "breaker_open")
            else:
                open_places.append(place)
        if open_places and self._local.owed:
            open_places = await self._settle_first(charges, open_places, answers)
        if open_places:
            started_ns = time.monotonic_ns()
            decided = await self.store.charge([charges[place] for place in open_places])
            # One call, however many charges; what failed at once says nothing of the store's speed.
            if any(not isinstance(each, StoreUnavailable) or each.details.get("reason") == "timeout" for each in decided):
                self.latency.add(time.monotonic_ns() - started_ns)
            for place, outcome in zip(open_places, decided, strict=True):
                charge = charges[place]
                if isinstance(outcome, StoreUnavailable):
                    answers[place] = self._failed(charge, outcome)
                    continue
                answers[place] = outcome
                if self.breakers:
                    self._succeeded(charge)
                if not outcome.allowed:
                    self.denials.remember(charge.counters, charge.cost, outcome, asked_us)
        return [answer for answer in answers if answer is not None]

    async def _settle_first(self, charges: Sequence[Charge], places: list[int], answers: list[Outcome | None]) -> list[int]:
        """Put back what the subjects of some charges are owed for, before these are asked. Gives the places left to ask."""
        owing = {counter for place in places for counter in charges[place].counters if self._local.owes(*counter)}
        if not owing:
            return places
        try:
            await self._put_back(list(owing))
        except StoreUnavailable as error:
            left = []
            for place in places:
                if owing.isdisjoint(charges[place].counters):
                    left.append(place)
                else:
                    answers[place] = self._failed(charges[place], error)
            return left
        return places

    def _admits(self, charge: Charge, now: float) -> bool:
        for shard in self._shards(charge):
            breaker = self.breakers.get(shard)
            if breaker is not None and not breaker.admits(now):
                return False
        return True

    def _shards(self, charge: Charge) -> set[str]:
        return {self.store.shard_of(subject) for _, subject in charge.counters}

    def _succeeded(self, charge: Charge) -> None:
        for shard in self._shards(charge):
            self._answered(shard)

    def _answered(self, shard: str) -> None:
        breaker = self.breakers.get(shard)
        if breaker is not None:
            if breaker.state is not BreakerState.CLOSED:
                logger.info("Redis shard %s is asked again", shard, extra={"ecs": {"tidegate.shard": shard}})
            breaker.succeeded()

    def _failed(self, charge: Charge, error: StoreUnavailable) -> Outcome:
        """A call failed: tell the breaker, and answer in the store's place."""
        now = time.monotonic()
        for shard in self._shards(charge):
            breaker = self.breakers.get(shard)
            if breaker is None:
                if len(self.breakers) >= _BREAKERS_KEPT:
                    self.breakers.clear()
                breaker = self.breakers[shard] = Breaker(self.options.breaker)
            was = breaker.state
            breaker.failed(now, error.details.get("event"))
            if breaker.state is BreakerState.OPEN and was is not BreakerState.OPEN:
                logger.error(
                    "Redis shard %s is left alone for %g s: %s",
                    shard,
                    breaker.options.open_s,
                    error,
                    extra={"ecs": {"tidegate.shard": shard, "error.code": error.code}},
                )
        return self._fallback(charge, str(error.details.get("reason", "error")), error)

    def _fallback(self, charge: Charge, reason: str, error: StoreUnavailable | None = None) -> Outcome:
        self.degraded[reason] = self.degraded.get(reason, 0) + 1
        limits = charge.counters[0][0]
        on_failure = self.options.on_failure if limits.on_failure is OnFailure.DEFAULT else limits.on_failure
        if on_failure is OnFailure.DENY:
            return error or StoreUnavailable(
                "the counter store does not answer, and this rule denies while it does not", reason=reason
            )
        if on_failure is OnFailure.ALLOW:
            limit = limits.limits[0]
            return Decision(True, limit, max(limit.capacity - charge.cost, 0), 0, 0, self._store_now_us(), limits, degraded=True)
        return self._local.charge(charge, self.instances)

    # Debts.

    async def _put_back(self, counters: Sequence[tuple[LimitSet, str]]) -> None:
        taken: list[tuple[LimitSet, str, tuple[State, ...]]] = []
        for limits, subject in counters:
            states = self._local.take(limits, subject)
            if states is not None:
                taken.append((limits, subject, states))
        await self._absorb(taken)

    async def _absorb(self, taken: Sequence[tuple[LimitSet, str, tuple[State, ...]]]) -> None:
        """Add to the store what was taken out of the shares; what it does not take is owed again."""
        try:
            await self.store.absorb(taken)
        except (StoreUnavailable, asyncio.CancelledError):
            for each in taken:
                self._local.give_back(*each)
            raise
        self.put_back += len(taken)

    async def _settle_debts(self) -> None:
        """Put back all that is owed to shards that are asked."""
        while self._local.owed:
            now = time.monotonic()
            some = []
            for limits, subject in self._local.debts():
                breaker = self.breakers.get(self.store.shard_of(subject))
                if breaker is None or breaker.state is BreakerState.CLOSED:
                    some.append((limits, subject))
                    if len(some) == _AT_ONCE:
                        break
            if not some:
                return
            await self._put_back(some)
            logger.debug("put back %d counters in %.3f s", len(some), time.monotonic() - now)

    async def _probe_debtors(self, last: bool = False) -> None:
        """Let something owed be the probe of each shard that is left alone: checks may never come again to be it.

        Args:
            last: whether shards are asked although their time has not come.
        """
        now = time.monotonic()
        due = {
            shard
            for shard, breaker in self.breakers.items()
            if breaker.state is not BreakerState.CLOSED and (last or breaker.is_due(now))
        }
        probes: list[tuple[str, tuple[LimitSet, str, tuple[State, ...]]]] = []
        for limits, subject in list(self._local.debts()) if due else ():
            shard = self.store.shard_of(subject)
            if shard in due and (states := self._local.take(limits, subject)) is not None:
                self.breakers[shard].admits(now)
                probes.append((shard, (limits, subject, states)))
                due.discard(shard)
        for shard, owed in probes:
            try:
                await self._absorb([owed])
            except StoreUnavailable as error:
                if (breaker := self.breakers.get(shard)) is not None:
                    breaker.failed(time.monotonic(), error.details.get("event"))
            else:
                self._answered(shard)

    # What goes on beside.

    async def _beat(self) -> None:
        await self.store.start()
        while True:
            before_us = time.monotonic_ns() // 1000
            try:
                told = await heartbeat.beat(self.store, self.instance)
                self.instances = max(told.instances, self.options.min_instances)
                self._offset_us = told.at_us - (before_us + time.monotonic_ns() // 1000) // 2
                if self._resets is not None and told.resets != self._resets:
                    self.denials.clear()
                self._resets = told.resets
            except StoreUnavailable as error:
                # The breaker is told by checks and debts alone; what was learnt before stays.
                logger.debug("no heartbeat: %s", error)
            try:
                # Also without a heartbeat: the shard that it lies on may be another one's.
                await self._probe_debtors()
                await self._settle_debts()
            except StoreUnavailable as error:
                logger.debug("nothing could be put back: %s", error)
            now_us = time.monotonic_ns() // 1000
            self.denials.sweep(now_us)
            self._local.sweep(_SWEEP_STEPS)
            self._forget_closed_breakers(now_us / 1e6)
            await asyncio.sleep(heartbeat.BEAT_S)

    def _forget_closed_breakers(self, now: float) -> None:
        """A breaker that is closed and has seen no failure for long is as good as none; without any, the hot path is shorter."""
        for shard, breaker in list(self.breakers.items()):
            if breaker.is_idle(now):
                del self.breakers[shard]

    def _store_now_us(self) -> int:
        """The store's clock, as far as it is known; never goes back."""
        self._latest_us = max(self._latest_us, time.monotonic_ns() // 1000 + self._offset_us)
        return self._latest_us
