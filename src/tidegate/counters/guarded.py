"""A counter store that may be away, guarded: a deadline on every call, a breaker a shard, a fallback for each rule.

While the store is healthy, this adds a look at the denials that are remembered. When a call fails, or the breaker of its shard
is open, the rule says what holds: `local` counts in memory at this instance's share of the limit, `allow` lets pass, `deny`
refuses with `StoreUnavailable`. All such decisions are degraded, and counted by reason.

A shard that answers late is slow, not away: its breaker stays closed, and what it says late is taken into account
(`late_answers`).

When a shard is back, what was admitted locally is added to its counters: for a subject before it is asked about again by this
instance, for all others in the background (`recovery`). Where it is not known whether the store took it (the connection was lost
first), it is added again: an outage may cost a subject units, it never gives any.

One event loop; any number of its tasks.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from threading import get_ident
from typing import Final

import msgspec

from tidegate.background import SUPERVISOR, stop
from tidegate.breaker import Breaker, BreakerOptions
from tidegate.counters import Charge, ChargeOutcome, LateAnswer
from tidegate.counters.denial_cache import DenialCache
from tidegate.counters.fallback import LocalShares
from tidegate.counters.late_answers import RETRY_US, LateAnswers
from tidegate.counters.recovery import Breakers, Debts
from tidegate.counters.redis import heartbeat
from tidegate.counters.redis.store import RedisCounters
from tidegate.decision import Decision
from tidegate.errors import StoreUnavailable
from tidegate.latency import LatencyHistogram
from tidegate.policy.limits import Algorithm, LimitSet, OnFailure

logger = logging.getLogger(__name__)

_SWEEP_STEPS: Final = 2000
_SLOW: Final = frozenset(("migrating", "busy", "noscript"))
"""Reasons of a shard that is alive and could not charge within the deadline: its breaker stays closed."""
_RECOVER_S: Final = 0.25
_LAST_ANSWERS_S: Final = 0.5
"""How long the end of an instance waits for answers that are late."""


class GuardOptions(msgspec.Struct, frozen=True):
    """How a store is guarded.

    Args:
        on_failure: for limits that say `default`.
        breaker: when calls to a shard stop, and for how long.
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
        self.latency = LatencyHistogram()
        """Of calls to the store that were answered, or given up at their deadline."""
        self.denials = DenialCache()
        self._denied = self.denials.entries  # whether there are any: a `len` in Python costs ten times as much
        self._breakers = Breakers(store, self.options.breaker)
        self.breakers: dict[str, Breaker] = self._breakers.by_shard
        self._local = LocalShares(self.options.max_subjects, self._store_now_us)
        self._debts = Debts(store, self._local, self.breakers)
        self.late = LateAnswers(_now_us, self._answered_late)
        self._offset_us = time.time_ns() // 1000 - time.monotonic_ns() // 1000
        self._latest_us = 0
        self._resets: int | None = None
        self._refunds = 0
        self._cleared_us = 0
        self._background: list[asyncio.Task[None]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        """In which it has started; None before."""
        self._thread = 0

    @property
    def owed(self) -> int:
        """Counters that are still to be added to the store."""
        return len(self._local.owed)

    @property
    def put_back(self) -> int:
        """Counters added to the store after an outage."""
        return self._debts.put_back

    @property
    def open_breakers(self) -> int:
        """Shards that are not called now."""
        return len(self._breakers.open)

    async def start(self) -> None:
        """Connect, in the running event loop, anew where it is another one than before; does not fail where the store is away."""
        if not self._background or self._background[0].get_loop() is not asyncio.get_running_loop():
            self._stop_elsewhere()
            # Each by itself: a debt of minutes must not keep the heartbeat from its turn.
            self._background = [
                SUPERVISOR.start("redis_heartbeat", partial(_repeat, self._heartbeat, heartbeat.INTERVAL_S)),
                SUPERVISOR.start("redis_recovery", partial(_repeat, self._recover, _RECOVER_S)),
            ]
        # All who come before it is connected wait for the same attempt.
        await self.store.start()
        self._loop, self._thread = asyncio.get_running_loop(), get_ident()

    async def charge(self, charges: Sequence[Charge]) -> Sequence[ChargeOutcome]:
        """See `CounterStore.charge`."""
        # Before Python 3.12 `get_running_loop` costs a system call, as much as all that is decided here. A loop that runs in this
        # thread is the one that runs this.
        loop = self._loop
        if loop is None or not loop.is_running() or get_ident() != self._thread:
            await self.start()
        if len(charges) != 1:
            return await self._charge_many(charges)
        charge = charges[0]
        started_ns = time.monotonic_ns()
        if self.breakers or self._local.owed or self.late.prepaid or self._debts.on_the_way:
            return await self._charge_many(charges)
        if self._denied:
            denied = self.denials.find(charge.counters, charge.cost, started_ns // 1000)
            if denied is not None:
                return (denied,)
        try:
            decision = await self.store.charge_one(charge, started_ns)
        except StoreUnavailable as error:
            if error.details.get("reason") == "timeout":
                self.latency.add(time.monotonic_ns() - started_ns)
            return (self._failed(charge, error, started_ns // 1000),)
        self.latency.add(time.monotonic_ns() - started_ns)
        self._remember(charge, decision, started_ns // 1000)
        return (decision,)

    def _remember(self, charge: Charge, decision: Decision, started_us: int) -> None:
        """Remember a denial; and that little remains, for a deadline that passes later."""
        if not decision.allowed:
            if started_us >= self._cleared_us:
                self.denials.remember(charge.counters, charge.cost, decision, started_us)
        elif (
            decision.binding is None
            or decision.remaining is None
            or decision.remaining * 2 >= (decision.binding.burst or decision.binding.amount)
        ):
            return
        self.late.observe(charge.counters, decision)

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
        self._clear_remembered()
        await heartbeat.announce_reset(self.store)

    async def ping(self) -> None:
        """See `CounterStore.ping`: every shard decides checks, and none is left out because it failed."""
        await self.store.ping()
        for shard, why in self._breakers.open.items():
            raise StoreUnavailable(f"circuit breaker open for Redis shard {shard}: {why}", reason="breaker_open", shard=shard)

    async def close(self) -> None:
        """See `CounterStore.close`: what is owed is put back first, as far as the store can be reached."""
        self._loop = None
        if self._background and self._background[0].get_loop() is asyncio.get_running_loop():
            await stop(*self._background)
            self._background = []
            await self.late.close(_LAST_ANSWERS_S)
        self._stop_elsewhere()
        if self.store.started:
            try:
                # Whatever the breakers say: nobody will ask again.
                await self._breakers.probe(time.monotonic, every=True)
                await self._debts.settle()
                await heartbeat.leave(self.store, self.instance)
            except StoreUnavailable as error:
                logger.debug("the store does not answer at shutdown: %s", error)
            if self.owed:
                logger.warning("usage of %d counters during an outage was not added to Redis before shutdown", self.owed)
        await self.store.close()

    def _stop_elsewhere(self) -> None:
        """What runs beside in another event loop: cancelled there, if that loop runs again."""
        beside, self._background = self._background, []
        for task in beside:
            if not task.done() and not task.get_loop().is_closed():
                task.get_loop().call_soon_threadsafe(task.cancel)

    # Many, or in trouble.

    async def _charge_many(self, charges: Sequence[Charge]) -> list[ChargeOutcome]:
        answers: list[ChargeOutcome | None] = [None] * len(charges)
        started_ns = time.monotonic_ns()
        started_us = started_ns // 1000
        now = started_us / 1e6
        undecided: list[int] = []
        for place, charge in enumerate(charges):
            answer = self.late.take_prepaid(charge) if self.late.prepaid else None
            if answer is None and self.denials:
                answer = self.denials.find(charge.counters, charge.cost, started_us)
            if answer is not None:
                answers[place] = answer
            elif self.breakers and not self._breakers.admit(self._shards(charge), now):
                answers[place] = self._fallback(charge, "breaker_open")
            else:
                undecided.append(place)
        if undecided and (self._local.owed or self._debts.on_the_way):
            undecided = await self._put_back_first(charges, undecided, answers, started_us)
        if undecided:
            sent_ns = time.monotonic_ns()
            decided = await self.store.charge([charges[place] for place in undecided], started_ns)
            # One call, however many charges; what failed at once says nothing of the store's speed.
            if any(not isinstance(each, StoreUnavailable) or each.details.get("reason") == "timeout" for each in decided):
                self.latency.add(time.monotonic_ns() - sent_ns)
            for place, outcome in zip(undecided, decided, strict=True):
                charge = charges[place]
                if isinstance(outcome, StoreUnavailable):
                    answers[place] = self._failed(charge, outcome, started_us)
                    continue
                answers[place] = outcome
                if self.breakers:
                    for shard in self._shards(charge):
                        self._breakers.succeeded(shard, time.monotonic())
                self._remember(charge, outcome, started_us)
        return [answer for answer in answers if answer is not None]

    async def _put_back_first(
        self, charges: Sequence[Charge], places: list[int], answers: list[ChargeOutcome | None], started_us: int
    ) -> list[int]:
        """Put back what the subjects of some charges owe, before these are asked. Gives the places left to ask."""
        counters = [counter for place in places for counter in charges[place].counters]
        deadline = started_us / 1e6 + 1.1 * self.store.timeout_s
        coming = {counter: done for counter in counters if (done := self._debts.on_the_way.get(_name(*counter))) is not None}
        if coming:
            await asyncio.wait(set(coming.values()), timeout=max(deadline - time.monotonic(), 0))
        late = {counter for counter, done in coming.items() if not done.done()}
        owing = {counter for counter in counters if self._local.owes(*counter)}
        error = StoreUnavailable("usage during the outage was not added to Redis within the deadline", reason="timeout")
        if owing:
            # Goes on past the deadline of these checks: only its end says whether the debts are paid.
            putting = asyncio.ensure_future(self._debts.put_back_of(list(owing)))
            putting.add_done_callback(lambda done: None if done.cancelled() else done.exception())
            await asyncio.wait((putting,), timeout=max(deadline - time.monotonic(), 0))
            failure = putting.exception() if putting.done() else error
            if isinstance(failure, StoreUnavailable):
                error = failure
            elif failure is not None:
                raise failure
            else:
                owing.clear()
        owing |= late
        if not owing:
            return places
        remaining = []
        for place in places:
            if owing.isdisjoint(charges[place].counters):
                remaining.append(place)
            else:
                answers[place] = self._failed(charges[place], error, started_us)
        return remaining

    def _shards(self, charge: Charge) -> list[str]:
        return list({self.store.shard_of(subject) for _, subject in charge.counters})

    def _failed(self, charge: Charge, error: StoreUnavailable, started_us: int) -> ChargeOutcome:
        """A call failed: the breaker of the shard that failed counts it, and the rule's fallback answers."""
        if isinstance(error, LateAnswer):
            return self._decide_at_deadline(charge, error, started_us)
        reason = str(error.details.get("reason", "error"))
        if reason in _SLOW:
            return self._decide_uncharged(charge, reason, error)
        shards = self._shards(charge) if self.breakers or "shard" not in error.details else []
        failed = error.details.get("shard")
        # The shard that was called, which need not be the one that counts the subject by now.
        for shard in [str(failed)] if failed else shards:
            self._breakers.failed(shard, error, time.monotonic())
        if failed:
            self._breakers.release([shard for shard in shards if shard != failed])
        return self._fallback(charge, reason, error)

    def _decide_uncharged(self, charge: Charge, reason: str, error: StoreUnavailable) -> ChargeOutcome:
        """The deadline passed before a shard that is not away could charge: admit as for a late answer, and owe it."""
        if self.breakers:
            self._breakers.release(self._shards(charge))
        if self._on_failure(charge) is not OnFailure.LOCAL:
            return self._fallback(charge, reason, error)
        allowed = not charge.cost or self.late.may_admit(charge, self.instances)
        if allowed:
            return self._fallback(charge, reason, error)
        self.degraded[reason] = self.degraded.get(reason, 0) + 1
        share = self._local.charge(Charge(charge.counters, 0), self.instances)
        return msgspec.structs.replace(share, allowed=False, remaining=0, retry_after_us=RETRY_US)

    def _decide_at_deadline(self, charge: Charge, late: LateAnswer, started_us: int) -> ChargeOutcome:
        """The shard has not answered yet: admit what it will most probably have charged, and see what it says."""
        if self.breakers:
            self._breakers.release(self._shards(charge))
        admitted = False
        if self._on_failure(charge) is not OnFailure.LOCAL:
            outcome = self._fallback(charge, "timeout", late)
        else:
            self.degraded["timeout"] = self.degraded.get("timeout", 0) + 1
            share = self._local.charge(Charge(charge.counters, 0), self.instances)
            allowed = not charge.cost or self.late.may_admit(charge, self.instances)
            admitted = allowed and charge.cost > 0
            outcome = msgspec.structs.replace(
                share,
                allowed=allowed,
                remaining=max((share.remaining or 0) - charge.cost, 0) if allowed else 0,
                retry_after_us=0 if allowed else RETRY_US,
            )
        self.late.track(charge, late, admitted, started_us)
        return outcome

    def _answered_late(self, charge: Charge, admitted: bool, started_us: int, answer: Decision | StoreUnavailable) -> None:
        """What a shard said after the deadline, or that it cannot say anything any more."""
        if isinstance(answer, StoreUnavailable):
            shard = answer.details.get("shard")
            if shard is not None:
                self._breakers.failed(str(shard), answer, time.monotonic())
        elif not answer.allowed and started_us >= self._cleared_us:
            self.denials.remember(charge.counters, charge.cost, answer, started_us)
        if admitted and (isinstance(answer, StoreUnavailable) or not answer.allowed):
            self._local.owe(charge, self._store_now_us())

    def _on_failure(self, charge: Charge) -> OnFailure:
        own = charge.counters[0][0].on_failure
        return self.options.on_failure if own is OnFailure.DEFAULT else own

    def _fallback(self, charge: Charge, reason: str, error: StoreUnavailable | None = None) -> ChargeOutcome:
        self.degraded[reason] = self.degraded.get(reason, 0) + 1
        limits = charge.counters[0][0]
        on_failure = self._on_failure(charge)
        if on_failure is OnFailure.DENY:
            return error or StoreUnavailable(
                'the counter store does not answer, and this rule has on_failure = "deny"', reason=reason
            )
        if on_failure is OnFailure.ALLOW:
            limit = limits.limits[0]
            return Decision(True, limit, max(limit.capacity - charge.cost, 0), 0, 0, self._store_now_us(), limits, degraded=True)
        if self._debts.on_the_way and any(
            (each.name, each.algorithm, s) in self._debts.on_the_way for each, s in charge.counters
        ):
            # What this instance admitted before is not in its share, nor is it known to be in the store: no more is admitted now.
            share = self._local.charge(Charge(charge.counters, 0), self.instances)
            return msgspec.structs.replace(
                share, allowed=not charge.cost, remaining=0, retry_after_us=RETRY_US if charge.cost else 0
            )
        return self._local.charge(charge, self.instances)

    # What goes on beside.

    async def _heartbeat(self) -> None:
        """Say that this instance lives, and learn of the others; drop what has expired."""
        await self.store.start()
        if self.store.refunds != self._refunds:
            # Whoever was denied while a split charge held units for a moment may pass now, here and elsewhere.
            self._refunds = self.store.refunds
            self._clear_remembered()
            await heartbeat.announce_reset(self.store)
        before_us = _now_us()
        try:
            beat = await heartbeat.beat(self.store, self.instance)
        finally:
            self.denials.sweep(_now_us())
            self.late.sweep()
            self._local.sweep(_SWEEP_STEPS)
        self.instances = max(beat.instances, self.options.min_instances)
        self._offset_us = beat.at_us - (before_us + _now_us()) // 2
        if self._resets is not None and beat.resets != self._resets:
            self._clear_remembered()
        self._resets = beat.resets

    async def _recover(self) -> None:
        """Probe the shards whose breakers are open, and put back what is owed."""
        await self._breakers.probe(time.monotonic)
        await self._debts.settle()

    def _clear_remembered(self) -> None:
        """Some counter was reset, or given units back: what the store said before does not hold any more."""
        self._cleared_us = _now_us()
        self.denials.clear()
        self.late.clear()

    def _store_now_us(self) -> int:
        """The store's clock, as far as it is known; never goes back."""
        self._latest_us = max(self._latest_us, time.monotonic_ns() // 1000 + self._offset_us)
        return self._latest_us


def _name(limits: LimitSet, subject: str) -> tuple[str, Algorithm, str]:
    return limits.name, limits.algorithm, subject


def _now_us() -> int:
    return time.monotonic_ns() // 1000


async def _repeat(work: Callable[[], Awaitable[None]], pause_s: float) -> None:
    """Do something again and again; where the store is away, the next time."""
    while True:
        try:
            await work()
        except StoreUnavailable as error:
            # The breakers learn of failures from checks and debts; what was learnt before stays.
            logger.debug("%s: %s", work.__name__, error)
        await asyncio.sleep(pause_s)
