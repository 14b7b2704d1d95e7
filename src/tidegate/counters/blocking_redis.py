"""Counters on Redis for code without an event loop, with the keys and scripts of `RedisCounters`: both kinds of processes count
together. Thread-safe.

While Redis is unavailable the fallback decides as in `guarded`: per limit set `local`, `allow` or `deny`; what was admitted
locally is added to Redis with the first calls after it is back. Nothing runs in the background: a heartbeat, which gives the
number of instances for local shares, is sent by a call when the last one is a second old.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

from tidegate.breaker import Breaker
from tidegate.counters import Charge, ChargeOutcome, Counters
from tidegate.counters.degraded import GuardOptions
from tidegate.counters.fallback import LocalShares
from tidegate.counters.forks import FORKS
from tidegate.counters.holds import HoldHandle, HoldSettlement, new_id
from tidegate.counters.redis import heartbeat
from tidegate.counters.redis.blocking import BlockingRedisCounters
from tidegate.counters.redis.blocking_connection import run_blocking
from tidegate.counters.reservations import Reservation, decided_now
from tidegate.decision import Decision
from tidegate.errors import StoreUnavailable
from tidegate.policy.limits import LimitSet, OnFailure

logger = logging.getLogger(__name__)

_SETTLE_BATCH: Final = 50
_MAX_BREAKERS: Final = 1000
_SETTLE_ATTEMPTS: Final = 3


class BlockingRedis:
    """Counters on Redis for threads, with a circuit breaker for each shard and a fallback.

    Args:
        store: the connections; `disconnect` closes them.
    """

    def __init__(self, store: BlockingRedisCounters, options: GuardOptions | None = None) -> None:
        self.store = store
        self.options = options or GuardOptions()
        self.instances = self.options.min_instances
        self._lock = threading.RLock()
        self._breakers: dict[str, Breaker] = {}
        self._offset_us = time.time_ns() // 1000 - time.monotonic_ns() // 1000
        self._latest_us = 0
        self._local = LocalShares(self.options.max_subjects, self._store_now_us)
        self._process = 0
        self._instance = ""
        self._beat_due = 0.0
        self._resets: int | None = None
        self._peers_know_leases = False
        self.on_reset: Callable[[], None] | None = None
        """Called when counters were reset, here or elsewhere."""
        self.take_lease_usage: Callable[[Counters], int] | None = None
        """See `LeaseGrantor`."""
        self._announce_due = False
        """Whether units came back that remembered denials of other instances do not know of."""
        FORKS.add(self)

    def forked(self) -> None:
        """See `OfOneProcess`: what was admitted without Redis is owed by the parent."""
        self._lock = threading.RLock()
        self._local = LocalShares(self.options.max_subjects, self._store_now_us)
        self._beat_due = 0.0

    @property
    def owed(self) -> int:
        """Counters that are still to be added to Redis."""
        return len(self._local.owed)

    @property
    def grants(self) -> bool:
        """Whether leases can be granted: Redis answers, and every instance that counts there has a version with leases."""
        return self._peers_know_leases and not self._breakers and not self._local.owed

    def charge_one(self, limits: LimitSet, subject: str, cost: int) -> Decision:
        """See `BlockingCounterStore`. Costs about 25 µs beside the round trip."""
        outcome = self.charge_many((Charge(((limits, subject),), cost),))[0]
        if isinstance(outcome, StoreUnavailable):
            raise outcome
        return outcome

    def charge_many(self, charges: Sequence[Charge]) -> Sequence[ChargeOutcome]:
        """See `BlockingCounterStore`."""
        self.beat_if_due()
        if not self._breakers and not self._local.owed and not self._local.unanswered:
            if len(charges) == 1:
                try:
                    return (run_blocking(self.store.charge_one(charges[0])),)
                except StoreUnavailable as error:
                    return (self._failed(charges[0], error),)
            outcomes = run_blocking(self.store.charge(charges))
            return [
                self._failed(charge, outcome) if isinstance(outcome, StoreUnavailable) else outcome
                for charge, outcome in zip(charges, outcomes, strict=True)
            ]
        return [self._charge_after_failure(charge) for charge in charges]

    def open_hold_now(
        self, counters: Counters, cost: int, ttl_us: int, rule: str | None = None
    ) -> tuple[Decision, HoldHandle | None]:
        """See `HoldingCounterStore.open_hold`; while Redis is unavailable as `guarded_holds` does it."""
        self.beat_if_due()
        charge = Charge(counters, cost)
        if not self._breakers and not self._local.owed:
            try:
                return run_blocking(self.store.open_hold(counters, cost, ttl_us, rule))
            except StoreUnavailable as error:
                outcome = self._failed(charge, error)
        else:
            # A peek finds out whether the store answers again, and adds what is owed to it.
            outcome = self._charge_after_failure(Charge(counters, 0))
            if isinstance(outcome, Decision):
                if not outcome.degraded:
                    return run_blocking(self.store.open_hold(counters, cost, ttl_us, rule))
                outcome = self._fallback(charge, None)
        if isinstance(outcome, StoreUnavailable):
            raise outcome
        return outcome, HoldHandle(new_id(), cost, rule, counted=False) if outcome.allowed else None

    def settle_hold_now(self, handle: HoldHandle, cost: int) -> HoldSettlement:
        """See `HoldingCounterStore.settle_hold`; asynchronous instances drop their remembered denials within a second."""
        refunds = self.store.refunds
        for attempt in range(_SETTLE_ATTEMPTS):
            try:
                settled = run_blocking(self.store.settle_hold(handle, cost))
                break
            except StoreUnavailable:
                # Safe to send again: what was settled is not settled twice.
                if attempt == _SETTLE_ATTEMPTS - 1:
                    raise
        if self.store.refunds != refunds:
            self._announce_due = True
        return settled

    def renew_hold_now(self, handle: HoldHandle, ttl_us: int) -> None:
        """See `HoldingCounterStore.renew_hold`."""
        run_blocking(self.store.renew_hold(handle, ttl_us))

    def reset_many(self, counters: Sequence[tuple[LimitSet, str]]) -> None:
        """See `BlockingCounterStore`; asynchronous instances drop their remembered denials within a second."""
        with self._lock:
            for limits, subject in counters:
                self._local.forget(limits, subject)
        run_blocking(self.store.reset(counters))
        run_blocking(heartbeat.announce_reset(self.store))

    def reserve_blocking(self, counters: Counters, cost: int, ahead_us: int) -> Reservation:
        """See `BlockingReservingStore`; while Redis is unavailable, the fallback decides whether the caller may go now."""
        charge = Charge(counters, cost)
        self.beat_if_due()
        if self._breakers or self._local.owed:
            outcome = self._charge_after_failure(charge)
        else:
            try:
                return run_blocking(self.store.reserve(counters, cost, ahead_us))
            except StoreUnavailable as error:
                outcome = self._failed(charge, error)
        if isinstance(outcome, StoreUnavailable):
            raise outcome
        return decided_now(outcome, counters, cost)

    def release_blocking(self, reservation: Reservation) -> bool:
        """See `BlockingReservingStore`; asynchronous instances drop their remembered denials within a second."""
        whole = run_blocking(self.store.release(reservation))
        run_blocking(heartbeat.announce_reset(self.store))
        return whole

    def disconnect(self) -> None:
        """See `BlockingCounterStore`: what was admitted during an outage is added first, if Redis can be reached."""
        try:
            while self.owed and self._settle(self._local.oldest(_SETTLE_BATCH)):
                pass
            if self._instance and self._process == os.getpid():
                run_blocking(heartbeat.leave(self.store, self._instance))
        except StoreUnavailable as error:
            logger.debug("Redis does not answer at shutdown: %s", error)
        if self.owed:
            logger.warning("usage of %d counters during an outage was not added to Redis before shutdown", self.owed)
        run_blocking(self.store.close())

    # While shards fail, and after.

    def _charge_after_failure(self, charge: Charge) -> ChargeOutcome:
        limits, subject = charge.counters[0]
        shard = self.store.shard_of(subject)
        with self._lock:
            breaker = self._breakers.get(shard)
            if breaker is not None and not breaker.admits(time.monotonic()):
                return self._fallback(charge, None)
        if self._local.owes(limits, subject) and not self._settle([(limits, subject)]):
            return self._fallback(charge, None)
        try:
            decision = run_blocking(self.store.charge_one(charge))
        except StoreUnavailable as error:
            return self._failed(charge, error)
        with self._lock:
            self._breakers.pop(shard, None)
            self._local.answered(charge.counters)
            owed = [] if self._breakers else self._local.oldest(_SETTLE_BATCH)
        if owed:
            self._settle(owed)
        return decision

    def _failed(self, charge: Charge, error: StoreUnavailable) -> ChargeOutcome:
        shard = str(error.details.get("shard") or self.store.shard_of(charge.counters[0][1]))
        now = time.monotonic()
        with self._lock:
            if shard not in self._breakers and len(self._breakers) >= _MAX_BREAKERS:
                self._breakers.clear()
            breaker = self._breakers.setdefault(shard, Breaker(self.options.breaker))
            before = breaker.opened
            breaker.failed(now, None, error.message)
            if breaker.opened > before:
                logger.warning(
                    "circuit breaker opened for Redis shard %s, retrying in %g s: %s",
                    shard,
                    breaker.options.open_s,
                    error.message,
                )
        return self._fallback(charge, error)

    def _fallback(self, charge: Charge, error: StoreUnavailable | None) -> ChargeOutcome:
        limits = charge.counters[0][0]
        on_failure = self.options.on_failure if limits.on_failure is OnFailure.DEFAULT else limits.on_failure
        if on_failure is OnFailure.DENY:
            return error or StoreUnavailable(
                'the counter store does not answer, and this limit has on_failure = "deny"', reason="breaker_open"
            )
        if on_failure is OnFailure.ALLOW:
            limit = limits.limits[0]
            left = max(limit.capacity - charge.cost, 0)
            return Decision(True, limit, left, 0, 0, self._store_now_us(), limits, degraded=True)
        with self._lock:
            if self.take_lease_usage is not None and (used := self.take_lease_usage(charge.counters)):
                # Charged in a store that may be lost: a lease and a share together admit no more than a share alone.
                self._local.count(charge, used, self.instances)
            return self._local.charge(charge, self.instances)

    def _settle(self, counters: Sequence[tuple[LimitSet, str]]) -> bool:
        """Add to Redis what was admitted without it. Returns whether all of these were added."""
        with self._lock:
            taken = [(limits, subject, self._local.take(limits, subject)) for limits, subject in counters]
        owed = [(limits, subject, states) for limits, subject, states in taken if states is not None]
        if not owed:
            return True
        try:
            outcomes = run_blocking(self.store.absorb(owed))
        except StoreUnavailable as error:
            outcomes = [error] * len(owed)
        with self._lock:
            for (limits, subject, states), failure in zip(owed, outcomes, strict=True):
                if failure is not None:
                    self._local.give_back(limits, subject, states)
        return not any(outcomes)

    def beat_if_due(self) -> None:
        """Send the heartbeat, where the last one is a second old."""
        now = time.monotonic()
        if now >= self._beat_due:
            self._beat(now)

    def _beat(self, now: float) -> None:
        """Send the heartbeat and learn how many instances there are."""
        with self._lock:
            if now < self._beat_due:
                return
            self._beat_due = now + heartbeat.INTERVAL_S
            if self._process != os.getpid():
                self._process = os.getpid()
                self._instance = f"{os.uname().nodename}:{self._process}:{secrets.token_hex(4)}"
            if any(not breaker.is_idle(now) for breaker in self._breakers.values()):
                return
        before_us = time.monotonic_ns() // 1000
        try:
            if self._announce_due:
                self._announce_due = False
                run_blocking(heartbeat.announce_reset(self.store))
            beat = run_blocking(heartbeat.beat(self.store, self._instance))
        except StoreUnavailable as error:
            # The charge that follows finds out by itself, and counts the failure.
            logger.debug("no heartbeat: %s", error)
            return
        self.instances = max(beat.instances, self.options.min_instances)
        self._peers_know_leases = not beat.without_leases
        reset = self._resets is not None and beat.resets != self._resets
        self._resets = beat.resets
        if (reset or not self._peers_know_leases) and self.on_reset is not None:
            self.on_reset()
        self._offset_us = beat.at_us - (before_us + time.monotonic_ns() // 1000) // 2

    def _store_now_us(self) -> int:
        """Estimate of the store's clock; never goes back."""
        self._latest_us = max(self._latest_us, time.monotonic_ns() // 1000 + self._offset_us)
        return self._latest_us
