"""Reservations: units charged for a later moment, at which their owner may go; pure functions, as the algorithms.

A reservation is decided as a check at the first moment at which its cost passes, and charged at once. Until that moment nothing
that would break its promise passes:

- *Windows*: it is charged in the window of its moment. Where that window has not begun, the start in the state is below 0: until
  it begins, checks are denied and later reservations come after it, also where the present window has room for a smaller cost.
- *Buckets*: the level rises above the burst, by what drains until the moment. That is virtual scheduling: a check that would pass
  before the moment finds the level too high.

`sliding_log` cannot be reserved: an entry would have to count before its moment and after it for two different spans.

A cancelled reservation gives its units back before its moment. Windows take them back whole. Buckets take back those of the last
moment: who comes later was scheduled on the level, and the state does not say how far that may fall until then. So in a bucket
the units of a place in the middle of a queue drain as if their owner had gone.
"""

from __future__ import annotations

from typing import Any, Final

from tidegate.algorithms import State
from tidegate.algorithms.calendar import bounds_of
from tidegate.algorithms.token_bucket import level_at, live_leases, scale_and_rate
from tidegate.policy.limits import MAX_EXACT, Algorithm, AnyAlgorithm, Limit

RESERVABLE: Final = frozenset(Algorithm) - {Algorithm.SLIDING_LOG}


def reserved(algorithm: AnyAlgorithm, charged: tuple[Any, ...], state: State, now: int) -> State:
    """The state to store for a reservation.

    Args:
        algorithm: how the limit counts, one of `RESERVABLE`.
        charged: what `decide` gave at the moment of the reservation.
        state: before it.
        now: µs since the epoch; not after the moment.

    Returns:
        The state; None where it cannot be counted exactly, because the moment is too far ahead for such a rate.
    """
    if not algorithm.is_bucket:
        return (-charged[0], *charged[1:]) if charged[0] > now else charged
    level, scale, rate, at = charged[:4]
    if state is not None:
        now = max(now, state[3])
    level += rate * (at - now)
    if level > MAX_EXACT:
        return None
    return (level, scale, rate, now, *(() if state is None else live_leases(state, now)))


def followed(algorithm: AnyAlgorithm, limit: Limit, state: State, now: int, at: int) -> bool:
    """Whether others may have been given a later moment because of this limit.

    Args:
        algorithm: how the limit counts, one of `RESERVABLE`.
        state: of it; None for nothing.
        now: µs since the epoch.
        at: moment of the reservation.

    Returns:
        False if there are none; True also for a sliding window, whose state does not show it.
    """
    if state is None:
        return False
    if algorithm.is_bucket:
        scale, rate = scale_and_rate(limit)
        now = max(now, state[3])
        return level_at(state, now, scale, rate) - rate * max(at - now, 0) > limit.capacity * scale
    return algorithm is Algorithm.SLIDING_WINDOW or abs(state[0]) > _start_of(limit, at)


def released(
    algorithm: AnyAlgorithm, limit: Limit, state: State, now: int, at: int, cost: int, *, last: bool
) -> tuple[State, int]:
    """Give back a reservation whose moment has not come.

    Args:
        algorithm: how the limit counts, one of `RESERVABLE`.
        state: of it; None for nothing.
        now: µs since the epoch.
        at: moment of the reservation.
        cost: units reserved.
        last: whether no later reservation exists under any of the limits that were reserved together.

    Returns:
        The new state, and how many units are available again.
    """
    if state is None or now >= at:
        return state, 0
    if algorithm.is_bucket:
        return _released_by_bucket(limit, state, now, cost) if last else (state, 0)
    start = _start_of(limit, at)
    begins = abs(state[0])
    place = 1
    if start != begins:
        before = bounds_of(limit, begins - 1)[0] if limit.is_calendar else begins - limit.window_us
        if algorithm is not Algorithm.SLIDING_WINDOW or start != before:
            return state, 0
        place = 2
    units = min(state[place], cost)
    return (*state[:place], state[place] - units, *state[place + 1 :]), units


def _start_of(limit: Limit, at: int) -> int:
    return bounds_of(limit, at)[0] if limit.is_calendar else at - at % limit.window_us


def _released_by_bucket(limit: Limit, state: tuple[Any, ...], now: int, cost: int) -> tuple[State, int]:
    scale, rate = scale_and_rate(limit)
    now = max(now, state[3])
    level = level_at(state, now, scale, rate)
    units = min(cost, level // scale)
    return (level - units * scale, scale, rate, now, *live_leases(state, now)), units
