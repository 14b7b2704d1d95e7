"""How long a caller that was denied waits before it asks again."""

from __future__ import annotations

from tidegate.errors import BadRequest
from tidegate.jitter import JITTER


def retry_pause_s(retry_after_s: float | None, remaining_s: float) -> float | None:
    """The pause before the next attempt, with jitter: without it, all callers that were denied together would retry together.

    Args:
        retry_after_s: of the denial, s; None if the same cost never passes.
        remaining_s: how long the caller still waits, s.

    Returns:
        Seconds: `retry_after_s` and up to a quarter more, at most 1 s more; None if it cannot pass in time.
    """
    if retry_after_s is None or retry_after_s > remaining_s:
        return None
    return min(retry_after_s + JITTER.uniform(0.0, min(0.01 + retry_after_s / 4, 1.0)), remaining_s)


def checked_wait_s(at_most_s: float) -> float:
    """How long a caller waits at most.

    Raises:
        BadRequest: if it is negative or not a number.
    """
    if not at_most_s >= 0:
        raise BadRequest(f"at_most_s {at_most_s!r:.40} is out of range; expected at least 0 seconds, e.g. 30", field="at_most_s")
    return at_most_s
