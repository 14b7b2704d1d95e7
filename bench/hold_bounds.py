"""How much of a token bucket's budget could be usable at most: bounds for the replay of `bench.holds`.

The promise: in no span of time `t` is more than `burst + rate × t` admitted. A hold counts at the time at which it was opened,
and while it is open with what it reserved, because it may use all of it.

`most_usable` bounds every algorithm that keeps the promise, also one that knows the log in advance and chooses whom to admit.
Of a request that was admitted, all spans of a length T that contain its opening count its tokens, and those that end while it is
in progress what was reserved besides. Over all ends of spans these sums are at most `(burst + rate × T) × (period + T)`. The
most tokens within that are those of the shortest requests first, as in a knapsack that may be filled with parts. The least
result for all T bounds the share.

`usable_by_rerun` is the share of the algorithm that admits whatever it safely can: after each settlement the bucket's history is
computed again as if the hold had reserved only what it used. It needs the whole history since the oldest open hold.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple


class Held(NamedTuple):
    """A request of the log.

    Args:
        at_us: when its hold is opened.
        tokens: that it uses.
        reserved: tokens.
        ends_us: when it is settled.
    """

    at_us: int
    tokens: int
    reserved: int
    ends_us: int


def most_usable(log: Sequence[Held], burst: int, tokens_per_us: float, period_us: int) -> float:
    """Tokens that no algorithm can exceed, and keep the promise.

    Args:
        log: all requests.
        burst: tokens.
        tokens_per_us: the rate.
        period_us: of the log.
    """
    shortest = sorted(log, key=lambda each: (each.ends_us - each.at_us) * (each.reserved / each.tokens - 1))
    return min(_within(shortest, burst, tokens_per_us, period_us, span_s * 1_000_000) for span_s in range(5, 400, 5))


def _within(shortest: Sequence[Held], burst: int, tokens_per_us: float, period_us: int, span_us: int) -> float:
    room = (burst + tokens_per_us * span_us) * (period_us + span_us)
    used = 0.0
    for each in shortest:
        duration_us = min(each.ends_us - each.at_us, span_us)
        needed = each.tokens * span_us + (each.reserved - each.tokens) * duration_us
        if needed > room:
            return used + each.tokens * room / needed
        room -= needed
        used += each.tokens
    return used


def usable_by_rerun(log: Sequence[Held], burst: int, tokens_per_us: float) -> int:
    """Tokens that are used where the bucket's history is computed again after each settlement.

    Args:
        log: all requests, in order of time.
        burst: tokens.
        tokens_per_us: the rate.
    """
    times: list[int] = []
    before: list[float] = []
    """The level just before each charge."""
    charged: list[int] = []
    ends: list[tuple[int, int, int]] = []
    used = 0
    for each in log:
        while ends and ends[0][0] <= each.at_us:
            _, place, rest = heapq.heappop(ends)
            charged[place] -= rest
            # Later levels fall by what was given back, less what would have drained below zero until then.
            less: float = rest
            for later in range(place + 1, len(before)):
                less = min(less, before[later])
                if less <= 0:
                    break
                before[later] -= less
        level = max(before[-1] + charged[-1] - (each.at_us - times[-1]) * tokens_per_us, 0.0) if times else 0.0
        if level + each.reserved <= burst:
            heapq.heappush(ends, (each.ends_us, len(times), each.reserved - each.tokens))
            times.append(each.at_us)
            before.append(level)
            charged.append(each.reserved)
            used += each.tokens
    return used
