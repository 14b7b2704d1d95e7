"""Leases: units charged in advance, for an instance that uses them without asking again; pure functions, as the algorithms.

A grant is a second charge in the same step as that of a check. What makes it strict depends on the algorithm:

- *Windows* and *quotas*: a lease ends with its window or period. So a unit that is charged there is used there, or not at all.
  Above a quota, where overage lets checks pass, nothing is leased.
- *Buckets*: while a lease lives, the level does not drain below the units that are leased. So the units used and those still to
  be used together never exceed the level.

Of a sliding window whose limit is reached, units that are not free yet are leased ahead (`Ahead`): they are charged now, and
each is used from the moment on at which it would have been free. Until then all others are denied, so what was admitted is at
no time more than without.

`sliding_log` is never leased: its promise holds for any span of time, and a unit would count from its grant, not from its use.

A return gives up a lease. Unused units of windows and quotas are subtracted from where they were charged; those of buckets from
the level, unless the lease has ended: then the level has drained as if they had been used, and they are lost.

A bucket's state remembers two groups of leases: the earlier ones, which end together, and all later ones. So an instance that
died holds back units for two lease lives at most, however often others lease; and a state grows by four numbers, not by as many
as there are instances. Returns are subtracted from the earlier group first: the later one lives longer, so that errs on the safe
side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple, TypeAlias

from tidegate.algorithms import DECIDE, State, fixed_window, quota, sliding_window
from tidegate.algorithms.calendar import bounds_of
from tidegate.algorithms.token_bucket import level_at, live_leases
from tidegate.policy.limits import Algorithm, AnyAlgorithm, Limit
from tidegate.policy.quotas import QuotaLimit
from tidegate.timestamps import US_PER_S

MIN_LIFE_US: Final = 20_000
"""Shorter leases are not granted: most of their life would be over when the reply arrives. The same number is in the Lua."""

AHEAD_US: Final = 5_000_000
"""Units that come free later are not leased. The same number is in the Lua."""
MIN_AHEAD: Final = 2
"""Fewer units are not leased ahead. The same number is in the Lua."""

Counter: TypeAlias = tuple[AnyAlgorithm, Sequence[Limit], Sequence[State]]
"""How a counter counts, its limits, and a state for each of them."""


class Ahead(NamedTuple):
    """When units of a sliding window come free that were leased before: as the units of the window before it count less and less.

    Args:
        current: units charged in the window before those of the lease.
        previous: units charged in the window before it.
        end_us: when the window ends, µs since the epoch.
        window_us: its length.
        amount: of the limit.
    """

    current: int
    previous: int
    end_us: int
    window_us: int
    amount: int

    def free(self, at_us: int) -> int:
        """How many units of the lease may have been used at a moment of the window, µs since the epoch."""
        return self.amount - self.current - self.previous * max(self.end_us - at_us, 0) // self.window_us


class Grant(NamedTuple):
    """The outcome of a check that asked for a lease.

    Args:
        allowed: whether the check passed.
        remaining: after the check, before the grant, of the limit with the least left.
        units: leased beyond the check; 0 for none.
        ends_us: when the lease ends, µs since the epoch; 0 where there is none.
        states: of each counter, new; as they were where the check was denied and nothing leased.
        ahead: when the units come free; None where they are free.
    """

    allowed: bool
    remaining: int
    units: int
    ends_us: int
    states: list[list[State]]
    ahead: Ahead | None = None


def grant(counters: Sequence[Counter], now: int, cost: int, want: int, divisor: int, ttl_us: int, ahead: int = 0) -> Grant:
    """Decide a check on all its counters, charge it, and lease further units to who sent it.

    Args:
        counters: all that the check is charged to; none may be a sliding log.
        now: µs since the epoch.
        cost: units, 0 or more.
        want: units to lease, at most.
        divisor: what is leased is at most what remains divided by this, 2 or more: close to a limit nothing is leased.
        ttl_us: life of the lease, at most.
        ahead: units to lease, at most, where the cost does not pass, or not again: of those that come free until the lease ends.

    Returns:
        The outcome.
    """
    passed, remaining, states = _charge(counters, now, cost)
    none = Grant(passed, remaining, 0, 0, states if cost else [list(each) for _, _, each in counters])
    if not passed or remaining < cost:
        return _grant_ahead(none, counters, now, ttl_us, ahead)
    units = min(want, remaining // divisor)
    life = min([ttl_us, *(_left(limit, now) for algorithm, limits, _ in counters if not algorithm.is_bucket for limit in limits)])
    if units < 1 or life < MIN_LIFE_US:
        return none
    charged = [(algorithm, limits, own) for (algorithm, limits, _), own in zip(counters, states, strict=True)]
    _, _, states = _charge(charged, now, units)
    for (algorithm, _, _), own in zip(counters, states, strict=True):
        if algorithm.is_bucket:
            own[:] = [_with_lease(state, units, now + life) for state in own]
    return Grant(True, remaining, units, now + life, states)


def _grant_ahead(none: Grant, counters: Sequence[Counter], now: int, ttl_us: int, want: int) -> Grant:
    algorithm, limits, _ = counters[0]
    limit = limits[0]
    if len(counters) > 1 or len(limits) > 1 or algorithm is not Algorithm.SLIDING_WINDOW or limit.is_calendar:
        return none
    state = sliding_window.decide(limit, none.states[0][0], now, 0)[0]
    if state is None or state[0] < 0 or state[0] > now:
        return none
    start, current, previous = state
    end, window = start + limit.window_us, limit.window_us
    life = min(ttl_us, AHEAD_US, end - now)
    units = min(want, Ahead(current, previous, end, window, limit.amount).free(now + life))
    if units < MIN_AHEAD or life < MIN_LIFE_US:
        return none
    charged: list[list[State]] = [[(start, current + units, previous)]]
    ahead = Ahead(current, previous, end, window, limit.amount)
    return Grant(none.allowed, none.remaining, units, now + life, charged, ahead)


def give_back(
    algorithm: AnyAlgorithm, limit: Limit, state: State, now: int, units: int, unused: int, at_us: int, ends_us: int
) -> State:
    """Give up a lease: take its units out of a state.

    Args:
        state: of it; None for nothing.
        now: µs since the epoch.
        units: that were leased.
        at_us: when they were, µs since the epoch.
        ends_us: when the lease ends.

    Returns:
        The new state; the same one where the lease is not in it any more.
    """
    if state is None:
        return None
    if algorithm.is_bucket:
        return _give_back_to_bucket(state, now, units, unused, ends_us)
    if isinstance(limit, QuotaLimit):
        second = at_us - at_us % US_PER_S
        return state if second > state[0] else quota.merge(limit, state, (second, -unused))
    start = bounds_of(limit, at_us)[0] if limit.is_calendar else at_us - at_us % limit.window_us
    if start > state[0]:
        return state
    if algorithm is Algorithm.FIXED_WINDOW:
        return fixed_window.merge(limit, state, (start, -unused))
    return sliding_window.merge(limit, state, (start, -unused, 0))


def _charge(counters: Sequence[Counter], now: int, cost: int) -> tuple[bool, int, list[list[State]]]:
    """Whether a cost passes, what remains of the limit with the least left, and the states after it (as they were if denied)."""
    outcomes = [
        [DECIDE[algorithm](limit, state, now, cost) for limit, state in zip(limits, states, strict=True)]
        for algorithm, limits, states in counters
    ]
    every = [outcome for each in outcomes for outcome in each]
    denials = [outcome[1] for outcome in every if outcome[0] is None]
    if denials:
        return False, min(denials), [list(states) for _, _, states in counters]
    return True, min(outcome[1] for outcome in every), [[outcome[0] for outcome in each] for each in outcomes]


def _left(limit: Limit, now: int) -> int:
    """µs until the window or period that contains `now` ends."""
    if isinstance(limit, QuotaLimit):
        return limit.clock.bounds(now)[1] - now
    return bounds_of(limit, now)[1] - now if limit.is_calendar else limit.window_us - now % limit.window_us


def _with_lease(state: State, units: int, ends_us: int) -> State:
    """A bucket's state with one more lease. Ends are whole seconds, rounded up."""
    assert state is not None
    end_s = -(-ends_us // US_PER_S) * US_PER_S
    known = live_leases(state, state[3])
    if not known:
        return (*state[:4], end_s, units, 0, 0)
    end, held, later_end, later = known
    return (*state[:4], end, held, max(end, later_end, end_s), later + units)


def _give_back_to_bucket(state: tuple[Any, ...], now: int, units: int, unused: int, ends_us: int) -> State:
    now = max(now, state[3])
    leases = live_leases(state, now)
    # Where fewer are known than are given up, the state has been lost since, and with it what was charged for them.
    if now >= ends_us or not leases or leases[1] + leases[3] < units:
        return state
    end, held, later_end, later = leases
    _, scale, rate, _ = state[:4]
    level = max(level_at(state, now, scale, rate) - unused * scale, 0)
    from_held = min(held, units)
    rest = (level, scale, rate, now, end, held - from_held, later_end, later - (units - from_held))
    return (*rest[:4], *live_leases(rest, now))
