"""Reservations: the moment at which a caller may go, first come, first served; the ports of the stores that give them."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final, Protocol, cast, runtime_checkable

import msgspec

from tidegate.algorithms.reservations import RESERVABLE
from tidegate.counters import Counters
from tidegate.counters.handle_text import ID, handle_of, is_counter, text_of
from tidegate.decision import Decision
from tidegate.errors import BadRequest, ReservationNotFound, clip
from tidegate.policy.limits import MAX_AMOUNT, LimitSet
from tidegate.timestamps import US_PER_S

MAX_AHEAD_US: Final = 366 * 86_400 * US_PER_S
"""How far ahead a moment may be, µs."""
MAX_NAMED: Final = 100_000
"""Most reservations with an id in memory whose moments have not come."""


class Reservation(msgspec.Struct, frozen=True, gc=False):
    """A place in the queue: units that are charged for a moment, now or later.

    Args:
        decision: `allowed` where there is a place; `remaining` is what is left after it. A denial charged nothing, and its
            `retry_after` says how long the caller would have had to wait.
        counters: that were charged; empty where nothing was.
        cost: units.
        at_us: the moment, µs since the epoch, by the store's clock; 0 for a denial.
    """

    decision: Decision
    counters: Counters = ()
    cost: int = 1
    at_us: int = 0

    @property
    def allowed(self) -> bool:
        """Whether there is a place."""
        return self.decision.allowed

    @property
    def wait_s(self) -> float:
        """Seconds from the reservation to its moment; 0 where the caller may go at once, or has no place."""
        return max(self.at_us - self.decision.at_us, 0) / US_PER_S

    @property
    def at(self) -> datetime.datetime:
        """The moment, UTC: as `eta` of a task queue."""
        return datetime.datetime.fromtimestamp(max(self.at_us, self.decision.at_us) / US_PER_S, datetime.UTC)


@runtime_checkable
class ReservingCounterStore(Protocol):
    """A `CounterStore` that gives reservations. Counters of one reservation must lie on one shard."""

    async def reserve(self, counters: Counters, cost: int, ahead_us: int) -> Reservation:
        """Charge a cost for the first moment at which it passes all limits.

        Args:
            counters: see there; of algorithms that can be reserved.
            cost: units, 0 (reads the moment and charges nothing) or more.
            ahead_us: how far ahead the moment may be, µs, 0 or more.

        Returns:
            The reservation. While the store is unavailable the fallback decides whether the caller may go now.

        Raises:
            StoreUnavailable: if the store fails and the limits say deny.
        """
        ...

    async def release(self, reservation: Reservation) -> bool:
        """Cancel a reservation before its moment.

        Args:
            reservation: of this store.

        Returns:
            Whether all its units are available again; not after its moment.

        Raises:
            StoreUnavailable: if the store does not answer.
        """
        ...


@runtime_checkable
class BlockingReservingStore(Protocol):
    """A `BlockingCounterStore` that gives reservations; see `ReservingCounterStore`."""

    def reserve_blocking(self, counters: Counters, cost: int, ahead_us: int) -> Reservation:
        """As `ReservingCounterStore.reserve`."""
        ...

    def release_blocking(self, reservation: Reservation) -> bool:
        """As `ReservingCounterStore.release`."""
        ...


def can_reserve(limit_sets: Sequence[LimitSet]) -> bool:
    """Whether the algorithms of all these limits can be reserved."""
    return all(limits.algorithm in RESERVABLE and not limits.soft for limits in limit_sets)


def decided_now(decision: Decision, counters: Counters, cost: int) -> Reservation:
    """A reservation for now, or none, by the decision of a check."""
    return Reservation(decision, counters if decision.allowed else (), cost, decision.at_us if decision.allowed else 0)


def ahead_us_of(at_most_s: float) -> int:
    """How far ahead a moment may be, µs, for a caller that waits so long at most."""
    return MAX_AHEAD_US if at_most_s >= MAX_AHEAD_US / US_PER_S else int(at_most_s * US_PER_S)


class ReservedCounter(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A counter in Redis that a reservation charged.

    Args:
        tag: hash tag of its subject.
        name: the rest of its key.
        parameters: of its limits, as the scripts take them.
    """

    tag: bytes
    name: bytes
    parameters: bytes


class ReservationHandle(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What the id of a reservation says, so that any instance can cancel it.

    An id alone gives nothing back: the store remembers each reservation until its moment, under a digest of all but the moment.

    Args:
        id: 16 characters, drawn at random.
        cost: units reserved.
        at_us: its moment, µs since the epoch, by the store's clock.
        counters: those in Redis; none for counters in memory, which find it by `id`.
    """

    id: str
    cost: int
    at_us: int
    counters: tuple[ReservedCounter, ...] = ()

    @property
    def text(self) -> str:
        """The id as callers have it: letters, digits, `-` and `_`."""
        return text_of(self)

    @classmethod
    def of(cls, text: object) -> ReservationHandle:
        """Read an id.

        Args:
            text: as a caller sent it.

        Raises:
            BadRequest: if it is not an id of a reservation.
        """
        handle = handle_of(text, _DECODER)
        if handle is not None and _is_plausible(handle):
            return handle
        raise BadRequest(
            f"reservation {clip(text)} is not an id: send the value of 'reservation' in the answer of POST /v1/reserve",
            field="reservation",
        )


_DECODER: Final = msgspec.msgpack.Decoder(ReservationHandle)


def _is_plausible(handle: ReservationHandle) -> bool:
    """Whether a handle could have been made here: what it names is looked up in the store."""
    return (
        ID.fullmatch(handle.id) is not None
        and 0 < handle.cost <= MAX_AMOUNT
        and handle.at_us > 0
        and all(map(is_counter, handle.counters))
    )


@runtime_checkable
class NamedReservingStore(Protocol):
    """A counter store that gives reservations with ids, by which any instance can cancel them."""

    async def reserve_named(
        self, counters: Counters, cost: int, ahead_us: int
    ) -> tuple[Reservation, ReservationHandle | None] | None:
        """As `ReservingCounterStore.reserve`.

        Returns:
            The reservation, and its handle; no handle where nothing can be cancelled: the caller may go now, has no place, or the
            cost is 0. None where the counters lie on several shards.

        Raises:
            StoreUnavailable: if the store fails and the limits say deny.
            TooManyReservations: if the counters are in memory, and `MAX_NAMED` reservations wait for their moments.
        """
        ...

    async def release_named(self, handle: ReservationHandle) -> bool:
        """Cancel a reservation before its moment; nothing more happens the second time.

        Args:
            handle: of `reserve_named`, here or on another instance.

        Returns:
            Whether all its units are available again, the second time as the first time; False after its moment.

        Raises:
            ReservationNotFound: if the store does not know it.
            StoreUnavailable: if the store does not answer; it is safe to try again.
        """
        ...


@lru_cache(maxsize=64)
def _names_reservations(kind: type[Any]) -> bool:
    return issubclass(kind, NamedReservingStore)


def naming_reservations(store: object) -> NamedReservingStore | None:
    """A counter store as one that gives reservations with ids; None where it gives none."""
    is_one = _names_reservations(type(store))  # type: ignore[arg-type]  # mypy: classes are not hashable
    return cast("NamedReservingStore", store) if is_one else None


def not_found() -> ReservationNotFound:
    """The error of an id that a store does not know."""
    return ReservationNotFound(
        "the reservation is not known: it was made on another counter store, or the store lost its data; nothing was given back"
    )
