"""The fallback: this instance's share of each limit, counted in its memory while the store is away.

A share is `limit / instances`, rounded down, at least 1. So all instances together admit at most the limit again from the moment
the store was lost (more only where there are more instances than units). What was admitted is owed to the store: it is taken out
by `take` and added there, before that subject's next charge.

What was added there still uses up the share until the store has decided a charge of the same subject (`answered`). Otherwise a
store that accepts debts and fails charges (its script is missing and it is too slow to load it, say) would renew the share
with each debt, and everything would pass.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Final, TypeAlias

import msgspec

from tidegate.algorithms import DECIDE, State
from tidegate.counters import Charge, Counters
from tidegate.counters.memory import MemoryCounters
from tidegate.decision import Decision
from tidegate.errors import PolicyError
from tidegate.policy.limits import AnyAlgorithm, Limit, LimitSet
from tidegate.policy.quotas import UNBOUNDED, QuotaLimit

_MAX_SHARES: Final = 65_536
_Debt: TypeAlias = tuple[str, AnyAlgorithm, str]
"""Identifies a counter in the store. Not the limit set: sets are made anew whenever a tier is loaded."""


class LocalShares:
    """Shares of one instance.

    Args:
        max_subjects: most counters, 1 or more.
        clock: gives µs since the epoch by the estimated clock of the store; never goes back.
    """

    def __init__(self, max_subjects: int, clock: Callable[[], int]) -> None:
        # Ordered: debts leave at the front, and finding the first key of a plain dict walks the gaps that they leave.
        self.owed: OrderedDict[_Debt, LimitSet] = OrderedDict()
        self.unanswered: OrderedDict[_Debt, int] = OrderedDict()
        """Debts that were taken out, and whose subjects the store has not decided since: until when they count, at least."""
        self._max_subjects = max_subjects
        self._clock = clock
        self._counters = MemoryCounters(max_subjects, clock)
        # What is owed of it.
        self._debts = MemoryCounters(max_subjects, clock)
        self._instances = 1
        self._shares: dict[LimitSet, tuple[int, LimitSet]] = {}

    def charge(self, charge: Charge, instances: int) -> Decision:
        """Decide a charge by the shares.

        Args:
            instances: how many share the limits, 1 or more.

        Returns:
            The decision, degraded. Its limit is the rule's own, what remains is of the share.
        """
        self._instances = instances
        counters = tuple((self._share(limits, instances), subject) for limits, subject in charge.counters)
        decision = self._counters.charge_all(counters, charge.cost)
        if decision.allowed and charge.cost:
            self._debts.charge_all(counters, charge.cost)
            for limits, subject in charge.counters:
                self.owed[_debt(limits, subject)] = limits
            while len(self.owed) > self._max_subjects:
                self.owed.popitem(last=False)
        return Decision(
            decision.allowed,
            _own_limit(decision.binding, charge),
            decision.remaining,
            decision.reset_after_us,
            decision.retry_after_us,
            decision.at_us,
            charge.counters[0][0],
            degraded=True,
            overage=decision.overage,
        )

    def count(self, charge: Charge, units: int, instances: int) -> None:
        """Let units that the store has charged already use up the shares until it decides a charge; they are not owed.

        Args:
            charge: for its counters.
            units: 1 or more.
            instances: how many share the limits, 1 or more.
        """
        self._instances = instances
        now = self._clock()
        for limits, subject in charge.counters:
            share, decide = self._share(limits, instances), DECIDE[limits.algorithm]
            self._counters.add(share, subject, [decide(each, None, now, min(units, each.capacity))[0] for each in share.limits])
            left = self._counters.charge_all(((share, subject),), 0)
            self._await_answer(_debt(limits, subject), left.reset_after_us)

    def _await_answer(self, debt: _Debt, reset_after_us: int) -> None:
        self.unanswered[debt] = max(self._clock() + reset_after_us, self.unanswered.get(debt, 0))
        while len(self.unanswered) > self._max_subjects:
            self.unanswered.popitem(last=False)

    def used(self, charge: Charge, instances: int) -> int:
        """Units of the shares that are used up, of the limit with the least left.

        Args:
            charge: for its counters.
            instances: how many share the limits, 1 or more.
        """
        counters = tuple((self._share(limits, instances), subject) for limits, subject in charge.counters)
        decision = self._counters.charge_all(counters, 0)
        if decision.binding is None:
            return 0
        return decision.binding.capacity - (decision.remaining or 0) + decision.overage

    def capacity(self, charge: Charge, instances: int) -> int:
        """Most units that the shares can admit at once.

        Args:
            charge: for its counters.
            instances: how many share the limits, 1 or more.
        """
        return min(limit.capacity for limits, _ in charge.counters for limit in self._share(limits, instances).limits)

    def owes(self, limits: LimitSet, subject: str) -> bool:
        """Whether a subject has a debt.

        Args:
            limits: the rule's own, as they are now.
            subject: whom they count.

        Returns:
            True where `take` may give something.
        """
        return _debt(limits, subject) in self.owed

    def debts(self) -> Iterator[tuple[LimitSet, str]]:
        """All that is owed, the oldest first; nothing may be charged or taken meanwhile.

        Yields:
            Limits and subject of each.
        """
        for (_, _, subject), limits in self.owed.items():
            yield limits, subject

    def oldest(self, count: int) -> list[tuple[LimitSet, str]]:
        """Some of what is owed, the oldest first.

        Returns:
            Limits and subject of each.
        """
        return [(limits, subject) for (_, _, subject), limits in islice(self.owed.items(), count)]

    def defer(self, limits: LimitSet, subject: str) -> None:
        """Move a debt to the end: it cannot be added to the store now.

        Args:
            limits: the rule's own.
            subject: whom they count.
        """
        self.owed.move_to_end(_debt(limits, subject))

    def owe(self, charge: Charge, at_us: int) -> None:
        """Add a debt for a charge that was admitted without the shares.

        Args:
            charge: what was admitted.
            at_us: when, by the store's clock.
        """
        for limits, subject in charge.counters:
            decide = DECIDE[limits.algorithm]
            states = [decide(limit, None, at_us, charge.cost)[0] for limit in limits.limits]
            self._counters.add(self._share(limits, self._instances), subject, states)
            self.give_back(limits, subject, tuple(states))

    def take(self, limits: LimitSet, subject: str) -> tuple[State, ...] | None:
        """Remove and return what a subject owes; its share stays used up until `answered`.

        Args:
            limits: the rule's own.
            subject: whom they count.

        Returns:
            A state for each limit; None where nothing is owed, or nothing that still counts.
        """
        debt = _debt(limits, subject)
        self.owed.pop(debt, None)
        states = self._debts.take(self._share(limits, 1), subject)
        if states is not None:
            left = self._counters.charge_all(((self._share(limits, self._instances), subject),), 0)
            self._await_answer(debt, left.reset_after_us)
        return states

    def answered(self, counters: Counters) -> None:
        """The store has decided a charge: the shares of its counters begin anew, unless something is owed again."""
        for limits, subject in counters:
            debt = _debt(limits, subject)
            if debt in self.unanswered and debt not in self.owed:
                del self.unanswered[debt]
                self._counters.take(self._share(limits, 1), subject)

    def give_back(self, limits: LimitSet, subject: str, states: tuple[State, ...]) -> None:
        """Undo `take`: it could not be added to the store.

        Args:
            limits: the rule's own.
            subject: whom they count.
            states: as `take` gave them.
        """
        # As a share: under the whole limit a bucket would drain faster than this instance's share of it.
        self._debts.add(self._share(limits, self._instances), subject, states)
        self.owed[_debt(limits, subject)] = limits

    def forget(self, limits: LimitSet, subject: str) -> None:
        """Drop a debt: the counter was reset.

        Args:
            limits: the rule's own.
            subject: whom they count.
        """
        self.take(limits, subject)
        self.unanswered.pop(_debt(limits, subject), None)
        self._counters.take(self._share(limits, 1), subject)

    def sweep(self, steps: int) -> None:
        """Drop what has expired.

        Args:
            steps: most counters to process.
        """
        self._counters.sweep(steps)
        self._debts.sweep(steps)
        now = self._clock()
        for debt, until in list(islice(self.unanswered.items(), steps)):
            if until > now:
                self.unanswered.move_to_end(debt)
            else:
                del self.unanswered[debt]

    def _share(self, limits: LimitSet, instances: int) -> LimitSet:
        if instances == 1:
            return limits
        known = self._shares.get(limits)
        if known is not None and known[0] == instances:
            return known[1]
        share = LimitSet(
            limits.name,
            limits.algorithm,
            [share_of(limit, instances, limits) for limit in limits.limits],
            limits.on_failure,
            rule=limits.rule,
            tier=limits.tier,
            quotas=limits.quotas,
            soft=limits.soft,
            failures=limits.failures,
        )
        if len(self._shares) >= _MAX_SHARES:
            self._shares.clear()
        self._shares[limits] = (instances, share)
        return share


def _debt(limits: LimitSet, subject: str) -> _Debt:
    return limits.name, limits.algorithm, subject


def share_of(limit: Limit, instances: int, limits: LimitSet) -> Limit:
    """One instance's share of a limit.

    Args:
        limit: one of `limits`.
        instances: 1 or more.
        limits: for the algorithm. A bucket's share must be countable exactly, so it may be rounded down to a rounder amount.

    Returns:
        The limit for one instance: at least 1, of the same window.
    """
    amount = max(limit.amount // instances, 1)
    if isinstance(limit, QuotaLimit):
        return msgspec.structs.replace(limit, amount=amount, most=max(limit.most // instances, 1))
    burst = None if limit.burst is None else max(limit.burst // instances, 1)
    while True:
        share = msgspec.structs.replace(limit, amount=amount, burst=burst)
        try:
            LimitSet("share", limits.algorithm, [share])
        except PolicyError:
            if amount > 1:
                # Fewer digits that are not 0 have more factors in common with the window.
                digits = len(str(amount).rstrip("0"))
                unit = 10 ** (len(str(amount)) - max(digits - 1, 1))
                amount = amount // unit * unit if digits > 1 else max(amount // 10, 1)
            else:
                burst = max((burst or 1) // 2, 1)
        else:
            return share


def passes_without_end(decision: Decision) -> bool:
    """Whether more passes above the limits that an overage is about, however much did so far."""
    binding = decision.binding
    if isinstance(binding, QuotaLimit):
        return binding.most == UNBOUNDED
    return decision.limits is not None and decision.limits.soft


def _own_limit(binding: Limit | None, charge: Charge) -> Limit | None:
    """The rule's own limit for a share's: the first of that window, the rule's before the tier's."""
    if binding is None:
        return None
    for limits, _ in charge.counters:
        for limit in limits.limits:
            if limit.window_name == binding.window_name:
                return limit
    return binding
