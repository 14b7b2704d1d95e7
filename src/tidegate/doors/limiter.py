"""The door of plain Python code: one rule, no policy file, no listener. `Limiter` for event loops, `SyncLimiter` for threads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from tidegate.counters import Charge, Counters, CounterStore, LeasingCounterStore
from tidegate.counters.blocking import BlockingCounterStore
from tidegate.counters.holds import (
    DEFAULT_TTL_S,
    HoldHandle,
    HoldingCounterStore,
    blocking_holding,
    holding,
)
from tidegate.counters.memory import MemoryCounters
from tidegate.counters.reservations import (
    BlockingReservingStore,
    Reservation,
    ReservingCounterStore,
    ahead_us_of,
    can_reserve,
)
from tidegate.decision import MAX_COST, Decision
from tidegate.doors.hold import AsyncHold, SyncHold
from tidegate.doors.limited_subject import DIGEST, LONGEST_SUBJECT, LimitedSubject, checked_cost, fit_subject
from tidegate.doors.limiter_limits import LimiterLimits
from tidegate.doors.stores import SWITCHES, open_blocking_store, open_memory_or_redis
from tidegate.doors.waiting import AsyncWaiting, BlockingWaiting
from tidegate.errors import StoreUnavailable
from tidegate.policy.limits import Algorithm, OnFailure
from tidegate.retry_pause import checked_wait_s
from tidegate.timestamps import US_PER_S


class Limiter(LimiterLimits):
    """Decides for subjects of your choice.

        limiter = Limiter("100/minute")
        decision = await limiter.check("user-42")
        if not decision.allowed:
            print(f"try again in {decision.retry_after} s")

    `async with Limiter(…) as limiter` closes its store at the end. A store on Redis connects anew in each event loop.

    Args:
        limits: one limit such as `100/minute`, or several that must all pass.
        algorithm: fixed_window, sliding_window, sliding_log, token_bucket or leaky_bucket.
        counters: URL or a store; `memory://` counts in this process.
        name: limiters of one name on one store share their counts; made from the limits where not given.
        on_failure: local, allow or deny, while the store is unavailable.
        leases: with a URL of Redis, whether units of busy subjects are charged in advance, so that most checks need no call; by
            default as the environment variable `TIDEGATE_LEASES__ENABLED` says, else yes.

    Raises:
        PolicyError: if a limit is not understood or does not fit the algorithm.
        SettingsError: if the URL is not understood.
    """

    def __init__(
        self,
        limits: str | Sequence[str],
        *,
        algorithm: str = Algorithm.SLIDING_WINDOW,
        counters: str | CounterStore = "memory://",
        name: str | None = None,
        on_failure: str = OnFailure.LOCAL,
        leases: bool | None = None,
    ) -> None:
        super().__init__(limits, algorithm=algorithm, counters=counters, name=name, on_failure=on_failure, leases=leases)
        self.counters: CounterStore = open_memory_or_redis(counters, leases)
        self._charge_one = self.counters.charge_one if isinstance(self.counters, MemoryCounters) else None
        self._take = self.counters.charge_now if isinstance(self.counters, LeasingCounterStore) else None
        self._memory = self.counters if type(self.counters) is MemoryCounters else None
        self._holding: HoldingCounterStore | None = None
        self._waiting = AsyncWaiting()

    async def check(self, subject: LimitedSubject, cost: int = 1) -> Decision:
        """Decide and charge one request.

        Args:
            subject: whom to count: any non-empty string; or attributes such as `{"org": "acme", "user": "42"}`, in any order.
            cost: units, 0 (peek) to 1,000,000,000.

        Returns:
            The decision.

        Raises:
            BadRequest: if the cost or the subject makes no sense; nothing was charged.
            StoreUnavailable: if the store fails and `on_failure` is deny.
        """
        if type(cost) is not int or not 0 <= cost <= MAX_COST:
            cost = checked_cost(cost)
        limits = self._limits
        if self._namespace is not None:
            limits, subject = self._counter(subject)
        elif not subject or type(subject) is not str or len(subject) > LONGEST_SUBJECT or subject.startswith(DIGEST):
            subject = fit_subject(subject)
        if not SWITCHES.enforced:
            return self._allowed_in_tests()
        if self._charge_one is not None:
            return self._charge_one(limits, subject, cost)
        counters = ((limits, subject),)
        if self._take is not None and (decision := self._take(counters, cost)) is not None:
            return decision
        outcome = (await self.counters.charge((Charge(counters, cost),)))[0]
        if isinstance(outcome, StoreUnavailable):
            raise outcome
        return outcome

    async def check_many(self, asked: Sequence[tuple[LimitedSubject, int]]) -> list[Decision | StoreUnavailable]:
        """Decide requests each on its own, in order, with one round trip for each shard of the store that they touch.

        Args:
            asked: pairs of subject and cost.

        Returns:
            For each its decision, or the error that `check` would have raised.

        Raises:
            BadRequest: as `check`; then nothing of the batch was charged.
        """
        charges = self._charges(asked)
        if not SWITCHES.enforced:
            return [self._allowed_in_tests()] * len(charges)
        return list(await self.counters.charge(charges))

    async def wait(self, subject: LimitedSubject, cost: int = 1, *, at_most_s: float) -> Decision:
        """Check, and wait until it passes, first come, first served in all processes: one call of the store for each permit.

        Who is cancelled gives its place back. An algorithm or a store without reservations is checked again instead, with about
        two calls for each that passes; several processes compete then.

        Args:
            subject: as for `check`.
            cost: as for `check`.
            at_most_s: how long to wait, s.

        Returns:
            The last decision; a denial at once if it cannot pass in time, or never will.

        Raises:
            BadRequest: as `check`, or if `at_most_s` is negative.
            StoreUnavailable: as `check`.
        """
        if not SWITCHES.enforced or not (can_reserve((self._limits,)) and isinstance(self.counters, ReservingCounterStore)):
            return await self._waiting.wait(lambda: self.check(subject, cost), self._counter(subject)[1], at_most_s)
        return await self._waiting.wait_reserved(
            lambda ahead_s: self.reserve(subject, cost, at_most_s=ahead_s), self.cancel, at_most_s
        )

    async def reserve(self, subject: LimitedSubject, cost: int = 1, *, at_most_s: float) -> Reservation:
        """Take a place in the queue, without waiting: for workers that put a job back until its moment.

            place = await limiter.reserve("partner-api", at_most_s=3600)
            if place.allowed:
                queue.enqueue_at(place.at, send_order)

        The units are charged at once, for the moment: until then checks of others are denied.

        Args:
            subject: as for `check`.
            cost: as for `check`.
            at_most_s: how far ahead the moment may be, s, 0 or more.

        Returns:
            The reservation: `allowed`, `at`, `wait_s`, and `decision`, whose `retry_after` says for a denial how far ahead the
            moment would have been.

        Raises:
            BadRequest: as `check`, or if `at_most_s` is negative, or the algorithm is sliding_log.
            StoreUnavailable: as `check`.
        """
        ahead_us, cost = ahead_us_of(checked_wait_s(at_most_s)), checked_cost(cost)
        counter = self._counter(subject)
        if not SWITCHES.enforced:
            return Reservation(self._allowed_in_tests(), cost=cost)
        if not isinstance(self.counters, ReservingCounterStore) or not can_reserve((self._limits,)):
            raise self._not_reservable()
        return await self.counters.reserve((counter,), cost, ahead_us)

    async def cancel(self, reservation: Reservation) -> bool:
        """Give a reservation back before its moment.

        Args:
            reservation: of this limiter.

        Returns:
            Whether all its units are available again: not after its moment, and for buckets not where others have taken places
            behind it that depend on them.

        Raises:
            StoreUnavailable: if the store does not answer.
        """
        if not reservation.counters or not isinstance(self.counters, ReservingCounterStore):
            return False
        return await self.counters.release(reservation)

    def hold(self, subject: LimitedSubject, cost: int = 1, *, ttl_s: int = DEFAULT_TTL_S, clamp: bool = False) -> AsyncHold:
        """Reserve the most that something may cost while it runs, and charge what it did cost when it ends.

            async with limiter.hold("user-42", cost=4000) as hold:
                answer = await complete(prompt)
                hold.settle(answer.usage.total_tokens)

        Without `settle` the reserved cost is charged at the end; nothing, where the block ends with an exception.

        Args:
            subject: as for `check`.
            cost: units to reserve, 0 to 1,000,000,000.
            ttl_s: after how many seconds the reservation expires, 1 to 3600, in case the process dies.
            clamp: whether a cost above the most that the limits ever admit is lowered to that; refused otherwise.

        Returns:
            The hold, for `async with`, which raises `RateLimitExceeded` where it is denied.

        Raises:
            BadRequest: if an argument makes no sense, or the cost can never pass.
        """
        if (
            ttl_s == DEFAULT_TTL_S
            and self._namespace is None
            and type(cost) is int
            and 0 <= cost <= self._most_at_once
            and type(subject) is str
            and 0 < len(subject) <= LONGEST_SUBJECT
            and not subject.startswith(DIGEST)
        ):
            # Most calls: nothing to read, clamp or refuse.
            counters: Counters = ((self._limits, subject),)
            ttl_us = DEFAULT_TTL_S * US_PER_S
        else:
            counters, cost, ttl_us = self._reservation(subject, cost, ttl_s, clamp)
        allowed = None if SWITCHES.enforced else self._allowed_in_tests()
        store = self._holding
        if store is None:
            store = self._holding = holding(self.counters)
        return AsyncHold(self._label, cost, counters, ttl_us, store, self._memory, allowed)

    async def reset(self, subject: LimitedSubject) -> None:
        """Forget what a subject consumed.

        Args:
            subject: as for `check`.

        Raises:
            BadRequest: if it is empty or no string.
            StoreUnavailable: if the store does not answer.
        """
        await self.counters.reset([self._counter(subject)])

    async def close(self) -> None:
        """Give back what the store holds."""
        await self.counters.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class SyncLimiter(LimiterLimits):
    """`Limiter` for code without an event loop: scripts, threads, WSGI. Thread-safe; counts together with a `Limiter` of the
    same name on the same Redis.

        limiter = SyncLimiter("100/minute", counters="redis://127.0.0.1:6379")
        if not limiter.check("user-42").allowed:
            ...

    On Redis a call takes a socket from a pool; after a fork the child opens its own. `with SyncLimiter(…) as limiter` closes
    them at the end.

    Args:
        limits: as for `Limiter`.
        algorithm: as for `Limiter`.
        counters: URL or a store for threads; `memory://` counts in this process.
        name: as for `Limiter`.
        on_failure: as for `Limiter`.
        leases: as for `Limiter`; a thread gives back what is not used.

    Raises:
        PolicyError: as `Limiter`.
        SettingsError: if the URL is not understood, or the store needs an event loop.
    """

    def __init__(
        self,
        limits: str | Sequence[str],
        *,
        algorithm: str = Algorithm.SLIDING_WINDOW,
        counters: str | BlockingCounterStore = "memory://",
        name: str | None = None,
        on_failure: str = OnFailure.LOCAL,
        leases: bool | None = None,
    ) -> None:
        super().__init__(limits, algorithm=algorithm, counters=counters, name=name, on_failure=on_failure, leases=leases)
        self.counters: BlockingCounterStore = open_blocking_store(counters, leases)
        self._waiting = BlockingWaiting()

    def check(self, subject: LimitedSubject, cost: int = 1) -> Decision:
        """Decide and charge one request; see `Limiter.check`."""
        if type(cost) is not int or not 0 <= cost <= MAX_COST:
            cost = checked_cost(cost)
        limits = self._limits
        if self._namespace is not None:
            limits, subject = self._counter(subject)
        elif not subject or type(subject) is not str or len(subject) > LONGEST_SUBJECT or subject.startswith(DIGEST):
            subject = fit_subject(subject)
        if not SWITCHES.enforced:
            return self._allowed_in_tests()
        return self.counters.charge_one(limits, subject, cost)

    def check_many(self, asked: Sequence[tuple[LimitedSubject, int]]) -> list[Decision | StoreUnavailable]:
        """Decide requests each on its own, in order; see `Limiter.check_many`."""
        charges = self._charges(asked)
        if not SWITCHES.enforced:
            return [self._allowed_in_tests()] * len(charges)
        return list(self.counters.charge_many(charges))

    def wait(self, subject: LimitedSubject, cost: int = 1, *, at_most_s: float) -> Decision:
        """Check, and wait until it passes; see `Limiter.wait`."""
        if not SWITCHES.enforced or not (can_reserve((self._limits,)) and isinstance(self.counters, BlockingReservingStore)):
            return self._waiting.wait(lambda: self.check(subject, cost), self._counter(subject)[1], at_most_s)
        return self._waiting.wait_reserved(lambda ahead_s: self.reserve(subject, cost, at_most_s=ahead_s), self.cancel, at_most_s)

    def reserve(self, subject: LimitedSubject, cost: int = 1, *, at_most_s: float) -> Reservation:
        """Take a place in the queue, without waiting; see `Limiter.reserve`."""
        ahead_us, cost = ahead_us_of(checked_wait_s(at_most_s)), checked_cost(cost)
        counter = self._counter(subject)
        if not SWITCHES.enforced:
            return Reservation(self._allowed_in_tests(), cost=cost)
        if not isinstance(self.counters, BlockingReservingStore) or not can_reserve((self._limits,)):
            raise self._not_reservable()
        return self.counters.reserve_blocking((counter,), cost, ahead_us)

    def cancel(self, reservation: Reservation) -> bool:
        """Give a reservation back before its moment; see `Limiter.cancel`."""
        if not reservation.counters or not isinstance(self.counters, BlockingReservingStore):
            return False
        return self.counters.release_blocking(reservation)

    def hold(self, subject: LimitedSubject, cost: int = 1, *, ttl_s: int = DEFAULT_TTL_S, clamp: bool = False) -> SyncHold:
        """Reserve a cost, for `with`; see `Limiter.hold`."""
        counters, cost, ttl_us = self._reservation(subject, cost, ttl_s, clamp)
        store = blocking_holding(self.counters)

        def opens() -> tuple[Decision, HoldHandle | None]:
            if not SWITCHES.enforced:
                return self._allowed_in_tests(), None
            return store.open_hold_now(counters, cost, ttl_us, self._limits.rule)

        return SyncHold(self._limits.rule or "", cost, opens, store.settle_hold_now, store.renew_hold_now)

    def reset(self, subject: LimitedSubject) -> None:
        """Forget what a subject consumed; see `Limiter.reset`."""
        self.counters.reset_many([self._counter(subject)])

    def close(self) -> None:
        """Give back what the store holds."""
        self.counters.disconnect()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
