"""Reservations: a check that gives the moment at which its caller may go, first come, first served, instead of a denial.

The limits that matter are found as for a check. Units are charged for the moment when it is given, in one step of the store, and
reported as those of a check that passed: to telemetry, usage and the ledger, also where the place is given back later. Without a
place in time the caller is denied, and that is reported as a denial, once. Shadow rules are charged beside it as of now.

Limits that cannot be reserved (`sliding_log`, quotas, requests in progress, failures, soft limits, those of several shards) are
decided as a check: the caller may go now, or is denied.
"""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec

from tidegate.counters import Charge, ChargeOutcome, Counters, CounterStore
from tidegate.counters.reservations import (
    Reservation,
    ReservationHandle,
    ahead_us_of,
    can_reserve,
    decided_now,
    naming_reservations,
    not_found,
)
from tidegate.decision import Check, Decision
from tidegate.errors import BadRequest, StoreUnavailable, TidegateError, clip
from tidegate.gate.charging import CheckPlan
from tidegate.gate.holds import Report, ReportError
from tidegate.gate.request_limits import LimitCheck
from tidegate.gate.windows import with_windows

MAX_WAIT_S: Final = 3600
"""How far ahead a moment may be, s."""


class Place(msgspec.Struct, frozen=True, gc=False):
    """The answer to a request for a reservation.

    Args:
        decision: `allowed` where there is a place; the `retry_after` of a denial is how long the caller would have had to wait.
        wait_s: seconds from now to the moment; 0 where the caller may go now, or has no place.
        reservation: id, to give the place back before its moment; None where there is nothing to give back.
    """

    decision: Decision
    wait_s: float = 0.0
    reservation: str | None = None


class Reservations:
    """Gives places, and takes them back.

    Args:
        counters: what was consumed.
        plan: finds the limits of a check; charges nothing.
        report: called for each decided reservation.
        report_error: called for each reservation that was refused.
        all_windows: see `Gate`.
    """

    def __init__(
        self,
        counters: CounterStore,
        plan: Callable[[Check], Awaitable[CheckPlan]],
        report: Report,
        report_error: ReportError,
        *,
        all_windows: bool = False,
    ) -> None:
        self._all_windows = all_windows
        self._counters = counters
        self._plan = plan
        self._report = report
        self._report_error = report_error

    async def reserve(self, check: Check, at_most_s: object) -> Place:
        """Charge a check for the first moment at which it passes.

        Args:
            check: the request.
            at_most_s: how far ahead the moment may be, s, 0 to 3600.

        Returns:
            The place; a denial, which charges nothing, if there is none in time.

        Raises:
            TidegateError: as `Gate.check`.
            BadRequest: if the time is out of range.
            TooManyReservations: if counters in memory remember as many as they can.
        """
        return await self._decide(lambda: self._plan(check), at_most_s)

    async def reserve_limit(self, check: LimitCheck, at_most_s: object) -> Place:
        """As `reserve`, for a check that names its own limits.

        Args:
            at_most_s: as for `reserve`.

        Returns:
            As `reserve`.

        Raises:
            BadRequest: as `reserve`.
            StoreUnavailable: if the counter store fails and the namespace says deny.
            TooManyReservations: as `reserve`.
        """
        if check.exempt:
            plan = CheckPlan(Decision(True), (), check.cost)
        else:
            plan = CheckPlan(None, (Charge(((check.limits, check.subject),), check.cost),), check.cost)

        async def planned() -> CheckPlan:
            return plan

        return await self._decide(planned, at_most_s)

    async def cancel(self, reservation: object) -> bool:
        """Give a place back before its moment. Idempotent.

        Returns:
            Whether all its units are available again, each time as the first time; False after its moment, and where places
            behind it depend on them (see `tidegate.algorithms.reservations`).

        Raises:
            BadRequest: if the id is not valid.
            ReservationNotFound: if the reservation is not known.
            StoreUnavailable: if the counter store does not answer; it is safe to try again.
        """
        handle = ReservationHandle.of(reservation)
        store = naming_reservations(self._counters)
        if store is None:
            raise not_found()
        return await store.release_named(handle)

    async def _decide(self, find: Callable[[], Awaitable[CheckPlan]], at_most_s: object) -> Place:
        started_ns = time.perf_counter_ns()
        try:
            ahead_us = ahead_us_of(checked_at_most_s(at_most_s))
            plan = await find()
            place, handle = None, None
            outcomes: list[ChargeOutcome] = []
            if plan.answer is None:
                place, handle = await self._reserve(plan.charges[0].counters, plan.cost, ahead_us)
                outcomes.append(place.decision)
            beside = plan.charges[len(outcomes) :]
            if beside:
                outcomes += await self._counters.charge(beside)
        except TidegateError as error:
            self._report_error(error, time.perf_counter_ns() - started_ns)
            raise
        self._report(plan, outcomes, time.perf_counter_ns() - started_ns)
        if place is None:
            assert plan.answer is not None, "nothing limits the check"
            return Place(plan.answer)
        decision = place.decision
        if self._all_windows:
            [decision] = await with_windows(self._counters, ((decision, plan.charges[0].counters),))
        return Place(decision, place.wait_s, None if handle is None else handle.text)

    async def _reserve(self, counters: Counters, cost: int, ahead_us: int) -> tuple[Reservation, ReservationHandle | None]:
        if can_reserve([limits for limits, _ in counters]):
            store = naming_reservations(self._counters)
            placed = None if store is None else await store.reserve_named(counters, cost, ahead_us)
            if placed is not None:
                return placed
        [outcome] = await self._counters.charge((Charge(counters, cost),))
        if isinstance(outcome, StoreUnavailable):
            raise outcome
        return decided_now(outcome, counters, cost), None


def checked_at_most_s(at_most_s: object) -> float:
    """How far ahead a moment may be, s.

    Raises:
        BadRequest: if it is not a number from 0 to 3600.
    """
    if type(at_most_s) not in (int, float) or not 0 <= at_most_s <= MAX_WAIT_S or math.isnan(at_most_s):  # type: ignore[operator, arg-type]
        raise BadRequest(f"at_most_s {clip(at_most_s)} must be a number of seconds from 0 to {MAX_WAIT_S}", field="at_most_s")
    return at_most_s  # type: ignore[return-value]
