"""Windows that are reserved and have not begun: what checks get until then. See `reservations`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from tidegate.policy.limits import Limit

S = TypeVar("S", bound=tuple[int, ...])


def decide_reserved(
    decide: Callable[[Limit, Any, int, int], tuple[S | None, int, int, int | None]], limit: Limit, state: S, now: int, cost: int
) -> tuple[S | None, int, int, int | None]:
    """Decide on a window's state whose start is below 0; parameters and result as of `decide`.

    Args:
        decide: of the algorithm.
    """
    begins = -state[0]
    begun = (begins, *state[1:])
    if now >= begins:
        return decide(limit, begun, now, cost)
    ahead = begins - now
    _, _, reset, _ = decide(limit, begun, begins, 0)
    if not cost:
        return state, 0, ahead + reset, 0
    _, _, _, retry = decide(limit, begun, begins, cost)
    return None, 0, ahead + reset, None if retry is None else ahead + retry
