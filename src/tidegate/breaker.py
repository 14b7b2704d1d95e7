"""A circuit breaker: closed, open after too many failures, and closed again when one probe succeeds."""

from __future__ import annotations

import enum
from collections import deque
from typing import Final

import msgspec

FIRST_WAIT_S: Final = 0.5


class BreakerState(enum.StrEnum):
    """What a breaker does with a call."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class BreakerOptions(msgspec.Struct, frozen=True):
    """When a breaker opens and closes.

    Args:
        failures: that open it, 1 or more.
        window_s: within this time, s.
        open_s: how long it stays open before one probe, s.
    """

    failures: int = 5
    window_s: float = 10.0
    open_s: float = 30.0


class Breaker:
    """One for each shard, or for each server of a client. The caller passes the time, monotonic seconds."""

    __slots__ = ("_closed_at", "_event", "_failed_at", "_opened_at", "opened", "options", "state", "wait_s", "why")

    def __init__(self, options: BreakerOptions) -> None:
        self.options = options
        self.state = BreakerState.CLOSED
        self.opened = 0
        self.why = ""
        """Reason of the last failure, where given."""
        self.wait_s = 0.0
        """How long to wait between background probes: doubled each time that it opens again soon after it closed."""
        self._closed_at = float("-inf")
        self._failed_at: deque[float] = deque(maxlen=options.failures)
        self._opened_at = 0.0
        self._event: object = None

    def admits(self, now: float) -> bool:
        """Whether a call may be made. After `open_s` the first call is the probe; the others are refused until its outcome.

        Args:
            now: monotonic seconds.

        Returns:
            True if the call is to be made; then report its outcome by `succeeded`, `failed` or `release`.
        """
        if self.state is BreakerState.CLOSED:
            return True
        if not self.is_due(now):
            return False
        # Also when half open: the last probe was cancelled without an outcome.
        self.state = BreakerState.HALF_OPEN
        self._opened_at = now
        return True

    def is_due(self, now: float) -> bool:
        """Whether it is not closed and a probe may be made; does not change the state.

        Args:
            now: monotonic seconds.
        """
        return self.state is not BreakerState.CLOSED and now - self._opened_at >= self.options.open_s

    def release(self) -> None:
        """The admitted probe was not made: the next call is the probe."""
        if self.state is BreakerState.HALF_OPEN:
            self._opened_at = float("-inf")

    def succeeded(self, now: float = float("-inf")) -> None:
        """A call succeeded.

        Args:
            now: monotonic seconds; only background probes need it.
        """
        if self.state is not BreakerState.CLOSED:
            self.state = BreakerState.CLOSED
            self._closed_at = now
            self._failed_at.clear()

    def failed(self, now: float, event: object = None, why: str = "") -> None:
        """A call failed.

        Args:
            now: monotonic seconds.
            event: identifies the cause, if known: calls that fail by the same lost connection count as one failure.
            why: the reason, for log and health.
        """
        if why:
            self.why = why
        if self.state is BreakerState.OPEN or (event is not None and event == self._event):
            return
        self._event = event
        self._failed_at.append(now)
        enough = len(self._failed_at) == self.options.failures and now - self._failed_at[0] <= self.options.window_s
        if enough or self.state is BreakerState.HALF_OPEN:
            # A failed probe continues the same outage.
            if self.state is BreakerState.CLOSED:
                soon = now - self._closed_at <= self.options.window_s
                self.wait_s = min(self.wait_s * 2, self.options.open_s) if soon else min(FIRST_WAIT_S, self.options.open_s)
            self.state = BreakerState.OPEN
            self._opened_at = now
            self.opened += 1

    def is_idle(self, now: float) -> bool:
        """Whether it has no state: closed, and its last failure outside the window.

        Args:
            now: monotonic seconds.

        Returns:
            True where a new breaker would do the same.
        """
        return self.state is BreakerState.CLOSED and (not self._failed_at or now - self._failed_at[-1] > self.options.window_s)
