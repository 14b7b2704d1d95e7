"""A store that grants leases, in memory: the Python twins of grant and return, on all counters of a check in one step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tidegate.algorithms import DECIDE
from tidegate.algorithms.leases import give_back, grant
from tidegate.counters import Charge, GrantingDecision, LastDecision, LeaseReturn
from tidegate.decision import Decision
from tidegate.policy.limits import LimitSet

Counters = tuple[tuple[LimitSet, str], ...]


class LeaseStore:
    """Counters that lease. States are kept by name, subject and window, so that changed limits keep what was consumed.

    Args:
        clock: gives µs since the epoch.
    """

    def __init__(self, clock: Callable[[], int]) -> None:
        self.states: dict[tuple[str, str, str], Any] = {}
        self.reset_at: dict[tuple[str, str], int] = {}
        self._clock = clock

    def charge(self, charge: Charge) -> Decision:
        """Decide a charge, and grant the lease that it asks for."""
        now = self._clock()
        counters = [
            (limits.algorithm, limits.limits, [self._state(limits, subject, limit) for limit in limits.limits])
            for limits, subject in charge.counters
        ]
        outcomes = [
            (limit, *DECIDE[algorithm](limit, state, now, charge.cost))
            for algorithm, limits, states in counters
            for limit, state in zip(limits, states, strict=True)
        ]
        denied = [each for each in outcomes if each[1] is None]
        binding, _, remaining, reset, _ = min(denied or outcomes, key=lambda each: each[2])
        never = any(each[4] is None for each in denied)
        retry = None if never else max((each[4] or 0 for each in denied), default=0)
        lease = charge.lease
        granted = grant(
            counters, now, charge.cost, *((lease.want, lease.divisor, lease.ttl_us, lease.ahead) if lease else (0, 2, 0))
        )
        assert granted.allowed == (not denied)
        assert granted.remaining == remaining
        for (limits, subject), states in zip(charge.counters, granted.states, strict=True):
            for limit, state in zip(limits.limits, states, strict=True):
                self.states[limits.name, subject, limit.window_name] = state
        answer = (not denied, binding, remaining, reset, retry, now, charge.counters[0][0])
        following = None
        if lease is not None and charge.cost and (denied or remaining < charge.cost):
            following = self.charge(Charge(charge.counters, charge.cost))
            assert not following.allowed
        if granted.ahead is not None:
            units, ends_us = granted.units, granted.ends_us
            return GrantingDecision(*answer, granted=units, ends_us=ends_us, ahead=granted.ahead, following=following)
        if following is not None and not denied:
            return LastDecision(*answer, following=following)
        if not granted.units:
            return Decision(*answer)
        return GrantingDecision(*answer, granted=granted.units, ends_us=granted.ends_us)

    def give_back(self, returned: LeaseReturn) -> None:
        """Give up a lease."""
        now = self._clock()
        for limits, subject in returned.counters:
            if self.reset_at.get((limits.name, subject), -1) >= returned.at_us:
                continue
            for limit in limits.limits:
                key = (limits.name, subject, limit.window_name)
                self.states[key] = give_back(
                    limits.algorithm,
                    limit,
                    self.states.get(key),
                    now,
                    returned.granted,
                    returned.unused,
                    returned.at_us,
                    returned.ends_us,
                )

    def reset(self, counters: Sequence[tuple[LimitSet, str]]) -> None:
        """Reset counters."""
        for limits, subject in counters:
            self.reset_at[limits.name, subject] = self._clock()
            for limit in limits.limits:
                self.states.pop((limits.name, subject, limit.window_name), None)

    def _state(self, limits: LimitSet, subject: str, limit: Any) -> Any:
        return self.states.get((limits.name, subject, limit.window_name))
