"""Holds: units reserved for a cost that is known later; pure functions, as the algorithms.

Opening a hold charges its cost as a check does. These functions are what follows: `give_back` returns units that were not used,
`charge` charges units without applying the limit. What makes a return safe depends on the algorithm:

- *Windows and quotas*: units go back only into the window or period that they were charged in. One that is over keeps its count.
- *Logs*: units leave the entry that they were charged with.
- *Buckets*: charged units drain with time, the earliest first. Only those that have not drained go back: others were admitted in
  place of the rest. So the level never falls below that of a bucket that was charged what was used, at the time of the hold.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Final

import msgspec

from tidegate.algorithms import DECIDE, State, fixed_window, quota, sliding_window
from tidegate.algorithms.calendar import bounds_of
from tidegate.algorithms.token_bucket import level_at, live_leases
from tidegate.policy.limits import MAX_EXACT, Algorithm, AnyAlgorithm, Limit
from tidegate.policy.quotas import QuotaLimit
from tidegate.timestamps import US_PER_S

UNBOUNDED: Final = 2**50
"""Amount of a limit that is not applied; the same number is in the Lua."""
REFUND_ENTRIES: Final = 1000
"""Latest entries of a log that a refund reads at most; the same number is in the Lua."""


# Members of an enumeration are found slowly.
_FIXED: Final = Algorithm.FIXED_WINDOW
_SLIDING: Final = Algorithm.SLIDING_WINDOW


def undrained_of(algorithm: AnyAlgorithm, state: State) -> int:
    """What `give_back` has to know of a state just after a hold was charged to it.

    Args:
        state: the new state.

    Returns:
        For a bucket its level in whole tokens, rounded down, without leased units; 0 for others.
    """
    if state is None or not algorithm.is_bucket:
        return 0
    level, scale, _, at = state[:4]
    return int(level // scale) - (_leased(state, at) if len(state) > 4 else 0)


def give_back(algorithm: AnyAlgorithm, limit: Limit, state: State, now: int, units: int, at_us: int, undrained: int) -> State:
    """Return units that were charged by a hold and not used.

    Args:
        state: of it; None for nothing.
        now: µs since the epoch.
        units: to return, at most what was charged.
        at_us: when they were charged, µs since the epoch.
        undrained: what `undrained_of` said then.

    Returns:
        The new state; the same one where the units do not count any more.
    """
    if state is None:
        return None
    if (algorithm is _SLIDING or algorithm is _FIXED) and not limit.is_calendar and state[0] == at_us - at_us % limit.window_us:
        # Most often: the window is still the one that they were charged in.
        used = state[1] - units if state[1] > units else 0
        return (state[0], used) if algorithm is _FIXED else (state[0], used, state[2])
    if algorithm is Algorithm.SLIDING_LOG:
        return _give_back_to_log(state, units, at_us)
    if algorithm.is_bucket:
        return _give_back_to_bucket(state, now, units, at_us, undrained)
    if isinstance(limit, QuotaLimit):
        second = at_us - at_us % US_PER_S
        return state if second > state[0] else quota.merge(limit, state, (second, -units))
    start = bounds_of(limit, at_us)[0] if limit.is_calendar else at_us - at_us % limit.window_us
    if start > state[0]:
        return state
    if algorithm is Algorithm.FIXED_WINDOW:
        return fixed_window.merge(limit, state, (start, -units))
    return sliding_window.merge(limit, state, (start, -units, 0))


def refund(algorithm: AnyAlgorithm, limit: Limit, state: State, now: int, units: int) -> State:
    """Return units that no hold charged: at most what counts now in the current window, level or log.

    Args:
        state: of it; None for nothing.
        now: µs since the epoch.
        units: to return, 1 or more.

    Returns:
        The new state.
    """
    if state is not None and algorithm is Algorithm.SLIDING_LOG:
        return _refund_to_log(state, units)
    return give_back(algorithm, limit, state, now, units, now, undrained_of(algorithm, state))


def charge(algorithm: AnyAlgorithm, limit: Limit, state: State, now: int, cost: int) -> State:
    """Charge units whatever the limit says: what a hold used beyond its cost, or after it expired.

    Args:
        state: of it; None for nothing.
        now: µs since the epoch.
        cost: units, 1 or more.

    Returns:
        The new state; the level of a bucket is at most 2^53.
    """
    if isinstance(limit, QuotaLimit):
        unbounded: Limit = msgspec.structs.replace(limit, amount=UNBOUNDED, most=UNBOUNDED)
    elif algorithm.is_bucket:
        unbounded = msgspec.structs.replace(limit, burst=MAX_EXACT)
    else:
        unbounded = msgspec.structs.replace(limit, amount=UNBOUNDED)
    charged = DECIDE[algorithm](unbounded, state, now, cost)[0]
    assert charged is not None, "an unbounded limit admits every cost"
    return (min(charged[0], MAX_EXACT), *charged[1:]) if algorithm.is_bucket else charged


def _leased(state: Sequence[int], now: int) -> int:
    """Units of leases that have not ended."""
    leases = live_leases(tuple(state), now)
    return leases[1] + leases[3] if leases else 0


def _give_back_to_bucket(state: tuple[int, ...], now: int, units: int, at_us: int, undrained: int) -> State:
    _, scale, rate, at = state[:4]
    now = max(now, at)
    returned = min(units * scale, undrained * scale - (now - at_us) * rate)
    if returned <= 0:
        return state
    if len(state) == 4:
        # Nothing is leased. What has not drained is in the level, so that is not below 0.
        return max(state[0] - (now - at) * rate - returned, 0), scale, rate, now
    level = level_at(state, now, scale, rate)
    # Leased units stay: an instance may use them.
    level = max(level - returned, min(level, _leased(state, now) * scale))
    return (level, scale, rate, now, *live_leases(state, now))


def _give_back_to_log(state: tuple[int, tuple[int, ...], tuple[int, ...]], units: int, at_us: int) -> State:
    used, times, costs = state
    at = bisect_left(times, at_us)
    if at == len(times) or times[at] != at_us:
        return state
    returned = min(units, costs[at])
    if returned == costs[at]:
        return used - returned, times[:at] + times[at + 1 :], costs[:at] + costs[at + 1 :]
    return used - returned, times, (*costs[:at], costs[at] - returned, *costs[at + 1 :])


def _refund_to_log(state: tuple[int, tuple[int, ...], tuple[int, ...]], units: int) -> State:
    """The latest entries first."""
    used, times, costs = state
    kept, rest = len(times), units
    oldest = max(kept - REFUND_ENTRIES, 0)
    while kept > oldest and rest >= costs[kept - 1]:
        kept -= 1
        rest -= costs[kept]
    if kept > oldest and rest:
        return used - units, times[:kept], (*costs[: kept - 1], costs[kept - 1] - rest)
    return used - units + rest, times[:kept], costs[:kept]
