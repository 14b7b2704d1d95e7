"""The Lua that Redis runs, put together from the files beside the algorithms and beside this module.

A script holds only the algorithms that its call needs: Redis makes a script's functions anew on each call.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import resources
from typing import Any, Final

import msgspec

from tidegate.algorithms import State
from tidegate.algorithms.token_bucket import scale_and_rate
from tidegate.policy.limits import (
    Algorithm,
    AnyAlgorithm,
    ConcurrencyAlgorithm,
    FailureAlgorithm,
    Limit,
    LimitSet,
    QuotaAlgorithm,
)
from tidegate.policy.periods import Period
from tidegate.policy.quotas import QuotaLimit
from tidegate.timestamps import US_PER_S

_LUA_NAME: Final[dict[AnyAlgorithm, str]] = {
    **{algorithm: algorithm.value for algorithm in Algorithm},
    Algorithm.LEAKY_BUCKET: Algorithm.TOKEN_BUCKET.value,
    QuotaAlgorithm.QUOTA: QuotaAlgorithm.QUOTA.value,
    ConcurrencyAlgorithm.CONCURRENT: ConcurrencyAlgorithm.CONCURRENT.value,
    FailureAlgorithm.FAILURES: FailureAlgorithm.FAILURES.value,
}
_NEEDS: Final = {
    "fixed_window": ("calendar", "packed"),
    "sliding_window": ("calendar", "packed"),
    "sliding_log": (),
    "token_bucket": ("packed",),
    "quota": ("packed",),
    "concurrent": (),
    "failures": (),
}
_BACK: Final = {
    "fixed_window": "holds_windows",
    "sliding_window": "holds_windows",
    "sliding_log": "holds_log",
    "token_bucket": "holds_bucket",
    "quota": "holds_quota",
}
"""Where the units of holds go back to."""
_PERIOD_NUMBER: Final = {period: number for number, period in enumerate(Period, 1)}
_SHARED: Final = ("arithmetic", "calendar", "packed")


class Script(msgspec.Struct, frozen=True):
    """A script ready to be called.

    Args:
        source: Lua.
        sha: SHA-1 of it, hex: its name for EVALSHA.
    """

    source: bytes
    sha: str


@cache
def script(
    work: str, algorithms: frozenset[AnyAlgorithm], clock: str = "store_clock", watched: bool = False, crossings: bool = False
) -> Script:
    """Put a script together.

    Args:
        work: `charge`, `charge_many`, `lease`, `give_back`, `reserve`, `release`, `hold`, `settle_hold`, `renew_hold`,
            `count_holds`, `adjust`, `absorb`, `reset`, `reset_corrupt`, `heartbeat` or `instances`.
        algorithms: those that its counters use.
        clock: name of the Lua file that defines `now`, or Lua source, for tests.
        watched: whether a script that decides checks also replies what is left of each limit.
        crossings: whether `settle_hold`, `adjust` or `absorb` replies in an array, with what is left of each limit before
            and after, and the clock.

    Returns:
        The script.
    """
    names = sorted({_LUA_NAME[algorithm] for algorithm in algorithms})
    needed = {part for name in names for part in _NEEDS[name]} | {"arithmetic"}
    # First of all the clock: what tests put there may also stand between the script and Redis.
    parts = [clock if " " in clock else _read("tidegate.counters.redis", clock), "local algorithms = {}\n"]
    # Redis makes the functions of a script on each call: those that only `absorb` needs are made there alone.
    parts.append(f"local absorbs = {str(work == 'absorb').lower()}\n")
    parts += [_read("tidegate.algorithms", part) for part in _SHARED if part in needed]
    parts += [_read("tidegate.algorithms", name) for name in names]
    if work in ("lease", "give_back"):
        parts.append(_read("tidegate.algorithms", "leases"))
    if work in ("reserve", "release"):
        parts.append(_read("tidegate.algorithms", "reservations"))
    if work.startswith("charge") or work in ("lease", "hold", "settle_hold", "renew_hold", "adjust"):
        parts += _deciding(work, names, watched, crossings)
    if crossings:
        parts.append(_read("tidegate.counters.redis", "crossings"))
        if work == "settle_hold":
            parts.append(_read("tidegate.counters.redis", "settle_plain"))
    parts.append(_read("tidegate.counters.redis", work))
    if crossings:
        parts.append(_read("tidegate.counters.redis", "crossings_end"))
    source = "".join(parts).encode()
    return Script(source, hashlib.sha1(source, usedforsecurity=False).hexdigest())


def _deciding(work: str, names: Sequence[str], watched: bool, crossings: bool) -> list[str]:
    """What a script has that decides checks, or knows holds.

    Redis makes the functions of a script on each call: those that most calls do not need come after the common case, which
    ends before them, or inside a function that is called where they are needed.
    """
    backs = [_read("tidegate.algorithms", part) for part in dict.fromkeys(_BACK[name] for name in names if name in _BACK)]
    levels = [_read("tidegate.algorithms", "holds_levels")] if "token_bucket" in names else []
    parts = ["local left = {}\n" if watched else "local left\n", _read("tidegate.counters.redis", "hold_keys")]
    if work == "hold":
        parts += [*levels, _read("tidegate.counters.redis", "hold_plain")]
    elif work in ("settle_hold", "adjust"):
        parts += backs
        if work == "settle_hold":
            parts += [] if crossings else [_read("tidegate.counters.redis", "settle_plain")]
        else:
            parts += [*levels, _read("tidegate.algorithms", "holds_refund")]
        parts.append(_read("tidegate.algorithms", "holds_charge"))
        backs = []
    parts.append(_read("tidegate.counters.redis", "decide"))
    parts += ["local function give_back_function()\n", *backs, _read("tidegate.algorithms", "holds"), "return give_back\nend\n"]
    parts.append(_read("tidegate.counters.redis", "reclaim"))
    return parts


def parameters(limits: LimitSet, now_us: int = 0, *, charging: bool = False) -> bytes:
    """The parameters of a counter for a script: `[algorithm, window, amount, …]` in MessagePack.

    Args:
        now_us: µs since the epoch, around which the periods of quotas are sent; 0 for this machine's clock.
        charging: whether the script decides checks: only then soft limits differ from others.

    Returns:
        The bytes.
    """
    name = _LUA_NAME[limits.algorithm]
    values: list[Any] = [f"soft:{name}" if charging and limits.soft else name]
    for limit in limits.limits:
        if isinstance(limit, QuotaLimit):
            values += _quota_parameters(limit, now_us or time.time_ns() // 1000)
            continue
        values.append(_window(limit))
        if limits.failures is not None:
            values += [limit.amount, [int(limits.failures.clear_on_success), *limits.failures.penalty_s]]
        elif limits.algorithm.is_bucket:
            values += [limit.capacity, *scale_and_rate(limit)]
        else:
            values.append(limit.amount)
    return msgspec.msgpack.encode(values)


def wire_states(limits: LimitSet, states: Iterable[State]) -> bytes:
    """States as `absorb` takes them.

    Args:
        states: one for each limit, None for nothing.

    Returns:
        MessagePack: an array with a state or false for each limit.
    """
    return msgspec.msgpack.encode([False if state is None else _wire(limits.algorithm, state) for state in states])


def layout(limits: LimitSet) -> str:
    """What keeps counters of one name apart in Redis: the shape of their states.

    Returns:
        The algorithm's name in Lua. Windows have names of their own inside a counter.
    """
    return _LUA_NAME[limits.algorithm]


def layout_names(algorithms: Iterable[AnyAlgorithm]) -> dict[str, AnyAlgorithm]:
    """One algorithm for each name in Lua that these have."""
    return {_LUA_NAME[algorithm]: algorithm for algorithm in sorted(algorithms)}


def boundaries_end_us(limits: LimitSet, now_us: int) -> int | None:
    """Until when parameters with the boundaries around a moment are best: the end of the first of its periods.

    Args:
        now_us: µs since the epoch.

    Returns:
        µs since the epoch; None where the parameters never change.
    """
    ends = [
        limit.clock.bounds(now_us)[1]
        for limit in limits.limits
        if isinstance(limit, QuotaLimit) and limit.clock.period.fixed_us is None
    ]
    return min(ends, default=None)


def _quota_parameters(limit: QuotaLimit, now_us: int) -> list[Any]:
    period = limit.clock.period
    boundaries: Any
    if period.fixed_us is not None:
        boundaries = period.fixed_us // US_PER_S
    else:
        boundaries = [each // US_PER_S for each in limit.clock.anchor.boundaries(period, now_us)]
    return [_PERIOD_NUMBER[period], limit.amount, limit.most, boundaries]


def _wire(algorithm: AnyAlgorithm, state: tuple[Any, ...]) -> list[int]:
    if algorithm is Algorithm.SLIDING_LOG:
        return [number for entry in zip(state[1], state[2], strict=True) for number in entry]
    if algorithm.is_bucket:
        return list(state)
    return [state[0] // US_PER_S, *state[1:]]


def _window(limit: Limit) -> int:
    if limit.is_calendar:
        return 0 if limit.calendar_month else -1
    return limit.window_us // US_PER_S


def _read(package: str, name: str) -> str:
    return resources.files(package).joinpath(f"{name}.lua").read_text(encoding="utf-8")
