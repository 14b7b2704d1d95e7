"""Failures: attempts whose outcome is known later, such as log-ins. A limit counts those that failed and those in progress.

Guarantee: in any span as long as its window, no more attempts begin than the amount, but for those that succeeded or whose
outcome was not reported. An attempt is a hold, which takes one unit until it is settled. A check takes none; it is denied while
none is free.

State: `(taken, level, ends, kept, times)`. `taken` are attempts in progress, which stores count; `level` is the number of
penalties in a row, the last of which ends at `ends` and is remembered until `kept`; `times` are those of failures, the oldest
first, at most as many as the largest amount. All limits of a counter have the same state. Times are µs since the epoch.

A failure that reaches a limit begins a penalty where the rule has some, and the failures before it are forgotten. The next
penalty is longer, unless the last one ended as long ago as it lasted, and as the longest window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tidegate.policy.failures import FailureCount
from tidegate.policy.limits import Limit
from tidegate.timestamps import US_PER_S

FailureState = tuple[int, int, int, int, tuple[int, ...]]
RETRY_US: Final = US_PER_S
"""When a denial may be retried that is due to attempts in progress; the same number is in the Lua."""
FRESH: Final[FailureState] = (0, 0, 0, 0, ())
_NEVER: Final = 1 << 61


def decide(limit: Limit, state: FailureState | None, now: int, cost: int) -> tuple[FailureState | None, int, int, int | None]:
    """Whether another attempt may begin.

    Args:
        limit: one of the counter.
        state: of the counter; None for none.
        now: µs since the epoch.
        cost: 0 for a look, which always passes.
    """
    taken, _, ends, _, times = state = state or FRESH
    if ends > now:
        return (None if cost else state), 0, ends - now, (ends - now if cost else 0)
    failed = failures_in(limit, times, now)
    reset = times[-1] + limit.window_us - now if failed else 0
    free = limit.amount - failed - taken
    if free > 0 or not cost:
        return state, max(free, 0), reset, 0
    retry = times[-limit.amount] + limit.window_us - now if failed >= limit.amount else RETRY_US
    return None, 0, reset, retry


def failures_in(limit: Limit, times: Sequence[int], now: int) -> int:
    """How many failures are in the window of a limit."""
    oldest = now - limit.window_us
    return sum(time > oldest for time in times)


def expires_at(limit: Limit, state: FailureState) -> int:
    """When the state can be dropped: not by itself while an attempt is in progress."""
    taken, _, ends, kept, times = state
    if taken:
        return _NEVER
    return max(ends, kept, times[-1] + limit.window_us if times else 0)


def merge(_: Limit, state: FailureState | None, __: FailureState) -> FailureState:
    """Merge a state of another store: its attempts are not known here, so nothing is added."""
    return state or FRESH


def settle(
    failures: FailureCount, limits: Sequence[Limit], state: FailureState | None, now: int, failed: int, success: bool
) -> FailureState:
    """Record the outcome of an attempt that is not in progress any more.

    Args:
        failures: how the rule counts.
        state: of it, without the attempt.
        now: µs since the epoch.
        failed: how many failures there were; 0 for none.
        success: whether the attempt succeeded; without failure and success the outcome is unknown.

    Returns:
        The new state.
    """
    taken, level, ends, kept, times = state or FRESH
    if not failed:
        return (taken, 0, 0, 0, ()) if success and failures.clear_on_success else (taken, level, ends, kept, times)
    longest = max(limit.window_us for limit in limits)
    most = max(limit.amount for limit in limits)
    moment = max(now, times[-1]) if times else now
    times = tuple(time for time in times if time > now - longest) + (moment,) * min(failed, most)
    times = times[-most:]
    if failures.penalty_s and any(failures_in(limit, times, now) >= limit.amount for limit in limits):
        level = level if kept > now else 0
        penalty_us = failures.penalty_s[min(level, len(failures.penalty_s) - 1)] * US_PER_S
        ends = now + penalty_us
        return taken, level + 1, ends, ends + max(penalty_us, longest), ()
    return taken, level, ends, kept, times
