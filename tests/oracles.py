"""Independent, slow, exact answers to what each algorithm promises: whole histories and fractions, no states.

A history is a list of admissions `(moment_us, cost)`. Each oracle says how many units may pass now if nobody else asks.
"""

from __future__ import annotations

import datetime
from fractions import Fraction
from math import floor

from tidegate.policy.limits import Algorithm, Limit

History = list[tuple[int, int]]
EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


def window_of(limit: Limit, now: int) -> tuple[int, int]:
    """The aligned window that holds a moment, by the calendar module and not by our arithmetic."""
    if not (limit.calendar_month or limit.calendar_year):
        start = (now // limit.window_us) * limit.window_us
        return start, start + limit.window_us
    moment = EPOCH + datetime.timedelta(microseconds=now)
    if limit.calendar_year:
        new_year = moment.replace(month=1, day=1, hour=0, minute=0, second=0, microsecond=0)
        return _us(new_year), _us(new_year.replace(year=new_year.year + 1))
    first = moment.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    following = first.replace(year=first.year + first.month // 12, month=first.month % 12 + 1)
    return _us(first), _us(following)


def _us(moment: datetime.datetime) -> int:
    return (moment - EPOCH) // datetime.timedelta(microseconds=1)


def used(algorithm: Algorithm, limit: Limit, history: History, now: int) -> int:
    """Units that count now, rounded as each algorithm rounds: whole units for windows, up for buckets."""
    if algorithm is Algorithm.FIXED_WINDOW:
        start, end = window_of(limit, now)
        return sum(cost for at, cost in history if start <= at < end)
    if algorithm is Algorithm.SLIDING_WINDOW:
        start, end = window_of(limit, now)
        before_start, before_end = window_of(limit, start - 1)
        current = sum(cost for at, cost in history if start <= at < end)
        previous = sum(cost for at, cost in history if before_start <= at < before_end)
        return current + floor(Fraction(previous * (end - now), end - start))
    if algorithm is Algorithm.SLIDING_LOG:
        return sum(cost for at, cost in history if now - limit.window_us < at <= now)
    level = Fraction(0)
    last = 0
    for at, cost in [*history, (now, 0)]:
        level = max(level - Fraction(limit.amount * (at - last), limit.window_us), Fraction(0)) + cost
        last = at
    return -floor(-level)


def allowed(algorithm: Algorithm, limit: Limit, history: History, now: int, cost: int) -> bool:
    """Whether a cost passes now."""
    return cost == 0 or used(algorithm, limit, history, now) + cost <= limit.capacity


def most_in_any_window(limit: Limit, history: History) -> int:
    """The most units admitted in any window `(t − window, t]`, wherever it lies."""
    return max((sum(cost for at, cost in history if moment - limit.window_us < at <= moment) for moment, _ in history), default=0)
