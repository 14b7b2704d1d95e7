"""The leases of one instance, and the decisions made from them. No I/O: `leased` sends the requests and the returns.

A lease is units of one subject that the store has charged already. While it lives, a check that it covers is decided here. Its
life is counted from before its request was sent, on this machine's monotonic clock, and ends `LIFE_MARGIN` and 1 ms early, so it
ends here before it ends in the store.

Which subjects are leased, how much and for how long follows their demand (`lease_demand`).

A lease of a busy subject that is nearly used up is renewed before its last unit is gone: the next one waits behind it. So a
subject has two at most. One that was used until its end is asked for by the next check. Units that are not used for a while are
given up, and so are leases that end.

Not thread-safe: one event loop.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Final

from tidegate.counters import Charge, Counters, GrantingDecision, LeaseRequest, LeaseReturn
from tidegate.counters.lease import Lease
from tidegate.counters.lease_demand import LeaseDemand, Wish
from tidegate.counters.lease_usage import LeaseUsage
from tidegate.decision import Decision
from tidegate.policy.limits import LimitSet

LIFE_MARGIN: Final = 1000
"""A lease ends here 1/1000 of its life, and 1 ms, before it ends in the store: clocks of machines differ by less than 0.1 %."""
_MARGIN_NS: Final = 1_000_000
_LOW: Final = 4
"""A lease of which less than this part remains is renewed."""
_USAGE_STEPS: Final = 200
_ENDS_SOON_NS: Final = 150_000_000
"""Leases that end within this time are renewed if they are used, else given up: a bucket takes nothing back afterwards."""


class LeaseTable:
    """The leases of one instance.

    Args:
        ttl_us: longest life of a lease, µs.
        max_subjects: most leases, and most subjects whose demand is known.
        clock_ns: monotonic ns.

    Attributes:
        divisor: of the requests; see `LeaseRequest`.
        slow_divisor: of those whose leases live longer.
        decisions: checks decided from leases.
        leased: units.
        returned: unused units that the store took back.
        lost: unused units that it did not take back, or that were not given back.
        leases: the current ones, by counters.
        returns: leases given up, to be sent.
        urgent: whether they are to be sent at once: what they count was changed, or they end soon.
        renewals: counters whose leases are to be renewed.
    """

    def __init__(self, ttl_us: int, max_subjects: int, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self.divisor = self.slow_divisor = 2
        self.decisions = 0
        self.leased = 0
        self.returned = 0
        self.lost = 0
        self.leases: OrderedDict[Counters, Lease] = OrderedDict()
        self.returns: list[LeaseReturn] = []
        self.urgent = False
        self.renewals: list[Counters] = []
        self.on_renewal: Callable[[], None] | None = None
        self._ttl_us = ttl_us
        self._max_subjects = max_subjects
        self._clock_ns = clock_ns
        self._by_subject: dict[str, list[Lease]] = {}
        self._pending: OrderedDict[Counters, tuple[LeaseRequest, int, int]] = OrderedDict()
        self._demand = LeaseDemand(ttl_us, max_subjects)
        self._cleared_ns = 0
        self._usage = LeaseUsage(max_subjects)

    @property
    def units(self) -> int:
        """Units leased and not used."""
        return sum(lease.left + (0 if lease.next is None else lease.next.left) for lease in self.leases.values())

    def take(self, counters: Counters, cost: int) -> Decision | None:
        """Decide a check: the hot path, about 1 µs.

        Args:
            counters: that it is charged to.
            cost: units.

        Returns:
            The decision, which is always that it passes; None where the store must decide.
        """
        lease = self.leases.get(counters)
        if lease is None or not cost:
            return None
        now_ns = self._clock_ns()
        left = lease.left - cost
        if left < 0 or now_ns >= lease.expires_ns:
            following = lease.next
            if following is None or following.left < cost or now_ns >= following.expires_ns:
                return None
            self._give_up(lease, now_ns)
            lease, left = following, following.left - cost
        if lease.ahead is not None:
            return self._take_ahead(lease, left, now_ns)
        lease.left = left
        self.decisions += 1
        if left < lease.low and not lease.renewing and lease.next is None:
            self._renew(lease, now_ns)
        # Not later than the true moment, even where this clock is fast.
        at_us = lease.at_us + (now_ns - lease.received_ns) * 999 // 1_000_000
        reset_us = lease.reset_at_us - at_us - left * lease.unit_us
        return Decision(True, lease.binding, lease.base + left, reset_us if reset_us > 0 else 0, 0, at_us, lease.limits)

    def _take_ahead(self, lease: Lease, left: int, now_ns: int) -> Decision | None:
        """Decide from units that come free one after the other: None where this one is not yet."""
        assert lease.ahead is not None
        at_us = lease.at_us + (now_ns - lease.received_ns) * 999 // 1_000_000
        free = lease.ahead.free(at_us) - (lease.granted - left)
        if free < 0:
            return None
        lease.left = left
        self.decisions += 1
        return Decision(True, lease.binding, free, max(lease.reset_at_us - at_us, 0), 0, at_us, lease.limits)

    def request(self, counters: Counters, cost: int, now_ns: int) -> LeaseRequest | None:
        """What to lease with a check that the store decides.

        Args:
            counters: of the check; all must be leasable.
            cost: units, 1 or more.
            now_ns: before it is sent, monotonic.

        Returns:
            The request to send, whose answer goes to `accept`; None for none.
        """
        if counters in self._pending:
            return None
        lease = self.leases.get(counters)
        if lease is not None:
            if lease.next is not None or (lease.left >= cost and now_ns < lease.expires_ns):
                return None
            if lease.left < cost and now_ns < lease.expires_ns:
                # It ran out, or its rest is too little for this check: what it had is given back with the next one.
                self._give_up(lease, now_ns)
        wish = self._demand.wish(counters, cost, now_ns // 1000)
        return None if wish is None else self._new_request(counters, wish, now_ns)

    def answered(self, counters: Counters) -> None:
        """Note that the store decided a check: that is demand. Those in flight at once are not: each is charged by itself.

        Args:
            counters: of the check; all must be leasable.
        """
        self._demand.answered(counters, self._clock_ns() // 1000)

    def confirm(self, counters: Counters) -> None:
        """Note that the store decided a charge, so that it has not lost what was used from earlier leases.

        Args:
            counters: of the charge.
        """
        if self._usage:
            self._usage.forget(counters)

    def usage(self, counters: Counters) -> int:
        """Units used from leases since the store last decided a charge of these counters, and not counted by `take_usage`.

        All that was used of a lease that is current counts: when the store was lost is not known.
        """
        units = self._usage.units(counters, self._clock_ns())
        lease = self.leases.get(counters)
        while lease is not None:
            units += lease.granted - lease.left - lease.counted
            lease = lease.next
        return units

    def take_usage(self, counters: Counters) -> int:
        """As `usage`; the caller counts the units from now on."""
        units = self.usage(counters)
        self._usage.forget(counters)
        lease = self.leases.get(counters)
        while lease is not None:
            lease.counted = lease.granted - lease.left
            lease = lease.next
        return units

    def want_later(self, counters: Counters, cost: int, now_ns: int) -> None:
        """As `request`, for a check that is one of several: the lease is asked for by itself, through `renewals`."""
        if self.request(counters, cost, now_ns) is not None:
            self._pending.pop(counters, None)
            self.renewals.append(counters)
            if self.on_renewal is not None:
                self.on_renewal()

    def renewal(self, counters: Counters, now_ns: int) -> LeaseRequest | None:
        """The request to send with a check of cost 0, for a lease that was in `renewals`; None where it has ended."""
        wish = self._demand.wish(counters, 1, now_ns // 1000)
        return None if wish is None or wish.slow else self._new_request(counters, wish, now_ns)

    def accept(self, counters: Counters, request: LeaseRequest, decision: Decision, sent_ns: int, session: object) -> None:
        """Process the answer to a request; one that comes twice, or after the next request, is ignored.

        Args:
            counters: of the request.
            request: see `request`.
            decision: of the store.
            sent_ns: before the request was sent, monotonic.
            session: see `LeaseGrantor.session`.
        """
        pending = self._pending.get(counters)
        if pending is None or pending[0] is not request:
            return
        if not isinstance(decision, GrantingDecision):
            if not decision.degraded:  # else the answer may still come
                self._forget_request(counters)
            return
        self._forget_request(counters)
        self._usage.forget(counters)
        idle_ns = pending[2]
        self.leased += decision.granted
        now_ns = self._clock_ns()
        lease = self._lease_of(counters, decision, sent_ns, now_ns, session)
        lease.idle_ns = idle_ns
        if request.ttl_us > self._ttl_us or lease.ahead is not None:
            lease.low = 0
        current = self.leases.get(counters)
        unwanted = sent_ns < self._cleared_ns or (current is not None and current.next is not None)
        if unwanted or now_ns >= lease.expires_ns or (current is None and len(self.leases) >= self._max_subjects):
            self._queue_return(lease)
            return
        for subject in {subject for _, subject in counters}:
            self._by_subject.setdefault(subject, []).append(lease)
        if current is None:
            self.leases[counters] = lease
        elif current.left <= 0 or now_ns >= current.expires_ns:
            self._give_up(current, now_ns)
            self.leases[counters] = lease
        else:
            current.renewing = False
            current.next = lease

    def sweep(self, steps: int) -> None:
        """Renew busy leases that end soon; give up those that have ended or are idle.

        Args:
            steps: most leases to examine; the next call examines others.
        """
        now_ns = self._clock_ns()
        for _ in range(min(steps, len(self.leases))):
            counters, lease = next(iter(self.leases.items()))
            self.leases.move_to_end(counters)
            busy = lease.left != lease.swept_left
            if busy:
                lease.swept_left, lease.idle_since_ns = lease.left, now_ns
            if now_ns >= lease.expires_ns:
                self._give_up(lease, now_ns)
            elif now_ns - lease.idle_since_ns >= lease.idle_ns:
                self._drop(lease, now_ns)
            elif (
                lease.next is None
                and lease.ahead is None
                and now_ns >= lease.expires_ns - _ENDS_SOON_NS
                # Where a window ends it, the next one would end with it.
                and lease.ends_us - lease.at_us == self._ttl_us
                and self._ttl_us * 1000 > 2 * _ENDS_SOON_NS
            ):
                if now_ns - lease.idle_since_ns >= _ENDS_SOON_NS:
                    self._drop(lease, now_ns)
                elif not lease.renewing:
                    self._renew(lease, now_ns)
        self._usage.sweep(now_ns, _USAGE_STEPS)
        for counters in list(self._pending)[:steps]:
            if now_ns - self._pending[counters][1] >= self._ttl_us * 1000:
                self._forget_request(counters)
            else:
                break

    def drop(self, of: Callable[[LimitSet, str], bool] | None = None) -> None:
        """Give up leases: what they count was changed. Grants that are on their way are given back when they arrive.

        Args:
            of: selects them by any of their counters; all where None.
        """
        self.urgent = True
        now_ns = self._cleared_ns = self._clock_ns()
        for lease in list(self.leases.values()):
            if of is None or any(of(*counter) for counter in lease.counters):
                self._drop(lease, now_ns)

    def forget(self, counters: Iterable[tuple[LimitSet, str]]) -> None:
        """Drop the leases of counters that are reset: there is nothing to give back.

        Args:
            counters: pairs of limits and subject.
        """
        names = {(limits.name, limits.algorithm, subject) for limits, subject in counters}
        kept = len(self.returns)
        self.drop(lambda limits, subject: (limits.name, limits.algorithm, subject) in names)
        for each in self.returns[kept:]:
            self.lost += each.unused
        del self.returns[kept:]
        self._usage.forget_where(lambda limits, subject: (limits.name, limits.algorithm, subject) in names)

    def unused(self, limits: LimitSet, subject: str) -> int:
        """Units of a counter that are leased here and not used."""
        now_ns = self._clock_ns()
        return sum(
            lease.left
            for lease in self._by_subject.get(subject, ())
            if lease.ahead is None
            and now_ns < lease.expires_ns
            and any(limits.name == each.name for each, own in lease.counters if own == subject)
        )

    def settled(self, returned: LeaseReturn, taken: bool) -> None:
        """Note what became of a return.

        Args:
            returned: the return.
            taken: whether its units are available again.
        """
        if taken:
            self.returned += returned.unused
        else:
            self.lost += returned.unused

    def take_returns(self, most: int) -> list[LeaseReturn]:
        """Take leases out of `returns`: each is sent once.

        Args:
            most: how many, at most.
        """
        taken, self.returns = self.returns[:most], self.returns[most:]
        return taken

    def take_renewals(self) -> list[Counters]:
        """Take out `renewals`."""
        taken, self.renewals = self.renewals, []
        return taken

    def abandon(self) -> None:
        """Forget all leases and give none back: they belong to another process, of which this one is a copy."""
        self.leases.clear()
        self._by_subject.clear()
        self._pending.clear()
        self.returns, self.renewals = [], []
        self._usage = LeaseUsage(self._max_subjects)

    def _new_request(self, counters: Counters, wish: Wish, now_ns: int) -> LeaseRequest | None:
        if counters in self._pending or (counters not in self.leases and len(self.leases) >= self._max_subjects):
            return None
        request = LeaseRequest(wish.units, self.slow_divisor if wish.slow else self.divisor, wish.life_us, wish.ahead)
        self._pending[counters] = (request, now_ns, wish.idle_us * 1000)
        return request

    def _forget_request(self, counters: Counters) -> None:
        self._pending.pop(counters, None)
        lease = self.leases.get(counters)
        if lease is not None:
            lease.renewing = False

    def _renew(self, lease: Lease, now_ns: int) -> None:
        lease.renewing = True
        if lease.left < lease.low:
            self._demand.ran_out(lease.counters, lease.granted, (now_ns - lease.sent_ns) // 1000, now_ns // 1000)
        self.renewals.append(lease.counters)
        if self.on_renewal is not None:
            self.on_renewal()

    def _lease_of(self, counters: Counters, decision: GrantingDecision, sent_ns: int, now_ns: int, session: object) -> Lease:
        lease = Lease()
        life_us = decision.ends_us - decision.at_us
        lease.counters, lease.session = counters, session
        lease.granted = lease.left = lease.swept_left = decision.granted
        lease.low = decision.granted // _LOW
        lease.sent_ns, lease.idle_since_ns, lease.idle_ns = sent_ns, now_ns, self._ttl_us * 500
        lease.expires_ns = sent_ns + (life_us - life_us // LIFE_MARGIN) * 1000 - _MARGIN_NS
        lease.at_us, lease.ends_us = decision.at_us, decision.ends_us
        lease.received_ns = now_ns
        lease.base = max((decision.remaining or 0) - decision.granted, 0)
        lease.binding, lease.limits, lease.ahead = decision.binding, decision.limits, decision.ahead
        lease.reset_at_us = decision.at_us + decision.reset_after_us
        lease.unit_us, lease.next, lease.renewing, lease.counted = 0, None, False, 0
        limits, binding = decision.limits, decision.binding
        if limits is not None and limits.algorithm.is_bucket and binding is not None and binding in limits.limits:
            lease.unit_us = binding.window_us // binding.amount
        return lease

    def _drop(self, lease: Lease, now_ns: int) -> None:
        """Give up a lease and the one that waits behind it."""
        following = lease.next
        self._give_up(lease, now_ns)
        if following is not None:
            self._give_up(following, now_ns)

    def _give_up(self, lease: Lease, now_ns: int) -> None:
        """Give up a lease; the one that waits behind it takes its place."""
        counters = lease.counters
        used = lease.granted - lease.left
        held_us, now_us = (min(now_ns, lease.expires_ns) - lease.sent_ns) // 1000, now_ns // 1000
        if lease.left:
            self._demand.left_over(counters, lease.granted, used, held_us, now_us)
        else:
            self._demand.ran_out(counters, lease.granted, held_us, now_us)
        if self.leases.get(counters) is lease:
            if lease.next is not None:
                self.leases[counters] = lease.next
            else:
                del self.leases[counters]
        if used > lease.counted:
            until_ns = lease.received_ns + (lease.reset_at_us - lease.at_us) * 1000
            self._usage.add(counters, used - lease.counted, until_ns)
        for subject in {subject for _, subject in counters}:
            own = self._by_subject[subject]
            own.remove(lease)
            if not own:
                del self._by_subject[subject]
        lease.next = None
        self._queue_return(lease)

    def _queue_return(self, lease: Lease) -> None:
        unused, lease.left = lease.left, 0
        bucket = any(limits.algorithm.is_bucket for limits, _ in lease.counters)
        self.urgent = self.urgent or bucket
        if unused or bucket:
            self.returns.append(LeaseReturn(lease.counters, lease.granted, unused, lease.at_us, lease.ends_us, lease.session))


def covers(charge: Charge) -> bool:
    """Whether a charge may be leased, by its limits: all of them or none."""
    for limits, _ in charge.counters:
        if not limits.leasable:
            return False
    return charge.cost > 0
