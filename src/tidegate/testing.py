"""For tests of programs that use Tidegate: a clock that tests move, nothing consumed at the start of each, limits switched off.

    from tidegate.testing import rate_limits        # in conftest.py: a fixture of pytest

    def test_the_third_mail_is_refused(rate_limits):
        send_mail("a@example.com")
        send_mail("a@example.com")
        with pytest.raises(RateLimitExceeded):
            send_mail("a@example.com")
        rate_limits.advance(60)
        send_mail("a@example.com")

All of it concerns counters in memory that were named by a URL, or by none: those of `limit`, `Limiter`, `SyncLimiter`, and of the
middlewares with default limits. Counters on Redis are left as they are.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from tidegate.doors.stores import SWITCHES

__all__ = ["MovableClock", "allow_all", "movable_clock", "rate_limits", "reset_all"]

US_PER_S = 1_000_000


class MovableClock:
    """A clock that stands still until it is moved.

    Args:
        now_s: seconds since the epoch; the machine's time where not given.
    """

    def __init__(self, now_s: float | None = None) -> None:
        self._now_us = round((time.time() if now_s is None else now_s) * US_PER_S)

    def __call__(self) -> int:
        """µs since the epoch."""
        return self._now_us

    @property
    def now_s(self) -> float:
        """Seconds since the epoch."""
        return self._now_us / US_PER_S

    def advance(self, seconds: float) -> None:
        """Move it forward.

        Args:
            seconds: 0 or more.

        Raises:
            ValueError: if they are negative: counters need a clock that never goes back.
        """
        if seconds < 0:
            raise ValueError(f"the clock cannot go back by {-seconds} s")
        self._now_us += round(seconds * US_PER_S)


def reset_all() -> None:
    """Reset all counters in memory."""
    for store in list(SWITCHES.memory):
        store.clear()


@contextmanager
def movable_clock(now_s: float | None = None) -> Iterator[MovableClock]:
    """Count by a clock that the test moves, from nothing consumed; afterwards by the machine's again, from nothing.

    Args:
        now_s: see `MovableClock`.
    """
    clock = MovableClock(now_s)
    before, SWITCHES.clock = SWITCHES.clock, clock
    for store in list(SWITCHES.memory):
        store.use_clock(clock)
    try:
        yield clock
    finally:
        SWITCHES.clock = before
        for store in list(SWITCHES.memory):
            store.use_clock(before)


@contextmanager
def allow_all() -> Iterator[None]:
    """Let everything pass, uncounted: for tests of something else."""
    before, SWITCHES.enforced = SWITCHES.enforced, False
    try:
        yield
    finally:
        SWITCHES.enforced = before


try:
    import pytest
except ImportError:  # without pytest the rest can be used all the same
    pass
else:

    @pytest.fixture
    def rate_limits() -> Iterator[MovableClock]:
        """A clock that the test moves; nothing is consumed at its start."""
        with movable_clock() as clock:
            yield clock
