"""Where counts live. `CounterStore` is the port; `memory` is the embedded default, `redis` is shared by many instances, and
`guarded` wraps it and decides while it is unavailable.

A store charges all counters of a `Charge` in one atomic step or none of them, by its own clock. Where it cannot answer it
returns `StoreUnavailable`; it never guesses (`guarded` decides in its place and marks the decision as degraded). A store serves
one event loop and may be shared by any number of its tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import msgspec

from tidegate.decision import Decision
from tidegate.errors import StoreUnavailable
from tidegate.policy.limits import LimitSet

if TYPE_CHECKING:
    import asyncio

    from tidegate.algorithms.leases import Ahead


class LeaseRequest(msgspec.Struct, frozen=True, gc=False, eq=False):
    """Units that a store may charge in advance with a charge, for its sender to use without asking. Compared by identity.

    Args:
        want: units, at most.
        divisor: of what remains after the charge: no more than the quotient is leased; 2 or more.
        ttl_us: how long, µs, at most; windows end a lease earlier.
        ahead: units, at most, of those that come free later, where the charge does not pass, or not again.
    """

    want: int
    divisor: int
    ttl_us: int
    ahead: int = 0


class Charge(msgspec.Struct, frozen=True, gc=False):
    """The units of one check and the counters that they are charged to.

    Args:
        counters: pairs of limits and the subject they count, the rule's first. Usually all have one subject. Where a rule
            counts by another subject than its tier's own limits, a store that shards by subject may need more than one step
            for them, but must never admit more than any limit.
        cost: units, 0 (peek) or more.
        lease: units wanted beyond `cost`; a store that grants none ignores it.
    """

    counters: tuple[tuple[LimitSet, str], ...]
    cost: int = 1
    lease: LeaseRequest | None = None


class GrantingDecision(Decision, frozen=True, gc=False):
    """The decision of a charge that a lease was granted with. `remaining` is as it was before the grant.

    Args:
        granted: units leased.
        ends_us: when the lease ends, by the store's clock, µs since the epoch.
        ahead: when the units come free; None where they are free.
        following: see `LastDecision`; None where such a check may pass.
    """

    granted: int = 0
    ends_us: int = 0
    ahead: Ahead | None = None
    following: Decision | None = None

    def after_grant(self) -> Decision:
        """The decision with what remains after the grant."""
        return msgspec.structs.replace(self.without_grant(), remaining=max((self.remaining or 0) - self.granted, 0))

    def without_grant(self) -> Decision:
        """The decision alone."""
        return Decision(
            self.allowed, self.binding, self.remaining, self.reset_after_us, self.retry_after_us, self.at_us, self.limits
        )


class LastDecision(Decision, frozen=True, gc=False):
    """The decision of a charge that asked for a lease and got none, and after which a check of the same cost does not pass.

    Args:
        following: what such a check would get: its denial, which is valid as if the store had answered it.
    """

    following: Decision | None = None


class LeaseReturn(msgspec.Struct, frozen=True, gc=False):
    """A lease that is given up.

    Args:
        counters: that were charged.
        granted: units.
        at_us: when they were charged, by the store's clock.
        ends_us: when the lease ends, by the store's clock.
        session: what `LeaseGrantor.session` returned when the grant arrived.
    """

    counters: tuple[tuple[LimitSet, str], ...]
    granted: int
    unused: int
    at_us: int
    ends_us: int
    session: object = None


class LateAnswer(StoreUnavailable):
    """The deadline of a charge passed and the store has not answered yet. It may have charged; it is slow or down.

    Args:
        message: see `TidegateError`.
        answer: future reply of the store; fails when none can come any more.
        details: see `TidegateError`.

    Attributes:
        decode: makes a decision of the reply; raises `StoreUnavailable` where it is not one.
    """

    def __init__(self, message: str, answer: asyncio.Future[Any], **details: object) -> None:
        super().__init__(message, reason="timeout", **details)
        self.answer = answer
        self.decode: Callable[[Any], Decision] | None = None


ChargeOutcome: TypeAlias = Decision | StoreUnavailable
Counters: TypeAlias = tuple[tuple[LimitSet, str], ...]
"""Pairs of limits and the subject they count."""


class KeptCounters(tuple[tuple[LimitSet, str], ...]):
    """Counters that their owner keeps to charge them again: a store may remember where they are."""

    __slots__ = ()


class CounterStore(Protocol):
    """The port of the counters.

    Attributes:
        immediate: whether the store is an `ImmediateCounterStore`.
    """

    immediate: bool

    async def charge(self, charges: Sequence[Charge]) -> Sequence[ChargeOutcome]:
        """Decide each charge on its own, in order.

        Returns:
            For each its decision, or the error: a part of the store may be down while others answer. `at_us` is the
            store's clock and `holds_until_us` says how long the answer holds.
        """
        ...

    async def windows(self, counters: Sequence[tuple[LimitSet, str]]) -> Sequence[Sequence[Decision] | None]:
        """What remains of each limit of a counter separately; charges nothing.

        Args:
            counters: pairs of limits and subject, any number.

        Returns:
            For each a decision for every one of its limits, in their order; None where the store does not answer.
        """
        ...

    async def reset(self, counters: Sequence[tuple[LimitSet, str]]) -> None:
        """Reset counters to nothing consumed.

        Args:
            counters: pairs of limits and subject.

        Raises:
            StoreUnavailable: if the store does not answer.
        """
        ...

    async def ping(self) -> None:
        """Check that the store answers.

        Raises:
            StoreUnavailable: if it does not.
        """
        ...

    async def close(self) -> None:
        """Release the store's resources; it must not be used afterwards."""
        ...


