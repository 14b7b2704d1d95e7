"""Holds: a check whose cost is known only when its request has ended.

Opening one decides a check of the most it may cost; settling it charges what was used. The limits that matter are found as for a
check, and the reservation is one atomic step in the store. Shadow rules are charged the reserved cost and never settled.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeAlias

import msgspec

from tidegate.counters import Charge, ChargeOutcome, Counters, CounterStore
from tidegate.counters.holds import (
    DEFAULT_TTL_S,
    MAX_TTL_S,
    MIN_TTL_S,
    HoldAccount,
    HoldHandle,
    HoldSettlement,
    holding,
    new_id,
)
from tidegate.decision import MAX_COST, Check, Decision
from tidegate.errors import BadRequest, TidegateError, clip
from tidegate.gate.charging import CheckPlan
from tidegate.gate.request_limits import LimitCheck
from tidegate.gate.windows import with_windows
from tidegate.policy.failures import FailureCount
from tidegate.policy.limits import IN_PROGRESS, Limit
from tidegate.policy.quotas import UNBOUNDED, QuotaLimit
from tidegate.timestamps import US_PER_S

Report: TypeAlias = Callable[[CheckPlan, Sequence[ChargeOutcome], int], object]
"""Reports a decided plan to telemetry: its outcomes and the ns it took."""
ReportSettled: TypeAlias = Callable[[HoldAccount, str, int, int], object]
"""Reports what a settlement charged: whom, under which rule (empty for none), the units, and those of them above a limit."""
ReportError: TypeAlias = Callable[[TidegateError, int], object]

_RATIO_RULES: Final = 256


class OpenedHold(msgspec.Struct, frozen=True, gc=False):
    """The answer to a request for a hold.

    Args:
        decision: as for a check of the reserved cost.
        hold: id of the hold; None where it was denied.
        reserved: units reserved; 0 where it was denied.
        ttl_s: after how many seconds it expires.
        failures: where the rule counts failures, what they are: the hold is settled with 1 for a failure, else with 0.
    """

    decision: Decision
    hold: str | None
    reserved: int
    ttl_s: int
    failures: FailureCount | None = None


class HoldFigures:
    """What became of holds at this instance.

    Attributes:
        opened: holds that were opened.
        denied: holds that were denied.
        settled: holds that were settled in time.
        late: holds that were settled after they had expired.
        degraded: holds opened while the store was unavailable, which reserve nothing.
        reserved_units: units that settled holds had reserved, by rule.
        used_units: units that they used, by rule.
    """

    def __init__(self) -> None:
        self.opened = self.denied = self.settled = self.late = self.degraded = 0
        self.reserved_units: dict[str, float] = {}
        self.used_units: dict[str, float] = {}

    def count_settled(self, handle: HoldHandle, settled: HoldSettlement) -> None:
        """Count a settlement."""
        if settled.repeated or not handle.counted:
            return
        if settled.late:
            self.late += 1
        else:
            self.settled += 1
        # A rule's name comes with the id: there is a bound on how many are counted.
        rule = handle.rule or ""
        if rule in self.reserved_units or len(self.reserved_units) < _RATIO_RULES:
            self.reserved_units[rule] = self.reserved_units.get(rule, 0) + handle.cost
            self.used_units[rule] = self.used_units.get(rule, 0) + settled.cost


class Holds:
    """Opens, settles and renews holds.

    Args:
        plan: finds the limits of a check; charges nothing.
        report: called for each decided hold.
        report_error: called for each hold that was refused.
        all_windows: see `Gate`.

    Attributes:
        on_settled: called for each hold that was settled for the first time; None for nothing.
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
        self.figures = HoldFigures()
        self.on_settled: ReportSettled | None = None
        self._counters = counters
        self._plan = plan
        self._report = report
        self._report_error = report_error

    async def open(self, check: Check, ttl_s: object = DEFAULT_TTL_S, *, clamp: bool = False) -> OpenedHold:
        """Reserve the cost of a check.

        Args:
            check: the request; its cost is the most that it may cost.
            ttl_s: after how many seconds the hold expires, 1 to 3600.
            clamp: whether a cost above the most that the limits ever admit is lowered to that; refused otherwise.

        Returns:
            The decision, and the hold if it was allowed.

        Raises:
            TidegateError: as `Gate.check`.
            BadRequest: if the time is out of range, or the cost above what the limits ever admit.
            TooManyHolds: if the subject has too many open holds.
        """
        started_ns = time.perf_counter_ns()
        try:
            ttl = checked_ttl_s(ttl_s)
            plan = await self._plan(check)
        except TidegateError as error:
            self._report_error(error, time.perf_counter_ns() - started_ns)
            raise
        return await self._open_planned(plan, check.cost, ttl, clamp, started_ns)

    async def open_slot(self, check: Check, ttl_s: int = DEFAULT_TTL_S) -> OpenedHold | None:
        """As `open`, if the rule that answers limits requests in progress, or failures.

        Args:
            ttl_s: as for `open`.

        Returns:
            As `open`; None if no slot is needed, and nothing was charged then. The hold of a request is settled with what was
            reserved, or with its outcome.

        Raises:
            TidegateError: as `Gate.check`.
            TooManyHolds: as `open`.
        """
        started_ns = time.perf_counter_ns()
        try:
            plan = await self._plan(check)
        except TidegateError as error:
            self._report_error(error, time.perf_counter_ns() - started_ns)
            raise
        if plan.answer is not None or not any(limits.algorithm in IN_PROGRESS for limits, _ in plan.charges[0].counters):
            return None
        return await self._open_planned(plan, check.cost, ttl_s, None, started_ns)

    async def _open_planned(self, plan: CheckPlan, wanted: int, ttl: int, clamp: bool | None, started_ns: int) -> OpenedHold:
        """Open the hold of a plan; where `clamp` is None, a cost that can never pass is denied as that of a check is."""
        try:
            if plan.answer is not None:
                shadow = await self._counters.charge(plan.charges) if plan.charges else ()
                self._report(plan, shadow, time.perf_counter_ns() - started_ns)
                return self._uncounted(plan.answer, wanted, ttl)
            counters = plan.charges[0].counters
            cost = wanted if clamp is None else fitting_cost(counters, wanted, clamp)
            decision, handle = await self._reserve(counters, cost, ttl)
            beside = [Charge(each.counters, cost) for each in plan.charges[1:]]
            outcomes = [decision, *(await self._counters.charge(beside) if beside else ())]
        except TidegateError as error:
            self._report_error(error, time.perf_counter_ns() - started_ns)
            raise
        held = handle is not None and handle.counted
        self._report(msgspec.structs.replace(plan, cost=cost, held=held), outcomes, time.perf_counter_ns() - started_ns)
        if self._all_windows:
            [decision] = await with_windows(self._counters, ((decision, counters),))
        return self._opened(decision, handle, cost, ttl, plan)

    async def open_limit(self, check: LimitCheck, ttl_s: object = DEFAULT_TTL_S, *, clamp: bool = False) -> OpenedHold:
        """As `open`, for a check that names its own limits.

        Args:
            ttl_s: as for `open`.
            clamp: as for `open`.

        Returns:
            As `open`.

        Raises:
            BadRequest: as `open`.
            StoreUnavailable: if the counter store fails and the namespace says deny.
            TooManyHolds: as `open`.
        """
        started_ns = time.perf_counter_ns()
        try:
            ttl = checked_ttl_s(ttl_s)
            if check.exempt:
                return self._uncounted(Decision(True), check.cost, ttl)
            counters = ((check.limits, check.subject),)
            cost = fitting_cost(counters, check.cost, clamp)
            decision, handle = await self._reserve(counters, cost, ttl)
        except TidegateError as error:
            self._report_error(error, time.perf_counter_ns() - started_ns)
            raise
        plan = CheckPlan(None, (Charge(counters, cost),), cost, held=handle is not None and handle.counted)
        self._report(plan, (decision,), time.perf_counter_ns() - started_ns)
        if self._all_windows:
            [decision] = await with_windows(self._counters, ((decision, counters),))
        return self._opened(decision, handle, cost, ttl, plan)

    async def settle(self, hold: object, cost: object, *, success: bool = False) -> HoldSettlement:
        """End a hold and charge exactly what was used, also above the limits; 0 cancels it. Idempotent.

        Args:
            hold: its id.
            cost: units used, 0 to 1,000,000,000. Where the rule counts failures, above 0 for a failure; the tier's own limits are
                charged what was reserved.
            success: whether the request succeeded: a rule with `clear_on_success` forgets the failures before it then.

        Returns:
            What became of it.

        Raises:
            BadRequest: if the id or the cost is not valid, or a success has a cost.
            HoldNotFound: if the hold is not known.
            StoreUnavailable: if the counter store does not answer; it is safe to try again.
        """
        handle = HoldHandle.of(hold)
        used = settled_cost(cost)
        if success and used:
            raise BadRequest(
                f"cost {used} and success came together: a request that succeeded is no failure, send cost 0", field="cost"
            )
        if not handle.counted:
            return HoldSettlement(used)
        settled = await holding(self._counters).settle_hold(handle, used, success)
        self.figures.count_settled(handle, settled)
        if self.on_settled is not None and handle.account is not None and not settled.repeated:
            self.on_settled(handle.account, handle.rule or "", *handle.account.units_of(handle.cost, settled.cost))
        return settled

    async def renew(self, hold: object, ttl_s: object) -> int:
        """Let an open hold expire later.

        Args:
            hold: its id.
            ttl_s: after how many seconds from now it expires, 1 to 3600.

        Returns:
            The seconds.

        Raises:
            BadRequest: if the id or the time is not valid.
            HoldNotFound: if the hold is not known.
            HoldEnded: if it was settled or has expired.
            StoreUnavailable: if the counter store does not answer.
        """
        handle = HoldHandle.of(hold)
        ttl = checked_ttl_s(ttl_s)
        if handle.counted:
            await holding(self._counters).renew_hold(handle, ttl * US_PER_S)
        return ttl

    async def _reserve(self, counters: Counters, cost: int, ttl_s: int) -> tuple[Decision, HoldHandle | None]:
        return await holding(self._counters).open_hold(counters, cost, ttl_s * US_PER_S, counters[0][0].rule)

    def _uncounted(self, decision: Decision, cost: int, ttl_s: int) -> OpenedHold:
        self.figures.opened += decision.allowed
        if not decision.allowed:
            return OpenedHold(decision, None, 0, ttl_s)
        return OpenedHold(decision, HoldHandle(new_id(), cost, counted=False).text, cost, ttl_s)

    def _opened(self, decision: Decision, handle: HoldHandle | None, cost: int, ttl_s: int, plan: CheckPlan) -> OpenedHold:
        if handle is None:
            self.figures.denied += 1
            return OpenedHold(decision, None, 0, ttl_s)
        self.figures.opened += 1
        self.figures.degraded += decision.degraded
        counters = plan.charges[0].counters
        failures = next((limits.failures for limits, _ in counters if limits.failures is not None), None)
        if handle.counted:
            customer = (plan.caller.customer if plan.caller is not None else None) or ""
            (limits, subject), whole = counters[0], failures is not None
            account = HoldAccount(limits.tier or "", subject, plan.key_id, customer, decision.overage, whole)
            handle = HoldHandle(handle.id, handle.cost, handle.rule, handle.parts, account=account)
        return OpenedHold(decision, handle.text, cost, ttl_s, failures)