@runtime_checkable
class LeasingCounterStore(CounterStore, Protocol):
    """A store that can decide some charges without waiting for anything."""

    def charge_now(self, counters: tuple[tuple[LimitSet, str], ...], cost: int) -> Decision | None:
        """Decide several counters and charge all of them or none, if nothing has to be awaited for it.

        Args:
            counters: as those of a `Charge`.
            cost: as that of a `Charge`.

        Returns:
            The decision; None if `charge` must decide.
        """
        ...


class LeaseGrantor(CounterStore, Protocol):
    """A store that grants leases: it answers a charge with a `LeaseRequest` by a `GrantingDecision` where it granted one.

    Attributes:
        instances: how many share it.
        instances_known: whether that was read from the store already.
        on_late_grant: called with a charge, its late answer and when it was sent, monotonic µs.
        on_reset: called when counters were reset, here or elsewhere.
        denial_ttl_us: how long a denial may be remembered, µs: units that others give back may end it earlier.
        lease_usage: returns the units of some counters that were used from leases since the store last decided a charge of them.
        take_lease_usage: the same; called where the store counts them from now on.
    """

    instances: int
    instances_known: bool
    on_late_grant: Callable[[Charge, GrantingDecision, int], None] | None
    on_reset: Callable[[], None] | None
    denial_ttl_us: int | None
    lease_usage: Callable[[Counters], int] | None
    take_lease_usage: Callable[[Counters], int] | None

    def grants(self, counters: tuple[tuple[LimitSet, str], ...]) -> bool:
        """Whether it can grant a lease on these counters, all or none."""
        ...

    def session(self, counters: tuple[tuple[LimitSet, str], ...]) -> object:
        """What is the same as long as the store certainly remembers what it charged; compared by equality."""
        ...

    async def give_back(self, returns: Sequence[LeaseReturn]) -> list[bool]:
        """Give up leases, in one call; never retried, as a second time would give back units of others.

        Returns:
            For each whether the unused units are available again.
        """
        ...


@runtime_checkable
class ImmediateCounterStore(CounterStore, Protocol):
    """A store that can decide without waiting for anything, and whose `charge` decides exactly as `charge_all` does."""

    def charge_all(self, counters: tuple[tuple[LimitSet, str], ...], cost: int) -> Decision:
        """Decide several counters and charge all of them or none.

        Args:
            counters: as those of a `Charge`.
            cost: as that of a `Charge`.

        Returns:
            The decision.
        """
        ...