def fitting_cost(counters: Counters, cost: int, clamp: bool) -> int:
    """The cost to reserve.

    Args:
        counters: that it is charged to.
        cost: units wanted.
        clamp: whether more than the limits ever admit is lowered to the most that they do.

    Raises:
        BadRequest: naming the limit, and the remedy.
    """
    lowest: Limit | None = None
    for limits, _ in counters:
        # A soft limit lets every cost pass, and a slot is one whatever the cost.
        for limit in () if limits.soft or limits.algorithm in IN_PROGRESS else limits.limits:
            if lowest is None or _most(limit) < _most(lowest):
                lowest = limit
    if lowest is None or cost <= _most(lowest):
        return cost
    if clamp:
        return _most(lowest)
    raise BadRequest(
        f"cost {cost} is above {_most(lowest)}, the most that the limit {lowest.text} ever admits at once: reserve less, or send "
        f"clamp: true to reserve {_most(lowest)}",
        field="cost",
        most=_most(lowest),
    )


def _most(limit: Limit) -> int:
    if isinstance(limit, QuotaLimit):
        return min(limit.most, UNBOUNDED)
    return limit.capacity


def checked_ttl_s(ttl_s: object) -> int:
    """A time to live.

    Raises:
        BadRequest: if it is not a whole number of seconds from 1 to 3600.
    """
    if type(ttl_s) is float and ttl_s.is_integer():
        ttl_s = int(ttl_s)
    if type(ttl_s) is not int or not MIN_TTL_S <= ttl_s <= MAX_TTL_S:
        raise BadRequest(f"ttl_s {clip(ttl_s)} must be a whole number of seconds from {MIN_TTL_S} to {MAX_TTL_S}", field="ttl_s")
    return ttl_s


def settled_cost(cost: object) -> int:
    """The units that a hold used.

    Raises:
        BadRequest: if they are not a whole number from 0 to 1,000,000,000.
    """
    if type(cost) is not int or not 0 <= cost <= MAX_COST:
        raise BadRequest(f"cost {clip(cost)} must be a whole number from 0, which cancels the hold, to {MAX_COST}", field="cost")
    return cost
